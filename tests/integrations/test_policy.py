"""Rules and policies: what is written is what is meant, or is refused; a plan says what runs where and when."""

from __future__ import annotations

import copy
import pickle

import pytest

from fastvideo.attention import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    UnknownBackend,
    register_attn_backend,
)
from fastvideo.attention.registry import BackendLoadError
from fastvideo.integrations import AttentionPolicy, Place, Plan, Rule
from fastvideo.integrations.intervals import contains, describe_intervals, parse_intervals
from fastvideo.integrations.plan import build_metadata
from fastvideo.integrations.policy import as_policy

PLACES = [Place(f"blocks.{i}.attn{j}", role, i) for i in range(6) for j, role in ((1, "self"), (2, "cross"))]
WITH_TEXT = [Place("refiner.0", "text"), *(Place(f"blocks.{i}", "self", i) for i in range(3))]
VSA = {"backend": "VIDEO_SPARSE_ATTN", "sparsity": 0.8}


def backends(plan: Plan, step: int) -> dict[tuple[str, int | None], str | None]:
    phase = plan.phase(step)
    return {(p.role, p.layer): row[phase].backend for p, row in zip(plan.places, plan.choices, strict=True)}


@pytest.mark.parametrize(
    ("written", "intervals", "shown"),
    [
        (None, ((0, None),), "all"),
        (3, ((3, 4),), "3"),
        ("0-3,7", ((0, 4), (7, 8)), "0-3,7"),
        ("7,0-2,2-3", ((0, 4), (7, 8)), "0-3,7"),
        ("5-", ((5, None),), "5-"),
        ("0-2,2-,9", ((0, None),), "all"),
        (slice(5, None), ((5, None),), "5-"),
        (slice(None, 5), ((0, 5),), "0-4"),
        (range(2, 4), ((2, 4),), "2-3"),
        ([4, 0, 1], ((0, 2), (4, 5)), "0-1,4"),
    ],
)
def test_sets_of_numbers(written, intervals, shown) -> None:
    assert parse_intervals("steps", written) == intervals
    assert describe_intervals(intervals) == shown
    members = [number for number in range(12) if contains(intervals, number)]
    assert members == [n for n in range(12) if any(a <= n and (b is None or n < b) for a, b in intervals)]


@pytest.mark.parametrize(
    "written", [-1, "", "a", "²", "3-1", "1-2-3", slice(-5, None), slice(None, -1), slice(0, 9, 2), range(0), []]
)
def test_sets_that_mean_nothing_are_refused(written) -> None:
    with pytest.raises(ValueError, match="layers"):
        parse_intervals("layers", written)


@pytest.mark.parametrize("written", [True, 1.5, [1, "2"], [True], slice("a", None), slice(0, 2.5)])
def test_sets_of_wrong_types_are_refused(written) -> None:
    with pytest.raises(TypeError, match="layers"):
        parse_intervals("layers", written)


def test_the_first_rule_that_fits_decides() -> None:
    policy = AttentionPolicy(
        default="auto",
        rules=[
            Rule(role="cross", backend="TORCH_SDPA"),
            Rule(layers="0-3", backend="FLASH_ATTN"),
            Rule(steps=slice(5, None), **VSA),
        ],
    )
    plan = Plan.resolve(policy, PLACES, model_name="Model")
    assert plan.boundaries == (5,)
    early, late = backends(plan, 4), backends(plan, 5)
    assert {early["cross", i] for i in range(6)} == {late["cross", i] for i in range(6)} == {"TORCH_SDPA"}
    assert [early["self", i] for i in range(6)] == ["FLASH_ATTN"] * 4 + [None] * 2
    assert [late["self", i] for i in range(6)] == ["FLASH_ATTN"] * 4 + ["VIDEO_SPARSE_ATTN"] * 2
    assert plan.metadata_of_phase(0) == frozenset()
    assert plan.metadata_of_phase(1) == {0}
    assert str(plan).splitlines() == [
        "role   layers  steps  backend",
        "self   0-3     all    FLASH_ATTN",
        "cross  0-5     all    TORCH_SDPA",
        "self   4-5     0-4    auto",
        "self   4-5     5-     VIDEO_SPARSE_ATTN (sparsity=0.8)",
    ]


def test_dense_steps_between_sparse_ones() -> None:
    policy = AttentionPolicy(rules=[Rule(role="self", steps="0-1,4-5,8-", **VSA)])
    plan = Plan.resolve(policy, PLACES, model_name="Model")
    chosen = [backends(plan, step)["self", 0] for step in range(10)]
    assert [name is not None for name in chosen] == [True, True, False, False, True, True, False, False, True, True]
    assert "self   0-5     0-1,4-5,8-  VIDEO_SPARSE_ATTN (sparsity=0.8)" in str(plan)


