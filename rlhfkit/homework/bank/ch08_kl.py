"""Chapter 8, pitfalls of the KL divergence: eleven questions, with the wrong answers that their checks must reject."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, tensor

from rlhfkit.homework.comparisons import (
    Fail,
    as_tensor,
    describe,
    expect_close,
    expect_constant,
    expect_shape,
    gradient,
    gradient_or_none,
    is_distribution,
    lines,
    normal,
    require,
    same,
    show,
    source,
    unpack,
)
from rlhfkit.homework.core import Question


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p || q) over the last axis of two tensors of probabilities, by torch's own function for categoricals."""
    laws = [torch.distributions.Categorical(probs=x.double()) for x in (p, q)]
    return torch.distributions.kl_divergence(*laws)


# -- an estimate that is never negative ------------------------------------------------------------------


def kl_k3(logprobs, ref_logprobs):  # type: ignore[no-untyped-def]
    """k3 of every sample of pi: (r - 1) - log r with r = ref/pi. Two tensors of any shape -> the same shape."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def _two_laws(seed: int, spread: float, size: int = 5) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a policy and of a reference over `size` responses."""
    logits = normal(size, seed=seed)
    return logits.log_softmax(0), (logits + spread * normal(size, seed=seed + 100)).log_softmax(0)


def _close_pairs(differences: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities that differ by about this much, and log(ref/pi) in double precision."""
    ref = -normal(len(differences), seed=40).abs() - 0.3
    logprobs = ref - tensor(list(differences))
    return logprobs, ref, ref.double() - logprobs.double()


_SMALL = (1e-4, -1e-4, 3e-4, -3e-4)  # here single precision itself leaves an error of a thousandth
_MIDDLE = (1e-3, -1e-3, 9e-3, -9e-3, 2.9e-2, -2.9e-2)
_FAR = (24.0, 10.0, -11.0, -24.0)


def _relative_error(f: Any, differences: Sequence[float]) -> float:
    """Largest relative error of the estimates at log-probabilities that differ by so much."""
    logprobs, ref, d = _close_pairs(differences)
    error = as_tensor(f(logprobs, ref), "estimates") / (torch.expm1(d) - d) - 1
    return error.abs().max().item()


def _k3_probe(f: Any) -> list[Any]:
    logprobs, ref = -normal(2, 3, seed=1).abs() - 0.2, -normal(2, 3, seed=2).abs() - 0.2
    x = logprobs.requires_grad_()
    far = f(-1 - tensor(_FAR).relu(), -1 - (-tensor(_FAR)).relu())
    values, digits = f(x, ref), "-"
    if same(values, kl_k3(logprobs, ref)):  # only then is there something to lose
        digits = "lost" if _relative_error(f, _SMALL) > 0.05 else "kept"
        if digits == "kept" and _relative_error(f, _MIDDLE) > 1e-3:
            digits = "too few terms"
    alone = list(f(tensor(-1.0), tensor(-2.0)).shape)
    return [values, gradient_or_none(values, x), far, digits, alone]


k3 = Question(
    id="kl_k3",
    title="an estimate of the KL from each sample: unbiased and never negative",
    chapter=8,
    kind="property",
    theory=False,
    variable="kl_k3",
    reference=kl_k3,
    reference_source=source(kl_k3),
    hints=(
        "log(pi/ref) has the right mean, but it can be negative. What has mean 0 under pi and could be added to it?",
        "E_pi[ref/pi] = 1, so ref/pi - 1 has mean 0. Added to log(pi/ref) it is never negative, since log r <= r - 1. "
        "And which function of torch computes exp(d) - 1 without losing the digits of a small d?",
        "expm1(d) - d, with d = ref_logprobs - logprobs.",
    ),
    explanation="With r = ref/pi and samples of pi, E[r] = 1, so (r - 1) - log r has the mean of -log r, which is the "
    "KL. The tangent of the logarithm at 1 lies above it, log r <= r - 1: no sample is negative, and the only zero is at "
    "r = 1. The term r - 1 cancels the first-order part of -log r, so k3 is about d^2/2 for a small d = log r, and in exp(d) - 1 - d "
    "almost all digits cancel: single precision leaves an error of some 6e-8, more than the 5e-9 that are asked for at d = 1e-4. "
    "expm1 keeps them. As a loss k3 has the slope 1 - ref/pi in log pi.",
    probes=_k3_probe,
)


@k3.case("never negative; 0 where the two agree, and only there", 1, "log r <= r - 1, with equality at r = 1")
def _(f: Any) -> None:
    for seed, spread in ((1, 0.3), (2, 1.0), (3, 2.0)):
        logprobs, ref = _two_laws(seed, spread)
        got = as_tensor(f(logprobs, ref), "estimates")
        require(got.min() > -1e-6, f"log pi = {show(logprobs)}, log ref = {show(ref)}: got {show(got)}")
        require(got.max() > 1e-3, "all estimates are 0, although the two distributions differ")
    equal = tensor([-0.1, -1.0, -7.0])
    expect_close(f(equal, equal.clone()), torch.zeros(3), "estimates where log pi = log ref")


@k3.case("its mean under pi is KL(pi || ref), by enumeration", 2, "which terms have mean 0 under pi?")
def _(f: Any) -> None:
    for seed, spread in ((4, 0.3), (5, 1.0), (6, 2.0)):
        logprobs, ref = _two_laws(seed, spread)
        got = as_tensor(f(logprobs, ref), "estimates")
        expect_shape(got, (5,), "estimates")
        want = _kl(logprobs.exp(), ref.exp())
        expect_close((logprobs.double().exp() * got).sum(), want, "mean over all responses, weighted with pi")


@k3.case("small differences keep their digits", 1, "exp(d) - 1 - d cancels in single precision")
def _(f: Any) -> None:
    for differences, rtol in ((_SMALL, 0.02), (_MIDDLE, 1e-3)):
        logprobs, ref, d = _close_pairs(differences)
        got, want = as_tensor(f(logprobs, ref), "estimates"), torch.expm1(d) - d
        what = f"estimate over its true value at differences of {show(tensor(differences))}"
        expect_close(got / want, torch.ones(len(differences)), what, rtol=rtol)
    steps = torch.logspace(-8, -2, 100).tolist()
    least = min(as_tensor(f(*_close_pairs([s * x for x in steps])[:2]), "estimates").min().item() for s in (1, -1))
    require(least > -1e-12, f"differences from 1e-8 to 1e-2: got {least:.3g}, expected nothing negative")


@k3.case("as a loss: the slope in log pi is 1 - ref/pi", 1, "logprobs stands in both terms, and ref/pi moves with it")
def _(f: Any) -> None:
    logprobs, ref = _two_laws(7, 1.0)
    x = logprobs.clone().requires_grad_()
    expect_close(gradient(f(x, ref), x, "slope in logprobs"), 1 - (ref - logprobs).exp(), "slope in logprobs")


@k3.case("one number per sample, from its own two log-probabilities, however large", 1, "nothing is averaged or cut")
def _(f: Any) -> None:
    logprobs = tensor([[-9.0, -1.0, -2.0], [-1.0, -0.5, -12.0]])
    ref = tensor([[-1.0, -9.0, -2.5], [-1.5, -12.0, -0.5]])
    got = as_tensor(f(logprobs, ref), "estimates")
    expect_shape(got, (2, 3), "estimates")
    alone = as_tensor(f(logprobs[1:, :1], ref[1:, :1]), "estimate")
    expect_close(alone, got[1:, :1], "sample [1, 0] alone against inside the batch")
    d = (ref - logprobs).double()
    expect_close(got, torch.expm1(d) - d, "estimates at differences of 8, -8, -0.5, -0.5, -11.5 and 11.5")
    for low, high in ((-31.0, -1.0), (-81.0, -1.0), (-2.0, -62.0), (-1.0, -151.0)):
        got = as_tensor(f(tensor(low), tensor(high)), "estimate of one sample without axes")
        want = math.expm1(high - low) - (high - low)
        expect_close(got, want, f"estimate of one sample without axes, log pi {low:g}, log ref {high:g}")


def _k3_of(estimate: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """An estimate as a function of d = log(ref/pi)."""
    return lambda logprobs, ref_logprobs: estimate(ref_logprobs - logprobs)


k3.plant(
    ("k1", "this is k1: its mean is the KL, but single samples are negative", _k3_of(lambda d: -d), "common"),
    (
        "k2",
        "this is k2, half the squared log-ratio: never negative, but its mean is not the KL",
        _k3_of(lambda d: d.square() / 2),
        "W-KL-1",
    ),
    (
        "square",
        "the squared log-ratio has about twice the KL as its mean",
        _k3_of(lambda d: d.square()),
        "W-KL-1",
    ),
    (
        "absolute-value",
        "the absolute value of the log-ratio is never negative, but the negative samples are needed for the mean",
        _k3_of(lambda d: d.abs()),
        "common",
    ),
    (
        "negatives-cut",
        "negative samples set to 0 raise the mean",
        _k3_of(lambda d: (-d).clamp(min=0.0)),
        "common",
    ),
    (
        "inverse-ratio",
        "the ratio is ref/pi, which has mean 1 under pi; pi/ref has not",
        _k3_of(lambda d: torch.expm1(-d) + d),
        "common",
    ),
    (
        "other-divergence",
        "r log r - (r - 1) has the mean of the other direction, KL(ref || pi)",
        _k3_of(lambda d: d.exp() * d - torch.expm1(d)),
        "common",
    ),
    (
        "log-ratio-added",
        "the sign of the log-ratio: (r - 1) - log r",
        _k3_of(lambda d: torch.expm1(d) + d),
        "common",
    ),
    ("one-missing", "subtract 1 from the ratio: E[r] is 1, not 0", _k3_of(lambda d: d.exp() - d), "common"),
    ("ratio-only", "r - 1 has mean 0: the log-ratio is missing", _k3_of(lambda d: torch.expm1(d)), "common"),
    (
        "variance-subtracted",
        "the log-ratio needs no correction: its mean is the KL, and subtracting the spread makes it wrong",
        _k3_of(lambda d: -d - (d - d.mean()).square() / (2 * d.numel())),
        "W-KL-5",
    ),
    (
        "exp-minus-1",
        "right in exact arithmetic, but so computed the digits of a small d cancel: take d first, then expm1(d) - d",
        _k3_of(lambda d: d.exp() - 1 - d),
        "W-KL-9",
    ),
    (
        "clamped",
        "you cut large estimates at 10: the mean is then too small, and the gradient there is 0",
        _k3_of(lambda d: (torch.expm1(d) - d).clamp(-10.0, 10.0)),
        "common",
    ),
    (
        "clamped-log-ratio",
        "you cut the log-ratio at 10: nothing is clamped here",
        _k3_of(lambda d: torch.expm1(d.clamp(-10.0, 10.0)) - d.clamp(-10.0, 10.0)),
        "common",
    ),
    (
        "cut-at-20",
        "you cut the log-ratio at 20: a sample that pi hardly ever writes has a large estimate, and must have it",
        _k3_of(lambda d: torch.expm1(d.clamp(-20.0, 20.0)) - d.clamp(-20.0, 20.0)),
        "common",
    ),
    (
        "result-cut-at-1e5",
        "you cut estimates above 100,000: the few samples that are so large belong to the mean",
        _k3_of(lambda d: (torch.expm1(d) - d).clamp(max=1e5)),
        "common",
    ),
    (
        "series-below-0.03",
        "d^2/2 is only the first term of the series: at d = 0.03 it is 1% off, where expm1 has no error to speak of",
        _k3_of(lambda d: torch.where(d.abs() < 0.03, d.square() / 2, torch.expm1(d) - d)),
        "common",
    ),
    (
        "one-axis-added",
        "a single number must come back as one: you gave it an axis",
        _k3_of(lambda d: torch.atleast_1d(torch.expm1(d) - d)),
        "common",
    ),
    (
        "second-order",
        "this is the Taylor series up to the third power, good for a small difference only",
        _k3_of(lambda d: d.square() / 2 + d**3 / 6),
        "common",
    ),
    (
        "detached",
        "the values are right, but no gradient reaches logprobs",
        _k3_of(lambda d: (torch.expm1(d) - d).detach()),
        "common",
    ),
    (
        "slope-of-k2",
        "the values are those of k3, the slope is that of k2: a useful loss, but not k3",
        _k3_of(lambda d: (torch.expm1(d) - d - d.square() / 2).detach() + d.square() / 2),
        "common",
    ),
    (
        "mean",
        "one number per sample: the mean is the caller's choice",
        _k3_of(lambda d: kl_k3(-d, 0 * d).mean()),
        "common",
    ),
)
k3.right("float64, where exp(d) - 1 has digits enough", _k3_of(lambda d: d.double().exp() - 1 - d.double()))
k3.right("2 exp(d/2) sinh(d/2) - d", _k3_of(lambda d: 2 * (d / 2).exp() * (d / 2).sinh() - d))
k3.right(
    "a short series near 0", _k3_of(lambda d: torch.where(d.abs() < 1e-2, d**2 / 2 + d**3 / 6, torch.expm1(d) - d))
)
k3.right("k1 plus what has mean 0", lambda lp, ref: (lp - ref) + torch.special.expm1(ref - lp))


# -- where k2 is noisier than k1 -------------------------------------------------------------------------

_GRID = torch.linspace(-12.0, 12.0, 6001, dtype=torch.float64)
_DENSITY = torch.distributions.Normal(0.0, 1.0).log_prob(_GRID).exp() * (_GRID[1] - _GRID[0])


def _gaussian_moments(estimate: Callable[[Tensor], Tensor], m: float) -> tuple[float, float]:
    """Mean and variance under N(0, 1) of an estimate, a function of l = log pi/ref, for ref = N(m, 1); quadrature."""
    log_ratio = torch.distributions.Normal(0.0, 1.0).log_prob(_GRID)
    log_ratio = log_ratio - torch.distributions.Normal(float(m), 1.0).log_prob(_GRID)
    values = estimate(log_ratio)
    mean = (_DENSITY * values).sum()
    return mean.item(), (_DENSITY * (values - mean).square()).sum().item()


def _k1_of(log_ratio: Tensor) -> Tensor:
    return log_ratio


def _k2_of(log_ratio: Tensor) -> Tensor:
    return log_ratio.square() / 2


def _distance(answer: Any) -> float:
    """One number, which may be infinite."""
    x = as_tensor(answer, "your answer")
    if x.numel() != 1:
        raise Fail(f"your answer: expected one number, got {describe(answer)}")
    if x.isnan():
        raise Fail("your answer: got nan, expected a distance")
    return x.item()


_THRESHOLD = math.sqrt(math.sqrt(5) - 1)

kt = Question(
    id="k2_threshold",
    title="the distance beyond which k2 is noisier than k1",
    chapter=8,
    kind="number",
    theory=True,
    variable="threshold",
    reference=_THRESHOLD,
    reference_source="threshold = math.sqrt(math.sqrt(5) - 1)",
    accept=_distance,
    hints=(
        "Write the log-ratio of the two densities as a function of x. Which distribution does it have?",
        "l is normal with mean m^2/2 and variance m^2. For a normal number with mean a and variance v, "
        "Var(l^2) = 2 v^2 + 4 a^2 v; k2 is half of l^2.",
        "Var k1 = m^2 and Var k2 = m^4 (2 + m^2)/4; they are equal where m^4 + 2 m^2 - 4 = 0.",
    ),
    explanation="l = log pi - log ref = m^2/2 - m x is normal with mean m^2/2 and variance m^2, so Var k1 = m^2 and "
    "Var k2 = m^4 (2 + m^2)/4. They are equal where m^2 (2 + m^2) = 4, that is m^2 = sqrt(5) - 1 and m = 1.1118, a KL of "
    "0.618. Closer than that k2 is quieter, since it has dropped the first-order term of mean 0; farther away squaring makes the "
    "extremes larger. The same happens to k3 from m = 1.121 on.",
    probes=lambda m: m,
)


@kt.case("just before it, k2 is quieter than k1", 1, "squaring does not tame what is larger than 1")
def _(m: Any) -> None:
    require(0 < m < 50, f"got {m:.4g}: there is a distance beyond which k2 is noisier, and one before which it is not")
    before = [_gaussian_moments(k, 0.997 * m)[1] for k in (_k1_of, _k2_of)]
    require(
        before[1] < before[0], f"0.3% before your distance Var k1 is {before[0]:.4f}, Var k2 already {before[1]:.4f}"
    )


@kt.case("just beyond it, k2 is noisier than k1", 1, "compare the variances, Var k1 = m^2")
def _(m: Any) -> None:
    require(0 < m < 50, f"got {m:.4g}: there is a distance beyond which k2 is noisier, and one before which it is not")
    beyond = [_gaussian_moments(k, 1.003 * m)[1] for k in (_k1_of, _k2_of)]
    require(beyond[1] > beyond[0], f"0.3% beyond your distance Var k1 is {beyond[0]:.4f}, Var k2 still {beyond[1]:.4f}")


kt.plant(
    (
        "never",
        "squaring makes extremes larger: for distant distributions k2 is the noisier one",
        math.inf,
        "W-KL-2",
    ),
    ("always", "for close distributions k2 is the quieter one, by far", 0.0, "common"),
    ("squared", "this is m squared", math.sqrt(5) - 1, "common"),
    ("as-a-divergence", "this is the KL at that distance, m^2/2", (math.sqrt(5) - 1) / 2, "common"),
    (
        "mean-left-out",
        "you left out the mean of the log-ratio: Var(l^2) = 2 v^2 + 4 a^2 v for mean a and variance v",
        math.sqrt(2),
        "common",
    ),
    ("bias-equals-kl", "this is the distance at which the bias of k2 equals the KL", 2.0, "common"),
    ("k3", "this is the distance for k3", 1.12091, "common"),
    (
        "half-left-out",
        "k2 is half the square: its variance is a quarter of Var(l^2)",
        math.sqrt(math.sqrt(2) - 1),
        "common",
    ),
    (
        "relative-to-its-own-mean",
        "you divided the spread of k2 by its own mean, which is not the KL",
        (16 / 3) ** 0.25,
        "common",
    ),
    (
        "half-once",
        "the half is squared in the variance: it gives a quarter",
        math.sqrt(math.sqrt(3) - 1),
        "common",
    ),
    ("unit", "where the log-ratio has variance 1 k2 is still the quieter one", 1.0, "common"),
)
kt.right("two decimals", 1.11)
kt.right("a tensor", tensor(5.0).sqrt().sub(1).sqrt())
kt.right("a fraction", Fraction(1112, 1000))


# -- the bias of k2 --------------------------------------------------------------------------------------


def k2_bias(mean, variance):  # type: ignore[no-untyped-def]
    """E[k2] - KL(pi || ref) from the mean and the variance of l = log(pi/ref) under pi. Two numbers -> number."""
    return (variance + mean**2) / 2 - mean


def _moments_of(seed: int, spread: float) -> tuple[float, float, float]:
    """Mean and variance of l under pi, and E[k2] - KL, over five responses."""
    logprobs, ref = (x.double() for x in _two_laws(seed, spread))
    log_ratio, probs = logprobs - ref, logprobs.exp()
    mean = (probs * log_ratio).sum()
    variance = (probs * (log_ratio - mean).square()).sum()
    bias = (probs * log_ratio.square()).sum() / 2 - _kl(probs, ref.exp())
    return mean.item(), variance.item(), bias.item()


kb = Question(
    id="k2_bias",
    title="the bias of k2",
    chapter=8,
    kind="symbolic",
    theory=True,
    variable="k2_bias",
    reference=k2_bias,
    reference_source=source(k2_bias),
    hints=(
        "What is the KL in terms of l, and what is the mean of k2?",
        "The KL is E[l], the mean of k2 is E[l^2]/2. How do a mean and a variance give E[l^2]?",
        "(variance + mean^2)/2 - mean.",
    ),
    explanation="KL(pi || ref) = E[l] and E[k2] = E[l^2]/2, so the bias is E[l^2]/2 - E[l] = (Var l + (E l)^2)/2 - E l. "
    "It is no variance, and no matter of Jensen's inequality: that E[l^2] exceeds (E l)^2 says only that Var l is positive. "
    "For unit Gaussians at distance m, E l = m^2/2 and Var l = m^2, so half the variance is the KL itself, and what "
    "is left is half the square of the KL, m^4/8: relative to the KL m^2/4, or 0.0025, 0.0625, 0.25 and 1 at m = 0.1, 0.5, 1 "
    "and 2. For other distributions it can also be negative.",
    probes=lambda f: [
        f(a, v) for a, v in ((0.5, 1.0), (2.0, 4.0), *((_moments_of(seed, 1.5)[:2]) for seed in (11, 30)))
    ],
)


@kb.case("unit Gaussians at distance m: mean m^2/2, variance m^2", 1, "compare E[l^2]/2 with E[l]")
def _(f: Any) -> None:
    for m in (0.5, 1.0, 1.5, 2.0):
        want = _gaussian_moments(_k2_of, m)[0] - _gaussian_moments(_k1_of, m)[0]
        expect_close(f(m**2 / 2, m**2), want, f"bias at m = {m:g}, by integration", rtol=2e-3, atol=6e-4)


@kb.case("five responses: E[k2] - KL, by enumeration", 2, "there the variance is not twice the mean")
def _(f: Any) -> None:
    signs = set()
    for seed, spread in ((13, 1.0), (14, 2.0), (15, 3.0), (30, 2.0)):
        mean, variance, want = _moments_of(seed, spread)
        expect_close(f(mean, variance), want, f"bias at mean {mean:.4f}, variance {variance:.4f}", rtol=2e-3, atol=6e-4)
        signs.add(want > 0)
    assert len(signs) == 2, "the bias must be seen with both signs"


@kb.case("nearly 0 for close distributions, compared with the KL", 1, "what is k2 good for?")
def _(f: Any) -> None:
    for m in (0.02, 0.05):
        kl = m**2 / 2
        got = as_tensor(f(kl, m**2), "bias")
        expect_shape(got, (), "bias")
        require(abs(got) < 0.01 * kl, f"m = {m:g}: the KL is {kl:.4g}, your bias {got:.4g}, not below 1% of it")
    far = as_tensor(f(2.0, 4.0), "bias")
    require(bool(far.abs() > 1e-3), "your bias is 0 for distant distributions, too")


kb.plant(
    ("unbiased", "k2 is biased: half the square is only an approximation of second order", lambda a, v: 0.0, "W-KL-1"),
    (
        "variance",
        "E[l^2] - (E l)^2 is the variance of l; the bias compares E[l^2]/2 with E[l]",
        lambda a, v: v,
        "W-KL-4",
    ),
    (
        "half-variance",
        "Jensen's gap (E[l^2] - (E l)^2)/2 is half a variance: k2 is not meant to estimate (E l)^2/2",
        lambda a, v: v / 2,
        "W-KL-4",
    ),
    (
        "mean-of-k2",
        "this is the mean of k2: subtract the KL, which is E[l]",
        lambda a, v: (v + a**2) / 2,
        "common",
    ),
    ("kl", "this is the KL itself", lambda a, v: a, "common"),
    (
        "gaussian-only",
        "half the square of the KL is right for these Gaussians only, where the variance is twice the mean",
        lambda a, v: a**2 / 2,
        "common",
    ),
    (
        "gaussian-only-by-the-variance",
        "this is m^4/8 with m^2 for the variance, right for Gaussians only",
        lambda a, v: v**2 / 8,
        "common",
    ),
    ("half-left-out", "this is m^4/4 for the Gaussians: the half of k2 is missing", lambda a, v: a**2, "common"),
    (
        "square-without-half",
        "k2 has the factor 1/2",
        lambda a, v: v + a**2 - a,
        "common",
    ),
    ("sign", "the bias is the mean minus the true value", lambda a, v: a - (v + a**2) / 2, "common"),
    (
        "relative",
        "this is the bias divided by the KL",
        lambda a, v: ((v + a**2) / 2 - a) / a,
        "common",
    ),
    (
        "variance-for-the-square",
        "E[l^2] is the variance plus the square of the mean",
        lambda a, v: v / 2 - a,
        "common",
    ),
    (
        "variance-minus-the-square",
        "the sign: E[l^2] = Var l + (E l)^2",
        lambda a, v: (v - a**2) / 2 - a,
        "common",
    ),
    (
        "mean-for-the-square",
        "the mean must be squared in E[l^2]",
        lambda a, v: (v + a) / 2 - a,
        "common",
    ),
)
kb.right("half of the standardised square", lambda a, v: 0.5 * (math.sqrt(v) ** 2) + 0.5 * a * (a - 2))
kb.right("a tensor", lambda a, v: tensor([v, a * a, -2 * a]).sum() / 2)
kb.right("three decimals", lambda a, v: np.round(k2_bias(np.float64(a), v), 4 if a < 0.01 else 3))


# -- three losses, three gradients -----------------------------------------------------------------------


def loss_gradients(logits, ref_logits):  # type: ignore[no-untyped-def]
    """Mean gradients in the logits of k1, k2, k3 as losses on samples of pi. (N,), (N,) -> three (N,)."""
    pi, ref = logits.softmax(-1), ref_logits.softmax(-1)
    log_ratio = logits.log_softmax(-1) - ref_logits.log_softmax(-1)
    kl = (pi * log_ratio).sum()
    return torch.zeros_like(pi), pi * (log_ratio - kl), pi - ref


def _three(f: Any, logits: Tensor, ref_logits: Tensor) -> list[Tensor]:
    got = unpack(f(logits.clone(), ref_logits.clone()), 3, "loss_gradients returns three gradients")
    parts = [as_tensor(x, f"gradient of k{i}") for i, x in enumerate(got, 1)]
    for i, x in enumerate(parts, 1):
        expect_shape(x, tuple(logits.shape), f"gradient of k{i}")
    return parts


def _mean_slope(estimate: Callable[[Tensor], Tensor], logits: Tensor, ref_logits: Tensor) -> Tensor:
    """Autograd of the mean over pi of an estimate, a function of l, with the sampled responses held fixed."""
    x = logits.detach().double().requires_grad_()
    lp = x.log_softmax(-1)
    loss = (lp.exp().detach() * estimate(lp - ref_logits.double().log_softmax(-1))).sum()
    return torch.autograd.grad(loss, x)[0]


_LOGIT_PAIRS = ((21, 4), (24, 3), (27, 5))


def _logits(seed: int, size: int) -> tuple[Tensor, Tensor]:
    return normal(size, seed=seed), 1.5 * normal(size, seed=seed + 1)


lg = Question(
    id="kl_loss_gradients",
    title="the gradients of k1, k2 and k3 as losses",
    chapter=8,
    kind="symbolic",
    theory=True,
    variable="loss_gradients",
    reference=loss_gradients,
    reference_source=source(loss_gradients),
    hints=(
        "The samples are held fixed, so each loss is differentiated through log pi of the sample only. Which factor "
        "stands in front of grad log pi in each?",
        "k1 gives grad log pi, k2 gives l grad log pi with l = log(pi/ref), k3 gives (1 - ref/pi) grad log pi. Take the "
        "means over pi; grad log pi(y) is 1_y - pi in the logits.",
        "k1: 0 * pi; k2: pi (l - sum(pi l)); k3: pi - ref.",
    ),
    explanation="With the samples fixed the gradient of a mean over pi is E[k' grad log pi], where k' is the slope of the "
    "estimate in log pi. For k1 that is E[grad log pi] = 0. For k2 it is E[l grad log pi] = pi (l - KL), the gradient of "
    "KL(pi || ref), although k2 is biased. For k3 it is E[(1 - ref/pi) grad log pi] = -E_ref[grad log pi] = pi - ref, the "
    "gradient of KL(ref || pi), although k3 is unbiased for KL(pi || ref). An estimate that is right at every pi has the gradient of "
    "the KL only when the way in which pi chooses the samples is differentiated too.",
    probes=lambda f: [list(unpack(f(*_logits(*pair)), 3, "probe")) for pair in _LOGIT_PAIRS[:2]],
)


@lg.case("k1: the mean gradient", 1, "what is the mean of grad log pi under pi?")
def _(f: Any) -> None:
    for pair in _LOGIT_PAIRS:
        logits, ref = _logits(*pair)
        k1, k2, k3 = _three(f, logits, ref)
        require(max(k2.abs().max(), k3.abs().max()) > 1e-3, "all three gradients are 0")
        want = _mean_slope(_k1_of, logits, ref)
        expect_close(k1, want, "gradient of k1", rtol=2e-3, atol=6e-4, tell_expected=False)


@lg.case("k2: the mean gradient", 2, "the square gives the log-ratio as a weight")
def _(f: Any) -> None:
    for pair in _LOGIT_PAIRS:
        logits, ref = _logits(*pair)
        want = _mean_slope(_k2_of, logits, ref)
        expect_close(_three(f, logits, ref)[1], want, "gradient of k2", rtol=2e-3, atol=6e-4)


@lg.case("k3: the mean gradient", 2, "(1 - ref/pi) is the weight: what is its mean against grad log pi?")
def _(f: Any) -> None:
    for pair in _LOGIT_PAIRS:
        logits, ref = _logits(*pair)
        want = _mean_slope(lambda x: torch.exp(-x) - 1 + x, logits, ref)
        expect_close(_three(f, logits, ref)[2], want, "gradient of k3", rtol=2e-3, atol=6e-4)


@lg.case("the two of k2 and k3 go downhill on two different divergences", 1, "KL(pi || ref), and KL(ref || pi)")
def _(f: Any) -> None:
    for pair in _LOGIT_PAIRS:
        logits, ref = (x.double() for x in _logits(*pair))
        _, k2, k3 = _three(f, logits, ref)
        q = ref.softmax(0)
        for name, step, divergence in (
            ("KL(pi || ref) along k2", k2, lambda x: _kl(x.softmax(0), q)),  # noqa: B023
            ("KL(ref || pi) along k3", k3, lambda x: _kl(q, x.softmax(0))),  # noqa: B023
        ):
            before, after = divergence(logits).item(), divergence(logits - 1e-3 * step).item()
            steepest = 1e-3 * step.square().sum().item()  # what a small step along the gradient gains
            require(
                steepest > 1e-7 and abs((before - after) / steepest - 1) < 0.02,
                f"{name}: a step of 0.001 lowers it by {before - after:.3g}, a gradient would by {steepest:.3g}",
            )


def _weighted_score(p: Tensor, w: Tensor) -> Tensor:
    """E_pi[w grad log pi] in the logits."""
    return p * (w - (p * w).sum())


def _three_with(**parts: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[..., Any]:
    """The three gradients with some exchanged for others: functions of pi, ref and l."""

    def f(logits: Tensor, ref_logits: Tensor) -> Any:
        pi, ref = logits.softmax(-1), ref_logits.softmax(-1)
        log_ratio = logits.log_softmax(-1) - ref_logits.log_softmax(-1)
        right = dict(zip(("k1", "k2", "k3"), loss_gradients(logits, ref_logits), strict=True))
        return tuple(parts[k](pi, ref, log_ratio) if k in parts else right[k] for k in ("k1", "k2", "k3"))

    return f


def _of_kl(p: Tensor, q: Tensor, x: Tensor) -> Tensor:
    return _weighted_score(p, x)


def _of_reverse(p: Tensor, q: Tensor, x: Tensor) -> Tensor:
    return p - q


lg.plant(
    (
        "all-of-the-kl",
        "none of this follows from being unbiased: with the samples held fixed only k2 has the gradient of KL(pi || ref)",
        _three_with(k1=_of_kl, k3=_of_kl),
        "W-KL-7",
    ),
    (
        "k1-of-the-kl",
        "k1 is unbiased, but its gradient on fixed samples is grad log pi, whose mean is 0",
        _three_with(k1=_of_kl),
        "W-KL-7",
    ),
    (
        "k3-of-the-kl",
        "k3 is unbiased for KL(pi || ref), but its gradient on fixed samples belongs to KL(ref || pi)",
        _three_with(k3=_of_kl),
        "W-KL-7",
    ),
    (
        "exchanged",
        "k2 and k3 are exchanged: the biased one has the gradient of KL(pi || ref)",
        _three_with(k2=_of_reverse, k3=_of_kl),
        "W-KL-7",
    ),
    (
        "all-of-the-reverse",
        "only k3 has the gradient of KL(ref || pi)",
        _three_with(k1=_of_reverse, k2=_of_reverse),
        "common",
    ),
    (
        "k2-of-the-reverse",
        "k2 has the gradient of KL(pi || ref); pi - ref belongs to k3 alone",
        _three_with(k2=_of_reverse),
        "common",
    ),
    (
        "sampling-differentiated",
        "you also differentiated how pi chooses the samples; they are held fixed",
        _three_with(k1=_of_kl, k2=lambda p, q, x: _weighted_score(p, x.square() / 2 + x), k3=_of_kl),
        "common",
    ),
    (
        "k2-sampling-differentiated",
        "for k2 you also differentiated how pi chooses the samples; they are held fixed",
        _three_with(k2=lambda p, q, x: _weighted_score(p, x.square() / 2 + x)),
        "common",
    ),
    (
        "estimates-as-rewards",
        "you weighted grad log pi with the estimates: that is what they do in a reward, not as a loss",
        _three_with(
            k1=_of_kl,
            k2=lambda p, q, x: _weighted_score(p, x.square() / 2),
            k3=lambda p, q, x: _weighted_score(p, (-x).exp() - 1 + x),
        ),
        "common",
    ),
    (
        "no-gradient",
        "grad log pi has mean 0 only with a constant weight: k2 and k3 weigh it",
        _three_with(k2=lambda p, q, x: 0 * p, k3=lambda p, q, x: 0 * p),
        "common",
    ),
    (
        "k2-without-gradient",
        "k2 is biased, but its gradient is not 0: the log-ratio is the weight",
        _three_with(k2=lambda p, q, x: 0 * p),
        "common",
    ),
    (
        "k3-sign",
        "the sign of k3: where pi exceeds the reference, the loss must push down",
        _three_with(k3=lambda p, q, x: q - p),
        "common",
    ),
    (
        "k2-sign",
        "the sign of k2: where pi exceeds the reference, the loss must push down",
        _three_with(k2=lambda p, q, x: -_weighted_score(p, x)),
        "common",
    ),
    (
        "k2-without-half",
        "the half of k2 cancels the 2 of the square",
        _three_with(k2=lambda p, q, x: 2 * _weighted_score(p, x)),
        "common",
    ),
    (
        "uncentred",
        "the normaliser of the softmax is missing: grad log pi(y) is 1_y - pi, not 1_y",
        _three_with(k1=lambda p, q, x: p, k2=lambda p, q, x: p * x),
        "common",
    ),
    (
        "inverse-ratio",
        "the ratio in k3 is ref/pi, with a slope of 1 - ref/pi in log pi",
        _three_with(k3=lambda p, q, x: _weighted_score(p, p / q)),
        "common",
    ),
    (
        "over-the-reference",
        "the samples come from pi: you weighted the one of k2 with the reference",
        _three_with(k2=lambda p, q, x: q * x - p * (q * x).sum()),
        "common",
    ),
)


def _three_by_autograd(logits: Tensor, ref_logits: Tensor) -> Any:
    found = []
    for estimate in (_k1_of, _k2_of, lambda x: torch.expm1(-x) + x):
        x = logits.detach().double().requires_grad_()
        lp = x.log_softmax(-1)
        losses = estimate(lp - ref_logits.double().log_softmax(-1))
        found.append(torch.autograd.grad(losses, x, grad_outputs=lp.exp().detach())[0])
    return found


def _three_by_rows(logits: Tensor, ref_logits: Tensor) -> Any:
    p, q = (np.exp(x.double().numpy()) for x in (logits, ref_logits))
    p, q = p / p.sum(), q / q.sum()
    scores = np.eye(len(p)) - p  # row y: grad log pi(y)
    weights = np.stack([np.ones(len(p)), np.log(p / q), 1 - q / p])
    return (weights * p) @ scores


lg.right("autograd, float64", _three_by_autograd)
lg.right("matrix form, numpy", _three_by_rows)


# -- the drift of k1 -------------------------------------------------------------------------------------


def kl_drift(ref, lr):  # type: ignore[no-untyped-def]
    """Mean KL(pi' || ref) after one step from pi = ref on one sample, for the losses k1 and k2. -> two numbers."""
    steps = torch.eye(len(ref)) - ref  # row y: the gradient of k1 in the logits if y was sampled
    logprobs = (ref.log() - lr * steps).log_softmax(-1)
    divergences = (logprobs.exp() * (logprobs - ref.log())).sum(-1)
    return (ref * divergences).sum(), 0.0


_DRIFT_LAWS = (([0.5, 0.3, 0.2], 1.0), ([0.6, 0.1, 0.2, 0.1], 0.5), ([0.25] * 4, 2.0))


def _drift_by_autograd(ref: Tensor, lr: float, estimate: Callable[[Tensor], Tensor]) -> float:
    """One step of gradient descent for each possible sample, the resulting divergences averaged."""
    total = 0.0
    for y, chance in enumerate(ref.double()):
        logits = ref.double().log().requires_grad_()
        loss = estimate(logits.log_softmax(0)[y] - ref.double()[y].log())
        (slope,) = torch.autograd.grad(loss, logits)
        total += (chance * _kl((logits.detach() - lr * slope).softmax(0), ref)).item()
    return total


def _two_means(f: Any, ref: Tensor, lr: float) -> list[Tensor]:
    got = unpack(f(ref.clone(), lr), 2, "kl_drift returns (mean KL with k1, mean KL with k2)")
    parts = [as_tensor(x, f"mean KL with k{i}") for i, x in enumerate(got, 1)]
    for i, x in enumerate(parts, 1):
        expect_shape(x, (), f"mean KL with k{i}")
    return parts


dr = Question(
    id="kl_drift",
    title="one step with a KL loss, from the reference",
    chapter=8,
    kind="symbolic",
    theory=True,
    variable="kl_drift",
    reference=kl_drift,
    reference_source=source(kl_drift),
    hints=(
        "There are N possible samples, so N possible policies after the step. Where does each of them lie?",
        "If y was sampled, k1 moves the logits by -lr (1_y - ref), and k2 by that times log(pi/ref), which is 0 at the "
        "start. Average the N divergences, not the N policies.",
        "k1: the sum over y of ref(y) KL(softmax(log ref - lr (1_y - ref)) || ref); k2: 0.",
    ),
    explanation="The mean gradient of k1 is 0, but none of the N gradients is: a sample's own logit goes down by "
    "lr (1 - ref(y)), whichever response it was. The mean of the N divergences is about lr^2/2 times the sum of "
    "ref(y) g_y' F g_y, with g_y = 1_y - ref and F = diag(ref) - ref ref', and so positive. Nothing pulls back, and the "
    "next step adds more: the policy drifts on noise. For k2 each sample's gradient has the factor log(pi/ref), which is 0 at the start, "
    "and away from it pulls back. For ref = (.5, .3, .2) and lr = 1 the two numbers are 0.0776 and 0, "
    "for lr = 0.1 they are 0.0010 and 0.",
    probes=lambda f: [list(unpack(f(tensor(p), lr), 2, "probe")) for p, lr in _DRIFT_LAWS],
)


@dr.case("k1: nothing holds the policy at the reference", 2, "an average step of 0 is no step of 0")
def _(f: Any) -> None:
    for p, lr in _DRIFT_LAWS:
        got = _two_means(f, tensor(p), lr)[0]
        want = _drift_by_autograd(tensor(p), lr, _k1_of)
        expect_close(got, want, f"mean KL after a step with k1, ref = {p}, lr {lr:g}", rtol=2e-3, atol=6e-4)


@dr.case("k2: where does it go from the reference?", 1, "what does the gradient of a single sample contain?")
def _(f: Any) -> None:
    for p, lr in _DRIFT_LAWS:
        first, second = _two_means(f, tensor(p), lr)
        require(first.abs() > 1e-4, "your mean KL after a step with k1 is nearly 0, too")
        want = _drift_by_autograd(tensor(p), lr, _k2_of)
        what = f"mean KL after a step with k2, ref = {p}, lr {lr:g}"
        expect_close(second, want, what, rtol=2e-3, atol=6e-4, tell_expected=False)


def _drift_of(
    move: Callable[[Tensor], Tensor] = lambda q: torch.eye(len(q)) - q,
    mean: Callable[[Tensor, Tensor], Tensor] = lambda q, kls: (q * kls).sum(),
    away: float = -1.0,
    reverse: bool = False,
    second: float = 0.0,
) -> Callable[..., Any]:
    """Both numbers with another step, another average, the other direction of the divergence, or another k2."""

    def f(ref: Tensor, lr: float) -> Any:
        lp = (ref.log() + away * lr * move(ref)).log_softmax(-1)
        kls = (ref * (ref.log() - lp)).sum(-1) if reverse else (lp.exp() * (lp - ref.log())).sum(-1)
        first = mean(ref, kls)
        return first, second * first

    return f


def _second_order(ref: Tensor, lr: float) -> Any:
    steps = torch.eye(len(ref)) - ref
    fisher = torch.diag(ref) - torch.outer(ref, ref)
    return lr**2 / 2 * (ref * ((steps @ fisher) * steps).sum(-1)).sum(), 0.0


def _mean_policy(ref: Tensor, lr: float) -> Any:
    policies = (ref.log() - lr * (torch.eye(len(ref)) - ref)).softmax(-1)
    return _kl(ref @ policies, ref), 0.0


dr.plant(
    (
        "stays",
        "the step is 0 on average only: every single sample moves the policy away from the reference",
        lambda q, lr: (0.0, 0.0),
        "W-KL-11",
    ),
    (
        "exchanged",
        "k1 and k2 are exchanged: the gradient of k2 has the factor log(pi/ref), which is 0 at the start",
        lambda q, lr: kl_drift(q, lr)[::-1],
        "W-KL-11",
    ),
    (
        "k2-moves-too",
        "a sample's gradient of k2 has the factor log(pi/ref), which is 0 at the start",
        _drift_of(second=1.0),
        "common",
    ),
    (
        "mean-of-the-policies",
        "you averaged the policies before taking the divergence: what counts is where each single one goes",
        _mean_policy,
        "W-KL-11",
    ),
    (
        "uniform-average",
        "the samples come from the reference: weigh the divergences with its probabilities",
        _drift_of(mean=lambda q, kls: kls.mean()),
        "common",
    ),
    (
        "summed",
        "an average is asked for, you added the divergences",
        _drift_of(mean=lambda q, kls: kls.sum()),
        "common",
    ),
    (
        "ascent",
        "you went up: a loss is descended, so the logit of the sample goes down",
        _drift_of(away=1.0),
        "common",
    ),
    (
        "uncentred",
        "the normaliser of the softmax is missing: grad log pi(y) is 1_y - pi, not 1_y",
        _drift_of(move=lambda q: torch.eye(len(q))),
        "common",
    ),
    ("other-direction", "this is the mean of KL(ref || pi')", _drift_of(reverse=True), "common"),
    (
        "second-order-only",
        "this is the first term of the series in lr; the step is not small",
        _second_order,
        "common",
    ),
    (
        "worst-sample",
        "this is the largest of the divergences, not their mean",
        _drift_of(mean=lambda q, kls: kls.max()),
        "common",
    ),
    (
        "step-in-the-probabilities",
        "the parameters are the logits: grad log pi(y) is 1_y - pi there, not 1_y/pi",
        _drift_of(move=lambda q: torch.diag(1 / q)),
        "common",
    ),
)


def _drift_by_loop(ref: Tensor, lr: float) -> Any:
    q, total = ref.double().numpy(), 0.0
    for y in range(len(q)):
        weights = q * np.exp(-lr * ((np.arange(len(q)) == y) - q))
        p = weights / weights.sum()
        total += q[y] * float(np.sum(p * np.log(p / q)))
    return total, 0.0


dr.right("a loop, numpy", _drift_by_loop)
dr.right("autograd", lambda q, lr: [_drift_by_autograd(q, lr, k) for k in (_k1_of, _k2_of)])
dr.right("three decimals", lambda q, lr: (round(kl_drift(q.double(), lr)[0].item(), 4), 0))


# -- a sampler that k3 does not survive ------------------------------------------------------------------

_HOLE = ([0.5, 0.5, 0.0], [0.4, 0.4, 0.2])


def _two_lists(answer: Any) -> list[Tensor]:
    q, p = (as_tensor(part, name) for part, name in zip(unpack(answer, 2, "q, p"), "qp", strict=True))
    if q.ndim != 1 or p.shape != q.shape:
        raise Fail(f"q and p: got shapes {tuple(q.shape)}, {tuple(p.shape)}, expected one length")
    if not 2 <= len(q) <= 20 or not all(torch.isfinite(x).all() for x in (q, p)):
        raise Fail("q and p: expected finite numbers for 2 to 20 responses")
    return [q, p]


def _kl_and_k3(q: Tensor, p: Tensor) -> tuple[float, float]:
    """KL(q || p) and the mean of k3 over what q writes; both infinite where p misses a part of it."""
    drawn = q > 0
    if (p[drawn] == 0).any():
        return math.inf, math.inf
    r = p[drawn] / q[drawn]
    return (q[drawn] * -r.log()).sum().item(), (q[drawn] * (r - 1 - r.log())).sum().item()


def _hole_kind(parts: list[Tensor]) -> str:
    q, p = parts
    if not is_distribution(q) or not is_distribution(p):
        return "q is no distribution" if not is_distribution(q) else "p is no distribution"
    kl, k3_mean = _kl_and_k3(q, p)
    if kl == math.inf:
        return "infinite"
    if kl < 0.01:
        return "equal" if kl < 1e-4 else "too close"
    if k3_mean < kl / 2:
        return "right"
    if (q > 0).all():
        return "q writes everything" if q.min() > 0.01 else "q hardly writes one"
    return "p is 0 where q is" if abs(k3_mean - kl) < 1e-3 else "above one half"


sp = Question(
    id="k3_support",
    title="a sampler for which k3 is far too small",
    chapter=8,
    kind="counterexample",
    theory=True,
    variable="example",
    reference=_HOLE,
    reference_source="example = ([0.5, 0.5, 0.0], [0.4, 0.4, 0.2])",
    accept=_two_lists,
    hints=(
        "In the mean of k3, which of its three terms can be wrong, and what must be true for it to be right?",
        "The mean of the ratio p/q over samples of q is the mass that p gives to what q can write. Let q leave out a "
        "part of p.",
        "With a mass delta of p where q is 0, E[k3] = KL - delta: take delta well below 1, and p/(1 - delta) as q elsewhere.",
    ),
    explanation="E_q[p/q] is the sum of p over the responses that q can write, so E[k3] = KL - delta with delta the "
    "mass of p outside. If q is p cut and rescaled, the KL is -log(1 - delta), which for a small delta is delta and little "
    "more: k3 loses nearly all of it. For delta = 0.2 the KL is 0.2231 and E[k3] is 0.0231. Top-k and top-p sampling do "
    "exactly this; k1 contains no ratio and stays right, as long as it is given the probabilities of the sampler that "
    "wrote the responses.",
    probes=_hole_kind,
)


@sp.case("two distributions, with a finite KL(q || p) of at least 0.01", 1, "q must not write what p cannot")
def _(parts: Any) -> None:
    q, p = parts
    for law, name in ((q, "q"), (p, "p")):
        require(
            is_distribution(law), f"{name} = {show(law)} is no distribution: entries at least 0, sum {law.sum():.4g}"
        )
    kl = _kl_and_k3(q, p)[0]
    require(0.01 <= kl < math.inf, f"KL(q || p) is {kl:.4g}, expected a finite number of at least 0.01")


@sp.case("the mean of k3 over samples of q is below half the KL", 2, "where does E_q[p/q] = 1 fail?")
def _(parts: Any) -> None:
    q, p = parts
    require(is_distribution(q) and is_distribution(p), "q and p must be distributions")
    kl, k3_mean = _kl_and_k3(q, p)
    require(0.01 <= kl < math.inf, f"KL(q || p) is {kl:.4g}")
    require(
        k3_mean < kl / 2, f"KL(q || p) is {kl:.4g}, the mean of k3 is {k3_mean:.4g}, expected less than {kl / 2:.4g}"
    )


sp.plant(
    (
        "full-support",
        "q can write everything that p can: then E_q[p/q] = 1, and k3 is unbiased",
        ([0.5, 0.4, 0.1], [0.4, 0.4, 0.2]),
        "W-KL-6",
    ),
    (
        "rare-but-possible",
        "a small probability is not 0: k3 is noisy then, but its mean is still right",
        ([0.4999, 0.4999, 0.0002], [0.4, 0.4, 0.2]),
        "W-KL-6",
    ),
    (
        "both-zero",
        "q is 0 only where p is 0 too: no mass of p is missing",
        ([0.7, 0.3, 0.0], [0.4, 0.6, 0.0]),
        "W-KL-6",
    ),
    (
        "exchanged",
        "q writes what p cannot: the KL is infinite, and k3 says so",
        ([0.4, 0.4, 0.2], [0.5, 0.5, 0.0]),
        "common",
    ),
    (
        "not-one-half",
        "q does leave out a part of p, but too little of the divergence comes from there",
        ([0.9, 0.1, 0.0], [0.3, 0.6, 0.1]),
        "common",
    ),
    ("equal", "the two are equal: the KL and the mean of k3 are 0", ([0.5, 0.5, 0.0], [0.5, 0.5, 0.0]), "common"),
    (
        "hardly-cut",
        "the relation is right, but the KL is below 0.01: leave out more",
        ([0.5, 0.5, 0.0], [0.498, 0.498, 0.004]),
        "common",
    ),
    (
        "not-rescaled",
        "q must be a distribution: what is left after cutting is rescaled",
        ([0.4, 0.4, 0.0], [0.4, 0.4, 0.2]),
        "common",
    ),
    (
        "p-not-normalised",
        "the probabilities in p must sum to 1",
        ([0.5, 0.5, 0.0], [0.4, 0.4, 0.0]),
        "common",
    ),
)
sp.right("two responses", ((1, 0), (0.5, 0.5)))
sp.right("tensors, many responses", [tensor([0.2] * 5 + [0.0] * 5), tensor([0.1] * 10)])
sp.right("fractions", ([Fraction(1, 2), Fraction(1, 2), 0], [Fraction(1, 3)] * 3))
sp.right("more than half, not only cut and rescaled", ([0.6, 0.4, 0.0], [0.4, 0.4, 0.2]))


# -- samples of an older policy --------------------------------------------------------------------------


def off_policy_kl(logprobs, old_logprobs, ref_logprobs):  # type: ignore[no-untyped-def]
    """A loss of samples of old, with the mean gradient of KL(pi || ref). Three tensors of one shape -> that shape."""
    ratio = torch.exp(logprobs - old_logprobs).detach()
    return ratio * (logprobs - ref_logprobs.detach()).square() / 2


def _three_laws(seed: int, size: int = 5, far: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the policy in training, log-probabilities of an older one and of a reference."""
    logits, older, ref = (normal(size, seed=seed + i) for i in range(3))
    return logits.requires_grad_(), (logits + far * older).detach().log_softmax(0), ref.log_softmax(0)


def _loss_slope(f: Any, logits: Tensor, old: Tensor, ref: Tensor) -> Tensor:
    """Gradient in the logits of the mean loss over all samples, weighted with the older policy's probabilities."""
    losses = f(logits.log_softmax(0), old, ref)
    if not isinstance(losses, Tensor):
        raise Fail("the losses must be a torch tensor, so that they can be differentiated")
    expect_shape(losses, tuple(old.shape), "losses")
    return gradient((old.exp() * losses).sum(), logits, "gradient in the logits")


def _kl_slope(logits: Tensor, ref: Tensor) -> Tensor:
    x = logits.detach().double().requires_grad_()
    (slope,) = torch.autograd.grad(_kl(x.softmax(0), ref.double().exp()), x)
    return slope


def _far_laws() -> tuple[Tensor, Tensor, Tensor]:
    """The same where pi writes much that the older policy hardly writes: ratios of 900, 11 and 0.002."""
    pi, old, ref = tensor([0.45, 0.548, 0.002]), tensor([0.0005, 0.05, 0.9495]), tensor([0.002, 0.9, 0.098])
    return pi.log().requires_grad_(), old.log(), ref.log()


def _off_probe(f: Any) -> list[Any]:
    found: list[Any] = []
    for logits, old, ref in (_three_laws(31), _three_laws(34, far=0.0), _far_laws()):
        old, ref = old.requires_grad_(), ref.requires_grad_()
        losses = f(logits.log_softmax(0), old, ref)
        if not isinstance(losses, Tensor):
            return ["no tensor"]
        slope = gradient_or_none((old.detach().exp() * losses).sum(), logits)
        found += [list(losses.shape), slope]
        if same(slope, _kl_slope(logits, ref)):  # a wrong formula is named whether or not its constants are constant
            slopes = [gradient_or_none(losses, x) for x in (old, ref)]
            found += ["constant" if isinstance(x, str) or x.abs().max() == 0 else "not constant" for x in slopes]
    return [*found, list(f(*(tensor(x, requires_grad=x == -1.0) for x in (-1.0, -2.0, -3.0))).shape)]


op = Question(
    id="off_policy_kl",
    title="a KL loss on samples of an older policy",
    chapter=8,
    kind="property",
    theory=False,
    variable="off_policy_kl",
    reference=off_policy_kl,
    reference_source=source(off_policy_kl),
    hints=(
        "Write the gradient of KL(pi || ref) as a mean over pi of something times grad log pi. How does it become a "
        "mean over old?",
        "It is E_pi[l grad log pi] = E_old[(pi/old) l grad log pi] with l = log(pi/ref). Which loss has the slope "
        "(pi/old) l in log pi, and in which ones must the ratio be constant, or not?",
        "(pi/old) l^2/2 with the ratio detached; or (pi/old) times k1 or k3 with the ratio differentiated.",
    ),
    explanation="The gradient of KL(pi || ref) is E_pi[l grad log pi] = E_old[(pi/old) l grad log pi]. The detached ratio times k2 has exactly "
    "the slope (pi/old) l. k1 and k3 are values, whose mean over pi is the KL for every pi: E_old[(pi/old) k] is the KL as a function of pi, and "
    "its gradient needs the derivative of the ratio, which stands for how pi would choose the samples. Detached, it leaves the gradient that k has on fixed samples of pi: 0 for "
    "k1, that of KL(ref || pi) for k3. With k2 a differentiated ratio gives the gradient of E_pi[k2], which is not the KL.",
    probes=_off_probe,
)


@op.case("samples of the policy itself: the gradient of KL(pi || ref)", 1, "the ratio is 1, but may have a slope")
def _(f: Any) -> None:
    for seed in (41, 44):
        logits, old, ref = _three_laws(seed, far=0.0)
        got = _loss_slope(f, logits, old, ref)
        expect_close(got, _kl_slope(logits, ref), "mean gradient over all samples, old = pi")


@op.case("samples of an older policy: still the gradient of KL(pi || ref)", 2, "E_old[(pi/old) x] = E_pi[x]")
def _(f: Any) -> None:
    for seed, far in ((47, 0.3), (50, 1.0), (53, 2.0)):
        logits, old, ref = _three_laws(seed, far=far)
        got = _loss_slope(f, logits, old, ref)
        expect_close(got, _kl_slope(logits, ref), "mean gradient over all samples, weighted with old")

    logits, old, ref = _far_laws()
    got = _loss_slope(f, logits, old, ref)
    expect_close(got, _kl_slope(logits, ref), "mean gradient over all samples, pi/old = 900, 11 and 0.002")


@op.case("what the older policy and the reference say is constant", 1, "detach what is not being trained")
def _(f: Any) -> None:
    logits, old, ref = _three_laws(56)
    old, ref = old.requires_grad_(), ref.requires_grad_()
    losses = f(logits.log_softmax(0), old, ref)
    slope = gradient(losses, logits, "gradient in the logits")
    require(slope.abs().max() > 1e-6, "the gradient in the logits is 0")
    expect_constant(losses, "old_logprobs", old)
    expect_constant(losses, "ref_logprobs", ref)


@op.case("one loss per sample, from its own three log-probabilities", 1, "averaging is the caller's choice")
def _(f: Any) -> None:
    logprobs, old, ref = (-normal(2, 3, seed=seed).abs() - 0.2 for seed in (61, 62, 63))
    logprobs = logprobs.requires_grad_()
    got = as_tensor(f(logprobs, old, ref), "losses")
    expect_shape(got, (2, 3), "losses")
    alone = as_tensor(f(logprobs[1:, :1], old[1:, :1], ref[1:, :1]), "loss")
    expect_close(alone, got[1:, :1], "sample [1, 0] alone against inside the batch")
    require(got.max() > got.min() + 1e-3, "all samples have the same loss")
    one = as_tensor(f(*(tensor(x, requires_grad=x == -1.0) for x in (-1.0, -2.0, -3.0))), "loss")
    expect_shape(one, (), "loss of one sample without axes")


def _off(
    estimate: Callable[[Tensor], Tensor],
    ratio: Callable[[Tensor], Tensor] = lambda d: d.exp(),
    detached: bool = True,
    constants: bool = True,
) -> Callable[..., Tensor]:
    """A ratio, a function of log(pi/old), times an estimate, a function of l = log(pi/ref)."""

    def f(logprobs: Tensor, old_logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
        old, ref = (x.detach() if constants else x for x in (old_logprobs, ref_logprobs))
        weight = ratio(logprobs - old)
        return (weight.detach() if detached else weight) * estimate(logprobs - ref)

    return f


def _k3_of_l(x: Tensor) -> Tensor:
    return torch.expm1(-x) + x


op.plant(
    (
        "k3-without-ratio",
        "without the ratio k3 has neither the samples of pi nor the gradient of KL(pi || ref)",
        _off(_k3_of_l, torch.ones_like),
        "W-KL-7",
    ),
    (
        "k2-without-ratio",
        "the samples are old's: without the ratio the mean runs over the wrong policy",
        _off(_k2_of, torch.ones_like),
        "common",
    ),
    (
        "k1-without-ratio",
        "k1 has the slope 1 in log pi, whatever the reference says: it contains nothing of the KL's gradient",
        _off(_k1_of, torch.ones_like),
        "W-KL-7",
    ),
    (
        "k3-detached-ratio",
        "a detached ratio corrects the value of k3, not its gradient: differentiate the ratio, too",
        _off(_k3_of_l),
        "W-KL-10",
    ),
    (
        "k1-detached-ratio",
        "with a detached ratio the mean gradient of k1 is E_pi[grad log pi] = 0: differentiate the ratio, too",
        _off(_k1_of),
        "W-KL-10",
    ),
    (
        "k2-differentiated-ratio",
        "with the ratio differentiated this is the gradient of E_pi[k2], and that is not the KL: with k2 it is detached",
        _off(_k2_of, detached=False),
        "common",
    ),
    (
        "k2-inverse-ratio",
        "the ratio is pi over old, the policy in training over the one that wrote the samples",
        _off(_k2_of, lambda d: (-d).exp()),
        "common",
    ),
    (
        "k3-inverse-ratio",
        "the ratio is pi/old, not old/pi",
        _off(_k3_of_l, lambda d: (-d).exp(), detached=False),
        "common",
    ),
    (
        "k2-clipped-ratio",
        "a clipped ratio is another weight: the mean gradient is biased",
        _off(_k2_of, lambda d: d.exp().clamp(0.8, 1.2)),
        "common",
    ),
    (
        "ratio-cut-at-100",
        "ratios above 100 are cut: they are rare under old, and the mean needs them",
        _off(_k2_of, lambda d: d.exp().clamp(max=100.0)),
        "common",
    ),
    (
        "log-ratio-cut-at-5",
        "the logarithm of the ratio is cut at 5, so large ratios are too small",
        _off(_k2_of, lambda d: d.clamp(-5.0, 5.0).exp()),
        "common",
    ),
    (
        "log-ratio-to-the-reference-cut-at-5",
        "log(pi/ref) is cut at 5: beyond that nothing pulls back any more",
        _off(lambda x: x.clamp(-5.0, 5.0).square() / 2),
        "common",
    ),
    (
        "one-axis-added",
        "the loss of a single sample must be one number: you gave it an axis",
        lambda n, o, r: torch.atleast_1d(off_policy_kl(n, o, r)),
        "common",
    ),
    (
        "k2-log-ratio",
        "the exp of the ratio is missing",
        _off(_k2_of, lambda d: d),
        "common",
    ),
    (
        "k2-without-half",
        "twice too large: k2 has the factor 1/2, which cancels the 2 of the square",
        _off(lambda x: x.square()),
        "common",
    ),
    (
        "k2-of-the-older-policy",
        "the reference is missing: this is the gradient of KL(pi || old)",
        lambda n, o, r: (n - o).exp().detach() * (n - o.detach()).square() / 2,
        "common",
    ),
    (
        "k3-of-the-older-policy",
        "the reference is missing: this is k3 between pi and old, which keeps pi near the sampler",
        lambda n, o, r: _k3_of_l(n - o.detach()),
        "common",
    ),
    (
        "ratio-to-the-reference",
        "the ratio must have old below the line, the policy that wrote the samples",
        lambda n, o, r: (n - r).exp().detach() * (n - r.detach()).square() / 2,
        "common",
    ),
    ("sign", "the sign: going down must bring pi closer to the reference", _off(lambda x: -_k2_of(x)), "common"),
    (
        "nothing-detached-k3",
        "the formula is right; old_logprobs and ref_logprobs are constants and must be detached",
        _off(_k3_of_l, detached=False, constants=False),
        "common",
    ),
    (
        "reference-with-gradient",
        "the formula is right; ref_logprobs is a constant and must be detached",
        _off(_k2_of, constants=False),
        "common",
    ),
    (
        "no-gradient",
        "everything is detached: no gradient reaches the policy",
        lambda n, o, r: off_policy_kl(n.detach(), o, r),
        "common",
    ),
    (
        "mean",
        "one loss per sample: averaging is the caller's choice",
        lambda n, o, r: off_policy_kl(n, o, r).mean(),
        "common",
    ),
)
op.right("k3, with the ratio differentiated", _off(_k3_of_l, detached=False))
op.right("k1, with the ratio differentiated", _off(_k1_of, detached=False))
op.right(
    "a policy-gradient loss with the log-ratio as the weight, float64",
    lambda n, o, r: (((n - o).exp() * (n - r)).detach() * n).double(),
)
op.right(
    "probabilities instead of their logarithms",
    lambda n, o, r: n.exp() / o.detach().exp() * (r.detach().exp() / n.exp() - 1 - (r.detach() - n)),
)


# -- what an early token does to later ones --------------------------------------------------------------


def early_token(p, c):  # type: ignore[no-untyped-def]
    """KL of whole responses, its gradient in the first token's logits, the token loss's. -> number, (2,), (2,)."""
    after_a = 2 * c * math.tanh(c)  # KL of the second token after a
    slope = p * (1 - p) * after_a
    return p * after_a, [slope, -slope], [0.0, 0.0]


def _tree(p: float, c: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """First token's logits; log-probabilities of the first and second tokens, the reference's, under (2,), (2, 2)."""
    root = tensor([p, 1 - p], dtype=torch.float64).log().requires_grad_()
    after = tensor([[c, -c], [0.3, -0.2]], dtype=torch.float64).log_softmax(1)
    ref_after = tensor([[-c, c], [0.3, -0.2]], dtype=torch.float64).log_softmax(1)
    return root, root.log_softmax(0), after, root.detach().log_softmax(0), ref_after


def _whole_kl(p: float, c: float) -> tuple[Tensor, Tensor]:
    """KL over the four responses, and its gradient in the first token's logits."""
    root, first, after, ref_first, ref_after = _tree(p, c)
    law, ref_law = (first[:, None] + after).flatten(), (ref_first[:, None] + ref_after).flatten()
    kl = (law.exp() * (law - ref_law)).sum()
    return kl.detach(), torch.autograd.grad(kl, root)[0]


def _token_loss_slope(p: float, c: float) -> Tensor:
    """Gradient at the first token of the sum of both tokens' exact KLs, the four responses held fixed."""
    root, first, after, ref_first, ref_after = _tree(p, c)
    chance = (first[:, None] + after).exp().detach()
    at_root = (first.exp() * (first - ref_first)).sum()
    at_second = (after.exp() * (after - ref_after)).sum(1)
    return torch.autograd.grad((chance * (at_root + at_second[:, None])).sum(), root)[0]


_TREES = ((0.5, 3.0), (0.2, 1.0), (0.7, 0.5), (0.9, 2.0))


def _three_parts(f: Any, p: float, c: float) -> list[Tensor]:
    names = ("KL", "gradient of the KL", "gradient of the token loss")
    got = unpack(f(p, c), 3, "early_token returns (KL, gradient of the KL, gradient of the token loss)")
    parts = [as_tensor(x, name) for x, name in zip(got, names, strict=True)]
    for x, name, shape in zip(parts, names, ((), (2,), (2,)), strict=True):
        expect_shape(x, shape, name)
    return parts


et = Question(
    id="early_token",
    title="what a KL loss on every token does not see",
    chapter=8,
    kind="symbolic",
    theory=True,
    variable="early_token",
    reference=early_token,
    reference_source=source(early_token),
    hints=(
        "In which of the four responses do the policies differ? By what is that part of the sum multiplied?",
        "KL of whole responses = KL at the first token + p times KL after a. The first token's logits enter the second "
        "term through p. In the token loss the responses are held fixed, so there p is a number.",
        "With K = 2 c tanh(c): KL = p K, gradient p (1 - p) K times (1, -1); the token loss has the gradient (0, 0).",
    ),
    explanation="After a the probabilities are sigma(2c) and sigma(-2c), exchanged in the reference, so the KL there is "
    "K = 2c tanh(c), and the KL of whole responses is p K. Choosing a less often lowers it: dp/dz = p (1 - p) (1, -1) in the first "
    "token's logits. The loss on every token takes the first tokens as they were sampled and sees there two "
    "distributions that agree: gradient 0. For p = 1/2 and c = 3 the KL is 2.9852 and its gradient (1.4926, -1.4926), against (0, 0). "
    "The log-ratios of all later tokens as a weight of this one's log pi, a reward-to-go, give the whole gradient.",
    probes=lambda f: [list(unpack(f(p, c), 3, "probe")) for p, c in _TREES[1:]],
)


@et.case("the KL of whole responses, from all four", 1, "the policies differ only after a")
def _(f: Any) -> None:
    for p, c in _TREES:
        want = _whole_kl(p, c)[0]
        expect_close(_three_parts(f, p, c)[0], want, f"KL at p = {p:g}, c = {c:g}", rtol=2e-3, atol=6e-4)


@et.case("its gradient in the first token's logits, by autograd", 2, "how does the probability of a change with them?")
def _(f: Any) -> None:
    for p, c in _TREES:
        want = _whole_kl(p, c)[1]
        got = _three_parts(f, p, c)[1]
        expect_close(got, want, f"gradient of the KL at p = {p:g}, c = {c:g}", rtol=2e-3, atol=6e-4)


@et.case("the gradient of the token loss, the responses held fixed", 1, "do the two agree on the first token?")
def _(f: Any) -> None:
    for p, c in _TREES:
        _, true, token = _three_parts(f, p, c)
        require(true.abs().max() > 1e-3, "your gradient of the KL is 0, too")
        want, what = _token_loss_slope(p, c), f"gradient of the token loss at p = {p:g}, c = {c:g}"
        expect_close(token, want, what, rtol=2e-3, atol=6e-4, tell_expected=False)


def _early(
    after_a: Callable[[float], float] = lambda c: 2 * c * math.tanh(c),
    kl: Callable[[float, float], float] = lambda p, k: p * k,
    true: Callable[[float, float], list[float]] = lambda p, k: [p * (1 - p) * k, -p * (1 - p) * k],
    token: Callable[[float, float], list[float]] = lambda p, k: [0.0, 0.0],
) -> Callable[..., Any]:
    def f(p: float, c: float) -> Any:
        k = after_a(c)
        return kl(p, k), true(p, k), token(p, k)

    return f


def _both(p: float, k: float) -> list[float]:
    return [p * (1 - p) * k, -p * (1 - p) * k]


def _at_the_branch(p: float, c: float) -> Any:
    high = 1 / (1 + math.exp(-2 * c))
    slope = p * high * (1 - high) * 4 * c
    return 2 * p * c * math.tanh(c), [slope, -slope], [0.0, 0.0]


et.plant(
    (
        "covers-everything",
        "the token loss does not have this gradient: it takes the first tokens as they were sampled, and there the two agree",
        _early(token=_both),
        "W-KL-8",
    ),
    (
        "nothing-at-the-first-token",
        "the two agree on the first token, but choosing a more often leads more often to where they differ",
        _early(true=lambda p, k: [0.0, 0.0]),
        "W-KL-8",
    ),
    (
        "exchanged",
        "the two gradients are exchanged: the token loss is the one that misses it",
        _early(true=lambda p, k: [0.0, 0.0], token=_both),
        "W-KL-8",
    ),
    (
        "half-of-it",
        "nothing of this gradient is in the token loss at the first token, not even a half",
        _early(token=lambda p, k: [x / 2 for x in _both(p, k)]),
        "W-KL-8",
    ),
    (
        "kl-unweighted",
        "the second token follows a with probability p only",
        _early(kl=lambda p, k: k),
        "common",
    ),
    (
        "p-is-one-half",
        "you took p = 1/2; p is an argument",
        _early(kl=lambda p, k: k / 2, true=lambda p, k: [k / 4, -k / 4]),
        "common",
    ),
    (
        "normaliser-missing",
        "the slope of p in the logits is p (1 - p), not p",
        _early(true=lambda p, k: [p * k, -p * k]),
        "common",
    ),
    (
        "in-the-probability",
        "this is the slope in p itself; the logits are asked for",
        _early(true=lambda p, k: [k, -k]),
        "common",
    ),
    (
        "one-side",
        "a higher logit of b makes a rarer: the entries of a gradient in logits sum to 0",
        _early(true=lambda p, k: [p * (1 - p) * k, 0.0]),
        "common",
    ),
    (
        "sign",
        "the sign: a higher logit of a raises the KL",
        _early(true=lambda p, k: [-x for x in _both(p, k)]),
        "common",
    ),
    (
        "logit-gap",
        "the logits c and -c lie 2c apart: the probability is sigma(2c)",
        _early(after_a=lambda c: c * math.tanh(c / 2)),
        "common",
    ),
    (
        "likely-token-only",
        "this is the log-ratio of the likelier token; the other one enters with the opposite sign",
        _early(after_a=lambda c: 2 * c),
        "common",
    ),
    (
        "half-kl",
        "the log-ratio after a is 2c, not c",
        _early(after_a=lambda c: c * math.tanh(c)),
        "common",
    ),
    (
        "per-token-mean",
        "the KL of a response is the sum over its tokens, not their mean",
        _early(kl=lambda p, k: p * k / 2),
        "common",
    ),
    (
        "at-the-branch",
        "this is the gradient in the second token's logits; those of the first are asked for",
        _at_the_branch,
        "common",
    ),
)


def _early_by_enumeration(p: float, c: float) -> Any:
    return (*_whole_kl(p, c), _token_loss_slope(p, c))


et.right("autograd, float64", _early_by_enumeration)
et.right(
    "reward-to-go: E[log-ratio of the second token times grad log pi of the first], numpy",
    lambda p, c: (lambda k: (p * k, k * p * (np.array([1.0, 0.0]) - np.array([p, 1 - p])), np.zeros(2)))(
        float(np.array([1, -1]) @ (1 / (1 + np.exp(np.array([-2.0, 2.0]) * c)))) * 2 * c
    ),
)
et.right("three decimals", lambda p, c: [np.round(x, 3) for x in early_token(p, c)])


# -- mean and variance of four estimates -----------------------------------------------------------------


def estimator_moments(first, ref_first, second, ref_second):  # type: ignore[no-untyped-def]
    """Means and variances of k1, k2, k3, full vocabulary. Two (V,), two (V, V) -> (4,), (4,)."""
    log_ratio_1, log_ratio_2 = (first - ref_first)[:, None], second - ref_second  # broadcast to (V, V): all responses
    kl_1 = (first.exp() * (first - ref_first)).sum()
    kl_2 = (second.exp() * log_ratio_2).sum(1, keepdim=True)  # one for each first token
    estimates = torch.stack(
        [
            log_ratio_1 + log_ratio_2,
            (log_ratio_1**2 + log_ratio_2**2) / 2,
            torch.expm1(-log_ratio_1) + log_ratio_1 + torch.expm1(-log_ratio_2) + log_ratio_2,
            (kl_1 + kl_2).expand_as(second),
        ]
    )
    chances = (first[:, None] + second).exp()
    means = (chances * estimates).sum((1, 2))
    variances = (chances * (estimates - means[:, None, None]) ** 2).sum((1, 2))
    return means, variances


def _two_tokens(seed: int, size: int = 3, spread: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities of the first and of the second tokens, of pi and of the reference."""
    first, second = normal(size, seed=seed), normal(size, size, seed=seed + 1)
    ref_first, ref_second = (
        x + spread * y for x, y in ((first, normal(size, seed=seed + 2)), (second, normal(size, size, seed=seed + 3)))
    )
    laws = [x.log_softmax(-1) for x in (first, ref_first, second, ref_second)]
    return laws[0], laws[1], laws[2], laws[3]


def _by_listing(law: Callable[..., Sequence[float]], world: tuple[Tensor, ...]) -> Tensor:
    """Mean and variance of each number that ``law`` gives for a response, over all responses listed one by one."""
    first, ref_first, second, ref_second = (x.double() for x in world)
    size = len(first)
    rows = []
    for a in range(size):
        for b in range(size):
            chance = math.exp(first[a] + second[a, b])
            rows.append((chance, law((first, second), (ref_first, ref_second), a, b)))
    means = [sum(chance * row[k] for chance, row in rows) for k in range(len(rows[0][1]))]
    variances = [sum(chance * (row[k] - mean) ** 2 for chance, row in rows) for k, mean in enumerate(means)]
    return torch.tensor([means, variances], dtype=torch.float64)


def _four_estimates(pi: tuple[Tensor, Tensor], ref: tuple[Tensor, Tensor], a: int, b: int) -> list[float]:
    pairs = [((pi[0][a] - ref[0][a]).item(), pi[0], ref[0]), ((pi[1][a, b] - ref[1][a, b]).item(), pi[1][a], ref[1][a])]
    return [
        sum(x for x, _, _ in pairs),
        sum(x * x / 2 for x, _, _ in pairs),
        sum(math.exp(-x) - 1 + x for x, _, _ in pairs),
        sum(_kl(p.exp(), q.exp()).item() for _, p, q in pairs),
    ]


def _whole_response_kl(world: tuple[Tensor, ...]) -> Tensor:
    first, ref_first, second, ref_second = (x.double() for x in world)
    return _kl((first[:, None] + second).exp().flatten(), (ref_first[:, None] + ref_second).exp().flatten())


def _two_rows(f: Any, world: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    got = unpack(f(*(x.clone() for x in world)), 2, "estimator_moments returns (means, variances)")
    means, variances = (as_tensor(x, name) for x, name in zip(got, ("means", "variances"), strict=True))
    expect_shape(means, (4,), "means")
    expect_shape(variances, (4,), "variances")
    return means, variances


em = Question(
    id="kl_estimators_moments",
    title="exact mean and variance of four estimates of the KL",
    chapter=8,
    kind="function",
    theory=False,
    variable="estimator_moments",
    reference=estimator_moments,
    reference_source=source(estimator_moments),
    hints=(
        "List the V^2 responses as a table. Which probability does each have under pi, and which value each estimate?",
        "k1, k2 and k3 belong to the sampled tokens, so each is a table (V, V). The full-vocabulary estimate takes the "
        "exact KL of the next token at each prefix that was visited: it depends on the first token only.",
        "chances = exp(first + second); mean = sum(chances * estimate); variance = sum(chances * (estimate - mean)^2).",
    ),
    explanation="The log-probability of a response is the sum of its tokens', so k1 has the mean KL(pi || ref) of whole responses. "
    "k3 of each token has the mean of that token's KL at every prefix, and so has the exact KL itself: all three means agree. k2's does "
    "not. The full-vocabulary estimate replaces k1 of each token by its mean over that token (Rao-Blackwell), which "
    "leaves the mean alone and takes that token's noise away; what remains is the noise of which prefixes were visited. It is 0 if all "
    "prefixes have the same KL.",
    probes=lambda f: [list(unpack(f(*_two_tokens(seed)), 2, "probe")) for seed in (71, 75)],
)


@em.case("k1, k3 and full vocabulary: the mean is the KL of whole responses", 2, "weigh each response with pi")
def _(f: Any) -> None:
    for seed, size in ((79, 3), (83, 4)):
        world = _two_tokens(seed, size)
        means = _two_rows(f, world)[0]
        want = _whole_response_kl(world)
        for k, name in ((0, "k1"), (2, "k3"), (3, "full vocabulary")):
            expect_close(means[k], want, f"mean of {name}, {size} words", rtol=1e-3)


@em.case("k2: the mean of half the squares of both tokens' log-ratios", 1, "square each token's, then add")
def _(f: Any) -> None:
    for seed, size in ((87, 3), (91, 4)):
        world = _two_tokens(seed, size)
        want = _by_listing(_four_estimates, world)[0, 1]
        expect_close(_two_rows(f, world)[0][1], want, f"mean of k2, {size} words", rtol=1e-3)


@em.case("the variances, over all responses", 2, "the mean square of the distance from the mean")
def _(f: Any) -> None:
    for seed, size in ((95, 3), (99, 4)):
        world = _two_tokens(seed, size)
        want = _by_listing(_four_estimates, world)[1]
        expect_close(_two_rows(f, world)[1], want, f"variances, {size} words", rtol=1e-3)


@em.case("full vocabulary: no noise where all prefixes have the same KL", 1, "what is still random in it?")
def _(f: Any) -> None:
    first, ref_first, second, ref_second = _two_tokens(107)
    same_after = (second[:1].expand(3, 3).clone(), ref_second[:1].expand(3, 3).clone())
    got = _two_rows(f, (first, ref_first, *same_after))[1]
    expect_close(got[3], 0.0, "variance of full vocabulary, all prefixes alike", atol=1e-4)
    require(got[0] > 1e-2, "the variance of k1 is 0, too")
    other = _two_rows(f, (first, ref_first, second, ref_second))[1]
    require(other[3] > 1e-3, "the variance of full vocabulary is 0 for different prefixes, too")


def _k3_token(x: Tensor) -> Tensor:
    return torch.expm1(-x) + x


def _full(first: Tensor, ref_first: Tensor, second: Tensor, ref_second: Tensor) -> Tensor:
    kl_1 = (first.exp() * (first - ref_first)).sum()
    return (kl_1 + (second.exp() * (second - ref_second)).sum(1, keepdim=True)).expand_as(second)


def _moments_with(
    k2: Callable[[Tensor, Tensor], Tensor] = lambda x, y: (x**2 + y**2) / 2,
    k3: Callable[[Tensor, Tensor], Tensor] = lambda x, y: _k3_token(x) + _k3_token(y),
    full: Callable[..., Tensor] = _full,
    chances: Callable[..., Tensor] = lambda first, ref_first, second, ref_second: (first[:, None] + second).exp(),
    spread: Callable[[Tensor, Tensor], Tensor] = lambda w, x: (w * (x - (w * x).sum((1, 2), keepdim=True)) ** 2).sum(
        (1, 2)
    ),
    scale: float = 1.0,
) -> Callable[..., Any]:
    def f(first: Tensor, ref_first: Tensor, second: Tensor, ref_second: Tensor) -> Any:
        world = (first, ref_first, second, ref_second)
        x, y = (first - ref_first)[:, None], second - ref_second
        table = scale * torch.stack([x + y, k2(x, y), k3(x, y), full(*world)])
        w = chances(*world)
        return (w * table).sum((1, 2)), spread(w, table)

    return f


def _full_forward(first: Tensor, ref_first: Tensor, second: Tensor, ref_second: Tensor) -> Tensor:
    return _full(ref_first, first, ref_second, second)


def _added_variances(first: Tensor, ref_first: Tensor, second: Tensor, ref_second: Tensor) -> Any:
    """Variance of the first token's estimate plus that of the second's, as if they were independent."""
    means, _ = estimator_moments(first, ref_first, second, ref_second)
    x, y = (first - ref_first)[:, None].expand_as(second), second - ref_second
    w = (first[:, None] + second).exp()
    total = torch.zeros(4)
    zero = torch.zeros_like(first)
    full_1 = _full(first, ref_first, second, second)
    full_2 = _full(zero - math.log(len(zero)), zero - math.log(len(zero)), second, ref_second)
    for part, full in ((x, full_1), (y, full_2)):
        table = torch.stack([part, part**2 / 2, _k3_token(part), full])
        total = total + (w * (table - (w * table).sum((1, 2), keepdim=True)) ** 2).sum((1, 2))
    return means, total


em.plant(
    (
        "k2-of-the-sum",
        "you squared the log-ratio of the response: here k2 is taken of every token and added",
        _moments_with(k2=lambda x, y: (x + y) ** 2 / 2),
        "common",
    ),
    (
        "k3-of-the-sum",
        "this is k3 of the whole response, with the same mean and another variance: here it is taken of every token",
        _moments_with(k3=lambda x, y: _k3_token(x + y)),
        "common",
    ),
    (
        "both-of-the-sum",
        "k2 and k3 are taken of every token and added, not of the response's log-ratio",
        _moments_with(k2=lambda x, y: (x + y) ** 2 / 2, k3=lambda x, y: _k3_token(x + y)),
        "common",
    ),
    (
        "k2-for-the-kl",
        "k2 does not have the mean of k1: it is biased",
        lambda *w: (estimator_moments(*w)[0][[0, 0, 2, 3]], estimator_moments(*w)[1]),
        "W-KL-1",
    ),
    ("k2-without-half", "k2 has the factor 1/2", _moments_with(k2=lambda x, y: x**2 + y**2), "common"),
    (
        "inverse-ratio",
        "the ratio in k3 is ref/pi, which has mean 1 under pi",
        _moments_with(k3=lambda x, y: _k3_token(-x) + _k3_token(-y)),
        "common",
    ),
    (
        "uniform",
        "all responses weighted alike: their chances are pi's",
        _moments_with(chances=lambda a, b, c, d: torch.full_like(c, 1 / c.numel())),
        "common",
    ),
    (
        "over-the-reference",
        "the responses come from pi; you weighted them with the reference's probabilities",
        _moments_with(chances=lambda a, b, c, d: (b[:, None] + d).exp()),
        "common",
    ),
    (
        "second-token-only",
        "the chance of a response has two factors; you left out the first token's",
        _moments_with(chances=lambda a, b, c, d: c.exp() / len(c)),
        "common",
    ),
    (
        "first-token-transposed",
        "the first token is the row of the second's table: you took it for the column",
        lambda first, ref_first, second, ref_second: estimator_moments(
            first, ref_first, second.T.log_softmax(1), ref_second.T.log_softmax(1)
        ),
        "common",
    ),
    (
        "second-moment",
        "this is the mean of the squares: subtract the square of the mean",
        _moments_with(spread=lambda w, x: (w * x**2).sum((1, 2))),
        "common",
    ),
    (
        "standard-deviation",
        "these are standard deviations, the square roots of the variances",
        _moments_with(spread=lambda w, x: (w * (x - (w * x).sum((1, 2), keepdim=True)) ** 2).sum((1, 2)).sqrt()),
        "common",
    ),
    (
        "variance-of-the-table",
        "an unweighted variance of the table: responses have different probabilities",
        _moments_with(spread=lambda w, x: x.flatten(1).var(1, correction=0)),
        "common",
    ),
    (
        "full-is-exact",
        "full vocabulary is exact at each prefix, but the prefix is sampled: its variance is 0 only where all are alike",
        _moments_with(
            full=lambda a, b, c, d: ((a[:, None] + c).exp() * (a - b)[:, None].add(c - d)).sum().expand_as(c)
        ),
        "common",
    ),
    (
        "full-as-k1",
        "full vocabulary does not look at the sampled second token: it is the exact KL after the first one",
        _moments_with(full=lambda a, b, c, d: (a - b)[:, None] + c - d),
        "common",
    ),
    (
        "full-first-token-only",
        "the second token's KL is missing in full vocabulary",
        _moments_with(full=lambda a, b, c, d: (a.exp() * (a - b)).sum().expand_as(c)),
        "W-KL-8",
    ),
    (
        "full-first-token-sampled",
        "in full vocabulary the first token's KL is exact, too",
        _moments_with(
            full=lambda a, b, c, d: ((a - b)[:, None] + (c.exp() * (c - d)).sum(1, keepdim=True)).expand_as(c)
        ),
        "common",
    ),
    (
        "full-other-direction",
        "full vocabulary sums KL(pi || ref) at each prefix, not KL(ref || pi)",
        _moments_with(full=_full_forward),
        "common",
    ),
    (
        "per-token-mean",
        "each estimate is the sum over the tokens, not their mean",
        _moments_with(scale=0.5),
        "common",
    ),
    (
        "variances-added",
        "variances of two tokens may be added only if they are independent; the second one depends on the first",
        _added_variances,
        "common",
    ),
)


def _moments_by_listing(first: Tensor, ref_first: Tensor, second: Tensor, ref_second: Tensor) -> Any:
    return _by_listing(_four_estimates, (first, ref_first, second, ref_second))


def _moments_by_numpy(first: Tensor, ref_first: Tensor, second: Tensor, ref_second: Tensor) -> Any:
    a, b, c, d = (x.double().numpy() for x in (first, ref_first, second, ref_second))
    chances = (np.exp(a)[:, None] * np.exp(c)).ravel()
    x, y = np.repeat(a - b, len(a)), (c - d).ravel()
    exact = np.exp(a) @ (a - b) + (np.exp(c) * (c - d)).sum(1)
    table = np.stack([x + y, x**2 / 2 + y**2 / 2, np.expm1(-x) + x + np.expm1(-y) + y, np.repeat(exact, len(a))])
    means = table @ chances
    return means, table**2 @ chances - means**2


em.right("all responses one by one", _moments_by_listing)
em.right("matrix form, mean of squares minus square of mean, numpy", _moments_by_numpy)


# -- statements about estimates of the KL ----------------------------------------------------------------

_FALSE = {2, 3, 4, 6, 9}

st = Question(
    id="kl_statements",
    title="find the false statements about estimates of the KL",
    chapter=8,
    kind="find the false lines",
    theory=True,
    variable="false_lines",
    reference=_FALSE,
    reference_source="false_lines = {2, 3, 4, 6, 9}",
    accept=lines(9, "line", "{1, 9}"),
    hints=(
        "Put a policy over three responses into every line with an equation: both sides are finite sums.",
        "Ask of every mean whether it is right for each pi (a value), or whether its gradient on fixed samples is. And "
        "what does a rollout have in abundance, samples or sums over all responses?",
        "E[l] = KL; E[l^2]/2 - KL = E[l^2]/2 - E[l]; grad KL = E[l grad log pi]; E[grad log pi] = 0.",
    ),
    explanation="Line 2: samples of pi are what a rollout produces; the sum has one term for each of the V^T responses. Line "
    "3: the left side is E[l^2]/2 - E[l], which is half the variance only if (E l)^2 = 2 E l. Line 4: the mean of l has no "
    "bias, so what is subtracted becomes one, -(n - 1)/(2 n^2) Var l. Line 6: on fixed samples k3 has the gradient of KL(ref || pi). Line "
    "9: the sum of the tokens' gradients lacks what early tokens do to the prefixes of later ones. Lines 1, 5 and 8 are "
    "about values and hold; line 7 holds although l^2/2 is biased.",
    probes=lambda answer: answer,
)


@st.case("at least three lines are named, and none of them is true", 1, "put numbers into both sides of each line")
def _(found: Any) -> None:
    for line in sorted(found - _FALSE):
        require(False, f"line {line} is true")
    require(len(found) > 2, "more than two lines are false")


@st.case("all false lines are found, and only those", 2, "judge each line on its own")
def _(found: Any) -> None:
    missing = len(_FALSE - found)
    require(not missing, f"{missing} of {len(_FALSE)} false lines not found")
    extra = len(found - _FALSE)
    require(not extra, f"{extra} true {'line' if extra == 1 else 'lines'} among them")


st.plant(
    (
        "samples-missed",
        "line 2 is false: samples of pi are what a rollout produces; the sum over all responses is out of reach",
        _FALSE - {2},
        "W-KL-3",
    ),
    (
        "jensen-missed",
        "line 3 is false: E[l^2] - (E l)^2 is a variance, not the bias, which is E[l^2]/2 - E[l]",
        _FALSE - {3},
        "W-KL-4",
    ),
    (
        "correction-missed",
        "line 4 is false: the mean log-ratio has no bias, so what is subtracted becomes one",
        _FALSE - {4},
        "W-KL-5",
    ),
    (
        "jensen-and-correction-missed",
        "lines 3 and 4 are false: the variance is neither the bias of k2 nor a bias of k1",
        _FALSE - {3, 4},
        "W-KL-5",
    ),
    (
        "gradient-missed",
        "line 6 is false: a right value does not make a right gradient; on fixed samples it is that of KL(ref || pi)",
        _FALSE - {6},
        "W-KL-7",
    ),
    (
        "gradients-exchanged",
        "lines 6 and 7 are exchanged: the biased square has the gradient of KL(pi || ref)",
        _FALSE - {6} | {7},
        "W-KL-7",
    ),
    (
        "square-called-false",
        "line 7 is true: half the square is biased as a value, but its slope in log pi is l",
        _FALSE | {7},
        "common",
    ),
    (
        "tokens-missed",
        "line 9 is false: on fixed samples an early token is not told what it does to later ones",
        _FALSE - {9},
        "W-KL-8",
    ),
    (
        "tokens-called-false",
        "line 8 is true: the exact KL at the visited prefixes has the right mean; only its gradient lacks something",
        _FALSE | {8},
        "common",
    ),
    (
        "tokens-exchanged",
        "lines 8 and 9 are exchanged: the value is right, the gradient is not",
        _FALSE - {9} | {8},
        "W-KL-8",
    ),
    (
        "mean-called-false",
        "line 1 is true for every n: a mean of unbiased numbers is unbiased",
        _FALSE | {1},
        "common",
    ),
    (
        "k3-called-false",
        "line 5 is true where pi covers the reference, as it does here: E[e^(-l)] = 1",
        _FALSE | {5},
        "common",
    ),
)
st.right("a list", [9, 6, 4, 3, 2])
st.right("numpy integers", np.array([2, 3, 4, 6, 9]))


# -- a controller ----------------------------------------------------------------------------------------


def next_kl_coef(kl_coef, kl, target, num_sequences, horizon):  # type: ignore[no-untyped-def]
    """kl_coef after one update of the adaptive controller. Five numbers -> number."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_sequences / horizon)


kc = Question(
    id="kl_controller",
    title="a coefficient that seeks a KL",
    chapter=8,
    kind="function",
    theory=False,
    variable="next_kl_coef",
    reference=next_kl_coef,
    reference_source=source(next_kl_coef),
    hints=(
        "The KL is above the target. Should the penalty become dearer or cheaper?",
        "The relative error kl/target - 1 is cut to the range from -0.2 to 0.2, and acts in proportion to the number of "
        "sequences that were measured.",
        "kl_coef (1 + error num_sequences/horizon), with error = kl/target - 1 cut to [-0.2, 0.2].",
    ),
    explanation="Above the target the coefficient must grow, below it shrink, by a factor, so that a small one stays "
    "positive (as long as one update brings fewer than five horizons of sequences). The error is relative, so that 0.1 means 10% off for every target, and cut at 20%, so that a single measurement "
    "moves little. At the largest error the coefficient grows by 20% if a horizon of sequences comes in one update, and by "
    "a factor of nearly e^0.2 = 1.22 if they come in many small ones.",
    probes=lambda f: (
        [
            f(*args)
            for args in (
                (0.15, 6.6, 6.0, 64, 1000),
                (2.0, 9.0, 6.0, 100, 400),
                (0.5, -1.0, 3.0, 50, 700),
                (0.3, 2.7, 3.0, 10, 40),
                (1.0, 0.55, 0.5, 100, 1000),
                (1.0, 60.0, 6.0, 100, 1000),
                (1.0, -6.0, 6.0, 100, 1000),
                (1.0, 6.6, 6.0, 900, 400),
            )
        ]
        + [1e4 * f(1e-4, 6.6, 6.0, 100, 1000)]
    ),
)


def _coef(f: Any, *args: float) -> Tensor:
    got = as_tensor(f(*args), "kl_coef")
    expect_shape(got, (), "kl_coef")
    return got


@kc.case("above the target it grows, below it shrinks, on it it stays", 1, "which way must the penalty go?")
def _(f: Any) -> None:
    for kl_coef, target in ((0.15, 6.0), (2.0, 0.5)):
        for share, sign in ((1.1, 1), (0.9, -1), (3.0, 1), (0.0, -1)):
            got = _coef(f, kl_coef, share * target, target, 256, 10_000)
            require(
                sign * (got - kl_coef) > 1e-6 * kl_coef and got > 0,
                f"KL {share:g} times the target: kl_coef went from {kl_coef:g} to {got:.6g}",
            )
        on_it = _coef(f, kl_coef, target, target, 256, 10_000)
        expect_close(on_it, kl_coef, "kl_coef with the KL on the target", rtol=1e-6, atol=0)


@kc.case("in proportion to the relative error, to the sequences and to itself", 2, "kl/target - 1 has no unit")
def _(f: Any) -> None:
    for kl_coef, kl, target, count, horizon, want in (
        (1.0, 6.6, 6.0, 100, 1000, 1.01),
        (1.0, 5.4, 6.0, 100, 1000, 0.99),
        (1.0, 0.55, 0.5, 100, 1000, 1.01),
        (3.0, 6.6, 6.0, 100, 1000, 3.03),
        (1.0, 6.6, 6.0, 400, 1000, 1.04),
        (1.0, 6.6, 6.0, 100, 250, 1.04),
        (1.0, 6.3, 6.0, 1000, 1000, 1.05),
        (1.0, 6.6, 6.0, 500, 250, 1.2),
        (1e-4, 6.6, 6.0, 100, 1000, 1.01e-4),
        (1e-4, 5.4, 6.0, 100, 1000, 0.99e-4),
    ):
        what = f"kl_coef {kl_coef:g}, KL {kl:g}, target {target:g}, {count} sequences, horizon {horizon}"
        expect_close(_coef(f, kl_coef, kl, target, count, horizon), want, what, atol=0)


@kc.case("an error counts as 0.2 at most, in both directions", 1, "cut the error, not the coefficient")
def _(f: Any) -> None:
    for kl, want in ((60.0, 1.02), (7.3, 1.02), (4.5, 0.98), (-3.0, 0.98), (-6.0, 0.98), (-12.0, 0.98)):
        expect_close(_coef(f, 1.0, kl, 6.0, 100, 1000), want, f"kl_coef 1, KL {kl:g}, target 6")


def _cut(x: float, low: float = -0.2, high: float = 0.2) -> float:
    return min(max(x, low), high)


def _controller(error: Callable[[float, float], float]) -> Callable[..., float]:
    return lambda c, kl, target, n, horizon: c * (1 + error(kl, target) * n / horizon)


kc.plant(
    (
        "sign",
        "above the target the penalty must become dearer: the sign of the error",
        _controller(lambda kl, target: _cut(1 - kl / target)),
        "common",
    ),
    (
        "upside-down",
        "the error is kl/target - 1, not target/kl - 1",
        _controller(lambda kl, target: _cut(target / (kl or 1e-9) - 1)),
        "common",
    ),
    (
        "not-cut",
        "the error is not cut: one wild measurement moves everything",
        _controller(lambda kl, target: kl / target - 1),
        "common",
    ),
    (
        "cut-above-only",
        "the error is cut below -0.2, too",
        _controller(lambda kl, target: min(kl / target - 1, 0.2)),
        "common",
    ),
    (
        "cut-below-only",
        "the error is cut above 0.2, too",
        _controller(lambda kl, target: max(kl / target - 1, -0.2)),
        "common",
    ),
    (
        "cut-at-0",
        "below the target the coefficient must shrink: the lower end is -0.2, not 0",
        _controller(lambda kl, target: _cut(kl / target - 1, low=0.0)),
        "common",
    ),
    (
        "absolute-error",
        "divide the error by the target: a KL of 0.55 is 10% off a target of 0.5",
        _controller(lambda kl, target: _cut(kl - target)),
        "common",
    ),
    (
        "ratio-cut",
        "you cut the ratio kl/target to [0.8, 1.2] and forgot to subtract 1",
        _controller(lambda kl, target: _cut(kl / target, 0.8, 1.2)),
        "common",
    ),
    (
        "sign-of-the-error-only",
        "the size of the error counts, not only its sign",
        _controller(lambda kl, target: 0.2 * ((kl > target) - (kl < target))),
        "common",
    ),
    (
        "added",
        "the coefficient is multiplied: an added step takes a small one below 0",
        lambda c, kl, target, n, horizon: c + _cut(kl / target - 1) * n / horizon,
        "common",
    ),
    (
        "no-sequences",
        "the number of sequences is missing: a large batch counts for more",
        lambda c, kl, target, n, horizon: c * (1 + _cut(kl / target - 1) / horizon),
        "common",
    ),
    (
        "no-horizon",
        "sequences and horizon are missing: the error acts all at once",
        lambda c, kl, target, n, horizon: c * (1 + _cut(kl / target - 1)),
        "common",
    ),
    (
        "cut-after-scaling",
        "cut the error before it is multiplied with num_sequences/horizon",
        lambda c, kl, target, n, horizon: c * (1 + _cut((kl / target - 1) * n / horizon)),
        "common",
    ),
    (
        "horizon-upside-down",
        "a longer horizon makes the controller slower: divide by it",
        lambda c, kl, target, n, horizon: c * (1 + _cut(kl / target - 1) * horizon / n),
        "common",
    ),
    (
        "whole-horizons",
        "num_sequences // horizon is 0 for a batch below the horizon: divide with /",
        lambda c, kl, target, n, horizon: c * (1 + _cut(kl / target - 1) * (n // horizon)),
        "common",
    ),
    (
        "whole-horizons-at-least-one",
        "max(1, num_sequences // horizon) takes every small batch for a whole horizon: divide with /",
        lambda c, kl, target, n, horizon: c * (1 + _cut(kl / target - 1) * max(1, n // horizon)),
        "common",
    ),
    (
        "at-most-one-horizon",
        "num_sequences/horizon is not cut at 1: a batch of two horizons counts twice",
        lambda c, kl, target, n, horizon: c * (1 + _cut(kl / target - 1) * min(1, n / horizon)),
        "common",
    ),
    (
        "absolute-kl",
        "a measured KL can be negative, and is then below the target: take no absolute value",
        _controller(lambda kl, target: _cut(abs(kl) / target - 1)),
        "common",
    ),
    (
        "floor",
        "the coefficient has no smallest value: a factor never takes it to 0",
        lambda c, kl, target, n, horizon: max(next_kl_coef(c, kl, target, n, horizon), 1e-3),
        "common",
    ),
    (
        "factor-only",
        "this is the factor: multiply it with kl_coef",
        lambda c, kl, target, n, horizon: 1 + _cut(kl / target - 1) * n / horizon,
        "common",
    ),
    (
        "exponential",
        "the factor is 1 + x, not e^x; they agree for small steps",
        lambda c, kl, target, n, horizon: c * math.exp(_cut(kl / target - 1) * n / horizon),
        "common",
    ),
)
kc.right(
    "numpy's clip", lambda c, kl, target, n, horizon: c + c * n * np.clip((kl - target) / target, -0.2, 0.2) / horizon
)
kc.right("a tensor", lambda c, kl, target, n, horizon: c * (1 + tensor(kl / target - 1).clamp(-0.2, 0.2) * n / horizon))

CHAPTER: Sequence[Question] = (k3, kt, kb, lg, dr, sp, op, et, em, st, kc)
