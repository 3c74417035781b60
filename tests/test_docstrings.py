"""Every example in a docstring runs and shows what it says."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import fastvideo

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(fastvideo.__path__, "fastvideo.")
    if not module.name.endswith("__main__") and ".impl.triton" not in module.name  # that one needs triton's interpreter
)


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    module = importlib.import_module(name)
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS)
    for example in finder.find(module, name, globs={**vars(module), "torch": torch}):
        if example.lineno is not None and example.examples:
            torch.manual_seed(0)
            runner.run(example)
    assert runner.failures == 0
