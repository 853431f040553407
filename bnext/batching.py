"""The operators under torch.vmap: the channels of all examples side by side, as those of one call.

Channels of a batch normalization know nothing of each other, so B examples of (N, C, ...) are one input of
(N, B * C, ...); where a grouped convolution made them, that is how they lie. One by one goes what a single call cannot
say: a mask, whose bits follow the memory order of one example, and cumulative averages over counters of their own.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from . import _C

__all__ = ["register"]

CHANNELS = ("x", "residual", "dy", "stats")  # (N, C, ...)
VECTORS = ("weight", "bias", "running_mean", "running_var")  # C elements
RUNNING = ("running_mean", "running_var")
COUNTER = "num_batches_tracked"


class Info(Protocol):
    """What torch.library.register_vmap says of a call. batch_size: the number of examples."""

    batch_size: int


# Outputs, and for each the dimension of the examples, None where they have it in common.
_Result = tuple[Any, Any]


class _Call:
    """An operator's call for `count` examples: `given` by the schema's names, `dims` the examples' dimension in it."""

    def __init__(self, operator: Any, dims: tuple[Any, ...], given: tuple[Any, ...], count: int) -> None:
        known = [argument.name for argument in operator._schema.arguments]
        names = known[: len(given)]  # the rest have their defaults
        self.operator, self.count = operator, count
        self.given: dict[str, Any] = dict(zip(names, given, strict=True))
        tensors = zip(names, given, dims, strict=True)
        self.dims: dict[str, int | None] = {
            name: dim if isinstance(t, Tensor) else None for name, t, dim in tensors
        }

    @property
    def own_counters(self) -> Tensor | None:
        """The examples' counters of batches, if they have some of their own that go up."""
        own = self.given.get("training") and self.dims.get(COUNTER) is not None
        return self.given[COUNTER] if own else None

    def example(self, index: int) -> dict[str, Any]:
        return {
            name: value if self.dims[name] is None else value.select(self.dims[name], index)
            for name, value in self.given.items()
        }

    def _example_of_none(self) -> dict[str, Any]:
        """One with the sizes that an example would have, where there is none."""
        made = dict(self.given)
        for name, dim in self.dims.items():
            if dim is not None:
                made[name] = made[name].new_empty(made[name].shape[:dim] + made[name].shape[dim + 1 :])
        return made

    def of_none(self) -> _Result:
        """Without examples, in a mapped dimension of size 0: nothing is updated, and outputs have their sizes."""
        outputs = self.check()
        device = self.given["x"].device
        if isinstance(outputs, Tensor):
            return outputs.new_empty((0, *outputs.shape), device=device), 0
        return tuple(t.new_empty((0, *t.shape), device=device) for t in outputs), (0,) * len(outputs)

    def check(self, error: Exception | None = None) -> Any:
        """The outputs of one example's call on the meta device, or its error, which names the example's sizes.

        `error` is what a call of all examples raised, if there was one.
        """
        example = self.example(0) if self.count else self._example_of_none()
        meta = {name: a.to("meta") if isinstance(a, Tensor) else a for name, a in example.items()}
        try:
            with torch.no_grad():
                return self.operator(**meta)
        except (RuntimeError, ValueError) as known:
            raise known from error

    def require_writable(self, written: tuple[str, ...]) -> None:
        """That examples have memory of their own for `written` and counters: asked before anything is written."""
        for name in (*written, COUNTER) if self.own_counters is not None else written:
            t, dim = self.given[name], self.dims[name]
            if dim is not None and self.count > 1 and t.stride(dim) == 0:
                raise RuntimeError(
                    f"vmap: expected {name} with memory of its own for every example, but they share it"
                )
        counters = self.own_counters
        if counters is None:
            return
        if counters.numel() != self.count or counters.dtype != torch.int64:
            self.check()
        if self.given["momentum"] is not None:  # else the operator counts
            counters.add_(0)  # what torch's transforms refuse they refuse now

    def one_by_one(self) -> _Result:
        results = []
        for index in range(self.count):
            example = self.example(index)
            counter = example.get(COUNTER)
            if counter is not None and self.own_counters is None and index + 1 < self.count:
                example[COUNTER] = counter.clone()  # the examples' one counter goes up once
            results.append(self.operator(**example))
        return tuple(torch.stack(outputs) for outputs in zip(*results, strict=True)), (0,) * len(results[0])

    def at_once(self, written: tuple[str, ...] = ()) -> Any:
        """The outputs of one call with all channels. written: what it updates in place, each with examples of it."""
        counters = self.own_counters
        try:
            examples = {
                name: self._examples(name)
                for name in (*CHANNELS, *VECTORS)
                if self.given.get(name) is not None
            }
            folded = {
                name: t.flatten(1, 2) if name in CHANNELS else t.reshape(-1) for name, t in examples.items()
            }
            copies = [name for name in written if not _is_view(examples[name], name)]
            for name in copies:  # what is there already: refused now where writing it later would be
                examples[name].copy_(folded[name].view_as(examples[name]))
            outputs = self.operator(**(self.given | folded | ({} if counters is None else {COUNTER: None})))
        except (RuntimeError, ValueError, IndexError) as error:
            self.check(error)
            raise
        for name in copies:
            examples[name].copy_(folded[name].view_as(examples[name]))
        if counters is not None:
            counters.add_(1)
        return outputs

    def unfold(self, t: Tensor, dim: int) -> Tensor:
        """An output with the examples' dimension before that of the channels."""
        return t.view(*t.shape[:dim], self.count, t.shape[dim] // self.count, *t.shape[dim + 1 :])

    def _examples(self, name: str) -> Tensor:
        """(N, B, C, ...), or (B, ...) of a vector."""
        t: Tensor = self.given[name]
        dim = self.dims[name]
        t = t.expand(self.count, *t.shape) if dim is None else t.movedim(dim, 0)
        return t.movedim(0, 1) if name in CHANNELS else t


def _is_view(examples: Tensor, name: str) -> bool:
    """Whether folding them was no copy."""
    first = 1 if name in CHANNELS else 0
    if not first and examples.dim() != 2:
        return examples.is_contiguous()
    count, channels = examples.shape[first : first + 2]
    outer, inner = examples.stride()[first : first + 2]
    return bool(outer == channels * inner or 1 in (count, channels))


def _require_statistics_of_their_own(call: _Call) -> None:
    """In training: that no running statistic would get a new value from each example."""
    mapped = {name: call.dims[name] is not None for name in (*RUNNING, COUNTER, "x")}
    if mapped["running_mean"] != mapped["running_var"]:
        raise RuntimeError("vmap: expected running_mean and running_var both mapped over, or neither")
    if mapped["running_mean"]:
        return
    if mapped["x"]:
        raise RuntimeError(
            "vmap: the input is mapped over, but running_mean and running_var, which training updates, are not: "
            "expected them mapped over too (torch.func.stack_module_state), or track_running_stats=False"
        )
    if mapped[COUNTER] and call.given["momentum"] is None:
        raise RuntimeError(
            "vmap: num_batches_tracked is mapped over, but running_mean and running_var, which are averages over that "
            "many batches, are not: expected all three mapped over, or none"
        )


def _update_what_is_common(call: _Call, *more: str) -> tuple[str, ...]:
    """Updates the statistics that all examples share, and takes them out of the call, which is left to write the rest.

    Returns:
        The rest: `more`, which it writes in any case, and statistics that are not shared.
    """
    given = call.given
    tracking = given["training"] and given["running_mean"] is not None
    if tracking:
        _require_statistics_of_their_own(call)
    if not tracking or call.dims["running_mean"] is not None:
        written = (*more, *RUNNING) if tracking else more
        call.require_writable(written)
        return written
    call.require_writable(more)
    call.check()
    plain: dict[str, Any] = dict.fromkeys(("residual", "weight", "bias", "activation", "activation_param"))
    counts = call.own_counters is None
    with torch.no_grad():
        torch.ops.bnext.batch_norm.default(**(given | plain | ({} if counts else {COUNTER: None})))
    given |= dict.fromkeys((*RUNNING, COUNTER) if counts else RUNNING)
    return more


def _batch_norm(info: Info, dims: tuple[Any, ...], *given: Any) -> _Result:
    call = _Call(torch.ops.bnext.batch_norm.default, dims, given, info.batch_size)
    if not call.count:
        return call.of_none()
    return _forward(call, _update_what_is_common(call))


def _batch_norm_no_update(info: Info, dims: tuple[Any, ...], *given: Any) -> _Result:
    call = _Call(torch.ops.bnext.batch_norm_no_update.default, dims, given, info.batch_size)
    return _forward(call, ()) if call.count else call.of_none()


def _forward(call: _Call, written: tuple[str, ...]) -> _Result:
    residual, activation = call.given["residual"], call.given["activation"]
    keeps_mask = (
        call.given["for_backward"]
        and activation in _C.MASKED
        and (residual is not None or not call.given.get("keeps_input", True))
    )
    if keeps_mask or (call.own_counters is not None and call.given["momentum"] is None):
        return call.one_by_one()
    y, stats, mask = call.at_once(written)
    return (call.unfold(y, 1), call.unfold(stats, 1), mask), (1, 1, None)


def _batch_norm_(info: Info, dims: tuple[Any, ...], *given: Any) -> _Result:
    call = _Call(torch.ops.bnext.batch_norm_.default, dims, given, info.batch_size)
    if call.dims["x"] is None:
        raise RuntimeError(
            "vmap: the input, which inplace=True writes over, is not mapped over, but other tensors are: expected a "
            "mapped input, or inplace=False"
        )
    if not call.count:
        return call.of_none()
    if call.own_counters is not None and call.given["momentum"] is None:
        raise RuntimeError(
            "vmap: with inplace=True and momentum=None, num_batches_tracked is mapped over: expected one counter for "
            "all examples, or inplace=False"
        )
    written = _update_what_is_common(call, "x")
    return call.unfold(call.at_once(written), 1), 1


def _batch_norm_backward(info: Info, dims: tuple[Any, ...], *given: Any) -> _Result:
    call = _Call(torch.ops.bnext.batch_norm_backward.default, dims, given, info.batch_size)
    if not call.count:
        return call.of_none()
    if call.given["mask"] is not None:
        return call.one_by_one()
    channels = (1, 0, 0, 1)  # dimension of dx, dweight, dbias, dresidual
    outputs = zip(call.at_once(), channels, call.given["output_mask"], strict=True)
    unfolded = [(call.unfold(t, dim), dim) if wanted else (t, None) for t, dim, wanted in outputs]
    return tuple(t for t, _ in unfolded), tuple(dim for _, dim in unfolded)


def register() -> None:
    """Makes torch.vmap and what is built on it (jacfwd, jacrev, hessian) take the operators."""
    for name, rule in {
        "batch_norm": _batch_norm,
        "batch_norm_no_update": _batch_norm_no_update,
        "batch_norm_": _batch_norm_,
        "batch_norm_backward": _batch_norm_backward,
    }.items():
        torch.library.register_vmap(f"bnext::{name}", rule)
