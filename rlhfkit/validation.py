"""Argument checks shared by the maths: a wrong argument is named, with what came and what was expected."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def require_same_shape(**tensors: Tensor) -> None:
    """Raise unless all tensors have one shape, since broadcasting would hide a bug.

    Args:
        **tensors: the arguments by name, any shape each.

    Raises:
        ValueError: naming every argument with its shape.
    """
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: got {type(x).__name__}, expected a torch.Tensor")
    if len({x.shape for x in tensors.values()}) > 1:
        got = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"shapes differ: got {got}; expected one shape for all of them")


def require_float(**tensors: Tensor) -> None:
    """Raise unless every tensor (any shape) is floating point.

    Raises:
        ValueError: naming the argument and its dtype.
    """
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name}: got {type(x).__name__}, expected a torch.Tensor")
        if not x.is_floating_point():
            raise ValueError(f"{name}: got dtype {x.dtype}, expected a floating-point tensor")


def require_mask(name: str, mask: Tensor, shape: torch.Size) -> None:
    """Raise unless ``mask`` is boolean and has the given shape.

    A 0/1 mask of integers or floats is refused: indexing with one picks rows 0 and 1 instead of selecting.

    Raises:
        ValueError: naming the mask, its dtype or its shape.
    """
    if not isinstance(mask, Tensor):
        raise ValueError(f"{name}: got {type(mask).__name__}, expected a boolean torch.Tensor")
    if mask.dtype != torch.bool:
        raise ValueError(f"{name}: got dtype {mask.dtype}, expected torch.bool (write {name}.bool())")
    if mask.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(mask.shape)}, expected {tuple(shape)}")


def require_ndim(name: str, x: Tensor, axes: str) -> None:
    """Raise unless ``x`` has as many axes as ``axes`` names, e.g. ``"(B, T)"``.

    Raises:
        ValueError: naming the argument, its shape and the shape expected.
    """
    if not isinstance(x, Tensor) or x.ndim != len(axes.split(",")):
        got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name}: got shape {got}, expected {axes}")


def require_in(name: str, value: float, low: float, high: float = math.inf, *, open_low: bool = False) -> None:
    """Raise unless ``low <= value <= high`` (``low < value`` with ``open_low``); NaN is refused.

    Raises:
        ValueError: naming the argument, its value and the interval.
    """
    inside = (low < value if open_low else low <= value) and value <= high
    if not inside:
        left = "(" if open_low else "["
        right = f"{high:g}]" if high < math.inf else "inf)"
        raise ValueError(f"{name}: got {value}, expected a number in {left}{low:g}, {right}")
