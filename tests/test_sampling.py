"""Sampling: draws follow the exact distribution, and a rollout records what the policy says about them."""

import collections
import copy
import itertools
import math
from unittest import mock

import pytest
import torch

from planting import close, edited, f64, leaf, normal, raises
from rlhfkit import sampling
from rlhfkit.exact import enumerate_responses
from rlhfkit.logprobs import log_softmax
from rlhfkit.models import GPT, GPTConfig, ScalarModel, TabularPolicy, TabularValue
from rlhfkit.sampling import (
    all_logprobs,
    draw,
    logits_and_values,
    response_logprobs,
    response_values,
    sample,
    truncate_logits,
)
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


def test_one_generator_gives_the_draws_of_plain_softmax_and_multinomial(sample=sample):
    policy, prompts = policy_of(), torch.arange(2).repeat(50).unsqueeze(1)
    expected, same = prompts, generator()
    for _ in range(3):
        drawn = torch.multinomial(policy.logits(expected)[:, -1].softmax(-1), 1, generator=same)
        expected = torch.cat([expected, drawn], 1)
    assert sample(policy, prompts, 3, generator=generator()).tokens.equal(expected[:, 1:])


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
    for prompts, tokens in (((2, 1), (3, 2)), ((2,), (2, 2)), ((2, 1), (2,)), ((2, 0), (2, 2)), ((40, 0), (40, 3))):
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


def gpt(pad_id=0, **changes):
    """A GPT with every parameter large, so that its distributions are far from uniform and depend on everything."""
    sizes = {"vocab_size": 9, "n_positions": 24, "n_embd": 8, "n_layer": 2, "n_head": 2}
    model = GPT(GPTConfig(**sizes | changes, pad_id=pad_id))
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(0.6 * normal(*parameter.shape, seed=4200 + i))  # of those that end now and then
    return model.eval()


MIXED = [[0, 0, 0, 5], [0, 0, 2, 5], [3, 4, 2, 5], [0, 8, 8, 8], [6, 5, 4, 3]]
SETTINGS = [{}, {"temperature": 0.7}, {"top_k": 3}, {"top_p": 0.8}, {"temperature": 1.5, "top_k": 6, "top_p": 0.9}]


def test_cached_and_uncached_draw_the_same(sample=sample):
    for pad_id, eos_id in ((0, 1), (-1, 1), (-1, None)):
        model, prompts = gpt(pad_id), torch.tensor(MIXED).repeat(8, 1)
        for settings in SETTINGS:
            a, b = (
                sample(model, prompts, 20, generator=generator(3), eos_id=eos_id, use_cache=use_cache, **settings)
                for use_cache in (True, False)
            )
            assert a.tokens.equal(b.tokens) and a.response_mask.equal(b.response_mask), (pad_id, eos_id, settings)
            close(a.logprobs, b.logprobs, atol=1e-5, rtol=0)
            close(a.sampling_logprobs, b.sampling_logprobs, atol=1e-5, rtol=0)


def test_a_batch_of_mixed_lengths_equals_one_prompt_at_a_time(sample=sample):
    """Greedy, where the draws cannot differ; padding before a prompt changes nothing."""
    model, prompts = gpt(), torch.tensor(MIXED)
    batch = sample(model, prompts, 12, generator=generator(), eos_id=1, top_k=1)
    assert len(set(batch.response_mask.sum(1).tolist())) > 1
    for i, prompt in enumerate(MIXED):
        alone = torch.tensor([[token for token in prompt if token]])
        one = sample(model, alone, 12, generator=generator(), eos_id=1, top_k=1)
        assert one.tokens[0].equal(batch.tokens[i]) and one.response_mask[0].equal(batch.response_mask[i])
        close(one.logprobs[0], batch.logprobs[i], atol=1e-5, rtol=0)
    assert (batch.sampling_logprobs == 0).all()


