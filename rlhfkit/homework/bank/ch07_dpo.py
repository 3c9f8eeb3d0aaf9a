"""Chapter 7, direct preference optimisation: ten questions, with the wrong answers that their checks must reject."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, tensor
from torch.nn.functional import logsigmoid, softplus

from rlhfkit.homework.comparisons import (
    Fail,
    as_tensor,
    expect_close,
    expect_shape,
    gradient,
    gradient_or_none,
    is_distribution,
    lines,
    normal,
    numbers,
    require,
    show,
    source,
    unpack,
)
from rlhfkit.homework.core import Question

# -- the loss --------------------------------------------------------------------------------------------


def dpo_loss(chosen_logprobs, rejected_logprobs, ref_chosen_logprobs, ref_rejected_logprobs, beta):  # type: ignore[no-untyped-def]
    """DPO's loss of every pair. Four (B,), all log-probabilities of whole responses, and a number -> (B,)."""
    chosen = chosen_logprobs - ref_chosen_logprobs.detach()
    rejected = rejected_logprobs - ref_rejected_logprobs.detach()
    return -torch.nn.functional.logsigmoid(beta * (chosen - rejected))


def _pairs(seed: int, count: int = 5) -> list[Tensor]:
    """Log-probabilities of `count` pairs: chosen, rejected, and the two under the reference."""
    return [(-2 - 1.5 * normal(count, seed=seed + i).abs()).requires_grad_() for i in range(4)]


def _is_constant(result: Any, x: Tensor) -> str:
    slope = gradient_or_none(result, x)
    return "constant" if isinstance(slope, str) or slope.abs().max() == 0 else "not constant"


