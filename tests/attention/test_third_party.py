"""A backend from another package is found by its entry point and can be chosen by its name everywhere."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

MODULE = '''
import torch
from fastvideo.attention import AttentionBackend, AttentionImpl, AttentionMetadata, AttentionMetadataBuilder


class MeanImpl(AttentionImpl):
    """Attends to every key alike."""

    def forward(self, query, key, value, attn_metadata):
        return value.mean(dim=1, keepdim=True).expand_as(query)


class MeanBuilder(AttentionMetadataBuilder):
    def prepare(self):
        pass

    def build(self, **kwargs):
        return AttentionMetadata(kwargs["current_timestep"])


class MeanBackend(AttentionBackend):
    @staticmethod
    def get_name():
        return "MEAN_ATTN"

    @staticmethod
    def get_impl_cls():
        return MeanImpl

    @staticmethod
    def get_metadata_cls():
        return AttentionMetadata

    @staticmethod
    def get_builder_cls():
        return MeanBuilder
'''

USE = """
import sys
import torch
import fastvideo.attention as fa
assert "mean_attention" not in sys.modules, "nothing is imported before the name is asked for"
q = torch.randn(2, 6, 4, 8)
expected = q.mean(dim=1, keepdim=True).expand_as(q)
def check(out):
    torch.testing.assert_close(out, expected)
check(fa.attention(q, q, q, backend="mean_attn"))
layer = fa.LocalAttention(4, 8, backend="MEAN_ATTN"); check(layer(q, q, q))
plain = fa.DistributedAttention(4, 8)
with fa.use_attn_backend("MEAN_ATTN"):
    check(plain(q, q, q)[0])
    assert fa.get_attn_backend(8, torch.float32).get_name() == "MEAN_ATTN"
only = fa.LocalAttention(4, 8, supported_attention_backends=("TORCH_SDPA", "MEAN_ATTN"), backend="MEAN_ATTN")
check(only(q, q, q))
import os
os.environ["FASTVIDEO_ATTENTION_BACKEND"] = "MEAN_ATTN"
check(fa.LocalAttention(4, 8)(q, q, q))
del os.environ["FASTVIDEO_ATTENTION_BACKEND"]
check(torch.compile(layer, fullgraph=True, backend="eager")(q, q, q))
report = fa.explain(heads=4, head_size=8, seq=6, device="cpu")
assert report.chosen == "TORCH_SDPA" and report.reasons("MEAN_ATTN") == ()
try:
    fa.attention(q, q, q, backend="MEAN_ATTN", is_causal=False, dropout_p=0.5)
except fa.BackendUnavailable as error:
    assert "dropout" in str(error)
else:
    raise SystemExit("dropout was dropped in silence")
print("ok")
"""


def build_wheel(folder: Path) -> Path:
    """Write a wheel by hand: building one would need a build backend from the network."""
    wheel = folder / "mean_attention-1.0-py3-none-any.whl"
    info = "mean_attention-1.0.dist-info"
    files = {
        "mean_attention.py": MODULE,
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: mean-attention\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[fastvideo.attention_backends]\nMEAN_ATTN = mean_attention:MeanBackend\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return wheel


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("third_party")
    target = folder / "site"
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(target)]
    subprocess.run([*command, str(build_wheel(folder))], check=True, timeout=120)
    return target


def test_an_installed_package_adds_a_backend(site: Path) -> None:
    paths = [str(site), str(Path(__file__).parents[2] / "src")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    result = subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, env=environment, timeout=180)
    assert result.stdout.strip() == "ok", result.stderr
