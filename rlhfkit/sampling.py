"""Sampling responses with an explicit generator, and the log-probabilities of given ones."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhfkit.logprobs import next_token_logprobs, sequence_logprobs, token_logprobs
from rlhfkit.models import Policy
from rlhfkit.tasks import ExactTask, Rollout


@torch.no_grad()
def sample(
    policy: Policy, prompts: Tensor, max_length: int, *, generator: torch.Generator, eos_id: int | None = None
) -> Rollout:
    """Draw one response to every prompt, token by token: y_t ~ pi(. | x, y_<t).

    Args:
        policy: has ``logits(tokens)``.
        prompts: (B, L0), integers; repeat a prompt to get several responses to it.
        max_length: T, the longest response, at least 1.
        generator: source of randomness, on the device of ``prompts``.
        eos_id: a response ends at its first ``eos_id``, which counts; the rest of the row is filled with it.

    Returns:
        A rollout of B responses with T columns; no gradient flows into it.

    Raises:
        ValueError: if ``prompts`` is not (B, L0), or ``max_length`` is less than 1 or more than the policy's own.
    """
    if prompts.ndim != 2 or prompts.shape[1] < 1 or max_length < 1:
        raise ValueError(f"prompts, max_length: got {tuple(prompts.shape)}, {max_length}, expected (B, L0) and >= 1")
    limit = getattr(policy, "max_length", max_length)  # of a tabular policy: beyond it there is no row to read
    if max_length > limit:
        raise ValueError(f"max_length: got {max_length}, expected at most the policy's {limit}")
    sequences, columns = prompts, []
    alive = torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
    for _ in range(max_length):
        logits = policy.logits(sequences)[:, -1:]
        tokens = torch.multinomial(logits[:, 0].softmax(-1), 1, generator=generator)
        if eos_id is not None:
            tokens = torch.where(alive.unsqueeze(1), tokens, eos_id)
        logprobs = token_logprobs(logits, tokens).squeeze(1)
        columns.append((tokens, alive, torch.where(alive, logprobs, torch.zeros_like(logprobs))))
        sequences = torch.cat([sequences, tokens], dim=1)
        if eos_id is not None:
            alive = alive & (tokens.squeeze(1) != eos_id)
    all_tokens, mask, all_token_logprobs = zip(*columns, strict=True)
    return Rollout(prompts, torch.cat(all_tokens, 1), torch.stack(mask, 1), torch.stack(all_token_logprobs, 1))


def response_logprobs(policy: Policy, prompts: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of every token of given responses, each given the prompt and the tokens before it.

    Args:
        policy: has ``logits(tokens)``.
        prompts: (B, L0), integers.
        tokens: responses, (B, T), integers.

    Returns:
        (B, T), nats, with gradient; padding gets a number too, so mask it.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if prompts.ndim != 2 or tokens.ndim != 2 or len(prompts) != len(tokens):
        got = f"{tuple(prompts.shape)}, {tuple(tokens.shape)}"
        raise ValueError(f"prompts, tokens: got shapes {got}, expected (B, L0), (B, T)")
    sequences = torch.cat([prompts, tokens], dim=1)
    return next_token_logprobs(policy.logits(sequences), sequences)[:, prompts.shape[1] - 1 :]


def all_logprobs(policy: Policy, task: ExactTask) -> Tensor:
    """Log-probability of every response to every prompt of an exact task: what the oracle works on.

    Args:
        policy: has ``logits(tokens)``.
        task: P prompts, N responses.

    Returns:
        (P, N), nats, with gradient; exp of a row sums to 1.
    """
    num_prompts, count = task.scores.shape
    prompts = task.prompts.repeat_interleave(count, dim=0)
    tokens, mask = task.tokens.repeat(num_prompts, 1), task.response_mask.repeat(num_prompts, 1)
    return sequence_logprobs(response_logprobs(policy, prompts, tokens), mask).view(num_prompts, count)
