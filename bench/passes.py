"""How long each kernel of this op takes on a GPU, by torch's profiler: the mean of its launches in so many calls.

    python -m bench.passes --length 16384 --heads 16 --head-dim 64 128 --live 0.1 0.4 --support 100

A row is a case, a column a kernel: `forward` is inference, where nothing but the output is wanted, `training` a forward
and a backward pass. `all` is their sum, without gaps between the kernels.
"""

from __future__ import annotations

import argparse
import itertools
import re
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch.profiler import ProfilerActivity, profile

from adasplash2 import entmax_attention
from bench.attention import DTYPES
from bench.cases import ALPHA, DENSE, Data, Inputs, Shape, make_inputs

PASSES = ("forward", "training")
_KERNEL = re.compile(r"adasplash2::cuda::(?:\w+::)?(\w+)_kernel")


def kernel_name(full_name: str) -> str | None:
    """ "scan" of "void adasplash2::cuda::sm90::scan_kernel<...>(...)"; None for a kernel that is not ours."""
    match = _KERNEL.search(full_name)
    return None if match is None else match.group(1).replace("_", " ")


def run(which: str, inputs: Inputs, shape: Shape) -> None:
    tensors = inputs.query, inputs.key, inputs.value
    if which == "forward":
        with torch.no_grad():
            entmax_attention(*tensors, is_causal=shape.is_causal, alpha=ALPHA)
    else:
        out = entmax_attention(*tensors, is_causal=shape.is_causal, alpha=ALPHA)
        torch.autograd.grad(out, tensors, inputs.grad_out)


def kernel_ms(which: str, inputs: Inputs, shape: Shape, calls: int) -> dict[str, float]:
    """Milliseconds a call, by kernel in the order in which they ran."""
    for _ in range(2):
        run(which, inputs, shape)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(calls):
            run(which, inputs, shape)
        torch.cuda.synchronize()
    total_us: dict[str, float] = defaultdict(float)
    for event in sorted(profiler.events(), key=lambda event: event.time_range.start):
        name = kernel_name(event.name)
        if name is not None:
            total_us[name] += event.device_time_total
    return {name: us * 1e-3 / calls for name, us in total_us.items()}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--length", type=int, nargs="+", default=[16384])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--causal", choices=("yes", "no"), nargs="+", default=["no"])
    parser.add_argument("--support", nargs="*", default=["100"], help="mean keys of a row, or dense; Gaussian data")
    parser.add_argument("--live", type=float, nargs="*", default=[0.1, 0.4], help="live-tile fractions, support 100")
    parser.add_argument("--passes", choices=PASSES, nargs="+", default=PASSES)
    parser.add_argument("--calls", type=int, default=5)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if not torch.cuda.is_available():
        raise SystemExit("bench.passes: there is no GPU here")
    datas = [Data(DENSE if support == "dense" else float(support)) for support in options.support]
    datas += [Data(100, live) for live in options.live]
    for length, head_dim, causal in itertools.product(options.length, options.head_dim, options.causal):
        shape = Shape(options.batch, options.heads, length, head_dim, DTYPES[options.dtype], causal == "yes")
        print(shape, flush=True)
        for data in datas:
            inputs = make_inputs(shape, data, "cuda")
            for which in options.passes:
                times = kernel_ms(which, inputs, shape, options.calls)
                row = "  ".join(f"{name} {ms:.3f}" for name, ms in times.items())
                print(f"  {data!s:18} {which:9} all {sum(times.values()):.3f}  {row}", flush=True)


if __name__ == "__main__":
    main()
