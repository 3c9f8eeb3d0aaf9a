"""Estimates of KL, its exact value and its use as a reward: enumeration, closed forms, 80-digit arithmetic."""

import math

import mpmath
import pytest
import torch

from planting import (
    DTYPES,
    close,
    edited,
    exact_logprobs,
    f64,
    gradients,
    ignores_padding,
    leaf,
    masks,
    mp,
    normal,
    raises,
    replaced,
)
from rlhfkit import exact
from rlhfkit import kl as kl_module
from rlhfkit.kl import (
    AdaptiveKLController,
    categorical_kl,
    full_vocabulary_kl,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_reward_to_go_loss,
    kl_shaped_rewards,
    off_policy_k2,
    off_policy_k3,
    sequence_kl,
    straight_through,
)
from rlhfkit.masked import masked_sum
from rlhfkit.models import TabularPolicy

pytestmark = pytest.mark.usefixtures("device")

INF = float("inf")
POLICY, REFERENCE = [1.2, -0.3, 0.4, -2.0], [-0.5, 0.9, 0.1, 0.3]


def pair(dtype=torch.float64):
    """Two distributions over four actions, as log-probabilities."""
    return (torch.tensor(x, dtype=dtype).log_softmax(-1) for x in (POLICY, REFERENCE))


def true_kl(logprobs, ref_logprobs):
    return math.fsum(math.exp(p) * (p - q) for p, q in zip(logprobs.tolist(), ref_logprobs.tolist(), strict=True))


def expected_gradient(estimate):
    """Sum over all actions of pi(a) times the gradient of the estimate, with respect to pi's logits."""
    _, ref_logprobs = pair()
    logits = leaf(f64(POLICY))
    logprobs = logits.log_softmax(-1)
    loss = (logprobs.exp().detach() * estimate(logprobs, ref_logprobs)).sum()
    return torch.autograd.grad(loss, logits)[0]


def gradient_of_kl(*, reverse=False):
    logits, (_, ref_logprobs) = leaf(f64(POLICY)), pair()
    p, q = (logits.log_softmax(-1), ref_logprobs) if not reverse else (ref_logprobs, logits.log_softmax(-1))
    return torch.autograd.grad((p.exp() * (p - q)).sum(), logits)[0]


def gaussian_moments(estimate, distance):
    """Mean and standard deviation under N(0, 1) of an estimate of KL(N(0, 1) || N(distance, 1)), by quadrature."""
    x = torch.linspace(-15, 15, 60001, dtype=torch.float64)
    weights = torch.exp(-x.square() / 2) / math.sqrt(2 * math.pi) * (30 / 60000)
    # the log-densities; the common constant cancels
    values = estimate(-x.square() / 2, -(x - distance).square() / 2)
    mean = (weights * values).sum()
    return mean.item(), (weights * (values - mean).square()).sum().sqrt().item()


def test_kl_k1_is_unbiased_and_has_the_spread_of_theory(kl_k1=kl_k1):
    logprobs, ref_logprobs = pair()
    close((logprobs.exp() * kl_k1(logprobs, ref_logprobs)).sum(), f64(true_kl(logprobs, ref_logprobs)))
    for distance in (0.1, 1.0):
        mean, spread = gaussian_moments(kl_k1, distance)
        assert math.isclose(mean, distance**2 / 2, rel_tol=1e-9)
        assert math.isclose(spread / mean, 2 / distance, rel_tol=1e-9)


def test_kl_k1_as_a_loss_has_no_expected_gradient(kl_k1=kl_k1):
    close(expected_gradient(kl_k1), torch.zeros(4, dtype=torch.float64))


def test_kl_k1_passes_what_is_not_finite_through(kl_k1=kl_k1):
    assert kl_k1(f64([float("nan"), -1.0]), f64([-1.0, -INF])).tolist()[1] == INF
    assert kl_k1(f64([float("nan")]), f64([-1.0])).isnan().all()


def test_kl_k2_has_the_bias_and_spread_of_theory(kl_k2=kl_k2):
    for distance in (0.1, 1.0):
        mean, spread = gaussian_moments(kl_k2, distance)
        truth = distance**2 / 2
        assert math.isclose(mean / truth - 1, distance**2 / 4, rel_tol=1e-7)
        assert math.isclose(spread / truth, math.sqrt(2 + distance**2), rel_tol=1e-9)


def test_kl_k2_as_a_loss_has_the_gradient_of_kl(kl_k2=kl_k2):
    close(expected_gradient(kl_k2), gradient_of_kl())


def test_kl_k2_is_not_clamped_and_keeps_nan(kl_k2=kl_k2):
    close(kl_k2(f64([-1.0, -61.0]), f64([-81.0, -1.0])), f64([3200.0, 1800.0]))
    assert kl_k2(f64([float("nan")]), f64([-1.0])).isnan().all()


def test_kl_k3_is_unbiased_and_has_the_spread_of_theory(kl_k3=kl_k3):
    logprobs, ref_logprobs = pair()
    close((logprobs.exp() * kl_k3(logprobs, ref_logprobs)).sum(), f64(true_kl(logprobs, ref_logprobs)))
    for distance in (0.1, 1.0):
        mean, spread = gaussian_moments(kl_k3, distance)
        assert math.isclose(mean, distance**2 / 2, rel_tol=1e-9)
        theory = math.sqrt(math.expm1(distance**2) - distance**2) / (distance**2 / 2)
        assert math.isclose(spread / mean, theory, rel_tol=1e-7)


