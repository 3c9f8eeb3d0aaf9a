"""The loops on CartPole: one update against slow sums, the books of a whole run, and every row in one minibatch."""

import copy
import math
from dataclasses import replace
from unittest import mock

import pytest
import torch

from planting import close, f64, raises
from rlhfkit import ppo
from rlhfkit.control import Player, make_cartpole, mean_return
from rlhfkit.ppo import PPOConfig
from rlhfkit.train_control import (
    descend,
    flat_experience,
    train_cartpole_ppo,
    train_cartpole_reinforce,
)
from scripted_envs import FALL, Doubles, ScriptedEnvs, networks, planted, seeded, slow_advantages

# --- REINFORCE ---------------------------------------------------------------------------------------------------

SETTINGS = {"rollout_length": 9, "gamma": 0.9, "lam": 0.8, "lr": 1.0, "value_lr": 1.0, "value_steps": 1}


def one_step(train, value, **changes):
    """Minus the change of every parameter after one update by plain gradient descent with step size 1."""
    policy = networks()[0].double()
    value = None if value is None else value.double()
    nets = [policy] if value is None else [policy, value]
    before = [p.detach().clone() for net in nets for p in net.parameters()]
    with mock.patch.object(torch.optim, "Adam", torch.optim.SGD):
        train(policy, value, Doubles(), steps=1, generator=seeded(), **{**SETTINGS, **changes})
    return [b - p.detach() for b, p in zip(before, (p for net in nets for p in net.parameters()), strict=True)]


def slow_gradients(value, weigh=lambda advantages: advantages):
    """The same update with one term per step that counts, in order."""
    policy = networks()[0].double()
    rollout = Player(Doubles(), generator=seeded()).play(policy, 9)
    with torch.no_grad():
        values = torch.zeros(4, 10).double() if value is None else value(rollout.observations)
    advantages = slow_advantages(rollout, values, 0.9, 0.8)
    weights = weigh(advantages[rollout.mask])
    loss, value_loss, places = 0.0, 0.0, rollout.mask.nonzero().tolist()
    for (b, t), weight in zip(places, weights, strict=True):
        seen = rollout.observations[b, t]
        loss = loss - policy(seen).log_softmax(-1)[rollout.actions[b, t]] * weight / len(places)
        if value is not None:
            target = advantages[b, t] + values[b, t]
            value_loss = value_loss + (value(seen) - target) ** 2 / len(places)
    found = list(torch.autograd.grad(loss, list(policy.parameters())))
    return found if value is None else found + list(torch.autograd.grad(value_loss, list(value.parameters())))


def test_one_update_is_the_slow_gradient(train_cartpole_reinforce=train_cartpole_reinforce):
    """With the learned baseline, without one, and with the batch's mean for a baseline."""
    for value in (networks()[1].double(), None):
        for got, expected in zip(
            one_step(train_cartpole_reinforce, copy.deepcopy(value)), slow_gradients(value), strict=True
        ):
            close(got, expected)
    whitened = slow_gradients(None, lambda a: (a - a.mean()) / (a.var() + 1e-8).sqrt())
    for got, expected in zip(one_step(train_cartpole_reinforce, None, whiten_advantages=True), whitened, strict=True):
        close(got, expected)


def test_it_stops_at_the_first_number_that_is_not_finite(train_cartpole_reinforce=train_cartpole_reinforce):
    """Before the update: the networks keep the parameters they had."""
    policy, value = networks()

    def train(envs, value, lr=0.0):
        train_cartpole_reinforce(policy, value, envs, steps=3, rollout_length=10, generator=seeded(), lr=lr)

    raises(FloatingPointError, lambda: train(ScriptedEnvs(poison=15), value), "step 1", "reward", "nan")
    before = [p.clone() for p in policy.parameters()]
    for parameter in value.parameters():
        parameter.data.fill_(math.inf)
    raises(FloatingPointError, lambda: train(ScriptedEnvs(), value), "step 0", "policy loss")
    close(list(policy.parameters()), before)
    raises(FloatingPointError, lambda: train(ScriptedEnvs(), None, lr=math.inf), "step 1", "policy loss")


