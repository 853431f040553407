"""The test matrix as data: layouts, dtypes, modes, parameters and sizes, each with the reason it is there."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bnext.functional import ACTIVATIONS

CONTIGUOUS = torch.contiguous_format
CHANNELS_LAST = torch.channels_last
CHANNELS_LAST_3D = torch.channels_last_3d


@dataclass(frozen=True)
class Layout:
    """A stride order of the input.

    `arrange` takes a contiguous tensor and returns one of the same shape with the strides in question (the values may
    be others: what it returns is the input). `kept` is the memory format that y and dx must have.
    """

    name: str
    rank: int
    kept: torch.memory_format
    arrange: Callable[[Tensor], Tensor]

    def __str__(self) -> str:
        return self.name


def _inside_larger(x: Tensor, dim: int) -> Tensor:
    """`x` as a slice, along `dim`, of a tensor that goes on on both sides; what lies outside is NaN."""
    sizes = list(x.shape)
    sizes[dim] += 3
    large = x.new_full(sizes, float("nan"))
    inside = large.narrow(dim, 1, x.shape[dim])
    inside.copy_(x)
    return inside


def misaligned(x: Tensor) -> Tensor:
    """`x`, dense and in the same layout, one element off the allocator's alignment."""
    buffer = x.new_empty(x.numel() + 1)
    return buffer[1:].as_strided(x.shape, x.stride(), 1).copy_(x)


def _memory_order(*order: int) -> Callable[[Tensor], Tensor]:
    """Dimensions listed from the slowest to the fastest."""
    back = [order.index(dim) for dim in range(len(order))]
    return lambda x: x.permute(order).contiguous().permute(back)


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=CHANNELS_LAST if x.dim() == 4 else CHANNELS_LAST_3D)


# The layouts kernels know.
KEPT_LAYOUTS = [
    Layout("nc", 2, CONTIGUOUS, Tensor.contiguous),
    Layout("ncl", 3, CONTIGUOUS, Tensor.contiguous),
    Layout("nchw", 4, CONTIGUOUS, Tensor.contiguous),
    Layout("nhwc", 4, CHANNELS_LAST, _channels_last),
    Layout("ncdhw", 5, CONTIGUOUS, Tensor.contiguous),
    Layout("ndhwc", 5, CHANNELS_LAST_3D, _channels_last),
]

# Everything else: read correctly, returned contiguous.
OTHER_LAYOUTS = [
    Layout("nc_transposed", 2, CONTIGUOUS, _memory_order(1, 0)),
    Layout("nc_sliced_channels", 2, CONTIGUOUS, lambda x: _inside_larger(x, 1)),
    Layout("nlc", 3, CONTIGUOUS, _memory_order(0, 2, 1)),
    Layout("ncl_expanded_length", 3, CONTIGUOUS, lambda x: x[:, :, :1].expand(x.shape)),
    Layout("hwnc", 4, CONTIGUOUS, _memory_order(2, 3, 0, 1)),
    Layout("ncwh", 4, CONTIGUOUS, _memory_order(0, 1, 3, 2)),
    Layout("nchw_sliced_batch", 4, CONTIGUOUS, lambda x: x.repeat_interleave(2, 0)[::2]),
    Layout("nchw_sliced_channels", 4, CONTIGUOUS, lambda x: _inside_larger(x, 1)),
    Layout("nchw_sliced_width", 4, CONTIGUOUS, lambda x: _inside_larger(x, 3)),
    Layout("nchw_expanded_channels", 4, CONTIGUOUS, lambda x: x[:, :1].expand(x.shape)),
    Layout("ncdhw_expanded_batch", 5, CONTIGUOUS, lambda x: x[:1].expand(x.shape)),
    Layout("dhwnc", 5, CONTIGUOUS, _memory_order(2, 3, 4, 0, 1)),
]

# Dense and known, but not where a vector load would like it.
MISALIGNED_LAYOUTS = [
    Layout("nc_misaligned", 2, CONTIGUOUS, misaligned),
    Layout("nchw_misaligned", 4, CONTIGUOUS, misaligned),
    Layout("nhwc_misaligned", 4, CHANNELS_LAST, lambda x: misaligned(_channels_last(x))),
]

LAYOUTS = KEPT_LAYOUTS + OTHER_LAYOUTS + MISALIGNED_LAYOUTS
LAYOUT = {layout.name: layout for layout in LAYOUTS}
KEPT_OF_RANK = {rank: [layout for layout in KEPT_LAYOUTS if layout.rank == rank] for rank in range(2, 6)}


