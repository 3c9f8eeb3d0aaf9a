"""Comparisons, the sides they are shown on, and the file of labels: what it holds and what it refuses."""

import json
import tempfile
from pathlib import Path

from planting import edited, raises
from rlhfkit.label_store import Comparison, LabelStore, left_side
from rlhfkit.tasks import Pair
from test_journal import largest_file

ITEMS = [Comparison(f"prompt {i}", f"good {i}", f"bad {i}") for i in range(4)]


class folder(tempfile.TemporaryDirectory):
    """A folder that is gone after the test; the path of the label file in it."""

    def __enter__(self):
        return Path(super().__enter__()) / "labels.jsonl"


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_comparison_is_known_by_all_its_texts_and_their_order(Comparison=Comparison):
    texts = [("p", "a", "b"), ("p", "b", "a"), ("q", "a", "b"), ("pa", "a", "b"), ("p", "aa", "b"), ("p", "a", "bb")]
    texts += [("p", "aa", "a"), ("p", "a", "aa"), ("", "pa", "b"), ("p\n", "a", "b"), ("p", "", "ab"), ("p", "ab", "")]
    assert len({Comparison(*t).id for t in texts}) == len(texts)
    assert Comparison("p", "a", "b").id == Comparison("p", "a", "b").id == "5c74e27923240958"  # as in files of labels
    raises(ValueError, lambda: Comparison("p", "same", "same"), "first, second", "same")


def test_the_chosen_response_of_a_comparison_comes_first_in_its_pair(Comparison=Comparison):
    comparison = Comparison("p", "a", "b")
    assert comparison.pair("first") == Pair("p", "a", "b")
    assert comparison.pair("second") == Pair("p", "b", "a")


def test_the_left_side_is_a_fair_coin_fixed_by_seed_and_comparison(left_side=left_side):
    items = [Comparison("p", str(i), "x") for i in range(2000)]
    sides = {seed: [left_side(item, seed) for item in items] for seed in (0, 1)}
    assert all(left_side(item, 0) == side for item, side in zip(items, sides[0], strict=True))
    for tossed in sides.values():
        assert set(tossed) == {"first", "second"}
        assert abs(tossed.count("first") - 1000) < 135  # six standard deviations
    same = sum(a == b for a, b in zip(sides[0], sides[1], strict=True))
    assert abs(same - 1000) < 135


def test_a_label_is_a_line_with_all_that_was_said(LabelStore=LabelStore):
    with folder() as path, LabelStore(path, "ann") as store:
        store.record(ITEMS[0], "second", "second", 1.23456)
        store.record(ITEMS[1], "skip")
        first, second = lines(path)
        stamp = first.pop("time")
        assert stamp.endswith("+00:00") and len(stamp) == 29
        assert first == {
            "id": ITEMS[0].id,
            "choice": "second",
            "left": "second",
            "seconds": 1.235,
            "annotator": "ann",
        }
        assert second["choice"] == "skip" and second["seconds"] is None
        assert [label.id for label in store.labels] == [ITEMS[0].id, ITEMS[1].id]
        assert len(store) == 2 and store.path == path


def test_labels_become_pairs_in_the_order_of_the_comparisons(LabelStore=LabelStore):
    with folder() as path, LabelStore(path) as store:
        store.record(ITEMS[2], "first")
        store.record(ITEMS[0], "second")
        store.record(ITEMS[1], "skip")
        expected = [Pair("prompt 0", "bad 0", "good 0"), Pair("prompt 2", "good 2", "bad 2")]
        assert store.pairs(ITEMS) == expected
        assert store.pairs([*ITEMS, ITEMS[0]]) == expected
        assert store.pairs(ITEMS[1:2]) == []


def test_a_label_is_given_once_by_each_annotator(LabelStore=LabelStore):
    with folder() as path:
        for name, choice in (("ann", "first"), ("bob", "second")):
            with LabelStore(path, name) as store:
                assert store.find(ITEMS[0]) is None and store.last() is None
                store.record(ITEMS[0], choice)
                assert store.find(ITEMS[0]).choice == choice
                raises(ValueError, lambda s=store: s.record(ITEMS[0], "first"), ITEMS[0].id, name)
                size = path.stat().st_size
        with LabelStore(path, "ann") as store:
            both = [Pair("prompt 0", "good 0", "bad 0"), Pair("prompt 0", "bad 0", "good 0")]
            assert store.pairs(ITEMS) == both
            assert store.pairs(ITEMS, "bob") == both[1:]
            assert store.undo().annotator == "ann"
            assert store.pairs(ITEMS) == both[1:]
            raises(ValueError, store.undo, "ann")
        assert path.stat().st_size > size


