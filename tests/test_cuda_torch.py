"""CUDA tensors through the public function: routing, memory layouts, torch.compile, graphs, and what is not built.

The kernels themselves are tested by test_cuda_attention.py and test_cuda_scan.py; here their way through torch.
"""

from __future__ import annotations

import math
import subprocess
import sys

import cases
import pytest
import torch
from cases import Shape
from tolerance import check

import adasplash2
from adasplash2 import _C, reference

BF16, FP16 = torch.bfloat16, torch.float16

on_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and _C.has_cuda),
    reason="torch finds no GPU here" if _C.has_cuda else f"no CUDA kernels: {_C.cuda_missing}",
)


def attention(query, key, value, **options):
    """entmax_attention on the GPU for tensors of the CPU, so that oracle and tolerance stay where they are."""
    options = {name: t.cuda() if isinstance(t, torch.Tensor) else t for name, t in options.items()}
    result = adasplash2.entmax_attention(query.cuda(), key.cuda(), value.cuda(), **options)
    if not options.get("return_aux"):
        return result.cpu()
    out, aux = result
    return out.cpu(), adasplash2.AttentionAux(*(t.cpu() for t in aux))


def gpu_inputs(shape: Shape, dtype: torch.dtype = BF16, name: str = "gaussian") -> list[torch.Tensor]:
    """query, key and value that require grad, and the gradient of out."""
    query, key, value, grad_out = (t.cuda() for t in cases.inputs(name, shape, dtype))
    return [*(t.requires_grad_() for t in (query, key, value)), grad_out]


def forward_and_grads(function, *tensors):
    *leaves, grad_out = tensors
    out = function(*leaves)
    return [out, *torch.autograd.grad(out, leaves, grad_out)]


CALLS = ["bfloat16", "float32", "attn_mask", "alpha", "key_lengths", "return_aux", "entmax", "entmax by alpha"]


def call_of(kind: str, name: str = "gaussian", device: str = "cuda"):
    """A function of its leaves, these and the gradient of out: attention with an option, or the activation."""
    if kind.startswith("entmax"):
        leaves = [torch.randn(40, 300), torch.rand(40, 1) * 0.8 + 1.1][: 1 + ("alpha" in kind)]
        *leaves, grad_out = (t.to(device) for t in (*leaves, torch.randn(40, 300)))
        return adasplash2.entmax, [t.requires_grad_() for t in leaves], grad_out
    dtype = torch.float32 if kind == "float32" else BF16
    *leaves, grad_out = (t.to(device) for t in cases.inputs(name, Shape(1, 2, 300, 300), dtype))
    if kind == "attn_mask":
        leaves.append(torch.randn(300, 300).to(device, dtype))
    elif kind == "alpha":
        leaves.append(torch.tensor([1.3, 1.8], device=device))
    fixed = {"key_lengths": torch.tensor([200], device=device)} if kind == "key_lengths" else {}

    def function(query, key, value, *option):
        options = dict(zip((kind,), option, strict=False)) | fixed
        out = adasplash2.entmax_attention(query, key, value, **options, return_aux=kind == "return_aux")
        return out[0] if kind == "return_aux" else out

    return function, [t.requires_grad_() for t in leaves], grad_out


# ---------------------------------------------------------------------------------------------- with or without a GPU


def test_a_build_says_what_it_has():
    """In a process of its own: the extension with the CUDA kernels must load where no driver is."""
    report = subprocess.run([sys.executable, "-m", "adasplash2"], capture_output=True, text=True, check=True).stdout
    assert _C.has_cuda == (_C.cuda_missing == "")
    cuda_line = next(line for line in report.splitlines() if line.startswith("cuda"))
    if not _C.has_cuda:
        assert _C.cuda_missing in cuda_line
    elif torch.cuda.is_available():
        assert torch.cuda.get_device_name() in cuda_line
    else:
        assert "finds no GPU" in cuda_line


def test_cuda_kernels_are_registered_in_every_build():
    for name in ("attention", "attention_forward", "attention_backward", "entmax_forward", "entmax_backward"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"adasplash2::{name}", "CUDA")


# ---------------------------------------------------------------------------------------------- numbers


@on_gpu
@pytest.mark.parametrize("dtype", [BF16, FP16])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_queries, num_keys", [(1, 130), (200, 200), (65, 257), (257, 65), (1025, 1025)])
def test_lengths(num_queries, num_keys, is_causal, dtype):
    tensors = cases.inputs("gaussian", Shape(2, 2, num_queries, num_keys), dtype)
    check(attention, *(t.requires_grad_() for t in tensors[:3]), tensors[3], is_causal=is_causal)


