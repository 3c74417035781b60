"""Run by test_agreement.py once per rank: what each rank is told when ranks make different calls.

Every case starts with a process group of its own and reports what happened as text.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.utils.checkpoint

from fastvideo.attention import DistributedAttention
from fastvideo.distributed import agreement, gather_sequence, shard_sequence
from fastvideo.distributed.agreement import RanksDisagree, agree, agree_on_backward
from fastvideo.distributed.mesh import SequenceGroup

RANK, SIZE, FOLDER = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
TIMEOUT = 60.0
functional = torch.ops._c10d_functional


def call(length: int, mode: str = "every", timeout: float = TIMEOUT, layer: str = "") -> float:
    """Agree on a shape, gather one number of each rank through gloo, and return their sum."""
    group = SequenceGroup.from_mesh(dist.group.WORLD)
    x = agree(torch.full((length,), RANK + 1.0), group, mode=mode, timeout=timeout, query=(1, length), layer=layer)
    return gathered(x, group.name).view(SIZE, length)[:, 0].sum().item()


def gathered(x: torch.Tensor, name: str) -> torch.Tensor:
    return functional.wait_tensor(functional.all_gather_into_tensor(x, SIZE, name))


def silent(length: int, timeout: float = TIMEOUT) -> None:
    """A call in mode "new" whose transport is a wait in Python until every rank has entered it."""
    group = SequenceGroup.from_mesh(dist.group.WORLD)
    agree(torch.zeros(1), group, mode="new", timeout=timeout, query=(1, length))
    enter()


def enter() -> None:
    """Stand for a transport: wait in Python until every rank has entered it."""
    store, number = dist.distributed_c10d._get_default_store(), ledger().count
    store.set(f"entered/{number}/{RANK}", "")
    while not store.check([f"entered/{number}/{rank}" for rank in range(SIZE)]):
        time.sleep(0.005)


def attend(x: torch.Tensor, name: str = "") -> torch.Tensor:
    return DistributedAttention(2, 8, prefix=name)(x, x, x)[0]


def leaf() -> torch.Tensor:
    return torch.full((1, 3, 2, 8), RANK + 1.0, requires_grad=True)


def ledger():
    return agreement._ledgers[tuple(range(SIZE))]


def constant_mismatch() -> str:
    call(4 + RANK)
    return "no error"


def lone_new_shape() -> str:
    sums = [call(4) for _ in range(3)]
    assert sums == [3.0] * 3
    call(4 + RANK)
    return "no error"


def other_order() -> str:
    for length in (4, 9, 4, 9):
        call(length)
    call(4 if RANK == 0 else 9)
    return "no error"


def other_layers() -> str:
    call(4, layer="blocks.0")
    call(4, layer=f"blocks.{RANK + 1}")
    return "no error"


def other_masks() -> str:
    mask = torch.zeros(1 + RANK, 1, 3, 6)
    DistributedAttention(2, 8)(*[torch.ones(2, 3, 2, 8)] * 3, attn_mask=mask)
    return "no error"


def late() -> str:
    time.sleep(0.4 * RANK)
    return str(call(4))


def absent() -> str:
    call(4)
    if RANK == 1:
        time.sleep(1.5)
    call(4, timeout=0.8)
    return "no error"


def again_after_error() -> str:
    try:
        call(4 + RANK)
    except RanksDisagree as first:
        try:
            call(4)
        except RanksDisagree as second:
            return f"same: {str(first) == str(second)}"
    return "no error"


class NoStore:
    """Refuses the thread that makes calls; the watchdog may see it as a store that is gone."""

    def __getattr__(self, name: str):
        if threading.current_thread() is threading.main_thread():
            raise AssertionError(f"a known call asked the store: {name}")
        raise RuntimeError("gone")


def known_calls_are_silent() -> str:
    for length in (4, 9, 4, 9):
        silent(length)
    store, ledger().store = ledger().store, NoStore()
    for length in (4, 9, 4):
        agree(torch.zeros(1), SequenceGroup.from_mesh(dist.group.WORLD), mode="new", query=(1, length))
    ledger().store = store
    x, group = torch.zeros(1), SequenceGroup.from_mesh(dist.group.WORLD)
    seconds = []
    for _ in range(10):  # the quickest hundred says what a call takes on a machine that has other work
        start = time.perf_counter()
        for length in (9, 4) * 50:
            agree(x, group, mode="new", query=(1, length))
        seconds.append(time.perf_counter() - start)
    return f"{min(seconds) * 1e4:.1f} µs"


def new_lone_shape() -> str:
    for _ in range(3):
        silent(4)
    silent(4 + RANK)
    return "no error"


def new_other_order() -> str:
    for length in (4, 4, 9, 4, 9, 9, 4):  # after 4 and after 9 both were seen to follow
        silent(length)
    entered = ledger().count
    try:
        silent(4 if RANK == 0 else 9)
    except RanksDisagree as error:
        return f"{error} [entered {ledger().count - entered}]"
    return "no error"


def new_behind() -> str:
    """Rank 0 is three known calls ahead when rank 1 deviates: hosts run ahead of a CUDA device."""
    for _ in range(2):
        silent(4)
    group = SequenceGroup.from_mesh(dist.group.WORLD)
    ahead = 3 if RANK == 0 else 0
    for _ in range(ahead):
        agree(torch.zeros(1), group, mode="new", timeout=TIMEOUT, query=(1, 4))
    silent(4 + 5 * RANK)
    return "no error"


def compiled() -> str:
    group = SequenceGroup.from_mesh(dist.group.WORLD)

    def doubled(x: torch.Tensor) -> torch.Tensor:
        x = agree(2 * x, group, timeout=TIMEOUT, query=tuple(x.shape))
        return gathered(x, group.name)

    run = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    for length in (4, 9, 4):
        assert run(torch.full((length,), RANK + 1.0)).view(SIZE, length)[:, 0].tolist() == [2.0, 4.0]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs == 2, graphs
    run(torch.ones(4 if RANK == 0 else 9))
    return "no error"


def opcheck() -> str:
    x = torch.randn(3)
    arguments = (x, [0, 1], "", "every", TIMEOUT, '[["query", "(3,)"]]')
    results = torch.library.opcheck(torch.ops.fastvideo.agree.default, arguments)
    results |= torch.library.opcheck(torch.ops.fastvideo.zeros_after.default, (x, [2, 0], torch.bfloat16, 1))
    return ", ".join(sorted(set(results.values())))


def compiled_blocks() -> str:
    """Equal blocks share a graph although their layers have names."""
    group = SequenceGroup.from_mesh(dist.group.WORLD)

    class Block(torch.nn.Module):
        def __init__(self, name: str) -> None:
            super().__init__()
            self.prefix = name

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return agree(x + 1, group, timeout=TIMEOUT, query=tuple(x.shape), layer=self.prefix)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    x = torch.zeros(2)
    for number in range(12):
        block = Block(f"blocks.{number}")
        block.compile(fullgraph=True, backend="aot_eager")
        x = block(x)
    return f"{x.tolist()} {torch._dynamo.utils.counters['stats']['unique_graphs']} graph {ledger().count} calls"


def gradient() -> str:
    """Runs after `compiled`, which has paid for the compiler."""
    group = SequenceGroup.from_mesh(dist.group.WORLD)
    run = torch.compile(lambda x: agree(x * 3, group, timeout=TIMEOUT) * x, fullgraph=True, backend="aot_eager")
    x = torch.tensor([2.0], requires_grad=True)
    run(x).sum().backward()
    return str(x.grad.item())


def no_backward() -> str:
    """Rank 1 leaves a backward pass out and goes on with the next step."""
    for step in range(4):
        loss = attend(leaf(), "blocks.0").sum()
        if step != 2 or RANK == 0:
            loss.backward()
    return "no error"


def no_gradient() -> str:
    with torch.set_grad_enabled(RANK == 0):
        attend(leaf(), "blocks.0").sum()
    return "no error"


def other_gradients() -> str:
    x, frozen = leaf(), leaf().detach()
    DistributedAttention(2, 8)(x, x, x if RANK == 0 else frozen)
    return "no error"


def other_order_of_backward() -> str:
    """The second of two calls comes first on rank 0; nothing but that tells them apart."""
    losses = [attend(leaf()).sum(), attend(leaf()).sum()]
    for loss in losses if RANK else reversed(losses):
        loss.backward()
    return "no error"


def other_order_of_layers() -> str:
    losses = [attend(leaf(), name).sum() for name in ("blocks.0", "blocks.1")]
    for loss in losses if RANK else reversed(losses):
        loss.backward()
    return "no error"


def compiled_no_backward() -> str:
    layer = DistributedAttention(2, 8)
    run = torch.compile(lambda x: layer(x, x, x)[0].sum(), fullgraph=True, backend="aot_eager")
    for step in range(4):
        loss = run(leaf())
        if step != 2 or RANK == 0:
            loss.backward()
    return "no error"


def checkpointed() -> str:
    """Recomputed forward passes are calls like any other, and every rank makes them."""
    layers = [DistributedAttention(2, 8, prefix=f"blocks.{number}") for number in range(2)]
    grads = []
    for is_reentrant in (None, True, False):
        x = first = leaf()
        for layer in layers:
            run = (
                (lambda x, layer=layer: layer(x, x, x)[0])
                if is_reentrant is None
                else functools.partial(
                    torch.utils.checkpoint.checkpoint, lambda x, layer=layer: layer(x, x, x)[0], use_reentrant=is_reentrant
                )
            )
            x = run(x)
        (x * x).sum().backward()
        grads.append(first.grad)
    same = all(torch.equal(grads[0], grad) for grad in grads[1:])
    return f"{same} {bool(grads[0].any())} {ledger().count} calls"


def training_step(*, skips: bool = False, enters: bool = True) -> None:
    """Three equal blocks without names, forward and backward, in mode "new"."""
    group, words = SequenceGroup.from_mesh(dist.group.WORLD), {"query": (1, 4), "pass": "forward"}
    x = torch.ones(1, requires_grad=True)
    for _ in range(3):
        x = agree(x, group, mode="new", timeout=TIMEOUT, **words) * 2
        if enters:
            enter()
            x.register_hook(lambda _: enter())
        x = agree_on_backward((x,), group, mode="new", timeout=TIMEOUT, **words)[0]
    if not skips:
        x.sum().backward()


def known_training_steps_are_silent() -> str:
    for _ in range(3):
        training_step()
    store, ledger().store = ledger().store, NoStore()
    start = time.perf_counter()
    for _ in range(100):
        training_step(enters=False)
    ledger().store = store
    return f"{(time.perf_counter() - start) * 1e6 / 600:.1f} µs"


def new_no_backward() -> str:
    for _ in range(3):
        training_step()
    training_step(skips=RANK == 1)
    training_step()
    return "no error"


def gather_other_lengths() -> str:
    gather_sequence(torch.ones(1, 4 + RANK, 3))
    return "no error"


def gather_other_dtype() -> str:
    gather_sequence(torch.ones(1, 4, 3, dtype=torch.float64 if RANK else torch.float32))
    return "no error"


def gather_other_dims() -> str:
    gather_sequence(torch.ones(1, 4, 3 + RANK), dim=-2)
    return "no error"


def gather_no_gradient() -> str:
    gather_sequence(torch.ones(1, 4, requires_grad=RANK == 0))
    return "no error"


def gather_no_backward() -> str:
    """Rank 1 goes on without the backward pass of its second call."""
    for step in range(3):
        loss = gather_sequence(torch.ones(1, 4, requires_grad=True)).sum()
        if step != 1 or RANK == 0:
            loss.backward()
    return "no error"


def shard_other_lengths() -> str:
    """Nothing is exchanged forward, and the backward pass would add tensors of unequal sizes."""
    shard_sequence(torch.ones(1, 4 + 2 * RANK, requires_grad=True))
    return "no error"


def shard_no_backward() -> str:
    x = torch.ones(1, 4, requires_grad=True)
    losses = [shard_sequence(x).sum() for _ in range(2)]
    losses[0].backward()
    if RANK == 0:
        losses[1].backward()
    gather_sequence(torch.ones(1, 2))
    return "no error"


def compiled_shards() -> str:
    """Cut and joined in one graph, forward and backward, at lengths that change; then rank 1 has another dtype."""

    def scaled(x: torch.Tensor) -> torch.Tensor:
        return gather_sequence((RANK + 1) * shard_sequence(x, 1), 1)

    torch._dynamo.reset()
    run = torch.compile(scaled, fullgraph=True, backend="aot_eager")
    for length in (4, 8, 6):
        x = torch.arange(2.0 * length).view(2, length).requires_grad_()
        out = run(x)
        factors = torch.tensor([1.0, 2.0]).repeat_interleave(length // 2)
        assert torch.equal(out, x * factors), (out, x)
        (out * out.detach() / SIZE).sum().backward()
        assert torch.equal(x.grad, x * factors**2), (x.grad, x)
    calls = ledger().count
    assert calls == 12, calls
    run(torch.ones(2, 4, dtype=torch.float64 if RANK else torch.float32))
    return "no error"


def in_threads(*functions: Callable[[], str]) -> list[str]:
    """Run functions at once, each on a thread of its own, and return what each said."""
    told = [""] * len(functions)

    def run_one(place: int) -> None:
        try:
            told[place] = functions[place]()
        except RanksDisagree as error:
            told[place] = str(error)

    threads = [threading.Thread(target=run_one, args=(place,)) for place in range(len(functions))]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    return told


def threads_take_turns() -> str:
    """Equal calls of four threads, the first of which open the ledger: each has a number of its own."""
    group, start = SequenceGroup.from_mesh(dist.group.WORLD), threading.Barrier(4)

    def calls() -> str:
        start.wait()
        numbers = []
        for _ in range(25):
            agree(torch.zeros(1), group, mode="every", timeout=5.0, query=(1, 4))
            numbers.append(ledger().own_number)
        return json.dumps(numbers)

    numbers = sorted(number for told in in_threads(*[calls] * 4) for number in json.loads(told))
    return f"{numbers == list(range(1, 101))} {ledger().count} calls"


def threads_have_backward_passes_of_their_own() -> str:
    """Rank 1's second thread makes its call before the first has named its own for the backward pass."""
    group, words = SequenceGroup.from_mesh(dist.group.WORLD), {"pass": "forward", "query": (1, 4)}
    x = torch.ones(1, requires_grad=True)
    here, there = threading.Event(), threading.Event()
    losses = {}

    def first() -> str:
        y = agree(2 * x, group, timeout=5.0, **words)
        here.set()
        assert RANK == 0 or there.wait(5)
        losses[0] = agree_on_backward((y,), group, timeout=5.0, **words)[0]
        here.set()
        return ""

    def second() -> str:
        assert here.wait(5)
        y = agree(3 * x, group, timeout=5.0, **words)
        there.set()
        losses[1] = agree_on_backward((y,), group, timeout=5.0, **words)[0]
        return ""

    assert in_threads(first, second) == ["", ""]
    for number in (1, 0):
        losses[number].sum().backward()
    return f"{x.grad.item()} {ledger().count} calls"


