"""The graph of a module's forward, once it is known to be the same in training and in eval."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import fx, nn

__all__ = ["has_norm", "mode", "trace"]


def has_norm(module: nn.Module) -> bool:
    """Whether a batch norm of any kind is in it, or it is one."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


@contextmanager
def mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Training or eval for a while, as the module itself understands it."""
    before = {part: part.training for part in module.modules()}
    try:
        module.train(training)
        yield
    finally:
        for part, was in before.items():
            part.training = was


def trace(module: nn.Module) -> fx.Graph | None:
    """None where forward cannot be traced, or is another one in training than in eval, for a trace keeps one of them.

    If so, modules without a batch norm are not looked into the second time: what they do is nobody's concern here.
    """
    for tracer in (_Tracer(), _ShallowTracer()):
        try:
            graphs = []
            for training in (True, False):
                with mode(module, training):
                    graphs.append(tracer.trace(module))
        except Exception:  # whatever a forward raises when it meets a proxy
            continue
        # Tensors that forward makes are given a number in each trace.
        first, second = (re.sub(r"_tensor_constant\d+", "", str(graph)) for graph in graphs)
        if first == second:
            return graphs[0]
    return None


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


class _ShallowTracer(_Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not has_norm(m) or super().is_leaf_module(m, module_qualified_name)
