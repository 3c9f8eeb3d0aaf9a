"""CartPole: environments, networks, rollouts and their credit, in a world of many steps and many episodes.

A batch is a rollout: B environments side by side, T steps each. Episodes end inside it in two ways. *Terminated*: the
pole fell, nothing comes after. *Truncated*: the clock ran out at 500 steps, and the state is still worth what the
value function says. Needs gymnasium (``pip install -e ".[control]"``), imported only when environments are made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rlhfkit.advantages import gae
from rlhfkit.validation import require_mask, require_ndim


def make_cartpole(num_envs: int) -> Any:
    """CartPole-v1 in several copies: +1 for every step, episodes truncated after 500.

    Args:
        num_envs: B, at least 1.

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

    def __init__(self, *, generator: torch.Generator, last_gain: float = 0.01) -> None:
        super().__init__()
        self.layers = tanh_layers(2, last_gain, generator)

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


def cartpole_networks(*, generator: torch.Generator, policy_gain: float = 0.01) -> tuple[PolicyNetwork, ValueNetwork]:
    """A fresh policy and a fresh value function for CartPole, separate, 64-64 tanh each.

    They are in torch's default dtype; the environments' observations are float32.

    Args:
        generator: of the initial weights; the policy's are drawn first.
        policy_gain: gain of the policy's last layer; 0.01 starts nearly uniform.

    Returns:
        (policy, value): observations (..., 4) -> logits (..., 2), and -> values (...), reward units.
    """
    policy = PolicyNetwork(generator=generator, last_gain=policy_gain)
    return policy, ValueNetwork(generator=generator)


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
        """Continue every environment by T steps, a_t ~ pi(. | s_t).

        Args:
            policy: observations (B, inputs) -> logits (B, actions).
            length: T, at least 1.

        Returns:
            The steps, on the generator's device.

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
    """Mean return of the last finished episodes.

    Args:
        returns: of the finished episodes, in order of finishing, reward units.
        window: how many of them to average.

    Returns:
        Reward units; NaN before there are ``window`` episodes.
    """
    return sum(returns[-window:]) / window if len(returns) >= window else math.nan
