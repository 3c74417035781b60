"""Forward of block-sparse attention for sm_90a, in Gluon: a persistent kernel of two consumer warpgroups and four producers.

Each warpgroup owns a block of 64 packed query rows at a time and walks its plan (`plan.py`) in steps of 128 keys. It has
its own ring of keys and of values, each filled by one producer warp through tensor copies: two boxes of 64 rows or eight
of 16. The design, and what was measured to choose it:

- Queries and probabilities live in registers, so that shared memory serves keys and values only. `P V` of a step runs under
  the softmax of the next: its wait stands after the exponentials, behind the wait for the next keys. That wait also makes
  a basic block end there, over which ptxas does not hoist the other (within one block it does, and nothing overlaps).
- One stage of keys and two of values: keys are read at once and free again, values are held over a whole softmax. Keys
  and values have producers of their own, since either may have to wait while the other could go on.
- The two blocks of a pair share steps: what both list comes first and lies in the two rings in turn, loaded once. Two let go
  of each stage: both warpgroups, or the one that reads it and, ahead, its producer. Before a pair that shares, the
  warpgroups wait for each other, since the parity of a barrier tells a phase only from the one before and the one behind.
- With IN_STEP all programs start every WAVES-th pair of blocks together. Programs that drift apart walk different parts of a
  head, which then falls out of the L2 cache where keys and values of a head exceed some 30 MB. IN_STEP is how often a
  program looks for the others before it goes on: one that is missing costs time and no hang.
- Scores are masked with -inf only in steps that the plan marks; pads of equal tiles are masked by a constant.

Softmax is in base 2 and fp32; scores are scaled in fp32 by a positive factor (a sign lies in the packed keys). Rows that see
nothing get 0 and -inf.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the types of kernel arguments are Triton's, not Python's)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from fastvideo.block_sparse.impl.hopper.epilogue import fetch_gate, write_block
from fastvideo.block_sparse.impl.hopper.gluon_names import tma_load
from fastvideo.block_sparse.impl.hopper.rescale import rescale


@gluon.jit
def count_pairs(counts, num_heads):
    """Pairs of blocks in all; blocks of several tiles and of one in a head, pairs of both."""
    num_joint, num_blocks = gl.load(counts), gl.load(counts + 1)
    joint_pairs, alone_pairs = (num_joint + 1) // 2, (num_blocks - num_joint + 1) // 2
    return num_heads * (joint_pairs + alone_pairs), num_joint, num_blocks


@gluon.jit
def locate_pair(i_pair, num_heads, num_joint, num_blocks):
    """Head of a pair, its first block, and the end of its kind: first blocks of several tiles, whose walks are longest."""
    joint_pairs, alone_pairs = (num_joint + 1) // 2, (num_blocks - num_joint + 1) // 2
    is_joint = i_pair < num_heads * joint_pairs
    a_head = gl.maximum(gl.where(is_joint, joint_pairs, alone_pairs), 1)
    i_inside = gl.where(is_joint, i_pair, i_pair - num_heads * joint_pairs)
    i_first = i_inside % a_head * 2 + gl.where(is_joint, 0, num_joint)
    return i_inside // a_head, i_first, gl.where(is_joint, num_joint, num_blocks)


@gluon.jit
def keep_in_step(arrivals, i_pair, num_pairs, LOOKS: gl.constexpr, WAVES: gl.constexpr):
    """Every so many waves of pairs, hold until both producers of all programs have come here, or for so many looks."""
    i_wave = i_pair // gl.num_programs(0)
    if i_wave % WAVES == 0:
        num_awaited = gl.minimum(gl.num_programs(0), num_pairs - i_wave * gl.num_programs(0)) * 2
        num_seen = gl.atomic_add(arrivals + i_wave, 1) + 1
        num_looks = 0
        while (num_seen < num_awaited) & (num_looks < LOOKS):
            num_seen = gl.atomic_add(arrivals + i_wave, 0)
            num_looks += 1


@gluon.jit
def load_boxes(boxes, granules, stage, full, p_rows, i_step, box_steps, i_base, i_column, row_0, row_1, D: gl.constexpr):
    """Fill a stage of 128 rows; `row_0` and `row_1` are the boxes of this step, read ahead."""
    mbarrier.expect(full, 128 * D * 2)
    if i_step < box_steps:
        tma_load(boxes, [i_base + row_0, i_column], full, stage.slice(0, 64, dim=0))
        tma_load(boxes, [i_base + row_1, i_column], full, stage.slice(64, 64, dim=0))
    else:
        p_step = p_rows + box_steps * 2 + (i_step - box_steps) * 8
        for i in gl.static_range(8):
            i_row = i_base + gl.load(p_step + i)
            tma_load(granules, [i_row, i_column], full, stage.slice(16 * i, 16, dim=0))


@gluon.jit
def _producer(
    source,
    walks,
    places,
    WG: gl.constexpr,
    STAGES: gl.constexpr,
    D: gl.constexpr,
    IN_STEP: gl.constexpr,
    WAVES: gl.constexpr,
):
    boxes, granules, ring, full, empty = source
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
            i_b, i_kv = (first_head + i_head) // HEADS, (first_head + i_head) % HEADS // GROUP
            # A packed head follows another; in token order a head is a range of columns. One of the factors is 0.
            i_base = i_b * s_row_b + (i_head // GROUP) * s_row_h
            i_column = i_kv * s_column_h
            p_meta = meta + (i_head * s_plan + i_block) * 8
            num_shared = gl.load(p_meta + 6) // 2
            box_steps = gl.load(p_meta + 3) - num_shared
            num_steps = gl.load(p_meta + 7)
            p_rows = rows + gl.where(s_plan > 0, i_head, 0).to(gl.int64) * s_rows + gl.load(p_meta)
            next_0 = gl.load(p_rows)
            next_1 = gl.load(p_rows + 1)
            for i_step in range(num_steps):
                row_0 = next_0
                row_1 = next_1
                next_0 = gl.load(p_rows + i_step * 2 + 2)
                next_1 = gl.load(p_rows + i_step * 2 + 3)
                i_use = num_done + i_step
                i_stage = WG * STAGES + i_use % STAGES
                mbarrier.wait(empty.index(i_stage), ((i_use // STAGES) & 1) ^ 1)
                # Two let go of each stage; for the one who does not read it, it is let go here.
                mbarrier.arrive(empty.index(i_stage), pred=i_step >= num_shared)
                stage, bar = ring.index(i_stage), full.index(i_stage)
                load_boxes(boxes, granules, stage, bar, p_rows, i_step, box_steps, i_base, i_column, row_0, row_1, D)
            num_done += num_steps


@gluon.jit
def mask_columns(o_column, word_0, word_1):
    """The byte of each column's granule; see `plan.py`."""
    word = gl.where(o_column % 128 < 64, word_0, word_1)
    return (word >> ((o_column // 16) % 4 * 8)) & 255


@gluon.jit
def seen(b_byte, o_granule, o_column):
    """Which columns each row sees, from the masks' bytes of the columns and the granules of the rows."""
    is_real = o_column % 16 + (b_byte >> 4) <= 15
    is_met = (gl.expand_dims(b_byte, 0) >> gl.expand_dims(o_granule, 1)) & 1
    return (is_met != 0) & gl.expand_dims(is_real, 0)


@gluon.jit
def _softmax(b_s, b_max, b_sum, scale_log2):
    """Probabilities of a step, the new row maxima and sums, and the factor of what was summed before."""
    b_top = gl.maximum(b_max, gl.max(b_s, 1) * scale_log2)
    # A row that has seen nothing yet: -inf minus -inf would be NaN.
    b_shift = gl.where(b_top == -float("inf"), 0.0, b_top)
    b_p = gl.exp2(b_s * scale_log2 - gl.expand_dims(b_shift, 1))
    b_shrink = gl.exp2(b_max - b_shift)
    return b_p, b_top, b_sum * b_shrink + gl.sum(b_p, 1), b_shrink


@gluon.jit
def _masked(b_s, i_step, clean_steps, word_0, word_1, o_granule, o_column, BOX_TOKENS: gl.constexpr):
    if i_step >= clean_steps:
        b_s = gl.where(seen(mask_columns(o_column, word_0, word_1), o_granule, o_column), b_s, -float("inf"))
    elif BOX_TOKENS < 64:
        b_s = gl.where(gl.expand_dims(o_column % 64 < BOX_TOKENS, 0), b_s, -float("inf"))
    return b_s


@gluon.jit
def _place(i_step, num_shared, uses_0, uses_1, WG: gl.constexpr):
    """Where a step lies: twice the use of its ring, plus the ring. `uses_*` are twice those before the walk."""
    shared = i_step + gl.where(i_step % 2 == 0, uses_0, uses_1)
    return gl.where(i_step < num_shared, shared, 2 * i_step - num_shared + (uses_1 + 1 if WG else uses_0))


@gluon.jit
def _stage(place, STAGES: gl.constexpr):
    return place % 2 * STAGES + place // 2 % STAGES


@gluon.jit
def _phase(place, STAGES: gl.constexpr):
    return place // 2 // STAGES & 1


@gluon.jit
def _consumer(
    buffers,
    work,
    tensors,
    gated,
    WG: gl.constexpr,
    K_STAGES: gl.constexpr,
    V_STAGES: gl.constexpr,
    D: gl.constexpr,
    BOX_TOKENS: gl.constexpr,
):
    q_s, k_s, v_s, k_full, k_empty, v_full, v_empty, started = buffers
    masks, meta, counts, row_token, num_heads, s_plan, s_masks, first_head, HEADS, NUM_ROWS = work
    query, out, lse, s_qb, s_qs, s_qh, scale_log2 = tensors
    scores: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, 128, 16])
    result: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, D, 16])
    q_operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=scores, k_width=2)
    p_operand: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=result, k_width=2)
    score_rows: gl.constexpr = gl.SliceLayout(1, scores)
    result_rows: gl.constexpr = gl.SliceLayout(1, result)
    # 16 bytes a thread, rows of a warp next to each other.
    memory: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = query.dtype.element_ty
    b_none = gl.zeros([64, 128], gl.float32, scores)
    o_column = gl.arange(0, 128, gl.SliceLayout(0, scores))
    o_row = gl.arange(0, 64, gl.SliceLayout(1, memory))
    o_d = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, memory)), 0)
    o_score_row = gl.arange(0, 64, score_rows)
    o_granule = o_score_row // 16
    staging = q_s.index(WG)
    num_pairs, num_joint, num_blocks = count_pairs(counts, num_heads)
    # Twice the uses of both rings so far.
    uses_0 = 0
    uses_1 = 0
    num_met = 0
    for i_pair in range(gl.program_id(0), num_pairs, gl.num_programs(0)):
        i_head, i_first, end = locate_pair(i_pair, num_heads, num_joint, num_blocks)
        i_b, i_h = ((first_head + i_head) // HEADS).to(gl.int64), (first_head + i_head) % HEADS
        p_pair = meta + (i_head * s_plan + i_first) * 8
        num_shared = gl.load(p_pair + 6)
        ring_0 = gl.load(p_pair + 7)
        ring_1 = gl.load(p_pair + 15, mask=i_first + 1 < end, other=0)
        # Counted by pairs that share alone, so that nobody comes here twice before the partner has come once.
        mbarrier.arrive(started, pred=num_shared > 0)
        if i_first + WG < end:
            i_block = i_first + WG
            p_meta = p_pair + WG * 8
            clean_steps = gl.load(p_meta + 2)
            num_steps = gl.load(p_meta + 4)
            # Words of step 0, which may lie before the first masked step.
            p_masks = masks + gl.where(s_plan > 0, i_head, 0).to(gl.int64) * s_masks + gl.load(p_meta + 1) - clean_steps * 2
            o_token = i_block * 64 + o_row
            o_lse = i_block * 64 + o_score_row
            if row_token is not None:
                o_token = gl.load(row_token + o_token)
                o_lse = gl.load(row_token + o_lse)
            m_row = gl.expand_dims(o_token >= 0, 1)
            p_query = query + i_b * s_qb + i_h.to(gl.int64) * s_qh
            o_query = gl.expand_dims(o_token.to(gl.int64) * s_qs, 1) + o_d
            staging.store(gl.load(p_query + o_query, mask=m_row, other=0.0))
            b_q = staging.load(q_operand)
            o_tile = None
            if gated[0] is not None:
                o_tile = fetch_gate(gated, staging, i_b, i_h, i_block, o_token, D, memory, result)
            b_max = gl.full([64], -float("inf"), gl.float32, score_rows)
            b_sum = gl.zeros([64], gl.float32, score_rows)
            b_out = gl.zeros([64, D], gl.float32, result)
            # The partner's ring must have come to this pair: phases of a barrier tell one use from the next alone.
            mbarrier.wait(started, num_met & 1, pred=num_shared > 0)
            if num_steps > 0:
                place = _place(0, num_shared, uses_0, uses_1, WG)
                i_k = _stage(place, K_STAGES)
                word_0 = 0
                word_1 = 0
                if clean_steps == 0:
                    word_0 = gl.load(p_masks)
                    word_1 = gl.load(p_masks + 1)
                mbarrier.wait(k_full.index(i_k), _phase(place, K_STAGES))
                b_st = warpgroup_mma(b_q, k_s.index(i_k).permute((1, 0)), b_none, use_acc=False, is_async=True)
                b_s = warpgroup_mma_wait(0, deps=(b_st,))
                mbarrier.arrive(k_empty.index(i_k))
                b_s = _masked(b_s, 0, clean_steps, word_0, word_1, o_granule, o_column, BOX_TOKENS)
                b_p, b_max, b_sum, b_shrink = _softmax(b_s, b_max, b_sum, scale_log2)
                b_po = gl.convert_layout(b_p.to(dtype), p_operand)
                last = place
                place = _place(1, num_shared, uses_0, uses_1, WG)
                mbarrier.wait(k_full.index(_stage(place, K_STAGES)), _phase(place, K_STAGES), pred=num_steps > 1)
                for i_step in range(1, num_steps):
                    i_k = _stage(place, K_STAGES)
                    i_v = _stage(last, V_STAGES)
                    word_0 = 0
                    word_1 = 0
                    # Read before the products, so that a masked step does not wait for it.
                    if i_step >= clean_steps:
                        word_0 = gl.load(p_masks + i_step * 2)
                        word_1 = gl.load(p_masks + i_step * 2 + 1)
                    b_st = warpgroup_mma(b_q, k_s.index(i_k).permute((1, 0)), b_none, use_acc=False, is_async=True)
                    b_out = rescale(b_out, gl.convert_layout(b_shrink, result_rows), D)
                    mbarrier.wait(v_full.index(i_v), _phase(last, V_STAGES))
                    b_ot = warpgroup_mma(b_po, v_s.index(i_v), b_out, is_async=True)
                    b_s = warpgroup_mma_wait(1, deps=(b_st,))
                    mbarrier.arrive(k_empty.index(i_k))
                    b_s = _masked(b_s, i_step, clean_steps, word_0, word_1, o_granule, o_column, BOX_TOKENS)
                    b_p, b_max, b_sum, b_shrink = _softmax(b_s, b_max, b_sum, scale_log2)
                    last = place
                    place = _place(i_step + 1, num_shared, uses_0, uses_1, WG)
                    i_kn = _stage(place, K_STAGES)
                    mbarrier.wait(k_full.index(i_kn), _phase(place, K_STAGES), pred=i_step + 1 < num_steps)
                    b_out, b_p = warpgroup_mma_wait(0, deps=(b_ot, b_p))
                    mbarrier.arrive(v_empty.index(i_v))
                    b_po = gl.convert_layout(b_p.to(dtype), p_operand)
                i_v = _stage(last, V_STAGES)
                b_out = rescale(b_out, gl.convert_layout(b_shrink, result_rows), D)
                mbarrier.wait(v_full.index(i_v), _phase(last, V_STAGES))
                b_ot = warpgroup_mma(b_po, v_s.index(i_v), b_out, is_async=True)
                b_out = warpgroup_mma_wait(0, deps=(b_ot,))
                mbarrier.arrive(v_empty.index(i_v))
            sums = (b_out, b_max, b_sum)
            write_block(sums, out, lse, gated, staging, i_b, i_h, o_tile, o_token, o_lse, HEADS, NUM_ROWS, D, memory)
        uses_0 += ring_0 * 2
        uses_1 += ring_1 * 2
        num_met += gl.where(num_shared > 0, 1, 0)


@gluon.jit(
    do_not_specialize=["num_heads", "s_plan", "s_rows", "s_masks", "first_head", "HEADS", "GROUP", "NUM_ROWS", "NUM_TILES"],
    # Rows of text behind those of a video begin anywhere.
    do_not_specialize_on_alignment=["lse"],
)
def block_sparse_fwd_kernel(
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
    out,
    lse,
    gate,
    coarse,
    block_tiles,
    num_heads,
    s_plan,
    s_rows,
    s_masks,
    first_head,
    HEADS,
    GROUP,
    NUM_ROWS,
    s_row_b,
    s_row_h,
    s_column_h,
    s_qb,
    s_qs,
    s_qh,
    s_gb,
    s_gs,
    s_gh,
    NUM_TILES,
    scale_log2,
    D: gl.constexpr,
    K_STAGES: gl.constexpr,
    V_STAGES: gl.constexpr,
    BOX_TOKENS: gl.constexpr,
    IN_STEP: gl.constexpr,
    WAVES: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr,
    PRODUCER_REGISTERS: gl.constexpr,
):
    """Output `[B, S_q, Hq, D]` and natural log-sum-exp `[B, S_q, Hq]` of `num_heads` heads from `first_head` on.

    Heads are counted through the batch. `meta` has `s_plan` rows of 6 a head (0 where all share one plan). With `gate`,
    `[B, S_q, Hq, D]`, the output is that of attention plus gate times `coarse`, `[B, NUM_TILES, Hq, D]`, of the row's tile.
    """
    dtype: gl.constexpr = query.dtype.element_ty
    q_s = gl.allocate_shared_memory(dtype, [2, 64, D], key_boxes.layout)
    k_s = gl.allocate_shared_memory(dtype, [2 * K_STAGES, 128, D], key_boxes.layout)
    v_s = gl.allocate_shared_memory(dtype, [2 * V_STAGES, 128, D], value_boxes.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [2 * K_STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [2 * K_STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [2 * V_STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [2 * V_STAGES, 1], mbarrier.MBarrierLayout())
    started = gl.allocate_shared_memory(gl.int64, [1, 1], mbarrier.MBarrierLayout())
    mbarrier.init(started.index(0), count=2)
    for i in gl.static_range(2 * K_STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(k_empty.index(i), count=2)
    for i in gl.static_range(2 * V_STAGES):
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(v_empty.index(i), count=2)
    fence_async_shared()
    buffers = (q_s, k_s, v_s, k_full, k_empty, v_full, v_empty, started.index(0))
    work = (masks, meta, counts, row_token, num_heads, s_plan, s_masks, first_head, HEADS, NUM_ROWS)
    tensors = (query, out, lse, s_qb, s_qs, s_qh, scale_log2)
    gated = (gate, coarse, block_tiles, s_gb, s_gs, s_gh, NUM_TILES)
    keys = (key_boxes, key_granules, k_s, k_full, k_empty)
    values = (value_boxes, value_granules, v_s, v_full, v_empty)
    walks = (rows, meta, counts, arrivals, num_heads, s_plan, s_rows, first_head, HEADS, GROUP)
    places = (s_row_b, s_row_h, s_column_h)
    gl.warp_specialize(
        [
            (_consumer, (buffers, work, tensors, gated, 0, K_STAGES, V_STAGES, D, BOX_TOKENS)),
            (_consumer, (buffers, work, tensors, gated, 1, K_STAGES, V_STAGES, D, BOX_TOKENS)),
            (_producer, (keys, walks, places, 0, K_STAGES, D, IN_STEP, WAVES)),
            (_producer, (keys, walks, places, 1, K_STAGES, D, IN_STEP, WAVES)),
            (_producer, (values, walks, places, 0, V_STAGES, D, 0, 1)),
            (_producer, (values, walks, places, 1, V_STAGES, D, 0, 1)),
        ],
        [4, 1, 1, 1, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS, PRODUCER_REGISTERS],
    )
