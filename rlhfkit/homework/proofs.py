"""The checks are checked: each question against its planted wrong answers, its other right answers, and junk."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from rlhfkit.homework.bank.wrong_claims import WRONG_CLAIMS
from rlhfkit.homework.core import QUESTIONS, Question, diagnose, judge, known_probes


def failed_cases(question: Question, answer: Any) -> list[str]:
    """Messages of the cases that reject an answer, "" for those that accept it, in the order of the cases."""
    verdicts = [judge(question, answer, case) for case in question.cases]
    return ["" if verdict.passed else verdict.message or "rejected" for verdict in verdicts]


def prove(question_id: str) -> list[str]:
    """Show that the check of a question rejects what it must, accepts what it must and tells mistakes apart.

    1. The reference and every other right answer pass all cases.
    2. Every planted wrong answer fails at least one case.
    3. The diagnosis of each planted wrong answer is that mistake and no other.
    4. Every case rejects at least one planted wrong answer.
    5. Junk (None, ``...``, text, nan, an empty list, a function that is blank or raises or returns nonsense) earns
       nothing.

    Args:
        question_id: as in ``check``.

    Returns:
        Faults in words; an empty list means that the check is proven against its bank.

    Raises:
        ValueError: if there is no such question.
    """
    if question_id not in QUESTIONS:
        raise ValueError(f"question_id: got {question_id!r}, expected one of {', '.join(QUESTIONS)}")
    question = QUESTIONS[question_id]
    known, faults = known_probes(question), []
    for name, answer in [("reference", question.reference), *question.rights]:
        for case, message in zip(question.cases, failed_cases(question, answer), strict=True):
            if message:
                faults.append(f"right answer '{name}' fails '{case.name}': {message}")
        if named := [wrong.name for wrong in diagnose(question, answer, known)]:
            faults.append(f"right answer '{name}' is diagnosed as {named}")
    rejects_nothing = {case.name for case in question.cases}
    for wrong in question.wrongs:
        messages = failed_cases(question, wrong.answer)
        rejecting = {case.name for case, message in zip(question.cases, messages, strict=True) if message}
        rejects_nothing -= rejecting
        if not rejecting:
            faults.append(f"wrong answer '{wrong.name}' is accepted")
        if (named := [w.name for w in diagnose(question, wrong.answer, known)]) != [wrong.name]:
            faults.append(f"the diagnosis of '{wrong.name}' is {named}")
    faults += [f"case '{name}' rejects no planted answer" for name in sorted(rejects_nothing)]
    for name, junk in JUNK.items():
        passed = [c.name for c, m in zip(question.cases, failed_cases(question, junk), strict=True) if not m]
        if passed:
            faults.append(f"junk answer '{name}' passes {passed}")
    faults += _bookkeeping(question)
    return faults


def _bookkeeping(question: Question) -> list[str]:
    faults = []
    if len(question.wrongs) < 3:
        faults.append(f"{len(question.wrongs)} planted wrong answers, expected at least 3")
    names = [wrong.name for wrong in question.wrongs]
    if len(set(names)) < len(names):
        faults.append("two planted wrong answers share a name")
    for wrong in question.wrongs:
        if wrong.source != "common" and wrong.source not in WRONG_CLAIMS:
            faults.append(f"wrong answer '{wrong.name}' cites {wrong.source}, which is not in the table of claims")
    return faults


def _raises(*_: object, **__: object) -> None:
    raise ValueError("boom")


def _returns(value: object) -> Callable[..., object]:
    return lambda *_, **__: value


JUNK: dict[str, Any] = {
    "None": None,
    "...": ...,
    "text": "abc",
    "nan": math.nan,
    "an empty list": [],
    "an empty dictionary": {},
    "a dictionary": {"a": 1},
    "a type": int,
    "an object": object(),
    "a blank function": _returns(None),
    "a function that returns ...": _returns(...),
    "a function that returns nan": _returns(torch.tensor(math.nan)),
    "a function that returns text": _returns("abc"),
    "a function that returns a pair of text": _returns(("a", "b")),
    "a function that returns nothing but shape": _returns(torch.zeros(3, 5)),
    "a function that raises": _raises,
    "a function without arguments": lambda: 0,
}
"""Answers that learners hand in before they have one."""


def kill_matrix() -> list[dict[str, Any]]:
    """Which case rejects which planted wrong answer, as data for a page.

    Returns:
        One dictionary per question, in order, with ``question`` (id), ``title``, ``chapter``, ``kind``, ``theory``
        (bool), ``points``; ``cases``: list of ``{name, points}``; ``wrong``: list of ``{name, says, source, claim,
        rejected_by, diagnosis}``, where ``source`` is an id such as ``W-PG-1`` or ``common``, ``claim`` the sentence
        behind the id or "", ``rejected_by`` the numbers of the rejecting cases from 1, and ``diagnosis`` the names of
        the mistakes that would be told; ``rights``: names of other right answers, all accepted.
    """
    matrix = []
    for question in QUESTIONS.values():
        known, wrongs = known_probes(question), []
        for wrong in question.wrongs:
            messages = failed_cases(question, wrong.answer)
            claim = WRONG_CLAIMS.get(wrong.source)
            wrongs.append(
                {
                    "name": wrong.name,
                    "says": wrong.says,
                    "source": wrong.source,
                    "claim": claim.claim if claim else "",
                    "rejected_by": [i for i, message in enumerate(messages, 1) if message],
                    "diagnosis": [w.name for w in diagnose(question, wrong.answer, known)],
                }
            )
        matrix.append(
            {
                "question": question.id,
                "title": question.title,
                "chapter": question.chapter,
                "kind": question.kind,
                "theory": question.theory,
                "points": question.points,
                "cases": [{"name": case.name, "points": case.points} for case in question.cases],
                "wrong": wrongs,
                "rights": [name for name, _ in question.rights],
            }
        )
    return matrix
