"""Draws what follows a batch norm into it: of a network's graph, not of its text."""

from __future__ import annotations

import copy
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata

from .conversion import FUSED, OURS, convert
from .modules import FusedBatchNorm
from .torch_activations import Activation, of_call, of_module

__all__ = ["fuse"]

_ADDITIONS: set[Any] = {operator.add, operator.iadd, torch.add, "add", "add_"}
_KINDS = {*OURS, *OURS.values()}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def fuse(module: nn.Module, *example_inputs: Any) -> fx.GraphModule:
    """A network in which each batch norm computes the addition and the activation that follow it as well.

    ``relu(bn(x))`` and ``relu(bn(x) + identity)``, however they are written (modules, functions, methods, in place),
    become one pass each; the other batch norms become ours as by :func:`bnext.convert`. What is not certain to be the
    same stays: a batch norm whose output something else reads too, that is called twice or has hooks; an addition of
    another size or dtype; one across a write to memory.

    The result shares parameters and buffers with `module`, which stays as it is: training one trains both, until
    ``.to`` gives one of them other buffers. Names in the state dict are the same. It is a
    :class:`torch.fx.GraphModule` with the limits of :mod:`torch.fx`: it has forward alone of the class's methods, and
    what Python decided while it was traced is decided for good. Where a network cannot be traced, its blocks can:
    ``network.layer1 = bnext.fuse(network.layer1, x)``.

    Args:
        module: a module whose forward torch.fx can trace, and that does the same in training and in eval but for its
            submodules.
        example_inputs: what forward takes. Sizes and dtypes are read, nothing is computed: they decide which additions
            are of equal tensors. Under autocast call this under autocast too.

    Returns:
        The fused network, in the mode of `module`.

    Raises:
        ValueError: forward cannot be traced, is another one in training than in eval, or does not take the example.
    """
    graph = _trace(module)
    fused = fx.GraphModule(module, graph, type(module).__name__)
    _note_sizes(fused, example_inputs)
    norms = [node for node in graph.nodes if _norm(fused, node) is not None]
    order = {node: place for place, node in enumerate(graph.nodes)}
    calls = Counter(_norm(fused, node) for node in norms)
    copies: dict[nn.Module, FusedBatchNorm] = {}
    # Backwards: of two batch norms that are added the later one has what the earlier one gave.
    for node in reversed(norms):
        original = _norm(fused, node)
        assert original is not None
        if original not in copies:
            copies[original] = _sharing(original)
        layer = copies[original]
        parent, _, name = str(node.target).rpartition(".")
        setattr(fused.get_submodule(parent), name, layer)
        if calls[original] == 1 and not _has_hooks(layer):
            _draw_in(fused, node, layer, order)
    graph.lint()
    fused.recompile()
    fused.delete_all_unused_submodules()
    fused.meta[FUSED] = True
    return fused


def _draw_in(fused: fx.GraphModule, node: fx.Node, layer: FusedBatchNorm, order: dict[fx.Node, int]) -> None:
    """The addition and the activation after one call of a layer, where they are certain to be the same in it."""
    if layer.inplace or layer.activation is not None or node.kwargs or len(node.args) != 1:
        return
    drawn: list[fx.Node] = []
    residual = _residual(fused, node, order)
    if residual is not None:
        drawn.append(*node.users)
    found = _activation(fused, drawn[-1] if drawn else node)
    if found is not None:
        drawn.append(*(drawn[-1] if drawn else node).users)
    if not drawn or any(_writes(fused, other) for other in _between(node, drawn[-1]) if other not in drawn):
        return
    drawn[-1].replace_all_uses_with(node)
    for erased in reversed(drawn):
        fused.graph.erase_node(erased)
    if residual is not None:
        node.args = (*node.args, residual)
    if found is not None:
        layer.activation, layer.activation_param = found


def _residual(fused: fx.GraphModule, node: fx.Node, order: dict[fx.Node, int]) -> fx.Node | None:
    """What the only reader of a batch norm adds to it: a tensor of the same size and dtype that is there already."""
    reader = _only_reader(node)
    if reader is None or reader.target not in _ADDITIONS or reader.kwargs or len(reader.args) != 2:
        return None
    left, right = reader.args
    other = right if left is node else left
    if not isinstance(other, fx.Node) or other is node or order[other] > order[node]:
        return None
    if _size(other) is None or _size(other) != _size(node):
        return None
    writes_over_it = left is other and reader.target not in (operator.add, torch.add, "add")
    if writes_over_it and (_norm(fused, other) is None or _only_reader(other) is None):
        return None  # somebody may look at it afterwards
    return other


