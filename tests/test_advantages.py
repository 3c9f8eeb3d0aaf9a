"""Rewards-to-go, GAE and group baselines against explicit double sums, exact fractions and full enumeration."""

import itertools
import math
from fractions import Fraction

import pytest
import torch

from planting import DTYPES, close, edited, f64, gradients, ignores_padding, leaf, masks, normal, raises
from rlhfkit.advantages import (
    gae,
    group_mean_baseline,
    group_normalized_advantages,
    leave_one_out_baseline,
    rewards_to_go,
)

pytestmark = pytest.mark.usefixtures("device")


def exact_returns(rewards, mask, gamma):
    """Discounted sum of what follows, in fractions: drop the masked steps, then add up the rest of each row."""
    result = []
    for row, keep in zip(rewards.tolist(), mask.tolist(), strict=True):
        kept = [Fraction(r) for r, k in zip(row, keep, strict=True) if k]
        sums = [
            sum((Fraction(gamma) ** (j - i) * kept[j] for j in range(i, len(kept))), Fraction(0))
            for i in range(len(kept))
        ]
        result.append([float(sums.pop(0)) if k else 0.0 for k in keep])
    return result


def exact_gae(rewards, values, mask, dones, last_values, gamma, lam):
    """sum_k (gamma lam)^k delta_{t+k} up to the end of the episode, in fractions, over the steps that count."""
    gamma, lam, result = Fraction(gamma), Fraction(lam), []
    for b, keep in enumerate(mask.tolist()):
        steps = [t for t, k in enumerate(keep) if k]
        v = {t: Fraction(values[b, t].item()) for t in steps}
        after = dict(zip(steps, [*(v[t] for t in steps[1:]), Fraction(last_values[b].item())], strict=True))
        delta = {t: Fraction(rewards[b, t].item()) + (0 if dones[b, t] else gamma * after[t]) - v[t] for t in steps}
        row = [0.0] * len(keep)
        for i, t in enumerate(steps):
            total, weight = Fraction(0), Fraction(1)
            for s in steps[i:]:
                total, weight = total + weight * delta[s], weight * gamma * lam
                if dones[b, s]:
                    break
            row[t] = float(total)
        result.append(row)
    return result


def world(dtype=torch.float64, seed=0):
    rewards, values = normal(5, 5, seed=seed, dtype=dtype), normal(5, 5, seed=seed + 1, dtype=dtype)
    dones = normal(5, 5, seed=seed + 2) > 0.8
    return rewards, values, dones, normal(5, seed=seed + 3, dtype=dtype)


def test_rewards_to_go_by_hand(rewards_to_go=rewards_to_go):
    for dtype in DTYPES:
        rewards = torch.tensor([[1.0, 2.0, 4.0]], dtype=dtype)
        close(rewards_to_go(rewards), rewards.new_tensor([[7.0, 6.0, 4.0]]))
        close(rewards_to_go(rewards, gamma=0.5), rewards.new_tensor([[3.0, 4.0, 4.0]]))
        close(rewards_to_go(rewards, torch.tensor([[True, False, True]]), 0.5), rewards.new_tensor([[3.0, 0.0, 4.0]]))
        close(rewards_to_go(rewards, gamma=0.0), rewards)


def test_rewards_to_go_are_the_double_sum(rewards_to_go=rewards_to_go):
    for dtype in DTYPES:
        rewards, *_ = world(dtype)
        for gamma in (0.0, 0.9, 1.0):
            close(rewards_to_go(rewards, masks(), gamma), rewards.new_tensor(exact_returns(rewards, masks(), gamma)))


def test_rewards_to_go_ignore_padding(rewards_to_go=rewards_to_go):
    ignores_padding(lambda r: rewards_to_go(r, masks(), 0.9), masks(), normal(5, 5))


def test_rewards_to_go_do_not_hide_nan_and_show_it_only_to_earlier_steps(rewards_to_go=rewards_to_go):
    got = rewards_to_go(f64([[1.0, float("nan"), 4.0]]))
    assert got.isnan().tolist() == [[True, True, False]]


