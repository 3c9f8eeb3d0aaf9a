"""Every numbered equation of chapter 7, derived a second time: nothing here is imported from the book's package.

The inputs are this file's own. Each test compares two values that were obtained in different ways: a formula of the
page against a numerical optimum, central differences, quadrature, symbolic algebra, or a data set that is enumerated.
"""

import itertools
import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import sympy as sp
import torch

from completeness import require_complete

Function = Callable[[torch.Tensor], torch.Tensor]


def rows(seed: int, *shape: int, spread: float = 1.0) -> torch.Tensor:
    """Numbers in double precision that depend on the seed alone."""
    return spread * torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def close(a, b, tolerance: float = 1e-9) -> bool:
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b))
    return bool(torch.allclose(a, b, rtol=0.0, atol=tolerance))


def slopes(function: Function, at: torch.Tensor, step: float = 1e-5) -> torch.Tensor:
    """The gradient by central differences."""
    out = torch.zeros_like(at)
    for i in range(at.numel()):
        move = torch.zeros_like(at)
        move[i] = step
        out[i] = (function(at + move) - function(at - move)) / (2 * step)
    return out


def lowest(function: Function, start: torch.Tensor) -> torch.Tensor:
    """Where the function is smallest: L-BFGS, then a few Newton steps (flat directions are left alone)."""
    x = start.clone().requires_grad_()
    search = torch.optim.LBFGS(
        [x], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        search.zero_grad()
        value = function(x)
        value.backward()
        return value

    search.step(closure)
    found = x.detach()
    for _ in range(4):
        slope = torch.autograd.functional.jacobian(function, found)
        bend = torch.autograd.functional.hessian(function, found)
        found = found - torch.linalg.pinv(bend, rtol=1e-10) @ slope
    assert float(torch.autograd.functional.jacobian(function, found).abs().max()) < 1e-10
    return found


def best_policy(scores: torch.Tensor, log_ref: torch.Tensor, beta: float) -> torch.Tensor:
    """Log-probabilities of the policy with the largest E[score] - beta KL(policy||ref), found by climbing."""

    def loss(logits: torch.Tensor) -> torch.Tensor:
        log_p = torch.log_softmax(logits, -1)
        return -(log_p.exp() * (scores - beta * (log_p - log_ref))).sum()

    return torch.log_softmax(lowest(loss, log_ref), -1)


LOG_REF = torch.log_softmax(rows(1, 2, 5), -1)  # two prompts, five responses each
SCORES = rows(2, 2, 5) + torch.tensor([[0.0], [2.0]])
BETA = 0.7
CLIMBED = torch.stack([best_policy(s, ref, BETA) for s, ref in zip(SCORES, LOG_REF, strict=True)])


def nll(margin: torch.Tensor) -> torch.Tensor:
    """-log sigma(margin), as the logarithm of a sum of two."""
    return torch.logaddexp(torch.zeros_like(margin), -margin)


# ---------------------------------------------------------------- from the best policy to a loss


def test_reward_from_the_policy_that_was_found_by_climbing() -> None:
    """(eq-dpo-reward): the best policy comes from an optimiser, Z from the sum over the responses in 30 digits."""
    for x in range(2):
        z = mpmath.fsum(
            mpmath.exp(a) * mpmath.exp(b / BETA) for a, b in zip(LOG_REF[x].tolist(), SCORES[x].tolist(), strict=True)
        )
        implied = BETA * (CLIMBED[x] - LOG_REF[x]) + BETA * float(mpmath.log(z))
        assert close(implied, SCORES[x], 1e-8)
        assert not close(BETA * (CLIMBED[x] - LOG_REF[x]), SCORES[x], 0.1)
    # what is added to all scores of a prompt leaves the policy where it was
    assert close(best_policy(SCORES[0] + 4.2, LOG_REF[0], BETA), CLIMBED[0], 1e-8)


@pytest.mark.parametrize(("winner", "loser"), [(0.3, -0.9), (-1.1, 1.4), (0.8, 0.8)])
def test_bradley_terry_is_the_winner_of_a_race_with_gumbel_noise(winner: float, loser: float) -> None:
    """(eq-dpo-bt): both forms against the quadrature of the probability that one noisy reward exceeds the other."""

    def density(noise: mpmath.mpf) -> mpmath.mpf:
        return mpmath.exp(-noise - mpmath.exp(-noise))

    def below(noise: mpmath.mpf) -> mpmath.mpf:
        return mpmath.exp(-mpmath.exp(-noise))

    race = mpmath.quad(lambda g: density(g) * below(g + winner - loser), [-8, -2, 0, 2, 6, 40])
    fraction = math.exp(winner) / (math.exp(winner) + math.exp(loser))
    assert fraction == pytest.approx(float(race), abs=1e-10)
    assert float(torch.sigmoid(torch.tensor(winner - loser, dtype=torch.float64))) == pytest.approx(
        float(race), abs=1e-10
    )


def test_log_z_cancels_within_a_prompt_and_not_across() -> None:
    """(eq-dpo-difference): by algebra from the normalised optimum, and for the policies found by climbing."""
    r = sp.symbols("r0:3", real=True)
    ref = sp.symbols("q0:3", positive=True)
    beta = sp.symbols("beta", positive=True)
    weights = [q * sp.exp(s / beta) for q, s in zip(ref, r, strict=True)]
    pi = [w / sum(weights) for w in weights]
    difference = beta * sp.log(pi[1] / ref[1]) - beta * sp.log(pi[2] / ref[2])
    assert sp.simplify(sp.expand_log(difference, force=True) - (r[1] - r[2])) == 0

    told = BETA * (CLIMBED - LOG_REF)
    for x, w, l in itertools.product(range(2), range(5), range(5)):
        assert close(told[x, w] - told[x, l], SCORES[x, w] - SCORES[x, l], 1e-8)
    # across prompts the two constants stay: they are the values of the two best policies
    values = (CLIMBED.exp() * (SCORES - BETA * (CLIMBED - LOG_REF))).sum(-1)
    gap = (told[0, 0] - told[1, 3]) - (SCORES[0, 0] - SCORES[1, 3])
    assert close(gap, values[1] - values[0], 1e-8)
    assert abs(float(gap)) > 0.5


RESPONSES = [(a, b) for a in range(3) for b in range(3)]  # two tokens each, three kinds


def response_log_probs(theta: torch.Tensor) -> torch.Tensor:
    """Two tokens, one after the other; the second row of logits is chosen by the first token."""
    table = torch.log_softmax(theta.reshape(4, 3), -1)
    return torch.stack([table[0, a] + table[1 + a, b] for a, b in RESPONSES])


THETA, THETA_REF = rows(3, 12), rows(4, 12)
PAIRS = [(0, 4), (8, 1), (2, 2), (5, 7), (3, 0), (0, 3)]  # winner, loser


def dpo(log_p: torch.Tensor, log_ref: torch.Tensor, pairs: list[tuple[int, int]], beta: float) -> torch.Tensor:
    """The loss of the page over the pairs of a data set."""
    w, l = (list(side) for side in zip(*pairs, strict=True))
    h = (log_p[w] - log_ref[w]) - (log_p[l] - log_ref[l])
    return -torch.nn.functional.logsigmoid(beta * h).mean()


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_loss_is_the_likelihood_of_the_labels_under_the_reward_whose_best_policy_this_is(beta: float) -> None:
    """(eq-dpo-loss): against the product of Bradley-Terry fractions, from products of token probabilities."""
    table, ref_table = (torch.softmax(t.reshape(4, 3), -1).tolist() for t in (THETA, THETA_REF))
    p = [mpmath.mpf(table[0][a]) * table[1 + a][b] for a, b in RESPONSES]
    q = [mpmath.mpf(ref_table[0][a]) * ref_table[1 + a][b] for a, b in RESPONSES]
    assert float(mpmath.fsum(p)) == pytest.approx(1.0, abs=1e-14)
    # a reward for which p is optimal, with a constant that nobody knows
    strength = [mpmath.exp(0.37) * (a / b) ** beta for a, b in zip(p, q, strict=True)]
    tilted = [b * s ** (1 / mpmath.mpf(beta)) for b, s in zip(q, strength, strict=True)]
    assert [float(t / mpmath.fsum(tilted)) for t in tilted] == pytest.approx([float(a) for a in p], abs=1e-13)
    likelihood = mpmath.fprod(strength[w] / (strength[w] + strength[l]) for w, l in PAIRS)
    loss = dpo(response_log_probs(THETA), response_log_probs(THETA_REF), PAIRS, beta)
    assert float(loss) == pytest.approx(float(-mpmath.log(likelihood) / len(PAIRS)), abs=1e-12)

    at_ref = dpo(response_log_probs(THETA_REF), response_log_probs(THETA_REF), PAIRS, beta)
    assert float(at_ref) == pytest.approx(math.log(2), abs=1e-14)


# ---------------------------------------------------------------- the gradient


@pytest.mark.parametrize("beta", [0.2, 1.5])
def test_gradient_is_a_weight_times_a_difference_of_scores(beta: float) -> None:
    """(eq-dpo-gradient): against central differences; the weight is the probability of the wrong order."""
    log_ref = response_log_probs(THETA_REF)
    true = slopes(lambda t: dpo(response_log_probs(t), log_ref, PAIRS, beta), THETA)
    log_p = response_log_probs(THETA)
    scores = torch.autograd.functional.jacobian(response_log_probs, THETA)
    strength = (log_p - log_ref).exp() ** beta
    formula, upside_down = torch.zeros_like(THETA), torch.zeros_like(THETA)
    for w, l in PAIRS:
        wrong = strength[l] / (strength[l] + strength[w])
        formula -= beta * wrong * (scores[w] - scores[l]) / len(PAIRS)
        upside_down -= beta * (1 - wrong) * (scores[w] - scores[l]) / len(PAIRS)
    assert close(formula, true, 1e-8)
    assert not close(upside_down, true, 1e-2)


# ---------------------------------------------------------------- unlimited comparisons


def population(log_p: torch.Tensor, log_ref: torch.Tensor, p: torch.Tensor, beta: float) -> torch.Tensor:
    """The page's sum over all ordered pairs."""
    told = beta * (log_p - log_ref)
    return (p * nll(told[:, None] - told[None, :])).sum() / len(log_p) ** 2


def test_population_loss_is_in_proportion_to_the_mean_over_a_data_set_with_exact_shares() -> None:
    """(eq-dpo-population): scores whose odds are whole numbers, and a data set that has just these shares of labels.

    Every ordered couple is shown 60 times. A label occurs in two orders of showing, so the mean over the labels is
    twice the page's sum.
    """
    strength = [1, 2, 3]  # exp(score); i beats j in strength_i / (strength_i + strength_j) of the comparisons
    log_p, log_ref = torch.log_softmax(rows(5, 3), -1), torch.log_softmax(rows(6, 3), -1)
    labels: list[tuple[int, int]] = []
    for first, second in itertools.product(range(3), range(3)):
        wins = sp.Rational(60 * strength[first], strength[first] + strength[second])
        assert wins.is_integer
        labels += [(first, second)] * int(wins) + [(second, first)] * (60 - int(wins))
    assert len(labels) == 9 * 60
    beta = 0.8
    s = torch.tensor(strength, dtype=torch.float64).log()
    page = population(log_p, log_ref, torch.sigmoid(s[:, None] - s[None, :]), beta)
    assert close(2 * page, dpo(log_p, log_ref, labels, beta), 1e-12)


@pytest.mark.parametrize("beta", [0.4, 1.0, 2.5])
def test_population_optimum_is_the_optimum_of_rlhf(beta: float) -> None:
    """(eq-dpo-population-optimum): by algebra for one pair, and two optimisers on two objectives for all pairs."""
    margin = sp.symbols("A", real=True)
    p = sp.symbols("p", positive=True)
    rest = sp.symbols("u", positive=True)  # p = 1 / (1 + u), so that 0 < p < 1
    pair = p * sp.log(1 + sp.exp(-margin)) + (1 - p) * sp.log(1 + sp.exp(margin))
    at = sp.log(p / (1 - p))
    slope, bend = sp.diff(pair, margin), sp.diff(pair, margin, 2)
    assert sp.simplify(slope.subs(margin, at).subs(p, 1 / (1 + rest))) == 0
    assert sp.simplify(bend - sp.exp(margin) / (1 + sp.exp(margin)) ** 2) == 0  # positive everywhere: one minimum
    a, b = sp.symbols("a b", real=True)
    assert sp.simplify(sp.exp(at.subs(p, 1 / (1 + sp.exp(b - a)))) - sp.exp(a - b)) == 0

    log_ref, scores = torch.log_softmax(rows(7, 6), -1), rows(8, 6)
    wins = scores.exp()[:, None] / (scores.exp()[:, None] + scores.exp()[None, :])
    found = lowest(lambda t: population(torch.log_softmax(t, -1), log_ref, wins, beta), log_ref)
    log_p = torch.log_softmax(found, -1)
    told = beta * (log_p - log_ref)
    assert close(told[:, None] - told[None, :], scores[:, None] - scores[None, :], 1e-7)
    assert close(log_p.exp(), best_policy(scores, log_ref, beta).exp(), 1e-8)


# ---------------------------------------------------------------- where the probability goes


def test_first_step_moves_every_log_probability_along_the_difference_of_features() -> None:
    """(eq-dpo-displacement): the rate of change under gradient descent, by central differences in the step size."""
    features, state, state_ref = rows(9, 6, 3), rows(10, 3), rows(11, 3)
    beta, w, l = 0.6, 1, 4

    def log_p(h: torch.Tensor) -> torch.Tensor:
        return torch.log_softmax(features @ h, -1)

    log_ref = log_p(state_ref)
    downhill = -slopes(lambda h: dpo(log_p(h), log_ref, [(w, l)], beta), state)
    step = 1e-4
    rate = (log_p(state + step * downhill) - log_p(state - step * downhill)) / (2 * step)

    pi = log_p(state).exp()
    margin = beta * float((log_p(state) - log_ref)[w] - (log_p(state) - log_ref)[l])
    mean = pi @ features
    formula = beta / (1 + math.exp(margin)) * (features - mean) @ (features[w] - features[l])
    assert close(formula, rate, 1e-7)
    assert abs(float(pi @ rate)) < 1e-7  # probability is moved about, not made

    # a table: unit vectors for features. The chosen response gains, whatever the policy is
    table = torch.eye(6, dtype=torch.float64)
    gains = [
        float((table[w] - torch.softmax(rows(s, 6, spread=3.0), -1)) @ (table[w] - table[l])) for s in range(20, 40)
    ]
    short = [float(1 - p[w] + p[l]) for p in (torch.softmax(rows(s, 6, spread=3.0), -1) for s in range(20, 40))]
    assert gains == pytest.approx(short, abs=1e-12)
    assert min(gains) > 0


# ---------------------------------------------------------------- remedies


@pytest.mark.parametrize("flipped", [0.05, 0.1, 0.3])
def test_conservative_loss_rests_where_a_scan_finds_its_lowest_point(flipped: float) -> None:
    """(eq-dpo-conservative): the mean loss over a data set with flipped labels, minimised over a whole policy."""
    beta, log_ref = 0.3, torch.log_softmax(rows(12, 4), -1)
    right = round(100 * (1 - flipped))
    labels = [(2, 0)] * right + [(0, 2)] * (100 - right)

    def mixed(logits: torch.Tensor) -> torch.Tensor:
        return dpo(torch.log_softmax(logits, -1), log_ref, labels, beta)

    log_p = torch.log_softmax(lowest(mixed, log_ref + rows(13, 4, spread=0.3)), -1)
    margin = beta * float((log_p - log_ref)[2] - (log_p - log_ref)[0])
    assert margin == pytest.approx(math.log((1 - flipped) / flipped), abs=1e-7)

    scan = torch.linspace(-1, 6, 70001, dtype=torch.float64)
    losses = (1 - flipped) * nll(scan) + flipped * nll(-scan)
    assert float(scan[losses.argmin()]) == pytest.approx(margin, abs=1e-4)


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.3])
def test_ipo_stops_where_a_divergence_stops_the_climb_of_the_winning_rate(tau: float) -> None:
    """(eq-dpo-ipo): the minimum of the square, and the best policy for 'probability to win minus tau KL'.

    The second is what the square was made for: the opponent is drawn evenly from the two responses, a response ties
    with itself, and the first always beats the second.
    """
    log_ref = torch.log_softmax(rows(14, 2), -1)

    def square(log_q: torch.Tensor) -> Function:
        def loss(logits: torch.Tensor) -> torch.Tensor:
            told = torch.log_softmax(logits, -1) - log_q
            return (told[0] - told[1] - 1 / (2 * tau)) ** 2

        return loss

    log_p = torch.log_softmax(lowest(square(log_ref), log_ref), -1)
    even = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    of_even = torch.log_softmax(lowest(square(even), even), -1)

    win = torch.tensor([[0.5, 1.0], [0.0, 0.5]], dtype=torch.float64)
    rate = win @ even.exp()
    climbed, climbed_even = best_policy(rate, log_ref, tau), best_policy(rate, even, tau)
    assert close(log_p, climbed, 1e-8) and close(of_even, climbed_even, 1e-8)

    told = climbed - log_ref
    assert float(told[0] - told[1]) == pytest.approx(1 / (2 * tau), abs=1e-8)
    assert float(climbed_even[0].exp()) == pytest.approx(1 / (1 + math.exp(-1 / (2 * tau))), abs=1e-9)


