"""The generated pages: every claim is listed and linked, and a table that would prove nothing is refused."""

import copy
import importlib
import importlib.util
import json
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("sphinx_design")
from sphinx.application import Sphinx
from sphinx.errors import ExtensionError
from sphinx.util.docutils import docutils_namespace, patch_docutils

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = [path for path in [ROOT / "index.ipynb", *sorted((ROOT / "chapters").glob("*.ipynb"))] if path.exists()]


def load_registry() -> ModuleType:
    spec = importlib.util.spec_from_file_location("registry", ROOT / "book" / "ext" / "registry.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["registry"] = module
    spec.loader.exec_module(module)
    return module


registry = load_registry()


# -- notebooks made for the tests --------------------------------------------------------------------------------------


def claim_output(name: str, text: str = "A number", value: str = "0.500", **fields: str) -> dict[str, Any]:
    record = {"name": name, "text": text, "value": value, "condition": "0.500 to within 0.1", "source": "5 seeds"}
    html = f'<div class="claim" id="claim-{name}">{text}: {value}</div>'
    data = {registry.CLAIM_MIME: record | fields, "text/html": html, "text/plain": f"{text}: {value}"}
    return {"output_type": "display_data", "data": data, "metadata": {}}


def code(source: str, *outputs: dict[str, Any], tags: tuple[str, ...] = ()) -> dict[str, Any]:
    metadata = {"tags": list(tags)} if tags else {}
    return {"cell_type": "code", "execution_count": 1, "metadata": metadata, "source": source, "outputs": list(outputs)}


def words(source: str, kind: str = "markdown") -> dict[str, Any]:
    return {"cell_type": kind, "metadata": {}, "source": source}


def write(path: Path, *cells: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = tuple(cell | {"id": f"c{i}"} for i, cell in enumerate(cells))
    metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    path.write_text(json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}))
    return path


# -- reading claims ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_claim_of_every_notebook_is_listed(path: Path) -> None:
    """Against a count of its own: the anchors in the stored html, and the calls of claim in the cells."""
    stored = path.read_text(encoding="utf-8")
    anchors = re.findall(r'id=\\"claim-([a-z0-9-]+)\\"', stored)
    listed = [claim.name for claim in registry.read_claims(path, path.stem)]
    assert listed == anchors and len(set(listed)) == len(listed)
    sources = ["".join(cell["source"]) for cell in json.loads(stored)["cells"] if cell["cell_type"] == "code"]
    for name in re.findall(r'\bclaim\(\s*"([a-z0-9-]+)"', "\n".join(sources)):
        assert name in listed


def test_claims_are_read_in_order_whichever_way_the_notebook_stores_them(tmp_path: Path) -> None:
    cell = code("claim()", claim_output("b"), claim_output("a"))
    as_text = copy.deepcopy(cell)
    as_text["outputs"][0]["data"][registry.CLAIM_MIME] = json.dumps(cell["outputs"][0]["data"][registry.CLAIM_MIME])
    as_text["source"] = ["claim", "()"]
    for version in (cell, as_text):
        path = write(tmp_path / "x.ipynb", words("# T"), version)
        assert [claim.name for claim in registry.read_claims(path, "x")] == ["b", "a"]


@pytest.mark.parametrize(
    ("cells", "message"),
    [
        ([code("", claim_output("a")), code("", claim_output("a"))], "second claim named 'a'"),
        ([code("", claim_output("a"), claim_output("a"))], "second claim named 'a'"),
        ([code('claim("a", 1, 1, tol=1)')], "stores no claim"),
        ([code("", claim_output("a"), tags=("remove-output",))], "does not show"),
        ([code("", claim_output("a"), tags=("hide-input", "remove-cell"))], "does not show"),
    ],
)
def test_a_claim_that_cannot_be_linked_is_an_error(tmp_path: Path, cells: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ExtensionError, match=message):
        registry.read_claims(write(tmp_path / "x.ipynb", *cells), "x")


@pytest.mark.parametrize("field", ["name", "text", "value", "condition", "source"])
def test_an_incomplete_claim_is_an_error(tmp_path: Path, field: str) -> None:
    output = claim_output("a")
    del output["data"][registry.CLAIM_MIME][field]
    with pytest.raises(ExtensionError, match=field):
        registry.read_claims(write(tmp_path / "x.ipynb", code("", output)), "x")


