"""Batch normalization over its input in autograd: what is kept, views, neighbours in a network, what is refused."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnext
from bnext.functional import batch_norm
from cases import (
    BFLOAT16_WITH_FLOAT32,
    EVAL,
    FLOAT32,
    FLOAT64,
    INVERTIBLE,
    KEPT_LAYOUTS,
    LAYOUT,
    SHAPE_OF_RANK,
    TRAIN,
    Active,
    Dtypes,
    Layout,
    Mode,
)
from inplace_inputs import leaf, values
from problem import make_active

every_active = pytest.mark.parametrize("active", INVERTIBLE, ids=str)
train_and_eval = pytest.mark.parametrize("mode", [TRAIN, EVAL], ids=str)


@every_active
@train_and_eval
@pytest.mark.parametrize("dtypes", [FLOAT32, BFLOAT16_WITH_FLOAT32], ids=str)
@pytest.mark.parametrize("layout", KEPT_LAYOUTS, ids=str)
def test_what_is_kept(layout: Layout, dtypes: Dtypes, mode: Mode, active: Active | None, device: str) -> None:
    """y and a few numbers per channel."""
    shape = SHAPE_OF_RANK[layout.rank]
    problem = make_active(active, shape, layout, dtypes, mode, device=device, inplace=True)
    problem.require_grad()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = problem.forward()
    (whole,) = [t for t in kept if t.numel() > 4 * shape[1]]
    assert whole.data_ptr() == y.data_ptr()
    others = [t for t in kept if t is not whole]
    assert sum(t.numel() * t.element_size() for t in others) == 32 * shape[1]
    given = {t.data_ptr() for t in (problem.weight, problem.bias, problem.running_mean, problem.running_var)}
    assert not given & {t.data_ptr() for t in others}, "what the caller may write to"


def network(inplace: bool, active: Active | None) -> nn.Module:
    torch.manual_seed(5)
    given = (
        {}
        if active is None
        else {"activation": active.activation, "activation_param": active.activation_param}
    )
    layers: list[nn.Module] = []
    for channels in (3, 6, 6):
        layers += [nn.Conv2d(channels, 6, 3, bias=False), bnext.BatchNorm2d(6, inplace=inplace, **given)]
    model = nn.Sequential(*layers, nn.Conv2d(6, 2, 1)).double()
    for layer in model:
        if isinstance(layer, bnext.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
    return model


@pytest.mark.parametrize("active", [None, Active("leaky_relu"), Active("elu", 0.5)], ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_between_convolutions(memory_format: torch.memory_format, active: Active | None, device: str) -> None:
    """Which keep their own input: the y that the layer before wrote, and do not miss their output."""
    results = []
    for inplace in (True, False):
        model = network(inplace, active).to(device, memory_format=memory_format)
        x = torch.linspace(-1, 1, 4 * 3 * 9 * 9, dtype=torch.float64, device=device).view(4, 3, 9, 9).sin()
        x = x.contiguous(memory_format=memory_format).requires_grad_()
        y = model(x)
        y.square().sum().backward()
        results.append([y.detach(), x.grad, *(p.grad for p in model.parameters()), *model.buffers()])
    largest = max(float(tensor.abs().max()) for tensor in results[1])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12 * largest)


@every_active
@train_and_eval
@pytest.mark.parametrize("where", ["batch", "channels", "width"])
def test_a_slice(where: str, mode: Mode, active: Active | None, device: str) -> None:
    """A view: the gradients of the tensor it is a view of come together from what was written and what was not."""
    dim = ["batch", "channels", "", "width"].index(where)
    problem = make_active(active, (3, 5, 4, 5), LAYOUT["nchw"], FLOAT64, mode, device=device, inplace=True)
    sizes = list(problem.x.shape)
    sizes[dim] += 3
    whole = torch.linspace(-2, 3, int(torch.Size(sizes).numel()), dtype=torch.float64, device=device)
    results = []
    for inplace in (True, False):
        leaf = whole.view(sizes).clone().requires_grad_()
        parameters = [t.detach().clone().requires_grad_() for t in (problem.weight, problem.bias)]
        base = leaf * 1.5
        part = base.narrow(dim, 1, problem.x.shape[dim])
        y = batch_norm(
            part,
            problem.running_mean.clone(),
            problem.running_var.clone(),
            *parameters,
            mode.batch,
            activation=problem.activation,
            activation_param=problem.activation_param,
            inplace=inplace,
        )
        if inplace:
            assert y is part
        else:
            ends = base.narrow(dim, 0, 1), base.narrow(dim, sizes[dim] - 2, 2)
            base = torch.cat([ends[0], y, ends[1]], dim)
        grads = torch.autograd.grad((base * base.detach().cos()).sum(), [leaf, *parameters])
        results.append([base.detach(), *grads])
    largest = max(float(tensor.abs().max()) for tensor in results[1])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-12 * largest)


def test_a_leaf_that_requires_no_grad() -> None:
    """Becomes part of the graph, for the weight's sake."""
    x, weight = values().detach(), torch.ones(3, requires_grad=True)
    y = batch_norm(x, None, None, weight, training=True, inplace=True)
    assert y is x and x.requires_grad and not x.is_leaf
    (dweight,) = torch.autograd.grad((x * torch.arange(5.0)).sum(), weight)
    other = batch_norm(values().detach(), None, None, weight, training=True)
    (expected,) = torch.autograd.grad((other * torch.arange(5.0)).sum(), weight)
    torch.testing.assert_close(dweight, expected, rtol=1e-4, atol=1e-4)


