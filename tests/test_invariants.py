"""What must hold whatever the numbers are. Runs on the reference too, unless the reference is what we compare with."""

from __future__ import annotations

import cases
import pytest
import tolerance
import torch

import adasplash2

NAMES = ["sparse", "dense", "mixed_rows", "tied", "constant", "one_hot", "rising"]


@pytest.fixture
def shape(num_keys: int) -> cases.Shape:
    return cases.Shape(batch=2, heads=2, num_queries=70, num_keys=num_keys, head_dim=40)


def probabilities(path, query: torch.Tensor, key: torch.Tensor, **options: object) -> torch.Tensor:
    """prob (B, H, Nq, Nk) as the output itself: the values are the rows of the identity."""
    identity = torch.eye(key.shape[-2], dtype=key.dtype).expand(*key.shape[:-1], -1)
    return path(query, key, identity, **options)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("alpha", cases.ALPHAS)
def test_rows_sum_to_one(path, name, alpha, shape):
    query, key, _, _ = cases.inputs(name, shape)
    prob = probabilities(path, query, key, alpha=alpha)
    assert (prob >= 0).all()
    # Moving tau by one rounding u |z| changes the sum by b gap_sum u |z|; b gap_sum <= 10 at these sizes and alphas for
    # |z| <= 10, so 1e-5 is 100 u with room for the other roundings.
    torch.testing.assert_close(prob.sum(-1), torch.ones(prob.shape[:-1]), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("alpha", cases.ALPHAS)
def test_tau_within_its_bracket(path, name, alpha, shape):
    query, key, value, _ = cases.inputs(name, shape, torch.float64)
    _, aux = path(query, key, value, alpha=alpha, return_aux=True)
    row_max = ((alpha - 1.0) * (query @ key.mT) / query.shape[-1] ** 0.5).amax(-1)
    rounding = 1e-13 * (1.0 + row_max.abs())
    assert (aux.tau >= row_max - 1.0 - rounding).all()
    assert (aux.tau <= row_max - shape.num_keys ** (1.0 - alpha) + rounding).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.25])
def test_support_size_counts_the_nonzero_probabilities(path, name, alpha, shape):
    query, key, value, _ = cases.inputs(name, shape)
    _, aux = path(query, key, value, alpha=alpha, return_aux=True)
    assert torch.equal(aux.support_size, (probabilities(path, query, key, alpha=alpha) > 0).sum(-1, dtype=torch.int32))


@pytest.mark.parametrize("name", ["sparse", "dense", "block_structured"])
def test_live_tiles_cover_the_support(path, name, shape):
    query, key, value, _ = cases.inputs(name, shape)
    _, aux = path(query, key, value, return_aux=True)
    prob = probabilities(path, query, key)
    padded = torch.nn.functional.pad(prob, (0, -shape.num_keys % 64, 0, -70 % 64))
    is_live = (padded.reshape(2, 2, 2, 64, -1, 64) > 0).any(-1).any(-2)
    assert (aux.live_tile_fraction >= is_live.float().mean((-1, -2)) - 1e-6).all()


def test_gradient_outside_the_support_is_exactly_zero(path, num_keys):
    query, key, value, grad_out = cases.inputs("block_structured", cases.Shape(num_queries=64, num_keys=num_keys))
    result = tolerance.run(path, query, key.requires_grad_(), value.requires_grad_(), grad_out)
    is_used = (probabilities(path, query, key.detach()) > 0).any(-2)
    assert is_used.any() and not is_used.all()
    for grad in (result.grads["key"], result.grads["value"]):
        assert (grad[~is_used] == 0).all()
        assert (grad[is_used].abs().amax(-1) > 0).all()


def backward_of(path, tensors: tuple[torch.Tensor, ...], **options: object) -> list[torch.Tensor]:
    """out, tau, dq, dk, dv."""
    *inputs, grad_out = tensors
    result = tolerance.run(path, *(t.clone().requires_grad_() for t in inputs), grad_out, **options)
    return [result.out, result.aux.tau, *result.grads.values()]


