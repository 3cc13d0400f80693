"""The kernels of both CUDA paths end to end, forward and backward, held to the rule of tolerance.py.

They run in the emulator with every memory access checked, or on a GPU where there is one; the code is the same.
"""

from __future__ import annotations

import functools
import itertools
import math

import cases
import pytest
import torch
from cases import Shape
from kernels import library
from simt.emulator import SEEDS
from tolerance import Result, assert_result, check, expect
from torch import Tensor

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
INSTANCE_CASES = {
    "sm80": cases.instance_cases((BF16, FP16, FP32), (64, 128, 256), (None, "bool", "float"), num_cases=54),
    "sm90": cases.instance_cases((BF16, FP16), (64, 128), (None,), num_cases=36),
}

pytestmark = pytest.mark.usefixtures("cuda_path")
only_sm80 = pytest.mark.parametrize("cuda_path", ["sm80"], indirect=True)
every_dtype = pytest.mark.parametrize(
    "cuda_path, dtype",
    [
        (path, dtype)
        for path in library.covered_paths()
        for dtype in (BF16, FP16, FP32)
        if (path, dtype) != ("sm90", FP32)
    ],
    indirect=["cuda_path"],
)


def check_case(name: str, shape: Shape, dtype: torch.dtype = BF16, seed: int = 0, **options: object) -> None:
    """Forward and backward on a named input; the schedule's seed is the input's."""
    query, key, value, grad_out = cases.inputs(name, shape, dtype, seed)
    for tensor in (query, key, value):
        tensor.requires_grad_()
    attention = functools.partial(library.attention, seed=SEEDS[seed % len(SEEDS)])
    check(attention, query, key, value, grad_out, enable_gqa=shape.kv_heads is not None, **options)


def test_every_instance_has_a_case(cuda_path):
    """dtype x head dim of the kernel x kind of alpha x whether there is a mask."""
    num_instances = {"sm80": 3 * 3 * 3 * 2, "sm90": 2 * 2 * 3 * 1}[cuda_path]
    assert len({case.instance for case in INSTANCE_CASES[cuda_path]}) == num_instances


