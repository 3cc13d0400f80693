"""The SIMT emulator: CUDA kernels executed and race-checked without a GPU. README.md beside this file explains it."""
