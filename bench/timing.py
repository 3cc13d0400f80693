"""Measuring several functions against each other in one process, and saying on what machine that was.

The functions take turns: every round runs each of them once, starting one further along each time, so that slow drifts
of the machine (clocks, neighbours) meet all of them alike. Compare medians; the samples are kept.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

import adasplash2

ROOT = Path(__file__).resolve().parent.parent

Function = Callable[[], object]


def measure(
    functions: dict[str, Function],
    *,
    device: str = "cpu",
    rounds: int = 7,
    warmup: int = 2,
    min_sample_ms: float = 20.0,
    patience_ms: float = math.inf,
) -> dict[str, list[float]]:
    """Milliseconds per call, `rounds` samples of each function; a sample repeats short calls for `min_sample_ms`.

    A function whose call takes longer than `patience_ms` is sampled in the first round only.
    """
    calls = {name: _calls_per_sample(function, device, warmup, min_sample_ms) for name, function in functions.items()}
    samples: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for first in range(rounds):
        for i in range(len(names)):
            name = names[(first + i) % len(names)]
            if first > 0 and samples[name][0] > patience_ms:
                continue
            samples[name].append(_time_ms(functions[name], calls[name], device) / calls[name])
    return samples


def median(samples: Sequence[float]) -> float:
    return statistics.median(samples)


def _calls_per_sample(function: Function, device: str, warmup: int, min_sample_ms: float) -> int:
    elapsed_ms = min(_time_ms(function, 1, device) for _ in range(max(1, warmup)))
    return max(1, round(min_sample_ms / max(elapsed_ms, 1e-3)))


def _time_ms(function: Function, calls: int, device: str) -> float:
    """Total time of `calls` calls: by the device's own clock on a GPU, where calls return before they are done."""
    if torch.device(device).type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
        for _ in range(calls):
            function()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start_ns = time.perf_counter_ns()
    for _ in range(calls):
        function()
    return (time.perf_counter_ns() - start_ns) * 1e-6


# ---------------------------------------------------------------------------------------------- where and what


def machine_info(device: str = "cpu") -> dict[str, Any]:
    """Everything that a number depends on and does not say itself."""
    info: dict[str, Any] = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": adasplash2._C.isa(),
        "adasplash2": adasplash2.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info |= {
            "gpu": properties.name,
            "gpu_multiprocessors": properties.multi_processor_count,
            "gpu_memory_gb": round(properties.total_memory / 2**30, 1),
            "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "cuda": torch.version.cuda,
        }
    return info


def commit() -> str:
    """BENCH_COMMIT, for copies of the files with another history or none; else what is checked out, marked when the
    files differ."""
    if named := os.environ.get("BENCH_COMMIT"):
        return named
    head = _output("git", "-C", str(ROOT), "rev-parse", "--short=12", "HEAD")
    if not head:
        return "unknown"
    return head + ("" if is_clean() else " + local changes")


def is_clean() -> bool:
    return _output("git", "-C", str(ROOT), "status", "--porcelain") == ""


def require_clean_commit() -> None:
    """Of results that are to be kept."""
    if not is_clean():
        raise SystemExit("--keep needs a clean commit: the numbers must belong to a state that can be checked out")


def _cpu_model() -> str:
    """The processor's name; a virtual machine may hide it, then its family and model numbers tell more."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    found = {key: re.search(rf"^{key}\s*: (.+)$", text, re.MULTILINE) for key in ("model name", "cpu family", "model")}
    name, family, model = (match[1] if match else "?" for match in found.values())
    return f"{name} (family {family}, model {model})"


def _output(*command: str) -> str | None:
    """What a command prints, or None where it does not exist or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


# ---------------------------------------------------------------------------------------------- writers


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell; the first is text, the others are numbers."""
    columns = list(zip(header, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in (header, *rows):
        numbers = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *numbers]))
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def write_json(path: Path, machine: dict[str, Any], results: Sequence[dict[str, Any]]) -> None:
    """One result a line, so that two runs can be compared with diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join("    " + json.dumps(result) for result in results)
    path.write_text(f'{{\n  "machine": {json.dumps(machine, indent=4)},\n  "results": [\n{lines}\n  ]\n}}\n')
