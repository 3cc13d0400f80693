"""Two complete kernels against float64, and red for every bug seeded into them, under each schedule."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import pytest
import torch

from simt import emulator

KERNELS = Path(__file__).parent / "kernels"

# The report, or None where the kernel is legal but wrong: there the result has to show it.
SCORE_BUGS = {
    "kNoCopyWait": r"RACE with a copy in flight .*: read at .* copy issued at",
    "kNoBarrierAfterWait": r"RACE at .*: read at .* unordered write at|UNINITIALISED shared memory",
    "kNoBarrierBeforeRefill": r"RACE .*: (write at .* unordered read|read at .* (unordered write|copy issued))",
    "kNoSwizzle": None,
    "kPlainIncrement": r"RACE at .*: read at (\S+), unordered write at \1 by",
    "kDivergentShuffle": r"exits while others of its warp wait for it in shfl\.bfly|names lanes \w+, which have exited",
    "kNoRowGuard": r"OUT OF BOUNDS: global write of 4 bytes at offset \d+ of row_max",
    "kNoInitialisation": r"UNINITIALISED shared memory at offset \d+",
    "kMisalignedCopy": r"MISALIGNED cp\.async",
    "kEarlyExit": r"EXIT with 4 cp\.async in flight",
}
ATTENTION_BUGS = {
    "kNoFullWait": r"RACE (with a copy in flight )?at .*: asynchronous read at .* (copy issued|unordered write) at",
    "kEarlyRelease": r"RACE .*: (asynchronous )?write at .* by (wgmma of warpgroup \d|thread \d+)",
    "kNoWgmmaWait": r"RACE: accumulator register \d+ is read while a wgmma is in flight",
    "kNoWgmmaFence": r"MISSING wgmma\.fence before the wgmma at",
    "kNoProxyFence": r"MISSING fence\.proxy\.async .*: asynchronous read at .* ordinary write at",
    "kTooManyBytes": r"DEADLOCK(.|\n)*pending arrivals 0 of 1, pending bytes 16",
    "kTooFewBytes": r"RACE (with a copy in flight )?at .*: asynchronous read at .* (copy issued|unordered write) at",
    "kMissingRelease": r"DEADLOCK(.|\n)*parity 0; phase 0, pending arrivals [1-9] of 8",
    "kWrongBarrierCount": r"DEADLOCK(.|\n)*barrier 1: 128 of 256 arrived(.|\n)*barrier 2: 128 of 256 arrived",
    "kNoBarrierAfterInit": r"RACE: mbarrier\.\w+ .* without a barrier after its init|no mbarrier was initialised",
    "kNoInitFence": r"MISSING fence\.mbarrier_init",
    "kWrongDescriptor": None,
    "kNoBarrierBeforeStore": r"RACE at .*: asynchronous read at .* unordered write at|RACE with an asynchronous read",
    "kNoStoreWait": r"EXIT with a TMA store in flight",
}
ATTENTION_LEGAL = ("kNone", "kOneReleasePerGroup")


def bugs_in(source: Path) -> dict[str, int]:
    """The enumerators of the kernel's Bug, which the tests must cover."""
    match = re.search(r"enum class Bug : int \{(.*?)\};", source.read_text(), re.DOTALL)
    assert match is not None
    names = re.findall(r"^\s*(k\w+),", match.group(1), re.MULTILINE)
    return {name: index for index, name in enumerate(names)}


SCORE = bugs_in(KERNELS / "score.cuh")
ATTENTION = bugs_in(KERNELS / "attention.cuh")


