"""The language of the reviews: a reader written from the rules, without an automaton, agrees with the tables."""

import collections
import functools
import itertools
import math

import torch

from planting import close, edited, f64, raises, replaced
from rlhfkit import collect, grammar, lexicon
from rlhfkit.grammar import ReviewGrammar, _Rules, sign_of, split_prompts, word_weights
from rlhfkit.lexicon import adjective_valences

FEW = {  # of every kind of word some, so that a grammar with all its rules is built in no time
    "ITEMS": {"film": "comedy sequel", "product": "phone lamp tent"},
    "MODIFIERS": {"film": "silent recent", "product": "cheap used"},
    "ASPECTS": {"film": "plot cast", "product": "price"},
    "ADJECTIVES": {
        2: {"both": "perfect", "film": "moving", "product": "flawless"},
        1: {"both": "good nice", "film": "funny", "product": "handy"},
        -1: {"both": "bad", "film": "slow flat", "product": "bulky"},
        -2: {"both": "awful", "film": "idiotic", "product": "useless"},
    },
    "INTENSIFIERS": "very quite",
    "COPULAS": "was felt",
    "OPENING_VERBS": {"film": "saw", "product": "bought tried"},
    "OPENING_TIMES": ("yesterday", "last week", "last month"),
    "OPENING_ENDS": (".", "on a whim ."),
    "CLOSINGS": {
        1: ("overall i loved it .", "what a joy ."),
        0: ("overall it left me undecided .", "it has two sides .", "i have mixed feelings about it ."),
        -1: ("overall i hated it .", "what a waste ."),
    },
}


@functools.cache
def small(ReviewGrammar=ReviewGrammar):
    """The grammar over few words."""
    with replaced(lexicon, **FEW):
        return ReviewGrammar()


@functools.cache
def full():
    return ReviewGrammar()


def with_few_words(test):
    """The reader too then reads from the short lists."""

    def run(*arguments, **names):
        with replaced(lexicon, **FEW):
            test(*arguments, **names)

    return functools.update_wrapper(run, test)


# --- the reader: from a text to what was said, and to its probability ----------------------------------------------

Clause = collections.namedtuple("Clause", "link aspect copula negated intensifier adjective meaning")
Reading = collections.namedtuple("Reading", "domain modifier item opening sentences closing")


def chance(word, words):
    """1/3 : 1/4 : 1/5 : ... in the order of the list."""
    return chances(words if isinstance(words, str) else tuple(words))[word]


@functools.cache
def chances(words):
    words = words.split() if isinstance(words, str) else words
    total = math.fsum(1 / (rank + 3) for rank in range(len(words)))
    return {word: 1 / (rank + 3) / total for rank, word in enumerate(words)}


def valences(domain):
    groups = lexicon.ADJECTIVES
    return by_word(tuple((v, f"{groups[v]['both']} {groups[v][domain]}") for v in (2, 1, -1, -2)))


@functools.cache
def by_word(groups):
    return {word: valence for valence, words in groups for word in words.split()}


class Words:
    """A text to read from the left; ``take`` complains where another word comes than was expected."""

    def __init__(self, text):
        self.rest = text.split()

    def take(self, *expected):
        if not self.rest or self.rest[0] not in expected:
            raise ValueError(f"{self.rest[:1]} where {expected[:5]} should be")
        return self.rest.pop(0)

    def next_is(self, *words):
        return self.rest[: len(words)] == list(words)

    def take_phrase(self, phrases):
        for phrase in phrases:
            if self.next_is(*phrase.split()):
                del self.rest[: len(phrase.split())]
                return phrase
        raise ValueError(f"no phrase at {self.rest[:3]}")


def read_clause(words, domain, link):
    aspect = words.take(*lexicon.ASPECTS[domain].split())
    copula = words.take(*lexicon.COPULAS.split())
    negated = words.next_is("not") and bool(words.take("not"))
    intensifiers = lexicon.INTENSIFIERS.split()
    intensifier = words.take(*intensifiers) if words.rest[:1] and words.rest[0] in intensifiers else None
    adjective = words.take(*valences(domain))
    meaning = math.copysign(1, valences(domain)[adjective]) * (-1 if negated else 1)
    return Clause(link, aspect, copula, negated, intensifier, adjective, int(meaning))


def read(prompt, review):
    """What a prompt and a review say; ValueError if they are no text of the language."""
    words = Words(prompt)
    for word in ("review", "of", "a"):
        words.take(word)
    (domain,) = [d for d in lexicon.DOMAINS if set(words.rest) & set(lexicon.ITEMS[d].split())] or ["none"]
    if domain == "none":
        raise ValueError("nothing that is reviewed")
    modifier = words.take(*lexicon.MODIFIERS[domain].split()) if len(words.rest) == 3 else None
    item = words.take(*lexicon.ITEMS[domain].split())
    if words.rest != [":"]:
        raise ValueError(f"{words.rest} after the prompt")
    words, opening = Words(review), None
    if words.next_is("i"):
        words.take("i")
        verb = words.take(*lexicon.OPENING_VERBS[domain].split())
        words.take("it")
        opening = (verb, words.take_phrase(lexicon.OPENING_TIMES), words.take_phrase(lexicon.OPENING_ENDS))
    sentences = []
    while words.next_is("the") or not sentences:
        words.take("the")
        clauses = [read_clause(words, domain, None)]
        if words.next_is(","):
            words.take(",")
            link = words.take("but", "and")
            words.take("the")
            clauses.append(read_clause(words, domain, link))
        words.take(".")
        sentences.append(clauses)
    closing = " ".join(words.rest)
    reading = Reading(domain, modifier, item, opening, sentences, closing)
    if probability(reading)[1] == 0:
        raise ValueError("against the rules")
    return reading


