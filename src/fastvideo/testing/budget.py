"""The error budget of a kernel: at most twice the error that its dtype makes anyway.

`actual` and the same arithmetic done eagerly in the same dtype are both compared with float64. Maximum and mean error
of `actual` may each be `factor` times those of the eager result, plus a rounding floor, which matters where the eager
result happens to be exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

__all__ = ["assert_op_within_budget", "assert_within_budget"]

_Result = torch.Tensor | tuple[torch.Tensor, ...]

# In 16 bits the last rounding dominates. In float32 two orders of summation differ by a few units; float64 has no better
# reference than itself, so its floor is the whole budget and leaves room for scores in the thousands.
_FLOOR_ULPS = {torch.bfloat16: 1.0, torch.float16: 1.0, torch.float32: 8.0, torch.float64: 4096.0}


def assert_within_budget(
    actual: torch.Tensor,
    reference_fp64: torch.Tensor,
    eager_same_dtype: torch.Tensor,
    factor: float = 2.0,
    *,
    floor_ulps: float | None = None,
    zero_size: float = 0.0,
    name: str = "result",
) -> None:
    """Raise unless the max and the mean error of `actual` are within `factor` of the eager ones, plus a floor.

    Where the reference is infinite, `actual` has to be the same infinity; NaN is never accepted.

    Args:
        actual: What is tested.
        reference_fp64: The same quantity from the same inputs promoted to float64.
        eager_same_dtype: The same quantity computed eagerly in the dtype under test.
        factor: Allowed ratio of the errors.
        floor_ulps: The floor in units of machine epsilon of `actual`'s dtype, times the largest (for the maximum) or
            the mean (for the mean) magnitude of the reference; by default 1 for 16-bit dtypes, 8 for float32 and
            4096 for float64.
        zero_size: Magnitude that the floor is taken of where the whole reference is zero: terms that cancel exactly in
            one order of summation leave rounding in another.
        name: What the tensor is, for the message.

    Raises:
        AssertionError: The budget is exceeded, or shape, dtype or infinities differ.

    Example:
        >>> exact = torch.tensor([1.0, 2.0], dtype=torch.float64)
        >>> assert_within_budget(exact.float(), exact, exact.float())
    """
    expected = reference_fp64.detach().to(actual.device, torch.float64)
    got, eager = actual.detach().to(torch.float64), eager_same_dtype.detach().to(actual.device, torch.float64)
    if got.shape != expected.shape or eager.shape != expected.shape:
        raise AssertionError(
            f"{name}: shapes differ: {tuple(got.shape)}, reference {tuple(expected.shape)}, eager {tuple(eager.shape)}"
        )
    if actual.dtype != eager_same_dtype.dtype:
        raise AssertionError(f"{name}: dtype is {actual.dtype}, the eager result's is {eager_same_dtype.dtype}")
    if expected.isnan().any():
        raise AssertionError(f"{name}: the reference itself holds NaN")
    is_infinite = expected.isinf()
    wrong = got.isnan() | torch.where(is_infinite, got != expected, got.isinf())
    if wrong.any():
        raise AssertionError(
            f"{name}: {int(wrong.sum())} of {wrong.numel()} wrong infinities or NaN, {_at(wrong, got, expected)}"
        )
    if is_infinite.all():
        return
    magnitude = expected[~is_infinite].abs()
    error = torch.where(is_infinite, 0.0, got - expected).abs()
    eager_error = torch.where(is_infinite, 0.0, eager - expected).abs().nan_to_num(nan=0.0, posinf=0.0)
    floor = (_FLOOR_ULPS[actual.dtype] if floor_ulps is None else floor_ulps) * torch.finfo(actual.dtype).eps
    rows = (
        ("max", error.max(), eager_error.max(), magnitude.max()),
        ("mean", error.mean(), eager_error.mean(), magnitude.mean()),
    )
    for kind, found, of_eager, size_found in rows:
        size = float(size_found) or zero_size
        budget = factor * float(of_eager) + floor * size
        if float(found) > budget:
            raise AssertionError(
                f"{name}: {kind} error {float(found):.3e} exceeds {budget:.3e} = {factor} × {float(of_eager):.3e} "
                f"(eager {actual.dtype}) + {floor:.1e} × {size:.3e}; "
                f"worst {_at(error == error.max(), got, expected)}"
            )


def assert_op_within_budget(
    op: Callable[..., _Result],
    reference: Callable[..., _Result],
    inputs: Mapping[str, torch.Tensor],
    *,
    factor: float = 2.0,
    floor_ulps: float | None = None,
    gradients: bool = True,
    seed: int = 0,
) -> None:
    """Run `op` and `reference` on `inputs`, and check every output and every gradient by `assert_within_budget`.

    Both are called with the inputs by keyword; the reference once as they are and once promoted to float64. Gradients
    are those of all floating point inputs under random cotangents of all outputs.

    Args:
        op: What is tested; returns a tensor or a tuple of tensors.
        reference: The same function in plain torch, for any dtype.
        inputs: Tensors in the dtype under test; integer and bool ones are passed on unchanged.
        factor: Allowed ratio of the errors.
        floor_ulps: The floor, see `assert_within_budget`.
        gradients: Compare gradients too.
        seed: Seed of the cotangents.

    Raises:
        AssertionError: The budget is exceeded, or a gradient is missing.

    Example:
        >>> assert_op_within_budget(torch.sin, torch.sin, {"input": torch.linspace(0, 3, 5)})
    """
    promoted = {name: x.double() if x.is_floating_point() else x for name, x in inputs.items()}
    got = _outputs_and_gradients(op, inputs, gradients, seed)
    eager = _outputs_and_gradients(reference, inputs, gradients, seed)
    expected = _outputs_and_gradients(reference, promoted, gradients, seed)
    if got.keys() != expected.keys():
        raise AssertionError(f"got {list(got)}, the reference has {list(expected)}")
    gradient_size = max((float(x.abs().max()) for name, x in expected.items() if name.startswith("gradient")), default=0.0)
    for name, tensor in got.items():
        size = gradient_size if name.startswith("gradient") else 0.0
        assert_within_budget(tensor, expected[name], eager[name], factor, floor_ulps=floor_ulps, zero_size=size, name=name)


def _outputs_and_gradients(
    function: Callable[..., _Result], inputs: Mapping[str, torch.Tensor], gradients: bool, seed: int
) -> dict[str, torch.Tensor]:
    leaves = {name: x.detach().requires_grad_(gradients and x.is_floating_point()) for name, x in inputs.items()}
    result = function(**leaves)
    outputs = (result,) if isinstance(result, torch.Tensor) else tuple(result)
    found = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    if not gradients:
        return found
    generator = torch.Generator().manual_seed(seed)
    # bfloat16 has the fewest digits: rounded to it, the cotangents are the same numbers in every dtype.
    cotangents = [
        torch.randn(output.shape, generator=generator).bfloat16().to(output.device, output.dtype) for output in outputs
    ]
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    grads = torch.autograd.grad(outputs, list(wanted.values()), cotangents, allow_unused=True)
    for name, grad in zip(wanted, grads, strict=True):
        if grad is None:
            raise AssertionError(f"no gradient reaches {name}")
        found[f"gradient of {name}"] = grad
    return found


def _at(where: torch.Tensor, got: torch.Tensor, expected: torch.Tensor) -> str:
    index = tuple(int(i) for i in where.nonzero()[0])
    return f"at {list(index)}: {float(got[index])!r} instead of {float(expected[index])!r}"