@pytest.mark.parametrize(
    "cuda_path, case",
    [
        pytest.param(path, case, id=f"{path}-{case}")
        for path in library.covered_paths()
        for case in INSTANCE_CASES[path]
    ],
    indirect=["cuda_path"],
)
def test_instances(case):
    """Where rows have one key, dS is rounding alone: test_support_of_one_key bounds it."""
    query, key, value, grad_out = cases.inputs(case.name, case.shape, case.dtype, case.seed)
    num_queries, num_keys, generator = case.num_queries, case.num_keys, torch.Generator().manual_seed(case.seed)
    options = {"is_causal": case.is_causal, "alpha": case.alpha}
    if case.alpha == "per head":
        options["alpha"] = torch.linspace(1.2, 2.0, case.heads[0], dtype=torch.float64).requires_grad_()
    if case.mask is not None:
        is_seen = torch.rand(num_queries, num_keys, generator=generator) < 0.7
        is_seen[: num_queries // 8] = False  # rows without keys
        bias = torch.randn(num_queries, num_keys, generator=generator).to(case.dtype).masked_fill(~is_seen, -torch.inf)
        options["attn_mask"] = is_seen if case.mask == "bool" else bias.requires_grad_()
    length = num_keys * 2 // 3 if case.is_padded else num_keys
    if case.is_padded:
        options["key_lengths"] = torch.tensor([length])

    def attention(query: Tensor, key: Tensor, value: Tensor, **options: object) -> object:
        is_padding = (torch.arange(num_keys) >= length)[:, None]
        key, value = (t.masked_fill(is_padding, torch.nan) for t in (key, value))
        query = query.masked_fill(is_padding, torch.nan) if num_queries == num_keys else query
        return library.attention(query, key, value, seed=SEEDS[case.seed], **options)

    has_gradients = num_keys > 1 and case.name != "one_hot" and (case.name, case.alpha) != ("border", 2.0)
    leaves = [t.requires_grad_(has_gradients) for t in (query, key, value)]
    check(attention, *leaves, grad_out if has_gradients else None, enable_gqa=True, **options)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_queries, num_keys", [(1, 257), (257, 2), (130, 127)])
def test_as_many_queries_as_keys_is_not_needed(num_queries, num_keys, is_causal):
    check_case("gaussian", Shape(1, 1, num_queries, num_keys), seed=num_keys, is_causal=is_causal)


@pytest.mark.parametrize("seed", range(len(SEEDS)))
@pytest.mark.parametrize("name", sorted(cases.MAKERS.keys() - {"one_hot"}))
def test_named_inputs(name, seed):
    check_case(name, Shape(1, 1, 130, 150), seed=seed, is_causal=seed % 2 == 1)


@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("name, shape", [("one_hot", Shape(1, 1, 130, 150)), ("gaussian", Shape(1, 1, 257, 1))])
def test_support_of_one_key(name, shape, dtype):
    """dS = dP - delta, where the two are one dot product summed in two orders: at most 2 Dv 2^-24 |dO| |v| remains."""
    query, key, value, grad_out = cases.inputs(name, shape, dtype, seed=1)
    tensors = [t.requires_grad_() for t in (query, key, value)]
    out, aux = library.attention(*tensors, seed=1, return_aux=True)
    best = (query.double() @ key.double().mT).argmax(-1)
    assert torch.equal(out, value.detach()[:, :, best[0, 0]]) and (aux.support_size == 1).all()
    grad_query, grad_key, grad_value = torch.autograd.grad(out, tensors, grad_out)
    remainder = 2 * value.shape[-1] * 2**-24 * grad_out.norm(dim=-1).max() * value.norm(dim=-1).max()
    assert grad_query.abs().max() <= remainder * key.norm(dim=-1).max() * key.shape[-1] ** -0.5
    assert grad_key.abs().max() <= remainder * query.norm(dim=2).max() * key.shape[-1] ** -0.5
    expected = torch.zeros_like(value, dtype=torch.float64)
    expected.index_add_(2, best[0, 0], grad_out.double())
    torch.testing.assert_close(grad_value.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


@only_sm80
@pytest.mark.parametrize("name", sorted(cases.MAKERS.keys() - {"one_hot", "denormal"}))
def test_float32(name):
    """Held to the rule of float32, to which sums of three bfloat16 must be as good as float32 itself. (Denormal numbers
    have bits below those of the smallest bfloat16.)"""
    check_case(name, Shape(1, 2, 130, 150), FP32, seed=1, is_causal=name in ("gaussian", "dense"))


@only_sm80
@pytest.mark.parametrize("head_dim", [128, 256])
def test_long_sums_of_float32(head_dim):
    """The tensor cores round towards zero: what a running sum loses so is the same for all keys, and more than the
    differences that decide here can bear."""
    check_case("border", Shape(1, 1, 257, 300, head_dim), FP32)


@only_sm80
def test_dense_rows_of_float32():
    """The scan's bound lies further from tau where rows leave the histogram. An exact quadratic step from there would
    pass tau, as keys leave the support on the way."""
    query, key, value, grad_out = cases.inputs("gaussian", Shape(1, 1, 40, 1200), FP32, seed=3)
    check(library.attention, *(t.requires_grad_() for t in (0.02 * query, key, value)), grad_out)


@only_sm80
@pytest.mark.parametrize("alpha", [2.0, 1.25, 1.1, 1.75])
@pytest.mark.parametrize("name", ["gaussian", "dense"])
def test_alphas_of_float32(name, alpha):
    check_case(name, Shape(1, 1, 100, 150), FP32, seed=2, alpha=alpha)


@only_sm80
@pytest.mark.parametrize("head_dim", [64, 256])
def test_options_of_float32(head_dim):
    shape, lengths = Shape(2, 2, 90, 90, head_dim), torch.tensor([90, 33])
    mask = torch.randn(2, 1, 90, 90).masked_fill(torch.rand(90, 90) < 0.3, -torch.inf).requires_grad_()
    alpha = torch.tensor([1.4, 1.8], dtype=torch.float64, requires_grad=True)
    check_case("gaussian", shape, FP32, seed=1, scale=-0.2, key_lengths=lengths, attn_mask=mask, alpha=alpha)
    check_case("gaussian", shape, FP32, seed=2, attn_mask=mask.detach() > 0)


@pytest.mark.parametrize("alpha", [2.0, 1.25, 1.1, 1.75])
@pytest.mark.parametrize("name", ["gaussian", "dense", "rising"])
def test_alphas(name, alpha):
    check_case(name, Shape(1, 1, 100, 150), seed=2, alpha=alpha)


def test_alpha_of_each_head():
    alpha = torch.tensor([[1.5, 1.2], [2.0, 1.3]], dtype=torch.float64)
    check_case("gaussian", Shape(2, 2, 70, 90), seed=1, alpha=alpha)
    check_case("gaussian", Shape(2, 2, 70, 90), seed=2, alpha=alpha[:, :1])


@only_sm80
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("alphas", [[1.5], [1.25, 1.9], [[1.1, 1.6], [1.4, 2.0]]])
def test_gradient_of_alpha(alphas, head_dim):
    """A number for all, one of each head, one of each head and sequence; with rows that are masked or that are NaN."""
    shape = Shape(2, 2, 70, 90, head_dim)
    alpha = torch.tensor(alphas, dtype=torch.float64, requires_grad=True)
    check_case("gaussian", shape, seed=2, alpha=alpha, is_causal=True)
    mask = torch.randn(1, 1, 70, 90).masked_fill(torch.rand(70, 90) < 0.3, -torch.inf).to(BF16)
    check_case("gaussian", shape, seed=3, alpha=alpha, attn_mask=mask, key_lengths=torch.tensor([90, 40]))
    query, key, value, grad_out = cases.inputs("sparse", shape, BF16)
    (clean,) = torch.autograd.grad(
        library.attention(query[:, :, 1:], key, value, alpha=alpha), alpha, grad_out[:, :, 1:]
    )
    query[:, :, 0], grad_out[:, :, 0] = torch.nan, torch.nan
    runs = [library.attention(query, key, value, alpha=alpha, seed=seed) for seed in SEEDS]
    grads = [torch.autograd.grad(out, alpha, grad_out)[0] for out in runs]
    assert all(torch.equal(grad, grads[0]) for grad in grads)
    torch.testing.assert_close(grads[0], clean)


@pytest.mark.parametrize("head_dim, kv_heads", [(64, 4), (128, 1)])
def test_grouped_heads(head_dim, kv_heads):
    check_case("gaussian", Shape(2, 8, 65, 70, head_dim, kv_heads), seed=4, is_causal=True)


def test_batches_and_scale():
    check_case("gaussian", Shape(3, 2, 70, 65), seed=1, scale=0.31)


@only_sm80
@pytest.mark.parametrize("scale", [-0.2, -3.0, 0.0, 1e-40])
@pytest.mark.parametrize("head_dim", [64, 256])
def test_scales_that_are_not_positive(scale, head_dim):
    """A negative scale prefers the least similar keys; with none all keys count alike."""
    check_case("gaussian", Shape(1, 1, 70, 130, head_dim), seed=2, scale=scale, is_causal=head_dim == 256)


@only_sm80
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("mask_shape", [(2, 4, 70, 150), (70, 150), (2, 1, 1, 150), (4, 70, 1), (2, 1, 70, 1)])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_attn_mask(kind, mask_shape, head_dim):
    """Masks that broadcast in every dimension, with masked keys, masked tiles and a row whose keys are all masked."""
    shape = Shape(2, 4, 70, 150, head_dim, kv_heads=2)
    generator = torch.Generator().manual_seed(len(mask_shape))
    mask = torch.randn(mask_shape, generator=generator).to(BF16)
    is_seen = torch.rand(mask_shape, generator=generator) < 0.7
    is_seen[..., :1, :] = False
    if mask_shape[-1] > 1:
        is_seen[..., 64:128] = False
    check_case(
        "gaussian", shape, seed=3, attn_mask=is_seen if kind == "bool" else mask.masked_fill(~is_seen, -torch.inf)
    )


@only_sm80
@pytest.mark.parametrize(
    "mask_shape, dtype, head_dim",
    [
        *itertools.product(
            [(2, 4, 70, 150), (70, 150), (2, 1, 1, 150), (150,), (4, 70, 1), (2, 1, 70, 150)], [BF16], [64]
        ),
        # Other instances: nothing is shared, everything is, and one or the other.
        *itertools.product([(2, 4, 70, 150), (150,), (2, 1, 1, 150)], [FP32], [128]),
        *itertools.product([(2, 4, 70, 150), (4, 70, 1)], [BF16, FP32], [256]),
    ],
)
def test_gradient_of_attn_mask(mask_shape, dtype, head_dim):
    """Broadcast in every dimension; with masked keys, a masked tile, a row without keys, lengths, an alpha a head."""
    shape = Shape(2, 4, 70, 150, head_dim, kv_heads=2)
    mask = torch.randn(mask_shape).to(dtype)
    mask[..., torch.rand(mask_shape[-1]) < 0.2] = -torch.inf
    if mask_shape[-1] > 1:
        mask[..., 64:128] = -torch.inf
    if mask_shape[-2:-1] == (70,):
        mask[..., :1, :] = -torch.inf
    lengths = torch.tensor([150, 40]) if head_dim == 64 else None
    alpha = torch.tensor([1.5, 1.3, 2.0, 1.7], dtype=torch.float64) if head_dim == 64 else 1.5
    check_case("gaussian", shape, dtype, seed=3, attn_mask=mask.requires_grad_(), key_lengths=lengths, alpha=alpha)


@only_sm80
@pytest.mark.parametrize("mask_shape", [(1, 130, 200), (2, 1, 1, 200)])
def test_gradient_of_attn_mask_is_deterministic(mask_shape):
    """What shares an element is added up in one order, whatever the schedule; a row that is NaN adds nothing."""
    query, key, value, grad_out = cases.inputs("gaussian", Shape(2, 3, 130, 200), BF16)
    query[:, :, 7], grad_out[:, :, 7] = torch.nan, torch.nan
    mask = torch.randn(mask_shape).to(BF16).requires_grad_()
    runs = [library.attention(query, key, value, attn_mask=mask, seed=seed) for seed in SEEDS]
    grads = [torch.autograd.grad(out, mask, grad_out)[0] for out in runs]
    assert grads[0].isfinite().all() and all(torch.equal(grad, grads[0]) for grad in grads)
    rows = torch.arange(130) != 7
    clean_mask = mask.detach()[..., rows, :] if mask.shape[-2] > 1 else mask.detach()
    clean_mask.requires_grad_()
    result = check(library.attention, query[:, :, rows], key, value, grad_out[:, :, rows], attn_mask=clean_mask)
    clean = result.grads["attn_mask"]
    torch.testing.assert_close(grads[0][..., rows, :] if mask.shape[-2] > 1 else grads[0], clean)
    if mask.shape[-2] > 1:
        assert not grads[0][:, 7].any()


@only_sm80
def test_attn_mask_of_any_strides():
    query, key, value, grad_out = cases.inputs("gaussian", Shape(1, 2, 70, 90), BF16)
    mask = torch.randn(1, 2, 70, 90).to(BF16)
    tensors = [t.requires_grad_() for t in (query, key, value)]
    for layout in ("slice", "transposed", "strided"):
        check(library.attention, *tensors, grad_out, attn_mask=cases.poisoned(mask, layout), scale=-0.3)
    odd = torch.randn(1, 2, 70, 91).to(BF16)  # a lane's two neighbours are no aligned pair
    for rows in (odd[..., :90], odd[..., 1:], (odd > 0)[..., :90], (odd > 0)[..., 1:], (odd > 0).mT[..., 1:, :].mT):
        check(library.attention, *tensors, grad_out, attn_mask=rows)


@only_sm80
@pytest.mark.parametrize("lengths", [torch.tensor([0, 65]), torch.tensor([90, 30])])
def test_attn_mask_with_lengths_and_large_values(lengths):
    """What models add for masked keys, finite but far below any score, beside lengths; and one mask of zeros."""
    shape = Shape(2, 1, 90, 90)
    mask = torch.where(torch.rand(2, 1, 90, 90) < 0.5, torch.finfo(BF16).min, 0.0).to(BF16)
    mask[0, 0, 5:] = 0.0
    check_case("gaussian", shape, attn_mask=mask, key_lengths=lengths)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_queries", [130, 100])
def test_lengths_of_sequences(num_queries, is_causal):
    """Keys past the length take no part, NaN or not; with as many queries as keys, neither do query rows."""
    lengths = torch.tensor([0, 1, 64, 97, 130, 200])
    shape = Shape(len(lengths), 1, num_queries, 130)
    query, key, value, grad_out = cases.inputs("gaussian", shape, BF16)
    for batch, length in enumerate(lengths):
        key[batch, :, length:], value[batch, :, length:] = torch.nan, torch.nan
        if num_queries == 130:
            query[batch, :, length:] = torch.nan
    attention = functools.partial(library.attention, seed=2, key_lengths=lengths, is_causal=is_causal)
    run = attention(query, key, value)
    clean = [t.nan_to_num().requires_grad_() for t in (query, key, value)]
    result = check(library.attention, *clean, grad_out, key_lengths=lengths, is_causal=is_causal)
    assert torch.equal(run, result.out)
    for batch, length in enumerate(lengths):
        assert not result.grads["key"][batch, :, length:].any() and not result.grads["value"][batch, :, length:].any()
        if length == 0:
            assert not result.out[batch].any() and result.aux.tau[batch].isposinf().all()


@pytest.mark.parametrize("head_dim", [64, 128])
def test_padding_never_reaches_gradients(head_dim):
    """Rows past the lengths, of queries, keys, values and of the gradient of out, hold NaN: the same bits come out."""
    lengths = torch.tensor([0, 1, 64, 97, 130])
    tensors = cases.inputs("gaussian", Shape(len(lengths), 2, 130, 130, head_dim, kv_heads=1), BF16)
    padded = [t.clone() for t in tensors]
    for batch, length in enumerate(lengths):
        for tensor in padded:
            tensor[batch, :, length:] = torch.nan
    results = []
    for *inputs, grad_out in (tensors, padded):
        inputs, grad_out = [t.to(library.device()) for t in inputs], grad_out.to(library.device())
        run = library.forward(library.build(), *inputs, key_lengths=lengths.to(library.device()))
        results.append(library.backward(library.build(), run, grad_out))
    for name in ("query", "key", "value"):
        clean, ours = (getattr(result, name) for result in results)
        assert clean.isfinite().all() and torch.equal(ours, clean)


@pytest.mark.parametrize("head_dim", [40, 128])
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("name", ["gaussian", "dense", "border", "one_hot", "tied"])
def test_out_alone(name, dtype, head_dim):
    """What inference asks for: neither gap_mean_v nor support_size. tau may then be as rough as out allows."""
    query, key, value, _ = cases.inputs(name, Shape(1, 2, 130, 150, head_dim), dtype, seed=4)
    inputs = [tensor.to(library.device()) for tensor in (query, key, value)]
    run = library.forward(library.build(), *inputs, is_causal=True, out_alone=True)
    assert run.gap_mean_v.isnan().all()
    expected = expect(query, key, value, is_causal=True)
    assert_result(Result(run.out.cpu(), expected.oracle.aux._replace(tau=expected.oracle.aux.tau.float())), expected)
    inputs[0][0, 1, 7, 3] = math.nan
    with_nan = library.forward(library.build(), *inputs, is_causal=True, out_alone=True).out
    is_bad = torch.arange(130, device=library.device()) == 7
    assert with_nan[0, 1, 7].isnan().all() and torch.equal(with_nan[0, 0], run.out[0, 0])
    assert torch.equal(with_nan[0, 1, ~is_bad], run.out[0, 1, ~is_bad])


@only_sm80
def test_no_keys_and_no_queries():
    query, key, value, _ = cases.inputs("gaussian", Shape(1, 2, 70, 64), BF16)
    query, key, value = (t.to(library.device()) for t in (query, key, value))
    run = library.forward(library.build(), query, key[:, :, :0], value[:, :, :0])
    assert not run.out.any() and run.tau.isposinf().all() and not run.support_size.any()
    grads = library.backward(library.build(), run, torch.ones_like(run.out))
    assert not grads.query.any() and grads.key.numel() == 0
    run = library.forward(library.build(), query[:, :, :0], key, value)
    assert run.out.shape == (1, 2, 0, 64)
    grads = library.backward(library.build(), run, torch.ones_like(run.out))
    assert grads.query.numel() == 0 and (grads.key == 0).all() and (grads.value == 0).all()


@pytest.mark.parametrize("wanted", ["query", "key", "value"])
def test_gradients_that_are_not_wanted(wanted):
    query, key, value, grad_out = (t.to(library.device()) for t in cases.inputs("gaussian", Shape(1, 1, 70, 90), BF16))
    run = library.forward(library.build(), query, key, value)
    every, one = (
        library.backward(library.build(), run, grad_out),
        library.backward(library.build(), run, grad_out, wanted=(wanted,)),
    )
    assert torch.equal(getattr(one, wanted), getattr(every, wanted))
    for other in {"query", "key", "value"} - {wanted}:
        assert getattr(one, other).isnan().all(), "written though not wanted"


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bad_query_row_poisons_itself_alone(bad):
    query, key, value, _ = cases.inputs("gaussian", Shape(1, 1, 130, 100), BF16)
    clean = library.attention(query, key, value)
    query[0, 0, 37, 5] = bad
    out, aux = library.attention(query, key, value, return_aux=True)
    is_bad = torch.zeros(130, dtype=torch.bool)
    is_bad[37] = True
    assert out[0, 0, is_bad].isnan().all() and aux.tau[0, 0, is_bad].isnan().all()
    assert torch.equal(out[0, 0, ~is_bad], clean[0, 0, ~is_bad])


@pytest.mark.parametrize("head_dim", [64, 128])
def test_gradients_of_a_bad_query_row(head_dim):
    """Its own gradient is NaN. Those of keys are as if it were not there, though what comes back to it is NaN too."""
    query, key, value, grad_out = cases.inputs("gaussian", Shape(1, 1, 130, 100, head_dim), BF16)
    rows = [row for row in range(130) if row != 37]
    tensors = [t.clone().requires_grad_() for t in (query[:, :, rows], key, value)]
    expected = torch.autograd.grad(library.attention(*tensors), tensors, grad_out[:, :, rows])
    query[0, 0, 37, 5], grad_out[0, 0, 37] = torch.nan, torch.nan
    tensors = [t.requires_grad_() for t in (query, key, value)]
    grad_query, *others = torch.autograd.grad(library.attention(*tensors), tensors, grad_out)
    assert grad_query[0, 0, 37].isnan().all()
    for ours, same in zip((grad_query[:, :, rows], *others), expected, strict=True):
        torch.testing.assert_close(ours, same, rtol=2**-7, atol=2**-7)


@only_sm80
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 3.4e38])
def test_bad_rows_of_float32(bad):
    """What no bfloat16 can be the high part of counts as NaN."""
    query, key, value, _ = cases.inputs("gaussian", Shape(1, 1, 130, 100), FP32)
    clean = library.attention(query, key, value)
    query[0, 0, 37, 5] = bad
    out, aux = library.attention(query, key, value, return_aux=True)
    is_bad = torch.arange(130) == 37
    assert out[0, 0, is_bad].isnan().all() and aux.tau[0, 0, is_bad].isnan().all()
    assert torch.equal(out[0, 0, ~is_bad], clean[0, 0, ~is_bad])


