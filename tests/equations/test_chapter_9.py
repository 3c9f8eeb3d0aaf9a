"""Every numbered equation of chapter 9, derived a second time: nothing here is imported from the book's package.

The inputs are this file's own. Best-of-n is held against the enumeration of all tuples of draws or all subsets of a
pool, divergences against their definition, derivatives against central differences, Gaussian worlds against quadrature.
"""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import mpmath
import numpy as np
import sympy as sp

from completeness import require_complete

REF = [Fraction(k, 20) for k in (3, 1, 6, 4, 2, 4)]
SCORES = [2, 5, -1, 2, 5, 0]  # two pairs of ties, one of them at the top
WORLDS = [(REF, SCORES), ([Fraction(1, 4)] * 4, [3, 1, 2, 0]), ([Fraction(1, 10), Fraction(9, 10)], [1, 0])]


def by_enumeration(ref: list[Fraction], scores: list[int], n: int) -> list[Fraction]:
    """Distribution of the first of the best among n independent draws, over all tuples, in exact fractions."""
    found = [Fraction(0)] * len(ref)
    for draws in itertools.product(range(len(ref)), repeat=n):
        best = max(draws, key=lambda y: scores[y])  # the first one in the order of drawing
        found[best] += math.prod((ref[y] for y in draws), start=Fraction(1))
    return found


def shares(ref: list[Fraction], scores: list[int]) -> tuple[list[Fraction], list[Fraction]]:
    """What scores no more, and what scores less, than each response."""
    at_most = [sum((p for p, t in zip(ref, scores, strict=True) if t <= s), Fraction(0)) for s in scores]
    less = [sum((p for p, t in zip(ref, scores, strict=True) if t < s), Fraction(0)) for s in scores]
    return at_most, less


def divergence(p: list[Fraction], q: list[Fraction]) -> float:
    return float(sum(mpmath.mpf(float(a)) * mpmath.log(float(a / b)) for a, b in zip(p, q, strict=True) if a > 0))


def test_best_of_n_is_what_the_tuples_of_draws_say() -> None:
    """(eq-oo-best): ref (F^n - G^n) / (F - G), ties included, in exact fractions."""
    for (ref, scores), n in itertools.product(WORLDS, (1, 2, 3, 4)):
        at_most, less = shares(ref, scores)
        formula = [p * (f**n - g**n) / (f - g) for p, f, g in zip(ref, at_most, less, strict=True)]
        assert formula == by_enumeration(ref, scores, n)
        assert all(x <= n * p for x, p in zip(formula, ref, strict=True))


def test_divergence_of_the_largest_of_n_uniform_ranks() -> None:
    """(eq-oo-bound): log n - (n-1)/n, by quadrature of the density of a maximum, taken from its distribution."""
    v, n = sp.symbols("v n", positive=True)
    density = sp.lambdify((v, n), sp.diff(v**n, v), "mpmath")  # P(all n ranks below v) = v^n
    for count in (2, 3, 10, 64):
        value = mpmath.quad(lambda x, m=count: density(x, m) * mpmath.log(density(x, m)), [0, 0.5, 0.9, 1])
        assert abs(value - (math.log(count) - (count - 1) / count)) < 1e-8


def test_what_the_bound_has_too_much_is_the_divergence_within_the_steps() -> None:
    """(eq-oo-gap): the bound minus the enumerated KL equals the sum over distinct scores, each term positive."""
    for (ref, scores), n in itertools.product(WORLDS, (2, 3, 4)):
        missing = math.log(n) - (n - 1) / n - divergence(by_enumeration(ref, scores, n), ref)
        at_most, less = shares(ref, scores)
        terms = []
        for f, g in sorted(set(zip(at_most, less, strict=True))):
            step = float(f - g), float(f**n - g**n)
            terms.append(
                mpmath.quad(
                    lambda v, s=step, m=n: m * v ** (m - 1) * mpmath.log(m * v ** (m - 1) * s[0] / s[1]),
                    [float(g), float(f)],
                )
            )
        assert min(terms) > 0
        assert abs(float(sum(terms)) - missing) < 1e-8


