"""Chapter 2, policy gradient: ten questions, with the wrong answers that their checks must reject."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, tensor

from rlhfkit.homework.comparisons import (
    Fail,
    as_tensor,
    expect_close,
    expect_shape,
    gradient,
    gradient_or_none,
    in_two_steps,
    lines,
    normal,
    numbers,
    outcome,
    require,
    source,
    unpack,
)
from rlhfkit.homework.core import Question

# -- the gradient of the expected score ------------------------------------------------------------------


def policy_gradient(logits, scores):  # type: ignore[no-untyped-def]
    """Gradient of J = (1/P) sum_p sum_y pi(y|p) s(p, y) in the logits. (P, N), (P, N) -> (P, N)."""
    probs = logits.softmax(-1)
    expected = (probs * scores).sum(-1, keepdim=True)
    return probs * (scores - expected) / len(logits)


pg = Question(
    id="policy_gradient",
    title="the exact gradient of the expected score",
    chapter=2,
    kind="function",
    theory=False,
    variable="policy_gradient",
    reference=policy_gradient,
    reference_source=source(policy_gradient),
    hints=(
        "List the responses of one prompt: J is a finite sum. Which factor of each term contains the logits?",
        "Differentiate pi(y) with the log-derivative identity, and use that the gradient of log pi(y) in the logits "
        "is 1_y - pi.",
        "Per prompt the gradient is pi(y) (s(y) - sum_z pi(z) s(z)); J is the mean over prompts, so divide by P.",
    ),
    explanation="Only pi contains the logits. d pi(y)/d logits = pi(y) (1_y - pi), so the sum over y of s(y) d pi(y) "
    "has the entries pi(i) (s(i) - J). The mean over prompts adds the factor 1/P.",
    probes=lambda f: [f(normal(2, 4, seed=1), normal(2, 4, seed=2)), f(normal(3, 3, seed=3), normal(3, 3, seed=4))],
)


@pg.case("the worked example: pi = (0.5, 0.3, 0.2), s = (1, 2, 4)", 1, "which entries must be negative, and why?")
def _(f: Any) -> None:
    got = f(tensor([[0.5, 0.3, 0.2]]).log(), tensor([[1.0, 2.0, 4.0]]))
    expect_close(got, tensor([[-0.45, 0.03, 0.42]]), "gradient for one prompt")


@pg.case("equals autograd through the whole sum, for three prompts", 2, "J is a mean over prompts")
def _(f: Any) -> None:
    for seed in (5, 6):
        logits, scores = normal(3, 4, seed=seed).requires_grad_(), normal(3, 4, seed=seed + 10)
        (want,) = torch.autograd.grad((logits.softmax(-1) * scores).sum(-1).mean(), logits)
        expect_close(f(logits.detach(), scores), want, "gradient for three prompts")


@pg.case("equal scores give gradient 0", 1, "if all responses are equally good there is nothing to learn")
def _(f: Any) -> None:
    expect_close(f(normal(2, 4, seed=7), torch.full((2, 4), 3.0)), torch.zeros(2, 4), "gradient when all scores are 3")
    other = as_tensor(f(normal(2, 4, seed=7), normal(2, 4, seed=8)), "gradient")
    require(other.abs().max() > 1e-3, "the gradient is 0 when the scores differ, too")


@pg.case("a small step along it raises J", 1, "you go up, so J must go up")
def _(f: Any) -> None:
    logits, scores = normal(2, 5, seed=8), normal(2, 5, seed=9)
    step = as_tensor(f(logits.clone(), scores.clone()), "gradient")
    expect_shape(step, (2, 5), "gradient")

    def j(x: Tensor) -> float:
        return (x.double().softmax(-1) * scores).sum(-1).mean().item()

    before, after = j(logits), j(logits + 0.01 * step)
    require(after > before + 1e-6, f"J went from {before:.5f} to {after:.5f} after a step of 0.01 along your gradient")


def _extra_pi(logits: Tensor, scores: Tensor) -> Tensor:
    p = logits.softmax(-1)
    return p * (p * scores - (p * p * scores).sum(-1, keepdim=True)) / len(logits)


def _mean_score(logits: Tensor, scores: Tensor) -> Tensor:
    return (logits.softmax(-1) * scores).sum(-1).mean()


def _whole_table(logits: Tensor, scores: Tensor) -> Tensor:
    p = logits.flatten().softmax(0).reshape(logits.shape)
    return p * (scores - (p * scores).sum())


pg.wrong(
    "gradient-of-the-reward",
    "you differentiated the score of a given response, which does not contain the logits: that is 0",
    lambda logits, scores: torch.zeros_like(logits),
    "W-PG-1",
)
pg.wrong(
    "extra-pi",
    "the policy enters twice: the sum of s grad pi is E[s grad log pi], not E[s grad pi]",
    _extra_pi,
    "W-PG-2",
)
pg.wrong(
    "sum-over-prompts",
    "the expectation over prompts is lost: J is the mean over prompts, you have their sum",
    lambda logits, scores: len(logits) * policy_gradient(logits, scores),
    "W-PG-3",
)
pg.wrong(
    "unweighted",
    "you summed s(y) grad log pi(y) over the responses without their probabilities",
    lambda logits, scores: (scores - logits.softmax(-1) * scores.sum(-1, keepdim=True)) / len(logits),
)
pg.wrong(
    "no-normaliser",
    "the normaliser of the softmax is missing: grad log pi(y) is 1_y - pi, not 1_y",
    lambda logits, scores: logits.softmax(-1) * scores / len(logits),
)
pg.wrong(
    "descent",
    "this is minus the gradient, the gradient of a loss",
    lambda logits, scores: -policy_gradient(logits, scores),
)
pg.wrong(
    "plain-mean",
    "you subtracted the plain mean of the scores; the policy's own mean belongs there",
    lambda logits, scores: logits.softmax(-1) * (scores - scores.mean(-1, keepdim=True)) / len(logits),
)
pg.wrong(
    "one-value-for-all-prompts",
    "you subtracted one expected score from all prompts; every prompt has its own",
    lambda logits, scores: logits.softmax(-1) * (scores - _mean_score(logits, scores)) / len(logits),
)
pg.wrong(
    "mean-over-responses",
    "you took a mean over the listed responses on top of their probabilities: N times too small",
    lambda logits, scores: policy_gradient(logits, scores) / logits.shape[-1],
)
pg.wrong(
    "softmax-over-the-table",
    "the softmax runs over all prompts together; every prompt has its own distribution",
    _whole_table,
)


def _by_autograd(logits: Tensor, scores: Tensor) -> Tensor:
    x = logits.detach().double().requires_grad_()
    return torch.autograd.grad((x.softmax(-1) * scores).sum(-1).mean(), x)[0]


def _by_jacobian(logits: Tensor, scores: Tensor) -> Tensor:
    rows = []
    for x, s in zip(logits, scores, strict=True):
        p = x.softmax(0)
        rows.append((torch.diag(p) - torch.outer(p, p)) @ s)
    return torch.stack(rows) / len(logits)


def _by_numpy(logits: Tensor, scores: Tensor) -> Any:
    e = np.exp(logits.numpy().astype(float))
    p, s = e / e.sum(1, keepdims=True), scores.numpy()
    return (p * s - p * (p * s).sum(1, keepdims=True)) / len(p)


pg.right("autograd, float64", _by_autograd)
pg.right("matrix form, diag(pi) - pi pi^T", _by_jacobian)
pg.right("numpy", _by_numpy)


# -- the score function, and its expectation -------------------------------------------------------------


def score_matrix(logits):  # type: ignore[no-untyped-def]
    """Row y is the gradient of log softmax(logits)[y] in the logits. (N,) -> (N, N)."""
    return torch.eye(len(logits)) - logits.softmax(0)


_WIDE = [30.0, 29.0, -30.0]

sz = Question(
    id="score_zero",
    title="the score function, whose expectation is 0",
    chapter=2,
    kind="symbolic",
    theory=True,
    variable="score_matrix",
    reference=score_matrix,
    reference_source=source(score_matrix),
    hints=(
        "log pi(y) = logits[y] - log sum exp(logits). Differentiate the two parts.",
        "The first part gives 1 at y and 0 elsewhere; the second is the same for every y.",
        "Row y is 1_y - pi. Its mean is sum_y pi(y) (1_y - pi) = pi - pi = 0.",
    ),
    explanation="d log pi(y) / d logits = 1_y - pi. The mean is pi - pi = 0: probabilities sum to 1 whatever the "
    "logits are, so sum_y grad pi(y) = 0, and grad pi = pi grad log pi. If every response scores 1, J is "
    "the constant 1, so its gradient, E[grad log pi], is 0.",
    probes=lambda f: [f(tensor([0.3, -1.0, 0.8])), f(normal(4, seed=3)), f(tensor(_WIDE))],
)


def _rows(f: Any, logits: Tensor) -> Tensor:
    """The learner's table, if it has the shape and the signs of a score function."""
    rows = as_tensor(f(logits.clone()), "your table")
    expect_shape(rows, (len(logits), len(logits)), "your table")
    diagonal = rows.diagonal().min().item()
    require(diagonal > 0, f"raising logits[y] raises log pi(y), but an entry (y, y) of your table is {diagonal:.4g}")
    return rows


