"""Exact alpha-entmax attention for PyTorch: sparse attention whose zeros are computed, not chosen.

Method: AdaSplash-2 (arXiv 2604.15180).
"""

import torch  # noqa: F401  (first: it loads the libraries that _C links against)

from adasplash2 import _C as _C
from adasplash2 import compat, reference
from adasplash2.attention import AttentionAux, entmax_attention
from adasplash2.entmax import entmax, entmax15, sparsemax

__version__: str = _C.version

__all__ = [
    "AttentionAux",
    "compat",
    "entmax",
    "entmax15",
    "entmax_attention",
    "reference",
    "sparsemax",
]
