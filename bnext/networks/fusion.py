"""Draws what follows a batch norm into it, in a network that exists: of its graphs, not of its text."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import chain
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from ..attributes import HOOKS, are_hooked, captured_modules
from ..holding import are_held
from ..modules import OURS, require_module
from . import randomness
from .conversion import convert_classes
from .equality import Behaviour
from .fused_forward import FusedForward, set_forward
from .fused_graph import Sizes, fuse_graph
from .subclasses import convert_subclasses
from .tracing import has_norm, is_norm, trace

__all__ = ["fuse"]

Network = TypeVar("Network", bound=nn.Module)
_Inputs = dict[str, tuple[Any, ...]]  # of the modules with batch norms, by name


def fuse(module: Network, *example_inputs: Any) -> Network:
    """A network in which each batch norm computes the addition and the activation that follow it as well.

    ``relu(bn(x))`` and ``relu(bn(x) + identity)`` in the usual spellings (modules, functions, methods, in place),
    become one pass each; the other batch norms become ours as by :func:`bnext.convert`. What is not certain to be the
    same stays: a batch norm whose output something else reads too, that is called twice or has hooks; an addition of
    another size or dtype; one across a write to memory.

    The result is a copy that shares parameters and buffers: training one trains both, until ``.to`` gives one of them
    other buffers. `module` stays as it is. Classes, attributes, methods, hooks and names are the same in the copy, and
    so is what its modules compute where somebody calls them by themselves. What torch.fx can trace has the forward of
    the traced graph, and what Python decided while it was traced is decided for good: attributes that forward asks for,
    a dropout of 0 before what is drawn in, and the number of dimensions. It calls layers, not the modules between it
    and them, nor activations that are drawn in: hooks put on those afterwards do not run, and what is put in their
    place or appended is not called. So shard, wrap or hook blocks first and fuse what is in them. Hooks put afterwards
    on a batch norm see what they would have seen, at the price of its fusion; what replaces it is called with a keyword
    drawn_in. Where a module cannot be traced, does something else in training than in eval, has arguments with
    defaults, draws random numbers or leaves something in an attribute, its own forward stays and the modules in it are
    fused one by one. What forward does to globals, or to objects that its class holds, is seen only where a tensor
    stays there.

    Layers of a subclass of torch's, such as timm's BatchNormAct2d, that compute what ours do, with one of the
    activations, and those of fixed statistics, such as torchvision's FrozenBatchNorm2d, get the forward of ours as
    :func:`bnext.convert` gives it to them where it is asked to: what their own forward asks attributes for, and whether
    there are other processes, is decided for good, and children are not called any more.

    Args:
        module: any module.
        example_inputs: what forward takes, by position, with values as in training and more than one value per channel
            everywhere. A dozen steps of it are computed, so that a few small images do. Where tensors that are added
            are equal in size here they have to be so always. Under autocast call this under autocast too. Fuse before
            :func:`bnext.synchronize`, which keeps what was drawn in: into synchronized layers nothing is.

    Returns:
        The fused network, of a subclass of its class, in the mode of `module`. Printed, each part that has another
        forward says what that draws in.

    Raises:
        TypeError: it is no module.
        ValueError: forward does not work with the example, or not with fused modules in it; the example is all zeros or
            the like, or on the meta device; something is hooked into all modules, a module was given a forward that is
            none of its methods, or is one of torch.jit, copies of it lack something, or an attribute is a function that
            holds one; within :func:`bnext.hold_statistics`, which torch's layers do not know.
    """
    _require_fusible(module, example_inputs)
    with _explained(module):
        behaviour = Behaviour(module, example_inputs)
    if behaviour.has_nan or (example_inputs and all(map(_constant, example_inputs))):
        raise ValueError(
            "expected example_inputs that tell networks apart, but "
            + (
                "what comes of them has NaNs"
                if behaviour.has_nan
                else "every one has the same value everywhere"
            )
        )
    for with_subclasses in (True, False):
        with _explained(module):
            fused = _sharing(module)
        if with_subclasses and not convert_subclasses(fused):
            continue
        if _fuse_whole(fused, behaviour):
            return fused
        with _explained(module):
            inputs = _inputs(module, example_inputs)
        _fuse_parts(fused, "", inputs)
        difference = behaviour.difference(fused)
        if difference is None:
            return fused
    raise ValueError(
        f"expected a {type(module).__name__} that computes the same with fused modules, but {difference}; "
        "fuse those of its blocks that do"
    )


def _require_fusible(module: nn.Module, example_inputs: tuple[Any, ...]) -> None:
    """Raises as fuse does, before anything is computed."""
    require_module(module)
    if are_held():
        raise ValueError(
            "expected no bnext.hold_statistics around, under which torch's layers and ours differ"
        )
    if are_hooked():
        raise ValueError("expected no global module hooks, which see the calls that are fused")
    if any(
        x.is_meta
        for x in chain(module.parameters(), module.buffers(), tree_leaves(example_inputs))
        if isinstance(x, Tensor)
    ):
        raise ValueError(
            "expected a module and example_inputs with values, but tensors are on the meta device"
        )
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            which = f"'{name}'" if name else "the module"
            raise ValueError(
                f"expected modules of Python, but {which} is a {type(part).__name__} of torch.jit"
            )
        given = vars(part).get("forward", part.forward)
        if getattr(given, "__self__", None) is not part:  # it may hold this one, and a copy would run it
            raise ValueError(
                f"expected modules with the forward of their class, but '{name}' was given another one"
            )
    if captured := captured_modules(module):
        raise ValueError(
            f"expected functions in attributes that hold no modules, which a copy would not have as its own, but "
            f"'{captured[0]}' does"
        )


@contextmanager
def _explained(module: nn.Module) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever forward or a copy raises
        raise ValueError(
            "expected a module that can be copied and example_inputs of which it can compute a training step, "
            f"but {type(module).__name__} raises {type(error).__name__}: {error}"
        ) from error


def _constant(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.numel() == 0 or bool((x == x.flatten()[:1]).all()))


def _fuse_parts(module: nn.Module, name: str, inputs: _Inputs) -> None:
    """In place: each child as one graph if it can be, and if not the modules in it."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        convert_classes(module, OURS)
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        if isinstance(child, FusedForward) or not has_norm(child):
            continue
        fused = False
        if path in inputs and not is_norm(child):
            with suppress(Exception):  # it may need the network around it
                fused = _fuse_whole(child, Behaviour(child, inputs[path]))
        if not fused:
            _fuse_parts(child, path, inputs)