def test_a_rollout_of_a_gpt_holds_both_log_probabilities(sample=sample, response_logprobs=response_logprobs):
    """Of the model, temperature 1 and nothing cut off; and of what was drawn from, whose probabilities sum to 1."""
    model, prompts = gpt(), torch.tensor(MIXED).repeat(6, 1)
    for settings in SETTINGS:
        rollout = sample(model, prompts, 10, generator=generator(), eos_id=1, **settings)
        mask = rollout.response_mask
        expected = response_logprobs(model, prompts, rollout.tokens).detach()
        close(rollout.logprobs, torch.where(mask, expected, 0.0), atol=1e-5, rtol=0)
        assert (rollout.tokens[~mask] == 0).all() and not mask.all() and (rollout.sampling_logprobs[~mask] == 0).all()
        logits = model.logits(torch.cat([prompts, rollout.tokens], 1))[:, 3:-1]
        for b, t in ((0, 0), (1, 1), (2, 2), (7, 0)):
            scaled = (logits[b, t] / settings.get("temperature", 1.0)).tolist()
            kept = kept_by_definition(scaled, settings.get("top_k"), settings.get("top_p"))
            assert not mask[b, t] or rollout.tokens[b, t].item() in kept
            total = sum(math.exp(scaled[v]) for v in kept)
            exact = scaled[rollout.tokens[b, t]] - math.log(total)
            assert not mask[b, t] or abs(rollout.sampling_logprobs[b, t].item() - exact) < 1e-5


def kept_by_definition(logits, top_k=None, top_p=None):
    """Ids from the most probable on, until there are k or until they hold p."""
    order = sorted(range(len(logits)), key=lambda v: -logits[v])[: top_k or len(logits)]
    total = sum(math.exp(logits[v]) for v in order)
    kept = []
    for v in order:
        kept.append(v)
        if top_p is not None and sum(math.exp(logits[u]) for u in kept) / total >= top_p:
            break
    return set(kept)


def test_truncation_keeps_the_tokens_of_the_definition_and_their_ratios(truncate_logits=truncate_logits):
    logits = 2 * normal(40, 7)
    for temperature, top_k, top_p in itertools.product(
        (0.5, 1.0, 2.0), (None, 1, 3, 7, 50), (None, 0.05, 0.6, 0.95, 1.0)
    ):
        got = truncate_logits(logits, temperature, top_k, top_p)
        for before, after in zip((logits / temperature).tolist(), got.tolist(), strict=True):
            kept = kept_by_definition(before, top_k, None if top_p == 1 else top_p)
            expected = [value if v in kept else -math.inf for v, value in enumerate(before)]
            close(f64(after), f64(expected))
    close(truncate_logits(logits.view(2, 20, 7), 0.5, 3, 0.6), truncate_logits(logits, 0.5, 3, 0.6).view(2, 20, 7))


def test_truncation_at_the_edges(truncate_logits=truncate_logits):
    """Hand-worked: probabilities 0.5, 0.25, 0.125, 0.125."""
    logits = f64([0.5, 0.25, 0.125, 0.125]).log()
    kept = {0.49: 1, 0.51: 2, 0.74: 2, 0.76: 3, 1e-9: 1, 1.0: 4}
    for top_p, count in kept.items():
        assert truncate_logits(logits, top_p=top_p).isfinite().sum() == count
    assert truncate_logits(f64([1.0, 1.0, 1.0]), top_k=2).isfinite().sum() == 2  # exactly k, also among equals
    close(truncate_logits(logits, temperature=2.0).softmax(-1), logits.exp().sqrt() / logits.exp().sqrt().sum())
    # temperature first: at 0.5 the probabilities are 16, 4, 1, 1 of 22; then k = 2 leaves 0.8 and 0.2
    assert truncate_logits(logits, 0.5, None, 0.7).isfinite().sum() == 1
    assert truncate_logits(logits, 1.0, 2, 0.65).isfinite().sum() == 1  # 2/3 of what top-k left
    for wrong in ({"temperature": 0.0}, {"temperature": -1.0}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.1}):
        ((name, value),) = wrong.items()
        raises(ValueError, lambda w=wrong: truncate_logits(logits, **w), name, str(value))