# ---------------------------------------------------------------- a finite number of pairs


@pytest.mark.parametrize("kind", ["table", "features"])
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_reward_model_first_or_policy_at_once_give_the_same_policy(kind: str, beta: float) -> None:
    """(eq-dpo-same-class): the reward problem, then a climb to its best policy, against the DPO problem."""
    n = 7
    features = torch.eye(n, dtype=torch.float64) if kind == "table" else rows(15, n, 3)
    log_ref = torch.log_softmax(rows(16, n), -1)
    pairs = [(0, 1), (2, 1), (3, 5), (0, 5), (1, 0), (4, 2)]
    w, l = (list(side) for side in zip(*pairs, strict=True))

    def reward_problem(t: torch.Tensor) -> torch.Tensor:
        strength = (features @ t).exp()
        return -(strength[w] / (strength[w] + strength[l])).log().sum() + t @ t / 2

    def policy_problem(t: torch.Tensor) -> torch.Tensor:
        weights = log_ref.exp() * (features @ t / beta).exp()
        log_p = (weights / weights.sum()).log()
        return dpo(log_p, log_ref, pairs, beta) * len(pairs) + t @ t / 2

    start = torch.zeros(features.shape[1], dtype=torch.float64)
    fitted = lowest(reward_problem, start)
    direct = lowest(policy_problem, start + 0.8)
    assert close(policy_problem(direct), reward_problem(fitted), 1e-10)

    by_rlhf = best_policy(features @ fitted, log_ref, beta)
    by_dpo = torch.log_softmax(log_ref + features @ direct / beta, -1)
    assert close(by_dpo, by_rlhf, 1e-7)
    assert not close(by_dpo, log_ref, 0.1)


