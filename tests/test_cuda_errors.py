"""Every error of the CUDA launch layer (csrc/cuda/launch.cpp, any_arch/entmax.cu): good calls with one thing changed.

As in test_cuda_attention.py the library is the emulator's, or nvcc's where there is a GPU. No kernel runs but the good
call's.
"""

from __future__ import annotations

import ctypes
import re
from typing import Any

import cases
import pytest
import torch
from cases import Shape
from kernels import library

MASK_ELEMENT = ctypes.c_uint16(0)  # no kernel gets to read it
NUMBER = ctypes.c_double(1.5)


@pytest.fixture(scope="module")
def good() -> tuple[library.Run, torch.Tensor]:
    """A forward pass of 64 queries and keys, and a gradient of its out."""
    query, key, value, grad_out = (
        t.to(library.device()) for t in cases.inputs("gaussian", Shape(1, 2, 64, 64), torch.bfloat16)
    )
    return library.forward(library.build(), query, key, value), grad_out


def changed(call: Any, changes: dict[str, Any]) -> Any:
    """`call` with fields set by their paths, as "problem.query.data"; a function makes the new value of the old one."""
    for path, new in changes.items():
        *folders, name = path.split(".")
        struct = call
        for folder in folders:
            struct = getattr(struct, folder)
        setattr(struct, name, new(getattr(struct, name)) if callable(new) else new)
    return call


def forward_call(run: library.Run) -> library.Forward:
    # Structures are copied where they become a part of another one.
    rows = [library.Rows.of(tensor) for tensor in (run.out, run.gap_mean_v)]
    pointers = [t.data_ptr() for t in (run.tau, run.support_size, run.block_mask_words, run.workspace)]
    return library.Forward(run.problem, *rows, *pointers, None, library.PATHS.index("auto"))


def backward_call(run: library.Run, grad_out: torch.Tensor) -> library.Backward:
    rows = [library.Rows.of(tensor) for tensor in (run.gap_mean_v, grad_out, *(run.inputs[n] for n in run.inputs))]
    pointers = [run.tau.data_ptr(), run.block_mask_words.data_ptr()]
    rest = [None, None, run.workspace.data_ptr(), None, library.PATHS.index("auto")]
    return library.Backward(run.problem, *pointers, *rows, *rest)


def misaligned(address: int) -> int:
    return address + 2


def refused(run: library.Run, name: str, call: ctypes.Structure, message: str) -> None:
    tensors = {**run.inputs, "workspace": run.workspace}
    with pytest.raises(Exception, match=re.escape(f"adasplash2: {message}")):
        library.build().call(name, ctypes.byref(call), tensors=tensors)


PROBLEM_ERRORS = {
    "float64": ({"dtype": 3}, "dtype: the CUDA kernels take bfloat16, float16 and float32"),
    "mask of another dtype": (
        {"mask": library.Mask(ctypes.addressof(MASK_ELEMENT), 0)},
        "attn_mask must be bool or of the dtype of query",
    ),
    "scale": ({"scale": float("nan")}, "scale must be finite on CUDA"),
    "wide heads": ({"value_head_dim": 264}, "head dims above 256 are not built for CUDA"),
    "no head dim": ({"head_dim": 0}, "head dims must be positive"),
    "no value head dim": ({"value_head_dim": 0}, "head dims must be positive"),
    "odd head dim": ({"value_head_dim": 60}, "head dims that are not multiples of 8 are not built for CUDA"),
    "queries": ({"num_queries": 2**20 + 1}, "more than 2^20 queries or keys"),
    "keys": ({"num_keys": 2**20 + 1}, "more than 2^20 queries or keys"),
    "heads": ({"num_heads": 2**15, "num_kv_heads": 2**15}, "more than 2^15 heads or 2^16 sequences"),
    "sequences": ({"batch": 2**16}, "more than 2^15 heads or 2^16 sequences"),
    "kv heads": ({"num_kv_heads": 3}, "the heads of query must be a multiple of those of key and value"),
    "no kv heads": ({"num_kv_heads": 0}, "the heads of query must be a multiple of those of key and value"),
    "alpha": ({"alpha": 1.0}, "alpha must be in (1, 2]"),
    "NaN for alpha": ({"alpha": float("nan")}, "alpha must be in (1, 2]"),
    "query missing": ({"query.data": None}, "query is missing"),
    "key missing": ({"key.data": None}, "key is missing"),
    "value missing": ({"value.data": None}, "value is missing"),
    "query address": ({"query.data": misaligned}, "query: rows must be 16-byte aligned"),
    "key rows": ({"key.stride_row": 65}, "key: rows must be 16-byte aligned"),
    "value heads": ({"value.stride_head": 4097}, "value: rows must be 16-byte aligned"),
    "query sequences": ({"query.stride_batch": 4}, "query: rows must be 16-byte aligned"),
}


