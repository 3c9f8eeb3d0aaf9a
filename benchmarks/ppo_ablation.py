"""Which details of PPO matter, and which cannot be told from chance: one changed at a time, the same seeds on all.

    python benchmarks/ppo_ablation.py                             # two seeds of everything, nothing written
    python benchmarks/ppo_ablation.py --world cartpole --write    # ten seeds; writes chapters/data/ch04_ablation.json

The rule, fixed before the runs: each variant is compared with the base on the same seeds. A difference counts where
its mean over the seeds is further from 0 than two standard errors of that mean; otherwise the verdict is "no measurable
effect". By chance alone that happens in about one of thirteen comparisons with ten seeds (Student's t, nine degrees of
freedom), so a verdict just beyond the line among twenty is no finding.

CartPole-v1: 32 environments, 74 rollouts of 64 steps (150,000 steps), learning rate and clip range falling to 0 at the
end of them, no early stop. Measured are the steps until 100 consecutive episodes average 475 (the whole budget where
that never happens), and the mean return of the final policy, sampled, on 100 fresh episodes.

The exact world (``--world exact``): 50 batches of 256 samples for each of 4 prompts, a task and samples of its own for
every seed. Measured are the fraction of the optimum after half of the batches and at the end, by enumeration.
"""

from __future__ import annotations

import argparse
import datetime
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import shipped
import torch
from shipped import rounded
from torch import nn

OUT = shipped.DATA / "ch04_ablation.json"
NO_EFFECT = "no measurable effect"


@dataclass(frozen=True)
class World:
    """Where the variants are tried.

    Attributes:
        settings: what the base is, for the file.
        variants: name of each, and what it changes; the first changes nothing.
        run: from what is changed, and a seed, to the measures of one run.
        measures: name of each one that is judged, and the words for more of it and for less.
    """

    settings: dict[str, Any]
    variants: dict[str, dict[str, Any]]
    run: Callable[[dict[str, Any], int], dict[str, float]]
    measures: dict[str, tuple[str, str]]


def verdict(differences: list[float], words: tuple[str, str]) -> dict[str, Any]:
    """Mean paired difference, its standard error, and what the rule makes of them."""
    mean = statistics.mean(differences)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    effect = words[0] if mean > 0 else words[1]
    return {"difference": mean, "standard_error": error, "verdict": effect if abs(mean) > 2 * error else NO_EFFECT}


def cartpole() -> World:
    """The details of PPO on CartPole-v1."""
    from rlhfkit import control
    from rlhfkit.train_control import CARTPOLE, train_cartpole_ppo

    num_envs, length, steps = 32, 64, 74

    def as_torch_makes_them(network: nn.Module, seed: int) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            for layer in network.modules():
                if isinstance(layer, nn.Linear):
                    layer.reset_parameters()

    def run(changes: dict[str, Any], seed: int) -> dict[str, float]:
        changes = dict(changes)
        initialisation = changes.pop("initialisation", "policy head 0.01")
        gain = 1.0 if initialisation == "policy head 1" else 0.01
        generator = torch.Generator().manual_seed(seed)
        policy, value = control.cartpole_networks(generator=generator, policy_gain=gain)
        if initialisation == "torch":
            as_torch_makes_them(policy, 2 * seed)
            as_torch_makes_them(value, 2 * seed + 1)
        log: list[dict[str, float]] = []
        train_cartpole_ppo(
            policy,
            value,
            control.make_cartpole(num_envs),
            steps=steps,
            rollout_length=length,
            config=replace(CARTPOLE, **changes),
            generator=generator,
            on_step=lambda _, metrics: log.append(metrics),
        )
        score = control.evaluate_policy(policy, control.make_cartpole(100), generator=generator)
        solved = [i for i, metrics in enumerate(log) if metrics["rollout/ep_rew_mean"] >= 475]
        after = log[solved[0] if solved else -1]["time/total_timesteps"]
        lowest = min(metrics["rollout/ep_rew_mean"] for metrics in log[solved[0] if solved else -1 :])
        measures = {"steps": after, "solved": float(bool(solved)), "evaluation": score.mean().item()}
        metrics = {"approxkl": "policy/approxkl_avg", "clipfrac": "policy/clipfrac_avg"}
        means = {short: statistics.mean(m[name] for m in log) for short, name in metrics.items()}
        return measures | {"lowest_after": lowest} | means

    variants: dict[str, dict[str, Any]] = {
        "base": {},
        "advantages over the batch": {"whiten_advantages": "batch"},
        "advantages as they are": {"whiten_advantages": "no"},
        "value clipping at 0.2": {"cliprange_value": 0.2},
        "value clipping at 5": {"cliprange_value": 5.0},
        "Adam epsilon 1e-8": {"adam_eps": 1e-8},
        "policy head gain 1": {"initialisation": "policy head 1"},
        "torch's initialisation": {"initialisation": "torch"},
        "no annealing": {"anneal": False},
        "no shuffling": {"shuffle": False},
    }
    settings = {"num_envs": num_envs, "rollout_length": length, "steps": steps, "config": asdict(CARTPOLE)}
    return World(settings, variants, run, {"steps": ("slower", "faster"), "evaluation": ("better", "worse")})


