"""What cases are written with: inputs, comparisons that say what was got and what was expected, forms of answers."""

from __future__ import annotations

import inspect
import itertools
import re
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor


class Fail(Exception):
    """A case's verdict "no", with the text that the learner reads."""


class NotAnswered(Exception):
    """The answer is still blank: None, ``...``, or a function that returns one of them; the text says what is blank."""


class Stop(BaseException):
    """Thrown into a thread whose answer has run for too long: the one exception that is no verdict."""


def blank(answer: Any) -> str:
    """What is blank: all of the answer (None, ``...``), a part of a list, tuple or dict, or "" if nothing is."""
    if answer is None or answer is Ellipsis:
        return "not answered yet (it is blank, or returns None)"
    if type(answer) not in (list, tuple, dict):
        return ""
    parts = list(itertools.islice(answer.values() if type(answer) is dict else answer, 1000))
    empty = [number for number, part in enumerate(parts, 1) if blank(part)]
    if not empty:
        return ""
    if all(part is None or part is Ellipsis for part in parts):
        return blank(None)
    if len(empty) == 1:
        return f"not answered yet: part {empty[0]} of your answer is still blank"
    return f"not answered yet: parts {', '.join(map(str, empty))} of your answer are still blank"


def shorten(text: str, limit: int) -> str:
    """The text, cut at ``limit`` characters."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


# -- what cases are written with -------------------------------------------------------------------------


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal numbers in torch's default type: the same for the same seed, whatever was drawn before."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reject(message: str) -> None:
    """The one place where a comparison says no (the proof's own test switches it off here)."""
    raise Fail(message)


def require(condition: object, message: str) -> None:
    """Fail with ``message`` unless the condition holds."""
    if not bool(condition):
        reject(message)


def expect_shape(got: Tensor, shape: tuple[int, ...], what: str) -> None:
    """Fail unless the tensor has this shape."""
    require(tuple(got.shape) == shape, f"{what}: got shape {tuple(got.shape)}, expected {shape}")


def expect_close(
    got: Any, want: Any, what: str, rtol: float = 1e-4, atol: float = 1e-5, tell_expected: bool = True
) -> None:
    """Fail unless ``got`` has the shape and, within tolerance, the values of ``want``; any float type will do.

    Args:
        got: the learner's number, list, array or tensor.
        want: what it must be.
        what: where this is, for the message.
        rtol: relative tolerance.
        atol: absolute tolerance, in units of ``want``.
        tell_expected: False where ``want`` is the answer itself, which must not be read off the message.

    Raises:
        Fail: with got, expected (if told) and where.
    """
    x, y = as_tensor(got, what), torch.as_tensor(want).detach().double()
    if x.shape != y.shape:
        reject(f"{what}: got shape {tuple(x.shape)}, expected {tuple(y.shape)}")
        return
    off, place = ~(torch.isclose(x, y, rtol=rtol, atol=atol) & torch.isfinite(x)), ""
    if off.any():
        if x.numel() > SHOWN and not off.flatten()[:SHOWN].any():  # the first entries are right: show the first wrong
            index = [int(i) for i in off.nonzero()[0]]
            x, y, place = x[tuple(index)], y[tuple(index)], f" at {index}"
        digits = next((n for n in (4, 6, 9) if show(x, n) != show(y, n)), 12)
        infinite = "" if torch.isfinite(x).all() else ", which is not finite"
        expected = f", expected {show(y, digits)}" if tell_expected else ": not right"
        reject(f"{what}{place}: got {show(x, digits)}{infinite}{expected}")


def as_tensor(got: Any, what: str) -> Tensor:
    """A learner's number, list, array or tensor as a detached double tensor on the CPU; Fail if it is none of these."""
    if isinstance(got, str):
        raise Fail(f"{what}: expected numbers, got {describe(got)}")
    try:
        got = _plain(got)
        if isinstance(got, (list, tuple)) and any(isinstance(part, Tensor) for part in got):
            got = torch.stack([torch.as_tensor(part) for part in got])
        plain = isinstance(got, (bool, int, float, list, tuple))
        return torch.as_tensor(got, dtype=torch.float64 if plain else None).detach().cpu().double()
    except Exception:
        raise Fail(f"{what}: expected numbers, got {describe(got)}") from None


def _plain(x: Any, depth: int = 4) -> Any:
    """Numbers of every real type (fractions, numpy's own) as floats, in lists and tuples too."""
    if isinstance(x, Real) and not isinstance(x, (bool, int, float)):
        return float(x)
    if depth and isinstance(x, (list, tuple)) and any(not isinstance(part, (bool, int, float)) for part in x):
        return [_plain(part, depth - 1) for part in x]
    return x


def keeps_inputs(function: Callable[..., Any]) -> Callable[..., Any]:
    """The learner's function; Fail after a call that changed one of the tensors, arrays or lists it was given."""

    def call(*args: Any, **kwargs: Any) -> Any:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, (Tensor, np.ndarray, list))]
        kept = [_copy(x) for x in given]
        tensors = [x for x in given if isinstance(x, Tensor)]
        traced = [_trace(x) for x in tensors]
        result = function(*args, **kwargs)
        for now, before in zip(given, kept, strict=True):
            what = {Tensor: "a tensor", list: "a list"}.get(type(now), "an array")
            require(_unchanged(now, before), f"your function changed {what} that it was given: work on a copy")
        require(
            [_trace(x) for x in tensors] == traced,
            "your function set requires_grad or .grad of a tensor that it was given: differentiate a copy, "
            "x.detach().clone().requires_grad_()",
        )
        return result

    return call


