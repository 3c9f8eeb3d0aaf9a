"""Homework of the chapter on the KL divergence: the numbers of its texts, the formulas of its hints, near misses."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhfkit import exact, kl
from rlhfkit.homework.bank.wrong_claims import WRONG_CLAIMS
from rlhfkit.homework.core import QUESTIONS, diagnose
from rlhfkit.homework.proofs import failed_cases

MASTER = Path(__file__).parent.parent.parent / "homework" / "master" / "hw08_kl.ipynb"
TASKS = "\n".join("".join(cell["source"]) for cell in json.loads(MASTER.read_text(encoding="utf-8"))["cells"])
RIGHT = {question.id: question.reference for question in QUESTIONS.values() if question.chapter == 8}
EXPLAINED = {question.id: question.explanation for question in QUESTIONS.values() if question.chapter == 8}


def f64(x):
    return torch.tensor(x, dtype=torch.float64)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def pair(numbers, digits):
    return "(" + ", ".join(f"{x:.{digits}f}" for x in torch.as_tensor(numbers).flatten().tolist()) + ")"


def kl_of(p, q):
    """KL(p || q) of two lists of probabilities."""
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


# -- the package's own functions -----------------------------------------------------------------------------------


def by_controller(kl_coef, measured, target, num_sequences, horizon):
    controller = kl.AdaptiveKLController(kl_coef, target, horizon)
    controller.update(measured, num_sequences)
    return controller.kl_coef


def moments_by_package(first, ref_first, second, ref_second):
    """All V^2 responses as one batch, and the moments by the exact oracle."""
    size = len(first)
    a, b = torch.cartesian_prod(torch.arange(size), torch.arange(size)).T
    mask = torch.ones(size**2, 2, dtype=torch.bool)
    logprobs = torch.stack([first[a], second[a, b]], 1)
    ref_logprobs = torch.stack([ref_first[a], ref_second[a, b]], 1)
    at = [torch.stack([x.expand(size**2, size), y[a]], 1) for x, y in ((first, second), (ref_first, ref_second))]
    estimates = [k(logprobs, ref_logprobs).sum(1) for k in (kl.kl_k1, kl.kl_k2, kl.kl_k3)]
    estimates.append(kl.full_vocabulary_kl(*at, mask))
    rows = [exact.estimator_moments(logprobs.sum(1), x[:, None]) for x in estimates]
    return [mean.item() for mean, _ in rows], [variance.item() for _, variance in rows]


def token_loss_by_package(p, c):
    """The third part with the package's full-vocabulary loss; the second with its reward-to-go loss."""
    root, ref_root = f64([p, 1 - p]).log().requires_grad_(), f64([p, 1 - p]).log()
    second, ref_second = f64([[c, -c], [0.0, 0.0]]), f64([[-c, c], [0.0, 0.0]])
    a, b = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    logits = torch.stack([root.expand(4, 2), second[a]], 1)
    ref_logits = torch.stack([ref_root.expand(4, 2), ref_second[a]], 1)
    taken = torch.stack([a, b], 1)[:, :, None]
    logprobs, ref_logprobs = (x.log_softmax(-1).gather(2, taken)[:, :, 0] for x in (logits, ref_logits))
    chances, mask = logprobs.sum(1).exp().detach(), torch.ones(4, 2, dtype=torch.bool)
    divergence = (chances * kl.sequence_kl(logprobs, ref_logprobs, mask)).sum().detach()
    losses = [
        kl.kl_reward_to_go_loss(logprobs, ref_logprobs, mask).sum(1),
        kl.full_vocabulary_kl(logits, ref_logits, mask),
    ]
    return divergence, *(torch.autograd.grad((chances * x).sum(), root, retain_graph=True)[0] for x in losses)


def value_of_k3_slope_of_k2(logprobs, old_logprobs, ref_logprobs):
    ref = ref_logprobs.detach()
    ratio = torch.exp(logprobs - old_logprobs).detach()
    return ratio * kl.straight_through(kl.kl_k3(logprobs, ref), kl.kl_k2(logprobs, ref))


@pytest.mark.parametrize(
    "question_id, function",
    [
        ("kl_k3", kl.kl_k3),
        ("off_policy_kl", kl.off_policy_k2),
        ("off_policy_kl", kl.off_policy_k3),
        ("off_policy_kl", value_of_k3_slope_of_k2),
        ("kl_controller", by_controller),
        ("kl_estimators_moments", moments_by_package),
        ("early_token", token_loss_by_package),
    ],
)
def test_the_packages_own_functions_are_right_answers(question_id, function):
    question = QUESTIONS[question_id]
    assert failed_cases(question, function) == [""] * len(question.cases)


