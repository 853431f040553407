"""The forward that writes nothing: an operator by itself, and where compiled code needs one that does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import grad, vmap
from torch.library import opcheck

import bnext
from bits import assert_same_bits
from bnext.functional import batch_norm
from cases import BOTH, FLOAT32, LAYOUT, MODES, SHAPE_OF_RANK, Active, Mode
from operators import FORWARD, NO_UPDATE, forward_arguments, no_update_arguments
from problem import Problem, make_active

WRITING_NOTHING = [mode for mode in MODES if mode.name != "train"]


def make(mode: Mode, device: str, active: str | None = "relu") -> Problem:
    layout = LAYOUT["nhwc"]
    shape, chosen = SHAPE_OF_RANK[layout.rank], None if active is None else Active(active)
    return make_active(chosen, shape, layout, FLOAT32, mode, BOTH, residual=layout, device=device)


@pytest.mark.parametrize("mode", WRITING_NOTHING, ids=str)
def test_is_what_the_other_is(mode: Mode, device: str) -> None:
    problem = make(mode, device)
    for for_backward in (False, True):
        others = FORWARD(*forward_arguments(problem, for_backward=for_backward))
        assert_same_bits(NO_UPDATE(*no_update_arguments(problem, for_backward)), others)
    leaves = problem.require_grad()
    gradients = [
        torch.autograd.grad(operator(*arguments)[0].square().sum(), leaves)
        for operator, arguments in (
            (FORWARD, forward_arguments(problem)),
            (NO_UPDATE, no_update_arguments(problem)),
        )
    ]
    assert_same_bits(*gradients)


@pytest.mark.parametrize("mode", WRITING_NOTHING, ids=str)
def test_opcheck(mode: Mode, device: str) -> None:
    problem = make(mode, device)
    problem.require_grad()
    opcheck(NO_UPDATE, no_update_arguments(problem))
    assert not any(argument.is_write for argument in NO_UPDATE._schema.arguments)


def test_refuses_to_train_with_running_statistics(device: str) -> None:
    x, running = torch.randn(4, 3, device=device), torch.ones(3, device=device)
    for pair in ((running, None), (None, running)):
        with pytest.raises(RuntimeError, match="expected no running statistics in training"):
            NO_UPDATE(x, None, None, None, *pair, True, 1e-5, [], None, None, False)


@pytest.mark.parametrize("active", [None, "relu"])
@pytest.mark.parametrize("training", [True, False])
def test_vmap(training: bool, active: str | None, device: str) -> None:
    """Gradients of every example, at once and one by one."""
    running = (None, None) if training else (torch.randn(4, device=device), torch.ones(4, device=device))

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        y: Tensor = NO_UPDATE(x, x, weight, None, *running, training, 1e-5, [], active, None, False)[0]
        return y.sin().sum()

    def other(x: Tensor, weight: Tensor) -> Tensor:
        return batch_norm(x, *running, weight, None, training, activation=active, residual=x).sin().sum()

    examples, weights = torch.randn(3, 5, 4, 2, device=device), torch.randn(3, 4, device=device)
    expected = torch.stack([grad(other)(x, w) for x, w in zip(examples, weights, strict=True)])
    torch.testing.assert_close(vmap(grad(ours))(examples, weights), expected)
    assert vmap(ours)(examples[:0], weights[:0]).shape == (0,)


def layer(training: bool, **options: Any) -> nn.Module:
    torch.manual_seed(7)
    made = bnext.BatchNorm2d(4, **options)
    nn.init.normal_(made.weight)
    return made.train(training)


Call = Callable[[Tensor], Tensor]


def nested(norm: nn.Module) -> Call:
    region = torch.compiler.nested_compile_region(lambda x: norm(x))
    return lambda x: region(region(x))


def held(norm: nn.Module) -> Call:
    call = nested(norm)

    def under(x: Tensor) -> Tensor:
        with bnext.hold_statistics():
            return call(x)

    return under


def chosen(norm: nn.Module) -> Call:
    return lambda x: torch.cond(x.sum() > -1e9, norm.forward, torch.sin, (x,))


REGIONS: dict[str, tuple[Callable[[nn.Module], Call], bool, dict[str, Any]]] = {
    "nested, eval": (nested, False, {"activation": "relu"}),
    "nested, untracked": (nested, True, {"track_running_stats": False}),
    "nested, held": (held, True, {"activation": "silu"}),
    "cond, eval": (chosen, False, {}),
    "cond, untracked": (chosen, True, {"track_running_stats": False}),
}


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("case", REGIONS)
def test_in_regions_of_compiled_code(case: str) -> None:
    """Where torch.compile wants of an operator a tensor for all that it might write."""
    build, training, options = REGIONS[case]
    norm, leaf = layer(training, **options), torch.randn(3, 4, 5, 5)
    kept = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    call = build(norm)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for function in (call, compiled):
        x = leaf.clone().requires_grad_()
        y = function(x)
        results.append([y.detach(), *torch.autograd.grad(y.square().sum(), (x, norm.weight, norm.bias))])
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)
    assert all(torch.equal(buffer, kept[name]) for name, buffer in norm.named_buffers())


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("training", [True, False])
def test_one_graph_for_any_number_of_channels(training: bool) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(batch_norm, fullgraph=True, backend=counter)
    for channels in (4, 6, 12):
        x = torch.randn(3, channels, 5)
        weight, bias = (torch.randn(channels, requires_grad=True) for _ in range(2))
        torch._dynamo.mark_dynamic(x, 1)
        results = []
        for function in (call, batch_norm):
            mean, var = torch.zeros(channels), torch.ones(channels)
            for vector in (mean, var, weight, bias):
                torch._dynamo.mark_dynamic(vector, 0)
            y = function(x, mean, var, weight, bias, training)
            results.append([y.detach(), *torch.autograd.grad(y.sin().sum(), (weight, bias)), mean, var])
        assert_same_bits(*results)
    assert counter.frame_count == 1
