"""`explain`: for a call described by its shapes, every backend with "runs" or every reason why not."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from fastvideo.attention.registry import backend_name
from fastvideo.attention.request import MASK_KINDS, AttentionRequest
from fastvideo.attention.selector import BackendWish, Decision, Wish, choose, resolve_wish
from fastvideo.attention.validation import as_size, check_causal_lengths, check_dropout, check_flags, check_scale, check_sizes
from fastvideo.forward_context import thread_state
from fastvideo.platforms import System, current_platform, describe_system
from fastvideo.video.choose_tile import TileChoice, resolve_tile, tile_cost

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: data, whose string is a table.

    Attributes:
        decision: The choice and one verdict per backend.
        notes: What else a user should know about this installation.
        tile: What the padding of a sparse backend's tiles costs, where a grid was given.
    """

    decision: Decision
    notes: tuple[str, ...] = ()
    tile: TileChoice | None = None

    @property
    def chosen(self) -> str | None:
        """Name of the backend that would run, or `None`."""
        return self.decision.chosen

    def reasons(self, backend: BackendWish) -> tuple[str, ...]:
        """Return the reasons against one backend; none means it accepts."""
        name = backend_name(backend)
        return next((verdict.reasons for verdict in self.decision.trace if verdict.backend == name), ())

    def as_dict(self) -> dict[str, Any]:
        """Return everything as plain values that `json` can write."""
        request = asdict(self.decision.request)
        request["dtype"] = str(request["dtype"]).removeprefix("torch.")
        request["metadata_cls"] = None
        wish = self.decision.wish
        return {
            "request": request,
            "wish": None if wish is None else asdict(wish),
            "chosen": self.chosen,
            "backends": [{**asdict(verdict), "accepts": verdict.accepts} for verdict in self.decision.trace],
            "tile": None if self.tile is None else {**asdict(self.tile), "padding": self.tile.padding},
            "notes": self._all_notes(),
        }

    def _all_notes(self) -> list[str]:
        return [*self.decision.notes, *([] if self.tile is None else [self.tile.account]), *self.notes]

    def __str__(self) -> str:
        rows = [("backend", "verdict", "expected", "why")]
        for verdict in self.decision.trace:
            word = "chosen" if verdict.backend == self.chosen else "accepts" if verdict.accepts else "rejects"
            speed = _speed(verdict.expected_speed) if verdict.accepts else ""
            why = list(verdict.reasons)
            if verdict.accepts and not verdict.exact:
                why = ["runs only when named: its result is not dense attention"]
            rows += [(verdict.backend, word, speed, why[0] if why else "")]
            rows += [("", "", "", reason) for reason in why[1:]]
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        padded = [[*map(str.ljust, row[:3], widths), row[3]] for row in rows]
        lines = ["  ".join(cells).rstrip() for cells in padded]
        lines.insert(1, "-" * max(map(len, lines)))
        notes = [f"note: {note}" for note in self._all_notes()]
        return "\n".join([f"machine: {self.decision.request.system}", *lines, *notes])


def _speed(expected: float) -> str:
    """TFLOP/s in whole numbers, below one in one digit; nothing where none is expected."""
    return f"{expected:{'.0f' if expected >= 1 else '.1g'}} TFLOP/s" if expected else ""


