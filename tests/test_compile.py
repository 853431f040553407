"""Under fx, torch.compile, torch.export and fake tensors: one graph, the same bits, the same updates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import bnext
from bits import assert_same_bits
from layers import step_and_buffers

pytestmark = pytest.mark.usefixtures("fresh_compiler")

SHAPES = {"1d": (8, 5), "2d": (4, 5, 6, 7), "3d": (2, 5, 3, 4, 5)}
LAYERS = {"1d": bnext.BatchNorm1d, "2d": bnext.BatchNorm2d, "3d": bnext.BatchNorm3d}


def layer_of(kind: str, training: bool, **options: Any) -> nn.Module:
    torch.manual_seed(3)
    layer = LAYERS[kind](5, **options)
    for tensor in (layer.weight, layer.running_mean):
        nn.init.normal_(tensor)
    return layer.train(training)


def input_of(kind: str) -> Tensor:
    torch.manual_seed(4)
    return torch.randn(SHAPES[kind])


# aot_eager differentiates and functionalises as the default backend does, and compiles nothing, which costs seconds.
# "inductor" on one case shows that the whole way works.
CASES = [
    ("aot_eager", "1d", True, {}),
    ("aot_eager", "2d", True, {}),
    ("aot_eager", "2d", False, {}),
    ("aot_eager", "3d", True, {}),
    ("aot_eager", "2d", True, {"momentum": None}),
    ("aot_eager", "2d", True, {"unbiased_running_var": False}),
    ("inductor", "2d", True, {"momentum": None}),
    ("inductor", "2d", False, {}),
]


@pytest.mark.parametrize(("backend", "kind", "training", "options"), CASES, ids=str)
def test_compiled_without_a_break(backend: str, kind: str, training: bool, options: dict[str, Any]) -> None:
    """`fullgraph=True`, momentum=None included, which in torch's layer reads the counter on the host."""
    eager, compiled = (layer_of(kind, training, **options) for _ in range(2))
    call = torch.compile(compiled, fullgraph=True, backend=backend)
    for factor in (1.0, 2.0):
        x = input_of(kind) * factor
        assert_same_bits(step_and_buffers(compiled, x, call), step_and_buffers(eager, x))


def test_compiled_in_a_network_with_channels_last() -> None:
    def network() -> nn.Module:
        torch.manual_seed(5)
        return nn.Sequential(nn.Conv2d(3, 5, 3), bnext.BatchNorm2d(5), nn.ReLU()).to(
            memory_format=torch.channels_last
        )

    x = torch.randn(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    eager, compiled = network(), network()
    call = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    assert_same_bits(step_and_buffers(compiled, x, call), step_and_buffers(eager, x))
    assert call(x).is_contiguous(memory_format=torch.channels_last)


def test_compiled_with_dynamic_batch() -> None:
    """One graph for every batch size."""
    eager, compiled = layer_of("2d", True), layer_of("2d", True)
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(compiled, fullgraph=True, backend=counter)
    for batch in (8, 9, 10):
        x = torch.randn(batch, 5, 6, 7)
        torch._dynamo.mark_dynamic(x, 0)
        assert torch.equal(call(x), eager(x))
    assert counter.frame_count == 1
    assert torch.equal(compiled.running_var, eager.running_var)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", SHAPES)
def test_symbolic_trace(kind: str, training: bool) -> None:
    """fx does not look into leaf modules, but ours are not torch's: it traces into them, and must get through."""
    layer, twin = layer_of(kind, training), layer_of(kind, training)
    traced = fx.symbolic_trace(nn.Sequential(layer, nn.ReLU()))
    x = input_of(kind)
    assert torch.equal(traced(x), twin(x).relu())
    assert torch.equal(layer.running_mean, twin.running_mean)
    assert torch.equal(layer.num_batches_tracked, twin.num_batches_tracked)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", SHAPES)
def test_export(kind: str, training: bool) -> None:
    layer, twin = layer_of(kind, training), layer_of(kind, training)
    x = input_of(kind)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    module = program.module()
    assert torch.equal(module(x), twin(x))
    for name, buffer in twin.named_buffers():
        assert torch.equal(dict(module.named_buffers())[name], buffer), name
    assert torch.equal(module(torch.cat((x, x))), twin(torch.cat((x, x))))


def test_export_of_a_cumulative_average() -> None:
    layer, twin = layer_of("2d", True, momentum=None), layer_of("2d", True, momentum=None)
    module = torch.export.export(layer, (input_of("2d"),)).module()
    for factor in (1.0, 3.0):
        x = input_of("2d") * factor
        assert torch.equal(module(x), twin(x))
    assert torch.equal(module.running_var, twin.running_var)


def test_functional_call() -> None:
    """State passed in is used, updated and differentiated; the layer's own is left alone."""
    layer, twin = layer_of("2d", True), layer_of("2d", True)
    state = {name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}
    state["weight"].requires_grad_()
    y = torch.func.functional_call(layer, state, (input_of("2d"),))
    assert torch.equal(layer.running_mean, twin.running_mean)
    expected = twin(input_of("2d"))
    assert torch.equal(y, expected)
    assert torch.equal(state["running_mean"], twin.running_mean)
    y.square().sum().backward(), expected.square().sum().backward()
    assert torch.equal(state["weight"].grad, twin.weight.grad)


@pytest.mark.parametrize("training", [True, False])
def test_fake_tensors(training: bool) -> None:
    with FakeTensorMode():
        layer = bnext.BatchNorm2d(5).train(training)
        x = torch.empty(2, 5, 4, 4).contiguous(memory_format=torch.channels_last).requires_grad_()
        y = layer(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
    for tensor in (y, dx):
        assert tensor.shape == x.shape
        assert tensor.is_contiguous(memory_format=torch.channels_last)


def test_graph_records_one_operator() -> None:
    """Nothing beside the operator: no counter kernel, no cast, no branch on data."""
    graph = torch.export.export(layer_of("2d", True), (input_of("2d"),)).graph
    calls = [node.target for node in graph.nodes if node.op == "call_function"]
    assert calls[0] == torch.ops.bnext.batch_norm.default
    assert [call.__name__ for call in calls[1:]] == ["getitem"] * (len(calls) - 1)
