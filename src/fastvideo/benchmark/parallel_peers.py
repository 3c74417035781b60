"""Other libraries' shared attention on the same shards in the same run: yunchang's, and diffusers' context parallelism.

Only their public calls are used: `yunchang.LongContextAttention`, and `dispatch_attention_fn` of diffusers with a
`ContextParallelConfig`. What is missing, or refuses, is a row with its reason.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from importlib import metadata

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from fastvideo.benchmark.parallel_cases import ParallelCase
from fastvideo.benchmark.parallel_problem import Call, Problem

__all__ = ["make_peer_cases"]

_LAYOUTS = ("ulysses", "ring", "ulysses+ring")


def make_peer_cases(problem: Problem, layouts: Sequence[str] | None) -> list[ParallelCase]:
    """Return the peers' dense attention in the layouts that they have.

    Args:
        problem: What is shared.
        layouts: Names of layouts, those of `fastvideo.distributed.plan`; `None` for all.
    """
    cases = []
    for library, kernel_of, build in (
        ("diffusers", _diffusers_kernel, _build_diffusers),
        ("yunchang", _yunchang_kernel, _build_yunchang),
    ):
        for name, ring, ulysses in _sizes(problem.size):
            if layouts is None or name in layouts:
                mesh = f" {ring}x{ulysses}" if min(ring, ulysses) > 1 else ""
                kernel = kernel_of(problem, ring)
                cases.append(
                    ParallelCase(
                        name=f"{name}{mesh} {library} {_version(library)} [{kernel}]",
                        library=library,
                        backend=kernel,
                        layout=name,
                        ring=ring,
                        ulysses=ulysses,
                        build=_builder(build, problem, kernel, ring, ulysses),
                    )
                )
    return cases


def _sizes(size: int) -> list[tuple[str, int, int]]:
    """Return the layouts of `size` ranks that peers have."""
    mixed = [(_LAYOUTS[2], size // ulysses, ulysses) for ulysses in range(2, size) if size % ulysses == 0]
    return [(_LAYOUTS[0], 1, size), (_LAYOUTS[1], size, 1), *mixed]


def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _builder(
    build: Callable[[Problem, str, int, int], Call], problem: Problem, kernel: str, ring: int, ulysses: int
) -> Callable[[str], Call]:
    """Return what makes a peer's call, once for all passes: it may make process groups."""

    @functools.cache
    def checked() -> Call:
        if len(set(problem.lengths)) > 1 or problem.shape.num_heads % ulysses:
            raise ValueError(
                f"not asked: it takes equal shards and heads that divide, got shards of {problem.lengths} tokens and "
                f"{problem.shape.num_heads} heads over {ulysses}"
            )
        return build(problem, kernel, ring, ulysses)

    return lambda _name: checked()


def _diffusers_kernel(problem: Problem, ring: int) -> str:  # noqa: ARG001  # one kernel for every layout
    """cuDNN, the fastest of those that need no further package."""
    return "_native_cudnn" if problem.device.type == "cuda" else "native"


def _build_diffusers(problem: Problem, kernel: str, ring: int, ulysses: int) -> Call:
    models = importlib.import_module("diffusers.models")
    dispatch = importlib.import_module("diffusers.models.attention_dispatch")
    mesh = init_device_mesh(problem.device.type, (ring, ulysses), mesh_dim_names=("ring", "ulysses"))
    context = models.ContextParallelConfig(ring_degree=ring, ulysses_degree=ulysses, mesh=mesh)
    config = models.ParallelConfig(context_parallel_config=context)
    config.setup(problem.rank, problem.size, problem.device, mesh=mesh)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = dispatch.dispatch_attention_fn(
            query, key, value, backend=dispatch.AttentionBackendName(kernel), parallel_config=config
        )
        return out

    return call


def _yunchang_kernel(problem: Problem, ring: int) -> str:
    """FlashAttention where it is installed; else torch's kernels, of which only flash gives a ring its log-sum-exp."""
    for package, kernel in (("flash_attn_interface", "fa3"), ("flash_attn", "fa")):
        if importlib.util.find_spec(package) is not None:
            return kernel
    if ring > 1:
        return "torch_flash"
    return "torch_cudnn" if problem.device.type == "cuda" else "torch_math"


def _build_yunchang(problem: Problem, kernel: str, ring: int, ulysses: int) -> Call:
    from yunchang import LongContextAttention, set_seq_parallel_pg
    from yunchang.kernels import AttnType

    set_seq_parallel_pg(ulysses, ring, dist.get_rank(), problem.size)
    layer = LongContextAttention(ring_impl_type="basic", attn_type=AttnType.from_string(kernel))

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = layer(query, key, value, causal=False)
        return out

    return call
