"""Gradients of query, key, value, the float mask and alpha against the float64 reference."""

from __future__ import annotations

import functools
import itertools

import cases
import pytest
import tolerance
import torch

import adasplash2


def with_grad(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(t.requires_grad_() for t in tensors)


@functools.lru_cache(maxsize=256)  # one case runs once per instruction set, against the same expectation
def expected(case: cases.Case) -> tolerance.Expected:
    query, key, value, grad_out = case.inputs()
    return tolerance.expect(*with_grad(query, key, value), grad_out, **case.options)


def check_backward(case: cases.Case) -> None:
    query, key, value, grad_out = case.inputs()
    result = tolerance.run(adasplash2.entmax_attention, *with_grad(query, key, value), grad_out, **case.options)
    tolerance.assert_result(result, expected(case))


@pytest.mark.parametrize("case", cases.PAIRWISE_CASES, ids=str)
def test_backward(case, isa):
    check_backward(case)


@pytest.mark.parametrize("case", cases.LONG_CASES, ids=str)
def test_backward_long(case, isa):
    check_backward(case)


@pytest.mark.parametrize("percent", [1, 3, 6, 12, 18, 25, 35, 50, 70, 95])
def test_backward_through_every_density(percent, isa):
    """Supports from 1% to 95% of 700 keys: each way of holding a support is met, and each passage between them."""
    shape = cases.Shape(heads=1, num_queries=97, num_keys=700)
    query, key, value, grad_out = cases.inputs_with_support(percent / 100, shape)
    tolerance.check(adasplash2.entmax_attention, *with_grad(query, key, value), grad_out)


@pytest.mark.parametrize("num_keys", cases.LENGTHS)
@pytest.mark.parametrize("num_queries", [1, 64, 97])
def test_backward_lengths(num_queries, num_keys):
    shape = cases.Shape(num_queries=num_queries, num_keys=num_keys, head_dim=40)
    query, key, value, grad_out = cases.inputs("gaussian", shape)
    tolerance.check(adasplash2.entmax_attention, *with_grad(query, key, value), grad_out)


@pytest.mark.parametrize("name", ["gaussian", "dense"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_any_subset_may_require_grad(name, size):
    shape = cases.Shape(num_queries=65, num_keys=97)
    for chosen in itertools.combinations(range(3), size):
        *tensors, grad_out = cases.inputs(name, shape)
        for index in chosen:
            tensors[index].requires_grad_()
        result = tolerance.check(adasplash2.entmax_attention, *tensors, grad_out)
        assert list(result.grads) == [("query", "key", "value")[index] for index in chosen]


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", ["sparse", "dense"])
@pytest.mark.parametrize("alpha", [1.5, 1.25])
def test_mask_gradient(dtype, name, alpha):
    shape = cases.Shape(batch=2, num_queries=65, num_keys=97, head_dim=40)
    query, key, value, grad_out = cases.inputs(name, shape, dtype)
    attn_mask = torch.randn(2, 2, 65, 97).to(dtype).masked_fill(torch.rand(2, 2, 65, 97) < 0.2, -torch.inf)
    tensors = with_grad(query, key, value)
    tolerance.check(adasplash2.entmax_attention, *tensors, grad_out, alpha=alpha, attn_mask=attn_mask.requires_grad_())


def test_mask_gradient_alone():
    query, key, value, grad_out = cases.inputs("gaussian", cases.Shape(num_queries=7, num_keys=65))
    result = tolerance.check(
        adasplash2.entmax_attention, query, key, value, grad_out, attn_mask=torch.randn(7, 65).requires_grad_()
    )
    assert list(result.grads) == ["attn_mask"]


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", ["sparse", "dense", "mixed_rows", "constant"])
@pytest.mark.parametrize("alpha_shape", [(), (4,), (2, 1), (2, 4)])
def test_alpha_gradient(dtype, name, alpha_shape):
    shape = cases.Shape(batch=2, heads=4, kv_heads=2, num_queries=65, num_keys=97, head_dim=40)
    query, key, value, grad_out = cases.inputs(name, shape, dtype)
    alpha_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    alpha = torch.empty(alpha_shape, dtype=alpha_dtype).uniform_(1.1, 2.0).requires_grad_()
    tensors = with_grad(query, key, value)
    result = tolerance.check(adasplash2.entmax_attention, *tensors, grad_out, alpha=alpha, enable_gqa=True)
    assert result.grads["alpha"].shape == alpha_shape


def test_alpha_gradient_alone():
    query, key, value, grad_out = cases.inputs("gaussian", cases.Shape(num_queries=65, num_keys=97))
    alpha = torch.tensor([1.5, 1.7], requires_grad=True)
    result = tolerance.check(adasplash2.entmax_attention, query, key, value, grad_out, alpha=alpha)
    assert list(result.grads) == ["alpha"]


@pytest.mark.parametrize("layout", ["slice", "transposed", "strided", "expanded", "heads_inside"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_of_out_in_any_layout(layout, dtype):
    shape = cases.Shape(num_queries=65, num_keys=97, head_dim=40)
    query, key, value, grad_out = cases.inputs("gaussian", shape, dtype)
    if layout == "expanded":  # what out.sum() sends
        grad_out = torch.ones((), dtype=dtype).expand(shape.out)
    elif layout == "heads_inside":  # what out.transpose(1, 2).reshape(B, N, H * D) sends
        grad_out = grad_out.transpose(1, 2).contiguous().transpose(1, 2)
    else:
        grad_out = cases.poisoned(grad_out, layout)
    tolerance.check(adasplash2.entmax_attention, *with_grad(query, key, value), grad_out)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("alpha", cases.ALPHAS)
def test_gradcheck(is_causal, alpha):
    """Against finite differences, with no reference at all."""
    shape = cases.Shape(batch=2, heads=4, kv_heads=2, num_queries=5, num_keys=7, head_dim=3, value_head_dim=2)
    query, key, value, _ = cases.inputs("gaussian", shape, torch.float64)

    def attention(query, key, value):
        return adasplash2.entmax_attention(query, key, value, is_causal=is_causal, enable_gqa=True, alpha=alpha)

    assert torch.autograd.gradcheck(attention, with_grad(query, key, value))


def test_gradcheck_of_mask_and_alpha():
    shape = cases.Shape(batch=2, heads=2, num_queries=5, num_keys=7, head_dim=3)
    query, key, value, _ = cases.inputs("gaussian", shape, torch.float64)
    attn_mask = torch.randn(2, 1, 7, dtype=torch.float64)
    alpha = torch.tensor([1.3, 1.8], dtype=torch.float64)

    def attention(query, key, value, attn_mask, alpha):
        return adasplash2.entmax_attention(query, key, value, attn_mask, alpha=alpha, key_lengths=torch.tensor([7, 4]))

    assert torch.autograd.gradcheck(attention, with_grad(query, key, value, attn_mask, alpha))