def test_every_bug_has_its_case() -> None:
    assert set(SCORE) == {"kNone", *SCORE_BUGS}
    assert set(ATTENTION) == {*ATTENTION_LEGAL, *ATTENTION_BUGS}


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy at an address that is a multiple of 128, in a storage that ends with it."""
    num_bytes = tensor.numel() * tensor.element_size()
    storage = torch.empty(num_bytes + 128, dtype=torch.uint8)
    start = -storage.data_ptr() % 128
    copy = storage[start : start + num_bytes].view(tensor.dtype).view(tensor.shape)
    return copy.copy_(tensor)


def integers(generator: torch.Generator, num_heads: int, num_rows: int) -> torch.Tensor:
    """Small whole numbers: their scores are exact in every order of summation."""
    return aligned(torch.randint(-3, 4, (num_heads, num_rows, 64), generator=generator).bfloat16())


class ScoreCase:
    """Runs the sm_80 kernel; `is_correct` compares with float64, exactly."""

    low, inverse_width, scale, num_bins = -100.25, 16 / 200, 0.5, 16

    def __init__(self, num_rows: int, num_heads: int = 1) -> None:
        generator = torch.Generator().manual_seed(num_rows)
        self.query, self.key = (integers(generator, num_heads, num_rows) for _ in range(2))
        self.row_max = torch.full((num_heads, num_rows), float("nan"))
        self.histogram = torch.full((num_heads, num_rows, self.num_bins), -1, dtype=torch.int32)

    def run(self, library: emulator.Library, seed: int, bug: str = "kNone") -> dict[str, int]:
        number = ctypes.c_float
        return library.call(
            "run_score",
            self.query,
            self.key,
            self.row_max,
            self.histogram,
            *self.query.shape[:2],
            number(self.scale),
            number(self.low),
            number(self.inverse_width),
            SCORE[bug],
            seed=seed,
            tensors={
                "query": self.query,
                "key": self.key,
                "row_max": self.row_max,
                "histogram": self.histogram,
            },
        )

    def is_correct(self) -> bool:
        score = self.scale * self.query.double() @ self.key.double().mT
        bins = ((score - self.low) * self.inverse_width).floor().clamp(0, self.num_bins - 1)
        histogram = torch.stack([(bins == index).sum(-1) for index in range(self.num_bins)], -1)
        return torch.equal(self.row_max.double(), score.amax(-1)) and torch.equal(self.histogram.long(), histogram)


class AttentionCase:
    """Runs the sm_90a kernel; exact inputs again, so that score is exact and out is its rounding to bf16."""

    scale = 0.125

    def __init__(self, num_rows: int, num_heads: int = 1) -> None:
        generator = torch.Generator().manual_seed(num_rows)
        self.query, self.key, self.value = (integers(generator, num_heads, num_rows) for _ in range(3))
        self.out = aligned(torch.full((num_heads, num_rows, 64), float("nan")).bfloat16())
        self.score = torch.full((num_heads, num_rows, num_rows), float("nan"))

    def run(self, library: emulator.Library, seed: int, bug: str = "kNone") -> dict[str, int]:
        tensors = {
            "query": self.query,
            "key": self.key,
            "value": self.value,
            "out": self.out,
            "score": self.score,
        }
        shape = self.query.shape[:2]
        scale = ctypes.c_float(self.scale)
        return library.call(
            "run_attention", *tensors.values(), *shape, scale, ATTENTION[bug], seed=seed, tensors=tensors
        )

    def is_correct(self) -> bool:
        score = self.scale * self.query.double() @ self.key.double().mT
        # |score| <= 72 in steps of 1/8 has at most 10 bits: bf16 rounds it, and the products of that are exact again.
        out = score.bfloat16().double() @ self.value.double()
        return torch.equal(self.score.double(), score) and torch.equal(self.out, out.bfloat16())


@pytest.fixture(scope="module")
def score_library() -> emulator.Library:
    return emulator.build(KERNELS / "score.cu")


@pytest.fixture(scope="module")
def attention_library() -> emulator.Library:
    return emulator.build(KERNELS / "attention.cu")


@pytest.mark.parametrize("seed", emulator.SEEDS)
@pytest.mark.parametrize("num_rows", (1, 63, 64, 65, 129, 200))
def test_score_kernel(score_library: emulator.Library, num_rows: int, seed: int) -> None:
    case = ScoreCase(num_rows, num_heads=2)
    case.run(score_library, seed)
    assert case.is_correct()


@pytest.mark.parametrize("seed", emulator.SEEDS)
@pytest.mark.parametrize("bug", SCORE_BUGS)
def test_bug_in_score_kernel_is_named(score_library: emulator.Library, bug: str, seed: int) -> None:
    case = ScoreCase(200)
    report = SCORE_BUGS[bug]
    if report is None:
        case.run(score_library, seed, bug)
        assert not case.is_correct()
        return
    with pytest.raises(emulator.Diagnosis, match=report) as caught:
        case.run(score_library, seed, bug)
    assert re.search(r"kernels/score\.cuh:\d+", str(caught.value))


@pytest.mark.parametrize("seed", emulator.SEEDS)
@pytest.mark.parametrize("num_rows", (1, 127, 128, 130, 300))
def test_attention_kernel(attention_library: emulator.Library, num_rows: int, seed: int) -> None:
    case = AttentionCase(num_rows)
    case.run(attention_library, seed)
    assert case.is_correct()


@pytest.mark.parametrize("seed", emulator.SEEDS)
@pytest.mark.parametrize("bug", ATTENTION_BUGS)
def test_bug_in_attention_kernel_is_named(attention_library: emulator.Library, bug: str, seed: int) -> None:
    case = AttentionCase(500)
    report = ATTENTION_BUGS[bug]
    if report is None:
        case.run(attention_library, seed, bug)
        assert not case.is_correct()
        return
    with pytest.raises(emulator.Diagnosis, match=report) as caught:
        case.run(attention_library, seed, bug)
    assert re.search(r"kernels/attention\.cuh:\d+", str(caught.value))


@pytest.mark.parametrize("seed", emulator.SEEDS)
def test_one_release_per_warpgroup_is_legal(attention_library: emulator.Library, seed: int) -> None:
    case = AttentionCase(500)
    case.run(attention_library, seed, "kOneReleasePerGroup")
    assert case.is_correct()


def test_plain_build_agrees() -> None:
    case = ScoreCase(300)
    case.run(emulator.build(KERNELS / "score.cu", instrumented=False), 0)
    assert case.is_correct()


def test_seed_reproduces_the_report(score_library: emulator.Library) -> None:
    reports = set()
    for _ in range(2):
        with pytest.raises(emulator.Diagnosis) as caught:
            ScoreCase(200).run(score_library, 7, "kPlainIncrement")
        reports.add(str(caught.value))
    assert len(reports) == 1


@pytest.mark.parametrize("seed", (0, 3))
def test_counters(score_library: emulator.Library, attention_library: emulator.Library, seed: int) -> None:
    """Counts that follow from the shapes alone, whatever the schedule."""
    num_rows, tiles = 200, 4
    counters = ScoreCase(num_rows).run(score_library, seed)
    assert counters["blocks"] == tiles
    assert counters["mma"] == tiles * tiles * 4 * (64 // 8) * (64 // 16)  # 4 warps of 16 rows, 64 keys, depth 64
    assert counters["ldmatrix"] == tiles * 4 * 4 + counters["mma"] // 2
    assert counters["ldmatrix_wavefronts"] == 4 * counters["ldmatrix"]  # no bank conflicts
    assert counters["cp_async_bytes"] == (num_rows + tiles * num_rows) * 64 * 2
    assert counters["shared_atomics"] == 4 * 64 * num_rows  # rows past the end are counted too
    assert counters["block_syncs"] == tiles * tiles * 2
    assert counters["shuffles"] == tiles * 4 * 4
    assert counters["global_store_bytes"] == num_rows * 4 + num_rows * 16 * 4

    unswizzled = ScoreCase(num_rows).run(score_library, seed, "kNoSwizzle")
    # All of a matrix's 8 rows on the same banks, but for those of the query (4 a warp).
    query = tiles * 4 * 4 * 4
    assert unswizzled["ldmatrix_wavefronts"] - query == 8 * (counters["ldmatrix_wavefronts"] - query)

    num_rows, blocks, tiles = 300, 3, 3
    counters = AttentionCase(num_rows).run(attention_library, seed)
    assert counters["wgmma"] == blocks * tiles * 2 * (4 + 8)
    assert counters["wgmma_macs"] == blocks * tiles * 2 * 128 * 128 * 64
    assert counters["tma_load_bytes"] == (blocks + blocks * tiles * 2) * 128 * 64 * 2
    assert counters["tma_store_bytes"] == blocks * 128 * 64 * 2
    assert counters["named_barriers"] == blocks * 2
    assert counters["mbarrier_phases"] == blocks * (1 + tiles * 2)
    assert counters["mbarrier_arrivals"] == blocks * (1 + tiles + tiles * 8)
