"""Scenarios of synchronized layers in use: compiled, under DistributedDataParallel, in groups, with bad input."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch import distributed as dist

import bnext
from sync_scenarios import scenario, share


def step_of(backend: str | None, x: Tensor) -> list[Tensor]:
    layer, leaf_of_x = bnext.SyncBatchNorm(4, activation="relu"), x.clone().requires_grad_()
    call = layer if backend is None else torch.compile(layer, fullgraph=True, backend=backend)
    y = call(leaf_of_x)
    (y * y).sum().backward()
    return [y.detach(), leaf_of_x.grad, layer.weight.grad, *layer.buffers()]


@scenario
def compiled(rank: int, world: int) -> None:
    """One graph, the same bits."""
    x = share(torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(3)), rank, world)
    expected, *found = (
        step_of(backend, x)
        for backend in (None, "aot_eager", *["inductor"] * (world == 2))  # ten seconds
    )
    for results in found:
        assert all(torch.equal(one, other) for one, other in zip(results, expected, strict=True))


@scenario
def with_distributed_data_parallel(rank: int, world: int) -> None:
    """A step of a network that `synchronize` changed is that of one process with the whole batch."""
    torch.manual_seed(11)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))
    alone = nn.Sequential(*network)
    x, target = torch.randn(8, 3, 6, 6), torch.randn(8, 2)
    loss = (alone(x) - target).square().sum()
    expected = [g / world for g in torch.autograd.grad(loss, [*alone.parameters()])]
    parallel = nn.parallel.DistributedDataParallel(bnext.synchronize(network))
    assert type(parallel.module[1]) is bnext.SyncBatchNorm
    (parallel(share(x, rank, world)) - share(target, rank, world)).square().sum().backward()
    for parameter, grad in zip(network.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-4)


@scenario
def groups_of_their_own(rank: int, world: int) -> None:
    """A layer's group: alone, it is the layer of one process."""
    groups = [dist.new_group([k]) for k in range(world)]
    x = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(rank))
    ours, alone = bnext.SyncBatchNorm(3, process_group=groups[rank]), bnext.BatchNorm1d(3)
    assert torch.equal(ours(x), alone(x))
    everyone = dist.new_group([*range(world)])
    whole = torch.randn(7, 3, 2, generator=torch.Generator().manual_seed(9))
    both = bnext.SyncBatchNorm(3, process_group=everyone), bnext.SyncBatchNorm(3)
    first, second = (layer(share(whole, rank, world)) for layer in both)
    assert torch.equal(first, second)


@scenario
def bad_input_before_anything_is_sent(rank: int, world: int) -> None:
    """All processes get it and none waits; nothing has changed."""
    x = torch.ones(2, 3)
    wrong_var = bnext.SyncBatchNorm(3)
    wrong_var.running_var = torch.ones(4)
    calls: list[tuple[nn.Module, tuple[Tensor, ...], str]] = [
        (bnext.SyncBatchNorm(3), (torch.ones(3),), "expected at least 2D input"),
        (bnext.SyncBatchNorm(3), (torch.ones(2, 4),), "running_mean should contain 4 elements not 3"),
        (bnext.SyncBatchNorm(3), (x.long(),), "not implemented for 'Long'"),
        (bnext.SyncBatchNorm(3), (x, x[:1]), "expected residual of the input's size"),
        (bnext.SyncBatchNorm(3), (x.double(),), "expected running_mean to have dtype Double"),
        (bnext.SyncBatchNorm(3, eps=0.0), (x,), "eps must be positive during training, but got 0.0"),
        (wrong_var, (x,), "running_var should contain 3 elements not 4"),
    ]
    for layer, given, text in calls:
        before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        try:
            layer(*given)
        except (ValueError, RuntimeError) as raised:
            assert text in str(raised), raised
        else:
            raise AssertionError(f"not raised: {text}")
        assert all(torch.equal(layer.get_buffer(name), buffer) for name, buffer in before.items())
