"""Threads for ranks, and ordinary memory for what their devices share, for direct exchanges without a GPU."""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import queue
import random
import threading
from collections.abc import Callable, Sequence

import torch

from fastvideo.distributed.collectives import unpack
from fastvideo.distributed.direct import DirectExchange
from fastvideo.distributed.routes import Route, has_own_places
from fastvideo.distributed.rows import Move

TIMEOUT = 20.0


class Shared:
    """What the memories of all ranks have in common: their bytes and words by rank."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.changed = threading.Condition()
        self.memory = [torch.empty(0, dtype=torch.uint8) for _ in range(size)]
        self.outgrown: list[torch.Tensor] = []
        self.words = {kind: [[0] * size for _ in range(size)] for kind in ("written", "read")}
        self.growing = threading.Barrier(size)


class ThreadStream:
    """A stream: what it is given, a thread does in order, each after a while, as a copy engine would beside the host."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._waiting: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while True:
            do = self._waiting.get()
            threading.Event().wait(self._random.random() * 0.0005)
            do()

    def give(self, do: Callable[[], None]) -> None:
        self._waiting.put(do)


class Caller:
    """The caller's stream: what it is given is done at once."""

    def give(self, do: Callable[[], None]) -> None:
        do()


class ThreadMemory:
    """A rank's memory; a device may carry out several streams in one queue."""

    def __init__(self, shared: Shared, rank: int, capacity: int, queue: ThreadStream | None = None) -> None:
        self.rank, self.capacity, self._shared = rank, capacity, shared
        shared.memory[rank] = torch.full((capacity,), 255, dtype=torch.uint8)
        self.copies, self.own, self.words = (queue or ThreadStream(rank + seed) for seed in (0, 9, 99))
        self._caller = Caller()
        self.num_grown = 0
        self.waited: list[tuple[int, int]] = []

    @property
    def addresses(self) -> tuple[int, ...]:
        return tuple(memory.data_ptr() for memory in self._shared.memory)

    def grow(self, capacity: int, waits: Sequence[tuple[int, int]]) -> None:
        self.wait_read(self._caller, waits)
        for stream in (self.copies, self.own, self.words):
            self.after(self._caller, self.mark(stream))
        self._shared.growing.wait(TIMEOUT)
        self.capacity = capacity
        self.num_grown += 1
        self._shared.outgrown.append(self._shared.memory[self.rank])
        self._shared.memory[self.rank] = torch.full((capacity,), 255, dtype=torch.uint8)
        for words in self._shared.words.values():
            words[self.rank] = [0] * self._shared.size
        self._shared.growing.wait(TIMEOUT)

    def view(self, dtype: torch.dtype) -> torch.Tensor:
        return self._shared.memory[self.rank].view(dtype)

    def guard(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def current(self) -> Caller:
        return self._caller

    def mark(self, stream: Caller | ThreadStream) -> threading.Event:
        done = threading.Event()
        stream.give(done.set)
        return done

    def after(self, stream: Caller | ThreadStream, mark: threading.Event) -> None:
        def wait() -> None:
            assert mark.wait(TIMEOUT)

        stream.give(wait)

    def follow(self, streams: Sequence[Caller | ThreadStream], leader: Caller | ThreadStream) -> None:
        mark = self.mark(leader)
        for stream in streams:
            self.after(stream, mark)

    def copy(self, stream: Caller | ThreadStream, moves: Sequence[Move], bases: Sequence[int]) -> None:
        places = list(bases)

        def copy() -> None:
            for to, target, target_distance, of, source, source_distance, length, number in moves:
                assert length > 0 < number
                for row in range(number):
                    there, here = target + row * target_distance, source + row * source_distance
                    ctypes.memmove(places[to] + there, places[of] + here, length)

        stream.give(copy)

    copy_here = copy

    def _write(self, stream: Caller | ThreadStream, kind: str, peers: Sequence[int], number: int) -> None:
        assert self.rank not in peers

        def write() -> None:
            with self._shared.changed:
                for peer in peers:
                    self._shared.words[kind][peer][self.rank] = number
                self._shared.changed.notify_all()

        stream.give(write)

    def _wait(self, stream: Caller | ThreadStream, kind: str, waits: Sequence[tuple[int, int]]) -> None:
        assert all(peer != self.rank for peer, _ in waits)

        def wait() -> None:
            with self._shared.changed:
                word = self._shared.words[kind][self.rank]
                assert self._shared.changed.wait_for(lambda: all(word[peer] >= number for peer, number in waits), TIMEOUT)

        stream.give(wait)

    def write_written(self, stream: Caller | ThreadStream, peers: Sequence[int], number: int) -> None:
        self._write(stream, "written", peers, number)

    def write_read(self, stream: Caller | ThreadStream, peers: Sequence[int], number: int) -> None:
        self._write(stream, "read", peers, number)

    def wait_written(self, stream: Caller | ThreadStream, peers: Sequence[int], number: int) -> None:
        self._wait(stream, "written", [(peer, number) for peer in peers])

    def wait_read(self, stream: Caller | ThreadStream, waits: Sequence[tuple[int, int]]) -> None:
        self.waited += waits
        self._wait(stream, "read", waits)


def run_ranks(
    size: int, capacity: int, work: Callable[[int, DirectExchange], None], *, landing: bool = False, in_one_queue: bool = False
) -> list[ThreadMemory]:
    """Run `work(rank, exchange)` in one thread per rank and return the ranks' memories for fetching, or for `landing`."""
    both = [Shared(size), Shared(size)]
    queues = [ThreadStream(rank) if in_one_queue else None for rank in range(size)]
    memories = [[ThreadMemory(shared, rank, capacity, queues[rank]) for rank in range(size)] for shared in both]
    with concurrent.futures.ThreadPoolExecutor(size) as pool:
        exchanges = [DirectExchange(staging, landing_, size) for staging, landing_ in zip(*memories, strict=True)]
        for done in [pool.submit(work, rank, exchange) for rank, exchange in enumerate(exchanges)]:
            done.result(3 * TIMEOUT)
    return memories[landing]


def join(exchange: DirectExchange, x: torch.Tensor, route: Route) -> torch.Tensor:
    return joined(exchange, exchange.start([x], [route])[0], route)


def joined(exchange: DirectExchange, started: torch.Tensor, route: Route) -> torch.Tensor:
    assert exchange.finish(started) == (started.numel() > 0)
    assert (started.dim() > 1) == has_own_places(route)
    return started if started.dim() > 1 else unpack(started, route.receive, route.shape)


def shards(whole: torch.Tensor, dim: int, lengths: Sequence[int]) -> tuple[torch.Tensor, ...]:
    return torch.split(whole, list(lengths), dim=dim)
