"""A policy worked out for one model: at every place and in every phase of the denoising, what runs.

A phase is a span of steps in which no choice changes; a policy without rules on steps has one. What a backend can never do at
a place (sparse video attention between video and text) is refused here, before anything runs. What depends on the machine or
the shapes is judged by the layers when they run, with every reason.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch

from fastvideo.attention.backends.abstract import AttentionMetadata
from fastvideo.attention.registry import BackendLoadError, load_backend, registered_backends
from fastvideo.attention.request import AttentionRequest
from fastvideo.integrations.intervals import contains, describe_intervals
from fastvideo.integrations.policy import AUTO, OPTIONS, AttentionPolicy, Rule, describe_choice, format_rows
from fastvideo.platforms import current_platform

__all__ = ["Choice", "Place", "Plan", "build_metadata", "exact_backends"]

_GENERAL = ("current_timestep", "raw_latent_shape", "patch_size", "device")
_FIELDS = {argument: field for field, argument in OPTIONS.items()}
_REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True)
class Place:
    """One place of a model where attention happens.

    Attributes:
        path: Dotted name of the attention module in the model.
        role: One of `fastvideo.integrations.policy.ROLES`.
        layer: Number of the transformer block; `None` for attention outside them.

    Example:
        >>> Place("blocks.0.attn1", "self", 0)
        Place(path='blocks.0.attn1', role='self', layer=0)
    """

    path: str
    role: str
    layer: int | None = None


@dataclass(frozen=True)
class Choice:
    """What runs at a place during a phase.

    Attributes:
        backend: Name of the backend; `None` leaves it to scope, environment and automatic selection.
        rule: Number of the rule that decided; `None` for the default.
        metadata: Place of the backend's metadata among those of a forward call; `None` where it needs none.
        refuses_padding: The backend takes no key padding mask, so padded text has to be cut off before it runs.
    """

    backend: str | None
    rule: int | None
    metadata: int | None = None
    refuses_padding: bool = False


@dataclass(frozen=True)
class Plan:
    """What runs where and when in one model.

    Attributes:
        policy: Where it comes from.
        places: Every place of the model.
        boundaries: Steps at which a new phase begins, rising, without 0.
        choices: For each place, its choice in each phase.
        builders: What each metadata object of a forward call is built by: backend and options.

    Example:
        >>> places = [Place("blocks.0.attn1", "self", 0), Place("blocks.0.attn2", "cross", 0)]
        >>> rule = Rule(role="self", steps="5-", backend="VIDEO_SPARSE_ATTN", sparsity=0.5)
        >>> print(Plan.resolve(AttentionPolicy(rules=[rule]), places, model_name="Model"))
        role   layers  steps  backend
        self   0       0-4    auto
        self   0       5-     VIDEO_SPARSE_ATTN (sparsity=0.5)
        cross  0       all    auto
    """

    policy: AttentionPolicy
    places: tuple[Place, ...]
    boundaries: tuple[int, ...]
    choices: tuple[tuple[Choice, ...], ...]
    builders: tuple[tuple[str, Rule], ...]

    @classmethod
    def resolve(cls, policy: AttentionPolicy, places: Sequence[Place], *, model_name: str) -> Plan:
        """Work out a policy for the places of a model.

        Raises:
            ValueError: A rule names a role or layers that the model lacks, never applies, asks a backend for what it never
                does, or gives it options it doesn't take.
        """
        _check_rules(policy, places, model_name)
        edges = {edge for rule in policy.rules for interval in rule.step_intervals for edge in interval}
        boundaries = tuple(sorted(edge for edge in edges if edge))
        builders: dict[int, int] = {}
        used: set[int] = set()
        choices = []
        for place in places:
            row = []
            for first_step in (0, *boundaries):
                number = _first_rule(policy, place, first_step)
                if number is not None:
                    used.add(number)
                row.append(_choose(policy, place, number, builders))
            choices.append(tuple(row))
        for number, rule in enumerate(policy.rules):
            if number not in used:
                raise ValueError(f"rule {number}, {rule!r}, never applies: the rules before it take every place it names")
        rules = tuple((str(policy.rules[number].backend), policy.rules[number]) for number in builders)
        return cls(policy, tuple(places), boundaries, tuple(choices), rules)

    def phase(self, step: int) -> int:
        """Return the number of the phase that a step lies in."""
        return sum(step >= boundary for boundary in self.boundaries)

    def metadata_of_phase(self, phase: int) -> frozenset[int]:
        """Return which metadata objects some place needs in a phase."""
        return frozenset(row[phase].metadata for row in self.choices if row[phase].metadata is not None)  # type: ignore[misc]

    def idle_rules(self, num_steps: int) -> str:
        """Return which rules decide nothing in a run of so many steps, for people; empty where each decides something.

        Example:
            >>> rule = Rule(steps="5-", backend="VIDEO_SPARSE_ATTN", sparsity=0.5)
            >>> plan = Plan.resolve(AttentionPolicy(rules=[rule]), [Place("attn", "self", 0)], model_name="Model")
            >>> plan.idle_rules(6), plan.idle_rules(5)[:31]
            ('', "rule 0, Rule(steps='5-', backen")
        """
        num_phases = sum(first_step < num_steps for first_step in (0, *self.boundaries))
        used = {choice.rule for row in self.choices for choice in row[:num_phases]}
        idle = [f"rule {number}, {rule!r}, applies" for number, rule in enumerate(self.policy.rules) if number not in used]
        return " and ".join(idle)

    def __str__(self) -> str:
        ends = list(pairwise((0, *self.boundaries, None)))
        by_text: dict[tuple[str, str], list[tuple[int | None, int]]] = {}
        for place, row in zip(self.places, self.choices, strict=True):
            for phase, choice in enumerate(row):
                rule = None if choice.rule is None else self.policy.rules[choice.rule]
                key = (place.role, describe_choice(choice.backend or AUTO, rule))
                by_text.setdefault(key, []).append((place.layer, phase))
        rows = [("role", "layers", "steps", "backend")]
        for (role, backend), cells in by_text.items():
            by_layer: dict[int | None, list[int]] = {}
            for layer, phase in cells:
                by_layer.setdefault(layer, []).append(phase)
            by_phases: dict[tuple[int, ...], list[int | None]] = {}
            for layer, phases in by_layer.items():
                by_phases.setdefault(tuple(sorted(set(phases))), []).append(layer)
            for span, layers in by_phases.items():
                spans = _join([ends[phase] for phase in span])
                numbers = _join([(layer, layer + 1) for layer in layers if layer is not None])
                rows.append((role, describe_intervals(numbers) if numbers else "-", describe_intervals(spans), backend))
        return format_rows(rows)


def _join(intervals: Sequence[tuple[Any, Any]]) -> tuple[tuple[int, int | None], ...]:
    joined: list[tuple[int, int | None]] = []
    for start, stop in sorted(intervals, key=lambda pair: pair[0] or 0):
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    return tuple(joined)


def _first_rule(policy: AttentionPolicy, place: Place, step: int) -> int | None:
    for number, rule in enumerate(policy.rules):
        if rule.addresses(place.role, place.layer) and contains(rule.step_intervals, step):
            return number
    return None


def _check_rules(policy: AttentionPolicy, places: Sequence[Place], model_name: str) -> None:
    roles = list(dict.fromkeys(place.role for place in places))
    num_layers = 1 + max((place.layer for place in places if place.layer is not None), default=-1)
    for number, rule in enumerate(policy.rules):
        if rule.role is not None and rule.role not in roles:
            raise ValueError(f"rule {number} names role {rule.role!r}, and {model_name} has {', '.join(roles)}")
        last = max(start if stop is None else stop - 1 for start, stop in rule.layer_intervals)
        if last >= num_layers:
            raise ValueError(
                f"rule {number} names layers {describe_intervals(rule.layer_intervals)}, and {model_name} has {num_layers}, "
                f"0 to {num_layers - 1}"
            )
    default = str(policy.default)
    if default != AUTO and load_backend(default).requires_metadata():
        raise ValueError(
            f"the default {default} needs metadata with options of its own; write it as a rule, such as "
            f"Rule(role='self', backend={default!r}, sparsity=0.8)"
        )


def _choose(policy: AttentionPolicy, place: Place, number: int | None, builders: dict[int, int]) -> Choice:
    name = str(policy.default if number is None else policy.rules[number].backend)
    if name == AUTO:
        return Choice(None, number)
    backend = load_backend(name)
    where = "the default" if number is None else f"rule {number}, {policy.rules[number]!r},"
    if reasons := role_reasons(name, place.role):
        fix = "" if number is None or policy.rules[number].role else "; restrict it by role='self'"
        raise ValueError(f"{where} asks for {name} at {place.path}, role {place.role!r}: {'; '.join(reasons)}{fix}")
    refuses_padding = bool(_structural_reasons(name, mask="key_padding"))
    if number is None or not backend.requires_metadata():
        if number is not None and (options := policy.rules[number].builder_options):
            given = ", ".join(_FIELDS.get(option, option) for option in options)
            raise ValueError(f"{where} gives {name} {given}, and it is dense: it takes no options; leave them out")
        return Choice(name, number, refuses_padding=refuses_padding)
    if number not in builders:
        _try_options(name, policy.rules[number], where)
        builders[number] = len(builders)
    return Choice(name, number, builders[number], refuses_padding)


def role_reasons(name: str, role: str) -> tuple[str, ...]:
    """Return why a backend can never run attention of a role, whatever the machine."""
    if role == "text" and load_backend(name).requires_metadata():
        return ("it works on a video's grid, and these are text tokens",)
    return _structural_reasons(name, key_len=48) if role == "cross" else ()


def _structural_reasons(name: str, **change: Any) -> tuple[str, ...]:
    """Return the reasons that a plain call doesn't meet and one with `change` does."""
    system = current_platform()
    plain = AttentionRequest(2, 2, 64, 64, 64, torch.bfloat16, system.device_type, system=system)
    backend = load_backend(name)
    before = set(backend.rejections(plain))
    return tuple(reason for reason in backend.rejections(replace(plain, **change)) if reason not in before)