def threads_fail_together() -> str:
    """Rank 0's second thread waits for its turn while the first is told that rank 1 makes another call."""
    group = SequenceGroup.from_mesh(dist.group.WORLD)
    agree(torch.zeros(1), group, timeout=TIMEOUT, query=(1, 4))

    def other() -> str:
        time.sleep(0.2)
        return str(call(4))

    if RANK == 1:
        time.sleep(0.5)
        call(5)
    told = in_threads(lambda: str(call(4)), other)
    start = time.monotonic()
    while time.monotonic() - start < 0.6:  # nothing more comes from the watchdog
        sum(range(100))
    assert told[0] == told[1], told
    assert ledger().count == 1
    raise RanksDisagree(told[0])


class Verdict(dict):
    """Known calls, of which asking for one takes so long that a verdict comes."""

    def get(self, key, default=None):
        ledger().failure = "a verdict came"
        return super().get(key, default)


def verdict_during_a_known_call() -> str:
    for _ in range(3):
        silent(4)
    ledger()._successors = Verdict(ledger()._successors)
    silent(4)
    return "entered"


def on_nccl(length: int, timeout: float = TIMEOUT) -> float:
    """A call in mode "auto" whose transport is NCCL, with the device waited for."""
    group = SequenceGroup.from_mesh(dist.group.WORLD)
    x = torch.full((length,), RANK + 1.0, device=f"cuda:{RANK}")
    out = gathered(agree(x, group, timeout=timeout, query=(1, length)), group.name)
    torch.cuda.synchronize()
    return out.view(SIZE, length)[:, 0].sum().item()