def test_kl_k3_as_a_loss_has_the_gradient_of_the_other_kl(kl_k3=kl_k3):
    close(expected_gradient(kl_k3), gradient_of_kl(reverse=True))
    logprobs, ref_logprobs = pair()
    close(gradient_of_kl(reverse=True), logprobs.exp() - ref_logprobs.exp())


def test_kl_k3_agrees_with_80_digits(kl_k3=kl_k3):
    for dtype in DTYPES:
        eps = torch.finfo(dtype).eps
        for log_ratio in (1e-2, -1e-2, 1e-4, 1.0, -1.0, 30.0, -30.0, 80.0, -80.0):
            d = torch.tensor([log_ratio], dtype=dtype)
            (exact,) = mp(d)
            with mpmath.workdps(80):
                truth = float(mpmath.exp(exact) - 1 - exact)
            # expm1(d) - d cancels: eps |d| of an answer of d^2 / 2
            got = kl_k3(torch.zeros_like(d), d).item()
            assert math.isclose(got, truth, rel_tol=4 * eps * (1 + 2 / abs(log_ratio))), (dtype, log_ratio)


def test_kl_k3_is_never_negative(kl_k3=kl_k3):
    for dtype in DTYPES:
        d = torch.logspace(-9, 1, 400, dtype=dtype)
        assert (kl_k3(torch.zeros_like(d), torch.cat([d]))).min() >= 0
        assert (kl_k3(d, torch.zeros_like(d))).min() >= 0


def test_kl_k3_shows_missing_support_and_nan(kl_k3=kl_k3):
    assert kl_k3(f64([-1.0]), f64([-INF])).item() == INF
    assert kl_k3(f64([-1.0]), f64([float("nan")])).isnan().all()


EXTREME = [
    ([0.0, 1.0, -2.0], [1.0, 0.0, 0.5]),
    ([1e4, -1e4, 0.0], [0.0, 1e4, -1e4]),
    ([9999.0, 1e4, 9998.5], [-1e4, -9999.0, -9998.0]),
    ([-INF, 1.0, 0.0], [0.0, 0.0, 0.0]),
    ([-INF, 1.0, 0.0], [-INF, 0.0, 0.0]),
    ([40.0, 0.0, -40.0], [-40.0, 0.0, 40.0]),
]


def exact_kl(row, ref_row):
    terms = zip(exact_logprobs(row), exact_logprobs(ref_row), strict=True)
    return sum((mpmath.exp(p) * (p - q) for p, q in terms if p != -mpmath.inf), mpmath.mpf(0))


def test_categorical_kl_agrees_with_80_digits_on_extreme_logits(categorical_kl=categorical_kl):
    for dtype in DTYPES:
        logits, ref_logits = (torch.tensor([e[i] for e in EXTREME], dtype=dtype) for i in (0, 1))
        expected = [float(exact_kl(p, q)) for p, q in zip(logits, ref_logits, strict=True)]
        close(categorical_kl(logits, ref_logits), logits.new_tensor(expected))
        close(categorical_kl(logits, logits), torch.zeros_like(logits[:, 0]))


def test_categorical_kl_has_its_exact_gradients_on_extreme_logits(categorical_kl=categorical_kl):
    """p (log p/q - KL) for the policy's logits, q - p for the reference's."""
    for dtype in DTYPES:
        logits, ref_logits = (leaf(torch.tensor([e[i] for e in EXTREME], dtype=dtype)) for i in (0, 1))
        slopes = torch.autograd.grad(
            categorical_kl(logits, ref_logits).sum(), (logits, ref_logits), materialize_grads=True
        )
        expected, ref_expected = [], []
        for row, ref_row in zip(logits.detach(), ref_logits.detach(), strict=True):
            kl = exact_kl(row, ref_row)
            both = list(zip(exact_logprobs(row), exact_logprobs(ref_row), strict=True))
            expected.append([0.0 if p == -mpmath.inf else float(mpmath.exp(p) * (p - q - kl)) for p, q in both])
            ref_expected.append([float(mpmath.exp(q) - mpmath.exp(p)) for p, q in both])
        close(slopes[0], logits.new_tensor(expected))
        close(slopes[1], logits.new_tensor(ref_expected))


def test_categorical_kl_is_infinite_where_the_reference_lacks_support(categorical_kl=categorical_kl):
    for dtype in DTYPES:
        logits = torch.tensor([[0.0, 0.0], [0.0, -1e4], [0.0, -INF]], dtype=dtype)  # the second p rounds to 0
        ref_logits = torch.tensor([[0.0, -INF]] * 3, dtype=dtype)
        assert categorical_kl(logits, ref_logits).tolist() == [INF, INF, 0.0]


