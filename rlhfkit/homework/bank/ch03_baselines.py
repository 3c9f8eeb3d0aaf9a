"""Chapter 3, baselines and advantages: twelve questions, with the wrong answers that their checks must reject."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, tensor

from rlhfkit.homework.comparisons import (
    as_tensor,
    expect_close,
    expect_shape,
    in_two_steps,
    normal,
    numbers,
    orders,
    outcome,
    require,
    source,
    unpack,
)
from rlhfkit.homework.core import Question

# -- generalised advantage estimation --------------------------------------------------------------------


def gae(rewards, values, *, gamma, lam, mask=None, dones=None, last_values=None):  # type: ignore[no-untyped-def]
    """A_t = delta_t + gamma lam A_{t+1}, delta_t = r_t + gamma V_{t+1} - V_t. (B, T) -> (advantages, returns)."""
    if mask is None:
        mask = torch.ones_like(rewards, dtype=torch.bool)
    if dones is None:
        dones = torch.zeros_like(rewards, dtype=torch.bool)
    zero = torch.zeros_like(rewards[:, 0])
    next_values = zero if last_values is None else last_values
    next_advantages, columns = zero, []
    for t in reversed(range(rewards.shape[1])):
        ahead = torch.where(dones[:, t], zero, next_values + lam * next_advantages)
        advantages = rewards[:, t] + gamma * ahead - values[:, t]
        columns.append(torch.where(mask[:, t], advantages, zero))
        next_advantages = torch.where(mask[:, t], advantages, next_advantages)
        next_values = torch.where(mask[:, t], values[:, t], next_values)
    advantages = torch.stack(columns[::-1], dim=1)
    return advantages, torch.where(mask, advantages + values, torch.zeros_like(values))


_REWARDS, _VALUES, _LAST = [[1.0, 2.0, 3.0, 4.0]], [[0.5, -0.6, 0.7, 0.8]], [2.0]


def _advantages(f: Any, rewards: Tensor, values: Tensor, **options: Any) -> Tensor:
    pair = unpack(f(rewards.clone(), values.clone(), **options), 2, "gae returns (advantages, returns)")
    return as_tensor(pair[0], "advantages")


_LAST_DONE = tensor([[False] * 5 + [True], [False] * 6])


def _gae_probe(f: Any) -> list[Any]:
    r, v = normal(2, 6, seed=3), normal(2, 6, seed=4)
    mask = tensor([[True, True, False, True, True, False], [False, True, True, True, True, True]])
    dones = tensor([[False] * 6, [False, False, True, False, False, False]])
    last = tensor([1.3, -0.7])
    both = {
        "mask": mask,
        "dones": tensor([[False, False, True, True, False, False], [True, False, False, True, False, False]]),
    }
    return [
        list(f(r.clone(), v.clone(), gamma=0.9, lam=0.8, last_values=last)),
        list(f(r.clone(), v.clone(), gamma=0.5, lam=0.3, mask=mask, last_values=last)),
        list(f(r.clone(), v.clone(), gamma=0.9, lam=0.8, dones=dones, last_values=last)),
        list(f(r.clone(), v.clone(), gamma=0.9, lam=0.8, dones=_LAST_DONE.clone(), last_values=last)),
        [*f(r, v, gamma=0.9, lam=0.8, **both, last_values=last), r, v],
    ]


ga = Question(
    id="gae",
    title="generalised advantage estimation",
    chapter=3,
    kind="function",
    theory=False,
    variable="gae",
    reference=gae,
    reference_source=source(gae),
    hints=(
        "Write delta_t first, then walk backwards. Which two numbers must be carried from a step to the one before?",
        "A step with dones[t] has neither a next value nor a next advantage; a masked step carries both past itself.",
        "A_t = r_t + gamma (1 - done_t) (V' + lam A') - V_t, where V', A' belong to the next step that counts.",
    ),
    explanation="Carry the next value and the next advantage backwards. dones[t] cuts both, since nothing of the next "
    "episode belongs to this one; a masked step leaves both as they are and gets 0. The returns are A + V, raw.",
    probes=_gae_probe,
)


@ga.case("lam = 0 gives the one-step error delta", 1, "with lam = 0 only delta_t is left")
def _(f: Any) -> None:
    got = _advantages(f, tensor(_REWARDS), tensor(_VALUES), gamma=0.9, lam=0.0, last_values=tensor(_LAST))
    expect_close(
        got, tensor([[1 - 0.54 - 0.5, 2 + 0.63 + 0.6, 3 + 0.72 - 0.7, 4 + 1.8 - 0.8]]), "advantages at lam = 0"
    )


@ga.case("lam = 1 gives the discounted return minus the value", 1, "the values between telescope; last_values stays")
def _(f: Any) -> None:
    got = _advantages(f, tensor(_REWARDS), tensor(_VALUES), gamma=0.5, lam=1.0, last_values=tensor(_LAST))
    expect_close(got, tensor([[3.375 - 0.5, 4.75 + 0.6, 5.5 - 0.7, 5.0 - 0.8]]), "advantages at lam = 1, gamma = 0.5")


@ga.case("gamma and lam enter separately", 1, "the next value is multiplied by gamma only, the carried sum by both")
def _(f: Any) -> None:
    r, v, last = normal(3, 5, seed=1), normal(3, 5, seed=2), normal(3, seed=3)
    got = unpack(f(r, v, gamma=0.8, lam=0.6, last_values=last), 2, "gae returns (advantages, returns)")[0]
    delta = r + 0.8 * torch.cat([v[:, 1:], last[:, None]], 1) - v
    want = [sum(0.48 ** (k - t) * delta[:, k] for k in range(t, 5)) for t in range(5)]
    expect_close(got, torch.stack([torch.as_tensor(x) for x in want], 1), "advantages, gamma 0.8, lam 0.6")


@ga.case("a finished step cuts the rollout in two", 2, "compare with running each episode alone")
def _(f: Any) -> None:
    r, v, last = normal(3, 5, seed=4), normal(3, 5, seed=5), tensor([3.0, -1.0, 2.0])
    ends = (2, 4, 5)  # steps before the end of the first episode of each row; the last row has one episode
    dones = tensor([[t + 1 == end < 5 for t in range(5)] for end in ends])
    got = _advantages(f, r, v, gamma=0.9, lam=0.8, dones=dones, last_values=last)
    expect_shape(got, (3, 5), "advantages")
    for b, end in enumerate(ends):
        row, cut = slice(b, b + 1), {"last_values": last[b : b + 1]} if end == 5 else {}
        first = _advantages(f, r[row, :end], v[row, :end], gamma=0.9, lam=0.8, **cut)
        expect_close(got[row, :end], first, f"row {b}: first episode inside the batch of rollouts against alone")
        if end < 5:
            second = _advantages(f, r[row, end:], v[row, end:], gamma=0.9, lam=0.8, last_values=last[row])
            expect_close(got[row, end:], second, f"row {b}: second episode inside the batch of rollouts against alone")
            expect_close(got[b, end - 1], (r - v)[b, end - 1], f"row {b}: last step of the first episode")
    r, v, last = normal(2, 6, seed=10), normal(2, 6, seed=11), tensor([3.0, -1.0])
    got = _advantages(f, r, v, gamma=0.9, lam=0.8, dones=_LAST_DONE.clone(), last_values=last)
    expect_shape(got, (2, 6), "advantages")
    expect_close(got[0, 5], (r - v)[0, 5], "the last step of a rollout, with dones there: last_values may not enter")
    expect_close(got[1, 5], (r + 0.9 * last[:, None] - v)[1, 5], "the last step of the other rollout, without dones")


_MASK = [[True, True, False, True, True, False], [False, True, True, True, False, False], [True] * 6]


def _judge_masked(f: Any, r: Tensor, v: Tensor, last: Tensor, dones: Tensor | None) -> None:
    """The rollouts with masked steps against each of them alone, its masked steps removed by hand."""
    mask = tensor(_MASK)
    options = {} if dones is None else {"dones": dones}
    pair = f(r, v, gamma=0.9, lam=0.8, mask=mask, last_values=last, **options)
    got, returns = (as_tensor(x, "gae") for x in unpack(pair, 2, "gae returns (advantages, returns)"))
    expect_shape(got, (3, 6), "advantages")
    for b, counts in enumerate(mask):
        kept = {name: x[b][counts][None] for name, x in options.items()}
        alone = _advantages(
            f, r[b][counts][None], v[b][counts][None], gamma=0.9, lam=0.8, last_values=last[b : b + 1], **kept
        )
        expect_close(got[b][counts], alone[0], f"row {b}: steps that count, inside the batch against alone")
    expect_close(got[~mask], torch.zeros(5), "advantages of masked steps")
    require(bool(got.abs().sum() > 0), "the advantages are all 0")
    expect_close(returns, torch.where(mask, got + v, 0.0), "returns: advantages + values, 0 on masked steps")


@ga.case("masked steps are skipped and get 0 in both results", 1, "remove the masked steps by hand and compare")
def _(f: Any) -> None:
    _judge_masked(f, normal(3, 6, seed=6), normal(3, 6, seed=7), tensor([1.5, -2.0, 0.5]), None)


@ga.case("mask and dones work together; dones on a masked step is ignored", 1, "a masked step is skipped entirely")
def _(f: Any) -> None:
    dones = [[False, True, True, False, False, False], [True, False, True, False, True, False], [False] * 5 + [True]]
    _judge_masked(f, normal(3, 6, seed=8), normal(3, 6, seed=9), tensor([1.5, -2.0, 0.5]), tensor(dones))


@ga.case("advantages are raw, and returns are advantages plus values", 1, "whitening belongs to the loss")
def _(f: Any) -> None:
    def run(scale: float) -> tuple[Any, ...]:
        r, v = scale * tensor(_REWARDS), scale * tensor(_VALUES)
        return unpack(f(r, v, gamma=0.9, lam=0.8, last_values=scale * tensor(_LAST)), 2, "gae")

    (advantages, returns), (scaled, _) = run(1.0), run(10.0)
    a = as_tensor(advantages, "advantages")
    expect_shape(a, (1, 4), "advantages")
    expect_close(returns, a + tensor(_VALUES), "returns against advantages + values")
    expect_close(scaled, 10 * a, "ten times the rewards and values against ten times the advantages")


def _gae_with(
    *,
    cut_value: bool = True,
    cut_advantage: bool = True,
    shift: bool = False,
    use_lam: bool = True,
    use_gamma: bool = True,
    bootstrap: bool = True,
    skip: str = "skip",
    after: str = "",
) -> Callable[..., Any]:
    def f(
        rewards: Tensor,
        values: Tensor,
        *,
        gamma: float,
        lam: float,
        mask: Tensor | None = None,
        dones: Tensor | None = None,
        last_values: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        keep = torch.ones_like(rewards, dtype=torch.bool) if mask is None or skip == "ignore" else mask
        done = torch.zeros_like(rewards, dtype=torch.bool) if dones is None else dones
        if shift:
            done = torch.cat([done[:, 1:], torch.zeros_like(done[:, :1])], 1)
        if skip == "zeros":
            rewards, values = rewards * keep, values * keep
        zero = torch.zeros_like(rewards[:, 0])
        value = zero if last_values is None or not bootstrap else last_values
        advantage, out = zero, torch.zeros_like(rewards)
        for t in range(rewards.shape[1] - 1, -1, -1):
            v = torch.where(done[:, t], zero, value) if cut_value else value
            a = torch.where(done[:, t], zero, advantage) if cut_advantage else advantage
            new = rewards[:, t] + gamma * v - values[:, t] + (gamma if use_gamma else 1) * (lam if use_lam else 1) * a
            counts = keep[:, t] | (skip != "skip")
            out[:, t] = new
            advantage, value = torch.where(counts, new, advantage), torch.where(counts, values[:, t], value)
        out = torch.where(keep, out, torch.zeros_like(out)) if skip != "garbage" else out
        returns = torch.where(keep, out + values, torch.zeros_like(out))
        if after == "whiten":
            out = (out - out.mean()) / (out.std() + 1e-8)
        if after == "swap":
            out, returns = returns, out
        return out, (out if after == "same" else returns)

    return f


def _gae_first_row(rewards: Tensor, values: Tensor, **options: Any) -> Any:
    for name in ("mask", "dones"):
        if options.get(name) is not None:
            options[name] = options[name][:1].expand_as(rewards)
    return gae(rewards, values, **options)


def _gae_not_reset(rewards: Tensor, values: Tensor, **options: Any) -> Any:
    mask, dones, last = (options.pop(name, None) for name in ("mask", "dones", "last_values"))
    if mask is None and dones is None:
        return gae(rewards, values, last_values=last, **options)
    advantage, out = torch.zeros(()), torch.zeros_like(rewards)
    for b in range(len(rewards)):
        value = torch.zeros(()) if last is None else last[b]
        for t in reversed(range(rewards.shape[1])):
            if mask is not None and not mask[b, t]:
                continue
            if dones is not None and dones[b, t]:
                value = advantage = torch.zeros(())
            advantage = rewards[b, t] - values[b, t] + options["gamma"] * (value + options["lam"] * advantage)
            value, out[b, t] = values[b, t], advantage
    return out, out + (values if mask is None else values * mask)


def _gae_dones_of_masked(rewards: Tensor, values: Tensor, **options: Any) -> Any:
    mask, dones, last = (options.pop(name, None) for name in ("mask", "dones", "last_values"))
    if mask is None or dones is None:
        return gae(rewards, values, mask=mask, dones=dones, last_values=last, **options)
    value, out = torch.zeros_like(rewards[:, 0]) if last is None else last, torch.zeros_like(rewards)
    advantage = torch.zeros_like(value)
    for t in reversed(range(rewards.shape[1])):
        value, advantage = value * ~dones[:, t], advantage * ~dones[:, t]
        new = rewards[:, t] - values[:, t] + options["gamma"] * (value + options["lam"] * advantage)
        out[:, t] = new * mask[:, t]
        advantage, value = torch.where(mask[:, t], new, advantage), torch.where(mask[:, t], values[:, t], value)
    return out, (out + values) * mask


def _gae_mask_drops_dones(rewards: Tensor, values: Tensor, **options: Any) -> Any:
    return gae(
        rewards, values, **{**options, "dones": None if options.get("mask") is not None else options.get("dones")}
    )


def _gae_last_done_ignored(rewards: Tensor, values: Tensor, **options: Any) -> Any:
    if options.get("dones") is not None:
        options["dones"] = torch.cat([options["dones"][:, :-1], torch.zeros_like(options["dones"][:, -1:])], 1)
    return gae(rewards, values, **options)


def _gae_full_returns(rewards: Tensor, values: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    advantages, _ = gae(rewards, values, **options)
    return advantages, advantages + values


def _gae_in_place(rewards: Tensor, values: Tensor, **options: Any) -> Any:
    if options.get("mask") is not None:
        values *= options["mask"]
    return gae(rewards, values, **options)


def _monte_carlo_returns(rewards: Tensor, values: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    advantages, _ = gae(rewards, values, **options)
    plain = gae(rewards, torch.zeros_like(values), **{**options, "lam": 1.0})[1]
    return advantages, plain


for _name, _says, _options in [
    (
        "dones-ignored",
        "dones is ignored, so value and advantage leak from one episode into the other",
        {"cut_value": False, "cut_advantage": False},
    ),
    ("cut-value-only", "dones cuts the next value, but the carried advantage still leaks", {"cut_advantage": False}),
    (
        "cut-advantage-only",
        "dones cuts the carried advantage, but you bootstrap through the terminal state",
        {"cut_value": False},
    ),
    ("dones-shifted", "step t is cut by dones[t + 1]; dones[t] ends step t", {"shift": True}),
    ("no-lam", "lam is missing from the recursion", {"use_lam": False}),
    ("no-gamma", "the carried advantage needs gamma * lam, gamma is missing", {"use_gamma": False}),
    ("no-bootstrap", "last_values is ignored at the end of the rollout", {"bootstrap": False}),
    (
        "padding-as-zeros",
        "masked steps are treated as steps of reward 0 and value 0; they must be skipped",
        {"skip": "zeros"},
    ),
    ("mask-ignored", "the mask is ignored", {"skip": "ignore"}),
    ("mask-at-the-end", "you put 0 on masked steps at the end, but their values were used before", {"skip": "late"}),
    ("whitened", "you whitened the advantages inside gae", {"after": "whiten"}),
    ("swapped", "the two results are exchanged: advantages first, then returns", {"after": "swap"}),
    ("returns-are-advantages", "the returns must be advantages + values", {"after": "same"}),
]:
    ga.wrong(_name, _says, _gae_with(**_options))  # type: ignore[arg-type]
ga.plant(
    ("first-row-for-all", "mask and dones of the first rollout are used for all of them", _gae_first_row, "common"),
    (
        "not-reset",
        "the advantage carried back goes on from one rollout to the next: start at 0 in each",
        _gae_not_reset,
        "common",
    ),
    ("mask-drops-dones", "dones is ignored as soon as there is a mask", _gae_mask_drops_dones, "common"),
    (
        "dones-of-masked-steps",
        "dones on a masked step cuts the episode in your code: a masked step is skipped entirely",
        _gae_dones_of_masked,
        "common",
    ),
    (
        "last-done-ignored",
        "a done on the last step is ignored: nothing follows a finished episode, so last_values must not count there",
        _gae_last_done_ignored,
        "common",
    ),
    ("returns-on-masked-steps", "the returns of masked steps must be 0 as well", _gae_full_returns, "common"),
    ("in-place", "you changed the values of the caller: work on a copy", _gae_in_place, "common"),
)
ga.wrong(
    "monte-carlo-returns",
    "your returns are the discounted rewards; here returns = advantages + values at every lam",
    _monte_carlo_returns,
)


def _gae_by_matrix(rewards, values, *, gamma, lam, mask=None, dones=None, last_values=None):  # type: ignore[no-untyped-def]
    length = rewards.shape[1]
    out = torch.zeros(rewards.shape, dtype=torch.float64)
    for b in range(len(rewards)):
        kept = list(range(length)) if mask is None else torch.nonzero(mask[b]).flatten().tolist()
        v = [values[b, t].item() for t in kept] + [0.0 if last_values is None else last_values[b].item()]
        alive = [1.0 if dones is None else 1.0 - float(dones[b, t]) for t in kept]
        delta = [rewards[b, t].item() + gamma * alive[i] * v[i + 1] - v[i] for i, t in enumerate(kept)]
        for i, t in enumerate(kept):
            weight = 1.0
            for j in range(i, len(kept)):
                out[b, t] += weight * delta[j]
                weight *= gamma * lam * alive[j]
    keep = torch.ones_like(out) if mask is None else mask.double()
    return out, out + values * keep


ga.right("sums of deltas, float64", _gae_by_matrix)


# -- the best baseline -----------------------------------------------------------------------------------


def best_baseline(probs, scores):  # type: ignore[no-untyped-def]
    """The constant baseline with the least total variance. (N,), (N,) -> number."""
    squared_norms = (torch.eye(len(probs)) - probs).square().sum(1)  # |1_y - pi|^2
    weights = probs * squared_norms
    return (weights * scores).sum() / weights.sum()


def _variance(probs: Tensor, scores: Tensor, baseline: float) -> float:
    p = probs.double()
    score = torch.eye(len(p), dtype=torch.float64) - p
    estimate = (scores.double() - baseline)[:, None] * score
    mean = p @ estimate
    return (p @ (estimate - mean).square().sum(1)).item()


_SMALL = [([0.9, 0.1], [1.0, 0.0]), ([0.3, 0.7], [2.0, 5.0]), ([0.6, 0.4], [-1.0, 4.0])]
_LARGER = [([0.7, 0.2, 0.1], [1.0, 0.0, 3.0]), ([0.1, 0.2, 0.3, 0.4], [2.0, -1.0, 0.5, 4.0])]

bb = Question(
    id="best_baseline",
    title="the constant baseline with the least variance",
    chapter=3,
    kind="property",
    theory=True,
    variable="best_baseline",
    reference=best_baseline,
    reference_source=source(best_baseline),
    hints=(
        "The mean of the estimate does not depend on b, so only the second moment E[(s - b)^2 |g|^2] matters.",
        "It is a parabola in b: set its derivative to 0. Which weight does each response get?",
        "b = E[|g|^2 s] / E[|g|^2] with g = 1_y - pi, both expectations under pi.",
    ),
    explanation="The second moment is E[|g|^2 (s - b)^2]; its derivative in b vanishes at E[|g|^2 s] / E[|g|^2]. With "
    "two responses |g|^2 is proportional to (1 - p)^2 and p^2, so the weights are those of the policy, swapped. The "
    "value V has the policy's own weights and is not the best.",
    probes=lambda f: [as_tensor(f(tensor(p), tensor(s)), "probe") for p, s in _SMALL + _LARGER],
)


def _judge_baseline(f: Any, worlds: Sequence[tuple[list[float], list[float]]], least: Callable[..., float]) -> None:
    for p, s in worlds:
        b = as_tensor(f(tensor(p), tensor(s)), "baseline")
        require(
            b.numel() == 1 and bool(torch.isfinite(b).all()), f"expected one finite number, got shape {tuple(b.shape)}"
        )
        variance, bound = _variance(tensor(p), tensor(s), b.flatten()[0].item()), least(tensor(p), tensor(s))
        message = f"pi {p}, scores {s}: with your baseline {b.flatten()[0]:.4g} the variance is {variance:.5f}"
        require(variance <= bound + 1e-6 + 1e-6 * bound, f"{message}, the least possible is {bound:.5f}")


@bb.case("two responses: the variance can be brought to 0", 2, "both estimates must then be equal; solve for b")
def _(f: Any) -> None:
    _judge_baseline(f, _SMALL, lambda p, s: 0.0)


@bb.case(
    "three and four responses: no other constant does better",
    2,
    "the variance is a parabola in b: where is its lowest point?",
)
def _(f: Any) -> None:
    def least(p: Tensor, s: Tensor) -> float:
        v0, v1, v2 = (_variance(p, s, b) for b in (0.0, 1.0, 2.0))  # a parabola through three points
        a, c = (v2 - 2 * v1 + v0) / 2, v0
        b = v1 - v0 - a
        return c - b * b / (4 * a)

    _judge_baseline(f, _LARGER, least)


def _norms(p: Tensor) -> Tensor:
    return (torch.eye(len(p)) - p).square().sum(1)


bb.plant(
    (
        "value",
        "this is the value V: it often lowers the variance, but its weights are not the best",
        lambda p, s: (p * s).sum(),
        "W-BL-2",
    ),
    ("none", "without a baseline the variance is not the least", lambda p, s: 0.0, "common"),
    ("plain-mean", "the plain mean ignores the policy", lambda p, s: s.mean(), "W-BL-6"),
    (
        "norm-not-squared",
        "weigh with the squared norm of the score function, not with the norm",
        lambda p, s: (p * _norms(p).sqrt() * s).sum() / (p * _norms(p).sqrt()).sum(),
        "common",
    ),
    (
        "no-probabilities",
        "the expectations need the probabilities of the responses",
        lambda p, s: (_norms(p) * s).sum() / _norms(p).sum(),
        "common",
    ),
    ("not-divided", "E[|g|^2 s] must be divided by E[|g|^2]", lambda p, s: (p * _norms(p) * s).sum(), "common"),
    (
        "swapped-weights",
        "1 - pi(y) is right for two responses only",
        lambda p, s: ((1 - p) * s).sum() / (1 - p).sum(),
        "common",
    ),
    (
        "own-entry-only",
        "(1 - pi(y))^2 is one entry of the score function, squared: the squared norm adds up all of them",
        lambda p, s: (p * (1 - p).square() * s).sum() / (p * (1 - p).square()).sum(),
        "common",
    ),
    ("best-score", "the largest score is no baseline of least variance", lambda p, s: s.max(), "W-BL-5"),
)


def _closed_form(p: Tensor, s: Tensor) -> Any:
    q, r = p.numpy().astype(float), s.numpy()
    w = q * (1 - 2 * q + (q * q).sum())
    return float((w * r).sum() / w.sum())


bb.right("numpy, |g|^2 = 1 - 2 pi(y) + sum pi^2", _closed_form)
bb.right("a tensor of one entry", lambda p, s: best_baseline(p.double(), s.double()).reshape(1))


# -- the value baseline can raise the variance -----------------------------------------------------------

vb = Question(
    id="value_baseline_variance",
    title="variance without a baseline, with the value, with the best one",
    chapter=3,
    kind="numbers",
    theory=True,
    variable="variances",
    reference=[0.0009, 0.0576, 0.0],
    reference_source="variances = [0.0009, 0.0576, 0.0]",
    accept=numbers(3),
    hints=(
        "Only two outcomes: write the estimate (r - b) g for each of them, g = 0.1 and g = -0.9.",
        "Variance is the mean of the squares minus the square of the mean; the mean is 0.09 for every b.",
        "For b = V = 0.9: values 0.01 and 0.81, so 0.9 * 0.0001 + 0.1 * 0.6561 - 0.0081 = 0.0576.",
    ),
    explanation="b = 0: values 0.1 and 0, variance 0.009 - 0.0081 = 0.0009. b = V = 0.9: values 0.01 and 0.81, variance "
    "0.0657 - 0.0081 = 0.0576, 64 times as much. b = 0.1 (weights swapped): both values are 0.09, variance 0.",
    probes=lambda x: x * 100,
)


def _coin_variance(baseline: float) -> float:
    """Variance of (r - b) g for pi = (0.9, 0.1), r = (1, 0), one free logit: g = 0.1 and -0.9."""
    estimates = [(1 - baseline) * 0.1, (0 - baseline) * -0.9]
    mean = 0.9 * estimates[0] + 0.1 * estimates[1]
    return 0.9 * (estimates[0] - mean) ** 2 + 0.1 * (estimates[1] - mean) ** 2


for _index, _b, _what in [(0, 0.0, "no baseline"), (1, 0.9, "the value as baseline"), (2, 0.1, "the best baseline")]:

    def _judge(x: Any, index: int = _index, b: float = _b, what: str = _what) -> None:
        require(x.abs().sum() > 0, "a variance of 0 with every baseline cannot be")
        expect_close(x[index], _coin_variance(b), f"variance with {what}", rtol=0.02, atol=2e-5, tell_expected=False)

    vb.case(f"the variance with {_what}", 1, "mean of the squares minus square of the mean")(_judge)
vb.plant(
    (
        "value-is-better",
        "you have the first two exchanged: here the value raises the variance",
        [0.0576, 0.0009, 0.0],
        "W-BL-2",
    ),
    (
        "value-is-best",
        "the value is not the best baseline: with b = 0.9 the two outcomes give 0.01 and 0.81",
        [0.0009, 0.0, 0.0],
        "W-BL-2",
    ),
    (
        "second-moments",
        "these are means of squares: subtract the square of the mean, 0.0081",
        [0.009, 0.0657, 0.0081],
        "common",
    ),
    ("standard-deviations", "these are standard deviations, not variances", [0.03, 0.24, 0.0], "common"),
    (
        "two-logits",
        "there is one free logit here, not two: these are twice the variances",
        [0.0018, 0.1152, 0.0],
        "common",
    ),
    (
        "of-the-reward",
        "this is the variance of r - b; the estimate is (r - b) times the score function",
        [0.09, 0.09, 0.09],
        "common",
    ),
    (
        "not-below-no-baseline",
        "with b = 0.1 both outcomes give 0.09, so the least variance is 0",
        [0.0009, 0.0576, 0.0009],
        "common",
    ),
)
vb.right("rounded", (0.0009, 0.058, 0))
vb.right("fractions", (Fraction(9, 10000), Fraction(576, 10000), Fraction(0)))


def _shrinkage(group_size: int) -> float:
    """Ratio of the expected gradient with the group mean to the exact one, by enumeration of all groups."""
    p, r = tensor([0.7, 0.3]).double(), tensor([1.0, 3.0]).double()
    score = tensor([0.3, -0.7]).double()
    exact = (p * r * score).sum()
    total = torch.zeros((), dtype=torch.float64)
    for ys in itertools.product(range(2), repeat=group_size):
        y = tensor(ys)
        total += p[y].prod() * ((r[y] - r[y].mean()) * score[y]).mean()
    return float(total / exact)


# -- what a baseline may depend on -----------------------------------------------------------------------

_FACTORS = [1.0, 1.0, 0.5, 0.0, 0.75, 1.0]
bd = Question(
    id="baseline_dependence",
    title="factor on the expected gradient for six baselines",
    chapter=3,
    kind="numbers",
    theory=True,
    variable="factors",
    reference=_FACTORS,
    reference_source="factors = [1, 1, 0.5, 0, 0.75, 1]",
    accept=numbers(6),
    hints=(
        "For each baseline: does it change if only the own response y changes?",
        "If it does not, E[b grad log pi] = b E[grad log pi] = 0. If it does, compute E[(r - b) grad log pi].",
        "r - r/2 = r/2 and r - r = 0. For the group mean, r_i - mean = (1 - 1/G)(r_i - mean of the others).",
    ),
    explanation="The constant, the value and the mean of the others do not contain the own response: factor 1. "
    "r/2 leaves half of the reward, r leaves nothing, and the mean over G = 4 with the own score inside leaves "
    "1 - 1/4 of the gradient.",
    probes=lambda x: x,
)


@bd.case("baselines that do not see the own response change nothing", 1, "b E[grad log pi] = 0 for a constant b")
def _(x: Any) -> None:
    require(x.max() > x.min(), "the six factors are not all the same")
    expect_close(x[tensor([0, 1, 5])], tensor([1.0, 1.0, 1.0]), "(a), (b), (f)", atol=6e-3, tell_expected=False)


@bd.case("baselines that contain the own score shrink the gradient", 2, "what is left of r - b?")
def _(x: Any) -> None:
    require(not torch.allclose(x[2:5], torch.ones(3).double()), "(c), (d), (e): they do contain the own score")
    expect_close(x[2:4], tensor([0.5, 0.0]), "(c), (d)", atol=6e-3, tell_expected=False)
    expect_close(x[4], _shrinkage(4), "(e)", atol=6e-3, tell_expected=False)


bd.plant(
    ("all-harmless", "a baseline that depends on the own response changes the gradient", [1.0] * 6, "W-BL-1"),
    (
        "group-mean-harmless",
        "the own score is inside the group mean, so the gradient shrinks",
        [1.0, 1.0, 0.5, 0.0, 1.0, 1.0],
        "W-BL-3",
    ),
    (
        "others-shrink-too",
        "the mean of the others does not contain the own score: factor 1",
        [1.0, 1.0, 0.5, 0.0, 0.75, 0.75],
        "common",
    ),
    (
        "value-removes-all",
        "subtracting V leaves the advantage, whose gradient is the full one",
        [1.0, 0.0, 0.5, 0.0, 0.75, 1.0],
        "common",
    ),
    (
        "half-is-a-constant",
        "r(y)/2 depends on the response: half of the gradient is left",
        [1.0, 1.0, 1.0, 0.0, 0.75, 1.0],
        "W-BL-1",
    ),
    (
        "lost-part",
        "(e) keeps 1 - 1/G of the gradient; 1/G is the part that is lost",
        [1.0, 1.0, 0.5, 0.0, 0.25, 1.0],
        "W-BL-3",
    ),
    (
        "perfect-baseline",
        "b = r has variance 0, but the gradient is 0 as well",
        [1.0, 1.0, 0.5, 1.0, 0.75, 1.0],
        "W-BL-1",
    ),
)
bd.right("a tensor", tensor([1.0, 1.0, 0.5, 0.0, 0.75, 1.0], dtype=torch.float64))


# -- the mean of the others ------------------------------------------------------------------------------


def leave_one_out_baseline(scores):  # type: ignore[no-untyped-def]
    """Mean score of the other responses to the same prompt. (P, G) -> (P, G)."""
    return (scores.sum(1, keepdim=True) - scores) / (scores.shape[1] - 1)


gb = Question(
    id="group_baseline",
    title="the mean of the other responses",
    chapter=3,
    kind="function",
    theory=False,
    variable="leave_one_out_baseline",
    reference=leave_one_out_baseline,
    reference_source=source(leave_one_out_baseline),
    hints=(
        "Which scores may enter the baseline of response i, and how many are they?",
        "Take the sum over the group, remove the own score, divide by what is left.",
        "(scores.sum(1, keepdim=True) - scores) / (G - 1).",
    ),
    explanation="The sum of the group minus the own score, divided by G - 1. The own score is out, so the baseline does "
    "not depend on the own response and the expected gradient is the exact one.",
    probes=lambda f: [f(normal(3, 4, seed=1)), f(normal(2, 3, seed=2))],
)


@gb.case("two groups by hand", 1, "the first entry of (1, 2, 6) is the mean of 2 and 6")
def _(f: Any) -> None:
    got = f(tensor([[1.0, 2.0, 6.0], [0.0, 0.0, 3.0]]))
    expect_close(got, tensor([[4.0, 3.5, 1.5], [1.5, 1.5, 0.0]]), "scores (1, 2, 6) and (0, 0, 3)")
    got = f(tensor([[0.13, 0.25, -40.6]]))
    expect_close(got, tensor([[-20.175, -20.235, 0.19]]), "scores (0.13, 0.25, -40.6)")


@gb.case("the own score does not enter its own baseline", 1, "change one score: whose baselines may move?")
def _(f: Any) -> None:
    scores = normal(2, 4, seed=3)
    changed = scores.clone()
    changed[0, 1] += 6.0
    before, after = as_tensor(f(scores), "baseline"), as_tensor(f(changed), "baseline")
    expect_shape(before, (2, 4), "baselines")
    expect_close(
        after - before, tensor([[2.0, 0.0, 2.0, 2.0], [0.0] * 4]), "change of the baselines when one score grows by 6"
    )


@gb.case("if all others got 3 the baseline is 3, whatever the own score", 1, "the mean of equal scores is that score")
def _(f: Any) -> None:
    got = as_tensor(f(tensor([[9.0, 3.0, 3.0, 3.0], [3.0, 3.0, 3.0, 3.0]])), "baselines")
    expect_shape(got, (2, 4), "baselines")
    expect_close(got[0, 0], 3.0, "baseline of the score 9 in the group (9, 3, 3, 3)")
    expect_close(got[1], tensor([3.0, 3.0, 3.0, 3.0]), "baselines in the group (3, 3, 3, 3)")


def _std(s: Tensor) -> Tensor:
    return (s - leave_one_out_baseline(s)) / (s.std(1, keepdim=True) + 1e-4)


gb.plant(
    (
        "own-included",
        "the own score is still inside the mean",
        lambda s: s.mean(1, keepdim=True).expand_as(s),
        "W-BL-3",
    ),
    (
        "divided-by-G",
        "G - 1 scores are left, but you divided by G",
        lambda s: (s.sum(1, keepdim=True) - s) / s.shape[1],
        "common",
    ),
    (
        "whole-batch",
        "you averaged over all prompts; the group is one prompt's responses",
        lambda s: (s.sum() - s) / (s.numel() - 1),
        "common",
    ),
    (
        "wrong-axis",
        "you averaged over the prompts instead of the responses",
        lambda s: (s.sum(0, keepdim=True) - s) / (len(s) - 1),
        "common",
    ),
    ("advantage", "these are advantages, score minus baseline", lambda s: s - leave_one_out_baseline(s), "common"),
    ("normalised", "these are advantages divided by the group's spread", _std, "W-BL-9"),
    (
        "not-subtracted",
        "the own score was not removed from the sum",
        lambda s: s.sum(1, keepdim=True).expand_as(s) / (s.shape[1] - 1),
        "common",
    ),
    (
        "next-response",
        "one other response is unbiased, but the task is the mean of all others",
        lambda s: s.roll(-1, 1),
        "common",
    ),
    (
        "rounded",
        "you rounded the baselines: they go into a gradient, so keep their digits",
        lambda s: leave_one_out_baseline(s).round(decimals=1),
        "common",
    ),
)


def _loo_by_loop(scores: Any) -> list[list[float]]:
    rows = scores.tolist()
    return [[sum(r for j, r in enumerate(row) if j != i) / (len(row) - 1) for i in range(len(row))] for row in rows]


def _loo_by_matrix(scores: Tensor) -> Tensor:
    g = scores.shape[1]
    return scores.double() @ ((torch.ones(g, g) - torch.eye(g)) / (g - 1)).double()


gb.right("python lists", _loo_by_loop)
gb.right("matrix, float64", _loo_by_matrix)


# -- how much the group mean shrinks the gradient --------------------------------------------------------


def group_mean_shrinkage(G):  # type: ignore[no-untyped-def]
    """Factor on the expected gradient when the mean of all G scores is the baseline. int -> number."""
    return 1 - 1 / G


gs = Question(
    id="group_mean_shrinkage",
    title="how much a group mean that includes the own score shrinks the gradient",
    chapter=3,
    kind="for every G",
    theory=True,
    variable="group_mean_shrinkage",
    reference=group_mean_shrinkage,
    reference_source=source(group_mean_shrinkage),
    hints=(
        "Split the mean: own score over G, plus the others.",
        "r_i - mean = (1 - 1/G) r_i - (1/G) (sum of the others). Which part has an expected gradient of 0?",
        "(G - 1)/G.",
    ),
    explanation="r_i minus the mean is (1 - 1/G) r_i minus terms without the own response, whose expected gradient is "
    "0. So the factor is (G - 1)/G: 1/2 for pairs, close to 1 for large groups.",
    probes=lambda f: [as_tensor(f(k), "probe") for k in (2, 3, 8, 50)],
)


@gs.case("G = 2, 3, 4, 6, against all groups listed", 1, "G = 2: half of the own score is subtracted from itself")
def _(f: Any) -> None:
    for k in (2, 3, 4, 6):
        expect_close(f(k), _shrinkage(k), f"G = {k}", atol=1e-3)


@gs.case("tends to 1, and the missing part times G is 1", 1, "how much does one score weigh among G?")
def _(f: Any) -> None:
    for k in (10, 1000):
        missing = (1 - as_tensor(f(k), "factor")) * k
        expect_close(missing, 1.0, f"(1 - factor) G at G = {k}", rtol=1e-3)


gs.plant(
    ("unbiased", "the own score is inside the mean, so the gradient does shrink", lambda k: 1.0, "W-BL-3"),
    ("correction", "that is the factor that repairs it, not the factor itself", lambda k: k / (k - 1), "common"),
    ("lost-part", "1/G is the part that is lost", lambda k: 1 / k, "W-BL-3"),
    (
        "squared",
        "the factor enters once, not squared: it is the gradient, not the variance",
        lambda k: (1 - 1 / k) ** 2,
        "common",
    ),
    ("root", "this is the factor of a standard deviation", lambda k: math.sqrt(1 - 1 / k), "common"),
    ("others-count", "the own score weighs 1/G, not 1/(G - 1)", lambda k: 1 - 1 / (k - 1), "common"),
)
gs.right("one fraction", lambda k: (k - 1) / k)
gs.right("three decimals", lambda k: round(1 - 1 / k, 3))
gs.right("a fraction", lambda k: 1 - Fraction(1, k))
gs.right("numpy", lambda k: np.float64(k - 1) / k)


# -- what an advantage compares with ---------------------------------------------------------------------


def advantages_of(probs, action_values):  # type: ignore[no-untyped-def]
    """Advantages in each of S states. (S, N), (S, N) -> (S, N)."""
    return action_values - (probs * action_values).sum(1, keepdim=True)


ad = Question(
    id="advantage_definition",
    title="advantages from action values",
    chapter=3,
    kind="symbolic",
    theory=True,
    variable="advantages_of",
    reference=advantages_of,
    reference_source=source(advantages_of),
    hints=(
        "An advantage says how much better an action is than something. Than what?",
        "Than the policy's own average in that state. The advantage of always doing the same thing is 0.",
        "A(s, a) = Q(s, a) - sum_b pi(b|s) Q(s, b).",
    ),
    explanation="V(s) is the mean of Q(s, a) under the policy, so A = Q - V has mean 0 under the policy in every state. "
    "For pi = (0.9, 0.1), Q = (1, 0): V = 0.9 and A = (0.1, -0.9).",
    probes=lambda f: [
        f(normal(2, 3, seed=1).softmax(1), normal(2, 3, seed=2)),
        f(tensor([[0.9, 0.1]]), tensor([[1.0, 0.0]])),
    ],
)


@ad.case("pi = (0.9, 0.1), Q = (1, 0)", 1, "V is 0.9, not 0.5")
def _(f: Any) -> None:
    expect_close(f(tensor([[0.9, 0.1]]), tensor([[1.0, 0.0]])), tensor([[0.1, -0.9]]), "advantages")


@ad.case("their mean under the policy is 0 in every state", 1, "weigh them with the policy and add")
def _(f: Any) -> None:
    probs = normal(3, 4, seed=3).softmax(1)
    got = as_tensor(f(probs, normal(3, 4, seed=4)), "advantages")
    expect_shape(got, (3, 4), "advantages")
    require(got.abs().sum() > 0, "your advantages are all 0")
    expect_close((probs * got).sum(1), torch.zeros(3), "mean under the policy")


@ad.case("differences between actions are those of Q", 1, "only a number per state is subtracted")
def _(f: Any) -> None:
    q = normal(3, 4, seed=5)
    got = as_tensor(f(normal(3, 4, seed=6).softmax(1), q), "advantages")
    expect_shape(got, (3, 4), "advantages")
    expect_close(got - got[:, :1], q - q[:, :1], "difference to the first action")


def _whitened(p: Tensor, q: Tensor) -> Tensor:
    a = advantages_of(p, q)
    return a / (p * a.square()).sum(1, keepdim=True).sqrt()


ad.plant(
    (
        "uniform",
        "you compared with an action chosen uniformly; compare with the policy's own average",
        lambda p, q: q - q.mean(1, keepdim=True),
        "W-BL-6",
    ),
    (
        "best-action",
        "you compared with the best action: that is V*, not the policy's V",
        lambda p, q: q - q.amax(1, keepdim=True),
        "W-BL-5",
    ),
    ("action-values", "this is Q itself: V, its average over the policy, must be subtracted", lambda p, q: q, "W-BL-4"),
    ("sign", "this is V - Q", lambda p, q: -advantages_of(p, q), "common"),
    (
        "weighted",
        "you multiplied the advantages by pi; that is the gradient in the logits",
        lambda p, q: p * advantages_of(p, q),
        "common",
    ),
    (
        "all-states",
        "you averaged over all states; V belongs to one state",
        lambda p, q: q - (p * q).sum() / len(q),
        "common",
    ),
    ("scaled", "you divided by the spread: an advantage is in units of reward", _whitened, "common"),
)
ad.right("einsum, float64", lambda p, q: q.double() - torch.einsum("sa,sa->s", p.double(), q.double())[:, None])
ad.right("numpy", lambda p, q: q.numpy() - (p.numpy() * q.numpy()).sum(1, keepdims=True))


# -- V, Q and A of a policy ------------------------------------------------------------------------------

bn = Question(
    id="bellman_numbers",
    title="V, Q and A of a policy, by hand",
    chapter=3,
    kind="numbers",
    theory=True,
    variable="values",
    reference=[4.0, 3.0, -2.0],
    reference_source="values = [4.0, 3.0, -2.0]",
    accept=numbers(3),
    hints=(
        "V averages Q over the actions. Whose probabilities are used?",
        "Q(s, a) is the reward plus the discounted V of the next state: the policy goes on choosing there.",
        "V(s') = 0.75 * 2 + 0.25 * 10; Q(s, a) = 1 + 0.5 V(s'); A(s', first) = 2 - V(s').",
    ),
    explanation="V(s') = 4 is the policy's average. Q(s, a) = 1 + 0.5 * 4 = 3; with the best next action in place of "
    "the average you would get 6, the value of another, greedy policy. A(s', first) = 2 - 4 = -2.",
    probes=lambda x: x,
)
_V_NEXT = 0.75 * 2 + 0.25 * 10
for _index, _want, _what, _hint in [
    (0, _V_NEXT, "V(s')", "the average of Q under the policy"),
    (1, 1 + 0.5 * _V_NEXT, "Q(s, a)", "the next action is drawn from the policy, too"),
    (2, 2 - _V_NEXT, "A(s', first action)", "Q of that action minus V"),
]:

    def _judge_number(x: Any, index: int = _index, want: float = _want, what: str = _what) -> None:
        expect_close(x[index], want, what, atol=1e-3, tell_expected=False)

    bn.case(_what, 1, _hint)(_judge_number)
bn.plant(
    (
        "greedy-next",
        "Q of the policy averages the next action over the policy; you took the best one",
        [4.0, 6.0, -2.0],
        "W-BL-5",
    ),
    ("greedy", "you took the best action everywhere: these belong to the greedy policy", [10.0, 6.0, -8.0], "W-BL-5"),
    ("uniform", "you averaged the actions uniformly; use the policy's probabilities", [6.0, 4.0, -4.0], "W-BL-6"),
    ("V-is-Q", "V does not fix the first action: that would be Q", [2.0, 2.0, 0.0], "W-BL-4"),
    ("no-discount", "gamma is missing", [4.0, 5.0, -2.0], "common"),
    ("no-reward", "the reward of the step itself is missing", [4.0, 2.0, -2.0], "common"),
    ("sign-of-A", "A is Q minus V", [4.0, 3.0, 2.0], "common"),
)
bn.right("integers", (4, 3, -2))


# -- the weights inside GAE ------------------------------------------------------------------------------


def gae_weights(num_steps, lam):  # type: ignore[no-untyped-def]
    """Weights of the k-step estimates k = 1, ..., T in GAE at the first of T steps. -> T numbers."""
    weights = [(1 - lam) * lam ** (k - 1) for k in range(1, num_steps)]
    return [*weights, lam ** (num_steps - 1)]


gw = Question(
    id="gae_weights",
    title="GAE as a mixture of k-step estimates",
    chapter=3,
    kind="symbolic",
    theory=True,
    variable="gae_weights",
    reference=gae_weights,
    reference_source=source(gae_weights),
    hints=(
        "What do the weights of a mixture sum to? Try lam = 1.",
        "In an endless episode the weights (1 - lam) lam^(k-1) sum to 1. Which estimates beyond T are all the same?",
        "(1 - lam) lam^(k-1) for k < T, and lam^(T-1) for k = T.",
    ),
    explanation="Beyond the end of the episode all k-step estimates equal the one for k = T, which so takes the weights "
    "of all of them: sum over k >= T of (1 - lam) lam^(k-1) = lam^(T-1).",
    probes=lambda f: [f(4, 0.7), f(6, 0.9), f(3, 0.2), f(1, 0.7)],
)


@gw.case("they sum to 1, at lam = 1 too", 1, "a mixture")
def _(f: Any) -> None:
    for steps, lam in ((4, 0.7), (6, 0.3), (3, 1.0), (1, 0.7)):
        weights = as_tensor(f(steps, lam), "weights")
        expect_shape(weights, (steps,), f"T = {steps}")
        expect_close(weights.sum(), 1.0, f"sum of the weights, T = {steps}, lam = {lam:g}", atol=4e-3)


@gw.case("the mixture of k-step estimates equals GAE", 2, "compare with sum_k (gamma lam)^k delta_k")
def _(f: Any) -> None:
    gamma = 0.95
    for steps, lam in ((4, 0.7), (5, 0.4)):
        r, v = normal(steps, seed=1).double(), normal(steps + 1, seed=2).double()
        delta = r + gamma * v[1:] - v[:-1]
        want = sum((gamma * lam) ** k * delta[k] for k in range(steps))
        k_step = []
        for k in range(1, steps + 1):
            discounts = gamma ** torch.arange(k).double()
            k_step.append((discounts * r[:k]).sum() + gamma**k * v[k] - v[0])
        weights = as_tensor(f(steps, lam), "weights")
        expect_shape(weights, (steps,), f"T = {steps}")
        expect_close((weights * torch.stack(k_step)).sum(), want, f"mixture, T = {steps}, lam = {lam:g}", atol=6e-3)


@gw.case("lam = 0 puts all weight on one step", 1, "GAE at lam = 0 is delta")
def _(f: Any) -> None:
    expect_close(f(4, 0.0), tensor([1.0, 0.0, 0.0, 0.0]), "weights, T = 4, lam = 0", atol=1e-3)


def _no_tail(n: int, lam: float) -> list[float]:
    return [(1 - lam) * lam**k for k in range(n)]


gw.plant(
    ("no-tail", "the last weight must take all the rest, lam^(T-1): yours do not sum to 1", _no_tail, "W-BL-8"),
    (
        "renormalised",
        "you divided by the sum; the rest belongs to the last estimate alone",
        lambda n, lam: [w / max(sum(_no_tail(n, lam)), 1e-12) for w in _no_tail(n, lam)],
        "W-BL-8",
    ),
    ("powers", "the factor 1 - lam is missing", lambda n, lam: [lam**k for k in range(n)], "common"),
    ("uniform", "every k-step estimate got the same weight", lambda n, lam: [1 / n] * n, "common"),
    (
        "tail-one-power-more",
        "the tail starts at k = T: its sum is lam^(T-1), not lam^T",
        lambda n, lam: [*_no_tail(n, lam)[:-1], lam**n],
        "common",
    ),
    (
        "reversed",
        "the order is reversed: the one-step estimate comes first, with 1 - lam",
        lambda n, lam: gae_weights(n, lam)[::-1],
        "W-BL-7",
    ),
    ("one-minus-lam", "lam and 1 - lam are exchanged", lambda n, lam: gae_weights(n, 1 - lam), "common"),
    (
        "one-step-forgotten",
        "if there is one step only, there is one estimate, and its weight is 1",
        lambda n, lam: gae_weights(n, lam) if n > 1 else [1 - lam],
        "common",
    ),
    ("all-the-same", "the same weight 1 - lam for all k", lambda n, lam: [1 - lam] * n, "common"),
)
gw.right("three decimals", lambda n, lam: [round(w, 3) for w in gae_weights(n, lam)])
gw.right(
    "the rest, as a tensor",
    lambda n, lam: torch.cat([w := (1 - lam) * lam ** torch.arange(n - 1.0), 1 - w.sum(0, True)]),
)
gw.right("numpy", lambda n, lam: np.append((1 - lam) * float(lam) ** np.arange(n - 1), float(lam) ** (n - 1)))


# -- bias and variance over lambda -----------------------------------------------------------------------

_LAMS = (0.0, 0.5, 0.9, 1.0)
_UP, _DOWN = [0.0, 0.5, 0.9, 1.0], [1.0, 0.9, 0.5, 0.0]
_CRITIC_ERRORS = (1.5, 0.5, 2.0, 1.0, 0.7)  # of the values after 1, ..., 5 of 6 steps, in units of reward


def _bias(lam: float, gamma: float = 0.95) -> float:
    """Of GAE at the first of 6 steps: the critic's error after k steps has weight gamma^k lam^(k-1) (1 - lam)."""
    return sum(gamma**k * lam ** (k - 1) * (1 - lam) * e for k, e in enumerate(_CRITIC_ERRORS, 1))


