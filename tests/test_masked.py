"""Masked means, variances, whitening and the three averages."""

import statistics

import pytest
import torch

from planting import DTYPES, close, edited, f64, ignores_padding, leaf, masks, normal, raises
from rlhfkit.masked import aggregate, masked_mean, masked_sum, masked_var, whiten

pytestmark = pytest.mark.usefixtures("device")

X = [[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]]  # sums of powers of two show which entries were taken
MASK = [[True, False, True], [False, False, True]]


def test_masked_sum_takes_what_the_mask_selects(masked_sum=masked_sum):
    for dtype in DTYPES:
        x, mask = torch.tensor(X, dtype=dtype), torch.tensor(MASK)
        close(masked_sum(x, mask), x.new_tensor(37.0))
        close(masked_sum(x, mask, 0), x.new_tensor([1.0, 0.0, 36.0]))
        close(masked_sum(x, mask, dim=1), x.new_tensor([5.0, 32.0]))
        close(masked_sum(x, mask, dim=-1), x.new_tensor([5.0, 32.0]))
        close(masked_sum(x, torch.zeros_like(mask), dim=1), x.new_zeros(2))


def test_masked_sum_ignores_padding(masked_sum=masked_sum):
    ignores_padding(lambda x: masked_sum(x, masks()), masks(), normal(5, 5))
    ignores_padding(lambda x: masked_sum(x, masks(), dim=1), masks(), normal(5, 5))


def test_masked_sum_does_not_hide_what_is_selected(masked_sum=masked_sum):
    assert masked_sum(f64([1.0, float("nan")]), torch.tensor([True, True])).isnan()
    assert masked_sum(f64([1.0, float("inf")]), torch.tensor([True, True])).isposinf()


def test_masked_mean_is_the_mean_of_the_selected_entries(masked_mean=masked_mean):
    for dtype in DTYPES:
        x, mask = torch.tensor(X, dtype=dtype), torch.tensor(MASK)
        close(masked_mean(x, mask), x.new_tensor(37 / 3))
        close(masked_mean(x, mask, dim=1), x.new_tensor([2.5, 32.0]))
        close(masked_mean(x, mask, dim=0), x.new_tensor([1.0, 0.0, 18.0]))  # the middle column has nothing: 0


def test_masked_mean_does_not_depend_on_the_split_into_batches(masked_mean=masked_mean):
    x, mask = normal(5, 5), masks()
    parts = [(masked_mean(x[rows], mask[rows]), mask[rows].sum()) for rows in (slice(0, 2), slice(2, 5))]
    close(masked_mean(x, mask), sum(mean * n for mean, n in parts) / mask.sum())


def test_masked_mean_ignores_padding(masked_mean=masked_mean):
    ignores_padding(lambda x: masked_mean(x, masks()), masks(), normal(5, 5))
    ignores_padding(lambda x: masked_mean(x, masks(), dim=1), masks(), normal(5, 5))
    ignores_padding(lambda x: masked_mean(x, masks(), dim=0), masks(), normal(5, 5))


def test_masked_mean_has_no_silent_epsilon(masked_mean=masked_mean):
    assert masked_mean(f64([3.0, 3.0]), torch.tensor([True, True])).item() == 3.0


def test_masked_mean_of_nothing_raises(masked_mean=masked_mean):
    raises(ValueError, lambda: masked_mean(f64([1.0, 2.0]), torch.tensor([False, False])), "mask", "False")


def test_masked_mean_does_not_hide_what_is_selected(masked_mean=masked_mean):
    assert masked_mean(f64([1.0, float("nan")]), torch.tensor([True, True])).isnan()


def test_masked_var_is_the_sample_variance_of_the_selected_entries(masked_var=masked_var):
    for dtype in DTYPES:
        x, mask = normal(5, 5, dtype=dtype), masks()
        close(masked_var(x, mask), x.new_tensor(statistics.variance(x.double()[mask].tolist())))


def test_masked_var_keeps_its_digits_far_from_zero(masked_var=masked_var):
    x = torch.tensor([[10000.0, 10001.0], [10002.0, 10003.0]], dtype=torch.float32)
    close(masked_var(x, torch.ones_like(x, dtype=torch.bool)), x.new_tensor(5 / 3))


