"""Homework of the chapter on DPO: the numbers of its texts, the package's own functions, near misses."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from torch.nn.functional import softplus

from rlhfkit import exact
from rlhfkit.homework.bank.wrong_claims import WRONG_CLAIMS
from rlhfkit.homework.core import QUESTIONS, diagnose
from rlhfkit.homework.proofs import failed_cases
from rlhfkit.preference_losses import conservative_dpo_loss, dpo_loss, hinge_dpo_loss, ipo_loss

MASTER = Path(__file__).parent.parent.parent / "homework" / "master" / "hw07_dpo.ipynb"
TASKS = "\n".join("".join(cell["source"]) for cell in json.loads(MASTER.read_text(encoding="utf-8"))["cells"])
RIGHT = {question.id: question.reference for question in QUESTIONS.values() if question.chapter == 7}
EXPLAINED = {question.id: question.explanation for question in QUESTIONS.values() if question.chapter == 7}
HINTS = {question.id: question.hints[2] for question in QUESTIONS.values() if question.chapter == 7}


def f64(x):
    return torch.tensor(x, dtype=torch.float64)


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).double()


def kl_of(p, q):
    """KL(p || q) of two lists of probabilities."""
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)


def pair_loss(pi, ref, chosen, rejected, beta=1.0):
    """The package's DPO loss of one pair, from two lists of probabilities."""
    rows = [f64([x[i]]).log() for x in (pi, ref) for i in (chosen, rejected)]
    return dpo_loss(*rows, beta).item()


# -- the package's own functions -----------------------------------------------------------------------------------


def weight_by_package(A, beta):
    h, zero = (A / beta).double().requires_grad_(), torch.zeros(A.shape, dtype=torch.float64)
    return -torch.autograd.grad(dpo_loss(h, zero, zero, zero, beta).sum(), h)[0]


def gradient_by_package(logits, ref_logits, chosen, rejected, beta):
    x = logits.double().requires_grad_()
    lp, ref = x.log_softmax(0), ref_logits.double().log_softmax(0)
    loss = dpo_loss(lp[[chosen]], lp[[rejected]], ref[[chosen]], ref[[rejected]], beta)
    return torch.autograd.grad(loss.sum(), x)[0]


def gaps_by_package(beta, eps):
    """Newton's method on the two losses that have a minimum."""

    def least(loss):
        h, zero = f64([0.0]), f64([0.0])
        for _ in range(400):
            h.requires_grad_()
            (slope,) = torch.autograd.grad(loss(h, zero, zero, zero).sum(), h, create_graph=True)
            (bend,) = torch.autograd.grad(slope.sum(), h)
            h = (h - (slope / bend).clamp(-1.0, 1.0)).detach()
        return h.item()

    conservative = least(lambda *rows: conservative_dpo_loss(*rows, beta, eps))
    return math.inf, conservative, least(lambda *rows: ipo_loss(*rows, beta))


@pytest.mark.parametrize(
    "question_id, function",
    [
        ("dpo", dpo_loss),
        ("dpo", lambda *arguments: conservative_dpo_loss(*arguments, 0.0)),
        ("dpo_weight", weight_by_package),
        ("dpo_gradient", gradient_by_package),
        ("ipo_gap", gaps_by_package),
    ],
)
def test_the_packages_own_functions_are_right_answers(question_id, function):
    question = QUESTIONS[question_id]
    assert failed_cases(question, function) == [""] * len(question.cases)
    assert diagnose(question, function) == []


@pytest.mark.parametrize("loss, name", [(hinge_dpo_loss, "hinge"), (ipo_loss, "ipo")])
def test_the_packages_other_losses_are_named(loss, name):
    assert [wrong.name for wrong in diagnose(QUESTIONS["dpo"], loss)] == [name]


def test_every_claim_about_dpo_is_behind_a_planted_answer():
    planted = {wrong.source for question in QUESTIONS.values() if question.chapter == 7 for wrong in question.wrongs}
    claims = {claim_id for claim_id in WRONG_CLAIMS if claim_id.startswith("W-DPO-")}
    assert len(claims) == 16 and claims <= planted


