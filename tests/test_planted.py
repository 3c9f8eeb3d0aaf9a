"""Every planted bug of every test file is caught by a test of that file, which the package's own function passes."""

import importlib

import pytest

import planting

FILES = (
    "test_masked",
    "test_logprobs",
    "test_kl",
    "test_advantages",
    "test_policy_losses",
    "test_preference_losses",
    "test_exact",
    "test_models",
    "test_tasks",
    "test_sampling",
    "test_ppo",
    "test_train_policy",
    "test_control",
    "test_train_control",
    "test_tokenizer",
    "test_grammar",
    "test_reviews",
    "test_collect",
    "test_atomic",
    "test_checkpoints",
    "test_gpt",
    "test_pretrained",
    "test_journal",
    "test_label_store",
    "test_label_studio",
    "test_preferences",
    "test_labelling",
    "test_training",
    "test_train_preference",
)
MODULES = {name: importlib.import_module(name) for name in FILES}
CASES = [(f, name, bug) for f, tests in MODULES.items() for name, bugs in tests.PLANTED.items() for bug in bugs]


@pytest.mark.parametrize(("file", "name", "bug"), CASES, ids=[f"{name}: {bug}" for _, name, bug in CASES])
def test_a_planted_bug_is_caught(file, name, bug):
    caught_by = planting.first_failing_test(MODULES[file], name, MODULES[file].PLANTED[name][bug])
    assert caught_by is not None, f"no test of {name} in {file}.py notices: {bug}"


@pytest.mark.parametrize(("file", "name"), sorted({(f, name) for f, name, _ in CASES}))
def test_the_function_itself_is_not_caught(file, name):
    assert planting.first_failing_test(MODULES[file], name, getattr(MODULES[file], name)) is None


TAKEN_IN = {  # modules whose functions another one gives on, and whose tests stand in its file
    "test_kl": "kl_controller",
    "test_preference_losses": "reference_free_losses",
    "test_train_preference": "train_sft",
}


@pytest.mark.parametrize("file", FILES)
def test_every_public_function_has_at_least_three_planted_bugs(file):
    names = [file.removeprefix("test_"), *([TAKEN_IN[file]] if file in TAKEN_IN else [])]
    tested = [importlib.import_module(f"rlhfkit.{name}") for name in names]
    public = {
        name
        for module in tested
        for name, x in vars(module).items()
        if callable(x) and not name.startswith("_") and x.__module__ == module.__name__
    }
    missing = {name for name in public - set(MODULES[file].EXEMPT) if len(MODULES[file].PLANTED.get(name, ())) < 3}
    assert not missing, f"too few planted bugs for {sorted(missing)}"
