"""Differentiable collectives of unequal parts, which `torch.compile` traces, on gloo and NCCL.

One operation carries every layout: each rank cuts its tensor into one part per rank along one dim, and joins what comes along
another. Its gradient is the same operation the other way round: where parts overlap, their gradients add up. The convention
throughout is that the global loss is the sum over ranks of their local losses.

An exchange is launched and finished separately, so that computation can run in between; in the backward pass too, where what
was finished last is launched first. The names of torch's own autograd collectives differ between releases, so these are built
on the functional ones, which don't.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch

from fastvideo.distributed.agreement import explain_transport_error
from fastvideo.distributed.direct import direct_exchange, finish_direct
from fastvideo.distributed.mesh import SequenceGroup
from fastvideo.distributed.routes import Cut, Route, gather_route, has_own_places
from fastvideo.second_derivatives import differentiable_once
from fastvideo.tangents import refuse_tangents

__all__ = [
    "Launched",
    "all_gather",
    "arrive",
    "distinct",
    "exchange",
    "finish_exchange",
    "give_back",
    "kept",
    "lands_anywhere",
    "launch_exchange",
    "launch_exchanges",
    "lend",
    "start",
    "sum_gradient",
    "tied",
    "together",
    "unpack",
]

_functional = torch.ops._c10d_functional

Into: TypeAlias = Callable[[torch.Tensor, Sequence[int]], torch.Tensor]
"""Gives memory of a shape, of the dtype and on the device of a tensor."""


class Launched(NamedTuple):
    """An exchange on its way.

    Attributes:
        received: What comes; not to be read yet.
        sent: Stands for what was sent, without memory of its own: in the backward pass its gradient is what comes back. `None`
            where no gradient is recorded.
        route: The route.
        gradient_into: Where its gradient is to arrive, or `None`.
        lent: What gives its memory back, if it is lent; `None` where it is this rank's for good.
    """

    received: torch.Tensor
    sent: torch.Tensor | None
    route: Route
    gradient_into: Into | None = None
    lent: Callable[[], None] | None = None


def exchange(x: torch.Tensor, route: Route, group: SequenceGroup) -> torch.Tensor:
    """Send part `r` of `x` to rank `r`, and return the parts that came, joined."""
    return finish_exchange(launch_exchange(x, route, group), group)


def launch_exchange(
    x: torch.Tensor,
    route: Route,
    group: SequenceGroup,
    *,
    into: Into | None = None,
    gradient_into: Into | None = None,
    is_hidden: bool = False,
) -> Launched:
    """Start an exchange; hand the result to `finish_exchange`, and read it nowhere else.

    Args:
        x: What this rank sends.
        route: Its route.
        group: The ranks.
        into: Gives the memory in which what comes is to arrive, its inner dims contiguous. A hint: only copy engines follow it.
        gradient_into: The same for the gradient of `x`.
        is_hidden: Other work goes on meanwhile, which the exchange should not hold up. A hint: without gradient, and where copy
            engines carry the exchange, it changes how, never what.
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        # Two autograd functions would be an eighth of the host time of a dense layer's call.
        return Launched(start((x,), (route,), group.name, into, is_hidden)[0], None, route)
    received, sent = _Launch.apply(x, route, group.name, into)  # type: ignore[no-untyped-call]
    return Launched(received, sent, route, gradient_into)


def launch_exchanges(
    tensors: Sequence[torch.Tensor],
    routes: Sequence[Route],
    group: SequenceGroup,
    *,
    gradient_intos: Sequence[Into | None] | None = None,
    is_lent: bool = False,
) -> list[Launched]:
    """Start the exchange of several tensors; as one, which takes less host time, where what comes is lent.

    Args:
        tensors: What this rank sends.
        routes: The route of each.
        group: The ranks.
        gradient_intos: For each where its gradient is to arrive, see `launch_exchange`.
        is_lent: What is received is needed for a while only, until `give_back`, so that copy engines may bring it without any
            packing; where no gradient is recorded. Said by all ranks or none, of parts that are joined along dim 1.
    """
    if is_lent and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors)):
        return lend(tensors, routes, group.name)
    intos = [None] * len(tensors) if gradient_intos is None else gradient_intos
    given = zip(tensors, routes, intos, strict=True)
    return [launch_exchange(x, route, group, gradient_into=into) for x, route, into in given]


