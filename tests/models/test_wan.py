"""The Wan transformer itself: building blocks by hand, masks, sparsity, gradients, compilation, folders, bad input."""

import copy
import dataclasses
import json

import pytest
import torch

from fastvideo.attention.rope import apply_rope
from fastvideo.forward_context import set_forward_context
from fastvideo.models.wan import WanConfig, WanTransformer3DModel
from fastvideo.models.wan.embeddings import patchify, rotary_tables, sinusoidal_embedding, unpatchify

TINY = WanConfig(
    patch_size=(1, 2, 2),
    num_attention_heads=2,
    attention_head_dim=16,
    in_channels=3,
    out_channels=3,
    text_dim=7,
    freq_dim=8,
    ffn_dim=48,
    num_layers=2,
    rope_max_seq_len=16,
)
TINY_VSA = dataclasses.replace(TINY, attention="vsa")
# A token grid of (4, 5, 6): full, ragged and one-row tiles of 4 x 4 x 4.
SHAPE = (4, 10, 12)


def build(config: WanConfig = TINY, seed: int = 0, dtype: torch.dtype = torch.float32) -> WanTransformer3DModel:
    """A model whose every parameter but the gate is random."""
    model = WanTransformer3DModel(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "to_gate_compress" not in name:
                noise = torch.randn(parameter.shape, generator=generator)
                centre = 1.0 if "norm" in name and name.endswith("weight") else 0.0
                parameter.copy_(centre + noise * (0.3 if parameter.ndim == 1 else parameter[0].numel() ** -0.5))
    return model.to(dtype)


def inputs(dtype: torch.dtype = torch.float32, batch: int = 2, shape=SHAPE) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    video = torch.randn(batch, 3, *shape, generator=generator).to(dtype)
    text = torch.randn(batch, 5, 7, generator=generator).to(dtype)
    return video, torch.tensor([12.5, 800.0, 431.0])[:batch], text


def run_vsa(model: WanTransformer3DModel, sparsity: float, args: tuple[torch.Tensor, ...]) -> torch.Tensor:
    metadata = model.attention_metadata(tuple(args[0].shape[2:]), 0, sparsity)
    with set_forward_context(0, metadata):
        return model(*args)


def test_patches_are_a_convolution_and_join_again():
    video = torch.randn(2, 3, 4, 6, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(5, 3, 2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.nn.functional.conv3d(video, weight, stride=(2, 3, 4)).flatten(2).mT
    torch.testing.assert_close(patchify(video, (2, 3, 4)) @ weight.flatten(1).T, expected)
    channels_last = patchify(video, (2, 3, 4)).unflatten(2, (3, -1)).mT.flatten(2)
    assert torch.equal(unpatchify(channels_last, (2, 2, 2), (2, 3, 4)), video)


def test_rotary_scores_depend_on_the_offset_alone():
    cos, sin = rotary_tables((3, 4, 5), 22, torch.device("cpu"))
    vectors = torch.randn(2, 22, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    query, key = (apply_rope(v.expand(1, 60, 1, 22), (cos, sin)).view(3, 4, 5, 22) for v in vectors)
    assert torch.equal(query[0, 0, 0], vectors[0])
    offset = (query[0, 1, 1] @ key[2, 0, 4]).item()
    assert (query[0, 3, 0] @ key[2, 2, 3]).item() == pytest.approx(offset, rel=1e-12)
    assert (query[0, 3, 0] @ key[2, 2, 2]).item() != pytest.approx(offset, rel=1e-3)
    # Channels: 22 - 2 * 6 = 10 for frames, 6 for rows, 6 for columns.
    moved = [query[1, 0, 0] != vectors[0], query[0, 1, 0] != vectors[0], query[0, 0, 1] != vectors[0]]
    assert [(m.nonzero().min().item(), m.nonzero().max().item()) for m in moved] == [(0, 9), (10, 15), (16, 21)]


def test_sinusoidal_embedding_by_hand():
    row = sinusoidal_embedding(torch.tensor([3.0]), 4)[0]
    expected = torch.tensor([3.0, 0.03], dtype=torch.float64)
    torch.testing.assert_close(row, torch.cat((expected.cos(), expected.sin())))


def test_a_fresh_model_predicts_zero_and_starts_with_a_closed_gate():
    model = WanTransformer3DModel(TINY_VSA)
    for block in model.blocks:
        assert not block.to_gate_compress.weight.any()
        assert not block.to_gate_compress.bias.any()
    with torch.no_grad():
        assert not run_vsa(model, 0.5, inputs()).any()


def test_masked_text_tokens_do_not_matter():
    model = build()
    video, timestep, text = inputs()
    mask = torch.tensor([[True, True, False, False, False], [True, True, True, True, False]])
    garbage = torch.where(mask[..., None], text, torch.full_like(text, 1e4))
    with torch.no_grad():
        masked = model(video, timestep, garbage, mask)
        first = model(video[:1], timestep[:1], text[:1, :2])
        second = model(video[1:], timestep[1:], text[1:, :4])
        whole = model(video, timestep, text)
    torch.testing.assert_close(masked, torch.cat((first, second)), rtol=1e-4, atol=1e-5)
    assert (whole - masked).abs().max() > 1e-3


def test_vsa_without_sparsity_and_with_a_closed_gate_is_the_dense_model():
    dense, sparse = build(TINY, dtype=torch.float64), build(TINY_VSA, dtype=torch.float64)
    shared = {name: weight for name, weight in sparse.state_dict().items() if "to_gate_compress" not in name}
    dense.load_state_dict(shared)
    args = inputs(torch.float64)
    with torch.no_grad():
        expected = dense(*args)
        torch.testing.assert_close(run_vsa(sparse, 0.0, args), expected, rtol=1e-10, atol=1e-10)
        assert (run_vsa(sparse, 0.6, args) - expected).abs().max() > 1e-3
        sparse.blocks[0].to_gate_compress.bias.fill_(1.0)
        assert (run_vsa(sparse, 0.0, args) - expected).abs().max() > 1e-3


def test_vsa_without_a_gate_has_no_gate_weights():
    model = build(dataclasses.replace(TINY_VSA, vsa_gate=False))
    assert model.state_dict().keys() == build(TINY).state_dict().keys()
    gated = build(TINY_VSA)
    with torch.no_grad():
        torch.testing.assert_close(run_vsa(model, 0.5, inputs()), run_vsa(gated, 0.5, inputs()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [TINY, TINY_VSA], ids=["dense", "vsa"])
def test_gradients_reach_every_parameter_and_survive_recomputation(config):
    model = build(config)
    recomputed = copy.deepcopy(model)
    recomputed.gradient_checkpointing = True
    args = inputs()
    for each in (model, recomputed):
        run_vsa(each, 0.5 if config is TINY_VSA else 0.0, args).square().mean().backward()
    for (name, parameter), other in zip(model.named_parameters(), recomputed.parameters(), strict=True):
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 1e-9, name
        torch.testing.assert_close(other.grad, parameter.grad, msg=name)


def test_a_gradient_is_the_slope_of_the_loss():
    model = build(TINY_VSA, dtype=torch.float64)
    args = inputs(torch.float64, batch=1)
    run_vsa(model, 0.0, args).square().mean().backward()
    for name in ("scale_shift_table", "patch_embedding.weight", "blocks.0.to_gate_compress.weight"):
        parameter = model.get_parameter(name)
        direction = torch.randn(parameter.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
        losses = []
        for step in (1e-5, -1e-5):
            moved = copy.deepcopy(model)
            with torch.no_grad():
                moved.get_parameter(name).add_(step * direction)
                losses.append(run_vsa(moved, 0.0, args).square().mean())
        slope = ((losses[0] - losses[1]) / 2e-5).item()
        assert (parameter.grad * direction).sum().item() == pytest.approx(slope, rel=1e-5), name


@pytest.mark.parametrize("config", [TINY, TINY_VSA], ids=["dense", "vsa"])
def test_compiles_to_one_graph_and_follows_the_context(config):
    torch._dynamo.reset()
    model = build(config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    video, timestep, text = inputs()
    mask = torch.tensor([[True] * 5, [True, True, False, False, False]])
    with torch.no_grad():
        for sparsity in (0.0, 0.6) if config is TINY_VSA else (0.0,):
            args = (video, timestep, text, mask)
            torch.testing.assert_close(run_vsa(compiled, sparsity, args), run_vsa(model, sparsity, args), rtol=1e-4, atol=1e-5)


def test_autocast_keeps_the_stream_wide():
    model = build()
    video, timestep, text = inputs()
    with torch.no_grad():
        exact = model(video, timestep, text)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(video, timestep, text)
        narrow = copy.deepcopy(model).bfloat16()(video.bfloat16(), timestep, text.bfloat16())
    assert mixed.dtype == torch.float32
    assert narrow.dtype == torch.bfloat16
    assert (mixed - exact).abs().mean() < (narrow - exact).abs().mean()


@pytest.mark.parametrize("config", [TINY, TINY_VSA], ids=["dense", "vsa"])
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_folders_keep_every_bit(config, dtype, tmp_path):
    model = build(config)
    model.save(tmp_path, dtype=dtype)
    loaded = WanTransformer3DModel.load(tmp_path)
    assert loaded.config == config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, weight in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight.to(dtype or weight.dtype)), name
    assert all(parameter.requires_grad and not parameter.is_meta for parameter in loaded.parameters())


def test_loading_casts_but_keeps_the_sensitive_parts_wide(tmp_path):
    build().save(tmp_path, dtype=torch.float16)
    loaded = WanTransformer3DModel.load(tmp_path, dtype=torch.bfloat16)
    wide = {name for name, weight in loaded.state_dict().items() if weight.dtype == torch.float32}
    parts = ("time_embedder", "scale_shift_table", "norm2")
    assert wide == {name for name in loaded.state_dict() if any(part in name for part in parts)}
    video, timestep, text = inputs()
    with torch.no_grad():
        exact = WanTransformer3DModel.load(tmp_path, dtype=torch.float32)(video, timestep, text)
        out = loaded(video.bfloat16(), timestep, text.bfloat16())
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), exact, rtol=0.1, atol=0.1)


def test_a_dense_folder_becomes_a_sparse_model_but_gates_are_never_dropped(tmp_path):
    dense = build()
    dense.save(tmp_path / "dense")
    sparse = WanTransformer3DModel.load(tmp_path / "dense", attention="vsa")
    args = inputs()
    with torch.no_grad():
        torch.testing.assert_close(run_vsa(sparse, 0.0, args), dense(*args), rtol=1e-4, atol=1e-5)
    sparse.save(tmp_path / "sparse")
    with pytest.raises(ValueError, match="gates of Video Sparse Attention, which a dense model has no place for"):
        WanTransformer3DModel.load(tmp_path / "sparse", attention="dense")


def test_unknown_and_missing_weights_are_refused(tmp_path):
    model = build()
    weights = model.state_dict()
    headless = {name: weights[name] for name in weights if name != "proj_out.weight"}
    with pytest.raises(RuntimeError, match=r"Missing key.*proj_out\.weight"):
        WanTransformer3DModel.from_weights(TINY.to_dict(), headless, attention="vsa")
    with pytest.raises(RuntimeError, match=r"Missing key.*proj_out\.bias"):
        model.load_state_dict({name: weights[name] for name in weights if name != "proj_out.bias"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*extra"):
        model.load_state_dict(weights | {"extra": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"Missing key.*to_gate_compress"):
        build(TINY_VSA).load_state_dict(weights)
    model.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_layers": 3}))
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.2\."):
        WanTransformer3DModel.load(tmp_path)


def test_incomplete_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        WanTransformer3DModel.load(tmp_path)
    build().save(tmp_path)
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds neither"):
        WanTransformer3DModel.load(tmp_path)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"num_layer": 2}, ValueError, "Did you mean num_layers"),
        ({"zzz": 2}, ValueError, "Known fields: patch_size"),
        ({"image_dim": 1280}, NotImplementedError, "image_dim=1280 asks for image conditioning"),
        ({"added_kv_proj_dim": 64}, NotImplementedError, "added_kv_proj_dim=64"),
        ({"pos_embed_seq_len": 514}, NotImplementedError, "pos_embed_seq_len=514"),
        ({"qk_norm": "rms_norm"}, NotImplementedError, "got 'rms_norm'"),
        ({"patch_size": [2, 2]}, ValueError, r"three positive edges .* got \(2, 2\)"),
        ({"num_layers": 0}, ValueError, "num_layers must be at least 1, got 0"),
        ({"attention_head_dim": 15}, ValueError, "attention_head_dim must be even"),
        ({"freq_dim": 7}, ValueError, "freq_dim must be even"),
        ({"attention": "sta"}, ValueError, "got 'sta'"),
    ],
)
def test_configurations_that_are_refused(values, error, message):
    with pytest.raises(error, match=message):
        WanConfig.from_dict(values)


def test_output_channels_default_to_input_channels():
    assert WanConfig.from_dict({"in_channels": 9, "out_channels": None}).out_channels == 9


VIDEO, TIMESTEP, TEXT = inputs()


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((VIDEO[0], TIMESTEP, TEXT), ValueError, r"must be \[B, 3, T, Y, X\], got shape \(3, 4, 10, 12\)"),
        ((VIDEO[:, :2], TIMESTEP, TEXT), ValueError, r"must be \[B, 3, T, Y, X\]"),
        ((VIDEO[..., :-1], TIMESTEP, TEXT), ValueError, r"multiples of patch_size=\(1, 2, 2\), got \(4, 10, 11\)"),
        ((VIDEO[:, :, :0], TIMESTEP, TEXT), ValueError, r"got \(0, 10, 12\)"),
        ((VIDEO.repeat(1, 1, 5, 1, 1), TIMESTEP, TEXT), ValueError, r"\(20, 5, 6\) exceeds rope_max_seq_len=16"),
        ((VIDEO, TIMESTEP[:1], TEXT), ValueError, r"timestep must be \[2\]"),
        ((VIDEO, TIMESTEP[0], TEXT), ValueError, r"timestep must be \[2\]"),
        ((VIDEO, TIMESTEP.expand(2, 2), TEXT), NotImplementedError, "noise levels per token"),
        ((VIDEO, TIMESTEP, TEXT[:1]), ValueError, r"must be \[2, L >= 1, 7\], got shape \(1, 5, 7\)"),
        ((VIDEO, TIMESTEP, TEXT[..., :6]), ValueError, r"must be \[2, L >= 1, 7\]"),
        ((VIDEO, TIMESTEP, TEXT[:, :0]), ValueError, r"must be \[2, L >= 1, 7\]"),
        ((VIDEO, TIMESTEP, TEXT, torch.ones(2, 4, dtype=torch.bool)), ValueError, r"must be \[2, 5\]"),
        ((VIDEO, TIMESTEP, TEXT, torch.ones(2, 5)), TypeError, r"must be bool .* pass mask.bool"),
        ((VIDEO.double(), TIMESTEP, TEXT), TypeError, r"weights' dtype torch.float32, got torch.float64"),
        ((VIDEO, TIMESTEP, TEXT.bfloat16()), TypeError, "encoder_hidden_states must have"),
    ],
)
def test_bad_input_is_refused(args, error, message):
    with pytest.raises(error, match=message):
        build()(*args)


def test_metadata_of_a_model():
    dense, sparse = build(), build(TINY_VSA)
    assert dense.attention_metadata(SHAPE, 0, 0.0) is None
    with pytest.raises(ValueError, match=r"A dense model has no sparsity, got 0\.5"):
        dense.attention_metadata(SHAPE, 0, 0.5)
    with pytest.raises(ValueError, match=r"got \(4, 10, 13\)"):
        sparse.attention_metadata((4, 10, 13), 0, 0.5)
    with pytest.raises(ValueError, match=r"1\.0"):
        sparse.attention_metadata(SHAPE, 0, 1.0)
    assert sparse.attention_metadata(SHAPE, 3, 0.5).current_timestep == 3
