"""Training of one model, with what is worth knowing about its attention recorded on the way."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from adasplash2 import entmax_attention
from demo.model import ByteTransformer, HeadInputs, ModelConfig
from demo.progress import Progress
from demo.text import Corpus

BITS_PER_NAT = 1.0 / math.log(2.0)
WARMUP_SHARE = 0.05
FINAL_LEARNING_RATE_SHARE = 0.05
FAST_LEARNING_RATE = 4.0  # times that of the matrices: embeddings, of which a step sees few rows, and vectors
NUM_EVALUATIONS = 8  # during training, evenly spaced
EVALUATION_WINDOWS, FINAL_WINDOWS = 4, 24  # of one context, per pool


@dataclass(frozen=True)
class TrainingConfig:
    steps: int = 560
    batch: int = 1
    context: int = 1024
    learning_rate: float = 2e-3
    weight_decay: float = 0.1
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    seed: int = 0


@dataclass(frozen=True)
class HeadStatistics:
    """Of every head (num_layers, num_heads), on the first validation windows."""

    support_size: Tensor  # mean number of keys with prob > 0
    live_tile_fraction: Tensor


@dataclass
class Run:
    """What one training left behind."""

    model: ByteTransformer
    train_bits: list[float] = field(default_factory=list)  # bits per byte of every step
    step_seconds: list[float] = field(default_factory=list)
    validation_bits: dict[int, float] = field(default_factory=dict)  # step -> bits per byte, mean of the pools
    heads: dict[int, HeadStatistics] = field(default_factory=dict)  # step -> statistics; entmax only
    final_bits: dict[str, float] = field(default_factory=dict)  # pool -> bits per byte, on more windows

    @property
    def step_ms(self) -> float:
        return 1e3 * statistics.median(self.step_seconds)

    @property
    def final_mean_bits(self) -> float:
        return statistics.mean(self.final_bits.values())


def train(model_config: ModelConfig, config: TrainingConfig, corpus: Corpus, label: str) -> Run:
    """Equal seeds give equal initial weights and equal batches, whatever the attention."""
    torch.manual_seed(config.seed)
    model = ByteTransformer(model_config).to(config.device)
    run = Run(model)
    optimizer = make_optimizer(model, config)
    batches = torch.Generator().manual_seed(config.seed)
    progress = Progress(label, config.steps)
    evaluation_steps = {round(i * config.steps / NUM_EVALUATIONS) for i in range(NUM_EVALUATIONS + 1)}

    for step in range(config.steps + 1):
        if step in evaluation_steps:
            bits = [validation_bits(model, config, corpus, pool, EVALUATION_WINDOWS) for pool in corpus.validation]
            run.validation_bits[step] = statistics.mean(bits)
            if model_config.attention == "entmax":
                run.heads[step] = head_statistics(model, config, corpus)
        if step == config.steps:
            break

        start = time.perf_counter()
        text = corpus.train_batch(step, config.batch, config.context, batches).to(config.device)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config) * group["lr_factor"]
        loss = next_byte_loss(model, config, text)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        run.train_bits.append(loss.item() * BITS_PER_NAT)  # item() waits for the device
        run.step_seconds.append(time.perf_counter() - start)

        tokens_per_second = config.batch * config.context / statistics.median(run.step_seconds[-20:])
        recent = statistics.mean(run.train_bits[-20:])
        progress.update(step + 1, f"loss {recent:.3f} bits/byte  {tokens_per_second:,.0f} tokens/s")

    run.final_bits = {pool: validation_bits(model, config, corpus, pool, FINAL_WINDOWS) for pool in corpus.validation}
    return run


def make_optimizer(model: ByteTransformer, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW; only matrices decay."""
    tables = list(model.embedding.parameters())
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [
        {"params": tables, "weight_decay": config.weight_decay, "lr_factor": FAST_LEARNING_RATE},
        {"params": matrices, "weight_decay": config.weight_decay, "lr_factor": 1.0},
        {"params": vectors, "weight_decay": 0.0, "lr_factor": FAST_LEARNING_RATE},
    ]
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then half a cosine."""
    warmup = max(1, round(WARMUP_SHARE * config.steps))
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    done = (step - warmup) / max(1, config.steps - warmup)
    share = FINAL_LEARNING_RATE_SHARE + (1.0 - FINAL_LEARNING_RATE_SHARE) * 0.5 * (1.0 + math.cos(math.pi * done))
    return config.learning_rate * share


def next_byte_loss(model: ByteTransformer, config: TrainingConfig, text: Tensor) -> Tensor:
    """Mean cross entropy in nats; `text` is (batch, context + 1)."""
    device_type = torch.device(config.device).type
    with torch.autocast(device_type, config.dtype, enabled=config.dtype != torch.float32):
        score = model(text[:, :-1])
    return F.cross_entropy(score.flatten(0, 1).float(), text[:, 1:].flatten())


@torch.no_grad()
def validation_bits(model: ByteTransformer, config: TrainingConfig, corpus: Corpus, pool: str, count: int) -> float:
    windows = corpus.validation_windows(pool, count, config.context).to(config.device)
    losses = [next_byte_loss(model, config, batch) for batch in windows.split(config.batch)]
    return torch.stack(losses).mean().item() * BITS_PER_NAT


@torch.no_grad()
def head_statistics(model: ByteTransformer, config: TrainingConfig, corpus: Corpus) -> HeadStatistics:
    windows = torch.cat([corpus.validation_windows(pool, 1, config.context) for pool in corpus.validation])
    record: list[HeadInputs] = []
    model(windows[:, :-1].to(config.device), record=record)
    support_size, live_tile_fraction = [], []
    for query, key, value, alpha in record:
        _, aux = entmax_attention(query, key, value, is_causal=True, alpha=alpha, return_aux=True)
        support_size.append(aux.support_size.float().mean((0, 2)))
        live_tile_fraction.append(aux.live_tile_fraction.mean(0))
    return HeadStatistics(torch.stack(support_size).cpu(), torch.stack(live_tile_fraction).cpu())
