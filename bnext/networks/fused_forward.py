"""A module whose forward is that of a graph, and that is otherwise what it was."""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterable
from typing import Any, ClassVar, NamedTuple, cast
from weakref import WeakValueDictionary

from torch import fx, nn
from torch.fx.graph_module import _format_import_block, _forward_from_src
from torch.package.importer import sys_importer

from ..attributes import captured_modules
from .tracing import takes

__all__ = ["FusedForward", "can_stand_before", "is_made", "own_class", "set_class", "set_forward"]


class FusedForward:
    """Before the module's own class: methods, hooks and attributes are its own, and so are its submodules.

    Forward is that of a text or of another class. The class is made for one module and has no name to be found by; a
    pickle holds what it is made of.
    """

    _made_of: ClassVar[_Parts]

    def __init_subclass__(cls) -> None:
        """Stops here: a class that notes its subclasses need not know of one that nobody can name."""

    def extra_repr(self) -> str:
        """Of the class that it was, and a line for each layer with what is drawn into it."""
        lines = [str(super().extra_repr())]  # type: ignore[misc]
        if isinstance(text := self._made_of.forward, str):
            lines += [f"drawn in: {layer} + {' + '.join(what)}" for layer, what in _drawn_in(text).items()]
        return "\n".join(line for line in lines if line)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As the class that it was, and where forward is from."""
        reduced: Any = super().__reduce_ex__(2)
        return (_blank, self._made_of, *reduced[2:])


class _Parts(NamedTuple):
    own: type[nn.Module]
    forward: type[nn.Module] | str  # the class or the text that it is from


def set_forward(module: nn.Module, graph: fx.Graph) -> None:
    """Gives a module the forward of a graph whose names are those of its submodules and parameters."""
    if isinstance(module, fx.GraphModule):  # its class is its own already, and made of its graph
        module.graph = copy.deepcopy(graph)
        return
    for node in graph.nodes:
        node.type = None  # annotations may be names that only their file knows
    code = graph.python_code("self")
    text = _format_import_block(code.globals, sys_importer) + code.src
    module.__class__ = _fused_class(own_class(module), text)


def set_class(module: nn.Module, first: type[nn.Module]) -> None:
    """Gives a module the forward and the methods of a class, before those of its own."""
    module.__class__ = _fused_class(own_class(module), first)


def _drawn_in(text: str) -> dict[str, list[str]]:
    """What a forward of ours has its layers compute besides, by their names."""
    found = {}
    for call in ast.walk(ast.parse(text)):
        for keyword in call.keywords if isinstance(call, ast.Call) else ():
            if keyword.arg == "drawn_in" and isinstance(keyword.value, ast.Tuple):
                residual, name, parameter = map(ast.unparse, keyword.value.elts)
                active = [] if name == "None" else [ast.literal_eval(name)]
                if parameter != "None":
                    active = [f"{active[0]}({parameter})"]
                found[_path(cast(ast.Call, call).func)] = ["residual"] * (residual != "None") + active
    return found


def _path(called: ast.expr) -> str:
    """Of self.layer1 or, where a name is no identifier, of getattr(self.layer1, "0")."""
    if isinstance(called, ast.Attribute):
        of, name = called.value, called.attr
    elif isinstance(called, ast.Call):
        of, name = called.args[0], ast.literal_eval(called.args[1])
    else:
        return ""
    return f"{_path(of)}.{name}".removeprefix(".")


_WAYS = (
    "_call_impl",
    "__copy__",
    "__deepcopy__",
    "__getstate__",
    "__reduce__",
    "__reduce_ex__",
    "__setstate__",
)


def can_stand_before(
    classes: Iterable[type], layer: nn.Module, base: type[nn.Module], attributes: Iterable[str]
) -> bool:
    """Whether the forward of these classes may take the place of a layer's own, with attributes of these names.

    Its forward has to be that of its class, of one input. It is called, copied and pickled as `base`, and no name of
    ours means something to it already.
    """
    added = {name for cls in classes for name in vars(cls)} - {*dir(base)}
    return (
        all(getattr(type(layer), way, None) is getattr(base, way, None) for way in _WAYS)
        and takes(layer, 1)
        and "forward" not in vars(layer)
        and not captured_modules(layer)
        and not any(hasattr(layer, name) for name in {*added, *attributes})
    )


def is_made(module: nn.Module) -> bool:
    """Whether its class is one that was made here, and no subclass of one, as parametrizations make them."""
    return "_made_of" in vars(type(module))


def own_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module had before."""
    return cast(FusedForward, module)._made_of.own if is_made(module) else type(module)


_classes: WeakValueDictionary[_Parts, type[nn.Module]] = WeakValueDictionary()


def _fused_class(own: type[nn.Module], forward: type[nn.Module] | str) -> type[nn.Module]:
    """One for all copies."""
    parts = _Parts(own, forward)
    known = _classes.get(parts)
    if known is not None:
        return known

    def construct(made: type[nn.Module], *args: Any, **kwargs: Any) -> Any:
        """Of other modules, as a slice of a Sequential is: one of the class that it was."""
        return own(*args, **kwargs) if made is fused else type(own).__call__(made, *args, **kwargs)

    metaclass = type("FusedType", (type(own),), {"__call__": construct})
    bases: tuple[type, ...] = (FusedForward, own)
    body: dict[str, Any] = {
        "_made_of": parts,
        "__module__": own.__module__,
        "__qualname__": own.__qualname__,
        "__doc__": own.__doc__,
    }
    if isinstance(forward, str):
        body["forward"] = _forward_from_src(forward, {})
    else:
        bases = (FusedForward, forward, own)
    fused: type[nn.Module] = metaclass(own.__name__, bases, body)
    _classes[parts] = fused
    return fused


def _blank(own: type[nn.Module], forward: type[nn.Module] | str) -> nn.Module:
    made = _fused_class(own, forward)
    return made.__new__(made)
