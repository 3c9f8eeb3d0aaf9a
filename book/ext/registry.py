"""Tables made from the notebooks and the homework bank: claim registry, kill matrix, solutions, common wrong claims.

Nothing here is typed in twice. The claim registry reads the outputs stored in the notebooks; the kill matrix runs
every planted mistake through every check; the solutions come from the master notebooks.
"""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from docutils import nodes
from docutils.parsers.rst import directives
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError, NoUri
from sphinx.util.docutils import SphinxDirective

CLAIM_MIME = "application/vnd.rlhfkit.claim+json"
# cells with these tags show no output, so that a link to a claim in them would lead nowhere
HIDDEN = {"remove-cell", "remove-output", "remove_cell", "remove_output"}
TARGET = "registry_target"  # (document, anchor) of a reference whose address is known only when pages are written


@dataclass(frozen=True)
class Claim:
    """One asserted number, as a notebook stores it.

    Attributes:
        docname: the page, as Sphinx names it.
        name: unique on the page; the anchor is ``claim-NAME``.
        text: the claim in words.
        value: the number as shown, with its bound sign if it is a bound.
        condition: what was asserted.
        source: how the number was obtained.
    """

    docname: str
    name: str
    text: str
    value: str
    condition: str
    source: str


def read_notebook(path: Path) -> Mapping[str, Any]:
    """The notebook's JSON, from a file with suffix ``.ipynb``."""
    notebook: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return notebook


def cell_text(cell: Mapping[str, Any]) -> str:
    """Source of a cell, whichever way the file stores its lines."""
    source = cell["source"]
    return source if isinstance(source, str) else "".join(source)


def page_title(notebook: Mapping[str, Any], default: str) -> str:
    """The first heading of a notebook, without markup."""
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            heading = re.search(r"^# +(.+?)\s*$", cell_text(cell), flags=re.MULTILINE)
            if heading:
                return heading[1].replace("`", "")
    return default


def read_claims(path: Path, docname: str) -> list[Claim]:
    """All claims in the stored outputs of a notebook, in the order of the page.

    Args:
        path: of the notebook.
        docname: of its page.

    Raises:
        ExtensionError: if a name appears twice, a record is incomplete, a claim's output is hidden from the page, or a
            cell calls ``claim`` and stores no claim (its outputs were stripped).
    """
    claims: dict[str, Claim] = {}
    for number, cell in enumerate(read_notebook(path)["cells"]):
        if cell["cell_type"] != "code":
            continue
        records = [data for output in cell["outputs"] if (data := output.get("data", {}).get(CLAIM_MIME))]
        if not records and re.search(r"^\s*claim\(", cell_text(cell), flags=re.MULTILINE):
            raise ExtensionError(f"{docname}, cell {number}: calls claim but stores no claim; run `make refresh`")
        if records and HIDDEN & set(cell["metadata"].get("tags", [])):
            raise ExtensionError(f"{docname}, cell {number}: a claim in a cell whose output the page does not show")
        for record in records:
            record = json.loads(record) if isinstance(record, str) else record
            missing = {"name", "text", "value", "condition", "source"} - set(record)
            if missing:
                raise ExtensionError(f"{docname}, cell {number}: claim {record} lacks {', '.join(sorted(missing))}")
            claim = Claim(
                docname, **{key: str(record[key]) for key in ("name", "text", "value", "condition", "source")}
            )
            if claim.name in claims:
                raise ExtensionError(f"{docname}, cell {number}: second claim named {claim.name!r} on this page")
            claims[claim.name] = claim
    return list(claims.values())


def notebook_pages(env: BuildEnvironment) -> list[tuple[str, Path]]:
    """Document name and file of every notebook in the book, the landing page first."""
    root = env.config.root_doc
    pages = [(docname, Path(env.doc2path(docname))) for docname in env.found_docs]
    notebooks = [(docname, path) for docname, path in pages if path.suffix == ".ipynb"]
    return sorted(notebooks, key=lambda page: (page[0] != root, page[0]))


def link(text: str, docname: str, anchor: str = "") -> nodes.reference:
    """A reference to a page or to an anchor on it, resolved when the page is written."""
    reference = nodes.reference("", "", nodes.inline("", text), internal=True)
    reference[TARGET] = (docname, anchor)
    return reference


def paragraph(*children: nodes.Node | str) -> nodes.paragraph:
    """A paragraph of nodes and plain text."""
    result = nodes.paragraph()
    result += [nodes.Text(child) if isinstance(child, str) else child for child in children]
    return result


