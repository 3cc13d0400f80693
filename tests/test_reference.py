"""The oracle itself: literals worked out by hand, sorting against bisection, gradcheck, and its conventions."""

from __future__ import annotations

import math

import cases
import pytest
import torch

from adasplash2 import reference

NAN, INF = math.nan, math.inf


def double(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# (alpha, scores, probabilities), solved on paper:
# sparsemax: tau = (sum of the support - 1) / size. [1, 0.5, -1]: support 2, tau = 0.25.
# entmax15, z = x / 2, (z1 - tau)^2 + (z2 - tau)^2 = 1. [1.2, -0.8, -4]: z = 0.6, -0.4, -2; tau = -0.4 puts all of it on
#   the first key, with the second exactly at the border. [0, 0.56]: z = 0, 0.28; 0.6^2 + 0.8^2 = 1 needs a
#   difference of 0.2, so [0, 0.4] gives tau = -0.6.
# alpha = 4/3, z = x / 3, prob = gap^3: gaps 1/2 and (7/8)^(1/3) differ by 3 times as much in x.
LITERALS = [
    (2.0, (1.0, 0.5, -1.0), (0.75, 0.25, 0.0)),
    (2.0, (0.1, 0.2, 0.3), (7 / 30, 1 / 3, 13 / 30)),
    (2.0, (3.0, 2.0, 1.0), (1.0, 0.0, 0.0)),
    (1.5, (1.2, -0.8, -4.0), (1.0, 0.0, 0.0)),
    (1.5, (0.0, 0.4), (0.36, 0.64)),
    (1.5, (7.0, 7.4, 5.0), (0.36, 0.64, 0.0)),
    (1.5, (-3.0, -3.0, -3.0, -3.0), (0.25, 0.25, 0.25, 0.25)),
    (4 / 3, (0.0, 3.0 * ((7 / 8) ** (1 / 3) - 0.5)), (0.125, 0.875)),
    (1.0, (0.0, math.log(3.0)), (0.25, 0.75)),
]


@pytest.mark.parametrize(("alpha", "scores", "probs"), LITERALS)
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_entmax_literals(alpha, scores, probs, dtype):
    prob = reference.entmax(double(*scores).to(dtype), alpha)
    assert prob.dtype == dtype
    # Rounding the score by eps |x| moves prob by at most b times that, b <= 3 here.
    atol = 3 * 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(prob.double(), double(*probs), rtol=0.0, atol=atol)


@pytest.mark.parametrize("method", ["sort", "bisection"])
def test_attention_literal(method):
    """Scores 0 and 0.4 at alpha = 1.5: prob 0.36, 0.64; gap 0.6, 0.8; everything else follows on paper."""
    query = double(1.0)[:, None].requires_grad_()
    key = double(0.0, 0.4)[:, None].requires_grad_()
    value = double(10.0, 20.0)[:, None].requires_grad_()
    out, aux = reference.entmax_attention(query, key, value, return_aux=True, method=method)
    torch.testing.assert_close(out, double(16.4)[:, None])
    torch.testing.assert_close(aux.tau, double(-0.6))
    assert aux.support_size.tolist() == [2]
    assert aux.live_tile_fraction.item() == 1.0

    # dP = (10, 20); delta = (0.6 * 10 + 0.8 * 20) / 1.4 = 110 / 7; dS = (0.6 * -40 / 7, 0.8 * 30 / 7) = -+ 24 / 7.
    grads = torch.autograd.grad(out, (query, key, value), torch.ones_like(out))
    torch.testing.assert_close(grads[0], double(0.4 * 24 / 7)[:, None])
    torch.testing.assert_close(grads[1], double(-24 / 7, 24 / 7)[:, None])
    torch.testing.assert_close(grads[2], double(0.36, 0.64)[:, None])


@pytest.mark.parametrize("alpha", [1.5, 2.0])
@pytest.mark.parametrize("num_scores", [1, 2, 7, 64, 1025])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
def test_sort_and_bisection_agree(alpha, num_scores, scale):
    x = torch.randn(40, num_scores, dtype=torch.float64) * scale
    by_sort = reference.entmax(x, alpha, method="sort")
    by_bisection = reference.entmax(x, alpha, method="bisection")
    torch.testing.assert_close(by_sort, by_bisection, rtol=0.0, atol=1e-13)


@pytest.mark.parametrize("alpha", cases.ALPHAS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0, 1e4])
def test_probabilities_sum_to_one(alpha, scale):
    prob = reference.entmax(torch.randn(40, 300, dtype=torch.float64) * scale, alpha)
    assert (prob >= 0).all()
    torch.testing.assert_close(prob.sum(-1), torch.ones(40, dtype=torch.float64), rtol=0.0, atol=1e-13)


