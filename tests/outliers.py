"""Outliers where the kernels look for the center of a channel."""

from __future__ import annotations

import math

import numpy as np

# Every layout, with channels long enough that one outlier among n elements is sqrt(n) = 64 and more deviations off.
LONG = {"nc": (4099, 5), "ncl": (64, 5, 65), "nchw": (16, 5, 17, 16), "nhwc": (16, 5, 17, 16)}

# Two of the samples of each of two of the three triples whose medians' median is the center, formulas.h.
MISLED = (0, 1, 3, 4)


def looked_at(shape: tuple[int, ...], layout: str, sample: int) -> tuple[int, ...]:
    """Where in a channel the sample is taken from: its index without that of the channel."""
    n, _, *space = shape
    inner = 1 if layout in ("nc", "nhwc") else math.prod(space)
    outer = n * math.prod(space) // inner
    position = outer * (2 * sample + 1) // 18 * inner + inner * (4 * sample % 9) // 9
    return tuple(map(int, np.unravel_index(position, (n, *space))))
