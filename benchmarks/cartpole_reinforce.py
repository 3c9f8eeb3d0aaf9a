"""Policy gradient on CartPole-v1 with a learned baseline, a batch-mean baseline and none: the curves of chapter 3.

    python benchmarks/cartpole_reinforce.py                      # does every seed solve, and how fast? writes nothing
    python benchmarks/cartpole_reinforce.py --write              # everything; writes the data file, about 15 minutes
    python benchmarks/cartpole_reinforce.py --write --part runs  # one part of the file: runs, noise or bugs

Each run stops when the last 100 finished episodes average 475, or after 100 rollouts of 32 x 128 steps. Every variant
is run at each of the learning rates; the curves kept are those of its best one: most seeds solved, then the shortest
worst run.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import gymnasium
import torch
from torch import Tensor

from rlhfkit import control, train_control
from rlhfkit.advantages import gae
from rlhfkit.logprobs import token_logprobs
from rlhfkit.masked import aggregate, masked_mean
from rlhfkit.policy_losses import reinforce_loss

NUM_ENVS, LENGTH, STEPS, GAMMA, SOLVED = 32, 128, 100, 0.98, 475.0
LEARNING_RATES = (3e-3, 1e-2, 3e-2)
VARIANTS: dict[str, dict[str, Any]] = {
    "value": {"use_value": True},
    "batch-mean": {"use_value": False, "whiten_advantages": True},
    "none": {"use_value": False},
}
METRICS = ("rollout/ep_rew_mean", "train/explained_variance", "loss/value")
OUT = Path(__file__).resolve().parents[1] / "chapters" / "data" / "cartpole_reinforce.json"


def run(seed: int, *, use_value: bool, stop_at: float | None = SOLVED, **settings: Any) -> tuple[dict[str, Any], Any]:
    """One training run, and what the frozen final policy earns on 100 fresh episodes."""
    generator = torch.Generator().manual_seed(seed)
    policy, value = control.PolicyNetwork(generator=generator), control.ValueNetwork(generator=generator)
    log: list[dict[str, float]] = []
    wall, cpu = time.perf_counter(), time.process_time()
    train_control.train_cartpole_reinforce(
        policy,
        value if use_value else None,
        control.make_cartpole(NUM_ENVS),
        **{"steps": STEPS, "rollout_length": LENGTH, "gamma": GAMMA} | settings,
        stop_at=stop_at,
        generator=generator,
        on_step=lambda _, metrics: log.append(metrics),
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    score = control.evaluate_policy(policy, control.make_cartpole(100), generator=generator)
    solved = next((m["time/total_timesteps"] for m in log if m["rollout/ep_rew_mean"] >= SOLVED), None)
    record: dict[str, Any] = {
        "seed": seed,
        "solved_at": None if solved is None else int(solved),
        "wall_s": round(wall, 1),
        "cpu_s": round(cpu, 1),
        "evaluation": round(score.mean().item(), 1),
        "timesteps": [int(m["time/total_timesteps"]) for m in log],
    }
    for name in METRICS:
        if name in log[0]:
            # NaN before 100 episodes have finished
            record[name] = [None if math.isnan(m[name]) else round(m[name], 3) for m in log]
    return record, (policy, value)


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """How many seeds solved, in how many steps; unsolved runs count as infinitely long in the median."""
    steps = sorted(r["solved_at"] or float("inf") for r in runs)
    middle = statistics.median(steps)
    return {
        "solved": sum(r["solved_at"] is not None for r in runs),
        "seeds": len(runs),
        "median_steps": None if middle == float("inf") else int(middle),
        "worst_steps": None if steps[-1] == float("inf") else int(steps[-1]),
        "cpu_s": round(sum(r["cpu_s"] for r in runs), 1),
        "wall_s": round(sum(r["wall_s"] for r in runs), 1),
        "evaluation": [r["evaluation"] for r in runs],
    }


def compare(seeds: int, out: dict[str, Any]) -> None:
    """Every variant at every learning rate; the curves of each variant's best."""
    out["sweep"], out["runs"] = [], {}
    for name, variant in VARIANTS.items():
        tried = {}
        for lr in LEARNING_RATES:
            runs = [run(seed, lr=lr, **variant)[0] for seed in range(seeds)]
            tried[lr] = summary(runs), runs
            out["sweep"].append({"variant": name, "lr": lr} | tried[lr][0])
            print(name, lr, tried[lr][0], flush=True)
        best = max(tried, key=lambda lr: (tried[lr][0]["solved"], -(tried[lr][0]["worst_steps"] or float("inf"))))
        out["runs"][name] = {"lr": best, "runs": tried[best][1]}


