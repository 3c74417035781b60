"""Which tiles of keys each tile of queries sees: the one description that the block-sparse engine runs.

A sequence is cut into tiles by a `TileLayout`; a `BlockPattern` joins a layout of the queries and one of the keys with
compact, ascending index lists. Tensors stay in token order: a layout may carry an `order` that says which token each
packed row (tile after tile) is, so nothing has to be copied only to be permuted.

Shape legend: B batch, H heads, S tokens, Nq / Nk query / key tiles, K width of the index lists.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MAX_TOKENS = 2**31 - 1


@dataclass(frozen=True, eq=False)
class TileLayout:
    """How the `num_tokens` tokens of a sequence are cut into tiles of real tokens (no padding).

    Tile `i` owns the packed rows `offsets[i] : offsets[i + 1]`; packed row `r` is token `order[r]`.
    The plain integers repeat what the tensors say, so that no kernel launch has to wait for a device. Construction reads
    no tensor; `validate` does.

    Args:
        offsets: `[N + 1]` int32, ascending from 0 to `num_tokens`.
        num_tokens: Tokens of the sequence.
        max_size: Tokens of the largest tile.
        is_uniform: Whether all tiles have `max_size` tokens.
        order: `[num_tokens]` int32 permutation from packed row to token; None means the identity.
        derived: What implementations keep with a layout that serves many calls, by their names; None where nothing is kept.

    Example:
        >>> layout = TileLayout.from_sizes([2, 3])
        >>> layout.sizes.tolist(), layout.max_size, layout.is_uniform
        ([2, 3], 3, False)
    """

    offsets: Tensor
    num_tokens: int
    max_size: int
    is_uniform: bool
    order: Tensor | None = None
    derived: dict[str, Any] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # Copies make their own.
        return {**self.__dict__, "derived": None if self.derived is None else {}}

    @classmethod
    def from_sizes(
        cls, sizes: Sequence[int], *, order: Tensor | None = None, device: torch.device | str | None = None
    ) -> TileLayout:
        """Build a layout from tile sizes known on the host.

        Args:
            sizes: Tokens of each tile, integers of at least 1.
            order: Permutation `[sum(sizes)]` from packed row to token, of any integer type, or None for the identity.
                Its values are not read here; `validate` reads them.
            device: Where the tensors live; that of `order` by default, else the CPU.

        Raises:
            TypeError: For a size or an `order` that isn't of integers.
            ValueError: For no tiles, a tile without tokens, more tokens than int32 counts or an `order` of another length.
        """
        sizes = _integers("tile sizes", sizes)
        if not sizes or min(sizes) < 1:
            raise ValueError(f"expected one or more tiles of at least 1 token, got sizes={sizes[:16]}")
        num_tokens = sum(sizes)
        if num_tokens > _MAX_TOKENS:
            raise ValueError(f"expected at most {_MAX_TOKENS} tokens, since rows are counted in int32, got {num_tokens}")
        _check_tensors(order=order)
        if order is not None:
            if order.shape != (num_tokens,):
                raise ValueError(f"expected order of shape ({num_tokens},), the sum of sizes, got {tuple(order.shape)}")
            device = order.device if device is None else device
            order = _narrowed("order", order).to(device)
        ends = torch.tensor([0, *sizes], dtype=torch.int64, device="cpu").cumsum(0)
        return cls(
            offsets=ends.to(device=device, dtype=torch.int32),
            num_tokens=num_tokens,
            max_size=max(sizes),
            is_uniform=min(sizes) == max(sizes),
            order=order,
        )

    @classmethod
    def uniform(cls, num_tokens: int, tile_size: int, *, device: torch.device | str | None = None) -> TileLayout:
        """Cut `num_tokens` consecutive tokens into tiles of `tile_size`; the last one takes the rest.

        Example:
            >>> TileLayout.uniform(10, 4).sizes.tolist()
            [4, 4, 2]
        """
        num_tokens, tile_size = _integers("num_tokens and tile_size", (num_tokens, tile_size))
        if num_tokens < 1 or tile_size < 1:
            raise ValueError(f"expected num_tokens >= 1 and tile_size >= 1, got {num_tokens=}, {tile_size=}")
        full, rest = divmod(num_tokens, tile_size)
        return cls.from_sizes([tile_size] * full + ([rest] if rest else []), device=device)

    def is_same(self, other: TileLayout) -> bool:
        """Whether both lie in the same memory, and so have the same tiles; reads no values.

        Example:
            >>> layout = TileLayout.uniform(8, 4)
            >>> layout.is_same(layout), layout.is_same(TileLayout.uniform(8, 4))
            (True, False)
        """
        if (self.num_tokens, self.num_tiles) != (other.num_tokens, other.num_tiles):
            return False
        if self.offsets.data_ptr() != other.offsets.data_ptr():
            return False
        if self.order is None or other.order is None:
            return self.order is other.order
        return self.order.data_ptr() == other.order.data_ptr()

    @property
    def num_tiles(self) -> int:
        """Number of tiles, N."""
        return self.offsets.shape[0] - 1

    @property
    def sizes(self) -> Tensor:
        """Tokens of each tile, `[N]` int32."""
        return self.offsets.diff()

    def tile_of_token(self) -> Tensor:
        """Tile of each token, `[num_tokens]` int64, in token order."""
        tiles = torch.arange(self.num_tiles, device=self.offsets.device)
        packed = torch.repeat_interleave(tiles, self.sizes, output_size=self.num_tokens)
        if self.order is None:
            return packed
        return torch.empty_like(packed).scatter_(0, self.order.long(), packed)

    def validate(self) -> None:
        """Check what `offsets` and `order` hold, and that the plain integers agree; reads them on the host.

        Raises:
            TypeError: For tensors that are not int32.
            ValueError: For offsets that do not ascend from 0 to `num_tokens`, integers that contradict them, or an `order`
                that is no permutation of the tokens.

        Example:
            >>> TileLayout.from_sizes([2, 1], order=torch.tensor([2, 0, 1])).validate()
        """
        offsets, order = self.offsets, self.order
        if offsets.dtype != torch.int32 or (order is not None and order.dtype != torch.int32):
            raise TypeError(
                f"expected int32 offsets and order, got {offsets.dtype}" + (f" and {order.dtype}" if order is not None else "")
            )
        if offsets.ndim != 1 or self.num_tiles < 1:
            raise ValueError(f"expected offsets [N + 1] of one or more tiles, got shape {tuple(offsets.shape)}")
        first, last, sizes = int(offsets[0]), int(offsets[-1]), offsets.long().diff()
        smallest, largest = int(sizes.min()), int(sizes.max())
        if smallest < 1 or (first, last) != (0, self.num_tokens):
            raise ValueError(
                f"expected offsets that ascend from 0 to num_tokens={self.num_tokens}, got {first} to {last}, "
                f"tiles of {smallest} to {largest} tokens"
            )
        if (self.max_size, self.is_uniform) != (largest, smallest == largest):
            raise ValueError(
                f"expected max_size={largest} and is_uniform={smallest == largest}, as offsets have it, "
                f"got {self.max_size} and {self.is_uniform}"
            )
        if order is None:
            return
        if order.shape != (self.num_tokens,):
            raise ValueError(f"expected order of shape ({self.num_tokens},), got {tuple(order.shape)}")
        ranked = order.sort().values
        wrong = ranked != torch.arange(self.num_tokens, dtype=torch.int32, device=order.device)
        if bool(wrong.any()):
            raise ValueError(
                f"expected order to be a permutation of 0 to {self.num_tokens - 1}, got values {int(ranked[0])} to "
                f"{int(ranked[-1])}, sorted {int(ranked[wrong][0])} in place {int(wrong.nonzero()[0])}"
            )


class InvertedLists(NamedTuple):
    """For each key tile the query tiles that see it, ascending, in compressed rows.

    The query tiles of key tile `j` (of batch `b`, head `h`) are
    `query_tiles[b, h, offsets[b, h, j] : offsets[b, h, j + 1]]`; what follows the last one is undefined.

    Attributes:
        offsets: `[B|1, H|1, Nk + 1]` int32.
        query_tiles: `[B|1, H|1, Nq * K]` int32.
    """

    offsets: Tensor
    query_tiles: Tensor


@dataclass(frozen=True, eq=False)
class BlockPattern:
    """For each query tile the key tiles it sees.

    Query tile `i` (of batch `b`, head `h`) sees the key tiles `indices[b, h, i, : counts[b, h, i]]`, which ascend and
    are distinct; entries behind the count carry no meaning. A count of 0 is legal: such queries get output 0 and
    log-sum-exp -inf. `H` counts query heads. Construction checks shapes only; `validate` also reads the values.

    Args:
        query_tiles: Layout of the queries, Nq tiles.
        key_tiles: Layout of the keys, Nk tiles.
        indices: `[B|1, H|1, Nq, K]` int32.
        counts: `[B|1, H|1, Nq]` int32; None means that all K entries count.

    Attributes:
        derived: What implementations keep with a reusable pattern, by their names; None where nothing is kept.

    Raises:
        TypeError: For index tensors that are not int32.
        ValueError: For shapes or devices that do not fit together.

    Example:
        >>> layout = TileLayout.uniform(8, 4)
        >>> pattern = BlockPattern.from_mask(torch.tensor([[True, False], [True, True]]), layout, layout)
        >>> pattern.counts.tolist(), pattern.indices[0, 0, 1].tolist()
        ([[[1, 2]]], [0, 1])
    """

    query_tiles: TileLayout
    key_tiles: TileLayout
    indices: Tensor
    counts: Tensor | None = None
    derived: dict[Any, Any] | None = field(default=None, init=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # Copies have other tensors, by which nobody finds what they keep.
        return {**self.__dict__, "derived": None}

    def __post_init__(self) -> None:
        indices, counts = self.indices, self.counts
        _check_tensors(indices=indices, counts=counts)
        if indices.dtype != torch.int32 or (counts is not None and counts.dtype != torch.int32):
            raise TypeError(
                f"expected int32 indices and counts, got {indices.dtype}"
                + (f" and {counts.dtype}" if counts is not None else "")
            )
        num_query_tiles = self.query_tiles.num_tiles
        if indices.ndim != 4 or indices.shape[2] != num_query_tiles or indices.shape[3] < 1:
            raise ValueError(f"expected indices [B|1, H|1, Nq={num_query_tiles}, K>=1], got shape {tuple(indices.shape)}")
        if counts is not None and counts.shape != indices.shape[:3]:
            raise ValueError(f"expected counts of shape {tuple(indices.shape[:3])}, got {tuple(counts.shape)}")
        devices = {x.device for x in self._tensors()}
        if len(devices) > 1:
            raise ValueError(f"expected all tensors of a pattern on one device, got {sorted(map(str, devices))}")

    @classmethod
    def from_mask(cls, mask: Tensor, query_tiles: TileLayout, key_tiles: TileLayout) -> BlockPattern:
        """Build a pattern from a bool tile mask, True = sees. Reads the mask on the host.

        Args:
            mask: `[Nq, Nk]`, or `[B|1, H|1, Nq, Nk]`.
            query_tiles: Layout of the queries.
            key_tiles: Layout of the keys.
        """
        _check_tensors(mask=mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"expected a bool tile mask, got {mask.dtype}")
        if mask.ndim == 2:
            mask = mask[None, None]
        expected = (query_tiles.num_tiles, key_tiles.num_tiles)
        if mask.ndim != 4 or tuple(mask.shape[2:]) != expected:
            raise ValueError(f"expected a tile mask [B|1, H|1, Nq, Nk] ending in {expected}, got {tuple(mask.shape)}")
        counts = mask.sum(-1, dtype=torch.int32)
        width = max(1, int(counts.max()))
        indices = (~mask).to(torch.uint8).argsort(dim=-1, stable=True)[..., :width].to(torch.int32)
        is_listed = torch.arange(width, device=mask.device) < counts[..., None]
        return cls(query_tiles, key_tiles, indices.masked_fill(~is_listed, 0), counts)

    @classmethod
    def from_indices(
        cls, indices: Tensor, query_tiles: TileLayout, key_tiles: TileLayout, *, counts: Tensor | None = None
    ) -> BlockPattern:
        """Build a pattern from index lists and check their values. Reads the lists on the host.

        Args:
            indices: Ascending lists `[Nq, K]`, or `[B|1, H|1, Nq, K]`, any integer type.
            query_tiles: Layout of the queries.
            key_tiles: Layout of the keys.
            counts: `indices.shape[:-1]`, how many entries of each list count, any integer type; None means all.

        Raises:
            TypeError: For indices or counts that are not of an integer type.
            ValueError: For a list that does not ascend, leaves `[0, Nk)`, or a count outside `[0, K]`; for a layout whose
                own `validate` refuses it.

        Example:
            >>> layout = TileLayout.uniform(12, 4)
            >>> lists = torch.tensor([[0, 2], [1, 2], [0, 0]])
            >>> pattern = BlockPattern.from_indices(lists, layout, layout, counts=torch.tensor([2, 2, 0]))
            >>> pattern.tile_mask()[0, 0].int().tolist()
            [[1, 0, 1], [0, 1, 1], [0, 0, 0]]
        """
        _check_tensors(indices=indices, counts=counts)
        if indices.ndim == 2:
            indices = indices[None, None]
            counts = counts[None, None] if counts is not None else None
        narrow_counts = None if counts is None else _narrowed("counts", counts)
        pattern = cls(query_tiles, key_tiles, _narrowed("indices", indices), narrow_counts)
        # As they came, so that an error names the value that was given.
        _check_lists(indices.long(), None if counts is None else counts.long(), key_tiles.num_tiles)
        pattern.validate()
        return pattern

    def reusable(self) -> BlockPattern:
        """Return the pattern for many calls: what kernels make of its lists is made at the first and kept with it.

        For lists that stay, such as windows: those of a sparse rule that selects anew would only take memory. The Hopper
        kernels keep up to 16 bytes for each listed pair of blocks of up to 64 tokens, up to three times that with gradients;
        others keep nothing. It goes with the last reference to the pattern. After a change of a tensor in place nothing that is
        kept is used any more.

        Raises:
            ValueError: A tensor was made in inference mode, where torch counts no changes.

        Example:
            >>> layout = TileLayout.uniform(8, 4)
            >>> pattern = BlockPattern.from_mask(torch.eye(2, dtype=torch.bool), layout, layout).reusable()
            >>> pattern.reusable() is pattern
            True
        """
        if self.derived is not None:
            return self
        if any(x.is_inference() for x in self._tensors()):
            raise ValueError(
                "expected tensors whose changes torch counts, got some that were made in torch.inference_mode(), where it "
                "doesn't; make them outside it, under torch.no_grad(), or use the pattern as it is"
            )
        query_tiles = _keeping(self.query_tiles)
        key_tiles = query_tiles if self.key_tiles is self.query_tiles else _keeping(self.key_tiles)
        kept = replace(self, query_tiles=query_tiles, key_tiles=key_tiles)
        object.__setattr__(kept, "derived", {_VERSIONS: kept._versions()})
        _reusable[id(kept.indices)] = kept
        return kept

    def _versions(self) -> tuple[int, ...]:
        """How often each tensor was changed in place."""
        return tuple(x._version for x in self._tensors())

    def _tensors(self) -> list[Tensor]:
        queries, keys = self.query_tiles, self.key_tiles
        tensors = (self.indices, self.counts, queries.offsets, keys.offsets, queries.order, keys.order)
        return [x for x in tensors if x is not None]

    def is_listed(self) -> Tensor:
        """Which entries of `indices` count, bool, `[B|1, H|1, Nq, K]`."""
        return _listed(self.indices, self.counts)

    def validate(self) -> None:
        """Check the values of the lists and of both layouts; reads them on the host.

        Kernels trust them: a token or a tile that doesn't exist is memory outside the tensors.

        Raises:
            TypeError: For a layout whose tensors are not int32.
            ValueError: For a list that does not ascend, leaves `[0, Nk)`, or a count outside `[0, K]`; for a layout whose
                own `validate` refuses it.
        """
        self.query_tiles.validate()
        self.key_tiles.validate()
        _check_lists(self.indices, self.counts, self.key_tiles.num_tiles)

    def tile_mask(self) -> Tensor:
        """The bool tile mask, `[B|1, H|1, Nq, Nk]`, True = sees."""
        num_key_tiles = self.key_tiles.num_tiles
        target = torch.where(self.is_listed(), self.indices, num_key_tiles).long()
        mask = torch.zeros(*self.indices.shape[:3], num_key_tiles + 1, dtype=torch.bool, device=self.indices.device)
        return mask.scatter_(-1, target, True)[..., :num_key_tiles]

    def token_mask(self) -> Tensor:
        """The dense bool mask in token order, `[B|1, H|1, S_q, S_k]`, True = attends; for references and tests."""
        tiles = self.tile_mask()
        return tiles[:, :, self.query_tiles.tile_of_token()][..., self.key_tiles.tile_of_token()]

    def invert(self) -> InvertedLists:
        """For each key tile the query tiles that see it, ascending: the order is fixed, and no host waits.

        Example:
            >>> layout = TileLayout.uniform(8, 4)
            >>> mask = torch.tensor([[True, False], [True, True]])
            >>> inverted = BlockPattern.from_mask(mask, layout, layout).invert()
            >>> inverted.offsets.tolist(), inverted.query_tiles[0, 0, :3].tolist()
            ([[[0, 2, 3]]], [0, 1, 1])
        """
        width, num_key_tiles = self.indices.shape[-1], self.key_tiles.num_tiles
        key = torch.where(self.is_listed(), self.indices, num_key_tiles).flatten(2)
        key, entry = key.sort(dim=-1, stable=True)
        bounds = torch.arange(num_key_tiles + 1, dtype=torch.int32, device=key.device)
        offsets = torch.searchsorted(key, bounds.expand(*key.shape[:2], -1).contiguous(), out_int32=True)
        return InvertedLists(offsets, (entry // width).to(torch.int32))


# By the address of the object that its indices are: custom ops are handed tensors and no patterns.
_reusable: weakref.WeakValueDictionary[int, BlockPattern] = weakref.WeakValueDictionary()
_VERSIONS = "versions"


def reusable_pattern(
    indices: Tensor, counts: Tensor | None, query_tiles: TileLayout, key_tiles: TileLayout
) -> BlockPattern | None:
    """The reusable pattern of these very tensors, unchanged since; else None."""
    found = _reusable.get(id(indices))
    if found is None or found.derived is None or found.indices is not indices or found.counts is not counts:
        return None
    if not (found.query_tiles.is_same(query_tiles) and found.key_tiles.is_same(key_tiles)):
        return None
    return found if found.derived[_VERSIONS] == found._versions() else None


def _keeping(layout: TileLayout) -> TileLayout:
    return layout if layout.derived is not None else replace(layout, derived={})


def _integers(name: str, values: Iterable[Any]) -> list[int]:
    """Python's integers, from those of any kind."""
    values = list(values)
    wrong = [value for value in values if isinstance(value, bool) or not hasattr(value, "__index__")]
    if wrong:
        raise TypeError(f"expected integers as {name}, got {wrong[0]!r}")
    return [operator.index(value) for value in values]


