"""What the pages need: repeatable set-up, rounded printing, asserted claims, the package's own source, plot style."""

from __future__ import annotations

import ast
import base64
import html
import inspect
import io
import math
import os
import random
import re
import textwrap
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from IPython.display import display
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

# Okabe and Ito's palette, told apart with every common colour blindness; darkened where white paper needs it
BLUE, ORANGE, GREEN, RED, PURPLE, GREY = "#0072b2", "#d55e00", "#007a5a", "#a8123e", "#8a4b8f", "#6b6b6b"

CLAIM_MIME = "application/vnd.rlhfkit.claim+json"


def seed_all(seed: int = 0) -> torch.Generator:
    """Make a notebook repeatable: one thread, deterministic kernels, fixed seeds, double precision.

    Args:
        seed: for Python, numpy and torch.

    Returns:
        A generator of its own, to be passed to everything that samples.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    torch.set_default_dtype(torch.float64)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return torch.Generator().manual_seed(seed)


def rounded(x: Any, digits: int = 3) -> str:
    """A number, tensor (any shape) or nested list with ``digits`` decimals, never "-0.000"."""
    if isinstance(x, torch.Tensor):
        x = x.detach().cpu().tolist()
    if isinstance(x, (list, tuple)):
        return "[" + ", ".join(rounded(item, digits) for item in x) + "]"
    if isinstance(x, float) and math.isfinite(x):
        return f"{round(x, digits) + 0.0:.{digits}f}"
    return str(x)


def show(*, digits: int = 3, **named: Any) -> None:
    """Print one line ``name = value`` for each argument, numbers rounded so that all machines agree on them.

    Args:
        digits: decimals shown.
        **named: numbers, tensors of any shape, lists or text; underscores in names become spaces.
    """
    width = max(len(name) for name in named)
    for name, value in named.items():
        print(f"{name.replace('_', ' '):<{width}} = {rounded(value, digits)}")


class Source:
    """Source code that a notebook shows in its own colours."""

    def __init__(self, text: str) -> None:
        self.text = text

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return {"text/plain": self.text, "text/markdown": f"```python\n{self.text}\n```"}


def show_source(obj: Callable[..., Any], doc: bool = False) -> Source:
    """The source of a function or class as the package runs it, so that page and package cannot differ.

    Args:
        obj: the function or class.
        doc: whether to keep the docstring; the API page has it anyway.
    """
    source = textwrap.dedent(inspect.getsource(obj))
    if not doc and obj.__doc__:
        text = ast.parse(source).body[0].body[0]  # type: ignore[attr-defined]
        lines = source.splitlines()
        source = "\n".join(lines[: text.lineno - 1] + lines[text.end_lineno :])
    return Source(source.rstrip())


def claim(
    name: str,
    value: Any,
    expected: float | None = None,
    *,
    text: str,
    tol: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    source: str = "exact enumeration",
    digits: int = 3,
) -> None:
    """Assert a number that the prose quotes, show the assertion on the page, and enter it in the claim registry.

    The prose quotes it with the role ``glue:text`` and the claim's name. With ``expected`` it quotes the value,
    rounded; with ``at_least`` or ``at_most`` it quotes the bound, for numbers that differ between machines.

    Args:
        name: unique on the page; letters, digits and hyphens. Also the anchor of the claim.
        value: the number computed, a float or a tensor with one element.
        expected: what it must equal, to within ``tol``.
        text: the claim in words, without the number.
        tol: largest absolute difference allowed, same unit.
        at_least: lower bound, instead of ``expected``.
        at_most: upper bound, instead of ``expected``.
        source: how the value was obtained: "exact enumeration", "autograd", "200 000 samples", "5 seeds" and so on.
        digits: decimals shown.

    Raises:
        AssertionError: if the claim does not hold, with the number and what was expected.
        ValueError: if the arguments do not say what is claimed.
    """
    if not re.fullmatch(r"[a-z0-9-]+", name):
        raise ValueError(f"name: got {name!r}, expected lower-case letters, digits and hyphens")
    if [expected, at_least, at_most].count(None) != 2 or (expected is None) != (tol is None):
        raise ValueError(f"claim {name!r}: give expected and tol, or at_least, or at_most")
    number = float(value.detach() if isinstance(value, torch.Tensor) else value)
    if expected is not None and tol is not None:
        holds, quoted = abs(number - expected) <= tol, rounded(number, digits)
        condition = f"{rounded(float(expected), digits)} to within {tol:g}"
    elif at_least is not None:
        holds, quoted = number >= at_least, f"{at_least:g}"
        condition = "the lower bound"
    else:
        assert at_most is not None
        holds, quoted = number <= at_most, f"{at_most:g}"
        condition = "the upper bound"
    if not holds:
        raise AssertionError(f"claim {name!r} fails: {text}: got {number:.6g}, expected {condition} {quoted}")
    sign = "" if expected is not None else "≥ " if at_least is not None else "≤ "
    line = f"{text}: {sign}{quoted}"
    note = f"asserted: {condition}; {source}" if expected is not None else f"asserted; {source}"
    record = {"name": name, "text": text, "value": sign + quoted, "condition": condition, "source": source}
    body = f'<div class="claim" id="claim-{name}">✓ {html.escape(line)} <small>({html.escape(note)})</small></div>'
    data = {"text/plain": f"✓ {line} ({note})", "text/html": body, CLAIM_MIME: record}
    display(data, raw=True)
    glue(name, quoted)


def glue(name: str, text: str) -> None:
    """Store a text under a name for the page's prose (role ``glue:text``), in the format of MyST-NB."""
    prefix = "application/papermill.record/"
    data = {prefix + "text/plain": repr(text)}  # quoted, or MyST-NB reads "0.50" as a number and prints 0.5
    display(data, raw=True, metadata={"scrapbook": {"name": name, "mime_prefix": prefix}})


