"""Inputs for the attention benchmarks, described by what entmax makes of them: support size and live tiles.

Softmax attention takes the same time on any numbers; entmax attention does not. So every case is drawn to a stated mean
support, and carries the support size and the live-tile fraction that it really has.

- Gaussian query and key, the query's scale found by bisection. The support is scattered: at long contexts nearly every
  tile holds some of it.
- Blocks: each block of keys has one topic, each block of queries attends to some of the topics, and every tile of
  another topic is dead. The share of topics is the live-tile fraction; within the live tiles scores are Gaussian.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adasplash2 import AttentionAux, entmax_attention

DENSE = math.inf  # as a wanted support: half of the keys that a query sees on average
ALPHA = 1.5

TILE = 64  # of the live-tile fraction
NUM_TOPICS = 20  # live-tile fractions come in steps of 1 / NUM_TOPICS
# Scores of another topic must stay more than 1 / (alpha - 1) below the best of the own topic, noise included.
TOPIC_SCORE = 16.0

SAMPLED_BLOCKS = 8  # of TILE rows of the first head, to find the scale with
BISECTION_STEPS = 14  # of the scale's logarithm: to 0.1%
MIN_SCALE, MAX_SCALE = 1e-3, 30.0


@dataclass(frozen=True)
class Shape:
    """All that the time of softmax attention depends on."""

    batch: int
    num_heads: int
    length: int
    head_dim: int
    dtype: torch.dtype
    is_causal: bool

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        causal = " causal" if self.is_causal else ""
        return f"{self.dtype_name} B={self.batch} H={self.num_heads} N={self.length} D={self.head_dim}{causal}"


@dataclass(frozen=True)
class Data:
    """What the numbers are like."""

    support: float  # wanted mean support size
    live_tiles: float | None = None  # wanted live-tile fraction; None: Gaussian, as it comes

    def __str__(self) -> str:
        support = "dense" if self.support == DENSE else f"{self.support:g}"
        return f"S={support}" + ("" if self.live_tiles is None else f" live={self.live_tiles:g}")


@dataclass(frozen=True)
class Inputs:
    """One case, ready to run; query, key and value ask for gradients."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    scale: float  # standard deviation of the (noise of the) scores
    support_size: float  # mean over all rows
    live_tile_fraction: float  # mean over all heads
    is_sampled: bool  # the last two come from a sample of rows, because the op does not run on this device


def make_inputs(shape: Shape, data: Data, device: str, seed: int = 0) -> Inputs:
    """Draws the case on the CPU, so that it is the same on every device."""
    query, key, value, grad_out = _gaussian((shape.batch, shape.num_heads, shape.length, shape.head_dim), seed)
    if data.live_tiles is not None:
        query, key = _give_topics(query, key, data.live_tiles, torch.Generator().manual_seed(seed))
    scale = _find_scale(query, key, shape.is_causal, data.live_tiles is not None, _wanted_support(shape, data))
    query = _scaled(query, scale, data.live_tiles is not None)

    aux, is_sampled = None, False
    query, key, value, grad_out = (x.to(device, shape.dtype) for x in (query, key, value, grad_out))
    try:
        aux = _aux(query, key, is_causal=shape.is_causal)
    except NotImplementedError:
        aux, is_sampled = _sampled_aux(query.float().cpu(), key.float().cpu(), shape.is_causal), True
    return Inputs(
        query.requires_grad_(),
        key.requires_grad_(),
        value.requires_grad_(),
        grad_out,
        scale,
        aux.support_size.float().mean().item(),
        aux.live_tile_fraction.mean().item(),
        is_sampled,
    )


@functools.lru_cache(maxsize=1)
def _gaussian(size: tuple[int, ...], seed: int) -> tuple[Tensor, ...]:
    """Four tensors; the cases of a shape share them."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(size, generator=generator) for _ in range(4))


def _wanted_support(shape: Shape, data: Data) -> float:
    if data.support != DENSE:
        return data.support
    mean_visible = (shape.length + 1) / 2 if shape.is_causal else shape.length
    return mean_visible / 2


def _find_scale(query: Tensor, key: Tensor, is_causal: bool, has_topics: bool, wanted_support: float) -> float:
    """The standard deviation of the scores at which the mean support is as wanted: the wider, the fewer keys."""
    lower, upper = MIN_SCALE, MAX_SCALE
    for _ in range(BISECTION_STEPS):
        middle = (lower * upper) ** 0.5
        aux = _sampled_aux(_scaled(query[:1, :1], middle, has_topics), key, is_causal)
        if aux.support_size.float().mean() > wanted_support:
            lower = middle
        else:
            upper = middle
    return (lower * upper) ** 0.5


def _scaled(query: Tensor, scale: float, has_topics: bool) -> Tensor:
    """query with the Gaussian features scaled so that their part of the scores has this standard deviation."""
    if not has_topics:
        return query * scale
    num_gaussian = query.shape[-1] - NUM_TOPICS
    topics, gaussian = query.split((NUM_TOPICS, num_gaussian), dim=-1)
    return torch.cat((topics, gaussian * scale * (query.shape[-1] / num_gaussian) ** 0.5), dim=-1)


def _give_topics(query: Tensor, key: Tensor, live_tiles: float, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Overwrites the first NUM_TOPICS features: a block of keys has one topic, a block of queries reads some.

    Topics are dealt evenly to the blocks of keys, so that every block of queries has the wanted live-tile fraction.
    """
    batch, num_heads, length, head_dim = query.shape
    num_blocks = -(-length // TILE)
    num_read = max(1, round(live_tiles * NUM_TOPICS))
    order = torch.rand(batch, num_heads, num_blocks, generator=generator).argsort(-1)
    key_topic = torch.nn.functional.one_hot(order % NUM_TOPICS, NUM_TOPICS)
    query_topics = torch.rand(batch, num_heads, num_blocks, NUM_TOPICS, generator=generator).argsort(-1) < num_read
    query, key = query.clone(), key.clone()
    for x, topics, size in ((query, query_topics, TOPIC_SCORE * head_dim**0.5), (key, key_topic, 1.0)):
        x[..., :NUM_TOPICS] = (topics * size).repeat_interleave(TILE, dim=-2)[..., :length, :]
    return query, key


def _sampled_aux(query: Tensor, key: Tensor, is_causal: bool) -> AttentionAux:
    """Of SAMPLED_BLOCKS blocks of rows, evenly spaced, of the first head."""
    length = query.shape[-2]
    first = (torch.linspace(0, length - TILE, SAMPLED_BLOCKS) / TILE).round().long() * TILE
    rows = (first[:, None] + torch.arange(TILE)).flatten().clamp(max=length - 1)
    visible = torch.arange(length) <= rows[:, None] if is_causal else None
    return _aux(query[:1, :1, rows], key[:1, :1], attn_mask=visible)


def _aux(query: Tensor, key: Tensor, **options: Any) -> AttentionAux:
    _, aux = entmax_attention(query.detach(), key.detach(), key.detach(), alpha=ALPHA, return_aux=True, **options)
    return aux
