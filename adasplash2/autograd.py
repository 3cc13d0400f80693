"""Fake kernels of the operators: shapes and dtypes without data, for torch.compile and meta tensors; what is refused.

The schemas, autograd and autocast are registered in C++ (csrc/binding.cpp). What is saved for the backward pass differs
between devices: csrc/cpu/support_layout.h, csrc/cuda/support_layout.h.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from adasplash2 import _C

_MASK_TILE = 64


def refuse_functional_transforms(name: str) -> None:
    """torch.func wraps tensors and looks for rules that our operators have not; its own error names neither."""
    if not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None:
        raise NotImplementedError(
            f"{name}: functional transforms (torch.func) are not supported; expected plain tensors"
        )


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
    want_aux: bool,
    want_support: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, num_heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    rows = (batch, num_heads, num_queries)
    tiles = (batch, num_heads, -(-num_queries // _MASK_TILE), -(-num_keys // _MASK_TILE))
    support_bytes = _support_bytes(query, num_keys, value.shape[3]) if want_support else 0
    return (
        query.new_empty((*rows, value.shape[3])),
        query.new_empty(rows, dtype=_accumulation_dtype(query.dtype)),
        query.new_empty(rows if want_aux or query.device.type != "cuda" else (0,), dtype=torch.int32),
        query.new_empty(tiles if want_aux else (0,), dtype=torch.uint8),
        query.new_empty((support_bytes,), dtype=torch.uint8),
    )


def _support_bytes(query: Tensor, num_keys: int, value_head_dim: int) -> int:
    """The size of the saved support: SupportLayout of the device, in symbolic integers."""
    batch, num_heads, num_queries, _ = query.shape
    if query.device.type == "cuda":
        mask_rows, mask_keys, head_dim_multiple = _C.cuda_support_layout
        words_per_group = -(-num_keys // mask_keys // 32)
        mask_bytes = batch * num_heads * -(-num_queries // mask_rows) * words_per_group * 4
        padded_head_dim = _round_up(value_head_dim, head_dim_multiple)
        return _round_up(mask_bytes, 16) + batch * num_heads * num_queries * padded_head_dim * query.dtype.itemsize
    row_block, strip_keys, saved_per_row, alignment = _C.support_layout
    real_bytes = 8 if query.dtype == torch.float64 else 4
    origins = _round_up(alignment + batch * num_heads * num_queries * 2 * real_bytes, alignment)
    num_blocks = batch * num_heads * -(-num_queries // row_block)
    is_saved = torch.sym_min(num_keys // (strip_keys + 1), 1)  # 1 where num_keys > strip_keys, without a guard
    block_entries = is_saved * row_block * torch.sym_min(num_keys, saved_per_row)
    return _round_up(origins + num_blocks * 8, alignment) + num_blocks * block_entries * (real_bytes + 4)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


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
    want_aux: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _attention_forward_fake(
        query, key, value, attn_mask, key_lengths, alpha_heads, alpha, scale, is_causal, want_aux, False
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
    tau: Tensor,
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