def lend(tensors: Sequence[torch.Tensor], routes: Sequence[Route], name: str) -> list[Launched]:
    """Start the exchange of several tensors as one, without gradient; what comes is needed until `give_back`.

    Args:
        tensors: What this rank sends.
        routes: The route of each, of parts that are joined along dim 1.
        name: Name of the process group.
    """
    direct = direct_exchange(tensors[0], name)
    if direct is None:
        started = start(tensors, routes, name)
        return [Launched(x, None, route) for x, route in zip(started, routes, strict=True)]
    _refuse_tangents(tensors)
    received, number = direct.send(tensors, routes)
    lent = functools.partial(direct.give_back, number)
    return [Launched(x, None, route, None, lent) for x, route in zip(received, routes, strict=True)]


def give_back(launched: Launched) -> None:
    """Let peers have the memory of what was received together with `launched`, if it was lent; nothing may read it any more."""
    if launched.lent is not None:
        launched.lent()


def kept(x: torch.Tensor, launched: Launched) -> torch.Tensor:
    """Return `x`, or a copy of it where it is a view of memory that is lent together with `launched`."""
    if launched.lent is None or x.untyped_storage().data_ptr() != launched.received.untyped_storage().data_ptr():
        return x
    return x.clone()


def finish_exchange(launched: Launched, group: SequenceGroup) -> torch.Tensor:
    """Wait for a launched exchange and return the parts that came, joined."""
    received, sent, route, gradient_into, _ = launched
    if sent is not None:
        return _Finish.apply(received, sent, route, group.name, gradient_into)  # type: ignore[no-any-return,no-untyped-call]
    return arrive(received, route, group.name)


def lands_anywhere(x: torch.Tensor, group: SequenceGroup) -> bool:
    """Return whether an exchange of tensors like `x` can put what comes where it is told to; the same on every rank."""
    return direct_exchange(x, group.name) is not None


def all_gather(x: torch.Tensor, dim: int, lengths: Sequence[int], group: SequenceGroup) -> torch.Tensor:
    """Return every rank's `x` joined along `dim`, on every rank; rank `r` has `lengths[r]` there.

    The gradient is summed over the ranks.
    """
    return x if group.size == 1 else exchange(x, gather_route(tuple(x.shape), dim % x.dim(), tuple(lengths)), group)


def sum_gradient(x: torch.Tensor, group: SequenceGroup) -> torch.Tensor:
    """Return `x`, which every rank holds and uses in part; its gradient is summed over the ranks."""
    if group.size == 1 or not (x.is_floating_point() or x.is_complex()):
        return x
    return _SumGradient.apply(x, group.name)  # type: ignore[no-any-return,no-untyped-call]


def start(
    tensors: Sequence[torch.Tensor],
    routes: Sequence[Route],
    name: str,
    into: Into | None = None,
    is_hidden: bool = False,
) -> Sequence[torch.Tensor]:
    """Start an exchange of several tensors without gradient; read each result by `arrive`. Arguments as `launch_exchange`'s."""
    _refuse_tangents(tensors)
    direct = direct_exchange(tensors[0], name)
    if direct is not None:
        room = into(tensors[0], routes[0].shape) if into is not None and has_own_places(routes[0]) else None
        return direct.start(tensors, routes, room, is_hidden=is_hidden)
    return [_start_collective(x, route, name) for x, route in zip(tensors, routes, strict=True)]