@sz.case("its mean under the policy is 0", 1, "weigh row y with pi(y) and add up the rows")
def _(f: Any) -> None:
    for logits in (tensor([0.5, 0.3, 0.2]).log(), normal(5, seed=4)):
        rows = _rows(f, logits)
        expect_close(logits.double().softmax(0) @ rows, torch.zeros(len(logits)), "sum over y of pi(y) times row y")


@sz.case("each row sums to 0: a shift of all logits changes nothing", 1, "softmax(x + c) = softmax(x)")
def _(f: Any) -> None:
    rows = _rows(f, normal(4, seed=5))
    expect_close(rows.sum(1), torch.zeros(4), "sums of the rows")


@sz.case("equals autograd, row by row", 3, "row y is the gradient of log pi(y)")
def _(f: Any) -> None:
    for logits, where in ((normal(4, seed=6), ""), (tensor(_WIDE), " at logits (30, 29, -30)")):
        want = torch.autograd.functional.jacobian(lambda x: x.log_softmax(0), logits)
        expect_close(f(logits.clone()), want, f"your table{where}")


def _jacobian_of_pi(logits: Tensor) -> Tensor:
    p = logits.softmax(0)
    return torch.diag(p) - torch.outer(p, p)


sz.wrong(
    "one-hot",
    "the normaliser is missing: log sum exp(logits) depends on the logits too",
    lambda x: torch.eye(len(x)),
)
sz.wrong("sign", "this is pi - 1_y, the gradient of minus log pi", lambda x: x.softmax(0) - torch.eye(len(x)))
sz.wrong("gradient-of-pi", "this is the gradient of pi(y), not of log pi(y)", _jacobian_of_pi, "W-PG-2")
sz.wrong(
    "uniform",
    "you subtracted 1/N from every entry; the policy's own probabilities belong there",
    lambda x: torch.eye(len(x)) - 1 / len(x),
)
sz.wrong(
    "transposed",
    "rows and columns are exchanged: entry (y, i) is 1[i = y] - pi(i)",
    lambda x: torch.eye(len(x)) - x.softmax(0)[:, None],
)
sz.wrong(
    "zero-itself",
    "the expectation of the score function is 0, its value for one response is not",
    lambda x: torch.zeros(len(x), len(x)),
)
sz.wrong(
    "guard-in-the-log",
    "a small number beside pi(y), inside the log or in a denominator, spoils the rows of unlikely responses",
    lambda x: torch.autograd.functional.jacobian(lambda z: (z.softmax(0) + 1e-8).log(), x),
)
sz.right("jacobian", lambda x: torch.autograd.functional.jacobian(lambda z: z.double().log_softmax(0), x))
sz.right("numpy", lambda x: np.eye(len(x)) - np.exp(x.numpy()) / np.exp(x.numpy()).sum())


# -- a proof with false lines ----------------------------------------------------------------------------

pl = Question(
    id="pg_proof_lines",
    title="find the false lines of a proof",
    chapter=2,
    kind="find the false lines",
    theory=True,
    variable="false_lines",
    reference={2, 4, 5},
    reference_source="false_lines = {2, 4, 5}",
    accept=lines(8, "line", "{1, 8}"),
    hints=(
        "Test each line on pi = (0.5, 0.3, 0.2), r = (1, 2, 4), where the gradient is (-0.45, 0.03, 0.42).",
        "Two questions for every expectation: does what stands inside contain the parameters, and how often does pi "
        "occur once you write the expectation as a sum?",
        "A sum over y of f(y) is the expectation of f(y)/pi(y). And the gradient of r(x, y) in the parameters is 0.",
    ),
    explanation="Line 2 is 0: r(x, y) has no parameters. Line 4 has one pi too many: as a sum, its right side is "
    "sum pi r grad pi. Line 5 repeats both (its first part is 0, its second is line 4) and loses the mean over "
    "prompts. Lines 1, 3, 6, 7 and 8 hold: a true line can follow false ones.",
    probes=lambda answer: answer,
)


@pl.case("no true line is called false", 1, "a true line stays true, even after a false one")
def _(found: Any) -> None:
    for line in sorted(found - {2, 4, 5}):
        require(False, f"line {line} is true")


@pl.case("all false lines are found, and only those", 2, "compute both sides of each line on two or three responses")
def _(found: Any) -> None:
    missing = len({2, 4, 5} - found)
    require(not missing, f"{missing} of 3 false lines not found")
    require(not found - {2, 4, 5}, f"{len(found - {2, 4, 5})} true lines among them")


pl.wrong("line-2-missed", "line 2 is false: the reward of a given response has no parameters", {4, 5}, "W-PG-1")
pl.wrong("line-4-missed", "line 4 is false: written as a sum, its right side has pi twice", {2, 5}, "W-PG-2")
pl.wrong(
    "line-5-missed",
    "line 5 is false: grad 1 is 0, the rest has pi twice, and the mean over prompts is gone",
    {2, 4},
    "W-PG-3",
)
pl.wrong("only-line-2", "line 2 is false, and so are two more", {2})
pl.wrong(
    "theorem-called-false",
    "line 7 is true although lines 2 to 5 do not prove it",
    {2, 4, 5, 7},
)
pl.wrong("log-derivative", "grad pi = pi grad log pi holds wherever pi > 0", {2, 4, 5, 6})
pl.wrong(
    "everything-after-line-2", "judge each line on its own: true lines follow a false one here", {2, 3, 4, 5, 6, 7, 8}
)
pl.wrong("line-3", "the derivative of a finite sum is the sum of the derivatives, so line 3 is true", {2, 3, 4, 5})
pl.right("a list", [5, 4, 2])
pl.right("numpy integers", np.array([2, 4, 5]))
pl.right("floats", {2.0, 4.0, 5.0})


