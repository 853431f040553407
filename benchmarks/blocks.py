"""A stack of conv-BN-activation blocks in training, and its memory in bytes: what autograd keeps, and the peak.

Nothing is sampled: both are counts, the same on a busy machine.

kept    storages that autograd saved in the forward pass, each once, as `saved_tensors_hooks` sees them. What was there
        before does not count: parameters, buffers, the stack's own input.
peak    the most that was allocated at a time during forward and backward. torch's allocator and bnext's report every
        allocation and release to the profiler, and their running sum is taken: temporaries inside an operator count,
        gradients too, and memory that an allocator holds for reuse does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

import bnext
from benchmarks.shapes import Shape

# Error relative to the right values, both as Euclidean norms: wrong results are to be caught, not the few elements near
# leaky_relu's kink for which another rounding takes the other slope.
TOLERANCE = 1e-2
ACTIVATIONS: dict[str, type[nn.Module] | None] = {"leaky_relu": nn.LeakyReLU, "elu": nn.ELU, "none": None}


def _torch(channels: int, activation: str, inplace: bool) -> nn.Module:
    norm, kind = nn.BatchNorm2d(channels), ACTIVATIONS[activation]
    return norm if kind is None else nn.Sequential(norm, kind(inplace=inplace))


def _bnext(channels: int, activation: str, inplace: bool) -> nn.Module:
    fused = None if ACTIVATIONS[activation] is None else activation
    return bnext.BatchNorm2d(channels, activation=fused, inplace=inplace)


# What follows a convolution: how it is made, and whether in place (torch: the activation; bnext: all of it).
IMPLEMENTATIONS: dict[str, tuple[Callable[[int, str, bool], nn.Module], bool]] = {
    "torch": (_torch, False),
    "torch in place": (_torch, True),
    "bnext": (_bnext, False),
    "bnext in place": (_bnext, True),
}
PEERS = ("torch", "torch in place")
SUBJECT = "bnext in place"


@dataclass(frozen=True)
class Count:
    """Bytes of one implementation."""

    activation: str
    implementation: str
    kept: int
    peak: int


class Stack:
    """k blocks in the middle of a network, from one seed whatever the implementation: its input needs a gradient."""

    def __init__(self, implementation: str, activation: str, shape: Shape, blocks: int) -> None:
        torch.manual_seed(0)
        make, inplace = IMPLEMENTATIONS[implementation]
        channels = shape[1]
        self.model = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                    make(channels, activation, inplace),
                )
                for _ in range(blocks)
            )
        )
        self.x = torch.randn(shape, requires_grad=True)
        self.dy = torch.randn(shape)

    def forward(self) -> Tensor:
        y: Tensor = self.model(self.x)
        return y

    def step(self) -> tuple[Tensor, ...]:
        """y, dx and the gradients of the parameters."""
        y = self.forward()
        return (y, *torch.autograd.grad(y, (self.x, *self.model.parameters()), self.dy))

    @property
    def before(self) -> Iterable[Tensor]:
        return (self.x, self.dy, *self.model.parameters(), *self.model.buffers())


def kept_bytes(forward: Callable[[], Tensor], before: Iterable[Tensor]) -> int:
    """Of the storages that autograd saves in `forward`, but for those of the tensors `before` it."""
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()  # while it lives so does what was saved, and no address is used twice
    for tensor in before:
        sizes.pop(tensor.untyped_storage().data_ptr(), None)
    del y
    return sum(sizes.values())


def allocated_bytes(call: Callable[[], object]) -> tuple[int, int]:
    """(the most at a time, at the end while the result is held), over what was allocated before the call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    sums = list(accumulate((event.nbytes() for event in events), initial=0))
    del result
    return max(sums), sums[-1]


def names(activation: str) -> list[str]:
    """The implementations that differ with this activation."""
    plain = ACTIVATIONS[activation] is None
    return [name for name in IMPLEMENTATIONS if not (plain and name == PEERS[1])]


def _off(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def count(activation: str, shape: Shape, blocks: int) -> list[Count]:
    """Every implementation; raises ArithmeticError where results are not torch's."""
    counts = []
    expected = Stack("torch", activation, shape, blocks).step()[:2]
    for name in names(activation):
        stack = Stack(name, activation, shape, blocks)
        for what, found, right in zip(("y", "dx"), stack.step()[:2], expected, strict=True):
            if not _off(found, right) <= TOLERANCE:
                raise ArithmeticError(f"{activation}, {name}: {what} is off by {_off(found, right):.2g}")
        del found
        kept = kept_bytes(stack.forward, stack.before)
        counts.append(Count(activation, name, kept, allocated_bytes(stack.step)[0]))
    return counts


def saved(counts: Sequence[Count], peer: str, quantity: str = "kept", subject: str = SUBJECT) -> float | None:
    """The share of the peer's bytes that the subject does without; None where the peer was not counted."""
    by_name = {one.implementation: getattr(one, quantity) for one in counts}
    return 1 - by_name[subject] / by_name[peer] if peer in by_name else None


def least_saved(counts: Sequence[Count]) -> float:
    """Of what torch keeps at its best, with one activation."""
    return min(share for peer in PEERS if (share := saved(counts, peer)) is not None)
