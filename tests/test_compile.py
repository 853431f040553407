"""Under fx, torch.compile, torch.export and fake tensors: one graph, the same bits, the same updates."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

import bnext
from bits import assert_same_bits
from bnext.functional import batch_norm
from layers import AS_TORCH_INFERS, assert_as_eager, step_and_buffers

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
    """A layer is a node of its own, as torch's are, and follows the graph's mode; alone it is one operator."""
    layer, twin = layer_of(kind, training), layer_of(kind, training)
    traced, alone = (
        fx.symbolic_trace(nn.Sequential(layer, nn.ReLU())),
        fx.symbolic_trace(layer_of(kind, training)),
    )
    assert [node.op for node in traced.graph.nodes] == ["placeholder", "call_module", "call_module", "output"]
    x = input_of(kind)
    assert torch.equal(alone(x), layer_of(kind, training)(x))
    for mode in (training, not training):
        traced.train(mode)
        assert torch.equal(traced(x), twin.train(mode)(x).relu())
        assert torch.equal(layer.running_mean, twin.running_mean)
        assert torch.equal(layer.num_batches_tracked, twin.num_batches_tracked)


def test_symbolic_trace_of_keywords_and_by_other_tracers() -> None:
    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = bnext.BatchNorm1d(5, activation="relu")

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(input=x, residual=x)

    class LooksInside(fx.Tracer):
        def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
            return False

    x, network = input_of("1d"), Adds().eval()
    for tracer in (fx.Tracer(), LooksInside()):
        graph = tracer.trace(network)
        assert [node.target for node in graph.nodes if node.op == "call_module"] == ["norm"]
        assert torch.equal(fx.GraphModule(network, graph)(x), network(x))


def test_a_part_of_a_symbolic_trace_runs_no_more_than_it_needs() -> None:
    """What comes after it goes, as it goes of torch's layers, though it would count batches."""
    network = nn.Sequential(bnext.BatchNorm1d(5), nn.ReLU(inplace=True), bnext.BatchNorm1d(5))
    traced = fx.symbolic_trace(network)
    first = next(node for node in traced.graph.nodes if node.op == "call_module")
    traced.graph.output_node().args = (first,)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    x = input_of("1d")
    y = traced(x)
    assert (y < 0).any() and network[0].num_batches_tracked == 1 and network[2].num_batches_tracked == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", SHAPES)
def test_export(kind: str, training: bool) -> None:
    layer, twin = layer_of(kind, training), layer_of(kind, training)
    x = input_of(kind)
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    module = program.module()
    assert_as_eager([module(x)], [twin(x)], training)
    for name, buffer in twin.named_buffers():
        assert torch.equal(dict(module.named_buffers())[name], buffer), name
    assert_as_eager([module(torch.cat((x, x)))], [twin(torch.cat((x, x)))], training)


def test_export_of_a_cumulative_average() -> None:
    layer, twin = layer_of("2d", True, momentum=None), layer_of("2d", True, momentum=None)
    module = torch.export.export(layer, (input_of("2d"),)).module()
    for factor in (1.0, 3.0):
        x = input_of("2d") * factor
        assert torch.equal(module(x), twin(x))
    assert torch.equal(module.running_var, twin.running_var)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("active", [None, "relu", "silu"])
def test_inference_is_of_torchs_operators_and_writes_nothing(active: str | None, dtype: torch.dtype) -> None:
    """An exported program needs no bnext; neither it nor compiled code counts as writing the statistics."""

    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = layer_of("2d", False, activation=active)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.norm(x), residual=x)

    network, x = Adds(), input_of("2d").to(dtype)
    program = torch.export.export(network, (x,)).run_decompositions()
    assert not program.graph_signature.buffers_to_mutate
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert not any("bnext" in target for target in targets), targets
    assert "aten._native_batch_norm_legit_no_training.default" in targets
    # bfloat16: the same but for sums that fall on the other side of a half, one rounding of values below 32
    bounds = AS_TORCH_INFERS if dtype == torch.float32 else {"rtol": 2**-7, "atol": 2**-4}
    torch.testing.assert_close(program.module()(x), network(x), **bounds)

    call = torch.compile(network, fullgraph=True, backend="aot_eager")
    versions = [buffer._version for buffer in network.buffers()]
    with torch.no_grad():
        torch.testing.assert_close(call(x), network(x), **bounds)
    assert [buffer._version for buffer in network.buffers()] == versions


