"""Draws what follows a batch norm into it, in a graph of torch.fx."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import TensorMetadata

from .conversion import FUSED, OURS
from .modules import FusedBatchNorm
from .torch_activations import Activation, of_call, of_module

__all__ = ["NORMS", "fuse_graph"]

NORMS: set[type[nn.Module]] = {*OURS, *OURS.values()}  # these very classes, no subclass of theirs
_ADDITIONS: set[Any] = {operator.add, operator.iadd, torch.add, "add", "add_"}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def fuse_graph(
    fused: fx.GraphModule, our: Callable[[nn.Module], FusedBatchNorm], once: Callable[[nn.Module], bool]
) -> None:
    """Makes every batch norm `our(norm)` of it, and draws into those that are called once what is the same there.

    Nodes carry the sizes that :class:`torch.fx.passes.shape_prop.ShapeProp` notes; additions of tensors without stay.
    """
    graph = fused.graph
    for node in graph.nodes:
        if _is_nothing(fused, node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    norms = [(node, norm) for node in graph.nodes if (norm := _norm(fused, node)) is not None]
    order = {node: place for place, node in enumerate(graph.nodes)}
    calls = Counter(norm for _, norm in norms)
    # Backwards: of two batch norms that are added the later one has what the earlier one gave.
    for node, norm in reversed(norms):
        layer = our(norm)
        parent, _, name = str(node.target).rpartition(".")
        setattr(fused.get_submodule(parent), name, layer)
        if calls[norm] == 1 and once(norm) and not _has_hooks(layer):
            _draw_in(fused, node, layer, order)
    graph.lint()
    fused.recompile()
    fused.delete_all_unused_submodules()
    fused.meta[FUSED] = True


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


def _norm(fused: fx.GraphModule, node: fx.Node) -> nn.Module | None:
    """The batch norm that a node calls, torch's or ours, if it is not a subclass of either."""
    if node.op != "call_module":
        return None
    module = fused.get_submodule(str(node.target))
    return module if type(module) in NORMS else None


def _is_nothing(fused: fx.GraphModule, node: fx.Node) -> bool:
    """A call of nn.Identity, which networks put where something could stand: it hands on its argument itself."""
    if node.op != "call_module" or len(node.args) != 1 or not isinstance(node.args[0], fx.Node):
        return False
    module = fused.get_submodule(str(node.target))
    return type(module) is nn.Identity and not _has_hooks(module)


def _size(node: fx.Node) -> tuple[torch.Size, torch.dtype] | None:
    noted = node.meta.get("tensor_meta")
    return (noted.shape, noted.dtype) if isinstance(noted, TensorMetadata) else None


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
