"""The budget accepts what a dtype does anyway, and nothing else."""

from __future__ import annotations

import pytest
import torch

from fastvideo.testing import assert_op_within_budget, assert_within_budget

EXACT = torch.linspace(1.0, 2.0, 64, dtype=torch.float64)


def test_rounding_is_accepted() -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert_within_budget(EXACT.to(dtype), EXACT, EXACT.to(dtype))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x.index_fill(0, torch.tensor([7]), 1.5), r"max error .* worst at \[7\]: 1.5 instead of 1.1"),
        (lambda x: x * 1.01, "max error"),
        (lambda x: x + 0.0175, "mean error"),
        (lambda x: x.index_fill(0, torch.tensor([3]), torch.nan), r"1 of 64 wrong infinities or NaN, at \[3\]"),
        (lambda x: x.index_fill(0, torch.tensor([3]), -torch.inf), "wrong infinities or NaN"),
        (lambda x: x[:1], "shapes differ"),
        (lambda x: x.float(), "dtype is torch.float32"),
    ],
)
def test_what_exceeds_it_is_named(spoil, message: str) -> None:
    eager = EXACT.bfloat16()
    with pytest.raises(AssertionError, match=message):
        assert_within_budget(spoil(eager), EXACT, eager)


def test_infinities_have_to_agree() -> None:
    expected = torch.tensor([-torch.inf, 1.0], dtype=torch.float64)
    assert_within_budget(expected.float(), expected, expected.float())
    for wrong in (torch.inf, -1e30, torch.nan):
        with pytest.raises(AssertionError, match="wrong infinities"):
            assert_within_budget(torch.tensor([wrong, 1.0]), expected, expected.float())


def test_an_op_is_checked_with_its_gradients() -> None:
    inputs = {"x": EXACT.float(), "y": EXACT.flip(0).float()}
    assert_op_within_budget(lambda x, y: x * y, lambda x, y: x * y, inputs)
    with pytest.raises(AssertionError, match="gradient of y"):
        assert_op_within_budget(lambda x, y: x * y.detach() + 1e-3 * (y - y.detach()), lambda x, y: x * y, inputs)
    with pytest.raises(AssertionError, match="no gradient reaches y"):
        assert_op_within_budget(lambda x, y: x * y.detach(), lambda x, y: x * y, inputs)


def test_rounding_where_the_reference_is_zero_needs_a_size() -> None:
    zero, rounding = torch.zeros(4, dtype=torch.float64), torch.full((4,), 1e-7)
    with pytest.raises(AssertionError, match="max error"):
        assert_within_budget(rounding, zero, zero.float())
    assert_within_budget(rounding, zero, zero.float(), zero_size=1.0)
    with pytest.raises(AssertionError, match="max error"):
        assert_within_budget(rounding * 100, zero, zero.float(), zero_size=1.0)
