"""Fine-tuning, reward models and DPO: gradients by hand, exact limits, and runs that stop and go on."""

import inspect
import itertools
import math
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

from planting import close, edited, f64, raises
from rlhfkit.models import GPT, GPTConfig, ScalarModel
from rlhfkit.preference_losses import dpo_loss, ipo_loss
from rlhfkit.train_preference import (
    _in_pieces,
    _joined_pairs,
    _sequence_logprobs,
    pair_logprobs,
    response_nll,
    score_responses,
    train_dpo,
    train_reward_model,
    train_sft,
)
from rlhfkit.train_sft import muon_and_adamw
from rlhfkit.training import device_of

WHERE = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZES = {"vocab_size": 8, "n_positions": 12, "n_embd": 8, "n_layer": 1, "n_head": 2, "pad_id": 0}


def gpt(spread=0.5, **changes):
    """Weights so large that every token matters; double precision."""
    torch.manual_seed(17)
    model = GPT(GPTConfig(**SIZES | changes)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=spread)
    return model.eval()


def reward_model(**changes):
    model = ScalarModel(gpt(**changes), head_std=0.0)
    nn.init.normal_(model.head.weight, std=0.5)
    nn.init.normal_(model.head.bias, std=0.5)
    return model.eval()


PROMPTS = torch.tensor([[0, 5, 6], [2, 3, 4], [0, 0, 7]])
RESPONSES = torch.tensor([[7, 2, 3, 1, 0], [1, 0, 0, 0, 0], [3, 1, 0, 0, 0]])
OTHERS = torch.tensor([[2, 1, 0, 0], [6, 5, 4, 1], [3, 3, 1, 0]])
MARGINS = f64([0.3, -0.2, 1.0])


def real(row):
    return [token for token in row.tolist() if token]


def with_sgd(loop):
    """Plain gradient descent in place of the optimisers; planted loops live in copies of the module's names."""

    def run(*arguments, **settings):
        names = loop.__globals__
        simple = {
            "muon_and_adamw": lambda model, weight_decay: [torch.optim.SGD(model.parameters(), lr=1.0)],
        }
        with (
            mock.patch.dict(names, simple),
            mock.patch.object(torch.optim, "AdamW", lambda groups, **_: torch.optim.SGD([dict(g) for g in groups])),
        ):
            return loop(*arguments, **settings)

    return run


ONE_STEP = {"steps": 1, "batch_size": 3, "lr": 1.0, "warmup": 0, "weight_decay": 0.0, "max_grad_norm": math.inf}


def change_of(loop, model, *data, **settings):
    """Minus the change of every parameter in one step of size 1: the gradient; and the metrics of that step."""
    before = [p.detach().clone() for p in model.parameters()]
    (metrics,) = with_sgd(loop)(model, *data, **ONE_STEP | settings)
    return [b - p.detach() for b, p in zip(before, model.parameters(), strict=True)], metrics


def same_gradient(got, loss, model):
    expected = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    for x, y in zip(got, expected, strict=True):
        close(x, torch.zeros_like(x) if y is None else y, rtol=1e-4, atol=1e-6)  # the loss is in single precision
    return math.sqrt(sum(y.square().sum().item() for y in expected if y is not None))


# --- SFT ---------------------------------------------------------------------------------------------------------


def nll_by_hand(model, prompts=PROMPTS, responses=RESPONSES):
    """Token by token, every row alone and without padding: (row, nll, entropy, whether the best guess is right)."""
    found = []
    for b, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        said = real(prompt)
        for token in real(response):
            logprobs = model.logits(torch.tensor([said]))[0, -1].log_softmax(-1)
            p = logprobs.detach().exp()
            found.append((b, -logprobs[token], -(p * p.log()).sum(), float(p.argmax() == token)))
            said.append(token)
    return found


def test_one_step_of_sft_is_the_gradient_of_the_mean_over_response_tokens(train_sft=train_sft):
    """And the metrics are those before the step; the end token counts, prompt tokens and padding do not."""
    model = gpt()
    by_hand = nll_by_hand(model)
    losses = torch.stack([nll for _, nll, _, _ in by_hand])
    assert len(losses) == 4 + 1 + 2 and 0 < sum(right for *_, right in by_hand) < 7
    expected = torch.autograd.grad(losses.mean(), list(model.parameters()), retain_graph=True)
    got, metrics = change_of(train_sft, gpt(), PROMPTS, RESPONSES)
    for x, y in zip(got, expected, strict=True):
        close(x, y, rtol=1e-4, atol=1e-6)  # the loss is in single precision
    norm = math.sqrt(sum(y.square().sum().item() for y in expected))
    hand = {
        "loss": losses.mean().item(),
        "mean_token_accuracy": sum(right for *_, right in by_hand) / 7,
        "entropy": sum(h.item() for _, _, h, _ in by_hand) / 7,
        "grad_norm": norm,
        "lr": 1.0,
    }
    assert metrics.keys() == hand.keys()
    close(f64(list(metrics.values())), f64([hand[name] for name in metrics]), rtol=1e-5, atol=1e-6)


def test_more_padding_changes_nothing(train_sft=train_sft):
    wider = nn.functional.pad(PROMPTS, (2, 0)), nn.functional.pad(RESPONSES, (0, 3))
    for a, b in zip(
        change_of(train_sft, gpt(), *wider)[0], change_of(train_sft, gpt(), PROMPTS, RESPONSES)[0], strict=True
    ):
        close(a, b)


def tiny_language():
    """Two prompts, and responses with known frequencies; the entropy per token of this list, exactly."""
    said = {5: {(2, 1): 6, (3, 4, 1): 1, (3, 2, 1): 1}, 6: {(4, 4, 1): 4, (1,): 4}}
    rows = [(x, y) for x, responses in said.items() for y, count in responses.items() for _ in range(count)]
    # 5: first token 3/4 or 1/4, then after 3 one half; 6: one half
    nats = 8 * (math.log(4) - 0.75 * math.log(3)) + 2 * math.log(2) + 8 * math.log(2)
    tokens = sum(len(y) for _, y in rows)
    prompts = torch.tensor([[x] for x, _ in rows])
    return prompts, torch.tensor([[*y, *[0] * (3 - len(y))] for _, y in rows]), nats / tokens


