"""Policy gradient on CartPole: REINFORCE with a learned baseline, and PPO, on the same rollouts."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlhfkit.control import ControlRollout, Player, mean_return, rollout_advantages
from rlhfkit.logprobs import entropy, token_logprobs
from rlhfkit.masked import aggregate, masked_mean, masked_var, whiten
from rlhfkit.policy_losses import reinforce_loss
from rlhfkit.ppo import Experience, PPOConfig, Prediction, ppo_epochs
from rlhfkit.training import require_finite, update

CARTPOLE = PPOConfig(
    cliprange=0.2,
    cliprange_value=None,
    vf_coef=0.5,
    gamma=0.98,
    lam=0.95,
    num_ppo_epochs=6,
    num_mini_batches=8,
    whiten_advantages="minibatch",
    lr=3e-3,
    adam_eps=1e-5,
    max_grad_norm=0.5,
    anneal=True,
)
# for 32 environments, rollouts of 64 steps and 147 of them, about 300,000 steps: minibatches of 256


def train_cartpole_reinforce(
    policy: nn.Module,
    value: nn.Module | None,
    envs: Any,
    *,
    steps: int,
    rollout_length: int = 128,
    gamma: float = 0.98,
    lam: float = 1.0,
    lr: float = 1e-2,
    value_lr: float = 1e-2,
    value_steps: int = 10,
    whiten_advantages: bool = False,
    stop_at: float | None = None,
    generator: torch.Generator,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> list[float]:
    """REINFORCE on continuing environments: one policy-gradient step per fresh rollout. Updates both nets in place.

    Departs from the textbook in three ways, all usual: rollouts have a fixed length, so a return may end in an
    estimate (0 without a value function); the weight gamma^t of step t is left out; the step is Adam's.

    Args:
        policy: observations (..., inputs) -> logits (..., actions).
        value: observations (..., inputs) -> values (...): baseline and estimate of what follows a cut. None: neither.
        envs: B environments, as :class:`~rlhfkit.control.Player` takes them.
        steps: number of rollouts, each with one policy update.
        rollout_length: T, steps of each environment in a rollout.
        gamma, lam: discount and GAE's decay in [0, 1]; lam = 1 keeps the Monte Carlo returns.
        lr, value_lr: learning rates of the two Adams.
        value_steps: regression steps of the value function on each rollout.
        whiten_advantages: subtract the batch's mean and divide by its standard deviation; with ``value=None`` this is
            the batch-mean baseline.
        stop_at: stop once the last 100 finished episodes average this; CartPole-v1 counts as solved at 475.
        generator: source of all randomness, on the device of the networks.
        on_step: called with the step and its metrics: returns in reward units, entropy in nats.

    Returns:
        Return of every finished episode, in order of finishing.

    Raises:
        FloatingPointError: at the first reward, loss or gradient that is not finite; names step and quantity.
        ValueError: for a wrong setting, as the functions used here raise it.

    Source: Williams 1992; with GAE, Schulman et al. 2016, arXiv:1506.02438, without its trust region.
    """
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    value_optimizer = None if value is None else torch.optim.Adam(value.parameters(), lr=value_lr)
    player = Player(envs, generator=generator)
    for step in range(steps):
        rollout = player.play(policy, rollout_length)  # (B, T), no gradients
        require_finite("reward", rollout.rewards, step)
        observations, mask = rollout.observations, rollout.mask
        with torch.no_grad():
            values = torch.zeros_like(observations[..., 0]) if value is None else value(observations)  # (B, T + 1)
        advantages, returns = rollout_advantages(rollout, values, gamma=gamma, lam=lam)
        weights = whiten(advantages, mask) if whiten_advantages else advantages
        logits = policy(observations[:, :-1])
        loss = aggregate(reinforce_loss(token_logprobs(logits, rollout.actions), weights), mask, "token-mean")
        descend("policy", policy, loss, optimizer, step)
        metrics = {"loss/policy": loss, "policy/entropy": masked_mean(entropy(logits), mask)}
        if value is not None and value_optimizer is not None:
            for _ in range(value_steps):
                errors = value(observations[:, :-1]) - returns
                value_loss = aggregate(errors.square(), mask, "token-mean")
                descend("value", value, value_loss, value_optimizer, step)
            unexplained = masked_var(returns - values[:, :-1], mask) / masked_var(returns, mask)
            metrics |= {"loss/value": value_loss, "train/explained_variance": 1 - unexplained}
        score = mean_return(player.returns)
        if on_step is not None:
            books = {"rollout/ep_rew_mean": score, "time/total_timesteps": float(player.timesteps)}
            on_step(step, books | {name: x.item() for name, x in metrics.items()})
        if stop_at is not None and score >= stop_at:
            break
    return player.returns


def train_cartpole_ppo(
    policy: nn.Module,
    value: nn.Module,
    envs: Any,
    *,
    steps: int,
    rollout_length: int = 64,
    config: PPOConfig | None = None,
    generator: torch.Generator,
    stop_at: float | None = None,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> list[float]:
    """PPO on continuing environments: several epochs of clipped updates per fresh rollout. Updates both nets in place.

    A row of a minibatch is a single step; steps of all environments and times are mixed, and reset rows left out. One
    Adam serves both networks, and the gradient is shortened over both together, as in the reference code.

    Args:
        policy: observations (..., inputs) -> logits (..., actions).
        value: observations (..., inputs) -> values (...).
        envs: B environments, as :class:`~rlhfkit.control.Player` takes them.
        steps: number of rollouts, each followed by ``num_ppo_epochs * num_mini_batches`` updates.
        rollout_length: T, steps of each environment in a rollout.
        config: settings of the update; None: ``CARTPOLE``, the ones that solve CartPole-v1 fast.
        generator: source of all randomness, on the device of the networks.
        stop_at: stop once the last 100 finished episodes average this; CartPole-v1 counts as solved at 475.
        on_step: called with the step and its metrics: those of :func:`~rlhfkit.ppo.ppo_epochs`,
            ``rollout/ep_rew_mean`` (the mean return above; NaN before 100 episodes), ``time/total_timesteps``,
            ``train/explained_variance`` (of the value function before the update) and ``lr``.

    Returns:
        Return of every finished episode, in order of finishing.

    Raises:
        FloatingPointError: at the first reward, loss or gradient that is not finite; names step and quantity.
        ValueError: for a wrong setting, as the functions used here raise it.

    Source: Schulman et al. 2017, arXiv:1707.06347, algorithm 1; details as in Huang et al. 2022, "The 37 implementation
    details of PPO", but that the learning rate's fall to 0 takes the clip range along, as in the paper on Atari.
    """
    config = config or CARTPOLE
    both = nn.ModuleDict({"policy": policy, "value": value})
    optimizer = torch.optim.Adam(both.parameters(), lr=config.lr, eps=config.adam_eps, fused=True)
    player = Player(envs, generator=generator)
    for step in range(steps):
        scale = 1 - step / steps if config.anneal else 1.0
        rollout = player.play(policy, rollout_length)  # (B, T), no gradients
        require_finite("reward", rollout.rewards, step)
        old, predict = flat_experience(policy, value, rollout, config)
        take_step = partial(update, both, [optimizer], lr=config.lr * scale, step=step, max_norm=config.max_grad_norm)
        metrics = ppo_epochs(predict, old, config, take_step, generator, scale)
        unexplained = masked_var(old.returns - old.values, old.mask) / masked_var(old.returns, old.mask)
        metrics |= {"train/explained_variance": 1 - unexplained}
        score = mean_return(player.returns)
        if on_step is not None:
            books = {"rollout/ep_rew_mean": score, "time/total_timesteps": float(player.timesteps)}
            on_step(step, books | {"lr": config.lr * scale} | {name: x.item() for name, x in metrics.items()})
        if stop_at is not None and score >= stop_at:
            break
    return player.returns


def flat_experience(
    policy: nn.Module, value: nn.Module, rollout: ControlRollout, config: PPOConfig
) -> tuple[Experience, Callable[[Tensor], Prediction]]:
    """A rollout as rows of single steps, N of them, reset rows left out.

    Args:
        policy: observations (..., inputs) -> logits (..., actions).
        value: observations (..., inputs) -> values (...).
        rollout: T steps of B environments.
        config: ``gamma``, ``lam`` and ``ent_coef`` are used.

    Returns:
        The experience, (N, 1) each, and the function that :func:`~rlhfkit.ppo.ppo_epochs` asks for: from numbers of
        rows to what the two networks say about them now.
    """
    mask = rollout.mask
    observations, actions = rollout.observations[:, :-1][mask], rollout.actions[mask][:, None]  # (N, inputs), (N, 1)

    def predict(rows: Tensor) -> Prediction:
        logits = policy(observations[rows])[:, None]  # (n, 1, actions)
        entropies = entropy(logits if config.ent_coef > 0 else logits.detach())
        return Prediction(token_logprobs(logits, actions[rows]), entropies, value(observations[rows])[:, None])

    with torch.no_grad():
        values = value(rollout.observations)  # (B, T + 1)
        logprobs = token_logprobs(policy(observations)[:, None], actions)
    advantages, returns = rollout_advantages(rollout, values, gamma=config.gamma, lam=config.lam)
    flat = [x[mask][:, None] for x in (values[:, :-1], advantages, returns, mask)]
    return Experience(logprobs, *flat), predict


def descend(name: str, network: nn.Module, loss: Tensor, optimizer: torch.optim.Optimizer, step: int) -> None:
    """One step down a scalar loss, unless the loss or a gradient is not finite.

    Args:
        name: of the network, for the message.
        network: what is trained.
        loss: a scalar.
        optimizer: of the network's parameters.
        step: number of the rollout, for the message.

    Raises:
        FloatingPointError: naming the step, and the loss or gradient of ``name``.
    """
    require_finite(f"{name} loss", loss, step)
    optimizer.zero_grad()
    loss.backward()
    for parameter in network.parameters():
        if parameter.grad is not None:
            require_finite(f"{name} gradient", parameter.grad, step)
    optimizer.step()
