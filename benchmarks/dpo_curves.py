"""DPO on the reviews, against PPO with the same labels and compute, and against DPO on fresh pairs (chapter 7).

    python benchmarks/dpo_curves.py                       # one seed of offline DPO; writes nothing
    python benchmarks/dpo_curves.py --write               # everything; writes the data file, about 25 minutes
    python benchmarks/dpo_curves.py --write --part online # one part: see PARTS

Every run starts from the committed SFT model and has 4,000 labels of the annotators. Offline DPO and PPO share them: a
seed takes 4,000 of a pool of comparisons between samples of the SFT model and labels them afresh. PPO fits its own
reward model to them first. Online DPO labels 8 times 500 fresh pairs of its own current samples. Compute is counted in
tokens that went through a transformer of the policy's size, three times where a gradient followed; measurements do not
count. On the way the policy writes reviews to the same held-out prompts (gold score, KL from the SFT model in nats per
response, length, share that is no text of the grammar), and is asked about held-out pairs: expected accuracy of the
implicit rewards, their margin, and the log-probability of chosen and rejected responses. The plain run fails if the
gold score does not rise.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import rlhf_curves
import shipped
import torch
from rlhf_curves import CONFIG, proxy_of
from shipped import DATA, rounded
from torch import Tensor

from rlhfkit import reviews
from rlhfkit.collect import ReviewTask, draw_comparisons
from rlhfkit.models import GPT, ScalarModel
from rlhfkit.reviews import Annotators, decode_responses, encode_pairs
from rlhfkit.tasks import Pair
from rlhfkit.train_policy import train_ppo
from rlhfkit.train_preference import pair_logprobs, score_responses, train_dpo, train_reward_model

OUT = DATA / "ch07_dpo.json"
POOL, LABELS, HELD_OUT_PAIRS = 8_000, 4_000, 300
BETA, STEPS, BATCH = 0.1, 600, 32
DPO: dict[str, float] = {"beta": 0.3, "lr": 1e-4}  # of offline DPO: the best of the tuning
REWARD_STEPS, REWARD_LR, PPO_STEPS, PROMPTS = 250, 3e-4, 40, 128
ROUNDS, ONLINE_LR = 8, 2e-4
TUNING_SEED = 100  # not among those shown
TUNING = [{"beta": 0.1, "lr": 5e-5}, {"beta": 0.1, "lr": 2e-4}, {"beta": 0.3, "lr": 1e-4}, {"beta": 0.03, "lr": 2e-4}]


class World(rlhf_curves.World):
    """What all runs share: models and prompts of chapter 6, comparisons to label, and held-out ones to ask about."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(70)
        comparisons = draw_comparisons(self.sft, HELD_OUT_PAIRS + POOL, generator)
        self.pool, held_out = comparisons[HELD_OUT_PAIRS:], comparisons[:HELD_OUT_PAIRS]
        self.pairs = encode_pairs([c.pair("first") for c in held_out])
        self.p_first = torch.tensor([Annotators().probability(c) for c in held_out], dtype=torch.float64)
        self.ref_pairs = pair_logprobs(self.sft, *self.pairs)
        self.ceiling = Annotators().ceiling(held_out)

    def draw(self, seed: int) -> list[Pair]:
        """The labels of a seed: a random part of the pool, judged afresh."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.pool), generator=generator)[:LABELS].tolist()
        return Annotators().label([self.pool[i] for i in order], generator)

    def accuracy_of(self, reward: ScalarModel) -> float:
        """Expected accuracy of a reward model on the held-out pairs."""
        prompts, first, second = self.pairs
        gap = score_responses(reward, prompts, first) - score_responses(reward, prompts, second)
        return float(torch.where(gap > 0, self.p_first, 1 - self.p_first).mean())

    def ask(self, policy: GPT) -> dict[str, float]:
        """What a policy says about the held-out pairs; labels enter with their exact probabilities."""
        first, second = (x.double() for x in pair_logprobs(policy, *self.pairs))
        ref_first, ref_second = (x.double() for x in self.ref_pairs)
        gap, p = (first - ref_first) - (second - ref_second), self.p_first
        right = torch.where(gap > 0, p, torch.where(gap < 0, 1 - p, 0.5))
        numbers = {"accuracy": right, "margin": (2 * p - 1) * gap}  # margin without beta, nats
        numbers |= {"chosen": p * first + (1 - p) * second, "rejected": p * second + (1 - p) * first}
        return {name: float(x.mean()) for name, x in numbers.items()}


class Meter:
    """Tokens that went through a transformer: once for a look, three times where a gradient followed."""

    def __init__(self) -> None:
        self.tokens, self.running = 0, True

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Count inside of the block."""
        hidden = GPT.hidden

        def counted(model: GPT, tokens: Tensor, *args: Any) -> Tensor:
            if self.running:
                self.tokens += tokens.numel() * (3 if torch.is_grad_enabled() else 1)
            return hidden(model, tokens, *args)

        GPT.hidden = counted  # type: ignore[method-assign]
        try:
            yield
        finally:
            GPT.hidden = hidden  # type: ignore[method-assign]


