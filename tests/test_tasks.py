"""Exact tasks: the list, its index, its scores and the random world."""

import dataclasses

import torch

from planting import close, edited, f64, raises
from rlhfkit.exact import enumerate_responses
from rlhfkit.tasks import Comparison, ExactTask, Pair, Rollout, random_task


def tiny(ExactTask=ExactTask, eos_id=1, max_length=3):
    tokens, mask = enumerate_responses(2, max_length, eos_id)
    scores = torch.arange(2 * len(tokens), dtype=torch.float64).view(2, -1)
    return ExactTask(2, max_length, eos_id, 0.2, tokens, mask, scores, torch.zeros(2, 2**max_length - 1, 2))


def rollout(prompts, tokens):
    mask = torch.ones_like(tokens, dtype=torch.bool)
    return Rollout(
        torch.tensor(prompts).unsqueeze(1), tokens, mask, torch.zeros(tokens.shape), torch.zeros(tokens.shape)
    )


def test_index_finds_every_response_where_it_is_listed(ExactTask=ExactTask):
    for eos_id in (None, 0, 1):
        task = tiny(ExactTask, eos_id)
        count = len(task.tokens)
        assert task.index(task.tokens).tolist() == list(range(count))
        assert task.index(task.tokens.flip(0)).tolist() == list(range(count))[::-1]


def test_index_refuses_what_is_not_on_the_list(ExactTask=ExactTask):
    task = tiny(ExactTask)  # responses 000, 001, 01., 1.., padded with 1
    for row in ([0, 1, 0], [1, 0, 0], [0, 0, 2], [0, -1, 3], [2, 2, 2]):
        raises(ValueError, lambda r=row: task.index(torch.tensor([r])), "tokens")
    raises(ValueError, lambda: task.index(torch.tensor([[1]])), "tokens")  # would broadcast to 111
    raises(ValueError, lambda: task.index(torch.tensor([[0, 1]])), "tokens")


def test_score_is_that_of_the_prompt_and_the_response(ExactTask=ExactTask):
    task = tiny(ExactTask)
    assert task.score(rollout([1, 0, 1], task.tokens[[3, 3, 0]])).tolist() == [7.0, 3.0, 4.0]


def test_reference_is_a_fresh_policy_every_time(ExactTask=ExactTask):
    task = tiny(ExactTask)
    policy = task.reference()
    with torch.no_grad():
        policy.table += 1
    assert (task.ref_table == 0).all() and (task.reference().table == 0).all()
    assert task.prompts.tolist() == [[0], [1]]


def test_a_step_draws_every_prompt_once_and_no_random_number(ExactTask=ExactTask):
    task, generator = tiny(ExactTask), torch.Generator().manual_seed(0)
    before = generator.get_state()
    assert task.draw_prompts(generator).tolist() == [[0], [1]]
    assert generator.get_state().equal(before)


def ragged(masks):
    mask = torch.tensor(masks, dtype=torch.bool)
    rows, columns = mask.shape
    numbers = torch.arange(rows * columns).view(rows, columns)
    return Rollout(100 + numbers[:, :1], numbers, mask, -numbers / 8, -numbers / 16)


RAGGED = [
    ([[1, 1, 0, 0], [1, 0, 0, 0]], 2),
    ([[1, 0, 0, 0], [1, 1, 1, 1]], 4),
    ([[0, 0, 1, 0], [0, 0, 1, 0]], 3),  # padded on the left
    ([[1, 0, 0, 1], [1, 0, 0, 0]], 4),  # a hole in every row
    ([[1, 0, 1, 0, 0], [1, 0, 0, 0, 0]], 3),
    ([[0, 0, 0], [0, 0, 0]], 1),
    ([[1], [1]], 1),
]


def test_trimming_cuts_the_last_columns_that_no_row_uses(Rollout=Rollout):
    for masks, width in RAGGED:
        whole = ragged(masks)
        cut = Rollout.trimmed(whole)
        assert cut.prompts.equal(whole.prompts)
        for name in ("tokens", "response_mask", "logprobs", "sampling_logprobs"):
            assert getattr(cut, name).tolist() == getattr(whole, name)[:, :width].tolist(), name
        assert cut.response_mask.sum() == whole.response_mask.sum()


def test_task_refuses_scores_of_another_list_and_cannot_be_changed(ExactTask=ExactTask):
    task = tiny(ExactTask)
    raises(ValueError, lambda: dataclasses.replace(task, scores=f64([[1.0, 2.0]])), "scores", "(1, 2)")
    raises(dataclasses.FrozenInstanceError, lambda: setattr(task, "beta", 1.0))


def test_task_moves_as_a_whole(ExactTask=ExactTask):
    moved = tiny(ExactTask).to("meta")
    assert all(x.device.type == "meta" for x in vars(moved).values() if isinstance(x, torch.Tensor))
    assert (moved.beta, moved.eos_id, moved.max_length) == (0.2, 1, 3)


