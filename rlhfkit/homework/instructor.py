"""For the instructor: student notebooks and autograder zips from the masters, and a folder of submissions as a CSV.

``build`` needs otter-grader (the extra ``instructor``), ``grade`` needs IPython only. ``grade`` runs the notebooks of
people you know on your own machine: each in a process of its own with a time limit, but not in a sandbox. For anybody
else use the zips with docker or Gradescope.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from rlhfkit.homework.core import QUESTIONS, Question

SECONDS_PER_NOTEBOOK = 300.0


def build(masters: Path, output: Path, zips: Path, run_tests: bool = True) -> list[Path]:
    """Make the student notebook and the autograder zip of every master; the same bytes each time.

    Args:
        masters: folder with ``hwNN_*.ipynb`` in the format of ``otter assign``.
        output: folder for the student notebooks, which keep the names of their masters.
        zips: folder for ``hwNN-autograder.zip``.
        run_tests: also let otter run the hidden tests on the master.

    Returns:
        The files written.

    Raises:
        RuntimeError: if otter-grader is missing, or refuses a master.
        FileNotFoundError: if there is no master.
    """
    sources = sorted(masters.glob("hw*.ipynb"))
    if not sources:
        raise FileNotFoundError(f"masters: no hw*.ipynb in {masters}")
    written = []
    with tempfile.TemporaryDirectory() as folder:
        works = {master: Path(folder) / master.stem for master in sources}
        for master, work in works.items():
            package = Path(__file__).parent.parent
            shutil.copytree(package, work / "rlhfkit", ignore=shutil.ignore_patterns("__pycache__", ".*"))
            shutil.copy(master, work / master.name)
        _otter_assign([work / master.name for master, work in works.items()], run_tests)
        for master, work in works.items():
            student, target = output / master.name, zips / f"{master.stem.split('_')[0]}-autograder.zip"
            output.mkdir(parents=True, exist_ok=True)
            zips.mkdir(parents=True, exist_ok=True)
            student.write_text(_plain(work / "dist" / "student" / master.name), encoding="utf-8")
            (made,) = (work / "dist" / "autograder").glob("*.zip")
            _repack(made, target)
            written += [student, target]
    return written


_ASSIGN = """
import os, sys
from otter.assign import main
for master in sys.argv[2:]:
    os.chdir(os.path.dirname(master))
    main(os.path.basename(master), "dist", no_pdfs=True, no_run_tests=sys.argv[1] == "no")
