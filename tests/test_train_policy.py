"""REINFORCE and PPO: exact gradients, exact values, runs that learn, repeat, stop at what is not finite, and resume."""

import copy
import dataclasses
import math
import tempfile
from pathlib import Path

import torch

from planting import close, edited, f64, normal, raises
from rlhfkit.advantages import group_mean_baseline, leave_one_out_baseline
from rlhfkit.exact import estimator_moments, objective, optimal_value
from rlhfkit.kl import AdaptiveKLController
from rlhfkit.models import GPT, GPTConfig, ScalarModel, TabularPolicy, TabularValue
from rlhfkit.ppo import PPOConfig
from rlhfkit.sampling import all_logprobs, response_logprobs
from rlhfkit.tasks import Rollout, random_task
from rlhfkit.train_policy import gradient_of, train_ppo, train_reinforce


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def uniform(task):
    return TabularPolicy(task.vocab_size, task.max_length, len(task.scores))


def exact_gradient(task, policy):
    ref_logprobs = all_logprobs(task.reference(), task).detach()
    value = objective(all_logprobs(policy, task), ref_logprobs, task.scores, task.beta).mean()
    return torch.autograd.grad(value, policy.table)[0]


def every_response_once(task):
    """In place of the sampler: the whole list for every prompt. Under a uniform policy its mean is an expectation."""

    def listing(policy, prompts, max_length, *, generator, eos_id):
        tokens, mask = (x.repeat(len(task.scores), 1) for x in (task.tokens, task.response_mask))
        with torch.no_grad():
            logprobs = torch.where(mask, response_logprobs(policy, prompts, tokens), 0.0)
        return Rollout(prompts, tokens, mask, logprobs, logprobs)

    return listing


def one_step(train_reinforce, task, policy, **settings):
    train_reinforce(policy, task, **{"steps": 1, "lr": 1e-3, "generator": generator()} | settings)
    return -policy.table.grad


def test_gradient_over_the_whole_list_is_the_exact_one(train_reinforce=train_reinforce):
    """To 1e-12, with the KL penalty, and with the group's mean, which over the whole list is a constant."""
    for beta in (0.2, 1.5):
        task = random_task(3, 3, 2, beta=beta, seed=2)
        for baseline in (None, group_mean_baseline):
            policy = uniform(task)
            expected = exact_gradient(task, policy)
            train = with_sampler(train_reinforce, every_response_once(task))
            got = one_step(train, task, policy, group_size=27, baseline=baseline)
            close(got, expected, rtol=1e-10, atol=1e-12)


def with_sampler(train, sampler):
    """Planted versions live in copies of the module's names, so the sampler is put where each one looks it up."""

    def run(*arguments, **settings):
        names = train.__globals__
        before = names["sample"]
        names["sample"] = sampler
        try:
            return train(*arguments, **settings)
        finally:
            names["sample"] = before

    return run


def test_baseline_equal_to_the_reward_leaves_no_gradient(train_reinforce=train_reinforce):
    task = random_task(4, 1, 2, seed=2)  # one token, so the reward to go is the whole reward
    got = one_step(train_reinforce, task, task.reference(), group_size=8, baseline=lambda totals: totals)
    assert (got == 0).all()
    assert (one_step(train_reinforce, task, task.reference(), group_size=8) != 0).any()


def test_gradient_from_samples_of_ragged_responses_is_within_five_standard_errors(train_reinforce=train_reinforce):
    task = random_task(3, 3, 2, eos_id=0, seed=2)
    for baseline in (None, leave_one_out_baseline):
        policy = task.reference()
        with torch.no_grad():
            policy.table *= 0.5
        expected = exact_gradient(task, policy)
        group_size = 4000
        got = one_step(train_reinforce, task, policy, group_size=group_size, baseline=baseline)
        # an upper bound of the variance of one response's estimate: total reward times score function
        ref_logprobs = all_logprobs(task.reference(), task).detach()
        logprobs = all_logprobs(task.reference(), task).detach()
        rewards = task.scores - task.beta * (logprobs - ref_logprobs)
        _, variance = estimator_moments(logprobs[0], 2 * rewards[0].abs().unsqueeze(1) + 2)
        assert (got - expected).norm() < 5 * math.sqrt((variance.item() + 10) / (2 * group_size))


def test_reinforce_climbs_most_of_the_way_to_the_optimum(train_reinforce=train_reinforce):
    task = random_task(3, 3, 2, eos_id=0, seed=1)
    ref_logprobs = all_logprobs(task.reference(), task).detach()
    start = objective(ref_logprobs, ref_logprobs, task.scores, task.beta).mean()
    best = optimal_value(ref_logprobs, task.scores, task.beta).mean()
    policy = task.reference()
    settings = {"steps": 150, "group_size": 16, "lr": 0.1, "baseline": leave_one_out_baseline}
    train_reinforce(policy, task, generator=generator(), **settings)
    reached = objective(all_logprobs(policy, task).detach(), ref_logprobs, task.scores, task.beta).mean()
    assert (reached - start) / (best - start) > 0.9


def test_reinforce_repeats_with_its_generator(train_reinforce=train_reinforce):
    task, before = random_task(3, 2, 2, seed=1), torch.get_rng_state()
    tables = []
    for seed in (1, 1, 2):
        policy = task.reference()
        train_reinforce(policy, task, steps=3, group_size=4, lr=0.1, generator=generator(seed))
        tables.append(policy.table.detach())
    assert tables[0].equal(tables[1]) and not tables[0].equal(tables[2])
    assert before.equal(torch.get_rng_state())


def test_reinforce_reports_every_step_in_reward_units_and_nats(train_reinforce=train_reinforce):
    task, seen = random_task(3, 3, 2, beta=0.5, seed=2), []
    policy = uniform(task)
    train = with_sampler(train_reinforce, every_response_once(task))
    train(policy, task, steps=2, group_size=27, lr=1e-9, generator=generator(), on_step=lambda *a: seen.append(a))
    assert [step for step, _ in seen] == [0, 1]
    ref_logprobs, logprobs = (all_logprobs(p, task).detach() for p in (task.reference(), uniform(task)))
    for _, metrics in seen:
        assert abs(metrics["objective/scores"]) < 1e-7  # standardised over the list
        kl = (logprobs.exp() * (logprobs - ref_logprobs)).sum(1).mean().item()
        assert math.isclose(metrics["objective/kl"], kl, rel_tol=1e-6)
        assert math.isclose(metrics["objective/rlhf_reward"], -0.5 * kl, rel_tol=1e-6)
        assert all(isinstance(x, float) for x in metrics.values())


