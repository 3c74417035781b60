"""`fastvideo explain`: the selection trace of a call described by shapes."""

from __future__ import annotations

import argparse
import json

from fastvideo.attention.explain import explain
from fastvideo.attention.request import MASK_KINDS

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options, those of `fastvideo.attention.explain`."""
    parser.add_argument("--heads", type=int, required=True, help="query heads")
    parser.add_argument("--head-size", type=int, required=True, help="size of a head")
    parser.add_argument("--seq", type=int, required=True, help="query tokens")
    parser.add_argument("--kv-heads", type=int, help="key and value heads, by default as query heads")
    parser.add_argument("--kv-seq", type=int, help="key tokens, by default as query tokens")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", help="bfloat16, float16, float32 or float64, or bf16, fp16, fp32, fp64")
    parser.add_argument("--device", help="device type, by default this machine's fastest; cuda without one here means an H200")
    parser.add_argument("--system", help="another machine, such as 'H200, no flash-attn' or 'A100, torch only'")
    parser.add_argument("--backend", help="the backend asked for by name")
    parser.add_argument("--mask", choices=MASK_KINDS)
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--scale", type=float)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--grad", action="store_true", help="a backward pass follows")
    parser.add_argument("--lse", action="store_true", help="the log-sum-exp is asked for")
    parser.add_argument("--gate", action="store_true", help="a gate for the coarse part of sparse attention is handed over")
    parser.add_argument(
        "--grid", nargs=3, type=int, metavar=("T", "Y", "X"), help="tokens of the video: say what padding costs"
    )
    parser.add_argument("--tile", metavar="TxYxX", help="with --grid: auto (by default), auto128, or such as 4x4x4")
    parser.add_argument("--json", action="store_true", help="print data instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print the explanation; return 0 if a backend would run, else 1."""
    report = explain(
        heads=args.heads,
        head_size=args.head_size,
        seq=args.seq,
        dtype=args.dtype,
        device=args.device,
        system=_assumed_system(args.device) if args.system is None else args.system,
        backend=args.backend,
        kv_heads=args.kv_heads,
        kv_seq=args.kv_seq,
        batch=args.batch,
        scale=args.scale,
        causal=args.causal,
        mask=args.mask,
        dropout_p=args.dropout,
        needs_grad=args.grad,
        needs_lse=args.lse,
        has_gate=args.gate,
        grid_tyx=args.grid,
        tile_tyx=_tile(args.tile),
    )
    print(json.dumps(report.as_dict(), indent=2) if args.json else report)
    return 0 if report.chosen is not None else 1


def _tile(text: str | None) -> tuple[int, ...] | str | None:
    """Read `"4x4x4"`; names stay as they are."""
    parts = [] if text is None else text.split("x")
    return tuple(map(int, parts)) if parts and all(part.isdecimal() for part in parts) else text


def _assumed_system(device: str | None) -> str | None:
    """Describe an H200 with this machine's packages where CUDA is asked for and there is none here."""
    import torch

    from fastvideo.platforms.system import installed_packages

    if device is None or torch.device(device).type != "cuda" or torch.cuda.is_available():
        return None
    return ", ".join(["H200", "torch only", *(f"{name}=={version}" for name, version in installed_packages())])