def test_truncated_draws_have_the_frequencies_of_the_exact_truncated_distribution(sample=sample):
    """All 27 responses of a tabular policy, with their probabilities from the definition; Pearson's statistic."""
    policy, draws = policy_of(), 20_000
    for settings in (
        {"temperature": 0.6},
        {"top_k": 2},
        {"top_p": 0.7},
        {"temperature": 1.4, "top_k": 2, "top_p": 0.8},
    ):
        probabilities = {(): 1.0}
        for _ in range(3):
            longer = {}
            for response, p in probabilities.items():
                logits = policy.logits(torch.tensor([[1, *response]]))[0, -1]
                scaled = (logits / settings.get("temperature", 1.0)).tolist()
                kept = kept_by_definition(scaled, settings.get("top_k"), settings.get("top_p"))
                total = sum(math.exp(scaled[v]) for v in kept)
                longer |= {(*response, v): p * math.exp(scaled[v]) / total for v in kept}
            probabilities = longer
        rollout = sample(policy, torch.ones(draws, 1, dtype=torch.long), 3, generator=generator(), **settings)
        drawn = collections.Counter(map(tuple, rollout.tokens.tolist()))
        assert drawn.keys() <= probabilities.keys(), settings
        statistic = sum((drawn[y] - draws * p) ** 2 / (draws * p) for y, p in probabilities.items())
        freedom = len(probabilities) - 1
        assert statistic < freedom + 5 * (2 * freedom) ** 0.5, settings
        for response, logprobs in zip(rollout.tokens[:50].tolist(), rollout.sampling_logprobs[:50], strict=True):
            assert abs(logprobs.sum().item() - math.log(probabilities[tuple(response)])) < 1e-9


class Counting:
    """A policy that ends every response after three tokens and counts how often it is asked."""

    calls, vocab_size = 0, 4

    def logits(self, tokens):
        self.calls += 1
        logits = torch.zeros(*tokens.shape, 4)
        logits[..., 3] = 1e3 if tokens.shape[1] > 4 else -1e3
        return logits


def test_sampling_stops_when_every_response_has_ended(sample=sample):
    policy = Counting()
    rollout = sample(policy, torch.zeros(5, 3, dtype=torch.long), 40, generator=generator(), eos_id=3)
    assert policy.calls == 3 and rollout.tokens.shape == rollout.logprobs.shape == (5, 40)
    assert rollout.response_mask.sum(1).tolist() == [3] * 5 and (rollout.tokens[:, 2:] == 3).all()


def test_bf16_autocast_draws_with_log_probabilities_in_float32(sample=sample):
    model, prompts = gpt(), torch.tensor(MIXED)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        rollout = sample(model, prompts, 10, generator=generator(), eos_id=1)
        again = response_logprobs(model, prompts, rollout.tokens)
    assert rollout.logprobs.dtype == rollout.sampling_logprobs.dtype == again.dtype == torch.float32
    exact = response_logprobs(model, prompts, rollout.tokens)
    mask = rollout.response_mask
    close(rollout.logprobs[mask], exact[mask], atol=0.3, rtol=0.1)  # 8 bits through two layers of large weights
    # more than bfloat16's 8 bits: not one of the values survives being rounded to it
    assert (rollout.logprobs.bfloat16().float() != rollout.logprobs)[mask].float().mean() > 0.9


def test_sample_refuses_prompts_and_lengths_a_gpt_cannot_read(sample=sample):
    model = gpt()
    for rows, words in (
        ([[0, 0, 0], [0, 1, 2]], ("prompts", "row 0", "empty")),
        ([[3, 4, 5], [3, 4, 0]], ("prompts", "row 1", "padding", "left")),
    ):
        raises(ValueError, lambda r=rows: sample(model, torch.tensor(r), 2, generator=generator()), *words)
    prompts = torch.tensor([[0, 0, 3, 4], [0, 5, 6, 7]])
    words = ("prompts", "max_length", "3 prompt tokens", "22", "n_positions = 24")
    raises(ValueError, lambda: sample(model, prompts, 22, generator=generator()), *words)
    try:
        assert sample(model, prompts, 21, generator=generator()).tokens.shape == (2, 21)
    except ValueError as error:
        raise AssertionError("3 + 21 tokens fit into 24") from error
    for wrong in ({"temperature": 0.0}, {"top_k": 0}, {"top_p": 1.5}):
        raises(ValueError, lambda w=wrong: sample(model, prompts, 2, generator=generator(), **w), *wrong)