def table(
    header: Iterable[str], rows: Iterable[Iterable[nodes.Node | str]], widths: Iterable[int], ids: Iterable[str] = ()
) -> nodes.table:
    """A table of paragraphs; ``ids`` gives each row an anchor."""
    widths, header, rows = list(widths), list(header), [list(row) for row in rows]
    result = nodes.table(classes=["registry"])
    group = nodes.tgroup(cols=len(widths))
    result += group
    group += [nodes.colspec(colwidth=width) for width in widths]

    def make_row(cells: Iterable[nodes.Node | str], anchor: str = "") -> nodes.row:
        row = nodes.row()
        for position, cell in enumerate(cells):
            entry = nodes.entry("", cell if isinstance(cell, nodes.paragraph) else paragraph(cell))
            if position == 0 and anchor:
                entry.insert(0, nodes.target(ids=[anchor]))
            row += entry
        return row

    head, body = nodes.thead(), nodes.tbody()
    head += make_row(header)
    anchors = list(ids) or [""] * len(rows)
    body += [make_row(row, anchor) for row, anchor in zip(rows, anchors, strict=True)]
    group += [head, body]
    return result


def section(title: str, anchor: str, *children: nodes.Node) -> nodes.section:
    """A section with a fixed anchor."""
    result = nodes.section(
        "", nodes.title("", title), *children, ids=[anchor], names=[nodes.fully_normalize_name(title)]
    )
    return result


