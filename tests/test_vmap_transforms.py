"""torch.vmap around and inside other transforms and the compiler, what it copies, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import grad, hessian, jacfwd, jacrev, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from bnext.functional import batch_norm
from cases import Active
from composed import Form, close
from operators import FORWARD

COUNT = 3


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("active", [None, Active("relu"), Active("leaky_relu"), Active("silu")], ids=str)
def test_jacobians(active: Active | None, training: bool, device: str) -> None:
    """Which torch.func makes of vmap over backward or over tangents, and the Hessian of one in the other."""
    generator = torch.Generator().manual_seed(2)
    shapes = [(3, 2, 2), (2,), (2,), (3, 2, 2)]
    given = [torch.randn(s, generator=generator, dtype=torch.float64).to(device) for s in shapes]
    running = (torch.tensor([0.1, -0.4]), torch.tensor([0.5, 1.5]))
    form = Form(active, None if training else tuple(t.to(device, torch.float64) for t in running))
    arguments = tuple(range(4))

    def loss(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *a: function(*a).sin().sum()

    for derive in (jacrev, jacfwd):
        close(derive(form.ours, arguments)(*given), derive(form.composed, arguments)(*given))
    for derive in (hessian, lambda f, a: jacrev(jacfwd(f, a), a), lambda f, a: jacrev(jacrev(f, a), a)):
        close(derive(loss(form.ours), arguments)(*given), derive(loss(form.composed), arguments)(*given))


def test_vmap_of_vmap(device: str) -> None:
    x = torch.randn(2, COUNT, 6, 4, dtype=torch.float64, device=device)
    weight = torch.randn(COUNT, 4, dtype=torch.float64, device=device)

    def output(x: Tensor, weight: Tensor) -> Tensor:
        return batch_norm(x, None, None, weight, training=True, activation="silu")

    def gradients(x: Tensor, weight: Tensor) -> Tensor:
        result: Tensor = grad(lambda w: output(x, w).sin().sum())(weight)
        return result

    for function in (output, gradients):
        nested = vmap(vmap(function), (0, None))(x, weight)
        loop = [torch.stack([function(a, w) for a, w in zip(one, weight, strict=True)]) for one in x]
        close(nested, torch.stack(loop))


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_channels_side_by_side_are_not_copied(device: str) -> None:
    """As the convolutions of an ensemble leave them: one call of the operator for all, of the very memory."""
    x = torch.randn(5, COUNT, 4, 2, 3, device=device)
    running = torch.zeros(COUNT, 4, device=device), torch.ones(COUNT, 4, device=device)
    with Operations() as operations:
        vmap(lambda x, m, v: batch_norm(x, m, v, training=True), (1, 0, 0))(x, *running)
    on_device = [str(f) for f in operations.seen if f in (FORWARD, torch.ops.aten.clone.default)]
    on_device += [str(f) for f in operations.seen if f is torch.ops.aten.copy_.default]
    assert on_device == [str(FORWARD)]


def test_compiled(device: str) -> None:
    """One graph, and the statistics of every layer in it move."""
    torch._dynamo.reset()
    results = []
    x = torch.randn(5, COUNT, 4, 2, 3, device=device, dtype=torch.float64)
    for compiled in (False, True):
        running = torch.zeros(COUNT, 4).to(x), torch.ones(COUNT, 4).to(x)

        def function(x: Tensor, m: Tensor, v: Tensor) -> Tensor:
            return vmap(lambda x, m, v: batch_norm(x, m, v, training=True), (1, 0, 0))(x, m, v)

        call = torch.compile(function, fullgraph=True, backend="aot_eager") if compiled else function
        results.append((call(x, *running), *running))
    for one, other in zip(*results, strict=True):
        close(one, other)


def test_errors(device: str) -> None:
    """An example's own, before anything is written; and what vmap alone can be asked for."""
    x, own = torch.randn(COUNT, 5, 4, device=device), torch.ones(COUNT, 4, device=device)
    mean, var = own.clone(), own.clone()
    counters = torch.zeros(COUNT, dtype=torch.int64, device=device)
    everything = {"input": x, "running_mean": mean, "running_var": var, "num_batches_tracked": counters}
    all_mapped = dict.fromkeys(everything, 0)
    cases: list[tuple[type[Exception], str, dict[str, Any], dict[str, int], dict[str, Any]]] = [
        (
            RuntimeError,
            "input is mapped over, but running_mean",
            {"input": x, "running_mean": mean[0], "running_var": var[0]},
            {"input": 0},
            {},
        ),
        (
            RuntimeError,
            "running_mean and running_var both mapped",
            {"input": x, "running_mean": mean, "running_var": var[0]},
            {"input": 0, "running_mean": 0},
            {},
        ),
        (
            RuntimeError,
            "expected all three",
            {"input": x[0], "running_mean": mean[0], "running_var": var[0], "num_batches_tracked": counters},
            {"num_batches_tracked": 0},
            {"momentum": None},
        ),
        (
            RuntimeError,
            "should contain 4 elements not 3",
            {"input": x, "running_mean": mean[:, :3], "running_var": var},
            {"input": 0, "running_mean": 0, "running_var": 0},
            {},
        ),
        (
            ValueError,
            r"got input size torch\.Size\(\[1, 4\]\)",
            {"input": x[:, :1], "running_mean": mean, "running_var": var},
            {"input": 0, "running_mean": 0, "running_var": 0},
            {},
        ),
        (
            RuntimeError,
            "running_var with memory of its own for every example",
            {"input": x, "running_mean": mean, "running_var": own[0].expand(COUNT, 4)},
            {"input": 0, "running_mean": 0, "running_var": 0},
            {},
        ),
        (
            RuntimeError,
            "num_batches_tracked with memory of its own",
            everything | {"num_batches_tracked": counters[0].expand(COUNT)},
            all_mapped,
            {},
        ),
        (
            RuntimeError,
            "a single int64, but got 1 elements of Float",
            everything | {"num_batches_tracked": counters.float()},
            all_mapped,
            {},
        ),
        (
            RuntimeError,
            "expected one counter for all examples",
            everything,
            all_mapped,
            {"inplace": True, "momentum": None},
        ),
        (ValueError, "expected at least 2D input", {"input": x[:, 0]}, {"input": 0}, {}),
        (ValueError, "eps must be positive", {"input": x[:0]}, {"input": 0}, {"eps": 0.0}),
        (ValueError, "eps must be positive", {"input": x}, {"input": 0}, {"eps": 0.0}),
        (
            RuntimeError,
            "inplace=True writes over, is not mapped",
            {"input": x[0], "weight": own},
            {"weight": 0},
            {"inplace": True},
        ),
    ]
    for error, text, given, mapped, options in cases:
        before = {name: t.clone() for name, t in given.items()}
        no_statistics = {"running_mean": None, "running_var": None}
        with pytest.raises(error, match=text):
            vmap(
                lambda t, o=options, n=no_statistics: batch_norm(**n | t, training=True, **o),
                ({name: mapped.get(name) for name in given},),
            )(given)
        for name, t in given.items():
            assert torch.equal(t, before[name]), (text, name)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dim", [0, 1, 3])
