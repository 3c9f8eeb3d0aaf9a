"""Chapter 4, proximal policy optimisation: eleven questions, with the wrong answers that their checks must reject."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, tensor

from rlhfkit.homework.comparisons import (
    Fail,
    as_tensor,
    expect_close,
    expect_constant,
    expect_shape,
    gradient,
    gradient_or_none,
    in_two_steps,
    is_distribution,
    normal,
    numbers,
    outcome,
    require,
    show,
    source,
    unpack,
)
from rlhfkit.homework.core import Question

# -- the importance weight of a response -----------------------------------------------------------------


def importance_estimate(logprobs, old_logprobs, scores, response_mask):  # type: ignore[no-untyped-def]
    """Mean of weight * score over responses of the old policy. (B, T), (B, T), (B,), (B, T) -> number."""
    log_ratios = torch.where(response_mask, logprobs - old_logprobs.detach(), 0.0)
    weights = torch.exp(log_ratios.sum(1))  # the product of the tokens' ratios
    return (weights * scores.detach()).mean()


_OLD_PATHS = [(0, 0)] * 6 + [(0, 1)] * 6 + [(1, 0)] + [(1, 1)] * 3
"""Sixteen responses of two tokens, each as often as the old policy's probabilities 6/16, 6/16, 1/16, 3/16 say."""
_PATH_SCORES = {(0, 0): 1.0, (0, 1): -2.0, (1, 0): 5.0, (1, 1): 3.0}


