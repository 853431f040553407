"""`python -m bnext`: what was built, what is running, and whether it computes what the reference says.

The self-check takes seconds. It is for a machine that has just installed bnext; the tests are for changes.
"""

import platform
import sys
import time

import numpy as np
import torch
from torch import Tensor

from . import __version__, build_info, functional, reference
from ._build_info import TORCH_VERSION
from .reference import Array

EPS = 1e-5
MOMENTUM = 0.3

# Shapes with remainders: no size is a multiple of a vector, a tile or a number of threads.
LAYOUTS: dict[str, tuple[tuple[int, ...], torch.memory_format]] = {
    "contiguous": ((9, 37, 11, 13), torch.contiguous_format),
    "channels_last": ((9, 37, 11, 13), torch.channels_last),
    "(N,C)": ((301, 37), torch.contiguous_format),
}

# Largest error allowed, relative to the largest value, per storage type: of y and dx, of per-channel results.
# Sums over a thousand elements leave some rounding errors in float64 and float32. A 16-bit result is rounded
# once more, by half the type's eps at most: allowed is all of it; per-channel results beside it are float32.
TOLERANCES = {
    torch.float64: (1e-13, 1e-13),
    torch.float32: (1e-6, 1e-6),
    torch.bfloat16: (torch.finfo(torch.bfloat16).eps, 1e-6),
    torch.float16: (torch.finfo(torch.float16).eps, 1e-6),
}


def describe() -> str:
    """Versions, instruction sets, threads, CUDA: a line each."""
    info = build_info()
    rows = {
        "bnext": __version__,
        "torch": f"{torch.__version__} running, {TORCH_VERSION} built against",
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "compiler": info["compiler"],
        "instructions": f"{info['instruction_set']} chosen of {', '.join(info['instruction_sets'])}",
        "threads": f"{torch.get_num_threads()}, OpenMP: {'yes' if info['openmp'] else 'no'}",
        "CUDA": f"{'yes' if info['cuda'] else 'no'}: {info['cuda_reason']}",
    }
    return "\n".join(f"{name:<14}{value}" for name, value in rows.items())


def _numpy(t: Tensor) -> Array:
    return t.detach().double().contiguous().numpy()


def _error(got: Tensor, want: Array) -> float:
    """Largest error relative to the largest value; NaN if any value is NaN."""
    return float(np.abs(_numpy(got) - want).max() / np.abs(want).max())


def errors(
    dtype: torch.dtype, shape: tuple[int, ...], layout: torch.memory_format, training: bool
) -> list[float]:
    """Runs forward and backward once. Errors of y, dx, dweight, dbias, running_mean, running_var."""
    generator = torch.Generator().manual_seed(2015)
    wide = dtype if dtype in (torch.float32, torch.float64) else torch.float32

    def normal(*size: int, to: torch.dtype, mean: float) -> Tensor:
        return (torch.randn(size, generator=generator, dtype=torch.float64) + mean).to(to)

    x = normal(*shape, to=dtype, mean=2).to(memory_format=layout).requires_grad_()
    weight = normal(shape[1], to=wide, mean=1).requires_grad_()
    bias = normal(shape[1], to=wide, mean=0).requires_grad_()
    running_mean = normal(shape[1], to=wide, mean=2)
    running_var = normal(shape[1], to=wide, mean=0).square() + 0.5
    dy = normal(*shape, to=dtype, mean=0).to(memory_format=layout)

    x64, weight64, bias64, dy64 = map(_numpy, (x, weight, bias, dy))
    old_mean, old_var = _numpy(running_mean.clone()), _numpy(running_var.clone())
    mean, var = reference.statistics(x64) if training else (old_mean, old_var)
    new_mean, new_var = old_mean, old_var
    if training:
        count = x64.size // shape[1]
        new_mean, new_var = reference.running_update(old_mean, old_var, mean, var, count, MOMENTUM, True)
    want = [
        reference.forward(x64, weight64, bias64, mean, var, EPS),
        *reference.backward(dy64, x64, weight64, mean, var, EPS, training),
        new_mean,
        new_var,
    ]

    y = functional.batch_norm(x, running_mean, running_var, weight, bias, training, MOMENTUM, EPS)
    got = [y, *torch.autograd.grad(y, (x, weight, bias), dy), running_mean, running_var]
    return [_error(g, w) for g, w in zip(got, want, strict=True)]


def self_check() -> bool:
    """Prints a row of errors per storage type, layout and mode. True if all are within tolerance."""
    names = ("y", "dx", "dweight", "dbias", "r. mean", "r. var")
    print("largest errors against the float64 reference, relative to the largest value")
    print(f"{'dtype':<10}{'layout':<15}{'mode':<10}" + "".join(f"{n:>9}" for n in names) + "   allowed")
    good = True
    for dtype, (elements, channels) in TOLERANCES.items():
        for layout, (shape, memory_format) in LAYOUTS.items():
            for mode in ("training", "eval"):
                found = errors(dtype, shape, memory_format, mode == "training")
                allowed = [elements] * 2 + [channels] * 4
                passed = all(e <= a for e, a in zip(found, allowed, strict=True))  # NaN does not pass
                good = good and passed
                row = f"{str(dtype).removeprefix('torch.'):<10}{layout:<15}{mode:<10}"
                row += "".join(f"{e:9.1e}" for e in found) + f"   {elements:.1e} {channels:.1e}"
                print(row + ("" if passed else "  FAILED"))
    return good


def main() -> int:
    """Exit code 0 if the self-check passes, 1 if not."""
    print(describe(), end="\n\n")
    start = time.perf_counter()
    good = self_check()
    print(f"self-check {'passed' if good else 'FAILED'} in {time.perf_counter() - start:.1f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