# -- numbers in the texts ------------------------------------------------------------------------------------------


def test_the_worked_numbers_of_the_tasks_are_the_references():
    one = RIGHT["dpo"](f64([-1.0]), f64([-2.0]), f64([-2.0]), f64([-1.0]), 0.5).item()
    assert f"`beta` 0.5, it is {one:.3f}; at the reference it is $\\log 2 = {math.log(2):.3f}$" in TASKS
    assert f"`beta` 0.2 it is {RIGHT['dpo_weight'](f64(0.0), 0.2):.1f}" in TASKS
    pi, third = [0.5, 0.3, 0.2], [1 / 3] * 3
    slope = RIGHT["dpo_gradient"](f64(pi).log(), f64(third).log(), 0, 2, 1.0)
    loss, squares = pair_loss(pi, third, 0, 2), slope.square().sum()
    assert re.search(rf"the loss is {loss:.3f}, and the sum of\s+squares of the gradient is {squares:.3f}", TASKS)
    assert f"three times the probability of $y_1$ has the loss {pair_loss([0.1, 0.3, 0.6], third, 1, 0):.3f}" in TASKS
    assert f"has the loss {math.log1p(1 / 3):.3f} and the divergence {kl_of([0.1, 0.3, 0.6], third):.3f}" in TASKS
    ref, pi = [0.45, 0.45, 0.1], [1e-9, 0.5, 0.5 - 1e-9]
    assert pair_loss(pi, ref, 1, 0) == pytest.approx(2e-9)
    assert f"$2 \\cdot 10^{{-9}}$ and the divergence {kl_of(pi, ref):.3f}" in TASKS
    assert "two of the three are {1:.3f} and {2}".format(*RIGHT["ipo_gap"](2.0, 0.25)) in TASKS
    assert "gap 1 they are {:.3f} and {:.3f}".format(*RIGHT["dpo_gradient_steps"](1.0, 1.0, 1, 1.0)) in TASKS
    probs, loss = trained(torch.eye(3).double())
    assert f"the loss ends at {loss:.3f} and the chosen response at {probs[0]:.3f}" in TASKS


def trained(features):
    """The training of the task, with the gradient by hand: theta moves along f_w - f_l."""
    theta, push = torch.zeros(features.shape[1]).double(), features[0] - features[1]
    for _ in range(20):
        theta = theta + 0.1 * torch.sigmoid(-push @ theta) * push
    return (features @ theta).softmax(0), -torch.nn.functional.logsigmoid(push @ theta).item()