def test_sft_reaches_the_entropy_and_not_less():
    prompts, responses, entropy = tiny_language()
    model = gpt(0.02, n_embd=16).float()
    history = train_sft(model, prompts, responses, steps=120, batch_size=16, lr=2e-2, warmup=5)
    losses = [row["loss"] for row in history]
    assert entropy - 1e-5 < min(losses) and entropy - 1e-5 < losses[-1] < entropy + 0.005, (losses[-1], entropy)
    assert abs(history[-1]["entropy"] - entropy) < 0.03 and not model.training
    nll, mask = response_nll(model, prompts, responses)
    assert abs((nll.sum() / mask.sum()).item() - losses[-1]) < 0.005


LOOPS = {
    "sft": lambda train, **settings: (
        train(
            (model := gpt(0.1, dropout=0.2).float()), *tiny_language()[:2], **{"batch_size": 4, "warmup": 2, **settings}
        )
        and model
    ),
    "reward": lambda train, **settings: (
        train(
            (model := reward_model(spread=0.1, dropout=0.2).float()),
            *pairs_of_numbers(16),
            **{"batch_size": 4, "warmup": 2, **settings},
        )
        and model
    ),
    "dpo": lambda train, **settings: (
        train(
            (model := gpt(0.1).float()),
            gpt(0.2).float(),
            *pairs_of_numbers(16),
            **{"batch_size": 4, "warmup": 2, "lr": 1e-3, **settings},
        )
        and model
    ),
}


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


class Stop(Exception):
    pass


