"""The rolling cache of an autoregressive video model: fixed buffers of keys and values, and where a chunk stands in them.

A clip comes in chunks of latent frames. A frame sees the sink frames (the first of the clip), the frames of its window, and
nothing later than its own block. The rule, for frame t in block `b = t // block_frames`, with `end = (b + 1) * block_frames`:
frame f is seen if `f < end` and (`f < sink_frames` or `f >= end - window_frames`).

Frames live in slots. A sink frame keeps its slot; the others share a ring, in which a new frame takes the oldest one's.
Nothing is allocated after construction but a chunk's positions and mask, and the host never waits for the device.

Shape legend: B batch, C slots in tokens, H_kv key heads of this device, D head size, F tokens of a frame, n frames of a chunk.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from fastvideo.attention.backends.abstract import AttentionMetadata
from fastvideo.attention.validation import _FLOAT_DTYPES
from fastvideo.distributed.mesh import SequenceGroup, as_sequence_group, current_sequence_group
from fastvideo.distributed.ulysses import check_heads

__all__ = ["KVCache", "Masking", "StreamingMetadata", "block_causal_mask"]

Masking = Literal["static", "until_full", "sliced"]


@dataclass
class StreamingMetadata(AttentionMetadata):
    """Where a chunk stands in the cache, and what it sees. Positions are tensors, so a growing clip compiles nothing anew.

    Attributes:
        current_timestep: Index of the denoising step.
        frames: Positions of the chunk's frames in the clip, int64 `[n]`; rotary tables follow from them.
        slots: The chunk's places in the cache, in tokens, int64 `[n F]`.
        attn_mask: What the chunk sees of the slots handed over: key padding, bool `[B, C]`, for a chunk of one block, bool
            `[1, 1, n F, C]` otherwise, `None` where everything is seen.
        num_keys: How many slots, in tokens and from the first, are handed over to attention.
    """

    frames: torch.Tensor
    slots: torch.Tensor
    attn_mask: torch.Tensor | None
    num_keys: int

    def check_sequence(self, num_tokens: int) -> None:
        """Raise `ValueError` if the chunk doesn't have `num_tokens` tokens."""
        if self.slots.shape[0] != num_tokens:
            raise ValueError(
                f"this step was planned for a chunk of {self.frames.shape[0]} frames, {self.slots.shape[0]} tokens, got "
                f"{num_tokens} tokens; call KVCache.plan(num_frames) with the frames of this chunk"
            )


