"""Losses of policy and value, and their diagnostics: enumeration, the four quadrants of clipping, extremes."""

import itertools
import math

import mpmath
import pytest
import torch

from planting import DTYPES, close, edited, f64, gradients, leaf, mp, normal, raises
from rlhfkit.policy_losses import (
    approx_kl,
    clip_active,
    clipfrac,
    clipped_policy_loss,
    clipped_value_loss,
    reinforce_loss,
)

pytestmark = pytest.mark.usefixtures("device")

INF, NAN = float("inf"), float("nan")
LOGITS, OLD, SCORES = [1.2, -0.3, 0.4, -2.0], [-0.5, 0.9, 0.1, 0.3], [1.0, -2.0, 0.5, 3.0]


def gradient_of_expected_score(logits):
    logits = leaf(f64(logits))
    return torch.autograd.grad((logits.softmax(-1) * f64(SCORES)).sum(), logits)[0]


def test_reinforce_loss_has_the_policy_gradient_as_its_mean_slope(reinforce_loss=reinforce_loss):
    """Over all actions with their probabilities, minus the gradient of the expected score."""
    logits = leaf(f64(LOGITS))
    logprobs = logits.log_softmax(-1)
    loss = (logprobs.exp().detach() * reinforce_loss(logprobs, f64(SCORES))).sum()
    close(torch.autograd.grad(loss, logits)[0], -gradient_of_expected_score(LOGITS))


def test_reinforce_loss_by_hand_and_elementwise(reinforce_loss=reinforce_loss):
    for dtype in DTYPES:
        logprobs = torch.tensor([[-1.0, -2.0], [-3.0, -50.0]], dtype=dtype)
        advantages = torch.tensor([[2.0, -1.0], [0.0, 3.0]], dtype=dtype)
        close(reinforce_loss(logprobs, advantages), logprobs.new_tensor([[2.0, -2.0], [0.0, 150.0]]))


def test_reinforce_loss_treats_advantages_as_constant(reinforce_loss=reinforce_loss):
    slope, other = gradients(reinforce_loss, normal(2, 3), normal(2, 3, seed=1))
    assert (other == 0).all() and (slope != 0).all()


def test_reinforce_loss_does_not_hide_what_is_not_finite(reinforce_loss=reinforce_loss):
    assert reinforce_loss(f64([NAN, -1.0]), f64([1.0, NAN])).isnan().all()
    assert reinforce_loss(f64([-INF]), f64([1.0])).item() == INF


CASES = [  # advantage, ratio, loss, slope with respect to the log-probability; cliprange 0.2
    (1.0, 1.5, -1.2, 0.0),
    (1.0, 0.5, -0.5, -0.5),
    (-1.0, 1.5, 1.5, 1.5),
    (-1.0, 0.5, 0.8, 0.0),
    (2.0, 1.1, -2.2, -2.2),
    (-2.0, 0.9, 1.8, 1.8),
    (3.0, 1.0, -3.0, -3.0),
    (0.0, 1.5, 0.0, 0.0),
]


def test_clipping_stops_the_gradient_on_one_side_only(clipped_policy_loss=clipped_policy_loss):
    for dtype, (advantage, ratio, loss, slope) in itertools.product(DTYPES, CASES):
        logprob = leaf(torch.tensor([ratio], dtype=dtype).log())
        got = clipped_policy_loss(logprob, torch.zeros_like(logprob), torch.tensor([advantage], dtype=dtype))
        close(got.detach(), got.new_tensor([loss]))
        close(torch.autograd.grad(got, logprob)[0], got.new_tensor([slope]))


def test_clipping_uses_the_range_it_is_given(clipped_policy_loss=clipped_policy_loss):
    ratio = f64([1.5, 0.5, 1.5, 0.5])
    advantages = f64([1.0, -1.0, 1.0, -1.0])
    for cliprange in (0.0, 0.1, 0.3):
        got = clipped_policy_loss(ratio.log(), torch.zeros_like(ratio), advantages, cliprange)
        close(got, f64([-(1 + cliprange), 1 - cliprange] * 2))
    close(clipped_policy_loss(ratio.log(), torch.zeros_like(ratio), advantages, 0.6), -ratio * advantages)


