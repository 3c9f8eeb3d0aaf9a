"""Homework on PPO: the numbers its texts give, the formulas of its hints, and answers that nearly pass."""

import itertools
import math
import re
from pathlib import Path

import pytest
import torch

from rlhfkit.homework.bank.wrong_claims import WRONG_CLAIMS
from rlhfkit.homework.core import QUESTIONS, diagnose
from rlhfkit.homework.proofs import failed_cases
from rlhfkit.policy_losses import approx_kl, clip_active, clipfrac, clipped_policy_loss, clipped_value_loss

MASTER = (Path(__file__).parent.parent.parent / "homework" / "master" / "hw04_ppo.ipynb").read_text(encoding="utf-8")
RIGHT = {question.id: question.reference for question in QUESTIONS.values() if question.chapter == 4}


def f64(x):
    return torch.tensor(x, dtype=torch.float64)


def decimals(text, count):
    return re.findall(rf"-?\b\d+\.\d{{{count}}}\b", text)


def by_package(logprobs, old_logprobs, advantages, response_mask, cliprange=0.2):
    three = (
        approx_kl(logprobs, old_logprobs),
        clipfrac(logprobs, old_logprobs, cliprange),
        clip_active(logprobs, old_logprobs, advantages, cliprange),
    )
    return tuple(x[response_mask].double().mean() for x in three)


@pytest.mark.parametrize(
    "question_id, function",
    [("ppo_clip", clipped_policy_loss), ("value_loss", clipped_value_loss), ("update_metrics", by_package)],
)
def test_the_packages_own_functions_are_right_answers(question_id, function):
    question = QUESTIONS[question_id]
    assert failed_cases(question, function) == [""] * len(question.cases)


def test_the_growth_of_the_weights_variance_is_as_the_explanation_says():
    explanation = QUESTIONS["weight_variance"].explanation
    one, ten, hundred = (RIGHT["weight_variance"](f64([0.5, 0.5]), f64([0.6, 0.4]), t).item() for t in (1, 10, 100))
    assert f"{one:.3f} for one token, {ten:.3f} for ten and {hundred:.1f} for a hundred" in explanation
    assert f"one token it is {one:.4f}" in MASTER


def test_the_escape_goes_as_the_explanation_says():
    """By hand: the slope of 2 sigmoid(w f) in w is 2 sigmoid (1 - sigmoid) f; the first sample's is clipped away."""
    (f1, f2), _, w, step = RIGHT["ppo_ratio_escape"]
    sigma = [1 / (1 + math.exp(-w * f)) for f in (f1, f2)]
    slope = 2 * sigma[1] * (1 - sigma[1]) * f2
    after = 2 / (1 + math.exp(-(w + step * slope) * f1))
    story = [f"{x:.3f}" for x in (2 * sigma[0], 2 * sigma[1], slope, after)]
    assert story == decimals(QUESTIONS["ppo_ratio_escape"].explanation, 3)
    assert after > 1.5 and f"{2 * sigma[0]:.3f} to above 1.5" in WRONG_CLAIMS["W-PPO-1"].verdict


def test_the_worked_numbers_of_the_tasks_are_the_references():
    one = RIGHT["offpolicy"](f64([[0.5, 0.6]]).log(), f64([[0.4, 0.2]]).log(), f64([2.0]), torch.ones(1, 2).bool())
    assert f"score 2 gives {one:.1f}." in MASTER
    losses = [RIGHT["ppo_clip"](f64(1.7).log(), f64(0.0), f64(a)).item() for a in (1.0, -1.0)]
    assert f"the loss is ${losses[0]:.1f}$; at $r = 1.7$ and $A = -1$ it is {losses[1]:.1f}" in MASTER
    value = f64(2.0).requires_grad_()
    loss = RIGHT["value_loss"](value, f64(0.0), f64(3.0), 0.5)
    loss.backward()
    assert f"= {loss.item():.3f}$, with gradient {value.grad.item():.0f}." in MASTER
    down, up = RIGHT["entropy_slope"](f64([[0.9, 0.1]]).log())[0].tolist()
    assert f"it is $({down:.3f}, {up:.3f})$" in MASTER
    for a in (1.0, -1.0):
        token, mask = f64([[0.5]]).log(), torch.ones(1, 1).bool()
        kl, outside, stopped = RIGHT["update_metrics"](token, f64([[0.0]]), f64([[a]]), mask)
        assert f"({kl:.3f}, {outside:.0f}, {stopped:.0f})$" in MASTER
    p, q, f = map(f64, RIGHT["support_break"])
    weighted = (p * f)[q > 0].sum()
    assert f"the mean is {(p * f).sum():.0f}, the weighted one {weighted:.1f}" in QUESTIONS["support_break"].explanation


