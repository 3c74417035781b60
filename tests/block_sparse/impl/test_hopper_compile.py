"""The Hopper kernels compile for sm_90a without a GPU: no spills in a loop of products, few outside, no serialised wgmma.

`make test` runs it with the installed Triton, `make compile` with the oldest that is supported.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

from ..hopper_compiler import Compiled, compile_triton, run_compiler

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

# Bytes of spills that a kernel may have outside its loops of products, where they cost a few cycles a block; and how many
# instructions that spill or reload a turn of such a loop may have. Triton 3.6 is what the kernels were tuned with.
SPILL_BUDGET = {"fwd": 0, "gated fwd": 0, "bwd_dq": 448, "bwd_dkdv": 256}
SPILL_BUDGET_LATER = {"fwd": 192, "gated fwd": 256, "bwd_dq": 1024, "bwd_dkdv": 336}
LOOP_SPILLS, LOOP_SPILLS_LATER = 0, 8
_HOPPER = "fastvideo.block_sparse.impl.hopper"
MODULES = {"fwd": "forward_kernel", "bwd_dq": "dquery_kernel", "bwd_dkdv": "dkdv_kernel"}
# Shared memory that one program of sm_90 can have.
SHARED_LIMIT = 232_448
INTEGERS = ("rows", "masks", "meta", "counts", "row_token", "arrivals", "queues", "ends", "lengths", "block_tiles")
NUMBERS = ("first_head", "max_blocks", "least_shared")
LISTS_AND_ROWS = ("query", "out", "dout", "dquery", "dkey", "dvalue", "gate", "coarse")


def signature_of(kernel: Any, head_size: int, dtype: str, constants: dict[str, Any]) -> dict[str, str]:
    from triton.experimental.gluon import language as gl

    rows = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    pairs = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=1)
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.endswith(("_boxes", "_granules")):
            height = 64 if name.endswith("_boxes") else 16
            is_pair = name.startswith("stats")
            block = f"fp32[{2 * height}],{pairs!r}" if is_pair else f"{dtype}[{height}, {head_size}],{rows!r}"
            signature[name] = f"tensordesc<{block}>"
        elif name in INTEGERS:
            signature[name] = "*i32"
        elif name in LISTS_AND_ROWS:
            signature[name] = f"*{dtype}"
        elif name in ("lse", "stats"):
            signature[name] = "*fp32"
        else:
            signature[name] = "fp32" if name.startswith("scale") else "i32"
    return signature


def compiled(name: str, head_size: int, folder: Path, dtype: str = "bf16", **constants: Any) -> Compiled:
    """Compile a kernel of products, or `"gated fwd"`, for sm_90a as a launch would."""
    from triton.experimental.gluon._runtime import GluonASTSource

    from fastvideo.block_sparse.impl.hopper import launch

    is_gated, name = name.startswith("gated"), name.removeprefix("gated ")
    module = importlib.import_module(f"{_HOPPER}.{MODULES[name]}")
    kernel = getattr(module, f"block_sparse_{name}_kernel")
    table = {"fwd": launch.FWD, "bwd_dq": launch.DQ, "bwd_dkdv": launch.DKDV}[name][head_size]
    defaults = {"D": head_size, "BOX_TOKENS": 64, "IN_STEP": launch._LOOKS, "WAVES": launch._WAVES, "GROUP": 1, **table}
    if name != "bwd_dkdv":
        del defaults["GROUP"]
    if not is_gated:
        defaults |= dict.fromkeys(("gate", "coarse", "block_tiles"))
    constants = {key: value for key, value in (defaults | constants).items() if key in kernel.arg_names}
    signature = signature_of(kernel, head_size, dtype, constants)
    aligned = [i for i, n in enumerate(kernel.arg_names) if signature[n].startswith("*") or re.match("s_[qkvdg][bsh]$", n)]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    return run_compiler(GluonASTSource(kernel, signature, constexprs=constants, attrs=attributes), folder, num_warps=4)


def loops_of_products(sass: list[tuple[int, str]]) -> list[list[str]]:
    """The innermost loops that hold tensor core instructions."""
    spans = []
    for address, op in sass:
        target = re.search(r"\bBRA(?:\.\w+)* .*?(0x[0-9a-f]+)", op)
        if not target or int(target.group(1), 16) >= address:
            continue
        first = int(target.group(1), 16)
        body = [op for at, op in sass if first <= at <= address]
        # What spins on a barrier stands behind the kernel's end and also branches back.
        if any("HGMMA" in op for op in body) and not any(re.search("EXIT|USETMAXREG", op) for op in body):
            spans.append((first, address, body))
    return [
        body
        for first, last, body in spans
        if not any((a, b) != (first, last) and first <= a and b <= last for a, b, _ in spans)
    ]


def overwritten_operands(loop: list[str]) -> set[int]:
    """Registers that two products of one turn read as an operand although something writes them between.

    The first product means what was there before the loop, so that from the second turn on it reads something else. ptxas 12.8
    does this where two operands have one shape (seen: head size 64, score gradients over the output's gradient).
    """
    readers: dict[int, int] = {}
    for op in loop:
        product = re.search(r"HGMMA\S* R\d+, R(\d+), gdesc", op)
        for register in range(int(product.group(1)), int(product.group(1)) + 4) if product else ():
            readers[register] = readers.get(register, 0) + 1
    written = {int(r) for op in loop for r in re.findall(r"^(?:@!?U?P\d+ )?(?:F2FP\S*|MOV|IMAD\.MOV\.U32) R(\d+),", op)}
    return {register for register, times in readers.items() if times > 1 and register in written}


# By kernel: head size and constants other than those of a launch with tiles of 64 tokens, whose programs walk in step.
ALONE = {"IN_STEP": 0}
CASES: dict[str, list[tuple[int, dict[str, int]]]] = {
    "fwd": [(64, {}), (64, ALONE), (128, {}), (128, ALONE), (128, {"BOX_TOKENS": 60})],
    "gated fwd": [(64, {}), (128, {}), (128, {"BOX_TOKENS": 60})],
    "bwd_dq": [(64, {}), (64, ALONE), (128, {}), (128, ALONE), (128, {"BOX_TOKENS": 60})],
    "bwd_dkdv": [(64, {}), (128, {}), (128, {"GROUP": 4})],
}


@pytest.mark.parametrize(("name", "case"), [(name, i) for name, cases in CASES.items() for i in range(len(cases))])
def test_compiles_for_hopper(name: str, case: int, tmp_path: Path) -> None:
    import triton

    is_later = not triton.__version__.startswith("3.6.")
    head_size, constants = CASES[name][case]
    result = compiled(name, head_size, tmp_path, **constants)
    assert not result.warnings
    assert result.spilled <= (SPILL_BUDGET_LATER if is_later else SPILL_BUDGET)[name]
    assert result.shared <= SHARED_LIMIT
    if name != "bwd_dkdv":
        # Programs in step count themselves in.
        assert any("ATOMG" in op or "RED." in op for _, op in result.sass) == bool(constants.get("IN_STEP", True))
    loops = loops_of_products(result.sass)
    # One loop for each of the two warpgroups.
    assert len(loops) == 2
    for loop in loops:
        spills = [op for op in loop if re.search(r"\b(LDL|STL)\b", op)]
        assert len(spills) <= (LOOP_SPILLS_LATER if is_later else LOOP_SPILLS)
        assert not overwritten_operands(loop)
        # A wait for all products stands behind the exponentials, so that they run under the product before.
        products = [i for i, op in enumerate(loop) if "HGMMA" in op]
        exponentials = [i for i, op in enumerate(loop) if "MUFU.EX2" in op]
        waits = [i for i, op in enumerate(loop) if re.search(r"DEPBAR.LE\s+gsb0, 0x0", op)]
        assert products
        assert len(exponentials) >= 32
        if name.endswith("fwd"):
            assert len(waits) == 1
            assert waits[0] > max(exponentials)
    # Rows of the gate take the place of queries that all warps have read, and are read when those of all warps have come.
    copies = [i for i, (_, op) in enumerate(result.sass) if "LDGDEPBAR" in op]
    assert len(copies) == (2 if name == "gated fwd" else 0)
    for copy in copies:
        before = [op for _, op in result.sass[:copy]]
        assert last_of("BAR.SYNC", before) > last_of("LDSM", before)
        after = [op for _, op in result.sass[copy:]]
        arrived = next(i for i, op in enumerate(after) if "DEPBAR.LE SB0" in op)
        read = next(i for i in range(arrived, len(after)) if "LDSM" in after[i])
        assert any("BAR.SYNC" in op for op in after[arrived:read])


def last_of(name: str, ops: list[str]) -> int:
    """Place of the last instruction of that name."""
    return max(i for i, op in enumerate(ops) if name in op)


def test_half_precision_compiles(tmp_path: Path) -> None:
    result = compiled("fwd", 128, tmp_path, dtype="fp16")
    assert not result.warnings
    assert any("HGMMA" in op and "BF16" not in op for _, op in result.sass)


PIECES = {"PIECES": 1, "PIECE_ROWS": 64}
LISTED = {**PIECES, "CLEAN": 64, "IS_EVEN": False, "DEPTH": 8, "CHUNK": 256, "IS_ONE_CHUNK": True}
MARKED = {**PIECES, "CLEAN": 64, "IS_JOINT": False, "MARK_CHUNK": 2048, "IS_ONE_CHUNK": True, "CHUNK": 256}
# Kernels that make rows and plans: their module, constants and warps.
FEEDING = {
    "place_pieces_kernel": ("packing", {**PIECES, "CHUNK": 1024}, 4),
    "row_tokens_kernel": ("packing", PIECES, 1),
    "pack_keys_kernel": ("packing", {"D": 128, "SIGN": 1}, 4),
    "pack_queries_kernel": ("packing", {"D": 128, "PACK": True}, 4),
    "mark_kernel": ("plan_kernels", {"PIECE_ROWS": 64, "BLOCK": 128}, 2),
    "plan_lists_kernel": ("plan_kernels", LISTED, 4),
    "plan_lists_kernel of even tiles": ("plan_kernels", {**LISTED, "IS_EVEN": True}, 4),
    "plan_lists_kernel in chunks": ("plan_kernels", {**LISTED, "IS_ONE_CHUNK": False}, 4),
    "plan_marks_kernel": ("plan_kernels", MARKED, 4),
    "plan_marks_kernel of several tiles": ("plan_kernels", {**MARKED, "IS_JOINT": True}, 4),
    "plan_marks_kernel in chunks": ("plan_kernels", {**MARKED, "IS_JOINT": True, "IS_ONE_CHUNK": False}, 4),
    "rank_places_kernel": ("queues", {"GROUP": 1, "CHUNK": 1024}, 8),
    "fill_queues_kernel": ("queues", {"WIDTH": 512}, 8),
}


@pytest.mark.parametrize("case", FEEDING)
def test_feeding_kernels_compile_without_spills(case: str, tmp_path: Path) -> None:
    (module, constants, num_warps), name = FEEDING[case], case.split()[0]
    kernel = getattr(importlib.import_module(f"fastvideo.block_sparse.impl.hopper.{module}"), name)
    types = {
        argument: "*i32"
        for argument in kernel.arg_names
        if not (argument.isupper() or argument.startswith(("s_", "num_")) or argument in NUMBERS)
    }
    types |= dict.fromkeys(("key", "value", "query", "dout", "out"), "*bf16")
    types |= {argument: "*bf16" for argument in kernel.arg_names if argument.startswith("packed_")}
    types |= dict.fromkeys(("lse", "dlse", "stats"), "*fp32")
    types |= {"marks": "*u8", **dict.fromkeys(("keys", "places", "totals"), "*i64")}
    result = compile_triton(kernel, constants, types, tmp_path, num_warps=num_warps)
    assert result.spilled == 0
    assert not result.warnings
    assert result.sass


def test_names_of_gluon_that_differ_are_found() -> None:
    from triton.experimental.gluon.language.nvidia.hopper import tma

    from fastvideo.block_sparse.impl.hopper import gluon_names

    assert gluon_names.tma_load in (getattr(tma, "async_load", None), tma.async_copy_global_to_shared)


COMPILED = {
    *(f"{_HOPPER}.{module}.block_sparse_{name}_kernel" for name, module in MODULES.items()),
    *(f"{_HOPPER}.{module}.{case.split()[0]}" for case, (module, *_) in FEEDING.items()),
}
