"""What every process of a group does in the tests of synchronized layers: its share of a batch, whose whole one of them
judges.

A scenario is a function of the process's rank and the number of processes. All processes run all of them, in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

import bnext
from cases import ACTIVE, DTYPES, FLOAT32, LAYOUT, LAYOUTS, SHAPE_OF_RANK, TRAIN, Active, Dtypes, Layout
from problem import Problem, make_active

SCENARIOS: dict[str, Callable[[int, int], None]] = {}


def scenario(function: Callable[[int, int], None]) -> Callable[[int, int], None]:
    SCENARIOS[function.__name__] = function
    return function


def share(whole: Tensor, rank: int, world: int) -> Tensor:
    """Of a batch: of two processes the first has one sample, of three the second has none."""
    ends = [0, 1, len(whole)] if world == 2 else [0, len(whole) - 2, len(whole) - 2, len(whole)]
    return whole[ends[rank] : ends[rank + 1]]


def on_all(value: Any, world: int) -> list[Any]:
    values = [None] * world
    dist.all_gather_object(values, value)
    return values


def layer_of(problem: Problem, **options: Any) -> nn.Module:
    layer = bnext.SyncBatchNorm(
        problem.x.shape[1],
        dtype=problem.running_mean.dtype,
        activation=problem.activation,
        activation_param=problem.activation_param,
        **options,
    )
    with torch.no_grad():
        for name in ("weight", "bias", "running_mean", "running_var"):
            getattr(layer, name).copy_(getattr(problem, name))
    return layer


def leaf(whole: Tensor | None, rank: int, world: int) -> Tensor | None:
    return None if whole is None else share(whole, rank, world).detach().requires_grad_()


def judge(problem: Problem, rank: int, world: int) -> None:
    """Forward, running statistics and backward against the reference of the whole batch."""
    layer = layer_of(problem)
    x, residual = leaf(problem.x, rank, world), leaf(problem.residual, rank, world)
    y = layer(x, residual)
    y.backward(share(problem.dy, rank, world))
    inputs = [t.grad for t in (x, residual) if t is not None]
    vectors = [layer.weight.grad, layer.bias.grad, layer.running_mean, layer.running_var]
    assert layer.num_batches_tracked == 1
    parts = on_all(([y.detach(), *inputs], [v.detach() for v in vectors]), world)
    assert all(
        torch.equal(one, other)
        for _, there in parts
        for one, other in zip(there[2:], vectors[2:], strict=True)
    ), "running statistics differ between processes"
    if rank != 0:
        return
    y, dx, *dresidual = (torch.cat(each) for each in zip(*(of for of, _ in parts), strict=True))
    problem.check_output(y)
    problem.check_input_grad(dx)
    if dresidual:
        problem.check_residual_grad(dresidual[0])
    dtype = layer.weight.dtype
    if dtype.itemsize > 2:  # otherwise every part was rounded
        dweight, dbias = (sum(of[k].double() for _, of in parts).to(dtype) for k in (0, 1))
        problem.check_weight_grad(dweight)
        problem.check_bias_grad(dbias)
    problem.running_mean, problem.running_var = vectors[2:]
    problem.check_running(0.1)


def judge_all(
    dtypes: Dtypes, layouts: list[Layout], actives: list[Active | None], rank: int, world: int
) -> None:
    for layout in layouts:
        for active in actives:
            for residual in (None, layout):
                shape = SHAPE_OF_RANK[layout.rank]
                problem = make_active(active, shape, layout, dtypes, TRAIN, residual=residual)
                try:
                    judge(problem, rank, world)
                except Exception as error:
                    raise AssertionError(repr(problem)) from error


@scenario
def float32_against_the_reference(rank: int, world: int) -> None:
    judge_all(FLOAT32, LAYOUTS, [None, Active("relu")], rank, world)
    judge_all(FLOAT32, [LAYOUT["nhwc"]], ACTIVE, rank, world)


@scenario
def other_types_against_the_reference(rank: int, world: int) -> None:
    for dtypes in DTYPES:
        judge_all(dtypes, [LAYOUT["nc"], LAYOUT["nchw"], LAYOUT["nhwc"]], [None, Active("relu")], rank, world)


@scenario
def a_constant_is_exactly_bias(rank: int, world: int) -> None:
    layer = bnext.SyncBatchNorm(3)
    nn.init.normal_(layer.bias, generator=torch.Generator().manual_seed(1))
    y = layer(share(torch.full((7, 3, 5, 5), 1e7), rank, world))
    assert torch.equal(y, layer.bias.view(1, 3, 1, 1).expand_as(y))


@scenario
def means_of_processes_far_apart(rank: int, world: int) -> None:
    """What gathered 1/std would lose: each process's values lie close to a mean of its own."""
    problem = make_active(None, (6, 5, 8, 8), LAYOUT["nhwc"], FLOAT32, TRAIN)
    problem.x = problem.x * 1e-3 + 1e4 * torch.arange(6.0).view(6, 1, 1, 1)
    judge(problem, rank, world)


def second_order(layer: nn.Module, x: Tensor, residual: Tensor | None, dy: Tensor) -> Iterator[Tensor | None]:
    leaves = [t for t in (x, residual, *layer.parameters()) if t is not None]
    grads = torch.autograd.grad(layer(x, residual), leaves, dy, create_graph=True)
    yield from grads
    yield from torch.autograd.grad(sum(g.square().sum() for g in grads[:-2]), leaves, allow_unused=True)