def test_the_value_with_the_wrong_sign_ends_where_the_texts_say():
    """Fifty steps of size 0.1 multiply the distance to the target by 0.9 each, or by 1.1."""
    wrong, right = 1 - 1.1**50, 1 - 0.9**50
    explanation = QUESTIONS["total_loss_signs"].explanation
    assert f"end at {wrong:.1f} instead of {right:.3f}" in explanation
    assert "to −116 where" in WRONG_CLAIMS["W-PPO-6"].verdict and round(wrong) == -116


def test_the_quotient_of_log_probabilities_is_what_the_verdict_says():
    quotient, ratio = math.log(0.5) / math.log(0.4), 0.5 / 0.4
    assert (
        f"{ratio:.2f} for π = 0.5, π_old = 0.4, where the quotient is {quotient:.3f}" in WRONG_CLAIMS["W-PPO-3"].verdict
    )
    assert 1 / math.log(0.4) < 0 < ratio  # the slopes of both in log π


def test_the_moves_have_the_ratios_that_hint_and_verdict_name():
    (sure_old, sure_new), (old, new) = RIGHT["sure_or_changed"]
    for text in (QUESTIONS["sure_or_changed"].hints[2], WRONG_CLAIMS["W-PPO-4"].verdict):
        assert f"{sure_new / sure_old:.2f}" in text and f"{new / old:.1f}" in text
    assert f"factor {1 / 0.9:.2f}" in QUESTIONS["sure_or_changed"].explanation


def formula(question_id, after="", before="", **variables):
    """Value of the text between two others in hint 3: ``^`` is a power, a space between factors a product."""
    text = QUESTIONS[question_id].hints[2]
    text = text[text.index(after) + len(after) :]
    text = text[: text.index(before)].replace("^", "**")
    return eval(re.sub(r"(?<=[\w)])(?<!\bor)(?<!\band) (?!or\b|and\b)(?=[a-zA-Z(])", "*", text), variables)


def test_the_formulas_in_the_third_hints_are_the_references():
    r, a = f64([0.5, 0.9, 1.1, 1.7]), f64([1.0, -1.0, 1.0, -1.0])
    loss = formula("ppo_clip", "", " with r", r=r, A=a, cliprange=0.2, minimum=torch.minimum)
    torch.testing.assert_close(loss, RIGHT["ppo_clip"](r.log(), torch.zeros_like(r), a))
    known = {"v": f64([2.0, -2.0, 0.25]), "old": torch.zeros(3, dtype=torch.float64), "R": f64([3.0, 3.0, 3.0])}
    loss = formula("value_loss", "", ", with", eps=0.5, maximum=torch.maximum, **known)
    torch.testing.assert_close(loss, RIGHT["value_loss"](*known.values(), 0.5))
    logp = f64([0.5, -1.0, 2.0]).log_softmax(0)
    slope = formula("entropy_slope", "", ", with", p=logp.exp(), logp=logp, H=-(logp.exp() * logp).sum())
    torch.testing.assert_close(slope, RIGHT["entropy_slope"](logp[None])[0])
    p, q = f64([0.2, 0.3, 0.5]), f64([0.4, 0.4, 0.2])
    variance = formula("weight_variance", "", ", the sum", p=p, q=q, T=3)
    torch.testing.assert_close(variance, RIGHT["weight_variance"](p, q, 3))
    for d, advantage in itertools.product((-0.5, -0.1, 0.1, 0.5), (1.0, -1.0)):
        known = {"d": d, "r": math.exp(d), "A": advantage, "eps": 0.2, "expm1": math.expm1, "exp": math.exp}
        ends = [("", ";"), ("; ", "; ("), ("> eps; ", ". Each")]
        three = [formula("update_metrics", after, before, **known) for after, before in ends]
        x = f64([[d]])
        want = RIGHT["update_metrics"](x, torch.zeros_like(x), torch.full_like(x, advantage), torch.ones(1, 1).bool())
        assert three == pytest.approx([y.item() for y in want])


