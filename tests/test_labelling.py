"""The labelling widget, worked by its buttons and keys: what is shown, what is saved, what an error does."""

import html
import json
import os
import re
import tempfile
from pathlib import Path
from unittest import mock

import ipywidgets

from planting import edited, raises
from rlhfkit import labelling as module
from rlhfkit.label_store import Comparison, LabelStore, left_side
from rlhfkit.labelling import BUTTONS, KEYS, Labeller, label_pairs
from test_journal import largest_file

ITEMS = [Comparison(f"prompt {i}", f"good {i}", f"bad {i}") for i in range(6)]


class Clock:
    """Seconds that pass when told to."""

    now = 100.0

    def __call__(self):
        return self.now


class labeller:
    """A labeller on a fresh file, closed at the end; with ``clock`` and ``path`` beside it."""

    def __init__(self, Labeller, comparisons=ITEMS, **settings):
        self.folder = tempfile.TemporaryDirectory()
        path = Path(self.folder.name) / "labels.jsonl"
        clock = Clock()
        self.labeller = Labeller(comparisons, LabelStore(path, "me"), clock=clock, **settings)
        self.labeller.clock, self.labeller.path = clock, path

    def __enter__(self):
        return self.labeller

    def __exit__(self, *error):
        self.labeller.store.close()
        self.folder.cleanup()


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(view):
    """What a reader of the widget reads: the text of all its HTML."""
    return [html.unescape(re.sub("<[^>]*>", " ", x.value)) for x in view.children if isinstance(x, ipywidgets.HTML)]


def press(made, keys, pause=1.0):
    """Type keys one after the other, as the browser reports them."""
    for key in keys:
        made.clock.now += pause
        made.keys.value += key


def test_the_side_that_is_clicked_is_the_response_that_is_chosen(Labeller=Labeller):
    """Somebody who always clicks where "good" is shown chose "good" every time, on whichever side it was."""
    with labeller(Labeller, seed=3) as made:
        view, sides = made.view, []
        for item in ITEMS:
            shown = made._pair.value
            assert html.escape(item.prompt) in shown
            sides.append("left" if shown.index("good") < shown.index("bad") else "right")
            made.buttons[sides[-1]].click()
        assert set(sides) == {"left", "right"}
        assert made.pairs == [item.pair("first") for item in ITEMS]
        assert [x["left"] for x in lines(made.path)] == [left_side(item, 3) for item in ITEMS]
        assert [x["choice"] for x in lines(made.path)] == ["first"] * len(ITEMS)
        assert made.current is None and view is made.view


def test_every_click_is_saved_with_its_seconds_before_the_next_pair_is_shown(Labeller=Labeller):
    with labeller(Labeller) as made:
        _ = made.view
        for count, seconds in enumerate((2.0, 0.5, 7.25), 1):
            made.clock.now += seconds
            made.buttons["left"].click()
            assert [x["seconds"] for x in lines(made.path)][-1] == seconds
            assert len(lines(made.path)) == count and made.current == ITEMS[count]
        assert {x["annotator"] for x in lines(made.path)} == {"me"}


def test_skip_and_undo_do_what_they_say(Labeller=Labeller):
    with labeller(Labeller, ITEMS[:3]) as made:
        _ = made.view
        assert made.buttons["undo"].disabled
        made.buttons["skip"].click()
        made.clock.now += 30
        made.buttons["undo"].click()
        assert made.current == ITEMS[0] and made.buttons["undo"].disabled
        made.clock.now += 1
        for name in ("left", "skip", "right"):
            made.buttons[name].click()
        assert lines(made.path)[2]["seconds"] == 1
        assert made.current is None and len(made.pairs) == 2
        assert [made.buttons[name].disabled for name in BUTTONS] == [True, True, True, False]
        made.buttons["undo"].click()
        assert made.current == ITEMS[2] and len(made.pairs) == 1
        assert [made.buttons[name].disabled for name in BUTTONS] == [False] * 4