def _noise(lam: float, gamma: float = 0.95) -> float:
    """Variance when every reward has variance 1: the k-th enters with (gamma lam)^k."""
    return sum((gamma * lam) ** (2 * k) for k in range(6))


lo = Question(
    id="lambda_order",
    title="bias and variance over lambda",
    chapter=3,
    kind="order",
    theory=True,
    variable="orders",
    reference=[_DOWN, _UP],
    reference_source="orders = ([1.0, 0.9, 0.5, 0.0], [0.0, 0.5, 0.9, 1.0])",
    accept=orders(2, _LAMS),
    hints=(
        "Look at the two ends: lam = 0 uses one reward and the critic, lam = 1 all rewards and no critic.",
        "The critic is wrong but does not fluctuate; the rewards are right on average but fluctuate.",
        "The error of the critic after k steps enters with gamma^k lam^(k-1) (1 - lam) for k = 1..5, and vanishes at "
        "lam = 1; the noise of the reward after k steps enters with (gamma lam)^k for k = 0..5.",
    ),
    explanation="lam = 1 uses no value of the future: no bias, and the noise of all rewards. lam = 0 uses the noise of "
    "one reward and all of the critic's error. Between them both change monotonically here.",
)


@lo.case("from the least bias to the most", 1, "which lam does not look at the critic's later values?")
def _(pair: Any) -> None:
    require(pair[0] == sorted(_LAMS, key=_bias), f"order by bias: got {pair[0]}")


