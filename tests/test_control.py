"""The CartPole loop: scripted environments whose episodes are known, gymnasium replayed one by one, slow sums."""

import math
import sys
from unittest import mock

import gymnasium
import torch

from planting import close, f64, normal, raises
from rlhfkit.control import (
    ControlRollout,
    Player,
    PolicyNetwork,
    ValueNetwork,
    cartpole_networks,
    evaluate_policy,
    make_cartpole,
    mean_return,
    rollout_advantages,
    tanh_layers,
)
from scripted_envs import CLOCK, FALL, SCRIPTS, ScriptedEnvs, networks, planted, seeded, slow_advantages


def scripted_rollout(length=9, scripts=SCRIPTS):
    return Player(ScriptedEnvs(scripts), generator=seeded()).play(networks()[0], length)


# --- the books ---------------------------------------------------------------------------------------------------


def test_reset_rows_never_count_and_episodes_are_booked_as_they_finish(Player=Player):
    """Hand-worked: environment 0 plays 2 steps, a reset row, 3 steps, a reset row, 1 step, a reset row, and again."""
    player = Player(ScriptedEnvs(), generator=seeded())
    rollout = player.play(networks()[0], 9)
    assert rollout.mask.int().tolist() == [
        [1, 1, 0, 1, 1, 1, 0, 1, 0],
        [1, 1, 1, 1, 0, 1, 0, 1, 1],
        [1, 1, 1, 1, 1, 0, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1, 1],
    ]
    # finished at steps 2 (env 0), 4 (env 1), 5 (env 2), 6 (envs 0 and 1, in this order), 8 (env 0)
    assert player.returns == [1.0 + 2.0, 2.0 + 3.0 + 4.0 + 5.0, 3.0 + 4.0 + 5.0 + 6.0 + 7.0, 6.0, 2.0, 1.0]
    assert player.timesteps == 6 + 7 + 8 + 9
    assert rollout.terminated.nonzero().tolist() == [[0, 1], [0, 7], [2, 4]]
    assert rollout.truncated.nonzero().tolist() == [[0, 5], [1, 3], [1, 5]]


def test_two_rollouts_continue_where_one_would(Player=Player):
    """Cut anywhere, also between an end and its reset row: the same steps, the same books."""
    whole = Player(ScriptedEnvs(), generator=seeded())
    expected = whole.play(networks()[0], 12)
    for cut in (1, 2, 3, 6, 11):
        player = Player(ScriptedEnvs(), generator=seeded())
        parts = [player.play(networks()[0], cut), player.play(networks()[0], 12 - cut)]
        for name in ("actions", "rewards", "mask", "terminated", "truncated"):
            close(torch.cat([getattr(part, name) for part in parts], 1), getattr(expected, name))
        assert (player.returns, player.timesteps) == (whole.returns, whole.timesteps)


def test_a_step_that_falls_as_the_clock_runs_out_is_terminated(Player=Player):
    envs = ScriptedEnvs([[(2, CLOCK)]])
    step = envs.step
    envs.step = lambda actions: (lambda o, r, _, late, i: (o, r, late.copy(), late, i))(*step(actions))
    rollout = Player(envs, generator=seeded()).play(networks()[0], 2)
    assert rollout.terminated.tolist() == [[False, True]]
    assert not rollout.truncated.any()


class Remembering(gymnasium.vector.SyncVectorEnv):
    def reset(self, *, seed=None, options=None):
        self.seed = seed
        return super().reset(seed=seed, options=options)


def test_a_rollout_is_what_single_environments_replay(Player=Player):
    """The recorded actions, played again in four separate CartPoles with a limit of 18 steps, give the same record."""

    def single():
        return gymnasium.make("CartPole-v1", max_episode_steps=18)

    envs = Remembering([single] * 4)
    player = Player(envs, generator=seeded(3))
    rollout = player.play(networks()[0], 80)
    assert rollout.truncated.any() and rollout.terminated.any()
    finished = []
    for b in range(4):
        env = single()
        observation, _ = env.reset(seed=envs.seed + b)
        total, ended = 0.0, False
        for t in range(80):
            close(rollout.observations[b, t], torch.tensor(observation))
            assert rollout.mask[b, t] == (not ended)
            if ended:
                observation, _ = env.reset()
                total, ended = 0.0, False
                continue
            observation, reward, fell, late, _ = env.step(int(rollout.actions[b, t]))
            assert (rollout.rewards[b, t], rollout.terminated[b, t]) == (reward, fell)
            assert rollout.truncated[b, t] == (late and not fell)
            total, ended = total + reward, fell or late
            if ended:
                finished.append((t, b, total))
    assert player.returns == [total for _, _, total in sorted(finished)]


