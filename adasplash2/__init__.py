"""Exact alpha-entmax attention for PyTorch: sparse attention whose zeros are computed, not chosen.

Method: AdaSplash-2 (arXiv 2604.15180).
"""

from adasplash2 import _C as _C
from adasplash2 import compat, reference
from adasplash2.attention import AttentionAux, entmax_attention

__version__: str = _C.version

__all__ = [
    "AttentionAux",
    "compat",
    "entmax_attention",
    "reference",
]
