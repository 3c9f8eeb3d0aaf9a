"""Open every page of the built site in a browser, from a server and from disk, and report what is wrong with it.

python book/check_site.py _build/html --axe build/vendor-test/vendor/axe-core/axe.min.js

Findings: a request that leaves the site, a failed request, a console error, an exception, a formula or widget not
drawn, an unknown TeX macro, a slider, Play, theme or copy button or search that does nothing, a picture without text
alternative or caption, something wider than the page at 1280 or 390 pixels, an axe violation in light or dark mode at
either width, a printed page with navigation in it, and an internal link that leads nowhere.
"""

from __future__ import annotations

import argparse
import functools
import html.parser
import http.server
import json
import multiprocessing
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from playwright.sync_api import Browser, BrowserContext, Page, Playwright, sync_playwright
from playwright.sync_api import Error as PlaywrightError

BROWSERS = ["chromium", "chromium-browser", "google-chrome", "google-chrome-stable"]
# nothing but this machine has an address: a page that asks another host fails visibly
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-dev-shm-usage",
    "--disable-sync",
    "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
]
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
# A4 less its margins, at 96 pixels an inch
PAPER = {"width": 680, "height": 960}

STATE = """() => {
  const math = [...document.querySelectorAll('span.math, div.math')];
  const views = [...document.querySelectorAll('script[type="application/vnd.jupyter.widget-view+json"]')];
  const pictures = [...document.querySelectorAll('article img')];
  const inCell = [...document.querySelectorAll('.cell_output img')].filter(i => !i.closest('.jupyter-widgets'));
  const captioned = i => i.closest('figure')?.querySelector('figcaption')?.textContent.trim();
  return {
    math: math.filter(e => !e.querySelector('mjx-container')).length,
    merror: document.querySelectorAll('mjx-merror, [data-mml-node="merror"], merror').length,
    views: views.filter(s => !s.parentElement.querySelector('.jupyter-widgets')).length,
    noAlt: pictures.filter(i => !i.alt.trim()).length,
    noCaption: inCell.filter(i => !captioned(i)).length
      + [...document.querySelectorAll('.jupyter-widgets figure')].filter(f => !captioned(f)).length,
    broken: pictures.filter(i => i.complete && i.naturalWidth === 0).length,
  };
}"""
SETTLED = f"() => {{ const s = ({STATE})(); return !s.math && !s.views; }}"
OVERFLOW = """() => {
  const width = document.documentElement.clientWidth, found = [];
  if (document.documentElement.scrollWidth > width + 1)
    found.push(`the page is ${document.documentElement.scrollWidth} px wide`);
  const scrolls = el => {
    for (let p = el.parentElement; p; p = p.parentElement)
      if (['auto', 'scroll'].includes(getComputedStyle(p).overflowX) && p.getBoundingClientRect().right <= width + 1)
        return true;
    return false;
  };
  const root = document.querySelector('article') || document.body;
  for (const el of root.querySelectorAll('*')) {
    if (el.closest('mjx-assistive-mml, svg, .visually-hidden, .sr-only')) continue;
    const box = el.getBoundingClientRect();
    if (box.width > 0 && box.height > 0 && box.right > width + 1 && !el.closest('mjx-container mjx-math *')
        && !scrolls(el)) {
      found.push(`<${el.tagName.toLowerCase()} class="${el.className}"> ends at ${Math.round(box.right)} px`);
      if (found.length > 3) break;
    }
  }
  return found;
}"""
FRAME = """el => [...el.querySelectorAll('img')].filter(i => i.offsetParent !== null).map(i => i.alt + i.src)"""
PRINTED = """() => ['.bd-header', '.bd-header-article', '.bd-sidebar-primary', '.bd-sidebar-secondary', '.copybtn',
  '.prev-next-footer', '.widget-play', '.noUi-target'].filter(s => [...document.querySelectorAll(s)].some(
    e => e.getClientRects().length && getComputedStyle(e).visibility !== 'hidden'))"""