def test_small_alpha_approaches_softmax():
    x = torch.randn(20, 50, dtype=torch.float64)
    near, nearer = (reference.entmax(x, 1.0 + step) - torch.softmax(x, -1) for step in (2e-5, 1e-5))
    torch.testing.assert_close(near, 2.0 * nearer, rtol=1e-2, atol=1e-8)  # linear in alpha - 1
    assert nearer.abs().max() < 1e-4


def test_against_entmax_package():
    entmax = pytest.importorskip("entmax")
    x = torch.randn(20, 150, dtype=torch.float64) * 2.0
    torch.testing.assert_close(reference.entmax15(x), entmax.entmax15(x), rtol=0.0, atol=1e-12)
    torch.testing.assert_close(reference.sparsemax(x), entmax.sparsemax(x), rtol=0.0, atol=1e-12)
    for alpha in cases.ALPHAS:
        theirs = entmax.entmax_bisect(x, alpha, n_iter=60)
        torch.testing.assert_close(reference.entmax(x, alpha), theirs, rtol=0.0, atol=1e-12)


def test_entmax_gradients():
    x = torch.randn(3, 7, 2, dtype=torch.float64, requires_grad=True)
    for alpha in (1.0, *cases.ALPHAS):
        assert torch.autograd.gradcheck(lambda x, alpha=alpha: reference.entmax(x, alpha, dim=1), x)
    alpha = double(1.2, 1.5, 1.9)[:, None, None].requires_grad_()
    assert torch.autograd.gradcheck(lambda x, alpha: reference.entmax(x, alpha, dim=1), (x, alpha))


def test_attention_gradients():
    shape = cases.Shape(batch=2, heads=4, kv_heads=2, num_queries=5, num_keys=9, head_dim=3, value_head_dim=2)
    query, key, value, _ = (t.requires_grad_() for t in cases.inputs("gaussian", shape, torch.float64))
    bias = torch.randn(4, 1, 9, dtype=torch.float64, requires_grad=True)
    alpha = double(1.2, 1.5, 1.7, 1.9).requires_grad_()
    key_lengths = torch.tensor([9, 4])

    def with_bias(query, key, value, bias, alpha):
        return reference.entmax_attention(
            query, key, value, bias, enable_gqa=True, alpha=alpha, key_lengths=key_lengths
        )

    def causal(query, key, value):
        return reference.entmax_attention(query, key, value, is_causal=True, enable_gqa=True)

    assert torch.autograd.gradcheck(with_bias, (query, key, value, bias, alpha))
    assert torch.autograd.gradcheck(causal, (query, key, value))


@pytest.mark.parametrize("alpha", [1.0, *cases.ALPHAS])
def test_entmax_conventions(alpha):
    x = torch.tensor([[0.0, -INF, 0.0], [-INF, -INF, -INF], [NAN, 0.0, 1.0], [0.0, 1.0, INF]])
    prob = reference.entmax(x, alpha)
    assert prob[0].tolist() == pytest.approx([0.5, 0.0, 0.5])
    assert prob[1].tolist() == [0.0, 0.0, 0.0]
    assert prob[2:].isnan().all()
    assert reference.entmax(torch.empty(3, 0), alpha).shape == (3, 0)
    assert reference.entmax(torch.empty(0, 3), alpha).shape == (0, 3)


def test_attention_counts_live_tiles():
    """Three query tiles by two key tiles; each query sees one key, at the place that `seen` names."""
    seen = torch.zeros(1, 130, 100, dtype=torch.bool)
    seen[0, :64, 3] = True
    seen[0, 64:128, 99] = True
    query, key = torch.zeros(1, 130, 4), torch.zeros(1, 100, 4)
    bias = torch.zeros(1, 130, 100).masked_fill(~seen, -5.0)  # out of the support, yet free to take part
    _, aux = reference.entmax_attention(query, key, key, bias, return_aux=True)
    assert aux.live_tile_fraction.tolist() == pytest.approx([4 / 6])  # rows 128 and 129: all keys at -5, all live
    _, aux = reference.entmax_attention(query, key, key, seen, return_aux=True)
    assert aux.live_tile_fraction.tolist() == [1.0]
    assert aux.support_size[0, [0, 64, 128]].tolist() == [1, 1, 0]
    assert aux.tau[0, 128].item() == INF
