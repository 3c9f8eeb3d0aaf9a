"""Tasks small enough to list every response, and the records of what was sampled and of what was preferred."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from rlhfkit.exact import enumerate_responses
from rlhfkit.models import Policy, TabularPolicy

Side = Literal["first", "second"]


@dataclass(frozen=True)
class Rollout:
    """Responses sampled from a policy.

    Attributes:
        prompts: (B, L0), integers.
        tokens: the responses, (B, T), integers; padding holds a valid id.
        response_mask: (B, T), bool, True on the response, its end-of-sequence token included.
        logprobs: of ``tokens`` under the policy that sampled them, at temperature 1 and untruncated, (B, T), nats, 0
            on padding; no gradient.
        sampling_logprobs: of ``tokens`` under the distribution they were drawn from, with its temperature and
            truncation, (B, T), nats, 0 on padding; no gradient.
    """

    prompts: Tensor
    tokens: Tensor
    response_mask: Tensor
    logprobs: Tensor
    sampling_logprobs: Tensor

    def trimmed(self) -> Rollout:
        """The same without the last columns that are padding in every row; at least one column stays."""
        columns = self.response_mask.any(0).nonzero()[:, 0].tolist()
        width = max(columns, default=0) + 1
        cut = (self.tokens, self.response_mask, self.logprobs, self.sampling_logprobs)
        return Rollout(self.prompts, *(x[:, :width] for x in cut))


class Task(Protocol):
    """What a policy that writes responses is trained for: prompts, their judge, and the policy to stay near."""

    @property
    def beta(self) -> float:
        """Weight of the KL divergence from the reference, reward units per nat."""
        ...

    @property
    def max_length(self) -> int:
        """T, the longest response, tokens."""
        ...

    @property
    def eos_id(self) -> int | None:
        """Token that ends a response, or None."""
        ...

    def draw_prompts(self, generator: torch.Generator) -> Tensor:
        """Prompts of one step, (P, L0), padded on the left, on the CPU or where the task lives."""
        ...

    def score(self, rollout: Rollout) -> Tensor:
        """What every response is worth, (B,), reward units."""
        ...

    def reference(self) -> Policy:
        """The policy to stay near, not trained."""
        ...


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt, and which of them was preferred.

    Attributes:
        prompt, chosen, rejected: text.
        margin: how much better the chosen one is, reward units, or None: not known.

    Raises:
        ValueError: if a text is not a string, both sides are the same, or ``margin`` is not a finite number.
    """

    prompt: str
    chosen: str
    rejected: str
    margin: float | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "chosen", "rejected"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"{name}: got {type(getattr(self, name)).__name__}, expected a string")
        if self.chosen == self.rejected:
            raise ValueError(f"chosen, rejected: got {self.chosen!r} for both, expected two different texts")
        if self.margin is not None and not _is_finite(self.margin):
            raise ValueError(f"margin: got {self.margin!r}, expected None or a finite number")


def _is_finite(x: object) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x)


@dataclass(frozen=True)
class Comparison:
    """Two responses to a prompt, not yet judged.

    Attributes:
        prompt: text that both answer.
        first: one response.
        second: another; the same text raises ValueError.
    """

    prompt: str
    first: str
    second: str

    def __post_init__(self) -> None:
        if self.first == self.second:
            raise ValueError(f"first, second: got {self.first!r} twice, expected two different responses")

    @property
    def id(self) -> str:
        """16 hexadecimal digits of the SHA-256 of prompt, first and second, in this order."""
        text = json.dumps([self.prompt, self.first, self.second])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def pair(self, choice: Side) -> Pair:
        """The pair in which the response ``choice`` was chosen: "first" or "second" -> Pair."""
        chosen, rejected = (self.first, self.second) if choice == "first" else (self.second, self.first)
        return Pair(self.prompt, chosen, rejected)


