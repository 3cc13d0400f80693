"""The rule for every numerical test: run the operation three ways and compare errors, not values.

    err(ours) <= 2 err(reference in the input dtype) + floor,     err = distance from the reference in float64

on the maximum and on the norm of every tensor. The oracle reads the very inputs that we read (cast up, so exact) and is
never rounded to their dtype.

The floor covers inputs on which the reference in low precision happens to be right by luck. Both the operation and the
reference round a score by about u z (u = eps / 2 of the precision they compute in, float32 at least). These errors are
independent, so they add in quadrature: |d out| ~ b u z sqrt(sum_j gap_j^(2b - 2)) |v|, where the root is 1 at alpha =
1.5; with z of a few units and b = 2 that is about 16 u. Rounding the result to the input dtype adds u(dtype).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adasplash2 import reference

Attention = Callable[..., Any]

COMPUTE_ROUNDINGS = 16  # derived above
OUTPUT_ROUNDINGS = 1


def floor_of(dtype: torch.dtype) -> float:
    """Relative error granted to a tensor of `dtype` beside twice the reference's."""
    compute = torch.promote_types(dtype, torch.float32)
    return COMPUTE_ROUNDINGS * torch.finfo(compute).eps / 2 + OUTPUT_ROUNDINGS * torch.finfo(dtype).eps / 2


def assert_within_rule(name: str, ours: Tensor, same_dtype: Tensor, oracle: Tensor) -> None:
    """Checks one tensor; NaN and inf must stand where the oracle has them. Reports the worst entry and its row."""
    assert ours.shape == oracle.shape, f"{name}: expected shape {tuple(oracle.shape)}, got {tuple(ours.shape)}"
    if ours.numel() == 0:
        return
    floor = floor_of(ours.dtype)
    ours, same_dtype = ours.detach().double(), same_dtype.detach().double()
    special = ~oracle.isfinite()
    wrong = torch.where(special, ~torch.isclose(ours, oracle, rtol=0.0, atol=0.0, equal_nan=True), ~ours.isfinite())
    assert not wrong.any(), (
        f"{name}: {int(wrong.sum())} entries differ in being finite, the first at {_first(wrong)}: "
        f"ours {ours[_first(wrong)].item()}, float64 {oracle[_first(wrong)].item()}"
    )
    error = (ours - oracle).masked_fill(special, 0.0).abs()
    error_allowed = (same_dtype - oracle).masked_fill(special, 0.0).abs()
    size = oracle.masked_fill(special, 0.0).abs()
    worst = _first(error == error.max())
    for norm, ours_err, reference_err, magnitude in (
        ("maximum", error.max(), error_allowed.max(), size.max()),
        ("norm", error.norm(), error_allowed.norm(), size.norm()),
    ):
        limit = 2.0 * reference_err + floor * magnitude
        assert ours_err <= limit, (
            f"{name}: {norm} of the error is {ours_err:.3e}, allowed 2 x {reference_err:.3e} (reference in the input "
            f"dtype) + {floor:.1e} x {magnitude:.3e}; worst at {worst}: ours {ours[worst].item():.9g}, reference "
            f"{same_dtype[worst].item():.9g}, float64 {oracle[worst].item():.9g}"
        )


def _first(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[0].tolist())


@dataclass
class Result:
    """What one run of an attention gives: out, tau, and the gradients of everything that asked for one."""

    out: Tensor
    aux: reference.AttentionAux
    grads: dict[str, Tensor | None] = field(default_factory=dict)


def run(
    attention: Attention, query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor | None = None, **options: Any
) -> Result:
    """Forward, and backward when `grad_out` is given, for whichever inputs require grad."""
    out, aux = attention(query, key, value, return_aux=True, **options)
    result = Result(out, aux)
    named = {"query": query, "key": key, "value": value, **options}
    leaves = {name: t for name, t in named.items() if isinstance(t, Tensor) and t.requires_grad}
    if grad_out is not None and leaves:
        result.grads = dict(zip(leaves, torch.autograd.grad(out, list(leaves.values()), grad_out), strict=True))
    return result


def _detached(tensor: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy that is a leaf of its own, in `dtype` if it is a floating tensor; anything else unchanged."""
    if not isinstance(tensor, Tensor):
        return tensor
    target = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(target, copy=True).requires_grad_(tensor.requires_grad)


@dataclass
class Expected:
    """The reference's two runs on one set of inputs: in the input dtype and in float64."""

    same_dtype: Result
    oracle: Result


def expect(query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor | None = None, **options: Any) -> Expected:
    # In float64 the oracle cannot stand for the reference in the input dtype (its error would be zero by definition):
    # there the other algorithm for tau does.
    method = "bisection" if query.dtype == torch.float64 else "auto"
    tensors = (query, key, value, grad_out)
    same = run(
        reference.entmax_attention,
        *map(_detached, tensors),
        **{name: _detached(t) for name, t in options.items()},
        method=method,
    )
    oracle = run(
        reference.entmax_attention,
        *(_detached(t, torch.float64) for t in tensors),
        **{name: _detached(t, torch.float64) for name, t in options.items()},
    )
    return Expected(same, oracle)


def assert_result(result: Result, expected: Expected) -> None:
    """The rule for out, tau and every gradient, and the dtypes and shapes of all of them."""
    same, oracle = expected.same_dtype, expected.oracle
    assert result.out.dtype == same.out.dtype, f"out: expected {same.out.dtype}, got {result.out.dtype}"
    assert_within_rule("out", result.out, same.out, oracle.out)
    assert result.aux.tau.dtype == same.aux.tau.dtype, f"tau: expected {same.aux.tau.dtype}, got {result.aux.tau.dtype}"
    assert_within_rule("tau", result.aux.tau, same.aux.tau, oracle.aux.tau)
    assert result.grads.keys() == oracle.grads.keys()
    for name, grad in result.grads.items():
        grad_same, grad_oracle = same.grads[name], oracle.grads[name]
        assert grad is not None and grad_same is not None and grad_oracle is not None, f"grad {name} is missing"
        assert grad.dtype == grad_same.dtype, f"grad {name}: expected {grad_same.dtype}, got {grad.dtype}"
        assert_within_rule(f"grad {name}", grad, grad_same, grad_oracle)


def check(
    attention: Attention, query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor | None = None, **options: Any
) -> Result:
    """Runs `attention` on the inputs as they are (strides included) and holds it to the rule; returns its result."""
    result = run(attention, query, key, value, grad_out, **options)
    assert_result(result, expect(query, key, value, grad_out, **options))
    return result
