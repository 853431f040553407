"""What is timed, as data: named lists of shapes, operations, variants of the layer with the bytes they must move.

A shape is (N, C, spatial...). Its multiplicity, how often a network runs it in one step, weights the means.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch

Shape = tuple[int, ...]

# The 53 batch norms of a ResNet-50 at 224x224 pixels: (channels, side, multiplicity).
_RESNET50 = (
    (64, 112, 1),
    (64, 56, 6),
    (256, 56, 4),
    (128, 56, 1),
    (128, 28, 7),
    (512, 28, 5),
    (256, 28, 1),
    (256, 14, 11),
    (1024, 14, 7),
    (512, 14, 1),
    (512, 7, 5),
    (2048, 7, 4),
)


def resnet50(batch: int) -> tuple[tuple[Shape, int], ...]:
    return tuple(((batch, c, side, side), times) for c, side, times in _RESNET50)


LISTS: dict[str, tuple[tuple[Shape, int], ...]] = {
    "resnet50": resnet50(32),
    "resnet50_one": resnet50(1),  # one image, as in inference or where memory leaves no more
    # Calls of a few microseconds, where overhead decides; odd channels and planes smaller than a vector.
    "small": tuple(
        (shape, 1)
        for shape in (
            (1, 3, 7, 7),
            (4, 8, 4, 4),
            (16, 16, 8, 8),
            (64, 16, 8, 8),
            (64, 32, 4, 4),
            (8, 64, 14, 14),
            (32, 33, 7, 7),
            (16, 1001, 7, 7),
        )
    ),
    # Features without space: wide, tall, one huge batch of few channels, one row of many.
    "nc": tuple(
        (shape, 1)
        for shape in (
            (32, 512),
            (256, 2048),
            (4096, 1024),
            (65536, 256),
            (65536, 33),
            (1048576, 3),
            (2, 65536),
        )
    ),
    "ncl": tuple((shape, 1) for shape in ((32, 64, 1000), (16, 512, 128), (8, 80, 3000), (64, 33, 49))),
    # Volumes: a video network's early and late stages, a medical U-Net's batch of two, one 3x3x3 corner.
    "3d": tuple(
        (shape, 1)
        for shape in (
            (4, 64, 8, 56, 56),
            (4, 256, 4, 14, 14),
            (2, 32, 64, 64, 64),
            (2, 16, 48, 96, 96),
            (8, 128, 3, 3, 3),
        )
    ),
    # The two batch norms of the notebook's network on its 100 samples.
    "notebook": (((100, 50), 1), ((100, 20), 1)),
    # One problem grown 1024 times, by its batch: planes first, then features.
    "growth": tuple(((4**k, 64, 16, 16), 1) for k in range(6)),
    "growth_nc": tuple(((64 * 4**k, 256), 1) for k in range(6)),
}

# step: forward and backward in training; frozen: both with fixed statistics, for the gradients of the inputs alone.
OPERATIONS = ("forward", "backward", "step", "eval", "frozen")
DTYPES = ("float32", "bfloat16", "float16", "float64")
LAYOUTS = ("contiguous", "channels_last")
# Activations whose gradient one bit tells: forward leaves a mask instead of backward reading a residual again, or x.
MASKED = ("relu", "leaky_relu", "relu6")


@dataclass(frozen=True)
class Traffic:
    """Tensors of x's size, and bit masks of its elements, that are read or written."""

    tensors: int
    masks: int = 0

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(self.tensors + other.tensors, self.masks + other.masks)

    def __str__(self) -> str:
        masks = "" if not self.masks else "+b" if self.masks == 1 else f"+{self.masks}b"
        return f"{self.tensors}T{masks}"


