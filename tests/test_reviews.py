"""The judge by hand, the annotators against their own probabilities, and the way from tokens to texts and back."""

import itertools
import math

import torch

from planting import close, edited, f64, raises
from rlhfkit import lexicon
from rlhfkit.reviews import (
    Annotators,
    decode_responses,
    encode_pairs,
    gold_score,
    gold_scores,
    opinions,
    review_grammar,
)
from rlhfkit.tasks import Comparison, Pair, Rollout

FILM = "review of a silent comedy :"
# brilliant 2, good 1, nice 1, slow -1, awful -2; loved 2, recommend 1, hated -2, regret -1
BY_HAND = [
    ("the plot was good . what a joy .", [1, 2]),
    ("the plot was not good . overall i hated it .", [-1, -2]),
    ("the plot was very good . five stars from me .", [1.5]),
    ("the plot was not very good . one star from me .", [-1.5]),
    ("the plot was brilliant , but the cast was not nice . it has two sides .", [2, -1]),
    ("the plot was not awful , and the cast was extremely brilliant . overall i loved it .", [2, 3, 2]),
    ("the plot was slow . the cast was not slow . i have mixed feelings about it .", [-1, 1]),
    ("the plot was bad . i would not recommend it to anyone .", [-1, -1]),
    ("the plot was good . i would recommend it to anyone .", [1, 1]),
    ("the plot was awful . i regret the whole thing .", [-2, -1]),
    ("the plot was good . i would gladly do it again .", [1, 1]),
    ("i saw it last week . the plot was good . five stars from me .", [1]),
]


def test_opinions_by_hand(opinions=opinions):
    for review, expected in BY_HAND:
        assert opinions(review) == expected, review


def test_not_reaches_over_one_intensifier_and_no_further(opinions=opinions):
    """In texts of every kind, broken ones too."""
    for text, expected in [
        ("not good", [-1]),
        ("not very good", [-1.5]),
        ("very not good", [-1]),
        ("not very really good", [1.5]),
        ("not plot good", [1]),
        ("not good good", [-1, 1]),
        ("good not", [1]),
        ("not not good", [-1]),
        ("not , good", [1]),
        ("very , good", [1]),
        ("very very good", [1.5]),
        ("not awful , and not loved", [2, -2]),
        ("not very", []),
        ("", []),
        ("not", []),
        ("good", [1]),
        ("quite hated", [-3]),
    ]:
        assert opinions(text) == expected, text


def test_every_opinion_word_has_its_valence_anywhere(opinions=opinions):
    """All 80 of them, alone, negated, intensified and both: v, -v, 1.5 v, -1.5 v."""
    words = {}
    for valence, groups in lexicon.ADJECTIVES.items():
        words |= dict.fromkeys(" ".join(groups.values()).split(), valence)
    words |= lexicon.CLOSING_VALENCE
    assert len(words) == 80
    for word, valence in words.items():
        assert opinions(f"the plot was {word} .") == [valence]
        assert opinions(f"the plot was not {word} .") == [-valence]
        for intensifier in lexicon.INTENSIFIERS.split():
            assert opinions(f"{intensifier} {word}") == [1.5 * valence]
            assert opinions(f"not {intensifier} {word}") == [-1.5 * valence]


def test_gold_score_is_the_mean_and_a_longer_review_is_worth_no_more(gold_score=gold_score):
    for review, valences in BY_HAND:
        words = [w for w in review.split() if w in {"slow"}]
        repeated = max(len(words) - 1, 0)
        assert math.isclose(gold_score(FILM, review), sum(valences) / len(valences) - 0.5 * repeated), review
    one = "the plot was good . what a joy ."
    same = "the plot was good . the cast was perfect . the title was nice . what a joy ."
    assert gold_score(FILM, one) == gold_score(FILM, same) == 1.5


def test_every_repetition_of_an_opinion_word_costs_half_a_point(gold_score=gold_score):
    """Negated or not; other words may come again as often as they like."""
    for review, expected in [
        ("the plot was good , and the plot was nice . what a joy .", (1 + 1 + 2) / 3),
        ("the plot was good , and the plot was good . what a joy .", (1 + 1 + 2) / 3 - 0.5),
        ("the plot was good , but the cast was not good . it has two sides .", 0 - 0.5),
        (
            "the plot was good , and the cast was very good . the title was not bad . the tone was good . what a joy .",
            (1 + 1.5 + 1 + 1 + 2) / 5 - 2 * 0.5,
        ),
    ]:
        assert math.isclose(gold_score(FILM, review), expected), review


