"""Builds CUDA sources for the emulator and calls them.

    library = emulator.build(Path("csrc/cuda/...cu"), ...)
    counters = library.call("entry_point", argument, ..., tensors={"query": query}, seed=0)

`call` raises `Diagnosis` with the emulator's report when the kernel does something wrong.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
SIMT = ROOT / "tests" / "simt"
BUILD = ROOT / "build" / "simt"

# One schedule that goes forward, one that goes backward, two at random: what tests run through by default.
SEEDS = (0, 1, 2, 3)

# No contraction: the kernels' floating point does what the source says, whatever the compiler's version. No unique
# symbols: of several libraries in a process, each has its own constants, where its emulator looks for them.
_FLAGS = ("-std=c++17", "-O2", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-fno-gnu-unique")
# Hidden, so that calls inside the runtime are direct.
_RUNTIME_FLAGS = (*_FLAGS, "-march=native", "-fvisibility=hidden")
# A return address identifies the line of a call, hence no tail calls. CUDA's idioms set off the warnings.
_KERNEL_FLAGS = (
    *_FLAGS,
    "-Wno-unknown-pragmas",
    "-Wno-sign-compare",
    "-Wno-psabi",
    "-fno-optimize-sibling-calls",
    "-x",
    "c++",
)
# A source that includes more than it uses leaves the rest out where this is defined: patches matter to it in the files
# that remain. Nothing is compiled so.
_WHAT_IS_USED = "-DSIMT_WHAT_IS_USED"
# The thread sanitizer's instrumentation without its library: src/sanitizer.cpp is called at every load and store.
_INSTRUMENTATION = ("-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0")


class Diagnosis(Exception):
    """What the emulator reports about a kernel: a race, a deadlock, an access out of bounds, ..."""


@dataclass(frozen=True)
class Patch:
    """A bug to seed: in `file` (relative to the repository), `old`, which occurs exactly once, becomes `new`."""

    file: str
    old: str
    new: str

    def apply(self, root: Path) -> None:
        path = root / self.file
        text = path.read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} has {text.count(self.old)} occurrences of {self.old!r}, expected 1")
        path.write_text(text.replace(self.old, self.new))


def _compiler() -> str:
    compiler = os.environ.get("CXX", "g++")
    if shutil.which(compiler) is None:
        raise RuntimeError(f"the emulator needs {compiler}, which is not on PATH (set CXX)")
    return compiler


def _run(*command: str | Path) -> str:
    words = [str(word) for word in command]
    result = subprocess.run(words, capture_output=True, text=True)
    if result.returncode != 0:
        raise RuntimeError(f"{' '.join(words)}\n{result.stderr}")
    return result.stdout


@functools.cache
def _dependencies(source: Path, flags: tuple[str, ...]) -> list[Path]:
    """`source` and every file of the repository that it includes."""
    rule = _run(_compiler(), *flags, "-MM", source)
    files = {Path(name).resolve() for name in rule.replace("\\\n", " ").split()[1:]}
    return sorted(file for file in files if file.is_relative_to(ROOT))


def _patches_of(source: Path, flags: tuple[str, ...], patches: Sequence[Patch]) -> list[Patch]:
    """Those that touch a file that `source` uses."""
    if not patches:
        return []
    used = _dependencies(source, (*flags, _WHAT_IS_USED))
    return [patch for patch in patches if ROOT / patch.file in used]


def _digest(files: Sequence[Path], *extra: object) -> str:
    digest = hashlib.sha256(repr((_compiler(), *extra)).encode())
    for file in files:
        digest.update(f"{file.relative_to(ROOT)}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def _cpu() -> str:
    """What -march=native depends on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith("flags")), "")