@lo.case("from the least variance to the most", 1, "how many noisy rewards enter?")
def _(pair: Any) -> None:
    require(pair[1] == sorted(_LAMS, key=_noise), f"order by variance: got {pair[1]}")


lo.plant(
    (
        "swapped",
        "bias and variance are exchanged: a short sum leans on the critic, a long one on noisy rewards",
        [_UP, _DOWN],
        "W-BL-7",
    ),
    ("same-as-bias", "what lowers the bias here raises the variance", [_DOWN, _DOWN], "W-BL-7"),
    ("same-as-variance", "what lowers the variance here raises the bias", [_UP, _UP], "W-BL-7"),
    (
        "middle-is-best",
        "a lam in between may have the least total error, but neither the least bias nor variance",
        [[0.9, 0.5, 1.0, 0.0], [0.5, 0.9, 0.0, 1.0]],
        "common",
    ),
    (
        "ends-exchanged",
        "lam = 1 does not use the critic's later values: no bias from them",
        [[0.9, 0.5, 0.0, 1.0], _UP],
        "common",
    ),
)
lo.right("tuples", ((1, 0.9, 0.5, 0), (0, 0.5, 0.9, 1)))


# -- dividing by the group's standard deviation ----------------------------------------------------------


def std_weight(p):  # type: ignore[no-untyped-def]
    """Weight of a prompt with success probability p, relative to p = 1/2, after division by the standard deviation."""
    return 0.5 / (p * (1 - p)) ** 0.5