def test_reinforce_runs_in_single_precision_on_double_scores(train_reinforce=train_reinforce):
    task = random_task(3, 2, 2, seed=1)
    policy = task.reference().float()
    train_reinforce(policy, task, steps=2, group_size=4, lr=0.1, generator=generator())
    assert policy.table.dtype == torch.float32 and policy.table.isfinite().all()


def test_reinforce_refuses_a_baseline_of_another_shape(train_reinforce=train_reinforce):
    task = random_task(3, 2, 1, seed=1)
    for wrong in (lambda s: s.mean(), lambda s: s.mean(1), lambda s: s.mean(1, keepdim=True)):
        call = lambda b=wrong: train_reinforce(  # noqa: E731
            task.reference(), task, steps=1, group_size=4, lr=0.1, generator=generator(), baseline=b
        )
        raises(ValueError, call, "baseline", "(1, 4)")


class NanGradient(TabularPolicy):
    """Finite logits whose gradient is 0 * inf, once ``when`` forward passes with gradient have gone by."""

    def __init__(self, task, when):
        super().__init__(task.vocab_size, task.max_length, len(task.scores), task.ref_table)
        self.calls, self.when = 0, when

    def unembed(self, hidden):
        logits = super().unembed(hidden)
        self.calls += torch.is_grad_enabled()
        return logits + (0 * (logits - logits.detach()).abs().sqrt() if self.calls >= self.when else 0)


def test_reinforce_stops_before_the_update_and_names_step_and_quantity(train_reinforce=train_reinforce):
    def stops(task, policy, step, quantity):
        before, settings = policy.table.detach().clone(), {"steps": 5, "group_size": 4, "lr": 0.0}
        call = lambda: train_reinforce(policy, task, generator=generator(), **settings)  # noqa: E731
        raises(FloatingPointError, call, f"step {step}", quantity)
        assert policy.table.detach().equal(before)

    for junk in (float("nan"), float("inf")):
        task = random_task(3, 2, 2, seed=1)
        task.scores.fill_(junk)
        stops(task, task.reference(), 0, "score")
    task = random_task(3, 2, 2, seed=1)
    policy = task.reference()
    task.ref_table[..., 0] = -float("inf")  # the reference lacks a token that the policy samples
    stops(task, policy, 0, "loss")
    task = random_task(3, 2, 2, seed=1)
    for when in (1, 3):
        stops(task, NanGradient(task, when), when - 1, "gradient")


def test_reinforce_without_a_penalty_still_reports_the_divergence(train_reinforce=train_reinforce):
    task, seen = dataclasses.replace(random_task(3, 3, 2, seed=2), beta=0.0), []
    train = with_sampler(train_reinforce, every_response_once(task))
    train(
        uniform(task), task, steps=1, group_size=27, lr=1e-9, generator=generator(), on_step=lambda _, m: seen.append(m)
    )
    ref_logprobs, logprobs = (all_logprobs(p, task).detach() for p in (task.reference(), uniform(task)))
    close(f64(seen[0]["objective/kl"]), (logprobs.exp() * (logprobs - ref_logprobs)).sum(1).mean())


def test_gradient_of_is_one_vector_with_every_gradient_there_is(gradient_of=gradient_of):
    module = torch.nn.ModuleList([torch.nn.Linear(2, 1), torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)])
    module[0].weight.grad = torch.tensor([[1.0, float("nan")]])
    module[1].bias.grad = torch.tensor([3.0])
    assert str(gradient_of(module).tolist()) == "[1.0, nan, 3.0]"


# --- PPO ---------------------------------------------------------------------------------------------------------

PLAIN = {"whiten_advantages": "no", "cliprange_value": None, "num_ppo_epochs": 1, "max_grad_norm": math.inf}


def quarters(task, seed=0):
    """A policy over three tokens with probabilities 1/2, 1/4, 1/4 in an order of its own after every prefix."""
    p = f64([0.5, 0.25, 0.25])[normal(*task.ref_table.shape, seed=seed).argsort(-1)]
    return TabularPolicy(task.vocab_size, task.max_length, len(task.scores), p.log())


def as_often_as_likely(task, policy):
    """In place of the sampler: every response 4^T times its probability, so that a mean over the list is exact."""
    copies = (all_logprobs(policy, task).detach().exp() * 4**task.max_length).round().long()
    assert (copies.sum(1) == 4**task.max_length).all()

    def listing(policy, prompts, max_length, *, generator, eos_id):
        rows = torch.cat([torch.arange(len(n)).repeat_interleave(n) for n in copies])
        tokens, mask = task.tokens[rows], task.response_mask[rows]
        with torch.no_grad():
            logprobs = torch.where(mask, response_logprobs(policy, prompts, tokens), 0.0)
        return Rollout(prompts, tokens, mask, logprobs, logprobs)

    return listing


def world(eos_id=None, seed=2, **changes):
    """Three tokens, responses of up to three, two prompts; the policy that the list was made for, and its values."""
    task = random_task(3, 3, 2, eos_id=eos_id, seed=seed, **changes)
    policy = quarters(task)
    return task, policy, TabularValue(policy)


def mean_length(task, policy):
    return (all_logprobs(policy, task).detach().exp() * task.response_mask.sum(1)).sum(1).mean()


def on_the_list(train_ppo, task, policy, value, *, steps=1, **settings):
    """Train on the whole list; the keywords of PPOConfig and of the loop together."""
    loop = {"kl_controller", "pretraining", "ptx_coef", "on_step", "checkpoint", "save_every"}
    config = PPOConfig(**PLAIN | {"lr": 1e-3} | {k: v for k, v in settings.items() if k not in loop})
    train = with_sampler(train_ppo, as_often_as_likely(task, policy))
    rest = {k: v for k, v in settings.items() if k in loop}
    rest = {"group_size": 4**task.max_length, "steps": steps, "config": config} | rest
    return train(policy, value, task, generator=generator(), **rest)


def prefixes_of(task, row):
    """The response so far, before each of its tokens."""
    said = task.tokens[row][task.response_mask[row]].tolist()
    return [tuple(said[:t]) for t in range(len(said))]


def value_at(value, prompt, prefix):
    return value.values(torch.tensor([[prompt, *prefix]]))[0, -1]


