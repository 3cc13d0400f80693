"""The rule for every numerical test: run the operation three ways and compare errors, not values.

    err(ours) <= 2 err(reference in the input dtype) + floor,     err = distance from the reference in float64

on the maximum and on the norm of every tensor. The oracle reads the very inputs that we read (cast up, so exact) and is
never rounded to their dtype.

The floor covers inputs on which the reference in low precision happens to be right by luck, as on few rows or on scores
that all tie. An entry is a sum of terms, such as prob_j v_j, and every correct algorithm makes errors relative to the
size of the terms, sum_j |prob_j v_j|, even where they cancel. With u = eps / 2 of the precision of the sums (float32 at
least), the error of z is about u z, z of the size of 1 + |tau| while <q, k> adds up; gap inherits it, prob = gap^b with
b = 1 / (alpha - 1) multiplies it by b, and 4 standard deviations make the largest of many: 4 b u (1 + max |tau|) of the
terms' size. Rounding the result to the input dtype adds u(dtype).
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


def floor_of(dtype: torch.dtype, tau: Tensor, alpha: float | Tensor = 1.5) -> float:
    """Error granted to a tensor of `dtype` beside twice the reference's, relative to its terms; derived above."""
    b = 1.0 / (float(alpha.min() if isinstance(alpha, Tensor) else alpha) - 1.0)
    finite = tau.detach()[tau.isfinite()].abs()
    z_size = 1.0 + (finite.max().item() if finite.numel() else 0.0)
    compute = torch.promote_types(dtype, torch.float32)
    rounding = 0.0 if dtype == compute else torch.finfo(dtype).eps / 2
    return 4.0 * b * z_size * torch.finfo(compute).eps / 2 + rounding


def assert_within_rule(name: str, ours: Tensor, same_dtype: Tensor, oracle: Tensor, margin: Tensor) -> None:
    """Checks one tensor whose floor is `margin`, entry by entry; NaN and inf must stand where the oracle has them.

    Reports the worst entry and its row.
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
    error, reference_error, margin = (
        t.masked_fill(special, 0.0).abs() for t in (ours - oracle, same_dtype - oracle, margin)
    )
    worst = _first(error == error.max())
    for norm, measure in (("maximum", torch.max), ("norm", torch.norm)):
        ours_err, reference_err, floor = (measure(t).item() for t in (error, reference_error, margin))
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
    """The reference's two runs on one set of inputs, and the size of the terms that each result adds up."""

    same_dtype: Result
    oracle: Result
    term_sizes: dict[str, Tensor]
    alpha: float | Tensor


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
    inputs = [_detached(t, torch.float64) for t in (query, key, value, grad_out)]
    copied = {name: _detached(t, torch.float64) for name, t in options.items()}
    oracle = run(reference.entmax_attention, *inputs, **copied)
    with torch.no_grad():
        return Expected(same, oracle, _term_sizes(oracle, *inputs, **copied), options.get("alpha", 1.5))


def _attention_in_reverse(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    return reference.entmax_attention(query.flip(-1), key.flip(-1), value, **options)


def _term_sizes(
    oracle: Result, query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor | None, **options: Any
) -> dict[str, Tensor]:
    """sum |term| for every entry of out, tau and the gradients: the equations of the operation with absolute values."""
    identity = torch.eye(key.shape[-2], dtype=key.dtype).expand(*key.shape[:-1], -1)
    prob = reference.entmax_attention(query, key, identity, **options).nan_to_num()
    query, key, value = (t.nan_to_num(posinf=0.0, neginf=0.0) for t in (query, key, value))
    group_size = query.shape[-3] // max(key.shape[-3], 1) if options.get("enable_gqa") else 1

    def per_query_head(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(group_size, dim=-3) if group_size > 1 else tensor

    def summed_to(like: Tensor, terms: Tensor) -> Tensor:
        if group_size > 1 and terms.shape[-3] != like.shape[-3]:
            terms = terms.unflatten(-3, (-1, group_size)).sum(-3)
        return terms.sum_to_size(like.shape)

    sizes = {"out": prob @ per_query_head(value).abs(), "tau": 1.0 + oracle.aux.tau.abs()}
    if grad_out is None:
        return sizes
    alpha = options.get("alpha", 1.5)
    alpha_rows = alpha.expand(prob.shape[:-2])[..., None, None] if isinstance(alpha, Tensor) else alpha
    scale = abs(query.shape[-1] ** -0.5 if options.get("scale") is None else options["scale"])
    grad_out = grad_out.nan_to_num(posinf=0.0, neginf=0.0)
    grad_prob = (grad_out @ per_query_head(value).mT).abs()
    weight = torch.where(prob > 0, prob.pow(2.0 - alpha_rows), 0.0)
    tilted = weight / weight.sum(-1, keepdim=True).clamp(min=1e-300)
    grad_score = weight * (grad_prob + (tilted * grad_prob).sum(-1, keepdim=True))
    sizes["query"] = summed_to(query, scale * grad_score @ per_query_head(key).abs())
    sizes["key"] = summed_to(key, scale * grad_score.mT @ query.abs())
    sizes["value"] = summed_to(value, prob.mT @ grad_out.abs())
    if isinstance(mask := options.get("attn_mask"), Tensor):
        sizes["attn_mask"] = grad_score.sum_to_size(mask.shape)
    if isinstance(alpha, Tensor):
        entropy = -torch.xlogy(prob, prob)
        prob_by_alpha = (prob + tilted) / (alpha_rows - 1.0) ** 2
        prob_by_alpha += (entropy + tilted * entropy.sum(-1, keepdim=True)) / (alpha_rows - 1.0)
        sizes["alpha"] = (grad_prob * prob_by_alpha).sum((-1, -2)).sum_to_size(alpha.shape)
    return sizes


def assert_result(result: Result, expected: Expected) -> None:
    """The rule for out, tau and every gradient, and the dtypes and shapes of all of them."""
    same, oracle = expected.same_dtype, expected.oracle
    triples = {"out": (result.out, same.out, oracle.out), "tau": (result.aux.tau, same.aux.tau, oracle.aux.tau)}
    assert result.grads.keys() == oracle.grads.keys()
    for name, grad in result.grads.items():
        triples[name] = (grad, same.grads[name], oracle.grads[name])
    for name, (ours, same_dtype, exact) in triples.items():
        margin = floor_of(ours.dtype, oracle.aux.tau, expected.alpha) * expected.term_sizes[name]
        label = f"grad {name}" if name in result.grads else name
        assert_within_rule(label, ours, same_dtype, exact, margin)


def check(
    attention: Attention, query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor | None = None, **options: Any
) -> Result:
    """Runs `attention` on the inputs as they are (strides included) and holds it to the rule; returns its result."""
    result = run(attention, query, key, value, grad_out, **options)
    assert_result(result, expect(query, key, value, grad_out, **options))
    return result