@pytest.mark.parametrize("name", ["sparse", "dense", "mixed_rows"])
@pytest.mark.parametrize("is_causal", [False, True])
def test_batch_and_head_permutation(path, name, is_causal, num_keys):
    shape = cases.Shape(batch=3, heads=4, num_queries=70, num_keys=num_keys, head_dim=40)
    tensors = cases.inputs(name, shape)
    batch, head = torch.tensor([2, 0, 1]), torch.tensor([1, 3, 0, 2])
    permuted = tuple(t[batch][:, head] for t in tensors)
    plain = backward_of(path, tensors, is_causal=is_causal)
    for ours, expected in zip(backward_of(path, permuted, is_causal=is_causal), plain, strict=True):
        assert torch.equal(ours, expected[batch][:, head])


def test_one_head_alone(path, num_keys):
    """Nothing leaks from one head to another, nor does the number of heads change the arithmetic."""
    tensors = cases.inputs("mixed_rows", cases.Shape(batch=2, heads=3, num_queries=130, num_keys=num_keys))
    plain = backward_of(path, tensors)
    alone = backward_of(path, tuple(t[1:, 2:].clone() for t in tensors))
    for ours, expected in zip(alone, plain, strict=True):
        torch.testing.assert_close(ours, expected[1:, 2:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["sparse", "dense"])
def test_key_permutation(path, name, shape):
    query, key, value, grad_out = cases.inputs(name, shape, torch.float64)
    order = torch.randperm(shape.num_keys)
    plain = backward_of(path, (query, key, value, grad_out))
    plain[3:] = [grad[:, :, order] for grad in plain[3:]]
    permuted = backward_of(path, (query, key[:, :, order], value[:, :, order], grad_out))
    for ours, expected in zip(permuted, plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["sparse", "dense"])
@pytest.mark.parametrize("alpha", [1.5, 1.25])
def test_shift_of_a_row_changes_nothing_but_tau(path, name, alpha, shape):
    query, key, value, _ = cases.inputs(name, shape, torch.float64)
    shift = torch.linspace(-50.0, 50.0, shape.num_queries, dtype=torch.float64)
    out, aux = path(query, key, value, alpha=alpha, return_aux=True)
    shifted_out, shifted_aux = path(query, key, value, shift[:, None], alpha=alpha, return_aux=True)
    torch.testing.assert_close(shifted_out, out, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(shifted_aux.tau, aux.tau + (alpha - 1.0) * shift, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["sparse", "dense"])
def test_grouped_queries_are_repeated_keys_and_values(path, name, num_keys):
    shape = cases.Shape(batch=2, heads=6, kv_heads=2, num_queries=65, num_keys=num_keys, head_dim=40)
    query, key, value, grad_out = cases.inputs(name, shape, torch.float64)
    repeated = (query, key.repeat_interleave(3, 1), value.repeat_interleave(3, 1), grad_out)
    plain = backward_of(path, repeated)
    plain[3:] = [grad.unflatten(1, (2, 3)).sum(2) for grad in plain[3:]]
    for ours, expected in zip(backward_of(path, (query, key, value, grad_out), enable_gqa=True), plain, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["sparse", "dense"])
@pytest.mark.parametrize(
    ("num_queries", "num_keys"), [(130, 130), (300, 300), (600, 600), (65, 200), (65, 700), (200, 65)]
)
def test_causal_is_a_mask(path, name, num_queries, num_keys):
    tensors = cases.inputs(name, cases.Shape(num_queries=num_queries, num_keys=num_keys), torch.float64)
    is_past = torch.arange(num_keys) <= torch.arange(num_queries)[:, None] + num_keys - num_queries
    by_mask = backward_of(path, tensors, attn_mask=is_past)
    for ours, expected in zip(backward_of(path, tensors, is_causal=True), by_mask, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("num_queries", [130, 65])
def test_key_lengths_are_a_mask(path, num_queries):
    shape = cases.Shape(batch=3, num_queries=num_queries, num_keys=130)
    tensors = cases.inputs("gaussian", shape, torch.float64)
    lengths = torch.tensor([130, 0, 70])
    visible = (torch.arange(130) < lengths[:, None])[:, None, None, :].expand(-1, -1, num_queries, -1)
    if num_queries == 130:
        visible = visible & visible.mT
    by_mask = backward_of(path, tensors, attn_mask=visible)
    for ours, expected in zip(backward_of(path, tensors, key_lengths=lengths), by_mask, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("kind", ["float mask of -inf", "float mask of zeros", "bool mask of True"])
def test_equivalent_masks(path, kind, shape):
    tensors = cases.inputs("sparse", shape, torch.float64)
    visible = torch.rand(2, 1, 70, shape.num_keys) < 0.7
    zeros = torch.zeros(2, 1, 70, shape.num_keys, dtype=torch.float64)
    left, right = {
        "float mask of -inf": ({"attn_mask": zeros.masked_fill(~visible, -torch.inf)}, {"attn_mask": visible}),
        "float mask of zeros": ({"attn_mask": zeros}, {}),
        "bool mask of True": ({"attn_mask": torch.ones_like(visible)}, {}),
    }[kind]
    for ours, expected in zip(backward_of(path, tensors, **left), backward_of(path, tensors, **right), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


def test_alpha_tensor_is_alpha_per_head(path, num_keys):
    shape = cases.Shape(heads=5, num_queries=65, num_keys=num_keys, head_dim=40)
    tensors = cases.inputs("gaussian", shape, torch.float64)
    together = backward_of(path, tensors, alpha=torch.tensor(cases.ALPHAS, dtype=torch.float64))
    for head, alpha in enumerate(cases.ALPHAS):
        alone = backward_of(path, tuple(t[:, head : head + 1] for t in tensors), alpha=alpha)
        for ours, expected in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[:, head : head + 1], expected, rtol=1e-11, atol=1e-12)


# ---------------------------------------------------------------------------------------------- repeatability

REPEATED = [("sparse", torch.float32), ("dense", torch.float32), ("mixed_rows", torch.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), REPEATED)
@pytest.mark.parametrize("batch_and_heads", [(1, 1), (2, 3)])
def test_bitwise_repeatable(name, dtype, batch_and_heads, isa):
    """Over runs and over numbers of threads, forward and backward, one head (threads share it) or several."""
    batch, heads = batch_and_heads
    shape = cases.Shape(batch=batch, heads=heads, num_queries=300, num_keys=515)
    tensors = cases.inputs(name, shape, dtype)
    before = torch.get_num_threads()
    runs = []
    try:
        for num_threads in (1, 2, 2, 3):
            torch.set_num_threads(num_threads)
            runs.append(backward_of(adasplash2.entmax_attention, tensors, is_causal=True))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(run, runs[0], strict=True))


@pytest.mark.parametrize(("name", "dtype"), REPEATED)
def test_out_is_the_same_with_and_without_gradients(name, dtype, num_threads, shape):
    query, key, value, _ = cases.inputs(name, shape, dtype)
    with_grad = adasplash2.entmax_attention(query.clone().requires_grad_(), key, value)
    assert torch.equal(with_grad, adasplash2.entmax_attention(query, key, value))
    with torch.inference_mode():
        assert torch.equal(with_grad, adasplash2.entmax_attention(query, key, value))
    with_aux, _ = adasplash2.entmax_attention(query, key, value, return_aux=True)
    assert torch.equal(with_grad, with_aux)


@pytest.mark.parametrize("name", ["sparse", "dense"])
def test_backward_twice_over_a_retained_graph(path, name, shape):
    query, key, value, grad_out = (t.requires_grad_() for t in cases.inputs(name, shape))
    out = path(query, key, value)
    first = torch.autograd.grad(out, (query, key, value), grad_out.detach(), retain_graph=True)
    second = torch.autograd.grad(out, (query, key, value), grad_out.detach())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_inputs_are_not_written(path, shape):
    tensors = cases.inputs("sparse", shape)
    copies = [t.clone() for t in tensors]
    attn_mask = torch.randn(70, shape.num_keys)
    mask_copy = attn_mask.clone()
    *inputs, grad_out = tensors
    tolerance.run(path, *(t.requires_grad_() for t in inputs), grad_out, attn_mask=attn_mask)
    assert all(torch.equal(t, copy) for t, copy in zip((*tensors, attn_mask), (*copies, mask_copy), strict=True))
