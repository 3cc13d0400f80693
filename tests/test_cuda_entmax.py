"""The CUDA kernels of the plain activation, held to the rules of test_entmax.py: in the emulator, or on a GPU."""

from __future__ import annotations

import math

import cases
import pytest
import torch
from kernels import library
from simt.emulator import SEEDS, Diagnosis, Patch
from test_entmax import assert_gradient_of, assert_prob, perturbed, relative_floor, scores
from tolerance import assert_within_rule, compute_dtype

from adasplash2 import reference

NAN, INF = math.nan, math.inf

# (shape, dim): teams of 8 to 256 threads, as rows and as columns, one group of slices and several, in part and whole.
SHAPES = [((7, 1), -1), ((37, 5), 1), ((9, 33), -1), ((3, 1300), -1), ((200, 40), 0), ((4, 130, 3), -2), ((130, 2), 0)]


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.25, 1.1])
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_forward_and_backward(dtype, alpha, scale):
    for seed, (shape, dim) in enumerate(SHAPES):
        x = scores(shape, dtype, scale).requires_grad_()
        prob = library.entmax(x, alpha, dim, seed=SEEDS[seed % len(SEEDS)])
        assert_prob(prob, x.detach(), alpha, dim)
        grad_prob = torch.randn_like(prob)
        (grad_x,) = torch.autograd.grad(prob, x, grad_prob)
        assert grad_x.dtype == dtype
        assert_gradient_of(grad_x, prob, grad_prob, alpha, dim)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.25])
