"""Random problems against the reference, and random plans."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import bnext
from cases import (
    ACTIVE,
    CHANNELS_LAST,
    CHANNELS_LAST_3D,
    CONTIGUOUS,
    DTYPES,
    INVERTIBLE,
    MODES,
    PARAMETERS,
    Layout,
)
from problem import Problem, make
from random_examples import SETTINGS

sizes = st.integers(1, 9)
# Around the vector widths, and small.
channels = st.one_of(st.integers(1, 9), st.integers(14, 18), st.integers(30, 34), st.integers(62, 66))


@st.composite
def shapes(draw: st.DrawFn) -> tuple[int, ...]:
    """Of rank 2 to 5 with at least two values per channel, at most 50,000 elements."""
    space = draw(st.lists(sizes, max_size=3))
    batch = draw(st.one_of(sizes, st.integers(10, 70)))
    shape = (batch, draw(channels), *space)
    return shape if batch * math.prod(space) > 1 else (2, *shape[1:])


@st.composite
def layouts(draw: st.DrawFn, rank: int) -> Layout:
    """Any order of the dimensions, with gaps between elements, and with dimensions that repeat one element."""
    order = draw(st.permutations(range(rank)))
    steps = draw(st.lists(st.sampled_from([1, 1, 1, 2, 3]), min_size=rank, max_size=rank))
    offset = draw(st.integers(0, 3))
    repeated = draw(st.sampled_from([None] * 6 + list(range(2, rank))))

    def arrange(x: Tensor) -> Tensor:
        shape = x.shape
        if repeated is not None:
            x = x.narrow(repeated, 0, 1)
        extents = [size * step for size, step in zip(x.shape, steps, strict=True)]
        dense = x.new_full((math.prod(extents) + offset,), float("nan"))[offset:]
        back = [order.index(dim) for dim in range(rank)]
        view = dense.view([extents[dim] for dim in order]).permute(back)
        view = view[tuple(slice(None, None, step) for step in steps)]
        view.copy_(x)
        if repeated is None:
            return view
        return view.expand([shape[d] if d == repeated else -1 for d in range(rank)])

    return Layout("any", rank, CONTIGUOUS, arrange)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    shape = draw(shapes())
    problem = make(
        shape,
        draw(layouts(len(shape))),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from(MODES)),
        draw(st.sampled_from(PARAMETERS)),
        mean=draw(st.sampled_from([0.0, 0.0, 10.0, 1e3])),
    )
    problem.eps = draw(st.sampled_from([1e-5, 1e-3, 1.0]))
    problem.momentum = draw(st.sampled_from([0.1, 1.0, 0.01]))
    problem.unbiased = draw(st.booleans())
    active = draw(st.sampled_from([None, *ACTIVE]))
    if active is not None:
        problem.activation, problem.activation_param = active.activation, active.activation_param
    over_itself = any(step == 0 and size > 1 for step, size in zip(problem.x.stride(), shape, strict=True))
    if active in INVERTIBLE and not over_itself and draw(st.booleans()):
        problem.inplace = True
    elif draw(st.booleans()):
        values = torch.randn(shape, generator=torch.Generator().manual_seed(23)).to(problem.x.dtype)
        problem.residual = draw(layouts(len(shape))).arrange(values)
    return problem


def format_of(x: Tensor) -> torch.memory_format:
    for rank, kept in ((4, CHANNELS_LAST), (5, CHANNELS_LAST_3D)):
        if not x.is_contiguous() and x.dim() == rank and x.is_contiguous(memory_format=kept):
            return kept
    return CONTIGUOUS


@SETTINGS
@given(problem=problems())
def test_any_problem(problem: Problem) -> None:
    leaves = problem.require_grad()
    y = problem.forward()
    problem.check_output(y)
    if problem.inplace:
        assert y.stride() == problem.x.stride()
    else:
        assert y.is_contiguous(memory_format=format_of(problem.x))
    if problem.batch and problem.running_mean is not None:
        problem.check_running(problem.momentum)
    grads = torch.autograd.grad(y, leaves, problem.dy)
    assert grads[0].is_contiguous(memory_format=format_of(problem.x))
    for leaf, grad in zip(leaves, grads, strict=True):
        leaf.grad = grad
    problem.check_grads()


@SETTINGS
@given(
    shape=st.lists(st.sampled_from([0, 1, 2, 3, 7, 64, 1000, 2**20, 2**31]), min_size=2, max_size=5),
    layout=st.sampled_from(["contiguous", "channels_last"]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    training=st.booleans(),
    backward=st.booleans(),
    threads=st.integers(1, 300),
    residual=st.booleans(),
    activation=st.sampled_from([None, "relu", "silu"]),
)
def test_any_plan(shape: list[int], layout: str, **options: Any) -> None:
    """Also for tensors that no memory holds: every channel and every position in a slab and a chunk, nothing twice."""
    assume(shape[1] > 0 and math.prod(size for size in shape if size) < 2**48)
    plan = bnext.plan(shape, layout=layout if len(shape) in (4, 5) else "contiguous", **options)
    assert 1 <= plan.threads <= options["threads"]
    assert plan.slabs * plan.slab_channels >= shape[1] > (plan.slabs - 1) * plan.slab_channels
    assert plan.chunks >= 1
    assert plan.bytes_moved >= plan.bytes_minimum >= 0
    assert plan.traversal in ("planes", "rows")
    assert plan.schedule in ("fused", "split", "map")
    assert (plan.schedule == "map") == (not options["training"] and not options["backward"])
