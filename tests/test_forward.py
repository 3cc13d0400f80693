"""out and tau against the float64 reference: every named input, dtype, alpha and instruction set."""

from __future__ import annotations

import functools

import cases
import pytest
import tolerance
import torch

import adasplash2


@functools.lru_cache(maxsize=256)  # one case runs once per instruction set, against the same expectation
def expected(case: cases.Case) -> tolerance.Expected:
    query, key, value, _ = case.inputs()
    return tolerance.expect(query, key, value, **case.options)


def check_forward(case: cases.Case) -> None:
    query, key, value, _ = case.inputs()
    result = tolerance.run(adasplash2.entmax_attention, query, key, value, **case.options)
    tolerance.assert_result(result, expected(case))


@pytest.mark.parametrize("case", cases.PAIRWISE_CASES, ids=str)
def test_forward(case, isa):
    check_forward(case)


@pytest.mark.parametrize("case", cases.LONG_CASES, ids=str)
def test_forward_long(case, isa):
    check_forward(case)


@pytest.mark.parametrize("percent", [1, 3, 6, 12, 18, 25, 35, 50, 70, 95])
def test_forward_through_every_density(percent, isa):
    """Supports from 1% to 95% of 700 keys: each way of holding a support is met, and each passage between them."""
    shape = cases.Shape(heads=1, num_queries=97, num_keys=700)
    query, key, value, _ = cases.inputs_with_support(percent / 100, shape)
    tolerance.check(adasplash2.entmax_attention, query, key, value)


@pytest.mark.parametrize("num_keys", cases.LENGTHS)
@pytest.mark.parametrize("num_queries", [1, 64, 97])
def test_forward_lengths(num_queries, num_keys):
    shape = cases.Shape(num_queries=num_queries, num_keys=num_keys, head_dim=40)
    query, key, value, _ = cases.inputs("gaussian", shape)
    tolerance.check(adasplash2.entmax_attention, query, key, value)


@pytest.mark.parametrize("first", range(8))
def test_forward_where_every_eighth_key_stands_out(first):
    """A sample of the keys that meets these, all or none, misleads about the others: some just below them are in the
    support too. Supports are of 200 keys."""
    shape = cases.Shape(heads=1, num_queries=13, num_keys=1024)
    _, _, value, _ = cases.inputs("gaussian", shape)
    z = 0.4 + 0.09 * torch.rand(shape.num_keys)
    z[torch.rand(shape.num_keys) < 0.9] = 0
    z[first::8] = 0.5
    query = torch.ones(shape.query)
    key = (2 * z * shape.head_dim**-0.5).expand(shape.head_dim, -1).mT.expand(shape.key)
    tolerance.check(adasplash2.entmax_attention, query, key, value)


def test_forward_where_all_products_are_rounded_one_way(isa):
    """Keys that 8 bits make too large by all of their error bound hide others, made too small, that belong to the
    support: tau of rounded scores is hardly ever so wrong."""
    shape = cases.Shape(heads=1, num_queries=13, num_keys=1024)
    _, _, value, _ = cases.inputs("gaussian", shape)
    steps = torch.zeros(shape.key)  # of 8 bits, whose largest number is 127
    steps[..., 0, ::2], steps[..., 0, 1::2] = 127, -127
    for first, last, sum_of_steps, residual in ((100, 120, 3000, -0.45), (200, 230, 2821, 0.45)):
        steps[..., first:last, :] = sum_of_steps // shape.head_dim + residual
        steps[..., first:last, : sum_of_steps % shape.head_dim] += 1
    # z = sum(key) / 16: the window is 600 steps wide, tau of the first 20 keys 134 below them, the bound 1.8 steps a
    # product: 29.
    query, key = torch.ones(shape.query), steps * 16 / 600
    expected = tolerance.expect(query, key, value)
    assert (expected.oracle.aux.support_size == 50).all()
    tolerance.assert_result(tolerance.run(adasplash2.entmax_attention, query, key, value), expected)
