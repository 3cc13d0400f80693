"""alpha-entmax attention: the drop-in counterpart of torch.nn.functional.scaled_dot_product_attention."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from adasplash2.autograd import refuse_functional_transforms  # and registers the fake kernels

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class AttentionAux(NamedTuple):
    """What ``entmax_attention(..., return_aux=True)`` tells about the sparsity of its result.

    Attributes:
        tau: ``(..., H, Nq)``, float32 (float64 for float64 inputs): the threshold of each row in units of
            ``z = (alpha - 1) * score``; +inf for a row without keys, NaN for a row with a NaN score.
        support_size: ``(..., H, Nq)``, int32: the number of keys with a probability above zero.
        live_tile_fraction: ``(..., H)``, float32: of the 64 x 64 tiles (queries x keys) that have an unmasked pair, the
            fraction with a probability above zero; 0 where there is no such tile.
    """

    tau: Tensor
    support_size: Tensor
    live_tile_fraction: Tensor


@overload
def entmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    alpha: float | Tensor = 1.5,
    key_lengths: Tensor | None = None,
    return_aux: Literal[False] = False,
) -> Tensor: ...
@overload
def entmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    alpha: float | Tensor = 1.5,
    key_lengths: Tensor | None = None,
    return_aux: Literal[True],
) -> tuple[Tensor, AttentionAux]: ...
def entmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    alpha: float | Tensor = 1.5,
    key_lengths: Tensor | None = None,
    return_aux: bool = False,
) -> Tensor | tuple[Tensor, AttentionAux]:
    r"""Attention with :math:`\alpha`-entmax in the place of softmax: exact, sparse, differentiable.

    .. math::
        s_{ij} = \sigma \langle q_i, k_j \rangle + \mathrm{mask}_{ij}, \qquad
        p_{ij} = [(\alpha - 1) s_{ij} - \tau_i]_+^{1 / (\alpha - 1)}, \qquad
        \mathrm{out}_i = \sum_j p_{ij} v_j

    with :math:`\tau_i` the number for which :math:`\sum_j p_{ij} = 1`. Probabilities of keys whose score is far below
    the best one are exactly zero; forward and backward never touch them. Signature and conventions are those of
    :func:`torch.nn.functional.scaled_dot_product_attention`.

    Args:
        query: ``(..., Hq, Nq, D)``; float32, bfloat16, float16 or float64 (not on CUDA). Any strides.
        key: ``(..., Hkv, Nk, D)``, of the dtype of ``query``.
        value: ``(..., Hkv, Nk, Dv)``, of the dtype of ``query``. Leading dimensions broadcast.
        attn_mask: broadcastable to ``(..., Hq, Nq, Nk)``. bool: True = the key takes part. Float, of the dtype of
            ``query``: added to the score, before the factor ``alpha - 1``; differentiable. Default: none.
        dropout_p: must be 0; dropout is not built.
        is_causal: query ``i`` sees the keys ``j <= i + Nk - Nq`` (aligned to the bottom right corner, as in
            FlashAttention). Default: False.
        scale: the factor :math:`\sigma`. Default: ``1 / sqrt(D)``.
        enable_gqa: allow ``Hq`` to be a multiple of ``Hkv``; query head ``h`` reads kv head ``h // (Hq // Hkv)``.
        alpha: 1 <= alpha <= 2: 1 is softmax (handed to ``scaled_dot_product_attention``), 1.5 the fast case, 2
            sparsemax. Or a tensor broadcastable to ``(..., Hq)`` with values in (1, 2]: an alpha per head,
            differentiable, as in Correia et al. 2019 (its values are not checked on other devices than the CPU).
        key_lengths: ``(B,)`` integers, for right-padded batches: keys at and past the length take no part. Where
            ``Nq == Nk`` the queries at and past it are padding as well: zero output, zero gradients. A length below
            0 counts as 0, one above ``Nk`` as ``Nk``.
        return_aux: also return an :class:`AttentionAux`.

    Returns:
        ``(..., Hq, Nq, Dv)``, of the dtype of ``query``; with ``return_aux`` a pair of it and an :class:`AttentionAux`.
        A row without keys is zero. A row with a NaN or +inf score is NaN (and no other row); its gradient with respect
        to ``query`` is NaN, and it adds nothing to the other gradients. On CUDA, entries of ``key``, ``value`` or the
        gradient of the result that are NaN or infinite may spread further, within tiles of 64 queries and 64 keys that
        have a probability above zero, and an infinite entry of ``query`` or ``key`` in float32 counts as NaN:
        docs/algorithm.md, "Rows that are special".

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or alpha are not as described.
        NotImplementedError: ``dropout_p > 0``, or a functional transform (``torch.func``). On CUDA also head dims above
            256.

    Source: entmax, its gradient and its bounds: Peters et al. 2019; alpha per head: Correia et al. 2019; one-scan
    attention: AdaSplash-2, arXiv 2604.15180.
    """
    if dropout_p != 0.0:
        raise NotImplementedError(f"adasplash2.entmax_attention: dropout_p is not built, expected 0.0, got {dropout_p}")
    _check_inputs(query, key, value, attn_mask, is_causal, enable_gqa)
    alpha_number, alpha_tensor = _split_alpha(alpha)
    if alpha_tensor is None and alpha_number == 1.0:
        return _softmax_attention(query, key, value, attn_mask, is_causal, scale, enable_gqa, key_lengths, return_aux)

    batch_shape = _batch_shape(query, key, value)
    num_heads, num_queries, num_keys = query.shape[-3] if query.dim() > 2 else 1, query.shape[-2], key.shape[-2]
    if attn_mask is not None:
        attn_mask = _four_dims(attn_mask, batch_shape, (num_heads, num_queries, num_keys))
    if alpha_tensor is not None:
        alpha_tensor = _alpha_per_head(alpha_tensor, batch_shape, num_heads, query)
    if key_lengths is not None:
        key_lengths = _check_key_lengths(key_lengths, batch_shape, query)
    sigma = 1.0 / math.sqrt(query.shape[-1]) if scale is None and query.shape[-1] > 0 else scale
    out, tau, support_size, block_mask = torch.ops.adasplash2.attention(
        _rows(query, batch_shape),
        _rows(key, batch_shape),
        _rows(value, batch_shape),
        attn_mask,
        key_lengths,
        alpha_tensor,
        alpha_number,
        1.0 if sigma is None else float(sigma),
        is_causal,
        return_aux,
    )
    head_shape = (*batch_shape, num_heads) if query.dim() > 2 else batch_shape
    if query.dim() != 4:
        out = out.reshape(*head_shape, num_queries, value.shape[-1])
    if not return_aux:
        return out
    unmasked = (block_mask & 1).sum((-2, -1), dtype=torch.float32)
    live = (block_mask >> 1).sum((-2, -1), dtype=torch.float32)
    return out, AttentionAux(
        tau=tau.reshape(*head_shape, num_queries),
        support_size=support_size.reshape(*head_shape, num_queries),
        live_tile_fraction=(live / unmasked.clamp(min=1)).reshape(head_shape),
    )


def _check_inputs(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> None:
    name = "adasplash2.entmax_attention"
    refuse_functional_transforms(name)
    for label, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() < 2:
            raise ValueError(f"{name}: {label} must have at least 2 dimensions (N, D), got shape {tuple(tensor.shape)}")
        if tensor.dtype not in _DTYPES:
            raise TypeError(f"{name}: {label} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")
        if tensor.dtype != query.dtype and not torch.is_autocast_enabled(query.device.type):
            raise TypeError(f"{name}: query, key and value must have one dtype, got {query.dtype} and {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name}: {label} must be on the device of query ({query.device}), got {tensor.device}")
    if key.dim() != query.dim() or value.dim() != query.dim():
        raise ValueError(
            f"{name}: query, key and value must have the same number of dimensions, "
            f"got {query.dim()}, {key.dim()} and {value.dim()}"
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError(
            f"{name}: query and key must have the same head dim, got {query.shape[-1]} and {key.shape[-1]}"
        )
    if key.shape[-2] != value.shape[-2]:
        raise ValueError(f"{name}: key and value must have the same length, got {key.shape[-2]} and {value.shape[-2]}")
    if query.dim() > 2:
        num_heads, num_kv_heads = query.shape[-3], key.shape[-3]
        if value.shape[-3] != num_kv_heads:
            raise ValueError(
                f"{name}: key and value must have the same number of heads, got {num_kv_heads} and {value.shape[-3]}"
            )
        if num_heads != num_kv_heads and not enable_gqa:
            raise ValueError(
                f"{name}: query has {num_heads} heads and key {num_kv_heads}; "
                "expected the same number, or enable_gqa=True"
            )
        if num_heads != num_kv_heads and (num_kv_heads == 0 or num_heads % num_kv_heads != 0):
            raise ValueError(
                f"{name}: with enable_gqa the heads of query must be a multiple of those of key, "
                f"got {num_heads} and {num_kv_heads}"
            )
    if attn_mask is not None:
        if is_causal:
            raise ValueError(f"{name}: attn_mask and is_causal=True exclude each other, got both")
        if attn_mask.dtype not in (torch.bool, query.dtype):
            raise TypeError(
                f"{name}: attn_mask must be bool or of query's dtype ({query.dtype}), got {attn_mask.dtype}"
            )
        if attn_mask.device != query.device:
            raise ValueError(
                f"{name}: attn_mask must be on the device of query ({query.device}), got {attn_mask.device}"
            )


def _split_alpha(alpha: float | Tensor) -> tuple[float, Tensor | None]:
    """(number, None) or (unused number, tensor)."""
    if isinstance(alpha, Tensor):
        if not alpha.is_floating_point():
            raise TypeError(f"adasplash2.entmax_attention: a tensor alpha must be floating point, got {alpha.dtype}")
        if alpha.device.type == "cpu" and not torch.compiler.is_compiling():
            values = alpha.detach()
            if not bool(((values > 1) & (values <= 2)).all()):
                raise ValueError(
                    "adasplash2.entmax_attention: a tensor alpha must be in (1, 2], "
                    f"got values from {values.min().item()} to {values.max().item()}"
                )
        return 1.5, alpha
    if not 1.0 <= alpha <= 2.0:
        raise ValueError(f"adasplash2.entmax_attention: alpha must be in [1, 2], got {alpha}")
    return float(alpha), None


def _batch_shape(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    shapes = [tensor.shape[:-3] for tensor in (query, key, value)]
    if shapes[0] == shapes[1] == shapes[2]:
        return tuple(shapes[0])
    try:
        return tuple(torch.broadcast_shapes(*shapes))
    except RuntimeError as error:
        raise ValueError(
            "adasplash2.entmax_attention: the leading dimensions of query, key and value must broadcast, got "
            f"{tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}"
        ) from error


def _rows(tensor: Tensor, batch_shape: tuple[int, ...]) -> Tensor:
    """The tensor as (batch, heads, rows, dim)."""
    if tensor.dim() == 4 and tensor.shape[0] == batch_shape[0]:
        return tensor
    tail = tensor.shape[-3:] if tensor.dim() > 2 else (1, *tensor.shape)
    return tensor.expand(*batch_shape, *tail).reshape(math.prod(batch_shape), *tail)


def _four_dims(mask: Tensor, batch_shape: tuple[int, ...], tail: tuple[int, ...]) -> Tensor:
    """A mask broadcastable to (*batch_shape, *tail) with exactly 4 dimensions, broadcast ones left at size 1."""
    full = (*batch_shape, *tail)
    while mask.dim() < len(full):
        mask = mask.unsqueeze(0)
    is_broadcastable = mask.dim() == len(full) and all(m in (1, n) for m, n in zip(mask.shape, full, strict=True))
    if not is_broadcastable:
        raise ValueError(
            f"adasplash2.entmax_attention: attn_mask must broadcast to {full}, got shape {tuple(mask.shape)}"
        )
    if len(batch_shape) == 1:
        return mask
    if math.prod(mask.shape[:-3]) == 1:
        return mask.reshape(1, *mask.shape[-3:])
    return mask.expand(*batch_shape, *mask.shape[-3:]).reshape(math.prod(batch_shape), *mask.shape[-3:])


def _alpha_per_head(alpha: Tensor, batch_shape: tuple[int, ...], num_heads: int, query: Tensor) -> Tensor:
    if alpha.device != query.device:
        raise ValueError(
            f"adasplash2.entmax_attention: alpha must be on the device of query ({query.device}), got {alpha.device}"
        )
    full = (*batch_shape, num_heads)
    try:
        expanded = alpha.to(torch.float64).expand(full)
    except RuntimeError as error:
        raise ValueError(
            f"adasplash2.entmax_attention: alpha must broadcast to (batch, heads) = {full}, "
            f"got shape {tuple(alpha.shape)}"
        ) from error
    return expanded if len(batch_shape) == 1 else expanded.reshape(math.prod(batch_shape), num_heads)


def _check_key_lengths(key_lengths: Tensor, batch_shape: tuple[int, ...], query: Tensor) -> Tensor:
    batch = math.prod(batch_shape)
    if key_lengths.shape != (batch,):
        raise ValueError(
            f"adasplash2.entmax_attention: key_lengths must have shape ({batch},), got {tuple(key_lengths.shape)}"
        )
    if key_lengths.is_floating_point() or key_lengths.dtype == torch.bool:
        raise TypeError(f"adasplash2.entmax_attention: key_lengths must be integers, got {key_lengths.dtype}")
    if key_lengths.device != query.device:
        raise ValueError(
            "adasplash2.entmax_attention: key_lengths must be on the device of query "
            f"({query.device}), got {key_lengths.device}"
        )
    return key_lengths


def _softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
    key_lengths: Tensor | None,
    return_aux: bool,
) -> Tensor:
    """alpha = 1. What SDPA has no argument for (lengths, bottom-right causal) becomes a mask."""
    if return_aux:
        raise NotImplementedError("adasplash2.entmax_attention: return_aux is not built for alpha = 1 (softmax)")
    num_queries, num_keys = query.shape[-2], key.shape[-2]
    padding = None
    if is_causal and (num_queries != num_keys or key_lengths is not None):
        attn_mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device).tril(
            num_keys - num_queries
        )
        is_causal = False
    if key_lengths is not None:
        batch_shape = _batch_shape(query, key, value)
        lengths = _check_key_lengths(key_lengths, batch_shape, query).reshape(*batch_shape, 1, 1, 1)
        takes_part = torch.arange(num_keys, device=query.device) < lengths
        if attn_mask is None or attn_mask.dtype == torch.bool:
            attn_mask = takes_part if attn_mask is None else takes_part & attn_mask
        else:
            attn_mask = attn_mask.masked_fill(~takes_part, -math.inf)
        if num_queries == num_keys:
            padding = ~takes_part.transpose(-2, -1)
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return out if padding is None else out.masked_fill(padding, 0.0)
