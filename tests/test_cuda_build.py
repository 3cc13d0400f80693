"""What nvcc made of the kernels that are built: nothing spilled in any of them, the instructions that were meant.

The extension has all instances for the architectures of its TORCH_CUDA_ARCH_LIST (in CI sm_90, and sm_90a for Hopper's
own), the library that `make ctest` builds has the portable ones for sm_80.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from simt.test_sass import disassembler

from adasplash2 import _C

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = {"extension": Path(_C.__file__), "ctest": ROOT / "build" / "cmake" / "libadasplash2_cuda.so"}

# Kernels with products, by path, what each has to consist of, and the instances of each: element type and head dim.
KERNELS = {
    "sm80": {"scan", "output", "grad_query", "grad_key_value", "grad_alpha", "grad_mask"},
    "sm90": {"scan", "refine", "output", "grad_query", "grad_key_value"},
}
OPCODES = {"sm80": (b" HMMA", b" LDSM", b" LDGSTS"), "sm90": (b" HGMMA", b" UTMALDG", b" SYNCS")}
SPILLS = (b" LDL", b" STL")
INSTANCES = {
    "sm80": {(element, dim) for element in ("__nv_bfloat16", "__half", "f") for dim in (64, 128, 256)},
    "sm90": {(element, dim) for element in ("__nv_bfloat16", "__half") for dim in (64, 128)},
}
_NAME = re.compile(r"10adasplash24cuda(4sm90)?\d+([a-z_]+)_kernelI(?:\d*)(__nv_bfloat16|__half|f)Li(\d+)E")


def cuobjdump(option: str, library: str, *options: str) -> bytes:
    tool = disassembler()
    if tool is None:
        pytest.skip("no cuobjdump: install nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm")
    path = f"{Path(tool).parent}:/usr/bin:/bin"  # cuobjdump calls the nvdisasm beside it
    command = [tool, option, *options, str(LIBRARIES[library])]
    return subprocess.run(command, stdout=subprocess.PIPE, check=True, env={"PATH": path}).stdout


@cache
def resources(library: str) -> dict[tuple[str, str], dict[str, int]]:
    """Registers and memory of every kernel, by (architecture, mangled name)."""
    if library == "extension" and not _C.has_cuda:
        pytest.skip(f"the extension has no CUDA kernels: {_C.cuda_missing}")
    if not LIBRARIES[library].exists():
        pytest.skip(f"{LIBRARIES[library]} is not built: make ctest, where nvcc is on PATH")
    found, arch, name = {}, "", ""
    for line in cuobjdump("-res-usage", library).decode().splitlines():
        if match := re.match(r"arch = (\w+)", line):
            arch = match[1]
        elif match := re.match(r" Function (\w+):", line):
            name = match[1]
        elif line.startswith("  REG:"):
            found[arch, name] = {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", line)}
    return found


def path_and_instance(name: str) -> tuple[str, str, tuple[str, int]] | None:
    """Path, kernel and (element, head dim) of a mangled name; None for kernels without instances."""
    match = _NAME.search(name)
    return match and ("sm90" if match[1] else "sm80", match[2], (match[3], int(match[4])))


@pytest.mark.parametrize("library", LIBRARIES)
def test_nothing_spills(library: str) -> None:
    """A kernel that spills has a stack, and so has one whose arrays are not in registers."""
    used = resources(library)
    assert used
    kernels = {at: use for at, use in used.items() if "adasplash2" in at[1]}
    assert {at: use for at, use in kernels.items() if use["STACK"] or use["LOCAL"]} == {}
    for arch in {arch for arch, _ in kernels}:
        named = [path_and_instance(name) for kernel_arch, name in kernels if kernel_arch == arch]
        path = "sm90" if arch == "sm_90a" else "sm80"
        for kernel in KERNELS[path]:
            there = {found[2] for found in named if found is not None and found[:2] == (path, kernel)}
            assert there == INSTANCES[path], (arch, kernel)


@pytest.mark.parametrize("library, arch", [("ctest", "sm_80"), ("extension", "sm_90a")])
def test_instructions(library: str, arch: str) -> None:
    """Of each kernel once: to take code apart is slow, and its instructions for sm_90 are those for sm_80."""
    if arch not in {there for there, _ in resources(library)}:
        pytest.skip(f"{LIBRARIES[library].name} has no code for {arch}")
    num_checked = 0
    _, *blocks = cuobjdump("-sass", library, "-arch", arch).split(b"Function : ")
    for block in blocks:
        name = block[: block.index(b"\n")].decode()
        assert not any(opcode in block for opcode in SPILLS), name
        found = path_and_instance(name)
        if found is None or found[1] not in KERNELS[found[0]]:
            continue
        missing = [opcode for opcode in OPCODES[found[0]] if opcode not in block]
        assert not missing, (name, missing)
        num_checked += 1
    path = "sm90" if arch == "sm_90a" else "sm80"
    assert num_checked >= len(KERNELS[path]) * len(INSTANCES[path])


@pytest.mark.parametrize("unit, target", [("sm80/instances/bfloat16_256", "-ptx"), ("any_arch/entmax", "-cubin")])
def test_ptx_for_newer_gpus(unit: str, target: str, tmp_path: Path) -> None:
    """PTX of compute_80, which builds have for GPUs to come: of an instance; of entmax through to the newest GPU."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on PATH")
    code = "compute_80" if target == "-ptx" else "sm_120"
    command = ["nvcc", "-std=c++17", "-O3", f"-gencode=arch=compute_80,code={code}", target]
    command += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/cuda/device'}"]
    subprocess.run([*command, str(ROOT / f"csrc/cuda/{unit}.cu"), "-o", str(tmp_path / "made")], check=True)


def test_serialised_wgmma_fails_the_build(setup_script: dict[str, Any], tmp_path: Path) -> None:
    """With an nvcc that says so and leaves an object file, which the next build may not take."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    said = "ptxas info : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized"
    (tmp_path / "made").mkdir()
    for message, is_error in ((said, True), ("ptxas info : 0 bytes gmem", False)):
        nvcc.write_text(f'#!/bin/sh\necho "{message}"\nwhile [ "$1" != -o ]; do shift; done\ntouch "$2"\n')
        nvcc.chmod(0o755)
        arguments = (tmp_path, setup_script["HOPPER_KERNELS"][0], ["-gencode"], tmp_path / "made")
        if is_error:
            with pytest.raises(SystemExit, match=r"ptxas serialises wgmma: .*C7510"):
                setup_script["compile_kernel"](*arguments)
            assert not list((tmp_path / "made").iterdir())
        else:
            assert Path(setup_script["compile_kernel"](*arguments)).exists()


def test_hopper_kernels_are_built_without_spills(setup_script: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0")
    flags = dict(setup_script["kernel_jobs"]())
    assert all("-Xptxas=-warn-spills,-Werror" in flags[kernel] for kernel in setup_script["HOPPER_KERNELS"])
    assert len(setup_script["HOPPER_KERNELS"]) == len(INSTANCES["sm90"])
