"""The operation's definition in plain PyTorch: dense, exact, for any floating dtype.

Readable first; it forms all Nq x Nk scores and shares no code with the fast paths, which is what makes it their oracle
(run it in float64). With ``z = (alpha - 1) * score`` and ``b = 1 / (alpha - 1)``,

    prob_j = [z_j - tau]_+ ^ b,        tau the unique number with sum_j prob_j = 1.

Two independent algorithms find tau and test each other: sorting (exact, alpha 1.5 and 2) and bisection (any alpha).

Sources: Martins & Astudillo 2016 (sparsemax), Peters et al. 2019 (entmax, sorting for alpha = 1.5), Blondel et al. 2020
(bisection), Correia et al. 2019 (gradient by alpha).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from adasplash2.attention import AttentionAux

__all__ = ["entmax", "entmax15", "entmax_attention", "sparsemax"]

Method = Literal["auto", "sort", "bisection"]

TILE = 64  # live_tile_fraction counts tiles of TILE queries x TILE keys
BISECTION_STEPS = 24  # leaves tau within 2^-24 of its bracket, which is at most 1 wide
NEWTON_STEPS = 5  # from there quadratic convergence reaches float64 rounding with room to spare


def entmax(x: Tensor, alpha: float | Tensor = 1.5, dim: int = -1, *, method: Method = "auto") -> Tensor:
    """``prob = argmax_{p in simplex} <p, x> + H_alpha(p)`` along ``dim``; alpha = 1 is softmax, alpha = 2 sparsemax.

    Args:
        x: scores, any shape. An entry of -inf gets probability 0; a slice that is all -inf gives zeros; a slice with
            a NaN or +inf gives NaN.
        alpha: a number in [1, 2], or a tensor of values in (1, 2] broadcastable to ``x`` with size 1 at ``dim``; a
            tensor that requires grad gets its gradient.
        dim: the dimension to normalise.
        method: how tau is found; ``"auto"`` sorts where sorting is exact (alpha 1.5 and 2) and bisects elsewhere.

    Returns:
        Probabilities of the shape and dtype of ``x``; half precisions are computed in float32 and rounded once.
    """
    _check_alpha(alpha)
    if _is_softmax(alpha):
        empty = (x == -math.inf).all(dim, keepdim=True)
        return torch.softmax(x.masked_fill(empty, 0.0), dim).masked_fill(empty, 0.0)
    alpha_last = alpha
    if isinstance(alpha, Tensor):
        alpha_last = alpha.expand([1 if d == dim % x.ndim else size for d, size in enumerate(x.shape)]).movedim(dim, -1)
    prob: Tensor = _Entmax.apply(x.movedim(dim, -1), alpha_last, method)
    return prob.movedim(-1, dim)


def entmax15(x: Tensor, dim: int = -1) -> Tensor:
    """:func:`entmax` with alpha = 1.5: ``prob = [x / 2 - tau]_+^2``."""
    return entmax(x, 1.5, dim)


def sparsemax(x: Tensor, dim: int = -1) -> Tensor:
    """:func:`entmax` with alpha = 2: the Euclidean projection of ``x`` onto the simplex, ``prob = [x - tau]_+``."""
    return entmax(x, 2.0, dim)


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
    method: Method = "auto",
) -> Tensor | tuple[Tensor, AttentionAux]:
    """``out_i = sum_j entmax(scale * <query_i, key_j> + attn_mask_ij)_j value_j``, every product formed in full.

    A key outside the support contributes exactly nothing, forward and backward, even where its value is NaN.

    Args:
        query: (..., H, Nq, D); key: (..., Hkv, Nk, D); value: (..., Hkv, Nk, Dv).
        attn_mask: broadcastable to (..., H, Nq, Nk); bool (True = take part) or added to the score.
        is_causal: key j is seen by query i when j <= i + Nk - Nq.
        scale: default 1 / sqrt(D).
        enable_gqa: query head h reads key and value head h // (H / Hkv).
        alpha: a number in [1, 2], or a tensor of values in (1, 2] broadcastable to (..., H).
        key_lengths: (B,) integers, one for each of the leading dimensions' entries; keys at and past the length take
            no part, nor do query rows when Nq == Nk.
        return_aux: also return an :class:`AttentionAux`.
        method: as for :func:`entmax`.
    """
    _check_alpha(alpha)
    if dropout_p:
        raise NotImplementedError(f"dropout_p must be 0, got {dropout_p}")
    if attn_mask is not None and is_causal:
        raise ValueError("attn_mask must be None when is_causal=True")
    if enable_gqa:
        group_size = query.shape[-3] // key.shape[-3]
        key, value = (t.repeat_interleave(group_size, dim=-3) for t in (key, value))
    batch_shape = torch.broadcast_shapes(query.shape[:-3], key.shape[:-3], value.shape[:-3])
    query, key, value = (t.expand(*batch_shape, *t.shape[-3:]) for t in (query, key, value))
    if key_lengths is not None:
        key_lengths = key_lengths.reshape(batch_shape)
    scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else scale

    score_shape = (*query.shape[:-1], key.shape[-2])  # (..., H, Nq, Nk)
    visible = _visible(score_shape, attn_mask, is_causal, key_lengths, query.device)
    bias = None
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        bias = attn_mask.expand(score_shape)

    if _is_softmax(alpha):
        if return_aux:
            raise NotImplementedError("return_aux needs alpha > 1: softmax has no tau")
        score = (query @ key.mT) * scale if bias is None else (query @ key.mT) * scale + bias
        return entmax(score.masked_fill(~visible, -math.inf), 1.0) @ value

    if isinstance(alpha, Tensor):
        alpha = alpha.expand(query.shape[:-2])[..., None, None]  # (..., H, 1, 1)
    out: Tensor
    out, tau, prob = _EntmaxAttention.apply(query, key, value, bias, visible, alpha, scale, method)
    if not return_aux:
        return out
    support = prob > 0
    num_live, num_reachable = _count_tiles(support), _count_tiles(visible)
    return out, AttentionAux(tau, support.sum(-1, dtype=torch.int32), num_live / num_reachable.clamp(min=1))


# ---------------------------------------------------------------------------------------------- tau


def _tau_by_sorting(shifted: Tensor, alpha: float | Tensor) -> Tensor:
    """Exact tau of z = `shifted` (..., n), row maximum 0: try every support size k at once on the sorted row.

    tau_k solves sum_{j <= k} (z_(j) - tau_k)^b = 1 over the k largest; the true k is the last with z_(k) > tau_k.
    """
    ranked = shifted.sort(-1, descending=True).values
    size = torch.arange(1, ranked.shape[-1] + 1, device=ranked.device, dtype=ranked.dtype)
    mean = ranked.cumsum(-1) / size
    if alpha == 2.0:
        tau_by_size = mean - 1.0 / size
    else:
        variance = ranked.square().cumsum(-1) / size - mean.square()
        tau_by_size = mean - (1.0 / size - variance).clamp(min=0.0).sqrt()
    support_size = (tau_by_size < ranked).sum(-1, keepdim=True).clamp(min=1)
    return tau_by_size.gather(-1, support_size - 1)


def _tau_by_bisection(shifted: Tensor, alpha: float | Tensor) -> Tensor:
    """tau of z = `shifted` (..., n), row maximum 0, from the bracket [-1, -n^(1 - alpha)], for any alpha in (1, 2].

    f(tau) = sum_j [z_j - tau]_+^b falls with tau. Newton then runs on the convex norm f^(1/b) - 1 from the left end,
    so it never passes the root.
    """
    b = 1.0 / (alpha - 1.0)
    lower = torch.full_like(shifted[..., :1], -1.0)
    upper = torch.zeros_like(lower) - float(shifted.shape[-1]) ** (1.0 - alpha)
    for _ in range(BISECTION_STEPS):
        middle = 0.5 * (lower + upper)
        is_left = (shifted - middle).clamp(min=0.0).pow(b).sum(-1, keepdim=True) >= 1.0
        lower, upper = torch.where(is_left, middle, lower), torch.where(is_left, upper, middle)
    for _ in range(NEWTON_STEPS):
        gap = (shifted - lower).clamp(min=0.0)
        total = gap.pow(b).sum(-1, keepdim=True)
        slope = _power_on_support(gap, b - 1.0).sum(-1, keepdim=True)
        lower = lower + (total - total.pow(1.0 - 1.0 / b)) / slope
    return lower


def _power_on_support(base: Tensor, exponent: float | Tensor) -> Tensor:
    """base^exponent where base > 0 and 0 elsewhere (plain pow has 0^0 = 1)."""
    return torch.where(base > 0, base.pow(exponent), 0.0)


def _solve(score: Tensor, alpha: float | Tensor, method: Method) -> tuple[Tensor, Tensor]:
    """prob (..., n) and tau (..., 1) of the scores (..., n), both in at least float32."""
    wide = torch.promote_types(score.dtype, torch.float32)
    if isinstance(alpha, Tensor):
        alpha = alpha.detach().to(wide)
    if score.shape[-1] == 0:
        return score.to(wide), torch.full((*score.shape[:-1], 1), math.inf, device=score.device, dtype=wide)
    is_sortable = not isinstance(alpha, Tensor) and alpha in (1.5, 2.0)
    if method == "sort" and not is_sortable:
        raise ValueError(f"method='sort' needs the number alpha to be 1.5 or 2, got {alpha}")

    z = (alpha - 1.0) * score.to(wide)
    row_max = z.amax(-1, keepdim=True)
    is_empty, is_invalid = row_max == -math.inf, row_max.isnan() | (row_max == math.inf)
    # tau >= row_max - 1, so everything below that may as well stand at row_max - 2: no infinities, no large squares.
    shifted = (z - row_max.masked_fill(is_empty | is_invalid, 0.0)).clamp(-2.0, 0.0)
    shifted = shifted.masked_fill(is_invalid, 0.0)
    use_sorting = method == "sort" or (method == "auto" and is_sortable)
    tau = _tau_by_sorting(shifted, alpha) if use_sorting else _tau_by_bisection(shifted, alpha)

    b = 1.0 / (alpha - 1.0)
    gap = (shifted - tau).clamp(min=0.0)
    # One more Newton step takes out the rounding of the cumulative sums, which grows with the support.
    tau = tau + (gap.pow(b).sum(-1, keepdim=True) - 1.0) / (b * _power_on_support(gap, b - 1.0).sum(-1, keepdim=True))
    prob = (shifted - tau).clamp(min=0.0).pow(b)

    prob = prob.masked_fill(is_empty, 0.0).masked_fill(is_invalid, math.nan)
    tau = (row_max + tau).masked_fill(is_empty, math.inf).masked_fill(is_invalid, math.nan)
    return prob, tau


# ---------------------------------------------------------------------------------------------- gradients


def _grad_score(prob: Tensor, grad_prob: Tensor, alpha: float | Tensor) -> Tensor:
    """``dS = w (dP - delta)``, ``w = prob^(2 - alpha)`` on the support, ``delta = sum w dP / sum w``."""
    weight = _power_on_support(prob, 2.0 - alpha).masked_fill(prob.isnan(), math.nan)
    grad_prob = torch.where(prob == 0, 0.0, grad_prob)
    weight_sum = weight.sum(-1, keepdim=True)
    delta = (weight * grad_prob).sum(-1, keepdim=True) / torch.where(weight_sum == 0, 1.0, weight_sum)
    return torch.where(prob == 0, 0.0, weight * (grad_prob - delta))


def _grad_alpha(prob: Tensor, grad_prob: Tensor, alpha: Tensor) -> Tensor:
    """``<dP, dprob/dalpha>`` per row, (..., 1), with ``h = -prob log prob`` and ``pt = w / sum w``:

    ``dprob/dalpha = (prob - pt) / (alpha - 1)^2 + (h - pt sum h) / (alpha - 1)``.
    """
    weight = _power_on_support(prob, 2.0 - alpha)
    weight_sum = weight.sum(-1, keepdim=True)
    tilted = weight / torch.where(weight_sum == 0, 1.0, weight_sum)
    entropy = -torch.xlogy(prob, prob)
    prob_by_alpha = (prob - tilted) / (alpha - 1.0) ** 2
    prob_by_alpha = prob_by_alpha + (entropy - tilted * entropy.sum(-1, keepdim=True)) / (alpha - 1.0)
    return (torch.where(prob == 0, 0.0, grad_prob) * prob_by_alpha).sum(-1, keepdim=True)


def _matmul_on_support(weight: Tensor, rows: Tensor) -> Tensor:
    """``weight @ rows`` where an exact zero of `weight` (..., m, n) absorbs anything in `rows` (..., n, d), NaN too."""
    if not rows.isfinite().all():
        is_used = (weight != 0).any(-2).unsqueeze(-1)
        rows = torch.where(is_used, rows, 0.0)  # masked keys and padding, mostly
    if rows.isfinite().all():
        return weight @ rows
    weight = weight.unsqueeze(-1)
    return torch.where(weight == 0, 0.0, weight * rows.unsqueeze(-3)).sum(-2)


class _Entmax(torch.autograd.Function):
    """entmax over the last dimension of x (..., n); alpha is a number or a tensor (..., 1)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float | Tensor, method: Method) -> Tensor:
        prob, _ = _solve(x, alpha, method)
        ctx.alpha = alpha
        ctx.save_for_backward(prob)
        return prob.to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (prob,) = ctx.saved_tensors
        alpha, grad_prob = ctx.alpha, grad.to(prob.dtype)
        grad_x = _grad_score(prob, grad_prob, alpha).to(grad.dtype) if ctx.needs_input_grad[0] else None
        grad_alpha = _grad_alpha(prob, grad_prob, alpha).to(alpha.dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_alpha, None


class _EntmaxAttention(torch.autograd.Function):
    """Attention of (..., N, D) tensors with equal leading dimensions. `visible` and `bias` are (..., Nq, Nk)."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        bias: Tensor | None,
        visible: Tensor,
        alpha: float | Tensor,
        scale: float,
        method: Method,
    ) -> tuple[Tensor, Tensor, Tensor]:
        score = (query @ key.mT) * scale
        if bias is not None:
            score = score + bias
        prob, tau = _solve(score.masked_fill(~visible, -math.inf), alpha, method)
        prob = prob.masked_fill(~visible, 0.0)  # a row that is NaN leaves the keys it cannot see alone
        out = _matmul_on_support(prob.to(value.dtype), value)
        tau = tau.squeeze(-1)

        ctx.save_for_backward(query, key, value, prob)
        ctx.alpha, ctx.scale = alpha, scale
        ctx.mark_non_differentiable(tau, prob)
        return out, tau, prob

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, prob = ctx.saved_tensors
        needs_query, needs_key, needs_value, needs_bias, _, needs_alpha, *_ = ctx.needs_input_grad
        is_invalid = prob.isnan().any(-1, keepdim=True)  # a NaN row tells its query so, and no other input
        prob = prob.masked_fill(is_invalid, 0.0)
        grad_prob = (grad_out @ value.mT).to(prob.dtype)
        grad_score = _grad_score(prob, grad_prob, ctx.alpha).to(query.dtype)
        grad_query = _matmul_on_support(grad_score, key) * ctx.scale
        return (
            grad_query.masked_fill(is_invalid, math.nan) if needs_query else None,
            _matmul_on_support(grad_score.mT, query) * ctx.scale if needs_key else None,
            _matmul_on_support(prob.to(value.dtype).mT, grad_out) if needs_value else None,
            grad_score if needs_bias else None,
            None,
            _grad_alpha(prob, grad_prob, ctx.alpha).sum(-2, keepdim=True).to(ctx.alpha.dtype) if needs_alpha else None,
            None,
            None,
        )


# ---------------------------------------------------------------------------------------------- masks and tiles


def _visible(
    score_shape: tuple[int, ...],
    attn_mask: Tensor | None,
    is_causal: bool,
    key_lengths: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Which (query, key) pairs may take part, bool (..., H, Nq, Nk)."""
    num_queries, num_keys = score_shape[-2:]
    row = torch.arange(num_queries, device=device)[:, None]
    col = torch.arange(num_keys, device=device)
    visible = torch.ones(score_shape, dtype=torch.bool, device=device)
    if attn_mask is not None:
        visible = visible & (attn_mask if attn_mask.dtype == torch.bool else attn_mask != -math.inf)
    if is_causal:
        visible = visible & (col <= row + num_keys - num_queries)
    if key_lengths is not None:
        length = key_lengths[..., None, None, None]
        visible = visible & (col < length)
        if num_queries == num_keys:
            visible = visible & (row < length)
    return visible


def _count_tiles(pairs: Tensor) -> Tensor:
    """The number of TILE x TILE tiles of `pairs` (..., Nq, Nk) that hold a True, float32 (...)."""
    num_queries, num_keys = pairs.shape[-2:]
    if pairs.numel() == 0:  # which pad() of torch 2.6 refuses
        return pairs.new_zeros(pairs.shape[:-2], dtype=torch.float32)
    padded = torch.nn.functional.pad(pairs, (0, -num_keys % TILE, 0, -num_queries % TILE))
    tiles = padded.reshape(*pairs.shape[:-2], padded.shape[-2] // TILE, TILE, padded.shape[-1] // TILE, TILE)
    count: Tensor = tiles.any(-1).any(-2).sum((-1, -2), dtype=torch.float32)
    return count


def _is_softmax(alpha: float | Tensor) -> bool:
    return not isinstance(alpha, Tensor) and alpha == 1


def _check_alpha(alpha: float | Tensor) -> None:
    if isinstance(alpha, Tensor):
        if not ((alpha > 1) & (alpha <= 2)).all():
            raise ValueError(f"alpha must hold values in (1, 2], got {alpha.min().item()} to {alpha.max().item()}")
    elif not 1 <= alpha <= 2:
        raise ValueError(f"alpha must be in [1, 2], got {alpha}")