def test_the_numbers_of_explanations_and_verdicts_are_the_references():
    losses = [pair_loss(p, [1 / 3] * 3, 1, 0) for p in ([1 / 3] * 3, [0.3, 0.2, 0.5], [2 / 11, 7 / 22, 0.5])]
    losses.append(pair_loss([3 / 11, 21 / 44, 0.25], [1 / 3] * 3, 1, 0))
    assert [round(x, 4) for x in losses] == RIGHT["dpo_blind_losses"]
    assert losses == pytest.approx([math.log(2), math.log(5 / 2), math.log(11 / 7), math.log(11 / 7)])
    assert f"its loss is {losses[1]:.3f}, above log 2 = {losses[0]:.3f}" in WRONG_CLAIMS["W-DPO-1"].verdict.replace(
        "  ", " "
    )
    weights = RIGHT["dpo_weight"](f64([-3.0, 0.0, 3.0]), 1.0).tolist()
    assert "{:.3f}, {:.1f} and {:.3f} at A = -3, 0 and 3".format(*weights) in EXPLAINED["dpo_weight"]
    assert "{:.3f}, {:.1f} and {:.3f} at A = −3, 0, 3".format(*weights) in WRONG_CLAIMS["W-DPO-9"].verdict
    first, second = RIGHT["dpo_blind_pair"]
    distances = [kl_of(p, [1 / 3] * 3) for p in (first, second)]
    assert pair_loss(first, [1 / 3] * 3, 1, 0) == pytest.approx(pair_loss(second, [1 / 3] * 3, 1, 0))
    text = " ".join(EXPLAINED["dpo_blind_pair"].split())
    assert f"log(1 + 1/1.8) = {pair_loss(first, [1 / 3] * 3, 1, 0):.4f}" in text
    assert "the reference are {:.4f} and {:.4f}".format(*distances) in text
    half = 22 / 69 + 2 / 11 + 0.5
    assert f"sum to {half:.4f}" in WRONG_CLAIMS["W-DPO-3"].verdict
    for K in (1.0, 8.0, 20.0):
        ref, pi = RIGHT["dpo_kl"](K)
        assert kl_of(pi, ref) == pytest.approx(-math.log(ref[2]) / 2 - 0.35, abs=0.01)
    assert f"log(1/min ref), {math.log(3):.2f} for a uniform one" in EXPLAINED["dpo_kl"]
    assert "infinity, {1:.2f} and {2:.2f} nats".format(*RIGHT["ipo_gap"](0.1, 0.1)) in EXPLAINED["ipo_gap"]
    runs = [RIGHT["dpo_gradient_steps"](beta, 0.1, 5, 1.0) for beta in (0.1, 0.5, 2.0)]
    after, best = zip(*runs, strict=True)
    text = EXPLAINED["dpo_gradient_steps"]
    assert "are {:.5f}, {:.5f} and {:.5f}, at the optimum".format(*after) in text
    assert "at the optimum {:.4f}, {:.4f} and {:.4f}.".format(*best) in text
    assert list(after) == sorted(after) and list(best) == sorted(best, reverse=True)
    probs, loss = trained(f64(RIGHT["displacement"]))
    text = EXPLAINED["displacement"]
    assert "probabilities are {:.3f}, {:.3f} and {:.3f}".format(*probs.tolist()) in text
    assert f"fallen from {math.log(2):.3f} to {loss:.3f}" in text


def test_adams_first_steps_do_not_depend_on_beta_and_those_of_gradient_descent_do():
    """What the explanation says of dpo_gradient_steps, with torch's own optimisers."""
    moved = {}
    for make in (torch.optim.SGD, torch.optim.Adam):
        for beta in (0.1, 2.0):
            logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
            optimiser = make([logits], lr=0.01)
            for _ in range(3):
                lp, zero, win = logits.log_softmax(0), f64([0.0]), 1 / (1 + math.exp(-1.0))
                losses = [dpo_loss(lp[[i]], lp[[1 - i]], zero, zero, beta) for i in (0, 1)]
                optimiser.zero_grad()
                (win * losses[0] + (1 - win) * losses[1]).sum().backward()
                optimiser.step()
            moved[make, beta] = (logits[0] - logits[1]).item()
    assert moved[torch.optim.Adam, 0.1] == pytest.approx(3 * 2 * 0.01, rel=0.01)
    assert moved[torch.optim.Adam, 2.0] == pytest.approx(3 * 2 * 0.01, rel=0.05)
    assert moved[torch.optim.SGD, 2.0] == pytest.approx(20 * moved[torch.optim.SGD, 0.1], rel=0.1)


def test_sigmoid_underflows_where_the_explanation_says():
    assert torch.sigmoid(torch.tensor(-89.0)) == 0 < torch.sigmoid(torch.tensor(-88.0))
    assert "0 below about -89" in EXPLAINED["dpo"]


