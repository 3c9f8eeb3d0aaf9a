"""Chapter numbers from file names, repairs of the built pages, and a guard: no page loads anything from elsewhere."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docutils import nodes
from myst_nb.sphinx_ import NbMetadataCollector
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError
from sphinx_external_toc.collectors import TocTreeCollectorWithStyles

REPAIRS = [
    # the visible text must be part of the accessible name (axe: label-content-name-mismatch)
    (re.compile(r'(<button class="btn search-button-field[^>]*?) aria-label="Search"'), r"\1"),
    (re.compile(r'(<summary) aria-label="Toggle hidden content"'), r"\1"),
    # sphinx's citation lists use roles that are no longer allowed
    (re.compile(r'<div role="list" class="citation-list">'), '<div class="citation-list">'),
    (re.compile(r' role="doc-biblioentry"'), ""),
    # the book's title in the sidebar sits outside every landmark (axe: region)
    (
        re.compile(r'<div class="sidebar-primary-item">(?=\s*<a class="navbar-brand logo")'),
        '<div class="sidebar-primary-item" role="navigation" aria-label="Book title">',
    ),
    # the icons of the theme button carry titles that count as its text
    (re.compile(r'(<i class="theme-switch [^>]*?) title="[^"]*"'), r"\1"),
]
REMOTE = re.compile(
    r'<(?:script|img|iframe|source|video|audio|embed)\b[^>]*\bsrc="(?:https?:)?//'
    r'|<link\b[^>]*rel="(?:stylesheet|preload|icon|preconnect|modulepreload)"[^>]*href="(?:https?:)?//'
    r'|<link\b[^>]*href="(?:https?:)?//[^>]*rel="(?:stylesheet|preload|icon|preconnect|modulepreload)"'
    r'|@import\s+(?:url\()?["\']?(?:https?:)?//|import\s*\(?\s*["\']https?://'
)
CHAPTER = re.compile(r"(?:^|/)(\d+)_[^/]*$")


def repair(text: str) -> str:
    """The page with the known accessibility faults of the theme repaired."""
    for pattern, new in REPAIRS:
        text = pattern.sub(new, text)
    return text


def remote_loads(text: str) -> list[str]:
    """What the page would fetch from another host, as found in its source."""
    return [m[0][:120] for m in REMOTE.finditer(text)]


def finish_pages(app: Sphinx, exception: Exception | None) -> None:
    """Repair every page, delete source maps, and fail the build if a page loads anything from elsewhere."""
    if exception or app.builder.format != "html":
        return
    for path in Path(app.outdir, "_static").rglob("*.map"):  # 3 MB of source maps nobody reads
        path.unlink()
    found = []
    for path in Path(app.outdir).rglob("*.html"):
        old = path.read_text(encoding="utf-8")
        text = repair(old)
        if text != old:
            path.write_text(text, encoding="utf-8")
        found += [f"{path.name}: {load}" for load in remote_loads(text)]
    if found:
        raise ExtensionError("pages load from elsewhere:\n" + "\n".join(found))


def single_page_handlers(app: Sphinx) -> None:
    """sphinx_proof registers nodes for 'singlehtml' by name, which hides everybody's 'html' handlers."""
    known = app.registry.translation_handlers
    if "singlehtml" in known:
        known["singlehtml"] = {**known.get("html", {}), **known["singlehtml"]}


def single_page_widgets(app: Sphinx, pagename: str, *_: Any) -> None:
    """MyST-NB gives a page the widget state of its own notebook only; the one long page holds all notebooks."""
    if app.builder.name != "singlehtml":
        return
    files = {doc: NbMetadataCollector.get_js_files(app.env, doc) for doc in sorted(app.env.found_docs)}
    known = set(files.get(pagename, {}))
    for doc, scripts in files.items():
        for key, (path, options) in scripts.items():
            if doc != pagename and (key == "ipywidgets_state" or key not in known):
                app.add_js_file(path, **options)
                known.add(key)


def chapter_number(docname: str) -> int | None:
    """The number in the name of a chapter's file: 2 for ``chapters/02_policy_gradient``."""
    found = CHAPTER.search(docname)
    return int(found[1]) if found else None


def number_by_file_name(collector: TocTreeCollectorWithStyles, env: BuildEnvironment) -> list[str]:
    """Section numbers start with the number in the chapter's file name, so that chapters may appear out of order."""
    before = env.toc_secnumbers
    plain_numbers(collector, env)
    for docname, numbers in env.toc_secnumbers.items():
        chapter = chapter_number(docname)
        if chapter is None:
            continue
        env.toc_secnumbers[docname] = {a: n and (chapter, *n[1:]) for a, n in numbers.items()}
        marked = [env.titles[docname], env.longtitles.get(docname, env.titles[docname])]
        marked += list(env.tocs[docname].findall(nodes.reference))
        for node in marked:
            if node.get("secnumber"):
                node["secnumber"] = [chapter, *node["secnumber"][1:]]
    return [docname for docname, numbers in env.toc_secnumbers.items() if numbers != before.get(docname)]


plain_numbers: Any = None


def install_numbering(app: Sphinx) -> None:
    """Put our numbering on top of the one in use, once all extensions are loaded."""
    global plain_numbers
    if TocTreeCollectorWithStyles.assign_section_numbers is not number_by_file_name:
        plain_numbers = TocTreeCollectorWithStyles.assign_section_numbers
        TocTreeCollectorWithStyles.assign_section_numbers = number_by_file_name


def escape_bars(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings write |x| for sizes; reStructuredText would look for a substitution."""
    for i, line in enumerate(lines):
        pieces = line.split("``")  # every second piece is literal text
        pieces[::2] = [re.sub(r"(?<!\\)\|", r"\\|", piece) for piece in pieces[::2]]
        lines[i] = "``".join(pieces)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.connect("builder-inited", install_numbering)
    app.connect("autodoc-process-docstring", escape_bars)
    app.connect("builder-inited", single_page_handlers)
    app.connect("html-page-context", single_page_widgets)
    app.connect("build-finished", finish_pages)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
