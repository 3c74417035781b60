"""What tests of backends and kernels share: a plain reference and an error budget."""

from fastvideo.testing.budget import assert_op_within_budget, assert_within_budget
from fastvideo.testing.reference import reference_attention

__all__ = ["assert_op_within_budget", "assert_within_budget", "reference_attention"]
