"""A question with its cases, its planted wrong answers and its other right answers, and how an answer is judged.

Everything here runs the learner's code in the current process and may therefore hang or raise: ``run_limits`` wraps it.
"""

from __future__ import annotations

import contextlib
import linecache
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlhfkit.homework.comparisons import (
    Fail,
    NotAnswered,
    Stop,
    blank,
    describe,
    keeps_inputs,
    same,
    shorten,
)

QUESTIONS: dict[str, Question] = {}
"""All registered questions by id, in the order of the chapters."""


@dataclass(frozen=True)
class Case:
    """One fact that a right answer satisfies.

    Attributes:
        name: the fact, in words that a reader of the chapter knows.
        judge: called with the prepared answer; raises :class:`Fail` when the fact does not hold.
        points: what it is worth.
        hint: one line shown when it fails.
    """

    name: str
    judge: Callable[[Any], None]
    points: int
    hint: str


@dataclass(frozen=True)
class Wrong:
    """A planted wrong answer, which a learner could write.

    Attributes:
        name: short name, unique in its question.
        answer: the answer itself.
        says: the mistake, in one line, as the learner is told.
        source: id of the common wrong claim behind it, such as ``W-PG-1``, or ``common``.
    """

    name: str
    answer: Any
    says: str
    source: str


@dataclass(frozen=True)
class Verdict:
    """What one case said: ``passed``, or the ``message`` why not; ``blank`` if there was no answer to judge."""

    passed: bool
    message: str = ""
    blank: bool = False
    printed: str = ""


