"""Training killed at random moments: it goes on where it was, and ends with the weights of an uninterrupted run."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from rlhfkit.checkpoints import load_checkpoint

KILLS = int(os.environ.get("RLHFKIT_KILLS", "20"))
SERVER = Path(__file__).with_name("training_server.py")
STEPS, SAVE_EVERY = {"sft": 120, "ppo": 50}, 2
KILLS_OF_A_RUN = 5


@pytest.fixture(scope="module")
def server():
    """A process that has imported everything, so that the one to be killed starts at once."""
    process = subprocess.Popen(
        [sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=ENV
    )
    try:
        assert process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.stdin.close()
        process.wait(60)
        process.stdout.close()


ENV = {**os.environ, "OMP_NUM_THREADS": "1", "CI": "1", "CUDA_VISIBLE_DEVICES": ""}  # a fork and a GPU do not mix


def start(process, loop, path, final, bug):
    process.stdin.write(f"{loop}\t{path}\t{final}\t{bug}\n")
    process.stdin.flush()
    what, pid = process.stdout.readline().split()
    assert what == "started"
    return int(pid)


def said_by(process):
    """All lines until the process has ended."""
    said = []
    while not said or said[-1] != "ended":
        said.append(process.stdout.readline().rstrip("\n"))
        assert said[-1], "the server died"
    assert not any(line.startswith("error") for line in said), said
    return said[:-1]


def finish(process, loop, path, final, bug="none"):
    """Let one process train to the end; the steps it took, in order."""
    start(process, loop, path, final, bug)
    *steps, done = said_by(process)
    assert done == "done"
    return [int(line.split()[1]) for line in steps]


def kill_once(process, loop, path, final, bug, seconds, opening):
    """Let one process train for so long, and kill it; the steps it took.

    The time starts with its first step, or, to kill it while it reads its file, when it has started.
    """
    pid = start(process, loop, path, final, bug)
    first = [] if opening else [process.stdout.readline().rstrip("\n")]
    time.sleep(seconds)
    with contextlib.suppress(ProcessLookupError):  # it had finished
        os.kill(pid, signal.SIGKILL)
    return [int(line.split()[1]) for line in first + said_by(process) if line.startswith("step")]


def survives(process, loop, kills, bug="none", seed=0):
    """Runs that are killed several times each; gives the number of kills that came between first and last step."""
    draw, useful = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        begun = time.monotonic()
        assert finish(process, loop, folder / "whole", folder / "whole_model", bug) == list(range(STEPS[loop]))
        seconds = time.monotonic() - begun
        expected, _ = load_checkpoint(folder / "whole_model")
        history = load_checkpoint(folder / "whole")[1]["history"]
        for run in range(-(-kills // KILLS_OF_A_RUN)):
            path, final, reached = folder / f"run{run}", folder / f"model{run}", 0
            for kill in range(min(KILLS_OF_A_RUN, kills - run * KILLS_OF_A_RUN)):
                steps = kill_once(process, loop, path, final, bug, 0.25 * seconds * draw.random(), opening=kill == 3)
                if steps:
                    low = reached - reached % SAVE_EVERY
                    assert steps[0] in (low, low - SAVE_EVERY), f"went on at step {steps[0]} after {reached} were done"
                    assert steps == list(range(steps[0], steps[-1] + 1))
                    reached = steps[-1] + 1
                    useful += reached < STEPS[loop]
            finish(process, loop, path, final, bug)
            weights, _ = load_checkpoint(final)
            assert weights.keys() == expected.keys()
            assert all(weights[name].equal(x) for name, x in expected.items()), "other weights than without kills"
            assert load_checkpoint(path)[1]["history"] == history, "other metrics than without kills"
            for part in folder.glob(".*.tmp"):
                part.unlink()  # what a kill in the middle of writing may leave
    return useful


@pytest.mark.parametrize("loop", ["sft", "ppo"])
def test_a_run_killed_at_random_moments_ends_with_the_same_weights(server, loop):
    useful = survives(server, loop, KILLS)
    assert useful >= KILLS // 4, f"too few kills came in the middle of training to prove anything: {useful}"
    print(f"{loop}: {KILLS} kills, {useful} in the middle of training, every run ended with the same weights")


BUGS = [
    *[("sft", bug) for bug in ("random numbers forgotten", "optimiser forgotten", "begins anew", "written in place")],
    *[("ppo", bug) for bug in ("generator forgotten", "controller forgotten", "optimiser forgotten")],
]


@pytest.mark.parametrize(("loop", "bug"), BUGS)
def test_a_planted_bug_is_noticed(server, loop, bug):
    with pytest.raises(AssertionError) as caught:
        survives(server, loop, 20, bug)
    assert "too few" not in str(caught.value)
