"""Label Studio's tasks and exports: what annotators did, what they left out, and what is no export at all."""

import copy
import json
import tempfile
from pathlib import Path

from planting import edited, raises
from rlhfkit.label_store import Comparison
from rlhfkit.label_studio import LABEL_STUDIO_CONFIG, LabelStudioExport, read_label_studio, to_label_studio
from rlhfkit.tasks import Pair

DATA = {"prompt": "p", "answer1": "a", "answer2": "b"}
A, B = Pair("p", "a", "b"), Pair("p", "b", "a")


def result(selected, **more):
    return {
        "from_name": "comparison",
        "to_name": "comparison",
        "type": "pairwise",
        "value": {"selected": selected},
    } | more


def annotation(*results, cancelled=False):
    return {"id": 1, "completed_by": 1, "was_cancelled": cancelled, "result": list(results)}


def task(*annotations, id=1, **data):
    return {"id": id, "data": DATA | data, "annotations": list(annotations)}


NOTE = {"from_name": "why", "to_name": "prompt", "type": "textarea", "value": {"text": ["shorter"]}}
LEFT, RIGHT, SKIPPED, EMPTY = (
    annotation(result("left")),
    annotation(result("right")),
    annotation(result("left"), cancelled=True),
    annotation(),
)


def test_left_is_the_first_answer_and_right_the_second(read_label_studio=read_label_studio):
    assert read_label_studio([task(LEFT)]).pairs == [A]
    assert read_label_studio([task(RIGHT)]).pairs == [B]
    for name in ("answer1,answer2", "answer2", ["x"]):  # the control's own name by its source, anything elsewhere
        assert read_label_studio([task(annotation(result("left", to_name=name)))]).pairs == [A]


def test_every_annotation_is_a_pair_and_everything_left_out_is_counted(read_label_studio=read_label_studio):
    tasks = [
        task(LEFT, RIGHT, LEFT, id=7),
        task(SKIPPED, id=8),
        task(EMPTY, RIGHT, id=9),
        task(annotation(NOTE), annotation(NOTE, result("left")), id=10),
        task(id=11),
        task(LEFT, RIGHT, id=12),
    ]
    before = copy.deepcopy(tasks)
    export = read_label_studio(tasks)
    assert export.pairs == [A, B, A, B, A, A, B]
    assert (export.chosen, export.cancelled, export.empty, export.other, export.unannotated) == (7, 1, 1, 1, 1)
    assert (export.disagreements, export.ties) == ([7, 12], [12])
    assert tasks == before
    by_vote = read_label_studio(tasks, majority=True)
    assert by_vote.pairs == [A, B, A]
    assert (by_vote.chosen, by_vote.disagreements, by_vote.ties) == (7, [7, 12], [12])


def test_a_minority_loses_and_a_skip_does_not_vote(read_label_studio=read_label_studio):
    assert read_label_studio([task(RIGHT, LEFT, RIGHT)], majority=True).pairs == [B]
    assert read_label_studio([task(RIGHT, SKIPPED, SKIPPED, EMPTY)], majority=True).pairs == [B]
    assert read_label_studio([task(SKIPPED, EMPTY)], majority=True).pairs == []


def test_a_file_is_read_like_its_list(read_label_studio=read_label_studio):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "export.json"
        for mark in (b"", b"\xef\xbb\xbf"):
            path.write_bytes(mark + json.dumps([task(RIGHT, prompt="Größe")], ensure_ascii=False).encode())
            assert read_label_studio(path).pairs == [Pair("Größe", "b", "a")]
        for content, word in ((b"[{", "JSON"), (b"\xff", "UTF-8"), (b"{}", "list of tasks")):
            path.write_bytes(content)
            raises(ValueError, lambda: read_label_studio(path), "source", word)
    assert read_label_studio([]).pairs == []


BAD = {
    "neither side": (task(annotation(result("both")), id=42), "selected"),
    "a side in other letters": (task(annotation(result("Left")), id=42), "selected"),
    "nothing selected": (task(annotation(result(None)), id=42), "selected"),
    "no value": (task(annotation({"type": "pairwise"}), id=42), "selected"),
    "two choices": (task(annotation(result("left"), result("left")), id=42), "2 pairwise"),
    "no type": (task(annotation({"value": {"selected": "left"}}), id=42), "type"),
    "no result": (task({"id": 1}, id=42), "result"),
    "annotation is no object": (task("left", id=42), "result"),
    "no annotations": ({"id": 42, "data": DATA}, "annotations"),
    "no data": ({"id": 42, **DATA, "annotations": [LEFT]}, "data"),
    "no answer": (task(LEFT, id=42, answer2=None), "answer2"),
    "answers are the same": (task(LEFT, id=42, answer2="a"), "first, second"),
}


