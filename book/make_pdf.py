"""Print the whole book to one PDF with the Chromium or Chrome of this machine.

python book/make_pdf.py _build/rlhf-checked.pdf
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from playwright.sync_api import sync_playwright

from build import ROOT, build
from check_site import BROWSERS, find_browser, launch, look_at, open_page, serve


def print_book(site: Path, out: Path) -> list[str]:
    """Print the one long page of ``site`` to ``out``; returns what was wrong with it."""
    server, address = serve(site)
    with sync_playwright() as playwright:
        browser = launch(playwright)
        page = browser.new_page()
        open_page(page, f"{address}/index.html", patience=60.0)
        findings = look_at(page)
        # an answer that is folded on the screen is printed
        page.evaluate("() => document.querySelectorAll('details').forEach(d => { d.open = true; })")
        page.emulate_media(media="print", color_scheme="light")
        margin = {"top": "16mm", "bottom": "16mm", "left": "15mm", "right": "15mm"}
        page.pdf(path=out, format="A4", margin=margin, tagged=True, outline=True)  # type: ignore[arg-type]
        browser.close()
    server.shutdown()
    return findings


def main() -> int:
    """Build the long page and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    if find_browser() is None:
        print(f"no browser: looked for {', '.join(BROWSERS)} and the variable CHROMIUM")
        return 2
    good, log, seconds = build("singlehtml")
    if not good:
        print(log)
        return 1
    print(f"one page built in {seconds:.1f} s")
    start = time.perf_counter()
    findings = print_book(ROOT / "_build" / "singlehtml", args.out)
    print("\n".join(findings))
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB, printed in {time.perf_counter() - start:.1f} s")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