@every_dtype
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_bad_key_gradients(bad, head_dim, dtype):
    """Rows for which the key scores NaN or +inf are NaN and count for nothing; to the others it is as if it were not
    there, in out, tau and gradients. But for those rows whose block has a live tile with the key its column of their
    gradient may be NaN, as products take whole tiles."""
    num, bad_key, column, block = 150, 70, 5, 64
    query, key, value, grad_out = cases.inputs("gaussian", Shape(1, 1, num, num, head_dim), dtype)
    key[0, 0, bad_key, column] = bad
    leaves = [t.requires_grad_() for t in (query, key, value)]
    out, aux = library.attention(*leaves, is_causal=True, return_aux=True)
    grads = dict(zip(("query", "key", "value"), torch.autograd.grad(out, leaves, grad_out), strict=True))
    takes_no_part = query.detach()[0, 0, :, column] * bad == -math.inf if dtype != FP32 else torch.zeros(num).bool()
    is_bad = (torch.arange(num) >= bad_key) & ~takes_no_part
    assert is_bad.any()
    for rows in (out, aux.tau[..., None], grads["query"]):
        assert rows[:, :, is_bad].isnan().all() and not rows[:, :, ~is_bad].isnan().all(-1).any()

    mask = torch.ones(num, num, dtype=torch.bool).tril()
    mask[:, bad_key] = False
    finite_key = key.detach().masked_fill(~key.isfinite(), 0.0)
    without = [t.detach().requires_grad_() for t in (query[:, :, ~is_bad], finite_key, value)]
    expected = expect(*without, grad_out[:, :, ~is_bad], attn_mask=mask[~is_bad])
    grads["query"] = grads["query"][:, :, ~is_bad]
    spoiled = (slice(None), slice(None), slice(block, None), column)  # the first block sees no key of the tile
    grads["query"][spoiled] = expected.oracle.grads["query"][spoiled].to(dtype)
    aux = aux._replace(tau=aux.tau[:, :, ~is_bad])
    assert_result(Result(out[:, :, ~is_bad], aux, grads), expected)


