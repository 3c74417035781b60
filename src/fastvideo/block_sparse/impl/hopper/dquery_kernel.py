"""The kernel for dquery of block-sparse attention for sm_90a, in Gluon.

The backward is this kernel and one for dkey and dvalue (`dkdv_kernel`). Both are persistent, with two consumer warpgroups that
own a block of 64 packed rows each and walk its plan (`plan.py`) in half steps of 64 rows, and one producer warp a warpgroup
that fills its ring by tensor copies. The scores are computed anew in each, seven products where one kernel would need five;
but nothing is added into memory, so the same inputs give the same bits, and that is also faster: fp32 additions into dquery
run at 1.6 TB/s, which alone costs more than the two products.

Queries, the output's gradient and dquery stay in registers (for small heads only the last); the ring holds keys and values.
The products of the next half step are sent behind the last of the one before, so that a warpgroup that makes score gradients
has work under way, and the product with the output's gradient begins with minus delta. Pairs of blocks share steps and
programs keep in step as in the forward; if they do, every other wave walks backwards, over what the wave before has left in
the L2 cache. Pads of keys are masked, since `exp2(0 - lse)` may be infinite.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the types of kernel arguments are Triton's, not Python's)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait

from fastvideo.block_sparse.impl.hopper.forward_kernel import count_pairs, keep_in_step, locate_pair, seen
from fastvideo.block_sparse.impl.hopper.gluon_names import tma_load


@gluon.jit
def _mask_bytes(o_column, word):
    """The byte of each of 64 columns' granule; see `plan.py`."""
    return (word >> (o_column // 16 * 8)) & 255


@gluon.jit
def masked(b_p, i_half, clean_halves, word, o_granule, o_column, BOX_TOKENS: gl.constexpr):
    if i_half >= clean_halves:
        b_p = gl.where(seen(_mask_bytes(o_column, word), o_granule, o_column), b_p, 0.0)
    elif BOX_TOKENS < 64:
        b_p = gl.where(gl.expand_dims(o_column < BOX_TOKENS, 0), b_p, 0.0)
    return b_p


@gluon.jit
def place_in_turn(i_half, num_shared, num_clean, is_back):
    """Where a half step of a ring stands in its plan: `is_back` turns the shared ones round, and then the others without masks.

    Which of those comes first is all the same to who reads them.
    """
    back = gl.where(i_half < num_shared, num_shared, num_shared + num_clean) - 1 - i_half
    return gl.where(is_back & (i_half < num_clean), back, i_half)


@gluon.jit
def _dq_producer(
    source,
    walks,
    places,
    WG: gl.constexpr,
    STAGES: gl.constexpr,
    D: gl.constexpr,
    IN_STEP: gl.constexpr,
    WAVES: gl.constexpr,
):
    key_boxes, value_boxes, key_granules, value_granules, k_s, v_s, full, empty = source
    rows, meta, counts, arrivals, num_heads, s_plan, s_rows, first_head, HEADS, GROUP = walks
    s_row_b, s_row_h, s_column_h = places
    num_pairs, num_joint, num_blocks = count_pairs(counts, num_heads)
    num_done = 0
    for i_pair in range(gl.program_id(0), num_pairs, gl.num_programs(0)):
        if IN_STEP:
            keep_in_step(arrivals, i_pair, num_pairs, IN_STEP, WAVES)
        i_head, i_first, end = locate_pair(i_pair, num_heads, num_joint, num_blocks)
        i_block = i_first + WG
        if i_block < end:
            i_base = (first_head + i_head) // HEADS * s_row_b + i_head // GROUP * s_row_h
            i_column = (first_head + i_head) % HEADS // GROUP * s_column_h
            p_meta = meta + (i_head * s_plan + i_block) * 8
            num_shared = gl.load(p_meta + 6)
            box_halves = gl.load(p_meta + 3) * 2 - num_shared
            num_halves = gl.load(p_meta + 5) - num_shared
            p_rows = rows + gl.where(s_plan > 0, i_head, 0).to(gl.int64) * s_rows + gl.load(p_meta)
            is_back = (i_pair // gl.num_programs(0) % 2 == 1) & (IN_STEP > 0)
            num_clean = gl.load(p_meta + 2) * 2 - num_shared
            next_box = gl.load(p_rows + place_in_turn(0, num_shared, num_clean, is_back))
            for i_half in range(num_halves):
                i_box = next_box
                next_box = gl.load(p_rows + place_in_turn(i_half + 1, num_shared, num_clean, is_back))
                i_stage = WG * STAGES + num_done % STAGES
                bar = full.index(i_stage)
                mbarrier.wait(empty.index(i_stage), ((num_done // STAGES) & 1) ^ 1)
                # Two let go of each stage; for the one who does not read it, it is let go here.
                mbarrier.arrive(empty.index(i_stage), pred=i_half >= num_shared)
                mbarrier.expect(bar, 64 * D * 4)
                if i_half < box_halves:
                    tma_load(key_boxes, [i_base + i_box, i_column], bar, k_s.index(i_stage))
                    tma_load(value_boxes, [i_base + i_box, i_column], bar, v_s.index(i_stage))
                else:
                    p_half = p_rows + box_halves + (i_half - box_halves) * 4
                    for i in gl.static_range(4):
                        i_granule = i_base + gl.load(p_half + i)
                        tma_load(key_granules, [i_granule, i_column], bar, k_s.index(i_stage).slice(16 * i, 16, dim=0))
                        tma_load(value_granules, [i_granule, i_column], bar, v_s.index(i_stage).slice(16 * i, 16, dim=0))
                num_done += 1


@gluon.jit
def _place(i_half, num_shared, uses_0, uses_1, WG: gl.constexpr):
    """Ring and use of a half step. `num_shared` are steps, and `uses_*` those of each ring before the walk."""
    is_shared = i_half < 2 * num_shared
    ring = gl.where(is_shared, i_half // 2 % 2, WG)
    i_use = gl.where(is_shared, i_half // 4 * 2 + i_half % 2, i_half - num_shared)
    return ring, i_use + gl.where(ring == 0, uses_0, uses_1)


@gluon.jit
def _dq_consumer(
    buffers, work, tensors, strides, WG: gl.constexpr, STAGES: gl.constexpr, D: gl.constexpr, BOX_TOKENS: gl.constexpr
):
    staging_s, k_s, v_s, full, empty, started = buffers
    masks, meta, counts, row_token, num_heads, max_blocks, s_plan, s_masks, first_head, HEADS, NUM_QUERIES = work
    query, dout, stats, dquery, scale, scale_log2 = tensors
    s_qb, s_qs, s_qh, s_db, s_ds, s_dh = strides
    scores: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 64, 16])
    result: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    q_operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=scores, k_width=2)
    ds_operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=result, k_width=2)
    score_rows: gl.constexpr = gl.SliceLayout(1, scores)
    memory: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = query.dtype.element_ty
    b_none = gl.zeros([64, 64], gl.float32, scores)
    o_column = gl.arange(0, 64, gl.SliceLayout(0, scores))
    o_score_row = gl.arange(0, 64, score_rows)
    o_granule = o_score_row // 16
    o_row = gl.arange(0, 64, gl.SliceLayout(1, memory))
    o_d = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, memory)), 0)
    staging = staging_s.index(WG)
    num_pairs, num_joint, num_blocks = count_pairs(counts, num_heads)
    # Uses of both rings so far.
    uses_0 = 0
    uses_1 = 0
    num_met = 0
    for i_pair in range(gl.program_id(0), num_pairs, gl.num_programs(0)):
        i_head, i_first, end = locate_pair(i_pair, num_heads, num_joint, num_blocks)
        i_block = i_first + WG
        i_b, i_h = ((first_head + i_head) // HEADS).to(gl.int64), ((first_head + i_head) % HEADS).to(gl.int64)
        p_pair = meta + (i_head * s_plan + i_first) * 8
        num_shared = gl.load(p_pair + 6)
        ring_0 = gl.load(p_pair + 5) - num_shared
        ring_1 = gl.load(p_pair + 13, mask=i_first + 1 < end, other=0) - num_shared
        # Counted by pairs that share alone, so that nobody comes here twice before the partner has come once.
        mbarrier.arrive(started, pred=num_shared > 0)
        if i_block < end:
            p_meta = p_pair + WG * 8
            clean_halves = gl.load(p_meta + 2) * 2
            num_halves = gl.load(p_meta + 5)
            p_masks = masks + gl.where(s_plan > 0, i_head, 0).to(gl.int64) * s_masks + gl.load(p_meta + 1) - clean_halves
            o_token = i_block * 64 + o_row
            if row_token is not None:
                o_token = gl.load(row_token + o_token)
            m_row = gl.expand_dims(o_token >= 0, 1)
            o_token = gl.expand_dims(o_token.to(gl.int64), 1)
            p_stats = stats + ((i_head.to(gl.int64) * max_blocks + i_block) * 64 + o_score_row) * 2
            b_lse = gl.load(p_stats)
            b_less_delta = gl.expand_dims(-gl.load(p_stats + 1), 1)
            staging.store(gl.load(query + i_b * s_qb + i_h * s_qh + o_token * s_qs + o_d, mask=m_row, other=0.0))
            if D == 128:
                b_q = staging.load(q_operand)
                staging.store(gl.load(dout + i_b * s_db + i_h * s_dh + o_token * s_ds + o_d, mask=m_row, other=0.0))
                b_dout = staging.load(q_operand)
            else:
                # With score gradients of the same shape, ptxas 12.8 puts these into the registers that hold the output's
                # gradient.
                b_q = staging
                b_dout = staging_s.index(2 + WG)
                b_dout.store(gl.load(dout + i_b * s_db + i_h * s_dh + o_token * s_ds + o_d, mask=m_row, other=0.0))
                fence_async_shared()
            b_dq = gl.zeros([64, D], gl.float32, result)
            # The partner's ring must have come to this pair: phases of a barrier tell one use from the next alone.
            mbarrier.wait(started, num_met & 1, pred=num_shared > 0)
            if num_halves > 0:
                ring, i_use = _place(0, num_shared, uses_0, uses_1, WG)
                i_stage = ring * STAGES + i_use % STAGES
                word = 0
                if clean_halves == 0:
                    word = gl.load(p_masks)
                mbarrier.wait(full.index(i_stage), (i_use // STAGES) & 1)
                b_st = warpgroup_mma(b_q, k_s.index(i_stage).permute((1, 0)), b_none, use_acc=False, is_async=True)
                b_dpt = warpgroup_mma(b_dout, v_s.index(i_stage).permute((1, 0)), b_none + b_less_delta, is_async=True)
                b_s = warpgroup_mma_wait(1, deps=(b_st,))
                b_p = gl.exp2(b_s * scale_log2 - gl.expand_dims(b_lse, 1))
                b_p = masked(b_p, 0, clean_halves, word, o_granule, o_column, BOX_TOKENS)
                b_dp = warpgroup_mma_wait(0, deps=(b_dpt,))
                # A turn ends one half step and begins the next; behind the last comes some stage or other, which nobody reads.
                for i_half in range(1, num_halves + 1):
                    b_ds = gl.convert_layout((b_p * b_dp).to(dtype), ds_operand)
                    i_last = i_stage
                    b_dqt = warpgroup_mma(b_ds, k_s.index(i_last), b_dq, is_async=True)
                    ring, i_use = _place(i_half, num_shared, uses_0, uses_1, WG)
                    i_stage = ring * STAGES + i_use % STAGES
                    word = 0
                    if (i_half >= clean_halves) & (i_half < num_halves):
                        word = gl.load(p_masks + i_half)
                    mbarrier.wait(full.index(i_stage), (i_use // STAGES) & 1, pred=i_half < num_halves)
                    b_st = warpgroup_mma(b_q, k_s.index(i_stage).permute((1, 0)), b_none, use_acc=False, is_async=True)
                    b_dpt = warpgroup_mma(b_dout, v_s.index(i_stage).permute((1, 0)), b_none + b_less_delta, is_async=True)
                    b_dq = warpgroup_mma_wait(2, deps=(b_dqt,))
                    mbarrier.arrive(empty.index(i_last))
                    b_s = warpgroup_mma_wait(1, deps=(b_st,))
                    b_p = gl.exp2(b_s * scale_log2 - gl.expand_dims(b_lse, 1))
                    b_p = masked(b_p, i_half, clean_halves, word, o_granule, o_column, BOX_TOKENS)
                    b_dp = warpgroup_mma_wait(0, deps=(b_dpt,))
            staging.store((b_dq * scale).to(dtype))
            p_dq = dquery + (i_b * NUM_QUERIES * HEADS + i_h) * D
            gl.store(p_dq + o_token * (HEADS * D) + o_d, staging.load(memory), mask=m_row)
        uses_0 += ring_0
        uses_1 += ring_1
        num_met += gl.where(num_shared > 0, 1, 0)


@gluon.jit(
    do_not_specialize=[
        *("num_heads", "max_blocks", "s_plan", "s_rows", "s_masks", "first_head", "HEADS", "GROUP", "NUM_QUERIES")
    ]
)
def block_sparse_bwd_dq_kernel(
    key_boxes,
    value_boxes,
    key_granules,
    value_granules,
    rows,
    masks,
    meta,
    counts,
    row_token,
    arrivals,
    query,
    dout,
    stats,
    dquery,
    num_heads,
    max_blocks,
    s_plan,
    s_rows,
    s_masks,
    first_head,
    HEADS,
    GROUP,
    NUM_QUERIES,
    s_row_b,
    s_row_h,
    s_column_h,
    s_qb,
    s_qs,
    s_qh,
    s_db,
    s_ds,
    s_dh,
    scale,
    scale_log2,
    D: gl.constexpr,
    STAGES: gl.constexpr,
    BOX_TOKENS: gl.constexpr,
    IN_STEP: gl.constexpr,
    WAVES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Gradient of the queries, `[B, S_q, Hq, D]`, of `num_heads` heads from `first_head` on; see the forward's kernel."""
    dtype: gl.constexpr = query.dtype.element_ty
    staging_s = gl.allocate_shared_memory(dtype, [2 if D == 128 else 4, 64, D], key_boxes.layout)
    k_s = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, D], key_boxes.layout)
    v_s = gl.allocate_shared_memory(dtype, [2 * STAGES, 64, D], value_boxes.layout)
    full = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2 * STAGES, 1], mbarrier.MBarrierLayout())
    started = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(started.index(0), count=2)
    for i in gl.static_range(2 * STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    fence_async_shared()
    buffers = (staging_s, k_s, v_s, full, empty, started.index(0))
    work = (masks, meta, counts, row_token, num_heads, max_blocks, s_plan, s_masks, first_head, HEADS, NUM_QUERIES)
    tensors = (query, dout, stats, dquery, scale, scale_log2)
    strides = (s_qb, s_qs, s_qh, s_db, s_ds, s_dh)
    source = (key_boxes, value_boxes, key_granules, value_granules, k_s, v_s, full, empty)
    walks = (rows, meta, counts, arrivals, num_heads, s_plan, s_rows, first_head, HEADS, GROUP)
    places = (s_row_b, s_row_h, s_column_h)
    gl.warp_specialize(
        [
            (_dq_consumer, (buffers, work, tensors, strides, 0, STAGES, D, BOX_TOKENS)),
            (_dq_consumer, (buffers, work, tensors, strides, 1, STAGES, D, BOX_TOKENS)),
            (_dq_producer, (source, walks, places, 0, STAGES, D, IN_STEP, WAVES)),
            (_dq_producer, (source, walks, places, 1, STAGES, D, IN_STEP, WAVES)),
        ],
        [4, 1, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )
