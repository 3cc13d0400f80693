"""Every error of the public function, of the operators below it, of the reference and of the build: its type, what was
expected and what came."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

import adasplash2
from adasplash2 import _C, reference

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


# ---------------------------------------------------------------------------------------------- operators


OPS = torch.ops.adasplash2


def attention_op(**changes: Any) -> dict[str, Any]:
    """The arguments of the operator, good ones but for the changes."""
    numbers = {"alpha": 1.5, "scale": 0.5, "is_causal": False}
    return {**GOOD, "attn_mask": None, "key_lengths": None, "alpha_heads": None, **numbers, **changes}


def mask(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.ones(shape, dtype=dtype)


ALPHAS = torch.full((2, 4), 1.5, dtype=torch.float64)
OPERATOR_CASES = {
    "dims": ({"query": torch.ones(4, 5, 8)}, ValueError, "query, key and value must have 4 dimensions, got 3, 4 and 4"),
    "key_shape": (
        {"key": torch.ones(2, 4, 7, 9)},
        ValueError,
        "key must have the shape [2, 4, 7, 8], got [2, 4, 7, 9]",
    ),
    "value_shape": (
        {"value": torch.ones(2, 4, 6, 8)},
        ValueError,
        "value must have the shape [2, 4, 7, 8], got [2, 4, 6, 8]",
    ),
    "key_dtype": ({"key": GOOD["key"].double()}, TypeError, "key must have the dtype Float, got Double"),
    "value_dtype": ({"value": GOOD["value"].half()}, TypeError, "value must have the dtype Float, got Half"),
    "integers": (
        {name: tensor.int() for name, tensor in GOOD.items()},
        TypeError,
        "query must be floating point, got Int",
    ),
    "bools": (
        {name: tensor.bool() for name, tensor in GOOD.items()},
        TypeError,
        "query must be floating point, got Bool",
    ),
    "float8": (
        {name: tensor.to(torch.float8_e5m2) for name, tensor in GOOD.items()},
        TypeError,
        "expected a floating point or bool tensor, got Float8_e5m2",
    ),
    "heads": (
        tensors(key=(2, 3, 7, 8), value=(2, 3, 7, 8)),
        ValueError,
        "the number of query heads must be a multiple of the number of key heads, got 4 and 3",
    ),
    "no_key_heads": (
        tensors(key=(2, 0, 7, 8), value=(2, 0, 7, 8)),
        ValueError,
        "the number of query heads must be a multiple of the number of key heads, got 4 and 0",
    ),
    "mask_dims": ({"attn_mask": mask(5, 7)}, ValueError, "attn_mask must have 4 dimensions, got 2"),
    "mask_shape": (
        {"attn_mask": mask(2, 1, 5, 6)},
        ValueError,
        "attn_mask must broadcast to [2, 4, 5, 7], got [2, 1, 5, 6]",
    ),
    "mask_dtype": (
        {"attn_mask": mask(1, 1, 5, 7, dtype=torch.float64)},
        TypeError,
        "attn_mask must be bool or have the dtype of query (Float), got Double",
    ),
    "lengths_shape": (
        {"key_lengths": torch.ones(3, dtype=torch.int64)},
        ValueError,
        "key_lengths must have the shape [2], got [3]",
    ),
    "alpha_high": ({"alpha": 3.0}, ValueError, "alpha must be in (1, 2], got 3"),
    "alpha_one": ({"alpha": 1.0}, ValueError, "alpha must be in (1, 2], got 1"),
    "alpha_nan": ({"alpha": float("nan")}, ValueError, "alpha must be in (1, 2], got nan"),
    "alpha_shape": ({"alpha_heads": ALPHAS[:, :3]}, ValueError, "alpha must have the shape [2, 4], got [2, 3]"),
    "alpha_dtype": ({"alpha_heads": ALPHAS.float()}, TypeError, "alpha must have the dtype Double, got Float"),
    "alpha_values": (
        {"alpha_heads": ALPHAS.index_fill(1, torch.tensor([2]), 1.0)},
        ValueError,
        "a tensor alpha must hold values in (1, 2], got 1",
    ),
}


@pytest.mark.parametrize("case", OPERATOR_CASES)
def test_operator_error(case):
    changes, error_type, message = OPERATOR_CASES[case]
    with pytest.raises(error_type, match=re.escape(f"adasplash2: {message}")):
        OPS.attention(*attention_op(**changes).values(), False)


BACKWARD_CASES: dict[str, tuple[dict[str, Callable[[torch.Tensor], torch.Tensor]], type[Exception], str]] = {
    "grad_out_shape": (
        {"grad_out": lambda grad: grad[..., :7]},
        ValueError,
        "grad_out must have the shape [2, 4, 5, 8], got [2, 4, 5, 7]",
    ),
    "support_size_shape": (
        {"support_size": lambda size: size[:1]},
        ValueError,
        "support_size must have the shape [2, 4, 5], got [1, 4, 5]",
    ),
    "support_size_dtype": (
        {"support_size": lambda size: size.float()},
        TypeError,
        "support_size must have the dtype Int, got Float",
    ),
    "support_shape": ({"support": lambda support: support[1:]}, ValueError, "support must have the shape ["),
    "support_dtype": (
        {"support": lambda support: support.int()},
        TypeError,
        "support must have the dtype Byte, got Int",
    ),
    "support_strides": (
        {"support": lambda support: support.repeat_interleave(2)[::2]},
        RuntimeError,
        "the saved support must be contiguous",
    ),
    "support_size_strides": (
        {"support_size": lambda size: size.mT.contiguous().mT},
        RuntimeError,
        "the saved support must be contiguous",
    ),
    "alpha": ({"alpha": lambda _: 2.5, "alpha_heads": lambda _: None}, ValueError, "alpha must be in (1, 2], got 2.5"),
    "gradient_of_no_mask": ({"attn_mask": lambda _: None}, RuntimeError, "only a float attn_mask has a gradient"),
    "gradient_of_a_bool_mask": (
        {"attn_mask": lambda mask: mask > 0},
        RuntimeError,
        "only a float attn_mask has a gradient",
    ),
    "gradient_of_no_alpha": ({"alpha_heads": lambda _: None}, RuntimeError, "only a tensor alpha has a gradient"),
}


@pytest.mark.parametrize("case", [None, *BACKWARD_CASES])
def test_backward_operator_error(case):
    arguments = attention_op(attn_mask=mask(2, 1, 5, 7), alpha_heads=ALPHAS)
    out, tau, support_size, _, support = OPS.attention_forward(*arguments.values(), False, True)
    saved = {"tau": tau, "support_size": support_size, "support": support}
    inputs, numbers = list(arguments.items())[:6], list(arguments.items())[6:]
    arguments = {"grad_out": torch.ones_like(out), **dict(inputs), **saved, **dict(numbers)}
    if case is None:
        OPS.attention_backward(*arguments.values(), [True] * 5)
        return
    changes, error_type, message = BACKWARD_CASES[case]
    for name, change in changes.items():
        arguments[name] = change(arguments[name])
    with pytest.raises(error_type, match=re.escape(f"adasplash2: {message}")):
        OPS.attention_backward(*arguments.values(), [True] * 5)


def test_entmax_operator_errors():
    x, prob = torch.randn(3, 4), torch.full((3, 4), 0.25)
    alpha = torch.full((3, 1), 1.5)
    for alpha_number in (1.0, 3.0):
        with pytest.raises(ValueError, match=r"alpha must be in \(1, 2\], got "):
            OPS.entmax_forward(x, alpha_number, None, -1)
        with pytest.raises(ValueError, match=r"alpha must be in \(1, 2\], got "):
            OPS.entmax_backward(x, prob, alpha_number, None, -1, [True, False])
    with pytest.raises(TypeError, match="x must be floating point, got Bool"):
        OPS.entmax_forward(x > 0, 1.5, None, -1)
    with pytest.raises(ValueError, match=r"grad_prob must have the shape \[3, 4\], got \[3, 3\]"):
        OPS.entmax_backward(x[:, :3], prob, 1.5, None, -1, [True, False])
    with pytest.raises(TypeError, match="grad_prob must have the dtype Float, got Double"):
        OPS.entmax_backward(x.double(), prob, 1.5, None, -1, [True, False])
    with pytest.raises(ValueError, match="only a tensor alpha has a gradient"):
        OPS.entmax_backward(x, prob, 1.5, None, -1, [True, True])
    with pytest.raises(ValueError, match="a tensor alpha must hold values"):
        OPS.entmax_backward(x, prob, 0.0, alpha - 0.5, -1, [True, True])
    OPS.entmax_backward(x, prob, 0.0, alpha, -1, [True, True])


@pytest.mark.skipif(_C.has_cuda, reason="the kernels of this build take CUDA tensors")
def test_cuda_tensors_need_the_cuda_kernels():
    """What a CUDA tensor would meet, by its dispatch key: without a GPU there is no such tensor."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    message = re.escape(f"adasplash2: CUDA tensors need the CUDA kernels; {_C.cuda_missing}")
    with pytest.raises(NotImplementedError, match=message):
        OPS.attention_forward.default.redispatch(cuda, *attention_op().values(), False, True)
    with pytest.raises(NotImplementedError, match=message):
        OPS.entmax_forward.default.redispatch(cuda, GOOD["query"], 1.5, None, -1)