def probability(reading):
    """Of the prompt, and of the review given the prompt, multiplied up choice by choice."""
    domain, p = reading.domain, 1.0
    prompt = 0.5 * chance(reading.item, lexicon.ITEMS[domain])  # numbers as the rules have them, typed once more
    prompt *= 0.5 if reading.modifier is None else 0.5 * chance(reading.modifier, lexicon.MODIFIERS[domain])
    if reading.opening:
        lists = (lexicon.OPENING_VERBS[domain], lexicon.OPENING_TIMES, lexicon.OPENING_ENDS)
        p *= 0.4 * math.prod(chance(x, words) for x, words in zip(reading.opening, lists, strict=True))
    else:
        p *= 0.6
    balance = 0
    for number, clauses in enumerate(reading.sentences):
        if number > 2 or len(clauses) > 2:
            return prompt, 0.0
        for clause in clauses:
            p *= chance(clause.aspect, lexicon.ASPECTS[domain]) * chance(clause.copula, lexicon.COPULAS)
            p *= 0.2 if clause.negated else 1.0
            said = [w for w, v in valences(domain).items() if v * valences(domain)[clause.adjective] > 0]
            p *= chance(clause.adjective, said)
            if clause.intensifier:
                p *= 0.3 * chance(clause.intensifier, lexicon.INTENSIFIERS)
            else:
                p *= 0.7 if clause.negated else 0.5
            if clause.link is None:
                p *= {0: 0.5, 1: 0.7, -1: 0.3}[sign_between(balance, clause.meaning)]
            else:
                p *= 0.5 * (0.35 if clause.link == "but" else 0.65)
                p *= (clause.meaning == clauses[0].meaning) == (clause.link == "and")
            balance += clause.meaning
        p *= 0.5 if len(clauses) == 1 else 1.0
        last = number == len(reading.sentences) - 1
        p *= (0.55 if last else 0.45) if number < 2 else 1.0
    sign = (balance > 0) - (balance < 0)
    if reading.closing not in lexicon.CLOSINGS[sign]:
        return prompt, 0.0
    return prompt, p * chance(reading.closing, lexicon.CLOSINGS[sign])


def sign_between(balance, meaning):
    """1 if the meaning goes with the balance, -1 if against it, 0 if there is no balance yet."""
    return 0 if balance == 0 else 1 if balance * meaning > 0 else -1


def texts_of(language, count, seed):
    prompts, reviews = language.sample_tokens(count, torch.Generator().manual_seed(seed))
    decode = language.tokenizer.decode
    return prompts, reviews, [(decode(p), decode(r)) for p, r in zip(prompts, reviews, strict=True)]


def token_logprobs(language, prompts, reviews):
    """Log-probabilities of the prompt's and of the review's real tokens, summed each."""
    tokens = torch.cat([torch.zeros(len(prompts), 1).long(), prompts, reviews], 1)  # the padding stands for the start
    parts = [language.logits(part)[:, :-1].gather(2, part[:, 1:, None])[..., 0] for part in tokens.split(50)]
    found = torch.cat(parts)
    found = torch.where(tokens[:, 1:] != 0, found, 0.0)
    return found[:, : prompts.shape[1]].sum(1), found[:, prompts.shape[1] :].sum(1)


def agrees_with_the_reader(language, count, seed):
    prompts, reviews, texts = texts_of(language, count, seed)
    expected = []
    for prompt, review in texts:
        try:
            expected.append(probability(read(prompt, review)))
        except ValueError as error:
            raise AssertionError(f"{prompt} {review}: {error}") from error
    got = token_logprobs(language, prompts, reviews)
    for mine, theirs in zip(zip(*expected, strict=True), got, strict=True):
        close(theirs, f64(mine).log(), rtol=1e-10, atol=1e-10)


@with_few_words
def test_likelihood_is_the_readers(ReviewGrammar=ReviewGrammar, _Rules=_Rules):
    """And so every sample obeys the rules: "but" turns, "and" keeps, the closing agrees with the balance."""
    agrees_with_the_reader(small(planted(ReviewGrammar, _Rules)), 400, 0)


def test_likelihood_is_the_readers_over_all_words():
    agrees_with_the_reader(full(), 2000, 1)


@functools.cache
def planted(language, rules):
    """A grammar with other rules, if they are others."""
    if rules is _Rules:
        return language

    def build():
        with replaced(grammar, _Rules=rules):
            return language()

    return build


