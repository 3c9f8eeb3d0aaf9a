"""Properties that hold for every mask, every padding content, every split of a batch and every extreme value."""

import math

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from planting import close, ignores_padding, normal
from rlhfkit import advantages, exact, kl, logprobs, masked, policy_losses, preference_losses

DTYPES = st.sampled_from([torch.float32, torch.float64])
SEEDS = st.integers(0, 10_000)
UNIT = st.sampled_from([0.0, 0.3, 0.95, 1.0])
HOW = st.sampled_from(["token-mean", "sequence-mean", "sequence-sum"])


@st.composite
def masks(draw, rows=None, columns=None, least=1):
    """Boolean (B, T) with at least ``least`` True: left-padded, ragged, with holes, with empty rows, anything."""
    b = rows or draw(st.integers(1, 4))
    t = columns or draw(st.integers(1, 5))
    mask = torch.tensor(draw(st.lists(st.lists(st.booleans(), min_size=t, max_size=t), min_size=b, max_size=b)))
    assume(mask.sum() >= least)
    return mask


def world(mask, seed, count=2):
    return [normal(*mask.shape, seed=seed + i) for i in range(count)]


@given(masks(), SEEDS, HOW)
def test_padding_content_changes_no_mean_and_no_gradient(mask, seed, how):
    (x,) = world(mask, seed, 1)
    ignores_padding(lambda x: masked.aggregate(x, mask, how), mask, x)
    ignores_padding(lambda x: masked.masked_mean(x, mask, dim=0), mask, x)
    ignores_padding(lambda x: masked.masked_sum(x, mask), mask, x)


@given(masks(least=2), SEEDS, st.booleans())
def test_padding_content_changes_no_variance_and_no_whitening(mask, seed, shift_mean):
    (x,) = world(mask, seed, 1)
    ignores_padding(lambda x: masked.masked_var(x, mask), mask, x)
    ignores_padding(lambda x: masked.whiten(x, mask, shift_mean=shift_mean), mask, x)


@given(masks(), SEEDS, UNIT, UNIT)
def test_padding_content_changes_no_advantage(mask, seed, gamma, lam):
    for which in (0, 1):
        ignores_padding(
            lambda r, v, w=which: advantages.gae(r, v, gamma=gamma, lam=lam, mask=mask)[w], mask, *world(mask, seed)
        )


@given(masks(), SEEDS, UNIT, UNIT)
def test_a_masked_rollout_is_the_rollout_without_its_masked_steps(mask, seed, gamma, lam):
    rewards, values = world(mask, seed)
    whole, returns = advantages.gae(rewards, values, gamma=gamma, lam=lam, mask=mask)
    for b, keep in enumerate(mask):
        if keep.any():
            alone = advantages.gae(rewards[b : b + 1, keep], values[b : b + 1, keep], gamma=gamma, lam=lam)
            close(whole[b : b + 1, keep], alone[0])
            close(returns[b : b + 1, keep], alone[1])


@given(masks(), SEEDS, HOW, st.integers(0, 3))
def test_moving_tokens_within_their_row_changes_no_average(mask, seed, how, shift):
    (x,) = world(mask, seed, 1)
    close(masked.aggregate(x.roll(shift, 1), mask.roll(shift, 1), how), masked.aggregate(x, mask, how))


@given(masks(), SEEDS, HOW, st.integers(1, 3))
def test_more_padding_changes_no_average(mask, seed, how, extra):
    (x,) = world(mask, seed, 1)
    padded = torch.cat([x, torch.full((len(x), extra), float("nan"), dtype=x.dtype)], 1)
    longer = torch.cat([mask, torch.zeros(len(x), extra, dtype=torch.bool)], 1)
    close(masked.aggregate(padded, longer, how), masked.aggregate(x, mask, how))


@given(masks(rows=4), SEEDS, HOW, st.integers(1, 3))
def test_averages_of_two_half_batches_combine_to_that_of_the_whole(mask, seed, how, cut):
    """Weighted by what each average counts: tokens, or sequences that have any."""
    (x,) = world(mask, seed, 1)
    assume(mask[:cut].any() and mask[cut:].any())
    weights = [(m.sum() if how == "token-mean" else m.any(1).sum()) for m in (mask[:cut], mask[cut:])]
    parts = [masked.aggregate(y, m, how) for y, m in ((x[:cut], mask[:cut]), (x[cut:], mask[cut:]))]
    close(sum(w * p for w, p in zip(weights, parts, strict=True)) / sum(weights), masked.aggregate(x, mask, how))


