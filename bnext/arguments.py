"""What an argument has to be, in words, before an operator answers with its schema."""

from __future__ import annotations

from torch import Tensor

__all__ = ["require"]

# By an operator's words for types, those of an argument and of what stands for one, by Python's and torch's protocols.
# A text has no __bool__, only a length.
_WAYS = {
    "Tensor": ("a tensor", Tensor, "__torch_function__"),
    "float": ("a number", float, "__float__"),
    "bool": ("True or False", bool, "__bool__"),
    "str": ("a name", str, None),
}


def require(name: str, given: object, kind: str) -> None:
    """Of one of the kinds above, or Optional[] of it; any other kind is left to the operator.

    Raises:
        TypeError: it is none, nor anything that stands for one.
    """
    optional = kind.startswith("Optional[")
    words, own, protocol = _WAYS.get(kind.removeprefix("Optional[").removesuffix("]"), ("", object, None))
    if (given is None and optional) or isinstance(given, own):
        return
    if given is None or protocol is None or not hasattr(type(given), protocol):
        found = type(given).__name__ if own is Tensor else repr(given)
        raise TypeError(f"expected {name} as {words}{' or None' * optional}, but got {found}")
