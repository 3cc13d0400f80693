"""entmax, entmax15 and sparsemax against the PyPI package entmax, torch's softmax and a plain copy.

    python -m bench.entmax                                     # all shapes: some minutes on two cores
    python -m bench.entmax --shape 2048x4096 --dtype float32

`clone` reads a tensor and writes one of its size, which is all that the forward pass must do. It is the floor where its
result does not come in fresh pages, whose faults take longer than the copying.
README.md beside this file says how to read what it prints and writes.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import entmax as package
import torch
from torch import Tensor

import adasplash2
from bench import timing
from bench.plots import plot_activations

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
RESULTS = timing.ROOT / "bench" / "results"

Activation = Callable[[Tensor, int], Tensor]

# The same function twice: ours and theirs, by what it is called in the table.
PAIRS: dict[str, tuple[Activation, Activation]] = {
    "entmax15": (adasplash2.entmax15, package.entmax15),
    "sparsemax": (adasplash2.sparsemax, package.sparsemax),
    "alpha 1.25": (
        lambda x, dim: adasplash2.entmax(x, 1.25, dim),
        lambda x, dim: package.entmax_bisect(x, 1.25, dim),
    ),
}
YARDSTICKS: dict[str, Activation] = {
    "softmax": lambda x, dim: torch.softmax(x, dim),
    "clone": lambda x, dim: x.clone(),
}


@dataclass(frozen=True)
class Case:
    """Gaussian scores times `scale`; larger scales have smaller supports."""

    shape: tuple[int, ...]
    dim: int
    dtype: str
    scale: float

    def __str__(self) -> str:
        return f"{'x'.join(map(str, self.shape))} dim {self.dim} {self.dtype} scale {self.scale:g}"

    def scores(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return (torch.randn(self.shape, generator=generator) * self.scale).to(DTYPES[self.dtype])


# 2 million entries each, more in the first, whose tensors do not fit into a cache; in the last one dim is not the last.
SHAPES = [((2048, 4096), -1), ((64, 32, 1024), -1), ((32, 50000), -1), ((32768, 64), -1), ((8, 1024, 256), 1)]
SCALES = [1.0, 4.0]


def measure_case(case: Case, rounds: int) -> list[dict[str, Any]]:
    """A result for each pair and pass; everything takes turns with everything else."""
    x = case.scores()
    leaf, grad = x.clone().requires_grad_(), torch.randn_like(x)

    def forward(activation: Activation) -> timing.Function:
        return lambda: activation(x, case.dim)

    def training(activation: Activation) -> timing.Function:
        return lambda: torch.autograd.grad(activation(leaf, case.dim), leaf, grad)

    results = []
    for which, make in (("forward", forward), ("training", training)):
        functions = {name: make(function) for name, function in YARDSTICKS.items()}
        for name, (ours, theirs) in PAIRS.items():
            functions |= {f"{name}/adasplash2": make(ours), f"{name}/package": make(theirs)}
        samples = timing.measure(functions, rounds=rounds, warmup=1)
        median_ms = {name: timing.median(values) for name, values in samples.items()}
        for name, (ours, _) in PAIRS.items():
            theirs_ms, ours_ms = median_ms[f"{name}/package"], median_ms[f"{name}/adasplash2"]
            results.append(
                {
                    "shape": list(case.shape),
                    "dim": case.dim,
                    "dtype": case.dtype,
                    "scale": case.scale,
                    "support_size": (ours(x, case.dim) > 0).sum(case.dim).float().mean().item(),
                    "function": name,
                    "pass": which,
                    "adasplash2_ms": ours_ms,
                    "package_ms": theirs_ms,
                    "speedup": theirs_ms / ours_ms,
                    **{f"{yardstick}_ms": median_ms[yardstick] for yardstick in YARDSTICKS},
                    "samples_ms": {
                        who: [round(ms, 4) for ms in samples[f"{name}/{who}"]] for who in ("adasplash2", "package")
                    },
                }
            )
    return results


def print_results(case: Case, results: Sequence[dict[str, Any]]) -> None:
    header = [str(case), "pass", "support", "adasplash2 ms", "package ms", "speedup", "softmax ms", "clone ms"]
    rows = [
        [
            result["function"],
            result["pass"],
            f"{result['support_size']:.0f}",
            *(f"{result[key]:.2f}" for key in ("adasplash2_ms", "package_ms")),
            f"{result['speedup']:.1f}x",
            *(f"{result[key]:.2f}" for key in ("softmax_ms", "clone_ms")),
        ]
        for result in results
    ]
    print(timing.table(header, rows), end="\n\n", flush=True)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {"x".join(map(str, shape)): (shape, dim) for shape, dim in SHAPES}
    parser.add_argument("--shape", nargs="+", choices=names, default=list(names))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--scale", nargs="+", type=float, default=SCALES)
    parser.add_argument("--rounds", type=int, default=5, help="samples of every function; the median is reported")
    parser.add_argument("--name", default="all", help="part of the names of the files, to tell runs apart")
    parser.add_argument("--out", type=Path, default=timing.ROOT / "build" / "bench", help="folder to write to")
    parser.add_argument("--keep", action="store_true", help="write to bench/results (clean commit only)")
    options = parser.parse_args(arguments)
    if options.keep:
        timing.require_clean_commit()

    folder = RESULTS if options.keep else options.out
    stem = f"{datetime.now():%Y-%m-%d}-entmax-{options.name}"
    results: list[dict[str, Any]] = []
    machine = timing.machine_info()
    for name in options.shape:
        for dtype in options.dtype:
            for scale in options.scale:
                case = Case(*names[name], dtype, scale)
                results += (measured := measure_case(case, options.rounds))
                print_results(case, measured)
        # After every shape: a run that is cut short still leaves what it has.
        timing.write_json(folder / f"{stem}.json", machine, results)
        plot_activations(folder / f"{stem}.png", machine, results)
    print(f"written: {folder / stem}.json and .png")


if __name__ == "__main__":
    main()