def test_the_array_cartpole_resets_on_the_step_after_an_end(make_cartpole=make_cartpole):
    """What the loop assumes of gymnasium: after an end comes an unpaid row that leads to a fresh start."""
    envs = make_cartpole(16)
    assert (envs.num_envs, envs.max_episode_steps) == (16, 500)
    player = Player(envs, generator=seeded())
    rollout = player.play(networks()[0], 120)
    ended = rollout.terminated | rollout.truncated
    assert (~rollout.mask[:, 1:] == ended[:, :-1]).all() and ended.any()
    assert (rollout.rewards[rollout.mask] == 1).all() and (rollout.rewards[~rollout.mask] == 0).all()
    reset_to = rollout.observations[:, 1:][~rollout.mask]
    assert (reset_to.abs() <= 0.05).all()
    assert player.timesteps == rollout.mask.sum()
    final = rollout.observations[:, 1:][rollout.terminated]
    assert ((final[:, 2].abs() > 12 * math.pi / 180) | (final[:, 0].abs() > 2.4)).all()


def test_actions_follow_the_policy(Player=Player):
    """With logits (0, log 3) the second action is taken three times out of four."""
    envs = ScriptedEnvs([[(1000, FALL)]] * 50)
    rollout = Player(envs, generator=seeded()).play(lambda x: f64([0.0, math.log(3)]).expand(len(x), 2), 400)
    assert abs(rollout.actions.double().mean().item() - 0.75) < 0.015  # 5 standard errors


def test_bad_settings_are_named(Player=Player, make_cartpole=make_cartpole):
    envs = ScriptedEnvs()
    envs.metadata = {"autoreset_mode": gymnasium.vector.AutoresetMode.SAME_STEP}
    raises(ValueError, lambda: Player(envs, generator=seeded()), "SAME_STEP", "NEXT_STEP")
    raises(ValueError, lambda: Player(ScriptedEnvs(), generator=seeded()).play(networks()[0], 0), "length", "0")
    raises(ValueError, lambda: make_cartpole(0), "num_envs", "0")
    with mock.patch.dict(sys.modules, {"gymnasium": None}):
        raises(ImportError, lambda: make_cartpole(2), "pip install", ".[control]")


# --- evaluation --------------------------------------------------------------------------------------------------


def test_evaluation_takes_the_first_episode_of_every_environment(evaluate_policy=evaluate_policy):
    envs = ScriptedEnvs([[(2, FALL), (9, FALL)], [(6, CLOCK), (1, FALL)], [(1, CLOCK)]])
    got = evaluate_policy(networks()[0], envs, generator=seeded(), max_steps=11)
    close(got, f64([1.0 + 2.0, 2.0 + 3.0 + 4.0 + 5.0 + 6.0 + 7.0, 3.0]))
    raises(RuntimeError, lambda: evaluate_policy(networks()[0], envs, generator=seeded(), max_steps=5), "1 episodes")


def test_the_mean_is_over_the_last_hundred_episodes(mean_return=mean_return):
    assert math.isnan(mean_return([500.0] * 99))
    assert mean_return([0.0] + [475.0] * 100) == 475.0
    assert mean_return([float(x) for x in range(7)], window=3) == 5.0


# --- credit ------------------------------------------------------------------------------------------------------


def by_hand(mask, terminated=(), truncated=()):
    """One environment, rewards of 8 per step (1000 on reset rows), with the given endings."""
    keep = torch.tensor([mask], dtype=torch.bool)
    flags = [torch.tensor([[t in where for t in range(len(mask))]]) for where in (terminated, truncated)]
    rewards = torch.where(keep, f64(8.0), f64(1000.0))
    return ControlRollout(torch.zeros(1, len(mask) + 1, 4), torch.zeros(1, len(mask)).long(), rewards, keep, *flags)


VALUES = f64([[16.0, 8.0, 64.0, 4.0, 32.0]])
# gamma 1/2, lam 1: 3 is where the second episode starts, 2 the reset row whose value belongs to the final observation
HAND = {
    "terminated": (by_hand([1, 1, 0, 1], terminated=[1]), [8 + 4 - 16, 8 - 8, 0, 8 + 16 - 4]),
    "truncated": (by_hand([1, 1, 0, 1], truncated=[1]), [8 + 4 + 16 - 16, 8 + 32 - 8, 0, 8 + 16 - 4]),
    "ends with the rollout": (by_hand([1, 1, 1, 1], terminated=[3]), [15 - 16, 14 - 8, 12 - 64, 8 - 4]),
    "clock with the rollout": (by_hand([1, 1, 1, 1], truncated=[3]), [17 - 16, 18 - 8, 20 - 64, 24 - 4]),
    "cut": (by_hand([1, 1, 1, 1]), [17 - 16, 18 - 8, 20 - 64, 24 - 4]),
    "starts on a reset row": (by_hand([0, 1, 1, 1], terminated=[2]), [0, 8 + 4 - 8, 8 - 64, 8 + 16 - 4]),
}


