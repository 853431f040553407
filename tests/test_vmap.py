"""torch.vmap over the operators: what a loop over the examples gives, in outputs, gradients and buffers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, stack_module_state, vmap

import bnext
from bnext.functional import batch_norm
from cases import INVERTIBLE, Active
from composed import Form, close

COUNT = 3
ACTIVE = [None, Active("relu"), Active("leaky_relu"), Active("silu")]
SHAPES = {"x": (5, 4, 2, 3), "residual": (5, 4, 2, 3), "weight": (4,), "bias": (4,)}

# Which arguments differ from example to example, and along which dimension these lie.
MAPPED = [
    {"x": 0},
    {"x": 1, "weight": 0, "bias": 0},
    {"x": 4, "residual": 2},
    {"weight": 1},
    {"residual": 0, "bias": 0},
]


def ids(mapped: dict[str, int]) -> str:
    return "_".join(f"{name}{dim}" for name, dim in mapped.items())


def make(mapped: dict[str, int], device: str, residual: bool = True) -> dict[str, Tensor]:
    """x, weight, bias and residual; of the mapped ones, COUNT examples along that dimension."""
    generator = torch.Generator().manual_seed(11)
    made = {}
    for name, shape in SHAPES.items():
        if name == "residual" and not residual:
            continue
        one = torch.randn(COUNT, *shape, generator=generator, dtype=torch.float64).to(device)
        made[name] = one.movedim(0, mapped[name]).contiguous() if name in mapped else one[0].contiguous()
    return made


def looped(function: Callable[..., Any], given: dict[str, Tensor], mapped: dict[str, int]) -> Any:
    """What vmap promises."""
    results = [
        function({n: t.select(mapped[n], i).clone() if n in mapped else t for n, t in given.items()})
        for i in range(COUNT)
    ]
    if isinstance(results[0], Tensor):
        return torch.stack(results)
    return {name: torch.stack([result[name] for result in results]) for name in results[0]}


def dims(given: dict[str, Tensor], mapped: dict[str, int]) -> tuple[dict[str, int | None]]:
    return ({name: mapped.get(name) for name in given},)


@pytest.mark.parametrize("mapped", MAPPED, ids=ids)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
@pytest.mark.parametrize("active", ACTIVE, ids=str)
def test_outputs_and_gradients(
    active: Active | None, residual: bool, training: bool, mapped: dict[str, int], device: str
) -> None:
    """Of each example, and of their sum."""
    if not residual and "residual" in mapped:
        mapped = {name: dim for name, dim in mapped.items() if name != "residual"}
    given = make(mapped, device, residual)
    running = (torch.linspace(-1, 1, 4), torch.linspace(0.3, 2, 4))
    form = Form(active, None if training else tuple(t.to(device, torch.float64) for t in running))

    def output(tensors: dict[str, Tensor]) -> Tensor:
        return form.ours(**tensors)

    def gradients(tensors: dict[str, Tensor]) -> Any:
        return grad(lambda t: output(t).sin().sum())(tensors)

    def total(tensors: dict[str, Tensor], over: Callable[..., Any]) -> Tensor:
        result: Tensor = over(tensors).sin().sum()
        return result

    in_dims = dims(given, mapped)
    for function in (output, gradients):
        close(vmap(function, in_dims)(given), looped(function, given, mapped))
    ours = grad(lambda t: total(t, vmap(output, in_dims)))(given)
    close(ours, grad(lambda t: total(t, lambda g: looped(output, g, mapped)))(given))


@pytest.mark.parametrize("momentum", [0.1, 0.0, None])
@pytest.mark.parametrize("own_x", [True, False])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("residual", [False, True], ids=["alone", "residual"])
def test_ensemble(
    residual: bool, layout: torch.memory_format, own_x: bool, momentum: float | None, device: str
) -> None:
    """Layers at once, each with statistics of its own, in training and then in eval, are the layers one by one."""

    def layers() -> list[bnext.BatchNorm2d]:
        made = [bnext.BatchNorm2d(4, momentum=momentum, activation="relu") for _ in range(COUNT)]
        for i, layer in enumerate(made):
            nn.init.constant_(layer.weight, 1 + i)
            layer.num_batches_tracked += 2 * i
            layer.to(device, torch.float64)
        return made

    alone = layers()
    parameters, buffers = stack_module_state(layers())
    generator = torch.Generator().manual_seed(1)
    for training in (True, True, False):
        x = torch.randn(COUNT, 5, 4, 2, 3, generator=generator, dtype=torch.float64).to(device)
        xs = [one.contiguous(memory_format=layout) for one in (x if own_x else x[:1].expand_as(x))]
        given = torch.stack(xs) if own_x else xs[0]
        template = alone[0].train(training)
        added = (torch.ones(5, 4, 2, 3, device=device, dtype=torch.float64),) * residual

        def step(
            p: Any, b: Any, one: Tensor, layer: nn.Module = template, more: tuple[Tensor, ...] = added
        ) -> Any:
            def loss(p: Any) -> tuple[Tensor, Tensor]:
                y = functional_call(layer, (p, b), (one, *more))
                return y.sin().sum(), y

            return grad(loss, has_aux=True)(p)

        grads, y = vmap(step, (0, 0, 0 if own_x else None))(parameters, buffers, given)
        for i, layer in enumerate(alone):
            layer.train(training).zero_grad()
            expected = layer(xs[i], *added)
            expected.sin().sum().backward()
            close(y[i], expected.detach())
            for name, parameter in layer.named_parameters():
                close(grads[name][i].detach(), parameter.grad)
            for name, buffer in layer.named_buffers():
                close(buffers[name][i], buffer)


@pytest.mark.parametrize(
    "shared", [["num_batches_tracked"], ["running_mean", "running_var", "num_batches_tracked"]]
)
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("inside", [False, True], ids=["outputs", "gradients"])
def test_what_examples_share_is_updated_once(
    inside: bool, momentum: float | None, shared: list[str], device: str
) -> None:
    """As by one call: weights that differ do not touch the statistics, and a batch is a batch."""
    given = make({"weight": 0}, device)
    layer = bnext.BatchNorm2d(4, momentum=momentum, affine=False, device=device, dtype=torch.float64)
    layer(given["x"].sin())
    buffers = {
        name: b.clone() if name in shared else b.expand(COUNT, *b.shape).clone()
        for name, b in layer.named_buffers()
    }

    def output(w: Tensor, b: dict[str, Tensor]) -> Tensor:
        options: dict[str, Any] = {"momentum": momentum, "residual": given["residual"], "activation": "relu"}
        return batch_norm(given["x"], weight=w, training=True, **options, **b)

    function = grad(lambda w, b: output(w, b).sum()) if inside else output
    vmap(function, (0, {name: None if name in shared else 0 for name in buffers}))(given["weight"], buffers)
    layer(given["x"])
    for name, buffer in layer.named_buffers():
        for copy in [buffers[name]] if name in shared else buffers[name]:
            close(copy, buffer)


@pytest.mark.parametrize("dim", [0, 1, 3])
@pytest.mark.parametrize("active", INVERTIBLE, ids=str)
def test_inplace(active: Active | None, dim: int, device: str) -> None:
    mapped = {"x": dim, "weight": 0}
    given = make(mapped, device, residual=False)
    options = (
        {}
        if active is None
        else {"activation": active.activation, "activation_param": active.activation_param}
    )

    def write(tensors: dict[str, Tensor], inplace: bool = True) -> Tensor:
        x = tensors["x"] * 1
        tensors = {**tensors, "x": x}
        names = {"input" if name == "x" else name: t for name, t in tensors.items()}
        y = batch_norm(
            **names, running_mean=None, running_var=None, training=True, inplace=inplace, **options
        )
        assert (y is x) == inplace
        return y

    def gradients(tensors: dict[str, Tensor]) -> Any:
        return grad(lambda t: write(t).sin().sum())(tensors)

    close(vmap(write, dims(given, mapped))(given), looped(lambda t: write(t, False), given, mapped))
    close(vmap(gradients, dims(given, mapped))(given), looped(gradients, given, mapped))
    before = given["x"].clone()
    x = given["x"]
    vmap(lambda x: batch_norm(x, None, None, training=True, inplace=True), dim)(x)  # over the given memory
    close(x, torch.stack([batch_norm(one, None, None, training=True) for one in before.unbind(dim)], dim))