def test_response_logprobs_at_a_temperature_are_those_of_the_scaled_logits(response_logprobs=response_logprobs):
    policy, prompts, tokens = Fixed(), torch.tensor([[2, 0, 1], [1, 1, 1]]), torch.tensor([[0, 2], [1, 0]])
    got = response_logprobs(policy, prompts, tokens, temperature=0.5).exp()
    squares = response_logprobs(policy, prompts, tokens).exp().square()  # p^(1/T), up to the sum over the vocabulary
    sums = torch.stack([response_logprobs(policy, prompts[:, :], tokens * 0 + v).exp().square() for v in range(3)])
    close(got[:, 0], (squares / sums.sum(0))[:, 0])
    raises(ValueError, lambda: response_logprobs(policy, prompts, tokens, 0.0), "temperature", "0.0")


def test_sample_reads_a_table_that_was_normalised_once(sample=sample):
    """A large batch reads more than a table has rows: the same rollout, for less work. A small one reads less."""
    policy, seen = policy_of(), []

    def spied(logits):
        seen.append(tuple(logits.shape))
        return log_softmax(logits)

    for batch, eos_id, settings in itertools.product((8, 100), (None, 1), ({}, {"temperature": 0.5}, {"top_k": 2})):
        prompts = torch.arange(2).repeat(batch // 2).unsqueeze(1)
        rollouts = []
        for use_cache, table in itertools.product((True, False), (sampling._log_table, lambda *_: None)):
            with mock.patch.object(sampling, "_log_table", table), mock.patch.object(sampling, "log_softmax", spied):
                seen.clear()
                one = sample(policy, prompts, 3, generator=generator(), eos_id=eos_id, use_cache=use_cache, **settings)
            rollouts.append(one)
            if table is sampling._log_table and not settings:
                assert seen == ([(27, 3)] if batch == 100 else [(batch, 3)] * 3)
        for other in rollouts[1:]:
            assert other.tokens.equal(rollouts[0].tokens) and other.response_mask.equal(rollouts[0].response_mask)
            close(other.logprobs, rollouts[0].logprobs, atol=1e-14, rtol=0)
            close(other.sampling_logprobs, rollouts[0].sampling_logprobs, atol=1e-14, rtol=0)


def test_a_table_that_is_read_in_another_way_is_asked_at_every_position(
    sample=sample, response_logprobs=response_logprobs
):
    class Backwards(TabularPolicy):
        def unembed(self, hidden):
            return super().unembed(hidden).flip(-1)

        def hidden(self, tokens, cache=None):
            return super().hidden(tokens, cache).remainder(7)

    policy = Backwards(3, 3, 2, policy_of().table)
    prompts = torch.arange(2).repeat(50).unsqueeze(1)
    rollout = sample(policy, prompts, 3, generator=generator())
    again = response_logprobs(policy, prompts, rollout.tokens)
    sequences = torch.cat([prompts, rollout.tokens], 1)
    expected = policy.logits(sequences)[:, :-1].log_softmax(-1).gather(-1, rollout.tokens.unsqueeze(-1)).squeeze(-1)
    close(rollout.logprobs, expected)
    close(again, expected)


def test_many_responses_have_the_log_probabilities_of_each_alone(response_logprobs=response_logprobs):
    """Numbers and gradient, where a table is normalised before it is read and where it is not."""
    tokens, _ = enumerate_responses(3, 3)
    tokens = tokens.repeat(2, 1)[:, :2]
    prompts, weights = torch.arange(2).repeat_interleave(27).unsqueeze(1), normal(54, 2)
    for length in (1, 2):  # the second time with a first token in the prompt
        x, y = (prompts, tokens) if length == 1 else (torch.cat([prompts, tokens[:, :1]], 1), tokens)
        together, apart = policy_of(), policy_of()
        many = response_logprobs(together, x, y)
        alone = torch.cat([response_logprobs(apart, *pair) for pair in zip(x.split(1), y.split(1), strict=True)])
        close(many, alone, atol=1e-14, rtol=0)
        (weights * many).sum().backward()
        (weights * alone).sum().backward()
        close(together.table.grad, apart.table.grad, atol=1e-13, rtol=0)
    half = response_logprobs(policy_of().bfloat16(), prompts, tokens)
    assert half.dtype == torch.float32 and (half.bfloat16().float() != half).any()
    exact = response_logprobs(policy_of(), prompts, tokens, temperature=2.0)
    close(exact[:1], response_logprobs(policy_of(), prompts[:1], tokens[:1], temperature=2.0))


def _sample(*changes):
    return edited(sample, *changes)


def _both(*changes):
    return edited(logits_and_values, *changes)


def _truncate(*changes):
    return edited(truncate_logits, *changes)


def small_gpt(seed=0):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(7, 12, 8, 1, 2, pad_id=0)).double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return model


