"""Every check of the homework is proven against its bank of planted wrong answers."""

import re

import pytest

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


def test_claims_are_numbered_by_chapter():
    for claim_id, claim in WRONG_CLAIMS.items():
        prefix = {2: "W-PG", 3: "W-BL"}[claim.chapter]
        assert re.fullmatch(rf"{prefix}-\d+", claim_id)
