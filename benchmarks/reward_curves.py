"""Reward models on the reviews: data size, best of n, ensembles, epochs, planted length bias, planted bugs (chapter 5).

    python benchmarks/reward_curves.py                        # one small run against its ceiling; writes nothing
    python benchmarks/reward_curves.py --write                # everything; writes the data file, about 15 minutes
    python benchmarks/reward_curves.py --write --part sizes   # one part: sizes, ensembles, epochs, length or bugs

Both responses of every comparison are samples of the committed SFT model. The gold score of each is known, and so is
the probability p that an annotator prefers the first; accuracy and loss are *expected* values under these p, without
noise of the labels. A seed draws its pairs from one pool of 10,000 comparisons, labels them afresh, and sets the
initial head and the order of the batches; the 1,000 held-out comparisons and the prompts of best-of-16 are common.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import functools
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import shipped
import torch
from shipped import DATA, rounded
from torch import Tensor
from torch.nn.functional import logsigmoid, pad

from rlhfkit import reviews
from rlhfkit.collect import draw_comparisons, draw_prompts, sample_reviews
from rlhfkit.lexicon import VALENCE, adjective_valences
from rlhfkit.models import GPT, ScalarModel
from rlhfkit.reviews import Annotators, decode_responses, encode_pairs, review_grammar
from rlhfkit.tasks import Comparison, Pair
from rlhfkit.train_preference import score_responses, train_reward_model

OUT = DATA / "ch05_reward_curves.json"
POOL, HELD_OUT, PROMPTS, BEST_OF = 10_000, 1_000, 150, 16
BATCH, LR = 32, 3e-4
# pairs: steps. Small sets are seen several times, as long as it still helps (chosen on other seeds than those shown)
SIZES = {125: 30, 500: 80, 2_000: 190, 8_000: 500}


class World:
    """What all runs share: the SFT model, comparisons to label, comparisons to be judged on, reviews to choose from."""

    def __init__(self, pool: int = POOL) -> None:
        generator = torch.Generator().manual_seed(5)
        self.sft = GPT.load(DATA / "reviews_sft.safetensors").eval()
        held_out = draw_comparisons(self.sft, HELD_OUT, generator)
        self.first_pairs = encode_pairs([c.pair("first") for c in held_out])  # "chosen" is the first response
        self.held_out = held_out
        prompts = draw_prompts(PROMPTS, generator).repeat_interleave(BEST_OF, 0)
        rollout = sample_reviews(self.sft, prompts, generator)
        self.candidates = prompts, rollout.tokens
        gold = [reviews.gold_score(*texts) for texts in decode_responses(rollout)]
        self.candidate_gold = torch.tensor(gold).view(PROMPTS, BEST_OF)
        self.pool = draw_comparisons(self.sft, pool, generator)

    def draw(self, count: int, seed: int) -> list[Comparison]:
        """Comparisons of a seed: a random part of the pool, larger sets containing the smaller."""
        order = torch.randperm(len(self.pool), generator=torch.Generator().manual_seed(seed))
        return [self.pool[i] for i in order[:count].tolist()]

    def gaps(self, model: ScalarModel) -> Tensor:
        """Score of the first response minus score of the second, on the held-out comparisons."""
        prompts, first, second = self.first_pairs
        return (score_responses(model, prompts, first) - score_responses(model, prompts, second)).double()

    def probabilities(self, annotators: Annotators) -> Tensor:
        """Exact probability that the first is preferred, on the held-out comparisons."""
        return torch.tensor([annotators.probability(c) for c in self.held_out], dtype=torch.float64)

    def scores(self, model: ScalarModel) -> Tensor:
        """Scores of the candidates, one row for each prompt."""
        return score_responses(model, *self.candidates).view(PROMPTS, BEST_OF)

    def best_gold(self, scores: Tensor) -> float:
        """Mean gold score of the candidates with the highest score."""
        return self.candidate_gold.gather(1, scores.argmax(1, keepdim=True)).mean().item()


def ladder(world: World, p: Tensor) -> dict[str, float]:
    """Expected accuracy of judges that see less and less of the gold score."""

    def accuracy(judge: Any) -> float:
        gaps = [judge(c.prompt, c.first) - judge(c.prompt, c.second) for c in world.held_out]
        return expected_accuracy(torch.tensor(gaps, dtype=torch.float64), p)

    def words(prompt: str, review: str) -> float:
        valences = [VALENCE[word] for word in review.split() if word in VALENCE]
        return sum(valences) / len(valences) if valences else 0.0

    def signs(prompt: str, review: str) -> float:
        valences = reviews.opinions(review)
        return sum(math.copysign(1.0, v) for v in valences) / len(valences) if valences else 0.0

    def tone(prompt: str, review: str) -> float:
        valences = reviews.opinions(review)
        return sum(valences) / len(valences) if valences else 0.0

    def grammatical(prompt: str, review: str) -> float:
        return tone(prompt, review) - 2.0 * (not review_grammar().accepts(f"{prompt} {review}"))

    return {judge.__name__: accuracy(judge) for judge in (words, signs, tone, grammatical)}


def strength(model: ScalarModel) -> float:
    """How far apart a model holds "good" and "excellent", "bad" and "terrible": 2/3 by gold score, 0 if not at all.

    ((s(2) - s(1)) + (s(-1) - s(-2))) / (mean of s(1), s(2) less mean of s(-1), s(-2)), with s(v) the mean score of
    "the screen was ... ." over all words of valence v.
    """
    words = adjective_valences("product")
    pairs = [Pair("review of a phone :", f"the screen was {word} . three stars from me .", "") for word in words]
    prompts, responses, _ = encode_pairs(pairs)
    scores, valence = score_responses(model, prompts, responses), torch.tensor(list(words.values()))
    low, bad, good, high = (scores[valence == v].mean() for v in (-2, -1, 1, 2))
    return float(((high - good) + (bad - low)) / ((good + high - bad - low) / 2))


def expected_loss(d: Tensor, p: Tensor) -> float:
    """Mean of -p log sigma(d) - (1 - p) log sigma(-d), nats per pair."""
    return float(-(p * logsigmoid(d) + (1 - p) * logsigmoid(-d)).mean())


def expected_accuracy(d: Tensor, p: Tensor) -> float:
    """Expected share of labels on the side of the higher score."""
    return float(torch.where(d > 0, p, torch.where(d < 0, 1 - p, 0.5)).mean())


def best_scale(d: Tensor, p: Tensor) -> float:
    """The factor in [0, 16] on the gaps with the least expected loss, by bisection; below 1: too sure of itself."""
    low, high = 0.0, 16.0
    for _ in range(40):
        middle = (low + high) / 2
        slope = ((torch.sigmoid(middle * d) - p) * d).mean()  # increasing: the loss is convex in the factor
        low, high = (low, middle) if slope > 0 else (middle, high)
    return low


def measures(d: Tensor, p: Tensor) -> dict[str, float]:
    """What is known of a model from its gaps and the exact probabilities."""
    return {
        "accuracy": expected_accuracy(d, p),
        "loss": expected_loss(d, p),
        "scale": best_scale(d, p),
        "distance": float((torch.sigmoid(d) - p).abs().mean()),
    }


def train(world: World, pairs: Sequence[Pair], steps: int, seed: int, **settings: Any) -> ScalarModel:
    """A reward model whose trunk starts as the SFT model."""
    torch.manual_seed(seed)
    model = ScalarModel(copy.deepcopy(world.sft))
    train_reward_model(
        model, *encode_pairs(pairs), steps=steps, seed=seed, **{"lr": LR, "batch_size": BATCH} | settings
    )
    return model


def labelled(world: World, count: int, seed: int, annotators: Annotators) -> list[Pair]:
    """Pairs of a seed."""
    return annotators.label(world.draw(count, seed), torch.Generator().manual_seed(100 + seed))


def compare_sizes(world: World, seeds: int) -> dict[str, Any]:
    """Accuracy, loss, calibration and best-of-16 over the number of labelled pairs."""
    annotators = Annotators()
    p, rows = world.probabilities(annotators), []
    for seed in range(seeds):
        for count, steps in SIZES.items():
            model = train(world, labelled(world, count, seed, annotators), steps, seed)
            best = world.best_gold(world.scores(model))
            rows.append({"seed": seed, "pairs": count, "steps": steps, **measures(world.gaps(model), p), "best": best})
            rows[-1]["strength"] = strength(model)
            print(rounded(rows[-1]), flush=True)
    entropy = -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).mean()
    bounds = {"ceiling": float(torch.maximum(p, 1 - p).mean()), "loss_floor": float(entropy)}
    bounds |= {"best_by_gold": world.best_gold(world.candidate_gold), "mean_gold": world.candidate_gold.mean().item()}
    return {**bounds, "ladder": ladder(world, p), "rows": rows}


def compare_ensembles(world: World, seeds: int, count: int = 500, members: int = 5) -> dict[str, Any]:
    """The mean score of models that differ in head, order of the batches and (or not) in the pairs they saw."""
    annotators, rows = Annotators(), []
    p = world.probabilities(annotators)
    for seed in range(seeds):
        pairs = labelled(world, count, seed, annotators)
        models = [train(world, pairs, SIZES[count], 1000 * (seed + 1) + k) for k in range(members)]
        gaps = torch.stack([world.gaps(model) for model in models])
        scores = torch.stack([world.scores(model) for model in models])
        row: dict[str, Any] = {"seed": seed, "pairs": count}
        for size in (1, 3, members):  # of one model: the mean over all members of what each reaches alone
            groups = [[k] for k in range(members)] if size == 1 else [list(range(size))]
            each = [measures(gaps[g].mean(0), p) | {"best": world.best_gold(scores[g].mean(0))} for g in groups]
            row[f"of {size}"] = {name: statistics.mean(e[name] for e in each) for name in each[0]}
        row["spread"] = float(gaps.std(0).mean())
        rows.append(row)
        print(rounded(row), flush=True)
    return {"rows": rows}


def compare_epochs(world: World, seeds: int, count: int = 500, epochs: int = 8) -> dict[str, Any]:
    """Loss on the training pairs and expected loss on the held-out ones after every epoch."""
    annotators, rows = Annotators(), []
    p, per_epoch = world.probabilities(annotators), count // BATCH
    for seed in range(seeds):
        pairs = labelled(world, count, seed, annotators)
        prompts, chosen, rejected = encode_pairs(pairs)
        torch.manual_seed(seed)
        model = ScalarModel(copy.deepcopy(world.sft))
        row: dict[str, Any] = {"seed": seed, "pairs": count, "train_loss": [], "train_accuracy": []}
        row |= {name: [] for name in ("loss", "accuracy", "scale")}

        def record(
            step: int, _: Any, model: ScalarModel = model, row: Any = row, data: Any = (prompts, chosen, rejected)
        ) -> None:
            if (step + 1) % per_epoch:
                return
            model.eval()
            x, good, bad = data
            gap = (score_responses(model, x, good) - score_responses(model, x, bad)).double()
            row["train_loss"].append(expected_loss(gap, torch.ones_like(gap)))
            row["train_accuracy"].append(float((gap > 0).double().mean()))
            for name, x in measures(world.gaps(model), p).items():
                if name in row:
                    row[name].append(x)
            model.train()

        settings: dict[str, Any] = {"lr": LR, "batch_size": BATCH, "seed": seed, "on_step": record}
        train_reward_model(model, prompts, chosen, rejected, steps=epochs * per_epoch, **settings)
        rows.append(row)
        print(rounded(row), flush=True)
    return {"rows": rows}


def least_squares(y: Tensor, *columns: Tensor) -> list[float]:
    """Coefficients of y on the columns, without a constant: first against second has none."""
    x = torch.stack(columns, 1)
    return torch.linalg.lstsq(x, y[:, None]).solution[:, 0].tolist()


def logistic(wins: Tensor, *columns: Tensor) -> tuple[list[float], list[float]]:
    """Maximum-likelihood coefficients of P(win) = sigma(x b), and their standard errors, by Newton's method."""
    x = torch.stack(columns, 1)
    b = torch.zeros(x.shape[1], dtype=x.dtype)
    for _ in range(25):
        sigma = torch.sigmoid(x @ b)
        information = x.T @ (x * (sigma * (1 - sigma))[:, None])
        b = b + torch.linalg.solve(information, x.T @ (wins - sigma))
    return b.tolist(), torch.linalg.inv(information).diagonal().sqrt().tolist()