sw = Question(
    id="group_std_weight",
    title="which prompts gain weight when a group is divided by its spread",
    chapter=3,
    kind="symbolic",
    theory=True,
    variable="std_weight",
    reference=std_weight,
    reference_source=source(std_weight),
    hints=(
        "What is the standard deviation of a score that is 1 with probability p and 0 otherwise?",
        "Dividing by it multiplies the prompt's gradient by 1 over it. Compare with p = 1/2.",
        "(1 / sqrt(p (1 - p))) / (1 / sqrt(1/4)).",
    ),
    explanation="The standard deviation is sqrt(p (1 - p)), 1/2 at p = 1/2. The ratio is 1 / (2 sqrt(p (1 - p))): 1.67 at "
    "p = 0.1 or 0.9, and 5.03 at p = 0.01. Prompts that nearly always fail or succeed gain weight.",
    probes=in_two_steps(
        lambda f: [as_tensor(f(p), "probe").round(decimals=2) for p in (0.5, 0.1, 0.7, 0.98)],
        lambda f: [outcome(50.0, f, 1e-4, rtol=5e-3), outcome(50.0, f, 1e-4, rtol=0.05)],
        std_weight,
    ),
)


@sw.case("p = 1/2 counts as 1, p and 1 - p count the same", 1, "the spread of a coin does not know which side is up")
def _(f: Any) -> None:
    expect_close(f(0.5), 1.0, "weight at p = 0.5")
    for p in (0.1, 0.3):
        expect_close(f(p), as_tensor(f(1 - p), "weight"), f"weight at p = {p} against {1 - p}", rtol=5e-3)
    require(
        as_tensor(f(0.1), "weight") > 1.2,
        f"weight at p = 0.1 is {as_tensor(f(0.1), 'weight'):.4g}, expected more than at 0.5",
    )