@dataclass(frozen=True)
class Active:
    """An activation with its parameter, None for the default: as the layers have it, and as torch has it."""

    activation: str
    activation_param: float | None = None

    def __str__(self) -> str:
        given = self.activation_param
        return self.activation if given is None else f"{self.activation}-{given:g}"

    def of(self, z: Tensor) -> Tensor:
        """torch's own, in float64 where an infinity gives NaN: float32's gelu(inf) does so with AVX-512.

        On the CPU for hardswish of float64: on CUDA torch's is as far off as a sixth in float32.
        """
        if z.is_cuda and z.dtype == torch.float64 and self.activation == "hardswish":
            return self.of(z.cpu()).to(z.device)
        function = self.function()
        result = function(z)
        odd = z.isinf() & result.isnan()
        return torch.where(odd, function(z.double()).to(z.dtype), result) if odd.any() else result

    def function(self, inplace: bool = False) -> Callable[[Tensor], Tensor]:
        """torch's own as a network calls it; gelu, sigmoid and tanh have none that writes over its input."""
        keywords = {"inplace": True} if inplace else {}
        return lambda z: getattr(torch.nn.functional, self.activation)(z, *self._parameter, **keywords)

    def module(self, inplace: bool = False) -> torch.nn.Module:
        """torch's own layer."""
        return MODULES[self.activation](*self._parameter, **({"inplace": True} if inplace else {}))

    @property
    def _parameter(self) -> tuple[float, ...]:
        return () if self.activation_param is None else (self.activation_param,)


def arguments_of(active: Active | None) -> tuple[str | None, float | None]:
    """activation and activation_param."""
    return (None, None) if active is None else (active.activation, active.activation_param)


MODULES: dict[str, type[torch.nn.Module]] = {
    "relu": torch.nn.ReLU,
    "leaky_relu": torch.nn.LeakyReLU,
    "relu6": torch.nn.ReLU6,
    "silu": torch.nn.SiLU,
    "gelu": torch.nn.GELU,
    "elu": torch.nn.ELU,
    "hardswish": torch.nn.Hardswish,
    "sigmoid": torch.nn.Sigmoid,
    "tanh": torch.nn.Tanh,
}


# Every one, and the two parameters: a slope above one, and an alpha that leaves a kink at zero.
ACTIVE = [*map(Active, ACTIVATIONS), Active("leaky_relu", 1.25), Active("elu", 0.5)]

# What a layer may write over its input with: whose output gives the input back.
INVERTIBLE = [None, *(active for active in ACTIVE if active.activation in ("leaky_relu", "elu"))]

# Behind a residual, by what backward takes the slope from: a mask, the residual that is kept, nothing.
RESIDUAL_KINDS = [Active("relu"), Active("silu"), None]

# Small, with a channel count and an inner size that no vector width divides.
SHAPE_OF_RANK = {2: (12, 5), 3: (4, 5, 7), 4: (3, 5, 4, 5), 5: (2, 5, 3, 4, 3)}


@dataclass(frozen=True)
class Dtypes:
    """Of the input (and so of y, dy, dx), and of weight, bias and the running statistics."""

    input: torch.dtype
    parameters: torch.dtype

    def __str__(self) -> str:
        names = [str(dtype).removeprefix("torch.") for dtype in (self.input, self.parameters)]
        return names[0] if names[0] == names[1] else "_with_".join(names)


FLOAT32 = Dtypes(torch.float32, torch.float32)
FLOAT64 = Dtypes(torch.float64, torch.float64)
BFLOAT16 = Dtypes(torch.bfloat16, torch.bfloat16)
FLOAT16 = Dtypes(torch.float16, torch.float16)
BFLOAT16_WITH_FLOAT32 = Dtypes(torch.bfloat16, torch.float32)
FLOAT16_WITH_FLOAT32 = Dtypes(torch.float16, torch.float32)
DTYPES = [FLOAT32, FLOAT64, BFLOAT16, FLOAT16, BFLOAT16_WITH_FLOAT32, FLOAT16_WITH_FLOAT32]


@dataclass(frozen=True)
class Mode:
    """`batch`: normalise with the batch's statistics. `tracked`: running statistics are passed."""

    name: str
    batch: bool
    tracked: bool

    def __str__(self) -> str:
        return self.name


TRAIN = Mode("train", True, True)
EVAL = Mode("eval", False, True)
# Training of a module without running statistics, and its eval, which normalises with the batch too.
UNTRACKED = Mode("untracked", True, False)
MODES = [TRAIN, EVAL, UNTRACKED]

