"""Policy gradient on CartPole: the loop of the language-model pages in a world of many steps and many episodes.

A batch is a rollout: B environments side by side, T steps each. Episodes end inside it in two ways. *Terminated*: the
pole fell, nothing comes after. *Truncated*: the clock ran out at 500 steps, and the state is still worth what the
value function says. Needs gymnasium (``pip install -e ".[control]"``), imported only when environments are made.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhfkit.advantages import gae
from rlhfkit.logprobs import entropy, token_logprobs
from rlhfkit.masked import aggregate, masked_mean, masked_var, whiten
from rlhfkit.policy_losses import reinforce_loss
from rlhfkit.train_policy import require_finite
from rlhfkit.validation import require_mask, require_ndim


def make_cartpole(num_envs: int) -> Any:
    """CartPole-v1 in B = ``num_envs`` >= 1 copies: +1 for every step, episodes truncated after 500.

    Returns:
        A ``gymnasium.vector.VectorEnv`` that steps all copies in one go.

    Raises:
        ImportError: if gymnasium is missing; the message says what to install.
        ValueError: if ``num_envs`` is less than 1.
    """
    if num_envs < 1:
        raise ValueError(f"num_envs: got {num_envs}, expected at least 1")
    try:
        import gymnasium
    except ImportError as error:
        raise ImportError(
            'CartPole needs gymnasium: run  pip install -e ".[control]"  in the folder of the book'
        ) from error
    return gymnasium.make_vec("CartPole-v1", num_envs=num_envs, vectorization_mode="vector_entry_point")


def tanh_layers(outputs: int, last_gain: float, generator: torch.Generator) -> nn.Sequential:
    """Two hidden layers of 64 tanh units between a CartPole observation (4) and the outputs; orthogonal weights."""
    layers = [nn.Linear(4, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs)]
    for layer, gain in zip(layers[::2], (math.sqrt(2), math.sqrt(2), last_gain), strict=True):
        nn.init.orthogonal_(layer.weight, gain, generator=generator)  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return nn.Sequential(*layers)


class PolicyNetwork(nn.Module):
    """Logits of the two actions. The last layer starts small (0.01), so the first policy is nearly uniform."""

    def __init__(self, *, generator: torch.Generator) -> None:
        super().__init__()
        self.layers = tanh_layers(2, 0.01, generator)

    def forward(self, observations: Tensor) -> Tensor:
        """Logits for every observation: (..., 4) -> (..., 2)."""
        return self.layers(observations)


class ValueNetwork(nn.Module):
    """The value of every state, reward units. It shares no weight with the policy."""

    def __init__(self, *, generator: torch.Generator) -> None:
        super().__init__()
        self.layers = tanh_layers(1, 1.0, generator)

    def forward(self, observations: Tensor) -> Tensor:
        """Discounted reward still to come from every observation: (..., 4) -> (...)."""
        return self.layers(observations).squeeze(-1)


@dataclass(frozen=True)
class ControlRollout:
    """T steps of B environments. No gradient flows into it.

    ``observations[:, t]`` is what action t saw, ``[:, t + 1]`` what it led to. ``mask`` is False on reset rows, steps
    that only carried a finished environment to its next start.
    """

    observations: Tensor  # (B, T + 1, inputs)
    actions: Tensor  # (B, T), integers
    rewards: Tensor  # (B, T), reward units
    mask: Tensor  # (B, T), bool
    terminated: Tensor  # (B, T), bool: the step ended its episode for good, nothing comes after
    truncated: Tensor  # (B, T), bool: the clock alone ended it


class Player:
    """Plays a policy in B environments and keeps the books: who is mid-episode, and what finished episodes earned.

    gymnasium resets in *next-step* mode. The step that ends an episode returns its final observation; the step after
    it ignores the action and returns the first observation of the next episode. That reset row earns nothing, is
    no decision of the policy, and is masked.

    Args:
        envs: a ``gymnasium.vector.VectorEnv`` in next-step mode; reset here with a seed drawn from ``generator``.
        generator: source of all randomness, on the device of the policy.

    Attributes:
        returns: undiscounted return of each finished episode, in order of finishing.
        timesteps: steps that counted so far, over all environments.

    Raises:
        ValueError: if ``envs`` resets in another mode.
    """

    def __init__(self, envs: Any, *, generator: torch.Generator) -> None:
        mode = getattr(envs.metadata.get("autoreset_mode"), "name", None)
        if mode != "NEXT_STEP":
            raise ValueError(f"envs: got autoreset mode {mode}, expected NEXT_STEP (gymnasium's default)")
        self.envs, self.generator, self.device = envs, generator, generator.device
        seed = int(torch.randint(2**31 - 1, (), generator=generator, device=self.device))
        self.observations = torch.tensor(envs.reset(seed=seed)[0])
        self.resetting = torch.zeros(envs.num_envs, dtype=torch.bool)
        self.running = torch.zeros(envs.num_envs, dtype=torch.float64)
        self.returns: list[float] = []
        self.timesteps = 0

    @torch.no_grad()
    def play(self, policy: nn.Module, length: int) -> ControlRollout:
        """Continue every environment by T = ``length`` steps, a_t ~ pi(. | s_t), onto the generator's device.

        Raises:
            ValueError: if ``length`` is less than 1.
        """
        if length < 1:
            raise ValueError(f"length: got {length}, expected at least 1")
        observations, columns = [self.observations], []
        for _ in range(length):
            cumulative = policy(self.observations.to(self.device)).softmax(-1).cumsum(-1)
            uniform = torch.rand(len(cumulative), 1, generator=self.generator, device=self.device)
            actions = (cumulative[:, :-1] <= uniform).sum(-1).cpu()
            observation, *outcome, _ = self.envs.step(actions.numpy())
            self.observations = torch.tensor(observation)
            rewards, terminated, truncated = (torch.tensor(x) for x in outcome)
            mask, truncated = ~self.resetting, truncated & ~terminated
            columns.append((actions, rewards.to(self.observations.dtype), mask, terminated, truncated))
            observations.append(self.observations)
            self.running += torch.where(mask, rewards, 0.0)
            self.timesteps += int(mask.sum())
            self.resetting = terminated | truncated
            self.returns += self.running[self.resetting].tolist()
            self.running[self.resetting] = 0.0
        stacked = [torch.stack(list(x), 1).to(self.device) for x in (observations, *zip(*columns, strict=True))]
        return ControlRollout(*stacked)


def evaluate_policy(policy: nn.Module, envs: Any, *, generator: torch.Generator, max_steps: int = 500) -> Tensor:
    """Return of each environment's *first* episode under the frozen policy, actions sampled.

    One episode of each: the first B episodes to finish, of all, would be the short ones.

    Args:
        policy, envs, generator: as :class:`Player` takes them; B environments.
        max_steps: a length within which every episode ends.

    Returns:
        (B,), reward units, float64.

    Raises:
        RuntimeError: if an episode is still running after ``max_steps``.
    """
    rollout = Player(envs, generator=generator).play(policy, max_steps)
    ended = (rollout.terminated | rollout.truncated).long()
    if not ended.any(1).all():
        raise RuntimeError(f"max_steps: {int((~ended.any(1)).sum())} episodes still run after {max_steps} steps")
    first = ended.cumsum(1) - ended == 0  # no end before this step
    return torch.where(first, rollout.rewards.double(), 0.0).sum(1)


def rollout_advantages(rollout: ControlRollout, values: Tensor, *, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Advantages and value targets of a rollout, with each kind of ending treated as what it is.

    A terminated step is followed by nothing. A truncated one gets gamma V(final observation) added to its reward,
    and so does, through ``last_values``, a rollout that stops in mid-episode. Reset rows are skipped.

    Args:
        rollout: T steps of B environments.
        values: V of ``rollout.observations``, (B, T + 1), reward units; zeros when there is no value function.
        gamma: discount in [0, 1].
        lam: GAE's decay in [0, 1]; 1 gives the discounted return minus the value.

    Returns:
        (advantages, returns), (B, T) each, reward units, as :func:`~rlhfkit.advantages.gae` gives them.

    Raises:
        ValueError: if the shapes do not fit, or ``gamma`` or ``lam`` lies outside [0, 1].

    Source: Pardo et al. 2018, "Time limits in reinforcement learning", arXiv:1712.00378.
    """
    require_ndim("values", values, "(B, T + 1)")
    require_mask("rollout.mask", rollout.mask, values[:, 1:].shape)
    rewards = rollout.rewards + torch.where(rollout.truncated, gamma * values[:, 1:], 0.0)
    dones = rollout.terminated | rollout.truncated
    return gae(rewards, values[:, :-1], gamma=gamma, lam=lam, mask=rollout.mask, dones=dones, last_values=values[:, -1])


def mean_return(returns: list[float], window: int = 100) -> float:
    """Mean of the last ``window`` finished episodes, reward units; NaN before there are that many."""
    return sum(returns[-window:]) / window if len(returns) >= window else math.nan


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
        envs: B environments, as :class:`Player` takes them.
        steps: number of rollouts of T = ``rollout_length`` steps, each with one policy update.
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


def descend(name: str, network: nn.Module, loss: Tensor, optimizer: torch.optim.Optimizer, step: int) -> None:
    """One step down a scalar loss, unless the loss or a gradient is not finite.

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
