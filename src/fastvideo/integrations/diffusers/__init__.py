"""diffusers' video and image transformers on this attention system: one call puts a pipeline on it, one takes it off.

Importing this doesn't import diffusers.
"""

from fastvideo.integrations.diffusers.application import ParallelPlan, apply, plan_of, remove
from fastvideo.integrations.diffusers.dispatcher import dispatcher_names, register_dispatcher_names
from fastvideo.integrations.diffusers.family import (
    Family,
    Gather,
    Processor,
    Site,
    Split,
    known_models,
    register_family,
)
from fastvideo.integrations.diffusers.steps import denoising_step
from fastvideo.integrations.plan import Place, Plan
from fastvideo.integrations.policy import AttentionPolicy, Rule

__all__ = [
    "AttentionPolicy",
    "Family",
    "Gather",
    "ParallelPlan",
    "Place",
    "Plan",
    "Processor",
    "Rule",
    "Site",
    "Split",
    "apply",
    "denoising_step",
    "dispatcher_names",
    "known_models",
    "plan_of",
    "register_dispatcher_names",
    "register_family",
    "remove",
]
