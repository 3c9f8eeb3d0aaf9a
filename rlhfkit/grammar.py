"""The language of the reviews: a grammar so regular that the exact distribution of every next word is known.

The grammar is a deterministic automaton over words: a text leads to one state, and the state has the distribution of
the next word. So likelihood and entropy are computed, not estimated. What makes it worth learning: under "not" an
opinion word means the opposite, after "but" the meaning must turn, after "and" it must stay, and the closing sentence
must agree with the balance of all the opinions before it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from rlhfkit import lexicon
from rlhfkit.tokenizer import EOS, PAD, WordTokenizer

MAX_SENTENCES = 3  # sentences with opinions, of one or two clauses each
OPENING, ANOTHER = 0.4, 0.45  # probability of an opening sentence; of one more sentence after the first or second
NEGATED, INTENSIFIED, SECOND_CLAUSE, BUT = 0.2, 0.3, 0.5, 0.35
LOYALTY = 0.7  # probability that an opinion has the sign of the balance so far
MODIFIED = 0.5  # probability that the prompt has a modifier: prompts have two lengths


class State(NamedTuple):
    """What the next word depends on, apart from the beginning of a phrase.

    - ``phase``: kind of phrase that comes next, a method of ``_Rules``.
    - ``domain``: "film" or "product", empty before it is known.
    - ``sentence``: which sentence with opinions, from 1.
    - ``clause``: first or second clause of it.
    - ``balance``: sum of the signs of the opinions so far.
    - ``last``: sign of the last opinion, 0 before the first.
    - ``link``: "but", "and" or nothing: what joins this clause to the one before.
    - ``negated``: "not" was said in this clause.
    - ``intensified``: an intensifier was said in this clause.
    """

    phase: str
    domain: str = ""
    sentence: int = 1
    clause: int = 1
    balance: int = 0
    last: int = 0
    link: str = ""
    negated: bool = False
    intensified: bool = False


Choice = tuple[str, float, State]  # a phrase, its probability, and where it leads


def word_weights(words: list[str]) -> list[tuple[str, float]]:
    """Probability of each word of a list: proportional to 1/(rank + 3), ranks from 0."""
    weights = [1 / (rank + 3) for rank in range(len(words))]
    return [(word, weight / sum(weights)) for word, weight in zip(words, weights, strict=True)]


class _Rules:
    """What can follow a state. The phrases of one state are prefix-free, and their probabilities sum to 1."""

    def prompt(self, s: State) -> Iterator[Choice]:
        for domain in lexicon.DOMAINS:
            after = State("opening", domain)
            for item, p in word_weights(lexicon.ITEMS[domain].split()):
                yield f"review of a {item} :", p * (1 - MODIFIED) / 2, after
                for modifier, q in word_weights(lexicon.MODIFIERS[domain].split()):
                    yield f"review of a {modifier} {item} :", p * q * MODIFIED / 2, after

    def opening(self, s: State) -> Iterator[Choice]:
        yield "the", 1 - OPENING, s._replace(phase="aspect")
        for verb, p in word_weights(lexicon.OPENING_VERBS[s.domain].split()):
            for time, q in word_weights(list(lexicon.OPENING_TIMES)):
                for end, r in word_weights(list(lexicon.OPENING_ENDS)):
                    yield f"i {verb} it {time} {end} the", OPENING * p * q * r, s._replace(phase="aspect")

    def aspect(self, s: State) -> Iterator[Choice]:
        for aspect, p in word_weights(lexicon.ASPECTS[s.domain].split()):
            yield aspect, p, s._replace(phase="copula")

    def copula(self, s: State) -> Iterator[Choice]:
        for copula, p in word_weights(lexicon.COPULAS.split()):
            yield copula, p, s._replace(phase="opinion")

    def opinion(self, s: State) -> Iterator[Choice]:
        rest = 1.0
        if not s.intensified and not s.negated:
            rest -= NEGATED
            yield "not", NEGATED, s._replace(negated=True)
        if not s.intensified:
            rest -= INTENSIFIED
            for word, p in word_weights(lexicon.INTENSIFIERS.split()):
                yield word, INTENSIFIED * p, s._replace(intensified=True)
        positive = self.chance_of_positive(s)
        for sign, chance in ((1, positive), (-1, 1 - positive)):
            said = -sign if s.negated else sign  # the sign of the word, where `sign` is what the clause means
            words = [w for w, valence in lexicon.adjective_valences(s.domain).items() if valence * said > 0]
            last = sign if s.clause == 1 else 0  # a second clause is the last of its sentence
            after = State("link", s.domain, s.sentence, s.clause, s.balance + sign, last)
            for word, p in word_weights(words):
                if chance > 0:
                    yield word, rest * chance * p, after

    def chance_of_positive(self, s: State) -> float:
        if s.link:
            sign = s.last if s.link == "and" else -s.last
            return float(sign > 0)
        return {1: LOYALTY, 0: 0.5, -1: 1 - LOYALTY}[sign_of(s.balance)]

    def link(self, s: State) -> Iterator[Choice]:
        again = SECOND_CLAUSE if s.clause == 1 else 0.0
        more = ANOTHER if s.sentence < MAX_SENTENCES else 0.0
        after = s._replace(clause=1, link="", last=0)
        if again:
            for word, p in (("but", BUT), ("and", 1 - BUT)):
                yield f", {word} the", again * p, s._replace(phase="aspect", clause=2, link=word)
        if more:
            yield ". the", (1 - again) * more, after._replace(phase="aspect", sentence=s.sentence + 1)
        sign = sign_of(s.balance)
        for phrase, p in word_weights(list(lexicon.CLOSINGS[sign])):
            yield f". {phrase} {EOS}", (1 - again) * (1 - more) * p, State("end")

    def end(self, s: State) -> Iterator[Choice]:
        yield PAD, 1.0, s


def sign_of(x: int) -> int:
    """1, 0 or -1."""
    return (x > 0) - (x < 0)


class ReviewGrammar:
    """The exact distribution over prompts and reviews, as tables of an automaton.

    It is a policy like any other: ``logits(tokens)`` gives the log-probabilities of the next word after every position,
    so the sampler, the loss functions and the KL divergences take it unchanged, as a teacher or as a reference.

    Attributes:
        tokenizer: of the vocabulary, V words.
        states: S pairs of a :class:`State` and the words of the unfinished phrase.
        log_table: log-probability of every word in every state, (S, V), nats, double precision, -inf where forbidden.
        next_state: where every word leads, (S, V); a forbidden word leads to ``dead``.
        start: number of the state before the first word of a prompt.
        dead: number of the state in which a text has left the grammar; only padding follows.
    """

    def __init__(self) -> None:
        self.states: list[tuple[State, str]] = []
        arcs = self._explore()
        words = dict.fromkeys(word for _, word, _, _ in arcs if word not in (PAD, EOS))
        self.tokenizer = WordTokenizer(words)
        self.pad_id, self.eos_id = self.tokenizer.pad_id, self.tokenizer.eos_id
        self.dead = len(self.states)
        size = (self.dead + 1, self.tokenizer.vocab_size)
        probabilities = torch.zeros(size, dtype=torch.float64)
        self.next_state = torch.full(size, self.dead)
        for source, word, p, target in arcs:
            probabilities[source, self.tokenizer.index[word]] = p
            self.next_state[source, self.tokenizer.index[word]] = target
        probabilities[self.dead, self.pad_id] = 1.0
        self.next_state[:, self.pad_id] = torch.arange(self.dead + 1)  # padding to the left of a prompt changes nothing
        self.log_table, self.start = probabilities.log(), 0
        degree = int((probabilities > 0).sum(1).max())
        largest, self._words = probabilities.topk(degree, dim=1)  # the few possible words of each state, for sampling
        self._cdf = largest.cumsum(1)

    def _explore(self) -> list[tuple[int, str, float, int]]:
        """Every reachable state, and the arcs between them: (source, word, probability, target)."""
        rules, arcs = _Rules(), []
        numbers: dict[tuple[State, str], int] = {}

        def number(state: State, begun: str) -> int:
            if (state, begun) not in numbers:
                numbers[state, begun] = len(numbers)
                self.states.append((state, begun))
            return numbers[state, begun]

        number(State("prompt"), "")
        explored = 0
        while explored < len(self.states):
            state, begun = self.states[explored]
            if begun == "":  # all phrases of a state are laid out at once
                arcs += self._lay_out(state, list(getattr(rules, state.phase)(state)), number)
            explored += 1
        return arcs

    @staticmethod
    def _lay_out(state: State, choices: list[Choice], number) -> list[tuple[int, str, float, int]]:  # type: ignore[no-untyped-def]
        """Phrases that begin alike share their beginning: a tree with the probability that flows through each arc."""
        flow: dict[tuple[str, str], float] = {}
        through: dict[str, float] = {}
        ends: dict[tuple[str, str], State] = {}
        for phrase, p, after in choices:
            begun = ""
            for word in phrase.split():
                flow[begun, word] = flow.get((begun, word), 0.0) + p
                through[begun] = through.get(begun, 0.0) + p
                last, begun = begun, f"{begun} {word}".strip()
            ends[last, word] = after
        arcs = []
        for (begun, word), p in flow.items():
            target = (
                number(ends[begun, word], "") if (begun, word) in ends else number(state, f"{begun} {word}".strip())
            )
            arcs.append((number(state, begun), word, p / through[begun], target))
        return arcs

    def walk(self, tokens: Tensor) -> Tensor:
        """State after every position: (B, L) -> (B, L)."""
        state = torch.full((len(tokens),), self.start)
        after = []
        for column in tokens.unbind(1):
            state = self.next_state[state, column]
            after.append(state)
        return torch.stack(after, 1)

    def logits(self, tokens: Tensor) -> Tensor:
        """Exact log-probabilities of the next word after every position, (B, L) -> (B, L, V), nats, double precision.

        Args:
            tokens: (B, L), integers: a prompt, possibly padded on the left, and the review so far. After its end, or
                once a text has left the grammar, all probability is on padding.

        Returns:
            (B, L, V), -inf where a word is impossible.

        Raises:
            ValueError: if ``tokens`` is not (B, L) or holds a number that is not a token.
        """
        if tokens.ndim != 2 or tokens.shape[1] < 1:
            raise ValueError(f"tokens: got shape {tuple(tokens.shape)}, expected (B, L) with L at least 1")
        if tokens.numel() and (tokens.min() < 0 or tokens.max() >= self.tokenizer.vocab_size):
            got = f"[{int(tokens.min())}, {int(tokens.max())}]"
            raise ValueError(f"tokens: got numbers in {got}, expected [0, {self.tokenizer.vocab_size - 1}]")
        return self.log_table[self.walk(tokens)]

    def parameters(self) -> list[Tensor]:
        """Nothing to train."""
        return []

    def accepts(self, text: str) -> bool:
        """Whether a text is a whole prompt with a whole review: the grammar gives it a positive probability."""
        if any(word in (PAD, EOS) or word not in self.tokenizer.index for word in text.split()):
            return False
        tokens = torch.tensor([self.tokenizer.encode(text, eos=True)])
        state = int(self.walk(tokens)[0, -1])
        return state != self.dead and self.states[state][0].phase == "end"

    def sample_tokens(self, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw prompts with reviews.

        Args:
            count: B, at least 1.
            generator: source of randomness, on the CPU.

        Returns:
            prompts, (B, L0), padded on the left, and reviews, (B, T), each closed by the end token and padded on the
            right.
        """
        if count < 1:
            raise ValueError(f"count: got {count}, expected at least 1")
        state, columns = torch.full((count,), self.start), []
        end = self.states.index((State("end"), ""))
        while (state != end).any():
            u = torch.rand(count, 1, generator=generator, dtype=torch.float64)
            cdf = self._cdf[state]
            drawn = (cdf <= u * cdf[:, -1:]).sum(1, keepdim=True)
            column = self._words[state].gather(1, drawn).squeeze(1)
            columns.append(column)
            state = self.next_state[state, column]
        rows = torch.stack(columns, 1)
        is_prompt = (rows == self.tokenizer.index[":"]).long().cumsum(1) == 0
        lengths = is_prompt.sum(1) + 1  # the colon belongs to the prompt
        return split_prompts(rows, lengths, self.pad_id)

    def entropy(self) -> tuple[float, float]:
        """Exact expected surprise and length of a review, given its prompt.

        With v(s) the expected number of visits of state s, E[-log p] = sum over s of v(s) H(s), and E[tokens] = sum of
        v(s), over the states that follow the prompt; the end token counts.

        Returns:
            E[-log p] in nats per review, and E[tokens]. Their ratio is the entropy per token.
        """
        p = self.log_table.exp()
        surprise = -torch.where(p > 0, p * self.log_table, torch.zeros_like(p)).sum(1)
        counts = torch.tensor([state.phase not in ("prompt", "end") for state, _ in self.states] + [False])
        reached = torch.zeros(self.dead + 1, dtype=torch.float64)
        reached[self.start] = 1.0
        nats = tokens = 0.0
        ended = torch.tensor([state.phase == "end" for state, _ in self.states] + [True])
        while reached.sum() > 1e-15:
            nats += float((reached * surprise)[counts].sum())
            tokens += float(reached[counts].sum())
            flow = reached.unsqueeze(1) * p
            reached = torch.zeros_like(reached).index_add(0, self.next_state.flatten(), flow.flatten())
            reached[ended] = 0.0
        return nats, tokens


def split_prompts(rows: Tensor, lengths: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """Cut rows into prompts of the given lengths, padded on the left, and what follows, padded on the right.

    Args:
        rows: (B, L), integers.
        lengths: tokens of each prompt, (B,), at least 1.
        pad_id: what fills the gaps.

    Returns:
        (B, L0) and (B, T), L0 the longest prompt, T the longest rest.
    """
    width, after = int(lengths.max()), lengths.unsqueeze(1)
    gap = torch.full((len(rows), width), pad_id)
    padded = torch.cat([gap, rows, gap], 1)
    left = padded.gather(1, torch.arange(width) + after)
    right = padded.gather(1, torch.arange(rows.shape[1]) + width + after)
    return left, right[:, : int((right != pad_id).sum(1).max())]
