"""The update of PPO: its loss by hand, its minibatches, and when it stops."""

import dataclasses
import math
from unittest import mock

import torch

import planting
from planting import close, edited, f64, ignores_padding, leaf, masks, normal, raises
from rlhfkit.ppo import Experience, PPOConfig, Prediction, ppo_epochs, ppo_loss

JUNK = 1e30
MASK = torch.tensor([[True, True, False], [True, False, False]])


def on_tokens(a, b, c):
    """Numbers of the three tokens that count, with junk around them."""
    return f64([[a, b, JUNK], [c, JUNK, JUNK]])


def by_hand():
    """Ratios 1.5, 1.15 and 0.5; the third value has moved by 1, away from a return still further off."""
    old = Experience(
        on_tokens(*[math.log(0.5)] * 3),
        on_tokens(0.5, 2.0, -1.0),
        on_tokens(2.0, -1.0, -3.0),
        on_tokens(0.0, 1.0, 3.0),
        MASK,
    )
    new = Prediction(
        on_tokens(math.log(0.75), math.log(0.575), math.log(0.25)), on_tokens(1.0, 2.0, 0.0), on_tokens(1.0, 2.0, 0.0)
    )
    return dataclasses.replace(new, entropies=on_tokens(0.3, 0.6, 0.9)), old


RAW = PPOConfig(whiten_advantages="no")


def test_loss_and_metrics_by_hand(ppo_loss=ppo_loss):
    """Loss of the tokens: -2.4, 1.15, 2.4 of the policy, 0.5, 0.5, 7.22 of the values; at half the clip ranges -2.2,
    1.15, 2.7 and 0.5, 0.5, 7.605; without clipping of values the last is 4.5."""
    cases = [
        ({}, 1.0, (-2.4 + 1.15 + 2.4) / 3, 8.22 / 3, 2 / 3),
        ({}, 0.5, (-2.2 + 1.15 + 2.7) / 3, 8.605 / 3, 1.0),
        ({"cliprange_value": None}, 1.0, 1.15 / 3, 5.5 / 3, 2 / 3),
        ({"cliprange_value": None}, 0.5, 1.65 / 3, 5.5 / 3, 1.0),
        ({"cliprange": 0.6}, 1.0, (-3.0 + 1.15 + 1.5) / 3, 8.22 / 3, 0.0),
        ({"cliprange": 0.6}, 0.5, (-2.6 + 1.15 + 2.1) / 3, 8.605 / 3, 2 / 3),
    ]
    for changes, scale, policy, value, outside in cases:
        config = dataclasses.replace(RAW, vf_coef=0.5, ent_coef=0.1, **changes)
        loss, metrics = ppo_loss(*by_hand(), config, scale)
        close(loss, f64(policy + 0.5 * value - 0.06))
        expected = {
            "loss/policy_avg": policy,
            "loss/value_avg": value,
            "policy/entropy_avg": 0.6,
            "policy/approxkl_avg": (0.15 - math.log(1.5) - math.log(1.15) - math.log(0.5)) / 3,
            "policy/clipfrac_avg": outside,
            "val/ratio": 3.15 / 3,
        }
        assert metrics.keys() == expected.keys()
        close(metrics, {name: f64(x) for name, x in expected.items()})


def batch(seed=0, moved=0.5):
    mask = masks()
    x = [normal(*mask.shape, seed=10 * seed + i) for i in range(7)]
    return Prediction(x[0] - 2 + moved * x[4], x[5].abs(), x[1] + x[6]), Experience(x[0] - 2, x[1], x[2], x[3], mask)


def test_gradient_at_the_old_policy_is_advantage_error_and_bonus_per_token(ppo_loss=ppo_loss):
    new, old = batch(moved=0.0)
    new = Prediction(*(leaf(x) for x in (new.logprobs, new.entropies, new.values)))
    config = dataclasses.replace(RAW, vf_coef=0.3, ent_coef=0.02, cliprange_value=None)
    loss, metrics = ppo_loss(new, old, config)
    found = torch.autograd.grad(loss, [new.logprobs, new.entropies, new.values])
    count = old.mask.sum()
    expected = -old.advantages, torch.full_like(new.entropies, -0.02), 0.3 * (new.values.detach() - old.returns)
    for got, x in zip(found, expected, strict=True):
        close(got, torch.where(old.mask, x, 0.0) / count)
    assert not any(x.requires_grad or x.ndim for x in metrics.values())