def _path_world(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Parameters, their log-probabilities of the sixteen responses, the old ones, scores, the exact expectation."""
    logits = normal(3, 2, seed=seed).requires_grad_()
    logprobs = logits.log_softmax(1)  # rows: first token, second after token 0, second after token 1
    old = tensor([[0.75, 0.25], [0.5, 0.5], [0.25, 0.75]]).log()
    first, second = tensor(_OLD_PATHS).T
    taken, old_taken = (torch.stack([x[0, first], x[1 + first, second]], 1) for x in (logprobs, old))
    scores = tensor([_PATH_SCORES[path] for path in _OLD_PATHS])
    exact = torch.stack([s * (logprobs[0, a] + logprobs[1 + a, b]).exp() for (a, b), s in _PATH_SCORES.items()]).sum()
    return logits, taken, old_taken, scores, exact


def _offpolicy_probe(f: Any) -> list[Any]:
    logprobs, old, scores = -normal(3, 4, seed=1).abs() - 0.1, -normal(3, 4, seed=2).abs() - 0.1, normal(3, seed=3) + 1
    mask = tensor([[True, True, False, False], [True] * 4, [True, True, True, False]])
    inputs = [x.requires_grad_() for x in (logprobs, old, scores)]
    value = f(*inputs, mask)
    alone = f(logprobs[1:2], old[1:2], scores[1:2], mask[1:2])
    return [value, alone, *(gradient_or_none(value, x) for x in inputs)]


def _one_response(new: Any, old: Any, score: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The inputs for one response from its tokens' log-probabilities now and then."""
    logprobs, old_logprobs = tensor(new, dtype=torch.float32)[None], tensor(old, dtype=torch.float32)[None]
    return logprobs, old_logprobs, tensor([score]), torch.ones_like(logprobs, dtype=torch.bool)


_FAR = _one_response([math.log(0.9)] * 3, [math.log(0.001)] * 3)  # weight 900^3
_ONE_FAR = _one_response([-0.1], [-12.1])  # weight exp(12)
_LONG = _one_response([-3.0] * 60, [-3.05] * 60)  # weight exp(3); exp(-180) is 0 in float32
_RARE = _one_response([-18.0], [-18.5])  # weight exp(0.5); exp(-18.5) is 1e-8


def _wild_padding() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The response of the task's example, weight 3.75 and score 2, and padding whose ratio overflows."""
    logprobs, old = tensor([[math.log(0.5), math.log(0.6), 0.0]]), tensor([[math.log(0.4), math.log(0.2), -1000.0]])
    return logprobs.requires_grad_(), old, tensor([2.0]), tensor([[True, True, False]])


def _late_response() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two responses with weights 6 and 2; the first one begins at the third position."""
    mask = tensor([[False, False, True, True], [True, True, False, False]])
    ratios = tensor([[0.5, 3.0, 2.0, 3.0], [4.0, 0.5, 5.0, 0.2]])
    return ratios.log() - 2, torch.full((2, 4), -2.0), tensor([1.0, 3.0]), mask


def _offpolicy_unusual(f: Any) -> list[Any]:
    padded = _wild_padding()
    return [
        outcome(900.0**3, f, *_FAR),
        outcome(math.exp(12), f, *_ONE_FAR),
        outcome(math.exp(3), f, *_LONG),
        outcome(math.exp(0.5), f, *_RARE),
        outcome(7.5, f, *padded),
        outcome(tensor([[7.5, 7.5, 0.0]]), lambda: gradient(f(*padded), padded[0], "probe")),
        f(*_late_response()),
        *(outcome(score, f, *_one_response([-1.0], [-1.0], score)) for score in (25.0, 0.5)),
    ]


of = Question(
    id="offpolicy",
    title="an expectation under one policy from another's responses",
    chapter=4,
    kind="function",
    theory=False,
    variable="importance_estimate",
    reference=importance_estimate,
    reference_source=source(importance_estimate),
    hints=(
        "By which factor is a response more likely under the new policy than under the one that wrote it?",
        "The probability of a response is a product over its tokens, so its weight is the product of the tokens' "
        "ratios, and a ratio is the exponential of a difference of log-probabilities.",
        "exp((logprobs - old_logprobs) summed over the tokens that count), times the score, averaged over the batch; "
        "old_logprobs and scores are detached.",
    ),
    explanation="E_old[pi/old * s] = sum over y of old(y) pi(y)/old(y) s(y) = E_pi[s], as long as old(y) > 0 wherever "
    "pi(y) s(y) is not 0. The weight of a response is the product of its tokens' ratios, that is, exp of the summed "
    "differences. Its gradient is weight * score * grad log pi: the policy gradient, from another policy's responses. "
    "Dividing by the sum of the weights would be another estimate, and a biased one.",
    probes=in_two_steps(_offpolicy_probe, _offpolicy_unusual, importance_estimate),
)


@of.case("with the policy that wrote them, the plain mean", 1, "what is the weight of a response if nothing changed?")
def _(f: Any) -> None:
    logprobs = -normal(3, 4, seed=4).abs() - 0.1
    mask = tensor([[True, True, False, False], [True] * 4, [True, True, True, False]])
    got = f(logprobs, logprobs.clone(), tensor([1.0, 2.0, 6.0]), mask)
    expect_close(got, 3.0, "estimate from scores 1, 2, 6")
    got = f(logprobs[:2], logprobs[:2].clone(), tensor([25.0, 0.5]), mask[:2])
    expect_close(got, 12.75, "estimate from scores 25 and 0.5")


@of.case("a single response: the product of its tokens' ratios, times its score", 1, "0.5/0.4 and 0.6/0.2")
def _(f: Any) -> None:
    new, old = tensor([[0.5, 0.6]]).log(), tensor([[0.4, 0.2]]).log()
    got = f(new, old, tensor([2.0]), tensor([[True, True]]))
    expect_close(got, 7.5, "probabilities 0.5, 0.6 now, 0.4, 0.2 then, score 2")
    expect_close(f(*_FAR), 900.0**3, "three tokens, each with probability 0.9 now, 0.001 then, score 1", rtol=1e-3)
    expect_close(f(*_ONE_FAR), math.exp(12), "one token, log-probability -0.1 now, -12.1 then, score 1", rtol=1e-3)
    expect_close(f(*_RARE), math.exp(0.5), "one token, log-probability -18 now, -18.5 then, score 1", rtol=1e-3)
    expect_close(f(*_LONG), math.exp(3), "60 tokens, log-probability -3 now, -3.05 then, score 1", rtol=1e-3)


@of.case("all responses of the old policy give the new policy's mean", 2, "E_old[pi/old * s] = E_pi[s]")
def _(f: Any) -> None:
    for seed in (5, 6):
        _, logprobs, old, scores, exact = _path_world(seed)
        got = f(logprobs, old, scores, torch.ones_like(old, dtype=torch.bool))
        expect_close(got, exact, "estimate, each response as often as the old policy writes it, against E_pi[score]")


@of.case("its gradient is the new policy's gradient", 2, "weight * score * grad log pi: what must stay in the graph?")
def _(f: Any) -> None:
    for seed in (7, 8):
        logits, logprobs, old, scores, exact = _path_world(seed)
        value = f(logprobs, old, scores, torch.ones_like(old, dtype=torch.bool))
        (want,) = torch.autograd.grad(exact, logits, retain_graph=True)
        expect_close(gradient(value, logits, "gradient in the logits"), want, "gradient against that of E_pi[score]")


@of.case("what the old policy and the judge said is constant", 1, "detach what is not being trained")
def _(f: Any) -> None:
    logits, logprobs, old, scores, _ = _path_world(9)
    old, scores = old.clone().requires_grad_(), scores.clone().requires_grad_()
    value = f(logprobs, old, scores, torch.ones_like(old, dtype=torch.bool))
    slope = gradient(value, logits, "gradient in the logits")
    require(slope.abs().max() > 1e-6, "the gradient in the logits is 0")
    expect_constant(value, "old_logprobs", old)
    expect_constant(value, "scores", scores)


@of.case("padding has no weight", 1, "compare with each response alone, cut to its length")
def _(f: Any) -> None:
    new, old, scores = -normal(3, 4, seed=10).abs(), -normal(3, 4, seed=11).abs(), tensor([1.0, -2.0, 3.0])
    lengths = (2, 4, 1)
    mask = torch.arange(4) < tensor(lengths)[:, None]
    got = f(new - 0.1, old - 0.1, scores, mask)
    alone = [
        as_tensor(
            f(new[i : i + 1, :n] - 0.1, old[i : i + 1, :n] - 0.1, scores[i : i + 1], mask[i : i + 1, :n]), "alone"
        )
        for i, n in enumerate(lengths)
    ]
    expect_close(got, torch.stack(alone).mean(), "padded batch against the mean of the responses alone")
    require(all(x.abs() > 1e-3 for x in alone), "the estimate of a single response is 0")
    got = f(*_late_response())
    expect_close(got, 6.0, "weights 6 and 2, scores 1 and 3, mask [[F, F, T, T], [T, T, F, F]]")
    padded = _wild_padding()
    value, where = f(*padded), "one response with padding, where logprobs is 0 and old_logprobs -1000"
    expect_close(value, 7.5, where)
    expect_close(gradient(value, padded[0], "gradient in logprobs"), tensor([[7.5, 7.5, 0.0]]), f"gradient, {where}")


def _weighted(weigh: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    """The estimate with another weight: masked log-ratios and the mask (as floats) in, weights (B,) out."""

    def f(logprobs: Tensor, old_logprobs: Tensor, scores: Tensor, response_mask: Tensor) -> Tensor:
        log_ratios = torch.where(response_mask, logprobs - old_logprobs.detach(), 0.0)
        return (weigh(log_ratios, response_mask.float()) * scores.detach()).mean()

    return f


def _quotient_estimate(logprobs: Tensor, old_logprobs: Tensor, scores: Tensor, response_mask: Tensor) -> Tensor:
    quotients = torch.where(response_mask, logprobs / old_logprobs.detach(), 1.0)
    return (quotients.prod(1) * scores.detach()).mean()


def _quotient_of_sums(logprobs: Tensor, old_logprobs: Tensor, scores: Tensor, response_mask: Tensor) -> Tensor:
    new, old = (torch.where(response_mask, x, 0.0).sum(1) for x in (logprobs, old_logprobs.detach()))
    return (new / old * scores.detach()).mean()


def _quotient_of_exps(logprobs: Tensor, old_logprobs: Tensor, scores: Tensor, response_mask: Tensor) -> Tensor:
    new, old = (torch.where(response_mask, x, 0.0).sum(1).exp() for x in (logprobs, old_logprobs.detach()))
    return (new / old * scores.detach()).mean()


def _undetached_estimate(logprobs: Tensor, old_logprobs: Tensor, scores: Tensor, response_mask: Tensor) -> Tensor:
    return (torch.where(response_mask, logprobs - old_logprobs, 0.0).sum(1).exp() * scores).mean()


of.plant(
    (
        "nothing-detached",
        "the formula is right; old_logprobs and scores are constants and must be detached",
        _undetached_estimate,
        "common",
    ),
    (
        "quotient-undetached",
        "you divide log-probabilities, where the ratio is exp of their difference; and old_logprobs and scores are constants",
        lambda n, o, s, m: (torch.where(m, n / o, 1.0).prod(1) * s).mean(),
        "W-PPO-3",
    ),
    (
        "quotient-of-logs",
        "you divide log-probabilities: the ratio is exp of their difference, and log pi_old < 0 turns the gradient round",
        _quotient_estimate,
        "W-PPO-3",
    ),
    (
        "quotient-of-summed-logs",
        "the quotient of the responses' log-probabilities is no ratio of probabilities: take exp of the difference",
        _quotient_of_sums,
        "W-PPO-3",
    ),
    ("log-ratio", "the exp is missing: this is the log of the weight", _weighted(lambda d, m: d.sum(1)), "common"),
    ("inverse", "the weight is new over old, not old over new", _weighted(lambda d, m: (-d).sum(1).exp()), "common"),
    (
        "unweighted",
        "no weight: this is the mean under the policy that wrote the responses",
        lambda n, o, s, m: s.detach().mean(),
        "W-PPO-7",
    ),
    (
        "score-function",
        "log pi times the score has the gradient of the sampling policy only, and not the value of the mean",
        lambda n, o, s, m: (torch.where(m, n, 0.0).sum(1) * s.detach()).mean(),
        "common",
    ),
    (
        "detached",
        "the weight is detached: the value is right, but no gradient reaches the policy",
        lambda n, o, s, m: importance_estimate(n.detach(), o, s, m),
        "W-PPO-8",
    ),
    (
        "mean-of-ratios",
        "you averaged the tokens' ratios; the weight of a response is their product",
        _weighted(lambda d, m: (d.exp() * m).sum(1) / m.sum(1)),
        "common",
    ),
    (
        "sum-of-ratios",
        "you added the tokens' ratios; the weight of a response is their product",
        _weighted(lambda d, m: (d.exp() * m).sum(1)),
        "common",
    ),
    (
        "geometric-mean",
        "you took the mean of the log-ratios: that is the T-th root of the weight",
        _weighted(lambda d, m: (d.sum(1) / m.sum(1)).exp()),
        "common",
    ),
    ("first-token", "only the first token's ratio enters", _weighted(lambda d, m: d[:, 0].exp()), "common"),
    (
        "last-token",
        "only the last token's ratio enters",
        _weighted(lambda d, m: d.gather(1, (m.sum(1) - 1).long()[:, None])[:, 0].exp()),
        "common",
    ),
    (
        "padding-counted",
        "the padding's ratios are in the product",
        lambda n, o, s, m: importance_estimate(n, o, s, torch.ones_like(m)),
        "common",
    ),
    ("summed", "sum over the batch: the mean is asked for", _weighted(lambda d, m: d.sum(1).exp() * len(d)), "common"),
    (
        "self-normalised",
        "you divided by the sum of the weights: for a single response its weight drops out",
        _weighted(lambda d, m: d.sum(1).exp() / d.sum(1).exp().mean()),
        "common",
    ),
    (
        "self-normalised-detached",
        "you divided by the detached sum of the weights: this is no plain mean over the batch either",
        _weighted(lambda d, m: d.sum(1).exp() / d.sum(1).exp().mean().detach()),
        "common",
    ),
    (
        "divided-by-tokens",
        "you divided by the number of tokens: the mean is over responses",
        lambda n, o, s, m: importance_estimate(n, o, s, m) * len(s) / m.sum(),
        "common",
    ),
    (
        "product-with-zeros",
        "a ratio that is masked to 0 makes the whole product 0: padding must enter as the factor 1",
        _weighted(lambda d, m: (d.exp() * m).prod(1)),
        "common",
    ),
    (
        "clipped-weight",
        "a clipped weight is another estimate, with a bias",
        _weighted(lambda d, m: d.sum(1).exp().clamp(0.8, 1.2)),
        "common",
    ),
    (
        "capped-weight",
        "the weight is capped, or its log is: where the policies differ much it is large, and enters as it is",
        _weighted(lambda d, m: d.sum(1).exp().clamp(max=1000.0)),
        "common",
    ),
    (
        "clamped-sum",
        "the sum of the log-ratios is clamped: a response's weight enters as it is, however large",
        _weighted(lambda d, m: d.sum(1).clamp(-20.0, 20.0).exp()),
        "common",
    ),
    (
        "clamped-tokens",
        "the tokens' log-ratios are clamped: a single token's ratio enters as it is, however large",
        _weighted(lambda d, m: d.clamp(-10.0, 10.0).sum(1).exp()),
        "common",
    ),
    (
        "quotient-of-exps",
        "the probability of a long response is 0 in float32: subtract the log-probabilities first, then take exp",
        _quotient_of_exps,
        "common",
    ),
    (
        "epsilon",
        "a small number added to the old probability is not small beside a rare token: subtract the logs instead",
        lambda n, o, s, m: (torch.where(m, n.exp() / (o.detach().exp() + 1e-8), 1.0).prod(1) * s.detach()).mean(),
        "common",
    ),
    (
        "exp-before-mask",
        "the exp of the padding overflows, and infinity times a mask of 0 is not a number: mask before the exp",
        lambda n, o, s, m: (((n - o.detach()).exp() * m + ~m).prod(1) * s.detach()).mean(),
        "common",
    ),
    (
        "where-after-exp",
        "the value is right, but the gradient is 0 times infinity where the padding's exp overflows: mask before the exp",
        lambda n, o, s, m: (torch.where(m, (n - o.detach()).exp(), 1.0).prod(1) * s.detach()).mean(),
        "common",
    ),
    (
        "first-positions",
        "you took the first positions of each row, as many as it has tokens: the response is where the mask is True",
        lambda n, o, s, m: importance_estimate(n, o, s, torch.arange(m.shape[1]) < m.sum(1)[:, None]),
        "common",
    ),
    (
        "cut-at-the-longest",
        "you look for a response at the start of its row, by its length: it may begin later, so go by the mask alone",
        lambda n, o, s, m: importance_estimate(n, o, s, m & (torch.arange(m.shape[1]) < m.sum(1).max())),
        "common",
    ),
    (
        "scores-clamped",
        "the scores enter as they are: you clamped them",
        lambda n, o, s, m: importance_estimate(n, o, s.clamp(-10.0, 10.0), m),
        "common",
    ),
    (
        "scores-rounded",
        "the scores enter as they are: you rounded them",
        lambda n, o, s, m: importance_estimate(n, o, s.detach().round(), m),
        "common",
    ),
    (
        "old-with-gradient",
        "old_logprobs must be detached: the policy that wrote the responses is not trained",
        lambda n, o, s, m: (torch.where(m, n - o, 0.0).sum(1).exp() * s.detach()).mean(),
        "common",
    ),
    (
        "scores-with-gradient",
        "scores must be detached: the judge is not trained",
        lambda n, o, s, m: (torch.where(m, n - o.detach(), 0.0).sum(1).exp() * s).mean(),
        "common",
    ),
)


def _offpolicy_by_loop(logprobs: Tensor, old_logprobs: Tensor, scores: Tensor, response_mask: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for b in range(len(scores)):
        weight = torch.ones((), dtype=torch.float64)
        for t in range(logprobs.shape[1]):
            if response_mask[b, t]:
                weight = weight * logprobs[b, t].double().exp() / old_logprobs[b, t].detach().double().exp()
        total = total + weight * scores[b].item()
    return total / len(scores)


of.right("a product in a loop, float64", _offpolicy_by_loop)
of.right(
    "products of probabilities, float64",
    lambda n, o, s, m: torch.mean(
        torch.where(m, n.double(), 0.0).exp().prod(1)
        / torch.where(m, o.detach().double(), 0.0).exp().prod(1)
        * s.detach()
    ),
)
of.right(
    "difference of sums, float32",
    lambda n, o, s, m: (((n * m).sum(1) - (o.detach() * m).sum(1)).exp() * s.detach()).sum() / len(s),
)
of.right(
    "product of the ratios, masked before the exp",
    lambda n, o, s, m: torch.dot((n - o.detach()).masked_fill(~m, 0.0).exp().prod(1), s.detach()) / len(s),
)


# -- what the sampler never writes -----------------------------------------------------------------------

_Lists = tuple[list[float], list[float], list[float]]
_BLIND: _Lists = ([0.25, 0.25, 0.5], [0.5, 0.5, 0.0], [-1.0, -1.0, 3.0])


def _three_lists(answer: Any) -> list[Tensor]:
    parts = [as_tensor(part, name) for part, name in zip(unpack(answer, 3, "p, q, f"), "pqf", strict=True)]
    if any(part.ndim != 1 or part.shape != parts[0].shape for part in parts):
        raise Fail(f"p, q and f: got shapes {', '.join(str(tuple(part.shape)) for part in parts)}, expected one length")
    if not 2 <= len(parts[0]) <= 20 or not all(torch.isfinite(part).all() for part in parts):
        raise Fail("p, q and f: expected finite numbers for 2 to 20 responses")
    return parts


def _largest_weight(p: Tensor, q: Tensor) -> float:
    return (p[q > 0] / q[q > 0]).max().item()


def _means(p: Tensor, q: Tensor, f: Tensor) -> tuple[float, float]:
    """Mean of f under p, and the weighted mean over what q writes, by enumeration."""
    written = q > 0
    return (p * f).sum().item(), (q * torch.where(written, p / q, 0.0) * f)[written].sum().item()


def _support_kind(parts: list[Tensor]) -> str:
    p, q, f = parts
    for law, name in ((p, "p"), (q, "q")):
        if (law < 0).any():
            return f"{name} is negative"
    if not is_distribution(p) or not is_distribution(q):
        return "p is no distribution" if not is_distribution(p) else "q is no distribution"
    truth, weighted = _means(p, q, f)
    lost = (q == 0) & (p * f != 0)
    if not lost.any():
        if (q > 0).all():
            return "p is narrower" if (p == 0).any() else "q writes everything"
        return "f is 0 where q is" if ((q == 0) & (p > 0)).any() else "p is 0 where q is"
    if _largest_weight(p, q) > 2.001:
        return "a weight above 2"
    if truth >= 0.1 - 1e-6 and weighted <= -0.1 + 1e-6:
        return "right"
    if min(abs(truth), abs(weighted)) < 1e-6:
        return "a mean of 0"
    if truth * weighted < 0:
        return "the signs exchanged" if truth < 0 else "too close to 0"
    return "same sign"


sb = Question(
    id="support_break",
    title="a sampler that no importance weight can correct",
    chapter=4,
    kind="counterexample",
    theory=True,
    variable="example",
    reference=_BLIND,
    reference_source="example = ([0.25, 0.25, 0.5], [0.5, 0.5, 0.0], [-1.0, -1.0, 3.0])",
    accept=_three_lists,
    hints=(
        "Write both means as sums over responses. Which terms of the first are not in the second?",
        "A response with q(y) = 0 is never written, so its p(y) f(y) is missing. Let that term decide the sign.",
        "Let q be 0 on one response with a large p f > 0, and let f be negative on all others.",
    ),
    explanation="The weighted mean is the sum of p(y) f(y) over the responses with q(y) > 0. With p = (0.25, 0.25, 0.5), "
    "q = (0.5, 0.5, 0) and f = (-1, -1, 3) the mean is 1, the weighted one -0.5, and both weights are 0.5: nothing looks "
    "wrong. A policy that never tries an answer cannot learn from reweighted data that the answer is good.",
    probes=_support_kind,
)


@sb.case("two distributions, no weight above 2", 1, "probabilities sum to 1; p(y)/q(y) where q(y) > 0")
def _(parts: Any) -> None:
    p, q, _ = parts
    for law, name in ((p, "p"), (q, "q")):
        require(
            is_distribution(law), f"{name} = {show(law)} is no distribution: entries at least 0, sum {law.sum():.4g}"
        )
    largest = _largest_weight(p, q)
    require(largest <= 2.001, f"the largest weight is {largest:.4g}, expected at most 2")


@sb.case(
    "the mean is at least 0.1, the weighted mean at most -0.1", 2, "which terms can be missing from the weighted sum?"
)
def _(parts: Any) -> None:
    p, q, f = parts
    require(is_distribution(p) and is_distribution(q), "p and q must be distributions")
    truth, weighted = _means(p, q, f)
    require(
        truth >= 0.1 - 1e-6 and weighted <= -0.1 + 1e-6,
        f"the mean of f under p is {truth:.6g}, the weighted mean {weighted:.6g}",
    )


sb.plant(
    (
        "full-support",
        "q can write every response, so the weights repair everything: the two means are equal",
        ([0.25, 0.25, 0.5], [0.5, 0.3, 0.2], [-1.0, -1.0, 3.0]),
        "W-PPO-7",
    ),
    (
        "exchanged",
        "p is 0 where q is not: that wastes samples, but nothing is missing from the mean",
        ([0.5, 0.5, 0.0], [0.25, 0.25, 0.5], [-1.0, -1.0, 3.0]),
        "W-PPO-7",
    ),
    (
        "both-zero",
        "q is 0 only where p is 0 too: such a response contributes nothing to the mean",
        ([0.5, 0.5, 0.0], [0.6, 0.4, 0.0], [-1.0, 2.0, 3.0]),
        "common",
    ),
    (
        "f-zero",
        "q is 0 only where f is 0: nothing is missing from the mean",
        ([0.25, 0.25, 0.5], [0.5, 0.5, 0.0], [-1.0, 2.0, 0.0]),
        "common",
    ),
    (
        "same-sign",
        "the means differ, but they have the same sign: let the missing response decide it",
        ([0.25, 0.25, 0.5], [0.5, 0.5, 0.0], [1.0, 1.0, 3.0]),
        "common",
    ),
    (
        "signs-exchanged",
        "the mean under p must be the positive one",
        ([0.25, 0.25, 0.5], [0.5, 0.5, 0.0], [1.0, 1.0, -3.0]),
        "common",
    ),
    (
        "too-close",
        "the signs are right, but one of the means lies closer to 0 than 0.1",
        ([0.25, 0.25, 0.5], [0.5, 0.5, 0.0], [-0.1, -0.1, 0.3]),
        "common",
    ),
    (
        "large-weight",
        "a weight above 2 would give the sampler away; here every weight looks harmless",
        ([0.3, 0.2, 0.5], [0.1, 0.9, 0.0], [-1.0, -1.0, 3.0]),
        "common",
    ),
    (
        "not-normalised",
        "the probabilities in q must sum to 1",
        ([0.25, 0.25, 0.5], [0.25, 0.25, 0.0], [-1.0, -1.0, 3.0]),
        "common",
    ),
    (
        "p-negative",
        "a probability in p is negative",
        ([1.5, -0.5], [0.0, 1.0], [1.0, 1.0]),
        "common",
    ),
    (
        "q-negative",
        "a probability in q is negative",
        ([0.25, 0.25, 0.5], [1.5, -0.5, 0.0], [-1.0, -1.0, 3.0]),
        "common",
    ),
    (
        "a-mean-of-0",
        "one of the two means is 0: they must lie on different sides of it",
        ([0.25, 0.25, 0.5], [0.5, 0.5, 0.0], [1.0, -1.0, 3.0]),
        "common",
    ),
    (
        "p-not-normalised",
        "the probabilities in p must sum to 1",
        ([1.0, 1.0, 2.0], [0.5, 0.5, 0.0], [-1.0, -1.0, 3.0]),
        "common",
    ),
)
sb.right("two responses", ((0.5, 0.5), (1, 0), (-1, 2)))
sb.right("tensors, many responses", [tensor([0.1] * 10), tensor([0.2] * 5 + [0.0] * 5), tensor([-1.0] * 5 + [2.0] * 5)])
sb.right("fractions", ([Fraction(1, 3)] * 3, [0, Fraction(1, 2), Fraction(1, 2)], [Fraction(4), -1, -1]))


# -- how the weights' variance grows ---------------------------------------------------------------------


def weight_variance(probs, old_probs, num_tokens):  # type: ignore[no-untyped-def]
    """Variance of a response's weight when T tokens are drawn independently. (N,), (N,), int -> number."""
    second_moment = (probs**2 / old_probs).sum()  # of one token's ratio, under the old policy
    return second_moment**num_tokens - 1


_LAWS = [([0.5, 0.5], [0.6, 0.4]), ([0.2, 0.3, 0.5], [0.4, 0.4, 0.2]), ([0.9, 0.1], [0.8, 0.2])]


def _weights_by_enumeration(p: list[float], q: list[float], length: int) -> float:
    """Variance over all responses of this length, written by q."""
    rows = [
        (math.prod(q[i] for i in y), math.prod(p[i] / q[i] for i in y))
        for y in itertools.product(range(len(p)), repeat=length)
    ]
    mean = sum(chance * weight for chance, weight in rows)
    return sum(chance * (weight - mean) ** 2 for chance, weight in rows)


wv = Question(
    id="weight_variance",
    title="the variance of importance weights over length",
    chapter=4,
    kind="symbolic",
    theory=True,
    variable="weight_variance",
    reference=weight_variance,
    reference_source=source(weight_variance),
    hints=(
        "Variance is the mean of the squares minus the square of the mean. What is the mean of a weight?",
        "The mean is 1. The mean of the square of a product of independent factors is a product of such means.",
        "sum(p^2 / q)^T - 1, the sum over the tokens of the vocabulary.",
    ),
    explanation="The mean of a weight is 1 at every length. Its square is a product of T independent factors, each with "
    "mean sum q (p/q)^2 = sum p^2/q, so the variance is that number to the power T, minus 1. The number is larger than 1 "
    "as soon as p differs from q, so the growth is exponential: (0.5, 0.5) against (0.6, 0.4) gives 0.042 for one token, "
    "0.504 for ten and 58.3 for a hundred.",
    probes=in_two_steps(
        lambda f: [as_tensor(f(tensor(p), tensor(q), t), "probe") for p, q in _LAWS for t in (1, 2, 5)],
        lambda f: outcome(1.575**40 - 1, f, *map(tensor, _LAWS[1]), 40, rtol=1e-2),
        weight_variance,
    ),
)


@wv.case("equal policies: no variance at any length", 1, "all weights are then 1")
def _(f: Any) -> None:
    p = tensor([0.2, 0.3, 0.5])
    for length in (1, 7):
        expect_close(f(p, p.clone(), length), 0.0, f"p = q, T = {length}", atol=1e-4)
    other = as_tensor(f(p, tensor([0.4, 0.4, 0.2]), 2), "variance")
    require(bool((other.abs() > 0.1).all()), "p and q differ, but your variance is 0")


@wv.case("one token, against the sum over tokens", 1, "q decides how often a ratio p/q turns up")
def _(f: Any) -> None:
    for p, q in _LAWS:
        expect_close(
            f(tensor(p), tensor(q), 1), _weights_by_enumeration(p, q, 1), f"p = {p}, q = {q}", rtol=2e-3, atol=6e-4
        )


@wv.case("two to five tokens, against all responses listed", 2, "a mean of products of independent factors")
def _(f: Any) -> None:
    for p, q in _LAWS:
        for length in (2, 3, 5):
            want = _weights_by_enumeration(p, q, length)
            expect_close(f(tensor(p), tensor(q), length), want, f"p = {p}, q = {q}, T = {length}", rtol=2e-3, atol=6e-4)


@wv.case("each further token multiplies 1 + variance by the same number", 1, "exponential, not linear growth")
def _(f: Any) -> None:
    p, q = tensor([0.5, 0.5]), tensor([0.6, 0.4])
    at = {length: as_tensor(f(p, q, length), f"T = {length}") + 1 for length in (40, 41, 80)}
    factor = _weights_by_enumeration([0.5, 0.5], [0.6, 0.4], 1) + 1
    expect_close(at[41] / at[40], factor, "(1 + variance) at T = 41 over that at T = 40", rtol=3e-3)
    expect_close(at[80], factor**80, "1 + variance at T = 80", rtol=3e-3)
    p, q = map(tensor, _LAWS[1])
    expect_close(f(p, q, 40), 1.575**40 - 1, "variance for p = (0.2, 0.3, 0.5), q = (0.4, 0.4, 0.2), T = 40", rtol=3e-3)


def _chi2(p: Tensor, q: Tensor) -> Tensor:
    return (p**2 / q).sum() - 1


wv.plant(
    (
        "linear",
        "variances of sums add up; a weight is a product, and its variance grows exponentially",
        lambda p, q, t: t * _chi2(p, q),
        "common",
    ),
    ("constant", "the variance does depend on the length", lambda p, q, t: _chi2(p, q) + 0 * t, "common"),
    (
        "averaged",
        "this is the variance of the mean of T ratios; the weight is their product",
        lambda p, q, t: _chi2(p, q) / t,
        "common",
    ),
    (
        "power-of-the-variance",
        "the second moment is raised to the power T, not the variance",
        lambda p, q, t: _chi2(p, q) ** t,
        "common",
    ),
    (
        "second-moment",
        "this is the mean of the squares: subtract the square of the mean, 1",
        lambda p, q, t: (_chi2(p, q) + 1) ** t,
        "common",
    ),
    (
        "standard-deviation",
        "this is the standard deviation, not the variance",
        lambda p, q, t: weight_variance(p, q, t).clamp_min(0.0).sqrt(),
        "common",
    ),
    (
        "under-the-new-policy",
        "the old policy writes the responses: take the mean of the squared ratio under q, not under p",
        lambda p, q, t: (p**3 / q**2).sum() ** t - 1,
        "common",
    ),
    (
        "variance-under-the-new-policy",
        "this is the variance over responses of the new policy; the old one writes them",
        lambda p, q, t: (p**3 / q**2).sum() ** t - (p**2 / q).sum() ** (2 * t),
        "common",
    ),
    (
        "unweighted-mean",
        "the tokens are not equally likely: weigh each squared ratio with q, instead of taking the plain mean",
        lambda p, q, t: ((p / q) ** 2).mean() ** t - 1,
        "common",
    ),
    (
        "unweighted-variance",
        "the variance of the listed ratios counts every token alike: q says how often a ratio turns up",
        lambda p, q, t: ((p / q).var(unbiased=False) + 1) ** t - 1,
        "common",
    ),
    (
        "capped",
        "the variance is capped: it grows without bound",
        lambda p, q, t: weight_variance(p, q, t).clamp(max=1e6),
        "common",
    ),
    ("exchanged", "the ratio is p/q, and q writes the responses", lambda p, q, t: weight_variance(q, p, t), "common"),
    (
        "exp-of-kl",
        "exp(T KL) is smaller: the second moment sum p^2/q is not exp of the KL divergence",
        lambda p, q, t: (t * (p * (p / q).log()).sum()).exp() - 1,
        "common",
    ),
    (
        "quadratic",
        "the growth is not that of T squared: every token multiplies",
        lambda p, q, t: t**2 * _chi2(p, q),
        "common",
    ),
    (
        "log-variance",
        "this is the variance of the log of the weight, which does grow linearly",
        lambda p, q, t: t * ((q * (p / q).log() ** 2).sum() - (q * (p / q).log()).sum() ** 2),
        "common",
    ),
)
wv.right("float64, 1 + chi squared", lambda p, q, t: (1 + ((p.double() - q) ** 2 / q).sum()) ** t - 1)
wv.right("numpy", lambda p, q, t: float(np.sum(q.numpy() * (p.numpy() / q.numpy()) ** 2)) ** t - 1)
wv.right("three decimals", lambda p, q, t: round(float(weight_variance(p.double(), q.double(), t)), 3))


# -- the clipped loss ------------------------------------------------------------------------------------


def clipped_policy_loss(logprobs, old_logprobs, advantages, cliprange=0.2):  # type: ignore[no-untyped-def]
    """-min(r A, clip(r, 1 - eps, 1 + eps) A) of every token, r = exp(logprobs - old_logprobs). Same shape out."""
    old_logprobs, advantages = old_logprobs.detach(), advantages.detach()
    ratio = torch.exp(logprobs - old_logprobs)
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange)
    return -torch.minimum(ratio * advantages, clipped * advantages)


