"""Every kernel of the package is compiled for Hopper by a test, with the oldest and the newest Triton."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

from ..distributed import test_merge, test_row_kernels
from . import test_triton, test_video_kernels
from .hopper_compiler import launched_kernels
from .impl import test_hopper_compile

ROOT = Path(__file__).parents[2]


def test_every_kernel_is_compiled_by_a_test() -> None:
    modules = (test_triton, test_video_kernels, test_hopper_compile, test_merge, test_row_kernels)
    compiled = set().union(*[module.COMPILED for module in modules])
    kernels = launched_kernels()
    assert len(kernels) >= 25
    assert kernels - compiled == set()
    assert compiled - kernels == set()


def test_ci_compiles_with_the_oldest_triton_too() -> None:
    oldest = re.search(r"^triton = \[\"triton>=(3\.\d+)\"\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE).group(1)
    assert re.search(r"^make compile$", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    # What a make that runs these tests has put into the environment would change what this one prints.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    recipe = subprocess.run(
        ["make", "--dry-run", "--always-make", "compile"],
        cwd=ROOT, capture_output=True, text=True, check=True, env=environment,
    ).stdout  # fmt: skip
    install = next(line for line in recipe.splitlines() if "--target" in line)
    folder = re.search(rf"--target (\S+) triton=={oldest}\.0$", install).group(1)
    (run,) = [line for line in recipe.splitlines() if "pytest" in line]
    assert f"PYTHONPATH=src:{folder} " in run
    for tests in (test_triton, test_video_kernels, test_hopper_compile, test_merge, test_row_kernels):
        assert str(Path(tests.__file__).relative_to(ROOT)) in run