def _trace(x: Tensor) -> tuple[bool, bool, int | None]:
    """Whether and where autograd keeps books on a tensor."""
    return x.requires_grad, x.is_leaf, None if not x.is_leaf or x.grad is None else x.grad._version


def _copy(x: Any) -> Any:
    if isinstance(x, list):
        return [_copy(part) for part in x]
    return x.detach().clone() if isinstance(x, Tensor) else np.copy(x) if isinstance(x, np.ndarray) else x


def _unchanged(now: Any, before: Any) -> bool:
    """Whether two lists, tensors, arrays or other things are the same; nan is the same as nan."""
    if isinstance(before, list):
        return isinstance(now, list) and len(now) == len(before) and all(map(_unchanged, now, before))
    if isinstance(before, (Tensor, np.ndarray)):
        if not isinstance(now, (Tensor, np.ndarray)):
            return False
        a, b = torch.as_tensor(now).detach(), torch.as_tensor(before)
        return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
    return now is before or bool(now == before)


def unpack(got: Any, count: int, what: str) -> tuple[Any, ...]:
    """A learner's tuple, list, array or tensor of ``count`` things; Fail if it is not one."""
    array = isinstance(got, (Tensor, np.ndarray)) and got.ndim > 0
    if not (array or isinstance(got, (tuple, list))) or len(got) != count:
        raise Fail(f"{what}: expected a tuple of {count}, got {describe(got)}")
    return tuple(got)


def gradient(value: Any, x: Tensor, what: str) -> Tensor:
    """d value / d x for a learner's ``value`` (summed if it is not a scalar).

    Raises:
        Fail: if ``value`` is no tensor or carries no gradient to ``x``.
    """
    if not isinstance(value, Tensor):
        raise Fail(f"{what}: expected a torch tensor, got {describe(value)}")
    if not value.requires_grad:
        raise Fail(f"{what}: your result carries no gradient (something is detached)")
    (slope,) = torch.autograd.grad(value.sum(), x, allow_unused=True, retain_graph=True)
    if slope is None:
        raise Fail(f"{what}: your result does not depend on it, so there is no gradient (something is detached)")
    return slope


def gradient_or_none(value: Any, x: Tensor) -> Tensor | str:
    """The same for probes: the gradient, or the words "no gradient"."""
    try:
        return gradient(value, x, "probe")
    except Fail:
        return "no gradient"


def expect_constant(result: Tensor, what: str, x: Tensor) -> None:
    """Fail unless ``result``, which carries a gradient elsewhere, has none in ``x``, called ``what`` in the message."""
    (slope,) = torch.autograd.grad(result.sum(), x, allow_unused=True, retain_graph=True)
    steepest = 0.0 if slope is None else slope.abs().max().item()
    require(steepest == 0.0, f"the gradient in {what} must be 0, got {steepest:.4g}")


def is_distribution(p: Tensor, tolerance: float = 5e-3) -> bool:
    """Whether numbers that a learner wrote down, rounded, are probabilities: none below 0, the sum 1."""
    return bool((p >= 0).all() and abs(p.sum().item() - 1) < tolerance)


def describe(x: Any) -> str:
    """A learner's object in a few words: its type, and its shape, length or text."""
    if isinstance(x, Tensor):
        return f"a tensor of shape {tuple(x.shape)}"
    if isinstance(x, str):
        return f"text {shorten(repr(x), 40)}"
    if isinstance(x, (list, tuple)):
        return f"a {type(x).__name__} of {len(x)}"
    if isinstance(x, (bool, int, float)):
        return f"{type(x).__name__} {shorten(repr(x), 40)}"
    return "a function" if callable(x) else f"an object of type {type(x).__name__}"


SHOWN = 8  # entries of a tensor in a message


