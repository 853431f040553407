"""Bad input: an error of the right type and text, before anything was touched; never a crash.

Where torch has the error, its own call is made beside ours and type and text are compared; programs match on them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import bnext
from bnext.functional import batch_norm
from cases import refused_alike

TORCH = SimpleNamespace(
    BatchNorm1d=nn.BatchNorm1d,
    BatchNorm2d=nn.BatchNorm2d,
    BatchNorm3d=nn.BatchNorm3d,
    batch_norm=nn.functional.batch_norm,
)
BNEXT = SimpleNamespace(
    BatchNorm1d=bnext.BatchNorm1d,
    BatchNorm2d=bnext.BatchNorm2d,
    BatchNorm3d=bnext.BatchNorm3d,
    batch_norm=batch_norm,
)


def ones(*shape: int, **options: Any) -> Tensor:
    return torch.ones(shape, **options)


# Layers, and the inputs they refuse as torch does.
LAYER_CASES: dict[str, tuple[Callable[[Any], nn.Module], Tensor]] = {
    "1d, 4D": (lambda bn: bn.BatchNorm1d(3), ones(2, 3, 4, 4)),
    "1d, 1D": (lambda bn: bn.BatchNorm1d(3), ones(3)),
    "1d, 0D": (lambda bn: bn.BatchNorm1d(3), ones()),
    "2d, 3D": (lambda bn: bn.BatchNorm2d(3), ones(2, 3, 4)),
    "2d, 5D, eval": (lambda bn: bn.BatchNorm2d(3).eval(), ones(2, 3, 4, 4, 4)),
    "3d, 4D": (lambda bn: bn.BatchNorm3d(3), ones(2, 3, 4, 4)),
    "one value": (lambda bn: bn.BatchNorm1d(3), ones(1, 3)),
    "one value, 2d": (lambda bn: bn.BatchNorm2d(3), ones(1, 3, 1, 1)),
    "one value, 3d": (lambda bn: bn.BatchNorm3d(3), ones(1, 3, 1, 1, 1)),
    "one value, untracked eval": (lambda bn: bn.BatchNorm1d(3, track_running_stats=False).eval(), ones(1, 3)),
    "eps 0": (lambda bn: bn.BatchNorm1d(3, eps=0.0), ones(2, 3)),
    "eps -1": (lambda bn: bn.BatchNorm1d(3, eps=-1.0), ones(2, 3)),
    "eps -1e-05, eval": (lambda bn: bn.BatchNorm1d(3, eps=-1e-05).eval(), ones(2, 3)),
    "eps -2.5e-10, eval": (lambda bn: bn.BatchNorm1d(3, eps=-2.5e-10).eval(), ones(2, 3)),
    "channels": (lambda bn: bn.BatchNorm1d(3), ones(2, 4)),
    "channels, eval": (lambda bn: bn.BatchNorm2d(3).eval(), ones(2, 4, 2, 2)),
    "channels, NHWC": (lambda bn: bn.BatchNorm2d(3), ones(2, 4, 2, 2).to(memory_format=torch.channels_last)),
    "channels, untracked": (lambda bn: bn.BatchNorm1d(3, track_running_stats=False), ones(2, 4)),
    "channels, momentum None": (lambda bn: bn.BatchNorm1d(3, momentum=None), ones(2, 4)),
    # Which comes first when several are wrong.
    "rank before one value": (lambda bn: bn.BatchNorm2d(3), ones(1, 3)),
    "one value before eps": (lambda bn: bn.BatchNorm1d(3, eps=0.0), ones(1, 3)),
    "one value before channels": (lambda bn: bn.BatchNorm1d(3), ones(1, 4)),
    "eps before channels": (lambda bn: bn.BatchNorm1d(3, eps=0.0), ones(2, 4)),
}

# The same for the function: arguments after the input, which is (2, 4).
FUNCTION_CASES: dict[str, Callable[[Any], Tensor]] = {
    "running_mean": lambda bn: bn.batch_norm(ones(2, 4), ones(3), ones(4), training=True),
    "running_var": lambda bn: bn.batch_norm(ones(2, 4), ones(4), ones(5), training=True),
    "running_var, eval": lambda bn: bn.batch_norm(ones(2, 4), ones(4), ones(5)),
    "weight": lambda bn: bn.batch_norm(ones(2, 4), ones(4), ones(4), ones(3), training=True),
    "bias": lambda bn: bn.batch_norm(ones(2, 4), ones(4), ones(4), None, ones(8), training=True),
    "mean before weight": lambda bn: bn.batch_norm(ones(2, 4), ones(3), ones(3), ones(3), ones(3)),
    "weight before bias": lambda bn: bn.batch_norm(ones(2, 4), None, None, ones(3), ones(3), True),
    "empty weight": lambda bn: bn.batch_norm(ones(2, 4), None, None, ones(0), None, True),
    "eval without either": lambda bn: bn.batch_norm(ones(2, 4), None, None),
    "eval without mean": lambda bn: bn.batch_norm(ones(2, 4), None, ones(4)),
    "eval without var": lambda bn: bn.batch_norm(ones(2, 4), ones(4), None),
    "training without mean": lambda bn: bn.batch_norm(ones(2, 4), None, ones(4), training=True),
    "training without var": lambda bn: bn.batch_norm(ones(2, 4), ones(4), None, training=True),
    "one value": lambda bn: bn.batch_norm(ones(1, 4, 1), ones(4), ones(4), training=True),
    "eps": lambda bn: bn.batch_norm(ones(2, 4), ones(4), ones(4), training=True, eps=0.0),
    "eps, eval": lambda bn: bn.batch_norm(ones(2, 4), ones(4), ones(4), eps=-0.5),
}


def error_of(call: Callable[[], object]) -> Exception:
    with pytest.raises(Exception) as caught:
        call()
    return caught.value


def copies(layer: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


def assert_untouched(layer: nn.Module, before: dict[str, Tensor]) -> None:
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, before[name]), f"{name} has changed"


@pytest.mark.parametrize("case", refused_alike(LAYER_CASES))
def test_layers_refuse_what_torch_refuses(case: str, device: str) -> None:
    make, x = LAYER_CASES[case]
    x = x.to(device)
    expected = error_of(lambda: make(TORCH).to(device)(x))
    layer = make(BNEXT).to(device)
    before = copies(layer)
    error = error_of(lambda: layer(x))
    assert type(error) is type(expected)
    assert str(error) == str(expected)
    assert_untouched(layer, before)


@pytest.mark.parametrize("case", refused_alike(FUNCTION_CASES))
def test_the_function_refuses_what_torch_refuses(case: str) -> None:
    call = FUNCTION_CASES[case]
    error, expected = error_of(lambda: call(BNEXT)), error_of(lambda: call(TORCH))
    assert type(error) is type(expected)
    assert str(error) == str(expected)


INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
OTHERS = [torch.complex64, torch.complex128, torch.float8_e4m3fn]


@pytest.mark.parametrize("dtype", INTEGERS + OTHERS, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_input_that_is_not_floating_point(dtype: torch.dtype, training: bool, device: str) -> None:
    """torch's type and the beginning of its text, as on the CPU; ours goes on to say what is expected."""
    x = ones(2, 3, device=device).to(dtype)
    layer = bnext.BatchNorm1d(3, device=device).train(training)
    before = copies(layer)
    expected = error_of(lambda: nn.BatchNorm1d(3).train(training)(x.cpu()))  # on CUDA it names a kernel
    error = error_of(lambda: layer(x))
    assert type(error) is type(expected) is NotImplementedError
    assert str(error).startswith(str(expected))
    assert_untouched(layer, before)


