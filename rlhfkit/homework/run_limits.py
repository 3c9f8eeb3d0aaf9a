"""Run a learner's answer where it can do no harm: in a forked child with limits on time and memory.

The child judges the cases one by one and writes each verdict to a pipe. The parent waits for at most
``SECONDS_PER_CASE`` between two messages; then it kills the child. So an endless loop, even one that swallows every
exception, a huge allocation, ``sys.exit()`` or ``os._exit()`` ends the child and not the notebook. Forking costs about
30 ms and shares the memory; the child uses one torch thread, since the pool of threads does not survive a fork.

Where there is no fork (Windows), or the child cannot differentiate (CUDA has been used in the parent), a thread does
the same job without the memory limit: what does not stop by itself gets an exception, and is left behind if it
swallows that too.
"""

from __future__ import annotations

import builtins
import contextlib
import ctypes
import gc
import io
import json
import os
import queue
import select
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from rlhfkit.homework.comparisons import Stop
from rlhfkit.homework.core import Question, Verdict, diagnose, judge_all

SECONDS_PER_CASE = 5.0
SECONDS_IN_ALL = 12.0
SECONDS_TO_START = 10.0
MEMORY_BYTES = 2 * 2**30  # on top of what the notebook holds already
PRINTED_CHARACTERS = 600

Emit = Callable[[dict[str, Any]], None]


def run(question: Question, answer: Any, cases: list[int] | None = None) -> tuple[list[Verdict], list[str]]:
    """Judge an answer within the limits.

    Args:
        question: the question.
        answer: any object.
        cases: numbers of the cases to run, from 0; None: all.

    Returns:
        (one verdict per case, names of the planted mistakes that the answer equals on every probe). A blank answer
        gives a single verdict.
    """
    todo = list(range(len(question.cases))) if cases is None else list(cases)
    wanted, verdicts, matches = list(todo), dict[int, Verdict](), list[str]()
    stops, end = 0, time.monotonic() + SECONDS_IN_ALL
    while todo:
        stopped = ""
        for message in _start(question, answer, list(todo)):
            if "case" in message:
                i = message.pop("case")
                verdicts[i] = Verdict(**message)
                todo.remove(i)
                if verdicts[i].blank and i == 0:
                    return [verdicts[0]], []
            elif "matches" in message:
                matches = message["matches"]
            elif "stopped" in message:
                stopped = message["stopped"]
        if not todo:
            break
        stops += 1
        verdicts[todo.pop(0)] = Verdict(False, stopped or "the check ended early")
        if verdicts.get(0) is not None and len(verdicts) == 1 and wanted[0] == 0:  # the very first call
            return [verdicts[0]] * len(wanted), []
        if stops == 2 or time.monotonic() > end:
            verdicts.update({i: Verdict(False, "not run, since your code was stopped twice") for i in todo})
            break
    return [verdicts[i] for i in wanted], ([] if stops else matches)


def _start(question: Question, answer: Any, todo: list[int]) -> Iterator[dict[str, Any]]:
    if hasattr(os, "fork"):
        messages = _in_child(question, answer, todo)
        first = next(messages, {})
        if "ready" in first:
            yield from messages
            return
    yield from _in_thread(question, answer, todo)


def _work(question: Question, answer: Any, todo: list[int], emit: Emit) -> None:
    """Judge, then diagnose unless everything passed; report each step."""
    perfect, printed = True, io.StringIO()
    with contextlib.redirect_stdout(_Limited(printed)), contextlib.redirect_stderr(io.StringIO()):
        for i, verdict in judge_all(question, answer, todo):
            perfect &= verdict.passed
            emit({"case": i, **verdict.__dict__, "printed": printed.getvalue()})
            printed.seek(0)
            printed.truncate()
        emit({"matches": [] if perfect else [wrong.name for wrong in diagnose(question, answer)]})


class _Limited(io.TextIOBase):
    """A writer that keeps the first characters only, however much the learner prints."""

    def __init__(self, kept: io.StringIO) -> None:
        self.kept = kept

    def write(self, text: str) -> int:
        self.kept.write(text[: max(0, PRINTED_CHARACTERS - self.kept.tell())])
        return len(text)


# -- in a child process ----------------------------------------------------------------------------------


def _in_child(question: Question, answer: Any, todo: list[int]) -> Iterator[dict[str, Any]]:
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of any fork with threads; the child uses none of them
        try:
            pid = os.fork()
        except OSError:  # no memory or no process left: the thread has to do
            os.close(reader)
            os.close(writer)
            return
    if pid == 0:
        _child(question, answer, todo, writer)
    os.close(writer)
    try:
        yield from _listen(reader)
        yield {"stopped": _how_it_ended(pid)}
        pid = 0
    except TimeoutError:
        yield {"stopped": f"your code was stopped after {SECONDS_PER_CASE:g} s (an endless loop?)"}
    finally:
        os.close(reader)
        if pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _listen(reader: int) -> Iterator[dict[str, Any]]:
    """Messages of the child, one JSON line each, until it closes the pipe; TimeoutError if it says nothing for long."""
    text, limit = b"", SECONDS_TO_START
    deadline = time.monotonic() + limit
    while True:
        ready, _, _ = select.select([reader], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError
        part = os.read(reader, 1 << 16)
        if not part:
            return
        *complete, text = (text + part).split(b"\n")
        for line in complete:
            yield json.loads(line)
        if complete:
            deadline = time.monotonic() + SECONDS_PER_CASE


def _how_it_ended(pid: int) -> str:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code == -signal.SIGKILL:
        return "your code was killed by the system (out of memory?)"
    return f"your code ended the Python process ({f'signal {-code}' if code < 0 else f'exit code {code}'})"


def _child(question: Question, answer: Any, todo: list[int], writer: int) -> None:
    """The forked child: never returns."""
    try:
        gc.freeze()  # what the notebook holds (sockets of the kernel among it) is not ours to finalise
        silence = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silence, stream)
        builtins.input = _no_input  # type: ignore[assignment]
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is the parent's affair
        torch.set_num_threads(1)
        torch.ones(2, requires_grad=True).sum().backward()  # refused where the parent has used CUDA
        _limit_memory()

        def emit(message: dict[str, Any]) -> None:
            os.write(writer, json.dumps(message).encode() + b"\n")

        emit({"ready": True})
        _work(question, answer, todo, emit)
    except BaseException:
        os._exit(70)
    finally:
        os._exit(0)


def _no_input(*_: object) -> str:
    raise RuntimeError("input() cannot be used in a check")


def _limit_memory() -> None:
    """Let the child grow by MEMORY_BYTES (Linux; elsewhere the system's own limit is all there is)."""
    try:
        import resource

        with open("/proc/self/statm") as file:
            pages = int(file.read().split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):
        pass


# -- in a thread, where there is no fork -----------------------------------------------------------------


def _in_thread(question: Question, answer: Any, todo: list[int]) -> Iterator[dict[str, Any]]:
    messages: queue.Queue[dict[str, Any]] = queue.Queue()

    def work() -> None:
        try:
            _work(question, answer, todo, messages.put)
        except BaseException:
            pass
        messages.put({"end": True})

    out, err = sys.stdout, sys.stderr
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        while True:
            message = messages.get(timeout=SECONDS_PER_CASE)
            if "end" in message:
                return
            yield message
    except queue.Empty:
        yield {"stopped": f"your code was stopped after {SECONDS_PER_CASE:g} s (an endless loop?)"}
    finally:
        if thread.is_alive() and thread.ident is not None:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Stop))
            thread.join(0.5)
        sys.stdout, sys.stderr = out, err
