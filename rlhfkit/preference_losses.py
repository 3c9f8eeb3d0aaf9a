"""Losses on pairs of responses, one number per pair, one function per method."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from rlhfkit.reference_free_losses import orpo_loss, simpo_loss
from rlhfkit.validation import require_in, require_mask, require_same_shape

__all__ = [
    "bradley_terry_loss",
    "conservative_dpo_loss",
    "dpo_loss",
    "hinge_dpo_loss",
    "implicit_rewards",
    "ipo_loss",
    "kto_loss",
    "orpo_loss",
    "simpo_loss",
]


def bradley_terry_loss(chosen_scores: Tensor, rejected_scores: Tensor, margin: Tensor | None = None) -> Tensor:
    """Negative log-likelihood that the chosen response wins: -log sigmoid(s_chosen - s_rejected - margin).

    Args:
        chosen_scores: reward model's score of the preferred response, (B,), reward units.
        rejected_scores: of the other one, (B,).
        margin: how much better the chosen one should be, (B,), reward units; treated as constant. None: 0.

    Returns:
        Loss of each pair, (B,), nats; log 2 at equal scores, finite for any finite difference.

    Raises:
        ValueError: if the shapes differ.

    Source: Bradley and Terry 1952; Ouyang et al. 2022, arXiv:2203.02155, eq. 1; margin: Touvron et al. 2023,
    arXiv:2307.09288, eq. 2.
    """
    require_same_shape(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    difference = chosen_scores - rejected_scores
    if margin is not None:
        require_same_shape(chosen_scores=chosen_scores, margin=margin)
        difference = difference - margin.detach()
    return -logsigmoid(difference)


def _log_ratio_difference(
    chosen_logprobs: Tensor, rejected_logprobs: Tensor, ref_chosen_logprobs: Tensor, ref_rejected_logprobs: Tensor
) -> Tensor:
    """log(pi/ref) of the chosen response minus that of the rejected one, (B,); the reference is constant."""
    require_same_shape(
        chosen_logprobs=chosen_logprobs,
        rejected_logprobs=rejected_logprobs,
        ref_chosen_logprobs=ref_chosen_logprobs,
        ref_rejected_logprobs=ref_rejected_logprobs,
    )
    chosen = chosen_logprobs - ref_chosen_logprobs.detach()
    return chosen - (rejected_logprobs - ref_rejected_logprobs.detach())


def dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    beta: float,
) -> Tensor:
    """Direct preference optimisation: -log sigmoid(beta h), h = log(pi/ref)(chosen) - log(pi/ref)(rejected).

    Args:
        chosen_logprobs: log pi of the preferred response, summed over its tokens, (B,), nats.
        rejected_logprobs: of the other one, (B,), nats.
        ref_chosen_logprobs: the same response under the reference, (B,), nats; treated as constant.
        ref_rejected_logprobs: (B,), nats; treated as constant.
        beta: strength of the pull to the reference, reward units per nat, not negative.

    Returns:
        Loss of each pair, (B,), nats; log 2 where the policy equals the reference.

    Raises:
        ValueError: if the shapes differ, or ``beta`` is negative.

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7.
    """
    require_in("beta", beta, 0.0)
    h = _log_ratio_difference(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    return -logsigmoid(beta * h)


def implicit_rewards(logprobs: Tensor, ref_logprobs: Tensor, beta: float) -> Tensor:
    """Reward that a policy is optimal for, up to a constant per prompt: beta (log pi - log ref), detached.

    Args:
        logprobs: of whole responses under the policy, (B,), nats.
        ref_logprobs: under the reference, (B,), nats.
        beta: reward units per nat, not negative.

    Returns:
        (B,), reward units, detached; what libraries log as ``rewards/chosen`` and ``rewards/rejected``.

    Raises:
        ValueError: if the shapes differ, or ``beta`` is negative.

    Source: Rafailov et al. 2023, arXiv:2305.18290, section 4 (before eq. 7).
    """
    require_in("beta", beta, 0.0)
    require_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    return beta * (logprobs - ref_logprobs).detach()


def ipo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    beta: float,
) -> Tensor:
    """Identity preference optimisation: (h - 1/(2 beta))^2, h as in :func:`dpo_loss`. It stops at a finite gap.

    Args:
        chosen_logprobs: log pi of the preferred response, summed over its tokens (not averaged), (B,), nats.
        rejected_logprobs: of the other one, (B,), nats.
        ref_chosen_logprobs: under the reference, (B,), nats; treated as constant.
        ref_rejected_logprobs: (B,), nats; treated as constant.
        beta: the paper's tau, positive; the gap aimed at is 1/(2 beta) nats.

    Returns:
        Loss of each pair, (B,), squared nats.

    Raises:
        ValueError: if the shapes differ, or ``beta`` is not positive.

    Source: Azar et al. 2023, arXiv:2310.12036, eq. 17. TRL averages the log-ratios per token; the paper sums.
    """
    require_in("beta", beta, 0.0, open_low=True)
    h = _log_ratio_difference(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    return (h - 1 / (2 * beta)).square()


def conservative_dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    beta: float,
    label_smoothing: float,
) -> Tensor:
    """DPO for labels that are wrong with probability eps: -(1 - eps) log sigmoid(beta h) - eps log sigmoid(-beta h).

    Args:
        chosen_logprobs: log pi of the preferred response, summed over its tokens, (B,), nats.
        rejected_logprobs: of the other one, (B,), nats.
        ref_chosen_logprobs: under the reference, (B,), nats; treated as constant.
        ref_rejected_logprobs: (B,), nats; treated as constant.
        beta: reward units per nat, not negative.
        label_smoothing: eps in [0, 1], the assumed share of flipped labels.

    Returns:
        Loss of each pair, (B,), nats; smallest at beta h = log((1 - eps)/eps).

    Raises:
        ValueError: if the shapes differ, ``beta`` is negative, or ``label_smoothing`` lies outside [0, 1].

    Source: Mitchell 2023, "A note on DPO with noisy preferences and relationship to IPO".
    """
    require_in("beta", beta, 0.0)
    require_in("label_smoothing", label_smoothing, 0.0, 1.0)
    h = _log_ratio_difference(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    return -(1 - label_smoothing) * logsigmoid(beta * h) - label_smoothing * logsigmoid(-beta * h)


def hinge_dpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    ref_chosen_logprobs: Tensor,
    ref_rejected_logprobs: Tensor,
    beta: float,
) -> Tensor:
    """Hinge loss on the implicit reward margin: max(0, 1 - beta h), h as in :func:`dpo_loss`.

    Args:
        chosen_logprobs: log pi of the preferred response, summed over its tokens, (B,), nats.
        rejected_logprobs: of the other one, (B,), nats.
        ref_chosen_logprobs: under the reference, (B,), nats; treated as constant.
        ref_rejected_logprobs: (B,), nats; treated as constant.
        beta: reward units per nat, not negative.

    Returns:
        Loss of each pair, (B,); no gradient once the margin beta h exceeds 1.

    Raises:
        ValueError: if the shapes differ, or ``beta`` is negative.

    Source: Zhao et al. 2023, arXiv:2305.10425 (SLiC-HF), with the reference as in TRL's ``loss_type="hinge"``.
    """
    require_in("beta", beta, 0.0)
    h = _log_ratio_difference(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs)
    return relu(1 - beta * h)


def kto_loss(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    desirable: Tensor,
    kl_reference: Tensor,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> Tensor:
    """KTO, for responses judged one by one: w (1 - sigmoid(g)) for a liked one, w (1 - sigmoid(-g)) for a disliked one.

    g = beta (h - z), h = log(pi/ref) of the response, z the reference point, w the weight of its kind.

    Args:
        logprobs: log pi of each response, summed over its tokens, (B,), nats.
        ref_logprobs: under the reference, (B,), nats; treated as constant.
        desirable: (B,), bool, whether the response was liked.
        kl_reference: z, an estimate of KL(pi || ref) of the batch, a scalar tensor, nats; treated as constant. The
            paper clamps it at 0 from below; that is the caller's line.
        beta: reward units per nat, not negative.
        desirable_weight: weight of liked responses, not negative.
        undesirable_weight: of the others, not negative.

    Returns:
        Loss of each response, (B,), between 0 and its weight.

    Raises:
        ValueError: if the shapes differ, ``desirable`` is not boolean, or a number is negative.

    Source: Ethayarajh et al. 2024, arXiv:2402.01306, eq. 8.
    """
    require_in("beta", beta, 0.0)
    require_in("desirable_weight", desirable_weight, 0.0)
    require_in("undesirable_weight", undesirable_weight, 0.0)
    require_same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    require_mask("desirable", desirable, logprobs.shape)
    if not isinstance(kl_reference, Tensor) or kl_reference.ndim:
        got = tuple(kl_reference.shape) if isinstance(kl_reference, Tensor) else type(kl_reference).__name__
        raise ValueError(f"kl_reference: got {got}, expected a scalar tensor")
    gain = beta * (logprobs - ref_logprobs.detach() - kl_reference.detach())
    liked, disliked = desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain)
    return torch.where(desirable, liked, disliked)