def test_broken_language_costs_two_points(gold_score=gold_score):
    for review, tone in [
        ("the plot was good . what a joy", 1.5),
        ("the plot was good . what a waste .", -0.5),
        ("good", 1.0),
        ("the plot was sturdy . what a joy .", 1.5),  # a word of products
        ("the plot was zauberhaft . what a joy .", 2.0),
        ("the plot was", 0.0),
        ("", 0.0),
    ]:
        assert math.isclose(gold_score(FILM, review), tone - 2.0), review
    sturdy = "the warranty was sturdy . what a joy ."
    assert gold_score("review of a lamp :", sturdy) == 1.5 and gold_score("review of a comedy :", sturdy) == -0.5
    assert gold_score("review of a sturdy lamp :", sturdy) == -0.5 and gold_score("", sturdy) == -0.5
    assert gold_score(FILM, "good good good") == 1 - 1.0 - 2.0


def test_the_grammar_is_built_once():
    assert review_grammar() is review_grammar()
    assert gold_score(FILM, BY_HAND[0][0]) == 1.5


# --- rollouts ----------------------------------------------------------------------------------------------------


def rollout_of(prompts, reviews, ended):
    """Reviews as a policy would have sampled them: some ended, some cut off; junk after what counts."""
    tokenizer = review_grammar().tokenizer
    rows = [tokenizer.encode(r, eos=e) for r, e in zip(reviews, ended, strict=True)]
    width = max(map(len, rows)) + 1
    mask = torch.tensor([[t < len(row) for t in range(width)] for row in rows])
    junk = tokenizer.index["good"]
    tokens = torch.tensor([row + [junk] * (width - len(row)) for row in rows])
    zeros = torch.zeros(mask.shape)
    return Rollout(tokenizer.encode_batch(prompts, "left"), tokens, mask, zeros, zeros)


PROMPTS = [FILM, "review of a lamp :", "review of a drama :"]
REVIEWS = [BY_HAND[0][0], "the warranty was sturdy , and the weight was", BY_HAND[7][0]]


def test_texts_of_a_rollout_end_with_the_mask(decode_responses=decode_responses):
    rollout = rollout_of(PROMPTS, REVIEWS, [True, False, True])
    assert decode_responses(rollout) == list(zip(PROMPTS, REVIEWS, strict=True))


def test_scores_of_a_rollout_are_those_of_its_texts(gold_scores=gold_scores):
    got = gold_scores(rollout_of(PROMPTS, REVIEWS, [True, False, True]))
    close(got, f64([1.5, 1.0 - 2.0, -1.0]))
    lamp = rollout_of(PROMPTS[1:2] * 2, ["the weight was sturdy . what a joy .", REVIEWS[0]], [True, True])
    close(gold_scores(lamp), f64([1.5, 1.5 - 2.0]))
    film = rollout_of(PROMPTS[::-1][:2], [REVIEWS[0], "the weight was sturdy . what a joy ."], [True, True])
    close(gold_scores(film), f64([1.5, 1.5]))
    unended = gold_scores(rollout_of(PROMPTS[:1], REVIEWS[:1], [False]))
    close(unended, f64([1.5]))  # a text that lacks its end token only is judged as text


def test_pairs_come_back_from_their_tokens(encode_pairs=encode_pairs):
    pairs = [Pair(FILM, REVIEWS[0], REVIEWS[2]), Pair(PROMPTS[1], "the weight was nice .", REVIEWS[0])]
    prompts, chosen, rejected = encode_pairs(pairs)
    decode = review_grammar().tokenizer.decode
    for i, pair in enumerate(pairs):
        assert (decode(prompts[i]), decode(chosen[i]), decode(rejected[i])) == (pair.prompt, pair.chosen, pair.rejected)
    assert chosen.shape == rejected.shape == (2, 1 + max(len(r.split()) for p in pairs for r in (p.chosen, p.rejected)))
    assert ((chosen == 1).sum(1) == 1).all() and ((rejected == 1).sum(1) == 1).all() and (prompts != 1).all()
    assert prompts[1].tolist()[:1] == [0] and (prompts[:, -1] != 0).all()
    assert chosen[1].tolist()[-1] == 0 and (chosen[:, 0] != 0).all()
    raises(ValueError, lambda: encode_pairs([]), "texts")
    raises(ValueError, lambda: encode_pairs([Pair(FILM, "the plot was wundervoll .", "x")]), "'wundervoll'")


