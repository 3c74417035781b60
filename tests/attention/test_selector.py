"""Selection, on machines that are described and not there."""

from __future__ import annotations

import importlib.metadata
import json
import logging
from functools import partial

import pytest
import torch

from fastvideo.attention import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    BackendUnavailable,
    LocalAttention,
    UnknownBackend,
    attention,
    explain,
    get_attn_backend,
    register_attn_backend,
    registry,
    use_attn_backend,
)
from fastvideo.attention.backends.torch_sdpa import TorchSDPAImpl
from fastvideo.attention.registry import ENTRY_POINT_GROUP, registered_backends
from fastvideo.attention.request import AttentionRequest
from fastvideo.attention.selector import Wish, choose
from fastvideo.platforms import AttentionBackendEnum, System, describe_system

RESERVED = ("auto", "no_attention", "torch_sdpa")
WAN = {"heads": 40, "head_size": 128, "seq": 75_600}


class SpecImpl(AttentionImpl):
    """Written against the contract alone: the scores' softmax in plain torch."""

    def forward(self, query, key, value, attn_metadata):
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * self.softmax_scale
        return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)


class SpecBuilder(AttentionMetadataBuilder):
    def prepare(self):
        pass

    def build(self, **kwargs):
        return AttentionMetadata(current_timestep=kwargs["current_timestep"])


class SpecBackend(AttentionBackend):
    @staticmethod
    def get_name():
        return "SPEC_ONLY"

    @staticmethod
    def get_impl_cls():
        return SpecImpl

    @staticmethod
    def get_metadata_cls():
        return AttentionMetadata

    @staticmethod
    def get_builder_cls():
        return SpecBuilder


@pytest.fixture(scope="module", autouse=True)
def spec_backend():
    register_attn_backend("SPEC_ONLY", SpecBackend)


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    return tuple(torch.randn(2, 24, 4, 16) for _ in range(3))


@pytest.mark.parametrize(
    ("system", "chosen"),
    [
        ("H200", "FLASH_ATTN"),
        ("H200, no flash-attn", "TORCH_SDPA"),
        ("H200, torch only", "TORCH_SDPA"),
        ("cpu", "TORCH_SDPA"),
        ("A100, torch only", "TORCH_SDPA"),
    ],
)
def test_automatic_takes_the_fastest_exact_backend(system: str, chosen: str) -> None:
    assert explain(**WAN, system=system).chosen == chosen


def test_automatic_never_takes_a_sparse_backend() -> None:
    report = explain(**WAN, system="H200, torch only")
    verdict = next(verdict for verdict in report.decision.trace if verdict.backend == "VIDEO_SPARSE_ATTN")
    assert not verdict.exact
    assert report.chosen != "VIDEO_SPARSE_ATTN"


def test_flash2_alone_is_slower_than_cudnn_on_hopper() -> None:
    assert explain(**WAN, system="H200, torch only, flash-attn==2.8.3").chosen in ("TORCH_SDPA", "FLASH_ATTN")
    flash2 = System("cuda", "H200", (9, 0), (("flash-attn", "2.8.3"),))
    assert explain(**WAN, system=flash2).chosen == "TORCH_SDPA"


def test_a_named_backend_that_cannot_run_raises_with_every_reason(qkv) -> None:
    with pytest.raises(BackendUnavailable) as caught:
        attention(*qkv, backend="FLASH_ATTN")
    reasons = next(v.reasons for v in caught.value.decision.trace if v.backend == "FLASH_ATTN")
    assert len(reasons) >= 2
    assert all(reason in str(caught.value) for reason in reasons)
    assert any("pip install" in reason for reason in reasons)
    assert any("float32" in reason for reason in reasons)


def test_no_attention_names_no_implementation(qkv) -> None:
    with pytest.raises(BackendUnavailable, match="names no implementation"):
        attention(*qkv, backend=AttentionBackendEnum.NO_ATTENTION)
    supported = (AttentionBackendEnum.NO_ATTENTION,)
    with pytest.raises(BackendUnavailable, match="names no implementation"):
        LocalAttention(4, 16, supported_attention_backends=supported)(*qkv)
    with pytest.raises(BackendUnavailable, match="names no implementation"):
        get_attn_backend(64, torch.float32, supported)
    assert get_attn_backend(64, torch.float32, (*supported, AttentionBackendEnum.TORCH_SDPA)).get_name() == "TORCH_SDPA"


