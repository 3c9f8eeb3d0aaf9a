"""Losses on pairs: identities between the methods, known minimisers, published numbers, extremes in 80 digits."""

import itertools
import math

import mpmath
import pytest
import torch

from planting import DTYPES, close, edited, f64, gradients, leaf, mp, normal
from rlhfkit.preference_losses import (
    bradley_terry_loss,
    conservative_dpo_loss,
    dpo_loss,
    hinge_dpo_loss,
    implicit_rewards,
    ipo_loss,
)

pytestmark = pytest.mark.usefixtures("device")

INF, NAN = float("inf"), float("nan")
DIFFERENCES = [0.0, 1.0, -1.0, 30.0, -30.0, 1e4, -1e4, 1e-4]


def exact_softplus(x):
    """log(1 + exp(x)) in 80 digits."""
    with mpmath.workdps(80):
        return float(mpmath.log1p(mpmath.exp(x)) if x < 200 else x + mpmath.exp(-x))


def exact_sigmoid(x):
    with mpmath.workdps(80):
        return float(1 / (1 + mpmath.exp(-x)))


def quadruple(seed=0):
    return tuple(normal(6, seed=seed + i) - 5 for i in range(4))


def test_bradley_terry_wins_and_losses_sum_to_one(bradley_terry_loss=bradley_terry_loss):
    a, b = normal(6), normal(6, seed=1)
    win, lose = torch.exp(-bradley_terry_loss(a, b)), torch.exp(-bradley_terry_loss(b, a))
    close(win + lose, torch.ones_like(a))
    close(win / lose, torch.exp(a - b))
    close(bradley_terry_loss(a, a), torch.full_like(a, math.log(2)))


def test_bradley_terry_agrees_with_80_digits_values_and_slopes(bradley_terry_loss=bradley_terry_loss):
    for dtype in DTYPES:
        chosen = leaf(torch.tensor(DIFFERENCES, dtype=dtype))
        rejected = leaf(torch.zeros_like(chosen))
        loss = bradley_terry_loss(chosen, rejected)
        exact = mp(chosen.detach())
        close(loss.detach(), loss.new_tensor([exact_softplus(-d) for d in exact]), rtol=1e-6, atol=1e-30)
        slopes = torch.autograd.grad(loss.sum(), (chosen, rejected))
        close(slopes[0], loss.new_tensor([-exact_sigmoid(-d) for d in exact]))
        close(slopes[1], -slopes[0])


def test_bradley_terry_margin_moves_the_difference_and_is_constant(bradley_terry_loss=bradley_terry_loss):
    a, b, margin = normal(6), normal(6, seed=1), normal(6, seed=2).abs()
    close(bradley_terry_loss(a, b, margin), bradley_terry_loss(a - margin, b))
    slopes = gradients(bradley_terry_loss, a, b, margin)
    assert (slopes[0] != 0).all() and (slopes[2] == 0).all()


def test_bradley_terry_does_not_hide_nan(bradley_terry_loss=bradley_terry_loss):
    assert bradley_terry_loss(f64([NAN, 0.0]), f64([0.0, NAN])).isnan().all()
    assert bradley_terry_loss(f64([-INF]), f64([0.0])).item() == INF


def test_dpo_loss_is_log_2_at_the_reference(dpo_loss=dpo_loss):
    for dtype in DTYPES:
        chosen, rejected = normal(6, dtype=dtype), normal(6, seed=1, dtype=dtype)
        close(dpo_loss(chosen, rejected, chosen, rejected, 0.1), torch.full_like(chosen, math.log(2)))


def test_dpo_loss_at_the_optimal_policy_is_the_reward_model_s_loss(dpo_loss=dpo_loss):
    """pi ~ ref exp(score / beta) has the scores as its implicit rewards, up to a constant."""
    ref_logprobs, scores = normal(5).log_softmax(-1), normal(5, seed=1)
    for beta in (0.1, 1.0, 5.0):
        logprobs = (ref_logprobs + scores / beta).log_softmax(-1)
        i, j = (torch.tensor(x) for x in zip(*itertools.permutations(range(5), 2), strict=True))
        got = dpo_loss(logprobs[i], logprobs[j], ref_logprobs[i], ref_logprobs[j], beta)
        close(got, bradley_terry_loss(scores[i], scores[j]))


