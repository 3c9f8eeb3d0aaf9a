"""Losses on pairs that need no reference policy: both work with mean log-probabilities per token."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from rlhfkit.validation import require_in, require_same_shape


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
