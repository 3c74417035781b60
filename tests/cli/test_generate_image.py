"""`fastvideo generate --model DIR --image FILE` on tiny pipelines of image to video: of Wan 2.1, and of both kinds of 2.2."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image

from fastvideo.cli import main
from fastvideo.cli.media import contact_sheet
from fastvideo.cli.pipeline_image import cut_to_shape, read_image
from fastvideo.testing import meeting_point

from .tiny_pipelines import components, image_encoder, sheet, transformer

PROMPT = "a fox runs over the snow"
WITH_CONDITION = {"in_channels": 36, "out_channels": 16}  # noise, a mask of 4 channels, the encoded first frame


def _wan21() -> WanImageToVideoPipeline:
    torch.manual_seed(0)
    model = transformer(**WITH_CONDITION, image_dim=20, added_kv_proj_dim=24)
    return WanImageToVideoPipeline(**components(transformer=model), **image_encoder())


def _wan22() -> WanImageToVideoPipeline:
    torch.manual_seed(0)
    models = {name: transformer(**WITH_CONDITION) for name in ("transformer", "transformer_2")}
    return WanImageToVideoPipeline(**components(**models), boundary_ratio=0.9)


def _wan22_of_5b() -> WanPipeline:
    return WanPipeline(**components(), expand_timesteps=True)


PIPELINES = {"wan 2.1": _wan21, "wan 2.2": _wan22, "wan 2.2 of 5B": _wan22_of_5b}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    for number, make in enumerate(PIPELINES.values()):
        make().save_pretrained(root / str(number))
    WanPipeline(**components()).save_pretrained(root / "text")
    return {**{name: root / str(number) for number, name in enumerate(PIPELINES)}, "text": root / "text"}


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    """A picture of twice the video's size."""
    path = tmp_path_factory.mktemp("picture") / "first.png"
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((128, 64), Image.Resampling.BICUBIC).save(path)
    return path


def command(model: Path, out: Path, *arguments: str) -> list[str]:
    settings = ["--prompt", PROMPT, "--frames", "5", "--steps", "3"]
    return ["generate", "--device", "cpu", "--model", str(model), "--out", str(out), *settings, *arguments]