def arrive(started: torch.Tensor, route: Route, name: str) -> torch.Tensor:
    """Wait for what `start` returned and return the parts that came, joined.

    Raises:
        RanksDisagree: The transport failed; the message says which rank is gone, where that is known.
    """
    if torch.compiler.is_compiling():
        return unpack(_wait(started, name), route.receive, route.shape)
    if not finish_direct(started, name):
        _wait(started, name)
    return started if started.dim() == len(route.shape) else unpack(started, route.receive, route.shape)


def _refuse_tangents(tensors: Sequence[torch.Tensor]) -> None:
    for x in tensors:
        refuse_tangents(sent=x)


def _wait(started: torch.Tensor, name: str) -> torch.Tensor:
    if torch.compiler.is_compiling():
        return _functional.wait_tensor(started)  # type: ignore[no-any-return]
    try:
        return _functional.wait_tensor(started)  # type: ignore[no-any-return]
    except RuntimeError as error:
        raise explain_transport_error(error, name) from error


def pack(x: torch.Tensor, cut: Cut) -> torch.Tensor:
    """Return the parts of `x` one after another, flat and contiguous."""
    dim, parts = cut
    if _is_in_order(cut, x.shape[dim]):
        if math.prod(x.shape[:dim]) == 1:
            return x.reshape(-1).contiguous()
        lengths = {stop - start for ((start, stop),) in parts}
        if len(lengths) == 1:
            return torch.unflatten(x, dim, (len(parts), -1)).movedim(dim, 0).reshape(-1).contiguous()
    pieces = [x.narrow(dim, first, last - first).reshape(-1) for part in parts for first, last in part]
    # A gradient that is one number everywhere is a view without memory of its own, even flat.
    return pieces[0].contiguous() if len(pieces) == 1 else torch.cat([*pieces, x.new_empty(0)])


