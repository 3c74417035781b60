"""Attention at one place of a model, as the plan has it in the current phase. Processors call these and know no backend.

`B batch, S video tokens of this device, R text tokens, H heads, D head size`; tensors are `[B, S, H, D]`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from fastvideo.attention.layer import DistributedAttention, LocalAttention
from fastvideo.distributed import SequenceGroup
from fastvideo.integrations.diffusers.state import ForwardState, current_state
from fastvideo.integrations.masks import fit_mask
from fastvideo.integrations.plan import Choice, Place, exact_backends

__all__ = ["Attend", "TextAttend", "VideoAttend"]

QKV = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class Attend:
    """What the two kinds of places share: which layer runs now, and with which metadata.

    Args:
        place: The place, for messages and names.
        choices: What runs there in each phase.
        num_heads: Heads of all devices together.
        head_size: Size of a head.
        group: The devices that share the video's tokens.
        sharing: How they share them: further arguments of `DistributedAttention`.
    """

    def __init__(
        self,
        place: Place,
        choices: Sequence[Choice],
        num_heads: int,
        head_size: int,
        group: SequenceGroup,
        sharing: Mapping[str, Any],
    ) -> None:
        self.place = place
        self.choices = tuple(choices)
        self.group = group
        self.sharing = dict(sharing)
        by_backend = {choice.backend: self._make(choice.backend, num_heads, head_size) for choice in self.choices}
        self.layers = tuple(by_backend[choice.backend] for choice in self.choices)

    def _make(self, backend: str | None, num_heads: int, head_size: int) -> DistributedAttention | LocalAttention:
        raise NotImplementedError

    def _phase(self, state: ForwardState | None) -> int:
        if state is not None:
            return state.phase
        if len(self.choices) > 1 or self.choices[0].metadata is not None:
            raise RuntimeError(
                f"{self.place.path} runs outside its model's forward call, and its policy needs the step or the video's grid; "
                "call the model itself"
            )
        return 0


class TextAttend(Attend):
    """Attention whose keys every device holds: to text or images that stand apart, or within text."""

    def _make(self, backend: str | None, num_heads: int, head_size: int) -> LocalAttention:
        # A scope that asks for sparse attention means the video's tokens among each other.
        supported = exact_backends() if backend is None else None
        return LocalAttention(
            num_heads,
            head_size,
            supported_attention_backends=supported,  # type: ignore[arg-type]  # names are accepted wherever members are
            backend=backend,
            prefix=self.place.path,
        )

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend from `query`, `[B, S, H, D]`, to `key` and `value`, `[B, R, H, D]`.

        Args:
            query: Queries.
            key: Keys.
            value: Values.
            mask: Bool or additive, broadcastable to `[B, H, S, R]`.
        """
        state = current_state()
        phase = self._phase(state)
        spec = self.choices[phase].metadata
        metadata = None if spec is None or state is None else state.metadata[spec]
        fitted = None if mask is None else fit_mask(mask, query, key.shape[1])
        output: torch.Tensor = self.layers[phase](query, key, value, attn_mask=fitted, attn_metadata=metadata)
        return output


class VideoAttend(Attend):
    """Attention of the video's tokens among each other, with text tokens that the model joins to them."""

    def _make(self, backend: str | None, num_heads: int, head_size: int) -> DistributedAttention:
        # Gradients of a model's own copies add up over devices, as the averaging of data parallelism expects.
        return DistributedAttention(
            num_heads,
            head_size,
            backend=backend,
            prefix=self.place.path,
            mesh=self.group,
            replicated_grad="partial",
            **self.sharing,
        )

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        text: QKV | None = None,
        *,
        text_mask: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend within the video, joined by text.

        Args:
            query: `[B, S, H, D]`, this device's tokens.
            key: `[B, S, H, D]`.
            value: `[B, S, H, D]`.
            text: Query, key and value of text, `[B, R, H, D]` each; all see all.
            text_mask: Which text tokens are real, bool `[B, R]`; the others are seen by nobody.
            mask: A mask over the video tokens of all devices, N, and then text tokens, whole on every device, broadcastable
                to `[B, H, N + R, N + R]`; instead of `text_mask`.

        Returns:
            The output of the video tokens and that of the text tokens, or `None` without text.

        Raises:
            ValueError: `mask` has another shape.
        """
        state = current_state()
        phase = self._phase(state)
        choice = self.choices[phase]
        metadata = None if choice.metadata is None or state is None else state.metadata[choice.metadata]

        lengths = None if state is None else state.shard_lengths

        def attend(video: QKV, joined: QKV | None, fitted: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
            replicated = (None, None, None) if joined is None else joined
            outputs: tuple[torch.Tensor, torch.Tensor | None] = self.layers[phase](
                *video, *replicated, attn_mask=fitted, attn_metadata=metadata, shard_lengths=lengths
            )
            return outputs

        video = (query, key, value)
        if text is not None and text_mask is not None and choice.refuses_padding and state is not None:
            return _attend_to_real_text(attend, video, text, state.text_lengths)
        if text is not None and text_mask is not None:
            own = torch.ones(query.shape[:2], dtype=torch.bool, device=query.device)
            return attend(video, text, torch.cat([own, text_mask], dim=1))
        if mask is None:
            return attend(video, text, None)
        return attend(video, text, self._own_mask(mask, query, 0 if text is None else text[0].shape[1]))

    def num_tokens(self, own: int) -> int:
        """Return how many video tokens all devices have together, where this one has `own`."""
        state = current_state()
        return own if state is None or state.shard_lengths is None else sum(state.shard_lengths)

    def _own_mask(self, mask: torch.Tensor, query: torch.Tensor, num_text: int) -> torch.Tensor:
        """Return this device's part of a mask over all tokens: its rows over all keys, or its keys of a key padding mask."""
        batch, own, heads, size = query.shape
        num_video = self.num_tokens(own)
        rows = torch.empty((batch, num_video + num_text, heads, size), dtype=query.dtype, device="meta")
        fitted = fit_mask(mask, rows, num_video + num_text)
        if num_video == own:
            return fitted
        state = current_state()
        lengths = () if state is None or state.shard_lengths is None else state.shard_lengths
        dim, first = (1 if fitted.dim() == 2 else 2), sum(lengths[: self.group.rank])
        return torch.cat([fitted.narrow(dim, first, own), fitted.narrow(dim, num_video, num_text)], dim=dim)


def _attend_to_real_text(
    attend: Callable[[QKV, QKV | None, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor | None]],
    video: QKV,
    text: QKV,
    lengths: tuple[int, ...] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a backend without padding masks on the real text tokens alone; the others' outputs, which nobody sees, are 0."""
    if lengths is None:
        raise RuntimeError("the forward call kept no text lengths; call the model itself, not its blocks")
    num_text = text[0].shape[1]
    samples: list[tuple[Any, Any, int]]  # a triple of tensors each for video and text
    if len(set(lengths)) == 1:
        samples = [(video, text, lengths[0])]
    else:
        samples = [
            (tuple(x[i : i + 1] for x in video), tuple(x[i : i + 1] for x in text), length) for i, length in enumerate(lengths)
        ]
    outputs, text_outputs = [], []
    for own, joined, length in samples:
        kept: Any = None if length == 0 else tuple(x[:, :length] for x in joined)
        output, text_output = attend(own, kept, None)
        outputs.append(output)
        if text_output is None:
            text_outputs.append(torch.zeros_like(joined[0]))
        else:
            text_outputs.append(F.pad(text_output, (0, 0, 0, 0, 0, num_text - length)))
    return torch.cat(outputs), torch.cat(text_outputs)
