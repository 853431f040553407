"""The first thing to run: one call of everything, against torch in float64 on the CPU, with the largest errors.

    python -m benchmarks.gpu.smoke              every dtype, layout, mode and form; goes on after a failure
    python -m benchmarks.gpu.smoke --small      the smallest shapes alone: what compute-sanitizer is given
    python -m benchmarks.gpu.smoke --waiting    the resident engine, where blocks wait for others outside a cluster

Input is made on the CPU: what runs on the device is bnext's, and copies.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import bnext
from bnext.__main__ import TOLERANCES

# Every size odd or not a multiple of a vector; then whole vectors, which bulk copies want.
SMALL = (("nchw", (9, 37, 11, 13)), ("nhwc", (9, 37, 11, 13)), ("nc", (301, 37)), ("nchw", (8, 4, 64, 64)))
# More than one block in each direction.
LARGE = (("nchw", (32, 96, 56, 56)), ("nhwc", (32, 96, 56, 56)), ("nc", (20_000, 256)))
# Blocks wait, by copies of either kind, in both directions, if the resident engine is forced.
WAITING = (("nhwc", (32, 32, 32, 32)), ("nchw", (64, 4, 64, 64)), ("nc", (20_000, 256)))
# Of x, and of weight, bias and the running statistics.
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "float16": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16 with float32": (torch.float16, torch.float32),
    "bfloat16 with float32": (torch.bfloat16, torch.float32),
}
RESULTS = ("y", "dx", "dweight", "dbias", "running_mean", "running_var", "dresidual")

OF_ELEMENTS = ("y", "dx", "dresidual")


@dataclass(frozen=True)
class Form:
    """What the call does beside batch normalization, and of which DTYPES it is tried."""

    name: str = "plain"
    activation: str | None = None
    residual: bool = False
    inplace: bool = False
    dtypes: tuple[str, ...] = ("float32", "bfloat16 with float32")


# z computed again from x; a bit per element; z from x and the residual; everything from y.
FORMS = (
    Form(dtypes=tuple(DTYPES)),
    Form("silu", "silu"),
    Form("add", None, residual=True),
    Form("add relu", "relu", residual=True),
    Form("add gelu", "gelu", residual=True),
    Form(
        "in place", "leaky_relu", inplace=True, dtypes=("float32",)
    ),  # 16 bits: y keeps less than is allowed
)
ACTIVATIONS = {
    None: lambda z: z,
    "silu": nn.functional.silu,
    "relu": nn.functional.relu,
    "gelu": nn.functional.gelu,
    "leaky_relu": nn.functional.leaky_relu,
}
# Of z, relative to its largest value. Nearer to 0 dy is 0, for rounding may choose the other slope there.
NEAR_ZERO = 1e-5


@dataclass(frozen=True)
class Call:
    shape: tuple[int, ...]
    layout: str
    dtypes: str
    training: bool
    form: Form = FORMS[0]

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        mode = "train" if self.training else "eval"
        return f"{self.dtypes:<22}{self.layout:<6}{shape:<14}{mode:<6}{self.form.name:<9}"


def calls(small: bool = False, waiting: bool = False) -> Iterator[Call]:
    if waiting:
        yield from (
            Call(shape, layout, dtypes, True, form)
            for form in FORMS
            for dtypes in form.dtypes
            for layout, shape in WAITING
            if dtypes != "float64"  # streams
        )
        return
    for form in FORMS:
        for dtypes in form.dtypes:
            for layout, shape in SMALL:
                for training in (True, False):
                    yield Call(shape, layout, dtypes, training, form)
    if small:
        return
    for form in FORMS:
        for dtypes in form.dtypes if form == FORMS[0] else form.dtypes[-1:]:
            yield from (Call(shape, layout, dtypes, True, form) for layout, shape in LARGE)
    for dtypes in FORMS[0].dtypes:
        yield from (Call(shape, layout, dtypes, False) for layout, shape in LARGE)


def _inputs(call: Call) -> tuple[list[Tensor], nn.Module]:
    """x, dy and a residual, and a layer in the middle of its training, all of the call's dtypes, on the CPU."""
    generator = torch.Generator().manual_seed(17)
    dtype, parameters = DTYPES[call.dtypes]
    kind = bnext.BatchNorm1d if len(call.shape) == 2 else bnext.BatchNorm2d
    form = call.form
    layer = kind(call.shape[1], dtype=parameters, activation=form.activation, inplace=form.inplace)
    layer.train(call.training)
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if tensor.is_floating_point():
                values = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(values + 0.5 if name in ("weight", "running_var") else values - 0.5)
    tensors = [torch.randn(call.shape, generator=generator).add_(shift).to(dtype) for shift in (1.5, 0, 0.5)]
    if call.layout == "nhwc":
        tensors = [tensor.contiguous(memory_format=torch.channels_last) for tensor in tensors]
    return tensors, layer


