"""Labelling killed at random moments: every label that was said to be saved is there, and work goes on."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from rlhfkit.label_store import Comparison, LabelStore

KILLS = int(os.environ.get("RLHFKIT_KILLS", "20"))
SERVER = Path(__file__).with_name("label_server.py")


@pytest.fixture(scope="module")
def server():
    """A process that has imported everything, so that the one to be killed starts at once."""
    process = subprocess.Popen([sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.stdin.close()
        process.wait(30)
        process.stdout.close()


def kill_once(process, path, speed, bug, seconds, opening):
    """Let one process label for so long, kill it, and give what it said: (what, of which comparison).

    The time starts when it has opened the file, or, to kill it in the midst of that, when it has started.
    """
    process.stdin.write(f"{path}\t{speed}\t{bug}\n")
    process.stdin.flush()
    what, pid = process.stdout.readline().split()
    assert what == "started"
    try:
        said = [] if opening else [process.stdout.readline()]
        time.sleep(seconds)
    finally:
        with contextlib.suppress(ProcessLookupError):  # it ended with an error, which it said
            os.kill(int(pid), signal.SIGKILL)
    while not said or said[-1] != "ended\n":
        said.append(process.stdout.readline())
        assert said[-1], "the server died"
    return [tuple(line.rstrip("\n").split(" ", 1)) for line in said[:-1]]


def written(path):
    """The decisions in the file, read without the store: (record or undo, of which comparison); and the torn rest."""
    *lines, rest = path.read_bytes().split(b"\n") if path.exists() else [b""]
    with contextlib.suppress(ValueError):
        json.loads(rest)  # a line that lacks its end only is finished when the file is next opened
        lines, rest = [*lines, rest], b""
    try:
        records = [json.loads(line) for line in lines]
    except ValueError as error:
        raise AssertionError(f"the file has a line that is none: {error}") from error
    return [("undo", r["undo"]) if "undo" in r else ("record", r["id"]) for r in records], rest


def in_force(decisions):
    """The comparisons that have a label; AssertionError if one was given twice or taken back without being there."""
    labels = set()
    for what, comparison in decisions:
        assert (comparison in labels) == (what == "undo"), f"{what} {comparison} twice"
        labels ^= {comparison}
    return labels


def survives(process, kills, bug="none", seed=0):
    """Kill so often while one file is labelled, and check after every kill; the number of kills that tore a line."""
    draw, before, torn_lines = random.Random(seed), [], 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labels.jsonl"
        for kill in range(kills):
            speed = "slow" if kill % 2 else "fast"
            said = kill_once(process, path, speed, bug, 0.03 * draw.random(), opening=kill % 5 == 4)
            assert "error" not in [what for what, _ in said], said[-1]
            if said:
                assert said[0] == ("opened", str(len(in_force(before)))), "not all labels were found again"
            now, torn = written(path)
            finished, rest = said[1:], now[len(before) :]
            assert now[: len(before)] == before, "an earlier label was lost"
            assert rest[: len(finished)] == finished, "a label that was said to be saved was lost"
            assert len(rest) <= len(finished) + 1, "more was written than was decided"
            in_force(now)
            before, torn_lines = now, torn_lines + bool(torn)
        with LabelStore(path) as store:
            assert {label.id for label in store.labels} == in_force(before)
            store.record(Comparison("one", "more", "label"), "first")
        now, torn = written(path)
        assert now[:-1] == before and not torn
    assert len(before) >= kills, f"too few labels to prove anything: {len(before)}"
    return torn_lines


def test_no_label_is_lost_by_kills_at_random_moments(server):
    torn = survives(server, KILLS)
    assert torn >= KILLS // 10, f"too few kills came in the middle of a line to prove anything: {torn}"
    print(f"{KILLS} kills, {torn} in the middle of a line, no label lost")


@pytest.mark.parametrize(
    "bug", ["said before it is written", "the torn line stays", "remembered only", "the file begun anew"]
)
def test_a_planted_bug_is_noticed(server, bug):
    with pytest.raises(AssertionError) as caught:
        survives(server, 10, bug)
    assert "too " not in str(caught.value)
