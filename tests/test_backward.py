"""The backward pass against the float64 reference; the layout of dx; what is kept, and what may change meanwhile."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import bnext
from cases import (
    BFLOAT16_WITH_FLOAT32,
    DTYPES,
    EVAL,
    EXTREMES,
    FLOAT32,
    FLOAT64,
    KEPT_LAYOUTS,
    KEPT_OF_RANK,
    LAYOUT,
    LAYOUTS,
    MATRICES,
    MODES,
    PARAMETERS,
    SHAPE_OF_RANK,
    SHORT_PLANES,
    SIZES,
    TRAIN,
    VOLUMES,
    Dtypes,
    Layout,
    Mode,
    misaligned,
)
from problem import make


@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda names: "+".join(names) or "plain")
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_matrix(layout: Layout, dtypes: Dtypes, mode: Mode, parameters: tuple[str, ...], device: str) -> None:
    problem = make(SHAPE_OF_RANK[layout.rank], layout, dtypes, mode, parameters, device=device)
    problem.require_grad()
    problem.forward().backward(problem.dy)
    problem.check_grads()


@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16_WITH_FLOAT32], ids=str)
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("shape", [*SIZES, *SHORT_PLANES], ids=str)
def test_sizes(shape: tuple[int, ...], layout: str, dtypes: Dtypes, device: str) -> None:
    problem = make(shape, LAYOUT[layout], dtypes, TRAIN, device=device)
    problem.require_grad()
    problem.forward().backward(problem.dy)
    problem.check_grads()


@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16_WITH_FLOAT32], ids=str)
@pytest.mark.parametrize("shape", MATRICES + VOLUMES + EXTREMES, ids=str)
@pytest.mark.parametrize("mode", MODES, ids=str)
def test_other_ranks_and_extremes(shape: tuple[int, ...], mode: Mode, dtypes: Dtypes, device: str) -> None:
    for layout in KEPT_OF_RANK[len(shape)]:
        problem = make(shape, layout, dtypes, mode, device=device)
        problem.require_grad()
        problem.forward().backward(problem.dy)
        problem.check_grads()


SUBSETS = [c for n in (1, 2, 3) for c in itertools.combinations(("x", "weight", "bias"), n)]


@pytest.mark.parametrize("wanted", SUBSETS, ids="+".join)
@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("layout", ["nc", "nchw", "nhwc"])
def test_any_subset(layout: str, mode: Mode, wanted: tuple[str, ...], device: str) -> None:
    problem = make(SHAPE_OF_RANK[LAYOUT[layout].rank], LAYOUT[layout], FLOAT32, mode, device=device)
    problem.require_grad(*wanted)
    problem.forward().backward(problem.dy)
    problem.check_grads()
    for name in {"x", "weight", "bias"} - set(wanted):
        assert getattr(problem, name).grad is None


def test_no_gradient_asked(device: str) -> None:
    problem = make((4, 3), LAYOUT["nc"], FLOAT32, TRAIN, device=device)
    assert not problem.forward().requires_grad
    problem.require_grad()
    with torch.no_grad():
        assert not problem.forward().requires_grad


# The gradient that comes back has the layout of what consumed y, whatever y's own is.
INCOMING: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda dy: dy.contiguous(),
    "channels_last": lambda dy: dy.contiguous(memory_format=torch.channels_last),
    "expanded": lambda dy: dy[:1, :1, :1, :1].expand(dy.shape),
    "expanded_planes": lambda dy: dy[:, :, :1, :1].expand(dy.shape),
    "transposed": lambda dy: dy.transpose(2, 3).contiguous().transpose(2, 3),
    "misaligned": misaligned,
    "sliced": lambda dy: torch.nn.functional.pad(dy, (1, 1))[..., 1:-1],
}


@pytest.mark.parametrize("mode", [TRAIN, EVAL], ids=str)
@pytest.mark.parametrize("incoming", INCOMING)
@pytest.mark.parametrize("layout", ["nchw", "nhwc", "hwnc"])
def test_dx_has_the_layout_of_x(layout: str, incoming: str, mode: Mode, device: str) -> None:
    problem = make((3, 5, 4, 6), LAYOUT[layout], FLOAT32, mode, device=device)
    problem.dy = INCOMING[incoming](problem.dy)
    leaves = problem.require_grad()
    # Not through .grad, which follows the layout of the leaf in any case.
    dx, dweight, dbias = torch.autograd.grad(problem.forward(), leaves, problem.dy)
    problem.check_input_grad(dx)
    problem.check_weight_grad(dweight)
    problem.check_bias_grad(dbias)
    assert dx.is_contiguous(memory_format=LAYOUT[layout].kept)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_dx_of_a_sum(layout: Layout, device: str) -> None:
    """`y.sum().backward()` sends one number, expanded: dense dx in the layout the input has, and zero in training."""
    problem = make(SHAPE_OF_RANK[layout.rank], layout, FLOAT64, TRAIN, device=device)
    problem.dy = torch.ones((), dtype=torch.float64, device=device).expand(problem.x.shape)
    leaves = problem.require_grad()
    dx, *_ = torch.autograd.grad(problem.forward().sum(), leaves)
    problem.check_input_grad(dx)
    assert dx.is_contiguous(memory_format=layout.kept)


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4)], ids=str)
def test_empty(shape: tuple[int, ...], mode: Mode, device: str) -> None:
    layer = torch.nn.ParameterList([torch.ones(3, device=device), torch.ones(3, device=device)])
    running = (torch.zeros(3, device=device), torch.ones(3, device=device)) if mode.tracked else (None, None)
    x = torch.empty(shape, device=device, requires_grad=True)
    bnext.functional.batch_norm(x, *running, *layer, mode.batch).sum().backward()
    assert x.grad is not None and x.grad.shape == shape
    for parameter in layer:
        assert torch.equal(parameter.grad, torch.zeros(3, device=device))


def test_derivatives_of_an_empty_batch(device: str) -> None:
    """Zeros, in every order."""
    shapes = [(0, 3, 2), (3,), (3,), (0, 3, 2)]
    x, weight, bias, dy = (torch.ones(s, device=device).double().requires_grad_() for s in shapes)
    y = bnext.functional.batch_norm(x, None, None, weight, bias, True, activation="tanh")
    found = torch.autograd.grad(y, (x, weight, bias), dy, create_graph=True)
    for _ in range(2):
        terms = [t.sum() for t in found if t is not None and t.requires_grad]
        found = torch.autograd.grad(terms, (x, weight, dy), create_graph=True, allow_unused=True)
        for one in found:
            assert one is None or torch.equal(one, torch.zeros_like(one))


def layer_and_input(device: str, affine: bool = True) -> tuple[bnext.BatchNorm2d, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x, dy = torch.randn(2, 4, 3, 5, 5, generator=generator).to(device)
    return bnext.BatchNorm2d(3, affine=affine, device=device), x.requires_grad_(), dy


# What a training loop may do to the running statistics between forward and backward. `load_state_dict` writes to the
# weight too, which backward does need: its affine layer gets the new tensors assigned, not copied into the old ones.
Meanwhile = Callable[[bnext.BatchNorm2d], object]
MEANWHILE: dict[str, tuple[bool, Meanwhile]] = {
    "reset_running_stats": (True, lambda layer: layer.reset_running_stats()),
    "load_state_dict": (
        False,
        lambda layer: layer.load_state_dict(layer_and_input("cpu", False)[0].state_dict()),
    ),
    "assigned": (
        True,
        lambda layer: layer.load_state_dict(layer_and_input("cpu")[0].state_dict(), assign=True),
    ),
    "in_place": (True, lambda layer: layer.running_var.mul_(100)),
    "another_forward": (
        True,
        lambda layer: layer.train()(torch.ones(2, 3, 2, 2, device=layer.weight.device)),
    ),
    "removed": (True, lambda layer: delattr(layer, "running_var")),
}


@pytest.mark.parametrize("meanwhile", MEANWHILE)
@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_may_change_before_backward(training: bool, meanwhile: str, device: str) -> None:
    affine, change = MEANWHILE[meanwhile]
    layer, x, dy = layer_and_input(device, affine)
    layer.train(training)
    (expected,) = torch.autograd.grad(layer(x), x, dy)
    layer.reset_running_stats()
    y = layer(x)
    change(layer)
    (dx,) = torch.autograd.grad(y, x, dy)
    assert torch.equal(dx, expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("layout", KEPT_LAYOUTS, ids=str)
def test_keeps_the_input_and_little_else(layout: Layout, training: bool, device: str) -> None:
    """x itself (no copy) and the statistics: mean, invstd, weight and bias in float64, 32 bytes per channel."""
    shape = SHAPE_OF_RANK[layout.rank]
    problem = make(shape, layout, FLOAT32, TRAIN if training else EVAL, device=device)
    problem.require_grad()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        problem.forward()
    assert problem.x.data_ptr() in {tensor.data_ptr() for tensor in kept}
    others = [t for t in kept if t.data_ptr() != problem.x.data_ptr()]
    assert sum(t.numel() * t.element_size() for t in others) == 32 * shape[1]
    buffers = {problem.running_mean.data_ptr(), problem.running_var.data_ptr()}
    assert not buffers & {tensor.data_ptr() for tensor in kept}


def test_state_loaded_before_backward(device: str) -> None:
    """Another state between forward and backward: the gradients are still those of the forward that ran."""
    layer, x, dy = layer_and_input(device)
    inputs = [x, layer.weight, layer.bias]
    expected = torch.autograd.grad(layer(x), inputs, dy)
    y = layer(x)
    layer.load_state_dict({name: torch.full_like(t, 2) for name, t in layer.state_dict().items()})
    for got, want in zip(torch.autograd.grad(y, inputs, dy), expected, strict=True):
        assert torch.equal(got, want)


def test_backward_twice(device: str) -> None:
    layer, x, dy = layer_and_input(device)
    y = layer(x)
    first = torch.autograd.grad(y, x, dy, retain_graph=True)
    second = torch.autograd.grad(y, x, dy)
    assert torch.equal(first[0], second[0])
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(dy)
