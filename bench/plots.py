"""The pictures of benchmark runs: our time over the baseline's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Told apart by colour-blind readers too.
COLORS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#000000", "#999999"]
PANEL_INCHES = (3.4, 2.7)


def plot_ratios(path: Path, machine: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    """Attention, by length. Rows of panels: dtype and pass; columns: head dim and causal or not; lines: the data;
    dashed: the target."""
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
    what = "Time of entmax attention (alpha = 1.5) relative to softmax attention: below 1 is faster"
    figure.suptitle(f"{what}\n{_where(machine)}", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def plot_activations(path: Path, machine: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    """The activations over torch's softmax. Rows of panels: passes; columns: dtypes; along x: shapes and scales; full
    marks: adasplash2, open ones: the package, dashes: a plain copy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter

    rows, columns, functions = (list(dict.fromkeys(r[key] for r in results)) for key in ("pass", "dtype", "function"))
    cases = list(dict.fromkeys((tuple(r["shape"]), r["dim"], r["scale"]) for r in results))
    names = [f"{'x'.join(map(str, shape))}, dim {dim}, scale {scale:g}" for shape, dim, scale in cases]
    colors = dict(zip(functions, COLORS, strict=False))

    size = (4.2 * len(columns) + 1.0, 2.6 * len(rows) + 2.2)
    figure, axes = plt.subplots(
        len(rows), len(columns), figsize=size, sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for row, which in enumerate(rows):
        for column, dtype in enumerate(columns):
            axis = axes[row, column]
            axis.axhline(1.0, color="0.35", linewidth=1.0)
            for result in results:
                if (result["pass"], result["dtype"]) != (which, dtype):
                    continue
                at = cases.index((tuple(result["shape"]), result["dim"], result["scale"]))
                side = 0.2 * (functions.index(result["function"]) - (len(functions) - 1) / 2)
                color = colors[result["function"]]
                softmax = result["softmax_ms"]
                axis.plot(at + side, result["adasplash2_ms"] / softmax, "o", color=color, markersize=5)
                axis.plot(at + side, result["package_ms"] / softmax, "o", color=color, markersize=5, mfc="none")
                axis.plot([at - 0.35, at + 0.35], [result["clone_ms"] / softmax] * 2, "--", color="0.35", linewidth=1.0)
            axis.set_title(f"{dtype}: {which}", fontsize=9)
            axis.set_yscale("log")
            axis.yaxis.set_major_formatter(FuncFormatter(lambda ratio, _: f"{ratio:g}"))
            axis.set_xticks(range(len(cases)), names, rotation=45, ha="right", fontsize=7)
            axis.grid(color="0.9")
            axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("time / time of softmax")
    handles = [Line2D([], [], color=color, marker="o", linestyle="", markersize=5) for color in colors.values()]
    handles.append(Line2D([], [], color="0.35", marker="o", linestyle="", markersize=5, mfc="none"))
    handles.append(Line2D([], [], color="0.35", linestyle="--", linewidth=1.0))
    labels = [*functions, "the same of the package entmax", "a plain copy"]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    what = "Time of entmax over one dimension relative to torch's softmax: below 1 is faster"
    figure.suptitle(f"{what}\n{_where(machine)}", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _where(machine: dict[str, Any]) -> str:
    where = machine.get("gpu", f"{machine['cpu']}, {machine['threads']} threads, {machine['isa']}")
    return f"{where}\ntorch {machine['torch']}, commit {machine['commit']}, {machine['date'][:10]}"


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
