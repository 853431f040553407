"""The graph of a module's forward, if it is all that forward does, in training as in eval."""

from __future__ import annotations

import copy
import gc
import inspect
import operator
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from ..attributes import contents, has_hooks, same
from ..drawn_in import TakesDrawnIn
from . import randomness

__all__ = ["MODES", "Proxy", "Tracer", "has_norm", "is_norm", "takes", "trace", "traced"]


def has_norm(module: nn.Module) -> bool:
    """Whether a batch norm of any kind is in it, or it is one."""
    return any(map(is_norm, module.modules()))


def is_norm(module: nn.Module) -> bool:
    """Whether it is a batch norm itself, one of ours too."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm | TakesDrawnIn)


def trace(module: nn.Module, inputs: int) -> fx.Graph | None:
    """The graph of forward called with so many tensors, by position.

    None where torch.fx cannot trace it, where it is another one in training than in eval, and where a graph could not
    say what forward does: it may take something else than these tensors, makes tensors of its own, draws random numbers
    while it is traced, leaves something in an attribute, or computes under a grad or autocast mode or hooks of saved
    tensors of its own. Modules without a batch norm are looked into at first, and not the second time.
    """
    if not takes(module, inputs):
        return None
    known = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in module.named_buffers(remove_duplicate=False)}
    for tracer in (Tracer, _ShallowTracer):
        try:
            graphs = [traced(tracer, module, *modes) for modes in MODES]
        except Exception:  # whatever a forward raises when it meets a proxy
            continue
        constants = {str(node.target) for node in graphs[0].nodes if node.op == "get_attr"} - known
        if len({str(graph) for graph in graphs}) == 1 and not constants:
            return graphs[0]
    return None


# training, with grad, the other autocast mode: what forward does itself about one of these shows in another.
MODES = [(True, True, False), (False, True, False), (True, False, False), (True, True, True)]


def traced(
    tracer: Callable[[], Tracer], module: nn.Module, training: bool, grad: bool, other_autocast: bool
) -> fx.Graph:
    """The graph of forward in one of the modes.

    Raises:
        ValueError: it does something that a graph does not keep; and what torch.fx and forward raise.
    """
    module = copy.deepcopy(module).train(training)
    held, drawn = contents(module), randomness.state()
    autocast = torch.is_autocast_enabled("cpu") is not other_autocast
    with randomness.left_alone(), torch.set_grad_enabled(grad), torch.autocast("cpu", enabled=autocast):
        recorder = tracer()
        graph = recorder.trace(module)
        if recorder.has_left_something():
            raise ValueError("a tensor that forward leaves somewhere, which a graph does not")
        if randomness.state() != drawn:
            raise ValueError("random numbers, which a graph would have drawn once for all")
    if not same(held, contents(module)):
        raise ValueError("an attribute that forward sets, which a graph does not")
    return graph


def takes(module: nn.Module, inputs: int) -> bool:
    """Whether forward has so many parameters, by position and without defaults."""
    parameters = [*inspect.signature(module.forward).parameters.values()]
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return len(parameters) == inputs and all(
        parameter.kind in by_position and parameter.default is parameter.empty for parameter in parameters
    )


class _Unwritten:
    """Refuses an attribute that forward sets on a tensor: no graph has it, and torch.fx drops it without a word."""

    _OWN = ("tracer", "node", "root", "attr", "_node")  # torch.fx's

    def __setattr__(self, name: str, value: object) -> None:
        if name not in self._OWN:
            raise ValueError(f"an attribute {name} of a tensor, which a graph does not set")
        super().__setattr__(name, value)


class _Attribute(_Unwritten, fx.proxy.Attribute):
    """An attribute of a tensor, such as its dtype; no hash, as nobody knows yet whether it is in a set."""

    __hash__ = None  # type: ignore[assignment]


class Proxy(_Unwritten, fx.Proxy):
    """Stands for a tensor, and records `a += b` as a write to a; torch.fx's own records `a = a + b`."""

    def __getattr__(self, name: str) -> _Attribute:
        return _Attribute(self, name)


def _recorded(target: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda a, b: a.tracer.create_proxy("call_function", target, (a, b), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(Proxy, f"__{_name}__", _recorded(getattr(operator, _name)))


def _surroundings() -> tuple[object, ...]:
    """Modes that a forward may enter and leave again."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")),
        *(torch.get_autocast_dtype(device) for device in ("cpu", "cuda")),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
    )


class Tracer(fx.Tracer):
    """Batch norms, ours too, are calls of modules in the graph, and so is whatever has hooks."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self._surroundings = _surroundings()
        self._made: list[weakref.ref[fx.Proxy]] = []

    def has_left_something(self) -> bool:
        """Whether somebody still holds what stood for a tensor: a global, a cache, an attribute of a class."""
        for generation in (1, 2):  # a cycle may hold it, and most are young
            if not self._is_alive():
                return False
            gc.collect(generation)
        return self._is_alive()

    def _is_alive(self) -> bool:
        return any(made() is not None for made in self._made)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """As the class says, and torch's modules."""
        if is_norm(m):
            return True
        if has_hooks(m):
            if has_norm(m):
                raise ValueError(f"hooks on {module_qualified_name}, which a graph would pass by")
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def kind_of_proxy(self, node: fx.Node) -> type[Proxy]:
        """The class of what stands for a node."""
        return Proxy

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """What stands for the value of a node, noted for has_left_something()."""
        made = self.kind_of_proxy(node)(node, self)
        self._made.append(weakref.ref(made))
        return made

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """As torch.fx does; a ValueError where forward has changed a mode."""
        if _surroundings() != self._surroundings:
            raise ValueError("another grad or autocast mode, which a graph does not keep")
        return super().create_node(*args, **kwargs)


class _ShallowTracer(Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not has_norm(m) or super().is_leaf_module(m, module_qualified_name)
