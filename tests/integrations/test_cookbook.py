"""The cookbook's pages whose examples can't stand alone run as they are written: from top to bottom, and on two ranks.

Their examples are fenced as `py`, because they can't stand alone as those fenced as `python` do (tests/test_documents.py).
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch._inductor.config as inductor_config

from fastvideo.attention import DistributedAttention_VSA
from fastvideo.attention.backends.video_sparse_attn import VideoSparseAttentionMetadataBuilder
from fastvideo.forward_context import set_forward_context
from fastvideo.integrations.diffusers import plan_of
from fastvideo.testing import meeting_point

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "cookbook"


def examples(page: str) -> list[str]:
    return re.findall(r"^```py\n(.*?)^```", (PAGES / page).read_text(), re.MULTILINE | re.DOTALL)


def test_the_example_on_the_first_page_runs() -> None:
    """README's pipeline is that of the page on diffusers."""
    namespace = {"__name__": "example"}
    exec(compile(examples("diffusers.md")[0], "pipeline", "exec"), namespace)
    (example,) = examples(str(ROOT / "README.md"))
    exec(compile(example, "README", "exec"), namespace)
    assert plan_of(namespace["transformer"]).boundaries == (5,)


def test_the_page_on_diffusers_runs_from_top_to_bottom(capsys, monkeypatch) -> None:
    torch._dynamo.reset()
    fusion = inductor_config.triton.mix_order_reduction
    monkeypatch.setattr(inductor_config.triton, "mix_order_reduction", fusion)  # put back what the page changes
    namespace = {"__name__": "example"}
    shown = ""
    for number, code in enumerate(examples("diffusers.md")):
        if "from transformers import" in code:
            pytest.importorskip("transformers", reason='needs transformers: pip install "transformers>=5"')
        exec(compile(code, f"example {number}", "exec"), namespace)
        shown += capsys.readouterr().out
    printed = re.findall(
        r"^prints[^\n]*\n\n```text\n(.*?)\n```", (PAGES / "diffusers.md").read_text(), re.MULTILINE | re.DOTALL
    )
    assert len(printed) == 2
    for text in printed:
        assert text in shown


def test_the_page_on_several_gpus_runs_on_two_ranks(tmp_path) -> None:
    generate, train = examples("several-gpus.md")
    script = tmp_path / "generate.py"
    with meeting_point() as first, meeting_point() as second:
        # One program after the other in one process, because importing diffusers takes longer than both.
        script.write_text(f"{generate}\nimport os\nos.environ |= {second}\n{train}")
        shared = {**os.environ, **first, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
        ranks = [
            subprocess.Popen(
                [sys.executable, str(script)], env={**shared, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True
            )
            for rank in range(2)
        ]
        try:
            outputs = [rank.communicate(timeout=180)[0] for rank in ranks]
        finally:
            [rank.kill() for rank in ranks]
    for rank, output in enumerate(outputs):
        assert output.count(f"rank {rank} of 2: equal") == 2


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ],
)
def test_the_page_on_cuda_graphs_runs(device: str, monkeypatch) -> None:
    """On CUDA as it is written; on a CPU in small, with a graph that runs what it has captured again."""
    (code,) = examples("cuda-graphs.md")
    sizes = {"cuda": (32_760, 12, 128, (21, 30, 52)), "cpu": (96, 2, 16, (3, 4, 8))}
    num_tokens, num_heads, head_size, grid_tyx = sizes[device]
    if device == "cpu":
        shape = f"torch.empty(1, {num_tokens}, {num_heads}, {head_size}, dtype=torch.float32, device='cpu')"
        code, count = re.subn(r"torch\.empty\(1, 32_760, 12, 128, [^)]*\)", shape, code)
        (captured,) = re.findall(r"^    with torch\.cuda\.graph\(graph\):\n +(.*)$", code, re.MULTILINE)
        assert count == 1
        again = f"with torch.no_grad(), set_forward_context(current_timestep=0, attn_metadata=metadata):\n    {captured}"

        class Graph:
            def replay(self) -> None:
                exec(again, namespace)

        monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        monkeypatch.setattr(torch.cuda, "graph", lambda _: contextlib.nullcontext())
    torch.manual_seed(0)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v, gate = (torch.randn(1, num_tokens, num_heads, head_size, dtype=dtype, device=device) for _ in range(4))
    layer = DistributedAttention_VSA(num_heads, head_size)
    metadata = VideoSparseAttentionMetadataBuilder().build(
        current_timestep=0, raw_latent_shape=grid_tyx, patch_size=(1, 1, 1), VSA_sparsity=0.5, device=device
    )
    namespace = {
        "__name__": "example", "torch": torch, "set_forward_context": set_forward_context, "layer": layer,
        "metadata": metadata, "q": q, "k": k, "v": v, "gate": gate,
    }  # fmt: skip
    exec(compile(code, "cuda-graphs.md", "exec"), namespace)
    with torch.no_grad(), set_forward_context(current_timestep=0, attn_metadata=metadata):
        expected, _ = layer(q, k, v, gate_compress=gate)
    assert torch.equal(namespace["out"], expected)
    assert expected.float().std() > 0.01


def test_every_example_has_a_test() -> None:
    pages = {path.name for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md")) if examples(str(path))}
    assert pages == {"README.md", "diffusers.md", "several-gpus.md", "cuda-graphs.md"}
    assert [len(examples(page)) for page in ("several-gpus.md", "cuda-graphs.md")] == [2, 1]
    languages = {fence for path in PAGES.glob("*.md") for fence in re.findall(r"^```(\w+)$", path.read_text(), re.MULTILINE)}
    assert languages <= {"py", "python", "text", "toml"}  # commands stand in fences of no language
