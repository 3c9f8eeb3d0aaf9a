"""Whatever the answer is: points or none, one readable message, and the process goes on."""

import ast
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import rlhfkit
from rlhfkit import homework
from rlhfkit.homework import messages, progress, run_limits
from rlhfkit.homework.comparisons import Fail, expect_close, expect_constant, is_distribution, keeps_inputs
from rlhfkit.homework.core import QUESTIONS, Verdict


@pytest.fixture(autouse=True)
def state(tmp_path, monkeypatch):
    file = tmp_path / "progress.json"
    monkeypatch.setenv("RLHFKIT_HW_STATE", str(file))
    return file


def endless(logits, scores):
    while True:
        pass


def endless_and_stubborn(logits, scores):
    while True:
        try:
            time.sleep(10)
        except BaseException:
            pass


def huge_tensor(logits, scores):
    return torch.zeros(10**12)


def huge_list(logits, scores):
    return [0] * 10**11


def growing_list(logits, scores):
    kept = []
    while True:
        kept.append(bytes(10**8))


def raises(logits, scores):
    middle = len(logits) - 1
    return scores[0] / [middle]


class Hostile:
    def __float__(self):
        os._exit(1)

    def __repr__(self):
        raise ValueError


BAD = {
    "None": (None, "not answered yet"),
    "dots": (..., "not answered yet"),
    "a string": ("softmax", "expected a function, got text 'softmax'"),
    "NaN": (math.nan, "expected a function, got float nan"),
    "a blank function": (lambda logits, scores: None, "not answered yet"),
    "a function that returns dots": (lambda logits, scores: ..., "not answered yet"),
    "wrong arity": (lambda logits: logits, "takes 1 positional argument but 2 were given"),
    "an endless loop": (endless, "stopped after 0.5 s (an endless loop?)"),
    "an endless loop that swallows exceptions": (endless_and_stubborn, "stopped after 0.5 s"),
    "a huge tensor": (huge_tensor, "more memory than a check allows"),
    "a huge list": (huge_list, "more memory than a check allows"),
    "an answer that raises": (raises, "your code raised TypeError"),
    "sys.exit": (lambda *_: sys.exit(3), "your code raised SystemExit: 3"),
    "os._exit": (lambda *_: os._exit(3), "ended the Python process (exit code 3)"),
    "an interrupt": (lambda *_: signal.raise_signal(signal.SIGKILL), "killed by the system"),
    "KeyboardInterrupt": (lambda *_: (_ for _ in ()).throw(KeyboardInterrupt), "KeyboardInterrupt"),
    "an exception that cannot be printed": (lambda *_: (_ for _ in ()).throw(ValueError("\ud800")), "ValueError: ?"),
    "input": (lambda *_: input("?"), "input() cannot be used"),
    "a hostile object": (Hostile(), "expected a function, got an object of type Hostile"),
    "endless recursion": (lambda *_: BAD["endless recursion"][0](), "RecursionError"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_answer_gets_no_point_and_one_message(name, capfd, monkeypatch):
    monkeypatch.setattr(run_limits, "SECONDS_PER_CASE", 0.5)
    answer, expected = BAD[name]
    assert homework.check("policy_gradient", answer) == 0
    out, err = capfd.readouterr()
    assert expected in out
    assert out.count("FAIL") == 1
    assert "Traceback" not in out
    assert err == ""


def test_memory_that_grows_without_end_is_stopped(capsys, monkeypatch):
    monkeypatch.setattr(run_limits, "MEMORY_BYTES", 2**29)
    assert homework.check("policy_gradient", growing_list) == 0
    assert "more memory than a check allows" in capsys.readouterr().out


@pytest.mark.parametrize(
    "answer", ["abc", [], {0}, {9}, {"2"}, [2.5], 3, lambda: {2}, math.nan, Hostile(), [Hostile()]]
)
def test_a_bad_set_of_lines_gets_no_point(answer, capsys):
    assert homework.check("pg_proof_lines", answer) == 0
    assert capsys.readouterr().out.count("FAIL") == 1


@pytest.mark.parametrize("answer", ["abc", [1.0], [math.nan] * 3, [[1], [2], [3]], [1, 2, "c"], object(), lambda: 0])
def test_bad_numbers_get_no_point(answer, capsys):
    assert homework.check("value_baseline_variance", answer) == 0
    assert capsys.readouterr().out.count("FAIL") == 1


def test_a_partly_blank_table_is_not_answered(capsys):
    assert homework.check("value_baseline_variance", [0.0009, ..., 0.0]) == 0
    assert "not answered yet: part 2 of your answer is still blank" in capsys.readouterr().out
    assert homework.check("three_gradients", [[0, 0, 0], [0.1, None, 0], None]) == 0
    assert "parts 2, 3 of your answer are still blank" in capsys.readouterr().out
    assert homework.check("surrogate_value", lambda probs, shift: (shift, ..., 0)) == 0
    assert "part 2 of your answer is still blank" in capsys.readouterr().out
    assert homework.check("value_baseline_variance", [..., ..., ...]) == 0
    assert "not answered yet (it is blank" in capsys.readouterr().out


def test_an_exception_names_the_line_of_the_learner(capsys):
    homework.check("policy_gradient", raises)
    out = capsys.readouterr().out
    assert "return scores[0] / [middle]" in out
    assert "site-packages" not in out


def test_printing_much_shows_the_beginning_only(capsys):
    def noisy(logits, scores):
        for i in range(20_000):
            print("step", i)
        return logits

    homework.check("policy_gradient", noisy)
    out = capsys.readouterr().out
    assert "step 0" in out
    assert len(out) < 3000


@pytest.mark.parametrize(
    "leave",
    [lambda x: x.requires_grad_(), lambda x: x.requires_grad_().square().sum().backward(), lambda x: x.detach_()],
)
def test_what_autograd_keeps_of_an_input_must_not_change_either(leave):
    given = [torch.ones(2), torch.ones(2), torch.ones(2, requires_grad=True)]
    assert keeps_inputs(lambda *x: x[2].square().sum())(*given).requires_grad
    with pytest.raises(Fail, match=r"requires_grad or \.grad"):
        keeps_inputs(lambda *x: [leave(part) for part in x])(*given)


def test_a_gradient_that_an_input_has_already_must_not_grow():
    x = torch.ones(2, requires_grad=True)
    x.sum().backward()
    assert keeps_inputs(lambda x: torch.autograd.grad(x.sum(), x)[0])(x).tolist() == [1.0, 1.0]
    with pytest.raises(Fail, match=r"requires_grad or \.grad"):
        keeps_inputs(lambda x: x.square().sum().backward())(x)


def test_a_result_may_not_depend_on_what_has_to_be_constant():
    x, c = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    expect_constant(x * c.detach(), "c", c)
    expect_constant(x * c - x.detach() * c, "c", c)  # in the graph, with a slope of 0
    with pytest.raises(Fail, match="the gradient in c must be 0, got 2"):
        expect_constant(2 * x * c, "c", c)


def test_a_distribution_is_not_negative_and_sums_to_1_as_far_as_it_was_rounded():
    assert is_distribution(torch.tensor([0.33, 0.33, 0.34])) and is_distribution(torch.tensor([0.0, 1.0]))
    assert is_distribution(torch.tensor([0.333, 0.333, 0.333]))
    assert not is_distribution(torch.tensor([0.333, 0.333, 0.333]), 1e-6)
    for wrong in ([0.5, 0.49], [0.5, 0.51], [-0.1, 1.1], [float("nan"), 1.0]):
        assert not is_distribution(torch.tensor(wrong))


@pytest.mark.parametrize("spoil", [lambda x: x.zero_(), lambda x: x.resize_(0), lambda x: x.copy_(x / 0)])
def test_an_answer_that_spoils_its_inputs_is_told_so_by_every_case(spoil, capsys):
    def careless(scores):
        result = QUESTIONS["group_baseline"].reference(scores.clone())
        spoil(scores)
        return result

    assert homework.check("group_baseline", careless) == 0
    assert "all 3 cases: your function changed a tensor that it was given" in capsys.readouterr().out


def test_lists_and_arrays_are_looked_after_too_and_nan_is_no_change():
    def given():
        return [3.0, 2.0, [torch.tensor([1.0, float("nan")])]]

    def in_the_list(x, y):
        x[2][0][0] = 0

    assert keeps_inputs(lambda x, y: x[1])(given(), y=np.array([float("nan")])) == 2.0
    for spoil in (lambda x, y: x.reverse(), lambda x, y: x.append(1), in_the_list):
        with pytest.raises(Fail, match="changed a list that it was given"):
            keeps_inputs(spoil)(given(), np.ones(2))
    for spoil in (lambda x, y: y.fill(0), lambda x, y: y.sort()):
        with pytest.raises(Fail, match="changed an array that it was given"):
            keeps_inputs(spoil)(given(), y=np.array([2.0, 1.0]))


@pytest.mark.parametrize(
    ("got", "want", "says"),
    [
        (1.0001, 1.0, "what: got 1.0001, expected 1"),
        (1.02 + 1e-7, 1.02, "what: got 1.0200001, expected 1.02"),
        (0.5, 1.0, "what: got 0.5, expected 1"),
        ([1.0, math.inf], [1.0, 2.0], "what: got [1, inf], which is not finite, expected [1, 2]"),
        ([0.0] * 9 + [1.0], [0.0] * 10, "what at [9]: got 1, expected 0"),
        ([[0.0] * 5, [0.0, math.nan, 0.0, 0.0, 9.0]], [[0.0] * 5] * 2, "expected [0, 0, 0, 0, 0, 0, 0, 0, ...]"),
    ],
)
def test_a_message_shows_the_entries_and_the_digits_in_which_the_answer_differs(got, want, says):
    with pytest.raises(Fail) as error:
        expect_close(got, torch.tensor(want, dtype=torch.float64), "what", rtol=0, atol=1e-9)
    assert says in str(error.value)


def test_an_answer_that_spoils_torch_does_not_poison_other_cases(capsys):
    right = QUESTIONS["group_baseline"].reference

    def careless(scores):
        result = right(scores)
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float64)
        return result

    dtype, state = torch.get_default_dtype(), torch.get_rng_state()
    assert homework.check("group_baseline", careless) == homework.points("group_baseline")
    assert torch.get_default_dtype() == dtype
    assert torch.equal(torch.get_rng_state(), state)


def test_one_slow_case_leaves_the_points_of_the_others(capsys, monkeypatch):
    monkeypatch.setattr(run_limits, "SECONDS_PER_CASE", 0.5)
    right = QUESTIONS["rewards_to_go"].reference

    def stuck_on_masks(rewards, mask=None, gamma=1.0):
        while mask is not None and not mask[0, 1]:
            time.sleep(0.1)
        return right(rewards, mask, gamma)

    assert homework.check("rewards_to_go", stuck_on_masks) == 5
    assert "a masked step is skipped" in capsys.readouterr().out


@pytest.mark.parametrize("threads", [1, 2])
def test_torch_works_in_the_child_after_threads_have_run_in_the_parent(threads, capsys):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        torch.randn(400, 400) @ torch.randn(400, 400)

        def busy(logits, scores):
            torch.randn(400, 400) @ torch.randn(400, 400)
            return QUESTIONS["policy_gradient"].reference(logits, scores)

        assert homework.check("policy_gradient", busy) == 5
    finally:
        torch.set_num_threads(before)


def test_without_fork_a_thread_judges_and_stops_an_endless_loop(capsys, monkeypatch):
    monkeypatch.delattr(os, "fork")
    monkeypatch.setattr(run_limits, "SECONDS_PER_CASE", 0.5)
    assert homework.check("policy_gradient", QUESTIONS["policy_gradient"].reference) == 5
    assert homework.check("policy_gradient", endless) == 0
    assert homework.check("policy_gradient", lambda *_: sys.exit(3)) == 0
    out = capsys.readouterr().out
    assert "stopped after 0.5 s" in out
    assert "SystemExit" in out


def test_without_fork_no_stopped_answer_goes_on_in_the_background(monkeypatch):
    monkeypatch.delattr(os, "fork")
    monkeypatch.setattr(run_limits, "SECONDS_PER_CASE", 0.5)
    before = set(threading.enumerate())
    homework.check("policy_gradient", endless, verbose=False)
    assert set(threading.enumerate()) <= before


def test_when_fork_fails_a_thread_judges(capsys, monkeypatch):
    def no_fork():
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", no_fork)
    assert homework.check("policy_gradient", QUESTIONS["policy_gradient"].reference) == 5


def test_an_unknown_question_is_a_clear_error():
    with pytest.raises(ValueError, match=r"got 'gea'; did you mean 'gae'\? The questions are lm_dictionary"):
        homework.check("gea", None)
    with pytest.raises(ValueError, match="did you mean 'policy_gradient'"):
        homework.hint("policy_gradiant")
    with pytest.raises(ValueError, match="got 'x'; The questions are"):
        homework.solution("x")


def test_exchanged_arguments_are_a_clear_error():
    with pytest.raises(ValueError, match="got a function, expected text: the question's name comes first"):
        homework.check(lambda scores: scores, "group_baseline")


# -- what is accepted as an answer, and what earns nothing ---------------------------------------------------------


@pytest.mark.parametrize(
    "answer", [range(1, 6, 2), np.array([1.0, 3.0, 5.0]), torch.tensor([5, 3, 1]), {1: 0}.keys() | {3, 5}]
)
def test_any_collection_of_whole_numbers_is_a_set_of_terms(answer):
    assert homework.check("dynamics_drop_out", answer, verbose=False) == 2


@pytest.mark.parametrize(
    "answer", ["135", b"135", {1: 1, 3: 1, 5: 1}, (n for n in (1, 3, 5)), [True, 3, 5], [[1, 3, 5]]]
)
def test_other_things_are_no_set_of_terms(answer, capsys):
    assert homework.check("dynamics_drop_out", answer) == 0
    out = capsys.readouterr().out
    assert "term numbers" in out and "line" not in out


def test_an_empty_set_says_so(capsys):
    assert homework.check("dynamics_drop_out", set()) == 0
    assert "your set is empty: at least one term belongs in it" in capsys.readouterr().out


@pytest.mark.parametrize("form", [list, np.array, torch.tensor])
def test_a_table_may_be_any_array(form):
    orders = [[1.0, 0.9, 0.5, 0.0], [0.0, 0.5, 0.9, 1.0]]
    assert homework.check("lambda_order", form(orders), verbose=False) == 2


@pytest.mark.parametrize(
    ("question_id", "wrong", "answers"),
    [
        ("bellman_numbers", [0, 0, 0], [", expected", " 4", " 3", "-2"]),
        ("value_baseline_variance", [1, 1, 1], [", expected", "0.0009", "0.0576", "e-"]),
        ("baseline_dependence", [9, 9, 9, 9, 9, 8], [", expected", "0.5", "0.75"]),
        ("three_gradients", [[9, 9, 8]] * 3, [", expected", "0.45", "0.42"]),
    ],
)
def test_a_wrong_number_is_not_answered_with_the_right_one(question_id, wrong, answers, capsys):
    assert homework.check(question_id, wrong) == 0
    out = capsys.readouterr().out
    assert out.count(": not right") == len(QUESTIONS[question_id].cases)
    assert [answer for answer in answers if answer in out] == []


def test_the_formula_of_the_best_baseline_is_in_no_message_before_hint_3(capsys):
    homework.check("best_baseline", lambda probs, scores: scores[0])
    homework.hint("best_baseline", 1)
    homework.hint("best_baseline", 2)
    out = capsys.readouterr().out
    assert "E[|g|^2" not in out and "1_y - pi" not in out


def _as_first(value):
    return lambda x, *_, **__: torch.full_like(x, value)


@pytest.mark.parametrize(
    ("question_id", "answer"),
    [
        ("policy_gradient", _as_first(0.0)),
        ("score_zero", lambda x: torch.zeros(len(x), len(x))),
        ("score_zero", lambda x: x.softmax(0) - torch.eye(len(x))),
        ("update_rule", _as_first(math.nan)),
        ("update_rule", _as_first(0.0)),
        ("three_gradients", [[0, 0, 0]] * 3),
        ("group_baseline", lambda scores: scores),
        ("reinforce_surrogate", lambda logprobs, rewards, mask: 0 * logprobs.sum()),
        ("value_baseline_variance", [0, 0, 0]),
        ("baseline_dependence", [1] * 6),
        ("dynamics_drop_out", {1}),
        ("dynamics_drop_out", {1, 2, 3, 4, 5, 6}),
        ("advantage_definition", lambda probs, values: torch.zeros_like(values)),
        ("gae", lambda rewards, values, **_: (rewards * 0, values * 0)),
        ("surrogate_value", lambda probs, shift: (0, 0, 0)),
        ("whiten_mask", _as_first(0.0)),
    ],
)
def test_an_answer_without_content_earns_nothing(question_id, answer):
    assert homework.check(question_id, answer, verbose=False) == 0


# -- messages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("question_id", homework.questions())
def test_every_right_answer_earns_full_points_in_the_child(question_id, capsys):
    question = QUESTIONS[question_id]
    for _, answer in [("reference", question.reference), *question.rights]:
        assert homework.check(question_id, answer) == question.points
    assert "FAIL" not in capsys.readouterr().out


def test_a_planted_mistake_is_named_with_got_and_expected(capsys):
    mistake = next(w for w in QUESTIONS["gae"].wrongs if w.name == "cut-value-only")
    assert homework.check("gae", mistake.answer) == 6
    out = capsys.readouterr().out
    assert out.startswith("gae  generalised advantage estimation: 6/8\n")
    assert "FAIL  a finished step cuts the rollout in two (2 pt)" in out
    assert "got [" in out and "expected [" in out and "hint: " in out
    assert f"LIKELY CAUSE  {mistake.says}" in out


def test_a_mistake_that_is_not_in_the_bank_is_not_named(capsys):
    homework.check("group_mean_shrinkage", lambda K: 0.5)
    assert "LIKELY CAUSE" not in capsys.readouterr().out


def test_equal_on_some_probes_only_is_not_named(capsys):
    """At K = 2 this is the planted 1/K, elsewhere it is something else."""
    homework.check("group_mean_shrinkage", lambda K: 0.5 if K == 2 else 0.7)
    assert "LIKELY CAUSE" not in capsys.readouterr().out


def test_html_says_the_same_in_words_and_escapes_the_learner(capsys):
    question = QUESTIONS["group_mean_shrinkage"]
    verdicts = [Verdict(True), Verdict(False, "got <b>1</b>")]
    message = messages.checked(question, verdicts, ["unbiased"])
    page = message.as_html()
    for word in ("PASS", "FAIL", "LIKELY CAUSE", "1/2", "&lt;b&gt;1&lt;/b&gt;", "hint: "):
        assert word in page
    for tag, _ in message.lines:
        assert tag in message.text()


def test_hints_have_three_levels(capsys):
    for level in (1, 2, 3):
        homework.hint("gae", level)
    out = capsys.readouterr().out
    for text in QUESTIONS["gae"].hints:
        assert text in out
    with pytest.raises(ValueError, match="level: got 4"):
        homework.hint("gae", 4)


def test_the_solution_opens_after_two_attempts_or_by_force_and_is_recorded(capsys):
    homework.solution("group_baseline")
    assert "try it twice first (0 so far)" in capsys.readouterr().out
    homework.check("group_baseline", None)  # blank: no attempt
    homework.check("group_baseline", lambda s: s)
    homework.solution("group_baseline")
    assert "1 so far" in capsys.readouterr().out
    homework.check("group_baseline", lambda s: 2 * s)
    capsys.readouterr()
    homework.report()
    assert "solution opened" not in capsys.readouterr().out
    homework.solution("group_baseline")
    homework.solution("gae", force=True)
    out = capsys.readouterr().out
    assert "return (scores.sum(1, keepdim=True) - scores)" in out
    assert "def gae(" in out
    homework.report()
    assert capsys.readouterr().out.count("solution opened") == 2


def test_the_report_shows_best_score_and_attempts(capsys):
    homework.check("group_baseline", QUESTIONS["group_baseline"].reference, verbose=False)
    homework.check("group_baseline", None, verbose=False)
    homework.check("group_baseline", lambda s: s, verbose=False)
    assert capsys.readouterr().out == ""
    homework.report()
    out = capsys.readouterr().out
    row = next(line for line in out.splitlines() if "group_baseline" in line)
    assert row.split() == ["group_baseline", "##########", "3/3", "attempts", "2"]
    assert out.startswith("Homework: 3 of ")


def test_the_report_has_a_subtotal_per_homework_which_its_notebook_announces(capsys):
    homework.check("group_baseline", QUESTIONS["group_baseline"].reference, verbose=False)
    homework.report()
    lines = capsys.readouterr().out.splitlines()
    for chapter in sorted({question.chapter for question in QUESTIONS.values()}):
        mine = [question for question in QUESTIONS.values() if question.chapter == chapter]
        total, earned = sum(question.points for question in mine), 3 if chapter == 3 else 0
        start = next(
            i for i, line in enumerate(lines) if line.strip() == f"hw{chapter:02d}: {earned} of {total} points"
        )
        rows = [line.split()[0] for line in lines[start + 1 :] if line.strip()][: len(mine)]
        assert rows == [question.id for question in mine]
        (master,) = (Path(__file__).parents[2] / "homework" / "master").glob(f"hw{chapter:02d}_*.ipynb")
        assert f"{total} points" in "".join(json.loads(master.read_text(encoding="utf-8"))["cells"][1]["source"])


def test_grade_case_raises_for_the_failing_case_only():
    mistake = next(w for w in QUESTIONS["gae"].wrongs if w.name == "cut-value-only")
    homework.grade_case("gae", 1, mistake.answer)
    with pytest.raises(AssertionError, match=r"a finished step cuts the rollout in two: .*got"):
        homework.grade_case("gae", 4, mistake.answer)
    with pytest.raises(AssertionError, match="not answered yet"):
        homework.grade_case("gae", 4, ...)
    with pytest.raises(ValueError, match="expected a case from 1 to 7"):
        homework.grade_case("gae", 8, mistake.answer)


# -- progress ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"questions": 3}', '{"questions": {"gae": {"best": "8"}}}', "\udcff"]
)
def test_a_damaged_progress_file_is_kept_aside(state, content, capsys):
    data = content.encode("utf-8", "surrogateescape")
    state.write_bytes(data)
    assert homework.check("group_mean_shrinkage", lambda K: 1 - 1 / K) == 2
    assert "kept as progress.json.bak" in capsys.readouterr().out
    assert state.with_name("progress.json.bak").read_bytes() == data
    assert json.loads(state.read_text())["questions"]["group_mean_shrinkage"]["best"] == 2
    state.write_bytes(data)
    homework.check("group_mean_shrinkage", None)
    assert state.with_name("progress.json.bak2").read_bytes() == data


