"""Planted bugs: wrong implementations that the tests of a function must catch, and the exact references they share.

A test that takes the function it tests as a default argument, ``def test_fact(gae=gae)``, can be run with a wrong
one. Every test file lists wrong ones in ``PLANTED``; ``test_planted.py`` runs the file's tests on each of them.
"""

import __future__

import ast
import inspect
import os
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any
from unittest import mock

import mpmath
import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64)
JUNK = (float("nan"), float("inf"), -float("inf"), 1e30)  # what padding may hold
close = torch.testing.assert_close


def f64(data: Any) -> Tensor:
    return torch.tensor(data, dtype=torch.float64)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normals, the same on every device; on the default device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu").to(
        torch.get_default_device(), dtype
    )


# left-padded, ragged on the right, interior hole, full, one token
MASKS = [[0, 0, 1, 1, 1], [1, 1, 0, 0, 0], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1], [0, 1, 0, 0, 0]]


def masks() -> Tensor:
    return torch.tensor(MASKS, dtype=torch.bool)


def leaf(x: Tensor) -> Tensor:
    return x.detach().clone().requires_grad_()


def gradients(function: Callable[..., Tensor], *inputs: Tensor, seed: int = 99) -> list[Tensor]:
    """Gradients of a random weighting of the function's output with respect to every input; none gives zeros."""
    leaves = [leaf(x) for x in inputs]
    output = function(*leaves)
    if not output.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    weights = normal(*output.shape, seed=seed, dtype=output.dtype)
    found = torch.autograd.grad(output, leaves, weights, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]


def ignores_padding(function: Callable[..., Tensor], mask: Tensor, *inputs: Tensor) -> None:
    """Assert that what the inputs hold outside the mask changes neither the value nor any gradient."""
    clean = [torch.where(mask, x, 0.0) for x in inputs]
    value, slopes = function(*clean), gradients(function, *clean)
    assert value.isfinite().all()
    for junk in JUNK:
        dirty = [torch.where(mask, x, junk) for x in inputs]
        close(function(*dirty), value)
        for got, expected in zip(gradients(function, *dirty), slopes, strict=True):
            close(got, expected)


def raises(error: type[Exception], call: Callable[[], object], *words: str) -> None:
    """Assert, as an AssertionError where it fails, that a call raises and that its message holds every word."""
    try:
        call()
    except error as caught:
        for word in words:
            assert word in str(caught), f"{word!r} is missing in: {caught}"
    except Exception as other:
        raise AssertionError(f"{other!r} in place of a {error.__name__}") from other
    else:
        raise AssertionError(f"no {error.__name__}")


def _without_docstrings(source: str) -> str:
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            text = node.body[0]
            lines[text.lineno - 1 : text.end_lineno] = [""] * (text.end_lineno - text.lineno + 1)
    return "\n".join(lines)


def edited(function: Any, *changes: tuple[str, str]) -> Any:
    """The function or class with its source text changed: how a bug is planted in a longer body."""
    source = _without_docstrings(textwrap.dedent(inspect.getsource(function)))
    for old, new in changes:
        assert source.count(old) == 1, f"{function.__name__}: {old!r} occurs {source.count(old)} times, expected 1"
        source = source.replace(old, new)
    names = dict(vars(inspect.getmodule(function)))
    flags = __future__.annotations.compiler_flag
    exec(compile(source, f"<planted in {function.__name__}>", "exec", flags=flags, dont_inherit=True), names)
    return names[function.__name__]


@contextmanager
def replaced(module: ModuleType, **names: Any) -> Iterator[None]:
    """Other objects under some names of a module, for a while."""
    with mock.patch.multiple(module, **names):
        yield


def first_failing_test(tests: ModuleType, name: str, implementation: Any) -> str | None:
    """Name of the first test of a file that fails on an implementation of ``name``; None where all pass.

    Only an AssertionError counts: a wrong function that crashes proves nothing about the test.
    """
    ran = 0
    for test_name, test in list(vars(tests).items()):
        if not test_name.startswith("test_"):
            continue
        parameters = inspect.signature(test).parameters
        if name not in parameters or any(p.default is p.empty for p in parameters.values()):
            continue
        ran += 1
        try:
            with mock.patch.dict(os.environ):
                os.environ.pop("CI", None)  # with it pytest words every failure in full, which can take hours
                test(**{name: implementation})
        except AssertionError:
            return test_name
        except Exception:
            continue
    assert ran, f"{tests.__name__} has no test of {name}"
    return None


def mp(x: Tensor) -> list[Any]:
    """The exact values of a 1-D tensor's entries, as mpmath numbers."""
    return [mpmath.mpf(value) for value in x.tolist()]


def exact_logprobs(logits: Tensor) -> list[Any]:
    """log softmax of one row, in 80 decimal digits; log 0 is -inf."""
    with mpmath.workdps(80):
        values = mp(logits)
        top = max(values)
        log_sum = top + mpmath.log(sum(mpmath.exp(v - top) for v in values))
        return [v - log_sum for v in values]
