"""Exchanges by copy engines, which move memory between the devices of one host beside any kernel.

A collective's kernels take multiprocessors from the attention that they should hide behind; a copy engine takes none. What
devices say to each other are numbers of exchanges, which they write into each other's memory and wait for
(`fastvideo.distributed.symmetric`), so neither a kernel nor a host waits for a peer. There are two ways:

- *Fetching*: pack what others need into this rank's staging memory; say so; wait for each peer's word and copy its part
  straight to where it belongs; say that it is read. What is received is memory like any other.
- *Sending*: copy each part straight into the peer's memory, and say so. Nothing is packed, and nobody waits for a peer that
  isn't ready, but what is received is this rank's only until it gives it back (`DirectExchange.give_back`), as in
  inference and in a ring.

On every rank each wait is given to a stream after all that ends it on the peers, in the order of exchanges that ranks share. So
nothing can block for good, even where a device carries out several streams in one queue.

Memory is a ring of regions: a later exchange overwrites an earlier one's once all who read that have said so. All ranks
compute the same regions, because a `Route` knows what every rank sends to every other.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from fastvideo.distributed.peer_memory import PeerMemory
from fastvideo.distributed.recipes import Layout, Piece, Sending, fetching, sending
from fastvideo.distributed.regions import LEAST_CAPACITY, Regions
from fastvideo.distributed.routes import Route
from fastvideo.distributed.rows import Form, copy_wide
from fastvideo.distributed.symmetric import SymmetricMemory, why_not_symmetric
from fastvideo.settings import Settings

__all__ = ["DirectExchange", "Sent", "direct_exchange", "exchange_kind", "finish_direct"]


@dataclass
class _Coming:
    """What is on its way to this rank, or lent to it.

    Attributes:
        received: The tensors that it completes.
        done: A mark of when it is complete.
        sent: A mark of when this rank has sent what it sends.
        sources: What copy engines read meanwhile, which must not be given to others before they have.
        lent: Number of an exchange by sending; 0 where what is received is this rank's for good.
        reader: A stream that waits for it already.
    """

    received: Sequence[torch.Tensor]
    done: Any
    sent: Any
    sources: Sequence[torch.Tensor]
    lent: int = 0
    reader: Any = None


class Sent(NamedTuple):
    """An exchange by sending, on its way.

    Attributes:
        received: For each tensor what is received, to be read between `finish` and `give_back`.
        number: What `give_back` takes.
    """

    received: tuple[torch.Tensor, ...]
    number: int


class DirectExchange:
    """The exchanges of one group, in the order that all its ranks make them.

    Args:
        staging: Where the ranks pack what others fetch.
        landing: Where they receive what others send.
        size: Number of ranks.
    """

    def __init__(self, staging: PeerMemory, landing: PeerMemory, size: int) -> None:
        self._staging, self._landing = staging, landing
        self._peers = [(staging.rank + distance) % size for distance in range(1, size)]
        self._packed, self._landed = Regions(), Regions()
        self._coming: dict[int, _Coming] = {}
        self._lent: deque[_Coming] = deque()
        self._lock = threading.Lock()

    def start(
        self,
        tensors: Sequence[torch.Tensor],
        routes: Sequence[Route],
        into: torch.Tensor | None = None,
        *,
        is_hidden: bool = False,
    ) -> tuple[torch.Tensor, ...]:
        """Start the exchange of several tensors at once, by fetching.

        Args:
            tensors: What this rank sends.
            routes: The route of each.
            into: Where what is received goes, of its shape, if there is one tensor.
            is_hidden: Other work goes on meanwhile, which packing should not hold up.

        Returns:
            For each what is received, to be read after `finish`: of the route's shape, or flat if parts overlap there.
        """
        memory = self._staging
        recipe = fetching(tuple(routes), _layouts(tensors), memory.rank, None if into is None else _layouts((into,))[0])
        with self._lock, memory.guard():
            claim = self._packed.claim(recipe.length, recipe.readers, memory.capacity, memory.grow)
            received = (into,) if into is not None else tuple(map(torch.Tensor.new_empty, tensors, recipe.shapes))
            bases = _bases(tensors, received, memory.addresses, claim.start)
            current, copies, own = memory.current(), memory.copies, memory.own
            for piece in recipe.own:
                if piece.moves is None:
                    _copy_by_kernel(piece, tensors, received[piece.target.base - len(tensors)])
            # What is received takes memory that kernels before may still use.
            memory.follow((copies, own) if recipe.stays else (copies,), current)
            packing = copies if is_hidden and recipe.is_copied else current
            _wait_for_readers(memory, packing, claim.waits)
            for piece in recipe.packs:
                if piece.moves is not None:
                    memory.copy_here(packing, piece.moves, bases)
                else:
                    _copy_by_kernel(piece, tensors, memory.view(tensors[piece.source.base].dtype), claim.start)
            if recipe.readers:
                memory.follow((memory.words,), packing)
                memory.write_written(memory.words, recipe.readers, claim.number)
            if recipe.stays:
                memory.copy_here(own, recipe.stays, bases)
            for peer, moves in recipe.fetches:
                memory.wait_written(copies, (peer,), claim.number)
                memory.copy(copies, moves, bases)
            if recipe.stays:
                memory.follow((copies,), own)
            done = memory.mark(copies)
            if recipe.fetches:
                memory.write_read(copies, [peer for peer, _ in recipe.fetches], claim.number)
            if not self._await(_Coming(received, done, done, tensors)):
                memory.after(current, done)
        return received

    def send(self, tensors: Sequence[torch.Tensor], routes: Sequence[Route]) -> Sent:
        """Start the exchange of several tensors at once, by sending; what is received has to be given back.

        Args:
            tensors: What this rank sends.
            routes: The route of each; what is received is joined along dim 1, in the order of ranks.
        """
        memory = self._landing
        recipe = sending(tuple(routes), _layouts(tensors), memory.rank)
        if recipe is None:
            tensors = [x.contiguous() for x in tensors]
            recipe = sending(tuple(routes), _layouts(tensors), memory.rank)
        if recipe is None:
            raise ValueError(f"expected parts that copy engines take, got {[tuple(x.shape) for x in tensors]} by {routes}")
        with self._lock, memory.guard():
            claim = self._landed.claim(recipe.length, recipe.readers, memory.capacity, self._grow_landing, len(self._lent))
            received = _landed(recipe, tensors, memory, claim.start)
            bases = _bases(tensors, received, memory.addresses, claim.start)
            copies, own = memory.copies, memory.own
            memory.follow((copies, own), memory.current())
            _wait_for_readers(memory, copies, claim.waits)
            memory.copy(copies, recipe.sends, bases)
            if recipe.receivers:
                memory.write_written(copies, recipe.receivers, claim.number)
            memory.copy_here(own, recipe.own, bases)
            if recipe.senders:
                memory.wait_written(own, recipe.senders, claim.number)
            coming = _Coming(received, memory.mark(own), memory.mark(copies), tensors, claim.number)
            self._await(coming)
            self._lent.append(coming)
        return Sent(received, claim.number)

    def finish(self, received: torch.Tensor) -> bool:
        """Let what comes next on this stream wait until `received` is complete; return whether it was on its way."""
        coming = self._coming.pop(received.data_ptr(), None) if received.numel() else None
        if coming is None:
            return False
        memory = self._landing if coming.lent else self._staging
        current = memory.current()
        if coming.reader != current:
            memory.after(current, coming.done)
            coming.reader = current
        return True

    def give_back(self, number: int) -> None:
        """Let others write where what was received up to exchange `number` lies, once this stream is done so far."""
        memory = self._landing
        with self._lock, memory.guard():
            current = memory.current()
            while self._lent and self._lent[0].lent <= number:
                coming = self._lent.popleft()
                # What was sent is the caller's again.
                memory.after(current, coming.sent)
                for x in coming.received:
                    self._coming.pop(x.data_ptr(), None)
            memory.follow((memory.words,), current)
            memory.write_read(memory.words, self._peers, number)

    def _grow_landing(self, capacity: int, _waits: Sequence[tuple[int, int]]) -> None:
        """Replace the memory in which others' parts land. What is lent stays in the old one, where all of it has arrived."""
        self._landing.grow(capacity, ())

    def _await(self, coming: _Coming) -> bool:
        """Remember what is on its way by its address; return whether there is any."""
        found = {x.data_ptr(): coming for x in coming.received if x.numel()}
        self._coming |= found
        return len(found) > 0


