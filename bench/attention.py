"""entmax_attention against the softmax attentions of torch and against other implementations of entmax attention.

    python -m bench.attention --preset quick                  # under a minute on two cores
    python -m bench.attention --preset targets                # every target there is on the CPU
    python -m bench.attention --preset gpu --device cuda

README.md beside this file says how to read what it prints and writes.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from bench import timing
from bench.cases import DENSE, Data, Inputs, Shape, make_inputs
from bench.peers import OURS, Peer, baseline_name, peers, why_not
from bench.plots import plot_ratios

PASSES = ("forward", "training")  # training: forward and backward, with the gradients of query, key and value
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
RESULTS = timing.ROOT / "bench" / "results"


@dataclass(frozen=True)
class Result:
    """One pass over one case, by every peer that can."""

    shape: Shape
    data: Data
    which: str  # of PASSES
    inputs: Inputs
    samples_ms: dict[str, list[float]]  # by peer
    baseline: str
    target: float | None  # for the ratio

    @property
    def ratio(self) -> float | None:
        """Our median time over the baseline's."""
        if OURS not in self.samples_ms or self.baseline not in self.samples_ms:
            return None
        return timing.median(self.samples_ms[OURS]) / timing.median(self.samples_ms[self.baseline])

    def as_json(self) -> dict[str, Any]:
        return {
            "pass": self.which,
            "batch": self.shape.batch,
            "num_heads": self.shape.num_heads,
            "length": self.shape.length,
            "head_dim": self.shape.head_dim,
            "dtype": self.shape.dtype_name,
            "is_causal": self.shape.is_causal,
            "data": str(self.data),
            "scale": self.inputs.scale,
            "support_size": self.inputs.support_size,
            "live_tile_fraction": self.inputs.live_tile_fraction,
            "is_sampled": self.inputs.is_sampled,
            "baseline": self.baseline,
            "ratio": self.ratio,
            "target": self.target,
            "median_ms": {peer: timing.median(samples) for peer, samples in self.samples_ms.items()},
            "samples_ms": {peer: [round(ms, 4) for ms in samples] for peer, samples in self.samples_ms.items()},
        }


# ---------------------------------------------------------------------------------------------- measuring


def measure_shape(
    shape: Shape,
    datas: Sequence[Data],
    passes: Sequence[str],
    device: str,
    rounds: int,
    patience_ms: float,
    candidates: Sequence[Peer],
) -> Iterator[Result]:
    """All cases of one shape in turns with each other; a peer indifferent to the data runs once for all of them."""
    inputs = {data: make_inputs(shape, data, device) for data in datas}
    runners = {}  # (peer, its data or None for all) -> inputs
    for peer in candidates:
        for data in datas if peer.depends_on_data else datas[:1]:
            runners[peer, data if peer.depends_on_data else None] = inputs[data]
    for which in passes:
        samples: dict[str, list[float]] = {}
        # Peers that fill the memory with N x N scores take turns apart, so that the others find their caches warm.
        for is_dense in (False, True):
            functions = {
                f"{peer.name}/{data}": _pass(which, peer, x, shape)
                for (peer, data), x in runners.items()
                if peer.is_dense == is_dense
            }
            warmup = 1 if is_dense else 2
            samples |= timing.measure(functions, device=device, rounds=rounds, warmup=warmup, patience_ms=patience_ms)
        for data in datas:
            of_data = {peer.name: samples[f"{peer.name}/{own}"] for peer, own in runners if own is None or own == data}
            yield Result(
                shape, data, which, inputs[data], of_data, baseline_name(device), target(device, shape, data, which)
            )


def _pass(which: str, peer: Peer, inputs: Inputs, shape: Shape) -> timing.Function:
    arguments = (inputs.query, inputs.key, inputs.value)

    def forward() -> object:
        with peer.on_its_path(), torch.no_grad():
            return peer.call(*arguments, shape.is_causal)

    def training() -> object:
        with peer.on_its_path():
            return torch.autograd.grad(peer.call(*arguments, shape.is_causal), arguments, inputs.grad_out)

    return forward if which == "forward" else training


def target(device: str, shape: Shape, data: Data, which: str) -> float | None:
    """The ratio that the project set itself to reach, where it did."""
    is_forward = which == "forward"
    if device != "cpu":
        if is_forward or shape.dtype == torch.float32:
            return None
        live_tiles = 1.0 if data.live_tiles is None else data.live_tiles
        return 0.25 if live_tiles <= 0.1 else 0.50 if live_tiles <= 0.4 else 1.0
    if shape.length <= 256:
        return 1.3
    if data.support > 300:
        return 1.5
    if shape.length < 2048 or data.live_tiles is not None:
        return None
    if data.support > 100:
        if shape.is_causal and shape.length <= 4096:
            return 0.75 if is_forward else 0.50
        return 0.60 if is_forward else 0.40
    if data.support > 30:
        return 0.45 if is_forward else 0.20
    if shape.length >= 16384:
        return 0.28 if is_forward else 0.11
    return 0.35 if is_forward else 0.13 if shape.dtype == torch.float32 else 0.15


# ---------------------------------------------------------------------------------------------- reporting


def print_results(results: Sequence[Result]) -> None:
    names = list(results[0].samples_ms)
    header = ["case", "support", "live tiles", "pass", *(f"{name} ms" for name in names), "ratio", "target", ""]
    rows = []
    for result in results:
        times = [f"{timing.median(samples):.2f}" for samples in result.samples_ms.values()]
        ratio, target = result.ratio, result.target
        verdict = "" if ratio is None or target is None else "reached" if ratio <= target else "missed"
        estimate = "~" if result.inputs.is_sampled else ""
        rows.append(
            [
                f"{result.shape} {result.data}",
                f"{estimate}{result.inputs.support_size:.0f}",
                f"{estimate}{result.inputs.live_tile_fraction:.2f}",
                result.which,
                *times,
                "-" if ratio is None else f"{ratio:.3f}",
                "-" if target is None else f"{target:.2f}",
                verdict,
            ]
        )
    print(timing.table(header, rows), flush=True)


