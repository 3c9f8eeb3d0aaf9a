"""Precomputed frames behind a slider: a figure that moves with a kernel, without one, and stands still in print."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as w
from matplotlib.figure import Figure

from rlhfkit.display import encode_png


class Frames(w.VBox):
    """A slider and a play button over precomputed frames, linked in the browser.

    Drawn as a widget in JupyterLab and in the static book (no kernel), as ``image/png`` where widgets are unknown,
    and as lines of text, one per frame, that nbval compares.
    """

    def __init__(
        self, pngs: list[tuple[bytes, int]], labels: list[str], captions: list[str], name: str, title: str, start: int
    ) -> None:
        self._pngs, self._labels, self._captions = pngs, labels, captions
        self._name, self._title, self._start = name, title, start
        images = [
            w.HTML(
                f'<figure style="margin:0"><img width="{width}" style="max-width:100%;height:auto" '
                f'alt="{html.escape(f"{title} {name} {label}: {caption}", quote=True)}" '
                f'src="data:image/png;base64,{base64.b64encode(png).decode()}">'
                f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            )
            for (png, width), label, caption in zip(pngs, labels, captions, strict=True)
        ]
        stack = w.Stack(images, selected_index=start)
        options = [(text, i) for i, text in enumerate(labels)]
        slider = w.SelectionSlider(options=options, index=start, description=name, layout=w.Layout(width="60%"))
        play = w.Play(min=0, max=len(pngs) - 1, value=start, interval=500)
        w.jslink((slider, "index"), (stack, "selected_index"))
        w.jslink((play, "value"), (slider, "index"))
        super().__init__([w.HBox([play, slider]), stack])

    def __repr__(self) -> str:
        head = f"{self._title} Slider {self._name}: {self._labels[0]} to {self._labels[-1]}."
        lines = [f"  {label}: {caption}" for label, caption in zip(self._labels, self._captions, strict=True)]
        return "\n".join([head, *lines])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> Any:
        data = super()._repr_mimebundle_(include=include, exclude=exclude)
        data, metadata = data if isinstance(data, tuple) else (data, {})
        png, width = self._pngs[self._start]
        data |= {"text/plain": repr(self), "image/png": base64.b64encode(png).decode()}
        return data, {**metadata, "image/png": {"width": width}}


def frames(
    draw: Callable[[Any], Figure],
    values: Sequence[Any],
    *,
    name: str,
    title: str,
    caption: Callable[[Any], str],
    label: Callable[[Any], str] = str,
    start: int = 0,
) -> Frames:
    """Draw one figure per value and put them behind a slider that needs no kernel.

    Args:
        draw: makes the figure of one value, a fresh ``matplotlib.figure.Figure``.
        values: what the slider steps through, at most about 30.
        name: text left of the slider.
        title: one sentence that says what the figure shows, for readers who do not see it.
        caption: a line under the frame with its rounded numbers; nbval compares these lines.
        label: how a value is written on the slider.
        start: index of the first frame shown, which is also the still image.

    Returns:
        The widget.

    Raises:
        ValueError: if there is no value, or ``start`` is not the index of one.
    """
    values = list(values)
    if not 0 <= start < len(values):
        raise ValueError(f"start: got {start} with {len(values)} values, expected the index of one of them")
    pngs = [encode_png(draw(value)) for value in values]
    return Frames(pngs, [label(v) for v in values], [caption(v) for v in values], name, title, start)
