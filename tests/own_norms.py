"""Batch norms of classes of somebody's own: three that compute what ours do, and those that do not."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize


class NormAct(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: torch's function again, then children."""

    def __init__(self, channels: int, act: nn.Module | None = None, **keywords: Any) -> None:
        super().__init__(channels, **keywords)
        self.drop = nn.Identity()
        self.act = nn.Identity() if act is None else act

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        uses_batch = self.training or self.running_mean is None
        x = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            uses_batch,
            self.momentum,
            self.eps,
        )
        return self.act(self.drop(x))


class Of(nn.BatchNorm2d):
    """`after(norm(x))`."""

    def __init__(self, after: Callable[[Tensor], Tensor]) -> None:
        super().__init__(3)
        self.after = after

    def forward(self, x: Tensor) -> Tensor:
        return self.after(super().forward(x))


class Lenient(nn.BatchNorm2d):
    """Of any number of dimensions."""

    def _check_input_dim(self, input: Tensor) -> None:
        pass


def doubled(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, inputs, y: 2 * y)
    return module


class Written(nn.BatchNorm2d):
    """The formula, with a standard deviation that eps is added to."""

    def forward(self, x: Tensor) -> Tensor:
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        return (x - mean) / (variance.sqrt() + self.eps)


class Called(nn.BatchNorm2d):
    """Torch's function, of what is given."""

    def __init__(self, **given: Any) -> None:
        super().__init__(3)
        self.given = given

    def forward(self, x: Tensor) -> Tensor:
        own = {"weight": self.weight, "bias": self.bias, "training": self.training, "eps": self.eps}
        return F.batch_norm(x, self.running_mean, self.running_var, **own | self.given)


class Absolute(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight.abs(), self.bias, self.training, 0.1, self.eps
        )


class Ghost(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and len(x) > 16:
            return torch.cat([self(part) for part in x.split(16)])
        return super().forward(x)


class Warmed(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y if self.num_batches_tracked < 5000 else y.clamp(-1, 1)


class Noisy(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + 0.1 if self.training and random.random() < 1e-3 else y


class Remembering(nn.BatchNorm2d):
    """What it leaves, and where, in training alone."""

    def __init__(self, leave: Callable[[Any, Tensor], object]) -> None:
        super().__init__(3)
        self.leave = leave
        self.sizes: list[Any] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.leave(self, x)
        return super().forward(x)


class Dual(nn.BatchNorm2d):
    """Of adversarial training: which of two it is says a switch."""

    def __init__(self) -> None:
        super().__init__(3)
        self.other, self.uses_other = nn.BatchNorm2d(3), False

    def forward(self, x: Tensor) -> Tensor:
        return self.other(x) if self.uses_other else super().forward(x)


class Ours(nn.BatchNorm2d):
    """With a method whose name is one of ours."""

    def _tensors(self) -> list[Tensor]:
        return [self.weight]


class Scaled(nn.BatchNorm2d):
    def __init__(self) -> None:
        super().__init__(3)
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(super().forward(x))


class Masked(nn.BatchNorm2d):
    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = super().forward(x)
        return y if mask is None else y * mask


class Without(nn.BatchNorm2d):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


class Doubled(nn.BatchNorm2d):
    """Called otherwise than modules are."""

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super()._call_impl(*args, **kwargs)


class Rebuilt(nn.BatchNorm2d):
    """Copied and pickled in a way of its own."""

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.state_dict())

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(len(state["weight"]))  # type: ignore[misc]
        self.load_state_dict(state)


# By what keeps them from being ours.
UNLIKE_OURS: dict[str, Callable[[], nn.Module]] = {
    "a parameter of its own": lambda: NormAct(3, nn.PReLU()),
    "a bound far away": lambda: Of(lambda z: z.clamp(-1e5, 1e5)),
    "a curve that is close": lambda: Of(lambda z: F.gelu(z, approximate="tanh")),
    "a parametrized weight": lambda: parametrize.register_parametrization(
        Lenient(3), "weight", nn.Identity()
    ),
    "a hook on its activation": lambda: NormAct(3, doubled(nn.ReLU())),
    "a formula": lambda: Written(3),
    "no counter": Called,
    "another eps": lambda: Called(eps=1e-4),
    "no weight": lambda: Called(weight=None),
    "always in eval": lambda: Called(training=False),
    "another weight": lambda: Absolute(3),
    "parts of a large batch": lambda: Ghost(3),
    "later something else": lambda: Warmed(3),
    "now and then something else": lambda: Noisy(3),
    "a list that grows": lambda: Remembering(lambda layer, x: layer.sizes.append(1)),
    "a tensor that stays": lambda: Remembering(lambda layer, x: layer.sizes.append(x.mean())),
    "random numbers": lambda: NormAct(3, nn.Dropout(0.01)),
    "another batch norm in it": Dual,
    "a name that is ours": lambda: Ours(3),
    "an attribute that is ours": Scaled,
    "another argument": lambda: Masked(3),
    "no gradient": lambda: Without(3),
    "a call of its own": lambda: Doubled(3),
}
