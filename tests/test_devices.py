"""Everything takes the device of its inputs: nothing is made on the default device by accident."""

import pytest
import torch

from planting import masks, normal
from rlhfkit import advantages, exact, kl, logprobs, masked, policy_losses, preference_losses, sampling
from rlhfkit.models import TabularPolicy, TabularValue
from rlhfkit.ppo import Experience, PPOConfig, Prediction, ppo_epochs, ppo_loss
from rlhfkit.tasks import random_task
from rlhfkit.train_policy import train_ppo, train_reinforce


def calls():
    """Every function with inputs on the default device, as zero-argument calls that return tensors."""
    x, y, v, mask = normal(5, 5), normal(5, 5, seed=1), normal(5), masks()
    logits, tokens, four = normal(5, 5, 3), masks().long(), (v, v, v, v)
    task = random_task(3, 2, 2, eos_id=0).to(x.device)
    policy, generator = task.reference(), torch.Generator(x.device).manual_seed(0)
    prompts, value = task.prompts.repeat(3, 1), TabularValue(policy)
    old = Experience(y, x, y, x, mask)
    return {
        "masked_sum": lambda: masked.masked_sum(x, mask, 1),
        "masked_mean": lambda: masked.masked_mean(x, mask),
        "masked_var": lambda: masked.masked_var(x, mask),
        "whiten": lambda: masked.whiten(x),
        "aggregate": lambda: masked.aggregate(x, mask, "sequence-mean"),
        "token_logprobs": lambda: logprobs.token_logprobs(logits, tokens),
        "token_logprobs_and_entropy": lambda: torch.stack(logprobs.token_logprobs_and_entropy(logits, tokens)),
        "next_token_logprobs": lambda: logprobs.next_token_logprobs(logits, tokens),
        "sequence_logprobs": lambda: logprobs.sequence_logprobs(x, mask),
        "entropy": lambda: logprobs.entropy(logits),
        "kl_k1": lambda: kl.kl_k1(x, y),
        "kl_k2": lambda: kl.kl_k2(x, y),
        "kl_k3": lambda: kl.kl_k3(x, y),
        "categorical_kl": lambda: kl.categorical_kl(x, y),
        "sequence_kl": lambda: kl.sequence_kl(x, y, mask),
        "full_vocabulary_kl": lambda: kl.full_vocabulary_kl(logits, logits.flip(2), mask),
        "straight_through": lambda: kl.straight_through(x, y),
        "kl_reward_to_go_loss": lambda: kl.kl_reward_to_go_loss(x, y, mask),
        "off_policy_k2": lambda: kl.off_policy_k2(x, y, x),
        "off_policy_k3": lambda: kl.off_policy_k3(x, y, y),
        "kl_shaped_rewards": lambda: kl.kl_shaped_rewards(v, x, y, mask, 0.1),
        "rewards_to_go": lambda: advantages.rewards_to_go(x),
        "gae": lambda: torch.stack(advantages.gae(x, y, gamma=0.9, lam=0.9)),
        "group_mean_baseline": lambda: advantages.group_mean_baseline(x),
        "leave_one_out_baseline": lambda: advantages.leave_one_out_baseline(x),
        "group_normalized_advantages": lambda: advantages.group_normalized_advantages(x),
        "reinforce_loss": lambda: policy_losses.reinforce_loss(x, y),
        "clipped_policy_loss": lambda: policy_losses.clipped_policy_loss(x, y, x),
        "clipped_value_loss": lambda: policy_losses.clipped_value_loss(x, y, x, 0.2),
        "approx_kl": lambda: policy_losses.approx_kl(x, y),
        "clipfrac": lambda: policy_losses.clipfrac(x, y, 0.2),
        "clip_active": lambda: policy_losses.clip_active(x, y, x, 0.2),
        "bradley_terry_loss": lambda: preference_losses.bradley_terry_loss(v, v, v),
        "dpo_loss": lambda: preference_losses.dpo_loss(*four, 0.1),
        "ipo_loss": lambda: preference_losses.ipo_loss(*four, 0.1),
        "hinge_dpo_loss": lambda: preference_losses.hinge_dpo_loss(*four, 0.1),
        "conservative_dpo_loss": lambda: preference_losses.conservative_dpo_loss(*four, 0.1, 0.1),
        "implicit_rewards": lambda: preference_losses.implicit_rewards(v, v, 0.1),
        "kto_loss": lambda: preference_losses.kto_loss(v, v, mask[:, 0], v[0], 0.1),
        "simpo_loss": lambda: preference_losses.simpo_loss(v, v, mask.sum(1), mask.sum(1), 2.0, 0.5),
        "orpo_loss": lambda: preference_losses.orpo_loss(-v.abs(), -v.abs(), mask.sum(1), mask.sum(1), 0.1),
        "exact.kl": lambda: exact.kl(x, y),
        "objective": lambda: exact.objective(x, y, x, 0.1),
        "optimal_logprobs": lambda: exact.optimal_logprobs(x, y, 0.1),
        "optimal_value": lambda: exact.optimal_value(x, y, 0.1),
        "best_of_n": lambda: exact.best_of_n(x, y, 3),
        "frontier": lambda: torch.stack(exact.frontier(x, y, [0.5, 2.0], x)),
        "preference_probabilities": lambda: exact.preference_probabilities(x),
        "population_dpo_loss": lambda: exact.population_dpo_loss(x, y, x, 0.5),
        "estimator_moments": lambda: torch.stack(exact.estimator_moments(v, x[:, :1])[:1]),
        "policy.logits": lambda: policy.logits(prompts),
        "task.index": lambda: task.index(task.tokens),
        "task.prompts": lambda: task.prompts,
        "sample": lambda: sampling.sample(policy, prompts, 2, generator=generator, eos_id=0).logprobs,
        "all_logprobs": lambda: sampling.all_logprobs(policy, task),
        "value.values": lambda: value.values(prompts),
        "logits_and_values": lambda: torch.stack(
            [x.sum() for x in sampling.logits_and_values(policy, value, prompts, prompts.repeat(1, 2))]
        ),
        "response_values": lambda: sampling.response_values(value, prompts, prompts.repeat(1, 2)),
        "ppo_loss": lambda: ppo_loss(Prediction(x, y, x), old, PPOConfig(whiten_advantages="minibatch"))[0],
        "ppo_epochs": lambda: ppo_epochs(
            lambda rows: Prediction(x[rows], y[rows], x[rows]), old, PPOConfig(), torch.detach, generator
        )["loss/value_avg"],
        "trimmed": lambda: (
            sampling.sample(policy, prompts, 2, generator=generator, eos_id=0).trimmed().logprobs.sum() * 0
        ),
        "response_logprobs": lambda: sampling.response_logprobs(policy, prompts, prompts.repeat(1, 2)),
    }


