"""What pages print, assert and draw: claims that fail when they should, figures of the same bytes on every run."""

import base64
import html
import math
from typing import Any

import ipywidgets
import pytest
import torch
from matplotlib.figure import Figure

from rlhfkit import display as pages
from rlhfkit.display import CLAIM_MIME, claim, glue, new_figure, rounded, show, show_source
from rlhfkit.frames import Frames, frames

Shown = list[tuple[dict[str, Any], dict[str, Any]]]


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Shown:
    """What is displayed during the test, as (data, metadata)."""
    caught: Shown = []
    monkeypatch.setattr(pages, "display", lambda data, raw, metadata=None: caught.append((data, metadata or {})))
    return caught


# -- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", [-0.0, -0.0004, -1e-300, torch.tensor(-0.0004)])
def test_a_negative_number_that_rounds_to_zero_loses_its_sign(x: Any) -> None:
    assert rounded(x, 3) == "0.000"


@pytest.mark.parametrize(
    ("x", "digits", "text"),
    [
        (-0.0006, 3, "-0.001"),
        (2, 3, "2"),
        (True, 3, "True"),
        (math.inf, 3, "inf"),
        (-math.inf, 2, "-inf"),
        (math.nan, 2, "nan"),
        (torch.tensor([[1.25, -0.0], [3.0, 4.0]]), 1, "[[1.2, 0.0], [3.0, 4.0]]"),
        ((0.5, [1, "a"]), 2, "[0.50, [1, a]]"),
    ],
)
def test_rounding_keeps_structure_and_special_values(x: Any, digits: int, text: str) -> None:
    assert rounded(x, digits) == text


def test_show_prints_one_aligned_line_per_argument(capsys: pytest.CaptureFixture[str]) -> None:
    show(digits=2, error=-0.001, largest_error=torch.tensor([1.0, 2.345], requires_grad=True))
    assert capsys.readouterr().out == "error         = 0.00\nlargest_error = [1.00, 2.35]\n".replace("_", " ")


def test_seed_all_repeats_samples_and_sets_double_precision() -> None:
    dtype = torch.get_default_dtype()
    try:
        first = torch.rand(3, generator=pages.seed_all(7))
        again = torch.rand(3, generator=pages.seed_all(7))
        assert first.dtype == torch.float64
        assert torch.equal(first, again)
        assert not torch.equal(first, torch.rand(3, generator=pages.seed_all(8)))
    finally:
        torch.set_default_dtype(dtype)
        torch.use_deterministic_algorithms(False)


# -- claims ----------------------------------------------------------------------------------------------------------


def test_a_claim_shows_itself_and_glues_its_number(shown: Shown) -> None:
    claim("final-kl", torch.tensor(0.12345), 0.123, tol=1e-3, text="Final KL", source="5 seeds")
    (data, _), (glued, metadata) = shown
    assert data["text/plain"] == "✓ Final KL: 0.123 (asserted: 0.123 to within 0.001; 5 seeds)"
    assert data["text/html"].startswith('<div class="claim" id="claim-final-kl">')
    record = data[CLAIM_MIME]
    assert record["name"] == "final-kl" and record["value"] == "0.123" and record["source"] == "5 seeds"
    assert metadata["scrapbook"]["name"] == "final-kl"
    assert glued[metadata["scrapbook"]["mime_prefix"] + "text/plain"] == "'0.123'"


@pytest.mark.parametrize("value", [1.0 + 1.01e-3, 1.0 - 1.01e-3, math.nan, math.inf])
def test_a_value_further_off_than_the_tolerance_is_an_assertion_error(shown: Shown, value: float) -> None:
    with pytest.raises(AssertionError, match="claim 'x' fails"):
        claim("x", value, 1.0, tol=1e-3, text="one")
    assert shown == []  # nothing claimed, nothing glued


@pytest.mark.parametrize("value", [1.0, 1.0 + 0.99e-3, 1.0 - 0.99e-3])
def test_a_value_within_the_tolerance_is_accepted(shown: Shown, value: float) -> None:
    claim("x", value, 1.0, tol=1e-3, text="one")
    assert len(shown) == 2


def test_bounds_are_inclusive_one_sided_and_quoted_instead_of_the_value(shown: Shown) -> None:
    claim("low", 0.98, at_least=0.98, text="low")
    claim("high", -5.0, at_most=0.98, text="high")
    assert [data[CLAIM_MIME]["value"] for data, _ in shown[::2]] == ["≥ 0.98", "≤ 0.98"]
    for wrong in ({"at_least": 0.98}, {"at_most": 0.96}):
        with pytest.raises(AssertionError, match=r"0\.97"):
            claim("x", 0.97, text="x", **wrong)
    for bound in ("at_least", "at_most"):
        with pytest.raises(AssertionError, match="nan"):
            claim("x", math.nan, text="x", **{bound: 0.0})


@pytest.mark.parametrize("name", ["", "A", "two words", "under_score", "dot.", 'quote"', "new\n"])
def test_a_name_that_cannot_be_an_anchor_is_refused(shown: Shown, name: str) -> None:
    with pytest.raises(ValueError, match="name"):
        claim(name, 1.0, 1.0, tol=0.1, text="one")


@pytest.mark.parametrize(
    "conditions",
    [
        {},
        {"expected": 1.0},
        {"tol": 0.1},
        {"expected": 1.0, "tol": 0.1, "at_least": 0.5},
        {"at_least": 0.5, "at_most": 2.0},
        {"at_least": 0.5, "tol": 0.1},
    ],
)
def test_a_claim_states_exactly_one_condition(shown: Shown, conditions: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="give expected and tol"):
        claim("x", 1.0, text="one", **conditions)