def test_random_task_is_standardised_per_prompt(random_task=random_task):
    task = random_task(3, 3, 2, seed=1)
    close(task.scores.mean(1), torch.zeros(2, dtype=torch.float64))
    close(task.scores.square().mean(1), torch.ones(2, dtype=torch.float64))
    assert task.scores.shape == (2, 27) and task.ref_table.shape == (2, 13, 3) and task.scores.dtype == torch.float64


def test_random_task_without_noise_is_a_sum_over_positions(random_task=random_task):
    """Then the effect of one token does not depend on the others, per prompt; with noise it does."""
    for noise, additive in ((0.0, True), (0.3, False)):
        task = random_task(3, 3, 2, noise=noise)
        cube = task.scores.view(2, 3, 3, 3)
        for interaction in (
            cube[:, 0, 0] - cube[:, 0, 1] - cube[:, 1, 0] + cube[:, 1, 1],
            cube[:, :, 0, 0] - cube[:, :, 0, 1] - cube[:, :, 1, 0] + cube[:, :, 1, 1],
        ):
            assert bool((interaction.abs() < 1e-12).all()) is additive
        assert not torch.allclose(task.scores[0], task.scores[1])


def test_random_task_repeats_with_its_seed_and_leaves_the_global_generator_alone(random_task=random_task):
    before = torch.get_rng_state()
    a, b, c = random_task(3, 2, 2, seed=5), random_task(3, 2, 2, seed=5), random_task(3, 2, 2, seed=6)
    assert a.scores.equal(b.scores) and a.ref_table.equal(b.ref_table)
    assert not a.scores.equal(c.scores) and not a.ref_table.equal(c.ref_table)
    assert before.equal(torch.get_rng_state())


def test_random_task_ignores_padding_in_its_scores(random_task=random_task):
    """With eos 0 and no noise, 0.. and 00. would differ only by padding; responses with the same tokens share parts."""
    task = random_task(2, 2, 1, eos_id=0, noise=0.0, seed=3)  # 0., 10, 11
    single, short, long = task.scores[0].tolist()
    assert task.tokens.tolist() == [[0, 0], [1, 0], [1, 1]]
    raw = torch.Generator().manual_seed(3)
    torch.randn(1, 3, generator=raw, dtype=torch.float64)
    w = torch.randn(1, 2, 2, generator=raw, dtype=torch.float64)[0]
    # standardising keeps ratios of differences
    expected = (w[1, 1] - w[1, 0]) / (w[0, 1] + w[1, 0] - w[0, 0])
    close(f64((long - short) / (short - single)), expected)


def test_random_task_refuses_sizes_that_make_no_task(random_task=random_task):
    for arguments in ({"vocab_size": 1}, {"max_length": 0}, {"num_prompts": 0}):
        raises(ValueError, lambda a=arguments: random_task(**a), *arguments)
    for arguments in ({"beta": 0.0}, {"beta": float("nan")}, {"noise": -1.0}):
        raises(ValueError, lambda a=arguments: random_task(**a), *arguments)


def test_pair_holds_two_different_texts_and_perhaps_a_margin(Pair=Pair):
    pair = Pair("p", "a", "b")
    assert (pair.prompt, pair.chosen, pair.rejected, pair.margin) == ("p", "a", "b", None)
    assert Pair("", "", "b", 0).margin == 0 and Pair("p", "a", "b", -1.5) != pair
    raises(dataclasses.FrozenInstanceError, lambda: setattr(pair, "chosen", "c"))
    raises(ValueError, lambda: Pair("p", "same", "same"), "chosen", "rejected", "'same'")
    for i, name in enumerate(("prompt", "chosen", "rejected")):
        texts = ["p", "a", "b"]
        texts[i] = 3
        raises(ValueError, lambda t=texts: Pair(*t), name, "int", "string")
    for margin in ("1", True, float("nan"), float("inf")):
        raises(ValueError, lambda m=margin: Pair("p", "a", "b", m), "margin", repr(margin))


def test_comparison_becomes_the_pair_of_a_choice_and_has_an_id_of_its_own(Comparison=Comparison):
    comparison = Comparison("p", "a", "b")
    assert comparison.pair("first") == Pair("p", "a", "b") and comparison.pair("second") == Pair("p", "b", "a")
    raises(ValueError, lambda: Comparison("p", "a", "a"), "first", "second", "'a'")
    others = [("p", "b", "a"), ("q", "a", "b"), ("pa", "", "b"), ("", "pa", "b"), ("p", "ab", "")]
    ids = {Comparison(*texts).id for texts in [("p", "a", "b"), *others]}
    assert len(ids) == 6 and all(len(i) == 16 and set(i) <= set("0123456789abcdef") for i in ids)
    assert Comparison("p", "a", "b").id == comparison.id == "5c74e27923240958"  # sha256sum of ["p", "a", "b"]


def _task(*changes):
    return edited(ExactTask, *changes)