def test_a_folder_that_cannot_be_written_costs_a_note_only(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RLHFKIT_HW_STATE", str(tmp_path / "missing" / "progress.json"))
    assert homework.check("group_mean_shrinkage", lambda K: 1 - 1 / K) == 2
    assert "progress could not be saved" in capsys.readouterr().out


WRITER = f"""
import importlib.util
spec = importlib.util.spec_from_file_location("progress", {progress.__file__!r})  # alone: without torch
progress = importlib.util.module_from_spec(spec)
spec.loader.exec_module(progress)
"""
WRITE = """
for i in range(1, 10**6):
    progress.write({f"q{k}": {"attempts": i, "best": i, "solution_opened": False, "hints": 0} for k in range(2000)})
    if i == 3:
        print("writing", flush=True)
"""


def test_the_progress_file_survives_a_kill_at_any_moment(state):
    """Killed five times while writing without pause, the file is whole each time."""
    for pause in (0.0, 0.013, 0.031, 0.052, 0.071):
        process = subprocess.Popen([sys.executable, "-c", WRITER + WRITE], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "writing\n"
        time.sleep(pause)
        process.kill()
        process.wait()
        process.stdout.close()
        questions, note = progress.read(state)
        assert note == ""
        assert len(questions) == 2000
        assert len({record["best"] for record in questions.values()}) == 1


def test_two_notebooks_do_not_lose_each_others_attempts(state):
    add = WRITER + "for _ in range(50): progress.update('gae', attempts=1)"
    processes = [subprocess.Popen([sys.executable, "-c", add]) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    assert progress.read(state)[0]["gae"]["attempts"] == 100


def test_the_rest_of_the_package_does_not_know_the_homework():
    modules = Path(rlhfkit.__file__).parent.glob("*.py")
    assert [module.name for module in modules if "rlhfkit.homework" in module.read_text(encoding="utf-8")] == []


def test_a_learner_needs_torch_and_numpy_only():
    """What `import rlhfkit.homework` can reach imports nothing else; the instructor's modules stand apart."""
    folder, apart = Path(homework.__file__).parent, {"instructor.py", "run_notebook.py", "__main__.py"}
    reached = set()
    for module in folder.rglob("*.py"):
        if module.name not in apart:
            for node in ast.parse(module.read_text(encoding="utf-8")).body:
                if isinstance(node, ast.ImportFrom):
                    reached.add(node.module)
                elif isinstance(node, ast.Import):
                    reached.update(name.name for name in node.names)
    assert {name.split(".")[0] for name in reached} - set(sys.stdlib_module_names) == {"torch", "numpy", "rlhfkit"}
    assert not any(name.endswith((".instructor", ".run_notebook")) for name in reached)