class KVCache:
    """Keys and values of the past of a clip, for all layers of a model, in memory of fixed size.

    A chunk is planned once, run as often as the sampler likes (each run overwrites the chunk's own slots, so the last one
    counts, in diffusion that of the clean chunk), and made past by `advance()`.

    Where a sequence is shared by several devices, each keeps all tokens of its share of the heads: build the cache with the
    layers' mesh, or inside the `sequence_parallel` scope that they run in.

    Args:
        batch: Videos.
        num_kv_heads: Key and value heads, of all devices together.
        head_size: Size of a head.
        tokens_per_frame: Tokens of a latent frame.
        num_layers: Layers with a cache of their own.
        max_frames: Length of the clip, whole blocks, where every frame sees all before it. Either this or a window.
        window_frames: Frames that a frame sees up to the end of its block, sink frames not counted.
        sink_frames: First frames of the clip, which all later ones see. Needs a window.
        block_frames: Frames that see each other, 1 for frame-causal models.
        max_chunk_frames: Frames of the longest chunk, a multiple of `block_frames`; `None` means `block_frames`.
        masking: How slots that nothing is seen of are kept out. `"static"`: by a mask at every step, one graph under
            `torch.compile`. `"until_full"`: by a mask until a chunk sees all slots, then by none, so that kernels without
            masks run; two graphs. `"sliced"`: only slots in use are handed over, a graph for each length until the cache is
            full. Chunks of one block need a mask in the last two only where `max_chunk_frames` is more.
        dtype: Dtype of keys and values.
        device: Where they are.
        mesh: The devices that share the sequence, as for `StreamingAttention`.

    Raises:
        NotImplementedError: The devices form a ring.
        TypeError: A size is no integer, or the dtype is no floating dtype of attention.
        ValueError: A size is out of range, or sizes don't fit each other.

    Example:
        >>> cache = KVCache(1, 2, 16, tokens_per_frame=6, window_frames=3, sink_frames=1)
        >>> cache.capacity, cache[0].shape
        (4, torch.Size([2, 1, 24, 2, 16]))
        >>> step = cache.plan(num_frames=1)
        >>> cache.advance()
        >>> step.frames.tolist(), cache.num_frames
        ([0], 1)
    """

    def __init__(
        self,
        batch: int,
        num_kv_heads: int,
        head_size: int,
        *,
        tokens_per_frame: int,
        num_layers: int = 1,
        max_frames: int | None = None,
        window_frames: int | None = None,
        sink_frames: int = 0,
        block_frames: int = 1,
        max_chunk_frames: int | None = None,
        masking: Masking = "until_full",
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        mesh: DeviceMesh | ProcessGroup | SequenceGroup | None = None,
    ) -> None:
        sizes = {
            "batch": batch,
            "num_kv_heads": num_kv_heads,
            "head_size": head_size,
            "tokens_per_frame": tokens_per_frame,
            "num_layers": num_layers,
        }
        for name, size in sizes.items():
            _check_count(name, size)
        self._max_frames, self.window_frames = _check_window(max_frames, window_frames, sink_frames, block_frames)
        self.sink_frames, self.block_frames = sink_frames, block_frames
        if self._max_frames is not None:
            # Chunks are whole blocks, so a last one that is shorter could never be planned.
            self._check_chunk("max_frames", self._max_frames)
        self.max_chunk_frames = block_frames if max_chunk_frames is None else max_chunk_frames
        self._check_chunk("max_chunk_frames", self.max_chunk_frames)
        if masking not in get_args(Masking):
            raise ValueError(f"expected masking as one of {', '.join(get_args(Masking))}, got {masking!r}")
        if dtype not in _FLOAT_DTYPES:
            raise TypeError(f"expected dtype as float16, bfloat16, float32 or float64, got {dtype!r}")
        self.masking = masking
        self.tokens_per_frame = tokens_per_frame
        # A chunk's first frame still needs its window after the chunk's last frame is written.
        slack = 0 if self._max_frames is not None else self.max_chunk_frames - block_frames
        self._ring = self.window_frames + slack
        group = current_sequence_group(as_sequence_group(mesh))
        check_heads(num_kv_heads, num_kv_heads, group)
        shape = (2, batch, self.capacity * tokens_per_frame, num_kv_heads // group.size, head_size)
        # An inference tensor couldn't be written to outside inference mode.
        with torch.inference_mode(False):
            self._buffers = tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers))
        self._num_frames = 0
        self._planned: int | None = None

    @property
    def capacity(self) -> int:
        """Frames that fit: sink frames, window, and what a chunk of several blocks needs besides."""
        return self.sink_frames + self._ring

    @property
    def num_frames(self) -> int:
        """Frames of the clip that are past."""
        return self._num_frames

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of keys and values."""
        return self._buffers[0].dtype

    @property
    def device(self) -> torch.device:
        """Where keys and values are."""
        return self._buffers[0].device

    @property
    def nbytes(self) -> int:
        """Bytes of all layers' buffers, which never change."""
        return sum(buffer.nbytes for buffer in self._buffers)

    def __len__(self) -> int:
        return len(self._buffers)

    def __getitem__(self, layer: int) -> torch.Tensor:
        """Return a layer's keys and values, `[2, B, C, H_kv, D]`, which `StreamingAttention` takes as `kv_cache`."""
        return self._buffers[layer]

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self._buffers)

    def __repr__(self) -> str:
        return (
            f"KVCache({len(self)} layers of {tuple(self[0].shape)} {self.dtype} on {self.device}, {self.num_frames} frames "
            f"past, window_frames={self.window_frames}, sink_frames={self.sink_frames}, block_frames={self.block_frames})"
        )

    def reset(self) -> None:
        """Forget the clip, for a new one in the same memory. Buffers are zeroed: a masked NaN would still spread."""
        for buffer in self._buffers:
            buffer.zero_()
        self._num_frames, self._planned = 0, None

    def plan(self, num_frames: int | None = None, *, current_timestep: int = 0) -> StreamingMetadata:
        """Return where the next frames go and what they see; they become past by `advance()`.

        Args:
            num_frames: Frames of the chunk, whole blocks; `None` means `max_chunk_frames`.
            current_timestep: Index of the denoising step, for metadata's sake.

        Raises:
            TypeError: `num_frames` is no integer.
            ValueError: The chunk is too long, no whole number of blocks, or exceeds `max_frames`.
        """
        count = self.max_chunk_frames if num_frames is None else num_frames
        self._check_chunk("num_frames", count)
        first, end = self._num_frames, self._num_frames + count
        if self._max_frames is not None and end > self._max_frames:
            raise ValueError(
                f"the clip would have {end} frames, and this cache holds max_frames={self._max_frames}; build a larger one, "
                "or one with window_frames, which has no last frame"
            )
        if count > self.max_chunk_frames:
            raise ValueError(f"expected a chunk of at most max_chunk_frames={self.max_chunk_frames} frames, got {count}")
        with torch.inference_mode(False):
            frames = torch.arange(first, end, device=self.device)
            token = torch.arange(self.tokens_per_frame, device=self.device)
            slots = (self._slot_of(frames)[:, None] * self.tokens_per_frame + token).flatten()
            num_slots = min(end, self.capacity) if self.masking == "sliced" else self.capacity
            mask = self._mask(frames, end)
        self._planned = count
        num_keys = num_slots * self.tokens_per_frame
        return StreamingMetadata(current_timestep, frames, slots, None if mask is None else mask[..., :num_keys], num_keys)

    def advance(self) -> None:
        """Make the planned chunk past.

        Raises:
            RuntimeError: No chunk is planned.
        """
        if self._planned is None:
            raise RuntimeError("no chunk is planned: call plan(num_frames), run the model with what it returns, then advance()")
        self._num_frames, self._planned = self._num_frames + self._planned, None

    def _check_chunk(self, name: str, num_frames: int) -> None:
        _check_count(name, num_frames)
        if num_frames % self.block_frames:
            raise ValueError(f"expected {name} in whole blocks of block_frames={self.block_frames}, got {num_frames}")

    def _slot_of(self, frames: torch.Tensor) -> torch.Tensor:
        in_ring = self.sink_frames + (frames - self.sink_frames) % self._ring
        return torch.where(frames < self.sink_frames, frames, in_ring)

    def _frame_in_slot(self, end: int) -> torch.Tensor:
        """Return the frame that each slot holds once frames before `end` are written, -1 for none, `[capacity]`."""
        slot = torch.arange(self.capacity, device=self.device)
        last = end - 1
        newest = last - (last - slot) % self._ring
        frame = torch.where(slot < self.sink_frames, slot, newest)
        is_used = torch.where(slot < self.sink_frames, slot < end, newest >= self.sink_frames)
        return torch.where(is_used, frame, -1)

    def _mask(self, frames: torch.Tensor, end: int) -> torch.Tensor | None:
        is_one_block = len(frames) == self.block_frames
        if is_one_block and self.masking != "static":
            # One block sees whatever is cached, as long as nothing is left from before its window.
            is_exact = self._ring == self.window_frames or end <= self.sink_frames + self.window_frames
            if is_exact and (self.masking == "sliced" or end >= self.capacity):
                return None
        held = self._frame_in_slot(end)
        seen = _is_seen(frames, held, self.window_frames, self.sink_frames, self.block_frames) & (held >= 0)
        if is_one_block:
            return seen[0].repeat_interleave(self.tokens_per_frame).expand(self[0].shape[1], -1)
        return _by_token(seen, self.tokens_per_frame)


