"""Homework of the chapter on RLHF: the numbers of its texts, the formulas of its hints, answers that nearly pass."""

import json
import math
import re
from pathlib import Path

import pytest
import torch

from rlhfkit import exact
from rlhfkit.homework.bank.wrong_claims import WRONG_CLAIMS
from rlhfkit.homework.core import QUESTIONS, diagnose
from rlhfkit.homework.proofs import failed_cases
from rlhfkit.kl import kl_shaped_rewards

MASTER = Path(__file__).parent.parent.parent / "homework" / "master" / "hw06_rlhf.ipynb"
TASKS = "\n".join("".join(cell["source"]) for cell in json.loads(MASTER.read_text(encoding="utf-8"))["cells"])
RIGHT = {question.id: question.reference for question in QUESTIONS.values() if question.chapter == 6}
EXPLAINED = {question.id: question.explanation for question in QUESTIONS.values() if question.chapter == 6}


def f64(x):
    return torch.tensor(x, dtype=torch.float64)


HALVES, UNEVEN, ONE_NIL = f64([[0.5, 0.5]]), f64([[0.2, 0.8]]), f64([[1.0, 0.0]])


def pair(numbers, digits):
    return "(" + ", ".join(f"{x:.{digits}f}" for x in numbers.flatten().tolist()) + ")"


# -- the package's own functions -----------------------------------------------------------------------------------


def by_oracle(ref_logprobs, scores, beta):
    values = exact.optimal_value(ref_logprobs, scores, beta)
    return exact.optimal_logprobs(ref_logprobs, scores, beta), values, values - beta


def fraction_by_oracle(logprobs, ref_logprobs, scores, beta):
    now, start = (exact.objective(x, ref_logprobs, scores, beta).mean() for x in (logprobs, ref_logprobs))
    return (now - start) / (exact.optimal_value(ref_logprobs, scores, beta).mean() - start)


def gradient_by_oracle(logits, ref_logprobs, scores, beta):
    logits = logits.clone().requires_grad_()
    j = exact.objective(logits.log_softmax(-1), ref_logprobs, scores, beta).mean()
    return torch.autograd.grad(j, logits)[0]


@pytest.mark.parametrize(
    "question_id, function",
    [
        ("token_rewards", kl_shaped_rewards),
        ("kl_optimum", by_oracle),
        ("fraction_of_optimum", fraction_by_oracle),
        ("rlhf_gradient", gradient_by_oracle),
    ],
)
def test_the_packages_own_functions_are_right_answers(question_id, function):
    question = QUESTIONS[question_id]
    assert failed_cases(question, function) == [""] * len(question.cases)


# -- numbers in the texts ------------------------------------------------------------------------------------------


def test_the_worked_numbers_of_the_tasks_are_the_references():
    gradient = RIGHT["rlhf_gradient"](HALVES.log(), UNEVEN.log(), ONE_NIL, 1.0)
    assert f"$\\beta = 1$ it is ${pair(gradient, 3)}$" in TASKS
    value, slope = RIGHT["kl_term"](HALVES[0], UNEVEN[0], 1.0)
    assert f"the value is ${value:.3f}$ and the gradient ${pair(slope, 3)}$" in TASKS
    assert f"it is ${pair(RIGHT['ptx_grad'](HALVES[0], f64([0.9, 0.1]), 0.5), 1)}$" in TASKS
    three = torch.tensor([[True, True, False]])
    row = RIGHT["token_rewards"](f64([2.0]), f64([[0.5, -1.0, 9.0]]), f64([[0.0] * 3]), three, 0.1)
    assert row[0].tolist() == pytest.approx([-0.05, 2.1, 0.0])
    assert "the row is $(-0.05, 2.1, 0)$" in TASKS
    logprobs, values, multipliers = RIGHT["kl_optimum"](HALVES.log(), ONE_NIL, 1.0)
    assert f"\\pi^* = {pair(logprobs.exp(), 3)}$, with value {values.item():.3f} and multiplier" in TASKS
    assert f"multiplier ${multipliers.item():.3f}$" in TASKS
    scores = f64([[0.0, 0.0], [math.log(3), math.log(3)]])
    assert f"the totals are ${pair(RIGHT['one_multiplier'](torch.cat([HALVES, UNEVEN]), scores, 1.0), 1)}$" in TASKS
    assert f"it is ${pair(RIGHT['reward_back'](f64([0.75, 0.25]), HALVES[0], 2.0, 1.0), 3)}$" in TASKS
    assert f"weights are ${pair(RIGHT['zero_derivatives'](HALVES[0], f64([1.0, 1.0]), 1.0)[0], 1)}$" in TASKS
    policy = f64([[0.6, 0.4]]).log()
    j = exact.objective(policy, HALVES.log(), ONE_NIL, 1.0)
    fraction = RIGHT["fraction_of_optimum"](policy, HALVES.log(), ONE_NIL, 1.0)
    assert f"it is {fraction:.3f}. Compare with" in TASKS
    assert f"which is {(j / values).item():.3f}:" in TASKS
    assert RIGHT["terms_of_z"](10, 3) == pytest.approx(3) and "10 words and 3 tokens it is 3." in TASKS