def encode_png(fig: Figure, dpi: int = 160, colors: int = 64) -> tuple[bytes, int]:
    """The figure as a small PNG, the same bytes on every run, and its width in CSS pixels."""
    raw = io.BytesIO()
    fig.savefig(raw, format="png", dpi=dpi, metadata={"Software": None})
    image = Image.open(raw).convert("RGB").quantize(colors, dither=Image.Dither.NONE)
    out = io.BytesIO()
    image.save(out, "PNG", optimize=True)
    return out.getvalue(), round(image.width * 96 / dpi)


class PageFigure(Figure):
    """A figure without pyplot, shown as a sharp PNG when it is the value of a cell."""

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Any:
        png, width = encode_png(self)
        data = {"text/plain": repr(self), "image/png": base64.b64encode(png).decode()}
        return data, {"image/png": {"width": width}}


def new_figure(width: float = 6.4, height: float = 3.4, columns: int = 1, rows: int = 1) -> tuple[Figure, Any]:
    """A figure in the book's style, and its axes (one, or an array of them); sizes in inches.

    Returns:
        The figure, without pyplot and so without a window, and its ``Axes``.
    """
    fig = PageFigure(figsize=(width, height), layout="constrained")
    axes = fig.subplots(rows, columns)
    for ax in np.atleast_1d(axes).flat:
        tidy_axes(ax)
    return fig, axes


def tidy_axes(ax: Axes) -> None:
    """Remove the box, soften the grid, and let lines be told apart without colour blindness trouble."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(True, color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.set_prop_cycle(color=[BLUE, ORANGE, GREEN, RED, PURPLE, GREY])


def plot_band(ax: Axes, x: Any, runs: Any, label: str, color: str, linestyle: str = "-") -> None:
    """Median over seeds as a line, minimum to maximum as a band.

    Args:
        ax: where to draw.
        x: (T,) numbers.
        runs: (S, T), one row for each seed.
        label: for the legend.
        color: of line and band.
        linestyle: of the line.
    """
    runs = np.asarray(runs)
    ax.plot(x, np.median(runs, axis=0), color=color, linestyle=linestyle, label=label, linewidth=1.8)
    ax.fill_between(x, runs.min(axis=0), runs.max(axis=0), color=color, alpha=0.18, linewidth=0)