"""


def _otter_assign(masters: list[Path], run_tests: bool) -> None:
    """Run ``otter assign`` on each master, into a folder ``dist`` beside it; one process, since otter starts slowly."""
    command = [sys.executable, "-c", _ASSIGN, "yes" if run_tests else "no", *map(str, masters)]
    done = subprocess.run(command, cwd=masters[0].parent, capture_output=True, text=True)
    if "No module named 'otter'" in done.stderr:
        raise RuntimeError(
            "otter-grader is not installed here; run  make instructor  and use .venv-instructor/bin/python"
        )
    if done.returncode:
        raise RuntimeError(f"otter assign refused a master:\n{done.stdout[-2000:]}{done.stderr[-3000:]}")


def _plain(path: Path) -> str:
    """A student notebook without otter's metadata: nothing in it depends on when or where it was made."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    assignment = notebook["metadata"]["otter"]["assignment_name"]
    cells: list[dict[str, Any]] = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"]).splitlines(keepends=True)
        plain = {"cell_type": cell["cell_type"], "id": cell["id"], "metadata": {}, "source": source}
        if cell["cell_type"] == "code":
            plain |= {"execution_count": None, "outputs": []}
        cells.append(plain)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {
        "kernelspec": kernel,
        "language_info": {"name": "python"},
        "otter": {"assignment_name": assignment},
    }
    made = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(made, indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def _repack(made: Path, target: Path) -> None:
    """Copy a zip with its files in order and all times set to 1980, so that equal content gives equal bytes."""
    with zipfile.ZipFile(made) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for info in sorted(old.infolist(), key=lambda x: x.filename):
            fixed = zipfile.ZipInfo(info.filename, (1980, 1, 1, 0, 0, 0))
            fixed.external_attr, fixed.compress_type = 0o100644 << 16, zipfile.ZIP_DEFLATED
            if info.external_attr >> 16 & 0o111:
                fixed.external_attr = 0o100755 << 16
            new.writestr(fixed, old.read(info))


# -- grading -------------------------------------------------------------------------------------------------------


def grade(submissions: Path, output: Path, seconds: float = SECONDS_PER_NOTEBOOK) -> list[dict[str, Any]]:
    """Run every notebook in a folder and write one row of scores for each.

    Args:
        submissions: folder with ``NAME.ipynb`` or ``NAME/....ipynb``.
        output: the CSV to write: ``who``, ``file``, ``total``, ``of``, one column per question (empty where the
            notebook's homework does not have it), ``error``. Which homework it is says the file name (``hw02...``),
            else the questions that are checked in it, else the other files if they agree.
        seconds: limit for one notebook.

    Returns:
        The rows. A notebook that cannot be read or run has 0 points and says why in ``error``; the others go on.

    Raises:
        FileNotFoundError: if the folder holds no notebook.
    """
    files = sorted(f for f in submissions.rglob("*.ipynb") if ".ipynb_checkpoints" not in f.parts)
    if not files:
        raise FileNotFoundError(f"submissions: no notebook in {submissions}")
    rows = []
    for file in files:
        inside = file.relative_to(submissions)
        row = {"who": inside.parts[0] if len(inside.parts) > 1 else file.stem, "file": str(inside)}
        rows.append(row | _grade_file(file, seconds))
    known = {tuple(q for q in QUESTIONS if q in row) for row in rows} - {()}
    if len(known) == 1:
        (ids,) = known
        for row in rows:
            row |= {} if row["of"] else _points([QUESTIONS[q] for q in ids], {})
    used = [q for q in QUESTIONS if any(q in row for row in rows)]
    with output.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["who", "file", "total", "of", *used, "error"], restval="")
        writer.writeheader()
        writer.writerows(rows)
    return rows


def _points(questions: list[Question], scores: dict[str, int]) -> dict[str, Any]:
    """``total``, ``of`` and the points of each question; a question without a score counts 0."""
    points = {q.id: scores.get(q.id, 0) for q in questions}
    return {"total": sum(points.values()), "of": sum(q.points for q in questions), **points}


def _grade_file(file: Path, seconds: float) -> dict[str, Any]:
    number = re.match(r"hw(\d+)", file.name)
    named = [question for question in QUESTIONS.values() if number and question.chapter == int(number[1])]
    try:
        notebook = json.loads(file.read_text(encoding="utf-8"))
        cells = ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "code"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return {**_points(named, {}), "error": f"not a notebook: {type(error).__name__}: {error}"}
    asked = set(re.findall(r"""check\(\s*["'](\w+)["']""", "\n".join(cells)))
    chapters = {question.chapter for question in QUESTIONS.values() if question.id in asked}
    questions = named or [question for question in QUESTIONS.values() if question.chapter in chapters]
    if not questions:
        return {"total": 0, "of": 0, "error": "no homework question is checked in this notebook"}
    scores, problem = _run_apart(file, cells, questions, seconds)
    return {**_points(questions, scores), "error": problem}


def _run_apart(file: Path, cells: list[str], questions: list[Question], seconds: float) -> tuple[dict[str, int], str]:
    with tempfile.TemporaryDirectory() as folder:
        task, result = Path(folder) / "task.json", Path(folder) / "result.json"
        task.write_text(json.dumps({"cells": cells, "questions": [q.id for q in questions], "seconds": seconds / 5}))
        command = [sys.executable, "-m", "rlhfkit.homework.run_notebook", str(task), str(result)]
        try:
            done = subprocess.run(command, cwd=file.parent, capture_output=True, timeout=seconds)
            ended = f"the notebook ended the Python process (exit code {done.returncode})"
        except subprocess.TimeoutExpired:
            ended = f"stopped after {seconds:g} s"
        try:
            outcome = json.loads(result.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}, ended
        return outcome["scores"], outcome["error"]