def test_first_ppo_step_is_reinforce(clipped_policy_loss=clipped_policy_loss):
    """At ratio 1 the loss is -A and the slope that of REINFORCE, for any sampling policy."""
    logprobs, advantages = normal(3, 4) - 2, normal(3, 4, seed=1)
    close(clipped_policy_loss(logprobs, logprobs, advantages), -advantages)
    x, y = leaf(logprobs), leaf(logprobs)
    clipped_policy_loss(x, logprobs, advantages).sum().backward()
    reinforce_loss(y, advantages).sum().backward()
    close(x.grad, y.grad)


def test_unclipped_ppo_has_the_policy_gradient_from_samples_of_another_policy(clipped_policy_loss=clipped_policy_loss):
    logits, old_logprobs = leaf(f64(LOGITS)), f64(OLD).log_softmax(-1)
    loss = (old_logprobs.exp() * clipped_policy_loss(logits.log_softmax(-1), old_logprobs, f64(SCORES), 1e6)).sum()
    close(torch.autograd.grad(loss, logits)[0], -gradient_of_expected_score(LOGITS))


def test_clipped_policy_loss_treats_old_policy_and_advantages_as_constant(clipped_policy_loss=clipped_policy_loss):
    inputs = 0.1 * normal(3, 4), 0.1 * normal(3, 4, seed=1), normal(3, 4, seed=2)
    slopes = gradients(clipped_policy_loss, *inputs)
    assert (slopes[0] != 0).any() and (slopes[1] == 0).all() and (slopes[2] == 0).all()


def test_clipped_policy_loss_is_right_for_log_ratios_of_tens(clipped_policy_loss=clipped_policy_loss):
    """Where clipping is active the value stays finite and the slope 0, even after exp overflows."""
    for dtype, log_ratio in itertools.product(DTYPES, (20.0, 50.0, 80.0, 89.0, 99.0, -20.0, -50.0, -99.0, 800.0)):
        logprobs = leaf(torch.tensor([log_ratio, log_ratio], dtype=dtype))
        advantages = logprobs.new_tensor([2.0, -2.0])
        loss = clipped_policy_loss(logprobs, torch.zeros_like(advantages), advantages)
        (slope,) = torch.autograd.grad(loss.sum(), logprobs)
        ratio = logprobs.detach().exp()
        if log_ratio > 0:
            close(loss.detach(), torch.stack([ratio.new_tensor(-2.4), 2 * ratio[1]]))
            close(slope, torch.stack([ratio.new_tensor(0.0), 2 * ratio[1]]))
        else:
            close(loss.detach(), torch.stack([-2 * ratio[0], ratio.new_tensor(1.6)]), rtol=1e-6, atol=0)
            close(slope, torch.stack([-2 * ratio[0], ratio.new_tensor(0.0)]), rtol=1e-6, atol=0)


def test_clipped_policy_loss_does_not_hide_nan(clipped_policy_loss=clipped_policy_loss):
    for junk in itertools.product((0.0, NAN), repeat=3):
        if any(map(math.isnan, junk)):
            assert clipped_policy_loss(*(f64([x]) for x in junk)).isnan().all()


def test_value_loss_without_clipping_is_half_the_squared_error(clipped_value_loss=clipped_value_loss):
    for dtype in DTYPES:
        values = leaf(torch.tensor([[1.0, -2.0]], dtype=dtype))
        loss = clipped_value_loss(values, torch.full_like(values, 9.0), values.new_tensor([[4.0, 0.0]]))
        close(loss.detach(), values.new_tensor([[4.5, 2.0]]))
        close(torch.autograd.grad(loss.sum(), values)[0], values.new_tensor([[-3.0, -2.0]]))