# -- building pages ----------------------------------------------------------------------------------------------------

CONF = """
import sys
sys.path.insert(0, {ext!r})
extensions = ["myst_nb", "sphinx_design", "registry"]
root_doc = "index"
nb_execution_mode = "off"
myst_enable_extensions = ["colon_fence", "dollarmath"]
mathjax_path = "mathjax.js"
exclude_patterns = ["homework"]
nitpicky = True
suppress_warnings = ["mystnb.unknown_mime_type"]  # as jupyter-book does
"""
INDEX = "# Start\n\n```{{toctree}}\n:glob:\n\n{pages}\n```\n"


@pytest.fixture
def site(tmp_path: Path) -> Callable[..., Path]:
    """Build a little book from ``tmp_path/src``; a later call builds what has changed."""
    source = tmp_path / "src"
    source.mkdir()
    (source / "conf.py").write_text(CONF.format(ext=str(ROOT / "book" / "ext")))

    def build() -> Path:
        pages = sorted(str(p.relative_to(source).with_suffix("")) for p in source.rglob("*.*") if p.stem != "index")
        listed = [page for page in pages if not page.startswith(("conf", "homework"))]
        index = INDEX.format(pages="\n".join(listed))
        if not (source / "index.md").exists() or (source / "index.md").read_text() != index:
            (source / "index.md").write_text(index)
        with warnings.catch_warnings(), patch_docutils(), docutils_namespace():
            warnings.simplefilter("ignore")
            out = tmp_path / "html"
            app = Sphinx(
                source, source, out, tmp_path / "trees", "html", status=None, warning=None, warningiserror=True
            )
            app.build()
            assert app.statuscode == 0
        return out

    return build


def test_the_registry_follows_the_notebooks(site: Callable[[], Path], tmp_path: Path) -> None:
    """A changed claim, a new notebook, a removed one: the next build shows them, and links lead to anchors."""
    source = tmp_path / "src"
    (source / "pages").mkdir()
    (source / "pages" / "claims.md").write_text("# Claims\n\n```{claim-registry}\n```\n")
    write(source / "chapters" / "02_a.ipynb", words("# Two"), code("x", claim_output("kl", "KL < & so", "0.123")))
    out = site()
    table = (out / "pages" / "claims.html").read_text()
    assert "The book asserts 1 number on 1 page." in table
    assert "KL &lt; &amp; so" in table and "0.123" in table and "5 seeds" in table and ">Two<" in table
    assert 'href="../chapters/02_a.html#claim-kl"' in table
    assert 'id="claim-kl"' in (out / "chapters" / "02_a.html").read_text()

    write(source / "chapters" / "02_a.ipynb", words("# Two"), code("x", claim_output("kl", "KL < & so", "0.456")))
    table = (site() / "pages" / "claims.html").read_text()
    assert "0.456" in table and "0.123" not in table

    write(source / "chapters" / "03_b.ipynb", words("# Three"), code("x", claim_output("kl"), claim_output("second")))
    table = (site() / "pages" / "claims.html").read_text()
    assert "The book asserts 3 numbers on 2 pages." in table  # the same name on two pages is no duplicate
    assert 'href="../chapters/03_b.html#claim-kl"' in table and 'href="../chapters/03_b.html#claim-second"' in table

    (source / "chapters" / "02_a.ipynb").unlink()
    table = (site() / "pages" / "claims.html").read_text()
    assert "0.456" not in table and "The book asserts 2 numbers on 1 page." in table

    write(source / "chapters" / "03_b.ipynb", words("# Three"), code("x", claim_output("kl"), claim_output("kl")))
    with pytest.raises(ExtensionError, match="second claim named 'kl'"):
        site()


MATRIX: list[dict[str, Any]] = [
    {
        "question": "gae",
        "title": "advantages",
        "chapter": 3,
        "cases": [{"name": "lam = 0 is the TD error", "points": 1}, {"name": "dones cut", "points": 2}],
        "wrong": [
            {
                "name": "no-cut",
                "says": "dones ignored",
                "source": "W-BL-1",
                "rejected_by": [2],
                "diagnosis": ["no-cut"],
            },
            {"name": "sign", "says": "V added", "source": "common", "rejected_by": [1, 2], "diagnosis": ["sign"]},
        ],
        "rights": ["loop"],
    }
]


