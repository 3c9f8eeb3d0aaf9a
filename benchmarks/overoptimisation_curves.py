"""Over-optimisation on the reviews: gold and proxy against KL along best-of-n and along PPO (chapter 9).

    python benchmarks/overoptimisation_curves.py                  # best-of-n with two small judges; writes nothing
    python benchmarks/overoptimisation_curves.py --write          # everything; writes the data file, about 45 minutes
    python benchmarks/overoptimisation_curves.py --write --part ppo --arm min    # one part, or some of its arms

The judges are the reward models of chapter 5: the same comparisons, labels and recipe for a seed and a number of pairs.
Beside them stand ensembles (same pairs, other heads and orders) and judges whose annotators like long reviews. Every
score has the judge's mean over reviews of the SFT model subtracted, so that curves start at 0. Best-of-n is computed
for every n from one pool of samples per prompt, without drawing again: the best of n of the pool's K samples, averaged
over all subsets. PPO is chapter 6's, from the SFT model; `second` is the mean score by a judge of the same kind from
the next seed, which training does not see. The check without ``--write`` fails if the proxy does not rise with n.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import reward_curves
import rlhf_curves
import shipped
import torch
from rlhf_curves import CONFIG
from shipped import DATA, rounded
from torch import Tensor

from rlhfkit import reviews
from rlhfkit.collect import ReviewTask, draw_prompts, sample_reviews
from rlhfkit.kl import sequence_kl
from rlhfkit.models import GPT, ScalarModel
from rlhfkit.reviews import Annotators, decode_responses, gold_scores, review_grammar
from rlhfkit.sampling import response_logprobs
from rlhfkit.tasks import Rollout
from rlhfkit.train_policy import train_ppo
from rlhfkit.train_preference import score_responses

OUT = DATA / "ch09_overoptimisation.json"
SIZES = reward_curves.SIZES  # pairs: steps of training
ENSEMBLE, MEMBERS = 500, 3  # pairs that all members see, and how many members
LENGTH_PAIRS, LENGTH_BIAS = 2_000, 0.1  # nats of preference per word
POOL_PROMPTS, POOL = 32, 512
NS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
MEASURED = [1, 2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 28]  # steps of PPO after which the policy is measured
PROMPTS, HELD_OUT, BETA, BETA_PAIRS = 128, 256, 0.1, 500
ARMS = [*(f"pairs {count}" for count in SIZES), "length", "min", "mean"]

JOBS = [(part, arm, 0.0) for part in ("best_of_n", "ppo") for arm in ARMS]  # part, arm, beta
JOBS += [("ppo", f"pairs {BETA_PAIRS}", BETA)]

Judge = Callable[[Tensor, Tensor], Tensor]  # prompts and responses -> scores


def score_by_length(model: ScalarModel, prompts: Tensor, tokens: Tensor, pad_id: int) -> Tensor:
    """Scores in blocks of similar length, each as wide as its longest response."""
    order = (tokens != pad_id).sum(1).argsort()
    scores = torch.empty(len(tokens))
    for rows in order.split(256):
        width = max(int((tokens[rows] != pad_id).sum(1).max()), 1)
        scores[rows] = score_responses(model, prompts[rows], tokens[rows, :width])
    return scores.double()


class World(rlhf_curves.World):
    """Policies are measured as in chapter 6 on fewer prompts; reward models are made as in chapter 5."""

    def __init__(self, comparisons: int = reward_curves.POOL) -> None:
        super().__init__()
        self.prompts = self.prompts[:HELD_OUT]
        self.labels = reward_curves.World(comparisons)
        self.pad_id = self.sft.config.pad_id
        generator = torch.Generator().manual_seed(90)
        prompts = draw_prompts(POOL_PROMPTS, generator).repeat_interleave(POOL, 0)
        self.pool = sample_reviews(self.sft, prompts, generator)
        texts = decode_responses(self.pool)
        self.pool_gold = torch.tensor([reviews.gold_score(*pair) for pair in texts], dtype=torch.float64)
        self.pool_broken = torch.tensor([not review_grammar().accepts(" ".join(t)) for t in texts]).double()
        self.pool_length = self.pool.response_mask.sum(1).double()
        distinct = [len(set(texts[i : i + POOL])) for i in range(0, len(texts), POOL)]
        self.pool_facts = {"distinct": sum(distinct) / len(texts), "largest": float(self.pool.logprobs.sum(1).max())}

    def judge(self, models: Sequence[ScalarModel], rule: str) -> Judge:
        """Mean or minimum of the models' centred scores; each, and the result, has mean 0 on reviews of the SFT."""

        def each(prompts: Tensor, tokens: Tensor) -> Tensor:
            return torch.stack([score_by_length(model, prompts, tokens, self.pad_id) for model in models])

        def combine(centred: Tensor) -> Tensor:
            return centred.mean(0) if rule == "mean" else centred.min(0).values

        prompts, tokens = self.labels.candidates
        known = each(prompts[::8], tokens[::8])
        centre = known.mean(1, keepdim=True)
        zero = combine(known - centre).mean()
        return lambda prompts, tokens: combine(each(prompts, tokens) - centre) - zero

    def place(self, policy: GPT, judge: Judge, second: Judge) -> dict[str, float]:
        """Where a policy stands."""
        rollout = self.sample(policy, len(self.prompts))
        with torch.no_grad():
            ref_logprobs = response_logprobs(self.sft, rollout.prompts, rollout.tokens)
        texts = [" ".join(pair) for pair in decode_responses(rollout)]
        numbers = {
            "gold": gold_scores(rollout),
            "proxy": judge(rollout.prompts, rollout.tokens),
            "second": second(rollout.prompts, rollout.tokens),
            "kl": sequence_kl(rollout.logprobs, ref_logprobs, rollout.response_mask),
            "length": rollout.response_mask.sum(1).double(),
            "broken": torch.tensor([not review_grammar().accepts(text) for text in texts]).double(),
        }
        return {name: float(x.mean()) for name, x in numbers.items()}