@sw.case("equals the ratio of exact standard deviations", 2, "the standard deviation, not the variance")
def _(f: Any) -> None:
    for p in (0.01, 0.2, 0.6, 0.95, 0.0001, 0.9999):
        law, score = tensor([p, 1 - p]).double(), tensor([1.0, 0.0]).double()
        spread = (law * (score - (law * score).sum()).square()).sum().sqrt()
        expect_close(f(p), 0.5 / spread, f"weight at p = {p}", rtol=5e-3)


sw.plant(
    ("only-scale", "each prompt is divided by its own spread: the weights differ", lambda p: 1.0, "W-BL-9"),
    (
        "variance",
        "you divided by the variance, not by the standard deviation",
        lambda p: 0.25 / (p * (1 - p)),
        "common",
    ),
    (
        "inverse",
        "you multiplied by the spread: prompts near 0 or 1 gain weight, they do not lose it",
        lambda p: 2 * (p * (1 - p)) ** 0.5,
        "common",
    ),
    ("not-relative", "compare with p = 1/2: the weight there is 1", lambda p: (p * (1 - p)) ** -0.5, "common"),
    (
        "failures-only",
        "prompts that nearly always succeed gain as much as those that fail",
        lambda p: (0.5 / p) ** 0.5,
        "common",
    ),
    (
        "small-number-added",
        "you added a small number to the standard deviation: near p = 0 and p = 1 it is not small beside it",
        lambda p: 0.5 / ((p * (1 - p)) ** 0.5 + 1e-4),
        "common",
    ),
    (
        "capped",
        "you capped the weight, or kept p away from 0 and 1: it grows without bound there",
        lambda p: std_weight(min(max(p, 0.001), 0.999)),
        "common",
    ),
    ("mean", "you divided by the mean score, not by the spread", lambda p: 0.5 / p, "common"),
)
sw.right("math", lambda p: 1 / (2 * math.sqrt(p - p * p)))
sw.right("three digits", lambda p: float(f"{0.5 / (p * (1 - p)) ** 0.5:.3g}"))