def show(x: Tensor, digits: int = 4) -> str:
    """The first entries of a tensor, four digits each."""
    entries = [f"{0.0 if abs(v) < 1e-12 else v:.{digits}g}" for v in x.detach().flatten()[:SHOWN].tolist()]
    if x.ndim == 0:
        return entries[0]
    return "[" + ", ".join(entries) + (", ...]" if x.numel() > SHOWN else "]")


def same(a: Any, b: Any, tolerance: float = 1e-4) -> bool:
    """Whether two probe outputs are equal: nested lists of tensors, numbers or texts."""
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, (str, frozenset)) or isinstance(b, (str, frozenset)):
        return bool(type(a) is type(b) and a == b)
    try:
        x, y = as_tensor(a, "probe"), as_tensor(b, "probe")
    except Fail:
        return False
    return x.shape == y.shape and torch.allclose(x, y, rtol=tolerance, atol=tolerance, equal_nan=True)


def copies(given: Sequence[Any]) -> list[Any]:
    """The same inputs, which a learner's function may spoil."""
    return [x.clone() if isinstance(x, Tensor) else x for x in given]


def outcome(want: Any, f: Any, *args: Any, rtol: float = 1e-3, atol: float = 1e-5, **options: Any) -> str:
    """For probes, what an answer makes of an unusual input: "right", "wrong", "not finite" or "an error"."""
    try:
        x, y = as_tensor(f(*copies(args), **options), "probe"), torch.as_tensor(want).double()
    except Exception:
        return "an error"
    if not torch.isfinite(x).all():
        return "not finite"
    return "right" if x.shape == y.shape and torch.allclose(x, y, rtol=rtol, atol=atol) else "wrong"


def in_two_steps(
    ordinary: Callable[[Any], Any], unusual: Callable[[Any], Any], reference: Any
) -> Callable[[Any], list[Any]]:
    """Probes that try unusual inputs only on an answer that is right on ordinary ones.

    So a mistake in the formula is recognised however its numbers overflow, and one of precision or range by where it
    goes wrong, whatever number it gives there.
    """

    def probe(f: Any) -> list[Any]:
        found = ordinary(f)
        return [found, unusual(f)] if same(found, ordinary(reference)) else [found]

    return probe


def source(function: Callable[..., Any]) -> str:
    """Text of a reference function, as the master notebook shows it (without our type checker's remarks)."""
    return re.sub(r" *# (type: ignore|noqa).*", "", inspect.getsource(function)).rstrip()


# -- forms of answers that are not functions -------------------------------------------------------------


def numbers(*shape: int) -> Callable[[Any], Tensor]:
    """Accept a list, array or tensor of finite numbers of this shape."""

    def accept(answer: Any) -> Tensor:
        x = as_tensor(answer, "your answer")
        if x.shape != shape:
            raise Fail(f"your answer: got shape {tuple(x.shape)}, expected {shape}")
        if not torch.isfinite(x).all():
            raise Fail(f"your answer: got {show(x)}, which is not finite")
        return x

    return accept


def lines(count: int, noun: str, example: str) -> Callable[[Any], frozenset[int]]:
    """Accept a set, or any other collection, of the numbers of lines (or of what ``noun`` says) from 1 to ``count``."""

    def accept(answer: Any) -> frozenset[int]:
        if isinstance(answer, (Tensor, np.ndarray)):
            answer = answer.tolist()
        try:
            again = not isinstance(answer, (str, bytes, dict)) and iter(answer) is not answer
            found = list(itertools.islice(answer, 1000)) if again else None
        except Exception:
            found = None
        if found is None:
            raise Fail(f"expected a set of {noun} numbers, in the form {example}, got {describe(answer)}")
        if not found:
            raise Fail(f"your set is empty: at least one {noun} belongs in it")
        try:
            whole = all(not isinstance(n, bool) and n == int(n) and 1 <= n <= count for n in found)
        except Exception:
            whole = False
        if not whole:
            raise Fail(f"{noun} numbers are whole numbers from 1 to {count}")
        return frozenset(int(n) for n in found)

    return accept


def orders(count: int, items: tuple[float, ...]) -> Callable[[Any], list[list[float]]]:
    """Accept ``count`` lists, each an arrangement of ``items``."""

    def accept(answer: Any) -> list[list[float]]:
        rows = [as_tensor(row, "your answer") for row in unpack(answer, count, "your answer")]
        for row in rows:
            if row.ndim != 1 or not same(row.sort().values, sorted(items)):
                raise Fail(f"each list must hold {', '.join(f'{x:g}' for x in items)}, every one once")
        return [[min(items, key=lambda item: abs(item - x)) for x in row.tolist()] for row in rows]

    return accept