@contextlib.contextmanager
def making(target: Path) -> Iterator[Path | None]:
    """A path to make `target` at, which is moved into place at the end; None where it is there already. Of processes
    and threads that want the same target at once, one makes it and the others wait."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(target.with_name(f"{target.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            yield None
            return
        scratch = target.with_name(f"{target.name}.{os.getpid()}.tmp")
        yield scratch
        os.replace(scratch, target)


def _runtime_object() -> Path:
    """The emulator itself, as one relocatable object."""
    sources = sorted((SIMT / "src").glob("*.cpp"))
    files = sorted(file for folder in ("src", "include") for file in (SIMT / folder).iterdir())
    files.append(ROOT / "csrc" / "cuda" / "tensor_map_shape.h")
    target = BUILD / f"runtime-{_digest(files, _RUNTIME_FLAGS, _cpu())}.o"
    with making(target) as scratch:
        if scratch is not None:
            with tempfile.TemporaryDirectory(dir=BUILD) as folder, ThreadPoolExecutor(os.cpu_count()) as pool:

                def compile_source(source: Path) -> Path:
                    made = Path(folder) / f"{source.stem}.o"
                    _run(_compiler(), *_RUNTIME_FLAGS, *_include_flags(ROOT), "-c", source, "-o", made)
                    return made

                _run("ld", "-r", *pool.map(compile_source, sources), "-o", scratch)
    return target


def _include_flags(root: Path) -> list[str]:
    return [f"-I{root / 'tests' / 'simt' / 'include'}", f"-I{root / 'csrc'}"]


def _object(source: Path, flags: Sequence[str], patches: Sequence[Patch], files: Sequence[Path], target: Path) -> None:
    """Compiles `source`, which includes `files`, against the emulator."""
    with making(target) as scratch:
        if scratch is None:
            return
        with tempfile.TemporaryDirectory(dir=BUILD) as folder:
            root = ROOT
            map_paths: tuple[str, ...] = ()
            if patches:
                root = Path(folder) / "source"
                kept = target.with_suffix(".source")
                for file in files:
                    copy = root / file.relative_to(ROOT)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, copy)
                for patch in patches:
                    patch.apply(root)
                # The debug information names the copy that stays, for reports and gdb.
                shutil.copytree(root, kept, dirs_exist_ok=True)
                map_paths = (f"-ffile-prefix-map={root}={kept}",)
            path = root / source.relative_to(ROOT)
            _run(_compiler(), *flags, *map_paths, *_include_flags(root), "-c", path, "-o", scratch)


def _build(
    sources: Sequence[Path],
    instrumented: bool,
    patches: Sequence[Patch],
    extra_flags: Sequence[str],
    link: Sequence[str],
    suffix: str,
) -> Path:
    """Compiles `sources` side by side and links them with `link`; cached by the content of all they may include. What
    is made of a source that no patch touches is that of a build without the patch."""
    instrumentation = _INSTRUMENTATION if instrumented else ()
    from_environment = os.environ.get("SIMT_CXXFLAGS", "").split()  # -O0 -g for gdb, say
    flags = (*_KERNEL_FLAGS, *instrumentation, *extra_flags, *from_environment)
    listing_flags = (*flags, *_include_flags(ROOT))
    sources = [source.resolve() for source in sources]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        runtime = pool.submit(_runtime_object)
        includes = list(pool.map(lambda source: _dependencies(source, listing_flags), sources))
        patches_of = list(pool.map(lambda source: _patches_of(source, listing_flags, patches), sources))
        for patch in patches:
            if not any(patch in of_source for of_source in patches_of):
                raise ValueError(f"{patch.file} is of no use to {', '.join(source.name for source in sources)}")
        objects = [
            BUILD / f"{source.stem}-{_digest(files, flags, of_source)}.o"
            for source, files, of_source in zip(sources, includes, patches_of, strict=True)
        ]
        names = [file.name for file in (runtime.result(), *objects)]
        target = BUILD / f"{sources[0].stem}-{_digest([], names, link)}{suffix}"
        with making(target) as scratch:
            if scratch is not None:
                compiled = [
                    pool.submit(_object, source, flags, of_source, files, made)
                    for source, of_source, files, made in zip(sources, patches_of, includes, objects, strict=True)
                ]
                for result in compiled:
                    result.result()
                # The runtime first: of the inline functions that both hold, the linker keeps those without
                # instrumentation.
                _run(_compiler(), *link, runtime.result(), *objects, "-ldl", "-o", scratch)
    return target


class Library:
    """A compiled source with its own copy of the emulator."""

    def __init__(self, path: Path, instrumented: bool, keeps_stacks: bool = True) -> None:
        self.path = path
        self.instrumented = instrumented
        self.keeps_stacks = keeps_stacks  # of the threads, from call to call
        self._library = ctypes.CDLL(str(path))
        self._library.simt_error.restype = ctypes.c_char_p
        self._library.simt_counter_name.restype = ctypes.c_char_p
        self._library.simt_counter.restype = ctypes.c_uint64

    @contextlib.contextmanager
    def on_device(self, major: int, minor: int) -> Iterator[None]:
        """Calls inside run on a device of that compute capability; otherwise it is a Hopper's, 9.0."""
        self._library.simt_set_compute_capability(major, minor)
        try:
            yield
        finally:
            self._library.simt_set_compute_capability(9, 0)

    def call(
        self,
        name: str,
        *arguments: object,
        seed: int = 0,
        tensors: Mapping[str, torch.Tensor] | None = None,
    ) -> dict[str, int]:
        """Calls the entry point `name` and returns the counters of its launches.

        Arguments are ctypes values, what ctypes converts by itself, or tensors (passed as their address). `tensors`
        names all the global memory that the kernels may touch, each to the end of its storage: with it, an access to
        anything else is out of bounds.
        """
        library = self._library
        library.simt_configure(ctypes.c_uint64(seed), ctypes.c_int(self.instrumented))
        library.simt_unregister_globals()
        for tensor_name, tensor in (tensors or {}).items():
            num_bytes = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()
            library.simt_register_global(
                ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(int(num_bytes)), tensor_name.encode()
            )
        library.simt_reset_counters()
        converted = [
            ctypes.c_void_p(argument.data_ptr()) if isinstance(argument, torch.Tensor) else argument
            for argument in arguments
        ]
        failed = getattr(library, name)(*converted) != 0
        if not self.keeps_stacks:
            library.simt_release_stacks()
        if failed:
            raise Diagnosis(library.simt_error().decode())
        return {
            library.simt_counter_name(index).decode(): library.simt_counter(index)
            for index in range(library.simt_num_counters())
        }


def build(
    *sources: Path, instrumented: bool = True, patches: Sequence[Patch] = (), flags: Sequence[str] = ()
) -> Library:
    """The emulated library of .cu files with extern "C" entry points; `flags` are the compiler's, beside those of all.

    Instrumented builds check every access and are two to three times slower; the plain ones serve for big problems.
    """
    path = _build(sources, instrumented, patches, flags, ["-shared"], ".so")
    # Stacks are a thousand mappings, of which a process may have 65530, and libraries with a bug are many.
    return Library(path, instrumented, keeps_stacks=not patches)


def build_program(source: Path, *, patches: Sequence[Patch] = ()) -> Path:
    """The emulated executable, instrumented, of a .cu file with a main(). SIMT_SEED in its environment is the seed."""
    return _build([source], True, patches, (), ["-pie"], "")