def test_each_ending_by_hand(rollout_advantages=rollout_advantages):
    for name, (rollout, expected) in HAND.items():
        advantages, returns = rollout_advantages(rollout, VALUES, gamma=0.5, lam=1.0)
        close(advantages, f64([expected]), msg=name)
        close(returns, torch.where(rollout.mask, f64([expected]) + VALUES[:, :-1], 0.0), msg=name)


def test_advantages_are_each_episodes_own_sums(rollout_advantages=rollout_advantages):
    for length in (1, 2, 3, 9, 14):
        rollout = scripted_rollout(length)
        values = normal(4, length + 1, seed=length)
        rollout = ControlRollout(**{**vars(rollout), "rewards": rollout.rewards.double()})
        for gamma, lam in ((0.9, 0.8), (1.0, 1.0), (0.98, 0.0)):
            advantages, returns = rollout_advantages(rollout, values, gamma=gamma, lam=lam)
            expected = slow_advantages(rollout, values, gamma, lam)
            close(advantages, expected)
            close(returns, torch.where(rollout.mask, expected + values[:, :-1], 0.0))
    raises(ValueError, lambda: rollout_advantages(rollout, values[:, :-1], gamma=0.9, lam=0.9), "rollout.mask")
    raises(ValueError, lambda: rollout_advantages(rollout, values[:, 0], gamma=0.9, lam=0.9), "values")


# --- networks ----------------------------------------------------------------------------------------------------


def test_networks_start_as_documented(tanh_layers=tanh_layers, PolicyNetwork=PolicyNetwork, ValueNetwork=ValueNetwork):
    """Orthogonal weights with gains sqrt 2, sqrt 2 and the last one; zero biases; a nearly uniform first policy."""
    first, second, last = tanh_layers(2, 0.3, seeded())[::2]
    close(first.weight.T @ first.weight, 2 * torch.eye(4), atol=1e-5, rtol=0)
    close(second.weight.T @ second.weight, 2 * torch.eye(64), atol=1e-5, rtol=0)
    close(last.weight @ last.weight.T, 0.09 * torch.eye(2), atol=1e-5, rtol=0)
    assert all((layer.bias == 0).all() for layer in (first, second, last))
    close(tanh_layers(2, 0.3, seeded())[2].weight, second.weight)
    observations = normal(3, 5, 4, dtype=torch.float32)
    logits = PolicyNetwork(generator=seeded())(observations)
    assert logits.shape == (3, 5, 2) and logits.abs().max() < 0.2
    head = PolicyNetwork(generator=seeded(), last_gain=0.5).layers[4].weight
    close(head @ head.T, 0.25 * torch.eye(2), atol=1e-5, rtol=0)
    values = ValueNetwork(generator=seeded())(observations)
    assert values.shape == (3, 5) and values.abs().max() > 0.2


def test_a_pair_of_networks_shares_nothing_and_follows_the_seed(cartpole_networks=cartpole_networks):
    """The policy first, the value function after it, all from one generator; the gain is the policy's alone."""
    policy, value = cartpole_networks(generator=seeded())
    source = seeded()
    first, second = PolicyNetwork(generator=source), ValueNetwork(generator=source)
    for net, expected in ((policy, first), (value, second)):
        for got, parameter in zip(net.parameters(), expected.parameters(), strict=True):
            close(got, parameter)
    assert not {id(p) for p in policy.parameters()} & {id(p) for p in value.parameters()}
    assert not torch.equal(policy.layers[2].weight, value.layers[2].weight)
    wide, same = cartpole_networks(generator=seeded(), policy_gain=1.0)
    close(wide.layers[4].weight, 100 * policy.layers[4].weight)
    close(same.layers[4].weight, value.layers[4].weight)


# --- bugs that the tests above must catch ------------------------------------------------------------------------

DONES = "dones = rollout.terminated | rollout.truncated"
LATE = "dones = torch.cat([torch.zeros_like(rollout.mask[:, :1]), (rollout.terminated | rollout.truncated)[:, :-1]], 1)"
EARLY = "dones = torch.cat([(rollout.terminated | rollout.truncated)[:, 1:], torch.zeros_like(rollout.mask[:, :1])], 1)"