def explain(
    *,
    heads: int,
    head_size: int,
    seq: int,
    dtype: torch.dtype | str = torch.bfloat16,
    device: str | None = None,
    system: System | str | None = None,
    backend: BackendWish | None = None,
    kv_heads: int | None = None,
    kv_seq: int | None = None,
    batch: int = 1,
    scale: float | None = None,
    causal: bool = False,
    mask: str | None = None,
    dropout_p: float = 0.0,
    needs_grad: bool = False,
    needs_lse: bool = False,
    has_gate: bool = False,
    grid_tyx: Sequence[int] | None = None,
    tile_tyx: Sequence[int] | str | None = None,
) -> Explanation:
    """Say which backend would run a call and why the others wouldn't, from shapes alone.

    Args:
        heads: Query heads.
        head_size: Size of a head.
        seq: Query tokens.
        dtype: A torch dtype or its name, bf16, fp16, fp32 and fp64 among them.
        device: Device type on this machine; `None` means its fastest.
        system: Another machine: a `System`, or a text such as `"H200, no flash-attn"` (see `describe_system`).
        backend: The backend asked for by name; `None` follows scope, environment, then automatic selection.
        kv_heads: Key and value heads; `None` means `heads`.
        kv_seq: Key tokens; `None` means `seq`.
        batch: Batch size.
        scale: Factor of the scores.
        causal: Each query sees only keys up to its own position.
        mask: `None`, `"key_padding"`, `"bool"` or `"additive"`.
        dropout_p: Dropout probability.
        needs_grad: A backward pass follows.
        needs_lse: The log-sum-exp is asked for.
        has_gate: A gate for the coarse part of sparse attention is handed over.
        grid_tyx: Tokens of the video along time, height and width, to be told what padding of tiles costs;
            text comes on top.
        tile_tyx: Tokens of a tile, `"auto"` or `"auto128"`; `None` means `"auto"`.

    Raises:
        TypeError: `dtype` names no dtype, or a size or a flag is of a wrong type.
        ValueError: A size is out of range, the grid has more tokens than `seq`, a tile is given without a grid, the
            device isn't here, or the text describes no known machine.
        UnknownBackend: No backend has that name.

    Example:
        >>> explain(heads=40, head_size=128, seq=75600, system="H200, torch only").chosen
        'TORCH_SDPA'
        >>> print(explain(heads=40, head_size=128, seq=75600, grid_tyx=(21, 45, 80), tile_tyx="auto").tile)
        tile 3x5x4 on grid 21x45x80: 1260 tiles, padding adds 13.8 % work
    """
    kv_heads = heads if kv_heads is None else kv_heads
    kv_seq = seq if kv_seq is None else kv_seq
    heads, kv_heads, head_size = check_sizes(heads, kv_heads, head_size)
    check_scale(scale)
    check_dropout(dropout_p)
    check_flags(causal=causal, needs_grad=needs_grad, needs_lse=needs_lse, has_gate=has_gate)
    seq, kv_seq, batch = as_size("seq", seq), as_size("kv_seq", kv_seq), as_size("batch", batch)
    if mask is not None and mask not in MASK_KINDS:
        raise ValueError(f"expected mask as None or one of {', '.join(MASK_KINDS)}, got {mask!r}")
    if causal:
        check_causal_lengths(seq, kv_seq)
    machine = _machine(system, device)
    request = AttentionRequest(
        heads, kv_heads, head_size, seq, kv_seq, _dtype(dtype), machine.device_type, batch, scale, causal, mask,
        dropout_p=dropout_p, needs_grad=needs_grad, needs_lse=needs_lse, has_gate=has_gate, system=machine,
    )  # fmt: skip
    wish: Wish | None
    wish, notes = resolve_wish(backend, None, thread_state.backend_wish, None)
    return Explanation(choose(request, wish, None, notes), _installation_notes(), _tile(grid_tyx, tile_tyx, seq))


def _tile(grid_tyx: Sequence[int] | None, tile_tyx: Sequence[int] | str | None, seq: int) -> TileChoice | None:
    if grid_tyx is None:
        if tile_tyx is not None:
            raise ValueError(f"expected grid_tyx beside tile_tyx={tile_tyx!r}: what a tile costs depends on the grid")
        return None
    choice = tile_cost(grid_tyx, resolve_tile("auto" if tile_tyx is None else tile_tyx, grid_tyx))
    if math.prod(choice.grid_tyx) > seq:
        raise ValueError(f"expected a grid of at most seq={seq} tokens, got {choice.grid_tyx}: {math.prod(choice.grid_tyx)}")
    return choice


def _machine(system: System | str | None, device: str | None) -> System:
    if system is None:
        kind = None if device is None else torch.device(device).type
        module = None if kind is None else getattr(torch, kind, None)  # "meta" has none
        if kind not in (None, "cpu", "cuda") and not (module is not None and module.is_available()):
            raise ValueError(f"torch sees no device of type {kind!r} here; describe a machine, as in system='H200'")
        return current_platform(kind)
    machine = describe_system(system) if isinstance(system, str) else system
    if device is not None and torch.device(device).type != machine.device_type:
        raise ValueError(f"expected a device of type {machine.device_type!r} for {machine.device_name}, got {device!r}")
    return machine


_SHORT = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}


def _dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = _SHORT.get(dtype, getattr(torch, dtype, None)) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise TypeError(f"expected a torch dtype or its name, such as 'bfloat16', got {dtype!r}")
    return found


def _installation_notes() -> tuple[str, ...]:
    try:
        other = importlib.metadata.version("fastvideo")
    except importlib.metadata.PackageNotFoundError:
        return ()
    return (
        f"the distribution 'fastvideo' {other} is installed too and owns the same import name as 'fastvideo-attention'; "
        "keep one of them: pip uninstall fastvideo",
    )