class RaisingBackend(SpecBackend):
    @classmethod
    def rejections(cls, request):
        raise AttributeError("no such field")


def test_a_third_partys_backend_that_raises_stops_no_other(qkv, monkeypatch) -> None:
    monkeypatch.setitem(registry._REGISTERED, "RAISING", registry.BackendEntry("RAISING", RaisingBackend, "registered"))
    for wish in (None, "TORCH_SDPA"):
        assert attention(*qkv, backend=wish).shape == qkv[0].shape
    report = explain(heads=4, head_size=16, seq=24, system="cpu")
    assert (report.chosen, report.reasons("RAISING")) == (
        "TORCH_SDPA",
        ("its class raised AttributeError when it was asked: no such field",),
    )
    with pytest.raises(
        BackendUnavailable,
        match="RAISING, asked for by call, can't run this: its class raised AttributeError when it was asked: no such field",
    ):
        attention(*qkv, backend="RAISING")


def test_entry_points_take_no_reserved_names(monkeypatch, caplog) -> None:
    points = [importlib.metadata.EntryPoint(name, "nowhere:Nothing", ENTRY_POINT_GROUP) for name in RESERVED]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    registry._entry_points.cache_clear()
    try:
        assert not {"AUTO", "NO_ATTENTION"} & registered_backends().keys()
        assert registered_backends()["TORCH_SDPA"].origin == "built-in"
        assert caplog.text.count("is no free name") == len(RESERVED)
    finally:
        registry._entry_points.cache_clear()


def test_unknown_names_come_with_close_matches(qkv) -> None:
    with pytest.raises(UnknownBackend, match="did you mean FLASH_ATTN"):
        attention(*qkv, backend="FLASH_ATN")
    with pytest.raises(UnknownBackend, match="known are"):
        LocalAttention(4, 16, backend="xyz")
    with pytest.raises(UnknownBackend), use_attn_backend("nothing like it"):
        pass


def test_order_of_wishes(qkv, monkeypatch) -> None:
    layer = LocalAttention(4, 16, prefix="blocks.0.attn")
    layer(*qkv)
    assert layer.decision.wish is None
    monkeypatch.setenv("FASTVIDEO_ATTENTION_BACKEND", "spec_only")
    layer(*qkv)
    assert (layer.decision.chosen, layer.decision.wish.source) == ("SPEC_ONLY", "environment")
    with use_attn_backend("torch_sdpa"):
        layer(*qkv)
        assert (layer.decision.chosen, layer.decision.wish.source) == ("TORCH_SDPA", "scope")
        with use_attn_backend("auto"):
            layer(*qkv)
            assert layer.decision.wish is None
        own = LocalAttention(4, 16, backend=SpecBackend)
        own(*qkv)
        assert (own.decision.chosen, own.decision.wish.source) == ("SPEC_ONLY", "layer")
        torch.testing.assert_close(attention(*qkv, backend="SPEC_ONLY"), own(*qkv))
    layer(*qkv)
    assert layer.decision.wish.source == "environment"


def test_supported_backends_bound_every_wish(qkv) -> None:
    only_sdpa = LocalAttention(4, 16, supported_attention_backends=(AttentionBackendEnum.TORCH_SDPA,))
    with use_attn_backend("SPEC_ONLY"):
        only_sdpa(*qkv)
    assert only_sdpa.decision.chosen == "TORCH_SDPA"
    assert "doesn't address this layer" in only_sdpa.decision.notes[0]
    strict = LocalAttention(4, 16, supported_attention_backends=(AttentionBackendEnum.TORCH_SDPA,), backend="SPEC_ONLY")
    with pytest.raises(BackendUnavailable, match="not among the backends that are supported here: TORCH_SDPA"):
        strict(*qkv)


def test_a_backend_of_the_contract_alone_runs_and_refuses_what_it_cannot_take(qkv) -> None:
    expected = attention(*qkv, backend="TORCH_SDPA")
    torch.testing.assert_close(attention(*qkv, backend="spec_only"), expected)
    mask = torch.ones(2, 24, dtype=torch.bool)
    for arguments in ({"attn_mask": mask}, {"dropout_p": 0.1}, {"return_lse": True}, {"out": torch.empty_like(qkv[0])}):
        with pytest.raises(BackendUnavailable, match="SPEC_ONLY"):
            attention(*qkv, backend="SPEC_ONLY", **arguments)


