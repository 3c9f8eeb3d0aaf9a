"""Collecting what people will compare: reviews sampled from a policy, two for every prompt."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from rlhfkit.models import Policy
from rlhfkit.reviews import decode_responses, review_grammar
from rlhfkit.sampling import sample
from rlhfkit.tasks import Comparison, Rollout
from rlhfkit.training import device_of
from rlhfkit.validation import require_in

MAX_LENGTH = 64  # tokens of a response; the longest review of the grammar has 63, its end included


def draw_prompts(count: int, generator: torch.Generator) -> Tensor:
    """Prompts of the reviews, drawn from the grammar: (count, L0), padded on the left."""
    return review_grammar().sample_tokens(count, generator)[0]


def _generator_on(device: torch.device, source: torch.Generator) -> torch.Generator:
    """The source itself if it is of this kind of device, else a generator there, seeded from it."""
    if source.device.type == device.type:
        return source
    seed = int(torch.randint(2**62, (1,), generator=source, device=source.device))
    return torch.Generator(device).manual_seed(seed)


def sample_reviews(
    policy: Policy,
    prompts: Tensor,
    generator: torch.Generator,
    temperature: float = 1.0,
    max_length: int = MAX_LENGTH,
) -> Rollout:
    """A review for every prompt.

    Args:
        policy: over the tokens of the reviews, on any device; may be the grammar itself.
        prompts: (B, L0), integers, padded on the left; repeat a prompt to get several reviews.
        generator: source of randomness, on the CPU; for a policy elsewhere it seeds a generator there.
        temperature: of the samples.
        max_length: longest response, tokens.

    Returns:
        A rollout of B responses, on the device of the policy; one that reached ``max_length`` has no end token.
    """
    eos_id, device = review_grammar().eos_id, device_of(policy)
    prompts, generator = prompts.to(device), _generator_on(device, generator)
    return sample(policy, prompts, max_length, generator=generator, eos_id=eos_id, temperature=temperature)


@dataclass(frozen=True)
class ReviewTask:
    """Writing reviews that a judge scores highly, near a reference.

    Attributes:
        ref: the reference, as a rule the SFT model; never trained, so give the policy a copy.
        judge: scores a rollout, (B,), reward units: a reward model, or the gold score itself.
        beta: weight of the KL divergence from the reference, reward units per nat.
        num_prompts: P, fresh prompts of the grammar for every step, at least 1.
        max_length: T, the longest response, tokens.

    Raises:
        ValueError: if ``beta`` is negative, or ``num_prompts`` or ``max_length`` is less than 1.
    """

    ref: Policy
    judge: Callable[[Rollout], Tensor]
    beta: float
    num_prompts: int = 64
    max_length: int = MAX_LENGTH

    def __post_init__(self) -> None:
        require_in("beta", self.beta, 0.0)
        require_in("num_prompts", self.num_prompts, 1)
        require_in("max_length", self.max_length, 1)

    @property
    def eos_id(self) -> int:
        """The end token of the reviews."""
        return review_grammar().eos_id

    def draw_prompts(self, generator: torch.Generator) -> Tensor:
        """P prompts, (P, L0), padded on the left, on the device of the reference."""
        generator = _generator_on(torch.device("cpu"), generator)
        return draw_prompts(self.num_prompts, generator).to(device_of(self.ref))

    def score(self, rollout: Rollout) -> Tensor:
        """What the judge says, (B,), reward units, on the device of the rollout."""
        return self.judge(rollout).to(rollout.tokens.device)

    def reference(self) -> Policy:
        """The reference itself."""
        return self.ref


def draw_comparisons(
    policy: Policy, count: int, generator: torch.Generator, temperature: float = 1.0
) -> list[Comparison]:
    """Prompts of the grammar with two different reviews each, sampled from a policy.

    Args:
        policy: over the tokens of the reviews, on any device.
        count: number of comparisons, at least 1.
        generator: source of randomness, on the CPU.
        temperature: of the samples.

    Returns:
        ``count`` comparisons; a draw whose two reviews are identical is replaced.

    Raises:
        ValueError: if ``count`` is less than 1.
    """
    if count < 1:
        raise ValueError(f"count: got {count}, expected at least 1")
    comparisons: list[Comparison] = []
    while len(comparisons) < count:
        prompts = draw_prompts(min(256, count), generator).repeat_interleave(2, dim=0)
        texts = decode_responses(sample_reviews(policy, prompts, generator, temperature))
        drawn = zip(texts[::2], texts[1::2], strict=True)
        comparisons += [Comparison(prompt, one, other) for (prompt, one), (_, other) in drawn if one != other]
    return comparisons[:count]
