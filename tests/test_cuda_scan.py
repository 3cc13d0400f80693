"""What the scan promises the other passes, and what every pass is allowed to do: bounds, masks, exact work counts."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import Shape
from kernels import library
from torch import Tensor

from adasplash2 import reference

BF16 = torch.bfloat16
MMA = 16 * 8 * 16  # multiply-adds of one mma.m16n8k16
emulated = pytest.mark.skipif(library.has_gpu(), reason="the emulator counts, a GPU does not")
on_both_paths = pytest.mark.usefixtures("cuda_path")
only_sm80 = pytest.mark.parametrize("cuda_path", ["sm80"], indirect=True)
only_sm90 = pytest.mark.parametrize("cuda_path", ["sm90"], indirect=True)


def exact_z(query: Tensor, key: Tensor, alpha: float, is_causal: bool = False) -> Tensor:
    """(alpha - 1) * score in float64, -inf where masked."""
    query, key = query.double(), key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    z = (alpha - 1) * query.shape[-1] ** -0.5 * query @ key.mT
    num_queries, num_keys = z.shape[-2:]
    if is_causal:
        visible = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries)
        z = z.masked_fill(~visible, -torch.inf)
    return z


def exact_tau(query: Tensor, key: Tensor, value: Tensor, alpha: float, is_causal: bool = False) -> Tensor:
    tensors = (t.double() for t in (query, key, value))
    return reference.entmax_attention(*tensors, alpha=alpha, is_causal=is_causal, enable_gqa=True, return_aux=True)[
        1
    ].tau


def tiles_with(keys: Tensor, rows: int = 16) -> Tensor:
    """(B, H, Nq, Nk) bool to one bit for each (row group, key tile): does it hold a marked pair?"""
    num_queries, num_keys = keys.shape[-2:]
    padded = torch.nn.functional.pad(keys, (0, -num_keys % 64, 0, -num_queries % rows))
    return padded.unflatten(-1, (-1, 64)).unflatten(-3, (-1, rows)).any(-1).any(-2)


def blocks(mask: Tensor, groups: int) -> Tensor:
    """A mask by groups of 16 rows to one by `groups` such groups."""
    padded = torch.nn.functional.pad(mask, (0, 0, 0, -mask.shape[-2] % groups))
    return padded.unflatten(-2, (-1, groups)).any(-2)


def visible_pairs(shape: Shape, is_causal: bool) -> Tensor:
    """(B, H, Nq, Nk) bool."""
    pairs = torch.ones(shape.batch, shape.heads, shape.num_queries, shape.num_keys, dtype=torch.bool)
    return pairs.tril(shape.num_keys - shape.num_queries) if is_causal else pairs


def run_case(name: str, shape: Shape, seed: int = 0, **options: object) -> tuple[library.Run, tuple[Tensor, ...]]:
    tensors = cases.inputs(name, shape, BF16, seed)
    on_device = [t.to(library.device()) for t in tensors[:3]]
    return library.forward(library.build(), *on_device, seed=seed % 4, **options), tensors


@on_both_paths
@pytest.mark.parametrize("alpha", [1.5, 2.0, 1.25])
@pytest.mark.parametrize("name", sorted(cases.MAKERS))
def test_bounds_and_masks(name, alpha):
    is_causal = name in ("gaussian", "tied", "rising")
    run, (query, key, value, _) = run_case(name, Shape(1, 1, 150, 300), seed=1, alpha=alpha, is_causal=is_causal)
    tau, tau_lower = exact_tau(query, key, value, alpha, is_causal), run.tau_lower.cpu().double()
    # The kernels' scores are float32 sums of D exact products: below D 2^-24 of sum |q k| from the exact ones.
    size = (alpha - 1) * query.shape[-1] ** -0.5 * (query.double().abs() @ key.double().abs().mT).amax(-1)
    rounding = 64 * 2**-24 * size + 2**-20
    assert (tau_lower <= tau + rounding).all(), f"tau_lower above tau by {(tau_lower - tau).max():.3e}"
    assert ((run.tau.cpu() - tau).abs() <= 2e-5 + 2 * rounding).all(), f"{(run.tau.cpu() - tau).abs().max():.3e}"

    z = exact_z(query, key, alpha, is_causal)
    support = tiles_with(z > (tau + 4e-5 + 2 * rounding).unsqueeze(-1))
    block_mask, scan_mask = run.block_mask.cpu(), run.scan_mask.cpu()
    assert (block_mask | ~support).all(), "the block mask misses a tile of the support"
    assert (scan_mask | ~block_mask).all(), "the scan's mask misses a tile of the block mask"
    above = tiles_with(z > (torch.minimum(tau_lower, tau) - 4e-5 - 2 * rounding).unsqueeze(-1))
    assert (above | ~block_mask).all(), "the block mask has a tile without a gap"


@only_sm80
@on_both_paths
@pytest.mark.parametrize("num_keys, factor, largest_error", [(1000, 3.0, 3e-4), (2000, 1.0, 8e-4), (3000, 0.6, 3e-3)])
def test_error_of_the_scan_by_support(num_keys, factor, largest_error):
    """Before the last step; docs/algorithm.md quotes these errors."""
    query, key, value, _ = cases.inputs("gaussian", Shape(1, 1, 32, num_keys), BF16)
    query = query * factor
    run = library.forward(library.build(), *(t.to(library.device()) for t in (query, key, value)))
    error = exact_tau(query, key, value, 1.5) - run.tau_lower.cpu()
    assert error.max() <= largest_error
    assert (run.tau.cpu() - exact_tau(query, key, value, 1.5)).abs().max() <= 3e-6


@only_sm90
@on_both_paths
@pytest.mark.parametrize("num_keys, factor", [(1000, 10.0), (2000, 3.0), (3000, 1.0), (3000, 0.3), (3000, 0.05)])
def test_error_of_the_tangents(num_keys, factor):
    """By support, from a few keys to nearly all, in units of the mean gap: what one refinement squares away.

    The bound itself only decides which tiles are refined: it is as far off as a walk with one step of Newton's method a
    row leaves it (0.245 at the most here; three steps left 0.22 and took longer than they saved). Refinement starts at
    the expected tau.
    """
    query, key, value, _ = cases.inputs("gaussian", Shape(1, 1, 96, num_keys), BF16)
    query = query * factor
    run = library.forward(library.build(), *(t.to(library.device()) for t in (query, key, value)))
    tau, tau_lower = exact_tau(query, key, value, 1.5), run.tau_lower.cpu().double()
    gap = (exact_z(query, key, 1.5) - tau_lower.unsqueeze(-1)).clamp(min=0)
    mean_gap = gap.sum(-1) / (gap > 0).sum(-1)
    shift = (tau - tau_lower) / mean_gap
    assert shift.mean() <= 0.25 and shift.max() <= 0.8
    start_error = ((run.expected_tau.cpu() - tau) / mean_gap).abs()
    assert start_error.mean() <= 0.06 and start_error.max() <= 0.8
    assert (run.expected_tau.cpu() < tau_lower + 0.4 * (exact_z(query, key, 1.5).amax(-1) - tau_lower)).all()
    assert run.is_coarse.all()
    assert (run.tau.cpu() - tau).abs().max() <= 1e-5


@only_sm80
@on_both_paths
@pytest.mark.parametrize("factor", [1.0, 2.0, 5.0])
def test_no_refinement_for_small_supports(factor):
    query, key, value, _ = cases.inputs("gaussian", Shape(1, 1, 128, 1500), BF16)
    run = library.forward(library.build(), *(t.to(library.device()) for t in (query * factor, key, value)))
    assert run.support_size.max() <= 300
    assert not run.is_coarse.any()


@on_both_paths
def test_refinement_of_large_supports():
    """Nearly constant scores: many rows are flagged, and end as exact as the others."""
    query, key, value, _ = cases.inputs("gaussian", Shape(1, 1, 64, 2000), BF16)
    query = query * 0.1
    run = library.forward(library.build(), *(t.to(library.device()) for t in (query, key, value)))
    assert run.is_coarse.sum() >= 10 and run.support_size.float().mean() > 500
    assert (run.tau.cpu() - exact_tau(query, key, value, 1.5)).abs().max() <= 3e-6


@on_both_paths
@pytest.mark.parametrize("name", ["block_structured", "one_hot", "rising"])
def test_tiles_marked_early_do_not_stay(name):
    """While bounds are low nearly every tile looks live; all but a few of them must leave the mask in the end."""
    run, _ = run_case(name, Shape(1, 1, 512, 1024))
    live, visited = blocks(run.block_mask, 4).sum(), blocks(run.scan_mask, 4).sum()
    assert live <= 0.2 * run.block_mask.shape[-1] * (512 // 64)
    assert visited <= 1.1 * live


@emulated
@only_sm80
@on_both_paths
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ["gaussian", "block_structured"])
def test_work_of_the_forward_pass(name, is_causal, head_dim):
    """Each unmasked tile is scanned once; the output pass multiplies what the masks hold, and nothing is refined."""
    shape = Shape(1, 2, 200, 400, head_dim)
    run, _ = run_case(name, shape, is_causal=is_causal)
    assert not run.is_coarse.any()
    visible = visible_pairs(shape, is_causal)
    scanned = blocks(tiles_with(visible), 8).sum().item()  # 128 rows x 64 keys
    # The output pass takes the scores in steps of 64 keys, or of 16 where registers are scarce; values only for steps
    # in which a warp's 16 rows have a gap.
    products = scanned * (128 * 64 * head_dim) + blocks(run.scan_mask, 4).sum().item() * (64 * 64 * head_dim)
    most = products + run.block_mask.sum().item() * 2 * (16 * 64 * head_dim)
    done = run.counters["mma"] * MMA
    assert products < done <= most
    if head_dim == 64:
        assert done == most
    assert run.counters["ldmatrix_wavefronts"] == 4 * run.counters["ldmatrix"], "bank conflicts"


@emulated
@only_sm90
@on_both_paths
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ["gaussian", "block_structured"])
def test_work_of_hoppers_forward_pass(name, is_causal, head_dim):
    """Each unmasked tile is scanned once; the refinement and the output pass multiply what the scan's mask holds."""
    shape = Shape(1, 2, 200, 400, head_dim)
    run, tensors = run_case(name, shape, is_causal=is_causal)
    alone = library.forward(library.build(), *tensors[:3], is_causal=is_causal, out_alone=True)
    visible = visible_pairs(shape, is_causal)
    scanned = torch.nn.functional.pad(tiles_with(visible, 64), (0, 1)).unflatten(-1, (-1, 2)).any(-1).sum().item()
    product = blocks(run.scan_mask, 4).sum().item() * 64 * 64 * head_dim  # of the live tiles
    refined = run.counters["wgmma_macs"] - scanned * 64 * 128 * head_dim - 3 * product
    assert product <= refined <= 2 * product, "a pass for all rows, and one for those that it left rough"
    assert run.counters["wgmma_macs"] - alone.counters["wgmma_macs"] == product, "out alone takes no weights"
    assert run.counters["mma"] == 0
    if name == "block_structured" and not is_causal:
        assert product <= 0.2 * 4 * 7 * 2 * 64 * 64 * head_dim


