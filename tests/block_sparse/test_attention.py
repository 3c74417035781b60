"""The engine against dense attention in float64, for each implementation that runs on a CPU."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.autograd import forward_ad

from fastvideo.block_sparse import (
    BlockPattern,
    TileLayout,
    block_sparse_attention,
    impl,
    pool_tiles,
    video_sparse_attention,
)
from fastvideo.block_sparse.attention import _backward_op, _flatten, _forward_op
from fastvideo.block_sparse.impl import portable
from fastvideo.testing import assert_op_within_budget, reference_attention

# Query tile sizes, key tile sizes, batch, query heads, key heads, head size, share of tiles kept.
SHAPES = {
    "one_token": ([1], [1], 1, 1, 1, 1, 1.0),
    "one_token_tiles": ([1] * 7, [1] * 5, 1, 2, 1, 3, 0.5),
    "uniform": ([4] * 5, [4] * 6, 2, 4, 2, 8, 0.5),
    "uniform_all": ([4] * 3, [4] * 3, 1, 2, 2, 16, 1.0),
    "ragged": ([3, 1, 7], [2, 5, 1, 11], 2, 4, 2, 5, 0.5),
    "long_query_tile": ([300, 2, 257], [64, 33], 1, 2, 1, 8, 0.8),
    "paper": ([64] * 6, [64] * 6, 1, 2, 2, 32, 0.3),
}
IMPLEMENTATIONS = ("reference", "portable")


@pytest.fixture(params=["cpu_path", "accelerator_path"])
def path(request, monkeypatch):
    """Run the portable implementation also as on devices where the host must not read the lists."""
    if request.param == "accelerator_path":
        monkeypatch.setattr(portable, "_host_reads_are_free", lambda device: False)


def make_pattern(shape: str, *, ordered: bool = True, shared: bool = False, empty: bool = True) -> BlockPattern:
    query_sizes, key_sizes, batch, heads, _, _, kept = SHAPES[shape]
    generator = torch.Generator().manual_seed(1)
    layouts = [
        TileLayout.from_sizes(sizes, order=torch.randperm(sum(sizes), generator=generator) if ordered else None)
        for sizes in (query_sizes, key_sizes)
    ]
    extent = (1, 1) if shared else (batch, heads)
    mask = torch.rand(*extent, len(query_sizes), len(key_sizes), generator=generator) < kept
    # The first query tile of the first head sees nothing, the others something.
    mask[..., -1] |= ~mask.any(-1)
    if empty and len(query_sizes) > 1:
        mask[0, 0, 0] = False
    return BlockPattern.from_mask(mask, *layouts)


def make_inputs(shape: str, dtype: torch.dtype, size: float = 3.0) -> dict[str, torch.Tensor]:
    query_sizes, key_sizes, batch, heads, kv_heads, head_size, _ = SHAPES[shape]
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    inputs = {
        "query": size * randn(batch, sum(query_sizes), heads, head_size),
        "key": size * randn(batch, sum(key_sizes), kv_heads, head_size),
        "value": randn(batch, sum(key_sizes), kv_heads, head_size),
    }
    return {name: x.to(dtype) for name, x in inputs.items()}


def check(shape: str, pattern: BlockPattern, dtype: torch.dtype, name: str, scale=None, size: float = 3.0) -> None:
    assert_op_within_budget(
        lambda query, key, value: block_sparse_attention(query, key, value, pattern, scale=scale, return_lse=True, impl=name),
        lambda query, key, value: reference_attention(
            query, key, value, attn_mask=pattern.token_mask(), scale=scale, return_lse=True
        ),
        make_inputs(shape, dtype, size),
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_values_and_gradients(shape, dtype, path) -> None:
    check(shape, make_pattern(shape), dtype, "portable")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_implementation(shape, dtype) -> None:
    check(shape, make_pattern(shape), dtype, "reference")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("scale", [-0.4, 0.0, 1.0])
def test_scales(scale, name) -> None:
    check("ragged", make_pattern("ragged"), torch.float32, name, scale)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_of_real_size(name, dtype) -> None:
    check("uniform", make_pattern("uniform"), dtype, name, size=50.0)


@pytest.mark.parametrize("shape", ["uniform", "ragged"])
def test_lists_shared_by_batch_and_heads_in_identity_order(shape, path) -> None:
    check(shape, make_pattern(shape, ordered=False, shared=True), torch.float32, "portable")


@pytest.mark.parametrize("budget", [1, 3000])
def test_small_chunks(budget, monkeypatch) -> None:
    monkeypatch.setattr(portable, "_CHUNK_BYTES_CPU", budget)
    check("ragged", make_pattern("ragged"), torch.float32, "portable")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_gradcheck(name) -> None:
    pattern = make_pattern("ragged", empty=False)
    inputs = [x.requires_grad_() for x in make_inputs("ragged", torch.float64, 1.0).values()]

    def attend(q, k, v):
        return block_sparse_attention(q, k, v, pattern, return_lse=True, impl=name)

    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_queries_that_see_nothing(name) -> None:
    pattern, inputs = make_pattern("ragged"), make_inputs("ragged", torch.float32)
    inputs = {key: x.requires_grad_() for key, x in inputs.items()}
    out, lse = block_sparse_attention(**inputs, pattern=pattern, return_lse=True, impl=name)
    dq, dk, dv = torch.autograd.grad((out.sin().sum(), lse[lse.isfinite()].sum()), list(inputs.values()))
    rows = pattern.query_tiles.tile_of_token() == 0
    assert rows.any()
    assert torch.equal(lse[0, :, 0] == -torch.inf, rows)
    assert not out[0, rows, 0].any()
    assert not dq[0, rows, 0].any()
    assert dk.isfinite().all()
    assert dv.isfinite().all()


def test_log_sum_exp_alone_passes_a_gradient() -> None:
    pattern, inputs = make_pattern("ragged", empty=False), make_inputs("ragged", torch.float64)
    leaves = [x.requires_grad_() for x in inputs.values()]
    _, lse = block_sparse_attention(*leaves, pattern, return_lse=True)
    got = torch.autograd.grad(lse.sum(), leaves)
    _, lse = reference_attention(*leaves, attn_mask=pattern.token_mask(), return_lse=True)
    expected = torch.autograd.grad(lse.sum(), leaves[:2])
    for a, b in zip(got, (*expected, torch.zeros_like(leaves[2])), strict=True):
        torch.testing.assert_close(a, b)


def test_strided_inputs() -> None:
    pattern, inputs = make_pattern("uniform"), make_inputs("uniform", torch.float32)
    expected = block_sparse_attention(**inputs, pattern=pattern)
    strided = {name: x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0) for name, x in inputs.items()}
    assert not any(x.is_contiguous() for x in strided.values())
    out = block_sparse_attention(**strided, pattern=pattern)
    assert out.is_contiguous()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("shape", ["uniform", "ragged"])
def test_what_is_not_listed_is_not_read(shape, path) -> None:
    """NaN in a key tile reaches exactly the query tiles (and through them the key tiles) that list it."""
    pattern = make_pattern(shape)
    inputs = make_inputs(shape, torch.float32)
    poisoned = pattern.key_tiles.tile_of_token() == 1
    clean = {name: x.requires_grad_() for name, x in inputs.items()}
    dirty = {name: x.detach().clone() for name, x in inputs.items()}
    dirty["key"][:, poisoned] = torch.nan
    dirty["value"][:, poisoned] = torch.nan
    dirty = {name: x.requires_grad_() for name, x in dirty.items()}
    mask = pattern.tile_mask().expand(*SHAPES[shape][2:4], -1, -1)
    # `[B, S_q, H]`: rows whose tile doesn't list the poisoned one.
    untouched = ~mask[..., 1].transpose(1, 2)[:, pattern.query_tiles.tile_of_token()]
    results = []
    for leaves in (clean, dirty):
        out, lse = block_sparse_attention(**leaves, pattern=pattern, return_lse=True, impl="portable")
        dq, *_ = torch.autograd.grad(out[untouched].sin().sum(), list(leaves.values()))
        results.append((out, lse, dq))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a[untouched], b[untouched])
    assert results[1][0][~untouched].isnan().all()
    assert 0 < untouched.sum() < untouched.numel()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_keys_that_nobody_sees(name) -> None:
    query, key = TileLayout.uniform(8, 4), TileLayout.from_sizes([4, 3, 4], order=torch.randperm(11))
    pattern = BlockPattern.from_mask(torch.tensor([[1, 0, 1], [0, 0, 1]]).bool(), query, key)
    unseen = key.tile_of_token() == 1
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 8, 2, 4), torch.randn(1, 11, 2, 4), torch.randn(1, 11, 2, 4)
    k[:, unseen], v[:, unseen] = torch.nan, torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = block_sparse_attention(*leaves, pattern, impl=name)
    grads = torch.autograd.grad(out.sin().sum(), leaves)
    assert out.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads)
    assert not grads[1][:, unseen].any()
    assert not grads[2][:, unseen].any()


def test_garbage_behind_the_counts(path) -> None:
    pattern, inputs = make_pattern("ragged"), make_inputs("ragged", torch.float32)
    garbage = pattern.indices.masked_fill(~pattern.is_listed(), 2**31 - 1)
    dirty = BlockPattern(pattern.query_tiles, pattern.key_tiles, garbage, pattern.counts)
    for name in IMPLEMENTATIONS:
        expected = block_sparse_attention(**inputs, pattern=pattern, impl=name)
        assert torch.equal(block_sparse_attention(**inputs, pattern=dirty, impl=name), expected)


@pytest.mark.parametrize("shape", ["paper", "ragged", "one_token_tiles"])
def test_work_follows_the_kept_tokens(shape) -> None:
    pattern = make_pattern(shape)
    batch, heads = SHAPES[shape][2:4]
    scores = sum(
        chunk.query_rows.numel() * chunk.key_rows.shape[1]
        for b in range(batch)
        for h in range(heads)
        for chunk in portable._chunks(pattern, b, range(h, h + 1), row_bytes=10**9)
    )
    assert scores == int(pattern.token_mask().sum())


def test_backward_repeats_bitwise() -> None:
    pattern, inputs = make_pattern("paper"), make_inputs("paper", torch.float32)
    leaves = [x.requires_grad_() for x in inputs.values()]
    runs = [torch.autograd.grad(block_sparse_attention(*leaves, pattern).sin().sum(), leaves) for _ in range(3)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("shape", ["uniform", "ragged"])
def test_opcheck(shape) -> None:
    pattern = make_pattern(shape)
    q, k, v = (x.requires_grad_() for x in make_inputs(shape, torch.float32).values())
    torch.library.opcheck(_forward_op, (q, k, v, *_flatten(pattern), 0.3, ""))
    with torch.no_grad():
        out, lse = _forward_op(q, k, v, *_flatten(pattern), 0.3, "")
    arguments = (out, None, q.detach(), k.detach(), v.detach(), out, lse, *_flatten(pattern), 0.3, "")
    torch.library.opcheck(_backward_op, arguments)
    torch.library.opcheck(_backward_op, (out, lse, *arguments[2:]))


def test_compiles_to_one_graph() -> None:
    def attend(q, k, v, pattern):
        # The pattern is made inside the graph, as a rule that picks tiles makes it.
        pattern = BlockPattern(pattern.query_tiles, pattern.key_tiles, pattern.indices.clone(), pattern.counts)
        out, lse = block_sparse_attention(q, k, v, pattern, return_lse=True)
        return out.sin().sum() + lse.cos().nan_to_num().sum()

    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for shape in ("uniform", "ragged"):
        pattern = make_pattern(shape, empty=False)
        leaves = [x.requires_grad_() for x in make_inputs(shape, torch.float64).values()]
        expected = torch.autograd.grad(attend(*leaves, pattern), leaves)
        for a, b in zip(torch.autograd.grad(compiled(*leaves, pattern), leaves), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_autocast_casts_as_dense_attention_does() -> None:
    pattern, inputs = make_pattern("uniform"), make_inputs("uniform", torch.float32)
    leaves = [x.requires_grad_() for x in inputs.values()]
    expected = block_sparse_attention(*(x.bfloat16() for x in leaves), pattern)
    with torch.autocast("cpu", torch.bfloat16):
        out = block_sparse_attention(*leaves, pattern)
        grads = torch.autograd.grad(out.float().sum(), leaves)
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)
    assert all(a.dtype == torch.float32 for a in grads)
    for a, b in zip(grads, torch.autograd.grad(expected.float().sum(), leaves), strict=True):
        assert torch.equal(a, b)


def test_choice_of_implementation(monkeypatch) -> None:
    pattern, inputs = make_pattern("uniform"), make_inputs("uniform", torch.float32)
    name, trace = impl.choose_implementation(**inputs, pattern=pattern)
    assert name == "portable"
    assert trace["portable"] == ()
    with pytest.raises(ValueError, match="'fast'; there are"):
        block_sparse_attention(**inputs, pattern=pattern, impl="fast")
    refusing = impl.Implementation(lambda *_: ("too hot", "too cold"), portable.forward, portable.backward)
    monkeypatch.setattr(impl, "load_implementation", {"portable": refusing}.__getitem__)
    monkeypatch.setattr(impl, "IMPLEMENTATIONS", {"portable": "somewhere"})
    for wish in (None, "portable"):
        with pytest.raises(NotImplementedError, match="portable: too hot, too cold"):
            block_sparse_attention(**inputs, pattern=pattern, impl=wish)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"query": torch.zeros(20, 4, 8)}, ValueError, r"query \[batch, seq, heads, head_size\], got shape \(20, 4, 8\)"),
        ({"value": torch.zeros(2, 24, 2, 8, dtype=torch.int32)}, TypeError, "floating-point value, got torch.int32"),
        ({"key": torch.zeros(2, 24, 2, 8, dtype=torch.float64)}, ValueError, "one dtype, got"),
        ({"key": torch.zeros(2, 24, 2, 8, device="meta")}, ValueError, "one device, got"),
        ({"value": torch.zeros(2, 23, 2, 8)}, ValueError, r"of one shape, got \(2, 24, 2, 8\) and \(2, 23, 2, 8\)"),
        ({"query": torch.zeros(2, 20, 3, 8)}, ValueError, "multiple of key heads, got 3 and 2"),
        ({"query": torch.zeros(2, 0, 4, 8)}, ValueError, "no empty dimension"),
        ({"query": torch.zeros(2, 21, 4, 8)}, ValueError, r"S_q, S_k = \(20, 24\), the tensors have \(21, 24\)"),
        ({"query": torch.zeros(2, 20, 2, 8)}, ValueError, r"indices \[1 or 2, 1 or 2"),
        ({"scale": "1"}, TypeError, "scale as a number, got '1'"),
        ({"scale": float("nan")}, ValueError, "finite scale, got scale=nan"),
        ({"scale": float("inf")}, ValueError, "finite scale, got scale=inf"),
        ({"key": [[0.0]]}, TypeError, "key as a tensor, got list"),
        ({"pattern": torch.ones(2, 2, dtype=torch.bool)}, TypeError, "BlockPattern, got Tensor; see BlockPattern.from_mask"),
        ({"impl": ""}, ValueError, "impl as None or the name of an implementation, got ''"),
    ],
)
def test_bad_input(changes, error, text) -> None:
    arguments = {**make_inputs("uniform", torch.float32), "pattern": make_pattern("uniform"), **changes}
    with pytest.raises(error, match=text):
        block_sparse_attention(**arguments)


@pytest.mark.parametrize("carries", ["query", "key", "value", "gate"])
@pytest.mark.parametrize("by", ["dual_level", "jvp"])
def test_forward_mode_derivatives_are_refused(by, carries) -> None:
    """A custom op drops tangents without a word, and its result would have one of zero."""
    layout = TileLayout.uniform(8, 4)
    pattern = BlockPattern.from_mask(torch.eye(2, dtype=torch.bool), layout, layout)
    inputs = {name: torch.randn(1, 8, 2, 8) for name in ("query", "key", "value", "gate")}

    def layer(x: torch.Tensor, **changes) -> torch.Tensor:
        settings = {"grid_tyx": (2, 2, 2), "sparsity": 0.5, "tile_tyx": (1, 2, 2)}
        return video_sparse_attention(**{**settings, **inputs, carries: x, **changes})

    learned = {name: x.clone().requires_grad_() for name, x in inputs.items() if name != carries}

    def fine(x: torch.Tensor) -> torch.Tensor:
        q, k, v = ({**inputs, carries: x}[name] for name in ("query", "key", "value"))
        return block_sparse_attention(q, k, v, pattern)

    def differentiated(attend, x: torch.Tensor) -> None:
        if by == "jvp":
            torch.func.jvp(attend, (x,), (torch.ones_like(x),))
        else:
            with forward_ad.dual_level():
                attend(forward_ad.make_dual(x, torch.ones_like(x)))

    # With inputs that require a gradient, torch itself refuses under `jvp`.
    pooled = tuple(pool_tiles(inputs[name], (2, 2, 2), tile_tyx=(1, 2, 2)) for name in ("query", "key", "value"))
    dense = partial(layer, sparsity=0.0, pooled=pooled) if carries == "gate" else partial(layer, pooled=pooled)

    def of_means(x: torch.Tensor) -> torch.Tensor:
        return layer(inputs[carries], pooled=(x[:, :2], *pooled[1:]))

    for attend in (
        layer,
        dense,
        partial(pool_tiles, grid_tyx=(2, 2, 2), tile_tyx=(1, 2, 2)),
        of_means,
        *([] if by == "jvp" else [partial(layer, **learned)]),
        *([] if carries == "gate" else [fine]),
    ):
        with pytest.raises(NotImplementedError, match="without a forward-mode tangent"):
            differentiated(attend, inputs[carries].clone())
    with forward_ad.dual_level():
        assert layer(inputs[carries]).shape == inputs[carries].shape, "a level alone is no tangent"
