"""Losses on pairs of responses, one number per pair, one function per method."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from rlhfkit.validation import require_in, require_mask, require_same_shape


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


def _per_token(name: str, logprobs: Tensor, lengths: Tensor) -> Tensor:
    """Mean log-probability per token, (B,); lengths are counts of at least 1 and constant."""
    if not isinstance(lengths, Tensor) or lengths.shape != logprobs.shape:
        got = tuple(lengths.shape) if isinstance(lengths, Tensor) else type(lengths).__name__
        raise ValueError(f"{name}: got shape {got}, expected {tuple(logprobs.shape)}, one length per response")
    if lengths.numel() and not lengths.min() >= 1:
        raise ValueError(f"{name}: got {lengths.min().item()}, expected at least 1 token in every response")
    return logprobs / lengths.detach()


def simpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float,
    margin: float,
) -> Tensor:
    """SimPO: -log sigmoid(beta (a_chosen - a_rejected) - margin), a the mean log-probability per token. No reference.

    Args:
        chosen_logprobs: log pi of the preferred response, summed over its tokens, (B,), nats.
        rejected_logprobs: of the other one, (B,), nats.
        chosen_lengths: tokens of the preferred response, its end included, (B,), at least 1.
        rejected_lengths: of the other one, (B,).
        beta: scale of the mean log-probability, dimensionless, not negative.
        margin: the paper's gamma, how much better the chosen one is to be, dimensionless, not negative.

    Returns:
        Loss of each pair, (B,), nats.

    Raises:
        ValueError: if the shapes differ, a length is less than 1, or ``beta`` or ``margin`` is negative.

    Source: Meng et al. 2024, arXiv:2405.14734, eq. 6.
    """
    require_in("beta", beta, 0.0)
    require_in("margin", margin, 0.0)
    require_same_shape(chosen_logprobs=chosen_logprobs, rejected_logprobs=rejected_logprobs)
    chosen = _per_token("chosen_lengths", chosen_logprobs, chosen_lengths)
    rejected = _per_token("rejected_lengths", rejected_logprobs, rejected_lengths)
    return -logsigmoid(beta * (chosen - rejected) - margin)


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


def _log_odds(mean_logprobs: Tensor) -> Tensor:
    """log p/(1 - p) of p = exp(mean log-probability), through expm1: near p = 1 the digits of 1 - p stay."""
    return mean_logprobs - torch.log(-torch.expm1(mean_logprobs))


def orpo_loss(
    chosen_logprobs: Tensor,
    rejected_logprobs: Tensor,
    chosen_lengths: Tensor,
    rejected_lengths: Tensor,
    beta: float,
) -> Tensor:
    """ORPO: the chosen response's mean negative log-likelihood, plus beta times -log sigmoid of the log odds ratio.

    -a_w - beta log sigmoid(log(p_w/(1 - p_w)) - log(p_l/(1 - p_l))), p = exp(a), a the mean log-probability per token.
    No reference.

    Args:
        chosen_logprobs: log pi of the preferred response, summed over its tokens, (B,), nats, negative.
        rejected_logprobs: of the other one, (B,), nats, negative.
        chosen_lengths: tokens of the preferred response, its end included, (B,), at least 1.
        rejected_lengths: of the other one, (B,).
        beta: the paper's lambda, weight of the second term, dimensionless, not negative.

    Returns:
        Loss of each pair, (B,), nats.

    Raises:
        ValueError: if the shapes differ, a length is less than 1, or ``beta`` is negative.

    Source: Hong et al. 2024, arXiv:2403.07691, eq. 6 and 7.
    """
    require_in("beta", beta, 0.0)
    require_same_shape(chosen_logprobs=chosen_logprobs, rejected_logprobs=rejected_logprobs)
    chosen = _per_token("chosen_lengths", chosen_logprobs, chosen_lengths)
    rejected = _per_token("rejected_lengths", rejected_logprobs, rejected_lengths)
    return -chosen - beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))