# -- whitening with a mask -------------------------------------------------------------------------------


def whiten(x, mask=None, shift_mean=True):  # type: ignore[no-untyped-def]
    """(x - mean) / sqrt(var + 1e-8) over the entries that count, 0 elsewhere; shift_mean=False adds the mean back."""
    if mask is None:
        mask = torch.ones_like(x, dtype=torch.bool)
    kept = x[mask]
    result = (x - kept.mean()) / torch.sqrt(kept.var() + 1e-8)
    if not shift_mean:
        result = result + kept.mean()
    return torch.where(mask, result, torch.zeros_like(x))


def _whiten_probe(f: Any) -> list[Any]:
    x, mask = normal(3, 4, seed=1) + 1, tensor([[True, True, False, False], [True] * 4, [True, True, True, False]])
    padded = torch.where(mask, x, torch.zeros_like(x))
    given = x.clone()
    return [
        f(x),
        f(x, mask),
        f(padded, mask),
        f(x, mask, shift_mean=False),
        f(tensor([2.0, 2.0, 2.0])),
        f(given),
        given,
    ]


_NARROW, _DISTANT = tensor([1e-4, 2e-4, 3e-4]), tensor([10001.0, 10002.0, 10006.0])


def _whiten_unusual(f: Any) -> list[str]:
    narrow = [outcome(tensor([-side, 0.0, side]), f, _NARROW.clone()) for side in (0.5**0.5, 1.0)]
    distant = outcome(tensor([-2.0, -1.0, 3.0]) / 7**0.5, f, _DISTANT.clone())
    zero = outcome(tensor([-1.0, 0.0, 1.0]), f, tensor([0.0, 1.0, 2.0]))
    return [*narrow, "right" if distant == "right" else "wrong", zero]


