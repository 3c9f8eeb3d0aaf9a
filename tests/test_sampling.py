"""Sampling: draws follow the exact distribution, and a rollout records what the policy says about them."""

import pytest
import torch

from planting import close, edited, f64, leaf, normal, raises
from rlhfkit.exact import enumerate_responses
from rlhfkit.models import TabularPolicy
from rlhfkit.sampling import all_logprobs, response_logprobs, sample
from rlhfkit.tasks import random_task

pytestmark = pytest.mark.usefixtures("device")


def policy_of(vocab_size=3, max_length=3, num_prompts=2, seed=0):
    prefixes = TabularPolicy.count_prefixes(vocab_size, max_length)
    return TabularPolicy(vocab_size, max_length, num_prompts, normal(num_prompts, prefixes, vocab_size, seed=seed))


def generator(seed=0):
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def by_the_chain_rule(policy, prompt, response):
    """log pi(response | prompt), one table row after the other."""
    total, tokens = 0.0, [prompt]
    for token in response:
        total += policy.logits(torch.tensor([tokens]))[0, -1].log_softmax(-1)[token].item()
        tokens.append(token)
    return total


def on_device(task):
    return task.to(torch.get_default_device())


def make_task(eos_id=None, num_prompts=2):
    with torch.device("cpu"):
        task = random_task(3, 3, num_prompts, eos_id=eos_id, seed=2)
    return on_device(task)


def test_draws_have_the_frequencies_of_the_exact_distribution(sample=sample):
    """Pearson's statistic over all listed responses stays below its mean plus five standard deviations."""
    policy, draws = policy_of(), 20_000
    for eos_id in (None, 0, 2):
        tokens, _ = enumerate_responses(3, 3, eos_id)
        rollout = sample(policy, torch.ones(draws, 1, dtype=torch.long), 3, generator=generator(), eos_id=eos_id)
        counts = (rollout.tokens[:, None] == tokens).all(-1).sum(0)
        assert counts.sum() == draws  # every draw is on the list, padded as there
        lengths = [r.index(eos_id) + 1 if eos_id in r else 3 for r in tokens.tolist()]
        p = f64([by_the_chain_rule(policy, 1, r[:n]) for r, n in zip(tokens.tolist(), lengths, strict=True)]).exp()
        statistic = ((counts - draws * p).square() / (draws * p)).sum().item()
        freedom = len(tokens) - 1
        assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_rollout_records_the_log_probabilities_of_its_tokens(sample=sample):
    policy = policy_of()
    prompts = torch.tensor([[0], [1]]).repeat(20, 1)
    for eos_id in (None, 1):
        rollout = sample(policy, prompts, 3, generator=generator(), eos_id=eos_id)
        assert rollout.tokens.shape == rollout.response_mask.shape == rollout.logprobs.shape == (40, 3)
        for b in range(40):
            response = rollout.tokens[b][rollout.response_mask[b]].tolist()
            expected = by_the_chain_rule(policy, prompts[b, 0].item(), response)
            close(rollout.logprobs[b].sum(), f64(expected))
        assert (rollout.logprobs[~rollout.response_mask] == 0).all()
        assert rollout.prompts.equal(prompts)


def test_a_response_ends_with_its_first_eos_which_counts(sample=sample):
    rollout = sample(policy_of(max_length=4), torch.zeros(200, 1, dtype=torch.long), 4, generator=generator(), eos_id=2)
    for tokens, mask in zip(rollout.tokens.tolist(), rollout.response_mask.tolist(), strict=True):
        length = tokens.index(2) + 1 if 2 in tokens else 4
        assert mask == [t < length for t in range(4)]
        assert all(token == 2 for token in tokens[length:])
    assert len(set(rollout.response_mask.sum(1).tolist())) == 4


def test_draws_repeat_with_their_generator_and_leave_the_global_one_alone(sample=sample):
    policy, prompts = policy_of(), torch.zeros(50, 1, dtype=torch.long)
    before = torch.get_rng_state()
    a, b, c = (sample(policy, prompts, 3, generator=generator(seed)).tokens for seed in (1, 1, 2))
    assert a.equal(b) and not a.equal(c)
    assert before.equal(torch.get_rng_state())


def test_no_gradient_flows_into_a_rollout_and_the_dtype_is_the_policy_s(sample=sample):
    rollout = sample(policy_of().float(), torch.zeros(4, 1, dtype=torch.long), 3, generator=generator())
    assert not rollout.logprobs.requires_grad and rollout.logprobs.dtype == torch.float32
    for prompts, length in ((torch.zeros(3, dtype=torch.long), 2), (torch.zeros(3, 1, dtype=torch.long), 0)):
        raises(
            ValueError,
            lambda p=prompts, n=length: sample(policy_of(), p, n, generator=generator()),
            "prompts",
            "max_length",
        )


class Fixed:
    """A policy on long prompts: next-token logits that depend on the whole sequence so far, by its sum."""

    def __init__(self):
        self.table = leaf(normal(50, 3))

    def logits(self, tokens):
        return self.table[tokens.cumsum(1)]


def test_response_logprobs_start_right_after_the_prompt(response_logprobs=response_logprobs):
    policy, prompts, tokens = Fixed(), torch.tensor([[2, 0, 1], [1, 1, 1]]), torch.tensor([[0, 2], [1, 0]])
    got = response_logprobs(policy, prompts, tokens)
    expected = [
        [policy.table[3].log_softmax(-1)[0], policy.table[3].log_softmax(-1)[2]],
        [policy.table[3].log_softmax(-1)[1], policy.table[4].log_softmax(-1)[0]],
    ]
    close(got, torch.stack([torch.stack(row) for row in expected]))