def features(comparisons: Sequence[Comparison]) -> tuple[Tensor, Tensor]:
    """Gold score and words of the first minus those of the second response."""
    gold = [reviews.gold_score(c.prompt, c.first) - reviews.gold_score(c.prompt, c.second) for c in comparisons]
    words = [len(c.first.split()) - len(c.second.split()) for c in comparisons]
    return torch.tensor(gold, dtype=torch.float64), torch.tensor(words, dtype=torch.float64)


def compare_length(world: World, seeds: int, count: int = 2_000) -> dict[str, Any]:
    """Length bias planted in the labels, found in the labels and found in the reward model; words of its best of 16."""
    rows = []
    gold, words = features(world.held_out)
    _prompts, tokens = world.candidates
    lengths = (tokens != world.sft.pad_id).sum(1).view(PROMPTS, BEST_OF).double() - 1
    for bias in (0.0, 0.05, 0.1):
        annotators = Annotators(length_bias=bias)
        for seed in range(seeds):
            comparisons = world.draw(count, seed)
            pairs = labelled(world, count, seed, annotators)
            wins = torch.tensor([q.chosen == c.first for q, c in zip(pairs, comparisons, strict=True)]).double()
            found, error = logistic(wins, *features(comparisons))
            model = train(world, pairs, 125, seed)
            per_gold, per_word = least_squares(world.gaps(model), gold, words)
            scores = world.scores(model)
            chosen = lengths.gather(1, scores.argmax(1, keepdim=True)).mean().item()
            row = {"seed": seed, "bias": bias, "labels": found[1], "labels_error": error[1], "labels_gold": found[0]}
            row |= {"model": per_word, "model_gold": per_gold, "best_words": chosen, "best": world.best_gold(scores)}
            rows.append(row)
            print(rounded(row), flush=True)
    return {"pairs": count, "mean_words": lengths.mean().item(), "rows": rows}


