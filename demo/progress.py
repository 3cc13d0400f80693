"""A progress bar on a terminal, and a plain line every tenth of the way where there is none."""

from __future__ import annotations

import sys
from typing import TextIO

BAR_WIDTH = 28
NUM_LINES = 10


class Progress:
    def __init__(self, label: str, total: int, stream: TextIO = sys.stderr) -> None:
        self.label, self.total, self.stream = label, total, stream
        self.is_terminal = stream.isatty()

    def update(self, done: int, note: str) -> None:
        is_last = done == self.total
        if self.is_terminal:
            filled = BAR_WIDTH * done // self.total
            bar = "█" * filled + "░" * (BAR_WIDTH - filled)
            end = "\n" if is_last else ""
            self.stream.write(f"\r{self.label} {bar} {done}/{self.total}  {note}\x1b[K{end}")
        elif is_last or done * NUM_LINES // self.total > (done - 1) * NUM_LINES // self.total:
            self.stream.write(f"{self.label} {done}/{self.total}  {note}\n")
        self.stream.flush()
