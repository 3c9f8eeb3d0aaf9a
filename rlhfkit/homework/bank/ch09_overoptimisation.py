"""Chapter 9, over-optimisation: seven questions, with the wrong answers that their checks must reject."""

from __future__ import annotations

import functools
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
    expect_shape,
    normal,
    require,
    show,
    source,
    unpack,
)
from rlhfkit.homework.core import Question

# -- the distribution of best-of-n -----------------------------------------------------------------------


def best_of_n(ref_logprobs, scores, n):  # type: ignore[no-untyped-def]
    """Log-probability that a response is the best of n draws from ref; ties share as ref. two (P, N) -> (P, N)."""
    probs = ref_logprobs.exp()[:, None, :]
    at_most = (probs * (scores[:, None, :] <= scores[:, :, None])).sum(-1)
    below = (probs * (scores[:, None, :] < scores[:, :, None])).sum(-1)
    return ref_logprobs + ((at_most**n - below**n) / (at_most - below)).log()


_TIED = [[0.3, 2.0, -1.0, 2.0, 0.3], [1.5, -0.5, 1.5, 1.5, 0.0], [0.0, 4.0, 1.0, 2.0, 3.0]]
_CLOSE = [[0.31, 0.70014, 0.34, 0.70012, -1.0], [1.0004, 1.0, 1.0, 1.0009, 0.9998], [0.2, 0.2003, 0.16, 0.24, 0.16]]
"""Scores that differ by 0.08 to 0.00002, some of them tied: what rounding makes equal."""


def _tied(seed: int) -> tuple[Tensor, Tensor]:
    """log ref and scores of three prompts, five responses each; two prompts have ties."""
    return normal(3, 5, seed=seed).log_softmax(-1), tensor(_TIED)


def _close(seed: int) -> tuple[Tensor, Tensor]:
    """The same with scores that lie close together."""
    return normal(3, 5, seed=seed).log_softmax(-1), tensor(_CLOSE)


def _rare_worst() -> tuple[Tensor, Tensor]:
    """log ref and scores of one prompt; the first response is the worst, and ref writes it once in 250 draws."""
    return tensor([[0.004, 0.25, 0.3, 0.246, 0.2]]).log(), tensor([[-2.0, 0.5, 1.5, 0.5, 0.0]])


def _draws(count: int, n: int) -> Tensor:
    """All tuples of n responses, one a row."""
    return torch.cartesian_prod(*[torch.arange(count)] * n).reshape(-1, n)


def _by_tuples(ref_logprobs: Tensor, scores: Tensor, n: int) -> Tensor:
    """Probabilities of the winner by a list of all n-tuples; among tied draws the first is taken."""
    rows = []
    for q, s in zip(ref_logprobs.double().exp(), scores, strict=True):
        draws = _draws(len(q), n)
        winner = draws.gather(1, s[draws].argmax(1, keepdim=True))[:, 0]
        rows.append(torch.zeros_like(q).index_add(0, winner, q[draws].prod(1)))
    return torch.stack(rows)


def _log_law(f: Any, ref: Tensor, scores: Tensor, n: int) -> Tensor:
    """The answer, (P, N)."""
    got = as_tensor(f(ref.clone(), scores.clone(), n), "log-probabilities")
    expect_shape(got, tuple(ref.shape), "log-probabilities")
    require(not torch.isnan(got).any(), f"log-probabilities: got {show(got)}, with nan among them")
    return got


def _law(f: Any, ref: Tensor, scores: Tensor, n: int) -> Tensor:
    """The answer as probabilities, (P, N)."""
    return _log_law(f, ref, scores, n).exp()


def _of_the_rare_worst(f: Any) -> float | str:
    """Log-probability of the rare worst response among 10 draws, or "floored" for any floor from e^-50 to e^-9."""
    got = float(as_tensor(f(*_rare_worst(), 10), "probe")[0, 0])
    return "floored" if -50 < got < -9 else got


bn = Question(
    id="best_of_n",
    title="the distribution of the best of n draws",
    chapter=9,
    kind="function",
    theory=False,
    variable="best_of_n",
    reference=best_of_n,
    reference_source=source(best_of_n),
    hints=(
        "When is the best score of n draws at most s? And when is it exactly s?",
        "With F = P(score <= s) and G = P(score < s) under the reference, the best score is s with probability "
        "F^n - G^n. Which response with that score wins? All its draws come from the reference.",
        "log(ref) + log((F^n - G^n) / (F - G)), with F and G at the response's own score.",
    ),
    explanation="All n draws score at most s with probability F^n, all of them less with probability G^n, so the best score "
    "is s with probability F^n - G^n. Given that, the winner is a draw from the reference among the responses that score s, "
    "which together have the probability F - G: each gets its part ref/(F - G). Only the order of the scores matters: best-of-n "
    "cannot tell a response that is a little better from one that is much better. Nothing is returned that the reference "
    "does not write, but not as often as the reference writes it: for ref = (.5, .3, .2) and scores (0, 1, 1) the "
    "best of 2 has the law (.25, .45, .30), the best of 64 practically (0, .6, .4).",
    probes=lambda f: [
        *(
            as_tensor(f(ref, scores, n), "probe").exp()
            for (ref, scores), n in (
                (_tied(1), 2),
                (_tied(2), 5),
                ((normal(2, 4, seed=3).log_softmax(-1), normal(2, 4, seed=4)), 3),
                ((_close(5)[0][:1], _close(5)[1][:1]), 3),
            )
        ),
        _of_the_rare_worst(f),
    ],
)


@bn.case("one draw is the reference, and every row sums to 1", 1, "put n = 1 into your formula, then add up n = 4")
def _(f: Any) -> None:
    ref, scores = _tied(11)
    expect_close(_law(f, ref, scores, 1), ref.exp(), "probabilities, n = 1", rtol=1e-3)
    expect_close(_law(f, ref, scores, 4).sum(-1), torch.ones(3), "sums of the rows, n = 4", rtol=1e-3)


@bn.case("the best score is at most s with probability F(s)^n", 2, "all n draws must score at most s")
def _(f: Any) -> None:
    for seed, n in ((14, 3), (15, 7)):
        ref, scores = _tied(seed)
        got = _law(f, ref, scores, n)
        at_most = (scores[:, None, :] <= scores[:, :, None]).double()
        want = (at_most * ref.double().exp()[:, None, :]).sum(-1) ** n
        have = (at_most * got[:, None, :]).sum(-1)
        expect_close(have, want, f"probability of at most the response's score, n = {n}", rtol=1e-3, atol=1e-4)
    ref, scores = _rare_worst()
    for n in (4, 10):
        got, want = _log_law(f, ref, scores, n)[0, 0], n * ref[0, 0]
        expect_close(got, want, f"log-probability of a rare worst response, n = {n}", rtol=0, atol=0.01)


@bn.case("tied responses keep the proportions of the reference", 1, "who writes the responses that tie?")
def _(f: Any) -> None:
    ref, scores = _tied(17)
    got = _law(f, ref, scores, 4)
    require(got.sum() > 0.1, f"probabilities: got {show(got)}")
    for row, (i, j) in ((0, (1, 3)), (0, (0, 4)), (1, (0, 2)), (1, (2, 3))):
        want = (ref[row, i] - ref[row, j]).exp()
        expect_close(got[row, i] / got[row, j], want, "quotient of the probabilities of two tied responses", rtol=1e-3)
    distinct = _law(f, ref[2:], scores[2:], 4) / ref[2:].exp()
    order = scores[2].argsort()
    require(
        bool((distinct[0, order].diff() > 0).all()),
        f"without ties a better response must gain more over the reference: got factors {show(distinct[0])}",
    )


@bn.case("equals a list of all n-tuples, with ties", 2, "list all pairs of draws of three responses by hand")
def _(f: Any) -> None:
    for world, told in ((_tied, ""), (_close, ", with scores that lie close together")):
        for seed, n in ((20, 2), (21, 3), (22, 4)):
            ref, scores = world(seed)
            want = _by_tuples(ref, scores, n).log()
            got = _log_law(f, ref, scores, n)
            expect_close(got, want, f"log-probabilities, n = {n}{told}", rtol=1e-3, atol=1e-3)