# -- which factors of a trajectory's probability drop out ------------------------------------------------

df = Question(
    id="dynamics_drop_out",
    title="which terms of log P(trajectory) have no gradient",
    chapter=2,
    kind="find the terms",
    theory=True,
    variable="no_gradient",
    reference={1, 3, 5},
    reference_source="no_gradient = {1, 3, 5}",
    accept=lines(6, "term", "{2, 7}"),
    hints=(
        "Which of the six terms contain the parameters of the policy?",
        "The environment draws the first state and every next state, and it does not know the parameters.",
        "The gradient of log P(trajectory) is the sum of grad log pi(a_t | s_t) over t; the rest is constant.",
    ),
    explanation="The first state and the transitions belong to the environment: terms 1, 3 and 5 have gradient 0, "
    "however unknown they are. Terms 2, 4 and 6 are the policy's. That is why nobody has to differentiate, or even "
    "know, the environment.",
)


@df.case("no term of the policy is dropped", 1, "the policy's own choices carry the gradient")
def _(found: Any) -> None:
    for term in sorted(found & {2, 4, 6}):
        require(False, f"term {term} is a log-probability of the policy: it has a gradient")
    require(len(found) > 1, "a single term is not all that the environment decides")


@df.case("every term of the environment is dropped", 1, "what draws the first state? what draws the next one?")
def _(found: Any) -> None:
    missing = len({1, 3, 5} - found)
    require(len(found) < 6, "some of the six terms have a gradient")
    require(not missing, f"{missing} of 3 terms of the environment not found")


df.wrong("opposite", "these are the terms that do carry the gradient", {2, 4, 6})
df.wrong(
    "start-only",
    "the next state depends on the action, yet given state and action its probability has no parameters",
    {1},
)
df.wrong("transitions-only", "the first state drops out as well", {3, 5})
df.wrong(
    "later-actions",
    "terms 4 and 6 are the policy's: a later action still contains the parameters",
    {1, 3, 5, 4, 6},
    "W-PG-12",
)
df.wrong(
    "transitions-for-actions",
    "you kept the transitions and dropped the later actions: only the actions contain the parameters",
    {1, 4, 6},
)
df.wrong("past", "terms of the past are not constants: only the environment's are", {1, 2, 3}, "W-PG-11")
df.right("a tuple", (1, 3, 5))
df.right("a range", range(1, 6, 2))


# -- reward-to-go ----------------------------------------------------------------------------------------


def rewards_to_go(rewards, mask=None, gamma=1.0):  # type: ignore[no-untyped-def]
    """G_t = r_t + gamma G_t', t' the next step that counts; 0 outside the mask. (B, T) -> (B, T)."""
    if mask is None:
        mask = torch.ones_like(rewards, dtype=torch.bool)
    zero = torch.zeros_like(rewards[:, 0])
    total, columns = zero, []
    for t in reversed(range(rewards.shape[1])):
        total = torch.where(mask[:, t], rewards[:, t] + gamma * total, total)
        columns.append(torch.where(mask[:, t], total, zero))
    return torch.stack(columns[::-1], dim=1)


_R = [[1.0, 2.0, -1.0, 4.0], [3.0, 0.5, 2.0, 7.0]]
_M = [[True, True, False, True], [True, True, True, False]]


def _to_go_probe(f: Any) -> list[Any]:
    rewards = tensor(_R)
    return [f(tensor(_R)), f(tensor(_R), gamma=0.5), f(rewards, mask=tensor(_M), gamma=0.8), rewards]


_ENDLESS = (1 - 0.01 ** torch.arange(200.0, 0.0, -1.0).double()) / 0.99  # rewards 1 to the end, gamma 0.01


def _to_go_unusual(f: Any) -> list[str]:
    padded, mask = tensor([[1.0, 2.0, 1e30]]), tensor([[True, True, False]])
    return [
        outcome(tensor(_R), f, tensor(_R), gamma=0.0),
        outcome(_ENDLESS[None], f, torch.ones(1, 200), gamma=0.01),
        outcome(tensor([[3.0, 2.0, 0.0]]), f, padded, mask=mask),
    ]


rg = Question(
    id="rewards_to_go",
    title="rewards to go, with discount and mask",
    chapter=2,
    kind="function",
    theory=False,
    variable="rewards_to_go",
    reference=rewards_to_go,
    reference_source=source(rewards_to_go),
    hints=(
        "Start at the last step and walk back. What must be carried from one step to the one before?",
        "A masked step neither adds its reward nor discounts what is carried: it is skipped.",
        "G_t = r_t + gamma G_t' where t' is the next step that counts; write 0 where the mask is False.",
    ),
    explanation="Walk backwards and carry G. At a step that counts, G becomes r + gamma G; at any other step it stays "
    "as it is and 0 is written. Rewards before t are absent: they were fixed before the action at t was chosen.",
    probes=in_two_steps(_to_go_probe, _to_go_unusual, rewards_to_go),
)


@rg.case("without discount: the reward of this step and of all later ones", 2, "the step's own reward is included")
def _(f: Any) -> None:
    expect_close(f(tensor([[1.0, 2.0, 3.0, 4.0]])), tensor([[10.0, 9.0, 7.0, 4.0]]), "rewards (1, 2, 3, 4), gamma 1")


@rg.case("the discount counts from the step itself", 1, "whatever t is, r_t has weight 1 in G_t")
def _(f: Any) -> None:
    got = f(tensor([[0.0, 0.0, 8.0], [4.0, 2.0, 1.0]]), gamma=0.5)
    expect_close(got, tensor([[2.0, 4.0, 8.0], [5.25, 2.5, 1.0]]), "gamma 0.5")
    got = f(tensor([[4.0, 2.0, 1.0]]), gamma=0.0)
    expect_close(got, tensor([[4.0, 2.0, 1.0]]), "rewards (4, 2, 1), gamma 0: only the step's own reward")
    expect_close(f(torch.ones(1, 200), gamma=0.01), _ENDLESS[None], "200 rewards of 1, gamma 0.01")


@rg.case("padding adds nothing, whatever finite numbers it holds, and gets 0", 2, "leave masked steps out of the sum")
def _(f: Any) -> None:
    mask = tensor([[True, True, False, False], [True, True, True, True], [True, True, True, False]])
    rewards = tensor([[1.0, 2.0, 50.0, -70.0], [1.0, 2.0, 3.0, 4.0], [5.0, 0.0, 2.0, 1e30]])
    got = as_tensor(f(rewards, mask=mask, gamma=1.0), "rewards to go")
    expect_shape(got, (3, 4), "rewards to go")
    expect_close(got[0], tensor([3.0, 2.0, 0.0, 0.0]), "rewards (1, 2, padding, padding) in a batch of three")
    expect_close(got[1], tensor([10.0, 9.0, 7.0, 4.0]), "rewards (1, 2, 3, 4) in the same batch")
    expect_close(got[2], tensor([7.0, 2.0, 2.0, 0.0]), "rewards (5, 0, 2, padding) in the same batch")


