"""Bad input: a ValueError that names the argument, what came and what was expected; data pass through unhidden."""

import dataclasses

import pytest
import torch

from planting import f64, normal, raises
from rlhfkit import (
    advantages,
    collect,
    exact,
    kl,
    logprobs,
    masked,
    policy_losses,
    ppo,
    preference_losses,
    reference_free_losses,
    sampling,
    tasks,
)
from rlhfkit.models import TabularPolicy, TabularValue
from rlhfkit.ppo import Experience, PPOConfig, Prediction

NAN, INF = float("nan"), float("inf")
X, Y, V = normal(2, 3), normal(2, 3, seed=1), normal(2)
WIDE, ROW, COLUMN = normal(2, 4), normal(1, 3), normal(2, 1)  # the last two would broadcast
MASK = torch.tensor([[True, True, False], [True, False, True]])
EMPTY, INTEGERS = torch.zeros(2, 3, dtype=torch.bool), torch.zeros(2, 3, dtype=torch.long)
LOGITS, TOKENS = normal(2, 3, 5), torch.zeros(2, 3, dtype=torch.long)
PAIR = (V, V, V, V)
LIKED, LENGTHS = torch.tensor([True, False]), torch.tensor([1, 2])
UNPAIRED = (V, V, LENGTHS, LENGTHS)
GAE = {"gamma": 0.9, "lam": 0.9}

CASES = []  # (function, arguments, keywords, words the message must hold)


def case(function, *arguments, words, **keywords):
    CASES.append((function, arguments, keywords, words))


MASKED = {  # takes (x, mask): the mask's name and the function
    "masked_sum": (masked.masked_sum, "mask"),
    "masked_mean": (masked.masked_mean, "mask"),
    "masked_var": (masked.masked_var, "mask"),
    "whiten": (masked.whiten, "mask"),
    "token-mean": (lambda x, mask: masked.aggregate(x, mask, "token-mean"), "mask"),
    "sequence-mean": (lambda x, mask: masked.aggregate(x, mask, "sequence-mean"), "mask"),
    "sequence-sum": (lambda x, mask: masked.aggregate(x, mask, "sequence-sum"), "mask"),
    "sequence_logprobs": (logprobs.sequence_logprobs, "mask"),
    "sequence_kl": (lambda x, mask: kl.sequence_kl(x, X, mask), "response_mask"),
    "kl_shaped_rewards": (lambda x, mask: kl.kl_shaped_rewards(V, x, X, mask, 0.1), "response_mask"),
    "kl_reward_to_go_loss": (lambda x, mask: kl.kl_reward_to_go_loss(x, X, mask), "response_mask"),
    "full_vocabulary_kl": (lambda x, mask: kl.full_vocabulary_kl(LOGITS, LOGITS, mask), "response_mask"),
    "rewards_to_go": (lambda x, mask: advantages.rewards_to_go(x, mask), "mask"),
    "gae": (lambda x, mask: advantages.gae(x, X, mask=mask, **GAE), "mask"),
    "gae, dones": (lambda x, mask: advantages.gae(x, X, dones=mask, **GAE), "dones"),
}
for function, name in MASKED.values():
    case(function, X, MASK.float(), words=(name, "torch.float32", "torch.bool"))
    case(function, X, MASK.long(), words=(name, "torch.int64", "torch.bool"))
    case(function, X, MASK[:1], words=(name, "(1, 3)", "(2, 3)"))
    case(function, X, MASK[:, :1], words=(name, "(2, 1)", "(2, 3)"))
    case(function, X, MASK.tolist(), words=(name, "list", "Tensor"))
for name in ("masked_mean", "masked_var", "whiten", "token-mean", "sequence-mean", "sequence-sum", "kl_shaped_rewards"):
    case(
        MASKED[name][0],
        X,
        EMPTY,
        words=(MASKED[name][1], "False" if "var" not in name and name != "whiten" else "True"),
    )
for name in ("masked_sum", "masked_mean", "masked_var", "whiten"):
    case(MASKED[name][0], INTEGERS, MASK, words=("x", "torch.int64", "floating"))
