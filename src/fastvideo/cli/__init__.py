"""The `fastvideo` command: a small parser whose verbs are imported when they are asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

from fastvideo import __version__

__all__ = ["main"]

_VERBS = {
    "generate": ("fastvideo.cli.generate", "make a video from a prompt, with the bundled model or a diffusers pipeline"),
    "explain": ("fastvideo.cli.explain", "say which attention backend would run a call, and why the others wouldn't"),
    "bench": ("fastvideo.cli.bench", "measure time, memory and error of attention on named shapes"),
    "plan": ("fastvideo.cli.plan", "list the ways to share one attention over several ranks, and what each costs"),
    "train": ("fastvideo.training.cli", "train the bundled model, fine-tune it or a Wan checkpoint, or draw loss curves"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status: 2 for what the user can mend, with one line that says how."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="fastvideo", description="Attention for video diffusion transformers.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    asked = next((argument for argument in arguments if argument in _VERBS), None)
    for name, (module_name, what) in _VERBS.items():
        verb = verbs.add_parser(name, help=what, description=what[0].upper() + what[1:] + ".")
        if name == asked:
            module = importlib.import_module(module_name)
            module.add_arguments(verb)
            verb.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    try:
        status: int = args.run(args)
    except (ValueError, TypeError, NotImplementedError, RuntimeError, ImportError, OSError) as error:
        print(f"fastvideo {args.verb}: {error}", file=sys.stderr)
        return 2
    return status