def nccl_lone_new_shape() -> str:
    assert [on_nccl(4) for _ in range(5)] == [3.0] * 5
    on_nccl(4 + RANK)
    return "no error"


def nccl_killed() -> str:
    for _ in range(3):
        on_nccl(4, timeout=3.0)
    if RANK == 1:
        time.sleep(0.6)
        os.kill(os.getpid(), signal.SIGKILL)
    on_nccl(4, timeout=3.0)
    return "no error"


def killed() -> str:
    call(4)
    if RANK == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    call(4, timeout=1.5)
    return "no error"


def killed_while_others_are_inside() -> str:
    silent(4, timeout=1.5)
    silent(4, timeout=1.5)
    if RANK == 1:
        time.sleep(0.6)  # long enough to have shown a sign of life
        os.kill(os.getpid(), signal.SIGKILL)
    silent(4, timeout=1.5)
    return "no error"


def killed_in_the_exchange() -> str:
    call(4)
    time.sleep(0.6)
    group = SequenceGroup.from_mesh(dist.group.WORLD)
    agree(torch.zeros(1), group, timeout=TIMEOUT, query=(1, 4))
    if RANK == 1:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        gathered(torch.zeros(1), group.name)
    except RuntimeError as error:
        raise agreement.explain_transport_error(error, group.name) from error
    return "no error"