def test_keys_do_what_the_buttons_do(Labeller=Labeller):
    with labeller(Labeller) as typed, labeller(Labeller) as clicked:
        _ = typed.view, clicked.view
        press(typed, "12s" + "u" + "S1")
        for key in "12sus1":
            clicked.buttons[KEYS[key]].click()
        assert [x.get("choice") for x in lines(typed.path)] == [x.get("choice") for x in lines(clicked.path)]
        assert typed.current == clicked.current == ITEMS[4]
        for key, name in KEYS.items():
            assert f"({key})" in BUTTONS[name] and key in module.HELP and key in typed.keys.placeholder


def test_a_key_held_down_decides_once_and_other_keys_nothing(Labeller=Labeller):
    with labeller(Labeller) as made:
        _ = made.view
        press(made, "1" + "x \n7")
        assert len(lines(made.path)) == 1 and "'7' does nothing" in texts(made.view)[-1]
        press(made, "1")
        press(made, "1" * 40, pause=0.03)
        assert len(lines(made.path)) == 2
        made.clock.now += 1
        made.keys.value += "2222"  # in one message
        assert len(lines(made.path)) == 3
        made.keys.value = "12"  # edited or cleared: nothing was typed
        made.keys.value = ""
        assert len(lines(made.path)) == 3
        press(made, "2")
        assert len(lines(made.path)) == 4


def test_work_goes_on_where_it_stopped_and_everyone_is_asked_everything(Labeller=Labeller):
    with labeller(Labeller) as made:
        for name in ("left", "skip", "right"):
            made.choose(name)
        before, pairs = made.path.read_bytes(), made.pairs
        made.store.close()
        with LabelStore(made.path, "me") as store:
            again = Labeller([*ITEMS, ITEMS[0]], store)
            assert again.current == ITEMS[3] and again.pairs == pairs
            assert again.undo().id == ITEMS[2].id and made.path.read_bytes().startswith(before)
            raises(ValueError, Labeller([Comparison("other", "a", "b")], store).undo, "undo")
        with LabelStore(made.path, "you") as store:
            other = Labeller(ITEMS, store)
            assert other.current == ITEMS[0] and other.pairs == []
            raises(ValueError, other.undo, "undo")


def test_texts_are_shown_and_not_obeyed(Labeller=Labeller):
    nasty = Comparison("<script>alert(1)</script>", '<img src=x onerror="alert(2)">', "a &amp; $b$ <b>c</b>")
    with labeller(Labeller, [nasty]) as made:
        bundle = made._repr_mimebundle_()
        for shown in (made._pair.value, bundle["text/html"]):
            for text in (nasty.prompt, nasty.first, nasty.second):
                assert text not in shown and html.escape(text) in shown
            assert "mathjax_ignore" in shown  # $b$ stays as it is
        for text in (nasty.prompt, nasty.first, nasty.second):
            assert text in bundle["text/plain"]
        with largest_file(0), mock.patch.object(made.store, "record", mock.Mock(side_effect=ValueError("<i>"))):
            made.buttons["left"].click()
        assert "<i>" not in made._status.value


def test_progress_is_told_in_words_and_drawn(Labeller=Labeller):
    with labeller(Labeller) as made:
        view = made.view
        made.buttons["left"].click()
        made.buttons["skip"].click()
        assert "6 comparisons: 1 chosen, 1 skipped, 4 left." in texts(view)[0]
        assert 'max="6" value="2"' in view.children[0].value and "<label>" in view.children[0].value


def test_the_end_tells_agreement_with_the_judge_and_where_the_labels_are(Labeller=Labeller):
    def judge(prompt, response):
        return float("good" in response)

    with labeller(Labeller, seed=3, judge=judge) as made:
        view = made.view
        for item in ITEMS[:4]:
            made.buttons["left" if left_side(item, 3) == "first" else "right"].click()
        made.buttons["skip"].click()
        assert "greement" not in "".join(texts(view))
        made.buttons["left" if left_side(ITEMS[5], 3) == "second" else "right"].click()
        end = "".join(texts(view))
        assert "All decided. Agreement with the gold judge: 0.800, standard error 0.200, n = 5." in end
        assert str(made.path.resolve()) in end
        assert "0.800" in repr(made) and "prompt" not in repr(made)


