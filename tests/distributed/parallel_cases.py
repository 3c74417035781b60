"""The cases that test_parallel.py runs: combinations in which every pair of values occurs, and some by name."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, fields
from typing import Any

TOKENS = 21
CROSS_KEYS = 13


@dataclass(frozen=True)
class Case:
    """One call. Lengths are drawn from `lengths` for each number of ranks, or are those of the ranks."""

    layout: str = "ulysses"
    heads: tuple[int, int] = (4, 4)
    lengths: str | tuple[int, ...] = "equal"
    mask: str = ""
    causal: bool = False
    replicated: str = ""
    keys: str = "own"
    grad: str = "reduced"
    dtype: str = "float64"
    groups: int | None = None

    def __str__(self) -> str:
        parts = [
            f"{field.name}={getattr(self, field.name)}" for field in fields(self) if getattr(self, field.name) != field.default
        ]
        return " ".join(parts) or "plain"

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Case:
        """Return a case whose tuples have become lists."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


VALUES: dict[str, tuple] = {
    "layout": ("ulysses", "ring", "gather", "auto", "mesh ring", "mesh gather", "mesh ulysses"),
    "heads": ((1, 1), (3, 1), (3, 3), (8, 1), (8, 2), (8, 4), (8, 8), (12, 1), (12, 2), (12, 4), (12, 12)),
    "lengths": ("equal", "one token", "prime", "uneven", "empty shard", "all on one"),
    "mask": ("", "key padding", "lengths", "bool", "bool heads", "additive", "additive heads"),
    "causal": (False, True),
    "replicated": ("", "rear", "front", "keys rear", "keys front"),
    "keys": ("own", "sharded", "replicated"),
    "grad": ("reduced", "partial"),
    "dtype": ("float64", "float32"),
    "groups": (None, 2),
}

WITH_CAUSAL = [("causal", *pair) for pair in itertools.combinations(("layout", "replicated", "keys"), 2)]
"""Fields whose values all occur together, because they decide which token stands where and which rank has it."""


def is_legal(values: dict) -> bool:
    """Return whether a layer takes the combination; what it refuses is tested by name."""
    if values["causal"] and values["keys"] == "replicated":
        return False
    if values["keys"] == "replicated" and not values["replicated"]:
        return False
    if values["groups"] and values["layout"] not in ("ulysses", "mesh ring", "mesh gather", "mesh ulysses"):
        return False
    return values["grad"] == "reduced" or bool(values["replicated"])


def draw_pairwise(
    seed: int,
    made: type[Any] = Case,
    of: dict[str, tuple] = VALUES,
    is_legal=is_legal,
    triples=WITH_CAUSAL,
    num_tries: int = 40,
) -> list[Any]:
    """Return cases in which every legal pair of values of two fields occurs, and all of `triples`, drawn greedily."""
    source = random.Random(seed)
    names = list(of)
    together = [*itertools.combinations(names, 2), *triples]

    def pairs(values: dict) -> set:
        return {tuple((name, values[name]) for name in combined) for combined in together}

    def draw(fixed: dict) -> dict | None:
        for _ in range(200):
            values = {name: fixed.get(name, source.choice(of[name])) for name in names}
            if is_legal(values):
                return values
        return None

    missing = {
        tuple(zip(combined, values, strict=True))
        for combined in together
        for values in itertools.product(*(of[name] for name in combined))
    }
    cases = []
    while missing:
        wanted = min(missing, key=str)
        drawn = [draw(dict(wanted)) for _ in range(num_tries)]
        legal = [values for values in drawn if values is not None]
        if not legal:
            missing.discard(wanted)
            continue
        best = max(legal, key=lambda values: len(pairs(values) & missing))
        missing -= pairs(best)
        cases.append(made(**best))
    return cases


def shard_lengths(kind: str | tuple[int, ...], size: int, total: int = TOKENS) -> tuple[int, ...]:
    """Return the shards of a sequence over `size` ranks."""
    if isinstance(kind, tuple):
        return kind
    return {
        "equal": (total // size,) * size,
        "one token": (0,) * (size - 1) + (1,),
        "prime": tuple(19 // size + (rank < 19 % size) for rank in range(size)),
        "uneven": tuple(3 + 4 * ((rank + 1) % size) for rank in range(size)),
        "empty shard": tuple(5 if rank != 1 else 0 for rank in range(size)),
        "all on one": (total,) + (0,) * (size - 1),
    }[kind]
