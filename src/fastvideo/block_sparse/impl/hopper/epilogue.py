"""What the Hopper forward does with a block of 64 query rows whose walk has ended: normalise, and write it in token order."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the types of kernel arguments are Triton's, not Python's)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_LN2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def write_block(sums, staging, tensors, i_b, i_h, o_token, o_lse, HEADS, NUM_QUERIES, D: gl.constexpr, memory: gl.constexpr):
    """Write the output and log-sum-exp of one block.

    `sums` are those of `exp2(score - maximum) * value` in the layout of the product, the row maxima and the row sums, in that
    of the scores. `staging` has 64 rows that nobody else reads, `o_token` the rows' tokens in layout `memory`, `o_lse` in that
    of the row sums, negative for pads.
    """
    b_out, b_max, b_sum = sums
    out, lse = tensors
    result: gl.constexpr = b_out.type.layout
    # NaN counts as seen and reaches the output.
    m_seen = b_sum != 0.0
    b_factor = gl.where(m_seen, 1.0 / b_sum, 0.0)
    b_lse = gl.where(m_seen, (b_max + gl.log2(b_sum)) * _LN2, -float("inf"))
    b_out = b_out * gl.expand_dims(gl.convert_layout(b_factor, gl.SliceLayout(1, result)), 1)
    p_lse = lse + i_b * NUM_QUERIES * HEADS + i_h
    gl.store(p_lse + o_lse.to(gl.int64) * HEADS, b_lse, mask=o_lse >= 0)
    staging.store(b_out.to(out.dtype.element_ty))
    o_d = gl.expand_dims(gl.arange(0, D, gl.SliceLayout(0, memory)), 0)
    m_row = gl.expand_dims(o_token >= 0, 1)
    p_out = out + (i_b * NUM_QUERIES * HEADS + i_h) * D
    o_out = gl.expand_dims(o_token.to(gl.int64) * (HEADS * D), 1) + o_d
    gl.store(p_out + o_out, staging.load(memory), mask=m_row)
