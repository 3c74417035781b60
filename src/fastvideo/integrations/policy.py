"""Which backend attends where and when: rules over layer × role × denoising step, as data.

A policy is checked twice: each rule by itself when it is written, and the whole against a model when it is applied
(`fastvideo.integrations.plan`). The first rule that fits decides; where none fits, the default does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from fastvideo.attention.registry import backend_name
from fastvideo.attention.selector import BackendWish
from fastvideo.integrations.intervals import Intervals, Numbers, contains, describe_intervals, parse_intervals
from fastvideo.platforms import AttentionBackendEnum

__all__ = ["AUTO", "OPTIONS", "ROLES", "AttentionPolicy", "Rule", "as_policy"]

ROLES = ("self", "cross", "text")
"""`self`: video tokens see each other, and the text tokens that the model joins to them. `cross`: video tokens see the tokens
of a text or an image that stand apart. `text`: text tokens see each other before they meet the video."""

AUTO = "auto"
"""The fastest exact backend that accepts a call, or what scope and environment ask for."""

OPTIONS = {"sparsity": "VSA_sparsity", "tile_tyx": "tile_tyx", "window_tyx": "STA_window"}
"""Fields of a rule that are arguments of metadata builders, and their names there."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What runs at some places of a model during some steps.

    Layers count the model's transformer blocks from 0, across all its lists of blocks in the order in which they run. Steps
    count denoising steps from 0. Attention among text tokens alone (role `"text"`) has no layer number and is addressed only
    by a rule that names the role.

    Args:
        backend: Name of the backend, or `"auto"`.
        role: One of `ROLES`; `None` means `"self"` and `"cross"`.
        layers: Which blocks: `3`, `"0-3,7"`, `slice(0, 4)`, `range(4)`, `[0, 2]`; `None` means every one.
        steps: Which denoising steps, written like layers; `slice(5, None)` means all but the first five.
        sparsity: Share of key tiles to drop, in [0, 1), for `VIDEO_SPARSE_ATTN` and others whose metadata has one.
        tile_tyx: Tokens of a tile along time, height and width, or `"auto"`, for backends with tiles.
        window_tyx: Tiles of a window, for `SLIDING_TILE_ATTN` and others whose metadata has `windows`: one, or a list of one
            per head.
        options: Further arguments of the backend's metadata builder, by name.

    Raises:
        TypeError: A type is wrong.
        ValueError: A role is unknown, a set of layers or steps is empty, the sparsity is out of range, a field and `options`
            give the same argument, or options come without a backend that takes any.
        UnknownBackend: No backend has that name.

    Example:
        >>> Rule(layers="0-3", steps=slice(5, None), backend="video_sparse_attn", sparsity=0.8)
        Rule(layers='0-3', steps='5-', backend='VIDEO_SPARSE_ATTN', sparsity=0.8)
    """

    backend: BackendWish
    role: str | None = None
    layers: Numbers = None
    steps: Numbers = None
    sparsity: float | None = None
    tile_tyx: Sequence[int] | str | None = None
    window_tyx: Sequence[Any] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "backend", _name(self.backend))
        if self.role is not None and self.role not in ROLES:
            raise ValueError(f"expected role as one of {', '.join(ROLES)} or None, got {self.role!r}")
        if self.role == "text" and self.layers is not None:
            raise ValueError("attention among text tokens has no layer number; leave out layers where role='text'")
        if self.sparsity is not None and (isinstance(self.sparsity, bool) or not isinstance(self.sparsity, (int, float))):
            raise TypeError(f"expected sparsity as a float in [0, 1), got {self.sparsity!r}")
        if self.sparsity is not None and not 0 <= self.sparsity < 1:
            raise ValueError(f"expected sparsity in [0, 1), got {self.sparsity}")
        if not isinstance(self.options, Mapping):
            raise TypeError(f"expected options as a mapping from name to value, got {self.options!r}")
        if not all(isinstance(name, str) for name in self.options):
            raise TypeError(f"expected the names of options as strings, got {dict(self.options)!r}")
        for field_name, name in OPTIONS.items():
            if getattr(self, field_name) is not None and name in self.options:
                raise ValueError(f"{field_name} and options[{name!r}] both give the builder's {name}; leave out one")
        object.__setattr__(self, "options", MappingProxyType(dict(self.options)))
        object.__setattr__(self, "_layers", parse_intervals("layers", self.layers))
        object.__setattr__(self, "_steps", parse_intervals("steps", self.steps))
        if self.backend == AUTO and self.builder_options:
            raise ValueError(f"backend 'auto' takes no {sorted(self.builder_options)}; name the backend they are meant for")

    @property
    def layer_intervals(self) -> Intervals:
        """The rule's layers as half-open intervals."""
        return self._layers  # type: ignore[attr-defined,no-any-return]  # set once, a frozen dataclass has no other way

    @property
    def step_intervals(self) -> Intervals:
        """The rule's steps as half-open intervals."""
        return self._steps  # type: ignore[attr-defined,no-any-return]  # as above

    @property
    def builder_options(self) -> dict[str, Any]:
        """What the rule adds to the arguments of the backend's metadata builder, by the builder's names."""
        named = {name: getattr(self, field_name) for field_name, name in OPTIONS.items()}
        return {**{name: value for name, value in named.items() if value is not None}, **self.options}

    def addresses(self, role: str, layer: int | None) -> bool:
        """Return whether the rule speaks about a place of a model, at some step."""
        if role == "text":
            return self.role == "text"
        return self.role in (None, role) and layer is not None and contains(self.layer_intervals, layer)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "options": dict(self.options)}  # a mapping proxy has no pickle

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            object.__setattr__(self, name, MappingProxyType(value) if name == "options" else value)

    def __repr__(self) -> str:
        shown: dict[str, Any] = {
            "role": self.role,
            "layers": None if self.layers is None else describe_intervals(self.layer_intervals),
            "steps": None if self.steps is None else describe_intervals(self.step_intervals),
            "backend": self.backend,
            "sparsity": self.sparsity,
            "tile_tyx": self.tile_tyx,
            "window_tyx": self.window_tyx,
            "options": dict(self.options) or None,
        }
        return f"Rule({', '.join(f'{name}={value!r}' for name, value in shown.items() if value is not None)})"