def with_endings(edit_dones: Any = None, bootstrap: str = "truncated") -> Any:
    """``rollout_advantages`` with its flags edited: the planted bugs of the lab."""

    def rollout_advantages(
        rollout: control.ControlRollout, values: Tensor, *, gamma: float, lam: float
    ) -> tuple[Tensor, Tensor]:
        dones = rollout.terminated | rollout.truncated
        ends = {"truncated": rollout.truncated, "nothing": torch.zeros_like(dones), "all": dones}[bootstrap]
        rewards = rollout.rewards + torch.where(ends, gamma * values[:, 1:], 0.0)
        dones = dones if edit_dones is None else edit_dones(dones)
        return gae(
            rewards, values[:, :-1], gamma=gamma, lam=lam, mask=rollout.mask, dones=dones, last_values=values[:, -1]
        )

    return rollout_advantages


def one_late(dones: Tensor) -> Tensor:
    """Flags moved to the following step, which is the reset row."""
    return torch.cat([torch.zeros_like(dones[:, :1]), dones[:, :-1]], 1)


def one_early(dones: Tensor) -> Tensor:
    """Flags moved to the step before."""
    return torch.cat([dones[:, 1:], torch.zeros_like(dones[:, :1])], 1)


BUGS = {
    "correct": with_endings(),
    "dones one step late": with_endings(one_late),
    "dones one step early": with_endings(one_early),
    "truncation as termination": with_endings(bootstrap="nothing"),
    "bootstrap through terminal": with_endings(bootstrap="all"),
}


def compare_bugs(seeds: int, out: dict[str, Any]) -> None:
    """Each bug for 50 rollouts, not stopped early, and V at the start of an episode beside what it should be.

    The last rollouts' policy is frozen and played on; "true" is its mean discounted return, over 500 steps, from the
    starts of 100 fresh episodes (at gamma 0.98 a perfect one is worth 50).
    """
    out["bugs"] = {}
    for name, wrong in BUGS.items():
        runs = []
        for seed in range(seeds):
            with mock.patch.object(train_control, "rollout_advantages", wrong):
                record, (policy, value) = run(seed, use_value=True, stop_at=None, steps=50)
            generator = torch.Generator().manual_seed(1000 + seed)
            rollout = control.Player(control.make_cartpole(100), generator=generator).play(policy, 500)
            ended = (rollout.terminated | rollout.truncated).long()
            alive = ended.cumsum(1) - ended == 0
            true = torch.where(alive, GAMMA ** torch.arange(500.0), 0.0).sum(1).mean().item()
            with torch.no_grad():
                guess = value(rollout.observations)
            record["value_at_start"] = round(guess[:, 0].mean().item(), 1)
            record["true_value_at_start"] = round(true, 1)
            fell = rollout.terminated & alive
            record["value_where_pole_fell"] = round(masked_mean(guess[:, 1:], fell).item(), 1) if fell.any() else None
            runs.append(record)
        out["bugs"][name] = runs
        print(
            name,
            summary(runs),
            [r["solved_at"] for r in runs],
            [r["rollout/ep_rew_mean"][-1] for r in runs],
            flush=True,
        )
        for key in ("train/explained_variance", "loss/value"):
            print("   ", key, [[r[key][i] for i in (9, 24, 49)] for r in runs])
        for key in ("value_at_start", "true_value_at_start", "value_where_pole_fell"):
            print("   ", key, [r[key] for r in runs], flush=True)


