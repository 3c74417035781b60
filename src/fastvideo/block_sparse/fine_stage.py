"""Video Sparse Attention once its tiles are chosen: the fine part, the text's attention and the gated coarse part.

One custom op with an autograd formula. The coarse part is added in the epilogue of implementations that can (`forward_into`),
else to the fine output where that lies. What the backward needs beside inputs and output is the log-sum-exp and the lists: it
takes the coarse part off again, since `delta = rowsum(dout * fine)` is that of the fine output alone.

Shape legend: B batch, S video tokens, R replicated tokens, N tiles, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastvideo.block_sparse.eager import eager_function, function_of, without_autocast
from fastvideo.block_sparse.geometry import VideoGeometry, geometry_of
from fastvideo.block_sparse.impl import AUTOMATIC, GatedTiles, Implementation, choose_implementation, load_implementation
from fastvideo.block_sparse.impl.reference import accumulation_dtype
from fastvideo.block_sparse.pattern import BlockPattern
from fastvideo.platforms.triton_support import device_of, runs_triton
from fastvideo.video import tile_sum

_KERNEL_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def attend_to_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coarse: Tensor | None,
    gate: Tensor | None,
    indices: Tensor,
    geometry: VideoGeometry,
    scale: float,
    impl: str | None,
) -> Tensor:
    """Attention of video tokens over their tiles and the text, plus `coarse * gate`; of the text over everything.

    Args:
        query: `[B, S + R, Hq, D]`.
        key: `[B, S + R, Hkv, D]`.
        value: `[B, S + R, Hkv, D]`.
        coarse: `[B, N, Hq, D]`, or None without `gate`.
        gate: `[B, S, Hq, D]`, or None.
        indices: `[B, Hq, N, k]` int32, the kept tiles, ascending.
        geometry: Grid, tiles and R.
        scale: Factor of the scores.
        impl: Name of a block-sparse implementation; None picks one.

    Returns:
        `[B, S + R, Hq, D]`.
    """
    grid = geometry.grid
    name = AUTOMATIC if impl is None else impl
    tensors = (query, key, value, coarse, gate, indices)
    run = eager_function(_forward_op, _EagerFine, tensors)
    out: Tensor = run(*tensors, grid.grid_tyx, grid.tile_tyx, geometry.num_replicated, scale, name)[0]
    return out


def add_gated_tiles(out: Tensor, coarse: Tensor, gate: Tensor, geometry: VideoGeometry) -> Tensor:
    """`out` with `coarse[tile of token] * gate` added to its first S tokens; passes no gradient."""
    result: Tensor = _add_gated_op(out, coarse, gate, geometry.grid.grid_tyx, geometry.grid.tile_tyx)
    return result


@torch.library.custom_op("fastvideo::add_gated_tiles", mutates_args=())
def _add_gated_op(out: Tensor, coarse: Tensor, gate: Tensor, grid_tyx: Sequence[int], tile_tyx: Sequence[int]) -> Tensor:
    geometry = geometry_of(grid_tyx, tile_tyx, out.device)
    result = out.clone(memory_format=torch.contiguous_format)
    video = result[:, : geometry.video_tiles.num_tokens]
    _add_gated(video, coarse, gate, video, geometry)
    return result


@_add_gated_op.register_fake
def _(out: Tensor, *_rest: Any) -> Tensor:
    return torch.empty_like(out, memory_format=torch.contiguous_format)


class _Call:
    """One call's patterns and implementations."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        indices: Tensor,
        geometry: VideoGeometry,
        impl: str,
    ) -> None:
        self.geometry, self.num_video = geometry, geometry.video_tiles.num_tokens
        key_tiles, text_keys = geometry.key_tiles, geometry.text_keys
        if text_keys is not None:
            indices = torch.cat([indices, text_keys.expand(*indices.shape[:3], -1)], dim=-1)
        self.video_pattern = BlockPattern(self.geometry.video_tiles, key_tiles, indices)
        self.video = self._implementation(self.video_rows(query), key, value, self.video_pattern, impl)
        if self.geometry.text_tiles is not None and self.geometry.text_lists is not None:
            self.text_pattern = BlockPattern(self.geometry.text_tiles, key_tiles, self.geometry.text_lists)
            self.text = self._implementation(self.text_rows(query), key, value, self.text_pattern, impl)

    @staticmethod
    def _implementation(query: Tensor, key: Tensor, value: Tensor, pattern: BlockPattern, impl: str) -> Implementation:
        return load_implementation(choose_implementation(query, key, value, pattern, impl or None)[0])

    def video_rows(self, x: Tensor) -> Tensor:
        """The rows of the video in `[B, S + R, ...]`: without text the tensor itself, since a view costs the host time."""
        return x if self.geometry.text_tiles is None else x[:, : self.num_video]

    def text_rows(self, x: Tensor) -> Tensor:
        """The rows of the text."""
        return x[:, self.num_video :]


