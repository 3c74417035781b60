"""Implementations over other packages, without a GPU: stand-ins in plain torch that have the packages' real signatures.

The stand-ins compute what the packages compute, from packed tensors and lists alone, and have their habits that bite: they
take the maximum of unscaled scores, read every row of a listed tile, and leave garbage where nothing is listed.
"""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from fastvideo.block_sparse import BlockPattern, TileLayout, block_sparse_attention
from fastvideo.block_sparse.impl import choose_implementation, cudnn, flash, flex, slots
from fastvideo.testing import assert_op_within_budget, reference_attention

# Query tiles, key tiles, batch, query heads, key heads.
SHAPES = {
    "whole": (3, 4, 2, 2, 2),
    "grouped": (2, 3, 1, 4, 2),
    "ragged": (3, 4, 1, 2, 1),
}


def dense_from_lists(
    q: Tensor, k: Tensor, v: Tensor, lists: list[list[list[list[int]]]], sizes: list[int], tile: int, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities `[B, H, rows, rows]`, output `[B, rows, H, D]` and log-sum-exp `[B, H, rows]` of packed tensors."""
    assert scale > 0, "a kernel that takes the maximum of unscaled scores was given a scale that isn't positive"
    batch, rows, heads, _ = q.shape
    seen = torch.zeros(batch, heads, rows, k.shape[1], dtype=torch.bool)
    for b in range(batch):
        for h in range(heads):
            for i, tiles in enumerate(lists[b % len(lists)][h % len(lists[b % len(lists)])]):
                for j in tiles:
                    seen[b, h, i * tile : (i + 1) * tile, j * tile : j * tile + sizes[j]] = True
    scores = torch.einsum("bqhd,bkhd->bhqk", q.float(), k.float()) * scale
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    lse = scores.masked_fill(~seen, -torch.inf).logsumexp(-1)
    out = torch.einsum("bhqk,bkhd->bqhd", weights, v.float()).to(q.dtype)
    return weights, out, lse  # NaN where nothing is listed


def gradients(weights: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor, dlse: Any, scale: float) -> Any:
    weights = weights.nan_to_num(nan=0.0)
    shift = torch.einsum("bqhd,bqhd->bhq", dout.float(), out.float())
    if dlse is not None:
        shift = shift - dlse
    dp = torch.einsum("bqhd,bkhd->bhqk", dout.float(), v.float())
    ds = weights * (dp - shift[..., None]) * scale
    dq = torch.einsum("bhqk,bkhd->bqhd", ds, k.float())
    dk, dv = torch.einsum("bhqk,bqhd->bkhd", ds, q.float()), torch.einsum("bhqk,bqhd->bkhd", weights, dout.float())
    return tuple(x.to(q.dtype) for x in (dq, dk, dv))


def check_pads(packed: Tensor, sizes: list[int], tile: int) -> None:
    for i, size in enumerate(sizes):
        assert not packed[:, i * tile + size : (i + 1) * tile].any(), "pads have to be zero"


# The signatures of nvidia-cudnn-frontend 1.32.0, `cudnn.block_sparse_attention`.
def block_sparse_attention_forward(
    q_tensor, k_tensor, v_tensor, q2k_block_index, block_sparse_num=None, block_sizes=None, q2k_block_nums=None, *,
    sparse_block_size=None, allow_empty_block_nums=False, softmax_scale=None, pack_gqa=None, layout="bhsd", kv_splits=1,
    use_clc=None,
):  # fmt: skip
    assert (layout, sparse_block_size, q_tensor.dtype) == ("bshd", 64, torch.bfloat16)
    assert q_tensor.shape[1] % 64 == 0
    assert q_tensor.shape[2] == k_tensor.shape[2]
    lists, sizes = cudnn_lists(q2k_block_index, block_sparse_num, block_sizes, q2k_block_nums, k_tensor)
    assert allow_empty_block_nums == (q2k_block_nums is not None)
    for x in (k_tensor, v_tensor):
        check_pads(x, sizes, 64)
    _, out, lse = dense_from_lists(q_tensor, k_tensor, v_tensor, lists, sizes, 64, softmax_scale)
    return {"o_tensor": out, "lse_tensor": lse}


def block_sparse_attention_backward(
    do_tensor, q_tensor, k_tensor, v_tensor, o_tensor, lse_tensor, q2k_block_index, block_sparse_num=None, block_sizes=None,
    q2k_block_nums=None, *, softmax_scale=None, dq_tensor=None, dk_tensor=None, dv_tensor=None, bucket_size_blocks=None,
    sparse_block_size=None, layout="bhsd",
):  # fmt: skip
    assert (layout, sparse_block_size, lse_tensor.dtype) == ("bshd", 64, torch.float32)
    assert lse_tensor.shape == (q_tensor.shape[0], q_tensor.shape[2], q_tensor.shape[1])
    assert do_tensor.dtype == o_tensor.dtype == q_tensor.dtype
    lists, sizes = cudnn_lists(q2k_block_index, block_sparse_num, block_sizes, q2k_block_nums, k_tensor)
    assert lse_tensor.isfinite().all()
    check_pads(k_tensor, sizes, 64)
    weights, _, _ = dense_from_lists(q_tensor, k_tensor, v_tensor, lists, sizes, 64, softmax_scale)
    grads = gradients(weights, q_tensor, k_tensor, v_tensor, o_tensor, do_tensor, None, softmax_scale)
    return dict(zip(("dq_tensor", "dk_tensor", "dv_tensor"), grads, strict=True))


def cudnn_lists(index: Tensor, num: int, sizes: Tensor | None, nums: Tensor | None, key: Tensor) -> tuple[Any, list[int]]:
    assert index.dtype == torch.int32
    assert index.is_contiguous()
    assert num == index.shape[3]
    num_tiles = key.shape[1] // 64
    counts = torch.full(index.shape[:3], num) if nums is None else nums
    lists = [
        [[tiles[:count] for tiles, count in zip(head, row, strict=True)] for head, row in zip(sample, of, strict=True)]
        for sample, of in zip(index.tolist(), counts.tolist(), strict=True)
    ]
    return lists, [64] * num_tiles if sizes is None else sizes.tolist()


# Those of flash-attn-4 4.0.0b36, `flash_attn.cute`.
class BlockSparseTensorsTorch(NamedTuple):
    mask_block_cnt: Tensor
    mask_block_idx: Tensor
    full_block_cnt: Tensor | None = None
    full_block_idx: Tensor | None = None
    cu_total_m_blocks: Tensor | None = None
    cu_block_idx_offsets: Tensor | None = None
    block_size: tuple[int, int] | None = None
    dq_write_order: Tensor | None = None
    dq_write_order_full: Tensor | None = None
    spt: bool | None = None


def _flash_attn_fwd(
    q, k, v, qv=None, cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None,
    max_seqlen_k=None, min_seqlen_k=None, page_table=None, softmax_scale=None, causal=False, softcap=None,
    window_size_left=None, window_size_right=None, learnable_sink=None, tile_mn=None, mma_pv_is_rs=None,
    intra_wg_overlap=None, num_threads=384, num_splits=1, pack_gqa=None, _arch=None, score_mod=None, mask_mod=None,
    block_sparse_tensors=None, return_lse=False, out=None, lse=None, aux_tensors=None, aux_scalars=None, q_descale=None,
    k_descale=None, v_descale=None, gather_kv_indices=None, scheduler_metadata=None, seqlen_k_per_split=None,
    disable_scheduler_metadata=False, gather_bwd_recompute_p=False,
):  # fmt: skip
    assert return_lse
    lists = flash_lists(block_sparse_tensors)
    _, result, log_sum_exp = dense_from_lists(q, k, v, lists, [128] * (k.shape[1] // 128), 128, softmax_scale)
    return result, log_sum_exp, None, None, None


def _flash_attn_bwd(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, softcap=0.0, window_size_left=None, window_size_right=None,
    m_block_size=64, n_block_size=128, num_threads=256, pack_gqa=False, num_stages_Q=2, num_stages_dO=2, SdP_swapAB=False,
    dKV_swapAB=False, dQ_swapAB=False, AtomLayoutMSdP=2, AtomLayoutNdKV=2, AtomLayoutMdQ=2, V_in_regs=False,
    cu_seqlens_q=None, cu_seqlens_k=None, seqused_q=None, seqused_k=None, max_seqlen_q=None, max_seqlen_k=None,
    deterministic=False, dq=None, dk=None, dv=None, score_mod=None, score_mod_bwd=None, mask_mod=None, aux_tensors=None,
    aux_scalars=None, block_sparse_tensors=None, dlse=None, learnable_sink=None,
):  # fmt: skip
    assert lse.isfinite().all()
    # Lists of query tiles by key tile; turned around they have to be those of the forward.
    by_key = flash_lists(block_sparse_tensors)
    num_query_tiles = q.shape[1] // 128
    lists = [
        [[[j for j, tiles in enumerate(head) if i in tiles] for i in range(num_query_tiles)] for head in sample]
        for sample in by_key
    ]
    weights, _, _ = dense_from_lists(q, k, v, lists, [128] * (k.shape[1] // 128), 128, softmax_scale)
    return gradients(weights, q, k, v, out, dout, dlse, softmax_scale)


def flash_lists(tensors: BlockSparseTensorsTorch) -> Any:
    assert tensors.block_size == (128, 128)
    assert not tensors.mask_block_cnt.any()
    assert tensors.full_block_cnt is not None
    assert tensors.full_block_idx is not None
    for x in (tensors.mask_block_cnt, tensors.mask_block_idx, tensors.full_block_cnt, tensors.full_block_idx):
        assert x.dtype == torch.int32
        assert x.is_contiguous()
    counts = tensors.full_block_cnt.tolist()
    return [
        [[tiles[:count] for tiles, count in zip(head, row, strict=True)] for head, row in zip(sample, of, strict=True)]
        for sample, of in zip(tensors.full_block_idx.tolist(), counts, strict=True)
    ]


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins in place of the packages, which accept CPU tensors."""
    bsa = types.ModuleType("cudnn.block_sparse_attention")
    bsa.block_sparse_attention_forward = block_sparse_attention_forward
    bsa.block_sparse_attention_backward = block_sparse_attention_backward
    cute, interface = types.ModuleType("flash_attn.cute"), types.ModuleType("flash_attn.cute.interface")
    interface._flash_attn_fwd, interface._flash_attn_bwd = _flash_attn_fwd, _flash_attn_bwd
    sparsity = types.ModuleType("flash_attn.cute.block_sparsity")
    sparsity.BlockSparseTensorsTorch = BlockSparseTensorsTorch
    cute.interface = interface
    found = {"cudnn": types.ModuleType("cudnn"), "flash_attn": types.ModuleType("flash_attn"), "flash_attn.cute": cute}
    found |= {x.__name__: x for x in (bsa, interface, sparsity)}
    for name, module in found.items():
        monkeypatch.setitem(sys.modules, name, module)
    versions = (("nvidia-cudnn-frontend", "1.32.0"), ("flash-attn-4", "4.0.0b36"), ("nvidia-cutlass-dsl", "4.8.1"))
    monkeypatch.setattr(slots, "installed_packages", lambda: versions)
    for module in (cudnn, flash):
        monkeypatch.setattr(module, "needs_cuda", lambda query, majors: [])


def make_pattern(name: str, shape: str, *, counts: bool = True, ordered: bool = True) -> BlockPattern:
    num_query_tiles, num_key_tiles, batch, heads, _ = SHAPES[shape]
    tile = 128 if name == "flash" else 64
    generator = torch.Generator().manual_seed(1)
    layouts = []
    for num_tiles in (num_query_tiles, num_key_tiles):
        sizes = [tile] * num_tiles
        if shape == "ragged" and name != "flash":
            sizes = [(64, 16, 61, 4)[i % 4] for i in range(num_tiles)]
        order = torch.randperm(sum(sizes), generator=generator) if ordered else None
        layouts.append(TileLayout.from_sizes(sizes, order=order))
    if not counts:
        noise = torch.rand(batch, heads, num_query_tiles, num_key_tiles, generator=generator)
        return BlockPattern(*layouts, noise.topk(2).indices.sort(-1).values.int())
    mask = torch.rand(batch, heads, num_query_tiles, num_key_tiles, generator=generator) < 0.6
    mask[:, :, 0], mask[:, :, -1, -1] = False, True
    return BlockPattern.from_mask(mask, *layouts)


def make_inputs(pattern: BlockPattern, shape: str, dtype: torch.dtype, head_size: int) -> dict[str, Tensor]:
    _, _, batch, heads, kv_heads = SHAPES[shape]
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    num_queries, num_keys = pattern.query_tiles.num_tokens, pattern.key_tiles.num_tokens
    inputs = {
        "query": 2 * randn(batch, num_queries, heads, head_size),
        "key": 2 * randn(batch, num_keys, kv_heads, head_size),
        "value": randn(batch, num_keys, kv_heads, head_size),
    }
    return {key: x.to(dtype) for key, x in inputs.items()}


def check(name: str, pattern: BlockPattern, inputs: dict[str, Tensor], scale: float | None = None, **settings: Any) -> None:
    assert_op_within_budget(
        lambda query, key, value: block_sparse_attention(query, key, value, pattern, scale=scale, return_lse=True, impl=name),
        lambda query, key, value: reference_attention(
            query, key, value, attn_mask=pattern.token_mask(), scale=scale, return_lse=True
        ),
        inputs,
        **settings,
    )


@pytest.mark.parametrize("counts", [True, False])
@pytest.mark.parametrize(
    ("shape", "scale"), [("whole", None), ("grouped", None), ("grouped", -0.05), ("grouped", 0.0), ("ragged", None)]
)
@pytest.mark.parametrize("name", ["cudnn", "flash"])
def test_values_and_gradients(name: str, shape: str, counts: bool, scale: float | None) -> None:
    pattern = make_pattern(name, shape, counts=counts, ordered=counts)
    check(name, pattern, make_inputs(pattern, shape, torch.bfloat16, 128), scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_flex_forward_on_a_cpu(shape: str, dtype: torch.dtype) -> None:
    for counts in (True, False):
        pattern = make_pattern("flex", shape, counts=counts)
        inputs = make_inputs(pattern, shape, dtype, 16)
        check("flex", pattern, inputs, scale=-0.3 if counts else None, gradients=False)


@pytest.mark.parametrize(
    ("generation", "head_sizes"),
    [(8, {32: 128, 64: 64, 128: 64}), (9, {32: 64, 64: 128, 128: 128, 256: 64}), (10, {32: 128, 128: 128})],
)
def test_flex_knows_the_blocks_of_the_backward(generation: int, head_sizes: dict[int, int], monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (generation, 0))
    for head_size, block in head_sizes.items():
        assert flex._backward_block(torch.empty(1, 1, 1, head_size, dtype=torch.bfloat16)) == block
        assert flex._backward_block(torch.empty(1, 1, 1, head_size)) == 64


def test_flex_has_no_backward_on_a_cpu() -> None:
    pattern = make_pattern("flex", "grouped")
    inputs = make_inputs(pattern, "grouped", torch.float32, 16)
    inputs["key"].requires_grad_()
    with pytest.raises(NotImplementedError, match="flex: FlexAttention has no backward on a CPU"):
        block_sparse_attention(**inputs, pattern=pattern, impl="flex")


def test_flex_backward_with_a_stand_in(monkeypatch) -> None:
    """What runs on CUDA, with attention that autograd can follow in place of FlexAttention's kernels."""

    def stand_in(query, key, value, *, block_mask, scale, enable_gqa, kernel_options, return_aux):
        lists = [block_mask.full_kv_indices, block_mask.kv_indices]
        counts = [block_mask.full_kv_num_blocks, block_mask.kv_num_blocks]
        rows, columns = block_mask.BLOCK_SIZE
        seen = torch.zeros(*query.shape[:3], key.shape[2], dtype=torch.bool)
        for (indices, nums), is_whole in zip(zip(lists, counts, strict=True), (True, False), strict=True):
            for b, h, i in torch.cartesian_prod(*map(torch.arange, nums.shape)).tolist():
                for j in indices[b, h, i, : nums[b, h, i]].tolist():
                    kv = torch.arange(j * columns, (j + 1) * columns)
                    seen[b, h, i * rows : (i + 1) * rows, kv] = True if is_whole else block_mask.mask_mod(b, h, i * rows, kv)
        out, lse = reference_attention(
            *(x.transpose(1, 2) for x in (query, key, value)), attn_mask=seen, scale=scale, return_lse=True
        )
        return out.transpose(1, 2), types.SimpleNamespace(lse=lse.transpose(1, 2))

    monkeypatch.setattr(flex, "_flex", lambda device: stand_in)
    for shape in ("ragged", "grouped"):
        pattern = make_pattern("flex", shape)
        inputs = make_inputs(pattern, shape, torch.float32, 16)
        randn = partial(torch.randn, generator=torch.Generator().manual_seed(2))
        out, lse = flex.forward(*inputs.values(), pattern, 0.3)
        dout, dlse = randn(out.shape), randn(lse.shape)
        expected = [x.double().requires_grad_() for x in inputs.values()]
        result = reference_attention(*expected, attn_mask=pattern.token_mask(), scale=0.3, return_lse=True)
        cotangents = [dout.double(), dlse.double().masked_fill(lse == -torch.inf, 0.0)]
        grads = torch.autograd.grad(result, expected, cotangents)
        # As in the engine, the body of a custom op, where autograd doesn't record.
        with torch._C._AutoDispatchBelowAutograd():
            got = flex.backward(dout, dlse, *inputs.values(), out, lse, pattern, 0.3)
        for one, other in zip(got, grads, strict=True):
            torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def test_reasons_against_a_call(monkeypatch) -> None:
    layout = TileLayout.from_sizes([100, 130])
    pattern = BlockPattern.from_mask(torch.ones(2, 2, dtype=torch.bool), layout, layout)
    x = torch.zeros(1, 230, 2, 20, dtype=torch.float64)
    monkeypatch.setattr(slots, "installed_packages", lambda: (("flash-attn-4", "4.0.0b20"),))
    for module in (cudnn, flash):
        monkeypatch.setattr(module, "needs_cuda", slots.needs_cuda)
    assert cudnn.rejections(x, x, x, pattern) == (
        'nvidia-cudnn-frontend is not installed: pip install "fastvideo-attention[cudnn]"',
        'nvidia-cutlass-dsl is not installed: pip install "fastvideo-attention[cudnn]"',
        "needs an NVIDIA GPU, got a tensor on cpu",
        "needs bfloat16, for which it has a backward, got torch.float64",
        "needs a head size of 128, for which it has a backward, got 20",
        "needs query tiles of at most 64 tokens, got 130",
        "needs key tiles of at most 64 tokens, got 130",
    )
    assert flash.rejections(x, x, x, pattern) == (
        'flash-attn-4 4.0.0b20 is too old: pip install "fastvideo-attention[flash]"',
        'nvidia-cutlass-dsl is not installed: pip install "fastvideo-attention[flash]"',
        "needs an NVIDIA GPU, got a tensor on cpu",
        "needs float16 or bfloat16, got torch.float64",
        "needs a head size that is a multiple of 8 up to 128, got 20",
        "needs query tiles of 128 tokens, got 130",
        "needs key tiles of 128 tokens, got 130",
    )
    assert flex.rejections(x, x, x, pattern) == (
        "needs float16, bfloat16 or float32, got torch.float64",
        "needs query tiles of at most 128 tokens, got 130",
        "needs key tiles of at most 128 tokens, got 130",
    )
    small = TileLayout.uniform(256 + 5, 128)
    ragged = BlockPattern.from_mask(torch.ones(3, 3, dtype=torch.bool), small, small)
    assert "needs key tiles of exactly 128 tokens, got smaller ones" in flash.rejections(x, x, x, ragged)


@pytest.mark.parametrize(("name", "package"), [("cudnn", "nvidia-cudnn-frontend"), ("flash", "flash-attn-4")])
def test_a_package_without_its_compiler_is_refused(name: str, package: str, monkeypatch) -> None:
    pattern = make_pattern(name, "whole")
    inputs = make_inputs(pattern, "whole", torch.bfloat16, 128)
    module = {"cudnn": cudnn, "flash": flash}[name]
    assert module.rejections(*inputs.values(), pattern) == ()
    versions = [found for found in slots.installed_packages() if found[0] != "nvidia-cutlass-dsl"]
    assert package in dict(versions)
    monkeypatch.setattr(slots, "installed_packages", lambda: tuple(versions))
    reason = f'nvidia-cutlass-dsl is not installed: pip install "fastvideo-attention[{name}]"'
    assert module.rejections(*inputs.values(), pattern) == (reason,)
    with pytest.raises(NotImplementedError, match="nvidia-cutlass-dsl is not installed"):
        block_sparse_attention(**inputs, pattern=pattern, impl=name)


def test_none_is_chosen_automatically() -> None:
    pattern = make_pattern("cudnn", "whole")
    inputs = make_inputs(pattern, "whole", torch.bfloat16, 128)
    for name in ("cudnn", "flash", "flex"):
        assert choose_implementation(**inputs, pattern=pattern)[0] != name


STAND_INS = (
    ("cudnn.block_sparse_attention", block_sparse_attention_forward),
    ("cudnn.block_sparse_attention", block_sparse_attention_backward),
    ("flash_attn.cute.interface", _flash_attn_fwd),
    ("flash_attn.cute.interface", _flash_attn_bwd),
    ("flash_attn.cute.block_sparsity", BlockSparseTensorsTorch),
)


@pytest.mark.parametrize(("module", "stand_in"), STAND_INS, ids=lambda x: getattr(x, "__name__", x))
def test_stand_ins_have_the_signatures_of_installed_packages(module: str, stand_in: Any, monkeypatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in ("cudnn", "flash_attn")]:
        monkeypatch.delitem(sys.modules, name)
    try:
        real = getattr(importlib.import_module(module), stand_in.__name__)
    except ImportError as error:
        pytest.skip(f"{module} is not installed: {error}")
    if isinstance(stand_in, type):
        assert stand_in._fields == real._fields
    else:
        names = [(parameter.name, parameter.kind) for parameter in inspect.signature(real).parameters.values()]
        assert names == [(parameter.name, parameter.kind) for parameter in inspect.signature(stand_in).parameters.values()]
