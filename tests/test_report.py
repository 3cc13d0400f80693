"""``python -m adasplash2``: what it says of this build, and of builds and machines that are not here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from adasplash2 import _C, __main__, __version__

BUILD = {"isa": _C.isa, "isa_levels": _C.isa_levels, "compiler": "g++ 12.2.0"}
NO_CUDA = {"has_cuda": False, "cuda_missing": "this build found no nvcc", "cuda_build": "", "cuda_paths": []}
WITH_CUDA = {"has_cuda": True, "cuda_missing": "", "cuda_build": "nvcc 13.0 for sm_80, compute_80, sm_90, sm_90a"}
BOTH_PATHS = {**WITH_CUDA, "cuda_paths": ["sm80", "sm90"]}
NO_HOPPER = {**WITH_CUDA, "cuda_build": "nvcc 13.0 for sm_80", "cuda_paths": ["sm80"]}
WHY_NO_HOPPER = "(none of Hopper's own: TORCH_CUDA_ARCH_LIST of the build named no 9.0)"

CASES = {
    "no CUDA": (NO_CUDA, None, "g++ 12.2.0; no CUDA kernels", "not available: this build found no nvcc"),
    "no GPU": (
        BOTH_PATHS,
        None,
        "g++ 12.2.0; nvcc 13.0 for sm_80, compute_80, sm_90, sm_90a",
        "sm80 and sm90 kernels built, but torch finds no GPU",
    ),
    "no Hopper kernels, no GPU": (
        NO_HOPPER,
        None,
        "g++ 12.2.0; nvcc 13.0 for sm_80",
        f"sm80 kernels {WHY_NO_HOPPER} built, but torch finds no GPU",
    ),
    "Hopper": (
        BOTH_PATHS,
        (9, 0),
        "g++ 12.2.0; nvcc 13.0 for sm_80, compute_80, sm_90, sm_90a",
        "available: sm90 of sm80 and sm90 kernels, on a GPU (compute capability 9.0)",
    ),
    "no Hopper kernels on Hopper": (
        NO_HOPPER,
        (9, 0),
        "g++ 12.2.0; nvcc 13.0 for sm_80",
        f"available: sm80 of sm80 kernels {WHY_NO_HOPPER}, on a GPU (compute capability 9.0)",
    ),
    "Ampere": (
        BOTH_PATHS,
        (8, 0),
        "g++ 12.2.0; nvcc 13.0 for sm_80, compute_80, sm_90, sm_90a",
        "available: sm80 of sm80 and sm90 kernels, on a GPU (compute capability 8.0)",
    ),
}


def lines_of(report: str) -> dict[str, str]:
    return {line.split()[0]: line.split(maxsplit=1)[1] for line in report.splitlines()}


@pytest.mark.parametrize("case", CASES)
def test_report(case, monkeypatch):
    build, capability, build_line, cuda_line = CASES[case]
    monkeypatch.setattr(__main__, "_C", SimpleNamespace(**BUILD, **build))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    lines = lines_of(__main__.describe())
    assert lines["build"] == build_line
    assert lines["cuda"] == cuda_line


def test_report_of_this_build():
    run = subprocess.run([sys.executable, "-m", "adasplash2"], capture_output=True, text=True, check=True)
    lines = lines_of(run.stdout)
    assert list(lines) == ["adasplash2", "python", "build", "cpu", "cuda"]
    assert lines["adasplash2"] == __version__
    assert lines["build"].startswith(_C.compiler) and _C.compiler.split()[1][0].isdigit()
    assert _C.has_cuda == ("nvcc" in lines["build"])
    assert f"instruction set {_C.isa_levels()[-1]}" in lines["cpu"]


@pytest.mark.parametrize(
    "architectures, expected",
    [
        ("8.0+PTX;9.0", "sm_80, compute_80, sm_90, sm_90a"),
        ("9.0a", "sm_90a"),
        ("8.6 8.9", "sm_86, sm_89"),
    ],
)
def test_architectures_of_a_build(architectures, expected, setup_script, monkeypatch):
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", architectures)
    monkeypatch.setitem(setup_script["cuda_build"].__globals__, "nvcc_version", lambda _: "13.0")
    assert setup_script["cuda_build"](Path("/usr/local/cuda")) == f"nvcc 13.0 for {expected}"
