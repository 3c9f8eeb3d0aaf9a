"""PPO, REINFORCE and leave-one-out on the exact world: fraction of the optimum against samples (chapters 4 and 6).

    python benchmarks/ppo_exact.py            # PPO, five seeds: does every one come close enough? writes nothing
    python benchmarks/ppo_exact.py --write    # all three, and on scores without structure; writes the data file

The world is ``tasks.random_task()``: 4 prompts, 6^5 responses each, beta 0.2; 200 batches of 2,048 samples a prompt. A
seed is that of the samples and of the task. Scores "structured" are the world's own; "iid" have no structure at all, so
nothing learned about one response helps with another. The fraction, (J - J(ref)) / (beta log Z - J(ref)), is computed
over the list of all responses, not estimated. Learning rates were chosen on other seeds, for the end of the run; with
0.2 leave-one-out is fast at first. Fails if the median of PPO's fractions on the structured scores is below 0.98 or the
worst below 0.97.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from functools import partial
from typing import Any

import shipped
import torch

from rlhfkit.advantages import leave_one_out_baseline
from rlhfkit.exact import objective, optimal_value
from rlhfkit.models import TabularPolicy, TabularValue
from rlhfkit.ppo import PPOConfig
from rlhfkit.sampling import all_logprobs
from rlhfkit.tasks import ExactTask, random_task
from rlhfkit.train_policy import train_ppo, train_reinforce

OUT = shipped.DATA / "ch04_exact.json"
STEPS, GROUP, EVERY = 200, 2_048, 10
CONFIG = PPOConfig(
    lr=0.08,
    num_ppo_epochs=1,
    num_mini_batches=4,
    vf_coef=1.0,
    cliprange_value=None,
    max_grad_norm=float("inf"),
    anneal=True,
)
LR = {"reinforce": 0.05, "leave-one-out": 0.05, "leave-one-out, lr 0.2": 0.2}
NOISE = {"structured": 0.3, "iid": 1e9}  # weight of the unstructured part; the sum is standardised
MEDIAN, WORST = 0.98, 0.97


def fraction(policy: TabularPolicy, task: ExactTask) -> float:
    """(J - J(ref)) / (beta log Z - J(ref)), by enumeration."""
    ref_logprobs = all_logprobs(task.reference(), task).detach()
    value = partial(objective, ref_logprobs=ref_logprobs, scores=task.scores, beta=task.beta)
    start, best = value(ref_logprobs).mean(), optimal_value(ref_logprobs, task.scores, task.beta).mean()
    return float((value(all_logprobs(policy, task).detach()).mean() - start) / (best - start))


def run(method: str, scores: str, seed: int, steps: int = STEPS, group_size: int = GROUP) -> dict[str, Any]:
    """One run: the fraction every ten batches, and its seconds without the measuring."""
    task = random_task(noise=NOISE[scores], seed=seed)
    policy, curve, measuring = task.reference(), [0.0], 0.0

    def on_step(step: int, metrics: dict[str, float]) -> None:
        nonlocal measuring
        if (step + 1) % EVERY == 0:
            start = time.process_time()
            curve.append(round(fraction(policy, task), 5))
            measuring += time.process_time() - start

    loop = {"steps": steps, "group_size": group_size, "generator": torch.Generator().manual_seed(seed)}
    start = time.process_time()
    if method == "ppo":
        train_ppo(policy, TabularValue(policy), task, config=CONFIG, on_step=on_step, **loop)
    else:
        baseline = None if method == "reinforce" else leave_one_out_baseline
        train_reinforce(policy, task, lr=LR[method], baseline=baseline, on_step=on_step, **loop)
    seconds = time.process_time() - start - measuring
    return {"seed": seed, "method": method, "scores": scores, "fraction": curve, "cpu_s": round(seconds, 1)}


def main() -> None:
    """Run PPO alone, or everything and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    runs = []
    for scores in NOISE if arguments.write else ("structured",):
        for method in ("ppo", *LR) if arguments.write else ("ppo",):
            for seed in range(arguments.seeds):
                runs.append(run(method, scores, seed))
                print(method, scores, seed, runs[-1]["fraction"][-1], f"{runs[-1]['cpu_s']} s", flush=True)
    finals = [r["fraction"][-1] for r in runs if r["method"] == "ppo" and r["scores"] == "structured"]
    print(f"PPO: median {statistics.median(finals):.4f}, worst {min(finals):.4f}")
    if arguments.write:
        out = shipped.provenance("python benchmarks/ppo_exact.py --write", arguments.date) | {
            "samples_per_prompt": GROUP,
            "steps": [0, *range(EVERY, STEPS + 1, EVERY)],
            "lr": {"ppo": CONFIG.lr, **LR},
            "ppo": {"epochs": CONFIG.num_ppo_epochs, "minibatches": CONFIG.num_mini_batches, "anneal": CONFIG.anneal},
            "seconds": "cpu_s: processor time on one thread, without measuring",
            "runs": runs,
        }
        shipped.write(OUT, out)
    sys.exit(statistics.median(finals) < MEDIAN or min(finals) < WORST)


if __name__ == "__main__":
    main()
