"""Time, clock and memory of a call: medians of `triton.testing.do_bench` on CUDA, of wall time elsewhere."""

from __future__ import annotations

import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastvideo import __version__
from fastvideo.platforms.system import current_platform

__all__ = [
    "describe_run",
    "extra_peak_bytes",
    "host_ms",
    "kernel_ms",
    "live_bytes",
    "median_ms",
    "sm_clock_mhz",
    "synchronize",
]

_CPU_SECONDS = 0.3


def median_ms(call: Callable[[], object], device: torch.device, rep_ms: int = 100) -> float:
    """Median time of one call in milliseconds, after a warm-up; on CUDA with a cold L2 for each.

    Example:
        >>> median_ms(lambda: None, torch.device("cpu"), rep_ms=1) < 1.0
        True
    """
    if device.type == "cuda":
        from triton.testing import do_bench

        return float(do_bench(call, warmup=25, rep=rep_ms, return_mode="median"))
    call()
    times: list[float] = []
    until = time.perf_counter() + min(_CPU_SECONDS, rep_ms / 1000)
    while not times or time.perf_counter() < until:
        begin = time.perf_counter()
        call()
        times.append(1000 * (time.perf_counter() - begin))
    return statistics.median(times)


def host_ms(call: Callable[[], object], device: torch.device, num_calls: int = 4, repeats: int = 9) -> float:
    """Milliseconds of the host's thread that a call takes when calls follow each other and the device lags behind.

    The median of `repeats` runs of `num_calls` calls, none of which waits for the device.

    Example:
        >>> host_ms(lambda: None, torch.device("cpu")) < 1.0
        True
    """
    times: list[float] = []
    for _ in range(repeats):
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(num_calls):
            call()
        times.append(1000 * (time.perf_counter() - begin) / num_calls)
    synchronize(device)
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    """Wait for what a CUDA device was given; elsewhere calls have run when they return."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def kernel_ms(call: Callable[[], object], num_kernels: int = 8, repeats: int = 10) -> dict[str, float]:
    """Milliseconds a call spends in its slowest CUDA kernels, by name: means over `repeats` calls in a row."""
    for _ in range(repeats):
        call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(repeats):
            call()
        torch.cuda.synchronize()
    times = {event.key[:60]: event.device_time_total / 1e3 / repeats for event in profile.key_averages()}
    return dict(sorted(times.items(), key=lambda item: -item[1])[:num_kernels])


def sm_clock_mhz(call: Callable[[], object], device: torch.device) -> tuple[float, float] | None:
    """SM clock in MHz and power in W while `call` runs over and over; `None` where nvidia-smi can't tell."""
    if device.type != "cuda":
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    command = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "-i", uuid]
    for _ in range(3):
        call()
    try:
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
            while process.poll() is None:
                call()
                torch.cuda.synchronize(device)
            answer = process.stdout.read() if process.stdout else ""
        clock, power = (float(x) for x in answer.strip().split(","))
    except (OSError, ValueError):
        return None
    return clock, power


def live_bytes(device: torch.device) -> int | None:
    """Memory that tensors hold on a CUDA device; `None` elsewhere."""
    if device.type != "cuda":
        return None
    synchronize(device)
    return torch.cuda.memory_allocated(device)


def extra_peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Peak memory of one call beyond what was held before it.

    On CUDA that of tensors; on Linux without it the growth of the process, which memory kept for reuse makes smaller; else
    `None`.
    """
    if device.type == "cuda":
        before = live_bytes(device) or 0
        torch.cuda.reset_peak_memory_stats(device)
        result = call()
        torch.cuda.synchronize(device)
        del result
        return torch.cuda.max_memory_allocated(device) - before
    try:
        before = _status_bytes("VmRSS")
        # Peaks so far don't count.
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, IndexError):
        return None
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    return 1024 * int(Path("/proc/self/status").read_text().split(f"{field}:")[1].split()[0])


def describe_run(device: torch.device) -> dict[str, str]:
    """Device, versions and commit, to be kept with the numbers."""
    system = current_platform(device.type)
    found = {
        "device": system.device_name,
        "torch": torch.__version__,
        "python": platform.python_version(),
        **dict(system.packages),
        "commit": _commit(),
    }
    if device.type == "cuda":
        found["cuda"] = str(torch.version.cuda or torch.version.hip)
        found["driver"] = _driver()
    else:
        found["threads"] = str(torch.get_num_threads())
        found["machine"] = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return found


def _commit() -> str:
    """The commit of the sources, marked where they differ from it; else the version of the package."""
    try:
        git = ["git", "-C", str(Path(__file__).parent)]
        commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain", "--untracked-files=no"], capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return f"unknown (version {__version__})"
    return commit.stdout.strip() + (" with changes" if changed.stdout.strip() else "")


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i", "0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
