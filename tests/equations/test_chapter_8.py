"""Every numbered equation of chapter 8, derived a second time: nothing here is imported from the book's package.

The inputs are this file's own. Each test compares two values that were obtained in different ways: a formula of the
page against automatic differentiation, central differences, quadrature, a series, or the enumeration of all responses.
"""

import math
from collections.abc import Callable

import mpmath
import numpy as np
import pytest
import sympy as sp
import torch

from completeness import require_complete

# ---------------------------------------------------------------- one-step policies


def rows(seed: int, *shape: int, spread: float = 1.0) -> torch.Tensor:
    """Numbers in double precision that depend on the seed alone."""
    return spread * torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def divergence(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Cross-entropy minus entropy, over the arms that p can draw."""
    inside = p > 0
    return (p[inside] * p[inside].log()).sum() - (p[inside] * q[inside].log()).sum()


def curved_log_policy(theta: torch.Tensor) -> torch.Tensor:
    """Six arms whose logits depend on four parameters in a curved way, so that nothing rests on softmax logits."""
    hidden = torch.tanh(theta @ rows(90, 4, 5))
    return torch.log_softmax(hidden @ rows(91, 5, 6) + theta[0] * theta[1:2], -1)


def slopes(function: Callable[[torch.Tensor], torch.Tensor], at: torch.Tensor, step: float = 1e-5) -> torch.Tensor:
    """The gradient by central differences."""
    out = torch.zeros_like(at)
    for i in range(at.numel()):
        move = torch.zeros_like(at)
        move[i] = step
        out[i] = (function(at + move) - function(at - move)) / (2 * step)
    return out


def scores_of(log_policy: Callable[[torch.Tensor], torch.Tensor], theta: torch.Tensor) -> torch.Tensor:
    """The gradient of every arm's log-probability: one row for each arm."""
    return torch.autograd.functional.jacobian(log_policy, theta)


def sample_gradients(loss: Callable[[torch.Tensor], torch.Tensor], theta: torch.Tensor) -> torch.Tensor:
    """What backward() returns for each arm as the one sample: one row for each arm."""
    found = []
    for arm in range(loss(theta).numel()):
        leaf = theta.clone().requires_grad_()
        loss(leaf)[arm].backward()
        found.append(leaf.grad)
    return torch.stack(found)


THETA = rows(1, 4)
OLD = rows(1, 4) + rows(2, 4, spread=0.6)
LOG_REF = torch.log_softmax(rows(3, 6), -1)


def three(log_ratio: torch.Tensor) -> list[torch.Tensor]:
    """The three estimators, as the page writes them."""
    r = torch.exp(-log_ratio)
    return [log_ratio, log_ratio**2 / 2, (r - 1) + log_ratio]


def forward_and_reverse(log_policy: Callable[[torch.Tensor], torch.Tensor], log_ref: torch.Tensor, at: torch.Tensor):
    """Central differences of KL(pi||ref) and of KL(ref||pi)."""
    reverse = slopes(lambda x: divergence(log_policy(x).exp(), log_ref.exp()), at)
    forward = slopes(lambda x: divergence(log_ref.exp(), log_policy(x).exp()), at)
    return reverse, forward


def close(a, b, tolerance: float = 1e-10) -> bool:
    return bool(torch.allclose(torch.as_tensor(a), torch.as_tensor(b), rtol=0.0, atol=tolerance))


def test_the_first_argument_is_where_the_mean_is_taken() -> None:
    """(eq-kl-two): against the Bregman divergence of log-sum-exp, and the slopes of the Rényi sum at its ends."""
    a, b = rows(10, 7), rows(11, 7, spread=1.5)
    pi, ref = torch.softmax(a, -1), torch.softmax(b, -1)
    reverse = (pi * (pi / ref).log()).sum()
    forward = (ref * (ref / pi).log()).sum()
    total = torch.logsumexp
    assert close(reverse, total(b, -1) - total(a, -1) - pi @ (b - a), 1e-12)
    assert close(forward, total(a, -1) - total(b, -1) - ref @ (a - b), 1e-12)

    alpha = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    (pi ** alpha[:, None] * ref ** (1 - alpha[:, None])).sum().backward()
    assert close(reverse, alpha.grad[1], 1e-12)
    assert close(forward, -alpha.grad[0], 1e-12)
    assert abs(float(reverse - forward)) > 0.01


def test_three_estimators_have_the_mean_the_order_and_the_sign_they_are_said_to_have() -> None:
    """(eq-kl-three): k1 and k3 have the mean KL, k3 is a Bregman divergence, and k2 is its second-order part."""
    x, r = sp.symbols("x r", positive=True)
    bregman = (-sp.log(r)) - (-sp.log(1)) - sp.diff(-sp.log(r), r).subs(r, 1) * (r - 1)
    k3 = (sp.exp(-x) - 1) + x
    assert sp.simplify(bregman.subs(r, sp.exp(-x)) - k3) == 0
    assert sp.series(k3, x, 0, 3).removeO() == x**2 / 2

    a, b = rows(12, 9), rows(13, 9)
    pi, ref = torch.softmax(a, -1), torch.softmax(b, -1)
    kl = torch.logsumexp(b, -1) - torch.logsumexp(a, -1) - pi @ (b - a)
    k1, k2, k3 = three(torch.log_softmax(a, -1) - torch.log_softmax(b, -1))
    assert close(pi @ k1, kl, 1e-12)
    assert close(pi @ k3, kl, 1e-12)
    assert abs(float(pi @ k2 - kl)) > 0.01
    assert bool((k3 >= 0).all()) and bool((k2 >= 0).all()) and bool((k1 < 0).any())
    # near the reference k2 has the divergence's mean too, to second order: the error shrinks like the third power
    errors = []
    for step in (1e-2, 1e-3):
        near = torch.log_softmax(b + step * a, -1)
        p = near.exp()
        errors.append(abs(float(p @ three(near - torch.log_softmax(b, -1))[1] - divergence(p, ref))))
    assert 800 < errors[0] / errors[1] < 1200


def test_bias_of_k2_is_the_series_from_the_third_order_on() -> None:
    """(eq-kl-k2-bias): the bias by enumeration against the series of the exponential, summed term by term."""
    a, b = rows(14, 8, spread=0.7), rows(15, 8, spread=0.7)
    pi, ref = torch.softmax(a, -1), torch.softmax(b, -1)
    l = torch.log_softmax(a, -1) - torch.log_softmax(b, -1)
    bias = pi @ (l**2 / 2) - divergence(pi, ref)
    series = sum((-1) ** (j + 1) * pi @ l**j / float(math.factorial(j)) for j in range(3, 60))
    assert close(bias, series, 1e-12)
    assert abs(float(bias)) > 1e-3
    # the two terms that are written out are the first two: what is left shrinks like the fifth power of the distance
    rest = []
    for step in (0.02, 0.01):
        near = torch.log_softmax(b + step * a, -1)
        p, small = near.exp(), near - torch.log_softmax(b, -1)
        written = p @ (small**3 / 6 - small**4 / 24)
        rest.append(abs(float(p @ (small**2 / 2) - divergence(p, ref) - written)))
    assert 25 < rest[0] / rest[1] < 40


def gaussian_mean(function: Callable[[mpmath.mpf], mpmath.mpf]) -> mpmath.mpf:
    """The mean of a function of a standard normal number, by quadrature."""
    return mpmath.quad(lambda x: mpmath.npdf(x) * function(x), [-14, -5, -1, 0, 1, 5, 14])


def gaussian_log_ratio(m: float) -> Callable[[mpmath.mpf], mpmath.mpf]:
    """log N(x; 0, 1) - log N(x; m, 1), from the two densities."""
    return lambda x: mpmath.log(mpmath.npdf(x, 0, 1)) - mpmath.log(mpmath.npdf(x, m, 1))


@pytest.mark.parametrize("m", [0.1, 0.6, 1.0, 1.7])
def test_table_of_unit_gaussians_by_quadrature(m: float) -> None:
    """(eq-kl-gauss): the five closed forms against the integrals of the densities."""
    l = gaussian_log_ratio(m)
    estimators = [l, lambda x: l(x) ** 2 / 2, lambda x: mpmath.npdf(x, m, 1) / mpmath.npdf(x, 0, 1) - 1 + l(x)]
    means = [gaussian_mean(k) for k in estimators]
    stds = [
        mpmath.sqrt(gaussian_mean(lambda x, k=k, mean=mean: (k(x) - mean) ** 2))
        for k, mean in zip(estimators, means, strict=True)
    ]
    kl = m**2 / 2
    assert float(means[0]) == pytest.approx(kl, rel=1e-9)
    assert float((means[1] - means[0]) / means[0]) == pytest.approx(m**2 / 4, rel=1e-9)
    assert float(means[2]) == pytest.approx(kl, rel=1e-9)
    assert float(stds[0] / means[0]) == pytest.approx(2 / m, rel=1e-9)
    assert float(stds[1] / means[0]) == pytest.approx(math.sqrt(2 + m**2), rel=1e-9)
    assert float(stds[2] / means[0]) == pytest.approx(math.sqrt(math.exp(m**2) - 1 - m**2) / (m**2 / 2), rel=1e-8)


@pytest.mark.parametrize("m", [0.3, 1.0, 1.8])
def test_best_weight_of_the_control_variate_is_the_foot_of_a_measured_parabola(m: float) -> None:
    """(eq-kl-best-weight): the variance at three weights fixes the parabola; its lowest point is compared."""
    l = gaussian_log_ratio(m)

    def variance(w: float) -> float:
        def value(x: mpmath.mpf) -> mpmath.mpf:
            return l(x) + w * (mpmath.npdf(x, m, 1) / mpmath.npdf(x, 0, 1) - 1)

        mean = gaussian_mean(value)
        assert float(mean) == pytest.approx(m**2 / 2, rel=1e-9)
        return float(gaussian_mean(lambda x: (value(x) - mean) ** 2))

    low, middle, high = variance(0.0), variance(0.5), variance(1.0)
    curvature = 2 * (high - 2 * middle + low)
    slope = high - low - curvature
    foot = -slope / (2 * curvature)
    depth = low - slope**2 / (4 * curvature)
    weight = m**2 / (math.exp(m**2) - 1)
    noise = 2 / m * math.sqrt(1 - m**2 / (math.exp(m**2) - 1))
    assert foot == pytest.approx(weight, rel=1e-6)
    assert math.sqrt(depth) / (m**2 / 2) == pytest.approx(noise, rel=1e-6)
    assert noise < 2 / m
    assert foot < 1 and math.sqrt(high) > math.sqrt(depth)
    symbol = sp.symbols("m", positive=True)
    assert sp.limit(symbol**2 / (sp.exp(symbol**2) - 1), symbol, 0) == 1


def test_missing_support_lowers_k3_by_the_reference_s_probability_of_it() -> None:
    """(eq-kl-support): samplers that leave out one, two or three of eight arms, and one that leaves out none."""
    ref = torch.softmax(rows(16, 8), -1)
    for left_out in ([], [5], [0, 3], [1, 2, 7]):
        q = torch.softmax(rows(17, 8), -1)
        q[left_out] = 0.0
        q = q / q.sum()
        kept = [i for i in range(8) if i not in left_out]
        kl = divergence(q, ref)
        k1 = sum(float(q[i]) * math.log(float(q[i] / ref[i])) for i in kept)
        k3 = sum(float(q[i]) * (float(ref[i] / q[i]) - 1 - math.log(float(ref[i] / q[i]))) for i in kept)
        assert k1 == pytest.approx(float(kl), abs=1e-12)
        assert k3 == pytest.approx(float(kl - ref[left_out].sum()), abs=1e-12)
        assert (abs(k3 - float(kl)) > 0.01) == bool(left_out)


def test_log_probs_of_the_model_on_samples_of_another_distribution() -> None:
    """(eq-kl-wrong-logprobs): a sampler with all arms, and one with some arms cut off."""
    pi, ref = torch.softmax(rows(18, 7), -1), torch.softmax(rows(19, 7), -1)
    cut = torch.where(pi >= pi.sort(descending=True).values[2], pi, 0.0)
    cold = pi ** (1 / 0.6)
    for q in (torch.softmax(rows(20, 7), -1), cut / cut.sum(), cold / cold.sum()):
        logged = sum(float(q[i]) * math.log(float(pi[i]) / float(ref[i])) for i in range(7))
        assert logged == pytest.approx(float(divergence(q, ref) - divergence(q, pi)), abs=1e-12)
        assert logged < float(divergence(q, ref)) - 0.01


def test_three_estimators_as_losses_have_three_gradients() -> None:
    """(eq-kl-three-gradients): backward() on every arm, averaged, against central differences of both divergences."""
    pi = curved_log_policy(THETA).exp()
    l = curved_log_policy(THETA) - LOG_REF
    scores = scores_of(curved_log_policy, THETA)
    reverse, forward = forward_and_reverse(curved_log_policy, LOG_REF, THETA)
    k1, k2, k3 = (
        pi @ sample_gradients(lambda theta, i=i: three(curved_log_policy(theta) - LOG_REF)[i], THETA) for i in range(3)
    )
    assert close(k1, pi @ scores, 1e-12)
    assert close(k1, torch.zeros_like(THETA), 1e-12)
    assert close(k2, (pi * l) @ scores, 1e-12)
    assert close(k2, reverse, 1e-8)
    assert close(k3, (pi * (1 - torch.exp(-l))) @ scores, 1e-12)
    assert close(k3, -(LOG_REF.exp() @ scores), 1e-12)
    assert close(k3, forward, 1e-8)
    assert float((reverse - forward).norm() / reverse.norm()) > 0.1


def test_three_gradients_of_softmax_logits() -> None:
    """(eq-kl-softmax-gradients): backward() on every arm, averaged, against the three vectors of the page."""
    logits = rows(21, 6)
    pi, ref = torch.softmax(logits, -1), LOG_REF.exp()
    l = pi.log() - LOG_REF
    formulas = [torch.zeros(6, dtype=torch.float64), pi * (l - divergence(pi, ref)), pi - ref]
    for i, formula in enumerate(formulas):
        found = pi @ sample_gradients(lambda x, i=i: three(torch.log_softmax(x, -1) - LOG_REF)[i], logits)
        assert close(found, formula, 1e-12)
    assert float((formulas[1] - formulas[2]).norm()) > 0.05


def test_estimators_in_the_reward() -> None:
    """(eq-kl-in-reward): the policy gradient with k1 and k3 as numbers, against central differences."""
    pi = curved_log_policy(THETA).exp()
    k1, _, k3 = three(curved_log_policy(THETA) - LOG_REF)
    reverse, forward = forward_and_reverse(curved_log_policy, LOG_REF, THETA)

    def rewarded(k: torch.Tensor) -> torch.Tensor:
        # the slope of sum pi_theta k, with k held fixed: what a policy gradient estimates
        return slopes(lambda theta: curved_log_policy(theta).exp() @ k, THETA)

    assert close((pi * k1) @ scores_of(curved_log_policy, THETA), rewarded(k1), 1e-8)
    assert close(rewarded(k1), reverse, 1e-8)
    assert close(rewarded(k3), reverse - forward, 1e-8)
    assert float(forward.norm()) > 0.05


def test_ratio_to_an_older_policy_differentiated_or_detached() -> None:
    """(eq-kl-off-policy): three lines for each of k1, k2, k3, on samples of an older policy."""
    old = curved_log_policy(OLD).exp()
    pi = curved_log_policy(THETA).exp()
    assert float((old - pi).abs().max()) > 0.05
    for i in range(3):

        def k(theta: torch.Tensor, i: int = i) -> torch.Tensor:
            return three(curved_log_policy(theta) - LOG_REF)[i]

        def ratio(theta: torch.Tensor) -> torch.Tensor:
            return torch.exp(curved_log_policy(theta) - old.log())

        assert close(old @ (ratio(THETA) * k(THETA)), pi @ k(THETA), 1e-12)
        differentiated = old @ sample_gradients(lambda theta, k=k: ratio(theta) * k(theta), THETA)
        assert close(differentiated, slopes(lambda theta, k=k: curved_log_policy(theta).exp() @ k(theta), THETA), 1e-8)
        detached = old @ sample_gradients(lambda theta, k=k: ratio(theta).detach() * k(theta), THETA)
        assert close(detached, pi @ sample_gradients(k, THETA), 1e-12)
        assert not close(old @ sample_gradients(k, THETA), differentiated, 1e-3)


def test_differentiated_ratio_turns_k3_into_k2_for_every_sample() -> None:
    """(eq-kl-product): per sample, backward() of ratio * k3 against the two products and the detached ratio * k2."""
    p, q, f = sp.symbols("p q f", positive=True)
    lr = sp.log(p) - sp.log(f)
    rk3 = p / q * (sp.exp(-lr) - 1 + lr)
    assert sp.simplify(p * sp.diff(rk3, p) - p / q * lr) == 0

    log_old = curved_log_policy(OLD)
    l = curved_log_policy(THETA) - LOG_REF
    rho, r = torch.exp(curved_log_policy(THETA) - log_old), torch.exp(-l)
    scores = scores_of(curved_log_policy, THETA)

    def k(theta: torch.Tensor, i: int) -> torch.Tensor:
        return three(curved_log_policy(theta) - LOG_REF)[i]

    def ratio(theta: torch.Tensor) -> torch.Tensor:
        return torch.exp(curved_log_policy(theta) - log_old)

    found = sample_gradients(lambda theta: ratio(theta) * k(theta, 2), THETA)
    assert close(found, (rho * ((r - 1) + l + 1 - r))[:, None] * scores, 1e-12)
    assert close(found, (rho * l)[:, None] * scores, 1e-12)
    assert close(found, sample_gradients(lambda theta: ratio(theta).detach() * k(theta, 1), THETA), 1e-12)
    assert not close(found, sample_gradients(lambda theta: ratio(theta).detach() * k(theta, 2), THETA), 1e-2)


# ---------------------------------------------------------------- responses of several tokens

WORDS, END, LONGEST = 3, 2, 3
PREFIXES = [()] + [(i,) for i in range(WORDS) if i != END]
PREFIXES += [(i, j) for i in range(WORDS) if i != END for j in range(WORDS) if j != END]


def responses() -> list[tuple[int, ...]]:
    """All responses: they stop at the end token, or after three tokens."""
    grown: list[tuple[int, ...]] = []
    for prefix in PREFIXES:
        for token in range(WORDS):
            if token == END or len(prefix) + 1 == LONGEST:
                grown.append((*prefix, token))
    return grown


RESPONSES = responses()
POLICY_LOGITS = rows(31, len(PREFIXES), WORDS)
REF_LOG_TABLE = torch.log_softmax(rows(32, len(PREFIXES), WORDS), -1)


def token_log_probs(table: torch.Tensor, response: tuple[int, ...]) -> torch.Tensor:
    return torch.stack([table[PREFIXES.index(response[:t]), token] for t, token in enumerate(response)])


def response_log_probs(logits: torch.Tensor) -> torch.Tensor:
    table = torch.log_softmax(logits.reshape(len(PREFIXES), WORDS), -1)
    return torch.stack([token_log_probs(table, response).sum() for response in RESPONSES])


REF_RESPONSES = response_log_probs(REF_LOG_TABLE)


def prefix_kls(logits: torch.Tensor) -> torch.Tensor:
    """K at every prefix, by the sum over the next token."""
    table = torch.log_softmax(logits.reshape(len(PREFIXES), WORDS), -1)
    return (table.exp() * (table - REF_LOG_TABLE)).sum(-1)


def whole_kl(logits: torch.Tensor) -> torch.Tensor:
    """The divergence of the two distributions over whole responses."""
    return divergence(response_log_probs(logits).exp(), REF_RESPONSES.exp())


def path(values: torch.Tensor, response: tuple[int, ...]) -> torch.Tensor:
    return torch.stack([values[PREFIXES.index(response[:t])] for t in range(len(response))])


def expected_gradient(token_weights: Callable[[tuple[int, ...]], torch.Tensor]) -> torch.Tensor:
    """Mean over responses of sum_t grad log pi(y_t | y_<t) * weight_t, the weights being numbers."""
    leaf = POLICY_LOGITS.clone().requires_grad_()
    table = torch.log_softmax(leaf, -1)
    probabilities = response_log_probs(POLICY_LOGITS).exp()
    total = sum(
        p * (token_log_probs(table, response) * token_weights(response).detach()).sum()
        for p, response in zip(probabilities, RESPONSES, strict=True)
    )
    total.backward()
    return leaf.grad


def later(values: torch.Tensor, include_present: bool) -> torch.Tensor:
    sums = values.flip(0).cumsum(0).flip(0)
    return sums if include_present else sums - values


def log_ratios(response: tuple[int, ...]) -> torch.Tensor:
    table = torch.log_softmax(POLICY_LOGITS, -1)
    return token_log_probs(table, response) - token_log_probs(REF_LOG_TABLE, response)


def test_divergence_of_responses_is_a_sum_over_tokens_and_its_gradient_has_two_terms() -> None:
    """(eq-kl-chain): the three lines against the enumeration of all responses; neither term alone is the gradient."""
    probabilities = response_log_probs(POLICY_LOGITS).exp()
    assert float(probabilities.sum()) == pytest.approx(1.0, abs=1e-12)
    kls = prefix_kls(POLICY_LOGITS)
    summed = sum(p * path(kls, y).sum() for p, y in zip(probabilities, RESPONSES, strict=True))
    assert close(summed, whole_kl(POLICY_LOGITS), 1e-12)
    second_prefix = torch.log_softmax(POLICY_LOGITS[1], -1).exp()
    assert close(kls[1], divergence(second_prefix, REF_LOG_TABLE[1].exp()), 1e-12)

    leaf = POLICY_LOGITS.clone().requires_grad_()
    sum(p * path(prefix_kls(leaf), y).sum() for p, y in zip(probabilities, RESPONSES, strict=True)).backward()
    first = leaf.grad
    second = expected_gradient(lambda y: later(path(kls, y), include_present=False))
    true = slopes(whole_kl, POLICY_LOGITS.reshape(-1)).reshape(POLICY_LOGITS.shape)
    assert close(first + second, true, 1e-8)
    assert not close(first, true, 1e-2) and not close(second, true, 1e-2)


def test_reward_to_go_of_log_ratios_is_the_whole_gradient() -> None:
    """(eq-kl-to-go): against central differences of the divergence of whole responses; the later tokens are needed."""
    true = slopes(whole_kl, POLICY_LOGITS.reshape(-1)).reshape(POLICY_LOGITS.shape)
    assert close(expected_gradient(lambda y: later(log_ratios(y), include_present=True)), true, 1e-8)
    assert close(expected_gradient(lambda y: log_ratios(y).sum().expand(len(y))), true, 1e-8)  # the past drops out
    assert not close(expected_gradient(log_ratios), true, 1e-2)
    assert not close(expected_gradient(lambda y: later(log_ratios(y), include_present=False)), true, 1e-2)


def test_variance_that_exact_token_divergences_remove() -> None:
    """(eq-kl-rao): both variances by enumeration; the conditional variances and the cross term on their own."""
    probabilities = response_log_probs(POLICY_LOGITS).exp().numpy()
    table = torch.log_softmax(POLICY_LOGITS, -1)
    kls = prefix_kls(POLICY_LOGITS)
    conditional = (table.exp() * (table - REF_LOG_TABLE) ** 2).sum(-1) - kls**2

    def variance(values: list[float]) -> float:
        centred = np.array(values) - probabilities @ np.array(values)
        return float(probabilities @ centred**2)

    exact = variance([float(path(kls, y).sum()) for y in RESPONSES])
    sampled = variance([float(log_ratios(y).sum()) for y in RESPONSES])
    inner, cross = 0.0, 0.0
    for p, y in zip(probabilities, RESPONSES, strict=True):
        l, big = log_ratios(y), path(kls, y)
        inner += p * float(path(conditional, y).sum())
        cross += p * sum(float((l[t] - big[t]) * big[u]) for u in range(len(y)) for t in range(u))
    assert exact == pytest.approx(sampled - (inner + 2 * cross), abs=1e-12)
    assert abs(cross) > 0.01 and inner > 0.01


# ---------------------------------------------------------------- the controller


def steer(state: np.ndarray, a: float, c: float, target: float) -> np.ndarray:
    """One step: the mean moves a share of the way to 1/beta, and beta by the clipped error of the divergence before."""
    mean, beta = state
    error = min(0.2, max(-0.2, mean**2 / 2 / target - 1))
    return np.array([mean + a * (1 / beta - mean), beta * (1 + c * error)])


def distances(a: float, c: float, target: float, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """From near the fixed point: the relative deviations of the mean and of beta along the run."""
    fixed = np.array([math.sqrt(2 * target), 1 / math.sqrt(2 * target)])
    state = fixed * np.array([1 + 1e-4, 1.0])
    out = []
    for _ in range(steps):
        out.append(state / fixed - 1)
        state = steer(state, a, c, target)
    history = np.array(out)
    return history[:, 0], history[:, 1]


@pytest.mark.parametrize("a", [0.05, 0.4, 1.0])
def test_controller_is_stable_and_calm_from_the_horizons_of_the_page_on(a: float) -> None:
    """(eq-kl-controller): the matrix against central differences of the rule, both bounds against runs of it."""
    target, n = 3.0, 50
    fixed = np.array([math.sqrt(2 * target), 1 / math.sqrt(2 * target)])
    assert steer(fixed, a, 0.3, target) == pytest.approx(fixed, abs=1e-14)
    # the optimum of x - beta KL among unit Gaussians at mu, mu - beta mu^2 / 2, is at 1/beta
    mu, beta = sp.symbols("mu beta", positive=True)
    assert sp.solve(sp.diff(mu - beta * mu**2 / 2, mu), mu) == [1 / beta]

    c, jacobian = 0.3, np.zeros((2, 2))
    for i in range(2):
        move = np.zeros(2)
        move[i] = 1e-6
        ends = [steer(fixed * (1 + sign * move), a, c, target) / fixed - 1 for sign in (1, -1)]
        jacobian[:, i] = (ends[0] - ends[1]) / 2e-6
    assert jacobian == pytest.approx(np.array([[1 - a, -a], [2 * c, 1.0]]), abs=1e-7)

    for factor, stable in ((0.97, False), (1.03, True)):
        u, v = distances(a, n / (2 * n * factor), target, int(400 / a))
        start, end = (np.abs(u[part]).max() + np.abs(v[part]).max() for part in (slice(0, 100), slice(-100, None)))
        assert (end < start / 10) == stable
        assert stable or end > 10 * start
    for factor, calm in ((0.9, False), (1.1, True)):
        horizon = 8 * n / a * factor
        u, _ = distances(a, n / horizon, target, int(60 / a))
        # a calm return passes the target at most once; a swing passes it again and again
        sides = np.sign(u[np.abs(u) > 1e-11])
        crossings = int((sides[1:] != sides[:-1]).sum())
        assert (crossings <= 1) == calm


# ---------------------------------------------------------------- complete?

EQUATIONS: dict[str, Callable[..., None]] = {
    "eq-kl-two": test_the_first_argument_is_where_the_mean_is_taken,
    "eq-kl-three": test_three_estimators_have_the_mean_the_order_and_the_sign_they_are_said_to_have,
    "eq-kl-k2-bias": test_bias_of_k2_is_the_series_from_the_third_order_on,
    "eq-kl-gauss": test_table_of_unit_gaussians_by_quadrature,
    "eq-kl-best-weight": test_best_weight_of_the_control_variate_is_the_foot_of_a_measured_parabola,
    "eq-kl-support": test_missing_support_lowers_k3_by_the_reference_s_probability_of_it,
    "eq-kl-wrong-logprobs": test_log_probs_of_the_model_on_samples_of_another_distribution,
    "eq-kl-three-gradients": test_three_estimators_as_losses_have_three_gradients,
    "eq-kl-softmax-gradients": test_three_gradients_of_softmax_logits,
    "eq-kl-in-reward": test_estimators_in_the_reward,
    "eq-kl-off-policy": test_ratio_to_an_older_policy_differentiated_or_detached,
    "eq-kl-product": test_differentiated_ratio_turns_k3_into_k2_for_every_sample,
    "eq-kl-chain": test_divergence_of_responses_is_a_sum_over_tokens_and_its_gradient_has_two_terms,
    "eq-kl-to-go": test_reward_to_go_of_log_ratios_is_the_whole_gradient,
    "eq-kl-rao": test_variance_that_exact_token_divergences_remove,
    "eq-kl-controller": test_controller_is_stable_and_calm_from_the_horizons_of_the_page_on,
}


def test_every_numbered_equation_of_the_page_has_its_test() -> None:
    """The labels of the page and those of the tests are the same, and each docstring names the one of its test."""
    require_complete("08_kl", EQUATIONS, globals())