class Planted(BaseException):
    """Nothing catches it, so it ends the process."""


def failed_while_others_are_inside() -> str:
    for _ in range(3):
        silent(4)
    if RANK == 1:
        agree(torch.zeros(1), SequenceGroup.from_mesh(dist.group.WORLD), mode="new", timeout=TIMEOUT, query=(1, 4))
        raise Planted("on purpose")
    silent(4)
    return "no error"


def failed() -> str:
    call(4)
    if RANK == 1:
        raise SystemExit(3)
    call(4)
    return "no error"


def host_killed() -> str:
    call(4)
    if RANK == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)
    call(4)
    return "no error"


def host_killed_first() -> str:
    dist.barrier()
    time.sleep(0.3)
    if RANK == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3)
    call(4)
    return "no error"


TOGETHER = (
    constant_mismatch,
    lone_new_shape,
    other_order,
    other_layers,
    other_masks,
    late,
    absent,
    again_after_error,
    known_calls_are_silent,
    new_lone_shape,
    new_other_order,
    new_behind,
    compiled,
    compiled_blocks,
    gradient,
    opcheck,
    no_backward,
    no_gradient,
    other_gradients,
    other_order_of_backward,
    other_order_of_layers,
    compiled_no_backward,
    checkpointed,
    known_training_steps_are_silent,
    new_no_backward,
    gather_other_lengths,
    gather_other_dtype,
    gather_other_dims,
    gather_no_gradient,
    gather_no_backward,
    shard_other_lengths,
    shard_no_backward,
    compiled_shards,
    threads_take_turns,
    threads_have_backward_passes_of_their_own,
    threads_fail_together,
    verdict_during_a_known_call,
)