def save(folder: Path, stem: str, machine: dict[str, Any], results: Sequence[Result]) -> None:
    timing.write_json(folder / f"{stem}.json", machine, [result.as_json() for result in results])
    plot_ratios(folder / f"{stem}.png", machine, [result.as_json() for result in results])


# ---------------------------------------------------------------------------------------------- command line

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "length": [1024, 2048],
        "head_dim": [64],
        "dtype": ["float32"],
        "causal": ["no", "yes"],
        "support": [30.0, 300.0],
        "heads": 4,
        "rounds": 7,
    },
    "targets": {
        "length": [2048, 4096, 8192, 16384],
        "head_dim": [64, 128],
        "dtype": ["float32", "bfloat16"],
        "causal": ["no", "yes"],
        "support": [30.0, 100.0, 300.0, DENSE],
        "rounds": 5,
    },
    "short": {
        "length": [64, 128, 256, 512, 1024],
        "head_dim": [64],
        "dtype": ["float32", "bfloat16"],
        "causal": ["no", "yes"],
        "support": [30.0],
        "rounds": 15,
    },
    "gpu": {
        "length": [4096, 16384, 65536],
        "head_dim": [64, 128],
        "dtype": ["bfloat16"],
        "causal": ["no", "yes"],
        "support": [100.0, DENSE],
        "live": [0.05, 0.1, 0.2, 0.4, 0.5, 0.6],
        "tokens": 65536,
        "rounds": 7,
        "patience": 250.0,
    },
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="quick", help="what the options below default to")
    parser.add_argument("--length", type=int, nargs="+", metavar="N")
    parser.add_argument("--head-dim", type=int, nargs="+", metavar="D")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES)
    parser.add_argument("--causal", nargs="+", choices=("no", "yes"))
    parser.add_argument(
        "--support", type=_support, nargs="+", metavar="S", help='mean support sizes, or "dense": half of the keys'
    )
    parser.add_argument("--live", type=float, nargs="*", metavar="F", help="live-tile fractions: block-structured data")
    parser.add_argument("--batch", type=int)
    parser.add_argument(
        "--tokens", type=int, help="where no --batch is named: as many sequences as make so many tokens"
    )
    parser.add_argument("--heads", type=int)
    parser.add_argument("--rounds", type=int)
    parser.add_argument(
        "--patience", type=float, metavar="MS", help="a function whose call takes longer has one sample; default: none"
    )
    parser.add_argument("--passes", nargs="+", choices=PASSES)
    parser.add_argument("--peers", nargs="+", metavar="NAME", help="only these, by the names in the table")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch on the CPU")
    parser.add_argument("--name", help="part of the names of the files; default: the preset's")
    parser.add_argument("--out", type=Path, default=timing.ROOT / "build" / "bench", help="folder to write to")
    parser.add_argument("--keep", action="store_true", help="write to bench/results (clean commit only)")
    preset = parser.parse_args(arguments).preset
    parser.set_defaults(
        **{"live": [], "tokens": 1, "heads": 8, "passes": list(PASSES), "patience": math.inf, **PRESETS[preset]}
    )
    return parser.parse_args(arguments)


def _support(text: str) -> float:
    return DENSE if text == "dense" else float(text)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    if options.keep:
        timing.require_clean_commit()
    if options.threads:
        torch.set_num_threads(options.threads)
    if not torch.cuda.is_available():
        if options.device != "cpu":
            raise SystemExit(f"--device {options.device}: this torch ({torch.__version__}) sees no GPU")
        print("No GPU here: the CPU path is measured, and only that.")

    machine = timing.machine_info(options.device)
    print("\n".join(f"{key:10} {value}" for key, value in machine.items()), flush=True)
    datas = [Data(support, None) for support in options.support]
    datas += [Data(support, live) for live in options.live for support in options.support if support != DENSE]
    shapes = [
        Shape(
            options.batch or max(1, options.tokens // length),
            options.heads,
            length,
            head_dim,
            DTYPES[dtype],
            causal == "yes",
        )
        for dtype, head_dim, causal, length in itertools.product(
            options.dtype, options.head_dim, options.causal, sorted(options.length)
        )
    ]
    folder = RESULTS if options.keep else options.out
    stem = f"{datetime.now():%Y-%m-%d}-attention-{options.name or options.preset}-{options.device.partition(':')[0]}"
    candidates = [peer for peer in peers(options.device) if not options.peers or peer.name in options.peers]

    results: list[Result] = []
    for shape in shapes:
        reasons = {peer: why_not(peer, shape, options.device) for peer in candidates}
        print("\n" + "".join(f"{peer.name} not measured: {why}\n" for peer, why in reasons.items() if why), end="")
        runnable = [peer for peer, why in reasons.items() if not why]
        of_shape = list(
            measure_shape(shape, datas, options.passes, options.device, options.rounds, options.patience, runnable)
        )
        print_results(of_shape)
        results += of_shape
        save(folder, stem, machine, results)  # after every shape: a run that is cut short still leaves what it has
    print(f"\nwritten: {folder / stem}.json and .png")
    if OURS in (peer.name for peer in candidates) and not all(OURS in result.samples_ms for result in results):
        raise SystemExit(f"{OURS} itself was not measured everywhere")


if __name__ == "__main__":
    main()
