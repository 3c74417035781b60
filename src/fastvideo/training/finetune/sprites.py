"""Shards of rendered sprite clips, to fine-tune the bundled kind of model on: pixels for latents, and its own embeddings."""

from __future__ import annotations

from pathlib import Path

import torch

from fastvideo.models.sprites.atlas import load_atlas
from fastvideo.models.sprites.pipeline import SpriteVideoModel
from fastvideo.models.sprites.scenes import ScenePool, Split, render
from fastvideo.training.finetune.config import derived_seed
from fastvideo.training.finetune.data import write_null_text, write_shard

__all__ = ["write_sprite_shards"]


@torch.no_grad()
def write_sprite_shards(
    folder: Path,
    model: SpriteVideoModel,
    num_clips: int,
    *,
    split: Split = "train",
    num_frames: int | None = None,
    frame_size: int | None = None,
    shard_size: int = 64,
    seed: int = 0,
) -> list[Path]:
    """Write clips `[N, 3, T, Y, X]` in [-1, 1] with the embeddings of their prompts, and that of the null prompt.

    Args:
        folder: Made where it is missing; must hold no shards yet.
        model: Whose text encoder embeds the prompts; its frames and size are the defaults.
        num_clips: How many.
        split: "train", or "held_out" for scenes that training never shows.
        num_frames: Frames of a clip.
        frame_size: Rows and columns of a clip: 64, 32, 16 or 8.
        shard_size: Clips of a shard.
        seed: Of scenes and places.

    Returns:
        The shards.

    Raises:
        FileExistsError: The folder holds shards.
        ValueError: A number is out of range.

    Example:
        >>> import tempfile
        >>> from fastvideo.models.sprites.pipeline import bundled_model
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = SpriteVideoModel.load(bundled_model())
        ...     [path.name for path in write_sprite_shards(Path(folder), model, 3, frame_size=8, shard_size=2)]
        ['00000.safetensors', '00001.safetensors']
    """
    frames, rows, _ = model.video_tyx
    num_frames, frame_size = num_frames or frames, frame_size or rows
    if min(num_clips, num_frames, shard_size) < 1:
        raise ValueError(f"expected at least one clip, frame and clip of a shard, got {num_clips}, {num_frames}, {shard_size}")
    if folder.is_dir() and any(folder.glob("*.safetensors")):
        raise FileExistsError(f"{folder} holds shards already; give another folder, or remove them")
    pool, atlas = ScenePool(split), load_atlas()
    paths = []
    for number, first in enumerate(range(0, num_clips, shard_size)):
        generator = torch.Generator().manual_seed(derived_seed(seed, split, number))
        scenes = pool.sample(min(shard_size, num_clips - first), generator)
        clips = render(scenes, atlas, num_frames=num_frames, frame_size=frame_size)
        paths.append(folder / f"{number:05}.safetensors")
        write_shard(paths[-1], clips, model.text_encoder(scenes.token_ids()))
    write_null_text(folder, model.embed([None])[0])
    return paths
