"""Trains one small language model twice, with softmax and with entmax attention, and shows the difference.

    python -m demo                  # about two minutes on two cores
    python -m demo --device cuda    # in bfloat16 unless --dtype says otherwise
    python -m demo --learn-alpha    # one learned alpha per head

The text is what every machine has: the English of `help()` and the sources of the running Python's standard library.
Both models start from the same weights and see the same data in the same order; only the attention function differs.
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Sequence
from pathlib import Path

import torch

import adasplash2
from demo import report
from demo.model import ModelConfig
from demo.plots import plot_attention, plot_training
from demo.text import Corpus
from demo.train import TrainingConfig, train

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
SENTENCE_LENGTH = range(48, 72)
PROMPT = b"The "
GENERATED_BYTES, TEMPERATURE = 400, 0.7


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    start = time.perf_counter()
    corpus = Corpus.from_standard_library()
    config = TrainingConfig(
        steps=options.steps,
        context=options.context,
        device=options.device,
        dtype=DTYPES[options.dtype or ("float32" if options.device == "cpu" else "bfloat16")],
        seed=options.seed,
    )
    where = f"{torch.get_num_threads()} CPU threads, {adasplash2._C.isa()}"
    if options.device != "cpu":
        where = torch.cuda.get_device_name(options.device)
    subtitle = f"context {config.context}, {str(config.dtype).removeprefix('torch.')}, {where}"
    versions = f"adasplash2 {adasplash2.__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{versions}; {subtitle}")
    print(report.describe(corpus), flush=True)

    softmax = train(ModelConfig("softmax"), config, corpus, "softmax")
    entmax = train(ModelConfig("entmax", learn_alpha=options.learn_alpha), config, corpus, "entmax ")

    options.out.mkdir(parents=True, exist_ok=True)
    plot_training(options.out / "training.png", softmax, entmax, subtitle)
    sentence = corpus.validation_sentence(SENTENCE_LENGTH)
    plot_attention(options.out / "attention.png", sentence, report.head_maps(softmax, entmax, sentence))

    print("\nKeys that each head of the entmax model attends to, and the share of live 64 x 64 tiles, over training:\n")
    print(report.head_statistics(entmax))
    print(f"\nThe entmax model goes on after {PROMPT.decode()!r}:\n")
    text = PROMPT + entmax.model.generate(PROMPT, GENERATED_BYTES, TEMPERATURE, options.seed)
    print("    " + text.decode(errors="replace").replace("\n", "\n    "))
    print("\n" + report.comparison(softmax, entmax, config))
    seconds = time.perf_counter() - start
    print(f"\n{seconds:.0f} s in all; pictures: {options.out}/training.png and attention.png")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=TrainingConfig.steps)
    parser.add_argument("--context", type=int, default=TrainingConfig.context, help="bytes that a prediction may see")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="of the matrix products and of attention (autocast)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learn-alpha", action="store_true", help="an alpha per head, learned, starting at 1.5")
    parser.add_argument("--out", type=Path, default=Path("build/demo"), help="folder of the pictures")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