@functools.cache
def judge_of(world: World, arm: str, seed: int) -> Judge:
    """The judge of an arm and a seed."""
    labels, train, labelled = world.labels, reward_curves.train, reward_curves.labelled
    if arm in ("mean", "min"):
        return world.judge(members(world, seed), arm)
    if arm == "length":
        pairs = labelled(labels, LENGTH_PAIRS, seed, Annotators(length_bias=LENGTH_BIAS))
        return world.judge([train(labels, pairs, SIZES[LENGTH_PAIRS], seed)], "mean")
    count = int(arm.split()[1])
    return world.judge([train(labels, labelled(labels, count, seed, Annotators()), SIZES[count], seed)], "mean")


@functools.cache
def members(world: World, seed: int) -> list[ScalarModel]:
    """Reward models that saw the same pairs in other orders, from other heads."""
    pairs = reward_curves.labelled(world.labels, ENSEMBLE, seed, Annotators())
    seeds = [1000 * (seed + 1) + k for k in range(MEMBERS)]
    return [reward_curves.train(world.labels, pairs, SIZES[ENSEMBLE], s) for s in seeds]


def subset_weights(scores: Tensor, n: int) -> Tensor:
    """Probability that each of K samples is the best of n drawn from them without replacement.

    (C(F, n) - C(G, n)) / C(K, n) / (F - G), with F = samples that score no more, G = samples that score less; tied
    samples share alike. The weighted mean of anything is an unbiased estimate of its mean under best-of-n.

    Args:
        scores: (P, K).
        n: number of draws, in [1, K].

    Returns:
        (P, K), each row adds up to 1.

    Source: Hilton and Gao 2022, "Measuring Goodhart's law", there without ties.
    """
    ordered = scores.sort(1).values
    at_most = torch.searchsorted(ordered, scores, right=True).double()
    below = torch.searchsorted(ordered, scores).double()

    def log_choose(count: Tensor) -> Tensor:
        enough = count >= n
        some = torch.where(enough, count, torch.full_like(count, float(n)))
        log = torch.lgamma(some + 1) - torch.lgamma(some - n + 1)
        return torch.where(enough, log, torch.full_like(log, -math.inf))

    whole = log_choose(torch.tensor([float(scores.shape[1])], dtype=torch.float64))
    return ((log_choose(at_most) - whole).exp() - (log_choose(below) - whole).exp()) / (at_most - below)


def best_of_n(world: World, arm: str, seed: int) -> dict[str, Any]:
    """Means under best-of-n by one judge, for every n."""
    shape = POOL_PROMPTS, POOL
    proxy = judge_of(world, arm, seed)(world.pool.prompts, world.pool.tokens).view(shape)
    columns = {"gold": world.pool_gold, "length": world.pool_length, "broken": world.pool_broken, "proxy": proxy}
    weights = [subset_weights(proxy, n) for n in NS]
    means = {name: [float((w * x.view(shape)).sum(1).mean()) for w in weights] for name, x in columns.items()}
    print(arm, seed, rounded(means["gold"], 3), flush=True)
    return {"seed": seed, "arm": arm, "ties": float((proxy.sort(1).values.diff() == 0).double().mean())} | means