_CLIP_GRID = [(a, r) for a in (1.0, -1.0) for r in (0.5, 0.9, 1.1, 1.7)]


def _clip_inputs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities, old ones (negative, ratios from about 0.4 to 2.5) and advantages, (2, 5) each."""
    old = -normal(2, 5, seed=seed).abs() - 0.5
    return old + 0.5 * normal(2, 5, seed=seed + 1), old, normal(2, 5, seed=seed + 2)


def _clip_probe(f: Any) -> list[Any]:
    found: list[Any] = []
    for seed, options in ((1, {}), (4, {"cliprange": 0.4})):
        inputs = [x.requires_grad_() for x in _clip_inputs(seed)]
        losses = f(*inputs, **options)
        found += [losses, *(gradient_or_none(losses, x) for x in inputs)]
    advantages, ratios = tensor(_CLIP_GRID).T
    return [*found, f(ratios.log() - 1, torch.full((8,), -1.0), advantages)]


_LOG_RATIOS = tensor([math.log(5.0), math.log(20.0), 12.0, 25.0])
_OLD_OF_THEM = tensor([-3.0, -4.0, -12.5, -25.5])
_RARE_PAIR = (
    tensor([-18.0, -110.0]),
    tensor([-18.5, -110.1]),
)  # ratios exp(0.5) and exp(0.1); exp(-110) is 0 in float32


def _clip_unusual(f: Any) -> list[str]:
    """Ratios 5 and 20, then exp(12) and exp(25), at A = -1; then tokens of very small probability."""
    parts = [(_OLD_OF_THEM[i] + _LOG_RATIOS[i], _OLD_OF_THEM[i]) for i in (torch.arange(2), torch.arange(2, 4))] + [
        (new[None], old[None]) for new, old in zip(*_RARE_PAIR, strict=True)
    ]
    return [outcome((new - old).exp(), f, new.clone(), old.clone(), -torch.ones_like(new)) for new, old in parts]


pc = Question(
    id="ppo_clip",
    title="the clipped loss of PPO",
    chapter=4,
    kind="function",
    theory=False,
    variable="clipped_policy_loss",
    reference=clipped_policy_loss,
    reference_source=source(clipped_policy_loss),
    hints=(
        "Write the ratio first. Which two products are compared, and is the smaller or the larger one kept?",
        "min(r A, clip(r) A) is a pessimistic bound of the objective; the loss is minus it, for every token by itself.",
        "-minimum(r A, r.clamp(1 - cliprange, 1 + cliprange) A) with r = exp(logprobs - old_logprobs), and "
        "old_logprobs and advantages detached.",
    ),
    explanation="The clip takes away the gain from moving further than eps in the direction that A asks for. The minimum "
    "is what keeps the way back open: at r = 0.5 and A = 1 the clipped product is flat, but the unclipped one is smaller "
    "and pulls the ratio up again. One number per token; which tokens count and how to average is the caller's choice.",
    probes=in_two_steps(_clip_probe, _clip_unusual, clipped_policy_loss),
)


@pc.case(
    "where nothing has changed: loss -A, gradient -A", 1, "the ratio is 1: PPO's first step is a policy-gradient step"
)
def _(f: Any) -> None:
    old, advantages = -normal(4, seed=1).abs(), tensor([1.0, -2.0, 6.0, 0.5])
    logprobs = old.clone().requires_grad_()
    losses = f(logprobs, old, advantages)
    expect_close(losses, -advantages, "losses at logprobs = old_logprobs")
    expect_close(gradient(losses, logprobs, "gradient in logprobs"), -advantages, "gradient in logprobs")


@pc.case("ratios beyond the interval count as its edge, if that is worse", 2, "take the smaller of the two products")
def _(f: Any) -> None:
    ratios, old = tensor([0.5, 0.9, 1.1, 1.7]), -normal(4, seed=2).abs()
    logprobs = ratios.log() + old
    for a, want in ((2.0, [-1.0, -1.8, -2.2, -2.4]), (-2.0, [1.6, 1.8, 2.2, 3.4])):
        got = f(logprobs, old, torch.full((4,), a))
        expect_close(got, tensor(want), f"losses at ratios 0.5, 0.9, 1.1, 1.7 and A = {a:+g}")
    for a, far in ((1.0, torch.full((4,), -1.2)), (-1.0, _LOG_RATIOS.exp())):
        got = f(_OLD_OF_THEM + _LOG_RATIOS, _OLD_OF_THEM.clone(), torch.full((4,), a))
        expect_close(got, far, f"losses at ratios 5, 20, exp(12), exp(25) and A = {a:+g}")
    got = f(*(x.clone() for x in _RARE_PAIR), -torch.ones(2))
    where = "losses at log-probabilities -18 and -110 now, -18.5 and -110.1 then, A = -1"
    expect_close(got, tensor([0.5, 0.1]).exp(), where)


@pc.case("cliprange is the half-width of the interval", 1, "1 - cliprange and 1 + cliprange")
def _(f: Any) -> None:
    ratios = tensor([0.5, 0.75, 1.25, 1.7])
    got = [f(ratios.log(), torch.zeros(4), torch.full((4,), a), cliprange=0.3) for a in (1.0, -1.0)]
    expect_close(
        got[0], tensor([-0.5, -0.75, -1.25, -1.3]), "losses at ratios 0.5, 0.75, 1.25, 1.7, A = 1, cliprange 0.3"
    )
    expect_close(got[1], tensor([0.7, 0.75, 1.25, 1.7]), "losses at ratios 0.5, 0.75, 1.25, 1.7, A = -1, cliprange 0.3")


@pc.case(
    "no gradient exactly where the clip binds", 3, "for A > 0 above 1 + eps, for A < 0 below 1 - eps, nowhere else"
)
def _(f: Any) -> None:
    for a, r in [*_CLIP_GRID, (-1.0, 20.0)]:
        logprob = tensor([math.log(r)]).requires_grad_()
        losses = f(logprob, torch.zeros(1), tensor([a]))
        binds = r > 1.2 if a > 0 else r < 0.8
        slope = gradient(losses, logprob, "gradient in logprobs")
        expect_close(slope, tensor([0.0 if binds else -a * r]), f"ratio {r}, A = {a:+g}: gradient in logprobs")


@pc.case("one number per token, which depends on that token only", 1, "masking and averaging are the caller's choice")
def _(f: Any) -> None:
    inputs = _clip_inputs(7)
    got = as_tensor(f(*inputs), "losses")
    expect_shape(got, (2, 5), "losses")
    for b, t in ((0, 1), (1, 4)):
        alone = as_tensor(f(*(x[b : b + 1, t : t + 1] for x in inputs)), "loss")
        expect_close(alone, got[b : b + 1, t : t + 1], f"token [{b}, {t}] alone against inside the batch")
    require(got.max() > got.min() + 0.1, "all tokens have the same loss")


@pc.case("old_logprobs and advantages are constants", 1, "only the policy in training has a gradient")
def _(f: Any) -> None:
    logprobs, old, advantages = (x.requires_grad_() for x in _clip_inputs(10))
    losses = f(logprobs, old, advantages)
    slope = gradient(losses, logprobs, "gradient in logprobs")
    require(slope.abs().max() > 1e-3, "the gradient in logprobs is 0")
    expect_constant(losses, "old_logprobs", old)
    expect_constant(losses, "advantages", advantages)


def _loss_of(choose: Callable[[Tensor, Tensor, float], Tensor], ratio: str = "exp") -> Callable[..., Tensor]:
    """The loss with another choice of (ratio, advantage, eps), or with something else for the ratio."""

    def f(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cliprange: float = 0.2) -> Tensor:
        old, a = old_logprobs.detach(), advantages.detach()
        r = {"exp": (logprobs - old).exp(), "log": logprobs - old, "inverse": (old - logprobs).exp()}.get(ratio)
        return choose(logprobs / (old - 1e-6) if r is None else r, a, cliprange)

    return f


def _pessimistic(r: Tensor, a: Tensor, e: float) -> Tensor:
    return -torch.minimum(r * a, r.clamp(1 - e, 1 + e) * a)


def _old_with_gradient(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cliprange: float = 0.2) -> Tensor:
    return _pessimistic((logprobs - old_logprobs).exp(), advantages.detach(), cliprange)


def _advantages_with_gradient(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cliprange: float = 0.2
) -> Tensor:
    return _pessimistic((logprobs - old_logprobs.detach()).exp(), advantages, cliprange)


def _undetached_loss(
    choose: Callable[[Tensor, Tensor, float], Tensor], quotient: bool = False
) -> Callable[..., Tensor]:
    def f(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cliprange: float = 0.2) -> Tensor:
        r = logprobs / old_logprobs if quotient else (logprobs - old_logprobs).exp()
        return choose(r, advantages, cliprange)

    return f


pc.plant(
    (
        "nothing-detached",
        "the formula is right; old_logprobs and advantages are constants and must be detached",
        _undetached_loss(_pessimistic),
        "common",
    ),
    (
        "clip-only-undetached",
        "you kept the clipped product alone, and old_logprobs and advantages are not detached",
        _undetached_loss(lambda r, a, e: -r.clamp(1 - e, 1 + e) * a),
        "common",
    ),
    (
        "quotient-undetached",
        "you divide log-probabilities, where the ratio is exp of their difference; and old_logprobs and advantages are constants",
        _undetached_loss(_pessimistic, quotient=True),
        "W-PPO-3",
    ),
    (
        "sign",
        "this is the objective, to be maximised; the loss is minus it",
        _loss_of(lambda r, a, e: -_pessimistic(r, a, e)),
        "common",
    ),
    (
        "clip-only",
        "you kept the clipped product alone: a ratio that went the wrong way gets no gradient back",
        _loss_of(lambda r, a, e: -r.clamp(1 - e, 1 + e) * a),
        "common",
    ),
    ("no-clip", "nothing is clipped", _loss_of(lambda r, a, e: -r * a), "common"),
    (
        "maximum",
        "you kept the better of the two products: take their minimum, or, as a loss with the minus sign inside, the maximum",
        _loss_of(lambda r, a, e: -torch.maximum(r * a, r.clamp(1 - e, 1 + e) * a)),
        "common",
    ),
    (
        "maximum-of-losses",
        "the larger one is right for the losses -r A and -clip(r) A; your products lack the minus signs",
        _loss_of(lambda r, a, e: torch.maximum(r * a, r.clamp(1 - e, 1 + e) * a)),
        "common",
    ),
    (
        "smallest-of-three",
        "the edges themselves are no candidates: inside the interval clip(r) is r, and the gradient is there",
        _loss_of(lambda r, a, e: -torch.minimum(r * a, torch.minimum((1 - e) * a, (1 + e) * a))),
        "W-PPO-2",
    ),
    (
        "flat-outside",
        "the value is right, but you removed the gradient wherever the ratio is outside: the way back must stay open",
        _loss_of(lambda r, a, e: torch.where((r - 1).abs() > e, _pessimistic(r, a, e).detach(), _pessimistic(r, a, e))),
        "W-PPO-1",
    ),
    (
        "masked-outside",
        "you set the loss to 0 outside the interval; the clip keeps the value at the edge",
        _loss_of(lambda r, a, e: -r * a * ((r - 1).abs() <= e)),
        "W-PPO-1",
    ),
    (
        "clipped-product",
        "clip the ratio, not ratio times advantage",
        _loss_of(lambda r, a, e: -torch.minimum(r * a, (r * a).clamp(1 - e, 1 + e))),
        "common",
    ),
    (
        "minimum-of-ratios",
        "multiply by the advantage before taking the minimum: for A < 0 the larger ratio is the worse one",
        _loss_of(lambda r, a, e: -torch.minimum(r, r.clamp(1 - e, 1 + e)) * a),
        "common",
    ),
    (
        "no-lower-edge",
        "the interval has a lower edge, too: it binds for negative advantages",
        _loss_of(lambda r, a, e: -torch.minimum(r * a, r.clamp(max=1 + e) * a)),
        "common",
    ),
    (
        "no-upper-edge",
        "the interval has an upper edge, too: it binds for positive advantages",
        _loss_of(lambda r, a, e: -torch.minimum(r * a, r.clamp(min=1 - e) * a)),
        "common",
    ),
    (
        "clipped-detached",
        "the clipped product is detached: inside the interval half of the gradient is lost",
        _loss_of(lambda r, a, e: -torch.minimum(r * a, r.detach().clamp(1 - e, 1 + e) * a)),
        "common",
    ),
    (
        "clipped-log-ratio",
        "you clipped the log of the ratio: the interval is 1 - eps to 1 + eps for the ratio itself",
        _loss_of(lambda r, a, e: -torch.minimum(r * a, r.log().clamp(-e, e).exp() * a)),
        "common",
    ),
    (
        "cliprange-ignored",
        "the clip is always 0.2: use the argument",
        _loss_of(lambda r, a, e: _pessimistic(r, a, 0.2)),
        "common",
    ),
    ("log-ratio", "the exp is missing: this is the log of the ratio", _loss_of(_pessimistic, "log"), "common"),
    ("inverse", "the ratio is new over old, not old over new", _loss_of(_pessimistic, "inverse"), "common"),
    (
        "quotient-of-logs",
        "you divide log-probabilities: the ratio is exp of their difference",
        _loss_of(_pessimistic, "quotient"),
        "W-PPO-3",
    ),
    (
        "dual-clip",
        "you bound the loss of a large ratio at A < 0 (a dual clip, or a capped ratio): the formula has no such bound",
        _loss_of(lambda r, a, e: torch.minimum(_pessimistic(r, a, e), 3 * a.abs())),
        "common",
    ),
    (
        "clamped-log-ratio",
        "you clamp the log-ratio before the exp: at A < 0 a large ratio counts in full",
        lambda n, o, a, cliprange=0.2: _pessimistic((n - o.detach()).clamp(-20.0, 20.0).exp(), a.detach(), cliprange),
        "common",
    ),
    (
        "quotient-of-exps",
        "the exp of a very negative log-probability is 0 in float32: subtract first, then take exp",
        lambda n, o, a, cliprange=0.2: _pessimistic(n.exp() / o.detach().exp(), a.detach(), cliprange),
        "common",
    ),
    (
        "epsilon",
        "a small number added to the old probability is not small beside a rare token: subtract the logs instead",
        lambda n, o, a, cliprange=0.2: _pessimistic(n.exp() / (o.detach().exp() + 1e-8), a.detach(), cliprange),
        "common",
    ),
    (
        "mean",
        "one number per token: averaging is the caller's choice",
        _loss_of(lambda r, a, e: _pessimistic(r, a, e).mean()),
        "common",
    ),
    (
        "detached",
        "the ratio is detached: the value is right, but no gradient reaches the policy",
        lambda n, o, a, cliprange=0.2: clipped_policy_loss(n.detach(), o, a, cliprange),
        "W-PPO-8",
    ),
    ("old-with-gradient", "old_logprobs must be detached: they belong to the sampler", _old_with_gradient, "common"),
    (
        "advantages-with-gradient",
        "advantages must be detached: this loss does not train the critic",
        _advantages_with_gradient,
        "common",
    ),
)


def _clip_by_cases(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, cliprange: float = 0.2) -> Tensor:
    a, r = advantages.detach().double(), (logprobs.double() - old_logprobs.detach().double()).exp()
    over, under = (a > 0) & (r > 1 + cliprange), (a < 0) & (r < 1 - cliprange)
    return -a * torch.where(over, 1 + cliprange, torch.where(under, 1 - cliprange, r))


pc.right("by cases, float64", _clip_by_cases)
pc.right(
    "a quotient of probabilities, float64",
    lambda n, o, a, cliprange=0.2: _pessimistic(
        n.double().exp() / o.detach().double().exp(), a.detach().double(), cliprange
    ),
)
pc.right(
    "the larger of two losses",
    lambda n, o, a, cliprange=0.2: torch.max(
        -a.detach() * torch.exp(n - o.detach()),
        -a.detach() * torch.clip(torch.exp(n - o.detach()), 1 - cliprange, 1 + cliprange),
    ),
)


# -- eight gradients -------------------------------------------------------------------------------------

_SLOPES = [[1.0, 1.0, 1.0, 0.0], [0.0, -1.0, -1.0, -1.0]]

cg = Question(
    id="clip_gradient_cases",
    title="where the clipped objective has a gradient",
    chapter=4,
    kind="table",
    theory=True,
    variable="slopes",
    reference=_SLOPES,
    reference_source="slopes = [[1, 1, 1, 0], [0, -1, -1, -1]]",
    accept=numbers(2, 4),
    hints=(
        "For each of the eight: write down both products. Which one is smaller, and does it contain r?",
        "Inside the interval the two products are equal. Outside, one of them is constant: is it the smaller one?",
        "The slope is A, except for A > 0 with r > 1 + eps and for A < 0 with r < 1 - eps, where it is 0.",
    ),
    explanation="For A = 1 the clipped product is smaller at r = 1.7 only (1.2 < 1.7); at r = 0.5 the unclipped one is "
    "smaller (0.5 < 0.8) and pulls the ratio back up. For A = -1 the clipped product is smaller at r = 0.5 only "
    "(-0.8 < -0.5). Inside the interval both are r A, with slope A. There are two terms, not three: (1 - eps) A and "
    "(1 + eps) A are candidates only where r lies beyond them.",
    probes=lambda x: x,
)


def _autograd_slopes(advantage: float) -> Tensor:
    """Slope in r of min(r A, clip(r) A) at the four ratios, by automatic differentiation."""
    r = tensor([0.5, 0.9, 1.1, 1.7]).requires_grad_()
    torch.minimum(r * advantage, r.clamp(0.8, 1.2) * advantage).sum().backward()
    assert r.grad is not None
    return r.grad


@cg.case("inside the interval both products are the same", 1, "r = 0.9 and 1.1: clip(r) is r")
def _(x: Any) -> None:
    want = torch.stack([_autograd_slopes(a) for a in (1.0, -1.0)])[:, 1:3]
    expect_close(x[:, 1:3], want, "slopes at 0.9 and 1.1", atol=1e-3, tell_expected=False)


@cg.case("A = +1: one edge stops the gradient, the other does not", 1, "compare 0.5 with 0.8, and 1.7 with 1.2")
def _(x: Any) -> None:
    expect_close(
        x[0, [0, 3]], _autograd_slopes(1.0)[[0, 3]], "slopes at 0.5 and 1.7, A = 1", atol=1e-3, tell_expected=False
    )


@cg.case("A = -1: the other edge", 1, "compare -0.5 with -0.8, and -1.7 with -1.2")
def _(x: Any) -> None:
    expect_close(
        x[1, [0, 3]], _autograd_slopes(-1.0)[[0, 3]], "slopes at 0.5 and 1.7, A = -1", atol=1e-3, tell_expected=False
    )


cg.plant(
    (
        "smallest-of-three",
        "you took the smallest of r A, (1 - eps) A and (1 + eps) A: inside the interval the objective is r A",
        [[1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, -1.0]],
        "W-PPO-2",
    ),
    (
        "flat-outside",
        "this is the clip without the minimum: a ratio that went the wrong way would never come back",
        [[0.0, 1.0, 1.0, 0.0], [0.0, -1.0, -1.0, 0.0]],
        "W-PPO-1",
    ),
    (
        "maximum",
        "this is the maximum of the two products, or the two signs of A exchanged",
        [[0.0, 1.0, 1.0, 1.0], [-1.0, -1.0, -1.0, 0.0]],
        "common",
    ),
    (
        "lists-exchanged",
        "the two lists are exchanged: slopes[0] is for A = 1",
        [[0.0, -1.0, -1.0, -1.0], [1.0, 1.0, 1.0, 0.0]],
        "common",
    ),
    ("no-clip", "this is r A without the clip", [[1.0] * 4, [-1.0] * 4], "common"),
    (
        "of-the-loss",
        "these are the slopes of the loss; the objective has the other sign",
        [[-1.0, -1.0, -1.0, 0.0], [0.0, 1.0, 1.0, 1.0]],
        "common",
    ),
    (
        "values",
        "these are values of the objective, not its slopes",
        [[0.5, 0.9, 1.1, 1.2], [-0.8, -0.9, -1.1, -1.7]],
        "common",
    ),
    (
        "in-log-pi",
        "these are slopes in log pi, which are r times those in r",
        [[0.5, 0.9, 1.1, 0.0], [0.0, -0.9, -1.1, -1.7]],
        "common",
    ),
    (
        "sign-of-A-lost",
        "the slope is A, not 1: a negative advantage pushes the ratio down",
        [[1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 1.0]],
        "common",
    ),
    (
        "upper-edge-only",
        "for A < 0 it is the lower edge that stops the gradient",
        [[1.0, 1.0, 1.0, 0.0], [-1.0, -1.0, -1.0, 0.0]],
        "common",
    ),
    (
        "lower-edge-only",
        "for A > 0 it is the upper edge that stops the gradient",
        [[0.0, 1.0, 1.0, 1.0], [0.0, -1.0, -1.0, -1.0]],
        "common",
    ),
    (
        "flat-inside",
        "inside the interval nothing is clipped: that is where every sample counts",
        [[1.0, 0.0, 0.0, 1.0], [-1.0, 0.0, 0.0, -1.0]],
        "W-PPO-2",
    ),
)
cg.right("an array", np.array([[1, 1, 1, 0], [0, -1, -1, -1]]))
cg.right("tensors in a list", [tensor([1.0, 1.0, 1.0, 0.0]), -tensor([0.0, 1.0, 1.0, 1.0])])


# -- the ratio leaves the interval -----------------------------------------------------------------------

_ESCAPE = ((1.0, 0.3), (1.0, 1.0), 0.46, 5.0)


def _escape_numbers(answer: Any) -> Tensor:
    """The six numbers f1, f2, A1, A2, w, step in one tensor."""
    features, advantages, weight, step = unpack(answer, 4, "(features, advantages, weight, step_size)")
    parts = [as_tensor(x, name) for x, name in ((features, "features"), (advantages, "advantages"))]
    parts += [as_tensor(x, name) for x, name in ((weight, "weight"), (step, "step_size"))]
    shapes = [(2,), (2,), (), ()]
    for part, shape, name in zip(parts, shapes, ("features", "advantages", "weight", "step_size"), strict=True):
        if tuple(part.shape) != shape:
            raise Fail(f"{name}: got shape {tuple(part.shape)}, expected {shape}")
    found = torch.cat([part.reshape(-1) for part in parts])
    if not torch.isfinite(found).all() or found.abs().max() > 10:
        raise Fail(f"expected six numbers between -10 and 10, got {show(found)}")
    return found


def _one_step(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Ratios before, the two samples' own gradients in w (eps 0.2), and the ratios after one step of ascent on their sum."""
    features, advantages, step = x[:2], x[2:4], x[5]
    w = x[4].clone().requires_grad_()
    before = 2 * (w * features).sigmoid()  # sampled at w = 0, where both probabilities are 1/2
    objective = torch.minimum(before * advantages, before.clamp(0.8, 1.2) * advantages)
    own = torch.stack([torch.autograd.grad(term, w, retain_graph=True)[0] for term in objective])
    after = 2 * ((x[4] + step * own.sum()) * features).sigmoid()
    return before.detach(), own, after