VALUE_CASES = [  # value, old, return, loss, slope; cliprange 0.5
    (1.0, 0.0, 3.0, 0.5 * 2.5**2, 0.0),  # moved too far towards the target: the clipped error is larger, slope 0
    (1.0, 0.0, -3.0, 0.5 * 4.0**2, 4.0),  # moved away: the plain error is larger
    (0.3, 0.0, 3.0, 0.5 * 2.7**2, -2.7),  # inside the range both are equal
    (-1.0, 0.0, -3.0, 0.5 * 2.5**2, 0.0),
    (-1.0, 0.0, 3.0, 0.5 * 4.0**2, -4.0),
    (11.0, 10.0, 13.0, 0.5 * 2.5**2, 0.0),
]


def test_value_clipping_takes_the_larger_error(clipped_value_loss=clipped_value_loss):
    for dtype, (value, old, target, expected, slope) in itertools.product(DTYPES, VALUE_CASES):
        x = leaf(torch.tensor([value], dtype=dtype))
        loss = clipped_value_loss(x, x.new_tensor([old]), x.new_tensor([target]), 0.5)
        close(loss.detach(), x.new_tensor([expected]))
        close(torch.autograd.grad(loss, x)[0], x.new_tensor([slope]))


def test_value_loss_treats_old_values_and_returns_as_constant(clipped_value_loss=clipped_value_loss):
    for cliprange_value in (None, 0.2):
        slopes = gradients(
            lambda v, o, r, c=cliprange_value: clipped_value_loss(v, o, r, c),
            normal(9),
            normal(9, seed=1),
            normal(9, seed=2),
        )
        assert (slopes[0] != 0).any() and (slopes[1] == 0).all() and (slopes[2] == 0).all()


def test_value_loss_does_not_hide_nan(clipped_value_loss=clipped_value_loss):
    for cliprange_value in (None, 0.2):
        assert clipped_value_loss(f64([NAN, 0.0]), f64([0.0, 0.0]), f64([0.0, NAN]), cliprange_value).isnan().all()


def test_approx_kl_is_unbiased_for_kl_of_old_from_new(approx_kl=approx_kl):
    logprobs, old_logprobs = f64(LOGITS).log_softmax(-1), f64(OLD).log_softmax(-1)
    exact = (old_logprobs.exp() * (old_logprobs - logprobs)).sum()
    close((old_logprobs.exp() * approx_kl(logprobs, old_logprobs)).sum(), exact)


def test_approx_kl_keeps_its_digits_for_small_and_large_steps(approx_kl=approx_kl):
    for dtype, step in itertools.product(DTYPES, (1e-2, 1e-4, -1e-4, 1.0, 30.0, -30.0, 80.0)):
        d = torch.tensor([step], dtype=dtype)
        with mpmath.workdps(80):
            truth = float(mpmath.exp(mp(d)[0]) - 1 - mp(d)[0])
        got = approx_kl(d, torch.zeros_like(d)).item()
        assert math.isclose(got, truth, rel_tol=4 * torch.finfo(dtype).eps * (1 + 2 / abs(step)))


def test_approx_kl_is_zero_at_the_start_and_never_negative(approx_kl=approx_kl):
    for dtype in DTYPES:
        d = torch.logspace(-9, 1, 400, dtype=dtype)
        assert (approx_kl(d, d) == 0).all()
        assert approx_kl(torch.cat([d, -d]), torch.zeros(800, dtype=dtype)).min() >= 0


def test_approx_kl_does_not_hide_nan(approx_kl=approx_kl):
    assert approx_kl(f64([NAN, 0.0]), f64([0.0, NAN])).isnan().all()
    assert approx_kl(f64([INF]), f64([0.0])).isnan().all() or approx_kl(f64([INF]), f64([0.0])).isinf().all()


def test_clipfrac_counts_ratios_outside_the_interval_on_both_sides(clipfrac=clipfrac):
    for dtype in DTYPES:
        ratio = torch.tensor([0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 1.5], dtype=dtype)
        old_logprobs = torch.full_like(ratio, -3.0)
        got = clipfrac(ratio.log() + old_logprobs, old_logprobs, 0.2)
        assert got.tolist() == [True, True, False, False, False, True, True]
        assert clipfrac(ratio.log() + old_logprobs, old_logprobs, 0.4).tolist() == [True, *[False] * 5, True]


def test_clipfrac_is_0_before_the_first_step_even_without_tolerance(clipfrac=clipfrac):
    logprobs = normal(3, 4) - 2
    assert not clipfrac(logprobs, logprobs, 0.0).any()


