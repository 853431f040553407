"""The implementations, each called at its best. A new one is a function and a row of IMPLEMENTATIONS.

bnext            our module: one call, with the activation and the residual of a variant that has them
eager            torch.nn.BatchNorm*, and torch's activation after it; with a residual as residual networks are written,
                 the sum and the activation in place
compile          the same under torch.compile, for the one shape, nothing recompiled while the clock runs
onednn           the eager layer on mkldnn tensors. torch's binding trains in four dimensions only, so any rank
                 is viewed as (N, C, ., .), and channels_last as (N*H*W, C, 1, 1): the same memory, and
                 oneDNN's vectorised kernel takes it, as it takes no planes
onednn_blocked   the same in the format that oneDNN's convolutions hand on (nChw16c or nChw8c). No strided
                 tensor has it, so a model is in it from end to end or pays for the reordering
clone, copy_     what moving the tensor once costs: into new memory, into existing memory
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.shapes import Case

ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU}  # those of shapes.VARIANTS, as layers of torch


class Unsupported(Exception):
    """This implementation cannot run this case; the text says why."""


class Data(NamedTuple):
    """The tensors of a case."""

    x: Tensor
    dy: Tensor
    residual: Tensor | None = None

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """What the layer is called with."""
        return (self.x,) if self.residual is None else (self.x, self.residual)


@dataclass
class Subject:
    """One implementation, ready to run one case."""

    name: str
    call: Callable[..., Tensor]
    inputs: tuple[Tensor, ...]  # x, and the residual if there is one
    dy: Tensor
    module: nn.Module | None = None  # None: a copy, without gradients
    dense: Callable[[Tensor], Tensor] = field(
        default=lambda tensor: tensor
    )  # to a strided tensor of the case's shape

    @property
    def wanted(self) -> tuple[Tensor, ...]:
        """What a training step differentiates by: x, residual, weight, bias, the latter unless they are frozen."""
        assert self.module is not None
        return (*self.inputs, *(p for p in self.module.parameters() if p.requires_grad))


class ResidualLayer(nn.Module):
    """activation(norm(x) + residual) as torchvision's ResNet writes it: nothing is kept that need not be."""

    def __init__(self, norm: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.norm, self.activation = norm, activation

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        y: Tensor = self.norm(x)
        y += residual
        activated: Tensor = self.activation(y)
        return activated


def data(case: Case) -> Data:
    """The tensors of the case. Mean and scale of x differ between channels: none is normalized already."""
    generator = torch.Generator().manual_seed(0)
    per_channel = (1, -1) + (1,) * (len(case.shape) - 2)
    mean = torch.randn(case.shape[1], generator=generator).view(per_channel)
    std = torch.rand(case.shape[1], generator=generator).view(per_channel) + 0.5

    def place(tensor: Tensor) -> Tensor:
        return tensor.to(case.torch_dtype).contiguous(memory_format=case.memory_format)

    x = torch.randn(case.shape, generator=generator)
    dy = torch.randn(case.shape, generator=generator)
    residual = place(torch.randn(case.shape, generator=generator)) if case.residual else None
    return Data(place(x.mul_(std).add_(mean)), place(dy), residual)


def _fill(module: nn.Module, case: Case) -> nn.Module:
    """Weights and running statistics as in the middle of a training, the same for every implementation."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                value = torch.rand(tensor.shape, generator=generator)
                tensor.copy_(value + 0.5 if name.endswith(("weight", "running_var")) else value - 0.5)
    return module.train(case.training).requires_grad_(case.operation != "frozen")


def norm_module(case: Case, rank: int | None = None, dtype: torch.dtype | None = None) -> nn.Module:
    """torch's batch norm for the case; `rank` and `dtype` stand in for the tensor's and the parameters' own."""
    layers = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
    layer = layers[rank or len(case.shape)]
    return _fill(layer(case.shape[1], dtype=dtype or case.parameter_dtype), case)


def eager_module(
    case: Case, rank: int | None = None, dtype: torch.dtype | None = None, activated: bool = True
) -> nn.Module:
    """torch's layers for the case; not `activated`: up to the activation's input."""
    norm = norm_module(case, rank, dtype)
    kind = ACTIVATIONS[case.activation] if activated and case.activation is not None else None
    if case.residual:
        return ResidualLayer(norm, nn.Identity() if kind is None else kind(inplace=True))
    return norm if kind is None else nn.Sequential(norm, kind())


def scheduled_bytes(case: Case) -> int | None:
    """What bnext's call moves to and from memory as it is scheduled here; None without bnext."""
    try:
        import bnext
    except ImportError:
        return None
    both = (False, True)
    passes = {"forward": (False,), "backward": (True,), "step": both, "eval": (False,), "frozen": both}
    return sum(
        bnext.plan(
            case.shape,
            case.torch_dtype,
            case.layout,
            training=case.training,
            backward=backward,
            residual=case.residual,
            activation=case.activation,
            frozen=case.operation == "frozen",
        ).bytes_moved
        for backward in passes[case.operation]
    )


def _bnext(case: Case, data: Data) -> Subject:
    try:
        import bnext
    except ImportError as error:
        raise Unsupported(str(error)) from error
    layers = {2: bnext.BatchNorm1d, 3: bnext.BatchNorm1d, 4: bnext.BatchNorm2d, 5: bnext.BatchNorm3d}
    layer = layers[len(case.shape)](case.shape[1], dtype=case.parameter_dtype, activation=case.activation)
    module = _fill(layer, case).to(data.x.device)
    return Subject("bnext", module, data.inputs, data.dy, module)


def _eager(case: Case, data: Data) -> Subject:
    module = eager_module(case).to(data.x.device)
    return Subject("eager", module, data.inputs, data.dy, module)


def _compile(case: Case, data: Data) -> Subject:
    torch.compiler.reset()  # past a number of shapes, torch would run the rest in eager mode without a word
    module = eager_module(case).to(data.x.device)
    compiled = torch.compile(module, dynamic=False, fullgraph=True)
    return Subject("compile", compiled, data.inputs, data.dy, module)


def _onednn(case: Case, data: Data) -> Subject:
    _require_onednn(case)
    module = eager_module(case, rank=4)
    channels = case.shape[1]

    def enter(tensor: Tensor) -> Tensor:
        if case.layout == "channels_last":
            return tensor.movedim(1, -1).reshape(-1, channels, 1, 1).to_mkldnn()
        return tensor.reshape(
            case.shape[0], channels, -1, tensor.shape[-1] if tensor.dim() > 2 else 1
        ).to_mkldnn()

    def leave(tensor: Tensor) -> Tensor:
        tensor = tensor.to_dense()
        if case.layout == "channels_last":
            return tensor.view(case.shape[0], *case.shape[2:], channels).movedim(-1, 1)
        return tensor.view(case.shape)

    return Subject("onednn", module, tuple(map(enter, data.inputs)), enter(data.dy), module, leave)


def _onednn_blocked(case: Case, data: Data) -> Subject:
    if case.layout != "contiguous" or len(case.shape) < 3:
        raise Unsupported("rows are a format of oneDNN's own, see onednn")
    subject = _onednn(case, data)
    subject.name = "onednn_blocked"
    ones = torch.ones(case.shape[1], 1, 1, 1, dtype=case.torch_dtype).to_mkldnn()

    def block(tensor: Tensor) -> Tensor:
        """A depthwise 1x1 convolution by ones: the same values, in the format that oneDNN prefers here."""
        return torch.mkldnn_convolution(tensor, ones, None, [0, 0], [1, 1], [1, 1], case.shape[1])

    with torch.no_grad():
        subject.inputs, subject.dy = tuple(map(block, subject.inputs)), block(subject.dy)
    return subject


def _require_onednn(case: Case) -> None:
    if case.operation == "frozen":
        raise Unsupported("torch's batch norm on mkldnn tensors has a backward in training alone")
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        raise Unsupported("torch was built without oneDNN")
    if case.dtype not in ("float32", "bfloat16"):
        raise Unsupported("torch's batch norm takes mkldnn tensors of float32 and bfloat16 only")
    if case.dtype == "bfloat16" and "AVX512" not in torch.backends.cpu.get_cpu_capability():
        raise Unsupported("torch's batch norm takes mkldnn tensors of bfloat16 with AVX-512 only")


def _clone(case: Case, data: Data) -> Subject:
    return Subject("clone", torch.clone, (data.x,), data.dy)


def _copy(case: Case, data: Data) -> Subject:
    y = torch.empty_like(data.x)
    return Subject("copy_", y.copy_, (data.x,), data.dy)


IMPLEMENTATIONS: dict[str, Callable[[Case, Data], Subject]] = {
    "bnext": _bnext,
    "eager": _eager,
    "compile": _compile,
    "onednn": _onednn,
    "onednn_blocked": _onednn_blocked,
    "clone": _clone,
    "copy_": _copy,
}
COPIES = ("clone", "copy_")


def build(name: str, case: Case, data: Data) -> Subject:
    """The implementation on the case's data; raises Unsupported. Tensors are shared where formats allow."""
    subject = IMPLEMENTATIONS[name](case, data)
    if subject.module is not None:
        subject.inputs = tuple(tensor.detach().requires_grad_(case.learns) for tensor in subject.inputs)
    return subject