wm = Question(
    id="whiten_mask",
    title="whitening that does not see the padding",
    chapter=3,
    kind="function",
    theory=False,
    variable="whiten",
    reference=whiten,
    reference_source=source(whiten),
    hints=(
        "Which entries enter the mean and the variance, and by which number do you divide?",
        "Select the entries with x[mask], take their mean and variance, and write 0 elsewhere.",
        "(x - x[mask].mean()) / sqrt(x[mask].var() + 1e-8) where mask, 0 elsewhere.",
    ),
    explanation="Mean and variance are those of the entries that count, the variance with n - 1. Zeros in the padding "
    "would pull the mean to 0 and change the spread, so equal batches with more padding would train differently.",
    probes=in_two_steps(_whiten_probe, _whiten_unusual, whiten),
)


@wm.case("without a mask: mean 0, unbiased variance 1", 1, "divide by the standard deviation of all entries")
def _(f: Any) -> None:
    got = as_tensor(f(normal(3, 4, seed=2) * 3 + 5), "whitened")
    expect_shape(got, (3, 4), "whitened")
    expect_close(got.mean(), 0.0, "mean", atol=1e-4)
    expect_close(got.var(), 1.0, "variance (n - 1)", rtol=1e-3)
    got = f(_DISTANT.clone())
    expect_close(got, tensor([-2.0, -1.0, 3.0]) / 7**0.5, "x (10001, 10002, 10006), variance 7", rtol=1e-3)


