"""What is timed on a GPU, as data: classes of cases, each with the bars it has to reach.

A bar is a share of the one-read floor, the time in which the measured copy rate would move the bytes that the
operation must move (shapes.Variant), or microseconds where launches decide and bytes do not; how many times
faster than torch's native kernels, of which a variant of several layers calls each; and where it is the peer to
beat, than torch.compile. All of it is kernel time, replayed from a CUDA graph, with a cold L2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from benchmarks.shapes import Case, Shape, resnet50

# shape, dtype, layout, calls in one step of a network
Member = tuple[Shape, str, str, int]


@dataclass(frozen=True)
class Bar:
    """At least this `share` of the floor, or at most these `microseconds`; at least `native` times faster.

    `compiled`: as many times faster than torch.compile, on the cases that are compiled.
    """

    native: float
    share: float | None = None
    microseconds: float | None = None
    compiled: float | None = None

    def __post_init__(self) -> None:
        assert (self.share is None) != (self.microseconds is None)


@dataclass(frozen=True)
class Class:
    """Cases under the same bars: by the sum of all calls if `summed`, else by the worst case."""

    name: str
    members: tuple[Member, ...]
    bars: dict[str, Bar]  # by operation
    summed: bool = False
    variant: str = "bn"

    def cases(self, operation: str) -> list[Case]:
        return [Case(self.name, operation, *member, variant=self.variant) for member in self.members]


def _network(batch: int, dtype: str, layout: str) -> tuple[Member, ...]:
    return tuple((shape, dtype, layout, times) for shape, times in resnet50(batch))


def _block_ends(batch: int, dtype: str, layout: str) -> tuple[Member, ...]:
    """Where a ResNet-50 adds: the last batch norm of each of its 16 blocks, channels, side and times."""
    ends = ((256, 56, 3), (512, 28, 4), (1024, 14, 6), (2048, 7, 3))
    return tuple(((batch, c, side, side), dtype, layout, times) for c, side, times in ends)


CLASSES = (
    # At most 2 MB, where launches decide: (N, C) as behind a linear layer, a network's last stages at a small batch.
    Class(
        "tiny",
        (
            ((32, 512), "bfloat16", "contiguous", 1),
            ((32, 512), "float32", "contiguous", 1),
            ((256, 2048), "bfloat16", "contiguous", 1),
            ((32, 256, 7, 7), "bfloat16", "channels_last", 1),
            ((32, 512, 7, 7), "float16", "channels_last", 1),
            ((32, 256, 7, 7), "float32", "contiguous", 1),
        ),
        {"forward": Bar(1.5, microseconds=5), "backward": Bar(1.3, microseconds=5)},
    ),
    # 13 to 57 MB: x is still on chip when it is read for the second time.
    Class(
        "mid NHWC 16-bit",
        (
            ((32, 64, 56, 56), "bfloat16", "channels_last", 1),
            ((32, 512, 28, 28), "bfloat16", "channels_last", 1),
            ((128, 2048, 7, 7), "bfloat16", "channels_last", 1),
            ((128, 128, 28, 28), "float16", "channels_last", 1),
            ((128, 64, 56, 56), "bfloat16", "channels_last", 1),
            ((128, 1024, 14, 14), "bfloat16", "channels_last", 1),
        ),
        {"forward": Bar(2.0, share=0.65), "backward": Bar(1.8, share=0.60)},
    ),
    # All 53 layers of a training step.
    Class(
        "ResNet-50 b128 NHWC bfloat16",
        _network(128, "bfloat16", "channels_last"),
        {"forward": Bar(2.0, share=0.60), "backward": Bar(1.8, share=0.55)},
        summed=True,
    ),
    Class(
        "ResNet-50 b128 NCHW float32",
        _network(128, "float32", "contiguous"),
        {"forward": Bar(2.0, share=0.60), "backward": Bar(2.0, share=0.55)},
        summed=True,
    ),
    # The same network's 16 calls of batch norm, sum and ReLU, 26 to 206 MB; the residual needs its gradient.
    Class(
        "ResNet-50 b128 BN+add+ReLU NHWC bfloat16",
        _block_ends(128, "bfloat16", "channels_last"),
        {
            "forward": Bar(3.0, share=0.75, compiled=1.2),
            "backward": Bar(2.5, share=0.70, compiled=1.2),
        },
        summed=True,
        variant="bn_add_relu",
    ),
    # Rows of 128 bytes, far more of them than stay on chip: x is read twice.
    Class(
        "narrow 16-bit",
        (
            ((1048576, 64), "bfloat16", "contiguous", 1),
            ((1048576, 64), "float16", "contiguous", 1),
        ),
        {"forward": Bar(2.0, share=0.60), "backward": Bar(1.5, share=0.55)},
    ),
    # 50 MB and more: nothing but a copy with arithmetic in it.
    Class(
        "eval",
        (
            ((128, 64, 56, 56), "bfloat16", "channels_last", 1),
            ((128, 512, 28, 28), "float16", "contiguous", 1),
            ((1048576, 64), "bfloat16", "contiguous", 1),
            ((128, 64, 112, 112), "bfloat16", "channels_last", 1),
            ((128, 256, 56, 56), "float32", "contiguous", 1),
        ),
        {"eval": Bar(1.0, share=0.93)},
    ),
)

# One step of the smallest layer, on the host's clock: what Python, autograd and launches cost.
HOST = Case("host", "step", (32, 512), "float32", "contiguous")

# Compiling takes ten seconds a case, so torch.compile is measured on these shapes only, one or two of each class.
COMPILED: dict[str, tuple[Shape, ...]] = {
    "tiny": ((256, 2048),),
    "mid NHWC 16-bit": ((128, 1024, 14, 14),),
    "ResNet-50 b128 NHWC bfloat16": ((128, 256, 56, 56),),
    "ResNet-50 b128 NCHW float32": ((128, 128, 28, 28),),
    "ResNet-50 b128 BN+add+ReLU NHWC bfloat16": ((128, 256, 56, 56), (128, 1024, 14, 14)),
    "narrow 16-bit": ((1048576, 64),),
    "eval": ((128, 64, 56, 56),),
}


def is_compiled(case: Case) -> bool:
    """Whether torch.compile is measured on the case; of several dtypes of a shape, on bfloat16 alone."""
    alone = case.dtype == "bfloat16" or "float32" in case.shapes
    return alone and case.shape in COMPILED.get(case.shapes, ())


def all_cases() -> Iterator[Case]:
    for group in CLASSES:
        for operation in group.bars:
            yield from group.cases(operation)
