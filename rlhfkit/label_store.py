"""Comparisons to be judged and the file of judgements: one line each, on disk before the next is asked for."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from rlhfkit.journal import Journal
from rlhfkit.tasks import Comparison, Pair, Side

Choice = Literal["first", "second", "skip"]


@dataclass(frozen=True)
class Label:
    """One decision about one comparison.

    Attributes:
        id: of the comparison.
        choice: "first", "second" (of the comparison, wherever shown) or "skip".
        left: which response was shown on the left, "first" or "second".
        seconds: between showing and choosing, or None.
        annotator: who chose.
        time: when, ISO 8601 in UTC.
    """

    id: str
    choice: Choice
    left: Side
    seconds: float | None
    annotator: str
    time: str


def left_side(comparison: Comparison, seed: int) -> Side:
    """Which response of a comparison is shown on the left: a fair coin fixed by the seed and the comparison.

    People tend to prefer one position; a random one makes that tendency noise in place of a bias towards ``first``.

    Args:
        comparison: what is shown.
        seed: any integer; another seed tosses all coins again.

    Returns:
        "first" or "second".
    """
    toss = hashlib.sha256(f"{seed} {comparison.id}".encode()).digest()
    return "first" if toss[0] % 2 == 0 else "second"


class LabelStore:
    """The decisions of a file to which lines are only ever added, safe against a kill at any moment.

    A decision is one line of JSON, handed to the disk (``fsync``) before :meth:`record` returns. Undoing is a further
    line. What a kill left of an unfinished line is moved to the file with ``.torn`` added to its name when the store
    is next opened. While a store is open, the file with ``.lock`` added keeps other processes out and names this one.

    Attributes:
        annotator: whose decisions :meth:`record` adds and :meth:`undo` takes back.
    """

    def __init__(self, path: str | os.PathLike[str], annotator: str = "anonymous") -> None:
        """Open or create the file and read what it holds.

        Args:
            path: of the file; its folder must exist.
            annotator: name entered with every decision.

        Raises:
            BlockingIOError: if a store is open on the file, in this process or another; names file and process.
            ValueError: if a finished line is no decision; names file, line and field.
        """
        self.annotator = annotator
        self._labels: dict[tuple[str, str], Label] = {}  # by comparison and annotator, oldest first
        self._journal = Journal(path, self._apply)

    @property
    def path(self) -> Path:
        """Of the file of decisions."""
        return self._journal.path

    def __enter__(self) -> LabelStore:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def labels(self) -> list[Label]:
        """The decisions in force, of all annotators, oldest first; undone ones are left out."""
        return list(self._labels.values())

    def find(self, comparison: Comparison) -> Label | None:
        """This annotator's decision about a comparison -> Label, or None."""
        return self._labels.get((comparison.id, self.annotator))

    def last(self) -> Label | None:
        """This annotator's latest decision in force, which :meth:`undo` would take back -> Label, or None."""
        return next((label for label in reversed(self.labels) if label.annotator == self.annotator), None)

    def record(
        self, comparison: Comparison, choice: Choice, left: Side = "first", seconds: float | None = None
    ) -> Label:
        """Add a decision; when this returns, it is on disk.

        Args:
            comparison: what was judged.
            choice: "first", "second" or "skip".
            left: the response shown on the left.
            seconds: taken to decide.

        Returns:
            The decision as written.

        Raises:
            ValueError: if this annotator has decided it before, or an argument is none of those values.
            OSError: if it cannot be written, e.g. on a full disk: no trace of it stays, all earlier ones do.
        """
        if self.find(comparison) is not None:
            raise ValueError(f"comparison: {comparison.id} has a label by {self.annotator!r}; expected undo() first")
        seconds = None if seconds is None else round(seconds, 3)
        label = Label(comparison.id, choice, left, seconds, self.annotator, _now())
        self._append(asdict(label))
        return label

    def undo(self) -> Label:
        """Take back this annotator's latest decision, by a further line.

        Returns:
            The decision that is no longer in force.

        Raises:
            ValueError: if there is none.
            OSError: if it cannot be written; then nothing has changed.
        """
        label = self.last()
        if label is None:
            raise ValueError(f"undo: {self.path} has no label by {self.annotator!r}; expected at least one")
        self._append({"undo": label.id, "annotator": self.annotator, "time": _now()})
        return label

    def pairs(self, comparisons: Iterable[Comparison], annotator: str | None = None) -> list[Pair]:
        """The chosen and rejected responses, in the order of the comparisons; skipped and undecided ones give none.

        Args:
            comparisons: those that were labelled; one listed twice counts once.
            annotator: whose choices; None takes everybody's.

        Returns:
            One pair for each comparison and annotator who chose.
        """
        by_id: dict[str, list[Label]] = {}
        for label in self.labels:
            if annotator is None or label.annotator == annotator:
                by_id.setdefault(label.id, []).append(label)
        distinct = {comparison.id: comparison for comparison in comparisons}
        chosen = ((distinct[i], label.choice) for i in distinct for label in by_id.get(i, []))
        return [comparison.pair(choice) for comparison, choice in chosen if choice != "skip"]

    def close(self) -> None:
        """Release the file; a closed store takes no more decisions. Closing twice does no harm."""
        self._journal.close()

    def _append(self, record: dict[str, Any]) -> None:
        line = json.dumps(_checked(record)).encode()
        try:
            self._journal.append(line)
        except OSError as error:
            text = f"label not saved ({error.strerror}); the {len(self)} before it are. Make room and choose again"
            raise OSError(error.errno, text, str(self.path)) from error
        self._apply(line)

    def _apply(self, line: bytes) -> None:
        record = _checked(json.loads(line))
        if "undo" in record:
            key = record["undo"], record["annotator"]
            if self._labels.pop(key, None) is None:
                raise ValueError(f"undo: {key[0]} has no label by {key[1]!r} to undo")
            return
        label = Label(**record)
        if (label.id, label.annotator) in self._labels:
            raise ValueError(f"id: {label.id} has a label by {label.annotator!r} already")
        self._labels[label.id, label.annotator] = label


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _checked(record: Any) -> dict[str, Any]:
    """The record, if its fields are those of a decision or of an undo; else a ValueError that names the field."""
    if not isinstance(record, dict):
        raise ValueError(f"got {type(record).__name__}, expected an object")
    expected = {"undo", "annotator", "time"} if "undo" in record else set(Label.__dataclass_fields__)
    if record.keys() != expected:
        raise ValueError(f"fields: got {sorted(record)}, expected {sorted(expected)}")
    for name in record.keys() - {"seconds"}:
        if not isinstance(record[name], str):
            raise ValueError(f"{name}: got {record[name]!r}, expected text")
    for name, allowed in (("choice", ("first", "second", "skip")), ("left", ("first", "second"))):
        if name in record and record[name] not in allowed:
            raise ValueError(f"{name}: got {record[name]!r}, expected one of {allowed}")
    seconds = record.get("seconds")
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool) and math.isfinite(seconds)
    if seconds is not None and not (number and seconds >= 0):
        raise ValueError(f"seconds: got {seconds!r}, expected a number of at least 0, or None")
    return record
