"""Layers with an activation: arguments, repr and state, errors, and what torch's tools make of the operators."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.library import opcheck

import bnext
from bits import assert_same_bits
from bnext.functional import ACTIVATIONS, batch_norm
from cases import (
    ACTIVE,
    BFLOAT16_WITH_FLOAT32,
    EVAL,
    FLOAT32,
    FLOAT64,
    LAYOUT,
    MODES,
    TRAIN,
    Active,
    Dtypes,
    Mode,
)
from layers import CLASSES, Pair, assert_as_eager, every_class, every_copy, input_of, step_and_buffers
from operators import BACKWARD, FORWARD, backward_arguments, forward_arguments
from problem import make_active

pytestmark = pytest.mark.usefixtures("fresh_compiler")

every_active = pytest.mark.parametrize("active", ACTIVE, ids=str)
ELU = Active("elu", 0.5)
# Written in the loops, called by them, called with a parameter.
KINDS = [Active("relu"), Active("silu"), ELU]
every_kind = pytest.mark.parametrize("active", KINDS, ids=str)


def layer_of(pair: Pair, active: Active, training: bool = True, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    layer = pair[0](
        5, activation=active.activation, activation_param=active.activation_param, **options
    ).train(training)
    for tensor in (layer.weight, layer.bias, layer.running_mean):
        nn.init.normal_(tensor)
    return layer


@every_active
@every_class
def test_same_as_torchs_layers(pair: Pair, active: Active) -> None:
    """A hundred roundings of values below 100; in training, eval and training again."""

    class Act(nn.Module):
        def forward(self, z: Tensor) -> Tensor:
            return active.of(z)

    ours = layer_of(pair, active, dtype=torch.float64)
    theirs = nn.Sequential(pair[1](5, dtype=torch.float64), Act())
    theirs[0].load_state_dict(ours.state_dict())
    x = input_of(pair, torch.float64)
    for training in (True, False, True):
        ours.train(training)
        theirs.train(training)
        torch.testing.assert_close(
            step_and_buffers(ours, x), step_and_buffers(theirs, x), rtol=1e-11, atol=1e-12
        )


@every_class
def test_repr(pair: Pair) -> None:
    plain = repr(pair[1](5))[:-1]
    assert repr(pair[0](5, activation="relu")) == plain + ", activation=relu)"
    layer = pair[0](5, unbiased_running_var=False, activation="elu", activation_param=0.5)
    assert repr(layer) == plain + ", unbiased_running_var=False, activation=elu, activation_param=0.5)"


@every_copy
@every_class
def test_copies(pair: Pair, copied: Callable[[nn.Module], nn.Module]) -> None:
    ours = layer_of(pair, ELU, training=False)
    other = copied(ours)
    assert repr(other) == repr(ours)
    assert torch.equal(other(input_of(pair)), ours(input_of(pair)))


@every_class
def test_pickles_from_before_there_were_activations(pair: Pair) -> None:
    state = copy.deepcopy(layer_of(pair, Active("relu")).__dict__)
    del state["activation"], state["activation_param"]
    layer = pair[0].__new__(pair[0])
    layer.__setstate__(state)
    assert layer.activation is None and layer.activation_param is None
    twin = pair[0](5)
    twin.load_state_dict(layer.state_dict())
    assert torch.equal(layer(input_of(pair)), twin(input_of(pair)))


@every_class
def test_state_dicts_both_ways(pair: Pair) -> None:
    """The activation is no state: the same keys, and either loads what the other saved."""
    ours, theirs = layer_of(pair, ELU), pair[1](5)
    ours(input_of(pair))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    fresh = pair[0](5, activation="elu", activation_param=0.5)
    fresh.load_state_dict(theirs.state_dict())
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(tensor, ours.state_dict()[name]), name
    fresh.eval()
    ours.eval()
    assert torch.equal(fresh(input_of(pair)), ours(input_of(pair)))


@every_kind
def test_what_is_drawn_into_a_call(active: Active) -> None:
    """In the place of the layer's activation, and of a residual."""
    bare, x = layer_of(CLASSES["2d"], Active("tanh")), input_of(CLASSES["2d"])
    of_call = (active.activation, active.activation_param)
    for residual in (None, x.flip(0)):
        expected = layer_of(CLASSES["2d"], active)(x, residual)
        assert torch.equal(bare(x, drawn_in=(residual, *of_call)), expected)
    before = copy.deepcopy(bare.state_dict())
    for wrong in ("relu", ("relu", None), [None, "relu", None]):
        with pytest.raises(
            TypeError, match=r"expected drawn_in \(residual, activation, activation_param\), but"
        ):
            bare(x, drawn_in=wrong)
    assert all(torch.equal(before[name], tensor) for name, tensor in bare.state_dict().items())


def test_parameters_are_numbers_of_python() -> None:  # a graph's text has them
    layer = bnext.BatchNorm1d(3, activation="elu", activation_param=np.float32(0.5))
    assert type(layer.activation_param) is float and layer.activation_param == 0.5


def test_the_attribute_may_be_set() -> None:
    layer = bnext.BatchNorm2d(5)
    layer.activation = "relu"
    assert not (layer(input_of(CLASSES["2d"])) < 0).any()


