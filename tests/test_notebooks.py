"""The stored outputs of the pages: nothing escapes the comparison that nbval makes, and the comparison is alive.

`make test` runs each page under nbval, which compares what a cell gives with what is stored. nbval lets some things
through: cells that were never run, pictures, tracebacks, widget state. The function ``faults`` looks for these.
"""

import ast
import copy
import html
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "index.ipynb", *sorted((ROOT / "chapters").glob("*.ipynb"))]
HOMEWORK = sorted((ROOT / "homework").rglob("*.ipynb"))

WIDGET, STATE = "application/vnd.jupyter.widget-view+json", "application/vnd.jupyter.widget-state+json"
CLAIM, RECORD = "application/vnd.rlhfkit.claim+json", "application/papermill.record/text/plain"
COMPARED = {"text/plain", "text/html", "text/markdown", "text/latex", CLAIM, RECORD}
PICTURES = {"image/png"}  # nbval ignores these and widget views; both must come with text, which it compares
OUTPUT_METADATA = {"image/png", "scrapbook"}  # ignored by nbval: the width of a picture, the name of a quoted value
MARKERS = re.compile(r"nbval[-_](skip|ignore[-_]output|check[-_]output)|pytest_validate_ignore_output", re.IGNORECASE)
PLACE = re.compile(r"\b0x[0-9a-f]{6,}|(?<![\w.:/])/(?:home|root|tmp|work|usr|Users|opt|var)/")

Notebook = dict[str, Any]


def read(path: Path) -> Notebook:
    return json.loads(path.read_text(encoding="utf-8"))


def text(value: str | list[str]) -> str:
    """Sources and outputs are stored as text or as a list of lines."""
    return value if isinstance(value, str) else "".join(value)


def code_cells(nb: Notebook) -> list[dict[str, Any]]:
    return [cell for cell in nb["cells"] if cell["cell_type"] == "code"]


def cell_faults(cell: dict[str, Any]) -> list[str]:
    """What in a cell's source or tags would keep its output from being compared."""
    found = []
    source, tags = text(cell["source"]), cell["metadata"].get("tags", [])
    if MARKERS.search(source) or any(MARKERS.search(tag) for tag in tags):
        found.append("a marker switches the comparison off")
    if source.rstrip().endswith(";"):  # nbval (its issue 194) does not see it and finds an output too many
        found.append("a trailing semicolon hides the value")
    try:
        ast.parse(source)
    except SyntaxError:
        found.append("not plain Python")
    return found


def output_faults(cell: dict[str, Any], out: dict[str, Any]) -> list[str]:
    """What in one output nbval would not compare, or what other machines would print differently."""
    found = []
    kind, tags = out["output_type"], cell["metadata"].get("tags", [])
    if kind == "stream":
        if out["name"] != "stdout":
            found.append(f"{out['name']} is stored")
        if "\r" in text(out["text"]) or "\b" in text(out["text"]):
            found.append("a carriage return or backspace hides text")
    elif kind == "error":
        if "raises-exception" not in tags:
            found.append("an error is stored and the cell is not tagged raises-exception")
        if out["traceback"] != [f"{out['ename']}: {out['evalue']}"]:
            found.append("the traceback, which is not compared, says more than the error")
    else:
        kinds = set(out["data"])
        if kinds - COMPARED - PICTURES - {WIDGET}:
            found.append(f"output of a kind that no test covers: {sorted(kinds - COMPARED - PICTURES - {WIDGET})}")
        if not kinds & COMPARED:
            found.append("a picture or widget without text")
        if set(out["metadata"]) - OUTPUT_METADATA:
            found.append(f"output metadata: {sorted(set(out['metadata']) - OUTPUT_METADATA)}")
        if kind == "execute_result" and out["execution_count"] != cell["execution_count"]:
            found.append("an output belongs to another run")
        if kinds & PICTURES and WIDGET not in kinds:
            style = cell["metadata"].get("mystnb", {})
            if not style.get("figure", {}).get("caption", "").strip():
                found.append("a figure without caption")
            if not style.get("image", {}).get("alt", "").strip():
                found.append("a figure without text alternative")
    data = {key: value for key, value in out.get("data", {}).items() if key not in PICTURES}
    if PLACE.search(text(out.get("text", ""))) or PLACE.search(json.dumps(data)) or PLACE.search(out.get("evalue", "")):
        found.append("an output names an address in memory or a folder of this machine")
    return found