def swap(pairs: Sequence[Pair], share: float, generator: torch.Generator) -> list[Pair]:
    """The same pairs, chosen and rejected exchanged in a random share of them."""
    draws = torch.rand(len(pairs), generator=generator).tolist()
    return [Pair(q.prompt, q.rejected, q.chosen) if u < share else q for q, u in zip(pairs, draws, strict=True)]


def without_padding_id(sft: GPT) -> GPT:
    """The same weights, but padding is read like any word, and the last column counts as the end."""
    blind = GPT(replace(sft.config, pad_id=-1))
    blind.load_state_dict(sft.state_dict())
    return blind


def compare_bugs(world: World, seeds: int, count: int = 1_000, steps: int = 100) -> dict[str, Any]:
    """Correct, a tenth of the pairs swapped, padding read as text; dropout left on is measured on the page."""
    annotators, rows = Annotators(), []
    p = world.probabilities(annotators)
    prompts, first, second = world.first_pairs
    for seed in range(seeds):
        pairs = labelled(world, count, seed, annotators)
        for name in ("correct", "swapped", "padding"):
            used = swap(pairs, 0.1, torch.Generator().manual_seed(200 + seed)) if name == "swapped" else pairs
            torch.manual_seed(seed)
            model = ScalarModel(without_padding_id(world.sft) if name == "padding" else copy.deepcopy(world.sft))
            log: list[dict[str, float]] = train_reward_model(model, *encode_pairs(used), steps=steps, seed=seed, lr=LR)
            last = log[-20:]
            row: dict[str, Any] = {"seed": seed, "bug": name}
            row |= {f"train_{n}": statistics.mean(m[n] for m in last) for n in ("loss", "accuracy", "margin")}
            row |= measures(world.gaps(model), p)
            if name == "padding":  # as trained above; here the same texts with ten more columns of padding
                wider = [pad(x, (0, 10)) for x in (first, second)]
                d = score_responses(model, prompts, wider[0]) - score_responses(model, prompts, wider[1])
                row["wider"] = measures(d.double(), p)
                change = score_responses(model, prompts, wider[0]) - score_responses(model, prompts, first)
                row["change"] = float(change.abs().mean())
                d = score_unpadded(model, prompts, first) - score_unpadded(model, prompts, second)
                row["one_by_one"] = measures(d, p)
            rows.append(row)
            print(rounded(row), flush=True)
    return {"pairs": count, "steps": steps, "rows": rows}


