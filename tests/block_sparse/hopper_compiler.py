"""Compiles kernels for sm_90a without a GPU, and finds those that the package launches."""

from __future__ import annotations

import ast
import contextlib
import io
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

SOURCE = Path(__file__).parents[2] / "src"


class Compiled(NamedTuple):
    """What ptxas made of a kernel."""

    spilled: int
    warnings: list[str]
    shared: int
    ptx: str
    sass: list[tuple[int, str]]


def run_compiler(source: Any, folder: Path, **options: int) -> Compiled:
    """Compile for sm_90a and read ptxas' log and the machine code."""
    import triton.backends.nvidia as nvidia
    from triton import compile as compile_kernel
    from triton import knobs
    from triton.backends.compiler import GPUTarget

    log = io.StringIO()
    with knobs.nvidia.scope(), knobs.cache.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
        knobs.nvidia.dump_ptxas_log = True
        knobs.cache.dir = str(folder)
        knobs.compilation.always_compile = True
        result = compile_kernel(source, target=GPUTarget("cuda", 90, 32), options={"enable_fp_fusion": True, **options})
    stores, loads = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log.getvalue()).groups()
    warnings = [line for line in log.getvalue().splitlines() if re.search(r"C75\d\d|will be ignored", line)]
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(result.asm["cubin"])
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    text = subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    sass = [(int(a, 16), op) for a, op in re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", text, re.MULTILINE)]
    return Compiled(int(stores) + int(loads), warnings, result.metadata.shared, result.asm["ptx"], sass)


def compile_triton(
    kernel: Any, constants: dict[str, Any], types: dict[str, str], folder: Path, *, strides: str = "$", **options: int
) -> Compiled:
    """Compile a Triton kernel whose arguments are constants, of `types`, or 32-bit integers.

    Pointers, and integers whose names begin with the expression `strides`, are multiples of 16.
    """
    from triton.compiler import ASTSource

    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in kernel.arg_names}
    names = enumerate(kernel.arg_names)
    aligned = [i for i, name in names if signature[name].startswith("*") or re.match(strides, name)]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    return run_compiler(ASTSource(kernel, signature, constexprs=constants, attrs=attributes), folder, **options)


def launched_kernels() -> set[str]:
    """Kernels of the package, `module.name`: what is compiled and not called by something that is compiled."""
    kernels: dict[str, str] = {}
    called: set[str] = set()
    for path in SOURCE.rglob("*.py"):
        module = ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and any(re.search(r"\bjit\b", ast.unparse(d)) for d in node.decorator_list):
                kernels[f"{module}.{node.name}"] = node.name
                called |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                called |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    return {place for place, name in kernels.items() if name not in called}
