"""The reviews as a task: a judge who knows the truth, annotators who see it through noise, and comparisons to label."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhfkit.grammar import ReviewGrammar
from rlhfkit.lexicon import INTENSIFIERS, VALENCE
from rlhfkit.tasks import Comparison, Pair, Rollout
from rlhfkit.validation import require_in

INTENSIFYING = frozenset(INTENSIFIERS.split())


@functools.cache
def review_grammar() -> ReviewGrammar:
    """The grammar of the reviews; built once (about a second)."""
    return ReviewGrammar()


def opinions(review: str) -> list[float]:
    """Valence of every opinion word where it stands: half as strong again after an intensifier, reversed by "not".

    "not" reaches over one intensifier: "not good" and "not very good" are both negative.

    Args:
        review: words between spaces; those without valence are passed over.

    Returns:
        One number per opinion word, in order, between -3 and 3.
    """
    words = ["", "", *review.split()]
    valences = []
    for before, just_before, word in zip(words, words[1:], words[2:], strict=False):
        if word in VALENCE:
            intensified = just_before in INTENSIFYING
            negated = "not" in (just_before, before if intensified else just_before)
            valences.append(VALENCE[word] * (1.5 if intensified else 1.0) * (-1.0 if negated else 1.0))
    return valences


def gold_score(prompt: str, review: str) -> float:
    """The truth about a review: how favourable it is, less penalties for repetition and for broken language.

    Mean valence of its opinion words (0 without one), minus 0.5 for every opinion word said before, minus 2 if prompt
    and review are not a text of the grammar. A mean, so that length as such is worth nothing.

    Args:
        prompt: text.
        review: text, without the end token.

    Returns:
        Dimensionless, at most 3; below -5 only with repetition.
    """
    valences = opinions(review)
    words = [word for word in review.split() if word in VALENCE]
    tone = sum(valences) / len(valences) if valences else 0.0
    repeated = len(words) - len(set(words))
    broken = not review_grammar().accepts(f"{prompt} {review}")
    return tone - 0.5 * repeated - 2.0 * broken


def decode_responses(rollout: Rollout) -> list[tuple[str, str]]:
    """Texts of the prompts and responses of a rollout, B pairs."""
    decode = review_grammar().tokenizer.decode
    ends = [int(mask.sum()) for mask in rollout.response_mask]
    texts = zip(rollout.prompts, rollout.tokens, ends, strict=True)
    return [(decode(prompt), decode(tokens[:end])) for prompt, tokens, end in texts]


def gold_scores(rollout: Rollout) -> Tensor:
    """Gold score of every response of a rollout, (B,), double precision."""
    return torch.tensor([gold_score(*texts) for texts in decode_responses(rollout)], dtype=torch.float64)


@dataclass(frozen=True)
class Annotators:
    """People who compare two responses: Bradley-Terry noise around the gold score, and optional weaknesses.

    P(first preferred) = (1 - q) sigma(d) + q sigma(-d), with d = u(first) - u(second) and
    u = gold / noise + length_bias * (number of words).

    Attributes:
        noise: gold points per nat of preference, positive; small means sure.
        length_bias: nats of preference per word, whatever the words say.
        disagreement: q, the share of annotators with the opposite taste, in [0, 0.5]. With q > 0 the labels follow no
            Bradley-Terry model.

    Source: Bradley and Terry 1952, for q = 0.
    """

    noise: float = 1.0
    length_bias: float = 0.0
    disagreement: float = 0.0

    def __post_init__(self) -> None:
        require_in("noise", self.noise, 0.0, open_low=True)
        require_in("disagreement", self.disagreement, 0.0, 0.5)

    def utility(self, prompt: str, review: str) -> float:
        """What the majority feels about a review, nats."""
        return gold_score(prompt, review) / self.noise + self.length_bias * len(review.split())

    def probability(self, comparison: Comparison) -> float:
        """Exact probability that a random annotator prefers the first response."""
        prompt, utility = comparison.prompt, self.utility
        d = torch.tensor(utility(prompt, comparison.first) - utility(prompt, comparison.second), dtype=torch.float64)
        q = self.disagreement
        return float((1 - q) * torch.sigmoid(d) + q * torch.sigmoid(-d))

    def label(self, comparisons: Sequence[Comparison], generator: torch.Generator) -> list[Pair]:
        """One random annotator's verdict on every comparison.

        Args:
            comparisons: what they are asked.
            generator: source of randomness, on the CPU.

        Returns:
            Pairs in the same order.
        """
        u = torch.rand(len(comparisons), generator=generator, dtype=torch.float64).tolist()
        return [
            c.pair("first" if draw < self.probability(c) else "second") for c, draw in zip(comparisons, u, strict=True)
        ]

    def ceiling(self, comparisons: Sequence[Comparison]) -> float:
        """Expected share of labels that the best possible predictor gets right: mean of max(p, 1 - p)."""
        p = torch.tensor([self.probability(c) for c in comparisons], dtype=torch.float64)
        return float(torch.maximum(p, 1 - p).mean())


def encode_pairs(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens of pairs.

    Args:
        pairs: B of them, in the words of the reviews.

    Returns:
        Prompts (B, L0), padded on the left; chosen and rejected responses, (B, T) each, ended and padded on the right.

    Raises:
        ValueError: if there is no pair, or a word is unknown.
    """
    tokenizer = review_grammar().tokenizer
    prompts = tokenizer.encode_batch([pair.prompt for pair in pairs], "left")
    both = tokenizer.encode_batch([p.chosen for p in pairs] + [p.rejected for p in pairs], "right", eos=True)
    return prompts, both[: len(pairs)], both[len(pairs) :]
