"""Fixtures: which implementation runs (`path`, `cuda_path`), with which instructions (`isa`), on how many threads."""

from __future__ import annotations

import runpy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch
from kernels import library
from tolerance import Attention

import adasplash2
from adasplash2 import _C, reference

PATHS: dict[str, Attention] = {"reference": reference.entmax_attention, "cpu": adasplash2.entmax_attention}


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> Attention:
    """An attention function. The reference is one of them: whatever it must satisfy by definition, it is tested for."""
    return PATHS[request.param]


@pytest.fixture(params=_C.isa_levels())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine can run, in use for the length of the test."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture(params=library.covered_paths())
def cuda_path(request: pytest.FixtureRequest) -> Iterator[str]:
    """The CUDA kernels that calls of kernels/library.py ask for, for the length of the test."""
    library.path = request.param
    yield request.param
    library.path = "auto"


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(params=[130, 400, 700])
def num_keys(request: pytest.FixtureRequest) -> int:
    """Kernels choose by the length of a row (and by its density) how they scan it: computed whole, in lists of what may
    be in the support, in lists that come from a coarser scan. With sparse data, one length for each."""
    return request.param


@pytest.fixture
def setup_script(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The names that setup.py defines, without the build."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setenv("ADASPLASH2_CUDA", "0")
    return runpy.run_path(str(Path(__file__).resolve().parents[1] / "setup.py"))


@pytest.fixture(autouse=True)
def _repeatable() -> Iterator[None]:
    """Fixed seeds, and memory that nobody wrote is NaN (torch fills `empty` so in its deterministic mode)."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
