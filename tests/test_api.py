"""The operation as a citizen of PyTorch: opcheck, compile, autocast, modes, fake tensors, SDPA's conventions."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys

import cases
import pytest
import tolerance
import torch
import torch._inductor.config
from torch.nn.functional import scaled_dot_product_attention

import adasplash2
from adasplash2 import reference

SHAPE = cases.Shape(batch=2, heads=4, kv_heads=2, num_queries=65, num_keys=97, head_dim=40)


def sample(name: str) -> dict[str, object]:
    """Arguments of torch.ops.adasplash2.attention by name."""
    shape = dataclasses.replace(SHAPE, num_keys=600) if name == "long" else SHAPE
    query, key, value, _ = (t.requires_grad_() for t in cases.inputs("sparse", shape))
    plain = {
        "query": query,
        "key": key,
        "value": value,
        "attn_mask": None,
        "key_lengths": None,
        "alpha_heads": None,
        "alpha": 1.5,
        "scale": 0.2,
        "is_causal": False,
        "want_aux": False,
    }
    return (
        plain
        | {
            "plain": {},
            "long": {},
            "causal": {"is_causal": True, "want_aux": True},
            "bool_mask": {"attn_mask": torch.rand(2, 1, 65, 97) < 0.5, "alpha": 2.0},
            "float_mask": {"attn_mask": torch.randn(1, 4, 1, 97, requires_grad=True)},
            "alpha_heads": {"alpha_heads": torch.full((2, 4), 1.3, dtype=torch.float64, requires_grad=True)},
            "key_lengths": {"key_lengths": torch.tensor([97, 30])},
            "bfloat16": {name: t.detach().bfloat16() for name, t in (("query", query), ("key", key), ("value", value))},
            "no_grad": {name: t.detach() for name, t in (("query", query), ("key", key), ("value", value))},
            "empty": {"key": key[:, :, :0].detach(), "value": value[:, :, :0].detach()},
        }[name]
    )


SAMPLES = [
    "plain",
    "long",
    "causal",
    "bool_mask",
    "float_mask",
    "alpha_heads",
    "key_lengths",
    "bfloat16",
    "no_grad",
    "empty",
]


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name):
    torch.library.opcheck(torch.ops.adasplash2.attention.default, tuple(sample(name).values()))


@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("want_support", [False, True])
def test_opcheck_of_the_kernels(name, want_support):
    arguments = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in sample(name).items()}
    forward = (*arguments.values(), want_support)
    torch.library.opcheck(torch.ops.adasplash2.attention_forward.default, forward)
    if not want_support:
        return
    out, tau, support_size, _, support = torch.ops.adasplash2.attention_forward(*forward)
    tensors = [arguments[k] for k in ("query", "key", "value", "attn_mask", "key_lengths", "alpha_heads")]
    numbers = [arguments[k] for k in ("alpha", "scale", "is_causal")]
    wanted = [True, True, True, name == "float_mask", name == "alpha_heads"]
    torch.library.opcheck(
        torch.ops.adasplash2.attention_backward.default,
        (torch.randn_like(out), *tensors, tau, support_size, support, *numbers, wanted),
    )


# ---------------------------------------------------------------------------------------------- torch.compile


def compiled_and_eager(function, *tensors: torch.Tensor) -> None:
    """Outputs and gradients of the compiled function are those of the eager one, bit by bit."""
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    leaves = [t for t in tensors if t.requires_grad]
    out, expected = compiled(*tensors), function(*tensors)
    assert torch.equal(out, expected)
    grad_out = torch.randn_like(out)
    for ours, eager in zip(
        torch.autograd.grad(out, leaves, grad_out), torch.autograd.grad(expected, leaves, grad_out), strict=True
    ):
        assert torch.equal(ours, eager)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic):
    torch._dynamo.reset()

    def block(query, key, value):
        out = adasplash2.entmax_attention(query * 2.0, key, value, is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(2)

    compiled = torch.compile(block, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for num_queries, num_keys in ((65, 97), (33, 130), (7, 7)):
        shape = cases.Shape(2, 4, num_queries, num_keys, 40, kv_heads=2)
        query, key, value, _ = (t.requires_grad_() for t in cases.inputs("gaussian", shape))
        out, expected = compiled(query, key, value), block(query, key, value)
        assert torch.equal(out, expected)
        grad_out = torch.randn_like(out)
        ours = torch.autograd.grad(out, (query, key, value), grad_out)
        eager = torch.autograd.grad(expected, (query, key, value), grad_out)
        assert all(torch.equal(a, b) for a, b in zip(ours, eager, strict=True))


def test_compile_with_every_tensor_option():
    torch._dynamo.reset()
    query, key, value, _ = (t.requires_grad_() for t in cases.inputs("gaussian", SHAPE))
    attn_mask = torch.randn(2, 1, 1, 97, requires_grad=True)
    alpha = torch.tensor([1.2, 1.5, 1.8, 2.0], requires_grad=True)
    lengths = torch.tensor([97, 40])

    def attention(query, key, value, attn_mask, alpha):
        out, aux = adasplash2.entmax_attention(
            query, key, value, attn_mask, enable_gqa=True, alpha=alpha, key_lengths=lengths, return_aux=True
        )
        return out * aux.live_tile_fraction[..., None, None]

    compiled_and_eager(attention, query, key, value, attn_mask, alpha)


@torch._inductor.config.patch(force_disable_caches=True)  # its cache on disk outlives a change of our operators
def test_compile_with_inductor():
    torch._dynamo.reset()
    query, key, value, grad_out = (t.requires_grad_() for t in cases.inputs("gaussian", SHAPE))

    def attention(query, key, value):
        return adasplash2.entmax_attention(query, key, value, enable_gqa=True).sin()

    out = torch.compile(attention, fullgraph=True)(query, key, value)
    expected = attention(query, key, value)
    torch.testing.assert_close(out, expected)
    ours = torch.autograd.grad(out, (query, key, value), grad_out.detach())
    eager = torch.autograd.grad(expected, (query, key, value), grad_out.detach())
    for a, b in zip(ours, eager, strict=True):
        torch.testing.assert_close(a, b)


# ---------------------------------------------------------------------------------------------- modes


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.float16, torch.float64])
@pytest.mark.parametrize("autocast_dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_as_sdpa_does(input_dtype, autocast_dtype):
    query, key, value, grad_out = cases.inputs("gaussian", cases.Shape(num_queries=65, num_keys=97), input_dtype)
    query.requires_grad_()
    with torch.autocast("cpu", dtype=autocast_dtype):
        out = adasplash2.entmax_attention(query, key, value)
        expected_dtype = scaled_dot_product_attention(query, key, value).dtype
    assert out.dtype == expected_dtype
    cast = (t.to(expected_dtype) for t in (query, key, value))
    assert torch.equal(out, adasplash2.entmax_attention(*cast))
    (grad,) = torch.autograd.grad(out, query, grad_out.to(out.dtype))
    assert grad.dtype == input_dtype


def test_autocast_of_mixed_dtypes_and_mask():
    query, key, value, _ = cases.inputs("gaussian", cases.Shape(num_queries=65, num_keys=97))
    attn_mask = torch.randn(65, 97)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = adasplash2.entmax_attention(query.bfloat16(), key, value, attn_mask.bfloat16())
    cast = (t.bfloat16() for t in (query, key, value, attn_mask))
    assert torch.equal(out, adasplash2.entmax_attention(*cast))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(mode):
    query, key, value, _ = (t.requires_grad_() for t in cases.inputs("gaussian", SHAPE))
    with mode():
        out, aux = adasplash2.entmax_attention(query, key, value, enable_gqa=True, return_aux=True)
    assert not out.requires_grad
    assert out.is_inference() == (mode is torch.inference_mode)
    assert not aux.tau.requires_grad


def test_aux_is_not_differentiable():
    query, key, value, _ = (t.requires_grad_() for t in cases.inputs("gaussian", SHAPE))
    out, aux = adasplash2.entmax_attention(query, key, value, enable_gqa=True, return_aux=True)
    assert out.requires_grad
    assert not any(t.requires_grad for t in aux)


@pytest.mark.parametrize("device", ["meta", "fake"])
@pytest.mark.parametrize("dtype", cases.DTYPES)
def test_shapes_without_data(device, dtype):
    if device == "fake":
        from torch._subclasses.fake_tensor import FakeTensorMode

        with FakeTensorMode():
            query, key, value = (torch.empty(s, dtype=dtype) for s in (SHAPE.query, SHAPE.key, SHAPE.value))
            out, aux = adasplash2.entmax_attention(query, key, value, enable_gqa=True, return_aux=True)
    else:
        query, key, value = (torch.empty(s, dtype=dtype, device="meta") for s in (SHAPE.query, SHAPE.key, SHAPE.value))
        out, aux = adasplash2.entmax_attention(query, key, value, enable_gqa=True, return_aux=True)
    real = adasplash2.entmax_attention(*cases.inputs("gaussian", SHAPE, dtype)[:3], enable_gqa=True, return_aux=True)
    for ours, expected in zip((out, *aux), (real[0], *real[1]), strict=True):
        assert (ours.shape, ours.dtype) == (expected.shape, expected.dtype)


def test_activation_checkpointing():
    query, key, value, grad_out = (t.requires_grad_() for t in cases.inputs("gaussian", SHAPE))

    def attention(query, key, value):
        return adasplash2.entmax_attention(query, key, value, enable_gqa=True)

    out = torch.utils.checkpoint.checkpoint(attention, query, key, value, use_reentrant=False)
    ours = torch.autograd.grad(out, (query, key, value), grad_out.detach())
    plain = torch.autograd.grad(attention(query, key, value), (query, key, value), grad_out.detach())
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


# ---------------------------------------------------------------------------------------------- SDPA's conventions


def test_signature_extends_sdpa():
    """Positional arguments as in SDPA; what SDPA lacks is by keyword only."""
    parameters = inspect.signature(adasplash2.entmax_attention).parameters
    sdpa = ["query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa"]
    assert list(parameters) == [*sdpa, "alpha", "key_lengths", "return_aux"]
    keyword_only = [name for name, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY]
    assert keyword_only == ["alpha", "key_lengths", "return_aux"]
    assert [p.default for p in parameters.values()][3:] == [None, 0.0, False, None, False, 1.5, None, False]


@pytest.mark.parametrize("alpha", [1, 1.0])
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": torch.randn(65, 65)}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_alpha_one_is_sdpa(alpha, options):
    query, key, value, _ = cases.inputs("gaussian", cases.Shape(num_queries=65, num_keys=65))
    out = adasplash2.entmax_attention(query, key, value, alpha=alpha, **options)
    assert torch.equal(out, scaled_dot_product_attention(query, key, value, **options))


@pytest.mark.parametrize(
    "options",
    [
        {"is_causal": True},
        {"key_lengths": torch.tensor([97, 30])},
        {"key_lengths": torch.tensor([97, 0]), "is_causal": True},
        {"key_lengths": torch.tensor([5, 97]), "attn_mask": torch.rand(65, 97) < 0.7},
        {"key_lengths": torch.tensor([5, 97]), "attn_mask": torch.zeros(65, 97)},
    ],
    ids=lambda options: "-".join(options),
)
@pytest.mark.parametrize("num_queries", [65, 97])
def test_alpha_one_with_our_conventions(options, num_queries):
    """Bottom-right causal and key_lengths hold for softmax too, whatever SDPA itself offers."""
    if "attn_mask" in options and num_queries != 65:
        options = {**options, "attn_mask": options["attn_mask"][:1]}
    shape = cases.Shape(batch=2, num_queries=num_queries, num_keys=97)
    query, key, value, _ = cases.inputs("gaussian", shape)
    out = adasplash2.entmax_attention(query, key, value, alpha=1.0, **options)
    torch.testing.assert_close(out, reference.entmax_attention(query, key, value, alpha=1.0, **options))


def test_near_one_alpha_approaches_sdpa():
    query, key, value, _ = cases.inputs("gaussian", cases.Shape(num_queries=65, num_keys=97), torch.float64)
    softmax = scaled_dot_product_attention(query, key, value)
    near = adasplash2.entmax_attention(query, key, value, alpha=1.001) - softmax
    nearer = adasplash2.entmax_attention(query, key, value, alpha=1.0005) - softmax
    torch.testing.assert_close(near, 2.0 * nearer, rtol=0.05, atol=1e-5)
    assert nearer.abs().max() < 0.01


def test_integers_are_accepted_where_numbers_are():
    query, key, value, _ = cases.inputs("gaussian", cases.Shape(num_queries=5, num_keys=7))
    as_integers = adasplash2.entmax_attention(query, key, value, alpha=2, scale=1, dropout_p=0)
    assert torch.equal(as_integers, adasplash2.entmax_attention(query, key, value, alpha=2.0, scale=1.0))


# ---------------------------------------------------------------------------------------------- the package


def test_import_needs_nothing_imported_before():
    script = "import adasplash2; print(adasplash2.__version__)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == adasplash2.__version__


def test_module_reports_itself():
    done = subprocess.run([sys.executable, "-m", "adasplash2"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for word in (adasplash2.__version__, adasplash2._C.isa(), "cpu", "cuda"):
        assert word in done.stdout.lower()


def test_public_names():
    for name in adasplash2.__all__:
        assert getattr(adasplash2, name).__doc__, f"{name} has no docstring"
    expected = {"AttentionAux", "compat", "entmax", "entmax15", "entmax_attention", "reference", "sparsemax"}
    assert set(adasplash2.__all__) == expected


def test_training_step_through_a_module():
    """A learned alpha per head inside a plain module: one optimiser step lowers the loss."""
    torch.manual_seed(0)
    project = torch.nn.Linear(32, 96)
    alpha_logit = torch.nn.Parameter(torch.zeros(4))
    optimiser = torch.optim.SGD([*project.parameters(), alpha_logit], lr=0.05)
    x, target = torch.randn(2, 50, 32), torch.randn(2, 50, 32)

    def loss() -> torch.Tensor:
        query, key, value = project(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        out = adasplash2.entmax_attention(query, key, value, is_causal=True, alpha=1.0 + torch.sigmoid(alpha_logit))
        return (out.transpose(1, 2).flatten(2) - target).square().mean()

    before = loss()
    before.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in (*project.parameters(), alpha_logit))
    optimiser.step()
    assert loss() < before


def test_result_type_is_the_rule_of_the_reference():
    """The oracle and the operation return the same kinds of things."""
    query, key, value, _ = cases.inputs("gaussian", cases.Shape(num_queries=5, num_keys=7))
    ours = tolerance.run(adasplash2.entmax_attention, query, key, value)
    theirs = tolerance.run(reference.entmax_attention, query, key, value)
    assert type(ours.aux) is type(theirs.aux) is adasplash2.AttentionAux