def test_register_refuses_taken_names_and_other_things() -> None:
    with pytest.raises(ValueError, match="taken"):
        register_attn_backend("TORCH_SDPA", SpecBackend)
    with pytest.raises(ValueError, match="taken"):
        register_attn_backend("NO_ATTENTION", SpecBackend)
    with pytest.raises(TypeError, match="module:Class"):
        register_attn_backend("OTHER", "no_colon")
    with pytest.raises(TypeError, match="subclass of AttentionBackend"):
        register_attn_backend("OTHER", SpecImpl)


def test_a_broken_registration_is_a_reason_and_no_crash(qkv) -> None:
    register_attn_backend("BROKEN", "no_such_module:Backend")
    attention(*qkv)
    with pytest.raises(BackendUnavailable, match="can't be loaded: ModuleNotFoundError: No module named 'no_such_module'"):
        attention(*qkv, backend="BROKEN")


def test_choose_is_pure_and_traces_every_candidate() -> None:
    request = AttentionRequest(8, 8, 128, 64, 64, torch.bfloat16, "cuda", system=describe_system("H200"))
    decision = choose(request, Wish("TORCH_SDPA", "call"), ("FLASH_ATTN", "TORCH_SDPA"))
    assert decision == choose(request, Wish("TORCH_SDPA", "call"), ("FLASH_ATTN", "TORCH_SDPA"))
    assert [verdict.backend for verdict in decision.trace] == ["TORCH_SDPA", "FLASH_ATTN"]
    assert decision.chosen == "TORCH_SDPA"


def test_get_attn_backend_follows_scope_and_support() -> None:
    assert get_attn_backend(64, torch.float32).get_name() == "TORCH_SDPA"
    with use_attn_backend("SPEC_ONLY"):
        assert get_attn_backend(64, torch.float32) is SpecBackend
        assert get_attn_backend(64, torch.float32, (AttentionBackendEnum.TORCH_SDPA,)).get_name() == "TORCH_SDPA"
    with pytest.raises(BackendUnavailable), use_attn_backend("FLASH_ATTN"):
        get_attn_backend(64, torch.float32)


def test_a_decision_is_logged_once(qkv, caplog) -> None:
    from fastvideo.attention.selector import decide

    decide.cache_clear()
    with caplog.at_level(logging.INFO, logger="fastvideo.attention"):
        attention(*qkv, scale=0.123)
        attention(*qkv, scale=0.123)
    assert len([record for record in caplog.records if "TORCH_SDPA runs" in record.getMessage()]) == 1


def test_explain_is_data_and_a_table() -> None:
    report = explain(**WAN, system="A100, no flash-attn", mask="bool", causal=True)
    data = json.loads(json.dumps(report.as_dict()))
    assert data["chosen"] == "TORCH_SDPA"
    assert {row["backend"] for row in data["backends"]} >= {"FLASH_ATTN", "TORCH_SDPA", "VIDEO_SPARSE_ATTN"}
    table = str(report).splitlines()
    assert table[0].startswith("machine: A100 (capability 8.0)")
    assert any(line.startswith("TORCH_SDPA") and "chosen" in line for line in table)
    assert report.reasons("VIDEO_SPARSE_ATTN")


def test_explain_names_the_distribution_that_owns_the_same_import_name(monkeypatch) -> None:
    import importlib.metadata

    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.7.0" if name == "fastvideo" else real(name))
    assert "pip uninstall fastvideo" in explain(**WAN, system="H200").notes[0]


@pytest.mark.parametrize(
    "arguments",
    [
        {"heads": 0},
        {"seq": 0},
        {"mask": "round"},
        {"scale": float("nan")},
        {"system": "Abacus"},
        {"system": "H200, no such-package"},
        {"system": "H200", "device": "cpu"},
        {"kv_heads": 7},
        {"batch": 0},
        {"dropout_p": 1.0},
    ],
)
def test_explain_refuses_nonsense(arguments) -> None:
    with pytest.raises(ValueError, match=r".+"):
        explain(**{**WAN, **arguments})


