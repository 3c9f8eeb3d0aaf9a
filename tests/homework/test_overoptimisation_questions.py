"""Homework of the chapter on over-optimisation: its numbers, the formulas of its hints, answers that nearly pass."""

import itertools
import json
import math
import re
from pathlib import Path

import pytest
import torch

from rlhfkit import exact
from rlhfkit.homework.bank import ch09_overoptimisation as bank
from rlhfkit.homework.core import QUESTIONS, diagnose, judge
from rlhfkit.homework.proofs import failed_cases

MASTER = Path(__file__).parent.parent.parent / "homework" / "master" / "hw09_overoptimisation.ipynb"
TASKS = "\n".join("".join(cell["source"]) for cell in json.loads(MASTER.read_text(encoding="utf-8"))["cells"])
RIGHT = {question.id: question.reference for question in bank.CHAPTER}
EXPLAINED = {question.id: question.explanation for question in bank.CHAPTER}


def f64(x):
    return torch.tensor(x, dtype=torch.float64)


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair(numbers, digits):
    return "(" + ", ".join(f"{x:.{digits}f}" for x in numbers.flatten().tolist()) + ")"


# -- the package's own functions -----------------------------------------------------------------------------------


def kl_by_oracle(n, responses):
    ref = torch.zeros(1, responses, dtype=torch.float64).log_softmax(-1)
    return exact.kl(exact.best_of_n(ref, torch.arange(float(responses))[None], n), ref)[0]


def games(scores, tie=0.5):
    return (scores[:, None] > scores).double() + tie * (scores[:, None] == scores)


def rate_by_oracle(ref, scores, n):
    return exact.best_of_n(ref.double().log()[None], scores[None], n)[0].exp() @ games(scores) @ ref.double()


@pytest.mark.parametrize(
    "question_id, function",
    [
        ("best_of_n", exact.best_of_n),
        ("frontier_gold", exact.frontier),
        ("bon_kl", kl_by_oracle),
        ("bon_win_rate", rate_by_oracle),
    ],
)
def test_the_packages_own_functions_are_right_answers(question_id, function):
    question = QUESTIONS[question_id]
    assert failed_cases(question, function) == [""] * len(question.cases)


# -- numbers in the texts ------------------------------------------------------------------------------------------

REF, TIED = f64([[0.5, 0.3, 0.2]]), f64([[0.0, 1.0, 1.0]])


def test_the_worked_numbers_of_the_tasks_are_the_references():
    law = RIGHT["best_of_n"](REF.log(), TIED, 2).exp()
    assert law[0].tolist() == pytest.approx([0.25, 0.45, 0.3])
    assert "$n = 2$ the probabilities are $(0.25, 0.45, 0.30)$" in TASKS
    torch.testing.assert_close(RIGHT["best_of_n"](REF.log(), 100 * TIED, 2).exp(), law)
    assert f"For $n = 2$ and $M = 2$ it is {RIGHT['bon_kl'](2, 2):.3f}." in TASKS
    assert f"which here is {math.log(2) - 1 / 2:.3f}." in TASKS
    rate = RIGHT["bon_win_rate"](f64([0.5, 0.5]), f64([0.0, 1.0]), 2).item()
    assert f"and $n = 2$ it is {rate:.3f}. The number usually given is $n/(n+1)$, here {2 / 3:.3f}." in TASKS
    estimate = RIGHT["unbiased_bon"](f64([3.0, 1.0, 2.0]), 2).item()
    assert f"it is $(3 + 3 + 2)/3 = {estimate:.3f}$" in TASKS and estimate == pytest.approx(8 / 3)
    kl, gold = RIGHT["frontier_gold"](f64([[0.5, 0.5]]).log(), f64([[1.0, 0.0]]), [1.0], f64([[0.0, 1.0]]))
    assert f"$\\beta = 1$ they are {kl.item():.3f} and {gold.item():.3f}." in TASKS
    bon, rl = RIGHT["gao_peak"](2.0, 1.0)
    assert bon == (1, 1) and f"the pairs are $(1, 1)$ and ${pair(f64(rl), 3)}$" in TASKS
    assert f"A response with gold score 0.5 and 40 tokens has the proxy $0.5 + 2 = {0.5 + bank._BONUS * 40}$" in TASKS
    assert f"+ {bank._BONUS} \\cdot \\text{{length}}(y)$" in TASKS
    assert f"from 10 down to {bank._FAR}" in TASKS and bank._PRICES[0] == 10 and bank._NS[-1] == 1024
    assert bank._PRICES[-1] == pytest.approx(bank._FAR, rel=0.1)