def run(case: Callable[[], str], store: dist.Store) -> dict[str, object]:
    store = dist.PrefixStore(case.__name__, store)
    on_cuda = case.__name__.startswith("nccl")
    if on_cuda:
        torch.cuda.set_device(RANK)
    dist.init_process_group(
        "nccl" if on_cuda else "gloo", store=store, rank=RANK, world_size=SIZE, timeout=timedelta(seconds=60)
    )
    start = time.monotonic()
    try:
        told = case()
    except RanksDisagree as error:
        told = str(error)
    except Exception:  # noqa: BLE001  # the report of one case must not hide the others
        told = traceback.format_exc()
    return {"told": told, "seconds": time.monotonic() - start}


def meet(port: int, host: str) -> dist.Store:
    """Return the store of the test's process, or of the rank `host`, which says in a file where it listens."""
    place = FOLDER / "port"
    if host == str(RANK):
        store = dist.TCPStore("127.0.0.1", 0, SIZE, is_master=True, wait_for_workers=False)
        (FOLDER / "port.new").write_text(str(store.port))
        (FOLDER / "port.new").rename(place)
        return store
    while port == 0 and not place.exists():
        time.sleep(0.01)
    return dist.TCPStore("127.0.0.1", port or int(place.read_text()), SIZE, timeout=timedelta(seconds=60))


def main(names: str, port: int, host: str) -> None:
    torch.set_num_threads(1)
    store = meet(port, host)
    cases = TOGETHER if names == "together" else (globals()[names],)
    for case in cases:
        report = run(case, store)
        (FOLDER / f"{case.__name__}.{RANK}.json").write_text(json.dumps(report))
        if len(cases) > 1:
            store.set(f"done/{case.__name__}/{RANK}", "")
            store.wait([f"done/{case.__name__}/{rank}" for rank in range(SIZE)])
            dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[4], int(sys.argv[5]), sys.argv[6])
