"""The notebooks: generated equals committed, the student's runs with 0 points, the solved one with all of them."""

import csv
import difflib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

from rlhfkit.homework import instructor
from rlhfkit.homework.__main__ import main
from rlhfkit.homework.core import QUESTIONS

ROOT = Path(__file__).parent.parent.parent
HOMEWORK, MASTERS = ROOT / "homework", ROOT / "homework" / "master"
NAMES = sorted(path.name for path in MASTERS.glob("hw*.ipynb"))
CHAPTERS = {
    "hw01_language_models.ipynb": 1,
    "hw02_policy_gradient.ipynb": 2,
    "hw03_baselines.ipynb": 3,
    "hw04_ppo.ipynb": 4,
    "hw05_reward_models.ipynb": 5,
    "hw06_rlhf.ipynb": 6,
    "hw07_dpo.ipynb": 7,
    "hw08_kl.ipynb": 8,
    "hw09_overoptimisation.ipynb": 9,
}


def load(path):
    return nbformat.read(path, as_version=4)


def solved(name):
    """What a student hands in who has everything right: the student notebook with the master's solutions."""
    notebook, solutions = load(HOMEWORK / name), {}
    for cell in load(MASTERS / name).cells:
        solutions[cell.id] = cell.source
    for cell in notebook.cells:
        cell.source = re.sub(r" *# (BEGIN |END )?SOLUTION", "", solutions[cell.id])
    return notebook


def questions_of(name):
    return [question for question in QUESTIONS.values() if question.chapter == CHAPTERS[name]]


def test_every_chapter_with_questions_has_a_notebook():
    assert NAMES == sorted(CHAPTERS)
    assert {question.chapter for question in QUESTIONS.values()} == set(CHAPTERS.values())


@pytest.mark.parametrize("name", NAMES)
def test_the_master_asks_every_question_with_one_hidden_test_per_case(name):
    text = [cell.source for cell in load(MASTERS / name).cells]
    for question in questions_of(name):
        assert f"# BEGIN QUESTION\nname: {question.id}\npoints: {question.points}" in text
        assert f'check("{question.id}", {question.variable});' in text
        for number, case in enumerate(question.cases, 1):
            test = next(cell for cell in text if f"def test_{question.id}_{number}(" in cell)
            assert f'grade_case("{question.id}", {number}, {question.variable})' in test
            assert f"points: {case.points}\nhidden: true" in test
    assert sum("grade_case(" in cell for cell in text) == sum(len(question.cases) for question in questions_of(name))


@pytest.mark.parametrize("name", NAMES)
def test_solution_shows_the_masters_cell(name):
    cells = [cell.source for cell in solved(name).cells]
    for question in questions_of(name):
        shown = [line for line in question.reference_source.splitlines()]
        assert any(
            [line for line in cell.splitlines() if line.strip()] == [x for x in shown if x.strip()] for cell in cells
        )


@pytest.mark.parametrize("name", NAMES)
def test_the_student_notebook_is_unexecuted_and_gives_nothing_away(name):
    notebook = load(HOMEWORK / name)
    first = notebook.cells[0].source
    assert re.findall(r"^# .*", first, re.M) == [first.splitlines()[0]]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in code)
    assert notebook.metadata.otter == {"assignment_name": name.split("_")[0]}  # other keys break otter's grading
    text = "\n".join(cell.source for cell in notebook.cells)
    assert "otter" not in text and "grade_case" not in text and "SOLUTION" not in text
    for question in questions_of(name):
        last = question.reference_source.splitlines()[-1].strip()
        assert last not in text
    assert "E[|g|^2" not in text and "Q(s, a) - V(s)" not in text and "learning_rate * J" not in text


def run(notebook, folder, state):
    """Execute in a kernel of its own and return the progress; an exception in a cell fails the test."""
    before = os.environ.get("RLHFKIT_HW_STATE")
    os.environ["RLHFKIT_HW_STATE"] = str(state)
    try:
        nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(folder)}}).execute()
    finally:
        os.environ.pop("RLHFKIT_HW_STATE") if before is None else os.environ.update(RLHFKIT_HW_STATE=before)
    return json.loads(state.read_text())["questions"]


