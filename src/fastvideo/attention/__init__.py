"""Attention for video diffusion transformers: the layers, the functional door, and the choice of backends.

Importing this imports torch and nothing heavier, changes no global switch and touches no device.
"""

from fastvideo.attention.backends.abstract import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    T,
)
from fastvideo.attention.explain import Explanation, explain
from fastvideo.attention.functional import attention
from fastvideo.attention.kv_cache import KVCache, StreamingMetadata, block_causal_mask
from fastvideo.attention.layer import DistributedAttention, DistributedAttention_VSA, LocalAttention
from fastvideo.attention.registry import UnknownBackend, register_attn_backend
from fastvideo.attention.selector import BackendUnavailable, Decision, get_attn_backend, use_attn_backend
from fastvideo.attention.streaming import StreamingAttention

__all__ = [
    "AttentionBackend",
    "AttentionImpl",
    "AttentionLayer",
    "AttentionMetadata",
    "AttentionMetadataBuilder",
    "BackendUnavailable",
    "Decision",
    "DistributedAttention",
    "DistributedAttention_VSA",
    "Explanation",
    "KVCache",
    "LocalAttention",
    "StreamingAttention",
    "StreamingMetadata",
    "T",
    "UnknownBackend",
    "attention",
    "block_causal_mask",
    "explain",
    "get_attn_backend",
    "register_attn_backend",
    "use_attn_backend",
]