def test_the_numbers_of_the_explanations_are_the_references():
    few, many = (RIGHT["best_of_n"](REF.log(), TIED, n).exp() for n in (2, 64))
    told = EXPLAINED["best_of_n"]
    assert few[0].tolist() == pytest.approx([0.25, 0.45, 0.3]) and "(.25, .45, .30)" in told
    assert many[0].tolist() == pytest.approx([0, 0.6, 0.4], abs=1e-9) and "practically (0, .6, .4)" in told
    told = EXPLAINED["bon_kl"]
    assert f"levels off at {RIGHT['bon_kl'](64, 2):.3f} while the formula goes on: for n = 64 it gives " in told
    four = (2, 4, 16, 64)
    numbers = [f"{RIGHT['bon_kl'](n, 10):.3f}" for n in four], [f"{math.log(n) - 1 + 1 / n:.3f}" for n in four]
    assert f"{', '.join(numbers[0])}, the bound {', '.join(numbers[1])}." in told
    assert told.count(numbers[1][-1]) == 2
    ten, scores = torch.full((10,), 0.1, dtype=torch.float64), torch.arange(10.0)
    best = exact.best_of_n(ten.log()[None], scores[None], 4)[0].exp()
    half, wins, losses = (f"{(best @ games(scores, tie) @ ten).item():.3f}" for tie in (0.5, 1.0, 0.0))
    assert f"give {half} (one half), {wins} (wins) and {losses} (losses), against 4/5" in EXPLAINED["bon_win_rate"]
    assert RIGHT["bon_win_rate"](f64([0.5, 0.5]), f64([0.0, 1.0]), 60).item() == pytest.approx(0.75)
    bon, rl = RIGHT["gao_peak"](2.0, 0.8)
    told = "at KL {:.2f}, height {:.2f}, and at KL {:.2f}, height {:.2f}".format(*bon, *rl)
    assert told in EXPLAINED["gao_peak"]


def test_the_numbers_of_the_length_hack_are_those_of_the_oracle():
    ref, gold, lengths = (f64([x]) for x in RIGHT["length_hack"])
    proxy = gold + 0.05 * lengths
    assert proxy[0].tolist() == pytest.approx([1, 2, 3])
    laws = [exact.best_of_n(ref.log(), proxy, n).exp() for n in bank._NS]
    best = [(law * gold).sum().item() for law in laws]
    means = [(law * proxy).sum().item() for law in laws]
    _, path = exact.frontier(ref.log(), proxy, bank._PRICES, gold)
    _, rising = exact.frontier(ref.log(), proxy, bank._PRICES)
    told = EXPLAINED["length_hack"]
    assert f"from {best[0]:.3f} to {max(best):.3f} for the best of {bank._NS[best.index(max(best))]}" in told
    assert f"to {path.max():.3f} along" in told
    assert best[-1] < -0.99 and path[-1] < -0.99
    assert means == sorted(means) and (rising.diff(dim=0) > -1e-12).all()  # the proxy's own mean
    apart = (gold.T != gold) * ref.T * ref
    agreement = (apart * ((gold.T - gold) * (proxy.T - proxy) > 0)).sum() / apart.sum()
    assert f"(agreement {agreement:.3f})" in told


# -- what the explanations claim -----------------------------------------------------------------------------------


def worlds():
    """Six references with random scores, rounded so that some of them tie."""
    for seed in range(6):
        ref = draw(1, 6, seed=seed).log_softmax(-1)
        for scores in (draw(1, 6, seed=seed + 10), draw(1, 6, seed=seed + 10).round()):
            yield ref, scores


@pytest.mark.parametrize("n", [1, 2, 5, 30])
def test_the_usual_formulas_are_bounds_also_with_ties(n):
    for ref, scores in worlds():
        best = exact.best_of_n(ref, scores, n)
        assert exact.kl(best, ref).item() <= math.log(n) - (n - 1) / n + 1e-12
        half, wins = ((best.exp()[0] @ games(scores[0], tie) @ ref.exp()[0]).item() for tie in (0.5, 1.0))
        assert half <= n / (n + 1) + 1e-12 and wins >= n / (n + 1) - 1e-12


def test_along_the_path_the_means_have_variance_and_covariance_as_slopes():
    ref, proxy, gold = (draw(1, 5, seed=seed) for seed in (1, 2, 3))
    ref = ref.log_softmax(-1)
    x = f64(0.7).requires_grad_()
    law = (ref + x * proxy).softmax(-1)
    p = law.detach()
    for judge_score in (proxy, gold):
        mean = (law * judge_score).sum()
        (slope,) = torch.autograd.grad(mean, x, retain_graph=True)
        covariance = (p * proxy * judge_score).sum() - (p * proxy).sum() * mean.detach()
        torch.testing.assert_close(slope, covariance)