# what dark mode can change; the structure of the page is the same in both modes
COLOUR_RULES = ["color-contrast", "link-in-text-block"]


@dataclass
class Report:
    """What was seen on one page, opened one way."""

    name: str
    findings: list[str] = field(default_factory=list)
    seconds: float = 0.0
    requests: int = 0
    kilobytes: float = 0.0
    sliders: int = 0
    axe_runs: int = 0


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """A file server that does not log."""

    def log_message(self, *args: object) -> None:
        """Say nothing."""


def serve(root: Path) -> tuple[http.server.ThreadingHTTPServer, str]:
    """Serve a folder on this machine only; returns the server and its address."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(QuietHandler, directory=str(root)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


def find_browser() -> str | None:
    """The path of Chromium or Chrome on this machine: the variable CHROMIUM, or one of the usual names."""
    named = os.environ.get("CHROMIUM")
    if named:
        return named
    return next((path for path in map(shutil.which, BROWSERS) if path), None)


def launch(playwright: Playwright) -> Browser:
    """Start the browser that was found."""
    return playwright.chromium.launch(executable_path=find_browser(), headless=True, args=FLAGS)


class Links(html.parser.HTMLParser):
    """Collects the links of one page and the anchors that others can link to."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note href, id and name."""
        for key, value in attrs:
            if value is None:
                continue
            if key == "id" or (key == "name" and tag == "a"):
                self.anchors.add(value)
            elif key == "href" and tag in ("a", "area"):
                self.links.append(value)


def dead_links(site: Path) -> dict[str, list[str]]:
    """For each page, the internal links whose file or anchor does not exist."""
    pages: dict[Path, Links] = {}
    for path in site_pages(site):
        pages[path.resolve()] = Links()
        pages[path.resolve()].feed(path.read_text(encoding="utf-8"))
    dead: dict[str, list[str]] = {}
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            anchor = unquote(parts.fragment)
            if not target.is_file():
                why = "no such file"
            elif anchor and target in pages and anchor not in pages[target].anchors:
                why = "no such anchor"
            else:
                continue
            dead.setdefault(path.relative_to(site.resolve()).as_posix(), []).append(f"link to {link}: {why}")
    return dead


def site_pages(site: Path) -> list[Path]:
    """Every page of the site, without what belongs to the theme."""
    found = (p for p in site.rglob("*.html") if p.relative_to(site).parts[0] not in ("_static", "_sources"))
    return sorted(found)


def watch(page: Page, base: str, report: Report) -> None:
    """Report every request, failure and error of a page."""

    def on_request(request: Any) -> None:
        if urlsplit(request.url).scheme in ("data", "blob"):
            return
        report.requests += 1
        if not request.url.startswith(base):
            report.findings.append(f"request leaves the site: {request.url[:200]}")

    def on_response(response: Any) -> None:
        if response.status >= 400:
            report.findings.append(f"{response.status}: {response.url[:200]}")

    def on_console(message: Any) -> None:
        if message.type == "error":
            report.findings.append(f"console: {message.text[:300]}")

    page.on("request", on_request)
    page.on("response", on_response)
    page.on("requestfailed", lambda request: report.findings.append(f"failed: {request.url[:200]} {request.failure}"))
    page.on("console", on_console)
    page.on("pageerror", lambda error: report.findings.append(f"exception: {str(error)[:300]}"))


def open_page(page: Page, url: str, patience: float = 10.0) -> None:
    """Load a page and wait until its formulas and widgets are drawn, or clearly will not be."""
    page.goto(url, wait_until="load")
    page.wait_for_load_state("networkidle")
    page.evaluate("() => window.MathJax?.startup?.promise")
    try:
        page.wait_for_function(SETTLED, timeout=patience * 1000)
    except PlaywrightError:
        pass  # look_at says what is missing
    page.wait_for_timeout(150)