def _escape_kind(x: Tensor) -> str:
    before, own, after = _one_step(x)
    if x[2] == 0:
        return "no advantage, no gradient"
    if before[0] <= 1.2:
        return "not outside before the step"
    if own[0] != 0:
        return "its own gradient moves it"
    if x[5] <= 0:
        return "a step down" if x[5] < 0 else "no step"
    if not 0.8 <= before[1] <= 1.2:
        return "nobody moves it" if own[1] == 0 else "the second sample is outside too"
    if x[1] == 0:
        return "nothing shared"
    if after[0] >= before[0] + 0.1:
        return "right"
    if after[0] >= before[0]:
        return "too small a step"
    return "pulled back by the advantage" if x[3] < 0 else "pulled back by the feature"


ra = Question(
    id="ppo_ratio_escape",
    title="a clipped sample whose ratio goes on growing",
    chapter=4,
    kind="counterexample",
    theory=True,
    variable="escape",
    reference=_ESCAPE,
    reference_source="escape = ((1.0, 0.3), (1.0, 1.0), 0.46, 5.0)",
    accept=_escape_numbers,
    hints=(
        "The first sample is outside and gives no gradient. Who else moves the weight?",
        "Give the second sample a smaller feature of the same sign, so that its ratio is still inside when the first "
        "one has left, and an advantage that pushes the weight the same way.",
        "Features 1 and 0.3, advantages 1 and 1: at w = 0.46 the ratios are 2 sigmoid(0.46) and 2 sigmoid(0.138); then "
        "take a large step.",
    ),
    explanation="At w = 0.46 the ratios are 1.226 and 1.069: the first sample is clipped and its own gradient is 0. The "
    "second is inside and pushes w up with 0.149, and a step of size 5 takes the first ratio to 1.539. The clip removes a "
    "sample's own push; it puts no wall around the ratio. What bounds the change is the step size, the number of epochs, "
    "and stopping when the KL divergence has grown too much.",
    probes=_escape_kind,
)


