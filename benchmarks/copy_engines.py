"""Times what a copy engine moves between CUDA devices, and what it takes from attention beside it, against NCCL.

    torchrun --nproc-per-node 2 benchmarks/copy_engines.py

Prints, on rank 0: bytes per second of reading a peer's memory and of writing it, whole and by rows, and of writing to all
peers, one after another and at once; a round of words between two devices; and torch's attention (10 heads of 128, 37,800
tokens, bf16) alone, beside eight copies of 97 MiB, and beside as many bytes by NCCL.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric

from fastvideo.distributed.driver import open_driver

MIB = 1 << 20
SIZE = 512 * MIB
WORDS = SIZE - MIB


def milliseconds(work: Callable[[], object], repetitions: int = 10) -> float:
    """Time `work` on this rank, all ranks at once, after three calls that aren't timed."""
    for _ in range(3):
        work()
    torch.cuda.synchronize()
    dist.barrier()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(repetitions):
        work()
    end.record()
    torch.cuda.synchronize()
    dist.barrier()
    return begin.elapsed_time(end) / repetitions


def main() -> None:
    """Measure and print."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    own = symmetric.empty(SIZE, dtype=torch.uint8, device=device)
    own.zero_()
    torch.cuda.synchronize()
    handle_of = symmetric.rendezvous(own, dist.group.WORLD.group_name)
    peer = (rank + 1) % size
    remote = handle_of.get_buffer(peer, (SIZE,), torch.uint8)
    here = torch.empty(SIZE, dtype=torch.uint8, device=device)
    driver = open_driver()
    if driver is None:
        raise RuntimeError("expected CUDA's driver, libcuda.so.1, found none")
    copies = torch.cuda.Stream(priority=-1)
    streams = [torch.cuda.Stream(priority=-1) for _ in range(size - 1)]
    peers = [(rank + distance) % size for distance in range(1, size)]
    count = 0

    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    def stream() -> int:
        return torch.cuda.current_stream().cuda_stream

    def by_rows(width: int) -> None:
        driver.copy_rows(here.data_ptr(), width, remote.data_ptr(), 10_240, width, 37_800, stream())

    def rows_to(to: int, width: int, handle: int) -> None:
        driver.copy_rows(handle_of.buffer_ptrs[to], width, here.data_ptr(), 10_240, width, 37_800, handle)

    def rows_to_all(width: int, is_at_once: bool) -> None:
        main_stream = torch.cuda.current_stream()
        for to, beside in zip(peers, streams, strict=True):
            if is_at_once:
                beside.wait_stream(main_stream)
            rows_to(to, width, beside.cuda_stream if is_at_once else main_stream.cuda_stream)
        for beside in streams if is_at_once else ():
            main_stream.wait_stream(beside)

    def exchange_words() -> None:
        nonlocal count
        count += 1
        driver.write(stream(), handle_of.buffer_ptrs[peer] + WORDS + 4 * rank, count)
        driver.wait(stream(), handle_of.buffer_ptrs[rank] + WORDS + 4 * ((rank - 1) % size), count)

    def read(num_bytes: int) -> None:
        here[:num_bytes].copy_(remote[:num_bytes])

    def write(num_bytes: int) -> None:
        remote[:num_bytes].copy_(here[:num_bytes])

    def swap(num_bytes: int) -> None:
        dist.all_to_all_single(own[:num_bytes], here[:num_bytes])

    for mib in (8, 97, 387):
        ms = milliseconds(lambda mib=mib: read(mib * MIB))  # type: ignore[misc]
        say(f"read {mib} MiB of a peer: {ms:.3f} ms, {mib * MIB / ms / 1e6:.0f} GB/s")
        ms = milliseconds(lambda mib=mib: write(mib * MIB))  # type: ignore[misc]
        say(f"write {mib} MiB to a peer: {ms:.3f} ms, {mib * MIB / ms / 1e6:.0f} GB/s")
    for width in (256, 512, 1280, 2560, 5120):
        ms = milliseconds(lambda width=width: by_rows(width))  # type: ignore[misc]
        say(f"read 37,800 rows of {width} bytes: {ms:.3f} ms, {width * 37_800 / ms / 1e6:.0f} GB/s")
        for is_at_once in (False, True):
            ms = milliseconds(lambda width=width, at_once=is_at_once: rows_to_all(width, at_once))  # type: ignore[misc]
            how = "at once" if is_at_once else "one after another"
            say(f"write them to {size - 1} peers, {how}: {ms:.3f} ms, {(size - 1) * width * 37_800 / ms / 1e6:.0f} GB/s")
    say(f"a word to a peer and one from it: {milliseconds(exchange_words, 50) * 1e3:.1f} us")
    q = torch.randn(1, 10, 37_800, 128, device=device, dtype=torch.bfloat16)

    def attend() -> None:
        torch.nn.functional.scaled_dot_product_attention(q, q, q)

    def beside(transfer: Callable[[], None]) -> None:
        main_stream = torch.cuda.current_stream()
        copies.wait_stream(main_stream)
        with torch.cuda.stream(copies):
            for _ in range(8):
                transfer()
        attend()
        main_stream.wait_stream(copies)

    say(f"attention alone: {milliseconds(attend, 4):.2f} ms")
    say(f"beside 8 copies of 97 MiB: {milliseconds(lambda: beside(lambda: read(97 * MIB)), 4):.2f} ms")
    say(f"beside 8 NCCL exchanges of 97 MiB a way: {milliseconds(lambda: beside(lambda: swap(size * 97 * MIB)), 4):.2f} ms")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