def _wait_for_readers(memory: PeerMemory, stream: Any, waits: Sequence[tuple[int, int]]) -> None:
    """Let what comes next on a stream wait until a region was read.

    A word takes a stream some microseconds even where it has come, so that one waits that has nothing else to do.
    """
    if waits:
        memory.wait_read(memory.words, waits)
        memory.follow((stream,), memory.words)


def _copy_by_kernel(piece: Piece, tensors: Sequence[torch.Tensor], target: torch.Tensor, start: int = 0) -> None:
    """Copy what is no rows at equal distances."""
    copy_wide(_tensor(piece.target, target, start), _tensor(piece.source, tensors[piece.source.base]))


def _layouts(tensors: Sequence[torch.Tensor]) -> tuple[Layout, ...]:
    return tuple([Layout(tuple(x.shape), x.stride(), x.element_size()) for x in tensors])


def _bases(tensors: Sequence[torch.Tensor], received: Sequence[torch.Tensor], regions: Sequence[int], start: int) -> list[int]:
    """Return where the memories begin that a recipe numbers."""
    return [*[x.data_ptr() for x in tensors], *[x.data_ptr() for x in received], *[region + start for region in regions]]


def _tensor(form: Form, memory: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Return what lies in a tensor's memory as `form` says, and `start` bytes further."""
    return memory.as_strided(form.shape, form.strides, memory.storage_offset() + (form.start + start) // form.item)


def _landed(recipe: Sending, tensors: Sequence[torch.Tensor], memory: PeerMemory, start: int) -> tuple[torch.Tensor, ...]:
    """Return what is received in this rank's region."""
    dtype = tensors[0].dtype
    if recipe.together is not None and all(x.dtype == dtype for x in tensors):
        return _tensor(recipe.together, memory.view(dtype), start).unbind()
    return tuple([_tensor(form, memory.view(x.dtype), start) for form, x in zip(recipe.received, tensors, strict=True)])


_exchanges: dict[str, tuple[weakref.ref[object], DirectExchange | None]] = {}
"""By name of the process group: the group itself, and its exchange if it has one. A later group may bear the same name."""

_deciding = threading.Lock()


def exchange_kind(device: torch.device) -> str:
    """Return how eager code of this process would exchange tensors on `device`: `"direct"` or `"collective"`.

    Ranks agree on it before each call, since the two don't meet. Whether a group can do what is wished is settled once, by all
    its ranks together.

    Raises:
        RuntimeError: `FASTVIDEO_EXCHANGE=direct`, and the device is no CUDA device.
    """
    if torch.compiler.is_compiling():
        return "collective"
    wish = Settings.current().exchange
    if device.type != "cuda":
        if wish == "direct":
            raise RuntimeError(
                f"FASTVIDEO_EXCHANGE=direct was asked for, and tensors on {device} have no copy engines; "
                "use FASTVIDEO_EXCHANGE=auto or collective"
            )
        return "collective"
    return "collective" if wish == "collective" or torch.cuda.is_current_stream_capturing() else "direct"


def direct_exchange(x: torch.Tensor, name: str) -> DirectExchange | None:
    """Return the direct exchange of the process group `name` for tensors like `x`; `None` where collectives are to be used.

    The first call for a group is a collective one.

    Raises:
        RuntimeError: `FASTVIDEO_EXCHANGE=direct`, and this group can't; the message says why, on every rank.
    """
    if torch.compiler.is_compiling() or exchange_kind(x.device) == "collective":
        return None
    group = torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
    known = _exchanges.get(name)
    if known is None or known[0]() is not group:
        with _deciding:
            # Another thread may have opened it meanwhile, and ranks open it together, once.
            known = _exchanges.get(name)
            if known is None or known[0]() is not group:
                known = _exchanges[name] = (weakref.ref(group), _open(x.device, group))
    return known[1]


def finish_direct(received: torch.Tensor, name: str) -> bool:
    """Wait for what a direct exchange of the process group `name` receives; return whether it is one's."""
    known = _exchanges.get(name)
    return known is not None and known[1] is not None and known[1].finish(received)


def _open(device: torch.device, group: torch.distributed.ProcessGroup) -> DirectExchange | None:
    wish = Settings.current().exchange
    reason = why_not_symmetric(device, group, wish)
    if reason is None:
        staging, reason = SymmetricMemory.open(device, group, LEAST_CAPACITY)
        landing, reason = (None, reason) if staging is None else SymmetricMemory.open(device, group, LEAST_CAPACITY)
        if staging is not None and landing is not None:
            return DirectExchange(staging, landing, group.size())
    if wish == "direct":
        raise RuntimeError(
            f"FASTVIDEO_EXCHANGE=direct was asked for, and the ranks of group {group.group_name!r} can't: {reason}; "
            "use FASTVIDEO_EXCHANGE=auto or collective"
        )
    return None