def spoil(matrix: list[dict[str, Any]], how: str) -> list[dict[str, Any]]:
    matrix = copy.deepcopy(matrix)
    wrong = matrix[0]["wrong"]
    if how == "accepted":
        wrong[0]["rejected_by"] = []
    elif how == "not named":
        wrong[0]["diagnosis"] = []
    elif how == "named as another":
        wrong[0]["diagnosis"] = ["sign"]
    elif how == "named as two":
        wrong[0]["diagnosis"] = ["no-cut", "sign"]
    elif how == "idle case":
        wrong[1]["rejected_by"] = [2]
    elif how == "unknown case":
        wrong[0]["rejected_by"] = [2, 3]
    elif how == "empty":
        matrix.clear()
    return matrix


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("accepted", "is accepted"),
        ("not named", "diagnosed as"),
        ("named as another", "diagnosed as"),
        ("named as two", "diagnosed as"),
        ("idle case", "rejects no planted mistake"),
        ("unknown case", "do not exist"),
        ("empty", "no question"),
    ],
)
def test_a_kill_matrix_that_proves_too_little_is_refused(how: str, message: str) -> None:
    assert len(registry.read_kill_matrix(MATRIX)) == 1
    with pytest.raises(ExtensionError, match=message):
        registry.read_kill_matrix(spoil(MATRIX, how))


MASTER = [
    words("# ASSIGNMENT CONFIG\nname: hw03", "raw"),
    words("# Homework 3"),
    code("import torch"),
    words("# BEGIN QUESTION\nname: gae\npoints: 3", "raw"),
    words("## Advantages $A_t$\n\nWrite it.\n\n```python\n# a comment\n```"),
    words("# BEGIN SOLUTION", "raw"),
    code("def gae(r):\n    # BEGIN SOLUTION\n    return 2 * r\n    # END SOLUTION\n\n\nx = 3  # SOLUTION"),
    words("# END SOLUTION", "raw"),
    words("# BEGIN TESTS", "raw"),
    code("# HIDDEN\nassert gae(1) == 2"),
    words("# END TESTS", "raw"),
    words("# END QUESTION", "raw"),
    code("check('gae', gae)"),
]


def test_solutions_are_the_master_s_without_markers_and_tests(tmp_path: Path) -> None:
    title, (solution,) = registry.read_solutions(write(tmp_path / "hw03_x.ipynb", *MASTER))
    assert title == "Homework 3" and solution.question == "gae"
    assert solution.code == ("def gae(r):\n    return 2 * r\n\n\nx = 3",)
    assert (
        registry.without_headings(solution.text) == "**Advantages $A_t$**\n\nWrite it.\n\n```python\n# a comment\n```"
    )


@pytest.mark.parametrize(("drop", "message"), [(range(5, 8), "no solution"), (range(3, 12), "no question")])
def test_a_master_without_solution_or_question_is_an_error(tmp_path: Path, drop: range, message: str) -> None:
    cells = [cell for i, cell in enumerate(MASTER) if i not in drop]
    with pytest.raises(ExtensionError, match=message):
        registry.read_solutions(write(tmp_path / "hw03_x.ipynb", *cells))


