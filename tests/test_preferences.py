"""Files of preference pairs: three forms read, one written, every bad line named; and agreement with a judge."""

import json
import math
import os
import random
import tempfile
import warnings
from pathlib import Path

import pytest

from planting import close, edited, f64, raises, replaced
from rlhfkit import preferences as module
from rlhfkit.preferences import judge_agreement, read_pairs, write_pairs
from rlhfkit.tasks import Pair


def read(read_pairs, content, **settings):
    """The pairs in a file with this content, bytes or text."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        try:
            return read_pairs(path, **settings)
        except ValueError as error:
            assert str(path) in str(error)
            raise


def reads(read_pairs, content, expected):
    """Assert, also where it raises, what is read."""
    try:
        got = read(read_pairs, content)
    except Exception as error:
        raise AssertionError(f"{content!r}: {error!r}") from error
    assert got == expected, content


def line(**fields):
    return json.dumps(fields)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


GOOD = line(prompt="p", chosen="a", rejected="b")


def test_explicit_pairs_are_read_as_they_are(read_pairs=read_pairs):
    reads(
        read_pairs,
        line(prompt="The sky is", chosen=" blue.", rejected=" green.", margin=0.5, score=3, label=True)
        + "\n"
        + line(rejected=" x\u2028\n\u0085", chosen="", prompt="  p ", margin=None),
        [Pair("The sky is", " blue.", " green.", 0.5), Pair("  p ", "", " x\u2028\n\u0085")],
    )


IMPLICIT = [  # chosen, rejected, end of the prompt
    ("The sky is blue.", "The sky is green.", len("The sky is")),
    ("The sky is blue.", "The sky is black.", len("The sky is")),  # not within a word
    ("The sky is", "The sky is green", len("The sky")),  # something is left of both
    ("The sky  is", "The sky was", len("The sky")),  # all the white space belongs to the responses
    ("The sky  is", "The sky  was", len("The sky")),
    ("The sky\nis", "The sky was", len("The sky")),
    ("Is it? Yes", "Is it? Yes, so", len("Is it?")),
    ("a b", "a c", 1),
]


def test_an_implicit_prompt_is_the_common_beginning_up_to_the_end_of_a_word(read_pairs=read_pairs):
    for chosen, rejected, n in IMPLICIT:
        for a, b in ((chosen, rejected), (rejected, chosen)):
            reads(read_pairs, line(chosen=a, rejected=b), [Pair(a[:n], a[n:], b[n:])])


def test_a_conversation_becomes_text(read_pairs=read_pairs):
    single = [user("What?")], [assistant(" This.")], [assistant("That.")]
    several = [{"role": "system", "content": "Be kind."}, user("Who?")], [assistant("I."), user("Hm")], [assistant("")]
    for (prompt, chosen, rejected), expected in (
        (single, Pair("What?", " This.", "That.")),
        (several, Pair("system: Be kind.\nuser: Who?", "assistant: I.\nuser: Hm", "")),
    ):
        reads(read_pairs, line(prompt=prompt, chosen=chosen, rejected=rejected), [expected])
        reads(read_pairs, line(chosen=prompt + chosen, rejected=prompt + rejected), [expected])


def test_marks_line_ends_and_blank_lines_of_other_systems_do_no_harm(read_pairs=read_pairs):
    expected = [Pair("p", "a", "b"), Pair("ö", "\u2028", "b")]
    other = json.dumps({"prompt": "ö", "chosen": "\u2028", "rejected": "b"}, ensure_ascii=False)
    for content in (
        f"{GOOD}\n{other}\n",
        f"{GOOD}\n{other}",
        f"\ufeff{GOOD}\r\n\r\n  \r\n{other}\r\n\r\n",
        f"\n\n{GOOD}\n \t\n{other}\n\n",
    ):
        reads(read_pairs, content, expected)
    reads(read_pairs, "", [])


BAD = {  # line: a word of the error
    "not JSON": "JSON",
    '{"prompt": "p", "chosen": "a", "rejected": "b"': "JSON",
    b"\xff\xfe{}": "UTF-8",
    b'{"prompt": "\xe9", "chosen": "a", "rejected": "b"}': "UTF-8",
    "[" * 100_000: "JSON",
    "[1, 2]": "list",
    "null": "NoneType",
    line(prompt="p", chosen="a"): "rejected: missing",
    line(prompt="p", rejected="a"): "chosen: missing",
    line(prompt="p", completion="a", label=True): "unpaired",
    line(prompt=None, chosen="x a", rejected="x b"): "prompt",
    line(prompt="", chosen="a", rejected="b"): "prompt: got an empty",
    line(chosen="blue", rejected="black"): "prompt: got an empty",
    line(chosen="", rejected="black"): "prompt: got an empty",
    line(prompt="p", chosen="a", rejected="a"): "chosen, rejected",
    line(chosen="p a", rejected="p a"): "chosen, rejected",
    line(prompt="p", chosen="a", rejected=3): "chosen, rejected: got str and int",
    line(prompt="p", chosen=None, rejected=None): "chosen, rejected",
    line(prompt=["p"], chosen="a", rejected="b"): "prompt: got list",
    line(prompt="p", chosen=[assistant("a")], rejected=[assistant("b")]): "prompt: got str",
    line(prompt=[], chosen=[assistant("a")], rejected=[assistant("b")]): "prompt: got no message",
    line(chosen=[user("p")], rejected=[user("p"), assistant("b")]): "chosen: got no message",
    line(prompt=[user("p")], chosen=["a"], rejected=[assistant("b")]): "chosen: got the message",
    line(prompt=[user("p")], chosen=[assistant("a")], rejected=[{"content": "b"}]): "rejected: got the message",
    line(prompt=[user(["p"])], chosen=[assistant("a")], rejected=[assistant("b")]): "prompt: got the message",
    line(prompt="p", chosen="\ud800", rejected="b"): "chosen: got half of a surrogate pair",
    line(prompt="p", chosen="a", rejected="b", margin="1"): "margin",
    line(prompt="p", chosen="a", rejected="b", margin=float("nan")): "margin",
}


def as_bytes(text):
    return text if isinstance(text, bytes) else text.encode()


def test_a_bad_line_is_named_with_its_field(read_pairs=read_pairs):
    for bad, word in BAD.items():
        content = GOOD.encode() + b"\n\n" + as_bytes(bad) + b"\n" + GOOD.encode()
        raises(ValueError, lambda c=content: read(read_pairs, c), "line 3", word)


def test_on_request_the_good_lines_are_read_and_the_bad_ones_reported(read_pairs=read_pairs):
    content = b"\n".join([GOOD.encode(), *map(as_bytes, BAD), GOOD.encode()])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        got = read(read_pairs, content, skip_bad=True)
        assert read(read_pairs, GOOD, skip_bad=True) == got[:1] == got[1:] == [Pair("p", "a", "b")]
    (warning,) = caught or [None]
    assert warning is not None, "no warning"
    for words in (f"{len(BAD)} of {len(BAD) + 2} lines", ": 2, 3, 4,", f", {len(BAD) + 1};", "expected JSON"):
        assert words in str(warning.message)
    assert warning.filename == __file__


PAIRS = [
    Pair("p", "a", "b"),
    Pair('"q"\\', " tab\t", "line\nend\r\u2028\u0085\ufeff", -0.1),
    Pair("größe 🙂", "", "<b>", 1e-300),
    Pair("p", "a", "b", 2.0),
]


def test_pairs_survive_the_file_and_the_file_its_pairs(write_pairs=write_pairs):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        write_pairs(path, iter(PAIRS))
        data = path.read_bytes()
        assert read_pairs(path) == PAIRS
        write_pairs(path, read_pairs(path))
        assert path.read_bytes() == data
        assert data.startswith(b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n{"')
        assert data.endswith(b'"margin": 2.0}\n') and data.count(b"\n") == len(PAIRS) and "größe 🙂".encode() in data
        write_pairs(path, [])
        assert path.read_bytes() == b""
        assert os.listdir(folder) == ["pairs.jsonl"]


def test_what_could_not_be_read_again_is_not_written(write_pairs=write_pairs):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        path.write_bytes(b"old")
        for bad, word in ((Pair("", "a", "b"), "prompt"), (Pair("p", "\udc80", "b"), "chosen")):
            raises(ValueError, lambda b=bad: write_pairs(path, [PAIRS[0], b]), "pairs[1]", word)
            assert path.read_bytes() == b"old"


def test_an_interrupted_write_leaves_the_old_file(write_pairs=write_pairs):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pairs.jsonl"
        path.write_bytes(b"old")
        with replaced(os, replace=interrupted):
            try:
                write_pairs(path, PAIRS)
            except KeyboardInterrupt:
                pass
        assert path.read_bytes() == b"old"


def length(prompt, response):
    return len(response)


def test_agreement_counts_ties_half_and_has_the_standard_error_of_a_mean(judge_agreement=judge_agreement):
    pairs = [Pair("p", "aaa", "b"), Pair("p", "a", "b"), Pair("p", "a", "bb"), Pair("q", "aa", "b")]  # 1, 1/2, 0, 1
    got = judge_agreement(pairs, length)
    assert got.n == 4
    close(f64([got.rate, got.standard_error]), f64([0.625, (0.6875 / 3 / 4) ** 0.5]))  # squares .14, .02, .39, .14
    alone = judge_agreement(pairs[:1], length)
    assert (alone.rate, alone.n) == (1.0, 1) and math.isnan(alone.standard_error)
    assert str(got) == "0.625, standard error 0.239, n = 4"
    raises(ValueError, lambda: judge_agreement([], length), "pairs")


def test_the_judge_sees_the_prompt(judge_agreement=judge_agreement):
    pairs = [Pair("longer", "aa", "b"), Pair("shorter", "b", "aa")]
    assert judge_agreement(pairs, lambda p, r: len(r) if p == "longer" else -len(r)).rate == 1.0


def test_the_standard_error_is_the_spread_over_repetitions(judge_agreement=judge_agreement):
    """Resampled from pairs of which the judge agrees with 4 of 5, the rate spreads as the error says, on average."""
    draw = random.Random(0)
    population = [Pair("p", "aa", "b")] * 4 + [Pair("p", "a", "bb")]
    runs = [judge_agreement(draw.choices(population, k=50), length) for _ in range(2000)]
    mean = sum(run.rate for run in runs) / len(runs)
    spread = math.sqrt(sum((run.rate - mean) ** 2 for run in runs) / len(runs))
    told = math.sqrt(sum(run.standard_error**2 for run in runs) / len(runs))
    assert abs(told / spread - 1) < 0.06


def test_all_that_preferences_offers_is_there():
    assert all(hasattr(module, name) for name in module.__all__)
    with pytest.raises(ValueError, match="first, second"):
        module.Comparison("p", "a", "a")


def _swapped(path, pairs):
    write_pairs(path, [Pair(p.prompt, p.rejected, p.chosen, p.margin) for p in pairs])


def _with_helper(name, *changes):
    """read_pairs with one of the functions it uses changed."""
    names = dict(vars(module))
    helper = edited(getattr(module, name), *changes)

    def wrong(path, skip_bad=False):
        with replaced(module, **{name: helper}):
            return read_pairs(path, skip_bad)

    assert name in names
    return wrong


def _utf8_lines(path, skip_bad=False):
    """Splits at every line end that text can have."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        copy.write_text("\n".join(Path(path).read_text(errors="replace").splitlines()))
        return read_pairs(copy, skip_bad)