@dataclass(frozen=True)
class AttentionPolicy:
    """Rules over layer × role × step; the first that fits decides, and where none fits, `default` runs.

    Args:
        default: Name of a dense backend, or `"auto"`. What needs options, such as a sparsity, is a rule.
        rules: In the order in which they are tried.

    Raises:
        TypeError: `rules` holds something else.
        UnknownBackend: No backend has the default's name.

    Example:
        >>> policy = AttentionPolicy(
        ...     rules=[
        ...         Rule(role="cross", backend="TORCH_SDPA"),
        ...         Rule(steps=slice(5, None), backend="VIDEO_SPARSE_ATTN", sparsity=0.8),
        ...     ]
        ... )
        >>> print(policy)
        rule     role        layers  steps  backend
        0        cross       all     all    TORCH_SDPA
        1        self,cross  all     5-     VIDEO_SPARSE_ATTN (sparsity=0.8)
        default  all         all     all    auto
    """

    default: BackendWish = AUTO
    rules: Sequence[Rule] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "default", _name(self.default))
        if isinstance(self.rules, Rule) or not isinstance(self.rules, Iterable):
            raise TypeError(f"expected rules as a list of Rule, got {self.rules!r}")
        rules = tuple(self.rules)
        if not all(isinstance(rule, Rule) for rule in rules):
            raise TypeError(f"expected rules as a list of Rule, got {rules!r}")
        object.__setattr__(self, "rules", rules)

    def __str__(self) -> str:
        rows = [("rule", "role", "layers", "steps", "backend")]
        for number, rule in enumerate(self.rules):
            layers = "-" if rule.role == "text" else describe_intervals(rule.layer_intervals)
            steps = describe_intervals(rule.step_intervals)
            rows.append((str(number), rule.role or "self,cross", layers, steps, describe_choice(rule.backend, rule)))
        rows.append(("default", "all", "all", "all", str(self.default)))
        return format_rows(rows)


def describe_choice(backend: BackendWish, rule: Rule | None) -> str:
    """Return a backend's name with the options that a rule gives it."""
    if rule is None:
        return str(backend)
    named = {"sparsity": rule.sparsity, "tile_tyx": rule.tile_tyx, "window_tyx": rule.window_tyx, **rule.options}
    options = ", ".join(f"{name}={value}" for name, value in named.items() if value is not None)
    return f"{backend} ({options})" if options else str(backend)


def format_rows(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of text as a table whose columns are as wide as they need to be."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def as_policy(attention: AttentionPolicy | BackendWish) -> AttentionPolicy:
    """Return a policy as it is, and a backend's name as the policy that runs it everywhere.

    Raises:
        TypeError: It is neither, as a rule without its policy.
        UnknownBackend: No backend has that name.

    Example:
        >>> as_policy("TORCH_SDPA").default
        'TORCH_SDPA'
    """
    if isinstance(attention, AttentionPolicy):
        return attention
    given: object = attention  # not the annotated type where a caller hands over something else
    if not isinstance(given, (str, AttentionBackendEnum, type)):
        kind = type(given).__name__
        raise TypeError(f"expected a backend's name or an AttentionPolicy, got {kind}; write AttentionPolicy(rules=[...])")
    return AttentionPolicy(default=attention)


def _name(backend: BackendWish) -> str:
    return AUTO if isinstance(backend, str) and backend.lower() == AUTO else backend_name(backend)
