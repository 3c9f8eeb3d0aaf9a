"""Loops that train a policy on its own samples. Each reads like the pseudocode beside it on the page."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlhfkit.advantages import gae, rewards_to_go
from rlhfkit.kl import AdaptiveKLController, kl_shaped_rewards, sequence_kl
from rlhfkit.logprobs import token_logprobs_and_entropy
from rlhfkit.masked import aggregate
from rlhfkit.models import GPT, Policy, TabularPolicy
from rlhfkit.policy_losses import reinforce_loss
from rlhfkit.ppo import Experience, PPOConfig, Prediction, ppo_epochs
from rlhfkit.sampling import logits_and_values, response_logprobs, response_values, sample
from rlhfkit.tasks import Rollout, Task
from rlhfkit.training import OnStep, Run, device_of, require_finite, update
from rlhfkit.validation import require_in, require_same_shape

TrainablePolicy = GPT | TabularPolicy


def gradient_of(policy: nn.Module) -> Tensor:
    """All gradients of a module in one vector, (D,)."""
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def train_reinforce(
    policy: TrainablePolicy,
    task: Task,
    *,
    steps: int,
    group_size: int,
    lr: float,
    generator: torch.Generator,
    baseline: Callable[[Tensor], Tensor] | None = None,
    on_step: OnStep | None = None,
) -> None:
    """REINFORCE on responses, with the KL penalty inside the reward. Updates ``policy`` in place.

    Every step samples G responses to each of P prompts, gives each token its reward-to-go (score at the end, minus
    ``task.beta`` times the log-ratio to the reference on the way), subtracts a baseline, and takes one Adam step.

    Args:
        policy: trained in place; a copy of ``task.reference()`` is the usual start.
        task: prompts, scores, reference and beta.
        steps: number of updates.
        group_size: G, responses per prompt and step.
        lr: learning rate of Adam.
        generator: source of the samples, on the device of the policy.
        baseline: from the total rewards of the groups, (P, G), to a baseline of the same shape, such as
            ``leave_one_out_baseline``; None: no baseline.
        on_step: called with the step and its metrics, reward units and nats.

    Raises:
        ValueError: if ``baseline`` returns another shape than it got.
        FloatingPointError: at the first score, loss or gradient that is not finite; names step and quantity.

    Source: Williams 1992; with ``leave_one_out_baseline`` it is RLOO, Ahmadian et al. 2024, arXiv:2402.14740.
    """
    device = device_of(policy)
    reference = _frozen(task, device)
    policy.eval()  # no dropout: the samples and the gradient belong to one policy
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr)
    for step in range(steps):
        prompts = task.draw_prompts(generator).to(device).repeat_interleave(group_size, dim=0)
        rollout = sample(policy, prompts, task.max_length, generator=generator, eos_id=task.eos_id)
        scores = task.score(rollout)  # (B,), B = P * G
        require_finite("score", scores, step)
        rollout = rollout.trimmed()
        mask = rollout.response_mask
        with torch.no_grad():
            ref_logprobs = response_logprobs(reference, prompts, rollout.tokens)  # (B, T)
        rewards = kl_shaped_rewards(scores, rollout.logprobs, ref_logprobs, mask, task.beta)
        advantages = rewards_to_go(rewards, mask)
        if baseline is not None:
            totals = rewards.sum(1).view(-1, group_size)
            baselines = baseline(totals)
            require_same_shape(totals=totals, baseline=baselines)
            advantages = advantages - baselines.reshape(-1, 1)
        logprobs = response_logprobs(policy, prompts, rollout.tokens)  # the same numbers, now with gradient
        loss = aggregate(reinforce_loss(logprobs, advantages), mask, "sequence-sum")
        require_finite("loss", loss, step)
        optimizer.zero_grad()
        loss.backward()
        require_finite("gradient", gradient_of(policy), step)
        optimizer.step()
        if on_step is not None:
            kl = sequence_kl(rollout.logprobs, ref_logprobs, mask).mean()
            metrics = {"objective/scores": scores.mean(), "objective/rlhf_reward": rewards.sum(1).mean()}
            on_step(step, {name: x.item() for name, x in (metrics | {"objective/kl": kl, "loss/policy": loss}).items()})


def train_ppo(
    policy: TrainablePolicy,
    value: nn.Module,
    task: Task,
    *,
    steps: int,
    group_size: int = 1,
    config: PPOConfig | None = None,
    generator: torch.Generator,
    kl_controller: AdaptiveKLController | None = None,
    pretraining: tuple[Tensor, Tensor] | None = None,
    ptx_coef: float = 0.0,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: int = 10,
    on_step: OnStep | None = None,
) -> list[dict[str, float]]:
    """PPO on responses, with the KL penalty inside the reward. Updates ``policy`` and ``value`` in place.

    Every step samples G responses to each of P prompts, spreads score and KL penalty over the tokens, estimates
    advantages with GAE, and takes several clipped updates on the batch. Dropout is off throughout.

    Args:
        policy: trained in place; a copy of ``task.reference()`` is the usual start.
        value: has ``values(tokens)``; trained in place. A ``ScalarModel`` on the policy itself shares its trunk.
        task: prompts, scores, reference and beta.
        steps: number of batches.
        group_size: G, responses per prompt and step; PPO needs no group, so 1 is usual.
        config: settings of the update; None: the defaults.
        generator: source of prompts, samples and minibatches, on the device of the policy.
        kl_controller: gives the weight of the KL penalty in place of ``task.beta``, and is moved after every step.
        pretraining: prompts (N, L0) and responses (N, T) whose likelihood is to stay high, or None.
        ptx_coef: weight of their mean negative log-likelihood per token in the loss; each update draws as many rows as
            its minibatch has.
        checkpoint: file to write the run to and to resume from; None: no file.
        save_every: steps between two writes.
        on_step: called with the step and its metrics.

    Returns:
        Metrics of every step, under TRL's names: ``objective/scores``, ``objective/kl`` (nats per response),
        ``objective/rlhf_reward`` (score minus penalty), ``objective/kl_coef``, ``val/num_eos_tokens`` (share of
        responses that ended), ``val/length`` (tokens), ``lr``, ``episode`` and those of ``ppo_epochs``.

    Raises:
        ValueError: for a wrong setting, or if the file belongs to another run.
        FloatingPointError: at the first score, loss or gradient that is not finite; names step and quantity.

    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 2 and appendix C.4; Ziegler et al. 2019, arXiv:1909.08593.
    """
    require_in("ptx_coef", ptx_coef, 0.0)
    if pretraining is None and ptx_coef > 0:
        raise ValueError(f"pretraining: got None with ptx_coef {ptx_coef}, expected data to weigh")
    config, device = config or PPOConfig(), device_of(policy)
    reference = _frozen(task, device)
    both = nn.ModuleDict({"policy": policy, "value": value}).eval()
    optimizer = torch.optim.Adam(both.parameters(), lr=config.lr, eps=config.adam_eps, fused=True)
    recipe = {"loop": "ppo", "steps": steps, "group_size": group_size, "beta": task.beta, "ptx_coef": ptx_coef}
    recipe |= asdict(config) | {"kl_controller": vars(kl_controller) if kl_controller is not None else None}
    run = Run(both, [optimizer], recipe, checkpoint, save_every, generator)
    extra = None if pretraining is None else partial(_pretraining_loss, policy, *pretraining, ptx_coef, generator)
    episodes = [0.0, *(row["episode"] for row in run.history)]
    for row, before in zip(run.history, episodes, strict=False):  # a resumed run: show the controller what it has seen
        if kl_controller is not None:
            kl_controller.update(row["objective/kl"], int(row["episode"] - before))
    for step in run.steps(steps, "PPO"):
        scale = 1 - step / steps if config.anneal else 1.0
        kl_coef = task.beta if kl_controller is None else kl_controller.kl_coef
        prompts = task.draw_prompts(generator).to(device).repeat_interleave(group_size, dim=0)
        rollout = sample(policy, prompts, task.max_length, generator=generator, eos_id=task.eos_id)
        scores = task.score(rollout)  # (B,), B = P * G
        require_finite("score", scores, step)
        rollout = rollout.trimmed()
        tokens, mask = rollout.tokens, rollout.response_mask
        with torch.no_grad():
            ref_logprobs = response_logprobs(reference, prompts, tokens)  # (B, T)
            values = response_values(value, prompts, tokens)
        rewards = kl_shaped_rewards(scores, rollout.logprobs, ref_logprobs, mask, kl_coef)
        advantages, returns = gae(rewards, values, gamma=config.gamma, lam=config.lam, mask=mask)
        old = Experience(rollout.logprobs, values, advantages, returns, mask)
        predict = partial(_predict, policy, value, prompts, tokens, config.ent_coef > 0)
        descend = partial(update, both, [optimizer], lr=config.lr * scale, step=step, max_norm=config.max_grad_norm)
        metrics = ppo_epochs(predict, old, config, descend, generator, scale, extra)
        kl = sequence_kl(rollout.logprobs, ref_logprobs, mask)
        means = {"objective/scores": scores, "objective/kl": kl, "objective/rlhf_reward": rewards.sum(1)}
        means |= {"val/length": mask.sum(1), "val/num_eos_tokens": _ended(rollout, task.eos_id)}
        books = {"objective/kl_coef": kl_coef, "lr": config.lr * scale, "episode": (step + 1.0) * len(mask)}
        run.log({name: x.double().mean() for name, x in means.items()} | metrics | books)
        if kl_controller is not None:
            kl_controller.update(run.history[-1]["objective/kl"], len(mask))  # as a resumed run will
        if on_step is not None:
            on_step(step, run.history[-1])
    return run.history


def _frozen(task: Task, device: torch.device) -> Policy:
    """The reference of a task, on a device."""
    reference = task.reference()
    return reference.to(device).eval() if isinstance(reference, nn.Module) else reference


def _predict(
    policy: TrainablePolicy, value: nn.Module, prompts: Tensor, tokens: Tensor, bonus: bool, rows: Tensor
) -> Prediction:
    """What the networks say now about some rows of a batch of responses; the entropy has a gradient if ``bonus``."""
    prompts, tokens = prompts[rows], tokens[rows]
    logits, values = logits_and_values(policy, value, prompts, tokens)
    return Prediction(*token_logprobs_and_entropy(logits, tokens, entropy_gradient=bonus), values)


def _pretraining_loss(
    policy: Any, prompts: Tensor, responses: Tensor, weight: float, generator: torch.Generator, count: int
) -> Tensor:
    """Weighted mean negative log-likelihood per token of ``count`` random rows of the pretraining data."""
    rows = torch.randint(len(prompts), (count,), generator=generator, device=generator.device).to(prompts.device)
    x, y = prompts[rows].to(device_of(policy)), responses[rows].to(device_of(policy))
    return weight * aggregate(-response_logprobs(policy, x, y), y.ne(getattr(policy, "pad_id", -1)), "token-mean")


def _ended(rollout: Rollout, eos_id: int | None) -> Tensor:
    """Whether each response ended by itself, (B,); with ``eos_id`` None all count as ended."""
    if eos_id is None:
        return rollout.response_mask.any(1)
    return ((rollout.tokens == eos_id) & rollout.response_mask).any(1)