def _at_margins(*margins: float, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Log-probabilities of pairs with these margins at beta 1; only the chosen response's differ from pair to pair."""
    fixed = [torch.full((len(margins),), x, dtype=dtype) for x in (-2.0, -30.0, -2.0)]
    return [(tensor(margins, dtype=dtype) - 30).requires_grad_(), *fixed]


_LARGE_RATIOS = [tensor([-1.0, -60.0]), tensor([-2.0, -70.0]), tensor([-41.0, -20.0]), tensor([-40.0, -28.0])]
"""Log-ratios 40 and 38, -40 and -42, of the chosen and of the rejected responses."""

_LONG = [tensor([-3000.0]), tensor([-2999.0]), tensor([-3001.0]), tensor([-2999.5])]
"""Long responses, whose probabilities are 0 in any precision; their log-ratios are 1 and 0.5."""


def _slope_or_0(value: Any, x: Tensor) -> Tensor:
    """The slope for probes: a result that does not contain x has the slope 0."""
    slope = gradient_or_none(value, x)
    return torch.zeros_like(x) if isinstance(slope, str) else slope


def _far_in_the_wrong_order(f: Any) -> list[Any]:
    """How large the loss becomes, and its slope: the same text wherever it is cut, and whatever the number added."""
    chosen, *others = _at_margins(-5000.0, -9000.0)
    losses = f(chosen, *others, 1.0)
    slope, found = _slope_or_0(losses, chosen), as_tensor(losses, "probe")
    if found.shape != (2,) or not torch.isfinite(found).all() or abs(found[0] - found[1]) > 1e-3:
        return [found, slope]
    most = found[1].item()
    there = as_tensor(f(*_at_margins(-most), 1.0), "probe")
    return ["cut" if there.max() > most - 0.1 else "capped", slope]


def _far_in_the_right_order(f: Any) -> str:
    """Whether the loss at margins 12 and 25 is too large, or too small."""
    losses = as_tensor(f(*_at_margins(12.0, 25.0, dtype=torch.float64), 1.0), "probe")
    ratio = losses / softplus(-tensor([12.0, 25.0], dtype=torch.float64))
    return "too large" if ratio.max() > 1.5 else "too small" if ratio.min() < 0.5 else "right"


def _dpo_probe(f: Any) -> list[Any]:
    chosen, rejected, ref_chosen, ref_rejected = _pairs(1)
    losses = f(chosen, rejected, ref_chosen, ref_rejected, 0.7)
    start = _at_margins(0.0)
    return [
        *(losses, _slope_or_0(losses, chosen), _slope_or_0(losses, rejected)),
        *(_is_constant(losses, ref_chosen), _is_constant(losses, ref_rejected)),
        _slope_or_0(f(*start, 0.3), start[0]),
        *(_far_in_the_wrong_order(f), _far_in_the_right_order(f)),
        *(f(*_LARGE_RATIOS, 0.5), f(*_LONG, 1.0)),
    ]


dp = Question(
    id="dpo",
    title="the loss of direct preference optimisation",
    chapter=7,
    kind="function",
    theory=False,
    variable="dpo_loss",
    reference=dpo_loss,
    reference_source=source(dpo_loss),
    hints=(
        "Which reward is the policy optimal for, and what does Bradley-Terry say of the difference of two rewards?",
        "Up to a constant of the prompt the reward is beta (log pi - log ref). The loss is the negative log-likelihood that the "
        "chosen response wins; the reference is a constant. Which function of torch computes log sigmoid far from 0?",
        "-logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected))), the reference detached.",
    ),
    explanation="The optimal policy for a reward r is ref exp(r/beta)/Z, so r = beta log(pi/ref) + beta log Z(x). Both responses answer the "
    "same prompt, log Z(x) cancels in the difference of the two rewards, and Bradley-Terry makes the difference a probability, "
    "sigmoid(beta h). The loss is its negative logarithm. It is log 2 at the reference, whatever beta is. In single precision "
    "sigmoid(x) is 0 below about -89 and its logarithm -inf; logsigmoid stays finite, and its slope stays 1.",
    probes=_dpo_probe,
)


@dp.case("log 2 where the policy equals the reference, whatever beta is", 1, "all four log-probabilities enter")
def _(f: Any) -> None:
    for beta in (0.1, 1.0, 5.0):
        chosen, rejected = tensor([-1.0, -20.0, -3.0]), tensor([-4.0, -2.0, -3.0])
        got = f(chosen, rejected, chosen.clone(), rejected.clone(), beta)
        expect_close(got, torch.full((3,), math.log(2)), f"losses at the reference, beta {beta:g}")


@dp.case("log(1 + odds^(-beta)), with the policy's odds over the reference's", 2, "-log of a probability")
def _(f: Any) -> None:
    pi, ref = tensor([[0.3, 0.1], [0.2, 0.4], [0.05, 0.01]]), tensor([[0.1, 0.1], [0.3, 0.2], [0.02, 0.04]])
    odds = (pi[:, 0] / pi[:, 1]) / (ref[:, 0] / ref[:, 1])
    for beta in (1.0, 0.1, 3.0, 0.02):
        got = f(*pi.log().T, *ref.log().T, beta)
        expect_close(
            got, torch.log1p(odds**-beta), f"losses where the odds are 3, 1/3 and 10 times those, beta {beta:g}"
        )
    got = f(*(x.clone() for x in _LARGE_RATIOS), 0.5)
    want = softplus(-tensor([1.0, 1.0]))
    expect_close(got, want, "losses at log-ratios of 40 and 38, and of -40 and -42 (chosen and rejected), beta 0.5")
    want = softplus(-tensor([0.5]))
    expect_close(f(*(x.clone() for x in _LONG), 1.0), want, "loss of long responses, log-probabilities near -3000")
    for margin in (-6.0, 12.0, 25.0):  # in double precision, where 1 + exp(-25) is not 1
        rows = [x.detach() for x in _at_margins(margin, dtype=torch.float64)]
        want = softplus(-tensor([margin], dtype=torch.float64))
        expect_close(f(*rows, 1.0), want, f"loss at a margin of {margin:g}", rtol=1e-4 if margin < 0 else 1e-2, atol=0)


@dp.case("one number per pair, which depends on that pair only", 1, "the average is the caller's choice")
def _(f: Any) -> None:
    for count in (5, 7):
        batch = [x.detach() for x in _pairs(11, count)]
        got = as_tensor(f(*batch, 0.7), "losses")
        expect_shape(got, (count,), f"losses of {count} pairs")
        alone = [as_tensor(f(*(x[i : i + 1] for x in batch), 0.7), "loss") for i in range(count)]
        expect_shape(alone[0], (1,), "losses of one pair")
        expect_close(got, torch.cat(alone), f"losses of {count} pairs together against each alone")
        require(got.max() > got.min() + 0.05, f"all {count} pairs have the same loss")


@dp.case(
    "the gradient pushes the two log-probabilities apart", 2, "opposite slopes, steeper for a pair in the wrong order"
)
def _(f: Any) -> None:
    for seed, beta in ((21, 0.3), (31, 2.0)):
        chosen, rejected, ref_chosen, ref_rejected = _pairs(seed)
        losses = f(chosen, rejected, ref_chosen, ref_rejected, beta)
        h = (chosen - ref_chosen - rejected + ref_rejected).detach()
        push = beta / (1 + (beta * h).exp())
        expect_close(gradient(losses, chosen, "slope in chosen_logprobs"), -push, "slope in chosen_logprobs")
        expect_close(gradient(losses, rejected, "slope in rejected_logprobs"), push, "slope in rejected_logprobs")
    for beta in (0.3, 2.0):
        chosen, rejected = tensor([-1.0, -20.0]).requires_grad_(), tensor([-4.0, -2.0]).requires_grad_()
        losses = f(chosen, rejected, chosen.detach().clone(), rejected.detach().clone(), beta)
        for x, sign, name in ((chosen, -1, "chosen_logprobs"), (rejected, 1, "rejected_logprobs")):
            slope = gradient(losses, x, f"slope in {name}")
            expect_close(slope, torch.full((2,), sign * beta / 2), f"slope in {name} at the reference, beta {beta:g}")


@dp.case("the reference is a constant", 1, "detach what is not being trained")
def _(f: Any) -> None:
    chosen, rejected, ref_chosen, ref_rejected = _pairs(41)
    losses = f(chosen, rejected, ref_chosen, ref_rejected, 0.7)
    require(
        gradient(losses, chosen, "slope in chosen_logprobs").abs().max() > 1e-4, "the slope in chosen_logprobs is 0"
    )
    for x, name in ((ref_chosen, "ref_chosen_logprobs"), (ref_rejected, "ref_rejected_logprobs")):
        (slope,) = torch.autograd.grad(losses.sum(), x, allow_unused=True, retain_graph=True)
        steepest = 0.0 if slope is None else slope.abs().max().item()
        require(steepest == 0.0, f"the slope in {name} must be 0, got {steepest:.4g}")


@dp.case("finite at a margin of -900, with a slope", 1, "log(sigmoid(x)) underflows; what does torch offer?")
def _(f: Any) -> None:
    for size in (900.0, 5000.0):
        chosen, *others = _at_margins(-size)
        losses = f(chosen, *others, 1.0)
        expect_close(losses, tensor([size]), f"loss at a margin of {-size:g}")
        slope = gradient(losses, chosen, "slope in chosen_logprobs")
        expect_close(slope, tensor([-1.0]), f"slope in chosen_logprobs at a margin of {-size:g}")


def _dpo(loss: Callable[[Tensor, Tensor, float], Tensor]) -> Callable[..., Tensor]:
    """A loss as a function of the two log-ratios, chosen and rejected, and beta."""
    return lambda c, r, rc, rr, beta: loss(c - rc.detach(), r - rr.detach(), beta)


def _dpo_of(margin: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """-log sigmoid of another margin, a function of all five arguments; the reference is constant."""
    return lambda c, r, rc, rr, beta: -logsigmoid(margin(c, r, rc.detach(), rr.detach(), beta))


def _softplus_by_parts(A: Tensor) -> Tensor:
    return torch.log1p((-A.abs()).exp()) - torch.minimum(A, torch.zeros_like(A))


def _two_classes(chosen: Tensor, rejected: Tensor) -> Tensor:
    both, first = torch.stack([chosen, rejected], 1), torch.zeros(len(chosen), dtype=torch.long)
    return torch.nn.functional.cross_entropy(both, first, reduction="none")


dp.plant(
    (
        "no-sigmoid",
        "the bare margin of the implicit rewards has no lower bound: its log sigmoid is what is to be large",
        _dpo(lambda w, l, b: -b * (w - l)),
        "W-DPO-6",
    ),
    (
        "margin-to-minimise",
        "this is the margin itself: minimised, it pushes the rejected response up, without bound",
        _dpo(lambda w, l, b: b * (w - l)),
        "W-DPO-6",
    ),
    (
        "swapped",
        "chosen and rejected are exchanged: the loss teaches the opposite order",
        _dpo(lambda w, l, b: -logsigmoid(b * (l - w))),
        "W-DPO-10",
    ),
    (
        "denominator-lost",
        "exp(reward) is no probability: Bradley-Terry divides by the sum over both responses",
        _dpo(lambda w, l, b: -b * w),
        "W-DPO-10",
    ),
    (
        "plus",
        "the two implicit rewards are subtracted, not added",
        _dpo(lambda w, l, b: -logsigmoid(b * (w + l))),
        "W-DPO-11",
    ),
    (
        "sigmoid-lost",
        "the sigmoid inside the logarithm is lost: the margin can be negative",
        _dpo(lambda w, l, b: -(b * (w - l)).log()),
        "W-DPO-11",
    ),
    (
        "plus-and-sigmoid-lost",
        "the sigmoid is lost, and the two implicit rewards are subtracted, not added",
        _dpo(lambda w, l, b: -(b * w + b * l).log()),
        "W-DPO-11",
    ),
    (
        "ratio",
        "the logarithm of the ratio goes into the sigmoid, not the ratio",
        _dpo(lambda w, l, b: -logsigmoid(b * (w - l).exp())),
        "W-DPO-2",
    ),
    (
        "ratio-and-no-minus",
        "the logarithm of the ratio goes into the sigmoid, and the minus is missing",
        _dpo(lambda w, l, b: logsigmoid(b * (w - l).exp())),
        "W-DPO-2",
    ),
    (
        "naive-log",
        "not finite far in the wrong order, where sigmoid underflows: use logsigmoid",
        _dpo(lambda w, l, b: -(b * (w - l)).sigmoid().log()),
        "W-DPO-12",
    ),
    (
        "epsilon",
        "a small number inside the logarithm caps the loss (1e-8 at 18.4), and the slope fades: use logsigmoid",
        _dpo(lambda w, l, b: -((b * (w - l)).sigmoid() + 1e-8).log()),
        "W-DPO-12",
    ),
    (
        "clamped",
        "the margin, or the probability, is cut: beyond that the slope is 0, where it should be steepest",
        _dpo(lambda w, l, b: -logsigmoid((b * (w - l)).clamp(-50.0, 50.0))),
        "common",
    ),
    (
        "clamped-nearby",
        "the margin is cut on both sides: the slope of a pair far in the wrong order is lost, the loss of one far in "
        "the right order stops falling",
        _dpo(lambda w, l, b: -logsigmoid((b * (w - l)).clamp(-20.0, 20.0))),
        "common",
    ),
    (
        "clamped-above",
        "the margin is cut from above: the loss of a pair in the right order becomes small, but goes on falling",
        _dpo(lambda w, l, b: -logsigmoid((b * (w - l)).clamp(max=10.0))),
        "common",
    ),
    (
        "zero-above",
        "the loss is set to 0 beyond some margin: it becomes small there, but goes on falling, and so does its slope",
        _dpo(lambda w, l, b: torch.where(b * (w - l) < 8, -logsigmoid(b * (w - l)), 0 * (w - l))),
        "common",
    ),
    (
        "log-ratios-clamped",
        "the log-ratios are cut before they are subtracted: both can be large while their difference is not",
        _dpo(lambda w, l, b: -logsigmoid(b * (w.clamp(-20, 20) - l.clamp(-20, 20)))),
        "common",
    ),
    (
        "log-probabilities-clamped",
        "the log-probabilities are cut: summed over a long response they are -3000 or less",
        lambda *given: dpo_loss(*[x.clamp(min=-1000.0) if isinstance(x, Tensor) else x for x in given]),
        "common",
    ),
    (
        "underflow",
        "exp of a long response's log-probability is 0: subtract the logarithms instead of dividing probabilities",
        _dpo_of(lambda c, r, rc, rr, b: b * ((c.exp() / rc.exp()) / (r.exp() / rr.exp())).log()),
        "common",
    ),
    (
        "no-slope-at-0",
        "the slope is 0 where the margin is 0, and training starts there: relu and abs have a kink; use logsigmoid",
        _dpo(lambda w, l, b: (b * (l - w)).relu() + torch.log1p((-(b * (w - l)).abs()).exp())),
        "common",
    ),
    (
        "whole-slope-at-0",
        "the slope where the margin is 0 is twice as steep as it should be: clamp, or where, has a kink there; use logsigmoid",
        _dpo(lambda w, l, b: -(b * (w - l)).clamp(max=0) + torch.log1p((-(b * (w - l)).abs()).exp())),
        "common",
    ),
    (
        "where-nan",
        "torch.where computes both branches, and the infinite one that is not taken makes the slope nan: use logsigmoid",
        _dpo(lambda w, l, b: torch.where(b * (w - l) > -20, torch.log1p((b * (l - w)).exp()), b * (l - w))),
        "common",
    ),
    (
        "loss-over-beta",
        "the loss is divided by beta, as softplus(x, beta=beta) does: write softplus(beta * x)",
        _dpo(lambda w, l, b: softplus(l - w, beta=b)),
        "common",
    ),
    (
        "beta-on-the-chosen-only",
        "beta multiplies both log-ratios, that of the rejected response too",
        _dpo(lambda w, l, b: -logsigmoid(b * w - l)),
        "common",
    ),
    (
        "no-minus",
        "the minus is missing: this is the log-likelihood",
        _dpo(lambda w, l, b: logsigmoid(b * (w - l))),
        "common",
    ),
    (
        "no-log",
        "this is the probability that the rejected response wins: the loss is -log of the win probability",
        _dpo(lambda w, l, b: (b * (l - w)).sigmoid()),
        "common",
    ),
    (
        "minus-the-probability",
        "this is minus the win probability: the loss is minus its logarithm",
        _dpo(lambda w, l, b: -(b * (w - l)).sigmoid()),
        "common",
    ),
    (
        "base-2",
        "logarithms are natural: this loss is in bits",
        _dpo(lambda w, l, b: -logsigmoid(b * (w - l)) / math.log(2)),
        "common",
    ),
    (
        "beta-outside",
        "beta multiplies the margin inside the sigmoid, not the loss",
        _dpo(lambda w, l, b: -b * logsigmoid(w - l)),
        "common",
    ),
    ("no-beta", "beta is missing", _dpo(lambda w, l, b: -logsigmoid(w - l)), "common"),
    (
        "over-beta",
        "the reward is beta times the log-ratio: multiply, do not divide",
        _dpo(lambda w, l, b: -logsigmoid((w - l) / b)),
        "common",
    ),
    (
        "beta-on-the-policy-only",
        "beta multiplies the whole log-ratio, the reference's part too",
        _dpo_of(lambda c, r, rc, rr, b: b * (c - r) - (rc - rr)),
        "common",
    ),
    (
        "reference-free",
        "the reference is missing: the implicit reward is a log-ratio",
        _dpo_of(lambda c, r, rc, rr, b: b * (c - r)),
        "common",
    ),
    (
        "reference-added",
        "the reference enters with the wrong sign: from each log-probability subtract that of the same response under the reference",
        _dpo_of(lambda c, r, rc, rr, b: b * ((c + rc) - (r + rr))),
        "common",
    ),
    (
        "chosen-only",
        "the rejected response plays no part: the margin is a difference of two implicit rewards",
        _dpo(lambda w, l, b: -logsigmoid(b * w)),
        "common",
    ),
    (
        "probabilities",
        "you subtracted probabilities: the reward is a difference of log-probabilities",
        _dpo_of(lambda c, r, rc, rr, b: b * ((c.exp() - rc.exp()) - (r.exp() - rr.exp()))),
        "common",
    ),
    (
        "quotient-of-logs",
        "a ratio of probabilities is a difference of their logarithms, not a quotient of them",
        _dpo_of(lambda c, r, rc, rr, b: b * (c / (rc - 1e-6) - r / (rr - 1e-6))),
        "common",
    ),
    (
        "reference-not-detached",
        "a gradient flows into the reference: it is a constant",
        lambda c, r, rc, rr, b: -logsigmoid(b * ((c - rc) - (r - rr))),
        "common",
    ),
    (
        "rejected-detached",
        "the rejected log-probability is detached: right value, but nothing pushes it down",
        _dpo(lambda w, l, b: -logsigmoid(b * (w - l.detach()))),
        "common",
    ),
    (
        "chosen-detached",
        "the chosen log-probability is detached: right value, but nothing pushes it up",
        _dpo(lambda w, l, b: -logsigmoid(b * (w.detach() - l))),
        "common",
    ),
    (
        "all-detached",
        "the values are right, but no gradient reaches the policy",
        _dpo(lambda w, l, b: -logsigmoid(b * (w - l)).detach()),
        "common",
    ),
    (
        "mean",
        "one number per pair: the average is the caller's choice",
        _dpo(lambda w, l, b: -logsigmoid(b * (w - l)).mean()),
        "common",
    ),
    (
        "sum",
        "one number per pair: you returned the sum over all pairs",
        _dpo(lambda w, l, b: -logsigmoid(b * (w - l)).sum()),
        "common",
    ),
    (
        "hinge",
        "this is a hinge loss: its push stops at a margin of 1",
        _dpo(lambda w, l, b: (1 - b * (w - l)).relu()),
        "common",
    ),
    (
        "ipo",
        "this is the loss of IPO, which pulls the log-ratios to a finite gap",
        _dpo(lambda w, l, b: (w - l - 1 / (2 * b)).square()),
        "common",
    ),
)
dp.right("softplus, policy and reference apart", lambda c, r, rc, rr, b: softplus(b * ((rc - rr).detach() - (c - r))))
dp.right("float64", _dpo(lambda w, l, b: softplus(-b * (w.double() - l.double()))))
dp.right(
    "both implicit rewards in a log-sum-exp",
    _dpo(lambda w, l, b: torch.logaddexp(b * w, b * l) - b * w),
)
dp.right("float32", lambda *given: dpo_loss(*[x.float() if isinstance(x, Tensor) else x for x in given]))
dp.right("log-sum-exp of 0 and -A", _dpo(lambda w, l, b: torch.stack([0 * w, b * (l - w)]).logsumexp(0)))
dp.right("minimum, which shares the slope at 0", _dpo(lambda w, l, b: _softplus_by_parts(b * (w - l))))
dp.right("cross entropy of two classes", _dpo(lambda w, l, b: _two_classes(b * w, b * l)))


# -- the weight of a pair --------------------------------------------------------------------------------


def dpo_weight(A, beta):  # type: ignore[no-untyped-def]
    """Weight of a pair in DPO's gradient, from its implicit reward margin. Tensor, number -> the tensor's shape."""
    return beta * torch.sigmoid(-A)


def _dpo_slope(margins: Tensor, beta: float) -> Tensor:
    """Minus the slope of the loss in the chosen log-probability, at implicit reward margins of this size."""
    x = (margins.double() / beta).requires_grad_()
    zero = torch.zeros_like(x)
    return -torch.autograd.grad(dpo_loss(x, zero, zero, zero, beta).sum(), x)[0]


_SHAPES = ((), (2, 3), (1, 1), (2, 1, 3))


def _weight_probe(f: Any) -> list[Any]:
    """Weights along one axis, at margins of 1000, and the shapes: one text for all answers that raise there."""
    try:
        far = f(tensor([-1000.0, 0.0, 1000.0]), 2.0)
    except Exception:
        far = "raises"
    try:
        shapes = str([tuple(as_tensor(f(torch.zeros(shape), 1.0), "probe").shape) for shape in _SHAPES[:3]])
    except Exception:
        shapes = "raises"
    small = as_tensor(f(tensor([10.0]), 1000.0), "probe")
    return [f(tensor([-2.0, 0.5, 3.0]), 0.3), far, shapes, str((small.abs() < 1e-3).tolist())]


dw = Question(
    id="dpo_weight",
    title="the weight of a pair in DPO's gradient",
    chapter=7,
    kind="symbolic",
    theory=True,
    variable="dpo_weight",
    reference=dpo_weight,
    reference_source=source(dpo_weight),
    hints=(
        "The loss is -log sigmoid(A). What is its slope in A, and what is the slope of A in log pi(y_w)?",
        "The slope of log sigmoid(A) in A is 1 - sigmoid(A). Which pairs does that make count: those in the right order or "
        "those in the wrong one?",
        "beta sigmoid(-A).",
    ),
    explanation="d/dA of -log sigmoid(A) is -(1 - sigmoid(A)) = -sigmoid(-A), and A = beta h, so that one nat more in log pi(y_w) adds beta to A. "
    "The weight is beta sigmoid(-A): for beta = 1 it is 0.953, 0.5 and 0.047 at A = -3, 0 and 3. It is the probability, "
    "under the implicit rewards, that the rejected response wins. A pair in the wrong order counts fully, one in the right order fades, and "
    "no pair ever pulls back.",
    probes=_weight_probe,
)


@dw.case("equals autograd", 2, "the chain rule: first A, then log pi")
def _(f: Any) -> None:
    for beta in (1.0, 0.1, 3.0):
        margins = torch.linspace(-8, 8, 33)
        got = f(margins.clone(), beta)
        expect_close(got, _dpo_slope(margins, beta), f"weights at A from -8 to 8, beta {beta:g}", rtol=2e-3, atol=2e-4)
    far = tensor([-12.0, -10.0, 10.0, 12.0])  # a large beta makes small weights visible
    got = f(far.clone(), 1000.0)
    expect_close(got, _dpo_slope(far, 1000.0), "weights at A = -12, -10, 10, 12, beta 1000", rtol=2e-3, atol=2e-4)
    for shape in _SHAPES:
        margins = normal(math.prod(shape), seed=50).reshape(shape)
        what = f"weights for A of shape {shape}, beta 0.7"
        expect_close(f(margins.clone(), 0.7), _dpo_slope(margins, 0.7), what, rtol=2e-3, atol=2e-4)


@dw.case("pairs in the wrong order count most", 1, "which pairs has the policy still to learn?")
def _(f: Any) -> None:
    got = as_tensor(f(tensor([-3.0, 0.0, 3.0]), 1.0), "weights")
    expect_shape(got, (3,), "weights")
    require(got[0] > got[1] + 0.1 > got[2] + 0.2, f"weights at A = -3, 0, 3: got {show(got)}, expected a fall")
    require(got.min() > 0, f"weights at A = -3, 0, 3: got {show(got)}, expected positive weights only")


@dw.case("finite at margins of -700 and 700, and of -1000 and 1000", 1, "exp(1000) is beyond the largest float")
def _(f: Any) -> None:
    for A in (700.0, 1000.0):
        expect_close(f(tensor([-A, A]), 2.0), tensor([2.0, 0.0]), f"weights at A = {-A:g} and {A:g}, beta 2")


dw.plant(
    (
        "sigmoid-of-a",
        "the sign inside the sigmoid: pairs in the right order must count little",
        lambda a, b: b * torch.sigmoid(a),
        "W-DPO-9",
    ),
    (
        "sigmoid-of-a-without-beta",
        "the sign inside the sigmoid: pairs in the right order must count little; and beta is missing",
        lambda a, b: torch.sigmoid(a) + 0 * b,
        "W-DPO-9",
    ),
    ("no-beta", "beta is missing: one nat in log pi adds beta to A", lambda a, b: torch.sigmoid(-a), "common"),
    ("constant", "without the sigmoid all pairs would count alike", lambda a, b: b + 0 * a, "W-DPO-6"),
    (
        "negative",
        "the weight is positive; the minus sign is the loss's",
        lambda a, b: -b * torch.sigmoid(-a),
        "common",
    ),
    (
        "slope-of-sigmoid",
        "this is the slope of the sigmoid, not of its logarithm",
        lambda a, b: b * torch.sigmoid(a) * torch.sigmoid(-a),
        "common",
    ),
    (
        "margin-scaled-twice",
        "A already contains beta",
        lambda a, b: b * torch.sigmoid(-b * a),
        "common",
    ),
    (
        "beta-inside-only",
        "beta stands in front of the sigmoid, not inside it: A already contains beta, and one nat in log pi adds beta to A",
        lambda a, b: torch.sigmoid(-b * a),
        "common",
    ),
    (
        "margin-over-beta",
        "the sigmoid takes A as it is: do not divide it by beta",
        lambda a, b: b * torch.sigmoid(-a / b),
        "common",
    ),
    (
        "margin-over-beta-and-no-beta",
        "the sigmoid takes A as it is, not divided by beta; and beta is missing in front",
        lambda a, b: torch.sigmoid(-a / b),
        "common",
    ),
    (
        "size-of-the-margin",
        "the sign of A matters: a pair in the wrong order counts more, not as one in the right order",
        lambda a, b: b * torch.sigmoid(-a.abs()),
        "common",
    ),
    (
        "mean",
        "one weight per pair: you returned their mean",
        lambda a, b: (b * torch.sigmoid(-a)).mean(),
        "common",
    ),
    (
        "flat",
        "the values are right, but the result has one axis, whatever the shape of A is",
        lambda a, b: b * torch.sigmoid(-a).flatten(),
        "common",
    ),
    (
        "squeezed",
        "squeeze drops axes of length 1: the result has the shape of A",
        lambda a, b: b * torch.sigmoid(-a).squeeze(),
        "common",
    ),
    (
        "at-least-one-axis",
        "an A without axes has a weight without axes: you added one",
        lambda a, b: b * torch.sigmoid(-torch.atleast_1d(a)),
        "common",
    ),
    (
        "one-axis-only",
        "your code goes through A one number at a time, and A may have any shape, or no axis at all: torch.sigmoid takes it as it is",
        lambda a, b: tensor([b / (1 + math.exp(min(x, 700.0))) for x in a.tolist()]),
        "common",
    ),
    ("loss", "this is beta times the loss, not its slope", lambda a, b: b * softplus(-a), "common"),
    ("hinge", "this is the weight in a hinge loss, all or nothing", lambda a, b: b * (a < 1).float(), "common"),
    (
        "squared-loss",
        "this is the weight in a squared loss, which turns negative and pulls back",
        lambda a, b: 2 * b * (1 - a),
        "common",
    ),
    (
        "over-beta",
        "A is beta times the log-ratios: the slope is multiplied with beta, not divided by it",
        lambda a, b: torch.sigmoid(-a) / b,
        "common",
    ),
    (
        "overflow",
        "right in exact arithmetic, but exp(-A)/(1 + exp(-A)) is not a number where exp(-A) overflows",
        lambda a, b: b * (-a).exp() / (1 + (-a).exp()),
        "common",
    ),
    (
        "overflow-of-math-exp",
        "math.exp raises an error beyond 709: torch.sigmoid does not",
        lambda a, b: tensor([b / (1 + math.exp(x)) for x in a.flatten().tolist()]).reshape(a.shape),
        "common",
    ),
    (
        "cut-to-0",
        "the weight of a pair far in the right order is small, but not 0: it fades without an end",
        lambda a, b: b * torch.where(a > 8, 0.0, torch.sigmoid(-a)),
        "common",
    ),
    (
        "wrong-order-only",
        "all or nothing is no sigmoid: pairs in the right order count, too, but less",
        lambda a, b: b * (a < 0).float(),
        "common",
    ),
)
dw.right("one minus the win probability", lambda a, b: b * (1 - torch.sigmoid(a)))
dw.right("1/(1 + exp(A))", lambda a, b: b / (1 + a.exp()))
dw.right("tanh, numpy", lambda a, b: b * (1 - np.tanh(a.double().numpy() / 2)) / 2)
dw.right("autograd", _dpo_slope)
dw.right("four decimals", lambda a, b: (b * torch.sigmoid(-a)).round(decimals=4))
dw.right("one minus the win probability, float32", lambda a, b: b - b * torch.sigmoid(a.float()))
dw.right("nested lists", lambda a, b: (b * torch.sigmoid(-a)).tolist())
dw.right("softmax", lambda a, b: b * torch.stack([torch.zeros_like(a), a]).softmax(0)[0])


# -- the gradient ----------------------------------------------------------------------------------------


def dpo_gradient(logits, ref_logits, chosen, rejected, beta):  # type: ignore[no-untyped-def]
    """Gradient of one pair's loss in the policy's logits. (N,), (N,), two indices, number -> (N,)."""
    log_ratios = logits.log_softmax(-1) - ref_logits.log_softmax(-1)
    weight = beta * torch.sigmoid(-beta * (log_ratios[chosen] - log_ratios[rejected]))
    slope = torch.zeros_like(logits)
    slope[chosen], slope[rejected] = -weight, weight
    return slope


_ONE_PAIR = ((51, 4, 0, 2, 1.0), (54, 3, 2, 1, 0.3), (57, 5, 3, 0, 2.0))


def _one_pair(seed: int, size: int, chosen: int, rejected: int, beta: float) -> tuple[Tensor, Tensor, int, int, float]:
    return normal(size, seed=seed), 1.5 * normal(size, seed=seed + 1), chosen, rejected, beta


def _at_margin(margin: float, beta: float) -> tuple[Tensor, Tensor, int, int, float]:
    """Four responses, 1 over 2, with this implicit reward margin."""
    return tensor([0.4, margin / beta - 0.5, -0.5, 1.0]), tensor([-0.2, 0.3, 0.3, 0.1]), 1, 2, beta


def _improbable(logit: float) -> tuple[Tensor, Tensor, int, int, float]:
    """0 over 1 at A = 0, response 1 being improbable under policy and reference."""
    return tensor([0.5, logit, 0.0]), tensor([1.0, logit + 0.5, -0.5]), 0, 1, 1.0


def _pair_slope(logits: Tensor, ref_logits: Tensor, chosen: int, rejected: int, beta: float) -> Tensor:
    """Autograd of the pair's loss."""
    x = logits.detach().double().requires_grad_()
    pi, ref = x.log_softmax(0), ref_logits.double().log_softmax(0)
    return torch.autograd.grad(dpo_loss(pi[chosen], pi[rejected], ref[chosen], ref[rejected], beta), x)[0]


dg = Question(
    id="dpo_gradient",
    title="DPO's gradient on one pair",
    chapter=7,
    kind="symbolic",
    theory=True,
    variable="dpo_gradient",
    reference=dpo_gradient,
    reference_source=source(dpo_gradient),
    hints=(
        "Which log-probabilities occur in the loss, and what is the gradient of each in the logits?",
        "The gradient is one weight times one difference, grad log pi(y_w) - grad log pi(y_l). In the logits grad log pi(y) is "
        "1_y - pi: what is left of pi in the difference?",
        "-beta sigmoid(-A) (1_w - 1_l), with A = beta (log pi(w)/ref(w) - log pi(l)/ref(l)).",
    ),
    explanation="The loss contains the policy in two places, log pi(y_w) and log pi(y_l), so its gradient is "
    "-beta sigmoid(-A) (grad log pi(y_w) - grad log pi(y_l)). In the logits of a table the normaliser's part, -pi, cancels: "
    "the chosen logit goes up, the rejected one goes down by as much, and all others keep their logits. There is no expectation over what the "
    "policy writes, no entropy and no KL term: those belong to the gradient of the RL objective, E_pi[grad log pi (r - beta log pi/ref)]. "
    "The reference enters through the weight alone.",
    probes=lambda f: [
        *(f(*_one_pair(*pair)) for pair in _ONE_PAIR[:2]),
        "too large" if (as_tensor(f(*_at_margin(6.0, 1.5)), "probe")[1] < -0.01) else "small",
        *(f(*_improbable(logit)) for logit in (-30.0, -120.0)),
    ],
)


@dg.case("equals autograd", 2, "differentiate log pi(y_w) and log pi(y_l), nothing else")
def _(f: Any) -> None:
    for pair in _ONE_PAIR:
        logits, ref, chosen, rejected, beta = _one_pair(*pair)
        got = f(logits.clone(), ref.clone(), chosen, rejected, beta)
        want = _pair_slope(logits, ref, chosen, rejected, beta)
        what = f"gradient, {len(ref)} responses, {chosen} over {rejected}, beta {beta:g}"
        expect_close(got, want, what, rtol=2e-3, atol=6e-4)
    for A, beta in ((3.0, 1.0), (6.0, 1.5), (-6.0, 1.5), (-6.0, 0.2)):
        given = _at_margin(A, beta)
        what = f"gradient, 4 responses, 1 over 2, A = {A:g}, beta {beta:g}"
        expect_close(f(given[0].clone(), given[1].clone(), *given[2:]), _pair_slope(*given), what, rtol=2e-3, atol=6e-4)
    for logit in (-30.0, -120.0):
        given = _improbable(logit)
        what = f"gradient, 0 over 1, whose logits are {logit:g} and {logit + 0.5:g} under policy and reference, A = 0"
        expect_close(f(given[0].clone(), given[1].clone(), *given[2:]), _pair_slope(*given), what, rtol=2e-3, atol=6e-4)


@dg.case("two entries, opposite and equal; 0 for what was not compared", 1, "what becomes of the -pi in 1_y - pi?")
def _(f: Any) -> None:
    for pair in _ONE_PAIR:
        logits, ref, chosen, rejected, beta = _one_pair(*pair)
        got = as_tensor(f(logits, ref, chosen, rejected, beta), "gradient")
        expect_shape(got, tuple(logits.shape), "gradient")
        others = [i for i in range(len(logits)) if i not in (chosen, rejected)]
        require(got[others].abs().max() < 6e-4, f"{chosen} over {rejected}: got {show(got)}, others should be 0")
        sides = f"{chosen} over {rejected}: got {show(got)}"
        require(
            (got[chosen] + got[rejected]).abs() < 6e-4, f"{sides}, but entries {chosen} and {rejected} must sum to 0"
        )
        require(got[chosen].abs() > 1e-3, f"{sides}: entries {chosen} and {rejected} must not be 0")
        require(got[chosen] < 0, f"{sides}, so descent lowers the chosen logit")


@dg.case("at the reference: beta/2 for every pair", 1, "the weight is beta sigmoid(-A), and A is 0 there")
def _(f: Any) -> None:
    for beta in (0.2, 1.0, 4.0):
        logits = normal(4, seed=60)
        want = tensor([0.0, -beta / 2, 0.0, beta / 2])
        expect_close(
            f(logits, logits.clone(), 1, 3, beta), want, f"gradient, 1 over 3, beta {beta:g}", rtol=2e-3, atol=6e-4
        )


def _dg_of(expression: Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]) -> Callable[..., Tensor]:
    """A gradient as a function of log pi, log ref, the two one-hot vectors and beta."""

    def f(logits: Tensor, ref_logits: Tensor, chosen: int, rejected: int, beta: float) -> Tensor:
        eye = torch.eye(len(logits))
        return expression(logits.log_softmax(0), ref_logits.log_softmax(0), eye[chosen], eye[rejected], beta)

    return f


def _score(p: Tensor, weights: Tensor, law: Tensor | None = None) -> Tensor:
    """The mean of weights times grad log pi over a law (pi, if none is given), in the logits."""
    x = (p.exp() if law is None else law) * weights
    return x - p.exp() * x.sum()


def _push(p: Tensor, q: Tensor, w: Tensor, l: Tensor, b: float) -> Tensor:
    """sigmoid(-A)."""
    return torch.sigmoid(-b * ((w - l) * (p - q)).sum())


def _rl(p: Tensor, q: Tensor, w: Tensor, l: Tensor, b: float, law: Tensor | None = None) -> Tensor:
    return -_score(p, w - b * (1 + p - q), law)


dg.plant(
    (
        "rl-gradient",
        "this is the RL objective's gradient, a mean over what the policy writes; DPO's is one weighted difference",
        _dg_of(_rl),
        "W-DPO-7",
    ),
    (
        "rl-gradient-over-the-rewards-law",
        "a mean over the reward's own distribution is the gradient of neither; DPO averages over the pairs of the data",
        _dg_of(lambda p, q, w, l, b: _rl(p, q, w, l, b, (q + w / b).softmax(0))),
        "W-DPO-7",
    ),
    (
        "rl-gradient-of-both",
        "rewards of 1 and -1 under the RL objective: DPO contains no mean over what the policy writes",
        _dg_of(lambda p, q, w, l, b: -_score(p, w - l - b * (p - q))),
        "W-DPO-7",
    ),
    (
        "three-terms",
        "there are no terms for reward, entropy and KL: one weight and one difference of scores is all",
        _dg_of(lambda p, q, w, l, b: -_score(p, w) + b * _score(p, p) + b * _score(p, p - q)),
        "W-DPO-8",
    ),
    (
        "entropy-term",
        "there is no entropy term in the gradient",
        _dg_of(lambda p, q, w, l, b: -b * _push(p, q, w, l, b) * (w - l) + b * _score(p, p)),
        "W-DPO-8",
    ),
    (
        "kl-term",
        "there is no KL term in the gradient: the reference acts through the weight alone",
        _dg_of(lambda p, q, w, l, b: -b * _push(p, q, w, l, b) * (w - l) + b * _score(p, p - q)),
        "W-DPO-8",
    ),
    (
        "sigmoid-of-a",
        "the weight is sigmoid(-A): pairs in the right order must count little",
        _dg_of(lambda p, q, w, l, b: -b * (1 - _push(p, q, w, l, b)) * (w - l)),
        "W-DPO-9",
    ),
    (
        "no-weight",
        "the sigmoid gives the pair a weight, which fades as the margin grows",
        _dg_of(lambda p, q, w, l, b: -b * (w - l)),
        "W-DPO-6",
    ),
    (
        "swapped",
        "chosen and rejected are exchanged",
        _dg_of(lambda p, q, w, l, b: -b * (1 - _push(p, q, w, l, b)) * (l - w)),
        "W-DPO-10",
    ),
    (
        "ascent",
        "the sign: this is the gradient of the log-likelihood, the loss has the opposite one",
        _dg_of(lambda p, q, w, l, b: b * _push(p, q, w, l, b) * (w - l)),
        "common",
    ),
    (
        "no-beta",
        "beta is missing in front: one nat in log pi adds beta to A",
        _dg_of(lambda p, q, w, l, b: -_push(p, q, w, l, b) * (w - l)),
        "common",
    ),
    (
        "no-beta-inside",
        "beta is missing inside the sigmoid: A is beta times the difference of the log-ratios",
        _dg_of(lambda p, q, w, l, b: -b * _push(p, q, w, l, 1.0) * (w - l)),
        "common",
    ),
    (
        "beta-squared",
        "beta stands in front once: you have its square",
        _dg_of(lambda p, q, w, l, b: -(b**2) * _push(p, q, w, l, b) * (w - l)),
        "common",
    ),
    (
        "fine-tuning",
        "this is the gradient of -log pi(y_w), supervised fine-tuning: DPO's is a weighted difference of two scores",
        _dg_of(lambda p, q, w, l, b: p.exp() - w),
        "common",
    ),
    (
        "chosen-logit-only",
        "the entry of the rejected response is missing: its logit goes down by as much as the chosen one goes up",
        _dg_of(lambda p, q, w, l, b: -b * _push(p, q, w, l, b) * w),
        "common",
    ),
    (
        "reference-added",
        "in the margin the reference's log-probabilities are subtracted, not added",
        _dg_of(lambda p, q, w, l, b: -b * _push(p, -q, w, l, b) * (w - l)),
        "common",
    ),
    (
        "margin-cut",
        "the margin is cut: the weight of a pair in the right order fades on",
        _dg_of(lambda p, q, w, l, b: -b * torch.sigmoid(-(b * ((w - l) * (p - q)).sum()).clamp(-3, 3)) * (w - l)),
        "common",
    ),
    (
        "epsilon",
        "a small number inside the logarithm moves the margin of improbable responses: use log_softmax",
        lambda x, y, *rest: dpo_gradient((x.softmax(0) + 1e-8).log(), (y.softmax(0) + 1e-8).log(), *rest),
        "common",
    ),
    (
        "softmax-then-log",
        "softmax is 0 where a logit lies far below the others, and its logarithm infinite: use log_softmax",
        lambda x, y, *rest: dpo_gradient(x.softmax(0).log(), y.softmax(0).log(), *rest),
        "common",
    ),
    (
        "chosen-only",
        "the rejected response is differentiated, too",
        _dg_of(lambda p, q, w, l, b: -b * _push(p, q, w, l, b) * (w - p.exp())),
        "W-DPO-14",
    ),
    (
        "plus",
        "the two scores are subtracted, not added",
        _dg_of(lambda p, q, w, l, b: -b * _push(p, q, w, l, b) * (w + l - 2 * p.exp())),
        "W-DPO-11",
    ),
    (
        "normaliser-left",
        "in 1_y - pi the part -pi is the same for both responses, and cancels in the difference",
        _dg_of(lambda p, q, w, l, b: -b * _push(p, q, w, l, b) * (w - l - p.exp())),
        "common",
    ),
    (
        "reference-free",
        "the reference is missing in the weight",
        _dg_of(lambda p, q, w, l, b: -b * _push(p, 0 * q, w, l, b) * (w - l)),
        "common",
    ),
    (
        "in-the-probabilities",
        "this is the gradient in the probabilities; the parameters are the logits",
        _dg_of(lambda p, q, w, l, b: -b * _push(p, q, w, l, b) * (w - l) / p.exp()),
        "common",
    ),
    (
        "weighted-with-the-policy",
        "the pair comes from the data: its responses are not weighted with the policy's probabilities",
        _dg_of(lambda p, q, w, l, b: -b * _push(p, q, w, l, b) * _score(p, w - l)),
        "common",
    ),
)


def _pair_slope_by_numpy(logits: Tensor, ref_logits: Tensor, chosen: int, rejected: int, beta: float) -> Any:
    """With both score functions written out; log-softmax normalisers cancel in the margin."""
    x, y = logits.double().numpy(), ref_logits.double().numpy()
    pi = np.exp(x) / np.exp(x).sum()
    scores = np.eye(len(x)) - pi
    odds = np.exp(beta * ((x[chosen] - x[rejected]) - (y[chosen] - y[rejected])))
    return beta / (1 + odds) * (scores[rejected] - scores[chosen])


dg.right("both scores written out, numpy", _pair_slope_by_numpy)
dg.right("autograd, float64", _pair_slope)
dg.right("rounded", lambda *a: [round(x, 3) for x in _pair_slope(*a).tolist()])


# -- four losses -----------------------------------------------------------------------------------------

_RATIOS = (1.0, 2 / 3, 1.75, 1.75)
_LOSSES = [0.6931, 0.9163, 0.4520, 0.4520]

bl = Question(
    id="dpo_blind_losses",
    title="what DPO sees of four policies",
    chapter=7,
    kind="numbers",
    theory=True,
    variable="losses",
    reference=_LOSSES,
    reference_source="losses = [0.6931, 0.9163, 0.4520, 0.4520]",
    accept=numbers(4),
    hints=(
        "How much more probable is the chosen response than the rejected one, under each policy? What does a uniform "
        "reference add to that?",
        "With ratio = pi(y2)/pi(y1), the margin is beta log(ratio) and the loss is -log sigmoid of it. What is that for beta = 1?",
        "log(1 + 1/ratio), for the ratios 1, 2/3, 7/4 and 7/4.",
    ),
    explanation="A uniform reference drops out of the margin, which is log(ratio) with ratio = pi(y2)/pi(y1), and -log sigmoid(log ratio) = "
    "log(1 + 1/ratio). The ratios are 1, 2/3, 7/4 and 7/4, the losses log 2, log(5/2) and, for both others, log(11/7). pi_0 prefers y1, the "
    "rejected response, so its loss lies above that of the reference. pi_1 and pi_2 have the same ratio and the same loss, although one gives y3 "
    "twice as much as the other: y3 is in no pair.",
    probes=lambda x: x,
)


def _loss_of(x: Tensor, i: int, name: str) -> None:
    expect_close(x[i], math.log1p(1 / _RATIOS[i]), name, rtol=0, atol=5e-4, tell_expected=False)


@bl.case("the reference: as good as a coin", 1, "the margin of the reference is 0")
def _(x: Tensor) -> None:
    _loss_of(x, 0, "loss of the reference")


@bl.case("pi_0 against the reference", 2, "y2 is the chosen one: which of the two does pi_0 prefer?")
def _(x: Tensor) -> None:
    require(x[1] > 0, f"loss of pi_0: got {x[1]:.4f}, but minus the logarithm of a probability is never negative")
    require(x[1] > x[0], f"got {x[1]:.4f} for pi_0 and {x[0]:.4f} for the reference: which has the better odds?")
    _loss_of(x, 1, "loss of pi_0")


@bl.case("pi_1 and pi_2", 1, "the margin is the log of a ratio")
def _(x: Tensor) -> None:
    _loss_of(x, 2, "loss of pi_1")
    _loss_of(x, 3, "loss of pi_2")


def _table(loss: Callable[[float], float], ratios: Sequence[float] = _RATIOS) -> list[float]:
    return [loss(r) for r in ratios]


def _right_loss(r: float) -> float:
    return math.log1p(1 / r)


bl.plant(
    (
        "pi_0-flipped",
        "pi_0(y2)/pi_0(y1) is 0.2/0.3 = 2/3, not 3/2: this policy prefers the rejected response",
        _table(_right_loss, (1.0, 1.5, 1.75, 1.75)),
        "W-DPO-1",
    ),
    (
        "not-normalised",
        "the loss of pi_1 is that of 22/69 and 2/11, which sum to more than 1 with the rest: with 7/22 it ties with pi_2",
        _table(_right_loss, (1.0, 2 / 3, 22 / 69 * 11 / 2, 1.75)),
        "W-DPO-3",
    ),
    (
        "ratio-for-log-ratio-flipped-no-minus",
        "log sigmoid of the ratio itself, minus lost, with 3/2 for pi_0: the sigmoid takes the log of pi(y2)/pi(y1)",
        _table(lambda r: -math.log1p(math.exp(-r)), (1.0, 1.5, 1.75, 1.75)),
        "W-DPO-2",
    ),
    (
        "ratio-for-log-ratio",
        "the sigmoid takes the log of the ratio, not the ratio: at ratio 1 the loss is log 2",
        _table(lambda r: math.log1p(math.exp(-r))),
        "W-DPO-2",
    ),
    (
        "ratio-for-log-ratio-no-minus",
        "the sigmoid takes the log of the ratio, and the loss is minus the log-likelihood",
        _table(lambda r: -math.log1p(math.exp(-r))),
        "W-DPO-2",
    ),
    (
        "ratio-for-log-ratio-flipped",
        "the sigmoid takes the log of the ratio, and that of pi_0 is 2/3, not 3/2",
        _table(lambda r: math.log1p(math.exp(-r)), (1.0, 1.5, 1.75, 1.75)),
        "W-DPO-2",
    ),
    ("no-minus", "the loss is minus the log-likelihood", _table(lambda r: -_right_loss(r)), "common"),
    (
        "exchanged",
        "y2 is the chosen response: all ratios are upside down",
        _table(lambda r: math.log1p(r)),
        "W-DPO-10",
    ),
    ("margins", "these are the margins: the loss is -log sigmoid of them", _table(math.log), "W-DPO-6"),
    (
        "margins-lost-sigmoid",
        "the sigmoid is missing: this is minus the margin",
        _table(lambda r: -math.log(r)),
        "W-DPO-6",
    ),
    (
        "win-probabilities",
        "these are win probabilities: the loss is -log of them",
        _table(lambda r: r / (1 + r)),
        "common",
    ),
    (
        "losing-probabilities",
        "these are the probabilities that y1 wins, not -log of those that y2 wins",
        _table(lambda r: 1 / (1 + r)),
        "common",
    ),
    (
        "base-2",
        "logarithms are natural: these are bits",
        _table(lambda r: _right_loss(r) / math.log(2)),
        "common",
    ),
    (
        "reference-last",
        "the reference comes first, then pi_0, pi_1 and pi_2",
        _table(_right_loss, (2 / 3, 1.75, 1.75, 1.0)),
        "common",
    ),
    (
        "reference-at-0",
        "a margin of 0 is not a loss of 0: what is -log sigmoid(0)?",
        [0.0, *_LOSSES[1:]],
        "common",
    ),
    (
        "y3-for-y1",
        "y2 was compared with y1: you took its ratio to y3",
        _table(_right_loss, (1.0, 0.4, 7 / 11, 21 / 11)),
        "common",
    ),
    (
        "negative-log-likelihood-of-y1",
        "this is -log pi(y1): y1 is the rejected response, and DPO compares y2 with it",
        [math.log(3), -math.log(0.3), math.log(11 / 2), math.log(11 / 3)],
        "common",
    ),
    (
        "negative-log-likelihood",
        "this is -log pi(y2), supervised fine-tuning: DPO compares y2 with y1",
        [math.log(3), -math.log(0.2), math.log(22 / 7), math.log(44 / 21)],
        "common",
    ),
)
bl.right("exact", tensor([2.0, 2.5, 11 / 7, 11 / 7], dtype=torch.float64).log())
bl.right("three decimals, numpy", np.array([0.693, 0.916, 0.452, 0.452]))


# -- two policies that DPO cannot tell apart -------------------------------------------------------------

_TIE = ([0.25, 0.45, 0.3], [0.01, 0.018, 0.972])
_LEAST_DIFFERENCE = 0.5


def _two_policies(answer: Any) -> list[Tensor]:
    parts = [as_tensor(x, f"policy {i}") for i, x in enumerate(unpack(answer, 2, "pi_1, pi_2"), 1)]
    for i, p in enumerate(parts, 1):
        if p.shape != (3,) or not torch.isfinite(p).all():
            raise Fail(f"policy {i}: expected three finite numbers, the probabilities of y1, y2 and y3")
    return parts


def _shown(p: Tensor) -> str:
    """Probabilities with four digits, the tiniest too."""
    return "[" + ", ".join(f"{x:.4g}" for x in p.tolist()) + "]"


def _is_policy(p: Tensor) -> bool:
    return bool((p >= 0).all() and (p[:2] > 0).all() and abs(p.sum().item() - 1) < 3e-4)


def _blind_loss(p: Tensor) -> float:
    """DPO's loss with y2 over y1, beta 1 and a uniform reference."""
    return torch.log1p(p[0] / p[1]).item()


def _tie_tolerance(parts: list[Tensor]) -> float:
    """How far two losses that tie may lie apart: 1e-3, and what four decimals, half a unit of the last, can do."""
    rounded = [p for p in parts if (p[:2] * 1e4 - (p[:2] * 1e4).round()).abs().max() < 1e-3]
    return 1e-3 + min(0.02, sum(5e-5 / p[1].item() for p in rounded))


def _from_uniform(p: Tensor) -> float:
    return (math.log(len(p)) + torch.xlogy(p, p).sum()).item()


def _tie_kind(parts: list[Tensor]) -> str:
    if not all(_is_policy(p) for p in parts):
        if all((p <= 0).all() for p in parts):
            return "logarithms"
        if any((p < 0).any() for p in parts):
            return "a negative entry"
        if any((p[:2] == 0).any() for p in parts):
            return "a probability of 0"
        return "nearly normalised" if all(abs(p.sum() - 1) < 2e-3 for p in parts) else "not normalised"
    first, second = parts
    losses = [_blind_loss(p) for p in parts]
    if (first - second).abs().max() < 1e-3:
        return "equal" if losses[0] < math.log(2) else "equal, and no better than the reference"
    if abs(losses[0] - losses[1]) > _tie_tolerance(parts):
        if abs(first[1] - second[1]) < 1e-3:
            return "equal in y2"
        if abs((first[1] - first[0]) - (second[1] - second[0])) < 1e-3:
            return "equal differences"
        return "equal in y3" if abs(first[2] - second[2]) < 1e-3 else "other losses"
    if losses[0] > math.log(2) - 1e-3:
        return "as the reference" if losses[0] < math.log(2) + 1e-3 else "the wrong order"
    return "right" if abs(_from_uniform(first) - _from_uniform(second)) >= _LEAST_DIFFERENCE else "close in the KL"


bp = Question(
    id="dpo_blind_pair",
    title="two policies that DPO cannot tell apart",
    chapter=7,
    kind="counterexample",
    theory=True,
    variable="pair",
    reference=_TIE,
    reference_source="pair = ([0.25, 0.45, 0.3], [0.01, 0.018, 0.972])",
    accept=_two_policies,
    hints=(
        "Which number of a policy does the loss read, and which does it not?",
        "The loss knows the ratio pi(y2)/pi(y1) alone, in every copy of the pair. Keep the ratio and move the rest to y3 in one "
        "of the two.",
        "(a, r a, 1 - (1 + r) a) with the same r > 1 in both, once with a near 1/(2 + r) and once with a near 0.",
    ),
    explanation="The loss reads pi(y2)/pi(y1) and nothing else, so the probability of y3 is free. With r = 1.8 the loss is "
    "log(1 + 1/1.8) = 0.4418 for both policies, below log 2, and their KL divergences from the reference are 0.0315 and 0.9526. "
    "More copies of the pair change nothing: each contributes the same function of the ratio. What was never compared stays "
    "invisible to the loss, and where the policy puts it is decided by the model and the optimiser.",
    probes=_tie_kind,
)


@bp.case("two distributions over the three responses", 1, "three numbers, none negative, with sum 1")
def _(parts: Any) -> None:
    for i, p in enumerate(parts, 1):
        require(p.min() >= 0, f"pi_{i} = {_shown(p)} has a negative entry: no probability is below 0")
        require(p[:2].min() > 0, f"pi_{i} = {_shown(p)}: expected both y1 and y2 above 0")
        require(_is_policy(p), f"pi_{i} = {_shown(p)}: the sum is {p.sum():.6f}, expected 1")


@bp.case("the same loss over all 1000 pairs, below that of the reference", 2, "the margin is the log of pi(y2)/pi(y1)")
def _(parts: Any) -> None:
    require(all((p[:2] > 0).all() for p in parts), "y1 and y2 must have positive probabilities")
    losses = [_blind_loss(p) for p in parts]
    apart = abs(losses[0] - losses[1])
    require(apart < _tie_tolerance(parts), f"the losses are {losses[0]:.4f} and {losses[1]:.4f}")
    require(losses[0] < math.log(2) - 1e-3, f"the loss is {losses[0]:.4f}, that of the reference {math.log(2):.4f}")


@bp.case("their KL divergences from the reference differ by 0.5 or more", 1, "the loss does not read all of a policy")
def _(parts: Any) -> None:
    require(all(_is_policy(p) for p in parts), "both policies must be distributions")
    first, second = (_from_uniform(p) for p in parts)
    require(abs(first - second) >= _LEAST_DIFFERENCE, f"the KL divergences are {first:.4f} and {second:.4f}")


bp.plant(
    (
        "not-normalised",
        "a policy's sum is near 1, but not 1: one of its numbers is miscopied, or rounded too far, and its ratio is wrong",
        ([2 / 11, 22 / 69, 0.5], [3 / 11, 21 / 44, 0.25]),
        "W-DPO-3",
    ),
    (
        "equal",
        "equal policies tie, but so do all with equal ratios: no number of copies of a pair tells them apart",
        ([0.2, 0.35, 0.45], [0.2, 0.35, 0.45]),
        "W-DPO-4",
    ),
    (
        "equal-and-at-the-reference",
        "the reference ties with itself only: what is never compared may be anything, however many copies there are",
        ([1 / 3] * 3, [1 / 3] * 3),
        "W-DPO-4",
    ),
    (
        "equal-in-y3",
        "what y3 gets does not matter to the loss; the ratio of the two others does, and it differs here",
        ([0.2, 0.3, 0.5], [0.05, 0.45, 0.5]),
        "common",
    ),
    (
        "equal-in-y2",
        "the loss compares y2 with y1: that y2 is equally probable under both policies is not enough",
        ([0.25, 0.4, 0.35], [0.02, 0.4, 0.58]),
        "common",
    ),
    (
        "equal-differences",
        "the loss reads the ratio of the two probabilities, not their difference",
        ([0.3, 0.4, 0.3], [0.01, 0.11, 0.88]),
        "common",
    ),
    (
        "other-losses",
        "the ratios pi(y2)/pi(y1) differ, and so do the losses",
        ([0.25, 0.45, 0.3], [0.01, 0.04, 0.95]),
        "common",
    ),
    (
        "close-in-the-kl",
        "the losses tie, but the KL divergences differ by less than 0.5: keep the ratio, bring one policy nearer to the "
        "reference, and let the other write y3 nearly always",
        ([2 / 11, 7 / 22, 0.5], [3 / 11, 21 / 44, 0.25]),
        "common",
    ),
    (
        "wrong-order",
        "both prefer y1, the rejected response: their loss is above that of the reference",
        ([0.45, 0.25, 0.3], [0.018, 0.01, 0.972]),
        "W-DPO-1",
    ),
    (
        "as-the-reference",
        "y1 and y2 are equally probable under both: the loss is log 2, no better than the reference",
        ([1 / 3] * 3, [0.01, 0.01, 0.98]),
        "common",
    ),
    (
        "y1-at-0",
        "with a probability of 0 the ratio is 0 or infinite, a limit only: both y1 and y2 must be possible",
        ([0.0, 1.0, 0.0], [0.0, 0.1, 0.9]),
        "common",
    ),
    (
        "negative",
        "an entry is negative: to sum to 1 is not enough for a probability",
        ([0.3, 0.9, -0.2], [0.001, 0.003, 0.996]),
        "common",
    ),
    (
        "log-probabilities",
        "these are log-probabilities: the probabilities themselves are asked for",
        ([-2.303, -1.204, -0.511], [-6.908, -5.809, -0.004]),
        "common",
    ),
    (
        "unnormalised",
        "the probabilities of each policy must sum to 1",
        ([0.25, 0.45, 0.3], [0.05, 0.09, 0.3]),
        "common",
    ),
)
bp.right("the other order, tensors", [tensor([0.05, 0.45, 0.5]), tensor([0.1, 0.9, 0.0])])
bp.right(
    "fractions",
    ([Fraction(1, 5), Fraction(3, 5), Fraction(1, 5)], [Fraction(1, 1000), Fraction(3, 1000), Fraction(249, 250)]),
)
bp.right("four decimals", ([0.0033, 0.0067, 0.99], [0.3333, 0.6667, 0.0]))
bp.right("four decimals, a larger ratio", ([0.0013, 0.0038, 0.9949], [0.26, 0.74, 0.0]))
bp.right("four decimals, float32", (tensor([0.0017, 0.0033, 0.995]), tensor([0.3333, 0.6667, 0.0])))
bp.right("rounded", np.array([[0.182, 0.318, 0.5], [0.004, 0.007, 0.989]]))


# -- a small loss, far away ------------------------------------------------------------------------------


def dpo_kl(K):  # type: ignore[no-untyped-def]
    """A reference and a policy over (y1, y2, y3), all positive, with a loss below 1e-6 and a KL above K."""
    rare = math.exp(-2 * K - 3)
    ref = [(1 - rare) / 2, (1 - rare) / 2, rare]
    return ref, [1e-9, 0.5, 0.5 - 1e-9]


_FAR = (1.0, 1.9, 2.7, 5.0, 8.0, 13.5, 20.0)


def _ref_and_policy(f: Any, K: float) -> tuple[Tensor, Tensor]:
    parts = unpack(f(K), 2, "your function returns (ref, pi)")
    ref, pi = (as_tensor(x, name) for x, name in zip(parts, ("ref", "pi"), strict=True))
    for x, name in ((ref, "ref"), (pi, "pi")):
        expect_shape(x, (3,), name)
        require(torch.isfinite(x).all(), f"{name} = {_shown(x)}: expected finite numbers")
    return ref, pi


def _not_positive(p: Tensor) -> str:
    return "negative numbers, and no probability is below 0" if (p < 0).any() else "a probability of 0"


def _loss_and_kl(ref: Tensor, pi: Tensor) -> tuple[float, float]:
    """DPO's loss with y2 over y1, beta 1, and KL(pi || ref), of positive numbers."""
    margin = (pi[1] / ref[1]).log() - (pi[0] / ref[0]).log()
    return softplus(-margin).item(), (torch.xlogy(pi, pi) - torch.xlogy(pi, ref)).sum().item()


def _far_kind(ref: Tensor, pi: Tensor, K: float) -> str:
    """What is wrong with a reference and a policy, in words that do not depend on their numbers."""
    if (ref <= 0).all() and (pi <= 0).all():
        return "logarithms"
    if not ((ref > 0).all() and (pi > 0).all() and is_distribution(ref, 1e-6) and is_distribution(pi, 1e-6)):
        return f"{(ref < 0).any()} {(pi < 0).any()} {(ref > 0).all()} {(pi > 0).all()} {is_distribution(ref, 1e-6)} {is_distribution(pi, 1e-6)}"
    small, far = _is_small_and_far(ref, pi, K)
    if small and far:
        return "right" if ref.min() >= _floor(K) else "below the floor"
    if all(_is_small_and_far(pi, ref, K)):
        return "exchanged"
    if all(_is_small_and_far(ref, pi[[1, 0, 2]], K)):
        return "swapped"
    if not small:
        return "loss" if far else "loss and KL"
    if _loss_and_kl(pi, ref)[1] > K:
        return "other direction"
    return f"all on y{pi.argmax() + 1}" if pi.max() > 0.99 else "near"


def _is_small_and_far(ref: Tensor, pi: Tensor, K: float) -> tuple[bool, bool]:
    loss, kl = _loss_and_kl(ref, pi)
    return loss < 1e-6, kl > K


def _floor(K: float) -> float:
    return math.exp(-3 * K - 10)


def _far_probe(f: Any) -> list[str]:
    """The kinds over all K, whether they are wrong between whole numbers only, and how long the reference changes."""
    found = [_ref_and_policy(f, K) for K in _FAR]
    kinds = [_far_kind(*laws, K) for laws, K in zip(found, _FAR, strict=True)]
    whole = all(kind == "right" for kind, K in zip(kinds, _FAR, strict=True) if K == int(K))
    refs = [ref for ref, _ in found]
    fixed = all(torch.equal(ref, refs[0]) for ref in refs)
    return [*sorted(set(kinds)), f"whole {whole}", f"fixed {fixed} {torch.equal(*refs[-2:])}"]


dk = Question(
    id="dpo_kl",
    title="a small loss and a large divergence",
    chapter=7,
    kind="for every K",
    theory=True,
    variable="dpo_kl",
    reference=dpo_kl,
    reference_source=source(dpo_kl),
    hints=(
        "Which ratio must be large for a small loss, and which one for a large KL? Does the loss look at y3?",
        "KL(pi || ref) is at most log(1/min ref), so the reference must change with K: let it hardly ever write something that the policy writes "
        "half of the time, and let the policy hardly ever write y1.",
        "ref = ((1 - e)/2, (1 - e)/2, e) with e = exp(-2 K - 3), pi = (1e-9, 1/2, 1/2 - 1e-9).",
    ),
    explanation="For the loss, pi(y1) is to be small against pi(y2): 1e-9 against 1/2 gives a loss of 2e-9. What the policy does with y3 is not "
    "seen. If it puts half of its mass there, the KL is about log(1/e)/2 - 0.35, which exceeds K for e = exp(-2 K - 3). With one "
    "fixed reference this must end: KL(pi || ref) is at most log(1/min ref), 1.10 for a uniform one over three responses. An infinite KL "
    "needs a response that the reference never writes, and a loss of 0 needs pi(y1) = 0: both are limits, not policies of a softmax.",
    probes=_far_probe,
)


@dk.case("distributions in which every response has a positive probability", 1, "a softmax is never 0")
def _(f: Any) -> None:
    for K in _FAR:
        ref, pi = _ref_and_policy(f, K)
        for x, name in ((ref, "ref"), (pi, "pi")):
            require((x > 0).all(), f"K = {K:g}: {name} = {_shown(x)}: expected positive numbers")
            require(is_distribution(x, 1e-6), f"K = {K:g}: {name} = {_shown(x)} sums to {x.sum():.7f}, expected 1")
        least = _floor(K)
        require(
            ref.min() >= least, f"K = {K:g}: ref = {_shown(ref)}: expected nothing below exp(-3 K - 10) = {least:.3g}"
        )


@dk.case("the loss is below 1e-6", 1, "y2 is the chosen response, y1 the rejected one")
def _(f: Any) -> None:
    for K in _FAR:
        ref, pi = _ref_and_policy(f, K)
        for x, name in ((ref, "ref"), (pi, "pi")):
            require((x > 0).all(), f"K = {K:g}: {name} = {_shown(x)} has {_not_positive(x)}")
        loss = _loss_and_kl(ref, pi)[0]
        require(loss < 1e-6, f"K = {K:g}: the loss is {loss:.3g}")


@dk.case("KL(pi || ref) is finite and above K", 2, "KL(pi || ref) is at most log(1/min ref)")
def _(f: Any) -> None:
    for K in _FAR:
        ref, pi = _ref_and_policy(f, K)
        for x, name in ((ref, "ref"), (pi, "pi")):
            require((x >= 0).all(), f"K = {K:g}: {name} = {_shown(x)} has {_not_positive(x)}")
        require((ref > 0).all(), f"K = {K:g}: ref = {_shown(ref)} has a 0, so the KL is not finite")
        require(is_distribution(ref, 1e-6) and is_distribution(pi, 1e-6), f"K = {K:g}: ref or pi is no distribution")
        kl, most = _loss_and_kl(ref, pi)[1], -ref.min().log().item()
        require(kl > K, f"K = {K:g}: the KL is {kl:.3f}; with your reference it can be {most:.3f} at most")


def _law(*p: float) -> list[float]:
    """The numbers, with the second one replaced by what is missing to 1."""
    return [p[0], 1 - p[0] - p[2], p[2]]


def _rare(K: float) -> list[float]:
    e = math.exp(-2 * K - 3)
    return [(1 - e) / 2, (1 - e) / 2, e]


_HALF = [1e-9, 0.5, 0.5 - 1e-9]

dk.plant(
    (
        "zero-in-the-reference",
        "the reference never writes y3: then the KL is infinite for a trivial reason, and no softmax does that",
        lambda K: ([0.5, 0.5, 0.0], _HALF),
        "W-DPO-5",
    ),
    (
        "both-limits-at-once",
        "a loss of 0 with an infinite KL needs zeros in policy and reference: both are limits only",
        lambda K: ([0.5, 0.5, 0.0], [0.0, 0.5, 0.5]),
        "W-DPO-5",
    ),
    (
        "zero-in-the-policy",
        "the loss is 0 only as a limit, where pi(y1) is 0: a small positive number is enough",
        lambda K: (_rare(K), [0.0, 0.5, 0.5]),
        "W-DPO-5",
    ),
    (
        "fixed-reference",
        "with one reference for all K the KL is bounded, by log(1/min ref): let the reference depend on K",
        lambda K: ([1 / 3] * 3, _HALF),
        "W-DPO-5",
    ),
    (
        "fixed-small-reference",
        "far enough for some K, but with one reference the KL is bounded, by log(1/min ref)",
        lambda K: (_law(0.5, 0, 1e-5), _HALF),
        "common",
    ),
    (
        "all-on-the-chosen",
        "all mass on y2 gives a small loss, but no divergence beyond log(1/ref(y2)), here log 2",
        lambda K: (_rare(K), _law(1e-9, 0, 1e-9)),
        "common",
    ),
    (
        "not-rare-enough",
        "half of the mass on y3 gives about half of log(1/ref(y3)): exp(-K) is not rare enough",
        lambda K: (_law(0.5, 0, math.exp(-K) / 3), _HALF),
        "common",
    ),
    (
        "other-direction",
        "this makes KL(ref || pi) large; in KL(pi || ref) the policy writes what is rare for the reference",
        lambda K: ([0.25, 0.25, 0.5], _law(1e-9, 0, math.exp(-2 * K - 3))),
        "common",
    ),
    (
        "swapped",
        "y2 is the chosen response: y1 is to be improbable",
        lambda K: (_rare(K), [0.5, 1e-9, 0.5 - 1e-9]),
        "W-DPO-10",
    ),
    (
        "loss-not-small",
        "the divergence is large, but the policy writes y1 too often for a loss below 1e-6",
        lambda K: (_rare(K), [0.1, 0.4, 0.5]),
        "common",
    ),
    (
        "reference-not-normalised",
        "y3 was added to the reference without taking its probability from the others",
        lambda K: ([0.5, 0.5, math.exp(-2 * K - 3)], _HALF),
        "common",
    ),
    (
        "exchanged",
        "return the reference first, then the policy",
        lambda K: (_HALF, _rare(K)),
        "common",
    ),
    (
        "bound-just-missed",
        "nearly all mass on y3 gives log(1/ref(y3)) at most, which for exp(-K) is K: above K needs a rarer y3",
        lambda K: (_law(0.4, 0, math.exp(-K)), _law(1e-14, 0, 1 - 1e-7)),
        "common",
    ),
    (
        "below-the-floor",
        "far enough, but the reference goes below exp(-3 K - 10): less rare will do",
        lambda K: (_law(0.5, 0, math.exp(-4 * K - 12)), _HALF),
        "common",
    ),
    (
        "floored-reference",
        "from some K on your reference stops changing, and with one reference the KL is bounded",
        lambda K: (_law(0.5, 0, max(math.exp(-2 * K - 3), 1e-12)), _HALF),
        "common",
    ),
    (
        "one-small-reference",
        "far enough for all K, but one reference for all is below exp(-3 K - 10) where K is small: let it depend on K",
        lambda K: dpo_kl(20.0),
        "common",
    ),
    (
        "whole-numbers-only",
        "K need not be a whole number, and yours is rounded down",
        lambda K: (_law(0.4, 0, math.exp(-int(K) - 0.3)), _law(1e-14, 0, 1 - 1e-7)),
        "common",
    ),
    (
        "log-probabilities",
        "these are log-probabilities: return the probabilities themselves",
        lambda K: tuple([math.log(x) for x in law] for law in dpo_kl(K)),
        "common",
    ),
)
dk.right(
    "rare chosen response instead",
    lambda K: ([1 - 2e-3 - 2 * math.exp(-K - 1), math.exp(-K - 1), 2e-3 + math.exp(-K - 1)], _law(1e-12, 0, 1e-12)),
)
dk.right("tensors, float64", lambda K: tuple(tensor(x, dtype=torch.float64) for x in dpo_kl(K)))
dk.right("float32", lambda K: tuple(tensor(x) for x in dpo_kl(K)))
dk.right("logits", lambda K: (tensor([0.0, 0.0, -3 * K - 9]).softmax(0), tensor([-20.0, 0.0, 0.0]).softmax(0)))


# -- gaps at which the losses end ------------------------------------------------------------------------


def best_gaps(beta, eps):  # type: ignore[no-untyped-def]
    """The h at which DPO, conservative DPO and IPO have their least loss; math.inf for none. -> three numbers."""
    return math.inf, math.log((1 - eps) / eps) / beta, 1 / (2 * beta)


def _least(slope: Callable[[float], float]) -> float:
    """Where an increasing slope is 0, by bisection."""
    low, high = -1000.0, 1000.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return low


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def _three_gaps(f: Any, beta: float, eps: float) -> list[Tensor]:
    parts = unpack(f(beta, eps), 3, "best_gaps returns (DPO, conservative DPO, IPO)")
    found = [as_tensor(x, "gap") for x in parts]
    for x in found:
        expect_shape(x, (), "gap")
    return found


_GAPS = ((0.1, 0.1), (1.0, 0.25), (0.5, 0.02), (3.0, 0.4), (0.7, 0.001), (0.01, 0.1))


def _gap_probe(f: Any, beta: float, eps: float) -> list[Any]:
    """The three gaps; one text for all large numbers that stand for infinity."""
    dpo, *others = _three_gaps(f, beta, eps)
    return ["large" if torch.isfinite(dpo) and beta * dpo > 30 else dpo, *others]


ig = Question(
    id="ipo_gap",
    title="where three losses are least",
    chapter=7,
    kind="symbolic",
    theory=True,
    variable="best_gaps",
    reference=best_gaps,
    reference_source=source(best_gaps),
    hints=(
        "Set the slope of each loss in h to 0. Does each of them have a zero?",
        "The slope of conservative DPO in h is beta (sigmoid(beta h) - (1 - eps)); with eps = 0 it is DPO's. IPO is a square: where is it 0?",
        "DPO: math.inf; conservative DPO: log((1 - eps)/eps)/beta; IPO: 1/(2 beta).",
    ),
    explanation="DPO's slope in h is -beta sigmoid(-beta h), which is never 0: on a single pair the gap grows without bound, and the pull to "
    "the reference is gone. Conservative DPO has the slope beta (sigmoid(beta h) - (1 - eps)), 0 where the implied win probability is "
    "1 - eps, that is at h = log((1 - eps)/eps)/beta. IPO's square is 0 at h = 1/(2 beta). For beta = 0.1 and eps = 0.1 these are "
    "infinity, 21.97 and 5.00 nats. Both finite gaps grow as beta falls, as at the optimum of the RL objective.",
    probes=lambda f: [_gap_probe(f, beta, eps) for beta, eps in (*_GAPS[:3], _GAPS[4])],
)


@ig.case("DPO", 1, "is there an h at which a little more would not help?")
def _(f: Any) -> None:
    for beta, eps in _GAPS:
        got = _three_gaps(f, beta, eps)[0]
        require(not got.isnan(), "DPO: got nan")
        what = f"DPO, beta {beta:g}: got h = {got:.4g}"
        require(got > -math.inf, f"{what}: the sign, the loss falls as h grows")
        here, beyond = (softplus(-beta * x).item() for x in (got, got + 1))
        require(got.isinf() or beta * got < 30, f"{what}: a large number is not infinite, math.inf is")
        require(got.isinf(), f"{what}, where the loss is {here:.4g}; at {got + 1:.4g} it is {beyond:.4g}")


@ig.case("conservative DPO", 2, "which win probability do labels with a share eps of errors ask for?")
def _(f: Any) -> None:
    for beta, eps in _GAPS:
        want = _least(lambda h: -(1 - eps) * _sigmoid(-beta * h) + eps * _sigmoid(beta * h))  # noqa: B023
        got = _three_gaps(f, beta, eps)[1]
        expect_close(got, want, f"conservative DPO, beta {beta:g}, eps {eps:g}", rtol=2e-3, atol=6e-4)


@ig.case("IPO", 1, "a square is least where it is 0")
def _(f: Any) -> None:
    for beta, eps in _GAPS:
        want = _least(lambda h: 2 * (h - 0.5 / beta))  # noqa: B023
        expect_close(_three_gaps(f, beta, eps)[2], want, f"IPO, beta {beta:g}", rtol=2e-3, atol=6e-4)


def _gaps_with(**parts: Callable[[float, float], float]) -> Callable[..., Any]:
    """The three gaps with some exchanged for others: functions of beta and eps."""

    def f(beta: float, eps: float) -> Any:
        right = dict(zip(("dpo", "conservative", "ipo"), best_gaps(beta, eps), strict=True))
        return tuple(parts[name](beta, eps) if name in parts else right[name] for name in right)

    return f


ig.plant(
    (
        "dpo-at-the-reference",
        "DPO does not stay at the reference: its slope is never 0",
        _gaps_with(dpo=lambda b, e: 0.0),
        "common",
    ),
    (
        "dpo-as-a-hinge",
        "1/beta is where a hinge loss stops; DPO does not stop",
        _gaps_with(dpo=lambda b, e: 1 / b),
        "common",
    ),
    (
        "dpo-as-ipo",
        "1/(2 beta) is IPO's gap: DPO's slope is never 0",
        _gaps_with(dpo=lambda b, e: 1 / (2 * b)),
        "common",
    ),
    (
        "dpo-as-conservative",
        "eps does not occur in DPO, whose slope is never 0",
        _gaps_with(dpo=lambda b, e: math.log((1 - e) / e) / b),
        "common",
    ),
    (
        "dpo-large-number",
        "DPO's loss goes on falling beyond any number, however large: return math.inf",
        _gaps_with(dpo=lambda b, e: 1e9),
        "common",
    ),
    (
        "dpo-minus-infinity",
        "the sign of DPO's gap: its loss falls as h grows, and rises towards minus infinity",
        _gaps_with(dpo=lambda b, e: -math.inf),
        "common",
    ),
    (
        "both-as-margins",
        "both finite gaps are those of A = beta h: divide by beta",
        _gaps_with(conservative=lambda b, e: math.log((1 - e) / e), ipo=lambda b, e: 0.5),
        "common",
    ),
    (
        "conservative-base-2",
        "the log-odds are natural logarithms: yours have base 2",
        _gaps_with(conservative=lambda b, e: math.log2((1 - e) / e) / b),
        "common",
    ),
    (
        "conservative-infinite",
        "conservative DPO has a least loss: the share eps of wrong labels pulls back",
        _gaps_with(conservative=lambda b, e: math.inf),
        "common",
    ),
    (
        "eps-floored",
        "eps is used as it is: small shares of errors are possible, and yours has a floor",
        _gaps_with(conservative=lambda b, e: math.log(1 / max(e, 0.01) - 1) / b),
        "common",
    ),
    (
        "all-infinite",
        "conservative DPO and IPO pull back once h is too large",
        _gaps_with(conservative=lambda b, e: math.inf, ipo=lambda b, e: math.inf),
        "common",
    ),
    (
        "ipo-without-half",
        "the half is missing: IPO's square is (h - 1/(2 beta))^2",
        _gaps_with(ipo=lambda b, e: 1 / b),
        "common",
    ),
    (
        "ipo-proportional-to-beta",
        "a larger beta holds the policy nearer: beta stands below the line in IPO's gap",
        _gaps_with(ipo=lambda b, e: b / 2),
        "common",
    ),
    (
        "ipo-as-a-margin",
        "1/2 is beta times IPO's gap: divide by beta",
        _gaps_with(ipo=lambda b, e: 0.5),
        "common",
    ),
    (
        "conservative-as-a-margin",
        "log((1 - eps)/eps) is beta h: divide by beta",
        _gaps_with(conservative=lambda b, e: math.log((1 - e) / e)),
        "common",
    ),
    (
        "conservative-times-beta",
        "beta h = log((1 - eps)/eps): divide by beta, do not multiply",
        _gaps_with(conservative=lambda b, e: b * math.log((1 - e) / e)),
        "common",
    ),
    (
        "conservative-upside-down",
        "the chosen response wins with probability 1 - eps: the log-odds are positive",
        _gaps_with(conservative=lambda b, e: math.log(e / (1 - e)) / b),
        "common",
    ),
    (
        "conservative-as-a-probability",
        "1 - eps is the win probability: its log-odds are beta h",
        _gaps_with(conservative=lambda b, e: (1 - e) / b),
        "common",
    ),
    (
        "conservative-log-only",
        "log(1/eps) leaves out the 1 - eps of the odds",
        _gaps_with(conservative=lambda b, e: math.log(1 / e) / b),
        "common",
    ),
    (
        "conservative-linear",
        "this replaces the sigmoid by its tangent at 0, which is good for eps near 1/2 only",
        _gaps_with(conservative=lambda b, e: 4 * (0.5 - e) / b),
        "common",
    ),
    (
        "exchanged",
        "conservative DPO and IPO are exchanged",
        lambda b, e: (math.inf, 1 / (2 * b), math.log((1 - e) / e) / b),
        "common",
    ),
)
ig.right("tensors", lambda b, e: tensor([math.inf, float(torch.logit(tensor(1 - e))) / b, 0.5 / b]))
ig.right("two logarithms", lambda b, e: [float("inf"), (math.log(1 - e) - math.log(e)) / b, 0.5 / b])
ig.right("rounded", lambda b, e: (np.inf, round(math.log(1 / e - 1) / b, 3), round(1 / (2 * b), 3)))


# -- a few steps of gradient descent ---------------------------------------------------------------------


def dpo_kl_after(beta, lr, steps, gap):  # type: ignore[no-untyped-def]
    """KL(pi || ref) after some steps of gradient descent, and at the optimum. Four numbers -> two numbers."""

    def sigmoid(x):  # type: ignore[no-untyped-def]
        return 1 / (1 + math.exp(-x))

    def kl(h):  # type: ignore[no-untyped-def]
        e = math.exp(-abs(h))  # the KL is the same for h and -h, and exp(-|h|) does not overflow
        return math.log(2) - abs(h) * e / (1 + e) - math.log1p(e)

    h = 0.0
    for _ in range(steps):
        h += 2 * lr * beta * (sigmoid(gap) - sigmoid(beta * h))
    return kl(h), kl(gap / beta)


def _kl_from_coin(h: float) -> float:
    laws = [torch.distributions.Categorical(logits=tensor([x, 0.0], dtype=torch.float64)) for x in (h, 0.0)]
    return torch.distributions.kl_divergence(*laws).item()


@functools.lru_cache(maxsize=1000)
def _odds_after(beta: float, lr: float, steps: int, gap: float) -> float:
    """log pi(y1)/pi(y2) after gradient descent in the two logits from 0, by autograd."""
    logits, zero = torch.zeros(2, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for _ in range(steps):
        x = logits.requires_grad_()
        lp, win = x.log_softmax(0), _sigmoid(gap)
        loss = win * dpo_loss(lp[0], lp[1], zero, zero, beta) + (1 - win) * dpo_loss(lp[1], lp[0], zero, zero, beta)
        logits = (x - lr * torch.autograd.grad(loss, x)[0]).detach()
    return (logits[0] - logits[1]).item()


_RUNS = ((0.5, 1.0, 5, 1.5), (2.0, 0.3, 3, 1.0), (0.1, 4.0, 4, 0.8), (1.0, 0.5, 1, 2.0), (1.5, 0.4, 6, -1.2))


def _two_kls(f: Any, beta: float, lr: float, steps: int, gap: float) -> list[Tensor]:
    parts = [as_tensor(x, "KL") for x in unpack(f(beta, lr, steps, gap), 2, "your function returns two numbers")]
    for x in parts:
        expect_shape(x, (), "KL")
    return parts


_SLOW, _EXTREME = (0.1, 0.001, 1, 0.7), (0.005, 0.1, 3, 5.0)
"""Descent does not reach the optimum in 100000 steps; the optimum is at h = 1000."""


def _steps_probe(f: Any) -> list[Any]:
    """All runs; at the slow one whether the optimum falls short, at the extreme one whether it is right."""
    short = _two_kls(f, *_SLOW)[1] < 0.995 * _kl_from_coin(_SLOW[3] / _SLOW[0])
    try:
        extreme = abs(_two_kls(f, *_EXTREME)[1].item() - math.log(2)) < 1e-3
    except Exception:
        extreme = False
    return [*(_two_kls(f, *run) for run in _RUNS), f"short {bool(short)}, extreme {extreme}"]


def _run(beta: float, lr: float, steps: int, gap: float) -> str:
    return f"beta {beta:g}, lr {lr:g}, {steps} steps, gap {gap:g}"


gs = Question(
    id="dpo_gradient_steps",
    title="beta and the distance after a few steps",
    chapter=7,
    kind="symbolic",
    theory=True,
    variable="dpo_kl_after",
    reference=dpo_kl_after,
    reference_source=source(dpo_kl_after),
    hints=(
        "Everything depends on h = log pi(y1)/pi(y2). How far does one step move h from 0, as a function of beta? And where does it "
        "stop?",
        "The slope of the mean loss in h is beta (sigmoid(beta h) - sigmoid(gap)), and both logits move, in opposite directions. It is "
        "0 where beta h = gap.",
        "h += 2 lr beta (sigmoid(gap) - sigmoid(beta h)), from 0, steps times; at the optimum h = gap/beta; "
        "the KL is the same for h and -h, so take -|h|, where exp does not overflow: KL = log(2) + h sigmoid(h) - log(1 + exp(h)).",
    ),
    explanation="The mean loss has the slope beta (sigmoid(beta h) - sigmoid(gap)) in h. Its zero is h = gap/beta: at the optimum a larger beta "
    "is nearer to the reference. The first step from h = 0 moves h by 2 lr beta (sigmoid(gap) - 1/2), in proportion to beta: after a few steps a larger "
    "beta is farther away. With lr 0.1, gap 1 and 5 steps the KLs for beta = 0.1, 0.5 and 2 are 0.00007, 0.00158 and 0.01209, at the optimum 0.6926, "
    "0.3278 and 0.0303. Adam divides by the size of the gradient, and the factor beta with it: its first steps move h by about 2 lr "
    "each, whatever beta is.",
    probes=_steps_probe,
)


def _expect_four_digits(got: Tensor, want: float, what: str) -> None:
    """Rounding to four significant digits passes, and so does rounding to four decimals."""
    expect_close(got, want, what, rtol=6e-4, atol=6e-5)


@gs.case("the optimum, and its order: a larger beta is nearer", 1, "where is the slope of the mean loss 0?")
def _(f: Any) -> None:
    found = []
    for beta in (0.2, 0.5, 1.0, 2.0):
        got = _two_kls(f, beta, 0.1, 3, 1.5)[1]
        _expect_four_digits(got, _kl_from_coin(1.5 / beta), f"KL of the optimum, beta {beta:g}, gap 1.5")
        found.append(got.item())
    require(found == sorted(found, reverse=True), f"KLs of the optimum for beta = 0.2, 0.5, 1, 2: got {found}")
    for beta, lr, steps, gap in (
        (1.5, 0.1, 3, -1.2),
        (0.3, 0.1, 3, 0.7),
        (0.1, 0.1, 3, 3.0),
        (4.0, 0.1, 3, -2.0),
        _SLOW,
        _EXTREME,
    ):
        got = _two_kls(f, beta, lr, steps, gap)[1]
        _expect_four_digits(got, _kl_from_coin(gap / beta), f"KL of the optimum, {_run(beta, lr, steps, gap)}")


@gs.case("a few steps, and their order: a larger beta is farther away", 2, "what is the slope of the loss at h = 0?")
def _(f: Any) -> None:
    found = []
    for beta in (0.2, 0.5, 1.0, 2.0):
        run = beta, 0.4, 3, 1.5
        got = _two_kls(f, *run)[0]
        _expect_four_digits(got, _kl_from_coin(_odds_after(*run)), f"KL after gradient descent, {_run(*run)}")
        found.append(got.item())
    require(found == sorted(found), f"KLs after 3 steps for beta = 0.2, 0.5, 1, 2: got {found}")


@gs.case("any number of steps: from one to the optimum", 2, "the slope changes with h")
def _(f: Any) -> None:
    for run in (*_RUNS, (0.3, 1.0, 200, 0.7), (2.0, 0.5, 100, -1.0)):
        want = _kl_from_coin(_odds_after(*run))
        _expect_four_digits(_two_kls(f, *run)[0], want, f"KL after gradient descent, {_run(*run)}")


def _descent(
    step: Callable[[float, float, float], float] = lambda h, b, g: 2 * b * (_sigmoid(g) - _sigmoid(b * h)),
    optimum: Callable[[float, float], float] = lambda b, g: g / b,
    kl: Callable[[float], float] = _kl_from_coin,
    at_once: bool = False,
) -> Callable[..., Any]:
    """Both numbers with another step, a function of h, beta and gap, another optimum, or another divergence."""

    def f(beta: float, lr: float, steps: int, gap: float) -> Any:
        h = steps * lr * step(0.0, beta, gap) if at_once else 0.0
        for _ in range(0 if at_once else steps):
            h += lr * step(h, beta, gap)
        return kl(h), kl(optimum(beta, gap))

    return f


def _kl_of_another_number_of_steps(steps: Callable[[int], int]) -> Callable[..., Any]:
    return lambda b, lr, n, g: (_kl_from_coin(_odds_after(b, lr, steps(n), g)), _kl_from_coin(g / b))


def _by_optimiser(step: Callable[[list[float]], float]) -> Callable[..., Any]:
    """Both numbers; a step moves the first logit by -lr times a function of all slopes so far."""

    def f(beta: float, lr: float, steps: int, gap: float) -> Any:
        h, slopes = 0.0, []
        for _ in range(steps):
            slopes.append(beta * (_sigmoid(beta * h) - _sigmoid(gap)))
            h -= 2 * lr * step(slopes)
        return _kl_from_coin(h), _kl_from_coin(gap / beta)

    return f


def _adam(slopes: list[float]) -> float:
    """The direction of torch.optim.Adam, with its defaults."""
    mean = square = 0.0
    for slope in slopes:
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
    n = len(slopes)
    return mean / (1 - 0.9**n) / (math.sqrt(square / (1 - 0.999**n)) + 1e-8)


def _by_descent_only(b: float, lr: float, n: int, g: float) -> Any:
    return tuple(_descent()(b, lr, steps, g)[0] for steps in (n, 2000))


def _kl_by_exp(h: float) -> float:
    return math.log(2) + h * _sigmoid(h) - math.log1p(math.exp(h))


def _reverse_kl(h: float) -> float:
    """KL(ref || pi)."""
    return -math.log(2) - (math.log(_sigmoid(h)) + math.log(_sigmoid(-h))) / 2


gs.plant(
    (
        "optimum-twice",
        "a few steps do not reach the optimum: they move h in proportion to beta, so the order in beta is the reverse",
        lambda b, lr, n, g: (_kl_from_coin(g / b),) * 2,
        "W-DPO-13",
    ),
    (
        "step-over-beta",
        "a larger beta makes the step larger, not smaller: the slope of the loss in h contains beta as a factor",
        _descent(lambda h, b, g: 2 / b * (_sigmoid(g) - _sigmoid(b * h))),
        "W-DPO-13",
    ),
    (
        "exchanged",
        "the two are exchanged: first the KL after the steps, then that of the optimum",
        lambda *run: dpo_kl_after(*run)[::-1],
        "W-DPO-13",
    ),
    (
        "step-without-beta",
        "the slope in h has beta as a factor, since the margin is beta h",
        _descent(lambda h, b, g: 2 * (_sigmoid(g) - _sigmoid(b * h))),
        "common",
    ),
    (
        "adam",
        "Adam divides the slope by its own size: gradient descent moves in proportion to the slope",
        _by_optimiser(_adam),
        "common",
    ),
    (
        "no-zero-grad",
        "the gradients of earlier steps are added to those of later ones: call zero_grad in every step",
        _by_optimiser(sum),
        "common",
    ),
    (
        "steps-minus-one",
        "one step too few was taken",
        _kl_of_another_number_of_steps(lambda n: n - 1),
        "common",
    ),
    (
        "steps-plus-one",
        "one step too many was taken",
        _kl_of_another_number_of_steps(lambda n: n + 1),
        "common",
    ),
    (
        "one-step",
        "only one step was taken, whatever steps says",
        _kl_of_another_number_of_steps(lambda n: 1),
        "common",
    ),
    (
        "optimum-by-descent",
        "a long descent does not reach the optimum if lr or beta is small: set the slope to 0 and solve for h",
        _by_descent_only,
        "common",
    ),
    (
        "first-term-only",
        "the mean loss has a second term, for the comparisons that y2 wins: its slope is missing",
        _descent(lambda h, b, g: 2 * b * _sigmoid(g) * _sigmoid(-b * h)),
        "common",
    ),
    (
        "fixed-step",
        "these steps have a fixed size, by the sign of the slope: gradient descent moves in proportion to it",
        _descent(lambda h, b, g: 2 * math.copysign(1.0, _sigmoid(g) - _sigmoid(b * h))),
        "common",
    ),
    (
        "beta-forgotten-in-the-sigmoid",
        "the policy's win probability is sigmoid(beta h), not sigmoid(h)",
        _descent(lambda h, b, g: 2 * b * (_sigmoid(g) - _sigmoid(h))),
        "common",
    ),
    (
        "one-logit",
        "both logits move, in opposite directions: h changes by twice the step of one of them",
        _descent(lambda h, b, g: b * (_sigmoid(g) - _sigmoid(b * h))),
        "common",
    ),
    (
        "chosen-always-wins",
        "y1 does not win every comparison: the mean loss contains both orders",
        _descent(lambda h, b, g: 2 * b * _sigmoid(-b * h)),
        "common",
    ),
    (
        "one-long-step",
        "the slope changes from step to step: this is the first one, repeated",
        _descent(at_once=True),
        "common",
    ),
    (
        "ascent",
        "you went uphill: a loss is descended",
        _descent(lambda h, b, g: -2 * b * (_sigmoid(g) - _sigmoid(b * h))),
        "common",
    ),
    (
        "optimum-without-beta",
        "the optimum is where beta h = gap, not h = gap",
        _descent(optimum=lambda b, g: g),
        "common",
    ),
    (
        "optimum-times-beta",
        "beta h = gap at the optimum: divide by beta",
        _descent(optimum=lambda b, g: g * b),
        "common",
    ),
    (
        "optimum-infinite",
        "both orders occur in the comparisons, so the optimum is finite",
        _descent(optimum=lambda b, g: 700.0),
        "common",
    ),
    ("other-direction", "this is KL(ref || pi)", _descent(kl=_reverse_kl), "common"),
    (
        "base-2",
        "logarithms are natural: both numbers are in bits",
        _descent(kl=lambda h: _kl_from_coin(h) / math.log(2)),
        "common",
    ),
    (
        "no-log-2",
        "this is minus the entropy: the reference is uniform, and adds log 2",
        _descent(kl=lambda h: _kl_from_coin(h) - math.log(2)),
        "common",
    ),
    (
        "kl-of-the-margin",
        "the policy's log-odds are h: beta h is the margin",
        lambda b, lr, n, g: (_kl_from_coin(b * _odds_after(b, lr, n, g)), _kl_from_coin(g)),
        "common",
    ),
    (
        "overflow",
        "right as a formula, but it overflows, or takes log 0, where h is large: exp(-|h|) stays finite",
        _descent(kl=_kl_by_exp),
        "common",
    ),
    (
        "second-order",
        "h^2/8 is the KL near the reference only",
        _descent(kl=lambda h: h**2 / 8),
        "common",
    ),
    (
        "entropy",
        "this is the entropy of the policy: the KL from the uniform reference is log 2 minus it",
        _descent(kl=lambda h: math.log(2) - _kl_from_coin(h)),
        "common",
    ),
)
gs.right("autograd", lambda *run: [_kl_from_coin(_odds_after(*run)), _kl_from_coin(run[3] / run[0])])


def _by_numpy(beta: float, lr: float, steps: int, gap: float) -> Any:
    p, win = np.array([0.5, 0.5]), 1 / (1 + np.exp(-gap))
    for _ in range(steps):
        model = p[0] ** beta / (p**beta).sum()
        p = p * np.exp(lr * beta * (win - model) * np.array([1, -1]))
        p = p / p.sum()
    best = np.exp(np.array([gap / beta, 0]) - max(gap / beta, 0))
    best = best / best.sum()
    return [sum(x * np.log(2 * x) for x in q if x > 0) for q in (p, best)]


gs.right("in the probabilities, numpy", _by_numpy)
gs.right("four digits", lambda *run: [float(f"{x:.4g}") for x in dpo_kl_after(*run)])
gs.right("four decimals", lambda *run: [round(x, 4) for x in dpo_kl_after(*run)])


def _in_float32(beta: float, lr: float, steps: int, gap: float) -> Any:
    """torch.optim.SGD in single precision, and log_softmax."""
    logits = torch.zeros(2, requires_grad=True)
    optimiser, win = torch.optim.SGD([logits], lr=lr), torch.sigmoid(tensor(gap))
    for _ in range(steps):
        optimiser.zero_grad()
        margin = beta * (logits[0] - logits[1])
        (-win * logsigmoid(margin) - (1 - win) * logsigmoid(-margin)).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    laws = [x.log_softmax(0) for x in (logits.detach(), tensor([gap / beta, 0.0]))]
    return [(p.exp() * (p + math.log(2))).sum() for p in laws]


gs.right("torch.optim.SGD, float32", _in_float32)


# -- a derivation with false lines -----------------------------------------------------------------------

_FALSE = {3, 4, 6, 7, 8, 10}

ll = Question(
    id="dpo_last_line",
    title="from Bradley-Terry to DPO: find the false lines",
    chapter=7,
    kind="find the false lines",
    theory=True,
    variable="false_lines",
    reference=_FALSE,
    reference_source="false_lines = {3, 4, 6, 7, 8, 10}",
    accept=lines(10, "line", "{1, 2}"),
    hints=(
        "Put numbers into every line: three responses, any rewards, any policy. Which side of line 4 grows when the reward of "
        "the chosen response grows?",
        "Of each quantity ask what it depends on: Z on the prompt; a prompt's log-probability on neither response; padding's on the number of "
        "pad tokens; the loss on one ratio per pair.",
        "P(y_w over y_l) = sigmoid(r_w - r_l), L = -E log sigmoid(r^_w - r^_l), grad L = -beta E[sigmoid(r^_l - r^_w) "
        "(grad log pi_w - grad log pi_l)].",
    ),
    explanation="Line 3: for two prompts beta (log Z(x) - log Z(x')) remains; that both responses answer one prompt is what makes log Z "
    "cancel. Line 4: the winner's reward belongs in the numerator. Line 6: the sigmoid is lost, and the two implicit rewards are "
    "subtracted; the argument of this logarithm can be negative. Line 7: the weight is sigmoid(-A), large for pairs in the wrong "
    "order. Line 8: every copy of a pair reads the same ratio. Line 10: padding differs with the response's length and does not cancel, "
    "while the prompt's tokens do (line 9). Lines 1 and 2 are the best policy and its logarithm; line 5 holds since c(x) cancels in the difference and in pi*.",
    probes=lambda answer: answer,
)


@ll.case("at least four lines are named, and none of them is true", 1, "put numbers into both sides of each line")
def _(found: Any) -> None:
    for line in sorted(found - _FALSE):
        require(False, f"line {line} is true")
    require(len(found) > 3, "more than three lines are false")


@ll.case("all false lines are found, and only those", 2, "judge each line on its own")
def _(found: Any) -> None:
    missing = len(_FALSE - found)
    require(not missing, f"{missing} of {len(_FALSE)} false lines not found")
    extra = len(found - _FALSE)
    require(not extra, f"{extra} true {'line' if extra == 1 else 'lines'} among them")


ll.plant(
    (
        "two-prompts-missed",
        "line 3 is false: log Z belongs to a prompt, and cancels only between responses to the same one",
        _FALSE - {3},
        "W-DPO-15",
    ),
    (
        "numerator-missed",
        "line 4 is false: this is the probability that y_l wins",
        _FALSE - {4},
        "W-DPO-10",
    ),
    (
        "last-line-missed",
        "line 6 is false: the sigmoid is lost, and a difference has become a sum",
        _FALSE - {6},
        "W-DPO-11",
    ),
    (
        "weight-missed",
        "line 7 is false: the weight is sigmoid(-A), pairs in the right order fade",
        _FALSE - {7},
        "W-DPO-9",
    ),
    (
        "copies-missed",
        "line 8 is false: every copy of a pair reads the same ratio, so copies tell nothing new apart",
        _FALSE - {8},
        "W-DPO-4",
    ),
    (
        "padding-missed",
        "line 10 is false: the two responses have different numbers of pad tokens",
        _FALSE - {10},
        "W-DPO-16",
    ),
    (
        "prompt-called-false",
        "line 9 is true: the prompt's log-probabilities are the same in both responses",
        _FALSE | {9},
        "W-DPO-16",
    ),
    (
        "prompt-and-padding-exchanged",
        "lines 9 and 10 are exchanged: the prompt cancels, padding does not",
        _FALSE - {10} | {9},
        "W-DPO-16",
    ),
    (
        "log-z-called-false",
        "line 2 is true: log Z is part of the reward, and cancels later, in the difference",
        _FALSE | {2},
        "common",
    ),
    (
        "best-policy-called-false",
        "line 1 is true: the best policy is the reference, tilted by e^(r/beta)",
        _FALSE | {1},
        "common",
    ),
    (
        "shift-called-false",
        "line 5 is true: a constant of the prompt cancels in the difference, and in the normaliser",
        _FALSE | {5},
        "common",
    ),
    (
        "log-z-exchanged",
        "lines 2 and 3 are exchanged: log Z is part of the reward, and cancels for one prompt only",
        _FALSE - {3} | {2},
        "W-DPO-15",
    ),
    (
        "true-lines",
        "these are the true lines: the false ones are asked for",
        set(range(1, 11)) - _FALSE,
        "common",
    ),
    (
        "counted-from-0",
        "lines are counted from 1: each of your numbers is one too small",
        {line - 1 for line in _FALSE},
        "common",
    ),
    (
        "gradient-only",
        "lines 6 and 7 are both false: a sigmoid is missing in one and has the wrong sign in the other",
        _FALSE - {6, 7},
        "W-DPO-11",
    ),
)
ll.right("a list", [10, 8, 7, 6, 4, 3])
ll.right("numpy integers", np.array([3, 4, 6, 7, 8, 10]))


# -- features for which the chosen response loses --------------------------------------------------------

_STEPS, _RATE = 20, 0.1


def _feature_table(answer: Any) -> Tensor:
    x = as_tensor(answer, "your features")
    x = x[:, None] if x.ndim == 1 else x
    if x.ndim != 2 or len(x) != 3 or not 1 <= x.shape[1] <= 5:
        raise Fail(f"your features: got shape {tuple(x.shape)}, expected three rows of 1 to 5 numbers")
    if not torch.isfinite(x).all() or x.abs().max() > 10:
        raise Fail("your features: expected numbers between -10 and 10")
    return x


def _trained(features: Tensor) -> tuple[Tensor, float]:
    """Probabilities and DPO loss after gradient descent on row 0 over row 1, from a uniform reference, beta 1."""
    theta, zero = torch.zeros(features.shape[1], dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for step in range(_STEPS + 1):
        x = theta.requires_grad_()
        lp = (features @ x).log_softmax(0)
        loss = dpo_loss(lp[0], lp[1], zero, zero, 1.0)
        if step < _STEPS:
            theta = (x - _RATE * torch.autograd.grad(loss, x)[0]).detach()
    return lp.exp().detach(), loss.item()


def _where_the_third_lies(features: Tensor) -> str:
    """The place of the third response on the line from the rejected (0) to the chosen one (1)."""
    own = features[:, (features != features[0]).any(0)]  # a feature that all three share moves nothing
    gram = own @ own.T
    if (gram - torch.diag(gram.diagonal())).abs().max() < 1e-6 and gram.diagonal().min() > 0:
        return "features of their own"
    direction = features[0] - features[1]
    place = ((features[2] - features[1]) @ direction / direction.square().sum()).item()
    if abs(place) < 1e-3 or abs(place - 1) < 1e-3:
        return f"at {round(place)}"
    return "behind" if place < 0 else "between" if place < 1 else "beyond"


def _displaced_kind(features: Tensor) -> str:
    probs, loss = _trained(features)
    if loss > math.log(2) - 0.01:
        return "no difference" if (features[0] - features[1]).abs().max() < 1e-6 else "hardly moved"
    if probs[0] < 1 / 3 - 0.01:
        return "right"
    return "hardly falls" if probs[0] < 1 / 3 else _where_the_third_lies(features)


ds = Question(
    id="displacement",
    title="features for which the chosen response loses",
    chapter=7,
    kind="counterexample",
    theory=True,
    variable="features",
    reference=[[1.0], [0.0], [4.0]],
    reference_source="features = [[1.0], [0.0], [4.0]]",
    accept=_feature_table,
    hints=(
        "In which direction does theta move, and whose logit moves with it?",
        "theta moves along f_w - f_l, so the logit of y moves by f_y . (f_w - f_l). The chosen response loses if its logit gains less "
        "than the average one: give y3 more of what sets the chosen apart from the rejected.",
        "At the start log pi(y_w) changes by a positive multiple of (f_w - mean f) . (f_w - f_l); with one feature, f_w = 1 and f_l = 0, it falls "
        "if f_3 exceeds 2.",
    ),
    explanation="The gradient moves theta along f_w - f_l, and the logit of y by f_y . (f_w - f_l). A log-probability is a logit minus what is common "
    "to all, so log pi(y_w) changes by a multiple of (f_w - mean f) . (f_w - f_l). With the features 1, 0 and 4 the third response gains most: after 20 "
    "steps the probabilities are 0.080, 0.036 and 0.884, and the loss has fallen from 0.693 to 0.371. In a table, with a feature "
    "for each response, this cannot happen. In a language model responses share parameters: what both responses of "
    "a pair have in common does not move, and a third one with more of the difference takes what both lose.",
    probes=_displaced_kind,
)


@ds.case("training works: the loss falls below 0.683", 1, "chosen and rejected must differ in a feature")
def _(features: Any) -> None:
    loss = _trained(features)[1]
    require(
        loss < math.log(2) - 0.01, f"after {_STEPS} steps the loss is {loss:.4f}, at the start it is {math.log(2):.4f}"
    )


@ds.case("and yet the chosen response ends below 0.323", 2, "who else has what sets the chosen one apart?")
def _(features: Any) -> None:
    probs, loss = _trained(features)
    require(loss < math.log(2) - 0.01, f"the loss ends at {loss:.4f}: training hardly tells chosen from rejected")
    require(probs[0] < 1 / 3 - 0.01, f"the probabilities end at {show(probs)}, the chosen one first")


ds.plant(
    (
        "table",
        "a feature for each response is a table, where the chosen response always gains: give y3 some of the chosen one's feature",
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]],
        "W-DPO-14",
    ),
    (
        "between",
        "along the line from the rejected to the chosen response y3 lies between the two: it gains less than the chosen "
        "one, which therefore gains",
        [[1.0], [-1.0], [0.4]],
        "W-DPO-14",
    ),
    (
        "behind",
        "y3 lies on the side of the rejected response and loses with it: it must lie on the other side",
        [[0.0], [1.0], [4.0]],
        "common",
    ),
    (
        "not-far-enough",
        "y3 does lie beyond the chosen response, but not by more than the rejected one lies behind it",
        [[1.0], [0.0], [1.3]],
        "common",
    ),
    (
        "third-as-the-chosen",
        "along the line from the rejected to the chosen response y3 is where the chosen one is: both gain alike",
        [[1.0], [0.0], [1.0]],
        "common",
    ),
    (
        "third-as-the-rejected",
        "along the line from the rejected to the chosen response y3 is where the rejected one is: both lose, the chosen one gains",
        [[1.0], [0.0], [0.0]],
        "common",
    ),
    (
        "no-difference",
        "chosen and rejected have the same features: no theta tells them apart, and the loss stays at log 2",
        [[1.0], [1.0], [4.0]],
        "common",
    ),
    (
        "hardly-moved",
        "the difference between the chosen and the rejected response is too small: in 20 steps the loss hardly falls",
        [[0.1], [0.0], [0.4]],
        "common",
    ),
    (
        "hardly-falls",
        "the chosen response ends below its start, but by less than 0.01: let y3 lie farther out",
        [[1.0], [0.0], [1.6]],
        "common",
    ),
)
ds.right("one number each, numpy", np.array([0.5, -0.5, 5.0]))
ds.right("two features", tensor([[1.0, 1.0], [1.0, 0.0], [0.0, 4.0]]))
ds.right("integers", ((1, 2), (0, 2), (6, 2)))


CHAPTER: Sequence[Question] = (dp, dw, dg, bl, bp, dk, ig, gs, ll, ds)