@on_gpu
@pytest.mark.parametrize("name", ["sparse", "dense", "block_structured", "mixed_rows", "outlier_channel"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_named_inputs(name, head_dim):
    tensors = cases.inputs(name, Shape(1, 2, 515, 700, head_dim), BF16)
    check(attention, *(t.requires_grad_() for t in tensors[:3]), tensors[3])


@on_gpu
@pytest.mark.parametrize("name", ["gaussian", "sparse", "dense", "border", "huge_scores"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_float32(name, head_dim):
    tensors = cases.inputs(name, Shape(1, 2, 257, 300, head_dim), torch.float32)
    check(attention, *(t.requires_grad_() for t in tensors[:3]), tensors[3], is_causal=name == "dense")


@on_gpu
@pytest.mark.parametrize("head_dim, value_head_dim", [(1, 59), (8, 8), (40, 97), (59, 64), (96, 128), (256, 200)])
def test_head_dims(head_dim, value_head_dim):
    """Those that are no multiple of 8 are padded by the binding, the others by the kernels."""
    tensors = cases.inputs("gaussian", Shape(1, 2, 130, 200, head_dim, value_head_dim=value_head_dim), BF16)
    check(attention, *(t.requires_grad_() for t in tensors[:3]), tensors[3])


@on_gpu
@pytest.mark.parametrize("alpha", [2.0, 1.25, torch.tensor([1.2, 1.5, 2.0, 1.7])])
def test_alphas(alpha):
    tensors = cases.inputs("gaussian", Shape(2, 4, 130, 200), BF16)
    check(attention, *(t.requires_grad_() for t in tensors[:3]), tensors[3], alpha=alpha)


@on_gpu
@pytest.mark.parametrize("alphas", [1.4, [1.5, 1.2, 1.9, 1.6]])
def test_gradient_of_alpha(alphas):
    tensors = cases.inputs("gaussian", Shape(2, 4, 130, 200), BF16)
    alpha = torch.tensor(alphas, requires_grad=True)
    check(attention, *(t.requires_grad_() for t in tensors[:3]), tensors[3], alpha=alpha)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.bool, BF16])
@pytest.mark.parametrize("mask_shape", [(2, 4, 130, 200), (130, 200), (2, 1, 1, 200), (4, 130, 1)])
def test_attn_mask(mask_shape, dtype):
    tensors = cases.inputs("gaussian", Shape(2, 4, 130, 200), BF16)
    mask = torch.rand(mask_shape) < 0.7 if dtype == torch.bool else torch.randn(mask_shape).to(BF16)
    check(attention, *(t.requires_grad_() for t in tensors[:3]), tensors[3], attn_mask=mask)


@on_gpu
@pytest.mark.parametrize("mask_shape", [(2, 4, 130, 200), (130, 200), (2, 1, 1, 200), (4, 130, 1)])
@pytest.mark.parametrize("layout", ["slice", "transposed"])
def test_gradient_of_attn_mask(mask_shape, layout):
    tensors = cases.inputs("gaussian", Shape(2, 4, 130, 200), BF16)
    mask = cases.poisoned(torch.randn(mask_shape).to(BF16), layout).requires_grad_()
    check(attention, *(t.requires_grad_() for t in tensors[:3]), tensors[3], attn_mask=mask)


@on_gpu
@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales(scale):
    tensors = cases.inputs("gaussian", Shape(2, 2, 130, 200), BF16)
    check(attention, *(t.requires_grad_() for t in tensors[:3]), tensors[3], scale=scale, is_causal=True)


@on_gpu
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_heads(kv_heads):
    tensors = cases.inputs("gaussian", Shape(2, 8, 130, 200, kv_heads=kv_heads), BF16)
    check(attention, *(t.requires_grad_() for t in tensors[:3]), tensors[3], enable_gqa=True, is_causal=True)


@on_gpu
@pytest.mark.parametrize("layout", ["slice", "transposed", "strided"])
def test_layouts_that_the_kernels_cannot_read(layout):
    """Views that start anywhere and have gaps, or a strided last dimension: copied, not refused, and not misread."""
    tensors = cases.inputs("gaussian", Shape(2, 2, 70, 90), BF16)
    plain = [t.cuda().requires_grad_() for t in tensors[:3]]
    views = [cases.poisoned(t.cuda(), layout).requires_grad_() for t in tensors[:3]]
    grad_out = tensors[3].cuda()
    expected = forward_and_grads(adasplash2.entmax_attention, *plain, grad_out)
    for ours, same in zip(
        forward_and_grads(adasplash2.entmax_attention, *views, cases.poisoned(grad_out, layout)), expected, strict=True
    ):
        assert torch.equal(ours, same)


@on_gpu
def test_expanded_tensors():
    """One head of keys for all, and a gradient of out that is one number."""
    query, key, value, _ = gpu_inputs(Shape(2, 4, 70, 90, kv_heads=1))
    key, value = key.expand(-1, 4, -1, -1), value.expand(-1, 4, -1, -1)
    out = adasplash2.entmax_attention(query, key, value)
    assert torch.equal(out, adasplash2.entmax_attention(query, key.contiguous(), value.contiguous()))
    ours = torch.autograd.grad(out.sum(), query, retain_graph=True)[0]
    assert torch.equal(ours, torch.autograd.grad(out, query, torch.ones_like(out))[0])


@on_gpu
@pytest.mark.parametrize("num_queries, num_keys", [(0, 70), (70, 0)])
def test_empty(num_queries, num_keys):
    query, key, value, grad_out = gpu_inputs(Shape(1, 2, num_queries, num_keys))
    out, *grads = forward_and_grads(adasplash2.entmax_attention, query, key, value, grad_out)
    assert out.shape == (1, 2, num_queries, 64)
    assert not out.any() and not any(grad.any() for grad in grads)


# ---------------------------------------------------------------------------------------------- what aux tells


@on_gpu
@pytest.mark.parametrize("lengths", [None, torch.tensor([0, 1, 64, 200, 300])])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("num_queries", [300, 130])
def test_aux(num_queries, is_causal, lengths):
    query, key, value, _ = cases.inputs("block_structured", Shape(5, 2, num_queries, 300), BF16)
    _, ours = attention(query, key, value, is_causal=is_causal, key_lengths=lengths, return_aux=True)
    _, aux = reference.entmax_attention(
        query.double(), key.double(), value.double(), is_causal=is_causal, key_lengths=lengths, return_aux=True
    )
    torch.testing.assert_close(ours.live_tile_fraction, aux.live_tile_fraction.float(), rtol=0.05, atol=0.02)
    assert torch.equal(ours.tau.isinf(), aux.tau.isinf())
    assert (ours.support_size - aux.support_size).abs().max() <= 2


@on_gpu
@pytest.mark.parametrize("lengths", [None, torch.tensor([0, 1, 64, 200, 300])])
@pytest.mark.parametrize("masking", ["none", "causal", "bool", "keys", "float"])
@pytest.mark.parametrize("num_queries", [300, 130, 1000])
def test_unmasked_tiles(num_queries, masking, lengths):
    """Bit 0 of the block mask, against the mask itself reduced over tiles."""
    is_causal, attn_mask = masking == "causal", None
    if masking in ("bool", "float"):
        attn_mask = torch.rand(1, 1, num_queries, 300) < 2e-4
    elif masking == "keys":
        attn_mask = torch.rand(5, 1, 1, 300) < 0.01
    if masking == "float":
        attn_mask = torch.zeros(attn_mask.shape, dtype=BF16).masked_fill(~attn_mask, -torch.inf)
    batch, num_keys = 5, 300
    query, key, value, _ = (t.cuda() for t in cases.inputs("gaussian", Shape(batch, 1, num_queries, num_keys), BF16))
    *_, block_mask = torch.ops.adasplash2.attention(
        query, key, value, None if attn_mask is None else attn_mask.cuda(),
        None if lengths is None else lengths.cuda(), None, 1.5, 0.125, is_causal, True,
    )  # fmt: skip
    seen = torch.ones(batch, 1, num_queries, num_keys, dtype=torch.bool)
    if is_causal:
        seen = seen.tril(num_keys - num_queries)
    if attn_mask is not None:
        seen = seen & (attn_mask if attn_mask.dtype == torch.bool else attn_mask == 0)
    if lengths is not None:
        seen = seen & (torch.arange(num_keys) < lengths[:, None, None, None])
        if num_queries == num_keys:
            seen = seen & (torch.arange(num_queries)[:, None] < lengths[:, None, None, None])
    padded = torch.nn.functional.pad(seen, (0, -num_keys % 64, 0, -num_queries % 64))
    expected = padded.unflatten(3, (-1, 64)).unflatten(2, (-1, 64)).any(5).any(3)
    assert torch.equal((block_mask.cpu() & 1).bool(), expected)
    assert not (block_mask.cpu() >> 1).bool()[~expected].any(), "a live tile without an unmasked pair"


# ---------------------------------------------------------------------------------------------- torch's machinery


@on_gpu
@pytest.mark.parametrize("want_aux", [False, True])
@pytest.mark.parametrize("want_support", [False, True])
@pytest.mark.parametrize("value_head_dim", [64, 59])
def test_opcheck(want_aux, want_support, value_head_dim):
    query, key, value, grad_out = (t.detach() for t in gpu_inputs(Shape(2, 2, 65, 97, value_head_dim=value_head_dim)))
    inputs = (query, key, value, None, None, None)
    numbers = (1.5, 0.125, True)
    forward = (*inputs, *numbers, want_aux, want_support)
    torch.library.opcheck(torch.ops.adasplash2.attention_forward.default, forward)
    if want_support:
        _, tau, support_size, _, support = torch.ops.adasplash2.attention_forward(*forward)
        backward = (grad_out, *inputs, tau, support_size, support, *numbers, [True, True, True, False, False])
        torch.library.opcheck(torch.ops.adasplash2.attention_backward.default, backward)


@on_gpu
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(backend, dynamic):
    torch._dynamo.reset()

    def function(query, key, value):
        return adasplash2.entmax_attention(query, key, value, is_causal=True)

    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)
    for length in (130, 200):
        tensors = gpu_inputs(Shape(1, 2, length, length))
        for ours, eager in zip(
            forward_and_grads(compiled, *tensors), forward_and_grads(function, *tensors), strict=True
        ):
            assert torch.equal(ours, eager)


@on_gpu
@pytest.mark.parametrize("kind", CALLS)
def test_graph_capture(kind):
    """Forward and backward replayed on new numbers in the old places: nothing is allocated, decided or waited for."""
    function, static, static_grad = call_of(kind)

    def step():
        return forward_and_grads(function, *static, static_grad)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for name in ("sparse", "dense"):
        _, fresh, fresh_grad = call_of(kind, name)
        with torch.no_grad():
            for old, new in zip((*static, static_grad), (*fresh, fresh_grad), strict=True):
                old.copy_(new)
        graph.replay()
        for ours, eager in zip(captured, forward_and_grads(function, *fresh, fresh_grad), strict=True):
            assert torch.equal(ours, eager)


@on_gpu
@pytest.mark.parametrize("kind", CALLS)
def test_no_synchronisation(kind):
    function, leaves, grad_out = call_of(kind)
    torch.cuda.set_sync_debug_mode("error")
    try:
        forward_and_grads(function, *leaves, grad_out)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="a second GPU is not here")
