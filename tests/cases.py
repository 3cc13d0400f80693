"""Named inputs. Every maker returns float64 tensors that `inputs` casts, so that all dtypes see the same numbers."""

from __future__ import annotations

import functools
import itertools
import mmap
import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adasplash2 import reference

LENGTHS = (0, 1, 5, 6, 7, 63, 64, 65, 97, 127, 200, 257, 515, 1025)  # around tiles of 6 rows and 64 keys, and primes
HEAD_DIMS = (1, 8, 40, 59, 64, 96, 128, 256)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
ALPHAS = (1.5, 2.0, 1.25, 1.1, 1.75)


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention problem; kv_heads and value_head_dim default to heads and head_dim."""

    batch: int = 1
    heads: int = 2
    num_queries: int = 64
    num_keys: int = 64
    head_dim: int = 64
    kv_heads: int | None = None
    value_head_dim: int | None = None

    @property
    def query(self) -> tuple[int, ...]:
        return (self.batch, self.heads, self.num_queries, self.head_dim)

    @property
    def key(self) -> tuple[int, ...]:
        return (self.batch, self.kv_heads or self.heads, self.num_keys, self.head_dim)

    @property
    def value(self) -> tuple[int, ...]:
        return (*self.key[:-1], self.value_head_dim or self.head_dim)

    @property
    def out(self) -> tuple[int, ...]:
        return (*self.query[:-1], self.value[-1])


Maker = Callable[[Shape, torch.Generator], tuple[Tensor, Tensor]]  # query and key; value is Gaussian in every case


def randn(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(size, generator=generator, dtype=torch.float64)


def gaussian(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    return randn(shape.query, generator), randn(shape.key, generator)


def mean_support(query: Tensor, key: Tensor, alpha: float) -> float:
    """Mean number of keys with prob > 0, over at most 64 rows of the first head."""
    query, key = query[:1, :1, :64].float(), key[:1, :1].float()
    score = query @ key.mT / query.shape[-1] ** 0.5
    return (reference.entmax(score, alpha) > 0).sum(-1).float().mean().item()


def gaussian_with_support(fraction: float) -> Maker:
    """Gaussian q and k, q scaled by bisection so that the mean support at alpha = 1.5 is `fraction` of the keys."""

    def make(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        query, key = gaussian(shape, generator)
        target = max(1.0, fraction * shape.num_keys)
        low, high = 1e-3, 1e3
        for _ in range(14):
            middle = (low * high) ** 0.5
            if mean_support(query * middle, key, alpha=1.5) > target:
                low = middle
            else:
                high = middle
        return query * (low * high) ** 0.5, key

    return make


def one_hot(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Query i matches key i (modulo Nk) so well that it attends to nothing else (to its neighbours where D is tiny)."""
    key = torch.nn.functional.normalize(randn(shape.key, generator), dim=-1)
    matching = torch.arange(shape.num_queries) % shape.num_keys
    query = key[:, :, matching].repeat_interleave(shape.heads // key.shape[1], dim=1)
    return query * 200.0, key


def tied(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Seven distinct keys, repeated: every score occurs many times, exactly."""
    query, key = gaussian(shape, generator)
    return query * 2.0, key[:, :, torch.arange(shape.num_keys) % 7 % max(shape.num_keys, 1)]


def constant(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """All scores of a row are equal, so prob is uniform; keys differ only where the queries are zero."""
    query, key = gaussian(shape, generator)
    num_seen = (shape.head_dim + 1) // 2
    query[..., num_seen:] = 0.0
    key[..., :num_seen] = key[:, :, :1, :num_seen].clone()
    return query, key


def rising(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scores that climb along the keys by 20 in all: every new key is a new maximum, so bounds are late everywhere."""
    direction = torch.nn.functional.normalize(randn((shape.head_dim,), generator), dim=-1)
    ramp = torch.linspace(0.0, 20.0, shape.num_keys, dtype=torch.float64)[:, None]
    query = direction.expand(shape.query) * shape.head_dim**0.5
    return query + 0.1 * randn(shape.query, generator), ramp * direction + 0.1 * randn(shape.key, generator)


def border(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """At alpha = 1.5 one key with z = 0, all others within 0.001 of z = -1: where the support of one key would end."""
    direction = torch.nn.functional.normalize(randn((shape.head_dim,), generator), dim=-1)
    score = -2.0 + 2e-3 * randn((*shape.key[:-1], 1), generator)
    score[:, :, shape.num_keys // 2] = 0.0
    query_size = (1.0 + 1e-4 * randn((*shape.query[:-1], 1), generator)) * shape.head_dim**0.5
    return query_size * direction, score * direction


def block_structured(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Queries in blocks of 64 attend to one block of 64 keys each, so that most tiles are dead."""
    num_blocks = max(shape.num_queries, shape.num_keys) // 64 + 1
    topic = torch.nn.functional.normalize(randn((num_blocks, shape.head_dim), generator), dim=-1)
    query_topic = topic[(torch.arange(shape.num_queries) // 64 * 7 + 3) % max(1, -(-shape.num_keys // 64))]
    key_topic = topic[torch.arange(shape.num_keys) // 64]
    query = 12.0 * shape.head_dim**0.5 * query_topic + 0.3 * randn(shape.query, generator)
    return query, key_topic + 0.02 * randn(shape.key, generator)


def outlier_channel(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One channel of the keys is 20 times the others, as in trained models: poison for coarse quantisation."""
    query, key = gaussian(shape, generator)
    key[..., shape.head_dim // 2] *= 20.0
    return query, key


def huge_scores(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Scores up to about 1e4."""
    query, key = gaussian(shape, generator)
    return query * (1e4 / 3.0 / shape.head_dim**0.5) ** 0.5 * 3.0, key * (1e4 / 3.0 / shape.head_dim**0.5) ** 0.5


def denormal(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keys of 2e-39 (float32 and bfloat16 denormals; zero in float16): prob is uniform to within rounding."""
    query, key = gaussian(shape, generator)
    return query, key * 2e-39


def mixed_rows(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Row scales from 0.01 to 30: supports of one key and of all keys within one block of rows."""
    query, key = gaussian(shape, generator)
    scale = torch.logspace(-2.0, 1.5, shape.num_queries, dtype=torch.float64)
    return query * scale[torch.randperm(shape.num_queries, generator=generator)][:, None], key


MAKERS: dict[str, Maker] = {
    "gaussian": gaussian,
    "sparse": gaussian_with_support(0.02),
    "support_10_percent": gaussian_with_support(0.1),
    "support_25_percent": gaussian_with_support(0.25),
    "dense": gaussian_with_support(0.8),
    "mixed_rows": mixed_rows,
    "one_hot": one_hot,
    "tied": tied,
    "constant": constant,
    "rising": rising,
    "border": border,
    "block_structured": block_structured,
    "outlier_channel": outlier_channel,
    "huge_scores": huge_scores,
    "denormal": denormal,
}


@functools.lru_cache(maxsize=64)
def _made(name: str, shape: Shape, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key = MAKERS[name](shape, generator)
    return query, key, randn(shape.value, generator), randn(shape.out, generator)


def inputs(name: str, shape: Shape, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    """query, key, value and the gradient of out, freshly allocated."""
    return tuple(t.to(dtype, copy=True) for t in _made(name, shape, seed))


def inputs_with_support(fraction: float, shape: Shape, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Gaussian inputs whose mean support at alpha = 1.5 is `fraction` of the keys."""
    generator = torch.Generator().manual_seed(0)
    query, key = gaussian_with_support(fraction)(shape, generator)
    return tuple(t.to(dtype) for t in (query, key, randn(shape.value, generator), randn(shape.out, generator)))


def poisoned(tensor: Tensor, layout: str = "slice") -> Tensor:
    """The same values as a view of a buffer that is NaN (bool: True) everywhere else.

    Layouts of the last two dimensions: "slice" leaves gaps of NaN around rows and columns, "transposed" has rows next
    to each other in memory (so the last dimension is strided), "strided" takes every other column.
    """
    *leading, rows, cols = tensor.shape
    if layout == "slice":
        view = tensor.new_full((*leading, rows + 3, cols + 5), float("nan"))[..., 2 : rows + 2, 3 : cols + 3]
    elif layout == "transposed":
        view = tensor.new_full((*leading, cols + 2, rows + 3), float("nan"))[..., 1 : cols + 1, 2 : rows + 2].mT
    elif layout == "strided":
        view = tensor.new_full((*leading, rows, 2 * cols + 1), float("nan"))[..., 1::2][..., :cols]
    else:
        raise ValueError(f"layout must be slice, transposed or strided, got {layout}")
    view.copy_(tensor)
    return view


def far_apart(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    """The same values with these strides, in address space of which no more is backed by memory than is touched."""
    noreserve = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named from Python 3.13 on
    num_elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True))
    memory = mmap.mmap(
        -1, num_elements * tensor.element_size(), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | noreserve
    )
    memory.madvise(mmap.MADV_NOHUGEPAGE)  # a row takes a page, not 2 MB
    view = torch.frombuffer(memory, dtype=tensor.dtype).as_strided(tensor.shape, strides)
    view.copy_(tensor)
    return view


@dataclass(frozen=True)
class Case:
    """One named input at one size, dtype and alpha."""

    name: str
    shape: Shape
    dtype: torch.dtype
    alpha: float
    is_causal: bool = False

    def __str__(self) -> str:
        shape = self.shape
        return (
            f"{self.name}-{str(self.dtype).removeprefix('torch.')}-alpha{self.alpha}"
            f"-{shape.num_queries}x{shape.num_keys}-d{shape.head_dim}{'-causal' if self.is_causal else ''}"
        )

    def inputs(self) -> tuple[Tensor, ...]:
        return inputs(self.name, self.shape, self.dtype)

    @property
    def options(self) -> dict[str, object]:
        return {"alpha": self.alpha, "is_causal": self.is_causal}


def _pairwise_cases() -> list[Case]:
    """Every (name, alpha), (name, dtype) and (alpha, dtype) pair at least once; lengths and head dims rotate beside."""
    lengths = [n for n in LENGTHS if 0 < n < 500]
    result = []
    for name_index, name in enumerate(MAKERS):
        for alpha_index, alpha in enumerate(ALPHAS):
            for turn in range(2):
                index = len(result)
                shape = Shape(
                    num_queries=lengths[index % len(lengths)],
                    num_keys=lengths[(3 * index + index // len(lengths)) % len(lengths)],
                    head_dim=HEAD_DIMS[index % len(HEAD_DIMS)],
                )
                dtype = DTYPES[(name_index + alpha_index + 2 * turn) % len(DTYPES)]
                result.append(Case(name, shape, dtype, alpha, is_causal=index % 3 == 2))
    return result


def _long(
    name: str, num_queries: int, num_keys: int, dtype: torch.dtype = torch.float32, alpha: float = 1.5, **options: bool
) -> Case:
    return Case(name, Shape(heads=1, num_queries=num_queries, num_keys=num_keys), dtype, alpha, **options)


PAIRWISE_CASES = _pairwise_cases()

# Rows of 515 keys and more, from supports of a few keys to supports of nearly all of them, and both within one block.
LONG_CASES = [
    _long("sparse", 257, 1025),
    _long("sparse", 515, 515, torch.bfloat16, is_causal=True),
    _long("sparse", 200, 1025, alpha=1.25),
    _long("support_10_percent", 257, 1500),
    _long("support_10_percent", 127, 1025, torch.float16),
    _long("support_25_percent", 257, 1025, is_causal=True),
    _long("support_25_percent", 200, 1500, torch.bfloat16),
    _long("dense", 257, 1025),
    _long("dense", 515, 515, is_causal=True),
    _long("dense", 130, 1500, torch.bfloat16),
    _long("dense", 130, 1025, torch.float64),
    _long("dense", 130, 1025, alpha=2.0),
    _long("dense", 130, 1025, alpha=1.1),
    _long("dense", 130, 1025, torch.bfloat16, alpha=1.75),
    _long("mixed_rows", 515, 1500),
    _long("mixed_rows", 257, 1025, torch.bfloat16, is_causal=True),
    _long("mixed_rows", 257, 1025, alpha=1.25),
    _long("rising", 130, 1500),
    _long("rising", 130, 1025, torch.bfloat16, alpha=1.75),
    _long("sparse", 97, 6000, torch.bfloat16, is_causal=True),
    _long("support_10_percent", 12, 6000),
    _long("rising", 7, 6000, alpha=1.25),
    _long("border", 65, 1500),
    _long("constant", 65, 1500),
    _long("tied", 65, 1500, torch.float16),
    _long("outlier_channel", 127, 1025),
    _long("huge_scores", 127, 1025),
    _long("block_structured", 1025, 1025, torch.bfloat16),
]


# ---- instances of the CUDA kernels ----

INSTANCE_LENGTHS = (1, 63, 64, 65, 127, 200, 257, 515)
INSTANCE_HEAD_DIMS = {  # of the kernels: of query and key, and of value
    64: ((64, 64), (40, 64), (8, 8)),
    128: ((128, 128), (64, 96), (96, 40)),
    256: ((256, 256), (200, 256), (256, 136)),
}
INSTANCE_ALPHAS = {1.5: "1.5", 2.0: "2", 1.25: "general", "per head": "general"}  # and which kernels take them
INSTANCE_HEADS = ((1, 1), (2, 1), (8, 1))  # of query and of key


@dataclass(frozen=True)
class InstanceCase:
    """One problem for one instance of the CUDA kernels. All fields but the first four rotate among instances."""

    dtype: torch.dtype
    instance_head_dim: int
    alpha: float | str
    mask: str | None
    head_dims: tuple[int, int]
    num_queries: int
    num_keys: int
    heads: tuple[int, int]
    is_causal: bool
    is_padded: bool  # key_lengths, with NaN past them
    name: str
    seed: int

    @property
    def instance(self) -> tuple[torch.dtype, int, str, bool]:
        return self.dtype, self.instance_head_dim, INSTANCE_ALPHAS[self.alpha], self.mask is not None

    @property
    def shape(self) -> Shape:
        head_dim, value_head_dim = self.head_dims
        num_heads, kv_heads = self.heads
        return Shape(1, num_heads, self.num_queries, self.num_keys, head_dim, kv_heads, value_head_dim)

    @property
    def size(self) -> int:
        """Products of 16 bits, which the time in the emulator goes by."""
        products = 3 if self.dtype == torch.float32 else 1
        return self.heads[0] * self.num_queries * self.num_keys * self.instance_head_dim * products

    def pairs(self) -> set[tuple[object, ...]]:
        """Of any two fields their values."""
        fields = {**vars(self), "is_square": self.num_keys == self.num_queries}
        return {(a, fields[a], b, fields[b]) for a, b in itertools.combinations(fields, 2)}

    def __str__(self) -> str:
        options = [f"alpha{self.alpha}".replace(" ", "_"), self.mask and f"{self.mask}mask"]
        options += [name for name in ("causal", "padded") if getattr(self, f"is_{name}")]
        sizes = f"{self.num_queries}x{self.num_keys}-d{self.head_dims[0]}_{self.head_dims[1]}-h{self.heads[0]}"
        dtype = str(self.dtype).removeprefix("torch.")
        return "-".join([self.name, dtype, sizes, *filter(None, options), str(self.seed)])


def instance_cases(
    dtypes: tuple[torch.dtype, ...], head_dims: tuple[int, ...], masks: tuple[str | None, ...], num_cases: int
) -> list[InstanceCase]:
    """Every kernel instance, and greedily the most pairs of all that a case is made of, in problems of bounded size."""
    rng = random.Random(0)
    names = ("gaussian", "sparse", "dense", "one_hot", "tied", "constant", "rising", "border")
    largest = 515 * 515 * 64

    def candidate(instance: tuple[torch.dtype, int, str, bool]) -> InstanceCase:
        dtype, head_dim, kind, has_mask = instance
        num_queries = rng.choice(INSTANCE_LENGTHS)
        return InstanceCase(
            dtype,
            head_dim,
            alpha=rng.choice([alpha for alpha, of_kind in INSTANCE_ALPHAS.items() if of_kind == kind]),
            mask=rng.choice([mask for mask in masks if mask]) if has_mask else None,
            head_dims=rng.choice(INSTANCE_HEAD_DIMS[head_dim]),
            num_queries=num_queries,
            num_keys=num_queries if rng.random() < 0.4 else rng.choice(INSTANCE_LENGTHS),
            heads=rng.choice(INSTANCE_HEADS),
            is_causal=not has_mask and rng.random() < 0.5,
            is_padded=rng.random() < 0.3,
            name=rng.choice(names),
            seed=rng.randrange(4),
        )

    has_masks = sorted({mask is not None for mask in masks})
    instances = list(itertools.product(dtypes, head_dims, sorted(set(INSTANCE_ALPHAS.values())), has_masks))
    result: list[InstanceCase] = []
    seen: set[tuple[object, ...]] = set()
    for index in range(num_cases):
        of_instance = instances[index % len(instances)]
        found = [case for case in (candidate(of_instance) for _ in range(60)) if case.size <= largest]
        best = max(found, key=lambda case: len(case.pairs() - seen) - 6.0 * case.size / largest)
        seen |= best.pairs()
        result.append(best)
    return result
