"""entmax, entmax15 and sparsemax over one dimension of a tensor: against the oracle, and its conventions."""

from __future__ import annotations

import functools
import math

import cases
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerance import PERTURBATION, assert_within_rule, compute_dtype, unit_roundoff

import adasplash2
from adasplash2 import _C, reference

NAN, INF = math.nan, math.inf

# (shape, dim): lengths around a vector, a group of vectors and the switch from many slices at once to one row at a
# time; numbers of slices around a vector; every position of dim.
SHAPES = [
    ((7, 1), -1),
    ((37, 5), 1),
    ((9, 33), 1),
    ((17, 128), -1),
    ((5, 129), -1),
    ((3, 1025), -1),
    ((200, 40), 0),
    ((4, 130, 3), -2),
    ((2, 3, 5, 16), -3),
]


def scores(shape: tuple[int, ...], dtype: torch.dtype, scale: float) -> torch.Tensor:
    return (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)


def relative_floor(dtype: torch.dtype, alpha: float, length: int) -> float:
    """The part of the result that is granted beside twice the reference's error and the condition (tolerance.py).

    A gap is right to some roundings of its own size plus those of tau, the root of a sum: 16. Where prob is a power of
    it, b = 1 / (alpha - 1) times as much, and power() is right to 2 (2 + |log2 prob|) roundings (csrc/cpu/simd.h).
    """
    roundings = 16.0
    if alpha not in (1.5, 2.0):
        roundings += 1.0 / (alpha - 1.0) + 2.0 * (2.0 + math.log2(length))
    compute = compute_dtype(dtype)
    return roundings * unit_roundoff(compute) + (0.0 if dtype == compute else unit_roundoff(dtype))


