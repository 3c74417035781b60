"""The kernel for dkey and dvalue of block-sparse attention for sm_90a, in Gluon; `dquery_kernel` says how the backward is cut.

- Both results stay in registers (128 a thread), keys and values in shared memory. Scores are held transposed, `[keys,
  queries]`. The ring holds queries, the output's gradient and, by a tensor copy too, a pair (base-2 log-sum-exp, delta) for
  each query: read from global memory by column they would not fit into registers.
- Products are sent as early as their operands are there: dvalue's before the other scores are waited for, the scores of the
  next half step behind dkey's, so that a warpgroup that waits has work under way.
- Keys and values of a block are sent after the first stages of the ring, which are free before the block before it is
  written; in the other order every block exposes the latency of both.
- Each warpgroup works off a queue of blocks (`queues`), since walks of keys differ by how popular a tile is; every other
  walk of a queue goes backwards, over what the one before has left in the L2 cache.

Pads of queries have a log-sum-exp of +inf.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the types of kernel arguments are Triton's, not Python's)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from fastvideo.block_sparse.impl.hopper.dquery_kernel import masked, place_in_turn
from fastvideo.block_sparse.impl.hopper.gluon_names import tma_load


@gluon.jit
def _load_owned(boxes, bars, k_s, v_s, i_row, i_column, num_items, WG: gl.constexpr, D: gl.constexpr):
    """Send keys and values of a block once those of the block before have been let go."""
    key_boxes, value_boxes = boxes
    full, empty = bars
    mbarrier.wait(empty.index(WG), (num_items & 1) ^ 1)
    mbarrier.expect(full.index(WG), 64 * D * 4)
    tma_load(key_boxes, [i_row, i_column], full.index(WG), k_s.index(WG))
    tma_load(value_boxes, [i_row, i_column], full.index(WG), v_s.index(WG))


@gluon.jit
def _dkdv_producer(
    source, owned, ring, walks, places, WG: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, GROUP: gl.constexpr
):
    query_boxes, dout_boxes, stats_boxes, query_granules, dout_granules, stats_granules = source
    owned_boxes, owned_bars, k_s, v_s = owned
    q_s, do_s, stats_s, full, empty = ring
    queues, ends, lengths, rows, meta, max_blocks, s_plan, s_rows, first_head, HEADS, max_rows = walks
    s_row_b, s_row_h, s_column_h, s_krow_b, s_krow_h, s_kcolumn_h = places
    num_done = 0
    num_owned = 0
    i_queue = gl.program_id(0) * 2 + WG
    for i_item in range(i_queue, gl.load(ends + i_queue), gl.num_programs(0) * 2):
        i_place = gl.load(queues + i_item)
        i_head, i_block = i_place // max_blocks, i_place % max_blocks
        i_b, i_h = (first_head + i_head) // HEADS, (first_head + i_head) % HEADS
        i_own_row = i_b * s_krow_b + i_head * s_krow_h + i_block * 64
        length = gl.load(lengths + i_place)
        num_before = gl.maximum(gl.minimum(STAGES, length) - 1, 0)
        num_sent = 0
        for i_group in range(GROUP):
            i_query_head = i_head * GROUP + i_group
            i_base = i_b * s_row_b + i_query_head * s_row_h
            i_column = (i_h * GROUP + i_group) * s_column_h
            i_stats = i_query_head * max_rows
            p_meta = meta + (i_query_head * s_plan + i_block) * 8
            box_halves = gl.load(p_meta + 3) * 2
            num_halves = gl.load(p_meta + 5)
            p_rows = rows + gl.where(s_plan > 0, i_query_head, 0).to(gl.int64) * s_rows + gl.load(p_meta)
            is_back = i_item // (gl.num_programs(0) * 2) % 2 == 1
            num_clean = gl.load(p_meta + 2) * 2
            next_box = gl.load(p_rows + place_in_turn(0, 0, num_clean, is_back))
            for i_half in range(num_halves):
                i_box = next_box
                next_box = gl.load(p_rows + place_in_turn(i_half + 1, 0, num_clean, is_back))
                i_stage = WG * STAGES + num_done % STAGES
                bar = full.index(i_stage)
                mbarrier.wait(empty.index(i_stage), ((num_done // STAGES) & 1) ^ 1)
                mbarrier.expect(bar, 64 * D * 4 + 512)
                if i_half < box_halves:
                    tma_load(query_boxes, [i_base + i_box, i_column], bar, q_s.index(i_stage))
                    tma_load(stats_boxes, [(i_stats + i_box) * 2], bar, stats_s.index(i_stage))
                    tma_load(dout_boxes, [i_base + i_box, i_column], bar, do_s.index(i_stage))
                else:
                    p_half = p_rows + box_halves + (i_half - box_halves) * 4
                    for i in gl.static_range(4):
                        i_granule = gl.load(p_half + i)
                        i_from = i_base + i_granule
                        tma_load(query_granules, [i_from, i_column], bar, q_s.index(i_stage).slice(16 * i, 16, dim=0))
                        tma_load(stats_granules, [(i_stats + i_granule) * 2], bar, stats_s.index(i_stage).slice(32 * i, 32))
                        tma_load(dout_granules, [i_from, i_column], bar, do_s.index(i_stage).slice(16 * i, 16, dim=0))
                num_done += 1
                if num_sent == num_before:
                    _load_owned(owned_boxes, owned_bars, k_s, v_s, i_own_row, i_h * s_kcolumn_h, num_owned, WG, D)
                num_sent += 1
        if length == 0:
            _load_owned(owned_boxes, owned_bars, k_s, v_s, i_own_row, i_h * s_kcolumn_h, num_owned, WG, D)
        num_owned += 1  # noqa: SIM113 (kernels have no enumerate)


@gluon.jit
def _columns_of(stats, COLUMNS: gl.constexpr):
    """Log-sum-exp and delta of 64 columns from pairs in shared memory, 16 bytes a read."""
    pairs: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[1], [2], [16], [32], [64]],
        lane_bases=[[4], [8], [0], [0], [0]],
        warp_bases=[[0], [0]],
        block_bases=[],
        shape=[128],
    )
    b_lse, b_delta = gl.split(stats.load(pairs).reshape([64, 2]))
    return gl.convert_layout(b_lse, COLUMNS, assert_trivial=True), gl.convert_layout(b_delta, COLUMNS, assert_trivial=True)


@gluon.jit
def _dkdv_consumer(owned, ring, work, tensors, WG: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, GROUP: gl.constexpr):
    k_s, v_s, owned_full, owned_empty = owned
    q_s, do_s, stats_s, full, empty = ring
    queues, ends, masks, meta, row_token, max_blocks, s_plan, s_masks, first_head, HEADS, NUM_KEYS = work
    dkey, dvalue, scale, scale_log2 = tensors
    scores: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    result: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=result, k_width=2)
    columns: gl.constexpr = gl.SliceLayout(0, scores)
    memory: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = dkey.dtype.element_ty
    b_none = gl.zeros([64, 64], gl.float32, scores)
    o_column = gl.arange(0, 64, columns)
    o_granule = gl.arange(0, 64, gl.SliceLayout(1, scores)) // 16
    o_row = gl.arange(0, 64, gl.SliceLayout(1, memory))
    o_d = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, memory)), 0)
    k = k_s.index(WG)
    v = v_s.index(WG)
    num_done = 0
    num_owned = 0
    i_queue = gl.program_id(0) * 2 + WG
    for i_item in range(i_queue, gl.load(ends + i_queue), gl.num_programs(0) * 2):
        i_place = gl.load(queues + i_item)
        i_head, i_block = i_place // max_blocks, i_place % max_blocks
        b_dk = gl.zeros([64, D], gl.float32, result)
        b_dv = gl.zeros([64, D], gl.float32, result)
        mbarrier.wait(owned_full.index(WG), num_owned & 1)
        for i_group in range(GROUP):
            i_query_head = i_head * GROUP + i_group
            p_meta = meta + (i_query_head * s_plan + i_block) * 8
            clean_halves = gl.load(p_meta + 2) * 2
            num_halves = gl.load(p_meta + 5)
            p_masks = masks + gl.where(s_plan > 0, i_query_head, 0).to(gl.int64) * s_masks + gl.load(p_meta + 1) - clean_halves
            if num_halves > 0:
                i_first = WG * STAGES + num_done % STAGES
                mbarrier.wait(full.index(i_first), (num_done // STAGES) & 1)
                b_st = warpgroup_mma(k, q_s.index(i_first).permute((1, 0)), b_none, use_acc=False, is_async=True)
                b_s = warpgroup_mma_wait(0, deps=(b_st,))
                for i_half in range(num_halves):
                    i_stage = WG * STAGES + num_done % STAGES
                    word = 0
                    if i_half >= clean_halves:
                        word = gl.load(p_masks + i_half)
                    b_dpt = warpgroup_mma(v, do_s.index(i_stage).permute((1, 0)), b_none, use_acc=False, is_async=True)
                    b_lse, _unused = _columns_of(stats_s.index(i_stage), columns)
                    b_p = gl.exp2(b_s * scale_log2 - gl.expand_dims(b_lse, 0))
                    b_p = masked(b_p, i_half, clean_halves, word, o_granule, o_column, 64)
                    b_po = gl.convert_layout(b_p.to(dtype), operand)
                    b_dvt = warpgroup_mma(b_po, do_s.index(i_stage), b_dv, is_async=True)
                    # Both numbers of a pair together do not fit into registers, and within one basic block the compiler would
                    # read them once: a wait that is over already begins another.
                    mbarrier.wait(full.index(i_stage), (num_done // STAGES) & 1)
                    b_dp = warpgroup_mma_wait(1, deps=(b_dpt,))
                    _unused, b_delta = _columns_of(stats_s.index(i_stage), columns)
                    b_ds = gl.convert_layout((b_p * (b_dp - gl.expand_dims(b_delta, 0))).to(dtype), operand)
                    b_dkt = warpgroup_mma(b_ds, q_s.index(i_stage), b_dk, is_async=True)
                    # Behind the last half step come the scores of some stage or other, which nobody reads.
                    num_done += 1
                    i_next = WG * STAGES + num_done % STAGES
                    mbarrier.wait(full.index(i_next), (num_done // STAGES) & 1, pred=i_half + 1 < num_halves)
                    b_st = warpgroup_mma(k, q_s.index(i_next).permute((1, 0)), b_none, use_acc=False, is_async=True)
                    b_dk, b_dv = warpgroup_mma_wait(1, deps=(b_dkt, b_dvt))
                    mbarrier.arrive(empty.index(i_stage))
                    # Across the turns of a loop a product must not be under way: ptxas would wait after each one.
                    b_s = warpgroup_mma_wait(0, deps=(b_st,))
        i_b, i_h = ((first_head + i_head) // HEADS).to(gl.int64), (first_head + i_head) % HEADS
        o_token = i_block * 64 + o_row
        if row_token is not None:
            o_token = gl.load(row_token + o_token)
        m_row = gl.expand_dims(o_token >= 0, 1)
        o_to = (i_b * NUM_KEYS * HEADS + i_h) * D + gl.expand_dims(o_token.to(gl.int64), 1) * (HEADS * D) + o_d
        # Keys and values have been read; their memory turns rows into 16 bytes a thread.
        k.store((b_dk * scale).to(dtype))
        v.store(b_dv.to(dtype))
        gl.store(dkey + o_to, k.load(memory), mask=m_row)
        gl.store(dvalue + o_to, v.load(memory), mask=m_row)
        fence_async_shared()
        mbarrier.arrive(owned_empty.index(WG))
        num_owned += 1  # noqa: SIM113 (kernels have no enumerate)


@gluon.jit(do_not_specialize=[*("max_blocks", "max_rows", "s_plan", "s_rows", "s_masks", "first_head", "HEADS", "NUM_KEYS")])
def block_sparse_bwd_dkdv_kernel(
    query_boxes,
    dout_boxes,
    stats_boxes,
    query_granules,
    dout_granules,
    stats_granules,
    key_boxes,
    value_boxes,
    queues,
    ends,
    lengths,
    rows,
    masks,
    meta,
    row_token,
    dkey,
    dvalue,
    max_blocks,
    max_rows,
    s_plan,
    s_rows,
    s_masks,
    first_head,
    HEADS,
    NUM_KEYS,
    s_row_b,
    s_row_h,
    s_column_h,
    s_krow_b,
    s_krow_h,
    s_kcolumn_h,
    scale,
    scale_log2,
    D: gl.constexpr,
    GROUP: gl.constexpr,
    STAGES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Gradients of keys and values, `[B, S_k, Hkv, D]`, of some key heads from `first_head` on.

    `queues` and `ends` are those of `QueueFiller`, with places `head * max_blocks + block`; `lengths` holds the half steps of
    each place over the GROUP query heads. `max_rows` are the packed rows of a query head; `s_row_*` lead to queries, `s_krow_*`
    to keys.
    """
    dtype: gl.constexpr = dkey.dtype.element_ty
    k_s = gl.allocate_shared_memory(dtype, [2, 64, D], key_boxes.layout)
    v_s = gl.allocate_shared_memory(dtype, [2, 64, D], value_boxes.layout)
    q_s = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, D], query_boxes.layout)
    do_s = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, D], dout_boxes.layout)
    stats_s = gl.allocate_shared_memory(gl.float32, [2 * STAGES, 128], stats_boxes.layout)
    owned_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    owned_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(owned_full.index(i), count=1)
        mbarrier.init(owned_empty.index(i), count=1)
    for i in gl.static_range(2 * STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    ring = (q_s, do_s, stats_s, full, empty)
    held = (k_s, v_s, owned_full, owned_empty)
    work = (queues, ends, masks, meta, row_token, max_blocks, s_plan, s_masks, first_head, HEADS, NUM_KEYS)
    tensors = (dkey, dvalue, scale, scale_log2)
    source = (query_boxes, dout_boxes, stats_boxes, query_granules, dout_granules, stats_granules)
    sent = ((key_boxes, value_boxes), (owned_full, owned_empty), k_s, v_s)
    walks = (queues, ends, lengths, rows, meta, max_blocks, s_plan, s_rows, first_head, HEADS, max_rows)
    places = (s_row_b, s_row_h, s_column_h, s_krow_b, s_krow_h, s_kcolumn_h)
    gl.warp_specialize(
        [
            (_dkdv_consumer, (held, ring, work, tensors, 0, STAGES, D, GROUP)),
            (_dkdv_consumer, (held, ring, work, tensors, 1, STAGES, D, GROUP)),
            (_dkdv_producer, (source, sent, ring, walks, places, 0, STAGES, D, GROUP)),
            (_dkdv_producer, (source, sent, ring, walks, places, 1, STAGES, D, GROUP)),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )
