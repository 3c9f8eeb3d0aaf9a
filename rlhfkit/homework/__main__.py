"""Command line: ``python -m rlhfkit.homework report | prove | build | grade``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rlhfkit.homework import instructor, prove, report
from rlhfkit.homework.core import QUESTIONS


def _prove() -> int:
    broken = 0
    for question in QUESTIONS.values():
        faults = prove(question.id)
        broken += bool(faults)
        counts = f"{len(question.cases)} cases, {len(question.wrongs)} wrong answers rejected and named"
        print(f"{question.id:24s} {'FAULTS' if faults else f'proven: {counts}'}")
        for fault in faults:
            print(f"    {fault}")
    wrongs = sum(len(question.wrongs) for question in QUESTIONS.values())
    cases = sum(len(question.cases) for question in QUESTIONS.values())
    print(f"{len(QUESTIONS)} questions, {cases} cases, {wrongs} planted wrong answers; {broken} questions with faults")
    return 1 if broken else 0


def main(arguments: list[str] | None = None) -> int:
    """Parse the arguments and run the command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m rlhfkit.homework", description="Homework of the book.")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("report", help="your scores, from the progress file in this folder")
    commands.add_parser("prove", help="show that every check rejects its planted wrong answers")
    build = commands.add_parser("build", help="student notebooks and autograder zips from the masters (needs otter)")
    build.add_argument("--masters", type=Path, default=Path("homework/master"))
    build.add_argument("--output", type=Path, default=Path("homework"), help="folder for the student notebooks")
    build.add_argument("--zips", type=Path, default=Path("build/homework"), help="folder for hwNN-autograder.zip")
    build.add_argument("--no-run-tests", action="store_true", help="do not let otter run the tests on the masters")
    grade = commands.add_parser("grade", help="run a folder of submissions of people you know, scores to a CSV")
    grade.add_argument("submissions", type=Path)
    grade.add_argument("-o", "--output", type=Path, default=Path("scores.csv"))
    grade.add_argument("--seconds", type=float, default=instructor.SECONDS_PER_NOTEBOOK, help="limit per notebook")
    options = parser.parse_args(arguments)
    if options.command == "report":
        report()
        return 0
    if options.command == "prove":
        return _prove()
    try:
        if options.command == "build":
            for file in instructor.build(options.masters, options.output, options.zips, not options.no_run_tests):
                print(file)
        else:
            rows = instructor.grade(options.submissions, options.output, options.seconds)
            failed = sum(bool(row["error"]) for row in rows)
            print(f"{len(rows)} notebooks graded, {failed} of them with an error; scores in {options.output}")
    except (RuntimeError, FileNotFoundError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