case(masked.aggregate, INTEGERS, MASK, "token-mean", words=("losses", "torch.int64"))
case(masked.aggregate, V, MASK, "token-mean", words=("losses", "(2,)", "(B, T)"))
case(masked.aggregate, X, MASK, "mean", words=("how", "'mean'", "sequence-sum"))
case(logprobs.sequence_logprobs, INTEGERS, MASK, words=("logprobs", "torch.int64"))
case(logprobs.sequence_logprobs, V, MASK[0, :2], words=("logprobs", "(2,)", "(B, T)"))

for function in (logprobs.token_logprobs, logprobs.token_logprobs_and_entropy, logprobs.next_token_logprobs):
    case(function, LOGITS, TOKENS[:, :2], words=("tokens", "(2, 2)", "(2, 3)"))
    case(function, LOGITS, TOKENS[:1], words=("tokens", "(1, 3)", "(2, 3)"))
    case(function, LOGITS, TOKENS.double(), words=("tokens", "torch.float64", "integers"))
    case(function, LOGITS, TOKENS.bool(), words=("tokens", "torch.bool", "integers"))
    case(function, LOGITS, TOKENS + 5, words=("tokens", "[5, 5]", "[0, 4]"))
    case(
        function,
        LOGITS[0],
        TOKENS,
        words=("logits", "(3, 5)", "(B, T, V)" if "next" not in function.__name__ else "(B, L, V)"),
    )
    case(function, LOGITS.long(), TOKENS, words=("logits", "torch.int64", "floating"))
for function in (logprobs.log_softmax, logprobs.entropy):
    case(function, LOGITS.long(), words=("logits", "torch.int64"))
    case(function, f64(0.0), words=("logits", "scalar"))

TWO = {
    kl.kl_k1: ("logprobs", "ref_logprobs"),
    kl.kl_k2: ("logprobs", "ref_logprobs"),
    kl.kl_k3: ("logprobs", "ref_logprobs"),
    kl.categorical_kl: ("logits", "ref_logits"),
    kl.straight_through: ("value", "surrogate"),
    policy_losses.reinforce_loss: ("logprobs", "advantages"),
    policy_losses.approx_kl: ("logprobs", "old_logprobs"),
    preference_losses.bradley_terry_loss: ("chosen_scores", "rejected_scores"),
}
for function, names in TWO.items():
    for other in (WIDE, ROW, COLUMN):
        case(function, X, other, words=(*names, "(2, 3)", str(tuple(other.shape))))
        case(function, other, X, words=(*names, "(2, 3)", str(tuple(other.shape))))
    case(function, X, 0.5, words=(names[1], "float", "Tensor"))
case(preference_losses.bradley_terry_loss, X, Y, COLUMN, words=("margin", "(2, 1)", "(2, 3)"))
case(preference_losses.bradley_terry_loss, X, Y, 0.5, words=("margin", "float", "Tensor"))

for other in (WIDE, ROW, COLUMN):
    shape = str(tuple(other.shape))
    for at, name in enumerate(("logprobs", "old_logprobs", "advantages")):
        wrong = [other if i == at else X for i in range(3)]
        case(policy_losses.clipped_policy_loss, *wrong, words=(name, shape, "(2, 3)"))
        case(policy_losses.clip_active, *wrong, 0.2, words=(name, shape, "(2, 3)"))
    for at, name in enumerate(("values", "old_values", "returns")):
        wrong = [other if i == at else X for i in range(3)]
        case(policy_losses.clipped_value_loss, *wrong, words=(name, shape, "(2, 3)"))
    case(policy_losses.clipfrac, X, other, 0.2, words=("old_logprobs", shape, "(2, 3)"))
    case(advantages.gae, X, other, words=("values", shape, "(2, 3)"), **GAE)
    case(kl.sequence_kl, X, other, MASK, words=("ref_logprobs", shape, "(2, 3)"))
    case(kl.kl_shaped_rewards, V, X, other, MASK, 0.1, words=("ref_logprobs", shape, "(2, 3)"))
    case(kl.kl_reward_to_go_loss, X, other, MASK, words=("ref_logprobs", shape, "(2, 3)"))
    for at, name in enumerate(("logprobs", "old_logprobs", "ref_logprobs")):
        wrong = [other if i == at else X for i in range(3)]
        case(kl.off_policy_k2, *wrong, words=(name, shape, "(2, 3)"))
        case(kl.off_policy_k3, *wrong, words=(name, shape, "(2, 3)"))