def test_categorical_kl_is_the_mean_of_the_estimate_over_all_actions(categorical_kl=categorical_kl):
    logits, ref_logits = normal(3, 4, 5), normal(3, 4, 5, seed=1)
    logprobs, ref_logprobs = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    close(categorical_kl(logits, ref_logits), (logprobs.exp() * kl_k3(logprobs, ref_logprobs)).sum(-1))


def test_categorical_kl_does_not_hide_nan(categorical_kl=categorical_kl):
    assert categorical_kl(f64([0.0, float("nan")]), f64([0.0, 0.0])).isnan()
    assert categorical_kl(f64([0.0, 0.0]), f64([0.0, float("nan")])).isnan()


def shaped(kl_shaped_rewards, dtype=torch.float64, kl_coef=0.5, fill=0.0):
    scores = torch.tensor([10.0, 20.0, 30.0, 40.0, 50.0], dtype=dtype)
    logprobs = torch.tensor([[-1.0, -2.0, -3.0, -4.0, -5.0]] * 5, dtype=dtype).where(masks(), fill)
    ref_logprobs = torch.tensor([[-2.0, -4.0, -2.0, -8.0, -1.0]] * 5, dtype=dtype).where(masks(), fill)
    return kl_shaped_rewards(scores, logprobs, ref_logprobs, masks(), kl_coef)


def test_shaped_rewards_by_hand(kl_shaped_rewards=kl_shaped_rewards):
    """log-ratios 1, 2, -1, 4, -4; the score lands on the last True, wherever that is."""
    expected = [
        [0.0, 0.0, 0.5, -2.0, 12.0],
        [-0.5, 19.0, 0.0, 0.0, 0.0],
        [-0.5, 0.0, 0.5, 0.0, 32.0],
        [-0.5, -1.0, 0.5, -2.0, 42.0],
        [0.0, 49.0, 0.0, 0.0, 0.0],
    ]
    for dtype in DTYPES:
        for fill in (0.0, float("nan"), INF, -INF):
            close(shaped(kl_shaped_rewards, dtype, fill=fill), torch.tensor(expected, dtype=dtype))


def test_shaped_rewards_have_the_mean_of_the_penalised_objective(kl_shaped_rewards=kl_shaped_rewards):
    (logprobs, ref_logprobs), scores = pair(), f64([1.0, -2.0, 0.5, 3.0])
    mask = torch.ones(4, 1, dtype=torch.bool)
    totals = kl_shaped_rewards(scores, logprobs[:, None], ref_logprobs[:, None], mask, 0.3).sum(1)
    expected = (logprobs.exp() * scores).sum() - 0.3 * true_kl(logprobs, ref_logprobs)
    close((logprobs.exp() * totals).sum(), expected)


def test_shaped_rewards_carry_no_gradient_and_change_no_argument(kl_shaped_rewards=kl_shaped_rewards):
    scores, logprobs, ref_logprobs = leaf(normal(5)), leaf(normal(5, 5)), leaf(normal(5, 5, seed=1))
    before = [x.detach().clone() for x in (scores, logprobs, ref_logprobs)]
    assert not kl_shaped_rewards(scores, logprobs, ref_logprobs, masks(), 0.1).requires_grad
    for x, old in zip((scores, logprobs, ref_logprobs), before, strict=True):
        close(x.detach(), old)


def test_shaped_rewards_take_double_scores_with_a_single_precision_policy(kl_shaped_rewards=kl_shaped_rewards):
    scores = f64([10.0, 20.0, 30.0, 40.0, 50.0])
    zeros = torch.zeros(5, 5)
    assert kl_shaped_rewards(scores, zeros, zeros, masks(), 0.1).sum(1).tolist() == scores.tolist()


def test_shaped_rewards_refuse_an_empty_row(kl_shaped_rewards=kl_shaped_rewards):
    mask = torch.tensor([[True, False], [False, False]])
    call = lambda: kl_shaped_rewards(normal(2), normal(2, 2), normal(2, 2), mask, 0.1)  # noqa: E731
    raises(ValueError, call, "response_mask", "[1]")


def test_shaped_rewards_do_not_hide_nan(kl_shaped_rewards=kl_shaped_rewards):
    mask = torch.ones(1, 2, dtype=torch.bool)
    rewards = kl_shaped_rewards(f64([1.0]), f64([[float("nan"), 0.0]]), f64([[0.0, 0.0]]), mask, 0.1)
    assert rewards[0, 0].isnan() and rewards[0, 1] == 1.0


def moved(controller, kl, n_steps):
    controller.update(kl, n_steps)
    return controller.kl_coef


def test_controller_follows_the_published_rule(AdaptiveKLController=AdaptiveKLController):
    """init 0.15, target 6, horizon 10000: the error is clipped at 0.2 either way."""
    for kl, error in ((60.0, 0.2), (7.2, 0.2), (6.6, 0.1), (6.0, 0.0), (5.7, -0.05), (0.0, -0.2), (-3.0, -0.2)):
        controller = AdaptiveKLController(0.15, 6.0, 10_000)
        assert math.isclose(moved(controller, kl, 256), 0.15 * (1 + error * 256 / 10_000), rel_tol=1e-12)


