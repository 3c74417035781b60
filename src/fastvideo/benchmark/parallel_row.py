"""A line of the benchmark of several ranks."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["ONE_CARD", "ParallelRow"]

ONE_CARD = "one card"
"""The library of a row that is no shared attention, but what the others are compared with."""


@dataclass
class ParallelRow:
    """One case, one pass, on all ranks; or one card, where `library` is `ONE_CARD`.

    Attributes:
        case: What ran.
        pass_name: `"forward"` or `"backward"`.
        library: `"fastvideo"`, a peer, or `ONE_CARD`.
        backend: The backend, or the peer's kernel.
        layout: The layout, as `plan` calls it.
        ring: Ranks that share keys.
        ulysses: Ranks that swap heads for tokens.
        head_groups: Groups of heads of which one travels while another is computed; `None` for a peer.
        is_sparse: It is VSA with a gate.
        is_float8: Tensors travel in float8.
        ms: Time on the slowest rank; `None` where it could not run.
        rounds_ms: The same of each round.
        one_card_ms: Time of one card for the whole problem.
        efficiency: `one_card_ms` over the ranks' time together.
        local_ms: Time of the local part alone, without any exchange.
        exposed_share: Share of `ms` beyond `local_ms`.
        extra_peak_gib: Peak memory of a rank beyond what it held before, and for the backward beyond the gradients.
        errors: Largest difference from one card over its largest magnitude, by output and gradient, on all tokens.
        over_budget: The budget that an error exceeded; such a row is not ranked.
        refused: Why it could not run.
        model_ms: What the model on paper says; `None` where it says nothing.
    """

    case: str
    pass_name: str
    library: str
    backend: str
    layout: str
    ring: int
    ulysses: int
    head_groups: int | None = None
    is_sparse: bool = False
    is_float8: bool = False
    ms: float | None = None
    rounds_ms: list[float] = field(default_factory=list)
    one_card_ms: float | None = None
    efficiency: float | None = None
    local_ms: float | None = None
    exposed_share: float | None = None
    extra_peak_gib: float | None = None
    errors: dict[str, float] = field(default_factory=dict)
    over_budget: str | None = None
    refused: str | None = None
    model_ms: float | None = None

    @property
    def is_ranked(self) -> bool:
        """It ran on several ranks, exactly and within budget."""
        return self.ms is not None and self.over_budget is None and not self.is_float8 and self.library != ONE_CARD

    def as_dict(self) -> dict[str, Any]:
        """The row as data."""
        return asdict(self)