@emulated
@on_both_paths
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", ["gaussian", "block_structured"])
def test_work_of_the_backward_pass(name, head_dim, cuda_path):
    """Seven products of a live 64 x 64 tile at most (three for dq, four for dk and dv), none of a dead one."""
    run, (*_, grad_out) = run_case(name, Shape(1, 2, 256, 512, head_dim))
    grads = library.backward(library.build(), run, grad_out)
    live = blocks(run.block_mask, 4).sum().item()
    product = live * 64 * 64 * head_dim
    done = grads.counters["mma"] * MMA + grads.counters["wgmma_macs"]
    assert 0 < done <= 7 * product
    assert grads.counters["ldmatrix_wavefronts"] == 4 * grads.counters["ldmatrix"], "bank conflicts"
    # None for gradients; sm90's blocks take each of 4 blocks of rows and 8 of keys from a counter.
    assert grads.counters["global_atomics"] <= (12 if cuda_path == "sm90" else 0)
    if name == "block_structured":
        assert live <= 0.2 * 4 * 8 * 2
    if cuda_path == "sm90":
        grads = library.backward(library.build(), run, grad_out, wanted=("key", "value"))
        assert grads.counters["mma"] == 0 and grads.counters["wgmma_macs"] == 4 * product


@emulated
@only_sm80
@pytest.mark.usefixtures("cuda_path")
def test_work_in_float32():
    """Six products for one, in live tiles alone: all of them here. Nothing waits for a bank."""
    num_queries, num_keys, head_dim = 128, 128, 64
    query, key, value, grad_out = cases.inputs("dense", Shape(1, 1, num_queries, num_keys, head_dim))
    run = library.forward(library.build(), query, key, value)
    grads = library.backward(library.build(), run, grad_out)
    product = 6 * num_queries * num_keys * head_dim // MMA
    num_refinements = run.counters["mma"] / product - 4  # beside the scan, Q K^T, prob V and weight V
    assert num_refinements in (1, 2, 3)
    assert grads.counters["mma"] == 7 * product
    for counters in (run.counters, grads.counters):
        assert counters["ldmatrix_wavefronts"] == 4 * counters["ldmatrix"], "bank conflicts"


