"""Run by test_parallel.py once per rank: models whose tokens two ranks share, against the same models on one.

Each rank makes the same model and inputs from one seed, so it can compute one device's numbers itself.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

sys.path.insert(0, str(Path(__file__).parent))
from tiny_models import NAMES, SPARSE, call, call_with_gradients, convert, in_float64, make

from fastvideo.integrations.diffusers import (
    AttentionPolicy,
    Gather,
    ParallelPlan,
    Rule,
    Split,
    apply,
    denoising_step,
    remove,
)
from fastvideo.integrations.diffusers.wan import WanFamily
from fastvideo.testing import assert_within_budget

VSA = AttentionPolicy(rules=[Rule(role="self", backend="VIDEO_SPARSE_ATTN", sparsity=0.5)])


def average(numbers: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Average gradients over the ranks, as data parallelism does; outputs stay each rank's own."""
    for name, tensor in numbers.items():
        if name != "output":
            dist.all_reduce(tensor)
            tensor /= dist.get_world_size()
    return numbers


def family(name: str, mesh: Any) -> None:
    model, inputs = make(name)
    alone = call_with_gradients(model, inputs)
    exact = call_with_gradients(in_float64(model), convert(inputs, torch.float64))
    apply(model, parallel=mesh)
    shared = average(call_with_gradients(model, inputs))
    for key, tensor in shared.items():
        assert_within_budget(tensor, exact[key], alone[key], name=f"dense: {key}")
    if name not in SPARSE:
        return
    apply(model, VSA)
    alone = call_with_gradients(model, inputs)
    apply(model, VSA, parallel=mesh)
    shared = average(call_with_gradients(model, inputs))
    for key, tensor in shared.items():
        scale = float(alone[key].abs().max())
        assert torch.allclose(tensor, alone[key], atol=2e-5 * scale), f"VSA: {key} {(tensor - alone[key]).abs().max() / scale}"
    assert not torch.allclose(shared["output"], exact["output"].float(), atol=1e-3), "VSA changed nothing"
    remove(model)
    assert torch.allclose(call(model, inputs), exact["output"].float(), atol=1e-4)