def test_an_error_is_shown_and_the_pair_stays(Labeller=Labeller):
    with labeller(Labeller) as made:
        view = made.view
        with largest_file(30):
            made.buttons["left"].click()
        assert 'role="alert"' in made._status.value and "not saved" in texts(view)[-1]
        assert made.current == ITEMS[0] and made.path.read_bytes() == b""
        made.buttons["left"].click()
        assert 'role="status"' in made._status.value and made.current == ITEMS[1]
    with labeller(Labeller, ITEMS[:1], judge=lambda p, r: [][1]) as made:
        _ = made.view
        made.buttons["left"].click()
        assert 'role="alert"' in made._status.value and len(lines(made.path)) == 1


def test_choices_that_are_none_are_refused(Labeller=Labeller):
    with labeller(Labeller, ITEMS[:1]) as made:
        raises(ValueError, lambda: made.choose("first"), "what", "'first'")
        made.choose("left")
        raises(ValueError, lambda: made.choose("left"), "choose", "1 comparisons decided")
        raises(ValueError, lambda: Labeller([], made.store), "comparisons")


def test_the_still_is_the_same_on_every_run_and_has_no_widget(Labeller=Labeller):
    with mock.patch.dict(os.environ, RLHFKIT_STILL="1"):
        stills = []
        for _ in range(2):
            with labeller(Labeller, seed=3) as made:
                before = len(ipywidgets.Widget.get_manager_state()["state"])
                stills.append(made._repr_mimebundle_())
                assert len(ipywidgets.Widget.get_manager_state()["state"]) == before
        assert stills[0] == stills[1] and set(stills[0]) == {"text/plain", "text/html"}
    text = stills[0]["text/plain"]
    left, right = ("good 0", "bad 0") if left_side(ITEMS[0], 3) == "first" else ("bad 0", "good 0")
    assert text.splitlines() == [
        "6 comparisons: 0 chosen, 0 skipped, 6 left. File: labels.jsonl",
        "Prompt: prompt 0",
        f"Left: {left}",
        f"Right: {right}",
        module.HELP,
    ]
    assert module.STILL in stills[0]["text/html"]
    with mock.patch.dict(os.environ), labeller(Labeller, seed=3) as made:
        os.environ.pop("RLHFKIT_STILL", None)
        live = made._repr_mimebundle_()
        assert live.items() >= stills[0].items()  # what nbval compares is the same
        assert "application/vnd.jupyter.widget-view+json" in live
        widget = live["application/vnd.jupyter.widget-view+json"]["model_id"]
        assert widget == made.view.model_id and widget not in live["text/plain"] + live["text/html"]


def test_a_closed_labeller_says_so(Labeller=Labeller):
    with labeller(Labeller) as made:
        view = made.view
        made.close()
        assert all(button.disabled for button in made.buttons.values()) and made.keys.disabled
        assert "Closed" in texts(view)[-1]
        LabelStore(made.path).close()


def test_a_cell_run_again_takes_over_and_goes_on(label_pairs=label_pairs):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labels.jsonl"
        first = label_pairs(ITEMS, path, annotator="ann", seed=5)
        first.choose("left")
        try:
            again = label_pairs(ITEMS, os.path.join(folder, ".", "labels.jsonl"), annotator="ann", seed=5)
        except BlockingIOError as error:
            raise AssertionError("not taken over") from error
        raises(ValueError, lambda: first.choose("left"), "closed")
        assert again.current == ITEMS[1] and again.pairs == first.pairs
        assert [(x["annotator"], x["left"]) for x in lines(path)] == [("ann", left_side(ITEMS[0], 5))]
        again.close()


def test_a_file_that_is_open_elsewhere_or_no_label_file_is_refused(label_pairs=label_pairs):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "labels.jsonl"
        with LabelStore(path):
            raises(BlockingIOError, lambda: label_pairs(ITEMS, path), str(path))
        raises(ValueError, lambda: label_pairs([], path), "comparisons")
        try:
            LabelStore(path).close()
        except BlockingIOError as error:
            raise AssertionError("left open by a refusal") from error
        path.write_text('{"prompt": "p", "chosen": "a", "rejected": "b"}\n')
        raises(ValueError, lambda: label_pairs(ITEMS, path), str(path), "line 1")