def exact_values(task, policy):
    """V of every prompt and prefix: the mean, over all that may follow, of score minus beta times later log-ratios."""
    reference, found = task.reference(), {}
    with torch.no_grad():
        chances = all_logprobs(policy, task).exp()
        for prompt in range(len(task.scores)):
            prompts = torch.full((len(task.tokens), 1), prompt)
            p, q = (response_logprobs(m, prompts, task.tokens) for m in (policy, reference))
            penalties = torch.where(task.response_mask, task.beta * (p - q), 0.0)
            for row in range(len(task.tokens)):
                for t, prefix in enumerate(prefixes_of(task, row)):
                    worth = task.scores[prompt, row] - penalties[row, t:].sum()
                    total = found.setdefault((prompt, prefix), [0.0, 0.0])
                    total[0] += chances[prompt, row] * worth
                    total[1] += chances[prompt, row]
    return {key: (worth / chance).item() for key, (worth, chance) in found.items()}


def with_values(policy, numbers):
    """A value function that holds given numbers, by (prompt, prefix)."""
    value = TabularValue(policy)
    for (prompt, prefix), number in numbers.items():
        row = policy.prefixes(torch.tensor([[prompt, *prefix]]))[0, -1]
        value.table.data[prompt, row] = number
    return value


def test_first_gradient_of_ppo_is_the_exact_one_whatever_the_values(train_ppo=train_ppo):
    """With lam = 1 a value is a baseline: over the whole list it drops out, to 1e-10, and ratio, clip and old values
    have no effect yet. The loss is a mean over tokens, so the gradient is that of J divided by the mean length."""
    for eos_id in (None, 0):
        for spread, beta in ((0.0, 0.2), (0.0, 1.5), (2.0, 0.2)):
            task, policy, value = world(eos_id, beta=beta)
            value.table.data = spread * normal(*value.table.shape)
            expected = exact_gradient(task, policy)
            on_the_list(train_ppo, task, policy, value, lam=1.0, vf_coef=0.7)
            close(-policy.table.grad * mean_length(task, quarters(task)), expected, rtol=1e-10, atol=1e-10)


def test_with_exact_values_the_first_gradient_is_exact_for_every_lam(train_ppo=train_ppo):
    """GAE is unbiased for any lam where the values are right; with values of 0 and lam = 0 it is not."""
    for eos_id in (None, 0):
        for lam in (0.0, 0.6, 1.0):
            task, policy, _ = world(eos_id)
            value = with_values(policy, exact_values(task, policy))
            expected = exact_gradient(task, policy)
            on_the_list(train_ppo, task, policy, value, lam=lam)
            close(-policy.table.grad * mean_length(task, quarters(task)), expected, rtol=1e-10, atol=1e-10)
    task, policy, value = world()
    on_the_list(train_ppo, task, policy, value, lam=0.0)
    assert (-policy.table.grad * 3 - expected).norm() > 0.1 * expected.norm()


def slow_advantages(task, policy, value, prompt, row, gamma, lam):
    """Of one response: every delta, and their discounted sums, written out."""
    tokens, prefixes = task.tokens[row].tolist(), prefixes_of(task, row)
    end, reference = len(prefixes) - 1, task.reference()
    said = [torch.tensor([[prompt, *prefix]]) for prefix in prefixes]
    ratio = [(policy.logits(x).log_softmax(-1) - reference.logits(x).log_softmax(-1))[0, -1] for x in said]
    values = [value_at(value, prompt, prefix).item() for prefix in prefixes] + [0.0]
    rewards = [-task.beta * ratio[t][tokens[t]].item() for t in range(end + 1)]
    rewards[end] += task.scores[prompt, row].item()
    deltas = [rewards[t] + gamma * values[t + 1] - values[t] for t in range(end + 1)]
    return [sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, end + 1)) for t in range(end + 1)], values


def test_first_gradients_of_ppo_are_those_of_the_sum_over_every_response(train_ppo=train_ppo):
    """Policy, values and entropy bonus, with any gamma and lam, against sums over the list with its probabilities."""
    cases = [(1.0, 0.5, 0.3, 0.0), (0.9, 1.0, 0.3, 0.2), (0.7, 0.0, 1.0, 0.0), (0.0, 1.0, 0.0, 0.5)]
    for eos_id, (gamma, lam, vf_coef, ent_coef) in [(e, c) for e in (None, 0) for c in cases]:
        task, policy, value = world(eos_id)
        value.table.data = normal(*value.table.shape, seed=3)
        chances, total = all_logprobs(policy, task).detach().exp() / len(task.scores), 0.0
        loss = {"policy": 0.0, "value": 0.0, "entropy": 0.0}
        for prompt in range(len(task.scores)):
            for row in range(len(task.tokens)):
                chance = chances[prompt, row]
                advantages, values = slow_advantages(task, policy, value, prompt, row, gamma, lam)
                for t, prefix in enumerate(prefixes_of(task, row)):
                    logprobs = policy.logits(torch.tensor([[prompt, *prefix]]))[0, -1].log_softmax(-1)
                    loss["policy"] -= chance * advantages[t] * logprobs[task.tokens[row, t]]
                    error = value_at(value, prompt, prefix) - (advantages[t] + values[t])
                    loss["value"] += chance * 0.5 * error.square()
                    loss["entropy"] -= chance * (logprobs.exp() * logprobs).sum()
                    total += chance
        loss["policy"] = loss["policy"] - ent_coef * loss["entropy"]
        expected = [
            x / total
            for x in torch.autograd.grad(loss["policy"] + vf_coef * loss["value"], [policy.table, value.table])
        ]
        history = on_the_list(train_ppo, task, policy, value, gamma=gamma, lam=lam, vf_coef=vf_coef, ent_coef=ent_coef)
        close(policy.table.grad, expected[0], rtol=1e-10, atol=1e-12)
        close(value.table.grad, expected[1], rtol=1e-10, atol=1e-12)
        close(f64(history[0]["loss/value_avg"]), loss["value"].detach() / total)
        close(f64(history[0]["policy/entropy_avg"]), loss["entropy"].detach() / total)
        norm = torch.cat([x.flatten() for x in expected]).norm()
        close(f64(history[0]["grad_norm"]), norm)


