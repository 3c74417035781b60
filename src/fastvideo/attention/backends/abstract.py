"""The contract that every attention backend implements.

A backend names four things: itself, the class that computes (`AttentionImpl`), the per-step metadata that class needs
(`AttentionMetadata`) and the object that builds this metadata (`AttentionMetadataBuilder`). Tensors are
`[batch, seq, heads, head_size]` at every door.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, TypeVar

import torch

if TYPE_CHECKING:
    from fastvideo.attention.request import AttentionRequest

__all__ = [
    "AttentionBackend",
    "AttentionImpl",
    "AttentionLayer",
    "AttentionMetadata",
    "AttentionMetadataBuilder",
    "T",
]


class AttentionBackend(ABC):
    """One way of computing attention, described by static methods so that selection needs no instance.

    Subclasses give the four static methods. What this project adds to them has defaults, so that a class written against
    those four alone registers and runs: `rejections` says why a request can't run here, `exact` and `expected_speed` decide
    whether and when automatic selection takes the backend, and `requires_metadata` whether a layer may call it without.

    Attributes:
        accept_output_buffer: The implementation's `forward` takes `out=` and writes there. Inference only.
        layer_independent: The implementation keeps nothing of its layer, its `prefix` included, so layers of one
            configuration share one, and equal blocks of a model share a compiled graph. Not inherited: each class says it.
        keeps_token_order: Masks and causal attention hold behind `preprocess_qkv`, because it leaves tokens where they are, or
            because `forward` knows where they went.
        exact: The result is dense attention up to rounding, so automatic selection may choose it.
    """

    accept_output_buffer: bool = False
    exact: ClassVar[bool] = False
    layer_independent: ClassVar[bool] = False
    keeps_token_order: ClassVar[bool] = False

    @staticmethod
    @abstractmethod
    def get_name() -> str:
        """Return the name under which the backend is chosen, such as `"TORCH_SDPA"`."""
        raise NotImplementedError

    @staticmethod
    @abstractmethod
    def get_impl_cls() -> type[AttentionImpl]:  # type: ignore[type-arg]  # the contract leaves the parameter open
        """Return the class that computes attention."""
        raise NotImplementedError

    @staticmethod
    @abstractmethod
    def get_metadata_cls() -> type[AttentionMetadata]:
        """Return the class of the per-step metadata, or `AttentionMetadata` itself where none is needed."""
        raise NotImplementedError

    @staticmethod
    @abstractmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:  # type: ignore[type-arg]  # as above
        """Return the class that builds the metadata."""
        raise NotImplementedError

    @classmethod
    def requires_metadata(cls) -> bool:
        """Return whether a call without metadata of `get_metadata_cls()` is an error."""
        return cls.get_metadata_cls() is not AttentionMetadata

    @classmethod
    def rejections(cls, request: AttentionRequest) -> tuple[str, ...]:
        """Return every reason why this backend can't run `request` here; an empty tuple accepts it.

        The default refuses each requested feature for which the implementation's `forward` has no keyword. A backend
        extends it: `return (*super().rejections(request), *own_reasons)`.
        """
        keywords = forward_keywords(cls.get_impl_cls())
        reasons = [
            f"{what} is not supported (its forward takes no `{keyword}`)"
            for keyword, what in request.requested_keywords().items()
            if keyword not in keywords
        ]
        has_hook = cls.get_impl_cls().preprocess_qkv is not AttentionImpl.preprocess_qkv
        for what, is_asked in (("a mask", request.mask is not None), ("causal attention", request.is_causal)):
            if is_asked and has_hook and not cls.keeps_token_order:
                reasons.append(f"{what} is not supported: its preprocess_qkv reorders tokens, and {what} stays in their order")
        if request.shares_keys and (cls.requires_metadata() or has_hook):
            reasons.append(f"layout {request.layout!r} leaves each device a part of the queries or keys; use layout='ulysses'")
        if request.has_out and not cls.accept_output_buffer:
            reasons.append("an output buffer is not supported (accept_output_buffer is False)")
        if request.has_out and request.needs_grad:
            reasons.append("an output buffer can't be used when a gradient is needed; call under torch.no_grad()")
        return tuple(dict.fromkeys(reasons))

    @classmethod
    def expected_speed(cls, request: AttentionRequest) -> float:  # noqa: ARG003  # subclasses look at the request
        """Return the expected TFLOP/s for `request`; automatic selection takes the highest of those that accept."""
        return 0.0


@dataclass
class AttentionMetadata:
    """What a backend needs to know about one denoising step, beyond the tensors.

    Attributes:
        current_timestep: Index of the denoising step.
    """

    current_timestep: int

    def check_sequence(self, num_tokens: int) -> None:
        """Raise `ValueError` if this step's sequence doesn't have `num_tokens` tokens, replicated ones not counted.

        The default knows of no sequence.
        """

    def check_heads(self, num_heads: int, *, are_cut: bool) -> None:
        """Raise `ValueError` if this step's settings don't fit a layer of `num_heads` heads.

        `are_cut` says that the implementation sees some of them at a time, and isn't told which. The default fits all.
        """

    def asdict_zerocopy(self, skip_fields: set[str] | None = None) -> dict[str, Any]:
        """Return the fields as a dict that holds the very same objects; `dataclasses.asdict` would copy tensors.

        Args:
            skip_fields: Names of fields to leave out.

        Raises:
            ValueError: A name in `skip_fields` is not a field.

        Example:
            >>> AttentionMetadata(current_timestep=3).asdict_zerocopy()
            {'current_timestep': 3}
        """
        names = [field.name for field in fields(self)]
        skipped = set(skip_fields or ())
        if unknown := skipped.difference(names):
            raise ValueError(f"skip_fields names no fields of {type(self).__name__}: {sorted(unknown)}; it has {names}")
        return {name: getattr(self, name) for name in names if name not in skipped}


T = TypeVar("T", bound=AttentionMetadata)


class AttentionMetadataBuilder(ABC, Generic[T]):
    """Builds the metadata of one denoising step."""

    def __init__(self) -> None:
        """Start with nothing prepared."""

    @abstractmethod
    def prepare(self) -> None:
        """Get ready for a new generation, dropping what was kept from an earlier one."""
        raise NotImplementedError

    @abstractmethod
    def build(self, **kwargs: dict[str, Any]) -> AttentionMetadata:
        """Build the metadata of one step from keyword arguments that the backend names."""
        raise NotImplementedError


class AttentionLayer(Protocol):
    """A layer that attends with a cache of keys and values, as autoregressive models use it."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Attend from `query` to `kv_cache` and to `key` and `value`, `[batch, seq, heads, head_size]` each."""
        ...


