"""The CUDA kernel layer through ctypes, without the torch extension: emulated, or on a GPU where there is one.

`attention(...)` makes it a path like the others: the signature of `adasplash2.entmax_attention`, differentiable.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from simt import emulator
from torch import Tensor

from adasplash2.reference import AttentionAux

ROOT = Path(__file__).resolve().parents[2]
HERE, CUDA = ROOT / "tests" / "kernels", ROOT / "csrc" / "cuda"
ONE = HERE / "one_instance"
# Translation units of libraries: everything but what is Hopper's own, and that.
PORTABLE = (
    HERE / "entry_points.cu", CUDA / "launch.cpp", CUDA / "any_arch" / "entmax.cu",
    *sorted((CUDA / "sm80" / "instances").glob("*.cu")),
)  # fmt: skip
SM90 = tuple(sorted((CUDA / "sm90" / "instances").glob("*.cu")))
WITH_SM90 = "-DADASPLASH2_CUDA_SM90"  # defined where the library has both
ALWAYS_ORDERED = "-DADASPLASH2_ORDERED_LENGTH=1"  # sm90 orders blocks where rows are long: here everywhere
ALL = (*PORTABLE, *SM90)
ONE_INSTANCE = {  # of a path: what launches it, and a unit for each of its passes
    "sm80": (ONE / "sm80.cu", *sorted((ONE / "sm80").glob("*.cu"))),
    "sm90": (ONE / "sm90.cu", ONE / "sm80" / "delta.cu", *sorted((ONE / "sm90").glob("*.cu"))),
}
ENTMAX = (HERE / "entmax.cu",)
WORK_ORDER = (HERE / "work_order.cu",)

PATHS = ("auto", "sm80", "sm90")  # cuda::Path
path = "auto"  # that every call asks for: see the fixture cuda_path

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3, torch.bool: 4}


class Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p)] + [(f"stride_{d}", ctypes.c_int64) for d in ("batch", "head", "row")]

    @classmethod
    def of(cls, tensor: Tensor | None) -> Rows:
        if tensor is None:
            return cls()
        assert tensor.dim() == 4 and (tensor.stride(3) == 1 or tensor.shape[3] == 1)
        return cls(tensor.data_ptr(), *tensor.stride()[:3])


class Mask(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("dtype", ctypes.c_int32)]
    _fields_ += [(f"stride_{d}", ctypes.c_int64) for d in ("batch", "head", "row", "col")]


class Problem(ctypes.Structure):
    _fields_ = [("dtype", ctypes.c_int32)]
    _fields_ += [
        (name, ctypes.c_int64)
        for name in (
            "batch", "num_heads", "num_kv_heads", "num_queries", "num_keys", "head_dim", "value_head_dim",
        )
    ]  # fmt: skip
    _fields_ += [("query", Rows), ("key", Rows), ("value", Rows), ("mask", Mask), ("key_lengths", ctypes.c_void_p)]
    _fields_ += [("scale", ctypes.c_double), ("is_causal", ctypes.c_bool), ("alpha", ctypes.c_double)]
    _fields_ += [("alpha_heads", ctypes.c_void_p), ("alpha_stride_batch", ctypes.c_int64)]
    _fields_ += [("alpha_stride_head", ctypes.c_int64)]


class Forward(ctypes.Structure):
    _fields_ = [("problem", Problem), ("out", Rows), ("gap_mean_v", Rows)]
    _fields_ += [(name, ctypes.c_void_p) for name in ("tau", "support_size", "block_mask", "workspace", "stream")]
    _fields_ += [("path", ctypes.c_int32)]


class Backward(ctypes.Structure):
    _fields_ = [("problem", Problem), ("tau", ctypes.c_void_p), ("block_mask", ctypes.c_void_p)]
    _fields_ += [(name, Rows) for name in ("gap_mean_v", "grad_out", "grad_query", "grad_key", "grad_value")]
    _fields_ += [("grad_alpha", ctypes.c_void_p), ("grad_mask", ctypes.c_void_p)]
    _fields_ += [("workspace", ctypes.c_void_p), ("stream", ctypes.c_void_p), ("path", ctypes.c_int32)]


class EntmaxProblem(ctypes.Structure):
    _fields_ = [("dtype", ctypes.c_int32)]
    _fields_ += [(name, ctypes.c_int64) for name in ("outer", "length", "inner")]
    _fields_ += [("alpha", ctypes.c_double), ("alpha_slices", ctypes.c_void_p)]


class EntmaxForward(ctypes.Structure):
    _fields_ = [("problem", EntmaxProblem), ("x", ctypes.c_void_p), ("prob", ctypes.c_void_p)]


class EntmaxBackward(ctypes.Structure):
    _fields_ = [("problem", EntmaxProblem)]
    _fields_ += [(name, ctypes.c_void_p) for name in ("prob", "grad_prob", "grad_x", "grad_alpha")]


_MIRRORS = {
    "sizeof_forward": Forward,
    "sizeof_backward": Backward,
    "sizeof_entmax_forward": EntmaxForward,
    "sizeof_entmax_backward": EntmaxBackward,
}


class GpuLibrary:
    """The library as nvcc builds it, with the interface of the emulator's."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.api_error.restype = ctypes.c_char_p

    def call(self, name: str, *arguments: object, **_: object) -> dict[str, int]:
        if getattr(self.library, name)(*arguments) != 0:
            raise RuntimeError(self.library.api_error().decode())
        torch.cuda.synchronize()
        return {}


