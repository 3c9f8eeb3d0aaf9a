"""The update of PPO: its settings, the loss of a minibatch, and the epochs over one batch of experience.

The same code serves responses, where a row is a sequence of tokens, and CartPole, where a row is a single step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from torch import Tensor

from rlhfkit.masked import aggregate, masked_mean, whiten
from rlhfkit.policy_losses import approx_kl, clipfrac, clipped_policy_loss, clipped_value_loss
from rlhfkit.validation import require_in


@dataclass(frozen=True)
class PPOConfig:
    """Settings of PPO, under the names that TRL gives them.

    Attributes:
        cliprange: half-width of the interval around 1 outside which a ratio has no reward any more, dimensionless.
        cliprange_value: how far a value may move from the old one before its loss is clipped, reward units; None: no
            clipping.
        vf_coef: weight of the value loss.
        ent_coef: weight of the entropy bonus, reward units per nat.
        gamma, lam: discount and GAE's decay, in [0, 1].
        num_ppo_epochs: passes over a batch, at least 1.
        num_mini_batches: updates per pass, at least 1.
        whiten_advantages: over the "batch", over each "minibatch", or "no".
        shuffle: draw the minibatches anew in every pass.
        lr: learning rate of Adam.
        adam_eps: Adam's epsilon; 1e-5 in the reference code, 1e-8 in torch.
        max_grad_norm: a longer gradient is shortened to this norm; ``inf``: never.
        target_kl: stop the updates on a batch once approx_kl of a minibatch exceeds this, nats per token; None: never.
        anneal: let learning rate and clip range fall linearly to 0 over the run.

    Raises:
        ValueError: if a number is out of range.

    Source of the defaults: Schulman et al. 2017, arXiv:1707.06347, and, for responses, TRL's PPO.
    """

    cliprange: float = 0.2
    cliprange_value: float | None = 0.2
    vf_coef: float = 0.1
    ent_coef: float = 0.0
    gamma: float = 1.0
    lam: float = 0.95
    num_ppo_epochs: int = 4
    num_mini_batches: int = 1
    whiten_advantages: Literal["batch", "minibatch", "no"] = "batch"
    shuffle: bool = True
    lr: float = 3e-4
    adam_eps: float = 1e-5
    max_grad_norm: float = 1.0
    target_kl: float | None = None
    anneal: bool = False

    def __post_init__(self) -> None:
        for name in ("cliprange", "vf_coef", "ent_coef"):
            require_in(name, getattr(self, name), 0.0)
        for name in ("gamma", "lam"):
            require_in(name, getattr(self, name), 0.0, 1.0)
        for name in ("num_ppo_epochs", "num_mini_batches"):
            require_in(name, getattr(self, name), 1)
        optional = [name for name in ("target_kl", "cliprange_value") if getattr(self, name) is not None]
        for name in ("lr", "adam_eps", "max_grad_norm", *optional):
            require_in(name, getattr(self, name), 0.0, open_low=True)
        if self.whiten_advantages not in ("batch", "minibatch", "no"):
            got = f"got {self.whiten_advantages!r}"
            raise ValueError(f'whiten_advantages: {got}, expected "batch", "minibatch" or "no"')


@dataclass(frozen=True)
class Prediction:
    """What policy and value function say now about the steps of a batch, (B, T) each, with gradient.

    Attributes:
        logprobs: of the actions that were taken, nats.
        entropies: of the distributions they were taken from, nats.
        values: reward units.
    """

    logprobs: Tensor
    entropies: Tensor
    values: Tensor


@dataclass(frozen=True)
class Experience:
    """One batch as it was collected, (B, T) each, no gradient.

    Attributes:
        logprobs: of the actions under the policy that took them, nats.
        values: of the value function then, reward units.
        advantages, returns: as :func:`~rlhfkit.advantages.gae` gives them, reward units.
        mask: bool, True where a step counts.
    """

    logprobs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    mask: Tensor

    def rows(self, which: Tensor) -> Experience:
        """Some rows of it: (b,) integers -> b rows."""
        return Experience(*(getattr(self, field.name).index_select(0, which) for field in fields(self)))


def ppo_loss(
    new: Prediction, old: Experience, config: PPOConfig, scale: float = 1.0
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss of a minibatch, to be minimised: policy loss + vf_coef value loss - ent_coef entropy.

    Each part is averaged over the steps that count.

    Args:
        new: predictions of the networks being trained, (b, T).
        old: the same steps as they were collected.
        config: settings.
        scale: factor on both clip ranges, for annealing.

    Returns:
        A scalar, and metrics without gradient. ``val/ratio`` is the mean ratio and ``policy/approxkl_avg`` the mean of
        approx_kl, before the update that this loss asks for.

    Source: Schulman et al. 2017, arXiv:1707.06347, eq. 9, with the signs of a loss.
    """
    mask, advantages = old.mask, old.advantages
    if config.whiten_advantages == "minibatch":
        advantages = whiten(advantages, mask)
    cliprange = config.cliprange * scale
    cliprange_value = None if config.cliprange_value is None else config.cliprange_value * scale
    policy_losses = clipped_policy_loss(new.logprobs, old.logprobs, advantages, cliprange)
    value_losses = clipped_value_loss(new.values, old.values, old.returns, cliprange_value)
    policy_loss, value_loss = aggregate(policy_losses, mask, "token-mean"), aggregate(value_losses, mask, "token-mean")
    entropy = masked_mean(new.entropies, mask)
    loss = policy_loss + config.vf_coef * value_loss - config.ent_coef * entropy
    with torch.no_grad():
        metrics = {"loss/policy_avg": policy_loss, "loss/value_avg": value_loss, "policy/entropy_avg": entropy}
        metrics["policy/approxkl_avg"] = masked_mean(approx_kl(new.logprobs, old.logprobs), mask)
        outside = clipfrac(new.logprobs, old.logprobs, cliprange).to(new.logprobs.dtype)
        metrics["policy/clipfrac_avg"] = masked_mean(outside, mask)
        metrics["val/ratio"] = masked_mean((new.logprobs - old.logprobs).exp(), mask)
    return loss, {name: x.detach() for name, x in metrics.items()}


