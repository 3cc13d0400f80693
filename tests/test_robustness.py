"""Values and sizes that break things: nothing hangs, nothing leaks from row to row, and empty stays empty."""

from __future__ import annotations

import math

import cases
import pytest
import tolerance
import torch

import adasplash2

NAN, INF = math.nan, math.inf


@pytest.fixture
def shape(num_keys: int) -> cases.Shape:
    return cases.Shape(batch=2, heads=2, num_queries=70, num_keys=num_keys, head_dim=16)


def backward(path, tensors, **options: object) -> tolerance.Result:
    *inputs, grad_out = tensors
    return tolerance.run(path, *(t.requires_grad_() for t in inputs), grad_out, **options)


def assert_near(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """The same arithmetic, up to the order of sums: a few roundings of the dtype (of float32, where sums are kept)."""
    tolerance = 4 * max(torch.finfo(ours.dtype).eps, 16 * torch.finfo(torch.float32).eps)
    torch.testing.assert_close(ours, expected, rtol=tolerance, atol=tolerance)


# ---------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    "shape",
    [
        cases.Shape(batch=0, num_queries=5, num_keys=7),
        cases.Shape(heads=0, num_queries=5, num_keys=7),
        cases.Shape(num_queries=0, num_keys=7),
        cases.Shape(num_queries=5, num_keys=0),
        cases.Shape(num_queries=0, num_keys=0),
        cases.Shape(num_queries=1, num_keys=1, head_dim=1),
    ],
    ids=str,
)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_empty_and_single(path, shape, is_causal, dtype):
    tensors = cases.inputs("gaussian", shape, dtype)
    result = backward(path, tensors, is_causal=is_causal)
    assert result.out.shape == shape.out
    assert result.aux.tau.shape == result.aux.support_size.shape == shape.out[:-1]
    assert result.aux.live_tile_fraction.shape == shape.out[:2]
    for (name, grad), like in zip(result.grads.items(), tensors, strict=False):
        assert grad.shape == like.shape, name
    if shape.num_keys == 0:
        assert (result.out == 0).all() and (result.grads["query"] == 0).all()
        assert (result.aux.tau == INF).all() and (result.aux.support_size == 0).all()
        assert (result.aux.live_tile_fraction == 0).all()
    if shape.num_queries == shape.num_keys == 1:
        assert torch.equal(result.out, tensors[2])
        assert (result.grads["query"] == 0).all() and (result.grads["key"] == 0).all()
        assert torch.equal(result.grads["value"], tensors[3])