def test_response_logprobs_carry_the_score_function_whose_mean_is_zero(response_logprobs=response_logprobs):
    """E[grad log pi(y)] = 0, over the whole list."""
    policy = policy_of(num_prompts=1)
    tokens, _ = enumerate_responses(3, 3)
    logprobs = response_logprobs(policy, torch.zeros(27, 1, dtype=torch.long), tokens).sum(1)
    close(logprobs.exp().sum(), f64(1.0).reshape(()), check_device=False)
    (logprobs.exp().detach() * logprobs).sum().backward()
    close(policy.table.grad, torch.zeros_like(policy.table))
    policy.table.grad = None
    logprobs = response_logprobs(policy, torch.zeros(1, 1, dtype=torch.long), tokens[5:6]).sum()
    logprobs.backward()
    assert (policy.table.grad != 0).any()


def test_response_logprobs_refuse_shapes_that_do_not_fit(response_logprobs=response_logprobs):
    policy = policy_of()
    for prompts, tokens in (((2, 1), (3, 2)), ((2,), (2, 2)), ((2, 1), (2,))):
        zeros = [torch.zeros(shape, dtype=torch.long) for shape in (prompts, tokens)]
        raises(ValueError, lambda z=zeros: response_logprobs(policy, *z), "prompts", "tokens", str(tokens))


def test_all_logprobs_are_those_of_the_chain_rule_in_the_order_of_the_list(all_logprobs=all_logprobs):
    for eos_id in (None, 0, 2):
        task = make_task(eos_id)
        policy = on_device(task).reference()
        got = all_logprobs(policy, task)
        assert got.shape == task.scores.shape and got.requires_grad
        close(got.exp().sum(1), torch.ones_like(got[:, 0]))
        for p in range(2):
            for i, (tokens, mask) in enumerate(zip(task.tokens, task.response_mask, strict=True)):
                close(got[p, i], f64(by_the_chain_rule(policy, p, tokens[mask].tolist())))


def _sample(*changes):
    return edited(sample, *changes)


PLANTED = {
    "sample": {
        "eos does not count": _sample(
            ("            alive = alive & (tokens.squeeze(1) != eos_id)", "            pass"),
            (
                "        columns.append((tokens, alive,",
                "        alive = alive & ((tokens.squeeze(1) != eos_id) if eos_id is not None else alive)\n"
                "        columns.append((tokens, alive,",
            ),
        ),
        "goes on after eos": _sample(("alive = alive & (tokens.squeeze(1) != eos_id)", "pass")),
        "greedy": _sample(
            (
                "torch.multinomial(logits[:, 0].softmax(-1), 1, generator=generator)",
                "logits[:, 0].argmax(-1, keepdim=True)",
            )
        ),
        "log-probabilities as weights": _sample(("logits[:, 0].softmax(-1)", "-logits[:, 0].log_softmax(-1)")),
        "temperature left in": _sample(("logits[:, 0].softmax(-1)", "(logits[:, 0] / 0.9).softmax(-1)")),
        "global generator": _sample((", generator=generator)", ")")),
        "reads the first position": _sample(("[:, -1:]", "[:, :1]")),
        "forgets what it drew": _sample(
            ("torch.cat([sequences, tokens], dim=1)", "torch.cat([sequences, 0 * tokens], dim=1)")
        ),
        "padding keeps its log-probability": _sample(
            ("torch.where(alive, logprobs, torch.zeros_like(logprobs))", "logprobs")
        ),
        "padding is what was drawn": _sample(("tokens = torch.where(alive.unsqueeze(1), tokens, eos_id)", "pass")),
        "carries a gradient": _sample(("@torch.no_grad()\n", "")),
        "gives probabilities": _sample(("token_logprobs(logits, tokens)", "token_logprobs(logits, tokens).exp()")),
    },
    "response_logprobs": {
        "prompt included": edited(response_logprobs, ("[:, prompts.shape[1] - 1 :]", "")),
        "shifted by one": edited(response_logprobs, ("prompts.shape[1] - 1 :", "prompts.shape[1] :")),
        "first tokens instead": edited(response_logprobs, ("[:, prompts.shape[1] - 1 :]", "[:, : tokens.shape[1]]")),
        "without the shift": edited(
            response_logprobs,
            (
                "next_token_logprobs(policy.logits(sequences), sequences)[:, prompts.shape[1] - 1 :]",
                "token_logprobs(policy.logits(sequences), sequences)[:, prompts.shape[1] :]",
            ),
        ),
        "no gradient": lambda *a: response_logprobs(*a).detach() + 0 * response_logprobs(*a),
        "response before the prompt": edited(response_logprobs, ("[prompts, tokens]", "[tokens, prompts]")),
    },
    "all_logprobs": {
        "padding counts": lambda policy, task: (
            response_logprobs(
                policy, task.prompts.repeat_interleave(len(task.tokens), 0), task.tokens.repeat(len(task.scores), 1)
            )
            .sum(1)
            .view(task.scores.shape)
        ),
        "prompts in the wrong order": edited(
            all_logprobs, ("task.prompts.repeat_interleave(count, dim=0)", "task.prompts.repeat(count, 1)")
        ),
        "mean over tokens": edited(all_logprobs, (", mask).view(", ", mask).div(mask.sum(1)).view(")),
        "no gradient": lambda policy, task: all_logprobs(policy, task).detach(),
        "transposed": edited(all_logprobs, (".view(num_prompts, count)", ".view(count, num_prompts).T")),
    },
}
EXEMPT = set()
