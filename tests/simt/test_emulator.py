"""The Python side: builds, patches, and what a call reports."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path

import pytest
import torch

from simt import emulator

RULES = Path(__file__).parent / "kernels" / "rules.cu"
HALF_WARP_BUG = emulator.Patch(
    "tests/simt/kernels/rules.cu", "  __syncwarp(threadIdx.x < 16", "  if (false) __syncwarp(threadIdx.x < 16"
)


def test_builds_are_cached() -> None:
    first, second = emulator.build(RULES), emulator.build(RULES)
    assert first.path == second.path
    assert emulator.build(RULES, instrumented=False).path != first.path


def test_patch_must_fit_once(tmp_path: Path) -> None:
    (tmp_path / "kernel.cuh").write_text("wait(); wait(); go();")
    with pytest.raises(ValueError, match="2 occurrences"):
        emulator.Patch("kernel.cuh", "wait();", "").apply(tmp_path)
    with pytest.raises(ValueError, match="0 occurrences"):
        emulator.Patch("kernel.cuh", "stop();", "").apply(tmp_path)
    emulator.Patch("kernel.cuh", "go();", "run();").apply(tmp_path)
    assert (tmp_path / "kernel.cuh").read_text() == "wait(); wait(); run();"


def test_patch_changes_the_copy_alone() -> None:
    before = RULES.read_text()
    patched, out = emulator.build(RULES, patches=[HALF_WARP_BUG]), torch.zeros(32)
    with pytest.raises(emulator.Diagnosis, match=r"RACE|UNINITIALISED"):
        patched.call("run_half_warp_syncs", out, tensors={"out": out})
    assert RULES.read_text() == before
    emulator.build(RULES).call("run_half_warp_syncs", out, tensors={"out": out})
    assert out.tolist() == [float(i ^ 1) for i in range(32)]


def test_many_patched_libraries_fit_a_process() -> None:
    """Of the mappings that a process may have, a stack and its guard page are two."""

    def count_mappings() -> int:
        return len(Path("/proc/self/maps").read_text().splitlines())

    harmless = emulator.Patch(HALF_WARP_BUG.file, HALF_WARP_BUG.old, HALF_WARP_BUG.new.replace("false", "true"))
    library, out = emulator.build(RULES, patches=[harmless]), torch.zeros(32)
    before = count_mappings()
    library.call("run_half_warp_syncs", out, tensors={"out": out})
    assert count_mappings() < before + 32


def test_patch_concerns_sources_that_use_its_file() -> None:
    rules, score = (emulator.Patch(f"tests/simt/kernels/{name}", "a", "b") for name in ("rules.cu", "score.cuh"))
    flags = (*emulator._KERNEL_FLAGS, *emulator._include_flags(emulator.ROOT))
    assert emulator._patches_of(RULES, flags, [rules, score]) == [rules]
    assert emulator._patches_of(RULES.with_name("score.cu"), flags, [rules, score]) == [score]
    with pytest.raises(ValueError, match=r"score.cuh is of no use to rules.cu"):
        emulator.build(RULES, patches=[rules, score])


def test_compile_error_is_passed_on(tmp_path: Path) -> None:
    patch = emulator.Patch(
        "tests/simt/kernels/rules.cu", "float* smem_floats() {", "float* smem_floats() { __shared__ int i;"
    )
    with pytest.raises(RuntimeError, match="use adasplash2::dynamic_smem"):
        emulator.build(RULES, patches=[patch])


def test_a_call_goes_on_after_a_report() -> None:
    """Nothing of a failed launch is left in the next one."""
    library, out = emulator.build(RULES), torch.zeros(256)
    for kernel in ("uncommitted_copy", "wgmma_never_waited_for", "different_barriers", "endless_polling"):
        with pytest.raises(emulator.Diagnosis):
            library.call(f"run_{kernel}", out, tensors={"out": out})
        for legal in ("arrive_and_sync", "wgmma_with_fence", "arrive_releases", "copy_of_nothing"):
            library.call(f"run_{legal}", out, tensors={"out": out})


def test_libraries_share_no_symbol() -> None:
    """The loader would take one that is unique from whichever library came first; its address is then out of bounds."""
    symbols = subprocess.run(["nm", str(emulator.build(RULES).path)], capture_output=True, text=True, check=True).stdout
    assert " T run_syncwarp_orders" in symbols and " u " not in symbols


def test_bounds_are_those_of_the_registered_tensors() -> None:
    library = emulator.build(RULES)
    out = torch.zeros(33)
    library.call("run_syncwarp_orders", out[1:], tensors={"out": out[1:]})
    with pytest.raises(emulator.Diagnosis, match=r"write of 4 bytes at offset (128|252) of out, which has 128"):
        library.call("run_neighbouring_bytes", out[1:], tensors={"out": out[1:]})
    with pytest.raises(emulator.Diagnosis, match=r"before every registered tensor|of elsewhere"):
        library.call("run_syncwarp_orders", out, tensors={"elsewhere": torch.zeros(32)})


def test_refused_tensor_map_is_described() -> None:
    """With every field of it: of the same function that describes what a GPU's driver refuses."""
    tensor = torch.zeros(2, 130, 64, dtype=torch.bfloat16)
    library = emulator.build(RULES.with_name("attention.cu"))
    misaligned = ctypes.c_void_p(tensor.data_ptr() + 2)
    expected = (
        rf"tensor map: the base must be 16-byte aligned: element bfloat16, base {tensor.data_ptr() + 2:#x}, rank 3, "
        r"sizes \{64, 130, 2\}, strides in bytes \{128, 16640\}, box \{64, 64, 1\}, swizzle 128"
    )
    others = [ctypes.c_void_p(tensor.data_ptr())] * 4
    with pytest.raises(emulator.Diagnosis, match=expected):
        library.call("run_attention", misaligned, *others, 2, 130, ctypes.c_float(1.0), 0, tensors={"tensor": tensor})
