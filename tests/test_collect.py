"""Collecting comparisons: prompts of the grammar, two different reviews each, from the policy that was asked."""

import collections
import copy
import functools
import itertools
import math
from pathlib import Path

import torch

from planting import close, edited, raises
from rlhfkit import collect
from rlhfkit.advantages import leave_one_out_baseline
from rlhfkit.collect import ReviewTask, draw_comparisons, draw_prompts, sample_reviews
from rlhfkit.models import GPT, ScalarModel
from rlhfkit.ppo import PPOConfig
from rlhfkit.reviews import gold_scores, review_grammar
from rlhfkit.sampling import sample
from rlhfkit.train_policy import train_ppo, train_reinforce
from rlhfkit.train_preference import score_responses


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def texts(rows):
    return [review_grammar().tokenizer.decode(row) for row in rows]


class Scripted:
    """A policy with a few reviews only: the first word chooses among them, then the text goes on to its end."""

    pad_id = 0

    def __init__(self, reviews, p):
        tokenizer = review_grammar().tokenizer
        self.rows, self.p, self.vocab_size = [tokenizer.encode(r, eos=True) for r in reviews], p, tokenizer.vocab_size
        self.colon, self.seen = tokenizer.index[":"], []

    def logits(self, tokens):
        p = torch.full((*tokens.shape, self.vocab_size), 1e-30)
        for b, row in enumerate(tokens.tolist()):
            said = row[row.index(self.colon) + 1 :] if self.colon in row else []
            if not said:
                self.seen.append(row)
            for review, chance in zip(self.rows, self.p, strict=True):
                if review[: len(said)] == said and len(said) < len(review):
                    p[b, -1, review[len(said)]] += chance
        return p.log()


SHORT = ["the plot was good .", "what a joy .", "overall i loved it ."]


def test_prompts_are_those_of_the_grammar(draw_prompts=draw_prompts):
    """Each domain and each length in half of them, within five standard errors."""
    prompts = draw_prompts(2000, seeded())
    found = texts(prompts)
    assert len(prompts) == 2000 and (prompts[:, -1] != 0).all()
    assert all(
        review_grammar().accepts(f"{p} the {'plot' if film(p) else 'price'} was good . what a joy .") for p in found
    )
    for half in (sum(map(film, found)), sum(len(p.split()) == 6 for p in found)):
        assert abs(half - 1000) < 5 * math.sqrt(500)
    assert draw_prompts(50, seeded(1)).equal(draw_prompts(50, seeded(1)))
    assert texts(draw_prompts(50, seeded(1))) != texts(draw_prompts(50, seeded(2)))
    raises(ValueError, lambda: draw_prompts(0, seeded()), "count", "0")


@functools.cache
def film(prompt):
    return review_grammar().accepts(f"{prompt} the plot was good . what a joy .")


def test_reviews_of_the_grammar_are_all_whole_and_likely_as_it_says(sample_reviews=sample_reviews):
    grammar = review_grammar()
    prompts = draw_prompts(40, seeded())
    rollout = sample_reviews(grammar, prompts, seeded(1))
    for prompt, tokens, mask in zip(texts(prompts), rollout.tokens, rollout.response_mask, strict=True):
        assert tokens[mask][-1] == 1 and (tokens[~mask] == 0).all()
        assert grammar.accepts(f"{prompt} {grammar.tokenizer.decode(tokens)}")
    sequence = torch.cat([prompts, rollout.tokens], 1)
    exact = grammar.logits(sequence)[:, prompts.shape[1] - 1 : -1].gather(2, rollout.tokens[..., None])[..., 0]
    close(rollout.logprobs, torch.where(rollout.response_mask, exact, 0.0))
    assert len({*texts(rollout.tokens)}) > 35


