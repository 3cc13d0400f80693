"""The two pictures: how both models learned, and what some heads of them look at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from demo.train import Run

SOFTMAX_COLOR, ENTMAX_COLOR = "#6b7a8f", "#d1495b"
LAYER_COLORS = "viridis"
ZERO_COLOR = "white"  # an exact zero has no ink
FUTURE_COLOR = "#dfe3e8"
INCHES_PER_BYTE = 0.085  # of a map
MIN_SHOWN_PROB = 1e-3
SMOOTHING = 0.95  # of the training curves, per step


@dataclass(frozen=True)
class HeadMap:
    """The attention of one head over a sentence."""

    title: str
    prob: np.ndarray[Any, Any]  # (n, n); row: the byte that attends


def plot_training(path: Path, softmax: Run, entmax: Run, subtitle: str) -> None:
    figure, (loss_axis, support_axis) = plt.subplots(1, 2, figsize=(12, 4.8), layout="constrained")

    for run, label, color in ((softmax, "softmax", SOFTMAX_COLOR), (entmax, "entmax", ENTMAX_COLOR)):
        steps = np.arange(1, len(run.train_bits) + 1)
        loss_axis.plot(steps, run.train_bits, color=color, alpha=0.15, linewidth=0.6)
        loss_axis.plot(steps, _smoothed(run.train_bits), color=color, linewidth=1.6, label=f"{label}: training")
        loss_axis.plot(
            list(run.validation_bits),
            list(run.validation_bits.values()),
            "o--",
            color=color,
            markersize=4,
            linewidth=1.0,
            label=f"{label}: validation",
        )
    best = min(min(run.validation_bits.values()) for run in (softmax, entmax))
    loss_axis.set_ylim(bottom=0.85 * best, top=2.0 * best)
    loss_axis.set_title("Loss", fontsize=11)
    loss_axis.set_xlabel("training step")
    loss_axis.set_ylabel("bits per byte")
    loss_axis.legend(frameon=False)

    evaluations = list(entmax.heads)
    support = np.stack([statistics.support_size.numpy() for statistics in entmax.heads.values()])  # (steps, L, H)
    colors = plt.get_cmap(LAYER_COLORS)(np.linspace(0.0, 0.85, support.shape[1]))
    for layer, color in enumerate(colors):
        support_axis.plot(evaluations, support[:, layer], "o-", color=color, markersize=3, linewidth=1.2)
        support_axis.plot([], [], color=color, label=f"layer {layer + 1}")
    support_axis.set_yscale("log")
    support_axis.yaxis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)))
    support_axis.yaxis.set_major_formatter(FuncFormatter(lambda size, _: f"{size:g}"))
    support_axis.yaxis.set_minor_formatter(NullFormatter())
    support_axis.set_title("Keys that entmax attends to, one line a head", fontsize=11)
    support_axis.set_xlabel("training step")
    support_axis.set_ylabel("mean support size (keys with probability > 0)")
    support_axis.legend(frameon=False)

    for axis in (loss_axis, support_axis):
        axis.grid(color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"A byte-level transformer on Python's own standard library\n{subtitle}", fontsize=12)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def plot_attention(path: Path, sentence: bytes, rows: Sequence[Sequence[HeadMap]]) -> None:
    """One row of maps a model; the colour scale is logarithmic and an exact zero has a colour of its own."""
    length = len(sentence)
    num_rows, num_columns, size = len(rows), len(rows[0]), INCHES_PER_BYTE * length
    figure, axes = plt.subplots(
        num_rows,
        num_columns,
        figsize=(size * num_columns + 1.4, size * num_rows + 1.6),
        squeeze=False,
        layout="constrained",
    )
    colors = plt.get_cmap("inferno_r").with_extremes(bad=ZERO_COLOR)
    norm = LogNorm(MIN_SHOWN_PROB, 1.0, clip=True)
    future = np.ma.masked_equal(np.triu(np.ones((length, length)), 1), 0.0)
    labels = list(sentence.decode().replace(" ", "␣"))
    for axis, head in zip(axes.flat, (head for row in rows for head in row), strict=True):
        image = axis.imshow(np.ma.masked_equal(head.prob, 0.0), cmap=colors, norm=norm, interpolation="nearest")
        axis.imshow(future, cmap=ListedColormap([FUTURE_COLOR]), interpolation="nearest")
        support = (head.prob > 0).sum(-1).mean()
        axis.set_title(f"{head.title}: {support:.1f} keys a row on average", fontsize=11)
        axis.set_xticks(range(length), labels, fontsize=6, family="monospace")
        axis.set_yticks(range(length), labels, fontsize=6, family="monospace")
        axis.tick_params(length=0, pad=1.5)
        axis.spines[:].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("byte attended to")
    for axis in axes[:, 0]:
        axis.set_ylabel("byte that attends")
    figure.colorbar(image, ax=axes, label="probability (logarithmic)", shrink=0.6, extend="min")
    figure.suptitle(f"Attention on “{sentence.decode()}”\nwhite: exactly zero; grey: the future", fontsize=14)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def _smoothed(values: Sequence[float]) -> list[float]:
    """Exponential moving average, unbiased at the start."""
    total = weight = 0.0
    smoothed = []
    for value in values:
        total, weight = SMOOTHING * total + value, SMOOTHING * weight + 1.0
        smoothed.append(total / weight)
    return smoothed
