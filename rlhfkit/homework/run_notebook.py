"""Run the cells of one submission and judge its answers: ``python -m rlhfkit.homework.run_notebook TASK RESULT``.

``instructor.grade`` starts this in a process of its own. TASK is a JSON file with ``cells`` (texts), ``questions``
(ids) and ``seconds`` (limit per cell); RESULT receives ``scores`` by question and ``error``: the first failed cell.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from IPython.core.interactiveshell import InteractiveShell

from rlhfkit import homework
from rlhfkit.homework import run_limits
from rlhfkit.homework.comparisons import shorten
from rlhfkit.homework.core import QUESTIONS, explain


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


def main(task: Path, result: Path) -> None:
    """Read the task, run it, write the result."""
    asked = json.loads(task.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["RLHFKIT_HW_STATE"] = str(Path(folder) / "progress.json")
        os.environ["IPYTHONDIR"] = folder
        homework.check = lambda *_, **__: 0  # judged once, below, whatever the notebook's own cells call
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            variables, problem = run_cells(asked["cells"], asked["seconds"])
        scores = {}
        for question_id in asked["questions"]:
            question = QUESTIONS[question_id]
            verdicts, _ = run_limits.run(question, variables.get(question.variable))
            passed = zip(question.cases, verdicts, strict=False)
            scores[question_id] = sum(case.points for case, verdict in passed if verdict.passed)
        temporary = result.with_suffix(".part")
        temporary.write_text(json.dumps({"scores": scores, "error": problem}), encoding="utf-8")
        os.replace(temporary, result)
    os._exit(0)  # threads and exit handlers of the submission have no say any more


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