@ra.case(
    "before the step: the first is outside without a gradient, the second inside", 1, "ratios 2 sigmoid(w f), eps = 0.2"
)
def _(x: Any) -> None:
    before, own, _ = _one_step(x)
    require(x[2] != 0, "the first advantage is 0: the clip plays no part")
    require(before[0] > 1.2, f"the first ratio is {before[0]:.4g} before the step, expected above 1.2")
    require(own[0] == 0, f"the first sample's own gradient is {own[0]:.4g}, expected 0")
    require(0.8 <= before[1] <= 1.2, f"the second ratio is {before[1]:.4g} before the step, expected in [0.8, 1.2]")


@ra.case("the step takes the first ratio up by 0.1 or more", 2, "who pushes the shared weight, and in which direction?")
def _(x: Any) -> None:
    before, own, after = _one_step(x)
    require(x[2] != 0, "the first advantage is 0: the clip plays no part")
    require(own[0] == 0, "the first sample moves itself: its own gradient must be 0")
    require(x[5] > 0, f"step_size {x[5]:.4g}: expected a step up, more than 0")
    moved = f"the first ratio goes from {before[0]:.4g} to {after[0]:.4g}"
    require(after[0] >= before[0] + 0.1, f"{moved}; expected a rise of at least 0.1")


ra.plant(
    (
        "nothing-shared",
        "a feature of 0 shares no weight with the first sample: then a clipped ratio does stay where it is",
        ((1.0, 0.0), (1.0, 1.0), 0.46, 5.0),
        "W-PPO-1",
    ),
    (
        "both-clipped",
        "both samples are clipped, so nothing moves at all: the second must still be inside",
        ((1.0, 1.0), (1.0, 1.0), 0.46, 5.0),
        "W-PPO-1",
    ),
    (
        "one-big-step",
        "a jump over the edge from inside is possible, too, but here the first sample must be clipped already",
        ((1.0, 0.3), (1.0, 1.0), 0.0, 5.0),
        "common",
    ),
    (
        "negative-advantage",
        "with A < 0 the first sample is outside but not clipped: its own gradient moves it",
        ((1.0, 0.3), (-1.0, 1.0), 0.46, 5.0),
        "common",
    ),
    (
        "no-advantage",
        "with advantage 0 the first sample never had a gradient: the clip plays no part",
        ((1.0, 0.3), (0.0, 1.0), 0.46, 5.0),
        "common",
    ),
    (
        "second-pushes-back",
        "the second advantage is negative, so the shared weight goes down and the first ratio returns",
        ((1.0, 0.3), (1.0, -1.0), 0.46, 5.0),
        "common",
    ),
    (
        "opposite-feature",
        "features of opposite sign: what raises the second probability lowers the first",
        ((1.0, -0.3), (1.0, 1.0), 0.46, 5.0),
        "common",
    ),
    (
        "small-step",
        "the ratio does rise, but by less than 0.1: take a larger step",
        ((1.0, 0.3), (1.0, 1.0), 0.46, 0.1),
        "common",
    ),
    ("no-step", "a step of size 0 moves nothing", ((1.0, 0.3), (1.0, 1.0), 0.46, 0.0), "common"),
    ("descent", "a negative step descends; the objective is ascended", ((1.0, -0.3), (1.0, 1.0), 0.46, -5.0), "common"),
    (
        "second-outside",
        "the second sample is outside the interval as well: it must still be inside",
        ((1.0, -0.8), (1.0, 1.0), 0.7, 5.0),
        "common",
    ),
)
ra.right("the mirror image", [[-1, -0.3], [1, 1], -0.46, 5])
ra.right("tensors, another weight", (tensor([2.0, 0.2]), tensor([0.5, 3.0]), tensor(0.4), 4.0))


# -- the value loss --------------------------------------------------------------------------------------


def clipped_value_loss(values, old_values, returns, cliprange_value=None):  # type: ignore[no-untyped-def]
    """0.5 max((v - R)^2, (old + clip(v - old, -eps, eps) - R)^2) of every step; None: 0.5 (v - R)^2."""
    old_values, returns = old_values.detach(), returns.detach()
    errors = (values - returns) ** 2
    if cliprange_value is not None:
        clipped = old_values + (values - old_values).clamp(-cliprange_value, cliprange_value)
        errors = torch.maximum(errors, (clipped - returns) ** 2)
    return 0.5 * errors


def _value_probe(f: Any) -> list[Any]:
    found: list[Any] = []
    for seed, options in ((1, {}), (4, {"cliprange_value": 0.3}), (7, {"cliprange_value": 0.7})):
        inputs = [normal(2, 6, seed=seed + i).requires_grad_() for i in range(3)]
        losses = f(*inputs, **options)
        found += [losses, *(gradient_or_none(losses, x) for x in inputs)]
    return found


def _value_unusual(f: Any) -> list[str]:
    """A clip of 0, values and returns far away, with and without a clip; the old value is 0."""
    rows = [
        ((2.0, 3.0, 0.0), 4.5),
        ((20.0, 25.0, None), 12.5),
        ((200.0, 0.0, None), 2e4),
        ((200.0, 0.0, 0.5), 2e4),
        ((2.0, 25.0, None), 23.0**2 / 2),
    ]
    return [
        outcome(tensor([want]), f, tensor([v]), torch.zeros(1), tensor([r]), cliprange_value=eps)
        for (v, r, eps), want in rows
    ]


vl = Question(
    id="value_loss",
    title="the value loss, with and without a clip",
    chapter=4,
    kind="function",
    theory=False,
    variable="clipped_value_loss",
    reference=clipped_value_loss,
    reference_source=source(clipped_value_loss),
    hints=(
        "Write the plain loss first: half the squared error of every step. What is the clipped prediction?",
        "The clip holds the new prediction within eps of the old one; of the two squared errors the larger one counts.",
        "0.5 maximum((v - R)^2, (old + (v - old).clamp(-eps, eps) - R)^2), with old_values and returns detached.",
    ),
    explanation="A step whose value has moved towards its target by more than eps gets no further gradient: the clipped "
    "error is the larger one and constant. A step that moved away keeps its full gradient, since there the unclipped error "
    "is the larger one. eps is in units of reward, so a value that suits one task stops the critic of another. Some "
    "implementations leave out the half or the maximum; then vf_coef means something else.",
    probes=in_two_steps(_value_probe, _value_unusual, clipped_value_loss),
)


@vl.case("without a clip: half the squared error, and its slope", 1, "the derivative of 0.5 (v - R)^2 is v - R")
def _(f: Any) -> None:
    values = tensor([1.0, 2.0, -1.0, 20.0, 200.0]).requires_grad_()
    old, returns = tensor([0.9, 0.0, 4.0, 0.0, 0.0]), tensor([3.0, 1.5, -1.0, 25.0, 0.0])
    losses, where = f(values, old, returns), "at v = (1, 2, -1, 20, 200), R = (3, 1.5, -1, 25, 0), no clip"
    expect_close(losses, tensor([2.0, 0.125, 0.0, 12.5, 20000.0]), f"losses {where}")
    slope = gradient(losses, values, "gradient in values")
    expect_close(slope, tensor([-2.0, 0.5, 0.0, -5.0, 200.0]), f"gradient {where}")


@vl.case(
    "with a clip: the larger of the two errors",
    2,
    "old value 0, clip 0.5: a value of 2 counts as 0.5, if that is worse",
)
def _(f: Any) -> None:
    values, old = tensor([2.0, 2.0, -2.0, 0.25, 2.0, -2.0]), torch.zeros(6)
    returns = tensor([3.0, 0.0, 3.0, 3.0, 1.25, -3.0])
    got = f(values, old, returns, cliprange_value=0.5)
    want = tensor([2.5**2, 2.0**2, 5.0**2, 2.75**2, 0.75**2, 2.5**2]) / 2
    expect_close(got, want, "losses at v = (2, 2, -2, 0.25, 2, -2), old 0, R = (3, 0, 3, 3, 1.25, -3), clip 0.5")
    moved = f(values + 7, old + 7, returns + 7, cliprange_value=0.5)
    expect_close(moved, want, "the same with 7 added to values, old_values and returns")
    for eps, error in ((0.2, 2.8), (0.0, 3.0)):
        got = f(tensor([2.0]), torch.zeros(1), tensor([3.0]), cliprange_value=eps)
        expect_close(got, tensor([error**2 / 2]), f"loss at v = 2, old 0, R = 3, clip {eps}")
    got = f(tensor([200.0, 2.0]), torch.zeros(2), tensor([0.0, 25.0]), cliprange_value=0.5)
    expect_close(got, tensor([20000.0, 24.5**2 / 2]), "losses at v = (200, 2), old 0, R = (0, 25), clip 0.5")


@vl.case("no gradient once a value has moved far enough towards its target", 1, "which of the two errors contains v?")
def _(f: Any) -> None:
    values, returns = tensor([2.0, -2.0, 0.25, -2.0]).requires_grad_(), tensor([3.0, 3.0, 3.0, -3.0])
    losses = f(values, torch.zeros(4), returns, cliprange_value=0.5)
    slope, where = gradient(losses, values, "gradient in values"), "v = (2, -2, 0.25, -2), old 0, R = (3, 3, 3, -3)"
    expect_close(slope, tensor([0.0, -5.0, -2.75, 0.0]), f"gradient at {where}, clip 0.5")
    value = tensor([2.0]).requires_grad_()
    slope = gradient(f(value, torch.zeros(1), tensor([3.0]), cliprange_value=0.2), value, "gradient in values")
    expect_close(slope, torch.zeros(1), "gradient at v = 2, old 0, R = 3, clip 0.2")


@vl.case("one number per step, which depends on that step only", 1, "masking and averaging are the caller's choice")
def _(f: Any) -> None:
    inputs = [normal(2, 4, seed=10 + i) for i in range(3)]
    got = as_tensor(f(*inputs, cliprange_value=0.4), "losses")
    expect_shape(got, (2, 4), "losses")
    for b, t in ((0, 1), (1, 3)):
        alone = f(*(x[b : b + 1, t : t + 1] for x in inputs), cliprange_value=0.4)
        expect_close(alone, got[b : b + 1, t : t + 1], f"step [{b}, {t}] alone against inside the batch")
    require(got.max() > got.min() + 0.1, "all steps have the same loss")


@vl.case("targets and old values are constants", 1, "the target must not move towards the prediction")
def _(f: Any) -> None:
    for options in ({}, {"cliprange_value": 0.4}):
        values, old, returns = (normal(2, 6, seed=20 + i).requires_grad_() for i in range(3))
        losses = f(values, old, returns, **options)
        slope = gradient(losses, values, "gradient in values")
        require(slope.abs().max() > 1e-3, "the gradient in values is 0")
        expect_constant(losses, "returns", returns)
        expect_constant(losses, "old_values", old)


def _value_with(
    pick: str = "max",
    half: float = 0.5,
    clip: str = "old",
    detach: str = "both",
    after: str = "",
    default: float | None = None,
    always: float | None = None,
) -> Callable[..., Tensor]:
    def f(values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float | None = None) -> Tensor:
        old = old_values if detach in ("returns", "nothing") else old_values.detach()
        target = returns if detach in ("old", "nothing") else returns.detach()
        v = values.detach() if detach == "all" else values
        eps = default if cliprange_value is None else always or cliprange_value
        errors = (v - target) ** 2
        if eps is not None and clip != "ignored":
            clipped = {
                "old": old + (v - old).clamp(-eps, eps),
                "above": old + (v - old).clamp(max=eps),
                "below": old + (v - old).clamp(min=-eps),
                "difference": (v - old).clamp(-eps, eps),
                "constant": (old + (v - old).clamp(-eps, eps)).detach(),
                "zero": v.clamp(-eps, eps),
                "target": target + (v - target).clamp(-eps, eps),
                "ratio": torch.minimum(torch.maximum(v, old * (1 - eps)), old * (1 + eps)),
            }[clip]
            other = (clipped - target) ** 2
            errors = {"max": torch.maximum, "min": torch.minimum, "other": lambda _, y: y}.get(pick, torch.add)(
                errors, other
            )
        losses = half * errors
        if after == "half without clip":
            return losses if cliprange_value is None else 2 * losses
        if after == "half with clip":
            return losses if cliprange_value is not None else 2 * losses
        if after == "cap with clip":
            return losses if cliprange_value is None else losses.clamp(max=1e4)
        return {"mean": losses.mean(), "sign": -losses, "cap": losses.clamp(max=1e4)}.get(after, losses)

    return f


