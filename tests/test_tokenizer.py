"""The tokenizer of whole words: there and back, padding on the asked side, and nothing unknown gets in."""

import torch

from planting import edited, raises
from rlhfkit.tokenizer import WordTokenizer

WORDS = ["the", "plot", "was", "good", "."]


def test_numbers_are_by_hand(WordTokenizer=WordTokenizer):
    tokenizer = WordTokenizer(iter(WORDS))
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.vocab_size) == (0, 1, 7)
    assert tokenizer.words == ["<pad>", "<eos>", *WORDS]
    assert tokenizer.encode("the  plot\twas good .\n") == [2, 3, 4, 5, 6]
    assert tokenizer.encode("good the", eos=True) == [5, 2, 1]
    assert (tokenizer.encode(""), tokenizer.encode("", eos=True)) == ([], [1])


def test_every_text_comes_back(WordTokenizer=WordTokenizer):
    """For all texts of up to three words, ended or not, in a list or in a tensor, among padding or not."""
    tokenizer = WordTokenizer(WORDS)
    for a in WORDS:
        for b in WORDS:
            for text in (a, f"{a} {b}", f"{b} {a} {b}"):
                for ids in (tokenizer.encode(text), tokenizer.encode(text, eos=True)):
                    assert tokenizer.decode(ids) == text
                    assert tokenizer.decode(torch.tensor([0, 0, *ids, 0])) == text


def test_a_text_stops_at_its_first_end(WordTokenizer=WordTokenizer):
    tokenizer = WordTokenizer(WORDS)
    assert tokenizer.decode([2, 0, 3, 1, 4, 1, 5]) == "the <pad> plot"
    assert tokenizer.decode([1, 2]) == "" and tokenizer.decode([]) == "" and tokenizer.decode([0, 0]) == ""


def test_a_number_that_is_no_token_is_refused(WordTokenizer=WordTokenizer):
    tokenizer = WordTokenizer(WORDS)
    for wrong in (-1, 7):
        raises(ValueError, lambda i=wrong: tokenizer.decode([2, i]), "ids", str(wrong), "[0, 6]")
        raises(ValueError, lambda i=wrong: tokenizer.decode(torch.tensor([1, i])), "ids", str(wrong))


def test_an_unknown_word_is_named_with_its_place_and_what_was_meant(WordTokenizer=WordTokenizer):
    tokenizer = WordTokenizer(WORDS)
    raises(ValueError, lambda: tokenizer.encode("the plott was"), "text", "'plott'", "position 1", "nearest: plot")
    raises(ValueError, lambda: tokenizer.encode_batch(["the", "the The"], "left"), "'The'", "position 1", "the")
    try:
        tokenizer.encode("xyzzy")
    except ValueError as error:
        assert "nearest" not in str(error) and "'xyzzy'" in str(error)


def test_a_batch_is_padded_on_the_asked_side(WordTokenizer=WordTokenizer):
    tokenizer = WordTokenizer(WORDS)
    texts = ["good", "the plot was", "was good"]
    assert tokenizer.encode_batch(texts, "left").tolist() == [[0, 0, 5], [2, 3, 4], [0, 4, 5]]
    assert tokenizer.encode_batch(texts, "right").tolist() == [[5, 0, 0], [2, 3, 4], [4, 5, 0]]
    assert tokenizer.encode_batch(texts[::2], "right", eos=True).tolist() == [[5, 1, 0], [4, 5, 1]]
    assert tokenizer.encode_batch(texts[:1], "left", True).tolist() == [[5, 1]]
    assert tokenizer.encode_batch(["", "the"], "right", eos=True).tolist() == [[1, 0], [2, 1]]
    assert tokenizer.encode_batch(texts, "left").dtype == torch.long


def test_bad_batches_are_named(WordTokenizer=WordTokenizer):
    tokenizer = WordTokenizer(WORDS)
    for side in ("Left", "", None):
        raises(ValueError, lambda s=side: tokenizer.encode_batch(["the"], s), "side", repr(side), "'left' or 'right'")
    raises(ValueError, lambda: tokenizer.encode_batch([], "left"), "texts", "no text")
    raises(ValueError, lambda: tokenizer.encode_batch(["the", " "], "left"), "texts", "empty text at position 1")


def test_a_vocabulary_has_every_word_once_and_none_with_spaces(WordTokenizer=WordTokenizer):
    raises(ValueError, lambda: WordTokenizer(["the", "plot", "the"]), "words", "'the'", "once")
    for special in ("<pad>", "<eos>"):
        raises(ValueError, lambda s=special: WordTokenizer(["the", s]), "words", special)
    for word in ("two words", "", " ", "end\n"):
        raises(ValueError, lambda w=word: WordTokenizer(["the", w]), "words", repr(word), "white space")


def _tokenizer(*changes):
    return edited(WordTokenizer, *changes)


PLANTED = {
    "WordTokenizer": {
        "padding and end swapped": _tokenizer(("pad_id, eos_id = 0, 1", "pad_id, eos_id = 1, 0")),
        "unknown words become padding": _tokenizer(
            ("if word not in self.index:", "if False:"), ("self.index[word])", "self.index.get(word, 0))")
        ),
        "unknown words are left out": _tokenizer(("near = difflib", "continue\n                near = difflib")),
        "position counted in letters": _tokenizer(("at position {position}", "at position {text.index(word)}")),
        "padding offered as the nearest word": _tokenizer(
            ("word, self.words[2:], n=3)", "word, ['<pad>'], n=3, cutoff=0.0)")
        ),
        "case ignored": _tokenizer(("enumerate(text.split())", "enumerate(text.lower().split())")),
        "end forgotten": _tokenizer(("return ids + [self.eos_id] * eos", "return ids")),
        "reads past the end": _tokenizer(("numbers = numbers[: numbers.index(self.eos_id)]", "pass")),
        "stops at padding": _tokenizer(
            ("if self.eos_id in numbers:", "if 0 in numbers:\n            return ''\n        if 1 in numbers:")
        ),
        "padding is read aloud": _tokenizer(("numbers[places[0] : places[-1] + 1] if places else []", "numbers")),
        "padding inside is hidden": _tokenizer(
            ("numbers[places[0] : places[-1] + 1] if places else []", "[i for i in numbers if i != self.pad_id]")
        ),
        "numbers from the end": _tokenizer(("not 0 <= i <", "not -self.vocab_size <= i <")),
        "sides swapped": _tokenizer(('side == "left" else', 'side == "right" else')),
        "padded with the end": _tokenizer(("[[self.pad_id] *", "[[self.eos_id] *")),
        "cut to the shortest": _tokenizer(
            ("length = max(map", "length = min(map"), ("(padded)", "([r[:length] for r in padded])")
        ),
        "any side is right": _tokenizer(('if side not in ("left", "right")', "if False")),
        "an empty text passes": _tokenizer(("if not rows or empty", "if not rows")),
        "repetition passes": _tokenizer(("len(self.index) < len(self.words)", "False")),
        "spaces pass": _tokenizer(("word.split() != [word]", "not word")),
        "unended batch": _tokenizer(("self.encode(text, eos) for", "self.encode(text) for")),
    },
}
EXEMPT = set()