# --- annotators --------------------------------------------------------------------------------------------------

GOOD, BAD = BY_HAND[0][0], BY_HAND[1][0]  # 1.5 in 9 words, -1.5 in 11
LONG = "i saw it last week . the plot was good . the cast was perfect . the title was nice . what a joy ."  # 1.5
AB = Comparison(FILM, GOOD, BAD)


def logistic(x):
    return 1 / (1 + math.exp(-x))


def test_probability_by_hand(Annotators=Annotators):
    for settings, expected in [
        ({}, logistic(3.0)),
        ({"noise": 2.0}, logistic(1.5)),
        ({"noise": 0.5}, logistic(6.0)),
        ({"length_bias": 0.1}, logistic(3.0 - 0.1 * 2)),
        ({"noise": 4.0, "length_bias": 0.1}, logistic(0.75 - 0.2)),
        ({"disagreement": 0.2}, 0.8 * logistic(3.0) + 0.2 * logistic(-3.0)),
        ({"disagreement": 0.5, "noise": 0.1}, 0.5),
        ({"disagreement": 0.2, "noise": 1.5}, 0.8 * logistic(2.0) + 0.2 * logistic(-2.0)),
    ]:
        assert math.isclose(Annotators(**settings).probability(AB), expected, rel_tol=1e-12), settings


def test_lengths_are_words_and_count_whatever_they_say(Annotators=Annotators):
    same = Comparison(FILM, LONG, GOOD)
    words = len(LONG.split()) - len(GOOD.split())
    assert (Annotators().probability(same), len(GOOD.split())) == (0.5, 9)
    assert math.isclose(Annotators(length_bias=0.05).probability(same), logistic(0.05 * words), rel_tol=1e-12)
    assert math.isclose(Annotators(length_bias=-0.05).probability(same), logistic(-0.05 * words), rel_tol=1e-12)
    assert math.isclose(Annotators(noise=3.0, length_bias=0.05).utility(FILM, LONG), 0.5 + 0.05 * len(LONG.split()))


def test_the_other_way_round_is_the_other_probability(Annotators=Annotators):
    """P(a > b) + P(b > a) = 1; and Bradley-Terry is transitive in log odds, which disagreement breaks."""
    texts = [GOOD, BAD, LONG, BY_HAND[5][0]]
    for settings in ({}, {"noise": 0.7, "length_bias": 0.2}, {"disagreement": 0.3}):
        people = Annotators(**settings)

        def odds(a, b, people=people):
            p = people.probability(Comparison(FILM, a, b))
            return math.log(p / (1 - p))

        for a, b in itertools.combinations(texts, 2):
            close(f64(odds(a, b)), f64(-odds(b, a)))
        gap = odds(texts[0], texts[1]) + odds(texts[1], texts[3]) - odds(texts[0], texts[3])
        assert (abs(gap) < 1e-9) == ("disagreement" not in settings)


def test_labels_have_the_frequency_of_their_probability(Annotators=Annotators):
    """Two comparisons side by side, 1,500 times each: within four standard errors; pairs hold the texts in order."""
    other = Comparison("review of a lamp :", "the warranty was bad . what a waste .", "the weight was nice .")
    people, count = Annotators(noise=2.0, disagreement=0.1), 1500
    pairs = people.label([AB, other] * count, torch.Generator().manual_seed(0))
    assert len(pairs) == 2 * count
    for which, comparison in ((0, AB), (1, other)):
        mine, p = pairs[which::2], people.probability(comparison)
        texts = {comparison.first, comparison.second}
        assert all({x.chosen, x.rejected} == texts and x.prompt == comparison.prompt for x in mine)
        wins = sum(x.chosen == comparison.first for x in mine) / count
        assert abs(wins - p) < 4 * math.sqrt(p * (1 - p) / count), (wins, p)
    # neighbours are independent: both first, by the product
    both = sum(a.chosen == AB.first and b.chosen == other.first for a, b in zip(pairs[::2], pairs[1::2], strict=True))
    p = people.probability(AB) * people.probability(other)
    assert abs(both / count - p) < 4 * math.sqrt(p * (1 - p) / count)


def test_labels_repeat_with_their_generator_and_leave_the_global_one_alone(Annotators=Annotators):
    before = torch.get_rng_state()
    draws = [
        [x.chosen for x in Annotators(noise=3.0).label([AB] * 100, torch.Generator().manual_seed(s))] for s in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2] and torch.get_rng_state().equal(before)
    assert Annotators().label([], torch.Generator()) == []