@with_few_words
def test_every_state_has_a_distribution_over_the_next_word(ReviewGrammar=ReviewGrammar, _Rules=_Rules):
    language = small(planted(ReviewGrammar, _Rules))
    p = language.log_table.exp()
    close(p.sum(1), torch.ones(len(p), dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert (p >= 0).all() and p.shape == (len(language.states) + 1, language.tokenizer.vocab_size)
    assert (language.next_state[p > 0] != language.dead).sum() == (p > 0).sum() - 1  # the dead state's own padding
    forbidden = (p == 0) & (torch.arange(p.shape[1]) != 0)
    assert (language.next_state[forbidden] == language.dead).all()


def test_every_state_of_the_whole_grammar_has_a_distribution():
    p = full().log_table.exp()
    close(p.sum(1), torch.ones(len(p), dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert len({*full().tokenizer.words}) == full().tokenizer.vocab_size > 200


# --- every prompt and every review of few words, from the rules alone ------------------------------------------------


def clauses_of(domain, link, first):
    """All clauses that can stand here."""
    kinds = itertools.product(
        lexicon.ASPECTS[domain].split(),
        lexicon.COPULAS.split(),
        (False, True),
        (None, *lexicon.INTENSIFIERS.split()),
        valences(domain).items(),
    )
    for aspect, copula, negated, intensifier, (adjective, valence) in kinds:
        meaning = int(math.copysign(1, valence)) * (-1 if negated else 1)
        if link is None or (meaning == first) == (link == "and"):
            yield Clause(link, aspect, copula, negated, intensifier, adjective, meaning)


def text_of(clause):
    lead = "the" if clause.link is None else f", {clause.link} the"
    words = (lead, clause.aspect, clause.copula, "not" * clause.negated, clause.intensifier, clause.adjective)
    return " ".join(word for word in words if word)


def entropy_of(words):
    words = words.split() if isinstance(words, str) else list(words)
    p = [chance(word, words) for word in words]
    return -math.fsum(x * math.log(x) for x in p)


def bits(*p):
    """Entropy of a choice, nats."""
    return -math.fsum(x * math.log(x) for x in p if x)


def expected_surprise_and_length():
    """By the chain rule over the choices an author makes, backwards from the closing; no words, no automaton."""
    totals = []
    for domain in lexicon.DOMAINS:
        by_sign = {s: [w for w, v in valences(domain).items() if v * s > 0] for s in (1, -1)}

        def clause(p_meaning, domain=domain, by_sign=by_sign):
            """Surprise and length after "the", up to the adjective, where the meaning is positive with this chance."""
            h = entropy_of(lexicon.ASPECTS[domain]) + entropy_of(lexicon.COPULAS) + bits(p_meaning, 1 - p_meaning)
            h += bits(0.2, 0.3, 0.5) + 0.2 * bits(0.3, 0.7) + 0.36 * entropy_of(lexicon.INTENSIFIERS)
            for meaning, p in ((1, p_meaning), (-1, 1 - p_meaning)):
                h += p * (0.2 * entropy_of(by_sign[-meaning]) + 0.8 * entropy_of(by_sign[meaning]))
            return h, 3 + 0.2 + 0.36

        @functools.cache
        def rest(sentence, balance, domain=domain, clause=clause):
            """Surprise and length from the aspect of a sentence to the end of the review."""
            positive = {0: 0.5, 1: 0.7, -1: 0.3}[(balance > 0) - (balance < 0)]
            h, n = clause(positive)
            h, n = h + bits(0.5, 0.5), n
            second = clause(1.0)  # what "and" or "but" leaves no choice in
            for meaning, p in ((1, positive), (-1, 1 - positive)):
                ends = [(0.5, balance + meaning, 0.0, 0)]
                for link, q in ((1, 0.65), (-1, 0.35)):
                    sure = clause(1.0 if meaning * link > 0 else 0.0)
                    ends.append((0.5 * q, balance + meaning + meaning * link, sure[0], sure[1] + 3))
                h += p * 0.5 * bits(0.65, 0.35)
                for weight, after, more_h, more_n in ends:
                    weight *= p
                    sign = (after > 0) - (after < 0)
                    phrases = lexicon.CLOSINGS[sign]
                    close_h = entropy_of(phrases)
                    close_n = 2 + sum(chance(x, phrases) * len(x.split()) for x in phrases)  # "." and the end
                    if sentence < 3:
                        next_h, next_n = rest(sentence + 1, after)
                        end_h = bits(0.45, 0.55) + 0.45 * next_h + 0.55 * close_h
                        end_n = 0.45 * (2 + next_n) + 0.55 * close_n
                    else:
                        end_h, end_n = close_h, close_n
                    h, n = h + weight * (more_h + end_h), n + weight * (more_n + end_n)
            assert second[1] == clause(0.0)[1]
            return h, n

        h, n = rest(1, 0)
        verbs, times, ends = lexicon.OPENING_VERBS[domain], lexicon.OPENING_TIMES, lexicon.OPENING_ENDS
        h += bits(0.4, 0.6) + 0.4 * (entropy_of(verbs) + entropy_of(times) + entropy_of(ends))
        words = sum(sum(chance(x, phrases) * len(x.split()) for x in phrases) for phrases in (times, ends))
        totals.append((h, n + 1 + 0.4 * (3 + words)))
    return [sum(pair) / 2 for pair in zip(*totals, strict=True)]


def test_entropy_of_the_whole_grammar_is_the_authors_and_the_mean_surprise_of_samples():
    got = full().entropy()
    close(f64(got), f64(expected_surprise_and_length()), rtol=1e-10, atol=1e-10)
    prompts, reviews, _ = texts_of(full(), 2000, 2)
    surprise = -token_logprobs(full(), prompts, reviews)[1]
    lengths = (reviews != 0).sum(1).double()
    for sample, exact in ((surprise, got[0]), (lengths, got[1])):
        assert abs(sample.mean().item() - exact) < 4 * sample.std().item() / math.sqrt(len(sample))


# --- texts in and out ------------------------------------------------------------------------------------------------

PHONE = "review of a cheap phone :"
GOOD = (
    "the price was good . what a joy .",
    "i tried it last week on a whim . the price was not very bad . the price felt bulky . it has two sides .",
    "the price was nice , but the price was not nice . i have mixed feelings about it .",
    "the price was nice , and the price was not bad . overall i loved it .",
    "the price was bad , and the price was bad . the price was good . the price was not quite perfect . what a waste .",
)
BAD = (
    "",
    "the price was good .",
    "the price was good . what a joy",
    "the price was good . what a joy . what a joy .",
    "the price was good . what a waste .",
    "the price was not good . what a joy .",
    "the price was very not bad . what a joy .",
    "the price was not not good . what a joy .",
    "the price was very very good . what a joy .",
    "the price was funny . what a joy .",  # a word of films
    "the plot was good . what a joy .",
    "the price was good , but the price was nice . what a joy .",
    "the price was good , and the price was not nice . it has two sides .",
    "the price was good , and the price was nice , and the price was nice . what a joy .",
    "the price was good . the price was good . the price was good . the price was good . what a joy .",
    "i saw it last week . the price was good . what a joy .",
    "price was good . what a joy .",
    "the price was wundervoll . what a joy .",
    "the price was really good . what a joy .",
    "what a joy .",
)


@with_few_words
def test_texts_of_the_language_are_told_from_others(ReviewGrammar=ReviewGrammar, _Rules=_Rules):
    language = small(planted(ReviewGrammar, _Rules))
    for review in GOOD:
        assert language.accepts(f"{PHONE} {review}"), review
        read(PHONE, review)
        assert not language.accepts(review) and not language.accepts(f"{PHONE} {PHONE} {review}")
    for review in BAD:
        assert not language.accepts(f"{PHONE} {review}"), review
        raises(ValueError, lambda r=review: read(PHONE, r))
    for prompt in ("review of a phone", "review of a silent phone :", "review of phone :", "review of a cheap :", ":"):
        assert not language.accepts(f"{prompt} {GOOD[0]}")
    assert not language.accepts("") and not language.accepts(PHONE)


@with_few_words
def test_prompts_and_reviews_come_back_through_text(ReviewGrammar=ReviewGrammar):
    language = small(ReviewGrammar)
    prompts, reviews, texts = texts_of(language, 200, 3)
    tokenizer = language.tokenizer
    assert tokenizer.encode_batch([p for p, _ in texts], "left").equal(prompts)
    assert tokenizer.encode_batch([r for _, r in texts], "right", eos=True).equal(reviews)
    assert (prompts[:, -1] == tokenizer.index[":"]).all() and ((reviews == tokenizer.eos_id).sum(1) == 1).all()
    assert all(language.accepts(f"{p} {r}") for p, r in texts)
    for p, r in texts[:20]:
        assert not language.accepts(f"{p} <pad> {r}") and not language.accepts(f"{p} {r} <eos>")
    assert {len(p.split()) for p, _ in texts} == {5, 6}


@with_few_words
def test_padding_on_the_left_changes_nothing_and_after_the_end_only_padding_comes(ReviewGrammar=ReviewGrammar):
    language = small(ReviewGrammar)
    prompts, reviews, _ = texts_of(language, 50, 6)
    rows = torch.cat([prompts, reviews], 1)
    wider = torch.cat([torch.zeros(50, 3).long(), rows], 1)
    assert language.logits(wider)[:, 3:].equal(language.logits(rows))
    after = language.logits(rows)[:, -1].exp()
    assert (after[:, 0] == 1).all() and (after.sum(1) == 1).all()
    for i in (0, 7, 49):  # and a row says the same alone
        alone = rows[i : i + 1, prompts[i].eq(0).sum() :]
        assert language.logits(alone)[0].equal(language.logits(rows)[i, -alone.shape[1] :])


@with_few_words
def test_a_text_that_has_left_the_language_never_comes_back(ReviewGrammar=ReviewGrammar):
    language = small(ReviewGrammar)
    prompts, reviews, _ = texts_of(language, 50, 7)
    broken = torch.cat([prompts, prompts[:, -1:], reviews], 1)  # a colon too many
    p = language.logits(broken)[:, prompts.shape[1] :].exp()
    assert (p[..., 0] == 1).all() and (p[..., 1:] == 0).all()
    assert (language.walk(broken)[:, prompts.shape[1] :] == language.dead).all()
    assert (language.walk(broken)[:, : prompts.shape[1]] != language.dead).all()


@with_few_words
def test_what_follows_a_few_beginnings_by_hand(ReviewGrammar=ReviewGrammar):
    language = small(ReviewGrammar)

    def follows(text):
        ids = language.tokenizer.encode(text)
        p = language.logits(torch.tensor([[0, *ids]]))[0, -1].exp()
        return {language.tokenizer.words[i]: p[i].item() for i in p.nonzero()[:, 0].tolist()}

    def same(text, expected):
        got = follows(text)
        assert got.keys() == expected.keys(), (got, expected)
        close(f64([got[w] for w in expected]), f64(list(expected.values())), rtol=1e-12, atol=1e-12)

    same("", {"review": 1.0})
    items = {"comedy": 4 / 7, "sequel": 3 / 7, "phone": 20 / 47, "lamp": 15 / 47, "tent": 12 / 47}
    modifiers = {"silent": 4 / 7, "recent": 3 / 7, "cheap": 4 / 7, "used": 3 / 7}
    same("review of a", {w: p / 4 for w, p in (items | modifiers).items()})
    same(f"{PHONE}", {"the": 0.6, "i": 0.4})
    same(f"{PHONE} i bought it last", {"week": (1 / 4) / (1 / 4 + 1 / 5), "month": (1 / 5) / (1 / 4 + 1 / 5)})
    same(f"{PHONE} the price was good", {",": 0.5, ".": 0.5})
    same(f"{PHONE} the price was good ,", {"but": 0.35, "and": 0.65})
    same(f"{PHONE} the price was good .", {"the": 0.45, "overall": 0.55 * 4 / 7, "what": 0.55 * 3 / 7})
    same(f"{PHONE} the price was good , and the price was good", {".": 1.0})
    same(f"{PHONE} the price was good . what a joy .", {"<eos>": 1.0})
    good = {"flawless": 1 / 4, "perfect": 1 / 3, "good": 1 / 5, "nice": 1 / 6, "handy": 1 / 7}
    good = {w: p / sum(good.values()) for w, p in good.items()}
    bad = {"bad": 1 / 3, "bulky": 1 / 4, "awful": 1 / 5, "useless": 1 / 6}
    bad = {w: p / sum(bad.values()) for w, p in bad.items()}
    both = {w: p / 2 for w, p in (good | bad).items()}
    intensified = {"very": 0.3 * 4 / 7, "quite": 0.3 * 3 / 7}
    same(f"{PHONE} the price was", {"not": 0.2} | intensified | {w: 0.5 * p for w, p in both.items()})
    same(f"{PHONE} the price was not", intensified | {w: 0.7 * p for w, p in both.items()})
    same(f"{PHONE} the price was not very", both)
    same(f"{PHONE} the price was good , but the price was very", bad)
    same(f"{PHONE} the price was good , but the price was not very", good)
    same(
        f"{PHONE} the price was bad . the price was quite",
        {w: 0.3 * p for w, p in good.items()} | {w: 0.7 * p for w, p in bad.items()},
    )


def test_the_longest_review_fits_and_is_as_long_as_the_rules_allow():
    """Longest path through the table, and by hand: 9 of an opening, 14 + 15 + 15 of sentences, 1 + 8 + 1 to the end."""
    language = full()
    allowed = language.log_table > -torch.inf
    allowed[:, 0] = False
    arcs = allowed.nonzero()
    targets = language.next_state[allowed]
    longest = torch.zeros(len(allowed)).long()
    for _ in range(100):  # longest path to the end; it has no cycle
        further = torch.zeros_like(longest).scatter_reduce(0, arcs[:, 0], longest[targets] + 1, "amax")
        if further.equal(longest):
            break
        longest = further
    prompt = max(
        len(f"review of a {modifier} {item} :".split())
        for domain in lexicon.DOMAINS
        for modifier in lexicon.MODIFIERS[domain].split()
        for item in lexicon.ITEMS[domain].split()
    )
    by_hand = (3 + 2 + 4) + (6 + 8) + 2 * (1 + 6 + 8) + (1 + 8 + 1)
    assert int(longest[language.start]) - prompt == by_hand == 63 <= collect.MAX_LENGTH


@with_few_words
def test_bad_tokens_are_named(ReviewGrammar=ReviewGrammar):
    language = small(ReviewGrammar)
    size = language.tokenizer.vocab_size
    raises(ValueError, lambda: language.logits(torch.zeros(3).long()), "tokens", "(3,)", "(B, L)")
    raises(ValueError, lambda: language.logits(torch.zeros(3, 0).long()), "tokens", "(3, 0)", "L at least 1")
    raises(ValueError, lambda: language.logits(torch.tensor([[2, size]])), "tokens", f"[2, {size}]", f"[0, {size - 1}]")
    raises(ValueError, lambda: language.logits(torch.tensor([[-1, 2]])), "tokens", "[-1, 2]")
    for count in (0, -2):
        raises(ValueError, lambda c=count: language.sample_tokens(c, torch.Generator()), "count", str(count))


@with_few_words
def test_entropy_is_the_authors(ReviewGrammar=ReviewGrammar):
    close(f64(small(ReviewGrammar).entropy()), f64(expected_surprise_and_length()), rtol=1e-10, atol=1e-10)


@with_few_words
def test_texts_of_one_sentence_have_together_the_probability_of_one_sentence():
    """All texts of one sentence about a product without an opening, from the word lists; none missing, none twice."""
    language = small()
    reviews = []
    for first in clauses_of("product", None, 0):
        for clauses in (
            (first,),
            *((first, c) for link in ("but", "and") for c in clauses_of("product", link, first.meaning)),
        ):
            balance = sum(clause.meaning for clause in clauses)
            for closing in lexicon.CLOSINGS[(balance > 0) - (balance < 0)]:
                reviews.append(f"{' '.join(map(text_of, clauses))} . {closing}")
    assert len(set(reviews)) == len(reviews) > 10_000
    tokens = language.tokenizer.encode_batch(reviews, "right", eos=True)
    prompts = language.tokenizer.encode_batch(["review of a lamp :"], "left").expand(len(tokens), -1)
    total = sum(
        token_logprobs(language, p, t)[1].exp().sum()
        for p, t in zip(prompts.split(2000), tokens.split(2000), strict=True)
    )
    close(total, f64(0.6 * 0.55), rtol=1e-10, atol=1e-10)  # no opening, no second sentence


@with_few_words
def test_one_word_changed_and_reader_and_grammar_still_agree():
    """1,500 samples with a word replaced, dropped, doubled or moved: most are no reviews any more, some are."""
    language, kept = small(), 0
    _, _, texts = texts_of(language, 1500, 4)
    draw = torch.Generator().manual_seed(5)
    for prompt, review in texts:
        words = review.split()
        at, other, how = (
            int(torch.randint(n, (), generator=draw)) for n in (len(words), language.tokenizer.vocab_size - 2, 4)
        )
        if how == 0:
            words[at] = language.tokenizer.words[2 + other]
        elif how == 1:
            del words[at]
        elif how == 2:
            words.insert(at, words[at])
        else:
            words.insert(other % len(words), words.pop(at))
        try:
            read(prompt, " ".join(words))
            expected = True
        except ValueError:
            expected = False
        assert language.accepts(f"{prompt} {' '.join(words)}") == expected, words
        kept += expected
    assert 30 < kept < 700


@with_few_words
def test_samples_have_the_frequencies_of_the_table(ReviewGrammar=ReviewGrammar):
    """Chi-square of the first opinion word, the first word and the closing, among 6,000: within 5 sd of its mean."""
    language = small(ReviewGrammar)
    _, reviews, texts = texts_of(language, 6000, 8)
    films = [(p, r) for p, r in texts if "comedy" in p or "sequel" in p]
    assert abs(len(films) - 3000) < 5 * math.sqrt(1500)
    first = collections.Counter(r.split()[0] for _, r in texts)
    assert abs(first["i"] - 2400) < 5 * math.sqrt(6000 * 0.24) and set(first) == {"i", "the"}
    readings = [read(p, r) for p, r in films]
    adjectives = collections.Counter(reading.sentences[0][0].adjective for reading in readings)
    expected = {}
    for sign in (1, -1):
        words = [w for w, v in valences("film").items() if v * sign > 0]
        expected |= {w: len(films) * 0.5 * chance(w, words) for w in words}
    chi = sum((adjectives[w] - e) ** 2 / e for w, e in expected.items())
    df = len(expected) - 1
    assert chi < df + 5 * math.sqrt(2 * df), chi
    assert len(set(texts)) > 4000  # they are not few texts again and again
    again = language.sample_tokens(6000, torch.Generator().manual_seed(8))[1]
    other = language.sample_tokens(6000, torch.Generator().manual_seed(9))[1]
    assert again.equal(reviews) and not other.equal(reviews)


# --- the small functions ---------------------------------------------------------------------------------------------


def test_word_weights_fall_with_the_rank(word_weights=word_weights):
    got = word_weights(["a", "b", "c"])
    assert [word for word, _ in got] == ["a", "b", "c"]
    close(f64([p for _, p in got]), f64([20 / 47, 15 / 47, 12 / 47]))
    assert word_weights(["a"]) == [("a", 1.0)]


def test_sign_of_is_the_sign(sign_of=sign_of):
    assert [sign_of(x) for x in (-6, -1, 0, 1, 6)] == [-1, -1, 0, 1, 1]


def test_adjectives_of_a_domain_by_hand(adjective_valences=adjective_valences):
    for domain in lexicon.DOMAINS:
        got = adjective_valences(domain)
        assert list(got.items()) == list(valences(domain).items())  # the order is that of the frequencies
        assert set(got.values()) == {2, 1, -1, -2} and len(got) == 48
    assert adjective_valences("film")["brilliant"] == 2 and "brilliant" not in adjective_valences("product")
    assert adjective_valences("product")["excellent"] == adjective_valences("film")["excellent"] == 2
    assert adjective_valences("product")["flimsy"] == -1 and adjective_valences("product")["broken"] == -2


def test_no_word_has_two_meanings():
    """Items, modifiers, aspects, adjectives, intensifiers and the deciding words of the closings do not overlap."""
    lists = [
        lexicon.INTENSIFIERS.split(),
        list(lexicon.CLOSING_VALENCE),
        lexicon.COPULAS.split(),
        ["not", "but", "and"],
    ]
    for domain in lexicon.DOMAINS:
        lists += [table[domain].split() for table in (lexicon.ITEMS, lexicon.MODIFIERS, lexicon.ASPECTS)]
    for groups in lexicon.ADJECTIVES.values():
        lists += [groups[name].split() for name in ("both", *lexicon.DOMAINS)]
    words = [word for words in lists for word in words]
    assert len(words) == len(set(words))
    for sign, phrases in lexicon.CLOSINGS.items():
        for phrase in phrases:
            found = [lexicon.CLOSING_VALENCE[w] for w in phrase.split() if w in lexicon.CLOSING_VALENCE]
            negated = "not" in phrase.split()
            assert all((v > 0) == ((sign > 0) != negated) for v in found) and len(found) <= 1


def test_split_prompts_by_hand(split_prompts=split_prompts):
    rows = torch.tensor([[5, 6, 7, 8, 0], [5, 6, 8, 9, 1], [4, 3, 2, 0, 0]])
    left, right = split_prompts(rows, torch.tensor([3, 2, 1]), 0)
    assert left.tolist() == [[5, 6, 7], [0, 5, 6], [0, 0, 4]]
    assert right.tolist() == [[8, 0, 0], [8, 9, 1], [3, 2, 0]]
    left, right = split_prompts(rows[:, :4] + 1, torch.tensor([2, 2, 1]), 9)
    assert left.tolist() == [[6, 7], [6, 7], [9, 5]] and right.tolist() == [[8, 9, 9], [9, 10, 9], [4, 3, 1]]


def _rules(*changes):
    return edited(_Rules, *changes)


def _grammar(*changes):
    return edited(ReviewGrammar, *changes)


PLANTED = {
    "_Rules": {
        "domains not equally likely": _rules(
            ("p * (1 - MODIFIED) / 2", "p * (1 - MODIFIED) * (0.7 if domain == 'film' else 0.3)")
        ),
        "domain forgotten in the adjectives": _rules(("adjective_valences(s.domain)", "adjective_valences('film')")),
        "opening with a verb of the other domain": _rules(("OPENING_VERBS[s.domain]", "OPENING_VERBS['film']")),
        "negation does not turn the word": _rules(("said = -sign if s.negated else sign", "said = sign")),
        "negation turns the meaning twice": _rules(("s.balance + sign, last", "s.balance + said, last")),
        "but keeps": _rules(('if s.link == "and" else -s.last', 'if s.link == "and" else s.last')),
        "and turns": _rules(('s.last if s.link == "and" else -s.last', '-s.last if s.link == "and" else s.last')),
        "link forgotten": _rules(("if s.link:", "if False:")),
        "not twice": _rules(("not s.intensified and not s.negated", "not s.intensified")),
        "intensified twice": _rules(("if not s.intensified:", "if True:")),
        "loyalty turned": _rules(("{1: LOYALTY, 0: 0.5, -1: 1 - LOYALTY}", "{1: 1 - LOYALTY, 0: 0.5, -1: LOYALTY}")),
        "balance forgotten between sentences": _rules(
            ("sentence=s.sentence + 1", "sentence=s.sentence + 1, balance=0")
        ),
        "one sentence more": _rules(("s.sentence < MAX_SENTENCES", "s.sentence <= MAX_SENTENCES")),
        "closing against the balance": _rules(("CLOSINGS[sign]", "CLOSINGS[-sign]")),
        "but and and equally likely": _rules(('("but", BUT), ("and", 1 - BUT)', '("but", 0.5), ("and", 0.5)')),
        "ends do not sum to one": _rules(("(1 - again) * (1 - more) * p", "(1 - more) * p")),
        "the last sentence always ends": _rules(("ANOTHER if s.sentence <", "ANOTHER if s.sentence + 1 <")),
    },
    "ReviewGrammar": {
        "padding counts": _grammar(("self.next_state[:, self.pad_id] = torch", "_ = torch")),
        "the dead come back": _grammar(
            ("self.next_state = torch.full(size, self.dead)", "self.next_state = torch.full(size, 0)")
        ),
        "the dead say anything": _grammar(
            ("probabilities[self.dead, self.pad_id] = 1.0", "probabilities[self.dead] = 1 / size[1]")
        ),
        "beginnings not shared": _grammar(("p / through[begun]", "p")),
        "state before the word": _grammar(
            (
                "state = self.next_state[state, column]\n            after.append(state)",
                "after.append(state)\n            state = self.next_state[state, column]",
            )
        ),
        "probabilities, not logarithms": _grammar(
            ("return self.log_table[self.walk(tokens)]", "return self.log_table[self.walk(tokens)].exp()")
        ),
        "any vocabulary": _grammar(("tokens.max() >= self.tokenizer.vocab_size", "False")),
        "negative numbers count from the end": _grammar(("tokens.min() < 0 or", "")),
        "any shape": _grammar(("tokens.ndim != 2 or tokens.shape[1] < 1", "False")),
        "padding is a word": _grammar(("word in (PAD, EOS) or ", "")),
        "unknown words are skipped": _grammar(
            (
                "if any(word in (PAD, EOS) or word not in self.tokenizer.index for word in text.split()):",
                "text = ' '.join(w for w in text.split() if w in self.tokenizer.index)\n        if False:",
            )
        ),
        "an unfinished text accepted": _grammar(
            ("eos=True", "eos=False"),
            ('state != self.dead and self.states[state][0].phase == "end"', "state != self.dead"),
        ),
        "the most likely word only": _grammar(
            ("drawn = (cdf <= u * cdf[:, -1:]).sum(1, keepdim=True)", "drawn = torch.zeros(count, 1).long()")
        ),
        "words equally likely": _grammar(
            (
                "drawn = (cdf <= u * cdf[:, -1:]).sum(1, keepdim=True)",
                "drawn = (u * (self.log_table[state] > -torch.inf).sum(1, keepdim=True)).long()",
            )
        ),
        "one draw for all": _grammar(
            ("torch.rand(count, 1,", "torch.rand(1, 1,"), ("drawn = (cdf", "drawn = (0 * cdf + cdf")
        ),
        "global generator": _grammar(("generator=generator", "generator=torch.default_generator")),
        "the colon opens the review": _grammar(("is_prompt.sum(1) + 1", "is_prompt.sum(1)")),
        "no sample is fine": _grammar(("if count < 1:", "if count < 0:")),
        "entropy with the prompt": _grammar(('not in ("prompt", "end")', 'not in ("end",)')),
        "the end token does not count": _grammar(
            (
                "tokens += float(reached[counts].sum())",
                "tokens += float(reached[counts].sum()) - float((reached * p[:, 1])[counts].sum())",
            )
        ),
        "entropy in bits": _grammar(("return nats, tokens", "return nats / 0.6931471805599453, tokens")),
        "entropy of half the way": _grammar(("while reached.sum() > 1e-15", "while reached.sum() > 0.5")),
    },
    "word_weights": {
        "equal": lambda words: [(w, 1 / len(words)) for w in words],
        "not normalised": lambda words: [(w, 1 / (r + 3)) for r, w in enumerate(words)],
        "ranks from 1": lambda words: [(w, p) for w, (_, p) in zip(words, word_weights(["", *words])[1:], strict=True)],
        "in alphabetic order": lambda words: word_weights(sorted(words, reverse=True)),
        "1/(rank + 1)": edited(word_weights, ("rank + 3", "rank + 1")),
    },
    "sign_of": {
        "zero is positive": lambda x: 1 if x >= 0 else -1,
        "itself": lambda x: x,
        "turned": lambda x: -sign_of(x),
    },
    "adjective_valences": {
        "common words only": lambda domain: {
            w: v
            for w, v in adjective_valences(domain).items()
            if w in adjective_valences("film") and w in adjective_valences("product")
        },
        "both domains": lambda domain: adjective_valences("film") | adjective_valences("product"),
        "signs only": lambda domain: {w: sign_of(v) for w, v in adjective_valences(domain).items()},
        "own words first": edited(
            adjective_valences, ('groups["both"] + " " + groups[domain]', 'groups[domain] + " " + groups["both"]')
        ),
        "domains swapped": lambda domain: adjective_valences({"film": "product", "product": "film"}[domain]),
    },
    "split_prompts": {
        "prompts padded on the right": lambda rows, lengths, pad_id: (
            torch.where(torch.arange(int(lengths.max())) < lengths[:, None], rows[:, : int(lengths.max())], pad_id),
            split_prompts(rows, lengths, pad_id)[1],
        ),
        "padded with 0": lambda rows, lengths, pad_id: split_prompts(rows, lengths, 0),
        "one token too early": lambda rows, lengths, pad_id: split_prompts(rows, (lengths - 1).clamp(min=1), pad_id),
        "one width of all rests": edited(split_prompts, ("[:, : int((right != pad_id).sum(1).max())]", "")),
        "rests not moved": lambda rows, lengths, pad_id: (
            split_prompts(rows, lengths, pad_id)[0],
            rows[:, int(lengths.max()) :],
        ),
    },
}
EXEMPT = {"State"}
