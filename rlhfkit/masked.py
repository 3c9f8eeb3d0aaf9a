"""Means, variances and whitening over the entries that count, and the three ways to average a loss.

A mask is boolean and True where an entry counts. Selection is by ``torch.where``, never by multiplication:
``nan * 0`` is ``nan``, so a product would let the content of padding into the result and into the gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhfkit.validation import require_float, require_mask, require_ndim

Aggregation = Literal["token-mean", "sequence-mean", "sequence-sum"]


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of the entries of ``x`` where ``mask`` is True.

    Args:
        x: any shape, floating point.
        mask: same shape, bool.
        dim: axis to sum over; None sums everything.

    Returns:
        A scalar, or ``x`` without axis ``dim``. An empty selection sums to 0.

    Raises:
        ValueError: if ``x`` is not floating point, or ``mask`` is not boolean or has another shape.
    """
    require_float(x=x)
    require_mask("mask", mask, x.shape)
    selected = torch.where(mask, x, torch.zeros_like(x))
    return selected.sum() if dim is None else selected.sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of the entries of ``x`` where ``mask`` is True: sum of the selected entries over their number.

    Args:
        x: any shape, floating point.
        mask: same shape, bool.
        dim: axis to average over; None averages everything.

    Returns:
        A scalar, or ``x`` without axis ``dim``; there a row with nothing selected gives 0.

    Raises:
        ValueError: if shapes or dtypes are wrong, or with ``dim=None`` if nothing is selected.
    """
    total = masked_sum(x, mask, dim)
    if dim is not None:
        return total / mask.sum(dim).clamp(min=1)
    count = mask.sum()
    if not count:
        raise ValueError(f"mask: all {mask.numel()} entries are False, expected at least one True for a mean")
    return total / count


def masked_var(x: Tensor, mask: Tensor) -> Tensor:
    """Unbiased variance of the selected entries: sum of squared deviations over n - 1.

    Args:
        x: any shape, floating point.
        mask: same shape, bool.

    Returns:
        A scalar, in squared units of ``x``.

    Raises:
        ValueError: if shapes or dtypes are wrong, or if fewer than two entries are selected.
    """
    require_float(x=x)
    require_mask("mask", mask, x.shape)
    n = mask.sum()
    if n < 2:
        raise ValueError(f"mask: {int(n)} entries are True, expected at least two for a variance")
    x = torch.where(mask, x, torch.zeros_like(x))  # before squaring, whose gradient at nan is nan even times 0
    return masked_sum((x - masked_mean(x, mask)).square(), mask) / (n - 1)


def whiten(x: Tensor, mask: Tensor | None = None, shift_mean: bool = True) -> Tensor:
    """Scale the selected entries to unit variance, and to zero mean: (x - mean) / sqrt(var + 1e-8).

    Args:
        x: any shape, floating point.
        mask: same shape, bool; None selects everything.
        shift_mean: False adds the mean back, so that only the scale changes.

    Returns:
        Same shape as ``x``; entries outside the mask are 0 either way.

    Raises:
        ValueError: if shapes or dtypes are wrong, or if fewer than two entries are selected.

    Source: Huang et al. 2024, "The N implementation details of RLHF with PPO"; like TRL, the variance is
    unbiased (n - 1). OpenRLHF divides by n and clamps; Stable-Baselines3 adds its epsilon outside the root.
    """
    require_float(x=x)
    if mask is None:
        mask = torch.ones_like(x, dtype=torch.bool)
    scale = torch.rsqrt(masked_var(x, mask) + 1e-8)
    x = torch.where(mask, x, torch.zeros_like(x))
    mean = masked_mean(x, mask)
    mean = mean + masked_mean(x - mean, mask)  # without its rounding, which scale would make 1e4 times as large
    whitened = (x - mean) * scale
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened, torch.zeros_like(x))


def aggregate(losses: Tensor, mask: Tensor, how: Aggregation) -> Tensor:
    """Average the losses of tokens in one of three ways that weigh long responses differently.

    - ``"token-mean"``: every token of the batch counts the same, so long responses weigh more.
    - ``"sequence-mean"``: mean over sequences of the mean over their tokens; a token of a short response weighs more.
    - ``"sequence-sum"``: mean over sequences of the sum over their tokens; with ``reinforce_loss`` this one is the
      policy gradient, since the log-probability of a response is the sum over its tokens.

    Args:
        losses: one per token, (B, T).
        mask: (B, T), bool, True where the token counts.
        how: one of the three names.

    Returns:
        A scalar. A sequence without any True is left out of the outer mean.

    Raises:
        ValueError: if ``how`` is unknown, shapes or dtypes are wrong, or the whole mask is False.
    """
    require_ndim("losses", losses, "(B, T)")
    require_float(losses=losses)
    if how == "token-mean":
        return masked_mean(losses, mask)
    if how == "sequence-mean":
        per_sequence = masked_mean(losses, mask, dim=1)
    elif how == "sequence-sum":
        per_sequence = masked_sum(losses, mask, dim=1)
    else:
        raise ValueError(f'how: got {how!r}, expected "token-mean", "sequence-mean" or "sequence-sum"')
    return masked_mean(per_sequence, mask.any(1))
