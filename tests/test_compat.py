"""The Triton package's names: their signatures, and what each means in terms of the reference."""

from __future__ import annotations

import inspect

import cases
import pytest
import torch

from adasplash2 import compat, reference

# Name -> parameters with defaults, as published in adasplash 0.2.2.
ATTENTION_V1 = "(q, k, v, alpha=1.5, is_causal=False, varlen=None, niter=10)"
SIGNATURES = {
    "adasplash": "(q, k, v, alpha=1.5, is_causal=True, varlen=None, niter=None)",
    "adasplash_v1": ATTENTION_V1,
    "adasplash_no_block_mask": ATTENTION_V1,
    "adasplash_v2": "(q, k, v, niter=1, varlen=None)",
    "adasplash2": "(q, k, v, niter=1, varlen=None)",
    "triton_entmax": "(x, alpha=1.5, n_iter=2, use_histogram=True, fast_math=False)",
    "triton_entmax_v2": "(x, alpha=1.5, n_iter=2, use_histogram=True, fast_math=False)",
    "triton_entmax_v1": "(x, alpha=1.5, n_iter=10, fast_math=True)",
    "triton_sparsemax": "(x, n_iter=2, use_histogram=True, fast_math=False)",
    "triton_entmax15": "(x, n_iter=2, use_histogram=True, fast_math=False)",
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    signature = inspect.signature(getattr(compat, name))
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    assert str(inspect.Signature(bare)) == SIGNATURES[name]


def test_every_public_name_is_covered():
    assert set(compat.__all__) == set(SIGNATURES)


SHAPE = cases.Shape(batch=2, heads=4, kv_heads=2, num_queries=70, num_keys=70, head_dim=16)
LENGTHS = torch.tensor([70, 31], dtype=torch.int32)


@pytest.mark.parametrize(
    ("name", "arguments", "meaning"),
    [
        ("adasplash", {}, {"is_causal": True}),
        ("adasplash", {"niter": 4, "varlen": LENGTHS}, {"is_causal": True, "key_lengths": LENGTHS}),
        ("adasplash", {"is_causal": False}, {}),
        ("adasplash", {"alpha": 1.3}, {"is_causal": True, "alpha": 1.3}),
        ("adasplash_v1", {}, {}),
        ("adasplash_v1", {"alpha": 2.0, "is_causal": True}, {"alpha": 2.0, "is_causal": True}),
        ("adasplash_v1", {"varlen": LENGTHS, "niter": 3}, {"key_lengths": LENGTHS}),
        ("adasplash_no_block_mask", {"alpha": 1.7, "varlen": LENGTHS}, {"alpha": 1.7, "key_lengths": LENGTHS}),
        ("adasplash_v2", {}, {"is_causal": True}),
        ("adasplash_v2", {"niter": 2, "varlen": LENGTHS}, {"is_causal": True, "key_lengths": LENGTHS}),
        ("adasplash2", {}, {"is_causal": True}),
    ],
)
def test_attention(name, arguments, meaning):
    query, key, value, _ = cases.inputs("gaussian", SHAPE, torch.float64)
    out = getattr(compat, name)(query, key, value, **arguments)
    expected = reference.entmax_attention(query, key, value, enable_gqa=True, **meaning)
    torch.testing.assert_close(out, expected)
    if "varlen" in arguments:
        assert (out[1, :, 31:] == 0).all()


@pytest.mark.parametrize(
    ("name", "arguments", "alpha"),
    [
        ("triton_entmax", {}, 1.5),
        ("triton_entmax", {"alpha": 1.3, "n_iter": 5, "use_histogram": False, "fast_math": True}, 1.3),
        ("triton_entmax_v2", {"alpha": 2.0}, 2.0),
        ("triton_entmax_v1", {"alpha": 1.2, "n_iter": 20, "fast_math": False}, 1.2),
        ("triton_sparsemax", {"n_iter": 3}, 2.0),
        ("triton_entmax15", {"use_histogram": False}, 1.5),
    ],
)
def test_entmax(name, arguments, alpha):
    x = torch.randn(12, 130, dtype=torch.float64)
    torch.testing.assert_close(getattr(compat, name)(x, **arguments), reference.entmax(x, alpha))