def exact() -> World:
    """The same details, where they exist, on the book's exact world; what is reached is computed, not estimated."""
    from ppo_exact import CONFIG, fraction

    from rlhfkit.models import TabularValue
    from rlhfkit.tasks import random_task
    from rlhfkit.train_policy import train_ppo

    steps, group_size = 50, 256
    base = replace(CONFIG, num_ppo_epochs=4, num_mini_batches=4, lr=0.05)

    def run(changes: dict[str, Any], seed: int) -> dict[str, float]:
        task = random_task(seed=seed)
        policy, half = task.reference(), []
        train_ppo(
            policy,
            TabularValue(policy),
            task,
            steps=steps,
            group_size=group_size,
            config=replace(base, **changes),
            generator=torch.Generator().manual_seed(seed),
            on_step=lambda step, _: half.append(fraction(policy, task)) if step + 1 == steps // 2 else None,
        )
        return {"half": half[0], "fraction": fraction(policy, task)}

    variants: dict[str, dict[str, Any]] = {
        "base": {},
        "advantages over the minibatch": {"whiten_advantages": "minibatch"},
        "advantages as they are": {"whiten_advantages": "no"},
        "value clipping at 0.2": {"cliprange_value": 0.2},
        "Adam epsilon 1e-8": {"adam_eps": 1e-8},
        "no annealing": {"anneal": False},
        "no shuffling": {"shuffle": False},
        "gradient shortened to 0.5": {"max_grad_norm": 0.5},
        "no clipping": {"cliprange": 1e9},
        "one epoch": {"num_ppo_epochs": 1},
    }
    settings = {"group_size": group_size, "steps": steps, "config": asdict(base) | {"max_grad_norm": "inf"}}
    words = ("better", "worse")
    return World(settings, variants, run, {"half": words, "fraction": words})


WORLDS: dict[str, Callable[[], World]] = {"cartpole": cartpole, "exact": exact}


def compare(world: World, seeds: int, save: Callable[[dict[str, Any]], None]) -> None:
    """All variants, seed by seed; saves after every seed that leaves at least two of them."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in world.variants}
    start = time.process_time()
    for seed in range(seeds):
        for name, changes in world.variants.items():
            runs[name].append({"seed": seed} | world.run(changes, seed))
            print(name, rounded(runs[name][-1]), flush=True)
        if seed == 0:
            continue
        base = next(iter(runs.values()))
        verdicts = {
            name: {
                measure: verdict([x[measure] - b[measure] for x, b in zip(rows, base, strict=True)], words)
                for measure, words in world.measures.items()
            }
            for name, rows in list(runs.items())[1:]
        }
        out = {"settings": world.settings, "seeds": seed + 1, "variants": world.variants}
        save(out | {"cpu_s": round(time.process_time() - start), "verdicts": verdicts, "runs": runs})


def write(world: str, part: dict[str, Any], date: str) -> None:
    """One world's part of the file; the other parts stay."""
    command = f"python benchmarks/ppo_ablation.py --world {world} --write"
    shipped.write(OUT, shipped.read(OUT) | {world: shipped.provenance(command, date) | rounded(part)})


def main() -> None:
    """Run one world's variants, and print or write the verdicts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--world", choices=tuple(WORLDS), action="append", help="all without it")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    def save(world: str, part: dict[str, Any]) -> None:
        for name, verdicts in part["verdicts"].items():
            print(part["seeds"], "seeds:", name, rounded(verdicts), flush=True)
        if arguments.write:
            write(world, part, arguments.date)

    for world in arguments.world or WORLDS:
        compare(WORLDS[world](), arguments.seeds or (10 if arguments.write else 2), partial(save, world))


if __name__ == "__main__":
    main()
