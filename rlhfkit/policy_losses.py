"""Losses of the policy and of the value function, one number per token, and what to watch while they fall."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhfkit.validation import require_in, require_same_shape


def reinforce_loss(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """Loss whose gradient is minus the score-function estimate of the policy gradient: -A log pi.

    Only its gradient means something: its value is not minus the expected score.

    Args:
        logprobs: log-probabilities of the sampled tokens under the policy, nats. Any shape, e.g. (B, T).
        advantages: same shape, reward units; treated as constant.

    Returns:
        Loss of each token, same shape. ``aggregate(..., "sequence-sum")`` makes it the policy gradient.

    Raises:
        ValueError: if the shapes differ.

    Source: Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement
    learning", eq. 11.
    """
    require_same_shape(logprobs=logprobs, advantages=advantages)
    return -logprobs * advantages.detach()


def clipped_policy_loss(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cliprange: float = 0.2) -> Tensor:
    """PPO's clipped surrogate loss of every token, to be minimised.

    -min(r A, clip(r, 1 - eps, 1 + eps) A), with r = exp(logprobs - old_logprobs), eps = cliprange.

    Args:
        logprobs: log-probabilities under the policy being trained, nats. Any shape, e.g. (B, T).
        old_logprobs: same tokens under the policy that sampled them; treated as constant.
        advantages: same shape, reward units; treated as constant.
        cliprange: half-width eps of the interval around 1, dimensionless, not negative.

    Returns:
        Loss of each token, same shape. Masking and averaging are the caller's choice.

    Raises:
        ValueError: if the three shapes differ, or ``cliprange`` is negative.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 7 (there an objective to maximise).
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    require_in("cliprange", cliprange, 0.0)
    old_logprobs, advantages = old_logprobs.detach(), advantages.detach()
    # constant where clipping stops the gradient: there 0 * exp would be nan once exp overflows (in float32 from 89 on)
    clipped_away = clip_active(logprobs, old_logprobs, advantages, cliprange)
    logprobs = torch.where(clipped_away, logprobs.detach(), logprobs)
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    return -torch.minimum(ratio * advantages, clipped * advantages)


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float | None = None
) -> Tensor:
    """Loss of the value function: half the squared error, or the larger one of two with clipping.

    0.5 max((v - R)^2, (old + clip(v - old, -eps, eps) - R)^2), eps = cliprange_value.

    Args:
        values: predictions being trained, reward units. Any shape, e.g. (B, T).
        old_values: predictions when the data were collected; treated as constant.
        returns: targets; treated as constant.
        cliprange_value: half-width eps in reward units, not negative; None: plain 0.5 (v - R)^2.

    Returns:
        Loss of each step, same shape.

    Raises:
        ValueError: if the three shapes differ, or ``cliprange_value`` is negative.

    Source: the reference code of PPO; Huang et al. 2022, "The 37 implementation details of PPO", core detail 9.
    Stable-Baselines3 leaves out the half and the maximum.
    """
    require_same_shape(values=values, old_values=old_values, returns=returns)
    old_values, returns = old_values.detach(), returns.detach()
    error = (values - returns).square()
    if cliprange_value is None:
        return 0.5 * error
    require_in("cliprange_value", cliprange_value, 0.0)
    clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
    return 0.5 * torch.maximum(error, (clipped - returns).square())


def approx_kl(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """How far the policy has moved since sampling: k3 estimate of KL(old || new) of every token.

    expm1(d) - d, d = logprobs - old_logprobs; never negative, and unbiased for samples of the old policy.

    Args:
        logprobs: under the policy being trained, nats. Any shape, e.g. (B, T).
        old_logprobs: the same tokens under the policy that sampled them.

    Returns:
        Same shape, nats.

    Raises:
        ValueError: if the shapes differ.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs)
    log_ratio = logprobs - old_logprobs
    return torch.expm1(log_ratio) - log_ratio


def clipfrac(logprobs: Tensor, old_logprobs: Tensor, cliprange: float) -> Tensor:
    """Whether each token's ratio lies outside the clip interval: abs(r - 1) > eps. Its mean is "clipfrac".

    This is more than the share of tokens without a gradient: outside the interval the minimum may still choose
    the unclipped branch. :func:`clip_active` tells those apart.

    Args:
        logprobs: under the policy being trained, nats. Any shape, e.g. (B, T).
        old_logprobs: the same tokens under the policy that sampled them.
        cliprange: half-width eps, not negative.

    Returns:
        Same shape, bool.

    Raises:
        ValueError: if the shapes differ, or ``cliprange`` is negative.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs)
    require_in("cliprange", cliprange, 0.0)
    return (torch.exp(logprobs - old_logprobs) - 1).abs() > cliprange


def clip_active(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cliprange: float) -> Tensor:
    """Whether PPO's minimum chooses the clipped branch, so that the token's gradient is 0.

    (A > 0 and r > 1 + eps) or (A < 0 and r < 1 - eps).

    Args:
        logprobs: under the policy being trained, nats. Any shape, e.g. (B, T).
        old_logprobs: the same tokens under the policy that sampled them.
        advantages: same shape, reward units.
        cliprange: half-width eps, not negative.

    Returns:
        Same shape, bool.

    Raises:
        ValueError: if the shapes differ, or ``cliprange`` is negative.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    require_in("cliprange", cliprange, 0.0)
    ratio = torch.exp(logprobs - old_logprobs)
    return ((advantages > 0) & (ratio > 1 + cliprange)) | ((advantages < 0) & (ratio < 1 - cliprange))
