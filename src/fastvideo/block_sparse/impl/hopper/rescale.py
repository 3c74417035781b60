"""Multiplies what is summed by the factors of its rows, and skips that where all rows of a warp have the factor 1.

Once a walk has met its largest scores no row maximum grows any more. Triton has no branch for a single warp, hence the
assembly: a vote of the warp, and a branch over the products.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the types of kernel arguments are Triton's, not Python's)

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


def _assembly(count: int) -> str:
    """Of `count` values of a thread, in pairs that belong to its first and its second row in turn; factors follow them."""
    one = "0f3F800000"
    vote = (
        f"setp.neu.f32 p, ${2 * count}, {one};\n"
        f"setp.neu.or.f32 p, ${2 * count + 2}, {one}, p;\n"
        "vote.sync.any.pred p, p, 0xffffffff;\n"
        "@!p bra.uni DONE;\n"
    )
    products = "".join(f"mul.f32 ${i}, ${i}, ${2 * count + i};\n" for i in range(count))
    return "{\n.reg .pred p;\n" + vote + products + "DONE:\n}\n"


def _constraints(count: int) -> str:
    """Results, the values in their places, factors."""
    return ",".join(["=f"] * count + [str(i) for i in range(count)] + ["f"] * count)


_ASSEMBLY_64, _CONSTRAINTS_64 = gl.constexpr(_assembly(32)), gl.constexpr(_constraints(32))
_ASSEMBLY_128, _CONSTRAINTS_128 = gl.constexpr(_assembly(64)), gl.constexpr(_constraints(64))


@gluon.jit
def rescale(b_out, b_factor, D: gl.constexpr):
    """`b_out` `[64, D]` times `b_factor` `[64]`, both as one warpgroup holds its products."""
    b_factor = gl.expand_dims(b_factor, 1).broadcast_to(b_out.shape)
    assembly: gl.constexpr = _ASSEMBLY_128 if D == 128 else _ASSEMBLY_64
    constraints: gl.constexpr = _CONSTRAINTS_128 if D == 128 else _CONSTRAINTS_64
    return gl.inline_asm_elementwise(assembly, constraints, [b_out, b_factor], dtype=gl.float32, is_pure=True, pack=D // 2)
