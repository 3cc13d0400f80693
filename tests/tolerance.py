"""The rule for every numerical test: run the operation three ways and compare errors, not values.

    err(ours) <= 2 err(reference in the input dtype) + floor,     err = distance from the reference in float64

on the maximum and on the norm of every tensor. The oracle reads the very inputs that we read (cast up, so exact) and is
never rounded to their dtype.

The floor covers inputs on which the reference in low precision happens to be right by luck, as it may on few rows. Both
the operation and the reference round a score by about u z (u = eps / 2 of the precision they compute in, float32 at
least), z of the size of 1 + |tau| while <q, k> adds up. These errors are independent, so they add in quadrature: |d out|
~ b u z sqrt(sum_j gap_j^(2b - 2)) |v|, where the root is 1 at alpha = 1.5. With b = 2, and 4 for the largest of many:
8 u (1 + max |tau|). Where all scores of a row tie the errors are one and the same and add up coherently: the root is
then sum_j gap_j^(b - 1), at alpha = 1.5 up to sqrt(support). Rounding the result to the input dtype adds u(dtype).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from adasplash2 import reference

Attention = Callable[..., Any]


def floor_of(dtype: torch.dtype, aux: reference.AttentionAux, has_ties: bool = False) -> float:
    """Relative error granted to a tensor of `dtype` beside twice the reference's, as derived above."""
    finite = aux.tau.detach()[aux.tau.isfinite()].abs()
    z_size = 1.0 + (finite.max().item() if finite.numel() else 0.0)
    compute = torch.promote_types(dtype, torch.float32)
    coherence = max(1.0, aux.support_size.max().item() ** 0.5) if has_ties and finite.numel() else 1.0
    rounding = 0.0 if dtype == compute else torch.finfo(dtype).eps / 2
    return 8.0 * z_size * coherence * torch.finfo(compute).eps / 2 + rounding


def assert_within_rule(name: str, ours: Tensor, same_dtype: Tensor, oracle: Tensor, floor: float) -> None:
    """Checks one tensor; NaN and inf must stand where the oracle has them. Reports the worst entry and its row."""
    assert ours.shape == oracle.shape, f"{name}: expected shape {tuple(oracle.shape)}, got {tuple(ours.shape)}"
    if ours.numel() == 0:
        return
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
    """The reference's two runs on one set of inputs: in the input dtype and in float64."""

    same_dtype: Result
    oracle: Result


def expect(query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor | None = None, **options: Any) -> Expected:
    """The reference on copies of the inputs. Its run in float64, for float64 inputs, cannot be the oracle's own (an
    error of zero by definition): it sums <q, k> in reverse order and finds tau by the other algorithm."""
    inputs = [_detached(t) for t in (query, key, value, grad_out)]
    copied = {name: _detached(t) for name, t in options.items()}
    if query.dtype == torch.float64:
        attention = functools.partial(_attention_in_reverse, method="bisection")
        same = run(attention, *inputs, **copied)
    else:
        same = run(reference.entmax_attention, *inputs, **copied)
    oracle = run(
        reference.entmax_attention,
        *(_detached(t, torch.float64) for t in (query, key, value, grad_out)),
        **{name: _detached(t, torch.float64) for name, t in options.items()},
    )
    return Expected(same, oracle)


def _attention_in_reverse(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    return reference.entmax_attention(query.flip(-1), key.flip(-1), value, **options)


def assert_result(result: Result, expected: Expected, has_ties: bool = False) -> None:
    """The rule for out, tau and every gradient, and the dtypes and shapes of all of them."""
    same, oracle = expected.same_dtype, expected.oracle
    triples = {"out": (result.out, same.out, oracle.out), "tau": (result.aux.tau, same.aux.tau, oracle.aux.tau)}
    assert result.grads.keys() == oracle.grads.keys()
    for name, grad in result.grads.items():
        triples[f"grad {name}"] = (grad, same.grads[name], oracle.grads[name])
    for name, (ours, same_dtype, exact) in triples.items():
        assert ours.dtype == same_dtype.dtype, f"{name}: expected {same_dtype.dtype}, got {ours.dtype}"
        assert_within_rule(name, ours, same_dtype, exact, floor_of(ours.dtype, oracle.aux, has_ties))


def check(
    attention: Attention, query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor | None = None, **options: Any
) -> Result:
    """Runs `attention` on the inputs as they are (strides included) and holds it to the rule; returns its result."""
    result = run(attention, query, key, value, grad_out, **options)
    assert_result(result, expect(query, key, value, grad_out, **options))
    return result