PLANTED = {
    "ExactTask": {
        "unknown responses get a neighbour's index": _task(
            ("if not torch.equal(self.tokens[found], tokens):", "if False:")
        ),
        "only the code is compared": _task(
            ("torch.equal(self.tokens[found], tokens)", "torch.equal(listed[found], codes)")
        ),
        "the response read as a number, not its place": _task(("return found", "return codes")),
        "score of prompt 0": _task(("self.scores[rollout.prompts[:, 0], ", "self.scores[0 * rollout.prompts[:, 0], ")),
        "one reference for all": _task(
            (
                "return TabularPolicy(self.vocab_size, self.max_length, len(self.scores), self.ref_table)",
                "policy = TabularPolicy(self.vocab_size, self.max_length, len(self.scores)); "
                "policy.table.data = self.ref_table; return policy",
            )
        ),
        "scores not checked": _task(('raise ValueError(f"scores', 'print(f"scores')),
        "the first prompt only": _task(("return self.prompts\n", "return self.prompts[:1]\n")),
        "prompts drawn": _task(
            (
                "return self.prompts\n",
                "return torch.randint(2, (2, 1), generator=generator).sort(0)[0] * 0 + self.prompts\n",
            )
        ),
        "to forgets the scores": _task(("scores=self.scores.to(device),", "")),
    },
    "Rollout": {
        "columns counted": edited(Rollout, ("max(columns, default=0) + 1", "max(1, len(columns))")),
        "one column too few": edited(Rollout, ("default=0) + 1", "default=1)")),
        "one column too many": edited(Rollout, ("default=0) + 1", "default=0) + 2")),
        "columns that every row uses": edited(Rollout, ("response_mask.any(0)", "response_mask.all(0)")),
        "the first row decides": edited(Rollout, ("response_mask.any(0)", "response_mask[0]")),
        "nothing may be left": edited(Rollout, ("default=0)", "default=-1)")),
        "prompts cut too": edited(Rollout, ("Rollout(self.prompts,", "Rollout(self.prompts[:, :0],")),
        "log-probabilities crossed": edited(
            Rollout, ("self.logprobs, self.sampling_logprobs)", "self.sampling_logprobs, self.logprobs)")
        ),
    },
    "Comparison": {
        "sides swapped": edited(Comparison, ('if choice == "first" else', 'if choice != "first" else')),
        "equal sides allowed": edited(Comparison, ("if self.first == self.second:", "if False:")),
        "order does not count in the id": edited(
            Comparison, ("[self.prompt, self.first, self.second]", "[self.prompt, *sorted([self.first, self.second])]")
        ),
        "texts run together in the id": edited(
            Comparison, ("json.dumps([self.prompt, self.first, self.second])", "self.prompt + self.first + self.second")
        ),
        "prompt not in the id": edited(
            Comparison, ("[self.prompt, self.first, self.second]", "[self.first, self.second]")
        ),
        "another id every time": edited(Comparison, ("text.encode()", "(text + str(id(self))).encode()")),
    },
    "Pair": {
        "sides may be the same": edited(Pair, ("if self.chosen == self.rejected:", "if False:")),
        "sides may not share a prompt": edited(Pair, ("self.chosen == self.rejected", "self.prompt == self.rejected")),
        "any margin": edited(Pair, ("self.margin is not None and not _is_finite(self.margin)", "False")),
        "no margin is 0": edited(Pair, ("margin: float | None = None", "margin: float | None = 0.0")),
        "types not checked": edited(Pair, ("if not isinstance(getattr(self, name), str):", "if False:")),
        "can be changed": dataclasses.dataclass(
            type(
                "Pair",
                (),
                {"__annotations__": Pair.__annotations__, "__post_init__": Pair.__post_init__, "margin": None},
            )
        ),
    },
    "random_task": {
        "not standardised": edited(
            random_task,
            ("scores = (scores - scores.mean(1, keepdim=True)) / scores.std(1, correction=0, keepdim=True)\n", "\n"),
        ),
        "standardised over all prompts": edited(
            random_task,
            (
                "(scores - scores.mean(1, keepdim=True)) / scores.std(1, correction=0, keepdim=True)",
                "(scores - scores.mean()) / scores.std(correction=0)",
            ),
        ),
        "unbiased deviation": edited(random_task, ("correction=0", "correction=1")),
        "same structure at every position": edited(
            random_task, ("by_position[:, t, tokens", "by_position[:, 0, tokens")
        ),
        "padding scores too": edited(
            random_task,
            (
                "torch.where(mask[:, t], by_position[:, t, tokens[:, t]], torch.zeros_like(scores))",
                "by_position[:, t, tokens[:, t]]",
            ),
        ),
        "global generator": edited(random_task, ("generator=generator, ", "")),
        "noise ignored": edited(random_task, ("noise * normal", "0.3 * normal")),
        "seed ignored": edited(random_task, ("manual_seed(seed)", "manual_seed(0)")),
        "one prompt's structure for all": edited(
            random_task, ("by_position[:, t, tokens", "by_position[:1, t, tokens")
        ),
    },
}
EXEMPT = {"Task"}
