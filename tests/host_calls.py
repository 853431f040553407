"""Calls of an engine that runs outside of torch, and their results, as files hold them (engines_on_host/call.h)."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields

import numpy as np
import torch
from torch import Tensor

from bnext.functional import ACTIVATIONS
from bnext.reference_activations import parameter
from problem import Problem

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]  # as in csrc/storage.h
NUMBERED = ["none", *ACTIVATIONS]  # as in csrc/activation.h
MASKED = ["relu", "leaky_relu", "relu6"]  # is_masked
ENGINES = ["automatic", "streaming", "resident"]
ORDERS = ["ascending", "descending", "random"]
PLACES = ["zones", "first", "last"]  # as in engines_on_host/buffers.h

# One launch of each kernel, of every type: (shape, layout). Rows of odd and of whole vectors, joined rows, short runs
# of channels as rows, planes of odd and of whole vectors.
SMALL = [
    ((40, 5), "nc"),
    ((33, 16), "nc"),
    ((5, 33, 3, 3), "nchw"),
    ((3, 3, 17, 31), "nchw"),
    ((2, 2, 16, 24), "nchw"),
    ((3, 7, 5, 4), "nhwc"),
]

# Elements off where a place has them, `zones` on a boundary of 16 bytes: x, dy and outputs; residual and its gradient.
SHIFTS = [
    ((0, 0, 0), (0, 0)),
    ((1, 0, 1), (1, 0)),
    ((0, 0, 0), (1, 1)),
    ((0, 1, 1), (0, 0)),
    ((0, 0, 3), (2, 1)),
    ((1, 1, 1), (1, 1)),
]


@dataclass(frozen=True)
class Schedule:
    """Of a CUDA call: in which order threads and blocks run, and for what a device the plan is.

    Small ones cut small tensors.
    """

    order: str = "ascending"
    seed: int = 0
    resident_blocks: int = 4
    multiprocessors: int = 3
    block_threads: int = 64
    l2: int = 1 << 20
    shared_memory: int = 48 << 10
    multiprocessor_memory: int = 49 << 10
    cluster_blocks: int = 1
    bulk_copies: bool = False
    early_launches: bool = True
    engine: str = "streaming"


@dataclass(frozen=True)
class Processor:
    """Of a CPU call: for what a machine the plan is; caches in bytes, as in csrc/plan.h."""

    threads: int = 1
    first_cache: int = 48 << 10
    private_cache: int = 1 << 20
    shared_cache: int = 0
    cache_of_host: bool = False


@dataclass(frozen=True)
class Fault:
    """What is planted into the run, see cuda_on_host/model.h and, for the last two, engines_on_host/call.h."""

    skip_barrier: int = -1
    early_arrival: bool = False
    displace_stores: int = 0
    tear_atomics: bool = False
    skip_group_barrier: bool = False
    skip_async_wait: bool = False
    skip_previous: bool = False
    unordered_wait: int = -1
    overlap: int = 0
    lacking: int = 0


@dataclass
class HostCall:
    """Forward and, unless `backward` is False, backward of a problem whose x is dense in an order kernels know.

    Forward leaves a mask where an activation has one and there is a residual, or not `keeps_input`, and backward uses
    it, unless `mask` is False. An `inplace` problem has its output written over x, and backward goes by that.
    """

    problem: Problem
    schedule: Schedule = Schedule()
    fault: Fault = Fault()
    backward: bool = True
    wanted: tuple[bool, bool, bool] = (True, True, True)  # dx, dweight, dbias
    shifts: tuple[int, int, int] = (0, 0, 0)  # elements off where `place` has them: x, dy, outputs
    residual_shifts: tuple[int, int] = (0, 0)  # the same: residual, dresidual
    mask: bool = True
    keeps_input: bool = True
    spoils_input: bool = False  # between forward and backward x becomes NaN
    phases: bool = (
        False  # moments, normalize, grad_sums, input_grad as calls of their own, for a batch's statistics
    )
    counter: int | None = None
    place: str = "zones"  # of PLACES; `last` has no shifts
    processor: Processor = Processor()

    @property
    def channels_last(self) -> bool:
        return not self.problem.x.is_contiguous()

    @property
    def masked(self) -> bool:
        beside = self.problem.residual is not None or not self.keeps_input
        return self.mask and beside and self.problem.activation in MASKED

    @property
    def wants(self) -> list[bool]:
        """dx, dweight, dbias, dresidual: the last beside dx, where it is not dy itself."""
        p = self.problem
        dresidual = self.wanted[0] and p.residual is not None and p.activation is not None
        return [self.backward and want for want in (*self.wanted, dresidual)]

    def _bytes(self, tensor: Tensor) -> bytes:
        dense = tensor.movedim(1, -1) if tensor.dim() > 1 and self.channels_last else tensor
        return dense.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()

    def encode(self) -> bytes:
        """As engines_on_host/call.h reads it."""
        p, x = self.problem, self.problem.x
        inner = x.shape[2:].numel()
        extent = (
            (x.shape[0] * inner, x.shape[1], 1) if self.channels_last else (x.shape[0], x.shape[1], inner)
        )
        vectors = [p.weight, p.bias, p.running_mean, p.running_var]
        vector_dtype = next((v.dtype for v in vectors if v is not None), torch.float32)
        s = self.schedule
        integers = [
            *extent,
            DTYPES.index(x.dtype),
            DTYPES.index(vector_dtype),
            p.residual is not None,
            p.weight is not None,
            p.bias is not None,
            p.running_mean is not None,
            self.counter is not None,
            p.batch,
            p.momentum is None,
            p.unbiased,
            p.skip_nonfinite,
            p.inplace,
            self.masked,
            self.spoils_input,
            self.backward,
            *self.wants,
            *self.shifts,
            *self.residual_shifts,
            PLACES.index(self.place),
            ORDERS.index(s.order),
            s.seed,
            s.resident_blocks,
            s.multiprocessors,
            s.block_threads,
            s.l2,
            s.shared_memory,
            s.multiprocessor_memory,
            s.cluster_blocks,
            s.bulk_copies,
            s.early_launches,
            ENGINES.index(s.engine),
            *astuple(self.processor),
            self.phases,
            *astuple(self.fault),
            NUMBERED.index(p.activation or "none"),
        ]
        doubles = [p.eps, p.momentum or 0.0, parameter(p.activation, p.activation_param)]
        head = struct.pack(f"{len(integers)}q{len(doubles)}d", *map(int, integers), *doubles)
        tensors = [x, p.dy if self.backward else None, p.residual, *vectors]
        counter = b"" if self.counter is None else struct.pack("q", self.counter)
        return head + b"".join(self._bytes(t) for t in tensors if t is not None) + counter


@dataclass
class Result:
    y: Tensor
    mask: Tensor | None
    stats: Tensor
    running_mean: Tensor | None
    running_var: Tensor | None
    counter: int | None
    dx: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None
    dresidual: Tensor | None
    took: list[list[int]]  # what the engine says of forward, of backward

    # Of the CUDA engine.
    @property
    def launches(self) -> list[int]:
        """Kernels."""
        return [launches for launches, _, _, _ in self.took]

    @property
    def waiting(self) -> list[int]:
        """Blocks that wait for each other."""
        return [waiting for _, waiting, _, _ in self.took]

    @property
    def cluster(self) -> list[int]:
        """Blocks of a cluster."""
        return [cluster for _, _, cluster, _ in self.took]

    @property
    def bulk(self) -> list[int]:
        """Whether copies are in bulk."""
        return [bulk for _, _, _, bulk in self.took]

    def bits(self) -> bytes:
        tensors = [
            getattr(self, field.name) for field in fields(self) if field.name not in ("counter", "took")
        ]
        return b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in tensors if t is not None)

    def passes(self) -> Tensor:
        """The mask's bits, in the shape of y."""
        assert self.mask is not None
        bits = np.unpackbits(self.mask.numpy(), bitorder="little")
        return torch.from_numpy(bits[: self.y.numel()]).as_strided(self.y.shape, self.y.stride()).bool()


