"""Chapter 5, reward models: nine questions, with the wrong answers that their checks must reject."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, logsigmoid, softplus

from rlhfkit.homework.comparisons import (
    as_tensor,
    expect_close,
    expect_shape,
    gradient,
    gradient_or_none,
    in_two_steps,
    lines,
    normal,
    outcome,
    require,
    show,
    source,
    unpack,
)
from rlhfkit.homework.core import Question

_FADED = 4e-7
"""Tolerance for a push of sigmoid(-14) = 8e-7, which has few digits left in float32 but is not 0."""

# -- the loss of a pair ----------------------------------------------------------------------------------


def bradley_terry_loss(chosen_scores, rejected_scores, margin=None):  # type: ignore[no-untyped-def]
    """-log sigmoid(chosen - rejected - margin) of every pair. (B,), (B,), (B,) or None -> (B,)."""
    difference = chosen_scores - rejected_scores
    if margin is not None:
        difference = difference - margin.detach()
    return -torch.nn.functional.logsigmoid(difference)


def _pairs(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(normal(4, seed=seed + i).requires_grad_() for i in range(3))  # type: ignore[return-value]


def _bt_probe(f: Any) -> list[Any]:
    chosen, rejected, margin = _pairs(1)
    plain, shifted = f(chosen, rejected), f(chosen, rejected, margin=margin)
    return [
        *(gradient_or_none(plain, x) for x in (chosen, rejected)),
        *(gradient_or_none(shifted, x) for x in (chosen, rejected, margin)),
        *(plain, shifted),
    ]


def _push(f: Any, difference: float) -> Tensor:
    chosen = tensor([difference]).requires_grad_()
    return gradient(f(chosen, torch.zeros(1)), chosen, "gradient")


def _bt_unusual(f: Any) -> list[Any]:
    zero = torch.zeros(1)
    return [
        *(outcome(tensor([x]), f, tensor([-x]), zero) for x in (17.0, 60.0, 3000.0)),
        outcome(tensor([math.exp(-14)]), lambda: -_push(f, 14.0), atol=_FADED),
        outcome(tensor([1.0]), lambda: -_push(f, -3000.0)),
        outcome(tensor([math.log(2)] * 2), f, torch.zeros(2), torch.zeros(2), None),
    ]


bt = Question(
    id="bt_loss",
    title="the loss of a reward model",
    chapter=5,
    kind="function",
    theory=False,
    variable="bradley_terry_loss",
    reference=bradley_terry_loss,
    reference_source=source(bradley_terry_loss),
    hints=(
        "What is the probability that the chosen response wins, and what is its negative log-likelihood?",
        "The win probability is sigmoid(difference); a margin is subtracted from the difference and is a constant. "
        "torch has a function for log sigmoid that does not overflow.",
        "-logsigmoid(chosen_scores - rejected_scores - margin), one number per pair, margin detached.",
    ),
    explanation="P(chosen wins) = sigmoid(s_c - s_r), so the negative log-likelihood is -log sigmoid of the difference. "
    "A margin asks for a larger difference before the loss is small. log(sigmoid(x)) is -inf in float32 below about -90, "
    "and its gradient nan; logsigmoid stays finite. One number per pair: the average is the caller's.",
    probes=in_two_steps(_bt_probe, _bt_unusual, bradley_terry_loss),
)


@bt.case("log 2 at equal scores, less if the chosen one is ahead", 1, "-log of the win probability")
def _(f: Any) -> None:
    got = f(tensor([1.5, 2.0, 0.0]), tensor([1.5, 0.0, 2.0]))
    want = tensor([math.log(2), math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))])
    expect_close(got, want, "losses at differences 0, 2 and -2")


@bt.case("one number per pair, which depends on that pair only", 1, "the average is the caller's choice")
def _(f: Any) -> None:
    chosen, rejected = normal(5, seed=4), normal(5, seed=5)
    got = as_tensor(f(chosen, rejected), "losses")
    expect_shape(got, (5,), "losses")
    alone = [as_tensor(f(chosen[i : i + 1], rejected[i : i + 1], margin=None), "losses") for i in range(5)]
    expect_shape(alone[0], (1,), "losses of a batch of one pair")
    expect_close(got, torch.cat(alone), "losses of five pairs together against each alone, with margin=None")
    require(got.max() > got.min() + 0.1, "all five pairs have the same loss")


@bt.case("the gradient pushes the two scores apart", 2, "equal and opposite, and larger for a pair in the wrong order")
def _(f: Any) -> None:
    chosen, rejected = normal(4, seed=6).requires_grad_(), normal(4, seed=7).requires_grad_()
    losses = f(chosen, rejected)
    push = 1 / (1 + (chosen - rejected).detach().exp())
    expect_close(gradient(losses, chosen, "gradient in chosen_scores"), -push, "gradient in chosen_scores")
    expect_close(gradient(losses, rejected, "gradient in rejected_scores"), push, "gradient in rejected_scores")
    faded = tensor([-1 / (1 + math.exp(14))])
    expect_close(_push(f, 14.0), faded, "gradient in chosen_scores at a difference of 14", atol=_FADED)


@bt.case("a margin is subtracted from the difference and is a constant", 1, "the same loss as a smaller difference")
def _(f: Any) -> None:
    chosen, rejected, margin = _pairs(8)
    losses = f(chosen, rejected, margin=margin)
    moved = f(chosen - margin, rejected)
    require(
        (as_tensor(moved, "losses") - as_tensor(f(chosen, rejected), "losses")).abs().max() > 0.01,
        "all losses are equal",
    )
    expect_close(losses, moved, "with a margin against chosen_scores lowered by it")
    expect_close(f(chosen, rejected, margin), moved, "with a margin as third argument")
    gradient(losses, chosen, "gradient in chosen_scores")
    (slope,) = torch.autograd.grad(losses.sum(), margin, allow_unused=True)
    steepest = 0.0 if slope is None else slope.abs().max().item()
    require(steepest == 0.0, f"the gradient in margin must be 0, got {steepest:.4g}")


@bt.case("finite at a difference of -900, with a gradient", 1, "log(sigmoid(x)) underflows; what does torch offer?")
def _(f: Any) -> None:
    chosen = tensor([-900.0]).requires_grad_()
    losses = f(chosen, tensor([0.0]))
    expect_close(losses, tensor([900.0]), "loss at a difference of -900")
    expect_close(
        gradient(losses, chosen, "gradient"), tensor([-1.0]), "gradient in chosen_scores at a difference of -900"
    )
    expect_close(f(tensor([-2000.0]), tensor([1000.0])), tensor([3000.0]), "loss at scores -2000 and 1000")
    expect_close(_push(f, -3000.0), tensor([-1.0]), "gradient in chosen_scores at a difference of -3000")


_NO_MARGIN = torch.zeros(())


def _where_far(difference: Tensor) -> Tensor:
    return torch.where(difference < -50, -difference, -difference.sigmoid().log())


def _m(margin: Any) -> Any:
    return 0.0 if margin is None else margin.detach()


bt.plant(
    (
        "no-minus",
        "the minus is missing: this is the log-likelihood",
        lambda c, r, margin=None: logsigmoid(c - r - _m(margin)),
        "common",
    ),
    (
        "swapped",
        "chosen and rejected are exchanged",
        lambda c, r, margin=None: -logsigmoid(r - c - _m(margin)),
        "common",
    ),
    (
        "no-log",
        "the logarithm is missing: the loss is -log sigmoid, not minus the probability",
        lambda c, r, margin=None: -(c - r - _m(margin)).sigmoid(),
        "common",
    ),
    (
        "naive-log",
        "not finite far in the wrong order, where sigmoid underflows and exp overflows: use logsigmoid",
        lambda c, r, margin=None: -(c - r - _m(margin)).sigmoid().log(),
        "common",
    ),
    (
        "epsilon",
        "a small number inside the logarithm caps the loss, at 18.4 for 1e-8: use logsigmoid",
        lambda c, r, margin=None: -((c - r - _m(margin)).sigmoid() + 1e-8).log(),
        "common",
    ),
    (
        "one-minus-probability",
        "this is the probability that the rejected response wins: the loss is -log of the win probability",
        lambda c, r, margin=None: 1 - (c - r - _m(margin)).sigmoid(),
        "common",
    ),
    (
        "pull-to-0",
        "this pulls the difference back once it is large: the loss must go on falling",
        lambda c, r, margin=None: (c - r - _m(margin) - 1).square(),
        "W-RM-1",
    ),
    (
        "shrink-scores",
        "you added a penalty on the size of the scores: the loss contains their difference only",
        lambda c, r, margin=None: -logsigmoid(c - r - _m(margin)) + 0.01 * (c + r).square(),
        "W-RM-3",
    ),
    (
        "linear",
        "there is no sigmoid: a linear loss has no lower bound, and the push never fades",
        lambda c, r, margin=None: -(c - r - _m(margin)),
        "common",
    ),
    (
        "hinge",
        "this is a hinge loss: its push stops at a difference of 1",
        lambda c, r, margin=None: (1 - (c - r - _m(margin))).relu(),
        "common",
    ),
    (
        "hinge-without-margin",
        "this is a hinge loss, and the margin plays no part in it",
        lambda c, r, margin=None: (1 - (c - r)).relu(),
        "common",
    ),
    (
        "hinge-at-the-margin",
        "this is a hinge loss that is 0 from the margin on: there is no sigmoid in it",
        lambda c, r, margin=None: (_m(margin) - (c - r)).relu(),
        "common",
    ),
    (
        "scores-as-strengths",
        "you divided scores: Bradley-Terry strengths are exp(score)",
        lambda c, r, margin=None: -((c - _m(margin)).square() / ((c - _m(margin)).square() + r.square() + 1e-6)).log(),
        "common",
    ),
    (
        "sum-of-scores",
        "the scores are added: the win probability depends on their difference",
        lambda c, r, margin=None: -logsigmoid(c + r - _m(margin)),
        "common",
    ),
    ("margin-ignored", "the margin is ignored", lambda c, r, margin=None: -logsigmoid(c - r), "common"),
    (
        "margin-added",
        "the margin is added; it must be subtracted",
        lambda c, r, margin=None: -logsigmoid(c - r + _m(margin)),
        "common",
    ),
    (
        "margin-outside",
        "the margin is added to the loss, where it changes no gradient",
        lambda c, r, margin=None: -logsigmoid(c - r) + _m(margin),
        "common",
    ),
    (
        "margin-off-the-loss",
        "the margin is subtracted from the loss, where it changes no gradient: it belongs to the difference",
        lambda c, r, margin=None: -logsigmoid(c - r) - _m(margin),
        "common",
    ),
    (
        "chosen-detached",
        "the chosen score is detached: right value, but nothing pushes it up",
        lambda c, r, margin=None: -logsigmoid(c.detach() - r - _m(margin)),
        "common",
    ),
    (
        "margin-attached",
        "a gradient flows into the margin: it is a constant",
        lambda c, r, margin=None: -logsigmoid(c - r - (0.0 if margin is None else margin)),
        "common",
    ),
    (
        "rejected-detached",
        "the rejected score is detached: right value, but nothing pushes it down",
        lambda c, r, margin=None: -logsigmoid(c - r.detach() - _m(margin)),
        "common",
    ),
    (
        "mean",
        "you averaged over the pairs: one number per pair is asked for",
        lambda c, r, margin=None: -logsigmoid(c - r - _m(margin)).mean(),
        "common",
    ),
)
bt.plant(
    (
        "detached",
        "the losses are right but cut off from the scores: nothing can be trained with them",
        lambda c, r, margin=None: -logsigmoid(c.detach() - r.detach() - _m(margin)),
        "common",
    ),
    (
        "clamped-on-both-sides",
        "the difference is clamped so tightly that ordinary pairs lose their push, in either direction",
        lambda c, r, margin=None: -logsigmoid((c - r - _m(margin)).clamp(-10, 10)),
        "common",
    ),
    (
        "clamped-above",
        "the difference is clamped from above: the push on a pair in the right order fades, but it does not end",
        lambda c, r, margin=None: -logsigmoid((c - r - _m(margin)).clamp(max=10)),
        "W-RM-2",
    ),
    (
        "capped-loss",
        "the loss is capped, by a clamp or inside the logarithm: far in the wrong order it is minus the difference",
        lambda c, r, margin=None: -logsigmoid((c - r - _m(margin)).clamp(min=-30)),
        "common",
    ),
    (
        "generous-clamp",
        "a clamp at a large number is still a clamp: beyond it the pair that is most wrong gets no push",
        lambda c, r, margin=None: -logsigmoid((c - r - _m(margin)).clamp(-1000, 1000)),
        "common",
    ),
    (
        "infinity-replaced",
        "you replaced inf by a number: the loss is then a constant, and its gradient still nan or 0",
        lambda c, r, margin=None: (-(c - r - _m(margin)).sigmoid().log()).nan_to_num(posinf=900.0),
        "common",
    ),
    (
        "where",
        "the value is right but its gradient is nan: torch.where differentiates both branches, the infinite one too",
        lambda c, r, margin=None: _where_far(c - r - _m(margin)),
        "common",
    ),
    (
        "margin-not-none",
        "margin=None, passed by name, breaks your function: None stands for no margin",
        lambda c, r, margin=_NO_MARGIN: -logsigmoid(c - r - margin.detach()),
        "common",
    ),
    (
        "margin-without-sign",
        "you used the size of the margin: a negative margin makes the difference larger",
        lambda c, r, margin=None: -logsigmoid(c - r - (0.0 if margin is None else margin.detach().abs())),
        "common",
    ),
    (
        "margin-not-below-0",
        "you cut the margin off at 0: a negative margin makes the difference larger",
        lambda c, r, margin=None: -logsigmoid(c - r - (0.0 if margin is None else margin.detach().relu())),
        "common",
    ),
    (
        "margin-averaged",
        "you used the mean margin for all pairs: each pair has its own",
        lambda c, r, margin=None: -logsigmoid(c - r - (0.0 if margin is None else margin.detach().mean())),
        "common",
    ),
)
bt.plant(
    (
        "squeezed",
        "a batch of one pair came back as a single number: squeeze drops its axis",
        lambda c, r, margin=None: -logsigmoid(c - r - _m(margin)).squeeze(),
        "common",
    ),
)
bt.right("softplus, float64", lambda c, r, margin=None: softplus(r.double() - c + _m(margin)))
bt.right(
    "binary cross-entropy with label 1",
    lambda c, r, margin=None: binary_cross_entropy_with_logits(
        c - r - _m(margin), torch.ones_like(c), reduction="none"
    ),
)
bt.right(
    "cross-entropy of two classes",
    lambda c, r, margin=None: cross_entropy(
        torch.stack([c - _m(margin), r], 1), torch.zeros(len(c), dtype=torch.long), reduction="none"
    ),
)
bt.right(
    "log1p of exp(-|d|)",
    lambda c, r, margin=None: (r - c + _m(margin)).relu() + (-(c - r - _m(margin)).abs()).exp().log1p(),
)
bt.right("log-sum-exp", lambda c, r, margin=None: torch.stack([c - _m(margin), r]).logsumexp(0) - c + _m(margin))


# -- the slope of the loss -------------------------------------------------------------------------------


def slope(d):  # type: ignore[no-untyped-def]
    """Derivative of -log sigmoid(d) in d. A tensor of any shape -> the same shape."""
    return -torch.sigmoid(-d)


rs = Question(
    id="rm_slope",
    title="the slope of -log sigmoid(d)",
    chapter=5,
    kind="symbolic",
    theory=True,
    variable="slope",
    reference=slope,
    reference_source=source(slope),
    hints=(
        "Differentiate the logarithm first, then the sigmoid.",
        "sigmoid' = sigmoid (1 - sigmoid), so (log sigmoid)' = 1 - sigmoid. Mind the minus sign of the loss.",
        "-(1 - sigmoid(d)) = -sigmoid(-d).",
    ),
    explanation="(log sigmoid)' = sigmoid'/sigmoid = 1 - sigmoid(d) = sigmoid(-d), so the slope of the loss is "
    "-sigmoid(-d): about -1 for a pair in the wrong order, -1/2 at a tie, and nearly 0 far in the right order. It is "
    "negative everywhere: the loss always widens the difference, ever more weakly. sigmoid' itself is another function, "
    "small on both sides.",
    probes=in_two_steps(
        lambda f: f(tensor([-6.0, -1.0, 0.0, 0.5, 2.0, 8.0])),
        lambda f: [
            *(outcome(tensor([want, want]), f, tensor([x, x])) for x, want in ((-900.0, -1.0), (900.0, 0.0))),
            *(outcome(torch.full(shape, -0.5), f, torch.zeros(shape)) for shape in ((), (1,), (2, 3))),
        ],
        slope,
    ),
)


@rs.case("equals autograd from -10 to 10; finite at -900 and 900", 2, "differentiate log first, then sigmoid")
def _(f: Any) -> None:
    d = torch.linspace(-10, 10, 41).requires_grad_()
    (want,) = torch.autograd.grad(-logsigmoid(d).sum(), d)
    expect_close(f(d.detach().clone()), want, "slope at -10, -9.5, ..., 10")
    expect_close(f(tensor([-900.0, 900.0])), tensor([-1.0, 0.0]), "slope at -900 and 900")
    for shape in ((), (1,), (2, 3)):
        expect_close(f(torch.zeros(shape)), torch.full(shape, -0.5), f"slope at 0, d of shape {shape}")


@rs.case("never 0 and never positive: the loss always widens the gap", 1, "does it pull d to 0?")
def _(f: Any) -> None:
    y = as_tensor(f(torch.linspace(-10, 10, 41)), "slope")
    expect_shape(y, (41,), "slope")
    require(bool((y < 0).all()), f"the slope at d = -10, 0, 10 is {y[0]:.3g}, {y[20]:.3g}, {y[-1]:.3g}")
    require(
        bool((y[1:] > y[:-1]).all()), "the push must fade as d grows: it is strongest for a pair in the wrong order"
    )


rs.plant(
    (
        "sigma-prime",
        "this is minus the slope of sigmoid itself, small on both sides, not of its logarithm",
        lambda d: -d.sigmoid() * (-d).sigmoid(),
        "W-RM-2",
    ),
    (
        "sigma-prime-up",
        "this is the slope of sigmoid itself, sigmoid (1 - sigmoid), not of -log sigmoid",
        lambda d: d.sigmoid() * (-d).sigmoid(),
        "W-RM-2",
    ),
    (
        "overflow",
        "exp(-d) overflows, and inf/inf is nan: use sigmoid",
        lambda d: -(-d).exp() / (1 + (-d).exp()),
        "common",
    ),
    ("plus", "1 - sigmoid(d) is the slope of +log sigmoid: the loss has a minus", lambda d: (-d).sigmoid(), "common"),
    (
        "pull-to-0",
        "this slope pulls d back to 0: the loss falls for every larger d",
        lambda d: d.tanh(),
        "W-RM-1",
    ),
    ("quadratic-pull", "this is the slope of d^2/2, smallest at 0", lambda d: 1.0 * d, "W-RM-1"),
    (
        "zero-when-large",
        "the slope tends to 0, but it is 0 nowhere",
        lambda d: torch.where(d > 5, 0.0, slope(d)),
        "W-RM-2",
    ),
    ("zero", "the slope is not 0: it only tends to 0 for large d", lambda d: 0 * d, "W-RM-2"),
    ("sigma", "the weight is sigmoid(-d), large for pairs in the wrong order", lambda d: -d.sigmoid(), "common"),
    ("constant", "a constant slope belongs to a linear loss", lambda d: 0 * d - 1, "common"),
    ("hinge", "this is the slope of the hinge loss", lambda d: -(d < 1).float(), "common"),
    (
        "exponential",
        "this is the slope of exp(-d): it grows without bound for wrong pairs",
        lambda d: -(-d).exp(),
        "common",
    ),
    ("loss-itself", "this is the loss, not its slope", lambda d: -logsigmoid(d), "common"),
    (
        "clamped",
        "a clamp keeps the slope away from 0, to which it tends for large d",
        lambda d: slope(d.clamp(-10, 10)),
        "common",
    ),
    (
        "nan-replaced",
        "far in the wrong order the slope is -1, and yours is another number: use sigmoid, without a quotient",
        lambda d: (-(-d).exp() / (1 + (-d).exp())).nan_to_num(),
        "common",
    ),
    (
        "flattened",
        "d of another shape came back flat: the slope has the shape of d",
        lambda d: slope(d).flatten(),
        "common",
    ),
    (
        "squeezed",
        "squeeze dropped an axis of length 1: the slope has the shape of d",
        lambda d: slope(d).squeeze(),
        "common",
    ),
    (
        "single-number-in-a-list",
        "a single number d came back with an axis: the slope has the shape of d",
        lambda d: slope(torch.atleast_1d(d)),
        "common",
    ),
    (
        "list-of-numbers",
        "your loop takes d for a list of numbers: it may have any shape, or none",
        lambda d: [slope(tensor(float(x))) for x in d],
        "common",
    ),
)
rs.right("-(1 - sigmoid)", lambda d: -(1 - d.double().sigmoid()))
rs.right("autograd", lambda d: torch.autograd.grad(-logsigmoid(x := d.clone().requires_grad_()).sum(), x)[0])
rs.right("nested lists", lambda d: slope(d).tolist())
rs.right("numpy", lambda d: -1 / (1 + np.exp(d.numpy())))
rs.right("(tanh(d/2) - 1)/2", lambda d: ((d / 2).tanh() - 1) / 2)


# -- the last real token ---------------------------------------------------------------------------------


def last_token_index(tokens, pad_id):  # type: ignore[no-untyped-def]
    """Position of the last token of every row that is not padding. (B, L), int -> (B,)."""
    positions = torch.arange(tokens.shape[1], device=tokens.device)
    return torch.where(tokens != pad_id, positions, -1).amax(1)


_LONG_ROWS = tensor([[0] * 10 + [5] * 2990, [5] * 2500 + [0] * 500])

_ROWS = tensor([[5, 3, 7, 2, 0, 0, 0], [0, 0, 4, 6, 2, 1, 1], [0, 0, 0, 9, 8, 1, 0], [4, 0, 0, 0, 0, 0, 0]])

lt = Question(
    id="last_token_index",
    title="the last real token of a padded row",
    chapter=5,
    kind="function",
    theory=False,
    variable="last_token_index",
    reference=last_token_index,
    reference_source=source(last_token_index),
    hints=(
        "Write down four rows: padded on the right, on the left, on both sides, not at all. Where is the last real token?",
        "The number of real tokens is a position only if nothing is padded on the left. Look for the largest position "
        "that holds a real token.",
        "The maximum over t of t where tokens[:, t] != pad_id.",
    ),
    explanation="The score belongs to the state after the whole response, which is the hidden state at the last real "
    "token: take the largest position whose token is not padding. The last column is padding in most rows of a batch. "
    "Counting real tokens, or searching the first padding token, goes wrong as soon as prompts are padded on the left, "
    "and a row without padding has no first padding token.",
    probes=in_two_steps(
        lambda f: [
            f(_ROWS.clone(), 0),
            f(tensor([[3, 3, 9, 9], [9, 9, 9, 3], [4, 9, 5, 6]]), 9),
            f(tensor([[1, 2], [2, 0], [0, 1]]), -1),
            f(tensor([[0, 4, 2, 0, 0], [3, 0, 0, 0, 0]]), 0),
            f(tensor([[0, 0, 4, 6, 1], [0, 3, 4, 6, 1]]), 0),
        ],
        lambda f: [
            outcome(tensor([2999, 2499]), f, _LONG_ROWS.clone(), 0, rtol=0.0),
            outcome(tensor([3]), f, _ROWS[:1].clone(), 0),
        ],
        last_token_index,
    ),
)


def _index(f: Any, rows: list[list[int]], pad_id: int, want: list[int], what: str) -> None:
    got = as_tensor(f(tensor(rows), pad_id), "positions")
    expect_close(got, tensor(want), f"positions, {what}")


@lt.case("padded on the right, by different amounts", 1, "the last column is padding for all but the longest row")
def _(f: Any) -> None:
    _index(f, [[5, 3, 7, 2], [5, 3, 0, 0], [5, 0, 0, 0]], 0, [3, 1, 0], "rows of 4, 2 and 1 tokens")
    _index(f, [[8, 8, 1, 9], [8, 9, 9, 9]], 9, [2, 0], "pad_id 9")
    _index(f, [[5, 3, 5, 0], [3, 3, 0, 0]], 0, [2, 1], "rows whose last token occurs twice")
    _index(f, [[5, 3, 0, 0]], 0, [1], "a single row")


@lt.case("padded on the left: prompts of different lengths", 1, "a count of the real tokens is not a position")
def _(f: Any) -> None:
    _index(f, [[0, 0, 4, 6, 1], [0, 3, 4, 6, 1], [0, 0, 0, 0, 1]], 0, [4, 4, 4], "responses of equal length")
    _index(f, _LONG_ROWS.tolist(), 0, [2999, 2499], "rows of 3000 tokens")


@lt.case("on both sides at once", 1, "left-padded prompts, right-padded responses")
def _(f: Any) -> None:
    _index(f, [[0, 0, 4, 6, 1, 0], [0, 3, 4, 6, 0, 0], [0, 7, 0, 0, 0, 0]], 0, [4, 3, 1], "both sides")


@lt.case("no padding at all, also with pad_id -1", 1, "positions count from 0, so -1 is none of them")
def _(f: Any) -> None:
    _index(f, [[5, 3, 7], [2, 2, 1]], 0, [2, 2], "rows without padding")
    _index(f, [[5, 0, 7], [2, 2, 0]], -1, [2, 2], "pad_id -1: no id is padding")


def _ok(tokens: Tensor, pad: int) -> Tensor:
    return tokens != pad


lt.plant(
    (
        "last-column",
        "this is the last column, which is padding in most rows",
        lambda tokens, pad: torch.full((len(tokens),), tokens.shape[1] - 1),
        "W-RM-5",
    ),
    (
        "minus-one",
        "-1 means the last column, which is padding in most rows",
        lambda tokens, pad: torch.full((len(tokens),), -1),
        "W-RM-5",
    ),
    (
        "longest-row",
        "every row got the position of the longest row of the batch",
        lambda tokens, pad: last_token_index(tokens, pad).max().expand(len(tokens)),
        "W-RM-5",
    ),
    (
        "count",
        "the number of real tokens minus 1 is a position only if nothing is padded on the left",
        lambda tokens, pad: _ok(tokens, pad).sum(1) - 1,
        "common",
    ),
    (
        "count-itself",
        "the number of real tokens is one past the last of them: positions count from 0",
        lambda tokens, pad: _ok(tokens, pad).sum(1),
        "common",
    ),
    (
        "before-first-padding",
        "you took the token before the first padding: a left-padded row starts with padding",
        lambda tokens, pad: (tokens == pad).int().argmax(1) - 1,
        "common",
    ),
    (
        "before-first-padding-wrapped",
        "the token before the first padding, modulo the length: still wrong for left-padded rows",
        lambda tokens, pad: ((tokens == pad).int().argmax(1) - 1) % tokens.shape[1],
        "common",
    ),
    (
        "one-too-far",
        "this is one past the last real token",
        lambda tokens, pad: last_token_index(tokens, pad) + 1,
        "common",
    ),
    (
        "before-the-end",
        "this is one before the last real token: the end-of-sequence token is real",
        lambda tokens, pad: last_token_index(tokens, pad) - 1,
        "common",
    ),
    (
        "first-real-token",
        "this is the first real token",
        lambda tokens, pad: _ok(tokens, pad).int().argmax(1),
        "common",
    ),
    (
        "from-the-end",
        "this counts from the end: argmax of the flipped mask has to be taken from L - 1",
        lambda tokens, pad: _ok(tokens, pad).flip(1).int().argmax(1),
        "common",
    ),
    (
        "token-itself",
        "this is the last real token; its position is asked for",
        lambda tokens, pad: tokens.gather(1, last_token_index(tokens, pad)[:, None])[:, 0],
        "common",
    ),
    (
        "pad-id-0",
        "the padding id is fixed to 0 in your code; it is an argument",
        lambda tokens, pad: last_token_index(tokens, 0),
        "common",
    ),
    (
        "first-occurrence",
        "you searched the row for the last real token and found its first occurrence: a token may occur twice",
        lambda tokens, pad: [row.index([x for x in row if x != pad][-1]) for row in tokens.tolist()],
        "common",
    ),
    (
        "largest-token",
        "this is where the largest token id stands: compare positions, not ids",
        lambda tokens, pad: (_ok(tokens, pad) * tokens).argmax(1),
        "common",
    ),
    (
        "above-pad-id",
        "you took only the ids above pad_id for real: every other id is real",
        lambda tokens, pad: ((tokens > pad) * torch.arange(tokens.shape[1])).amax(1),
        "common",
    ),
    (
        "0-is-padding-too",
        "id 0 counts as padding in your code even if pad_id is another one",
        lambda tokens, pad: (_ok(tokens, pad) * _ok(tokens, 0) * torch.arange(tokens.shape[1])).amax(1),
        "common",
    ),
    (
        "side-guessed",
        "you guessed from the last column on which side the batch is padded: one row may have both",
        lambda tokens, pad: (
            torch.full((len(tokens),), tokens.shape[1] - 1)
            if bool(_ok(tokens, pad)[:, -1].all())
            else _ok(tokens, pad).sum(1) - 1
        ),
        "common",
    ),
    (
        "rows-flipped",
        "flip(0) turns the order of the rows round; the positions are along axis 1",
        lambda tokens, pad: tokens.shape[1] - 1 - _ok(tokens, pad).flip(0).flip(1).int().argmax(1),
        "common",
    ),
    (
        "negative-positions",
        "your positions are negative, counted from the end: count from 0 at the start",
        lambda tokens, pad: last_token_index(tokens, pad) - tokens.shape[1],
        "common",
    ),
    (
        "narrow-numbers",
        "in long rows your positions overflow: use whole numbers of 64 bits",
        lambda tokens, pad: (_ok(tokens, pad) * torch.arange(tokens.shape[1])).to(torch.uint8).amax(1),
        "common",
    ),
    (
        "squeezed",
        "a batch of one row came back as a single number: the result has shape (B,)",
        lambda tokens, pad: last_token_index(tokens, pad).squeeze(),
        "common",
    ),
)
lt.right(
    "leading padding plus the number of real tokens",
    lambda tokens, pad: (tokens == pad).int().cumprod(1).sum(1) + _ok(tokens, pad).sum(1) - 1,
)
lt.right("argmax of the running count", lambda tokens, pad: _ok(tokens, pad).int().cumsum(1).argmax(1))
lt.right(
    "a loop", lambda tokens, pad: [max(t for t, token in enumerate(row) if token != pad) for row in tokens.tolist()]
)
lt.right(
    "argmax of the flipped mask",
    lambda tokens, pad: tokens.shape[1] - 1 - _ok(tokens, pad).flip(1).int().argmax(1),
)
lt.right(
    "argmax of the positions", lambda tokens, pad: (_ok(tokens, pad) * torch.arange(tokens.shape[1])).numpy().argmax(1)
)


# -- the algebra of Bradley and Terry --------------------------------------------------------------------

ba = Question(
    id="bt_algebra",
    title="find the false lines of the Bradley-Terry algebra",
    chapter=5,
    kind="find the false lines",
    theory=True,
    variable="false_lines",
    reference={3, 4, 7},
    reference_source="false_lines = {3, 4, 7}",
    accept=lines(8, "line", "{1, 8}"),
    hints=(
        "Put A = 1, B = 0 into every line: P is 0.731.",
        "To reach the form 1/(...), divide numerator and denominator by e^A, once. And keep sigmoid' apart from "
        "(log sigmoid)'.",
        "P = 1/(1 + e^(B - A)), dP/dA = P (1 - P), d log P/dA = 1 - P.",
    ),
    explanation="With A = 1 and B = 0 line 3 gives 0.368 and line 4 gives 1.368, where P = 0.731: line 3 drops the 1 and "
    "inverts the ratio, so that it is e^B / e^A, and line 4 is 1/P. Line 2 divided by e^A gives 1/(1 + e^(B - A)) = sigmoid(A - B), line 5. Line 7 is the "
    "derivative of log P (line 8); that of P itself is P (1 - P) = 0.197. Line 6 holds, since 1 - sigmoid(d) = "
    "sigmoid(-d).",
    probes=lambda answer: answer,
)


@ba.case(
    "at least two lines are named, and none of them is true",
    1,
    "compute both sides at A = 1, B = 0, and at A = 0, B = 2",
)
def _(found: Any) -> None:
    for line in sorted(found - {3, 4, 7}):
        require(False, f"line {line} is true")
    require(len(found) > 1, "more than one line is false")


@ba.case("all false lines are found, and only those", 2, "judge each line on its own")
def _(found: Any) -> None:
    missing = len({3, 4, 7} - found)
    require(not missing, f"{missing} of 3 false lines not found")
    extra = len(found - {3, 4, 7})
    require(not extra, f"{extra} true {'line' if extra == 1 else 'lines'} among them")


ba.plant(
    (
        "inverted-twice-missed",
        "lines 3 and 4 are false: line 3 drops the 1 and inverts the ratio, line 4 is 1/P",
        {7},
        "W-RM-4",
    ),
    ("line-3-missed", "line 3 is false: e^A / e^B + 1 - 1 is no denominator of P", {4, 7}, "W-RM-4"),
    ("line-4-missed", "line 4 is false: it is above 1, and P is a probability", {3, 7}, "W-RM-4"),
    (
        "sigma-prime",
        "line 7 is false: 1 - P is the derivative of log P, that of P is P (1 - P)",
        {3, 4},
        "W-RM-2",
    ),
    (
        "derivatives-exchanged",
        "lines 7 and 8 are exchanged: 1 - P is the derivative of log P",
        {3, 4, 8},
        "W-RM-2",
    ),
    ("result-called-false", "line 5 is true although lines 3 and 4 do not lead to it", {3, 4, 5, 7}, "common"),
    (
        "everything-after-line-3",
        "judge each line on its own: true lines follow false ones",
        {3, 4, 5, 6, 7, 8},
        "common",
    ),
    ("reciprocal", "line 2 is true: a number is 1 over its reciprocal", {2, 3, 4, 7}, "common"),
    ("complement", "line 6 is true: 1 - sigmoid(d) = sigmoid(-d)", {3, 4, 6, 7}, "common"),
    ("both-derivatives", "line 8 is true: d log P = dP / P", {3, 4, 7, 8}, "common"),
)
ba.right("a list", [7, 4, 3])
ba.right("numpy integers", np.array([3, 4, 7]))


# -- what the loss cannot see ----------------------------------------------------------------------------


def same_loss(scores):  # type: ignore[no-untyped-def]
    """Other scores with the same loss for every pair; each prompt moves by its own amount. (P, K) -> (P, K)."""
    shifts = 1 + torch.arange(len(scores), dtype=scores.dtype)
    return scores + shifts[:, None]


_SCORES = 2 * normal(4, 3, seed=1) + tensor([[3.0], [-3.0], [6.0], [11.0]])

_EASY_TO_MISS = (  # rows with mean 0, with first entry 0, with largest entry 0, with equal entries, and equal rows
    tensor([[0.0, 2.0, -2.0], [0.0, 1.0, -1.0], [0.0, 2.0, -2.0]]),
    tensor([[0.0, -1.0, -2.0], [1.0, 0.0, -1.0], [0.0, -1.0, -2.0]]),
    tensor([[0.0, 0.0, 0.0], [5.0, 5.0, 5.0]]),
    torch.zeros(2, 3),
)

_MANY_PROMPTS = normal(120, 2, seed=5)

sh = Question(
    id="reward_shift",
    title="another reward model with the same loss",
    chapter=5,
    kind="counterexample",
    theory=True,
    variable="same_loss",
    reference=same_loss,
    reference_source=source(same_loss),
    hints=(
        "Which function of the scores enters the loss of a pair? Which pairs are compared?",
        "Only the difference of two scores for the same prompt enters. What may be added to both without changing it?",
        "r(x, y) + c(x) with any c that differs from prompt to prompt.",
    ),
    explanation="The loss contains r(x, y_w) - r(x, y_l) only, and both belong to the same prompt x, so any c(x) drops "
    "out. The loss therefore pulls no reward towards 0 and fixes no scale's origin: scores of different prompts cannot "
    "be compared before they are normalised, for instance to mean 0 on reference responses. Multiplying the rewards is "
    "something else: it changes every difference.",
    probes=lambda f: [_with_input(f, scores) for scores in (_SCORES, normal(2, 4, seed=3), *_EASY_TO_MISS)],
)


def _with_input(f: Any, scores: Tensor) -> list[Any]:
    given = scores.clone()
    return [f(given), given]


@sh.case("the loss of every pair stays as it was", 2, "which number of a pair enters its loss?")
def _(f: Any) -> None:
    for scores in (_SCORES, 3 * normal(5, 4, seed=2), *_EASY_TO_MISS):
        got = as_tensor(f(scores.clone()), "scores")
        expect_shape(got, tuple(scores.shape), "scores")
        for i, j in itertools.combinations(range(scores.shape[1]), 2):
            old, new = -logsigmoid(scores[:, i] - scores[:, j]), -logsigmoid(got[:, i] - got[:, j])
            expect_close(new, old, f"losses of responses {i} against {j}", rtol=1e-3)
    got = as_tensor(f(_MANY_PROMPTS.clone()), "scores")
    expect_shape(got, tuple(_MANY_PROMPTS.shape), "scores")
    old, new = (softplus(x[:, 1] - x[:, 0]) for x in (_MANY_PROMPTS, got))
    expect_close(new, old, "losses of 120 prompts with two responses", rtol=0.02, atol=0.02)


@sh.case(
    "every score moves by 1 or more, no two prompts alike",
    1,
    "an amount for each prompt on its own, whatever its scores: what if two prompts have the same ones?",
)
def _(f: Any) -> None:
    for scores in (_SCORES, *_EASY_TO_MISS, _MANY_PROMPTS):
        moved = as_tensor(f(scores.clone()), "scores")
        expect_shape(moved, tuple(scores.shape), "scores")
        require(torch.isfinite(moved).all(), f"{len(scores)} prompts: some of your scores are not finite")
        moved = moved - scores
        least = int(moved.abs().argmin())
        row, distance = least // scores.shape[1], moved.abs().min().item()
        require(distance >= 0.99, f"scores[{row}] = {show(scores[row])}: one of them moves by {distance:.4g} only")
        apart = (moved[:, None] - moved).abs().amax(2).fill_diagonal_(math.inf)
        i, j = divmod(int(apart.argmin()), len(apart))
        require(
            apart[i, j] >= 0.099,
            f"scores[{i}] and scores[{j}] move by {show(moved[i])} and {show(moved[j])}, {apart[i, j]:.3g} apart: "
            "at least 0.1 is asked for",
        )


sh.plant(
    ("doubled", "twice the scores are twice the differences: the loss changes", lambda s: 2 * s, "W-RM-3"),
    (
        "shrunk",
        "smaller scores have smaller differences: the loss grows, so nothing pushes them to 0",
        lambda s: 0.1 * s,
        "W-RM-3",
    ),
    ("all-zero", "with all scores 0 every loss is log 2: no pair is told apart any more", lambda s: 0 * s, "W-RM-1"),
    ("one-constant", "the same constant for all prompts: each prompt may have its own", lambda s: s + 1, "common"),
    ("unchanged", "nothing has moved", lambda s: s + 0, "common"),
    (
        "by-response",
        "the amount depends on the response: then the differences change",
        lambda s: s + 1 + torch.arange(s.shape[1], dtype=s.dtype),
        "common",
    ),
    (
        "whitened",
        "centring is harmless, dividing by the spread is not: it changes every difference",
        lambda s: (s - s.mean(1, True)) / s.std(1, keepdim=True),
        "common",
    ),
    (
        "probabilities",
        "a softmax keeps the order, not the differences",
        lambda s: s.softmax(1),
        "common",
    ),
    ("negated", "the sign turns every pair round", lambda s: -s, "common"),
    (
        "ranks",
        "ranks keep the order, not the differences",
        lambda s: s.argsort(1).argsort(1).to(s.dtype),
        "common",
    ),
    (
        "centred-over-the-batch",
        "the mean of the batch is one constant for all prompts",
        lambda s: s - s.mean() - 1,
        "common",
    ),
)
sh.plant(
    (
        "centred",
        "each prompt moves by its own mean, which may be 0, or the mean of another prompt",
        lambda s: s - s.mean(1, True),
        "common",
    ),
    (
        "mean-added",
        "each prompt moves by its own mean, up instead of down; it may be 0, or that of another prompt",
        lambda s: s + s.mean(1, True),
        "common",
    ),
    (
        "relative-to-the-first",
        "each prompt moves by its first score, which may be 0, or that of another prompt",
        lambda s: s - s[:, :1],
        "common",
    ),
    (
        "relative-to-the-best",
        "each prompt moves by its best score, which may be 0, or that of another prompt",
        lambda s: s - s.amax(1, True),
        "common",
    ),
    (
        "log-softmax",
        "each prompt moves by the log-sum-exp of its scores: prompts with the same scores move alike",
        lambda s: s.log_softmax(1),
        "common",
    ),
    (
        "in-place",
        "your function changes the tensor that it was given: work on a copy",
        lambda s: s.add_(torch.arange(1.0, len(s) + 1)[:, None]),
        "common",
    ),
    (
        "nearly-alike",
        "the prompts move by nearly the same amount: at least 0.1 apart is asked for",
        lambda s: s + 1 + 0.001 * torch.arange(len(s))[:, None],
        "common",
    ),
    (
        "crowded",
        "you divided the way from 1 to 2 among the prompts: with more than 11 of them the steps are below 0.1",
        lambda s: s + torch.linspace(1, 2, len(s))[:, None],
        "common",
    ),
    (
        "from-0",
        "the first prompt moves by 0: start counting at 1",
        lambda s: s + torch.arange(len(s))[:, None],
        "common",
    ),
    (
        "times-the-largest",
        "the amounts are multiples of the largest score: if all scores are 0, nothing moves",
        lambda s: s + s.abs().max() * torch.arange(1, len(s) + 1)[:, None],
        "common",
    ),
    (
        "powers-of-10",
        "the amounts grow as powers of 10: with many prompts they swallow the differences or overflow",
        lambda s: s + 10.0 ** torch.arange(len(s))[:, None],
        "common",
    ),
    (
        "by-turns",
        "the prompts move by two amounts in turn: the third moves as the first does",
        lambda s: s + 1 + (torch.arange(len(s)) % 2)[:, None],
        "common",
    ),
)
sh.right("in steps of 1000", lambda s: s + 1000 * torch.arange(1, len(s) + 1)[:, None])
sh.right("by the rank of their means", lambda s: s + 1 + s.mean(1).argsort().argsort()[:, None])
sh.right(
    "down and up by turns",
    lambda s: s + (tensor([-1.0, 1.0]).repeat(len(s)) * torch.arange(1, 2 * len(s) + 1))[: len(s), None],
)
sh.right("numpy, float64", lambda s: s.double().numpy() - 1 - 0.1 * np.arange(len(s))[:, None])
sh.right("lists", lambda s: [[x - 7 * (i + 1) for x in row] for i, row in enumerate(s.tolist())])


# -- how far the push goes -------------------------------------------------------------------------------


def gap_after(start, num_steps, learning_rate):  # type: ignore[no-untyped-def]
    """Gap after num_steps steps of gradient descent on -log sigmoid(gap). Float, int, float -> float."""
    gap = torch.tensor(float(start), dtype=torch.float64)
    for _ in range(num_steps):
        gap = gap + learning_rate * torch.sigmoid(-gap)
    return gap.item()


def _descend(start: float, num_steps: int, learning_rate: float) -> float:
    """By autograd on the loss."""
    gap = tensor(start, dtype=torch.float64).requires_grad_()
    for _ in range(num_steps):
        (step,) = torch.autograd.grad(-logsigmoid(gap), gap)
        gap = (gap - learning_rate * step).detach().requires_grad_()
    return gap.item()


gd = Question(
    id="one_pair_descent",
    title="gradient descent on one pair",
    chapter=5,
    kind="symbolic",
    theory=True,
    variable="gap_after",
    reference=gap_after,
    reference_source=source(gap_after),
    hints=(
        "What is the slope of -log sigmoid at the current gap? In which direction does descent go?",
        "Each step adds the learning rate times sigmoid(-gap), at the gap of that moment.",
        "Repeat num_steps times: gap = gap + learning_rate sigmoid(-gap).",
    ),
    explanation="The slope is -sigmoid(-gap), so every step adds learning_rate sigmoid(-gap): always something, ever "
    "less. From 0 with step size 1 the gap is 2.26, 4.59, 6.91 and 9.21 after 10, 100, 1,000 and 10,000 steps, about "
    "log(steps). The loss does not pull the gap to 0; what keeps rewards small is early stopping, weight decay or a "
    "penalty.",
    probes=in_two_steps(
        lambda f: [float(f(*x)) for x in ((0.0, 10, 1.0), (-2.0, 3, 0.5), (6.0, 40, 1.0), (1.0, 1, 2.0))],
        lambda f: [
            outcome(10.08691, f, 10.0, 2000, 1.0),
            outcome(9.47683, f, 8.0, 100, 100.0),
            outcome(12.47989, f, 12.0, 100, 1000.0),
            outcome(1.5, f, 1.5, 0, 1.0),
        ],
        gap_after,
    ),
)


@gd.case("the first step", 1, "slope at the starting gap, times the learning rate")
def _(f: Any) -> None:
    for start, rate in ((0.0, 1.0), (-3.0, 1.0), (2.0, 0.5)):
        got = f(start, 1, rate)
        expect_close(got, _descend(start, 1, rate), f"from {start:g}, one step of size {rate:g}", rtol=1e-3, atol=6e-4)
    expect_close(f(1.5, 0, 1.0), 1.5, "from 1.5, no step at all", rtol=1e-3)


@gd.case("after 10 and 100 steps from 0", 1, "the slope changes with every step")
def _(f: Any) -> None:
    for steps in (10, 100):
        expect_close(
            f(0.0, steps, 1.0), _descend(0.0, steps, 1.0), f"from 0, {steps} steps of size 1", rtol=1e-3, atol=6e-4
        )


@gd.case("it goes on widening a large gap", 1, "is the slope ever 0?")
def _(f: Any) -> None:
    got = as_tensor(f(8.0, 300, 1.0), "gap")
    expect_shape(got, (), "gap")
    require(got > 8.0, f"from 8, 300 steps of size 1: got {got:.4g}, expected more than 8")
    expect_close(got, _descend(8.0, 300, 1.0), "from 8, 300 steps of size 1", rtol=1e-3)
    expect_close(f(10.0, 2000, 1.0), 10.08691, "from 10, 2000 steps of size 1", rtol=1e-3)
    expect_close(f(12.0, 100, 1000.0), _descend(12.0, 100, 1000.0), "from 12, 100 steps of size 1000", rtol=1e-3)


def _steps(rule: Any) -> Any:
    def f(start: float, num_steps: int, learning_rate: float) -> float:
        gap = start
        for _ in range(num_steps):
            gap = gap + learning_rate * rule(gap)
        return float(gap)

    return f


def _sig(x: float) -> float:
    return 1 / (1 + math.exp(-min(max(x, -500.0), 500.0)))


def _descend_with_old_gradients(start: float, num_steps: int, learning_rate: float) -> float:
    gap, slopes = start, 0.0
    for _ in range(num_steps):
        slopes += _sig(-gap)
        gap += learning_rate * slopes
    return gap


def _descend_by_recursion(start: float, num_steps: int, learning_rate: float) -> float:
    if num_steps == 0:
        return start
    return _descend_by_recursion(start + learning_rate * _sig(-start), num_steps - 1, learning_rate)


gd.plant(
    (
        "pulled-to-0",
        "you let the gap shrink towards 0; the loss widens it for ever",
        _steps(lambda x: -math.tanh(x)),
        "W-RM-1",
    ),
    (
        "no-push-when-large",
        "beyond 5 you took the slope for 0: it is small, and it adds up",
        _steps(lambda x: _sig(-x) if x < 5 else 0.0),
        "W-RM-2",
    ),
    (
        "sigma-prime",
        "you used the slope of sigmoid, sigmoid (1 - sigmoid), instead of that of its logarithm",
        _steps(lambda x: _sig(x) * _sig(-x)),
        "W-RM-2",
    ),
    ("sigma", "the step is sigmoid(-gap), large when the pair is in the wrong order", _steps(_sig), "common"),
    ("ascent", "you went up the loss: the gap must grow", _steps(lambda x: -_sig(-x)), "common"),
    (
        "both-scores",
        "you moved both scores: here the gap itself is the parameter",
        _steps(lambda x: 2 * _sig(-x)),
        "common",
    ),
    ("constant-slope", "you kept the first slope for all steps", lambda s, n, a: s + n * a * _sig(-s), "common"),
    ("one-step", "you made one step only", lambda s, n, a: s + a * _sig(-s), "common"),
    (
        "one-step-missing",
        "one step is missing",
        lambda s, n, a: gap_after(s, n - 1, a),
        "common",
    ),
    ("one-step-too-many", "you made one step too many", lambda s, n, a: gap_after(s, n + 1, a), "common"),
    ("rate-ignored", "the learning rate plays no part", lambda s, n, a: gap_after(s, n, 1.0), "common"),
    ("start-ignored", "you started at 0 instead of at start", lambda s, n, a: gap_after(0.0, n, a), "common"),
    (
        "log-of-steps",
        "log(exp(start) + rate n) is the right growth but not the result of the steps",
        lambda s, n, a: math.log(math.exp(s) + a * n),
        "common",
    ),
    (
        "gradients-added-up",
        "the gradients of earlier steps are added to each new one: set the gradient to 0 before every step",
        _descend_with_old_gradients,
        "common",
    ),
    (
        "ends-early",
        "the steps end before num_steps of them are made: also the many small ones add up",
        lambda s, n, a: gap_after(s, min(n, 1000), a),
        "common",
    ),
    (
        "no-push-at-9",
        "beyond some large gap you made no more steps: the slope is 0 nowhere",
        _steps(lambda x: _sig(-x) if x < 9 else 0.0),
        "W-RM-2",
    ),
    (
        "largest-gap",
        "you clamped the gap: it has no largest value",
        lambda s, n, a: min(gap_after(s, n, a), 10.0),
        "W-RM-2",
    ),
    (
        "recursion",
        "your function calls itself for every step, and Python stops at about 1,000 such calls: use a loop",
        _descend_by_recursion,
        "common",
    ),
    (
        "at-least-one-step",
        "with num_steps = 0 no step is made: the gap is start",
        lambda s, n, a: gap_after(s, max(n, 1), a),
        "common",
    ),
)
gd.right("autograd", _descend)
gd.right(
    "a tensor, float32",
    lambda s, n, a: torch.stack([x := tensor(s), *[x := x + a * torch.sigmoid(-x) for _ in range(n)]])[-1],
)


# -- the noise ceiling -----------------------------------------------------------------------------------


def noise_ceiling(differences):  # type: ignore[no-untyped-def]
    """Highest expected accuracy and least expected loss on Bradley-Terry labels. (N,) -> two numbers."""
    p = differences.sigmoid()
    accuracy = torch.maximum(p, 1 - p).mean()
    loss = -(p * torch.nn.functional.logsigmoid(differences) + (1 - p) * torch.nn.functional.logsigmoid(-differences))
    return accuracy, loss.mean()


_DIFFERENCES = [1.0, -0.5, 0.2, -2.0, 3.0]

nc = Question(
    id="noise_ceiling",
    title="what no reward model can exceed",
    chapter=5,
    kind="symbolic",
    theory=True,
    variable="noise_ceiling",
    reference=noise_ceiling,
    reference_source=source(noise_ceiling),
    hints=(
        "One pair, win probability p for the first response. Which prediction is right most often, and how often?",
        "Predict the likelier winner: right with probability max(p, 1 - p). The least loss is that of the true "
        "probability p, averaged over both labels.",
        "Mean over pairs of max(p, 1 - p) = sigmoid(|d|), and of -p log(p) - (1 - p) log(1 - p), with p = sigmoid(d).",
    ),
    explanation="The label is random: the annotator prefers the first response with probability p = sigmoid(d). Naming the "
    "better response is right with probability max(p, 1 - p) = sigmoid(|d|), and nothing is right more often. The "
    "expected loss of a prediction q is -p log q - (1 - p) log(1 - q), least at q = p, where it is the entropy of the "
    "label. A model that beats the ceiling on held-out labels has been lucky or has seen them.",
    probes=in_two_steps(
        lambda f: [list(unpack(f(tensor(x)), 2, "probe")) for x in (_DIFFERENCES, [0.0, 4.0], [-1.0, -3.0, 0.5])],
        lambda f: [outcome(math.log(2) / 2, lambda x=x: f(tensor([x, 0.0]))[1]) for x in (20.0, 40.0, -40.0)],
        noise_ceiling,
    ),
)


def _ceiling(f: Any, differences: Tensor) -> tuple[Tensor, Tensor]:
    accuracy, loss = unpack(f(differences.clone()), 2, "your answer")
    return as_tensor(accuracy, "accuracy"), as_tensor(loss, "loss")


@nc.case("equally good responses: a coin flip", 1, "what can one say about a tie?")
def _(f: Any) -> None:
    accuracy, loss = _ceiling(f, torch.zeros(3))
    expect_close(accuracy, 0.5, "accuracy at differences (0, 0, 0)", rtol=2e-3)
    expect_close(loss, math.log(2), "loss at differences (0, 0, 0)", rtol=2e-3)
    require(
        (_ceiling(f, tensor([3.0, 4.0]))[0] - accuracy).abs() > 0.1, "the accuracy does not depend on the differences"
    )


@nc.case("the accuracy of the best of all rules", 2, "list the rules: for each pair, which response to name")
def _(f: Any) -> None:
    for d in (tensor(_DIFFERENCES), normal(4, seed=1), normal(3, seed=2) - 2, tensor([0.0, 0.0, 2.0])):
        p = [1 / (1 + math.exp(-x)) for x in d.tolist()]
        rules = itertools.product((True, False), repeat=len(p))
        best = max(sum(x if first else 1 - x for x, first in zip(p, rule, strict=True)) / len(p) for rule in rules)
        ties = " with 2 ties" if len(d.unique()) < len(d) else ""
        expect_close(_ceiling(f, d)[0], best, f"accuracy on {len(p)} pairs{ties}", rtol=2e-3)
    for x in (40.0, -40.0):
        expect_close(_ceiling(f, tensor([x, 0.0]))[0], 0.75, f"accuracy at differences ({x:g}, 0)", rtol=2e-3)


@nc.case(
    "the least expected loss, finite for large differences too",
    1,
    "the label is random: average the loss over both labels; logsigmoid does not underflow",
)
def _(f: Any) -> None:
    for d in (tensor(_DIFFERENCES), normal(4, seed=3)):
        want = torch.distributions.Bernoulli(logits=d.double()).entropy().mean()
        expect_close(_ceiling(f, d)[1], want, f"loss on {len(d)} pairs", rtol=2e-3, atol=6e-4)
    for x in (20.0, 40.0, -40.0):
        expect_close(_ceiling(f, tensor([x, 0.0]))[1], math.log(2) / 2, f"loss at differences ({x:g}, 0)", rtol=2e-3)


def _right_loss(d: Tensor) -> Tensor:
    return noise_ceiling(d)[1]  # type: ignore[no-any-return]


def _plogp(p: Tensor) -> Tensor:
    return (p * p.log()).mean()


def _entropy_terms(p: Tensor) -> Tensor:
    return -p * p.log() - (1 - p) * (1 - p).log()


def _right_accuracy(d: Tensor) -> Tensor:
    return noise_ceiling(d)[0]  # type: ignore[no-any-return]


nc.plant(
    ("perfect", "labels are random: no model reaches accuracy 1 and loss 0", lambda d: (1.0, 0.0), "common"),
    (
        "accuracy-1",
        "no model reaches accuracy 1 on random labels",
        lambda d: (1.0, _right_loss(d)),
        "common",
    ),
    (
        "first-always-named",
        "you named the first response of each pair; the better one may be the second",
        lambda d: (d.sigmoid().mean(), _right_loss(d)),
        "common",
    ),
    (
        "two-annotators",
        "this is how often two annotators agree; a model names the better response every time",
        lambda d: ((d.sigmoid().square() + (-d).sigmoid().square()).mean(), _right_loss(d)),
        "common",
    ),
    (
        "mean-inside",
        "you averaged the differences before the sigmoid; the sigmoid is not linear",
        lambda d: (d.abs().mean().sigmoid(), _right_loss(d)),
        "common",
    ),
    (
        "one-rule",
        "you chose one answer for all pairs: each pair has its own better response",
        lambda d: (torch.maximum(d.sigmoid().mean(), (-d).sigmoid().mean()), _right_loss(d)),
        "common",
    ),
    ("loss-0", "the least loss is not 0: the label is random", lambda d: (_right_accuracy(d), 0.0), "W-RM-1"),
    (
        "loss-without-noise",
        "this is the loss if the better response always won",
        lambda d: (_right_accuracy(d), -logsigmoid(d.abs()).mean()),
        "common",
    ),
    (
        "log-of-the-ceiling",
        "the loss is not minus the logarithm of the accuracy",
        lambda d: (_right_accuracy(d), -_right_accuracy(d).log()),
        "common",
    ),
    (
        "loss-log-2",
        "log 2 is the loss of a model that knows nothing",
        lambda d: (_right_accuracy(d), math.log(2)),
        "common",
    ),
    (
        "zero-times-log-zero",
        "0 * log 0 gives nan once 1 - p is rounded to 0: use logsigmoid(d) and logsigmoid(-d)",
        lambda d: (_right_accuracy(d), -_plogp(d.sigmoid()) - _plogp(1 - d.sigmoid())),
        "common",
    ),
    (
        "first-always-wins",
        "this is the loss if the first response always won: average over both labels",
        lambda d: (_right_accuracy(d), -logsigmoid(d).mean()),
        "common",
    ),
    (
        "half-of-the-loss",
        "-p log p is one of two terms: the second response wins with probability 1 - p",
        lambda d: (_right_accuracy(d), -_plogp(d.sigmoid())),
        "common",
    ),
    (
        "loss-sum",
        "the loss is summed over the pairs; a mean is asked for",
        lambda d: (_right_accuracy(d), _right_loss(d) * len(d)),
        "common",
    ),
    (
        "both-sums",
        "both numbers are summed over the pairs; means are asked for",
        lambda d: (_right_accuracy(d) * len(d), _right_loss(d) * len(d)),
        "common",
    ),
    (
        "exchanged",
        "the two numbers are exchanged: the accuracy comes first",
        lambda d: (_right_loss(d), _right_accuracy(d)),
        "common",
    ),
    (
        "bits",
        "the loss is in bits: use the natural logarithm",
        lambda d: (_right_accuracy(d), _right_loss(d) / math.log(2)),
        "common",
    ),
    (
        "ties-left-out",
        "you left ties out of the accuracy: they are pairs, too, and each is right half of the time",
        lambda d: (_right_accuracy(d[d != 0]) if bool(d.any()) else tensor(0.5), _right_loss(d)),
        "common",
    ),
    (
        "ties-always-wrong",
        "a tie counts as wrong in your accuracy: whatever is named there is right half of the time",
        lambda d: (((d > 0) * d.sigmoid() + (d < 0) * (-d).sigmoid()).mean(), _right_loss(d)),
        "common",
    ),
    (
        "entropy-of-the-mean",
        "you averaged the probabilities before the entropy: each pair has its own",
        lambda d: (_right_accuracy(d), _plogp(d.sigmoid().mean()).neg() - _plogp((-d).sigmoid().mean())),
        "common",
    ),
    (
        "clamped",
        "a clamp keeps the probabilities away from 0 and 1: the loss of a pair that is nearly certain is nearly 0",
        lambda d: (
            _right_accuracy(d),
            -_plogp(d.sigmoid().clamp(0.01, 0.99)) - _plogp((-d).sigmoid().clamp(0.01, 0.99)),
        ),
        "common",
    ),
    (
        "nan-left-out",
        "nanmean leaves out the pairs whose entropy gave nan: their loss is nearly 0, and they count",
        lambda d: (_right_accuracy(d), _entropy_terms(d.sigmoid()).nanmean()),
        "common",
    ),
    (
        "per-pair",
        "these are the numbers of every single pair: take their means",
        lambda d: (d.abs().sigmoid(), torch.distributions.Bernoulli(logits=d).entropy()),
        "common",
    ),
)


def _ceiling_by_loop(differences: Tensor) -> list[float]:
    p = [1 / (1 + math.exp(-abs(x))) for x in differences.tolist()]
    return [sum(p) / len(p), sum(-q * math.log(q) for x in p for q in (x, 1 - x) if q > 0) / len(p)]


nc.right("python floats", _ceiling_by_loop)
nc.right(
    "torch.distributions",
    lambda d: (d.abs().sigmoid().mean(), torch.distributions.Bernoulli(logits=d.double()).entropy().mean()),
)


# -- K responses to one prompt ---------------------------------------------------------------------------


def ranking_loss(scores):  # type: ignore[no-untyped-def]
    """Mean loss over all K (K - 1)/2 pairs of each prompt, columns from best to worst. (P, K) -> (P,)."""
    better, worse = torch.triu_indices(scores.shape[1], scores.shape[1], offset=1)
    return -torch.nn.functional.logsigmoid(scores[:, better] - scores[:, worse]).mean(1)


def _ranking_probe(f: Any) -> list[Any]:
    out: list[Any] = []
    for scores in (normal(2, 4, seed=1), normal(3, 3, seed=2), tensor([[1.0, 1.0, 0.0], [2.0, 2.0, 2.0]])):
        scores = scores.requires_grad_()
        losses = f(scores)
        out += [losses, gradient_or_none(losses, scores)]
    return out


_ONE_SIDED = tensor([[200.0, 0.0, -1.0], [0.0, -1.0, -200.0]])  # two of three losses are 0 in float32


def _pair_push(f: Any, difference: float) -> Tensor:
    scores = tensor([[difference, 0.0], [0.0, difference]]).requires_grad_()
    return gradient(f(scores), scores, "gradient")[0]


def _ranking_unusual(f: Any) -> list[Any]:
    return [
        *(
            outcome(tensor([2 * x / 3 + 0.2310490602] * 2), f, tensor([[-x, 0.0, 0.0]] * 2))
            for x in (60.0, 900.0, 3000.0)
        ),
        outcome(tensor([-1.0, 1.0]), lambda: _pair_push(f, -3000.0)),
        outcome(tensor([-1.0, 1.0]) * math.exp(-14), lambda: _pair_push(f, 14.0), atol=_FADED),
        outcome(tensor([math.log1p(math.exp(-1)) / 3] * 2), f, _ONE_SIDED),
        outcome(tensor([math.log(2)]), f, torch.zeros(1, 3)),
    ]


kw = Question(
    id="k_wise_ranking",
    title="a ranking of K responses as one batch element",
    chapter=5,
    kind="function",
    theory=False,
    variable="ranking_loss",
    reference=ranking_loss,
    reference_source=source(ranking_loss),
    hints=(
        "How many pairs does a ranking of K responses hold? Which of the two is the chosen one?",
        "All K (K - 1)/2 pairs, not only neighbours; a mean over them, so that each prompt weighs the same.",
        "-(mean over i < j of logsigmoid(scores[:, i] - scores[:, j])), one number per prompt.",
    ),
    explanation="A ranking from best to worst says which of any two responses is preferred: K (K - 1)/2 pairs, all of "
    "them from K forward passes. Their mean is the prompt's loss, so a prompt with many responses weighs no more than "
    "one with two. The pairs of a prompt stay in one batch element: spread over batches, each response would be seen "
    "K - 1 times per epoch, and the model overfits sooner.",
    probes=in_two_steps(_ranking_probe, _ranking_unusual, ranking_loss),
)


@kw.case("two responses: the loss of the pair", 1, "K = 2 has one pair")
def _(f: Any) -> None:
    scores = normal(5, 2, seed=3)
    got = as_tensor(f(scores), "losses")
    expect_shape(got, (5,), "losses")
    expect_close(got, softplus(scores[:, 1] - scores[:, 0]), "losses of five prompts with two responses")
    expect_close(f(torch.zeros(1, 2)), tensor([math.log(2)]), "losses of one prompt with two equal scores")


@kw.case("all pairs, each once", 2, "the best against the worst is a pair, too")
def _(f: Any) -> None:
    for size in (3, 5):
        scores = normal(2, size, seed=size)
        pairs = list(itertools.combinations(range(size), 2))
        want = sum(softplus(scores[:, j] - scores[:, i]) for i, j in pairs) / len(pairs)
        expect_close(f(scores.clone()), want, f"losses of two prompts with {size} responses")
    one = math.log1p(math.exp(-1)) / 3
    expect_close(f(_ONE_SIDED.clone()), [one, one], "losses at scores (200, 0, -1) and (0, -1, -200)")


@kw.case("every prompt weighs the same, whatever K", 1, "equal scores give log 2")
def _(f: Any) -> None:
    for size in (2, 4, 9):
        expect_close(
            f(torch.full((3, size), 1.5)), torch.full((3,), math.log(2)), f"{size} responses with equal scores"
        )


@kw.case("the gradient: the best is pushed up, the worst down, the sum is 0", 1, "only differences enter")
def _(f: Any) -> None:
    scores = tensor([[2.0, -1.0, 0.5], [-900.0, 0.0, 1.0]]).requires_grad_()
    slope_ = gradient(f(scores), scores, "gradient in scores")
    expect_close(slope_.sum(1), torch.zeros(2), "sum of the gradient over the responses")
    push = [[(scores[b, j] - scores[b, i]).sigmoid().item() for j in range(3)] for b in range(2) for i in range(3)]
    want = [
        [(-push[3 * b][1] - push[3 * b][2]) / 3, (push[3 * b][1] - push[3 * b + 1][2]) / 3,
         (push[3 * b][2] + push[3 * b + 1][2]) / 3] for b in range(2)
    ]  # fmt: skip
    expect_close(slope_, tensor(want), "gradient in scores (2, -1, 0.5) and (-900, 0, 1)")
    far, loss = tensor([[-900.0, 0.0, 0.0], [-3000.0, 0.0, 0.0]]), math.log(2) / 3
    expect_close(f(far), [600 + loss, 2000 + loss], "losses at scores (-900, 0, 0) and (-3000, 0, 0)")
    expect_close(_pair_push(f, -3000.0), [-1.0, 1.0], "gradient in scores (-3000, 0)")
    expect_close(_pair_push(f, 14.0), [-math.exp(-14), math.exp(-14)], "gradient in scores (14, 0)", atol=_FADED)


def _differences(s: Tensor) -> Tensor:
    return s[:, :, None] - s[:, None, :]


def _upper(s: Tensor, diagonal: int = 1) -> Tensor:
    return torch.ones(s.shape[1], s.shape[1]).triu(diagonal)


def _ranking_sum(s: Tensor) -> Tensor:
    return (-logsigmoid(_differences(s)) * _upper(s)).sum((1, 2))


def _plackett_luce(s: Tensor) -> Tensor:
    tails = s.flip(1).logcumsumexp(1).flip(1)
    return (tails - s).sum(1)


def _ranking(loss: Callable[[Tensor], Tensor], s: Tensor) -> Tensor:
    i, j = torch.triu_indices(s.shape[1], s.shape[1], offset=1)
    return loss(s[:, i] - s[:, j]).mean(1)


def _ranking_by_mask(counts: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def f(s: Tensor) -> Tensor:
        i, j = torch.triu_indices(s.shape[1], s.shape[1], offset=1)
        mask = counts(s[:, i] - s[:, j])
        return (-logsigmoid(s[:, i] - s[:, j]) * mask).sum(1) / mask.sum(1).clamp(min=1)

    return f


def _naive_ranking(s: Tensor) -> Tensor:
    return _ranking(lambda difference: -difference.sigmoid().log(), s)


kw.plant(
    ("sum", "a sum over the pairs: prompts with more responses weigh more", _ranking_sum, "common"),
    (
        "neighbours",
        "only neighbours in the ranking are compared; every two responses are a pair",
        lambda s: -logsigmoid(s[:, :-1] - s[:, 1:]).mean(1),
        "common",
    ),
    (
        "best-against-the-rest",
        "only the best is compared with the others; every two responses are a pair",
        lambda s: -logsigmoid(s[:, :1] - s[:, 1:]).mean(1),
        "common",
    ),
    (
        "both-directions",
        "each pair is counted both ways round, so that the ranking cancels",
        lambda s: (
            (-logsigmoid(_differences(s)) * (1 - torch.eye(s.shape[1]))).sum((1, 2)) / (s.shape[1] * (s.shape[1] - 1))
        ),
        "common",
    ),
    (
        "with-itself",
        "each response is compared with itself, too: that adds log 2 per response",
        lambda s: (-logsigmoid(_differences(s)) * _upper(s, 0)).sum((1, 2)) / _upper(s, 0).sum(),
        "common",
    ),
    ("reversed", "the first column is the best one: chosen minus rejected", lambda s: ranking_loss(-s), "common"),
    ("no-minus", "the minus is missing: this is the log-likelihood", lambda s: -ranking_loss(s), "common"),
    (
        "whole-matrix",
        "all K^2 ordered pairs are averaged, each response with itself included: only K (K - 1)/2 are in the ranking",
        lambda s: -logsigmoid(_differences(s)).mean((1, 2)),
        "common",
    ),
    (
        "detached",
        "the value is right, but no gradient reaches the scores",
        lambda s: ranking_loss(s.detach()),
        "common",
    ),
    (
        "worse-detached",
        "the worse score of each pair is detached: right value, but nothing pushes it down",
        lambda s: (-logsigmoid(s[:, :, None] - s.detach()[:, None, :]) * _upper(s)).sum((1, 2)) / _upper(s).sum(),
        "common",
    ),
    (
        "divided-by-k-squared",
        "divide by the number of pairs, K (K - 1)/2, not by K^2",
        lambda s: _ranking_sum(s) / s.shape[1] ** 2,
        "common",
    ),
    (
        "divided-by-k",
        "divide by the number of pairs, K (K - 1)/2, not by K",
        lambda s: _ranking_sum(s) / s.shape[1],
        "common",
    ),
    (
        "plackett-luce",
        "this is the Plackett-Luce loss of the whole ranking, not a mean over pairs",
        _plackett_luce,
        "common",
    ),
    (
        "mean-over-prompts",
        "you averaged over the prompts: one number per prompt is asked for",
        lambda s: ranking_loss(s).mean(),
        "common",
    ),
    (
        "naive-log",
        "not finite far in the wrong order, where sigmoid underflows and exp overflows: use logsigmoid",
        _naive_ranking,
        "common",
    ),
    (
        "mean-difference",
        "you averaged the differences before the loss; the loss is not linear",
        lambda s: -logsigmoid((_differences(s) * _upper(s)).sum((1, 2)) / _upper(s).sum()),
        "common",
    ),
    (
        "better-detached",
        "the better score of each pair is detached: right value, but nothing pushes it up",
        lambda s: (-logsigmoid(s.detach()[:, :, None] - s[:, None, :]) * _upper(s)).sum((1, 2)) / _upper(s).sum(),
        "common",
    ),
    (
        "plackett-luce-mean",
        "this is the Plackett-Luce loss, averaged over the K - 1 places: pairs are asked for",
        lambda s: _plackett_luce(s) / (s.shape[1] - 1),
        "common",
    ),
    (
        "half-of-the-mean",
        "you divided by K (K - 1): a ranking has half as many pairs",
        lambda s: ranking_loss(s) / 2,
        "common",
    ),
    (
        "masked-before-the-loss",
        "the differences that you set to 0 still cost log 2 each: mask the losses, not the differences",
        lambda s: -logsigmoid(_differences(s) * _upper(s)).sum((1, 2)) / _upper(s).sum(),
        "common",
    ),
    (
        "sorted-by-score",
        "you sorted the scores: the columns are the annotator's order, and the model may disagree",
        lambda s: ranking_loss(s.sort(1, descending=True).values),
        "common",
    ),
    (
        "ties-left-out",
        "pairs with equal scores are left out: such a pair costs log 2",
        _ranking_by_mask(lambda difference: difference != 0),
        "common",
    ),
    (
        "zero-losses-left-out",
        "you divided by the number of losses above 0: a loss that is rounded to 0 belongs to a pair, too",
        _ranking_by_mask(lambda difference: -logsigmoid(difference) > 0),
        "common",
    ),
    (
        "capped-loss",
        "a clamp, or a small number inside the logarithm, caps the loss of a pair far in the wrong order",
        lambda s: _ranking(lambda difference: -(difference.sigmoid() + 1e-12).log(), s),
        "common",
    ),
    (
        "where",
        "the value is right but nan is its gradient: torch.where differentiates the infinite branch, too",
        lambda s: _ranking(_where_far, s),
        "common",
    ),
    (
        "generous-clamp",
        "a clamp at a large number is still a clamp: beyond it the worst pair gets no push",
        lambda s: _ranking(lambda difference: -logsigmoid(difference.clamp(-1000, 1000)), s),
        "common",
    ),
    (
        "clamped-above",
        "the differences are clamped from above: the push on a pair in the right order fades, but it does not end",
        lambda s: _ranking(lambda difference: -logsigmoid(difference.clamp(max=10)), s),
        "W-RM-2",
    ),
    (
        "squeezed",
        "the loss of a single prompt came back as a number without an axis: squeeze drops it",
        lambda s: ranking_loss(s).squeeze(),
        "common",
    ),
)


def _ranking_by_loop(scores: Tensor) -> Tensor:
    rows = []
    for row in scores.double():
        pairs = [softplus(row[j] - row[i]) for i in range(len(row)) for j in range(i + 1, len(row))]
        rows.append(torch.stack(pairs).mean())
    return torch.stack(rows)


def _column_pairs(size: int) -> list[tuple[slice, list[int]]]:
    return [(slice(None), list(pair)) for pair in itertools.combinations(range(size), 2)]


kw.right("two loops, float64", _ranking_by_loop)
kw.right(
    "log-sum-exp of every pair",
    lambda s: torch.stack([x.logsumexp(1) - x[:, 0] for x in map(s.__getitem__, _column_pairs(s.shape[1]))], 1).mean(1),
)
kw.right("a matrix of pairs", lambda s: _ranking_sum(s) * 2 / (s.shape[1] * (s.shape[1] - 1)))


# -- calibration -----------------------------------------------------------------------------------------


def calibration_error(probabilities, outcomes, num_bins=10):  # type: ignore[no-untyped-def]
    """Mean over bins, weighted by their pairs, of |mean probability - share of wins|. (N,), (N,) bool -> number."""
    bins = (probabilities * num_bins).long().clamp(max=num_bins - 1)
    error = 0.0
    for b in range(num_bins):
        inside = bins == b
        if inside.any():
            gap = probabilities[inside].mean() - outcomes[inside].to(probabilities.dtype).mean()
            error += inside.sum() / len(probabilities) * gap.abs()
    return error


_P = tensor([0.02, 0.11, 0.17, 0.31, 0.33, 0.38, 0.58, 0.72, 0.77, 0.93, 0.96, 1.0])
_WINS = tensor([0, 0, 1, 0, 1, 0, 1, 1, 0, 1, 1, 0]) > 0
_EDGES, _EDGE_WINS = tensor([0.0, 0.25, 0.5, 0.75]), tensor([True, False, False, False])
_FEW, _FEW_WINS = tensor([0.61, 0.61, 0.61, 0.01]), tensor([True, False, True, False])
_CERTAIN, _CERTAIN_WINS = tensor([0.0, 1.0, 1.0]), tensor([False, True, True])
_PRECISION = 6e-4  # three decimals

ce = Question(
    id="calibration",
    title="how far win probabilities are from win rates",
    chapter=5,
    kind="function",
    theory=False,
    variable="calibration_error",
    reference=calibration_error,
    reference_source=source(calibration_error),
    hints=(
        "Sort the pairs into bins by their predicted probability. Which two numbers does each bin compare?",
        "The mean prediction of the bin against the share of wins in it. Bins count by the number of their pairs; empty "
        "ones do not count.",
        "Sum over bins of n_b/N |mean of probabilities in b - mean of outcomes in b|.",
    ),
    explanation="Calibrated means: of the pairs that get 70 %, 70 % are won. Bin the predictions, compare the mean "
    "prediction with the share of wins in each bin, and weigh the bins with their sizes. A model may rank perfectly and "
    "be badly calibrated: doubling all score differences changes no order, and a calibrated model becomes overconfident.",
    probes=lambda f: [f(_P, _WINS, 5), f(_P[:5], _WINS[:5], 2), f(_P, _WINS), f(_EDGES, _EDGE_WINS, 4)],
)


@ce.case(
    "one bin: mean prediction against share of wins",
    1,
    "two numbers: the mean of the predictions and the share of wins",
)
def _(f: Any) -> None:
    got = f(tensor([0.6, 0.7, 0.8, 0.9]), tensor([True, False, True, False]), num_bins=1)
    expect_close(got, 0.25, "probabilities (.6, .7, .8, .9), outcomes (1, 0, 1, 0), 1 bin", atol=_PRECISION)
    got = f(tensor([0.1, 0.2, 0.3]), tensor([True, True, False]), num_bins=1)
    expect_close(got, 2 / 3 - 0.2, "probabilities (.1, .2, .3), outcomes (1, 1, 0), 1 bin", atol=_PRECISION)
    got = f(tensor([0.2] * 5 + [0.8] * 5), tensor([1, 1, 0, 0, 0, 1, 1, 1, 1, 1]) > 0, num_bins=1)
    expect_close(got, 0.2, "five pairs at .2 with 2 wins, five at .8 with 5, 1 bin", atol=_PRECISION)


@ce.case(
    "bins count by the number of their pairs; empty ones do not count", 1, "weigh each bin with its share of the pairs"
)
def _(f: Any) -> None:
    got = f(_FEW.clone(), _FEW_WINS.clone(), num_bins=2)
    expect_close(got, 3 / 4 * (2 / 3 - 0.61) + 1 / 4 * 0.01, "three pairs at .61, one at .01, 2 bins", atol=_PRECISION)
    got = f(_FEW.clone(), _FEW_WINS.clone(), num_bins=50)
    expect_close(got, 3 / 4 * (2 / 3 - 0.61) + 1 / 4 * 0.01, "the same in 50 bins, most of them empty", atol=_PRECISION)


@ce.case("errors of opposite sign do not cancel between bins", 1, "the absolute value is taken per bin")
def _(f: Any) -> None:
    got = f(tensor([0.3, 0.3, 0.7, 0.7]), tensor([False, False, True, True]), num_bins=2)
    expect_close(got, 0.3, "too high by .3 in one bin, too low by .3 in the other", atol=_PRECISION)


@ce.case(
    "a bin holds its lower edge, the last one also 1; 10 bins by default",
    1,
    "floor(p * num_bins), at most num_bins - 1",
)
def _(f: Any) -> None:
    p, wins = tensor([1.0, 1.0, 0.95, 0.85]), tensor([True, False, True, True])
    got = f(p, wins)
    want = 3 / 4 * (2.95 / 3 - 2 / 3) + 1 / 4 * 0.15
    expect_close(got, want, "probabilities (1, 1, .95, .85), outcomes (1, 0, 1, 1)", atol=_PRECISION)
    got = f(_CERTAIN.clone(), _CERTAIN_WINS.clone())
    expect_close(got, 0.0, "probabilities (0, 1, 1), outcomes (0, 1, 1)", atol=_PRECISION)
    got = f(_EDGES.clone(), tensor([True, False, True, False]), num_bins=4)
    want = (1 + 0.25 + 0.5 + 0.75) / 4
    expect_close(got, want, "probabilities (0, .25, .5, .75), outcomes (1, 0, 1, 0), 4 bins", atol=_PRECISION)


def _calibration(
    *,
    weigh: bool = True,
    empty: bool = True,
    absolute: bool = True,
    power: int = 1,
    worst: bool = False,
    centre: bool = False,
    last: bool = True,
    default: int = 10,
    equal_mass: bool = False,
    closed_right: bool = False,
    drop_0: bool = False,
    rounded: bool = False,
    wrap: bool = False,
    own_bin: bool = False,
    fixed: bool = False,
    confidence: bool = False,
) -> Any:
    def f(probabilities: Tensor, outcomes: Tensor, num_bins: int | None = None) -> Tensor:
        n = 10 if fixed else num_bins or default
        p, wins = probabilities.double(), outcomes.double()
        if confidence:
            p, wins = torch.maximum(p, 1 - p), ((p > 0.5) == outcomes).double()
        bins = (p * n + 1e-9).long()
        if closed_right:
            bins = ((p * n - 1e-6).ceil().long() - 1).clamp(min=-1 if drop_0 else 0)
        if rounded:
            bins = (p * n).round().long()
        if wrap:
            bins = bins % n
        bins = bins.clamp(max=n - 1) if last else bins
        if equal_mass:
            bins = p.argsort().argsort() * n // len(p)
        gaps, sizes = [], []
        for b in range(n + own_bin):
            inside = bins == b
            if inside.any():
                mean = tensor((b + 0.5) / n).double() if centre else p[inside].mean()
                gaps.append(mean - wins[inside].mean())
                sizes.append(inside.sum() / len(p))
        gap, size = torch.stack(gaps), torch.stack(sizes)
        if absolute:
            gap = gap.abs()
        if worst:
            return gap.max()
        if not weigh:
            return gap.sum() / (n if not empty else len(gaps))
        return (size * gap**power).sum()

    return f


def _calibration_closed_on_both_sides(probabilities: Tensor, outcomes: Tensor, num_bins: int = 10) -> float:
    error, excess = 0.0, probabilities.double() - outcomes.double()
    for b in range(num_bins):
        inside = (probabilities >= b / num_bins) & (probabilities <= (b + 1) / num_bins)
        error += float(excess[inside].sum().abs()) / len(excess)
    return error


def _calibration_by_bins(bins: Tensor, probabilities: Tensor, outcomes: Tensor, num_bins: int) -> float:
    excess = probabilities.double() - outcomes.double()
    bins = bins.long().clamp(0, num_bins - 1)
    return float(torch.zeros(num_bins).double().index_add(0, bins, excess).abs().sum()) / len(excess)


def _calibration_over_range(probabilities: Tensor, outcomes: Tensor, num_bins: int = 10) -> float:
    p = probabilities.double()
    bins = (p - p.min()) / (p.max() - p.min() + 1e-9) * num_bins
    return _calibration_by_bins(bins, probabilities, outcomes, num_bins)


def _calibration_over_upper_half(probabilities: Tensor, outcomes: Tensor, num_bins: int = 10) -> float:
    return _calibration_by_bins((2 * probabilities - 1) * num_bins, probabilities, outcomes, num_bins)


for _name, _says, _answer in [
    (
        "bins-unweighted",
        "all bins count the same: weigh them with the number of their pairs",
        _calibration(weigh=False),
    ),
    (
        "divided-by-all-bins",
        "you divided by the number of bins, the empty ones included",
        _calibration(weigh=False, empty=False),
    ),
    ("signed", "without the absolute value the errors of the bins cancel", _calibration(absolute=False)),
    ("squared", "the gaps are squared; their absolute value is asked for", _calibration(power=2)),
    ("worst-bin", "this is the worst bin, not the mean over bins", _calibration(worst=True)),
    (
        "centre-of-the-bin",
        "you compared with the middle of the bin instead of its mean prediction",
        _calibration(centre=True),
    ),
    ("one-left-out", "a probability of exactly 1 falls out of the last bin", _calibration(last=False)),
    (
        "equal-mass",
        "your bins hold equally many pairs; bins of equal width are asked for",
        _calibration(equal_mass=True),
    ),
    (
        "confidence",
        "you judged max(p, 1 - p) against right or wrong: here p is the probability that the first response wins",
        _calibration(confidence=True),
    ),
    (
        "closed-on-the-right",
        "a probability on an edge fell into the bin below: each bin holds its lower edge",
        _calibration(closed_right=True),
    ),
    (
        "closed-on-both-sides",
        "a probability on an edge counts in two bins: each bin holds its lower edge only",
        _calibration_closed_on_both_sides,
    ),
    (
        "zero-left-out",
        "your bins hold their upper edges, and a probability of exactly 0 is in none of them",
        _calibration(closed_right=True, drop_0=True),
    ),
    (
        "bin-of-its-own",
        "a probability of exactly 1 has a bin of its own: it belongs to the last one",
        _calibration(last=False, own_bin=True),
    ),
    (
        "one-in-the-first-bin",
        "a probability of exactly 1 fell into the first bin: it belongs to the last one",
        _calibration(wrap=True),
    ),
    (
        "rounded",
        "you rounded p * num_bins to the nearest number: a bin begins at its lower edge, so round down",
        _calibration(rounded=True),
    ),
    ("bins-fixed", "the number of bins is fixed in your code; it is an argument", _calibration(fixed=True)),
    (
        "from-least-to-largest",
        "your bins run from the least to the largest probability: they cut the whole of [0, 1]",
        _calibration_over_range,
    ),
    (
        "upper-half-only",
        "your bins run from 0.5 to 1: here the probabilities go down to 0",
        _calibration_over_upper_half,
    ),
    (
        "clamped",
        "you moved the probabilities 0 and 1: they need no clamp, as no logarithm is taken",
        lambda probabilities, outcomes, num_bins=10: calibration_error(
            probabilities.clamp(0.001, 0.999), outcomes, num_bins
        ),
    ),
    (
        "percent",
        "this is in percent: a share between 0 and 1 is asked for",
        lambda probabilities, outcomes, num_bins=10: 100 * calibration_error(probabilities, outcomes, num_bins),
    ),
    ("other-default", "the default number of bins is 10", _calibration(default=5)),
    (
        "per-pair",
        "this compares each prediction with one outcome, which is 0 or 1: that is no calibration error",
        lambda probabilities, outcomes, num_bins=10: (probabilities - outcomes.float()).abs().mean(),
    ),
    (
        "brier",
        "this is the Brier score, in which sharpness and calibration are mixed",
        lambda probabilities, outcomes, num_bins=10: (probabilities - outcomes.float()).square().mean(),
    ),
    (
        "overall",
        "this is the error of one single bin: overall mean prediction against overall share of wins",
        lambda probabilities, outcomes, num_bins=10: (probabilities - outcomes.float()).mean().abs(),
    ),
]:
    ce.wrong(_name, _says, _answer)


def _calibration_by_count(probabilities: Tensor, outcomes: Tensor, num_bins: int = 10) -> float:
    bins = np.minimum((probabilities.numpy() * num_bins).astype(int), num_bins - 1)
    excess = np.bincount(bins, weights=probabilities.double().numpy() - outcomes.numpy())
    return float(np.abs(excess).sum() / len(bins))


ce.right("numpy bincount", _calibration_by_count)
ce.right("all bins at once, float64", _calibration())
ce.right(
    "bucketize",
    lambda probabilities, outcomes, num_bins=10: _calibration_by_bins(
        torch.bucketize(probabilities, torch.linspace(0, 1, num_bins + 1)[1:-1], right=True),
        probabilities,
        outcomes,
        num_bins,
    ),
)

CHAPTER: Sequence[Question] = (bt, rs, lt, ba, sh, gd, nc, kw, ce)
