"""The site check and the build's guards find what they are for: each fault is planted on a small page."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT / "book"), str(ROOT / "book" / "ext")]

import book_fixes  # noqa: E402

import check_site  # noqa: E402
import vendor  # noqa: E402

DOT = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5E"
    "rkJggg=="
)
SLIDER = """<div class="cell_output"><div class="jupyter-widgets widget-vbox">
<div class="noUi-handle" tabindex="0" style="width:20px;height:20px"></div>
<div class="widget-play"><button>play</button></div>
<figure><img alt="frame 1" src="DOT"><figcaption>one</figcaption></figure></div></div>
<script>
const img = document.querySelector('img');
if (MOVES) document.querySelector('.noUi-handle').onkeydown = e => { img.alt = 'frame ' + e.key; };
if (PLAYS) document.querySelector('.widget-play button').onclick = () => setInterval(() => { img.alt += '+'; }, 100);
</script>""".replace("DOT", DOT)

THEME = """<button class="theme-switch-button" onclick="const d = document.documentElement.dataset;
d.theme = d.theme === 'dark' ? 'light' : 'dark'">theme</button>"""
STYLE = "html[data-theme=dark] body { background: #111; } @media print { .bd-header, .widget-play { display: none; } }"
GOOD = f"""<!DOCTYPE html><html lang="en" data-theme="light"><head><title>t</title><meta charset="utf-8">
<link rel="icon" href="data:,"><style>{STYLE}</style></head>
<body>HEADER{THEME}<article><h1 id="top">A page</h1>BODY</article></body></html>"""


def page(body: str, header: str = "") -> str:
    return GOOD.replace("BODY", body).replace("HEADER", header)


PLANTED = {
    "foreign script": (page('<script src="http://example.invalid/x.js"></script>'), "request leaves the site"),
    "missing file": (page('<link rel="stylesheet" href="none.css">'), "404"),
    "exception": (page("<script>throw new Error('oh')</script>"), "exception: oh"),
    "console error": (page("<script>console.error('oh')</script>"), "console: oh"),
    "formula not drawn": (page('<span class="math">x</span>'), "1 formulas not drawn"),
    "formula with an error": (page("<mjx-merror>x</mjx-merror>"), "1 formulas with errors"),
    "widget not drawn": (
        page('<div><script type="application/vnd.jupyter.widget-view+json">{}</script></div>'),
        "1 widgets not drawn",
    ),
    "picture without alt": (page(f'<img src="{DOT}">'), "1 pictures without text alternative"),
    "figure without caption": (page(f'<div class="cell_output"><img alt="x" src="{DOT}"></div>'), "without caption"),
    "broken picture": (page('<img alt="x" src="data:image/png;base64,AAAA">'), "1 broken pictures"),
    "dead slider": (page(SLIDER.replace("MOVES", "0").replace("PLAYS", "1")), "slider changes nothing"),
    "dead play button": (page(SLIDER.replace("MOVES", "1").replace("PLAYS", "0")), "Play changes nothing"),
    "no copy button": (page('<div class="highlight"><pre>x</pre></div>'), "without copy button"),
    "dead theme button": (page("").replace("onclick", "data-x"), "theme button changes nothing"),
    "no theme button": (page("").replace("theme-switch-button", "other"), "no theme button"),
    "wide page": (page('<div style="width:900px;height:9px">x</div>'), "too wide, 390 px"),
    "clipped text": (
        page('<div style="overflow:hidden"><div style="width:900px;height:9px">x</div></div>'),
        "too wide, 390 px",
    ),
    "header in print": (
        page("", '<div class="bd-header" style="display:block!important">x</div>'),
        "printed page shows",
    ),
    "empty print": (page("").replace('<h1 id="top">A page</h1>', ""), "printed page is empty"),
}
WORKING = {
    "empty": page(""),
    "slider": page(SLIDER.replace("MOVES", "1").replace("PLAYS", "1")),
    "scrolling box": page('<div style="overflow-x:auto"><div style="width:900px;height:9px">x</div></div>'),
    "hidden header in print": page("", '<div class="bd-header">x</div>'),
}


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    if check_site.find_browser() is None:
        assert not os.environ.get("CI"), "CI must have a browser"
        pytest.skip("needs Chromium or Chrome")
    with check_site.sync_playwright() as playwright:
        browser = check_site.launch(playwright)
        yield browser.new_context()
        browser.close()


@pytest.fixture
def look(context: Any, tmp_path: Path) -> Iterator[Callable[[str], list[str]]]:
    """Findings of one page, from a server."""
    server, base = check_site.serve(tmp_path)

    def findings(text: str) -> list[str]:
        (tmp_path / "index.html").write_text(text, encoding="utf-8")
        return check_site.check_page(context, base, "index.html", axe="", patience=1.0).findings

    yield findings
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_fault_is_found(name: str, look: Callable[[str], list[str]]) -> None:
    text, words = PLANTED[name]
    assert any(words in finding for finding in look(text)), look(text)


@pytest.mark.parametrize("name", WORKING)
def test_a_good_page_has_no_findings(name: str, look: Callable[[str], list[str]]) -> None:
    assert look(WORKING[name]) == []


def test_dead_links_are_found(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(
        page('<a href="b.html#top">x</a><a href="#top">x</a><a href="https://x.y/z">x</a>')
    )
    (tmp_path / "b.html").write_text(page('<a href="none.html">x</a><a href="a.html#none">x</a><a href="#no">x</a>'))
    assert check_site.dead_links(tmp_path) == {
        "b.html": [
            "link to none.html: no such file",
            "link to a.html#none: no such anchor",
            "link to #no: no such anchor",
        ]
    }


@pytest.mark.parametrize(
    "load",
    [
        '<script src="https://example.invalid/x.js">',
        '<script defer src="//example.invalid/x.js">',
        '<img alt="x" src="http://example.invalid/x.png">',
        '<link rel="stylesheet" href="https://example.invalid/x.css">',
        '<link href="https://example.invalid/x.css" rel="stylesheet">',
        "<style>@import url(https://example.invalid/x.css)</style>",
        '<script type="module">import "https://example.invalid/x.js"</script>',
    ],
)
def test_the_build_refuses_pages_that_load_from_elsewhere(load: str) -> None:
    assert book_fixes.remote_loads(load)


def test_links_to_elsewhere_and_local_loads_are_allowed() -> None:
    fine = '<a href="https://example.invalid/">x</a><script src="../_static/x.js"></script><img src="data:image/png,">'
    assert book_fixes.remote_loads(fine) == []


def test_chapters_are_numbered_by_their_file_names() -> None:
    assert book_fixes.chapter_number("chapters/02_policy_gradient") == 2
    assert book_fixes.chapter_number("chapters/13_scale") == 13
    assert book_fixes.chapter_number("pages/notation") is None
    assert book_fixes.chapter_number("homework/hw02_policy_gradient") is None


def test_a_package_that_is_not_the_locked_one_is_refused(tmp_path: Path) -> None:
    npm = tmp_path / "npm"
    npm.write_text('#!/bin/sh\necho other > "$5/x-1.0.0.tgz"\n')
    npm.chmod(0o755)
    with pytest.raises(SystemExit, match="integrity"):
        vendor.fetch([str(npm)], "x@1.0.0", "sha512-AAAA", tmp_path)