def test_the_judge_is_asked_about_prompt_and_response(label_pairs=label_pairs):
    asked = []
    with tempfile.TemporaryDirectory() as folder:
        made = label_pairs(ITEMS[:1], Path(folder) / "l", lambda p, r: asked.append((p, r)) or len(asked), seed=2)
        made.choose("right")
        chosen = made.pairs[0]
        assert chosen == ITEMS[0].pair("second" if left_side(ITEMS[0], 2) == "first" else "first")
        assert "0.000" in repr(made) and asked == [("prompt 0", chosen.chosen), ("prompt 0", chosen.rejected)]
        made.close()


def _labeller(*changes):
    return edited(Labeller, *changes)


PLANTED = {
    "Labeller": {
        "left is always first": _labeller(('{"left": left, "right": right,', '{"left": "first", "right": "second",')),
        "left and right swapped": _labeller(('{"left": left, "right": right,', '{"left": right, "right": left,')),
        "shown on the other side": _labeller(
            (
                'if left_side(comparison, self.seed) == "second":\n            sides',
                'if left_side(comparison, self.seed) == "first":\n            sides',
            )
        ),
        "side not recorded": _labeller(("choices[what], left, self", 'choices[what], "first", self')),
        "text not escaped": _labeller(("<br>{html.escape(text)}", "<br>{text}")),
        "errors not escaped": _labeller(("{sign}{html.escape(message)}", "{sign}{message}")),
        "mathematics in prices": _labeller(('class="mathjax_ignore tex2jax_ignore" ', "")),
        "seconds since the beginning": _labeller(
            ("self._clock() - self._shown)\n        self._shown = self._clock()", "self._clock() - self._shown)")
        ),
        "seconds go on through an undo": _labeller(
            ("label = self.store.undo()\n        self._shown = self._clock()", "label = self.store.undo()")
        ),
        "undo reaches other comparisons": _labeller(
            (" and last.id in {comparison.id for comparison in self.comparisons}", "")
        ),
        "undo is always there": _labeller(('not self._can_undo() if name == "undo" else not left', "not left")),
        "a key held down goes on": _labeller(("elif now - before >= KEY_PAUSE:", "else:")),
        "keys after other keys are dropped": _labeller(
            ("now, before = self._clock(), self._last_key", "now, before = self._clock(), self._clock()")
        ),
        "all keys again at every message": _labeller(
            ('new[len(old) :].lower() if new.startswith(old) else ""', "new.lower()")
        ),
        "capital letters": _labeller(("new[len(old) :].lower()", "new[len(old) :]")),
        "everybody's pairs": _labeller(
            ("self.store.pairs(self.comparisons, self.store.annotator)", "self.store.pairs(self.comparisons)")
        ),
        "an error is raised where nobody sees it": _labeller(
            ("except Exception as error:", "except KeyError as error:")
        ),
        "an error looks like success": _labeller((", alarm=True)\n\n    def _on", ")\n\n    def _on")),
        "skipped ones counted as chosen": _labeller(
            ("- labels.count(None) - skipped, skipped", "- labels.count(None), skipped")
        ),
        "progress counts choices only": _labeller(("done, n = chosen + skipped,", "done, n = chosen,")),
        "widgets in the still": _labeller(('if not os.environ.get("RLHFKIT_STILL"):', "if True:")),
        "a still for everybody": _labeller(('if not os.environ.get("RLHFKIT_STILL"):', "if False:")),
        "the folder in the text": _labeller(("File: {self.store.path.name}", "File: {self.store.path}")),
        "agreement shown before the end": _labeller(
            (
                'self._progress.value = f"<label>{html.escape(self._summary())}',
                'self._progress.value = f"<label>{html.escape(self._summary() + self._result())}',
            )
        ),
        "closed and yet enabled": _labeller(("control.disabled = True", "pass")),
    },
    "label_pairs": {
        "not taken over": edited(label_pairs, ("_open.pop(place).close()", "pass")),
        "annotator lost": edited(label_pairs, ("LabelStore(path, annotator)", "LabelStore(path)")),
        "seed lost": edited(label_pairs, ("judge, seed)", "judge)")),
        "judge lost": edited(label_pairs, ("store, judge, seed)", "store, None, seed)")),
        "left open after an error": edited(
            label_pairs, ("    except BaseException:\n        store.close()", "    except BaseException:\n        pass")
        ),
        "paths compared as text": edited(label_pairs, ("Path(path).resolve()", "str(path)")),
    },
}
EXEMPT: set[str] = set()
