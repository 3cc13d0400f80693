"""alpha-entmax as a plain activation, over one dimension of a tensor (docs/algorithm.md, section 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adasplash2 import _C as _C  # registers torch.ops.adasplash2
from adasplash2.autograd import refuse_functional_transforms

__all__ = ["entmax", "entmax15", "sparsemax"]

HALF_PRECISIONS = (torch.bfloat16, torch.float16)

# The gradient by x takes its weights, prob^(2 - alpha), from the saved prob. Below 2^-25 a prob is zero in float16, and
# its weight with it: from this alpha on more than half a rounding, 2^-12, of the largest weight there can be. Then prob
# is saved in float32.
LARGEST_FLOAT16_ALPHA = 2 - 12 / 25


def entmax(x: Tensor, alpha: float | Tensor = 1.5, dim: int = -1) -> Tensor:
    """``prob_j = [(alpha - 1) x_j - tau]_+ ^ (1 / (alpha - 1))`` along `dim`, tau such that they sum to 1.

    alpha = 1 is softmax, alpha = 2 sparsemax. Exact: no sorting, no iteration count to choose. Differentiable once, by
    `x` and by `alpha`; the gradient of the gradient raises an error, and so do functional transforms (torch.func),
    unless alpha = 1.

    Args:
        x: scores, any shape and strides; float32, bfloat16, float16 or float64. An entry of -inf gets probability 0, a
            slice that is all -inf gives zeros, a slice with a NaN or +inf gives NaN.
        alpha: a number in [1, 2], or a floating tensor of values in (1, 2] that broadcasts to `x` with size 1 at `dim`
            (its values are not checked on other devices than the CPU).
        dim: the dimension to normalise.

    Returns:
        Probabilities of the shape and dtype of `x`; half precisions are computed in float32 and rounded once.
    """
    if not (isinstance(x, Tensor) and x.is_floating_point()):
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"x must be a floating point tensor, got {got}")
    if isinstance(alpha, Tensor):
        # The gradient by alpha is a difference of sums over the saved prob: it needs prob unrounded.
        is_by_alpha = alpha.requires_grad and x.dtype in HALF_PRECISIONS
        if is_by_alpha or (x.requires_grad and x.dtype == torch.float16):
            return _entmax(x.float(), 0.0, alpha, dim).to(x.dtype)
        return _entmax(x, 0.0, alpha, dim)
    if not 1 <= alpha <= 2:
        raise ValueError(f"alpha must be in [1, 2], got {alpha}")
    if alpha == 1:
        return _softmax(x, dim)
    if x.requires_grad and x.dtype == torch.float16 and alpha > LARGEST_FLOAT16_ALPHA:
        return _entmax(x.float(), alpha, None, dim).to(x.dtype)
    return _entmax(x, alpha, None, dim)


def entmax15(x: Tensor, dim: int = -1) -> Tensor:
    """:func:`entmax` with alpha = 1.5: ``prob = [x / 2 - tau]_+^2``."""
    return entmax(x, 1.5, dim)


def sparsemax(x: Tensor, dim: int = -1) -> Tensor:
    """:func:`entmax` with alpha = 2: the Euclidean projection of `x` onto the simplex, ``prob = [x - tau]_+``."""
    return entmax(x, 2.0, dim)


def _entmax(x: Tensor, alpha: float, alpha_slices: Tensor | None, dim: int) -> Tensor:
    refuse_functional_transforms("adasplash2.entmax")
    prob: Tensor = torch.ops.adasplash2.entmax_forward(x, alpha, alpha_slices, dim)
    return prob


def _softmax(x: Tensor, dim: int) -> Tensor:
    """torch's softmax, but a slice that is all -inf gives zeros, as for every other alpha."""
    is_empty = (x == -math.inf).all(dim, keepdim=True)
    return torch.softmax(x.masked_fill(is_empty, 0.0), dim).masked_fill(is_empty, 0.0)


@torch.library.register_fake("adasplash2::entmax_forward")
def _entmax_forward_fake(x: Tensor, alpha: float, alpha_slices: Tensor | None, dim: int) -> Tensor:
    return torch.empty_like(x)


@torch.library.register_fake("adasplash2::entmax_backward")
def _entmax_backward_fake(
    grad_prob: Tensor, prob: Tensor, alpha: float, alpha_slices: Tensor | None, dim: int, wanted: list[bool]
) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty_like(prob) if wanted[0] else prob.new_empty(0)
    grad_alpha = torch.empty_like(alpha_slices) if wanted[1] and alpha_slices is not None else prob.new_empty(0)
    return grad_x, grad_alpha
