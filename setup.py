"""Build script: the torch extension adasplash2._C (see pyproject.toml for the metadata).

Environment:
    ADASPLASH2_CUDA=auto|0|1   the CUDA kernels: where nvcc and torch's CUDA fit together (default), never, or always:
                               even for a CPU build of torch (they can then be linked and imported, not run)
    TORCH_CUDA_ARCH_LIST       GPU architectures, as "8.0+PTX;9.0" (the default: every GPU from Ampere on)
    CUDA_HOME, MAX_JOBS        the toolkit, if it is not where nvcc is; compilers at a time
    ADASPLASH2_SANITIZE        address,undefined: what -fsanitize takes, for a debugging build (make sanitize)
"""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).resolve().parent
VERSION = "0.1.0"

SOURCES = [
    "csrc/binding.cpp",
    "csrc/binding_entmax.cpp",
    "csrc/cpu/launch.cpp",
    "csrc/cpu/page_cache.cpp",
    # The same kernels once per instruction set; each file names its own target, so no per-file flags are needed.
    "csrc/cpu/isa/baseline.cpp",
    "csrc/cpu/isa/avx2.cpp",
    "csrc/cpu/isa/avx512.cpp",
]
CUDA_SOURCES = ["csrc/binding_cuda.cpp", "csrc/cuda/launch.cpp"]  # free of CUDA headers: the C++ compiler's
CUDA_KERNELS = [  # nvcc's
    ROOT / "csrc/cuda/any_arch/entmax.cu",
    *sorted((ROOT / "csrc/cuda/sm80/instances").glob("*.cu")),
]
HOPPER_KERNELS = sorted((ROOT / "csrc/cuda/sm90/instances").glob("*.cu"))
HOPPER_FLAG = "-gencode=arch=compute_90a,code=sm_90a"  # no other target knows wgmma
# One target, for which every instance is laid out: a spill is an error.
HOPPER_FLAGS = [HOPPER_FLAG, "-Xptxas=-warn-spills,-Werror"]
CUDA_INCLUDES = [ROOT / "csrc", ROOT / "csrc/cuda/device"]

COMPILE_FLAGS = [
    "-O3",
    "-g0",  # Python's own CFLAGS carry -g: 10 MB of debug information nobody asked for
    "-fopenmp",  # without it at::parallel_for silently runs serially
    "-fvisibility=hidden",
    "-fno-math-errno",  # sqrt is one instruction
    "-fno-trapping-math",  # comparisons and selects may be vectorised; NaN and inf keep their meaning
    "-Wall",
    "-Wno-psabi",  # vectors cross only inlined functions, the ABI note does not concern us
    "-Wno-unknown-pragmas",
    "-Wno-uninitialized",  # what the intrinsics headers of GCC 12 do on purpose
    "-Wno-maybe-uninitialized",
    f'-DADASPLASH2_VERSION="{VERSION}"',
]
NVCC_FLAGS = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
LINK_FLAGS = ["-fopenmp"]
CUDA_LINK_FLAGS = [
    # Linked in, so that one binary serves every torch; hidden, so that torch's own CUDA runtime cannot take its place.
    "-lcudart_static",
    "-Wl,--exclude-libs,libcudart_static.a",
    "-ldl",
    "-lrt",
    "-lpthread",
]


def sanitizer_flags() -> list[str]:
    names = os.environ.get("ADASPLASH2_SANITIZE", "")
    if not names:
        return []
    # -O1: at -O3 the checks take g++ 12 many minutes a file, or crash it.
    return ["-O1", f"-fsanitize={names}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined", "-g1"]