# Which of weight and bias are there. The last cannot be had from a module, only from the function.
PARAMETERS = [("weight", "bias"), ("weight",), (), ("bias",)]
BOTH = PARAMETERS[0]

# 1: a single channel; 3, 7: fewer than a vector; 16, 64: whole vectors; 33, 1001: and a remainder.
CHANNELS = [1, 3, 7, 16, 33, 64, 1001]
# (1, 1): planes that are no planes; (2, 1): shorter than a vector, many channels in one; (7, 7): a few vectors and a
# rest; (49, 1): the same, flat; (17, 31): odd; (56, 56): a plane of whole vectors.
PLANES = [(1, 1), (2, 1), (7, 7), (49, 1), (17, 31), (56, 56)]
# Elements: above it the float64 reference takes longer than it tells us.
LARGEST = 1_000_000

SIZES = [(3, c, *plane) for c in CHANNELS for plane in PLANES if 3 * c * plane[0] * plane[1] <= LARGEST]
# More images than the CPU takes as planes when these are short: rows of many channels.
SHORT_PLANES = [(5, c, 7, 7) for c in CHANNELS]
VOLUMES = [(2, c, 3, 3, 3) for c in CHANNELS]
MATRICES = [(n, c) for c in CHANNELS for n in (2, 65)]

# Shapes that break a schedule made for the usual ones.
EXTREMES = [
    (100_003, 3),  # a huge batch of few channels: the reduction is all the work
    (2, 65_536),  # two rows of many channels: the per-channel work is all the work
    (11, 1_043),  # rows so wide that several are mapped at once, and three left
    (1, 7, 1, 5),  # a batch of one, a plane of one line
    (1, 1, 1, 2),  # the smallest that has a variance
    (2, 3, 1, 1),  # every layout at once: no dimension but batch and channel is larger than one
    (1, 2, 300, 301),  # one plane per channel, larger than a cache line's worth of anything
    (300, 2, 5, 5),  # many short planes
    (1, 1, 50_021),  # everything in one channel
]

# Large enough that a plan splits them, in both directions: over channels, over the batch, within a plane.
SPLIT = [
    ("nc", (100_003, 3)),  # few channels: only the batch can be split
    ("nc", (2, 65_536)),  # two rows: only the channels can
    ("nc", (4_099, 257)),
    ("ncl", (33, 65, 501)),
    ("nchw", (32, 32, 32, 32)),
    ("nhwc", (32, 32, 32, 32)),
    ("nchw", (1, 3, 513, 511)),  # planes longer than a chunk
    ("nhwc", (1, 3, 513, 511)),
    ("nchw", (64, 130, 7, 7)),  # planes shorter than a vector step
    ("nhwc", (64, 130, 7, 7)),
    ("nchw", (5, 1, 300, 301)),  # one channel: nothing but the batch and the plane to split
    ("ncdhw", (2, 19, 9, 30, 31)),
    ("ndhwc", (2, 19, 9, 30, 31)),
]
SPLIT_IDS = [f"{layout}-{'x'.join(map(str, shape))}" for layout, shape in SPLIT]
# One; as many as the smallest machine has; a prime that divides no split.
THREADS = [1, 2, 7]

# Sizes at which tiles end within a byte or a word of the mask, planes of a few elements, one channel, many channels.
MASK_SIZES: dict[str, list[tuple[str, tuple[int, ...]]]] = {
    "small": [("ncl", (3, 5, inner)) for inner in range(2, 18)],
    "words": [("ncl", (2, 3, inner)) for inner in (31, 32, 33, 47, 48, 49, 63, 64, 65)],
    "rows": [
        ("nc", shape) for shape in [(2, 3), (5, 15), (5, 16), (5, 17), (3, 31), (3, 32), (3, 33), (1001, 2)]
    ],
    "c": [
        ("nc", (3, 1001)),
        ("nc", (300, 1)),
        ("nchw", (2, 1001, 7, 7)),
        ("nhwc", (2, 1001, 3, 3)),
        ("nchw", (5, 1, 13, 11)),
        ("nhwc", (5, 1, 13, 11)),
        ("nhwc", (3, 3, 7, 7)),
    ],
}

# torch 2.11 has other words for a wrong eps, and takes more of them.
HAS_TEXTS_OF_EPS = "eps must be non-negative" in inspect.getsource(torch.nn.functional.batch_norm)


def refused_alike(names: Iterable[str]) -> list[str]:
    """Of cases that torch refuses, those that it refuses in the words of 2.13."""
    return [name for name in names if HAS_TEXTS_OF_EPS or "eps" not in name]