def joined(notebooks):
    """One notebook with the cells of several, so that torch is imported once."""
    cells = [cell for notebook in notebooks for cell in notebook.cells if cell.cell_type == "code"]
    for number, cell in enumerate(cells):
        cell.id = f"cell-{number}"
    notebooks[0].cells = cells
    return notebooks[0]


def test_the_student_notebooks_run_to_the_end_with_no_points(tmp_path):
    notebook = joined([load(HOMEWORK / name) for name in NAMES])
    progress = run(notebook, tmp_path, tmp_path / "state.json")
    assert {q: record["best"] for q, record in progress.items()} == {q: 0 for q in QUESTIONS}
    outputs = [out.data["text/plain"] for cell in notebook.cells for out in cell.outputs]
    assert sum("not answered yet" in out for out in outputs) == len(QUESTIONS)
    assert "Homework: 0 of" in outputs[-1]
    assert len(outputs) == len(QUESTIONS) + len(NAMES)  # one message per question, one report per notebook


def test_the_solved_notebooks_run_to_the_end_with_all_points(tmp_path):
    notebook = joined([solved(name) for name in NAMES])
    progress = run(notebook, tmp_path, tmp_path / "state.json")
    assert {q: record["best"] for q, record in progress.items()} == {q.id: q.points for q in QUESTIONS.values()}
    pages = [out.data["text/html"] for cell in notebook.cells for out in cell.outputs]
    assert sum("PASS" in page and "FAIL" not in page for page in pages) == len(QUESTIONS)


def test_the_first_cell_says_what_to_run_when_the_package_is_missing():
    """-S -E: without site-packages neither torch nor rlhfkit is there."""
    cell = next(c.source for c in load(HOMEWORK / NAMES[0]).cells if c.cell_type == "code")
    done = subprocess.run([sys.executable, "-S", "-E", "-c", cell], cwd="/", capture_output=True, text=True)
    assert "torch is not installed" in done.stdout
    assert "pip install -e ." in done.stdout
    assert done.stderr == ""


# -- the instructor's side -----------------------------------------------------------------------------------------


def test_a_folder_of_submissions_becomes_a_csv_and_a_broken_one_does_not_stop_it(tmp_path, capsys):
    """Solved, one mistake with a cell that raises, a notebook that ends Python, and text that is no notebook."""
    name = "hw03_baselines.ipynb"
    for who in ("ada", "cleo", "dan", "eve"):
        (tmp_path / who).mkdir()
    nbformat.write(solved(name), tmp_path / "ada" / name)
    partly = solved(name)
    for cell in partly.cells:
        if cell.source.startswith("def gae("):
            cell.source = "1 / 0\n"
        if cell.source.startswith("def leave_one_out_baseline"):
            cell.source = "def leave_one_out_baseline(scores):\n    return scores.roll(-1, 1)"
    nbformat.write(partly, tmp_path / "cleo" / name)
    fatal = solved(name)
    fatal.cells[-1].source = "import os; os._exit(7)"
    nbformat.write(fatal, tmp_path / "dan" / name)
    (tmp_path / "eve" / name).write_text("my homework", encoding="utf-8")

    assert main(["grade", str(tmp_path), "-o", str(tmp_path / "scores.csv"), "--seconds", "100"]) == 0
    assert "4 notebooks graded, 3 of them with an error" in capsys.readouterr().out
    with (tmp_path / "scores.csv").open(encoding="utf-8") as stream:
        ada, cleo, dan, eve = csv.DictReader(stream)
    full = sum(question.points for question in questions_of(name))
    assert (ada["total"], ada["of"], ada["gae"], ada["error"]) == (str(full), str(full), "8", "")
    assert cleo["who"] == "cleo" and int(cleo["total"]) == full - 8 - 2
    assert (cleo["gae"], cleo["group_baseline"]) == ("0", "1")  # partial credit, by case
    assert "ZeroDivisionError" in cleo["error"]
    assert (dan["total"], dan["of"]) == ("0", str(full)) and "exit code 7" in dan["error"]
    assert (eve["total"], eve["of"], eve["gae"]) == ("0", str(full), "0") and "not a notebook" in eve["error"]


