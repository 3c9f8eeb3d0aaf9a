"""REINFORCE: its gradient is exact in expectation, it learns, and it stops at the first number that is not finite."""

import math

import torch

from planting import close, edited, raises
from rlhfkit.advantages import group_mean_baseline, leave_one_out_baseline
from rlhfkit.exact import estimator_moments, objective, optimal_value
from rlhfkit.models import TabularPolicy
from rlhfkit.sampling import all_logprobs, response_logprobs
from rlhfkit.tasks import Rollout, random_task
from rlhfkit.train_policy import gradient_of, require_finite, train_reinforce


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

    def logits(self, tokens):
        logits = super().logits(tokens)
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


def test_require_finite_names_what_step_and_value(require_finite=require_finite):
    for dtype in (torch.float32, torch.float64):
        finite = torch.tensor([[0.0, -1e30]], dtype=dtype)
        raises(ZeroDivisionError, lambda x=finite: (require_finite("loss", x, 3), 1 / 0))  # gets past the check
        for junk in ("nan", "inf", "-inf"):
            x = torch.tensor([0.0, float(junk)], dtype=dtype)
            raises(
                FloatingPointError, lambda x=x: require_finite("some gradient", x, 7), "step 7", "some gradient", junk
            )
            raises(FloatingPointError, lambda x=x: require_finite("loss", x[1], 0), "step 0", "loss", junk)


def test_gradient_of_is_one_vector_with_every_gradient_there_is(gradient_of=gradient_of):
    module = torch.nn.ModuleList([torch.nn.Linear(2, 1), torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)])
    module[0].weight.grad = torch.tensor([[1.0, float("nan")]])
    module[1].bias.grad = torch.tensor([3.0])
    assert str(gradient_of(module).tolist()) == "[1.0, nan, 3.0]"


def _train(*changes):
    return edited(train_reinforce, *changes)


PLANTED = {
    "train_reinforce": {
        "mean over tokens": _train(('"sequence-sum"', '"token-mean"')),
        "mean per response": _train(('"sequence-sum"', '"sequence-mean"')),
        "wrong sign": _train(("loss = aggregate", "loss = -aggregate")),
        "no kl penalty": _train(("mask, task.beta)", "mask, 0.0)")),
        "penalty added": _train(("rollout.logprobs, ref_logprobs, mask", "ref_logprobs, rollout.logprobs, mask")),
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
        "padding counts": _train(("mask = rollout.response_mask", "mask = torch.ones_like(rollout.response_mask)")),
        "score not checked": _train(('        require_finite("score", scores, step)\n', "")),
        "loss not checked": _train(('        require_finite("loss", loss, step)\n', "")),
        "gradient not checked": _train(('        require_finite("gradient", gradient_of(policy), step)\n', "")),
        "step counted from 1": _train(("for step in range(steps)", "for step in range(1, steps + 1)")),
        "kl reported in reward units": _train((" / task.beta", "")),
        "global generator": _train(("generator=generator, eos_id", "generator=torch.default_generator, eos_id")),
        "prompts and groups crossed": _train(
            ("task.prompts.repeat_interleave(group_size, dim=0)", "task.prompts.repeat(group_size, 1)")
        ),
    },
    "gradient_of": {
        "first parameter only": lambda m: next(m.parameters()).grad.flatten(),
        "last gradient only": lambda m: [p.grad for p in m.parameters() if p.grad is not None][-1].flatten(),
        "the parameters": lambda m: torch.cat([p.detach().flatten() for p in m.parameters()]),
        "nan hidden": lambda m: gradient_of(m).nan_to_num(),
        "norm": lambda m: gradient_of(m).norm(),
    },
    "require_finite": {
        "nan only": edited(require_finite, ("if not torch.isfinite(x).all()", "if x.isnan().any()")),
        "inf only": edited(require_finite, ("if not torch.isfinite(x).all()", "if x.isinf().any()")),
        "never": lambda quantity, x, step: None,
        "always": edited(require_finite, ("if not torch.isfinite(x).all()", "if True")),
        "ValueError": edited(require_finite, ("raise FloatingPointError", "raise ValueError")),
        "all, not any": edited(require_finite, ("if not torch.isfinite(x).all()", "if not torch.isfinite(x).any()")),
        "forgets the step": edited(require_finite, ("step {step}: ", "")),
    },
}
EXEMPT = set()
