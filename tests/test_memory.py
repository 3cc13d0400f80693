"""Memory: it grows with N, not with N^2 (a long sequence, in a process of its own), and it is used again."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys

import pytest
import torch

import adasplash2

LIMIT_MB = 600  # N x N scores in float32 would be 4096 MB a head

SCRIPT = """
import json, resource, sys, torch, adasplash2

def peak_mb():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

q_scale, num_heads, num_rows, is_causal = json.loads(sys.argv[1])

def step(num_rows):
    shape = (1, num_heads, num_rows, 64)
    query, key, value = (torch.randn(shape) for _ in range(3))
    query.mul_(q_scale)
    grad_out = torch.randn(shape)
    tensors = [t.requires_grad_() for t in (query, key, value)]
    before = peak_mb()
    out, aux = adasplash2.entmax_attention(query, key, value, is_causal=is_causal, return_aux=True)
    out.backward(grad_out)
    results = [out, *aux, *(t.grad for t in tensors)]
    mean_support = aux.support_size.float().mean().item()
    return before, sum(t.nbytes for t in results) / 2**20, mean_support

step(200)  # everything that is loaded or allocated once
before, results_mb, mean_support = step(num_rows)
print(json.dumps({"above_mb": peak_mb() - before - results_mb, "mean_support": mean_support}))
"""


def measure(q_scale: float, num_heads: int, num_rows: int, is_causal: bool) -> dict[str, float]:
    arguments = json.dumps([q_scale, num_heads, num_rows, is_causal])
    done = subprocess.run([sys.executable, "-c", SCRIPT, arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("q_scale", "num_heads", "num_rows", "is_causal", "supports"),
    [
        (3.0, 2, 32768, False, (2, 60)),  # small supports
        (0.5, 1, 32768, True, (60, 2000)),  # hundreds of keys
        (0.05, 1, 16384, True, (2000, 16384)),  # thousands: nearly dense, so half as long to bound the time
    ],
    ids=["sparse", "hundreds_of_keys", "dense"],
)
def test_peak_memory(q_scale, num_heads, num_rows, is_causal, supports):
    result = measure(q_scale, num_heads, num_rows, is_causal)
    low, high = supports
    assert low <= result["mean_support"] <= high, result
    assert result["above_mb"] < LIMIT_MB, result


def small_inputs(q_scale: float) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 1024, 64, generator=generator) for _ in range(3))
    return [tensor.requires_grad_() for tensor in (query * q_scale, key, value)]


def training_step(q_scale: float) -> tuple[torch.Tensor, ...]:
    """The gradients."""
    inputs = small_inputs(q_scale)
    out = adasplash2.entmax_attention(*inputs)
    return torch.autograd.grad(out, inputs, torch.ones_like(out))


@pytest.mark.parametrize("num_threads", [1], indirect=True)  # entries lie in the order in which blocks are done
def test_memory_of_an_earlier_call_does_not_show(num_threads):
    """The saved support lies where another one was: the same bytes as the first time, zeros behind the entries."""

    def support(q_scale: float) -> torch.Tensor:
        arguments = (*small_inputs(q_scale), None, None, None, 1.5, 0.125, False, False, True)
        _, _, support_size, _, support = torch.ops.adasplash2.attention_forward(*arguments)
        assert support_size.float().mean() < 300  # in lists, which are saved
        return support

    expected, address = support(3.0).clone(), support(3.0).data_ptr()
    assert support(0.7).count_nonzero() > 2 * expected.count_nonzero()
    training_step(0.7)
    training_step(3.0)  # behind whose entries those of the step before stay
    again = support(3.0)
    assert again.data_ptr() == address, "the memory is new, so this test shows nothing"
    assert torch.equal(again, expected)


def test_supports_of_earlier_steps_do_not_show():
    expected = {q_scale: training_step(q_scale) for q_scale in (3.0, 0.7)}
    for q_scale in (0.7, 3.0, 3.0, 0.7):
        assert all(map(torch.equal, training_step(q_scale), expected[q_scale]))


def test_results_take_turns_in_the_same_memory():
    x = torch.randn(1024, 1024)  # 4 MB
    first = adasplash2.entmax15(x)
    address, expected = first.data_ptr(), first.clone()
    second = adasplash2.sparsemax(x)
    assert second.data_ptr() != address
    assert torch.equal(first, expected)
    del first
    third = adasplash2.entmax15(x)
    assert third.data_ptr() == address
    assert torch.equal(third, expected)


@pytest.mark.parametrize("num_mb", [1, 2, 3, 4, 17])
def test_results_are_tensors_as_any_other(num_mb):
    """Also those whose memory is kept for the next one: from 2 MB on, if their pages are full."""
    x = torch.randn(num_mb, 512, 512)
    result = adasplash2.entmax15(x)
    expected = result.clone()
    is_kept = result.data_ptr() % (2 << 20) == 0
    assert is_kept or num_mb in (1, 3)
    for other in (copy.deepcopy(result), pickle.loads(pickle.dumps(result)), result.resize_(2 * num_mb, 512, 512)):
        assert torch.equal(other[:num_mb], expected)
    assert torch.equal(torch.from_numpy(result.resize_(x.shape).numpy()), expected)
    assert torch.equal(result.share_memory_(), expected)


def test_results_of_attention_are_kept():
    query, key, value = (torch.randn(1, 8, 1024, 64, requires_grad=True) for _ in range(3))  # 2 MB
    out = adasplash2.entmax_attention(query, key, value)
    results = (out, *torch.autograd.grad(out, (query, key, value), torch.randn_like(out)))
    assert len({result.data_ptr() for result in results}) == 4
    assert all(result.data_ptr() % (2 << 20) == 0 for result in results)
