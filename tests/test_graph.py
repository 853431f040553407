"""The node that backward goes through: what it saves and frees, its edges, the transforms around it."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bnext
from bnext.functional import batch_norm
from cases import ACTIVE, Active, arguments_of
from composed import Form


def leaves(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = [(4, 3, 2), (3,), (3,)]
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_() for s in shapes]


def loss(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return batch_norm(x, None, None, weight, bias, training=True).tanh().square().sum()


def loss_of_composed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return Form(None, None).composed(x, weight, bias).tanh().square().sum()


def orders(
    function: Callable[..., Tensor], tensors: list[Tensor], over: list[Tensor] | None = None
) -> list[Tensor]:
    """Gradients of first and second order by `tensors`, or by `over`, which they come from."""
    over = over or tensors
    first = torch.autograd.grad(function(*tensors), over, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), over)
    return [*first, *second]


def close(ours: Any, expected: Any) -> None:
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def test_saved_tensor_hooks() -> None:
    """What is packed comes back unpacked, through derivatives of second order too."""
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> int:
        packed.append(tensor.detach().clone())
        return len(packed) - 1

    expected = orders(loss, leaves())
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda index: packed[index]):
        tensors = leaves()
        first = torch.autograd.grad(loss(*tensors), tensors)
    close(list(first), expected[:3])
    with torch.autograd.graph.save_on_cpu():
        close(orders(loss, leaves()), expected)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_weights_that_are_computed(which: int) -> None:
    """Leaves or not: second order reaches what they were computed from, through the copy that is kept."""
    results = []
    for function in (loss, loss_of_composed):
        over = leaves()
        tensors = list(over)
        tensors[which] = over[which] * 3 + over[which].square()
        results.append(orders(function, tensors, over))
    close(*results)


def test_second_order_after_the_weight_was_written_to() -> None:
    tensors, expected = leaves(), orders(loss, leaves())
    value = loss(*tensors)
    with torch.no_grad():
        tensors[1].fill_(7)
    first = torch.autograd.grad(value, tensors, create_graph=True)
    second = torch.autograd.grad(sum(g.square().sum() for g in first), tensors)
    close([*first, *second], expected)


def test_hooks_on_the_weight() -> None:
    """Called once with the whole gradient, though two edges lead to it in second order."""
    tensors = leaves()
    seen: list[Tensor] = []
    tensors[1].register_hook(seen.append)
    loss(*tensors).backward()
    assert len(seen) == 1
    assert torch.equal(seen[0], tensors[1].grad)


def test_input_written_to_before_backward() -> None:
    x, weight, bias = leaves()
    inner = x * 1
    value = loss(inner, weight, bias)
    inner.detach().mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.backward()


def test_backward_frees_what_was_saved() -> None:
    x, weight, bias = leaves()
    inner = x * 1
    alive = weakref.ref(inner)
    y = batch_norm(inner, None, None, weight, bias, training=True)
    del inner
    gc.collect()
    y.sum().backward()
    assert y.grad_fn is not None
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()
    gc.collect()
    assert alive() is None


def test_a_graph_that_is_dropped_is_freed() -> None:
    """By its last reference, not by the collector: the node is in no cycle with its output or the weight's copy."""
    x, weight, bias = leaves()
    inner = x * 1
    alive = weakref.ref(inner)
    y = batch_norm(inner, None, None, weight * 2, bias, training=True)
    del inner
    assert alive() is not None
    gc.disable()
    try:
        del y
        assert alive() is None
    finally:
        gc.enable()


def test_the_node_has_a_name() -> None:
    x, weight, bias = leaves()
    node = batch_norm(x, None, None, weight, bias, training=True).grad_fn
    assert node.name() == "bnext::BatchNormBackward"
    assert [edge is not None for edge, _ in node.next_functions] == [True, False, True, True]


def test_only_the_statistics_are_used() -> None:
    """No gradient arrives at y: none leaves, and none is asked of the kernels."""
    x, weight, bias = leaves()
    y, stats, mask = torch.ops.bnext.batch_norm(
        x, None, weight, bias, *[None] * 3, True, 0.1, 1e-5, True, [], None, None, False
    )
    assert y.requires_grad
    assert not stats.requires_grad and not mask.requires_grad
    undefined = torch._C._functions.UndefinedGrad()(y)
    assert torch.autograd.grad(undefined.sum(), [x, weight, bias], allow_unused=True) == (None, None, None)


def test_func_grad() -> None:
    for argument in (0, 1, 2):
        ours, expected = (torch.func.grad(f, argument)(*leaves()) for f in (loss, loss_of_composed))
        close(ours.detach(), expected.detach())


def test_func_grad_twice() -> None:
    def penalty(function: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        return sum(g.square().sum() for g in torch.func.grad(function, (0, 1, 2))(*tensors))

    for argument in (0, 1, 2):
        ours, expected = (
            torch.func.grad(lambda *t, f=f: penalty(f, *t), argument)(*leaves())
            for f in (loss, loss_of_composed)
        )
        close(ours.detach(), expected.detach())


def test_compiled_autograd_is_refused() -> None:
    layer, x = bnext.BatchNorm1d(3), torch.randn(4, 3, requires_grad=True)
    value = nn.functional.relu(layer(x)).sum()
    with (
        torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")),
        pytest.raises(NotImplementedError, match="bnext::BatchNormBackward"),
    ):
        value.backward()


@pytest.mark.parametrize("active", [None, *ACTIVE], ids=str)
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("whose", ["x", "what x comes from", "residual"])
def test_second_order_where_dy_is_an_input(whose: str, training: bool, active: Active | None) -> None:
    """The part of the gradient's gradient that dy has is counted once."""
    x, weight, bias = leaves()
    statistics = None if training else torch.ones(3, dtype=torch.float64)

    def both(v: Tensor, by_hand: bool) -> Tensor:
        source = v.sin() if whose == "what x comes from" else v
        given = leaves()[0].detach().exp() if whose == "residual" else source
        residual = v if whose == "residual" else None
        plain = (given, statistics, statistics, weight, bias, training, 0.1)
        if by_hand:
            y = torch.nn.functional.batch_norm(*plain)
            y = y if residual is None else y + residual
            y = y if active is None else active.of(y)
        else:
            activation, param = arguments_of(active)
            y = batch_norm(*plain, activation=activation, activation_param=param, residual=residual)
        (first,) = torch.autograd.grad(y, v, grad_outputs=v, create_graph=True)
        return torch.autograd.grad(first.square().sum(), v)[0]

    torch.testing.assert_close(both(x, by_hand=False), both(x, by_hand=True))


@pytest.mark.parametrize("active", ["relu", "silu"])
def test_second_order_by_a_bias(active: str) -> None:
    """Where it does not count it has zeros, as torch has them, also behind a mask."""
    x, weight, bias = leaves()
    y = batch_norm(x, None, None, weight, bias, True, activation=active, residual=torch.ones_like(x))
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), bias)
    assert (second == 0).all() == (active == "relu")
