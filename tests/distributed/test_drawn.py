"""Combinations that Hypothesis draws, with any heads and any lengths, on gloo: the ranks equal one device."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from .parallel_cases import VALUES, Case, is_legal
from .test_parallel import run_ranks

ANY_HEADS = st.tuples(st.integers(1, 4), st.integers(1, 4)).map(lambda pair: (pair[0] * pair[1], pair[0]))


def any_case(size: int) -> st.SearchStrategy[Case]:
    """Cases for so many ranks, of which some may hold nothing."""
    fields = {name: st.sampled_from(values) for name, values in VALUES.items()}
    lengths = st.tuples(*[st.integers(0, 13)] * size).filter(any)
    return st.fixed_dictionaries(fields | {"heads": ANY_HEADS, "lengths": lengths}).filter(is_legal).map(lambda x: Case(**x))


@settings(max_examples=3, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(2, 4).flatmap(lambda size: st.tuples(st.just(size), st.lists(any_case(size), min_size=24, max_size=24))))
def test_drawn_combinations_equal_one_device(tmp_path_factory, drawn: tuple[int, list[Case]]) -> None:
    size, cases = drawn
    folder = tmp_path_factory.mktemp("drawn")
    Path(folder, "cases.json").write_text(json.dumps([asdict(case) for case in cases]))
    reports = run_ranks(size, "cpu", folder)
    wrong = [(rank, name, text) for rank, report in enumerate(reports) for name, text in report.items() if text != "equal"]
    assert not wrong, "\n".join(f"rank {rank}, {name}: {text}" for rank, name, text in wrong[:5])
    assert [report.keys() for report in reports] == [{str(case): None for case in cases}.keys()] * size