def test_controller_compounds_and_holds_at_the_target(AdaptiveKLController=AdaptiveKLController):
    controller = AdaptiveKLController(0.2, 2.0, 100)
    assert math.isclose(moved(controller, 9.0, 10) and moved(controller, 9.0, 10), 0.2 * 1.02**2, rel_tol=1e-12)
    before = controller.kl_coef
    assert moved(controller, 2.0, 1000) == before
    raises(ValueError, lambda: controller.update(float("nan"), 1), "kl", "nan")


def test_sequence_kl_averages_to_the_exact_kl_of_sequences(sequence_kl=sequence_kl):
    """Two independent tokens from the pair: over all 16 sequences the mean is twice the KL of one token."""
    logprobs, ref_logprobs = pair()
    i, j = torch.arange(16) // 4, torch.arange(16) % 4
    both, ref_both = (torch.stack([x[i], x[j]], 1) for x in (logprobs, ref_logprobs))
    estimates = sequence_kl(both, ref_both, torch.ones(16, 2, dtype=torch.bool))
    close((both.sum(1).exp() * estimates).sum(), f64(2 * true_kl(logprobs, ref_logprobs)))


def test_sequence_kl_ignores_padding(sequence_kl=sequence_kl):
    ignores_padding(lambda p, q: sequence_kl(p, q, masks()), masks(), normal(5, 5), normal(5, 5, seed=1))


def test_sequence_kl_keeps_its_gradient(sequence_kl=sequence_kl):
    slope, ref_slope = gradients(lambda p, q: sequence_kl(p, q, masks()), normal(5, 5), normal(5, 5, seed=1))
    close(slope, -ref_slope)
    assert (slope != 0).equal(masks())


class Sequences:
    """All responses of up to three tokens, ended by token 0, under a policy and a reference that know every prefix."""

    def __init__(self):
        tokens, self.mask = exact.enumerate_responses(3, 3, 0)
        self.policy, self.ref = (TabularPolicy(3, 3, 1, normal(1, 13, 3, seed=seed)) for seed in (5, 6))
        sequences = torch.cat([torch.zeros_like(tokens[:, :1]), tokens], 1)
        self.logits = self.policy.logits(sequences)[:, :-1]
        self.ref_logits = self.ref.logits(sequences)[:, :-1].detach()
        self.logprobs, self.ref_logprobs = (
            x.log_softmax(-1).gather(2, tokens.unsqueeze(2)).squeeze(2) for x in (self.logits, self.ref_logits)
        )
        self.whole, self.ref_whole = (  # log-probabilities of whole responses, (N,)
            torch.where(self.mask, x, 0.0).sum(1) for x in (self.logprobs, self.ref_logprobs)
        )

    def kl(self):
        return exact.kl(self.whole.unsqueeze(0), self.ref_whole.unsqueeze(0))[0]

    def gradient(self, x):
        return torch.autograd.grad(x, self.policy.table, retain_graph=True)[0]

    def mean(self, losses):
        """Mean of a loss over all responses, whose probabilities are constant, as they are for samples."""
        return (self.whole.exp().detach() * losses).sum()


def test_full_vocabulary_kl_averages_to_the_exact_kl_with_less_variance_than_k1(full_vocabulary_kl=full_vocabulary_kl):
    world = Sequences()
    estimates = full_vocabulary_kl(world.logits, world.ref_logits, world.mask)
    k1 = sequence_kl(world.logprobs, world.ref_logprobs, world.mask)
    mean, variance = exact.estimator_moments(world.whole, estimates.unsqueeze(1))
    close(mean[0], world.kl())
    assert estimates.shape == k1.shape and (estimates >= 0).all() and (k1 < 0).any()
    assert 0 < variance < exact.estimator_moments(world.whole, k1.unsqueeze(1))[1] / 2


def test_full_vocabulary_kl_can_vary_where_k1_does_not(full_vocabulary_kl=full_vocabulary_kl):
    """pi is ref given that the second token is 0: k1 is log 4/3 whatever was said, and the later costs differ."""
    logits = f64([[[1 / 3, 2 / 3], [1.0, 0.0]], [[1 / 3, 2 / 3], [1.0, 0.0]]]).log()
    ref_logits = f64([[[1 / 2, 1 / 2], [1 / 2, 1 / 2]], [[1 / 2, 1 / 2], [1.0, 0.0]]]).log()
    mask = torch.ones(2, 2, dtype=torch.bool)
    first = math.log(2) - math.log(3) + 2 / 3 * math.log(2)  # 1/3 log 2/3 + 2/3 log 4/3
    estimates = full_vocabulary_kl(logits, ref_logits, mask)
    close(estimates, f64([first + math.log(2), first]))
    close((f64([1 / 3, 2 / 3]) * estimates).sum(), f64(math.log(4 / 3)))


def test_full_vocabulary_kl_as_a_loss_lacks_what_early_tokens_do_to_later_ones(full_vocabulary_kl=full_vocabulary_kl):
    world = Sequences()
    estimates = full_vocabulary_kl(world.logits, world.ref_logits, world.mask)
    truth, direct = world.gradient(world.kl()), world.gradient(world.mean(estimates))
    close(direct + world.gradient(world.mean(estimates.detach() * world.whole)), truth)
    last = slice(4, None)  # prefixes of two tokens: nothing comes later
    close(direct[:, last], truth[:, last])
    assert (direct[:, 0] - truth[:, 0]).abs().max() > 0.01