def find_cuda_home() -> Path | None:
    """The first folder that looks like a whole toolkit: the nvcc on PATH may be a script that stands elsewhere."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    on_path = shutil.which("nvcc")
    candidates += [str(Path(on_path).resolve().parents[1])] if on_path else []
    candidates += ["/usr/local/cuda", *map(str, sorted(Path("/usr/local").glob("cuda-*"), reverse=True))]
    for home in (Path(candidate) for candidate in candidates if candidate):
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return home
    return None


def nvcc_version(cuda_home: Path) -> str:
    text = subprocess.run([cuda_home / "bin/nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", text)
    return match.group(1) if match else "unknown"


def why_no_cuda(cuda_home: Path | None) -> str:
    """Why the CUDA kernels are left out, as a sentence for users; empty if they are built."""
    switch = os.environ.get("ADASPLASH2_CUDA", "auto")
    if switch not in ("auto", "0", "1"):
        raise SystemExit(f"ADASPLASH2_CUDA must be auto, 0 or 1, got {switch}")
    if switch == "0":
        return "this build left them out (ADASPLASH2_CUDA=0)"
    if cuda_home is None:
        reason = "this build found no nvcc (in CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda)"
        if switch == "1":
            raise SystemExit(f"ADASPLASH2_CUDA=1: {reason}")
        return reason
    if switch == "auto":
        if torch.version.cuda is None:
            return f"this build was made for a torch without CUDA ({torch.__version__})"
        version = nvcc_version(cuda_home)
        if version.partition(".")[0] != torch.version.cuda.partition(".")[0]:
            return f"this build found nvcc {version}, but torch is made for CUDA {torch.version.cuda}"
    return ""


def architecture_flags() -> list[str]:
    """-gencode for every entry of TORCH_CUDA_ARCH_LIST: machine code, and PTX for newer GPUs where +PTX asks for it.

    The kernels for Hopper alone are built where it names 9.0, whatever else it names.
    """
    flags = []
    for entry in re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST") or "8.0+PTX;9.0"):
        match = re.fullmatch(r"(\d+)\.(\d+)([af]?)(\+PTX)?", entry)
        if match is None:
            raise SystemExit(f'TORCH_CUDA_ARCH_LIST: expected entries like 8.0, 9.0a or 8.0+PTX, got "{entry}"')
        major, minor, feature, ptx = match.groups()
        arch = f"{major}{minor}{feature}"
        flags.append(f"-gencode=arch=compute_{arch},code=sm_{arch}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{arch},code=compute_{arch}")
    return flags


def has_hopper() -> bool:
    return any(re.fullmatch(r".*compute_90a?,code=sm_.*", flag) for flag in architecture_flags())


def cuda_build(cuda_home: Path) -> str:
    """Compiler and architectures, for users: SASS as sm_*, PTX as compute_*."""
    flags = architecture_flags() + ([HOPPER_FLAG] if has_hopper() else [])
    codes = dict.fromkeys(flag.rpartition("code=")[2] for flag in flags)
    return f"nvcc {nvcc_version(cuda_home)} for {', '.join(codes)}"


def kernel_jobs() -> list[tuple[Path, list[str]]]:
    """What nvcc compiles, and for which architectures."""
    jobs = [(kernel, architecture_flags()) for kernel in CUDA_KERNELS]
    if has_hopper():
        jobs += [(kernel, HOPPER_FLAGS) for kernel in HOPPER_KERNELS]
    return jobs


class BuildWithKernels(BuildExtension):
    """Compiles CUDA_KERNELS by nvcc, several at a time, before the extension that links them."""

    def build_extension(self, extension: CppExtension) -> None:
        if CUDA_HOME is not None and not CUDA_MISSING:
            folder = Path(self.build_temp).resolve() / "nvcc"
            folder.mkdir(parents=True, exist_ok=True)
            with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
                objects = list(pool.map(lambda job: compile_kernel(CUDA_HOME, *job, folder), kernel_jobs()))
            extension.extra_objects += objects
            extension.depends += objects
        super().build_extension(extension)


def compile_kernel(cuda_home: Path, source: Path, target_flags: list[str], folder: Path) -> str:
    """The object file of a .cu; compiled anew if the command or a file that it read has changed."""
    path = source.parents[1].name  # sm80 or sm90: their files have the same names
    made, read, command_file = (folder / f"{path}_{source.stem}.{suffix}" for suffix in ("o", "d", "command"))
    command = [
        str(cuda_home / "bin/nvcc"),
        *NVCC_FLAGS,
        *target_flags,
        *(f"-I{include}" for include in CUDA_INCLUDES),
    ]
    command += ["-MD", "-MF", str(read), "-c", str(source), "-o", str(made)]
    line = " ".join(command)
    if made.exists() and command_file.exists() and command_file.read_text() == line:
        dependencies = [Path(name) for name in read.read_text().partition(":")[2].replace("\\\n", " ").split()]
        if all(path.exists() and path.stat().st_mtime <= made.stat().st_mtime for path in dependencies):
            return str(made)
    print(line, flush=True)
    compiled = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    print(compiled.stdout, end="", flush=True)
    compiled.check_returncode()
    # C7510 to C7517: ptxas waits for each wgmma alone, which the results do not show. It calls that information.
    if serialised := re.findall(r".*\(C75\d\d\).*", compiled.stdout):
        made.unlink()
        raise SystemExit(f"{source}: ptxas serialises wgmma: {serialised[0]}")
    command_file.write_text(line)
    return str(made)


def library_folder(cuda_home: Path) -> str:
    folders = [cuda_home / "lib64", *sorted(cuda_home.glob("targets/*/lib")), cuda_home / "lib"]
    return str(next(folder for folder in folders if (folder / "libcudart_static.a").exists()))


CUDA_HOME = find_cuda_home()
CUDA_MISSING = why_no_cuda(CUDA_HOME)
if CUDA_HOME is None or CUDA_MISSING:
    COMPILE_FLAGS.append(f'-DADASPLASH2_CUDA_MISSING="{CUDA_MISSING}"')
else:
    SOURCES += CUDA_SOURCES
    COMPILE_FLAGS.append(f'-DADASPLASH2_CUDA_BUILD="{cuda_build(CUDA_HOME)}"')
    COMPILE_FLAGS += ["-DADASPLASH2_CUDA_SM90"] if has_hopper() else []
    LINK_FLAGS += [f"-L{library_folder(CUDA_HOME)}", *CUDA_LINK_FLAGS]

setup(
    version=VERSION,
    ext_modules=[
        CppExtension(
            name="adasplash2._C",
            sources=SOURCES,
            include_dirs=[str(ROOT / "csrc")],
            extra_compile_args=COMPILE_FLAGS + sanitizer_flags(),
            extra_link_args=LINK_FLAGS + sanitizer_flags(),
        )
    ],
    cmdclass={"build_ext": BuildWithKernels},
)
