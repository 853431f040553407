"""Whether two modules compute the same: tried, in training and in eval, with gradients and running statistics."""

from __future__ import annotations

import copy
import inspect
import types
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from ..modules import OUR_ATTRIBUTES
from . import randomness
from .fixed import EPS
from .fused_forward import FusedForward

__all__ = ["Behaviour"]

# Largest difference as a share of the norm of a tensor, and of the largest norm of its kind. float64: a hundred layers
# enlarge 1e-16 by a division by a standard deviation each; a bias before a batch norm has the gradient 0 and its
# rounding. The dtypes of the module, where its forward insists on them: the same of 1e-7.
_CLOSE = {True: (1e-5, 1e-8), False: (5e-2, 1e-3)}
_PLAIN = (bool, int, float, str)
_CLOSED = (
    *_PLAIN,
    bytes,
    complex,
    types.NoneType,
    torch.Size,
    Tensor,
    nn.Module,
    type,
    types.FunctionType,
    types.MethodType,
    types.ModuleType,
)
_MOST = 1000  # objects in an output


class Behaviour:
    """What a module does with some inputs: as it is, in training, in eval.

    It is computed by copies, in float64 unless forward does not work in it, and with inputs that require grad unless it
    does not work with these. Raises what forward raises.
    """

    def __init__(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.inputs = inputs
        for self.in_double, self.with_grad in ((True, True), (True, False), (False, True)):
            with suppress(Exception):
                self.found = self._of(module)
                return
        self.in_double = self.with_grad = False
        self.found = self._of(module)

    @property
    def has_nan(self) -> bool:
        """Whether there is something in what it computes that cannot be compared."""
        return any(
            isinstance(value, Tensor) and bool(value.isnan().any())
            for name, value in self.found.items()
            if ", attribute of " not in name
        )

    def difference(self, other: nn.Module) -> str | None:
        """Where another module does something else, in words; None if it does the same."""
        try:
            found = self._of(other)
        except Exception as error:
            return f"it raises {type(error).__name__}: {error}"
        if found.keys() != self.found.keys():
            only = sorted({*found} ^ {*self.found})
            return f"one of them alone has {', '.join(only[:3])}"
        largest: dict[str, float] = {}
        for name, value in self.found.items():
            if isinstance(value, Tensor) and _inexact(value):
                kind = name.rpartition(" of ")[0]
                largest[kind] = max(largest.get(kind, 0.0), _norm(value))
        for name, value in self.found.items():
            try:
                same = self._same(value, found[name], largest.get(name.rpartition(" of ")[0], 0.0))
            except Exception as error:  # of a comparison of what is no tensor
                return f"nobody can compare {name}: {type(error).__name__}: {error}"
            if not same:
                return f"{name} differs"
        return None

    def _same(self, a: Any, b: Any, largest: float) -> bool:
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if a is b or type(a) is not type(b) or isinstance(a, type):
                return a is b
            if inspect.getattr_static(type(a), "__eq__") is inspect.getattr_static(object, "__eq__"):
                raise TypeError(f"a {type(a).__name__} is equal to nothing but itself")
            return bool(a == b)
        if a.shape != b.shape or a.dtype != b.dtype:
            return False
        if not _inexact(a):
            return torch.equal(a, b)
        odd = ~a.isfinite()
        if not torch.equal(odd, ~b.isfinite()):
            return False
        share, floor = _CLOSE[self.in_double]
        return _norm(a - b) <= share * _norm(a) + floor * largest

    def _of(self, module: nn.Module) -> Mapping[str, Any]:
        work = copy.deepcopy(module)
        if isinstance(work, FusedForward) is not isinstance(module, FusedForward):
            raise ValueError("a copy of it has another forward")
        if self.in_double:
            work.double()
        found: dict[str, Any] = {}
        with randomness.left_alone(), torch.enable_grad():
            found |= {f"as it is, {name}": value for name, value in self._step(work, 0)}
            for training in (True, False):
                work.train(training)
                mode = "in training" if training else "in eval"
                found |= {f"{mode}, {name}": value for name, value in self._step(work, 1 + training)}
            with torch.no_grad():
                found |= {f"in eval without grad, {name}": value for name, value in self._step(work, 3)}
        return found

    def _input(self, x: Tensor) -> Tensor:
        x = x.detach().clone()
        if not x.is_floating_point():
            return x
        return (x.double() if self.in_double else x).requires_grad_(self.with_grad)

    def _step(self, work: nn.Module, seed: int) -> Iterator[tuple[str, Any]]:
        """Of forward and backward, by name."""
        randomness.seed(seed)
        work.zero_grad()
        leaves: list[Tensor] = []

        def own(x: Tensor) -> Tensor:
            leaves.append(self._input(x))
            return leaves[-1] * 1  # a leaf may not be written over

        terms = []
        for name, y in _opened(work(*tree_map_only(Tensor, own, self.inputs))):
            if not isinstance(y, Tensor):
                yield f"output of {name}", y
                continue
            yield f"mode of output {name}", (y.requires_grad, y.layout)
            y = y if y.layout == torch.strided else y.to_dense()
            yield f"output of {name}", y.detach().clone()
            if y.is_floating_point() and y.requires_grad and torch.is_grad_enabled():
                weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype, device=y.device)
                terms.append((y * weights.view_as(y)).sum())
        if terms:
            torch.autograd.backward(terms)
        for i, leaf in enumerate(leaves):
            if leaf.grad is not None:
                yield f"gradient of input of {i}", leaf.grad
        for name, parameter in work.named_parameters():
            if parameter.grad is not None:
                yield f"gradient of {name}", parameter.grad.clone()
        for name, buffer in work.named_buffers():
            yield f"buffer of {name}", buffer.clone()
        for name, part in work.named_modules():
            for key, value in vars(part).items():
                if isinstance(value, _PLAIN) and key not in (*OUR_ATTRIBUTES, EPS, *_text(part)):
                    yield f"attribute of {name}.{key}", value
                elif isinstance(value, Tensor) and _can_be_compared(value):
                    yield f"attribute of {name}.{key}", value.detach().clone()


