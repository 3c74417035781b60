"""Imports run downward only, importing the package stays light, and the environment has one reader."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "fastvideo"

# Higher rows may import lower rows, never the other way round. The longest prefix decides where a module belongs.
TABLE = (SOURCE.parents[1] / "docs" / "architecture.md").read_text().partition("| floor | what |")[2].partition("\n\n")[0]
FLOORS = [
    [f"fastvideo.{name}" for name in re.findall(r"`(.*?)`", row.split(" | ")[0])] for row in TABLE.splitlines() if "`" in row
]
ANYWHERE = ("fastvideo", "fastvideo.testing")


def floor(module: str) -> int | None:
    """Return the row of a module, counted from below, or `None` where it isn't ruled."""
    best, row = "", None
    for number, prefixes in enumerate(reversed(FLOORS)):
        for prefix in prefixes:
            inside = module == prefix or (module.startswith(f"{prefix}.") and prefix != "fastvideo.attention")
            if inside and len(prefix) > len(best):
                best, row = prefix, number
    return row


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_at_run_time(tree: ast.Module) -> set[str]:
    found = set()
    typing_only = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fastvideo"):
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("fastvideo")}
    known = {module_name(path) for path in SOURCE.rglob("*.py")}
    return found & known


def test_floors_are_of_modules_that_exist() -> None:
    ruled = [name for row in FLOORS for name in row]
    assert len(FLOORS) > 10
    assert len(ruled) == len(set(ruled))
    assert set(ruled) <= {module_name(path) for path in SOURCE.rglob("*.py")}


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=module_name)
def test_imports_run_downward(path: Path) -> None:
    importer = module_name(path)
    own = floor(importer)
    if own is None:
        assert importer in ANYWHERE or importer.startswith("fastvideo.testing"), f"{importer} has no row in FLOORS"
        return
    for imported in imports_at_run_time(ast.parse(path.read_text())):
        below = floor(imported)
        if below is None or (importer, imported) == ("fastvideo.forward_context", "fastvideo.attention.backends.abstract"):
            continue  # that one is a type check inside a function; the file says so
        assert below <= own, f"{importer} imports {imported}, which stands above it"


@pytest.mark.parametrize("path", sorted((SOURCE / "attention" / "backends").rglob("*.py")), ids=module_name)
def test_a_backend_imports_no_other_backend(path: Path) -> None:
    own = ".".join(module_name(path).split(".")[:4])
    imported = imports_at_run_time(ast.parse(path.read_text()))
    others = {name for name in imported if name.startswith("fastvideo.attention.backends.") and not name.startswith(own)}
    assert others <= {f"fastvideo.attention.backends.{name}" for name in ("abstract", "dense", "sparse")}


def test_only_settings_reads_the_environment() -> None:
    readers = {
        module_name(path)
        for path in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv")
    }
    assert readers == {"fastvideo.settings"}


def test_files_stay_short() -> None:
    lengths = {module_name(path): len(path.read_text().splitlines()) for path in SOURCE.rglob("*.py")}
    assert {name: length for name, length in lengths.items() if length > 500} == {}


def run_fresh(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_import_is_light_and_changes_nothing() -> None:
    code = """
import sys, threading, torch
before = set(sys.modules)
threads, default = torch.get_num_threads(), torch.get_default_dtype()
flash = torch.backends.cuda.flash_sdp_enabled()
import fastvideo.attention
heavy = {"triton", "diffusers", "transformers", "flash_attn", "cudnn", "sageattention", "PIL", "av", "matplotlib"}
new = {name.partition(".")[0] for name in set(sys.modules) - before}
print(sorted(new & heavy))
assert not torch.cuda.is_initialized() and torch.get_num_threads() == threads
assert torch.get_default_dtype() == default and torch.backends.cuda.flash_sdp_enabled() == flash
assert threading.active_count() == 1
"""
    assert run_fresh(code).strip() == "[]"


def test_optional_packages_may_be_missing() -> None:
    code = """
import sys
for name in ("triton", "flash_attn", "flash_attn_interface", "cudnn", "diffusers", "PIL", "av", "safetensors", "tqdm"):
    sys.modules[name] = None
import torch
from fastvideo.attention import LocalAttention, explain
q = torch.randn(1, 8, 2, 16)
assert LocalAttention(2, 16)(q, q, q).shape == q.shape
report = explain(heads=2, head_size=16, seq=8, system="H200, torch only")
print(report.chosen, any("pip install" in reason for reason in report.reasons("FLASH_ATTN")))
"""
    assert run_fresh(code).strip() == "TORCH_SDPA True"
