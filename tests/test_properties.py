"""Hypothesis over sizes, layouts, dtypes, alpha, masks and options: forward and backward keep the rule."""

from __future__ import annotations

from dataclasses import dataclass

import cases
import hypothesis
import tolerance
import torch
from hypothesis import strategies as st

import adasplash2

# Examples are fixed (derandomize), so that a run tells of the code and not of its luck.
SETTINGS = hypothesis.settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)

LAYOUTS = ("contiguous", "slice", "transposed", "strided")


@dataclass
class Problem:
    name: str
    shape: cases.Shape
    dtype: torch.dtype
    layouts: tuple[str, ...]
    needs_grad: tuple[bool, ...]
    options: dict[str, object]


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    torch.manual_seed(draw(st.integers(0, 1000)))
    kv_heads = draw(st.integers(1, 3))
    group_size = draw(st.sampled_from([1, 1, 2, 4]))
    shape = cases.Shape(
        batch=draw(st.integers(1, 3)),
        heads=kv_heads * group_size,
        kv_heads=kv_heads,
        num_queries=draw(st.integers(1, 110)),
        num_keys=draw(st.integers(1, 200) | st.integers(257, 800)),
        head_dim=draw(st.integers(1, 80)),
        value_head_dim=draw(st.integers(1, 80)),
    )
    dtype = draw(st.sampled_from(cases.DTYPES))
    options: dict[str, object] = {"enable_gqa": group_size > 1}
    alpha = draw(st.sampled_from([1.5, 1.5, 2.0, "number", "tensor"]))
    if alpha == "number":
        alpha = draw(st.floats(1.05, 2.0))
    elif alpha == "tensor":
        size = draw(st.sampled_from([(), (shape.heads,), (shape.batch, 1), (shape.batch, shape.heads)]))
        alpha = torch.empty(size).uniform_(1.1, 2.0).requires_grad_(draw(st.booleans()))
    options["alpha"] = alpha
    if draw(st.booleans()):
        options["scale"] = draw(st.floats(-1.0, 1.0))
    match draw(st.sampled_from(["none", "causal", "bool", "float"])):
        case "causal":
            options["is_causal"] = True
        case "bool" | "float" as kind:
            full = (shape.batch, shape.heads, shape.num_queries, shape.num_keys)
            size = tuple(draw(st.sampled_from([1, n])) for n in full)[draw(st.integers(0, 3)) :]
            visible = torch.rand(size) < draw(st.sampled_from([0.1, 0.5, 0.95]))
            options["attn_mask"] = visible
            if kind == "float":
                bias = torch.randn(size).to(dtype).masked_fill(~visible, -torch.inf)
                options["attn_mask"] = bias.requires_grad_(draw(st.booleans()))
    if draw(st.sampled_from([False, False, True])):
        lengths = st.integers(0, shape.num_keys)
        options["key_lengths"] = torch.tensor([draw(lengths) for _ in range(shape.batch)])
    return Problem(
        name=draw(st.sampled_from(["gaussian", "sparse", "mixed_rows", "dense", "tied", "rising", "outlier_channel"])),
        shape=shape,
        dtype=dtype,
        layouts=tuple(draw(st.sampled_from(LAYOUTS)) for _ in range(4)),
        needs_grad=tuple(draw(st.booleans()) for _ in range(3)),
        options=options,
    )


@SETTINGS
@hypothesis.given(problem=problems())
def test_rule_holds(problem):
    tensors = [
        t if layout == "contiguous" else cases.poisoned(t, layout).detach()
        for t, layout in zip(cases.inputs(problem.name, problem.shape, problem.dtype), problem.layouts, strict=True)
    ]
    for tensor, needs_grad in zip(tensors, problem.needs_grad, strict=False):
        tensor.requires_grad_(needs_grad)
    tolerance.check(adasplash2.entmax_attention, *tensors, **problem.options)