def out_and_gradients(query: Tensor, key: Tensor, value: Tensor, grad_out: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    out = library.attention(*leaves, is_causal=True)
    return out.detach(), *torch.autograd.grad(out, leaves, grad_out)


@every_dtype
def test_nan_in_a_value(dtype):
    """May reach rows that do not attend to it, but none whose block of 64 has no live tile with it, and of out its
    column alone. It never reaches probabilities."""
    query, key, value, grad_out = cases.inputs("gaussian", Shape(1, 1, 150, 150), dtype)
    clean = out_and_gradients(query, key, value, grad_out)
    value[0, 0, 70, 5] = torch.nan
    ours = out_and_gradients(query, key, value, grad_out)
    other_columns = torch.arange(64) != 5
    assert ours[0][0, 0, 70:, 5].isnan().any()
    assert torch.equal(ours[0][..., other_columns], clean[0][..., other_columns])
    for i in (0, 1):  # the first block sees no key of the tile
        assert torch.equal(ours[i][:, :, :64], clean[i][:, :, :64])
    assert torch.equal(ours[3], clean[3])


@every_dtype
def test_nan_in_the_gradient_of_out(dtype):
    """May reach keys that its row does not attend to, but none whose tile is dead for its block of 64."""
    query, key, value, grad_out = cases.inputs("gaussian", Shape(1, 1, 150, 150), dtype)
    clean = out_and_gradients(query, key, value, grad_out)
    grad_out[0, 0, 70, 5] = torch.nan
    ours = out_and_gradients(query, key, value, grad_out)
    other_rows, other_columns = torch.arange(150) != 70, torch.arange(64) != 5
    assert ours[1][0, 0, 70].isnan().all() and ours[2][0, 0, :71].isnan().any() and ours[3][0, 0, :71, 5].isnan().any()
    assert torch.equal(ours[1][:, :, other_rows], clean[1][:, :, other_rows])
    assert torch.equal(ours[3][..., other_columns], clean[3][..., other_columns])
    for i in (2, 3):  # the block of row 70 ends with row 127
        assert torch.equal(ours[i][:, :, 128:], clean[i][:, :, 128:])


@pytest.mark.parametrize("head_dim", [64, 128])
def test_rows_of_a_block_that_share_no_tiles(head_dim):
    """Rows 0-63 attend to the first and the last keys, rows 64-127 to those between: more tiles than a ring has stages
    pass by a consumer that has none of them."""
    generator = torch.Generator().manual_seed(0)

    def noise(*size: int) -> torch.Tensor:
        return torch.randn(1, 1, *size, generator=generator)

    query, key = 0.5 * noise(128, head_dim), 0.1 * noise(1300, head_dim)
    query[..., :64, 0] += 40
    query[..., 64:, 1] += 40
    key[..., :100, 0] += 1
    key[..., 1250:, 0] += 1
    key[..., 64:1270, 1] += 1
    tensors = [t.to(BF16).requires_grad_() for t in (query, key, noise(1300, head_dim))]
    check(library.attention, *tensors, noise(128, head_dim).to(BF16))
    mask = library.latest()[0].block_mask[0, 0]
    assert mask.any(0).all() and not mask[:4, 2:19].any()


@pytest.mark.parametrize("is_causal", [False, True])
def test_rows_of_larger_buffers(is_causal):
    """Heads inside of rows (B, N, H, D), as projections write them, with NaN all around."""
    query, key, value, grad_out = cases.inputs("gaussian", Shape(2, 2, 70, 90), BF16)

    def embedded(tensor: torch.Tensor) -> torch.Tensor:
        batch, heads, rows, dim = tensor.shape
        buffer = tensor.new_full((batch, rows + 2, heads + 1, dim + 8), torch.nan)
        view = buffer.transpose(1, 2)[:, :heads, 1 : rows + 1, :dim]
        view.copy_(tensor)
        return view

    strided = library.attention(*map(embedded, (query, key, value)), is_causal=is_causal)
    assert torch.equal(strided, library.attention(query, key, value, is_causal=is_causal))
    tensors = [embedded(t).detach().requires_grad_() for t in (query, key, value)]
    check(library.attention, *tensors, grad_out, is_causal=is_causal)


@pytest.mark.skipif(library.has_gpu(), reason="address space without memory is the host's")
@every_dtype
def test_offsets_beyond_two_to_the_31(dtype):
    """Rows, heads and sequences 2^31 elements apart and more: the same bits as of contiguous tensors."""
    tensors = cases.inputs("gaussian", Shape(2, 2, 20, 70, kv_heads=1), dtype)
    *near, near_grad_out = tensors
    *far, far_grad_out = (
        cases.far_apart(t, (2**31 * t.shape[2] * t.shape[1], 2**31 * t.shape[2], 2**31, 1)) for t in tensors
    )
    runs = [library.forward(library.build(), *inputs) for inputs in (near, far)]
    assert runs[1].path == library.path
    assert torch.equal(runs[1].out, runs[0].out) and torch.equal(runs[1].tau, runs[0].tau)
    grads = [
        library.backward(library.build(), run, grad_out)
        for run, grad_out in zip(runs, (near_grad_out, far_grad_out), strict=True)
    ]
    for name in ("query", "key", "value"):
        near_grad, far_grad = (getattr(grad, name) for grad in grads)
        assert near_grad.isfinite().all() and torch.equal(far_grad, near_grad)


@only_sm80
@pytest.mark.skipif(library.has_gpu(), reason="address space without memory is the host's")
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("columns_apart", [False, True])
def test_offsets_of_attn_mask_beyond_two_to_the_31(columns_apart, kind):
    query, key, value, grad_out = cases.inputs("gaussian", Shape(2, 2, 20, 70), BF16)
    mask = torch.randn(2, 2, 20, 70).to(BF16)
    mask = mask > 0 if kind == "bool" else mask
    strides = (2**37 + 8, 2**36, 2**31, 1)
    if columns_apart:
        mask, strides = mask[:, :, :1], (2**38 + 1, 2**38, 2**31, 2**31)
    far_mask = cases.far_apart(mask, strides).expand(2, 2, 20, 70)
    runs = [library.forward(library.build(), query, key, value, attn_mask=m) for m in (mask, far_mask)]
    assert torch.equal(runs[1].out, runs[0].out) and torch.equal(runs[1].tau, runs[0].tau)
    grads = [library.backward(library.build(), run, grad_out) for run in runs]
    for name in ("query", "key", "value"):
        near_grad, far_grad = (getattr(grad, name) for grad in grads)
        assert near_grad.isfinite().all() and torch.equal(far_grad, near_grad)


@pytest.mark.parametrize("head_dim", [64, 128])
def test_same_bits_under_every_schedule(head_dim):
    query, key, value, grad_out = (
        t.to(library.device()) for t in cases.inputs("gaussian", Shape(1, 2, 150, 200, head_dim), BF16)
    )
    runs = []
    for seed in SEEDS:
        run = library.forward(library.build(), query, key, value, seed=seed)
        grads = library.backward(library.build(), run, grad_out, seed=seed)
        runs.append((run.out, run.tau, run.gap_mean_v, run.block_mask_words, grads.query, grads.key, grads.value))
    for other in runs[1:]:
        for first, second in zip(runs[0], other, strict=True):
            assert torch.equal(first, second)


@only_sm80
@pytest.mark.parametrize(
    "change, message",
    [
        ({"scale": float("inf")}, "scale"),
        ({"attn_mask": torch.zeros(64, 64)}, "attn_mask"),
        ({"alpha": 2.5}, "alpha"),
        ({"alpha": 1.0}, "alpha"),
        ({"dtype": torch.float64}, "dtype"),
        ({"head_dim": 264}, "256"),
        ({"head_dim": 60}, "multiples of 8"),
        ({"padding": 4}, "16-byte aligned"),
    ],
)
def test_what_is_not_built_says_so(change, message):
    change = dict(change)
    dtype, head_dim, padding = change.pop("dtype", BF16), change.pop("head_dim", 64), change.pop("padding", 0)
    query, key, value = (
        torch.randn(1, 1, 64, head_dim + padding, device=library.device()).to(dtype)[..., :head_dim] for _ in range(3)
    )
    with pytest.raises(Exception, match=message):
        library.forward(library.build(), query, key, value, **change)


@pytest.mark.parametrize("cuda_path", ["auto"], indirect=True)
def test_path_is_chosen_by_device_and_case():
    def rows(dim: int = 64, heads: int = 2) -> torch.Tensor:
        return torch.zeros(1, heads, 10, dim, dtype=BF16, device=library.device())

    def taken(*tensors: torch.Tensor) -> str:
        return library.forward(library.build(), *tensors).path

    best = library.covered_paths()[-1]
    one_head = rows(heads=1)
    covered = [(rows(), rows(), rows()), (rows(128), rows(128), rows(8))]
    covered += [(one_head, one_head.expand(2, 1, 10, 64)[:1], one_head)]  # the stride of a dimension of one is any
    for tensors in covered:
        assert taken(*tensors) == best
    not_covered = {
        "head dims": (rows(136), rows(136), rows()),
        "strides": (rows(), one_head.expand(1, 2, 10, 64), rows()),
        "no keys": (rows(), rows()[:, :, :0], rows()[:, :, :0]),
    }
    for reason, tensors in not_covered.items():
        library.path = "auto"
        assert taken(*tensors) == "sm80"
        if best == "sm90":
            library.path = "sm90"
            with pytest.raises(Exception, match=reason):
                taken(*tensors)


@pytest.mark.skipif(library.has_gpu(), reason="the emulated device can be any")
@pytest.mark.parametrize("cuda_path", ["auto"], indirect=True)
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0), (12, 0)])
def test_path_is_chosen_by_compute_capability(capability):
    """sm_90a is of one generation: newer GPUs take the portable kernels too."""
    query, key, value, grad_out = cases.inputs("gaussian", Shape(1, 1, 20, 70), BF16)
    build = library.build()
    with build.on_device(*capability):
        run = library.forward(build, query, key, value)
        assert run.path == ("sm90" if capability == (9, 0) else "sm80")
        library.backward(build, run, grad_out)
        if capability == (9, 0):
            return
        library.path = "sm90"
        for call in (
            lambda: library.forward(build, query, key, value),
            lambda: library.backward(build, run, grad_out),
        ):
            with pytest.raises(Exception, match=r"not of compute capability 9\.0"):
                call()


@pytest.mark.skipif("sm90" not in library.covered_paths(), reason="there is no choice")
@pytest.mark.parametrize("cuda_path", ["auto"], indirect=True)
@pytest.mark.parametrize(
    "dtype, options, reason",
    [
        (BF16, {"attn_mask": torch.ones(20, 70, dtype=torch.bool)}, "attn_mask"),
        (FP16, {"scale": 0.0}, "scale"),
        (BF16, {"scale": -0.1}, "scale"),
        (FP32, {}, "bfloat16 and float16"),
    ],
    ids=["attn_mask", "scale 0", "scale -0.1", "float32"],
)
def test_what_takes_the_portable_path_on_hopper(dtype, options, reason):
    tensors = [t.to(library.device()) for t in cases.inputs("gaussian", Shape(1, 1, 20, 70), dtype)]
    options = {name: t.to(library.device()) if isinstance(t, Tensor) else t for name, t in options.items()}
    assert library.forward(library.build(), *tensors[:3], **options).path == "sm80"
    library.path = "sm90"
    with pytest.raises(Exception, match=reason):
        library.forward(library.build(), *tensors[:3], **options)
