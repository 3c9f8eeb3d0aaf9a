"""Credit: rewards-to-go, generalised advantage estimation, and baselines from a group of responses."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhfkit.validation import require_float, require_in, require_mask, require_ndim, require_same_shape


def rewards_to_go(rewards: Tensor, mask: Tensor | None = None, gamma: float = 1.0) -> Tensor:
    """Discounted sum of the rewards from each step on: G_t = r_t + gamma G_t', t' the next step that counts.

    Args:
        rewards: (B, T), reward units.
        mask: (B, T), bool; masked steps are skipped, as :func:`gae` does. None: all steps count.
        gamma: discount in [0, 1].

    Returns:
        (B, T), reward units, 0 outside the mask.

    Raises:
        ValueError: if shapes or dtypes are wrong or ``gamma`` lies outside [0, 1].
    """
    return gae(rewards, torch.zeros_like(rewards), gamma=gamma, lam=1.0, mask=mask)[0]


def gae(
    rewards: Tensor,
    values: Tensor,
    *,
    gamma: float,
    lam: float,
    mask: Tensor | None = None,
    dones: Tensor | None = None,
    last_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimates: A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t.

    ``dones[t]`` ends the episode with step t: beyond it there is neither a next value nor a next advantage. Masked
    steps are skipped, not treated as zeros: "t + 1" is the next step that counts. For a truncated step, add
    gamma V(final observation) to its reward and set ``dones``: cut short, it is still worth something.

    Args:
        rewards: (B, T), reward units.
        values: V of each step's state, (B, T), reward units.
        gamma: discount in [0, 1].
        lam: weight decay in [0, 1]; 0 gives delta_t (low variance), 1 gives return minus value (no bias from V).
        mask: (B, T), bool, True where the step counts; None: all count.
        dones: (B, T), bool; None: no episode ends inside the rollout.
        last_values: (B,), V of the state after the last step that counts; None: 0.

    Returns:
        (advantages, returns), (B, T) each, reward units: raw, never whitened; returns = advantages + values; both
        are 0 outside the mask.

    Raises:
        ValueError: if shapes or dtypes are wrong, or ``gamma`` or ``lam`` lies outside [0, 1].

    Source: Schulman et al. 2016, arXiv:1506.02438, eq. 16. Padding is skipped as in verl; TRL 0.11 multiplies
    rewards and values by the mask instead, which differs when the mask has holes.
    """
    require_ndim("rewards", rewards, "(B, T)")
    require_same_shape(rewards=rewards, values=values)
    require_float(rewards=rewards, values=values)
    if rewards.shape[1] == 0:
        raise ValueError(f"rewards: got shape {tuple(rewards.shape)}, expected at least one step")
    require_in("gamma", gamma, 0.0, 1.0)
    require_in("lam", lam, 0.0, 1.0)
    if mask is None:
        mask = torch.ones_like(rewards, dtype=torch.bool)
    if dones is None:
        dones = torch.zeros_like(rewards, dtype=torch.bool)
    require_mask("mask", mask, rewards.shape)
    require_mask("dones", dones, rewards.shape)
    zero = torch.zeros_like(rewards[:, 0])
    next_values = zero if last_values is None else last_values
    if next_values.shape != zero.shape:
        raise ValueError(f"last_values: got shape {tuple(next_values.shape)}, expected {tuple(zero.shape)}")
    next_advantages, columns = zero, []
    for t in reversed(range(rewards.shape[1])):
        ahead = torch.where(dones[:, t], zero, next_values + lam * next_advantages)
        advantages = rewards[:, t] + gamma * ahead - values[:, t]
        columns.append(torch.where(mask[:, t], advantages, zero))
        next_advantages = torch.where(mask[:, t], advantages, next_advantages)
        next_values = torch.where(mask[:, t], values[:, t], next_values)
    result = torch.stack(columns[::-1], dim=1)
    return result, torch.where(mask, result + values, torch.zeros_like(values))


def group_mean_baseline(scores: Tensor) -> Tensor:
    """Mean score of the responses to the same prompt, the own one included: b_i = mean_j s_j.

    Because the own score is inside, the baseline depends on the response: the expected gradient comes out
    (G - 1)/G times too small. :func:`leave_one_out_baseline` is exact.

    Args:
        scores: (P, G), G responses to each of P prompts, reward units.

    Returns:
        (P, G), the same number along each row.

    Raises:
        ValueError: if ``scores`` is not a floating-point (P, G) tensor.
    """
    require_ndim("scores", scores, "(P, G)")
    require_float(scores=scores)
    return scores.mean(1, keepdim=True).expand_as(scores)


def leave_one_out_baseline(scores: Tensor) -> Tensor:
    """Mean score of the *other* responses to the same prompt: b_i = (sum_j s_j - s_i) / (G - 1).

    Args:
        scores: (P, G), reward units, G >= 2.

    Returns:
        (P, G).

    Raises:
        ValueError: if ``scores`` is not (P, G) floating point, or G < 2 (there is no other response).

    Source: Kool et al. 2019, "Buy 4 REINFORCE samples, get a baseline for free!"; Ahmadian et al. 2024,
    arXiv:2402.14740 (RLOO).
    """
    require_ndim("scores", scores, "(P, G)")
    require_float(scores=scores)
    group_size = scores.shape[1]
    if group_size < 2:
        raise ValueError(f"scores: got shape {tuple(scores.shape)}, expected groups of at least two responses")
    return (scores.sum(1, keepdim=True) - scores) / (group_size - 1)


def group_normalized_advantages(scores: Tensor, eps: float = 1e-4) -> Tensor:
    """Scores centred and scaled within their group: (s_i - mean) / (std + eps), unbiased std.

    Dividing by the spread weighs prompts by difficulty: those whose responses nearly all fail, or nearly all
    succeed, get the largest advantages. A group whose maximum equals its minimum gives exactly 0.

    Args:
        scores: (P, G), reward units, G >= 2.
        eps: added to the standard deviation, reward units, not negative.

    Returns:
        (P, G), dimensionless.

    Raises:
        ValueError: if ``scores`` is not (P, G) floating point, G < 2, or ``eps`` is negative.

    Source: Shao et al. 2024, arXiv:2402.03300 (GRPO), section 4.1.2; unbiased std and eps as in TRL.
    """
    require_ndim("scores", scores, "(P, G)")
    require_float(scores=scores)
    require_in("eps", eps, 0.0)
    if scores.shape[1] < 2:
        raise ValueError(f"scores: got shape {tuple(scores.shape)}, expected groups of at least two responses")
    highest = scores.amax(1, keepdim=True)
    constant = (highest == scores.amin(1, keepdim=True)) & highest.isfinite()  # a group of inf is not hidden as 0
    spread = torch.where(constant, torch.ones_like(scores), scores.std(1, keepdim=True) + eps)
    return torch.where(constant, torch.zeros_like(scores), (scores - scores.mean(1, keepdim=True)) / spread)