def test_the_lines_called_false_are_false_and_the_others_true():
    """Two prompts with four responses, whose rewards are `scores`, and a policy that is not the best one."""
    ref, scores, beta = normal(2, 4, seed=1).log_softmax(1), normal(2, 4, seed=2), 0.7
    best, z = exact.optimal_logprobs(ref, scores, beta), (ref.exp() * (scores / beta).exp()).sum(1)
    policy = normal(2, 4, seed=3).log_softmax(1)
    implied = beta * (best - ref)
    win = exact.preference_probabilities(scores)[0, 1, 2]  # y_w is 1, y_l is 2
    lifted = scores + f64([[3.0], [-1.0]])
    margin = beta * ((policy - ref)[0, 1] - (policy - ref)[0, 2])
    rows = [x[0, [i]] for x in (policy, ref) for i in (1, 2)]
    loss = dpo_loss(*rows, beta)
    leaf = [rows[0].clone().requires_grad_(), rows[1]]
    slope = torch.autograd.grad(dpo_loss(*leaf, *rows[2:], beta).sum(), leaf[0])[0]
    prompt, pads = (-1.7, -2.2), ((-0.4, -0.9), (-3.0, -2.1))  # under policy and reference
    with_prompt = [rows[0] + prompt[0], rows[1] + prompt[0], rows[2] + prompt[1], rows[3] + prompt[1]]
    with_pads = [rows[0] + pads[0][0], rows[1] + pads[1][0], rows[2] + pads[0][1], rows[3] + pads[1][1]]
    other = policy[0].exp().clone()
    other[[1, 2]] *= 0.5
    other[3] += 1 - other.sum()
    copies = [
        dpo_loss(x[[1] * 9], x[[2] * 9], ref[0, [1] * 9], ref[0, [2] * 9], beta).mean()
        for x in (policy[0], other.log())
    ]
    sides = {
        1: (best, ref + scores / beta - z.log()[:, None]),
        2: (scores, implied + beta * z.log()[:, None]),
        3: (scores[0, 1] - scores[1, 3], implied[0, 1] - implied[1, 3]),
        4: (win, scores[0, 2].exp() / (scores[0, 1].exp() + scores[0, 2].exp())),
        5: (
            torch.cat([best.flatten(), win[None]]),
            torch.cat(
                [
                    exact.optimal_logprobs(ref, lifted, beta).flatten(),
                    exact.preference_probabilities(lifted)[0, 1, 2][None],
                ]
            ),
        ),
        6: (loss, -(beta * (policy - ref)[0, [1]] + beta * (policy - ref)[0, [2]]).log()),
        7: (slope, -beta * torch.sigmoid(margin)[None]),
        9: (loss, dpo_loss(*with_prompt, beta)),
        10: (loss, dpo_loss(*with_pads, beta)),
    }
    false = {line for line, (left, right) in sides.items() if not torch.allclose(left, right, atol=1e-10)}
    torch.testing.assert_close(*copies)  # what line 8 denies
    assert false | {8} == RIGHT["dpo_last_line"]
    remains = sides[3][0] - sides[3][1]
    torch.testing.assert_close(remains, beta * (z[0].log() - z[1].log()))  # what W-DPO-15 forgets


def formula(question_id, after, before, **variables):
    """Value of the text between two others in hint 3: ``^`` is a power, a space between factors a product."""
    text = HINTS[question_id]
    text = text[text.index(after) + len(after) :]
    text = text[: text.index(before)] if before else text.rstrip(".")
    text = re.sub(r"(?<=[\w)]) (?=[\w(])", "*", text.replace("^", "**"))
    return eval(text, {"log": math.log, "exp": math.exp, "sigmoid": lambda x: 1 / (1 + math.exp(-x)), **variables})