def test_the_numbers_of_explanations_and_verdicts_are_the_references():
    pi, sft = f64([0.5, 0.3, 0.2]), f64([0.2, 0.3, 0.5])
    value, slope = RIGHT["kl_term"](pi, sft, 1.0)
    assert f"value is {value:.3f} and the gradient {pair(slope, 3)}" in EXPLAINED["kl_term"]
    assert f"−{-value:.3f} for" in WRONG_CLAIMS["W-RLHF-1"].verdict
    entropy_slope = -pi * (pi.log() - (pi * pi.log()).sum())
    data = RIGHT["ptx_grad"](pi, f64([0.8, 0.1, 0.1]), 1.0)
    numbers = re.findall(r"-?\.\d+", EXPLAINED["ptx_grad"].split("gradient is")[1])
    assert [float(x) for x in numbers] == pytest.approx([*data.tolist(), *entropy_slope.tolist()], abs=5e-4)
    assert bool((data * entropy_slope < 0).all())
    ref, scores = f64([[0.5, 0.3, 0.2]]), f64([[1.0, 0.0, 2.0]])
    _, values, multipliers = RIGHT["kl_optimum"](ref.log(), scores, 0.5)
    z = (ref * (scores / 0.5).exp()).sum().item()
    told = f"Z = {z:.3f}, value {values.item():.4f} and lambda {multipliers.item():.4f}; without"
    assert told in EXPLAINED["kl_optimum"]
    assert f"sums to Z/e = {RIGHT['zero_derivatives'](ref[0], scores[0], 0.5)[0].sum():.3f}" in EXPLAINED["kl_optimum"]
    two = f64([[1.0, 0.0], [3.0, 0.0]])
    totals, (z1, z2) = RIGHT["one_multiplier"](HALVES.expand(2, 2), two, 1.0), (0.5 * two.exp()).sum(1).tolist()
    for text, middle in (
        (EXPLAINED["one_multiplier"], " that is {:.3f} and {:.3f}"),
        (WRONG_CLAIMS["W-RLHF-5"].verdict, " the two totals are {:.3f} and {:.3f}"),
    ):
        assert f"Z = {z1:.3f} and {z2:.3f}" in text and middle.format(*totals.tolist()) in text
    pi = exact.optimal_logprobs(ref.log(), scores, 0.5)[0].exp()
    mistaken = next(wrong.answer for wrong in QUESTIONS["reward_back"].wrongs if wrong.name == "beta-squared")
    told = EXPLAINED["reward_back"].split("come back as")[1]
    assert [float(x) for x in re.findall(r"-?\d?\.\d+", told)] == pytest.approx(
        mistaken(pi, ref[0], 0.5, z).tolist(), abs=5e-4
    )
    assert f"10^{RIGHT['terms_of_z'](50_000, 20):.0f} with 50,000" in EXPLAINED["terms_of_z"]


def test_the_gap_at_the_edge_is_as_the_explanation_says():
    """J of the best policy on a part of the responses, against -beta log of the optimum's mass on that part."""
    ref, scores, beta = f64([[0.1, 0.2, 0.3, 0.4]]).log(), f64([[0.0, 1.0, -1.0, 0.5]]), 0.8
    best = exact.optimal_logprobs(ref, scores, beta)
    for kept in ([0], [1, 3], [0, 1, 2]):
        outside = torch.ones(1, 4).bool().index_fill(1, torch.tensor(kept), False)
        policy = best.masked_fill(outside, -torch.inf).log_softmax(-1)
        gap = exact.optimal_value(ref, scores, beta) - exact.objective(policy, ref, scores, beta)
        torch.testing.assert_close(gap, -beta * best[:, kept].logsumexp(-1))
    assert "lower than the optimum by -beta log of the mass that pi* gives" in EXPLAINED["zero_derivatives"]