def test_rules_with_options_of_their_own_get_metadata_of_their_own() -> None:
    rules = [
        Rule(role="self", layers=0, **VSA),
        Rule(role="self", backend="VIDEO_SPARSE_ATTN", sparsity=0.5, tile_tyx=(2, 4, 4)),
    ]
    plan = Plan.resolve(AttentionPolicy(rules=rules), PLACES, model_name="Model")
    metadata = [build_metadata(name, rule.builder_options, 0, (8, 8, 8), (1, 1, 1), "cpu") for name, rule in plan.builders]
    assert [(m.sparsity, m.tile_tyx) for m in metadata] == [(0.8, (4, 4, 4)), (0.5, (2, 4, 4))]
    assert [row[0].metadata for row in plan.choices if row[0].backend] == [0, 1, 1, 1, 1, 1]


def test_text_is_addressed_by_its_role_alone() -> None:
    plan = Plan.resolve(AttentionPolicy(rules=[Rule(backend="TORCH_SDPA")]), WITH_TEXT, model_name="Model")
    assert backends(plan, 0)["text", None] is None
    assert backends(plan, 0)["self", 0] == "TORCH_SDPA"
    plan = Plan.resolve(AttentionPolicy("TORCH_SDPA", [Rule(role="text", backend="auto")]), WITH_TEXT, model_name="Model")
    assert backends(plan, 0)["text", None] is None
    assert backends(plan, 0)["self", 0] == "TORCH_SDPA"


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (lambda: AttentionPolicy(rules=[Rule(**VSA)]), "cross attention .* restrict it by role='self'"),
        (lambda: AttentionPolicy(rules=[Rule(role="cross", **VSA)]), "cross attention .* is not supported"),
        (
            lambda: AttentionPolicy(rules=[Rule(role="text", backend="TORCH_SDPA")]),
            "names role 'text', and Model has self, cross",
        ),
        (
            lambda: AttentionPolicy(rules=[Rule(layers="4-6", backend="TORCH_SDPA")]),
            "names layers 4-6, and Model has 6, 0 to 5",
        ),
        (lambda: AttentionPolicy(rules=[Rule(layers="6-", backend="TORCH_SDPA")]), "names layers 6-, and Model has 6"),
        (
            lambda: AttentionPolicy(rules=[Rule(backend="TORCH_SDPA"), Rule(layers=2, backend="FLASH_ATTN")]),
            "rule 1, .* never applies",
        ),
        (lambda: AttentionPolicy("VIDEO_SPARSE_ATTN"), "the default VIDEO_SPARSE_ATTN needs metadata"),
        (
            lambda: AttentionPolicy(rules=[Rule(role="self", backend="VIDEO_SPARSE_ATTN", tile_tyx=(2, 2, 2))]),
            "lacks sparsity, without which VIDEO_SPARSE_ATTN can't run",
        ),
        (lambda: AttentionPolicy(rules=[Rule(role="self", backend="SLIDING_TILE_ATTN")]), "lacks window_tyx"),
        (
            lambda: AttentionPolicy(rules=[Rule(role="self", options={"patch_size": (1, 1, 1)}, **VSA)]),
            r"\['patch_size'\] follow from the model's call",
        ),
        (lambda: AttentionPolicy(rules=[Rule(role="self", backend="VIDEO_SPARSE_ATTN", sparsity=1.0)]), "sparsity"),
        (
            lambda: AttentionPolicy(rules=[Rule(role="self", backend="TORCH_SDPA", sparsity=0.5)]),
            "gives TORCH_SDPA sparsity, and",
        ),
        (
            lambda: AttentionPolicy(rules=[Rule(role="self", window_tyx=(3, 3, 3), **VSA)]),
            r"window_tyx=\(3, 3, 3\), and it has no",
        ),
        (
            lambda: AttentionPolicy(
                rules=[Rule(role="self", backend="SLIDING_TILE_ATTN", sparsity=0.5, window_tyx=(1, 1, 1), tile_tyx=(2, 2, 2))]
            ),
            "SLIDING_TILE_ATTN sparsity=0.5, and it doesn't follow one",
        ),
        (lambda: AttentionPolicy(rules=[Rule(role="self", options={"colour": 1}, **VSA)]), "colour"),
    ],
)
def test_a_policy_that_does_not_fit_its_model_is_refused(policy, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Plan.resolve(policy(), PLACES, model_name="Model")


def test_sparse_video_attention_among_text_is_refused() -> None:
    policy = AttentionPolicy(rules=[Rule(role="text", **VSA)])
    with pytest.raises(ValueError, match="works on a video's grid"):
        Plan.resolve(policy, WITH_TEXT, model_name="Model")


def test_rules_are_checked_where_they_are_written() -> None:
    with pytest.raises(UnknownBackend, match="VIDEO_SPARSE_ATTN"):
        Rule(backend="VIDEO_SPARSE")
    with pytest.raises(ValueError, match="role"):
        Rule(backend="auto", role="other")
    with pytest.raises(ValueError, match="no layer number"):
        Rule(backend="auto", role="text", layers=0)
    with pytest.raises(ValueError, match="'auto' takes no"):
        Rule(backend="auto", sparsity=0.5)
    with pytest.raises(TypeError, match="sparsity"):
        Rule(backend="VIDEO_SPARSE_ATTN", sparsity="0.5")
    for sparsity in (1, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"sparsity in \[0, 1\)"):
            Rule(backend="VIDEO_SPARSE_ATTN", sparsity=sparsity)
    assert AttentionPolicy(rules=(Rule(**VSA) for _ in range(2))).rules == (Rule(**VSA),) * 2
    with pytest.raises(TypeError, match="list of Rule"):
        AttentionPolicy(rules=3)
    for options in ([1], {1: 2}):
        with pytest.raises(TypeError, match="options"):
            Rule(backend="TORCH_SDPA", options=options)
    with pytest.raises(ValueError, match="both give the builder's VSA_sparsity"):
        Rule(options={"VSA_sparsity": 0.9}, **VSA)
    for policy, kind in ((Rule(**VSA), "Rule"), ([Rule(**VSA)], "list"), ({"self": "TORCH_SDPA"}, "dict"), (3, "int")):
        with pytest.raises(TypeError, match=rf"backend's name or an AttentionPolicy, got {kind}; write AttentionPolicy\(rules"):
            as_policy(policy)
    with pytest.raises(TypeError, match="list of Rule"):
        AttentionPolicy(rules=Rule(backend="TORCH_SDPA"))
    with pytest.raises(UnknownBackend):
        AttentionPolicy("SDPA_TORCH_9")
    for policy in (AttentionPolicy("NO_ATTENTION"), AttentionPolicy(rules=[Rule(backend="NO_ATTENTION")])):
        with pytest.raises(BackendLoadError, match="names no implementation"):
            Plan.resolve(policy, PLACES, model_name="Model")


def test_policies_are_data() -> None:
    policy = AttentionPolicy("auto", [Rule(role="self", steps="5-", options={"tile_tyx": (2, 2, 2)}, **VSA)])
    for other in (copy.deepcopy(policy), pickle.loads(pickle.dumps(policy))):
        assert str(other) == str(policy)
        assert other.rules[0].builder_options == {"VSA_sparsity": 0.8, "tile_tyx": (2, 2, 2)}
        assert other.rules[0].step_intervals == ((5, None),)
    plan = Plan.resolve(policy, PLACES, model_name="Model")
    assert pickle.loads(pickle.dumps(plan)).choices == plan.choices


class _Metadata(AttentionMetadata):
    pass


class _Builder(AttentionMetadataBuilder[_Metadata]):
    def prepare(self) -> None:
        pass

    def build(self, *, current_timestep: int, patch_size: tuple[int, ...], strength: float) -> _Metadata:
        if strength < 0:
            raise ValueError("expected strength >= 0")
        metadata = _Metadata(current_timestep)
        metadata.seen = (patch_size, strength)
        return metadata


class _Impl(AttentionImpl[_Metadata]):
    def forward(self, query, key, value, attn_metadata):
        return query


class ThirdParty(AttentionBackend):
    get_name = staticmethod(lambda: "THIRD_PARTY_POLICY")
    get_impl_cls = staticmethod(lambda: _Impl)
    get_metadata_cls = staticmethod(lambda: _Metadata)
    get_builder_cls = staticmethod(lambda: _Builder)


def test_a_third_partys_builder_gets_what_it_names() -> None:
    register_attn_backend("THIRD_PARTY_POLICY", ThirdParty)
    rule = Rule(role="self", backend="third_party_policy", options={"strength": 2.0})
    Plan.resolve(AttentionPolicy(rules=[rule]), PLACES, model_name="Model")
    metadata = build_metadata("THIRD_PARTY_POLICY", rule.builder_options, 3, (4, 4, 4), (1, 2, 2), "cpu")
    assert (metadata.current_timestep, metadata.seen) == (3, ((1, 2, 2), 2.0))
    unfit = "options that its metadata can't be built with"
    for options, message in (
        ({"strength": -1.0}, unfit),
        ({"strength": 1.0, "colour": 1}, unfit),
        ({}, r"lacks options=\{'stre"),
    ):
        bad = AttentionPolicy(rules=[Rule(role="self", backend="THIRD_PARTY_POLICY", options=options)])
        with pytest.raises(ValueError, match=message):
            Plan.resolve(bad, PLACES, model_name="Model")
