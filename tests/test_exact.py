"""The oracle itself, against brute force, fractions and published numbers; it shares no code with the maths."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from planting import close, edited, f64, gradients, leaf, normal, raises
from rlhfkit.exact import (
    best_of_n,
    enumerate_responses,
    estimator_moments,
    frontier,
    kl,
    objective,
    optimal_logprobs,
    optimal_value,
    population_dpo_loss,
    preference_probabilities,
)

pytestmark = pytest.mark.usefixtures("device")

INF = float("inf")
REF = [[1.2, -0.3, 0.4, -2.0, 0.0], [0.0, 0.0, 3.0, -1.0, -1.0]]
SCORES = [[1.0, -2.0, 0.5, 3.0, 0.5], [0.0, 1.0, -1.0, 2.0, 0.3]]


def world():
    return f64(REF).log_softmax(-1), f64(SCORES)


def test_responses_of_a_small_vocabulary_by_hand(enumerate_responses=enumerate_responses):
    tokens, mask = enumerate_responses(2, 3, 1)
    assert tokens.tolist() == [[0, 0, 0], [0, 0, 1], [0, 1, 1], [1, 1, 1]]
    assert mask.tolist() == [[True] * 3, [True] * 3, [True, True, False], [True, False, False]]
    tokens, mask = enumerate_responses(2, 2)
    assert tokens.tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]] and mask.all()
    tokens, mask = enumerate_responses(3, 2, 0)
    assert tokens.tolist() == [[0, 0], [1, 0], [1, 1], [1, 2], [2, 0], [2, 1], [2, 2]]
    assert mask.tolist() == [[True, False], *[[True, True]] * 6]


def test_every_stopping_process_has_its_whole_probability_on_the_list(enumerate_responses=enumerate_responses):
    """With token probabilities that sum to 1 the listed responses do too: nothing is missing or listed twice."""
    for vocab_size, max_length, eos_id in (
        (4, 3, None),
        (4, 3, 0),
        (4, 3, 3),
        (3, 4, 1),
        (1, 2, None),
        (2, 5, 0),
        (1, 1, 0),
    ):
        tokens, mask = enumerate_responses(vocab_size, max_length, eos_id)
        p = normal(max_length, vocab_size, seed=3).softmax(-1)
        each = p[torch.arange(max_length), tokens]
        close(torch.where(mask, each, 1.0).prod(1).sum(), f64(1.0))
        assert tokens.shape == mask.shape == (len(tokens), max_length)
        assert len({tuple(row) for row in tokens.tolist()}) == len(tokens)
        assert tokens.tolist() == sorted(tokens.tolist())  # lexicographic
        others = vocab_size - 1
        count = (
            sum(others**k for k in range(max_length)) + others**max_length
            if eos_id is not None
            else vocab_size**max_length
        )
        assert len(tokens) == count


def test_enumeration_refuses_sizes_that_make_no_sense(enumerate_responses=enumerate_responses):
    for arguments, word in (
        ((0, 2), "vocab_size"),
        ((2, 0), "max_length"),
        ((2, 2, 2), "eos_id"),
        ((2, 2, -1), "eos_id"),
    ):
        raises(ValueError, lambda a=arguments: enumerate_responses(*a), word)


def test_kl_is_the_sum_over_the_list(kl=kl):
    logprobs, _ = world()
    ref_logprobs = logprobs.flip(0)
    expected = [
        math.fsum(math.exp(p) * (p - q) for p, q in zip(a, b, strict=True))
        for a, b in zip(logprobs.tolist(), ref_logprobs.tolist(), strict=True)
    ]
    close(kl(logprobs, ref_logprobs), f64(expected))
    assert (kl(logprobs, logprobs) == 0).all()


def test_kl_follows_its_rules_for_zeros(kl=kl):
    half = math.log(0.5)
    p = f64([[0.0, -INF], [half, half], [0.0, -INF], [0.0, -800.0]])
    q = f64([[half, half], [0.0, -INF], [0.0, -INF], [0.0, -INF]])
    assert kl(p, q).tolist() == [math.log(2), INF, 0.0, INF]


def test_kl_has_the_gradient_of_theory_through_the_softmax(kl=kl):
    logits, (ref_logprobs, _) = leaf(f64(SCORES)), world()
    (slope,) = torch.autograd.grad(kl(logits.log_softmax(-1), ref_logprobs).sum(), logits)
    p, log_ratio = logits.detach().softmax(-1), logits.detach().log_softmax(-1) - ref_logprobs
    close(slope, p * (log_ratio - (p * log_ratio).sum(-1, keepdim=True)))
    certain = f64([[0.0, -INF]])
    assert gradients(kl, certain, f64([[-1.0, -2.0]]))[0].isfinite().all()


def test_objective_by_hand(objective=objective):
    logprobs, ref_logprobs = f64([[0.5, 0.5]]).log(), f64([[0.25, 0.75]]).log()
    distance = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    close(objective(logprobs, ref_logprobs, f64([[1.0, 3.0]]), 0.5), f64([2 - 0.5 * distance]))
    close(objective(logprobs, ref_logprobs, f64([[1.0, 3.0]]), 0.0), f64([2.0]))
    close(objective(logprobs, f64([[0.0, -INF]]), f64([[1.0, 3.0]]), 0.0), f64([2.0]))
    assert objective(logprobs, f64([[0.0, -INF]]), f64([[1.0, 3.0]]), 0.5).item() == -INF


def test_objective_falls_short_of_the_optimum_by_beta_times_kl(objective=objective):
    """J(pi*) - J(pi) = beta KL(pi || pi*), for any pi: the identity that makes the optimum the optimum."""
    ref_logprobs, scores = world()
    logprobs = normal(2, 5, seed=4).log_softmax(-1)
    for beta in (0.2, 1.0, 3.0):
        best = (ref_logprobs + scores / beta).log_softmax(-1)
        gap = objective(best, ref_logprobs, scores, beta) - objective(logprobs, ref_logprobs, scores, beta)
        close(gap, beta * (logprobs.exp() * (logprobs - best)).sum(-1))


def test_objective_has_no_slope_at_the_optimum(objective=objective):
    ref_logprobs, scores = world()
    logits = leaf(ref_logprobs + scores / 0.3)
    (slope,) = torch.autograd.grad(objective(logits.log_softmax(-1), ref_logprobs, scores, 0.3).sum(), logits)
    close(slope, torch.zeros_like(slope))
    (slope,) = torch.autograd.grad(objective(logits.log_softmax(-1), ref_logprobs, scores, 0.6).sum(), logits)
    assert slope.abs().max() > 0.01


def test_optimal_logprobs_are_the_tilted_reference(optimal_logprobs=optimal_logprobs):
    """Ratios: pi*(y)/pi*(z) = ref(y)/ref(z) exp((s(y) - s(z))/beta); and the row sums to 1."""
    ref_logprobs, scores = world()
    for beta in (0.1, 1.0, 7.0):
        best = optimal_logprobs(ref_logprobs, scores, beta)
        close(best.exp().sum(-1), torch.ones(2, dtype=torch.float64))
        tilt = best - ref_logprobs - scores / beta
        close(tilt, tilt[:, :1].expand_as(tilt))


def test_optimal_logprobs_of_four_arms_have_the_published_kl(optimal_logprobs=optimal_logprobs):
    ref_logprobs, scores = torch.full((1, 4), -math.log(4), dtype=torch.float64), f64([[2.0, 1.0, 0.0, -1.0]])
    for beta, published in ((0.1, 1.3858), (0.5, 0.9309), (1.0, 0.4388), (5.0, 0.0246)):
        best = optimal_logprobs(ref_logprobs, scores, beta)
        assert abs((best.exp() * (best - ref_logprobs)).sum().item() - published) < 5e-5


def test_optimal_logprobs_hold_for_scores_of_1e4_and_missing_support(optimal_logprobs=optimal_logprobs):
    best = optimal_logprobs(f64([[math.log(0.5), math.log(0.5), -INF]]), f64([[1e4, -1e4, 5e4]]), 0.1)
    assert best[0, 0] == 0 and best[0, 1] == -2e5 and best[0, 2] == -INF
    for beta in (0.0, -1.0, float("nan")):
        raises(ValueError, lambda b=beta: optimal_logprobs(*world(), b), "beta")


def test_optimal_value_is_the_objective_at_the_optimum_and_above_every_other(optimal_value=optimal_value):
    ref_logprobs, scores = world()
    for beta in (0.2, 1.0, 3.0):
        best = optimal_logprobs(ref_logprobs, scores, beta)
        close(optimal_value(ref_logprobs, scores, beta), objective(best, ref_logprobs, scores, beta))
        for seed in range(20):
            other = (best + 0.3 * normal(2, 5, seed=seed)).log_softmax(-1)
            assert (objective(other, ref_logprobs, scores, beta) < optimal_value(ref_logprobs, scores, beta)).all()


def test_optimal_value_goes_from_the_mean_to_the_largest_score_with_beta(optimal_value=optimal_value):
    ref_logprobs, scores = world()
    close(optimal_value(ref_logprobs, scores, 1e-4), scores.max(-1).values, atol=1e-3, rtol=0)
    close(optimal_value(ref_logprobs, scores, 1e6), (ref_logprobs.exp() * scores).sum(-1), atol=1e-5, rtol=0)
    close(optimal_value(ref_logprobs, scores + 2, 0.5), optimal_value(ref_logprobs, scores, 0.5) + 2)


def brute_best_of_n(ref, scores, n):
    """Every n-tuple of draws, in fractions; among the draws with the best score each wins equally often."""
    p = [Fraction(0)] * len(ref)
    for draws in itertools.product(range(len(ref)), repeat=n):
        best = max(scores[i] for i in draws)
        winners = [i for i in draws if scores[i] == best]
        weight = math.prod((ref[i] for i in draws), start=Fraction(1))
        for i in winners:
            p[i] += weight / len(winners)
    return [float(x) for x in p]


def test_best_of_n_is_the_distribution_of_brute_force_with_ties(best_of_n=best_of_n):
    ref = [Fraction(1, 2), Fraction(1, 8), Fraction(1, 4), Fraction(1, 8)]
    for scores in ((1.0, 2.0, 3.0, 4.0), (1.0, 2.0, 2.0, 0.0), (5.0, 5.0, 5.0, 5.0), (3.0, 1.0, 3.0, 2.0)):
        for n in (1, 2, 3, 5):
            got = best_of_n(f64([[float(r) for r in ref]]).log(), f64([scores]), n).exp()
            close(got, f64([brute_best_of_n(ref, scores, n)]))


def kl_of_best(best_of_n, m, n):
    uniform = torch.full((1, m), -math.log(m), dtype=torch.float64)
    best = best_of_n(uniform, torch.arange(m, dtype=torch.float64).unsqueeze(0), n)
    possible = best.exp() > 0
    return torch.where(possible, best.exp() * (best - uniform), 0.0).sum().item(), best.exp()[0]


def test_best_of_n_has_the_published_kl_below_its_bound(best_of_n=best_of_n):
    table = {
        2: (0.1308, 0.4594, 0.6930, 0.6931),
        10: (0.1893, 0.6288, 1.7331, 2.2935),
        1000: (0.1931, 0.6363, 1.8351, 3.1743),
    }
    for m, row in table.items():
        for n, published in zip((2, 4, 16, 64), row, strict=True):
            got, _ = kl_of_best(best_of_n, m, n)
            assert abs(got - published) < 5.01e-5 and got < math.log(n) - (n - 1) / n
    p = f64([[0.01, 0.99]]).log()
    best = best_of_n(p, f64([[1.0, 0.0]]), 1024)
    assert abs((best.exp() * (best - p)).sum().item() - 4.6046) < 5e-5


def test_best_of_n_wins_n_times_in_n_plus_one_with_ties_as_half(best_of_n=best_of_n):
    for n, published in zip((2, 4, 16, 64), (0.6667, 0.8000, 0.9412, 0.9846), strict=True):
        p = kl_of_best(best_of_n, 1000, n)[1]
        below = torch.arange(1000, dtype=torch.float64) / 1000
        assert abs((p * (below + 0.5 / 1000)).sum().item() - published) < 5.01e-5


def test_best_of_n_holds_where_probabilities_underflow_or_vanish(best_of_n=best_of_n):
    """A response of probability exp(-800) that beats the rest wins n times as often; one without support never."""
    got = best_of_n(f64([[0.0, -800.0, -INF]]), f64([[0.0, 1.0, 2.0]]), 4)
    close(got, f64([[0.0, -800.0 + math.log(4), -INF]]))
    close(best_of_n(world()[0], world()[1], 1), world()[0])
    for n in (0, -1):
        raises(ValueError, lambda n=n: best_of_n(*world(), n), "n")


BETAS = [0.15, 0.3, 1.0, 2.0, 9.0]


def test_the_frontier_has_the_value_of_the_optimum_at_every_price(frontier=frontier):
    """E[score] - beta KL at a point of the curve is beta log Z, the largest there is."""
    ref_logprobs, scores = world()
    divergence, expected = frontier(ref_logprobs, scores, BETAS)
    assert divergence.shape == expected.shape == (5, 2)
    for k, beta in enumerate(BETAS):
        close(expected[k] - beta * divergence[k], optimal_value(ref_logprobs, scores, beta))
        best = (ref_logprobs + scores / beta).exp()
        weights = best / best.sum(-1, keepdim=True)
        close(expected[k], (weights * scores).sum(-1))
    assert (divergence.diff(dim=0) < 0).all() and (expected.diff(dim=0) < 0).all()  # dearer: nearer, and worse


def test_the_slope_of_the_frontier_is_the_price(frontier=frontier):
    """d E[score] / d KL = beta, by central differences in log beta."""
    ref_logprobs, scores = world()
    h = 1e-4
    for beta in BETAS:
        divergence, expected = frontier(ref_logprobs, scores, [beta * math.exp(h), beta * math.exp(-h)])
        slope = (expected[1] - expected[0]) / (divergence[1] - divergence[0])
        close(slope, torch.full_like(slope, beta), rtol=1e-6, atol=0)


def test_no_policy_lies_above_the_frontier(frontier=frontier):
    """At the same KL another policy has a lower score: the tilted reference of another score is one."""
    ref_logprobs, scores = world()
    betas = torch.logspace(-2, 3, 400, dtype=torch.float64).tolist()
    divergence, expected = frontier(ref_logprobs, scores, betas)
    for seed in range(8):
        other = (ref_logprobs + normal(2, 5, seed=seed)).log_softmax(-1)
        for prompt, (d, e) in enumerate(zip(kl(other, ref_logprobs), (other.exp() * scores).sum(-1), strict=True)):
            at = (divergence[:, prompt] > d).sum()  # the last point of the curve that is farther away
            assert 0 < at < 400 and e < expected[at - 1, prompt]


def test_the_frontier_of_a_proxy_is_judged_by_the_gold_score(frontier=frontier):
    """With opposite scores what is gained is lost, with a constant nothing; the KL stays that of the proxy."""
    ref_logprobs, scores = world()
    divergence, expected = frontier(ref_logprobs, scores, BETAS)
    for gold, right in ((-scores, -expected), (0 * scores + 3, 0 * expected + 3), (2 * scores + 1, 2 * expected + 1)):
        same, judged = frontier(ref_logprobs, scores, BETAS, gold)
        close(same, divergence)
        close(judged, right)
    raises(ValueError, lambda: frontier(ref_logprobs, scores, BETAS, scores[:, :4]), "gold_scores", "(2, 4)")
    raises(ValueError, lambda: frontier(ref_logprobs, scores, [1.0, 0.0]), "beta", "0.0", "positive")


def test_the_frontier_goes_from_the_reference_to_the_best_response(frontier=frontier):
    ref_logprobs, scores = world()
    divergence, expected = frontier(ref_logprobs, scores, [1e-3, 1e5])
    best = scores.argmax(-1, keepdim=True)
    close(divergence[0], -ref_logprobs.gather(-1, best)[:, 0])
    close(expected[0], scores.gather(-1, best)[:, 0])
    close(divergence[1], torch.zeros_like(divergence[1]), atol=1e-9, rtol=0)
    close(expected[1], (ref_logprobs.exp() * scores).sum(-1), atol=1e-4, rtol=0)


def test_preference_probabilities_by_hand(preference_probabilities=preference_probabilities):
    """Scores log 3 and log 2: the odds of a win are 3 to 2."""
    p = preference_probabilities(f64([[math.log(3), math.log(2)], [0.0, 1e3]]))
    close(p, f64([[[0.5, 0.6], [0.4, 0.5]], [[0.5, 0.0], [1.0, 0.5]]]))


def test_preference_probabilities_are_odds_of_strengths(preference_probabilities=preference_probabilities):
    """p_ij / p_ji = exp(s_i) / exp(s_j), both ways sum to 1, and a constant does not matter."""
    _, scores = world()
    p = preference_probabilities(scores)
    assert p.shape == (2, 5, 5)
    close(p + p.transpose(1, 2), torch.ones_like(p))
    strength = scores.exp()
    close(p / p.transpose(1, 2), strength[:, :, None] / strength[:, None, :])
    close(preference_probabilities(scores + 7), p)


def population(scale=0.4):
    """Policy, reference and scores of two prompts, all general."""
    ref_logprobs, scores = world()
    return (ref_logprobs + scale * normal(2, 5, seed=4)).log_softmax(-1), ref_logprobs, scores


def test_population_dpo_loss_is_the_sum_over_all_ordered_pairs(population_dpo_loss=population_dpo_loss):
    """Pair by pair and outcome by outcome, in plain numbers; a response against itself costs log 2."""
    logprobs, ref_logprobs, scores = population()
    for beta in (0.1, 1.0, 4.0):
        expected = []
        for p, q, s in zip(logprobs.tolist(), ref_logprobs.tolist(), scores.tolist(), strict=True):
            total = 0.0
            for (i, a), (j, b) in itertools.product(enumerate(s), repeat=2):
                odds = math.exp(p[j] - q[j] - p[i] + q[i]) ** beta  # (pi/ref of the loser over that of the winner)^beta
                total += math.exp(a) / (math.exp(a) + math.exp(b)) * math.log(1 + odds)
                assert i != j or math.isclose(odds, 1)
            expected.append(total / 25)
        close(population_dpo_loss(logprobs, ref_logprobs, scores, beta), f64(expected))


def test_population_dpo_loss_is_least_at_the_optimal_policy(population_dpo_loss=population_dpo_loss):
    """No slope there and one in every other place; the least loss is half the mean entropy of a label."""
    ref_logprobs, scores = world()
    p = torch.sigmoid(scores[:, :, None] - scores[:, None, :])
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean((1, 2)) / 2
    for beta in (0.1, 1.0, 3.0):
        best = (ref_logprobs + scores / beta).log_softmax(-1)
        logits = leaf(best)
        loss = population_dpo_loss(logits.log_softmax(-1), ref_logprobs, scores, beta)
        close(loss.detach(), entropy)
        close(torch.autograd.grad(loss.sum(), logits)[0], torch.zeros_like(best))
        for seed in range(10):
            other = leaf(best + 0.3 / beta * normal(2, 5, seed=seed))
            worse = population_dpo_loss(other.log_softmax(-1), ref_logprobs, scores, beta)
            assert (worse > loss + 1e-5).all()
            slope = torch.autograd.grad(worse.sum(), other)[0]
            assert (slope.abs().amax(-1) > 1e-4 * beta).all()
            assert ((slope * (best - other.detach())).sum(-1) < 0).all()  # convex: the way to the optimum leads down


def test_population_dpo_loss_at_the_reference_is_half_of_log_2_with_a_slope_to_the_better(
    population_dpo_loss=population_dpo_loss,
):
    ref_logprobs, scores = world()
    logits = leaf(ref_logprobs)
    loss = population_dpo_loss(logits.log_softmax(-1), ref_logprobs, scores, 0.5)
    close(loss.detach(), torch.full_like(loss.detach(), math.log(2) / 2))
    (slope,) = torch.autograd.grad(loss.sum(), logits)
    # of the N^2 pairs each response stands on both sides: -beta / N (its share of wins less one half)
    wins = torch.sigmoid(scores[:, :, None] - scores[:, None, :]).mean(-1)
    close(slope, -0.5 / 5 * (wins - 0.5))


def test_population_dpo_loss_is_half_the_mean_over_sampled_labels(population_dpo_loss=population_dpo_loss):
    """Uniform pairs labelled by Bradley-Terry: 200,000 of them, within four standard errors."""
    logprobs, ref_logprobs, scores = (x[0].cpu() for x in population())
    generator = torch.Generator().manual_seed(3)
    i, j = torch.randint(5, (2, 200_000), generator=generator, device="cpu")
    wins = torch.rand(200_000, generator=generator, dtype=torch.float64, device="cpu") < torch.sigmoid(
        scores[i] - scores[j]
    )
    chosen, rejected = torch.where(wins, i, j), torch.where(wins, j, i)
    ratio = logprobs - ref_logprobs
    losses = torch.log1p(torch.exp(-0.7 * (ratio[chosen] - ratio[rejected])))
    exact = population_dpo_loss(*(x[None] for x in (logprobs, ref_logprobs, scores)), 0.7)
    assert abs(losses.mean() - 2 * exact[0]) < 4 * losses.std() / 200_000**0.5


def test_population_dpo_loss_sees_ratios_only_and_holds_at_1e4_nats(population_dpo_loss=population_dpo_loss):
    logprobs, ref_logprobs, scores = population()
    loss = population_dpo_loss(logprobs, ref_logprobs, scores, 0.3)
    close(population_dpo_loss(logprobs + 5, ref_logprobs - 2, scores + 1, 0.3), loss)
    order = torch.tensor([3, 1, 4, 0, 2])
    close(population_dpo_loss(logprobs[:, order], ref_logprobs[:, order], scores[:, order], 0.3), loss)
    far = population_dpo_loss(f64([[0.0, -1e4]]), f64([[0.0, 0.0]]), f64([[0.0, 0.0]]), 1.0)
    close(far, f64([(math.log(2) + 0.5 * 1e4) / 4]))  # the equal pairs, each with chance 1/2, and the wrong one
    for beta in (0.0, -1.0, float("nan"), INF):
        raises(ValueError, lambda b=beta: population_dpo_loss(logprobs, ref_logprobs, scores, b), "beta")


def test_estimator_moments_by_hand(estimator_moments=estimator_moments):
    mean, variance = estimator_moments(f64([0.25, 0.75]).log(), f64([[4.0, 0.0], [0.0, 8.0]]))
    close(mean, f64([1.0, 6.0]))
    close(variance, f64(0.25 * (9 + 36) + 0.75 * (1 + 4)))


def test_estimator_moments_keep_a_small_variance_far_from_zero(estimator_moments=estimator_moments):
    mean, variance = estimator_moments(f64([0.25, 0.75]).log(), f64([[1e9], [1e9 + 4]]))
    close(mean, f64([1e9 + 3]))
    close(variance, f64(0.25 * 9 + 0.75 * 1))


def test_estimator_moments_add_up_over_components(estimator_moments=estimator_moments):
    logprobs, estimates = normal(6).log_softmax(0), normal(6, 3, seed=1)
    mean, variance = estimator_moments(logprobs, estimates)
    parts = [estimator_moments(logprobs, estimates[:, d : d + 1]) for d in range(3)]
    close(mean, torch.cat([m for m, _ in parts]))
    close(variance, sum(v for _, v in parts))
    assert variance.shape == () and mean.shape == (3,)


def _listing(change):
    def listing(vocab_size, max_length, eos_id=None):
        return change(*enumerate_responses(vocab_size, max_length, eos_id))

    return listing


def _powers(ref_logprobs, scores, n, *, ties):
    ref = ref_logprobs.exp().unsqueeze(-2)
    other, own = scores.unsqueeze(-2), scores.unsqueeze(-1)
    f, g = ((ref * mask).sum(-1) for mask in (other <= own, other < own))
    return ties(ref_logprobs, f, g, n)


def _population(*changes):
    return edited(population_dpo_loss, *changes)


def _weighted_sum(by):
    weights = f"({by}.unsqueeze(-1) + {by}.unsqueeze(-2)).exp()"
    return f"({weights} * preference_probabilities(scores) * losses).sum((-2, -1))"


MEAN = "(preference_probabilities(scores) * losses).mean((-2, -1))"
PLANTED = {
    "enumerate_responses": {
        "unfinished responses left out": lambda v, t, eos_id=None: (
            lambda tokens, mask: (
                (tokens, mask)
                if eos_id is None
                else (tokens[(tokens == eos_id).any(1)], mask[(tokens == eos_id).any(1)])
            )
        )(*enumerate_responses(v, t, eos_id)),
        "eos does not count": lambda v, t, eos_id=None: (
            lambda tokens, mask: (tokens, mask if eos_id is None else mask & (tokens != eos_id))
        )(*enumerate_responses(v, t, eos_id)),
        "same response listed with every padding": edited(
            enumerate_responses, ("any(token != eos_id for token in sequence[length:])", "False")
        ),
        "mask all True": _listing(lambda tokens, mask: (tokens, torch.ones_like(mask))),
        "in another order": _listing(lambda tokens, mask: (tokens.flip(0), mask.flip(0))),
        "padded with 0": _listing(lambda tokens, mask: (torch.where(mask, tokens, 0), mask)),
        "eos_id 0 taken for None": lambda v, t, eos_id=None: enumerate_responses(v, t, eos_id or None),
        "one token too short": lambda v, t, eos_id=None: enumerate_responses(v, max(t - 1, 1), eos_id),
    },
    "kl": {
        "swapped arguments": lambda p, q: kl(q, p),
        "naive 0 log 0": lambda p, q: (p.exp() * (p - q)).sum(-1),
        "missing support counts 0": lambda p, q: (p.exp() * (p - q)).nan_to_num(nan=0.0, posinf=0.0).sum(-1),
        "clamped logarithms": lambda p, q: (p.exp() * (p.clamp(min=-50) - q.clamp(min=-50))).sum(-1),
        "mean over responses": lambda p, q: kl(p, q) / p.shape[-1],
        "detached weights": lambda p, q: (p.exp().detach() * (p - q).clamp(min=-1e9)).nan_to_num(nan=0.0).sum(-1),
        "sum over prompts": lambda p, q: kl(p, q).sum(),
    },
    "objective": {
        "penalty added": lambda p, q, s, beta: objective(p, q, s, 0.0) + (beta * kl(p, q) if beta else 0),
        "reverse kl": lambda p, q, s, beta: objective(p, q, s, 0.0) - (beta * kl(q, p) if beta else 0),
        "beta forgotten": lambda p, q, s, beta: objective(p, q, s, 1.0 if beta else 0.0),
        "penalty forgotten": lambda p, q, s, beta: objective(p, q, s, 0.0),
        "score under the reference": lambda p, q, s, beta: (q.exp() * s).sum(-1) - (beta * kl(p, q) if beta else 0),
        "beta 0 still multiplies inf": lambda p, q, s, beta: (p.exp() * s).sum(-1) - beta * kl(p, q),
        "mean over responses": lambda p, q, s, beta: (p.exp() * s).mean(-1) - (beta * kl(p, q) if beta else 0),
    },
    "optimal_logprobs": {
        "times beta": edited(optimal_logprobs, ("scores / beta", "scores * beta")),
        "reference forgotten": lambda q, s, beta: (s / beta).log_softmax(-1),
        "not normalised": lambda q, s, beta: q + s / beta,
        "normalised over prompts": edited(optimal_logprobs, ("log_softmax(-1)", "log_softmax(0)")),
        "wrong sign": lambda q, s, beta: (q - s / beta).log_softmax(-1),
        "beta 0 accepted": lambda q, s, beta: (q + s / beta).log_softmax(-1),
        "overflows": lambda q, s, beta: ((q + s / beta).exp() / (q + s / beta).exp().sum(-1, keepdim=True)).log(),
        "reference not in the logarithm": lambda q, s, beta: (q.exp() + s / beta).log_softmax(-1),
    },
    "optimal_value": {
        "beta forgotten": lambda q, s, beta: optimal_value(q, s, beta) / beta,
        "largest score": lambda q, s, beta: s.max(-1).values,
        "mean in place of the sum": lambda q, s, beta: optimal_value(q, s, beta) - beta * math.log(q.shape[-1]),
        "reference forgotten": lambda q, s, beta: beta * (s / beta).logsumexp(-1),
        "expected score at the optimum": lambda q, s, beta: (optimal_logprobs(q, s, beta).exp() * s).sum(-1),
        "times beta inside": lambda q, s, beta: beta * (q + s * beta).logsumexp(-1),
    },
    "best_of_n": {
        "ties as full wins": lambda q, s, n: _powers(
            q, s, n, ties=lambda q, f, g, n: (f**n - (f - q.exp()) ** n).log()
        ),
        "the whole win of the tied to each": lambda q, s, n: _powers(
            q, s, n, ties=lambda q, f, g, n: (f**n - g**n).log()
        ),
        "ties shared equally, not by ref": lambda q, s, n: _powers(
            q, s, n, ties=lambda q, f, g, n: ((f**n - g**n) / (s.unsqueeze(-2) == s.unsqueeze(-1)).sum(-1)).log()
        ),
        "difference of powers in double": lambda q, s, n: _powers(
            q, s, n, ties=lambda q, f, g, n: q + ((f**n - g**n) / (f - g)).log()
        ),
        "worst of n": lambda q, s, n: best_of_n(q, -s, n),
        "n - 1 draws": lambda q, s, n: best_of_n(q, s, max(n - 1, 1)),
        "n times F^(n-1)": lambda q, s, n: _powers(
            q, s, n, ties=lambda q, f, g, n: q + math.log(n) + (n - 1) * f.log()
        ),
        "probabilities, not logarithms": lambda q, s, n: best_of_n(q, s, n).exp(),
        "reference where it rounds to 0": lambda q, s, n: torch.where(q.exp() > 0, best_of_n(q, s, n), q),
        "n below 1 accepted": lambda q, s, n: best_of_n(q, s, max(n, 1)),
    },
    "estimator_moments": {
        "unweighted": lambda p, g: (g.mean(0), (g - g.mean(0)).square().mean(0).sum()),
        "second moment": lambda p, g: (estimator_moments(p, g)[0], (p.exp()[:, None] * g.square()).sum()),
        "mean square less squared mean": lambda p, g: (
            estimator_moments(p, g)[0],
            (p.exp()[:, None] * g.square()).sum() - estimator_moments(p, g)[0].square().sum(),
        ),
        "mean over components": lambda p, g: (estimator_moments(p, g)[0], estimator_moments(p, g)[1] / g.shape[1]),
        "log-probabilities as weights": lambda p, g: ((p[:, None] * g).sum(0), (p[:, None] * g.square()).sum()),
        "unbiased correction": lambda p, g: (
            estimator_moments(p, g)[0],
            estimator_moments(p, g)[1] * len(g) / (len(g) - 1),
        ),
        "per component": lambda p, g: (
            estimator_moments(p, g)[0],
            (p.exp()[:, None] * (g - estimator_moments(p, g)[0]).square()).sum(0),
        ),
    },
    "frontier": {
        "in the other order": edited(frontier, ("for beta in betas]", "for beta in reversed(betas)]")),
        "the other kl": edited(frontier, ("kl(logprobs, ref_logprobs) for", "kl(ref_logprobs, logprobs) for")),
        "score under the reference": edited(
            frontier, ("(logprobs.exp() * judged_by)", "(ref_logprobs.exp() * judged_by)")
        ),
        "optimal for the gold score": edited(
            frontier,
            ("optimal_logprobs(ref_logprobs, scores, beta)", "optimal_logprobs(ref_logprobs, judged_by, beta)"),
        ),
        "judged by the proxy": lambda q, s, betas, gold_scores=None: frontier(q, s, betas),
        "gold scores broadcast": edited(
            frontier, ("gold_scores=judged_by", "gold_scores=scores"), ("* judged_by)", "* judged_by[:, :1])")
        ),
        "temperature in place of beta": lambda q, s, betas, gold_scores=None: frontier(
            q, s, [1 / b if b else b for b in betas], gold_scores
        ),
        "objective in place of the score": lambda q, s, betas, gold_scores=None: (
            lambda d, e: (d, e - torch.tensor(betas, dtype=d.dtype)[:, None] * d)
        )(*frontier(q, s, betas, gold_scores)),
        "mean over prompts": lambda *a: tuple(x.mean(1, keepdim=True).expand_as(x) for x in frontier(*a)),
        "prompts first": lambda *a: tuple(x.T for x in frontier(*a)),
        "expected score first": lambda *a: frontier(*a)[::-1],
    },
    "preference_probabilities": {
        "the loser's": lambda s: preference_probabilities(-s),
        "not a sigmoid": lambda s: (s.unsqueeze(-1) > s.unsqueeze(-2)).to(s),
        "normalised over the list": lambda s: s.softmax(-1).unsqueeze(-1).expand(*s.shape, s.shape[-1]),
        "probit": lambda s: torch.special.ndtr(s.unsqueeze(-1) - s.unsqueeze(-2)),
        "scores, not differences": lambda s: torch.sigmoid(s).unsqueeze(-1).expand(*s.shape, s.shape[-1]),
        "nobody beats himself": lambda s: preference_probabilities(s) * (1 - torch.eye(s.shape[-1], dtype=s.dtype)),
        "between prompts": lambda s: torch.sigmoid(s.unsqueeze(-1) - s.flip(0).unsqueeze(-2)),
    },
    "population_dpo_loss": {
        "pairs i = j left out": lambda p, q, s, beta: (
            (population_dpo_loss(p, q, s, beta) * s.shape[-1] - math.log(2) / 2) / (s.shape[-1] - 1)
        ),
        "per labelled comparison": lambda *a: population_dpo_loss(*a) * 2,
        "sum": lambda *a: population_dpo_loss(*a) * a[0].shape[-1] ** 2,
        "every pair the same weight": _population(("preference_probabilities(scores) * losses", "0.5 * losses")),
        "the better one always wins": _population(
            ("preference_probabilities(scores)", "(scores.unsqueeze(-1) >= scores.unsqueeze(-2)).to(scores)"),
        ),
        "the loser's probability": _population(
            ("preference_probabilities(scores)", "preference_probabilities(-scores)")
        ),
        "weighted with the policy": _population((MEAN, _weighted_sum("logprobs"))),
        "weighted with the reference": _population((MEAN, _weighted_sum("ref_logprobs"))),
        "reference forgotten": lambda p, q, s, beta: population_dpo_loss(p, 0 * q, s, beta),
        "beta forgotten": _population(("margins = beta * (", "margins = (")),
        "divided by beta": _population(("margins = beta * (", "margins = 1 / beta * (")),
        "beta on the scores": _population(
            ("preference_probabilities(scores)", "preference_probabilities(scores / beta)")
        ),
        "wrong sign": lambda *a: -population_dpo_loss(*a),
        "log of the sigmoid": _population(
            ("-torch.nn.functional.logsigmoid(margins)", "-torch.sigmoid(margins).log()")
        ),
        "over prompts": lambda *a: population_dpo_loss(*a).mean().expand(len(a[0])),
        "beta 0 accepted": _population(("_positive_beta(beta)", "pass")),
    },
}
EXEMPT = set()