def test_whitening_of_a_minibatch_is_over_its_tokens_that_count(ppo_loss=ppo_loss):
    """The advantages are read off the gradient: mean 0, variance 1, in the same order; else they are left alone."""
    for how, whitened in (("minibatch", True), ("batch", False), ("no", False)):
        new, old = batch(moved=0.0)
        old = dataclasses.replace(old, advantages=torch.where(old.mask, 3 + 7 * old.advantages, JUNK))
        logprobs = leaf(new.logprobs)
        loss, _ = ppo_loss(dataclasses.replace(new, logprobs=logprobs), old, PPOConfig(whiten_advantages=how))
        used = -torch.autograd.grad(loss, logprobs)[0][old.mask] * old.mask.sum()
        if whitened:
            close(used.mean(), f64(0.0), atol=1e-6, rtol=0)
            close(used.var(), f64(1.0), atol=1e-6, rtol=0)
            raw = old.advantages[old.mask]
            close(used * raw.std() + raw.mean(), raw)
        else:
            close(used, old.advantages[old.mask])


def test_padding_changes_neither_loss_nor_gradient(ppo_loss=ppo_loss):
    for how in ("no", "minibatch"):
        new, old = batch()

        def loss_of(logprobs, entropies, values, *before, how=how, mask=old.mask):
            config = PPOConfig(whiten_advantages=how, ent_coef=0.1)
            return ppo_loss(Prediction(logprobs, entropies, values), Experience(*before, mask), config)[0]

        before = old.logprobs, old.values, old.advantages, old.returns
        with mock.patch.object(planting, "JUNK", (40.0, -40.0)):  # what networks may say there is finite
            ignores_padding(loss_of, old.mask, new.logprobs, new.entropies, new.values, *before)


def test_averages_are_over_tokens_so_the_split_into_rows_does_not_matter(ppo_loss=ppo_loss):
    new, old = batch()
    loss, metrics = ppo_loss(new, old, RAW)
    flat = [x[old.mask].unsqueeze(1) for x in (new.logprobs, new.entropies, new.values)]
    before = [getattr(old, f.name)[old.mask].unsqueeze(1) for f in dataclasses.fields(old)]
    again, the_same = ppo_loss(Prediction(*flat), Experience(*before), RAW)
    close(again, loss)
    close(the_same, metrics)


def test_rows_of_a_batch_are_taken_from_every_part(Experience=Experience):
    parts = [torch.arange(12.0).view(4, 3) + 100 * i for i in range(4)]
    old = Experience(*parts, parts[0] % 2 == 0)
    some = old.rows(torch.tensor([3, 0, 3]))
    assert isinstance(some, Experience)
    for i, field in enumerate(dataclasses.fields(old)[:4]):
        assert (getattr(some, field.name)[:, 0] - 100 * i).tolist() == [9.0, 0.0, 9.0]
    assert some.mask.tolist() == [(parts[0] % 2 == 0)[i].tolist() for i in (3, 0, 3)]
    raises(dataclasses.FrozenInstanceError, lambda: setattr(old, "mask", some.mask))


# --- epochs and minibatches ---------------------------------------------------------------------------------------


class Networks:
    """A log-probability and a value for every step, as free numbers; each update moves them down the gradient."""

    def __init__(self, old, lr=0.0, logprobs=None):
        self.logprobs, self.values = leaf(old.logprobs if logprobs is None else logprobs), leaf(old.values)
        self.lr, self.rows, self.gradients = lr, [], []

    def predict(self, rows):
        self.rows.append(rows)
        return Prediction(self.logprobs[rows], torch.zeros_like(self.values[rows]), self.values[rows])

    def descend(self, loss):
        found = torch.autograd.grad(loss, [self.logprobs, self.values])
        self.gradients.append(found)
        with torch.no_grad():
            for x, gradient in zip((self.logprobs, self.values), found, strict=True):
                x -= self.lr * gradient
        return f64(float(len(self.gradients)))


def whole(rows=7, columns=2, seed=0):
    parts = [normal(rows, columns, seed=seed + i) for i in range(4)]
    return Experience(*parts, torch.ones(rows, columns, dtype=torch.bool))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def run(ppo_epochs, old, *more, lr=0.0, seed=0, **settings):
    networks = Networks(old, lr)
    config = PPOConfig(**{"whiten_advantages": "no", "cliprange_value": None} | settings)
    metrics = ppo_epochs(networks.predict, old, config, networks.descend, seeded(seed), *more)
    return networks, metrics


