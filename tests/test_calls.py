"""How a call gets from Python to the operator: directly if it may, by torch.ops whenever anyone watches or objects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize, prune
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import bnext
from bnext import _C
from bnext.functional import batch_norm

OPERATOR = torch.ops.bnext.batch_norm.default
NAMES = (
    "x",
    "residual",
    "weight",
    "bias",
    "running_mean",
    "running_var",
    "num_batches_tracked",
    "training",
    "momentum",
    "eps",
)
ORDER = (
    *NAMES,
    "unbiased_running_var",
    "ndims",
    "activation",
    "activation_param",
    "for_backward",
    "skip_nonfinite",
)


class Logged(Tensor):
    """A subclass that sees every function called on it."""

    calls: ClassVar[list[Any]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


def arguments(**changes: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    given = {
        "x": torch.randn(4, 3),
        "residual": None,
        "weight": nn.Parameter(torch.rand(3)),
        "bias": torch.rand(3),
        "running_mean": torch.zeros(3),
        "running_var": torch.ones(3),
        "num_batches_tracked": torch.tensor(0),
        "training": True,
        "momentum": 0.1,
        "eps": 1e-5,
        "unbiased_running_var": True,
        "ndims": (2, 3),
        "activation": None,
        "activation_param": None,
        "for_backward": False,
        "skip_nonfinite": False,
    }
    return given | changes


def by_function(given: dict[str, Any]) -> Tensor:
    renamed = {("input" if k == "x" else "_ndims" if k == "ndims" else k): v for k, v in given.items()}
    del renamed["for_backward"]
    return batch_norm(**renamed)


TAKEN: dict[str, dict[str, Any]] = {
    "everything": {},
    "no tensors": dict.fromkeys(ORDER[1:7]),
    "momentum None": {"momentum": None},
    "activation": {"activation": "gelu"},
    "residual": {"residual": torch.linspace(-1, 1, 12).view(4, 3)},
    "mask": {"residual": torch.ones(4, 3), "activation": "relu", "for_backward": True},
    "activation with a parameter": {"activation": "elu", "activation_param": 0.5},
    "inference": {"training": False, "unbiased_running_var": False, "ndims": ()},
    "meta": {name: torch.ones(3, device="meta") for name in ORDER[2:6]}
    | {"x": torch.ones(4, 3, device="meta"), "num_batches_tracked": None},
}


@pytest.mark.parametrize("case", TAKEN)
def test_direct_call_is_the_operator(case: str) -> None:
    ours, expected = arguments(**TAKEN[case]), arguments(**TAKEN[case])
    y = _C.batch_norm(*ours.values())
    want = OPERATOR(*expected.values())[0]
    assert y is not None
    assert y.requires_grad == want.requires_grad
    if not y.is_meta:
        torch.testing.assert_close(
            (y, *list(ours.values())[1:7]), (want, *list(expected.values())[1:7]), rtol=0, atol=0
        )


# What torch.ops takes and the direct call leaves to it.
DECLINED: dict[str, dict[str, Any]] = {
    "subclass": {"x": torch.ones(4, 3).as_subclass(Logged)},
    "subclass as weight": {"weight": torch.ones(3).as_subclass(Logged)},
    "subclass as residual": {"residual": torch.ones(4, 3).as_subclass(Logged)},
    "list": {"ndims": [2, 3]},
    "size": {"ndims": torch.Size((2, 3))},
    "integer eps": {"eps": 1},
    "integer momentum": {"momentum": 1},
    "integer parameter": {"activation": "elu", "activation_param": 2},
    "numpy eps": {"eps": np.float64(1e-5)},
}
WRONG: dict[str, dict[str, Any]] = {
    "weight, float": {"weight": 1.0},
    "running_mean, list": {"running_mean": [0.0] * 3},
    "training, text": {"training": "yes"},
    "momentum, text": {"momentum": "0.1"},
    "eps, None": {"eps": None},
    "eps, text": {"eps": "1e-5"},
    "activation, number": {"activation": 1},
    "activation_param, text": {"activation": "elu", "activation_param": "0.1"},
    "ndims, text": {"ndims": ("2",)},
    "ndims, huge": {"ndims": (2**70,)},
    "ndims, number": {"ndims": 2.5},
}


@pytest.mark.parametrize("case", DECLINED | WRONG)
def test_declined_without_a_trace(case: str) -> None:
    given = arguments(**(DECLINED | WRONG)[case])
    assert _C.batch_norm(*given.values()) is None
    assert given["num_batches_tracked"] == 0


def test_declined_by_number_of_arguments() -> None:
    assert _C.batch_norm() is None
    assert _C.batch_norm(*arguments().values(), None) is None


@pytest.mark.parametrize("case", DECLINED)
def test_what_is_declined_still_works(case: str) -> None:
    ours, expected = arguments(**DECLINED[case]), arguments(**DECLINED[case])
    assert torch.equal(by_function(ours), OPERATOR(*expected.values())[0])
    assert ours["num_batches_tracked"] == 1


def error_of(call: Callable[[], object]) -> tuple[type[Exception], str]:
    with pytest.raises(Exception) as caught:
        call()
    return caught.type, str(caught.value)


@pytest.mark.parametrize("case", WRONG)
def test_wrong_kinds_of_argument(case: str) -> None:
    """By name, a TypeError as torch's function has it; ndims, which is ours alone, as torch.ops has it."""
    given, name = arguments(**WRONG[case]), case.split(",")[0]
    kind, text = error_of(lambda: by_function(given))
    if name == "ndims":
        assert (kind, text) == error_of(lambda: OPERATOR(*given.values()))
    else:
        assert kind is TypeError and text.startswith(f"expected {name} as ")
    assert given["num_batches_tracked"] == 0


