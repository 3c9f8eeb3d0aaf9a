"""Importing the package costs what importing torch costs, and nothing of the pages or of CartPole comes with it."""

import subprocess
import sys

MODULES = "masked logprobs kl advantages policy_losses preference_losses exact models tasks sampling".split()
KIT = "import rlhfkit, " + ", ".join(f"rlhfkit.{name}" for name in MODULES)
TIMED = "import time; t = time.perf_counter(); {}; print(time.perf_counter() - t)"


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def seconds(code):
    return float(run(TIMED.format(code)))


def test_importing_the_package_costs_at_most_a_tenth_more_than_torch():
    """Minima of interleaved fresh processes; more rounds only while the limit is not yet met."""
    torch_alone, kit = [], []
    for rounds in range(12):
        torch_alone.append(seconds("import torch"))
        kit.append(seconds(KIT))
        if rounds >= 2 and min(kit) <= 1.1 * min(torch_alone):
            break
    assert min(kit) <= 1.1 * min(torch_alone), (min(kit), min(torch_alone))


def test_importing_the_package_alone_does_not_even_load_torch():
    assert run("import rlhfkit, sys; print('torch' in sys.modules)").strip() == "False"


def test_importing_the_maths_loads_no_plots_widgets_or_environments():
    unwanted = {"matplotlib", "ipywidgets", "IPython", "gymnasium", "PIL", "tqdm", "otter"}
    loaded = set(run(f"{KIT}, rlhfkit.train_policy, sys; print(*sys.modules)").split())
    with_torch_alone = set(run("import torch, sys; print(*sys.modules)").split())
    assert not unwanted & (loaded - with_torch_alone)