def test_more_minibatches_than_rows_are_refused(ppo_epochs=ppo_epochs):
    raises(ValueError, lambda: run(ppo_epochs, whole(), num_mini_batches=8), "num_mini_batches", "8", "7")


def test_every_epoch_takes_every_row_once_in_minibatches_of_nearly_one_size(ppo_epochs=ppo_epochs):
    before = torch.get_rng_state()
    for epochs, parts in ((1, 1), (3, 1), (1, 4), (4, 3), (2, 7)):
        networks, metrics = run(ppo_epochs, whole(), num_ppo_epochs=epochs, num_mini_batches=parts)
        assert len(networks.rows) == len(networks.gradients) == epochs * parts == metrics["updates"]
        orders = [torch.cat(networks.rows[e * parts : (e + 1) * parts]).tolist() for e in range(epochs)]
        assert all(sorted(order) == list(range(7)) for order in orders)
        sizes = {len(rows) for rows in networks.rows}
        assert max(sizes) - min(sizes) <= 1
        assert epochs == 1 or len(set(map(tuple, orders))) > 1
        assert orders[0] != list(range(7))
        networks, _ = run(ppo_epochs, whole(), num_ppo_epochs=epochs, num_mini_batches=parts, shuffle=False)
        assert torch.cat(networks.rows).tolist() == list(range(7)) * epochs
    one, again, other = (
        [rows.tolist() for rows in run(ppo_epochs, whole(), num_mini_batches=3, seed=s)[0].rows] for s in (0, 0, 1)
    )
    assert one == again != other and before.equal(torch.get_rng_state())


def test_rows_meet_their_own_advantages_whitened_over_the_batch_the_minibatch_or_not_at_all(ppo_epochs=ppo_epochs):
    for how in ("no", "batch", "minibatch"):
        old = whole()
        raw = old.advantages.clone()
        networks, _ = run(ppo_epochs, old, num_ppo_epochs=1, num_mini_batches=2, whiten_advantages=how)
        used = torch.zeros_like(raw)
        for rows, (gradient, _) in zip(networks.rows, networks.gradients, strict=True):
            used[rows] = -gradient[rows] * raw[rows].numel()
            if how == "minibatch":
                close(torch.stack([used[rows].mean(), used[rows].var()]), f64([0.0, 1.0]), atol=1e-6, rtol=0)
        assert old.advantages.equal(raw)  # what was collected stays as it was
        if how == "no":
            close(used, raw)
        if how == "batch":
            close(used * raw.std() + raw.mean(), raw)
            close(torch.stack([used.mean(), used.var()]), f64([0.0, 1.0]), atol=1e-6, rtol=0)


def test_whitening_leaves_padding_out(ppo_epochs=ppo_epochs):
    old = dataclasses.replace(whole(5, 5), mask=masks())
    old = dataclasses.replace(old, advantages=torch.where(old.mask, 2 + old.advantages, JUNK))
    networks, _ = run(ppo_epochs, old, num_ppo_epochs=1, whiten_advantages="batch")
    used = -networks.gradients[0][0] * old.mask.sum()
    close(torch.stack([used[old.mask].mean(), used[old.mask].var()]), f64([0.0, 1.0]), atol=1e-6, rtol=0)
    assert (used[~old.mask] == 0).all()


def test_updates_follow_one_another_so_that_the_error_of_a_value_shrinks_geometrically(ppo_epochs=ppo_epochs):
    """Value loss per step (v - R)^2 / 2 over 14 steps: each update leaves 1 - lr vf_coef / 14 of every error."""
    old = whole()
    for epochs in (1, 5):
        networks, metrics = run(ppo_epochs, old, lr=2.0, vf_coef=0.5, num_ppo_epochs=epochs)
        left = (1 - 1 / 14) ** epochs
        close(networks.values.detach() - old.returns, left * (old.values - old.returns))
        losses = [((1 - 1 / 14) ** (2 * e) * 0.5 * (old.values - old.returns).square().mean()) for e in range(epochs)]
        close(metrics["loss/value_avg"], torch.stack(losses).mean())  # each before its own update
        close(metrics["grad_norm"], f64((epochs + 1) / 2))  # what descend returned, averaged


