"""Batch norms of classes of somebody's own that compute what ours do, with an activation maybe: read off a graph."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

from torch import fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized

from ..drawn_in import TakesDrawnIn
from ..modules import OUR_ATTRIBUTES, OURS, FusedBatchNorm
from .fixed import convert_fixed
from .formula import STATE
from .fused_forward import can_stand_before, set_class
from .readers import activation_of, arguments_of_norm, readers_of
from .tracing import MODES, Proxy, Tracer, traced

__all__ = ["convert_subclasses"]

_Keywords = tuple[tuple[str, Any], ...]
_COUNTER = "num_batches_tracked"


def convert_subclasses(module: nn.Module) -> bool:
    """In place: layers of subclasses of torch's that do what ours do get the forward of ours. Whether there are any.

    Such a class adds an activation to the normalization, as timm's BatchNormAct2d does, or nothing that its forward
    would show. That is torch's function of the layer's own state, then one of our activations or nothing, in training
    and in eval; whatever else stands in the graph of it, the layer stays. What Python decides in it is decided then.
    Its own class stays, behind ours, and so do its attributes and children, though nobody calls these any more.
    Layers of fixed statistics that are of no class of torch's are looked at as well (fixed.py).
    """
    return any([_convert(layer) for layer in module.modules()])


def _convert(layer: nn.Module) -> bool:
    if type(layer) in OURS or isinstance(layer, TakesDrawnIn):
        return False
    ours = next((ours for torchs, ours in OURS.items() if isinstance(layer, torchs)), None)
    try:
        if ours is None:
            return convert_fixed(layer)
        keywords = _read(cast(_BatchNorm, layer), ours)
        if keywords is None:
            return False
        set_class(layer, ours)
    except Exception:  # whatever somebody's class raises: the layer stays what it is
        return False
    vars(layer).update(OUR_ATTRIBUTES | dict(keywords))
    return True


def _read(layer: _BatchNorm, ours: type[FusedBatchNorm]) -> _Keywords | None:
    """The keywords with which a layer of ours does the same; None if there are none."""
    if not _is_plain(layer, ours):
        return None
    found = {
        _keywords(layer, traced(partial(_Tracer, ndim), layer, *modes), training=modes[0])
        for ndim in ours._ndims
        for modes in MODES
    }
    return found.pop() if len(found) == 1 else None


def _is_plain(layer: nn.Module, ours: type[FusedBatchNorm]) -> bool:
    """Whether it has torch's parameters and buffers alone, and our forward may take the place of its own."""
    own = {name for name, _ in layer.named_parameters()} | {name for name, _ in layer.named_buffers()}
    return (
        not is_parametrized(layer)
        and own <= {*STATE, _COUNTER}
        and can_stand_before((ours, FusedBatchNorm, TakesDrawnIn), layer, nn.BatchNorm2d, OUR_ATTRIBUTES)
    )


class _Input(Proxy):
    """A tensor of a number of dimensions that is known, which layers check."""

    def dim(self) -> int:
        return cast(_Tracer, self.tracer).ndim

    ndim = property(dim)


class _Tracer(Tracer):
    def __init__(self, ndim: int) -> None:
        super().__init__()
        self.ndim = ndim

    def kind_of_proxy(self, node: fx.Node) -> type[Proxy]:
        return _Input if node.op == "placeholder" else Proxy


def _keywords(layer: _BatchNorm, graph: fx.Graph, training: bool) -> _Keywords | None:
    """Those of a layer of ours for the activation, if a graph is that of one; None if it is not."""
    state = {node.target: node for node in graph.nodes if node.op == "get_attr"}
    (x,) = (node for node in graph.nodes if node.op == "placeholder")
    (norm,) = (node for node in graph.nodes if node.target is F.batch_norm)
    given = arguments_of_norm(norm)
    tracking = training and layer.track_running_stats
    tensors = {name: getattr(layer, name) for name in STATE}
    if training and not tracking:
        tensors |= {"running_mean": None, "running_var": None}
    expected = {name: None if tensor is None else state[name] for name, tensor in tensors.items()}
    expected |= {"input": x, "training": training or layer.running_mean is None, "eps": layer.eps}
    expected |= {"momentum": layer.momentum} if tracking else {}
    if any(given[name] != value for name, value in expected.items()):
        return None
    counted = [node for node in graph.nodes if node.target == "add_"]
    calls = [(node.args, node.kwargs) for node in counted]
    if calls != ([((state[_COUNTER], 1), {})] if tracking else []):
        return None
    found, followed = activation_of(layer, norm)
    rest = readers_of(layer, followed[-1] if found else norm)
    if not rest or rest[-1].op != "output":
        return None
    if not {*graph.nodes} <= {x, *state.values(), norm, *counted, *followed, *rest}:
        return None
    return tuple(found._asdict().items()) if found else ()
