"""For nbval, wherever it is started: its kernels inherit the setting under which the pages were stored."""

import os


def pytest_configure(config):
    """No progress bars, and a still in place of the labelling widget."""
    if config.getoption("nbval", False) or config.getoption("nbval_lax", False):
        os.environ["RLHFKIT_STILL"] = "1"