@pytest.mark.parametrize("kind", CALLS)
def test_other_device(kind):
    """Tensors of the second GPU while the first one is current: the same bits, there; the first one stays current."""
    results = []
    for device in ("cuda:0", "cuda:1"):
        torch.manual_seed(0)
        function, leaves, grad_out = call_of(kind, device=device)
        with torch.cuda.device(0):
            results.append(forward_and_grads(function, *leaves, grad_out))
            assert torch.cuda.current_device() == 0
        assert all(tensor.device == torch.device(device) for tensor in results[-1])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first.cpu(), second.cpu())


@on_gpu
def test_current_stream():
    """Queued behind work on a stream that is not the default one: the inputs are written there, late."""
    tensors = gpu_inputs(Shape(1, 2, 300, 300))
    expected = forward_and_grads(adasplash2.entmax_attention, *tensors)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # cycles
        late = [(t.detach() * 1.0).requires_grad_(t.requires_grad) for t in tensors]
        results = forward_and_grads(adasplash2.entmax_attention, *late)
    stream.synchronize()
    for ours, same in zip(results, expected, strict=True):
        assert torch.equal(ours, same)


@on_gpu
def test_same_bits_every_time():
    tensors = gpu_inputs(Shape(2, 4, 1025, 1025))
    first = forward_and_grads(adasplash2.entmax_attention, *tensors)
    for _ in range(10):
        for ours, same in zip(forward_and_grads(adasplash2.entmax_attention, *tensors), first, strict=True):
            assert torch.equal(ours, same)