def test_anything_else_is_an_error_that_names_the_task(read_label_studio=read_label_studio):
    for bad, word in BAD.values():
        raises(ValueError, lambda b=bad: read_label_studio([task(LEFT), b]), "task 42", word)
    raises(ValueError, lambda: read_label_studio([task(LEFT), "left"]), "task number 2", "data")


def test_tasks_have_the_names_that_the_interface_shows(to_label_studio=to_label_studio):
    made = to_label_studio([Comparison("p", "a", "b"), Comparison("q", "c", "d")])
    assert made == [{"data": DATA}, {"data": {"prompt": "q", "answer1": "c", "answer2": "d"}}]
    assert to_label_studio([]) == []
    for name in DATA:
        assert f'name="{name}" value="${name}"' in LABEL_STUDIO_CONFIG
    assert 'toName="answer1,answer2"' in LABEL_STUDIO_CONFIG


def test_shuffled_sides_depend_on_the_seed_and_the_choice_comes_back_right(to_label_studio=to_label_studio):
    """An annotator who likes the response "good" gives it in every pair, wherever it was shown."""
    comparisons = [Comparison(f"p{i}", "good", "bad") for i in range(64)]
    shown = [to_label_studio(comparisons, seed) for seed in (1, 1, 2, None)]
    assert shown[0] == shown[1] != shown[2]
    assert {t["data"]["answer1"] for t in shown[0]} == {"good", "bad"}
    assert {t["data"]["answer1"] for t in shown[3]} == {"good"}
    exported = [
        t | {"id": i, "annotations": [LEFT if t["data"]["answer1"] == "good" else RIGHT]}
        for i, t in enumerate(shown[0])
    ]
    assert read_label_studio(exported).pairs == [c.pair("first") for c in comparisons]


def _read(*changes):
    return edited(read_label_studio, *changes)


def _first_result_only(source, majority=False):
    """What converters seen elsewhere do: result[0], and everything that is not left is right."""
    pairs = []
    for t in source:
        for a in t["annotations"]:
            if a["result"]:
                left = a["result"][0]["value"].get("selected") == "left"
                pairs.append(Comparison(*t["data"].values()).pair("first" if left else "second"))
    return LabelStudioExport(pairs, len(pairs), 0, 0, 0, 0, [], [])


PLANTED = {
    "read_label_studio": {
        "the first result, and not left is right": _first_result_only,
        "sides swapped": _read(("comparison.pair(side)", "comparison.pair('second' if side == 'first' else 'first')")),
        "one annotation a task": _read(("for annotation in annotations]", "for annotation in annotations[:1]]")),
        "the majority loses": _read(('"first" if votes > 0', '"first" if votes < 0')),
        "a tie is won by the second": _read(("if votes else []", "")),
        "majority ignored": _read(("if majority:", "if False:")),
        "disagreement only where it is a tie": _read(("if len(set(sides)) == 2:", "if sides and not votes:")),
        "left out but not counted": _read(("counts[what] += 1", "pass")),
        "unannotated not counted": _read(('counts["unannotated"] += not found', "pass")),
        "chosen counts tasks": _read(('counts["chosen"] += len(sides)', 'counts["chosen"] += bool(sides)')),
        "the task is not named": _read(('raise ValueError(f"task {name}: {error}") from error', "raise")),
        "tasks counted from 0": _read(
            ('isinstance(task, dict) else f"number {place + 1}"', 'isinstance(task, dict) else f"number {place}"')
        ),
        "bad tasks passed over": _read(('raise ValueError(f"task {name}: {error}") from error', "continue")),
    },
    "to_label_studio": {
        "bare tasks": lambda comparisons, seed=None: [t["data"] for t in to_label_studio(comparisons, seed)],
        "always shuffled": lambda comparisons, seed=None: to_label_studio(comparisons, seed or 0),
        "never shuffled": lambda comparisons, seed=None: to_label_studio(comparisons),
        "answers swapped": edited(
            to_label_studio, ('"answer1": sides[0], "answer2": sides[1]', '"answer1": sides[1], "answer2": sides[0]')
        ),
        "prompts shuffled too": edited(
            to_label_studio, ("sides.reverse()", "sides.reverse(); comparison = comparisons[0]")
        ),
    },
}
EXEMPT = {"LabelStudioExport"}