@given(masks(rows=4), SEEDS, st.integers(1, 3))
def test_rows_of_a_batch_do_not_touch_each_other(mask, seed, cut):
    p, q, logits = *world(mask, seed), normal(*mask.shape, 3, seed=seed)
    scores, tokens = normal(4, seed=seed), mask.long()
    assume(mask.any(1).all())
    functions = [
        lambda s: logprobs.token_logprobs(logits[s], tokens[s]),
        lambda s: logprobs.sequence_logprobs(p[s], mask[s]),
        lambda s: logprobs.entropy(logits[s]),
        lambda s: kl.sequence_kl(p[s], q[s], mask[s]),
        lambda s: kl.kl_shaped_rewards(scores[s], p[s], q[s], mask[s], 0.1),
        lambda s: kl.kl_reward_to_go_loss(p[s], q[s], mask[s]),
        lambda s: kl.full_vocabulary_kl(logits[s], logits[s].roll(1, -1), mask[s]),
        lambda s: advantages.rewards_to_go(p[s], mask[s], 0.9),
    ]
    for function in functions:
        close(torch.cat([function(slice(0, cut)), function(slice(cut, 4))]), function(slice(0, 4)))


@given(masks(), SEEDS, st.floats(0, 2))
def test_shaped_rewards_sum_to_score_minus_weighted_kl(mask, seed, kl_coef):
    assume(mask.any(1).all())
    p, q = world(mask, seed)
    scores = normal(len(mask), seed=seed + 9)
    total = kl.kl_shaped_rewards(scores, p, q, mask, kl_coef).sum(1)
    close(total, scores - kl_coef * kl.sequence_kl(p, q, mask))


@given(masks(), SEEDS)
def test_padding_content_changes_no_estimate_of_a_whole_kl(mask, seed):
    logits, ref_logits = normal(*mask.shape, 3, seed=seed), normal(*mask.shape, 3, seed=seed + 1)
    ignores_padding(lambda p, q: kl.kl_reward_to_go_loss(p, q, mask), mask, *world(mask, seed))
    ignores_padding(lambda p, q: kl.full_vocabulary_kl(p, q, mask), mask.unsqueeze(-1), logits, ref_logits)


@given(masks(), SEEDS)
def test_reward_to_go_weighs_a_response_as_if_it_stood_alone_without_its_holes(mask, seed):
    p, q = world(mask, seed)
    whole = kl.kl_reward_to_go_loss(p, q, mask)
    for b, keep in enumerate(mask):
        if keep.any():
            alone = kl.kl_reward_to_go_loss(p[b : b + 1, keep], q[b : b + 1, keep], torch.ones_like(keep[keep])[None])
            close(whole[b, keep], alone[0])
    close(whole[~mask], torch.zeros_like(whole[~mask]))


LOGITS = st.lists(st.floats(-1e4, 1e4, width=32), min_size=2, max_size=6)


@given(LOGITS, DTYPES, st.integers(0, 5))
def test_distributions_from_extreme_logits_stay_distributions(row, dtype, forbidden):
    logits = torch.tensor([[row]], dtype=dtype)
    if forbidden < len(row):
        logits[..., forbidden] = -math.inf
    tokens = torch.arange(len(row)).view(1, -1)
    each = logprobs.token_logprobs(logits.expand(1, len(row), -1).clone(), tokens)
    close(each.exp().sum(), logits.new_tensor(1.0))
    x = logits.clone().requires_grad_()
    h = logprobs.entropy(x)
    (slope,) = torch.autograd.grad(h.sum(), x)
    assert h.isfinite().all() and slope.isfinite().all()
    assert -1e-6 <= h.item() <= math.log(len(row)) + 1e-5


@given(LOGITS, SEEDS, DTYPES)
def test_categorical_kl_is_never_negative_and_zero_at_itself(row, seed, dtype):
    logits = torch.tensor(row, dtype=dtype)
    ref_logits = logits[torch.randperm(len(row), generator=torch.Generator().manual_seed(seed))]
    assert kl.categorical_kl(logits, ref_logits) >= -1e-5 * (1 + logits.abs().max() * torch.finfo(dtype).eps * 1e5)
    assert kl.categorical_kl(logits, logits) == 0


SMALL = st.lists(st.floats(-80, 80, width=32), min_size=1, max_size=6)


@given(SMALL, DTYPES)
def test_k3_is_never_negative_and_mirrors_approx_kl(log_ratios, dtype):
    d = torch.tensor(log_ratios, dtype=dtype)
    zero = torch.zeros_like(d)
    assert (kl.kl_k3(zero, d) >= 0).all()
    close(kl.kl_k3(zero, d), policy_losses.approx_kl(d, zero))


@given(SMALL, st.floats(0, 0.9), DTYPES, st.floats(-3, 3, width=32))
def test_the_clipped_loss_is_the_more_pessimistic_one(log_ratios, cliprange, dtype, advantage):
    x = torch.tensor(log_ratios, dtype=dtype).requires_grad_()
    zero, a = torch.zeros_like(x).detach(), torch.full_like(x, advantage).detach()
    loss = policy_losses.clipped_policy_loss(x, zero, a, cliprange)
    (slope,) = torch.autograd.grad(loss.sum(), x)
    plain = -x.detach().exp() * a
    assert (loss.detach() >= plain).all() and loss.isfinite().all() and slope.isfinite().all()
    active = policy_losses.clip_active(x.detach(), zero, a, cliprange)
    assert (slope[active] == 0).all()
    close(slope[~active], plain[~active])