def test_drawing_from_the_pool_with_replacement_is_too_low_and_groups_are_right_on_average():
    wrongs = {wrong.name: wrong.answer for wrong in QUESTIONS["unbiased_bon"].wrongs}
    q, s, m, n = f64([0.5, 0.3, 0.2]), f64([0.0, 1.0, 3.0]), 4, 2
    pools = torch.tensor(list(itertools.product(range(3), repeat=m)))
    weights = q[pools].prod(1)
    best = exact.best_of_n(q.log()[None], s[None], n)[0].exp() @ s

    def mean(estimate):
        return sum(w * estimate(s[pool], n) for w, pool in zip(weights, pools, strict=True))

    for name in ("groups", "windows", "first-n"):
        torch.testing.assert_close(mean(wrongs[name]), best)
    assert mean(wrongs["with-replacement"]) < best - 0.05
    torch.testing.assert_close(mean(RIGHT["unbiased_bon"]), best)


# -- the formulas in the third hints, read as they stand -----------------------------------------------------------


def formula(question_id, after="", before="", **variables):
    """Value of the text between two others in hint 3: ``^`` is a power, a space between factors a product."""
    text = QUESTIONS[question_id].hints[2]
    text = text[text.index(after) + len(after) :]
    text = text[: text.index(before)] if before else text.rstrip(".")
    text = re.sub(r"(?<=[\w)]) (?=[\w(])", "*", text.replace("^", "**"))
    return eval(text, {"log": torch.log, "exp": torch.exp, "sum": torch.sum, **variables})


def test_the_formulas_in_the_third_hints_are_the_references():
    n, q, s = 3, f64([0.1, 0.4, 0.2, 0.3]), f64([1.0, 0.0, 1.0, 2.0])
    at_most, below = ((q * (s <= x)).sum() for x in s), ((q * (s < x)).sum() for x in s)
    known = {"F": torch.stack(list(at_most)), "G": torch.stack(list(below)), "n": n, "ref": q}
    got = formula("best_of_n", "", ", with", **known)
    torch.testing.assert_close(got, RIGHT["best_of_n"](q.log()[None], s[None], n)[0])
    once = torch.tensor([True, True, False, True])  # every level of the score once
    got = formula("bon_win_rate", "different scores of ", ", with", **known)[once].sum()
    torch.testing.assert_close(got, RIGHT["bon_win_rate"](q, s, n))
    total = 0.0
    for k in range(1, 6):
        known = {"k": k, "n": n, "M": 5, "log": math.log}
        known["p_k"] = formula("bon_kl", "with p_k = ", " and M", **known)
        total += formula("bon_kl", "k of ", ", with", **known)
    assert total == pytest.approx(RIGHT["bon_kl"](n, 5))
    pool = draw(5, seed=1)
    terms = [
        formula("unbiased_bon", "1..m of ", ", with", s_i=x, i=i, m=5, n=n, C=math.comb)
        for i, x in enumerate(pool.sort().values, 1)
    ]
    torch.testing.assert_close(sum(terms), RIGHT["unbiased_bon"](pool, n))
    known = {"ref": q, "r": s, "g": draw(4, seed=2), "beta": 0.6, "Z": (q * (s / 0.6).exp()).sum()}
    known["pi"] = formula("frontier_gold", "pi = ", "; kl", **known)
    kl, gold = RIGHT["frontier_gold"](q.log()[None], s[None], [0.6], known["g"][None])
    torch.testing.assert_close(formula("frontier_gold", "kl = ", ", gold", **known), kl[0, 0])
    torch.testing.assert_close(formula("frontier_gold", "gold = ", ", with", **known), gold[0, 0])
    known = {"a": 2.3, "b": 0.7, "exp": math.exp}
    bounds = (
        ("", " and a", " for best"),
        ("and ", " for best", ""),
        ("n; ", " and b", ""),
        ("exp(2 (a/b - 1)) and ", " for RL", ""),
    )
    hint = [formula("gao_peak", after, before, **known) for after, before, _ in bounds]
    assert hint == pytest.approx([x for peak in RIGHT["gao_peak"](2.3, 0.7) for x in peak])
    world = [
        formula("length_hack", f"{name} = ", end)
        for name, end in (("ref", ", gold"), ("gold", ", len"), ("lengths", "."))
    ]
    assert [list(part) for part in world] == list(RIGHT["length_hack"])


# -- answers that nearly pass --------------------------------------------------------------------------------------


