"""Starts processes that train a small GPT, on examples or by PPO, to be killed. Run by test_training_kills.py.

One line of standard input starts one process: "sft" or "ppo", the path of its checkpoint, the path for the final
weights, and the name of a planted bug or "none". It says on standard output how many steps it found done, then every
step as it is finished.
"""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from planting import edited, replaced
from rlhfkit import checkpoints, train_policy, train_sft
from rlhfkit.kl import AdaptiveKLController
from rlhfkit.models import GPT, GPTConfig, Policy, ScalarModel
from rlhfkit.ppo import PPOConfig
from rlhfkit.tasks import Rollout
from rlhfkit.training import Run

STEPS = {"sft": 120, "ppo": 50}
REPLAYED = 'kl_controller.update(row["objective/kl"], int(row["episode"] - before))'
FORGETFUL = edited(train_policy.train_ppo, (REPLAYED, "pass"))
BUGS = {
    "none": Run,
    "random numbers forgotten": edited(Run, ('torch.set_rng_state(tensors["random/cpu"])', "pass")),
    "optimiser forgotten": edited(
        Run, ('optimizer.load_state_dict(optimizer.state_dict() | {"state": state})', "pass")
    ),
    "generator forgotten": edited(Run, ('self.generator.set_state(tensors["random/generator"])', "pass")),
    "controller forgotten": Run,
    "begins anew": edited(Run, ("self._resume(Path(checkpoint))", "pass")),
    "written in place": Run,
}


def write_in_place(path: Path, data: bytes) -> None:
    """Not atomically, and as a slow disk would."""
    with open(path, "wb") as file:
        for start in range(0, len(data), 4000):
            file.write(data[start : start + 4000])
            file.flush()
            time.sleep(0.001)  # or a kill in between is a matter of luck


def say(step: int, metrics: dict[str, float]) -> None:
    os.write(1, b"step %d\n" % step)


def fine_tune(path: str, final: str) -> None:
    """The same run, whenever it is started: dropout, two optimisers, a checkpoint every other step."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(12, 16, 16, 1, 2, dropout=0.1, pad_id=0))
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(2, 12, (64, 3), generator=generator)
    ended = torch.ones(64, 1).long()
    responses = torch.cat([torch.randint(2, 12, (64, 5), generator=generator), ended], 1)
    settings = {"steps": STEPS["sft"], "batch_size": 8, "checkpoint": path, "save_every": 2, "on_step": say}
    train_sft.train_sft(model, prompts, responses, **settings)
    model.save(final)
    os.write(1, b"done\n")


class Words:
    """Responses that end with 1, worth as many 3s as they have."""

    beta, max_length, eos_id = 0.1, 4, 1

    def __init__(self, model: GPT) -> None:
        self.model = model

    def draw_prompts(self, generator: torch.Generator) -> torch.Tensor:
        return torch.randint(2, 8, (4, 2), generator=generator)

    def score(self, rollout: Rollout) -> torch.Tensor:
        return (rollout.tokens == 3).double().sum(1)

    def reference(self) -> Policy:
        return self.model


def reinforce(path: str, final: str, train_ppo: Callable[..., object]) -> None:
    """PPO on a trunk that policy and values share, with a controller and pretraining, all drawn from one generator."""
    torch.manual_seed(0)
    policy, reference = (GPT(GPTConfig(8, 12, 8, 1, 2, pad_id=0)) for _ in range(2))
    reference.load_state_dict(policy.state_dict())
    value = ScalarModel(policy, head_std=0.0)
    config = PPOConfig(num_ppo_epochs=1, num_mini_batches=2, lr=3e-3, anneal=True)
    settings = {"config": config, "kl_controller": AdaptiveKLController(0.1, 0.3, 200), "ptx_coef": 0.1}
    settings |= {"pretraining": (torch.tensor([[2], [3]]), torch.tensor([[4, 1], [1, 0]])), "on_step": say}
    settings |= {"steps": STEPS["ppo"], "group_size": 2, "checkpoint": path, "save_every": 2}
    train_ppo(policy, value, Words(reference), generator=torch.Generator().manual_seed(2), **settings)
    checkpoints.save_checkpoint(final, value.state_dict(), {})
    os.write(1, b"done\n")


def train(loop: str, path: str, final: str, bug: str = "none") -> None:
    """One of the two."""
    if loop == "sft":
        fine_tune(path, final)
    else:
        reinforce(path, final, FORGETFUL if bug == "controller forgotten" else train_policy.train_ppo)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(os, "write"):
        for loop in ("sft", "ppo"):
            train(
                loop, f"{folder}/{loop}", f"{folder}/model_{loop}"
            )  # what torch imports in the first step takes a second
    os.write(1, b"ready\n")
    for line in sys.stdin:
        loop, path, final, bug = line.rstrip("\n").split("\t")
        child = os.fork()
        if not child:
            os.write(1, b"started %d\n" % os.getpid())
            try:
                with replaced(train_sft, Run=BUGS[bug]), replaced(train_policy, Run=BUGS[bug]):
                    if bug == "written in place":
                        checkpoints.write_atomically = write_in_place
                    train(loop, path, final, bug)
            except BaseException as error:
                os.write(1, f"error {error}".replace("\n", " ").encode()[:400] + b"\n")
            os._exit(1)
        os.waitpid(child, 0)
        os.write(1, b"ended\n")