vl.plant(
    (
        "nothing-detached",
        "the formula is right; returns and old_values are constants and must be detached",
        _value_with(detach="nothing"),
        "common",
    ),
    ("no-half", "the half is missing: then vf_coef means half as much", _value_with(half=1.0), "common"),
    (
        "minimum",
        "the minimum rewards leaving the interval: the larger of the two errors counts",
        _value_with(pick="min"),
        "common",
    ),
    (
        "clipped-only",
        "you kept the clipped error alone: a value that moved the wrong way gets no gradient back",
        _value_with(pick="other"),
        "common",
    ),
    (
        "clipped-only-no-half",
        "the clipped error alone, without half and maximum: some libraries do so, but here both are asked for",
        _value_with(pick="other", half=1.0),
        "common",
    ),
    ("added", "you added the two errors: the larger one counts", _value_with(pick="sum"), "common"),
    (
        "clip-ignored",
        "the clip changes nothing: it is left out, or it is around returns, where it never gives the larger error",
        _value_with(clip="ignored"),
        "common",
    ),
    (
        "no-lower-edge",
        "the value may not fall by more than cliprange_value either: clamp on both sides",
        _value_with(clip="above"),
        "common",
    ),
    (
        "no-upper-edge",
        "the value may not rise by more than cliprange_value either: clamp on both sides",
        _value_with(clip="below"),
        "common",
    ),
    (
        "old-not-added",
        "the clipped difference is no prediction: add the old value back before you subtract the return",
        _value_with(clip="difference"),
        "common",
    ),
    (
        "clipped-detached",
        "the clipped prediction is detached: as long as the value is near the old one, half of the gradient is lost",
        _value_with(clip="constant"),
        "common",
    ),
    ("always-0.5", "the clip is always at 0.5: use cliprange_value", _value_with(always=0.5), "common"),
    ("always-0.2", "the clip is always at 0.2: use cliprange_value", _value_with(always=0.2), "common"),
    (
        "0-as-none",
        "cliprange_value=0.0 is a number: only None means no clip, so compare with `is None`",
        lambda v, o, r, cliprange_value=None: clipped_value_loss(v, o, r, cliprange_value or None),
        "common",
    ),
    (
        "none-as-10",
        "cliprange_value=None means no clip, not a wide one: values may move further than that",
        _value_with(default=10.0),
        "common",
    ),
    ("capped", "the loss has no upper bound: you cap it", _value_with(after="cap"), "common"),
    (
        "capped-with-clip",
        "the clip is one of the value, not of the loss: you cap the loss where there is a clip",
        _value_with(after="cap with clip"),
        "common",
    ),
    (
        "returns-clamped",
        "the returns enter as they are: you clamped them",
        lambda v, o, r, cliprange_value=None: clipped_value_loss(v, o, r.clamp(-5.0, 5.0), cliprange_value),
        "common",
    ),
    (
        "no-half-with-clip",
        "the half is missing where there is a clip",
        _value_with(after="half without clip"),
        "common",
    ),
    (
        "no-half-without-clip",
        "the half is missing where there is no clip",
        _value_with(after="half with clip"),
        "common",
    ),
    (
        "always-clipped",
        "cliprange_value=None means no clip at all",
        _value_with(default=0.2),
        "common",
    ),
    (
        "clipped-around-zero",
        "you clipped the value itself; the clip holds it near the old value",
        _value_with(clip="zero"),
        "common",
    ),
    (
        "clipped-around-target",
        "you clipped the error itself; the clip holds the value near the old value",
        _value_with(clip="target", pick="other"),
        "common",
    ),
    (
        "clipped-ratio",
        "values are no probabilities: clip the difference to the old value, not the quotient",
        _value_with(clip="ratio"),
        "common",
    ),
    ("mean", "one number per step: averaging is the caller's choice", _value_with(after="mean"), "common"),
    ("sign", "the value loss is minimised: the squared error enters with a plus", _value_with(after="sign"), "W-PPO-6"),
    (
        "returns-with-gradient",
        "returns must be detached, or the target moves towards the prediction",
        _value_with(detach="old"),
        "common",
    ),
    (
        "old-with-gradient",
        "old_values must be detached: they belong to the time of sampling",
        _value_with(detach="returns"),
        "common",
    ),
    ("detached", "values are detached: the critic does not learn", _value_with(detach="all"), "common"),
)


def _value_by_cases(
    values: Tensor, old_values: Tensor, returns: Tensor, cliprange_value: float | None = None
) -> Tensor:
    v, old, target = values.double(), old_values.detach().double(), returns.detach().double()
    eps = math.inf if cliprange_value is None else cliprange_value
    nearest = torch.minimum(torch.maximum(v, old - eps), old + eps)
    return torch.where((nearest - target).abs() > (v - target).abs(), nearest - target, v - target).square() / 2


vl.right("by cases, float64", _value_by_cases)
vl.right(
    "clamped between two edges, float32",
    lambda v, o, r, cliprange_value=None: (
        (v - r.detach()).pow(2) / 2
        if cliprange_value is None
        else torch.max(
            (v - r.detach()).abs(),
            (torch.clamp(v, o.detach() - cliprange_value, o.detach() + cliprange_value) - r.detach()).abs(),
        )
        ** 2
        / 2
    ),
)


# -- the signs of the total loss -------------------------------------------------------------------------

_SIGNS = [-1.0, 1.0, -1.0]


def _three_signs(answer: Any) -> Tensor:
    signs = numbers(3)(answer)
    if not bool((signs.abs() == 1).all()):
        raise Fail(f"your answer: got {show(signs)}, expected three signs, each 1 or -1")
    return signs


def _descend(sign: float, loss: Callable[[Tensor], Tensor], start: float, learning_rate: float = 0.1) -> float:
    """The parameter after 50 steps of gradient descent on sign * loss."""
    x = tensor(start, dtype=torch.float64)
    for _ in range(50):
        x = x.requires_grad_()
        (slope,) = torch.autograd.grad(sign * loss(x), x)
        x = x.detach() - learning_rate * slope
    return x.item()


def _coin_entropy(logit: Tensor) -> Tensor:
    law = torch.stack([logit, torch.zeros_like(logit)]).log_softmax(0)
    return -(law.exp() * law).sum()


ts = Question(
    id="total_loss_signs",
    title="three terms, one scalar, one direction",
    chapter=4,
    kind="signs",
    theory=True,
    variable="signs",
    reference=_SIGNS,
    reference_source="signs = [-1, 1, -1]",
    accept=_three_signs,
    hints=(
        "The optimiser goes down on one scalar. Which of the three should grow, and which should shrink?",
        "What should grow gets a minus. Start a value at 0 with the target 1 and let descent run on your sign.",
        "The loss is -L_clip + c L_value - c' H.",
    ),
    explanation="One scalar has one direction. Written to be maximised it is L_clip - c L_value + c' H, so its negative is "
    "minimised: -L_clip + c L_value - c' H. With the other sign on the value loss the error is maximised: from 0, with the "
    "target 1, 50 steps of size 0.1 end at -116.4 instead of 0.995. With the other sign on the entropy the policy is pushed "
    "to put everything on one token.",
    probes=lambda x: x,
)


@ts.case("the policy term makes a good action more likely", 1, "L_clip is to be maximised, and the optimiser goes down")
def _(signs: Any) -> None:
    def objective(logit: Tensor) -> Tensor:  # A = 1, sampled at probability 1/2
        ratio = 2 * logit.sigmoid()
        return torch.minimum(ratio, ratio.clamp(0.8, 1.2))

    end = 2 / (1 + math.exp(-_descend(signs[0].item(), objective, 0.0)))
    require(end > 1.1, f"A = 1: after 50 steps the ratio is {end:.4g}, expected more than 1.1")


@ts.case("the value term takes the value to its target", 1, "a squared error is minimised")
def _(signs: Any) -> None:
    end = _descend(signs[1].item(), lambda v: 0.5 * (v - 1) ** 2, 0.0)
    require(0.9 < end < 1.1, f"from 0, target 1: after 50 steps of size 0.1 the value is {end:.1f}")


@ts.case("the entropy term keeps the policy flexible", 1, "a bonus is something to have more of")
def _(signs: Any) -> None:
    start = tensor(2.0, dtype=torch.float64)
    end = tensor(_descend(signs[2].item(), _coin_entropy, 2.0), dtype=torch.float64)
    before, after = _coin_entropy(start).item(), _coin_entropy(end).item()
    require(after > before + 0.05, f"after 50 steps the entropy has gone from {before:.3f} to {after:.3f} nats")


ts.plant(
    (
        "all-maximised",
        "this maximises L_clip + c L_value + c' H: the value's error is maximised too, and runs to -116 where the target is 1",
        [-1.0, -1.0, -1.0],
        "W-PPO-6",
    ),
    (
        "rigid",
        "your entropy term takes entropy away: the bonus is there to keep the policy flexible",
        [-1.0, 1.0, 1.0],
        "W-PPO-5",
    ),
    (
        "to-be-maximised",
        "these are the signs of the objective, to be maximised; the optimiser minimises",
        [1.0, -1.0, 1.0],
        "common",
    ),
    (
        "all-minimised",
        "you minimise all three: L_clip and the entropy should grow",
        [1.0, 1.0, 1.0],
        "common",
    ),
    (
        "policy-sign",
        "L_clip is an objective: with a plus, descent makes good actions less likely",
        [1.0, 1.0, -1.0],
        "common",
    ),
    (
        "only-the-policy",
        "the policy term is right; the value's error is maximised and the entropy is taken away",
        [-1.0, -1.0, 1.0],
        "W-PPO-6",
    ),
    (
        "only-the-entropy",
        "the entropy term is right; the other two go the wrong way",
        [1.0, -1.0, -1.0],
        "W-PPO-6",
    ),
)
ts.right("integers in a tuple", (-1, +1, -1))
ts.right("an array", np.array([-1, 1, -1]))


# -- what the entropy bonus does -------------------------------------------------------------------------


def entropy_slope(logits):  # type: ignore[no-untyped-def]
    """Gradient of each row's entropy in its logits: -p (log p + H). (B, V) -> (B, V)."""
    logprobs = logits.log_softmax(-1)
    probs = logprobs.exp()
    entropy = -(probs * logprobs).sum(-1, keepdim=True)
    return -probs * (logprobs + entropy)


def _or_error(f: Any, logits: Tensor) -> Any:
    """The result, or a word if the learner's code raises, as it does for shapes that do not fit."""
    try:
        return f(logits)
    except Exception:
        return "an error"


_TILT = 0.19661193  # p (1 - p) for two tokens whose logits differ by 1
_WIDE = [
    ([300.0, 0.0, -300.0], [0.0, 0.0, 0.0]),
    ([1.0, 0.0, -300.0], [-_TILT, _TILT, 0.0]),
    ([101.0, 100.0, -200.0], [-_TILT, _TILT, 0.0]),
    ([1000.0, 999.0, -1000.0], [-_TILT, _TILT, 0.0]),
]
"""Logits of one row, far apart or large, and the gradient of its entropy."""
_TWO_ROWS = tensor([[300.0, 299.0], [0.0, -1.0]])
_SMALL = tensor([[0.0, -12.0, -20.0]])


def _entropy_gradient(logits: Tensor) -> Tensor:
    x = logits.double().requires_grad_()
    return torch.autograd.grad(_entropies(x).sum(), x)[0]


def _slope_unusual(f: Any) -> list[str]:
    words = [outcome(tensor([want]), f, tensor([row])) for row, want in _WIDE]
    both = as_tensor(f(_TWO_ROWS.clone()), "probe")
    words += [outcome(tensor([-_TILT, _TILT]), torch.clone, row) for row in both]
    return [*words, outcome(_entropy_gradient(_SMALL), f, _SMALL.clone(), rtol=1e-4, atol=2e-7)]


es = Question(
    id="entropy_slope",
    title="the gradient of the entropy",
    chapter=4,
    kind="symbolic",
    theory=True,
    variable="entropy_slope",
    reference=entropy_slope,
    reference_source=source(entropy_slope),
    hints=(
        "H = -sum p log p with p = softmax(logits). What is d p_i / d logit_j?",
        "d p_i / d logit_j = p_i (1_ij - p_j). The entries of the gradient sum to 0: probability is only moved about.",
        "-p (logp + H), with logp from log_softmax.",
    ),
    explanation="The chain rule gives -sum_i (log p_i + 1) p_i (1_ij - p_j) = -p_j (log p_j + H). The surprise -log p_j is "
    "compared with its mean H: tokens more likely than that lose, the others gain, and at the uniform distribution nothing "
    "moves. So a bonus c' H spreads the policy; it does not make it rigid.",
    probes=in_two_steps(
        lambda f: [
            _or_error(f, x)
            for x in (normal(2, 4, seed=1), 2 * normal(1, 3, seed=2), tensor([[1.0, 1.0, 1.0]]), normal(3, 3, seed=6))
        ],
        _slope_unusual,
        entropy_slope,
    ),
)


def _entropies(logits: Tensor) -> Tensor:
    return torch.distributions.Categorical(logits=logits.double()).entropy()


@es.case("a step along it raises the entropy", 1, "the bonus is maximised: likely tokens must lose")
def _(f: Any) -> None:
    logits = tensor([[2.0, 0.0, -1.0], [0.5, 0.0, 3.0]])
    slope = as_tensor(f(logits.clone()), "gradient")
    expect_shape(slope, (2, 3), "gradient")
    before, after = _entropies(logits), _entropies(logits + 0.1 * slope)
    require(
        bool((after > before + 1e-4).all()),
        f"entropies before a step along your gradient {show(before)}, after it {show(after)} nats",
    )


@es.case("equals automatic differentiation", 2, "only p depends on the logits, but all of p does")
def _(f: Any) -> None:
    for logits in (normal(3, 4, seed=3), 2 * normal(2, 6, seed=4), normal(3, 3, seed=6)):
        shape = tuple(logits.shape)
        expect_close(f(logits.clone()), _entropy_gradient(logits), f"gradient in the logits, shape {shape}")
    where = "gradient at logits (0, -12, -20)"
    expect_close(f(_SMALL.clone()), _entropy_gradient(_SMALL), where, rtol=1e-4, atol=2e-7)


@es.case(
    "probability is only moved about, and at the uniform distribution nothing moves", 1, "the entries of a row sum to 0"
)
def _(f: Any) -> None:
    slope = as_tensor(f(normal(3, 5, seed=5)), "gradient")
    expect_shape(slope, (3, 5), "gradient")
    require(slope.abs().max() > 1e-2, "your gradient is 0 everywhere")
    expect_close(slope.sum(1), torch.zeros(3), "sums over the tokens")
    expect_close(f(torch.ones(2, 4)), torch.zeros(2, 4), "at equal logits")


@es.case(
    "finite where a probability is 0",
    1,
    "a token of probability 0 has the slope 0; if you see nan, some exp overflows or 0 meets log 0: log_softmax",
)
def _(f: Any) -> None:
    for row, want in _WIDE:
        expect_close(f(tensor([row])), tensor([want]), f"logits ({', '.join(f'{x:g}' for x in row)})")
    expect_close(f(_TWO_ROWS.clone()), tensor([[-_TILT, _TILT]] * 2), "logits in two rows, (300, 299) and (0, -1)")
    other = as_tensor(f(tensor([[2.0, 0.0, -1.0]])), "gradient")
    require(bool(other.abs().max() > 1e-2), "your gradient is 0 everywhere")


