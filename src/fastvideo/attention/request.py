"""One attention call described without tensors.

Selection, `explain` and the command line all ask the same question, "can this backend run this?", and this is the question.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fastvideo.attention.backends.abstract import AttentionMetadata
from fastvideo.platforms import System

__all__ = ["MASK_KINDS", "AttentionRequest"]

MASK_KINDS = ("key_padding", "bool", "additive")
"""Bool `[B, S_kv]`; bool `[B|1, H|1, S_q, S_kv]`; float of the same shape, added to the scores."""


@dataclass(frozen=True)
class AttentionRequest:
    """One call, as the backend will see it.

    Attributes:
        num_heads: Query heads.
        num_kv_heads: Key and value heads; fewer than `num_heads` is grouped-query attention (GQA).
        head_size: Size of a head.
        query_len: Query tokens, replicated ones included, after any exchange between devices.
        key_len: Key tokens, likewise.
        dtype: Dtype of query, key and value.
        device: `torch.device` type, such as `"cuda"`.
        batch: Batch size.
        scale: Factor of the scores.
        is_causal: Each query sees only keys up to its own position.
        mask: One of `MASK_KINDS` or `None`.
        mask_needs_grad: A gradient flows into an additive mask.
        dropout_p: Probability of dropping an attention weight.
        needs_grad: A backward pass may follow.
        needs_lse: The log-sum-exp of the scores is asked for.
        has_gate: A gate for the coarse part of sparse attention is handed over.
        has_out: An output buffer is handed over.
        num_replicated: How many of the last tokens are text that every device holds.
        metadata_cls: Class of the one step metadata at hand; `None` where there is none, or a mapping of several.
        layout: `"local"`; `"ulysses"` when heads have been exchanged for sequence; `"ring"` or `"gather"` when queries stay and
            keys come from other devices; or `"ulysses+ring"`, `"ulysses+gather"`.
        system: The machine; `None` until selection fills it in.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    query_len: int
    key_len: int
    dtype: torch.dtype
    device: str
    batch: int = 1
    scale: float | None = None
    is_causal: bool = False
    mask: str | None = None
    mask_needs_grad: bool = False
    dropout_p: float = 0.0
    needs_grad: bool = False
    needs_lse: bool = False
    has_gate: bool = False
    has_out: bool = False
    num_replicated: int = 0
    metadata_cls: type[AttentionMetadata] | None = None
    layout: str = "local"
    system: System | None = field(default=None)

    @property
    def shares_keys(self) -> bool:
        """Whether each device attends from a part of the queries only."""
        return self.layout not in ("local", "ulysses")

    @property
    def softmax_scale(self) -> float:
        """The factor of the scores: `scale`, by default `head_size ** -0.5`."""
        return self.head_size**-0.5 if self.scale is None else self.scale

    def requested_keywords(self) -> dict[str, str]:
        """Return the `forward` keywords that this call needs, each with its name for people."""
        wanted = {
            "attn_mask": ("a key padding mask" if self.mask == "key_padding" else f"a full {self.mask} mask", self.mask),
            "dropout_p": (f"dropout (dropout_p={self.dropout_p})", self.dropout_p > 0),
            "return_lse": ("returning the log-sum-exp", self.needs_lse),
            "gate_compress": ("a gate (gate_compress)", self.has_gate),
            "out": ("an output buffer", self.has_out),
        }
        return {keyword: what for keyword, (what, is_wanted) in wanted.items() if is_wanted}