def test_gae_skips_a_masked_step(gae=gae):
    """The hand case: 1 - 0.5 + 0.5 * 1 = 1.0; treating the hole as a zero gives 0.75, using its content 7.0 or so."""
    for dtype in DTYPES:
        rewards, values = torch.tensor([[1.0, 9.0, 1.0]], dtype=dtype), torch.tensor([[0.5, 9.0, 0.5]], dtype=dtype)
        mask = torch.tensor([[True, False, True]])
        advantages, returns = gae(rewards, values, gamma=0.5, lam=1.0, mask=mask)
        close(advantages, rewards.new_tensor([[1.0, 0.0, 0.5]]))
        close(returns, rewards.new_tensor([[1.5, 0.0, 1.0]]))


def test_gae_is_the_weighted_sum_of_residuals(gae=gae):
    """With every kind of mask, episode ends and bootstrap values, in both precisions."""
    for dtype, seed in itertools.product(DTYPES, (0, 10)):
        rewards, values, dones, last_values = world(dtype, seed)
        for gamma, lam in ((0.9, 0.8), (1.0, 0.95), (0.5, 0.0), (0.7, 1.0), (0.0, 0.5)):
            got, returns = gae(
                rewards, values, gamma=gamma, lam=lam, mask=masks(), dones=dones, last_values=last_values
            )
            exact = exact_gae(rewards, values, masks(), dones, last_values, gamma, lam)
            close(got, rewards.new_tensor(exact))
            close(returns, torch.where(masks(), got + values, 0.0))


def test_gae_without_options_has_no_mask_no_ends_and_no_bootstrap(gae=gae):
    rewards, values, *_ = world()
    full, none, zero = torch.ones(5, 5, dtype=torch.bool), torch.zeros(5, 5, dtype=torch.bool), normal(5) * 0
    expected = rewards.new_tensor(exact_gae(rewards, values, full, none, zero, 0.9, 0.8))
    close(gae(rewards, values, gamma=0.9, lam=0.8)[0], expected)


def test_gae_with_lam_1_is_return_minus_value_and_with_lam_0_the_residual(gae=gae):
    rewards, values, *_ = world()
    advantages, returns = gae(rewards, values, gamma=0.9, lam=1.0)
    close(advantages, rewards_to_go(rewards, gamma=0.9) - values)
    close(returns, rewards_to_go(rewards, gamma=0.9))
    next_values = torch.cat([values[:, 1:], torch.zeros(5, 1, dtype=values.dtype)], 1)
    close(gae(rewards, values, gamma=0.9, lam=0.0)[0], rewards + 0.9 * next_values - values)


def test_gae_of_a_perfect_critic_is_zero(gae=gae):
    rewards, *_ = world()
    advantages, returns = gae(rewards, rewards_to_go(rewards, gamma=0.9), gamma=0.9, lam=0.7)
    close(advantages, torch.zeros_like(rewards))
    close(returns, rewards_to_go(rewards, gamma=0.9))


def test_gae_treats_two_episodes_in_a_row_as_two_rows(gae=gae):
    rewards, values, _, last_values = world()
    dones = torch.zeros(5, 5, dtype=torch.bool)
    dones[:, 1] = True
    whole, _ = gae(rewards, values, gamma=0.9, lam=0.8, dones=dones, last_values=last_values)
    first, _ = gae(rewards[:, :2], values[:, :2], gamma=0.9, lam=0.8)
    second, _ = gae(rewards[:, 2:], values[:, 2:], gamma=0.9, lam=0.8, last_values=last_values)
    close(whole, torch.cat([first, second], 1))


def test_gae_of_a_truncated_step_is_that_of_a_bootstrapped_rollout(gae=gae):
    """The recipe of the docstring: gamma V(final observation) into the reward, and done."""
    rewards, values, _, final_values = world()
    cut = rewards.clone()
    cut[:, -1] += 0.9 * final_values
    dones = torch.zeros(5, 5, dtype=torch.bool)
    dones[:, -1] = True
    close(
        gae(cut, values, gamma=0.9, lam=0.8, dones=dones, last_values=torch.full_like(final_values, float("nan")))[0],
        gae(rewards, values, gamma=0.9, lam=0.8, last_values=final_values)[0],
    )