def score_unpadded(model: ScalarModel, prompts: Tensor, responses: Tensor) -> Tensor:
    """Scores of one text at a time, with no padding anywhere."""
    pad_id = review_grammar().pad_id
    rows = torch.cat([prompts, responses], 1)
    with torch.no_grad():
        return torch.cat([model.scores(row[row != pad_id][None]) for row in rows]).double()


PARTS = {
    "sizes": compare_sizes,
    "ensembles": compare_ensembles,
    "epochs": compare_epochs,
    "length": compare_length,
    "bugs": compare_bugs,
}


def main() -> None:
    """Check one small run against its ceiling, or with ``--write`` remake the data file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--part", choices=list(PARTS), action="append")
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    reviews.gold_score = functools.cache(reviews.gold_score)  # a response is judged once
    start = time.process_time()
    world = World(POOL if arguments.write else 2_000)
    print(f"drawn in {time.process_time() - start:.0f} s", flush=True)
    if not arguments.write:
        model = train(world, labelled(world, 2_000, 0, Annotators()), SIZES[2_000], 0)
        p = world.probabilities(Annotators())
        row = measures(world.gaps(model), p) | {"ceiling": float(torch.maximum(p, 1 - p).mean())}
        print(rounded(row))
        sys.exit(row["accuracy"] < row["ceiling"] - 0.05)
    out = shipped.read(OUT) | shipped.provenance("python benchmarks/reward_curves.py --write", arguments.date)
    out["seeds"] = arguments.seeds
    out["settings"] = {"lr": LR, "batch_size": BATCH, "pool": POOL, "held_out": HELD_OUT, "prompts": PROMPTS}
    for part in arguments.part or PARTS:
        start = time.process_time()
        out[part] = rounded(PARTS[part](world, arguments.seeds))
        out[part]["cpu_s"] = round(time.process_time() - start)
        shipped.write(OUT, out)


if __name__ == "__main__":
    main()
