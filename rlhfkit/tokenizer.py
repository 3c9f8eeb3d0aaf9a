"""A tokenizer of whole words: one word, one token, and an error for a word it does not know."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

PAD, EOS = "<pad>", "<eos>"


class WordTokenizer:
    """Words to numbers and back.

    Token 0 is padding and token 1 ends a response; the words follow in the order given. There is no token for unknown
    words: a text with one is refused, since a silent replacement would change what the annotators and the judge read.

    Args:
        words: the vocabulary, without repetition and without spaces.

    Raises:
        ValueError: if a word is empty, repeated, contains white space, or is ``<pad>`` or ``<eos>``.
    """

    pad_id, eos_id = 0, 1

    def __init__(self, words: Iterable[str]) -> None:
        self.words = [PAD, EOS, *words]
        self.index = {word: number for number, word in enumerate(self.words)}
        if len(self.index) < len(self.words):
            repeated = sorted({word for word in self.words if self.words.count(word) > 1})
            raise ValueError(f"words: got {repeated[:5]} more than once, expected every word once")
        for word in self.words:
            if word.split() != [word]:
                raise ValueError(f"words: got {word!r}, expected words without white space")

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens, padding and end included."""
        return len(self.words)

    def encode(self, text: str, eos: bool = False) -> list[int]:
        """Numbers of the words of a text.

        Args:
            text: words between white space.
            eos: add the end token.

        Returns:
            One number per word.

        Raises:
            ValueError: if a word is unknown; names it, its position and the nearest known words.
        """
        ids = []
        for position, word in enumerate(text.split()):
            if word not in self.index:
                near = difflib.get_close_matches(word, self.words[2:], n=3)
                help_text = f"; nearest: {', '.join(near)}" if near else ""
                raise ValueError(f"text: got the unknown word {word!r} at position {position}{help_text}")
            ids.append(self.index[word])
        return ids + [self.eos_id] * eos

    def decode(self, ids: Sequence[int] | Tensor) -> str:
        """Text of a row of tokens, which stops at the first end token.

        Args:
            ids: (L,), integers. Padding before the first word is dropped, and after the last one if there is no end
                token. Elsewhere it was chosen by somebody, and comes out as the word ``<pad>``.

        Returns:
            The words, with a space between two.

        Raises:
            ValueError: if a number is not a token.
        """
        numbers = ids.tolist() if isinstance(ids, Tensor) else list(ids)
        wrong = [i for i in numbers if not 0 <= i < self.vocab_size]
        if wrong:
            raise ValueError(f"ids: got {wrong[:3]}, expected numbers in [0, {self.vocab_size - 1}]")
        places = [place for place, i in enumerate(numbers) if i != self.pad_id]
        numbers = numbers[places[0] : places[-1] + 1] if places else []
        if self.eos_id in numbers:
            numbers = numbers[: numbers.index(self.eos_id)]
        return " ".join(self.words[i] for i in numbers)

    def encode_batch(self, texts: Sequence[str], side: str, eos: bool = False) -> Tensor:
        """Tokens of several texts, padded to one length.

        Args:
            texts: B texts.
            side: where the padding goes: "left" for prompts, so that a response can follow, "right" for responses.
            eos: add the end token to every text.

        Returns:
            (B, L), integers, L the length of the longest text.

        Raises:
            ValueError: if ``side`` is neither, there is no text, a text has no token, or a word is unknown.
        """
        if side not in ("left", "right"):
            raise ValueError(f"side: got {side!r}, expected 'left' or 'right'")
        rows = [self.encode(text, eos) for text in texts]
        empty = [i for i, row in enumerate(rows) if not row]
        if not rows or empty:
            got = f"an empty text at position {empty[0]}" if empty else "no text"
            raise ValueError(f"texts: got {got}, expected at least one text of at least one word")
        length = max(map(len, rows))
        pads = [[self.pad_id] * (length - len(row)) for row in rows]
        padded = [pad + row if side == "left" else row + pad for pad, row in zip(pads, rows, strict=True)]
        return torch.tensor(padded)
