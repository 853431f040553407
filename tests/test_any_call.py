"""Random nonsense against the checks: a call gives a result or a refusal that has touched nothing."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bnext.functional import ACTIVATIONS
from random_examples import SETTINGS

activations = st.sampled_from([None, None, *ACTIVATIONS, "swish"])
dtypes = st.sampled_from(
    [torch.float32] * 6 + [torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.complex64]
)
few = st.integers(0, 4)
vectors = st.one_of(
    st.none(),
    st.builds(lambda shape, dtype: torch.ones(shape, dtype=dtype), st.just([3]), dtypes),
    st.builds(lambda shape, dtype: torch.ones(shape, dtype=dtype), st.lists(few, max_size=2), dtypes),
    st.just(torch.ones(1).expand(3)),
    st.just(torch.ones(3, device="meta")),
)
inputs = st.builds(
    lambda shape, dtype: torch.ones(shape, dtype=dtype),
    st.one_of(st.lists(few, max_size=5), st.lists(few, max_size=3).map(lambda space: [2, 3, *space])),
    dtypes,
)
REFUSALS = (ValueError, RuntimeError, NotImplementedError)


def copies(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors if tensor is not None and not tensor.is_meta]


@SETTINGS
@given(
    x=inputs,
    residual=st.one_of(st.none(), st.just("like x"), inputs),
    tensors=st.tuples(vectors, vectors, vectors, vectors),
    counter=st.sampled_from(
        [None, torch.tensor(0), torch.tensor(0), torch.tensor(0.0), torch.tensor([0, 0])]
    ),
    training=st.booleans(),
    momentum=st.sampled_from([None, 0.1, 0.0, math.nan, math.inf]),
    eps=st.sampled_from([1e-5, 1e-5, 0.0, -1.0, math.nan]),
    ndims=st.sampled_from([[], [], [2, 3], [4], [-1]]),
    activation=activations,
    activation_param=st.sampled_from([None, None, 0.1, math.nan]),
    for_backward=st.booleans(),
    keeps_input=st.booleans(),
)
def test_any_call_of_the_forward_operator(
    x: Tensor,
    residual: Any,
    tensors: Any,
    counter: Any,
    training: bool,
    for_backward: bool,
    keeps_input: bool,
    **scalars: Any,
) -> None:
    """A result of the right shape, or a refusal that has touched nothing."""
    residual = x + 1 if isinstance(residual, str) else residual
    weight, bias, mean, var = tensors
    mean, var = (None if t is None else t if t.is_meta or 0 in t.stride() else t.clone() for t in (mean, var))
    counter = None if counter is None else counter.clone()
    before = copies(mean, var, counter)
    try:
        y, stats, mask = torch.ops.bnext.batch_norm(
            x,
            residual,
            weight,
            bias,
            mean,
            var,
            counter,
            training,
            scalars["momentum"],
            scalars["eps"],
            True,
            scalars["ndims"],
            scalars["activation"],
            scalars["activation_param"],
            for_backward,
            keeps_input=keeps_input,
        )
    except REFUSALS:
        for one, other in zip(before, copies(mean, var, counter), strict=True):
            assert torch.equal(one, other)
    else:
        assert y.shape == x.shape
        assert stats.shape == (4 if for_backward else 2, x.shape[1])
        beside = residual is not None or not keeps_input
        masked = for_backward and beside and scalars["activation"] in ("relu", "leaky_relu", "relu6")
        assert mask.shape == (x.numel() // 32 * 4 + 8 if masked else 0,)


ONES = torch.ones(3)
# weight, bias, running_mean, running_var that fit
fitting = st.sampled_from([(ONES, ONES, ONES, ONES), (ONES, None, ONES, ONES), (ONES, ONES, None, None)])


@SETTINGS
@given(
    x=st.one_of(st.just(torch.arange(24.0).view(2, 3, 4)), inputs),
    tensors=st.one_of(fitting, fitting, st.tuples(vectors, vectors, vectors, vectors)),
    training=st.booleans(),
    asking=st.sampled_from(["nothing", "x", "weight"]),
    activation=st.one_of(st.sampled_from(["leaky_relu", "elu"]), activations),
    activation_param=st.sampled_from([None, None, 0.1, 0.0, math.nan]),
)
def test_any_call_over_the_input(
    x: Tensor, tensors: Any, training: bool, asking: str, activation: Any, activation_param: Any
) -> None:
    """The values of the other form, or a refusal that has touched nothing."""
    x, (weight, bias, mean, var) = x.clone(), tensors
    mean, var = (None if t is None else t if t.is_meta or 0 in t.stride() else t.clone() for t in (mean, var))
    weight = None if weight is None else weight.detach()  # a leaf, whatever an example before this one did
    asked = {"x": x, "weight": weight}.get(asking)
    if asked is not None and (asked.is_floating_point() or asked.is_complex()):
        asked.requires_grad_()
    over = x * 1 if x.requires_grad else x
    before, version = copies(over, mean, var), over._version
    last = (training, 0.1, 1e-5, True, [], activation, activation_param)
    try:
        torch.ops.bnext.batch_norm_(over, weight, bias, mean, var, None, *last, False)
    except REFUSALS:
        assert over._version == version
        for one, other in zip(before, copies(over, mean, var), strict=True):
            assert torch.equal(one, other)
    else:
        running = before[1:] if mean is not None else [None, None]
        y, _, _ = torch.ops.bnext.batch_norm(before[0], None, weight, bias, *running, None, *last, False)
        assert torch.equal(over, y)
        assert over.requires_grad == (asked is not None and asked.requires_grad)


@SETTINGS
@given(
    dy=inputs,
    x=inputs,
    same=st.booleans(),
    weight=vectors,
    bias=vectors,
    stats=st.one_of(
        st.just(torch.ones(2, 3, dtype=torch.float64)),
        st.lists(few, max_size=3).map(lambda shape: torch.ones(shape, dtype=torch.float64)),
    ),
    training=st.booleans(),
    activation=activations,
    activation_param=st.sampled_from([None, None, 0.1]),
    residual=st.one_of(st.none(), inputs),
    mask=st.one_of(st.none(), st.integers(0, 16).map(lambda size: torch.zeros(size, dtype=torch.uint8))),
    from_output=st.booleans(),
    wanted=st.lists(st.booleans(), min_size=3, max_size=5),
)
def test_any_call_of_the_backward_operator(
    dy: Tensor,
    x: Tensor,
    same: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    training: bool,
    activation: str | None,
    activation_param: float | None,
    residual: Tensor | None,
    mask: Tensor | None,
    from_output: bool,
    wanted: list[bool],
) -> None:
    slope = (activation, activation_param, from_output)
    dy, residual = (x if same else dy), (x if same and residual is not None else residual)
    try:
        dx, dweight, dbias, dresidual = torch.ops.bnext.batch_norm_backward(
            dy, x, residual, mask, weight, bias, stats, training, *slope, wanted
        )
    except REFUSALS:
        return
    for want, grad in zip((wanted[0], wanted[3]), (dx, dresidual), strict=True):
        assert grad.shape == (x.shape if want else (0,))
    for want, grad in zip(wanted[1:3], (dweight, dbias), strict=True):
        assert grad.shape == ((x.shape[1],) if want else (0,))