@rg.case("a masked step is skipped: it costs no discount", 1, "the next step that counts is one step away")
def _(f: Any) -> None:
    mask = tensor([[True, False, True], [False, True, True]])
    got = f(tensor([[1.0, 9.0, 4.0], [9.0, 2.0, 8.0]]), mask=mask, gamma=0.5)
    expect_close(
        got, tensor([[3.0, 0.0, 4.0], [0.0, 6.0, 8.0]]), "rewards (1, masked, 4) and (masked, 2, 8), gamma 0.5"
    )


def _to_go(
    *,
    own: bool = True,
    discount: bool = True,
    from_start: bool = False,
    use_mask: bool = True,
    skip: bool = True,
    zero: bool = True,
    direction: int = -1,
    whole: bool = False,
) -> Callable[..., Tensor]:
    def f(rewards: Tensor, mask: Tensor | None = None, gamma: float = 1.0) -> Tensor:
        keep = torch.ones_like(rewards, dtype=torch.bool) if mask is None or not use_mask else mask
        g = gamma if discount else 1.0
        length = rewards.shape[1]
        if from_start:
            rewards, g = rewards * gamma ** torch.arange(length), 1.0
        out, total = torch.zeros_like(rewards), torch.zeros_like(rewards[:, 0])
        for t in range(length)[::direction]:
            before = total
            step = rewards[:, t] * keep[:, t] + g * total
            total = torch.where(keep[:, t], step, total) if skip else step
            out[:, t] = total if own else before
        if whole:
            out = total[:, None].expand_as(out)
        return torch.where(keep, out, torch.zeros_like(out)) if zero else out

    return f


def _to_go_twice(rewards: Tensor, mask: Tensor | None = None, gamma: float = 1.0) -> Tensor:
    once = _to_go()
    return once(once(rewards, mask, gamma), mask, gamma)


def _to_go_first_mask(rewards: Tensor, mask: Tensor | None = None, gamma: float = 1.0) -> Tensor:
    return rewards_to_go(rewards, None if mask is None else mask[:1].expand_as(rewards), gamma)  # type: ignore[no-any-return]


def _to_go_not_reset(rewards: Tensor, mask: Tensor | None = None, gamma: float = 1.0) -> Tensor:
    if mask is None:
        return rewards_to_go(rewards, None, gamma)  # type: ignore[no-any-return]
    out, total = torch.zeros_like(rewards), torch.zeros(())
    for b, t in itertools.product(range(len(rewards)), reversed(range(rewards.shape[1]))):
        if mask[b, t]:
            total = rewards[b, t] + gamma * total
            out[b, t] = total
    return out


def _to_go_by_division(rewards: Tensor, mask: Tensor | None = None, gamma: float = 1.0) -> Tensor:
    keep = torch.ones_like(rewards) if mask is None else mask.to(rewards.dtype)
    powers = gamma ** (keep.cumsum(1) - 1).clamp(min=0)
    return (torch.where(keep > 0, rewards, 0.0) * powers).flip(1).cumsum(1).flip(1) / powers * keep


def _to_go_minus_padding(rewards: Tensor, mask: Tensor | None = None, gamma: float = 1.0) -> Tensor:
    if mask is None or gamma != 1:
        return rewards_to_go(rewards, mask, gamma)  # type: ignore[no-any-return]
    whole, padding = (x.flip(1).cumsum(1).flip(1) for x in (rewards, rewards * ~mask))
    return (whole - padding) * mask


def _to_go_in_place(rewards: Tensor, mask: Tensor | None = None, gamma: float = 1.0) -> Tensor:
    if mask is not None:
        rewards *= mask
    return rewards_to_go(rewards, mask, gamma)  # type: ignore[no-any-return]


rg.wrong("first-mask-for-all", "the mask of the first episode is used for all of them", _to_go_first_mask)
rg.wrong("not-reset", "the sum carried back goes on from one episode to the next: start at 0 in each", _to_go_not_reset)
rg.wrong("in-place", "you changed the rewards of the caller: work on a copy", _to_go_in_place)
rg.wrong(
    "divided-by-powers",
    "you divide by a power of gamma, which is 0 at gamma 0 and underflows in long episodes: carry G backwards",
    _to_go_by_division,
)
rg.wrong(
    "gamma-0-is-no-gamma",
    "gamma = 0 became 1: 0 counts as False in `gamma or 1.0`",
    lambda rewards, mask=None, gamma=1.0: rewards_to_go(rewards, mask, gamma or 1.0),
)
rg.wrong(
    "padding-taken-off-again",
    "you summed the padding and subtracted it again: large numbers there swallow the rest; leave it out of the sum",
    _to_go_minus_padding,
)
rg.wrong("summed-twice", "you summed the sums: late rewards are counted several times", _to_go_twice, "W-PG-8")
rg.wrong("no-discount", "gamma is ignored", _to_go(discount=False), "W-PG-13")
for _name, _says, _options in [
    ("whole-return", "every step got the return of the whole episode; the past must drop out", {"whole": True}),
    ("later-only", "the reward of the step itself is missing", {"own": False}),
    ("discount-from-start", "you discounted from step 0; in G_t the reward r_t has weight 1", {"from_start": True}),
    ("from-the-past", "you summed from the start up to t; G_t sums from t to the end", {"direction": 1}),
    ("mask-ignored", "the mask is ignored, so padding is rewarded", {"use_mask": False}),
    ("masked-step-discounts", "a masked step costs a factor gamma; it must be skipped", {"skip": False}),
    ("padding-not-zero", "steps outside the mask must get 0", {"zero": False}),
]:
    rg.wrong(_name, _says, _to_go(**_options))  # type: ignore[arg-type]


def _to_go_by_matrix(rewards: Tensor, mask: Tensor | None = None, gamma: float = 1.0) -> Tensor:
    keep = torch.ones_like(rewards) if mask is None else mask.double()
    position = keep.cumsum(1)
    steps = position[:, None, :] - position[:, :, None]
    weights = gamma ** steps.clamp(min=0) * torch.ones(rewards.shape[1], rewards.shape[1]).triu()
    return (weights * (rewards * keep)[:, None, :]).sum(-1) * keep


def _to_go_by_loop(rewards: Any, mask: Any = None, gamma: float = 1.0) -> list[list[float]]:
    table = []
    for b, row in enumerate(rewards.tolist()):
        out, total = [0.0] * len(row), 0.0
        for t in range(len(row) - 1, -1, -1):
            if mask is None or mask[b][t]:
                total = row[t] + gamma * total
                out[t] = total
        table.append(out)
    return table


rg.right("matrix of weights, float64", _to_go_by_matrix)
rg.right("python lists", _to_go_by_loop)


# -- unbiased and consistent are two properties ----------------------------------------------------------


def _truth_table(answer: Any) -> Tensor:
    table = numbers(4, 2)(answer)
    if not bool(((table == 0) | (table == 1)).all()):
        raise Fail("your answer: expected True or False in every place")
    return table