def _levels(ref: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """ref, F and G, all (P, N)."""
    q = ref.exp()
    less_or_equal, less = (
        (q[:, None, :] * compare(scores[:, None, :], scores[:, :, None])).sum(-1) for compare in (torch.le, torch.lt)
    )
    return q, less_or_equal, less


def _from_levels(
    rule: Callable[[Tensor, Tensor, Tensor, int], Tensor], normalise: bool = False
) -> Callable[..., Tensor]:
    """log of rule(ref, F, G, n)."""

    def f(ref: Tensor, scores: Tensor, n: int) -> Tensor:
        p = rule(*_levels(ref, scores), n)
        return (p / p.sum(-1, keepdim=True) if normalise else p).log()

    return f


def _in_sort_order(ref: Tensor, scores: Tensor, n: int) -> Tensor:
    ordered = scores.sort(dim=-1, stable=True).indices
    up_to = ref.exp().gather(-1, ordered).cumsum(-1)
    wins = up_to**n - torch.nn.functional.pad(up_to[:, :-1], (1, 0)) ** n
    return torch.zeros_like(wins).scatter(-1, ordered, wins).log()


def _equal_shares(ref: Tensor, scores: Tensor, n: int) -> Tensor:
    _, at_most, below = _levels(ref, scores)
    tied = (scores[:, None, :] == scores[:, :, None]).sum(-1)
    return ((at_most**n - below**n) / tied).log()


def _rounded(f: Callable[..., Any], digits: int) -> Callable[..., Any]:
    """f of the scores with so many digits after the point."""
    return lambda ref, scores, n: f(ref, (scores * 10**digits).round() / 10**digits, n)


def _over_the_table(ref: Tensor, scores: Tensor, n: int) -> Tensor:
    flat = (ref - math.log(len(ref))).reshape(1, -1)
    return best_of_n(flat, scores.reshape(1, -1), n).reshape(ref.shape)


bn.plant(
    (
        "unchanged",
        "best-of-n returns only what the reference writes, but not as often as the reference writes it: good responses gain",
        lambda ref, s, n: ref,
        "W-OO-4",
    ),
    (
        "in-sort-order",
        "you took differences of powers in sort order: of two tied responses the one sorted last then gets more than its share",
        _in_sort_order,
        "common",
    ),
    (
        "ties-counted-twice",
        "F^n - G^n belongs to all responses with this score together: they have to share it",
        _from_levels(lambda q, hi, lo, n: hi**n - lo**n),
        "common",
    ),
    (
        "equal-shares",
        "tied responses share in proportion to the reference, not equally: the winner is one of its draws",
        _equal_shares,
        "common",
    ),
    (
        "density",
        "n ref F^(n-1) is right for a continuous score; here several draws may have the same score",
        _from_levels(lambda q, hi, lo, n: n * q * hi ** (n - 1)),
        "common",
    ),
    (
        "density-normalised",
        "n ref F^(n-1) is right for a continuous score only, and dividing by the sum does not repair it",
        _from_levels(lambda q, hi, lo, n: q * hi ** (n - 1), normalise=True),
        "common",
    ),
    (
        "others-strictly-below",
        "you let a response win only if the other n - 1 draws score less; they may be the same response again",
        _from_levels(lambda q, hi, lo, n: n * q * lo ** (n - 1)),
        "common",
    ),
    (
        "cumulative",
        "F^n is the probability of a best score of at most s; subtract the probability of less than s",
        _from_levels(lambda q, hi, lo, n: hi**n),
        "common",
    ),
    ("one-draw-less", "you have the best of n - 1 draws", lambda ref, s, n: best_of_n(ref, s, n - 1), "common"),
    ("one-draw-more", "you have the best of n + 1 draws", lambda ref, s, n: best_of_n(ref, s, n + 1), "common"),
    ("worst", "this is the worst of n", lambda ref, s, n: best_of_n(ref, -s, n), "common"),
    (
        "tilt",
        "this is ref exp(n score) / Z: best-of-n sees only the order of the scores",
        lambda ref, s, n: (ref + n * s).log_softmax(-1),
        "common",
    ),
    (
        "power-of-the-reference",
        "ref^n is the probability that all n draws are the same response; the scores are missing",
        lambda ref, s, n: (n * ref).log_softmax(-1),
        "common",
    ),
    (
        "appears",
        "1 - (1 - ref)^n is the probability that the response is among the draws, best or not",
        lambda ref, s, n: (1 - (1 - ref.exp()) ** n).log(),
        "common",
    ),
    (
        "best-only",
        "you put everything on the best response, which is the limit of many draws",
        lambda ref, s, n: torch.where(s == s.max(-1, keepdim=True).values, ref, ref - torch.inf).log_softmax(-1),
        "common",
    ),
    (
        "uniform",
        "the reference is missing: you drew every response with the same probability",
        lambda ref, s, n: best_of_n(torch.zeros_like(ref).log_softmax(-1), s, n),
        "common",
    ),
    ("probabilities", "log-probabilities are asked for", lambda ref, s, n: best_of_n(ref, s, n).exp(), "common"),
    (
        "over-the-table",
        "you compared the responses of all prompts with each other: every prompt has its own n draws",
        _over_the_table,
        "common",
    ),
    (
        "rounded-to-0.1",
        "you rounded the scores to 0.1: 0.31 and 0.34 do not tie, only equal scores do",
        _rounded(best_of_n, 1),
        "common",
    ),
    (
        "rounded-to-0.001",
        "you rounded the scores, to 0.01 or finer: scores that differ by 0.0001 do not tie, the higher one wins",
        _rounded(best_of_n, 3),
        "common",
    ),
    (
        "floored",
        "you put a floor under the probabilities before the logarithm: a rare worst response may have e^-55 and must keep it",
        lambda ref, s, n: (best_of_n(ref, s, n).exp() + 1e-6).log(),
        "common",
    ),
)


def _by_sum_of_powers(ref_logprobs: Tensor, scores: Tensor, n: int) -> Tensor:
    _, hi, lo = _levels(ref_logprobs.double(), scores)
    powers = torch.stack([hi ** (n - 1 - k) * lo**k for k in range(n)]).sum(0)
    return ref_logprobs + powers.log()


def _by_score_levels(ref_logprobs: Tensor, scores: Tensor, n: int) -> Any:
    rows = []
    for lq, s in zip(ref_logprobs.double().numpy(), scores.numpy(), strict=True):
        levels, which = np.unique(s, return_inverse=True)
        mass = np.bincount(which, np.exp(lq), len(levels))
        upper = np.cumsum(mass)
        share = (upper**n - (upper - mass) ** n) / mass
        rows.append((lq + np.log(share)[which]).tolist())
    return rows


def _by_counting_ties(ref_logprobs: Tensor, scores: Tensor, n: int) -> Tensor:
    """k of the n draws have the response's score, the rest less."""
    q, hi, lo = _levels(ref_logprobs, scores)
    level = hi - lo
    total = sum(math.comb(n, k) * level**k * lo ** (n - k) for k in range(1, n + 1))
    return torch.log(torch.as_tensor(total) * q / level)


def _by_logsumexp(ref_logprobs: Tensor, scores: Tensor, n: int) -> Tensor:
    """log F and log G from logsumexp, log(F^n - G^n) and log(F - G) from their difference, all in float32."""
    terms = ref_logprobs.float()[:, None, :].expand(-1, scores.shape[-1], -1)
    log_f, log_g = (
        torch.where(compare(scores[:, None, :], scores[:, :, None]), terms, -torch.inf).logsumexp(-1)
        for compare in (torch.le, torch.lt)
    )
    gap = log_g - log_f
    return ref_logprobs + (n - 1) * log_f + torch.log1p(-(n * gap).exp()) - torch.log1p(-gap.exp())


def _by_loops(ref_logprobs: Tensor, scores: Tensor, n: int) -> list[list[float]]:
    table = []
    for lq, s in zip(ref_logprobs.tolist(), scores.tolist(), strict=True):
        row = []
        for lp, score in zip(lq, s, strict=True):
            level = sum(math.exp(x) for x, other in zip(lq, s, strict=True) if other == score)
            below = sum(math.exp(x) for x, other in zip(lq, s, strict=True) if other < score)
            row.append(lp + math.log(((level + below) ** n - below**n) / level))
        table.append(row)
    return table


def _by_survival(ref_logprobs: Tensor, scores: Tensor, n: int) -> Tensor:
    """F and G as 1 minus what lies above, float32."""
    q, above = ref_logprobs.float().exp(), scores[:, None, :] > scores[:, :, None]
    level = (q[:, None, :] * (scores[:, None, :] == scores[:, :, None])).sum(-1)
    at_most = 1 - (q[:, None, :] * above).sum(-1)
    return ((at_most**n - (at_most - level).clamp(min=0) ** n) * q / level).log()


bn.right("a sum of powers, float64", _by_sum_of_powers)
bn.right("levels of the score, numpy, lists", _by_score_levels)
bn.right("how many of the n draws tie", _by_counting_ties)
bn.right("float32, differences of logsumexp", _by_logsumexp)
bn.right("float32, one minus what is better", _by_survival)
bn.right("loops over the responses, lists", _by_loops)
bn.right("three decimals", lambda ref, s, n: best_of_n(ref.double(), s, n).mul(1000).round() / 1000)


# -- its divergence --------------------------------------------------------------------------------------


def bon_kl(n, responses):  # type: ignore[no-untyped-def]
    """KL(best-of-n || ref), nats, for equally likely responses with different scores. Int, int -> number."""
    wins = [(k**n - (k - 1) ** n) / responses**n for k in range(1, responses + 1)]
    return sum(p * math.log(responses * p) for p in wins if p > 0)


def _divergence(f: Any, n: int, responses: int) -> float:
    got = as_tensor(f(n, responses), "KL")
    expect_shape(got, (), "KL")
    require(torch.isfinite(got), f"KL for n = {n}, {responses} responses: got {show(got)}, which is not finite")
    return float(got)


def _bound(n: int) -> float:
    return math.log(n) - 1 + 1 / n


bk = Question(
    id="bon_kl",
    title="how far best-of-n is from the reference",
    chapter=9,
    kind="symbolic",
    theory=True,
    variable="bon_kl",
    reference=bon_kl,
    reference_source=source(bon_kl),
    hints=(
        "With two responses, how large can the divergence from the reference get at all?",
        "Number the responses from the worst, 1, to the best, M. The k-th wins if all draws are among the first k, but not all among the "
        "first k - 1.",
        "The sum over k of p_k log(M p_k), with p_k = (k^n - (k - 1)^n) / M^n and M the number of responses.",
    ),
    explanation="The k-th worst of M responses wins with p_k = (k^n - (k - 1)^n) / M^n, against 1/M under the reference. As M grows the sum "
    "becomes an integral, with the value log n - (n - 1)/n; for every finite M the divergence is smaller. No policy over M equally likely "
    "responses can be further than log M from the reference, so for M = 2 it levels off at 0.693 while the formula goes on: for n = 64 it gives 3.175. "
    "The formula is an upper bound for every reference and every score, ties included; a plot with it on the axis shows "
    "best-of-n further from the reference than it is. For M = 10 and n = 2, 4, 16, 64 the divergence is 0.189, 0.629, 1.733, 2.293, the bound "
    "0.193, 0.636, 1.835, 3.175.",
    probes=lambda f: [float(as_tensor(f(n, m), "probe")) for n, m in ((3, 4), (2, 10), (8, 5), (30, 3), (12, 40))],
)


@bk.case("two responses: what a coin with weight 2^-n misses of log 2", 1, "when does the worse one win?")
def _(f: Any) -> None:
    for n in (2, 4, 16):
        worse = 0.5**n
        entropy = -worse * math.log(worse) - (1 - worse) * math.log(1 - worse)
        expect_close(_divergence(f, n, 2), math.log(2) - entropy, f"KL for n = {n}, 2 responses", rtol=3e-3, atol=6e-4)


@bk.case("0 for one draw, log M in the limit of many draws", 1, "the best of M responses wins in the end")
def _(f: Any) -> None:
    for responses in (1, 3, 20):
        expect_close(_divergence(f, 1, responses), 0.0, f"KL for n = 1, {responses} responses", atol=6e-4)
    for n, responses in ((40, 2), (60, 3)):
        expect_close(
            _divergence(f, n, responses), math.log(responses), f"KL for n = {n}, {responses} responses", rtol=2e-3
        )


@bk.case("below log n - (n-1)/n, and towards it with more responses", 1, "a bound: when is it reached?")
def _(f: Any) -> None:
    for n in (2, 4):
        few, more, many = (_divergence(f, n, responses) for responses in (2, 8, 1000))
        told = f"KL for n = {n} and 2, 8, 1000 responses: got {few:.4f}, {more:.4f}, {many:.4f}"
        require(few + 0.03 < more < many - 5e-4, f"{told}, expected numbers that clearly grow")
        expect_close(many, _bound(n), f"KL for n = {n}, 1000 responses", rtol=3e-3)


@bk.case("equals a list of all n-tuples", 2, "count how often each response wins, then sum p log(p / (1/M))")
def _(f: Any) -> None:
    for n, responses in ((2, 3), (3, 4), (4, 5), (6, 3)):
        best = _draws(responses, n).max(1).values
        p = torch.bincount(best, minlength=responses).double() / responses**n
        want = (p * (responses * p).log()).sum()
        expect_close(_divergence(f, n, responses), want, f"KL for n = {n}, {responses} responses", rtol=3e-3, atol=6e-4)


def _wins(n: int, m: int) -> list[float]:
    return [(k / m) ** n - ((k - 1) / m) ** n for k in range(1, m + 1)]


bk.plant(
    (
        "bound",
        "log n - (n - 1)/n is an upper bound, reached with infinitely many responses only",
        lambda n, m: _bound(n),
        "W-OO-1",
    ),
    (
        "smaller-of-two-bounds",
        "log n - (n - 1)/n and log M are both upper bounds; the smaller of them is not yet the divergence",
        lambda n, m: min(_bound(n), math.log(m)),
        "W-OO-1",
    ),
    ("log-n", "log n is an upper bound that is never reached for n > 1", lambda n, m: math.log(n), "common"),
    (
        "smaller-logarithm",
        "log n and log M are both upper bounds; the smaller of them is not the divergence",
        lambda n, m: math.log(min(n, m)),
        "common",
    ),
    ("log-m", "log M is what many draws lead to", lambda n, m: math.log(m), "common"),
    (
        "sign-of-the-bound",
        "the sign of (n - 1)/n, and this is only the limit of many responses",
        lambda n, m: math.log(n) + 1 - 1 / n,
        "common",
    ),
    ("win-rate", "n/(n + 1) is a win rate, not a divergence", lambda n, m: n / (n + 1), "common"),
    (
        "other-direction",
        "this is KL(ref || best-of-n); best-of-n writes the responses over which the mean is taken",
        lambda n, m: -sum(math.log(m * p) for p in _wins(n, m)) / m,
        "common",
    ),
    (
        "entropy",
        "this is the entropy of best-of-n; the divergence is log M minus it",
        lambda n, m: -sum(p * math.log(p) for p in _wins(n, m)),
        "common",
    ),
    (
        "no-reference",
        "the reference's 1/M is missing: this is minus the entropy of best-of-n",
        lambda n, m: sum(p * math.log(p) for p in _wins(n, m)),
        "common",
    ),
    (
        "bits",
        "this is in bits; nats are asked for",
        lambda n, m: bon_kl(n, m) / math.log(2),
        "common",
    ),
    (
        "density",
        "n (k/M)^(n-1) / M is the density of a continuous score; here probabilities are differences of powers",
        lambda n, m: sum(p * math.log(m * p) for k in range(1, m + 1) if (p := n * (k / m) ** (n - 1) / m) > 0),
        "common",
    ),
    ("one-draw-less", "you have the best of n - 1 draws", lambda n, m: bon_kl(n - 1, m) if n > 1 else 0.0, "common"),
    (
        "without-replacement",
        "you drew without replacement; the n draws are independent and may repeat a response",
        lambda n, m: sum(
            p * math.log(m * p)
            for k in range(1, m + 1)
            if (p := math.comb(k - 1, min(n, m) - 1) / math.comb(m, min(n, m)))
        ),
        "common",
    ),
    (
        "best-term-only",
        "you have the term of the best response only; the others are less likely than before, and their terms count, too",
        lambda n, m: _wins(n, m)[-1] * math.log(m * _wins(n, m)[-1]),
        "common",
    ),
)


def _kl_by_torch(n: int, responses: int) -> Tensor:
    upper = torch.linspace(0, 1, responses + 1, dtype=torch.float64) ** n
    return math.log(responses) - torch.special.entr(upper.diff()).sum()


bk.right("log M minus the entropy, torch", _kl_by_torch)
bk.right("float32 numpy", lambda n, m: (p := np.diff((np.arange(m + 1, dtype=np.float32) / m) ** n)) @ np.log(p * m))
bk.right("four decimals", lambda n, m: round(bon_kl(n, m), 4))


# -- its win rate ----------------------------------------------------------------------------------------


def bon_win_rate(ref, scores, n):  # type: ignore[no-untyped-def]
    """Win rate of best-of-n against one draw of the reference, ties counted one half. (N,), (N,), int -> number."""
    at_most = (ref * (scores <= scores[:, None])).sum(-1)
    below = (ref * (scores < scores[:, None])).sum(-1)
    wins = ref * (at_most**n - below**n) / (at_most - below)
    return (wins * (at_most + below) / 2).sum()


def _rate(f: Any, ref: Tensor, scores: Tensor, n: int) -> Tensor:
    got = as_tensor(f(ref.clone(), scores.clone(), n), "win rate")
    expect_shape(got, (), "win rate")
    return got


def _list_of_games(ref: Tensor, scores: Tensor, n: int) -> float:
    """All tuples of n draws and one opponent."""
    games = _draws(len(ref), n + 1)
    best, other = scores[games[:, :n]].max(1).values, scores[games[:, n]]
    points = (best > other).double() + 0.5 * (best == other)
    return float((ref.double()[games].prod(1) * points).sum())


bw = Question(
    id="bon_win_rate",
    title="how often best-of-n beats the reference",
    chapter=9,
    kind="symbolic",
    theory=True,
    variable="bon_win_rate",
    reference=bon_win_rate,
    reference_source=source(bon_win_rate),
    hints=(
        "Let all responses have the same score. What must the win rate be?",
        "Go through the levels of the score: with which probability does the best of n have this score, and with which does "
        "one draw have less, or the same?",
        "The sum over the different scores of (F^n - G^n) (F + G) / 2, with F = P(score <= s), G = P(score < s).",
    ),
    explanation="The best of n has the score s with probability F^n - G^n; one draw has less with probability G and the same with probability "
    "F - G, of which one half counts: G + (F - G)/2 = (F + G)/2. If no two draws ever tie, the one opponent is the best of all n + 1 draws with "
    "probability 1/(n + 1), and the rate is n/(n + 1). With ties counted one half it is never higher, and for two equally likely "
    "responses with different scores it is at most 0.75; with ties counted as wins it is never lower. For ten equally likely responses with "
    "different scores and n = 4 the three rules give 0.797 (one half), 0.847 (wins) and 0.747 (losses), against 4/5. A reported win rate means "
    "little without its rule for ties.",
    probes=lambda f: [
        *(f(normal(5, seed=i).softmax(0), tensor(_TIED[i % 3]), n) for i, n in ((0, 2), (1, 4), (2, 3), (3, 7))),
        f(normal(5, seed=5).softmax(0), tensor(_CLOSE[0]), 3),
        _where_all_tie(f),
    ],
)


def _number(f: Any, *args: Any) -> float:
    """What f gives, nan if it raises or gives no number."""
    try:
        return float(as_tensor(f(*args), "probe"))
    except Exception:
        return math.nan


def _where_all_tie(f: Any) -> str:
    """Two classes, since answers that divide 0 by 0 here give nan, raise, or give what they were patched with."""
    rate = _number(f, tensor([0.5, 0.25, 0.125, 0.0625, 0.0625]), torch.ones(5), 3)
    return "one half" if abs(rate - 0.5) < 1e-3 else "not one half"


@bw.case("one half for one draw, and wherever all scores are equal", 1, "the two sides are alike")
def _(f: Any) -> None:
    for seed in (1, 2):
        ref = normal(5, seed=seed).softmax(0)
        expect_close(_rate(f, ref, tensor(_TIED[seed]), 1), 0.5, "win rate, n = 1", rtol=2e-3)
        expect_close(_rate(f, ref, torch.full((5,), 3.0), 6), 0.5, "win rate with equal scores, n = 6", rtol=2e-3)


@bw.case("below n/(n + 1), which 500 different scores nearly reach", 1, "with few responses many games are ties")
def _(f: Any) -> None:
    fine = torch.full((500,), 0.002)
    for n in (2, 5):
        for count in (2, 3):
            rate = _rate(f, torch.full((count,), 1 / count), torch.arange(float(count)), n)
            told = f"win rate for {count} equally likely responses with different scores, n = {n}: got {rate:.4f}"
            bounds = f"more than 1/2, and strictly below n/(n + 1) = {n / (n + 1):.4f}, since equal draws occur"
            require(0.5 < rate < n / (n + 1) - 1e-6, f"{told}, expected {bounds}")
        expect_close(
            _rate(f, fine, torch.arange(500.0), n), n / (n + 1), f"win rate for 500 responses, n = {n}", rtol=1e-3
        )


@bw.case("two levels, the worse one with probability p: 1/2 + (p - p^n)/2", 1, "write out the four kinds of games")
def _(f: Any) -> None:
    """The worse level is split between two tied responses."""
    for p, n in ((0.5, 2), (0.9, 8), (0.2, 3)):
        ref, scores = tensor([p / 4, 1 - p, 3 * p / 4]), tensor([0.0, 7.0, 0.0])
        want = 0.5 + (p - p**n) / 2
        expect_close(_rate(f, ref, scores, n), want, f"win rate, worse level {p:g}, n = {n}", rtol=2e-3)


@bw.case("equals a list of all games, with ties", 2, "n draws and one opponent: n + 1 independent responses")
def _(f: Any) -> None:
    for table, told in ((_TIED, ""), (_CLOSE, ", with scores that lie close together")):
        for seed, n in ((10, 2), (11, 3), (12, 3), (13, 4)):
            ref, scores = normal(5, seed=seed).softmax(0), tensor(table[seed % 3])
            want = _list_of_games(ref, scores, n)
            expect_close(_rate(f, ref, scores, n), want, f"win rate, n = {n}{told}", rtol=2e-3)


def _score_levels(ref: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """F and G of every different score, ascending."""
    levels = scores.unique()
    mass = (ref * (scores == levels[:, None])).sum(-1)
    return mass.cumsum(0), mass.cumsum(0) - mass


def _rate_with(rule: Callable[[Tensor, Tensor, int], Tensor]) -> Callable[..., Any]:
    def f(ref: Tensor, scores: Tensor, n: int) -> Tensor:
        hi, lo = _score_levels(ref, scores)
        return ((hi**n - lo**n) * rule(hi, lo, n)).sum()

    return f


def _ties_left_out(ref: Tensor, scores: Tensor, n: int) -> Tensor:
    hi, lo = _score_levels(ref, scores)
    level = hi**n - lo**n
    won, lost = (level * lo).sum(), (level * (1 - hi)).sum()
    return won / (won + lost)


def _in_order(ref: Tensor, scores: Tensor, n: int, first_wins: bool) -> Tensor:
    """Every response is a level of its own; of tied ones the last wins, or the first."""
    order = scores.sort(stable=True, descending=first_wins).indices
    q = ref[order.flip(0) if first_wins else order]
    hi = q.cumsum(0)
    return ((hi**n - (hi - q) ** n) * (hi - q / 2)).sum()


def _sigmoid_of_gap(ref: Tensor, scores: Tensor, n: int) -> Tensor:
    wins = best_of_n(ref.log()[None], scores[None], n)[0].exp()
    return ((wins - ref) * scores).sum().sigmoid()


def _bradley_terry(ref: Tensor, scores: Tensor, n: int) -> Tensor:
    wins = best_of_n(ref.log()[None], scores[None], n)[0].exp()
    return wins @ (scores[:, None] - scores).sigmoid() @ ref


def _tilted(ref: Tensor, scores: Tensor, n: int) -> Tensor:
    hi, lo = (x.clamp(0, 1) for x in _levels(ref.log()[None], scores[None])[1:])
    return ((ref.log() + n * scores).softmax(0) * (hi + lo)[0] / 2).sum()


def _against_the_median(ref: Tensor, scores: Tensor, n: int) -> Tensor:
    hi, lo = _score_levels(ref, scores)
    return 1 - lo[(hi > 0.5).int().argmax()] ** n


bw.plant(
    (
        "n-over-n-plus-1",
        "n/(n + 1) holds only if no two draws ever tie; with ties counted one half it is an upper bound",
        lambda ref, s, n: n / (n + 1),
        "W-OO-2",
    ),
    (
        "n-over-n-plus-1-unless-all-tie",
        "n/(n + 1) is an upper bound as soon as two draws can tie, which the same response drawn twice does",
        lambda ref, s, n: n / (n + 1) if len(s.unique()) > 1 else 0.5,
        "W-OO-2",
    ),
    (
        "ties-as-wins",
        "you counted ties as wins; that gives more than one half for one draw",
        _rate_with(lambda hi, lo, n: hi),
        "W-OO-2",
    ),
    ("ties-as-losses", "you counted ties as losses", _rate_with(lambda hi, lo, n: lo), "common"),
    (
        "ties-left-out",
        "you left ties out of the count; they count one half",
        lambda ref, s, n: _ties_left_out(ref, s, n) if len(s.unique()) > 1 else 0.5,
        "common",
    ),
    (
        "ties-left-out-0-by-0",
        "you left ties out of the count, and where all scores are equal no game is left to divide by; ties count one half",
        _ties_left_out,
        "common",
    ),
    (
        "sort-and-cumsum",
        "you took sums in sort order, so that of two tied responses the one sorted last beats the other: add up whole levels of the score",
        lambda ref, s, n: _in_order(ref, s, n, first_wins=False),
        "common",
    ),
    (
        "sort-and-cumsum-downwards",
        "you took sums in falling sort order, so that of two tied responses the first beats the other: add up whole levels of the score",
        lambda ref, s, n: _in_order(ref, s, n, first_wins=True),
        "common",
    ),
    (
        "rounded-to-0.1",
        "you rounded the scores to 0.1: a game between 0.31 and 0.34 is no tie",
        _rounded(bon_win_rate, 1),
        "common",
    ),
    (
        "rounded-to-0.001",
        "you rounded the scores, to 0.01 or finer: a game between scores that differ by 0.0001 is won by the higher one",
        _rounded(bon_win_rate, 3),
        "common",
    ),
    (
        "one-of-n",
        "1 - 2^-n: the n draws do not play n games with n opponents, but one game with one opponent",
        lambda ref, s, n: 1 - 0.5**n,
        "common",
    ),
    (
        "games-of-the-draws",
        "the games of the n draws are not independent: they all meet the same opponent",
        _rate_with(lambda hi, lo, n: 1 - (1 - (hi + lo) / 2) ** n),
        "common",
    ),
    (
        "opponent-among-the-draws",
        "the opponent is an (n + 1)-th draw, not one of the n",
        _rate_with(lambda hi, lo, n: 1 - (hi - lo + 1 - hi) / n),
        "common",
    ),
    ("one-draw-less", "you have the best of n - 1 draws", lambda ref, s, n: bon_win_rate(ref, s, n - 1), "common"),
    (
        "against-best-of-n",
        "the opponent is one draw, not a best-of-n as well: two equal sides always come out at one half",
        lambda ref, s, n: 0.5,
        "common",
    ),
    ("loss-rate", "this is how often best-of-n loses", lambda ref, s, n: 1 - bon_win_rate(ref, s, n), "common"),
    (
        "uniform",
        "the reference is missing: you drew every response with the same probability",
        lambda ref, s, n: bon_win_rate(torch.full_like(ref, 1 / len(ref)), s, n),
        "common",
    ),
    (
        "bradley-terry",
        "the higher score wins always; you let it win with the Bradley-Terry probability",
        _bradley_terry,
        "common",
    ),
    (
        "sigmoid-of-the-mean-gap",
        "a sigmoid of the gain in mean score is no win rate: only the order of the scores matters",
        _sigmoid_of_gap,
        "common",
    ),
    (
        "tilt",
        "you took ref exp(n score) / Z for best-of-n, which sees only the order of the scores",
        _tilted,
        "common",
    ),
    (
        "median",
        "you have the probability that best-of-n beats the median of the reference, not a draw from it",
        _against_the_median,
        "common",
    ),
)


def _rate_by_loops(ref: Tensor, scores: Tensor, n: int) -> float:
    total = 0.0
    q, s = ref.tolist(), scores.tolist()
    for level in sorted(set(s)):
        below, same_score = (
            sum(p for p, x in zip(q, s, strict=True) if test(x, level)) for test in (float.__lt__, float.__eq__)
        )
        total += ((below + same_score) ** n - below**n) * (below + same_score / 2)
    return total


def _rate_by_matrix(ref: Tensor, scores: Tensor, n: int) -> Tensor:
    wins = best_of_n(ref.double().log()[None], scores[None], n)[0].exp()
    return wins @ ((scores[:, None] - scores).sign().double() + 1) @ ref.double() / 2


def _rate_by_runs(ref: Tensor, scores: Tensor, n: int) -> Tensor:
    """Sort and cumsum, in float32, read off at the end of every run of equal scores."""
    ordered, order = scores.sort()
    ends = ordered.unique_consecutive(return_counts=True)[1].cumsum(0) - 1
    hi = ref.float()[order].cumsum(0)[ends]
    lo = torch.nn.functional.pad(hi[:-1], (1, 0))
    return (hi**n - lo**n) @ (hi + lo) / 2


bw.right("loops over the levels", _rate_by_loops)
bw.right("a matrix of games, float64", _rate_by_matrix)
bw.right("float32, ends of the runs of equal scores", _rate_by_runs)
bw.right("four decimals", lambda ref, s, n: round(float(bon_win_rate(ref, s, n)), 4))
bw.right("three decimals", lambda ref, s, n: round(float(bon_win_rate(ref, s, n)), 3))


# -- an unbiased estimate from a pool --------------------------------------------------------------------


def unbiased_bon(scores, n):  # type: ignore[no-untyped-def]
    """Mean over all subsets of n of the m scores of their largest, 1 <= n <= m. (m,), int -> number."""
    m = len(scores)
    subsets = math.comb(m, n)
    weights = [math.comb(i - 1, n - 1) / subsets for i in range(1, m + 1)]
    return (scores.sort().values * torch.tensor(weights)).sum()


def _estimate(f: Any, pool: Tensor, n: int) -> Tensor:
    got = as_tensor(f(pool.clone(), n), "estimate")
    expect_shape(got, (), "estimate")
    require(torch.isfinite(got), f"estimate from {len(pool)} scores, n = {n}: got {show(got)}, which is not finite")
    return got


_POOL = [0.5, -1.0, 2.0, 0.5, 3.5, -0.2]


def _expect_repeatable(f: Any) -> None:
    """In front of every case, so that an answer that draws at random is not slowed down until it is stopped."""
    first, second = _estimate(f, tensor(_POOL), 3), _estimate(f, tensor(_POOL), 3)
    told = f"the same {len(_POOL)} scores gave two different estimates in two calls: the mean over all subsets is one number"
    require(abs(first - second) <= 1e-5 * (1 + abs(first)), told)


ub = Question(
    id="unbiased_bon",
    title="the score of best-of-n from a pool of samples",
    chapter=9,
    kind="function",
    theory=False,
    variable="unbiased_bon",
    reference=unbiased_bon,
    reference_source=source(unbiased_bon),
    hints=(
        "Any n of the m samples are n independent draws. How many such subsets are there, and which estimate uses them all?",
        "Sort the pool. The i-th smallest score is the largest of a subset if the other n - 1 members come from the i - 1 scores below it.",
        "The sum over i = 1..m of s_i C(i - 1, n - 1) / C(m, n), with s_1 <= ... <= s_m sorted.",
    ),
    explanation="Every subset of n is a set of n independent draws, so its largest score has the right mean, and so has the average over all C(m, n) of them, which "
    "uses the whole pool and does not depend on its order. The i-th smallest is the largest of C(i - 1, n - 1) subsets. Subsets that repeat a sample, "
    "as in drawing n from the pool with replacement, see the same sample twice where a new draw would have had another chance: on average they come out "
    "too low. The largest score of the whole pool is the best of m, not of n, and the largest of the first n throws the rest away. With a proxy, "
    "the subset is chosen by the proxy and its winner's gold score is averaged, with the same weights.",
    probes=lambda f: (
        ["right up to chance"]
        if _by_chance(f)
        else [
            f(tensor(_POOL), 3),
            f(normal(7, seed=1), 2),
            f(normal(9, seed=2), 4),
            f(normal(1100, seed=3), 550),
            _number(f, tensor([1.0, 1.0, 2.0]), 3),  # more draws than different scores
        ]
    ),
)


def _mean_over_subsets(pool: Tensor, n: int) -> float:
    return float(np.mean([max(subset) for subset in itertools.combinations(pool.tolist(), n)]))


def _by_chance(f: Any) -> bool:
    """Whether estimates are about right, but change with the call or, for a fixed seed, with the order of the pool."""
    changes = False
    for scores, n in (([0.0, 4.0, 1.0, 2.0], 2), ([3.0, 0.0, 1.0, 0.0, 1.0], 2), ([0.0, 0.0, 1.0, 0.0, 4.0], 3)):
        pool = tensor(scores)
        got = [_number(f, x, n) for x in (pool, pool.clone(), pool.flip(0))]
        if not all(abs(x - _mean_over_subsets(pool, n)) < 0.4 for x in got):
            return False
        changes |= max(got) - min(got) > 1e-4
    return changes


@ub.case("n = 1 is the mean of the pool, n = m its largest score", 1, "how many subsets are there in either case?")
def _(f: Any) -> None:
    _expect_repeatable(f)
    for seed, m in ((10, 4), (11, 7)):
        pool = normal(m, seed=seed) + 3
        expect_close(_estimate(f, pool, 1), pool.mean(), f"estimate from {m} scores, n = 1", rtol=1e-3)
        expect_close(_estimate(f, pool, m), pool.max(), f"estimate from {m} scores, n = {m}", rtol=1e-3)


@ub.case(
    "its mean over all pools is the expected score of best-of-n", 1, "unbiased: right on average for every m and n"
)
def _(f: Any) -> None:
    """Three responses, all pools of m independent draws from the reference."""
    _expect_repeatable(f)
    q, s = tensor([0.5, 0.3, 0.2], dtype=torch.float64), tensor([0.0, 1.0, 3.0])
    for m, n in ((3, 2), (4, 3), (4, 2)):
        pools, draws = _draws(3, m), _draws(3, n)
        want = (q[draws].prod(1) * s[draws].max(1).values).sum()
        got = torch.stack([_estimate(f, s[pool], n) for pool in pools])
        expect_close(q[pools].prod(1) @ got, want, f"mean estimate over all pools of {m}, n = {n}", rtol=1e-3)


@ub.case("equals the mean over all subsets of n, in whatever order the pool comes", 2, "list the subsets of 4 scores")
def _(f: Any) -> None:
    _expect_repeatable(f)
    for pool, n in ((tensor(_POOL), 2), (tensor(_POOL).flip(0), 4), (normal(7, seed=14) - 2, 3)):
        told = f"estimate from the pool {show(pool)}, n = {n}"
        expect_close(_estimate(f, pool, n), _mean_over_subsets(pool, n), told, rtol=1e-3)


@ub.case("finite for 1100 scores and n = 550", 1, "math.comb gives whole numbers of any size: divide them as they are")
def _(f: Any) -> None:
    """The largest score is in half of the subsets, the next in a good half of the rest, and so on."""
    _expect_repeatable(f)
    pool = normal(1100, seed=17)
    ordered, want, left = pool.double().sort(descending=True).values, 0.0, 1.0
    for j, score in enumerate(ordered[:60]):
        share = 550 / (1100 - j)  # of the subsets without the j largest
        want, left = want + left * share * float(score), left * (1 - share)
    expect_close(_estimate(f, pool, 550), want, "estimate from 1100 scores, n = 550", rtol=2e-3)


_comb = functools.cache(math.comb)


def _weighted(weight: Callable[[int, int, int], float]) -> Callable[[Tensor, int], Any]:
    """Sum over the sorted scores with weight(i, m, n)."""

    def f(pool: Tensor, n: int) -> Any:
        m = len(pool)
        weights = [weight(i, m, n) for i in range(1, m + 1)]
        return (pool.sort().values.double() * tensor(weights, dtype=torch.float64)).sum()

    return f


def _groups(pool: Tensor, n: int) -> Tensor:
    whole = len(pool) // n * n
    return pool[:whole].reshape(-1, n).max(1).values.mean()


def _windows(pool: Tensor, n: int) -> Tensor:
    return pool.unfold(0, n, 1).max(1).values.mean()


def _random_subsets(pool: Tensor, n: int) -> Tensor:
    """Mean over 2000 random subsets."""
    picked = torch.rand(2000, len(pool)).argsort(-1)[:, :n]
    return pool[picked].max(-1).values.mean()


def _float_binomials(i: int, m: int, n: int) -> float:
    try:
        return float(_comb(i - 1, n - 1)) / float(_comb(m, n))
    except OverflowError:
        return math.nan


ub.plant(
    (
        "first-n",
        "you used the first n samples only; any other n are as good",
        lambda pool, n: pool[:n].max(),
        "common",
    ),
    ("best-of-m", "the largest of the pool is the best of m, not of n", lambda pool, n: pool.max(), "common"),
    ("mean", "this is the mean score of one draw", lambda pool, n: pool.mean(), "common"),
    (
        "with-replacement",
        "you drew n from the pool with replacement: a sample seen twice is no new draw, and the estimate is too low on average",
        _weighted(lambda i, m, n: (i / m) ** n - ((i - 1) / m) ** n),
        "common",
    ),
    (
        "groups",
        "groups of n are right on average, but the answer depends on the order of the pool: average over all subsets",
        _groups,
        "common",
    ),
    (
        "windows",
        "neighbours in the pool are only some of the subsets, and the answer depends on the order: average over all",
        _windows,
        "common",
    ),
    (
        "mean-of-the-best-n",
        "the mean of the n largest scores is not a mean of largest scores",
        lambda pool, n: pool.sort().values[-n:].mean(),
        "common",
    ),
    (
        "worst",
        "you sorted downwards: this is the worst of n",
        _weighted(lambda i, m, n: _comb(m - i, n - 1) / _comb(m, n)),
        "common",
    ),
    (
        "unsorted",
        "sort the pool first: the weights belong to ranks",
        lambda pool, n: sum(float(s) * (_comb(i, n - 1) / _comb(len(pool), n)) for i, s in enumerate(pool)),
        "common",
    ),
    (
        "index-shifted",
        "the other n - 1 members come from the i - 1 scores below: C(i - 1, n - 1), not C(i, n)",
        _weighted(lambda i, m, n: _comb(i, n) / _comb(m, n)),
        "common",
    ),
    (
        "one-member-too-many",
        "C(i, n - 1) also counts subsets that contain the i-th score twice",
        _weighted(lambda i, m, n: _comb(i, n - 1) / _comb(m, n)),
        "common",
    ),
    (
        "other-total",
        "the weights do not sum to 1: there are C(m, n) subsets in all",
        _weighted(lambda i, m, n: _comb(i - 1, n - 1) / _comb(m - 1, n - 1)),
        "common",
    ),
    (
        "sum",
        "this is the sum over all subsets; divide by their number",
        _weighted(lambda i, m, n: float(min(_comb(i - 1, n - 1), 10**300))),
        "common",
    ),
    (
        "one-less",
        "you have subsets of n - 1",
        lambda pool, n: unbiased_bon(pool, n - 1) if n > 1 else pool.mean() * 0,
        "common",
    ),
    (
        "quantile",
        "the n/(n + 1) quantile is near the middle of the best of n, not its mean",
        lambda pool, n: pool.quantile(n / (n + 1)),
        "common",
    ),
    (
        "overflow",
        "the binomials are larger than the largest float: divide whole numbers, or use logarithms",
        _weighted(_float_binomials),
        "common",
    ),
    (
        "random-subsets",
        "you drew subsets at random: that is right up to chance only, and the exact mean over all subsets has a formula",
        _random_subsets,
        "common",
    ),
    (
        "set-of-scores",
        "you put the scores in a set, or took the unique ones: samples with equal scores are different samples, and all of them count",
        lambda pool, n: unbiased_bon(pool.unique(), n),
        "common",
    ),
    (
        "set-of-scores-total-of-the-pool",
        "you ranked the different scores only, with the C(m, n) of the whole pool: samples with equal scores need a rank each",
        lambda pool, n: sum(float(s) * (_comb(i, n - 1) / _comb(len(pool), n)) for i, s in enumerate(pool.unique())),
        "common",
    ),
)


def _drop_by_drop(scores: Tensor, n: int) -> float:
    """The largest is in n/m of the subsets; without it there are m - 1 scores left."""
    total, left, m = 0.0, 1.0, len(scores)
    for score in sorted(scores.tolist(), reverse=True):
        share = min(n / m, 1.0)
        total, left, m = total + left * share * score, left * (1 - share), m - 1
        if m < n:
            break
    return total


def _by_logarithms(scores: Tensor, n: int) -> Tensor:
    m = len(scores)
    i = torch.arange(n, m + 1, dtype=torch.float64)
    log_weights = i.lgamma() - (i - n + 1).lgamma() - math.lgamma(n)
    return (scores.double().sort().values[n - 1 :] * log_weights.softmax(0)).sum()


def _by_lgamma(scores: Tensor, n: int) -> Tensor:
    """log C(i - 1, n - 1) - log C(m, n) in double, the sum in float32."""

    def log_comb(k: int, r: int) -> float:
        return math.lgamma(k + 1) - math.lgamma(r + 1) - math.lgamma(k - r + 1)

    m = len(scores)
    weights = [math.exp(log_comb(i - 1, n - 1) - log_comb(m, n)) for i in range(n, m + 1)]
    return scores.float().sort().values[n - 1 :] @ tensor(weights)


def _up_the_ranks(scores: Tensor, n: int) -> float:
    """A loop from the n-th smallest score: from one rank to the next the weight grows by i / (i - n + 1)."""
    ordered = sorted(scores.tolist())
    m, total = len(ordered), Fraction(0)
    weight = Fraction(1, math.comb(m, n))
    for i in range(n, m + 1):
        total += weight * Fraction(ordered[i - 1])
        weight *= Fraction(i, i - n + 1)
    return float(total)


ub.right("float32, differences of lgamma", _by_lgamma)
ub.right("a loop over the ranks, fractions", _up_the_ranks)
ub.right("the largest, then the largest of the rest", _drop_by_drop)
ub.right("logarithms of binomials, numpy", lambda scores, n: np.float64(_by_logarithms(scores, n)))


# -- the gold score along the path of a proxy ------------------------------------------------------------


def frontier_gold(ref_logprobs, scores, betas, gold_scores):  # type: ignore[no-untyped-def]
    """KL and expected gold score of the policies that are optimal for `scores`. three (P, N) -> two (K, P)."""
    kl, gold = [], []
    for beta in betas:
        logprobs = (ref_logprobs + scores / beta).log_softmax(-1)
        kl.append((logprobs.exp() * (logprobs - ref_logprobs)).sum(-1))
        gold.append((logprobs.exp() * gold_scores).sum(-1))
    return torch.stack(kl), torch.stack(gold)


def _proxy_world(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """log ref, proxy, gold, all (3, 5); the proxy is the gold score and an error."""
    ref, gold, error = (normal(3, 5, seed=seed + i) for i in range(3))
    return ref.log_softmax(-1), gold + 0.8 * error, gold


def _path(f: Any, ref: Tensor, proxy: Tensor, betas: list[float], gold: Tensor) -> tuple[Tensor, Tensor]:
    got = f(ref.clone(), proxy.clone(), list(betas), gold.clone())
    kl, expected = unpack(got, 2, "frontier_gold returns (kl, gold)")
    kl, expected = as_tensor(kl, "kl"), as_tensor(expected, "gold")
    for x, what in ((kl, "kl"), (expected, "gold")):
        expect_shape(x, (len(betas), len(ref)), what)
        for row, beta in zip(x, betas, strict=True):
            require(torch.isfinite(row).all(), f"{what} at beta {beta:g}: got {show(row)}, which is not finite")
    return kl, expected


fg = Question(
    id="frontier_gold",
    title="the gold score along the path of a proxy",
    chapter=9,
    kind="function",
    theory=False,
    variable="frontier_gold",
    reference=frontier_gold,
    reference_source=source(frontier_gold),
    hints=(
        "Two scores, two tasks: which of them decides what the policy is, and which one judges it?",
        "The policy is ref exp(proxy/beta) / Z. Its divergence and its mean gold score are sums over the responses, weighted with the "
        "policy's own probabilities. exp(proxy/beta) overflows for a small beta; log_softmax does not.",
        "pi = ref exp(r/beta) / Z; kl = sum(pi log(pi/ref)), gold = sum(pi g), with r the proxy, g the gold score.",
    ),
    explanation="The proxy makes the policy, pi = ref exp(proxy/beta) / Z, and the gold score judges it. The proxy's own mean always rises as beta falls, "
    "since its derivative in 1/beta is the variance of the proxy. That of the gold score is the covariance of proxy and gold "
    "under pi: positive as long as the responses that the policy still writes are ordered alike by both, and negative once the "
    "proxy's error decides among those that are left. In the limit the policy writes the proxy's favourite, at KL = -log ref "
    "of it. A rising proxy score says nothing about which of the two is happening.",
    probes=lambda f: [
        [*unpack(f(ref, proxy, given, gold), 2, "probe"), "kept" if given == list(betas) else "changed"]
        for (ref, proxy, gold), betas in (
            (_proxy_world(1), (2.0, 0.5)),
            (_proxy_world(4), (3.0, 0.3, 1.0)),
            (_far_world(), (0.01,)),
            (_far_world(2.998), (1e-4,)),
        )
        for given in [list(betas)]
    ],
)


def _far_world(second: float = 2.9) -> tuple[Tensor, Tensor, Tensor]:
    """The proxy prefers the first response of each prompt, with the score 3, the gold score another one."""
    ref, _, gold = _proxy_world(30)
    return ref, tensor([[3.0, second, 0.0, -1.0, 2.0]] * 3), gold


def _expect_exact(kl: Tensor, expected: Tensor, world: tuple[Tensor, ...], beta: float, tolerance: float) -> None:
    """One row against sums over torch's own distributions, in double."""
    ref, proxy, gold = (x.double() for x in world)
    law, base = (torch.distributions.Categorical(logits=x) for x in (ref + proxy / beta, ref))
    want = torch.distributions.kl_divergence(law, base)
    expect_close(kl, want, f"kl at beta {beta:g}", rtol=tolerance, atol=tolerance / 10)
    expect_close(expected, (law.probs * gold).sum(-1), f"gold at beta {beta:g}", rtol=tolerance, atol=tolerance / 10)


@fg.case("a large beta leaves the reference: KL 0, its own gold score", 1, "what does exp(proxy/beta) tend to?")
def _(f: Any) -> None:
    ref, proxy, gold = _proxy_world(10)
    kl, expected = _path(f, ref, proxy, [1e5], gold)
    expect_close(kl, torch.zeros(1, 3), "kl at beta 1e5", atol=1e-4)
    want = (ref.exp() * gold).sum(-1)
    expect_close(expected[0], want, "gold at beta 1e5", rtol=1e-3, atol=1e-3)
    kl, expected = _path(f, ref, proxy, [1e5], gold + 7)
    expect_close(expected[0], want + 7, "gold at beta 1e5, gold scores raised by 7", rtol=1e-3)


@fg.case("the gold score starts with the slope Cov(proxy, gold) in 1/beta", 1, "differentiate E[gold] in 1/beta at 0")
def _(f: Any) -> None:
    ref, proxy, gold = _proxy_world(13)
    q, step = ref.double().exp(), 0.002
    _, (start, moved) = _path(f, ref.double(), proxy.double(), [1e7, 1 / step], gold.double())
    covariance = (q * proxy * gold).sum(-1) - (q * proxy).sum(-1) * (q * gold).sum(-1)
    expect_close((moved - start) / step, covariance, "slope of the gold score at 1/beta = 0", rtol=0.03, atol=0.02)


@fg.case(
    "beta = 0.01 to 0.0001: at last the proxy's favourite, at KL = -log ref of it", 1, "log_softmax instead of exp"
)
def _(f: Any) -> None:
    ref, proxy, gold = _far_world()
    kl, expected = _path(f, ref, proxy, [0.01], gold)
    expect_close(expected[0], gold[:, 0], "gold at beta 0.01", rtol=1e-3, atol=1e-3)
    expect_close(kl[0], -ref[:, 0], "kl at beta 0.01", rtol=1e-3, atol=1e-3)
    world, betas = _far_world(2.998), [1e-2, 1e-3, 1e-4]
    kl, expected = _path(f, *world[:2], betas, world[2])
    for k, beta in enumerate(betas):  # proxy/beta = 30000 has steps of 0.002 in float32
        _expect_exact(kl[k], expected[k], world, beta, tolerance=0.02)


@fg.case("equals sums over torch's own distributions, for three betas", 2, "three betas are three rows, in their order")
def _(f: Any) -> None:
    for seed, betas in ((16, [2.0, 0.2, 0.7]), (19, [0.4, 1.0, 5.0])):
        ref, proxy, gold = _proxy_world(seed)
        kl, expected = _path(f, ref, proxy, betas, gold)
        for k, beta in enumerate(betas):
            _expect_exact(kl[k], expected[k], (ref, proxy, gold), beta, tolerance=1e-3)


_Rule = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def _path_with(
    policy: Callable[[Tensor, Tensor, float, Tensor], Tensor] = lambda ref, r, beta, g: (ref + r / beta).log_softmax(
        -1
    ),
    kl: _Rule = lambda lp, ref, r, g, beta: (lp.exp() * (lp - ref)).sum(-1),
    gold: _Rule = lambda lp, ref, r, g, beta: (lp.exp() * g).sum(-1),
) -> Callable[..., Any]:
    def f(ref: Tensor, r: Tensor, betas: Sequence[float], g: Tensor) -> Any:
        laws = [(policy(ref, r, beta, g), beta) for beta in betas]
        return tuple(torch.stack([rule(lp, ref, r, g, beta) for lp, beta in laws]) for rule in (kl, gold))

    return f


def _exp_by_hand(ref: Tensor, r: Tensor, beta: float, g: Tensor) -> Tensor:
    weights = ref.exp() * (r / beta).exp()
    return (weights / weights.sum(-1, keepdim=True)).log()


def _in_double(f: Callable[..., Any]) -> Callable[..., Any]:
    return lambda ref, r, betas, g: f(ref.double(), r.double(), betas, g.double())


_log_of_softmax = _path_with(policy=lambda ref, r, beta, g: (ref + r / beta).softmax(-1).log())


def _at_least(floor: float) -> Callable[..., Any]:
    return lambda ref, r, betas, g: frontier_gold(ref, r, [max(beta, floor) for beta in betas], g)


def _sorted_in_place(ref: Tensor, r: Tensor, betas: list[float], g: Tensor) -> Any:
    betas.sort()
    return frontier_gold(ref, r, betas, g)


fg.plant(
    (
        "proxy-score",
        "this is the proxy's own mean, which always rises: the policy is judged by the gold score",
        _path_with(gold=lambda lp, ref, r, g, beta: (lp.exp() * r).sum(-1)),
        "W-OO-3",
    ),
    (
        "optimises-gold",
        "you made the policy optimal for the gold score, which nobody has in training: the proxy makes it",
        _path_with(policy=lambda ref, r, beta, g: (ref + g / beta).log_softmax(-1)),
        "W-OO-3",
    ),
    (
        "scores-exchanged",
        "proxy and gold are exchanged: the proxy makes the policy, the gold score judges it",
        lambda ref, r, betas, g: frontier_gold(ref, g, betas, r),
        "W-OO-3",
    ),
    (
        "both-scores",
        "you added the gold score to the proxy in the exponent; only the proxy makes the policy",
        _path_with(policy=lambda ref, r, beta, g: (ref + (r + g) / beta).log_softmax(-1)),
        "common",
    ),
    (
        "exponent-beta",
        "the exponent is proxy/beta: a small beta allows more divergence",
        _path_with(policy=lambda ref, r, beta, g: (ref + r * beta).log_softmax(-1)),
        "common",
    ),
    (
        "sign",
        "the sign of the exponent: what the proxy likes becomes likelier",
        _path_with(policy=lambda ref, r, beta, g: (ref - r / beta).log_softmax(-1)),
        "common",
    ),
    (
        "no-reference",
        "the reference is missing in the policy: pi = ref exp(proxy/beta) / Z",
        _path_with(policy=lambda ref, r, beta, g: (r / beta).log_softmax(-1)),
        "common",
    ),
    (
        "unnormalised",
        "Z is missing: ref exp(proxy/beta) does not sum to 1",
        _path_with(policy=lambda ref, r, beta, g: ref + r / beta),
        "common",
    ),
    (
        "over-the-table",
        "you normalised over all prompts together: every prompt has its own Z",
        _path_with(policy=lambda ref, r, beta, g: (ref + r / beta).flatten().log_softmax(0).reshape(ref.shape)),
        "common",
    ),
    (
        "overflow",
        "exp(proxy/beta) overflows for a small beta: use log_softmax",
        _path_with(policy=_exp_by_hand),
        "common",
    ),
    (
        "overflow-in-float64",
        "exp(proxy/beta) overflows in float64, too, where proxy/beta is above 709: use log_softmax",
        _in_double(_path_with(policy=_exp_by_hand)),
        "common",
    ),
    (
        "0-log-0",
        "a small probability rounds to 0, its logarithm is -inf, and 0 * (-inf) is nan: take log_softmax, not the log of softmax",
        _log_of_softmax,
        "common",
    ),
    (
        "0-log-0-in-float64",
        "float64 only delays it: at a still smaller beta a probability rounds to 0, and 0 * (-inf) is nan; take log_softmax",
        _in_double(_log_of_softmax),
        "common",
    ),
    (
        "beta-at-least-0.01",
        "you raised every beta below 0.01 to 0.01: that stays finite, but it is the policy of another beta",
        _at_least(1e-2),
        "common",
    ),
    (
        "beta-at-least-0.001",
        "you raised every beta below 0.001 to 0.001, which changes the policy; with log_softmax no bound is needed",
        _at_least(1e-3),
        "common",
    ),
    (
        "other-direction",
        "this is KL(ref || pi); the policy writes the responses",
        _path_with(kl=lambda lp, ref, r, g, beta: (ref.exp() * (ref - lp)).sum(-1)),
        "common",
    ),
    (
        "negative-kl",
        "the sign of the divergence: it is never negative",
        _path_with(kl=lambda lp, ref, r, g, beta: (lp.exp() * (ref - lp)).sum(-1)),
        "common",
    ),
    (
        "root-of-kl",
        "this is the square root of the divergence; the divergence itself is asked for",
        _path_with(kl=lambda lp, ref, r, g, beta: (lp.exp() * (lp - ref)).sum(-1).clamp(min=0).sqrt()),
        "common",
    ),
    (
        "kl-plain-mean",
        "the log-ratios must be weighted with the policy's probabilities",
        _path_with(kl=lambda lp, ref, r, g, beta: (lp - ref).mean(-1)),
        "common",
    ),
    (
        "minus-entropy",
        "the reference is missing in the divergence: this is minus the entropy of the policy",
        _path_with(kl=lambda lp, ref, r, g, beta: (lp.exp() * lp).sum(-1)),
        "common",
    ),
    (
        "under-the-reference",
        "the gold score is averaged over the reference's responses: the policy never appears",
        _path_with(gold=lambda lp, ref, r, g, beta: (ref.exp() * g).sum(-1)),
        "common",
    ),
    (
        "penalised",
        "you subtracted beta KL: the gold score itself is asked for",
        _path_with(gold=lambda lp, ref, r, g, beta: (lp.exp() * (g - beta * (lp - ref))).sum(-1)),
        "common",
    ),
    (
        "gain",
        "this is the gain over the reference; the gold score itself is asked for",
        _path_with(gold=lambda lp, ref, r, g, beta: ((lp.exp() - ref.exp()) * g).sum(-1)),
        "common",
    ),
    (
        "gold-of-the-favourite",
        "this is the gold score of the likeliest response, not a mean over all",
        _path_with(gold=lambda lp, ref, r, g, beta: g.gather(-1, lp.argmax(-1, keepdim=True))[:, 0]),
        "common",
    ),
    (
        "sorted-betas",
        "the rows must come in the order of the betas given",
        lambda ref, r, betas, g: frontier_gold(ref, r, sorted(betas), g),
        "common",
    ),
    (
        "sorted-in-place",
        "betas.sort() changes the list that you were given, and with it the order of the rows: leave it as it is",
        _sorted_in_place,
        "common",
    ),
    (
        "transposed",
        "the first axis is beta, the second the prompt",
        lambda ref, r, betas, g: tuple(x.T for x in frontier_gold(ref, r, betas, g)),
        "common",
    ),
    (
        "swapped",
        "gold score and divergence are exchanged: (kl, gold) is asked for",
        lambda ref, r, betas, g: frontier_gold(ref, r, betas, g)[::-1],
        "common",
    ),
)


def _path_at_once(ref: Tensor, r: Tensor, betas: Sequence[float], g: Tensor) -> Any:
    logits = ref.double() + r / tensor(betas, dtype=torch.float64)[:, None, None]
    lp = logits.log_softmax(-1)
    return (lp.exp() * (lp - ref)).sum(-1), torch.einsum("kpn,pn->kp", lp.exp(), g.double())


def _path_by_numpy(ref: Tensor, r: Tensor, betas: Sequence[float], g: Tensor) -> Any:
    q, s, gold = (x.double().numpy() for x in (ref, r, g))
    kl, means = [], []
    for beta in betas:
        log_z = np.logaddexp.reduce(q + s / beta, axis=1)
        p = np.exp(q + s / beta - log_z[:, None])
        kl.append(((p * s).sum(1) / beta - log_z).tolist())
        means.append((p * gold).sum(1).tolist())
    return [kl, means]


def _path_by_logsumexp(ref: Tensor, r: Tensor, betas: Sequence[float], g: Tensor) -> Any:
    """Logits minus their logsumexp, all in float32."""
    logits = ref.float() + r.float() / tensor(betas, dtype=torch.float32)[:, None, None]
    lp = logits - logits.logsumexp(-1, keepdim=True)
    return (lp.exp() * (lp - ref)).sum(-1), (lp.exp() * g).sum(-1)


def _path_by_loops(ref: Tensor, r: Tensor, betas: Sequence[float], g: Tensor) -> Any:
    """The largest score is subtracted before exp, and responses of probability 0 are left out of the divergence."""
    kl, gold = [], []
    for beta in betas:
        rows = []
        for lq, scores, judged in zip(ref.tolist(), r.tolist(), g.tolist(), strict=True):
            weights = [math.exp(x + (s - max(scores)) / beta) for x, s in zip(lq, scores, strict=True)]
            p = [w / sum(weights) for w in weights]
            divergence = sum(x * (math.log(x) - y) for x, y in zip(p, lq, strict=True) if x > 0)
            rows.append((divergence, sum(x * y for x, y in zip(p, judged, strict=True))))
        kl.append([row[0] for row in rows])
        gold.append([row[1] for row in rows])
    return kl, gold


fg.right("float32, logits minus logsumexp", _path_by_logsumexp)
fg.right("loops, the largest score subtracted", _path_by_loops)
fg.right("all betas at once, float64", _path_at_once)
fg.right("KL = E[proxy]/beta - log Z, numpy, lists", _path_by_numpy)


# -- where the two forms peak ----------------------------------------------------------------------------


def gao_peak(a, b):  # type: ignore[no-untyped-def]
    """(KL, height) of the peak of d (a - b d), and of d (a - b log d), with d = sqrt(KL). Two numbers -> two pairs."""
    best_of_n = (a / (2 * b)) ** 2, a**2 / (4 * b)
    rl = math.exp(2 * (a / b - 1)), b * math.exp(a / b - 1)
    return best_of_n, rl


_FORMS = ("d (a - b d)", "d (a - b log d)")
_COEFFICIENTS = ((2.0, 0.8), (0.5, 0.4), (1.0, 1.0), (3.0, 1.5))


def _form(number: int, a: float, b: float, d: Tensor) -> Tensor:
    return d * (a - b * (d.log() if number else d))


def _peak(f: Any, number: int, a: float, b: float) -> Tensor:
    pairs = unpack(f(a, b), 2, "gao_peak returns two pairs")
    kl_and_height = [unpack(pair, 2, "each pair is (KL, height)") for pair in pairs][number]
    values = torch.stack([as_tensor(x, "peak") for x in kl_and_height])
    expect_shape(values, (2,), "peak")
    return values


gp = Question(
    id="gao_peak",
    title="where the two fitted forms peak",
    chapter=9,
    kind="symbolic",
    theory=True,
    variable="gao_peak",
    reference=gao_peak,
    reference_source=source(gao_peak),
    hints=(
        "What is on the axis of the fitted forms, and what is asked for?",
        "Set the derivative in d to 0. The second form is a product in which both factors contain d; log d has the derivative 1/d.",
        "(a / (2 b))^2 and a^2 / (4 b) for best-of-n; exp(2 (a/b - 1)) and b exp(a/b - 1) for RL.",
    ),
    explanation="a - 2 b d = 0 gives d = a/(2 b) and the height a^2/(4 b). For the other form a - b log d - b = 0 gives d = exp(a/b - 1), and there "
    "a - b log d = b, so that the height is b d. With d = sqrt(KL) the peaks lie at KL = a^2/(4 b^2) and exp(2 (a/b - 1)). Both forms have one "
    "peak for every a, b > 0 and fall without bound behind it: they say that there is too much of either optimisation, of best-of-n as of RL. "
    "Multiplying the gold score by 10 multiplies a, b and the heights, and moves neither peak. For a = 2, b = 0.8 they are at KL 1.56, height 1.25, and at "
    "KL 20.09, height 3.59.",
    probes=lambda f: [
        [[float(as_tensor(x, "probe")) for x in unpack(pair, 2, "probe")] for pair in unpack(f(a, b), 2, "probe")]
        for a, b in ((2.0, 0.9), (0.7, 0.4), (3.0, 1.3))
    ],
)


@gp.case("best-of-n: slope 0 there, and the height is R at that KL", 1, "d is the square root of the KL")
def _(f: Any) -> None:
    _expect_stationary(f, 0)


@gp.case("RL: slope 0 there, and the height is R at that KL", 1, "both factors contain d")
def _(f: Any) -> None:
    _expect_stationary(f, 1)


def _expect_stationary(f: Any, number: int) -> None:
    for a, b in _COEFFICIENTS:
        kl, height = _peak(f, number, a, b)
        told = f"{_FORMS[number]} with a = {a:g}, b = {b:g}"
        require(0 < kl < torch.inf, f"KL of the peak of {told}: got {kl:.4g}, expected a positive number")
        d = kl.sqrt().requires_grad_()
        value = _form(number, a, b, d)
        (slope,) = torch.autograd.grad(value, d)
        expect_close(slope, 0.0, f"slope in d of {told} at your KL {kl:.4g}", atol=4e-3)
        expect_close(height, value, f"height of {told} at your KL {kl:.4g}", rtol=3e-3)


@gp.case("no point of a fine grid is higher", 1, "evaluate both forms on a grid of d and look for the largest value")
def _(f: Any) -> None:
    grid = torch.logspace(-4, 4, 4001, dtype=torch.float64)
    for a, b in _COEFFICIENTS:
        for number in (0, 1):
            kl, height = _peak(f, number, a, b)
            values = _form(number, a, b, grid)
            told = f"of the peak of {_FORMS[number]}, a = {a:g}, b = {b:g}"
            expect_close(height, values.max(), f"height {told}", rtol=3e-3)
            expect_close(kl, grid[values.argmax()] ** 2, f"KL {told}", rtol=1.5e-2)


@gp.case("ten times a and b: the same KL, ten times the height", 1, "the unit of the gold score is arbitrary")
def _(f: Any) -> None:
    for number in (0, 1):
        for a, b in _COEFFICIENTS[:2]:
            plain, scaled = _peak(f, number, a, b), _peak(f, number, 10 * a, 10 * b)
            require(bool(torch.isfinite(plain).all()), f"{_FORMS[number]}: got {show(plain)}, which is not finite")
            require(bool((plain > 1e-3).all()), f"{_FORMS[number]}: got {show(plain)}, expected positive numbers")
            expect_close(scaled, plain * tensor([1.0, 10.0]), f"{_FORMS[number]} with ten times a and b", rtol=5e-3)


def _peaks(bon: Any = None, rl: Any = None) -> Callable[[float, float], Any]:
    def f(a: float, b: float) -> Any:
        right = gao_peak(a, b)
        return bon(a, b) if bon else right[0], rl(a, b) if rl else right[1]

    return f


def _at_d(number: int, d: float, a: float, b: float) -> tuple[float, float]:
    """(KL, R) of a form at d."""
    return d * d, float(_form(number, a, b, tensor(d, dtype=torch.float64)))


gp.plant(
    (
        "d-for-kl",
        "you gave the distance d; the KL is its square",
        lambda a, b: ((a / (2 * b), a * a / (4 * b)), (math.exp(a / b - 1), b * math.exp(a / b - 1))),
        "common",
    ),
    (
        "kl-for-d",
        "you took d for the KL itself and the square root of the peak for its place",
        lambda a, b: ((math.sqrt(a / (2 * b)), a * a / (4 * b)), (math.exp((a / b - 1) / 2), b * math.exp(a / b - 1))),
        "common",
    ),
    (
        "best-of-n-never-peaks",
        "you let best-of-n rise for ever; its fitted form has a peak, too",
        _peaks(bon=lambda a, b: (math.inf, math.inf)),
        "W-OO-4",
    ),
    (
        "best-of-n-small-d",
        "a d alone holds near the reference only: you left out b where it makes the peak",
        _peaks(bon=lambda a, b: (math.inf, a * a / (4 * b))),
        "W-OO-4",
    ),
    (
        "no-peak",
        "neither form rises for ever: the gold score falls behind the peak, whatever the proxy says",
        lambda a, b: ((math.inf, math.inf), (math.inf, math.inf)),
        "W-OO-3",
    ),
    (
        "zero-crossing",
        "there R is 0 again: the peak comes earlier",
        lambda a, b: (_at_d(0, a / b, a, b), _at_d(1, math.exp(a / b), a, b)),
        "common",
    ),
    (
        "best-of-n-zero-crossing",
        "best-of-n: the factor 2 is missing; at d = a/b R is 0 again",
        _peaks(bon=lambda a, b: _at_d(0, a / b, a, b)),
        "common",
    ),
    (
        "rl-product-rule",
        "RL: the derivative of the second factor is missing; at d = exp(a/b) R is 0 again",
        _peaks(rl=lambda a, b: _at_d(1, math.exp(a / b), a, b)),
        "common",
    ),
    (
        "rl-sign-of-1",
        "RL: the derivative is a - b log d - b; you added b",
        _peaks(rl=lambda a, b: _at_d(1, math.exp(a / b + 1), a, b)),
        "common",
    ),
    (
        "rl-b-lost",
        "RL: d log d has the derivative log d + 1, and both terms carry b",
        _peaks(rl=lambda a, b: _at_d(1, math.exp((a - 1) / b), a, b)),
        "common",
    ),
    (
        "same-place",
        "you gave RL the peak of best-of-n; its form is another one",
        _peaks(rl=lambda a, b: _at_d(1, a / (2 * b), a, b)),
        "common",
    ),
    (
        "best-of-n-height-of-the-first-term",
        "best-of-n: a d alone is not the height; b d^2 is missing",
        _peaks(bon=lambda a, b: ((a / (2 * b)) ** 2, a * a / (2 * b))),
        "common",
    ),
    (
        "rl-height-of-the-first-term",
        "RL: a d alone is not the height; b d log d is missing",
        _peaks(rl=lambda a, b: (math.exp(2 * (a / b - 1)), a * math.exp(a / b - 1))),
        "common",
    ),
    (
        "rl-height-without-d",
        "RL: b is the slope factor a - b log d at the peak; multiply by d",
        _peaks(rl=lambda a, b: (math.exp(2 * (a / b - 1)), b)),
        "common",
    ),
    (
        "log-of-kl",
        "RL: you put log KL for log d, which is half of it",
        _peaks(rl=lambda a, b: (math.exp(a / b - 2), 2 * b * math.exp(a / (2 * b) - 1))),
        "common",
    ),
    (
        "base-10",
        "RL: log is the natural logarithm",
        _peaks(rl=lambda a, b: (10 ** (2 * a / b) / math.e**2, b / math.log(10) * 10 ** (a / b) / math.e)),
        "common",
    ),
    (
        "forms-exchanged",
        "the two forms are exchanged: the square belongs to best-of-n, the logarithm to RL",
        lambda a, b: gao_peak(a, b)[::-1],
        "common",
    ),
    (
        "height-first",
        "each pair is (KL, height)",
        lambda a, b: tuple(pair[::-1] for pair in gao_peak(a, b)),
        "common",
    ),
)


def _peak_by_autograd(a: float, b: float) -> Any:
    """Newton's method on log d for both forms."""
    pairs = []
    for number in (0, 1):
        x = tensor(0.0, dtype=torch.float64)
        for _ in range(100):
            d = x.exp().requires_grad_()
            value = _form(number, a, b, d)
            (slope,) = torch.autograd.grad(value, d)
            x = (x + 0.5 * slope.clamp(-a, a) / b / (d.detach() if not number else 1.0)).detach()
        pairs.append(torch.stack([d.detach().square(), value.detach()]))
    return pairs


gp.right("steps uphill with autograd", _peak_by_autograd)
gp.right("numpy, float32", lambda a, b: np.array(gao_peak(a, b), dtype=np.float32))
gp.right("four digits", lambda a, b: [[float(f"{x:.4g}") for x in pair] for pair in gao_peak(a, b)])


# -- a length bonus that is hacked -----------------------------------------------------------------------

_BONUS = 0.05
_NS = [2**k for k in range(11)]
_PRICES = [10 * 0.8**k for k in range(42)]
_FAR = 0.001


def _told_apart(got: float, want: float) -> tuple[str, str]:
    """Both numbers with four digits, or with as many as it takes until they look different."""
    for digits in range(4, 17):
        texts = f"{got:.{digits}g}", f"{want:.{digits}g}"
        if texts[0] != texts[1]:
            break
    return texts


def _accept_world(answer: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(ref, gold, lengths), three to twenty responses; Fail if that is no world."""
    parts = unpack(answer, 3, "your answer is (ref, gold, lengths)")
    ref, gold, lengths = (as_tensor(x, what) for x, what in zip(parts, ("ref", "gold", "lengths"), strict=True))
    for x, what in ((ref, "ref"), (gold, "gold"), (lengths, "lengths")):
        if x.ndim != 1 or x.shape != ref.shape or not 3 <= len(x) <= 20:
            raise Fail(
                f"{what}: got shape {tuple(x.shape)}; expected three lists of the same length, 3 to 20 responses"
            )
        if not torch.isfinite(x).all():
            raise Fail(f"{what}: got {show(x)}, which is not finite")
    if not bool((ref > 0).all()) or abs(float(ref.sum()) - 1) > 1e-3:
        raise Fail(f"ref: got {show(ref)}, expected positive probabilities that sum to 1")
    if bool((gold.abs() > 100).any()):
        raise Fail(f"gold: got {show(gold)}, expected numbers from -100 to 100")
    if bool((lengths != lengths.round()).any()) or bool((lengths < 1).any()) or bool((lengths > 1000).any()):
        raise Fail(f"lengths: got {show(lengths)}, expected whole numbers of tokens from 1 to 1000")
    return ref / ref.sum(), gold, lengths


def _agreement(ref: Tensor, gold: Tensor, proxy: Tensor) -> float:
    """Share of the pairs with different gold scores that the proxy orders in the same way; its ties count one half."""
    apart = (ref[:, None] * ref) * (gold[:, None] != gold)
    right = ((gold[:, None] - gold).sign() * (proxy[:, None] - proxy).sign() + 1) / 2
    total = float(apart.sum())
    return float((apart * right).sum()) / total if total else 0.5


def _gold_of_best(ref: Tensor, gold: Tensor, proxy: Tensor, n: int) -> float:
    return float((best_of_n(ref.log()[None], proxy[None], n)[0].exp() * gold).sum())


def _gold_of_optimum(ref: Tensor, gold: Tensor, proxy: Tensor, beta: float) -> float:
    return float(((ref.log() + proxy / beta).softmax(0) * gold).sum())


def _curves(world: tuple[Tensor, Tensor, Tensor]) -> tuple[float, float, list[float], list[float], float]:
    """Agreement, gold at the reference, gold of best-of-n, gold along the KL-optimal path, and at its end."""
    ref, gold, lengths = world
    proxy = gold + _BONUS * lengths
    best = [_gold_of_best(ref, gold, proxy, n) for n in _NS]
    path = [_gold_of_optimum(ref, gold, proxy, beta) for beta in _PRICES]
    end = _gold_of_optimum(ref, gold, proxy, _FAR)
    return _agreement(ref, gold, proxy), float(ref @ gold), best, path, end


def _what_holds(world: tuple[Tensor, Tensor, Tensor]) -> list[str]:
    """The properties of a world in words: two worlds with the same words share a mistake."""
    agreement, start, best, path, end = _curves(world)
    facts = {
        "good judge": agreement >= 0.75,
        "best-of-n rises": max(best) >= start + 0.05,
        "path rises": max(path) >= start + 0.05,
        "best-of-n ends below": best[-1] <= start - 0.05,
        "path ends below": end <= start - 0.05,
    }
    if all(facts.values()):
        return ["all of it"]
    facts |= {
        "falls from its peak": end <= max(path) - 0.05,
        "one length": bool((world[2] == world[2][0]).all()),
        "the optimum is the best": end >= float(world[1].max()) - 1e-6,
    }
    return [name for name, fact in facts.items() if fact]


_WORLD = ([0.6, 0.39, 0.01], [0.0, 1.0, -1.0], [20, 20, 80])

lh = Question(
    id="length_hack",
    title="a good judge with a taste for length",
    chapter=9,
    kind="counterexample",
    theory=True,
    variable="world",
    reference=_WORLD,
    reference_source="world = [0.6, 0.39, 0.01], [0.0, 1.0, -1.0], [20, 20, 80]",
    accept=_accept_world,
    hints=(
        "Which response does the proxy rank first? The end of both curves is its gold score.",
        "Let the reference choose mostly between a good and a bad response of the same length, which the proxy orders rightly. Add a third: "
        "rare, worse than both, and so long that the bonus puts it on top.",
        "For example ref = (0.6, 0.39, 0.01), gold = (0, 1, -1), lengths = (20, 20, 80).",
    ),
    explanation="The proxies of the three responses are 1, 2 and 3. Nearly all pairs that the reference writes are decided by gold "
    "(agreement 0.959), so any validation on them finds a good reward model, and at first the gold score rises: from 0.380 to 0.829 for the best of 8, and to "
    "0.606 along the KL-optimal path. But the favourite of the proxy is the long response: best of 1024 nearly always finds "
    "it, the path ends there, and the gold score with it, at -1. The proxy's own mean rises throughout, so it "
    "cannot tell. Best-of-n is no safer than RL: a response of probability p comes up once n is about 1/p.",
    probes=_what_holds,
)


@lh.case("drawn from the reference, 3 of 4 pairs are ordered as gold orders them", 1, "which pairs are frequent?")
def _(world: Any) -> None:
    agreement = _curves(world)[0]
    got, least = _told_apart(agreement, 0.75)
    require(agreement >= 0.75, f"agreement of proxy and gold: got {got}, expected at least {least}")


@lh.case(
    "at first the gold score rises by 0.05 or more, on both ways", 1, "the proxy must be right about frequent responses"
)
def _(world: Any) -> None:
    _, start, best, path, _ = _curves(world)
    for curve, name in ((best, "best-of-n, n = 1 to 1024"), (path, "the KL-optimal path, beta = 10 to 0.001")):
        got, least = _told_apart(max(curve) - start, 0.05)
        told = f"gold score of {name}: starts at {start:.3f}, highest {max(curve):.3f}"
        require(max(curve) >= start + 0.05, f"{told}: a change of {got}, expected {least} or more")


@lh.case("best of 1024 has a gold score 0.05 or more below one draw", 1, "its favourite must turn up among 1024 draws")
def _(world: Any) -> None:
    _, start, best, _, _ = _curves(world)
    told = f"gold score of one draw {start:.3f}, of the best of 1024 {best[-1]:.3f}"
    got, most = _told_apart(best[-1] - start, -0.05)
    require(best[-1] <= start - 0.05, f"{told}: a change of {got}, expected {most} or less")


@lh.case("the KL-optimal path ends 0.05 or more below the reference", 1, "what does the proxy like best?")
def _(world: Any) -> None:
    _, start, _, _, end = _curves(world)
    told = f"gold score of the reference {start:.3f}, of the optimum at beta = {_FAR:g} {end:.3f}"
    got, most = _told_apart(end - start, -0.05)
    require(end <= start - 0.05, f"{told}: a change of {got}, expected {most} or less")


lh.plant(
    (
        "one-length",
        "all lengths are equal: the bonus is a constant, and the proxy orders as gold does",
        ([0.6, 0.3, 0.1], [0.0, 1.0, 2.0], [20, 20, 20]),
        "W-OO-3",
    ),
    (
        "long-is-good",
        "the favourite of the proxy is the best response in gold: here a higher proxy does mean a better response",
        ([0.6, 0.3, 0.1], [0.0, 1.0, 2.0], [20, 40, 60]),
        "W-OO-3",
    ),
    (
        "too-rare",
        "the long response is so rare that 1024 draws hardly find it: best-of-n is not safe, it only needs more draws",
        ([0.6, 0.399999, 0.000001], [0.0, 1.0, -1.0], [20, 20, 80]),
        "W-OO-4",
    ),
    (
        "mild",
        "the gold score falls from its peak, but stays above the reference: the long response must be worse than a usual draw",
        ([0.6, 0.39, 0.01], [0.0, 2.0, 1.0], [20, 20, 80]),
        "common",
    ),
    (
        "hack-is-common",
        "the long response is so common that the proxy is a bad judge and the gold score falls at once",
        ([0.3, 0.3, 0.4], [0.0, 1.0, -1.0], [20, 20, 80]),
        "common",
    ),
    (
        "falls-at-once",
        "the proxy orders most pairs rightly, but the few wrong ones cost so much that the gold score never rises: make them rarer or less bad",
        ([0.5, 0.45, 0.05], [0.0, 1.0, -20.0], [20, 20, 520]),
        "common",
    ),
    (
        "best-of-n-only",
        "best-of-n, which sees the order only, rises at first; the KL-optimal path goes to the long response at once, since its bonus is so large",
        ([0.6, 0.39, 0.01], [0.0, 1.0, -1.0], [20, 20, 1000]),
        "common",
    ),
    (
        "poor-judge",
        "the gold score rises and falls, but too many of the reference's pairs are ordered wrongly: make the long response rarer",
        ([0.5, 0.3, 0.2], [0.0, 5.0, -1.0], [20, 20, 150]),
        "common",
    ),
)
lh.right(
    "four responses, tensors", (tensor([0.5, 0.3, 0.19, 0.01]), tensor([0.0, 1.0, 0.5, -2.0]), tensor([10, 10, 10, 90]))
)
lh.right("an array", np.array([[0.6, 0.39, 0.01], [0.0, 1.0, -1.0], [20, 20, 80]]))
lh.right("larger numbers", ([0.55, 0.44, 0.01], [5.0, 7.0, 3.0], [100, 100, 200]))

CHAPTER: Sequence[Question] = (bn, bk, bw, ub, fg, gp, lh)