# ---------------------------------------------------------------------------------------------- reference


ALL_MASKED = torch.zeros(5, 7, dtype=torch.bool)
REFERENCE_CASES = {
    "dropout": ({"dropout_p": 0.1}, NotImplementedError, "dropout_p must be 0, got 0.1"),
    "mask_and_causal": (
        {"attn_mask": ALL_MASKED, "is_causal": True},
        ValueError,
        "attn_mask must be None when is_causal=True",
    ),
    "alpha": ({"alpha": 2.5}, ValueError, "alpha must be in [1, 2], got 2.5"),
    "alphas": (
        {"alpha": torch.tensor([1.5, 1.0, 1.5, 1.5])},
        ValueError,
        "alpha must hold values in (1, 2], got 1.0 to 1.5",
    ),
    "softmax_aux": (
        {"alpha": 1.0, "return_aux": True},
        NotImplementedError,
        "return_aux needs alpha > 1: softmax has no tau",
    ),
    "method": (
        {"alpha": 1.3, "method": "sort"},
        ValueError,
        "method='sort' needs the number alpha to be 1.5 or 2, got 1.3",
    ),
}


@pytest.mark.parametrize("case", REFERENCE_CASES)
def test_reference_error(case):
    arguments, error_type, message = REFERENCE_CASES[case]
    with pytest.raises(error_type, match=re.escape(message)):
        reference.entmax_attention(**GOOD, **arguments)


