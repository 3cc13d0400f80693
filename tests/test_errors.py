"""Every error of the public function: its type, what it expected and what it got."""

from __future__ import annotations

import re

import pytest
import torch

import adasplash2
from adasplash2 import _C

NAME = "adasplash2.entmax_attention: "


def tensors(**shapes: tuple[int, ...]) -> dict[str, torch.Tensor]:
    """query, key and value of ones; any of them in another shape."""
    default = {"query": (2, 4, 5, 8), "key": (2, 4, 7, 8), "value": (2, 4, 7, 8)}
    return {name: torch.ones(shape) for name, shape in {**default, **shapes}.items()}


GOOD = tensors()

CASES = {
    "dropout": ({**GOOD, "dropout_p": 0.1}, NotImplementedError, "dropout_p is not built, expected 0.0, got 0.1"),
    "one_dim": (
        tensors(query=(8,)),
        ValueError,
        "query must have at least 2 dimensions (N, D), got shape (8,)",
    ),
    "integer_key": (
        {**GOOD, "key": GOOD["key"].int()},
        TypeError,
        "key must be float32, bfloat16, float16 or float64, got torch.int32",
    ),
    "two_dtypes": (
        {**GOOD, "value": GOOD["value"].bfloat16()},
        TypeError,
        "query, key and value must have one dtype, got torch.float32 and torch.bfloat16",
    ),
    "two_devices": (
        {**GOOD, "key": GOOD["key"].to("meta")},
        ValueError,
        "key must be on the device of query (cpu), got meta",
    ),
    "num_dims": (
        tensors(key=(4, 7, 8)),
        ValueError,
        "query, key and value must have the same number of dimensions, got 4, 3 and 4",
    ),
    "head_dim": (
        tensors(key=(2, 4, 7, 9)),
        ValueError,
        "query and key must have the same head dim, got 8 and 9",
    ),
    "key_length": (
        tensors(value=(2, 4, 6, 8)),
        ValueError,
        "key and value must have the same length, got 7 and 6",
    ),
    "kv_heads": (
        tensors(value=(2, 2, 7, 8)),
        ValueError,
        "key and value must have the same number of heads, got 4 and 2",
    ),
    "gqa_not_enabled": (
        tensors(key=(2, 2, 7, 8), value=(2, 2, 7, 8)),
        ValueError,
        "query has 4 heads and key 2; expected the same number, or enable_gqa=True",
    ),
    "gqa_not_a_multiple": (
        {**tensors(key=(2, 3, 7, 8), value=(2, 3, 7, 8)), "enable_gqa": True},
        ValueError,
        "with enable_gqa the heads of query must be a multiple of those of key, got 4 and 3",
    ),
    "gqa_without_key_heads": (
        {**tensors(key=(2, 0, 7, 8), value=(2, 0, 7, 8)), "enable_gqa": True},
        ValueError,
        "with enable_gqa the heads of query must be a multiple of those of key, got 4 and 0",
    ),
    "batch": (
        tensors(key=(3, 4, 7, 8)),
        ValueError,
        "the leading dimensions of query, key and value must broadcast, "
        "got (2, 4, 5, 8), (3, 4, 7, 8) and (2, 4, 7, 8)",
    ),
    "mask_and_causal": (
        {**GOOD, "attn_mask": torch.ones(5, 7, dtype=torch.bool), "is_causal": True},
        ValueError,
        "attn_mask and is_causal=True exclude each other, got both",
    ),
    "mask_dtype": (
        {**GOOD, "attn_mask": torch.ones(5, 7, dtype=torch.float64)},
        TypeError,
        "attn_mask must be bool or of query's dtype (torch.float32), got torch.float64",
    ),
    "mask_device": (
        {**GOOD, "attn_mask": torch.ones(5, 7, device="meta")},
        ValueError,
        "attn_mask must be on the device of query (cpu), got meta",
    ),
    "mask_shape": (
        {**GOOD, "attn_mask": torch.ones(5, 6)},
        ValueError,
        "attn_mask must broadcast to (2, 4, 5, 7), got shape ",
    ),
    "mask_dims": (
        {**GOOD, "attn_mask": torch.ones(1, 1, 1, 5, 7)},
        ValueError,
        "attn_mask must broadcast to (2, 4, 5, 7), got shape (1, 1, 1, 5, 7)",
    ),
    "alpha_low": ({**GOOD, "alpha": 0.9}, ValueError, "alpha must be in [1, 2], got 0.9"),
    "alpha_high": ({**GOOD, "alpha": 2.5}, ValueError, "alpha must be in [1, 2], got 2.5"),
    "alpha_nan": ({**GOOD, "alpha": float("nan")}, ValueError, "alpha must be in [1, 2], got nan"),
    "alpha_tensor_values": (
        {**GOOD, "alpha": torch.tensor([1.0, 1.5, 1.5, 2.5])},
        ValueError,
        "a tensor alpha must be in (1, 2], got values from 1.0 to 2.5",
    ),
    "alpha_tensor_dtype": (
        {**GOOD, "alpha": torch.tensor(2)},
        TypeError,
        "a tensor alpha must be floating point, got torch.int64",
    ),
    "alpha_tensor_shape": (
        {**GOOD, "alpha": torch.full((3,), 1.5)},
        ValueError,
        "alpha must broadcast to (batch, heads) = (2, 4), got shape (3,)",
    ),
    "alpha_tensor_device": (
        {**GOOD, "alpha": torch.full((4,), 1.5, device="meta")},
        ValueError,
        "alpha must be on the device of query (cpu), got meta",
    ),
    "key_lengths_shape": (
        {**GOOD, "key_lengths": torch.tensor([1, 2, 3])},
        ValueError,
        "key_lengths must have shape (2,), got (3,)",
    ),
    "key_lengths_dtype": (
        {**GOOD, "key_lengths": torch.tensor([1.0, 2.0])},
        TypeError,
        "key_lengths must be integers, got torch.float32",
    ),
    "key_lengths_bool": (
        {**GOOD, "key_lengths": torch.tensor([True, False])},
        TypeError,
        "key_lengths must be integers, got torch.bool",
    ),
    "key_lengths_device": (
        {**GOOD, "key_lengths": torch.ones(2, dtype=torch.int64, device="meta")},
        ValueError,
        "key_lengths must be on the device of query (cpu), got meta",
    ),
    "softmax_aux": (
        {**GOOD, "alpha": 1.0, "return_aux": True},
        NotImplementedError,
        "return_aux is not built for alpha = 1 (softmax)",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_error(case):
    arguments, error_type, message = CASES[case]
    with pytest.raises(error_type, match=re.escape(NAME + message)):
        adasplash2.entmax_attention(**arguments)


@pytest.mark.parametrize("alpha", [1.5, 1.0])
def test_good_arguments_raise_nothing(alpha):
    assert adasplash2.entmax_attention(**GOOD, alpha=alpha).shape == (2, 4, 5, 8)


def test_double_backward():
    query = torch.randn(1, 2, 5, 8, requires_grad=True)
    out = adasplash2.entmax_attention(query, query, query)
    (grad,) = torch.autograd.grad(out.sum(), query, create_graph=True)
    with pytest.raises(RuntimeError, match="adasplash2"):
        torch.autograd.grad(grad.sum(), query)


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp"])
def test_functional_transforms(transform):
    query = torch.randn(3, 2, 5, 8)

    def attention(query):
        return adasplash2.entmax_attention(query, query, query)

    with pytest.raises(NotImplementedError, match="functional transforms"):
        if transform == "vmap":
            torch.func.vmap(attention)(query)
        elif transform == "grad":
            torch.func.grad(lambda query: attention(query).sum())(query)
        else:
            torch.func.jvp(attention, (query,), (query,))


@pytest.mark.parametrize("dual", ["query", "key", "value", "attn_mask", "alpha"])
def test_forward_mode(dual):
    """Also by what is optional: its tangent alone would be lost without a word."""
    tensors = {name: torch.randn(1, 2, 5, 8) for name in ("query", "key", "value")}
    tensors |= {"attn_mask": torch.randn(5, 5), "alpha": torch.tensor([1.3, 1.7])}
    message = re.escape(f"{NAME}forward-mode automatic differentiation is not built")
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match=message):
        tensors[dual] = torch.autograd.forward_ad.make_dual(tensors[dual], torch.ones_like(tensors[dual]))
        adasplash2.entmax_attention(**tensors)


def test_unknown_instruction_set():
    with pytest.raises((ValueError, RuntimeError), match=r"sse9.*baseline|baseline.*sse9"):
        _C.set_isa("sse9")


def test_input_changed_before_backward():
    """Autograd's own check: an input saved for the backward pass may not be written in between."""
    query, key, value = (torch.randn(2, 5, 8, requires_grad=True) for _ in range(3))
    out = adasplash2.entmax_attention(query * 1.0, scaled := key * 1.0, value)
    scaled.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