@scenario
def second_derivatives(rank: int, world: int) -> None:
    """Of the squares of dx and dresidual, against those of one process that has the whole batch."""
    for activation in (None, "relu", "silu", "leaky_relu"):
        for joined in (False, True):
            generator = torch.Generator().manual_seed(5)
            x, residual, dy = (
                torch.randn(5, 4, 3, 3, generator=generator, dtype=torch.float64) for _ in range(3)
            )
            alone = bnext.BatchNorm2d(4, activation=activation, dtype=torch.float64)
            nn.init.normal_(alone.weight, generator=generator)
            ours = bnext.SyncBatchNorm(4, activation=activation, dtype=torch.float64)
            ours.load_state_dict(alone.state_dict())
            whole = second_order(alone, x.requires_grad_(), residual.requires_grad_() if joined else None, dy)
            part = second_order(
                ours,
                leaf(x, rank, world),
                leaf(residual, rank, world) if joined else None,
                share(dy, rank, world),
            )
            for expected, found in zip(whole, part, strict=True):
                if expected is None or found is None or expected.abs().max() == 0:
                    continue
                if expected.dim() == 4:
                    expected = share(expected, rank, world)
                else:  # a parameter's is this process's part
                    found = found.clone()
                    dist.all_reduce(found)
                torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@scenario
def gradients_in_a_graph(rank: int, world: int) -> None:
    """Where inputs of the layer depend on each other, or are the same: to the bit those without a graph."""
    x = torch.randn(5, 4, 3, 3, generator=torch.Generator().manual_seed(5)) * 0.1 + 10
    layer = bnext.SyncBatchNorm(4, activation="gelu")
    nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(6))
    dy = share(x.flip(0).sin(), rank, world)
    calls: dict[str, Callable[[Tensor], Tensor]] = {
        "twice": lambda t: layer(layer(t)),
        "residual is x": lambda t: layer(t, t),
        "x of the residual": lambda t: layer(t.exp(), t),
        "residual of x": lambda t: layer(t, t.square()),
    }
    for name, call in calls.items():
        found = []
        for create_graph in (False, True):
            leaves = leaf(x, rank, world), *layer.parameters()
            found.append(torch.autograd.grad(call(leaves[0]), leaves, dy, create_graph=create_graph))
        for plain, graph in zip(*found, strict=True):
            assert torch.equal(plain, graph), name
            assert plain.stride() == graph.stride()


@scenario
def a_hook_that_keeps_x_in_another_order(rank: int, world: int) -> None:
    """The bits of a mask lie in the order that x had."""
    generator = torch.Generator().manual_seed(9)
    x, residual, dy = (torch.randn(6, 4, 5, 3, generator=generator, dtype=torch.float64) for _ in range(3))
    layer = bnext.SyncBatchNorm(4, activation="relu", dtype=torch.float64)
    results = []
    for pack in (lambda t: t, lambda t: t.detach().contiguous()):
        last = [
            share(t, rank, world).contiguous(memory_format=torch.channels_last) for t in (x, residual, dy)
        ]
        leaves = last[0].requires_grad_(), last[1].requires_grad_(), *layer.parameters()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            first = torch.autograd.grad(layer(*leaves[:2]), leaves, last[2], create_graph=True)
        second = torch.autograd.grad(sum(g.square().sum() for g in first), leaves, materialize_grads=True)
        results.append([*first, *second])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@scenario
def what_is_not_finite(rank: int, world: int) -> None:
    """As in one process: an infinity is its channel's mean, squares may overflow; nobody's values count for nothing."""
    for value, dtype in (
        (float("inf"), torch.float32),
        (1e160, torch.float64),
        (float("nan"), torch.float32),
    ):
        x = torch.randn(5, 3, 4, generator=torch.Generator().manual_seed(8), dtype=dtype)
        x[0, 1, 2] = value
        ours, alone = bnext.SyncBatchNorm(3, dtype=dtype), bnext.BatchNorm1d(3, dtype=dtype)
        torch.testing.assert_close(ours(share(x, rank, world)), share(alone(x), rank, world), equal_nan=True)
        torch.testing.assert_close(ours.running_mean, alone.running_mean, equal_nan=True)
        torch.testing.assert_close(ours.running_var, alone.running_var, equal_nan=True)
        skipping = bnext.SyncBatchNorm(3, dtype=dtype, skip_nonfinite=True)
        skipping(share(x, rank, world))
        for buffer, one, before in (
            (skipping.running_mean, alone.running_mean, 0),
            (skipping.running_var, alone.running_var, 1),
        ):
            torch.testing.assert_close(buffer, torch.where(alone.running_var.isfinite(), one, before))


@scenario
def running_statistics(rank: int, world: int) -> None:
    """momentum=None, biased variances, none at all; a batch that nobody has."""
    x = torch.randn(9, 3, 4, generator=torch.Generator().manual_seed(2)) + 5
    for options in ({"momentum": None}, {"unbiased_running_var": False}, {"momentum": 0}):
        ours, alone = bnext.SyncBatchNorm(3, **options), bnext.BatchNorm1d(3, **options)
        for factor in (1, 3):
            ours(share(factor * x, rank, world))
            alone(factor * x)
        for name, buffer in alone.named_buffers():
            torch.testing.assert_close(ours.get_buffer(name), buffer)
        before = {name: buffer.clone() for name, buffer in ours.named_buffers()}
        assert ours(x[:0]).shape == (0, 3, 4)
        assert torch.equal(ours.running_mean, before["running_mean"])
        assert torch.equal(ours.running_var, before["running_var"])
        assert ours.num_batches_tracked == 3
    untracked = bnext.SyncBatchNorm(3, track_running_stats=False)
    alone = bnext.BatchNorm1d(3, track_running_stats=False)
    torch.testing.assert_close(untracked(share(x, rank, world)), share(alone(x), rank, world))
    only = x[:1, :, :1] if rank == 0 else x[:0, :, :1]  # one value a channel in all
    layer = bnext.SyncBatchNorm(3)
    assert not layer(only).any() and layer.running_var.isfinite().all()