# ---------------------------------------------------------------- complete?

EQUATIONS: dict[str, Callable[..., None]] = {
    "eq-dpo-reward": test_reward_from_the_policy_that_was_found_by_climbing,
    "eq-dpo-bt": test_bradley_terry_is_the_winner_of_a_race_with_gumbel_noise,
    "eq-dpo-difference": test_log_z_cancels_within_a_prompt_and_not_across,
    "eq-dpo-loss": test_loss_is_the_likelihood_of_the_labels_under_the_reward_whose_best_policy_this_is,
    "eq-dpo-gradient": test_gradient_is_a_weight_times_a_difference_of_scores,
    "eq-dpo-population": test_population_loss_is_in_proportion_to_the_mean_over_a_data_set_with_exact_shares,
    "eq-dpo-population-optimum": test_population_optimum_is_the_optimum_of_rlhf,
    "eq-dpo-displacement": test_first_step_moves_every_log_probability_along_the_difference_of_features,
    "eq-dpo-conservative": test_conservative_loss_rests_where_a_scan_finds_its_lowest_point,
    "eq-dpo-ipo": test_ipo_stops_where_a_divergence_stops_the_climb_of_the_winning_rate,
    "eq-dpo-same-class": test_reward_model_first_or_policy_at_once_give_the_same_policy,
}


def test_every_numbered_equation_of_the_page_has_its_test() -> None:
    """The labels of the page and those of the tests are the same, and each docstring names the one of its test."""
    require_complete("07_dpo", EQUATIONS, globals())
