"""Every check of the homework is proven against its bank of planted wrong answers."""

import re

import pytest
import torch

from rlhfkit import homework
from rlhfkit.homework.bank.wrong_claims import WRONG_CLAIMS
from rlhfkit.homework.core import QUESTIONS

REQUIRED = {"policy_gradient", "score_zero", "gae", "best_baseline", "group_baseline", "group_mean_shrinkage"}


@pytest.mark.parametrize("question_id", homework.questions())
def test_the_check_is_proven_against_its_bank(question_id):
    assert homework.prove(question_id) == []


def test_there_are_enough_questions_half_of_them_theory():
    assert set(homework.questions()) >= REQUIRED
    for chapter in (2, 3):
        theory = [question.theory for question in QUESTIONS.values() if question.chapter == chapter]
        assert len(theory) >= 7
        assert 2 * sum(theory) >= len(theory)
    assert sum(len(question.wrongs) for question in QUESTIONS.values()) >= 84


def test_every_common_wrong_claim_has_a_planted_answer_that_is_rejected_and_named():
    rejected = {
        wrong["source"]
        for question in homework.kill_matrix()
        for wrong in question["wrong"]
        if wrong["rejected_by"] and wrong["diagnosis"] == [wrong["name"]]
    }
    assert rejected >= set(WRONG_CLAIMS)


def test_every_planted_answer_has_a_reason_in_words_and_every_question_three_hints():
    for question in QUESTIONS.values():
        assert len(question.hints) == 3
        assert len(question.explanation) > 40
        for wrong in question.wrongs:
            assert len(wrong.says.split()) >= 3, (question.id, wrong.name)
            assert "\n" not in wrong.says


# -- the formulas in the third hints, read as they stand -----------------------------------------------------------


def formula(question_id, after="", before="", **variables):
    """Value of the text between two others in hint 3: ``^`` is a power, a space between factors a product."""
    text = QUESTIONS[question_id].hints[2]
    text = text[text.index(after) + len(after) :]
    text = text[: text.index(before)] if before else text.rstrip(".")
    text = re.sub(r"(?<=[\w)\]]) (?=[\w(])", "*", text.replace("^", "**"))
    return eval(text, {"sqrt": lambda x: x**0.5, **variables})


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.9, 1.0])
def test_the_hint_of_lambda_order_gives_the_weights_inside_gae(lam):
    """Against GAE itself: an error of 1 in one later value, and a reward of 1 at one step."""
    gae, known = QUESTIONS["gae"].reference, {"gamma": 0.95, "lam": lam}
    for k, unit in enumerate(torch.eye(6, dtype=torch.float64)[:, None]):
        if k > 0:
            error = gae(torch.zeros_like(unit), unit, **known)[0][0, 0].item()
            hint = formula("lambda_order", "critic after k steps enters with ", " for k = 1..5", k=k, **known)
            assert hint == pytest.approx(error, abs=1e-12)
        noise = gae(unit, torch.zeros_like(unit), **known)[0][0, 0].item()
        hint = formula("lambda_order", "reward after k steps enters with ", " for k = 0..5", k=k, **known)
        assert hint == pytest.approx(noise, abs=1e-12)


def test_the_formulas_in_other_third_hints_give_the_right_answers():
    right = {question_id: question.reference for question_id, question in QUESTIONS.items()}
    for lam in (0.0, 0.3, 1.0):
        weights = [formula("gae_weights", "", " for k < T", k=k, lam=lam) for k in (1, 2, 3)]
        weights.append(formula("gae_weights", "and ", " for k = T", T=4, lam=lam))
        assert weights == pytest.approx(right["gae_weights"](4, lam))
    for p in (0.1, 0.5, 0.97):
        assert formula("group_std_weight", p=p) == pytest.approx(right["group_std_weight"](p))
    for size in (2, 7):
        assert formula("group_mean_shrinkage", G=size) == pytest.approx(right["group_mean_shrinkage"](size))
    scores = torch.tensor([[1.0, 2.0, 6.0]])
    assert torch.allclose(formula("group_baseline", scores=scores, G=3), right["group_baseline"](scores))
    x, mask = torch.tensor([1.0, 2.0, 6.0, 50.0]), torch.tensor([True, True, True, False])
    whitened = formula("whiten_mask", "", " where mask", x=x, mask=mask)
    assert torch.allclose(whitened[mask], right["whiten_mask"](x, mask)[mask])
    assert formula("bellman_numbers", "V(s') = ", ";") == right["bellman_numbers"][0]
    assert formula("value_baseline_variance", "so ", " = 0.0576") == pytest.approx(right["value_baseline_variance"][1])


def test_claims_are_numbered_by_chapter():
    for claim_id, claim in WRONG_CLAIMS.items():
        prefix = {2: "W-PG", 3: "W-BL"}[claim.chapter]
        assert re.fullmatch(rf"{prefix}-\d+", claim_id)
