"""The first thing to run: one call of everything, against torch in float64 on the CPU, with the largest errors.

    python -m benchmarks.gpu.smoke              every dtype, layout and mode; goes on after a failure
    python -m benchmarks.gpu.smoke --small      the smallest shapes alone: what compute-sanitizer is given

Input is made on the CPU: what runs on the device is bnext's, and copies.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import bnext
from bnext.__main__ import TOLERANCES

# Every size odd or not a multiple of a vector; then sizes that take more than one block in each direction.
SMALL = {"nchw": (9, 37, 11, 13), "nhwc": (9, 37, 11, 13), "nc": (301, 37)}
LARGE = {"nchw": (32, 96, 56, 56), "nhwc": (32, 96, 56, 56), "nc": (20_000, 256)}
# Of x, and of weight, bias and the running statistics.
DTYPES = {
    "float32": (torch.float32, torch.float32),
    "float64": (torch.float64, torch.float64),
    "float16": (torch.float16, torch.float16),
    "bfloat16": (torch.bfloat16, torch.bfloat16),
    "float16 with float32": (torch.float16, torch.float32),
    "bfloat16 with float32": (torch.bfloat16, torch.float32),
}
RESULTS = ("y", "dx", "dweight", "dbias", "running_mean", "running_var")


@dataclass(frozen=True)
class Call:
    shape: tuple[int, ...]
    layout: str
    dtypes: str
    training: bool

    def __str__(self) -> str:
        shape = "x".join(map(str, self.shape))
        return f"{self.dtypes:<22}{self.layout:<6}{shape:<14}{'train' if self.training else 'eval':<6}"


def calls(small: bool) -> Iterator[Call]:
    for shapes in (SMALL,) if small else (SMALL, LARGE):
        for dtypes in DTYPES:
            for layout, shape in shapes.items():
                for training in (True, False):
                    yield Call(shape, layout, dtypes, training)


def _inputs(call: Call) -> tuple[Tensor, Tensor, nn.Module]:
    """x and dy, and a layer in the middle of its training, all of the call's dtypes, on the CPU."""
    generator = torch.Generator().manual_seed(17)
    dtype, parameters = DTYPES[call.dtypes]
    kind = bnext.BatchNorm1d if len(call.shape) == 2 else bnext.BatchNorm2d
    layer = kind(call.shape[1], dtype=parameters).train(call.training)
    with torch.no_grad():
        for name, tensor in layer.state_dict().items():
            if tensor.is_floating_point():
                values = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(values + 0.5 if name in ("weight", "running_var") else values - 0.5)
    x, dy = (torch.randn(call.shape, generator=generator).add_(shift).to(dtype) for shift in (1.5, 0))
    if call.layout == "nhwc":
        x, dy = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, dy))
    return x, dy, layer


def _step(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    x.requires_grad_()
    y = layer(x)
    gradients = torch.autograd.grad(y, (x, layer.weight, layer.bias), dy)
    return dict(zip(RESULTS, (y.detach(), *gradients, layer.running_mean, layer.running_var), strict=True))


def _reference(layer: nn.Module, x: Tensor, dy: Tensor) -> dict[str, Tensor]:
    """torch's layer in float64, from the same stored values."""
    kind = nn.BatchNorm1d if x.dim() == 2 else nn.BatchNorm2d
    wide = kind(x.shape[1], dtype=torch.float64).train(layer.training)
    wide.load_state_dict(layer.state_dict())
    return _step(wide, x.detach().double(), dy.double())


def errors(call: Call, device: str) -> dict[str, tuple[float, float]]:
    """Of each result: the largest error relative to the largest value, and what is allowed of it."""
    x, dy, layer = _inputs(call)
    expected = _reference(layer, x, dy)
    found = _step(layer.to(device), x.to(device), dy.to(device))
    dtype, parameters = DTYPES[call.dtypes]
    elements, sums = TOLERANCES[dtype]
    if parameters.itemsize == 2:  # rounded to 16 bits themselves
        sums = TOLERANCES[parameters][0]
    worst = {}
    for name, want in expected.items():
        got = found[name].cpu().double()
        error = (got - want).abs().max() / want.abs().max()
        worst[name] = (float(error), elements if name in ("y", "dx") else sums)
    if found["y"].stride() != x.stride() or found["dx"].stride() != x.stride():
        worst["strides"] = (math.inf, 0.0)
    if int(layer.num_batches_tracked) != int(call.training):
        worst["counter"] = (math.inf, 0.0)
    return worst


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu.smoke", description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="the smallest shapes alone")
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(arguments)
    print("largest errors against torch in float64 on the CPU, relative to the largest value")
    failed = 0
    for call in calls(options.small):
        try:
            found = errors(call, options.device)
        except Exception as error:
            failed += 1
            print(f"{call} FAILED {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            continue
        wrong = [name for name, (error, allowed) in found.items() if not error <= allowed]  # NaN is wrong
        failed += bool(wrong)
        text = " ".join(f"{name} {error:.1e}" for name, (error, _) in found.items())
        print(f"{call} {text}{' FAILED ' + ', '.join(wrong) if wrong else ''}", flush=True)
    print(f"{failed} failed" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