def test_masked_var_has_the_gradient_of_the_sample_variance(masked_var=masked_var):
    x, mask = leaf(normal(5, 5)), masks()
    (slope,) = torch.autograd.grad(masked_var(x, mask), x)
    selected = x.detach()[mask]
    close(slope[mask], 2 * (selected - selected.mean()) / (len(selected) - 1))
    close(slope[~mask], torch.zeros_like(slope[~mask]))


def test_masked_var_ignores_padding(masked_var=masked_var):
    ignores_padding(lambda x: masked_var(x, masks()), masks(), normal(5, 5))


def test_masked_var_of_one_entry_raises(masked_var=masked_var):
    raises(ValueError, lambda: masked_var(f64([1.0, 2.0]), torch.tensor([True, False])), "mask", "two")


def test_whiten_gives_the_table_of_the_ppo_implementation_details(whiten=whiten):
    x = f64([[1.2, 1.3, 1.4], [1.5, 1.6, 1.7], [1.8, 1.9, 2.0]])
    expected = f64([[0.1394, 0.5046, 0.8697], [1.2349, 1.6, 1.9651], [2.3303, 2.6954, 3.0606]])
    close(whiten(x, shift_mean=False), expected, atol=5e-5, rtol=0)  # the table has four decimals
    close(whiten(x), expected - 1.6, atol=5e-5, rtol=0)


def test_whiten_has_its_epsilon_under_the_root(whiten=whiten):
    # the variance of +-1e-4 is 2e-8, so the divisor is sqrt(3e-8)
    for dtype in DTYPES:
        x = torch.tensor([1e-4, -1e-4], dtype=dtype)
        close(whiten(x), x.new_tensor([3**-0.5, -(3**-0.5)]))


def test_whiten_gives_unit_variance_and_zero_mean_inside_the_mask_and_zero_outside(whiten=whiten):
    for dtype in DTYPES:
        x, mask = 5 + 3 * normal(5, 5, dtype=dtype), masks()
        for shift_mean, mean in ((True, 0.0), (False, x.double()[mask].mean().item())):
            whitened = whiten(x, mask, shift_mean=shift_mean)
            inside = whitened.double()[mask].tolist()
            close(statistics.variance(inside), 1.0, rtol=1e-6, atol=0)
            close(statistics.fmean(inside), mean, rtol=1e-6, atol=1e-6)
            assert (whitened[~mask] == 0).all()


def test_whiten_gives_a_constant_exactly_zero(whiten=whiten):
    for dtype in DTYPES:
        for constant in (0.1, 333.3, 10000.1):
            for n in (2, 7, 1001):
                assert (whiten(torch.full((n,), constant, dtype=dtype)) == 0).all()


def test_whiten_ignores_padding(whiten=whiten):
    ignores_padding(lambda x: whiten(x, masks()), masks(), normal(5, 5))
    ignores_padding(lambda x: whiten(x, masks(), shift_mean=False), masks(), normal(5, 5))


def test_whiten_differentiates_through_mean_and_spread(whiten=whiten):
    x = leaf(normal(6))
    (slope,) = torch.autograd.grad(whiten(x)[0], x)
    z, n = whiten(x).detach(), 6
    first = torch.eye(n, dtype=torch.float64)[0]
    close(slope, (first - 1 / n - z[0] * z / (n - 1)) / x.detach().std(), rtol=1e-6, atol=1e-6)  # epsilon: 1e-8


def test_whiten_does_not_hide_what_is_selected(whiten=whiten):
    assert whiten(f64([1.0, 2.0, float("nan")])).isnan().all()