def test_descend_stops_before_it_steps(descend=descend):
    x = torch.nn.Linear(1, 1, bias=False)
    optimizer = torch.optim.SGD(x.parameters(), lr=0.5)
    x.weight.data.fill_(4.0)
    descend("toy", x, x.weight.square().sum(), optimizer, 0)
    descend("toy", x, 3 * x.weight.sum(), optimizer, 0)  # the first step's gradient is gone
    close(x.weight.data, torch.tensor([[4.0 - 0.5 * 8 - 0.5 * 3]]))
    raises(FloatingPointError, lambda: descend("toy", x, x.weight.sum() * math.nan, optimizer, 7), "step 7", "toy loss")
    x.weight.data.fill_(0.0)
    raises(FloatingPointError, lambda: descend("toy", x, x.weight.sqrt().sum(), optimizer, 8), "step 8", "toy gradient")
    close(x.weight.data, torch.zeros(1, 1))


def test_it_reports_and_stops_when_solved(train_cartpole_reinforce=train_cartpole_reinforce):
    """Episodes of one step and a reset row: 5 steps hold three or two of them, so 100 are there after 4 rollouts."""
    log = []

    def train(stop_at):
        policy, value = networks()
        envs = ScriptedEnvs([[(1, FALL)]] * 10)
        settings = {"steps": 8, "rollout_length": 5, "generator": seeded(), "stop_at": stop_at}
        return train_cartpole_reinforce(policy, value, envs, on_step=lambda *x: log.append(x), **settings)

    assert train(5.5) == [1.0 + b for _ in range(10) for b in range(10)]
    assert [step for step, _ in log] == [0, 1, 2, 3]
    means = [metrics["rollout/ep_rew_mean"] for _, metrics in log]
    assert math.isnan(means[0]) and means[3] == 5.5
    assert [metrics["time/total_timesteps"] for _, metrics in log] == [30.0, 50.0, 80.0, 100.0]
    assert log[0][1]["policy/entropy"] == pytest.approx(math.log(2), abs=1e-3)
    assert {"loss/policy", "loss/value", "train/explained_variance"} <= set(log[0][1])
    log.clear()
    train(6.0)
    assert len(log) == 8


def test_it_improves_on_cartpole(train_cartpole_reinforce=train_cartpole_reinforce):
    """12 updates on 16 x 128 steps: the last 20 episodes last more than twice as long as the first 20."""
    policy, value = networks(1)
    returns = train_cartpole_reinforce(policy, value, make_cartpole(16), steps=12, generator=seeded(1))
    assert sum(returns[-20:]) > 2 * sum(returns[:20])


# --- PPO ---------------------------------------------------------------------------------------------------------

PLAIN = PPOConfig(
    cliprange_value=None,
    vf_coef=0.7,
    gamma=0.9,
    lam=0.8,
    num_ppo_epochs=1,
    num_mini_batches=1,
    whiten_advantages="no",
    lr=1.0,
    max_grad_norm=math.inf,
)


def doubles(seed=0):
    return [network.double() for network in networks(seed)]


def scripted(length=9):
    """A rollout of the first policy, in double precision."""
    return Player(Doubles(), generator=seeded()).play(doubles()[0], length)


def test_rows_are_the_steps_that_count_in_order(flat_experience=flat_experience):
    """Each with its own value, credit (a clock's end bootstrapped) and log-probability; no reset row among them."""
    policy, value = doubles()
    for length in (1, 5, 9, 12):
        rollout = scripted(length)
        values = value(rollout.observations).detach()
        credit = slow_advantages(rollout, values, 0.9, 0.8)
        old, predict = flat_experience(policy, value, rollout, PLAIN)
        places = rollout.mask.nonzero().tolist()
        assert len(places) == rollout.mask.sum() and old.mask.all()
        for x in (old.logprobs, old.values, old.advantages, old.returns, old.mask):
            assert x.shape == (len(places), 1) and not x.requires_grad
        for row, (b, t) in enumerate(places):
            logprobs = policy(rollout.observations[b, t]).log_softmax(-1)
            close(old.logprobs[row, 0], logprobs[rollout.actions[b, t]].detach())
            close(old.values[row, 0], values[b, t])
            close(old.advantages[row, 0], credit[b, t])
            close(old.returns[row, 0], credit[b, t] + values[b, t])
            new = predict(torch.tensor([row]))
            close(new.logprobs, logprobs[rollout.actions[b, t]].reshape(1, 1))
            close(new.entropies, -(logprobs.exp() * logprobs).sum().reshape(1, 1))
            close(new.values, value(rollout.observations[b, t]).reshape(1, 1))


