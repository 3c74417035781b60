"""Forward-mode derivatives, of which custom ops and exchanges between ranks know nothing."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

__all__ = ["refuse_tangents"]


def refuse_tangents(**tensors: torch.Tensor | None) -> None:
    """Refuse forward-mode derivatives where what comes next would drop them: its result would have a tangent of zero.

    Raises:
        NotImplementedError: A tensor carries a tangent.

    Example:
        >>> refuse_tangents(query=torch.ones(2), gate=None)
    """
    # Outside of any level there are none; `unpack_dual` says so too, and takes four times as long.
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for name, x in tensors.items():
        if x is not None and forward_ad.unpack_dual(x).tangent is not None:  # type: ignore[no-untyped-call]  # torch's own
            raise NotImplementedError(
                f"expected tensors without a forward-mode tangent (torch.func.jvp, torch.autograd.forward_ad), got {name} with "
                "one, which would be dropped here; differentiate it backward, by torch.autograd"
            )