def plural(count: int, noun: str) -> str:
    """``1 claim``, ``2 claims``."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


class ClaimRegistry(SphinxDirective):
    """``{claim-registry}``: every asserted number of the book, page by page, linked to its place."""

    def run(self) -> list[nodes.Node]:
        """Make a summary and one section for each page that asserts something."""
        self.env.note_reread()  # a new notebook must appear although this page's own file did not change
        sections, total = [], 0
        for docname, path in notebook_pages(self.env):
            self.env.note_dependency(str(path))
            claims = read_claims(path, docname)
            if not claims:
                continue
            total += len(claims)
            rows = [
                (
                    paragraph(link(c.text, docname, f"claim-{c.name}")),
                    c.value.replace(" ", "\u00a0"),
                    c.condition,
                    c.source,
                )
                for c in claims
            ]
            title = page_title(read_notebook(path), docname)
            heading = paragraph("Page: ", link(title, docname), f". {plural(len(claims), 'claim')}.")
            body = table(("Claim", "Value", "Asserted", "Source"), rows, (46, 12, 20, 22))
            sections.append(section(title, f"claims-{nodes.make_id(docname)}", heading, body))
        summary = paragraph(f"The book asserts {plural(total, 'number')} on {plural(len(sections), 'page')}.")
        return [summary, *sections]


def homework_files() -> list[str]:
    """Files that decide the kill matrix: the package, homework bank included."""
    package = importlib.import_module("rlhfkit")
    return sorted(str(path) for folder in package.__path__ for path in Path(folder).rglob("*.py"))


@dataclass(frozen=True)
class Mistake:
    """A planted wrong answer, what the learner is told, and the numbers of the cases that reject it, from 1."""

    name: str
    says: str
    source: str
    rejected_by: frozenset[int]


@dataclass(frozen=True)
class QuestionRecord:
    """A question of the bank: its cases with their points, its planted mistakes, its other right answers."""

    question: str
    title: str
    chapter: int
    cases: tuple[tuple[str, int], ...]
    mistakes: tuple[Mistake, ...]
    rights: int


def read_kill_matrix(raw: Iterable[Mapping[str, Any]]) -> list[QuestionRecord]:
    """Turn ``rlhfkit.homework.kill_matrix()`` into records, and refuse a matrix that proves nothing.

    Raises:
        ExtensionError: if there is no question, a planted mistake is accepted, or is diagnosed as nothing, as another
            one or as several, or a case rejects nothing.
    """
    records = []
    for item in raw:
        question = str(item["question"])
        cases = tuple((str(case["name"]), int(case["points"])) for case in item["cases"])
        mistakes = []
        for wrong in item["wrong"]:
            rejected_by = frozenset(wrong["rejected_by"])
            if not rejected_by:
                raise ExtensionError(f"{question}: planted mistake {wrong['name']!r} is accepted")
            if not rejected_by <= set(range(1, len(cases) + 1)):
                raise ExtensionError(f"{question}: {wrong['name']!r} is rejected by cases that do not exist")
            if list(wrong["diagnosis"]) != [wrong["name"]]:
                raise ExtensionError(f"{question}: {wrong['name']!r} is diagnosed as {wrong['diagnosis']}")
            mistakes.append(Mistake(str(wrong["name"]), str(wrong["says"]), str(wrong["source"]), rejected_by))
        for number, (case, _) in enumerate(cases, 1):
            if not any(number in mistake.rejected_by for mistake in mistakes):
                raise ExtensionError(f"{question}: case {case!r} rejects no planted mistake")
        rights = len(item["rights"]) + 1  # the reference is one of them
        records.append(
            QuestionRecord(question, str(item["title"]), int(item["chapter"]), cases, tuple(mistakes), rights)
        )
    if not records:
        raise ExtensionError("kill matrix: the homework bank holds no question")
    return records


def source_cell(source: str, known: Iterable[str], page: str) -> nodes.paragraph:
    """The id of a wrong claim as a link to its row; any other source as text."""
    return paragraph(link(source, page, source.lower()) if source in set(known) else source)


class KillMatrix(SphinxDirective):
    """``{kill-matrix}``: every planted mistake against every check of its question."""

    option_spec: ClassVar[dict[str, Any]] = {"wrong-claims": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        """Run the bank and make one section for each question."""
        for path in homework_files():
            self.env.note_dependency(path)
        homework = importlib.import_module("rlhfkit.homework")
        records = read_kill_matrix(homework.kill_matrix())
        known = wrong_claims()
        page = self.options.get("wrong-claims", "pages/wrong-claims")
        mistakes = sum(len(record.mistakes) for record in records)
        summary = paragraph(
            f"{plural(len(records), 'question')}, {plural(sum(len(r.cases) for r in records), 'case')}, "
            f"{plural(mistakes, 'planted mistake')}: all {mistakes} are rejected, and each is named in the feedback as "
            f"itself and nothing else. The tests also run {plural(sum(r.rights for r in records), 'right answer')}, "
            "written in different ways, which must pass every case."
        )
        return [summary, *(self.one(record, known, page) for record in records)]

    def one(self, record: QuestionRecord, known: Iterable[str], page: str) -> nodes.section:
        """The cases of one question, and the table of its planted mistakes."""
        key = nodes.enumerated_list(enumtype="arabic", prefix="", suffix=".")
        key += [nodes.list_item("", paragraph(f"{name} ({plural(points, 'point')})")) for name, points in record.cases]
        numbers = range(1, len(record.cases) + 1)
        rows = [
            [
                paragraph(nodes.strong("", mistake.name), f": {mistake.says}"),
                source_cell(mistake.source, known, page),
                *("rejected" if number in mistake.rejected_by else "–" for number in numbers),  # words, not colours
            ]
            for mistake in record.mistakes
        ]
        header = ["Planted mistake, and what the learner is told", "Source", *(f"Case {number}" for number in numbers)]
        body = table(header, rows, [50, 12, *([12] * len(record.cases))])
        count = plural(len(record.mistakes), "planted mistake")
        homework = chapter_link(self.env, record.chapter, "homework", "homework/hw")
        intro = paragraph(nodes.literal("", record.question), ", ", homework, f", {count}. The cases:")
        title = record.title[:1].upper() + record.title[1:]
        return section(title, f"q-{record.question}", intro, key, body)


def wrong_claims() -> dict[str, Any]:
    """The bank's common wrong claims by id, each with ``claim``, ``verdict`` (what holds instead) and ``chapter``.

    Raises:
        ExtensionError: if an id is not of the form W-PG-1, or a text is empty.
    """
    found: dict[str, Any] = dict(importlib.import_module("rlhfkit.homework.bank.wrong_claims").WRONG_CLAIMS)
    for key, value in found.items():
        if not re.fullmatch(r"W-[A-Z]+-\d+", key):
            raise ExtensionError(f"wrong claim {key!r}: expected an id such as W-PG-1")
        if not value.claim.strip() or not value.verdict.strip():
            raise ExtensionError(f"wrong claim {key}: claim or verdict is empty")
    return found


def chapter_page(env: BuildEnvironment, number: int, start: str = "chapters/") -> str | None:
    """The document name of the chapter (or homework) with this number, or None."""
    pages = sorted(docname for docname in env.found_docs if re.match(rf"{start}0*{number}_", docname))
    return pages[0] if pages else None


def chapter_link(
    env: BuildEnvironment, number: int, word: str = "chapter", start: str = "chapters/", anchor: str = ""
) -> nodes.Node:
    """A link to the chapter (or homework) with this number, or plain words as long as there is no such page."""
    page = chapter_page(env, number, start)
    return link(f"{word} {number}", page, anchor) if page else nodes.Text(f"{word} {number}")


CLAIM_ID = re.compile(r"\bW-[A-Z]+-\d+\b")


def boxed_claims(path: Path) -> set[str]:
    """Ids of the wrong claims that have a box of their own in a notebook: an admonition with the id in its title."""
    titles = []
    for cell in read_notebook(path)["cells"]:
        if cell["cell_type"] == "markdown":
            titles += re.findall(r"^(?:```+|:::+)\s*\{admonition\}(.*)$", cell_text(cell), flags=re.MULTILINE)
    return set(CLAIM_ID.findall(" ".join(titles)))


def name_boxes(app: Sphinx, doctree: nodes.document) -> None:
    """Give every box about wrong claims anchors, ``w-pg-1`` for W-PG-1, so that the list of them can lead there."""
    for box in doctree.findall(nodes.admonition):
        title = next(iter(box.findall(nodes.title)), None)
        for key in CLAIM_ID.findall(title.astext()) if title is not None else ():
            if key.lower() not in doctree.ids:
                box["ids"].append(key.lower())
                doctree.ids[key.lower()] = box


class WrongClaims(SphinxDirective):
    """``{wrong-claims}``: statements often made and wrong, what holds instead, and what rejects them."""

    option_spec: ClassVar[dict[str, Any]] = {"kill-matrix": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        """Make the table, with links to the questions whose planted mistakes come from each claim."""
        pages = notebook_pages(self.env)
        for path in [*homework_files(), *(str(path) for _, path in pages)]:
            self.env.note_dependency(path)
        boxes: dict[str | None, set[str]] = {docname: boxed_claims(path) for docname, path in pages}
        importlib.import_module("rlhfkit.homework")  # registers the questions
        page = self.options.get("kill-matrix", "pages/kill-matrix")
        questions: dict[str, list[str]] = {}
        for question in importlib.import_module("rlhfkit.homework.core").QUESTIONS.values():
            for source in dict.fromkeys(wrong.source for wrong in question.wrongs):
                questions.setdefault(source, []).append(question.id)
        rows, ids = [], []
        for key, value in wrong_claims().items():
            boxed = key in boxes.get(chapter_page(self.env, value.chapter), ())
            where = paragraph(chapter_link(self.env, value.chapter, anchor=key.lower() if boxed else ""))
            for position, question in enumerate(questions.get(key, [])):
                where += [nodes.Text(", " if position else "; "), link(question, page, f"q-{question}")]
            rows.append([paragraph(nodes.strong("", key, classes=["text-nowrap"])), value.claim, value.verdict, where])
            ids.append(key.lower())
        return [table(("Id", "The claim", "What holds instead", "Rejected in"), rows, (13, 30, 37, 20), ids)]


@dataclass(frozen=True)
class Solution:
    """A question of a master notebook: its id, its text in MyST, and its solution."""

    question: str
    text: str
    code: tuple[str, ...]
    words: tuple[str, ...]


def strip_markers(code: str) -> str:
    """A solution cell without the markers that tell the student version from the full one."""
    lines = [line for line in code.splitlines() if not re.fullmatch(r"\s*# (BEGIN|END) SOLUTION.*", line)]
    return "\n".join(re.sub(r"\s+# SOLUTION$", "", line) for line in lines).strip("\n")


def without_headings(text: str) -> str:
    """MyST text with its headings in bold, so that they open no sections; fenced code stays as it is."""
    fenced, lines = False, []
    for line in text.splitlines():
        fenced ^= bool(re.match(r"\s*(```|~~~)", line))
        lines.append(line if fenced else re.sub(r"^#+ +(.+)$", r"**\1**", line))
    return "\n".join(lines)


def read_solutions(path: Path) -> tuple[str, list[Solution]]:
    """Title and questions of a master notebook.

    Raises:
        ExtensionError: if a question has no name or no solution, or the notebook has no question.
    """
    notebook = read_notebook(path)
    found, question, part = [], "", ""
    text: list[str] = []
    code: list[str] = []
    words: list[str] = []
    for cell in notebook["cells"]:
        source = cell_text(cell).strip()
        if cell["cell_type"] == "raw":
            if source.startswith("# BEGIN QUESTION"):
                named = re.search(r"^\s*name:\s*(\S+)", source, flags=re.MULTILINE)
                if not named:
                    raise ExtensionError(f"{path.name}: a question without a name")
                question, part, text, code, words = named[1], "text", [], [], []
            elif source.startswith("# BEGIN SOLUTION"):
                part = "solution"
            elif source.startswith("# BEGIN"):
                part = ""
            elif source.startswith("# END QUESTION"):
                if not code and not words:
                    raise ExtensionError(f"{path.name}: question {question!r} has no solution")
                found.append(Solution(question, "\n\n".join(text), tuple(code), tuple(words)))
                part = ""
            elif source.startswith("# END"):
                part = ""
        elif part == "text" and cell["cell_type"] == "markdown":
            text.append(source)
        elif part == "solution":
            (code if cell["cell_type"] == "code" else words).append(
                strip_markers(source) if cell["cell_type"] == "code" else source
            )
    if not found:
        raise ExtensionError(f"{path.name}: no question found")
    return page_title(notebook, path.stem), found


class HomeworkSolutions(SphinxDirective):
    """``{homework-solutions} hw02 hw03``: the questions of master notebooks, each with its solution folded."""

    required_arguments = 1
    final_argument_whitespace = True
    option_spec: ClassVar[dict[str, Any]] = {"folder": directives.unchanged}

    def run(self) -> list[nodes.Node]:
        """Make one section for each notebook and question."""
        folder = Path(self.env.srcdir, self.options.get("folder", "homework/master"))
        sections: list[nodes.Node] = []
        for name in self.arguments[0].split():
            paths = sorted(folder.glob(f"{name}_*.ipynb"))
            if len(paths) != 1:
                raise ExtensionError(
                    f"homework-solutions: {len(paths)} notebooks {folder.name}/{name}_*.ipynb, expected 1"
                )
            for path in [str(paths[0]), *homework_files()]:
                self.env.note_dependency(path)
            title, solutions = read_solutions(paths[0])
            body = section(title, f"solutions-{name}")
            sections.append(body)
            for solution in solutions:
                body += self.one(solution)
        return sections

    def one(self, solution: Solution) -> nodes.section:
        """A question's heading and text, and its solution in a dropdown, with the bank's explanation in words."""
        heading = re.match(r"#+ +(.+)\n?", solution.text)
        title = heading[1].strip() if heading else solution.question
        text = solution.text[heading.end() :] if heading else solution.text
        lines = [without_headings(text), "", ":::::{dropdown} Solution", "\n\n".join(solution.words)]
        for code in solution.code:
            lines += ["", "```python", code, "```"]
        result = nodes.section(ids=[f"solution-{solution.question}"], names=[f"solution-{solution.question}"])
        result += nodes.title("", "", *self.parse(title, nodes.container()).children[0].children)
        self.parse("\n".join([*lines, ":::::", ""]), result)
        importlib.import_module("rlhfkit.homework")  # registers the questions
        question = importlib.import_module("rlhfkit.homework.core").QUESTIONS.get(solution.question)
        if question is not None and question.explanation:
            folds = [node for node in result.findall(nodes.container) if node.get("design_component") == "dropdown"]
            folds[-1] += paragraph(question.explanation)  # plain text, not MyST
        return result

    def parse(self, text: str, parent: nodes.Element) -> nodes.Element:
        """Parse MyST into a node, and return the node."""
        self.state.nested_parse(StringList(text.splitlines(), source=self.env.docname), 0, parent)
        return parent


def resolve_links(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Give the references made by :func:`link` their addresses, for the builder at work."""
    for reference in list(doctree.findall(nodes.reference)):
        if TARGET not in reference:
            continue
        target, anchor = reference[TARGET]
        del reference.attributes[TARGET]
        try:
            uri = app.builder.get_relative_uri(docname, target)
        except NoUri:
            reference.replace_self(reference.children)
            continue
        reference["refuri"] = f"{uri}#{anchor}" if anchor else uri


def setup(app: Sphinx) -> dict[str, Any]:
    """Register with Sphinx."""
    app.add_directive("claim-registry", ClaimRegistry)
    app.add_directive("kill-matrix", KillMatrix)
    app.add_directive("wrong-claims", WrongClaims)
    app.add_directive("homework-solutions", HomeworkSolutions)
    app.connect("doctree-read", name_boxes)
    app.connect("doctree-resolved", resolve_links)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