def test_full_vocabulary_kl_counts_the_mask_only_and_has_the_gradient_of_both(full_vocabulary_kl=full_vocabulary_kl):
    logits, ref_logits = normal(5, 5, 3), normal(5, 5, 3, seed=1)
    kl = lambda p, q: full_vocabulary_kl(p, q, masks())  # noqa: E731
    ignores_padding(kl, masks().unsqueeze(-1), logits, ref_logits)
    alone = [sum(categorical_kl(p[m], q[m])) for p, q, m in zip(logits, ref_logits, masks(), strict=True)]
    close(kl(logits, ref_logits), torch.stack(alone))
    for slope in gradients(kl, logits, ref_logits):
        assert (slope != 0).any(-1).equal(masks())
    assert full_vocabulary_kl(f64([[[0.0, 0.0]]]), f64([[[0.0, -INF]]]), masks()[3:4, :1]).item() == INF
    assert full_vocabulary_kl(f64([[[float("nan"), 0.0]]]), f64([[[0.0, 0.0]]]), masks()[3:4, :1]).isnan().all()


def test_straight_through_has_the_value_of_one_and_the_gradient_of_the_other(straight_through=straight_through):
    for dtype in DTYPES:
        value, surrogate = normal(6, dtype=dtype), 1e9 * normal(6, seed=1, dtype=dtype)
        assert straight_through(value, surrogate).equal(value)  # to the last digit, whatever the surrogate
        slopes = gradients(straight_through, value, surrogate)
        close(slopes[0], torch.zeros_like(value))
        close(slopes[1], normal(6, seed=99, dtype=dtype))
    assert straight_through(f64([float("nan"), INF]), f64([1.0, 1.0]))[1] == INF
    assert straight_through(f64([float("nan")]), f64([1.0])).isnan().all()


def test_straight_through_k3_and_k2_is_the_kl_with_its_gradient(straight_through=straight_through):
    combined = lambda p, q: straight_through(kl_k3(p, q), kl_k2(p, q))  # noqa: E731
    logprobs, ref_logprobs = pair()
    close((logprobs.exp() * combined(logprobs, ref_logprobs)).sum(), f64(true_kl(logprobs, ref_logprobs)))
    close(expected_gradient(combined), gradient_of_kl())


def test_kl_reward_to_go_has_the_exact_gradient_of_the_kl_of_whole_responses(kl_reward_to_go_loss=kl_reward_to_go_loss):
    world = Sequences()
    losses = kl_reward_to_go_loss(world.logprobs, world.ref_logprobs, world.mask)
    truth = world.gradient(world.kl())
    close(world.gradient(world.mean(losses.sum(1))), truth)
    # and not that of the next token's KL, which is smaller at the first token
    direct = world.gradient(world.mean(full_vocabulary_kl(world.logits, world.ref_logits, world.mask)))
    assert (direct - truth).abs().max() > 0.01


def test_kl_reward_to_go_by_hand(kl_reward_to_go_loss=kl_reward_to_go_loss):
    """log-ratios 1, 2, -1, 4, -4 of five tokens: from each on to the end, where the mask lets them count."""
    for dtype in DTYPES:
        logprobs = torch.tensor([[-1.0, -2.0, -3.0, -4.0, -5.0]] * 5, dtype=dtype)
        ref_logprobs = torch.tensor([[-2.0, -4.0, -2.0, -8.0, -1.0]] * 5, dtype=dtype)
        weights = torch.tensor(
            [[0, 0, -1, 0, -4], [3, 2, 0, 0, 0], [-4, 0, -5, 0, -4], [2, 1, -1, 0, -4], [0, 2, 0, 0, 0]], dtype=dtype
        )
        close(kl_reward_to_go_loss(logprobs, ref_logprobs, masks()), logprobs * weights)
        leaves = leaf(logprobs), leaf(ref_logprobs)
        loss = kl_reward_to_go_loss(*leaves, masks()).sum()
        slope, ref_slope = torch.autograd.grad(loss, leaves, allow_unused=True)
        close(slope, weights)
        assert ref_slope is None  # the reference is constant


def test_kl_reward_to_go_ignores_padding_and_does_not_hide_nan(kl_reward_to_go_loss=kl_reward_to_go_loss):
    loss = lambda p, q: kl_reward_to_go_loss(p, q, masks())  # noqa: E731
    ignores_padding(loss, masks(), normal(5, 5), normal(5, 5, seed=1))
    logprobs = normal(1, 4).where(torch.arange(4) != 2, float("nan"))
    got = kl_reward_to_go_loss(logprobs, normal(1, 4, seed=1), torch.ones(1, 4, dtype=torch.bool))
    assert got.isnan().tolist() == [[True, True, True, False]]  # all that is weighed with the third token's k1


OLD = [0.3, 0.2, -0.6, 0.5]


def off_policy(estimate):
    """Mean of an estimate over the actions of an older policy, and its gradient with respect to the logits of pi."""
    old_logprobs, (_, ref_logprobs) = f64(OLD).log_softmax(-1), pair()
    logits = leaf(f64(POLICY))
    mean = (old_logprobs.exp() * estimate(logits.log_softmax(-1), old_logprobs, ref_logprobs)).sum()
    return mean.detach(), torch.autograd.grad(mean, logits)[0]