case(kl.kl_reward_to_go_loss, V, V, LIKED, words=("logprobs", "(2,)", "(B, T)"))
case(kl.full_vocabulary_kl, X, X, MASK, words=("logits", "(2, 3)", "(B, T, V)"))
case(kl.full_vocabulary_kl, LOGITS, LOGITS[:, :1], MASK, words=("ref_logits", "(2, 1, 5)", "(2, 3, 5)"))
case(kl.full_vocabulary_kl, LOGITS.long(), LOGITS.long(), MASK, words=("logits", "torch.int64", "floating"))
for scores in (X, normal(3), normal(1), f64(1.0)):
    case(kl.kl_shaped_rewards, scores, X, Y, MASK, 0.1, words=("scores", str(tuple(scores.shape)), "(2,)"))
for values in (X, normal(3), normal(1), f64(1.0)):
    case(advantages.gae, X, Y, words=("last_values", str(tuple(values.shape)), "(2,)"), last_values=values, **GAE)
case(advantages.gae, INTEGERS, INTEGERS, words=("rewards", "torch.int64"), **GAE)
case(advantages.gae, V, V, words=("rewards", "(2,)", "(B, T)"), **GAE)
case(advantages.rewards_to_go, V, words=("rewards", "(2,)", "(B, T)"))

for bad in (-0.1, NAN):
    got = str(bad)
    for cliprange in ("clipped_policy_loss", "clip_active"):
        case(getattr(policy_losses, cliprange), X, X, X, bad, words=("cliprange", got, "[0, inf)"))
    case(policy_losses.clipfrac, X, X, bad, words=("cliprange", got, "[0, inf)"))
    case(policy_losses.clipped_value_loss, X, X, X, bad, words=("cliprange_value", got, "[0, inf)"))
    case(kl.kl_shaped_rewards, V, X, Y, MASK, bad, words=("kl_coef", got, "[0, inf)"))
    case(advantages.group_normalized_advantages, X, bad, words=("eps", got, "[0, inf)"))
    case(preference_losses.implicit_rewards, V, V, bad, words=("beta", got))
    for name in ("dpo_loss", "ipo_loss", "hinge_dpo_loss"):
        case(getattr(preference_losses, name), *PAIR, bad, words=("beta", got))
    case(preference_losses.conservative_dpo_loss, *PAIR, bad, 0.1, words=("beta", got))
    case(preference_losses.kto_loss, V, V, LIKED, f64(0.0), bad, words=("beta", got, "[0, inf)"))
    for name in ("desirable_weight", "undesirable_weight"):
        case(preference_losses.kto_loss, V, V, LIKED, f64(0.0), 0.1, words=(name, got, "[0, inf)"), **{name: bad})
    case(preference_losses.simpo_loss, *UNPAIRED, bad, 0.1, words=("beta", got, "[0, inf)"))
    case(preference_losses.simpo_loss, *UNPAIRED, 2.0, bad, words=("margin", got, "[0, inf)"))
    case(preference_losses.orpo_loss, *UNPAIRED, bad, words=("beta", got, "[0, inf)"))
    case(exact.population_dpo_loss, X, X, X, bad, words=("beta", got, "positive"))
    case(exact.frontier, X, X, [1.0, bad], words=("beta", got, "positive"))
    case(exact.objective, X, X, X, bad, words=("beta", got, "[0, inf)"))
    for name in ("optimal_logprobs", "optimal_value"):
        case(getattr(exact, name), X, X, bad, words=("beta", got, "positive"))
    for at, name in enumerate(("init_kl_coef", "target", "horizon")):
        settings = [bad if i == at else 1.0 for i in range(3)]
        case(kl.AdaptiveKLController, *settings, words=(name, got, "(0, inf)"))
    case(lambda n: kl.AdaptiveKLController(1.0, 1.0, 1.0).update(1.0, n), bad, words=("n_steps", got))
    case(lambda beta: tasks.random_task(3, 2, 1, beta=beta), bad, words=("beta", got))
    case(lambda noise: tasks.random_task(3, 2, 1, noise=noise), bad, words=("noise", got))
