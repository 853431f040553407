"""Batch norms of classes of somebody's own that compute what ours do, with an activation maybe: found by trying."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from . import randomness
from .attributes import HOOKS, contents, has_hooks, same
from .equality import Behaviour
from .functional import ACTIVATIONS
from .fused_forward import set_class
from .modules import OUR_ATTRIBUTES, OURS, FusedBatchNorm
from .torch_activations import of_module
from .tracing import takes

__all__ = ["convert_subclasses"]

_SAMPLES = 8
_Keywords = dict[str, Any]  # activation and activation_param


def convert_subclasses(module: nn.Module) -> bool:
    """In place: layers of subclasses of torch's that do what ours do get the forward of ours. Whether there are any.

    Such a class adds an activation to the normalization, as timm's BatchNormAct2d does, or nothing that what it
    computes would show. Each layer is tried on values of every size, in training and in eval. Its own class stays,
    behind ours, and so do its attributes and children, though nobody calls these any more.
    """
    return any([_convert(layer) for layer in module.modules()])


def _convert(layer: nn.Module) -> bool:
    ours = next((ours for torchs, ours in OURS.items() if isinstance(layer, torchs)), None)
    if ours is None or type(layer) in OURS or isinstance(layer, FusedBatchNorm):
        return False
    if is_parametrized(layer) or not takes(layer, 1):
        return False
    if any(has_hooks(part) for part in layer.modules() if part is not layer):  # that nobody would call
        return False
    if any(hasattr(layer, name) for name in OUR_ATTRIBUTES):  # it would mean something else to ours
        return False
    try:
        keywords = _tried(cast(_BatchNorm, layer), ours)
    except Exception:  # whatever somebody's class raises: the layer stays what it is
        return False
    if keywords is not None:
        _set(layer, ours, keywords)
    return keywords is not None


def _tried(layer: _BatchNorm, ours: type[FusedBatchNorm]) -> _Keywords | None:
    """The keywords with which a layer of ours does the same as one of a subclass; None if there are none."""
    probe = _probe(layer)
    behaviours = [Behaviour(probe, (x,)) for x in _inputs(probe, ours._ndims)]
    for keywords in _candidates(layer):
        trial = copy.deepcopy(probe)
        _set(trial, ours, keywords)
        if all(theirs.difference(trial) is None for theirs in behaviours):
            return keywords
    return None


def _probe(layer: _BatchNorm) -> _BatchNorm:
    """A copy whose output follows its input, as it need not while a weight is 0; in eval, so that it does so far."""
    probe = copy.deepcopy(layer).eval()
    for kind in HOOKS:  # which are not to see what is tried
        getattr(probe, kind).clear()
    with torch.no_grad(), randomness.left_alone():
        randomness.seed(0)
        for parameter in probe.parameters(recurse=False):
            parameter.uniform_(0.5, 2)
        _BatchNorm.reset_running_stats(probe)
    return probe


def _inputs(layer: _BatchNorm, ndims: tuple[int, ...]) -> Iterator[Tensor]:
    """Of each number of dimensions: values that tell curves apart, and distant ones.

    Raises:
        ValueError: forward leaves something in an attribute.
    """
    generator = torch.Generator().manual_seed(0)
    like = next(chain(layer.parameters(), layer.buffers()), torch.empty(0))
    work = copy.deepcopy(layer)
    held = contents(work)
    for n in ndims:
        size = [_SAMPLES, layer.num_features, 3, 2, 2][:n]
        near = torch.randn(size, generator=generator)
        distant = near * 10 ** torch.empty(size).uniform_(-3, 6, generator=generator)
        yield from (near.to(like), distant.to(like))
        with torch.no_grad(), randomness.left_alone():
            work(near.to(like))
    if not same(held, contents(work)):
        raise ValueError("an attribute that forward sets, which ours does not")


def _candidates(layer: nn.Module) -> Iterator[_Keywords]:
    """Activations that a layer may compute, likely ones first."""
    children = filter(None, map(of_module, layer.children()))
    yield from ({**child._asdict()} for child in children)
    yield {}
    yield from ({"activation": name} for name in ACTIVATIONS)


def _set(layer: nn.Module, ours: type[nn.Module], keywords: _Keywords) -> None:
    set_class(layer, ours)
    vars(layer).update(OUR_ATTRIBUTES | keywords)