F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
# Dtypes of input, running statistics, weight and bias, and the argument the error must name.
MIXTURES = [
    (F64, F32, F32, "running_mean"),
    (F32, F64, F64, "running_mean"),
    (F32, F32, F64, "weight"),
    (F32, BF16, BF16, "running_mean"),
    (F32, None, BF16, "weight"),
    (BF16, F64, F64, "running_mean"),
    (BF16, F16, F16, "running_mean"),
    (F16, BF16, BF16, "running_mean"),
    (BF16, F32, BF16, "weight"),
    (BF16, BF16, F32, "weight"),
]


@pytest.mark.parametrize(("input_dtype", "running", "parameters", "named"), MIXTURES, ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_mixed_dtypes(
    input_dtype: torch.dtype, running: torch.dtype | None, parameters: torch.dtype, named: str, training: bool
) -> None:
    statistics = (None, None) if running is None else (ones(3, dtype=running), ones(3, dtype=running))
    if running is None and not training:
        statistics = (ones(3, dtype=input_dtype), ones(3, dtype=input_dtype))
    with pytest.raises(RuntimeError, match=f"expected {named} to have .*dtype") as caught:
        batch_norm(ones(2, 3, dtype=input_dtype), *statistics, ones(3, dtype=parameters), None, training)
    for dtype in (input_dtype, parameters):
        name = {F32: "Float", F64: "Double", BF16: "BFloat16", F16: "Half"}[dtype]
        assert name in str(caught.value)


def test_one_parameter_of_another_dtype() -> None:
    with pytest.raises(
        RuntimeError, match="expected bias to have the dtype of weight, BFloat16, but got Float"
    ):
        batch_norm(ones(2, 3, dtype=BF16), None, None, ones(3, dtype=BF16), ones(3), True)
    with pytest.raises(RuntimeError, match="expected running_var to have the dtype of running_mean"):
        batch_norm(ones(2, 3, dtype=BF16), ones(3, dtype=BF16), ones(3), training=True)


def train(x: Any = None, mean: Any = None, var: Any = None, **options: Any) -> Tensor:
    """A training call with three channels, in which one thing is wrong."""
    return batch_norm(ones(2, 3) if x is None else x, mean, var, training=True, **options)


def counter(*values: float, **options: Any) -> Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], **options)