@given(SMALL, DTYPES, st.sampled_from([0.01, 0.1, 1.0, 10.0]))
def test_preference_losses_are_finite_and_fall_with_the_margin(margins, dtype, beta):
    h = torch.tensor(sorted(margins), dtype=dtype).mul(100).requires_grad_()
    zero = torch.zeros_like(h).detach()
    for loss_of in (preference_losses.dpo_loss, preference_losses.hinge_dpo_loss):
        loss = loss_of(h, zero, zero, zero, beta)
        (slope,) = torch.autograd.grad(loss.sum(), h)
        assert loss.isfinite().all() and (loss >= 0).all() and (loss.diff() <= 0).all()
        assert slope.isfinite().all() and (slope <= 0).all() and (slope >= -beta * (1 + 1e-6)).all()


MEANS = st.lists(st.floats(-80, -(2.0**-16), width=32), min_size=2, max_size=6)


@given(MEANS, DTYPES, st.integers(1, 300), st.integers(1, 300))
def test_losses_without_a_reference_are_finite_and_fall_with_the_chosen_likelihood(means, dtype, n, m):
    chosen = torch.tensor(sorted(means), dtype=dtype)
    leaves = (chosen * n).requires_grad_(), (chosen.flip(0) * m).requires_grad_()
    lengths = torch.full_like(chosen, n), torch.full_like(chosen, m)
    for loss in (
        preference_losses.simpo_loss(*leaves, *lengths, 2.5, 1.0),
        preference_losses.orpo_loss(*leaves, *lengths, 0.1),
    ):
        slopes = torch.autograd.grad(loss.sum(), leaves)
        assert loss.isfinite().all() and (loss >= 0).all() and (loss.diff() <= 0).all()
        assert all(slope.isfinite().all() for slope in slopes)
        assert (slopes[0] <= 0).all() and (slopes[1] >= 0).all()


@given(SMALL, DTYPES, st.floats(0, 20), st.sampled_from([0.01, 0.1, 1.0, 10.0]))
def test_kto_losses_lie_between_zero_and_their_weight(log_ratios, dtype, z, beta):
    h = torch.tensor(sorted(log_ratios), dtype=dtype).mul(100)
    for liked, weight, sign in ((True, 1.5, -1), (False, 0.7, 1)):
        labels = torch.full_like(h, liked, dtype=torch.bool)
        loss = preference_losses.kto_loss(h, 0 * h, labels, h.new_tensor(z), beta, 1.5, 0.7)
        assert (loss >= 0).all() and (loss <= weight).all() and (sign * loss.diff() >= 0).all()


@given(SEEDS, st.sampled_from([0.2, 1.0, 3.0]), st.integers(2, 6))
def test_the_population_s_dpo_loss_is_least_at_the_policy_of_highest_value(seed, beta, count):
    ref_logprobs, scores, step = (normal(2, count, seed=seed + i) for i in range(3))
    ref_logprobs = ref_logprobs.log_softmax(-1)
    best = exact.optimal_logprobs(ref_logprobs, scores, beta)
    other = (best + 0.2 * step).log_softmax(-1)
    assert (
        exact.population_dpo_loss(other, ref_logprobs, scores, beta)
        >= exact.population_dpo_loss(best, ref_logprobs, scores, beta)
    ).all()
    divergence, expected = exact.frontier(ref_logprobs, scores, [beta])
    close(expected[0] - beta * divergence[0], exact.optimal_value(ref_logprobs, scores, beta))


GROUPS = st.lists(st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3), min_size=1, max_size=4)


@given(GROUPS, DTYPES, st.floats(-10, 10, width=32))
def test_group_advantages_sum_to_zero_and_ignore_a_constant(groups, dtype, constant):
    scores = torch.tensor(groups, dtype=dtype)
    for centred in (
        lambda s: s - advantages.group_mean_baseline(s),
        lambda s: s - advantages.leave_one_out_baseline(s),
    ):
        close(centred(scores).sum(1), torch.zeros_like(scores[:, 0]), atol=1e-3, rtol=0)  # scores up to 100, single
        close(centred(scores + constant), centred(scores), atol=1e-3, rtol=0)
    normalised = advantages.group_normalized_advantages(scores)
    assert normalised.abs().max() <= 2 / math.sqrt(3) + 1e-3  # (G - 1)/sqrt(G), the largest a group of G allows
    equal = (scores == scores[:, :1]).all(1)
    assert (normalised[equal] == 0).all()


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=4, max_size=4), SEEDS, st.integers(1, 40))
def test_best_of_n_is_a_distribution_that_only_gains_with_n(scores, seed, n):
    ref_logprobs, s = normal(1, 4, seed=seed).log_softmax(-1), torch.tensor([scores], dtype=torch.float64)
    p, more = (exact.best_of_n(ref_logprobs, s, k).exp() for k in (n, n + 1))
    close(p.sum(1), torch.ones(1, dtype=torch.float64))
    assert ((more * s).sum() - (p * s).sum()).item() >= -1e-12
    bound = math.log(n) - (n - 1) / n
    assert exact.kl(exact.best_of_n(ref_logprobs, s, n), ref_logprobs).item() <= bound + 1e-12