def test_dpo_loss_sees_a_lower_loss_where_99_percent_lies_on_a_response_nobody_compared(dpo_loss=dpo_loss):
    """Theorem 4.1 of Xu et al.: ref (.5, .49, .01), beta 0.1."""
    ref = f64([0.5, 0.49, 0.01]).log()
    sane, mad = f64([0.989999, 1e-6, 0.01]).log(), f64([0.00999999, 1e-8, 0.99]).log()
    losses = [dpo_loss(p[:1], p[1:2], ref[:1], ref[1:2], 0.1).item() for p in (sane, mad)]
    assert [round(loss, 5) for loss in losses] == [0.22470, 0.22450]


def test_dpo_loss_agrees_with_80_digits_values_and_slopes(dpo_loss=dpo_loss):
    for dtype, beta in itertools.product(DTYPES, (0.5, 2.0)):
        chosen = leaf(torch.tensor(DIFFERENCES, dtype=dtype))
        zero = torch.zeros_like(chosen)
        loss = dpo_loss(chosen, zero.detach(), zero.detach(), zero.detach(), beta)
        exact = [beta * d for d in mp(chosen.detach())]
        close(loss.detach(), loss.new_tensor([exact_softplus(-d) for d in exact]), rtol=1e-6, atol=1e-30)
        close(torch.autograd.grad(loss.sum(), chosen)[0], loss.new_tensor([-beta * exact_sigmoid(-d) for d in exact]))


def reference_is_constant(loss):
    slopes = gradients(loss, *quadruple())
    close(slopes[0], -slopes[1])
    assert (slopes[0] != 0).any() and (slopes[2] == 0).all() and (slopes[3] == 0).all()


def sees_only_log_ratios(loss):
    """A constant added to policy and reference of one response changes nothing; nor one added to all of pi's."""
    chosen, rejected, ref_chosen, ref_rejected = quadruple()
    expected = loss(chosen, rejected, ref_chosen, ref_rejected)
    close(loss(chosen + 3, rejected, ref_chosen + 3, ref_rejected), expected)
    close(loss(chosen + 3, rejected + 3, ref_chosen, ref_rejected), expected)
    close(loss(chosen, rejected + 3, ref_chosen, ref_rejected + 3), expected)
    assert expected.shape == chosen.shape and expected.std() > 0


def keeps_nan(loss):
    for at in range(4):
        inputs = [f64([NAN if i == at else 0.0]) for i in range(4)]
        assert loss(*inputs).isnan().all()


def test_dpo_loss_is_a_function_of_log_ratios_with_a_constant_reference(dpo_loss=dpo_loss):
    for check in (reference_is_constant, sees_only_log_ratios, keeps_nan):
        check(lambda *x: dpo_loss(*x, 0.3))


def test_implicit_rewards_recover_the_scores_a_policy_is_optimal_for(implicit_rewards=implicit_rewards):
    ref_logprobs, scores = normal(5).log_softmax(-1), normal(5, seed=1)
    for beta in (0.1, 2.0):
        rewards = implicit_rewards((ref_logprobs + scores / beta).log_softmax(-1), ref_logprobs, beta)
        close(rewards - rewards.mean(), scores - scores.mean())


def test_implicit_rewards_are_detached_and_keep_nan(implicit_rewards=implicit_rewards):
    assert not implicit_rewards(leaf(normal(3)), leaf(normal(3)), 0.1).requires_grad
    assert implicit_rewards(f64([NAN]), f64([0.0]), 0.1).isnan().all()


def at_gap(loss, gap, *settings):
    """Value and slope in the log-ratio difference, at a gap in nats."""
    h = leaf(f64([gap]))
    zero = f64([0.0])
    value = loss(h, zero, zero, zero, *settings)
    return value.item(), torch.autograd.grad(value, h)[0].item()


def test_ipo_loss_stops_at_a_gap_of_one_over_two_tau(ipo_loss=ipo_loss):
    """And on two arms with a uniform reference the winner's probability is sigmoid(1 / (2 tau))."""
    for tau, winner in ((0.1, 0.9933), (0.5, 0.7311), (1.0, 0.6225)):
        assert at_gap(ipo_loss, 1 / (2 * tau), tau) == (0.0, 0.0)
        value, slope = at_gap(ipo_loss, 0.0, tau)
        assert math.isclose(value, 1 / (4 * tau**2)) and math.isclose(slope, -1 / tau)
        p = leaf(f64([1 / (2 * tau)]).sigmoid())
        assert round(p.item(), 4) == winner
        half = f64([0.5]).log()
        loss = ipo_loss(p.log(), (1 - p).log(), half, half, tau)
        assert abs(torch.autograd.grad(loss, p)[0].item()) < 1e-10


def test_ipo_loss_is_a_function_of_log_ratios_with_a_constant_reference(ipo_loss=ipo_loss):
    for check in (reference_is_constant, sees_only_log_ratios, keeps_nan):
        check(lambda *x: ipo_loss(*x, 0.3))