def test_the_formulas_in_the_third_hints_are_the_references():
    assert formula("dpo_weight", "", "", A=1.3, beta=0.4) == pytest.approx(RIGHT["dpo_weight"](f64(1.3), 0.4).item())
    margin = 0.3 * math.log(0.5 / 0.2)
    weight = formula("dpo_gradient", "", " (1_w", A=margin, beta=0.3)
    slope = RIGHT["dpo_gradient"](f64([0.5, 0.3, 0.2]).log(), torch.zeros(3).double(), 0, 2, 0.3)
    assert slope.tolist() == pytest.approx([weight, 0, -weight])
    for ratio, want in zip((1, 2 / 3, 7 / 4), RIGHT["dpo_blind_losses"], strict=False):
        assert formula("dpo_blind_losses", "", ", for", ratio=ratio) == pytest.approx(want, abs=5e-5)
    e = formula("dpo_kl", "with e = ", ", pi", K=4.0)
    known = RIGHT["dpo_kl"](4.0)
    assert formula("dpo_kl", "ref = ", " with", e=e) == pytest.approx(tuple(known[0]))
    assert formula("dpo_kl", "pi = ", "") == pytest.approx(tuple(known[1]))
    gaps = RIGHT["ipo_gap"](0.3, 0.2)
    assert formula("ipo_gap", "conservative DPO: ", ";", eps=0.2, beta=0.3) == pytest.approx(gaps[1])
    assert formula("ipo_gap", "IPO: ", "", beta=0.3) == pytest.approx(gaps[2])
    run = {"lr": 0.4, "beta": 0.6, "gap": 1.1}
    h = formula("dpo_gradient_steps", "h += ", ", from", h=0.0, **run)
    h += formula("dpo_gradient_steps", "h += ", ", from", h=h, **run)
    after, best = RIGHT["dpo_gradient_steps"](0.6, 0.4, 2, 1.1)
    assert formula("dpo_gradient_steps", "KL = ", "", h=h) == pytest.approx(after)
    assert formula("dpo_gradient_steps", "KL = ", "", h=1.1 / 0.6) == pytest.approx(best)
    a, r = 0.02, 3.0
    policy = formula("dpo_blind_pair", "", " with", a=a, r=r)
    assert sum(policy) == pytest.approx(1) and policy[1] / policy[0] == pytest.approx(r)


# -- answers that nearly pass --------------------------------------------------------------------------------------


def test_mistakes_that_are_not_in_the_bank_are_rejected_too():
    tie = RIGHT["dpo_blind_pair"]
    strangers = {
        "dpo": [
            lambda c, r, rc, rr, b: dpo_loss(c, r, rc, rr, b) - math.log(2),
            lambda c, r, rc, rr, b: conservative_dpo_loss(c, r, rc, rr, b, 0.01),
            lambda c, r, rc, rr, b: dpo_loss(c, r, rc.mean().expand_as(rc), rr.mean().expand_as(rr), b),
            lambda c, r, rc, rr, b: dpo_loss(c, r, rc, rr, b) + 0.1 * (c - c.detach()),
            lambda c, r, rc, rr, b: dpo_loss(c, r, rc, rr, max(b, 0.1)),
            lambda *x: torch.cat(
                [dpo_loss(*[row[i : i + 1] for row in x[:4]], x[4]) for i in range(min(5, len(x[0])))]
            ),
            lambda c, r, rc, rr, b: softplus(b * ((rc - rr).detach() - c + r), threshold=5),
            lambda c, r, rc, rr, b: dpo_loss(c - rc.detach(), (r - rr.detach()).clamp(-3, 3), 0 * rc, 0 * rr, b),
        ],
        "dpo_weight": [
            lambda a, b: b * torch.sigmoid(-a).clamp(0.01, 0.99),
            lambda a, b: torch.sigmoid(-a) * b**2,
            lambda a, b: b * (-a / 2).exp() / 2,
            lambda a, b: b * torch.sigmoid(-a.T) if a.ndim == 2 else b * torch.sigmoid(-a),
            lambda a, b: b * torch.sigmoid(-a.clamp(-11, 11)),
        ],
        "dpo_gradient": [
            lambda *x: gradient_by_package(*x) / len(x[0]),
            lambda *x: gradient_by_package(*x) + 0.01 * x[0].softmax(0),
            lambda x, ref, w, l, b: gradient_by_package(x, ref, w, l, 1.0),
            lambda x, ref, w, l, b: gradient_by_package(x.clamp(min=x.max() - 20), ref, w, l, b),
        ],
        "dpo_blind_losses": [[0.6931, 0.4520, 0.9163, 0.4520], [0.69, 0.92, 0.45, 0.45], [0.6931, 0.9163, 0.4512, 0.4]],
        "dpo_blind_pair": [(tie[0], [0.01, 0.02, 0.97]), ([0.2, 0.36, 0.44], [-0.01, -0.018, 1.028])],
        "dpo_kl": [
            lambda K: RIGHT["dpo_kl"](min(K, 10.0)),
            lambda K: ([1 - 2e-9, 1e-9, 1e-9], [1e-9, 1 - 2e-9, 1e-9]),
            lambda K: (RIGHT["dpo_kl"](K)[0], [1e-5, 0.5, 0.49999]),
        ],
        "ipo_gap": [
            lambda b, e: (10 / b, *RIGHT["ipo_gap"](b, e)[1:]),
            lambda b, e: (math.inf, *(min(gap, 100.0) for gap in RIGHT["ipo_gap"](b, e)[1:])),
            lambda b, e: (math.inf, math.sqrt((1 - e) / e) / b, 0.5 / b),
        ],
        "dpo_gradient_steps": [
            lambda b, lr, n, g: RIGHT["dpo_gradient_steps"](b, lr, n + 2, g),
            lambda b, lr, n, g: [x + 1e-4 for x in RIGHT["dpo_gradient_steps"](b, lr, n, g)],
            lambda b, lr, n, g: (
                RIGHT["dpo_gradient_steps"](b, lr, n, g)[0],
                RIGHT["dpo_gradient_steps"](b, 4, 1, max(g, 0.0))[1],
            ),
            lambda b, lr, n, g: RIGHT["dpo_gradient_steps"](b, lr, min(n, 50), g),
            lambda b, lr, n, g: RIGHT["dpo_gradient_steps"](b, lr * b, n, g),
        ],
        "dpo_last_line": [{3}, {1, 2, 3}, set(range(1, 11)), {3, 4, 6, 7}],
        "displacement": [
            [[5.0], [0.0], [5.5]],
            [[2.0, 0.0], [1.0, 0.0], [0.0, 9.0]],
            [[0.0, 3.0], [0.0, 3.0], [9.0, 9.0]],
        ],
    }
    for question_id, answers in strangers.items():
        for number, answer in enumerate(answers):
            assert any(failed_cases(QUESTIONS[question_id], answer)), (question_id, number)
    for question_id in ("dpo", "dpo_weight", "dpo_gradient", "ipo_gap", "dpo_gradient_steps"):
        for number, answer in enumerate(strangers[question_id]):
            assert diagnose(QUESTIONS[question_id], answer) == [], (question_id, number)


