"""Every rule that the emulator enforces: broken, it is named together with its line; kept, nothing is said."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from simt import emulator

SOURCE = Path(__file__).parent / "kernels" / "rules.cu"

BROKEN = {
    "missing_syncwarp": r"RACE at shared offset \d+: (read at .* unordered write|write at .* unordered read) at",
    "shuffle_orders_nothing": r"RACE at shared offset \d+: read at .* unordered write at",
    "writers_of_one_word": r"RACE at shared offset 0: write at .* unordered write at .* by thread (0|32)",
    "overlapping_bytes": r"RACE at shared offset 2: write at .* unordered write at",
    "read_then_write": r"RACE at shared offset 0: (write at .* unordered read|read at .* unordered write) at",
    "atomics_then_plain_read": r"RACE at shared offset 0: (read at .* unordered atomic|atomic at .* unordered read) at",
    "unwritten_read": r"UNINITIALISED shared memory at offset \d+",
    "write_after_arrive": r"RACE at shared offset \d+: (read at .* unordered write|write at .* unordered read) at",
    "different_barriers": r"DEADLOCK(.|\n)*barrier 0: 32 of 64 arrived(.|\n)*barrier 1: 32 of 64 arrived",
    "different_counts": r"barrier 1: count (32|64) at .*, but (32|64) at",
    "divergent_mma": r"DIVERGENT warp: mma\.sync\.aligned\.m16n8k16",
    "different_shuffles": r"DIVERGENT warp: shfl\.(down|bfly) .* meets shfl\.(down|bfly)",
    "lane_outside_its_mask": r"the calling lane is not in the mask 0000ffff",
    "misaligned_ldmatrix": r"MISALIGNED row of ldmatrix",
    "shared_out_of_bounds": r"OUT OF BOUNDS: 4 bytes at shared offset (4096|4\d\d\d) of 4096",
    "copy_out_of_bounds": r"OUT OF BOUNDS: global read by cp.async of 16 bytes at offset 1024 of out, which has 1024",
    "stack_overflow": r"STACK OVERFLOW of a thread",
    "wild_pointer": r"OUT OF BOUNDS: global write of 4 bytes at 0x\w+, before every registered tensor",
    "wait_leaves_one_group": r"RACE with a copy in flight at shared offset \d+: read at",
    "uncommitted_copy": r"RACE with a copy in flight at shared offset \d+: read at",
    "too_many_arrivals": r"mbarrier\.arrive at .*: more arrivals in phase 0 than the 40",
    "wrong_parity": r"DEADLOCK(.|\n)*32 threads \{0-31\} in mbarrier wait at .* parity 1; phase 1",
    "endless_polling": r"DEADLOCK(.|\n)*mbarrier test_wait at",
    "no_mbarrier": r"mbarrier\.arrive at .*: no mbarrier was initialised at shared offset 0",
    "double_init": r"shared offset 0 holds an mbarrier since",
    "wgmma_without_fence": r"MISSING fence\.proxy\.async at shared offset \d+: asynchronous read at .* ordinary write",
    "accumulators_written": r"RACE: accumulator register 0 is written while a wgmma is in flight",
    "operands_overwritten": r"RACE with an asynchronous read in flight at shared offset \d+: write at",
    "different_wgmma": r"DIVERGENT wgmma at .*: warps \d and \d of a warpgroup issue different operations",
    "wgmma_never_waited_for": r"EXIT with a wgmma in flight, issued at",
    "unknown_instruction": r"PTX at .* knows no instruction fence\.proxy\.async\.shared::block",
    "operand_of_wrong_kind": r"PTX at .* takes the operands \[r\],\[l\],n,r, not \[l\],\[r\],n,r",
    "operand_forgotten": r"PTX at .* operand %1 is not used",
    "operand_missing": r"PTX at .* operand %1 does not exist",
    "register_undeclared": r"PTX at .* \"q\" is not declared",
}

LEGAL = (
    "syncwarp_orders",
    "half_warp_syncs",
    "neighbouring_bytes",
    "atomics_then_barrier",
    "arrive_and_sync",
    "exit_before_barrier",
    "copy_of_nothing",
    "arrive_releases",
    "wgmma_with_fence",
)


@pytest.fixture(scope="module")
def library() -> emulator.Library:
    return emulator.build(SOURCE)


def run(library: emulator.Library, kernel: str, seed: int) -> None:
    out = torch.zeros(256)
    library.call(f"run_{kernel}", out, seed=seed, tensors={"out": out})


def test_every_kernel_has_its_case() -> None:
    entries = re.findall(r"^ENTRY\((\w+),", SOURCE.read_text(), re.MULTILINE)
    assert sorted(entries) == sorted([*BROKEN, *LEGAL])


@pytest.mark.parametrize("seed", emulator.SEEDS)
@pytest.mark.parametrize("kernel", BROKEN)
def test_broken_rule_is_named(library: emulator.Library, kernel: str, seed: int) -> None:
    with pytest.raises(emulator.Diagnosis, match=BROKEN[kernel]) as caught:
        run(library, kernel, seed)
    lines = [int(line) for line in re.findall(r"kernels/rules\.cu:(\d+)", str(caught.value))]
    assert lines, "the report names no line"
    assert any(line in lines_of(kernel) for line in lines), f"{lines} are not lines of {kernel}"


def lines_of(kernel: str) -> range:
    """The lines of a kernel's definition, with the device functions that it calls in front of it."""
    text = SOURCE.read_text().splitlines()
    name = "wgmma_of_ordinary_writes" if kernel.startswith("wgmma_with") else kernel
    start = next(i for i, line in enumerate(text) if re.search(rf"__global__ void {name}\(", line))
    end = next(i for i in range(start, len(text)) if text[i].rstrip().endswith("}") and not text[i].startswith("  "))
    calls_helper = kernel in {"stack_overflow", "double_init"}
    return range(1 if calls_helper else start + 1, end + 2)


@pytest.mark.parametrize("seed", emulator.SEEDS)
@pytest.mark.parametrize("kernel", LEGAL)
def test_legal_kernel_passes(library: emulator.Library, kernel: str, seed: int) -> None:
    run(library, kernel, seed)