def test_gae_ignores_padding(gae=gae):
    rewards, values, dones, last_values = world()
    for which in (0, 1):
        options = {"gamma": 0.9, "lam": 0.8, "mask": masks(), "dones": dones, "last_values": last_values}
        ignores_padding(lambda r, v, w=which, o=options: gae(r, v, **o)[w], masks(), rewards, values)


def test_gae_is_linear_with_the_slopes_of_the_sum(gae=gae):
    """dA_0/dr_t = (gamma lam)^t; dA_0/dV_0 = -1, dA_0/dV_t = gamma (1 - lam) (gamma lam)^(t-1)."""
    rewards, values = leaf(normal(1, 4)), leaf(normal(1, 4, seed=1))
    slopes = torch.autograd.grad(gae(rewards, values, gamma=0.5, lam=0.5)[0][0, 0], (rewards, values))
    close(slopes[0], f64([[1.0, 1 / 4, 1 / 16, 1 / 64]]))
    close(slopes[1], f64([[-1.0, 1 / 4, 1 / 16, 1 / 64]]))


def test_gae_rows_do_not_touch_each_other(gae=gae):
    rewards, values, dones, last_values = world()
    options = {"gamma": 0.9, "lam": 0.8}
    whole = gae(rewards, values, mask=masks(), dones=dones, last_values=last_values, **options)[0]
    for b in range(5):
        part = slice(b, b + 1)
        alone = gae(
            rewards[part], values[part], mask=masks()[part], dones=dones[part], last_values=last_values[part], **options
        )
        close(alone[0], whole[part])


def test_gae_does_not_hide_nan(gae=gae):
    advantages, returns = gae(f64([[0.0, float("nan")]]), f64([[0.0, 0.0]]), gamma=1.0, lam=1.0)
    assert advantages.isnan().all() and returns.isnan().all()


SCORES = [[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 1.0, 0.0]]


def shrinkage(baseline, group=3):
    """Expected REINFORCE gradient with the baseline over that without, for two arms; every group enumerated."""
    p, rewards = f64(0.3), f64([1.0, -0.5])
    groups = torch.tensor(list(itertools.product((0, 1), repeat=group)))
    weights = torch.where(groups == 0, p, 1 - p).prod(1)
    scores = rewards[groups]
    slope = torch.where(groups == 0, 1 - p, -p)  # d log pi / d logit of arm 0
    expected = (weights * ((scores - baseline(scores)) * slope).mean(1)).sum()
    return (expected / (p * (1 - p) * (rewards[0] - rewards[1]))).item()


def test_group_mean_is_the_mean_with_the_own_score(group_mean_baseline=group_mean_baseline):
    for dtype in DTYPES:
        got = group_mean_baseline(torch.tensor(SCORES, dtype=dtype))
        close(got, torch.tensor([[0.75] * 4, [0.5] * 4], dtype=dtype))


def test_group_mean_shrinks_the_expected_gradient_to_two_thirds(group_mean_baseline=group_mean_baseline):
    assert math.isclose(shrinkage(group_mean_baseline), 2 / 3, rel_tol=1e-12)


def test_group_mean_keeps_nan_in_its_own_group(group_mean_baseline=group_mean_baseline):
    got = group_mean_baseline(f64([[1.0, float("nan")], [1.0, 2.0]]))
    assert got[0].isnan().all() and got[1].tolist() == [1.5, 1.5]


def test_leave_one_out_is_the_mean_of_the_others(leave_one_out_baseline=leave_one_out_baseline):
    for dtype in DTYPES:
        scores = torch.tensor(SCORES, dtype=dtype)
        close(scores - leave_one_out_baseline(scores), scores.new_tensor([[1 / 3] * 3 + [-1.0], [2 / 3, -2 / 3] * 2]))


def test_leave_one_out_leaves_the_expected_gradient_as_it_is(leave_one_out_baseline=leave_one_out_baseline):
    for group in (2, 3, 5):
        assert math.isclose(shrinkage(leave_one_out_baseline, group), 1.0, rel_tol=1e-12)


def test_leave_one_out_does_not_depend_on_the_own_score(leave_one_out_baseline=leave_one_out_baseline):
    scores = leaf(normal(3, 4))
    jacobian = torch.autograd.functional.jacobian(leave_one_out_baseline, scores)
    for p, i, q, j in itertools.product(range(3), range(4), range(3), range(4)):
        close(jacobian[p, i, q, j], f64(1 / 3 if p == q and i != j else 0.0))


