"""Loops that train a policy on its own samples. Each reads like the pseudocode beside it on the page."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhfkit.advantages import rewards_to_go
from rlhfkit.kl import kl_shaped_rewards
from rlhfkit.masked import aggregate
from rlhfkit.models import TabularPolicy
from rlhfkit.policy_losses import reinforce_loss
from rlhfkit.sampling import response_logprobs, sample
from rlhfkit.tasks import ExactTask
from rlhfkit.validation import require_same_shape


def require_finite(quantity: str, x: Tensor, step: int) -> None:
    """Stop a loop at the first number that is not finite, in a tensor of any shape.

    Raises:
        FloatingPointError: naming the step and the quantity.
    """
    if not torch.isfinite(x).all():
        bad = x[~torch.isfinite(x)].flatten()[0].item()
        raise FloatingPointError(f"step {step}: {quantity} contains {bad}; training stopped before the update")


def gradient_of(policy: torch.nn.Module) -> Tensor:
    """All gradients of a module in one vector, (D,)."""
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def train_reinforce(
    policy: TabularPolicy,
    task: ExactTask,
    *,
    steps: int,
    group_size: int,
    lr: float,
    generator: torch.Generator,
    baseline: Callable[[Tensor], Tensor] | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> None:
    """REINFORCE on an exact task, with the KL penalty inside the reward. Updates ``policy`` in place.

    Every step samples G responses to each of P prompts, gives each token its reward-to-go (score at the end, minus
    ``task.beta`` times the log-ratio to the reference on the way), subtracts a baseline, and takes one Adam step.

    Args:
        policy: trained in place; ``task.reference()`` is the usual start.
        task: prompts, scores, reference and beta.
        steps: number of updates.
        group_size: G, responses per prompt and step.
        lr: learning rate of Adam.
        generator: source of the samples, on the device of the policy.
        baseline: from the total rewards of the groups, (P, G), to a baseline of the same shape, such as
            ``leave_one_out_baseline``; None: no baseline.
        on_step: called with the step and its metrics, reward units and nats.

    Raises:
        ValueError: if ``baseline`` returns another shape than it got.
        FloatingPointError: at the first score, loss or gradient that is not finite; names step and quantity.

    Source: Williams 1992; with ``leave_one_out_baseline`` it is RLOO, Ahmadian et al. 2024, arXiv:2402.14740.
    """
    reference = task.reference().to(policy.table.device)
    prompts = task.prompts.repeat_interleave(group_size, dim=0)
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    for step in range(steps):
        rollout = sample(policy, prompts, task.max_length, generator=generator, eos_id=task.eos_id)
        scores = task.score(rollout)  # (B,), B = P * G
        require_finite("score", scores, step)
        mask = rollout.response_mask
        with torch.no_grad():
            ref_logprobs = response_logprobs(reference, prompts, rollout.tokens)  # (B, T)
        rewards = kl_shaped_rewards(scores, rollout.logprobs, ref_logprobs, mask, task.beta)
        advantages = rewards_to_go(rewards, mask)
        if baseline is not None:
            totals = rewards.sum(1).view(-1, group_size)
            baselines = baseline(totals)
            require_same_shape(totals=totals, baseline=baselines)
            advantages = advantages - baselines.reshape(-1, 1)
        logprobs = response_logprobs(policy, prompts, rollout.tokens)  # the same numbers, now with gradient
        loss = aggregate(reinforce_loss(logprobs, advantages), mask, "sequence-sum")
        require_finite("loss", loss, step)
        optimizer.zero_grad()
        loss.backward()
        require_finite("gradient", gradient_of(policy), step)
        optimizer.step()
        if on_step is not None:
            kl = (scores.mean() - rewards.sum(1).mean()) / task.beta
            metrics = {"objective/scores": scores.mean(), "objective/rlhf_reward": rewards.sum(1).mean()}
            on_step(step, {name: x.item() for name, x in (metrics | {"objective/kl": kl, "loss/policy": loss}).items()})