def stops_and_goes_on(loop, train, *more):
    """Stopped after any step: the file leads to the same weights, bit for bit, dropout included; other runs refused."""

    def stop_at(stop):
        def on_step(step, metrics):
            if step == stop:
                raise Stop

        return on_step

    torch.manual_seed(0)
    whole = weights(LOOPS[loop](train, steps=8))
    torch.manual_seed(0)
    assert all(a.equal(b) for a, b in zip(weights(LOOPS[loop](train, steps=8)), whole, strict=True))
    other = weights(LOOPS[loop](train, steps=8, seed=1))
    assert not all(a.equal(b) for a, b in zip(other, whole, strict=True))
    with tempfile.TemporaryDirectory() as folder:
        for stop in (0, 2, 5, 7):
            settings = {"steps": 8, "checkpoint": Path(folder) / f"run{stop}", "save_every": 2}
            try:
                LOOPS[loop](train, **settings, on_step=stop_at(stop))
                raise AssertionError(f"on_step was not called with step {stop}")
            except Stop:
                pass
            steps = []
            model = LOOPS[loop](train, **settings, on_step=lambda step, metrics, steps=steps: steps.append(step))
            assert steps == list(range(stop // 2 * 2, 8)), steps
            assert all(a.equal(b) for a, b in zip(weights(model), whole, strict=True)), stop
        for changes in (
            {"lr": 1e-4},
            {"batch_size": 5},
            {"steps": 9},
            {"seed": 1},
            {"warmup": 3},
            {"weight_decay": 0.5},
            {"max_grad_norm": 2.0},
            {"bf16": True},
            *more,
        ):
            again = lambda c=changes: LOOPS[loop](train, **settings | c)  # noqa: E731
            raises(ValueError, again, "another recipe", next(iter(changes)))


def test_files_of_the_other_loop_are_refused():
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        LOOPS["sft"](train_sft, steps=2, checkpoint=path)
        raises(ValueError, lambda: LOOPS["reward"](train_reward_model, steps=2, checkpoint=path), "loop sft there")


def calls_while_training(train, loop):
    """The model is in training mode in every step, and what on_step is told is what is returned."""
    seen = []
    model = gpt(0.1).float() if loop == "sft" else reward_model(spread=0.1).float()
    data = tiny_language()[:2] if loop == "sft" else pairs_of_numbers(16)
    history = train(model, *data, steps=3, batch_size=4, warmup=1, on_step=lambda *a: seen.append((*a, model.training)))
    assert seen == [(step, row, True) for step, row in enumerate(history)] and not model.training
    close(f64([row["lr"] for row in history]), f64([0.5, 1.0, 0.5]) * (3e-3 if loop == "sft" else 1e-3))
    assert all(type(x) is float for row in history for x in row.values())


def test_sft_calls_back_in_training_mode(train_sft=train_sft):
    calls_while_training(train_sft, "sft")


def test_reward_models_call_back_in_training_mode(train_reward_model=train_reward_model):
    calls_while_training(train_reward_model, "reward")


def test_sft_refuses_what_does_not_fit_and_what_is_not_finite(train_sft=train_sft):
    raises(ValueError, lambda: train_sft(gpt(), PROMPTS[:2], RESPONSES, **ONE_STEP), "(2, 3)", "(3, 5)")
    model = gpt()
    with torch.no_grad():
        model.norm.bias[0] = math.nan
    before = weights(model)
    raises(FloatingPointError, lambda: train_sft(model, PROMPTS, RESPONSES, **ONE_STEP), "step 0", "loss")
    assert all(a.nan_to_num(7.0).equal(b.nan_to_num(7.0)) for a, b in zip(before, weights(model), strict=True))


@pytest.mark.parametrize("where", WHERE)
def test_sft_on_this_device_learns_as_in_double_precision(where):
    prompts, responses, _ = tiny_language()
    settings = {"steps": 6, "batch_size": 16, "lr": 3e-3, "warmup": 2}
    exact = train_sft(gpt(0.1), prompts, responses, **settings)
    model = gpt(0.1).float().to(where)
    history = train_sft(model, prompts, responses, **settings)
    close(f64([row["loss"] for row in history]), f64([row["loss"] for row in exact]), atol=2e-3, rtol=0)
    assert device_of(model).type == where
    half = train_sft(gpt(0.1).float().to(where), prompts, responses, **settings, bf16=True)
    close(f64([row["loss"] for row in half]), f64([row["loss"] for row in exact]), atol=3e-2, rtol=0)
    assert half != history  # bfloat16 was used


# --- likelihood of given responses -------------------------------------------------------------------------------


def test_nll_is_that_of_every_row_alone(response_nll=response_nll):
    model = gpt()
    with torch.no_grad():
        by_hand = nll_by_hand(model)
    for size in (1, 2, 256):
        nll, mask = response_nll(model, PROMPTS, RESPONSES, size)
        assert mask.equal(RESPONSES != 0) and (nll[~mask] == 0).all() and not nll.requires_grad
        close(nll[mask], torch.stack([x for _, x, _, _ in by_hand]))
    wide, _ = response_nll(model, nn.functional.pad(PROMPTS, (4, 0)), RESPONSES)
    close(wide, nll)


@pytest.mark.parametrize("where", WHERE)
def test_results_come_back_to_the_cpu(where):
    model, rewards = gpt().float().to(where), reward_model().float().to(where)
    nll, mask = response_nll(model, PROMPTS, RESPONSES)
    assert {x.device.type for x in (nll, mask, score_responses(rewards, PROMPTS, RESPONSES))} == {"cpu"}


# --- reward models -----------------------------------------------------------------------------------------------


def score_by_hand(model, prompt, response):
    return model.values(torch.tensor([real(prompt) + real(response)]))[0, -1]


def test_one_step_of_a_reward_model_is_the_gradient_of_the_mean_over_pairs(train_reward_model=train_reward_model):
    """With and without margins and centring; every sequence alone, its score read at its last token."""
    for margins, weight in ((None, 0.0), (MARGINS, 0.0), (None, 0.5), (MARGINS, 0.1)):
        model = reward_model()
        chosen, rejected = (
            torch.stack([score_by_hand(model, p, y) for p, y in zip(PROMPTS, side, strict=True)])
            for side in (RESPONSES, OTHERS)
        )
        shift = 0.0 if margins is None else margins
        losses = (1 + torch.exp(-(chosen - rejected - shift))).log()
        loss = losses.mean() + weight * (chosen + rejected).square().mean()
        settings = {"margins": margins, "center_rewards_coefficient": weight}
        got, metrics = change_of(train_reward_model, reward_model(), PROMPTS, RESPONSES, OTHERS, **settings)
        norm = same_gradient(got, loss, model)
        both = torch.cat([chosen, rejected]).tolist()
        hand = {
            "loss": losses.mean().item(),
            "accuracy": (chosen > rejected).double().mean().item(),
            "margin": (chosen - rejected).mean().item(),
            "min_reward": min(both),
            "mean_reward": sum(both) / 6,
            "max_reward": max(both),
            "grad_norm": norm,
            "lr": 1.0,
        }
        assert metrics.keys() == hand.keys()
        close(f64(list(metrics.values())), f64([hand[name] for name in metrics]), rtol=1e-5, atol=1e-6)


TRUTH = {2: 0.0, 3: 1.0, 4: -1.0, 5: 0.5}


def truth(response):
    return sum(TRUTH.get(token, 0.0) for token in response)


def pairs_of_numbers(count, noise=1.0):
    """Prompts of one token and responses of three, of which the one with the higher sum usually wins."""
    generator = torch.Generator().manual_seed(5)
    responses = torch.randint(2, 6, (2, count, 3), generator=generator)
    first, second = ([truth(row) for row in side.tolist()] for side in responses)
    p = torch.sigmoid((f64(first) - f64(second)) / noise)
    wins = torch.rand(count, generator=generator, dtype=torch.float64) < p
    end = torch.ones(count, 1).long()
    chosen, rejected = (
        torch.cat([torch.where(side[:, None], responses[0], responses[1]), end], 1) for side in (wins, ~wins)
    )
    return torch.full((count, 1), 6), chosen, rejected


def test_a_reward_model_recovers_a_known_score():
    """The truth is a sum over tokens: each token at each place comes out at its worth, from 6,000 noisy labels."""
    data = pairs_of_numbers(6000)
    model = ScalarModel(gpt(0.1, n_embd=16).float())
    settings = {"steps": 150, "batch_size": 128, "lr": 1e-2, "warmup": 5}
    history = train_reward_model(model, *data, **settings, center_rewards_coefficient=0.01)
    listed = torch.tensor([[*y, 1] for y in itertools.product((2, 3, 4, 5), repeat=3)])
    scores = score_responses(model, torch.full((64, 1), 6), listed).double()
    exact = f64([truth(row) for row in listed.tolist()])
    cube = (scores - exact).view(4, 4, 4)
    for effects in (cube.mean((1, 2)), cube.mean((0, 2)), cube.mean((0, 1))):  # of every token at every place
        assert (effects - effects.mean()).abs().max() < 0.25, effects
    # the centre of the labelled responses is near 0; without the centring term nothing holds it there
    assert abs(scores.mean()) < 0.3 and history[-1]["loss"] < history[0]["loss"]
    difference = torch.stack([score_responses(model, data[0], side).double() for side in data[1:]])
    loss = torch.log1p(torch.exp(difference[1] - difference[0])).mean()
    best = f64([truth(row) for row in data[1].tolist()]) - f64([truth(row) for row in data[2].tolist()])
    assert loss < torch.log1p(torch.exp(-best)).mean() + 0.01  # as likely as under the truth, up to fitting noise


def test_the_narrower_side_is_padded(train_reward_model=train_reward_model):
    a = change_of(train_reward_model, reward_model(), PROMPTS, RESPONSES, OTHERS)[0]
    wide = nn.functional.pad(PROMPTS, (1, 0)), nn.functional.pad(RESPONSES, (0, 2)), nn.functional.pad(OTHERS, (0, 7))
    b = change_of(train_reward_model, reward_model(), *wide)[0]
    for x, y in zip(a, b, strict=True):
        close(x, y)
    for x, y in zip(
        change_of(train_reward_model, reward_model(), PROMPTS, OTHERS, RESPONSES)[0],
        change_of(train_reward_model, reward_model(), PROMPTS, nn.functional.pad(OTHERS, (0, 1)), RESPONSES)[0],
        strict=True,
    ):
        close(x, y)


def test_reward_models_refuse_what_does_not_fit_and_what_is_not_finite(train_reward_model=train_reward_model):
    def train(*data, model=None, **settings):
        return lambda: train_reward_model(model or reward_model(), *data, **ONE_STEP | settings)

    for data in ((PROMPTS[:2], RESPONSES, OTHERS), (PROMPTS, RESPONSES[:2], OTHERS), (PROMPTS, RESPONSES, OTHERS[:2])):
        raises(ValueError, train(*data), "prompts, chosen, rejected", "2", "one row per pair")
    for margins in (MARGINS[:2], MARGINS[:, None], f64(0.5)):
        raises(ValueError, train(PROMPTS, RESPONSES, OTHERS, margins=margins), "margins", str(tuple(margins.shape)))
    model = reward_model()
    before = weights(model)
    raises(
        FloatingPointError, train(PROMPTS, RESPONSES, OTHERS, model=model, margins=MARGINS * math.nan), "step 0", "loss"
    )
    assert all(a.equal(b) for a, b in zip(before, weights(model), strict=True))


@pytest.mark.parametrize("where", WHERE)
def test_a_reward_model_on_this_device_learns_as_in_double_precision(where):
    data, settings = pairs_of_numbers(64), {"steps": 6, "batch_size": 16, "warmup": 2, "margins": torch.ones(64) / 4}
    exact = train_reward_model(reward_model(spread=0.1), *data, **settings)
    history = train_reward_model(reward_model(spread=0.1).float().to(where), *data, **settings)
    close(f64([row["loss"] for row in history]), f64([row["loss"] for row in exact]), atol=2e-3, rtol=0)
    half = train_reward_model(reward_model(spread=0.1).float().to(where), *data, **settings, bf16=True)
    close(f64([row["loss"] for row in half]), f64([row["loss"] for row in exact]), atol=3e-2, rtol=0)
    assert half != history


def test_scores_are_those_of_every_row_alone(score_responses=score_responses):
    model = reward_model()
    with torch.no_grad():
        by_hand = torch.stack([score_by_hand(model, p, y) for p, y in zip(PROMPTS, RESPONSES, strict=True)])
    for size in (1, 2, 256):
        got = score_responses(model, PROMPTS, RESPONSES, size)
        close(got, by_hand)
        assert not got.requires_grad
    close(score_responses(model, nn.functional.pad(PROMPTS, (4, 0)), nn.functional.pad(RESPONSES, (0, 2))), by_hand)


# --- DPO ---------------------------------------------------------------------------------------------------------


def reference(**changes):
    """Another model than ``gpt()``, in double precision."""
    model = gpt(**changes)
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.mul_(0.8 if number % 2 else -0.8)
    return model


def logprob_by_hand(model, prompt, response):
    """Of a response, token by token and without padding."""
    said, total = real(prompt), 0.0
    for token in real(response):
        total = total + model.logits(torch.tensor([said]))[0, -1].log_softmax(-1)[token]
        said.append(token)
    return total


def sides_by_hand(model):
    return [
        torch.stack([logprob_by_hand(model, p, y) for p, y in zip(PROMPTS, side, strict=True)])
        for side in (RESPONSES, OTHERS)
    ]


def test_one_step_of_dpo_is_the_gradient_of_the_mean_over_pairs(train_dpo=train_dpo):
    """With the reference run before and in each step, for two losses; the metrics are those before the step."""
    losses_of = {
        dpo_loss: lambda h, beta: (1 + torch.exp(-beta * h)).log(),
        ipo_loss: lambda h, beta: h.square() - h / beta + 1 / (4 * beta * beta),
    }
    for (loss, by_hand), precompute, beta in itertools.product(losses_of.items(), (True, False), (0.1, 0.7)):
        model, ref = gpt(), reference()
        (chosen, rejected), (ref_chosen, ref_rejected) = sides_by_hand(model), [x.detach() for x in sides_by_hand(ref)]
        losses = by_hand((chosen - ref_chosen) - (rejected - ref_rejected), beta)
        before = weights(ref)
        settings = {"beta": beta, "loss": loss, "precompute": precompute}
        got, metrics = change_of(train_dpo, gpt(), ref, PROMPTS, RESPONSES, OTHERS, **settings)
        norm = same_gradient(got, losses.mean(), model)
        rewards, ref_rewards = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
        right = (rewards > ref_rewards).double().mean().item()
        assert 0 < right < 1 and norm > 0.1
        hand = {
            "loss": losses.mean().item(),
            "rewards/chosen": rewards.mean().item(),
            "rewards/rejected": ref_rewards.mean().item(),
            "rewards/accuracies": right,
            "rewards/margins": (rewards - ref_rewards).mean().item(),
            "logps/chosen": chosen.mean().item(),
            "logps/rejected": rejected.mean().item(),
            "grad_norm": norm,
            "lr": 1.0,
        }
        assert metrics.keys() == hand.keys()
        close(f64(list(metrics.values())), f64([hand[name] for name in metrics]))
        assert all(a.equal(b) for a, b in zip(before, weights(ref), strict=True))
        assert all(p.grad is None for p in ref.parameters())


def test_more_padding_changes_nothing_in_dpo(train_dpo=train_dpo):
    wide = nn.functional.pad(PROMPTS, (2, 0)), nn.functional.pad(RESPONSES, (0, 3)), nn.functional.pad(OTHERS, (0, 9))
    for precompute in (True, False):
        a, metrics = change_of(train_dpo, gpt(), reference(), PROMPTS, RESPONSES, OTHERS, precompute=precompute)
        b, same = change_of(train_dpo, gpt(), reference(), *wide, precompute=precompute)
        for x, y in zip(a, b, strict=True):
            close(x, y)
        close(f64(list(metrics.values())), f64(list(same.values())))


def test_dpo_takes_the_same_steps_with_the_reference_known_before(train_dpo=train_dpo):
    data = pairs_of_numbers(16)
    settings = {"steps": 6, "batch_size": 4, "lr": 1e-2, "warmup": 1, "beta": 0.5}
    runs = {}
    for precompute in (True, False):
        model = gpt(0.1)
        runs[precompute] = train_dpo(model, reference(spread=0.2), *data, **settings, precompute=precompute), model
    for a, b in zip(runs[True][0], runs[False][0], strict=True):
        close(f64(list(a.values())), f64(list(b.values())))
    for x, y in zip(weights(runs[True][1]), weights(runs[False][1]), strict=True):
        close(x, y)
    assert runs[True][0][5]["rewards/margins"] != runs[True][0][0]["rewards/margins"]


def test_dpo_asks_a_known_reference_before_the_first_step_only(train_dpo=train_dpo):
    for precompute, rising in ((True, False), (False, True)):
        ref, asked, counts = reference(spread=0.1), [], []
        logits = ref.logits
        ref.logits = lambda tokens, logits=logits, asked=asked: asked.append(len(tokens)) or logits(tokens)
        settings = {"steps": 3, "batch_size": 4, "precompute": precompute}
        tell = lambda step, metrics, asked=asked, counts=counts: counts.append(sum(asked))  # noqa: E731
        train_dpo(gpt(0.1), ref, *pairs_of_numbers(16), **settings, on_step=tell)
        assert counts == ([8, 16, 24] if rising else [32, 32, 32])  # responses


def test_dpo_keeps_dropout_off_in_policy_and_reference(train_dpo=train_dpo):
    for precompute in (True, False):
        model, ref = gpt(dropout=0.5).train(), reference(dropout=0.5).train()
        a, metrics = change_of(train_dpo, model, ref, PROMPTS, RESPONSES, OTHERS, precompute=precompute)
        b, same = change_of(train_dpo, gpt(), reference(), PROMPTS, RESPONSES, OTHERS, precompute=precompute)
        assert metrics == same and not model.training
        for x, y in zip(a, b, strict=True):
            close(x, y)


def test_dpo_starts_at_log_2_from_its_own_reference_and_reaches_the_odds_of_the_labels(train_dpo=train_dpo):
    """Two responses, of which the first wins 3 of 4 times: beta h = log 3, and the loss is the entropy of a label."""
    first, second = torch.tensor([[2, 4, 1]]), torch.tensor([[3, 1, 0]])
    chosen, rejected = torch.cat([first] * 3 + [second]), torch.cat([second] * 3 + [first])
    prompts, model = torch.full((4, 1), 5), gpt(0.1)
    ref = gpt(0.1)
    settings = {"steps": 60, "batch_size": 4, "lr": 1e-2, "warmup": 5, "beta": 0.5}
    history = train_dpo(model, ref, prompts, chosen, rejected, **settings)
    assert math.isclose(history[0]["loss"], math.log(2)) and history[0]["rewards/margins"] == 0
    entropy = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    assert entropy - 1e-9 < history[-1]["loss"] < entropy + 1e-3
    with torch.no_grad():
        h = sum(
            sign * (logprob_by_hand(model, prompts[0], y) - logprob_by_hand(ref, prompts[0], y))
            for sign, y in ((1, first[0]), (-1, second[0]))
        )
    assert abs(0.5 * h.item() - math.log(3)) < 0.05


def test_dpo_calls_back_in_evaluation_mode(train_dpo=train_dpo):
    seen, model = [], gpt(0.1).float()
    tell = lambda step, metrics: seen.append((step, metrics, model.training))  # noqa: E731
    settings = {"steps": 3, "batch_size": 4, "warmup": 1}
    history = train_dpo(model, reference(spread=0.1).float(), *pairs_of_numbers(16), **settings, on_step=tell)
    assert seen == [(step, row, False) for step, row in enumerate(history)] and len(seen) == 3
    close(f64([row["lr"] for row in history]), f64([0.5, 1.0, 0.5]) * 1e-4)
    assert all(type(x) is float for row in history for x in row.values())


def test_dpo_refuses_what_does_not_fit_its_own_policy_as_reference_and_what_is_not_finite(train_dpo=train_dpo):
    def train(policy, ref, *data, **settings):
        return lambda: train_dpo(policy, ref, *data, **ONE_STEP | settings)

    for data in ((PROMPTS[:2], RESPONSES, OTHERS), (PROMPTS, RESPONSES[:2], OTHERS), (PROMPTS, RESPONSES, OTHERS[:2])):
        raises(ValueError, train(gpt(), reference(), *data), "prompts, chosen, rejected", "2", "one row per pair")
    none = PROMPTS[:0], RESPONSES[:0], OTHERS[:0]
    raises(ValueError, train(gpt(), reference(), *none), "prompts, chosen, rejected", "0", "at least one")
    model = gpt()
    before = weights(model)
    raises(ValueError, train(model, model, PROMPTS, RESPONSES, OTHERS), "ref", "the policy itself", "log 2")
    bad = reference()
    with torch.no_grad():
        bad.norm.bias[0] = math.nan
    raises(FloatingPointError, train(model, bad, PROMPTS, RESPONSES, OTHERS), "step 0", "loss")
    assert all(a.equal(b) for a, b in zip(before, weights(model), strict=True))


@pytest.mark.parametrize("where", WHERE)
def test_dpo_on_this_device_learns_as_in_double_precision(where):
    data, settings = pairs_of_numbers(64), {"steps": 6, "batch_size": 16, "warmup": 2, "lr": 1e-3}
    exact = train_dpo(gpt(0.1), reference(spread=0.1), *data, **settings)
    for precompute in (True, False):
        both = gpt(0.1).float().to(where), reference(spread=0.1).float().to(where)
        history = train_dpo(*both, *data, **settings, precompute=precompute)
        close(f64([row["loss"] for row in history]), f64([row["loss"] for row in exact]), atol=2e-3, rtol=0)
        assert device_of(both[0]).type == where
        both = gpt(0.1).float().to(where), reference(spread=0.1).float().to(where)
        half = train_dpo(*both, *data, **settings, precompute=precompute, bf16=True)
        close(f64([row["loss"] for row in half]), f64([row["loss"] for row in exact]), atol=3e-2, rtol=0)
        assert half != history and next(both[0].parameters()).dtype == torch.float32


def test_logprobs_of_pairs_are_those_of_every_response_alone(pair_logprobs=pair_logprobs):
    model = gpt()
    chosen, rejected = sides_by_hand(model)
    wide = nn.functional.pad(PROMPTS, (2, 0)), nn.functional.pad(RESPONSES, (0, 2)), nn.functional.pad(OTHERS, (0, 5))
    for size, data in itertools.product((1, 2, 256), ((PROMPTS, RESPONSES, OTHERS), wide)):
        got = pair_logprobs(model, *data, size)
        close(got[0], chosen.detach())
        close(got[1], rejected.detach())
        assert not any(x.requires_grad for x in got)
    raises(ValueError, lambda: pair_logprobs(model, PROMPTS, RESPONSES, OTHERS[:2]), "rejected", "2", "one row")


class Coin:
    """A policy without parameters: every token has probability 1/8, in half precision."""

    pad_id = 0

    def logits(self, tokens):
        return torch.ones(*tokens.shape, 8, dtype=torch.bfloat16)


def test_logprobs_of_pairs_come_in_single_precision_from_any_policy(pair_logprobs=pair_logprobs):
    for got, side in zip(pair_logprobs(Coin(), PROMPTS, RESPONSES, OTHERS), (RESPONSES, OTHERS), strict=True):
        close(got, -(side != 0).sum(1) * math.log(8))
        assert got.dtype == torch.float32


@pytest.mark.parametrize("where", WHERE)
def test_logprobs_of_pairs_come_back_to_the_cpu(where):
    model = gpt().float().to(where)
    found = pair_logprobs(model, PROMPTS, RESPONSES, OTHERS)
    assert {x.device.type for x in found} == {"cpu"}
    for got, exact in zip(found, sides_by_hand(gpt()), strict=True):
        close(got, exact.detach().float(), atol=1e-3, rtol=1e-4)


# --- the parts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", WHERE)
def test_device_of_a_model_on_this_device(where):
    assert device_of(gpt().to(where)).type == where


def test_every_parameter_has_one_optimiser_and_muon_those_inside_the_blocks(muon_and_adamw=muon_and_adamw):
    model = gpt(n_layer=2)
    names = {id(p): name for name, p in model.named_parameters()}
    muon, adamw = muon_and_adamw(model, 0.3)
    assert isinstance(muon, torch.optim.Muon) and isinstance(adamw, torch.optim.AdamW)
    mine, others = ([names[id(p)] for g in o.param_groups for p in g["params"]] for o in (muon, adamw))
    assert sorted(mine + others) == sorted(names.values())
    parts = ("qkv", "attention_out", "up", "down")
    assert sorted(mine) == sorted(f"blocks.{layer}.{part}.weight" for layer in (0, 1) for part in parts)
    assert [g["lr_scale"] for g in muon.param_groups] == [3.0] and "lr_scale" not in adamw.param_groups[0]
    decay = {names[id(p)]: g["weight_decay"] for g in adamw.param_groups for p in g["params"]}
    assert {n for n, d in decay.items() if d == 0.3} == {"token_embedding.weight", "position_embedding.weight"}
    assert set(decay.values()) == {0.3, 0.0} and adamw.param_groups[0]["betas"] == (0.9, 0.95)


# --- the slowest last -----------------------------------------------------------------------------------------------


def test_sft_stopped_anywhere_ends_with_the_same_weights(train_sft=train_sft):
    stops_and_goes_on("sft", train_sft)


def test_reward_models_stopped_anywhere_end_with_the_same_weights(train_reward_model=train_reward_model):
    stops_and_goes_on("reward", train_reward_model)


def test_dpo_stopped_anywhere_ends_with_the_same_weights(train_dpo=train_dpo):
    stops_and_goes_on("dpo", train_dpo, {"beta": 0.2}, {"loss": ipo_loss}, {"precompute": False})


def _sft(*changes):
    return edited(train_sft, *changes)


def _reward(*changes):
    return edited(train_reward_model, *changes)


def _nll(*changes):
    return edited(response_nll, *changes)


def _dpo(*changes):
    return edited(train_dpo, *changes)


def _with(function, *changes, **names):
    """The function with other helpers, and changes of its own."""
    changed = edited(function, *changes)
    inspect.unwrap(changed).__globals__.update(names)
    return changed


def _with_logprobs(function, *changes):
    """The function where whole sequences have other log-probabilities, on either way to them."""
    changed = edited(function)
    names = inspect.unwrap(changed).__globals__
    names["_sequence_logprobs"] = edited(_sequence_logprobs, *changes)
    for name in ("_in_pieces", "pair_logprobs"):
        if name != function.__name__:
            names[name] = _with(names[name], **{n: names[n] for n in ("_sequence_logprobs", "_in_pieces")})
    return changed


FREE = ("@torch.no_grad()\n", "")
LONGER = "torch.maximum(*(tokens != pad_id).sum(1).chunk(2))"
WHOLE = "next_token_logprobs(logits, tokens), mask[:, 1:]"


JOIN = "tokens, mask = join_right_padded(prompts, responses, model.pad_id)"
PLANTED = {
    "train_sft": {
        "prompt tokens count": _sft((JOIN, JOIN + "\n    mask = tokens != model.pad_id")),
        "padding counts": _sft((JOIN, JOIN + "\n    mask = mask | (tokens == model.pad_id)")),
        "the end token does not count": _sft((JOIN, JOIN + "\n    mask = mask & (tokens != 1)")),
        "shifted by one": _sft(("mask[rows, 1:width]", "mask[rows, : width - 1]")),
        "not shifted": _sft(
            ("next_token_logprobs(logits, x)", "logits.log_softmax(-1).gather(2, x[..., None])[:, 1:, 0]")
        ),
        "mean per response": _sft(('"token-mean"', '"sequence-mean"')),
        "sum": _sft(('"token-mean"', '"sequence-sum"')),
        "wrong sign": _sft(("-logprobs, counts", "logprobs, counts")),
        "dropout left off": _sft(("    model.train()\n", "")),
        "left in training mode": _sft(("    model.eval()\n", "")),
        "the seed does not matter": _sft(("batch_size, seed, step)", "batch_size, 0, step)")),
        "the seed is not in the recipe": _sft(('"seed": seed', '"seed": 0')),
        "steps are not in the recipe": _sft(('"steps": steps', '"steps": 0')),
        "not clipped, not in the recipe": _sft(('"max_grad_norm": max_grad_norm', '"max_grad_norm": 0')),
        "constant learning rate": _sft(("cosine_lr(step, steps, lr, warmup)", "lr")),
        "accuracy with the prompt": _sft(("masked_mean(right, counts)", "right.mean()")),
        "accuracy shifted": _sft(("x[:, 1:]).float()", "x[:, :-1]).float()")),
        "entropy shifted": _sft(("entropy(logits)[:, :-1]", "entropy(logits)[:, 1:]")),
        "history not told": _sft(("on_step(step, run.history[-1])", "on_step(step, {})")),
    },
    "response_nll": {
        "sign": lambda *a: (lambda nll, mask: (-nll, mask))(*response_nll(*a)),
        "shifted": _nll(("y.to(device))", "y.to(device)).roll(1, 1)")),
        "padding counts": _nll(("torch.where(mask, nll, torch.zeros_like(nll))", "nll")),
        "the end token does not count": _nll(
            ("mask, pieces = responses != model.pad_id", "mask, pieces = responses > 1")
        ),
        "first batch again": _nll(("torch.cat(pieces)", "torch.cat(pieces[:1] * len(pieces))[: len(mask)]")),
        "per response": lambda *a: (lambda nll, mask: (nll / mask.sum(1, keepdim=True), mask))(*response_nll(*a)),
    },
    "train_reward_model": {
        "swapped": _reward(("chosen_scores, rejected_scores = scores", "rejected_scores, chosen_scores = scores")),
        "margin added": _reward(("margins[rows].to(scores)", "-margins[rows].to(scores)")),
        "margin of other rows": _reward(("margins[rows].to", "margins[: len(rows)].flip(0).to")),
        "margin forgotten": _reward(("rejected_scores, margin)", "rejected_scores)")),
        "sum over pairs": _reward(("loss = losses.mean()", "loss = losses.sum()")),
        "each side centred": _reward(("(chosen_scores + rejected_scores).square().mean()", "scores.square().mean()")),
        "mean of the sum squared": _reward(
            ("(chosen_scores + rejected_scores).square().mean()", "(chosen_scores + rejected_scores).mean().square()")
        ),
        "difference centred": _reward(
            ("(chosen_scores + rejected_scores).square()", "(chosen_scores - rejected_scores).square()")
        ),
        "centring always": _reward(("center_rewards_coefficient * centring", "0.01 * centring")),
        "first token's score": _reward(("model.scores(both)", "model.values(both)[:, 0]")),
        "score at the padding": _reward(("model.scores(both)", "model.values(both)[:, -1]")),
        "score before the end": _reward(("model.scores(both)", "model.scores(both, (both != pad_id) & (both != 1))")),
        "width of the chosen": _with(
            train_reward_model, _joined_pairs=edited(_joined_pairs, (LONGER, "(tokens != pad_id).sum(1).chunk(2)[0]"))
        ),
        "dropout left off": _reward(("    model.train()\n", "")),
        "left in training mode": _reward(("    model.eval()\n", "")),
        "a tie is right": _reward(("(difference > 0)", "(difference > -9)")),
        "reward of the chosen only": _reward(('"mean_reward": scores.mean()', '"mean_reward": chosen_scores.mean()')),
        "the seed does not matter": _reward(("batch_size, seed, step)", "batch_size, 0, step)")),
        "rows not compared": _reward(("len(prompts) == len(chosen) == len(rejected)", "len(prompts) == len(chosen)")),
        "margins broadcast": _reward(("margins.shape != (count,)", "False")),
    },
    "train_dpo": {
        "swapped": _dpo(("chosen_logprobs, rejected_logprobs), (ref", "rejected_logprobs, chosen_logprobs), (ref")),
        "references swapped": _dpo(("(ref_chosen, ref_rejected) =", "(ref_rejected, ref_chosen) =")),
        "reference forgotten": _dpo(
            ("rejected_logprobs, ref_chosen, ref_rejected", "rejected_logprobs, 0 * ref_chosen, 0 * ref_rejected")
        ),
        "the policy as reference": _dpo(("_in_pieces(ref,", "_in_pieces(policy,")),
        "the policy as known reference": _dpo(("pair_logprobs(ref,", "pair_logprobs(policy,")),
        "known reference of other rows": _dpo(("side[rows] for", "side[: len(rows)] for")),
        "known before all the same": _dpo(("if precompute else None", "if True else None")),
        "beta forgotten": _dpo(("ref_chosen, ref_rejected, beta)", "ref_chosen, ref_rejected, 0.1)")),
        "always the same loss": _dpo(("losses = loss(", "losses = dpo_loss(")),
        "sum over pairs": _dpo(("losses.mean(), rate", "losses.sum(), rate")),
        "prompt tokens count": _with_logprobs(
            train_dpo, (WHOLE, "next_token_logprobs(logits, tokens), tokens[:, 1:] != 0")
        ),
        "padding counts": _with_logprobs(
            train_dpo, (WHOLE, "next_token_logprobs(logits, tokens), mask[:, 1:] | (tokens[:, 1:] == 0)")
        ),
        "the end does not count": _with_logprobs(
            train_dpo, (WHOLE, "next_token_logprobs(logits, tokens), mask[:, 1:] & (tokens[:, 1:] != 1)")
        ),
        "shifted by one": _with_logprobs(train_dpo, (WHOLE, "next_token_logprobs(logits, tokens), mask[:, :-1]")),
        "mean per token": _with_logprobs(
            train_dpo, ("return sequence_logprobs", "return 1 / mask.sum(1) * sequence_logprobs")
        ),
        "width of the chosen": _with(
            train_dpo, _joined_pairs=edited(_joined_pairs, (LONGER, "(tokens != pad_id).sum(1).chunk(2)[0]"))
        ),
        "sides joined in the other order": _with(
            train_dpo, _joined_pairs=edited(_joined_pairs, ("[chosen, rejected]", "[rejected, chosen]"))
        ),
        "dropout": _dpo(("    policy.eval()\n", "    policy.train()\n")),
        "dropout of the reference": _dpo(("    ref.eval()\n", "")),
        "left as it came": _dpo(("    policy.eval()\n", "")),
        "the seed does not matter": _dpo(("batch_size, seed, step)", "batch_size, 0, step)")),
        "the seed is not in the recipe": _dpo(('"seed": seed', '"seed": 0')),
        "beta is not in the recipe": _dpo(('"beta": beta', '"beta": 0')),
        "the loss is not in the recipe": _dpo(('getattr(loss, "__name__", type(loss).__name__)', '"loss"')),
        "not clipped, not in the recipe": _dpo(('"max_grad_norm": max_grad_norm', '"max_grad_norm": 0')),
        "constant learning rate": _dpo(("cosine_lr(step, steps, lr, warmup)", "lr")),
        "rows not compared": _with(train_dpo, _require_rows=lambda prompts, chosen, rejected: None),
        "its own reference accepted": _dpo(("if ref is policy:", "if False:")),
        "rewards without the reference": _dpo(
            ("implicit_rewards(logprobs, ref_logprobs", "implicit_rewards(logprobs, 0 * ref_logprobs")
        ),
        "a tie is right": _dpo(("(margins > 0)", "(margins > -9)")),
        "margins of probabilities": _dpo(
            ("margins = rewards_chosen - rewards_rejected", "margins = (chosen_logprobs - rejected_logprobs).detach()")
        ),
        "metrics swapped": _dpo(('"logps/chosen": chosen_logprobs', '"logps/chosen": rejected_logprobs')),
        "metrics after the loss is scaled": _dpo(('means = {"loss": losses', 'means = {"loss": beta * losses')),
        "history not told": _dpo(("on_step(step, run.history[-1])", "on_step(step, {})")),
        "the reference is trained": _dpo(
            (
                "decayed(policy.named_parameters(), weight_decay)",
                "decayed([*policy.named_parameters(), *ref.named_parameters()], weight_decay)",
            ),
            ("_in_pieces(ref, both, mask, at_once)", "_sequence_logprobs(ref, both, mask)"),
            ("losses = loss(", "losses = (lambda c, r, p, q, b: torch.nn.functional.softplus(-b * (c - r - p + q)))("),
        ),
    },
    "pair_logprobs": {
        "rejected first": lambda *a: pair_logprobs(*a)[::-1],
        "per token": _with_logprobs(
            pair_logprobs, ("return sequence_logprobs", "return 1 / mask.sum(1) * sequence_logprobs")
        ),
        "prompt tokens count": _with_logprobs(
            pair_logprobs, (WHOLE, "next_token_logprobs(logits, tokens), tokens[:, 1:] != 0")
        ),
        "padding counts": _with_logprobs(
            pair_logprobs, (WHOLE, "next_token_logprobs(logits, tokens), mask[:, 1:] | (tokens[:, 1:] == 0)")
        ),
        "the end does not count": _with_logprobs(
            pair_logprobs, (WHOLE, "next_token_logprobs(logits, tokens), mask[:, 1:] & (tokens[:, 1:] != 1)")
        ),
        "in half precision": _with_logprobs(pair_logprobs, ("logits.float() if", "logits if")),
        "first piece again": lambda m, p, c, r, n=256: tuple(
            x.repeat(len(p))[: len(p)] for x in pair_logprobs(m, p[:n], c[:n], r[:n], n)
        ),
        "with gradient": _with(pair_logprobs, FREE, _in_pieces=edited(_in_pieces, FREE)),
        "rows not compared": _with(pair_logprobs, _require_rows=lambda prompts, chosen, rejected: None),
        "chosen twice": lambda m, p, c, r, n=256: (
            pair_logprobs(m, p, c, c, n) if len(r) == len(p) else pair_logprobs(m, p, c, r)
        ),
    },
    "score_responses": {
        "at the end of the row": edited(
            score_responses, ("model.scores(part.to(device_of(model)))", "model.values(part)[:, -1]")
        ),
        "mean over tokens": edited(
            score_responses, ("model.scores(part.to(device_of(model)))", "model.values(part).mean(1)")
        ),
        "without the prompt": lambda m, p, y, n=256: score_responses(m, p[:, -1:], y, n),
        "first batch only": lambda m, p, y, n=256: score_responses(m, p[:n], y[:n], n).repeat(len(p))[: len(p)],
        "with gradient": edited(score_responses, ("@torch.no_grad()\n", "")),
    },
    "muon_and_adamw": {
        "muon for the embeddings": edited(
            muon_and_adamw,
            (
                'hidden = [p for name, p in named if name.startswith("blocks") and p.ndim == 2]',
                "hidden = [p for name, p in named if p.ndim == 2]",
            ),
        ),
        "vectors of the blocks are lost": edited(
            muon_and_adamw, ('if not (name.startswith("blocks") and p.ndim == 2)]', 'if not name.startswith("blocks")]')
        ),
        "one rate for both": edited(muon_and_adamw, ("3.0", "1.0")),
        "no decay": lambda model, weight_decay: muon_and_adamw(model, 0.0),
        "the default memory": edited(muon_and_adamw, ("betas=BETAS", "betas=(0.9, 0.999)")),
    },
}
EXEMPT = set()