class AttentionImpl(ABC, Generic[T]):
    """Computes attention for one layer.

    Args:
        num_heads: Number of query heads.
        head_size: Size of one head.
        softmax_scale: Factor of the scores before the softmax; any finite number.
        causal: Each query sees only keys up to its own position.
        num_kv_heads: Number of key and value heads; `None` means `num_heads`.
        prefix: The layer's dotted name in its model.
        **extra_impl_args: Arguments that only some implementations know. This base class knows none.

    Raises:
        TypeError: `extra_impl_args` holds a name that the implementation doesn't know.
    """

    def __init__(  # type: ignore[no-untyped-def]  # the contract leaves `extra_impl_args` without annotation
        self,
        num_heads: int,
        head_size: int,
        softmax_scale: float,
        causal: bool = False,
        num_kv_heads: int | None = None,
        prefix: str = "",
        **extra_impl_args,
    ) -> None:
        if extra_impl_args:
            raise TypeError(f"{type(self).__name__} knows no argument {sorted(extra_impl_args)}; remove it")
        self.num_heads = num_heads
        self.head_size = head_size
        self.softmax_scale = softmax_scale
        self.causal = causal
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.prefix = prefix

    def preprocess_qkv(self, qkv: torch.Tensor, attn_metadata: T) -> torch.Tensor:  # noqa: ARG002  # a hook
        """Reorder tokens before attention, for example into tiles.

        Args:
            qkv: Query, key and value (and gate) stacked on dim 0, `[n * batch, seq, heads, head_size]`, or one of them
                where their shapes differ. Replicated tokens are not in it.
            attn_metadata: The step's metadata.

        Returns:
            The same layout, `[n * batch, seq', heads, head_size]`.
        """
        return qkv

    def postprocess_output(self, output: torch.Tensor, attn_metadata: T) -> torch.Tensor:  # noqa: ARG002  # a hook
        """Undo on the output, `[batch, seq', heads, head_size]`, what `preprocess_qkv` did to the inputs."""
        return output

    @abstractmethod
    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_metadata: T,
    ) -> torch.Tensor:
        """Return attention of `query` over `key` and `value`, `[batch, seq, heads, head_size]` each.

        Nothing may read the inputs after the call: between devices they can lie in memory that is used again.

        Implementations may add keyword-only arguments, which layers pass only when a call asks for them: `attn_mask`,
        `dropout_p`, `return_lse`, `gate_compress`, `num_replicated` and `out`.
        """
        raise NotImplementedError


def forward_keywords(impl_cls: type[AttentionImpl[Any]]) -> frozenset[str]:
    """Return the names that `impl_cls.forward` takes by keyword."""
    by_keyword = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(impl_cls.forward).parameters.values()
    return frozenset(parameter.name for parameter in parameters if parameter.kind in by_keyword)