def test_the_first_update_finds_the_policy_that_sampled(train_ppo=train_ppo):
    """Ratio 1, nothing clipped, no divergence; the policy loss is minus the mean advantage, 0 where it was whitened."""
    for whitened in ("no", "batch", "minibatch"):
        task, policy, value = world(eos_id=0)
        (row,) = on_the_list(train_ppo, task, policy, value, lam=1.0, whiten_advantages=whitened)
        close(f64([row["val/ratio"], row["policy/clipfrac_avg"]]), f64([1.0, 0.0]))
        assert abs(row["policy/approxkl_avg"]) < 1e-12 and row["updates"] == 1
        numbers = exact_values(task, quarters(task))  # with values of 0 the mean advantage after a prefix is its value
        chances = {}
        for prompt, p in enumerate(all_logprobs(quarters(task), task).detach().exp()):
            for i, chance in enumerate(p.tolist()):
                for prefix in prefixes_of(task, i):
                    chances[prompt, prefix] = chances.get((prompt, prefix), 0.0) + chance
        mean = sum(chances[key] * numbers[key] for key in chances) / sum(chances.values())
        assert abs(mean) > 0.02
        close(f64(row["loss/policy_avg"]), f64(-mean if whitened == "no" else 0.0), atol=1e-10, rtol=1e-7)


def fraction(task, policy):
    """How much of the way from the reference to the optimum, exactly."""
    ref_logprobs = all_logprobs(task.reference(), task).detach()
    start = objective(ref_logprobs, ref_logprobs, task.scores, task.beta).mean()
    best = optimal_value(ref_logprobs, task.scores, task.beta).mean()
    reached = objective(all_logprobs(policy, task).detach(), ref_logprobs, task.scores, task.beta).mean()
    return ((reached - start) / (best - start)).item()


CLIMB = PPOConfig(lr=0.05, vf_coef=0.5, num_ppo_epochs=4, num_mini_batches=2, anneal=True)


def test_pretraining_gradients_are_added_with_their_weight(train_ppo=train_ppo):
    """All rows alike, so that every draw is the same; the likelihood is of the response, per token."""
    prompt, response = torch.tensor([[1]]), torch.tensor([[2, 0, 1]])
    found = {}
    for weight in (0.0, 0.5):
        task, policy, value = world()
        nll = -response_logprobs(policy, prompt, response).mean()
        (slope,) = torch.autograd.grad(nll, policy.table)
        on_the_list(
            train_ppo, task, policy, value, pretraining=(prompt.repeat(5, 1), response.repeat(5, 1)), ptx_coef=weight
        )
        found[weight] = policy.table.grad
    close(found[0.5] - found[0.0], 0.5 * slope)
    assert slope.norm() > 0.1


def test_a_weight_of_pretraining_needs_data_and_is_not_negative(train_ppo=train_ppo):
    task = random_task(3, 2, 1, seed=1)
    data = task.prompts, task.tokens[:1]
    for wrong in ({"ptx_coef": 0.5}, {"pretraining": data, "ptx_coef": -0.5}):
        policy = task.reference()
        call = lambda p=policy, w=wrong: train_ppo(  # noqa: E731
            p, TabularValue(p), task, steps=1, generator=generator(), **w
        )
        raises(ValueError, call, "ptx_coef")


def test_pretraining_draws_as_many_rows_as_the_minibatch_has_and_ignores_padding(train_ppo=train_ppo):
    task, seen = random_task(3, 3, 2, seed=2), []

    class Watching(TabularPolicy):
        def unembed(self, hidden):
            seen.append((len(hidden), torch.is_grad_enabled()))
            return super().unembed(hidden)

    policy = Watching(3, 3, 2, task.ref_table)
    data = torch.zeros(9, 1, dtype=torch.long), torch.zeros(9, 3, dtype=torch.long)
    config = PPOConfig(num_ppo_epochs=1, num_mini_batches=2)
    settings = {"steps": 1, "group_size": 5, "config": config, "generator": generator()}
    train_ppo(policy, TabularValue(policy), task, **settings, pretraining=data, ptx_coef=1.0)
    assert [count for count, trained in seen if trained] == [5, 5, 5, 5]  # of 10 rows, two minibatches, each twice
    x, y = torch.tensor([[5], [6]]), torch.tensor([[3, 1], [4, 1]])
    weights = []
    for responses in (y, torch.nn.functional.pad(y, (0, 2))):
        model, judged = language_model(), words()
        train_ppo(
            model,
            ScalarModel(model, 0.0),
            judged,
            steps=2,
            generator=generator(),
            pretraining=(x, responses),
            ptx_coef=1.0,
        )
        weights.append(gradient_of(model))
    close(*weights)


def test_the_controller_sets_the_penalty_and_is_shown_what_was_measured(train_ppo=train_ppo):
    task, policy, value = world(beta=0.2)
    expected = exact_gradient(dataclasses.replace(task, beta=0.9), policy)
    controller = AdaptiveKLController(0.9, 0.05, 1000)
    on_the_list(train_ppo, task, policy, value, lam=1.0, kl_controller=controller)
    close(-policy.table.grad * 3, expected, rtol=1e-10, atol=1e-10)
    task, policy, value = world(eos_id=0)
    controller, twin = AdaptiveKLController(0.5, 0.3, 1000), AdaptiveKLController(0.5, 0.3, 1000)
    history = on_the_list(train_ppo, task, policy, value, steps=4, lr=0.1, kl_controller=controller)
    for row in history:
        assert row["objective/kl_coef"] == twin.kl_coef
        twin.update(row["objective/kl"], 128)  # responses of a step
        close(
            f64(row["objective/rlhf_reward"]),
            f64(row["objective/scores"] - row["objective/kl_coef"] * row["objective/kl"]),
        )
    assert controller.kl_coef == twin.kl_coef != 0.5


def test_ppo_reports_every_step_under_the_usual_names(train_ppo=train_ppo):
    task, policy, value = world(eos_id=0, beta=0.5)
    ref_logprobs, logprobs = all_logprobs(task.reference(), task).detach(), all_logprobs(policy, task).detach()
    chances = logprobs.exp()
    mean = lambda x: (chances * x).sum(1).mean().item()  # noqa: E731
    seen = []
    history = on_the_list(train_ppo, task, policy, value, steps=2, lr=1e-9, on_step=lambda *a: seen.append(a))
    assert seen == list(enumerate(history))
    ended = ((task.tokens == 0) & task.response_mask).any(1).double()
    for step, row in enumerate(history):
        exact = {
            "objective/scores": mean(task.scores),
            "objective/kl": mean(logprobs - ref_logprobs),
            "objective/rlhf_reward": mean(task.scores - 0.5 * (logprobs - ref_logprobs)),
            "objective/kl_coef": 0.5,
            "val/num_eos_tokens": mean(ended),
            "val/length": mean(task.response_mask.sum(1)),
            "episode": 128.0 * (step + 1),
            "lr": 1e-9,
        }
        assert 0.5 < exact["val/num_eos_tokens"] < 0.95
        close(
            {name: f64(row[name]) for name in exact}, {name: f64(x) for name, x in exact.items()}, atol=1e-6, rtol=1e-6
        )
        more = {"loss/policy_avg", "loss/value_avg", "policy/entropy_avg", "policy/approxkl_avg", "policy/clipfrac_avg"}
        assert row.keys() == exact.keys() | more | {"val/ratio", "grad_norm", "updates"}
        assert all(type(x) is float for x in row.values()) and next(iter(row)) == "objective/scores"
    task, policy, value = world()
    assert on_the_list(train_ppo, task, policy, value)[0]["val/num_eos_tokens"] == 1.0


