"""One quiet thread per process that answers peers and frees this rank from a transport in which nobody will answer.

Four times a second it publishes a sign of life, reads those of its peers, answers a peer that waits at a call which this rank
has passed, and looks for a verdict. After a verdict it raises the error in the thread that made the last call and, on NCCL,
aborts the process group, whose kernels then end, so that the thread comes back to Python. It ends with the process group or
the process.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import threading
import time

import torch
import torch.distributed as dist

from fastvideo.distributed.agreement.ledger import Ledger, RanksDisagree
from fastvideo.distributed.symmetric import release

__all__ = ["Watchdog", "silent_ranks"]

_EVERY = 0.25
"""Seconds between two looks."""


class Watchdog:
    """Watches ledgers from a daemon thread, which exists only while there is something to watch."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._watched: dict[Ledger, _Peers] = {}
        self._thread: threading.Thread | None = None
        self._stop = threading.Event()

    def watch(self, ledger: Ledger) -> None:
        """Watch `ledger` until its process group is gone or it has failed."""
        with self._lock:
            self._watched.setdefault(ledger, _Peers(ledger))
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="fastvideo-agreement", daemon=True)
                self._thread.start()
                atexit.register(self.stop)

    def stop(self) -> None:
        """End the thread: a daemon must not be inside the store when the interpreter ends."""
        self._stop.set()
        thread = self._thread
        if thread is not None:
            thread.join(timeout=5.0)

    def _run(self) -> None:
        while not self._stop.wait(_EVERY):
            with self._lock:
                watched = list(self._watched.values())
            ended = [peers.ledger for peers in watched if not peers.look()]
            with self._lock:
                for ledger in ended:
                    del self._watched[ledger]
                if not self._watched:
                    self._thread = None
                    return


class _Peers:
    """What is known of the others of one ledger's group: their last signs of life."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._beat = 0
        self._signs: dict[int, tuple[bytes | None, float]] = {}

    def look(self) -> bool:
        """Return whether there is something left to watch."""
        ledger = self.ledger
        if not ledger.is_current:
            return False
        try:
            verdict = ledger.verdict() or self._exchange_signs()
        except RuntimeError:  # the store is gone: its host has ended, normally or not; the next new call will say so
            return False
        if verdict is None:
            return True
        _rescue(ledger, verdict)
        return False

    def _exchange_signs(self) -> str | None:
        """Publish a sign of life, answer who waits, and return a verdict if a peer shows none any more."""
        ledger, now = self.ledger, time.monotonic()
        self._beat += 1
        ledger.store.set(f"sign/{ledger.rank}", f"{self._beat} {ledger.waiting}")
        for place, sign in _signs(ledger).items():
            waits_at = int(sign.split()[1]) if sign else 0
            if waits_at:
                ledger.answer(waits_at)
            last, since = self._signs.get(place, (None, now))
            self._signs[place] = (sign, now if sign != last else since)
            verdict = self._verdict_on(place, now - since if sign == last else 0.0)
            if verdict is not None:
                return str(ledger.fail(verdict))
        return None

    def _verdict_on(self, place: int, silence: float) -> str | None:
        """Return why a peer can't go on, or `None`. One that ended without an error may have had no more calls to make."""
        ledger = self.ledger
        departure = ledger.departure(place)
        if departure is not None:
            count, error = departure
            if error or count < ledger.count:
                return ledger.describe_departure(place, count, error, f"made call {ledger.count}")
        elif ledger.count and silence > ledger.timeout:  # before the first call peers may still be on their way
            return (
                f"rank {ledger.ranks[place]} has shown no sign of life for {silence:.0f} s; "
                f"the last call of rank {ledger.ranks[ledger.rank]} was number {ledger.count}"
            )
        return None


def silent_ranks(ledger: Ledger) -> list[int]:
    """Wait for a second and return the global ranks that showed no sign of life in it.

    Raises:
        RuntimeError: The store is gone.
    """
    before = _signs(ledger)
    time.sleep(4 * _EVERY)
    after = _signs(ledger)
    return [ledger.ranks[place] for place in ledger.peers if after[place] == before[place]]


def _signs(ledger: Ledger) -> dict[int, bytes | None]:
    keys = {place: f"sign/{place}" for place in ledger.peers}
    return {place: ledger.store.get(key) if ledger.store.check([key]) else None for place, key in keys.items()}


def _rescue(ledger: Ledger, text: str) -> None:
    """Raise the verdict in the thread that made the last call, and abort the transport that may hold it."""
    with ledger.lock:
        # A call that waits for its peers finds the verdict itself.
        learns_by_itself = ledger.waiting != 0 or ledger.raised
        ledger.failure = text
        if not learns_by_itself:
            # Under the lock, so that a call which is about to return sees both or neither, and raises once.
            ledger.raised = True
            _raise_in_thread(ledger.thread, text)
    for name in ledger.transports:
        release(name)
        with contextlib.suppress(RuntimeError):  # the group may be gone already
            group = torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]
            if "nccl" in dist.get_backend_config(group):
                group.abort()


def _raise_in_thread(thread: int, text: str) -> None:
    # Only a class can be handed over; its instance is made in the other thread, without arguments.
    error = type("RanksDisagree", (RanksDisagree,), {"__init__": lambda self: RanksDisagree.__init__(self, text)})
    set_error = ctypes.pythonapi.PyThreadState_SetAsyncExc
    for target in (thread, threading.main_thread().ident):  # a thread of autograd's may have ended
        if target is not None and set_error(ctypes.c_ulong(target), ctypes.py_object(error)) == 1:
            return
