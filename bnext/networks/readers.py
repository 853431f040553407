"""What stands in a graph of torch.fx: who reads a value, what a call is given."""

from __future__ import annotations

import inspect
from typing import Any

from torch import fx, nn
from torch.nn import functional as F

from ..attributes import has_hooks
from ..torch_activations import Activation, of_call, of_module

__all__ = ["Chain", "activation_of", "arguments_of_norm", "is_nothing", "only_reader", "readers_of"]

Chain = list[fx.Node]

_ARGUMENTS = inspect.signature(F.batch_norm)


def arguments_of_norm(node: fx.Node) -> dict[str, Any]:
    """What a call of torch's function is given, by name, defaults too."""
    given = _ARGUMENTS.bind(*node.args, **node.kwargs)
    given.apply_defaults()
    return given.arguments


def only_reader(node: fx.Node) -> Chain:
    """The one node that reads a value; none if there are several."""
    return [*node.users] if len(node.users) == 1 else []


def readers_of(module: nn.Module, node: fx.Node) -> Chain:
    """What alone reads a value, the last, and before it modules that hand it on; none if there are several."""
    chain = [*only_reader(node)]
    while chain and is_nothing(module, chain[-1]):
        chain += (reader := only_reader(chain[-1]))
        if not reader:
            return []
    return chain


def activation_of(module: nn.Module, node: fx.Node) -> tuple[Activation | None, Chain]:
    """What the only reader of a value computes of it, if that is one of our activations."""
    chain = readers_of(module, node)
    if not chain or chain[-1].all_input_nodes != [([node, *chain])[-2]]:
        return None, []
    reader = chain[-1]
    if reader.op == "call_module":
        called = module.get_submodule(str(reader.target))
        found = None if has_hooks(called) else of_module(called)
    else:
        found = of_call(reader.target, reader.args, reader.kwargs)
    return found, chain if found is not None else []


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def is_nothing(module: nn.Module, node: fx.Node) -> bool:
    """A call that hands on its argument itself: of what networks put where something could stand, nn.Identity or a
    dropout of 0."""
    given = [*node.args, *node.kwargs.values()]
    if node.op != "call_module" or len(given) != 1 or not isinstance(given[0], fx.Node):
        return False
    called = module.get_submodule(str(node.target))
    is_identity = type(called) is nn.Identity or (type(called) in _DROPOUTS and bool(called.p == 0))
    return is_identity and not has_hooks(called)
