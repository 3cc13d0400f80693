"""Bugs seeded into the kernels' source, each of which the tests above must show: they can fail."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import Shape
from kernels import library
from simt import emulator
from simt.emulator import SEEDS, Diagnosis, Patch

from adasplash2 import reference

pytestmark = pytest.mark.skipif(library.has_gpu(), reason="seeded bugs are for the emulator")

TILE = "csrc/cuda/tile/"
SCAN, OUTPUT = "csrc/cuda/sm80/scan.cuh", "csrc/cuda/sm80/output.cuh"
GRAD_QUERY, GRAD_KEY_VALUE = "csrc/cuda/sm80/grad_query.cuh", "csrc/cuda/sm80/grad_key_value.cuh"
LIVE_TILES, SCORE_MASK = "csrc/cuda/tile/live_tiles.cuh", "csrc/cuda/tile/score_mask.cuh"
GRAD_MASK, PASS_PARAMS = "csrc/cuda/sm80/grad_mask.cuh", "csrc/cuda/pass_params.h"
HISTOGRAM, ENTMAX, WORK_RANGE = "csrc/math/histogram.h", "csrc/math/entmax.h", "csrc/math/work_range.h"
REFINEMENT = "csrc/math/refinement.h"
SM90_OUTPUT, SM90_GRAD_QUERY = "csrc/cuda/sm90/output.cuh", "csrc/cuda/sm90/grad_query.cuh"
LIVE_KEY_TILES, WARPGROUP = "csrc/cuda/sm90/live_key_tiles.cuh", "csrc/cuda/sm90/warpgroup.cuh"
SM90_SCAN, SM90_REFINE = "csrc/cuda/sm90/scan.cuh", "csrc/cuda/sm90/refine.cuh"
RING, SM90_GRAD_KEY_VALUE = "csrc/cuda/sm90/ring.cuh", "csrc/cuda/sm90/grad_key_value.cuh"
WORK_QUEUE = "csrc/cuda/sm90/work_queue.cuh"

BUGS = {
    "the scan does not wait for its tile": Patch(SCAN, "ptx::cp_async_wait<Config::kStages - 2>();", ""),
    "no barrier before a stage is filled again": Patch(
        SCAN,
        "ptx::cp_async_wait<Config::kStages - 2>();\n      __syncthreads();",
        "ptx::cp_async_wait<Config::kStages - 2>();",
    ),
    "the queries are overwritten while others read them": Patch(
        SCAN, "query[i].load(s_query, warp * Config::kRowsPerWarp + i * kMmaM);\n  __syncthreads();",
        "query[i].load(s_query, warp * Config::kRowsPerWarp + i * kMmaM);",
    ),
    "hits counted without an atomic": Patch(
        SCAN, "atomicAdd(s_bin, one.count_and_sum);", "*s_bin += one.count_and_sum;"
    ),
    "stale slots are not cleared": Patch(
        SCAN, "s_bin[0] = s_bin[1] = 0;", "s_bin[0] += 0;"
    ),
    "no warp barrier between clearing and counting": Patch(
        SCAN, "num_hits += length;\n    }\n    __syncwarp();", "num_hits += length;\n    }"
    ),
    "lists overflow": Patch(
        SCAN, "(Config::kHitsPerList - Config::kMostHitsPerStep) * kListStride", "Config::kHitsPerList * kListStride"
    ),
    "lists of an old window join the new one": Patch(
        SCAN, "(kUnitsInLists + 1.0f) * from_z) list_end", "1e6f * from_z) list_end"
    ),
    "masked keys are scanned": Patch(SCAN, "if (col >= visible)", "if (col >= visible + 512)"),
    "the diagonal is off by one": Patch(WORK_RANGE, "row + num_keys - num_queries + 1", "row + num_keys - num_queries"),
    "tau_lower is not a lower bound": Patch(
        HISTOGRAM, "float position = smaller_root(", "float position = 0.4f + smaller_root("
    ),
    "a dead tile for a live one": Patch(SCAN, "decode_excess(*excess_at(i, tile)) >= rise", "rise < 0.0f"),
    "no swizzle on the way out": Patch(TILE + "fragment.cuh", "2 * k + lane / 8 % 2", "(2 * k + lane / 8 % 2) ^ 1"),
    "tiles of the mask's gradient are overwritten while others read them": Patch(
        GRAD_MASK, "__syncthreads();  // all warps are done with the pair before", ""
    ),
    "slabs overlap": Patch(PASS_PARAMS, "num_pairs() * slab / num_slabs", "num_pairs() * slab / (num_slabs + 1)"),
    "rows past the end are written": Patch(
        TILE + "fragment.cuh", "if (row >= num_rows) continue;", "if (row >= num_rows + 64) continue;"
    ),
    "the last step is left out": Patch(
        REFINEMENT, "fold.step = entmax.last_step(sums);", "fold.step = 0.0f;"
    ),
    "a value tile is read in flight": Patch(
        LIVE_TILES,
        "ptx::cp_async_wait<0>();\n    __syncthreads();\n    if (kStages == 2",
        "__syncthreads();\n    if (kStages == 2",
    ),
    "attn_mask is read past its last key": Patch(
        SCORE_MASK, "key_begin + kN * kMmaN <= min(visible_first, visible_second)", "true"
    ),
    "the mask loses a word": Patch(OUTPUT, "finish_words_before(mask_shape.key_words());", ""),
    "delta has the wrong sign": Patch(
        GRAD_QUERY, "(grad_prob[i][n][e] - delta[i][e / 2])", "(grad_prob[i][n][e] + delta[i][e / 2])"
    ),
    "tau of the wrong stage": Patch(
        GRAD_KEY_VALUE, "s_stats + stage * Config::kBlockM;", "s_stats + (stage ^ 1) * Config::kBlockM;"
    ),
    "keys of the next head are not added": Patch(
        GRAD_KEY_VALUE, "head_words, kv_head * group_size, group_size,", "head_words, kv_head * group_size, 1,"
    ),
    "sm90: a tile is used before it is there": Patch(LIVE_KEY_TILES, "      ring.wait(stage, position.parity);\n", ""),
    "sm90: fewer bytes are announced than come": Patch(
        LIVE_KEY_TILES, "ring.announce(stage, kStageBytes)", "ring.announce(stage, Tile::kBytes)"
    ),
    "sm90: the parity of a stage never changes": Patch(RING, "parity ^= 1;", ""),
    "sm90: a stage is not given back": Patch(
        SM90_GRAD_QUERY, "ptx::wgmma_pin(grad_query);\n        tiles.release(stage);", "ptx::wgmma_pin(grad_query);"
    ),
    "sm90: a stage is given back while it is read": Patch(
        SM90_OUTPUT,
        "make_gaps_and_mask(tile);\n        ptx::wgmma_wait<0>();",
        "make_gaps_and_mask(tile);\n        tiles.release(stage);\n        ptx::wgmma_wait<0>();",
    ),
    "sm90: scores are read while they are computed": Patch(SM90_OUTPUT, "wgmma_wait<1>", "wgmma_wait<2>"),
    "sm90: no fence before the products": Patch(
        SM90_GRAD_QUERY, "ptx::wgmma_fence();\n        start_scores(next_stage);", "start_scores(next_stage);"
    ),
    "sm90: the tiles of the other consumer": Patch(
        LIVE_KEY_TILES, "(found >> consumer & 1)", "(found >> !consumer & 1)"
    ),
    "sm90: keys in the place of values": Patch(
        SM90_OUTPUT, "KeyTile::mn_major(tiles.s_value(stage), k)", "KeyTile::mn_major(tiles.s_key(stage), k)"
    ),
    "sm90: the second panel of rows is the first": Patch(
        SM90_OUTPUT, "query(s_smem + Smem::kQuery, consumer * kRowsPerConsumer)", "query(s_smem + Smem::kQuery, 0)"
    ),
    "sm90: masked keys have gradients": Patch(
        SM90_GRAD_QUERY,
        "if (key >= visible[i / 2 % 2]) score[i] = -INFINITY;",
        "if (key >= visible[i / 2 % 2] + 512) score[i] = -INFINITY;",
    ),
    "sm90: no proxy fence before the results leave": Patch(
        WARPGROUP, "  ptx::fence_proxy_async();\n  __syncwarp();\n  if (lane != 0) return;",
        "  __syncwarp();\n  if (lane != 0) return;",
    ),
    "sm90: the results leave before all lanes wrote them": Patch(
        WARPGROUP, "  __syncwarp();\n  if (lane != 0) return;", "  if (lane != 0) return;"
    ),
    "sm90: the block ends with its stores in flight": Patch(
        SM90_GRAD_QUERY, "if (lane_id() == 0) ptx::tma_store_wait_read<0>();", ""
    ),
    "sm90: the results of an item are overwritten on their way out": Patch(
        SM90_GRAD_QUERY, "    if (lane == 0) ptx::tma_store_wait_read<0>();\n    __syncwarp();\n", ""
    ),
    "sm90: other lanes overwrite results on their way out": Patch(
        SM90_OUTPUT, "if (lane == 0) ptx::tma_store_wait_read<0>();\n    __syncwarp();",
        "if (lane == 0) ptx::tma_store_wait_read<0>();",
    ),
    "sm90: the queries of an item are released before they are read": Patch(
        SM90_SCAN, "  uint32_t query[kHeadDim / kWgmmaK][4];\n",
        "  uint32_t query[kHeadDim / kWgmmaK][4];\n  smem.slot.release(item);\n",
    ),
    "sm90: the next item comes while others are at the last": Patch(
        WORK_QUEUE, "ring.wait_free(position.stage, position.parity);", ""
    ),
    "sm90: a consumer does not wait for its next item": Patch(
        SM90_GRAD_QUERY, "slot.kNone; item.advance()) {", "slot.kNone;) {"
    ),
    "sm90: items are left out": Patch(WORK_QUEUE, "atomicAdd(queue.num_taken, 1u)", "atomicAdd(queue.num_taken, 2u)"),
    "sm90: the edge tile of the next item is cleared before it is there": Patch(
        LIVE_KEY_TILES, "position.edge_parity ^= 1;", ""
    ),
    "sm90 keys: the guard does not wait for a stage": Patch(
        SM90_GRAD_KEY_VALUE, "ring.wait(stage, position.parity);", ""
    ),
    "sm90 keys: consumers do not wait for a stage": Patch(
        SM90_GRAD_KEY_VALUE, "ptx::mbarrier_wait(ready(stage), position.parity);",
        "ring.wait(stage, position.parity);",
    ),
    "sm90 keys: a stage is filled again while it is read": Patch(
        SM90_GRAD_KEY_VALUE, "ring.wait_free(stage, position.parity);", ""
    ),
    "sm90 keys: the producer waits for the wrong phase": Patch(RING, "parity ^ 1);", "parity);"),
    "sm90 keys: a warp keeps its stages": Patch(
        SM90_GRAD_KEY_VALUE, "if (lane == 0) ring.release(stage);",
        "if (lane == 0 && warp_row != 16) ring.release(stage);",
    ),
    "sm90 keys: a stage is released while lanes still read it": Patch(
        SM90_GRAD_KEY_VALUE, "__syncwarp();\n      if (lane == 0) ring.release(stage);",
        "if (lane == 0) ring.release(stage);",
    ),
    "sm90 keys: a stage is released before its last product": Patch(
        SM90_GRAD_KEY_VALUE, "ptx::wgmma_wait<0>();", "ptx::wgmma_wait<1>();"
    ),
    "sm90 keys: more bytes announced than come": Patch(
        SM90_GRAD_KEY_VALUE, "ring.announce(stage, Smem::kStageBytes)", "ring.announce(stage, Smem::kStageBytes + 16)"
    ),
    "sm90 keys: accumulators are read in flight": Patch(
        SM90_GRAD_KEY_VALUE, "ptx::wgmma_wait<1>();\n        ptx::wgmma_pin(score);", "ptx::wgmma_pin(score);"
    ),
    "sm90 keys: the keys of the next item come while results leave": Patch(
        SM90_GRAD_KEY_VALUE, "    if (lane == 0) ptx::tma_store_wait_read<0>();\n", ""
    ),
    "sm90 keys: the keys of two items share their place": Patch(
        SM90_GRAD_KEY_VALUE, "slot * Smem::kSlotBytes", "slot / 2 * Smem::kSlotBytes"
    ),
    "sm90 keys: padding is not cleared": Patch(
        SM90_GRAD_KEY_VALUE, "is_bad = !(tau[i] < INFINITY);", "is_bad = std::isnan(tau[i]);"
    ),
    "sm90 keys: rows of NaN are not cleared": Patch(
        SM90_GRAD_KEY_VALUE, "is_bad = !(tau[i] < INFINITY);", "is_bad = tau[i] == INFINITY;"
    ),
    "sm90 keys: padding has a delta": Patch(
        SM90_GRAD_KEY_VALUE, "is_padding ? 0.0f : params.pass.delta", "params.pass.delta"
    ),
    "sm90 keys: cleared rows without a proxy fence": Patch(SM90_GRAD_KEY_VALUE, "ptx::fence_proxy_async();", ""),
    "sm90 keys: the guard goes ahead of its lanes": Patch(
        SM90_GRAD_KEY_VALUE, "__syncwarp();\n        if (lane_id() == 0) ptx::mbarrier_arrive(ready(stage));",
        "if (lane_id() == 0) ptx::mbarrier_arrive(ready(stage));",
    ),
    "sm90 keys: keys that take no part keep a gradient": Patch(
        SM90_GRAD_KEY_VALUE, "(lane, i / 2 % 2) < key_end;", "(lane, i / 2 % 2) < key_end + 128;"
    ),
    "sm90 keys: the other consumer's blocks": Patch(
        SM90_GRAD_KEY_VALUE, "block.head_live >> kConsumer & 1", "block.head_live >> (1 - kConsumer) & 1"
    ),
    "sm90 keys: the first of a group's heads alone": Patch(
        SM90_GRAD_KEY_VALUE, "head < block.first_head + block.group_size; ++head", "head < block.first_head + 1; ++head"
    ),
    "sm90: votes are counted before all are cast": Patch(
        SM90_REFINE, "ptx::mbarrier_wait(s_smem + Smem::kVoted, pass % 2);", ""
    ),
    "sm90: a warp votes for itself alone": Patch(
        SM90_REFINE, "s_votes(pass)[consumer * kWarpgroupWarps + warp] = is_rough", "s_votes(pass)[warp] = is_rough"
    ),
    "sm90: rows past the end of the queries are refined": Patch(
        SM90_REFINE, "row < range.num_queries) params.tau", "row < range.num_queries + 64) params.tau"
    ),
    "sm90: one half of a tile is added up for the other": Patch(
        SM90_SCAN, "add<kMaskKeys, Config::kBlockN>(sums", "add<0, kMaskKeys>(sums"
    ),
    "sm90: the scan does not wait for its tile": Patch(SM90_SCAN, "smem.ring.wait(at.stage, at.parity);", ""),
    "sm90: the refinement does not wait for its queries": Patch(
        SM90_REFINE, "ptx::mbarrier_wait(s_smem + Smem::kQueryFull, 0);", ""
    ),
    "sm90: cleared keys without a proxy fence": Patch(LIVE_KEY_TILES, "ptx::fence_proxy_async();", ""),
}  # fmt: skip

BUGS_AT_128 = {  # of head dim 128, where rows stay in shared memory
    "sm90: the rows of an item are released before they are read again": Patch(
        SM90_GRAD_QUERY,
        "constexpr bool kRowsInRegisters = Config::kQueryInRegisters && Config::kGradOutInRegisters;",
        "constexpr bool kRowsInRegisters = true;",
    ),
}


# Legal: rings that come round within the few tiles of the problem below, slabs of several pairs each. The kernels for
# other alphas are left out, which two thirds of the compiler's time go to.
ALPHA_ONE_AND_HALF_ALONE = Patch(
    "csrc/cuda/launch_pass.cuh",
    """\
    case AlphaKind::kTwo:
      return launch(std::integral_constant<AlphaKind, AlphaKind::kTwo>{});
    case AlphaKind::kGeneral:
      return launch(std::integral_constant<AlphaKind, AlphaKind::kGeneral>{});