NAMES = sorted(calls())


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_made_on_the_default_device(name):
    """With inputs on the CPU and "meta" as the default, a tensor made without a device breaks the computation."""
    call = calls()[name]
    with torch.device("meta"):
        result = call()
    assert result.device.type == "cpu"


def test_a_tensor_made_on_the_default_device_is_noticed():
    x = normal(3)
    with torch.device("meta"), pytest.raises(RuntimeError):
        (x + torch.arange(3)).sum().item()


@pytest.mark.parametrize(
    "name",
    [
        n
        for n in NAMES
        if n.startswith(("kl_k", "off", "straight", "reinforce", "clip", "approx", "dpo", "ipo", "hinge"))
    ],
)
def test_elementwise_maths_runs_without_reading_its_data(name):
    with torch.device("meta"):
        x = torch.empty(5, 5, dtype=torch.float64)
        mod = policy_losses if hasattr(policy_losses, name) else kl if hasattr(kl, name) else preference_losses
        arity = dict.fromkeys(
            ("clipped_policy_loss", "clipped_value_loss", "clip_active", "off_policy_k2", "off_policy_k3"), 3
        ).get(name, 2)
        arguments = [x] * (4 if mod is preference_losses else arity)
        extra = {"clipfrac": (0.2,), "clip_active": (0.2,)}.get(name, (0.1,) if mod is preference_losses else ())
        assert getattr(mod, name)(*arguments, *extra).device.type == "meta"


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_results_live_on_cuda_and_agree_with_the_cpu(name):
    expected = calls()[name]()
    with torch.device("cuda"):
        call = calls()[name]
    result = call()  # the default device is the CPU again
    assert result.device.type == "cuda"
    if name != "sample":  # another generator, other draws
        torch.testing.assert_close(result.cpu(), expected)


@pytest.mark.gpu
def test_reinforce_trains_on_cuda():
    task = random_task(3, 2, 2).to("cuda")
    policy, generator = task.reference(), torch.Generator("cuda").manual_seed(0)
    before = policy.table.detach().clone()
    train_reinforce(policy, task, steps=3, group_size=8, lr=0.1, generator=generator)
    assert policy.table.is_cuda and not policy.table.equal(before)
    assert TabularPolicy(3, 2).to("cuda").logits(torch.zeros(1, 1, dtype=torch.long, device="cuda")).is_cuda


@pytest.mark.gpu
def test_ppo_trains_on_cuda():
    task = random_task(3, 2, 2, eos_id=0).to("cuda")
    policy, generator = task.reference(), torch.Generator("cuda").manual_seed(0)
    value, before = TabularValue(policy), policy.table.detach().clone()
    history = train_ppo(policy, value, task, steps=3, group_size=8, generator=generator)
    assert value.table.is_cuda and not policy.table.equal(before) and (value.table != 0).any()
    assert [type(row["val/ratio"]) for row in history] == [float] * 3