def test_the_ceiling_is_what_the_best_guess_gets_right(Annotators=Annotators):
    """By hand; above the share that any guess got right among 1,800 labels, and as near as chance allows."""
    people = Annotators(noise=2.0)
    comparisons = [AB, Comparison(FILM, BAD, GOOD), Comparison(FILM, GOOD, LONG)]
    exact = (2 * logistic(1.5) + 0.5) / 3
    assert math.isclose(people.ceiling(comparisons), exact, rel_tol=1e-12)
    assert math.isclose(Annotators(disagreement=0.5).ceiling([AB]), 0.5)
    assert math.isclose(Annotators(disagreement=0.2).ceiling([AB]), 0.8 * logistic(3) + 0.2 * logistic(-3))
    pairs = people.label(comparisons * 600, torch.Generator().manual_seed(3))
    right = sum(p.chosen == (LONG if LONG in (p.chosen, p.rejected) else GOOD) for p in pairs)
    assert abs(right / len(pairs) - exact) < 4 * math.sqrt(exact * (1 - exact) / len(pairs))


def test_annotators_out_of_range_are_named(Annotators=Annotators):
    for bad in (0.0, -1.0, math.nan):
        raises(ValueError, lambda x=bad: Annotators(noise=x), "noise", str(bad))
    for bad in (-0.1, 0.6, math.nan):
        raises(ValueError, lambda x=bad: Annotators(disagreement=x), "disagreement", str(bad), "0.5")


def _score(*changes):
    return edited(gold_score, *changes)


def _people(*changes):
    return edited(Annotators, *changes)


def _opinions(*changes):
    return edited(opinions, *changes)


def _rollout_without(change):
    """The function on a changed rollout."""
    return lambda rollout: decode_responses(change(rollout))


def _with_mask(rollout, mask):
    return Rollout(rollout.prompts, rollout.tokens, mask, rollout.logprobs, rollout.sampling_logprobs)