def test_a_leaf_under_no_grad() -> None:
    x = leaf()
    expected = batch_norm(x.detach(), None, None, training=True)
    with torch.no_grad():
        batch_norm(x, None, None, training=True, inplace=True)
    assert x.is_leaf and torch.equal(x.detach(), expected)


def test_in_inference_mode() -> None:
    expected = batch_norm(values().detach(), None, None, training=True)
    with torch.inference_mode():
        x = values()
        assert torch.equal(batch_norm(x, None, None, training=True, inplace=True), expected)
    with pytest.raises(RuntimeError, match="Inplace update to inference tensor outside InferenceMode"):
        batch_norm(x, None, None, training=True, inplace=True)
    assert torch.equal(x, expected)


def test_parameters_may_change_before_backward() -> None:
    results = []
    for change in (False, True):
        problem = make_active(Active("elu"), (3, 5, 4, 5), LAYOUT["nchw"], FLOAT32, TRAIN, inplace=True)
        leaves = problem.require_grad()
        y = problem.forward()
        if change:
            with torch.no_grad():
                for tensor in (problem.weight, problem.bias, problem.running_mean, problem.running_var):
                    tensor.fill_(7)
        results.append(torch.autograd.grad(y, leaves, problem.dy))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


@every_active
def test_no_second_derivative(active: Active | None) -> None:
    """An error where it is asked for: it would need an x that is no more."""
    problem = make_active(active, (3, 5, 4, 5), LAYOUT["nchw"], FLOAT64, TRAIN, inplace=True)
    for name in ("x", "weight", "bias"):
        with pytest.raises(NotImplementedError, match="batch_norm_"):
            leaves = problem.require_grad(name)
            grads = torch.autograd.grad(problem.forward().sin().sum(), leaves, create_graph=True)
            torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)
        getattr(problem, name).requires_grad_(False)


def test_a_graph_that_is_dropped_is_freed() -> None:
    """The node keeps its own output, and is in no cycle with it."""
    x = values()
    alive = weakref.ref(x)
    y = batch_norm(x, None, None, torch.ones(3, requires_grad=True), training=True, inplace=True)
    gc.disable()
    try:
        del x, y
        assert alive() is None
    finally:
        gc.enable()


def test_backward_frees_what_was_saved() -> None:
    y = batch_norm(values(), None, None, training=True, inplace=True)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


def test_versions_go_up_in_inference_mode() -> None:
    """So that a graph which keeps what is written over there says so."""
    h = values().detach().requires_grad_() * 1
    loss = (h * h).sum()
    layer = bnext.BatchNorm1d(h.shape[1], dtype=h.dtype)
    before = [t._version for t in (h, *layer.buffers())]
    with torch.inference_mode():
        layer(h)
        batch_norm(h, None, None, training=True, inplace=True)
    assert [t._version for t in (h, *layer.buffers())] == [version + 1 for version in before]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("which", ["input", "running_mean", "running_var"])
def test_elements_that_are_negated_when_read(which: str, mode: Any) -> None:
    """A view of a conjugate is refused where it is written to, before anything is."""
    x = values().detach()
    given = {"input": x, "running_mean": x.new_zeros(x.shape[1]), "running_var": x.new_ones(x.shape[1])}
    given[which] = torch.view_as_complex(torch.stack([given[which]] * 2, -1)).conj().imag
    before = {name: t.clone() for name, t in given.items()}
    with mode(), pytest.raises(RuntimeError, match=rf"expected {which}\.resolve_neg\(\)"):
        batch_norm(**given, training=True, inplace=True)
    for name, t in given.items():
        assert torch.equal(t, before[name])