def _slope_from(choose: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The gradient as another function of p, log p and H."""

    def f(logits: Tensor) -> Tensor:
        log_p = logits.log_softmax(-1)
        return choose(log_p.exp(), log_p, -(log_p.exp() * log_p).sum(-1, keepdim=True))

    return f


def _zeros_for_nan(logits: Tensor) -> Tensor:
    probs = logits.softmax(-1)
    logprobs = probs.log()
    return torch.nan_to_num(-probs * (logprobs - (probs * logprobs).sum(-1, keepdim=True)))


def _slope_of_exps(exp: Callable[[Tensor], Tensor], tiny: float = 0.0) -> Callable[[Tensor], Tensor]:
    """The gradient from a softmax of one's own, with another exp."""

    def f(logits: Tensor) -> Tensor:
        probs = exp(logits) / exp(logits).sum(-1, keepdim=True)
        logprobs = (probs + tiny).log()
        return -probs * (logprobs - (probs * logprobs).sum(-1, keepdim=True))

    return f


es.plant(
    (
        "rigid",
        "the sign is lost: along your gradient the policy grows rigid, along that of the entropy it spreads",
        _slope_from(lambda p, l, h: p * (l + h)),
        "W-PPO-5",
    ),
    (
        "no-entropy-term",
        "p_i depends on every logit through the normaliser: log p is compared with its mean -H",
        _slope_from(lambda p, l, h: -p * l),
        "common",
    ),
    (
        "one-for-entropy",
        "the 1 of d(p log p) drops out with the normaliser; its place is taken by H",
        _slope_from(lambda p, l, h: -p * (l + 1)),
        "common",
    ),
    (
        "in-the-probabilities",
        "this is the derivative in p; the logits move p through the softmax",
        _slope_from(lambda p, l, h: -(l + 1)),
        "common",
    ),
    (
        "terms",
        "p log p are the terms of the entropy, up to the sign, not its derivative",
        _slope_from(lambda p, l, h: p * l),
        "common",
    ),
    ("no-p", "the factor p is missing", _slope_from(lambda p, l, h: -(l + h)), "common"),
    (
        "entropy-subtracted",
        "log p minus H: the mean of log p is -H, so H is added",
        _slope_from(lambda p, l, h: -p * (l - h)),
        "common",
    ),
    (
        "towards-uniform",
        "1/V - p also points to the uniform distribution, but it is the gradient of another function",
        _slope_from(lambda p, l, h: 1 / p.shape[-1] - p),
        "common",
    ),
    (
        "diagonal-only",
        "p (1 - p) is only the diagonal of the softmax's derivative",
        _slope_from(lambda p, l, h: -(l + 1) * p * (1 - p)),
        "common",
    ),
    (
        "naive-log",
        "log(softmax) is -inf where a probability is 0, and 0 times -inf is not a number",
        lambda x: -x.softmax(-1) * (x.softmax(-1).log() - (x.softmax(-1) * x.softmax(-1).log()).sum(-1, keepdim=True)),
        "common",
    ),
    (
        "nan-to-num",
        "your result is 0 wherever 0 times log 0 made the entropy nan: take log_softmax instead of replacing nan",
        _zeros_for_nan,
        "common",
    ),
    (
        "clamped-logits",
        "the logits are clamped: only their differences count, so (101, 100) is the same as (1, 0)",
        lambda x: entropy_slope(x.clamp(-20.0, 20.0)),
        "common",
    ),
    (
        "log-with-epsilon",
        "log(p + eps), or log of a clamped p, is wrong where p is small: log_softmax needs neither",
        lambda x: -x.softmax(-1) * ((p := x.softmax(-1)) + 1e-5).log().sub((p * (p + 1e-5).log()).sum(-1, True)),
        "common",
    ),
    (
        "naive-softmax",
        "exp of a large logit is infinite: subtract each row's maximum first, as log_softmax does",
        _slope_of_exps(lambda x: x.exp()),
        "common",
    ),
    (
        "naive-softmax-without-log",
        "in float32 exp is infinite from 89 on: subtract each row's maximum first, as softmax does",
        _slope_of_exps(lambda x: x.exp(), tiny=1e-30),
        "common",
    ),
    (
        "naive-softmax-float64",
        "float64 only moves the limit: exp(1000) is infinite there too, so subtract each row's maximum first",
        _slope_of_exps(lambda x: x.double().exp()),
        "common",
    ),
    (
        "global-maximum",
        "you subtract the maximum of the whole batch: a row far below it becomes 0/0, so take each row's own",
        _slope_of_exps(lambda x: (x - x.max()).exp(), tiny=1e-30),
        "common",
    ),
    (
        "no-keepdim",
        "H has shape (B,), so it is added along the tokens: keepdim=True keeps it beside its own row",
        _slope_from(lambda p, l, h: -p * (l + h[:, 0])),
        "common",
    ),
    (
        "bits",
        "the entropy is in nats: log is the natural logarithm",
        _slope_from(lambda p, l, h: -p * (l + h) / math.log(2)),
        "common",
    ),
    (
        "batch-entropy",
        "H is each row's own entropy, not the mean over the batch",
        _slope_from(lambda p, l, h: -p * (l + h.mean())),
        "common",
    ),
)


def _slope_by_autograd(logits: Tensor) -> Tensor:
    x = logits.detach().clone().requires_grad_()
    log_p = x.log_softmax(-1)
    return torch.autograd.grad(-(log_p.exp() * log_p).sum(), x)[0]


def _slope_by_jacobian(logits: Tensor) -> Tensor:
    log_p = logits.double().log_softmax(-1)
    p = log_p.exp()
    jacobian = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return -torch.einsum("bi,bij->bj", log_p + 1, jacobian)


es.right("the softmax's Jacobian, float64", _slope_by_jacobian)
es.right("automatic differentiation, float32", _slope_by_autograd)
es.right(
    "the logits' distance from their mean under p",
    lambda x: -x.softmax(-1) * (x - (x.softmax(-1) * x).sum(-1, keepdim=True)),
)
es.right(
    "covariance form", lambda x: x.softmax(-1) * ((x.softmax(-1) * x.log_softmax(-1)).sum(-1, True) - x.log_softmax(-1))
)


# -- sure, or changed ------------------------------------------------------------------------------------

_NEAR = 1e-6
"""A bound counts as met from this close: 0.9 in float32 is a little less than 0.9."""
_SURE_CHANGED = ((0.95, 0.99), (0.1, 0.13))


def _two_moves(answer: Any) -> Tensor:
    rows = [as_tensor(row, "your answer") for row in unpack(answer, 2, "(sure, changed)")]
    if any(tuple(row.shape) != (2,) for row in rows):
        raise Fail("your answer: expected two pairs (old probability, new probability)")
    found = torch.stack(rows)
    if not bool(((found > 0) & (found <= 1 + _NEAR)).all()):
        raise Fail(f"your answer: got {show(found, 7)}, expected probabilities above 0 and at most 1")
    return found


def _stopped(old: float, new: float) -> bool:
    """Whether the clipped objective of an action with A = 1 and eps = 0.2 has no gradient, by differentiation.

    A ratio of 1.2 up to rounding counts as inside the interval.
    """
    x = tensor(new, dtype=torch.float64).requires_grad_()
    ratio = x / old
    return bool(torch.autograd.grad(torch.minimum(ratio, ratio.clamp(0.8, 1.2 + _NEAR)), x)[0] == 0)


def _sure_kind(x: Tensor) -> str:
    (sure_old, sure_new), (old, new) = x.tolist()
    sure, unsure = 0.9 - _NEAR, 0.3 + _NEAR
    if sure_old <= unsure and sure_new <= unsure and old >= sure and new >= sure:
        return "exchanged"
    if sure_old < sure or sure_new < sure:
        return "only sure afterwards" if sure_new >= sure else "the first is not sure"
    if sure_new <= sure_old + _NEAR:
        return "the first does not get surer"
    if old > unsure or new > unsure:
        return "the second is not unsure"
    if new < old:
        return "the second falls"
    return "right" if _stopped(old, new) else "the second is not clipped"


sc = Question(
    id="sure_or_changed",
    title="does the clip stop a model that is sure, or one that has changed?",
    chapter=4,
    kind="counterexample",
    theory=True,
    variable="moves",
    reference=_SURE_CHANGED,
    reference_source="moves = ((0.95, 0.99), (0.1, 0.13))",
    accept=_two_moves,
    hints=(
        "Which number does the clip look at: the new probability, or the new one over the old one?",
        "From 0.9 on, no probability can grow by 20 percent. A small one does so easily.",
        "0.95 to 0.99 has the ratio 1.04; 0.1 to 0.13 has the ratio 1.3.",
    ),
    explanation="The clip looks at the ratio new/old. A probability that is at least 0.9 can at most grow by the factor "
    "1.11, so for A > 0 it is never clipped, however sure the model gets: 0.95 to 0.99 has the ratio 1.04. From 0.1 to 0.13 "
    "the ratio is 1.3 and the gradient is 0, though the model is far from sure. Against too much certainty there is the "
    "entropy bonus, or a KL penalty to a reference.",
    probes=_sure_kind,
)


@sc.case("sure before, surer after, and the clip does nothing", 1, "both at least 0.9, and the second one larger")
def _(x: Any) -> None:
    old, new = x[0].tolist()
    move = f"from {old:.7g} to {new:.7g}"
    require(min(old, new) >= 0.9 - _NEAR, f"{move}: both must be at least 0.9")
    require(new > old + _NEAR, f"{move}: the model must get surer")
    require(not _stopped(old, new), f"{move} the ratio {new / old:.4g} is clipped")


@sc.case("unsure before and after, and the clip stops the gradient", 1, "both at most 0.3, and a ratio above 1.2")
def _(x: Any) -> None:
    old, new = x[1].tolist()
    move = f"from {old:.7g} to {new:.7g}"
    require(max(old, new) <= 0.3 + _NEAR, f"{move}: both must be at most 0.3")
    require(
        _stopped(old, new), f"{move} the ratio is {new / old:.6g}, not above 1.2: the clip does not stop the gradient"
    )


sc.plant(
    (
        "exchanged",
        "the clip looks at change, not at certainty: a sure action cannot grow by 20 percent, an unsure one can",
        ((0.1, 0.13), (0.95, 0.99)),
        "W-PPO-4",
    ),
    (
        "not-clipped",
        "the second ratio lies inside the interval: being unsure is no protection, and no reason for a clip",
        ((0.95, 0.99), (0.1, 0.11)),
        "W-PPO-4",
    ),
    (
        "clipped-when-sure",
        "the second action must be unsure before and after: at most 0.3",
        ((0.95, 0.99), (0.5, 0.99)),
        "W-PPO-4",
    ),
    (
        "becomes-sure",
        "the first action must be sure before as well: at least 0.9",
        ((0.5, 0.99), (0.1, 0.13)),
        "common",
    ),
    ("not-sure", "the first action must be sure: at least 0.9, before and after", ((0.5, 0.55), (0.1, 0.13)), "common"),
    (
        "less-sure",
        "the first action gets less sure, or stays: let it grow",
        ((0.99, 0.95), (0.1, 0.13)),
        "common",
    ),
    (
        "wrong-way",
        "the second ratio is below 1 - eps, where for A > 0 the minimum keeps the gradient: the action must grow",
        ((0.95, 0.99), (0.2, 0.1)),
        "common",
    ),
)
sc.right("lists, other numbers", [[0.9, 1.0], [0.001, 0.3]])
sc.right("a tensor", tensor([[0.98, 0.99], [0.05, 0.07]]))
sc.right("a float32 tensor at the bound 0.9", tensor([[0.9, 0.99], [0.1, 0.2]]))
sc.right("float32 arrays at both bounds", (np.array([0.9, 1.0], np.float32), np.array([0.2, 0.3], np.float32)))


# -- what to watch during an update ----------------------------------------------------------------------


def update_metrics(logprobs, old_logprobs, advantages, response_mask, cliprange=0.2):  # type: ignore[no-untyped-def]
    """Means over the tokens that count: KL estimate, share outside the interval, share that the clip stops."""
    log_ratios = (logprobs - old_logprobs)[response_mask]
    advantages = advantages[response_mask]
    ratios = log_ratios.exp()
    approx_kl = torch.expm1(log_ratios) - log_ratios
    outside = (ratios - 1).abs() > cliprange
    over, under = ratios > 1 + cliprange, ratios < 1 - cliprange
    stopped = ((advantages > 0) & over) | ((advantages < 0) & under)
    return approx_kl.mean(), outside.float().mean(), stopped.float().mean()


def _metric_inputs(seed: int, spread: float = 0.4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    old = -normal(4, 6, seed=seed).abs() - 0.5
    mask = torch.arange(6) < tensor([6, 1, 4, 3])[:, None]
    return old + spread * normal(4, 6, seed=seed + 1), old, normal(4, 6, seed=seed + 2), mask


def _tokens(
    log_ratios: Sequence[float], advantages: Sequence[float], dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The inputs for tokens with these log-ratios, all of them with log-probability -0.5 now or then."""
    d = tensor([log_ratios], dtype=dtype)
    old = torch.where(d > 0, -0.5 - d, torch.full_like(d, -0.5))
    return old + d, old, tensor([advantages], dtype=dtype), torch.ones_like(d, dtype=torch.bool)


_NO_ADVANTAGE = ([0.0, math.log(1.5), math.log(0.5), math.log(1.5)], [0.0, 0.0, 0.0, 1.0])
_TWO_ABOVE = ([math.log(1.5)] * 2, [0.5, 3.0])
_LARGE = {-8.0: math.exp(-8) + 7, 12.0: math.exp(12) - 13, 25.0: math.exp(25) - 26}
"""Log-ratios of a token, and exp(d) - 1 - d."""


def _padded_tokens(log_ratio: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two tokens with ratios 1 and 1.5 and A = 1, then two of padding with this log-ratio and A = 0."""
    new, old, advantages, mask = _tokens([0.0, math.log(1.5), log_ratio, log_ratio], [1.0, 1.0, 0.0, 0.0])
    return new, old, advantages, mask & tensor([[True, True, False, False]])


def _metric_ordinary(f: Any) -> list[Any]:
    one_low = tensor([[0.81, 1.0]]).log(), torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool)
    return [list(f(*_metric_inputs(1))), list(f(*_metric_inputs(4), cliprange=0.4)), list(f(*one_low))]


def _metric_unusual(f: Any) -> list[Any]:
    def kl(inputs: tuple[Tensor, ...]) -> Any:
        return _three(f(*inputs))[0]

    small, near_0 = _metric_inputs(7, spread=0.001), _tokens([0.009], [1.0], torch.float64)
    d = (small[0].double() - small[1].double())[small[3]]
    large = [outcome(want, kl, _tokens([d], [1.0])) for d, want in _LARGE.items()]
    return [
        outcome((torch.expm1(d) - d).mean(), kl, small, rtol=5e-3, atol=0.0),
        outcome(math.expm1(0.009) - 0.009, kl, near_0, atol=0.0),
        "right" if set(large) == {"right"} else "wrong",
        outcome((0.5 - math.log(1.5)) / 2, kl, _padded_tokens(200.0)),
        *(_three(f(*_tokens(*tokens)))[2] for tokens in (_NO_ADVANTAGE, _TWO_ABOVE)),
        _three(f(*_padded_tokens(0.1)))[2],
    ]


um = Question(
    id="update_metrics",
    title="how far an update has gone: KL estimate, clip fraction, share stopped by the clip",
    chapter=4,
    kind="function",
    theory=False,
    variable="update_metrics",
    reference=update_metrics,
    reference_source=source(update_metrics),
    hints=(
        "Which policy wrote the tokens? The mean over them is a mean under that policy.",
        "With d = log pi - log pi_old, E_old[exp(d)] = 1, so exp(d) - 1 - d has the mean KL(old || new) and is never "
        "negative. The two shares differ where the ratio is outside on the side from which the minimum lets it return.",
        "expm1(d) - d; abs(exp(d) - 1) > eps; (A > 0 and r > 1 + eps) or (A < 0 and r < 1 - eps). Each averaged over "
        "the tokens where the mask is True. A token with A = 0 has no gradient that the clip could stop.",
    ),
    explanation="The tokens come from the old policy, so the mean of expm1(d) - d is KL(old || new); -d has the same mean, "
    "but single values of either sign. For small d the number is about d^2/2, which exp(d) - 1 - d loses to rounding in "
    "float32. The clip fraction usually logged counts every ratio outside the interval; fewer tokens lack a gradient, "
    "since the minimum keeps the way back open, and a token with A = 0 is not counted: it had none before. An update is often ended early once the KL estimate passes a limit.",
    probes=in_two_steps(_metric_ordinary, _metric_unusual, update_metrics),
)


def _three(found: Any) -> tuple[Any, ...]:
    return unpack(found, 3, "update_metrics returns (approx_kl, clipfrac, share stopped by the clip)")


@um.case("the tokens of the old policy give KL(old || new)", 2, "a mean under the policy that wrote them")
def _(f: Any) -> None:
    for logits in (tensor([0.5, -1.0, 0.3]), tensor([-2.0, 1.0, 2.0])):
        old, new = tensor([0.5, 0.25, 0.25]), logits.softmax(0)
        written = tensor([[0, 0, 1, 2]])  # each token as often as the old policy writes it
        mask, advantages = torch.ones(1, 4, dtype=torch.bool), torch.ones(1, 4)
        got = _three(f(new.log()[written], old.log()[written], advantages, mask))[0]
        expect_close(got, (old * (old / new).log()).sum(), "approx_kl against the exact KL(old || new)")


@um.case("every single token's estimate is at least 0", 1, "exp(d) - 1 - d, whatever the sign of d")
def _(f: Any) -> None:
    for d in (-1.5, -0.1, 0.1, 1.5):
        one = tensor([[-2.0]])
        got = as_tensor(_three(f(one + d, one, one, torch.ones(1, 1, dtype=torch.bool)))[0], "approx_kl")
        require(bool((got > 0).all()), f"log-ratio {d}: approx_kl is {show(got)}, expected more than 0")
    for d, want in _LARGE.items():
        expect_close(_three(f(*_tokens([d], [1.0])))[0], want, f"one token, log-ratio {d:g}: approx_kl")


@um.case("small changes are not lost in rounding", 1, "exp(d) - 1 - d is a small difference of large numbers: expm1")
def _(f: Any) -> None:
    new, old, advantages, mask = _metric_inputs(10, spread=0.001)
    d = (new.double() - old.double())[mask]
    want = (d**2 / 2 + d**3 / 6).mean()
    expect_close(
        _three(f(new, old, advantages, mask))[0], want, "approx_kl at log-ratios of about 0.001", rtol=5e-3, atol=0.0
    )
    one = _tokens([0.009], [1.0])
    d = one[0].double() - one[1].double()
    want = (torch.expm1(d) - d).mean()
    expect_close(_three(f(*one))[0], want, "one token, log-ratio 0.009: approx_kl", rtol=1e-3, atol=0.0)


@um.case("clipfrac counts all ratios outside, whatever the advantage", 1, "the distance of the ratio from 1")
def _(f: Any) -> None:
    ratios = tensor([[0.5, 0.79, 0.81, 1.0, 1.19, 1.25, 1.7, 1.0]])
    mask = torch.ones(1, 8, dtype=torch.bool)
    for a in (1.0, -1.0):
        got = _three(f(ratios.log() - 1, torch.full((1, 8), -1.0), torch.full((1, 8), a), mask))
        expect_close(got[1], 0.5, f"ratios 0.5, 0.79, 0.81, 1, 1.19, 1.25, 1.7, 1, A = {a:+g}: clipfrac")
    got = _three(f(ratios.log() - 1, torch.full((1, 8), -1.0), torch.ones(1, 8), mask, cliprange=0.4))
    expect_close(got[1], 0.25, "the same ratios, cliprange 0.4: clipfrac")


@um.case("the share stopped by the clip is that of autograd", 2, "for A > 0 above, for A < 0 below")
def _(f: Any) -> None:
    for seed, eps in ((13, 0.2), (16, 0.3)):
        new, old, advantages, mask = _metric_inputs(seed)
        x = new.clone().requires_grad_()
        ratio = (x - old).exp()
        torch.minimum(ratio * advantages, ratio.clamp(1 - eps, 1 + eps) * advantages).sum().backward()
        assert x.grad is not None
        want = (x.grad[mask] == 0).double().mean()
        expect_close(_three(f(new, old, advantages, mask, cliprange=eps))[2], want, "share stopped by the clip")
    got = _three(f(*_tokens([math.log(1.3)], [1.0]), cliprange=0.4))[2]
    expect_close(got, 0.0, "one token, ratio 1.3, A = 1, cliprange 0.4: share stopped by the clip")
    got = _three(f(*_tokens(*_TWO_ABOVE)))[2]
    expect_close(got, 1.0, "ratios 1.5 and 1.5, A = 0.5 and 3: share stopped by the clip")
    got = _three(f(*_tokens(*_NO_ADVANTAGE)))[2]
    expect_close(got, 0.25, "ratios 1, 1.5, 0.5, 1.5, A = 0, 0, 0, 1 (at A = 0 the clip stops nothing): the share")


@um.case("padding does not count, and every token that does counts the same", 1, "one mean over all tokens of the mask")
def _(f: Any) -> None:
    new, old, advantages, mask = _metric_inputs(19)
    got = _three(f(new, old, advantages, mask))
    flat = _three(f(*(x[mask][None] for x in (new, old, advantages, mask))))
    for name, x, y in zip(("approx_kl", "clipfrac", "share stopped by the clip"), got, flat, strict=True):
        expect_close(x, as_tensor(y, name), f"{name}: padded batch against its tokens in one row")
    require(0 < as_tensor(flat[1], "clipfrac") < 1, "clipfrac is 0 or 1 where some ratios are outside, some inside")
    for log_ratio in (0.1, 200.0):
        got, where = (
            _three(f(*_padded_tokens(log_ratio))),
            f"ratios 1 and 1.5, padding with log-ratio {log_ratio:g}, A = 0",
        )
        wants = ((0.5 - math.log(1.5)) / 2, 0.5, 0.5)
        for name, x, want in zip(("approx_kl", "clipfrac", "share stopped by the clip"), got, wants, strict=True):
            expect_close(x, want, f"{where}: {name}")


def _metrics_with(
    kl: Callable[[Tensor], Tensor] = lambda d: torch.expm1(d) - d,
    outside: str = "ratio",
    stopped: str = "both",
    average: str = "tokens",
    order: Sequence[int] = (0, 1, 2),
) -> Callable[..., Any]:
    def f(
        logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, response_mask: Tensor, cliprange: float = 0.2
    ) -> Any:
        d, e, a = logprobs - old_logprobs, cliprange, advantages
        r, m = d.exp(), response_mask.float()
        far = {"ratio": (r - 1).abs() > e, "log": d.abs() > e, "fixed": (r - 1).abs() > 0.2, "upper": r > 1 + e}[
            outside
        ]
        ends = {
            "both": ((a > 0) & (r > 1 + e)) | ((a < 0) & (r < 1 - e)),
            "exchanged": ((a < 0) & (r > 1 + e)) | ((a > 0) & (r < 1 - e)),
            "clipfrac": (r - 1).abs() > e,
            "upper": (a > 0) & (r > 1 + e),
            "fixed": ((a > 0) & (r > 1.2)) | ((a < 0) & (r < 0.8)),
            "zero": ((a > 0) & (r > 1 + e)) | ((a < 0) & (r < 1 - e)) | (a == 0),
            "zero as negative": torch.where(a > 0, r > 1 + e, r < 1 - e),
            "zero outside": ((a >= 0) & (r > 1 + e)) | ((a <= 0) & (r < 1 - e)),
        }[stopped]
        found = [kl(d), far.float(), ends.float()]
        if average == "tokens":
            means = [x[response_mask].mean() for x in found]
        elif average == "times":
            means = [(x * m).sum() / m.sum() for x in found]
        elif average == "responses":
            means = [((x * m).sum(1) / m.sum(1)).mean() for x in found]
        else:
            means = [x.mean() for x in found] if average == "padding" else [(x * m).sum() for x in found]
        return tuple(means[i] for i in order)

    return f


def _zeros_of_the_padding(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, response_mask: Tensor, cliprange: float = 0.2
) -> Any:
    d = torch.where(response_mask, logprobs - old_logprobs, 0.0)  # then padding has the ratio 1
    stopped = (advantages * d.sign() > 0) & (torch.expm1(d).abs() > cliprange) | (advantages == 0)
    shares = ((torch.expm1(d).abs() > cliprange).sum(), stopped.sum())
    return tuple(x / response_mask.sum() for x in ((torch.expm1(d) - d).sum(), *shares))


um.plant(
    (
        "log-ratio",
        "-d has the right mean, but single values of either sign: the estimate asked for is never negative",
        _metrics_with(kl=lambda d: -d),
        "common",
    ),
    (
        "sign",
        "this is the mean of log pi - log pi_old, minus the divergence on average",
        _metrics_with(kl=lambda d: d),
        "common",
    ),
    (
        "half-square",
        "d^2/2 is never negative, but its mean is not the divergence",
        _metrics_with(kl=lambda d: d**2 / 2),
        "common",
    ),
    (
        "other-direction",
        "exp(-d) - 1 + d belongs to tokens of the new policy; these were written by the old one",
        _metrics_with(kl=lambda d: torch.expm1(-d) + d),
        "common",
    ),
    (
        "cancellation",
        "exp(d) - 1 - d loses small values to rounding in float32: use expm1",
        _metrics_with(kl=lambda d: d.exp() - 1 - d),
        "common",
    ),
    (
        "ratio-minus-one",
        "the mean of r - 1 is 0 under the old policy: the - d is missing",
        _metrics_with(kl=torch.expm1),
        "common",
    ),
    (
        "one-meaning",
        "clipfrac stands in both places: outside the interval the minimum may still keep the gradient",
        _metrics_with(stopped="clipfrac"),
        "W-PPO-1",
    ),
    (
        "signs-of-A-exchanged",
        "the edges are exchanged: for A > 0 it is the upper one that stops the gradient",
        _metrics_with(stopped="exchanged"),
        "common",
    ),
    ("upper-edge-only", "for A < 0 the lower edge stops the gradient", _metrics_with(stopped="upper"), "common"),
    (
        "log-interval",
        "the interval is for the ratio; you compared its log with eps",
        _metrics_with(outside="log"),
        "common",
    ),
    (
        "clipfrac-above-only",
        "ratios below 1 - eps are outside as well",
        _metrics_with(outside="upper"),
        "common",
    ),
    ("cliprange-ignored", "clipfrac always uses 0.2: use the argument", _metrics_with(outside="fixed"), "common"),
    (
        "cliprange-ignored-third",
        "the third number always uses 0.2: use the argument",
        _metrics_with(stopped="fixed"),
        "common",
    ),
    (
        "cliprange-ignored-twice",
        "both shares always use 0.2: use the argument",
        _metrics_with(outside="fixed", stopped="fixed"),
        "common",
    ),
    (
        "whitened",
        "you centred the advantages: then some that are positive count as negative",
        lambda n, o, a, m, cliprange=0.2: update_metrics(n, o, (a - a[m].mean()) / (a[m].std() + 1e-8), m, cliprange),
        "common",
    ),
    (
        "zero-advantage-counted",
        "a token with A = 0 has no gradient that the clip could stop: it does not count",
        _metrics_with(stopped="zero"),
        "common",
    ),
    (
        "zero-advantage-outside",
        "a token with A = 0 does not count, even if its ratio is outside: compare with > and <",
        _metrics_with(stopped="zero outside"),
        "common",
    ),
    (
        "zero-advantage-on-one-side",
        "a token with A = 0 is treated as if its advantage had a sign: it does not count, on either side",
        _metrics_with(stopped="zero as negative"),
        "common",
    ),
    (
        "zero-advantage-in-padding",
        "you counted tokens with A = 0, those of the padding as well: neither counts",
        _zeros_of_the_padding,
        "common",
    ),
    (
        "exp-before-mask",
        "the exp of the padding overflows, and infinity times a mask of 0 is not a number: drop the padding first",
        _metrics_with(average="times"),
        "common",
    ),
    (
        "clamped-log-ratio",
        "you clamp the log-ratio: a token that has changed much counts in full",
        _metrics_with(kl=lambda d: torch.expm1(d.clamp(-20.0, 20.0)) - d.clamp(-20.0, 20.0)),
        "common",
    ),
    (
        "half-square-near-0",
        "d^2/2 for small d is off by a share of d/3: expm1 needs no such case",
        _metrics_with(kl=lambda d: torch.where(d.abs() < 0.01, d**2 / 2, torch.expm1(d) - d)),
        "common",
    ),
    ("padding-counted", "the padding is in the means", _metrics_with(average="padding"), "common"),
    (
        "per-response",
        "you averaged per response first: then tokens of short responses weigh more",
        _metrics_with(average="responses"),
        "common",
    ),
    ("summed", "sums instead of means", _metrics_with(average="sum"), "common"),
    (
        "exchanged",
        "the two shares are exchanged: first all ratios outside, then those that the clip stops",
        _metrics_with(order=(0, 2, 1)),
        "common",
    ),
)


def _metrics_by_loop(
    logprobs: Any, old_logprobs: Any, advantages: Any, response_mask: Any, cliprange: float = 0.2
) -> list[float]:
    rows = [
        (new - old, a)
        for new, old, a, keep in zip(
            *(x.flatten().tolist() for x in (logprobs, old_logprobs, advantages, response_mask)), strict=True
        )
        if keep
    ]
    kls = [math.expm1(d) - d for d, _ in rows]
    outside = [abs(math.exp(d) - 1) > cliprange for d, _ in rows]
    stopped = [far and d * a > 0 for far, (d, a) in zip(outside, rows, strict=True)]
    return [sum(x) / len(rows) for x in (kls, outside, stopped)]


um.right("python floats", _metrics_by_loop)
um.right(
    "exp in float64",
    lambda n, o, a, m, cliprange=0.2: tuple(
        x[m].double().mean()
        for x in (
            (n - o).double().exp() - 1 - (n - o).double(),
            ((n - o).exp() - 1).abs() > cliprange,
            a * ((n - o).exp() - 1) > cliprange * a.abs(),
        )
    ),
)

CHAPTER: Sequence[Question] = (of, sb, wv, pc, cg, ra, vl, ts, es, sc, um)
