"""Draws what follows a batch norm into it, in a graph of torch.fx."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from ..attributes import has_hooks
from ..drawn_in import TakesDrawnIn
from .conversion import is_ours
from .readers import Chain, activation_of, is_nothing, only_reader, readers_of

__all__ = ["Sizes", "fuse_graph"]

_ADDITIONS: dict[str, tuple[Any, ...]] = {
    "call_function": (operator.add, operator.iadd, torch.add),
    "call_method": ("add", "add_"),
}


class Sizes(fx.Interpreter):
    """Runs a graph, and notes at each node the size and the dtype of the tensor that it gives."""

    def run_node(self, n: fx.Node) -> Any:
        """As torch has it."""
        result = super().run_node(n)
        if isinstance(result, Tensor):
            n.meta[_NOTE] = (result.shape, result.dtype)
        return result


_NOTE = "bnext_size"


def fuse_graph(graph: fx.Graph, module: nn.Module) -> bool:
    """Draws into the calls of a module's batch norms, ours already, what follows them; whether there was something.

    Nodes carry the sizes that :class:`Sizes` notes. The layers stay what they are: who calls them otherwise has them as
    ever.
    """
    norms = [(node, norm) for node in graph.nodes if (norm := _norm(module, node)) is not None]
    order = {node: place for place, node in enumerate(graph.nodes)}
    calls = Counter(norm for _, norm in norms)
    # Backwards: of two batch norms that are added the later one has what the earlier one gave.
    drawn = [_draw_in(module, node, norm, order) for node, norm in reversed(norms) if calls[norm] == 1]
    graph.lint()
    return any(drawn)


def _draw_in(module: nn.Module, node: fx.Node, layer: TakesDrawnIn, order: dict[fx.Node, int]) -> bool:
    """The addition and the activation after one call of a layer, where they are the same in it."""
    if not layer._is_bare() or has_hooks(layer):
        return False
    inputs = [*node.args, *node.kwargs.values()]
    if len(inputs) != 1 or not node.kwargs.keys() <= {"input"}:
        return False
    residual, added = _residual(module, node, order)
    found, activated = activation_of(module, added[-1] if added else node)
    drawn = [*added, *activated]  # nodes that alone read one another
    if not drawn or any(_writes(module, other) for other in _between(node, drawn[-1]) if other not in drawn):
        return False
    drawn[-1].replace_all_uses_with(node)
    for erased in reversed(drawn):
        node.graph.erase_node(erased)
    node.args, node.kwargs = tuple(inputs), {"drawn_in": (residual, *(found or (None, None)))}
    return True


def _residual(module: nn.Module, node: fx.Node, order: dict[fx.Node, int]) -> tuple[fx.Node | None, Chain]:
    """What the only reader of a batch norm adds to it: a tensor of the same size and dtype that is there already."""
    chain = readers_of(module, node)
    if not chain or chain[-1].target not in _ADDITIONS.get(chain[-1].op, ()):
        return None, []
    reader, value = chain[-1], ([node, *chain])[-2]
    keywords = dict(reader.kwargs)
    named = [keywords.pop(name) for name in ("input", "other") if name in keywords]
    if keywords.pop("alpha", 1) != 1 or keywords or len(named) + len(reader.args) != 2:
        return None, []
    left, right = tuple(reader.args) + tuple(named)
    other = right if left is value else left
    is_left = left is other
    handed_on = []
    while isinstance(other, fx.Node) and is_nothing(module, other):
        handed_on.append(other)
        (other,) = other.all_input_nodes
    if not isinstance(other, fx.Node) or other is node or order[other] > order[node]:
        return None, []
    # A parameter may have the example's batch size and no other.
    if _size(other) is None or _size(other) != _size(node) or other.op == "get_attr":
        return None, []
    writes_over_it = is_left and reader.target not in (operator.add, torch.add, "add")
    if writes_over_it and (_norm(module, other) is None or not all(map(only_reader, [other, *handed_on]))):
        return None, []  # somebody may look at it afterwards
    return other, chain


def _norm(module: nn.Module, node: fx.Node) -> TakesDrawnIn | None:
    """The layer of ours that a node calls, not of a subclass that may do something else."""
    called = module.get_submodule(str(node.target)) if node.op == "call_module" else None
    return cast(TakesDrawnIn, called) if called is not None and is_ours(called) else None


def _size(node: fx.Node) -> tuple[torch.Size, torch.dtype] | None:
    return node.meta.get(_NOTE)


def _between(first: fx.Node, last: fx.Node) -> Iterator[fx.Node]:
    node = first.next
    while node is not last:
        yield node
        node = node.next


def _writes(module: nn.Module, node: fx.Node) -> bool:
    """Whether a node may write to memory that is not its own: by torch's names."""
    if node.op == "call_module":
        called = module.get_submodule(str(node.target))
        known = type(called).__module__.startswith("torch.nn.") or is_ours(called)
        return not known or has_hooks(called) or bool(getattr(called, "inplace", False))
    if node.op not in ("call_function", "call_method"):
        return False
    if getattr(getattr(node.target, "_schema", None), "is_mutable", False):
        return True
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    in_place_operators = name.startswith("i") and getattr(operator, f"__{name}__", None) is node.target
    return (
        name.endswith("_")
        or in_place_operators
        or node.target is operator.setitem
        or "out" in node.kwargs
        or bool(node.kwargs.get("inplace", False))
    )