def _opened(value: Any) -> Iterator[tuple[str, Any]]:
    """What containers and objects hold, by where: of an object what a pickle of it would, and its class.

    Modules are left out, as parts of their own, and what was met before.
    """
    met: list[Any] = []
    waiting = [("0", value)]
    while waiting:
        place, value = waiting.pop()
        leaves, structure = tree_flatten(value)
        if not structure.is_leaf():
            yield f"{place}, its structure", str(structure)
        for i, leaf in enumerate(leaves):
            where = place if structure.is_leaf() else f"{place}.{i}"
            held = None if isinstance(leaf, _CLOSED) else _held(leaf)
            if held is None and not isinstance(leaf, nn.Module):
                yield where, leaf
            elif held is not None and not any(leaf is one for one in met):
                met.append(leaf)
                if len(met) > _MOST:
                    raise ValueError(f"an output that holds more than {_MOST} objects")
                yield f"{where}, its class", type(leaf)
                waiting.append((where, held))


def _held(value: Any) -> list[Any] | None:
    """What a pickle of an object would hold besides its class; None if there is none."""
    try:
        reduced = value.__reduce_ex__(2)
        if isinstance(reduced, str):
            return None
        _, arguments, *rest = reduced
        return [list(arguments), *(list(part) if isinstance(part, Iterator) else part for part in rest)]
    except Exception:  # whatever an object raises that has no pickle
        return None


def _can_be_compared(x: Tensor) -> bool:
    return x.layout == torch.strided and not x.is_meta and not x.is_quantized and x.dtype.itemsize > 1


def _text(part: nn.Module) -> tuple[str, ...]:
    """Attributes that are the text of forward itself."""
    return ("_code",) if isinstance(part, fx.GraphModule) else ()


def _inexact(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _norm(x: Tensor) -> float:
    return float(torch.nan_to_num(x).norm())
