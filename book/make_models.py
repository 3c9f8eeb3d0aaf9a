"""Trains the models that later pages start from and writes them to ``chapters/data``: `make models`.

    python book/make_models.py [--only sft|reward] [--seeds 1] [--folder chapters/data]

Every file holds its recipe, its seed and what it reached, which ``tests/test_committed_models.py`` measures again. With
more seeds nothing is written: the gaps of all of them are printed.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhfkit.collect import draw_comparisons
from rlhfkit.grammar import ReviewGrammar
from rlhfkit.models import GPT, GPTConfig, ScalarModel
from rlhfkit.reviews import Annotators, encode_pairs, review_grammar
from rlhfkit.train_preference import response_nll, score_responses, train_reward_model, train_sft

FOLDER = Path(__file__).parents[1] / "chapters" / "data"
SIZES = {"n_positions": 80, "n_embd": 96, "n_layer": 2, "n_head": 4}
SFT = {"reviews": 64_000, "data_seed": 1, "steps": 2000, "batch_size": 32, "lr": 3e-3, "warmup": 50}
REWARD = {"pairs": 40_000, "data_seed": 3, "steps": 1_250, "batch_size": 32, "lr": 1e-3, "warmup": 20, "noise": 1.0}
HELD_OUT_PAIRS = {"pairs": 2_000, "data_seed": 4}
HELD_OUT = {"reviews": 4_000, "data_seed": 2}


LOOP = ("steps", "batch_size", "lr", "warmup")  # settings of a recipe that are the loop's own


def draw_reviews(recipe: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Prompts and reviews of a recipe, drawn from the grammar: (N, L0), padded on the left, and (N, T)."""
    return review_grammar().sample_tokens(recipe["reviews"], torch.Generator().manual_seed(recipe["data_seed"]))


def new_model(seed: int) -> GPT:
    """The model of the reviews before training."""
    torch.manual_seed(seed)
    grammar = review_grammar()
    return GPT(GPTConfig(grammar.tokenizer.vocab_size, **SIZES, pad_id=grammar.pad_id))


def gap(model: GPT, grammar: ReviewGrammar) -> float:
    """How much the mean NLL per token exceeds the grammar's own, on the same held-out reviews, nats."""
    prompts, reviews = draw_reviews(HELD_OUT)
    nll, mask = response_nll(model, prompts, reviews)
    exact, _ = response_nll(grammar, prompts, reviews)
    return float((nll.double() - exact).sum() / mask.sum())


def make_sft(seed: int) -> tuple[GPT, dict[str, float]]:
    """The SFT model of a seed and what it reached."""
    prompts, reviews = draw_reviews(SFT)
    model = new_model(seed)
    start = time.perf_counter()
    history = train_sft(model, prompts, reviews, seed=seed, **{name: SFT[name] for name in LOOP})
    seconds = time.perf_counter() - start
    last = statistics.mean(row["loss"] for row in history[-100:])
    return model, {"gap": gap(model, review_grammar()), "loss": last, "seconds": seconds}


def accuracy(model: ScalarModel, sft: GPT) -> dict[str, float]:
    """Accuracy of a reward model on fresh labels from the same annotators, against its ceiling."""
    generator = torch.Generator().manual_seed(HELD_OUT_PAIRS["data_seed"])
    annotators = Annotators(noise=REWARD["noise"])
    comparisons = draw_comparisons(sft, HELD_OUT_PAIRS["pairs"], generator)
    prompts, chosen, rejected = encode_pairs(annotators.label(comparisons, generator))
    wins = score_responses(model, prompts, chosen) > score_responses(model, prompts, rejected)
    return {"accuracy": float(wins.double().mean()), "ceiling": annotators.ceiling(comparisons)}


def make_reward(sft: GPT, seed: int) -> tuple[ScalarModel, dict[str, float]]:
    """The reward model of a seed and what it reached; its trunk starts as a copy of the SFT model."""
    generator = torch.Generator().manual_seed(REWARD["data_seed"])
    pairs = Annotators(noise=REWARD["noise"]).label(draw_comparisons(sft, REWARD["pairs"], generator), generator)
    torch.manual_seed(seed)
    model = ScalarModel(copy.deepcopy(sft))
    start = time.perf_counter()
    loop = {name: REWARD[name] for name in LOOP}
    history = train_reward_model(model, *encode_pairs(pairs), seed=seed, **loop)
    seconds = time.perf_counter() - start
    last = statistics.mean(row["loss"] for row in history[-100:])
    return model, {**accuracy(model, sft), "loss": last, "seconds": seconds}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", choices=["sft", "reward"])
    parser.add_argument("--seeds", type=int, default=1, help="more than 1: print what each reaches, write nothing")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    args = parser.parse_args()
    for seed in range(args.seeds):
        sft_path = args.folder / "reviews_sft.safetensors"
        if args.only != "reward":
            sft, reached = make_sft(seed)
            print(f"SFT, seed {seed}:", {name: round(x, 4) for name, x in reached.items()}, flush=True)
            if args.seeds == 1:
                sft.save(sft_path, {"recipe": SFT, "seed": seed, "reached": without_seconds(reached)})
        if args.only != "sft":
            sft = GPT.load(sft_path)
            reward, reached = make_reward(sft, seed)
            print(f"reward model, seed {seed}:", {name: round(x, 4) for name, x in reached.items()}, flush=True)
            if args.seeds == 1:
                info = {"recipe": REWARD, "seed": seed, "reached": without_seconds(reached)}
                reward.save(args.folder / "reviews_reward.safetensors", info)


def without_seconds(reached: dict[str, float]) -> dict[str, float]:
    """What belongs to the model and not to the machine."""
    return {name: x for name, x in reached.items() if name != "seconds"}


if __name__ == "__main__":
    main()