PLANTED = {
    "rollout_advantages": planted(
        rollout_advantages,
        done_flags_one_step_late=(DONES, LATE),
        done_flags_one_step_early=(DONES, EARLY),
        bootstraps_through_a_terminal_state=("where(rollout.truncated", "where(rollout.truncated | rollout.terminated"),
        truncation_treated_as_termination=("gamma * values[:, 1:]", "0 * values[:, 1:]"),
        truncation_does_not_end_the_episode=(DONES, "dones = rollout.terminated"),
        reset_rows_counted=("mask=rollout.mask,", ""),
        bootstraps_from_the_state_the_last_action_saw=("gamma * values[:, 1:]", "gamma * values[:, :-1]"),
        the_bootstrap_is_not_discounted=("gamma * values[:, 1:]", "values[:, 1:]"),
        nothing_after_the_cut=(", last_values=values[:, -1]", ""),
        the_value_at_the_cut_is_one_step_old=("values[:, -1])", "values[:, -2])"),
    ),
    "Player": planted(
        Player,
        reset_rows_counted=("~self.resetting, truncated", "~self.resetting | True, truncated"),
        an_end_marks_its_own_step=("~self.resetting, truncated", "~(terminated | truncated), truncated"),
        returns_are_not_started_afresh=("self.running[self.resetting] = 0.0", "pass"),
        only_falls_finish_an_episode=("self.resetting = terminated | truncated", "self.resetting = terminated"),
        a_fall_at_the_limit_counts_as_truncated=("truncated & ~terminated", "truncated"),
        the_greedy_action=("cumulative[:, :-1] <= uniform", "cumulative[:, :-1] <= 0.5"),
        actions_with_the_probabilities_swapped=("cumulative[:, :-1] <= uniform", "cumulative[:, :-1] >= uniform"),
        every_rollout_begins_with_a_reset=(
            "observations, columns = [self.observations], []",
            "self.__init__(self.envs, generator=self.generator); observations, columns = [self.observations], []",
        ),
        any_mode_of_resetting_will_do=('mode != "NEXT_STEP"', "False"),
    ),
    "evaluate_policy": planted(
        evaluate_policy,
        all_episodes_of_the_run=("ended.cumsum(1) - ended == 0", "ended >= 0"),
        the_last_step_is_lost=("ended.cumsum(1) - ended == 0", "ended.cumsum(1) == 0"),
        unfinished_episodes_pass=("not ended.any(1).all()", "False"),
    ),
    "mean_return": planted(
        mean_return,
        a_mean_of_fewer_than_a_hundred=("if len(returns) >= window", "if returns"),
        the_first_hundred=("returns[-window:]", "returns[:window]"),
        the_sum_of_all=("sum(returns[-window:])", "sum(returns)"),
    ),
    "make_cartpole": planted(
        make_cartpole,
        another_limit=("num_envs=num_envs,", "num_envs=num_envs, max_episode_steps=200,"),
        one_environment_only=("num_envs=num_envs", "num_envs=1"),
        no_word_on_what_to_install=("except ImportError as error", "except ZeroDivisionError as error"),
        no_environment=("num_envs < 1", "num_envs < 0"),
    ),
    "tanh_layers": planted(
        tanh_layers,
        not_orthogonal=("nn.init.orthogonal_(layer.weight, gain,", "nn.init.normal_(layer.weight, 0, gain,"),
        the_global_generator=(", generator=generator)", ")"),
        last_gain_forgotten=("math.sqrt(2), last_gain)", "math.sqrt(2), 1.0)"),
        biases_left_as_torch_makes_them=("nn.init.zeros_(layer.bias)", "pass"),
    ),
    "PolicyNetwork": planted(
        PolicyNetwork,
        a_first_policy_far_from_uniform=("0.01", "1.0"),
        the_gain_is_not_passed_on=("tanh_layers(2, last_gain,", "tanh_layers(2, 0.01,"),
        one_action=("tanh_layers(2,", "tanh_layers(1,"),
        probabilities_for_logits=("self.layers(observations)", "self.layers(observations).softmax(-1)"),
    ),
    "cartpole_networks": planted(
        cartpole_networks,
        the_gain_is_not_passed_on=("last_gain=policy_gain", "last_gain=0.01"),
        the_value_function_first=(
            "policy = PolicyNetwork",
            "ValueNetwork(generator=generator); policy = PolicyNetwork",
        ),
        a_generator_of_its_own=("ValueNetwork(generator=generator)", "ValueNetwork(generator=torch.Generator())"),
    ),
    "ValueNetwork": planted(
        ValueNetwork,
        the_last_axis_stays=(".squeeze(-1)", ""),
        values_start_near_zero=("1.0", "0.01"),
        two_values=("tanh_layers(1,", "tanh_layers(2,"),
    ),
}
EXEMPT = ("ControlRollout",)  # a record
