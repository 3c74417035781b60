"""What the Hopper kernels' launches hand over, on a CPU; `test_hopper.py` runs this file with Triton's interpreter on.

Gluon has no interpreter, so a walk of the kernels' plan in torch stands in for the kernels: it reads packed rows box by
box and granule by granule, masks as the masks say, and must give attention over the pattern.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from fastvideo.block_sparse import BlockPattern, TileLayout
from fastvideo.block_sparse.impl import GatedTiles
from fastvideo.block_sparse.impl.hopper import launch, packing, plan
from fastvideo.testing import assert_op_within_budget, reference_attention

from .hopper_interpreted import SHAPES, make_pattern, seen_by_rows, walk

# Query tile sizes, key tile sizes, batch, heads.
Sizes = tuple[list[int], list[int], int, int]


class Walked:
    """One kernel's arguments, read as the kernel reads them; `own` and `walked` name what the pointers lead to."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        self.a = arguments
        rows = arguments["row_token"]
        self.token = torch.arange(arguments["meta"].shape[1] * 64) if rows is None else rows

    def rows_of(self, boxes: str, granules: str, base: int, column: int, g: int, block: int, box_tokens: int, is_back: bool):
        """Loaded rows of a walk `[L, D]` in their order, their places, and what the block sees of them `[64, L]`."""
        a, head_size = self.a, self.a["D"]
        s_plan = a["s_plan"]
        assert s_plan in (0, a["meta"].shape[1])
        walks = plan.Plan(a["rows"], a["masks"], a["meta"])
        places, seen = [torch.zeros(0, dtype=torch.long)], [torch.zeros(64, 0, dtype=torch.bool)]
        counts = a["counts"] if "counts" in a else torch.tensor([0, a["max_blocks"]])
        for rows, mask in walk(walks, g if s_plan else 0, block, counts, is_back):
            places.append(rows.long())
            seen.append(seen_by_rows(mask, box_tokens))
        place = torch.cat(places)
        assert a[boxes].block_shape[0] == 64
        assert a[granules].block_shape[0] == 16
        assert a[boxes].base is a[granules].base or torch.equal(a[boxes].base, a[granules].base)
        return a[boxes].base[base + place, column : column + head_size].float(), place, torch.cat(seen, 1)

    def places(self):
        """Head and block of each item of work, and whether it walks backwards."""
        a = self.a
        if "queues" not in a:
            places = [(i_head, block) for i_head in range(a["num_heads"]) for block in range(int(a["counts"][1]))]
            return [(*place, self.wave_of(*place) % 2 == 1 and a["is_turning"]) for place in places]
        num_queues, flat = len(a["ends"]), a["queues"].flatten().tolist()
        items = [i for c, end in enumerate(a["ends"].tolist()) for i in range(c, end, num_queues)]
        return [(*divmod(flat[i], a["max_blocks"]), i // num_queues % 2 == 1) for i in items]

    def wave_of(self, i_head: int, block: int) -> int:
        """Which of its pairs a program works on there: blocks of several tiles come first, those of all heads."""
        joint, end = self.a["counts"].tolist()
        joint_pairs, alone_pairs = -(-joint // 2), -(-(end - joint) // 2)
        alone = self.a["num_heads"] * joint_pairs + i_head * alone_pairs + (block - joint) // 2
        return (i_head * joint_pairs + block // 2 if block < joint else alone) // self.a["programs"]

    def work(self):
        for i_head, block, is_back in self.places():
            i_b, i_h = divmod(self.a["first_head"] + i_head, self.a["HEADS"])
            token = self.token[block * 64 : block * 64 + 64].long()
            yield i_head, i_b, i_h, block, is_back, token, token >= 0

    def keys(self, i_head: int, i_b: int, i_h: int, block: int, is_back: bool):
        a = self.a
        base = i_b * a["s_row_b"] + i_head // a["GROUP"] * a["s_row_h"]
        column = i_h // a["GROUP"] * a["s_column_h"]
        k, _, seen = self.rows_of("key_boxes", "key_granules", base, column, i_head, block, a["BOX_TOKENS"], is_back)
        v, _, _ = self.rows_of("value_boxes", "value_granules", base, column, i_head, block, a["BOX_TOKENS"], is_back)
        return k, v, seen


def own_rows(x: torch.Tensor, i_b: int, i_h: int, token: torch.Tensor) -> torch.Tensor:
    return x[i_b, token.clamp(min=0), i_h].float().masked_fill((token < 0)[:, None], 0.0)


def forward_in_torch(**a: Any) -> None:
    walked = Walked(a | {"is_turning": False})
    for i_head, i_b, i_h, block, is_back, token, real in walked.work():
        k, v, seen = walked.keys(i_head, i_b, i_h, block, is_back)
        scores = (own_rows(a["query"], i_b, i_h, token) @ k.T * a["scale_log2"]).masked_fill(~seen, -torch.inf)
        lse = torch.logsumexp(scores * 0.6931471805599453, -1) if scores.shape[1] else torch.full((64,), -torch.inf)
        weights = (scores * 0.6931471805599453 - lse[:, None]).exp().nan_to_num(0.0)
        # Masked weights are 0, which a value that isn't finite would not survive: pads have to be zero.
        assert v.isfinite().all()
        out = weights @ v
        if a["gate"] is not None:
            assert a["NUM_TILES"] == a["coarse"].shape[1]
            # As the kernel finds it: by strides, and the tile of a row's granule.
            gate = a["gate"].as_strided(a["out"].shape, (a["s_gb"], a["s_gs"], a["s_gh"], 1))
            tiles = a["block_tiles"][block].repeat_interleave(16).clamp(min=0).long()
            out += own_rows(gate, i_b, i_h, token) * a["coarse"][i_b, tiles, i_h].float()
        assert a["out"].stride(0) == a["NUM_ROWS"] * a["HEADS"] * a["D"]
        assert a["lse"].stride(0) == a["NUM_ROWS"] * a["HEADS"]
        a["out"][i_b, token[real], i_h] = out[real].to(a["out"].dtype)
        a["lse"][i_b, token[real], i_h] = lse[real]


def dq_in_torch(**a: Any) -> None:
    walked = Walked(a | {"is_turning": a["IN_STEP"] > 0})
    for i_head, i_b, i_h, block, is_back, token, real in walked.work():
        k, v, seen = walked.keys(i_head, i_b, i_h, block, is_back)
        first = (i_head * a["max_blocks"] + block) * 64
        lse, delta = a["stats"][first : first + 64].float().unbind(1)
        p = torch.exp2(own_rows(a["query"], i_b, i_h, token) @ k.T * a["scale_log2"] - lse[:, None])
        dp = own_rows(a["dout"], i_b, i_h, token) @ v.T - delta[:, None]
        dq = torch.where(seen, p, 0.0) * dp @ k * a["scale"]
        a["dquery"][i_b, token[real], i_h] = dq[real].to(a["dquery"].dtype)


def dkdv_in_torch(**a: Any) -> None:
    walked, group = Walked(a), a["GROUP"]
    # A queue that leaves a block out leaves this.
    for head in {i_head for i_head, *_ in walked.places()}:
        i_b, i_h = divmod(a["first_head"] + head, a["HEADS"])
        a["dkey"][i_b, :, i_h] = a["dvalue"][i_b, :, i_h] = torch.nan
    stats = a["stats_boxes"].base
    assert (a["stats_boxes"].block_shape, a["stats_granules"].block_shape) == ([128], [32])
    for i_head, i_b, i_h, block, is_back, token, real in walked.work():
        own = i_b * a["s_krow_b"] + i_head * a["s_krow_h"] + block * 64
        column = i_h * a["s_kcolumn_h"]
        k, v = (a[name].base[own : own + 64, column : column + a["D"]].float() for name in ("key_boxes", "value_boxes"))
        dk, dv = torch.zeros(64, a["D"]), torch.zeros(64, a["D"])
        for g in range(i_head * group, (i_head + 1) * group):
            base = i_b * a["s_row_b"] + g * a["s_row_h"]
            column = (i_h * group + g - i_head * group) * a["s_column_h"]
            q, place, seen = walked.rows_of("query_boxes", "query_granules", base, column, g, block, 64, is_back)
            do, _, _ = walked.rows_of("dout_boxes", "dout_granules", base, column, g, block, 64, is_back)
            at = (g * a["max_rows"] + place) * 2
            p = torch.where(seen, torch.exp2(k @ q.T * a["scale_log2"] - stats[at]), 0.0)
            dv += p @ do
            dk += p * (v @ do.T - stats[at + 1]) @ q
        a["dkey"][i_b, token[real], i_h] = (dk * a["scale"])[real].to(a["dkey"].dtype)
        a["dvalue"][i_b, token[real], i_h] = dv[real].to(a["dvalue"].dtype)


class InTorch:
    """Stands in for a kernel: checks that a launch names exactly its arguments, then runs `function`."""

    def __init__(self, kernel: Any, function: Any) -> None:
        self.kernel, self.function = kernel, function

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        assert 1 <= grid[0] <= 132

        def run(**arguments: Any) -> None:
            assert arguments.pop("num_warps") == 4
            assert set(arguments) == set(self.kernel.arg_names)
            assert "ends" not in arguments or len(arguments["ends"]) == 2 * grid[0]
            self.function(**arguments, programs=grid[0])

        return run


@pytest.fixture
def kernels_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    import contextlib

    for module, name, function in (
        (launch.fwd, "block_sparse_fwd_kernel", forward_in_torch),
        (launch.dquery_kernel, "block_sparse_bwd_dq_kernel", dq_in_torch),
        (launch.dkdv_kernel, "block_sparse_bwd_dkdv_kernel", dkdv_in_torch),
    ):
        monkeypatch.setattr(module, name, InTorch(getattr(module, name), function))
    monkeypatch.setattr(launch, "_num_programs", lambda device: 132)
    monkeypatch.setattr(launch.torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(launch, "_SCRATCH_BYTES", 1 << 18)


@pytest.mark.usefixtures("kernels_in_torch")
@pytest.mark.parametrize("shape", ["even_64", "even_128", "even_16", "edges", "large_and_small", "one_token"])
def test_gate_in_the_forward(shape: str) -> None:
    """Into rows among others, from a gate among other columns, and from one that 16 bytes at a time don't reach."""
    query_sizes, key_sizes, batch, heads = SHAPES[shape]
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    num_queries, num_keys = sum(query_sizes), sum(key_sizes)
    query, key, value = (randn(batch, n, heads, 64).half() for n in (num_queries, num_keys, num_keys))
    coarse = randn(batch, len(query_sizes), heads, 64)
    pattern = make_pattern(shape, ordered=True)
    fine, lse = launch.forward(query, key, value, pattern, 0.3)
    tile_of_token = torch.empty(num_queries, dtype=torch.long)
    tile_of_token[pattern.query_tiles.order] = torch.arange(len(query_sizes)).repeat_interleave(torch.tensor(query_sizes))
    for room in (64, 72):
        gate = randn(batch, num_queries, heads, room).half()[..., :64]
        out, sums = (
            torch.full((batch, num_queries + 3, heads, 64), torch.nan).half(),
            torch.full((batch, num_queries + 3, heads), 7.0),
        )
        launch.forward_into(
            *(query, key, value, pattern, 0.3, out[:, :num_queries], sums[:, :num_queries]), GatedTiles(gate, coarse)
        )
        expected = fine.float() + gate.float() * coarse[:, tile_of_token]
        torch.testing.assert_close(out[:, :num_queries].float(), expected, atol=2e-3, rtol=2e-3)
        assert torch.equal(sums[:, :num_queries], lse)
        assert out[:, num_queries:].isnan().all()
        assert (sums[:, num_queries:] == 7).all()


@pytest.mark.usefixtures("kernels_in_torch")
def test_launches_that_layouts_keep_differ_as_calls_do() -> None:
    """Layouts that keep what calls share give each call what layouts that keep nothing give it."""
    layouts = TileLayout.from_sizes([64, 16, 4, 30]), TileLayout.from_sizes([64, 16, 50, 4])
    keeping = [replace(layout, derived={}) for layout in layouts]

    def results(layouts: Any, heads: int, kv_heads: int, scale: float, width: int, has_counts: bool, has_gate: bool) -> Any:
        randn = partial(torch.randn, generator=torch.Generator().manual_seed(width))
        query, gate = (randn(1, 114, heads, 80).half()[..., :64] for _ in range(2))
        key, value = randn(1, 134, kv_heads, 64).half(), randn(1, 134, kv_heads, 64).half()
        lists = randn(1, heads, 4, 4).argsort(-1)[..., :width].sort(-1).values.int()
        counts = torch.full(lists.shape[:3], width - 1, dtype=torch.int32) if has_counts else None
        added = GatedTiles(gate, randn(1, 4, heads, 64).half()) if has_gate else None
        out, lse = torch.empty(1, 114, heads, 64).half(), torch.empty(1, 114, heads)
        pattern = BlockPattern(*layouts, lists, counts)
        launch.forward_into(query, key, value, pattern, scale, out, lse, added)
        # Gradients reach calls with a gate in strides of their own, and without one with that of the log-sum-exp.
        dout = randn(1, 114, heads, 72).half()[..., :64] if has_gate else randn(1, 114, heads, 64).half()
        dlse = None if has_gate else randn(1, 114, heads)
        return out, lse, *launch.backward(dout, dlse, query, key, value, out, lse, pattern, scale)

    kinds = [(2, 2, 0.3, 2, False, True), (2, 2, -0.3, 2, False, True), (2, 2, 0.3, 3, False, True), (2, 2, 0.3, 2, True, True)]
    kinds += [
        (2, 2, 0.3, 2, False, False),
        (2, 1, 0.3, 2, False, True),
        (3, 3, 0.3, 2, False, True),
        (2, 2, 0.0, 2, False, True),
    ]
    for kind in (*kinds, kinds[0]):
        pairs = zip(results(keeping, *kind), results(layouts, *kind), strict=True)
        for name, (x, expected) in zip(("out", "lse", "dquery", "dkey", "dvalue"), pairs, strict=True):
            assert torch.equal(x, expected), (name, kind)
    kept = packing.pack_layout(keeping[0]).kept
    for name in ("forward", "backward"):
        assert sum(key[0] == name for key in kept) == len(kinds)


@pytest.mark.usefixtures("kernels_in_torch")
@pytest.mark.parametrize(("shape", "in_step"), [("even_64", False), ("edges", False), ("even_64", True), ("edges", True)])
def test_a_reusable_pattern_is_planned_once(shape: str, in_step: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward give the same bits, and no kernel that plans or places rows runs after the first call."""
    query_sizes, key_sizes, batch, heads = SHAPES[shape]
    monkeypatch.setattr(launch, "_IN_STEP_BYTES", 0 if in_step else 1 << 40)
    pattern = make_pattern(shape, ordered=True)
    if in_step:
        # Walks of different lengths keep no step.
        lists = torch.arange(len(key_sizes), dtype=torch.int32).expand(1, 1, len(query_sizes), -1).contiguous()
        pattern = replace(pattern, indices=lists, counts=None)
    reusable = pattern.reusable()
    num_plans, num_layouts = [], []
    make_plan, make_layout = plan.Planner._plan, packing._pack_layout
    monkeypatch.setattr(plan.Planner, "_plan", lambda *args: num_plans.append(1) or make_plan(*args))
    monkeypatch.setattr(packing, "_pack_layout", lambda layout: num_layouts.append(1) or make_layout(layout))
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    query, dout = (randn(batch, sum(query_sizes), heads, 64).half() for _ in range(2))
    key, value = (randn(batch, sum(key_sizes), heads, 64).half() for _ in range(2))

    def results(pattern: BlockPattern) -> tuple[torch.Tensor, ...]:
        out, lse = launch.forward(query, key, value, pattern, 0.3)
        return out, lse, *launch.backward(dout, None, query, key, value, out, lse, pattern, 0.3)

    expected = results(pattern)
    num_plans.clear()
    num_layouts.clear()
    first = results(reusable)
    made = len(num_plans), len(num_layouts)
    assert made[0] > 0 < made[1]
    for name, one, other, fresh in zip(("out", "lse", "dq", "dk", "dv"), first, results(reusable), expected, strict=True):
        assert torch.equal(one, fresh), name
        assert torch.equal(other, fresh), name
    assert (len(num_plans), len(num_layouts)) == made
    plans = [plan for key, plan in reusable.derived.items() if key[0] == "hopper plan"]
    if in_step:
        assert len(plans) == 2, "shared lists are planned once by query and once by key, for all launches"
    # What the docstring promises, beside what ends walks.
    num_pairs = reusable.indices.numel() * -(-max(query_sizes) // 64) * -(-max(key_sizes) // 64)
    ends = 80 * sum(x.meta.shape[:2].numel() for x in plans) + 64 * len(plans)
    assert sum(x.rows.nbytes + x.masks.nbytes for x in plans) <= 3 * 16 * num_pairs + ends


class Attention(torch.autograd.Function):
    """The implementation without the custom op, which would refuse CPU tensors."""

    @staticmethod
    def forward(ctx, query, key, value, pattern, scale):
        out, lse = launch.forward(query, key, value, pattern, scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.rest = pattern, scale
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        return *launch.backward(dout, dlse, *ctx.saved_tensors, *ctx.rest), None, None


@pytest.mark.usefixtures("kernels_in_torch")
@pytest.mark.parametrize(
    ("shape", "ordered", "kv_heads", "scale"),
    [
        ("even_64", False, 2, 0.3),
        ("even_64", False, 2, -0.3),
        ("even_128", False, 1, 0.3),
        ("even_60", True, 1, 0.3),
        ("edges", True, 1, 0.0),
        ("large_and_small", True, 2, 0.3),
        ("one_token", False, 1, 0.3),
    ],
)
def test_launches_feed_the_kernels(shape: str, ordered: bool, kv_heads: int, scale: float) -> None:
    check_launches(SHAPES[shape], make_pattern(shape, ordered=ordered), kv_heads, scale)


def check_launches(sizes: Sizes, pattern: BlockPattern, kv_heads: int, scale: float) -> None:
    query_sizes, key_sizes, batch, heads = sizes
    generator = torch.Generator().manual_seed(0)
    rows = {"query": (sum(query_sizes), heads), "key": (sum(key_sizes), kv_heads), "value": (sum(key_sizes), kv_heads)}
    inputs = {name: torch.randn(batch, *size, 64, generator=generator).half() for name, size in rows.items()}
    assert_op_within_budget(
        lambda query, key, value: Attention.apply(query, key, value, pattern, scale),
        lambda query, key, value: reference_attention(
            query, key, value, attn_mask=pattern.token_mask(), scale=scale, return_lse=True
        ),
        inputs,
    )


TURNING: dict[str, Sizes] = {
    "neighbours": ([64] * 5, [64] * 17, 1, 2),
    "two_blocks": ([128] * 3, [128] * 9, 1, 2),
    "partial": ([64, 16, 64, 64, 30], [64] * 11 + [20, 7, 48], 1, 1),
    "small": SHAPES["edges"],
    "uneven": SHAPES["large_and_small"],
}


@pytest.mark.usefixtures("kernels_in_torch")
@pytest.mark.parametrize("case", TURNING)
def test_gradients_of_walks_that_turn(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every other wave of dquery, and walk of a queue of dkey and dvalue, goes backwards; masks stay where they are."""
    monkeypatch.setattr(launch, "_IN_STEP_BYTES", 0)
    monkeypatch.setattr(launch, "_num_programs", lambda device: 1)
    monkeypatch.setattr(plan, "_LEAST_SHARED", 0.0)
    turned = []
    monkeypatch.setattr(Walked, "places", lambda self, places=Walked.places: turned.extend(found := places(self)) or found)
    query_sizes, key_sizes, *extent = TURNING[case]
    generator = torch.Generator().manual_seed(1)
    lists = torch.rand(*extent, len(query_sizes), len(key_sizes), generator=generator).argsort(-1)[..., : len(key_sizes) - 2]
    layouts = [TileLayout.from_sizes(sizes, order=torch.randperm(sum(sizes))) for sizes in (query_sizes, key_sizes)]
    check_launches(TURNING[case], BlockPattern(*layouts, lists.sort(-1).values.int()), 1, 0.3)
    assert 0 < sum(is_back for *_, is_back in turned) < len(turned)


@pytest.mark.parametrize(
    ("sizes", "is_large", "waves"),
    [([64] * 3, False, 1), ([64, 64, 16], False, 4), ([64, 64, 16], True, 1), ([16] * 4, False, 4)],
)
def test_waves_that_wait(sizes: list[int], is_large: bool, waves: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wave where that costs nothing or a head is too large for the cache; lists of different lengths never."""
    layout = TileLayout.from_sizes(sizes)
    lists = torch.zeros(1, 1, len(sizes), 1, dtype=torch.int32)
    key = torch.empty(1, 1, 1, 128, dtype=torch.bfloat16)
    packed = packing.pack_layout(layout)
    monkeypatch.setattr(launch, "_IN_STEP_BYTES", 0)
    monkeypatch.setattr(launch, "_EACH_WAVE_BYTES", 0 if is_large else 512 * packed.max_rows)
    for counts, expected in (
        (None, (3, {"IN_STEP": launch._LOOKS, "WAVES": waves})),
        (lists[..., 0], (0, {"IN_STEP": 0, "WAVES": 1})),
    ):
        assert launch._steps(4, 11, key, BlockPattern(layout, layout, lists, counts), (packed, packed)) == expected
