"""Starts processes that train a small GPT, to be killed. Run by test_training_kills.py.

One line of standard input starts one process: the path of its checkpoint, the path for the final weights, and the name
of a planted bug or "none". It says on standard output how many steps it found done, then every step as it is finished.
"""

import os
import sys
import tempfile
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from planting import edited, replaced
from rlhfkit import checkpoints, train_preference
from rlhfkit.models import GPT, GPTConfig
from rlhfkit.training import Run

STEPS = 120
BUGS = {
    "none": Run,
    "random numbers forgotten": edited(Run, ('torch.set_rng_state(tensors["random/cpu"])', "pass")),
    "optimiser forgotten": edited(
        Run, ('optimizer.load_state_dict(optimizer.state_dict() | {"state": state})', "pass")
    ),
    "begins anew": edited(Run, ("self._resume(Path(checkpoint))", "pass")),
    "written in place": Run,
}


def write_in_place(path: Path, data: bytes) -> None:
    """Not atomically, and as a slow disk would."""
    with open(path, "wb") as file:
        for start in range(0, len(data), 4000):
            file.write(data[start : start + 4000])
            file.flush()


def train(path: str, final: str) -> None:
    """The same run, whenever it is started: dropout, two optimisers, a checkpoint every other step."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(12, 16, 16, 1, 2, dropout=0.1, pad_id=0))
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(2, 12, (64, 3), generator=generator)
    ended = torch.ones(64, 1).long()
    responses = torch.cat([torch.randint(2, 12, (64, 5), generator=generator), ended], 1)

    def say(step: int, metrics: dict[str, float]) -> None:
        os.write(1, b"step %d\n" % step)

    settings = {"steps": STEPS, "batch_size": 8, "checkpoint": path, "save_every": 2, "on_step": say}
    train_preference.train_sft(model, prompts, responses, **settings)
    model.save(final)
    os.write(1, b"done\n")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(os, "write"):
        train(f"{folder}/run", f"{folder}/model")  # what torch imports in the first step takes a second
    os.write(1, b"ready\n")
    for line in sys.stdin:
        path, final, bug = line.rstrip("\n").split("\t")
        child = os.fork()
        if not child:
            os.write(1, b"started %d\n" % os.getpid())
            try:
                with replaced(train_preference, Run=BUGS[bug]):
                    if bug == "written in place":
                        checkpoints.write_atomically = write_in_place
                    train(path, final)
            except BaseException as error:
                os.write(1, f"error {error}".replace("\n", " ").encode()[:400] + b"\n")
            os._exit(1)
        os.waitpid(child, 0)
        os.write(1, b"ended\n")
