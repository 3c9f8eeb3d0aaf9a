"""Homework with checks that are themselves checked: ``check``, ``hint``, ``solution`` and ``report`` for the learner.

Every question carries a bank of planted wrong answers. :func:`prove` shows that its cases reject all of them and name
each one, and the same bank tells a learner which mistake was probably made. Answers run in a child process with limits
on time and memory, so that no answer can end the notebook.
"""

from __future__ import annotations

import difflib
from typing import Any

from rlhfkit.homework import bank as _bank  # noqa: F401  registers the questions
from rlhfkit.homework import messages, progress, run_limits
from rlhfkit.homework.comparisons import describe, shorten
from rlhfkit.homework.core import QUESTIONS, Question
from rlhfkit.homework.proofs import kill_matrix, prove

__all__ = [
    "check",
    "grade_case",
    "hint",
    "kill_matrix",
    "points",
    "prove",
    "questions",
    "report",
    "solution",
]


def _question(question_id: str) -> Question:
    if not isinstance(question_id, str):
        got = describe(question_id)
        raise ValueError(
            f"question_id: got {got}, expected text: the question's name comes first, as in check('gae', gae)"
        )
    if question_id not in QUESTIONS:
        near = difflib.get_close_matches(question_id, QUESTIONS, 1)
        close = f"did you mean {near[0]!r}? " if near else ""
        known = ", ".join(QUESTIONS)
        raise ValueError(f"question_id: got {shorten(repr(question_id), 40)}; {close}The questions are {known}")
    return QUESTIONS[question_id]


def questions() -> list[str]:
    """Ids of all questions, in the order of the chapters."""
    return list(QUESTIONS)


def points(question_id: str) -> int:
    """Points that a question is worth.

    Raises:
        ValueError: if there is no such question.
    """
    return _question(question_id).points


def check(question_id: str, answer: Any, verbose: bool = True) -> int:
    """Judge an answer, say what holds and what does not, and record the score.

    Whatever the answer is, nothing is raised: it runs in a child process with limits on time and memory.

    Args:
        question_id: such as ``"gae"``; :func:`questions` lists them.
        answer: the learner's function, numbers, or ``...`` when not answered yet.
        verbose: False to show nothing.

    Returns:
        Points earned.

    Raises:
        ValueError: if there is no such question.
    """
    question = _question(question_id)
    verdicts, matches = run_limits.run(question, answer)
    blank = verdicts[0].blank and len(verdicts) == 1
    earned = 0 if blank else sum(c.points for c, v in zip(question.cases, verdicts, strict=True) if v.passed)
    _, note = progress.update(question_id, attempts=0 if blank else 1, best=earned)
    if verbose:
        message = messages.checked(question, verdicts, matches)
        if note:
            message.add("NOTE", note)
        message.tell()
    return earned


def hint(question_id: str, level: int = 1) -> None:
    """Show a hint: level 1 says what to look at, 2 the idea, 3 the formula.

    Raises:
        ValueError: if there is no such question or level.
    """
    question = _question(question_id)
    if level not in (1, 2, 3):
        raise ValueError(f"level: got {level!r}, expected 1, 2 or 3")
    message = messages.Message(f"{question_id}: hint {level} of 3")
    message.add("", question.hints[level - 1])
    _, note = progress.update(question_id, hints=level)
    if note:
        message.add("NOTE", note)
    message.tell()


def solution(question_id: str, force: bool = False) -> None:
    """Show the solution, after two attempts or full points, or at once with ``force=True``; the report records it.

    Raises:
        ValueError: if there is no such question.
    """
    question = _question(question_id)
    records, _ = progress.read()
    record = {**progress.EMPTY, **records.get(question_id, {})}
    message = messages.Message(f"{question_id}: solution")
    if not force and record["attempts"] < 2 and record["best"] < question.points:
        message.add("", f"try it twice first ({record['attempts']} so far), or solution({question_id!r}, force=True)")
        message.tell()
        return
    _, note = progress.update(question_id, solution_opened=True)
    if note:
        message.add("NOTE", note)
    message.add_code(question.reference_source)
    message.add("", question.explanation)
    message.tell()


def report() -> None:
    """Show points per homework, and a bar per question with best score, attempts, hints and the solution if opened."""
    records, note = progress.read()
    rows: dict[int, list[str]] = {}
    earned: dict[int, float] = {}
    total: dict[int, int] = {}
    for question_id, question in QUESTIONS.items():
        record = {**progress.EMPTY, **records.get(question_id, {})}
        best = min(record["best"], question.points)
        earned[question.chapter] = earned.get(question.chapter, 0) + best
        total[question.chapter] = total.get(question.chapter, 0) + question.points
        words = f"attempts {record['attempts']}" if record["attempts"] else "not tried"
        words += f", hint {record['hints']}" if record["hints"] else ""
        words += ", solution opened" if record["solution_opened"] else ""
        share = f"{best:g}/{question.points}"
        rows.setdefault(question.chapter, []).append(
            f"{question_id:24s} {messages.bar(best / question.points)} {share:>5s}  {words}"
        )
    message = messages.Message(f"Homework: {sum(earned.values()):g} of {sum(total.values())} points")
    for chapter, of_chapter in rows.items():
        message.add("", f"hw{chapter:02d}: {earned[chapter]:g} of {total[chapter]} points")
        message.add_code("\n".join(of_chapter))
    if not records and not note:
        note = f"no progress is kept in this folder ({progress.path().absolute().parent})"
    if note:
        message.add("NOTE", note)
    message.tell()


def grade_case(question_id: str, number: int, answer: Any) -> None:
    """Run one case, for an autograder: case 1 is the first.

    Raises:
        AssertionError: with the message for the learner, if the case fails.
        ValueError: if there is no such question or case.
    """
    question = _question(question_id)
    if not 1 <= number <= len(question.cases):
        raise ValueError(f"number: got {number!r}, expected a case from 1 to {len(question.cases)}")
    verdict = run_limits.run(question, answer, [number - 1])[0][0]
    if not verdict.passed:
        raise AssertionError(f"{question.cases[number - 1].name}: {verdict.message}")