@pytest.mark.parametrize("columns_apart", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_masked", [False, True])
def test_offsets_beyond_two_to_the_31(dtype, is_masked, columns_apart):
    """Columns or rows, heads and sequences 2^31 elements apart and more: as contiguous tensors."""

    def far(tensor: torch.Tensor) -> torch.Tensor:
        column = 2**31 if columns_apart else 1
        row = column * tensor.shape[3] if columns_apart else 2**31
        return cases.far_apart(tensor, (row * tensor.shape[2] * tensor.shape[1], row * tensor.shape[2], row, column))

    *inputs, grad_out = cases.inputs("sparse", cases.Shape(2, 2, 20, 70, 8, kv_heads=1), dtype)
    options = {"enable_gqa": True, "attn_mask": torch.randn(2, 2, 20, 70).to(dtype) if is_masked else None}
    near = backward(adasplash2.entmax_attention, (*inputs, grad_out), **options)
    if is_masked:
        options["attn_mask"] = far(options["attn_mask"])
    ours = backward(adasplash2.entmax_attention, tuple(map(far, (*inputs, grad_out))), **options)
    assert_near(ours.out, near.out)
    assert_near(ours.aux.tau, near.aux.tau)
    for name, grad in ours.grads.items():
        assert_near(grad, near.grads[name])


# ---------------------------------------------------------------------------------------------- rows without keys


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("alpha", [1.5, 1.25])
def test_fully_masked_rows(path, dtype, kind, alpha, shape):
    tensors = cases.inputs("sparse", shape, dtype)
    is_empty = torch.arange(70) % 3 == 1
    visible = (~is_empty)[:, None].expand(70, shape.num_keys)
    attn_mask = visible if kind == "bool" else torch.zeros(70, shape.num_keys, dtype=dtype).masked_fill(~visible, -INF)
    result = backward(path, tensors, attn_mask=attn_mask, alpha=alpha)
    assert (result.out[:, :, is_empty] == 0).all()
    assert (result.grads["query"][:, :, is_empty] == 0).all()
    assert (result.aux.tau[:, :, is_empty] == INF).all()
    assert (result.aux.support_size[:, :, is_empty] == 0).all()
    for tensor in (result.out, *result.grads.values()):
        assert tensor.isfinite().all()
    assert (result.aux.support_size[:, :, ~is_empty] > 0).all()


def test_everything_masked(path, shape):
    tensors = cases.inputs("sparse", shape)
    attn_mask = torch.full((70, shape.num_keys), -INF, requires_grad=True)
    alpha = torch.tensor([1.5, 1.3], requires_grad=True)
    result = backward(path, tensors, attn_mask=attn_mask, alpha=alpha)
    assert all((t == 0).all() for t in (result.out, *result.grads.values()))
    assert (result.aux.live_tile_fraction == 0).all()


def test_key_lengths_of_zero(path, shape):
    tensors = cases.inputs("sparse", shape)
    result = backward(path, tensors, key_lengths=torch.zeros(2, dtype=torch.int64))
    assert all((t == 0).all() for t in (result.out, *result.grads.values()))


# ---------------------------------------------------------------------------------------------- NaN and inf


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("name", ["sparse", "dense"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.25])
def test_bad_score_poisons_its_row_alone(path, bad, name, dtype, alpha, shape):
    """One NaN or +inf score, through the mask: its row is NaN, every other row what it would be without."""
    query, key, value, _ = cases.inputs(name, shape, dtype)
    attn_mask = torch.zeros(2, 2, 70, shape.num_keys, dtype=dtype)
    clean, clean_aux = path(query, key, value, attn_mask, alpha=alpha, return_aux=True)
    attn_mask[1, 0, 33, 77] = bad
    out, aux = path(query, key, value, attn_mask, alpha=alpha, return_aux=True)
    is_bad = torch.zeros(2, 2, 70, dtype=torch.bool)
    is_bad[1, 0, 33] = True
    assert out[is_bad].isnan().all() and aux.tau[is_bad].isnan().all()
    assert_near(out[~is_bad], clean[~is_bad])
    assert_near(aux.tau[~is_bad], clean_aux.tau[~is_bad])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["sparse", "dense"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_bad_query(path, bad, name, dtype, shape):
    """A query with a bad component has scores of NaN or of both infinities: NaN, in its row alone."""
    tensors = cases.inputs(name, shape, dtype)
    clean = path(*tensors[:3])
    tensors[0][0, 1, 20, 5] = bad
    result = backward(path, tensors)
    is_bad = torch.zeros(2, 2, 70, dtype=torch.bool)
    is_bad[0, 1, 20] = True
    assert result.out[is_bad].isnan().all()
    assert_near(result.out[~is_bad], clean[~is_bad])
    assert result.grads["query"][~is_bad].isfinite().all()
    assert result.grads["query"][is_bad].isnan().any()


@pytest.mark.parametrize("name", ["sparse", "dense"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_nan_key_poisons_every_row_that_sees_it(path, name, dtype, shape, isa):
    tensors = cases.inputs(name, shape, dtype)
    tensors[1][0, 1, shape.num_keys - 60, 3] = NAN  # query i sees key j <= i + Nk - 70
    clean = path(*(t.nan_to_num() for t in tensors[:3]), is_causal=True)
    out = path(*tensors[:3], is_causal=True)
    assert out[0, 1, 10:].isnan().all()
    assert_near(out[0, 1, :10], clean[0, 1, :10])
    assert_near(out[1], clean[1])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["sparse", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bad_key_gradients(bad, name, dtype, shape, isa):
    """To rows that do not see the key, or for which it scores -inf, it is as if it were not there. The others are NaN
    and count for nothing."""
    query, key, value, grad_out = cases.inputs(name, shape, dtype)
    bad_key = shape.num_keys - 40  # query i sees key j <= i + Nk - 70
    key[:, :, bad_key, 3] = bad
    result = backward(adasplash2.entmax_attention, (query, key, value, grad_out), is_causal=True)
    mask = torch.ones(70, shape.num_keys, dtype=torch.bool).tril(shape.num_keys - 70)
    is_bad = mask[:, bad_key] & ~(query.detach()[..., 3] * bad == -INF)
    for rows in (result.out, result.aux.tau[..., None], result.grads["query"]):
        assert rows[is_bad].isnan().all() and rows[~is_bad].isfinite().all()

    mask[:, bad_key] = False
    head, rows = (slice(1, 2), slice(1, 2)), ~is_bad[1, 1]
    tensors = [t.detach()[head] for t in (query[:, :, rows], key.nan_to_num(0.0, 0.0, 0.0), value)]
    expected = tolerance.expect(
        *(t.requires_grad_() for t in tensors), grad_out[:, :, rows][head], attn_mask=mask[rows]
    )
    grads = {n: grad[head][:, :, rows] if n == "query" else grad[head] for n, grad in result.grads.items()}
    aux = result.aux._replace(tau=result.aux.tau[head][..., rows])
    tolerance.assert_result(tolerance.Result(result.out[head][:, :, rows], aux, grads), expected)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("name", ["sparse", "dense", "mixed_rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_bad_value_reaches_only_the_rows_that_attend_to_it(path, bad, name, dtype, shape):
    query, key, value, _ = cases.inputs(name, shape, dtype)
    clean = path(query, key, value)
    identity = torch.eye(shape.num_keys, dtype=dtype).expand(2, 2, -1, -1)
    prob = path(query, key, identity)
    used = prob[0, 0, :, 64] > 0
    value[0, 0, 64, 7] = bad
    out = path(query, key, value)
    is_bad = torch.zeros_like(out, dtype=torch.bool)
    is_bad[0, 0, :, 7] = used
    assert torch.equal(~out.isfinite(), is_bad)
    assert_near(out[~is_bad], clean[~is_bad])


@pytest.mark.parametrize("name", ["sparse", "dense"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])  # prob underflows in float16
def test_bad_grad_out_stays_in_its_row(path, name, dtype, shape):
    """A NaN in the gradient of one row reaches that query and the keys that it attends to."""
    query, key, value, grad_out = cases.inputs(name, shape, dtype)
    identity = torch.eye(shape.num_keys, dtype=dtype).expand(2, 2, -1, -1)
    used = path(query, key, identity)[1, 1, 40] > 0
    grad_out[1, 1, 40, 3] = NAN
    result = backward(path, (query, key, value, grad_out))
    assert result.out.isfinite().all()
    is_row = torch.zeros(2, 2, 70, dtype=torch.bool)
    is_row[1, 1, 40] = True
    assert torch.equal(result.grads["query"].isnan().any(-1), is_row)
    is_used = torch.zeros(2, 2, shape.num_keys, dtype=torch.bool)
    is_used[1, 1] = used
    assert torch.equal(result.grads["key"].isnan().any(-1), is_used)
    assert torch.equal(result.grads["value"].isnan().any(-1), is_used)


@pytest.mark.parametrize("where", ["query", "key", "value", "grad_out"])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("is_causal", [False, True])
def test_garbage_everywhere_ends(path, where, bad, dtype, is_causal, shape):
    """A tenth of one input is garbage. Nothing to compare with: it must come back, and leave the other batch alone."""
    tensors = cases.inputs("mixed_rows", shape, dtype)
    index = ("query", "key", "value", "grad_out").index(where)
    tensors[index][0][torch.rand_like(tensors[index][0]) < 0.1] = bad
    result = backward(path, tensors, is_causal=is_causal)
    for tensor in (result.out, *result.grads.values()):
        assert tensor[1].isfinite().all()


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
@pytest.mark.parametrize("is_causal", [False, True])
def test_all_inputs_are_garbage(path, garbage, is_causal, shape):
    tensors = tuple(torch.full_like(t, garbage) for t in cases.inputs("sparse", shape))
    result = backward(path, tensors, is_causal=is_causal)
    assert result.out.shape == shape.out


def test_masked_garbage_is_not_read(path, shape):
    """Keys that a bool mask excludes may hold NaN in key and value."""
    query, key, value, grad_out = cases.inputs("sparse", shape)
    visible = torch.arange(shape.num_keys) % 5 != 2
    clean = backward(path, cases.inputs("sparse", shape), attn_mask=visible)
    key[:, :, ~visible] = NAN
    value[:, :, ~visible] = INF
    result = backward(path, (query, key, value, grad_out), attn_mask=visible)
    assert_near(result.out, clean.out)
    for name, grad in result.grads.items():
        torch.testing.assert_close(
            grad, clean.grads[name], rtol=1e-5, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )


# ---------------------------------------------------------------------------------------------- magnitudes


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("alpha", cases.ALPHAS)
def test_all_scores_equal(path, dtype, alpha, shape):
    """prob is uniform, out the mean of the values; z - tau = n^(1 - alpha) for every key."""
    query, key, value, grad_out = cases.inputs("constant", shape, dtype)
    result = backward(path, (torch.zeros_like(query), key, value, grad_out), alpha=alpha)
    assert (result.aux.support_size == shape.num_keys).all()
    torch.testing.assert_close(result.aux.tau, torch.full_like(result.aux.tau, -(shape.num_keys ** (1.0 - alpha))))
    mean = value.double().mean(-2, keepdim=True).expand(shape.out)
    resolution = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)
    torch.testing.assert_close(result.out.double(), mean, rtol=4 * resolution, atol=4 * resolution)


@pytest.mark.parametrize("magnitude", [1e4, 1e8, 1e15, 1e30])
@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.25, 1.1])
def test_huge_scores_pick_the_largest(path, magnitude, alpha):
    """Scores `magnitude` apart: one key each, exactly."""
    num = 70
    query = torch.eye(num)[None] * magnitude
    key, value = torch.eye(num)[None], torch.randn(1, num, 16)
    result = backward(path, (query, key, value, torch.randn(1, num, 16)), alpha=alpha, scale=1.0)
    assert torch.equal(result.out, value)
    assert (result.aux.support_size == 1).all()
    assert (result.grads["query"] == 0).all() and (result.grads["key"] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_denormal_inputs_and_values(dtype, shape):
    tiny = torch.finfo(dtype).tiny / 4
    query, key, value, grad_out = cases.inputs("sparse", shape, dtype)
    tensors = (query * tiny, key, value * tiny, grad_out)
    result = backward(adasplash2.entmax_attention, tensors)
    assert (result.aux.support_size == shape.num_keys).all()
    mean = tensors[2].detach().double().mean(-2, keepdim=True)
    # Denormals have an absolute spacing; kernels may also flush them to zero.
    assert (result.out.double() - mean).abs().max() <= tiny
    for grad in result.grads.values():
        assert grad.isfinite().all()


def test_scores_that_overflow_float32(path, shape):
    """<q, k> beyond float32 is +inf: such a row is NaN, and it alone."""
    query, key, value, _ = cases.inputs("sparse", shape)
    query[0, 0, 11] = key[0, 0, 50].sign() * 1e38
    key[0, 0, 50] *= 100.0
    clean = path(torch.where(query.abs() > 1e30, 0.0, query), key, value)
    out = path(query, key, value)
    assert out[0, 0, 11].isnan().all()
    is_bad = torch.zeros(2, 2, 70, dtype=torch.bool)
    is_bad[0, 0, 11] = True
    assert_near(out[~is_bad], clean[~is_bad])