def test_every_claim_about_the_kl_is_behind_a_planted_answer():
    planted = {wrong.source for question in QUESTIONS.values() if question.chapter == 8 for wrong in question.wrongs}
    claims = {claim_id for claim_id in WRONG_CLAIMS if claim_id.startswith("W-KL-")}
    assert len(claims) == 11 and claims <= planted


# -- numbers in the texts ------------------------------------------------------------------------------------------


def test_the_worked_numbers_of_the_tasks_are_the_references():
    forward, backward = RIGHT["kl_k3"](f64([-1.0, -2.0]), f64([-2.0, -1.0])).tolist()
    assert f"it is {forward:.3f}, the other way round {backward:.3f}" in TASKS
    assert f"that of $k_2$ is {math.sqrt(3 / 4):.3f}" in TASKS  # Var k2 = m^4 (2 + m^2)/4
    assert f"mean 0.5 and variance 1 it is {RIGHT['k2_bias'](0.5, 1.0):.3f}" in TASKS
    halves, uneven = f64([0.5, 0.5]), f64([0.2, 0.8])
    zero, of_kl, of_reverse = RIGHT["kl_loss_gradients"](halves.log(), uneven.log())
    assert f"two of the three are ${pair(of_kl, 3)}$ and ${pair(of_reverse, 1)}$" in TASKS
    assert zero.abs().max() == 0
    assert f"one of the two numbers is {RIGHT['kl_drift'](halves, 1.0)[0]:.3f}" in TASKS
    divergence = kl_of([0.5, 0.5], [0.2, 0.8])
    k3_mean = (halves * RIGHT["kl_k3"](halves.log(), uneven.log())).sum()
    assert f"{divergence:.3f}" == f"{k3_mean:.3f}" == "0.223" and "both are 0.223" in TASKS
    logits, old = halves.log().requires_grad_(), f64([0.8, 0.2])
    lp = logits.log_softmax(0)
    wrong = [
        torch.autograd.grad((old * k(lp, uneven.log())).sum(), logits, retain_graph=True)[0]
        for k in (kl.kl_k2, kl.kl_k3)
    ]
    slope = torch.autograd.grad((old * RIGHT["off_policy_kl"](lp, old.log(), uneven.log())).sum(), logits)[0]
    assert f"the mean gradient in the logits must be ${pair(slope, 3)}$" in TASKS
    assert f"without a ratio gives ${pair(wrong[0], 3)}$, $k_3$ without one ${pair(wrong[1], 1)}$" in TASKS
    whole, true, _ = RIGHT["early_token"](0.5, 1.0)
    assert f"the KL is {whole:.3f} and its gradient ${pair(true, 3)}$" in TASKS
    same = halves.log().expand(2, 2)
    means, variances = RIGHT["kl_estimators_moments"](halves.log(), uneven.log(), same, same)
    assert f"$k_1$ has the mean {means[0]:.3f} and the variance {variances[0]:.3f}" in TASKS
    assert f"$k_2$ the mean {means[1]:.3f}." in TASKS
    assert variances[3] == pytest.approx(0, abs=1e-12)
    coefficient = RIGHT["kl_controller"](0.15, 9, 6, 100, 1000)
    assert f"a horizon of 1000 it is {coefficient:.3f}" in TASKS