def test_leave_one_out_of_one_raises(leave_one_out_baseline=leave_one_out_baseline):
    raises(ValueError, lambda: leave_one_out_baseline(f64([[1.0], [2.0]])), "scores", "(2, 1)", "two")


def test_leave_one_out_advantage_is_the_centred_score_times_g_over_g_less_1(
    leave_one_out_baseline=leave_one_out_baseline,
):
    scores = normal(3, 5)
    close(scores - leave_one_out_baseline(scores), 5 / 4 * (scores - scores.mean(1, keepdim=True)))


def grpo(function, scores, eps=0.0):
    return function(scores, eps=eps)


def test_group_normalised_advantages_by_hand(group_normalized_advantages=group_normalized_advantages):
    """Unbiased deviation: 0.5 for (1, 1, 1, 0), 1/sqrt(3) for (1, 0, 1, 0)."""
    for dtype in DTYPES:
        got = grpo(group_normalized_advantages, torch.tensor(SCORES, dtype=dtype))
        close(got, got.new_tensor([[0.5, 0.5, 0.5, -1.5], [0.75**0.5, -(0.75**0.5)] * 2]))
        got = group_normalized_advantages(torch.tensor(SCORES, dtype=dtype))
        close(got[0, 0], got.new_tensor(0.25 / 0.5001))


def test_group_normalised_advantages_add_eps_outside_the_root(group_normalized_advantages=group_normalized_advantages):
    scores = f64([[1e-3, -1e-3]])  # deviation sqrt(2) 1e-3
    close(group_normalized_advantages(scores, eps=1e-3), scores / (1e-3 * (2**0.5 + 1)))


def test_group_normalised_advantages_of_a_constant_group_are_zero(
    group_normalized_advantages=group_normalized_advantages,
):
    for dtype in DTYPES:
        for constant in (0.0, 0.1, 333.3, 10000.1, -1e4):
            scores = torch.full((2, 7), constant, dtype=dtype)
            for eps in (0.0, 1e-4):
                assert (group_normalized_advantages(scores, eps=eps) == 0).all()
                slope = gradients(lambda s, e=eps: group_normalized_advantages(s, eps=e), scores)[0]
                assert slope.isfinite().all()


def test_group_normalised_advantages_weigh_prompts_by_difficulty(
    group_normalized_advantages=group_normalized_advantages,
):
    """Expected gradient over leave-one-out's, binary rewards, G = 8, by the binomial distribution of successes."""

    def ratio(p, eps):
        scores = (torch.arange(8) < torch.arange(9).unsqueeze(1)).to(torch.float64)  # row k: k successes
        weights = f64([math.comb(8, k) * p**k * (1 - p) ** (8 - k) for k in range(9)])
        slope = scores - p
        normalised = (weights * (group_normalized_advantages(scores, eps=eps) * slope).mean(1)).sum()
        plain = (weights * ((scores - leave_one_out_baseline(scores)) * slope).mean(1)).sum()
        return (normalised / plain).item()

    for p, eps, published in (
        (0.05, 0.0, 2.313),
        (0.1, 0.0, 2.177),
        (0.5, 0.0, 1.736),
        (0.5, 1e-4, 1.735),
        (0.9, 0.0, 2.177),
    ):
        assert abs(ratio(p, eps) - published) < 5.01e-4


def test_group_normalised_advantages_do_not_hide_nan_or_inf(group_normalized_advantages=group_normalized_advantages):
    for junk in (float("nan"), float("inf")):
        assert group_normalized_advantages(f64([[1.0, junk]])).isnan().any()
        assert group_normalized_advantages(f64([[junk, junk]])).isnan().all()
        assert group_normalized_advantages(f64([[1.0, junk], [1.0, 2.0]]))[1].isfinite().all()


def test_group_normalised_advantages_of_one_raise(group_normalized_advantages=group_normalized_advantages):
    raises(ValueError, lambda: group_normalized_advantages(f64([[1.0]])), "scores", "(1, 1)")


def _gae(*changes):
    return edited(gae, *changes)


