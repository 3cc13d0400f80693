"""nvcc accepts every wrapper on the architectures that have it, and the SASS holds the instruction that was meant."""

from __future__ import annotations

import re
import shutil
import subprocess
import sysconfig
from functools import cache
from pathlib import Path

import pytest

from simt import emulator

SOURCE = Path(__file__).parent / "sass_probes.cu"

# The instruction that a probe must hold exactly once, by a pattern at its start.
AMPERE = {
    "cp_async_16": r"LDGSTS\.E\.BYPASS\.128\.ZFILL",
    "cp_async_8": r"LDGSTS\.E\.64\.ZFILL",
    "cp_async_4": r"LDGSTS\.E\.ZFILL",
    "cp_async_commit": r"LDGDEPBAR",
    "cp_async_wait": r"DEPBAR\.LE SB0, 0x1",
    "ldmatrix_x4": r"LDSM\.16\.M88\.4",
    "ldmatrix_x4_trans": r"LDSM\.16\.MT88\.4",
    "ldmatrix_x2": r"LDSM\.16\.M88\.2",
    "ldmatrix_x2_trans": r"LDSM\.16\.MT88\.2",
    "mma_m16n8k16_bf16": r"HMMA\.16816\.F32\.BF16",
    "mma_m16n8k16_f16": r"HMMA\.16816\.F32 ",
    "mma_m16n8k8_tf32": r"HMMA\.1688\.F32\.TF32",
    "pack_bf16": r"F2FP\.BF16\.",
    "pack_f16": r"F2FP\.(F16\.F32\.)?PACK_AB",
    "pack_f16_relu": r"F2FP\.(F16\.F32\.)?RELU",
    "to_tf32": r"LOP3\.LUT \w+, \w+, 0xffffe000",  # rounding to tf32 has no instruction of its own
    "max_nan": r"FMNMX\.NAN",
    "barrier_sync": r"BAR\.SYNC\S* 0x1, 0x40",
    "barrier_arrive": r"BAR\.ARV 0x1, 0x40",
    "shared_atomic_add": r"ATOMS\.ADD RZ",
    "shared_atomic_add_signed": r"ATOMS\.ADD RZ",
    "shared_atomic_max": r"ATOMS\.MAX\.S32 RZ",
    "shared_atomic_or": r"ATOMS\.OR RZ",
    "global_atomic_add_float": r"RED\S*\.ADD\.F32",
    "vimax3": r"(VIMNMX3|IMNMX \w+, \w+, c\[0x0\]\[0x168\])",
    "fmaf_rd": r"FFMA\.RM",
}
HOPPER = {
    **AMPERE,
    "vimax3": r"VIMNMX3",
    "stmatrix_x4": r"STSM\.16\.M88\.4",
    "stmatrix_x4_trans": r"STSM\.16\.MT88\.4",
    "mbarrier_init": r"SYNCS\.EXCH\.64",
    "mbarrier_inval": r"SYNCS\.CCTL\.IV",
    "mbarrier_arrive": r"SYNCS\.ARRIVE\.TRANS64\.A1T0",
    "mbarrier_arrive_expect_tx": r"SYNCS\.ARRIVE\.TRANS64 ",
    "mbarrier_expect_tx": r"SYNCS\.ARRIVE\.TRANS64\.RED\.A0TR",
    "mbarrier_test_wait": r"SYNCS\.PHASECHK\.TRANS64 ",
    "mbarrier_try_wait": r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT",
    "mbarrier_wait": r"SYNCS\.PHASECHK\.TRANS64\.TRYWAIT",
    "fence_proxy_async": r"FENCE\.VIEW\.ASYNC",
    "elect_one": r"ELECT",
    "setmaxnreg_increase": r"USETMAXREG\.TRY_ALLOC\.CTAPOOL UP0, 0xe8",
    "setmaxnreg_decrease": r"USETMAXREG\.DEALLOC\.CTAPOOL 0x28",
    "tma_prefetch_descriptor": r"UTMACCTL\.PF",
    **{f"tma_load_{rank}d": rf"UTMALDG\.{rank}D" for rank in (2, 3, 4, 5)},
    **{f"tma_store_{rank}d": rf"UTMASTG\.{rank}D" for rank in (2, 3, 4, 5)},
    **{f"tma_reduce_add_{rank}d": rf"UTMAREDG\.{rank}D\.ADD" for rank in (2, 3, 4)},
    "tma_store_commit": r"UTMACMDFLUSH",
    "tma_store_wait_read": r"DEPBAR\.LE SB0, 0x0",
    "tma_store_wait": r"DEPBAR\.LE SB0, 0x0",
    **{f"wgmma_ss_n{n}_bf16": rf"HGMMA\.64x{n}x16\.F32\.BF16 .*gdesc\[\w+\]\.tnspB" for n in (64, 96, 128, 192, 256)},
    **{f"wgmma_ss_n{n}_f16": rf"HGMMA\.64x{n}x16\.F32 .*gdesc\[\w+\]\.tnspB" for n in (64, 96, 128, 192, 256)},
    **{f"wgmma_rs_n{n}_bf16": rf"HGMMA\.64x{n}x16\.F32\.BF16 R\d+, R\d+, gdesc" for n in (64, 96, 128, 192, 256)},
    **{f"wgmma_rs_n{n}_f16": rf"HGMMA\.64x{n}x16\.F32 R\d+, R\d+, gdesc" for n in (64, 96, 128, 192, 256)},
}
# What a fence, a commit and a wait around one wgmma become.
WGMMA_FRAME = (r"WARPGROUP\.ARRIVE", r"HGMMA.* gsb0", r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0")
# Orders the initialisation of mbarriers on Hopper without an instruction: nothing comes between init and use.
WITHOUT_INSTRUCTION = {"fence_mbarrier_init"}

EXPECTED = {"80": AMPERE, "90a": HOPPER}


def disassembler() -> str | None:
    """cuobjdump: of the toolkit, or of the package nvidia-cuda-cuobjdump."""
    packaged = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/*/bin/cuobjdump"))
    return shutil.which("cuobjdump") or (str(packaged[0]) if packaged else None)


@cache
def functions(architecture: str) -> dict[str, list[str]]:
    """The instructions of every probe."""
    nvcc, cuobjdump = shutil.which("nvcc"), disassembler()
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    if cuobjdump is None:
        pytest.skip("no cuobjdump: install nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm")
    emulator.BUILD.mkdir(parents=True, exist_ok=True)
    cubin = emulator.BUILD / f"sass_probes-{architecture}.cubin"
    include = [f"-I{emulator.ROOT / 'csrc'}", f"-I{emulator.ROOT / 'csrc' / 'cuda' / 'device'}"]
    code = ["-gencode", f"arch=compute_{architecture},code=sm_{architecture}"]
    command = [nvcc, "-std=c++17", "-Werror", "all-warnings", *code, "-cubin", *include, str(SOURCE), "-o", str(cubin)]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stdout + compiled.stderr
    path = f"{Path(cuobjdump).parent}:/usr/bin:/bin"  # cuobjdump calls the nvdisasm beside it
    dump = subprocess.run([cuobjdump, "-sass", str(cubin)], capture_output=True, text=True, env={"PATH": path})
    assert dump.returncode == 0, dump.stderr
    found: dict[str, list[str]] = {}
    name = ""
    for line in dump.stdout.splitlines():
        if match := re.search(r"Function : probe_(\w+)", line):
            name = match.group(1)
            found[name] = []
        elif match := re.search(r"/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\w+ )?([^;]*)", line):
            found[name].append(match.group(1))
    return found


@pytest.mark.parametrize("architecture", EXPECTED)
def test_every_probe_is_expected(architecture: str) -> None:
    names = set(functions(architecture))
    assert names == set(EXPECTED[architecture]) | (WITHOUT_INSTRUCTION if architecture == "90a" else set())


@pytest.mark.parametrize(
    ("architecture", "name"), [(architecture, name) for architecture, names in EXPECTED.items() for name in names]
)
def test_wrapper_is_one_instruction(architecture: str, name: str) -> None:
    instructions = functions(architecture)[name]
    pattern = EXPECTED[architecture][name]
    assert sum(re.match(pattern, instruction) is not None for instruction in instructions) == 1, instructions


@pytest.mark.parametrize("name", [name for name in HOPPER if name.startswith("wgmma")])
def test_wgmma_is_neither_split_nor_serialised(name: str) -> None:
    instructions = functions("90a")[name]
    frame = [line for line in instructions if re.match(r"WARPGROUP|HGMMA", line)]
    assert len(frame) == len(WGMMA_FRAME)
    assert all(re.match(pattern, line) for pattern, line in zip(WGMMA_FRAME, frame, strict=True)), frame


@pytest.mark.parametrize("architecture", EXPECTED)
@pytest.mark.parametrize("name", [name for name in AMPERE if name.startswith("shared_atomic")])
def test_integer_atomics_are_no_loops(architecture: str, name: str) -> None:
    instructions = functions(architecture)[name]
    atomics = [line for line in instructions if line.startswith("ATOMS")]
    assert len(atomics) == 1 and not re.search("CAS|SPIN", atomics[0]), instructions


@pytest.mark.parametrize("architecture", EXPECTED)
def test_self_test_compiles(architecture: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not on PATH")
    include = [f"-I{emulator.ROOT / 'csrc'}", f"-I{emulator.ROOT / 'csrc' / 'cuda' / 'device'}"]
    source = SOURCE.parent / "ptx_selftest.cu"
    command = [nvcc, "-std=c++17", f"-arch=sm_{architecture}", *include, str(source), "-o", str(tmp_path / "selftest")]
    compiled = subprocess.run(command, capture_output=True, text=True)
    assert compiled.returncode == 0, compiled.stdout + compiled.stderr
