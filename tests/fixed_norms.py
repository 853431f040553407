"""Layers of fixed statistics, of no class of torch's: as the field writes them, and some that are something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Frozen(nn.Module):
    """As torchvision's FrozenBatchNorm2d."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name, value in (("weight", 1), ("bias", 0), ("running_mean", 0), ("running_var", 1)):
            self.register_buffer(name, torch.full((channels,), float(value)))

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        state.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state, prefix, *rest)

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight.reshape(1, -1, 1, 1)
        b = self.bias.reshape(1, -1, 1, 1)
        rv = self.running_var.reshape(1, -1, 1, 1)
        rm = self.running_mean.reshape(1, -1, 1, 1)
        scale = w * (rv + self.eps).rsqrt()
        bias = b - rm * scale
        return x * scale + bias

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.weight)}, eps={self.eps})"


class Late(Frozen):
    """Vectors first, and an eps that is written out, as DETR's."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * torch.rsqrt(self.running_var + 1e-3)
        shift = self.bias - scale * self.running_mean
        return torch.add(shift.view(1, -1, 1, 1), torch.mul(scale.view(1, -1, 1, 1), x))


class Affine(Frozen):
    """With parameters for weight and bias."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        for name in ("weight", "bias"):
            value = self._buffers.pop(name)
            self.register_parameter(name, nn.Parameter(value))


class Asking(Frozen):
    """Two ways of one thing, and what it is asked of, as detectron2's; and a buffer that is not there."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x: Tensor) -> Tensor:
        state = (self.running_mean, self.running_var, self.weight, self.bias)
        if not x.requires_grad:
            return nn.functional.batch_norm(x, *state, training=False, eps=self.eps)
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        bias = self.bias - self.running_mean * scale
        scale, bias, dtype = scale.reshape(1, -1, 1, 1), bias.reshape(1, -1, 1, 1), x.dtype
        return x * scale.to(dtype) + bias.to(dtype)


class Textbook(Frozen):
    def forward(self, x: Tensor) -> Tensor:
        mean, var = self.running_mean[None, :, None, None], self.running_var[None, :, None, None]
        xhat = (x - mean) / torch.sqrt(var + self.eps)
        return xhat * self.weight[None, :, None, None] + self.bias[None, :, None, None]


class Bare(Frozen):
    """Without an eps, as maskrcnn-benchmark's."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (1 / self.running_var.sqrt())
        bias = self.bias - self.running_mean * scale
        return x * scale.reshape(1, -1, 1, 1) + bias.reshape(1, -1, 1, 1)


FIXED: dict[str, Callable[[int], Frozen]] = {
    "frozen": Frozen,
    "late": Late,
    "affine": Affine,
    "asking": Asking,
    "textbook": Textbook,
    "bare": Bare,
    "nothing added": lambda channels: Frozen(channels, 0.0),
    "an integer": lambda channels: Frozen(channels, 1),
}


class Switched(Frozen):
    """With an attribute that batch norms of ours have too."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.frozen = True

    def train(self, mode: bool = True) -> Any:
        return super().train(mode and not self.frozen)


class Doubled(Frozen):
    """Called otherwise than modules are."""

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super()._call_impl(*args, **kwargs)


class Rebuilt(Frozen):
    """Copied and pickled in a way of its own."""

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.state_dict())

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(len(state["weight"]))  # type: ignore[misc]
        self.load_state_dict(state)


class Itself(Frozen):
    def __deepcopy__(self, memo: Any) -> Any:
        return self


def by(forward: Callable[[Any, Tensor, Tensor, Tensor], Tensor], **state: Any) -> Callable[[], nn.Module]:
    """A layer whose forward is given: of itself, x, scale and shift; what else it holds beside."""

    class Given(Frozen):
        def forward(self, x: Tensor) -> Tensor:
            scale = self.weight * (self.running_var + self.eps).rsqrt()
            shift = self.bias - self.running_mean * scale
            return forward(self, x, scale.reshape(1, -1, 1, 1), shift.reshape(1, -1, 1, 1))

    def make() -> nn.Module:
        layer = Given(3)
        for name, value in state.items():
            layer.register_buffer(name, value) if isinstance(value, Tensor) else setattr(layer, name, value)
        return layer

    return make


def affine(layer: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x * scale + shift


def in_place(layer: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return x.mul_(scale).add_(shift)


def counted(layer: Any, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    layer.weight.add_(0)
    return x * scale + shift


# By what keeps them from being ours.
UNLIKE_FIXED: dict[str, Callable[[], nn.Module]] = {
    "another vector": by(affine, gain=torch.ones(3)),
    "a child": by(affine, after=nn.Identity()),
    "written over x": by(in_place),
    "a state that it writes to": by(counted),
    "the scale twice": by(lambda layer, x, scale, shift: x * scale * scale + shift),
    "another sign": by(lambda layer, x, scale, shift: x * scale - shift),
    "a scaled sum": by(lambda layer, x, scale, shift: torch.add(x * scale, shift, alpha=2)),
    "a number more": by(lambda layer, x, scale, shift: x * scale + shift + 1.0),
    "centered behind": by(
        lambda layer, x, scale, shift: (
            (x * scale - layer.running_mean.reshape(1, -1, 1, 1)) + layer.bias.reshape(1, -1, 1, 1)
        )
    ),
    "divided by the variance": by(
        lambda layer, x, scale, shift: (
            x * (layer.weight / (layer.running_var + 1e-5)).reshape(1, -1, 1, 1) + shift
        )
    ),
    "two numbers": by(
        lambda layer, x, scale, shift: (
            x * (layer.weight * (layer.running_var + 1e-3).rsqrt()).reshape(1, -1, 1, 1) + shift
        )
    ),
    "another dtype": by(lambda layer, x, scale, shift: x * scale.to(torch.bfloat16) + shift),
    "its own dtype": by(lambda layer, x, scale, shift: x * scale.to(scale.dtype) + shift),
    "vectors exchanged": by(
        lambda layer, x, scale, shift: nn.functional.batch_norm(
            x, layer.running_mean, layer.running_var, layer.bias, layer.weight
        )
    ),
    "the batch's statistics": by(
        lambda layer, x, scale, shift: nn.functional.batch_norm(
            x, layer.running_mean, layer.running_var, layer.weight, layer.bias, True, 0.0
        )
    ),
    "a negative eps": lambda: Frozen(3, -1e-5),
    "a call of its own": lambda: Doubled(3),
    "a pickle of its own": lambda: Rebuilt(3),
    "an activation": by(lambda layer, x, scale, shift: (x * scale + shift).relu()),
    "columns instead of channels": by(
        lambda layer, x, scale, shift: x[..., :3] * scale.reshape(1, 1, 1, -1) + shift.reshape(1, 1, 1, -1)
    ),
    "no shift": by(lambda layer, x, scale, shift: x * scale),
    "something else in training": by(
        lambda layer, x, scale, shift: x * scale if layer.training else x * scale + shift
    ),
    "eps behind the root": by(
        lambda layer, x, scale, shift: x * (layer.running_var.rsqrt() + 1e-5).reshape(1, -1, 1, 1) + shift
    ),
    "what is decided by x": by(
        lambda layer, x, scale, shift: x * scale + shift if x.requires_grad else x * scale
    ),
}