def test_predictions_follow_the_networks_and_the_batch_does_not(flat_experience=flat_experience):
    policy, value = doubles()
    rollout, rows = scripted(), torch.tensor([3, 0, 5])
    old, predict = flat_experience(policy, value, rollout, PLAIN)
    logprobs, values = old.logprobs.clone(), old.values.clone()
    close(predict(rows).logprobs, logprobs[rows])
    for network in (policy, value):
        network.layers[4].bias.data += f64([0.5, 0.0]) if network is policy else 2.0
    close(predict(rows).values, values[rows] + 2.0)
    assert (predict(rows).logprobs - logprobs[rows]).abs().min() > 0.1
    close((old.logprobs, old.values), (logprobs, values))
    new = predict(rows)
    assert new.logprobs.requires_grad and new.values.requires_grad and not new.entropies.requires_grad
    _, predict = flat_experience(policy, value, rollout, replace(PLAIN, ent_coef=0.1))
    assert predict(rows).entropies.requires_grad


def ppo_step(train, config, **changes):
    """Networks after one rollout, with plain gradient descent for Adam, and the metrics."""
    policy, value = doubles()
    log, plain = [], lambda parameters, lr, **_: torch.optim.SGD(parameters, lr=lr)
    settings = {"steps": 1, "rollout_length": 9, "generator": seeded()} | changes
    with mock.patch.object(torch.optim, "Adam", plain):
        train(policy, value, Doubles(), config=config, on_step=lambda _, metrics: log.append(metrics), **settings)
    return policy, value, log


def moved(policy, value):
    """Minus the change of every parameter since the start."""
    return [
        (before - after).detach()
        for net, start in zip((policy, value), doubles(), strict=True)
        for after, before in zip(net.parameters(), start.parameters(), strict=True)
    ]


def slow_ppo(ent_coef=0.0, weigh=lambda advantages: advantages):
    """Gradients at ratio 1, one term per step that counts: -A log pi + 0.7 (v - R)^2 / 2 - ent_coef H."""
    policy, value = doubles()
    rollout = scripted()
    credit = slow_advantages(rollout, value(rollout.observations).detach(), 0.9, 0.8)
    loss, places = 0.0, rollout.mask.nonzero().tolist()
    for (b, t), weight in zip(places, weigh(credit[rollout.mask]), strict=True):
        seen = rollout.observations[b, t]
        logprobs, guess = policy(seen).log_softmax(-1), value(seen)
        loss = loss - weight * logprobs[rollout.actions[b, t]]
        loss = loss + 0.7 * (guess - guess.detach() - credit[b, t]) ** 2 / 2
        loss = loss + ent_coef * (logprobs.exp() * logprobs).sum()
    parameters = [*policy.parameters(), *value.parameters()]
    return torch.autograd.grad(loss / len(places), parameters)


def whitened(a):
    return (a - a.mean()) / (a.var() + 1e-8).sqrt()


def test_the_first_update_is_the_slow_gradient(train_cartpole_ppo=train_cartpole_ppo):
    """At ratio 1 the clipped loss has REINFORCE's gradient; value loss, entropy bonus and whitening as configured."""
    for settings, expected in (
        ({}, slow_ppo()),
        ({"ent_coef": 3.0}, slow_ppo(3.0)),
        ({"whiten_advantages": "batch"}, slow_ppo(weigh=whitened)),
        ({"whiten_advantages": "minibatch", "anneal": True}, slow_ppo(weigh=whitened)),
    ):
        policy, value, _ = ppo_step(train_cartpole_ppo, replace(PLAIN, **settings))
        for got, gradient in zip(moved(policy, value), expected, strict=True):
            close(got, gradient)


