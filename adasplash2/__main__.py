"""``python -m adasplash2``: what this build is, which paths it has here, and why one is missing."""

from __future__ import annotations

import platform

import torch

from adasplash2 import _C, __version__


def describe() -> str:
    levels = ", ".join(_C.isa_levels())
    lines = [
        f"adasplash2 {__version__}",
        f"python     {platform.python_version()}, torch {torch.__version__}, {platform.machine()}",
        f"build      {_C.compiler}; {_C.cuda_build or 'no CUDA kernels'}",
        f"cpu        available: instruction set {_C.isa()} (of {levels}), {torch.get_num_threads()} threads",
        f"cuda       {_describe_cuda()}",
    ]
    return "\n".join(lines)


def _describe_cuda() -> str:
    if not _C.has_cuda:
        return f"not available: {_C.cuda_missing}"
    kernels = f"{' and '.join(_C.cuda_paths)} kernels"
    if "sm90" not in _C.cuda_paths:
        kernels += " (none of Hopper's own: TORCH_CUDA_ARCH_LIST of the build named no 9.0)"
    if not torch.cuda.is_available():
        return f"{kernels} built, but torch finds no GPU"
    major, minor = torch.cuda.get_device_capability()
    path = "sm90" if "sm90" in _C.cuda_paths and (major, minor) == (9, 0) else "sm80"
    return f"available: {path} of {kernels}, on {torch.cuda.get_device_name()} (compute capability {major}.{minor})"


if __name__ == "__main__":
    print(describe())
