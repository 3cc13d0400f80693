"""Every option and every layout of the inputs, forward and backward, against the float64 reference."""

from __future__ import annotations

import itertools

import cases
import pytest
import tolerance
import torch

import adasplash2
from adasplash2 import reference


def check(*tensors: torch.Tensor, **options: object) -> tolerance.Result:
    """`tensors` are query, key, value and the gradient of out; the first three ask for a gradient."""
    *inputs, grad_out = tensors
    return tolerance.check(adasplash2.entmax_attention, *(t.requires_grad_() for t in inputs), grad_out, **options)


# ---------------------------------------------------------------------------------------------- masks


@pytest.fixture
def shape(num_keys: int) -> cases.Shape:
    return cases.Shape(batch=2, heads=3, num_queries=33, num_keys=num_keys, head_dim=40)


def full_mask(shape: cases.Shape) -> tuple[int, ...]:
    return (*shape.query[:-1], shape.num_keys)


def random_mask(shape: tuple[int, ...], kind: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    visible = torch.rand(shape) < 0.7
    if kind == "bool":
        return visible
    return torch.randn(shape).to(dtype).masked_fill(~visible, -torch.inf).requires_grad_()


@pytest.mark.parametrize("broadcast", list(itertools.product([False, True], repeat=4)), ids=str)
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_mask_broadcasts_over(broadcast, kind, shape):
    size = tuple(1 if is_broadcast else n for is_broadcast, n in zip(broadcast, full_mask(shape), strict=True))
    check(*cases.inputs("sparse", shape), attn_mask=random_mask(size, kind))


@pytest.mark.parametrize("num_dims", [0, 1, 2, 3])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_mask_of_fewer_dims(num_dims, kind, shape):
    size = full_mask(shape)[4 - num_dims :]
    attn_mask = random_mask(size, kind) if num_dims else torch.tensor(True if kind == "bool" else 0.5)
    check(*cases.inputs("sparse", shape), attn_mask=attn_mask)


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("name", ["sparse", "dense"])
def test_mask_dtypes(dtype, kind, name, shape):
    check(*cases.inputs(name, shape, dtype), attn_mask=random_mask((2, 1, 33, shape.num_keys), kind, dtype))


@pytest.mark.parametrize("layout", ["slice", "transposed", "strided", "expanded"])
@pytest.mark.parametrize("kind", ["bool", "float"])
def test_mask_layouts(layout, kind, shape):
    attn_mask = random_mask(full_mask(shape), kind).detach()
    is_expanded = layout == "expanded"
    attn_mask = attn_mask[:1, :, :1].expand(full_mask(shape)) if is_expanded else cases.poisoned(attn_mask, layout)
    attn_mask.requires_grad_(kind == "float")
    check(*cases.inputs("sparse", shape), attn_mask=attn_mask)


def test_mask_of_finite_penalties(shape):
    """Padding written as a large negative number, as many models do, instead of -inf."""
    attn_mask = torch.zeros(2, 1, 1, shape.num_keys)
    attn_mask[1, ..., 50:] = torch.finfo(torch.float32).min
    check(*cases.inputs("sparse", shape), attn_mask=attn_mask)


def test_mask_that_leaves_one_key(shape):
    attn_mask = torch.zeros(33, shape.num_keys, dtype=torch.bool)
    attn_mask[torch.arange(33), torch.randint(shape.num_keys, (33,))] = True
    result = check(*cases.inputs("sparse", shape), attn_mask=attn_mask)
    assert (result.aux.support_size == 1).all()


# ---------------------------------------------------------------------------------------------- causal


@pytest.mark.parametrize(
    ("num_queries", "num_keys"),
    [
        (1, 1),
        (65, 65),
        (127, 127),
        (257, 257),
        (700, 700),
        (1, 200),
        (7, 600),
        (64, 128),
        (97, 515),
        (200, 63),
        (130, 1),
    ],
)
@pytest.mark.parametrize("name", ["sparse", "dense"])
def test_causal(num_queries, num_keys, name):
    shape = cases.Shape(num_queries=num_queries, num_keys=num_keys)
    result = check(*cases.inputs(name, shape), is_causal=True)
    rows_without_keys = max(0, num_queries - num_keys)
    assert (result.out[:, :, :rows_without_keys] == 0).all()
    assert (result.grads["query"][:, :, :rows_without_keys] == 0).all()


# ---------------------------------------------------------------------------------------------- heads and head dims


@pytest.mark.parametrize("group_size", [1, 2, 8])
@pytest.mark.parametrize("kv_heads", [1, 2])
@pytest.mark.parametrize("name", ["sparse", "dense"])
def test_grouped_queries(group_size, kv_heads, name, num_keys):
    heads = group_size * kv_heads
    shape = cases.Shape(batch=2, heads=heads, kv_heads=kv_heads, num_queries=33, num_keys=num_keys, head_dim=40)
    check(*cases.inputs(name, shape), enable_gqa=True)


@pytest.mark.parametrize("head_dim", cases.HEAD_DIMS)
@pytest.mark.parametrize("value_head_dim", [1, 59, 256])
def test_head_dims(head_dim, value_head_dim, num_keys):
    shape = cases.Shape(num_queries=33, num_keys=num_keys, head_dim=head_dim, value_head_dim=value_head_dim)
    check(*cases.inputs("sparse", shape))


@pytest.mark.parametrize("head_dim", cases.HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["sparse", "dense"])
def test_head_dims_in_half_precision(head_dim, dtype, name, num_keys):
    check(*cases.inputs(name, cases.Shape(num_queries=33, num_keys=num_keys, head_dim=head_dim), dtype))


# ---------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("layout", ["slice", "transposed", "strided"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_views_of_larger_buffers(layout, dtype, shape):
    """Strided rows, a strided last dimension, and NaN in every element between."""
    *tensors, grad_out = cases.inputs("sparse", shape, dtype)
    check(*(cases.poisoned(t, layout).detach() for t in tensors), grad_out)


def test_heads_inside_rows(num_keys):
    """What x.view(B, N, H, D).transpose(1, 2) gives, query, key and value packed in one buffer."""
    shape = cases.Shape(batch=1, heads=3, num_queries=num_keys, num_keys=num_keys)
    query, key, value, grad_out = cases.inputs("sparse", shape)
    packed = torch.stack([query, key, value]).permute(1, 3, 0, 2, 4).contiguous()  # (B, N, 3, H, D)
    query, key, value = packed.permute(2, 0, 3, 1, 4)
    assert not query.is_contiguous()
    check(query, key, value, grad_out)


def test_expanded_heads_and_batch(shape):
    query, key, value, grad_out = cases.inputs("sparse", shape)
    check(query, key[:1, :1].expand(shape.key), value[:1, :1].expand(shape.value), grad_out)


@pytest.mark.parametrize("leading", [(), (3,), (2, 3), (2, 2, 3)], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_leading_dims(leading, is_causal):
    query, key, value, grad_out = (torch.randn(*leading, rows, 16) for rows in (65, 97, 97, 65))
    result = check(query, key, value, grad_out, is_causal=is_causal)
    assert result.aux.tau.shape == (*leading, 65)
    assert result.aux.live_tile_fraction.shape == leading


def test_leading_dims_broadcast():
    query, key, value, grad_out = (
        torch.randn(shape) for shape in ((2, 3, 65, 16), (1, 3, 97, 16), (2, 3, 97, 16), (2, 3, 65, 16))
    )
    result = check(query, key, value, grad_out)
    assert result.grads["key"].shape == (1, 3, 97, 16)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_leading_dims_with_mask_and_alpha(kind):
    query, key, value, grad_out = (torch.randn(2, 2, 3, rows, 16) for rows in (65, 97, 97, 65))
    alpha = torch.tensor([1.25, 1.5, 2.0], requires_grad=True)
    check(query, key, value, grad_out, attn_mask=random_mask((2, 1, 3, 1, 97), kind), alpha=alpha)


# ---------------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize("scale", [None, 1.0, 0.05, 0.0, -0.3, 2])
@pytest.mark.parametrize("alpha", [1.5, 1.25])
def test_scale(scale, alpha, shape):
    check(*cases.inputs("sparse", shape), scale=scale, alpha=alpha)


@pytest.mark.parametrize("num_queries", [None, 40])  # None: as many as keys, then there is padding among them too
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ["sparse", "dense"])
def test_key_lengths(num_queries, dtype, is_causal, name, num_keys):
    """What lies in the padding is NaN."""
    if num_queries is None:
        num_queries = num_keys
    shape = cases.Shape(batch=7, heads=1, num_queries=num_queries, num_keys=num_keys, head_dim=16)
    query, key, value, grad_out = cases.inputs(name, shape)
    lengths = torch.tensor([num_keys, 0, 1, 63, 64, 65, num_keys - 1], dtype=dtype)
    for batch, length in enumerate(lengths.tolist()):
        key[batch, :, length:] = torch.nan
        value[batch, :, length:] = torch.nan
        if num_queries == num_keys:
            query[batch, :, length:] = torch.nan
            grad_out[batch, :, length:] = torch.nan
    result = check(query, key, value, grad_out, key_lengths=lengths, is_causal=is_causal)
    is_padding = torch.arange(num_keys) >= lengths[:, None]
    for grad in (result.grads["key"], result.grads["value"]):
        assert (grad.transpose(1, 2)[is_padding] == 0).all()
    if num_queries == num_keys:
        for tensor in (result.out, result.grads["query"]):
            assert (tensor.transpose(1, 2)[is_padding] == 0).all()


@pytest.mark.parametrize("alpha", [1.5, 1.0])
@pytest.mark.parametrize("num_queries", [33, 130])
def test_key_lengths_out_of_range(num_queries, alpha):
    """Below 0 is none, above the number of keys is all."""
    query, key, value, _ = cases.inputs("gaussian", cases.Shape(3, 2, num_queries, 130))
    outs = [
        attention(query, key, value, key_lengths=torch.tensor(lengths), alpha=alpha)
        for attention in (adasplash2.entmax_attention, reference.entmax_attention)
        for lengths in ([-5, 2**40, 30], [0, 130, 30])
    ]
    for ours, same in ((outs[0], outs[1]), (outs[2], outs[3])):
        torch.testing.assert_close(ours, same, rtol=0.0, atol=0.0, equal_nan=True)  # softmax of nothing is torch's
    if alpha > 1.0:
        assert not outs[0][0].any()


def test_key_lengths_with_mask(shape):
    attn_mask = random_mask((33, shape.num_keys), "float")
    check(*cases.inputs("sparse", shape), key_lengths=torch.tensor([shape.num_keys, 30]), attn_mask=attn_mask)


@pytest.mark.parametrize("alpha_shape", [(), (1,), (3,), (2, 1), (1, 3), (2, 3)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_per_head(alpha_shape, dtype, shape):
    alpha = torch.tensor([1.5, 2.0, 1.1, 1.25, 1.75, 1.5])[: torch.Size(alpha_shape).numel()].reshape(alpha_shape)
    check(*cases.inputs("sparse", shape, dtype), alpha=alpha)


@pytest.mark.parametrize("alpha", [1.01, 1.05, 4 / 3, 1.9, 1.999, 2])
@pytest.mark.parametrize("name", ["sparse", "dense", "mixed_rows"])
def test_other_alphas(alpha, name, num_keys):
    check(*cases.inputs(name, cases.Shape(num_queries=33, num_keys=num_keys)), alpha=alpha)


@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_defaults(dtype, shape):
    """The public default of every argument; out alone is the out that comes with aux."""
    query, key, value, _ = cases.inputs("sparse", shape, dtype)
    result = tolerance.check(adasplash2.entmax_attention, query, key, value)
    assert torch.equal(adasplash2.entmax_attention(query, key, value), result.out)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ["sparse", "dense", "block_structured", "one_hot"])
def test_aux(is_causal, name, num_keys):
    """Support sizes and live tiles: keys within rounding of tau may fall on either side, no others."""
    shape = cases.Shape(batch=2, num_queries=120, num_keys=num_keys)
    query, key, value, _ = cases.inputs(name, shape)
    _, aux = adasplash2.entmax_attention(query, key, value, is_causal=is_causal, return_aux=True)
    assert aux._fields == ("tau", "support_size", "live_tile_fraction")
    assert (aux.tau.dtype, aux.support_size.dtype, aux.live_tile_fraction.dtype) == (
        torch.float32,
        torch.int32,
        torch.float32,
    )
    query, key, value = query.double(), key.double(), value.double()
    _, oracle = reference.entmax_attention(query, key, value, is_causal=is_causal, return_aux=True)
    z = 0.5 * (query @ key.mT) / query.shape[-1] ** 0.5
    if is_causal:
        z = z.masked_fill(torch.ones(120, num_keys).tril(num_keys - 120) == 0, -torch.inf)
    margin = 1e-5 * (1.0 + oracle.tau.abs())[..., None]  # far above float32 rounding of z, far below score distances
    at_least = (z > oracle.tau[..., None] + margin).sum(-1)
    at_most = (z > oracle.tau[..., None] - margin).sum(-1)
    assert ((at_least <= aux.support_size) & (aux.support_size <= at_most)).all()
    # Tiles live by a key that almost made it may be counted: the mask is taken at a bound below tau.
    assert (aux.live_tile_fraction >= oracle.live_tile_fraction - 1e-6).all()
    assert (aux.live_tile_fraction <= oracle.live_tile_fraction + 0.05).all()