@pytest.mark.parametrize("length", [50, 1000])
def test_special_values(alpha, length):
    ramp = torch.linspace(0.0, 20.0, length)
    rows = torch.stack(
        [
            torch.full((length,), 0.7),
            torch.arange(length) % 7 * 0.3,
            torch.zeros(length).index_fill(0, torch.tensor([length // 3]), 50.0),
            ramp,
            torch.randn(length) * 1e4,
            torch.randn(length) * 1e-39,
            torch.full((length,), torch.finfo(torch.float32).min).index_fill(0, torch.tensor([5]), 1.0),
            torch.arange(length) % 2 * 2e37 + 3e38,
        ]
    )
    for row in rows:  # each alone: the rule is about the largest entry of a tensor
        assert_prob(library.entmax(row, alpha), row, alpha, -1)
    by_columns = library.entmax(rows.T.contiguous(), alpha, 0).T
    torch.testing.assert_close(by_columns, library.entmax(rows, alpha), rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.3])
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("dim", [0, 1])
def test_infinities_and_nan(alpha, dtype, dim):
    length = 130
    x = torch.full((6, length), -INF, dtype=dtype)
    x[0, 1:3] = 0.0  # two keys share
    x[2, 0], x[2, -1] = 1.0, NAN
    x[3] = NAN
    x[4, 1], x[4, 2] = INF, 1.0
    x[5] = 0.5
    x = (x if dim == 1 else x.T.contiguous()).requires_grad_()
    prob = library.entmax(x, alpha, dim)
    rows = prob.detach() if dim == 1 else prob.detach().T
    assert (rows[0, 0] == 0).all() and (rows[0, 3:] == 0).all()
    torch.testing.assert_close(
        rows[0, 1:3], torch.full((2,), 0.5, dtype=dtype), rtol=8 * torch.finfo(dtype).eps, atol=0.0
    )
    assert (rows[1] == 0).all()  # nothing to choose from
    assert rows[2:5].isnan().all()
    torch.testing.assert_close(rows[5], torch.full((length,), 1.0 / length, dtype=dtype))
    grad_prob = torch.where(prob == 0, NAN, 1.0)  # a prob of exactly zero passes nothing on, whatever comes back to it
    (grad_x,) = torch.autograd.grad(prob, x, grad_prob)
    grad = grad_x if dim == 1 else grad_x.T
    assert (grad[1] == 0).all() and grad[[0, 5]].isfinite().all() and grad[2:5].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dim", [0, 1])
def test_alpha_by_slice_and_its_gradient(dtype, dim):
    x = scores((24, 150), dtype, 2.0)
    x = x if dim == 1 else x.T.contiguous()
    values = torch.linspace(1.1, 2.0, 24, dtype=torch.float64)  # 1.5 and 2 by the general formula, too
    values = values[:, None] if dim == 1 else values[None, :]
    grad_prob = torch.randn(x.shape, dtype=dtype)

    def gradients(entmax, x, dtype):
        leaf, alpha = x.to(dtype, copy=True).requires_grad_(), values.to(compute_dtype(dtype), copy=True)
        alpha.requires_grad_()
        prob = entmax(leaf, alpha, dim)
        return prob.detach(), *torch.autograd.grad(prob, (leaf, alpha), grad_prob.to(dtype))

    ours, same = gradients(library.entmax, x, dtype), gradients(reference.entmax, x, dtype)
    oracle = gradients(reference.entmax, x, torch.float64)
    if dtype == torch.float64:
        for one, other in zip(ours, same, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)
        return
    moved = gradients(reference.entmax, perturbed(x.double(), dtype), torch.float64)
    floor = relative_floor(torch.float32, 1.1, 150)
    assert_within_rule("prob", ours[0], same[0], oracle[0], moved[0], floor * oracle[0])
    # Differences of sums of the size of 1, divided by (alpha - 1)^2 = 1 / 100: they may lose that much.
    assert_within_rule("grad alpha", ours[2], same[2], oracle[2], moved[2], 100.0 * floor * oracle[2])


@pytest.mark.parametrize("alpha", [1.5, 1.3])
def test_same_bits_under_every_schedule(alpha):
    x, grad_prob = torch.randn(5, 300, requires_grad=True), torch.randn(5, 300)
    alphas = torch.full((5, 1), alpha, dtype=torch.float64, requires_grad=True)
    runs = []
    for seed in SEEDS:
        prob = library.entmax(x, alphas, -1, seed=seed)
        runs.append((prob, *torch.autograd.grad(prob, (x, alphas), grad_prob)))
    for other in runs[1:]:
        assert all(torch.equal(one, two) for one, two in zip(runs[0], other, strict=True))


KERNELS = "csrc/cuda/any_arch/entmax.cuh"
BUGS = {
    "no barrier after the histogram is cleared": Patch(
        KERNELS, "smem.histogram[0][i] = 0;\n      __syncthreads();", "smem.histogram[0][i] = 0;"
    ),
    "hits counted without an atomic": Patch(KERNELS, "atomicAdd(s_bin, 1u);", "*s_bin += 1u;"),
    "the bound is above tau": Patch(KERNELS, "fmaxf(tau_lower, bound.tau_lower)", "bound.tau_lower + 0.25f"),
    "tau stays where the histogram put it": Patch(KERNELS, "tau + entmax.newton_step(sums)", "tau"),
    "half of a team is left out": Patch(KERNELS, "distance = num_members / 2;", "distance = num_members / 4;"),
    "delta is left out": Patch(KERNELS, "(g_grad_prob[at]) - delta)", "(g_grad_prob[at]) + 0 * delta)"),
    "alpha of the first slice for all": Patch(KERNELS, "problem.alpha_slices[slice]", "problem.alpha_slices[0]"),
}


def verdict(patches: tuple[Patch, ...]) -> str:
    """What is wrong, in words; empty where nothing is."""
    x, grad_prob = torch.randn(40, 300), torch.randn(40, 300)
    alpha = torch.linspace(1.2, 1.9, 40)[:, None]
    for seed in SEEDS:
        leaf, oracle_leaf = x.clone().requires_grad_(), x.double().requires_grad_()
        oracle = reference.entmax(oracle_leaf, alpha.double())
        (oracle_grad,) = torch.autograd.grad(oracle, oracle_leaf, grad_prob.double())
        try:
            prob = library.entmax(leaf, alpha, seed=seed, patches=patches)
            (grad,) = torch.autograd.grad(prob, leaf, grad_prob)
        except Diagnosis as diagnosis:
            return str(diagnosis)
        if (prob - oracle).abs().max() > 1e-5:
            return "prob is wrong"
        if (grad - oracle_grad).norm() > 1e-3 * oracle_grad.norm():
            return "the gradient is wrong"
    return ""


@pytest.mark.skipif(library.has_gpu(), reason="seeded bugs are for the emulator")
@pytest.mark.parametrize("bug", [None, *BUGS])
def test_bug_shows(bug):
    """Bugs seeded into the kernels' source, each of which must show; without one nothing is wrong."""
    assert (verdict((BUGS[bug],)) != "") if bug else verdict(()) == ""
