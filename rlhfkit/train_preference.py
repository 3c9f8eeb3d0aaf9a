"""Loops over preference pairs: reward models, and policies directly (DPO). Fine-tuning is in ``train_sft``."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rlhfkit.logprobs import next_token_logprobs, sequence_logprobs
from rlhfkit.models import GPT, Policy, ScalarModel
from rlhfkit.preference_losses import bradley_terry_loss, dpo_loss, implicit_rewards
from rlhfkit.train_sft import response_nll, train_sft
from rlhfkit.training import (
    BETAS,
    OnStep,
    Run,
    batch_of_step,
    bf16_autocast,
    cosine_lr,
    decayed,
    device_of,
    join_right_padded,
    pad_to_one_width,
    update,
)

__all__ = ["pair_logprobs", "response_nll", "score_responses", "train_dpo", "train_reward_model", "train_sft"]

PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]


def _joined_pairs(
    prompts: Tensor, chosen: Tensor, rejected: Tensor, pad_id: int
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[int, ...]]:
    """Whole sequences of both sides, (N, L) each; their response masks, (N, L) each; the longer side of every pair."""
    both = pad_to_one_width([chosen, rejected], pad_id)
    tokens, mask = join_right_padded(prompts.repeat(2, 1), both, pad_id)
    lengths = torch.maximum(*(tokens != pad_id).sum(1).chunk(2))
    return tokens.chunk(2), mask.chunk(2), tuple(lengths.tolist())


def train_reward_model(
    model: ScalarModel,
    prompts: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    *,
    steps: int,
    margins: Tensor | None = None,
    batch_size: int = 32,
    lr: float = 1e-3,
    warmup: int = 20,
    weight_decay: float = 0.01,
    center_rewards_coefficient: float = 0.0,
    max_grad_norm: float = 1.0,
    seed: int = 0,
    bf16: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: int = 100,
    on_step: OnStep | None = None,
) -> list[dict[str, float]]:
    """Fit a reward model to pairs: -log sigma(r(x, chosen) - r(x, rejected) - margin). Trains ``model`` in place.

    The score of a response is read at its last real token. Both sides of a batch go through the model together.

    Args:
        model: on any device; its trunk usually starts as a copy of the SFT model.
        prompts: (N, L0), integers, padded on the left with the trunk's ``pad_id``.
        chosen, rejected: (N, T) each, integers, ended and padded on the right.
        steps: updates.
        margins: (N,), reward units, subtracted from the difference; None: 0.
        batch_size: B, pairs per update.
        lr: peak learning rate of AdamW; linear warm-up, then a half cosine to 0.
        warmup: steps of warm-up.
        weight_decay: of the matrices.
        center_rewards_coefficient: weight of the mean of (r(chosen) + r(rejected))^2, which fixes the free constant.
        max_grad_norm: gradients are clipped to this norm.
        seed: of the order of the batches.
        bf16: matrix products in bfloat16.
        checkpoint: file to write the run to and to resume from; None: no file.
        save_every: steps between two writes.
        on_step: called with the step and its metrics.

    Returns:
        Metrics of every step: ``loss`` (nats per pair), ``accuracy``, ``margin`` (mean difference), ``min_reward``,
        ``mean_reward``, ``max_reward``, ``grad_norm``, ``lr``.

    Raises:
        ValueError: if shapes do not fit, or the file belongs to another run.
        FloatingPointError: at the first loss or gradient that is not finite.

    Source: Ouyang et al. 2022, arXiv:2203.02155, eq. 1, for two responses a prompt; the centring term is Eisenstein et
    al. 2023, arXiv:2312.09244.
    """
    pad_id, count = model.trunk.pad_id, len(prompts)
    if not len(prompts) == len(chosen) == len(rejected) or (margins is not None and margins.shape != (count,)):
        got = (
            f"{count}, {len(chosen)}, {len(rejected)} rows, margins {None if margins is None else tuple(margins.shape)}"
        )
        raise ValueError(f"prompts, chosen, rejected, margins: got {got}, expected one row per pair in each")
    (winners, losers), _, lengths = _joined_pairs(prompts, chosen, rejected, pad_id)
    recipe = {"loop": "reward model", "rows": count, "steps": steps, "batch_size": batch_size, "lr": lr}
    recipe |= {"warmup": warmup, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm, "seed": seed}
    recipe |= {"bf16": bf16, "center_rewards_coefficient": center_rewards_coefficient, "margins": margins is not None}
    optimizer = torch.optim.AdamW(decayed(model.named_parameters(), weight_decay), betas=BETAS, fused=True)
    run = Run(model, [optimizer], recipe, checkpoint, save_every)
    device = device_of(model)
    model.train()
    for step in run.steps(steps, "reward model"):
        rows = batch_of_step(lengths, batch_size, seed, step)
        width = max(lengths[i] for i in rows.tolist())
        both = torch.cat([winners[rows, :width], losers[rows, :width]]).to(device)
        with bf16_autocast(device, bf16):
            scores = model.scores(both).float()
        chosen_scores, rejected_scores = scores.chunk(2)
        margin = None if margins is None else margins[rows].to(scores)
        losses = bradley_terry_loss(chosen_scores, rejected_scores, margin)
        centring = (chosen_scores + rejected_scores).square().mean()
        loss = losses.mean() + center_rewards_coefficient * centring
        rate = cosine_lr(step, steps, lr, warmup)
        norm = update(model, run.optimizers, loss, rate, step, max_grad_norm)
        with torch.no_grad():
            difference = chosen_scores - rejected_scores
            metrics = {"loss": losses.mean(), "accuracy": (difference > 0).float().mean(), "margin": difference.mean()}
            metrics |= {"min_reward": scores.min(), "mean_reward": scores.mean(), "max_reward": scores.max()}
        run.log({**metrics, "grad_norm": norm, "lr": rate})
        if on_step is not None:
            on_step(step, run.history[-1])
    model.eval()
    return run.history


@torch.no_grad()
def score_responses(model: ScalarModel, prompts: Tensor, responses: Tensor, batch_size: int = 256) -> Tensor:
    """Score of every response by a reward model in evaluation mode.

    Args:
        model: on any device.
        prompts: (N, L0), integers, padded on the left.
        responses: (N, T), integers, padded on the right.
        batch_size: rows at a time.

    Returns:
        (N,), reward units, on the CPU.
    """
    tokens, _ = join_right_padded(prompts, responses, model.trunk.pad_id)
    return torch.cat([model.scores(part.to(device_of(model))).cpu() for part in tokens.split(batch_size)])


def _sequence_logprobs(policy: Policy, tokens: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of the masked tokens of whole sequences: (B, L) and (B, L) -> (B,), in float32 or better."""
    logits = policy.logits(tokens)
    logits = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    return sequence_logprobs(next_token_logprobs(logits, tokens), mask[:, 1:])


