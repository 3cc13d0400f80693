"""The training text: what every Python installation carries, the language reference and the standard library's sources.

Two pools, drawn from equally: English (the topics of `help()`, half a megabyte of prose) and Python (8 MB of source).
Every document is wholly in the training or wholly in the validation split; a hash of its name decides which.
"""

from __future__ import annotations

import importlib
import re
import sysconfig
import zlib
from pathlib import Path

import torch
from torch import Tensor

VALIDATION_SHARE = 10  # one document in this many
# Not prose and not programs: tests (absent on many machines), generated tables, installed packages.
SKIPPED_FOLDERS = {"test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data", "site-packages", "dist-packages"}

Documents = dict[str, bytes]


class Corpus:
    """Both splits of every pool, each as one long row of bytes."""

    def __init__(self, pools: dict[str, Documents]) -> None:
        self.pools = pools
        self.train = {pool: _join(documents, validation=False) for pool, documents in pools.items()}
        self.validation = {pool: _join(documents, validation=True) for pool, documents in pools.items()}

    @classmethod
    def from_standard_library(cls) -> Corpus:
        pools = {"english": _english(), "python": _python()}
        return cls({pool: documents for pool, documents in pools.items() if documents})

    def train_batch(self, step: int, batch: int, context: int, generator: torch.Generator) -> Tensor:
        """(batch, context + 1) bytes: windows at random places of the pools in turn."""
        pools = list(self.train.values())
        windows = []
        for i in range(step * batch, (step + 1) * batch):
            text = pools[i % len(pools)]
            start = int(torch.randint(len(text) - context, (), generator=generator))
            windows.append(text[start : start + context + 1])
        return torch.stack(windows).long()

    def validation_windows(self, pool: str, count: int, context: int) -> Tensor:
        """(count, context + 1) bytes at even distances; the same ones every time."""
        text = self.validation[pool]
        starts = torch.linspace(0, len(text) - context - 1, count).long()
        return torch.stack([text[start : start + context + 1] for start in starts.tolist()]).long()

    def validation_sentence(self, length: range) -> bytes:
        """The first sentence of the validation split with a length in this range that uses a word twice."""
        for documents in self.pools.values():
            for text in (text for name, text in documents.items() if _is_validation(name)):
                for match in re.finditer(rb"(?<=\. )[A-Z][a-z]+ [a-z ,]+\.", re.sub(rb"\s+", b" ", text)):
                    words = re.findall(rb"[a-z]{3,}", match[0].lower())
                    if len(match[0]) in length and len(set(words)) < len(words):
                        return match[0]
        raise LookupError(f"no sentence with a repeated word and of {length} bytes in the validation text")


def _english() -> Documents:
    """The topics of `help()`: the language reference as plain text, one document a topic."""
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:  # some distributions package it separately
        return {}
    return {f"help/{name}": topics[name].encode() for name in sorted(topics)}


def _python() -> Documents:
    """The standard library's own sources."""
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(path.relative_to(root).as_posix() for path in root.rglob("*.py"))
    return {name: (root / name).read_bytes() for name in names if SKIPPED_FOLDERS.isdisjoint(name.split("/"))}


def _is_validation(name: str) -> bool:
    return zlib.crc32(name.encode()) % VALIDATION_SHARE == 0


def _join(documents: Documents, *, validation: bool) -> Tensor:
    text = b"\n\n".join(text for name, text in documents.items() if _is_validation(name) == validation)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)