def expected_sheet(folder: Path, picture: Path, **changes) -> torch.Tensor:
    """The contact sheet of what diffusers alone makes of a picture."""
    pipe = WanImageToVideoPipeline.from_pretrained(folder, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    settings = {"height": 32, "width": 64, "num_frames": 5, "num_inference_steps": 3, "output_type": "np", **changes}
    generator = torch.Generator().manual_seed(0)
    video = torch.from_numpy(pipe(Image.open(picture), PROMPT, **settings, generator=generator).frames[0])
    return contact_sheet((video * 255).round().to(torch.uint8)).int()


@pytest.mark.parametrize("name", PIPELINES)
def test_the_video_is_that_of_diffusers(folders: dict[str, Path], picture: Path, tmp_path: Path, capsys, name: str) -> None:
    out = tmp_path / "a.mp4"
    assert main(command(folders[name], out, "--image", str(picture), "--size", "64x32")) == 0
    expected = expected_sheet(folders[name], picture)
    assert (sheet(out) - expected).abs().max() <= 1
    assert re.search(r"cross +0-1 +all +auto", capsys.readouterr().out)
    # Another picture gives another video.
    Image.new("RGB", (64, 32), "navy").save(tmp_path / "other.png")
    assert main(command(folders[name], out, "--image", str(tmp_path / "other.png"), "--size", "64x32")) == 0
    assert (sheet(out) - expected).abs().max() > 20


def test_sparse_attention_and_comparison(folders: dict[str, Path], picture: Path, tmp_path: Path, capsys) -> None:
    size = ["--size", "128x64", "--compare"]  # 2 × 4 × 8 tokens, two tiles
    assert main(command(folders["wan 2.1"], tmp_path / "a.mp4", "--image", str(picture), *size)) == 0
    assert float(re.search(r"mean ([0-9.]+)", capsys.readouterr().out)[1]) == 0
    sparse = ["--sparsity", "0.5", *size]
    assert main(command(folders["wan 2.1"], tmp_path / "a.mp4", "--image", str(picture), *sparse)) == 0
    printed = capsys.readouterr().out
    assert "VIDEO_SPARSE_ATTN (sparsity=0.5)" in printed
    assert float(re.search(r"mean ([0-9.]+)", printed)[1]) > 0


def test_a_model_of_both_kinds_takes_text_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "a.mp4"
    assert main(command(folders["wan 2.2 of 5B"], out, "--size", "64x32")) == 0
    pipe = WanPipeline.from_pretrained(folders["wan 2.2 of 5B"], local_files_only=True)
    settings = {"height": 32, "width": 64, "num_frames": 5, "num_inference_steps": 3, "output_type": "np"}
    video = torch.from_numpy(pipe(PROMPT, **settings, generator=torch.Generator().manual_seed(0)).frames[0])
    assert (sheet(out) - contact_sheet((video * 255).round().to(torch.uint8)).int()).abs().max() <= 1


def test_the_middle_of_an_image_is_cut_to_the_videos_shape(folders: dict[str, Path], picture: Path, tmp_path: Path) -> None:
    wide = Image.new("RGB", (160, 64), "red")
    wide.paste(Image.open(picture), (16, 0))
    wide.save(tmp_path / "wide.png")
    assert main(command(folders["wan 2.2"], tmp_path / "a.mp4", "--image", str(tmp_path / "wide.png"), "--size", "64x32")) == 0
    assert (sheet(tmp_path / "a.mp4") - expected_sheet(folders["wan 2.2"], picture)).abs().max() <= 1
    tall = cut_to_shape(Image.new("RGB", (100, 300)), height=50, width=100)
    assert tall.size == (100, 50)


def test_pictures_are_read_upright_and_without_a_palette(picture: Path, tmp_path: Path) -> None:
    upright = Image.open(picture)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(read_image(tmp_path / "turned.png"), upright)
    Image.new("P", (4, 2)).save(tmp_path / "palette.png")
    assert read_image(tmp_path / "palette.png").mode == "RGB"


def test_refusals(folders: dict[str, Path], picture: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "text.png").write_text("no picture")
    cases = [
        ("wan 2.1", [], "makes videos from an image; give --image FILE"),
        ("text", ["--image", str(picture)], "--image is for a WanImageToVideoPipeline, and .* is a WanPipeline"),
        ("wan 2.2", ["--image", str(tmp_path / "nowhere.png")], r"--image .*nowhere\.png is no file"),
        ("wan 2.2", ["--image", str(tmp_path / "text.png")], r"--image .*text\.png can't be read as a picture"),
        ("wan 2.2", ["--image", str(picture), "--size", "60x32"], "a width that is a multiple of 16, got 60; take 48 or 64"),
    ]
    for name, extra, text in cases:
        assert main(command(folders[name], tmp_path / "x.mp4", *extra)) == 2
        assert re.search(text, capsys.readouterr().err), text
    assert main(["generate", "--image", str(picture)]) == 2
    assert "--image is for diffusers pipelines" in capsys.readouterr().err
    index = json.loads((folders["wan 2.1"] / "model_index.json").read_text())
    assert index["image_encoder"][1] == "CLIPVisionModel"


def test_two_ranks_make_the_same_video(folders: dict[str, Path], picture: Path, tmp_path: Path) -> None:
    arguments = ["--image", str(picture), "--size", "64x32"]
    assert main(command(folders["wan 2.1"], tmp_path / "one.mp4", *arguments)) == 0
    with meeting_point() as place:
        wanted = command(folders["wan 2.1"], tmp_path / "two.mp4", *arguments)
        code = f"from fastvideo.cli import main; assert main({wanted!r}) == 0"
        shared = {**os.environ, **place, "OMP_NUM_THREADS": "1", "WORLD_SIZE": "2"}
        ranks = [
            subprocess.Popen([sys.executable, "-c", code], env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(2)
        ]
        try:
            assert [rank.wait(timeout=240) for rank in ranks] == [0, 0]
        finally:
            [rank.kill() for rank in ranks]
    assert (sheet(tmp_path / "one.mp4") - sheet(tmp_path / "two.mp4")).abs().max() <= 1