def _fuse_whole(module: nn.Module, behaviour: Behaviour) -> bool:
    """In place: the module as one graph, if it then does the same."""
    inputs = behaviour.inputs
    if not has_norm(module) or not all(isinstance(x, Tensor) for x in inputs):
        return False
    if "forward" in vars(module):  # one of its methods, which would stay the one that is called
        return False
    graph = trace(module, len(inputs))
    if graph is None:
        return False
    try:
        sized = fx.GraphModule(copy.deepcopy(module).eval(), graph)
        with torch.no_grad():
            Sizes(sized).run(*map(torch.clone, inputs))
        trial = convert_classes(_sharing(module), OURS)
        found = fuse_graph(graph, trial)
        if found:
            set_forward(trial, graph)
        if behaviour.difference(trial) is not None:
            return False
    except Exception:  # whatever a graph raises that is not what forward does
        return False
    convert_classes(module, OURS)
    if found:
        set_forward(module, graph)
    return True


def _inputs(module: nn.Module, example_inputs: tuple[Any, ...]) -> _Inputs:
    """What each module is called with the first time, in training, where all of it can be given by position."""
    found: _Inputs = {}
    work = copy.deepcopy(module).train()
    for name, part in work.named_modules():

        def note(part: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], name: str = name) -> None:
            given = inspect.signature(part.forward).bind(*args, **kwargs)
            if not given.kwargs:
                found.setdefault(name, tree_map_only(Tensor, lambda x: x.detach().clone(), given.args))

        if has_norm(part):
            part.register_forward_pre_hook(note, with_kwargs=True)
    with torch.no_grad(), randomness.left_alone():
        work(*tree_map_only(Tensor, torch.clone, example_inputs))
    return found


def _sharing(module: Network) -> Network:
    """A copy with the same tensors: parameters, buffers, and what else it holds of them.

    Raises:
        ValueError: a module copies itself, and leaves something out.
    """
    held = (
        tensor for part in module.modules() for tensor in vars(part).values() if isinstance(tensor, Tensor)
    )
    made = copy.deepcopy(module, {id(t): t for t in chain(module.parameters(), module.buffers(), held)})
    for (name, part), (_, copied) in zip(module.named_modules(), made.named_modules(), strict=True):
        if isinstance(part, fx.GraphModule):  # whose copies have what their graph needs
            vars(copied).update({key: vars(part)[key] for key in vars(part).keys() - vars(copied).keys()})
        lost = vars(part).keys() - vars(copied).keys()
        lost |= {kind for kind in HOOKS if len(getattr(part, kind)) != len(getattr(copied, kind))}
        if lost:
            raise ValueError(f"a copy of '{name}' lacks its {min(lost)}")
    for (name, tensor), (_, shared) in zip(module.named_parameters(), made.named_parameters(), strict=True):
        if tensor is not shared:
            raise ValueError(f"a copy has a parameter '{name}' of its own")
    return made