@pytest.mark.parametrize("case", PROBLEM_ERRORS)
def test_problem(case, good):
    changes, message = PROBLEM_ERRORS[case]
    changes = {f"problem.{path}": new for path, new in changes.items()}
    run, grad_out = good
    refused(run, "attention_forward", changed(forward_call(run), changes), message)
    refused(run, "attention_backward", changed(backward_call(run, grad_out), changes), message)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"out.data": None}, "out is missing"),
        ({"out.data": misaligned}, "out: rows must be 16-byte aligned"),
        ({"gap_mean_v.data": misaligned}, "gap_mean_v: rows must be 16-byte aligned"),
    ],
)
def test_forward(changes, message, good):
    run, _ = good
    refused(run, "attention_forward", changed(forward_call(run), changes), message)


BOOL_MASK = library.Mask(ctypes.addressof(MASK_ELEMENT), library._DTYPES[torch.bool])
SPARSE_MASK = library.Mask(ctypes.addressof(MASK_ELEMENT), library._DTYPES[torch.bfloat16], 0, 0, 128, 2)
GRADIENT = {"grad_mask": ctypes.addressof(MASK_ELEMENT)}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"gap_mean_v.data": None}, "gap_mean_v is missing"),
        ({"gap_mean_v.data": misaligned}, "gap_mean_v: rows must be 16-byte aligned"),
        ({"grad_out.data": None}, "grad_out is missing"),
        ({"grad_out.stride_row": 4}, "grad_out: rows must be 16-byte aligned"),
        ({"grad_query.data": misaligned}, "grad_query: rows must be 16-byte aligned"),
        ({"grad_key.data": misaligned}, "grad_key: rows must be 16-byte aligned"),
        ({"grad_value.data": misaligned}, "grad_value: rows must be 16-byte aligned"),
        ({"grad_alpha": ctypes.addressof(NUMBER)}, "only a tensor alpha has a gradient"),
        (GRADIENT, "only a float attn_mask has a gradient"),
        (GRADIENT | {"problem.mask": BOOL_MASK}, "only a float attn_mask has a gradient"),
        (GRADIENT | {"problem.mask": SPARSE_MASK}, "an attn_mask with a gradient must be dense"),
    ],
)
def test_backward(changes, message, good):
    run, grad_out = good
    refused(run, "attention_backward", changed(backward_call(run, grad_out), changes), message)


@pytest.mark.skipif("sm90" not in library.covered_paths(), reason="no Hopper here")
@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"dtype": 0}, "they take bfloat16 and float16, head dims up to 128"),
        ({"head_dim": 136}, "they take bfloat16 and float16, head dims up to 128"),
        ({"num_keys": 0}, "there are no queries or no keys"),
        ({"mask": BOOL_MASK}, "they have no attn_mask"),
        ({"scale": -1.0}, "the scale is not positive"),
        ({"key.stride_head": 0}, "TMA cannot take the strides"),
        ({"query.stride_head": 2**40}, "TMA cannot take the strides"),
    ],
)
def test_hopper_asked_for(changes, reason, good):
    run, grad_out = good
    changes = {f"problem.{path}": new for path, new in changes.items()} | {"path": library.PATHS.index("sm90")}
    message = f"the sm90 kernels cannot run here: {reason}"
    refused(run, "attention_forward", changed(forward_call(run), changes), message)
    refused(run, "attention_backward", changed(backward_call(run, grad_out), changes), message)


def test_path_names():
    """What ADASPLASH2_CUDA_PATH may be: its value goes this way."""
    for name in library.PATHS:
        library.build().call("path_named", ctypes.c_char_p(name.encode()))
    with pytest.raises(Exception, match="the CUDA path must be auto, sm80 or sm90, got sm100"):
        library.build().call("path_named", ctypes.c_char_p(b"sm100"))


@pytest.mark.parametrize(
    "dtype, alpha, message",
    [
        (torch.bool, 1.5, "entmax of a bool tensor"),
        (torch.float32, 1.0, "alpha must be in (1, 2]"),
        (torch.float32, float("nan"), "alpha must be in (1, 2]"),
    ],
)
def test_entmax(dtype, alpha, message):
    problem = library.EntmaxProblem(library._DTYPES[dtype], 1, 4, 1, alpha)
    build = library.build(library.ENTMAX)
    for name, call in (
        ("entmax_forward", library.EntmaxForward(problem)),
        ("entmax_backward", library.EntmaxBackward(problem)),
    ):
        with pytest.raises(Exception, match=re.escape(f"adasplash2: {message}")):
            build.call(name, ctypes.byref(call), ctypes.c_void_p(None))