@emulated
@only_sm80
@on_both_paths
def test_a_hit_costs_two_atomics():
    """Keys at or below the bounds never reach a histogram: far fewer hits than keys, two words a hit."""
    run, _ = run_case("sparse", Shape(1, 1, 128, 1000))
    num_hits, remainder = divmod(run.counters["shared_atomics"], 2)
    assert remainder == 0
    assert run.support_size.sum() <= num_hits <= 0.3 * 128 * 1000


@only_sm80
@on_both_paths
@pytest.mark.parametrize("alpha, factor", [(1.5, 0.02), (2.0, 0.001), (1.25, 0.02)])
@pytest.mark.parametrize("shape", [Shape(1, 1, 48, 1500), Shape(1, 2, 16, 1100, head_dim=256)])
def test_dense_rows(shape, alpha, factor):
    """Warps whose rows keep most keys leave the histogram after 8 tiles; bounds hold and tau ends as exact as ever."""
    query, key, value, _ = cases.inputs("gaussian", shape, BF16, seed=3)
    query = query * factor
    run = library.forward(library.build(), *(t.to(library.device()) for t in (query, key, value)), alpha=alpha)
    tau = exact_tau(query, key, value, alpha)
    assert run.support_size.float().mean() > 0.5 * shape.num_keys
    assert run.is_coarse.all() and run.block_mask.all()
    assert (run.tau_lower.cpu() <= tau + 2e-6).all() and ((run.tau.cpu() - tau).abs() <= 3e-6).all()
    if not library.has_gpu():
        assert run.counters["shared_atomics"] <= 2 * shape.num_queries * shape.heads * 8 * 64


