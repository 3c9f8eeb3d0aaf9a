"""Kullback-Leibler divergence: estimators from samples, the exact value, its use as a loss and as a reward. In nats."""

from __future__ import annotations

import torch
from torch import Tensor

from rlhfkit.kl_controller import AdaptiveKLController
from rlhfkit.masked import masked_sum
from rlhfkit.validation import require_float, require_in, require_mask, require_ndim, require_same_shape

__all__ = [
    "AdaptiveKLController",
    "categorical_kl",
    "full_vocabulary_kl",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_reward_to_go_loss",
    "kl_shaped_rewards",
    "off_policy_k2",
    "off_policy_k3",
    "sequence_kl",
    "straight_through",
]


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


def full_vocabulary_kl(logits: Tensor, ref_logits: Tensor, response_mask: Tensor) -> Tensor:
    """Estimate of the KL of whole responses: the exact KL of the next token at every prefix visited, summed.

    sum_t KL(pi(. | x, y_<t) || ref(. | x, y_<t)) along a response y of pi. Its mean under pi is KL(pi || ref), as that
    of k1 is, with the next token's randomness averaged out at every prefix (Rao-Blackwell, term by term). The variance
    is usually far lower, not always: where a k1 makes up for what later prefixes cost, the sum of k1 can be constant.

    Args:
        logits: of pi where each token was chosen, (B, T, V).
        ref_logits: of the reference, (B, T, V).
        response_mask: (B, T), bool, True on the response's tokens.

    Returns:
        (B,), nats, never negative. As a loss it has the gradient of the next token's KL alone: what an early token does
        to later prefixes is missing.

    Raises:
        ValueError: if shapes or dtypes are wrong.

    Source: Amini et al. 2025, arXiv:2504.10637.
    """
    require_ndim("logits", logits, "(B, T, V)")
    require_same_shape(logits=logits, ref_logits=ref_logits)
    require_mask("response_mask", response_mask, logits.shape[:2])
    padding = ~response_mask.unsqueeze(-1)  # filled before the softmax, whose gradient at nan is nan even times 0
    return categorical_kl(logits.masked_fill(padding, 0.0), ref_logits.masked_fill(padding, 0.0)).sum(1)


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """The value of one tensor with the gradient of another: value + surrogate - surrogate, the last one detached.

    With ``kl_k3`` as value and ``kl_k2`` as surrogate a loss reports an unbiased KL and descends along its gradient.

    Args:
        value: what the result equals; its own gradient is cut off. Any shape.
        surrogate: what the result is differentiated as, same shape, finite.

    Returns:
        Same shape.

    Raises:
        ValueError: if the shapes differ.

    Source: Bengio et al. 2013, arXiv:1308.3432, for the device; verl's ``k3+`` and ``low_var_kl+`` for its use here.
    """
    require_same_shape(value=value, surrogate=surrogate)
    return value.detach() + (surrogate - surrogate.detach())


def kl_reward_to_go_loss(logprobs: Tensor, ref_logprobs: Tensor, response_mask: Tensor) -> Tensor:
    """Token losses with the gradient of the KL of whole responses: log pi_t times the k1 of this and all later tokens.

    Summed over the tokens of responses of pi and averaged, the gradient is that of KL(pi || ref), with what early
    tokens do to later ones. It is the policy gradient of the KL penalty in the reward, with reward-to-go.

    Args:
        logprobs: of the sampled tokens under pi, (B, T), nats.
        ref_logprobs: under the reference, (B, T), nats; treated as constant.
        response_mask: (B, T), bool.

    Returns:
        (B, T), 0 outside the mask. The value means nothing; only the gradient does.

    Raises:
        ValueError: if shapes or dtypes are wrong.

    Source: Tang and Munos 2025, arXiv:2506.09477.
    """
    require_ndim("logprobs", logprobs, "(B, T)")
    log_ratio = kl_k1(logprobs, ref_logprobs).detach()
    require_mask("response_mask", response_mask, log_ratio.shape)
    zero = torch.zeros_like(log_ratio)
    to_go = torch.where(response_mask, log_ratio, zero).flip(1).cumsum(1).flip(1)
    return torch.where(response_mask, logprobs * to_go, zero)


def off_policy_k2(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k2 for samples of an older policy, as a loss: its expected gradient is that of KL(pi || ref).

    (pi/old) (log pi - log ref)^2 / 2, with the importance ratio pi/old constant.

    Args:
        logprobs: of the samples under the policy being trained, nats. Any shape.
        old_logprobs: under the policy that sampled them; treated as constant.
        ref_logprobs: under the reference; treated as constant.

    Returns:
        Same shape. A loss: its mean is not the KL.

    Raises:
        ValueError: if the shapes differ.

    Source: Tang and Munos 2025, arXiv:2506.09477; Liu et al. 2025, arXiv:2510.01555.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
    ratio = torch.exp(logprobs - old_logprobs).detach()
    return ratio * kl_k2(logprobs, ref_logprobs.detach())


def off_policy_k3(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 for samples of an older policy: mean and expected gradient are those of KL(pi || ref).

    (pi/old) k3, with the importance ratio pi/old *differentiated*: with a constant ratio the gradient is wrong.

    Args:
        logprobs: of the samples under the policy being trained, nats. Any shape.
        old_logprobs: under the policy that sampled them, which must cover the support of pi and of ref; constant.
        ref_logprobs: under the reference; treated as constant.

    Returns:
        Same shape, nats.

    Raises:
        ValueError: if the shapes differ.

    Source: TRL 1.16's ``use_bias_correction_kl``; Liu et al. 2025, arXiv:2510.01555.
    """
    require_same_shape(logprobs=logprobs, old_logprobs=old_logprobs, ref_logprobs=ref_logprobs)
    ratio = torch.exp(logprobs - old_logprobs.detach())
    return ratio * kl_k3(logprobs, ref_logprobs.detach())


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