def test_reviews_stop_at_their_length_and_at_their_end(sample_reviews=sample_reviews):
    prompts = draw_prompts(8, seeded())
    cut = sample_reviews(review_grammar(), prompts, seeded(), max_length=3)
    assert cut.tokens.shape == (8, 3) and cut.response_mask.all() and (cut.tokens != 1).all()
    assert sample_reviews(Scripted(SHORT, [1, 0, 0]), prompts, seeded()).response_mask.sum(1).tolist() == [6] * 8
    again = [sample_reviews(review_grammar(), prompts, seeded(3), max_length=20).tokens for _ in range(2)]
    assert again[0].equal(again[1])
    whole = sample_reviews(review_grammar(), prompts, seeded())
    assert whole.tokens.shape == (8, collect.MAX_LENGTH)


def test_the_temperature_is_that_of_the_samples(sample_reviews=sample_reviews):
    """Two openings with odds of 9 to 1: at temperature 2, 3 to 1; the model's log-probabilities stay its own."""
    prompts = draw_prompts(1, seeded()).expand(2000, -1)
    policy = Scripted(["good .", "bad ."], [0.9, 0.1])
    for temperature, p in ((1.0, 0.9), (2.0, 0.75)):
        rollout = sample_reviews(policy, prompts, seeded(), temperature, 1)
        share = (rollout.tokens[:, 0] == policy.rows[0][0]).double().mean().item()
        assert abs(share - p) < 5 * math.sqrt(p * (1 - p) / 2000)
        assert set(rollout.logprobs.exp().flatten().mul(10).round().tolist()) == {9, 1}


def test_no_comparison_is_refused(draw_comparisons=draw_comparisons):
    for count in (0, -1):
        raises(ValueError, lambda c=count: draw_comparisons(review_grammar(), c, seeded()), "count", str(count))


def test_comparisons_are_two_different_reviews_of_one_prompt(draw_comparisons=draw_comparisons):
    found = draw_comparisons(review_grammar(), 60, seeded())
    assert len(found) == 60 and len({c.prompt for c in found}) > 30
    assert all(review_grammar().accepts(f"{c.prompt} {text}") for c in found for text in (c.first, c.second))
    assert all(c.first != c.second for c in found)
    again, other = (draw_comparisons(review_grammar(), 60, seeded(s)) for s in (0, 1))
    assert again == found != other


def test_equal_reviews_are_drawn_again_and_both_orders_are_equally_likely(draw_comparisons=draw_comparisons):
    """Three reviews with chances p, at temperature 2 as sqrt(p): ordered pairs come as p q / (1 - sum of squares)."""
    for temperature, p in ((1.0, (0.8, 0.15, 0.05)), (2.0, (0.64, 0.32, 0.04))):
        found = draw_comparisons(Scripted(SHORT, p), 300, seeded(), temperature)
        assert len(found) == 300
        counts = collections.Counter((c.first, c.second) for c in found)
        roots = [x ** (1 / temperature) for x in p]
        chances = {text: x / sum(roots) for text, x in zip(SHORT, roots, strict=True)}
        total = 1 - sum(x * x for x in chances.values())
        for a, b in itertools.product(SHORT, repeat=2):
            x = chances[a] * chances[b] / total if a != b else 0.0
            assert abs(counts[a, b] - 300 * x) <= 4.5 * math.sqrt(300 * x * (1 - x)), (temperature, a, b)


# --- the reviews as a task -----------------------------------------------------------------------------------------

DATA = Path(__file__).parent.parent / "chapters" / "data"


def half_price(rollout):
    return rollout.response_mask.sum(1) / 2


def test_a_review_task_draws_prompts_of_the_grammar_and_asks_the_judge(ReviewTask=ReviewTask):
    grammar = review_grammar()
    task = ReviewTask(grammar, half_price, 0.1, 30, 20)
    assert (task.beta, task.num_prompts, task.max_length, task.eos_id) == (0.1, 30, 20, grammar.eos_id)
    assert task.reference() is grammar and task.reference() is task.reference()
    generator, before = seeded(), torch.get_rng_state()
    prompts = [task.draw_prompts(generator) for _ in range(2)]
    assert [len(p) for p in prompts] == [30, 30] and texts(prompts[0]) != texts(prompts[1])
    assert all((p[:, -1] != 0).all() and grammar.accepts(f"{texts(p)[0]} {written(p)}") for p in prompts)
    assert task.draw_prompts(seeded()).equal(prompts[0]) and before.equal(torch.get_rng_state())
    rollout = sample(grammar, prompts[0], task.max_length, generator=generator, eos_id=task.eos_id)
    assert task.score(rollout).equal(rollout.response_mask.sum(1) / 2)
    assert ReviewTask(grammar, half_price, 0.0).max_length == collect.MAX_LENGTH