def test_ipo_loss_grows_on_both_sides_however_far(ipo_loss=ipo_loss):
    for dtype in DTYPES:
        h = torch.tensor([-1e4, 1e4], dtype=dtype)
        close(ipo_loss(h, 0 * h, 0 * h, 0 * h, 0.5), h.new_tensor([10001.0**2, 9999.0**2]))


def test_conservative_dpo_loss_mixes_the_two_labels(conservative_dpo_loss=conservative_dpo_loss):
    chosen, rejected, ref_chosen, ref_rejected = inputs = quadruple()
    right = dpo_loss(*inputs, 0.3)
    wrong = dpo_loss(rejected, chosen, ref_rejected, ref_chosen, 0.3)
    for eps in (0.0, 0.1, 0.5, 1.0):
        close(conservative_dpo_loss(*inputs, 0.3, eps), (1 - eps) * right + eps * wrong)


def test_conservative_dpo_loss_is_smallest_at_the_log_odds_of_the_labels(conservative_dpo_loss=conservative_dpo_loss):
    for beta, eps in ((0.1, 0.1), (0.5, 0.25), (1.0, 0.4)):
        best = math.log((1 - eps) / eps) / beta
        value, slope = at_gap(conservative_dpo_loss, best, beta, eps)
        assert abs(slope) < 1e-12
        assert math.isclose(value, -eps * math.log(eps) - (1 - eps) * math.log(1 - eps))  # the entropy of the label
        assert all(at_gap(conservative_dpo_loss, best + d, beta, eps)[0] > value for d in (-0.5, 0.5))


def test_conservative_dpo_loss_is_finite_for_gaps_of_1e4(conservative_dpo_loss=conservative_dpo_loss):
    for dtype in DTYPES:
        h = leaf(torch.tensor([1e4, -1e4], dtype=dtype))
        zero = torch.zeros_like(h).detach()
        loss = conservative_dpo_loss(h, zero, zero, zero, 1.0, 0.25)
        close(loss.detach(), zero.new_tensor([2500.0, 7500.0]))
        close(torch.autograd.grad(loss.sum(), h)[0], zero.new_tensor([0.25, -0.75]))


def test_conservative_dpo_loss_is_a_function_of_log_ratios(conservative_dpo_loss=conservative_dpo_loss):
    for check in (reference_is_constant, sees_only_log_ratios, keeps_nan):
        check(lambda *x: conservative_dpo_loss(*x, 0.3, 0.1))


def test_hinge_loss_is_1_at_the_reference_and_0_without_slope_beyond_the_margin(hinge_dpo_loss=hinge_dpo_loss):
    for beta in (0.1, 0.5):
        assert at_gap(hinge_dpo_loss, 0.0, beta) == (1.0, -beta)
        assert at_gap(hinge_dpo_loss, -2.0, beta) == (1.0 + 2 * beta, -beta)
        assert at_gap(hinge_dpo_loss, 1.01 / beta, beta) == (0.0, 0.0)
        value, slope = at_gap(hinge_dpo_loss, 0.5 / beta, beta)
        assert math.isclose(value, 0.5) and slope == -beta


def test_hinge_loss_is_a_function_of_log_ratios_with_a_constant_reference(hinge_dpo_loss=hinge_dpo_loss):
    for check in (reference_is_constant, sees_only_log_ratios, keeps_nan):
        check(lambda *x: hinge_dpo_loss(*x, 0.3))


def _pair_bugs(function, loss_of_h):
    """What can go wrong in every loss of h = log(pi/ref)(chosen) - log(pi/ref)(rejected)."""
    return {
        "chosen and rejected exchanged": lambda c, r, rc, rr, *s: function(r, c, rr, rc, *s),
        "references exchanged": lambda c, r, rc, rr, *s: function(c, r, rr, rc, *s),
        "reference forgotten": lambda c, r, rc, rr, *s: function(c, r, 0 * rc, 0 * rr, *s),
        "reference added": lambda c, r, rc, rr, *s: function(c, r, -rc, -rr, *s),
        "reference not detached": lambda c, r, rc, rr, *s: loss_of_h((c - rc) - (r - rr), *s),
        "averaged": lambda *a: function(*a).mean(),
        "policy detached": lambda c, r, rc, rr, *s: function(c.detach(), r.detach(), rc, rr, *s) + 0 * c,
    }