@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)])
def test_explain_knows_short_names_of_dtypes(name, dtype) -> None:
    assert explain(**WAN, dtype=name).decision.request.dtype == dtype


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("dtype", "float33", "float33"),
        ("seq", True, "expected an integer seq, got True"),
        ("batch", 2.0, r"expected an integer batch, got 2\.0"),
        *((name, "no", f"expected {name} as a bool, got 'no'") for name in ("causal", "needs_grad", "needs_lse", "has_gate")),
    ],
)
def test_explain_refuses_wrong_types(name, value, text) -> None:
    with pytest.raises(TypeError, match=text):
        explain(**{**WAN, name: value})


def test_the_message_begins_with_why_the_named_backend_cannot_run(qkv) -> None:
    with pytest.raises(BackendUnavailable) as caught:
        attention(*qkv, backend="VIDEO_SPARSE_ATTN", is_causal=True)
    first, call, *others = str(caught.value).splitlines()
    reason = "causal attention is not supported: tiles see each other in both directions"
    assert first == f"backend VIDEO_SPARSE_ATTN, asked for by call, can't run this: {reason}"
    assert call == "  the call: query [2, 24, 4, 16], key [2, 24, 4, 16], float32, cpu, causal"
    assert "  - TORCH_SDPA: accepts" in others
    assert not any("VIDEO_SPARSE_ATTN" in line for line in others)
    with pytest.raises(BackendUnavailable) as caught:
        attention(*qkv, backend="FLASH_ATTN")
    reasons = caught.value.decision.trace[0].reasons
    lines = str(caught.value).partition("this: ")[2].splitlines()
    assert lines[: len(reasons)] == [reasons[0], *(f"    {reason}" for reason in reasons[1:])]


def test_names_that_nobody_has(monkeypatch) -> None:
    with pytest.raises(UnknownBackend, match="no attention backend is called 'NO_ATENTION'; ") as caught:
        use_attn_backend("NO_ATENTION").__enter__()
    assert "NO_ATTENTION" not in str(caught.value)
    monkeypatch.setenv("FASTVIDEO_ATTENTION_BACKEND", "flash")
    with pytest.raises(UnknownBackend, match=r"^FASTVIDEO_ATTENTION_BACKEND: no .* called 'flash'; did you mean FLASH_ATTN"):
        get_attn_backend(64, torch.float32)


@pytest.mark.parametrize("door", [partial(LocalAttention, 4, 16), partial(get_attn_backend, 64, torch.float32)])
def test_supported_backends_are_some_backends(door) -> None:
    with pytest.raises(ValueError, match=r"expected at least one backend to support, or None for every one, got \(\)"):
        door(supported_attention_backends=())
    for single in ("TORCH_SDPA", AttentionBackendEnum.TORCH_SDPA, SpecBackend):
        with pytest.raises(TypeError, match=r"expected supported_attention_backends as a tuple, got .*; write \(backend,\)"):
            door(supported_attention_backends=single)


def test_get_attn_backend_refuses_wrong_types() -> None:
    with pytest.raises(TypeError, match=r"torch.dtype, such as torch.bfloat16, got 'bfloat16'"):
        get_attn_backend(64, "bfloat16")
    with pytest.raises(TypeError, match="expected an integer head_size, got '64'"):
        get_attn_backend("64", torch.bfloat16)


def test_a_class_means_itself_and_not_the_name_it_inherits(qkv) -> None:
    from fastvideo.attention.backends.torch_sdpa import TorchSDPABackend

    class ZeroImpl(SpecImpl):
        def forward(self, query, key, value, attn_metadata):
            return torch.zeros_like(query) + len(self.prefix)

    class ZeroBackend(TorchSDPABackend):
        @staticmethod
        def get_impl_cls():
            return ZeroImpl

    with pytest.raises(UnknownBackend, match="is not registered"):
        attention(*qkv, backend=ZeroBackend)
    register_attn_backend("ZERO", ZeroBackend)
    assert attention(*qkv, backend=ZeroBackend).abs().max() == 0
    # What the class inherits doesn't make its implementations shared: each layer keeps its own, with its prefix.
    layers = [LocalAttention(4, 16, backend=ZeroBackend, prefix=prefix) for prefix in ("a", "abc")]
    assert [float(layer(*qkv).max()) for layer in layers] == [len("a.impl"), len("abc.impl")]


@pytest.mark.parametrize("name", ["MY OWN", "auto", " ", "", 3])
def test_names_are_names(name) -> None:
    with pytest.raises(ValueError, match="letters, digits and underscores"):
        register_attn_backend(name, SpecBackend)