def test_reference_entmax_errors():
    x = torch.zeros(3)
    with pytest.raises(ValueError, match=re.escape("alpha must be in [1, 2], got 0.5")):
        reference.entmax(x, 0.5)
    with pytest.raises(ValueError, match=re.escape("alpha must hold values in (1, 2], got 2.5 to 2.5")):
        reference.entmax(x, torch.tensor(2.5))


# ---------------------------------------------------------------------------------------------- build


@pytest.mark.parametrize(
    "switch, message",
    [
        ("yes", "ADASPLASH2_CUDA must be auto, 0 or 1, got yes"),
        ("1", "ADASPLASH2_CUDA=1: this build found no nvcc (in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda)"),
    ],
)
def test_build_switch(switch, message, setup_script, monkeypatch):
    monkeypatch.setenv("ADASPLASH2_CUDA", switch)
    with pytest.raises(SystemExit, match=re.escape(message)):
        setup_script["why_no_cuda"](None)


@pytest.mark.parametrize("entry", ["sm_90", "9", "8.0+SASS"])
def test_build_architectures(entry, setup_script, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", f"8.0;{entry}")
    message = f'TORCH_CUDA_ARCH_LIST: expected entries like 8.0, 9.0a or 8.0+PTX, got "{entry}"'
    with pytest.raises(SystemExit, match=re.escape(message)):
        setup_script["architecture_flags"]()