def passes_gradient_to_the_policy_only(estimate):
    inputs = [normal(6, seed=seed) - 3 for seed in range(3)]
    slope, *others = gradients(estimate, *inputs)
    assert (slope != 0).all() and all((x == 0).all() for x in others)
    for at in range(3):
        assert estimate(*(x.where(torch.arange(6) != 2, float("nan")) if i == at else x for i, x in enumerate(inputs)))[
            2
        ].isnan()


def test_off_policy_k2_has_the_gradient_of_kl_and_not_its_value(off_policy_k2=off_policy_k2):
    mean, slope = off_policy(off_policy_k2)
    close(slope, gradient_of_kl())
    assert abs(mean.item() - true_kl(*pair())) > 0.05


def test_off_policy_k2_on_samples_of_pi_itself_is_k2(off_policy_k2=off_policy_k2):
    p, q = normal(6) - 3, normal(6, seed=1) - 3
    close(off_policy_k2(p, p, q), kl_k2(p, q))
    close(off_policy_k2(p, p - math.log(3), q), 3 * kl_k2(p, q))  # three times as probable as when it was sampled
    close(off_policy_k2(f64([-1.0]), f64([-41.0]), f64([-3.0])), f64([2 * math.exp(40)]))  # nothing is clamped
    passes_gradient_to_the_policy_only(off_policy_k2)


def test_off_policy_k3_has_value_and_gradient_of_kl(off_policy_k3=off_policy_k3):
    mean, slope = off_policy(off_policy_k3)
    close(mean, f64(true_kl(*pair())))
    close(slope, gradient_of_kl())


def test_off_policy_k3_on_samples_of_pi_itself_is_k3_with_another_gradient(off_policy_k3=off_policy_k3):
    """On-policy too: k3 alone has the gradient of the other KL, and the differentiated ratio repairs it."""
    p, q = normal(6) - 3, normal(6, seed=1) - 3
    close(off_policy_k3(p, p, q), kl_k3(p, q))
    close(off_policy_k3(p, p - math.log(3), q), 3 * kl_k3(p, q))
    close(off_policy_k3(f64([-1.0]), f64([-41.0]), f64([-1.0 + math.log(2)])), f64([(1 - math.log(2)) * math.exp(40)]))
    close(expected_gradient(lambda p, q: off_policy_k3(p, p.detach(), q)), gradient_of_kl())
    passes_gradient_to_the_policy_only(off_policy_k3)


def _naive_categorical_kl(logits, ref_logits):
    p, q = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def _controller(*changes):
    return edited(AdaptiveKLController, *changes)


def _shaped(*changes):
    return edited(kl_shaped_rewards, *changes)


def _shaped_with(k):
    def rewards(*arguments):
        with replaced(kl_module, kl_k1=k):
            return kl_shaped_rewards(*arguments)

    return rewards


def _to_go(*changes):
    return edited(kl_reward_to_go_loss, *changes)


