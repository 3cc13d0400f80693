"""The attention functions that are measured against each other, all called alike."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from adasplash2 import entmax_attention
from bench.cases import ALPHA, Shape

OURS = "adasplash2"
OURS_SM80 = "adasplash2 sm80"
CUDA_PATH = "ADASPLASH2_CUDA_PATH"  # the environment's; read at each call
TRITON = "adasplash (Triton)"
MAX_SCORE_BYTES = 1 << 30  # of one N x N score tensor of all heads; a dense implementation holds several at a time


@dataclass(frozen=True)
class Peer:
    name: str
    call: Callable[[Tensor, Tensor, Tensor, bool], Tensor]  # (query, key, value, is_causal) -> out
    depends_on_data: bool = False  # its time does
    is_dense: bool = False  # it holds all N x N scores
    cuda_path: str | None = None  # of adasplash2, where not the one it takes by itself

    @contextlib.contextmanager
    def on_its_path(self) -> Iterator[None]:
        """To be around `call` and its backward pass."""
        if self.cuda_path is None:
            yield
            return
        before = os.environ.get(CUDA_PATH)
        os.environ[CUDA_PATH] = self.cuda_path
        try:
            yield
        finally:
            if before is None:
                del os.environ[CUDA_PATH]
            else:
                os.environ[CUDA_PATH] = before


def baseline_name(device: str) -> str:
    """Whose time the ratios are relative to."""
    return "sdpa" if device == "cpu" else "sdpa flash"


def peers(device: str) -> list[Peer]:
    ours = Peer(OURS, _entmax, depends_on_data=True)
    dense = Peer("entmax (dense)", _dense_entmax, is_dense=True)
    if device == "cpu":
        return [ours, Peer("sdpa", _sdpa), dense]
    on_hopper = torch.cuda.get_device_capability(device) == (9, 0)  # elsewhere sm80 is what it takes by itself
    return [
        ours,
        *([Peer(OURS_SM80, _entmax, depends_on_data=True, cuda_path="sm80")] if on_hopper else []),
        Peer("sdpa flash", functools.partial(_sdpa_backend, SDPBackend.FLASH_ATTENTION)),
        Peer("sdpa cudnn", functools.partial(_sdpa_backend, SDPBackend.CUDNN_ATTENTION)),
        Peer("flex", _flex),
        Peer(TRITON, _triton_adasplash, depends_on_data=True),
        dense,
    ]


@functools.cache
def why_not(peer: Peer, shape: Shape, device: str) -> str | None:
    """Why a peer cannot run here on tensors of this kind (found by trying), or None if it can."""
    if peer.is_dense and shape.batch * shape.num_heads * shape.length**2 * shape.dtype.itemsize > MAX_SCORE_BYTES:
        return f"would hold several N x N tensors of over {MAX_SCORE_BYTES >> 20} MiB"
    size = (1, 1, 256, shape.head_dim)
    query, key, value = (torch.randn(size, device=device, dtype=shape.dtype, requires_grad=True) for _ in range(3))
    try:
        with peer.on_its_path():
            peer.call(query, key, value, shape.is_causal).sum().backward()
    except Exception as error:  # no matter which: it is the answer
        return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return None


def _entmax(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    return entmax_attention(query, key, value, is_causal=is_causal, alpha=ALPHA)  # type: ignore[return-value]


def _sdpa(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)


def _sdpa_backend(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    with sdpa_kernel(backend):
        return _sdpa(query, key, value, is_causal)


def _dense_entmax(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    """What one writes with the PyPI package `entmax`: all scores, entmax, product with value."""
    from entmax import entmax15

    score = query @ key.mT * query.shape[-1] ** -0.5
    if is_causal:
        score = score.masked_fill(_above_diagonal(query.shape[-2], query.device), -torch.inf)
    return entmax15(score, dim=-1) @ value


@functools.lru_cache(maxsize=1)
def _above_diagonal(length: int, device: torch.device) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)


def _flex(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    mask = _causal_block_mask(query.shape[-2], query.device) if is_causal else None
    return _compiled_flex_attention()(query, key, value, block_mask=mask)


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.cache_size_limit = 64  # one entry a shape
    return torch.compile(flex_attention, dynamic=False)


@functools.lru_cache(maxsize=1)
def _causal_block_mask(length: int, device: torch.device) -> Any:
    from torch.nn.attention.flex_attention import create_block_mask

    return create_block_mask(lambda b, h, row, col: row >= col, None, None, length, length, device=device)


def _triton_adasplash(query: Tensor, key: Tensor, value: Tensor, is_causal: bool) -> Tensor:
    from adasplash import adasplash

    return adasplash(query, key, value, alpha=ALPHA, is_causal=is_causal)
