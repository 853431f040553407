"""The notebook this project began with, both halves, our layer beside its counterpart.

First the from-scratch layer: the NumPy reference and the fused layer on the same ten rows. Then the network
Linear-BatchNorm-ReLU twice over, trained with our layer and with torch's from one seed, in float64 and float32.
The exit code is 1 where the two do not agree.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import bnext

SAMPLES, FEATURES = 100, 10
# Largest difference allowed between ours and torch's, in a loss or an output. float64: what the two must agree
# to after all epochs. float32: half a unit of the last digit that is printed.
TOLERANCE = {torch.float64: 1e-5, torch.float32: 0.5e-4}
# Between the reference and the fused layer, both float64: a few roundings of numbers up to 3.
SCRATCH_TOLERANCE = 1e-14


@dataclass
class Run:
    """What one network did: the loss of every epoch, and its outputs on new samples."""

    losses: list[float]
    outputs: list[float]


def agree(what: str, difference: float, allowed: float) -> bool:
    """Print the verdict on one comparison, and return it."""
    verdict = "agree" if difference <= allowed else "DISAGREE"
    print(f"{what} {verdict}: largest difference {difference:.1e}, allowed {allowed:.1e}\n")
    return difference <= allowed


def compare_outputs(title: str, reference: NDArray[np.float64], fused: Tensor) -> bool:
    """Print two outputs row by row, one under the other, with the notebook's eight digits."""
    print(title)
    for sample, (left, right) in enumerate(zip(reference, fused.numpy(), strict=True), start=1):
        print(f"{sample:8}  reference  ", "".join(f"{value:12.8f}" for value in left))
        print(f"{'':8}  bnext      ", "".join(f"{value:12.8f}" for value in right))
    return agree(f"{title}s", float(np.abs(reference - fused.numpy()).max()), SCRATCH_TOLERANCE)


def from_scratch() -> bool:
    """The notebook's first half: one training and one inference pass over ten samples of five features."""
    np.random.seed(42)  # noqa: NPY002, the notebook's numbers come from NumPy's old generator
    data = np.random.rand(10, 5)  # noqa: NPY002

    reference = bnext.reference.BatchNorm(num_features=5, momentum=0.9, epsilon=1e-5)
    # momentum is a decay there and the weight of the new value here; there the running variance is biased
    fused = bnext.BatchNorm1d(5, momentum=1 - 0.9, unbiased_running_var=False, dtype=torch.float64)

    with torch.no_grad():
        in_training = compare_outputs(
            "training output", reference.forward(data), fused(torch.from_numpy(data))
        )
        reference.training = False
        fused.eval()
        in_inference = compare_outputs(
            "inference output", reference.forward(data), fused(torch.from_numpy(data))
        )
    return in_training and in_inference


def network(layer: type[nn.BatchNorm1d]) -> nn.Sequential:
    """The notebook's network; batch norm has a bias, so the layers before it need none."""
    return nn.Sequential(
        nn.Linear(FEATURES, 50, bias=False),
        layer(50),
        nn.ReLU(),
        nn.Linear(50, 20, bias=False),
        layer(20),
        nn.ReLU(),
        nn.Linear(20, 1),
    )


def train(layer: type[nn.BatchNorm1d], dtype: torch.dtype, epochs: int, seed: int) -> Run:
    """Fit random targets for `epochs` steps on all samples at once, then run five new samples in inference.

    Every number is drawn in float32, so that all runs begin with the same ones.
    """
    torch.manual_seed(seed)
    model = network(layer).to(dtype)
    criterion = nn.MSELoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    inputs = torch.randn(SAMPLES, FEATURES).to(dtype)
    targets = torch.randn(SAMPLES, 1).to(dtype)

    losses = []
    model.train()
    for _ in range(epochs):
        optimizer.zero_grad()
        loss = criterion(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    model.eval()
    with torch.no_grad():
        outputs = model(torch.randn(5, FEATURES).to(dtype))
    return Run(losses, outputs.flatten().tolist())


def largest_difference(left: list[float], right: list[float]) -> float:
    """NaN counts as infinitely far."""
    difference = np.abs(np.subtract(left, right))
    return float(np.nan_to_num(difference, nan=np.inf).max())


def compare_training(dtype: torch.dtype, epochs: int, seed: int) -> bool:
    """The notebook's second half, with our layer and with torch's."""
    ours = train(bnext.BatchNorm1d, dtype, epochs, seed)
    theirs = train(nn.BatchNorm1d, dtype, epochs, seed)
    name = str(dtype).removeprefix("torch.")

    print(f"loss, {name}\n{'epoch':>8}{'bnext':>10}{'torch':>10}")
    for epoch in range(10, epochs + 1, 10):
        print(f"{epoch:8}{ours.losses[epoch - 1]:10.4f}{theirs.losses[epoch - 1]:10.4f}")
    losses = agree(
        f"{name} losses of all epochs", largest_difference(ours.losses, theirs.losses), TOLERANCE[dtype]
    )

    print(f"inference, {name}\n{'sample':>8}{'bnext':>10}{'torch':>10}")
    for sample, (left, right) in enumerate(zip(ours.outputs, theirs.outputs, strict=True), start=1):
        print(f"{sample:8}{left:10.4f}{right:10.4f}")
    outputs = agree(f"{name} outputs", largest_difference(ours.outputs, theirs.outputs), TOLERANCE[dtype])
    return losses and outputs


def main() -> int:
    parser = argparse.ArgumentParser(description="The notebook's two halves, bnext beside NumPy and torch.")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    if options.epochs < 1:
        parser.error("--epochs must be at least 1")

    results = [from_scratch()]
    results += [compare_training(dtype, options.epochs, options.seed) for dtype in TOLERANCE]
    if not all(results):
        print("bnext and its counterpart disagree, see above")
        return 1
    print("everything agrees")
    return 0


if __name__ == "__main__":
    sys.exit(main())