def _check_tensors(**tensors: Any) -> None:
    for name, x in tensors.items():
        if x is not None and not isinstance(x, Tensor):
            raise TypeError(f"expected {name} as a tensor, got {type(x).__name__}")


def _narrowed(name: str, x: Tensor) -> Tensor:
    """Integers as int32, without waiting for a device: those out of its range go to its ends, which no check accepts."""
    if x.dtype == torch.bool or x.is_floating_point() or x.is_complex():
        raise TypeError(f"expected {name} of an integer type, got {x.dtype}")
    limits = torch.iinfo(torch.int32)
    return x if x.dtype == torch.int32 else x.long().clamp(limits.min, limits.max).to(torch.int32)


def _listed(indices: Tensor, counts: Tensor | None) -> Tensor:
    if counts is None:
        return torch.ones_like(indices, dtype=torch.bool)
    return torch.arange(indices.shape[-1], device=indices.device) < counts[..., None]


def _check_lists(indices: Tensor, counts: Tensor | None, num_key_tiles: int) -> None:
    width = indices.shape[-1]
    if counts is not None and bool(((counts < 0) | (counts > width)).any()):
        raise ValueError(f"expected counts in [0, {width}], got {int(counts.min())} to {int(counts.max())}")
    listed = _listed(indices, counts)
    inside = (indices >= 0) & (indices < num_key_tiles)
    if not bool((inside | ~listed).all()):
        wrong = indices[listed & ~inside]
        raise ValueError(f"expected key tiles in [0, {num_key_tiles}), got {int(wrong[0])}")
    if not bool(((indices.diff(dim=-1) > 0) | ~listed[..., 1:]).all()):
        raise ValueError("expected strictly ascending key tiles in every list; sort the lists and drop duplicates")
