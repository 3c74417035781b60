"""This attention system inside other libraries: diffusers, transformers and torch's own attention function.

Importing this imports none of them.
"""

from fastvideo.integrations.plan import Place, Plan
from fastvideo.integrations.policy import AttentionPolicy, Rule
from fastvideo.integrations.sdpa import override_sdpa

__all__ = ["AttentionPolicy", "Place", "Plan", "Rule", "override_sdpa"]