def test_the_learning_rate_falls_to_0_if_asked(train_ppo=train_ppo):
    """Adam's steps are as long as the learning rate where a gradient keeps its sign: the values have far to go."""
    for anneal, scales in ((True, [1, 0.75, 0.5, 0.25]), (False, [1, 1, 1, 1])):
        task, policy, value = world()
        task.scores.add_(50)
        tables = [value.table.detach().clone()]

        def keep(*_, tables=tables, value=value):
            tables.append(value.table.detach().clone())

        settings = {"lr": 1e-3, "vf_coef": 1.0, "anneal": anneal, "on_step": keep}
        history = on_the_list(train_ppo, task, policy, value, steps=4, **settings)
        close(f64([row["lr"] for row in history]), 1e-3 * f64(scales))
        close(torch.stack(tables).diff(dim=0).abs().amax((1, 2)), 1e-3 * f64(scales), rtol=0.01, atol=0)


def test_settings_of_the_update_reach_it(train_ppo=train_ppo):
    for settings, updates in (
        ({}, 1),
        ({"num_ppo_epochs": 3, "num_mini_batches": 4}, 12),
        ({"num_ppo_epochs": 5, "lr": 0.1, "target_kl": 1e-4}, 1),
    ):
        task, policy, value = world()
        (row,) = on_the_list(train_ppo, task, policy, value, **settings)
        assert row["updates"] == updates
    task, policy, value = world()
    before = policy.table.detach().clone()
    on_the_list(train_ppo, task, policy, value, max_grad_norm=1e-9, adam_eps=1e-3, lr=1.0)
    assert 0 < (policy.table.detach() - before).abs().max() < 1e-5  # a short gradient beside Adam's epsilon


class Watched:
    """A task that notes what it is asked and given."""

    def __init__(self, task, prompts=None):
        self.task, self.own, self.prompts, self.given = task, task.reference(), prompts, []

    def __getattr__(self, name):
        return getattr(self.task, name)

    def draw_prompts(self, generator):
        return self.task.draw_prompts(generator) if self.prompts is None else self.prompts

    def reference(self):
        return self.own

    def score(self, rollout):
        self.given.append(rollout.prompts[:, 0].tolist())
        assert rollout.tokens.shape[1] == self.task.max_length, "cut before it was judged"
        return self.task.score(rollout)


def test_groups_stay_together_the_judge_sees_whole_rows_and_the_reference_stays(
    train_ppo=train_ppo, train_reinforce=train_reinforce
):
    for loop in ("ppo", "reinforce"):
        task = Watched(random_task(3, 6, 3, eos_id=0, seed=1), torch.tensor([[2], [0]]))
        task.own.table.data[..., 0] += 3.0  # most responses end at once
        before, policy = task.own.table.detach().clone(), copy.deepcopy(task.own)
        if loop == "ppo":
            train_ppo(policy, TabularValue(policy), task, steps=3, group_size=2, config=CLIMB, generator=generator())
        else:
            train_reinforce(policy, task, steps=3, group_size=2, lr=0.1, generator=generator())
        assert task.given == [[2, 2, 0, 0]] * 3
        assert task.own.table.detach().equal(before) and task.own.table.grad is None
        assert not policy.table.detach().equal(before)


def test_ppo_repeats_with_its_generator(train_ppo=train_ppo):
    task, before = random_task(3, 3, 2, seed=1), torch.get_rng_state()
    found = []
    for seed in (1, 1, 2):
        policy = task.reference()
        value = TabularValue(policy)
        pretraining = torch.tensor([[0], [1]]), torch.tensor([[0, 1, 2], [2, 2, 2]])
        settings = {"steps": 3, "group_size": 4, "config": CLIMB, "pretraining": pretraining, "ptx_coef": 0.1}
        history = train_ppo(policy, value, task, generator=generator(seed), **settings)
        found.append((policy.table.tolist(), value.table.tolist(), history))
    assert found[0] == found[1] != found[2]
    assert before.equal(torch.get_rng_state())


def test_ppo_runs_in_single_precision_on_double_scores(train_ppo=train_ppo):
    task = random_task(3, 2, 2, eos_id=0, seed=1)
    policy = task.reference().float()
    value = TabularValue(policy)
    train_ppo(policy, value, task, steps=2, group_size=4, generator=generator())
    assert policy.table.dtype == value.table.dtype == torch.float32
    assert policy.table.isfinite().all() and (value.table != 0).any()


def test_ppo_stops_before_the_update_and_names_step_and_quantity(train_ppo=train_ppo):
    def stops(task, policy, value, step, quantity):
        before, values = policy.table.detach().clone(), value.table.detach().clone()
        config = PPOConfig(num_ppo_epochs=1, lr=1e-300)
        call = lambda: train_ppo(policy, value, task, steps=5, group_size=4, config=config, generator=generator())  # noqa: E731
        raises(FloatingPointError, call, f"step {step}", quantity)
        close(policy.table.detach(), before, rtol=0, atol=1e-250)
        close(value.table.detach(), values, rtol=0, atol=1e-250, equal_nan=True)

    for junk in (float("nan"), float("inf")):
        task = random_task(3, 2, 2, seed=1)
        task.scores.fill_(junk)
        stops(task, (policy := task.reference()), TabularValue(policy), 0, "score")
    task = random_task(3, 2, 2, seed=1)
    policy = task.reference()
    value = TabularValue(policy)
    value.table.data[0, 0] = math.nan
    stops(task, policy, value, 0, "loss")
    for when in (1, 3):
        stops(task, (policy := NanGradient(task, when)), TabularValue(policy), when - 1, "gradient")


# --- PPO on a transformer ------------------------------------------------------------------------------------------


def language_model(dropout=0.0, spread=0.3):
    torch.manual_seed(3)
    model = GPT(GPTConfig(8, 12, 8, 1, 2, dropout=dropout, pad_id=0))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=spread)
    return model


