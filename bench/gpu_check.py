"""Everything that a first run on a GPU machine needs, in one command that stops at the first failure.

    python bench/gpu_check.py OUTDIR                # one log a step in OUTDIR, and summary.txt
    python bench/gpu_check.py OUTDIR --dry-run      # what would run, and what is missing here
    python bench/gpu_check.py OUTDIR --from tests   # go on after a failure

Works offline. It imports nothing of the project, which it builds in place, and looks for torch, nvcc and profilers.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
OUR_KERNELS = "adasplash2"  # the namespace, hence a part of every kernel's name
SELFTEST = "tests/simt/ptx_selftest.cu"
BENCH = f"{PYTHON} -m bench.attention --device cuda --preset gpu"
# One small case of every pass and of no round length: the sanitizers slow a kernel down a hundredfold.
SMALL_CASE = f"{BENCH} --batch 1 --length 300 --head-dim 64 --heads 2 --live --support 30 --rounds 1 --peers adasplash2"
PROFILED_CASE = (
    f"{BENCH} --batch 1 --length 16384 --head-dim 128 --causal no --support 100 --live 0.1 --passes training "
    "--rounds 1 --peers adasplash2"
)

OURS = "adasplash2 'adasplash2 sm80'"
# The Triton package takes seconds for a step where the others take tens of milliseconds: fewer cases, of their own.
BENCHES = (
    f"{BENCH} --out {{out}} --peers {OURS} 'sdpa flash' 'sdpa cudnn' flex",
    f"{BENCH} --out {{out}} --name gpu-triton --peers {OURS} 'sdpa flash' 'adasplash (Triton)' "
    "--support 100 --live 0.1 0.4",
)
SM80_PATH = "ADASPLASH2_CUDA_PATH=sm80"  # on a Hopper the kernels for older GPUs
TEST_WORKERS = min(8, os.cpu_count() or 1)  # they share the GPU


@dataclass(frozen=True)
class Step:
    name: str
    why: str
    commands: tuple[str, ...]  # {out} is the folder of the logs
    tools: tuple[str, ...] = ()  # programs on PATH
    modules: tuple[str, ...] = ()  # Python modules
    files: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)

    def missing(self) -> list[str]:
        return [
            *(f"program {tool}" for tool in self.tools if shutil.which(tool) is None),
            *(f"Python module {module}" for module in self.modules if importlib.util.find_spec(module) is None),
            *(f"file {file}" for file in self.files if not (ROOT / file).exists()),
        ]


def compute_capability() -> str | None:
    """Of the GPU here, as "9.0"; None without one."""
    try:
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError):
        return None


def architecture() -> str:
    """nvcc's name for the GPU here; Hopper's own instructions exist only under sm_90a, which no driver names."""
    capability = compute_capability()
    if capability is None:
        return "native"
    return "sm_90a" if capability == "9.0" else f"sm_{capability.replace('.', '')}"


def steps() -> list[Step]:
    pytest_options = f"-x -rs -n {TEST_WORKERS} --dist worksteal"
    counters = (
        "ncu --set detailed --clock-control none --launch-count 32 --kernel-name-base demangled "
        f"--kernel-name regex:{OUR_KERNELS} {PROFILED_CASE}"
    )
    sanitize = "compute-sanitizer --error-exitcode 1"
    ours_alone = f"--kernel-name kns={OUR_KERNELS}"
    # NOTE: racecheck does not see that mbarriers order accesses, nor initcheck what TMA stores: what both report of the
    # sm90 kernels is right. There the emulator looks for races.
    # initcheck has to see what torch's kernels write.
    checks = [("sm80", f"{ours_alone} --tool {tool}") for tool in ("memcheck", "racecheck", "synccheck")]
    checks += [("sm80", "--tool initcheck")]
    if architecture() == "sm_90a":
        checks += [("sm90", f"{ours_alone} --tool {tool}") for tool in ("memcheck", "synccheck")]
    print_torch = "import torch; print(torch.__version__, torch.version.cuda, torch.cuda.get_device_name())"
    return [
        Step(
            "machine",
            "GPU, driver, compiler and torch",
            (
                "nvidia-smi",
                "nvcc --version",
                f'{PYTHON} -c "{print_torch}"',
            ),
            tools=("nvidia-smi", "nvcc"),
            modules=("torch",),
        ),
        Step(
            "ptx",
            "every PTX wrapper against the emulator's reading of it",
            (
                f"nvcc -std=c++17 -arch={architecture()} -I csrc -I csrc/cuda/device {SELFTEST} -o {{out}}/selftest",
                "{out}/selftest",
            ),
            tools=("nvcc",),
            files=(SELFTEST,),
        ),
        Step(
            "build",
            "the extension with its CUDA half",
            (f"{PYTHON} setup.py build_ext --inplace", f"{PYTHON} -m adasplash2"),
            tools=("nvcc", "ninja"),
            modules=("torch", "setuptools", "pybind11"),
            environment={"ADASPLASH2_CUDA": "1", "TORCH_CUDA_ARCH_LIST": compute_capability() or ""},  # "": the default
        ),
        Step(
            "tests",
            "the tests of the CUDA paths on the GPU, through torch on the path that it takes and on sm80's",
            (
                f"{PYTHON} -m pytest tests -k cuda {pytest_options}",
                f"env {SM80_PATH} {PYTHON} -m pytest tests/test_cuda_torch.py {pytest_options}",
            ),
            modules=("torch", "pytest", "xdist", "hypothesis"),
            environment={"OMP_NUM_THREADS": "1"},
        ),
        Step(
            "sanitizer",
            "memory errors, races and barriers of our kernels",
            tuple(f"env ADASPLASH2_CUDA_PATH={path} {sanitize} {check} {SMALL_CASE}" for path, check in checks),
            tools=("compute-sanitizer",),
            modules=("torch", "matplotlib"),
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},  # else tensors lie in one block and guard each other
        ),
        Step(
            "bench",
            "times against the other attentions",
            BENCHES,
            modules=("torch", "matplotlib"),
        ),
        Step(
            "profile",
            "hardware counters of the main kernels, of the path that is taken here and of sm80's",
            (counters, f"env {SM80_PATH} {counters}"),
            tools=("ncu",),
            modules=("torch", "matplotlib"),
        ),
    ]


def run_step(step: Step, out: Path) -> int:
    """Runs the commands of a step until one fails; what they print goes to the screen and to OUT/step.log."""
    environment = {**os.environ, **step.environment, "PYTHONUNBUFFERED": "1"}
    with open(out / f"{step.name}.log", "w") as log:
        for command in step.commands:
            command = command.format(out=out)
            _tee(log.write, f"$ {command}\n")
            with subprocess.Popen(
                shlex.split(command),
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            ) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    _tee(log.write, line)
            if process.returncode:
                return process.returncode
    return 0


def _tee(write: Callable[[str], object], text: str) -> None:
    write(text)
    print(text, end="", flush=True)


def dry_run(plan: list[Step], out: Path) -> None:
    for step in plan:
        print(f"[{step.name}] {step.why}")
        for name, value in step.environment.items():
            print(f"    {name}={value}")
        for command in step.commands:
            print(f"    {command.format(out=out)}")
        print(f"    missing here: {', '.join(step.missing()) or 'nothing'}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    names = [step.name for step in steps()]
    parser.add_argument("--from", dest="first", choices=names, help="skip the steps before it")
    options = parser.parse_args()
    plan = steps()[names.index(options.first) if options.first else 0 :]
    out = options.out.resolve()
    if options.dry_run:
        dry_run(plan, out)
        return 0

    out.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in plan:
        start = time.monotonic()
        missing = step.missing()
        code = 0 if missing else run_step(step, out)
        verdict = f"cannot run: no {', no '.join(missing)}" if missing else f"exit {code}" if code else "passed"
        lines.append(f"{step.name:10} {time.monotonic() - start:7.1f} s  {verdict}")
        (out / "summary.txt").write_text("\n".join(lines) + "\n")
        if missing or code:
            break
    print("\n" + "\n".join(lines))
    return 1 if missing or code else 0


if __name__ == "__main__":
    raise SystemExit(main())