def recomputed_and_compiled(mesh: Any) -> None:
    model, inputs = make("wan")
    later = AttentionPolicy(rules=[Rule(role="self", steps="1-", backend="VIDEO_SPARSE_ATTN", sparsity=0.5)])
    apply(model, later, parallel=mesh)

    def two_steps() -> list[torch.Tensor]:
        model.zero_grad()
        outputs = []
        for step in (0, 1):
            with denoising_step(step):
                outputs.append(call(model, inputs))
        sum(output.square().sum() for output in outputs).backward()
        return [*(output.detach() for output in outputs), model.blocks[0].attn1.to_q.weight.grad.clone()]

    expected = two_steps()
    model.train()
    model.enable_gradient_checkpointing()
    for found, wanted in zip(two_steps(), expected, strict=True):
        assert torch.allclose(found, wanted, atol=1e-5, rtol=1e-4)
    model.disable_gradient_checkpointing()
    model.eval()
    model.compile_repeated_blocks(backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        for step in (0, 1):
            with denoising_step(step):
                assert torch.allclose(call(model, inputs), expected[step], atol=1e-5)


def uneven(mesh: Any) -> None:
    for name, shape in (
        ("wan", (2, 4, 3, 6, 10)),
        ("hunyuan", (2, 4, 3, 6, 10)),
        ("wan", (2, 4, 1, 2, 4)),
        ("wan animate", (2, 12, 5, 6, 10)),
    ):
        model, inputs = make(name)
        inputs["hidden_states"] = torch.randn(shape)  # 45 tokens, 2, and 75, the device border within the third of five frames
        if name == "wan animate":
            inputs["pose_hidden_states"] = torch.randn(2, 4, 4, 6, 10)
        for policy in (AttentionPolicy(), VSA):
            apply(model, policy)
            alone = call_with_gradients(model, inputs)
            apply(model, policy, parallel=mesh)
            for key, tensor in average(call_with_gradients(model, inputs)).items():
                scale = float(alone[key].abs().max())
                assert torch.allclose(tensor, alone[key], atol=2e-5 * scale), f"{name} {shape} {key}"


def other_layouts(_mesh: Any) -> None:
    ring = init_device_mesh("cpu", (2, 1), mesh_dim_names=("ring", "ulysses"))
    for name in ("wan", "hunyuan"):
        model, inputs = make(name)
        alone = call_with_gradients(model, inputs)
        for layout in ("ring", "gather"):
            apply(model, parallel=ParallelPlan(ring, layout=layout))
            for key, tensor in average(call_with_gradients(model, inputs)).items():
                scale = float(alone[key].abs().max())
                assert torch.allclose(tensor, alone[key], atol=2e-5 * scale), f"{name} {layout} {key}"
    with pytest.raises(ValueError, match="layout"):
        apply(model, parallel=ParallelPlan(ring, layout="square"))
    wrong = {"": {"hidden_states": Split(1, of_output=True)}}
    with pytest.raises(ValueError, match="name the module that makes it"):
        apply(model, parallel=ParallelPlan(ring, shards=wrong))
    with pytest.raises(AttributeError, match="nowhere"):
        apply(model, parallel=ParallelPlan(ring, shards={"nowhere": Gather(1)}))
    # Refused calls have changed nothing.
    assert torch.allclose(call(model, inputs), alone["output"], atol=1e-5)
    model, inputs = make("wan")
    expected = call(model, inputs)
    shards = WanFamily().shard_plan(model)
    earlier = {**{path: entry for path, entry in shards.items() if path != "proj_out"}, "norm_out": Gather(1)}
    apply(model, parallel=ParallelPlan(ring, shards=earlier))
    assert torch.allclose(call(model, inputs), expected, atol=1e-5)
    apply(model, parallel=ParallelPlan(ring, shards={path: entry for path, entry in shards.items() if path != "rope"}))
    with pytest.raises(RuntimeError, match="size of tensor"):  # the plan is followed: positions are left whole
        call(model, inputs)


def refusals(mesh: Any) -> None:
    model, inputs = make("wan")
    apply(model, parallel=mesh)
    with pytest.raises(ValueError, match="has 1 tokens, fewer than the 2 devices"):
        call(model, {**inputs, "hidden_states": torch.randn(2, 4, 1, 2, 2)})
    model.compile_repeated_blocks(backend="eager")
    with pytest.raises(ValueError, match="apply first, then compile"):
        apply(model, parallel=mesh)
    model, inputs = make("hunyuan")
    expected = call(model, inputs)
    apply(model)  # the default process group isn't taken for a mesh
    assert torch.allclose(call(model, inputs), expected, atol=1e-5)
    model, inputs = make("cogvideox")
    apply(model, VSA, parallel=mesh)
    with pytest.raises(RuntimeError, match="mask"):
        call(model, {**inputs, "attention_kwargs": {"attention_mask": torch.zeros(2, 1, 127)}})
    apply(model, parallel=mesh)
    with pytest.raises((RuntimeError, ValueError), match=r"126|shape"):
        call(model, {**inputs, "attention_kwargs": {"attention_mask": torch.zeros(2, 126, 126)}})


def masks(mesh: Any) -> None:
    """Masks over all tokens: per key, and per query and key; bool and additive; even and uneven shards; every layout."""
    ring = init_device_mesh("cpu", (2, 1), mesh_dim_names=("ring", "ulysses"))
    sharings = (mesh, ParallelPlan(ring, layout="ring"), ParallelPlan(ring, layout="gather"))
    for name, num_video, kwargs in (("cogvideox", 120, "attention_kwargs"), ("flux", 60, "joint_attention_kwargs")):
        model, inputs = make(name)
        total = num_video + 7
        allowed = torch.rand(2, total, total) < 0.7
        allowed[..., 0] = True
        bias = torch.randn(2, total, total).masked_fill(~allowed, float("-inf"))
        variants = {"bias": bias, "bias per key": bias[:, :1]}
        if name == "flux":
            variants = {"bias": bias[:, None], "full": allowed[:, None], "keys": allowed[:, None, :1], "padding": allowed[:, 0]}
        for what, mask in variants.items():
            masked = {**inputs, kwargs: {"attention_mask": mask}}
            remove(model)
            alone = call_with_gradients(model, masked)
            for sharing in sharings:
                apply(model, parallel=sharing)
                for key, tensor in average(call_with_gradients(model, masked)).items():
                    scale = float(alone[key].abs().max())
                    assert torch.allclose(tensor, alone[key], atol=2e-5 * scale), f"{name} {what} {sharing} {key}"
        assert not torch.allclose(call(model, inputs), alone["output"], atol=1e-3), "the mask changed nothing"


def run(check: Callable[..., None], *args: Any) -> str:
    try:
        check(*args)
    except (Exception, pytest.fail.Exception):  # noqa: BLE001  # whatever a case raises is its report
        return traceback.format_exc()
    return "equal"


def main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    diffusers.utils.logging.set_verbosity_error()
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=90))
    mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("ulysses",))
    report = {name: run(family, name, mesh) for name in NAMES}
    report["recomputed and compiled"] = run(recomputed_and_compiled, mesh)
    report["uneven shards"] = run(uneven, mesh)
    report["other layouts"] = run(other_layouts, mesh)
    report["masks"] = run(masks, mesh)
    report["refusals"] = run(refusals, mesh)
    (folder / f"{rank}.json").write_text(json.dumps(report))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