@dataclasses.dataclass
class Words:
    """Prompts of one or two tokens, responses that end with 1, worth as many 3s as they have."""

    model: GPT
    beta: float = 0.1
    max_length: int = 4
    eos_id: int = 1
    prompts: int = 3

    def draw_prompts(self, generator):
        rows = torch.randint(2, 8, (self.prompts, 2), generator=generator)
        rows[0, 0] = 0
        return rows

    def score(self, rollout):
        return (rollout.tokens == 3).double().sum(1)

    def reference(self):
        return self.model


def words(**changes):
    return Words(language_model(), **changes)


def test_a_shared_trunk_predicts_as_a_copy_does_and_receives_both_gradients(train_ppo=train_ppo):
    found = {}
    for shared in (True, False):
        policy = language_model().double()
        value = ScalarModel(policy if shared else copy.deepcopy(policy), 0.0)
        value.head.weight.data = 0.5 * normal(1, 8)
        config = PPOConfig(num_ppo_epochs=1, vf_coef=0.8, max_grad_norm=math.inf)
        task = words(prompts=6)
        (row,) = train_ppo(policy, value, task, steps=1, group_size=2, config=config, generator=generator())
        found[shared] = row, policy, value
    (row, policy, value), (other, alone, apart) = found[True], found[False]
    same = [name for name in row if name != "grad_norm"]
    close({name: f64(row[name]) for name in same}, {name: f64(other[name]) for name in same})
    for together, a, b in zip(policy.parameters(), alone.parameters(), apart.trunk.parameters(), strict=True):
        grads = [torch.zeros_like(x) if x.grad is None else x.grad for x in (together, a, b)]
        close(grads[0], grads[1] + grads[2])
    assert all(
        (sum(p.grad.square().sum() for p in m.parameters() if p.grad is not None) > 0) for m in (alone, apart.trunk)
    )
    close(value.head.weight.grad, apart.head.weight.grad)


def test_dropout_is_off_so_that_the_first_ratio_is_1(train_ppo=train_ppo):
    task, policy = words(prompts=16), language_model(dropout=0.5)
    value = ScalarModel(copy.deepcopy(policy), 0.0)
    policy.train(), value.train(), task.model.train()
    config = PPOConfig(num_ppo_epochs=1)
    (row,) = train_ppo(policy, value, task, steps=1, config=config, generator=generator())
    assert abs(row["val/ratio"] - 1) < 1e-4 and row["policy/approxkl_avg"] < 1e-6
    assert abs(row["objective/kl"]) < 1e-4  # the policy is the reference
    assert not policy.training and not value.training


class Stop(Exception):
    pass


class Sensitive(AdaptiveKLController):
    """Moves with every bit of what it is shown: nothing is clipped."""

    def update(self, kl, n_steps):
        self.kl_coef *= math.exp(0.1 * kl * n_steps / self.horizon)


def killed_run(train_ppo, kind, path, stop=None, **changes):
    """Four steps from the same start; ``stop``: dies after that step, without a word to the file."""

    def on_step(step, _):
        if step == stop:
            raise Stop

    if kind == "tabular":
        task = random_task(3, 3, 2, eos_id=0, seed=1)
        policy = task.reference()
        value, pretraining = TabularValue(policy), (torch.tensor([[0], [1]]), torch.tensor([[0, 1, 2], [2, 2, 2]]))
    else:
        task, policy = words(), language_model()
        value, pretraining = ScalarModel(policy, 0.0), (torch.tensor([[2], [3]]), torch.tensor([[4, 1], [1, 0]]))
    config = PPOConfig(num_mini_batches=2, anneal=True, max_grad_norm=changes.pop("max_grad_norm", math.inf))
    controller = Sensitive(0.3, 0.1, 20)
    settings = {"steps": 4, "group_size": 2, "config": config, "kl_controller": controller, "save_every": 2}
    settings |= {"pretraining": pretraining, "ptx_coef": 0.1, "checkpoint": path, "on_step": on_step}
    history = train_ppo(policy, value, task, generator=generator(), **settings | changes)
    return [p.detach().clone() for p in (*policy.parameters(), *value.parameters())], history, controller.kl_coef


def test_ppo_stopped_anywhere_ends_with_the_same_weights(train_ppo=train_ppo):
    """Bit for bit, metrics and controller too, with a shared trunk in single precision and in the exact world."""
    for kind in ("tabular", "transformer"):
        with tempfile.TemporaryDirectory() as folder:
            whole = killed_run(train_ppo, kind, None)
            assert [row["episode"] for row in whole[1]] == [
                4.0 * s if kind == "tabular" else 6.0 * s for s in (1, 2, 3, 4)
            ]
            for stop in range(4):
                path = Path(folder) / f"{stop}"
                try:
                    killed_run(train_ppo, kind, path, stop)
                    raise AssertionError(f"on_step was not called with step {stop}")
                except Stop:
                    pass
                assert path.exists() == (stop >= 2)
                again = killed_run(train_ppo, kind, path)
                assert all(a.equal(b) for a, b in zip(again[0], whole[0], strict=True)), (kind, stop)
                assert again[1:] == whole[1:], (kind, stop)
            assert killed_run(train_ppo, kind, path)[1:] == whole[1:]  # it was finished: read, not repeated
            for changes in (
                {"steps": 5},
                {"group_size": 3},
                {"ptx_coef": 0.2},
                {"kl_controller": None},
                {"max_grad_norm": 1.0},
            ):
                call = lambda c=changes, p=path, k=kind: killed_run(train_ppo, k, p, **c)  # noqa: E731
                raises(ValueError, call, "another recipe", next(iter(changes)))


# --- the slowest last -----------------------------------------------------------------------------------------------


def test_later_updates_stay_near_the_policy_that_sampled_unless_nothing_is_clipped(train_ppo=train_ppo):
    """Of two answers each half as likely: one is worth more, so both ratios leave the interval, and go no further."""

    def ratios(**settings):
        task = random_task(2, 1, 2, seed=1)
        policy = uniform(task)
        settings |= {"num_ppo_epochs": 200, "lr": 0.002, "vf_coef": 0.0, "lam": 1.0}
        (row,) = on_the_list(train_ppo, task, policy, TabularValue(policy), **settings)
        return 2 * policy.table.detach().softmax(-1).amax(), row

    (clipped, row), (free, free_row) = ratios(), ratios(cliprange=1e9)
    assert 1.2 < clipped < 1.25 and free > 1.3
    assert 0.2 < row["policy/clipfrac_avg"] < 0.8 and free_row["policy/clipfrac_avg"] == 0
    assert 0 < row["policy/approxkl_avg"] < free_row["policy/approxkl_avg"] and row["updates"] == 200