for bad in (-0.1, 1.1, NAN):
    case(advantages.gae, X, Y, gamma=bad, lam=0.9, words=("gamma", str(bad), "[0, 1]"))
    case(advantages.gae, X, Y, gamma=0.9, lam=bad, words=("lam", str(bad), "[0, 1]"))
    case(advantages.rewards_to_go, X, MASK, bad, words=("gamma", str(bad), "[0, 1]"))
    case(preference_losses.conservative_dpo_loss, *PAIR, 0.1, bad, words=("label_smoothing", str(bad), "[0, 1]"))
for name in ("optimal_logprobs", "optimal_value"):
    case(getattr(exact, name), X, X, 0.0, words=("beta", "0.0", "positive"))
case(exact.population_dpo_loss, X, X, X, 0.0, words=("beta", "0.0", "positive"))
case(preference_losses.ipo_loss, *PAIR, 0.0, words=("beta", "0.0", "(0, inf)"))
case(lambda: kl.AdaptiveKLController(1.0, 1.0, 1.0).update(NAN, 1), words=("kl", "nan"))

for name in ("dpo_loss", "ipo_loss", "hinge_dpo_loss", "conservative_dpo_loss"):
    extra = (0.1, 0.1) if name.startswith("cons") else (0.1,)
    for at, argument in enumerate(
        ("chosen_logprobs", "rejected_logprobs", "ref_chosen_logprobs", "ref_rejected_logprobs")
    ):
        for other in (normal(3), normal(1), f64(0.0)):
            wrong = [other if i == at else V for i in range(4)]
            case(getattr(preference_losses, name), *wrong, *extra, words=(argument, str(tuple(other.shape)), "(2,)"))
case(preference_losses.implicit_rewards, V, normal(1), 0.1, words=("ref_logprobs", "(1,)", "(2,)"))

for name, extra in (("simpo_loss", (2.0, 0.5)), ("orpo_loss", (0.1,))):
    function = getattr(preference_losses, name)
    for other in (normal(3), normal(1), f64(0.0)):
        shape = str(tuple(other.shape))
        case(function, V, other, LENGTHS, LENGTHS, *extra, words=("rejected_logprobs", shape, "(2,)"))
        case(function, other, V, LENGTHS, LENGTHS, *extra, words=("chosen_logprobs", shape, "(2,)"))
        case(function, V, V, other, LENGTHS, *extra, words=("chosen_lengths", shape, "(2,)"))
        case(function, V, V, LENGTHS, other, *extra, words=("rejected_lengths", shape, "(2,)"))
    case(function, V, V, LENGTHS - 1, LENGTHS, *extra, words=("chosen_lengths", "0", "at least 1"))
    case(function, V, V, LENGTHS, LENGTHS - 1, *extra, words=("rejected_lengths", "0", "at least 1"))
    case(function, V, V, 3, LENGTHS, *extra, words=("chosen_lengths", "int", "one length per response"))
for other in (normal(3), normal(1), f64(0.0)):
    words = ("ref_logprobs", str(tuple(other.shape)), "(2,)")
    case(preference_losses.kto_loss, V, other, LIKED, f64(0.0), 0.1, words=words)
for labels, got in ((LIKED.long(), "torch.int64"), (LIKED[:1], "(1,)"), ([True, False], "list")):
    case(preference_losses.kto_loss, V, V, labels, f64(0.0), 0.1, words=("desirable", got))
for point, got in ((0.5, "float"), (V, "(2,)"), (f64([0.5]), "(1,)")):
    case(preference_losses.kto_loss, V, V, LIKED, point, 0.1, words=("kl_reference", got, "scalar"))