@dataclass(frozen=True)
class ExactTask:
    """P prompts, the N responses each of them can have, and the score of every one.

    Attributes:
        vocab_size: V.
        max_length: T.
        eos_id: token that ends a response, or None for responses of exactly T tokens.
        beta: weight of the KL divergence in the objective, reward units per nat.
        tokens: all responses, (N, T), in the order of ``exact.enumerate_responses``.
        response_mask: (N, T), bool.
        scores: (P, N), reward units.
        ref_table: logits of the reference policy, as :class:`~rlhfkit.models.TabularPolicy` takes them.
    """

    vocab_size: int
    max_length: int
    eos_id: int | None
    beta: float
    tokens: Tensor
    response_mask: Tensor
    scores: Tensor
    ref_table: Tensor

    def __post_init__(self) -> None:
        if self.scores.ndim != 2 or self.scores.shape[1] != len(self.tokens):
            raise ValueError(f"scores: got shape {tuple(self.scores.shape)}, expected (P, {len(self.tokens)})")

    @property
    def prompts(self) -> Tensor:
        """All prompts, (P, 1), prompt p being the single token p."""
        return torch.arange(len(self.scores), device=self.scores.device).unsqueeze(1)

    def draw_prompts(self, generator: torch.Generator) -> Tensor:
        """All prompts, (P, 1): there are so few that no step draws some of them. The generator is not used."""
        return self.prompts

    def reference(self) -> TabularPolicy:
        """A fresh reference policy, which is also where training starts; change it freely."""
        return TabularPolicy(self.vocab_size, self.max_length, len(self.scores), self.ref_table)

    def index(self, tokens: Tensor) -> Tensor:
        """Where each response stands in the list: (B, T), padded as there -> (B,)."""
        if tokens.ndim != 2 or tokens.shape[1] != self.max_length:
            raise ValueError(f"tokens: got shape {tuple(tokens.shape)}, expected (B, {self.max_length})")
        powers = self.vocab_size ** torch.arange(self.max_length - 1, -1, -1, device=tokens.device)
        codes, listed = (tokens * powers).sum(1), (self.tokens * powers).sum(1)  # listed is increasing
        found = torch.searchsorted(listed, codes).clamp(max=len(listed) - 1)
        if not torch.equal(self.tokens[found], tokens):
            raise ValueError("tokens: a row is not a response of this task; expected padding as in task.tokens")
        return found

    def score(self, rollout: Rollout) -> Tensor:
        """Score of every sampled response, (B,), reward units."""
        return self.scores[rollout.prompts[:, 0], self.index(rollout.tokens)]

    def to(self, device: torch.device | str) -> ExactTask:
        """The same task with its tensors on another device."""
        return replace(
            self,
            tokens=self.tokens.to(device),
            response_mask=self.response_mask.to(device),
            scores=self.scores.to(device),
            ref_table=self.ref_table.to(device),
        )


def random_task(
    vocab_size: int = 6,
    max_length: int = 5,
    num_prompts: int = 4,
    beta: float = 0.2,
    eos_id: int | None = None,
    noise: float = 0.3,
    seed: int = 0,
) -> ExactTask:
    """The book's exact world: random scores with structure, and a random reference.

    score(y) = noise * e(y) + sum_t w(t, y_t), e and w independent standard normals, then standardised per prompt (mean
    0, variance 1 over the list of responses). The reference has standard-normal logits after every prefix.

    Args:
        vocab_size: V, at least 2.
        max_length: T.
        num_prompts: P.
        beta: reward units per nat, positive.
        eos_id: token that ends a response, or None.
        noise: weight of the unstructured part, dimensionless, not negative.
        seed: of the task; the same seed gives the same task on every machine.

    Returns:
        The task, in double precision on the CPU.

    Raises:
        ValueError: if a size is too small, or ``beta`` or ``noise`` is out of range.
    """
    if vocab_size < 2 or max_length < 1 or num_prompts < 1:
        got = (vocab_size, max_length, num_prompts)
        raise ValueError(f"vocab_size, max_length, num_prompts: got {got}, expected at least 2, 1, 1")
    if not beta > 0 or not noise >= 0:
        raise ValueError(f"beta, noise: got {beta}, {noise}, expected beta > 0 and noise >= 0")
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    tokens, mask = enumerate_responses(vocab_size, max_length, eos_id)
    scores = noise * normal(num_prompts, len(tokens))
    by_position = normal(num_prompts, max_length, vocab_size)
    for t in range(max_length):
        scores = scores + torch.where(mask[:, t], by_position[:, t, tokens[:, t]], torch.zeros_like(scores))
    scores = (scores - scores.mean(1, keepdim=True)) / scores.std(1, correction=0, keepdim=True)
    ref_table = normal(num_prompts, TabularPolicy.count_prefixes(vocab_size, max_length), vocab_size)
    return ExactTask(vocab_size, max_length, eos_id, beta, tokens, mask, scores, ref_table)