def test_clipfrac_holds_for_log_ratios_of_tens(clipfrac=clipfrac):
    assert clipfrac(f64([99.0, -99.0, 800.0]), f64([0.0, 0.0, 0.0]), 0.2).all()


def test_clip_active_is_where_the_loss_has_no_gradient(clip_active=clip_active):
    """Asked of autograd, over ratios and advantages on a grid (none 0)."""
    log_ratio, advantages = (
        x.flatten()
        for x in torch.meshgrid(torch.linspace(-2, 2, 41).double() + 0.001, f64([-2.0, -0.1, 0.1, 2.0]), indexing="ij")
    )
    old_logprobs = torch.full_like(log_ratio, -4.0)
    for cliprange in (0.0, 0.1, 0.2, 0.9, 1.5):
        x = leaf(log_ratio + old_logprobs)
        ratio = (x - old_logprobs).exp()  # the surrogate written out, so that autograd is the judge
        surrogate = torch.minimum(ratio * advantages, ratio.clamp(1 - cliprange, 1 + cliprange) * advantages)
        (slope,) = torch.autograd.grad(surrogate.sum(), x)
        assert clip_active(x.detach(), old_logprobs, advantages, cliprange).equal(slope == 0)


def test_clip_active_is_part_of_clipfrac_and_never_with_advantage_zero(clip_active=clip_active):
    logprobs, old_logprobs, advantages = normal(50), normal(50, seed=1), normal(50, seed=2)
    active = clip_active(logprobs, old_logprobs, advantages, 0.2)
    outside = clipfrac(logprobs, old_logprobs, 0.2)
    assert (active & ~outside).sum() == 0 and 0 < active.sum() < outside.sum()  # clipfrac overcounts
    assert not clip_active(logprobs, old_logprobs, torch.zeros_like(advantages), 0.2).any()


def test_diagnostics_refuse_other_shapes(clipfrac=clipfrac):
    raises(ValueError, lambda: clipfrac(normal(3), normal(3, 1), 0.2), "logprobs", "old_logprobs")


def _ppo(*changes):
    return edited(clipped_policy_loss, *changes)


def _value(*changes):
    return edited(clipped_value_loss, *changes)


