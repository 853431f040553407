"""Running statistics that a batch does not move: held, and under torch's checkpointing."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import bnext

KINDS = [bnext.BatchNorm2d, bnext.SyncBatchNorm]


def state(layer: nn.Module) -> list[Tensor]:
    return [t.detach().clone() for t in layer.state_dict().values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("kind", KINDS)
def test_hold(kind: type[nn.Module], momentum: float | None, device: str) -> None:
    """The output is that of training, of eval in eval; outside and after an error statistics move again."""
    layer = kind(3, momentum=momentum).to(device)
    x = torch.randn(4, 3, 2, 2, device=device) + 1
    layer(x)
    before = state(layer)
    with bnext.hold_statistics():
        with bnext.hold_statistics():
            held = layer(x)
        still = layer(x)
        layer.eval()
        evaluated = layer(x)
        layer.train()
    assert same(state(layer), before)
    with pytest.raises(KeyError), bnext.hold_statistics():
        raise KeyError
    trained = layer(x)
    assert torch.equal(held, trained) and torch.equal(still, trained) and not torch.equal(evaluated, trained)
    assert not same(state(layer), before)


def test_hold_is_for_every_thread() -> None:
    """As torch.nn.DataParallel and backward on several devices have some."""
    layer, x = bnext.BatchNorm1d(3), torch.randn(4, 3)
    before = state(layer)
    with bnext.hold_statistics():
        thread = threading.Thread(target=layer, args=(x,))
        thread.start()
        thread.join()
    assert same(state(layer), before)


def test_hold_reaches_a_compiled_layer() -> None:
    torch._dynamo.reset()
    layer, x = bnext.BatchNorm1d(3), torch.randn(4, 3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        before = state(layer)
        compiled(x)
        assert not same(state(layer), before)
        before = state(layer)
        with bnext.hold_statistics():
            compiled(x)
        assert same(state(layer), before)


def test_checkpoint_of_several_backwards() -> None:
    """The block runs again in each."""
    layer, x = bnext.BatchNorm1d(3), torch.randn(4, 3, requires_grad=True)
    y = checkpoint(layer, x, use_reentrant=False, context_fn=bnext.checkpoint_contexts).square().sum()
    before = state(layer)
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (again,) = torch.autograd.grad(y, x, create_graph=True)
    again.square().sum().backward()
    assert torch.equal(first, again) and same(state(layer), before)


def test_hold_decorates() -> None:
    layer, x = bnext.BatchNorm1d(3), torch.randn(4, 3)
    before = state(layer)
    for _ in range(2):
        bnext.hold_statistics()(layer.forward)(x)
    assert same(state(layer), before)


def test_hold_decorates_nothing_that_runs_later() -> None:
    def numbers() -> Iterator[int]:
        yield 1

    async def wait() -> None: ...

    async def wait_for_numbers() -> AsyncIterator[int]:
        yield 1

    for function in (numbers, wait, wait_for_numbers):
        with pytest.raises(TypeError, match="expected a function whose call runs it"):
            bnext.hold_statistics()(function)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint(kind: type[nn.Module], device: str) -> None:
    """Statistics, outputs and gradients of a checkpointed step are those of a plain one; without, they move twice."""
    results = []
    for way in ("plain", "checkpoint", "without"):
        torch.manual_seed(4)
        block = nn.Sequential(nn.Conv2d(3, 3, 1), kind(3), nn.ReLU(), nn.Conv2d(3, 3, 1)).to(device)
        x = torch.randn(4, 3, 2, 2, device=device, requires_grad=True)
        options = {"context_fn": bnext.checkpoint_contexts} if way == "checkpoint" else {}
        y = block(x) if way == "plain" else checkpoint(block, x, use_reentrant=False, **options)
        grads = torch.autograd.grad(y.square().sum(), (x, *block.parameters()))
        results.append([y, *grads, *state(block)])
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


def test_hold_and_fuse() -> None:
    """Where torch's layers train on and ours do not, nobody can say whether they do the same."""
    network = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    with bnext.hold_statistics(), pytest.raises(ValueError, match=r"expected no .* around"):
        bnext.fuse(network, torch.randn(2, 3, 4, 4))