def test_win_rate_over_all_tuples_with_ties_counted_three_ways() -> None:
    """(eq-oo-win): E[G + tau (F - G)] under best-of-n, and the order of the three rates around n/(n+1)."""
    for (ref, scores), n in itertools.product(WORLDS, (1, 2, 3, 4)):
        rates = []
        at_most, less = shares(ref, scores)
        for tie in (Fraction(0), Fraction(1, 2), Fraction(1)):
            counted = Fraction(0)
            for *draws, other in itertools.product(range(len(ref)), repeat=n + 1):
                weight = math.prod((ref[y] for y in (*draws, other)), start=Fraction(1))
                best = max(scores[y] for y in draws)
                counted += weight * (1 if best > scores[other] else tie if best == scores[other] else 0)
            winner = by_enumeration(ref, scores, n)
            formula = [w * (g + tie * (f - g)) for w, f, g in zip(winner, at_most, less, strict=True)]
            assert sum(formula, Fraction(0)) == counted
            rates.append(counted)
        assert rates[0] <= rates[1] <= Fraction(n, n + 1) <= rates[2]
        assert n == 1 or rates[1] < Fraction(n, n + 1)


def tilted(ref: np.ndarray, proxy: np.ndarray, inverse_price: float) -> np.ndarray:
    weights = ref * np.exp(inverse_price * proxy)
    return weights / weights.sum()


def test_slopes_along_the_path_are_covariance_and_variances() -> None:
    """(eq-oo-slopes): central differences in 1/beta of mean gold, mean proxy and KL of the normalised tilt."""
    draw = np.random.default_rng(17)
    ref, gold, noise = draw.dirichlet(np.ones(9)), draw.standard_normal(9), draw.standard_normal(9)
    proxy = gold + 2 * noise

    def places(x: float) -> np.ndarray:
        p = tilted(ref, proxy, x)
        return np.array([p @ gold, p @ proxy, p @ np.log(p / ref)])

    for x in (0.2, 0.9, 2.5):
        slope = (places(x + 1e-5) - places(x - 1e-5)) / 2e-5
        p = tilted(ref, proxy, x)
        pairs = [(a, b, pa * pb) for (a, pa), (b, pb) in itertools.product(enumerate(p), repeat=2)]
        # covariances as half the mean product of differences of two independent draws
        covariance = sum(w * (gold[a] - gold[b]) * (proxy[a] - proxy[b]) for a, b, w in pairs) / 2
        variance = sum(w * (proxy[a] - proxy[b]) ** 2 for a, b, w in pairs) / 2
        np.testing.assert_allclose(slope, [covariance, variance, x * variance], rtol=1e-7, atol=1e-9)


def test_gaussian_error_leaves_a_fixed_share_of_every_point() -> None:
    """(eq-oo-gauss): mean gold, mean proxy and KL of the tilted pair of Gaussians by quadrature, one dimension each."""
    for gold_sd, error_sd, x in ((1.0, 1.0, 0.7), (0.6, 1.4, 1.1), (2.0, 0.5, 0.3)):
        means, nats = [], 0.0
        for sd in (gold_sd, error_sd):  # the tilt of g + e by x factorises

            def law(t: float, sd: float = sd) -> float:
                return math.exp(-t * t / (2 * sd * sd)) / (sd * math.sqrt(2 * math.pi))

            span = np.linspace(-14 * sd, 14 * sd, 20_001)
            base = np.array([law(t) for t in span])
            p = base * np.exp(x * span)
            p /= np.trapezoid(p, span)
            means.append(np.trapezoid(p * span, span))
            inside = (p > 0) & (base > 0)
            nats += np.trapezoid(
                np.where(inside, p * np.log(np.where(inside, p / np.where(base > 0, base, 1), 1)), 0), span
            )
        gold, proxy, d = means[0], sum(means), math.sqrt(nats)
        reliability = gold_sd**2 / (gold_sd**2 + error_sd**2)
        np.testing.assert_allclose(gold, reliability * proxy, rtol=1e-6)
        np.testing.assert_allclose(proxy, math.hypot(gold_sd, error_sd) * math.sqrt(2) * d, rtol=1e-6)