def ppo(world: World, arm: str, seed: int, seeds: int, beta: float = 0.0) -> dict[str, Any]:
    """One run of PPO, measured along the way."""
    judge, second = judge_of(world, arm, seed), judge_of(world, arm, (seed + 1) % seeds)
    policy = copy.deepcopy(world.sft)
    value = ScalarModel(policy, head_std=0.0)  # shares the trunk
    rows = [world.place(policy, judge, second)]

    def score(rollout: Rollout) -> Tensor:
        return judge(rollout.prompts, rollout.tokens).float()

    def on_step(step: int, metrics: dict[str, float]) -> None:
        if step + 1 in MEASURED:
            rows.append(world.place(policy, judge, second))

    start, generator = time.process_time(), torch.Generator().manual_seed(seed)
    task = ReviewTask(world.sft, score, beta, PROMPTS)
    train_ppo(policy, value, task, steps=MEASURED[-1], config=CONFIG, generator=generator, on_step=on_step)
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    texts = [response for _, response in decode_responses(world.sample(policy, 2))]
    peak = max(columns["gold"])
    print(arm, beta, seed, rounded(rows[-1], 3), f"peak {peak:.2f}, {time.process_time() - start:.0f} s", texts[0])
    sys.stdout.flush()
    return {"seed": seed, "arm": arm, "beta": beta} | columns | {"samples": texts}


def facts_of_pool(world: World) -> dict[str, Any]:
    """What every judge chooses from, and what the gold score itself would choose."""
    gold = world.pool_gold.view(POOL_PROMPTS, POOL)
    by_gold = [float((subset_weights(gold, n) * gold).sum(1).mean()) for n in NS]
    return {"n": NS, "by_gold": by_gold, "pool": world.pool_facts}


def main() -> None:
    """Best-of-n with two small judges, or with ``--write`` remake the data file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--part", choices=["best_of_n", "ppo"], action="append")
    parser.add_argument("--arm", choices=[*ARMS, "beta"], action="append")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    reviews.gold_score = functools.cache(reviews.gold_score)  # a response is judged once
    start = time.process_time()
    world = World(reward_curves.POOL if arguments.write else 600)
    print(f"drawn in {time.process_time() - start:.0f} s", rounded(world.pool_facts), flush=True)
    if not arguments.write:
        proxies = [best_of_n(world, arm, 0)["proxy"] for arm in ("pairs 125", "pairs 500")]
        sys.exit(any(proxy[-1] <= proxy[0] for proxy in proxies))
    settings = {"sizes": list(SIZES), "ensemble": {"pairs": ENSEMBLE, "members": MEMBERS}, "beta": BETA}
    settings |= {"length": {"pairs": LENGTH_PAIRS, "bias": LENGTH_BIAS}, "beta_pairs": BETA_PAIRS, "prompts": PROMPTS}
    settings |= {"held_out": HELD_OUT, "pool_prompts": POOL_PROMPTS, "pool": POOL, "lr": CONFIG.lr}
    out = shipped.read(OUT)
    out |= shipped.provenance("python benchmarks/overoptimisation_curves.py --write", arguments.date)
    out |= {"seeds": arguments.seeds, "settings": settings}
    seeds = range(arguments.seeds)
    for part, arm, beta in JOBS:
        if part not in (arguments.part or [part]) or ("beta" if beta else arm) not in (arguments.arm or [arm, "beta"]):
            continue
        start = time.process_time()
        if part == "best_of_n":
            runs = [best_of_n(world, arm, seed) for seed in seeds]
        else:
            runs = [ppo(world, arm, seed, arguments.seeds, beta) for seed in seeds]
        head = facts_of_pool(world) if part == "best_of_n" else {"steps": [0, *MEASURED]}
        old = out.get(part, {"cpu_s": 0, "runs": []})
        kept = [run for run in old["runs"] if (run["arm"], run.get("beta", 0.0)) != (arm, beta)]
        seconds = old["cpu_s"] + round(time.process_time() - start)
        out[part] = rounded(head, 4) | {"cpu_s": seconds, "runs": kept + rounded(runs, 4)}
        shipped.write(OUT, out)


if __name__ == "__main__":
    main()
