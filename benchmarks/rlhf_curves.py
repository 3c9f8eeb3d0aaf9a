"""RLHF with PPO on the reviews: gold score against proxy, a reward that is hacked, and its repairs (chapter 6).

    python benchmarks/rlhf_curves.py                       # one seed of the main run; writes nothing
    python benchmarks/rlhf_curves.py --write               # everything; writes the data file, about 30 minutes
    python benchmarks/rlhf_curves.py --write --part main   # one part: see PARTS

Every run starts from the committed SFT model, with its own reward model or the committed one as the judge. A seed sets
prompts, samples and minibatches. Every 4 steps, and at the end, the policy writes reviews to the same held-out prompts:
their mean gold score, mean proxy score, mean KL from the SFT model (nats per response) and mean length are kept, and
the share of reviews that are no text of the grammar. The NLL is the policy's, per token, on held-out reviews of the
grammar. The plain run fails if in some seed the gold score does not rise.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import shipped
import torch
from shipped import DATA, rounded
from torch import Tensor

from rlhfkit import reviews
from rlhfkit.collect import ReviewTask, draw_comparisons, draw_prompts, sample_reviews
from rlhfkit.kl import sequence_kl
from rlhfkit.models import GPT, ScalarModel
from rlhfkit.ppo import PPOConfig
from rlhfkit.reviews import Annotators, decode_responses, encode_pairs, gold_scores, review_grammar
from rlhfkit.sampling import response_logprobs
from rlhfkit.tasks import Comparison, Rollout
from rlhfkit.train_policy import train_ppo
from rlhfkit.train_preference import response_nll, score_responses, train_reward_model

OUT = DATA / "ch06_rlhf.json"
BETA, STEPS, PROMPTS, EVERY = 0.1, 60, 128, 4
CONFIG = PPOConfig(lr=2e-4, num_ppo_epochs=4, num_mini_batches=2, vf_coef=0.1, cliprange_value=None)
HELD_OUT, PTX_COEF, SMALL_BETA = 512, 0.5, 0.02
SECOND_ROUND = {"pairs": 16_000, "new_pairs": 8_000, "steps": 750, "lr": 1e-3, "batch_size": 32}


class World:
    """What all runs share."""

    def __init__(self) -> None:
        self.sft = GPT.load(DATA / "reviews_sft.safetensors").eval()
        self.reward = ScalarModel.load(DATA / "reviews_reward.safetensors").eval()
        grammar, generator = review_grammar(), torch.Generator().manual_seed(60)
        self.prompts = draw_prompts(HELD_OUT, generator)
        self.text = grammar.sample_tokens(HELD_OUT, generator)
        self.pretraining = grammar.sample_tokens(8_000, generator)
        self.grammar_nll = self.nll(grammar)

    def nll(self, policy: Any) -> float:
        """Mean negative log-likelihood per token of held-out reviews of the grammar."""
        nll, mask = response_nll(policy, *self.text)
        return float(nll.sum() / mask.sum())

    def sample(self, policy: GPT, count: int = HELD_OUT, seed: int = 61) -> Rollout:
        """Reviews to the held-out prompts; the same random numbers for every policy."""
        return sample_reviews(policy, self.prompts[:count], torch.Generator().manual_seed(seed))

    def measure(self, policy: GPT, judge: Callable[[Rollout], Tensor]) -> dict[str, float]:
        """Where a policy stands."""
        rollout = self.sample(policy)
        with torch.no_grad():
            ref_logprobs = response_logprobs(self.sft, rollout.prompts, rollout.tokens)
        kl = sequence_kl(rollout.logprobs, ref_logprobs, rollout.response_mask)
        texts = [" ".join(pair) for pair in decode_responses(rollout)]
        numbers = {"gold": gold_scores(rollout), "proxy": judge(rollout), "kl": kl}
        numbers["length"] = rollout.response_mask.sum(1).double()
        numbers["broken"] = torch.tensor([not review_grammar().accepts(text) for text in texts]).double()
        return {name: float(x.mean()) for name, x in numbers.items()} | {"nll": self.nll(policy)}


def proxy_of(model: ScalarModel) -> Callable[[Rollout], Tensor]:
    """A reward model as the judge of a rollout."""
    return lambda rollout: score_responses(model, rollout.prompts, rollout.tokens)


def train(
    world: World,
    seed: int,
    beta: float = BETA,
    reward: ScalarModel | None = None,
    judge: Callable[[Rollout], Tensor] | None = None,
    config: PPOConfig = CONFIG,
    keep: list[GPT] | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """One run, measured along the way."""
    proxy = proxy_of(reward or world.reward)
    policy = copy.deepcopy(world.sft)
    value = ScalarModel(policy, head_std=0.0)  # shares the trunk
    task = ReviewTask(world.sft, judge or proxy, beta, PROMPTS)
    curve = [{"step": 0} | world.measure(policy, proxy)]

    def on_step(step: int, metrics: dict[str, float]) -> None:
        if (step + 1) % EVERY == 0:
            row = {"step": step + 1} | world.measure(policy, proxy)
            curve.append(row | {name: metrics[f"policy/{name}"] for name in ("approxkl_avg", "clipfrac_avg")})
            if keep is not None:
                keep.append(copy.deepcopy(policy))

    start = time.process_time()
    generator = torch.Generator().manual_seed(seed)
    train_ppo(policy, value, task, steps=STEPS, config=config, generator=generator, on_step=on_step, **settings)
    names = ("step", "gold", "proxy", "kl", "length", "broken", "nll")
    columns = {name: [row[name] for row in curve] for name in names}
    texts = [response for _, response in decode_responses(world.sample(policy, 3))]
    last = {name: round(columns[name][-1], 3) for name in names}
    print(seed, last, f"{time.process_time() - start:.0f} s", texts[0], flush=True)
    return {"seed": seed} | columns | {"samples": texts}


def no_reward(rollout: Rollout) -> Tensor:
    """The objective without its first term."""
    return torch.zeros(len(rollout.tokens))


@functools.cache
def second_round(world: World) -> ScalarModel:
    """A reward model that has also seen what a hacking policy writes, beside what the SFT model writes.

    Two thirds of the labels are as before; the others compare a review of the SFT model with one of a policy on its way
    to hacking the first reward model, at several points of that way. One model for all seeds, as the first one is.
    """
    snapshots: list[GPT] = []
    train(world, 1_000, beta=0.0, keep=snapshots)
    generator, annotators = torch.Generator().manual_seed(2_000), Annotators()
    comparisons = draw_comparisons(world.sft, SECOND_ROUND["pairs"], generator)
    each = SECOND_ROUND["new_pairs"] // len(snapshots)
    for policy in snapshots:
        prompts = draw_prompts(each, generator)
        ours = decode_responses(sample_reviews(world.sft, prompts, generator))
        theirs = decode_responses(sample_reviews(policy, prompts, generator))
        pairs = zip(ours, theirs, strict=True)
        comparisons += [Comparison(prompt, one, other) for (prompt, one), (_, other) in pairs if one != other]
    torch.manual_seed(0)
    model = ScalarModel(copy.deepcopy(world.sft))
    loop = {name: SECOND_ROUND[name] for name in ("steps", "lr", "batch_size")}
    train_reward_model(model, *encode_pairs(annotators.label(comparisons, generator)), seed=0, **loop)
    return model


PARTS: dict[str, Callable[[World, int], dict[str, Any]]] = {
    "main": train,  # reward and KL penalty
    "hacked": lambda world, seed: train(world, seed, beta=0.0),  # reward alone
    "three": lambda world, seed: train(world, seed, pretraining=world.pretraining, ptx_coef=PTX_COEF),
    "no_kl": lambda world, seed: train(world, seed, 0.0, pretraining=world.pretraining, ptx_coef=PTX_COEF),
    "no_reward": lambda world, seed: train(world, seed, judge=no_reward),
    "small_kl": lambda world, seed: train(world, seed, SMALL_BETA),
    "better_reward": lambda world, seed: train(world, seed, SMALL_BETA, reward=second_round(world)),
}


def main() -> None:
    """Run one seed of the main run, or with ``--write`` remake the data file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--part", choices=list(PARTS), action="append")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    reviews.gold_score = functools.cache(reviews.gold_score)  # a response is judged once
    world = World()
    if not arguments.write:
        gold = train(world, 0)["gold"]
        sys.exit(gold[-1] <= gold[0])
    for part in arguments.part or PARTS:
        print(part, flush=True)
        start = time.process_time()
        runs = [rounded(PARTS[part](world, seed), 4) for seed in range(arguments.seeds)]
        seconds = round(time.process_time() - start)
        out = shipped.read(OUT) | shipped.provenance("python benchmarks/rlhf_curves.py --write", arguments.date)
        out["seeds"] = arguments.seeds
        settings = {"beta": BETA, "steps": STEPS, "prompts": PROMPTS, "held_out": HELD_OUT, "ptx_coef": PTX_COEF}
        settings |= {"small_beta": SMALL_BETA, "lr": CONFIG.lr, "epochs": CONFIG.num_ppo_epochs}
        out["settings"] = settings | {"minibatches": CONFIG.num_mini_batches, "second_round": SECOND_ROUND}
        out["grammar_nll"] = rounded(world.grammar_nll, 4)
        out[part] = {"cpu_s": seconds, "runs": runs}
        shipped.write(OUT, out)
        gains = [run["gold"][-1] - run["gold"][0] for run in runs]
        print(f"{part}: gold gain {statistics.mean(gains):.3f}, spread {statistics.pstdev(gains):.3f}, {seconds} s")


if __name__ == "__main__":
    main()
