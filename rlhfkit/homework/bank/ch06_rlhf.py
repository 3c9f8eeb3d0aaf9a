"""Chapter 6, RLHF with PPO: eleven questions, with the wrong answers that their checks must reject."""

from __future__ import annotations

import math
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
    lines,
    normal,
    require,
    show,
    source,
    unpack,
)
from rlhfkit.homework.core import Question


def _finite(got: Any) -> Tensor | str:
    """For probes: the numbers, or "not finite", which hides where nan and inf stand."""
    x = as_tensor(got, "probe")
    return x if bool(torch.isfinite(x).all()) else "not finite"


# -- the gradient of the whole objective -----------------------------------------------------------------


def rlhf_gradient(logits, ref_logprobs, scores, beta):  # type: ignore[no-untyped-def]
    """Gradient in the logits of the mean over prompts of E[score] - beta KL(pi || ref). three (P, N) -> (P, N)."""
    logprobs = logits.log_softmax(-1)
    probs = logprobs.exp()
    weights = scores - beta * (logprobs - ref_logprobs)
    return probs * (weights - (probs * weights).sum(-1, keepdim=True)) / len(logits)


def _world(prompts: int, responses: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of a policy, log-probabilities of a reference, and scores, all (P, N)."""
    logits, ref, scores = (normal(prompts, responses, seed=seed + i) for i in range(3))
    return logits, ref.log_softmax(-1), scores


def _mean_objective(logits: Tensor, ref_logprobs: Tensor, scores: Tensor, beta: float) -> Tensor:
    """J by the definitions: the expected score, minus beta times torch's own divergence of two categoricals."""
    law, ref = (torch.distributions.Categorical(logits=x.double()) for x in (logits, ref_logprobs))
    return ((law.probs * scores).sum(-1) - beta * torch.distributions.kl_divergence(law, ref)).mean()


rg = Question(
    id="rlhf_gradient",
    title="the exact gradient of the objective of RLHF",
    chapter=6,
    kind="function",
    theory=False,
    variable="rlhf_gradient",
    reference=rlhf_gradient,
    reference_source=source(rlhf_gradient),
    hints=(
        "Write J of one prompt as a sum over responses. In which places do the logits stand?",
        "They stand in pi(y) in front of everything, and in log pi(y) inside the penalty. The second place adds "
        "-beta E[grad log pi], which is 0. What is left is a policy gradient with the weight r - beta log(pi/ref).",
        "pi (w - sum(pi w)) / P, with w = r - beta log(pi/ref).",
    ),
    explanation="J = sum_y pi(y) w(y) with w = r - beta log(pi/ref). The product rule gives sum_y w grad pi, which is "
    "E[w grad log pi], and sum_y pi grad w = -beta E[grad log pi] = 0. The logits act through the sampling "
    "probabilities: a given response has a score without any logits in it, and yet the gradient of the expected score "
    "is not 0. In the logits the entries are pi(i) (w(i) - E[w]), and the mean over prompts adds 1/P.",
    probes=lambda f: [
        f(*_world(2, 4, 1), 0.5),
        f(*_world(3, 3, 5), 1.7),
        [_finite(row) for row in as_tensor(f(*_edge([100.0, 99.0, 98.0], [0.0, -1.0, -220.0]), 0.6), "probe")],
    ],
)


def _edge(*logits: list[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts with these logits, and one with equal logits at which the reference has a very rare response."""
    x = tensor([*logits, [0.0, 0.0, 0.0]])
    ref = tensor([[0.3, 0.2, 0.5]] * len(logits) + [[3e-7, 0.4, 0.6]]).log()
    return x, ref, tensor([[1.0, -0.5, 2.0]]).expand_as(x).clone()


@rg.case("at the reference, beta plays no part", 1, "what is the slope of KL(pi || ref) where it is smallest?")
def _(f: Any) -> None:
    logits, _, scores = _world(2, 4, 11)
    weak, strong = (as_tensor(f(logits, logits.log_softmax(-1), scores, beta), "gradient") for beta in (0.1, 5.0))
    expect_shape(weak, (2, 4), "gradient")
    require(weak.abs().max() > 1e-3, "the gradient is 0 at the reference, although the scores differ")
    expect_close(strong, weak, "gradient at pi = ref, beta 5 against beta 0.1")


@rg.case("at the optimum ref exp(r/beta) / Z it is 0", 1, "there nothing is left to gain")
def _(f: Any) -> None:
    for beta in (0.5, 2.0):
        away, ref, scores = _world(2, 4, 14)
        got = as_tensor(f(ref + scores / beta, ref, scores, beta), "gradient")
        expect_close(got, torch.zeros(2, 4), f"gradient at the optimum, beta {beta:g}")
        other = as_tensor(f(away, ref, scores, beta), "gradient")
        require(other.abs().max() > 1e-3, "the gradient is 0 away from the optimum, too")


@rg.case("with equal scores a step along it lowers the KL", 1, "the penalty pulls the policy back to the reference")
def _(f: Any) -> None:
    logits, ref, _ = _world(2, 4, 17)
    step = as_tensor(f(logits.clone(), ref.clone(), torch.full((2, 4), 3.0), 0.7), "gradient")
    expect_shape(step, (2, 4), "gradient")
    before, after = (-_mean_objective(x, ref, torch.zeros(2, 4), 1.0).item() for x in (logits, logits + 0.05 * step))
    require(
        after < before - 1e-4, f"mean KL went from {before:.4f} to {after:.4f} after a step of 0.05 along your gradient"
    )


@rg.case(
    "equals autograd through the whole sum, for three prompts",
    2,
    "J is a mean over prompts; log_softmax bears any logits",
)
def _(f: Any) -> None:
    for seed, beta in ((20, 0.3), (23, 1.5)):
        logits, ref, scores = _world(3, 4, seed)
        x = logits.clone().requires_grad_()
        (want,) = torch.autograd.grad(_mean_objective(x, ref, scores, beta), x)
        expect_close(f(logits, ref, scores, beta), want, f"gradient for three prompts, beta {beta:g}")
    logits, ref, scores = _edge([100.0, 99.0, -120.0])
    x = logits.clone().requires_grad_()
    (want,) = torch.autograd.grad(_mean_objective(x, ref, scores, 0.7), x)
    what = "gradient for logits (100, 99, -120), ref (.3, .2, .5); logits (0, 0, 0), ref (3e-7, .4, .6)"
    expect_close(f(logits, ref, scores, 0.7), want, what, rtol=1e-3, atol=1e-3)


def _gradient_of(weight: Callable[..., Tensor], centre: bool = True) -> Callable[..., Tensor]:
    """pi (w - E[w]) / P with another weight."""

    def f(logits: Tensor, ref_logprobs: Tensor, scores: Tensor, beta: float) -> Tensor:
        logprobs = logits.log_softmax(-1)
        p, w = logprobs.exp(), weight(logprobs, ref_logprobs, scores, beta)
        return p * (w - (p * w).sum(-1, keepdim=True) * centre) / len(logits)

    return f


def _from_logprobs(logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, beta: float) -> Tensor:
    p, w = logprobs.exp(), scores - beta * (logprobs - ref_logprobs)
    return p * (w - (p * w).sum(-1, keepdim=True)) / len(logprobs)


def _by_softmax(softmax: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """log pi as the log of probabilities, which are 0 or nan for some logits."""
    return lambda logits, ref, s, b: _from_logprobs(softmax(logits).log(), ref, s, b)


def _without_probabilities(logits: Tensor, ref_logprobs: Tensor, scores: Tensor, beta: float) -> Tensor:
    logprobs = logits.log_softmax(-1)
    w = scores - beta * (logprobs - ref_logprobs)
    return (w - (logprobs.exp() * w).sum(-1, keepdim=True)) / len(logits)


def _uniform_baseline(logits: Tensor, ref_logprobs: Tensor, scores: Tensor, beta: float) -> Tensor:
    logprobs = logits.log_softmax(-1)
    w = scores - beta * (logprobs - ref_logprobs)
    return logprobs.exp() * (w - w.mean(-1, keepdim=True)) / len(logits)


def _whole_table(logits: Tensor, ref_logprobs: Tensor, scores: Tensor, beta: float) -> Tensor:
    flat = logits.flatten().log_softmax(0).reshape(logits.shape)
    w = scores - beta * (flat - ref_logprobs)
    return flat.exp() * (w - (flat.exp() * w).sum())


def _forward_kl(logits: Tensor, ref_logprobs: Tensor, scores: Tensor, beta: float) -> Tensor:
    pull = beta * (ref_logprobs.exp() - logits.softmax(-1)) / len(logits)
    return _gradient_of(lambda lp, ref, s, b: s)(logits, ref_logprobs, scores, beta) + pull


def _mean_over_ref(logits: Tensor, ref_logprobs: Tensor, scores: Tensor, beta: float) -> Tensor:
    logprobs = logits.log_softmax(-1)
    w = scores - beta * (logprobs - ref_logprobs)
    q = ref_logprobs.exp()
    return (q * w - logprobs.exp() * (q * w).sum(-1, keepdim=True)) / len(logits)


rg.plant(
    (
        "reward-only",
        "the penalty is missing: this is the gradient of the expected score alone",
        _gradient_of(lambda lp, ref, s, b: s),
        "common",
    ),
    (
        "pathwise-zero",
        "you differentiated inside the expectation only: the score has no logits in it, and E[grad log pi] is 0",
        lambda logits, ref, s, b: torch.zeros_like(logits),
        "W-RLHF-4",
    ),
    (
        "pathwise-reward",
        "the score was taken for a constant: it acts through the probability of the response that earns it",
        _gradient_of(lambda lp, ref, s, b: -b * (lp - ref)),
        "W-RLHF-4",
    ),
    (
        "reward-for-leaving",
        "the sign of the penalty: you reward responses that the policy prefers to the reference",
        _gradient_of(lambda lp, ref, s, b: s + b * (lp - ref)),
        "W-RLHF-1",
    ),
    ("no-beta", "beta is missing in front of the KL", _gradient_of(lambda lp, ref, s, b: s - (lp - ref)), "W-RLHF-9"),
    (
        "divided-by-beta",
        "the weight is r - beta log(pi/ref); you divided the log-ratio by beta",
        _gradient_of(lambda lp, ref, s, b: s - (lp - ref) / b),
        "common",
    ),
    (
        "entropy",
        "the reference is missing: without it the penalty is an entropy bonus",
        _gradient_of(lambda lp, ref, s, b: s - b * lp),
        "common",
    ),
    (
        "ratio",
        "the logarithm is missing: the penalty of a response is beta log(pi/ref), not beta pi/ref",
        _gradient_of(lambda lp, ref, s, b: s - b * (lp - ref).exp()),
        "common",
    ),
    (
        "forward-kl",
        "this is the gradient with KL(ref || pi); the penalty is KL(pi || ref)",
        _forward_kl,
        "common",
    ),
    (
        "mean-over-the-reference",
        "the responses come from the policy: you weighted them with the reference's probabilities",
        _mean_over_ref,
        "common",
    ),
    (
        "uncentred",
        "the normaliser of the softmax is missing: grad log pi(y) is 1_y - pi, not 1_y",
        _gradient_of(lambda lp, ref, s, b: s - b * (lp - ref), centre=False),
        "common",
    ),
    (
        "extra-term",
        "differentiating log pi inside the penalty adds -beta E[grad log pi], which is 0, not -beta pi",
        lambda logits, ref, s, b: rlhf_gradient(logits, ref, s, b) - b * logits.softmax(-1) / len(logits),
        "common",
    ),
    (
        "extra-pi",
        "the policy enters twice: sum_y w grad pi is E[w grad log pi], not E[w grad pi]",
        _gradient_of(lambda lp, ref, s, b: lp.exp() * (s - b * (lp - ref))),
        "W-PG-2",
    ),
    (
        "sum-over-prompts",
        "J is the mean over prompts, you have their sum",
        lambda logits, ref, s, b: len(logits) * rlhf_gradient(logits, ref, s, b),
        "common",
    ),
    (
        "no-probabilities",
        "the factor pi(y) is missing: a response counts as often as the policy gives it",
        _without_probabilities,
        "common",
    ),
    (
        "uniform-baseline",
        "you subtracted the plain mean of the weights: it must be their mean under the policy",
        _uniform_baseline,
        "common",
    ),
    (
        "beta-on-the-score",
        "beta stands in front of the KL, not of the score",
        _gradient_of(lambda lp, ref, s, b: b * s - (lp - ref)),
        "common",
    ),
    (
        "log-ratio-clamped",
        "you clamped the log-ratio: the penalty grows with it, however large it is",
        _gradient_of(lambda lp, ref, s, b: s - b * (lp - ref).clamp(-10, 10)),
        "common",
    ),
    (
        "softmax-overflow",
        "exp(logits) overflows at a logit of 100: use log_softmax",
        _by_softmax(lambda x: x.exp() / x.exp().sum(-1, keepdim=True)),
        "common",
    ),
    (
        "log-sum-exp-overflow",
        "log(sum(exp(logits))) overflows at a logit of 100: log_softmax does not",
        lambda logits, ref, s, b: _from_logprobs(logits - logits.exp().sum(-1, keepdim=True).log(), ref, s, b),
        "common",
    ),
    (
        "log-of-softmax",
        "a very small probability is rounded to 0, and its log is -inf: take log_softmax of the logits",
        _by_softmax(lambda x: x.softmax(-1)),
        "common",
    ),
    (
        "descent",
        "this is minus the gradient, the gradient of a loss",
        lambda logits, ref, s, b: -rlhf_gradient(logits, ref, s, b),
        "common",
    ),
    (
        "softmax-over-the-table",
        "the softmax runs over all prompts together; every prompt has its own distribution",
        _whole_table,
        "common",
    ),
)


def _gradient_by_autograd(logits: Tensor, ref_logprobs: Tensor, scores: Tensor, beta: float) -> Tensor:
    x = logits.detach().double().requires_grad_()
    lp = x.log_softmax(-1)
    j = (lp.exp() * (scores - beta * (lp - ref_logprobs))).sum(-1).mean()
    return torch.autograd.grad(j, x)[0]


def _gradient_by_jacobian(logits: Tensor, ref_logprobs: Tensor, scores: Tensor, beta: float) -> Tensor:
    rows = []
    for x, q, s in zip(logits, ref_logprobs, scores, strict=True):
        logprobs = x.log_softmax(0)
        p = logprobs.exp()
        rows.append((torch.diag(p) - torch.outer(p, p)) @ (s - beta * (1 + logprobs - q)))
    return torch.stack(rows) / len(logits)


def _gradient_by_distributions(logits: Tensor, ref_logprobs: Tensor, scores: Tensor, beta: float) -> Tensor:
    x = logits.clone().requires_grad_()
    law, ref = (torch.distributions.Categorical(logits=y) for y in (x, ref_logprobs))
    j = (law.probs * scores).sum(-1) - beta * torch.distributions.kl_divergence(law, ref)
    return torch.autograd.grad(j.mean(), x)[0]


def _gradient_by_logits(logits: Tensor, ref_logprobs: Tensor, scores: Tensor, beta: float) -> Tensor:
    p, w = logits.softmax(-1), scores - beta * (logits - ref_logprobs)
    return p * (w - (p * w).sum(-1, keepdim=True)) / len(logits)


rg.right("autograd, float64", _gradient_by_autograd)
rg.right("torch.distributions and autograd, float32", _gradient_by_distributions)
rg.right("logits in place of log pi, as the shift drops out, float32", _gradient_by_logits)
rg.right("matrix form, with the extra term that drops out", _gradient_by_jacobian)
rg.right(
    "towards the optimum: beta pi (log(pi*/pi) + KL(pi || pi*)) / P",
    lambda logits, ref, s, b: _gradient_of(
        lambda lp, q, r, beta: beta * ((q + r / beta).log_softmax(-1) - lp),
    )(logits, ref, s, b),
)


# -- the penalty as a term of its own --------------------------------------------------------------------


def kl_term(pi, sft, beta):  # type: ignore[no-untyped-def]
    """Mean of -beta log(pi/sft) under pi, and its gradient in the logits of pi. (N,), (N,) -> number, (N,)."""
    log_ratio = (pi / sft).log()
    kl = (pi * log_ratio).sum()
    return -beta * kl, -beta * pi * (log_ratio - kl)


_PI, _SFT = [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]


def _pair(f: Any, pi: Tensor, sft: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    value, gradient = unpack(f(pi.clone(), sft.clone(), beta), 2, "kl_term returns (value, gradient)")
    value, gradient = as_tensor(value, "value"), as_tensor(gradient, "gradient")
    expect_shape(value, (), "value")
    expect_shape(gradient, tuple(pi.shape), "gradient")
    return value, gradient


kt = Question(
    id="kl_term",
    title="what the term -beta log(pi/sft) does",
    chapter=6,
    kind="symbolic",
    theory=True,
    variable="kl_term",
    reference=kl_term,
    reference_source=source(kl_term),
    hints=(
        "Under which distribution is the mean taken, and which divergence is that mean?",
        "E_pi[log(pi/sft)] = KL(pi || sft). It is a function of the logits: differentiate all of it, and compare its "
        "slope with that of a policy gradient whose weight is -beta log(pi/sft).",
        "With KL = sum(pi log(pi/sft)), the value is -beta KL and the gradient is -beta pi (log(pi/sft) - KL).",
    ),
    explanation="The mean of -beta log(pi/sft) under pi is -beta KL(pi || sft): never positive, and 0 only at the SFT "
    "model. Where the policy gives a response more than the SFT model does, the gradient lowers its logit relative to "
    "the rest: the term is a penalty for leaving the SFT model, not a preference for other responses. For "
    "pi = (.5, .3, .2), sft = (.2, .3, .5), beta = 1 the value is -0.275 and the gradient (-0.321, 0.082, 0.238).",
    probes=lambda f: [
        list(unpack(f(tensor(p), tensor(q), beta), 2, "probe"))
        for p, q, beta in (
            ([0.6, 0.3, 0.1], _SFT, 0.5),
            ([0.1, 0.2, 0.3, 0.4], [0.4, 0.1, 0.2, 0.3], 2.0),
            ([0.8, 0.2], [0.001, 0.999], 1.0),
        )
    ],
)


@kt.case("pi = (.5, .3, .2), sft = (.2, .3, .5), beta = 1", 1, "three terms, each weighted with pi")
def _(f: Any) -> None:
    value, gradient = _pair(f, tensor(_PI), tensor(_SFT), 1.0)
    kl = 0.3 * math.log(2.5)
    expect_close(value, -kl, "value", rtol=2e-3)
    want = [-0.5 * (math.log(2.5) - kl), 0.3 * kl, 0.2 * (math.log(2.5) + kl)]
    expect_close(gradient, tensor(want), "gradient", rtol=2e-3, atol=6e-4)


@kt.case("0 at the SFT model, with slope 0; negative everywhere else", 1, "can a divergence be negative?")
def _(f: Any) -> None:
    for seed in range(6):
        pi, sft = normal(4, seed=seed).softmax(0), normal(4, seed=seed + 10).softmax(0)
        value, gradient = _pair(f, sft, sft, 0.5)
        expect_close(value, 0.0, "value at pi = sft", atol=1e-4)
        expect_close(gradient, torch.zeros(4), "gradient at pi = sft", atol=1e-4)
        value, gradient = _pair(f, pi, sft, 0.5)
        require(value < -1e-3, f"value at pi = {show(pi)}, sft = {show(sft)}: got {value:.4g}, expected less than 0")
        require(gradient.abs().max() > 1e-3, "the gradient is 0 at a policy that is not the SFT model")


@kt.case("equals autograd, for three values of beta", 2, "the divergence is weighted with pi, and beta is a factor")
def _(f: Any) -> None:
    for beta in (0.1, 1.0, 2.5):
        logits, sft = normal(4, seed=20).requires_grad_(), normal(4, seed=21).softmax(0)
        want = _mean_objective(logits[None], sft.log()[None], torch.zeros(1, 4), beta)
        (slope,) = torch.autograd.grad(want, logits)
        value, gradient = _pair(f, logits.detach().softmax(0), sft, beta)
        expect_close(value, want, f"value, beta {beta:g}", rtol=2e-3, atol=6e-4)
        expect_close(gradient, slope, f"gradient, beta {beta:g}", rtol=2e-3, atol=6e-4)
    for rare, beta in ((0.01, 1.0), (0.001, 1.0), (0.001, 10.0)):
        logits, sft = tensor([0.9, 0.1]).log().requires_grad_(), tensor([rare, 1 - rare])
        want = _mean_objective(logits[None], sft.log()[None], torch.zeros(1, 2), beta)
        (slope,) = torch.autograd.grad(want, logits)
        value, gradient = _pair(f, tensor([0.9, 0.1]), sft, beta)
        where = f"pi = (.9, .1), sft = {show(sft)}, beta {beta:g}"
        expect_close(value, want, f"value, {where}", rtol=2e-3, atol=6e-4)
        expect_close(gradient, slope, f"gradient, {where}", rtol=2e-3, atol=6e-4)


def _centred(p: Tensor, w: Tensor) -> Tensor:
    return p * (w - (p * w).sum())


def _kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum()


def _clamped(p: Tensor, q: Tensor) -> Tensor:
    return (p / q).log().clamp(-5, 5)


kt.plant(
    (
        "preference",
        "the sign: this rewards responses that the policy prefers to the SFT model; the term is a penalty for leaving",
        lambda p, q, b: (b * _kl(p, q), b * _centred(p, (p / q).log())),
        "W-RLHF-1",
    ),
    (
        "preference-in-the-gradient",
        "value and gradient contradict each other: the slope must make the penalty smaller",
        lambda p, q, b: (-b * _kl(p, q), b * _centred(p, (p / q).log())),
        "W-RLHF-1",
    ),
    (
        "policy-gradient-of-score-1",
        "you took the log-ratio for a weight without the expectation: responses must be weighted with pi",
        lambda p, q, b: (-b * (p / q).log().sum(), -b * ((p / q).log() - p * (p / q).log().sum())),
        "W-RLHF-1",
    ),
    (
        "other-direction",
        "this is KL(sft || pi): the responses come from the policy",
        lambda p, q, b: (-b * _kl(q, p), b * (q - p)),
        "common",
    ),
    (
        "entropy",
        "the SFT model is missing: this is an entropy bonus",
        lambda p, q, b: (-b * (p * p.log()).sum(), -b * _centred(p, p.log())),
        "common",
    ),
    (
        "no-beta",
        "beta is missing in front of the KL",
        lambda p, q, b: (-_kl(p, q), -_centred(p, (p / q).log())),
        "W-RLHF-9",
    ),
    (
        "detached",
        "the right value, but its gradient is not 0: the logits act through the sampling probabilities",
        lambda p, q, b: (-b * _kl(p, q), 0 * p),
        "W-RLHF-4",
    ),
    (
        "gradient-in-the-probabilities",
        "this is the slope in the probabilities, -beta (log(pi/sft) + 1); the slope in the logits is asked for",
        lambda p, q, b: (-b * _kl(p, q), -b * ((p / q).log() + 1)),
        "common",
    ),
    (
        "normaliser-missing",
        "the normaliser of the softmax is missing: the entries of the gradient must sum to 0",
        lambda p, q, b: (-b * _kl(p, q), -b * p * (p / q).log()),
        "common",
    ),
    (
        "ratio",
        "the logarithm is missing",
        lambda p, q, b: (-b * (p * p / q).sum(), -b * _centred(p, 2 * p / q)),
        "common",
    ),
    (
        "half-square",
        "half the squared log-ratio only approximates the divergence",
        lambda p, q, b: (
            -b * (p * (p / q).log().square()).sum() / 2,
            -b * _centred(p, (p / q).log().square() / 2 + (p / q).log()),
        ),
        "common",
    ),
    (
        "log2",
        "this is in bits: the logarithm is the natural one",
        lambda p, q, b: tuple(x / math.log(2) for x in kl_term(p, q, b)),
        "common",
    ),
    (
        "mean-in-the-value",
        "the value is a sum weighted with pi, which is a mean already; you divided it by N as well",
        lambda p, q, b: (kl_term(p, q, b)[0] / len(p), kl_term(p, q, b)[1]),
        "common",
    ),
    (
        "mean-for-sum",
        "a sum weighted with pi is a mean already: you divided value and gradient by N as well",
        lambda p, q, b: tuple(x / len(p) for x in kl_term(p, q, b)),
        "common",
    ),
    (
        "value-under-sft",
        "in the value the log-ratios are weighted with pi, not with sft",
        lambda p, q, b: (-b * (q * (p / q).log()).sum(), kl_term(p, q, b)[1]),
        "common",
    ),
    (
        "gradient-of-the-other-direction",
        "the value is right; beta (sft - pi) is the gradient of -beta KL(sft || pi), with the arguments exchanged",
        lambda p, q, b: (kl_term(p, q, b)[0], b * (q - p)),
        "common",
    ),
    (
        "no-beta-in-the-value",
        "beta is missing in the value",
        lambda p, q, b: (kl_term(p, q, 1.0)[0], kl_term(p, q, b)[1]),
        "W-RLHF-9",
    ),
    (
        "no-beta-in-the-gradient",
        "beta is missing in the gradient",
        lambda p, q, b: (kl_term(p, q, b)[0], kl_term(p, q, 1.0)[1]),
        "W-RLHF-9",
    ),
    (
        "log-ratio-clamped",
        "you clamped the log-ratio: the penalty grows with it, however large it is",
        lambda p, q, b: (-b * (p * _clamped(p, q)).sum(), -b * _centred(p, _clamped(p, q))),
        "common",
    ),
)


def _kl_term_by_autograd(pi: Tensor, sft: Tensor, beta: float) -> Any:
    logits = pi.double().log().requires_grad_()
    p = logits.softmax(0)
    value = -beta * (p * (p / sft).log()).sum()
    return value, torch.autograd.grad(value, logits)[0]


def _kl_term_by_numpy(pi: Tensor, sft: Tensor, beta: float) -> Any:
    p, q = pi.double().numpy(), sft.double().numpy()
    weight = -beta * np.log(p / q)
    return [float(p @ weight), p * (weight - p @ weight)]


kt.right("autograd, float64", _kl_term_by_autograd)
kt.right("a policy gradient with the weight -beta log(pi/sft), numpy", _kl_term_by_numpy)


# -- the pretraining term --------------------------------------------------------------------------------


def ptx_grad(pi, data, gamma):  # type: ignore[no-untyped-def]
    """Gradient in the logits of pi of gamma E_{y ~ data}[log pi(y)]. (N,), (N,), number -> (N,)."""
    return gamma * (data - pi)


px = Question(
    id="ptx_grad",
    title="the gradient of the pretraining term",
    chapter=6,
    kind="symbolic",
    theory=True,
    variable="ptx_grad",
    reference=ptx_grad,
    reference_source=source(ptx_grad),
    hints=(
        "Who writes the text whose log-probability is averaged: the policy, or the authors of the pretraining data?",
        "The data do not change with the logits. grad log pi(y) = 1_y - pi; take its mean over the data.",
        "gamma (data - pi).",
    ),
    explanation="The expectation is over pretraining text, which the logits cannot change: gamma E_data[1_y - pi] = "
    "gamma (data - pi). It is the gradient of -gamma KL(data || pi), maximum likelihood, which keeps what pretraining "
    "taught and vanishes at pi = data. The entropy of the policy does not contain the data at all; and an expectation "
    "over the policy, E_pi[log pi], is minus that entropy, so going up along it collapses the policy. For "
    "pi = (.5, .3, .2), data = (.8, .1, .1), gamma = 1 the gradient is (.3, -.2, -.1), that of the entropy "
    "(-.168, .052, .116): opposite in every sign.",
    probes=lambda f: [
        f(tensor(_PI), tensor([0.8, 0.1, 0.1]), 1.0),
        f(tensor([0.1, 0.2, 0.3, 0.4]), tensor([0.3, 0.1, 0.5, 0.1]), 0.4),
        f(tensor([0.2, 0.3, 0.5]), tensor([0.1, 0.2, 0.7]), 20.0),
        _finite(f(tensor(_PI), tensor([0.7, 0.3, 0.0]), 1.0)),
    ],
)


@px.case("0 where the policy is the data, and only there", 1, "where is the likelihood of the data largest?")
def _(f: Any) -> None:
    for seed in (1, 2):
        data, other = normal(4, seed=seed).softmax(0), normal(4, seed=seed + 5).softmax(0)
        expect_close(f(data.clone(), data.clone(), 0.7), torch.zeros(4), "gradient at pi = data")
        away = as_tensor(f(other, data, 0.7), "gradient")
        expect_shape(away, (4,), "gradient")
        require(away.abs().max() > 1e-2, "the gradient is 0 at a policy that is not the data, too")


@px.case("a small step along it makes the data likelier", 1, "you go up, so the data's log-likelihood must go up")
def _(f: Any) -> None:
    for seed in range(10, 14):
        logits, data = normal(5, seed=seed), (2 * normal(5, seed=seed + 5)).softmax(0)
        step = as_tensor(f(logits.softmax(0), data, 0.5), "gradient")
        expect_shape(step, (5,), "gradient")
        before, after = ((data * x.double().log_softmax(0)).sum().item() for x in (logits, logits + 0.02 * step))
        require(after > before + 1e-5, f"E_data[log pi] went from {before:.5f} to {after:.5f} after a step of 0.02")


@px.case("equals autograd", 2, "it is a likelihood of data, so it depends on the data, and gamma is a factor")
def _(f: Any) -> None:
    for seed, gamma in ((20, 1.0), (21, 0.3), (22, 4.0), (23, 27.8)):
        logits, data = normal(4, seed=seed).requires_grad_(), normal(4, seed=seed + 5).softmax(0)
        (want,) = torch.autograd.grad(gamma * (data * logits.log_softmax(0)).sum(), logits)
        expect_close(f(logits.detach().softmax(0), data, gamma), want, f"gradient, gamma {gamma:g}", rtol=1e-3)
    logits, data = tensor(_PI).log().requires_grad_(), tensor([0.7, 0.3, 0.0])
    (want,) = torch.autograd.grad((data * logits.log_softmax(0)).sum(), logits)
    got = f(tensor(_PI), data, 1.0)
    expect_close(got, want, "gradient for pi = (.5, .3, .2), data = (.7, .3, 0), gamma 1", rtol=1e-3)


px.plant(
    (
        "entropy",
        "this is the gradient of the policy's entropy, which does not contain the data: the term is a likelihood",
        lambda p, d, g: -g * _centred(p, p.log()),
        "W-RLHF-2",
    ),
    (
        "towards-uniform",
        "this pulls the policy towards the uniform distribution: the term pulls it towards the data",
        lambda p, d, g: g * (1 / len(p) - p),
        "W-RLHF-2",
    ),
    (
        "over-the-policy",
        "the expectation is over pretraining data: over the policy, E[log pi] is minus the entropy, and the policy collapses",
        lambda p, d, g: g * _centred(p, p.log()),
        "W-RLHF-3",
    ),
    (
        "score-function-over-the-policy",
        "over the policy the mean of grad log pi is 0; here the responses come from the data",
        lambda p, d, g: 0 * p,
        "W-RLHF-3",
    ),
    (
        "reverse-kl",
        "this is the gradient of -KL(pi || data); the likelihood belongs to KL(data || pi)",
        lambda p, d, g: -g * _centred(p, (p / d).log()),
        "common",
    ),
    ("sign", "the sign: going up must make the data likelier", lambda p, d, g: g * (p - d), "common"),
    ("no-gamma", "gamma is missing", lambda p, d, g: d - p, "common"),
    (
        "data-only",
        "the normaliser of the softmax is missing: grad log pi(y) is 1_y - pi",
        lambda p, d, g: g * d,
        "common",
    ),
    (
        "in-the-probabilities",
        "this is the slope in the probabilities, data/pi; the slope in the logits is asked for",
        lambda p, d, g: g * d / p,
        "common",
    ),
    (
        "data-as-reward",
        "you took the data's probabilities for rewards of the policy's own responses",
        lambda p, d, g: g * _centred(p, d),
        "common",
    ),
    (
        "log-data-as-reward",
        "you took the data's log-probabilities for rewards of the policy's own responses",
        lambda p, d, g: g * _centred(p, d.log()),
        "common",
    ),
    (
        "absent-texts-skipped",
        "a text with probability 0 in the data is pushed down too: its entry is -gamma pi, not 0",
        lambda p, d, g: g * torch.where(d > 0, d - p, 0.0),
        "common",
    ),
    (
        "gamma-capped",
        "you limited gamma: the term is proportional to it, however large it is",
        lambda p, d, g: min(g, 10.0) * (d - p),
        "common",
    ),
)
px.right("numpy", lambda p, d, g: g * (d.numpy() - p.numpy()))


def _ptx_by_rows(pi: Tensor, data: Tensor, gamma: float) -> Tensor:
    scores = torch.eye(len(pi), dtype=torch.float64) - pi.double()
    return gamma * data.double() @ scores


px.right("mean of 1_y - pi over the data, float64", _ptx_by_rows)


# -- statements about the objective ----------------------------------------------------------------------

_FALSE = {2, 3, 6}

ol = Question(
    id="objective_lines",
    title="find the false statements about the objective",
    chapter=6,
    kind="find the false lines",
    theory=True,
    variable="false_lines",
    reference=_FALSE,
    reference_source="false_lines = {2, 3, 6}",
    accept=lines(8, "line", "{1, 8}"),
    hints=(
        "Put a policy over three responses into every line: both sides are finite sums.",
        "Ask of every expectation over which responses it runs, and whether the logits can change them. And where must "
        "beta stand for the units to agree?",
        "J = E_pi[r] - beta KL; grad E_pi[r] = E_pi[r grad log pi]; grad E_data[log pi] = data - pi in the logits.",
    ),
    explanation="Line 2 has lost beta: the KL, in nats, needs it to be compared with a reward. (That the KL stands inside "
    "the mean over y does no harm to the value, since it does not depend on y, but it is already a mean over y and "
    "belongs outside.) Line 3: r has no parameters in it, so the right side is 0; the left side is "
    "E_pi[r grad log pi]. Line 6: the expectation runs over pretraining text, so its gradient is data - pi in the logits; "
    "that of the entropy does not contain the data. Lines 1, 4, 5, 7, 8 hold: line 4 because of line 5, and line 8 "
    "because a divergence is smallest where it is 0.",
    probes=lambda answer: answer,
)


@ol.case("at least two lines are named, and none of them is true", 1, "put numbers into both sides of each line")
def _(found: Any) -> None:
    for line in sorted(found - _FALSE):
        require(False, f"line {line} is true")
    require(len(found) > 1, "more than one line is false")


@ol.case("all false lines are found, and only those", 2, "judge each line on its own")
def _(found: Any) -> None:
    missing = len(_FALSE - found)
    require(not missing, f"{missing} of {len(_FALSE)} false lines not found")
    extra = len(found - _FALSE)
    require(not extra, f"{extra} true {'line' if extra == 1 else 'lines'} among them")


ol.plant(
    ("beta-missed", "line 2 is false: beta is missing in front of the KL", {3, 6}, "W-RLHF-9"),
    (
        "pathwise-missed",
        "line 3 is false: the reward of a given response has no parameters in it, so the right side is 0",
        {2, 6},
        "W-RLHF-4",
    ),
    (
        "entropy-missed",
        "line 6 is false: the expectation is over pretraining text, which has nothing to do with the policy's entropy",
        {2, 3},
        "W-RLHF-2",
    ),
    (
        "penalty-called-false",
        "line 1 is true: the mean of this term is minus beta times a divergence, so it cannot favour any response",
        {1, 2, 3, 6},
        "W-RLHF-1",
    ),
    (
        "slope-at-the-reference",
        "line 8 is true: a divergence is smallest where it is 0, so at the reference the term pulls nowhere",
        {2, 3, 6, 8},
        "W-RLHF-1",
    ),
    (
        "entropy-of-the-policy",
        "line 7 is true, which is why an expectation over the policy would make the pretraining term minus the entropy",
        {2, 3, 6, 7},
        "W-RLHF-3",
    ),
    (
        "entropies-exchanged",
        "lines 6 and 7 are exchanged: over the policy E[log pi] is minus the entropy, over the data it is a likelihood",
        {2, 3, 7},
        "W-RLHF-3",
    ),
    (
        "policy-gradient-called-false",
        "line 4 is true: the derivative of log pi inside the penalty adds nothing, see line 5",
        {2, 3, 4, 6},
        "common",
    ),
    (
        "zero-mean-called-false",
        "line 5 is true: probabilities sum to 1 whatever the logits are",
        {2, 3, 5, 6},
        "common",
    ),
    (
        "gradients-exchanged",
        "lines 3 and 4 are exchanged: the logits act through the sampling probabilities",
        {2, 4, 6},
        "W-RLHF-4",
    ),
)
ol.wrong("true-lines", "these are the true lines: the false ones are asked for", {1, 4, 5, 7, 8})
ol.right("a list", [6, 3, 2])
ol.right("numpy integers", np.array([2, 3, 6]))


# -- rewards per token -----------------------------------------------------------------------------------


def token_rewards(scores, logprobs, ref_logprobs, response_mask, kl_coef):  # type: ignore[no-untyped-def]
    """-kl_coef (log pi - log ref) on every token, plus the score on the last one. (B,), three (B, T) -> (B, T)."""
    penalties = -kl_coef * (logprobs - ref_logprobs)
    rewards = torch.where(response_mask, penalties, torch.zeros_like(penalties)).detach()
    positions = torch.arange(1, logprobs.shape[1] + 1, device=logprobs.device)
    last = (response_mask * positions).argmax(1)
    rewards[torch.arange(len(scores)), last] += scores.detach()
    return rewards


_MASK = [
    [True, True, True, False, False],
    [False, True, True, True, False],
    [True] * 5,
    [False, False, True] + [False] * 2,
    [False, False, False, True, True],
]
_ENDS = [2, 3, 4, 2, 4]


def _rollout(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logprobs, ref_logprobs = -normal(5, 5, seed=seed).exp(), -normal(5, 5, seed=seed + 1).exp()
    return normal(5, seed=seed + 2) + 2, logprobs, ref_logprobs, tensor(_MASK)


def _wide_rollout(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A very bad score, log-ratios of 12 and -12, and last tokens as likely under the policy as under the reference."""
    scores, logprobs, ref, mask = _rollout(seed)
    scores[1] = -30.0
    logprobs[2, 1], ref[2, 1] = -0.5, -12.5
    logprobs[2, 2], ref[2, 2] = -13.0, -1.0
    for row in (0, 2, 4):
        ref[row, _ENDS[row]] = logprobs[row, _ENDS[row]]
    return scores, logprobs, ref, mask


def _rewards_probe(f: Any) -> list[Any]:
    scores, logprobs, ref, mask = _rollout(1)
    given = logprobs.clone()
    got = f(scores, given, ref, mask, 0.3)
    first = f(scores, logprobs.clone().requires_grad_(), ref, mask, 0.0)
    wide = f(*_wide_rollout(3), 0.3)
    return [got, given, wide, "attached" if isinstance(first, Tensor) and first.requires_grad else "a number"]


tr = Question(
    id="token_rewards",
    title="rewards per token: the score, and the penalty for leaving the reference",
    chapter=6,
    kind="function",
    theory=False,
    variable="token_rewards",
    reference=token_rewards,
    reference_source=source(token_rewards),
    hints=(
        "Add the rewards of one row: what must the sum be, so that its mean is E[score] - kl_coef KL?",
        "log(pi/ref) of a response is a sum over its tokens, so each token carries its own part of the penalty. The "
        "score belongs to the whole response: it is added where the response ends, which is not the last column.",
        "-kl_coef (logprobs - ref_logprobs) where response_mask, 0 elsewhere; plus scores at the last True of each row.",
    ),
    explanation="The response's log-ratio is the sum of the log-ratios of its tokens, so the penalty can be paid token "
    "by token, which tells the critic where it arises. The score is known when the response has ended: it is added at the "
    "last real token, on top of that token's penalty. On padding nothing is paid. Rewards are numbers: the gradient comes "
    "from the log-probabilities that they are multiplied with in the loss.",
    probes=_rewards_probe,
)


@tr.case(
    "the mean of their sum is E[score] - kl_coef KL, by enumeration", 2, "weigh each response with its probability"
)
def _(f: Any) -> None:
    """Three responses over two tokens, of which the second ends the response: (end), (0, 0), (0, end)."""
    scores, mask = tensor([1.0, -2.0, 3.0]), tensor([[True, False], [True, True], [True, True]])

    def under(first: float, second: float, filling: float) -> Tensor:
        return tensor([[first, 1.0], [1 - first, 1 - second], [1 - first, second]]).log() + tensor(
            [[0.0, filling], [0.0, 0.0], [0.0, 0.0]]
        )

    for kl_coef, filling in ((0.5, -7.0), (2.0, -1.0)):
        lp, ref = under(0.3, 0.6, filling), under(0.5, 0.2, 2 * filling)
        law, ref_law = ((x * mask).double().sum(1).exp() for x in (lp, ref))
        rewards = as_tensor(f(scores, lp, ref, mask, kl_coef), "rewards")
        expect_shape(rewards, (3, 2), "rewards")
        want = law @ scores.double() - kl_coef * (law * (law / ref_law).log()).sum()
        expect_close(law @ rewards.sum(1), want, f"mean over all responses of the sum of rewards, kl_coef {kl_coef:g}")


@tr.case("the score stands on the last real token, and only there", 1, "with kl_coef 0 nothing else is left")
def _(f: Any) -> None:
    for scores, logprobs, ref, mask in (_rollout(5), _wide_rollout(5)):
        want = torch.zeros(5, 5)
        want[range(5), _ENDS] = scores
        expect_close(f(scores, logprobs, ref, mask, 0.0), want, "rewards with kl_coef 0")


@tr.case("each token pays its own penalty, the last one too; padding pays nothing", 2, "what does padding hold?")
def _(f: Any) -> None:
    for scores, logprobs, ref, mask in (_rollout(9), _wide_rollout(9)):
        _judge_penalties(f, scores, logprobs, ref, mask)


def _judge_penalties(f: Any, scores: Tensor, logprobs: Tensor, ref: Tensor, mask: Tensor) -> None:
    filled = [torch.where(mask, x, tensor(y)) for x, y in ((logprobs, -50.0), (ref, 3.0))]
    got = as_tensor(f(torch.zeros(5), *filled, mask, 0.25), "rewards")
    expect_shape(got, (5, 5), "rewards")
    expect_close(got[~mask], torch.zeros(11), "rewards on padding, scores 0")
    expect_close(got[mask], 0.25 * (ref - logprobs)[mask], "rewards on the response, scores 0")
    both = as_tensor(f(scores, *filled, mask, 0.25), "rewards").sum(1)
    for row, (now, penalty, score) in enumerate(zip(both, got.sum(1), scores.double(), strict=True)):
        what = f"row {row}: with score {score:.3f} the rewards sum to {now:.4f}, with score 0 to {penalty:.4f}"
        require(abs(now - penalty - score) < 1e-3, f"{what}: the difference must be the score")


@tr.case("rewards are numbers: no gradient flows through them", 1, "a detached result, or numbers in another form")
def _(f: Any) -> None:
    scores, logprobs, ref, mask = _rollout(13)
    scores, logprobs, ref = (x.requires_grad_() for x in (scores, logprobs, ref))
    got = f(scores, logprobs, ref, mask, 0.5)
    expect_shape(as_tensor(got, "rewards"), (5, 5), "rewards")
    require(as_tensor(got, "rewards").abs().sum() > 0, "the rewards are all 0")
    attached = isinstance(got, Tensor) and got.requires_grad
    require(not attached, "your rewards carry a gradient to the log-probabilities or the scores")


def _last(mask: Tensor) -> Tensor:
    return (mask * torch.arange(1, mask.shape[1] + 1)).argmax(1)


def _rewards_with(
    *,
    penalty: Callable[[Tensor, float], Tensor] = lambda x, c: -c * x,
    where: Callable[[Tensor], Tensor] = _last,
    masked: bool = True,
    replace: bool = False,
    scale: bool = False,
    attached: bool = False,
    in_place: bool = False,
) -> Callable[..., Tensor]:
    def f(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
        out = penalty(logprobs - ref_logprobs, kl_coef)
        out = torch.where(mask, out, 0.0) if masked else out.clone()
        rows, columns = torch.arange(len(scores)), where(mask)
        added = (kl_coef if scale else 1) * scores
        out[rows, columns] = added if replace else out[rows, columns] + added
        if in_place:
            logprobs.data.copy_(out)
        return out if attached else out.detach()

    return f


def _at_the_end(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    out = torch.zeros_like(logprobs)
    total = ((logprobs - ref_logprobs) * mask).sum(1)
    out[torch.arange(len(scores)), _last(mask)] = scores - kl_coef * total
    return out.detach()


def _score_before_padding(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float
) -> Tensor:
    end = mask & ~mask.roll(-1, 1)
    return (torch.where(mask, -kl_coef * (logprobs - ref_logprobs), 0.0) + end * scores[:, None]).detach()


def _score_on(share: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def f(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
        return ((-kl_coef * (logprobs - ref_logprobs) + scores[:, None] * share(mask)) * mask).detach()

    return f


tr.plant(
    (
        "kl-on-padding",
        "padding pays a penalty too: the mask is missing",
        _rewards_with(masked=False),
        "common",
    ),
    (
        "score-on-all-tokens",
        "every token got the whole score: the response is rewarded once, where it ends",
        _score_on(lambda mask: torch.ones_like(mask)),
        "common",
    ),
    (
        "score-spread",
        "you spread the score over the tokens: it belongs to the last one",
        _score_on(lambda mask: 1 / mask.sum(1, keepdim=True)),
        "common",
    ),
    (
        "last-column",
        "the score stands in the last column, which is padding in most rows",
        _rewards_with(where=lambda mask: torch.full((len(mask),), -1)),
        "W-RM-5",
    ),
    (
        "count",
        "the number of real tokens is a position only if the response starts in column 0",
        _rewards_with(where=lambda mask: mask.sum(1) - 1),
        "common",
    ),
    (
        "first-token",
        "the score stands on the first token of the response: it is known only when the response has ended",
        _rewards_with(where=lambda mask: mask.int().argmax(1)),
        "common",
    ),
    (
        "after-the-end",
        "the score stands one token after the response",
        _rewards_with(where=lambda mask: (_last(mask) + 1).clamp(max=mask.shape[1] - 1)),
        "common",
    ),
    (
        "score-replaces-penalty",
        "the score is added to the last token's penalty; it does not replace it",
        _rewards_with(replace=True),
        "common",
    ),
    (
        "sign",
        "the sign: a token that the policy likes more than the reference pays a penalty",
        _rewards_with(penalty=lambda x, c: c * x),
        "W-RLHF-1",
    ),
    ("no-coefficient", "kl_coef is missing", _rewards_with(penalty=lambda x, c: -x), "W-RLHF-9"),
    (
        "no-penalty",
        "the penalty is missing: these are the scores alone",
        _rewards_with(penalty=lambda x, c: 0 * x),
        "common",
    ),
    (
        "coefficient-on-the-score",
        "kl_coef multiplies the score too: it belongs to the penalty only",
        _rewards_with(scale=True),
        "common",
    ),
    (
        "ratio",
        "the logarithm is missing: the penalty is the difference of log-probabilities, not pi/ref",
        _rewards_with(penalty=lambda x, c: -c * x.exp()),
        "common",
    ),
    (
        "half-square",
        "half the squared log-ratio has another mean than the KL",
        _rewards_with(penalty=lambda x, c: -c * x.square() / 2),
        "common",
    ),
    (
        "k3",
        "this estimate of the KL has the right mean, but the penalty asked for is the log-ratio itself",
        _rewards_with(penalty=lambda x, c: -c * ((-x).exp() - 1 + x)),
        "common",
    ),
    (
        "absolute-value",
        "the absolute value: a token that the policy likes less than the reference must get a bonus, or the mean is not the KL",
        _rewards_with(penalty=lambda x, c: -c * x.abs()),
        "common",
    ),
    (
        "penalty-at-the-end",
        "the whole penalty stands on the last token: each token pays its own",
        _at_the_end,
        "common",
    ),
    (
        "followed-by-padding",
        "you looked for a token that is followed by padding: a response that fills the row has none, and loses its score",
        _score_before_padding,
        "common",
    ),
    (
        "last-log-ratio",
        "the last token was found by its log-ratio, which may be 0: the mask says where the response ends",
        lambda s, lp, ref, m, c: _rewards_with(where=lambda mask: _last(mask & (lp != ref)))(s, lp, ref, m, c),
        "common",
    ),
    (
        "kl-per-token",
        "you divided the penalty by the length: the sum over the tokens must be that of the whole response",
        lambda s, lp, ref, m, c: token_rewards(s, (lp - ref) / m.sum(1, keepdim=True), 0 * ref, m, c),
        "common",
    ),
    (
        "log-ratio-clamped",
        "you clamped the log-ratio: a token pays all of it, however large it is",
        _rewards_with(penalty=lambda x, c: -c * x.clamp(-10, 10)),
        "common",
    ),
    (
        "score-clamped",
        "you clamped the score: it is added as it is",
        lambda s, lp, ref, m, c: token_rewards(s.clamp(-10, 10), lp, ref, m, c),
        "common",
    ),
    ("attached", "a gradient flows through the rewards: detach them", _rewards_with(attached=True), "common"),
    ("in-place", "you changed a tensor that you were given: work on a copy", _rewards_with(in_place=True), "common"),
)


def _rewards_by_loop(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float) -> Any:
    rows = []
    for b in range(len(scores)):
        kept = [t for t in range(mask.shape[1]) if mask[b, t]]
        row = [0.0] * mask.shape[1]
        for t in kept:
            row[t] = -kl_coef * (logprobs[b, t].item() - ref_logprobs[b, t].item())
        row[kept[-1]] += scores[b].item()
        rows.append(row)
    return rows


def _rewards_by_mask(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    with torch.no_grad():
        later = mask.flip(1).cumsum(1).flip(1)
        is_last = mask & (later == 1)
        return (mask * kl_coef * (ref_logprobs - logprobs) + is_last * scores[:, None]).double()


tr.right("a loop, lists", _rewards_by_loop)
tr.right("the mask of the last token, float64", _rewards_by_mask)


# -- the optimum, with one multiplier per prompt ---------------------------------------------------------


def kl_optimum(ref_logprobs, scores, beta):  # type: ignore[no-untyped-def]
    """log pi*, the largest J and the multiplier, per prompt. (P, N), (P, N), number -> (P, N), (P,), (P,)."""
    exponents = ref_logprobs + scores / beta
    log_z = exponents.logsumexp(-1)
    return exponents - log_z[:, None], beta * log_z, beta * (log_z - 1)


_FARTHER: list[tuple[Tensor, Tensor]] = [
    (torch.full((2, 2), 0.5).log(), tensor(scores))
    for scores in ([[3.0, 2.0], [0.0, -1.0]], [[11.0, 10.0], [10.9, 11.0]], [[11.0, 10.0], [-12.0, -10.0]])
]
"""log ref and scores for which, at beta 0.01, exp(r/beta) is too large or too small, with a common shift as well."""

_REF, _R = [0.5, 0.3, 0.2], [1.0, 0.0, 2.0]


def _optimum(f: Any, ref_logprobs: Tensor, scores: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor]:
    got = unpack(
        f(ref_logprobs.clone(), scores.clone(), beta),
        3,
        "kl_optimum returns (logprobs, values, multipliers)",
    )
    parts = tuple(as_tensor(x, name) for x, name in zip(got, ("logprobs", "values", "multipliers"), strict=True))
    count = len(scores)
    for x, shape, name in zip(
        parts, (tuple(scores.shape), (count,), (count,)), ("logprobs", "values", "multipliers"), strict=True
    ):
        expect_shape(x, shape, name)
        require(bool(torch.isfinite(x).all()), f"{name}: got {show(x)}, which is not finite")
    return parts[0], parts[1], parts[2]


ko = Question(
    id="kl_optimum",
    title="the optimum of the KL-penalised objective",
    chapter=6,
    kind="function",
    theory=False,
    variable="kl_optimum",
    reference=kl_optimum,
    reference_source=source(kl_optimum),
    hints=(
        "Maximise over the N probabilities of one prompt, which must sum to 1. What does each derivative say?",
        "r - beta (log(pi/ref) + 1) - lambda = 0 gives pi = ref exp(r/beta - 1 - lambda/beta). The sum over y must be 1, "
        "which fixes lambda. Do you keep it in the line that you solve for pi?",
        "log pi* = log(ref) + r/beta - log(Z), value beta log(Z), lambda = beta (log(Z) - 1); log Z by logsumexp.",
    ),
    explanation="The condition r(y) - beta (log(pi(y)/ref(y)) + 1) - lambda = 0 gives pi = ref exp(r/beta) "
    "exp(-1 - lambda/beta), and summing over y gives exp(1 + lambda/beta) = Z, so lambda = beta (log Z - 1). With pi* in J "
    "every response has r - beta log(pi*/ref) = beta log Z: that is the value. For ref = (.5, .3, .2), r = (1, 0, 2), beta = .5 one finds "
    "Z = 14.914, value 1.3512 and lambda 0.8512; without the multiplier the line sums to Z/e = 5.487. J is strictly "
    "concave in the probabilities, so this point is the maximum, and there is one lambda for each prompt.",
    probes=lambda f: (
        [
            [*unpack(f(ref, s, beta), 3, "probe")]
            for _, ref, s in (_world(2, 4, 31), _world(3, 3, 34))
            for beta in (0.5, 2.0)
        ]
        + [[_finite(x) for x in unpack(f(*world, 0.01), 3, "probe")] for world in (_far(), *_FARTHER)]
    ),
)


def _far() -> tuple[Tensor, Tensor]:
    return tensor([_REF, [0.2, 0.2, 0.6]]).log(), tensor([_R, [3.0, -1.0, 2.5]])


@ko.case("a distribution for each prompt, at which all derivatives are 0", 2, "r - beta (log(pi/ref) + 1) - lambda")
def _(f: Any) -> None:
    for beta in (0.5, 1.7):
        _, ref, scores = _world(3, 4, 37)
        logprobs, _, multipliers = _optimum(f, ref, scores, beta)
        total = logprobs.exp().sum(-1)
        expect_close(total, torch.ones(3), f"sums of exp(logprobs) over the responses, beta {beta:g}")
        slope = scores - beta * (logprobs - ref + 1) - multipliers[:, None]
        expect_close(slope, torch.zeros(3, 4), f"r - beta (log(pi/ref) + 1) - lambda, beta {beta:g}", atol=1e-4)


@ko.case(
    "the value is J at the optimum, and no other policy has more", 1, "put pi* into J: what is r - beta log(pi*/ref)?"
)
def _(f: Any) -> None:
    _, ref, scores = _world(3, 4, 41)
    logprobs, values, _ = _optimum(f, ref, scores, 0.6)
    expect_close(logprobs.exp().sum(-1), torch.ones(3), "sums of exp(logprobs) over the responses")
    for b in range(3):
        row = slice(b, b + 1)
        j = _mean_objective(logprobs[row], ref[row], scores[row], 0.6)
        require(
            torch.isclose(values[b], j, rtol=1e-4, atol=1e-5),
            f"prompt {b}: your logprobs give J = {j:.6g}, your value is {values[b]:.6g}: they must agree",
        )
        for seed in range(20):
            near = logprobs[row] + 0.3 * normal(1, 4, seed=seed)
            other = _mean_objective(near, ref[row], scores[row], 0.6).item()
            require(
                other < values[b] + 1e-5,
                f"prompt {b}: another policy has J = {other:.5f}, your value is {values[b]:.5f}",
            )


@ko.case("ref = (.5, .3, .2), r = (1, 0, 2), beta = .5: value and multiplier", 1, "value and multiplier differ by beta")
def _(f: Any) -> None:
    _, values, multipliers = _optimum(f, tensor([_REF]).log(), tensor([_R]), 0.5)
    z = 0.5 * math.exp(2) + 0.3 + 0.2 * math.exp(4)
    expect_close(values, tensor([0.5 * math.log(z)]), "value")
    expect_close(multipliers, tensor([0.5 * math.log(z) - 0.5]), "multiplier")


@ko.case("finite at beta = 0.01, where exp(r/beta) overflows", 1, "what does torch offer for log sum exp?")
def _(f: Any) -> None:
    for ref, scores in (_far(), *_FARTHER):
        logprobs, values, multipliers = _optimum(f, ref, scores, 0.01)
        best = scores.double().max(-1, keepdim=True).values
        inside = ref.double().exp() * ((scores - best) / 0.01).exp()
        log_z = inside.sum(-1, keepdim=True).log()
        where = f"at beta 0.01, scores {show(scores)}"
        expect_close(values, (best + 0.01 * log_z)[:, 0], f"values {where}")
        expect_close(multipliers, (best + 0.01 * log_z)[:, 0] - 0.01, f"multipliers {where}")
        expect_close(logprobs, ref + (scores - best) / 0.01 - log_z, f"logprobs {where}", rtol=1e-3, atol=1e-3)


def _optimum_with(
    *,
    policy: Callable[..., Tensor] | None = None,
    value: Callable[..., Tensor] | None = None,
    multiplier: Callable[..., Tensor] | None = None,
) -> Callable[..., Any]:
    """The reference with one of its three results exchanged; each gets log ref, r, beta, log pi*, log Z."""

    def f(ref_logprobs: Tensor, scores: Tensor, beta: float) -> Any:
        log_z = (ref_logprobs + scores / beta).logsumexp(-1)
        known = (ref_logprobs, scores, beta, ref_logprobs + scores / beta - log_z[:, None], log_z)
        out = list(kl_optimum(ref_logprobs, scores, beta))
        for place, other in enumerate((policy, value, multiplier)):
            if other is not None:
                out[place] = other(*known)
        return tuple(out)

    return f


def _naive(ref_logprobs: Tensor, scores: Tensor, beta: float) -> Any:
    weights = ref_logprobs.exp() * (scores / beta).exp()
    z = weights.sum(-1)
    return (weights / z[:, None]).log(), beta * z.log(), beta * (z.log() - 1)


def _shifted_alike(ref_logprobs: Tensor, scores: Tensor, beta: float) -> Any:
    most = scores.max()
    values = most + beta * (ref_logprobs.exp() * ((scores - most) / beta).exp()).sum(-1).log()
    return ref_logprobs + (scores - values[:, None]) / beta, values, values - beta


def _in_float64(rule: Callable[..., Any]) -> Callable[..., Any]:
    """The same with all tensors in float64; the last argument is beta."""
    return lambda *args: rule(*(x.double() for x in args[:-1]), args[-1])


def _joint(ref_logprobs: Tensor, scores: Tensor, beta: float) -> Any:
    exponents = ref_logprobs + scores / beta
    log_z = exponents.logsumexp(-1).logsumexp(0) - math.log(len(scores))
    everywhere = log_z.expand(len(scores))
    return exponents - log_z, beta * everywhere, beta * (everywhere - 1)


ko.plant(
    (
        "multiplier-lost",
        "the multiplier has disappeared from the line for pi: ref exp(r/beta - 1) sums to Z/e, not to 1",
        _optimum_with(policy=lambda ref, r, b, best, log_z: ref + r / b - 1),
        "W-RLHF-6",
    ),
    (
        "no-z",
        "the policy is not normalised: Z is missing",
        _optimum_with(policy=lambda ref, r, b, best, log_z: ref + r / b),
        "W-RLHF-6",
    ),
    (
        "product-to-equals",
        "exp(r/beta) and exp(-1 - lambda/beta) are multiplied; you kept the second factor only, and the scores are gone",
        _optimum_with(policy=lambda ref, r, b, best, log_z: ref - log_z[:, None]),
        "common",
    ),
    (
        "one-multiplier",
        "one Z for all prompts: every prompt's probabilities must sum to 1, so each has its own multiplier",
        _joint,
        "W-RLHF-5",
    ),
    (
        "exponent-beta",
        "the exponent is r/beta, not beta r: a small beta lets the policy go far",
        lambda ref, r, b: kl_optimum(ref, r * b * b, b),
        "common",
    ),
    (
        "sign",
        "the sign of the exponent: good responses become likelier",
        lambda ref, r, b: kl_optimum(ref, -r, b),
        "common",
    ),
    (
        "no-reference",
        "the reference is missing: the policy is ref exp(r/beta) / Z",
        lambda ref, r, b: kl_optimum(0 * ref, r, b),
        "common",
    ),
    (
        "probabilities",
        "the policy is asked for as log-probabilities",
        _optimum_with(policy=lambda ref, r, b, best, log_z: best.exp()),
        "common",
    ),
    ("overflow", "exp(r/beta) overflows for a small beta: use logsumexp", _naive, "common"),
    (
        "log-of-softmax",
        "a very small probability is rounded to 0, and its log is -inf: log_softmax avoids that",
        _optimum_with(policy=lambda ref, r, b, best, log_z: (ref + r / b).softmax(-1).log()),
        "common",
    ),
    (
        "log-of-quotient",
        "the policy's exp(r/beta) overflows for a small beta: take its logarithm by hand",
        _optimum_with(policy=lambda ref, r, b, best, log_z: _naive(ref, r, b)[0]),
        "common",
    ),
    (
        "value-best-score",
        "the value is not the best score: the penalty is paid at the optimum too",
        _optimum_with(value=lambda ref, r, b, best, log_z: r.max(-1).values),
        "common",
    ),
    (
        "value-expected-score",
        "this is the expected score at the optimum; J also contains the penalty",
        _optimum_with(value=lambda ref, r, b, best, log_z: (best.exp() * r).sum(-1)),
        "common",
    ),
    (
        "value-log-z",
        "the value is beta log Z, in units of the reward; beta is missing",
        _optimum_with(value=lambda ref, r, b, best, log_z: log_z),
        "common",
    ),
    (
        "value-z",
        "the value contains log Z, not Z",
        _optimum_with(value=lambda ref, r, b, best, log_z: b * log_z.exp()),
        "W-RLHF-8",
    ),
    (
        "multiplier-z",
        "the multiplier is not Z: exp(1 + lambda/beta) is",
        _optimum_with(multiplier=lambda ref, r, b, best, log_z: log_z.exp()),
        "W-RLHF-6",
    ),
    (
        "multiplier-value",
        "the multiplier is the value less beta: the derivative of pi log pi is log pi + 1",
        _optimum_with(multiplier=lambda ref, r, b, best, log_z: b * log_z),
        "common",
    ),
    (
        "multiplier-no-beta",
        "lambda/beta + 1 = log Z: beta is missing in front of the bracket",
        _optimum_with(multiplier=lambda ref, r, b, best, log_z: log_z - 1),
        "common",
    ),
    (
        "multiplier-sign",
        "the sign of the multiplier: the Lagrangian is J - lambda (sum pi - 1)",
        _optimum_with(multiplier=lambda ref, r, b, best, log_z: b * (1 - log_z)),
        "common",
    ),
    (
        "multiplier-minus-1",
        "lambda/beta + 1 = log Z: the 1 is multiplied by beta too, lambda = beta log Z - beta",
        _optimum_with(multiplier=lambda ref, r, b, best, log_z: b * log_z - 1),
        "common",
    ),
    (
        "multiplier-plus-beta",
        "lambda/beta + 1 = log Z: the 1 goes to the other side with a minus",
        _optimum_with(multiplier=lambda ref, r, b, best, log_z: b * (log_z + 1)),
        "common",
    ),
    (
        "multiplier-set-to-0",
        "you set the multiplier to 0: then ref exp(r/beta - 1) sums to Z/e, and the constraint is not met",
        _optimum_with(
            policy=lambda ref, r, b, best, log_z: ref + r / b - 1,
            multiplier=lambda ref, r, b, best, log_z: 0 * log_z,
        ),
        "W-RLHF-6",
    ),
    (
        "overflow-float64",
        "exp(r/beta) overflows in float64 too, at scores of 11 and beta = 0.01: use logsumexp",
        _in_float64(_naive),
        "common",
    ),
    (
        "shifted-by-one-score",
        "you shifted by the largest score of all prompts: every prompt needs its own, or its sum becomes 0",
        _shifted_alike,
        "common",
    ),
    (
        "shifted-by-one-score-float64",
        "the shift is the largest score of all prompts: where scores are much lower the sum becomes 0 in float64, too",
        _in_float64(_shifted_alike),
        "common",
    ),
    (
        "scores-clamped",
        "you clamped the scores: any number may be a score",
        lambda ref, r, b: kl_optimum(ref, r.clamp(-10, 10), b),
        "common",
    ),
    (
        "swapped",
        "value and multiplier are exchanged",
        lambda ref, r, b: tuple(kl_optimum(ref, r, b)[i] for i in (0, 2, 1)),
        "common",
    ),
)


def _optimum_by_shift(ref_logprobs: Tensor, scores: Tensor, beta: float) -> Any:
    logprobs = (ref_logprobs + scores / beta).double().log_softmax(-1)
    values = (scores - beta * (logprobs - ref_logprobs)).mean(-1)
    return logprobs, values, values - beta


def _optimum_by_numpy(ref_logprobs: Tensor, scores: Tensor, beta: float) -> Any:
    q, r = ref_logprobs.double().numpy(), scores.double().numpy()
    log_z = np.logaddexp.reduce(q + r / beta, axis=1)
    return [q + r / beta - log_z[:, None], beta * log_z, beta * log_z - beta]


def _optimum_by_row_shift(ref_logprobs: Tensor, scores: Tensor, beta: float) -> Any:
    most = scores.max(1, keepdim=True).values
    z = (ref_logprobs.exp() * ((scores - most) / beta).exp()).sum(1)
    values = most[:, 0] + beta * z.log()
    return ref_logprobs + scores / beta - (values / beta)[:, None], values, values - beta


def _optimum_by_multiplier(ref_logprobs: Tensor, scores: Tensor, beta: float) -> Any:
    multipliers = beta * (ref_logprobs + scores / beta - 1).logsumexp(-1)
    logprobs = ref_logprobs + (scores - multipliers[:, None]) / beta - 1
    return logprobs, multipliers + beta, multipliers


ko.right("shifted by the row's largest score, float32", _optimum_by_row_shift)
ko.right("the multiplier first, float32", _optimum_by_multiplier)
ko.right("log_softmax, and r - beta log(pi*/ref) as the value", _optimum_by_shift)
ko.right("numpy logaddexp", _optimum_by_numpy)


# -- one multiplier for all prompts ----------------------------------------------------------------------


def totals(ref, scores, beta):  # type: ignore[no-untyped-def]
    """Sum over y of pi(y | x) if one multiplier serves all prompts, equally likely. (P, N), (P, N), number -> (P,)."""
    z = (ref * (scores / beta).exp()).sum(-1)
    return z / z.mean()


om = Question(
    id="one_multiplier",
    title="one multiplier for all prompts",
    chapter=6,
    kind="symbolic",
    theory=True,
    variable="totals",
    reference=totals,
    reference_source=source(totals),
    hints=(
        "Which numbers does the single constraint fix: the total of every prompt, or their average?",
        "With one lambda all prompts share one factor c: pi(y | x) = c ref(y | x) exp(r(x, y)/beta). Sum over y, then "
        "choose c so that the mean over x is 1.",
        "Z / mean(Z), with Z(x) = sum_y ref(y | x) exp(r(x, y)/beta).",
    ),
    explanation="One constraint on the integral over x and y fixes one number: the average over prompts of sum_y "
    "pi(y | x). With the common factor c the totals are c Z(x), and mean c Z = 1 gives Z(x) / mean Z. For two prompts "
    "with Z = 1.859 and 10.543 that is 0.300 and 1.700: no distributions. Only if all prompts happen to have the same Z "
    "are the totals 1. Each prompt needs a multiplier of its own, lambda(x) = beta (log Z(x) - 1).",
    probes=lambda f: [
        f(tensor([[0.5, 0.5], [0.5, 0.5]]), tensor([[1.0, 0.0], [3.0, 0.0]]), 1.0),
        f(_world(3, 4, 51)[1].exp(), _world(3, 4, 51)[2], 0.5),
        f(tensor([[0.5, 0.5], [0.5, 0.5]]), tensor([[12.0, 0.0], [13.0, 0.0]]), 1.0),
    ],
)


@om.case("scores (1, 0) and (3, 0), a uniform reference, beta = 1", 1, "compute both Z, and their mean")
def _(f: Any) -> None:
    got = as_tensor(f(torch.full((2, 2), 0.5), tensor([[1.0, 0.0], [3.0, 0.0]]), 1.0), "totals")
    z = [(math.exp(x) + 1) / 2 for x in (1, 3)]
    expect_close(got, tensor([2 * x / sum(z) for x in z]), "totals", rtol=2e-3)


@om.case("their mean is 1, and they are 1 only if all Z are equal", 1, "the constraint is one number for all prompts")
def _(f: Any) -> None:
    _, ref, scores = _world(4, 3, 54)
    got = as_tensor(f(ref.exp(), scores, 0.7), "totals")
    expect_shape(got, (4,), "totals")
    expect_close(got.mean(), 1.0, "mean of the totals", rtol=2e-3)
    require(got.max() > got.min() + 0.1, f"prompts with different Z got the totals {show(got)}")
    level = scores - 0.7 * (ref + scores / 0.7).logsumexp(-1, keepdim=True)
    expect_close(f(ref.exp(), level, 0.7), torch.ones(4), "totals of prompts with Z = 1", rtol=2e-3)


@om.case("a prompt whose scores rise by beta log 3 gets three times the share", 1, "how does Z change?")
def _(f: Any) -> None:
    for beta, level in ((0.5, 0.0), (2.0, 0.0), (0.5, 6.0)):
        _, ref, scores = _world(3, 4, 57)
        scores = scores + level
        raised = scores + tensor([beta * math.log(3), 0.0, 0.0])[:, None]
        plain, moved = (as_tensor(f(ref.exp(), s, beta), "totals") for s in (scores, raised))
        expect_shape(plain, (3,), "totals")
        require(plain.min() > 1e-3, f"totals: got {show(plain)}, expected positive numbers")
        ratios = (moved / moved[2]) / (plain / plain[2])
        expect_close(ratios, tensor([3.0, 1.0, 1.0]), f"growth relative to the last prompt, beta {beta:g}", rtol=5e-3)
        expect_close(moved.mean(), 1.0, "mean of the totals", rtol=2e-3)


def _z(ref: Tensor, scores: Tensor, beta: float) -> Tensor:
    return (ref * (scores / beta).exp()).sum(-1)


om.plant(
    (
        "ones",
        "a single multiplier fixes the average over prompts only, not the total of every prompt",
        lambda ref, s, b: torch.ones(len(s)),
        "W-RLHF-5",
    ),
    (
        "sum-over-prompts",
        "the totals must be 1 on average over prompts; yours sum to 1",
        lambda ref, s, b: _z(ref, s, b) / _z(ref, s, b).sum(),
        "common",
    ),
    (
        "unnormalised",
        "these are the Z of the prompts: the multiplier divides them all by one number",
        _z,
        "W-RLHF-6",
    ),
    (
        "multiplier-lost",
        "Z/e is what remains if the multiplier is lost; the constraint on the average is not met",
        lambda ref, s, b: _z(ref, s, b) / math.e,
        "W-RLHF-6",
    ),
    (
        "log-z",
        "you used log Z for Z: totals are sums of ref exp(r/beta)",
        lambda ref, s, b: _z(ref, s, b).log() / _z(ref, s, b).log().mean(),
        "W-RLHF-8",
    ),
    (
        "inverse",
        "turned round: the prompt with the larger Z gets the larger total",
        lambda ref, s, b: _z(ref, s, b).mean() / _z(ref, s, b),
        "common",
    ),
    (
        "geometric-mean",
        "you divided by the geometric mean of the Z: then the totals are not 1 on average",
        lambda ref, s, b: _z(ref, s, b) / _z(ref, s, b).log().mean().exp(),
        "common",
    ),
    (
        "exponent-beta",
        "the exponent is r/beta, not beta r",
        lambda ref, s, b: totals(ref, s * b * b, b),
        "common",
    ),
    ("no-beta", "beta is missing in the exponent", lambda ref, s, b: totals(ref, s, 1.0), "common"),
    (
        "no-reference",
        "the reference is missing in Z",
        lambda ref, s, b: totals(torch.ones_like(ref), s, b),
        "common",
    ),
    (
        "one-reference",
        "Z weighs with the reference of each prompt; you took its average over prompts",
        lambda ref, s, b: totals(ref.mean(0).expand_as(ref), s, b),
        "common",
    ),
    (
        "mean-scores",
        "the exponential of the mean score is not the mean of the exponentials",
        lambda ref, s, b: ((ref * s).sum(-1) / b).exp() / ((ref * s).sum(-1) / b).exp().mean(),
        "common",
    ),
)
om.wrong(
    "two-prompts",
    "you took P for 2: there may be more prompts",
    lambda ref, s, b: 2 * _z(ref, s, b) / _z(ref, s, b).sum(),
)
om.wrong(
    "exponent-clamped",
    "you clamped r/beta: a larger exponent counts in full",
    lambda ref, s, b: totals(ref, (s / b).clamp(max=10), 1.0),
)
om.right("softmax of log Z, times P", lambda ref, s, b: len(s) * (ref.log() + s / b).logsumexp(-1).softmax(0))


def _totals_by_numpy(ref: Tensor, scores: Tensor, beta: float) -> Any:
    weights = ref.double().numpy() * np.exp(scores.double().numpy() / beta)
    return (weights * len(weights) / weights.sum()).sum(1)


om.right("the joint distribution times P, summed, numpy", _totals_by_numpy)
om.right("three decimals", lambda ref, s, b: [round(x, 4) for x in totals(ref, s, b).tolist()])


# -- the reward that a policy is optimal for -------------------------------------------------------------


def reward_back(pi, ref, beta, Z):  # type: ignore[no-untyped-def]
    """The reward for which pi = ref exp(r/beta) / Z is optimal. (N,), (N,), number, number -> (N,)."""
    return beta * (pi / ref).log() + beta * math.log(Z)


rb = Question(
    id="reward_back",
    title="the reward back from the optimal policy",
    chapter=6,
    kind="symbolic",
    theory=True,
    variable="reward_back",
    reference=reward_back,
    reference_source=source(reward_back),
    hints=(
        "Take the logarithm of both sides of pi = ref exp(r/beta) / Z.",
        "log(pi/ref) = r/beta - log Z. Which factor does each term get when you solve for r?",
        "beta log(pi/ref) + beta log(Z).",
    ),
    explanation="log pi = log ref + r/beta - log Z, so r = beta log(pi/ref) + beta log Z: beta once in front of each. Z is "
    "the sum of ref exp(r/beta), log Z is its logarithm. A wrong constant in place of beta log Z shifts all rewards of a "
    "prompt alike: differences between two responses to that prompt survive, so a loss that contains only such differences "
    "does not notice the mistake. With r = (1, 0, 2), beta = .5 and log Z multiplied by beta twice the rewards come "
    "back as (.324, -.676, 1.324).",
    probes=lambda f: [
        f(tensor([0.6, 0.4]), tensor([0.5, 0.5]), 0.5, 3.0),
        f(tensor(_PI), tensor(_SFT), 2.0, 0.4),
        f(tensor([0.75, 0.25]), tensor([0.5, 0.5]), 10.0, 3.5),
    ],
)


def _give_back(f: Any, r: Tensor, ref: Tensor, beta: float, what: str) -> Tensor:
    z = (ref.double() * (r.double() / beta).exp()).sum().item()
    pi = (ref * (r / beta).exp() / z).float()
    got = as_tensor(f(pi, ref, beta, z), "rewards")
    expect_close(got, r, what, rtol=1e-3, atol=1e-3)
    return got


@rb.case("differences between responses come back", 1, "what is log(pi/ref) of two responses, subtracted?")
def _(f: Any) -> None:
    for beta in (0.4, 1.0, 2.0):
        r, ref = normal(4, seed=61), normal(4, seed=62).softmax(0)
        pi = (ref.log() + r / beta).softmax(0)
        z = (ref * (r / beta).exp()).sum().item()
        got = as_tensor(f(pi, ref, beta, z), "rewards")
        expect_shape(got, (4,), "rewards")
        expect_close(got - got[0], r - r[0], f"rewards less the first one, beta {beta:g}", rtol=1e-3, atol=1e-3)


@rb.case("ref = (.5, .5), r = (1, 0): the rewards themselves", 1, "Z = 1.859, log Z = 0.620")
def _(f: Any) -> None:
    _give_back(f, tensor([1.0, 0.0]), tensor([0.5, 0.5]), 1.0, "rewards for beta = 1")
    _give_back(f, tensor(_R), tensor(_REF), 0.5, "rewards for ref (.5, .3, .2), r (1, 0, 2), beta .5")


@rb.case("for three betas, and rewards shifted up and down", 2, "a shift of the rewards is in Z, and comes back")
def _(f: Any) -> None:
    for beta in (0.25, 1.0, 3.0):
        for shift in (-2.0, 0.0, 1.5):
            r, ref = normal(3, seed=63) + shift, normal(3, seed=64).softmax(0)
            _give_back(f, r, ref, beta, f"rewards for beta {beta:g}, shifted by {shift:g}")
    _give_back(f, tensor([12.0, -12.0]), tensor([0.5, 0.5]), 5.0, "rewards for r (12, -12), beta 5")


rb.plant(
    (
        "beta-squared",
        "log Z was multiplied by beta twice: log(pi/ref) + log Z = r/beta, without a beta in front of log Z",
        lambda pi, ref, b, z: b * (pi / ref).log() + b * b * math.log(z),
        "W-RLHF-7",
    ),
    (
        "beta-log-z-before-beta",
        "log Z kept its beta but log(pi/ref) lost it: beta stands in front of both",
        lambda pi, ref, b, z: (pi / ref).log() + b * math.log(z),
        "common",
    ),
    (
        "log-z-without-beta",
        "log Z must be multiplied by beta as well",
        lambda pi, ref, b, z: b * (pi / ref).log() + math.log(z),
        "common",
    ),
    (
        "z-as-log-z",
        "Z is not log Z: the rewards are off by a constant, which their differences do not show",
        lambda pi, ref, b, z: b * (pi / ref).log() + b * z,
        "W-RLHF-8",
    ),
    (
        "no-z",
        "beta log Z is missing: harmless in a difference, wrong for the reward itself",
        lambda pi, ref, b, z: b * (pi / ref).log(),
        "common",
    ),
    ("minus-z", "the sign of log Z", lambda pi, ref, b, z: b * (pi / ref).log() - b * math.log(z), "common"),
    (
        "inverse",
        "policy over reference, not the other way round",
        lambda pi, ref, b, z: b * (ref / pi).log() + b * math.log(z),
        "common",
    ),
    (
        "divided-by-beta",
        "you divided by beta; r/beta = log(pi/ref) + log Z is multiplied by it",
        lambda pi, ref, b, z: ((pi / ref).log() + math.log(z)) / b,
        "common",
    ),
    ("no-beta", "beta is missing: this is r/beta", lambda pi, ref, b, z: (pi / ref).log() + math.log(z), "common"),
    (
        "ratio",
        "the logarithm of the ratio is missing",
        lambda pi, ref, b, z: b * pi / ref + b * math.log(z),
        "common",
    ),
    (
        "no-reference",
        "the reference is missing: log(pi/ref), not log pi",
        lambda pi, ref, b, z: b * pi.log() + b * math.log(z),
        "common",
    ),
    (
        "multiplier",
        "this adds the multiplier beta (log Z - 1) in place of beta log Z",
        lambda pi, ref, b, z: b * (pi / ref).log() + b * (math.log(z) - 1),
        "common",
    ),
)
rb.wrong("sign", "the sign of the whole: this is minus the reward", lambda *world: -reward_back(*world))
rb.wrong("log2", "the logarithms are natural, not to base 2", lambda *world: reward_back(*world) / math.log(2))
rb.wrong(
    "clamped",
    "you clamped the result: a reward may be any number",
    lambda *world: reward_back(*world).clamp(-10, 10),
)
rb.right("numpy", lambda pi, ref, b, z: b * np.log(pi.numpy() * z / ref.numpy()))
rb.right("float64, log of the product", lambda pi, ref, b, z: b * (pi.double() * z / ref).log())


# -- where a derivative is 0 -----------------------------------------------------------------------------


def zero_derivatives(ref, scores, beta):  # type: ignore[no-untyped-def]
    """(weights with all partial derivatives 0, a policy with logit slope 0 below the optimum). two (N,) -> two (N,)."""
    weights = ref * torch.exp(scores / beta - 1)
    policy = torch.zeros_like(ref)
    policy[0] = 1.0
    return weights, policy


_WORLDS = (
    (_REF, _R, 0.5),
    ([0.25, 0.25, 0.5], [1.0, 1.5, 0.5], 1.0),
    ([0.1, 0.2, 0.3, 0.4], [0.0, 1.0, -1.0, 0.5], 0.8),
    ([0.7, 0.3], [0.2, -0.4], 2.0),
)
_STEEP = ([0.5, 0.5], [5.0, 0.0], 0.5)  # for the weights only: here the best response alone is nearly the optimum


def _two(f: Any, ref: list[float], scores: list[float], beta: float) -> tuple[Tensor, Tensor]:
    weights, policy = unpack(f(tensor(ref), tensor(scores), beta), 2, "your answer (weights, policy)")
    weights, policy = as_tensor(weights, "weights"), as_tensor(policy, "policy")
    expect_shape(weights, (len(ref),), "weights")
    expect_shape(policy, (len(ref),), "policy")
    return weights, policy


def _expect_stationary(policy: Tensor, ref: list[float], scores: list[float], beta: float, what: str) -> float:
    """Fail unless the policy is a distribution whose gradient in the logits is 0; returns its J, with 0 log 0 = 0."""
    require(bool((policy >= 0).all()), f"policy, {what}: got {show(policy)}, which has a negative entry")
    expect_close(policy.sum(), 1.0, f"sum of the policy, {what}")
    inside = torch.where(policy > 0, policy, 1.0)
    w = tensor(scores).double() - beta * torch.where(policy > 0, (inside / tensor(ref)).log(), 0.0)
    j = (policy * w).sum()
    expect_close(
        policy * (w - j), torch.zeros(len(ref)), f"gradient of J in the logits at your policy, {what}", atol=1e-4
    )
    return j.item()


def _zero_probe(f: Any) -> list[Any]:
    out: list[Any] = []
    for ref, scores, beta in _WORLDS[:3]:
        weights, policy = _two(f, ref, scores, beta)
        best = (tensor(ref).log() + tensor(scores) / beta).logsumexp(0).item() * beta
        try:
            below = _expect_stationary(policy, ref, scores, beta, "probe") < best - 0.005
        except Fail:
            below = False
        out.append([weights, "stationary, below the optimum" if below else policy])
    return [*out, _two(f, *_STEEP)[0]]


zd = Question(
    id="zero_derivatives",
    title="where the derivative is 0, and no maximum is",
    chapter=6,
    kind="counterexample",
    theory=True,
    variable="zero_derivatives",
    reference=zero_derivatives,
    reference_source=source(zero_derivatives),
    hints=(
        "Differentiate J in one probability, as if it were free. Then ask the same of a logit: what if a response has "
        "probability 0?",
        "For free numbers w the derivative is r - beta (log(w/ref) + 1): solve it for w and add up. In the logits, the "
        "entries are pi (a - E[a]) with a = r - beta log(pi/ref): what makes them 0 besides a = E[a]?",
        "weights = ref exp(r/beta - 1), which sum to Z/e; policy: probability 1 on any one response.",
    ),
    explanation="Taken as free numbers, the probabilities have derivatives r - beta (log(w/ref) + 1), which vanish at "
    "w = ref exp(r/beta - 1). These sum to Z/e: the point does not lie on the simplex, and a multiplier is needed. In the "
    "logits the constraint is built in, but the gradient pi (a - E[a]), with a = r - beta log(pi/ref), vanishes as soon as every response has "
    "either probability 0 or the same a: a policy that always gives one answer is such a point, and so is the best policy "
    "on any part of the responses. Its J is lower than the optimum by -beta log of the mass that pi* gives to that part. A derivative of 0 is a "
    "candidate; strict concavity inside the simplex makes pi*, where all probabilities are positive, the maximum.",
    probes=_zero_probe,
)


@zd.case("at the weights, every partial derivative of J is 0", 1, "no constraint here: N free positive numbers")
def _(f: Any) -> None:
    for ref, scores, beta in (*_WORLDS, _STEEP):
        weights, _ = _two(f, ref, scores, beta)
        require(bool((weights > 0).all()), f"weights: got {show(weights)}, expected positive numbers")
        w = weights.clone().requires_grad_()
        j = (w * tensor(scores)).sum() - beta * (w * (w / tensor(ref)).log()).sum()
        (slope,) = torch.autograd.grad(j, w)
        expect_close(slope, torch.zeros(len(ref)), f"partial derivatives of J, beta {beta:g}", atol=1e-3)


@zd.case("the policy is a distribution, and its gradient in the logits is 0", 1, "pi (a - E[a]): two ways to be 0")
def _(f: Any) -> None:
    for ref, scores, beta in _WORLDS:
        _, policy = _two(f, ref, scores, beta)
        _expect_stationary(policy, ref, scores, beta, f"beta {beta:g}")


@zd.case("yet its J is below the maximum", 1, "a second point at which the gradient is 0")
def _(f: Any) -> None:
    for ref, scores, beta in _WORLDS:
        _, policy = _two(f, ref, scores, beta)
        j = _expect_stationary(policy, ref, scores, beta, f"beta {beta:g}")
        best = beta * (tensor(ref).double().log() + tensor(scores) / beta).logsumexp(0).item()
        require(j < best - 0.005, f"J of your policy is {j:.4f}, the maximum is {best:.4f}, beta {beta:g}")


def _zeros(weights: Any = None, policy: Any = None) -> Callable[..., Any]:
    def f(ref: Tensor, scores: Tensor, beta: float) -> Any:
        right = zero_derivatives(ref, scores, beta)
        known = (ref, scores, beta)
        return weights(*known) if weights else right[0], policy(*known) if policy else right[1]

    return f


def _star(ref: Tensor, scores: Tensor, beta: float) -> Tensor:
    return (ref.log() + scores / beta).softmax(0)


zd.plant(
    (
        "derivative-0-is-the-maximum",
        "this policy is the maximum; a derivative of 0 does not imply it: look at the edge of the simplex",
        _zeros(policy=_star),
        "W-RLHF-10",
    ),
    (
        "weights-as-policy",
        "the weights sum to Z/e, not to 1: where the free derivatives are 0 there is no distribution",
        _zeros(policy=lambda ref, r, b: ref * (r / b - 1).exp()),
        "W-RLHF-10",
    ),
    (
        "optimum-twice",
        "pi* is where the derivatives equal the multiplier, not 0; and as a policy it is the maximum",
        _zeros(_star, _star),
        "W-RLHF-10",
    ),
    (
        "optimum-as-weights",
        "at pi* the free derivatives equal the multiplier lambda, not 0",
        _zeros(_star),
        "W-RLHF-6",
    ),
    (
        "one-forgotten",
        "the derivative of w log w is log w + 1: the -1 in the exponent is missing",
        _zeros(lambda ref, r, b: ref * (r / b).exp()),
        "common",
    ),
    (
        "exponent-beta",
        "the exponent is r/beta - 1, not beta r - 1",
        _zeros(lambda ref, r, b: ref * (b * r - 1).exp()),
        "common",
    ),
    (
        "minus-beta",
        "the derivative is r - beta (log(w/ref) + 1): divide by beta before the exponential, so that -1 remains",
        _zeros(lambda ref, r, b: ref * (r / b - b).exp()),
        "common",
    ),
    (
        "no-reference",
        "the reference is missing in the weights",
        _zeros(lambda ref, r, b: (r / b - 1).exp()),
        "common",
    ),
    (
        "reference-as-policy",
        "at the reference only the penalty has slope 0, the score still pulls",
        _zeros(policy=lambda ref, r, b: ref.clone()),
        "common",
    ),
    (
        "uniform-as-policy",
        "at the uniform policy the gradient is not 0",
        _zeros(policy=lambda ref, r, b: torch.full_like(ref, 1 / len(ref))),
        "common",
    ),
    (
        "nothing-at-all",
        "all zeros are no distribution",
        _zeros(policy=lambda ref, r, b: torch.zeros_like(ref)),
        "common",
    ),
    (
        "two-responses-alike",
        "on two responses the policy must be the best one there: with equal probabilities a gradient is left",
        _zeros(policy=lambda ref, r, b: torch.cat([torch.full_like(ref[:2], 0.5), torch.zeros_like(ref[2:])])),
        "common",
    ),
)


zd.wrong(
    "exponent-clamped",
    "you clamped the exponent: the weights may be large",
    _zeros(lambda ref, r, b: ref * (r / b - 1).clamp(max=5).exp()),
)


def _best_response(ref: Tensor, scores: Tensor, beta: float) -> Any:
    q, r = ref.double().numpy(), scores.numpy()
    return q * np.exp(r / beta - 1), np.eye(len(r))[r.argmax()]


def _all_but_the_likeliest(ref: Tensor, scores: Tensor, beta: float) -> Any:
    exponents = ref.double().log() + scores / beta
    without = exponents.index_fill(0, exponents.argmax(), -torch.inf)
    return (exponents - 1).exp(), without.softmax(0)


zd.right("all mass on the best response, numpy", _best_response)
zd.right("the optimum of all responses but one", _all_but_the_likeliest)


# -- how far along the way -------------------------------------------------------------------------------


def fraction_of_optimum(logprobs, ref_logprobs, scores, beta):  # type: ignore[no-untyped-def]
    """(J - J(ref)) / (max J - J(ref)), each a mean over prompts. (P, N) three times, number -> number."""
    objective = (logprobs.exp() * (scores - beta * (logprobs - ref_logprobs))).sum(-1).mean()
    at_reference = (ref_logprobs.exp() * scores).sum(-1).mean()
    best = beta * (ref_logprobs + scores / beta).logsumexp(-1).mean()
    return (objective - at_reference) / (best - at_reference)


def _policies(seed: int, beta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """log pi, log ref, scores, log pi*: the prompts differ in how much there is to gain."""
    logits, ref, scores = _world(3, 4, seed)
    scores = scores * tensor([0.3, 1.0, 2.0])[:, None]
    return logits.log_softmax(-1), ref, scores, (ref + scores / beta).log_softmax(-1)


fo = Question(
    id="fraction_of_optimum",
    title="the fraction of the optimum that a policy has reached",
    chapter=6,
    kind="function",
    theory=False,
    variable="fraction_of_optimum",
    reference=fraction_of_optimum,
    reference_source=source(fraction_of_optimum),
    hints=(
        "Add 100 to every score. Which policies are better than others afterwards, and what does your number say?",
        "Measure from J of the reference, where training starts, to the largest J, beta log Z. Average over the prompts "
        "before dividing.",
        "(J - J_ref) / (beta log(Z) - J_ref), with J_ref = E_ref[r] and every J a mean over prompts.",
    ),
    explanation="J, its maximum beta log Z and J(ref) all rise by the same amount when the scores do, so differences of them are "
    "free of that shift and their quotient also of the scale; J / (beta log Z) is not, and comes as close to 1 as one "
    "likes if a constant is added to the scores. J(ref) is the expected score under the reference, since its KL is 0. "
    "Since J = beta log Z - beta KL(pi || pi*), the fraction is 1 - KL(pi || pi*) / KL(ref || pi*): 0 at the "
    "reference, 1 at the optimum, negative for a policy that is worse than the reference.",
    probes=lambda f: (
        [
            f(lp, ref, s, beta)
            for beta, seed in ((0.5, 71), (2.0, 74))
            for lp, ref, s in [_policies(seed, beta)[:3], (_policies(seed, beta)[3] * 0.9, *_policies(seed, beta)[1:3])]
        ]
        + [_finite(f((world[0] + world[1]).log_softmax(-1), *world, 0.01)) for world in (_far(), *_FARTHER)]
        + [f(*_rare(), 1.0)]
    ),
)


def _rare() -> tuple[Tensor, Tensor, Tensor]:
    """log pi, log ref, scores: the policy gives often what the reference gives hardly ever."""
    return tensor([[0.9, 0.1]]).log(), tensor([[0.001, 0.999]]).log(), tensor([[9.0, 0.0]])


def _fraction(f: Any, *world: Any) -> Tensor:
    got = as_tensor(f(*world), "fraction")
    expect_shape(got, (), "fraction")
    return got


@fo.case("0 at the reference, 1 at the optimum", 1, "the scale starts where training starts")
def _(f: Any) -> None:
    for beta in (0.5, 2.0):
        _, ref, scores, best = _policies(77, beta)
        expect_close(_fraction(f, ref, ref, scores, beta), 0.0, f"at pi = ref, beta {beta:g}", atol=1e-3)
        expect_close(_fraction(f, best, ref, scores, beta), 1.0, f"at the optimum, beta {beta:g}", rtol=1e-3)


def _expect_unmoved(after: Tensor, before: Tensor, what: str) -> None:
    require(
        torch.isclose(after, before, rtol=2e-3, atol=1e-5),
        f"{what}: your fraction was {before:.4g} before and is {after:.4g} after that",
    )


@fo.case("adding a number to all scores changes nothing", 1, "which of your terms move with the scores?")
def _(f: Any) -> None:
    lp, ref, scores, best = _policies(80, 0.5)
    half = (0.5 * best + 0.5 * lp).log_softmax(-1)
    plain = _fraction(f, half, ref, scores, 0.5)
    require(bool(torch.isfinite(plain)) and plain.abs() > 1e-3, f"fraction of a policy on the way: got {plain:.4g}")
    for shift in (tensor(5.0), tensor(-3.0), tensor([[1.0], [-2.0], [4.0]])):
        moved = _fraction(f, half, ref, scores + shift, 0.5)
        _expect_unmoved(moved, plain, f"{show(shift)} was added to the scores")


@fo.case("ten times the scores and ten times beta change nothing", 1, "a fraction has no unit")
def _(f: Any) -> None:
    lp, ref, scores, best = _policies(83, 0.5)
    half = (0.5 * best + 0.5 * lp).log_softmax(-1)
    plain = _fraction(f, half, ref, scores, 0.5)
    require(bool(torch.isfinite(plain)) and plain.abs() > 1e-3, f"fraction of a policy on the way: got {plain:.4g}")
    _expect_unmoved(_fraction(f, half, ref, 10 * scores, 5.0), plain, "scores and beta became ten times as large")


@fo.case("equals 1 - KL(pi || pi*) / KL(ref || pi*), also below 0", 2, "average over the prompts, then divide")
def _(f: Any) -> None:
    for seed, beta in ((86, 0.5), (89, 0.2), (92, 3.0)):
        lp, ref, scores, best = _policies(seed, beta)
        for policy in (lp, (0.3 * lp + 0.7 * best).log_softmax(-1), (2 * ref - best).log_softmax(-1)):
            gap, whole = (-_mean_objective(x, best, torch.zeros(3, 4), 1.0) for x in (policy, ref))
            got = _fraction(f, policy, ref, scores, beta)
            expect_close(got, 1 - gap / whole, f"fraction, beta {beta:g}", rtol=2e-3, atol=1e-3)
    logits, ref, scores = _world(4, 3, 95)
    lp = logits.log_softmax(-1)
    for what, world in (("four prompts", (lp, ref, scores)), ("pi = (.9, .1), ref = (.001, .999)", _rare())):
        best = (world[1] + world[2]).log_softmax(-1)
        gap, whole = (-_mean_objective(x, best, torch.zeros_like(best), 1.0) for x in world[:2])
        expect_close(_fraction(f, *world, 1.0), 1 - gap / whole, f"fraction, {what}", rtol=2e-3, atol=1e-3)


@fo.case("finite at beta = 0.01, where exp(r/beta) overflows", 1, "log Z by logsumexp")
def _(f: Any) -> None:
    for ref, scores in (_far(), *_FARTHER):
        half = (ref + scores).log_softmax(-1)
        best = (ref + scores / 0.01).double().log_softmax(-1)
        gap, whole = ((x.double().exp() * (x - best)).sum(-1).mean() for x in (half, ref))
        what = f"fraction at beta 0.01, scores {show(scores)}"
        expect_close(_fraction(f, half, ref, scores, 0.01), 1 - gap / whole, what, rtol=2e-3)


def _parts(lp: Tensor, ref: Tensor, s: Tensor, b: float) -> tuple[Tensor, Tensor, Tensor]:
    """J, J(ref), max J of every prompt."""
    j = (lp.exp() * (s - b * (lp - ref))).sum(-1)
    return j, (ref.exp() * s).sum(-1), b * (ref + s / b).logsumexp(-1)


def _quotient(
    change: Callable[[Tensor, Tensor, Tensor], Any] = lambda j, start, best: (j, start, best),
    **parts: Callable[[Tensor, Tensor, Tensor, float], Tensor],
) -> Callable[..., Any]:
    def f(lp: Tensor, ref: Tensor, s: Tensor, b: float) -> Any:
        known = dict(zip(("j", "start", "best"), _parts(lp, ref, s, b), strict=True))
        known |= {name: rule(lp, ref, s, b) for name, rule in parts.items()}
        j, start, best = (x.mean() for x in change(known["j"], known["start"], known["best"]))
        return (j - start) / (best - start)

    return f


def _per_prompt(lp: Tensor, ref: Tensor, s: Tensor, b: float) -> Tensor:
    j, start, best = _parts(lp, ref, s, b)
    return ((j - start) / (best - start)).mean()


def _no_reference(lp: Tensor, ref: Tensor, s: Tensor, b: float) -> Tensor:
    j, _, best = _parts(lp, ref, s, b)
    return j.mean() / best.mean()


def _start_once(above: bool) -> Callable[..., Tensor]:
    def f(lp: Tensor, ref: Tensor, s: Tensor, b: float) -> Tensor:
        j, start, best = (x.mean() for x in _parts(lp, ref, s, b))
        return (j - start) / best if above else j / (best - start)

    return f


fo.plant(
    (
        "j-over-the-maximum",
        "J / (beta log Z) changes when a number is added to all scores: measure both from J of the reference",
        _no_reference,
        "common",
    ),
    ("reference-above-only", "J(ref) is missing below the line", _start_once(True), "common"),
    (
        "reference-below-only",
        "J(ref) is missing above the line: at the reference the fraction is 0",
        _start_once(False),
        "common",
    ),
    (
        "mean-of-fractions",
        "you divided for each prompt; a prompt with little to gain then counts as much as the others",
        _per_prompt,
        "common",
    ),
    (
        "score-without-kl",
        "the penalty is missing in J: a policy may then go beyond 1",
        _quotient(j=lambda lp, ref, s, b: (lp.exp() * s).sum(-1)),
        "common",
    ),
    (
        "kl-without-beta",
        "beta is missing in front of the KL in J",
        _quotient(j=lambda lp, ref, s, b: (lp.exp() * (s - (lp - ref))).sum(-1)),
        "W-RLHF-9",
    ),
    (
        "kl-added",
        "the sign of the penalty in J",
        _quotient(j=lambda lp, ref, s, b: (lp.exp() * (s + b * (lp - ref))).sum(-1)),
        "W-RLHF-1",
    ),
    (
        "other-direction",
        "J has KL(pi || ref), not KL(ref || pi)",
        _quotient(j=lambda lp, ref, s, b: (lp.exp() * s + b * ref.exp() * (lp - ref)).sum(-1)),
        "common",
    ),
    (
        "best-score",
        "the largest J is not the best score, which costs too much KL",
        _quotient(best=lambda lp, ref, s, b: s.max(-1).values),
        "common",
    ),
    (
        "expected-score-of-the-optimum",
        "the largest J is beta log Z; the expected score at the optimum leaves out the penalty",
        _quotient(best=lambda lp, ref, s, b: ((ref + s / b).softmax(-1) * s).sum(-1)),
        "common",
    ),
    (
        "log-z-without-beta",
        "beta is missing in front of log Z",
        _quotient(best=lambda lp, ref, s, b: (ref + s / b).logsumexp(-1)),
        "common",
    ),
    (
        "z-for-log-z",
        "the largest J is beta log Z, not beta Z",
        _quotient(best=lambda lp, ref, s, b: b * (ref + s / b).logsumexp(-1).exp()),
        "W-RLHF-8",
    ),
    (
        "exponent-beta",
        "Z has the exponent r/beta, not beta r",
        _quotient(best=lambda lp, ref, s, b: b * (ref + s * b).logsumexp(-1)),
        "common",
    ),
    (
        "one-z-for-all",
        "every prompt has its own Z: you put all of them into one",
        _quotient(best=lambda lp, ref, s, b: b * ((ref + s / b).logsumexp(-1).logsumexp(0, True) - math.log(len(s)))),
        "W-RLHF-5",
    ),
    (
        "plain-mean-score",
        "J of the reference weighs the scores with the reference, not all alike",
        _quotient(start=lambda lp, ref, s, b: s.mean(-1)),
        "common",
    ),
    (
        "overflow",
        "exp(r/beta) overflows for a small beta: use logsumexp",
        _quotient(best=lambda lp, ref, s, b: b * (ref.exp() * (s / b).exp()).sum(-1).log()),
        "common",
    ),
    (
        "overflow-float64",
        "exp(r/beta) overflows in float64 too, at scores of 11 and beta = 0.01: use logsumexp",
        _in_float64(_quotient(best=lambda lp, ref, s, b: b * (ref.exp() * (s / b).exp()).sum(-1).log())),
        "common",
    ),
    (
        "shifted-by-one-score",
        "you shifted by the largest score of all prompts: every prompt needs its own, or its sum becomes 0",
        _quotient(best=lambda lp, ref, s, b: _shifted_alike(ref, s, b)[1]),
        "common",
    ),
    (
        "shifted-by-one-score-float64",
        "the shift is the largest score of all prompts: where scores are much lower the sum becomes 0 in float64, too",
        _in_float64(_quotient(best=lambda lp, ref, s, b: _shifted_alike(ref, s, b)[1])),
        "common",
    ),
    (
        "log-ratio-clamped",
        "you clamped the log-ratio in J: the penalty grows with it, however large it is",
        _quotient(j=lambda lp, ref, s, b: (lp.exp() * (s - b * (lp - ref).clamp(-5, 5))).sum(-1)),
        "common",
    ),
    (
        "scores-clamped",
        "you clamped the scores: any number may be a score",
        lambda lp, ref, s, b: fraction_of_optimum(lp, ref, s.clamp(-10, 10), b),
        "common",
    ),
    (
        "clamped",
        "you cut the number at 0: a policy worse than the reference has a negative fraction",
        lambda lp, ref, s, b: fraction_of_optimum(lp, ref, s, b).clamp(min=0.0),
        "common",
    ),
    (
        "gap",
        "this is what is missing, not what has been reached",
        lambda lp, ref, s, b: 1 - fraction_of_optimum(lp, ref, s, b),
        "common",
    ),
)


def _fraction_by_kl(logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, beta: float) -> float:
    best = (ref_logprobs + scores / beta).double().log_softmax(-1)
    gap, whole = ((x.double().exp() * (x - best)).sum() for x in (logprobs, ref_logprobs))
    return 1.0 - (gap / whole).item()


def _fraction_by_numpy(logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, beta: float) -> Any:
    lp, q, r = (x.double().numpy() for x in (logprobs, ref_logprobs, scores))
    start = (np.exp(q) * r).sum()
    gained = (np.exp(lp) * (r - beta * (lp - q))).sum() - start
    return gained / (beta * np.logaddexp.reduce(q + r / beta, axis=1).sum() - start)


def _fraction_by_row_shift(logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, beta: float) -> Tensor:
    most = scores.max(1, keepdim=True).values
    z = (ref_logprobs.exp() * ((scores - most) / beta).exp()).sum(1)
    best = (most[:, 0] + beta * z.log()).mean()
    now, start = ((x.exp() * (scores - beta * (x - ref_logprobs))).sum(1).mean() for x in (logprobs, ref_logprobs))
    return (now - start) / (best - start)


def _fraction_by_optimum(logprobs: Tensor, ref_logprobs: Tensor, scores: Tensor, beta: float) -> Tensor:
    optimum = (ref_logprobs + scores / beta).log_softmax(1)
    now, start, best = (
        (x.exp() * (scores - beta * (x - ref_logprobs))).sum(1).mean() for x in (logprobs, ref_logprobs, optimum)
    )
    return (now - start) / (best - start)


fo.right("shifted by the row's largest score, float32", _fraction_by_row_shift)
fo.right("J of the optimum in place of beta log Z, float32", _fraction_by_optimum)
fo.right("1 - KL(pi || pi*) / KL(ref || pi*), float64", _fraction_by_kl)
fo.right("sums over prompts, numpy", _fraction_by_numpy)


# -- what Z costs ----------------------------------------------------------------------------------------


def terms_of_z(vocab_size, length):  # type: ignore[no-untyped-def]
    """log10 of the number of responses of exactly `length` tokens, one term of Z each. Int, int -> number."""
    return length * math.log10(vocab_size)


tz = Question(
    id="terms_of_z",
    title="how many terms Z has",
    chapter=6,
    kind="symbolic",
    theory=True,
    variable="terms_of_z",
    reference=terms_of_z,
    reference_source=source(terms_of_z),
    hints=(
        "How many responses are there with one token? With two?",
        "Every token multiplies the number by the size of the vocabulary. The logarithm turns the product into a sum.",
        "length log10(vocab_size).",
    ),
    explanation="Every position has vocab_size possibilities, so there are vocab_size^length responses: 10^94 with 50,000 "
    "words and 20 tokens. Z can be written down but not added up: an algorithm has to do with "
    "samples from the policy, or with differences of rewards, in which log Z cancels. Where all responses can be "
    "listed, as in the exact worlds of this book, Z is a short sum.",
    probes=lambda f: [_term(f, v, n) for v, n in ((50_000, 20), (3, 4), (7, 2), (50_000, 400))],
)


def _term(f: Any, vocab_size: int, length: int) -> Tensor | str:
    """For probes: the answer, or "too large" if it is no float, or grows beyond them on the way."""
    try:
        got = _finite(f(vocab_size, length))
    except (Fail, OverflowError):
        return "too large"
    return "too large" if isinstance(got, str) else got


@tz.case("equals a count, for small vocabularies", 1, "list them: 2 words and 3 tokens make 8 responses")
def _(f: Any) -> None:
    for vocab_size, length in ((2, 3), (3, 4), (5, 2), (7, 1)):
        count = len(torch.cartesian_prod(*[torch.arange(vocab_size)] * length))
        got = as_tensor(f(vocab_size, length), "log10 of the number")
        expect_close(got, math.log10(count), f"{vocab_size} words, {length} tokens", rtol=2e-3)


@tz.case("50,000 words: 20 tokens, and 1,000 tokens", 1, "the number itself is larger than the largest float")
def _(f: Any) -> None:
    one = math.log(50_000) / math.log(10)
    for length in (20, 1000):
        got = as_tensor(f(50_000, length), "log10 of the number")
        expect_close(got, length * one, f"50,000 words, {length} tokens", rtol=2e-3)


def _power(vocab_size: int, length: int) -> float:
    try:
        return math.log10(float(vocab_size) ** length)
    except OverflowError:
        return math.inf


tz.plant(
    (
        "natural-logarithm",
        "this is the natural logarithm; the one to base 10 is asked for",
        lambda v, n: n * math.log(v),
        "common",
    ),
    (
        "exchanged",
        "vocabulary and length are exchanged: the length is the exponent",
        lambda v, n: v * math.log10(n),
        "common",
    ),
    ("product", "the number is a power, not a product", lambda v, n: math.log10(v * n), "common"),
    (
        "per-token",
        "this is the number of terms of one token's softmax: Z runs over whole responses",
        lambda v, n: math.log10(v),
        "common",
    ),
    (
        "sum-over-positions",
        "this is the number itself of a sum over positions, not a logarithm",
        lambda v, n: float(v * n),
        "common",
    ),
    ("overflow", "the power overflows before the logarithm is taken", _power, "common"),
    (
        "without-repetition",
        "a word may come twice in a response",
        lambda v, n: sum(math.log10(max(v - i, 1)) for i in range(n)),
        "common",
    ),
    (
        "up-to-the-length",
        "shorter responses are counted too; exactly `length` tokens are asked for",
        lambda v, n: n * math.log10(v) + math.log10(sum(float(v) ** -i for i in range(n))),
        "common",
    ),
    (
        "up-to-the-length-and-none",
        "shorter responses are counted too, and the empty one; exactly `length` tokens are asked for",
        lambda v, n: n * math.log10(v) + math.log10(sum(float(v) ** -i for i in range(n + 1))),
        "common",
    ),
    (
        "log2",
        "this is the logarithm to base 2; the one to base 10 is asked for",
        lambda v, n: n * math.log2(v),
        "common",
    ),
    (
        "count",
        "this is the number of responses itself: its logarithm to base 10 is asked for",
        lambda v, n: v**n,
        "common",
    ),
    (
        "unordered",
        "the order of the tokens matters",
        lambda v, n: (math.lgamma(v + n) - math.lgamma(v) - math.lgamma(n + 1)) / math.log(10),
        "common",
    ),
)
tz.right("whole numbers do not overflow", lambda v, n: math.log10(v**n))
tz.right("a tensor", lambda v, n: n * tensor(float(v)).log10())
tz.right("one decimal at 50,000 words", lambda v, n: round(n * math.log10(v), 3))

CHAPTER: Sequence[Question] = (rg, kt, px, ol, tr, ko, om, rb, zd, fo, tz)