def test_the_ratio_is_to_the_policy_that_sampled_and_stops_at_the_clip_range(ppo_epochs=ppo_epochs):
    """Of single steps with advantages 1 and -1, each ratio leaves the interval once and no further; scale halves it."""
    old = Experience(f64([[-1.0], [-1.0]]), f64([[0.0], [0.0]]), f64([[1.0], [-1.0]]), f64([[0.0], [0.0]]), MASK[:, :1])
    for more, eps in (((), 0.2), ((0.5,), 0.1)):
        networks, metrics = run(ppo_epochs, old, *more, lr=0.02, num_ppo_epochs=60)
        ratio = (networks.logprobs.detach() - old.logprobs).exp().flatten()
        assert 1 + eps < ratio[0] < 1 + eps + 0.015 and 1 - eps - 0.015 < ratio[1] < 1 - eps
        assert 0 < metrics["policy/clipfrac_avg"] < 1 and metrics["policy/approxkl_avg"] > 0
    free, _ = run(ppo_epochs, old, lr=0.02, num_ppo_epochs=60, cliprange=1e9)
    assert (free.logprobs.detach() - old.logprobs).exp()[0] > 1.5


def test_updates_end_before_the_first_one_that_finds_too_large_a_divergence(ppo_epochs=ppo_epochs):
    """Every update moves all log-probabilities by 0.1, so the k-th finds expm1(0.1 k) - 0.1 k."""
    old = whole()

    def train(target_kl, start=0.0):
        networks = Networks(old, logprobs=old.logprobs + start)

        def descend(loss):
            with torch.no_grad():
                networks.logprobs += 0.1
            return f64(1.0)

        config = PPOConfig(num_ppo_epochs=3, num_mini_batches=2, target_kl=target_kl, whiten_advantages="no")
        return ppo_epochs(networks.predict, old, config, descend, seeded())

    found = [math.expm1(0.1 * k) - 0.1 * k for k in range(6)]
    for target, updates in ((None, 6), (1.0, 6), (found[4] + 1e-9, 5), (found[4] - 1e-9, 4), (1e-9, 1)):
        metrics = train(target)
        assert metrics["updates"] == updates, (target, metrics["updates"])
        close(metrics["policy/approxkl_avg"], f64(sum(found[:updates]) / updates))
    assert train(1e-9, start=0.5)["updates"] == 1  # the first is always taken


def test_no_later_epoch_is_begun_after_a_stop(ppo_epochs=ppo_epochs):
    """Only the second half of the rows has moved, so the first half would be found unmoved in every epoch."""
    old = whole(6)
    networks = Networks(old, logprobs=old.logprobs + f64([0, 0, 0, 1, 1, 1]).unsqueeze(1))
    config = PPOConfig(num_ppo_epochs=3, num_mini_batches=2, target_kl=0.1, shuffle=False)
    metrics = ppo_epochs(networks.predict, old, config, networks.descend, seeded())
    assert metrics["updates"] == len(networks.gradients) == 1


def test_an_extra_loss_is_added_and_told_how_many_rows_there_are(ppo_epochs=ppo_epochs):
    old = whole()
    plain, _ = run(ppo_epochs, old, num_mini_batches=3, num_ppo_epochs=1)
    networks, asked = Networks(old), []

    def extra(count):
        asked.append(count)
        return 5 * networks.values.sum()

    config = PPOConfig(num_mini_batches=3, num_ppo_epochs=1, whiten_advantages="no", cliprange_value=None)
    metrics = ppo_epochs(networks.predict, old, config, networks.descend, seeded(), 1.0, extra)
    assert asked == [len(rows) for rows in networks.rows] and sorted(asked) == [2, 2, 3]
    for (a, b), (c, d) in zip(networks.gradients, plain.gradients, strict=True):
        close(a, c)
        close(b, d + 5)
    assert metrics["updates"] == 3


# --- settings ------------------------------------------------------------------------------------------------------

OUT_OF_RANGE = {
    "cliprange": (-0.1, math.nan),
    "cliprange_value": (0.0, -1.0, math.nan),
    "vf_coef": (-0.1, math.nan),
    "ent_coef": (-0.1, math.nan),
    "gamma": (-0.1, 1.1, math.nan),
    "lam": (-0.1, 1.1, math.nan),
    "num_ppo_epochs": (0, -1),
    "num_mini_batches": (0, -1),
    "lr": (0.0, -1e-3, math.nan),
    "adam_eps": (0.0, -1e-5, math.nan),
    "max_grad_norm": (0.0, -1.0, math.nan),
    "target_kl": (0.0, -0.1, math.nan),
    "whiten_advantages": ("yes", True, None),
}


