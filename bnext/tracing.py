"""The graph of a module's forward, if it is all that forward does, in training as in eval."""

from __future__ import annotations

import copy
import inspect
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from . import randomness

__all__ = ["has_hooks", "has_norm", "trace"]

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_norm(module: nn.Module) -> bool:
    """Whether a batch norm of any kind is in it, or it is one."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def has_hooks(module: nn.Module) -> bool:
    """Whether something else happens when it is called."""
    return any(getattr(module, kind) for kind in _HOOKS)


def trace(module: nn.Module, inputs: int) -> fx.Graph | None:
    """The graph of forward called with so many tensors, by position.

    None where torch.fx cannot trace it, where it is another one in training than in eval, and where a graph could not
    say what forward does: it takes more than these tensors, makes tensors of its own, draws random numbers while it is
    traced, leaves something in an attribute, or computes under another grad or autocast mode or other hooks of saved
    tensors. Modules without a batch norm are looked into at first, and not the second time.
    """
    if not _takes(module, inputs):
        return None
    known = {name for name, _ in [*module.named_parameters(remove_duplicate=False)]}
    known |= {name for name, _ in [*module.named_buffers(remove_duplicate=False)]}
    for tracer in (_Tracer, _ShallowTracer):
        try:
            training, evaluating = (
                _traced(tracer(), copy.deepcopy(module).train(training)) for training in (True, False)
            )
        except Exception:  # whatever a forward raises when it meets a proxy
            continue
        constants = {str(node.target) for node in training.nodes if node.op == "get_attr"} - known
        if str(training) == str(evaluating) and not constants:
            return training
    return None


def _traced(tracer: fx.Tracer, module: nn.Module) -> fx.Graph:
    held, drawn = _held(module), randomness.state()
    with randomness.left_alone():
        graph = tracer.trace(module)
        if randomness.state() != drawn:
            raise ValueError("random numbers, which a graph would have drawn once for all")
    after = _held(module)
    if len(after) != len(held) or any(one is not other for one, other in zip(held, after, strict=True)):
        raise ValueError("an attribute that forward sets, which a graph does not")
    return graph


def _held(module: nn.Module) -> list[object]:
    """What the modules in it have in their attributes, and in the containers there."""
    found: list[object] = []
    for part in module.modules():
        for name, value in vars(part).items():
            found += [name, value]
            if isinstance(value, dict):
                found += [*value.keys(), *value.values()]
            elif isinstance(value, list | tuple | set):
                found += value
    return found


def _takes(module: nn.Module, inputs: int) -> bool:
    parameters = [*inspect.signature(module.forward).parameters.values()]
    by_position = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return len(parameters) == inputs and all(parameter.kind in by_position for parameter in parameters)


class _Proxy(fx.Proxy):
    """Where `a += b` writes to a. torch.fx by itself reads it as `a = a + b`."""


def _recorded(target: Callable[[Any, Any], Any]) -> Callable[[fx.Proxy, Any], fx.Proxy]:
    return lambda a, b: a.tracer.create_proxy("call_function", target, (a, b), {})


for _name in ("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"):
    setattr(_Proxy, f"__{_name}__", _recorded(getattr(operator, _name)))


def _modes() -> tuple[object, ...]:
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) for device in ("cpu", "cuda")),
        *(torch.get_autocast_dtype(device) for device in ("cpu", "cuda")),
        torch._C._autograd._top_saved_tensors_default_hooks(True),
    )


class _Tracer(fx.Tracer):
    """Batch norms, ours too, are calls of modules in the graph, and so is whatever has hooks."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self._modes = _modes()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            return True
        if has_hooks(m):
            if has_norm(m):
                raise ValueError(f"hooks on {module_qualified_name}, which a graph would pass by")
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _modes() != self._modes:
            raise ValueError("another grad or autocast mode, which a graph does not keep")
        return super().create_node(*args, **kwargs)


class _ShallowTracer(_Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not has_norm(m) or super().is_leaf_module(m, module_qualified_name)