LEFT_PADDED = ([[0, 5, 6], [2, 3, 4], [0, 0, 3]], [[1, 2, 3], [4, 1, 0], [1, 0, 0]])


def test_logits_and_values_stand_where_each_token_is_chosen(logits_and_values=logits_and_values):
    """Row by row and without padding, after prompt and earlier tokens; with a shared trunk, a copy and another."""
    policy = small_gpt()
    prompts, tokens = map(torch.tensor, LEFT_PADDED)
    for trunk in (policy, copy.deepcopy(policy), small_gpt(1)):
        value = ScalarModel(trunk, 0.5).double()
        torch.nn.init.normal_(value.head.bias)
        logits, values = logits_and_values(policy, value, prompts, tokens)
        assert logits.shape == (3, 3, 7) and values.shape == (3, 3) and logits.dtype == values.dtype == torch.float64
        for b, t in itertools.product(range(3), range(3)):
            said = [x for x in prompts[b].tolist() if x] + tokens[b, :t].tolist()
            if tokens[b, t]:  # what stands at padding means nothing
                alone = torch.tensor([said])
                close(logits[b, t], policy.logits(alone)[0, -1])
                close(values[b, t], value.values(alone)[0, -1])


def test_a_shared_trunk_runs_once_and_its_gradient_is_that_of_both(logits_and_values=logits_and_values):
    policy = small_gpt()
    value, calls = ScalarModel(policy, 0.5).double(), []
    prompts, tokens = map(torch.tensor, LEFT_PADDED)
    weights = normal(3, 3, 7), normal(3, 3, seed=1)

    def slopes(*arguments):
        outputs = logits_and_values(*arguments, prompts, tokens)
        total = sum((w * x).sum() for w, x in zip(weights, outputs, strict=True))
        return torch.autograd.grad(total, list(policy.parameters()), allow_unused=True)

    apart = copy.deepcopy(value)
    hook = policy.norm.register_forward_hook(lambda *_: calls.append(1))
    together = slopes(policy, value)
    assert len(calls) == 1
    hook.remove()
    copied = slopes(policy, apart)
    for a, b in zip(together, copied, strict=True):
        assert (a is None) == (b is None)
    assert any(not torch.allclose(a, b) for a, b in zip(together, copied, strict=True) if a is not None)
    twice = value.values(torch.cat([prompts, tokens], 1))[:, 2:-1]
    alone = torch.autograd.grad((weights[1] * twice).sum(), list(policy.parameters()), allow_unused=True)
    for a, b, c in zip(together, copied, alone, strict=True):
        if a is not None:
            close(a, b + (0 if c is None else c))


def test_logits_and_values_of_tables_are_read_at_the_prefixes(logits_and_values=logits_and_values):
    policy = policy_of()
    prompts, (tokens, _) = torch.tensor([[1]]).repeat(27, 1), enumerate_responses(3, 3)
    for value in (TabularValue(policy), TabularValue(policy_of(seed=1))):  # on this policy's prefixes or on another's
        value.table.data = normal(*value.table.shape, seed=4)
        logits, values = logits_and_values(policy, value, prompts, tokens)
        for row, t in itertools.product((0, 13, 26), range(3)):
            so_far = torch.cat([prompts[row], tokens[row, :t]]).unsqueeze(0)
            close(logits[row, t], policy.logits(so_far)[0, -1])
            close(values[row, t], value.values(so_far)[0, -1])