def perturbed(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A float64 tensor with every entry moved by 16 roundings of `dtype`, as tolerance.py does with the inputs."""
    sign = torch.randint(0, 2, tensor.shape) * 2.0 - 1.0
    return tensor * (1.0 + PERTURBATION * unit_roundoff(compute_dtype(dtype)) * sign)


def assert_prob(prob: torch.Tensor, x: torch.Tensor, alpha: float, dim: int) -> None:
    assert prob.dtype == x.dtype
    oracle = reference.entmax(x.double(), alpha, dim)
    if x.dtype == torch.float64:  # nothing is more precise, so the two are peers; both are good to some roundings of z
        torch.testing.assert_close(prob, oracle, rtol=0.0, atol=1e-13)
        return
    moved = reference.entmax(perturbed(x.double(), x.dtype), alpha, dim)
    length = x.shape[dim] if x.dim() else 1
    same = reference.entmax(x, alpha, dim)
    assert_within_rule("prob", prob, same, oracle, moved, relative_floor(x.dtype, alpha, length) * oracle)


def assert_gradient_of(
    grad_x: torch.Tensor, prob: torch.Tensor, grad_prob: torch.Tensor, alpha: float, dim: int
) -> None:
    """Holds the gradient to its formula in our own prob (as it was saved), which has its own test.

    As a function of x it is ill-conditioned where prob is tiny: prob^(2 - alpha) is not, and jumps for alpha = 2.
    """
    dtype, compute = grad_x.dtype, compute_dtype(grad_x.dtype)
    p, g = prob.detach().movedim(dim, -1), grad_prob.movedim(dim, -1)
    if dtype == torch.float64:
        torch.testing.assert_close(
            grad_x.movedim(dim, -1), reference._grad_score(p, g, alpha), rtol=0.0, atol=1e-13, equal_nan=True
        )
        return
    same = reference._grad_score(p.to(compute), g.to(compute), alpha).to(dtype)
    p, g = p.double(), g.double()
    oracle = reference._grad_score(p, g, alpha)
    moved = reference._grad_score(perturbed(p, dtype), perturbed(g, dtype), alpha)
    floor = relative_floor(dtype, alpha, p.shape[-1])
    assert_within_rule("grad x", grad_x.movedim(dim, -1), same, oracle, moved, floor * oracle)


# ---------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("alpha", cases.ALPHAS)
@pytest.mark.parametrize("scale", [0.01, 1.0, 10.0])
def test_forward_and_backward(dtype, alpha, scale, isa):
    for shape, dim in SHAPES:
        x = scores(shape, dtype, scale).requires_grad_()
        prob = adasplash2.entmax(x, alpha, dim)
        assert_prob(prob, x.detach(), alpha, dim)
        grad_prob = torch.randn_like(prob)
        (grad_x,) = torch.autograd.grad(prob, x, grad_prob)
        assert grad_x.dtype == dtype
        is_saved_in_float32 = dtype == torch.float16 and alpha > 1.52
        saved = adasplash2.entmax(x.detach().float(), alpha, dim) if is_saved_in_float32 else prob
        assert_gradient_of(grad_x, saved, grad_prob, alpha, dim)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alpha", [1.5, 1.25, 1.1])  # alpha <= 1.5: the weight is Lipschitz in the gap
def test_gradient_end_to_end(dtype, alpha, isa):
    for shape, dim in SHAPES:
        x = scores(shape, dtype, 2.0)
        grad_prob = torch.randn(shape, dtype=dtype)

        def gradient(entmax, x, dtype, grad_prob=grad_prob, dim=dim):
            leaf = x.to(dtype, copy=True).requires_grad_()
            return torch.autograd.grad(entmax(leaf, alpha, dim), leaf, grad_prob.to(dtype))[0]

        same, oracle = gradient(reference.entmax, x, dtype), gradient(reference.entmax, x, torch.float64)
        moved = gradient(reference.entmax, perturbed(x.double(), dtype), torch.float64)
        floor = relative_floor(dtype, alpha, x.shape[dim])
        assert_within_rule("grad x", gradient(adasplash2.entmax, x, dtype), same, oracle, moved, floor * oracle)


@pytest.mark.parametrize("is_tensor", [False, True])
@pytest.mark.parametrize("length", [10, 300])
@pytest.mark.parametrize(("alpha", "first", "second"), [(1.64, 1.5625, 2.0**-16), (1.8, 1.25, 2.0**-20)])
def test_float16_gradient_where_a_prob_is_zero_in_float16(alpha, first, second, length, is_tensor):
    """The second key has a prob below 2^-25; its weight prob^(2 - alpha) is 0.002 and 0.03 of the first's."""
    x = torch.full((3, length), -2.0, dtype=torch.float16)
    x[:, 0], x[:, 1] = first, second
    grad_prob = torch.randn(x.shape, dtype=torch.float16)

    def gradient(entmax, dtype):
        leaf = x.to(dtype, copy=True).requires_grad_()
        prob = entmax(leaf, torch.tensor(alpha).to(compute_dtype(dtype)) if is_tensor else alpha, -1)
        return prob, torch.autograd.grad(prob, leaf, grad_prob.to(dtype))[0]

    prob, ours = gradient(adasplash2.entmax, torch.float16)
    _, oracle = gradient(reference.entmax, torch.float64)
    assert prob.dtype == ours.dtype == torch.float16
    assert (prob[:, 1] == 0).all() and (oracle[:, 1] != 0).all()
    # A gap of 7e-7 of scores in float32 is right to 8%, its weight gap^(1/4) to 2%; lost, it would be 100% off.
    torch.testing.assert_close(ours.double(), oracle, rtol=0.02, atol=2.0**-24)


# Numbers of test_reference.py, where they are worked out by hand.
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("length", [3, 200])
def test_literals(dtype, length, isa):
    padding = [-10000.0] * (length - 2)
    atol = 8 * torch.finfo(dtype).eps
    for entmax, pair, expected in (
        (adasplash2.sparsemax, (1.0, 0.5), (0.75, 0.25)),
        (adasplash2.entmax15, (7.0, 7.4), (0.36, 0.64)),
        (lambda x: adasplash2.entmax(x, 1.0), (0.0, math.log(3.0)), (0.25, 0.75)),
    ):
        prob = entmax(torch.tensor([*pair, *padding], dtype=dtype)).double()
        # 7.4 is rounded to the dtype: by eps * 4, and prob moves by 0.64 of that.
        torch.testing.assert_close(prob[:2], torch.tensor(expected, dtype=torch.float64), rtol=0.0, atol=atol)
        assert (prob[2:] == 0).all()


@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.25])
@pytest.mark.parametrize("length", [50, 1000])
@pytest.mark.parametrize(
    "name", ["constant", "tied", "one_hot", "rising", "falling", "huge", "denormal", "lowest", "coarse"]
)
def test_special_values(alpha, length, name, isa):
    ramp = torch.linspace(0.0, 20.0, length)
    rows = {
        "constant": torch.full((length,), 0.7),
        "tied": (torch.arange(length) % 7 * 0.3),
        "one_hot": torch.zeros(length).index_fill(0, torch.tensor([length // 3]), 50.0),
        "rising": ramp,
        "falling": ramp.flip(0),
        "huge": torch.randn(length) * 1e4,
        "denormal": torch.randn(length) * 1e-39,
        # What masks are often made of; one value beside it.
        "lowest": torch.full((length,), torch.finfo(torch.float32).min).index_fill(0, torch.tensor([5]), 1.0),
        # Neighbouring floats are farther apart than the support is wide: uniform over the ties of the maximum.
        "coarse": (torch.arange(length) % 2 * 2e37 + 3e38),
    }
    for x in (rows[name].repeat(3, 1), rows[name].repeat(17, 1).T.contiguous()):
        dim = -1 if x.shape[1] == length else 0
        prob = adasplash2.entmax(x, alpha, dim)
        assert_prob(prob, x, alpha, dim)


@pytest.mark.parametrize("alpha", cases.ALPHAS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_probabilities_sum_to_one(alpha, scale, isa):
    for shape, dim in (((7, 20000), -1), ((20000, 7), 0), ((50, 100), -1)):
        total = adasplash2.entmax(torch.randn(shape) * scale, alpha, dim).double().sum(dim)
        # Each prob is right to a few roundings of its own size, as are the sums that tau comes from; power() is right
        # to 2 + |log2 prob| roundings (csrc/cpu/simd.h), and log2 of 1 / 20000 is -14.
        torch.testing.assert_close(total, torch.ones_like(total), rtol=0.0, atol=20 * torch.finfo(torch.float32).eps)


# ---------------------------------------------------------------------------------------------- conventions


@pytest.mark.parametrize("alpha", [1.0, *cases.ALPHAS])
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("length", [3, 130, 400])
@pytest.mark.parametrize("dim", [0, 1])
def test_infinities_and_nan(alpha, dtype, length, dim, isa):
    x = torch.full((6, length), -INF, dtype=dtype)
    x[0, 1:3] = 0.0  # two keys share
    x[2, 0], x[2, -1] = 1.0, NAN
    x[3] = NAN
    x[4, 1], x[4, 2] = INF, 1.0
    x[5] = 0.5
    x = (x if dim == 1 else x.T.contiguous()).requires_grad_()
    prob = adasplash2.entmax(x, alpha, dim)
    rows = prob.detach() if dim == 1 else prob.detach().T
    assert (rows[0, 0] == 0).all() and (rows[0, 3:] == 0).all()
    torch.testing.assert_close(
        rows[0, 1:3], torch.full((2,), 0.5, dtype=dtype), rtol=8 * torch.finfo(dtype).eps, atol=0.0
    )
    assert (rows[1] == 0).all()  # nothing to choose from
    assert rows[2:5].isnan().all()
    torch.testing.assert_close(rows[5], torch.full((length,), 1.0 / length, dtype=dtype))
    prob.backward(torch.ones_like(prob))
    grad = x.grad if dim == 1 else x.grad.T
    assert (grad[1] == 0).all() and grad[[0, 5]].isfinite().all() and grad[2:5].isnan().all()


@pytest.mark.parametrize("length", [5, 300])
def test_gradient_outside_the_support_is_ignored(length, isa):
    """A prob of exactly zero passes nothing on, whatever comes back to it."""
    for dim in (0, 1):
        x = torch.zeros(4, length).index_fill(1, torch.tensor([1]), 10.0)
        x = (x if dim == 1 else x.T.contiguous()).requires_grad_()
        prob = adasplash2.entmax15(x, dim)
        grad_prob = torch.where(prob == 0, NAN, 1.0)
        (grad_x,) = torch.autograd.grad(prob, x, grad_prob)
        assert (grad_x == 0).all()


@pytest.mark.parametrize("alpha", [1.0, 1.5, 2.0, 1.3])
def test_empty_and_tiny(alpha):
    for shape in ((3, 0), (0, 3), (0,), (2, 0, 3)):
        x = torch.empty(shape, requires_grad=True)
        prob = adasplash2.entmax(x, alpha, -1)
        assert prob.shape == shape
        prob.sum().backward()
        assert x.grad.shape == shape
    x, alphas = torch.empty(3, 0), torch.full((3, 1), 1.5, requires_grad=True)
    adasplash2.entmax(x, alphas).sum().backward()
    assert (alphas.grad == 0).all()
    torch.testing.assert_close(adasplash2.entmax(torch.tensor(3.0), alpha, 0), torch.tensor(1.0))
    assert adasplash2.entmax(torch.tensor(-INF), alpha).item() == 0.0
    assert adasplash2.entmax(torch.tensor(NAN), alpha).isnan()
    one = torch.randn(4, 1, 5, requires_grad=True)
    prob = adasplash2.entmax(one, alpha, 1)
    torch.testing.assert_close(prob, torch.ones_like(prob))
    assert (torch.autograd.grad(prob, one, torch.randn_like(prob))[0] == 0).all()


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("shape", [(5, 6, 40), (3, 4, 300)])
def test_strides(dtype, shape):
    base = scores(shape, dtype, 2.0)
    doubled = torch.full((*shape[:-1], 2 * shape[-1]), NAN, dtype=dtype)
    doubled[..., ::2] = base
    layouts = {
        "contiguous": base,
        "permuted": base.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "transposed": base.mT.contiguous().mT,
        "sliced": cases.poisoned(base),
        "every other": doubled[..., ::2],
        "expanded": base[:1].expand(shape),
    }
    for name, x in layouts.items():
        for dim in range(3):
            x = x.detach().requires_grad_()
            prob = adasplash2.entmax15(x, dim)
            assert prob.stride() == torch.empty_like(x).stride(), name
            assert_prob(prob.detach(), x.detach(), 1.5, dim)
            grad_prob = torch.randn(shape, dtype=dtype).mT.contiguous().mT
            assert_gradient_of(torch.autograd.grad(prob, x, grad_prob)[0], prob, grad_prob, 1.5, dim)
            (grad_of_sum,) = torch.autograd.grad(adasplash2.entmax15(x, dim).sum(), x)  # its gradient has strides 0
            assert grad_of_sum.abs().max() <= 32 * torch.finfo(dtype).eps


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.integers(1, 21), min_size=1, max_size=4),
    order=st.randoms(use_true_random=False),
    dim=st.integers(0, 3),
    step=st.integers(1, 2),
    dtype=st.sampled_from(cases.DTYPES),
    alpha=st.one_of(st.sampled_from([1.5, 2.0]), st.floats(1.05, 1.95)),
    scale=st.sampled_from([0.0, 0.1, 1.0, 8.0]),
)
def test_any_shape_and_stride(shape, order, dim, step, dtype, alpha, scale):
    dim %= len(shape)
    permutation = list(range(len(shape)))
    order.shuffle(permutation)
    x = scores(tuple(step * shape[d] for d in permutation), dtype, scale)
    x = x[tuple(slice(None, None, step) for _ in shape)].permute(sorted(range(len(shape)), key=permutation.__getitem__))
    assert list(x.shape) == shape
    x = x.detach().requires_grad_()
    prob = adasplash2.entmax(x, alpha, dim)
    assert_prob(prob.detach(), x.detach(), alpha, dim)
    grad_prob = torch.randn_like(prob)
    assert_gradient_of(torch.autograd.grad(prob, x, grad_prob)[0], prob, grad_prob, alpha, dim)


# ---------------------------------------------------------------------------------------------- tensor alpha


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("shape", [(6, 40, 20), (3, 300, 17)])
def test_alpha_by_slice(dim, shape, isa):
    x = torch.randn(shape) * 2.0
    for alpha_shape in ((), (1,), (shape[0], 1, 1), (shape[1], 1), (1, 1, shape[2]), shape):
        alpha_shape = list(alpha_shape)
        if len(alpha_shape) >= 3 - dim:
            alpha_shape[dim - 3] = 1
        alpha = torch.tensor([1.5, 2.0, 1.3, 1.9])[torch.randint(4, alpha_shape)]
        prob = adasplash2.entmax(x, alpha, dim)
        everywhere = alpha.expand(shape)
        for number in (1.5, 2.0, 1.3, 1.9):
            at = everywhere == number
            torch.testing.assert_close(
                prob[at], adasplash2.entmax(x, torch.tensor(number).item(), dim)[at], rtol=0.0, atol=1e-6
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("length", [30, 400])
def test_gradient_by_alpha(dtype, dim, length, isa):
    x = scores((24, length), dtype, 2.0)
    x = x if dim == 1 else x.T.contiguous()
    values = torch.linspace(1.1, 2.0, 24)  # 2.0 too: the gradient of x there comes from the same pass
    values = values[:, None] if dim == 1 else values[None, :]
    grad_prob = torch.randn(x.shape, dtype=dtype)

    def gradients(entmax, x, dtype):
        leaf = x.to(dtype, copy=True).requires_grad_()
        alpha = values.to(compute_dtype(dtype), copy=True).requires_grad_()
        return torch.autograd.grad(entmax(leaf, alpha, dim), (leaf, alpha), grad_prob.to(dtype))

    ours, same = gradients(adasplash2.entmax, x, dtype), gradients(reference.entmax, x, dtype)
    oracle = gradients(reference.entmax, x, torch.float64)
    moved = gradients(reference.entmax, perturbed(x.double(), dtype), torch.float64)
    assert ours[1].dtype == torch.float32 and ours[1].shape == values.shape
    # Differences of sums of the size of 1, divided by (alpha - 1)^2 = 1 / 100: they may lose that much.
    floor = 100.0 * relative_floor(torch.float32, 1.1, length)
    assert_within_rule("grad alpha", ours[1], same[1], oracle[1], moved[1], floor * oracle[1])
    only_alpha = values.clone().requires_grad_()
    (grad_alpha,) = torch.autograd.grad(adasplash2.entmax(x, only_alpha, dim), only_alpha, grad_prob)
    torch.testing.assert_close(grad_alpha, ours[1], rtol=0.0, atol=0.0)


def test_gradient_by_one_alpha_is_a_sum():
    x, grad_prob = torch.randn(5, 7, 9), torch.randn(5, 7, 9)
    shared, by_slice = torch.tensor(1.4, requires_grad=True), torch.full((5, 1, 9), 1.4, requires_grad=True)
    (grad_shared,) = torch.autograd.grad(adasplash2.entmax(x, shared, 1), shared, grad_prob)
    (grad_by_slice,) = torch.autograd.grad(adasplash2.entmax(x, by_slice, 1), by_slice, grad_prob)
    torch.testing.assert_close(grad_shared, grad_by_slice.sum())


@pytest.mark.parametrize("shape", [(3, 7, 4), (2, 140)])
def test_gradcheck(shape, isa):
    check = functools.partial(torch.autograd.gradcheck, fast_mode=shape[-1] > 100)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    for dim in range(len(shape)):
        for alpha in (1.0, *cases.ALPHAS):
            assert check(lambda x, alpha=alpha, dim=dim: adasplash2.entmax(x, alpha, dim), x)
        alpha_shape = [1 if d == dim else n for d, n in enumerate(shape)]
        alpha = (1.1 + 0.8 * torch.rand(alpha_shape, dtype=torch.float64)).requires_grad_()
        assert check(lambda x, alpha, dim=dim: adasplash2.entmax(x, alpha, dim), (x, alpha))


# ---------------------------------------------------------------------------------------------- torch


def test_bitwise_repeatable_for_any_number_of_threads():
    before = torch.get_num_threads()
    for shape, dim in (((300, 1000), -1), ((1000, 300), 0), ((5000, 40), -1)):
        x = torch.randn(shape, requires_grad=True)
        alpha = torch.tensor(1.3, requires_grad=True)
        grad_prob = torch.randn(shape)
        results = []
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            prob = adasplash2.entmax(x, alpha, dim)
            results.append((prob, *torch.autograd.grad(prob, (x, alpha), grad_prob)))
        torch.set_num_threads(before)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_opcheck():
    x = torch.randn(4, 6, 5, requires_grad=True)
    alpha = torch.full((4, 1, 5), 1.4, requires_grad=True)
    ops = torch.ops.adasplash2
    torch.library.opcheck(ops.entmax_forward, (x, 1.5, None, -1))
    torch.library.opcheck(ops.entmax_forward, (x.mT, 0.0, alpha.mT, 2))
    prob = torch.softmax(x.detach(), 1)
    torch.library.opcheck(ops.entmax_backward, (torch.randn(4, 6, 5), prob, 1.5, None, 1, [True, False]))
    torch.library.opcheck(ops.entmax_backward, (torch.randn(4, 6, 5), prob, 0.0, alpha.detach(), 1, [True, True]))


def test_compile():
    def loss(x, alpha, weight):
        prob = adasplash2.entmax(x * 2.0, alpha, 1) + adasplash2.sparsemax(x, 0) + adasplash2.entmax15(x.mT, -1).mT
        return (prob * weight).sum() + adasplash2.entmax(x, 1.0).square().sum()

    x, alpha = torch.randn(6, 40, requires_grad=True), torch.tensor(1.4, requires_grad=True)
    weight = torch.randn(6, 40)
    eager = torch.autograd.grad(loss(x, alpha, weight), (x, alpha))
    compiled = torch.autograd.grad(torch.compile(loss, fullgraph=True)(x, alpha, weight), (x, alpha))
    torch.testing.assert_close(compiled, eager)


def test_modes():
    x = torch.randn(4, 50)
    with torch.inference_mode():
        assert_prob(adasplash2.entmax15(x), x, 1.5, -1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert adasplash2.entmax15(x).dtype == torch.float32  # computes in float32 whatever comes in: nothing to cast
    assert adasplash2.entmax15(x.to("meta")).shape == x.shape
    assert not adasplash2.entmax15(x).requires_grad


def test_double_backward_is_refused():
    x = torch.randn(4, 5, requires_grad=True)
    (grad_x,) = torch.autograd.grad(adasplash2.entmax15(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="adasplash2::entmax_backward"):
        grad_x.sum().backward()


@pytest.mark.parametrize("alpha", [1.5, torch.tensor(1.5)])
def test_functional_transforms(alpha):
    x = torch.randn(4, 5)

    def entmax(x):
        return adasplash2.entmax(x, alpha)

    calls = {
        "grad": lambda: torch.func.grad(lambda x: entmax(x).square().sum())(x),
        "vjp": lambda: torch.func.vjp(entmax, x)[1](x),
        "jacrev": lambda: torch.func.jacrev(entmax)(x),
        "vmap": lambda: torch.func.vmap(entmax)(x),
        "jvp": lambda: torch.func.jvp(entmax, (x,), (x,)),
    }
    for call in calls.values():
        with pytest.raises(NotImplementedError, match=r"adasplash2\.entmax: functional transforms"):
            call()
    torch.func.grad(lambda x: adasplash2.entmax(x, 1.0).square().sum())(x)  # torch's softmax


def test_forward_mode():
    """Refused, also where nothing but the tangents would have been lost."""
    x, alpha = torch.randn(4, 5), torch.tensor(1.4)
    with torch.autograd.forward_ad.dual_level():
        for arguments in (
            (torch.autograd.forward_ad.make_dual(x, x), 2.0),
            (x, torch.autograd.forward_ad.make_dual(alpha, alpha)),
        ):
            with pytest.raises(NotImplementedError, match=r"adasplash2\.entmax: forward-mode"):
                adasplash2.entmax(*arguments)


@pytest.mark.parametrize("alpha", [0.99, 2.01, -1.0, NAN])
def test_alpha_out_of_range(alpha):
    with pytest.raises(ValueError, match=rf"alpha must be in \[1, 2\], got {alpha}"):
        adasplash2.entmax(torch.randn(3), alpha)
    with pytest.raises(ValueError, match=r"tensor alpha must hold values in \(1, 2\], got"):
        adasplash2.entmax(torch.randn(3, 4), torch.tensor([[1.5], [alpha], [1.2]]))


def test_errors():
    x = torch.randn(3, 4)
    with pytest.raises(TypeError, match=r"x must be a floating point tensor, got torch\.int64"):
        adasplash2.entmax(torch.arange(3))
    with pytest.raises(TypeError, match="x must be a floating point tensor, got list"):
        adasplash2.entmax([1.0, 2.0])
    with pytest.raises(TypeError, match="alpha must be floating point, got Long"):
        adasplash2.entmax(x, torch.tensor(2))
    with pytest.raises(ValueError, match=r"alpha must broadcast to \[3, 1\] \(x with size 1 at dim\), got \[3, 4\]"):
        adasplash2.entmax(x, torch.full((3, 4), 1.5))
    with pytest.raises(IndexError, match="got 2"):
        adasplash2.entmax15(x, 2)


def test_set_isa_matters():
    """The levels are different code: wide vectors add in another order, which shows in the last bit somewhere."""
    if len(_C.isa_levels()) < 2:
        pytest.skip("one instruction set only")
    x, before, results = torch.randn(200, 1000), _C.isa(), []
    for level in _C.isa_levels():
        _C.set_isa(level)
        results.append(adasplash2.entmax15(x))
    _C.set_isa(before)
    assert any(not torch.equal(results[0], other) for other in results[1:])