def _activation(fused: fx.GraphModule, node: fx.Node) -> Activation | None:
    """What the only reader of a value computes of it, if that is one of our activations."""
    reader = _only_reader(node)
    if reader is None or reader.all_input_nodes != [node]:
        return None
    if reader.op == "call_module":
        module = fused.get_submodule(str(reader.target))
        return None if _has_hooks(module) else of_module(module)
    return of_call(reader.target, reader.args, reader.kwargs)


def _trace(module: nn.Module) -> fx.Graph:
    """The graph of forward, once it is known to be the same in training and in eval."""
    graphs = {}
    for training in (True, False):
        with _mode(module, training):
            try:
                graphs[training] = _Tracer().trace(module)
            except Exception as error:  # whatever forward raises when it meets a proxy
                raise ValueError(
                    f"expected a forward that torch.fx can trace, but that of {type(module).__name__} raises "
                    f"{type(error).__name__}: {error}; its blocks may be fused one by one"
                ) from error
    as_text = {training: re.sub(r"_tensor_constant\d+", "", str(graph)) for training, graph in graphs.items()}
    if as_text[True] != as_text[False]:
        raise ValueError(
            "expected a forward that is the same in training and in eval but for its submodules, for a trace keeps "
            f"one of them, but that of {type(module).__name__} is not; fuse the blocks that are, or use "
            "modules (nn.Dropout for functional.dropout)"
        )
    return graphs[module.training]


class _Proxy(fx.Proxy):
    """Where `a += b` writes to a. torch.fx by itself reads it as `a = a + b`."""


def _recorded(target: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda a, b: a.tracer.create_proxy("call_function", target, (a, b), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", _recorded(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    """Batch norms, ours too, are calls of modules in the graph."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, nn.modules.batchnorm._BatchNorm) or super().is_leaf_module(
            m, module_qualified_name
        )

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Training or eval for a while, as the module itself understands it."""
    before = {part: part.training for part in module.modules()}
    try:
        module.train(training)
        yield
    finally:
        for part, was in before.items():
            part.training = was


def _note_sizes(fused: fx.GraphModule, example_inputs: tuple[Any, ...]) -> None:
    """Writes sizes and dtypes to the nodes; with fake tensors, and in eval: nothing is computed or counted."""
    with _mode(fused, training=False):
        try:
            ShapeProp(fused, fake_mode=FakeTensorMode(allow_non_fake_inputs=True)).propagate(*example_inputs)
        except Exception as error:  # whatever forward raises
            raise ValueError(
                f"expected example_inputs that forward takes, but it raises {type(error).__name__}: {error}"
            ) from error


def _size(node: fx.Node) -> tuple[torch.Size, torch.dtype] | None:
    noted = node.meta.get("tensor_meta")
    return (noted.shape, noted.dtype) if isinstance(noted, TensorMetadata) else None


def _norm(fused: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The batch norm that a node calls, torch's or ours, if it is not a subclass of either."""
    if node.op != "call_module":
        return None
    module = fused.get_submodule(str(node.target))
    return module if type(module) in _KINDS else None


def _sharing(original: nn.Module) -> FusedBatchNorm:
    """Our layer with the parameters, buffers, hooks and mode of a layer."""
    layer = original.__new__(type(original))
    layer.__dict__.update(
        {
            key: copy.copy(value) if isinstance(value, dict) else value
            for key, value in original.__dict__.items()
        }
    )
    return cast(FusedBatchNorm, convert(layer))


def _only_reader(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, kind) for kind in _HOOKS)


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _writes(fused: fx.GraphModule, node: fx.Node) -> bool:
    """Whether a node may write to memory that is not its own: by torch's names."""
    if node.op == "call_module":
        return bool(getattr(fused.get_submodule(str(node.target)), "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place_operators = name.startswith("i") and getattr(operator, f"__{name}__", None) is node.target
    return (
        name.endswith("_")
        or in_place_operators
        or node.target is operator.setitem
        or "out" in node.kwargs
        or bool(node.kwargs.get("inplace", False))
    )
