"""The oracle: where all responses can be listed, every expectation is a finite sum, computed here to the last digit.

This module imports torch only and shares no code with what it checks. Everywhere P is the number of prompts and N
the number of responses, listed once for all prompts; log-probabilities are of whole responses, in nats.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor


def _same_shape(**tensors: Tensor) -> None:
    if len({x.shape for x in tensors.values()}) > 1:
        got = ", ".join(f"{name} {tuple(x.shape)}" for name, x in tensors.items())
        raise ValueError(f"shapes differ: got {got}; expected (P, N) for all of them")


def _positive_beta(beta: float) -> None:
    if not 0.0 < beta < float("inf"):
        raise ValueError(f"beta: got {beta}, expected a positive number (at beta = 0 the optimum is not unique)")


def enumerate_responses(vocab_size: int, max_length: int, eos_id: int | None = None) -> tuple[Tensor, Tensor]:
    """List every response, in lexicographic order.

    A response ends at its first ``eos_id``, which counts; responses of ``max_length`` tokens that never end are listed
    too. Without ``eos_id`` these are the V^T sequences of exactly ``max_length`` tokens.

    Args:
        vocab_size: V, at least 1.
        max_length: T, at least 1.
        eos_id: the token that ends a response, in [0, V), or None.

    Returns:
        (tokens, response_mask): (N, T) integers, padded with ``eos_id`` (or 0), and (N, T) bool, True on the response.

    Raises:
        ValueError: if an argument is out of range.
    """
    if vocab_size < 1 or max_length < 1:
        raise ValueError(f"vocab_size, max_length: got {vocab_size}, {max_length}, expected at least 1 each")
    if eos_id is not None and not 0 <= eos_id < vocab_size:
        raise ValueError(f"eos_id: got {eos_id}, expected None or a token in [0, {vocab_size - 1}]")
    rows, masks = [], []
    for sequence in itertools.product(range(vocab_size), repeat=max_length):
        length = sequence.index(eos_id) + 1 if eos_id is not None and eos_id in sequence else max_length
        if any(token != eos_id for token in sequence[length:]):
            continue  # the same response with other padding
        rows.append(sequence)
        masks.append([t < length for t in range(max_length)])
    return torch.tensor(rows), torch.tensor(masks)


def kl(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """KL(pi || ref) of every prompt: sum_y pi(y) (log pi(y) - log ref(y)), with 0 log 0 = 0.

    Args:
        logprobs: of all N responses under pi, (P, N), nats.
        ref_logprobs: under the reference, (P, N), nats.

    Returns:
        (P,), nats; inf where pi gives weight to a response that the reference lacks.

    Raises:
        ValueError: if the shapes differ.
    """
    _same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs)
    possible = logprobs > -torch.inf
    log_ratio = torch.where(possible, logprobs - ref_logprobs, torch.zeros_like(logprobs))
    terms = torch.where(log_ratio == torch.inf, log_ratio, logprobs.exp() * log_ratio)
    return terms.sum(-1)


def objective(logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, beta: float) -> Tensor:
    """J of every prompt: E_pi[score] - beta KL(pi || ref). Differentiable in ``logprobs``.

    Args:
        logprobs: of all N responses under pi, (P, N), nats.
        ref_logprobs: under the reference, (P, N), nats.
        scores: of all N responses, (P, N), reward units.
        beta: reward units per nat, not negative; 0 gives the expected score alone.

    Returns:
        (P,), reward units.

    Raises:
        ValueError: if the shapes differ, or ``beta`` is negative.
    """
    _same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, scores=scores)
    if not beta >= 0.0:
        raise ValueError(f"beta: got {beta}, expected a number in [0, inf)")
    expected_score = (logprobs.exp() * scores).sum(-1)
    return expected_score - beta * kl(logprobs, ref_logprobs) if beta else expected_score


def optimal_logprobs(ref_logprobs: Tensor, scores: Tensor, beta: float) -> Tensor:
    """The policy that maximises J: log pi*(y) = log ref(y) + score(y)/beta - log Z.

    Z = sum_y ref(y) exp(score(y)/beta), one number for each prompt.

    Args:
        ref_logprobs: of all N responses under the reference, (P, N), nats.
        scores: (P, N), reward units.
        beta: reward units per nat, positive.

    Returns:
        (P, N), nats, normalised per prompt.

    Raises:
        ValueError: if the shapes differ, or ``beta`` is not positive.
    """
    _same_shape(ref_logprobs=ref_logprobs, scores=scores)
    _positive_beta(beta)
    return (ref_logprobs + scores / beta).log_softmax(-1)


def optimal_value(ref_logprobs: Tensor, scores: Tensor, beta: float) -> Tensor:
    """The largest J: beta log Z, Z = sum_y ref(y) exp(score(y)/beta).

    Args:
        ref_logprobs: of all N responses under the reference, (P, N), nats.
        scores: (P, N), reward units.
        beta: reward units per nat, positive.

    Returns:
        (P,), reward units.

    Raises:
        ValueError: if the shapes differ, or ``beta`` is not positive.
    """
    _same_shape(ref_logprobs=ref_logprobs, scores=scores)
    _positive_beta(beta)
    return beta * (ref_logprobs + scores / beta).logsumexp(-1)


def best_of_n(ref_logprobs: Tensor, scores: Tensor, n: int) -> Tensor:
    """Distribution of the best of n independent draws from the reference.

    Tied responses share the win in proportion to ref: P(y) = (F^n - G^n) ref(y) / (F - G), with F = P(score <= s(y))
    and G = P(score < s(y)).

    Args:
        ref_logprobs: of all N responses under the reference, (P, N), nats.
        scores: (P, N), reward units.
        n: number of draws, at least 1.

    Returns:
        (P, N), log-probabilities, nats; -inf where ref is 0.

    Raises:
        ValueError: if the shapes differ, or ``n`` is less than 1.
    """
    _same_shape(ref_logprobs=ref_logprobs, scores=scores)
    if n < 1:
        raise ValueError(f"n: got {n}, expected at least one draw")
    ordered, order = scores.sort(-1)
    cumulative = torch.nn.functional.pad(ref_logprobs.exp().gather(-1, order).cumsum(-1), (1, 0))
    at_most = cumulative.gather(-1, torch.searchsorted(ordered, scores, right=True))  # F
    below = cumulative.gather(-1, torch.searchsorted(ordered, scores))  # G
    # (F^n - G^n)/(F - G) = sum_k F^(n-1-k) G^k: no cancellation, and right where F = G because ref rounds to 0
    powers = sum((at_most ** (n - 1 - k) * below**k for k in range(n)), start=torch.zeros_like(below))
    return ref_logprobs + powers.log()


def frontier(
    ref_logprobs: Tensor, scores: Tensor, betas: Sequence[float], gold_scores: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The best policies at every price of divergence: their KL from the reference, and their expected score.

    For each beta, pi_beta ~ ref exp(scores / beta). No policy has a higher expected score at the same KL.

    Args:
        ref_logprobs: of all N responses under the reference, (P, N), nats.
        scores: what the policies are optimal for, (P, N), reward units.
        betas: K prices, reward units per nat, positive.
        gold_scores: what they are judged by, (P, N); None: ``scores``. With other scores the curve is no frontier but
            the path of a policy that optimises a proxy.

    Returns:
        (kl, expected), (K, P) each: nats, and reward units.

    Raises:
        ValueError: if the shapes differ, or a beta is not positive.
    """
    judged_by = scores if gold_scores is None else gold_scores
    _same_shape(ref_logprobs=ref_logprobs, scores=scores, gold_scores=judged_by)
    best = [optimal_logprobs(ref_logprobs, scores, beta) for beta in betas]
    expected = [(logprobs.exp() * judged_by).sum(-1) for logprobs in best]
    return torch.stack([kl(logprobs, ref_logprobs) for logprobs in best]), torch.stack(expected)