def test_a_plug_in_that_raises_anything_stops_nobody_else(qkv, tmp_path, monkeypatch) -> None:
    (tmp_path / "raises_at_import.py").write_text("raise OSError('libmissing.so: cannot open')")
    monkeypatch.syspath_prepend(str(tmp_path))
    register_attn_backend("RAISES", "raises_at_import:Backend")
    attention(*qkv, scale=0.321)
    with pytest.raises(BackendUnavailable, match="can't be loaded: OSError: libmissing"):
        attention(*qkv, backend="RAISES")


def test_one_version_means_one_distribution() -> None:
    machine = describe_system("H200, torch only, flash-attn==2.8.3")
    assert machine.packages == (("flash-attn", "2.8.3"),)
    assert explain(**WAN, system=machine).chosen == "TORCH_SDPA"


def test_an_exact_backend_with_metadata_is_chosen_when_its_metadata_is_set(qkv) -> None:
    from dataclasses import dataclass

    from fastvideo.forward_context import set_forward_context

    @dataclass
    class Step(AttentionMetadata):
        pass

    class StepBackend(SpecBackend):
        exact = True

        @staticmethod
        def get_metadata_cls():
            return Step

    register_attn_backend("STEP", StepBackend)
    layer = LocalAttention(4, 16, supported_attention_backends=("STEP",))
    with pytest.raises(BackendUnavailable, match="needs metadata of class Step"):
        layer(*qkv)
    with set_forward_context(0, Step(0)):
        torch.testing.assert_close(layer(*qkv), attention(*qkv, backend="TORCH_SDPA"))


def test_hooks_that_reorder_tokens_reach_every_result(qkv) -> None:
    class ReversedImpl(AttentionImpl):
        def preprocess_qkv(self, qkv, attn_metadata):
            return qkv.flip(1)

        def postprocess_output(self, output, attn_metadata):
            return output.flip(1)

        def forward(self, query, key, value, attn_metadata, *, attn_mask=None, return_lse=False, out=None):
            scores = torch.einsum("bqhd,bkhd->bhqk", query, key) * self.softmax_scale
            result = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), value)
            result = result if out is None else out.copy_(result)
            return (result, scores.logsumexp(-1).transpose(1, 2)) if return_lse else result

    class ReversedBackend(SpecBackend):
        accept_output_buffer = True

        @staticmethod
        def get_impl_cls():
            return ReversedImpl

    register_attn_backend("REVERSED", ReversedBackend)
    expected, expected_lse = attention(*qkv, return_lse=True, backend="TORCH_SDPA")
    found, lse = attention(*qkv, return_lse=True, backend="REVERSED")
    torch.testing.assert_close((found, lse), (expected, expected_lse))
    buffer = torch.empty_like(qkv[0])
    returned = LocalAttention(4, 16, backend="REVERSED")(*qkv, out=buffer)
    assert returned.data_ptr() == buffer.data_ptr()
    torch.testing.assert_close(buffer, expected)
    with pytest.raises(BackendUnavailable, match="a mask stays in their order"):
        attention(*qkv, backend="REVERSED", attn_mask=torch.ones(2, 24, dtype=torch.bool))
    with pytest.raises(BackendUnavailable, match="causal attention stays in their order"):
        attention(*qkv, backend="REVERSED", is_causal=True)
    with pytest.raises(BackendUnavailable, match="when a gradient is needed"):
        attention(qkv[0].requires_grad_(), *qkv[1:], backend="REVERSED", out=buffer)


def test_a_hook_that_keeps_the_order_takes_masks_and_causal(qkv) -> None:
    class ScaledImpl(TorchSDPAImpl):
        def preprocess_qkv(self, qkv, attn_metadata):
            return 2 * qkv

    class ScaledBackend(SpecBackend):
        keeps_token_order = True

        @staticmethod
        def get_impl_cls():
            return ScaledImpl

    register_attn_backend("SCALED", ScaledBackend)
    doubled, mask = [2 * x for x in qkv], torch.ones(2, 24, dtype=torch.bool)
    mask[:, 20:] = False
    for options in ({"is_causal": True}, {"attn_mask": mask}):
        expected = attention(*doubled, backend="TORCH_SDPA", **options)
        torch.testing.assert_close(attention(*qkv, backend="SCALED", **options), expected)