def build_for_gpu(arch: str) -> Path:
    """The shared library for one architecture ("90"), by nvcc; needs no GPU."""
    sources = [path for path in sorted((ROOT / "csrc").rglob("*")) if path.suffix in (".h", ".cuh", ".cu", ".cpp")]
    sources += sorted(HERE.glob("*.[ch]*"))
    flags = ["-std=c++17", "-O3", "-lineinfo", "-Xcompiler", "-fPIC", "-Xptxas", "-warn-spills"]
    flags += [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc/cuda/device'}"]
    units = ALL if arch == "90" else PORTABLE
    if arch == "90":
        flags += [WITH_SM90, ALWAYS_ORDERED]
    contents = [path.read_bytes() for path in sources] + [str(part).encode() for part in (*units, *flags)]
    digest = hashlib.sha256(b"".join(contents)).hexdigest()[:16]
    build = ROOT / "build" / "gpu" / f"{digest}-{arch}"
    target = build / "kernels.so"

    def compile_unit(unit: Path) -> str:
        folder = unit.parents[1].name  # the instances of both paths have the same names
        made = str(build / f"{folder}_{unit.stem}.o")
        target_arch = "90a" if folder == "sm90" else arch
        target_flag = f"-gencode=arch=compute_{target_arch},code=sm_{target_arch}"
        subprocess.run(["nvcc", *flags, target_flag, "-c", str(unit), "-o", made], check=True)
        return made

    with emulator.making(target) as scratch:
        if scratch is not None:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                objects = list(pool.map(compile_unit, units))
            subprocess.run(["nvcc", "-shared", *objects, "-o", str(scratch)], check=True)
    return target


def has_gpu() -> bool:
    return torch.cuda.is_available()


def device() -> torch.device:
    return torch.device("cuda" if has_gpu() else "cpu")


def covered_paths() -> tuple[str, ...]:
    """The paths that run here: the emulated device is a Hopper."""
    return PATHS[1:] if not has_gpu() or torch.cuda.get_device_capability() == (9, 0) else PATHS[1:2]


@functools.cache
def build(
    units: tuple[Path, ...] = ALL,
    instrumented: bool = True,
    patches: tuple[emulator.Patch, ...] = (),
    flags: tuple[str, ...] = (),
) -> emulator.Library | GpuLibrary:
    if has_gpu():
        assert not patches, "seeded bugs are for the emulator"
        major, minor = torch.cuda.get_device_capability()
        library: emulator.Library | GpuLibrary = GpuLibrary(build_for_gpu(f"{major}{minor}"))
    else:
        if units is ALL:
            flags = (WITH_SM90, ALWAYS_ORDERED, *flags)
        library = emulator.build(*units, instrumented=instrumented, patches=patches, flags=flags)
    _check_mirrors(_functions(library))
    return library


def _functions(library: emulator.Library | GpuLibrary) -> ctypes.CDLL:
    return library.library if isinstance(library, GpuLibrary) else library._library


def _check_mirrors(library: ctypes.CDLL) -> None:
    for name, mirror in _MIRRORS.items():
        function = getattr(library, name, None)  # a library may have entry points of one operation alone
        if function is None:
            continue
        function.restype = ctypes.c_int64
        assert function() == ctypes.sizeof(mirror), f"{name}: the mirror in Python is out of date"


def _bytes(library: emulator.Library | GpuLibrary, name: str, problem: Problem, *arguments: bool) -> int:
    function = getattr(_functions(library), name)
    function.restype = ctypes.c_int64
    return int(function(ctypes.byref(problem), *arguments))


@dataclass
class Run:
    """One forward pass: what it wrote, what it was asked, what it did."""

    problem: Problem
    inputs: dict[str, Tensor]
    out: Tensor
    gap_mean_v: Tensor
    tau: Tensor
    support_size: Tensor
    block_mask: Tensor  # (B, H, row groups, key tiles) bool, unpacked
    block_mask_words: Tensor
    workspace: Tensor
    path: str = ""  # that was taken
    counters: dict[str, int] = field(default_factory=dict)

    def _rows_of(self, offset: int, dtype: torch.dtype) -> Tensor:
        size = self.tau.numel() * dtype.itemsize
        return self.workspace[offset : offset + size].view(dtype).view(self.tau.shape)

    @property
    def tau_lower(self) -> Tensor:
        return self._rows_of(0, torch.float32)

    @property
    def scan_mask(self) -> Tensor:
        offset = _align(self.tau.numel() * 4)
        words = self.workspace[offset : offset + self.block_mask_words.numel() * 4].view(torch.int32)
        return _unpack(words.view(self.block_mask_words.shape), self.block_mask.shape[-1])

    def work_order(self, block_rows: int) -> Tensor:
        """Of the output pass's blocks of so many rows; head dim 64."""
        batch, heads, num_queries = self.tau.shape
        num_rows, mask_bytes = self.tau.numel(), self.block_mask_words.numel() * 4
        offset = _align(num_rows * 4) + _align(mask_bytes) + _align(num_rows) + _align(self.block_mask.numel() * 2)
        return block_indices(self.workspace[offset:], batch, heads, -(-num_queries // block_rows))

    @property
    def is_coarse(self) -> Tensor:
        return self._start.bool()

    @property
    def expected_tau(self) -> Tensor:
        """Of coarse rows: where their refinement starts."""
        return self.tau_lower + self._start * 2.0**-11  # kStartUnit

    @property
    def _start(self) -> Tensor:
        return self._rows_of(_align(self.tau.numel() * 4) + _align(self.block_mask_words.numel() * 4), torch.uint8)


def block_indices(order: Tensor, batch: int, heads: int, num_blocks: int) -> Tensor:
    """Indices of (batch, head, block), block fastest, for bytes that begin with an order of blocks."""
    places = order[: batch * heads * num_blocks * 8].view(torch.int32).view(-1, 2).cpu().long()
    return places[:, 0] + num_blocks * ((places[:, 1] & 0xFFFF) + heads * (places[:, 1] >> 16))


def _align(num_bytes: int) -> int:
    return (num_bytes + 15) // 16 * 16


def _unpack(words: Tensor, num_tiles: int) -> Tensor:
    bits = words.unsqueeze(-1) >> torch.arange(32, device=words.device, dtype=torch.int32) & 1
    return bits.flatten(-2)[..., :num_tiles].bool()


def block_order(mask: Tensor, block_size: int, group_size: int | None = None) -> Tensor:
    """The order of blocks of so many rows of a mask (B, H, row groups, key tiles) by rows, or, where the size of a
    group of heads is given, of so many keys of one by columns (B, H, key tiles, row groups)."""
    batch, heads, *tiles = mask.shape
    by_columns = group_size is not None
    groups, key_tiles = reversed(tiles) if by_columns else tiles
    kv_heads = heads // group_size if by_columns else heads
    problem = Problem(0, batch, heads, kv_heads, 16 * groups, 64 * key_tiles)
    padded = torch.nn.functional.pad(mask.int(), (0, -mask.shape[-1] % 32)).unflatten(-1, (-1, 32))
    words = (padded << torch.arange(32)).sum(-1).to(torch.int32).to(device())
    num_blocks = -(-(64 * key_tiles if by_columns else 16 * groups) // block_size)
    num_all = batch * kv_heads * num_blocks
    order, levels = (_empty_like_poison((num_all * size,), torch.uint8) for size in (8, 1))
    mask_address, *outputs = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (words, levels, order))
    build(WORK_ORDER).call(
        "order_columns" if by_columns else "order_rows", ctypes.byref(problem), mask_address, block_size, *outputs,
        tensors={"mask": words, "levels": levels, "order": order},
    )  # fmt: skip
    return block_indices(order, batch, kv_heads, num_blocks)


def _empty_like_poison(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    return torch.full(tuple(shape), float("nan") if dtype.is_floating_point else -1, dtype=dtype, device=device())


def forward(
    library: emulator.Library | GpuLibrary,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    alpha: float | Tensor = 1.5,
    key_lengths: Tensor | None = None,
    attn_mask: Tensor | None = None,
    seed: int = 0,
    out_alone: bool = False,
) -> Run:
    """(B, H, N, D) tensors whose rows are 16-byte aligned. All outputs start as NaN; where out alone is asked for,
    gap_mean_v and support_size stay so."""
    batch, heads, num_queries, head_dim = query.shape
    _, kv_heads, num_keys, value_head_dim = value.shape
    problem = Problem(
        _DTYPES[query.dtype], batch, heads, kv_heads, num_queries, num_keys, head_dim, value_head_dim,
        Rows.of(query), Rows.of(key), Rows.of(value),
    )  # fmt: skip
    inputs = {"query": query, "key": key, "value": value}
    problem.scale = head_dim**-0.5 if scale is None else scale
    problem.is_causal = is_causal
    problem.alpha = 1.5
    if isinstance(alpha, Tensor):
        inputs["alpha"] = alpha.to(torch.float64).expand(batch, heads).contiguous()
        problem.alpha_heads = inputs["alpha"].data_ptr()
        problem.alpha_stride_batch, problem.alpha_stride_head = inputs["alpha"].stride()
    else:
        problem.alpha = alpha
    if key_lengths is not None:
        inputs["key_lengths"] = key_lengths.to(torch.int64)
        problem.key_lengths = inputs["key_lengths"].data_ptr()
    if attn_mask is not None:
        inputs["attn_mask"] = attn_mask
        full = attn_mask.expand(batch, heads, num_queries, num_keys)
        problem.mask = Mask(attn_mask.data_ptr(), _DTYPES[attn_mask.dtype], *full.stride())

    groups, tiles = -(-num_queries // 16), -(-num_keys // 64)
    out_shape = (batch, heads, num_queries, value_head_dim)
    words = _empty_like_poison((batch, heads, groups, -(-tiles // 32)), torch.int32)
    assert words.numel() * 4 == _bytes(library, "block_mask_bytes", problem)
    workspace = _empty_like_poison((_bytes(library, "forward_workspace_bytes", problem),), torch.int8)
    run = Run(
        problem,
        inputs,
        out=_empty_like_poison(out_shape, query.dtype),
        gap_mean_v=_empty_like_poison(out_shape, query.dtype),
        tau=_empty_like_poison(out_shape[:3], torch.float32),
        support_size=_empty_like_poison(out_shape[:3], torch.int32),
        block_mask=torch.empty(batch, heads, groups, tiles),
        block_mask_words=words,
        workspace=workspace,
    )
    gap_mean_v, support_size = (None, None) if out_alone else (run.gap_mean_v, run.support_size.data_ptr())
    call = Forward(
        problem, Rows.of(run.out), Rows.of(gap_mean_v), run.tau.data_ptr(), support_size,
        words.data_ptr(), workspace.data_ptr(), torch.cuda.current_stream().cuda_stream if has_gpu() else None,
        PATHS.index(path),
    )  # fmt: skip
    tensors = inputs | {
        name: getattr(run, name) for name in ("out", "gap_mean_v", "tau", "support_size", "workspace")
    } | {"block_mask": words}  # fmt: skip
    run.counters = library.call("attention_forward", ctypes.byref(call), seed=seed, tensors=tensors)
    run.path = PATHS[_functions(library).taken_path(ctypes.byref(call))]
    run.block_mask = _unpack(words, tiles)
    return run


@dataclass
class Gradients:
    query: Tensor
    key: Tensor
    value: Tensor
    alpha: Tensor | None  # (B, H)
    attn_mask: Tensor | None  # as it broadcasts, in 4 dimensions
    counters: dict[str, int]
    workspace: Tensor

    def work_order(self, run: Run, block_keys: int) -> Tensor:
        """Of the last pass's blocks of so many keys; head dim 64, a number for alpha, no mask."""
        batch, heads, groups, tiles = run.block_mask.shape
        offset = _align(run.tau.numel() * 4) + _align(batch * heads * tiles * -(-groups // 32) * 4)
        num_blocks = -(-int(run.problem.num_keys) // block_keys)
        return block_indices(self.workspace[offset:], batch, int(run.problem.num_kv_heads), num_blocks)


def backward(
    library: emulator.Library | GpuLibrary,
    run: Run,
    grad_out: Tensor,
    seed: int = 0,
    wanted: Sequence[str] = ("query", "key", "value"),
) -> Gradients:
    """Gradients that are not wanted stay NaN."""
    inputs = run.inputs
    grads = {
        f"grad_{name}": _empty_like_poison(inputs[name].shape, grad_out.dtype) for name in ("query", "key", "value")
    }
    wants_mask = "attn_mask" in wanted
    workspace_bytes = _bytes(library, "backward_workspace_bytes", run.problem, wants_mask)
    workspace = _empty_like_poison((workspace_bytes,), torch.int8)
    grad_mask = _empty_like_poison(_four_dims(inputs["attn_mask"]).shape, torch.float32) if wants_mask else None
    grad_alpha = _empty_like_poison(inputs["alpha"].shape, torch.float64) if "alpha" in wanted else None
    call = Backward(
        run.problem, run.tau.data_ptr(), run.block_mask_words.data_ptr(), Rows.of(run.gap_mean_v), Rows.of(grad_out),
        *(Rows.of(grad if name.removeprefix("grad_") in wanted else None) for name, grad in grads.items()),
        *(None if tensor is None else tensor.data_ptr() for tensor in (grad_alpha, grad_mask, workspace)),
        torch.cuda.current_stream().cuda_stream if has_gpu() else None, PATHS.index(path),
    )  # fmt: skip
    tensors = inputs | grads | {
        "grad_out": grad_out, "tau": run.tau, "block_mask": run.block_mask_words, "gap_mean_v": run.gap_mean_v,
        "workspace": workspace,
    }  # fmt: skip
    tensors |= {n: t for n, t in {"grad_alpha": grad_alpha, "grad_mask": grad_mask}.items() if t is not None}
    counters = library.call("attention_backward", ctypes.byref(call), seed=seed, tensors=tensors)
    return Gradients(*grads.values(), grad_alpha, grad_mask, counters, workspace)


def _four_dims(attn_mask: Tensor) -> Tensor:
    return attn_mask[(None,) * (4 - attn_mask.dim())]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, run_forward: Callable[..., Run], seed: int, alpha: Any, attn_mask: Any, *tensors: Tensor
    ) -> Tensor:
        query, key, value = (tensor.detach().to(device()) for tensor in tensors)
        ctx.run, ctx.seed, ctx.device = run_forward(query, key, value), seed, tensors[0].device
        ctx.alpha, ctx.attn_mask = alpha, attn_mask
        _Attention.latest = ctx.run
        return ctx.run.out.to(ctx.device)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ("query", "key", "value") + ("alpha",) * ctx.needs_input_grad[2]
        wanted += ("attn_mask",) * ctx.needs_input_grad[3]
        grads = backward(build(), ctx.run, grad_out.to(device()).contiguous(), ctx.seed, wanted)
        _Attention.latest_gradients = grads
        grad_alpha, grad_mask = None, None
        if grads.alpha is not None:
            grad_alpha = grads.alpha.sum_to_size(ctx.alpha.shape).to(ctx.device, ctx.alpha.dtype)
        if grads.attn_mask is not None:
            grad_mask = grads.attn_mask.view(ctx.attn_mask.shape).to(ctx.device, ctx.attn_mask.dtype)
        named = (grads.query, grads.key, grads.value)
        return (None, None, grad_alpha, grad_mask, *(grad.to(ctx.device) for grad in named))

    latest: Run
    latest_gradients: Gradients


def latest() -> tuple[Run, Gradients | None]:
    """The runs behind the last call of `attention` and of its backward pass."""
    return _Attention.latest, getattr(_Attention, "latest_gradients", None)


def attention(
    query: Tensor, key: Tensor, value: Tensor, *, return_aux: bool = False, enable_gqa: bool = False, seed: int = 0,
    **options: Any,
) -> Any:  # fmt: skip
    """`adasplash2.entmax_attention` on the kernels. Inputs stay as they are: strides, slices, poison around them."""
    on_device = {name: t.detach().to(device()) if isinstance(t, Tensor) else t for name, t in options.items()}
    run_forward = functools.partial(forward, build(), seed=seed, **on_device)
    out = _Attention.apply(run_forward, seed, options.get("alpha"), options.get("attn_mask"), query, key, value)
    if not return_aux:
        return out
    run = _Attention.latest
    return out, AttentionAux(run.tau.to(out.device), run.support_size.to(out.device), torch.empty(0))


class _EntmaxFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor | float, dim: int, call: Callable[..., None]) -> Tensor:
        x = x.detach().to(device()).contiguous()
        length = x.shape[dim]
        inner = x[(0,) * dim].numel() // length
        problem = EntmaxProblem(_DTYPES[x.dtype], x.numel() // (length * inner), length, inner)
        by_slice = None
        if isinstance(alpha, Tensor):
            slices = [1 if d == dim else size for d, size in enumerate(x.shape)]
            by_slice = alpha.detach().to(device(), torch.float64).expand(slices).contiguous()
            problem.alpha_slices = by_slice.data_ptr()
        else:
            problem.alpha = alpha
        prob = _empty_like_poison(x.shape, x.dtype)
        arguments = EntmaxForward(problem, x.data_ptr(), prob.data_ptr())
        call("entmax_forward", arguments, {"x": x, "prob": prob, "alpha": by_slice})
        ctx.problem, ctx.prob, ctx.by_slice, ctx.alpha, ctx.call = problem, prob, by_slice, alpha, call
        return prob.cpu()

    @staticmethod
    def backward(ctx: Any, grad_prob: Tensor) -> tuple[Tensor | None, ...]:
        grad_prob = grad_prob.to(device()).contiguous()
        grad_x = _empty_like_poison(ctx.prob.shape, ctx.prob.dtype) if ctx.needs_input_grad[0] else None
        grad_alpha = _empty_like_poison(ctx.by_slice.shape, torch.float64) if ctx.needs_input_grad[1] else None
        tensors = {"prob": ctx.prob, "grad_prob": grad_prob, "grad_x": grad_x, "grad_alpha": grad_alpha}
        addresses = [None if tensor is None else tensor.data_ptr() for tensor in tensors.values()]
        ctx.call("entmax_backward", EntmaxBackward(ctx.problem, *addresses), tensors | {"alpha": ctx.by_slice})
        return (
            None if grad_x is None else grad_x.cpu(),
            None if grad_alpha is None else grad_alpha.cpu().sum_to_size(ctx.alpha.shape).to(ctx.alpha.dtype),
            None,
            None,
        )


def entmax(
    x: Tensor, alpha: Tensor | float = 1.5, dim: int = -1, seed: int = 0, patches: tuple[emulator.Patch, ...] = ()
) -> Tensor:
    """`adasplash2.entmax` on the kernels, differentiable, for tensors with elements and alpha > 1."""

    def call(name: str, arguments: ctypes.Structure, tensors: dict[str, Tensor | None]) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream if has_gpu() else None)
        present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        build(ENTMAX, patches=patches).call(name, ctypes.byref(arguments), stream, seed=seed, tensors=present)

    return _EntmaxFunction.apply(x, alpha, dim % x.dim(), call)