def test_before_the_first_update_nothing_has_moved(train_cartpole_ppo=train_cartpole_ppo):
    """Ratio 1, nothing clipped, KL 0; the explained variance is that of the values the rollout was judged with."""
    _, _, (metrics,) = ppo_step(train_cartpole_ppo, PLAIN)
    value, rollout = doubles()[1], scripted()
    values = value(rollout.observations).detach()
    advantages = slow_advantages(rollout, values, 0.9, 0.8)[rollout.mask]
    explained = 1 - advantages.var() / (advantages + values[:, :-1][rollout.mask]).var()
    expected = {"val/ratio": 1.0, "policy/clipfrac_avg": 0.0, "policy/approxkl_avg": 0.0, "updates": 1.0, "lr": 1.0}
    expected |= {"train/explained_variance": explained.item(), "time/total_timesteps": float(rollout.mask.sum())}
    assert {name: metrics[name] for name in expected} == pytest.approx(expected, rel=1e-9, abs=1e-9)
    assert math.isnan(metrics["rollout/ep_rew_mean"])
    assert metrics["policy/entropy_avg"] == pytest.approx(math.log(2), abs=1e-3)


def test_a_long_gradient_is_shortened_over_both_networks(train_cartpole_ppo=train_cartpole_ppo):
    full = torch.cat([x.flatten() for x in slow_ppo()])
    policy, value, (metrics,) = ppo_step(train_cartpole_ppo, replace(PLAIN, max_grad_norm=0.5))
    assert metrics["grad_norm"] == pytest.approx(full.norm().item())
    step = torch.cat([x.flatten() for x in moved(policy, value)])
    close(step, 0.5 * full / full.norm(), atol=1e-6, rtol=1e-5)


class Remembering(torch.nn.Module):
    """A network that keeps the rows it is trained on."""

    def __init__(self, network):
        super().__init__()
        self.network, self.seen = network, []

    def forward(self, observations):
        if torch.is_grad_enabled():
            self.seen.append([tuple(round(x, 3) for x in row) for row in observations.tolist()])
        return self.network(observations)


def test_every_epoch_trains_on_every_real_step_once(train_cartpole_ppo=train_cartpole_ppo):
    """In a scripted world each step looks different. A reset row looks like the end of an episode, and is not seen."""
    rollout = scripted()
    real = sorted(tuple(round(x, 3) for x in row) for row in rollout.observations[:, :-1][rollout.mask].tolist())
    resets = {tuple(round(x, 3) for x in row) for row in rollout.observations[:, :-1][~rollout.mask].tolist()}
    assert len(set(real)) == len(real) == 30 and resets and not resets & set(real)
    config = replace(PLAIN, num_ppo_epochs=2, num_mini_batches=4, lr=1e-3)
    for shuffle in (True, False):
        policy, value = (Remembering(network) for network in doubles())
        settings = {"steps": 1, "rollout_length": 9, "generator": seeded()}
        train_cartpole_ppo(policy, value, Doubles(), config=replace(config, shuffle=shuffle), **settings)
        assert policy.seen == value.seen
        assert [len(rows) for rows in policy.seen] == 2 * [8, 8, 7, 7]
        first, second = ([row for rows in part for row in rows] for part in (policy.seen[:4], policy.seen[4:]))
        assert sorted(first) == sorted(second) == real
        assert (first != second) == shuffle


RATES = []


class Recording(torch.optim.SGD):
    """Plain gradient descent that keeps the learning rates it was given, in ``RATES``."""

    def step(self):
        RATES.append(self.param_groups[0]["lr"])
        super().step()


