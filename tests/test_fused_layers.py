"""Layers with a residual or over their input: arguments, state, and what torch's tools make of them."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.library import opcheck

import bnext
from bits import assert_same_bits
from bnext.functional import ACTIVATIONS, WITH_PARAMETER, batch_norm
from cases import (
    BFLOAT16_WITH_FLOAT32,
    EVAL,
    FLOAT32,
    FLOAT64,
    INVERTIBLE,
    LAYOUT,
    RESIDUAL_KINDS,
    SHAPE_OF_RANK,
    TRAIN,
    Active,
    Dtypes,
    Mode,
    arguments_of,
)
from layers import CLASSES, Pair, assert_as_eager, every_class, every_copy, input_of, step_and_buffers
from operators import (
    BACKWARD,
    FORWARD,
    INPLACE,
    backward_arguments,
    forward_arguments,
    inplace_arguments,
)
from problem import make_active

pytestmark = pytest.mark.usefixtures("fresh_compiler")

ELU = Active("elu", 0.5)
every_kind = pytest.mark.parametrize("active", RESIDUAL_KINDS, ids=str)
both_modes = pytest.mark.parametrize("training", [True, False])


class Block(nn.Module):
    """conv, batch norm, conv: with x added behind the batch norm, or over its own input."""

    def __init__(self, active: Active | None, inplace: bool, training: bool = True) -> None:
        super().__init__()
        torch.manual_seed(6)
        given = arguments_of(active)
        self.first = nn.Conv2d(5, 5, 3, padding=1, bias=False)
        self.norm = bnext.BatchNorm2d(5, activation=given[0], activation_param=given[1], inplace=inplace)
        self.last = nn.Conv2d(5, 2, 1)
        nn.init.uniform_(self.norm.weight, 0.5, 1.5)
        nn.init.normal_(self.norm.bias)
        self.train(training)

    def forward(self, x: Tensor) -> Tensor:
        z = self.first(x)
        return self.last(self.norm(z) if self.norm.inplace else self.norm(z, x))


BLOCKS = [
    *((active, False) for active in RESIDUAL_KINDS),
    (None, True),
    (Active("leaky_relu"), True),
    (ELU, True),
]
every_block = pytest.mark.parametrize(("active", "inplace"), BLOCKS, ids=str)


@every_block
def test_compiled_without_a_break(active: Active | None, inplace: bool) -> None:
    eager, compiled = (Block(active, inplace) for _ in range(2))
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    x = input_of(CLASSES["2d"])
    for _ in range(2):
        assert_same_bits(step_and_buffers(compiled, x, call), step_and_buffers(eager, x))


@pytest.mark.parametrize(("active", "inplace"), [BLOCKS[0], BLOCKS[-1]], ids=str)
def test_compiled_by_inductor(active: Active | None, inplace: bool) -> None:
    eager, compiled = (Block(active, inplace) for _ in range(2))
    call = torch.compile(compiled, fullgraph=True)
    x = input_of(CLASSES["2d"])
    first, second = step_and_buffers(compiled, x, call), step_and_buffers(eager, x)
    # Convolutions may be given other layouts.
    torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("active", INVERTIBLE, ids=str)
@both_modes
def test_compiled_over_the_graphs_own_input(training: bool, active: Active | None) -> None:
    """Who called sees the new values, and autograd the write."""
    given = arguments_of(active)
    results = []
    for compiled in (False, True):
        layer = bnext.BatchNorm2d(5, activation=given[0], activation_param=given[1], inplace=True).train(
            training
        )
        call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
        leaf = input_of(CLASSES["2d"]).requires_grad_()
        x = leaf * 2
        y = call(x)
        assert torch.equal(x, y)
        (x.cos() + y).sum().backward()
        results.append([y.detach(), leaf.grad, layer.weight.grad, layer.bias.grad, layer.running_mean])
    assert_same_bits(*results)


@every_block
@both_modes
def test_export(training: bool, active: Active | None, inplace: bool) -> None:
    program = torch.export.export(Block(active, inplace, training), (input_of(CLASSES["2d"]),))
    targets = [node.target for node in program.graph.nodes]
    norm = INPLACE if inplace else FORWARD if training else torch.ops.aten.batch_norm.default
    assert norm in targets
    block, module = Block(active, inplace, training), program.module()
    for factor in (1, 2):
        x = input_of(CLASSES["2d"]) * factor
        assert_as_eager([module(x)], [block(x)], training or inplace)
    assert torch.equal(dict(module.named_buffers())["norm.running_var"], block.norm.running_var)


@every_block
def test_symbolic_trace(active: Active | None, inplace: bool) -> None:
    """A call whose result nobody uses stays where it writes over its input."""
    traced, block = fx.symbolic_trace(Block(active, inplace)), Block(active, inplace)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    assert "norm" in [node.target for node in traced.graph.nodes]
    x = input_of(CLASSES["2d"])
    assert torch.equal(traced(x), block(x))


@every_copy
@every_class
def test_copies(pair: Pair, copied: Callable[[nn.Module], nn.Module]) -> None:
    layer = pair[0](5, activation="elu", activation_param=0.5, inplace=True).eval()
    other, x = copied(layer), input_of(pair)
    assert repr(other) == repr(layer)
    y = other(x)
    assert y is x and torch.equal(y, layer(input_of(pair)))


@every_class
def test_repr(pair: Pair) -> None:
    plain = repr(pair[1](5))[:-1]
    assert repr(pair[0](5, inplace=True)) == plain + ", inplace=True)"
    layer = pair[0](5, activation="elu", activation_param=0.5, inplace=True)
    assert repr(layer) == plain + ", activation=elu, activation_param=0.5, inplace=True)"


@every_class
def test_pickles_from_before_there_was_inplace(pair: Pair) -> None:
    state = copy.deepcopy(pair[0](5, activation="relu").__dict__)
    del state["inplace"]
    layer = pair[0].__new__(pair[0])
    layer.__setstate__(state)
    assert layer.inplace is False and layer.activation == "relu"
    x = input_of(pair)
    assert torch.equal(layer(x, x), pair[0](5, activation="relu")(x, x))


@every_class
def test_state_dicts_both_ways(pair: Pair) -> None:
    ours, theirs = pair[0](5, inplace=True), pair[1](5)
    ours(input_of(pair))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    pair[0](5, inplace=True).load_state_dict(theirs.state_dict())


NOT_INVERTIBLE = [
    *((name, None) for name in ACTIVATIONS if name not in WITH_PARAMETER),
    *((name, param) for name in WITH_PARAMETER for param in (0.0, -1.0, 0, float("nan"), -float("inf"))),
]


@pytest.mark.parametrize(("name", "param"), NOT_INVERTIBLE, ids=str)
def test_what_cannot_be_inverted(name: str, param: float | None) -> None:
    """The constructor says it as the operators do, forward and backward."""
    x, stats = torch.ones(4, 3), torch.ones(2, 3, dtype=torch.float64)
    given: dict[str, Any] = {"activation": name, "activation_param": param}
    calls: list[Callable[[], object]] = [
        lambda: bnext.BatchNorm1d(3, inplace=True, **given),
        lambda: batch_norm(x, None, None, training=True, inplace=True, **given),
        lambda: batch_norm(x.to("meta"), None, None, training=True, inplace=True, **given),
        lambda: BACKWARD(x, x, *[None] * 4, stats, True, name, param, True, [True] * 3 + [False]),
    ]
    texts = set()
    finite = param is None or math.isfinite(param)
    text = (
        f"inplace=True keeps the output alone.*but got {name}"
        if finite
        else "expected a finite activation_param"
    )
    for call in calls:
        with pytest.raises(ValueError, match="^" + text) as caught:
            call()
        texts.add(str(caught.value))
    assert len(texts) == 1
    assert torch.equal(x, torch.ones(4, 3))


@pytest.mark.parametrize("active", INVERTIBLE, ids=str)
def test_the_constructor_takes_what_can(active: Active | None) -> None:
    given = arguments_of(active)
    layer = bnext.BatchNorm1d(5, activation=given[0], activation_param=given[1], inplace=True)
    x = input_of(CLASSES["1d"])
    assert layer(x) is x


def test_inplace_beside_a_residual() -> None:
    layer, x = bnext.BatchNorm1d(5, inplace=True), input_of(CLASSES["1d"])
    with pytest.raises(ValueError, match="inplace=True without a residual"):
        layer(x, x)
    assert torch.equal(x, input_of(CLASSES["1d"])) and layer.num_batches_tracked == 0


OPCHECK_CASES = [
    ("nchw", FLOAT32, TRAIN, RESIDUAL_KINDS[0]),
    ("nhwc", BFLOAT16_WITH_FLOAT32, EVAL, RESIDUAL_KINDS[0]),
    ("nc", FLOAT64, TRAIN, RESIDUAL_KINDS[1]),
    ("nhwc", FLOAT32, TRAIN, RESIDUAL_KINDS[2]),
]


@pytest.mark.parametrize(("layout", "dtypes", "mode", "active"), OPCHECK_CASES, ids=str)
def test_opcheck_with_a_residual(
    layout: str, dtypes: Dtypes, mode: Mode, active: Active | None, device: str
) -> None:
    """As in test_ops."""
    shape, last = SHAPE_OF_RANK[LAYOUT[layout].rank], active is not None
    problem = make_active(active, shape, LAYOUT[layout], dtypes, mode, device=device, residual=LAYOUT[layout])
    opcheck(BACKWARD, backward_arguments(problem, (True, True, True, last)))
    problem.require_grad()
    opcheck(FORWARD, forward_arguments(problem))
    opcheck(FORWARD, forward_arguments(problem, for_backward=True))


INPLACE_CASES = [
    ("nchw", FLOAT32, TRAIN, None),
    ("nhwc", FLOAT32, EVAL, Active("leaky_relu")),
    ("nc", FLOAT64, TRAIN, ELU),
    ("hwnc", BFLOAT16_WITH_FLOAT32, TRAIN, ELU),
]


@pytest.mark.parametrize(("layout", "dtypes", "mode", "active"), INPLACE_CASES, ids=str)
def test_opcheck_inplace(layout: str, dtypes: Dtypes, mode: Mode, active: Active | None, device: str) -> None:
    """Of an x that requires no gradient; test_inplace_graph has the others."""
    shape = SHAPE_OF_RANK[LAYOUT[layout].rank]
    problem = make_active(active, shape, LAYOUT[layout], dtypes, mode, device=device, inplace=True)
    opcheck(BACKWARD, backward_arguments(problem))
    opcheck(INPLACE, inplace_arguments(problem))
    problem.require_grad("weight", "bias")
    opcheck(INPLACE, inplace_arguments(problem))


@every_kind
@pytest.mark.parametrize("layout", ["nc", "nchw", "nhwc", "hwnc"])
def test_meta_kernels_tell_what_will_come(layout: str, active: Active | None, device: str) -> None:
    shape = (12, 5) if layout == "nc" else (3, 5, 4, 5)
    problem = make_active(
        active, shape, LAYOUT[layout], FLOAT32, TRAIN, device=device, residual=LAYOUT[layout]
    )
    wanted = (True, False, True, active is not None)
    for op, arguments in (
        (FORWARD, forward_arguments(problem, for_backward=True)),
        (FORWARD, forward_arguments(problem, for_backward=True, keeps_input=False)),
        (FORWARD, forward_arguments(problem)),
        (BACKWARD, backward_arguments(problem, wanted)),
        (BACKWARD, backward_arguments(problem, (False, *wanted[1:]))),
    ):
        on_meta = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
        for told, came in zip(op(*on_meta), op(*arguments), strict=True):
            assert (told.shape, told.stride(), told.dtype) == (came.shape, came.stride(), came.dtype)
