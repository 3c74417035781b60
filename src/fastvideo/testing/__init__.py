"""What tests of backends, kernels and layers share: a plain reference, an error budget, a place for ranks to meet."""

from fastvideo.testing.budget import assert_op_within_budget, assert_within_budget
from fastvideo.testing.ranks import meeting_point
from fastvideo.testing.reference import reference_attention

__all__ = ["assert_op_within_budget", "assert_within_budget", "meeting_point", "reference_attention"]