KNOWN = ", ".join(ACTIVATIONS)
WRONG: dict[str, tuple[str | None, float | None, str]] = {
    "unknown": ("swish", None, f"expected activation one of {KNOWN} or None, but got swish"),
    "of a class": ("ReLU", None, f"expected activation one of {KNOWN} or None, but got ReLU"),
    "empty": ("", None, f"expected activation one of {KNOWN} or None, but got "),
    "none as text": ("none", None, f"expected activation one of {KNOWN} or None, but got none"),
    "parameter": (
        "relu",
        0.1,
        "expected activation_param with leaky_relu or elu only, but got 0.1 with relu",
    ),
    "no activation": (
        None,
        1.0,
        "expected activation_param with leaky_relu or elu only, but got 1.0 with None",
    ),
    "infinite": ("leaky_relu", float("inf"), "expected a finite activation_param, but got inf"),
    "both": ("swish", 0.1, f"expected activation one of {KNOWN} or None, but got swish"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused(case: str) -> None:
    """By the constructor and by the operator, forward and backward, in the same words; nothing is touched."""
    activation, param, text = WRONG[case]
    mean, counter, x = torch.zeros(3), torch.tensor(0), torch.randn(4, 3)
    stats = torch.ones(2, 3, dtype=torch.float64)
    given: dict[str, Any] = {"activation": activation, "activation_param": param}
    calls: list[Callable[[], object]] = [
        lambda: bnext.BatchNorm1d(3, **given),
        lambda: batch_norm(x, mean, mean + 1, training=True, num_batches_tracked=counter, **given),
        lambda: BACKWARD(x, x, *[None] * 4, stats, True, activation, param, False, [True] * 3 + [False]),
    ]
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == text
    assert counter == 0 and not mean.any()


def test_the_backward_operator_checks_the_bias() -> None:
    x, stats = torch.ones(2, 3), torch.ones(2, 3, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="bias should contain 3 elements not 2"):
        BACKWARD(x, x, *[None] * 3, torch.ones(2), stats, True, "relu", None, False, [True] * 3 + [False])


@pytest.mark.parametrize("mode", MODES, ids=str)
@pytest.mark.parametrize("shape", [(0, 3), (2, 3, 0, 4)], ids=str)
def test_empty(shape: tuple[int, ...], mode: Mode, device: str) -> None:
    problem = make_active(
        KINDS[1], shape, LAYOUT["nc" if len(shape) == 2 else "nchw"], FLOAT32, mode, device=device
    )
    leaves = problem.require_grad()
    y = problem.forward()
    dx, dweight, dbias = torch.autograd.grad(y.sum(), leaves)
    assert y.shape == dx.shape == shape
    assert not dweight.any() and not dbias.any()


def test_inplace_is_a_bool() -> None:
    with pytest.raises(TypeError, match="expected inplace as True or False, but got 'no'"):
        bnext.BatchNorm1d(3, inplace="no")


@every_active
@pytest.mark.parametrize("training", [True, False])
def test_compiled_without_a_break(training: bool, active: Active) -> None:
    eager, compiled = (layer_of(CLASSES["2d"], active, training) for _ in range(2))
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    x = input_of(CLASSES["2d"])
    assert_same_bits(step_and_buffers(compiled, x, call), step_and_buffers(eager, x))


def test_compiled_by_inductor() -> None:
    eager, compiled = (layer_of(CLASSES["2d"], ELU) for _ in range(2))
    call = torch.compile(compiled, fullgraph=True)
    x = input_of(CLASSES["2d"])
    assert_same_bits(step_and_buffers(compiled, x, call), step_and_buffers(eager, x))


@every_kind
@pytest.mark.parametrize("training", [True, False])
def test_export_and_symbolic_trace(training: bool, active: Active) -> None:
    """One operator, the activation within, but for inference that is exported."""
    pair, x = CLASSES["2d"], input_of(CLASSES["2d"])
    program = torch.export.export(layer_of(pair, active, training), (x,))
    traced = fx.symbolic_trace(layer_of(pair, active, training))
    for graph in (program.graph, traced.graph) if training else (traced.graph,):
        calls = [node.target for node in graph.nodes if node.op == "call_function"]
        assert calls[0] == FORWARD
        assert {call.__name__ for call in calls[1:]} == {"getitem"}
    for call in (program.module(), traced):
        assert_as_eager([call(x)], [layer_of(pair, active, training)(x)], training)


OPCHECK_CASES = [
    ("nchw", FLOAT32, TRAIN, KINDS[0]),
    ("nhwc", FLOAT32, EVAL, KINDS[1]),
    ("nc", FLOAT64, TRAIN, KINDS[2]),
    ("nhwc", BFLOAT16_WITH_FLOAT32, TRAIN, KINDS[1]),
]


@pytest.mark.parametrize(("layout", "dtypes", "mode", "active"), OPCHECK_CASES, ids=str)
def test_opcheck(layout: str, dtypes: Dtypes, mode: Mode, active: Active, device: str) -> None:
    """As in test_ops; kinks are as far off as in any random problem."""
    shape = (12, 5) if layout == "nc" else (3, 5, 4, 5)
    problem = make_active(active, shape, LAYOUT[layout], dtypes, mode, device=device)
    opcheck(BACKWARD, backward_arguments(problem))
    opcheck(BACKWARD, backward_arguments(problem, keeps_input=False))
    opcheck(FORWARD, forward_arguments(problem, for_backward=True, keeps_input=False))
    problem.require_grad()
    opcheck(FORWARD, forward_arguments(problem))


@every_kind
def test_checkpointing(active: Active) -> None:
    plain, checkpointed = (layer_of(CLASSES["2d"], active, training=False) for _ in range(2))
    x = input_of(CLASSES["2d"])
    call = lambda t: torch.utils.checkpoint.checkpoint(checkpointed, t, use_reentrant=False)  # noqa: E731
    assert_same_bits(step_and_buffers(checkpointed, x, call), step_and_buffers(plain, x))