# -- answers that nearly pass --------------------------------------------------------------------------------------


def rejected_somewhere(question_id, answer):
    return any(failed_cases(QUESTIONS[question_id], answer))


def test_a_first_sample_that_is_inside_or_saturated_is_no_escape():
    for answer in (
        ((1.0, 0.3), (1.0, 1.0), 0.1, 10.0),  # both inside: its own gradient moves it
        ((10.0, 0.3), (1.0, 1.0), 10.0, 10.0),  # at its ceiling of 2 already: no room for a rise
        ((-1.0, 0.3), (-1.0, 1.0), 0.46, 5.0),  # below 0.8 with A < 0: clipped, but not above 1.2
    ):
        assert rejected_somewhere("ppo_ratio_escape", answer)


def rises_though_clipped(features, advantages, w, step):
    """The task's definition in plain Python, with the slope of each clipped objective by its cases."""
    ratios = [2 / (1 + math.exp(-w * f)) for f in features]
    slopes = [r * (1 - r / 2) * f * a for r, f, a in zip(ratios, features, advantages, strict=True)]
    stopped = [(a > 0 and r > 1.2) or (a < 0 and r < 0.8) for r, a in zip(ratios, advantages, strict=True)]
    gradient = sum(0.0 if stop else slope for slope, stop in zip(slopes, stopped, strict=True))
    after = 2 / (1 + math.exp(-(w + step * gradient) * features[0]))
    before = ratios[0] > 1.2 and stopped[0] and 0.8 <= ratios[1] <= 1.2
    return before and step > 0 and after >= ratios[0] + 0.1


def test_an_escape_is_accepted_exactly_if_it_meets_the_definition():
    seen, question = set(), QUESTIONS["ppo_ratio_escape"]
    numbers = itertools.product((1.0, -2.0), (0.2, -0.4, 0.0, 1.5), (1.0, -1.0), (2.0, -3.0), (0.5, -0.3), (6.0, 0.2))
    for f1, f2, a1, a2, w, step in numbers:
        answer = ((f1, f2), (a1, a2), w, step)
        good = rises_though_clipped(*answer)
        assert rejected_somewhere("ppo_ratio_escape", answer) != good, answer
        assert not (good and diagnose(question, answer))
        seen.add(good)
    assert seen == {True, False}


def test_every_counterexample_that_meets_the_definition_is_accepted():
    """A grid of answers to the support question, judged by the definition in plain Python and by the check."""
    seen = set()
    for q in ((0.5, 0.5, 0.0), (0.4, 0.3, 0.3), (1.0, 0.0, 0.0), (0.1, 0.9, 0.0)):
        for p in ((0.25, 0.25, 0.5), (0.6, 0.4, 0.0), (0.9, 0.1, 0.0), (0.5, 0.1, 0.4)):
            for f in itertools.product((-1.0, 0.0, 2.0), repeat=3):
                mean = sum(a * x for a, x in zip(p, f, strict=True))
                weighted = sum(a * x for a, b, x in zip(p, q, f, strict=True) if b > 0)
                weights = [a / b for a, b in zip(p, q, strict=True) if b > 0]
                good = mean >= 0.1 and weighted <= -0.1 and max(weights) <= 2
                assert rejected_somewhere("support_break", (p, q, f)) != good, (p, q, f)
                assert not (good and diagnose(QUESTIONS["support_break"], (p, q, f)))
                seen.add(good)
    assert seen == {True, False}


def test_a_counterexample_of_the_learners_own_is_told_its_kind_of_mistake():
    """The diagnosis goes by what is wrong with the answer, not by the planted numbers."""
    for question_id, answer, kind in (
        ("support_break", ((0.7, 0.3), (0.4, 0.6), (1.0, -2.0)), "full-support"),
        ("ppo_ratio_escape", ((2.0, 0.0), (3.0, -1.0), 0.5, 2.0), "nothing-shared"),
        ("sure_or_changed", ((0.2, 0.29), (0.91, 0.95)), "exchanged"),
    ):
        question = QUESTIONS[question_id]
        assert any(failed_cases(question, answer))
        assert [wrong.name for wrong in diagnose(question, answer)] == [kind]


