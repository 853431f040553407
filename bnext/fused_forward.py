"""A module whose forward is that of a graph, and that is otherwise what it was."""

from __future__ import annotations

import copy
from typing import Any, ClassVar
from weakref import WeakValueDictionary

from torch import fx, nn
from torch.fx.graph_module import _format_import_block, _forward_from_src
from torch.package.importer import sys_importer

__all__ = ["FusedForward", "set_forward"]


class FusedForward:
    """Before the module's own class: methods, hooks and attributes are its own, and so are its submodules.

    The class is made for one module and has no name to be found by; a pickle holds the text of forward.
    """

    _own_class: ClassVar[type[nn.Module]]
    _text: ClassVar[str]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the class that it was, and forward as text."""
        reduced: Any = super().__reduce_ex__(2)
        return (_blank, (self._own_class, self._text), *reduced[2:])


def set_forward(module: nn.Module, graph: fx.Graph) -> None:
    """Gives a module the forward of a graph whose names are those of its submodules and parameters."""
    if isinstance(module, fx.GraphModule):  # its class is its own already, and made of its graph
        module.graph = copy.deepcopy(graph)
        return
    for node in graph.nodes:
        node.type = None  # annotations may be names that only their file knows
    code = graph.python_code("self")
    text = _format_import_block(code.globals, sys_importer) + code.src
    own: type[nn.Module] = getattr(module, "_own_class", type(module))
    module.__class__ = _fused_class(own, text)


_classes: WeakValueDictionary[tuple[type[nn.Module], str], type[nn.Module]] = WeakValueDictionary()


def _fused_class(own: type[nn.Module], text: str) -> type[nn.Module]:
    """One for all copies."""
    known = _classes.get((own, text))
    if known is not None:
        return known

    def construct(made: type[nn.Module], *args: Any, **kwargs: Any) -> Any:
        """Of other modules, as a slice of a Sequential is: one of the class that it was."""
        return own(*args, **kwargs) if made is fused else type(own).__call__(made, *args, **kwargs)

    metaclass = type("FusedType", (type(own),), {"__call__": construct})
    body = {
        "forward": _forward_from_src(text, {}),
        "_own_class": own,
        "_text": text,
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
    }
    fused: type[nn.Module] = metaclass(own.__name__, (FusedForward, own), body)
    _classes[own, text] = fused
    return fused


def _blank(own: type[nn.Module], text: str) -> nn.Module:
    made = _fused_class(own, text)
    return made.__new__(made)
