"""Build the book with warnings as errors: quiet when all is well, the whole log when it is not.

python book/build.py [--builder html|singlehtml]
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Sphinx prints its warnings with a file or with this word; -W turns them into a failed build, and this shows them
WARNING = re.compile(r"WARNING|ERROR|CRITICAL|[Ee]rror:")
COLOUR = re.compile(r"\x1b\[[0-9;]*m")


def build(builder: str = "html") -> tuple[bool, str, float]:
    """Build the book.

    Args:
        builder: "html" for the site, "singlehtml" for one long page.

    Returns:
        Whether it was built without a warning, the log, and the seconds it took.
    """
    start = time.perf_counter()
    command = [str(Path(sys.executable).parent / "jupyter-book"), "build", "-W", "-n", "--keep-going"]
    env = {**os.environ, "NO_COLOR": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, "--builder", builder, "."],
        cwd=ROOT,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        # Sphinx has stored the pages it read and would not repeat their warnings: the next build reads everything
        shutil.rmtree(ROOT / "_build" / ".doctrees", ignore_errors=True)
    return done.returncode == 0, COLOUR.sub("", done.stdout), time.perf_counter() - start


def main() -> int:
    """Build and say how it went."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--builder", default="html", choices=["html", "singlehtml"])
    args = parser.parse_args()
    good, log, seconds = build(args.builder)
    if not good:
        print(log)
        print("\n".join(["The warnings again:", *(line for line in log.splitlines() if WARNING.search(line))]))
    print(f"{'built' if good else 'NOT built'} in {seconds:.1f} s")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