def test_learning_rate_and_clip_range_fall_to_zero_together(train_cartpole_ppo=train_cartpole_ppo):
    """In equal parts, the last rollout using 1 / steps of both: the next one would use 0."""
    scales, log, loss = [], [], ppo.ppo_loss

    def recorded_loss(new, old, config, scale=1.0):
        scales.append(scale)
        return loss(new, old, config, scale)

    for anneal, expected in ((True, [1.0, 0.75, 0.5, 0.25]), (False, [1.0] * 4)):
        for kept in (scales, log, RATES):
            kept.clear()
        settings = {"steps": 4, "rollout_length": 9, "generator": seeded()}
        adam = mock.patch.object(torch.optim, "Adam", lambda parameters, lr, **_: Recording(parameters, lr=lr))
        with adam, mock.patch.object(ppo, "ppo_loss", recorded_loss):
            config = replace(PLAIN, lr=1e-3, anneal=anneal)
            train_cartpole_ppo(
                *doubles(), Doubles(), config=config, on_step=lambda _, metrics: log.append(metrics["lr"]), **settings
            )
        assert scales == expected
        assert RATES == log == pytest.approx([1e-3 * scale for scale in expected])


def test_one_adam_with_the_epsilon_asked_for_serves_both_networks(train_cartpole_ppo=train_cartpole_ppo):
    made, Adam = [], torch.optim.Adam

    def record(parameters, **settings):
        made.append((list(parameters), settings))
        return Adam(made[-1][0], **settings)

    for config, eps in ((replace(PLAIN, adam_eps=0.3), 0.3), (None, 1e-5)):
        policy, value = doubles()
        with mock.patch.object(torch.optim, "Adam", record):
            train_cartpole_ppo(policy, value, Doubles(), steps=1, rollout_length=9, config=config, generator=seeded())
        parameters, settings = made.pop()
        assert not made and settings["eps"] == eps
        assert {id(p) for p in parameters} == {id(p) for net in (policy, value) for p in net.parameters()}


def test_ppo_stops_at_the_first_number_that_is_not_finite(train_cartpole_ppo=train_cartpole_ppo):
    """Before the update: the networks keep the parameters they had."""
    policy, value = networks()

    def train(envs, lr=1e-3):
        config = replace(PLAIN, lr=lr)
        train_cartpole_ppo(policy, value, envs, steps=3, rollout_length=10, config=config, generator=seeded())

    raises(FloatingPointError, lambda: train(ScriptedEnvs(poison=15)), "step 1", "reward", "nan")
    raises(FloatingPointError, lambda: train(ScriptedEnvs(), lr=1e30), "step 1", "loss")
    policy, value = networks()
    before = [p.clone() for p in policy.parameters()]
    for parameter in value.parameters():
        parameter.data.fill_(math.inf)
    raises(FloatingPointError, lambda: train(ScriptedEnvs()), "step 0", "loss")
    close(list(policy.parameters()), before)


def test_ppo_reports_and_stops_when_solved(train_cartpole_ppo=train_cartpole_ppo):
    """Episodes of one step and a reset row: 5 steps hold three or two of them, so 100 are there after 4 rollouts."""
    log = []

    def train(stop_at):
        envs = ScriptedEnvs([[(1, FALL)]] * 10)
        settings = {"steps": 8, "rollout_length": 5, "generator": seeded(), "stop_at": stop_at}
        return train_cartpole_ppo(*networks(), envs, on_step=lambda *x: log.append(x), **settings)

    assert train(5.5) == [1.0 + b for _ in range(10) for b in range(10)]
    assert [step for step, _ in log] == [0, 1, 2, 3]
    means = [metrics["rollout/ep_rew_mean"] for _, metrics in log]
    assert math.isnan(means[0]) and means[3] == 5.5
    assert [metrics["time/total_timesteps"] for _, metrics in log] == [30.0, 50.0, 80.0, 100.0]
    assert [metrics["updates"] for _, metrics in log] == [48.0] * 4
    log.clear()
    train(6.0)
    assert len(log) == 8
    log.clear()
    train(None)
    assert len(log) == 8


def test_ppo_learns_cartpole(train_cartpole_ppo=train_cartpole_ppo):
    """The default settings reach a mean of 200 over 100 episodes before 1500 episodes are over."""
    policy, value = networks(1)
    returns = train_cartpole_ppo(policy, value, make_cartpole(32), steps=147, generator=seeded(1), stop_at=200)
    assert mean_return(returns) >= 200 and len(returns) < 1500