@dataclass(frozen=True)
class Variant:
    """The layer timed, activation(batch_norm(x) + residual): separate calls, or one where it is fused."""

    activation: str | None = None
    residual: bool = False

    def minimum(self, operation: str) -> Traffic:
        """What no schedule of one fused call avoids, forward: x, y; backward: x, dy, dx. The activation is free.

        With a residual, forward reads it. If an activation follows, backward writes the residual's gradient, and reads
        the mask, or the residual where there is none. A training step is both passes; only inference leaves no mask. A
        frozen layer's backward has no use for x but to find an activation's slope, which a mask tells too.
        """
        activated = self.residual and self.activation is not None
        has_mask = self.activation in MASKED
        masked = self.residual and has_mask
        forward = Traffic(2 + self.residual, int(masked))
        backward = Traffic(3 + activated + (activated and not masked), int(masked))
        needs_x = self.activation is not None and not has_mask
        frozen = Traffic(2 + self.residual + 2 + activated + needs_x * (1 + self.residual), 2 * has_mask)
        every = (forward, backward, forward + backward, Traffic(forward.tensors), frozen)
        return dict(zip(OPERATIONS, every, strict=True))[operation]


VARIANTS = {
    "bn": Variant(),
    "bn_relu": Variant("relu"),
    "bn_add_relu": Variant("relu", residual=True),
}


@dataclass(frozen=True)
class Case:
    """One row of a table: an operation on one tensor."""

    shapes: str  # name of the list it came from
    operation: str
    shape: Shape
    dtype: str
    layout: str
    multiplicity: int = 1
    variant: str = "bn"

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def training(self) -> bool:
        """With the batch's statistics."""
        return self.operation not in ("eval", "frozen")

    @property
    def learns(self) -> bool:
        """Something is differentiated: the inputs and, in training, the parameters."""
        return self.operation != "eval"

    @property
    def activation(self) -> str | None:
        return VARIANTS[self.variant].activation

    @property
    def residual(self) -> bool:
        return VARIANTS[self.variant].residual

    @property
    def parameter_dtype(self) -> torch.dtype:
        """16-bit activations train with float32 parameters, as under autocast."""
        return torch.promote_types(self.torch_dtype, torch.float32)

    @property
    def memory_format(self) -> torch.memory_format:
        if self.layout == "contiguous":
            return torch.contiguous_format
        return torch.channels_last if len(self.shape) == 4 else torch.channels_last_3d

    @property
    def tensor_bytes(self) -> int:
        return math.prod(self.shape) * self.torch_dtype.itemsize

    @property
    def mask_bytes(self) -> int:
        """A bit per element, in whole words of 32 and one more, as bnext keeps it."""
        return math.prod(self.shape) // 32 * 4 + 8

    @property
    def minimum(self) -> Traffic:
        return VARIANTS[self.variant].minimum(self.operation)

    @property
    def bytes_minimum(self) -> int:
        return self.minimum.tensors * self.tensor_bytes + self.minimum.masks * self.mask_bytes

    @property
    def label(self) -> str:
        return "x".join(map(str, self.shape))

    def __str__(self) -> str:
        return f"{self.variant} {self.operation} {self.label} {self.dtype} {self.layout}"


def parse_shapes(text: str) -> tuple[tuple[Shape, int], ...]:
    """The list of that name, or the one shape written like 32x64x56x56."""
    if text in LISTS:
        return LISTS[text]
    sizes = text.split("x")
    if not 2 <= len(sizes) <= 5 or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise ValueError(
            f"{text!r} is neither a list ({', '.join(LISTS)}) nor a shape of 2 to 5 sizes like 32x64x56x56"
        )
    return ((tuple(map(int, sizes)), 1),)


def cases(
    operations: Iterable[str],
    shapes: Iterable[str],
    dtypes: Iterable[str],
    layouts: Iterable[str],
    variants: Iterable[str],
) -> Iterator[Case]:
    """The product of the choices; channels_last exists for four and five dimensions only."""
    for variant in variants:
        for name in shapes:
            for operation in operations:
                for dtype in dtypes:
                    for layout in layouts:
                        for shape, times in parse_shapes(name):
                            if layout == "contiguous" or len(shape) >= 4:
                                of = name if name in LISTS else "given"
                                yield Case(of, operation, shape, dtype, layout, times, variant)