def gradient_noise(seeds: int, batches: int, out: dict[str, Any]) -> None:
    """Variance of the policy gradient of one rollout, summed over the parameters, at a fixed half-trained policy."""
    out["gradient_variance"] = []
    for seed in range(seeds):
        _, (policy, value) = run(seed, use_value=True, stop_at=150.0, lr=1e-2)
        player = control.Player(control.make_cartpole(NUM_ENVS), generator=torch.Generator().manual_seed(2000 + seed))
        for _ in range(4):  # so that the environments are no longer in step
            player.play(policy, LENGTH)
        gradients: dict[str, list[Tensor]] = {"value": [], "batch-mean": [], "none": [], "none, V at cuts": []}
        for _ in range(batches):
            rollout = player.play(policy, LENGTH)
            logprobs = token_logprobs(policy(rollout.observations[:, :-1]), rollout.actions)
            with torch.no_grad():
                values = value(rollout.observations)
            advantages, returns = control.rollout_advantages(rollout, values, gamma=GAMMA, lam=1.0)
            plain, _ = control.rollout_advantages(rollout, torch.zeros_like(values), gamma=GAMMA, lam=1.0)
            centred = plain - masked_mean(plain, rollout.mask)
            for name, weights in zip(gradients, (advantages, centred, plain, returns), strict=True):
                loss = aggregate(reinforce_loss(logprobs, weights), rollout.mask, "token-mean")
                parts = torch.autograd.grad(loss, list(policy.parameters()), retain_graph=True)
                gradients[name].append(torch.cat([g.flatten() for g in parts]).double())
        stacks = {name: torch.stack(g) for name, g in gradients.items()}
        row: dict[str, Any] = {"seed": seed, "batches": batches}
        row["variance"] = {name: float(f"{g.var(0).sum().item():.4g}") for name, g in stacks.items()}
        row["mean_norm"] = {name: float(f"{g.mean(0).norm().item():.4g}") for name, g in stacks.items()}
        row["ratio_none_to_value"] = round(row["variance"]["none, V at cuts"] / row["variance"]["value"], 2)
        out["gradient_variance"].append(row)
        print(row, flush=True)


def main() -> None:
    """Check that every seed solves with the learned baseline, or with ``--write`` remake the data file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--part", choices=("runs", "noise", "bugs"), action="append")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if not arguments.write:
        runs = [run(seed, use_value=True, lr=1e-2)[0] for seed in range(arguments.seeds)]
        print(torch.backends.cpu.get_cpu_capability(), summary(runs), [r["solved_at"] for r in runs])
        sys.exit(any(r["solved_at"] is None for r in runs))
    out: dict[str, Any] = {
        "command": "python benchmarks/cartpole_reinforce.py --write",
        "date": arguments.date,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "gymnasium": gymnasium.__version__,
        },
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "seconds": "cpu_s: processor time of this process; wall_s: by the clock, with whatever else the machine did",
        "settings": {
            "num_envs": NUM_ENVS,
            "rollout_length": LENGTH,
            "steps": STEPS,
            "gamma": GAMMA,
            "lam": 1.0,
            "value_lr": 1e-2,
            "value_steps": 10,
            "networks": "separate, tanh 64-64, orthogonal",
            "optimiser": "Adam, one policy step per rollout",
            "solved": "mean return of the last 100 finished episodes >= 475",
        },
    }
    old = json.loads(OUT.read_text()) if arguments.part and OUT.exists() else {}
    parts = {
        "runs": lambda: compare(arguments.seeds, out),
        "noise": lambda: gradient_noise(5, 100, out),
        "bugs": lambda: compare_bugs(5, out),
    }
    for part in arguments.part or ("noise", "bugs", "runs"):
        parts[part]()
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(old | out, separators=(",", ":")).replace('{"seed"', '\n{"seed"') + "\n")
    print(f"{OUT.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
