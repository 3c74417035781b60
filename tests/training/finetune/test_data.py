"""Shards: what is written is read, bad ones are named and refused, and an epoch reads each example once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fastvideo.models.wan import WanConfig
from fastvideo.training.finetune.batches import BatchSource
from fastvideo.training.finetune.config import FinetuneConfig
from fastvideo.training.finetune.data import LatentFolder, epoch_of_batches, write_null_text, write_shard
from fastvideo.training.finetune.parallel import devices

MODEL = WanConfig(in_channels=4, out_channels=4, text_dim=8)
LATENTS, TEXT = torch.randn(3, 4, 2, 4, 6), torch.randn(3, 5, 8)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    others = torch.randn(2, 4, 1, 2, 2).bfloat16()
    write_shard(tmp_path / "a.safetensors", LATENTS, TEXT)
    write_shard(tmp_path / "b.safetensors", others, TEXT[:2].half())
    write_null_text(tmp_path, TEXT[0])
    folder = LatentFolder(tmp_path, MODEL)
    assert len(folder) == 5
    assert folder.shapes == [((4, 2, 4, 6), (5, 8))] * 3 + [((4, 1, 2, 2), (5, 8))] * 2
    for index in range(5):
        latent, text, condition = folder.read(index)
        assert condition is None
        assert torch.equal(latent, LATENTS[index] if index < 3 else others[index - 3])
        assert torch.equal(text, TEXT[index] if index < 3 else TEXT[index - 3].half())
    assert torch.equal(folder.null_text, TEXT[0])


BAD = {
    "other names": ({"latent": LATENTS, "text": TEXT}, ValueError, r"tensors `latents`, `text`, got \['latent', 'text'\]"),
    "other counts": ({"latents": LATENTS, "text": TEXT[:2]}, ValueError, "as many latents as texts"),
    "one video": ({"latents": LATENTS[0], "text": TEXT[0]}, ValueError, r"latents as \[N, C, T, Y, X\]"),
    "other channels": ({"latents": LATENTS[:, :3], "text": TEXT}, ValueError, r"latents \[N, 4, T, Y, X\]"),
    "half patches": ({"latents": LATENTS[:, :, :, :3], "text": TEXT}, ValueError, r"whole patches of \(1, 2, 2\)"),
    "other text": ({"latents": LATENTS, "text": TEXT[..., :7]}, ValueError, r"text \[N, L, 8\], got \[3, 5, 7\]"),
    "integers": ({"latents": LATENTS.int(), "text": TEXT}, TypeError, "latents in a float dtype, got torch.int32"),
    "nothing": ({"latents": LATENTS[:0], "text": TEXT[:0]}, ValueError, "at least one"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_shards_are_named_and_refused(tmp_path: Path, name: str) -> None:
    tensors, error, text = BAD[name]
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / "bad.safetensors")
    with pytest.raises(error, match=rf"bad\.safetensors: .*{text}"):
        LatentFolder(tmp_path, MODEL)


def test_bad_folders_and_values_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is no folder"):
        LatentFolder(tmp_path / "missing", MODEL)
    with pytest.raises(FileNotFoundError, match="holds no shard"):
        LatentFolder(tmp_path, MODEL)
    (tmp_path / "a.safetensors").write_bytes(b"no safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors is no readable safetensors file"):
        LatentFolder(tmp_path, MODEL)
    spoilt = LATENTS.clone()
    spoilt[1, 0, 0, 0, 0] = torch.nan
    write_shard(tmp_path / "a.safetensors", spoilt, TEXT)
    folder = LatentFolder(tmp_path, MODEL)
    assert torch.equal(folder.read(0)[0], LATENTS[0])
    with pytest.raises(ValueError, match=r"latents\[1\] holds NaN"):
        folder.read(1)
    write_null_text(tmp_path, TEXT[0, :4])
    with pytest.raises(ValueError, match=r"expected \[5\] text tokens, as the shards have, got 4"):
        LatentFolder(tmp_path, MODEL)
    with pytest.raises(ValueError, match=r"ends in \.safetensors"):
        write_shard(tmp_path / "a.pt", LATENTS, TEXT)
    with pytest.raises(TypeError, match="float dtype"):
        write_shard(tmp_path / "b.safetensors", LATENTS, TEXT.int())


CONDITIONED = dataclasses.replace(MODEL, in_channels=9)


def test_a_condition_is_read_with_its_example(tmp_path: Path) -> None:
    condition = torch.randn(3, 5, 2, 4, 6)
    write_shard(tmp_path / "a.safetensors", LATENTS, TEXT, condition)
    folder = LatentFolder(tmp_path, CONDITIONED)
    for index in range(3):
        assert torch.equal(folder.read(index).latent, LATENTS[index])
        assert torch.equal(folder.read(index).condition, condition[index])
    with devices("cpu") as on:
        source = BatchSource(folder, FinetuneConfig(batch_size=3, precision="bfloat16"), on)
        batch = source.part(0)
    for latent, found in zip(batch.clean, batch.condition, strict=True):
        [index] = [index for index in range(3) if torch.equal(LATENTS[index], latent)]
        assert torch.equal(found, condition[index].bfloat16())
    with pytest.raises(ValueError, match="input has no channels that a shard would bring"):
        LatentFolder(tmp_path, MODEL)
    with pytest.raises(ValueError, match=r"expected condition \[N, 2, T, Y, X\]"):
        LatentFolder(tmp_path, CONDITIONED, num_appended=3)
    with pytest.raises(ValueError, match="no channels that a shard would bring"):
        LatentFolder(tmp_path, CONDITIONED, num_appended=5)
    with pytest.raises(ValueError, match="is narrower than its output"):
        LatentFolder(tmp_path, MODEL, num_appended=1)
    write_shard(tmp_path / "b.safetensors", LATENTS, TEXT)
    with pytest.raises(ValueError, match=r"b\.safetensors: expected .*`condition`, .*; `condition` is \[N, 5, T, Y, X\]"):
        LatentFolder(tmp_path, CONDITIONED)
    with pytest.raises(ValueError, match="of the latents' frames"):
        write_shard(tmp_path / "c.safetensors", LATENTS, TEXT, condition[:, :, :1])
    with pytest.raises(ValueError, match="as many latents as texts"):
        write_shard(tmp_path / "c.safetensors", LATENTS, TEXT, condition[:2])


def test_an_epoch_reads_each_example_once() -> None:
    small, large = ((4, 1, 2, 2), (5, 8)), ((4, 2, 2, 2), (5, 8))
    shapes = [small] * 7 + [large] * 9
    epochs = [epoch_of_batches(shapes, 3, seed=0, epoch=epoch) for epoch in (0, 1)]
    for batches in epochs:
        assert [len(batch) for batch in batches] == [3] * 5
        assert all(len({shapes[index] for index in batch}) == 1 for batch in batches)
        assert len({index for batch in batches for index in batch}) == 15
    assert epochs[0] != epochs[1]
    assert epochs[0] == epoch_of_batches(shapes, 3, seed=0, epoch=0) != epoch_of_batches(shapes, 3, seed=1, epoch=0)


def test_draws_depend_on_the_place_in_the_batch_alone(tmp_path: Path) -> None:
    count = 400
    write_shard(tmp_path / "a.safetensors", torch.zeros(count, 4, 1, 2, 2), torch.ones(count, 5, 8))
    write_null_text(tmp_path, torch.zeros(5, 8))
    store = LatentFolder(tmp_path, MODEL)
    config = FinetuneConfig(batch_size=count, text_dropout=0.25, noise_shift=3.0, precision="float32")
    with devices("cpu") as on:
        whole = BatchSource(store, config, on).part(7)
        parts = [BatchSource(store, config, on, num_parts=4).part(7, part) for part in range(4)]
        others = {
            "step": BatchSource(store, config, on).part(8),
            "seed": BatchSource(store, dataclasses.replace(config, seed=1), on).part(7),
            "evaluation": BatchSource(store, config, on, is_evaluation=True).part(7),
        }
    for name in ("clean", "noise", "sigmas", "text"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    for name, other in others.items():
        assert (other.noise - whole.noise).abs().min() > 0, name
    assert whole.noise.unique().numel() > 0.99 * whole.noise.numel()
    assert abs(whole.noise.mean()) < 0.05
    assert abs(whole.noise.std() - 1) < 0.05
    assert 0.15 < (whole.text == 0).float().mean() < 0.35
    # The median of a logit-normal is 1/2, which a shift of 3 moves to 3/4.
    assert whole.sigmas.median() == pytest.approx(0.75, abs=0.05)