def widget_faults(nb: Notebook) -> list[str]:
    """Where the stored state of a slider, which nbval does not see, says other things than its text, which it does."""
    models = nb["metadata"].get("widgets", {}).get(STATE, {}).get("state", {})

    def of(ref: str) -> dict[str, Any]:
        return models[ref.removeprefix("IPY_MODEL_")]["state"]

    found, seen = [], 0
    for cell in code_cells(nb):
        for out in cell["outputs"]:
            if WIDGET not in out.get("data", {}):
                continue
            box = models.get(out["data"][WIDGET]["model_id"])
            if box is None:
                found.append("a widget without state")
                continue
            controls, stack = map(of, box["state"]["children"])
            slider = next(s for s in map(of, controls["children"]) if "_options_labels" in s)
            values = [of(ref)["value"] for ref in stack["children"]]
            seen += len(values)
            captions = [html.unescape(re.search("<figcaption>(.*?)</figcaption>", v, re.S)[1]) for v in values]
            alts = [html.unescape(re.search('alt="(.*?)"', v, re.S)[1]) for v in values]
            name, labels = slider["description"], slider["_options_labels"]
            lines = text(out["data"]["text/plain"]).split("\n")
            title = lines[0].removesuffix(f" Slider {name}: {labels[0]} to {labels[-1]}.")
            if lines[1:] != [f"  {label}: {caption}" for label, caption in zip(labels, captions, strict=True)]:
                found.append("captions or labels of a slider differ from its text")
            if title == lines[0] or alts != [f"{title} {name} {line[2:]}" for line in lines[1:]]:
                found.append("text alternatives of a slider differ from its text")
            still = text(out["data"]["image/png"]).strip()
            if f"data:image/png;base64,{still}" not in values[stack["selected_index"]]:
                found.append("the still picture of a slider is not its first frame")
    stored = sum("<figcaption>" in str(model["state"].get("value", "")) for model in models.values())
    if stored != seen:
        found.append(f"{stored} frames are stored and {seen} are shown")
    return found


def faults(nb: Notebook) -> list[str]:
    """All that nbval would let through; empty for a page as it should be."""
    cells = code_cells(nb)
    found = []
    if [cell["execution_count"] for cell in cells] != list(range(1, len(cells) + 1)):
        found.append("cells not run, or not in order")  # nbval passes a cell without count, whatever it prints
    if nb["metadata"].get("kernelspec", {}).get("name") != "python3":
        found.append("kernel is not python3")
    if set(nb["metadata"]) - {"kernelspec", "language_info", "widgets"}:
        found.append("metadata of one machine: run make refresh")
    for cell in cells:
        found += cell_faults(cell)
        for out in cell["outputs"]:
            found += output_faults(cell, out)
    return found + widget_faults(nb)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_no_output_of_a_page_escapes_the_comparison(path: Path) -> None:
    nb = read(path)
    assert code_cells(nb)
    assert faults(nb) == []


@pytest.mark.parametrize("path", HOMEWORK, ids=lambda path: "/".join(path.parts[-2:]))
def test_homework_is_committed_unexecuted(path: Path) -> None:
    for cell in code_cells(read(path)):
        assert cell["execution_count"] is None
        assert cell["outputs"] == []


def sample() -> Notebook:
    """A small page with one output of each sort, as a kernel would store it."""
    png, box = "QUJD", "0" * 32
    ids = [f"{i:032x}" for i in range(1, 6)]

    def frame(x: int) -> str:
        img = f'<img alt="A line. beta {x}: slope {x}" src="data:image/png;base64,{png}">'
        return f"<figure>{img}<figcaption>slope {x}</figcaption></figure>"

    states: list[dict[str, Any]] = [
        {"children": [f"IPY_MODEL_{ids[0]}", f"IPY_MODEL_{ids[1]}"]},
        {"children": [f"IPY_MODEL_{ids[2]}"]},
        {"children": [f"IPY_MODEL_{ids[3]}", f"IPY_MODEL_{ids[4]}"], "selected_index": 0},
        {"_options_labels": ["1", "2"], "description": "beta"},
        {"value": frame(1)},
        {"value": frame(2)},
    ]
    plain = "A line. Slider beta: 1 to 2.\n  1: slope 1\n  2: slope 2"
    widget = {WIDGET: {"model_id": box}, "text/plain": plain, "image/png": png}
    figure = {"mystnb": {"figure": {"name": "fig-x", "caption": "A line."}, "image": {"alt": "A line rises."}}}
    outputs: list[tuple[str, dict[str, Any], list[dict[str, Any]]]] = [
        ("print(1.5)", {}, [{"output_type": "stream", "name": "stdout", "text": "1.5\n"}]),
        (
            "2",
            {},
            [{"output_type": "execute_result", "execution_count": 2, "metadata": {}, "data": {"text/plain": "2"}}],
        ),
        (
            "fig",
            figure,
            [{"output_type": "display_data", "metadata": {}, "data": {"text/plain": "<Figure>", "image/png": png}}],
        ),
        ("frames()", {}, [{"output_type": "display_data", "metadata": {}, "data": widget}]),
        (
            "raise ValueError(3)",
            {"tags": ["raises-exception"]},
            [{"output_type": "error", "ename": "ValueError", "evalue": "3", "traceback": ["ValueError: 3"]}],
        ),
    ]
    cells = [
        {"cell_type": "code", "source": source, "metadata": meta, "execution_count": i, "outputs": outs}
        for i, (source, meta, outs) in enumerate(outputs, 1)
    ]
    state = {key: {"state": value} for key, value in zip([box, *ids], states, strict=True)}
    return {"cells": cells, "metadata": {"kernelspec": {"name": "python3"}, "widgets": {STATE: {"state": state}}}}


