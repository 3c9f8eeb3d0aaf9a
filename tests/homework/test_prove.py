"""Every check of the homework is proven against its bank of planted wrong answers."""

import math
import re
from pathlib import Path

import pytest
import torch

from rlhfkit import homework
from rlhfkit.homework.bank.wrong_claims import WRONG_CLAIMS
from rlhfkit.homework.core import QUESTIONS
from rlhfkit.homework.proofs import failed_cases
from rlhfkit.logprobs import next_token_logprobs, sequence_logprobs
from rlhfkit.preference_losses import bradley_terry_loss
from rlhfkit.sampling import truncate_logits

REQUIRED = {
    "unembed_grad",
    *("policy_gradient", "score_zero"),
    *("gae", "best_baseline", "group_baseline", "group_mean_shrinkage"),
    *("offpolicy", "ppo_clip", "ppo_ratio_escape"),
    *("bt_loss", "rm_slope", "last_token_index"),
    *("ptx_grad", "token_rewards", "reward_back"),
    *("dpo", "dpo_weight", "dpo_blind_losses", "dpo_blind_pair", "dpo_kl"),
    *("kl_k3", "k2_threshold", "kl_loss_gradients"),
    "best_of_n",
}
CHAPTERS = {1: "W-LM", 2: "W-PG", 3: "W-BL", 4: "W-PPO", 5: "W-RM", 6: "W-RLHF", 7: "W-DPO", 8: "W-KL", 9: "W-OO"}


@pytest.mark.parametrize("question_id", homework.questions())
def test_the_check_is_proven_against_its_bank(question_id):
    assert homework.prove(question_id) == []


def test_there_are_enough_questions_half_of_them_theory():
    assert set(homework.questions()) >= REQUIRED
    for chapter in CHAPTERS:
        theory = [question.theory for question in QUESTIONS.values() if question.chapter == chapter]
        assert len(theory) >= 7
        assert 2 * sum(theory) >= len(theory)
    planted = {chapter: sum(len(q.wrongs) for q in QUESTIONS.values() if q.chapter == chapter) for chapter in CHAPTERS}
    assert planted[2] + planted[3] >= 84
    assert planted[4] >= 140
    assert planted[6] >= 140
    assert planted[1] + planted[5] >= 230
    assert planted[7] + planted[8] + planted[9] >= 230


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


def test_the_formulas_in_the_third_hints_on_language_and_reward_models_give_the_right_answers():
    right = {question_id: question.reference for question_id, question in QUESTIONS.items()}
    d = torch.tensor([-4.0, 0.0, 0.7], dtype=torch.float64)
    for end, rest in (("", " = "), (" = ", ".")):
        hint = formula("rm_slope", end, rest, d=d, sigmoid=torch.sigmoid)
        assert torch.allclose(hint, right["rm_slope"](d))
    scores = {"chosen_scores": d, "rejected_scores": d.flip(0), "margin": d.square()}
    hint = formula("bt_loss", "", ", one number", logsigmoid=torch.nn.functional.logsigmoid, **scores)
    assert torch.allclose(hint, right["bt_loss"](*scores.values()))
    known = {"gap": -1.2, "learning_rate": 0.3, "sigmoid": lambda x: 1 / (1 + math.exp(-x))}
    assert formula("one_pair_descent", "gap = ", **known) == pytest.approx(right["one_pair_descent"](-1.2, 1, 0.3))
    known = {"p": d.sigmoid(), "log": torch.log, "max": torch.maximum}
    accuracy, loss = right["noise_ceiling"](d)
    assert torch.allclose(formula("noise_ceiling", "of ", " = ", **known).mean(), accuracy)
    assert torch.allclose(formula("noise_ceiling", "and of ", ", with", **known).mean(), loss)
    a = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    win = formula("bt_algebra", "P = ", ", dP", e=math.e, A=a, B=-0.5)
    assert win.item() == pytest.approx(1 / (1 + math.exp(-1.3)))
    assert formula("bt_algebra", "dP/dA = ", ", d log", P=win).item() == pytest.approx(
        torch.autograd.grad(win, a, retain_graph=True)[0].item()
    )
    slope = torch.autograd.grad(win.log(), a)[0].item()
    assert formula("bt_algebra", "log P/dA = ", P=win.item()) == pytest.approx(slope)
    policy, teacher, rewards = (0.5, 0.3, 0.2), (0.2, 0.2, 0.6), (1.0, 2.0, 4.0)
    rows = [(teacher, (1.0,) * 3), (policy, rewards), (policy, (1.0,) * 3), (teacher, rewards)]
    for (writer, weights), want in zip(rows, right["imitation_or_rl"], strict=True):
        known = {"s": writer.__getitem__, "w": weights.__getitem__, "pi": policy.__getitem__}
        known["m"] = sum(s * w for s, w in zip(writer, weights, strict=True))
        entries = [formula("imitation_or_rl", "Entry i is ", ", where", i=i, **known) for i in range(3)]
        assert entries == pytest.approx(want, abs=1e-12)


def test_the_numbers_in_explanations_and_tasks_are_the_references():
    right = {question_id: question.reference for question_id, question in QUESTIONS.items()}
    text = {question_id: question.explanation for question_id, question in QUESTIONS.items()}
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    entropies = [f"{right['sampling_entropy'](logits, t):.3f}" for t in (0.5, 1.0, 2.0, 1e6)]
    assert entropies == re.findall(r"\b\d\.\d{3}\b", text["sampling_entropy"])
    gaps = [f"{right['one_pair_descent'](0.0, steps, 1.0):.2f}" for steps in (10, 100, 1000, 10000)]
    assert gaps == re.findall(r"\b\d\.\d\d\b", text["one_pair_descent"])
    assert right["one_pair_descent"](750.0, 3, 1.0) == 750.0  # exp(750) is beyond the largest float
    assert right["one_pair_descent"](-750.0, 3, 0.5) == pytest.approx(-748.5)
    e = math.e
    lines = [1 / (e + 1 - 1), 1 / (1 + e / (e + 1) - 1), e / (e + 1), e / (e + 1) ** 2]
    assert [f"{x:.3f}" for x in lines] == re.findall(r"\b\d\.\d{3}\b", text["bt_algebra"])
    master = (Path(__file__).parent.parent.parent / "homework" / "master" / "hw05_reward_models.ipynb").read_text()
    accuracy, loss = right["noise_ceiling"](torch.tensor([1.0]))
    assert f"they are {accuracy:.3f} and {loss:.3f}" in master
    losses = right["bt_loss"](torch.tensor([0.0, 2.0, -900.0]), torch.zeros(3)).tolist()
    assert (
        "= {:.3f}$, at a difference of 2 it is {:.3f}, and at a difference of $-900$ it is {:.0f}".format(*losses)
        in master
    )


def test_claims_are_numbered_by_chapter():
    for claim_id, claim in WRONG_CLAIMS.items():
        assert re.fullmatch(rf"{CHAPTERS[claim.chapter]}-\d+", claim_id)


def test_the_packages_own_functions_are_right_answers():
    """What the task calls a stand-in can be exchanged both ways."""
    for question_id, function in (("top_p", truncate_logits), ("bt_loss", bradley_terry_loss)):
        question = QUESTIONS[question_id]
        assert failed_cases(question, function) == [""] * len(question.cases)
    question = QUESTIONS["sequence_logprob"]

    def by_package(logits, tokens, response_mask):
        return sequence_logprobs(next_token_logprobs(logits, tokens), response_mask[:, 1:])

    assert failed_cases(question, by_package) == [""] * len(question.cases)