PLANTED = {
    "kl_k1": {
        "wrong sign": lambda p, q: q - p,
        "absolute value": lambda p, q: (p - q).abs(),
        "weighted by the probability": lambda p, q: p.exp() * (p - q),
        "detached": lambda p, q: (p - q).detach() + 0 * kl_k2(p, q) + p,
        "clamped at zero": lambda p, q: (p - q).clamp(min=0),
        "hides what is not finite": lambda p, q: (p - q).nan_to_num(),
    },
    "kl_k2": {
        "forgets the half": lambda p, q: (p - q).square(),
        "half the log-ratio": lambda p, q: 0.5 * (p - q),
        "square of the ratio less one": lambda p, q: 0.5 * (torch.exp(p - q) - 1).square(),
        "clamps the log-ratio": lambda p, q: 0.5 * (p - q).clamp(-20, 20).square(),
        "detached": lambda p, q: 0.5 * (p - q).square().detach() + 0 * p,
    },
    "kl_k3": {
        "swapped arguments": lambda p, q: kl_k3(q, p),
        "naive exp(d) - 1 - d": lambda p, q: torch.exp(q - p) - 1 - (q - p),
        "log-ratio added": lambda p, q: torch.expm1(q - p) + (q - p),
        "ratio of pi to ref": lambda p, q: torch.expm1(p - q) - (q - p),
        "clamps the log-ratio": lambda p, q: kl_k3(p, q.clamp(p - 20, p + 20)),
        "clamps the result": lambda p, q: kl_k3(p, q).clamp(max=10),
        "k2 in its place": kl_k2,
        "k1 in its place": kl_k1,
        "ratio treated as constant": lambda p, q: torch.expm1(q - p).detach() - (q - p),
        "hides what is not finite": lambda p, q: kl_k3(p, q).nan_to_num(),
    },
    "categorical_kl": {
        "0 log 0 is nan": _naive_categorical_kl,
        "swapped arguments": lambda p, q: categorical_kl(q, p),
        "logits taken for log-probabilities": lambda p, q: (p.softmax(-1) * (p - q)).sum(-1),
        "mean over the categories": lambda p, q: categorical_kl(p, q) / p.shape[-1],
        "missing support counts 0": lambda p, q: (
            (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).nan_to_num(nan=0.0, posinf=0.0).sum(-1)
        ),
        "epsilon inside the logarithms": lambda p, q: (
            p.softmax(-1) * ((p.softmax(-1) + 1e-8).log() - (q.softmax(-1) + 1e-8).log())
        ).sum(-1),
        "support missing where p rounds to 0": edited(
            categorical_kl,
            (
                "torch.where(log_ratio == torch.inf, log_ratio, logprobs.exp() * log_ratio)",
                "(logprobs.exp() * log_ratio).nan_to_num(nan=0.0, posinf=float('inf'))",
            ),
        ),
        "reference detached": lambda p, q: categorical_kl(p, q.detach()),
        "axis 0": lambda p, q: categorical_kl(p.transpose(0, -1), q.transpose(0, -1)),
        "sum of k3 under the reference": lambda p, q: (q.softmax(-1) * kl_k3(p.log_softmax(-1), q.log_softmax(-1))).sum(
            -1
        ),
    },
    "kl_shaped_rewards": {
        "penalty added": _shaped(("-kl_coef * kl_k1", "kl_coef * kl_k1")),
        "log-ratio reversed": _shaped_with(lambda p, q: q - p),
        "penalises with k3": _shaped_with(kl_k3),
        "penalises with k2": _shaped_with(kl_k2),
        "score in the last column": _shaped((", last]", ", -1]")),
        "score at the count of True less one": _shaped(
            (
                "(response_mask * torch.arange(1, length + 1, device=logprobs.device)).argmax(1)",
                "response_mask.sum(1) - 1",
            )
        ),
        "score at the first True": _shaped(
            (
                "(response_mask * torch.arange(1, length + 1, device=logprobs.device)).argmax(1)",
                "response_mask.int().argmax(1)",
            )
        ),
        "score on every token": _shaped(
            (
                "rewards[torch.arange(batch, device=logprobs.device), last] += scores.detach().to(rewards.dtype)",
                "rewards = torch.where(response_mask, rewards + scores.detach()[:, None], rewards)",
            )
        ),
        "score replaces the last penalty": _shaped(("+= scores", "= scores")),
        "multiplies by the mask": _shaped(
            ("torch.where(response_mask, penalties, torch.zeros_like(penalties))", "penalties * response_mask")
        ),
        "forgets the mask": _shaped(
            ("torch.where(response_mask, penalties, torch.zeros_like(penalties))", "penalties")
        ),
        "keeps the gradient of the penalty": _shaped((".detach()\n    rewards", "\n    rewards")),
        "keeps the gradient of the score": _shaped(("scores.detach()", "scores")),
        "score shared among the tokens": lambda s, p, q, m, c: (
            kl_shaped_rewards(torch.zeros_like(s), p, q, m, c) + torch.where(m, (s / m.sum(1))[:, None], 0.0)
        ),
    },
    "AdaptiveKLController": {
        "wrong sign": _controller(("1.0 + error", "1.0 - error")),
        "no clip": _controller(("min(max(kl / self.target - 1.0, -0.2), 0.2)", "kl / self.target - 1.0")),
        "clip at 1": _controller(("-0.2), 0.2)", "-1.0), 1.0)")),
        "error not relative": _controller(("kl / self.target - 1.0", "kl - self.target")),
        "added, not multiplied": _controller(("self.kl_coef *= 1.0 + error", "self.kl_coef += error")),
        "forgets n_steps": _controller(("error * n_steps", "error")),
        "clip only from above": _controller(("max(kl / self.target - 1.0, -0.2)", "kl / self.target - 1.0")),
    },
    "sequence_kl": {
        "mean over tokens": lambda p, q, m: sequence_kl(p, q, m) / m.sum(1),
        "forgets the mask": lambda p, q, m: (p - q).sum(1),
        "multiplies by the mask": lambda p, q, m: ((p - q) * m).sum(1),
        "wrong sign": lambda p, q, m: sequence_kl(q, p, m),
        "detached": lambda p, q, m: sequence_kl(p, q, m).detach(),
    },
    "full_vocabulary_kl": {
        "swapped arguments": lambda p, q, m: full_vocabulary_kl(q, p, m),
        "mean over tokens": lambda p, q, m: full_vocabulary_kl(p, q, m) / m.sum(1),
        "forgets the mask": lambda p, q, m: categorical_kl(p, q).sum(1),
        "multiplies by the mask": lambda p, q, m: (categorical_kl(p, q) * m).sum(1),
        "padding in the gradient": lambda p, q, m: masked_sum(categorical_kl(p, q), m, 1),
        "one padded in the gradient": edited(
            full_vocabulary_kl, ("ref_logits.masked_fill(padding, 0.0)", "ref_logits")
        ),
        "detached": lambda p, q, m: full_vocabulary_kl(p, q, m).detach(),
        "reference detached": lambda p, q, m: full_vocabulary_kl(p, q.detach(), m),
        "sum of k3 over the vocabulary": lambda p, q, m: torch.where(
            m, kl_k3(p.log_softmax(-1), q.log_softmax(-1)).sum(-1), 0.0
        ).sum(1),
        "logits taken for log-probabilities": lambda p, q, m: torch.where(
            m, (p.softmax(-1) * (p - q)).sum(-1), 0.0
        ).sum(1),
        "the likeliest token's k1": lambda p, q, m: torch.where(
            m, (p.log_softmax(-1) - q.log_softmax(-1)).gather(-1, p.argmax(-1, keepdim=True))[..., 0], 0.0
        ).sum(1),
        "last token only": lambda p, q, m: torch.where(m, categorical_kl(p, q), 0.0)[:, -1],
    },
    "straight_through": {
        "swapped arguments": lambda v, s: straight_through(s, v),
        "digits lost": lambda v, s: (v - s).detach() + s,
        "value not detached": lambda v, s: v + (s - s.detach()),
        "sum of both": lambda v, s: v.detach() + s,
        "no gradient": lambda v, s: v.detach() + 0 * s,
        "gradient reversed": lambda v, s: v.detach() - (s - s.detach()),
        "hides what is not finite": lambda v, s: straight_through(v.nan_to_num(), s),
    },
    "kl_reward_to_go_loss": {
        "this token only": lambda p, q, m: torch.where(m, p * (p - q).detach(), 0.0),
        "later tokens only": _to_go((".flip(1)\n", ".flip(1) - torch.where(response_mask, log_ratio, zero)\n")),
        "tokens so far": _to_go((".flip(1).cumsum(1).flip(1)", ".cumsum(1)")),
        "the whole response": _to_go((".flip(1).cumsum(1).flip(1)", ".sum(1, keepdim=True)")),
        "k1 not detached": _to_go(("kl_k1(logprobs, ref_logprobs).detach()", "kl_k1(logprobs, ref_logprobs)")),
        "wrong sign": lambda p, q, m: -kl_reward_to_go_loss(p, q, m),
        "swapped arguments": lambda p, q, m: kl_reward_to_go_loss(q, p, m),
        "k2 in its place": _to_go(("kl_k1(", "kl_k2(")),
        "k3 in its place": _to_go(("kl_k1(", "kl_k3(")),
        "padding counts as later": _to_go(("torch.where(response_mask, log_ratio, zero)", "log_ratio")),
        "multiplies by the mask": _to_go(
            ("torch.where(response_mask, log_ratio, zero)", "(log_ratio * response_mask)")
        ),
        "padding has a loss": _to_go(("torch.where(response_mask, logprobs * to_go, zero)", "logprobs * to_go")),
        "probability in place of its logarithm": _to_go(("logprobs * to_go", "logprobs.exp() * to_go")),
        "summed": lambda p, q, m: kl_reward_to_go_loss(p, q, m).sum(1, keepdim=True).expand_as(p),
    },
    "off_policy_k2": {
        "ratio differentiated": edited(off_policy_k2, (".detach()\n", "\n")),
        "ratio forgotten": lambda p, o, q: kl_k2(p, q.detach()) + 0 * o.detach(),
        "ratio upside down": lambda p, o, q: torch.exp(o - p).detach() * kl_k2(p, q.detach()),
        "ratio clipped": lambda p, o, q: torch.exp(p - o).clamp(0.8, 1.2).detach() * kl_k2(p, q.detach()),
        "reference not detached": edited(off_policy_k2, ("ref_logprobs.detach()", "ref_logprobs")),
        "k3 in its place": lambda p, o, q: torch.exp(p - o).detach() * kl_k3(p, q.detach()),
        "to the old policy": lambda p, o, q: torch.exp(p - o).detach() * kl_k2(p, o.detach()) + 0 * q.detach(),
        "of the old policy": lambda p, o, q: torch.exp(p - o) * kl_k2(o, q).detach(),
    },
    "off_policy_k3": {
        "ratio constant": edited(
            off_policy_k3,
            ("torch.exp(logprobs - old_logprobs.detach())", "torch.exp(logprobs - old_logprobs).detach()"),
        ),
        "ratio forgotten": lambda p, o, q: kl_k3(p, q.detach()) + 0 * o.detach(),
        "ratio upside down": lambda p, o, q: torch.exp(o.detach() - p) * kl_k3(p, q.detach()),
        "ratio clipped": lambda p, o, q: torch.exp(p - o.detach()).clamp(0.8, 1.2) * kl_k3(p, q.detach()),
        "k3 constant": lambda p, o, q: torch.exp(p - o.detach()) * kl_k3(p, q).detach(),
        "k2 in its place": lambda p, o, q: torch.exp(p - o.detach()) * kl_k2(p, q.detach()),
        "reference not detached": edited(off_policy_k3, ("ref_logprobs.detach()", "ref_logprobs")),
        "old policy not detached": edited(off_policy_k3, ("old_logprobs.detach()", "old_logprobs")),
        "of the old policy": lambda p, o, q: torch.exp(p - o.detach()) * kl_k3(o.detach(), q.detach()),
        "swapped arguments": lambda p, o, q: torch.exp(p - o.detach()) * kl_k3(q.detach(), p),
    },
}
EXEMPT = set()