def spread(m, estimate):
    """Variance under N(0, 1) of an estimate of KL(N(0, 1) || N(m, 1)), by Gauss-Hermite quadrature."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    values = estimate(m**2 / 2 - m * nodes)
    weights = weights / weights.sum()
    return weights @ values**2 - (weights @ values) ** 2


def test_k2_and_k3_become_noisier_than_k1_where_the_texts_say():
    estimates = {"k2": lambda x: x**2 / 2, "k3": lambda x: np.expm1(-x) + x}
    found = {}
    for name, estimate in estimates.items():
        low, high = 0.5, 2.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if spread(middle, estimate) < spread(middle, lambda x: x) else (low, middle)
        found[name] = low
    assert found["k2"] == pytest.approx(RIGHT["k2_threshold"], rel=1e-9)
    text = EXPLAINED["k2_threshold"]
    assert f"m = {found['k2']:.4f}, a KL of {found['k2'] ** 2 / 2:.3f}" in text
    assert f"to k3 from m = {found['k3']:.3f} on" in text
    assert f"beyond m = {found['k2']:.3f}" in WRONG_CLAIMS["W-KL-2"].verdict
    planted = {wrong.name: wrong.answer for wrong in QUESTIONS["k2_threshold"].wrongs}
    assert planted["k3"] == pytest.approx(found["k3"], abs=1e-4)
    m = planted["relative-to-its-own-mean"]
    assert math.sqrt(spread(m, estimates["k2"])) / (m**2 / 2 + m**4 / 8) == pytest.approx(2 / m)
    m = planted["bias-equals-kl"]
    assert RIGHT["k2_bias"](m**2 / 2, m**2) == pytest.approx(m**2 / 2)


def test_the_numbers_of_explanations_and_verdicts_are_the_references():
    relative = [RIGHT["k2_bias"](m**2 / 2, m**2) / (m**2 / 2) for m in (0.1, 0.5, 1.0, 2.0)]
    told = re.search(r"m\^2/4, or ([\d., ]+) and (1) at m = 0.1, 0.5, 1 and 2", EXPLAINED["k2_bias"])
    assert [*map(float, told[1].split(", ")), float(told[2])] == pytest.approx(relative)
    ref = f64([0.5, 0.3, 0.2])
    for lr, start in ((1.0, "lr = 1 the two numbers are "), (0.1, "for lr = 0.1 they are ")):
        first, second = RIGHT["kl_drift"](ref, lr)
        assert f"{start}{first:.4f} and {second:.0f}" in EXPLAINED["kl_drift"].replace("  ", " ")
    steps = torch.eye(3).double() - ref
    fisher = torch.diag(ref) - torch.outer(ref, ref)
    small = 0.01**2 / 2 * sum(q * g @ fisher @ g for q, g in zip(ref, steps, strict=True))
    assert RIGHT["kl_drift"](ref, 0.01)[0].item() == pytest.approx(small.item(), rel=0.02)
    q, p = RIGHT["k3_support"]
    lost = math.fsum(x * (y / x - 1) for x, y in zip(q, p, strict=True) if x > 0)
    divergence = kl_of(q, p)
    assert f"KL is {divergence:.4f} and E[k3] is {divergence + lost:.4f}" in " ".join(EXPLAINED["k3_support"].split())
    assert f"{divergence + lost:.3f} for a divergence of {divergence:.3f}" in WRONG_CLAIMS["W-KL-6"].verdict
    assert divergence == pytest.approx(-math.log(1 - 0.2))
    whole, (slope, other), token = RIGHT["early_token"](0.5, 3.0)
    assert (
        f"the KL is {whole:.4f} and its gradient ({slope:.4f}, {other:.4f}), against (0, 0)" in EXPLAINED["early_token"]
    )
    assert f"±{slope:.4f}" in WRONG_CLAIMS["W-KL-8"].verdict and token == [0.0, 0.0]
    few = RIGHT["kl_controller"](1.0, 12.0, 6.0, 10_000, 10_000)
    many = 1.0
    for _ in range(1000):
        many = RIGHT["kl_controller"](many, 12.0, 6.0, 10, 10_000)
    assert few == pytest.approx(1.2) and f"e^0.2 = {many:.2f}" in EXPLAINED["kl_controller"]


def test_single_precision_loses_what_the_explanation_says():
    """exp(d) is next to 1, where floats are 6e-8 or 1.2e-7 apart; the answer is 5e-9."""
    d = torch.tensor(1e-4)
    assert (torch.expm1(d) - d).item() == pytest.approx(5e-9, rel=0.01)
    assert torch.finfo(torch.float32).eps / 2 == pytest.approx(6e-8, rel=0.01)
    assert "some 6e-8, more than the 5e-9" in EXPLAINED["kl_k3"]
    tiny = torch.logspace(-8, -2, 200)
    assert (tiny.exp() - 1 - tiny).min() < 0 <= (torch.expm1(tiny) - tiny).min()


def test_the_statements_called_false_are_false_and_the_others_true():
    """Both sides of every equation on responses of two tokens; line 2 has none."""
    root, second = normal(3, seed=1).requires_grad_(), normal(3, 3, seed=2).requires_grad_()
    ref = (normal(3, seed=3).log_softmax(0)[:, None] + normal(3, 3, seed=4).log_softmax(1)).flatten()
    first_ref, second_ref = normal(3, seed=3).log_softmax(0), normal(3, 3, seed=4).log_softmax(1)
    first, after = root.log_softmax(0), second.log_softmax(1)
    logprobs = (first[:, None] + after).flatten()
    chances, x = logprobs.exp().detach(), logprobs - ref
    whole = exact.kl(logprobs[None], ref[None])[0]
    d_1 = (first.exp() * (first - first_ref)).sum()
    d_2 = (after.exp() * (after - second_ref)).sum(1)
    tokens = (d_1 + d_2)[:, None].expand(3, 3).flatten()

    def slope(y):
        return torch.cat([g.flatten() for g in torch.autograd.grad(y, (root, second), retain_graph=True)])

    mean, square = (chances * x).sum(), (chances * x**2).sum()
    two = chances[:, None] * chances  # n = 2
    middle = (x[:, None] + x) / 2
    corrected = middle - ((x[:, None] - middle) ** 2 + (x - middle) ** 2) / 8
    k3 = torch.exp(-x) - 1 + x
    sides = {
        1: ((two * middle).sum(), whole),
        3: (square / 2 - whole, (square - mean**2) / 2),
        4: ((two * corrected).sum(), whole),
        5: ((chances * k3).sum(), whole),
        6: (slope((chances * k3).sum()), slope(whole)),
        7: (slope((chances * x**2 / 2).sum()), slope(whole)),
        8: ((chances * tokens).sum(), whole),
        9: (slope((chances * tokens).sum()), slope(whole)),
    }
    false = {line for line, (left, right) in sides.items() if not torch.allclose(left, right, atol=1e-10)}
    assert false | {2} == RIGHT["kl_statements"]
    bias = (two * corrected).sum() - whole
    torch.testing.assert_close(bias, -(2 - 1) / (2 * 2**2) * (square - mean**2))
    assert "one, -(n - 1)/(2 n^2) Var l" in EXPLAINED["kl_statements"]
    gap = square / 2 - whole - (square - mean**2) / 2
    torch.testing.assert_close(gap, mean**2 / 2 - mean)  # 0 if (E l)^2 = 2 E l


# -- the formulas in the third hints, read as they stand -----------------------------------------------------------


def formula(question_id, after="", before="", **variables):
    """Value of the text between two others in hint 3: ``^`` is a power, a space between factors a product."""
    text = QUESTIONS[question_id].hints[2]
    text = text[text.index(after) + len(after) :]
    text = text[: text.index(before)] if before else text.rstrip(".")
    text = re.sub(r"(?<=[\w)]) (?=[\w(])", "*", text.replace("^", "**"))
    return eval(text, {"sum": torch.sum, "exp": torch.exp, "tanh": math.tanh, **variables})


def test_the_formulas_in_the_third_hints_are_the_references():
    logits, ref_logits = normal(4, seed=5), normal(4, seed=6)
    pi, ref = logits.softmax(0), ref_logits.softmax(0)
    d = ref.log() - pi.log()
    torch.testing.assert_close(
        formula("kl_k3", "", ", with", d=d, expm1=torch.expm1), RIGHT["kl_k3"](pi.log(), ref.log())
    )
    m = RIGHT["k2_threshold"]
    assert formula("k2_threshold", "Var k1 = ", " and", m=m) == pytest.approx(spread(m, lambda x: x))
    assert formula("k2_threshold", "Var k2 = ", ";", m=m) == pytest.approx(spread(m, lambda x: x**2 / 2))
    assert formula("k2_threshold", "where ", " = 0", m=m) == pytest.approx(0, abs=1e-12)
    assert formula("k2_bias", mean=0.3, variance=0.9) == RIGHT["k2_bias"](0.3, 0.9)
    gradients = RIGHT["kl_loss_gradients"](logits, ref_logits)
    known = {"pi": pi, "ref": ref, "l": -d}
    for (after, before), want in zip((("k1: ", "; k2"), ("k2: ", "; k3"), ("k3: ", "")), gradients, strict=True):
        torch.testing.assert_close(formula("kl_loss_gradients", after, before, **known), want)
    lr = 0.7
    drift = sum(
        q * kl_of((ref.log() - lr * (row - ref)).softmax(0).tolist(), ref.tolist())
        for q, row in zip(ref, torch.eye(4), strict=True)
    )
    assert RIGHT["kl_drift"](ref, lr)[0].item() == pytest.approx(drift.item(), rel=1e-6)
    delta, rest = 0.3, f64([0.2, 0.5])
    assert kl_of((rest / (1 - delta)).tolist(), rest.tolist()) == pytest.approx(-math.log(1 - delta))
    p, c = 0.3, 0.8
    known = {"p": p, "c": c, "K": formula("early_token", "K = ", ": KL", c=c)}
    whole, slope, _ = RIGHT["early_token"](p, c)
    assert formula("early_token", ": KL = ", ", gradient", **known) == pytest.approx(whole)
    assert formula("early_token", "gradient ", " times", **known) == pytest.approx(slope[0])
    first, second = logits.log_softmax(0), normal(4, 4, seed=7).log_softmax(1)
    world = (first, ref.log(), second, normal(4, 4, seed=8).log_softmax(1))
    known = {"chances": formula("kl_estimators_moments", "chances = ", "; mean", first=first[:, None], second=second)}
    known["estimate"] = (first - ref.log())[:, None] + second - world[3]
    known["mean"] = formula("kl_estimators_moments", "mean = ", "; variance", **known)
    means, variances = RIGHT["kl_estimators_moments"](*world)
    torch.testing.assert_close(known["mean"], means[0])
    torch.testing.assert_close(formula("kl_estimators_moments", "variance = ", **known), variances[0])
    known = {"kl": 6.5, "target": 6.0, "kl_coef": 0.4, "num_sequences": 32, "horizon": 500}
    known["error"] = formula("kl_controller", "error = ", " cut", **known)
    assert formula("kl_controller", "", ", with", **known) == pytest.approx(
        RIGHT["kl_controller"](0.4, 6.5, 6.0, 32, 500)
    )


# -- answers that nearly pass --------------------------------------------------------------------------------------


def test_mistakes_that_are_not_in_the_bank_are_rejected_too():
    strangers = {
        "kl_k3": [
            lambda lp, ref: kl.kl_k3(lp.exp(), ref.exp()),
            lambda lp, ref: kl.kl_k3(lp, ref).clamp(max=1000.0),
            lambda lp, ref: 0.5 * (kl.kl_k3(lp, ref) + kl.kl_k2(lp, ref)),
            lambda lp, ref: kl.kl_k3(lp.detach(), ref) + 0 * lp,
        ],
        "k2_threshold": [1.05, 1.104, 1.12, -1.1118, math.log(3)],
        "k2_bias": [
            lambda a, v: (v + a**2) / 2 - math.sqrt(v) / 2,
            lambda a, v: max((v + a**2) / 2 - a, 0.0),
            lambda a, v: abs((v + a**2) / 2 - a),
        ],
        "kl_loss_gradients": [
            lambda x, r: [y / len(x) for y in RIGHT["kl_loss_gradients"](x, r)],
            lambda x, r: RIGHT["kl_loss_gradients"](x, r)[::-1],
        ],
        "kl_drift": [
            lambda q, lr: (lr**2 / 2 * (1 - (q**2).sum()), 0.0),
            lambda q, lr: (RIGHT["kl_drift"](q, 2 * lr)[0], 0.0),
        ],
        "off_policy_kl": [
            lambda n, o, r: kl.off_policy_k3(n, o, r) + 0.5 * kl.off_policy_k2(n, o, r),
            lambda n, o, r: 2 * torch.exp(n - o.detach()) * kl.straight_through(kl.kl_k1(n, r), kl.kl_k2(n, r)),
            lambda n, o, r: kl.off_policy_k2(n, o, r) / torch.exp(n - o).detach().sum(),
        ],
        "early_token": [
            lambda p, c: (*RIGHT["early_token"](p, c)[:2], [p - 0.5, 0.5 - p]),
            lambda p, c: RIGHT["early_token"](1 - p, c),
        ],
        "kl_estimators_moments": [
            lambda *w: [RIGHT["kl_estimators_moments"](*w)[i][[0, 2, 1, 3]] for i in (0, 1)],
            lambda *w: RIGHT["kl_estimators_moments"](w[1], w[0], w[3], w[2]),
        ],
        "kl_controller": [
            lambda c, x, target, n, horizon: by_controller(c, max(x, 0.9 * target), target, n, horizon),
            lambda c, x, target, n, horizon: by_controller(c, x, target, min(n, 64), horizon),
        ],
    }
    for question_id, answers in strangers.items():
        for number, answer in enumerate(answers):
            question = QUESTIONS[question_id]
            assert any(failed_cases(question, answer)), (question_id, number)
            assert diagnose(question, answer) == [], (question_id, number)


def test_a_distribution_cut_and_rescaled_is_an_example_up_to_a_mass_of_80_percent_and_no_full_one_is():
    """The mean of k3 is then -log(1 - delta) - delta, half of -log(1 - delta) at delta = 0.797."""
    question = QUESTIONS["k3_support"]
    for delta, enough in ((0.02, True), (0.3, True), (0.79, True), (0.80, False), (0.95, False)):
        q, p = [0.5, 0.5, 0.0], [(1 - delta) / 2, (1 - delta) / 2, delta]
        assert (failed_cases(question, (q, p)) == ["", ""]) is enough, delta
    full = (normal(6, seed=seed).softmax(0) for seed in (9, 10))
    assert any(failed_cases(question, tuple(full)))