def test_mistakes_that_are_not_in_the_bank_are_rejected_too():
    best, path = RIGHT["best_of_n"], RIGHT["frontier_gold"]
    strangers = {
        "best_of_n": [
            lambda ref, s, n: best(ref, s.round(), n),
            lambda ref, s, n: best(ref, s - torch.arange(s.shape[-1]) * 1e-3, n),  # the first wins a tie
            lambda ref, s, n: best(ref.exp(), s, n),
            lambda ref, s, n: best(ref, s, min(n, 3)),
            lambda ref, s, n: best(ref[:1].expand_as(ref), s, n),
        ],
        "bon_kl": [
            lambda n, m: RIGHT["bon_kl"](n, m + 1),
            lambda n, m: RIGHT["bon_kl"](min(n, 3), m),
            lambda n, m: math.log(n) - (n - 1) / n - (n - 1) / (2 * m),
        ],
        "bon_win_rate": [
            lambda ref, s, n: RIGHT["bon_win_rate"](ref, s, n) * 2 - 1,
            lambda ref, s, n: RIGHT["bon_win_rate"](ref, s + torch.arange(len(s)) * 1e-3, n),
            lambda ref, s, n: RIGHT["bon_win_rate"](ref, s, n + 1),
        ],
        "unbiased_bon": [
            lambda s, n: RIGHT["unbiased_bon"](s.unique(), min(n, len(s.unique()))),
            lambda s, n: RIGHT["unbiased_bon"](s[:-1], min(n, len(s) - 1)),
            lambda s, n: RIGHT["unbiased_bon"](s.clamp(min=0.0), n),
        ],
        "frontier_gold": [
            lambda ref, r, betas, g: path(ref, r - r.mean(), [max(beta, 0.1) for beta in betas], g),
            lambda ref, r, betas, g: path(ref, r, betas, g - (ref.exp() * g).sum(-1, True) + 1),
            lambda ref, r, betas, g: path(ref, r, betas[:1] * len(betas), g),
        ],
        "gao_peak": [
            lambda a, b: ((a / b, a * a / (4 * b)), RIGHT["gao_peak"](a, b)[1]),
            lambda a, b: (RIGHT["gao_peak"](a, b)[0], (math.exp(2 * a / b - 1), b * math.exp(a / b - 1))),
        ],
    }
    for question_id, answers in strangers.items():
        for number, answer in enumerate(answers):
            assert any(failed_cases(QUESTIONS[question_id], answer)), (question_id, number)
            assert diagnose(QUESTIONS[question_id], answer) == [], (question_id, number)


def test_worlds_of_the_learners_own_are_judged_by_what_they_do():
    question = QUESTIONS["length_hack"]
    other = [0.5, 0.3, 0.15, 0.05], [0.0, 3.0, 2.0, -4.0], [5, 5, 5, 170]
    assert not any(failed_cases(question, other))
    longer_is_better = [0.4, 0.3, 0.2, 0.1], [0.0, 1.0, 2.0, 3.0], [5, 10, 15, 20]
    assert [wrong.name for wrong in diagnose(question, longer_is_better)] == ["long-is-good"]
    rarer = [0.5, 0.499998, 0.000002], [0.0, 3.0, -4.0], [5, 5, 170]
    assert [wrong.name for wrong in diagnose(question, rarer)] == ["too-rare"]


@pytest.mark.parametrize(
    "world, message",
    [
        (([0.5, 0.5], [0.0, 1.0], [1, 2]), "3 to 20 responses"),
        (([0.5, 0.3, 0.3], [0.0, 1.0, 2.0], [1, 2, 3]), "sum to 1"),
        (([0.5, 0.5, 0.0], [0.0, 1.0, 2.0], [1, 2, 3]), "positive probabilities"),
        (([0.6, 0.39, 0.01], [0.0, 1.0, -1.0], [20, 20, 80.5]), "whole numbers"),
        (([0.6, 0.39, 0.01], [0.0, 1.0, -1.0], [20, 20, 8000]), "whole numbers"),
        (([0.6, 0.39, 0.01], [0.0, 1000.0, -1.0], [20, 20, 80]), "from -100 to 100"),
        (([0.6, 0.39, 0.01], [0.0, math.nan, -1.0], [20, 20, 80]), "not finite"),
        (([0.6, 0.39, 0.01], [0.0, 1.0], [20, 20, 80]), "the same length"),
        (([0.6, 0.39, 0.01], [0.0, 1.0, -1.0]), "(ref, gold, lengths)"),
    ],
)
def test_what_is_no_world_is_refused_in_words(world, message):
    question = QUESTIONS["length_hack"]
    for case in question.cases:
        verdict = judge(question, world, case)
        assert not verdict.passed and message in verdict.message