META = {"device": "meta"}
ASKING = {"requires_grad": True}
# What torch does not refuse, or less clearly: our error, in words.
OWN_CASES: dict[str, tuple[type[Exception], str, Callable[[], object]]] = {
    "1D": (ValueError, r"expected at least 2D input \(got 1D input\)", lambda: train(ones(3))),
    "0D": (ValueError, r"expected at least 2D input \(got 0D input\)", lambda: train(ones())),
    "no channel": (
        ValueError,
        r"one channel.*Size\(\[2, 0, 4\]\)",
        lambda: bnext.BatchNorm1d(0)(ones(2, 0, 4)),
    ),
    "no channel, eval": (ValueError, "one channel", lambda: bnext.BatchNorm1d(0).eval()(ones(2, 0))),
    "no channel, empty": (ValueError, "one channel", lambda: bnext.BatchNorm1d(3)(ones(0, 0))),
    "empty": (
        RuntimeError,
        "running_mean should contain 4 elements not 3",
        lambda: bnext.BatchNorm1d(3)(ones(0, 4)),
    ),
    "eps NaN": (ValueError, "eps must be positive", lambda: train(eps=math.nan)),
    "input's device": (
        RuntimeError,
        "running_mean on .* meta, but",
        lambda: bnext.BatchNorm1d(3)(ones(2, 3, **META)),
    ),
    "layer's device": (
        RuntimeError,
        "running_mean on .* cpu, but",
        lambda: bnext.BatchNorm1d(3, **META)(ones(2, 3)),
    ),
    "weight's device": (RuntimeError, "expected weight on", lambda: train(weight=ones(3, **META))),
    "bias's device": (RuntimeError, "expected bias on", lambda: train(bias=ones(3, **META))),
    "counter's device": (RuntimeError, "tracked on", lambda: train(num_batches_tracked=counter(0, **META))),
    "counter's dtype": (RuntimeError, "single int64", lambda: train(num_batches_tracked=counter(0.0))),
    "two counters": (RuntimeError, "single int64", lambda: train(num_batches_tracked=counter(0, 0))),
    "NumPy input": (TypeError, "tensor, but got ndarray", lambda: bnext.BatchNorm1d(3)(np.ones((2, 3)))),
    "list input": (TypeError, "tensor, but got list", lambda: bnext.BatchNorm1d(3)([[1.0, 2.0, 3.0]])),
    "no input": (TypeError, "input as a tensor, but got NoneType", lambda: bnext.BatchNorm1d(3)(None)),
    "sparse input": (NotImplementedError, "SparseCPU", lambda: train(ones(2, 3).to_sparse())),
    "sparse weight": (NotImplementedError, "SparseCPU", lambda: train(weight=ones(3).to_sparse())),
    "opaque input": (NotImplementedError, "Mkldnn", lambda: train(ones(2, 3, 4, 4).to_mkldnn())),
    "mean with gradient": (
        RuntimeError,
        "running_mean.*requires_grad",
        lambda: train(None, ones(3, **ASKING), ones(3)),
    ),
    "var with gradient": (
        RuntimeError,
        "running_var.*requires_grad",
        lambda: train(None, ones(3), ones(3, **ASKING)),
    ),
    "mean in one place": (
        RuntimeError,
        "single memory location",
        lambda: train(None, ones(1).expand(3), ones(3)),
    ),
}


@pytest.mark.parametrize("case", OWN_CASES)
def test_what_we_refuse_in_our_own_words(case: str) -> None:
    error, text, call = OWN_CASES[case]
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.update(running_var=ones(4)),
        lambda state: state.update(running_var=ones(3, dtype=torch.float64)),
        lambda state: state.update(running_var=ones(1).expand(3)),
        lambda state: state.update(weight=ones(2)),
        lambda state: state.update(bias=ones(3, dtype=torch.bfloat16)),
        lambda state: state.update(bias=ones(3, device="meta")),
        lambda state: state.update(num_batches_tracked=torch.tensor([1, 2])),
        lambda state: state.update(num_batches_tracked=torch.tensor(1.0)),
        lambda state: state.update(eps=0.0),
    ],
    ids=[
        "var",
        "var dtype",
        "var overlap",
        "weight",
        "bias dtype",
        "bias device",
        "counters",
        "counter",
        "eps",
    ],
)
def test_nothing_is_touched_before_every_check_has_passed(spoil: Callable[[dict[str, Any]], None]) -> None:
    """Whichever argument is at fault, the mean before it in line and the counter stay as they were."""
    arguments: dict[str, Any] = {
        "running_mean": ones(3),
        "running_var": ones(3),
        "weight": ones(3),
        "bias": ones(3),
        "num_batches_tracked": torch.tensor(5),
        "training": True,
    }
    spoil(arguments)
    before = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
    error_of(lambda: batch_norm(torch.randn(4, 3), **arguments))
    for name, value in before.items():
        assert value.is_meta or torch.equal(arguments[name], value), f"{name} has changed"