def loss_of(margin):
    return lambda c, r, rc, rr, b: margin(b * (c - rc.detach() - r + rr.detach()))


def gradient_of(margin):
    def f(logits, ref_logits, chosen, rejected, beta):
        h = logits[chosen] - logits[rejected] - ref_logits[chosen] + ref_logits[rejected]
        both = torch.eye(len(logits))[[chosen, rejected]]
        return -beta * torch.sigmoid(-margin(beta * h)) * (both[0] - both[1])

    return f


def by_adam(beta, lr, steps, gap):
    logits = torch.zeros(2, requires_grad=True)
    optimiser, win = torch.optim.Adam([logits], lr=lr), 1 / (1 + math.exp(-gap))
    for _ in range(steps):
        h = logits[0] - logits[1]
        loss = win * softplus(-beta * h) + (1 - win) * softplus(beta * h)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    after = logits.log_softmax(0).tolist()
    return math.log(2) + math.fsum(x * math.exp(x) for x in after), RIGHT["dpo_gradient_steps"](beta, lr, 1, gap)[1]


SAME_MISTAKES = [
    *(("dpo", "clamped", loss_of(lambda A, size=size: softplus(-A.clamp(min=-size)))) for size in (20, 100, 1000)),
    ("dpo", "clamped", loss_of(lambda A: -A.sigmoid().clamp(min=1e-12).log())),
    *(("dpo", "epsilon", loss_of(lambda A, eps=eps: -(A.sigmoid() + eps).log())) for eps in (1e-6, 1e-9)),
    *(("dpo", "clamped-nearby", loss_of(lambda A, size=size: softplus(-A.clamp(-size, size)))) for size in (5, 10)),
    *(("dpo", "clamped-above", loss_of(lambda A, most=most: softplus(-A.clamp(max=most)))) for most in (5, 20)),
    ("dpo", "whole-slope-at-0", loss_of(lambda A: torch.where(A > 0, 0 * A, -A) + (-A.abs()).exp().log1p())),
    ("dpo", "chosen-only", lambda c, r, rc, rr, b: softplus(-b * (c - rc.detach()))),
    ("dpo", "reference-added", lambda c, r, rc, rr, b: softplus(b * (r - rc.detach() - c + rr.detach()))),
    ("dpo", "loss-over-beta", lambda *x: dpo_loss(*x) / x[4]),
    ("dpo_weight", "one-axis-only", lambda A, b: torch.stack([b * torch.sigmoid(-a) for a in A])),
    ("dpo_weight", "flat", lambda A, b: b * torch.sigmoid(-A.reshape(-1))),
    ("dpo_gradient", "margin-cut", gradient_of(lambda A: A.clamp(-5, 5))),
    ("dpo_gradient", "margin-cut", gradient_of(lambda A: A.clamp(max=0.4))),
    ("ipo_gap", "dpo-large-number", lambda b, e: (50 / b, *RIGHT["ipo_gap"](b, e)[1:])),
    ("dpo_kl", "exchanged", lambda K: RIGHT["dpo_kl"](K + 0.5)[::-1]),
    ("dpo_kl", "not-rare-enough", lambda K: ([0.5, 0.5 - math.exp(-K), math.exp(-K)], [1e-8, 0.5, 0.5 - 1e-8])),
    ("dpo_gradient_steps", "adam", by_adam),
    ("displacement", "table", [[1, 0, 0, 1], [0, 1, 0, 1], [0, 0, 1, 1]]),
    ("displacement", "hardly-moved", [[0.1], [0.0], [10.0]]),
    ("displacement", "third-as-the-chosen", [[1.0, 0.0], [0.0, 0.0], [1.0, 5.0]]),
]