ec = Question(
    id="estimator_classes",
    title="unbiased, consistent, both or neither",
    chapter=2,
    kind="table",
    theory=True,
    variable="classes",
    reference=[(True, True), (True, False), (False, True), (False, False)],
    reference_source="classes = [(True, True), (True, False), (False, True), (False, False)]",
    accept=_truth_table,
    hints=(
        "Compute two things for each estimator: its expectation for a fixed N, and its limit for large N.",
        "Unbiased: the expectation is the true value at every N, even at N = 1. Consistent: it converges to it.",
        "With true mean m: E[A] = m, E[B] = m with variance that never falls, E[C] = m N/(N + 1), E[D] = N m.",
    ),
    explanation="A: both. B, the first sample alone: unbiased, but its variance is the same at every N. C: the "
    "expectation m N/(N + 1) is wrong at every N and tends to m, and so does C. D, the sum: neither. So "
    "'unbiased' does not mean 'converges', and neither property implies the other.",
)


@ec.case("unbiased: the right expectation at every N", 1, "take N = 1 and N = 2 and compute the expectation")
def _(table: Any) -> None:
    wrong = [name for name, a, b in zip("ABCD", table[:, 0].tolist(), (1, 1, 0, 0), strict=True) if a != b]
    require(not wrong, f"first column: {len(wrong)} of 4 wrong")


@ec.case("consistent: converges to the true value", 1, "what is left of the variance and the bias as N grows?")
def _(table: Any) -> None:
    wrong = [name for name, a, b in zip("ABCD", table[:, 1].tolist(), (1, 0, 1, 0), strict=True) if a != b]
    require(not wrong, f"second column: {len(wrong)} of 4 wrong")


_yes, _no = True, False
ec.wrong(
    "unbiased-means-converges",
    "you took 'unbiased' for 'converges to the true value': it means the right expectation at every N",
    [(_yes, _yes), (_no, _no), (_yes, _yes), (_no, _no)],
    "W-PG-6",
)
ec.wrong(
    "converges-means-unbiased",
    "you took 'consistent' for 'unbiased': B never gets better, and C converges although it is biased",
    [(_yes, _yes), (_yes, _yes), (_no, _no), (_no, _no)],
    "W-PG-6",
)
ec.wrong(
    "sum-is-unbiased",
    "the sum has N times the expectation: it must be divided by N",
    [(_yes, _yes), (_yes, _no), (_no, _yes), (_yes, _no)],
    "W-PG-5",
)
ec.wrong(
    "columns-swapped",
    "the two columns are exchanged",
    [(_yes, _yes), (_no, _yes), (_yes, _no), (_no, _no)],
)
ec.wrong(
    "only-the-mean",
    "B has the right expectation and C converges: each has one of the two properties",
    [(_yes, _yes), (_no, _no), (_no, _no), (_no, _no)],
)
ec.wrong(
    "biased-never-converges",
    "C is biased, but its bias -m/(N + 1) vanishes as N grows",
    [(_yes, _yes), (_yes, _no), (_no, _no), (_no, _no)],
    "W-PG-6",
)
ec.right("zeros and ones", [[1, 1], [1, 0], [0, 1], [0, 0]])


# -- the loss whose gradient is the estimate -------------------------------------------------------------


def surrogate(logprobs, rewards, mask):  # type: ignore[no-untyped-def]
    """Loss whose gradient is minus the mean over episodes of sum_t G_t grad log pi(a_t). (B, T) each -> scalar."""
    weights = mask.to(rewards.dtype)
    to_go = (rewards * weights).flip(1).cumsum(1).flip(1).detach()
    return -(logprobs * to_go * weights).sum(1).mean()


def _slope(f: Any, rewards: Tensor, mask: Tensor | None = None, seed: int = 1) -> Tensor:
    logprobs = (-normal(*rewards.shape, seed=seed).abs()).requires_grad_()
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    value = f(logprobs, rewards, mask)
    if isinstance(value, Tensor) and value.ndim != 0:
        raise Fail(f"expected one number, got a tensor of shape {tuple(value.shape)}")
    return gradient(value, logprobs, "gradient in logprobs")


def _surrogate_probe(f: Any) -> list[Any]:
    out: list[Any] = []
    for rewards, mask in [
        (tensor(_R), tensor([[True] * 4, [True, True, False, False]])),
        (tensor([[1.0, -2.0, 4.0]]), tensor([[True] * 3])),
    ]:
        logprobs = (-normal(*rewards.shape, seed=2).abs()).requires_grad_()
        rewards = rewards.requires_grad_()
        value = f(logprobs, rewards, mask)
        out += [gradient_or_none(value, logprobs), gradient_or_none(value, rewards)]
    return out


rs = Question(
    id="reinforce_surrogate",
    title="a loss whose gradient is the REINFORCE estimate",
    chapter=2,
    kind="function",
    theory=False,
    variable="surrogate",
    reference=surrogate,
    reference_source=source(surrogate),
    hints=(
        "Only the gradient of the loss counts. Write down the estimate first, then a loss with minus that gradient.",
        "Each log-probability gets its own weight, a constant; the sum over time stands inside the mean over episodes.",
        "loss = -(1/B) sum_b sum_t logprobs[b, t] G[b, t], G the detached reward-to-go, both over the mask.",
    ),
    explanation="The estimate is the mean over episodes of sum_t G_t grad log pi(a_t | s_t). Minus the mean of the "
    "sums of logprobs times the constants G_t has minus that gradient, so a step down the loss is a step up J. The "
    "value of this loss means nothing.",
    probes=_surrogate_probe,
)


@rs.case("each log-probability is weighted with its own reward-to-go", 2, "the product stands inside the sum over time")
def _(f: Any) -> None:
    expect_close(
        _slope(f, tensor([[1.0, 2.0, 3.0]])), tensor([[-6.0, -5.0, -3.0]]), "gradient, one episode, rewards (1, 2, 3)"
    )


@rs.case(
    "episodes are averaged, whatever their length", 2, "divide by the number of episodes, not by that of the tokens"
)
def _(f: Any) -> None:
    four = _slope(f, tensor([[1.0, 2.0, 3.0]]).repeat(4, 1))
    expect_close(four[2], tensor([-6.0, -5.0, -3.0]) / 4, "gradient of one episode among four equal ones")
    mask = tensor([[True, False, False], [True, True, True]])
    ragged = _slope(f, tensor([[8.0, 0.0, 0.0], [0.0, 0.0, 6.0]]), mask)
    expect_close(ragged[:, 0], tensor([-4.0, -3.0]), "first tokens of a short and a long episode")


@rs.case("padding takes no part", 1, "neither its log-probability nor its reward may count")
def _(f: Any) -> None:
    mask = tensor([[True, True, False]])
    slope = _slope(f, tensor([[1.0, 2.0, 90.0]]), mask)
    expect_close(slope, tensor([[-3.0, -2.0, 0.0]]), "gradient, rewards (1, 2, padding)")


@rs.case("the rewards are constants", 1, "where does the gradient flow if a reward model made the rewards?")
def _(f: Any) -> None:
    rewards = tensor([[1.0, 2.0, 3.0]]).requires_grad_()
    logprobs = tensor([[-0.5, -1.0, -0.2]]).requires_grad_()
    value = f(logprobs, rewards, tensor([[True, True, True]]))
    steps = gradient(value, logprobs, "gradient in logprobs")
    require(steps.max() > steps.min(), "every step has the same gradient in logprobs: the rewards play no part")
    (slope,) = torch.autograd.grad(value.sum(), rewards, allow_unused=True)
    steepest = 0.0 if slope is None else slope.abs().max().item()
    require(steepest == 0.0, f"the gradient in rewards must be 0, got {steepest:.4g}")