def test_both_forms_start_alike_and_turn_where_their_slopes_vanish() -> None:
    """(eq-oo-forms): least squares recovers a and b from curves of either form and only from its own; their peaks."""
    a, b = 1.7, 0.4
    d = np.linspace(0.05, 3.0, 40)
    columns = {"best of n": np.stack([d, -d * d], 1), "policy": np.stack([d, -d * np.log(d)], 1)}
    for name, own in columns.items():
        (other,) = (x for key, x in columns.items() if key != name)
        curve = own @ [a, b]
        fitted, rest, *_ = np.linalg.lstsq(own, curve, rcond=None)
        np.testing.assert_allclose(fitted, [a, b])
        assert np.linalg.lstsq(other, curve, rcond=None)[1][0] > 1e-4 > rest.sum()
    x, alpha, beta = sp.symbols("x alpha beta", positive=True)
    for form, peak, height in (
        (x * (alpha - beta * x), alpha / (2 * beta), alpha**2 / (4 * beta)),
        (x * (alpha - beta * sp.log(x)), sp.exp(alpha / beta - 1), beta * sp.exp(alpha / beta - 1)),
    ):
        numbers = {alpha: a, beta: b}
        grid = np.linspace(1e-3, 60, 400_001)
        values = sp.lambdify(x, form.subs(numbers), "numpy")(grid)
        np.testing.assert_allclose(grid[values.argmax()], float(peak.subs(numbers)), rtol=1e-3)
        np.testing.assert_allclose(values.max(), float(height.subs(numbers)), rtol=1e-6)


def test_weights_of_a_pool_average_over_all_subsets() -> None:
    """(eq-oo-subsets): each sample's share of the wins, over all subsets of n of the pool, ties shared alike."""
    pool = [4, 1, 4, 0, 2, 2, 4]
    for n in range(1, len(pool) + 1):
        found = [Fraction(0)] * len(pool)
        for subset in itertools.combinations(range(len(pool)), n):
            best = max(pool[i] for i in subset)
            tied = [i for i in subset if pool[i] == best]
            for i in tied:
                found[i] += Fraction(1, len(tied) * math.comb(len(pool), n))
        for score, share in zip(pool, found, strict=True):
            at_most, less = sum(x <= score for x in pool), sum(x < score for x in pool)
            whole = math.comb(at_most, n) - math.comb(less, n)
            assert Fraction(whole, (at_most - less) * math.comb(len(pool), n)) == share


# ---------------------------------------------------------------- complete?

EQUATIONS: dict[str, Callable[..., None]] = {
    "eq-oo-best": test_best_of_n_is_what_the_tuples_of_draws_say,
    "eq-oo-bound": test_divergence_of_the_largest_of_n_uniform_ranks,
    "eq-oo-gap": test_what_the_bound_has_too_much_is_the_divergence_within_the_steps,
    "eq-oo-win": test_win_rate_over_all_tuples_with_ties_counted_three_ways,
    "eq-oo-slopes": test_slopes_along_the_path_are_covariance_and_variances,
    "eq-oo-gauss": test_gaussian_error_leaves_a_fixed_share_of_every_point,
    "eq-oo-forms": test_both_forms_start_alike_and_turn_where_their_slopes_vanish,
    "eq-oo-subsets": test_weights_of_a_pool_average_over_all_subsets,
}


def test_every_numbered_equation_of_the_page_has_its_test() -> None:
    """The labels of the page and those of the tests are the same, and each docstring names the one of its test."""
    require_complete("09_overoptimisation", EQUATIONS, globals())