def test_logits_and_values_come_in_float32_from_half_precision(logits_and_values=logits_and_values):
    policy = small_gpt().to(torch.bfloat16)
    value = ScalarModel(policy, 0.5)
    for other in (value, copy.deepcopy(value)):
        found = logits_and_values(policy, other, *map(torch.tensor, LEFT_PADDED))
        assert {x.dtype for x in found} == {torch.float32}


def test_values_alone_are_those_beside_the_logits(response_values=response_values):
    """Number, gradient and precision; and no logits are made on the way."""
    policy = small_gpt()
    prompts, tokens = map(torch.tensor, LEFT_PADDED)
    for trunk in (policy, small_gpt(1)):
        value = ScalarModel(trunk, 0.5).double()
        parameters = list(value.parameters())
        beside, alone = logits_and_values(policy, value, prompts, tokens)[1], response_values(value, prompts, tokens)
        close(alone, beside, atol=0, rtol=0)
        weights = normal(3, 3)
        for a, b in zip(*(torch.autograd.grad((weights * x).sum(), parameters) for x in (alone, beside)), strict=True):
            close(a, b)
        with mock.patch.object(type(policy), "unembed") as unembed:
            response_values(value, prompts, tokens)
        assert not unembed.called
    assert response_values(copy.deepcopy(value).to(torch.bfloat16), prompts, tokens).dtype == torch.float32


def test_draw_gives_the_draws_of_multinomial_and_leaves_its_generator(draw=draw):
    """In both precisions, in memory that goes along the rows and in memory that goes across them."""
    cases = itertools.product((torch.float32, torch.float64), ((3000, 2), (500, 6), (64, 350), (1, 5)), range(3))
    for dtype, shape, seed in cases:
        probabilities = (3 * normal(*shape)).softmax(-1).to(dtype)
        ours, torchs = (torch.Generator().manual_seed(seed) for _ in range(2))
        found = draw(probabilities, ours)
        assert found.dtype == torch.int64
        assert torch.equal(found, torch.multinomial(probabilities, 1, generator=torchs))
        assert torch.equal(ours.get_state(), torchs.get_state())
        across = draw(probabilities.T.contiguous().T, torch.Generator().manual_seed(seed))
        assert torch.equal(across, found)


def test_draw_never_gives_what_has_probability_0(draw=draw):
    """Not even where the random number is 0, and with it the wait."""
    probabilities = torch.tensor([[0.0, 0.25, 0.0, 0.75]]).repeat(4, 1)
    with mock.patch.object(torch, "rand", lambda *size, **_: torch.zeros(*size, dtype=torch.float64)):
        assert probabilities.gather(1, draw(probabilities, torch.Generator())).min() > 0


def test_draw_refuses_what_is_no_distribution(draw=draw):
    for bad in (math.nan, math.inf):
        probabilities = torch.tensor([[0.5, bad], [0.5, 0.5]])
        raises(RuntimeError, lambda p=probabilities: draw(p, torch.Generator()), "nan")