def preference_probabilities(scores: Tensor) -> Tensor:
    """Bradley-Terry probability that response i is preferred to response j: sigmoid(s_i - s_j).

    Args:
        scores: (P, N), reward units, one unit of which is one nat of preference.

    Returns:
        (P, N, N), one half on the diagonal; entries (i, j) and (j, i) sum to 1.
    """
    return torch.sigmoid(scores.unsqueeze(-1) - scores.unsqueeze(-2))


def population_dpo_loss(logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, beta: float) -> Tensor:
    """DPO's loss with infinitely many labels: the mean over all N^2 ordered pairs (i, j), i = j included.

    sum_ij p_ij (-log sigmoid(beta h_ij)) / N^2, with p_ij = sigmoid(s_i - s_j) the probability that i was chosen over
    j, and h_ij = log(pi/ref)(i) - log(pi/ref)(j). Each unordered pair stands twice in the sum, once for either outcome,
    so this is half of what one labelled comparison costs: log(2)/2 at the reference. Differentiable in ``logprobs``.

    Args:
        logprobs: of all N responses under pi, (P, N), nats, finite.
        ref_logprobs: under the reference, (P, N), nats, finite.
        scores: (P, N), reward units.
        beta: reward units per nat, positive.

    Returns:
        (P,), nats; least at the policy that maximises E[score] - beta KL.

    Raises:
        ValueError: if the shapes differ, or ``beta`` is not positive.
    """
    _same_shape(logprobs=logprobs, ref_logprobs=ref_logprobs, scores=scores)
    _positive_beta(beta)
    log_ratio = logprobs - ref_logprobs
    margins = beta * (log_ratio.unsqueeze(-1) - log_ratio.unsqueeze(-2))
    losses = -torch.nn.functional.logsigmoid(margins)
    return (preference_probabilities(scores) * losses).mean((-2, -1))


def estimator_moments(logprobs: Tensor, estimates: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and total variance of a single-sample estimator whose sample is one response.

    mean = sum_y pi(y) g(y); variance = sum_y pi(y) |g(y) - mean|^2, the trace of the covariance.

    Args:
        logprobs: of all N responses under the sampling policy, (N,), nats.
        estimates: g(y) of every response, (N, D).

    Returns:
        (mean (D,), variance ()), in units of the estimate and its square.

    Raises:
        ValueError: if the shapes do not fit.
    """
    if logprobs.ndim != 1 or estimates.ndim != 2 or len(logprobs) != len(estimates):
        got = f"{tuple(logprobs.shape)}, {tuple(estimates.shape)}"
        raise ValueError(f"logprobs, estimates: got shapes {got}, expected (N,), (N, D)")
    weights = logprobs.exp().unsqueeze(1)
    mean = (weights * estimates).sum(0)
    return mean, (weights * (estimates - mean).square()).sum()
