"""What the modules of a network hold in their attributes, to see whether a forward leaves something there."""

from __future__ import annotations

import functools
import random
import types
import weakref
from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["HOOKS", "are_hooked", "captured_modules", "contents", "has_hooks", "is_held_otherwise", "same"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Torch's dictionaries of hooks into all modules.
_OF_ALL = [getattr(nn.modules.module, f"_global{kind}") for kind in HOOKS]

_Contents = tuple[list[object], list[object]]
_MOST = 100_000  # objects that are looked at: an attribute may lead anywhere
_ATOMS = (str, bytes, int, float, complex, type(None), Tensor)
_NOT_WALKED = (
    nn.Module,  # parts of their own
    Tensor,
    type,
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
)


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks run when it is called: its own, or those on all modules."""
    return any(getattr(module, kind) for kind in HOOKS) or are_hooked()


def are_hooked() -> bool:
    """Whether there are hooks on all modules."""
    return any(_OF_ALL)


def contents(module: nn.Module) -> _Contents:
    """Every object that is reached through attributes and containers, and the states of generators among them.

    Of the attributes of classes (torch's apart) only what is in containers: other objects there, such as a clock or a
    log, may serve anybody.
    """
    objects: list[object] = []
    states: list[object] = []
    seen: set[int] = set()
    classes = [cls for part in module.modules() for cls in type(part).__mro__ if not _is_torchs(cls)]
    waiting: list[tuple[object, bool]] = [(dict(vars(cls)), False) for cls in dict.fromkeys(classes)]
    waiting += [(vars(part), True) for part in module.modules()]  # looked at first: of what both have, all
    while waiting and len(objects) < _MOST:
        value, with_attributes = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        states += _state_of_generator(value)
        inner = _items(value) or (_attributes(value) if with_attributes else [])
        objects += inner
        waiting += [(one, with_attributes) for one in inner]
    return objects, states


def same(one: _Contents, other: _Contents) -> bool:
    """Whether the objects are the very same, and no generator has gone on."""
    (objects, states), (others, their_states) = one, other
    return (
        len(objects) == len(others)
        and all(a is b for a, b in zip(objects, others, strict=True))
        and states == their_states
    )


def captured_modules(module: nn.Module) -> list[str]:
    """Attributes that are functions around one of the modules: a copy of the network would call the original's."""
    own = {id(part) for part in module.modules()}
    return [
        f"{name}.{key}" if name else key
        for name, part in module.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, types.FunctionType) and any(id(one) in own for one in _enclosed(value))
    ]


def is_held_otherwise(child: nn.Module, module: nn.Module) -> bool:
    """Whether an attribute of one of the module's parts leads to the child, but for the names of children: through
    containers, objects, functions around it, bound methods and partial ones."""
    waiting = deque(
        value for part in module.modules() for name, value in vars(part).items() if name != "_modules"
    )
    seen: dict[int, object] = {}  # kept, so that no other object takes its number
    while waiting and len(seen) < _MOST:
        value = waiting.popleft()  # what is near first: a long list must not hide it
        if value is child:
            return True
        if id(value) not in seen and not isinstance(value, _ATOMS):
            seen[id(value)] = value
            waiting += [*_items(value), *_attributes(value), *_called(value)]
    return False


def _is_torchs(cls: type) -> bool:
    return cls.__module__.split(".")[0] in ("builtins", "torch", "typing", __name__.split(".")[0])


def _enclosed(function: types.FunctionType) -> list[object]:
    contents = []
    for cell in function.__closure__ or ():
        try:
            contents.append(cell.cell_contents)
        except ValueError:  # nothing is in it yet
            continue
    return contents


def _called(value: Any) -> list[object]:
    """What a callable has at hand when it is called."""
    if isinstance(value, types.MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, functools.partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, types.FunctionType):
        return [*_enclosed(value), *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values()]
    return [value()] if isinstance(value, weakref.ref) else []


def _items(value: Any) -> list[object]:
    if isinstance(value, dict):
        return [*value.keys(), *value.values()]
    return [*value] if isinstance(value, list | tuple | set | frozenset | deque) else []


def _attributes(value: Any) -> list[object]:
    if isinstance(value, _NOT_WALKED):
        return []
    try:
        attributes = getattr(value, "__dict__", None)
    except Exception:  # of an object that answers for every name
        return []
    return [*attributes.keys(), *attributes.values()] if isinstance(attributes, dict) else []


def _state_of_generator(value: Any) -> list[object]:
    if isinstance(value, random.Random):
        return [value.getstate()]
    if isinstance(value, torch.Generator):
        return [value.get_state().tolist()]
    if isinstance(value, np.random.Generator):
        return [str(value.bit_generator.state)]
    if isinstance(value, np.random.RandomState):
        return [str(value.get_state(legacy=False)["state"])]
    return []