def test_no_examples(dim: int, inplace: bool, device: str) -> None:
    """Outputs of their sizes, and statistics that stay."""
    x = torch.empty(5, 4, 3, device=device).unsqueeze(dim).narrow(dim, 0, 0)
    mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
    counter = torch.zeros((), dtype=torch.int64, device=device)

    def one(x: Tensor) -> Tensor:
        return batch_norm(x, None, None, training=True, num_batches_tracked=counter, inplace=inplace)

    assert vmap(one, dim, 1)(x).shape == (5, 0, 4, 3)
    own = mean.expand(0, 4).clone(), var.expand(0, 4).clone()
    y = vmap(lambda x, m, v: batch_norm(x, m, v, training=True, inplace=inplace), (dim, 0, 0))(x, *own)
    assert y.shape == (0, 5, 4, 3) and counter == 0
    assert vmap(grad(lambda x: one(x * 1).sum()), dim)(x).shape == (0, 5, 4, 3)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("transform", [jacrev, jacfwd])
def test_jacobians_of_an_empty_batch(transform: Callable[..., Any], training: bool, device: str) -> None:
    x, v = torch.empty(0, 3, 2, device=device), torch.ones(3, device=device)

    def function(x: Tensor, weight: Tensor, residual: Tensor) -> Tensor:
        return batch_norm(x, v, v, weight, v, training, momentum=0.0, activation="relu", residual=residual)

    for position, size in enumerate(((0, 3, 2), (3,), (0, 3, 2))):
        assert transform(function, position)(x, v, x.clone()).shape == (0, 3, 2, *size)


def test_captured_buffers_are_refused_untouched(device: str) -> None:
    """By torch, which lets no transform write to what it does not know: before the statistics have moved."""
    x = torch.randn(COUNT, 5, 4, device=device)
    mean, var = torch.zeros(COUNT, 4, device=device), torch.ones(COUNT, 4, device=device)
    counters = torch.zeros(COUNT, dtype=torch.int64, device=device)

    def loss(x: Tensor) -> Tensor:
        def one(x: Tensor, m: Tensor, v: Tensor, c: Tensor) -> Tensor:
            return batch_norm(x, m, v, training=True, num_batches_tracked=c)

        return vmap(one)(x, mean, var, counters).sum()

    with pytest.raises(RuntimeError, match="mutate a captured Tensor"):
        grad(loss)(x)
    assert not mean.any() and not counters.any()


def test_strided_statistics(device: str) -> None:
    """Written where they are, if they can be, captured or not."""
    x = torch.randn(COUNT, 5, 4, device=device)
    results = []
    for step in (1, 2):
        mean = torch.zeros(COUNT, 4 * step, device=device)[:, ::step]
        var = torch.ones(COUNT, 4 * step, device=device)[:, ::step]
        grad(lambda x, m=mean, v=var: vmap(lambda *a: batch_norm(*a, training=True))(x, m, v).sum())(x)
        results.append((mean, var))
    close(*results)
    assert mean.all()


def test_counters_that_cannot_move_leave_shared_statistics(device: str) -> None:
    """Which move before the examples do."""
    x, weight = torch.randn(5, 4, device=device), torch.ones(COUNT, 4, device=device)
    mean, var = torch.zeros(4, device=device), torch.ones(4, device=device)
    counters = torch.zeros(COUNT, dtype=torch.int64, device=device)

    def loss(x: Tensor, counters: Tensor) -> Tensor:
        def one(w: Tensor, c: Tensor) -> Tensor:
            return batch_norm(x, mean, var, w, training=True, num_batches_tracked=c)

        return vmap(one)(weight, counters).sum()

    for given, text in (
        (counters, "mutate a captured Tensor"),
        (counters[0].expand(COUNT), "memory of its own"),
    ):
        with pytest.raises(RuntimeError, match=text):
            grad(lambda x, c=given: loss(x, c))(x)
        assert not mean.any() and not counters.any()
