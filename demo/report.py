"""What the demo prints, and the attention maps that it draws."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from adasplash2 import entmax
from bench.timing import table
from demo.model import HeadInputs
from demo.plots import HeadMap
from demo.text import Corpus
from demo.train import Run, TrainingConfig

NUM_MAPS = 3  # of each model


def describe(corpus: Corpus) -> str:
    pools = (
        f"{pool}: {len(corpus.train[pool]) / 1e6:.2f} MB to train on, {len(corpus.validation[pool]) / 1e6:.2f} MB apart"
        for pool in corpus.pools
    )
    return "Text of the standard library; " + "; ".join(pools)


def head_statistics(run: Run) -> str:
    """One line an evaluation, one column a head: mean support size and live-tile fraction."""
    num_layers, num_heads = next(iter(run.heads.values())).support_size.shape
    header = ["step", *(f"L{layer + 1}H{head + 1}" for layer in range(num_layers) for head in range(num_heads))]
    rows = [
        [
            str(step),
            *(
                f"{size:.0f} {100 * live:.0f}%"
                for size, live in zip(heads.support_size.flatten(), heads.live_tile_fraction.flatten(), strict=True)
            ),
        ]
        for step, heads in run.heads.items()
    ]
    if run.model.config.learn_alpha:
        rows.append(["alpha", *(f"{alpha:.2f}" for alpha in run.model.alphas().flatten())])
    return table(header, rows)


def comparison(softmax: Run, entmax: Run, config: TrainingConfig) -> str:
    """The closing table."""
    last = entmax.heads[max(entmax.heads)]
    bytes_per_step = config.batch * config.context
    rows = [
        *(
            [f"validation, {pool} (bits/byte)", f"{softmax.final_bits[pool]:.3f}", f"{entmax.final_bits[pool]:.3f}"]
            for pool in softmax.final_bits
        ),
        ["validation, mean (bits/byte)", f"{softmax.final_mean_bits:.3f}", f"{entmax.final_mean_bits:.3f}"],
        ["training step, median (ms)", f"{softmax.step_ms:.1f}", f"{entmax.step_ms:.1f}"],
        ["training speed (bytes/s)", *(f"{1e3 * bytes_per_step / run.step_ms:,.0f}" for run in (softmax, entmax))],
        ["keys attended to, mean", f"{(config.context + 1) / 2:.1f}", f"{last.support_size.mean():.1f}"],
        ["live 64 x 64 tiles, mean", "100%", f"{100 * last.live_tile_fraction.mean():.0f}%"],
    ]
    return table(["", "softmax", "entmax"], rows)


@torch.no_grad()
def head_maps(softmax: Run, entmax: Run, sentence: bytes) -> list[list[HeadMap]]:
    """The heads of the entmax model with the smallest, median and largest support; the same of the softmax model."""
    by_model = [dict(_probabilities(run, sentence)) for run in (entmax, softmax)]
    support = {head: (prob > 0).sum() for head, prob in by_model[0].items()}
    ranked = sorted(support, key=lambda head: support[head])
    chosen = [ranked[round(i * (len(ranked) - 1) / (NUM_MAPS - 1))] for i in range(NUM_MAPS)]
    return [
        [HeadMap(f"{name}, layer {layer + 1}, head {head + 1}", probs[layer, head]) for layer, head in chosen]
        for name, probs in zip(("entmax", "softmax"), by_model, strict=True)
    ]


def _probabilities(run: Run, sentence: bytes) -> Iterator[tuple[tuple[int, int], np.ndarray]]:
    """((layer, head), (n, n) attention) of every head on the sentence alone."""
    record: list[HeadInputs] = []
    run.model(torch.tensor([list(sentence)], device=run.model.norm.weight.device), record=record)
    future = torch.ones(len(sentence), len(sentence), dtype=torch.bool).triu(1)
    for layer, (query, key, _, alpha) in enumerate(record):
        score = (query @ key.mT * query.shape[-1] ** -0.5)[0].float().cpu().masked_fill(future, -math.inf)
        if run.model.config.attention == "softmax":
            prob = score.softmax(-1)
        else:
            prob = entmax(score, alpha if isinstance(alpha, float) else alpha.cpu()[:, None, None])
        for head, of_head in enumerate(prob.numpy()):
            yield (layer, head), of_head
