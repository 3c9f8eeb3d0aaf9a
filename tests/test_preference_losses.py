"""Losses on pairs: identities between the methods, known minimisers, published numbers, extremes in 80 digits."""

import itertools
import math

import mpmath
import pytest
import torch

from planting import DTYPES, close, edited, f64, gradients, leaf, mp, normal, raises
from rlhfkit import reference_free_losses
from rlhfkit.preference_losses import (
    bradley_terry_loss,
    conservative_dpo_loss,
    dpo_loss,
    hinge_dpo_loss,
    implicit_rewards,
    ipo_loss,
    kto_loss,
    orpo_loss,
    simpo_loss,
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


def judged(seed=0):
    """Six responses under policy and reference, and which of them were liked."""
    return normal(6, seed=seed) - 5, normal(6, seed=seed + 1) - 5, torch.tensor([True, False, True, True, False, False])


def test_kto_loss_at_the_reference_point_is_half_of_every_weight(kto_loss=kto_loss):
    """Where log(pi/ref) equals the reference point nothing is gained or lost; the slope is a quarter of the weight."""
    _, ref, desirable = judged()
    for beta, z in ((0.1, 0.0), (0.5, 2.0)):
        logprobs = leaf(ref + z)
        loss = kto_loss(logprobs, ref, desirable, f64(z), beta, 3.0, 1.4)
        weights = torch.where(desirable, 3.0, 1.4).to(loss)
        close(loss.detach(), weights / 2)
        close(
            torch.autograd.grad(loss.sum(), logprobs)[0], weights * beta * torch.where(desirable, -0.25, 0.25).to(loss)
        )
    close(kto_loss(ref, ref, desirable, f64(0.0), 0.1), torch.full_like(ref, 0.5))  # both weights are 1 if not given


def test_kto_loss_of_a_response_liked_and_disliked_is_one_together(kto_loss=kto_loss):
    """And its two values are those of Bradley-Terry: what is left of the probability to beat the reference point."""
    logprobs, ref, desirable = judged()
    z, beta = f64(0.7), 0.3
    liked, disliked = (kto_loss(logprobs, ref, d, z, beta) for d in (desirable | True, desirable & False))
    close(liked + disliked, torch.ones_like(ref))
    close(liked, 1 - torch.exp(-bradley_terry_loss(beta * (logprobs - ref), torch.full_like(ref, beta * 0.7))))
    mixed = kto_loss(logprobs, ref, desirable, z, beta, 2.0, 5.0)
    close(mixed, torch.where(desirable, 2 * liked, 5 * disliked))


def test_kto_loss_sees_the_log_ratio_less_the_reference_point_which_is_constant(kto_loss=kto_loss):
    logprobs, ref, desirable = judged()
    z = f64(0.7)
    expected = kto_loss(logprobs, ref, desirable, z, 0.3)
    close(kto_loss(logprobs + 3, ref + 3, desirable, z, 0.3), expected)
    close(kto_loss(logprobs + 3, ref, desirable, z + 3, 0.3), expected)
    slopes = gradients(lambda p, q, z: kto_loss(p, q, desirable, z, 0.3), logprobs, ref, z)
    assert (slopes[0] != 0).all() and (slopes[1] == 0).all() and (slopes[2] == 0).all()
    assert expected.shape == ref.shape and expected.std() > 0


def test_kto_loss_agrees_with_80_digits_values_and_slopes(kto_loss=kto_loss):
    for dtype, beta in itertools.product(DTYPES, (0.5, 2.0)):
        gain = leaf(torch.tensor(DIFFERENCES, dtype=dtype))
        zero = torch.zeros_like(gain).detach()
        exact = [beta * d for d in mp(gain.detach())]
        for liked, sign in ((True, -1), (False, 1)):
            loss = kto_loss(gain, zero, torch.full_like(zero, liked, dtype=torch.bool), zero[0], beta)
            # a relative error of beta |d| eps / 2 at the exponent -beta |d|
            close(loss.detach(), zero.new_tensor([exact_sigmoid(sign * d) for d in exact]), rtol=1e-5, atol=1e-30)
            slopes = [sign * beta * exact_sigmoid(d) * exact_sigmoid(-d) for d in exact]
            close(torch.autograd.grad(loss.sum(), gain)[0], zero.new_tensor(slopes))


def test_kto_loss_keeps_nan_in_its_row_and_refuses_labels_that_are_not_boolean(kto_loss=kto_loss):
    logprobs, ref, desirable = judged()
    bad = logprobs.where(torch.arange(6) != 3, NAN)
    assert kto_loss(bad, ref, desirable, f64(0.0), 0.1).isnan().tolist() == [i == 3 for i in range(6)]
    assert kto_loss(logprobs, ref, desirable, f64(NAN), 0.1).isnan().all()
    for labels in (desirable.long(), desirable.double(), desirable[:1]):
        raises(ValueError, lambda d=labels: kto_loss(logprobs, ref, d, f64(0.0), 0.1), "desirable")
    for z in (0.5, f64([0.5]), f64([0.5] * 6)):
        raises(ValueError, lambda z=z: kto_loss(logprobs, ref, desirable, z, 0.1), "kl_reference", "scalar")


LENGTHS = [3, 1, 7, 20, 5, 2], [4, 9, 7, 1, 12, 3]


def unpaired(seed=0):
    """Summed log-probabilities of both sides, negative, and the lengths."""
    chosen, rejected = (torch.tensor(x) for x in LENGTHS)
    return (
        (-normal(6, seed=seed).abs() - 0.2) * chosen,
        (-normal(6, seed=seed + 1).abs() - 0.2) * rejected,
        chosen,
        rejected,
    )


def tokens_count_by_their_mean(loss):
    """Every token of a response said twice over changes nothing; neither does the type of the lengths."""
    chosen, rejected, n, m = unpaired()
    expected = loss(chosen, rejected, n, m)
    close(loss(2 * chosen, rejected, 2 * n, m), expected)
    close(loss(chosen, 3 * rejected, n, 3 * m), expected)
    close(loss(chosen, rejected, n.double(), m.int()), expected)
    assert expected.shape == chosen.shape and expected.std() > 0
    lengths = leaf(n.double()), leaf(m.double())
    slopes = torch.autograd.grad(loss(leaf(chosen), rejected, *lengths).sum(), lengths, allow_unused=True)
    assert slopes == (None, None)


def refuses_lengths(loss):
    chosen, rejected, n, m = unpaired()
    for at, name in ((2, "chosen_lengths"), (3, "rejected_lengths")):
        for wrong in (n[:1], n.unsqueeze(1), torch.zeros_like(n), n - 1, n.double() * NAN, 7):
            inputs = [wrong if i == at else x for i, x in enumerate((chosen, rejected, n, m))]
            raises(ValueError, lambda x=inputs: loss(*x), name)
    raises(ValueError, lambda: loss(chosen, rejected[:1], n, m), "rejected_logprobs", "(1,)")


def test_simpo_loss_of_single_tokens_is_bradley_terry_with_a_margin(simpo_loss=simpo_loss):
    chosen, rejected, n, m = unpaired()
    one = torch.ones_like(n)
    for beta, margin in ((2.0, 0.0), (2.5, 1.4), (0.5, 0.3)):
        expected = bradley_terry_loss(beta * chosen, beta * rejected, torch.full_like(chosen, margin))
        close(simpo_loss(chosen, rejected, one, one, beta, margin), expected)
        close(simpo_loss(chosen * n, rejected * m, n, m, beta, margin), expected)


def test_simpo_loss_is_log_2_where_the_means_differ_by_the_margin_over_beta(simpo_loss=simpo_loss):
    _, rejected, n, m = unpaired()
    for beta, margin in ((2.0, 0.0), (2.0, 1.0), (10.0, 3.0)):
        chosen = n * (rejected / m + margin / beta)
        close(simpo_loss(chosen, rejected, n, m, beta, margin), torch.full_like(chosen, math.log(2)))
        slopes = gradients(lambda c, r, b=beta, g=margin: simpo_loss(c, r, n, m, b, g), chosen, rejected)
        close(slopes[0] * n, -slopes[1] * m)
        close(slopes[0] * n, -beta / 2 * normal(6, seed=99))  # what the helper weighs the rows with


def test_simpo_loss_counts_tokens_by_their_mean_and_knows_no_sum(simpo_loss=simpo_loss):
    tokens_count_by_their_mean(lambda *x: simpo_loss(*x, 2.0, 0.5))
    refuses_lengths(lambda *x: simpo_loss(*x, 2.0, 0.5))
    chosen, rejected, n, m = unpaired()
    close(simpo_loss(chosen + n, rejected + m, n, m, 2.0, 0.5), simpo_loss(chosen, rejected, n, m, 2.0, 0.5))
    for name, beta, margin in (("beta", -0.1, 0.5), ("beta", NAN, 0.5), ("margin", 2.0, -0.1), ("margin", 2.0, NAN)):
        raises(ValueError, lambda b=beta, g=margin: simpo_loss(chosen, rejected, n, m, b, g), name)


def test_simpo_loss_agrees_with_80_digits_values_and_slopes(simpo_loss=simpo_loss):
    for dtype, beta in itertools.product(DTYPES, (0.5, 2.0)):
        chosen = leaf(torch.tensor(DIFFERENCES, dtype=dtype) * 4)
        zero, four = torch.zeros_like(chosen).detach(), torch.full_like(chosen, 4).detach()
        loss = simpo_loss(chosen, zero, four, four, beta, 0.25)
        with mpmath.workdps(80):
            exact = [beta * d / 4 - mpmath.mpf(0.25) for d in mp(chosen.detach())]
        close(loss.detach(), zero.new_tensor([exact_softplus(-d) for d in exact]), rtol=1e-6, atol=1e-30)
        slopes = [-beta / 4 * exact_sigmoid(-d) for d in exact]
        close(torch.autograd.grad(loss.sum(), chosen)[0], zero.new_tensor(slopes))
    for at in (0, 1):
        inputs = [f64([NAN if i == at else -1.0]) for i in range(2)]
        assert simpo_loss(*inputs, f64([2.0]), f64([2.0]), 2.0, 0.5).isnan().all()


def test_orpo_loss_of_equal_means_is_the_likelihood_and_beta_log_2(orpo_loss=orpo_loss):
    _, rejected, n, m = unpaired()
    chosen = rejected / m * n
    for beta in (0.0, 0.1, 2.0):
        close(orpo_loss(chosen, rejected, n, m, beta), -rejected / m + beta * math.log(2))


def test_orpo_loss_at_known_odds_by_hand(orpo_loss=orpo_loss):
    """Probabilities 3/4 and 1/3 per token: odds 3 and 1/2, whose ratio 6 makes the second term log(7/6)."""
    n, m = torch.tensor([4, 1]), torch.tensor([2, 5])
    chosen, rejected = n * math.log(0.75), m * math.log(1 / 3)
    for beta in (0.0, 0.1, 1.0):
        right = f64([math.log(4 / 3) + beta * math.log(7 / 6)] * 2)
        close(orpo_loss(chosen.double(), rejected.double(), n, m, beta), right, atol=1e-6, rtol=1e-6)  # input is single
    wrong = math.log(3) + math.log(7)  # the other one was chosen: ratio 1/6
    close(orpo_loss(rejected.double(), chosen.double(), m, n, 1.0), f64([wrong] * 2), atol=1e-6, rtol=1e-6)


def test_orpo_loss_less_its_likelihood_is_bradley_terry_of_log_odds(orpo_loss=orpo_loss):
    """With the mean log-probability of logit x being log sigmoid(x), the log odds are x."""
    x, y, (_, _, n, m) = normal(6), normal(6, seed=1), unpaired()
    chosen, rejected = -bradley_terry_loss(x, 0 * x), -bradley_terry_loss(y, 0 * y)
    for beta in (0.1, 3.0):
        got = orpo_loss(n * chosen, m * rejected, n, m, beta)
        close(got + chosen, beta * bradley_terry_loss(x, y))


def test_orpo_loss_counts_tokens_by_their_mean(orpo_loss=orpo_loss):
    tokens_count_by_their_mean(lambda *x: orpo_loss(*x, 0.3))
    refuses_lengths(lambda *x: orpo_loss(*x, 0.3))
    inputs = unpaired()
    assert (gradients(lambda c, r: orpo_loss(c, r, *inputs[2:], 0.3), *inputs[:2])[1] != 0).all()
    for beta in (-0.1, NAN):
        raises(ValueError, lambda b=beta: orpo_loss(*inputs, b), "beta")
    for at in (0, 1):
        sides = [f64([NAN if i == at else -1.0]) for i in range(2)]
        assert orpo_loss(*sides, f64([2.0]), f64([2.0]), 0.3).isnan().all()


ORPO_MEANS = [-1e-6, -1e-4, -0.01, -0.5, -3.0, -30.0, -90.0]


def test_orpo_loss_agrees_with_80_digits_near_certainty_and_far_from_it(orpo_loss=orpo_loss):
    """Mean log-probabilities from -1e-6, where 1 - exp(a) in single precision has one digit, to -90."""
    for dtype, beta in itertools.product(DTYPES, (0.1, 1.0)):
        a, b = (torch.tensor(x, dtype=dtype) for x in zip(*itertools.product(ORPO_MEANS, repeat=2), strict=True))
        chosen, rejected = leaf(2 * a), leaf(4 * b)
        loss = orpo_loss(chosen, rejected, torch.full_like(a, 2), torch.full_like(a, 4), beta)
        slopes = torch.autograd.grad(loss.sum(), (chosen, rejected))
        values, chosen_slopes, rejected_slopes = [], [], []
        with mpmath.workdps(80):
            for p, q in zip(mp(a), mp(b), strict=True):
                gap = (p - mpmath.log(-mpmath.expm1(p))) - (q - mpmath.log(-mpmath.expm1(q)))
                values.append(float(-p + beta * mpmath.log1p(mpmath.exp(-gap))))
                miss = beta / (1 + mpmath.exp(gap))
                chosen_slopes.append(float((-1 - miss / -mpmath.expm1(p)) / 2))  # d log-odds / d a = 1 / (1 - e^a)
                rejected_slopes.append(float(miss / -mpmath.expm1(q) / 4))
        for got, exact in zip((loss.detach(), *slopes), (values, chosen_slopes, rejected_slopes), strict=True):
            # single precision: the gap, up to 100 nats, is rounded before it is an exponent
            close(got, got.new_tensor(exact), rtol=2e-5 if dtype == torch.float32 else 1e-12, atol=1e-30)


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


def _reference_free_bugs(function):
    """What can go wrong in every loss of mean log-probabilities."""
    per_token = reference_free_losses._per_token
    no_check = edited(per_token, ("lengths.numel() and not lengths.min() >= 1", "False"))
    return {
        "chosen and rejected exchanged": lambda c, r, n, m, *s: function(r, c, m, n, *s),
        "lengths exchanged": lambda c, r, n, m, *s: function(c, r, m, n, *s),
        "sums, not means": lambda c, r, n, m, *s: function(c, r, torch.ones_like(n), torch.ones_like(m), *s),
        "both by one length": lambda c, r, n, m, *s: function(c, r, (n + m) / 2, (n + m) / 2, *s),
        "the end does not count": lambda c, r, n, m, *s: function(c, r, (n - 1).clamp(min=1), (m - 1).clamp(min=1), *s),
        "rejected detached": lambda c, r, n, m, *s: function(c, r.detach() + 0 * r, n, m, *s),
        "averaged": lambda *a: function(*a).mean(),
        "empty responses accepted": _with(function, _per_token=no_check),
        "lengths not detached": _with(function, _per_token=lambda name, p, n: per_token(name, p, n) * n.detach() / n),
        "lengths broadcast": _with(
            function, _per_token=edited(per_token, ("lengths.shape != logprobs.shape", "False"))
        ),
    }


def _with(function, **names):
    """The function with other helpers."""
    changed = edited(function)
    changed.__globals__.update(names)
    return changed


def _orpo_with(log_odds):
    return _with(orpo_loss, _log_odds=log_odds)


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
    "kto_loss": {
        "liked and disliked exchanged": lambda p, q, d, z, *s: kto_loss(p, q, ~d, z, *s),
        "weights exchanged": lambda p, q, d, z, b, v=1.0, w=1.0: kto_loss(p, q, d, z, b, w, v),
        "weights forgotten": lambda p, q, d, z, b, v=1.0, w=1.0: kto_loss(p, q, d, z, b),
        "reference point added": edited(kto_loss, ("- kl_reference.detach()", "+ kl_reference.detach()")),
        "reference point forgotten": edited(kto_loss, (" - kl_reference.detach()", "")),
        "reference point outside beta": edited(
            kto_loss,
            (
                "beta * (logprobs - ref_logprobs.detach() - kl_reference.detach())",
                "beta * (logprobs - ref_logprobs.detach()) - kl_reference.detach()",
            ),
        ),
        "reference point not detached": edited(kto_loss, ("kl_reference.detach()", "kl_reference")),
        "reference not detached": edited(kto_loss, ("ref_logprobs.detach()", "ref_logprobs")),
        "policy detached": edited(kto_loss, ("(logprobs -", "(0 * logprobs + logprobs.detach() -")),
        "the liked one's sign for both": edited(kto_loss, ("torch.sigmoid(gain)", "torch.sigmoid(-gain)")),
        "value in place of loss": lambda p, q, d, z, b, v=1.0, w=1.0: (
            torch.where(d, v, w) - kto_loss(p, q, d, z, b, v, w)
        ),
        "log-sigmoid in place of sigmoid": edited(
            kto_loss, ("torch.sigmoid(-gain)", "-logsigmoid(gain)"), ("torch.sigmoid(gain)", "-logsigmoid(-gain)")
        ),
        "1 - sigmoid loses the small": edited(kto_loss, ("torch.sigmoid(-gain)", "(1 - torch.sigmoid(gain))")),
        "mask by multiplication": edited(
            kto_loss,
            (
                "torch.where(desirable, liked, disliked)",
                "(desirable * liked + ~desirable * disliked).mean() + 0 * gain",
            ),
        ),
        "labels of any type": edited(
            kto_loss,
            ('require_mask("desirable", desirable, logprobs.shape)', "pass"),
            ("torch.where(desirable", "torch.where(desirable.bool()"),
        ),
        "a reference point for each": edited(kto_loss, (" or kl_reference.ndim", "")),
        "averaged": lambda *a: kto_loss(*a).mean(),
    },
    "simpo_loss": _reference_free_bugs(simpo_loss)
    | {
        "margin added": edited(simpo_loss, ("- margin)", "+ margin)")),
        "margin forgotten": lambda *a: simpo_loss(*a[:5], 0.0),
        "margin scaled with beta": edited(
            simpo_loss, ("beta * (chosen - rejected) - margin", "beta * (chosen - rejected - margin)")
        ),
        "beta forgotten": lambda c, r, n, m, beta, margin: simpo_loss(c, r, n, m, 1.0, margin),
        "beta outside": lambda c, r, n, m, beta, margin: beta * simpo_loss(c, r, n, m, 1.0, margin / max(beta, 1e-9)),
        "log of the sigmoid": edited(
            simpo_loss,
            (
                "-logsigmoid(beta * (chosen - rejected) - margin)",
                "-(beta * (chosen - rejected) - margin).sigmoid().log()",
            ),
        ),
        "wrong sign": lambda *a: -simpo_loss(*a),
        "hinge": edited(simpo_loss, ("-logsigmoid(beta", "torch.relu(1 - beta")),
        "a negative margin accepted": edited(simpo_loss, ('require_in("margin", margin, 0.0)', "pass")),
    },
    "orpo_loss": _reference_free_bugs(orpo_loss)
    | {
        "likelihood forgotten": edited(orpo_loss, ("-chosen - beta", "-0 * chosen - beta")),
        "likelihood of the rejected": edited(orpo_loss, ("-chosen - beta", "-rejected - beta")),
        "likelihood of both": edited(orpo_loss, ("-chosen - beta", "-chosen - rejected - beta")),
        "sum of the likelihood": edited(orpo_loss, ("-chosen - beta", "-chosen_logprobs - beta")),
        "beta forgotten": lambda *a: orpo_loss(*a[:4], 1.0),
        "beta inside": edited(
            orpo_loss,
            (
                "beta * logsigmoid(_log_odds(chosen) - _log_odds(rejected))",
                "logsigmoid(beta * (_log_odds(chosen) - _log_odds(rejected)))",
            ),
        ),
        "ratio of probabilities": edited(orpo_loss, ("_log_odds(chosen) - _log_odds(rejected)", "chosen - rejected")),
        "1 - exp(a)": _orpo_with(lambda a: a - torch.log(1 - torch.exp(a))),
        "log1p(-exp(a))": _orpo_with(lambda a: a - torch.log1p(-torch.exp(a))),
        "odds upside down": _orpo_with(lambda a: torch.log(-torch.expm1(a)) - a),
        "odds without the numerator": _orpo_with(lambda a: -torch.log(-torch.expm1(a))),
        "epsilon in the logarithm": _orpo_with(lambda a: a - torch.log(-torch.expm1(a) + 1e-8)),
        "log of the sigmoid": edited(
            orpo_loss,
            (
                "logsigmoid(_log_odds(chosen) - _log_odds(rejected))",
                "(_log_odds(chosen) - _log_odds(rejected)).sigmoid().log()",
            ),
        ),
        "a negative beta accepted": edited(orpo_loss, ('require_in("beta", beta, 0.0)', "pass")),
    },
}
EXEMPT = set()
