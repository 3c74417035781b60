"""Triton kernels of block-sparse attention: forward, dquery, dkey with dvalue, and the row sums that both need.

A program owns one block of one tile (of one batch and head) and walks the list of tiles that it meets, one step at a
time. A step covers `BLOCK` packed rows: a piece of a large tile, one tile, or several small ones side by side, each in
a slot of `SLOT` rows. Rows are found through the layout's order, so no tensor is permuted, and rows behind the end of
a tile are never read. Scores, softmax and sums are in fp32; exponents are base 2. Every sum has a fixed order.

Sizes that only place a program's work are not specialised, so a kernel is compiled once for lists of any width.

Names: `i_` indices, `o_` offsets, `m_` masks, `p_` pointers, `b_` values of a block, `s_` strides in elements.
Shape legend: M query rows of a block, N key rows, D head size padded to a power of two.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the types of kernel arguments are Triton's, not Python's)

import triton
import triton.language as tl

from fastvideo.block_sparse.impl.triton.rows import (
    load_block,
    num_steps,
    own_rows,
    step_rows,
    step_tokens,
    store_block,
    tokens,
)

_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)


@triton.jit(
    do_not_specialize=["WIDTH", "NUM_Q_TILES", "NUM_ROWS", "HEADS", "GROUP", "s_ib", "s_ih"],
    # Rows of text behind those of a video begin anywhere.
    do_not_specialize_on_alignment=["lse"],
)
def block_sparse_fwd_kernel(
    query,
    key,
    value,
    out,
    lse,
    gate,
    coarse,
    indices,
    counts,
    q_offsets,
    k_offsets,
    q_order,
    k_order,
    scale_log2,
    s_qb,
    s_qs,
    s_qh,
    s_kb,
    s_ks,
    s_kh,
    s_vb,
    s_vs,
    s_vh,
    s_gb,
    s_gs,
    s_gh,
    s_ib,
    s_ih,
    WIDTH,
    NUM_Q_TILES,
    NUM_ROWS,
    HEADS,
    GROUP,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    Q_TILE: tl.constexpr,
    Q_UNIFORM: tl.constexpr,
    K_TILE: tl.constexpr,
    K_SLOT: tl.constexpr,
    K_UNIFORM: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K_MASKED: tl.constexpr,
    SCALE_IS_POSITIVE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output `[B, S_q, Hq, D]` and natural log-sum-exp `[B, S_q, Hq]`, one block of query rows a program.

    With `gate`, `[B, S_q, Hq, D]`, the output is that of attention plus gate times `coarse`, `[B, NUM_Q_TILES, Hq, D]`, of the
    row's tile. Samples of `out` and `lse` are `NUM_ROWS` rows apart.
    `indices` has strides `s_ib`, `s_ih` (0 where shared) and contiguous lists of `WIDTH` entries; a list's place
    divided by `WIDTH` is its count's place.
    """
    Q_PIECES: tl.constexpr = (Q_TILE + M - 1) // M
    num_blocks = NUM_Q_TILES * Q_PIECES
    i_block, i_bh = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    i_b, i_h = (i_bh // HEADS).to(tl.int64), (i_bh % HEADS).to(tl.int64)
    i_tile = i_block // Q_PIECES

    o_packed, m_q = own_rows(i_tile, i_block % Q_PIECES, q_offsets, Q_TILE, Q_UNIFORM, M)
    o_token = tokens(q_order, o_packed, m_q)
    b_q = load_block(query + i_b * s_qb + i_h * s_qh, o_token, s_qs, m_q, HEAD_SIZE, D, True)
    p_key = key + i_b * s_kb + (i_h // GROUP) * s_kh
    p_value = value + i_b * s_vb + (i_h // GROUP) * s_vh

    i_list = i_b * s_ib + i_h * s_ih + i_tile.to(tl.int64) * WIDTH
    num_listed = WIDTH
    if counts is not None:
        num_listed = tl.load(counts + i_list // WIDTH)
    if not Q_UNIFORM and Q_PIECES > 1:
        # The rows of a smaller tile end before this piece.
        num_listed = tl.where(tl.max(m_q.to(tl.int32), 0) > 0, num_listed, 0)
    b_out = tl.zeros([M, D], tl.float32)
    b_max = tl.full([M], -float("inf"), tl.float32)
    b_sum = tl.zeros([M], tl.float32)
    for i_step in range(num_steps(num_listed, K_TILE, K_SLOT, N)):
        i_row, o_row, m_k = step_rows(i_step, indices + i_list, num_listed, k_offsets, K_TILE, K_SLOT, K_UNIFORM, N)
        i_token, o_token_k = step_tokens(k_order, i_row, o_row, m_k)
        b_k = load_block(p_key + i_token * s_ks, o_token_k, s_ks, m_k, HEAD_SIZE, D, K_MASKED)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        if SCALE_IS_POSITIVE:
            if K_MASKED:
                b_s = tl.where(m_k[None, :], b_s, -float("inf"))
            b_top = tl.maximum(b_max, tl.max(b_s, 1) * scale_log2)
            b_p = tl.exp2(tl.fma(b_s, scale_log2, -b_top[:, None]))
        else:
            b_s = b_s * scale_log2
            if K_MASKED:
                b_s = tl.where(m_k[None, :], b_s, -float("inf"))
            b_top = tl.maximum(b_max, tl.max(b_s, 1))
            b_p = tl.exp2(b_s - b_top[:, None])
        b_shrink = tl.exp2(b_max - b_top)
        b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
        b_out = b_out * b_shrink[:, None]
        b_v = load_block(p_value + i_token * s_vs, o_token_k, s_vs, m_k, HEAD_SIZE, D, K_MASKED)
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out, input_precision=PRECISION)
        b_max = b_top

    m_seen = b_sum > 0.0
    b_out = b_out * (1.0 / tl.where(m_seen, b_sum, 1.0))[:, None]
    b_lse = tl.where(m_seen, (b_max + tl.log2(tl.where(m_seen, b_sum, 1.0))) * _LN2, -float("inf"))
    if gate is not None:
        o_d = tl.arange(0, D)
        p_coarse = coarse + ((i_b * NUM_Q_TILES + i_tile) * HEADS + i_h) * HEAD_SIZE
        b_coarse = tl.load(p_coarse + o_d, mask=o_d < HEAD_SIZE, other=0.0).to(tl.float32)
        b_gate = load_block(gate + i_b * s_gb + i_h * s_gh, o_token, s_gs, m_q, HEAD_SIZE, D, True)
        b_out += b_coarse[None, :] * b_gate.to(tl.float32)
    o_row = (i_b * NUM_ROWS + o_token) * HEADS + i_h
    tl.store(lse + o_row, b_lse, mask=m_q)
    store_block(out, o_row, HEAD_SIZE, m_q, b_out, HEAD_SIZE, D)


@triton.jit(do_not_specialize=["NUM_QUERIES", "HEADS"])
def block_sparse_bwd_rows_kernel(
    out,
    dout,
    lse,
    dlse,
    q_order,
    lse_log2,
    delta,
    s_db,
    s_ds,
    s_dh,
    s_lb,
    s_ls,
    s_lh,
    NUM_QUERIES,
    HEADS,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    M: tl.constexpr,
):
    """Base-2 log-sum-exp and `delta = rowsum(dout * out) - dlse`, `[B, Hq, S_q]` by packed row.

    Rows that see nothing get +inf and 0, so that their probabilities and gradients become 0.
    """
    num_blocks = tl.cdiv(NUM_QUERIES, M)
    i_block, i_bh = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    i_b, i_h = (i_bh // HEADS).to(tl.int64), (i_bh % HEADS).to(tl.int64)
    o_packed = i_block * M + tl.arange(0, M)
    m_rows = o_packed < NUM_QUERIES
    o_token = tokens(q_order, o_packed, m_rows)
    o_row = (i_b * NUM_QUERIES + o_token) * HEADS + i_h
    b_out = load_block(out, o_row, HEAD_SIZE, m_rows, HEAD_SIZE, D, True).to(tl.float32)
    b_dout = load_block(dout + i_b * s_db + i_h * s_dh, o_token, s_ds, m_rows, HEAD_SIZE, D, True).to(tl.float32)
    b_lse = tl.load(lse + o_row, mask=m_rows, other=0.0)
    b_delta = tl.sum(b_out * b_dout, 1)
    if dlse is not None:
        b_delta -= tl.load(dlse + i_b * s_lb + o_token * s_ls + i_h * s_lh, mask=m_rows, other=0.0)
    m_seen = b_lse != -float("inf")
    o_result = i_bh.to(tl.int64) * NUM_QUERIES + o_packed
    tl.store(lse_log2 + o_result, tl.where(m_seen, b_lse * _LOG2E, float("inf")), mask=m_rows)
    tl.store(delta + o_result, tl.where(m_seen, b_delta, 0.0), mask=m_rows)


@triton.jit(do_not_specialize=["WIDTH", "NUM_Q_TILES", "NUM_QUERIES", "HEADS", "GROUP", "s_ib", "s_ih"])
def block_sparse_bwd_dq_kernel(
    query,
    key,
    value,
    dout,
    lse_log2,
    delta,
    correction,
    dquery,
    indices,
    counts,
    q_offsets,
    k_offsets,
    q_order,
    k_order,
    scale,
    scale_log2,
    s_qb,
    s_qs,
    s_qh,
    s_kb,
    s_ks,
    s_kh,
    s_vb,
    s_vs,
    s_vh,
    s_db,
    s_ds,
    s_dh,
    s_ib,
    s_ih,
    WIDTH,
    NUM_Q_TILES,
    NUM_QUERIES,
    HEADS,
    GROUP,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    Q_TILE: tl.constexpr,
    Q_UNIFORM: tl.constexpr,
    K_TILE: tl.constexpr,
    K_SLOT: tl.constexpr,
    K_UNIFORM: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    K_MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of the queries, `[B, S_q, Hq, D]` contiguous, one block of query rows a program.

    Probabilities from a rounded log-sum-exp do not sum to 1, by up to 1e-5 where it is in the hundreds. With
    `correction`, `[B, Hq, S_q]` by packed row, the inverse of their sum is applied and written there.
    """
    Q_PIECES: tl.constexpr = (Q_TILE + M - 1) // M
    num_blocks = NUM_Q_TILES * Q_PIECES
    i_block, i_bh = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    i_b, i_h = (i_bh // HEADS).to(tl.int64), (i_bh % HEADS).to(tl.int64)
    i_tile = i_block // Q_PIECES

    o_packed, m_q = own_rows(i_tile, i_block % Q_PIECES, q_offsets, Q_TILE, Q_UNIFORM, M)
    o_token = tokens(q_order, o_packed, m_q)
    b_q = load_block(query + i_b * s_qb + i_h * s_qh, o_token, s_qs, m_q, HEAD_SIZE, D, True)
    b_dout = load_block(dout + i_b * s_db + i_h * s_dh, o_token, s_ds, m_q, HEAD_SIZE, D, True)
    i_rows = i_bh.to(tl.int64) * NUM_QUERIES
    b_lse = tl.load(lse_log2 + i_rows + o_packed, mask=m_q, other=float("inf"))
    b_delta = tl.load(delta + i_rows + o_packed, mask=m_q, other=0.0)
    p_key = key + i_b * s_kb + (i_h // GROUP) * s_kh
    p_value = value + i_b * s_vb + (i_h // GROUP) * s_vh

    i_list = i_b * s_ib + i_h * s_ih + i_tile.to(tl.int64) * WIDTH
    num_listed = WIDTH
    if counts is not None:
        num_listed = tl.load(counts + i_list // WIDTH)
    if not Q_UNIFORM and Q_PIECES > 1:
        # The rows of a smaller tile end before this piece.
        num_listed = tl.where(tl.max(m_q.to(tl.int32), 0) > 0, num_listed, 0)
    b_dq = tl.zeros([M, D], tl.float32)
    b_sum = tl.zeros([M], tl.float32)
    for i_step in range(num_steps(num_listed, K_TILE, K_SLOT, N)):
        i_row, o_row, m_k = step_rows(i_step, indices + i_list, num_listed, k_offsets, K_TILE, K_SLOT, K_UNIFORM, N)
        i_token, o_token_k = step_tokens(k_order, i_row, o_row, m_k)
        b_k = load_block(p_key + i_token * s_ks, o_token_k, s_ks, m_k, HEAD_SIZE, D, K_MASKED)
        b_v = load_block(p_value + i_token * s_vs, o_token_k, s_vs, m_k, HEAD_SIZE, D, K_MASKED)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
        b_dp = tl.dot(b_dout, tl.trans(b_v), input_precision=PRECISION)
        b_p = tl.exp2(tl.fma(b_s, scale_log2, -b_lse[:, None]))
        if K_MASKED:
            b_p = tl.where(m_k[None, :], b_p, 0.0)
        if correction is not None:
            b_sum += tl.sum(b_p, 1)
        b_ds = b_p * (b_dp - b_delta[:, None])
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    if correction is not None:
        b_correction = 1.0 / tl.where(b_sum > 0.0, b_sum, 1.0)
        b_dq = b_dq * b_correction[:, None]
        tl.store(correction + i_rows + o_packed, b_correction, mask=m_q)
    o_row = (i_b * NUM_QUERIES + o_token) * HEADS + i_h
    store_block(dquery, o_row, HEAD_SIZE, m_q, b_dq * scale, HEAD_SIZE, D)


@triton.jit(
    do_not_specialize=[
        *("NUM_K_TILES", "NUM_QUERIES", "NUM_KEYS", "KV_HEADS"),
        *("s_ob", "s_oh", "s_ib", "s_ih", "s_tb", "s_th"),
    ]
)
def block_sparse_bwd_dkdv_kernel(
    query,
    key,
    value,
    dout,
    lse_log2,
    delta,
    correction,
    dkey,
    dvalue,
    list_offsets,
    lists,
    tile_order,
    q_offsets,
    k_offsets,
    q_order,
    k_order,
    scale,
    scale_log2,
    s_qb,
    s_qs,
    s_qh,
    s_kb,
    s_ks,
    s_kh,
    s_vb,
    s_vs,
    s_vh,
    s_db,
    s_ds,
    s_dh,
    s_ob,
    s_oh,
    s_ib,
    s_ih,
    s_tb,
    s_th,
    NUM_K_TILES,
    NUM_QUERIES,
    NUM_KEYS,
    KV_HEADS,
    GROUP: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    Q_TILE: tl.constexpr,
    Q_SLOT: tl.constexpr,
    Q_UNIFORM: tl.constexpr,
    K_TILE: tl.constexpr,
    K_UNIFORM: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    Q_MASKED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of keys and values, `[B, S_k, Hkv, D]` contiguous, one block of key rows a program.

    `lists` holds the query tiles that see each key tile, in compressed rows; the query heads of a group follow one
    another. `tile_order` says which key tile is worked on when. Scores are held transposed, `[N, M]`. `correction` is
    what the kernel for the queries wrote, if it did.
    """
    K_PIECES: tl.constexpr = (K_TILE + N - 1) // N
    num_blocks = NUM_K_TILES * K_PIECES
    i_block, i_bh = tl.program_id(0) % num_blocks, tl.program_id(0) // num_blocks
    i_b, i_h = (i_bh // KV_HEADS).to(tl.int64), (i_bh % KV_HEADS).to(tl.int64)
    i_tile = tl.load(tile_order + i_b * s_tb + i_h * s_th + i_block // K_PIECES)

    o_packed, m_k = own_rows(i_tile, i_block % K_PIECES, k_offsets, K_TILE, K_UNIFORM, N)
    o_token = tokens(k_order, o_packed, m_k)
    b_k = load_block(key + i_b * s_kb + i_h * s_kh, o_token, s_ks, m_k, HEAD_SIZE, D, True)
    b_v = load_block(value + i_b * s_vb + i_h * s_vh, o_token, s_vs, m_k, HEAD_SIZE, D, True)
    b_dk = tl.zeros([N, D], tl.float32)
    b_dv = tl.zeros([N, D], tl.float32)
    for i_group in range(GROUP):
        i_qh = i_h * GROUP + i_group
        p_offset = list_offsets + i_b * s_ob + i_qh * s_oh + i_tile
        i_first = tl.load(p_offset)
        num_listed = tl.load(p_offset + 1) - i_first
        if not K_UNIFORM and K_PIECES > 1:
            # The rows of a smaller tile end before this piece.
            num_listed = tl.where(tl.max(m_k.to(tl.int32), 0) > 0, num_listed, 0)
        p_list = lists + i_b * s_ib + i_qh * s_ih + i_first
        p_query = query + i_b * s_qb + i_qh * s_qh
        p_dout = dout + i_b * s_db + i_qh * s_dh
        i_rows = (i_b * (KV_HEADS * GROUP) + i_qh) * NUM_QUERIES
        for i_step in range(num_steps(num_listed, Q_TILE, Q_SLOT, M)):
            i_row, o_row, m_q = step_rows(i_step, p_list, num_listed, q_offsets, Q_TILE, Q_SLOT, Q_UNIFORM, M)
            i_token, o_token_q = step_tokens(q_order, i_row, o_row, m_q)
            o_q = i_row + o_row
            b_q = load_block(p_query + i_token * s_qs, o_token_q, s_qs, m_q, HEAD_SIZE, D, Q_MASKED)
            b_dout = load_block(p_dout + i_token * s_ds, o_token_q, s_ds, m_q, HEAD_SIZE, D, Q_MASKED)
            if Q_MASKED:
                b_lse = tl.load(lse_log2 + i_rows + o_q, mask=m_q, other=float("inf"))
                b_delta = tl.load(delta + i_rows + o_q, mask=m_q, other=0.0)
            else:
                b_lse = tl.load(lse_log2 + i_rows + o_q)
                b_delta = tl.load(delta + i_rows + o_q)
            b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)
            b_p = tl.exp2(tl.fma(b_s, scale_log2, -b_lse[None, :]))
            if correction is not None:
                b_p = b_p * tl.load(correction + i_rows + o_q, mask=m_q, other=0.0)[None, :]
            b_dv = tl.dot(b_p.to(b_dout.dtype), b_dout, b_dv, input_precision=PRECISION)
            b_dp = tl.dot(b_v, tl.trans(b_dout), input_precision=PRECISION)
            b_ds = b_p * (b_dp - b_delta[None, :])
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    o_row = (i_b * NUM_KEYS + o_token) * KV_HEADS + i_h
    store_block(dkey, o_row, HEAD_SIZE, m_k, b_dk * scale, HEAD_SIZE, D)
    store_block(dvalue, o_row, HEAD_SIZE, m_k, b_dv, HEAD_SIZE, D)


@triton.jit(do_not_specialize=["WIDTH", "NUM_Q_TILES", "NUM_K_TILES"])
def block_sparse_mark_kernel(indices, counts, marks, WIDTH, NUM_Q_TILES, NUM_K_TILES, BLOCK: tl.constexpr):
    """Set `marks[list, key tile, query tile]` to 1 where listed, for `[lists, NUM_Q_TILES, WIDTH]` indices."""
    i_row = tl.program_id(0).to(tl.int64)
    i_q, i_list = i_row % NUM_Q_TILES, i_row // NUM_Q_TILES
    num_listed = WIDTH
    if counts is not None:
        num_listed = tl.load(counts + i_row)
    for i_first in range(0, num_listed, BLOCK):
        o_entry = i_first + tl.arange(0, BLOCK)
        m_entry = o_entry < num_listed
        o_k = tl.load(indices + i_row * WIDTH + o_entry, mask=m_entry, other=0).to(tl.int64)
        b_one = tl.full([BLOCK], 1, tl.uint8)
        tl.store(marks + (i_list * NUM_K_TILES + o_k) * NUM_Q_TILES + i_q, b_one, mask=m_entry)


@triton.jit(do_not_specialize=["WIDTH", "NUM_Q_TILES", "NUM_K_TILES"])
def block_sparse_compress_kernel(marks, offsets, lists, WIDTH, NUM_Q_TILES, NUM_K_TILES, BLOCK: tl.constexpr):
    """Write the marked query tiles of each key tile, ascending, at its offset in `[lists, NUM_Q_TILES * WIDTH]`."""
    i_row = tl.program_id(0).to(tl.int64)
    i_k, i_list = i_row % NUM_K_TILES, i_row // NUM_K_TILES
    i_next = tl.load(offsets + i_list * (NUM_K_TILES + 1) + i_k).to(tl.int64) + i_list * NUM_Q_TILES * WIDTH
    for i_first in range(0, NUM_Q_TILES, BLOCK):
        o_q = i_first + tl.arange(0, BLOCK)
        b_mark = tl.load(marks + i_row * NUM_Q_TILES + o_q, mask=o_q < NUM_Q_TILES, other=0).to(tl.int32)
        tl.store(lists + i_next + tl.cumsum(b_mark, 0) - 1, o_q, mask=b_mark > 0)
        i_next += tl.sum(b_mark, 0)
