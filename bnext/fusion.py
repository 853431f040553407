"""Draws what follows a batch norm into it, in a network that exists: of its graphs, not of its text."""

from __future__ import annotations

import copy
from contextlib import suppress
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses import fake_tensor
from torch.fx.passes.shape_prop import ShapeProp
from torch.utils._pytree import tree_map_only

from .conversion import convert
from .fused_graph import NORMS, fuse_graph
from .modules import FusedBatchNorm
from .tracing import has_norm, mode, trace

__all__ = ["fuse"]

# Where a forward asks for the values of a tensor, which a fake one has not.
_NEEDS_VALUES = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedFakeTensorException,
    fake_tensor.UnsupportedOperatorException,
)

_Calls = dict[nn.Module, list[tuple[Any, ...] | None]]  # the arguments of each call, None if some had names


def fuse(module: nn.Module, *example_inputs: Any) -> nn.Module:
    """A network in which each batch norm computes the addition and the activation that follow it as well.

    ``relu(bn(x))`` and ``relu(bn(x) + identity)``, however they are written (modules, functions, methods, in place),
    become one pass each; the other batch norms become ours as by :func:`bnext.convert`. What is not certain to be the
    same stays: a batch norm whose output something else reads too, that is called twice or has hooks; an addition of
    another size or dtype; one across a write to memory.

    The result shares parameters and buffers with `module`, which stays as it is: training one trains both, until
    ``.to`` gives one of them other buffers. Names in the state dict are the same.

    What torch.fx can trace, and is called once, becomes a :class:`torch.fx.GraphModule`: it has forward alone of the
    class's methods, and parameters that forward does not use are left out. What it cannot, or what is another forward
    in training than in eval, for a graph is one of them, stays a module of its class; the modules in it are fused one
    by one.

    Args:
        module: any module.
        example_inputs: what forward takes. Sizes and dtypes are read, nothing is computed: they decide which additions
            are of equal tensors. Under autocast call this under autocast too.

    Returns:
        The fused network, in the mode of `module`.

    Raises:
        ValueError: forward does not take the example, or does more with a module in it than call it.
    """
    fake = fake_tensor.FakeTensorMode(allow_non_fake_inputs=True)
    calls: _Calls = {}
    try:
        _run(fake, module, example_inputs, calls)
    except Exception as error:  # whatever forward raises
        raise ValueError(
            f"expected example_inputs that forward takes, but it raises {type(error).__name__}: {error}"
        ) from error
    fused = _Fusion(fake, calls).of(module)
    try:
        _run(fake, fused, example_inputs, {})
    except Exception as error:
        raise ValueError(
            "expected a forward that does no more with the modules in it than call them, but with fused ones "
            f"that of {type(module).__name__} raises {type(error).__name__}: {error}; fuse its blocks one by one"
        ) from error
    return fused


class _Fusion:
    """Of the modules of one network; each has one twin, however often it is in it."""

    def __init__(self, fake: fake_tensor.FakeTensorMode, calls: _Calls) -> None:
        self.fake = fake
        # Called once and by position: only of these is it known that what the graph says is all that happens.
        self.inputs = {
            called: found[0] for called, found in calls.items() if len(found) == 1 and found[0] is not None
        }
        self.twins: dict[nn.Module, nn.Module] = {}

    def of(self, module: nn.Module) -> nn.Module:
        if module not in self.twins:
            self.twins[module] = self._twin(module)
        return self.twins[module]

    def _twin(self, module: nn.Module) -> nn.Module:
        if type(module) in NORMS:
            return convert(_sharing(module))
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or not has_norm(module):
            return module
        graph = trace(module) if module in self.inputs else None
        if graph is not None:
            fused = fx.GraphModule(module, graph, type(module).__name__)
            with mode(fused, training=False):
                ShapeProp(fused, fake_mode=self.fake).propagate(*self.inputs[module])
            fuse_graph(
                fused, lambda norm: cast(FusedBatchNorm, self.of(norm)), lambda norm: norm in self.inputs
            )
            return fused
        twin = _sharing(module)
        for name, child in module._modules.items():
            twin._modules[name] = None if child is None else self.of(child)
        return twin


def _run(
    fake: fake_tensor.FakeTensorMode, module: nn.Module, example_inputs: tuple[Any, ...], calls: _Calls
) -> None:
    """Calls a copy in eval, of fake tensors all, and notes the calls that end of modules with batch norms."""
    with fake_tensor.FakeCopyMode(fake):
        stand_in = copy.deepcopy(module)
    for original, part in zip(module.modules(), stand_in.modules(), strict=True):

        def note(
            _: Any, args: tuple[Any, ...], kwargs: dict[str, Any], y: Any, of: nn.Module = original
        ) -> None:
            calls.setdefault(of, []).append(None if kwargs else args)

        if has_norm(original):
            part.register_forward_hook(note, with_kwargs=True)
    # Where a value is asked for, what has ended until then is known.
    with mode(stand_in, training=False), torch.no_grad(), suppress(*_NEEDS_VALUES), fake:
        stand_in(*tree_map_only(Tensor, fake.from_tensor, example_inputs))


def _sharing(original: nn.Module) -> nn.Module:
    """Another module with the parameters, buffers, children, hooks and mode of a module."""
    twin = original.__new__(type(original))
    twin.__dict__.update(
        {
            key: copy.copy(value) if isinstance(value, dict) else value
            for key, value in original.__dict__.items()
        }
    )
    return twin