def _agreement(*changes):
    return edited(judge_agreement, *changes)


PLANTED = {
    "read_pairs": {
        "chosen and rejected swapped": lambda path, skip_bad=False: [
            Pair(p.prompt, p.rejected, p.chosen, p.margin) for p in read_pairs(path, skip_bad)
        ],
        "margin dropped": _with_helper("_pair", (', record.get("margin")', "")),
        "prompt cut within a word": _with_helper(
            "_last_word_end", ("a[i].isspace() and b[i].isspace() and not a[i - 1].isspace()", "True")
        ),
        "white space left in the prompt": _with_helper("_last_word_end", (" and not a[i - 1].isspace()", "")),
        "one side may be empty": _with_helper("_last_word_end", (", len(a) - 1, len(b) - 1", "")),
        "only the first message": _with_helper("_text", ('"\\n".join(lines)', 'value[0]["content"]')),
        "roles lost": _with_helper("_text", ("{message['role']}: ", "")),
        "texts stripped": _with_helper("_text", ("    return value", "    return value.strip()")),
        "null is no prompt": _with_helper("_pair", ('"prompt" not in record', 'record.get("prompt") is None')),
        "an empty prompt passes": _with_helper("_pair", ("if not pair.prompt:", "if False:")),
        "unknown letters replaced": _with_helper("_object", ("line.decode()", "line.decode(errors='replace')")),
        "a mark at the start": edited(read_pairs, ('.removeprefix(b"\\xef\\xbb\\xbf")', "")),
        "blank lines are bad": edited(read_pairs, ("if not line.strip():", "if False:")),
        "lines counted without blank ones": edited(
            read_pairs, ('enumerate(data.split(b"\\n"), 1)', 'enumerate(filter(bytes.strip, data.split(b"\\n")), 1)')
        ),
        "lines counted from 0": edited(read_pairs, (", 1):", "):")),
        "ends at every line end": _utf8_lines,
        "bad lines always left out": edited(read_pairs, ("if not skip_bad:", "if False:")),
        "left out without a word": edited(read_pairs, ("warnings.warn(text, stacklevel=2)", "pass")),
        "stops at the first bad line": edited(
            read_pairs, ("bad.append((number, error))", "bad.append((number, error)); break")
        ),
        "warns of itself": edited(read_pairs, ("stacklevel=2", "stacklevel=1")),
    },
    "write_pairs": {
        "chosen and rejected swapped": _swapped,
        "in place": edited(write_pairs, ("write_atomically(path, b", "Path(path).write_bytes(b")),
        "null margins": edited(write_pairs, (" if value is not None", "")),
        "margin dropped": edited(write_pairs, (" if value is not None", ' if name != "margin"')),
        "letters escaped": edited(write_pairs, (", ensure_ascii=False", "")),
        "not checked": edited(write_pairs, ("_pair(record)", "pass")),
        "no line end after the last": edited(write_pairs, (' + b"\\n")', ")"), ('b"".join', 'b"\\n".join')),
        "bad ones left out": edited(
            write_pairs, ('raise ValueError(f"pairs[{index}]: {error}") from error', "continue")
        ),
    },
    "judge_agreement": {
        "disagreement": _agreement(("1.0 if gap > 0", "1.0 if gap < 0")),
        "ties agree": _agreement(("0.5 if gap == 0", "1.0 if gap == 0")),
        "ties do not": _agreement(("0.5 if gap == 0", "0.0 if gap == 0")),
        "biased variance": _agreement(("/ (n - 1)", "/ n")),
        "deviation of one": _agreement(("math.sqrt(variance / n)", "math.sqrt(variance)")),
        "the prompt forgotten": _agreement(
            (
                "judge(pair.prompt, pair.chosen) - judge(pair.prompt, pair.rejected)",
                'judge("", pair.chosen) - judge("", pair.rejected)',
            )
        ),
    },
}
EXEMPT = {"Agreement"}