def _step(call: Call, layer: nn.Module, x: Tensor, dy: Tensor, residual: Tensor) -> dict[str, Tensor]:
    """Of bnext's layer, or of torch's with the rest of the form behind it."""
    inputs = (x.requires_grad_(), residual.requires_grad_())[: 1 + call.form.residual]
    if type(layer).__module__.startswith("bnext"):
        y = layer(x.clone(memory_format=torch.preserve_format) if call.form.inplace else x, *inputs[1:])
    else:
        z = layer(x) + residual if call.form.residual else layer(x)
        if call.form.activation is not None:
            dy.masked_fill_(z.detach().abs() <= NEAR_ZERO * z.detach().abs().max(), 0)
        y = ACTIVATIONS[call.form.activation](z)
    dx, *dresidual, dweight, dbias = torch.autograd.grad(y, (*inputs, layer.weight, layer.bias), dy)
    results = (y.detach(), dx, dweight, dbias, layer.running_mean, layer.running_var, *dresidual)
    return dict(zip(RESULTS, results, strict=False))


def _reference(call: Call, layer: nn.Module, tensors: Sequence[Tensor]) -> dict[str, Tensor]:
    """torch's layer in float64, from the same stored values. Leaves dy of 0 where no slope is certain."""
    kind = nn.BatchNorm1d if len(call.shape) == 2 else nn.BatchNorm2d
    wide = kind(call.shape[1], dtype=torch.float64).train(layer.training)
    wide.load_state_dict(layer.state_dict())
    x, dy, residual = (tensor.double() for tensor in tensors)
    results = _step(call, wide, x, dy, residual)
    tensors[1].masked_fill_(dy == 0, 0)
    return results


def errors(call: Call, device: str) -> dict[str, tuple[float, float]]:
    """Of each result: the largest error relative to the largest value, and what is allowed of it."""
    tensors, layer = _inputs(call)
    x = tensors[0]
    expected = _reference(call, layer, tensors)
    found = _step(call, layer.to(device), *(tensor.to(device) for tensor in tensors))
    dtype, parameters = DTYPES[call.dtypes]
    elements, sums = TOLERANCES[dtype]
    if parameters.itemsize == 2:  # rounded to 16 bits themselves
        sums = TOLERANCES[parameters][0]
    worst = {}
    for name, want in expected.items():
        got = found[name].cpu().double()
        error = (got - want).abs().max() / want.abs().max()
        worst[name] = (float(error), elements if name in OF_ELEMENTS else sums)
    if found["y"].stride() != x.stride() or found["dx"].stride() != x.stride():
        worst["strides"] = (math.inf, 0.0)
    if int(layer.num_batches_tracked) != int(call.training):
        worst["counter"] = (math.inf, 0.0)
    return worst


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.smoke", description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="the smallest shapes alone")
    parser.add_argument("--waiting", action="store_true", help="blocks that wait, by the resident engine")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    if options.waiting:
        os.environ["BNEXT_CUDA_ENGINE"] = "resident"  # read at the first call
    print("largest errors against torch in float64 on the CPU, relative to the largest value")
    failed = 0
    for call in calls(options.small, options.waiting):
        print(call, end=" ", flush=True)  # before it runs: it may never return
        try:
            found = errors(call, options.device)
        except Exception as error:
            failed += 1
            print(f"FAILED {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        wrong = [name for name, (error, allowed) in found.items() if not error <= allowed]  # NaN is wrong
        failed += bool(wrong)
        text = " ".join(f"{name} {error:.1e}" for name, (error, _) in found.items())
        print(f"{text}{' FAILED ' + ', '.join(wrong) if wrong else ''}", flush=True)
    print(f"{failed} failed" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