@dataclass
class Question:
    """One homework question.

    Attributes:
        id: name in ``check(id, answer)``.
        title: one line.
        chapter: number of the chapter.
        kind: "function", or what is asked for otherwise ("numbers", "lines", "order", ...); shown in the kill matrix.
        accept: for other kinds than functions: turns the learner's object into the form that the cases judge, or
            raises :class:`Fail`; None for functions.
        hints: three levels: what to look at, the idea, the formula.
        explanation: the model answer in words, shown by ``solution``.
        variable: name of the variable in the notebook that holds the answer.
        theory: whether it asks for a derivation instead of code for training.
        reference: the right answer; ``reference_source`` is the text of the master's cell.
        probes: answer -> nested lists of tensors that tell the planted mistakes apart.
    """

    id: str
    title: str
    chapter: int
    kind: str
    hints: tuple[str, str, str]
    explanation: str
    variable: str
    theory: bool
    accept: Callable[[Any], Any] | None = None
    reference: Any = None
    reference_source: str = ""
    probes: Callable[[Any], Any] = lambda answer: answer
    cases: list[Case] = field(default_factory=list)
    wrongs: list[Wrong] = field(default_factory=list)
    rights: list[tuple[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.id in QUESTIONS:
            raise ValueError(f"question id {self.id!r} is taken")
        QUESTIONS[self.id] = self

    @property
    def points(self) -> int:
        """Points of all cases together."""
        return sum(case.points for case in self.cases)

    def case(self, name: str, points: int, hint: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
        """Decorator that adds a case; the decorated function judges a prepared answer."""

        def add(judge: Callable[[Any], None]) -> Callable[[Any], None]:
            self.cases.append(Case(name, judge, points, hint))
            return judge

        return add

    def wrong(self, name: str, says: str, answer: Any, source: str = "common") -> None:
        """Plant a wrong answer."""
        self.wrongs.append(Wrong(name, answer, says, source))

    def plant(self, *rows: tuple[str, str, Any, str]) -> None:
        """Plant several wrong answers, each (name, what it says, answer, source)."""
        for row in rows:
            self.wrong(*row)

    def right(self, name: str, answer: Any) -> None:
        """Add a right answer that is written in another way: no case may reject it."""
        self.rights.append((name, answer))

    def prepare(self, answer: Any) -> Any:
        """The answer in the form that cases judge.

        Raises:
            NotAnswered: if it is blank.
            Fail: if it is not the kind of object that is asked for.
        """
        if missing := blank(answer):
            raise NotAnswered(missing)
        if self.accept is not None:
            return self.accept(answer)
        if not callable(answer):
            raise Fail(f"expected a function, got {describe(answer)}")
        return _Guarded(answer)


class _Guarded:
    """The learner's function; a blank return value counts as no answer, not as a wrong one."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        result = self.function(*args, **kwargs)
        if missing := blank(result):
            raise NotAnswered(missing)
        return result


# -- judging ---------------------------------------------------------------------------------------------


def judge(question: Question, answer: Any, case: Case) -> Verdict:
    """Run one case on the answer; every exception becomes a verdict, KeyboardInterrupt and SystemExit included."""
    try:
        with _fresh_torch(seed=0):
            prepared = question.prepare(answer)
            case.judge(keeps_inputs(prepared) if isinstance(prepared, _Guarded) else prepared)
    except Stop:
        raise
    except NotAnswered as nothing:
        return Verdict(False, str(nothing), blank=True)
    except Fail as fail:
        return Verdict(False, shorten(str(fail), 400))
    except NotImplementedError:
        return Verdict(False, "not answered yet", blank=True)
    except BaseException as error:
        return Verdict(False, explain(error))
    return Verdict(True)


def diagnose(question: Question, answer: Any, known: list[Any] | None = None) -> list[Wrong]:
    """The planted mistakes whose outputs equal the learner's on every probe; empty if the answer is right there.

    Args:
        question: the question.
        answer: any object.
        known: what :func:`known_probes` gives for the question, if at hand.
    """
    try:
        mine = _probe(question, answer)
    except BaseException:
        return []
    right, *planted = known or known_probes(question)
    if same(mine, right):
        return []
    return [wrong for wrong, theirs in zip(question.wrongs, planted, strict=True) if same(mine, theirs)]


def known_probes(question: Question) -> list[Any]:
    """Outputs of the reference and of every planted answer on the probes."""
    return [_probe(question, answer) for answer in (question.reference, *(wrong.answer for wrong in question.wrongs))]


def _probe(question: Question, answer: Any) -> Any:
    with _fresh_torch(seed=1):
        return question.probes(question.prepare(answer))


class _fresh_torch:
    """Fixed seed, float32, gradients on, no warnings; what the caller had comes back afterwards."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.state, self.dtype = torch.get_rng_state(), torch.get_default_dtype()
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(warnings.catch_warnings())
        self.stack.enter_context(torch.enable_grad())
        warnings.simplefilter("ignore")
        torch.set_default_dtype(torch.float32)
        torch.random.default_generator.manual_seed(self.seed)

    def __exit__(self, *error: object) -> None:
        torch.set_rng_state(self.state)
        torch.set_default_dtype(self.dtype)
        self.stack.close()


def explain(error: BaseException) -> str:
    """What a learner's exception says: type, text, and the last line of the learner's own code that was running."""
    try:
        text = str(error)
    except BaseException:
        text = "(its text cannot be printed)"
    name = type(error).__name__
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        head = f"your code asked for more memory than a check allows ({name})"
    else:
        head = f"your code raised {name}: {text}" if text else f"your code raised {name}"
    return shorten(" ".join(head.split()), 300) + _learner_line(error)


def _learner_line(error: BaseException) -> str:
    ours, libraries = str(Path(__file__).parent.parent), ("site-packages", "dist-packages", "importlib")
    line = ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if file.startswith(ours) or any(part in file for part in libraries):
            continue
        text = linecache.getline(file, number).strip()
        line = f" (line {number}: {shorten(text, 80)})" if text else f" (line {number})"
    return line


def judge_all(question: Question, answer: Any, cases: list[int]) -> Iterator[tuple[int, Verdict]]:
    """Verdicts of the numbered cases (from 0), one after the other; a blank answer ends it at once."""
    for i in cases:
        verdict = judge(question, answer, question.cases[i])
        yield i, verdict
        if verdict.blank and i == 0:
            return