def _try_options(name: str, rule: Rule, where: str) -> None:
    parameters = inspect.signature(load_backend(name).get_builder_cls()().build).parameters
    given = {*rule.builder_options, *_GENERAL}
    lacking = [
        _FIELDS.get(parameter.name, f"options={{{parameter.name!r}: ...}}")
        for parameter in parameters.values()
        if parameter.default is parameter.empty and parameter.kind not in _REST and parameter.name not in given
    ]
    if lacking:
        raise ValueError(f"{where} lacks {', '.join(lacking)}, without which {name} can't run")
    try:
        metadata = build_metadata(name, rule.builder_options, 0, (8, 8, 8), (1, 1, 1), "cpu")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} gives {name} options that its metadata can't be built with: {error}") from error
    if rule.sparsity is not None and getattr(metadata, "sparsity", None) != rule.sparsity:
        raise ValueError(f"{where} gives {name} sparsity={rule.sparsity}, and it doesn't follow one")
    if rule.window_tyx is not None and not hasattr(metadata, "windows"):
        raise ValueError(f"{where} gives {name} window_tyx={rule.window_tyx}, and it has no windows")


def build_metadata(
    name: str,
    options: Mapping[str, Any],
    step: int,
    raw_latent_shape: Sequence[int],
    patch_size: Sequence[int],
    device: torch.device | str,
) -> AttentionMetadata:
    """Build a backend's metadata for one forward call, from the arguments that its builder names.

    Args:
        name: The backend.
        options: What a rule adds.
        step: Index of the denoising step.
        raw_latent_shape: Latent frames, height and width.
        patch_size: Latent cells of a token along the same axes.
        device: Where the model runs.

    Raises:
        TypeError: The builder takes none of a name in `options`, or it is the model that says it.
        ValueError: It refuses a value.

    Example:
        >>> build_metadata("VIDEO_SPARSE_ATTN", {"VSA_sparsity": 0.5}, 0, (4, 8, 8), (1, 1, 1), "cpu").num_kept_tiles
        2
    """
    builder = load_backend(name).get_builder_cls()()
    values = (step, tuple(raw_latent_shape), tuple(patch_size), device)
    general: dict[str, Any] = dict(zip(_GENERAL, values, strict=True))
    if told := sorted(set(options).intersection(general)):
        raise TypeError(f"{told} follow from the model's call; leave them out of the options")
    parameters = inspect.signature(builder.build).parameters
    takes_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
    known = {key: value for key, value in general.items() if takes_any or key in parameters}
    if not takes_any and (unknown := sorted(set(options).difference(parameters))):
        raise TypeError(f"{type(builder).__name__}.build takes no {unknown}; it takes {sorted(parameters)}")
    builder.prepare()
    return builder.build(**known, **options)


def exact_backends() -> tuple[str, ...]:
    """Return the names of backends whose result is dense attention.

    Example:
        >>> "TORCH_SDPA" in exact_backends(), "VIDEO_SPARSE_ATTN" in exact_backends()
        (True, False)
    """
    return tuple(name for name in registered_backends() if _is_exact(name))


def _is_exact(name: str) -> bool:
    try:
        return load_backend(name).exact
    except BackendLoadError:  # a broken plug-in is its own affair until someone asks for it
        return False