def block_causal_mask(
    num_frames: int,
    tokens_per_frame: int,
    *,
    window_frames: int | None = None,
    sink_frames: int = 0,
    block_frames: int = 1,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Return what a whole clip sees in one pass, the same as in chunks through a `KVCache`; for training and for tests.

    Args:
        num_frames: Frames of the clip.
        tokens_per_frame: Tokens of a frame.
        window_frames: Frames that a frame sees up to the end of its block; `None` means all.
        sink_frames: First frames of the clip, which all later ones see.
        block_frames: Frames that see each other.
        device: Where the mask is.

    Returns:
        Bool `[1, 1, S, S]` with `S = num_frames * tokens_per_frame`, True attends.

    Raises:
        TypeError: A size is no integer.
        ValueError: A size is out of range.

    Example:
        >>> block_causal_mask(3, 1, window_frames=1, sink_frames=1)[0, 0].int()
        tensor([[1, 0, 0],
                [1, 1, 0],
                [1, 0, 1]], dtype=torch.int32)
    """
    _check_count("num_frames", num_frames)
    _check_count("tokens_per_frame", tokens_per_frame)
    _, window = _check_window(num_frames if window_frames is None else None, window_frames, sink_frames, block_frames)
    frames = torch.arange(num_frames, device=device)
    return _by_token(_is_seen(frames, frames, window, sink_frames, block_frames), tokens_per_frame)


def _is_seen(query: torch.Tensor, key: torch.Tensor, window: int, sink: int, block: int) -> torch.Tensor:
    """Return which key frames each query frame sees, bool `[n, keys]`."""
    end = (query // block + 1)[:, None] * block
    return (key < end) & ((key < sink) | (key >= end - window))


def _by_token(seen: torch.Tensor, tokens_per_frame: int) -> torch.Tensor:
    """Spread a mask over frames, `[n, keys]`, to `[1, 1, n F, keys F]`."""
    by_token = seen.repeat_interleave(tokens_per_frame, 0).repeat_interleave(tokens_per_frame, 1)
    return by_token[None, None]


def _check_count(name: str, value: int, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"expected {name} as an integer, got {value!r}")
    if value < least:
        raise ValueError(f"expected {name} >= {least}, got {value}")


def _check_window(
    max_frames: int | None, window_frames: int | None, sink_frames: int, block_frames: int
) -> tuple[int | None, int]:
    """Return the clip's length, if it is bounded, and the window."""
    _check_count("block_frames", block_frames)
    _check_count("sink_frames", sink_frames, least=0)
    if window_frames is None:
        if max_frames is None:
            raise ValueError("give max_frames (every frame sees all before it) or window_frames, got neither")
        if sink_frames:
            raise ValueError(f"sink_frames={sink_frames} needs window_frames: without a window every frame is seen anyway")
        _check_count("max_frames", max_frames)
        return max_frames, -(-max_frames // block_frames) * block_frames
    if max_frames is not None:
        raise ValueError(f"give max_frames or window_frames, got {max_frames} and {window_frames}")
    _check_count("window_frames", window_frames)
    if window_frames < block_frames:
        raise ValueError(f"expected a window of at least block_frames={block_frames} frames, got {window_frames}")
    return None, window_frames
