"""Run the cells of one submission and judge its answers: ``python -m rlhfkit.homework.run_notebook TASK RESULT``.

``instructor.grade`` starts this in a process of its own. TASK is a JSON file with ``cells`` (texts), ``questions``
(ids) and ``seconds`` (limit per cell); RESULT receives ``scores`` by question and ``error``: the first failed cell. An
answer is judged when the notebook's ``check`` cell runs, and the last one that is not blank counts; a question that was
never checked gets the points of its variable at the end.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from IPython.core.interactiveshell import InteractiveShell

from rlhfkit import homework
from rlhfkit.atomic import write_atomically
from rlhfkit.homework import run_limits
from rlhfkit.homework.comparisons import shorten
from rlhfkit.homework.core import QUESTIONS, Question, explain


class _CellTimeout(BaseException):
    """A cell ran for too long."""


def _time_is_up(*_: object) -> None:
    raise _CellTimeout


def run_cells(cells: list[str], seconds: float) -> tuple[dict[str, Any], str]:
    """Execute cells as a notebook would; (the variables afterwards, what went wrong first or "")."""
    shell = InteractiveShell.instance()
    shell.showtraceback = lambda *_, **__: None  # type: ignore[method-assign]
    limited = hasattr(signal, "setitimer")
    if limited:
        signal.signal(signal.SIGALRM, _time_is_up)
    problem = ""
    for number, cell in enumerate(cells, 1):
        try:
            if limited:
                signal.setitimer(signal.ITIMER_REAL, seconds)
            outcome = shell.run_cell(cell)
            error = outcome.error_before_exec or outcome.error_in_exec
        except _CellTimeout as late:
            error = late
        finally:
            if limited:
                signal.setitimer(signal.ITIMER_REAL, 0)
        if error is not None and not problem:
            slow = isinstance(error, _CellTimeout)
            what = f"stopped after {seconds:g} s" if slow else explain(error).removeprefix("your code ")
            problem = f"code cell {number}: {shorten(what, 200)}"
    return dict(shell.user_ns), problem


def _judge(question: Question, answer: Any) -> tuple[int, bool]:
    """(Points, whether the answer was blank)."""
    verdicts, _ = run_limits.run(question, answer)
    passed = zip(question.cases, verdicts, strict=False)
    blank = verdicts[0].blank and len(verdicts) == 1
    return sum(case.points for case, verdict in passed if verdict.passed), blank


def _recorder(recorded: dict[str, int]) -> Callable[..., int]:
    """What the notebook's ``check`` cells call: judge at once and keep the points of the last answer not blank."""

    def check(question_id: str, answer: Any, verbose: bool = True) -> int:
        points, blank = _judge(homework._question(question_id), answer)
        if not blank:
            recorded[question_id] = points
        return points

    return check


def main(task: Path, result: Path) -> None:
    """Read the task, run it, write the result."""
    asked = json.loads(task.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RLHFKIT_HW_STATE"] = str(Path(folder) / "progress.json")
        os.environ["IPYTHONDIR"] = folder
        recorded: dict[str, int] = {}
        homework.check = _recorder(recorded)  # type: ignore[assignment]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            variables, problem = run_cells(asked["cells"], asked["seconds"])
        scores = {}
        for question_id in asked["questions"]:
            question = QUESTIONS[question_id]
            if question_id in recorded:
                scores[question_id] = recorded[question_id]
            else:  # never checked, or only while blank
                scores[question_id] = _judge(question, variables.get(question.variable))[0]
        write_atomically(result, json.dumps({"scores": scores, "error": problem}).encode())
    os._exit(0)  # threads and exit handlers of the submission have no say any more


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
