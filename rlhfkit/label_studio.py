"""Label Studio: tasks to import there, and the preference pairs in what it exports."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rlhfkit.label_store import Comparison, Side, left_side
from rlhfkit.tasks import Pair

Said = Literal["first", "second", "cancelled", "empty", "other"]

LABEL_STUDIO_CONFIG = """<View>
  <Text name="prompt" value="$prompt"/>
  <Pairwise name="comparison" toName="answer1,answer2"/>
  <Text name="answer1" value="$answer1"/>
  <Text name="answer2" value="$answer2"/>
</View>"""


def to_label_studio(comparisons: Iterable[Comparison], seed: int | None = None) -> list[dict[str, Any]]:
    """Tasks to import into Label Studio, in the form of its template for collecting human preferences.

    Args:
        comparisons: to be judged there, under the labelling interface ``LABEL_STUDIO_CONFIG``.
        seed: of the random sides (:func:`~rlhfkit.label_store.left_side`); with None, ``first`` is always on the left.

    Returns:
        One task each, ready for ``json.dump``: ``{"data": {"prompt": ..., "answer1": ..., "answer2": ...}}``.
    """
    tasks = []
    for comparison in comparisons:
        sides = [comparison.first, comparison.second]
        if seed is not None and left_side(comparison, seed) == "second":
            sides.reverse()
        tasks.append({"data": {"prompt": comparison.prompt, "answer1": sides[0], "answer2": sides[1]}})
    return tasks


@dataclass(frozen=True)
class LabelStudioExport:
    """What an export of Label Studio holds: the pairs, and what was left out of them and why.

    Attributes:
        pairs: one for each annotation with a choice, or, read with ``majority``, for each task with a winner.
        chosen: annotations with a choice.
        cancelled: annotations that were skipped.
        empty: annotations without a result, as when a choice was cleared by a second click.
        other: annotations with results of other types only.
        unannotated: tasks without an annotation.
        disagreements: ids of the tasks in which both sides were chosen.
        ties: ids of the tasks in which both were chosen equally often.
    """

    pairs: list[Pair]
    chosen: int
    cancelled: int
    empty: int
    other: int
    unannotated: int
    disagreements: list[Any]
    ties: list[Any]


def read_label_studio(source: str | os.PathLike[str] | list[Any], majority: bool = False) -> LabelStudioExport:
    """Read the pairs out of an export of Label Studio (format "JSON") made with ``LABEL_STUDIO_CONFIG``.

    ``left`` chooses ``answer1`` and ``right`` ``answer2``, their order in ``toName``.

    Args:
        source: path of the file, or the list of tasks that it holds.
        majority: False gives every annotation its pair, so that annotators who disagree give opposite pairs. True
            gives every task one, chosen by most; a tie gives none.

    Returns:
        The pairs, in the order of tasks and annotations, and the counts of what was left out.

    Raises:
        ValueError: if anything is not of that form, or both answers are the same; names the task's id.
    """
    tasks: Any = source
    if not isinstance(source, list):
        try:
            tasks = json.loads(Path(source).read_bytes().decode("utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"source: {source} is not JSON in UTF-8 ({error})") from error
    if not isinstance(tasks, list):
        raise ValueError(f"source: got a JSON {type(tasks).__name__}, expected a list of tasks")
    pairs: list[Pair] = []
    counts = dict.fromkeys(("chosen", "cancelled", "empty", "other", "unannotated"), 0)
    disagreements, ties = [], []
    for place, task in enumerate(tasks):
        name = task.get("id", f"number {place + 1}") if isinstance(task, dict) else f"number {place + 1}"
        try:
            comparison, annotations = _label_studio_task(task)
            found = [_selected(annotation) for annotation in annotations]
        except ValueError as error:
            raise ValueError(f"task {name}: {error}") from error
        counts["unannotated"] += not found
        sides: list[Side] = []
        for what in found:
            if what == "first" or what == "second":
                sides.append(what)
            else:
                counts[what] += 1
        counts["chosen"] += len(sides)
        votes = sides.count("first") - sides.count("second")
        if len(set(sides)) == 2:
            disagreements.append(name)
            ties += [name] if votes == 0 else []
        if majority:
            sides = ["first" if votes > 0 else "second"] if votes else []
        pairs += [comparison.pair(side) for side in sides]
    return LabelStudioExport(pairs, **counts, disagreements=disagreements, ties=ties)


def _label_studio_task(task: Any) -> tuple[Comparison, list[Any]]:
    if not isinstance(task, dict) or not isinstance(task.get("data"), dict):
        raise ValueError("data: missing, expected an object (export in the format JSON)")
    if not isinstance(task.get("annotations"), list):
        raise ValueError("annotations: missing, expected a list (export in the format JSON)")
    for name in ("prompt", "answer1", "answer2"):
        if not isinstance(task["data"].get(name), str):
            raise ValueError(f"{name}: got {task['data'].get(name)!r}, expected text")
    return Comparison(*(task["data"][name] for name in ("prompt", "answer1", "answer2"))), task["annotations"]


def _selected(annotation: Any) -> Said:
    """What an annotation says: "first", "second", "cancelled", "empty" or "other"."""
    if not isinstance(annotation, dict) or not isinstance(annotation.get("result"), list):
        raise ValueError("result: missing, expected a list of results in every annotation")
    if annotation.get("was_cancelled"):
        return "cancelled"
    if not annotation["result"]:
        return "empty"
    choices: list[Side] = []
    for result in annotation["result"]:
        if not isinstance(result, dict) or not isinstance(result.get("type"), str):
            raise ValueError(f"type: got the result {result!r}, expected one with a type")
        if result["type"] == "pairwise":
            value = result.get("value")
            selected = value.get("selected") if isinstance(value, dict) else None
            if selected not in ("left", "right"):
                raise ValueError(f"selected: got {selected!r}, expected 'left' or 'right'")
            choices.append("first" if selected == "left" else "second")
    if len(choices) > 1:
        raise ValueError(f"result: got {len(choices)} pairwise choices in one annotation, expected one")
    return choices[0] if choices else "other"
