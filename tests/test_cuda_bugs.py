"""Bugs seeded into the kernels' source, each of which the tests above must show: they can fail."""

from __future__ import annotations

import cases
import pytest
import torch
from cases import Shape
from kernels import library
from simt.emulator import SEEDS, Diagnosis, Patch

from adasplash2 import reference

pytestmark = pytest.mark.skipif(library.has_gpu(), reason="seeded bugs are for the emulator")

TILE = "csrc/cuda/tile/"
SCAN, OUTPUT = "csrc/cuda/sm80/scan.cuh", "csrc/cuda/sm80/output.cuh"
GRAD_QUERY, GRAD_KEY_VALUE = "csrc/cuda/sm80/grad_query.cuh", "csrc/cuda/sm80/grad_key_value.cuh"
HISTOGRAM, ENTMAX, WORK_RANGE = "csrc/math/histogram.h", "csrc/math/entmax.h", "csrc/math/work_range.h"
REFINEMENT = "csrc/math/refinement.h"

BUGS = {
    "the scan does not wait for its tile": Patch(SCAN, "ptx::cp_async_wait<Config::kStages - 2>();", ""),
    "no barrier before a stage is filled again": Patch(
        SCAN,
        "    ptx::cp_async_wait<Config::kStages - 2>();\n    __syncthreads();",
        "    ptx::cp_async_wait<Config::kStages - 2>();",
    ),
    "the queries are overwritten while others read them": Patch(
        SCAN, "query[i].load(s_key, warp * Config::kRowsPerWarp + i * kMmaM);\n  __syncthreads();",
        "query[i].load(s_key, warp * Config::kRowsPerWarp + i * kMmaM);",
    ),
    "hits counted without an atomic": Patch(SCAN, "atomicAdd(s_bin, 1u);", "*s_bin += 1u;"),
    "stale slots are not cleared": Patch(
        SCAN, "s_bin[word] = 0;", "s_bin[word] += 0;"
    ),
    "no warp barrier between clearing and counting": Patch(
        SCAN, "raise_threshold_to_window(r, batch_max);\n      }\n    }\n    __syncwarp();",
        "raise_threshold_to_window(r, batch_max);\n      }\n    }",
    ),
    "lists overflow": Patch(
        SCAN, "(Config::kHitsPerList - Config::kScoresPerGroup) * kListStride", "Config::kHitsPerList * kListStride"
    ),
    "masked keys are scanned": Patch(
        SCAN, "if (col >= visible[2 * i + e / 2])", "if (col >= visible[2 * i + e / 2] + 512)"
    ),
    "the diagonal is off by one": Patch(WORK_RANGE, "row + num_keys - num_queries + 1", "row + num_keys - num_queries"),
    "tau_lower is not a lower bound": Patch(
        HISTOGRAM, "float position = smaller_root(", "float position = 0.4f + smaller_root("
    ),
    "a dead tile for a live one": Patch(SCAN, "decode_excess(*excess_at(i, tile)) >= rise", "rise < 0.0f"),
    "no swizzle on the way out": Patch(TILE + "fragment.cuh", "2 * k + lane / 8 % 2", "(2 * k + lane / 8 % 2) ^ 1"),
    "rows past the end are written": Patch(
        TILE + "fragment.cuh", "if (row >= num_rows) continue;", "if (row >= num_rows + 64) continue;"
    ),
    "the last step is left out": Patch(
        REFINEMENT, "fold.step = entmax.last_step(sums);", "fold.step = 0.0f;"
    ),
    "a value tile is read in flight": Patch(
        OUTPUT,
        "ptx::cp_async_wait<0>();\n      __syncthreads();\n      if (next_tile",
        "__syncthreads();\n      if (next_tile",
    ),
    "the mask loses a word": Patch(OUTPUT, "finish_words_before(mask_shape.key_words());", ""),
    "delta has the wrong sign": Patch(
        GRAD_QUERY, "(grad_score[n][e] - delta[e / 2])", "(grad_score[n][e] + delta[e / 2])"
    ),
    "tau of the wrong stage": Patch(
        GRAD_KEY_VALUE, "s_stats + stage * Config::kBlockM;", "s_stats + (stage ^ 1) * Config::kBlockM;"
    ),
    "keys of the next head are not added": Patch(
        GRAD_KEY_VALUE, "head_words, kv_head * group_size, group_size,", "head_words, kv_head * group_size, 1,"
    ),
}  # fmt: skip


def verdict(patches: tuple[Patch, ...]) -> str:
    """What is wrong, in words; empty where nothing is. One problem that has an edge of every kind."""
    build = library.build(library.ONE_INSTANCE, patches=patches)
    query, key, value, grad_out = cases.inputs("rising", Shape(1, 2, 150, 270, kv_heads=1), torch.bfloat16)
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
    return ""


def test_without_a_bug_nothing_is_wrong():
    assert verdict(()) == ""


@pytest.mark.parametrize("bug", BUGS)
def test_bug_shows(bug):
    assert verdict((BUGS[bug],)) != ""