def unpack(flat: torch.Tensor, cut: Cut, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the tensor of `shape` whose parts are those of `flat`; where they overlap they are added, elsewhere it is 0."""
    dim, parts = cut
    size = len(parts)
    if _is_in_order(cut, shape[dim]):
        if math.prod(shape[:dim]) == 1:
            return flat.view(shape)
        lengths = [stop - start for ((start, stop),) in parts]
        if len(set(lengths)) == 1:
            part = (*shape[:dim], lengths[0], *shape[dim + 1 :])
            return flat.view(size, *part).movedim(0, dim).reshape(shape)
        pieces = _split(flat, cut, shape)
        return torch.cat(pieces, dim=dim)
    if all(part == ((0, shape[dim]),) for part in parts):
        return flat.view(size, *shape).sum(dim=0)
    intervals = [interval for part in parts for interval in part]
    if intervals == [(0, shape[dim])]:
        return flat.view(shape)
    whole = flat.new_zeros(shape)
    for (first, last), piece in zip(intervals, _split(flat, cut, shape), strict=True):
        whole.narrow(dim, first, last - first).add_(piece)
    return whole


def _start_collective(x: torch.Tensor, route: Route, name: str) -> torch.Tensor:
    sent, received = _counts(route.send, route.source), _counts(route.receive, route.shape)
    if route.is_gather and len(set(received)) == 1:
        return _functional.all_gather_into_tensor(x.contiguous().view(-1), len(sent), name)  # type: ignore[no-any-return]
    is_traced_empty = torch.compiler.is_compiling() and x.numel() == 0
    flat = _zeros_op(x.detach(), [0], x.dtype, 0) if is_traced_empty else pack(x, route.send)
    return _functional.all_to_all_single(flat, received, sent, name)  # type: ignore[no-any-return]


def _counts(cut: Cut, shape: tuple[int, ...]) -> list[int]:
    """Return the elements of each part of a tensor of `shape`."""
    row = math.prod(shape[: cut.dim]) * math.prod(shape[cut.dim + 1 :])
    return [row * sum(stop - start for start, stop in part) for part in cut.parts]


def _split(flat: torch.Tensor, cut: Cut, shape: tuple[int, ...]) -> list[torch.Tensor]:
    row = math.prod(shape[: cut.dim]) * math.prod(shape[cut.dim + 1 :])
    lengths = [stop - start for part in cut.parts for start, stop in part]
    pieces = torch.split(flat, [row * length for length in lengths])
    return [piece.view(*shape[: cut.dim], length, *shape[cut.dim + 1 :]) for piece, length in zip(pieces, lengths, strict=True)]


def _is_in_order(cut: Cut, length: int) -> bool:
    """Return whether the parts are one interval each, and cover the dim from its start to its end."""
    position = 0
    for part in cut.parts:
        if len(part) != 1 or part[0][0] != position:
            return False
        position = part[0][1]
    return position == length


def tied(x: torch.Tensor, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return `x`, to which `inputs` add nothing, as the outcome of them too, so that their gradients flow, being 0."""
    return _Tied.apply(x, *inputs)  # type: ignore[no-any-return,no-untyped-call]


@torch.library.custom_op("fastvideo::zeros_after", mutates_args=())
def _zeros_op(x: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, _number: int) -> torch.Tensor:
    """Return zeros that no compiler knows before `x`, though none of its numbers counts, or takes for those of another number.

    A gradient that is 0 whatever comes would be exchanged in the forward pass, or two such as one, where peers don't.
    """
    return x.new_zeros(shape, dtype=dtype)


@_zeros_op.register_fake
def _(x: torch.Tensor, shape: Sequence[int], dtype: torch.dtype, _number: int) -> torch.Tensor:
    return x.new_empty(shape, dtype=dtype)


class _Tied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        ctx.kinds = [(list(x.shape), x.dtype) for x in inputs]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return grad, *[_zeros_op(grad, shape, dtype, number) for number, (shape, dtype) in enumerate(ctx.kinds)]


def distinct(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return each tensor once. Traced functions take none twice, and know none by `id`."""
    found: list[torch.Tensor] = []
    for x in tensors:
        if all(x is not y for y in found):
            found.append(x)
    return found


def together(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Return views of distinct tensors, all of whose gradients are computed where any of them is asked for."""
    return _Together.apply(*tensors)  # type: ignore[no-any-return,no-untyped-call]


class _Together(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple([x.view_as(x) for x in tensors])

    @staticmethod
    def backward(_ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return grads


class _Launch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, route: Route, name: str, into: Into | None) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.route, ctx.name = route, name
        # Or zeros, as large as what was received, would be made for it.
        ctx.set_materialize_grads(False)
        (received,) = start((x,), (route,), name, into)
        ctx.mark_non_differentiable(received)
        is_joined = direct_exchange(x, name) is not None and has_own_places(route.back())
        return received, x.new_empty(1).expand(route.source if is_joined else (sum(_counts(route.send, route.source)),))

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, _received: None, returned: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        return arrive(returned, ctx.route.back(), ctx.name), None, None, None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, received: torch.Tensor, _sent: torch.Tensor, route: Route, name: str, gradient_into: Into | None
    ) -> torch.Tensor:
        ctx.route, ctx.name, ctx.into = route, name, gradient_into
        return arrive(received, route, name)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor, None, None, None]:
        return None, start((grad,), (ctx.route.back(),), ctx.name, ctx.into)[0], None, None, None


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, name: str) -> torch.Tensor:
        ctx.name = name
        return x.view_as(x)

    @staticmethod
    @differentiable_once
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        # Transports add no complex numbers; their parts add up.
        parts = torch.view_as_real(grad.resolve_conj()) if grad.is_complex() else grad
        total = _wait(_functional.all_reduce(parts.contiguous(), "sum", ctx.name), ctx.name)
        return torch.view_as_complex(total) if grad.is_complex() else total, None