def test_values_move_no_further_than_their_clip_range_in_one_batch(train_ppo=train_ppo):
    for cliprange_value, low, high in ((0.2, 0.19, 0.26), (None, 0.35, 9.0)):
        task, policy, value = world(beta=1.5)
        task.scores.add_(5.0)
        settings = {"num_ppo_epochs": 100, "lr": 0.004, "vf_coef": 1.0, "lam": 1.0}
        on_the_list(train_ppo, task, policy, value, cliprange_value=cliprange_value, **settings)
        assert low < value.table.detach().max() < high


def test_clip_ranges_fall_to_0_if_asked(train_ppo=train_ppo):
    """How far the ratios of two answers get in every step, from equal chances, to which they are put back."""
    for anneal, scales in ((True, [1, 0.75, 0.5, 0.25]), (False, [1, 1, 1, 1])):
        task, moved = random_task(2, 1, 1, seed=1), []
        policy = uniform(task)

        def put_back(*_, moved=moved, policy=policy):
            moved.append(1 - 2 * policy.table.detach().softmax(-1).min().item())
            policy.table.data.zero_()

        settings = {"num_ppo_epochs": 150, "lr": 0.004, "vf_coef": 0.0, "anneal": anneal, "on_step": put_back}
        on_the_list(train_ppo, task, policy, TabularValue(policy), steps=4, **settings)
        assert all(0.2 * x < y < 0.2 * x + 0.07 for x, y in zip(scales, moved, strict=True)), moved


def test_ppo_climbs_to_the_optimum_further_than_reinforce_on_as_many_samples(train_ppo=train_ppo):
    task = random_task(3, 3, 2, eos_id=0, seed=1)
    policy, other = task.reference(), task.reference()
    train_ppo(policy, TabularValue(policy), task, steps=60, group_size=32, config=CLIMB, generator=generator())
    settings = {"steps": 60, "group_size": 32, "lr": 0.1, "baseline": leave_one_out_baseline}
    train_reinforce(other, task, generator=generator(), **settings)
    assert fraction(task, policy) > 0.98
    assert 0.5 < fraction(task, other) < fraction(task, policy)


def test_values_converge_to_the_exact_ones(train_ppo=train_ppo):
    """While the policy stands still: with returns alone (lam = 1), and with the values' own later estimates."""
    for eos_id, lam in ((None, 1.0), (0, 1.0), (0, 0.3)):
        task, policy, value = world(eos_id)
        policy.requires_grad_(False)
        settings = {"steps": 60, "num_ppo_epochs": 4, "lr": 0.1, "vf_coef": 1.0, "lam": lam, "anneal": True}
        on_the_list(train_ppo, task, policy, value, **settings)
        exact = exact_values(task, policy)
        found = {key: value_at(value, *key).item() for key in exact}
        close(f64(list(found.values())), f64(list(exact.values())), atol=0.01, rtol=0)


def _train(*changes):
    return edited(train_reinforce, *changes)


def _ppo(*changes):
    return edited(train_ppo, *changes)