def run_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coarse: Tensor | None,
    gate: Tensor | None,
    indices: Tensor,
    grid_tyx: Sequence[int],
    tile_tyx: Sequence[int],
    num_replicated: int,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """The custom op behind `attend_to_tiles`: the output and the log-sum-exp, `[B, S + R, Hq]`."""
    geometry = geometry_of(grid_tyx, tile_tyx, query.device, num_replicated)
    with without_autocast(query.device.type):
        return forward_of(query, key, value, coarse, gate, indices, geometry, scale, impl)


def forward_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coarse: Tensor | None,
    gate: Tensor | None,
    indices: Tensor,
    geometry: VideoGeometry,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """What `run_forward` gives, without autocast; no gradient passes."""
    call = _Call(query, key, value, indices, geometry, impl)
    added = None if coarse is None or gate is None else GatedTiles(gate, coarse)
    if geometry.text_tiles is None and call.video.forward_into is None:
        fine, lse = call.video.forward(query, key, value, call.video_pattern, scale)
        return _add_gated(fine, coarse, gate, fine, geometry), lse
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(*query.shape[:3], dtype=accumulation_dtype(query.dtype))
    video, text = call.video_rows, call.text_rows
    inputs = (video(query), key, value)
    _write(call.video, inputs, call.video_pattern, scale, video(out), video(lse), added, geometry)
    if geometry.text_tiles is not None:
        inputs = (text(query), key, value)
        _write(call.text, inputs, call.text_pattern, scale, text(out), text(lse), None, geometry)
    return out, lse


def _write(
    implementation: Implementation,
    inputs: tuple[Tensor, Tensor, Tensor],
    pattern: BlockPattern,
    scale: float,
    out: Tensor,
    lse: Tensor,
    added: GatedTiles | None,
    geometry: VideoGeometry,
) -> None:
    """Write attention, plus what is to be added, to rows of the whole call's output and log-sum-exp."""
    if implementation.forward_into is not None:
        implementation.forward_into(*inputs, pattern, scale, out, lse, added)
        return
    fine, fine_lse = implementation.forward(*inputs, pattern, scale)
    lse.copy_(fine_lse)
    if added is None:
        out.copy_(fine)
    else:
        _add_gated(fine, added.coarse, added.gate, out, geometry)


_forward_op = torch.library.custom_op("fastvideo::video_sparse_fine", run_forward, mutates_args=())


@_forward_op.register_fake
def _(query: Tensor, *_rest: Any) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    return out, query.new_empty(query.shape[:3], dtype=accumulation_dtype(query.dtype))