def written(prompts):
    """A review of the kind that the first prompt asks for."""
    return f"the {'plot' if film(texts(prompts)[0]) else 'price'} was good . what a joy ."


def test_a_review_task_refuses_what_is_out_of_range(ReviewTask=ReviewTask):
    for changes in ({"beta": -0.1}, {"beta": math.nan}, {"num_prompts": 0}, {"max_length": 0}):
        settings = {"ref": review_grammar(), "judge": half_price, "beta": 0.1} | changes
        (name, bad), *_ = changes.items()
        raises(ValueError, lambda s=settings: ReviewTask(**s), name, str(bad))


def test_prompts_and_scores_go_where_the_reference_and_the_rollout_are(ReviewTask=ReviewTask):
    class Elsewhere(torch.nn.Linear):
        """A policy on another device."""

    task = ReviewTask(Elsewhere(1, 1, device="meta"), lambda rollout: torch.ones(3, dtype=torch.float64), 0.1, 3)
    assert task.draw_prompts(seeded()).device.type == "meta"
    rollout = sample(review_grammar(), draw_prompts(3, seeded()), 4, generator=seeded())
    elsewhere = type(rollout)(*(x.to("meta") for x in vars(rollout).values()))
    assert task.score(elsewhere).device.type == "meta" and task.score(rollout).device.type == "cpu"


@functools.cache
def committed():
    """The SFT model, the reward model, and prompts to judge a policy by."""
    sft, reward = GPT.load(DATA / "reviews_sft.safetensors"), ScalarModel.load(DATA / "reviews_reward.safetensors")
    return sft.eval(), reward.eval(), draw_prompts(60, seeded(9))


def proxy(rollout):
    return score_responses(committed()[1], rollout.prompts, rollout.tokens)


def judged(policy, judge):
    """Mean score of reviews to the held-out prompts, the same random numbers for every policy."""
    return judge(sample_reviews(policy, committed()[2], seeded(1))).mean().item()


def test_a_few_steps_of_ppo_and_of_reinforce_please_either_judge(ReviewTask=ReviewTask):
    """From the committed models: gold score by half a point, proxy by one. The reference stays as it was."""
    sft = committed()[0]
    before = copy.deepcopy(sft.state_dict())
    config = PPOConfig(lr=1e-3, num_ppo_epochs=2, num_mini_batches=2, cliprange_value=None)
    for judge, rise in ((gold_scores, 0.5), (proxy, 1.0)):
        policy = copy.deepcopy(sft)
        task = ReviewTask(sft, judge, 0.05, 16)
        settings = {"steps": 4, "group_size": 4, "config": config, "generator": seeded()}
        history = train_ppo(policy, ScalarModel(policy, 0.0), task, **settings)
        assert judged(policy, judge) > judged(sft, judge) + rise
        assert abs(history[0]["objective/kl"]) < 1e-3 < history[-1]["objective/kl"]
        assert abs(history[0]["val/ratio"] - 1) < 0.2 and history[0]["val/num_eos_tokens"] > 0.9
    policy = copy.deepcopy(sft)
    settings = {"steps": 4, "group_size": 4, "lr": 1e-3, "baseline": leave_one_out_baseline}
    train_reinforce(policy, ReviewTask(sft, gold_scores, 0.05, 16), generator=seeded(), **settings)
    assert judged(policy, gold_scores) > judged(sft, gold_scores) + 0.25
    assert all(x.equal(before[name]) for name, x in sft.state_dict().items())


def _task(*changes):
    return edited(ReviewTask, *changes)


