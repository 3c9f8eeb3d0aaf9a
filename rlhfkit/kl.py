"""Kullback-Leibler divergence: three estimators from samples, the exact value, and its use as a reward. In nats."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhfkit.masked import masked_sum
from rlhfkit.validation import require_float, require_in, require_mask, require_ndim, require_same_shape


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate of KL(pi || ref) from each sample of pi: k1 = log pi - log ref. Unbiased, often negative.

    Args:
        logprobs: log-probabilities of samples of pi under pi, nats. Any shape.
        ref_logprobs: the same samples under the reference, same shape.

    Returns:
        Same shape, nats.

    Raises:
        ValueError: if the shapes differ.

    Source: Schulman 2020, "Approximating KL divergence" (there with the ratio r = ref/pi: k1 = -log r).
    """
    require_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate of KL(pi || ref) from each sample of pi: k2 = (log pi - log ref)^2 / 2. Never negative, biased.

    Args:
        logprobs: log-probabilities of samples of pi under pi, nats. Any shape.
        ref_logprobs: the same samples under the reference, same shape.

    Returns:
        Same shape, nats.

    Raises:
        ValueError: if the shapes differ.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    require_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return 0.5 * (logprobs - ref_logprobs).square()


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """Estimate of KL(pi || ref) from each sample of pi: k3 = (r - 1) - log r, r = ref/pi.

    Unbiased where pi covers the support of ref, and never negative. Computed as expm1(log r) - log r, since
    exp(log r) - 1 loses the digits of a small log r; nothing is clamped.

    Args:
        logprobs: log-probabilities of samples of pi under pi, nats. Any shape.
        ref_logprobs: the same samples under the reference, same shape.

    Returns:
        Same shape, nats.

    Raises:
        ValueError: if the shapes differ.

    Source: Schulman 2020, "Approximating KL divergence".
    """
    require_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def categorical_kl(logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Exact KL(pi || ref) of two categorical distributions: sum_v p_v (log p_v - log q_v).

    Args:
        logits: of pi, the categories on the last axis; -inf for impossible ones.
        ref_logits: of the reference, same shape.

    Returns:
        The shape without the last axis, nats. A category with p = 0 adds 0; one with p > 0 and q = 0 makes it inf.

    Raises:
        ValueError: if the shapes differ or the logits are not floating point.
    """
    require_same_shape(logits=logits, ref_logits=ref_logits)
    require_float(logits=logits, ref_logits=ref_logits)
    logprobs, ref_logprobs = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    log_ratio = torch.where(logprobs == -torch.inf, torch.zeros_like(logprobs), logprobs - ref_logprobs)
    # where p is positive but rounds to 0, 0 * inf would hide the missing support as nan
    terms = torch.where(log_ratio == torch.inf, log_ratio, logprobs.exp() * log_ratio)
    return terms.sum(-1)


def kl_shaped_rewards(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor, kl_coef: float
) -> Tensor:
    """Per-token rewards of RLHF: a KL penalty on every token, and the score on the last one.

    r_t = -kl_coef (log pi - log ref)_t, plus the score at the last True of each row. Summed over the tokens this
    is score - kl_coef * k1 of the response, whose mean under pi is E[score] - kl_coef KL(pi || ref).

    Args:
        scores: one per response, (B,), reward units.
        logprobs: of the sampled tokens under the policy, (B, T), nats.
        ref_logprobs: the same tokens under the reference, (B, T), nats.
        response_mask: (B, T), bool, True on the response's tokens.
        kl_coef: weight of the penalty, reward units per nat, not negative.

    Returns:
        (B, T), reward units, 0 outside the mask; detached: a reward is a number, not a path for gradients.

    Raises:
        ValueError: if shapes or dtypes are wrong, ``kl_coef`` is negative, or a row of the mask is all False.

    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 2; per token as in Ziegler et al. 2019, arXiv:1909.08593.
    """
    require_ndim("logprobs", logprobs, "(B, T)")
    require_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    require_mask("response_mask", response_mask, logprobs.shape)
    require_in("kl_coef", kl_coef, 0.0)
    batch, length = logprobs.shape
    if scores.shape != (batch,):
        raise ValueError(f"scores: got shape {tuple(scores.shape)}, expected ({batch},)")
    if not response_mask.any(1).all():
        rows = (~response_mask.any(1)).nonzero().flatten().tolist()
        raise ValueError(f"response_mask: rows {rows} are all False, expected at least one True in every row")
    penalties = -kl_coef * kl_k1(logprobs, ref_logprobs).detach()
    rewards = torch.where(response_mask, penalties, torch.zeros_like(penalties))
    last = (response_mask * torch.arange(1, length + 1, device=logprobs.device)).argmax(1)
    rewards[torch.arange(batch, device=logprobs.device), last] += scores.detach().to(rewards.dtype)
    return rewards


class AdaptiveKLController:
    """Moves ``kl_coef`` so that the measured KL approaches a target.

    kl_coef <- kl_coef * (1 + clip(kl / target - 1, -0.2, 0.2) * n_steps / horizon).

    Args:
        init_kl_coef: first value of the coefficient, reward units per nat, positive.
        target: KL wanted, nats per sequence, positive.
        horizon: number of sequences over which a full error of 0.2 acts, positive.

    Raises:
        ValueError: if an argument is not positive.

    Source: Ziegler et al. 2019, arXiv:1909.08593, section 2.2.
    """

    def __init__(self, init_kl_coef: float, target: float, horizon: float) -> None:
        require_in("init_kl_coef", init_kl_coef, 0.0, open_low=True)
        require_in("target", target, 0.0, open_low=True)
        require_in("horizon", horizon, 0.0, open_low=True)
        self.kl_coef, self.target, self.horizon = float(init_kl_coef), float(target), float(horizon)

    def update(self, kl: float, n_steps: int) -> None:
        """Take one step of the rule above.

        Args:
            kl: measured mean KL, nats per sequence. (An estimate may be negative.)
            n_steps: number of sequences it was measured on, not negative.

        Raises:
            ValueError: if ``kl`` is NaN or ``n_steps`` is negative.
        """
        if kl != kl:
            raise ValueError("kl: got nan, expected a number of nats")
        require_in("n_steps", n_steps, 0)
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.kl_coef *= 1.0 + error * n_steps / self.horizon


def sequence_kl(logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """k1 of each whole response: the sum over its tokens, one unbiased estimate of KL(pi || ref) per sequence.

    Args:
        logprobs: of the sampled tokens under pi, (B, T), nats.
        ref_logprobs: under the reference, (B, T), nats.
        response_mask: (B, T), bool.

    Returns:
        (B,), nats.

    Raises:
        ValueError: if shapes or dtypes are wrong.
    """
    require_ndim("logprobs", logprobs, "(B, T)")
    log_ratio = kl_k1(logprobs, ref_logprobs)
    require_mask("response_mask", response_mask, log_ratio.shape)
    return masked_sum(log_ratio, response_mask, dim=1)