def per_token_slopes(aggregate, how, lengths=(4, 7), advantage=2.0):
    """Size of the gradient of each response's log-probabilities when its tokens share one advantage."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)
    logprobs = leaf(normal(*mask.shape))
    (slope,) = torch.autograd.grad(aggregate(-advantage * logprobs, mask, how), logprobs)
    assert (slope[~mask] == 0).all()
    return [-row[selected] for row, selected in zip(slope, mask, strict=True)]


def test_aggregate_weighs_long_and_short_responses_as_its_name_says(aggregate=aggregate):
    # two responses of 4 and 7 tokens, advantage 2: 2/(2*4), 2/(2*7); 2/11; 2/2
    for how, short, long in (
        ("sequence-mean", 1 / 4, 1 / 7),
        ("token-mean", 2 / 11, 2 / 11),
        ("sequence-sum", 1.0, 1.0),
    ):
        slopes = per_token_slopes(aggregate, how)
        close(slopes[0], torch.full_like(slopes[0], short))
        close(slopes[1], torch.full_like(slopes[1], long))


def test_aggregate_takes_the_averages_it_names(aggregate=aggregate):
    for dtype in DTYPES:
        losses, mask = torch.tensor(X, dtype=dtype), torch.tensor(MASK)
        close(aggregate(losses, mask, "token-mean"), losses.new_tensor(37 / 3))
        close(aggregate(losses, mask, "sequence-mean"), losses.new_tensor((2.5 + 32) / 2))
        close(aggregate(losses, mask, "sequence-sum"), losses.new_tensor((5 + 32) / 2))


def test_aggregate_leaves_out_a_sequence_without_tokens(aggregate=aggregate):
    losses, mask = normal(5, 5), masks()
    with_empty = torch.cat([mask, torch.zeros_like(mask[:1])])
    for how in ("token-mean", "sequence-mean", "sequence-sum"):
        close(aggregate(torch.cat([losses, losses[:1]]), with_empty, how), aggregate(losses, mask, how))


def test_aggregate_ignores_padding(aggregate=aggregate):
    for how in ("token-mean", "sequence-mean", "sequence-sum"):
        ignores_padding(lambda x, how=how: aggregate(x, masks(), how), masks(), normal(5, 5))


def test_aggregate_refuses_an_unknown_name_and_an_empty_mask(aggregate=aggregate):
    x = normal(2, 3)
    raises(ValueError, lambda: aggregate(x, torch.ones(2, 3, dtype=torch.bool), "mean"), "how", "'mean'", "token-mean")
    for how in ("token-mean", "sequence-mean", "sequence-sum"):
        raises(ValueError, lambda how=how: aggregate(x, torch.zeros(2, 3, dtype=torch.bool), how), "mask")


def _sum(x, dim):
    return x.sum() if dim is None else x.sum(dim)


def _safe_mean(x, mask, dim=None):
    count = mask.sum() if dim is None else mask.sum(dim)
    return _sum(torch.where(mask, x, 0.0), dim) / count.clamp(min=1)


def _whiten(x, mask=None, shift_mean=True, *, correction=1, inside=1e-8, outside=0.0):
    """Whitening with the choices open; with the defaults it is right for inputs without junk."""
    mask = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    selected = x[mask]
    z = (x - selected.mean()) / ((selected.var(correction=correction) + inside).sqrt() + outside)
    return torch.where(mask, z if shift_mean else z + selected.mean(), 0.0)


PLANTED = {
    "masked_sum": {
        "forgets the mask": lambda x, mask, dim=None: _sum(x, dim),
        "multiplies by the mask": lambda x, mask, dim=None: _sum(x * mask, dim),
        "selects x * 0, which keeps nan": lambda x, mask, dim=None: _sum(torch.where(mask, x, x * 0), dim),
        "selects the padding": lambda x, mask, dim=None: _sum(torch.where(mask, 0.0, x), dim),
        "ignores dim": lambda x, mask, dim=None: masked_sum(x, mask),
        "hides nan": lambda x, mask, dim=None: _sum(torch.where(mask, x, 0.0).nan_to_num(), dim),
        "always in single precision": lambda x, mask, dim=None: masked_sum(x.float(), mask, dim),
    },
    "masked_mean": {
        "forgets the mask": lambda x, mask, dim=None: x.mean() if dim is None else x.mean(dim),
        "divides by the padded length": lambda x, mask, dim=None: (
            torch.where(mask, x, 0.0).mean() if dim is None else torch.where(mask, x, 0.0).mean(dim)
        ),
        "multiplies by the mask": lambda x, mask, dim=None: _safe_mean(x * mask, mask, dim),
        "epsilon in the count": lambda x, mask, dim=None: (
            masked_sum(x, mask, dim) / ((mask.sum() if dim is None else mask.sum(dim)) + 1e-8)
        ),
        "mean of row means": lambda x, mask, dim=None: (
            masked_mean(x, mask, dim) if dim is not None or x.ndim < 2 else masked_mean(x, mask, 1).mean()
        ),
        "nothing selected gives 0": _safe_mean,
        "an empty row gives nan": lambda x, mask, dim=None: (
            masked_mean(x, mask) if dim is None else masked_sum(x, mask, dim) / mask.sum(dim)
        ),
        "nanmean": lambda x, mask, dim=None: (
            masked_mean(x, mask, dim)
            if dim is not None or not mask.any()
            else torch.where(mask, x, float("nan")).nanmean()
        ),
    },
    "masked_var": {
        "biased": lambda x, mask: x[mask].var(correction=0),
        "standard deviation": lambda x, mask: x[mask].std(),
        "forgets the mask": lambda x, mask: x.var(),
        "mean square minus squared mean": lambda x, mask: (
            (masked_mean(x.square(), mask) - masked_mean(x, mask).square()) * mask.sum() / (mask.sum() - 1)
        ),
        "not about the mean": lambda x, mask: masked_sum(x.square(), mask) / (mask.sum() - 1),
        "padding's nan reaches the gradient": lambda x, mask: (
            masked_sum((x - masked_mean(x, mask)).square(), mask) / (mask.sum() - 1)
        ),
        "multiplies by the mask": lambda x, mask: ((x - _safe_mean(x, mask)).square() * mask).sum() / (mask.sum() - 1),
        "detached mean over a subset": lambda x, mask: (
            masked_sum((torch.where(mask, x, 0.0) - masked_mean(x, mask).detach()).square(), mask) / mask.sum()
        ),
        "one entry gives nan": lambda x, mask: x[mask].var() if mask.sum() > 1 else x.new_tensor(float("nan")),
    },
    "whiten": {
        "biased variance": lambda x, mask=None, shift_mean=True: _whiten(x, mask, shift_mean, correction=0),
        "epsilon outside the root": lambda x, mask=None, shift_mean=True: _whiten(
            x, mask, shift_mean, inside=0.0, outside=1e-8
        ),
        "no epsilon": lambda x, mask=None, shift_mean=True: _whiten(x, mask, shift_mean, inside=0.0),
        "divides by the variance": edited(
            whiten, ("torch.rsqrt(masked_var(x, mask) + 1e-8)", "1 / masked_var(x, mask)")
        ),
        "forgets the mask": lambda x, mask=None, shift_mean=True: _whiten(x, None, shift_mean),
        "shift_mean the wrong way round": lambda x, mask=None, shift_mean=True: _whiten(x, mask, not shift_mean),
        "the mean is left in the padding": edited(
            whiten, ("return torch.where(mask, whitened, torch.zeros_like(x))", "return whitened")
        ),
        "padding's nan reaches the gradient": edited(
            whiten, ("    x = torch.where(mask, x, torch.zeros_like(x))\n", "")
        ),
        "rounding of the mean of a constant": edited(whiten, (" + masked_mean(x - mean, mask)", "")),
        "spread treated as constant": edited(whiten, ("masked_var(x, mask)", "masked_var(x, mask).detach()")),
    },
    "aggregate": {
        "always token-mean": lambda losses, mask, how: masked_mean(losses, mask),
        "always sequence-mean": lambda losses, mask, how: aggregate(losses, mask, "sequence-mean"),
        "the two sequence names exchanged": lambda losses, mask, how: aggregate(
            losses, mask, {"sequence-mean": "sequence-sum", "sequence-sum": "sequence-mean"}.get(how, how)
        ),
        "an empty sequence counts as 0": edited(
            aggregate, ("masked_mean(per_sequence, mask.any(1))", "per_sequence.mean()")
        ),
        "divides by the padded length": lambda losses, mask, how: torch.where(mask, losses, 0.0).mean(),
        "sums over the batch": edited(
            aggregate, ("masked_mean(per_sequence, mask.any(1))", "masked_sum(per_sequence, mask.any(1))")
        ),
        "multiplies by the mask": lambda losses, mask, how: (
            aggregate(losses, mask, how) if how != "sequence-sum" else (losses * mask).sum(1)[mask.any(1)].mean()
        ),
        "an unknown name is token-mean": edited(
            aggregate, ('if how == "token-mean":', 'if how not in ("sequence-mean", "sequence-sum"):')
        ),
    },
}
EXEMPT = {"Aggregation"}