@torch.no_grad()
def _in_pieces(policy: Policy, tokens: Tensor, mask: Tensor, size: int) -> Tensor:
    """The same without gradient, ``size`` rows at a time: (B, L) and (B, L), on any device -> (B,)."""
    device, pieces = device_of(policy), zip(tokens.split(size), mask.split(size), strict=True)
    return torch.cat([_sequence_logprobs(policy, x.to(device), m.to(device)) for x, m in pieces])


@torch.no_grad()
def pair_logprobs(
    policy: Any, prompts: Tensor, chosen: Tensor, rejected: Tensor, batch_size: int = 256
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of both responses of every pair, summed over their tokens, by a policy in evaluation mode.

    Args:
        policy: has ``logits(tokens)`` and ``pad_id``, on any device.
        prompts: (N, L0), integers, padded on the left.
        chosen, rejected: (N, T) each, integers, ended and padded on the right.
        batch_size: pairs at a time.

    Returns:
        chosen_logprobs and rejected_logprobs, (N,) each, nats, on the CPU. What DPO needs of its reference.

    Raises:
        ValueError: if the numbers of rows differ.
    """
    _require_rows(prompts, chosen, rejected)
    sides, masks, _ = _joined_pairs(prompts, chosen, rejected, policy.pad_id)
    found = [_in_pieces(policy, tokens, mask, batch_size).cpu() for tokens, mask in zip(sides, masks, strict=True)]
    return found[0], found[1]


def _require_rows(prompts: Tensor, chosen: Tensor, rejected: Tensor) -> None:
    if not len(prompts) == len(chosen) == len(rejected) or not len(prompts):
        got = f"{len(prompts)}, {len(chosen)}, {len(rejected)} rows"
        raise ValueError(f"prompts, chosen, rejected: got {got}, expected one row per pair in each, and at least one")


def train_dpo(
    policy: GPT,
    ref: GPT,
    prompts: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    *,
    steps: int,
    beta: float = 0.1,
    loss: PairLoss = dpo_loss,
    precompute: bool = True,
    batch_size: int = 32,
    lr: float = 1e-4,
    warmup: int = 20,
    weight_decay: float = 0.0,
    max_grad_norm: float = 1.0,
    seed: int = 0,
    bf16: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    save_every: int = 100,
    on_step: OnStep | None = None,
) -> list[dict[str, float]]:
    """Direct preference optimisation on pairs: -log sigma(beta (log-ratio chosen - log-ratio rejected)). In place.

    Log-probabilities are summed over the response's tokens, its end included. Both sides of a batch go through the
    policy together. Dropout is off: policy and reference are compared on the same footing.

    Args:
        policy: trained in place, on any device; a copy of ``ref`` is the usual start.
        ref: the policy to stay near, never trained; not the same object as ``policy``.
        prompts: (N, L0), integers, padded on the left with the policy's ``pad_id``.
        chosen, rejected: (N, T) each, integers, ended and padded on the right.
        steps: updates.
        beta: reward units per nat, given to ``loss`` as its fifth argument.
        loss: a loss on pairs with the arguments of ``dpo_loss``, such as ``ipo_loss``.
        precompute: ask the reference once about all pairs, before the first step; otherwise about every batch. The
            same numbers; once is cheaper as soon as there is more than one pass over the pairs.
        batch_size: B, pairs per update.
        lr: peak learning rate of AdamW; linear warm-up, then a half cosine to 0.
        warmup: steps of warm-up.
        weight_decay: of the matrices.
        max_grad_norm: gradients are clipped to this norm.
        seed: of the order of the batches.
        bf16: matrix products in bfloat16.
        checkpoint: file to write the run to and to resume from; None: no file.
        save_every: steps between two writes.
        on_step: called with the step and its metrics.

    Returns:
        Metrics of every step, under TRL's names: ``loss``, ``rewards/chosen``, ``rewards/rejected``,
        ``rewards/accuracies``, ``rewards/margins`` (implicit rewards), ``logps/chosen``, ``logps/rejected`` (nats per
        response), ``grad_norm``, ``lr``.

    Raises:
        ValueError: if shapes do not fit, ``ref`` is the policy itself, or the file belongs to another run.
        FloatingPointError: at the first loss or gradient that is not finite.

    Source: Rafailov et al. 2023, arXiv:2305.18290, eq. 7.
    """
    _require_rows(prompts, chosen, rejected)
    if ref is policy:
        raise ValueError(
            "ref: got the policy itself, expected a frozen copy (with its own reference the loss is log 2)"
        )
    (winners, losers), (wins, loses), lengths = _joined_pairs(prompts, chosen, rejected, policy.pad_id)
    recipe = {"loop": "dpo", "rows": len(prompts), "steps": steps, "beta": beta, "batch_size": batch_size, "lr": lr}
    recipe |= {"loss": getattr(loss, "__name__", type(loss).__name__), "warmup": warmup, "seed": seed, "bf16": bf16}
    recipe |= {"weight_decay": weight_decay, "max_grad_norm": max_grad_norm, "precompute": precompute}
    optimizer = torch.optim.AdamW(decayed(policy.named_parameters(), weight_decay), betas=BETAS, fused=True)
    run = Run(policy, [optimizer], recipe, checkpoint, save_every)
    device = device_of(policy)
    at_once = 16 if device.type == "cpu" else 2 * batch_size  # a processor is fastest on what its caches hold
    policy.eval()
    ref.eval()
    with bf16_autocast(device, bf16):
        known = pair_logprobs(ref, prompts, chosen, rejected) if precompute else None
    for step in run.steps(steps, "DPO"):
        rows = batch_of_step(lengths, batch_size, seed, step)
        width = max(lengths[i] for i in rows.tolist())
        both = torch.cat([winners[rows, :width], losers[rows, :width]]).to(device)
        mask = torch.cat([wins[rows, :width], loses[rows, :width]]).to(device)
        with bf16_autocast(device, bf16):
            logprobs = _sequence_logprobs(policy, both, mask)
            if known is None:
                ref_logprobs = _in_pieces(ref, both, mask, at_once)
            else:
                ref_logprobs = torch.cat([side[rows] for side in known]).to(logprobs)
        (chosen_logprobs, rejected_logprobs), (ref_chosen, ref_rejected) = logprobs.chunk(2), ref_logprobs.chunk(2)
        losses = loss(chosen_logprobs, rejected_logprobs, ref_chosen, ref_rejected, beta)
        rate = cosine_lr(step, steps, lr, warmup)
        norm = update(policy, run.optimizers, losses.mean(), rate, step, max_grad_norm)
        rewards_chosen, rewards_rejected = implicit_rewards(logprobs, ref_logprobs, beta).chunk(2)
        margins = rewards_chosen - rewards_rejected
        means = {"loss": losses, "rewards/chosen": rewards_chosen, "rewards/rejected": rewards_rejected}
        means |= {"rewards/accuracies": (margins > 0).to(margins), "rewards/margins": margins}
        means |= {"logps/chosen": chosen_logprobs, "logps/rejected": rejected_logprobs}
        run.log({**{name: x.detach().mean() for name, x in means.items()}, "grad_norm": norm, "lr": rate})
        if on_step is not None:
            on_step(step, run.history[-1])
    return run.history