@torch.library.custom_op("fastvideo::video_sparse_fine_backward", mutates_args=())
def _backward_op(
    dout: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    coarse: Tensor | None,
    gate: Tensor | None,
    indices: Tensor,
    out: Tensor,
    lse: Tensor,
    grid_tyx: Sequence[int],
    tile_tyx: Sequence[int],
    num_replicated: int,
    scale: float,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    call = _Call(query, key, value, indices, geometry_of(grid_tyx, tile_tyx, query.device, num_replicated), impl)
    video_query, video_dout, video_out, video_lse = (call.video_rows(x) for x in (query, dout, out, lse))
    dcoarse, dgate = query.new_empty(0), query.new_empty(0)
    with without_autocast(query.device.type):
        dlse = None
        if coarse is not None and gate is not None:
            gated = (coarse, gate, call.geometry)
            if call.video.is_delta_given and _in_kernels(video_out):
                dlse, dcoarse, dgate = _differentiate_added(video_dout, *gated)
            else:
                video_out, dcoarse, dgate = _differentiate_gated(video_out, video_dout, *gated)
        dq, dk, dv = call.video.backward(
            video_dout, dlse, video_query, key, value, video_out, video_lse, call.video_pattern, scale
        )
        del video_out, dlse
        if num_replicated:
            text_query, text_dout, text_out, text_lse = (call.text_rows(x) for x in (query, dout, out, lse))
            text = call.text.backward(text_dout, None, text_query, key, value, text_out, text_lse, call.text_pattern, scale)
            dq, dk, dv = torch.cat([dq, text[0]], dim=1), dk.add_(text[1]), dv.add_(text[2])
    return dq, dk, dv, dcoarse, dgate


@_backward_op.register_fake
def _(
    _dout: Tensor, query: Tensor, key: Tensor, value: Tensor, coarse: Tensor | None, gate: Tensor | None, *_rest: Any
) -> tuple[Tensor, ...]:
    like = (query, key, value, coarse, gate)
    return tuple(query.new_empty(0) if x is None else x.new_empty(x.shape) for x in like)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.settings = inputs[6:]


def _differentiate(ctx: Any, dout: Tensor | None, _dlse: Tensor | None) -> tuple[Tensor | None, ...]:
    nothing = (None,) * (1 + len(ctx.settings))
    if dout is None:
        return (None,) * 5 + nothing
    query, key, value, coarse, gate, *rest = ctx.saved_tensors
    *grads, dcoarse, dgate = _backward_op(dout, query, key, value, coarse, gate, *rest, *ctx.settings)
    return (*grads, None if coarse is None else dcoarse, None if gate is None else dgate, *nothing)


_forward_op.register_autograd(_differentiate, setup_context=_save)
_EagerFine = function_of(_forward_op, _differentiate, _save)


def _in_kernels(x: Tensor) -> bool:
    return x.dtype in _KERNEL_DTYPES and runs_triton(x.device)


def _add_gated(fine: Tensor, coarse: Tensor | None, gate: Tensor | None, out: Tensor, geometry: VideoGeometry) -> Tensor:
    """Write `fine + coarse[tile of token] * gate` to `out`, which may be `fine`."""
    if coarse is None or gate is None:
        return fine
    if _in_kernels(fine):
        from fastvideo.block_sparse.gate_kernels import launch_add_gated

        with device_of(fine):
            launch_add_gated(fine, coarse, gate, out, geometry.video_tiles)
        return out
    return torch.addcmul(fine, coarse.to(fine.dtype).index_select(1, geometry.tile_of_token), gate, out=out)


def _differentiate_added(dout: Tensor, coarse: Tensor, gate: Tensor, geometry: VideoGeometry) -> tuple[Tensor, Tensor, Tensor]:
    """What the gated output's gradient is to a backward that is given this output, and the gradients of `coarse` and `gate`.

    `rowsum(dout * fine) = rowsum(dout * out) - rowsum(dout * coarse * gate)`: the latter, `[B, S, H]`, takes the place of the
    log-sum-exp's gradient. No fine output is made, nor rounded again.
    """
    from fastvideo.block_sparse.gate_kernels import launch_gated_backward

    batch, num_tokens, num_heads, _ = gate.shape
    dlse = gate.new_empty(batch, num_heads, num_tokens, dtype=torch.float32).transpose(1, 2)
    dgate, dcoarse = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (gate, coarse))
    with device_of(gate):
        launch_gated_backward(None, dout, coarse, gate, geometry.video_tiles, dlse, dcoarse, dgate)
    return dlse, dcoarse, dgate


def _differentiate_gated(
    out: Tensor, dout: Tensor, coarse: Tensor, gate: Tensor, geometry: VideoGeometry
) -> tuple[Tensor, Tensor, Tensor]:
    """The fine output `[B, S, H, D]` and the gradients of `coarse` and `gate`."""
    if _in_kernels(out):
        from fastvideo.block_sparse.gate_kernels import launch_gated_backward

        fine, dgate = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (out, gate))
        dcoarse = torch.empty_like(coarse, memory_format=torch.contiguous_format)
        with device_of(out):
            launch_gated_backward(out, dout, coarse, gate, geometry.video_tiles, fine, dcoarse, dgate)
        return fine, dcoarse, dgate
    dcoarse = tile_sum(dout * gate, geometry.grid).to(coarse.dtype)
    of_token = coarse.to(out.dtype).index_select(1, geometry.tile_of_token)
    return torch.addcmul(out, of_token, gate, value=-1), dcoarse, of_token.mul_(dout)
