"""What the notebook that this project began with computes, and what it printed.

    np.random.seed(42); data = np.random.rand(10, 5)
    one training forward of BatchNorm(5, momentum=0.9, epsilon=1e-5), then one in inference mode

The notebook's file breaks off in the sixth row of the second output.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def data() -> NDArray[np.float64]:
    return np.random.RandomState(42).rand(10, 5)


def printed(values: NDArray[np.float64]) -> str:
    """As `print` shows an array with NumPy's defaults: eight digits after the point."""
    with np.printoptions(precision=8, suppress=False, floatmode="maxprec", linewidth=75, threshold=1000):
        return str(values)


TRAINING = """\
[[-0.20879924  1.82754911  0.9557318   0.04413511 -0.79327021]
 [-0.98663681 -1.0839743   1.40712816  0.05559572  1.26379352]
 [-1.46858203  1.89015986  1.29364678 -1.75818707 -0.69711066]
 [-0.88908042 -0.28107046  0.25857334 -0.73364462 -0.28944876]
 [ 0.63583362 -0.81843577 -0.52394557 -1.03961429  0.32478129]
 [ 1.25271721 -0.62214491  0.22317678  0.01500495 -1.20154341]
 [ 0.62050063 -0.71722332 -1.28789917  1.67807333  2.22351172]
 [ 1.33536572 -0.27985864 -1.17816194  0.44337187  0.26546953]
 [-1.10749248  0.34170754 -1.39105144  1.4934874  -0.41036084]
 [ 0.81617381 -0.25670911  0.24280127 -0.1982224  -0.68582218]]"""

INFERENCE_BEGINNING = """\
[[ 0.34761317  0.95600362  0.72084368  0.56748504  0.12507165]
 [ 0.11825073  0.01996812  0.86159417  0.57006785  0.70467022]
 [-0.02386137  0.97613256  0.82620939  0.16130611  0.15216558]
 [ 0.14701737  0.27809639  0.50346179  0.39220132  0.26702845]
 [ 0.59667166  0.105337    0.25946354  0.3232467   0.440094  ]
 [ 0.77857329  0.16844321  0.49242"""