def test_undo_adds_a_line_and_takes_back_the_latest_label(LabelStore=LabelStore):
    with folder() as path:
        with LabelStore(path) as store:
            raises(ValueError, store.undo, "undo", str(path))
            for item in ITEMS[:3]:
                store.record(item, "first")
            before = path.read_bytes()
            assert store.undo().id == ITEMS[2].id
            assert path.read_bytes().startswith(before) and len(lines(path)) == 4
            assert store.undo().id == ITEMS[1].id
            store.record(ITEMS[1], "second")
            assert store.last().id == ITEMS[1].id
            kept = store.labels
        assert [label.choice for label in kept] == ["first", "second"]
        with LabelStore(path) as store:
            assert store.labels == kept
            assert store.undo().id == ITEMS[1].id


def test_work_goes_on_where_it_stopped(LabelStore=LabelStore):
    with folder() as path:
        for item in ITEMS:
            with LabelStore(path) as store:
                assert store.find(item) is None
                store.record(item, "first", "second", 2.0)
                kept = store.labels
        with LabelStore(path) as store:
            assert store.labels == kept and len(kept) == len(ITEMS)


def test_a_torn_line_costs_that_label_only(LabelStore=LabelStore):
    with folder() as path:
        with LabelStore(path) as store:
            store.record(ITEMS[0], "first")
            whole = path.read_bytes()
            store.record(ITEMS[1], "first")
        data = path.read_bytes()
        for cut in (len(whole), len(whole) + 1, len(whole) + 40, len(data) - 2, len(data) - 1):
            path.write_bytes(data[:cut])
            with LabelStore(path) as store:
                assert (store.find(ITEMS[1]) is not None) == (cut == len(data) - 1)
                store.record(ITEMS[2], "second")
            with LabelStore(path) as store:
                assert store.find(ITEMS[0]) and store.find(ITEMS[2])


def test_on_a_full_disk_the_label_is_not_recorded_and_no_other_is_lost(LabelStore=LabelStore):
    with folder() as path, LabelStore(path) as store:
        store.record(ITEMS[0], "first")
        before = path.read_bytes()
        with largest_file(len(before) + 20):
            raises(OSError, lambda: store.record(ITEMS[1], "first"), str(path), "not saved", "the 1 before it")
            raises(OSError, store.undo, str(path))
        assert path.read_bytes() == before
        assert [label.id for label in store.labels] == [ITEMS[0].id] and store.find(ITEMS[1]) is None
        store.record(ITEMS[1], "second")
        assert len(lines(path)) == 2


def test_a_file_that_is_open_elsewhere_is_refused(LabelStore=LabelStore):
    with folder() as path:
        with LabelStore(path) as store:
            raises(BlockingIOError, lambda: LabelStore(path), str(path), "open in this process")
        raises(ValueError, lambda: store.record(ITEMS[0], "first"), str(path), "closed")
        LabelStore(path).close()


def test_what_is_no_label_is_refused_before_it_is_written(LabelStore=LabelStore):
    with folder() as path, LabelStore(path) as store:
        for arguments in (["left"], ["first", "right"], [None], ["first", None]):
            raises(
                ValueError, lambda a=arguments: store.record(ITEMS[0], *a), "choice" if len(arguments) == 1 else "left"
            )
        for seconds in (-1.0, float("nan"), float("inf")):
            raises(ValueError, lambda s=seconds: store.record(ITEMS[0], "first", "first", s), "seconds")
        assert path.read_bytes() == b"" and len(store) == 0
        store.record(ITEMS[0], "first", "first", 0.0)


