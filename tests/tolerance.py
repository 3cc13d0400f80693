"""The rule for every numerical test: run the operation three ways and compare errors, not values.

    err(ours) <= 2 err(reference in the input dtype) + floor,     err = distance from the reference in float64

on the maximum and on the norm of every tensor. The oracle reads the very inputs that we read (cast up, so exact) and is
never rounded to their dtype.

The floor covers inputs on which the reference in low precision happens to be right by luck, as on few rows or on scores
that all tie. With u = eps / 2 of the precision of the sums (float32 at least), it has these parts:
  - 4 x the change of the float64 result when every input entry, and every row as a whole, is perturbed by u: the
    condition of the problem, for it is as if the inputs had been rounded once more; 4 because sums round several times,
    and for the tails. (Perturbed by 16 u and divided by 16, lest u vanish in the rounding of float64 itself);
  - (4 + S / 4) b u of the result, S the largest support, b = 1 / (alpha - 1): a sum of S terms of one sign, in at least
    4 lanes, may lose S / 4 u; and where scores tie, rounding gap = z - tau moves every prob = gap^b of the row alike;
  - u(dtype) of the result: rounding it to the input dtype;
  - for the gradient by alpha, which is a difference of terms b^2 prob dP that cancel (wholly, where one key takes all),
    8 b^2 u of their size, |<dO, out>|;
  - FLUSHED, an entry: products of float32 may end there at zero (and do in the emulator's tensor cores). The reference
    in low precision keeps them on some processors and not on others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adasplash2 import reference

Attention = Callable[..., Any]


PERTURBATION = 16.0  # of the inputs, in units of u
FLUSHED = 2.0**-125  # twice the smallest normal float32


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def assert_within_rule(
    name: str, ours: Tensor, same_dtype: Tensor, oracle: Tensor, perturbed: Tensor, margin: Tensor
) -> None:
    """Checks one tensor; `margin` is the part of the floor that is known entry by entry.

    NaN and inf must stand where the oracle has them. Reports the worst entry and its row.
    """
    assert ours.shape == oracle.shape, f"{name}: expected shape {tuple(oracle.shape)}, got {tuple(ours.shape)}"
    assert ours.dtype == same_dtype.dtype, f"{name}: expected {same_dtype.dtype}, got {ours.dtype}"
    if ours.numel() == 0:
        return
    ours, same_dtype = ours.detach().double(), same_dtype.detach().double()
    special = ~oracle.isfinite()
    wrong = torch.where(special, ~torch.isclose(ours, oracle, rtol=0.0, atol=0.0, equal_nan=True), ~ours.isfinite())
    assert not wrong.any(), (
        f"{name}: {int(wrong.sum())} entries differ in being finite, the first at {_first(wrong)}: "
        f"ours {ours[_first(wrong)].item()}, float64 {oracle[_first(wrong)].item()}"
    )
    error, reference_error, change, margin = (
        t.masked_fill(special, 0.0).abs() for t in (ours - oracle, same_dtype - oracle, perturbed - oracle, margin)
    )
    worst = _first(error == error.max())
    for norm, measure in (("maximum", torch.max), ("norm", torch.norm)):
        ours_err, reference_err = measure(error).item(), measure(reference_error).item()
        floor = 4.0 / PERTURBATION * measure(change).item() + measure(margin + FLUSHED).item()
        assert ours_err <= 2.0 * reference_err + floor, (
            f"{name}: {norm} of the error is {ours_err:.3e}, allowed 2 x {reference_err:.3e} (reference in the input "
            f"dtype) + {floor:.3e}; worst at {worst}: ours {ours[worst].item():.9g}, reference "
            f"{same_dtype[worst].item():.9g}, float64 {oracle[worst].item():.9g}"
        )


def _first(mask: Tensor) -> tuple[int, ...]:
    return tuple(mask.nonzero()[0].tolist())


@dataclass
class Result:
    """What one run of an attention gives: out, tau, and the gradients of everything that asked for one."""

    out: Tensor
    aux: reference.AttentionAux
    grads: dict[str, Tensor] = field(default_factory=dict)


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
    """The reference on one set of inputs: in their dtype, in float64, and in float64 with every input perturbed."""

    same_dtype: Result
    oracle: Result
    perturbed: Result
    alpha: Tensor
    row_sizes: Tensor  # (..., H, Nq), |<dO, out>| of each row


def expect(query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor | None = None, **options: Any) -> Expected:
    """Runs the reference on copies of the inputs."""
    u = unit_roundoff(compute_dtype(query.dtype))
    generator = torch.Generator().manual_seed(1)

    def in_float64(tensor: Any) -> Any:
        return _detached(tensor, torch.float64)

    def perturbed(tensor: Any) -> Any:
        copy = in_float64(tensor)
        if isinstance(copy, Tensor) and copy.is_floating_point():
            for shape in (copy.shape, (*copy.shape[:-1], 1)[: copy.ndim]):
                copy.data *= 1.0 + PERTURBATION * u * torch.randn(shape, generator=generator, dtype=torch.float64)
        return copy

    def run_on(copy: Callable[[Any], Any], attention: Attention) -> Result:
        named = {name: t if name == "alpha" and copy is perturbed else copy(t) for name, t in options.items()}
        return run(attention, *map(copy, (query, key, value, grad_out)), **named)

    # In float64 the reference cannot be its own oracle (an error of zero by definition).
    is_double = query.dtype == torch.float64
    oracle = run_on(in_float64, reference.entmax_attention)
    return Expected(
        same_dtype=run_on(_detached, _attention_in_reverse if is_double else reference.entmax_attention),
        oracle=oracle,
        perturbed=run_on(perturbed, reference.entmax_attention),
        alpha=torch.as_tensor(options.get("alpha", 1.5)).detach(),
        row_sizes=torch.zeros(()) if grad_out is None else (oracle.out.detach() * grad_out).abs().nan_to_num().sum(-1),
    )


def _attention_in_reverse(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    """The reference with <q, k> summed in reverse order and tau found by the other algorithm."""
    return reference.entmax_attention(query.flip(-1), key.flip(-1), value, method="bisection", **options)


def assert_result(result: Result, expected: Expected) -> None:
    """The rule for out, tau and every gradient, and the dtypes and shapes of all of them."""
    runs = (result, expected.same_dtype, expected.oracle, expected.perturbed)
    oracle = expected.oracle
    assert result.grads.keys() == oracle.grads.keys()
    quantities = {"out": [run.out for run in runs], "tau": [run.aux.tau for run in runs]}
    quantities |= {f"grad {name}": [run.grads[name] for run in runs] for name in oracle.grads}
    support_size = int(oracle.aux.support_size.max()) if oracle.aux.support_size.numel() else 0
    b = 1.0 / (expected.alpha.double().min() - 1.0)
    for name, (ours, *others) in quantities.items():
        u = unit_roundoff(compute_dtype(ours.dtype))
        rounding = unit_roundoff(ours.dtype) if ours.dtype != compute_dtype(ours.dtype) else 0.0
        margin = ((4.0 + support_size / 4.0) * b * u + rounding) * others[1].abs()
        if name == "grad alpha":
            margin = margin + 8.0 * b**2 * u * expected.row_sizes.sum(-1).sum_to_size(ours.shape)
        assert_within_rule(name, ours, *others, margin)


def check(
    attention: Attention, query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor | None = None, **options: Any
) -> Result:
    """Runs `attention` on the inputs as they are (strides included) and holds it to the rule; returns its result."""
    result = run(attention, query, key, value, grad_out, **options)
    assert_result(result, expect(query, key, value, grad_out, **options))
    return result