def test_the_statements_called_false_are_false_and_the_others_true():
    """Both sides of every line, by autograd on a policy over four responses."""
    logits, ref, r, data = (torch.randn(4, generator=torch.Generator().manual_seed(i)).double() for i in range(4))
    logits, ref, data, beta, gamma = logits.requires_grad_(), ref.log_softmax(0), data.softmax(0), 0.7, 0.4
    lp = logits.log_softmax(0)
    pi, kl = lp.exp(), exact.kl(lp[None], ref[None])[0]
    j, entropy = (
        exact.objective(lp[None], ref[None], r[None], beta)[0],
        torch.distributions.Categorical(logits=lp).entropy(),
    )

    def slope(x):
        return torch.autograd.grad(x, logits, retain_graph=True, allow_unused=True)[0]

    rows = torch.stack([slope(x) for x in lp])  # grad log pi(y)
    zero = torch.zeros(4).double()
    at_ref = ref.clone().requires_grad_()
    at_ref_kl = exact.kl(at_ref.log_softmax(0)[None], ref[None]).sum()
    sides = [
        ((pi * -beta * (lp - ref)).sum(), -beta * kl),
        (j, (pi * (r - kl)).sum()),
        (slope((pi * r).sum()), zero),  # r has no parameters: the right side is 0
        (slope(j), (pi * (r - beta * (lp - ref))).detach() @ rows),
        (-beta * pi.detach() @ rows, zero),
        (slope(gamma * (data * lp).sum()), gamma * slope(entropy)),
        ((pi * lp).sum(), -entropy),
        (torch.autograd.grad(at_ref_kl, at_ref)[0], zero),
    ]
    assert kl > 0
    false = {line for line, (left, right) in enumerate(sides, 1) if not torch.allclose(left, right, atol=1e-10)}
    assert false == RIGHT["objective_lines"]


# -- the formulas in the third hints, read as they stand -----------------------------------------------------------


def formula(question_id, after="", before="", **variables):
    """Value of the text between two others in hint 3: ``^`` is a power, a space between factors a product."""
    text = QUESTIONS[question_id].hints[2]
    text = text[text.index(after) + len(after) :]
    text = text[: text.index(before)] if before else text.rstrip(".")
    text = re.sub(r"(?<=[\w)]) (?=[\w(])", "*", text.replace("^", "**"))
    return eval(text, {"log": torch.log, "exp": torch.exp, "sum": torch.sum, **variables})


def test_the_formulas_in_the_third_hints_are_the_references():
    logits, ref, r = (torch.randn(1, 4, generator=torch.Generator().manual_seed(i)).double() for i in (4, 5, 6))
    pi, ref, beta = logits.softmax(-1), ref.softmax(-1), 0.6
    known = {"pi": pi[0], "ref": ref[0], "sft": ref[0], "r": r[0], "beta": beta, "P": 2}
    known["w"] = formula("rlhf_gradient", "with w = ", **known)
    got = formula("rlhf_gradient", "", ", with", **known)
    twice = (x.expand(2, 4) for x in (logits, ref.log(), r))
    torch.testing.assert_close(got, RIGHT["rlhf_gradient"](*twice, beta)[0])
    known["KL"] = formula("kl_term", "KL = ", ", the value", **known)
    value, slope = RIGHT["kl_term"](pi[0], ref[0], beta)
    torch.testing.assert_close(formula("kl_term", "value is ", " and the", **known), value)
    torch.testing.assert_close(formula("kl_term", "gradient is ", **known), slope)
    got = formula("ptx_grad", data=ref[0], gamma=0.3, **known)
    torch.testing.assert_close(got, RIGHT["ptx_grad"](pi[0], ref[0], 0.3))
    known["Z"] = (ref * (r / beta).exp()).sum()
    logprobs, values, multipliers = RIGHT["kl_optimum"](ref.log(), r, beta)
    got = formula("kl_optimum", "log pi* = ", ", value", **known)
    torch.testing.assert_close(got, logprobs[0])
    torch.testing.assert_close(formula("kl_optimum", ", value ", ", lambda", **known), values[0])
    torch.testing.assert_close(formula("kl_optimum", "lambda = ", "; log Z", **known), multipliers[0])
    back = formula("reward_back", **known | {"pi": logprobs[0].exp()})
    torch.testing.assert_close(back, r[0])
    torch.testing.assert_close(RIGHT["reward_back"](logprobs[0].exp(), ref[0], beta, known["Z"].item()), r[0])
    weights = formula("zero_derivatives", "weights = ", ", which", **known)
    torch.testing.assert_close(weights, RIGHT["zero_derivatives"](ref[0], r[0], beta)[0])
    torch.testing.assert_close(weights.sum(), known["Z"] / math.e)
    j, start = (exact.objective(x.log(), ref.log(), r, beta)[0] for x in (pi, ref))
    got = formula("fraction_of_optimum", "", ", with", J=j, J_ref=start, **known)
    torch.testing.assert_close(got, RIGHT["fraction_of_optimum"](pi.log(), ref.log(), r, beta))
    z = f64([2.0, 5.0, 0.5])
    got = formula("one_multiplier", "", ", with", Z=z, mean=torch.mean)
    torch.testing.assert_close(got, RIGHT["one_multiplier"](torch.ones(3, 1).double(), z.log()[:, None], 1.0))
    assert formula("terms_of_z", length=7, vocab_size=30, log10=math.log10) == RIGHT["terms_of_z"](30, 7)


