"""The proof itself is alive: it notices when a check goes blind, or when a planted answer loses its case."""

import pytest
import torch

from rlhfkit.homework import comparisons, core, kill_matrix, prove, questions


@pytest.mark.parametrize("question_id", questions())
def test_a_check_without_comparisons_is_reported(question_id, monkeypatch):
    """The one function through which comparisons say no is switched off."""
    monkeypatch.setattr(comparisons, "reject", lambda message: None)
    assert any("accepted" in fault for fault in prove(question_id))


def test_removing_the_only_case_that_rejects_a_planted_answer_is_noticed(monkeypatch):
    single = {
        row["question"]: (wrong["name"], wrong["rejected_by"][0])
        for row in kill_matrix()
        for wrong in row["wrong"]
        if len(wrong["rejected_by"]) == 1
    }
    assert len(single) >= 12  # questions where some mistake is caught by one case only
    for question_id, (name, number) in single.items():
        question = core.QUESTIONS[question_id]
        monkeypatch.setattr(question, "cases", [c for i, c in enumerate(question.cases, 1) if i != number])
        assert f"wrong answer '{name}' is accepted" in prove(question_id)
        monkeypatch.undo()


def test_a_right_answer_that_is_rejected_is_reported(monkeypatch):
    question = core.QUESTIONS["group_baseline"]
    monkeypatch.setattr(question, "rights", [("mean with the own score", lambda s: s.mean(1, True).expand_as(s))])
    assert any("right answer 'mean with the own score' fails" in fault for fault in prove("group_baseline"))


def test_two_mistakes_that_cannot_be_told_apart_are_reported(monkeypatch):
    question = core.QUESTIONS["group_mean_shrinkage"]
    twin = core.Wrong("twin", lambda K: 1.0, "the same mistake again", "common")
    monkeypatch.setattr(question, "wrongs", [*question.wrongs, twin])
    assert any("diagnosis of 'unbiased'" in fault for fault in prove("group_mean_shrinkage"))


def test_a_case_that_rejects_nothing_is_reported(monkeypatch):
    question = core.QUESTIONS["group_baseline"]
    idle = core.Case("is a function", lambda f: f, 1, "")
    monkeypatch.setattr(question, "cases", [*question.cases, idle])
    faults = prove("group_baseline")
    assert "case 'is a function' rejects no planted answer" in faults
    assert any("junk answer" in fault for fault in faults)


def test_a_planted_answer_that_cites_no_known_claim_is_reported(monkeypatch):
    question = core.QUESTIONS["group_mean_shrinkage"]
    stray = core.Wrong("stray", lambda K: 0.123, "half of nothing at all", "W-XX-1")
    monkeypatch.setattr(question, "wrongs", [*question.wrongs, stray])
    assert any("cites W-XX-1" in fault for fault in prove("group_mean_shrinkage"))


def drawn_by_the_seed_alone(normal):
    """Equal for equal seeds, different for others, and the global generator stays where it was."""
    state = torch.get_rng_state()
    first, again, other = (normal(2, 3, seed=seed) for seed in (1, 1, 2))
    untouched = torch.equal(torch.get_rng_state(), state)
    return torch.equal(first, again) and not torch.equal(first, other) and untouched


def test_the_inputs_of_cases_are_drawn_by_their_seed_alone():
    assert drawn_by_the_seed_alone(comparisons.normal)


@pytest.mark.parametrize(
    "planted",
    [
        lambda *shape, seed=0: torch.randn(*shape),
        lambda *shape, seed=0: torch.randn(*shape, generator=torch.Generator().manual_seed(0)),
        lambda *shape, seed=0: torch.randn(*shape, generator=torch.manual_seed(seed)),
    ],
    ids=["no seed", "always the same seed", "the global generator, seeded"],
)
def test_inputs_that_depend_on_more_or_less_than_their_seed_are_noticed(planted):
    with torch.random.fork_rng(devices=[]):
        assert not drawn_by_the_seed_alone(planted)
