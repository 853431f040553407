"""Whether what a graph computes is a normalization by fixed statistics, and with which eps."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from .readers import arguments_of_norm
from .tracing import MODES, Proxy, Tracer, traced

__all__ = ["STATE", "eps_of"]

STATE = ("running_mean", "running_var", "weight", "bias")  # in the order of torch's function and ours
# How a vector becomes the channels of (N, C, H, W): the operation's further arguments.
_SPREAD: dict[str, tuple[tuple[Any, ...], ...]] = {
    "reshape": ((1, -1, 1, 1), ((1, -1, 1, 1),), ([1, -1, 1, 1],)),
    "index": (((None, slice(None), None, None),),),
}

# What a graph computes, as nested tuples: "x", vectors by name, numbers, and operations (kind, operand, ...); the
# operands of a sum or a product in an order of their own, nothing for a sum with 0, products of products as one,
# quotients as products.
_Form = Any


def eps_of(layer: nn.Module) -> float | None:
    """The eps of its forward, if that is all that it computes, in training as in eval; None if it is not.

    Forward may ask x whether it requires grad, as detectron2's does: it has to compute the same either way.
    """
    found = set()
    for modes in MODES:
        for answer in (True, False):
            asked: list[str] = []
            found.add(_eps_of_graph(traced(partial(_Tracer, answer, asked), layer, *modes)))
            if not asked:
                break
    return found.pop() if len(found) == 1 else None


class _Asked(Proxy):
    """A tensor that says whether it requires grad."""

    @property
    def requires_grad(self) -> bool:
        tracer = cast(_Tracer, self.tracer)
        tracer.asked.append("requires_grad")
        return tracer.answer


class _Tracer(Tracer):
    def __init__(self, answer: bool, asked: list[str]) -> None:
        super().__init__()
        self.answer, self.asked = answer, asked

    def kind_of_proxy(self, node: fx.Node) -> type[Proxy]:
        return _Asked if node.op == "placeholder" else Proxy


def _eps_of_graph(graph: fx.Graph) -> float | None:
    reader = _Reader()
    (output,) = (node for node in graph.nodes if node.op == "output")
    found = reader.form(output.args[0])
    if {*graph.nodes} - reader.seen != {output}:
        return None
    eps = float(next(_numbers(found), 0))
    return eps if eps >= 0 and found in _formulas(eps) else None


def _numbers(form: _Form) -> Iterator[float]:
    if isinstance(form, int | float):
        yield form
    for part in form if isinstance(form, tuple) else ():
        yield from _numbers(part)


def _sum(a: _Form, b: _Form) -> _Form:
    return a if b == 0 else b if a == 0 else ("add", *sorted((a, b), key=repr))


def _product(*operands: _Form) -> _Form:
    factors = [f for o in operands for f in (o[1:] if isinstance(o, tuple) and o[0] == "mul" else (o,))]
    return ("mul", *sorted(factors, key=repr))


def _quotient(a: _Form, b: _Form) -> _Form:
    if not (isinstance(b, tuple) and b[0] == "sqrt"):
        return None
    inverse = ("rsqrt", b[1])
    return inverse if a == 1 else _product(a, inverse)


def _formulas(eps: float) -> list[_Form]:
    """As torchvision, DETR and detectron2 have it; as textbooks have it; torch's function."""
    invstd = ("rsqrt", _sum("running_var", eps))
    scale = ("weight", invstd)
    return [
        _sum(_product("x", *scale), ("sub", "bias", _product("running_mean", *scale))),
        _sum(_product(("sub", "x", "running_mean"), *scale), "bias"),
        ("batch_norm", eps),
    ]


_KINDS: dict[Callable[..., Any] | str, str] = {
    **dict.fromkeys((operator.add, torch.add, "add"), "add"),
    **dict.fromkeys((operator.sub, torch.sub, "sub"), "sub"),
    **dict.fromkeys((operator.mul, torch.mul, "mul"), "mul"),
    **dict.fromkeys((operator.truediv, torch.div, "div"), "div"),
    **dict.fromkeys((torch.rsqrt, "rsqrt"), "rsqrt"),
    **dict.fromkeys((torch.sqrt, "sqrt"), "sqrt"),
    **dict.fromkeys((torch.reshape, "reshape", "view"), "reshape"),
    operator.getitem: "index",
    "to": "to",
}
_MADE: dict[str, Callable[..., _Form]] = {"add": _sum, "mul": _product, "div": _quotient}


class _Reader:
    """Of one graph; `seen` are the nodes that were part of a form."""

    def __init__(self) -> None:
        self.seen: set[fx.Node] = set()

    def form(self, value: Any, per_channel: bool = False) -> _Form:
        """None where it is something else. per_channel: of vectors, whose shape the channels of x still lack."""
        if not isinstance(value, fx.Node):
            return value
        self.seen.add(value)
        if value.op == "placeholder" and not per_channel:
            return "x"
        if value.op == "get_attr" and per_channel:
            return str(value.target)
        if value.target is F.batch_norm and not per_channel:
            return self._function(value)
        kind = _KINDS.get(value.target) if value.op in ("call_function", "call_method") else None
        if kind is None or value.kwargs:
            return None
        if kind in _SPREAD:
            spread = value.args[1:] in _SPREAD[kind] and not per_channel
            return self.form(value.args[0], True) if spread else None
        if kind == "to":
            return self.form(value.args[0], per_channel) if self._is_dtype_of_x(value.args[1:]) else None
        operands = [self.form(arg, per_channel) for arg in value.args]
        return None if None in operands else _MADE.get(kind, partial(_tagged, kind))(*operands)

    def _is_dtype_of_x(self, args: tuple[Any, ...]) -> bool:
        """Which vectors have anyway, where the layer does not leave the call to its own forward."""
        if len(args) != 1 or not isinstance(args[0], fx.Node) or args[0].target is not getattr:
            return False
        of, name = args[0].args
        self.seen.add(args[0])
        return isinstance(of, fx.Node) and of.op == "placeholder" and name == "dtype"

    def _function(self, node: fx.Node) -> _Form:
        given = arguments_of_norm(node)
        state = [self.form(given[name], True) for name in STATE]
        x, eps = self.form(given["input"]), given["eps"]
        fits = x == "x" and state == [*STATE] and given["training"] is False
        return ("batch_norm", eps) if fits else None


def _tagged(kind: str, *operands: _Form) -> _Form:
    return (kind, *operands)