@wm.case("more padding, or other finite numbers in it, changes nothing", 2, "only the entries that count may enter")
def _(f: Any) -> None:
    x = tensor([[1.0, 2.0, 6.0], [3.0, 3.0, 9.0]])
    alone = as_tensor(f(x.clone()), "whitened")
    expect_shape(alone, (2, 3), "whitened")
    require(alone.abs().sum() > 0, "the whitened entries are all 0")
    mask = tensor([[True] * 3 + [False] * 2] * 2)
    for filling in (0.0, 50.0):
        padded = torch.cat([x, torch.full((2, 2), filling)], 1)
        got = as_tensor(f(padded, mask), "whitened")
        expect_shape(got, (2, 5), "whitened")
        expect_close(got[:, :3], alone, f"entries that count, padding filled with {filling:g}")
        expect_close(got[:, 3:], torch.zeros(2, 2), f"padding filled with {filling:g}")


@wm.case("shift_mean=False changes the scale only: the mean stays", 1, "add the mean back")
def _(f: Any) -> None:
    x, mask = tensor([[1.0, 2.0, 6.0, 70.0]]), tensor([[True, True, True, False]])
    got = f(x, mask, shift_mean=False)
    spread = math.sqrt(7.0)
    expect_close(got, tensor([[-2 / spread + 3, -1 / spread + 3, 3 / spread + 3, 0.0]]), "x (1, 2, 6, padding)")


@wm.case("equal entries give 0, in one dimension too", 1, "what does 1e-8 under the root do when the variance is 0?")
def _(f: Any) -> None:
    expect_close(f(tensor([2.0, 2.0, 2.0])), tensor([0.0, 0.0, 0.0]), "x (2, 2, 2)")
    mask = tensor([True, True, False, True])
    expect_close(f(tensor([2.0, 2.0, 7.0, 2.0]), mask), tensor([0.0, 0.0, 0.0, 0.0]), "x (2, 2, padding, 2)")
    side = 0.5**0.5
    expect_close(f(_NARROW.clone()), tensor([-side, 0.0, side]), "x (.0001, .0002, .0003)", rtol=1e-3)
    expect_close(f(tensor([0.0, 1.0, 2.0])), tensor([-1.0, 0.0, 1.0]), "x (0, 1, 2)")
    got = f(tensor([1.0, 2.0, 7.0, 3.0]), mask)
    expect_close(got, tensor([-1.0, 0.0, 0.0, 1.0]), "x (1, 2, padding, 3)")


def _whiten_no_eps(x: Tensor, mask: Tensor | None = None, shift_mean: bool = True) -> Tensor:
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    mean, spread = x[keep].mean(), x[keep].std()
    return torch.where(keep, (x - mean) / spread + (0.0 if shift_mean else mean), torch.zeros_like(x))


def _whiten_in_place(x: Tensor, mask: Tensor | None = None, shift_mean: bool = True) -> Tensor:
    return x.copy_(whiten(x, mask, shift_mean))


def _whiten_with(
    select: str = "mask",
    zero: bool = True,
    unbiased: bool = True,
    root: bool = True,
    back: str = "mean",
    least: float = 1e-8,
    added: float = 0.0,
) -> Callable[..., Tensor]:
    def f(x: Tensor, mask: Tensor | None = None, shift_mean: bool = True) -> Tensor:
        keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
        kept = x.flatten() if select == "all" else (x * keep).flatten() if select == "zeros" else x[keep]
        mean, var = kept.mean(), kept.var(correction=int(unbiased)) + least
        scale = var.sqrt() + added if root else var
        out = (x - mean) / scale
        if not shift_mean:
            out = {"mean": out + mean, "ignored": out, "unscaled": x / scale}[back]
        return torch.where(keep, out, torch.zeros_like(x)) if zero else out

    return f


def _whiten_by_squares(x: Tensor, mask: Tensor | None = None, shift_mean: bool = True) -> Tensor:
    w = torch.ones_like(x) if mask is None else mask.to(x.dtype)
    mean, n = (x * w).sum() / w.sum(), w.sum()
    var = ((x * x * w).sum() / n - mean * mean) * n / (n - 1)
    return ((x - mean) / (var.clamp(min=0) + 1e-8).sqrt() + (0.0 if shift_mean else mean)) * w


def _whiten_rows(x: Tensor, mask: Tensor | None = None, shift_mean: bool = True) -> Tensor:
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    n = keep.sum(-1, keepdim=True)
    mean = (x * keep).sum(-1, keepdim=True) / n
    var = ((x - mean).square() * keep).sum(-1, keepdim=True) / (n - 1) + 1e-8
    out = (x - mean) / var.sqrt() + (0.0 if shift_mean else mean)
    return torch.where(keep, out, torch.zeros_like(x))


wm.plant(
    ("no-epsilon", "1e-8 under the root is missing: equal entries divide by 0", _whiten_no_eps, "common"),
    ("in-place", "you changed x itself: return a new tensor", _whiten_in_place, "common"),
    ("across-padding", "mean and variance were taken over the padding too", _whiten_with(select="all"), "common"),
    (
        "padding-as-zeros",
        "you multiplied by the mask first: the zeros still enter mean and variance",
        _whiten_with(select="zeros"),
        "W-BL-10",
    ),
    ("padding-not-zero", "the padding must be 0 afterwards", _whiten_with(zero=False), "W-BL-10"),
    ("biased-variance", "the variance divides by n, not by n - 1", _whiten_with(unbiased=False), "common"),
    ("by-the-variance", "you divided by the variance, not by its root", _whiten_with(root=False), "common"),
    ("shift-ignored", "shift_mean=False must add the mean back", _whiten_with(back="ignored"), "common"),
    (
        "mean-scaled-too",
        "shift_mean=False keeps the mean; you divided the mean as well",
        _whiten_with(back="unscaled"),
        "common",
    ),
    (
        "epsilon-outside",
        "1e-8 stands under the root, beside the variance: yours is outside the root, or smaller",
        lambda x, mask=None, shift_mean=True: _whiten_with(least=0.0, added=1e-8)(x, mask, shift_mean),
        "common",
    ),
    (
        "larger-epsilon",
        "the number under the root is 1e-8: yours is larger, which counts where the spread is small",
        lambda x, mask=None, shift_mean=True: _whiten_with(least=1e-5)(x, mask, shift_mean),
        "common",
    ),
    (
        "zeros-are-padding",
        "an entry of 0 is no padding: only the mask says what counts, and without one everything does",
        lambda x, mask=None, shift_mean=True: whiten(x, (x != 0) if mask is None else mask, shift_mean),
        "common",
    ),
    (
        "mean-of-squares",
        "mean of the squares minus square of the mean loses its digits far from 0: average (x - mean)^2",
        _whiten_by_squares,
        "common",
    ),
    ("per-response", "each response was whitened by itself; the batch is whitened together", _whiten_rows, "common"),
)


def _whiten_by_sums(
    x: Tensor, mask: Tensor | None = None, shift_mean: bool = True, dtype: torch.dtype = torch.float64
) -> Tensor:
    w = torch.ones_like(x, dtype=dtype) if mask is None else mask.to(dtype)
    mean = (x * w).sum() / w.sum()
    var = ((x - mean).square() * w).sum() / (w.sum() - 1)
    return ((x - mean) / (var + 1e-8).sqrt() + (0.0 if shift_mean else mean)) * w


wm.right("sums with weights, float64", _whiten_by_sums)
wm.right("sums with weights, float32", functools.partial(_whiten_by_sums, dtype=torch.float32))

CHAPTER: Sequence[Question] = (ga, bb, vb, bd, gb, gs, ad, bn, gw, lo, sw, wm)