def test_settings_out_of_range_are_refused_by_name(PPOConfig=PPOConfig):
    for name, bad in OUT_OF_RANGE.items():
        for x in bad:
            raises(ValueError, lambda name=name, x=x: PPOConfig(**{name: x}), name, str(x))
    edges = {"cliprange": 0, "vf_coef": 0, "ent_coef": 0, "gamma": 0, "lam": 0, "num_ppo_epochs": 1}
    edges |= {"num_mini_batches": 1, "max_grad_norm": math.inf, "target_kl": None, "cliprange_value": None}
    config = PPOConfig(**edges)
    assert {name: getattr(config, name) for name in edges} == edges
    assert PPOConfig(gamma=1.0, lam=1.0).gamma == 1.0
    raises(dataclasses.FrozenInstanceError, lambda: setattr(config, "lam", 0.5))
    raises(ValueError, lambda: dataclasses.replace(config, lam=2.0), "lam", "2.0", "[0, 1]")


def _config(*changes):
    return edited(PPOConfig, *changes)


def _loss(*changes):
    return edited(ppo_loss, *changes)


def _epochs(*changes):
    return edited(ppo_epochs, *changes)


POSITIVE = "require_in(name, getattr(self, name), 0.0, open_low=True)"
ROWS = ".index_select(0, which) for field"
RATIO = "clipped_policy_loss(new.logprobs, old.logprobs,"
SPLIT = "order.tensor_split(config.num_mini_batches)"
EPOCHS = "    for _ in range(config.num_ppo_epochs):\n"
SHUFFLE = "torch.randperm(count, generator=generator, device=device)"
TOO_FAR = 'config.target_kl is not None and metrics["policy/approxkl_avg"] > config.target_kl'
APPEND = 'history.append(metrics | {"grad_norm": descend(loss)})'
PLANTED = {
    "PPOConfig": {
        "gamma not checked": _config(('("gamma", "lam")', '("lam",)')),
        "lam not checked": _config(('("gamma", "lam")', '("gamma",)')),
        "lam may exceed 1": _config(("0.0, 1.0)", "0.0)")),
        "no epoch allowed": _config(("getattr(self, name), 1)", "getattr(self, name), 0)")),
        "no clipping is refused": _config(
            (" if getattr(self, name) is not None]", "]"),
            (POSITIVE, POSITIVE.replace("name), 0", "name) or 0.0, 0")),
        ),
        "any whitening": _config(('if self.whiten_advantages not in ("batch", "minibatch", "no"):', "if False:")),
        "a rate of 0": _config((", open_low=True", "")),
        "clip range of 0 refused": _config(
            (f"            {POSITIVE.replace(', open_low=True', '')}\n", f"            {POSITIVE}\n")
        ),
        "can be changed": _config(("@dataclass(frozen=True)", "@dataclass")),
    },
    "Experience": {
        "the mask of all rows": edited(
            Experience, (ROWS, "[which if field.name != 'mask' else slice(None)] for field")
        ),
        "values of the first rows": edited(
            Experience, (ROWS, "[which if field.name != 'values' else slice(len(which))] for field")
        ),
        "in order": edited(Experience, (ROWS, "[which.sort()[0]] for field")),
        "each row once": edited(Experience, (ROWS, "[which.unique()] for field")),
        "parts crossed": edited(Experience, ("in fields(self))", "in [fields(self)[i] for i in (0, 1, 3, 2, 4)])")),
        "can be changed": edited(Experience, ("@dataclass(frozen=True)", "@dataclass")),
    },
    "ppo_loss": {
        "entropy punished": _loss(("- config.ent_coef", "+ config.ent_coef")),
        "value loss subtracted": _loss(("+ config.vf_coef", "- config.vf_coef")),
        "value loss not weighted": _loss(("config.vf_coef * value_loss", "value_loss")),
        "padding counts": _loss(
            ("mask, advantages = old.mask, old.adv", "mask, advantages = old.mask | True, old.adv")
        ),
        "mean per response": _loss(('(policy_losses, mask, "token-mean")', '(policy_losses, mask, "sequence-mean")')),
        "value loss per response": _loss(
            ('(value_losses, mask, "token-mean")', '(value_losses, mask, "sequence-sum")')
        ),
        "clip off": _loss(("advantages, cliprange)", "advantages, 1e9)")),
        "value clip off": _loss(("old.returns, cliprange_value)", "old.returns, None)")),
        "clip range not annealed": _loss(("cliprange = config.cliprange * scale", "cliprange = config.cliprange")),
        "value clip not annealed": _loss(("else config.cliprange_value * scale", "else config.cliprange_value")),
        "clipped with the range of values": _loss(("advantages, cliprange)", "advantages, cliprange_value or 0.2)")),
        "ratio always 1": _loss((RATIO, RATIO.replace("old", "new"))),
        "ratio upside down": _loss((RATIO, "clipped_policy_loss(old.logprobs, new.logprobs,")),
        "values learn the old values": _loss(("old.values, old.returns,", "old.returns, old.values,")),
        "values learn the advantages": _loss(("old.values, old.returns,", "old.values, old.advantages,")),
        "never whitened": _loss(('if config.whiten_advantages == "minibatch":', "if False:")),
        "always whitened": _loss(('if config.whiten_advantages == "minibatch":', "if True:")),
        "whitened across padding": _loss(("whiten(advantages, mask)", "whiten(advantages)")),
        "scaled only": _loss(("whiten(advantages, mask)", "whiten(advantages, mask, False)")),
        "approx_kl turned": _loss(("approx_kl(new.logprobs, old.logprobs)", "approx_kl(old.logprobs, new.logprobs)")),
        "clipfrac of the whole range": _loss(("old.logprobs, cliprange).to", "old.logprobs, config.cliprange).to")),
        "ratio of the means": _loss(
            (
                "masked_mean((new.logprobs - old.logprobs).exp(), mask)",
                "masked_mean(new.logprobs - old.logprobs, mask).exp()",
            )
        ),
        "metrics keep the graph": _loss(("{name: x.detach() for name, x in metrics.items()}", "metrics")),
    },
    "ppo_epochs": {
        "one epoch": _epochs(("range(config.num_ppo_epochs)", "range(1)")),
        "one minibatch": _epochs((SPLIT, "[order]")),
        "minibatches of that size": _epochs((SPLIT, "order.split(config.num_mini_batches)")),
        "rows left over are dropped": _epochs(
            (SPLIT, "order.view(-1)[: count // 2 * 2].tensor_split(config.num_mini_batches)")
        ),
        "never shuffled": _epochs(("if config.shuffle:", "if False:")),
        "always shuffled": _epochs(("if config.shuffle:", "if True:")),
        "the same order every epoch": _epochs(
            (EPOCHS, f"    state = generator.get_state()\n{EPOCHS}        generator.set_state(state)\n")
        ),
        "more minibatches than rows": _epochs(("if count < config.num_mini_batches:", "if False:")),
        "global generator": _epochs(("generator=generator, device", "generator=None, device")),
        "rows drawn with replacement": _epochs((SHUFFLE, SHUFFLE.replace("randperm(count", "randint(count, (count,)"))),
        "other rows' advantages": _epochs(("old.rows(rows)", "old.rows(rows.flip(0))")),
        "not whitened": _epochs(('if config.whiten_advantages == "batch":', "if False:")),
        "whitened across padding": _epochs(("whiten(old.advantages, old.mask)", "whiten(old.advantages)")),
        "scale forgotten": _epochs(("config, scale)", "config)")),
        "target ignored": _epochs((TOO_FAR, "False")),
        "stops after one more": _epochs(
            (f"        if history and {TOO_FAR}:\n            break\n", ""),
            (APPEND, f"{APPEND}\n        if {TOO_FAR}:\n            break"),
        ),
        "leaves the epoch only": _epochs(("            break\n", "            continue\n")),
        "extra loss forgotten": _epochs(("loss + extra_loss(len(rows))", "loss + 0 * extra_loss(len(rows))")),
        "extra loss for the batch": _epochs(("extra_loss(len(rows))", "extra_loss(count)")),
        "extra loss subtracted": _epochs(("loss + extra_loss", "loss - extra_loss")),
        "metrics of the last update": _epochs((".mean() for name", "[-1] for name")),
        "old policy follows": _epochs(
            (
                "ppo_loss(predict(rows), old.rows(rows)",
                "ppo_loss((now := predict(rows)), replace(old.rows(rows), logprobs=now.logprobs.detach())",
            )
        ),
    },
}
EXEMPT = {"Prediction"}