def change(nb: Notebook, *path: Any, value: Any) -> None:
    """Set what lies at the end of a path of keys and indices."""
    for key in path[:-1]:
        nb = nb[key]
    nb[path[-1]] = value


def strip(nb: Notebook) -> None:
    for cell in code_cells(nb):
        cell.update(execution_count=None, outputs=[])


OUT = ("outputs", 0)
PLANTED: dict[str, tuple[Callable[[Notebook], None], str]] = {
    "stripped outputs": (strip, "cells not run"),
    "one cell not run": (lambda nb: change(nb, "cells", 1, "execution_count", value=None), "cells not run"),
    "run out of order": (lambda nb: change(nb, "cells", 1, "execution_count", value=7), "cells not run"),
    "output of another run": (lambda nb: change(nb, "cells", 1, *OUT, "execution_count", value=7), "another run"),
    "other kernel": (lambda nb: change(nb, "metadata", "kernelspec", "name", value="mine"), "kernel"),
    "skip comment": (lambda nb: change(nb, "cells", 0, "source", value="# NBVAL_SKIP\nprint(1.5)"), "marker"),
    "ignore comment": (lambda nb: change(nb, "cells", 0, "source", value="# NBVAL_IGNORE_OUTPUT\n1"), "marker"),
    "skip tag": (lambda nb: change(nb, "cells", 0, "metadata", "tags", value=["nbval-skip"]), "marker"),
    "ignore tag": (lambda nb: change(nb, "cells", 0, "metadata", "tags", value=["nbval-ignore-output"]), "marker"),
    "semicolon": (lambda nb: change(nb, "cells", 1, "source", value="2;"), "semicolon"),
    "magic": (lambda nb: change(nb, "cells", 1, "source", value="%time 2"), "plain Python"),
    "stderr": (lambda nb: change(nb, "cells", 0, *OUT, "name", value="stderr"), "stderr"),
    "carriage return": (lambda nb: change(nb, "cells", 0, *OUT, "text", value="9\r1.5\n"), "carriage"),
    "untagged error": (lambda nb: change(nb, "cells", 4, "metadata", value={}), "raises-exception"),
    "long traceback": (lambda nb: change(nb, "cells", 4, *OUT, "traceback", value=["line 3", "3"]), "traceback"),
    "new kind": (lambda nb: change(nb, "cells", 1, *OUT, "data", "image/jpeg", value="QUJD"), "no test covers"),
    "picture alone": (lambda nb: change(nb, "cells", 2, *OUT, "data", value={"image/png": "QUJD"}), "without text"),
    "no caption": (lambda nb: change(nb, "cells", 2, "metadata", "mystnb", "figure", value={}), "without caption"),
    "no alt": (lambda nb: change(nb, "cells", 2, "metadata", "mystnb", "image", value={}), "text alternative"),
    "address": (lambda nb: change(nb, "cells", 1, *OUT, "data", "text/plain", value="<f at 0x7f00aa10>"), "address"),
    "folder": (lambda nb: change(nb, "cells", 0, *OUT, "text", value="in /home/me/x.py\n"), "address"),
    "slider without state": (lambda nb: change(nb, "metadata", "widgets", value={}), "without state"),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name: str) -> None:
    plant, words = PLANTED[name]
    nb = sample()
    assert faults(nb) == []
    plant(nb)
    assert any(words in fault for fault in faults(nb)), faults(nb)