@only_sm80
@on_both_paths
def test_dense_prefix_of_a_sparse_row():
    """The nearest keys make a warp dense, a key far ahead of them comes last: it alone is the support."""
    query, key, value, _ = cases.inputs("gaussian", Shape(1, 1, 40, 1200), BF16, seed=3)
    query = 0.02 * query + 0.02
    key[:, :, 5] = 60.0
    run = library.forward(library.build(), *(t.to(library.device()) for t in (query, key, value)))
    tau = exact_tau(query, key, value, 1.5)
    assert (run.support_size == 1).all() and ((run.tau.cpu() - tau).abs() <= 1e-5).all()


@on_both_paths
def test_blocks_with_most_work_run_first(cuda_path):
    """Rows that see few keys and keys that few rows see, in GQA groups, in sequences of one length and of two."""
    shape, block_size = Shape(2, 4, 700, 500, kv_heads=2), {"sm80": 64, "sm90": 128}[cuda_path]
    query, key, value, grad_out = (t.to(library.device()) for t in cases.inputs("gaussian", shape, BF16))
    for lengths in (None, torch.tensor([500, 130], device=library.device())):
        run = library.forward(library.build(), query, key, value, is_causal=True, key_lengths=lengths)
        grads = library.backward(library.build(), run, grad_out)
        rows = blocks_work(run.scan_mask, block_size // 16)
        keys = blocks_work(run.block_mask.mT, block_size // 64).unflatten(1, (2, 2)).sum(2)
        assert_most_work_first(run.work_order(block_size), rows)
        assert_most_work_first(grads.work_order(run, block_size), keys)


@pytest.mark.parametrize("shape", [(1, 1, 300, 70), (3, 8, 2100, 3), (2, 4, 5, 900)])
def test_orders_of_many_blocks(shape):
    """More than a thread counts at once, blocks at the mask's edge, GQA, blocks of less than a tile and of two."""
    density = torch.rand(*shape[:2], shape[2], 1) ** 4
    mask = torch.rand(shape) < density
    for block_rows in (16, 64, 128):
        work = blocks_work(mask, block_rows // 16)
        assert_most_work_first(library.block_order(mask, block_rows), work)
    for block_keys in (32, 64, 128):
        group_size = 2 if shape[1] > 1 else 1
        work = blocks_work(mask, max(1, block_keys // 64)).unflatten(1, (-1, group_size)).sum(2)
        work = work.repeat_interleave(max(1, 64 // block_keys), -1)
        assert_most_work_first(library.block_order(mask, block_keys, group_size), work)


def blocks_work(mask: Tensor, groups: int) -> Tensor:
    """Live tiles of each block of so many row groups (key tiles, of a mask by columns)."""
    padded = torch.nn.functional.pad(mask, (0, 0, 0, -mask.shape[-2] % groups))
    return padded.unflatten(-2, (-1, groups)).sum((-2, -1))


def assert_most_work_first(order: Tensor, work: Tensor) -> None:
    """A permutation; in steps of half an octave, as the kernel's float has it; stable."""
    mantissa, exponent = torch.frexp((work.cpu().flatten() + 1).double())
    level = 2 * (exponent - 1) + (mantissa >= 0.75)
    assert level.unique().numel() > 3, "the blocks do not differ"
    assert torch.equal(order, torch.sort(level, descending=True, stable=True).indices)


@only_sm90
@on_both_paths
@pytest.mark.parametrize("factor, is_causal", [(0.3, False), (0.3, True), (0.02, False)])
def test_tiles_full_of_hits(factor, is_causal):
    """Where every tile has some, the scan adds them by their sums alone: bounds and masks are what they were."""
    query, key, value, _ = cases.inputs("gaussian", Shape(1, 1, 96, 3000), BF16)
    query = query * factor
    tensors = [t.to(library.device()) for t in (query, key, value)]
    run = library.forward(library.build(), *tensors, is_causal=is_causal)
    tau = exact_tau(query, key, value, 1.5, is_causal)
    assert (run.tau_lower.cpu() <= tau + 2e-6).all() and ((run.tau.cpu() - tau).abs() <= 1e-5).all()
    support = tiles_with(exact_z(query, key, 1.5, is_causal) > (tau + 4e-5).unsqueeze(-1))
    assert (run.scan_mask.cpu() | ~support).all() and (run.block_mask.cpu() | ~support).all()

    tensors[1][:, :, 1100] = torch.nan  # amid such tiles
    with_nan = library.forward(library.build(), *tensors, is_causal=is_causal)
    assert with_nan.tau.isnan().all() and with_nan.out.isnan().all()


@only_sm90
@on_both_paths
def test_full_tiles_leave_the_mask():
    """Tiles full of hits, until the keys that come last in the walk outdo them all."""
    query, key, value, _ = cases.inputs("gaussian", Shape(1, 1, 128, 3000), BF16)
    query = 0.3 * query
    query[..., 0], key[..., 0] = 8.0, 0.0
    key[:, :, 100:164, 0] = 8.0
    run = library.forward(library.build(), *(t.to(library.device()) for t in (query, key, value)))
    live = run.block_mask.any(-2)[0, 0]
    assert live.nonzero().flatten().tolist() == [1, 2]
    assert run.scan_mask.sum() <= 1.1 * run.block_mask.sum()