for function in (advantages.leave_one_out_baseline, advantages.group_normalized_advantages):
    case(function, COLUMN, words=("scores", "(2, 1)", "at least two"))
for function in (
    advantages.leave_one_out_baseline,
    advantages.group_normalized_advantages,
    advantages.group_mean_baseline,
):
    case(function, V, words=("scores", "(2,)", "(P, G)"))
    case(function, INTEGERS, words=("scores", "torch.int64", "floating"))

for other in (WIDE, ROW, COLUMN):
    shape = str(tuple(other.shape))
    case(exact.kl, X, other, words=("ref_logprobs", shape))
    case(exact.objective, X, X, other, 0.1, words=("scores", shape))
    case(exact.optimal_logprobs, X, other, 0.1, words=("scores", shape))
    case(exact.optimal_value, X, other, 0.1, words=("scores", shape))
    case(exact.best_of_n, X, other, 2, words=("scores", shape))
    case(exact.frontier, X, other, [1.0], words=("scores", shape))
    case(exact.frontier, X, X, [1.0], other, words=("gold_scores", shape))
    case(exact.population_dpo_loss, X, other, X, 0.1, words=("ref_logprobs", shape))
    case(exact.population_dpo_loss, X, X, other, 0.1, words=("scores", shape))
for n in (0, -3):
    case(exact.best_of_n, X, X, n, words=("n", str(n)))
case(exact.estimator_moments, V, normal(3, 2), words=("estimates", "(3, 2)", "(N, D)"))
case(exact.estimator_moments, X, X, words=("logprobs", "(2, 3)", "(N,)"))
case(exact.estimator_moments, V, V, words=("estimates", "(2,)", "(N, D)"))

POLICY, PROMPTS = TabularPolicy(5, 3), torch.zeros(2, 1, dtype=torch.long)
GENERATOR = torch.Generator().manual_seed(0)
case(sampling.sample, POLICY, PROMPTS[0], 3, generator=GENERATOR, words=("prompts", "(1,)", "(B, L0)"))
case(sampling.sample, POLICY, PROMPTS, 0, generator=GENERATOR, words=("max_length", "0"))
case(sampling.sample, POLICY, PROMPTS, 99, generator=GENERATOR, words=("max_length", "99"))
case(sampling.response_logprobs, POLICY, PROMPTS, TOKENS[:1], words=("tokens", "(1, 3)", "(B, T)"))
case(sampling.response_logprobs, POLICY, PROMPTS[:, 0], TOKENS, words=("prompts", "(2,)", "(B, L0)"))
case(sampling.response_logprobs, POLICY, PROMPTS, TOKENS + 5, words=("tokens", "[5, 5]", "[0, 4]"))


STEP = Prediction(X, X, X), Experience(X, X, X, X, MASK)
for name in ("logprobs", "values"):
    wrong = dataclasses.replace(STEP[0], **{name: COLUMN})
    case(ppo.ppo_loss, wrong, STEP[1], PPOConfig(), words=(name, "(2, 1)", "(2, 3)"))
case(ppo.ppo_loss, dataclasses.replace(STEP[0], entropies=COLUMN), STEP[1], PPOConfig(), words=("mask", "(2, 1)"))
for name in ("logprobs", "values", "advantages", "returns"):
    wrong = dataclasses.replace(STEP[1], **{name: ROW})
    config = PPOConfig(whiten_advantages="no")
    case(ppo.ppo_loss, STEP[0], wrong, config, words=(name, "(1, 3)", "(2, 3)"))
case(ppo.ppo_loss, STEP[0], dataclasses.replace(STEP[1], mask=MASK.long()), PPOConfig(), words=("mask", "torch.int64"))
case(PPOConfig, lam=1.5, words=("lam", "1.5", "[0, 1]"))
case(PPOConfig, lr=-1.0, words=("lr", "-1.0", "(0, inf)"))
case(PPOConfig, whiten_advantages="all", words=("whiten_advantages", "'all'", "minibatch"))
case(collect.ReviewTask, POLICY, len, -1.0, words=("beta", "-1.0", "[0, inf)"))
for function in (
    lambda x, y: sampling.logits_and_values(POLICY, TabularValue(POLICY), x, y),
    lambda x, y: sampling.response_values(TabularValue(POLICY), x, y),
):
    case(function, PROMPTS, TOKENS + 5, words=("tokens", "[5, 5]", "[0, 4]"))
    case(function, PROMPTS + 1, TOKENS, words=("tokens", "[1, 1]", "[0, 0]"))