@pytest.mark.parametrize("piece", ["alt", "figcaption", "label", "text", "still"])
def test_a_changed_digit_in_a_slider_is_found(piece: str) -> None:
    nb = sample()
    models = nb["metadata"]["widgets"][STATE]["state"]
    last = models[f"{5:032x}"]["state"]
    if piece == "alt":
        last["value"] = last["value"].replace('2: slope 2"', '2: slope 3"')
    elif piece == "figcaption":
        last["value"] = last["value"].replace("slope 2<", "slope 3<")
    elif piece == "label":
        models[f"{3:032x}"]["state"]["_options_labels"][1] = "3"
    elif piece == "text":
        data = nb["cells"][3]["outputs"][0]["data"]
        data["text/plain"] = data["text/plain"].replace("slope 1", "slope 7")
    else:
        nb["cells"][3]["outputs"][0]["data"]["image/png"] = "QUJE"
    assert faults(nb)


# A digit of each kind of text output that a page may store: the source that gives it, and where it is stored.
DISPLAY = "from IPython.display import display\ndisplay({!r}, raw=True)"
RESULT = "class R:\n    def _repr_mimebundle_(self, **kwargs):\n        return {!r}\n\nR()"
VALUES: dict[str, Any] = {
    "text/plain": "x = 1.25",
    "text/html": "<b>1.25</b>",
    "text/markdown": "**1.25**",
    "text/latex": "$1.25$",
    CLAIM: {"name": "two", "value": "1.25", "condition": "1.25 to within 1e-09"},
    RECORD: "1.25",
}
SOURCES = {
    ("stream", "text"): "print('x = 1.25')\nprint('y = 3')",
    ("error", "evalue"): "raise ValueError('got 1.25')",
    **{("display_data", kind): DISPLAY.format({kind: value}) for kind, value in VALUES.items()},
    **{
        ("execute_result", kind): RESULT.format({"text/plain": "R", kind: VALUES[kind]})
        for kind in sorted(COMPARED - {CLAIM, RECORD})
    },
}


def mutate(value: Any, which: int) -> Any:
    """The same value with its first (0) or last (-1) digit changed."""
    raw = value if isinstance(value, str) else json.dumps(value)
    digit = list(re.finditer(r"\d", raw))[which]
    raw = raw[: digit.start()] + str((int(digit[0]) + 1) % 10) + raw[digit.end() :]
    return raw if isinstance(value, str) else json.loads(raw)


def nbval(folder: Path) -> dict[str, list[bool]]:
    """Run the notebooks of a folder under nbval as `make test` does; for each, whether its cells passed."""
    command = [sys.executable, "-m", "pytest", "-q", "--nbval", "--nbval-current-env", "--nbval-cell-timeout", "300"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", "--junitxml", "report.xml", "."]
    subprocess.run(command, cwd=folder, capture_output=True, timeout=300, stdin=subprocess.DEVNULL, check=False)
    passed: dict[str, list[bool]] = {}
    for case in ElementTree.parse(folder / "report.xml").iter("testcase"):
        passed.setdefault(case.attrib["classname"].split(".")[0], []).append(len(case) == 0)
    return passed


def test_any_changed_digit_of_a_stored_output_fails(tmp_path: Path) -> None:
    """For every kind of text output the first and the last digit, each changed alone, make nbval fail."""
    seen = {
        (out["output_type"], field)
        for path in PAGES
        for cell in code_cells(read(path))
        for out in cell["outputs"]
        for field in (set(out["data"]) & COMPARED if "data" in out else {"text"} if "text" in out else {"evalue"})
    }
    assert seen <= set(SOURCES), "a kind of output that is not tried here"

    nb = nbformat.v4.new_notebook()
    for where, source in SOURCES.items():
        tags = {"tags": ["raises-exception"]} if where[0] == "error" else {}
        nb.cells.append(nbformat.v4.new_code_cell(source, metadata=tags))
    NotebookClient(nb, kernel_name="python3", timeout=60, extra_arguments=["--log-level=ERROR"]).execute()
    nbformat.write(nb, tmp_path / "same.ipynb")
    for which, name in ((0, "first"), (-1, "last")):
        changed = copy.deepcopy(nb)
        for (kind, field), cell in zip(SOURCES, changed.cells, strict=True):
            (out,) = cell.outputs
            assert out.output_type == kind
            holder = out.data if "data" in out else out
            holder[field] = mutate(holder[field], which)
        nbformat.write(changed, tmp_path / f"{name}.ipynb")
    passed = nbval(tmp_path)
    assert passed["same"] == [True] * len(SOURCES)
    for name in ("first", "last"):
        survived = [where for where, good in zip(SOURCES, passed[name], strict=True) if good]
        assert survived == []