def _to_go(**settings):
    def returns(rewards, mask=None, gamma=1.0):
        options = {"gamma": gamma, "lam": 1.0, "mask": mask} | settings
        return gae(rewards, torch.zeros_like(rewards), **options)[0]

    return returns


def _zeros_for_holes(rewards, mask=None, gamma=1.0):
    mask = torch.ones_like(rewards, dtype=torch.bool) if mask is None else mask
    return torch.where(mask, rewards_to_go(torch.where(mask, rewards, 0.0), None, gamma), 0.0)


def _grpo(*changes):
    return edited(group_normalized_advantages, *changes)


PLANTED = {
    "rewards_to_go": {
        "reward so far": lambda r, mask=None, gamma=1.0: rewards_to_go(r.flip(1), mask, gamma).flip(1),
        "total of the row": lambda r, mask=None, gamma=1.0: rewards_to_go(r, mask, gamma)[:, :1].expand_as(r),
        "leaves out the own reward": lambda r, mask=None, gamma=1.0: rewards_to_go(r, mask, gamma) - r,
        "ignores gamma": lambda r, mask=None, gamma=1.0: rewards_to_go(r, mask),
        "ignores the mask": lambda r, mask=None, gamma=1.0: rewards_to_go(r, None, gamma),
        "treats holes as zeros": _zeros_for_holes,
        "multiplies by the mask": lambda r, mask=None, gamma=1.0: (
            rewards_to_go(r, mask, gamma) if mask is None else rewards_to_go(r * mask, None, gamma) * mask
        ),
        "discounts from the start": lambda r, mask=None, gamma=1.0: rewards_to_go(
            r * gamma ** torch.arange(r.shape[1]), mask
        ),
        "lam 0": _to_go(lam=0.0),
        "lam 0.95": _to_go(lam=0.95),
    },
    "gae": {
        "dones shifted by one": _gae(("torch.where(dones[:, t]", "torch.where(dones[:, max(t - 1, 0)]")),
        "dones end the next step": _gae(
            ("torch.where(dones[:, t]", "torch.where(dones[:, min(t + 1, rewards.shape[1] - 1)]")
        ),
        "dones ignored": _gae(
            (
                "torch.where(dones[:, t], zero, next_values + lam * next_advantages)",
                "next_values + lam * next_advantages",
            )
        ),
        "done stops the value but not the advantage": _gae(
            (
                "torch.where(dones[:, t], zero, next_values + lam * next_advantages)",
                "torch.where(dones[:, t], zero, next_values) + lam * next_advantages",
            )
        ),
        "done stops the advantage but not the value": _gae(
            (
                "torch.where(dones[:, t], zero, next_values + lam * next_advantages)",
                "next_values + torch.where(dones[:, t], zero, lam * next_advantages)",
            )
        ),
        "holes carry zeros": _gae(
            (
                "next_advantages = torch.where(mask[:, t], advantages, next_advantages)",
                "next_advantages = torch.where(mask[:, t], advantages, zero)",
            ),
            (
                "next_values = torch.where(mask[:, t], values[:, t], next_values)",
                "next_values = torch.where(mask[:, t], values[:, t], zero)",
            ),
        ),
        "rewards and values times the mask": lambda rewards, values, *, mask=None, **rest: (
            gae(rewards, values, **rest)
            if mask is None
            else tuple(x * mask for x in gae(torch.where(mask, rewards, 0.0), torch.where(mask, values, 0.0), **rest))
        ),
        "values of holes are used": _gae(
            ("next_values = torch.where(mask[:, t], values[:, t], next_values)", "next_values = values[:, t]")
        ),
        "mask ignored": lambda rewards, values, *, mask=None, **rest: gae(rewards, values, **rest),
        "gamma missing before the advantage": _gae(
            ("next_values + lam * next_advantages)", "next_values + lam * next_advantages / max(gamma, 1e-9))")
        ),
        "lam forgotten": _gae(("lam * next_advantages", "next_advantages")),
        "gamma forgotten": _gae(("gamma * ahead", "ahead")),
        "gamma and lam exchanged": lambda r, v, *, gamma, lam, **rest: gae(r, v, gamma=lam, lam=gamma, **rest),
        "last_values ignored": _gae(("zero if last_values is None else last_values", "zero")),
        "bootstraps with the last value": _gae(
            ("zero if last_values is None else last_values", "values[:, -1] if last_values is None else last_values")
        ),
        "returns are the advantages": lambda *a, **k: (gae(*a, **k)[0],) * 2,
        "returns are rewards-to-go": lambda r, v, *, gamma, lam, mask=None, **rest: (
            gae(r, v, gamma=gamma, lam=lam, mask=mask, **rest)[0],
            rewards_to_go(r, mask, gamma),
        ),
        "whitened": lambda r, v, **k: (lambda a, g: ((a - a.mean()) / (a.std() + 1e-8), g))(*gae(r, v, **k)),
        "returns keep the values of padding": _gae(
            ("torch.where(mask, result + values, torch.zeros_like(values))", "result + values")
        ),
        "goes forward": _gae(
            ("reversed(range(rewards.shape[1]))", "range(rewards.shape[1])"), ("columns[::-1]", "columns")
        ),
        "own value forgotten": _gae((" - values[:, t]", "")),
        "time first": lambda r, v, *, gamma, lam, **rest: (
            tuple(
                x.T
                for x in gae(
                    r.T,
                    v.T,
                    gamma=gamma,
                    lam=lam,
                    **{k: x if x is None or x.ndim == 1 else x.T for k, x in rest.items()},
                )
            )
            if r.shape[0] == r.shape[1]
            else gae(r, v, gamma=gamma, lam=lam, **rest)
        ),
        "advantages detached from the values": lambda r, v, **k: gae(r, v.detach() + 0 * v, **k),
    },
    "group_mean_baseline": {
        "own score left out": leave_one_out_baseline,
        "mean of the whole batch": lambda s: s.mean().expand_as(s),
        "mean over prompts": lambda s: s.mean(0, keepdim=True).expand_as(s),
        "median": lambda s: s.median(1, keepdim=True).values.expand_as(s),
        "one number a row, not broadcast": lambda s: s.mean(1, keepdim=True),
        "ignores nan": lambda s: s.nanmean(1, keepdim=True).expand_as(s),
    },
    "leave_one_out_baseline": {
        "own score included": group_mean_baseline,
        "divides by G": lambda s: (s.sum(1, keepdim=True) - s) / s.shape[1],
        "leaves out another one": lambda s: leave_one_out_baseline(s).roll(1, 1),
        "own score added": lambda s: (s.sum(1, keepdim=True) + s) / (s.shape[1] + 1),
        "over the whole batch": lambda s: (s.sum() - s) / (s.numel() - 1),
        "over prompts": lambda s: leave_one_out_baseline(s.T).T,
        "a group of one gives 0": lambda s: (s.sum(1, keepdim=True) - s) / max(s.shape[1] - 1, 1),
        "the advantage, not the baseline": lambda s: s - leave_one_out_baseline(s),
    },
    "group_normalized_advantages": {
        "biased deviation": _grpo(("scores.std(1, keepdim=True)", "scores.std(1, correction=0, keepdim=True)")),
        "eps under the root": _grpo(
            ("scores.std(1, keepdim=True) + eps", "(scores.var(1, keepdim=True) + eps).sqrt()")
        ),
        "eps forgotten": _grpo(("keepdim=True) + eps)", "keepdim=True))")),
        "divides by the variance": _grpo(("scores.std(1", "scores.var(1")),
        "not centred": _grpo(("(scores - scores.mean(1, keepdim=True)) / spread", "scores / spread")),
        "not divided": _grpo(("True)) / spread", "True))")),
        "over the batch": _grpo(("scores.std(1, keepdim=True)", "scores.std()")),
        "rounding of a constant group": _grpo(
            ("torch.where(constant, torch.zeros_like(scores), ", "("),
            (
                "torch.where(constant, torch.ones_like(scores), scores.std(1, keepdim=True) + eps)",
                "scores.std(1, keepdim=True) + eps",
            ),
        ),
        "a group of inf counts as constant": _grpo((" & highest.isfinite()", "")),
        "centred by the others": lambda s, eps=1e-4: (s - leave_one_out_baseline(s)) / (s.std(1, keepdim=True) + eps),
    },
}
EXEMPT = set()
