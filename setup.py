"""Build script: the torch extension adasplash2._C (see pyproject.toml for the metadata).

Environment: ADASPLASH2_CUDA=auto|0|1 (CUDA half), ADASPLASH2_SANITIZE=address,undefined (debugging), MAX_JOBS.
"""

import os
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

ROOT = Path(__file__).parent
VERSION = "0.1.0"

SOURCES = [
    "csrc/binding.cpp",
    "csrc/binding_entmax.cpp",
    "csrc/cpu/launch.cpp",
    # The same kernels once per instruction set; each file names its own target, so no per-file flags are needed.
    "csrc/cpu/isa/baseline.cpp",
    "csrc/cpu/isa/avx2.cpp",
    "csrc/cpu/isa/avx512.cpp",
]

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
LINK_FLAGS = ["-fopenmp"]


def sanitizer_flags() -> list[str]:
    names = os.environ.get("ADASPLASH2_SANITIZE", "")
    if not names:
        return []
    return [f"-fsanitize={names}", "-fno-omit-frame-pointer", "-fno-sanitize-recover=undefined", "-g1"]


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
    cmdclass={"build_ext": BuildExtension},
)
