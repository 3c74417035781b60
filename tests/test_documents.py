"""Every Python example in the documents runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = [
    pytest.param(code, id=f"{path.name}-{number}")
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")))
    for number, code in enumerate(re.findall(r"^```python\n(.*?)^```", path.read_text(), re.MULTILINE | re.DOTALL))
]


@pytest.mark.parametrize("code", EXAMPLES)
def test_example_runs(code: str) -> None:
    exec(compile(code, "example", "exec"), {"__name__": "example"})


def test_files_that_tests_name_exist() -> None:
    files = sorted((ROOT / "tests").rglob("*.py"))
    named = {(path.name, name) for path in files for name in re.findall(r"`(\w+\.py)`", path.read_text())}
    assert named
    known = {path.name for folder in ("tests", "src", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")}
    assert {(path, name) for path, name in named if name not in known} == set()
