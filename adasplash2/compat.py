"""The names of the Triton package ``adasplash`` (0.2.2), so that its users change one import:

    from adasplash2.compat import adasplash, triton_entmax

Its conventions hold: scores are scaled by 1 / sqrt(D); :func:`adasplash` is causal by default, the v1 functions are
not; ``varlen`` (B,) gives the valid length of each sequence, and output rows past it are zero. Its limits do not: any
length, head dim, strides and float dtype will do, and keys and values may have fewer heads than queries everywhere.

Solver settings (``niter``, ``n_iter``, ``use_histogram``, ``fast_math``) are accepted and have no effect: tau is always
exact to rounding here.
"""

from __future__ import annotations

from torch import Tensor

from adasplash2.attention import entmax_attention
from adasplash2.entmax import entmax

__all__ = [
    "adasplash",
    "adasplash2",
    "adasplash_no_block_mask",
    "adasplash_v1",
    "adasplash_v2",
    "triton_entmax",
    "triton_entmax15",
    "triton_entmax_v1",
    "triton_entmax_v2",
    "triton_sparsemax",
]


def adasplash(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float = 1.5,
    is_causal: bool = True,
    varlen: Tensor | None = None,
    niter: int | None = None,
) -> Tensor:
    """Attention of q (B, H, N, D) over k and v (B, Hkv, N, D), causal unless told otherwise."""
    return entmax_attention(q, k, v, is_causal=is_causal, enable_gqa=True, alpha=alpha, key_lengths=varlen)


def adasplash_v1(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float = 1.5,
    is_causal: bool = False,
    varlen: Tensor | None = None,
    niter: int = 10,
) -> Tensor:
    """:func:`adasplash`, not causal unless told so."""
    return adasplash(q, k, v, alpha, is_causal, varlen)


def adasplash_no_block_mask(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alpha: float = 1.5,
    is_causal: bool = False,
    varlen: Tensor | None = None,
    niter: int = 10,
) -> Tensor:
    """:func:`adasplash_v1`; whether tiles are skipped is no choice of the caller's here."""
    return adasplash(q, k, v, alpha, is_causal, varlen)


def adasplash_v2(q: Tensor, k: Tensor, v: Tensor, niter: int = 1, varlen: Tensor | None = None) -> Tensor:
    """:func:`adasplash` with alpha = 1.5, always causal."""
    return adasplash(q, k, v, varlen=varlen)


adasplash2 = adasplash_v2


def triton_entmax(
    x: Tensor, alpha: float = 1.5, n_iter: int = 2, use_histogram: bool = True, fast_math: bool = False
) -> Tensor:
    """entmax over the last dimension of x."""
    return entmax(x, alpha)


triton_entmax_v2 = triton_entmax


def triton_entmax_v1(x: Tensor, alpha: float = 1.5, n_iter: int = 10, fast_math: bool = True) -> Tensor:
    """:func:`triton_entmax` under its first signature."""
    return entmax(x, alpha)


def triton_sparsemax(x: Tensor, n_iter: int = 2, use_histogram: bool = True, fast_math: bool = False) -> Tensor:
    """:func:`triton_entmax` with alpha = 2."""
    return entmax(x, 2.0)


def triton_entmax15(x: Tensor, n_iter: int = 2, use_histogram: bool = True, fast_math: bool = False) -> Tensor:
    """:func:`triton_entmax` with alpha = 1.5."""
    return entmax(x, 1.5)