@pytest.mark.gpu
def test_the_loops_run_on_a_gpu():
    policy, value = (network.cuda() for network in networks())
    source = torch.Generator("cuda").manual_seed(0)
    for train in (train_cartpole_reinforce, train_cartpole_ppo):
        returns = train(policy, value, make_cartpole(8), steps=3, rollout_length=128, generator=source)
        assert len(returns) > 10 and all(p.is_cuda for p in policy.parameters())


# --- bugs that the tests above must catch ------------------------------------------------------------------------

PLANTED = {
    "train_cartpole_reinforce": planted(
        train_cartpole_reinforce,
        wrong_sign=('descend("policy", policy, loss', 'descend("policy", policy, -loss'),
        reset_rows_in_the_mean=('weights), mask, "token-mean")', 'weights), mask | True, "token-mean")'),
        a_mean_per_environment=('weights), mask, "token-mean")', 'weights), mask, "sequence-mean")'),
        returns_for_advantages=("else advantages\n", "else returns\n"),
        advantages_as_value_targets=("[:, :-1]) - returns", "[:, :-1]) - advantages"),
        observations_one_step_late=("logits = policy(observations[:, :-1])", "logits = policy(observations[:, 1:])"),
        whitening_forgotten=("if whiten_advantages else", "if False else"),
        no_check_of_the_rewards=('require_finite("reward", rollout.rewards, step)', "pass"),
        never_stops=("score >= stop_at", "False"),
    ),
    "descend": planted(
        descend,
        gradients_pile_up=("optimizer.zero_grad()", "pass"),
        the_loss_is_not_checked=('require_finite(f"{name} loss", loss, step)', "pass"),
        the_gradient_is_not_checked=("if parameter.grad is not None", "if False"),
        up_instead_of_down=("loss.backward()", "(-loss).backward()"),
    ),
    "flat_experience": planted(
        flat_experience,
        reset_rows_counted=("mask = rollout.mask\n", "mask = rollout.mask | True\n"),
        observations_one_step_late=("rollout.observations[:, :-1][mask]", "rollout.observations[:, 1:][mask]"),
        values_one_step_late=("x in (values[:, :-1],", "x in (values[:, 1:],"),
        advantages_and_returns_swapped=("advantages, returns, mask)", "returns, advantages, mask)"),
        the_clock_is_an_end_like_any_other=(
            "rollout_advantages(rollout,",
            "rollout_advantages(ControlRollout(**{**vars(rollout), 'truncated': rollout.mask & False,"
            " 'terminated': rollout.truncated | rollout.terminated}),",
        ),
        gamma_for_lam=("lam=config.lam", "lam=config.gamma"),
        actions_of_other_rows=("(logits, actions[rows])", "(logits, actions[: len(rows)])"),
        predicts_the_first_rows=("logits = policy(observations[rows])", "logits = policy(observations[: len(rows)])"),
        no_entropy_gradient=("if config.ent_coef > 0", "if False"),
        the_old_values_follow=("with torch.no_grad():", "if True:"),
    ),
    "train_cartpole_ppo": planted(
        train_cartpole_ppo,
        the_clip_range_stays=("generator, scale)", "generator)"),
        the_learning_rate_stays=("lr=config.lr * scale, step", "lr=config.lr, step"),
        annealing_always=("if config.anneal else 1.0", ""),
        annealing_ends_at_the_first_step=("1 - step / steps", "1 - (step + 1) / steps"),
        only_the_policy_is_trained=('{"policy": policy, "value": value}', '{"policy": policy}'),
        only_the_policy_is_shortened=("partial(update, both,", "partial(update, policy,"),
        no_shortening=("max_norm=config.max_grad_norm", "max_norm=1e9"),
        the_epsilon_of_torch=(", eps=config.adam_eps", ", eps=1e-8"),
        no_check_of_the_rewards=('require_finite("reward", rollout.rewards, step)', "pass"),
        the_rollout_of_another_length=("player.play(policy, rollout_length)", "player.play(policy, 2)"),
        explains_the_advantages=("/ masked_var(old.returns, old.mask)", "/ masked_var(old.advantages, old.mask)"),
        never_stops=("score >= stop_at", "False"),
        stops_at_the_best_episode=("score = mean_return(player.returns)", "score = max(player.returns, default=0)"),
    ),
}
EXEMPT = ()