# -- a mistake of precision or range is named whatever its numbers are ---------------------------------------------


def masked_log_ratios(n, o, m):
    return torch.where(m, n - o.detach(), 0.0)


def clipped(ratio, advantages, cliprange):
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - cliprange, 1 + cliprange) * advantages)


def capped_value_loss(v, o, r, cliprange_value=None):
    loss = clipped_value_loss(v, o, r, cliprange_value)
    return loss if cliprange_value is None else loss.clamp(max=12.5)


def metrics_of(log_ratios):
    def f(n, o, a, m, cliprange=0.2):
        kl = log_ratios(n - o)[m].mean()
        return kl, *RIGHT["update_metrics"](n, o, a, m, cliprange)[1:]

    return f


VARIANTS = [
    (
        "offpolicy",
        lambda n, o, s, m: (masked_log_ratios(n, o, m).sum(1).clamp(max=9.0).exp() * s.detach()).mean(),
        "capped-weight",
    ),
    (
        "offpolicy",
        lambda n, o, s, m: (masked_log_ratios(n, o, m).sum(1).clamp(-15, 15).exp() * s.detach()).mean(),
        "clamped-sum",
    ),
    (
        "offpolicy",
        lambda n, o, s, m: (
            masked_log_ratios(n, o, m).cumsum(1).gather(1, m.sum(1)[:, None] - 1)[:, 0].exp() * s.detach()
        ).mean(),
        "cut-at-the-longest",
    ),
    (
        "ppo_clip",
        lambda n, o, a, cliprange=0.2: clipped((n - o.detach()).exp().clamp(max=4.0), a.detach(), cliprange),
        "dual-clip",
    ),
    (
        "ppo_clip",
        lambda n, o, a, cliprange=0.2: clipped((n - o.detach()).clamp(-5, 5).exp(), a.detach(), cliprange),
        "clamped-log-ratio",
    ),
    ("value_loss", capped_value_loss, "capped-with-clip"),
    (
        "value_loss",
        lambda v, o, r, cliprange_value=None: clipped_value_loss(v, o, r.clamp(-10, 10), cliprange_value),
        "returns-clamped",
    ),
    ("value_loss", lambda v, o, r, cliprange_value=None: clipped_value_loss(v, r, r, cliprange_value), "clip-ignored"),
    ("entropy_slope", lambda x: RIGHT["entropy_slope"](x.clamp(-50, 50)), "clamped-logits"),
    ("update_metrics", metrics_of(lambda d: torch.expm1(d.clamp(max=10.0)) - d), "clamped-log-ratio"),
    ("update_metrics", metrics_of(lambda d: (d.exp() - 1 - d).clamp(min=0)), "cancellation"),
]


@pytest.mark.parametrize("question_id, answer, name", VARIANTS)
def test_variants_of_a_planted_mistake_are_rejected_and_named(question_id, answer, name):
    question = QUESTIONS[question_id]
    assert rejected_somewhere(question_id, answer)
    assert [wrong.name for wrong in diagnose(question, answer)] == [name]


def test_bounds_on_probabilities_hold_up_to_rounding():
    f32 = torch.float32
    for answer in (
        torch.tensor([[0.9, 0.95], [0.2, 0.3]], dtype=f32),
        ((0.9, 1.0), torch.tensor([0.1, 0.3], dtype=f32)),
    ):
        assert not rejected_somewhere("sure_or_changed", answer)
    for unsure in (
        (0.25, 0.3),
        (0.15, 0.18),
        (0.05, 0.06),
    ):  # the ratio 1.2 lies in the interval, however it is rounded
        for kind in (torch.float32, torch.float64):
            assert rejected_somewhere("sure_or_changed", ((0.95, 0.99), torch.tensor(unsure, dtype=kind)))
    assert rejected_somewhere("sure_or_changed", ((0.8999, 0.99), (0.1, 0.2)))


def test_a_token_without_advantage_is_not_stopped_by_the_clip():
    """As in the package, and as the largest libraries log it."""
    x = f64([[0.5, 1.0, 1.5]]).log()
    three = RIGHT["update_metrics"](x, torch.zeros_like(x), torch.zeros_like(x), torch.ones(1, 3).bool())
    assert three[2] == 0