""",
    "    default: return;\n",
)
LEGAL = {
    "sm80": (ALPHA_ONE_AND_HALF_ALONE, Patch(PASS_PARAMS, "kEnoughBlocks = 1024;", "kEnoughBlocks = 4;")),
    "sm90": (
        ALPHA_ONE_AND_HALF_ALONE,
        Patch("csrc/cuda/sm90/config.h", "kKeyStages = kHeadDim <= 64 ? 8 : 4;", "kKeyStages = 2;"),
    ),
}


# 60% of the compiler's time of -O2, and the same verdict on every bug.
QUICK_TO_COMPILE = ("-Og",)


def verdict(patches: tuple[Patch, ...], path: str, monkeypatch: pytest.MonkeyPatch, head_dim: int = 64) -> str:
    """What is wrong, in words; empty where nothing is. One problem that has an edge of every kind."""
    monkeypatch.setattr(library, "path", path)
    flags = (f"-DONE_INSTANCE_HEAD_DIM={head_dim}", *QUICK_TO_COMPILE)
    build = library.build(library.ONE_INSTANCE[path], patches=patches, flags=flags)
    query, key, value, grad_out = cases.inputs("rising", Shape(1, 2, 150, 270, head_dim, kv_heads=1), torch.bfloat16)
    query, key = query + torch.randn_like(query), key + 0.5 * torch.randn_like(key)
    leaves = [t.double().requires_grad_() for t in (query, key, value)]
    out, aux = reference.entmax_attention(*leaves, is_causal=True, enable_gqa=True, return_aux=True)
    oracle = torch.autograd.grad(out, leaves, grad_out.double())
    for seed in SEEDS:
        try:
            run = library.forward(build, query, key, value, is_causal=True, seed=seed)
            grads = library.backward(build, run, grad_out, seed=seed)
        except Diagnosis as diagnosis:
            return str(diagnosis)
        if not (run.tau_lower <= aux.tau + 1e-5).all():
            return "tau_lower is above tau"
        if not (run.scan_mask | ~run.block_mask).all():
            return "the block mask has tiles that the scan's has not"
        if not ((run.tau - aux.tau).abs() <= 1e-5).all():
            return "tau is wrong"
        for name, ours, exact in (("out", run.out, out), *zip(
            ("query", "key", "value"), (grads.query, grads.key, grads.value), oracle, strict=True
        )):  # fmt: skip
            if not (ours.double() - exact).norm() <= 0.02 * exact.norm():
                return f"{name} is wrong"
    return verdict_on_jump(build, head_dim) or verdict_on_nan(build, head_dim) or verdict_on_mask(build)


def verdict_on_jump(build: emulator.Library | library.GpuLibrary, head_dim: int) -> str:
    """One key is the support of every row; the scan meets it while its lists hold keys 4.1 to 5.1 below, which must not
    pass for keys a full turn of their codes (128 bins, 4.13) above."""
    query, key = torch.zeros(1, 1, 40, head_dim), torch.zeros(1, 1, 128, head_dim)
    query[..., 0] = 16.0
    key[..., 0] = torch.rand(128) - 0.5  # z itself
    key[:, :, 100, 0] = 4.625
    run = library.forward(build, *(t.bfloat16() for t in (query, key, key)), scale=0.125)
    return "" if (run.tau_lower <= 3.625).all() else "tau_lower is above tau after a jump"


def verdict_on_nan(build: emulator.Library | library.GpuLibrary, head_dim: int) -> str:
    """What lies past the lengths of sequences is NaN, and so is a query: neither reaches the gradients of keys."""
    lengths = [40, 100]
    tensors = cases.inputs("gaussian", Shape(2, 1, 130, 130, head_dim), torch.bfloat16)
    *inputs, grad_out = tensors
    for tensor in tensors:
        for batch, length in enumerate(lengths):
            tensor[batch, :, length:] = torch.nan
    inputs[0][1, 0, 70] = torch.nan
    try:
        run = library.forward(build, *inputs, key_lengths=torch.tensor(lengths))
        grads = library.backward(build, run, grad_out)
    except Diagnosis as diagnosis:
        return str(diagnosis)
    if not all(t.isfinite().all() for t in (grads.key, grads.value)):
        return "NaN reaches keys"
    return ""


def verdict_on_mask(build: emulator.Library | library.GpuLibrary) -> str:
    """The gradient of a mask that rows, heads and sequences share, for a row that is added up by several slabs."""
    if library.path != "sm80":
        return ""  # has no masks
    *inputs, grad_out = cases.inputs("gaussian", Shape(2, 2, 150, 100), torch.bfloat16)
    mask = torch.randn(1, 1, 1, 100).bfloat16()
    exact_mask = mask.double().requires_grad_()
    out = reference.entmax_attention(*(t.double() for t in inputs), attn_mask=exact_mask)
    (exact,) = torch.autograd.grad(out, exact_mask, grad_out.double())
    try:
        run = library.forward(build, *inputs, attn_mask=mask)
        ours = library.backward(build, run, grad_out, wanted=("attn_mask",)).attn_mask
    except Diagnosis as diagnosis:
        return str(diagnosis)
    return "" if (ours - exact).norm() <= 0.02 * exact.norm() else "the gradient of attn_mask is wrong"


@pytest.mark.parametrize("path, head_dim", [("sm80", 64), ("sm90", 64), ("sm90", 128)])
def test_without_a_bug_nothing_is_wrong(path, head_dim, monkeypatch):
    assert verdict(LEGAL[path], path, monkeypatch, head_dim) == ""


@pytest.mark.parametrize("bug", BUGS)
def test_bug_shows(bug, monkeypatch):
    path = "sm90" if "/sm90/" in BUGS[bug].file else "sm80"
    assert verdict((*LEGAL[path], BUGS[bug]), path, monkeypatch) != ""


@pytest.mark.parametrize("bug", BUGS_AT_128)
def test_bug_at_head_dim_128_shows(bug, monkeypatch):
    assert verdict((*LEGAL["sm90"], BUGS_AT_128[bug]), "sm90", monkeypatch, 128) != ""