@on_gpu
def test_autocast():
    query, key, value, grad_out = gpu_inputs(Shape(1, 2, 70, 90), torch.float32)
    with torch.autocast("cuda", BF16):
        out = adasplash2.entmax_attention(query, key, value)
    assert out.dtype == BF16
    assert torch.equal(out, adasplash2.entmax_attention(query.bfloat16(), key.bfloat16(), value.bfloat16()))
    assert torch.autograd.grad(out, query, grad_out.bfloat16())[0].dtype == torch.float32


@on_gpu
def test_wanted_gradients_only():
    query, key, value, grad_out = gpu_inputs(Shape(1, 2, 70, 90))
    _, *expected = forward_and_grads(adasplash2.entmax_attention, query, key, value, grad_out)
    for index in range(3):
        leaves = [t.detach() for t in (query, key, value)]
        leaves[index].requires_grad_()
        adasplash2.entmax_attention(*leaves).backward(grad_out)
        assert torch.equal(leaves[index].grad, expected[index])


# ---------------------------------------------------------------------------------------------- entmax


@on_gpu
@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_entmax_of_every_layout(dtype, dim):
    """Against the CPU kernels, which test_entmax.py holds to the oracle."""
    base = torch.randn(5, 130, 33, dtype=torch.float64).to(dtype) * 2
    for x in (
        base,
        base.mT,
        base.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        base[:, ::2],
        base[:1].expand(3, -1, -1),
    ):
        here, there = (t.detach().requires_grad_() for t in (x, x.cuda()))
        for alpha in (1.5, 2.0, 1.3):
            ours, expected = adasplash2.entmax(there, alpha, dim), adasplash2.entmax(here, alpha, dim)
            assert ours.stride() == torch.empty_like(there).stride()
            tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 64 * torch.finfo(dtype).eps}
            torch.testing.assert_close(ours.cpu(), expected, **tolerance)


