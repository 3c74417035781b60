"""`fastvideo plan`: every way to share one attention over several ranks, with its cost, or why it can't be."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace

from fastvideo.distributed.plan import LinkModel, plan

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's options, those of `fastvideo.distributed.plan.plan`."""
    parser.add_argument("--heads", type=int, required=True, help="query heads")
    parser.add_argument("--seq", type=int, required=True, help="tokens of all ranks together")
    parser.add_argument("--world-size", type=int, required=True, help="ranks that share the sequence")
    parser.add_argument("--kv-heads", type=int, help="key and value heads, by default as query heads")
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16", help="float16, bfloat16, float32 or float64")
    parser.add_argument("--replicated", type=int, default=0, help="tokens that every rank holds")
    parser.add_argument("--cross-seq", type=int, help="keys of all ranks together, in cross attention")
    parser.add_argument("--causal", action="store_true")
    parser.add_argument("--sparsity", type=float, help="share of key tiles that sparse attention skips")
    parser.add_argument("--gate", action="store_true", help="a gate of sparse attention travels too")
    parser.add_argument(
        "--head-groups",
        type=int,
        help="pieces of heads, of which one travels while another computes; by default as layers choose",
    )
    parser.add_argument("--grad", action="store_true", help="a backward pass follows, and counts")
    parser.add_argument("--ranks-per-node", type=int, default=LinkModel.ranks_per_node)
    parser.add_argument("--json", action="store_true", help="print data instead of a table")


def run(args: argparse.Namespace) -> int:
    """Print the plan; return 0 if a layout is legal, else 1."""
    if args.ranks_per_node < 1:
        raise ValueError(f"expected --ranks-per-node of at least 1, got {args.ranks_per_node}")
    found = plan(
        args.heads,
        args.kv_heads,
        args.seq,
        args.world_size,
        head_size=args.head_size,
        batch=args.batch,
        dtype=args.dtype,
        replicated=args.replicated,
        cross_seq=args.cross_seq,
        causal=args.causal,
        sparsity=args.sparsity,
        has_gate=args.gate,
        head_groups=args.head_groups,
        needs_grad=args.grad,
        links=replace(LinkModel(), ranks_per_node=args.ranks_per_node),
    )
    print(json.dumps(found.as_dict(), indent=2) if args.json else found)
    return 0 if found.best is not None else 1