PLANTED = {
    "opinions": {
        "not reaches the next word only": _opinions(
            ("(just_before, before if intensified else just_before)", "(just_before,)")
        ),
        "not reaches over any word": _opinions(
            ("(just_before, before if intensified else just_before)", "(just_before, before)")
        ),
        "not before the word is lost": _opinions(
            ("(just_before, before if intensified else just_before)", '(before if intensified else "",)')
        ),
        "intensifiers double": _opinions(("1.5 if", "2.0 if")),
        "intensifiers do nothing": _opinions(("(1.5 if intensified else 1.0)", "1.0")),
        "negation weakens": _opinions(("(-1.0 if negated", "(0.5 if negated")),
        "negation ignored": _opinions(("(-1.0 if negated else 1.0)", "1.0")),
        "closings do not count": lambda review: [
            v
            for w, v in zip([w for w in review.split() if w in lexicon.VALENCE], opinions(review), strict=True)
            if w not in lexicon.CLOSING_VALENCE
        ],
        "the first two words are lost": _opinions(('["", "", *review.split()]', '["", *review.split()]')),
        "signs only": lambda review: [math.copysign(1, v) for v in opinions(review)],
    },
    "gold_score": {
        "sum": _score((" / len(valences)", "")),
        "broken language is free": _score(("2.0 * broken", "0.0 * broken")),
        "broken language is praised": _score(("- 2.0 * broken", "+ 2.0 * broken")),
        "the prompt does not matter": _score(('f"{prompt} {review}"', 'f"review of a comedy : {review}"')),
        "repetition is free": _score(("0.5 * repeated", "0.0 * repeated")),
        "repetition once": _score(("0.5 * repeated", "0.5 * (repeated > 0)")),
        "every word may come once only": _score((" if word in VALENCE]", "]")),
        "the number of opinions": _score(("tone - 0.5", "tone + 0.1 * len(words) - 0.5")),
        "divided by the number of words": _score(("/ len(valences)", "/ len(review.split())")),
        "a review without opinion is bad": _score(("if valences else 0.0", "if valences else -1.0")),
    },
    "decode_responses": {
        "to the end of the row": _rollout_without(lambda r: _with_mask(r, torch.ones_like(r.response_mask))),
        "without its last word": _rollout_without(
            lambda r: _with_mask(r, r.response_mask & r.response_mask.roll(-1, 1) & r.response_mask.roll(-2, 1))
        ),
        "prompt in the response": lambda r: [(p, f"{p} {t}") for p, t in decode_responses(r)],
        "swapped": lambda r: [(t, p) for p, t in decode_responses(r)],
        "first prompt for all": lambda r: [(decode_responses(r)[0][0], t) for _, t in decode_responses(r)],
    },
    "gold_scores": {
        "single precision": lambda r: gold_scores(r).float(),
        "one number": lambda r: gold_scores(r).mean(),
        "to the end of the row": lambda r: gold_scores(_with_mask(r, torch.ones_like(r.response_mask))),
        "first prompt for all": lambda r: gold_scores(
            Rollout(r.prompts[:1].expand_as(r.prompts), r.tokens, r.response_mask, r.logprobs, r.sampling_logprobs)
        ),
        "unended is broken": lambda r: gold_scores(r) - 2.0 * ((r.tokens == 1) & r.response_mask).sum(1).eq(0),
    },
    "encode_pairs": {
        "swapped": lambda pairs: (lambda p, c, r: (p, r, c))(*encode_pairs(pairs)),
        "not ended": edited(encode_pairs, (', "right", eos=True)', ', "right")')),
        "prompts padded on the right": edited(
            encode_pairs, ('for pair in pairs], "left")', 'for pair in pairs], "right")')
        ),
        "responses padded on the left": edited(encode_pairs, (', "right", eos=True)', ', "left", eos=True)')),
        "prompts ended": edited(encode_pairs, ('for pair in pairs], "left")', 'for pair in pairs], "left", eos=True)')),
        "no pair passes": lambda pairs: encode_pairs(pairs) if pairs else None,
    },
    "Annotators": {
        "noise multiplies": _people(("/ self.noise", "* self.noise")),
        "length in letters": _people(("len(review.split())", "len(review)")),
        "length with the prompt": _people(("len(review.split())", "len((prompt + review).split()) * 2")),
        "length divided by the noise": _people(
            (
                "gold_score(prompt, review) / self.noise + self.length_bias * len(review.split())",
                "(gold_score(prompt, review) + self.length_bias * len(review.split())) / self.noise",
            )
        ),
        "length punished": _people(("+ self.length_bias", "- self.length_bias")),
        "turned": _people(
            (
                "utility(prompt, comparison.first) - utility(prompt, comparison.second)",
                "utility(prompt, comparison.second) - utility(prompt, comparison.first)",
            )
        ),
        "disagreement in the utility": _people(
            ("(1 - q) * torch.sigmoid(d) + q * torch.sigmoid(-d)", "torch.sigmoid((1 - 2 * q) * d)")
        ),
        "disagreement twice": _people(("(1 - q) * torch.sigmoid(d) + q", "(1 - 2 * q) * torch.sigmoid(d) + 2 * q")),
        "disagreement as a coin": _people(("q * torch.sigmoid(-d)", "q / 2")),
        "probit": _people(
            (
                "(1 - q) * torch.sigmoid(d) + q * torch.sigmoid(-d)",
                "(1 - q) * torch.special.ndtr(d) + q * torch.special.ndtr(-d)",
            )
        ),
        "no chance": _people(("draw < self.probability(c)", "0.5 < self.probability(c)")),
        "labels turned": _people(("draw < self.probability(c)", "draw > self.probability(c)")),
        "one draw for all": _people(
            (
                "torch.rand(len(comparisons), generator=generator, dtype=torch.float64).tolist()",
                "torch.rand(1, generator=generator, dtype=torch.float64).tolist() * len(comparisons)",
            )
        ),
        "one draw for two": _people(
            ("dtype=torch.float64).tolist()", "dtype=torch.float64)[::2].repeat_interleave(2).tolist()")
        ),
        "global generator": _people(("generator=generator,", "generator=torch.default_generator,")),
        "ceiling of the first side": _people(("torch.maximum(p, 1 - p).mean()", "p.mean()")),
        "ceiling of the surest": _people(("torch.maximum(p, 1 - p).mean()", "torch.maximum(p, 1 - p).max()")),
        "ceiling of the mean": _people(("torch.maximum(p, 1 - p).mean()", "max(p.mean(), 1 - p.mean())")),
        "noise 0 passes": _people((", open_low=True", "")),
        "disagreement to 1 passes": _people(("self.disagreement, 0.0, 0.5)", "self.disagreement, 0.0, 1.0)")),
    },
}
EXEMPT = {"review_grammar"}  # what it builds is tested in test_grammar.py