class Watch:
    """The rows of one run's curve."""

    def __init__(self, world: World, policy: GPT, meter: Meter) -> None:
        self.world, self.policy, self.meter = world, policy, meter
        self.rows: list[dict[str, float]] = []
        self.judge, self.seconds, self.started = proxy_of(world.reward), 0.0, time.process_time()

    def look(self, step: int) -> None:
        """Measure; the time and the tokens this takes are not the run's."""
        self.seconds += time.process_time() - self.started
        self.meter.running = False
        row = {"step": step, "compute": self.meter.tokens / 1e6, "seconds": round(self.seconds, 1)}
        self.rows.append(row | self.world.measure(self.policy, self.judge) | self.world.ask(self.policy))
        self.meter.running, self.started = True, time.process_time()

    def every(self, steps: int, offset: int = 0) -> Callable[[int, dict[str, float]], None]:
        """A callback that looks after every so many steps."""
        return lambda step, metrics: self.look(offset + step + 1) if (step + 1) % steps == 0 else None

    def curve(self, seed: int) -> dict[str, Any]:
        """All columns, and three reviews."""
        columns = {name: [row[name] for row in self.rows] for name in self.rows[0]}
        names = ("compute", "seconds", "gold", "kl", "broken", "accuracy", "chosen", "rejected")
        texts = [response for _, response in decode_responses(self.world.sample(self.policy, 3))]
        print(seed, {name: round(columns[name][-1], 3) for name in names}, texts[0], flush=True)
        return {"seed": seed} | columns | {"samples": texts}


def offline(
    world: World, seed: int, beta: float = DPO["beta"], lr: float = DPO["lr"], steps: int = STEPS, every: int = 100
) -> dict[str, Any]:
    """DPO on the labels of a seed."""
    policy, meter = copy.deepcopy(world.sft), Meter()
    watch = Watch(world, policy, meter)
    with meter.attached():
        watch.look(0)
        pairs, on_step = encode_pairs(world.draw(seed)), watch.every(every)
        train_dpo(
            policy, world.sft, *pairs, steps=steps, beta=beta, batch_size=BATCH, lr=lr, seed=seed, on_step=on_step
        )
    return watch.curve(seed)


def with_ppo(world: World, seed: int, beta: float = BETA) -> dict[str, Any]:
    """A reward model on the same labels, and PPO against it."""
    policy, meter = copy.deepcopy(world.sft), Meter()
    watch = Watch(world, policy, meter)
    with meter.attached():
        watch.look(0)
        torch.manual_seed(seed)
        reward, pairs = ScalarModel(copy.deepcopy(world.sft)), encode_pairs(world.draw(seed))
        train_reward_model(reward, *pairs, steps=REWARD_STEPS, batch_size=BATCH, lr=REWARD_LR, seed=seed)
        watch.judge, reward_accuracy = proxy_of(reward), world.accuracy_of(reward)
        task = ReviewTask(world.sft, watch.judge, beta, PROMPTS)
        generator, value = torch.Generator().manual_seed(seed), ScalarModel(policy, head_std=0.0)
        on_step = watch.every(8)
        train_ppo(policy, value, task, steps=PPO_STEPS, config=CONFIG, generator=generator, on_step=on_step)
    return watch.curve(seed) | {"reward_accuracy": reward_accuracy}


def online(world: World, seed: int, beta: float = BETA, lr: float = ONLINE_LR) -> dict[str, Any]:
    """DPO in rounds: each has its own comparisons, of samples of the policy as it is, and as many labels in all."""
    policy, meter = copy.deepcopy(world.sft), Meter()
    watch, generator = Watch(world, policy, meter), torch.Generator().manual_seed(seed)
    with meter.attached():
        watch.look(0)
        for i in range(ROUNDS):
            comparisons = draw_comparisons(policy, LABELS // ROUNDS, generator)
            pairs = encode_pairs(Annotators().label(comparisons, generator))
            steps = STEPS // ROUNDS
            settings: dict[str, Any] = {"beta": beta, "batch_size": BATCH, "lr": lr, "seed": seed + 1_000 * i}
            train_dpo(policy, world.sft, *pairs, steps=steps, warmup=5, **settings)
            watch.look((i + 1) * steps)
    return watch.curve(seed)


PARTS: dict[str, Callable[[World, int], dict[str, Any]]] = {"ppo": with_ppo, "online": online, "dpo": offline}


def main() -> None:
    """Run one seed of offline DPO, or with ``--write`` remake the data file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--part", choices=[*PARTS, "tuning"], action="append")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    reviews.gold_score = functools.cache(reviews.gold_score)  # a response is judged once
    world = World()
    if not arguments.write:
        gold = offline(world, 0)["gold"]
        sys.exit(gold[-1] <= gold[0])
    for part in arguments.part or [*PARTS, "tuning"]:
        print(part, flush=True)
        start = time.process_time()
        if part == "tuning":
            runs = [rounded(offline(world, TUNING_SEED, every=STEPS, **x) | x, 4) for x in TUNING]
        else:
            runs = [rounded(PARTS[part](world, seed), 4) for seed in range(arguments.seeds)]
        seconds = round(time.process_time() - start)
        out = shipped.read(OUT) | shipped.provenance("python benchmarks/dpo_curves.py --write", arguments.date)
        out["seeds"] = arguments.seeds
        settings = {"beta": BETA, "labels": LABELS, "steps": STEPS, "batch_size": BATCH, "dpo": DPO}
        settings |= {"rounds": ROUNDS, "online_lr": ONLINE_LR, "tuning_seed": TUNING_SEED}
        settings |= {"reward_steps": REWARD_STEPS, "reward_lr": REWARD_LR, "ppo_steps": PPO_STEPS, "prompts": PROMPTS}
        out["settings"], out["ceiling"] = settings, rounded(world.ceiling, 4)
        out[part] = {"cpu_s": seconds, "runs": runs}
        shipped.write(OUT, out)
        gains = [run["gold"][-1] - run["gold"][0] for run in runs]
        print(f"{part}: gold gain {statistics.mean(gains):.3f}, spread {statistics.pstdev(gains):.3f}, {seconds} s")


if __name__ == "__main__":
    main()