logsigmoid = torch.nn.functional.logsigmoid
PLANTED = {
    "bradley_terry_loss": {
        "log of the sigmoid": lambda c, r, m=None: -torch.log(torch.sigmoid(c - r - (0 if m is None else m.detach()))),
        "swapped arguments": lambda c, r, m=None: bradley_terry_loss(r, c, m),
        "sign forgotten": lambda c, r, m=None: -bradley_terry_loss(c, r, m),
        "margin added": lambda c, r, m=None: bradley_terry_loss(c, r, None if m is None else -m),
        "margin ignored": lambda c, r, m=None: bradley_terry_loss(c, r),
        "margin not detached": edited(bradley_terry_loss, ("margin.detach()", "margin")),
        "hinge": lambda c, r, m=None: torch.relu(1 - (c - r)),
        "naive log(1 + exp(-d))": lambda c, r, m=None: torch.log(
            1 + torch.exp(-(c - r - (0 if m is None else m.detach())))
        ),
        "averaged": lambda *a: bradley_terry_loss(*a).mean(),
        "rejected detached": lambda c, r, m=None: bradley_terry_loss(c, r.detach() + 0 * r, m),
    },
    "dpo_loss": _pair_bugs(dpo_loss, lambda h, beta: -logsigmoid(beta * h))
    | {
        "beta forgotten": lambda *a: dpo_loss(*a[:4], 1.0),
        "divided by beta": lambda *a: dpo_loss(*a[:4], 1 / a[4]),
        "beta on the policy only": lambda c, r, rc, rr, beta: -logsigmoid(beta * (c - r) - (rc - rr).detach()),
        "beta outside": lambda *a: a[4] * dpo_loss(*a[:4], 1.0),
        "log of the sigmoid": edited(dpo_loss, ("-logsigmoid(beta * h)", "-(beta * h).sigmoid().log()")),
        "wrong sign": lambda *a: -dpo_loss(*a),
    },
    "implicit_rewards": {
        "swapped arguments": lambda p, q, beta: implicit_rewards(q, p, beta),
        "beta forgotten": lambda p, q, beta: implicit_rewards(p, q, 1.0),
        "divided by beta": lambda p, q, beta: implicit_rewards(p, q, 1 / beta),
        "not detached": lambda p, q, beta: beta * (p - q),
        "reference forgotten": lambda p, q, beta: beta * p.detach(),
        "ratio of probabilities": lambda p, q, beta: beta * (p - q).exp().detach(),
    },
    "ipo_loss": _pair_bugs(ipo_loss, lambda h, beta: (h - 1 / (2 * beta)).square())
    | {
        "gap 1 / tau": lambda *a: ipo_loss(*a[:4], a[4] / 2),
        "gap tau / 2": edited(ipo_loss, ("1 / (2 * beta)", "beta / 2")),
        "tau on the log-ratios": edited(ipo_loss, ("h - 1 / (2 * beta)", "beta * h - 1 / 2")),
        "not squared": edited(ipo_loss, (".square()", ".abs()")),
        "sign of the gap": edited(ipo_loss, ("h - 1", "h + 1")),
    },
    "conservative_dpo_loss": _pair_bugs(
        conservative_dpo_loss,
        lambda h, beta, eps: -(1 - eps) * logsigmoid(beta * h) - eps * logsigmoid(-beta * h),
    )
    | {
        "smoothing ignored": lambda *a: dpo_loss(*a[:5]),
        "eps and 1 - eps exchanged": lambda *a: conservative_dpo_loss(*a[:5], 1 - a[5]),
        "second label with the same sign": edited(
            conservative_dpo_loss, ("logsigmoid(-beta * h)", "logsigmoid(beta * h)")
        ),
        "second term subtracted, as in robust DPO": edited(
            conservative_dpo_loss, ("- label_smoothing * logsigmoid", "+ label_smoothing * logsigmoid")
        ),
        "beta forgotten in the second term": edited(conservative_dpo_loss, ("logsigmoid(-beta * h)", "logsigmoid(-h)")),
    },
    "hinge_dpo_loss": _pair_bugs(hinge_dpo_loss, lambda h, beta: torch.relu(1 - beta * h))
    | {
        "no hinge": edited(hinge_dpo_loss, ("relu(1 - beta * h)", "1 - beta * h")),
        "hinge at 0": edited(hinge_dpo_loss, ("1 - beta * h", "-beta * h")),
        "margin 1 in nats": edited(hinge_dpo_loss, ("1 - beta * h", "beta * (1 - h)")),
        "wrong sign": edited(hinge_dpo_loss, ("1 - beta * h", "1 + beta * h")),
        "squared": edited(hinge_dpo_loss, ("relu(1 - beta * h)", "relu(1 - beta * h).square()")),
    },
}
EXEMPT = set()
