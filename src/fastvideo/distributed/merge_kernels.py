"""A Triton kernel that merges two partial results of attention by their log-sum-exp, in one pass over both.

Sums and exponentials are in fp32. What is merged so far may be read in one dtype and written in another, or to where it lies.

Names: `i_` indices, `o_` offsets, `m_` masks, `p_` pointers, `b_` values of a block, `s_` strides in elements.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
# (the types of kernel arguments are Triton's, not Python's)

import triton
import triton.language as tl
from torch import Tensor

__all__ = ["launch_merge"]

_ROWS, _WARPS = 32, 4
"""Heads of tokens that a program merges: 16 KiB of a float32 output of head size 128."""


@triton.jit(do_not_specialize=["TOKENS", "FIRST", "LAST", "HEADS"])
def merge_fwd_kernel(
    out,
    lse,
    part,
    part_lse,
    target,
    target_lse,
    s_ob,
    s_os,
    s_oh,
    s_lb,
    s_ls,
    s_lh,
    s_pb,
    s_ps,
    s_ph,
    s_nb,
    s_ns,
    s_nh,
    TOKENS,
    FIRST,
    LAST,
    HEADS,
    HEAD_SIZE: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """`target` = `out` merged with `part`, which has the tokens from `FIRST` up to `LAST`; other tokens are copied."""
    i_b = tl.program_id(1).to(tl.int64)
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_token, o_head = (o_row // HEADS).to(tl.int64), (o_row % HEADS).to(tl.int64)
    o_d = tl.arange(0, D)[None, :]
    m_row = o_token < TOKENS
    m_part = m_row & (o_token >= FIRST) & (o_token < LAST)
    m_d = o_d < HEAD_SIZE
    p_lse = lse + i_b * s_lb + o_token * s_ls + o_head * s_lh
    p_part_lse = part_lse + i_b * s_nb + (o_token - FIRST) * s_ns + o_head * s_nh
    b_lse = tl.load(p_lse, mask=m_row, other=float("-inf"))
    b_part_lse = tl.load(p_part_lse, mask=m_part, other=float("-inf"))
    # Where neither saw a key their difference is no number, and the part has no share.
    b_behind = tl.where(b_part_lse == float("-inf"), float("inf"), b_lse - b_part_lse)
    b_share = 1.0 / (1.0 + tl.exp(b_behind))
    b_rest = 1.0 / (1.0 + tl.exp(-b_behind))
    b_most = tl.maximum(b_lse, b_part_lse)
    b_more = tl.log(1.0 + tl.exp(tl.minimum(b_lse, b_part_lse) - b_most))
    b_sum = tl.where(b_most == float("-inf"), b_most, b_most + b_more)
    p_out = out + (i_b * s_ob + o_token * s_os + o_head * s_oh)[:, None] + o_d
    p_part = part + (i_b * s_pb + (o_token - FIRST) * s_ps + o_head * s_ph)[:, None] + o_d
    b_out = tl.load(p_out, mask=m_row[:, None] & m_d, other=0.0).to(tl.float32)
    b_part = tl.load(p_part, mask=m_part[:, None] & m_d, other=0.0).to(tl.float32)
    b_out = b_out * b_rest[:, None] + b_part * b_share[:, None]
    o_target = i_b * TOKENS * HEADS + o_row
    tl.store(target + o_target[:, None] * HEAD_SIZE + o_d, b_out.to(target.dtype.element_ty), mask=m_row[:, None] & m_d)
    tl.store(target_lse + o_target, b_sum, mask=m_row)


def launch_merge(
    out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor, rows: tuple[int, int], target: Tensor, target_lse: Tensor
) -> None:
    """Fill `target` and `target_lse`, contiguous, which may be `out` and `lse` themselves.

    Args:
        out: What is merged so far, `[B, S, H, D]`.
        lse: Its log-sum-exp in fp32, `[B, S, H]`.
        part: Attention of some rows over other keys, `[B, n, H, D]`.
        part_lse: Its log-sum-exp in fp32, `[B, n, H]`.
        rows: The first of these rows, and the one after the last.
        target: For the output, `[B, S, H, D]`.
        target_lse: For the log-sum-exp in fp32, `[B, S, H]`.
    """
    out, part = (x if x.stride(-1) == 1 else x.contiguous() for x in (out, part))
    batch, num_tokens, num_heads, head_size = out.shape
    merge_fwd_kernel[(-(-num_tokens * num_heads // _ROWS), batch)](
        out,
        lse,
        part,
        part_lse,
        target,
        target_lse,
        *out.stride()[:3],
        *lse.stride(),
        *part.stride()[:3],
        *part_lse.stride(),
        num_tokens,
        *rows,
        num_heads,
        head_size,
        1 << (head_size - 1).bit_length(),
        _ROWS,
        num_warps=_WARPS,
    )