class Reader:
    """What call.h has written, result after result."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        count = dtype.itemsize * int(torch.Size(shape).numel())
        part = bytearray(self.data[self.at : self.at + count])
        assert len(part) == count, "the results end too early"
        self.at += count
        return torch.frombuffer(part, dtype=dtype).view(shape) if count else torch.empty(shape, dtype=dtype)

    def result(self, call: HostCall) -> Result:
        p, x = call.problem, call.problem.x
        channels, last = x.shape[1], [x.shape[0], *x.shape[2:], x.shape[1]]

        def like_x() -> Tensor:
            if call.channels_last:
                return self.tensor(last, x.dtype).movedim(-1, 1)
            return self.tensor(x.shape, x.dtype)

        def vector(given: Tensor | None) -> Tensor | None:
            return None if given is None else self.tensor([channels], given.dtype)

        grads = torch.float64 if x.dtype == torch.float64 else torch.float32
        want = call.wants
        return Result(
            y=like_x(),
            mask=self.tensor([x.numel() // 32 * 4 + 8], torch.uint8) if call.masked else None,
            stats=self.tensor([4 if call.backward else 2, channels], torch.float64),
            running_mean=vector(p.running_mean),
            running_var=vector(p.running_var),
            counter=None if call.counter is None else int(self.tensor([1], torch.int64)),
            dx=like_x() if want[0] else None,
            dweight=self.tensor([channels], grads) if want[1] else None,
            dbias=self.tensor([channels], grads) if want[2] else None,
            dresidual=like_x() if want[3] else None,
            took=self.tensor([2, 4], torch.int64).tolist(),
        )
