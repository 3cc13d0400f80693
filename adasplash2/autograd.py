"""Fake kernels of the operators: shapes and dtypes without data, for torch.compile and meta tensors.

The schemas, autograd and autocast are registered in C++ (csrc/binding.cpp). What the backward pass saves, and why it is
not the probabilities, is described in csrc/cpu/support_layout.h.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adasplash2 import _C

_MASK_TILE = 64


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.library.register_fake("adasplash2::attention_forward")
def _attention_forward_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    alpha_heads: Tensor | None,
    alpha: float,
    scale: float,
    is_causal: bool,
    want_block_mask: bool,
    want_support: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, num_heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    rows = (batch, num_heads, num_queries)
    tiles = (batch, num_heads, -(-num_queries // _MASK_TILE), -(-num_keys // _MASK_TILE))
    support_bytes = _support_bytes(query.dtype, batch * num_heads, num_queries, num_keys) if want_support else 0
    return (
        query.new_empty((*rows, value.shape[3])),
        query.new_empty(rows, dtype=_accumulation_dtype(query.dtype)),
        query.new_empty(rows, dtype=torch.int32),
        query.new_empty(tiles if want_block_mask else (0,), dtype=torch.uint8),
        query.new_empty((support_bytes,), dtype=torch.uint8),
    )


def _support_bytes(dtype: torch.dtype, num_heads: int, num_queries: int, num_keys: int) -> int:
    """The size of the saved support, SupportLayout::bytes of csrc/cpu/support_layout.h in symbolic integers."""
    row_block, saved_per_row, header_bytes = _C.support_layout
    real_bytes = 8 if dtype == torch.float64 else 4
    origins = -(-num_heads * num_queries * 2 * real_bytes // 64) * 64
    region = header_bytes + row_block * torch.sym_min(num_keys, saved_per_row) * (real_bytes + 4)
    return origins + num_heads * -(-num_queries // row_block) * region


@torch.library.register_fake("adasplash2::attention")
def _attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    alpha_heads: Tensor | None,
    alpha: float,
    scale: float,
    is_causal: bool,
    want_block_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _attention_forward_fake(
        query, key, value, attn_mask, key_lengths, alpha_heads, alpha, scale, is_causal, want_block_mask, False
    )[:4]


@torch.library.register_fake("adasplash2::attention_backward")
def _attention_backward_fake(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_lengths: Tensor | None,
    alpha_heads: Tensor | None,
    support_size: Tensor,
    support: Tensor,
    alpha: float,
    scale: float,
    is_causal: bool,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    def gradient(is_wanted: bool, like: Tensor | None, dtype: torch.dtype) -> Tensor:
        shape = like.shape if is_wanted and like is not None else (0,)
        return query.new_empty(shape, dtype=dtype)

    return (
        gradient(wanted[0], query, query.dtype),
        gradient(wanted[1], key, query.dtype),
        gradient(wanted[2], value, query.dtype),
        gradient(wanted[3], attn_mask, query.dtype),
        gradient(wanted[4], alpha_heads, torch.float64),
    )
