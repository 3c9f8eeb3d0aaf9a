"""What a reader of the code relies on: complete docstrings, types that check, code that lints."""

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MATHS = "validation masked logprobs kl kl_controller advantages policy_losses".split()
MATHS += ["preference_losses", "reference_free_losses", "exact"]
LANGUAGE = "tokenizer lexicon grammar reviews collect checkpoints gpt pretrained".split()
LANGUAGE += ["training", "train_sft", "train_preference"]
LABELS = "atomic journal label_store label_studio preferences labelling".split()
MODULES = (*MATHS, *LANGUAGE, *LABELS, "models", "tasks", "sampling", "ppo", "train_policy", "control", "train_control")


def public(module):
    """Public functions, classes and methods with arguments, as (name, object)."""
    for name, x in vars(module).items():
        if getattr(x, "__module__", None) != module.__name__ or name.startswith("_"):
            continue
        if inspect.isfunction(x):
            yield name, x
        elif inspect.isclass(x):
            yield from (
                (f"{name}.{n}", m) for n, m in vars(x).items() if inspect.isfunction(m) and not n.startswith("_")
            )


CASES = [(m, name, x) for m in MODULES for name, x in public(importlib.import_module(f"rlhfkit.{m}"))]
SHORT = {"models", "tasks", *LANGUAGE, *LABELS}  # methods there may say it all in one line, shapes included


@pytest.mark.parametrize(("module", "name", "x"), CASES, ids=[f"{m}.{n}" for m, n, _ in CASES])
def test_docstring_says_arguments_shapes_results_and_errors(module, name, x):
    doc = inspect.getdoc(x)
    assert doc, "no docstring"
    parameters = [p for p in inspect.signature(x).parameters if p != "self"]
    source = inspect.getsource(x)
    if "raise " in source.replace(doc, "") or ("require_" in source.replace(doc, "") and module != "validation"):
        assert "Raises:" in doc or module in SHORT
    if len(doc.splitlines()) == 1 or module == "validation":
        assert re.search(r"\(.*\)|shape", doc) or module in SHORT or not parameters or "->" in doc
        return
    if parameters:
        assert "Args:" in doc or ("Raises:" in doc and module == "training")
    if "Args:" in doc:
        missing = [p for p in parameters if not re.search(rf"^\s+(\w+, )*\*{{0,2}}{p}(, \w+)*: ", doc, re.MULTILINE)]
        assert not missing, f"not described: {missing}"
    if inspect.signature(x).return_annotation not in ("None", None):
        assert "Returns:" in doc


@pytest.mark.parametrize("module", MODULES)
def test_module_stays_near_250_lines(module):
    longest = {"gpt": 340, "grammar": 330, "train_preference": 300}.get(module, 290)
    assert len((ROOT / "rlhfkit" / f"{module}.py").read_text().splitlines()) <= longest


def check(*command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_types_check():
    check("mypy")


def test_code_lints():
    check("ruff", "check", "rlhfkit", "tests")