def _sums(rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    w = mask.to(rewards.dtype)
    return w, (rewards.detach() * w).flip(1).cumsum(1).flip(1)


def _s_sign(lp: Tensor, r: Tensor, m: Tensor) -> Tensor:
    return -surrogate(lp, r, m)


def _s_product(lp: Tensor, r: Tensor, m: Tensor) -> Tensor:
    w, g = _sums(r, m)
    return -((lp * w).sum(1) * (g * w).sum(1)).mean()


def _s_summed_q(lp: Tensor, r: Tensor, m: Tensor) -> Tensor:
    w, g = _sums(r, m)
    return -(lp * (g * w).flip(1).cumsum(1).flip(1) * w).sum(1).mean()


def _s_token_mean(lp: Tensor, r: Tensor, m: Tensor) -> Tensor:
    w, g = _sums(r, m)
    return -(lp * g * w).sum() / w.sum()


def _s_sequence_mean(lp: Tensor, r: Tensor, m: Tensor) -> Tensor:
    w, g = _sums(r, m)
    return -((lp * g * w).sum(1) / w.sum(1)).mean()


def _s_padding(lp: Tensor, r: Tensor, m: Tensor) -> Tensor:
    return surrogate(lp, r, torch.ones_like(m))


def _s_padded_rewards(lp: Tensor, r: Tensor, m: Tensor) -> Tensor:
    return -(lp * r.detach().flip(1).cumsum(1).flip(1) * m).sum(1).mean()


def _s_attached(lp: Tensor, r: Tensor, m: Tensor) -> Tensor:
    return -(lp * (r * m).flip(1).cumsum(1).flip(1) * m).sum(1).mean()


def _s_probabilities(lp: Tensor, r: Tensor, m: Tensor) -> Tensor:
    w, g = _sums(r, m)
    return -(lp.exp() * g * w).sum(1).mean()


def _s_inside_log(lp: Tensor, r: Tensor, m: Tensor) -> Tensor:
    w, g = _sums(r, m)
    return -((g.abs() + 1e-8).log() * w + lp * w).sum(1).mean()


def _s_whole(lp: Tensor, r: Tensor, m: Tensor) -> Tensor:
    w, g = _sums(r, m)
    return -(lp * g[:, :1] * w).sum(1).mean()


def _s_immediate(lp: Tensor, r: Tensor, m: Tensor) -> Tensor:
    return -(lp * r.detach() * m).sum(1).mean()


rs.plant(
    ("sign", "the minus is missing: a step down this loss is a step down J", _s_sign, "common"),
    (
        "product-of-sums",
        "(sum of score functions) x (sum of rewards-to-go): the product belongs inside the sum",
        _s_product,
        "W-PG-7",
    ),
    ("summed-Q", "the rewards-to-go are summed once more: late rewards count several times", _s_summed_q, "W-PG-8"),
    (
        "sum-over-episodes",
        "you summed over the episodes: the estimate is their mean",
        lambda lp, r, m: len(lp) * surrogate(lp, r, m),
        "W-PG-5",
    ),
    ("token-mean", "you divided by the number of tokens: the episodes are what is averaged", _s_token_mean, "common"),
    (
        "sequence-mean",
        "you averaged over time: log pi of an episode is the sum over its steps",
        _s_sequence_mean,
        "common",
    ),
    ("padding", "padding is counted as part of the episode", _s_padding, "common"),
    ("padded-rewards", "rewards of the padding enter the rewards-to-go", _s_padded_rewards, "common"),
    ("attached", "gradient flows into the rewards: they are constants here", _s_attached, "common"),
    ("probabilities", "you used pi in place of log pi: the gradient has one pi too many", _s_probabilities, "W-PG-2"),
    (
        "inside-the-log",
        "the return stands inside the log, where it drops out of the gradient",
        _s_inside_log,
        "W-PG-10",
    ),
    (
        "whole-return",
        "every score function got the whole return: right on average, but the past adds variance",
        _s_whole,
        "common",
    ),
    (
        "immediate-reward",
        "a score function got the reward of its own step only; its action earns later ones too",
        _s_immediate,
        "common",
    ),
    (
        "from-the-past",
        "you summed the rewards from the start up to t: an action earns those from t to the end",
        lambda lp, r, m: -(lp * (r.detach() * m).cumsum(1) * m).sum(1).mean(),
        "common",
    ),
    (
        "detached",
        "the log-probabilities are detached: there is no gradient",
        lambda lp, r, m: surrogate(lp.detach(), r, m),
        "common",
    ),
)


def _ratio_form(lp: Tensor, r: Tensor, m: Tensor) -> Tensor:
    w, g = _sums(r.double(), m)
    return -((lp - lp.detach()).exp() * g * w).sum() / len(lp)


def _loop_form(lp: Tensor, r: Tensor, m: Tensor) -> Tensor:
    loss = torch.zeros(())
    for b, t in itertools.product(range(lp.shape[0]), range(lp.shape[1])):
        if m[b, t]:
            loss = loss - lp[b, t] * sum(r[b, k].item() for k in range(t, lp.shape[1]) if m[b, k])
    return loss / lp.shape[0]


rs.right("ratio form, another value with the same gradient", _ratio_form)
rs.right("loops", _loop_form)


# -- a step of gradient ascent ---------------------------------------------------------------------------


def ascent_step(theta, objective, learning_rate):  # type: ignore[no-untyped-def]
    """Parameters after one step of gradient ascent on objective. (D,) -> (D,); theta is left as it was."""
    point = theta.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(objective(point), point)
    return theta.detach() + learning_rate * slope


def _expected_score(x: Tensor) -> Tensor:
    return (x.softmax(0) * tensor([1.0, 2.0, 4.0])).sum()


def _cubic(x: Tensor) -> Tensor:
    return (x**3).sum() - x[0] * x[1]


def _step_probe(f: Any) -> list[Any]:
    out: list[Any] = []
    for objective, start in ((_expected_score, tensor([0.1, -0.2, 0.3])), (_cubic, tensor([1.0, 2.0, -0.5]))):
        theta = start.clone()
        new = f(theta, objective, 0.3)
        out += [new, theta.detach().clone(), "graph" if isinstance(new, Tensor) and new.requires_grad else "no graph"]
        again = f(theta, objective, 0.3)
        out += [again.detach().clone() if isinstance(again, Tensor) else again, f"{theta.requires_grad}"]
    return out


def _step_unusual(f: Any) -> list[Any]:
    theta = _trained_theta()
    new = f(theta, _cubic, 0.3)
    kept = theta.grad is not None and bool((theta.grad == 1).all())
    return [new, "graph" if isinstance(new, Tensor) and new.requires_grad else "no graph", float(kept)]


def _trained_theta() -> Tensor:
    """Parameters in the middle of a training: they require a gradient and hold one."""
    theta = tensor([1.0, 2.0, -0.5]).requires_grad_()
    theta.grad = torch.ones(3)
    return theta


us = Question(
    id="update_rule",
    title="one step of gradient ascent",
    chapter=2,
    kind="function",
    theory=False,
    variable="ascent_step",
    reference=ascent_step,
    reference_source=source(ascent_step),
    hints=(
        "What is the derivative taken of, J or its derivative? And which way is up?",
        "Let autograd differentiate objective at a copy of theta that requires a gradient.",
        "theta + learning_rate * J'(theta), with J' from torch.autograd.grad(objective(copy), copy).",
    ),
    explanation="The step goes along J' itself, upwards since J is to grow. Differentiate at a copy, so that the old "
    "parameters stay what they are and the new ones are numbers, not the end of a graph that grows with every step.",
    probes=in_two_steps(_step_probe, _step_unusual, ascent_step),
)


@us.case("a small step raises J", 1, "you maximise")
def _(f: Any) -> None:
    theta = tensor([0.1, -0.2, 0.3])
    new = as_tensor(f(theta.clone(), _expected_score, 0.05), "new parameters")
    expect_shape(new, (3,), "new parameters")
    before, after = _expected_score(theta.double()).item(), _expected_score(new).item()
    require(after > before, f"J went from {before:.5f} to {after:.5f}")


@us.case("moves by learning_rate times the gradient of J", 2, "once, and by the first derivative")
def _(f: Any) -> None:
    new = f(tensor([1.0, 2.0, -0.5]), _cubic, 0.1)
    expect_close(new, tensor([1.1, 3.1, -0.425]), "J = sum of cubes - x y at (1, 2, -0.5), rate 0.1")


@us.case("leaves theta alone and returns plain numbers", 1, "work on a copy; the result must not require a gradient")
def _(f: Any) -> None:
    theta = tensor([1.0, 2.0, -0.5])
    new = f(theta, _cubic, 0.1)
    require(isinstance(new, Tensor) and new.shape == theta.shape, "expected a tensor with the shape of theta")
    require(torch.isfinite(new).all(), "the new parameters are not finite")
    expect_close(theta, tensor([1.0, 2.0, -0.5]), "theta after the call")
    require(not new.requires_grad, "the new parameters still carry the graph of the old ones")
    require(not torch.equal(new, theta), "the parameters did not move")
    require(not theta.requires_grad, "theta requires a gradient after the call, and did not before")
    require(theta.grad is None, "theta holds a gradient after the call, and did not before")
    expect_close(f(theta, _cubic, 0.1), new, "new parameters of a second, equal call against the first")
    require(not torch.equal(f(theta, _cubic, 0.2), new), "the learning rate plays no part")
    theta = _trained_theta()
    again = f(theta, _cubic, 0.1)
    expect_close(again, new, "new parameters where theta requires a gradient and holds one")
    require(
        not (isinstance(again, Tensor) and again.requires_grad),
        "theta requires a gradient, and the new parameters carry its graph",
    )


def _slope_of(theta: Tensor, objective: Any, graph: bool = False) -> tuple[Tensor, Tensor]:
    x = theta.detach().clone().requires_grad_()
    return x, torch.autograd.grad(objective(x), x, create_graph=graph)[0]


def _second_derivative(theta: Tensor, objective: Any, rate: float) -> Tensor:
    x, slope = _slope_of(theta, objective, graph=True)
    return theta + rate * torch.autograd.grad(slope.sum(), x)[0]


def _in_place(theta: Tensor, objective: Any, rate: float) -> Tensor:
    return theta.add_(rate * _slope_of(theta, objective)[1])


def _accumulating(theta: Tensor, objective: Any, rate: float) -> Tensor:
    theta.requires_grad_()
    objective(theta).backward()
    assert theta.grad is not None
    return (theta + rate * theta.grad).detach()


def _clearing(theta: Tensor, objective: Any, rate: float) -> Tensor:
    required, theta.grad = theta.requires_grad, None
    objective(theta.requires_grad_()).backward()
    assert theta.grad is not None
    new, theta.grad = (theta + rate * theta.grad).detach(), None
    theta.requires_grad_(required)
    return new


def _with_graph(theta: Tensor, objective: Any, rate: float) -> Tensor:
    x, slope = _slope_of(theta, objective, graph=True)
    return x + rate * slope


def _unit_step(theta: Tensor, objective: Any, rate: float) -> Tensor:
    slope = _slope_of(theta, objective)[1]
    return theta + rate * slope / slope.norm()


us.plant(
    ("descent", "you went down: J is to be maximised", lambda x, j, a: x - a * _slope_of(x, j)[1], "common"),
    (
        "second-derivative",
        "you differentiated J' once more: the step goes along J' itself",
        _second_derivative,
        "W-PG-4",
    ),
    ("step-only", "you returned the step without the old parameters", lambda x, j, a: a * _slope_of(x, j)[1], "common"),
    ("no-rate", "the learning rate is missing", lambda x, j, a: x + _slope_of(x, j)[1], "common"),
    ("unit-length", "you normalised the gradient: its length belongs to the step", _unit_step, "common"),
    (
        "sign-only",
        "you used the signs of the gradient only",
        lambda x, j, a: x + a * _slope_of(x, j)[1].sign(),
        "common",
    ),
    ("in-place", "you changed theta in place, so the caller's old parameters are gone", _in_place, "common"),
    (
        "gradient-kept-on-theta",
        "you left a gradient on theta itself: the next call adds to it, so work on a copy",
        _accumulating,
        "common",
    ),
    (
        "graph-kept",
        "the result still carries the graph of the old parameters, which grows with every step",
        _with_graph,
        "common",
    ),
    (
        "graph-of-theta",
        "theta may require a gradient itself: add the step to theta.detach(), or the result has a graph",
        lambda x, j, a: x + a * _slope_of(x, j)[1],
        "common",
    ),
    (
        "gradient-cleared",
        "you cleared or replaced the gradient that theta held: differentiate a copy of theta",
        _clearing,
        "common",
    ),
)


def _step_with_backward(theta: Tensor, objective: Any, rate: float) -> Tensor:
    x = torch.nn.Parameter(theta.clone())
    objective(x).backward()
    slope = x.grad
    assert slope is not None
    return (x + rate * slope).detach()


us.right("backward", _step_with_backward)
us.right("float64 inside", lambda x, j, a: (x + a * _slope_of(x.double(), lambda z: j(z.float()))[1]).detach())


# -- three gradients -------------------------------------------------------------------------------------

_EXACT = [-0.45, 0.03, 0.42]


def _j(logits: Tensor) -> Tensor:
    return logits.softmax(0) @ tensor([1.0, 2.0, 4.0]).double()


def _two_gradients() -> list[Tensor]:
    """Score-function gradient by enumeration, and central differences of J."""
    logits = tensor([0.5, 0.3, 0.2]).double().log()
    p, r = logits.softmax(0), tensor([1.0, 2.0, 4.0]).double()
    score_form = (p * r) @ (torch.eye(3).double() - p)
    difference = torch.stack([(_j(logits + h) - _j(logits - h)) / 2e-5 for h in 1e-5 * torch.eye(3).double()])
    return [score_form, difference]


tg = Question(
    id="three_gradients",
    title="pathwise, score function, central difference",
    chapter=2,
    kind="numbers",
    theory=True,
    variable="gradients",
    reference=[[0.0, 0.0, 0.0], _EXACT, _EXACT],
    reference_source="gradients = [[0.0, 0.0, 0.0], [-0.45, 0.03, 0.42], [-0.45, 0.03, 0.42]]",
    accept=numbers(3, 3),
    hints=(
        "Take the three one at a time: what is differentiated, and where do the logits stand?",
        "A sampled response is an integer: its reward carries no graph. J itself is a smooth function of the logits.",
        "Row 1 is 0. Rows 2 and 3 are pi(i) (r(i) - J) with J = 0.5 + 0.6 + 0.8 = 1.9.",
    ),
    explanation="The pathwise gradient is 0, since a sampled token carries no graph. The score-function gradient is "
    "pi (r - 1.9) = (-0.45, 0.03, 0.42), and the central difference of J gives the same: J is smooth. What cannot "
    "be differentiated is the sampling, not J.",
    probes=lambda x: x,
)


@tg.case(
    "pathwise: what autograd sends through a sampled response", 1, "does r(y) of a sampled integer y have a graph?"
)
def _(table: Any) -> None:
    require(bool(table[1:].abs().sum() > 0), "rows 2 and 3 are 0 as well, so row 1 shows nothing")
    expect_close(table[0], torch.zeros(3), "row 1", atol=6e-3, tell_expected=False)


@tg.case("score function: E[r grad log pi]", 1, "sum_y pi(y) r(y) (1_y - pi)")
def _(table: Any) -> None:
    expect_close(table[1], _two_gradients()[0], "row 2", atol=6e-3, tell_expected=False)


@tg.case("central difference of J", 1, "J is a finite sum of smooth functions of the logits")
def _(table: Any) -> None:
    expect_close(table[2], _two_gradients()[1], "row 3", atol=6e-3, tell_expected=False)


_ZERO, _EXTRA = [0.0] * 3, [-0.045, 0.003, 0.042]
tg.plant(
    ("not-differentiable", "J is smooth: its central difference is not 0", [_ZERO, _EXACT, _ZERO], "W-PG-9"),
    (
        "nothing-works",
        "discrete tokens stop the pathwise gradient only: J has a gradient",
        [_ZERO, _ZERO, _ZERO],
        "W-PG-9",
    ),
    ("pathwise-works", "a sampled response carries no graph, so its pathwise gradient is 0", [_EXACT] * 3, "W-PG-1"),
    ("extra-pi", "row 2 has one pi too many: E[r grad log pi], not E[r grad pi]", [_ZERO, _EXTRA, _EXACT], "W-PG-2"),
    (
        "signs",
        "the signs are reversed: the best response must gain",
        [_ZERO, [0.45, -0.03, -0.42], [0.45, -0.03, -0.42]],
        "common",
    ),
    (
        "no-normaliser",
        "the normaliser is missing: pi r is not pi (r - J)",
        [_ZERO, [0.5, 0.6, 0.8], [0.5, 0.6, 0.8]],
        "common",
    ),
    (
        "score-is-zero",
        "E[grad log pi] is 0, but here each score function is multiplied by its reward",
        [_ZERO, _ZERO, _EXACT],
        "common",
    ),
)
tg.right("a tensor, rounded", tensor([[0.0, 0.0, 0.0], [-0.45, 0.03, 0.42], [-0.4501, 0.0299, 0.42]]))


# -- the value of the surrogate is not J -----------------------------------------------------------------


def shift_effects(probs, shift):  # type: ignore[no-untyped-def]
    """Changes of J, of the expected surrogate loss and of its largest gradient entry when all scores grow by shift."""
    entropy = -(probs * probs.log()).sum()
    return shift, shift * entropy, 0.0


def _shift_probe(f: Any) -> list[Any]:
    return [list(unpack(f(tensor(p), c), 3, "probe")) for p, c in (([0.7, 0.3], 2.0), ([0.5, 0.3, 0.2], -1.5))]


sv = Question(
    id="surrogate_value",
    title="what a shift of the scores does to J, to the loss and to the gradient",
    chapter=2,
    kind="symbolic",
    theory=True,
    variable="shift_effects",
    reference=shift_effects,
    reference_source=source(shift_effects),
    hints=(
        "Write all three as sums over y, once with s(y) and once with s(y) + c, and subtract.",
        "The loss gains -c E[log pi]; which well-known quantity is that? The gradient gains -c E[grad log pi].",
        "(c, c times the entropy of pi, 0).",
    ),
    explanation="J grows by c. The expected loss -E[s log pi] grows by -c E[log pi] = c times the entropy, and its "
    "gradient (the weights held constant) by -c E[grad log pi] = 0. So the loss may rise while J rises: plot the "
    "score, not the loss.",
    probes=_shift_probe,
)


@sv.case("J changes by the shift", 1, "J is a mean of scores")
def _(f: Any) -> None:
    for c in (2.0, -1.5):
        expect_close(
            unpack(f(tensor([0.7, 0.2, 0.1]), c), 3, "your answer")[0], c, f"change of J, shift {c:g}", rtol=6e-3
        )


@sv.case("the expected loss changes by another amount", 2, "the loss is -E[s log pi]")
def _(f: Any) -> None:
    for p, c in (([0.5, 0.5], 2.0), ([0.7, 0.2, 0.1], -1.5), ([0.98, 0.01, 0.01], 2.0)):
        probs, s = tensor(p).double(), normal(len(p), seed=1).double()
        want = (-(probs * (s + c) * probs.log()).sum() + (probs * s * probs.log()).sum()).item()
        got = unpack(f(tensor(p), c), 3, "your answer")[1]
        expect_close(got, want, f"change of the expected loss, pi {p}, shift {c:g}", rtol=6e-3)


@sv.case("the expected gradient does not change", 1, "E[grad log pi] = 0")
def _(f: Any) -> None:
    for c in (2.0, -1.5):
        parts = [as_tensor(x, "your answer") for x in unpack(f(tensor([0.7, 0.2, 0.1]), c), 3, "your answer")]
        require(parts[0].abs().max() > 0, "the change of J is 0 as well, so this number shows nothing")
        expect_close(parts[2], 0.0, f"largest change of an entry of the expected gradient, shift {c:g}")


def _entropy(p: Tensor) -> Tensor:
    return -(p * p.log()).sum()


sv.plant(
    ("loss-is-minus-J", "you took the loss for -J: only their gradients agree", lambda p, c: (c, -c, 0.0), "common"),
    ("loss-unchanged", "the gradient stays, the value of the loss does not", lambda p, c: (c, 0.0, 0.0), "common"),
    (
        "gradient-shifts",
        "E[grad log pi] = 0, so the expected gradient stays",
        lambda p, c: (c, c * _entropy(p), abs(c)),
        "common",
    ),
    ("sign-of-entropy", "-E[log pi] is plus the entropy", lambda p, c: (c, -c * _entropy(p), 0.0), "common"),
    (
        "J-unchanged",
        "a shift changes J itself; the gradient of J is what stays",
        lambda p, c: (0.0, c * _entropy(p), 0.0),
        "common",
    ),
    (
        "sum-of-logs",
        "the mean over y needs the weights pi(y)",
        lambda p, c: (c, -c * p.log().sum(), 0.0),
        "common",
    ),
)
sv.right("float64, as a list", lambda p, c: [float(c), -c * torch.special.xlogy(p.double(), p.double()).sum(), 0])
sv.right("three digits", lambda p, c: (c, float(f"{c * _entropy(p).item():.3g}"), 0.0))
sv.right("an array", lambda p, c: np.array([c, c * _entropy(p).item(), 0.0]))
sv.right("a tensor", lambda p, c: torch.stack([tensor(c), c * _entropy(p), tensor(0.0)]))
sv.right("torch.distributions", lambda p, c: (c, c * torch.distributions.Categorical(p).entropy().item(), 0 * c))

CHAPTER: Sequence[Question] = (pg, sz, pl, df, rg, ec, rs, us, tg, sv)
