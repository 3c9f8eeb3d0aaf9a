"""A learner's progress: one JSON file beside the notebook, replaced whole at each change, never lost to a crash."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhfkit.atomic import write_atomically

EMPTY: dict[str, Any] = {"attempts": 0, "best": 0, "solution_opened": False, "hints": 0}


def path() -> Path:
    """The file: ``RLHFKIT_HW_STATE`` if that is set, or ``.rlhfkit_homework.json`` in the working directory."""
    return Path(os.environ.get("RLHFKIT_HW_STATE") or ".rlhfkit_homework.json")


def read(file: Path | None = None) -> tuple[dict[str, dict[str, Any]], str]:
    """Progress by question id, and a note for the learner.

    A file that cannot be understood is renamed to ``....bak`` (``.bak2``, ... if that exists) and progress starts
    afresh: nothing is deleted.
    """
    file = file or path()
    try:
        stored = json.loads(file.read_text(encoding="utf-8"))
        questions = stored["questions"]
        return {str(key): {**EMPTY, **_checked(value)} for key, value in questions.items()}, ""
    except FileNotFoundError:
        return {}, ""
    except OSError as error:
        return {}, f"progress could not be read: {error.strerror}"
    except (ValueError, TypeError, KeyError, AttributeError):
        return {}, _put_aside(file)


def _checked(value: dict[str, Any]) -> dict[str, Any]:
    numbers = all(type(value.get(key, 0)) in (int, float) for key in ("attempts", "best", "hints"))
    if not numbers or type(value.get("solution_opened", False)) is not bool:
        raise ValueError("not a record of progress")
    return value


def _put_aside(file: Path) -> str:
    names = [file.with_name(f"{file.name}.bak{n or ''}") for n in (0, *range(2, 1000))]
    aside = next(name for name in names if not name.exists())
    try:
        os.replace(file, aside)
    except OSError as error:
        return f"the progress file is damaged and could not be moved: {error.strerror}"
    return f"the progress file was damaged; it is kept as {aside.name}, and progress starts afresh"


def write(questions: dict[str, dict[str, Any]], file: Path | None = None) -> str:
    """Replace the file in one step, so that a kill leaves the old or the new one; returns a note if it fails."""
    file = file or path()
    content = json.dumps({"version": 1, "questions": questions}, indent=1)
    try:
        write_atomically(file, content.encode())
    except OSError as error:
        return f"progress could not be saved: {error.strerror}"
    return ""


def update(question_id: str, **changes: Any) -> tuple[dict[str, Any], str]:
    """Change one question's record under a lock; (the new record, a note for the learner or "").

    ``attempts`` is added to the old number, ``best`` and ``hints`` keep the larger value, the rest is replaced.
    """
    file = path()
    with _locked(file):
        questions, note = read(file)
        record = {**EMPTY, **questions.get(question_id, {})}
        for key, value in changes.items():
            old = record[key]
            record[key] = old + value if key == "attempts" else max(old, value) if key in ("best", "hints") else value
        questions[question_id] = record
        failed = write(questions, file)
    return record, failed or note


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Two notebooks may share the file: one change at a time, where the system has file locks."""
    try:
        import fcntl

        lock = open(file.with_name(f"{file.name}.lock"), "w")
    except (ImportError, OSError):
        yield
        return
    with lock:
        with contextlib.suppress(OSError):  # some network drives have no locks
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