def test_homework_pages_are_built_and_linked(
    site: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill matrix, wrong claims and solutions, each leading to the other."""
    homework = importlib.import_module("rlhfkit.homework")
    bank = importlib.import_module("rlhfkit.homework.bank.wrong_claims")
    core = importlib.import_module("rlhfkit.homework.core")
    monkeypatch.setattr(homework, "kill_matrix", lambda: MATRIX)
    monkeypatch.setattr(bank, "WRONG_CLAIMS", {"W-BL-1": bank.WrongClaim("V is best.", "It is not: b*.", 3)})
    wrong = core.Wrong("no-cut", None, "dones ignored", "W-BL-1")
    question = copy.copy(core.QUESTIONS["gae"])
    question.wrongs, question.explanation = [wrong], "In words: 2 * r_t * 3."
    monkeypatch.setattr(core, "QUESTIONS", {"gae": question})
    pages = tmp_path / "src" / "pages"
    pages.mkdir()
    (pages / "kill-matrix.md").write_text("# Kills\n\n```{kill-matrix}\n```\n")
    (pages / "wrong-claims.md").write_text("# Wrong\n\n```{wrong-claims}\n```\n")
    (pages / "solutions.md").write_text("# Solved\n\n```{homework-solutions} hw03\n```\n")
    write(tmp_path / "src" / "homework" / "master" / "hw03_x.ipynb", *MASTER)
    out = site() / "pages"

    kills = (out / "kill-matrix.html").read_text()
    assert "1 question, 2 cases, 2 planted mistakes: all 2 are rejected" in kills
    assert 'id="q-gae"' in kills and 'href="wrong-claims.html#w-bl-1"' in kills
    rows = re.findall(r"<tr.*?</tr>", kills, flags=re.DOTALL)
    cells = [re.findall(r"<p>(rejected|–)</p>", row) for row in rows[1:]]
    assert cells == [["–", "rejected"], ["rejected", "rejected"]]

    claims = (out / "wrong-claims.html").read_text()
    assert 'id="w-bl-1"' in claims and "V is best." in claims and 'href="kill-matrix.html#q-gae"' in claims

    solved = (out / "solutions.html").read_text()
    assert "<details" in solved and 'id="solution-gae"' in solved and "In words: 2 * r_t * 3." in solved
    assert "SOLUTION" not in solved and "HIDDEN" not in solved


def test_a_wrong_claim_leads_to_its_box_where_the_chapter_has_one(
    site: Callable[[], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = importlib.import_module("rlhfkit.homework.bank.wrong_claims")
    claims = {f"W-BL-{i}": bank.WrongClaim(f"Claim {i}.", "It is not.", 3) for i in (1, 2, 3)}
    monkeypatch.setattr(bank, "WRONG_CLAIMS", claims)
    boxes = '```{admonition} W-BL-1. "V is best"\n:class: warning\nNo.\n```\n\nIn passing: W-BL-2.\n'
    answer = ":::{admonition} Answer, and W-BL-3\n:class: dropdown\nNo.\n:::\n"
    write(tmp_path / "src" / "chapters" / "03_x.ipynb", words("# Three"), words(boxes), words(answer))
    (tmp_path / "src" / "pages").mkdir()
    (tmp_path / "src" / "pages" / "wrong-claims.md").write_text("# Wrong\n\n```{wrong-claims}\n```\n")
    out = site()
    table = (out / "pages" / "wrong-claims.html").read_text()
    chapter = (out / "chapters" / "03_x.html").read_text()
    for key in ("w-bl-1", "w-bl-3"):
        assert f'href="../chapters/03_x.html#{key}"' in table and f'id="{key}"' in chapter
    assert 'href="../chapters/03_x.html"' in table and 'id="w-bl-2"' not in chapter  # no box: the page itself


def test_every_wrong_claim_is_named_on_the_page_of_its_chapter_and_no_other_is() -> None:
    """That a question rejects it too is proven with the homework."""
    bank = importlib.import_module("rlhfkit.homework.bank.wrong_claims")
    for path in NOTEBOOKS[1:]:
        cells = registry.read_notebook(path)["cells"]
        text = " ".join(registry.cell_text(cell) for cell in cells if cell["cell_type"] == "markdown")
        named = set(registry.CLAIM_ID.findall(text))
        assert named <= set(bank.WRONG_CLAIMS)
        assert named >= {key for key, value in bank.WRONG_CLAIMS.items() if value.chapter == int(path.stem[:2])}, path


def test_a_wrong_claim_needs_an_id_and_both_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = importlib.import_module("rlhfkit.homework.bank.wrong_claims")
    assert set(registry.wrong_claims()) == set(bank.WRONG_CLAIMS)
    for bad in ({"BL-1": ("a", "b", 3)}, {"W-BL-1": (" ", "b", 3)}, {"W-BL-1": ("a", "", 3)}):
        with monkeypatch.context() as patch:
            patch.setattr(bank, "WRONG_CLAIMS", {key: bank.WrongClaim(*value) for key, value in bad.items()})
            with pytest.raises(ExtensionError, match="wrong claim"):
                registry.wrong_claims()
