"""Whether every numbered equation of a page has a test that derives it again."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

CHAPTERS = Path(__file__).resolve().parents[2] / "chapters"
ITSELF = "test_every_numbered_equation_of_the_page_has_its_test"


def require_complete(page: str, equations: dict[str, Callable[..., None]], names: dict[str, Any]) -> None:
    """Fail unless the page's labels are those of the tests, each docstring begins with its label, and no test is left.

    Args:
        page: the notebook's name without its ending.
        equations: label -> test.
        names: the globals of the test file.
    """
    cells = json.loads((CHAPTERS / f"{page}.ipynb").read_text(encoding="utf-8"))["cells"]
    text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    labels = re.findall(r"^\$\$ *\(([\w-]+)\) *$", text, flags=re.MULTILINE)
    assert labels and len(labels) == len(set(labels))
    assert set(labels) == set(equations)
    for label, test in equations.items():
        assert (test.__doc__ or "").startswith(f"({label}):"), label
    tests = {name for name in names if name.startswith("test_")}
    assert tests - {test.__name__ for test in equations.values()} == {ITSELF}