SHAPED = "kl_shaped_rewards(scores, rollout.logprobs, ref_logprobs, mask, kl_coef)"
OLD_VALUES = "response_values(value, prompts, tokens)"
SHOWN = 'kl_controller.update(run.history[-1]["objective/kl"], len(mask))'
REPLAYED = 'kl_controller.update(row["objective/kl"], int(row["episode"] - before))'
PLANTED = {
    "train_reinforce": {
        "mean over tokens": _train(('"sequence-sum"', '"token-mean"')),
        "mean per response": _train(('"sequence-sum"', '"sequence-mean"')),
        "wrong sign": _train(("loss = aggregate", "loss = -aggregate")),
        "no kl penalty": _train(("mask, task.beta)", "mask, 0.0)")),
        "penalty added": _train(("(scores, rollout.logprobs, ref_logprobs", "(scores, ref_logprobs, rollout.logprobs")),
        "reference follows the policy": _train(
            (
                "response_logprobs(reference, prompts, rollout.tokens)",
                "response_logprobs(policy, prompts, rollout.tokens)",
            )
        ),
        "baseline added": _train(("advantages - baselines", "advantages + baselines")),
        "baseline shuffled between prompts": _train(("baselines.reshape(-1, 1)", "baselines.T.reshape(-1, 1) * 3")),
        "baseline of another shape broadcast": _train(
            ("            require_same_shape(totals=totals, baseline=baselines)\n", "")
        ),
        "rewards so far, not to go": _train(("rewards_to_go(rewards, mask)", "rewards.cumsum(1)")),
        "reward of the token alone": _train(("rewards_to_go(rewards, mask)", "rewards")),
        "gradients pile up": _train(
            ("        optimizer.zero_grad()\n", ""),
            ("optimizer.step()", "optimizer.step(); optimizer.param_groups[0]['lr'] *= -1"),
        ),
        "scores of trimmed responses": _train(("task.score(rollout)", "task.score(rollout.trimmed())")),
        "padding counts": _train(("mask = rollout.response_mask", "mask = torch.ones_like(rollout.response_mask)")),
        "score not checked": _train(('        require_finite("score", scores, step)\n', "")),
        "loss not checked": _train(('        require_finite("loss", loss, step)\n', "")),
        "gradient not checked": _train(('        require_finite("gradient", gradient_of(policy), step)\n', "")),
        "step counted from 1": _train(("for step in range(steps)", "for step in range(1, steps + 1)")),
        "kl reported in reward units": _train(("ref_logprobs, mask).mean()", "ref_logprobs, mask).mean() * task.beta")),
        "global generator": _train(("generator=generator, eos_id", "generator=torch.default_generator, eos_id")),
        "prompts and groups crossed": _train(
            ("to(device).repeat_interleave(group_size, dim=0)", "to(device).repeat(group_size, 1)")
        ),
    },
    "train_ppo": {
        "score on every token": _ppo((SHAPED, f"{SHAPED} + torch.where(mask, scores[:, None], 0.0) / 2")),
        "penalty added": _ppo(
            (
                "kl_shaped_rewards(scores, rollout.logprobs, ref_logprobs",
                "kl_shaped_rewards(scores, ref_logprobs, rollout.logprobs",
            )
        ),
        "no penalty": _ppo(("mask, kl_coef)", "mask, 0.0)")),
        "the task's beta beside a controller": _ppo(("mask, kl_coef)", "mask, task.beta)")),
        "rewards on padding": _ppo(("mask, kl_coef)", "mask | True, kl_coef)")),
        "padding counts": _ppo(
            (
                "tokens, mask = rollout.tokens, rollout.response_mask",
                "tokens, mask = rollout.tokens, rollout.response_mask | True",
            )
        ),
        "reference follows the policy": _ppo(
            ("response_logprobs(reference, prompts", "response_logprobs(policy, prompts")
        ),
        "reference is trained": _ppo(
            ('"value": value})', '"value": value, "reference": reference})'),
            (
                "ref_logprobs = response_logprobs(reference, prompts, tokens)  # (B, T)",
                "ref_logprobs = response_logprobs(reference, prompts, tokens); reference.table.data += 0.1",
            ),
        ),
        "values one position late": _ppo((OLD_VALUES, f"{OLD_VALUES}.roll(-1, 1)")),
        "values one position early": _ppo((OLD_VALUES, f"{OLD_VALUES}.roll(1, 1)")),
        "old values of 0": _ppo((OLD_VALUES, f"0 * {OLD_VALUES}")),
        "the end is bootstrapped": _ppo(
            ("lam=config.lam, mask=mask)", "lam=config.lam, mask=mask, last_values=values[:, -1])")
        ),
        "gamma ignored": _ppo(("gamma=config.gamma", "gamma=1.0")),
        "lam ignored": _ppo(("lam=config.lam", "lam=0.95")),
        "gamma and lam crossed": _ppo(("gamma=config.gamma, lam=config.lam", "gamma=config.lam, lam=config.gamma")),
        "advantages for returns": _ppo(("advantages, returns, mask)", "advantages, advantages, mask)")),
        "returns for advantages": _ppo(("advantages, returns, mask)", "returns, returns, mask)")),
        "ratio to the reference": _ppo(("Experience(rollout.logprobs,", "Experience(ref_logprobs,")),
        "prompts and groups crossed": _ppo(("repeat_interleave(group_size, dim=0)", "repeat(group_size, 1)")),
        "one response per prompt": _ppo(("repeat_interleave(group_size, dim=0)", "repeat_interleave(1, dim=0)")),
        "predicted for the first rows": _ppo(
            (
                "partial(_predict, policy, value, prompts, tokens, config.ent_coef > 0)",
                "(lambda rows: _predict(policy, value, prompts, tokens, config.ent_coef > 0, rows.sort()[0]))",
            )
        ),
        "no entropy bonus": _ppo(("config.ent_coef > 0)", "False)")),
        "rate not annealed": _ppo(("lr=config.lr * scale, step", "lr=config.lr, step")),
        "clip range not annealed": _ppo(("generator, scale, extra)", "generator, 1.0, extra)")),
        "annealed always": _ppo(("if config.anneal else 1.0", "")),
        "annealed from the end": _ppo(("1 - step / steps", "(step + 1) / steps")),
        "gradient not clipped": _ppo(("max_norm=config.max_grad_norm", "max_norm=float('inf')")),
        "Adam's own epsilon": _ppo((", eps=config.adam_eps", "")),
        "the values are not trained": _ppo(
            ("torch.optim.Adam(both.parameters()", "torch.optim.Adam(policy.parameters()")
        ),
        "the policy is not trained": _ppo(
            ("torch.optim.Adam(both.parameters()", "torch.optim.Adam(value.parameters()")
        ),
        "settings ignored": _ppo(("config or PPOConfig()", "PPOConfig()")),
        "dropout left on": _ppo(('"value": value}).eval()', '"value": value})')),
        "controller not updated": _ppo((SHOWN, "pass")),
        "controller shown another number of responses": _ppo((SHOWN, SHOWN.replace("len(mask)", "1"))),
        "controller shown the reward": _ppo((SHOWN, SHOWN.replace("objective/kl", "objective/rlhf_reward"))),
        "controller not resumed": _ppo((REPLAYED, "pass")),
        "controller resumed with all episodes": _ppo((REPLAYED, REPLAYED.replace(" - before", ""))),
        "controller shown another rounding": _ppo(
            (SHOWN, SHOWN.replace('run.history[-1]["objective/kl"]', "kl.mean().item()"))
        ),
        "generator not resumed": _ppo(("checkpoint, save_every, generator)", "checkpoint, save_every)")),
        "values not resumed": _ppo(("run = Run(both,", "run = Run(policy,")),
        "optimiser not resumed": _ppo(("[optimizer], recipe", "[], recipe")),
        "steps not in the recipe": _ppo(('"steps": steps', '"steps": 0')),
        "settings not in the recipe": _ppo(("recipe |= asdict(config) |", "recipe |=")),
        "pretraining subtracted": _ppo(("ptx_coef, generator)", "-ptx_coef, generator)")),
        "pretraining not weighted": _ppo(("ptx_coef, generator)", "1.0, generator)")),
        "pretraining forgotten": _ppo(("extra = None if pretraining is None else", "extra = None if True else")),
        "pretraining rows from the global generator": _ppo(
            ("ptx_coef, generator)", "ptx_coef, torch.default_generator)")
        ),
        "global generator": _ppo(("generator=generator, eos_id", "generator=torch.default_generator, eos_id")),
        "scores of trimmed responses": _ppo(("task.score(rollout)", "task.score(rollout.trimmed())")),
        "score not checked": _ppo(('        require_finite("score", scores, step)\n', "")),
        "kl per token": _ppo(
            (
                "sequence_kl(rollout.logprobs, ref_logprobs, mask)",
                "sequence_kl(rollout.logprobs, ref_logprobs, mask) / mask.sum(1)",
            )
        ),
        "reward without the penalty": _ppo(
            ('"objective/rlhf_reward": rewards.sum(1)', '"objective/rlhf_reward": scores')
        ),
        "length of the padded row": _ppo(('"val/length": mask.sum(1)', '"val/length": (mask | True).sum(1)')),
        "episodes of one step": _ppo(("(step + 1.0) * len(mask)", "1.0 * len(mask)")),
        "history not told": _ppo(("on_step(step, run.history[-1])", "on_step(step, {})")),
    },
    "gradient_of": {
        "first parameter only": lambda m: next(m.parameters()).grad.flatten(),
        "last gradient only": lambda m: [p.grad for p in m.parameters() if p.grad is not None][-1].flatten(),
        "the parameters": lambda m: torch.cat([p.detach().flatten() for p in m.parameters()]),
        "nan hidden": lambda m: gradient_of(m).nan_to_num(),
        "norm": lambda m: gradient_of(m).norm(),
    },
}
EXEMPT = set()
