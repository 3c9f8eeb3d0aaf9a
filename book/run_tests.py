"""Everything that `make test` checks, in order, with the seconds of each phase and one closing line.

python book/run_tests.py [phase ...]
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "book"))

from build import build  # noqa: E402
from check_site import BROWSERS, find_browser  # noqa: E402

BIN = Path(sys.executable).parent
AXE = "build/vendor-test/vendor/axe-core/axe.min.js"
INSTRUCTOR = ROOT / ".venv-instructor" / ".stamp"


@dataclass
class Result:
    """How a phase went: "passed", "FAILED" or "left out", and its last line."""

    phase: str
    state: str
    summary: str
    seconds: float = 0.0


def call(phase: str, command: list[str], env: dict[str, str] | None = None) -> Result:
    """Run one command, showing its output, and keep its last line as the summary."""
    start = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    assert process.stdout is not None
    last = ""
    for line in process.stdout:
        print("   ", line, end="", flush=True)
        last = line.strip() or last
    code = process.wait()
    return Result(phase, "FAILED" if code else "passed", last.strip("= "), time.perf_counter() - start)


def book() -> Result:
    """The book builds without a warning."""
    good, log, seconds = build()
    if not good:
        print(log)
    pages = len(set(re.findall(r"^writing output\.\.\. \[ *\d+%\] (\S+)", log, re.MULTILINE)))
    return Result("book", "passed" if good else "FAILED", f"{pages} pages written, warnings are errors", seconds)


def style() -> Result:
    """Formatting, lint and types."""
    python = [str(path.relative_to(ROOT)) for path in ROOT.glob("*") if path.name in ("rlhfkit", "tests", "book")]
    python += [name for name in ("benchmarks",) if any((ROOT / name).glob("*.py"))]
    results = [
        call("style", [str(BIN / "ruff"), "check", "--quiet", *python]),
        call("style", [str(BIN / "ruff"), "format", "--check", "--quiet", *python]),
        call("style", [str(BIN / "mypy")]),
    ]
    state = "FAILED" if any(r.state == "FAILED" for r in results) else "passed"
    return Result("style", state, results[-1].summary, sum(r.seconds for r in results))


def tests() -> Result:
    """Every test of the package, the homework, the notebooks' form and the site check itself."""
    workers = str(min(4, os.cpu_count() or 1))
    command = [sys.executable, "-m", "pytest", "-q", "-n", workers, "--dist", "loadfile", "--durations", "5", "tests"]
    return call("tests", command, {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")})


def notebooks() -> Result:
    """Each cell of the pages gives the output that is stored."""
    paths = [str(p.relative_to(ROOT)) for p in [ROOT / "index.ipynb", *sorted((ROOT / "chapters").glob("*.ipynb"))]]
    paths = [p for p in paths if (ROOT / p).exists()]
    command = [sys.executable, "-m", "pytest", "-q", "--nbval", "--nbval-current-env", "--nbval-cell-timeout", "300"]
    return call("notebooks", [*command, "-n", "2", "--dist", "loadfile", *paths])


def site() -> Result:
    """Every page in a browser."""
    if find_browser() is None:
        why = f"no browser (looked for {', '.join(BROWSERS)} and the variable CHROMIUM): no page was opened"
        return Result("site", "FAILED" if os.environ.get("CI") else "left out", why)
    return call("site", [sys.executable, "book/check_site.py", "_build/html", "--axe", AXE])


PHASES = {"book": book, "style": style, "tests": tests, "notebooks": notebooks, "site": site}


def left_out(results: list[Result]) -> list[str]:
    """What this machine could not check, in words."""
    notes = [f"{r.phase}: {r.summary}" for r in results if r.state == "left out"]
    if "tests" in {r.phase for r in results}:
        if not INSTRUCTOR.exists():
            notes.append("homework: the student notebooks were not made again from the masters (make instructor)")
        if find_browser() is None:
            notes.append("tests: the site check's own tests need a browser too")
        skipped = next((re.search(r"(\d+) skipped", r.summary) for r in results if r.phase == "tests"), None)
        if skipped:
            notes.append(f"tests: {skipped[1]} skipped (those for a GPU need one)")
    return notes


def main() -> int:
    """Run the phases asked for, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("phases", nargs="*", help=f"of {', '.join(PHASES)}; all if none is named")
    args = parser.parse_args()
    unknown = set(args.phases) - set(PHASES)
    if unknown:
        parser.error(f"phases {sorted(unknown)}: expected some of {', '.join(PHASES)}")
    results = []
    for name in args.phases or PHASES:
        print(f"== {name}", flush=True)
        results.append(PHASES[name]())
        print(f"   {results[-1].state}, {results[-1].seconds:.1f} s: {results[-1].summary}", flush=True)
    print("\n== all phases")
    for r in results:
        print(f"   {r.phase:<10} {r.state:<9} {r.seconds:6.1f} s  {r.summary}")
    for note in left_out(results):
        print(f"   LEFT OUT   {note}")
    failed = [r.phase for r in results if r.state == "FAILED"]
    total = sum(r.seconds for r in results)
    notes = f", {len(left_out(results))} left out" if left_out(results) else ", nothing left out"
    print(f"{'FAILED: ' + ', '.join(failed) if failed else 'All passed'} in {total:.0f} s{notes}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