@pytest.mark.parametrize("active", [None, "relu"])
def test_compiled_inference_keeps_for_backward_what_ours_does(active: str | None) -> None:
    """No statistics, which may change before it, and of a frozen layer no tensor of the input's size."""
    layer, x = layer_of("2d", False, activation=active), input_of("2d").requires_grad_()
    (expected,) = torch.autograd.grad(layer(x).sum(), x)
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    layer.running_var.mul_(2)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        torch.compile(bnext.freeze(layer), fullgraph=True, backend="aot_eager_decomp_partition")(x)
    assert max(t.nbytes for t in kept) < x.nbytes / 4


@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_inference_with_gradients_writes_no_statistics(inplace: bool) -> None:
    """Else what an earlier loss keeps of them counts as spoilt."""
    layer, x = layer_of("2d", False, activation="leaky_relu", inplace=inplace), input_of("2d")
    scale = torch.ones(5, requires_grad=True)
    on_statistics = (scale * layer.running_mean * layer.running_var).sum()
    kept = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x.clone())
    (expected,) = torch.autograd.grad(layer(x.clone()).square().sum(), layer.weight)
    (y.square().sum() + on_statistics).backward()
    assert torch.equal(layer.weight.grad, expected)
    assert torch.equal(scale.grad, kept["running_mean"] * kept["running_var"])
    assert all(torch.equal(buffer, kept[name]) for name, buffer in layer.named_buffers())


def test_a_parameter_that_varies_stays_in_the_graph() -> None:
    mean, var, x = torch.zeros(5), torch.ones(5), input_of("2d")

    def call(x: Tensor, slope: float) -> Tensor:
        return batch_norm(x, mean, var, activation="leaky_relu", activation_param=slope)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for slope in (0.1, 0.2, 0.3):
        torch.testing.assert_close(compiled(x, slope), call(x, slope), **AS_TORCH_INFERS)


WRONG_IN_INFERENCE: dict[str, tuple[dict[str, Any], Tensor]] = {
    "rank": ({}, torch.ones(4, 5)),
    "channels": ({}, torch.ones(4, 6, 2, 2)),
    "dtype": ({}, torch.ones(4, 5, 2, 2, dtype=torch.float64)),
    "eps": ({"eps": -1.0}, torch.ones(4, 5, 2, 2)),
    "residual": ({"residual": torch.ones(4, 5, 2, 1)}, torch.ones(4, 5, 2, 2)),
}


@pytest.mark.parametrize("case", WRONG_IN_INFERENCE)
def test_inference_refuses_what_it_refuses_uncompiled(case: str) -> None:
    change, x = WRONG_IN_INFERENCE[case]
    layer = layer_of("2d", False)
    layer.eps = change.get("eps", layer.eps)
    given = {name: value for name, value in change.items() if name == "residual"}
    with pytest.raises(Exception) as eager:  # whichever it is, the other says the same
        layer(x, **given)
    with pytest.raises(Exception, match=re.escape(str(eager.value).splitlines()[0])):
        torch.compile(layer, fullgraph=True, backend="aot_eager")(x, **given)


@pytest.mark.parametrize("given", [{"input": [1.0]}, {"residual": 1.0}], ids=str)
def test_inference_refuses_what_is_no_tensor(given: dict[str, Any]) -> None:
    compiled = torch.compile(layer_of("2d", False), backend="aot_eager")
    with pytest.raises(TypeError, match=f"expected {next(iter(given))} as a tensor(?: or None)?, but got"):
        compiled(**{"input": input_of("2d"), **given})


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
    (y.square().sum() + expected.square().sum()).backward()
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