def ppo_epochs(
    predict: Callable[[Tensor], Prediction],
    old: Experience,
    config: PPOConfig,
    descend: Callable[[Tensor], Tensor],
    generator: torch.Generator,
    scale: float = 1.0,
    extra_loss: Callable[[int], Tensor] | None = None,
) -> dict[str, Tensor]:
    """All updates on one batch: ``num_ppo_epochs`` passes over ``num_mini_batches`` minibatches.

    Args:
        predict: from numbers of rows, (b,), to what the networks say about them now.
        old: the batch.
        config: settings.
        descend: takes one step down a scalar loss and returns the norm of its gradient.
        generator: of the order of the rows, on the device of the batch.
        scale: factor on both clip ranges, for annealing.
        extra_loss: a scalar added to the loss, from the number of rows of the minibatch; None: nothing.

    Returns:
        Metrics of :func:`ppo_loss`, averaged over the updates, with ``grad_norm`` and ``updates``, how many were
        taken: fewer than all when ``target_kl`` was exceeded.

    Raises:
        ValueError: if there are more minibatches than rows.
    """
    count, device, rows_of_step = len(old.mask), old.mask.device, []
    if count < config.num_mini_batches:
        raise ValueError(
            f"num_mini_batches: got {config.num_mini_batches}, expected at most the {count} rows of a batch"
        )
    if config.whiten_advantages == "batch":
        old = replace(old, advantages=whiten(old.advantages, old.mask))
    history: list[dict[str, Tensor]] = []
    for _ in range(config.num_ppo_epochs):
        order = torch.arange(count, device=device)
        if config.shuffle:
            order = torch.randperm(count, generator=generator, device=device)
        rows_of_step += list(order.tensor_split(config.num_mini_batches))
    for rows in rows_of_step:
        loss, metrics = ppo_loss(predict(rows), old.rows(rows), config, scale)
        if history and config.target_kl is not None and metrics["policy/approxkl_avg"] > config.target_kl:
            break
        loss = loss if extra_loss is None else loss + extra_loss(len(rows))
        history.append(metrics | {"grad_norm": descend(loss)})
    means = {name: torch.stack([metrics[name] for metrics in history]).mean() for name in history[0]}
    return means | {"updates": torch.tensor(float(len(history)))}