def look_at(page: Page) -> list[str]:
    """Formulas, widgets and pictures."""
    words = {
        "math": "formulas not drawn",
        "merror": "formulas with errors",
        "views": "widgets not drawn",
        "noAlt": "pictures without text alternative",
        "noCaption": "figures without caption",
        "broken": "broken pictures",
    }
    return [f"{count} {words[key]}" for key, count in page.evaluate(STATE).items() if count]


def wait_until(page: Page, holds: Callable[[], bool], seconds: float = 2.0) -> bool:
    """Whether ``holds()`` comes true within so many seconds; a busy machine may be late, a fault stays."""
    for _ in range(round(seconds / 0.05)):
        if holds():
            return True
        page.wait_for_timeout(50)
    return holds()


def drive_sliders(page: Page, report: Report) -> None:
    """Move every slider with the keyboard and press every Play button; the picture must change."""
    for box in page.query_selector_all(".cell_output .jupyter-widgets.widget-vbox"):
        handle = box.query_selector(".noUi-handle")
        if handle is None:
            continue
        report.sliders += 1
        seen = [box.evaluate(FRAME)]
        handle.focus()
        for key in ("End", "Home"):
            page.keyboard.press(key)
            wait_until(page, lambda box=box, last=seen[-1]: box.evaluate(FRAME) != last)
            seen.append(box.evaluate(FRAME))
        if len({json.dumps(s) for s in seen}) < 2:
            report.findings.append("slider changes nothing")
        if any(len(s) != 1 for s in seen):
            report.findings.append(f"slider shows {[len(s) for s in seen]} pictures, not one at a time")
        play = box.query_selector(".widget-play button")
        if play is None:
            continue
        before = box.evaluate(FRAME)
        play.click()
        if not wait_until(page, lambda box=box, before=before: box.evaluate(FRAME) != before, 4.0):
            report.findings.append("Play changes nothing")
        pause = box.query_selector(".widget-play button:has(.fa-pause), .widget-play button:has(.fa-stop)")
        if pause is not None:
            pause.click()


def press_buttons(page: Page, report: Report) -> None:
    """The theme button changes the colours, every code block has a copy button, and the first one copies."""
    missing = page.evaluate(
        "() => [...document.querySelectorAll('article div.highlight')].filter(e => e.querySelector('pre')"
        " && !e.querySelector('button.copybtn')).length"
    )
    if missing:
        report.findings.append(f"{missing} code blocks without copy button")
    first = page.query_selector("article :not(details) > * div.highlight:visible button.copybtn")
    if first is not None and first.bounding_box():
        first.scroll_into_view_if_needed()
        first.evaluate("b => b.click()")
        if not wait_until(page, lambda: "success" in (first.get_attribute("class") or "")):
            report.findings.append("copy button does not copy")
    button = page.query_selector("button.theme-switch-button:visible")
    if button is None:
        report.findings.append("no theme button")
        return
    colours = set()
    for _ in range(3):  # automatic, light, dark
        button.click()
        page.wait_for_timeout(60)
        colours.add(page.evaluate("() => getComputedStyle(document.body).backgroundColor"))
    if len(colours) < 2:
        report.findings.append("theme button changes nothing")


KEY_CAN_REACH_WHAT_SCROLLS = """() => [...document.querySelectorAll('pre, .cell_output > .output')].every(
    e => e.tabIndex >= 0 || (e.scrollWidth <= e.clientWidth && e.scrollHeight <= e.clientHeight))"""


