"""What follows a batch norm in its call: a residual, an activation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx, nn

from .attributes import has_hooks
from .torch_activations import followed

__all__ = ["DrawnIn", "TakesDrawnIn", "what_follows"]

DrawnIn = tuple[Tensor | None, str | None, float | None]  # residual, activation, activation_param


# By name: every small call would feel a super(), and a walk through torch.fx.
_call: Callable[..., Any] = nn.Module._call_impl
_Proxy = fx.Proxy


def what_follows(
    residual: Tensor | None, drawn_in: DrawnIn | None, activation: str | None, parameter: float | None
) -> DrawnIn:
    """What was drawn in, and if nothing was, the residual of the call and the layer's own activation."""
    if drawn_in is None or isinstance(drawn_in, fx.Proxy):  # a proxy: the layer itself is traced
        return residual, activation, parameter
    if not isinstance(drawn_in, tuple) or len(drawn_in) != 3:
        raise TypeError(f"expected drawn_in (residual, activation, activation_param), but got {drawn_in!r}")
    return drawn_in


class TakesDrawnIn(nn.Module):
    """A layer that :func:`bnext.fuse` calls with a keyword drawn_in, in place of its own residual and activation."""

    def _is_bare(self) -> bool:
        """Whether something can be drawn in."""
        return True

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        """What torch calls a module by.

        In a symbolic trace of what it is a part of, a layer whose input is traced is one node, as torch's own are, by
        whatever tracer: the graph follows its mode and its attributes, and hooks stay what they are. Otherwise hooks
        see the layer by itself, and what was drawn in follows them.
        """
        input = args[0] if args else kwargs.get("input")
        if isinstance(input, _Proxy) and isinstance(input.tracer, fx.Tracer):
            return input.tracer.create_proxy("call_module", input.tracer.path_of_module(self), args, kwargs)
        if not kwargs or kwargs.get("drawn_in") is None or not has_hooks(self):
            return _call(self, *args, **kwargs)
        follows = what_follows(None, kwargs.pop("drawn_in"), None, None)
        return followed(_call(self, *args, **kwargs), *follows)