def test_errors_of_the_operator_are_the_same() -> None:
    for change in (
        {"x": torch.ones(3)},
        {"bias": torch.ones(4)},
        {"x": torch.ones(4, 3).long()},
        {"eps": 0.0},
        {"activation": "swish"},
        {"activation": "relu", "activation_param": 0.1},
    ):
        given = arguments(**change)
        assert error_of(lambda given=given: _C.batch_norm(*given.values())) == error_of(
            lambda given=given: OPERATOR(*given.values())
        )


def test_a_subclass_sees_the_call() -> None:
    Logged.calls.clear()
    y = bnext.BatchNorm1d(3)(torch.randn(4, 3).as_subclass(Logged))
    assert OPERATOR in Logged.calls
    assert type(y) is Logged


def test_a_function_mode_sees_the_call() -> None:
    class Log(TorchFunctionMode):
        calls: ClassVar[list[Any]] = []

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls.append(func)
            return func(*args, **(kwargs or {}))

    layer, x = bnext.BatchNorm1d(3), torch.randn(4, 3)
    with Log():
        y = layer(x)
    assert OPERATOR in Log.calls
    assert torch.equal(y, bnext.BatchNorm1d(3)(x))


def test_a_dispatch_mode_sees_forward_and_backward() -> None:
    class Log(TorchDispatchMode):
        calls: ClassVar[list[Any]] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.calls.append(func)
            return func(*args, **(kwargs or {}))

    x = torch.randn(4, 3, requires_grad=True)
    layer = bnext.BatchNorm1d(3)
    with Log():
        y = layer(x)
        y.backward(torch.ones_like(y))
    assert Log.calls.count(OPERATOR) == 1
    assert Log.calls.count(torch.ops.bnext.batch_norm_backward.default) == 1


def test_traces_record_the_operator() -> None:
    """jit.trace and fx each put the operator into their graph, not its result."""
    layer, x = bnext.BatchNorm1d(3).eval(), torch.randn(4, 3)
    traced = torch.jit.trace(layer, x)
    assert "bnext::batch_norm" in str(traced.graph)
    graph = fx.symbolic_trace(layer).graph
    assert OPERATOR in [node.target for node in graph.nodes]
    made = fx.experimental.proxy_tensor.make_fx(layer)(x)
    assert OPERATOR in [node.target for node in made.graph.nodes]
    for module in (traced, made):
        assert torch.equal(module(2 * x), layer(2 * x))


def test_the_profiler_names_the_operator() -> None:
    layer, x = bnext.BatchNorm1d(3), torch.randn(4, 3)
    with torch.profiler.profile() as profile:
        layer(x)
    assert "bnext::batch_norm" in {event.name for event in profile.events()}


class Twice(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized() -> bnext.BatchNorm1d:
    layer = bnext.BatchNorm1d(3)
    parametrize.register_parametrization(layer, "weight", Twice())
    return layer


def test_parametrized_weight() -> None:
    """A weight that is computed on each access is taken as computed."""
    layer, plain, x = parametrized(), bnext.BatchNorm1d(3), torch.randn(4, 3)
    nn.init.constant_(plain.weight, 2.0)
    y, expected = layer(x), plain(x)
    assert torch.equal(y, expected)
    (y.square().sum() + expected.square().sum()).backward()
    assert torch.equal(layer.parametrizations.weight.original.grad, 2 * plain.weight.grad)
    for name, buffer in plain.named_buffers():
        assert torch.equal(layer.get_buffer(name), buffer), name
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), plain(x))


def test_pruned_weight() -> None:
    """Pruning leaves a plain attribute where the parameter was."""
    layer, x = bnext.BatchNorm1d(3), torch.randn(4, 3)
    prune.custom_from_mask(layer, "weight", torch.tensor([1, 0, 1]))
    assert torch.equal(layer(x)[:, 1], torch.zeros(4))


def test_replicated_state() -> None:
    """As nn.DataParallel does it: the replica's parameters are not leaves, and attributes."""
    layer, x = bnext.BatchNorm1d(3), torch.randn(4, 3)
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer.named_parameters():
        setattr(replica, name, parameter * 3)
    replica(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((3,), 12.0))


def test_removed_state() -> None:
    """A missing attribute is an error where it is needed, and only there."""
    layer, x = bnext.BatchNorm1d(3), torch.randn(4, 3)
    del layer.num_batches_tracked
    assert torch.equal(layer.eval()(x), bnext.BatchNorm1d(3).eval()(x))
    with pytest.raises(AttributeError, match="num_batches_tracked"):
        layer.train()(x)
    del layer.running_mean
    with pytest.raises(AttributeError, match="running_mean"):
        layer.eval()(x)
