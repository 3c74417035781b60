"""Video Sparse Attention against its plain reference in float64: outputs, all gradients, selection, text, gate."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from fastvideo.block_sparse import coarse as coarse_stage
from fastvideo.block_sparse import (
    fine_stage,
    inference,
    num_kept_tiles,
    selection,
    video_geometry,
    video_sparse,
    video_sparse_attention,
)
from fastvideo.block_sparse.video_sparse_reference import reference_tile_of_token, video_sparse_attention_reference
from fastvideo.testing import assert_op_within_budget
from fastvideo.video import TileGrid, pooling

# Grid, tile, batch, query heads, key heads, head size, replicated tokens, sparsity.
CASES = {
    "one_token": ((1, 1, 1), (4, 4, 4), 1, 1, 1, 4, 0, 0.5),
    "one_token_and_text": ((1, 1, 1), (4, 4, 4), 1, 2, 1, 4, 3, 0.0),
    "uniform": ((4, 4, 6), (2, 2, 2), 2, 2, 2, 8, 0, 0.75),
    "uniform_text": ((4, 4, 4), (2, 2, 2), 1, 2, 1, 8, 16, 0.5),
    "primes": ((3, 5, 7), (2, 2, 2), 2, 4, 2, 5, 0, 0.8),
    "primes_text": ((5, 3, 7), (2, 2, 3), 2, 2, 2, 6, 13, 0.7),
    "one_token_tiles": ((2, 3, 4), (1, 1, 1), 1, 2, 2, 4, 2, 0.6),
    "keep_one": ((4, 5, 6), (2, 2, 2), 1, 3, 1, 8, 0, 0.99),
    "keep_all": ((3, 4, 5), (2, 2, 2), 1, 2, 2, 8, 5, 0.0),
    "paper_tile": ((5, 6, 8), (4, 4, 4), 1, 2, 2, 16, 7, 0.5),
    "raster_tile": ((6, 3, 4), (2, 3, 4), 1, 2, 2, 8, 0, 0.4),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def make_inputs(case: str, dtype: torch.dtype, *, gate: bool = True, size: float = 3.0) -> dict[str, torch.Tensor]:
    grid_tyx, _, batch, heads, kv_heads, head_size, num_replicated, _ = CASES[case]
    num_tokens = math.prod(grid_tyx)
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    inputs = {
        "query": size * randn(batch, num_tokens + num_replicated, heads, head_size),
        "key": size * randn(batch, num_tokens + num_replicated, kv_heads, head_size),
        "value": randn(batch, num_tokens + num_replicated, kv_heads, head_size),
    }
    if gate:
        inputs["gate"] = randn(batch, num_tokens, heads, head_size)
    return {name: x.to(dtype) for name, x in inputs.items()}


def settings_of(case: str) -> dict[str, object]:
    grid_tyx, tile_tyx, *_, num_replicated, sparsity = CASES[case]
    return {"grid_tyx": grid_tyx, "tile_tyx": tile_tyx, "num_replicated": num_replicated, "sparsity": sparsity}


def kept_tiles(case: str, inputs: dict[str, torch.Tensor], scale: float | None = None) -> torch.Tensor:
    """The tiles that the operation keeps, `[B, H, N, k]`."""
    grid_tyx, tile_tyx, *_, num_replicated, sparsity = CASES[case]
    q, k = (
        video_sparse.pool_tiles(inputs[name].detach(), grid_tyx, tile_tyx=tile_tyx, num_replicated=num_replicated)
        for name in ("query", "key")
    )
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return selection.select_tiles(q * scale, k, num_kept_tiles(q.shape[1], sparsity))


def check(case: str, inputs: dict[str, torch.Tensor], scale: float | None = None) -> None:
    """Both sides keep the same tiles, because rounding may turn a close choice."""
    indices = kept_tiles(case, inputs, scale)
    assert_op_within_budget(
        partial(video_sparse_attention, scale=scale, **settings_of(case)),
        partial(video_sparse_attention_reference, scale=scale, indices=indices, **settings_of(case)),
        inputs,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case, dtype) -> None:
    check(case, make_inputs(case, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", ["one_token_and_text", "keep_all"])
def test_keeping_everything_without_gradients(case, dtype) -> None:
    """Where nothing is skipped and no gradient is needed, dense kernels run."""
    assert_op_within_budget(
        partial(video_sparse_attention, **settings_of(case)),
        partial(video_sparse_attention_reference, **settings_of(case)),
        make_inputs(case, dtype),
        gradients=False,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["uniform_text", "primes"])
def test_without_gate(case, dtype) -> None:
    check(case, make_inputs(case, dtype, gate=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", ["uniform", "primes_text"])
def test_activations_of_real_size(case, dtype) -> None:
    check(case, make_inputs(case, dtype, size=17.0))


@pytest.mark.parametrize("scale", [-0.3, 0.0, 1.0])
@pytest.mark.parametrize("case", ["uniform_text", "primes"])
def test_scales(case, scale) -> None:
    check(case, make_inputs(case, torch.float32), scale)


@pytest.mark.parametrize("scale", [None, -0.3, 0.0])
@pytest.mark.parametrize("case", CASES)
def test_selection_equals_the_reference(case, scale) -> None:
    inputs = make_inputs(case, torch.float64)
    out = video_sparse_attention(**inputs, scale=scale, **settings_of(case))
    expected = video_sparse_attention_reference(**inputs, scale=scale, **settings_of(case))
    torch.testing.assert_close(out, expected)


def test_gradcheck() -> None:
    leaves = {name: x.requires_grad_() for name, x in make_inputs("primes_text", torch.float64, size=1.0).items()}

    def attend(*tensors):
        return video_sparse_attention(**dict(zip(leaves, tensors, strict=True)), **settings_of("primes_text"))

    assert torch.autograd.gradcheck(attend, list(leaves.values()), fast_mode=True)


@pytest.mark.parametrize("case", ["uniform_text", "primes", "paper_tile"])
def test_sparsity_zero_is_dense_attention_and_the_gated_coarse_part(case) -> None:
    grid_tyx, tile_tyx, *_ = CASES[case]
    inputs = make_inputs(case, torch.float64)
    settings = {**settings_of(case), "sparsity": 0.0}
    heads_first = [inputs[name].transpose(1, 2) for name in ("query", "key", "value")]
    dense = F.scaled_dot_product_attention(*heads_first, enable_gqa=True).transpose(1, 2)
    gate = inputs.pop("gate")
    torch.testing.assert_close(video_sparse_attention(**inputs, **settings), dense)

    tiles = torch.tensor(reference_tile_of_token(grid_tyx, tile_tyx))
    num_tokens = tiles.numel()
    means = [
        torch.stack([x[:, :, :num_tokens][:, :, tiles == tile].mean(2) for tile in range(int(tiles.max()) + 1)], dim=2)
        for x in heads_first
    ]
    coarse = F.scaled_dot_product_attention(*means, enable_gqa=True).transpose(1, 2)[:, tiles]
    dense[:, :num_tokens] += coarse * gate
    torch.testing.assert_close(video_sparse_attention(**inputs, gate=gate, **settings), dense)


def test_zero_gate_is_no_gate_forward() -> None:
    inputs = make_inputs("primes_text", torch.float32)
    gate = inputs.pop("gate")
    without = video_sparse_attention(**inputs, **settings_of("primes_text"))
    assert torch.equal(video_sparse_attention(**inputs, gate=torch.zeros_like(gate), **settings_of("primes_text")), without)


def test_rows_of_the_gate_behind_the_video_are_not_read() -> None:
    inputs = make_inputs("primes_text", torch.float32)
    expected = video_sparse_attention(**inputs, **settings_of("primes_text"))
    long_gate = torch.full_like(inputs["query"], torch.nan)
    long_gate[:, : inputs["gate"].shape[1]] = inputs["gate"]
    inputs["gate"] = long_gate.requires_grad_()
    out = video_sparse_attention(**inputs, **settings_of("primes_text"))
    assert torch.equal(out, expected)
    (grad,) = torch.autograd.grad(out.sum(), [long_gate])
    assert grad.isfinite().all()
    assert not grad[:, math.prod(CASES["primes_text"][0]) :].any()


@pytest.mark.parametrize("case", ["uniform", "primes"])
def test_tokens_of_dropped_tiles_are_not_read(case) -> None:
    inputs = make_inputs(case, torch.float32, gate=False)
    tiles = torch.tensor(reference_tile_of_token(*CASES[case][:2]))
    sees = (kept_tiles(case, inputs) == 0).any(-1)  # [B, H, N]: which query tiles keep tile 0
    untouched = ~sees.transpose(1, 2)[:, tiles]
    expected = video_sparse_attention(**inputs, **settings_of(case))
    # Values take no part in the selection, so poison there changes no choice.
    inputs["value"][:, tiles == 0] = torch.nan
    out = video_sparse_attention(**inputs, **settings_of(case))
    assert torch.equal(out[untouched], expected[untouched])
    assert out[~untouched].isnan().all()
    assert 0 < untouched.sum() < untouched.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_key_that_is_nan_shows_everywhere(dtype) -> None:
    inputs = make_inputs("uniform", dtype, gate=False)
    inputs["key"][0, 7, 0, 0] = torch.nan
    for attend in (video_sparse_attention, video_sparse_attention_reference):
        out = attend(**inputs, **settings_of("uniform"))
        assert out[0, :, 0].isnan().all()
        assert not out[1].isnan().any()
    means = torch.randn(2, 1, 20, 1, 8, dtype=dtype).unbind(0)
    means[1][:, 13] = torch.nan
    lists = selection.select_tiles(*means, 1)
    assert lists.unique().tolist() == [13]


def test_a_query_tile_of_nan_leaves_the_others_alone() -> None:
    inputs = make_inputs("primes", torch.float32, gate=False)
    tiles = torch.tensor(reference_tile_of_token(*CASES["primes"][:2]))
    expected = video_sparse_attention(**inputs, **settings_of("primes"))
    inputs["query"][:, tiles == 1] = torch.nan
    out = video_sparse_attention(**inputs, **settings_of("primes"))
    torch.testing.assert_close(out[:, tiles != 1], expected[:, tiles != 1])
    assert out[:, tiles == 1].isnan().all()
    num_kept = num_kept_tiles(int(tiles.max()) + 1, CASES["primes"][-1])
    # All scores of that tile are NaN: still exactly k distinct tiles.
    assert torch.equal(kept_tiles("primes", inputs)[:, :, 1], torch.arange(num_kept, dtype=torch.int32).expand(2, 4, num_kept))


def test_equal_scores_keep_the_first_tiles() -> None:
    inputs = make_inputs("primes", torch.float32, gate=False)
    inputs["query"].zero_()
    num_kept = kept_tiles("primes", inputs).shape[-1]
    first = torch.tensor(reference_tile_of_token(*CASES["primes"][:2])) < num_kept
    expected = inputs["value"][:, first].mean(1, keepdim=True).repeat_interleave(2, dim=2)
    out = video_sparse_attention(**inputs, **settings_of("primes"))
    torch.testing.assert_close(out, expected.expand_as(out))


def test_choice_passes_no_gradient_without_gate() -> None:
    """Without a coarse part the gradient is that of attention over fixed tiles."""
    inputs = make_inputs("uniform", torch.float64, gate=False)
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}
    indices = kept_tiles("uniform", inputs)
    out = video_sparse_attention(**leaves, **settings_of("uniform"))
    expected = video_sparse_attention_reference(**leaves, indices=indices, **settings_of("uniform"))
    for a, b in zip(
        torch.autograd.grad(out.sin().sum(), list(leaves.values())),
        torch.autograd.grad(expected.sin().sum(), list(leaves.values())),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_strided_inputs() -> None:
    inputs = make_inputs("primes_text", torch.float32)
    expected = video_sparse_attention(**inputs, **settings_of("primes_text"))
    strided = {name: x.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0) for name, x in inputs.items()}
    assert not any(x.is_contiguous() for x in strided.values())
    torch.testing.assert_close(video_sparse_attention(**strided, **settings_of("primes_text")), expected)


def test_changing_shapes_in_one_process() -> None:
    for _ in range(2):
        for case in ("uniform", "primes_text", "one_token"):
            check(case, make_inputs(case, torch.float32))


def test_number_of_tiles_and_geometry_at_hand() -> None:
    inputs = make_inputs("primes_text", torch.float32)
    grid_tyx, tile_tyx, *_, num_replicated, sparsity = CASES["primes_text"]
    geometry = video_geometry(TileGrid(grid_tyx, tile_tyx), "cpu")
    num_kept = num_kept_tiles(geometry.grid.num_tiles, sparsity)
    settings = {"tile_tyx": tile_tyx, "num_replicated": num_replicated, "num_kept": num_kept, "geometry": geometry}
    expected = video_sparse_attention(**inputs, **settings_of("primes_text"))
    assert torch.equal(video_sparse_attention(**inputs, grid_tyx=grid_tyx, **settings), expected)
    assert video_geometry(TileGrid(grid_tyx, tile_tyx), "cpu") is geometry


@pytest.mark.parametrize("at_hand", [True, False])
@pytest.mark.parametrize("case", ["uniform", "primes_text"])
def test_compiles_to_one_graph(case, at_hand) -> None:
    grid_tyx, tile_tyx, *_, num_replicated, sparsity = CASES[case]
    leaves = {name: x.requires_grad_() for name, x in make_inputs(case, torch.float64).items()}
    geometry = video_geometry(TileGrid(grid_tyx, tile_tyx), "cpu") if at_hand else None
    settings = {"num_kept": num_kept_tiles(TileGrid(grid_tyx, tile_tyx).num_tiles, sparsity), "geometry": geometry}

    def attend(leaves):
        return (
            video_sparse_attention(**leaves, grid_tyx=grid_tyx, tile_tyx=tile_tyx, num_replicated=num_replicated, **settings)
            .sin()
            .sum()
        )

    torch.compiler.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(attend(leaves), list(leaves.values()))
    for a, b in zip(torch.autograd.grad(compiled(leaves), list(leaves.values())), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_autocast() -> None:
    inputs = make_inputs("primes_text", torch.float32)
    expected = video_sparse_attention(**{name: x.bfloat16() for name, x in inputs.items()}, **settings_of("primes_text"))
    with torch.autocast("cpu", torch.bfloat16):
        out = video_sparse_attention(**inputs, **settings_of("primes_text"))
    assert torch.equal(out, expected)


def test_layouts_of_a_new_grid_do_not_follow_the_default_device() -> None:
    inputs = {name: torch.randn(1, 3 * 5 * 7, 2, 8) for name in ("query", "key", "value")}
    with torch.device("meta"):
        out = video_sparse_attention(**inputs, grid_tyx=(3, 5, 7), tile_tyx=(1, 3, 5), sparsity=0.5)
    expected = video_sparse_attention(**inputs, grid_tyx=(3, 5, 7), tile_tyx=(1, 3, 5), sparsity=0.5)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"sparsity": 1.0}, ValueError, r"sparsity in \[0, 1\), got 1.0"),
        ({"sparsity": "0.5"}, TypeError, r"sparsity as a number in \[0, 1\), got '0.5'"),
        ({"sparsity": math.nan}, ValueError, "sparsity"),
        ({"sparsity": None}, ValueError, "either sparsity or num_kept"),
        ({"num_kept": 3}, ValueError, "either sparsity or num_kept"),
        ({"sparsity": None, "num_kept": 13}, ValueError, r"num_kept in \[1, 12\]"),
        ({"grid_tyx": (4, 4, 5)}, ValueError, r"grid \(4, 4, 5\) with num_replicated=0 has 80 tokens, query has 96"),
        ({"grid_tyx": (4, 24)}, ValueError, "grid_tyx"),
        ({"tile_tyx": (0, 1, 1)}, ValueError, "tile_tyx"),
        ({"tile_tyx": 2}, ValueError, r"tile_tyx to be three integers \(t, y, x\), got 2"),
        ({"num_replicated": -1}, ValueError, "num_replicated=-1"),
        ({"num_replicated": "1"}, TypeError, "num_replicated as an integer, got '1'"),
        ({"num_replicated": 3}, ValueError, "has 99 tokens, query has 96"),
        ({"scale": math.nan}, ValueError, "finite scale"),
        ({"scale": "1"}, TypeError, "scale as a number, got '1'"),
        ({"gate": torch.zeros(2, 95, 2, 8)}, ValueError, r"gate of shape \(2, 96, 2, 8\)"),
        ({"gate": torch.zeros(2, 96, 2, 8, dtype=torch.float64)}, ValueError, "gate in torch.float32"),
        ({"key": torch.zeros(2, 96, 3, 8)}, ValueError, "one shape"),
        ({"key": torch.zeros(2, 96, 2, 8, dtype=torch.float64)}, ValueError, "one dtype and device"),
        ({"query": torch.zeros(2, 96, 2, 8, dtype=torch.int64)}, TypeError, "floating-point query"),
        ({"query": torch.zeros(96, 2, 8)}, ValueError, r"query \[batch, seq, heads, head_size\]"),
        ({"query": torch.zeros(2, 96, 3, 8)}, ValueError, "multiple of key heads"),
        ({"geometry": video_geometry(TileGrid((2, 6, 8), (2, 2, 2)), "cpu")}, ValueError, "the geometry is that of"),
        ({"sparsity": None, "num_kept": 2.5}, TypeError, "num_kept as an integer, got 2.5"),
        ({"sparsity": None, "num_kept": True}, TypeError, "num_kept as an integer, got True"),
        ({"gate": 1.0}, TypeError, "gate as a tensor, got float"),
        ({"pooled": (torch.zeros(2, 12, 2, 8),) * 4}, ValueError, "means of query and key, got 4"),
        ({"impl": ""}, ValueError, "impl as None or the name of an implementation, got ''"),
        # Concatenated, another dtype would turn the whole call's in silence.
        ({"replicated": (torch.zeros(2, 3, 2, 8, dtype=torch.float64),) * 3}, ValueError, "replicated query like the video's"),
        ({"replicated": (torch.zeros(1, 3, 2, 8),) * 3}, ValueError, r"\(2, 96, 2, 8\) with another length.*\(1, 3, 2, 8\)"),
        ({"replicated": (None,) * 3}, TypeError, r"replicated\[0\] as a tensor, got NoneType"),
    ],
)
def test_bad_input(changes, error, text) -> None:
    inputs = make_inputs("uniform", torch.float32, gate=False)
    with pytest.raises(error, match=text):
        video_sparse_attention(**{**inputs, **settings_of("uniform"), **changes})


def test_means_at_hand() -> None:
    case = "primes_text"
    inputs = make_inputs(case, torch.float64)
    grid_tyx, tile_tyx, *_, num_replicated, _ = CASES[case]
    leaves = {name: x.requires_grad_() for name, x in inputs.items()}

    def attend(pooled=None):
        return video_sparse_attention(**leaves, pooled=pooled, **settings_of(case))

    pooled = tuple(
        video_sparse.pool_tiles(leaves[name], grid_tyx, tile_tyx=tile_tyx, num_replicated=num_replicated)
        for name in ("query", "key", "value")
    )
    expected = torch.autograd.grad(attend().sin().sum(), list(leaves.values()))
    for a, b in zip(torch.autograd.grad(attend(pooled).sin().sum(), list(leaves.values())), expected, strict=True):
        torch.testing.assert_close(a, b)
    # They are used, not computed again.
    other = tuple(x.flip(1) for x in pooled)
    assert not torch.allclose(attend(other), attend())
    without = {name: x.detach() for name, x in leaves.items() if name != "gate"}
    torch.testing.assert_close(
        video_sparse_attention(**without, pooled=pooled[:2], **settings_of(case)),
        video_sparse_attention(**without, **settings_of(case)),
    )
    with pytest.raises(ValueError, match="means of query, key and value, got 2"):
        attend(pooled[:2])
    with pytest.raises(ValueError, match=r"means of shape \(2, 18, 2, 6\) in torch.float64.*got \(2, 17, 2, 6\)"):
        attend((pooled[0][:, 1:], *pooled[1:]))
    with pytest.raises(ValueError, match=r"in torch.float32 on cpu"):
        attend(tuple(x.float() for x in pooled))


@pytest.mark.parametrize(
    ("shape", "settings", "text"),
    [
        ((1, 8, 1, 1), {"num_replicated": -1}, "num_replicated >= 0, got num_replicated=-1"),
        ((1, 8, 1, 1), {"num_replicated": 1}, r"S=8, H, D\].*got \(1, 7, 1, 1\)"),
        ((1, 8, 1), {}, r"got \(1, 8, 1\)"),
        ((1, 8, 1, 1), {"tile_tyx": "small"}, "got 'small'"),
    ],
)
def test_means_that_are_refused(shape, settings, text) -> None:
    with pytest.raises(ValueError, match=text):
        video_sparse.pool_tiles(torch.zeros(shape), (2, 2, 2), **settings)


def test_text_handed_over_by_itself() -> None:
    case = "primes_text"
    inputs, settings = make_inputs(case, torch.float32), settings_of(case)
    num_replicated = settings.pop("num_replicated")
    gate = inputs.pop("gate")
    expected = video_sparse_attention(**inputs, gate=gate, num_replicated=num_replicated, **settings)
    num_video = math.prod(settings["grid_tyx"])
    video = [x[:, :num_video] for x in inputs.values()]
    text = tuple(x[:, num_video:] for x in inputs.values())
    assert torch.equal(video_sparse_attention(*video, gate=gate, replicated=text, **settings), expected)
    with pytest.raises(ValueError, match="either replicated or num_replicated"):
        video_sparse_attention(*video, replicated=text, num_replicated=3, **settings)
    with pytest.raises(ValueError, match=r"of one length, got \[13, 12, 13\]"):
        video_sparse_attention(*video, replicated=(text[0], text[1][:, 1:], text[2]), **settings)
    with pytest.raises(ValueError, match="query, key and value of the text"):
        video_sparse_attention(*video, replicated=text[:2], **settings)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", ["uniform_text", "primes", "paper_tile"])
def test_delta_is_that_of_the_fine_output(case, dtype) -> None:
    """`reference` reads the output in its backward, and gates of size 5 make the gated one another."""
    inputs = make_inputs(case, dtype)
    inputs["gate"] = 5 * inputs["gate"]
    bound = {**settings_of(case), "indices": kept_tiles(case, inputs)}
    assert_op_within_budget(
        partial(video_sparse_attention, impl="reference", **settings_of(case)),
        partial(video_sparse_attention_reference, **bound),
        inputs,
    )


@pytest.mark.parametrize("gate", [True, False])
@pytest.mark.parametrize("case", ["primes_text", "keep_one", "paper_tile"])
def test_without_gradients_the_bits_are_the_same(case: str, gate: bool) -> None:
    inputs = make_inputs(case, torch.float32, gate=gate)
    leaves = {name: x.detach().requires_grad_() for name, x in inputs.items()}
    expected = video_sparse_attention(**leaves, **settings_of(case))
    assert expected.requires_grad
    assert torch.equal(video_sparse_attention(**inputs, **settings_of(case)), expected)
    with torch.no_grad():
        assert torch.equal(video_sparse_attention(**leaves, **settings_of(case)), expected)
    with torch.inference_mode():
        assert torch.equal(video_sparse_attention(**inputs, **settings_of(case)), expected)


def test_ops() -> None:
    case = "primes_text"
    grid_tyx, tile_tyx, *_, num_replicated, _ = CASES[case]
    inputs = make_inputs(case, torch.float32)
    query, key, value, gate = inputs.values()
    coarse = torch.randn(2, 18, 2, 6)
    indices = kept_tiles(case, inputs)
    where = (grid_tyx, tile_tyx, num_replicated, 0.3, "portable")
    leaves = [x.requires_grad_() for x in (query, key, value, coarse, gate)]
    torch.library.opcheck(fine_stage._forward_op, (*leaves, indices, *where))
    torch.library.opcheck(fine_stage._forward_op, (*leaves[:3], None, None, indices, *where))
    plain = [x.detach() for x in leaves]
    out, lse = fine_stage._forward_op(*plain, indices, *where)
    torch.library.opcheck(fine_stage._backward_op, (out.sin(), *plain, indices, out, lse, *where))
    torch.library.opcheck(fine_stage._add_gated_op, (out, coarse.detach(), gate.detach(), grid_tyx, tile_tyx))
    torch.library.opcheck(selection._select_op, (torch.randn(2, 9, 4, 6), torch.randn(2, 9, 2, 6), 3, -0.5))
    video = query.detach()[:, : math.prod(grid_tyx)].requires_grad_()
    torch.library.opcheck(pooling._tile_sum_op, (video, grid_tyx, tile_tyx))
    for three in (leaves[:3], [*plain[:2], None]):
        torch.library.opcheck(coarse_stage._means_op, (*three, grid_tyx, tile_tyx, 0.3))
    low = coarse_stage._means_op(*plain[:3], grid_tyx, tile_tyx, 0.3)[2:]
    torch.library.opcheck(coarse_stage._means_backward_op, (*low, grid_tyx, tile_tyx, query.shape[1], 0.3))
    grads = [x.clone() for x in plain[:3]]
    torch.library.opcheck(coarse_stage._add_gradients_op, (*grads, *low, grid_tyx, tile_tyx, 0.3))
    for opened in (plain[4], None):
        torch.library.opcheck(inference._whole_op, (*plain[:3], opened, grid_tyx, tile_tyx, num_replicated, 3, 0.3, "portable"))
    torch.library.opcheck(pooling._tile_expand_op, (coarse.detach(), grid_tyx, tile_tyx, torch.bfloat16))


def test_scores_stay_in_their_scratch(monkeypatch) -> None:
    """More than 4,096 tiles, a bound far below one head's scores, and the same lists."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 1, 4200, 2, 4).unbind(0)
    bound, largest = 4200 * 20 * 100, 0
    original = selection.top_k_ascending

    def watched(scores, k):
        nonlocal largest
        largest = max(largest, scores.numel())
        return original(scores, k)

    monkeypatch.setattr(selection, "top_k_ascending", watched)
    monkeypatch.setattr(selection, "_SCRATCH_BYTES", bound)
    lists = selection.select_tiles(query, key, 2)
    assert 0 < largest * 20 <= bound
    for head in range(2):
        scores = query[0, ::400, head] @ key[0, :, head].T
        assert torch.equal(lists[0, head, ::400], scores.topk(2).indices.sort(-1).values.int())
