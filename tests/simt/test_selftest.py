"""ptx_selftest.cu under the emulator, and that a wrong PTX text makes it fail: the text itself is what runs."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from simt import emulator

SOURCE = Path(__file__).parent / "ptx_selftest.cu"
WRAPPERS = emulator.ROOT / "csrc" / "cuda" / "ptx"


def run(program: Path, seed: int = 0) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "SIMT_SEED": str(seed)}
    return subprocess.run([program], capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize("seed", emulator.SEEDS)
def test_every_case_passes(seed: int) -> None:
    result = run(emulator.build_program(SOURCE), seed)
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(re.findall(r"^ok ", result.stdout, re.MULTILINE)) >= 40  # the Hopper cases among them


def test_every_wrapper_is_called() -> None:
    """By name in the self test, or by a wrapper that is."""
    called = SOURCE.read_text()
    for header in sorted(WRAPPERS.glob("*.cuh")):
        text = header.read_text()
        names = re.findall(r"__forceinline__ (?:void|bool|float|uint32_t|uint64_t) (\w+)\(", text)
        assert names, header.name
        for name in names:
            in_wrapper = re.search(rf"^ +(?:while \(!|    )?{name}\(", text, re.MULTILINE)
            assert f"ptx::{name}" in called or in_wrapper, f"{header.name}: {name}"


# Slips in the wrappers' texts that leave them valid PTX, and the cases of the self test that each makes wrong.
MISTAKES = {
    "operands swapped": (
        "mma.cuh",
        '.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "',
        '.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %6, %5, %7}, {%8, %9}, "',
        {"mma_m16n8k16_bf16"},
    ),
    "wrong type": ("mma.cuh", "f32.f16.f16.f32", "f32.bf16.bf16.f32", {"mma_m16n8k16_f16"}),
    "modifier left out": (
        "ldmatrix.cuh",
        "ldmatrix.sync.aligned.m8n8.x2.trans",
        "ldmatrix.sync.aligned.m8n8.x2",
        {"ldmatrix_x2_trans"},
    ),
    "coordinates swapped": (
        "tma.cuh",
        "bytes [%0], [%1, {%3, %4, %5}], [%2];",
        "bytes [%0], [%1, {%3, %5, %4}], [%2];",
        {"tma 3D, bf16, swizzle 128", "tma_reduce_add 3D, bf16, swizzle 64"},
    ),
    "registers swapped": (
        "wgmma.cuh",
        '"{%" r0 ", %" r1 ", %" r2 ", %" r3 "}, %" r4',
        '"{%" r0 ", %" r2 ", %" r1 ", %" r3 "}, %" r4',
        {f"wgmma_rs {case}" for case in re.findall(r'"wgmma_rs (.*?)"', SOURCE.read_text())},
    ),
}


def test_mistakes_in_the_texts_are_caught() -> None:
    """All at once, since a build takes a while: exactly their cases fail."""
    patches = [emulator.Patch(f"csrc/cuda/ptx/{file}", old, new) for file, old, new, _ in MISTAKES.values()]
    result = run(emulator.build_program(SOURCE, patches=patches))
    failed = set(re.findall(r"^FAILED (.*)$", result.stdout, re.MULTILINE))
    assert failed == set().union(*(cases for *_, cases in MISTAKES.values())), result.stdout + result.stderr
    assert result.returncode == len(failed)