@pytest.mark.parametrize("question_id, name, answer", SAME_MISTAKES)
def test_a_planted_mistake_is_named_with_other_numbers_and_in_other_words_too(question_id, name, answer):
    question = QUESTIONS[question_id]
    assert any(failed_cases(question, answer))
    assert [wrong.name for wrong in diagnose(question, answer)] == [name]


def test_messages_say_what_is_wrong_with_the_answer_at_hand():
    zeros = failed_cases(QUESTIONS["dpo_gradient"], lambda logits, *_: torch.zeros_like(logits))
    assert "entries 0 and 2 must not be 0" in zeros[1]
    lopsided = failed_cases(QUESTIONS["dpo_gradient"], lambda *x: gradient_by_package(*x).clamp(max=0))
    assert "must sum to 0" in lopsided[1]
    logs = failed_cases(QUESTIONS["dpo_kl"], lambda K: tuple(f64(x).log() for x in RIGHT["dpo_kl"](K)))
    assert "negative numbers" in logs[1] and "negative numbers" in logs[2]
    tiny = failed_cases(QUESTIONS["dpo_kl"], lambda K: RIGHT["dpo_kl"](20.0))
    assert "e-19" in tiny[0]
    far = failed_cases(QUESTIONS["ipo_gap"], lambda b, e: (1e9, *RIGHT["ipo_gap"](b, e)[1:]))
    assert "math.inf" in far[0]


def test_ties_that_are_rounded_to_four_decimals_pass_and_others_must_be_exact():
    question = QUESTIONS["dpo_blind_pair"]
    wide = [1 / 3, 2 / 3, 0.0]
    assert failed_cases(question, ([0.0033, 0.0067, 0.99], wide)) == ["", "", ""]
    assert failed_cases(question, ([0.00333, 0.00672, 0.98995], wide))[1]
    assert failed_cases(question, ([0.0001, 0.0003, 0.9996], wide))[1]


def test_with_one_feature_the_chosen_response_falls_at_the_start_if_the_third_exceeds_2():
    for third in (1.9, 2.1):
        features = f64([1.0, 0.0, third])
        slope = (features[0] - features.mean()) * (features[0] - features[1])
        assert (slope < 0) == (third > 2)
        lp = (features * 0.001).log_softmax(0)  # a small step along f_w - f_l = 1
        assert (lp[0] < -math.log(3)) == (third > 2)
    assert failed_cases(QUESTIONS["displacement"], [[2.0, 1.0], [1.0, 1.0], [9.0, 1.0]]) == ["", ""]