PLANTED = {
    "draw": {
        "random numbers in single precision": edited(draw, ("torch.float64", "torch.float32")),
        "the last clock": edited(draw, (".argmax(", ".argmin(")),
        "waits without a floor": edited(draw, (".clamp(min=TINY)", "")),
        "uniform waits": edited(draw, ("-torch.log1p(-", "(")),
        "nan goes through": edited(draw, (" or not torch.isfinite(probabilities.sum())", "")),
        "another generator": edited(draw, ("generator=generator, dtype", "dtype")),
    },
    "sample": {
        "eos does not count": _sample(
            ("            alive = alive & (tokens[:, 0] != eos_id)\n", "            pass\n"),
            (
                "        mask[:, t - start] = alive\n",
                "        alive = alive & ((tokens[:, 0] != eos_id) if eos_id is not None else alive)\n"
                "        mask[:, t - start] = alive\n",
            ),
        ),
        "goes on after eos": _sample(("alive = alive & (tokens[:, 0] != eos_id)", "pass")),
        "greedy": _sample(("draw(drawn.exp(), generator)", "drawn.argmax(-1, keepdim=True)")),
        "log-probabilities as weights": _sample(("drawn.exp()", "-drawn")),
        "draws from the model itself": _sample(("drawn.exp()", "logprobs.exp()")),
        "temperature left in": _sample(("logprobs = log_softmax(logits)\n", "logprobs = log_softmax(logits / 0.9)\n")),
        "global generator": _sample(("drawn.exp(), generator)", "drawn.exp(), torch.default_generator)")),
        "reads the first position": _sample((", -1, cache)[:, 0]", ", 0, cache)[:, 0]")),
        "reads the first row of a table": _sample(("(unread, cache)[:, -1]", "(unread, cache)[:, 0]")),
        "a table also where logits are truncated": _sample((" if as_it_is else None", "")),
        "a table for few responses": _sample(("_log_table(policy, batch * max_length)", "_log_table(policy, 10**9)")),
        "no table for many responses": _sample(("_log_table(policy, batch * max_length)", "_log_table(policy, 0)")),
        "forgets what it drew": _sample(("torch.where(alive, tokens[:, 0], sequences[:, t])", "fill")),
        "padding keeps its log-probability": _sample(
            ("torch.where(alive.unsqueeze(1), both, torch.zeros_like(both))", "both")
        ),
        "padding is what was drawn": _sample(
            ("torch.where(alive, tokens[:, 0], sequences[:, t])", "tokens[:, 0]"),
        ),
        "carries a gradient": _sample(("@torch.no_grad()\n", "")),
        "gives probabilities": _sample(("logprobs.gather(1, tokens)", "logprobs.gather(1, tokens).exp()")),
        "both log-probabilities of the model": _sample(("drawn.gather(1, tokens)", "logprobs.gather(1, tokens)")),
        "both of what was drawn from": _sample(("logprobs.gather(1, tokens)", "drawn.gather(1, tokens)")),
        "not renormalised": _sample(
            (
                "log_softmax(truncate_logits(logits, temperature, top_k, top_p))",
                "truncate_logits(logprobs, temperature, top_k, top_p)",
            )
        ),
        "top-p forgotten": _sample(("(logits, temperature, top_k, top_p)", "(logits, temperature, top_k)")),
        "temperature forgotten": _sample(("(logits, temperature, top_k, top_p)", "(logits, 1.0, top_k, top_p)")),
        "settings only count with a temperature": _sample(
            ("as_it_is = temperature == 1 and top_k is None and top_p is None", "as_it_is = temperature == 1")
        ),
        "cached: every token twice": _sample(
            ("cache.used if cache else 0 : t", "max(cache.used - 1, 0) if cache else 0 : t")
        ),
        "filled with eos although there is padding": _sample(
            ("pad_id if pad_id >= 0 or eos_id is None else eos_id", "-1 if eos_id is None else eos_id")
        ),
        "goes on for nothing": _sample(("            if not alive.any():\n                break\n", "")),
        "stops with the first end": _sample(("if not alive.any():", "if not alive.all():")),
        "prompts not checked": _sample(("    _require_prompts(policy, prompts, max_length)\n", "")),
    },
    "truncate_logits": {
        "multiplied by the temperature": _truncate(("logits / temperature", "logits * temperature")),
        "the k smallest": _truncate(("min(top_k, logits.shape[-1]))", "min(top_k, logits.shape[-1]), largest=False)")),
        "k and one more": _truncate(("min(top_k, ", "min(top_k + 1, ")),
        "equals are all kept": _truncate(
            (
                "logits = torch.full_like(logits, -torch.inf).scatter(-1, tokens, kept)",
                "logits = logits.masked_fill(logits < kept[..., -1:], -torch.inf)",
            )
        ),
        "the token that reaches p is dropped": _truncate(
            ("probabilities.cumsum(-1) - probabilities", "probabilities.cumsum(-1)")
        ),
        "the least probable are kept": _truncate(("sort(descending=True", "sort(descending=False")),
        "not put back in order": _truncate(("torch.empty_like(logits).scatter(-1, tokens, kept)", "kept")),
        "top-p before top-k": _truncate(
            (
                "probabilities = kept.softmax(-1)",
                "probabilities = (unsorted / temperature).sort(descending=True).values.softmax(-1)",
            ),
            ("    logits = logits / temperature\n", "    unsorted = logits\n    logits = logits / temperature\n"),
        ),
        "temperature after top-p": lambda logits, temperature=1.0, top_k=None, top_p=None: truncate_logits(
            truncate_logits(logits, 1.0, top_k, top_p), temperature
        ),
        "cut off to zero": _truncate(("full_like(logits, -torch.inf)", "full_like(logits, 0.0)")),
        "ranges not checked": edited(truncate_logits, ('        require_in("top_k", top_k, 1)\n', "")),
    },
    "response_logprobs": {
        "prompt included": edited(response_logprobs, ("prompts.shape[1] - 1", "0")),
        "begins a token early": edited(response_logprobs, ("prompts.shape[1] - 1", "prompts.shape[1] - 2")),
        "first tokens instead": edited(
            response_logprobs,
            ("_logits_from(policy, sequences, last)", "_logits_from(policy, sequences, 0)[:, : tokens.shape[1] + 1]"),
        ),
        "without the shift": edited(
            response_logprobs,
            ("_logits_from(policy, sequences, last)", "_logits_from(policy, sequences, last).roll(-1, 1)"),
        ),
        "multiplied by the temperature": edited(response_logprobs, ("logits / temperature", "logits * temperature")),
        "temperature ignored": edited(response_logprobs, ("logits if temperature == 1 else", "logits if True else")),
        "temperature ignored in a table": edited(response_logprobs, (" if temperature == 1 else None", "")),
        "a table read a token late": edited(
            response_logprobs, ("(sequences)[:, last:-1]", "(sequences)[:, last + 1 :]")
        ),
        "prompts of no token go through": edited(response_logprobs, (" or not prompts.shape[1]", "")),
        "a table without gradient": edited(
            response_logprobs, ("log_table.flatten()", "(log_table.detach() + 0 * log_table).flatten()")
        ),
        "no gradient": lambda *a: response_logprobs(*a).detach() + 0 * response_logprobs(*a),
        "response before the prompt": edited(response_logprobs, ("[prompts, tokens]", "[tokens, prompts]")),
    },
    "logits_and_values": {
        "values one position late": _both(
            ("value.values(sequences)[:, last:-1]", "value.values(sequences)[:, last + 1 :]")
        ),
        "shared values one position late": _both(
            ("value.from_hidden(hidden)", "value.from_hidden(policy.hidden(sequences)[:, last + 1 :])")
        ),
        "logits one position late": _both(
            ("policy.logits(sequences)[:, last:-1]", "policy.logits(sequences)[:, last + 1 :]")
        ),
        "prompt included": _both(("prompts.shape[1] - 1", "0")),
        "begins a token early": _both(
            (
                "policy.logits(sequences)[:, last:-1], value.values(sequences)[:, last:-1]",
                "policy.logits(sequences)[:, last - 1 : -2], value.values(sequences)[:, last - 1 : -2]",
            )
        ),
        "the trunk runs twice": _both(('if hasattr(value, "trunk") and value.trunk is policy:', "if False:")),
        "any trunk is the policy's": _both((" and value.trunk is policy:", ":")),
        "no gradient from the values": _both(("value.from_hidden(hidden)", "value.from_hidden(hidden.detach())")),
        "no gradient from the logits": _both(("policy.unembed(hidden)", "policy.unembed(hidden.detach())")),
        "half stays half": _both(("_at_least_float32(logits), _at_least_float32(values)", "logits, values")),
        "response before the prompt": _both(("[prompts, tokens]", "[tokens, prompts]")),
    },
    "response_values": {
        "one position late": edited(response_values, ("prompts.shape[1] - 1 : -1", "prompts.shape[1] :")),
        "prompt included": edited(response_values, ("prompts.shape[1] - 1 : -1", ":-1")),
        "response before the prompt": edited(response_values, ("[prompts, tokens]", "[tokens, prompts]")),
        "no gradient": lambda *a: response_values(*a).detach() + 0 * response_values(*a),
        "half stays half": edited(response_values, ("return _at_least_float32(", "return (")),
        "by way of the logits": lambda value, *a: logits_and_values(value.trunk, value, *a)[1],
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
