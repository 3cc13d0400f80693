"""The benchmark's machinery on tiny cases: what it claims about its data and its files, never a time."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from adasplash2 import reference
from bench import attention, passes, timing
from bench.cases import DENSE, Data, Shape, make_inputs
from bench.peers import OURS, Peer, peers, why_not

ROOT = Path(__file__).resolve().parent.parent


def shape_of(length: int, *, is_causal: bool = False, dtype: torch.dtype = torch.float32) -> Shape:
    return Shape(1, 2, length, 64, dtype, is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("support", [10.0, 60.0, DENSE])
def test_gaussian_case_has_the_support_it_says(support, is_causal):
    inputs = make_inputs(shape_of(384, is_causal=is_causal), Data(support), "cpu")
    wanted = support if support != DENSE else 384 / 4 if is_causal else 384 / 2
    assert inputs.support_size == pytest.approx(wanted, rel=0.1)  # drawn on a sample of the rows of one head
    _, aux = reference.entmax_attention(*(inputs.query, inputs.key, inputs.value), is_causal=is_causal, return_aux=True)
    assert inputs.support_size == pytest.approx(aux.support_size.float().mean().item(), rel=1e-3)
    assert inputs.live_tile_fraction == pytest.approx(aux.live_tile_fraction.mean().item(), abs=1e-6)


@pytest.mark.parametrize("live_tiles", [0.1, 0.4, 1.0])
def test_block_case_has_the_live_tiles_it_says(live_tiles):
    inputs = make_inputs(shape_of(64 * 20), Data(30.0, live_tiles), "cpu")  # one block of keys a topic
    assert inputs.live_tile_fraction == pytest.approx(live_tiles, abs=1e-6)
    assert inputs.support_size == pytest.approx(30.0, rel=0.15)


def test_a_case_is_the_same_every_time():
    first, second = (make_inputs(shape_of(128), Data(10.0, 0.2), "cpu") for _ in range(2))
    assert torch.equal(first.query, second.query)
    assert torch.equal(first.grad_out, second.grad_out)


@pytest.mark.parametrize("is_causal", [False, True])
def test_entmax_peers_compute_the_same(is_causal):
    pytest.importorskip("entmax")
    inputs = make_inputs(shape_of(128, is_causal=is_causal), Data(10.0), "cpu")
    ours, _, dense = (peer.call(inputs.query, inputs.key, inputs.value, is_causal) for peer in peers("cpu"))
    torch.testing.assert_close(ours, dense)


def test_functions_take_turns_in_changing_order():
    calls: list[str] = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    samples = timing.measure(functions, rounds=4, warmup=1, min_sample_ms=0.0)
    assert {name: len(times) for name, times in samples.items()} == {"a": 4, "b": 4, "c": 4}
    assert "".join(calls[3:]) == "abc" + "bca" + "cab" + "abc"  # after one warm-up call of each


def test_slow_functions_are_sampled_once():
    calls = {"slow": 0, "fast": 0}

    def run(name: str, seconds: float) -> None:
        calls[name] += 1
        time.sleep(seconds)

    functions = {"slow": lambda: run("slow", 0.02), "fast": lambda: run("fast", 0.0)}
    samples = timing.measure(functions, rounds=3, warmup=1, min_sample_ms=0.0, patience_ms=15.0)
    assert len(samples["slow"]) == 1 and calls["slow"] == 2
    assert len(samples["fast"]) == 3 and calls["fast"] == 4


def test_a_peer_has_its_path_to_itself(monkeypatch):
    seen = []

    def call(*_: object) -> torch.Tensor:
        seen.append(os.environ.get("ADASPLASH2_CUDA_PATH"))
        return torch.zeros(1, requires_grad=True)

    for outside in ("sm90", None):
        monkeypatch.delenv("ADASPLASH2_CUDA_PATH", raising=False)
        if outside:
            monkeypatch.setenv("ADASPLASH2_CUDA_PATH", outside)
        assert why_not(Peer(f"ours beside {outside}", call, cuda_path="sm80"), shape_of(64), "cpu") is None
        assert os.environ.get("ADASPLASH2_CUDA_PATH") == outside
    assert seen == ["sm80", "sm80"]


def test_table_columns_line_up():
    lines = timing.table(["case", "ms"], [["long name", "1.0"], ["x", "100.0"]]).splitlines()
    assert lines == ["case          ms", "----------------", "long name    1.0", "x          100.0"]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """The folder that a tiny run of the benchmark wrote to."""
    folder = tmp_path_factory.mktemp("bench")
    arguments = "--length 64 128 --head-dim 64 --heads 1 --causal yes --support 8 --live 0.5 --rounds 2"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        attention.main([*arguments.split(), "--dtype", "float32", "bfloat16", "--out", str(folder)])
    (folder / "printed.txt").write_text(printed.getvalue())
    return folder


def test_report_holds_every_case_with_samples_and_description(report):
    (path,) = report.glob("*.json")
    content = json.loads(path.read_text())
    assert {"cpu", "threads", "isa", "torch", "commit", "command", "date"} <= content["machine"].keys()
    results = content["results"]
    cases = {(r["dtype"], r["length"], r["data"], r["pass"]) for r in results}
    assert len(cases) == len(results) == 2 * 2 * 2 * 2
    for result in results:
        assert {OURS, "sdpa"} <= result["samples_ms"].keys()
        assert all(len(samples) == 2 for samples in result["samples_ms"].values())
        assert result["ratio"] == pytest.approx(result["median_ms"][OURS] / result["median_ms"]["sdpa"])
        assert 1 <= result["support_size"] <= result["length"]
        assert 0 < result["live_tile_fraction"] <= 1
        assert result["target"] == 1.3  # short sequences


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_report_says_that_there_is_no_gpu(report):
    printed = (report / "printed.txt").read_text().splitlines()
    assert printed[0] == "No GPU here: the CPU path is measured, and only that."
    with pytest.raises(SystemExit, match=r"--device cuda: this torch \(.*\) sees no GPU"):
        attention.main(["--device", "cuda"])


def test_report_has_a_picture(report):
    (path,) = report.glob("*.png")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "length, is_causal, dtype, support, forward, training",
    [
        (4096, False, torch.float32, 30, 0.35, 0.13),
        (4096, False, torch.bfloat16, 30, 0.35, 0.15),
        (8192, True, torch.float32, 100, 0.45, 0.20),
        (8192, True, torch.float32, 300, 0.60, 0.40),
        (4096, True, torch.float32, 300, 0.75, 0.50),
        (16384, False, torch.bfloat16, 30, 0.28, 0.11),
        (4096, False, torch.float32, DENSE, 1.5, 1.5),
        (256, False, torch.float32, 30, 1.3, 1.3),
    ],
)
def test_targets(length, is_causal, dtype, support, forward, training):
    shape = shape_of(length, is_causal=is_causal, dtype=dtype)
    targets = [attention.target("cpu", shape, Data(support), which) for which in ("forward", "training")]
    assert targets == [forward, training]


@pytest.mark.parametrize("benchmark", ["attention", "entmax"])
def test_results_are_kept_only_at_a_clean_commit(benchmark, monkeypatch):
    if benchmark == "entmax":
        pytest.importorskip("entmax")
    monkeypatch.setattr(timing, "is_clean", lambda: False)
    with pytest.raises(SystemExit, match="clean commit"):
        importlib.import_module(f"bench.{benchmark}").main(["--keep"])


def test_activations(monkeypatch, tmp_path, capsys):
    pytest.importorskip("entmax")
    benchmark = importlib.import_module("bench.entmax")
    monkeypatch.setattr(benchmark, "SHAPES", [((6, 40), -1), ((3, 20, 4), 1)])
    benchmark.main(["--scale", "1", "4", "--rounds", "2", "--name", "tiny", "--out", str(tmp_path)])
    (path,) = tmp_path.glob("*-entmax-tiny.json")
    content = json.loads(path.read_text())
    assert {"cpu", "threads", "isa", "torch", "commit", "command", "date"} <= content["machine"].keys()
    results = content["results"]
    cases = {(*r["shape"], r["dtype"], r["scale"], r["function"], r["pass"]) for r in results}
    assert len(cases) == len(results) == 2 * 2 * 2 * 3 * 2
    for result in results:
        assert result["speedup"] == pytest.approx(result["package_ms"] / result["adasplash2_ms"])
        assert 1 <= result["support_size"] <= result["shape"][result["dim"]]
        assert all(len(samples) == 2 for samples in result["samples_ms"].values())
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "6x40 dim -1 float32 scale 1" in printed and "sparsemax" in printed


def test_commit_without_a_history(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("BENCH_COMMIT", "0123456789ab")
    assert timing.commit() == "0123456789ab"
    monkeypatch.delenv("BENCH_COMMIT")
    assert timing.commit() == "unknown"


def test_kernels_are_named_by_pass():
    scan = "void adasplash2::cuda::sm90::scan_kernel<__nv_bfloat16, 64, (adasplash2::AlphaKind)0>(...)"
    delta = "adasplash2::cuda::delta_kernel<__half>(adasplash2::cuda::DeltaParams)"
    assert [passes.kernel_name(name) for name in (scan, delta, "void at::native::fill_kernel<int>(int)")] == [
        "scan", "delta", None,
    ]  # fmt: skip


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_passes_need_a_gpu():
    with pytest.raises(SystemExit, match="there is no GPU here"):
        passes.main([])


def test_gpu_check_stops_at_what_is_missing(tmp_path):
    check = [sys.executable, str(ROOT / "bench" / "gpu_check.py"), str(tmp_path / "out")]
    plan = subprocess.run([*check, "--dry-run"], capture_output=True, text=True, check=True).stdout
    steps = ["machine", "ptx", "build", "tests", "sanitizer", "bench", "profile"]
    assert [line[1 : line.index("]")] for line in plan.splitlines() if line.startswith("[")] == steps
    of_sm80 = [line for line in plan.splitlines() if line.startswith("    env ADASPLASH2_CUDA_PATH=sm80 ")]
    assert sum("pytest tests/test_cuda_torch.py" in line for line in of_sm80) == 1
    assert sum("compute-sanitizer" in line for line in of_sm80) == 4
    assert sum(" ncu " in line for line in of_sm80) == 1
    assert not (tmp_path / "out").exists()

    # With nothing on PATH the first step cannot run, so no later one may.
    stopped = subprocess.run(check, env={"PATH": ""}, capture_output=True, text=True)
    assert stopped.returncode == 1
    summary = (tmp_path / "out" / "summary.txt").read_text().splitlines()
    assert len(summary) == 1
    assert summary[0].startswith("machine")
    assert "no program nvidia-smi" in summary[0]