def run_axe(page: Page, script: str, report: Report, width: str) -> None:
    """Accessibility in light and dark mode."""
    page.evaluate("() => { localStorage.clear(); document.documentElement.dataset.mode = 'auto'; }")
    page.evaluate(script)
    page.mouse.move(0, 0)  # no tooltip, and no button with focus
    page.evaluate("() => document.activeElement?.blur()")
    try:
        page.wait_for_function("() => !document.querySelector('body > .tooltip')", timeout=5_000)
    except PlaywrightError:
        report.findings.append("a tooltip stays")
    try:  # the theme makes what scrolls reachable by key some time after the width changed
        page.wait_for_function(KEY_CAN_REACH_WHAT_SCROLLS, timeout=5_000)
    except PlaywrightError:
        pass  # axe will name the element
    for scheme, only in (("light", None), ("dark", COLOUR_RULES)):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        try:
            page.wait_for_function(f"() => document.documentElement.dataset.theme === '{scheme}'", timeout=5_000)
        except PlaywrightError:
            report.findings.append(f"asked for {scheme} mode, the page did not follow")
        page.wait_for_timeout(250)  # the end of colour transitions
        options = {"resultTypes": ["violations"]} | ({"runOnly": only} if only else {})
        result = page.evaluate("options => axe.run(document, options)", options)
        report.axe_runs += 1
        for v in result["violations"]:
            first = v["nodes"][0]["html"][:160]
            report.findings.append(f"axe, {scheme}, {width}: {v['id']} ({v['impact']}), {len(v['nodes'])}x: {first}")
    page.emulate_media(color_scheme="light")


def check_overflow(page: Page, report: Report, width: str) -> None:
    """Nothing is wider than the page."""
    report.findings += [f"too wide, {width}: {what}" for what in page.evaluate(OVERFLOW)]


def check_print(page: Page, report: Report) -> None:
    """The printed page has the text and none of the navigation."""
    page.set_viewport_size(PAPER)  # type: ignore[arg-type]
    page.emulate_media(media="print", color_scheme="light")
    page.wait_for_timeout(100)
    report.findings += [f"printed page shows {what}" for what in page.evaluate(PRINTED)]
    text = page.evaluate("() => document.querySelector('article')?.innerText.trim().length || 0")
    if not text and not report.name.endswith(" search.html"):  # that page is filled by a search
        report.findings.append("printed page is empty")
    check_overflow(page, report, "printed")
    page.emulate_media(media="screen")


def check_page(context: BrowserContext, base: str, name: str, axe: str, patience: float = 10.0) -> Report:
    """Everything about one page, served from ``base``: a loopback address or a ``file:`` address.

    Args:
        context: a fresh browser context.
        base: where the site starts.
        name: the page, relative to the site.
        axe: source of axe-core; empty leaves accessibility out.
        patience: seconds for formulas and widgets to be drawn.
    """
    from_disk = base.startswith("file:")
    report = Report(f"{'file' if from_disk else 'http'} {name}")
    start = time.perf_counter()
    page = context.new_page()
    session = context.new_cdp_session(page)
    session.send("Network.enable")
    session.send("Network.setCacheDisabled", {"cacheDisabled": True})
    received = [0]
    session.on("Network.loadingFinished", lambda e: received.__setitem__(0, received[0] + e["encodedDataLength"]))
    watch(page, base, report)
    page.set_viewport_size(NARROW if from_disk else WIDE)  # type: ignore[arg-type]
    open_page(page, f"{base}/{name}", patience)
    report.findings += look_at(page)
    drive_sliders(page, report)
    if from_disk:
        check_overflow(page, report, "390 px")
    else:
        press_buttons(page, report)
        check_overflow(page, report, "1280 px")
        if axe:
            run_axe(page, axe, report, "1280 px")
        page.set_viewport_size(NARROW)  # type: ignore[arg-type]
        page.wait_for_timeout(150)
        check_overflow(page, report, "390 px, after 1280")
        if axe:
            run_axe(page, axe, report, "390 px")
        check_print(page, report)
    page.close()
    report.findings = list(dict.fromkeys(report.findings))
    report.seconds, report.kilobytes = time.perf_counter() - start, received[0] / 1e3
    return report


