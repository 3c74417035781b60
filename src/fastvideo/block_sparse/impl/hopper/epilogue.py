"""What the Hopper forward does with a block of 64 query rows whose walk has ended: normalise, add, write in token order.

With a gate, `gate * coarse[tile of the row]` is added in fp32, so that the output is rounded once and no other kernel reads it.
The gate's rows are copied to the staging rows of the queries as soon as those are in registers, and arrive while the block
walks its keys. A granule of 16 rows belongs to one tile and to one warp of the product, which makes the coarse row of a
thread 16 loads of two numbers.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the types of kernel arguments are Triton's, not Python's)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy

from fastvideo.block_sparse.impl.hopper.gluon_names import copy_rows

_LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def fetch_gate(gated, staging, i_b, i_h, i_block, o_token, D: gl.constexpr, memory: gl.constexpr, result: gl.constexpr):
    """Begin to copy the gate of a block into its staging rows; return the tile of each row, read ahead (0 for pads)."""
    gate, _, block_tiles, s_gb, s_gs, s_gh, _ = gated
    o_d = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, memory)), 0)
    p_gate = gate + i_b * s_gb + i_h.to(gl.int64) * s_gh + gl.expand_dims(o_token.to(gl.int64) * s_gs, 1) + o_d
    copy_rows(staging, p_gate, mask=gl.expand_dims(o_token >= 0, 1))
    async_copy.commit_group()
    o_row = gl.arange(0, 64, gl.SliceLayout(1, result))
    return gl.maximum(gl.load(block_tiles + i_block * 4 + o_row // 16), 0)


@gluon.jit
def _add_gated(b_out, gated, staging, i_b, i_h, o_tile, HEADS, D: gl.constexpr):
    _, coarse, _, _, _, _, NUM_TILES = gated
    result: gl.constexpr = b_out.type.layout
    o_d = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, result)), 0)
    o_coarse = ((i_b * NUM_TILES + o_tile) * HEADS + i_h) * D
    b_coarse = gl.load(coarse + gl.expand_dims(o_coarse, 1) + o_d)
    async_copy.wait_group(0)
    return b_out + b_coarse.to(gl.float32) * staging.load(result).to(gl.float32)


@gluon.jit
def write_block(
    sums, out, lse, gated, staging, i_b, i_h, o_tile, o_token, o_lse, HEADS, NUM_ROWS, D: gl.constexpr, memory: gl.constexpr
):
    """Write output and log-sum-exp of a block to tensors of `NUM_ROWS` rows a sample.

    Args:
        sums: Those of `exp2(score - maximum) * value` in the layout of the product, and in that of the scores the maximum and
            the sum of each row.
        out: `[B, S_q, Hq, D]`.
        lse: `[B, S_q, Hq]`, natural log.
        gated: What the kernel says of the gate; its first is None where there is none.
        staging: 64 rows of shared memory that nobody else reads; with a gate what `fetch_gate` copies to.
        i_b: Sample, 64 bits.
        i_h: Query head.
        o_tile: Tile of each row, from `fetch_gate`.
        o_token: Token of each row in the layout `memory`, negative for pads.
        o_lse: The same in the layout of the row sums.
        HEADS: Query heads.
        NUM_ROWS: Rows from one sample to the next in `out` and `lse`.
        D: Head size.
        memory: Layout in which rows are written.
    """
    b_out, b_max, b_sum = sums
    result: gl.constexpr = b_out.type.layout
    # NaN counts as seen and reaches the output.
    m_seen = b_sum != 0.0
    b_factor = gl.where(m_seen, 1.0 / b_sum, 0.0)
    b_lse = gl.where(m_seen, (b_max + gl.log2(b_sum)) * _LN2, -float("inf"))
    b_out = b_out * gl.expand_dims(gl.convert_layout(b_factor, gl.SliceLayout(1, result)), 1)
    p_lse = lse + i_b * NUM_ROWS * HEADS + i_h
    gl.store(p_lse + o_lse.to(gl.int64) * HEADS, b_lse, mask=o_lse >= 0)
    if gated[0] is not None:
        b_out = _add_gated(b_out, gated, staging, i_b, i_h, o_tile, HEADS, D)
    staging.store(b_out.to(out.dtype.element_ty))
    o_d = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, memory)), 0)
    m_row = gl.expand_dims(o_token >= 0, 1)
    p_out = out + (i_b * NUM_ROWS * HEADS + i_h) * D
    o_out = gl.expand_dims(o_token.to(gl.int64) * (HEADS * D), 1) + o_d
    gl.store(p_out + o_out, staging.load(memory), mask=m_row)
