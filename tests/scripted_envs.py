"""Environments whose episodes are known beforehand, and the credit of their steps summed the slow way."""

import math
from types import SimpleNamespace

import numpy as np
import torch

from planting import edited
from rlhfkit.control import cartpole_networks

FALL, CLOCK = "terminated", "truncated"
SCRIPTS = [[(2, FALL), (3, CLOCK), (1, FALL)], [(4, CLOCK), (1, CLOCK)], [(5, FALL)], [(100, FALL)]]


class ScriptedEnvs:
    """Environments whose episodes have given lengths and endings, whatever the policy does.

    Step k of episode e of environment b earns 1 + b + k, and is seen as [b, e, k, 1]. Reset rows pay ``reset_pay``.
    """

    def __init__(self, scripts=SCRIPTS, reset_pay=1000.0, poison=None):
        self.metadata = {"autoreset_mode": SimpleNamespace(name="NEXT_STEP")}
        self.scripts, self.num_envs, self.reset_pay, self.poison = scripts, len(scripts), reset_pay, poison

    def reset(self, seed=None):
        self.state = [[0, 0, False] for _ in self.scripts]  # episode, step, just ended
        self.clock = 0
        return self.see(), {}

    def see(self):
        rows = [[b, episode % 3, k / 10, 1] for b, (episode, k, _) in enumerate(self.state)]
        return np.array(rows, dtype=np.float32)

    def step(self, actions):
        rewards, fell, late = np.zeros(self.num_envs), np.zeros(self.num_envs, bool), np.zeros(self.num_envs, bool)
        self.clock += 1
        for b, script in enumerate(self.scripts):
            episode, k, ended = self.state[b]
            if ended:
                rewards[b] = self.reset_pay
                self.state[b] = [episode + 1, 0, False]
                continue
            length, how = script[episode % len(script)]
            rewards[b] = 1 + b + k
            ended = k + 1 == length
            fell[b], late[b] = ended and how == FALL, ended and how == CLOCK
            self.state[b] = [episode, k + 1, ended]
        if self.poison is not None and self.clock >= self.poison:
            rewards[0] = math.nan
        return self.see(), rewards, fell, late, {}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def networks(seed=0):
    return cartpole_networks(generator=seeded(seed))


class Doubles(ScriptedEnvs):
    def see(self):
        return super().see().astype(np.float64)


def slow_advantages(rollout, values, gamma, lam):
    """Each episode on its own, in Python: sum over what follows of (gamma lam)^k times the one-step error."""
    result = torch.zeros_like(values[:, :-1])
    for b in range(len(values)):
        start = 0
        while start < rollout.mask.shape[1]:
            if not rollout.mask[b, start]:
                start += 1
                continue
            stop = start  # the episode's last step in this rollout
            while not (rollout.terminated[b, stop] or rollout.truncated[b, stop]) and stop + 1 < rollout.mask.shape[1]:
                stop += 1
            errors = []
            for t in range(start, stop + 1):
                following = 0.0 if rollout.terminated[b, t] else values[b, t + 1].item()
                errors.append(rollout.rewards[b, t].item() + gamma * following - values[b, t].item())
            for i in range(len(errors)):
                result[b, start + i] = sum((gamma * lam) ** k * errors[i + k] for k in range(len(errors) - i))
            start = stop + 1
    return result


def planted(function, **bugs):
    """Name of each bug, and the function with one piece of its text replaced."""
    return {bug.replace("_", " "): edited(function, change) for bug, change in bugs.items()}