# -- answers that nearly pass --------------------------------------------------------------------------------------


def rejected_somewhere(question_id, answer):
    return any(failed_cases(QUESTIONS[question_id], answer))


def test_mistakes_that_are_not_in_the_bank_are_rejected_too():
    right = RIGHT["kl_optimum"]
    fraction = RIGHT["fraction_of_optimum"]
    strangers = {
        "rlhf_gradient": [
            lambda x, ref, s, b: RIGHT["rlhf_gradient"](x, ref, s - s.mean(-1, True), 2 * b),
            lambda x, ref, s, b: RIGHT["rlhf_gradient"](x, ref.exp(), s, b),
            lambda x, ref, s, b: RIGHT["rlhf_gradient"](x, ref.roll(1, -1), s, b),
        ],
        "kl_optimum": [
            lambda ref, s, b: right(ref.exp(), s, b),
            lambda ref, s, b: (right(ref, s, b)[0], right(ref, s, b)[1].mean().expand(len(s)), right(ref, s, b)[2]),
            lambda ref, s, b: right(ref, s, max(b, 0.1)),
        ],
        "token_rewards": [
            lambda s, lp, ref, m, c: kl_shaped_rewards(s, lp, ref, m, c) / m.sum(1, keepdim=True),
            lambda s, lp, ref, m, c: kl_shaped_rewards(s - s.mean(), lp, ref, m, c),
            lambda s, lp, ref, m, c: kl_shaped_rewards(s, lp, ref, m, c).clamp(-0.2, 10.0),
        ],
        "fraction_of_optimum": [
            lambda lp, ref, s, b: fraction(lp, ref, s, b).clamp(max=0.99),
            lambda lp, ref, s, b: fraction(lp[:1], ref[:1], s[:1], b),
            lambda lp, ref, s, b: fraction(lp, ref, s - s.mean(), b) ** 2,
        ],
        "one_multiplier": [lambda ref, s, b: (s.max(1).values / b).softmax(0) * len(s)],
        "reward_back": [lambda pi, ref, b, z: b * (pi / ref).log() - (b * (pi / ref).log()).mean()],
        "ptx_grad": [lambda pi, data, gamma: (gamma * (data - pi)).clamp(min=0)],
        "kl_term": [lambda pi, sft, b: (RIGHT["kl_term"](pi, sft, b)[0], b * (sft.log() - pi.log()))],
        "terms_of_z": [lambda v, n: (n - 1) * math.log10(v), lambda v, n: n * math.log10(v + 1)],
    }
    for question_id, answers in strangers.items():
        for number, answer in enumerate(answers):
            assert rejected_somewhere(question_id, answer), (question_id, number)
            assert diagnose(QUESTIONS[question_id], answer) == [], (question_id, number)


def test_every_policy_that_is_best_on_a_part_of_the_responses_is_a_counterexample():
    """And none that is best on all of them, or on a part with other proportions."""

    def on(count, bend=1.0):
        def f(ref, scores, beta):
            exponents = bend * (ref.log() + scores / beta)
            kept = exponents.argsort()[: max(1, min(count, len(ref)))]
            policy = torch.zeros_like(ref).index_add(0, kept, exponents[kept].softmax(0))
            return RIGHT["zero_derivatives"](ref, scores, beta)[0], policy

        return f

    assert not rejected_somewhere("zero_derivatives", on(1))
    assert rejected_somewhere("zero_derivatives", on(2))  # with two responses that is all of them
    assert rejected_somewhere("zero_derivatives", on(4))
    assert not rejected_somewhere("zero_derivatives", lambda *world: on(len(world[0]) - 1)(*world))
    assert rejected_somewhere("zero_derivatives", lambda *world: on(len(world[0]) - 1, bend=0.9)(*world))


def test_messages_call_a_learners_own_number_by_its_name():
    """What is computed from the answer itself is not told as the number that was expected."""
    wrongs = {wrong.name: wrong.answer for wrong in QUESTIONS["fraction_of_optimum"].wrongs}

    def at_the_reference(ref, scores, beta):
        return ref, *RIGHT["kl_optimum"](ref, scores, beta)[1:]

    told = failed_cases(QUESTIONS["kl_optimum"], at_the_reference)[1]
    assert re.fullmatch(r"prompt 0: your logprobs give J = \S+, your value is \S+: they must agree", told)
    for number, answer in ((1, "j-over-the-maximum"), (2, "log-z-without-beta")):
        told = failed_cases(QUESTIONS["fraction_of_optimum"], wrongs[answer])[number]
        assert re.search(r"your fraction was \S+ before and is \S+ after that$", told)
