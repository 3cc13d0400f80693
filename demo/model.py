"""A small causal transformer over bytes, with softmax or entmax attention and nothing else different.

Pre-norm blocks, rotary positions, queries and keys normalised per head, SwiGLU, tied embeddings. Beside its own
embedding each byte has one of the two and of the three bytes that end with it, looked up by hash (as in the Byte Latent
Transformer): that spares a small model the first thousand steps, in which it would learn to spell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adasplash2 import entmax_attention

NUM_BYTES = 256
NGRAM_SIZES = (2, 3)
HASH_BITS = 13  # of each table of n-grams
ROTARY_BASE = 10_000.0
INIT_STD = 0.02

AttentionKind = Literal["softmax", "entmax"]


@dataclass(frozen=True)
class ModelConfig:
    attention: AttentionKind = "entmax"
    num_layers: int = 4
    num_heads: int = 2
    head_dim: int = 64
    learn_alpha: bool = False

    @property
    def width(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def hidden(self) -> int:
        """Three matrices of this width weigh about as much as the two of a plain MLP of 4 * width."""
        return self.width * 8 // 3 // 32 * 32


class HeadInputs(NamedTuple):
    """What one layer's attention was called with."""

    query: Tensor  # (B, H, N, D)
    key: Tensor  # (B, H, N, D)
    value: Tensor  # (B, H, N, D)
    alpha: float | Tensor  # a number or (H,)


class Cache:
    """What has been read so far: the text (B, N), and the keys and values (B, H, N, D) of each layer."""

    def __init__(self) -> None:
        self.text: Tensor | None = None
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}

    def extend_text(self, text: Tensor) -> Tensor:
        self.text = text if self.text is None else torch.cat((self.text, text), -1)
        return self.text

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        if layer in self.layers:
            seen_key, seen_value = self.layers[layer]
            key, value = torch.cat((seen_key, key), -2), torch.cat((seen_value, value), -2)
        self.layers[layer] = key, value
        return key, value


class Attention(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.to_qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.to_out = nn.Linear(config.width, config.width, bias=False)
        self.sharpness = nn.Parameter(torch.ones(config.num_heads))  # normalised queries leave it to one number a head
        self.alpha_logit = nn.Parameter(torch.zeros(config.num_heads)) if config.learn_alpha else None

    def alpha(self) -> float | Tensor:
        """1.5, or one learned value per head in (1, 2) that starts there."""
        return 1.5 if self.alpha_logit is None else 1.0 + torch.sigmoid(self.alpha_logit)

    def forward(self, x: Tensor, rotary: Tensor, cache: Cache | None, record: list[HeadInputs] | None) -> Tensor:
        batch, length, width = x.shape
        qkv = self.to_qkv(x).view(batch, length, 3, self.config.num_heads, self.config.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (B, H, N, D)
        query = rotate(normalize(query) * self.sharpness[:, None, None], rotary)
        key = rotate(normalize(key), rotary)
        if cache is not None:
            key, value = cache.extend(self.layer, key, value)
        if record is not None:
            record.append(HeadInputs(query, key, value, self.alpha()))

        is_causal = length > 1  # one new position sees all the cached ones
        if self.config.attention == "softmax":
            out = F.scaled_dot_product_attention(query, key, value, is_causal=is_causal)
        else:
            out = entmax_attention(query, key, value, is_causal=is_causal, alpha=self.alpha())
        return self.to_out(out.transpose(1, 2).reshape(batch, length, width))


class Mlp(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.to_hidden = nn.Linear(config.width, 2 * config.hidden, bias=False)
        self.to_out = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, hidden = self.to_hidden(x).chunk(2, dim=-1)
        return self.to_out(F.silu(gate) * hidden)


class Block(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width)
        self.attention = Attention(config, layer)
        self.mlp_norm = nn.RMSNorm(config.width)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor, rotary: Tensor, cache: Cache | None, record: list[HeadInputs] | None) -> Tensor:
        x = x + self.attention(self.attention_norm(x), rotary, cache, record)
        return x + self.mlp(self.mlp_norm(x))


class ByteEmbedding(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.byte = nn.Embedding(NUM_BYTES, config.width)
        self.ngrams = nn.ModuleList(nn.Embedding(1 << HASH_BITS, config.width) for _ in NGRAM_SIZES)

    def forward(self, text: Tensor) -> Tensor:
        x = self.byte(text)
        for size, table in zip(NGRAM_SIZES, self.ngrams, strict=True):
            x = x + table(ngram_hash(text, size))
        return x


class ByteTransformer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = ByteEmbedding(config)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_layers))
        self.norm = nn.RMSNorm(config.width)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:  # what is added to the residual stream starts smaller, by the number of additions
                is_residual = name.endswith("to_out.weight")
                nn.init.normal_(parameter, std=INIT_STD / math.sqrt(2 * config.num_layers) if is_residual else INIT_STD)

    def forward(self, text: Tensor, cache: Cache | None = None, record: list[HeadInputs] | None = None) -> Tensor:
        """Scores of the next byte (B, N, 256) for `text` (B, N), which continues what is in `cache`.

        Each layer appends its attention's inputs to `record`.
        """
        all_text = text if cache is None else cache.extend_text(text)
        first, last = all_text.shape[1] - text.shape[1], all_text.shape[1]
        rotary = rotary_angles(torch.arange(first, last, device=text.device), self.config.head_dim)
        x = self.embedding(all_text)[:, first:]
        for block in self.blocks:
            x = block(x, rotary, cache, record)
        return F.linear(self.norm(x), self.embedding.byte.weight)

    def alphas(self) -> Tensor:
        """(num_layers, num_heads)."""
        attentions = [module for module in self.modules() if isinstance(module, Attention)]
        alphas = [torch.as_tensor(attention.alpha()).expand(self.config.num_heads) for attention in attentions]
        return torch.stack(alphas).detach()

    @torch.no_grad()
    def generate(self, prompt: bytes, length: int, temperature: float, seed: int) -> bytes:
        """`length` bytes after `prompt`, sampled one at a time."""
        device = self.norm.weight.device
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same draws on every device
        cache, text = Cache(), list(prompt)
        new = torch.tensor([text], device=device)
        for _ in range(length):
            prob = torch.softmax(self(new, cache)[0, -1].float().cpu() / temperature, dim=-1)
            text.append(int(torch.multinomial(prob, 1, generator=generator)))
            new = torch.tensor([text[-1:]], device=device)
        return bytes(text[len(prompt) :])


def ngram_hash(text: Tensor, size: int) -> Tensor:
    """(B, N) in [0, 2^HASH_BITS) of the `size` bytes that end at each position; zeros stand before the text."""
    code = text
    for back in range(1, size):
        code = code * NUM_BYTES + F.pad(text, (back, 0))[:, : text.shape[1]]
    return (code * 2_654_435_761 % (1 << 32)) >> (32 - HASH_BITS)  # Fibonacci hashing


def normalize(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


def rotary_angles(position: Tensor, head_dim: int) -> Tensor:
    """cos and sin (2, N, D / 2) of the angle by which each pair of features turns at each position."""
    frequency = ROTARY_BASE ** (-torch.arange(0, head_dim, 2, device=position.device) / head_dim)
    angle = position[:, None] * frequency
    return torch.stack((angle.cos(), angle.sin()))


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """x (B, H, N, D) with feature d and d + D / 2 turned as a pair."""
    cos, sin = rotary.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)
