version: str
compiler: str
has_cuda: bool
cuda_build: str  # nvcc and architectures; empty without CUDA
cuda_missing: str
cuda_paths: list[str]
support_layout: tuple[int, int, int, int]
cuda_support_layout: tuple[int, int, int]

def isa_levels() -> list[str]: ...
def isa() -> str: ...
def set_isa(name: str) -> None: ...
