"""Ranks agree on a call before they enter the transport, so that a difference is an error with names and not a hang.

Each rank publishes what it is about to do in the store of the process group, out of band, and compares it with its peers'
words. When it does so is the mode (`FASTVIDEO_AGREEMENT`):

- `"every"`, the thorough one: at every call. One round trip to the store and the wait for the slowest peer's, about 0.3 ms of
  host time on one machine.
- `"new"`: at a call that isn't the only one ever seen to follow the call before. A call that is costs a dictionary lookup,
  3 µs. Peers that went ahead are then inside the transport; the watchdog tells them and aborts the process group.
- `"auto"`, the default: `"new"` on CUDA, whose transport (NCCL) can be aborted; `"every"` elsewhere, because gloo can't, and
  a mismatch inside it ends the process.
- `"off"`.

A backward pass is a call of its own, with the number of the one that it belongs to, so that a rank that leaves one out, or runs
two in another order, is an error too. It costs what the forward pass costs.

A rank waits for its peers for `FASTVIDEO_AGREEMENT_TIMEOUT` seconds, 60 by default. A thread per process, the `Watchdog`, keeps
in touch meanwhile: a few round trips, four times a second. The check is host work: in compiled code
it is an op, and an exchange of one number that waits for it; compilers keep the order of exchanges. A captured CUDA graph
replays without it. Threads of one process take turns, and have to come in the order in which their peers' do.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from fastvideo.compilation import constant_while_tracing, plain
from fastvideo.distributed.agreement.ledger import Ledger, RanksDisagree
from fastvideo.distributed.agreement.records import Fields
from fastvideo.distributed.agreement.watchdog import Watchdog, silent_ranks
from fastvideo.distributed.direct import exchange_kind
from fastvideo.distributed.mesh import SequenceGroup
from fastvideo.settings import AGREEMENT_MODES, Settings

__all__ = ["RanksDisagree", "agree", "agree_on_backward", "explain_transport_error"]

_ledgers: dict[tuple[int, ...], Ledger] = {}
_opening = threading.Lock()
_watchdog = Watchdog()


def agree(
    x: torch.Tensor, group: SequenceGroup, *, mode: str | None = None, timeout: float | None = None, **fields: Any
) -> torch.Tensor:
    """Return `x` once no rank of `group` can be making another call than this one.

    Call it on every rank, in the order of calls, before anything is sent.

    Args:
        x: A tensor that the call goes on to use, returned as it is. Its device is agreed on too, and decides what `"auto"`
            means.
        group: The ranks.
        mode: `"auto"`, `"new"`, `"every"` or `"off"`, the same on every rank; `None` takes `FASTVIDEO_AGREEMENT`.
        timeout: Seconds to wait for peers; `None` takes `FASTVIDEO_AGREEMENT_TIMEOUT`.
        **fields: What the ranks have to agree on, by name, compared as text: shapes that are equal everywhere, dtype, layout.
            The `layer` only where every rank names it; compiled code doesn't.

    Raises:
        RanksDisagree: Another rank makes another call, ended, or didn't come within the timeout.
        ValueError: `mode` or `timeout` is out of range.

    Example:
        >>> x = torch.ones(2)
        >>> agree(x, SequenceGroup("", (0,), 0), shape=(2,)) is x
        True
    """
    if group.size == 1:
        return x
    mode, timeout = _wishes(mode, timeout, x.device.type)
    if mode == "off":
        return x
    fields |= _transport_fields(x.device)
    if torch.compiler.is_compiling():
        _agree_in_graph(x, group.ranks, _transports(group), mode, timeout, _traced(fields))
        return x
    words = tuple([(name, str(value)) for name, value in fields.items()])
    _agree_now(group.ranks, _transports(group), mode, timeout, words)
    return x


def agree_on_backward(
    outputs: Sequence[torch.Tensor],
    group: SequenceGroup,
    *,
    mode: str | None = None,
    timeout: float | None = None,
    **fields: Any,
) -> tuple[torch.Tensor, ...]:
    """Return what a call returns, so that its backward pass begins only once no rank can be making another call.

    The backward pass is one for all outputs: where a caller uses some of them alone, the others' gradients are 0, so that ranks
    exchange the same whichever of them computes which loss.

    Args:
        outputs: What the call returns that `agree` was asked about last, on this thread.
        group: The ranks.
        mode: As for `agree`.
        timeout: As for `agree`.
        **fields: What the ranks have to agree on: as the call's own.

    Returns:
        The outputs, as views.

    Example:
        >>> x = torch.ones(2, requires_grad=True)
        >>> agree_on_backward((2 * x,), SequenceGroup("", (0,), 0), shape=(2,))[0].sum().backward()
        >>> x.grad
        tensor([2., 2.])
    """
    if group.size == 1:
        return tuple(outputs)
    mode, timeout = _wishes(mode, timeout, outputs[0].device.type)
    rest = {name: value for name, value in fields.items() if name != "pass"}
    fields = {"pass": "backward", **rest, **_transport_fields(outputs[0].device)}
    words: str | Fields
    if torch.compiler.is_compiling():
        number, words = 0, _traced(fields)
    else:
        number = 0 if mode == "off" else _ledger_of(group.ranks, timeout).own_number
        words = tuple([(name, str(value)) for name, value in fields.items()])
    return _Backward.apply(group.ranks, _transports(group), mode, timeout, words, number, *outputs)  # type: ignore[no-any-return,no-untyped-call]


class _Backward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ranks: tuple[int, ...],
        transports: str,
        mode: str,
        timeout: float,
        words: str | Fields,
        number: int,
        *outputs: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.call = (ranks, transports, mode, timeout, words, number)
        return tuple([x.view_as(x) for x in outputs])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, *others: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        ranks, transports, mode, timeout, words, number = ctx.call
        if mode != "off":
            if torch.compiler.is_compiling():
                _agree_in_graph(grad, ranks, transports, mode, timeout, str(words))
            else:
                _agree_now(ranks, transports, mode, timeout, words, number)
        return None, None, None, None, None, None, grad, *others


def explain_transport_error(error: RuntimeError, transport: str) -> RuntimeError:
    """Return the error to raise instead of one that the process group named `transport` raised: who is gone, where known."""
    ledger = next((ledger for ledger in _ledgers.values() if transport in ledger.transports and ledger.is_current), None)
    if ledger is None:
        return error
    try:
        silent = silent_ranks(ledger)
    except RuntimeError:
        return RanksDisagree(
            f"the exchange of call {ledger.count} of the shared attention failed, and the store of the process group is gone, "
            f"so the process that hosts it, usually rank 0, has ended: {error}"
        )
    who = (
        f"rank{'s' if len(silent) > 1 else ''} {', '.join(map(str, silent))} ended"
        if silent
        else "every rank is alive, but it failed"
    )
    return ledger.fail(f"{who} in the exchange of call {ledger.count} of the shared attention: {error}")


@constant_while_tracing
def _wishes(mode: str | None, timeout: float | None, device: str) -> tuple[str, float]:
    settings = Settings.current()
    mode = settings.agreement if mode is None else mode
    timeout = settings.agreement_timeout if timeout is None else timeout
    if mode not in AGREEMENT_MODES:
        raise ValueError(f"expected an agreement mode among {', '.join(AGREEMENT_MODES)}, got {mode!r}")
    if not timeout > 0:
        raise ValueError(f"expected a positive agreement timeout in seconds, got {timeout}")
    if mode == "auto":
        mode = "new" if device == "cuda" else "every"
    return mode, timeout


def _transport_fields(device: torch.device) -> dict[str, str]:
    return {"device": device.type} | ({"exchange": exchange_kind(device)} if device.type == "cuda" else {})


def _transports(group: SequenceGroup) -> str:
    parts = (group, group.ring, group.ulysses)
    return "\n".join([part.name for part in parts if part is not None and part.name])


def _traced(fields: dict[str, Any]) -> str:
    """Return fields as text while tracing. Equal layers compile once: nothing that differs between them may be read."""
    return _as_text(tuple([(name, _plain(value)) for name, value in fields.items() if name != "layer"]))


def _plain(value: Any) -> Any:
    """Return what traced code knows as a symbol, such as a size that changed, as the constant that it is."""
    return tuple([plain(part) for part in value]) if isinstance(value, tuple) else plain(value)


@constant_while_tracing
def _as_text(fields: tuple[tuple[str, Any], ...]) -> str:
    return json.dumps([(name, str(value)) for name, value in fields])


@functools.lru_cache(maxsize=4096)
def _from_text(text: str) -> Fields:
    return tuple((name, value) for name, value in json.loads(text))


def _agree_now(
    ranks: tuple[int, ...], transports: str, mode: str, timeout: float, fields: Fields, backward_of: int | None = None
) -> None:
    _ledger_of(ranks, timeout).agree(fields, mode == "every", timeout, transports, backward_of)


def _ledger_of(ranks: tuple[int, ...], timeout: float) -> Ledger:
    ledger = _ledgers.get(ranks)
    if ledger is not None and ledger.is_current:
        return ledger
    with _opening:  # two threads would count apart
        ledger = _ledgers.get(ranks)
        return ledger if ledger is not None and ledger.is_current else _open_ledger(ranks, timeout)


def _open_ledger(ranks: tuple[int, ...], timeout: float) -> Ledger:
    if not _ledgers:
        atexit.register(_leave, os.getpid())
    before = _ledgers.get(ranks)
    generation = 0 if before is None else before.generation + 1
    ledger = _ledgers[ranks] = Ledger(ranks, ranks.index(dist.get_rank()), timeout, generation)
    _watchdog.watch(ledger)
    return ledger


def _leave(process: int) -> None:
    """Tell peers that this process ends, and by which error; the interpreter keeps an uncaught one for post-mortems."""
    if os.getpid() != process:  # a fork that ends is none of their business
        return
    error = getattr(sys, "last_value", None)
    text = "" if error is None else f"{type(error).__name__}: {error}"
    for ledger in _ledgers.values():
        if ledger.is_current:
            ledger.leave(text)


def _agree_in_graph(x: torch.Tensor, ranks: tuple[int, ...], transports: str, mode: str, timeout: float, fields: str) -> None:
    """Agree while tracing, `x` being what the check has to come after.

    Neither the tensors of a call nor their gradients say that exchanges come after the check: a compiler moves what doesn't
    depend on it, and drops it where a rank's tensors are empty. It does keep exchanges, and in their order.
    """
    token = _agree_op(x.detach(), list(ranks), transports, mode, timeout, fields)
    functional = torch.ops._c10d_functional
    functional.wait_tensor(functional.all_reduce(token, "max", transports.partition("\n")[0]))


@torch.library.custom_op("fastvideo::agree", mutates_args=())
def _agree_op(x: torch.Tensor, ranks: Sequence[int], transports: str, mode: str, timeout: float, fields: str) -> torch.Tensor:
    """Return one number, which stands for the agreement."""
    _agree_now(tuple(ranks), transports, mode, timeout, _from_text(fields))
    return x.new_zeros(1)


@_agree_op.register_fake
def _(x: torch.Tensor, *_arguments: Any) -> torch.Tensor:
    return x.new_empty(1)