def _draw(*changes):
    return edited(draw_comparisons, *changes)


def _sample(*changes):
    return edited(sample_reviews, *changes)


PLANTED = {
    "draw_prompts": {
        "the same prompt": lambda count, generator: draw_prompts(1, generator).expand(count, -1),
        "reviews": edited(draw_prompts, ("[0]", "[1]")),
        "global generator": edited(draw_prompts, ("generator)[0]", "torch.default_generator)[0]")),
        "padded on the right": lambda count, generator: draw_prompts(count, generator).sort(
            descending=True, stable=True
        )[0],
        "films only": lambda count, generator: draw_prompts(4 * count, generator)[
            [i for i, p in enumerate(texts(draw_prompts(4 * count, torch.Generator().manual_seed(0)))) if film(p)][
                :count
            ]
        ],
    },
    "ReviewTask": {
        "the same prompts every step": _task(
            (
                "draw_prompts(self.num_prompts, generator).to",
                "draw_prompts(self.num_prompts, torch.Generator().manual_seed(0)).to",
            )
        ),
        "global generator": _task(
            (
                "draw_prompts(self.num_prompts, generator).to",
                "draw_prompts(self.num_prompts, torch.default_generator).to",
            )
        ),
        "another number of prompts": _task(
            ("draw_prompts(self.num_prompts, generator).to", "draw_prompts(64, generator).to")
        ),
        "prompts stay on the processor": _task(
            ("self.num_prompts, generator).to(device_of(self.ref))", "self.num_prompts, generator)")
        ),
        "scores stay where the judge is": _task(
            ("self.judge(rollout).to(rollout.tokens.device)", "self.judge(rollout)")
        ),
        "the opposite score": _task(("self.judge(rollout).to", "-self.judge(rollout).to")),
        "no end token": _task(("return review_grammar().eos_id", "return None")),
        "negative beta allowed": _task(('require_in("beta", self.beta, 0.0)', "pass")),
        "no prompt allowed": _task(("self.num_prompts, 1)", "self.num_prompts, 0)")),
        "length not checked": _task(('require_in("max_length", self.max_length, 1)', "pass")),
        "another reference every time": _task(("return self.ref", "import copy; return copy.copy(self.ref)")),
    },
    "sample_reviews": {
        "never ends": _sample(("eos_id=eos_id, temp", "eos_id=None, temp")),
        "temperature forgotten": _sample((", temperature=temperature", "")),
        "length forgotten": _sample(("prompts, max_length,", "prompts, MAX_LENGTH,")),
        "greedy": _sample(("temperature=temperature", "temperature=temperature, top_k=1")),
        "global generator": _sample(("generator=generator, eos", "generator=torch.default_generator, eos")),
        "truncated": _sample(("temperature=temperature", "temperature=temperature, top_p=0.9")),
    },
    "draw_comparisons": {
        "identical reviews pass": _draw(
            (
                "Comparison(prompt, one, other) for (prompt, one), (_, other) in drawn if one != other",
                "type('C', (), dict(prompt=prompt, first=one, second=other)) for (prompt, one), (_, other) in drawn",
            )
        ),
        "two prompts": _draw(("repeat_interleave(2, dim=0)", "repeat(2, 1)")),
        "sorted": _draw(("Comparison(prompt, one, other)", "Comparison(prompt, *sorted((one, other)))")),
        "more than asked for": _draw(("return comparisons[:count]", "return comparisons")),
        "fewer than asked for": _draw(("while len(comparisons) < count:", "for _ in (1,):")),
        "temperature forgotten": _draw(("prompts, generator, temperature)", "prompts, generator)")),
        "global generator": _draw(
            ("sample_reviews(policy, prompts, generator,", "sample_reviews(policy, prompts, torch.default_generator,")
        ),
        "one prompt for all": _draw(
            ("draw_prompts(min(256, count), generator)", "draw_prompts(1, generator).expand(256, -1)")
        ),
        "count not checked": _draw(("if count < 1:", "if False:")),
    },
}
EXEMPT = set()