@pytest.mark.parametrize("tol", [1e-12, 0.0014, 0.0025, 0.05, 3.0])
def test_the_stated_tolerance_is_the_one_that_was_used(shown: Shown, tol: float) -> None:
    claim("x", 1.0, 1.0, tol=tol, text="one")
    assert float(shown[0][0][CLAIM_MIME]["condition"].split("within ")[1]) == tol


def test_markup_in_a_claim_is_escaped(shown: Shown) -> None:
    claim("x", 1.0, 1.0, tol=0.1, text="a < b & <b>c</b>", source="<i>")
    body = shown[0][0]["text/html"]
    assert "<b>" not in body and "<i>" not in body
    assert "a < b & <b>c</b>" in html.unescape(body)


def test_glued_text_has_the_form_that_the_book_reads(shown: Shown) -> None:
    glue("k", "0.5")
    ((data, metadata),) = shown
    assert data == {"application/papermill.record/text/plain": "'0.5'"}
    assert metadata == {"scrapbook": {"name": "k", "mime_prefix": "application/papermill.record/"}}


# -- source ----------------------------------------------------------------------------------------------------------


def documented(x: int) -> str:
    """First line.

    More, with 'quotes' and "quotes".
    """
    text = """not a docstring"""
    return text * x


def undocumented(x: int) -> int:
    def inner(y: int) -> int:
        """Doubles."""
        return 2 * y

    return inner(x)


class Documented:
    """A class."""

    def method(self) -> int:
        """A method."""
        return 1


def raw_docstring() -> int:
    r"""With a \\backslash."""
    return 1


def test_the_source_without_its_docstring_is_the_source_otherwise() -> None:
    text = show_source(documented).text
    assert text == 'def documented(x: int) -> str:\n    text = """not a docstring"""\n    return text * x'
    assert "First line" in show_source(documented, doc=True).text
    assert show_source(raw_docstring).text == "def raw_docstring() -> int:\n    return 1"


def test_only_the_object_s_own_docstring_is_dropped() -> None:
    assert '"""Doubles."""' in show_source(undocumented).text
    text = show_source(Documented).text
    assert '"""A class."""' not in text and '"""A method."""' in text


def test_the_shown_source_still_runs() -> None:
    scope: dict[str, Any] = {}
    exec(show_source(documented).text, scope)
    assert scope["documented"](2) == documented(2)


# -- figures ---------------------------------------------------------------------------------------------------------


def draw(value: float) -> Figure:
    fig, ax = new_figure(2.0, 1.5)
    ax.plot([0, 1], [0, value])
    return fig


def make(**settings: Any) -> Frames:
    settings = {"name": "beta", "title": "Lines.", "caption": lambda v: f"slope {v:.1f}"} | settings
    return frames(draw, settings.pop("values", [1.0, 2.0, 4.0]), **settings)


def test_frames_print_one_line_of_numbers_per_frame() -> None:
    assert repr(make()).splitlines() == [
        "Lines. Slider beta: 1.0 to 4.0.",
        "  1.0: slope 1.0",
        "  2.0: slope 2.0",
        "  4.0: slope 4.0",
    ]


@pytest.mark.parametrize("settings", [{"start": 3}, {"start": -1}, {"values": []}])
def test_a_start_that_is_no_frame_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="start"):
        make(**settings)


def test_frames_are_the_same_bytes_on_every_run_and_differ_from_each_other() -> None:
    images = [child.value for child in make().children[1].children]
    assert images == [child.value for child in make().children[1].children]
    assert len(set(images)) == 3


def test_the_still_image_is_the_frame_at_the_start() -> None:
    figure = make(start=2)
    data, metadata = figure._repr_mimebundle_()
    assert data["text/plain"] == repr(figure)
    assert base64.b64decode(data["image/png"]).startswith(b"\x89PNG")
    assert data["image/png"] in figure.children[1].children[2].value
    assert metadata["image/png"]["width"] == 192  # two inches


def test_every_frame_has_an_escaped_description() -> None:
    figure = make(title='a "b" <c>', caption=lambda v: f"{v} < 5 & more")
    for value, child in zip([1.0, 2.0, 4.0], figure.children[1].children, strict=True):
        alt = child.value.split('alt="')[1].split('"')[0]
        assert "<" not in alt
        for part in ('a "b" <c>', f"{value} < 5 & more"):
            assert part in html.unescape(alt)
        assert "<figcaption>" + html.escape(f"{value} < 5 & more") in child.value


def test_slider_player_and_frames_are_linked_in_the_browser() -> None:
    """The saved widget state, which is all that a page without a kernel has, holds both links."""
    figure = make(start=1)
    (play, slider), stack = figure.children[0].children, figure.children[1]
    state = ipywidgets.Widget.get_manager_state()["state"]
    links = [s["state"] for s in state.values() if s["model_name"] == "LinkModel"]
    found = {(tuple(link["source"]), tuple(link["target"])) for link in links}

    def end(widget: ipywidgets.Widget, trait: str) -> tuple[str, str]:
        return f"IPY_MODEL_{widget.model_id}", trait

    assert (end(slider, "index"), end(stack, "selected_index")) in found
    assert (end(play, "value"), end(slider, "index")) in found
    assert slider.index == stack.selected_index == play.value == 1
    assert play.max == len(stack.children) - 1