@pytest.mark.parametrize(
    "at", range(len(CASES)), ids=lambda i: f"{getattr(CASES[i][0], '__name__', '?')}-{CASES[i][3][0]}-{i}"
)
def test_a_bad_argument_is_named_with_what_came_and_what_was_expected(at):
    function, arguments, keywords, words = CASES[at]
    raises(ValueError, lambda: function(*arguments, **keywords), *words)


def test_every_public_function_meets_a_bad_argument():
    modules = (advantages, exact, kl, logprobs, masked, policy_losses, preference_losses, reference_free_losses)
    public = {
        f for m in modules for f in vars(m).values() if callable(f) and getattr(f, "__module__", "") == m.__name__
    }
    tried = {case[0] for case in CASES}
    missing = {f.__name__ for f in public - tried if not f.__name__.startswith("_")}
    # test_exact.py has the second; a table of differences can be made of any scores
    assert missing <= {"Aggregation", "enumerate_responses", "preference_probabilities"}, missing


ELEMENTWISE = [
    kl.kl_k1, kl.kl_k2, kl.kl_k3, policy_losses.reinforce_loss, policy_losses.approx_kl,
    preference_losses.bradley_terry_loss,
    lambda p, q: policy_losses.clipped_policy_loss(p, q, 1 + 0 * p),
    lambda p, q: policy_losses.clipped_value_loss(p, q, p, 0.2),
    lambda p, q: preference_losses.dpo_loss(p, q, 0 * p, 0 * q, 0.1),
    lambda p, q: preference_losses.ipo_loss(p, q, 0 * p, 0 * q, 0.1),
    lambda p, q: preference_losses.hinge_dpo_loss(p, q, 0 * p, 0 * q, 0.1),
    lambda p, q: preference_losses.conservative_dpo_loss(p, q, 0 * p, 0 * q, 0.1, 0.1),
    lambda p, q: preference_losses.implicit_rewards(p, q, 0.1),
    lambda p, q: preference_losses.kto_loss(p, q, p < q, 0 * torch.ones((), dtype=p.dtype), 0.1),
    lambda p, q: preference_losses.simpo_loss(p, q, torch.full_like(p, 3), torch.full_like(q, 2), 2.0, 0.5),
    lambda p, q: preference_losses.orpo_loss(p, q, torch.full_like(p, 3), torch.full_like(q, 2), 0.1),
    kl.straight_through,
    lambda p, q: kl.off_policy_k2(p, q, 0 * p), lambda p, q: kl.off_policy_k2(p, 0 * p, q),
    lambda p, q: kl.off_policy_k3(p, q, 0 * p), lambda p, q: kl.off_policy_k3(p, 0 * p, q),
]  # fmt: skip


@pytest.mark.parametrize("function", ELEMENTWISE, ids=range(len(ELEMENTWISE)))
def test_elementwise_maths_passes_nan_through_in_its_place_only(function):
    for dtype in (torch.float32, torch.float64):
        a, b = torch.tensor([-1.0, NAN, -1.0, -2.0], dtype=dtype), torch.tensor([-1.5, -1.0, NAN, -1.0], dtype=dtype)
        got = function(a, b)
        assert got.isnan().tolist() == [False, True, True, False] and got.dtype == dtype


@pytest.mark.parametrize("function", ELEMENTWISE, ids=range(len(ELEMENTWISE)))
def test_elementwise_maths_does_not_depend_on_the_batch_it_stands_in(function):
    a, b = normal(4, 5) - 3, normal(4, 5, seed=1) - 3
    torch.testing.assert_close(function(a, b)[1:3, 2:], function(a[1:3, 2:], b[1:3, 2:]))