PLANTED = {
    "reinforce_loss": {
        "wrong sign": lambda p, a: p * a,
        "probability instead of its logarithm": lambda p, a: -p.exp() * a,
        "advantages not detached": lambda p, a: -p * a,
        "advantages forgotten": lambda p, a: -p,
        "averaged": lambda p, a: (-p * a.detach()).mean(),
        "log-probabilities detached": lambda p, a: -p.detach() * a.detach() + 0 * p,
        "hides what is not finite": lambda p, a: (-p * a.detach()).nan_to_num(),
    },
    "clipped_policy_loss": {
        "max for min": _ppo(("torch.minimum", "torch.maximum")),
        "wrong sign": lambda p, o, a, c=0.2: -clipped_policy_loss(p, o, a, c),
        "ratio upside down": _ppo(("torch.exp(logprobs - old_logprobs)", "torch.exp(old_logprobs - logprobs)")),
        "log-ratio for ratio": _ppo(("torch.exp(logprobs - old_logprobs)", "1 + logprobs - old_logprobs")),
        "clip without min": _ppo(("torch.minimum(ratio * advantages, clipped * advantages)", "(clipped * advantages)")),
        "no clip": _ppo(
            ("torch.minimum(ratio * advantages, clipped * advantages)", "(ratio * advantages)"),
            ("torch.where(clipped_away, logprobs.detach(), logprobs)", "logprobs"),
        ),
        "clips from above only": _ppo(("clamp(1 - cliprange, 1 + cliprange)", "clamp(max=1 + cliprange)")),
        "clips from below only": _ppo(("clamp(1 - cliprange, 1 + cliprange)", "clamp(min=1 - cliprange)")),
        "advantages not detached": _ppo((", advantages.detach()", ", advantages")),
        "old log-probabilities not detached": _ppo(("old_logprobs.detach()", "old_logprobs")),
        "cliprange of its own": lambda p, o, a, c=0.2: clipped_policy_loss(p, o, a, 0.2),
        "clamps the log-ratio": lambda p, o, a, c=0.2: clipped_policy_loss(torch.clamp(p - o, -20, 20), 0 * o, a, c),
        "nan slope after overflow": _ppo(("torch.where(clipped_away, logprobs.detach(), logprobs)", "logprobs")),
        "slope stopped wherever the ratio is outside": _ppo(
            (
                "clip_active(logprobs, old_logprobs, advantages, cliprange)",
                "clipfrac(logprobs, old_logprobs, cliprange)",
            )
        ),
        "dual clip on": lambda p, o, a, c=0.2: torch.where(
            a < 0, torch.minimum(clipped_policy_loss(p, o, a, c), -3 * a), clipped_policy_loss(p, o, a, c)
        ),
    },
    "clipped_value_loss": {
        "min for max": _value(("torch.maximum", "torch.minimum")),
        "half forgotten": lambda *a: 2 * clipped_value_loss(*a),
        "half forgotten without clipping": _value(("return 0.5 * error", "return error")),
        "clipped error alone": _value(
            ("torch.maximum(error, (clipped - returns).square())", "(clipped - returns).square()")
        ),
        "clips around the return": _value(("old_values + (values - old_values)", "returns + (values - returns)")),
        "clips the value itself": _value(("old_values + (values - old_values).clamp", "values.clamp")),
        "returns not detached": _value((", returns.detach()", ", returns")),
        "old values not detached": _value(("old_values.detach()", "old_values")),
        "absolute error": _value(("(values - returns).square()", "(values - returns).abs()")),
        "clips by default": lambda v, o, r, c=None: clipped_value_loss(v, o, r, 0.2 if c is None else c),
        "ignores cliprange_value": lambda v, o, r, c=None: clipped_value_loss(v, o, r),
        "averaged": lambda *a: clipped_value_loss(*a).mean(),
    },
    "approx_kl": {
        "swapped arguments": lambda p, o: approx_kl(o, p),
        "naive exp(d) - 1 - d": lambda p, o: torch.exp(p - o) - 1 - (p - o),
        "k1": lambda p, o: o - p,
        "k2": lambda p, o: 0.5 * (p - o).square(),
        "log-ratio added": lambda p, o: torch.expm1(p - o) + (p - o),
        "clamps": lambda p, o: approx_kl(p, o).clamp(max=10),
        "hides nan": lambda p, o: approx_kl(p, o).nan_to_num(),
    },
    "clipfrac": {
        "above only": lambda p, o, c: torch.exp(p - o) > 1 + c,
        "below only": lambda p, o, c: torch.exp(p - o) < 1 - c,
        "log-ratio for ratio": lambda p, o, c: (p - o).abs() > c,
        "inclusive": lambda p, o, c: (torch.exp(p - o) - 1).abs() >= c,
        "inside, not outside": lambda p, o, c: ~clipfrac(p, o, c),
        "averaged": lambda p, o, c: clipfrac(p, o, c).double().mean(),
        "cliprange of its own": lambda p, o, c: clipfrac(p, o, 0.2),
        "swapped arguments": lambda p, o, c: clipfrac(o, p, c),
        "broadcasts": lambda p, o, c: (torch.exp(p - o) - 1).abs() > c,
    },
    "clip_active": {
        "clipfrac": lambda p, o, a, c: clipfrac(p, o, c),
        "the other side": lambda p, o, a, c: clip_active(p, o, -a, c),
        "sign of the advantage ignored": lambda p, o, a, c: torch.exp(p - o) > 1 + c,
        "positive advantages only": lambda p, o, a, c: clip_active(p, o, a, c) & (a > 0),
        "advantage 0 counts": lambda p, o, a, c: clip_active(p, o, torch.where(a == 0, 1.0, a), c),
        "ratio upside down": lambda p, o, a, c: clip_active(o, p, a, c),
        "cliprange of its own": lambda p, o, a, c: clip_active(p, o, a, 0.2),
    },
}
EXEMPT = set()
