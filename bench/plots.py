"""The picture of a benchmark run: our time over the baseline's, by length, one panel for each kind of shape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Told apart by colour-blind readers too.
COLORS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#000000", "#999999"]
PANEL_INCHES = (3.4, 2.7)


def plot_ratios(path: Path, machine: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    """Rows of panels: dtype and pass; columns: head dim and causal or not; lines: the data; dashed: the target."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    measured = [result for result in results if result["ratio"] is not None]
    if not measured:
        return
    rows = list(dict.fromkeys((result["dtype"], result["pass"]) for result in measured))
    columns = list(dict.fromkeys((result["head_dim"], result["is_causal"]) for result in measured))
    colors = {data: COLORS[i % len(COLORS)] for i, data in enumerate(dict.fromkeys(r["data"] for r in measured))}

    width, height = PANEL_INCHES
    figure, axes = plt.subplots(
        len(rows),
        len(columns),
        figsize=(max(7.0, width * len(columns)), height * len(rows) + 1.2),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for row, (dtype, which) in enumerate(rows):
        for column, (head_dim, is_causal) in enumerate(columns):
            shape = {"dtype": dtype, "pass": which, "head_dim": head_dim, "is_causal": is_causal}
            of_panel = [result for result in measured if shape.items() <= result.items()]
            _draw_panel(axes[row, column], of_panel, colors)
            causal = ", causal" if is_causal else ""
            axes[row, column].set_title(f"{dtype}, D = {head_dim}{causal}: {which}", fontsize=9)
    for axis in axes.flat:
        axis.set_xscale("log", base=2)
        axis.set_yscale("log", base=2)
        axis.xaxis.set_major_locator(FixedLocator(sorted({result["length"] for result in measured})))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda length, _: f"{length:g}"))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
        axis.grid(color="0.9")
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("sequence length N")
    for axis in axes[:, 0]:
        axis.set_ylabel(f"time / time of {measured[0]['baseline']}")

    handles = [Line2D([], [], color=color, marker="o", markersize=4) for color in colors.values()]
    handles.append(Line2D([], [], color="0.35", linestyle="--", linewidth=1.0))
    labels = [*(_label(data) for data in colors), "target of that colour"]
    per_line = 3 if len(columns) < 3 else 4
    figure.legend(handles, labels, loc="outside lower center", ncols=per_line, frameon=False)
    where = machine.get("gpu", f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}")
    figure.suptitle(
        "Time of entmax attention (alpha = 1.5) relative to softmax attention: below 1 is faster\n"
        f"{where}\ntorch {machine['torch']}, commit {machine['commit']}, {machine['date'][:10]}",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _label(data: str) -> str:
    support, _, live = data.replace("S=", "mean support ").partition(" live=")
    return f"{support}, {float(live):.0%} of the tiles live" if live else support


def _draw_panel(axis: Any, results: Sequence[dict[str, Any]], colors: dict[str, str]) -> None:
    axis.axhline(1.0, color="0.35", linewidth=1.0)
    for data, color in colors.items():
        line = sorted((result for result in results if result["data"] == data), key=lambda result: result["length"])
        axis.plot([r["length"] for r in line], [r["ratio"] for r in line], "o-", color=color, markersize=4)
        goals = [(result["length"], result["target"]) for result in line if result["target"] is not None]
        if goals:
            axis.plot(*zip(*goals, strict=True), "--", color=color, linewidth=1.0)