def test_a_line_that_is_no_label_is_named_and_the_file_left_as_it_is(LabelStore=LabelStore):
    with folder() as path:
        with LabelStore(path) as store:
            store.record(ITEMS[0], "first")
        good = lines(path)[0]
        bad = {
            "choice": good | {"choice": "left"},
            "left": good | {"id": "1", "left": "right"},
            "seconds": good | {"id": "1", "seconds": "2"},
            "time": {k: v for k, v in good.items() if k != "time"},
            "margin": good | {"margin": 1},
            "annotator": good | {"annotator": 3},
            "undo": {"undo": "1", "annotator": good["annotator"], "time": good["time"]},
            "id": good,
            "expected an object": [good],
        }
        for word, record in bad.items():
            content = json.dumps(good) + "\n" + json.dumps(record) + "\n" + json.dumps(good | {"id": "2"}) + "\n"
            path.write_text(content)
            raises(ValueError, lambda: LabelStore(path), str(path), "line 2", word)
            assert path.read_text() == content


def _store(*changes):
    return edited(LabelStore, *changes)


def _comparison(*changes):
    return edited(Comparison, *changes)


PLANTED = {
    "Comparison": {
        "texts glued": _comparison(
            ("json.dumps([self.prompt, self.first, self.second])", "self.prompt + self.first + self.second")
        ),
        "order of the responses lost": _comparison(
            ("[self.prompt, self.first, self.second]", "[self.prompt, *sorted([self.first, self.second])]")
        ),
        "without the prompt": _comparison(("[self.prompt, self.first", "[self.first")),
        "Python's hash": _comparison(("hashlib.sha256(text.encode()).hexdigest()[:16]", "f'{hash(text):x}'")),
        "same texts allowed": _comparison(("if self.first == self.second:", "if False:")),
        "chosen and rejected swapped": _comparison(('if choice == "first" else', 'if choice != "first" else')),
    },
    "left_side": {
        "first always left": lambda comparison, seed: "first",
        "seed ignored": lambda comparison, seed: left_side(comparison, 0),
        "comparison ignored": lambda comparison, seed: ("first", "second")[seed % 2],
        "unfair coin": edited(left_side, ("toss[0] % 2 == 0", "toss[0] % 3 == 0")),
        "global generator": lambda comparison, seed: __import__("random").choice(["first", "second"]),
    },
    "LabelStore": {
        "memory only": _store(("            self._journal.append(line)", "            pass")),
        "remembered before it is written": _store(
            (
                "        try:\n            self._journal.append(line)",
                "        self._apply(line)\n        try:\n            self._journal.append(line)",
            ),
            ("from error\n        self._apply(line)", "from error"),
        ),
        "not remembered": _store(("from error\n        self._apply(line)", "from error")),
        "decided twice": _store(
            ("if self.find(comparison) is not None:", "if False:"),
            ("if (label.id, label.annotator) in self._labels:", "if False:"),
        ),
        "a copy of a line counts as a label": _store(("if (label.id, label.annotator) in self._labels:", "if False:")),
        "annotators share labels": _store(
            (
                "get((comparison.id, self.annotator))",
                "get(next((k for k in self._labels if k[0] == comparison.id), None))",
            )
        ),
        "undo takes the oldest": _store(("reversed(self.labels)", "self.labels")),
        "undo takes anybody's": _store((" if label.annotator == self.annotator)", ")")),
        "undo in memory only": _store(
            ('self._append({"undo": label.id, "annotator": self.annotator, "time": _now()})', "self._labels.popitem()")
        ),
        "undo of nothing": _store(('raise ValueError(f"undo: {key[0]}', 'print(f"undo: {key[0]}')),
        "skipped ones chosen": _store((' if choice != "skip"]', "]")),
        "pairs in the order of labelling": _store(
            ("for i in distinct for label in by_id.get(i, [])", "for i in by_id if i in distinct for label in by_id[i]")
        ),
        "pairs of everybody": _store(("if annotator is None or label.annotator == annotator:", "if True:")),
        "a comparison listed twice counts twice": _store(
            ("for i in distinct for", "for i in [c.id for c in comparisons] for")
        ),
        "side not recorded": _store(("choice, left, seconds, self", 'choice, "first", seconds, self')),
        "not checked before writing": _store(("json.dumps(_checked(record))", "json.dumps(record)")),
        "left open": _store(("        self._journal.close()", "        pass")),
        "bare error": _store(("raise OSError(error.errno, text, str(self.path)) from error", "raise")),
    },
}
EXEMPT = {"Label"}