def check_search(context: BrowserContext, base: str, query: str) -> Report:
    """The search button of the first page opens a field; a query typed there gives results that lead to pages."""
    report = Report(f"{'file' if base.startswith('file:') else 'http'} search for {query!r}")
    start = time.perf_counter()
    page = context.new_page()
    watch(page, base, report)
    page.set_viewport_size(WIDE)  # type: ignore[arg-type]
    open_page(page, f"{base}/index.html")
    page.click("button.search-button-field:visible, button.search-button:visible")
    page.keyboard.type(query)
    page.keyboard.press("Enter")
    try:
        page.wait_for_selector("#search-results ul.search li a", timeout=10_000)
    except PlaywrightError:
        report.findings.append("search finds nothing")
    page.wait_for_timeout(1500)  # excerpts of the pages found arrive
    page.close()
    if base.startswith("file:"):  # a page from disk may not read others, so results come without excerpts
        excerpts = re.compile(
            r"console: (Access to fetch at 'file:.*\.html|Fetch API cannot load file:.*\.html|.*ERR_FAILED$)"
            r"|failed: file:.*\.html|exception: .*Failed to fetch"
        )
        report.findings = [finding for finding in report.findings if not excerpts.match(finding)]
    report.seconds = time.perf_counter() - start
    return report


_browser: Browser | None = None


def _start() -> None:
    global _browser
    _browser = launch(sync_playwright().start())


def _job(job: tuple[str, str, str, str]) -> Report:
    kind, base, name, axe = job
    assert _browser is not None
    context = _browser.new_context()
    try:
        return check_search(context, base, name) if kind == "search" else check_page(context, base, name, axe)
    except PlaywrightError as error:
        return Report(f"{base.split(':')[0]} {name}", [f"the check stopped: {str(error)[:300]}"])
    finally:
        context.close()


def check_site(site: Path, axe: str, jobs: int, query: str, only: str = "") -> Iterable[Report]:
    """Reports of all pages, opened from a server and from disk, as they come.

    Args:
        site: folder of the built site.
        axe: source of axe-core; empty leaves accessibility out.
        jobs: browsers at a time.
        query: what to search for; some page must contain it.
        only: names of pages contain this.
    """
    dead = dead_links(site)
    yield Report("links", [f"{page}: {link}" for page, links in dead.items() for link in links])
    server, address = serve(site)
    names = [p.relative_to(site).as_posix() for p in site_pages(site)]
    names = [name for name in names if only in name]
    bases = [address, site.resolve().as_uri()]
    work = [("page", base, name, axe) for base in bases for name in names]
    work += [("search", base, query, "") for base in bases]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), _start) as pool:
        yield from pool.map(_job, work)
    server.shutdown()


def main() -> int:
    """Check a site and print the findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("site", type=Path)
    parser.add_argument("--axe", type=Path, help="axe.min.js; without it accessibility is left out")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1))
    parser.add_argument("--query", default="gradient")
    parser.add_argument("--only", default="", help="check only pages whose name contains this")
    parser.add_argument("--verbose", action="store_true", help="also list the pages without findings")
    args = parser.parse_args()
    if find_browser() is None:
        print(f"no browser: looked for {', '.join(BROWSERS)} and the variable CHROMIUM")
        return 2
    axe = args.axe.read_text(encoding="utf-8") if args.axe else ""
    pages = findings = sliders = axe_runs = 0
    for report in check_site(args.site, axe, args.jobs, args.query, args.only):
        pages, findings = pages + 1, findings + len(report.findings)
        sliders, axe_runs = sliders + report.sliders, axe_runs + report.axe_runs
        if report.findings or args.verbose:
            print(
                f"{report.name}: {len(report.findings)} findings, {report.seconds:.1f} s, "
                f"{report.requests} requests, {report.kilobytes:.0f} kB, {report.sliders} sliders",
                flush=True,
            )
        for finding in report.findings:
            print(f"    {finding}", flush=True)
    print(f"{pages} checks, {sliders} sliders moved, {axe_runs} axe runs, {findings} findings")
    return 1 if findings or not pages else 0


if __name__ == "__main__":
    sys.exit(main())