@on_gpu
def test_entmax_gradients():
    x, grad_prob = torch.randn(6, 130, 20), torch.randn(6, 130, 20)
    for alpha in (torch.tensor(1.4), torch.linspace(1.1, 1.9, 6)[:, None, None], torch.full((6, 1, 20), 1.7)):
        grads = []
        for device in ("cpu", "cuda"):
            leaves = [t.detach().to(device).requires_grad_() for t in (x, alpha)]
            prob = adasplash2.entmax(*leaves, 1)
            grads.append(torch.autograd.grad(prob, leaves, grad_prob.to(device)))
        for ours, expected in zip(grads[1], grads[0], strict=True):
            torch.testing.assert_close(ours.cpu(), expected, rtol=1e-4, atol=1e-4)


@on_gpu
def test_entmax_opcheck():
    x, alpha = torch.randn(4, 6, 5, device="cuda"), torch.full((4, 1, 5), 1.4, device="cuda")
    prob = torch.softmax(x, 1)
    ops = torch.ops.adasplash2
    torch.library.opcheck(ops.entmax_forward, (x.requires_grad_(), 1.5, None, -1))
    torch.library.opcheck(ops.entmax_backward, (torch.randn_like(prob), prob, 0.0, alpha, 1, [True, True]))


# ---------------------------------------------------------------------------------------------- what is not built


@on_gpu
def test_float64_is_not_built():
    query, key, value, _ = gpu_inputs(Shape(1, 2, 70, 90), torch.float64)
    with pytest.raises(NotImplementedError, match="float32"):
        adasplash2.entmax_attention(query, key, value)


@on_gpu
def test_wide_heads_are_not_built():
    query, key, value, _ = gpu_inputs(Shape(1, 1, 10, 10, 264))
    with pytest.raises(NotImplementedError, match="256"):
        adasplash2.entmax_attention(query, key, value)


@on_gpu
def test_unknown_path(monkeypatch):
    monkeypatch.setenv("ADASPLASH2_CUDA_PATH", "sm100")
    query, key, value, _ = gpu_inputs(Shape(1, 1, 10, 10))
    with pytest.raises(ValueError, match="the CUDA path must be auto, sm80 or sm90, got sm100"):
        adasplash2.entmax_attention(query, key, value)


@on_gpu
def test_softmax_is_torchs():
    query, key, value, _ = gpu_inputs(Shape(1, 2, 70, 90))
    ours = adasplash2.entmax_attention(query, key, value, alpha=1.0)
    assert torch.equal(ours, torch.nn.functional.scaled_dot_product_attention(query, key, value))
    assert math.isfinite(ours.float().sum().item())
