"""A widget to compare responses by hand: one decision a click or key, on disk before the next pair is shown."""

from __future__ import annotations

import html
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import ipywidgets as w

from rlhfkit.label_store import Choice, Comparison, Label, LabelStore, Side, left_side
from rlhfkit.preferences import judge_agreement
from rlhfkit.tasks import Pair

KEYS = {"1": "left", "2": "right", "s": "skip", "u": "undo"}
BUTTONS = {"left": "Left is better (1)", "right": "Right is better (2)", "skip": "Skip (s)", "undo": "Undo (u)"}
HELP = "Answer with the buttons, or in the field Keys: 1 left, 2 right, s skip, u undo."
STILL = "This is a still; run the cell in JupyterLab to label."
KEY_PAUSE = 0.2  # seconds; keys that follow sooner come from a key held down
_open: dict[Path, Labeller] = {}


class Labeller:
    """Comparisons, the file of decisions about them, and a widget that shows one after the other.

    In JupyterLab it is a widget. Where there is none, and wherever the environment variable ``RLHFKIT_STILL`` is set
    (as when the book's notebooks are run), it is a still: the pair that waits, or the result.
    """

    def __init__(
        self,
        comparisons: Sequence[Comparison],
        store: LabelStore,
        judge: Callable[[str, str], float] | None = None,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """See :func:`label_pairs`; ``store`` is open and ``clock`` counts seconds."""
        self.comparisons = list({comparison.id: comparison for comparison in comparisons}.values())
        if not self.comparisons:
            raise ValueError("comparisons: got none, expected at least one")
        self.store, self.judge, self.seed = store, judge, seed
        self._clock, self._shown, self._last_key = clock, clock(), -math.inf
        self._view: w.VBox | None = None

    @property
    def current(self) -> Comparison | None:
        """The first comparison that is not decided -> Comparison, or None at the end."""
        return next((c for c in self.comparisons if self.store.find(c) is None), None)

    @property
    def pairs(self) -> list[Pair]:
        """What this annotator chose so far, in the order of the comparisons."""
        return self.store.pairs(self.comparisons, self.store.annotator)

    def choose(self, what: Literal["left", "right", "skip"]) -> Label:
        """Decide the current comparison.

        Args:
            what: "left" or "right", the side that is better, or "skip".

        Returns:
            The decision, on disk.

        Raises:
            ValueError: if all are decided, or ``what`` is something else.
            OSError: if it cannot be saved; the comparison stays the current one.
        """
        comparison = self.current
        if comparison is None:
            raise ValueError(f"choose: got {what!r} with all {len(self.comparisons)} comparisons decided")
        if what not in ("left", "right", "skip"):
            raise ValueError(f"what: got {what!r}, expected 'left', 'right' or 'skip'")
        left = left_side(comparison, self.seed)
        right: Side = "second" if left == "first" else "first"
        choices: dict[str, Choice] = {"left": left, "right": right, "skip": "skip"}
        label = self.store.record(comparison, choices[what], left, self._clock() - self._shown)
        self._shown = self._clock()
        return label

    def undo(self) -> Label:
        """Take back the latest decision, whose comparison is shown again.

        Returns:
            The decision that is no longer in force.

        Raises:
            ValueError: if there is none about these comparisons.
            OSError: if that cannot be saved; then nothing has changed.
        """
        if not self._can_undo():
            raise ValueError("undo: got no decision about these comparisons, expected at least one")
        label = self.store.undo()
        self._shown = self._clock()
        return label

    def close(self) -> None:
        """Release the file; buttons and keys stop working."""
        self.store.close()
        if self._view is not None:
            for control in (*self.buttons.values(), self.keys):
                control.disabled = True
            self._say("Closed. Run the cell again to go on where you stopped.")

    def _can_undo(self) -> bool:
        last = self.store.last()
        return last is not None and last.id in {comparison.id for comparison in self.comparisons}

    # -- words and pictures ------------------------------------------------------------------------------------------

    def _counts(self) -> tuple[int, int, int]:
        """Number of comparisons with a choice, skipped, and left."""
        labels = [self.store.find(comparison) for comparison in self.comparisons]
        skipped = sum(label is not None and label.choice == "skip" for label in labels)
        return len(labels) - labels.count(None) - skipped, skipped, labels.count(None)

    def _summary(self) -> str:
        chosen, skipped, left = self._counts()
        return f"{len(self.comparisons)} comparisons: {chosen} chosen, {skipped} skipped, {left} left."

    def _result(self) -> str:
        """What is said at the end."""
        if self.judge is None or not self.pairs:
            return "All decided."
        return f"All decided. Agreement with the gold judge: {judge_agreement(self.pairs, self.judge)}."

    def _texts(self) -> list[tuple[str, str]]:
        """Prompt, left and right response of the current comparison, by name; none at the end."""
        comparison = self.current
        if comparison is None:
            return []
        sides = [("Left", comparison.first), ("Right", comparison.second)]
        if left_side(comparison, self.seed) == "second":
            sides = [("Left", comparison.second), ("Right", comparison.first)]
        return [("Prompt", comparison.prompt), *sides]

    def _picture(self) -> str:
        """HTML of the current comparison, or of the result; what a text contains is shown, never obeyed."""
        # mathjax_ignore: a price in dollars is no formula
        box = (
            "flex:1 1 14em;border:1px solid;border-radius:4px;padding:.5em;white-space:pre-wrap;overflow-wrap:anywhere"
        )
        parts = [
            f'<div style="{box}"><strong>{name}</strong><br>{html.escape(text)}</div>' for name, text in self._texts()
        ]
        if not parts:
            return f"<p>{html.escape(self._result())}</p>"
        prompt, *responses = parts
        sides = f'<div style="display:flex;flex-wrap:wrap;gap:.5em;margin-top:.5em">{"".join(responses)}</div>'
        return f'<div class="mathjax_ignore tex2jax_ignore" style="line-height:1.4">{prompt}{sides}</div>'

    def __repr__(self) -> str:
        head = f"{self._summary()} File: {self.store.path.name}"
        lines = [f"{name}: {text}" for name, text in self._texts()]
        return "\n".join([head, *lines, HELP] if lines else [head, self._result()])

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        note = f"{self._summary()} {STILL if self.current else ''}"
        still = f'<div class="labelling">{self._picture()}<p>{html.escape(note.strip())}</p></div>'
        data: dict[str, Any] = {"text/plain": repr(self), "text/html": still}
        if not os.environ.get("RLHFKIT_STILL"):
            shown = self.view._repr_mimebundle_()
            data = {**(shown[0] if isinstance(shown, tuple) else shown), **data}
        return data

    # -- the widget --------------------------------------------------------------------------------------------------

    @property
    def view(self) -> w.VBox:
        """The widget, made when first asked for, with the attributes ``buttons`` (by name) and ``keys`` beside it."""
        if self._view is None:
            self.buttons = {
                name: w.Button(description=text, layout=w.Layout(width="auto")) for name, text in BUTTONS.items()
            }
            for name, button in self.buttons.items():
                button.on_click(lambda _, name=name: self._act(name))
            self.keys = w.Text(description="Keys", placeholder="1, 2, s or u", layout=w.Layout(width="16em"))
            self.keys.observe(self._on_keys, "value")
            self._progress, self._pair, self._status = w.HTML(), w.HTML(), w.HTML()
            row = w.HBox([*self.buttons.values(), self.keys], layout=w.Layout(flex_flow="row wrap"))
            self._view = w.VBox([self._progress, self._pair, row, self._status])
            self._shown = self._clock()
            self._draw(HELP)
        return self._view

    def _draw(self, message: str) -> None:
        chosen, skipped, left = self._counts()
        done, n = chosen + skipped, chosen + skipped + left
        bar = f'<progress max="{n}" value="{done}" style="width:100%"></progress>'
        self._progress.value = f"<label>{html.escape(self._summary())} {bar}</label>"
        self._pair.value = self._picture()
        for name, button in self.buttons.items():
            button.disabled = not self._can_undo() if name == "undo" else not left
        self._say(message if left else f"The labels are in {self.store.path.resolve()}")

    def _say(self, message: str, alarm: bool = False) -> None:
        role, sign = ("alert", "⚠ ") if alarm else ("status", "")
        self._status.value = f'<div role="{role}">{sign}{html.escape(message)}</div>'

    def _act(self, name: str) -> None:
        """What a button does. An error is shown, since one raised here would be seen by nobody."""
        try:
            if name == "undo":
                self._draw(f"Taken back: {self.undo().choice}.")
            else:
                label = self.choose(name)  # type: ignore[arg-type]
                self._draw(
                    f"Saved after {label.seconds:.1f} s: {'skipped' if name == 'skip' else f'{name} is better'}."
                )
        except Exception as error:
            self._say((isinstance(error, OSError) and error.strerror) or str(error), alarm=True)

    def _on_keys(self, change: dict[str, Any]) -> None:
        """Act on the characters typed since the last message; clearing the field would race with the typist."""
        old, new = change["old"], change["new"]
        for key in new[len(old) :].lower() if new.startswith(old) else "":
            now, before = self._clock(), self._last_key
            self._last_key = now
            if key not in KEYS:
                self._say(f"The key {key!r} does nothing. {HELP}", alarm=True)
            elif now - before >= KEY_PAUSE:
                self._act(KEYS[key])


def label_pairs(
    comparisons: Sequence[Comparison],
    path: str | os.PathLike[str],
    judge: Callable[[str, str], float] | None = None,
    *,
    annotator: str = "anonymous",
    seed: int = 0,
) -> Labeller:
    """Compare responses by hand; as the value of a cell it is the widget. Run again, it goes on where it stopped.

    Args:
        comparisons: to be decided, in this order; one listed twice is asked once.
        path: of the file of decisions (:class:`~rlhfkit.label_store.LabelStore`), made if it does not exist.
        judge: (prompt, response) -> number; the agreement with it is shown at the end.
        annotator: name entered with every decision; everyone is asked everything.
        seed: of the sides on which the responses are shown.

    Returns:
        The labeller; ``labeller.pairs`` are the choices so far.

    Raises:
        BlockingIOError: if the file is open in another notebook. One open in this notebook is taken over.
        ValueError: if there is no comparison, or the file is no label file; names the line.
    """
    place = Path(path).resolve()
    if place in _open:
        _open.pop(place).close()
    store = LabelStore(path, annotator)
    try:
        _open[place] = labeller = Labeller(comparisons, store, judge, seed)
    except BaseException:
        store.close()
        raise
    return labeller