def code(source):
    return {"cell_type": "code", "source": source}


FIRST = code("from rlhfkit.homework import check\nvalues, orders = [4, 3, -2], 0")
SUBMISSIONS = {
    "later-none.ipynb": [code('check("bellman_numbers", values)'), code("values = None")],
    "later-blank.ipynb": [code('check("bellman_numbers", values)'), code('check("bellman_numbers", None)')],
    "last-counts.ipynb": [code('check("bellman_numbers", values)'), code('check("bellman_numbers", [4, 3, 0])')],
    "once-right.ipynb": [code('check("bellman_numbers", [0, 0, 0])'), code('check("bellman_numbers", values)')],
    "hw03_no_checks.ipynb": [],
    "hw03_few_checks.ipynb": [code('check("lambda_order", orders)')],
}


def test_the_answer_counts_as_it_was_at_the_last_check(tmp_path):
    for name, cells in SUBMISSIONS.items():
        (tmp_path / name).write_text(json.dumps({"cells": [FIRST, *cells]}), encoding="utf-8")
    (tmp_path / "unreadable.ipynb").write_text("[1]", encoding="utf-8")
    rows = {row["file"]: row for row in instructor.grade(tmp_path, tmp_path / "scores.csv", seconds=60.0)}
    full = sum(question.points for question in QUESTIONS.values() if question.chapter == 3)
    assert {row["of"] for row in rows.values()} == {full}  # known from the name, from the checks, or from the others
    assert {name: row["total"] for name, row in rows.items()} == {
        "later-none.ipynb": 3,
        "later-blank.ipynb": 3,
        "last-counts.ipynb": 2,
        "once-right.ipynb": 3,
        "hw03_no_checks.ipynb": 3,  # never checked: the variable at the end
        "hw03_few_checks.ipynb": 3,
        "unreadable.ipynb": 0,
    }
    assert [name for name, row in rows.items() if row["error"]] == ["unreadable.ipynb"]


def test_a_submission_that_never_ends_is_stopped(tmp_path):
    endless = {"cell_type": "code", "source": "while True:\n  try:\n    import time; time.sleep(9)\n  except: pass"}
    check = {"cell_type": "code", "source": 'check("gae", ...)'}
    file = tmp_path / "ann.ipynb"
    file.write_text(json.dumps({"cells": [check, endless]}), encoding="utf-8")
    (row,) = instructor.grade(tmp_path, tmp_path / "scores.csv", seconds=6.0)
    assert row["who"] == "ann" and row["total"] == 0
    assert "stopped after 6 s" in row["error"]


def test_an_empty_folder_or_a_missing_otter_is_said_in_one_line(tmp_path, capsys):
    assert main(["grade", str(tmp_path)]) == 1
    assert "no notebook in" in capsys.readouterr().err
    assert main(["build", "--masters", str(tmp_path)]) == 1
    assert "no hw*.ipynb in" in capsys.readouterr().err


def test_build_gives_the_committed_student_notebooks(tmp_path):
    python = ROOT / ".venv-instructor" / "bin" / "python"
    if not python.exists():
        reason = "no .venv-instructor here: whether the student notebooks match their masters was not checked"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    command = [python, "-m", "rlhfkit.homework", "build", "--no-run-tests", "--masters", MASTERS]
    done = subprocess.run(
        [*command, "--output", tmp_path, "--zips", tmp_path / "zips"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name in NAMES:
        made, kept = ((folder / name).read_text(encoding="utf-8") for folder in (tmp_path, HOMEWORK))
        lines = difflib.unified_diff(kept.splitlines(), made.splitlines(), "committed", "built", n=1, lineterm="")
        assert made == kept, "run `python -m rlhfkit.homework build`\n" + "\n".join(list(lines)[:30])
    assert sorted(f.name for f in (tmp_path / "zips").iterdir()) == [
        f"hw{n:02d}-autograder.zip" for n in CHAPTERS.values()
    ]
