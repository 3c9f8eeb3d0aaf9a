"""Run notebooks in place so that a second run changes no byte; print each page's seconds.

python book/refresh.py [--check] chapters/*.ipynb
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

KEPT_METADATA = {"kernelspec", "language_info", "widgets"}
WIDGET_STATE = "application/vnd.jupyter.widget-state+json"
# no \b: the ids come after IPY_MODEL_, whose last character belongs to a word
RANDOM_ID = re.compile(r"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")


def number_widgets(nb: nbformat.NotebookNode, page: str) -> None:
    """Widget model ids are random: make them of a count and the page, as the printed book has all pages in one."""
    state = nb.metadata.get("widgets", {}).get(WIDGET_STATE, {}).get("state", {})
    if not state:
        return
    prefix = hashlib.sha256(page.encode()).hexdigest()[:24]
    new = {old: f"{prefix}{i:08x}" for i, old in enumerate(state)}
    text = RANDOM_ID.sub(lambda m: new.get(m[0], m[0]), json.dumps(nb))
    done = nbformat.from_dict(json.loads(text))
    nb.cells, nb.metadata = done.cells, done.metadata


def merge_streams(outputs: list) -> list:
    """Neighbouring pieces of one stream become one output."""
    merged: list = []
    for out in outputs:
        last = merged[-1] if merged else None
        if last and out.output_type == last.output_type == "stream" and out.name == last.name:
            last.text += out.text
        else:
            merged.append(out)
    return merged


def tidy(nb: nbformat.NotebookNode, page: str) -> None:
    """Drop what differs between machines and runs."""
    for key in set(nb.metadata) - KEPT_METADATA:
        del nb.metadata[key]
    nb.metadata.kernelspec = {"display_name": "Python 3", "language": "python", "name": "python3"}
    nb.metadata.language_info = {"name": "python"}
    seen: set[str] = set()
    for i, cell in enumerate(nb.cells):
        if not cell.get("id") or cell.id in seen:
            cell.id = f"c{i:03d}"
        seen.add(cell.id)
        if cell.cell_type != "code":
            continue
        cell.metadata.pop("execution", None)
        cell.outputs = merge_streams(cell.outputs)
        for out in cell.outputs:  # a traceback carries colours, paths and details of the Python version
            if out.output_type == "error":
                out.traceback = [f"{out.ename}: {out.evalue}"]
    number_widgets(nb, page)


def run(path: Path, timeout: int) -> str:
    """The notebook's text after running all its cells in a fresh kernel; the file is not changed."""
    nb = nbformat.read(path, as_version=4)
    nb.metadata.pop("widgets", None)  # old state would be merged into the new one
    client = NotebookClient(
        nb,
        timeout=timeout,
        kernel_name="python3",
        record_timing=False,
        store_widget_state=True,
        resources={"metadata": {"path": str(path.parent)}},
        extra_arguments=["--log-level=ERROR"],  # without its warning about the loopback connection
    )
    client.execute()
    tidy(nb, path.stem)
    nbformat.validate(nb)
    return nbformat.writes(nb) + "\n"  # one source line per JSON line, so that diffs can be read


def main() -> int:
    """Run each notebook and store, or compare, what it gives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a notebook would change")
    parser.add_argument("--timeout", type=int, default=300, help="seconds for one cell")
    parser.add_argument("notebooks", nargs="+", type=Path)
    args = parser.parse_args()
    os.environ["RLHFKIT_STILL"] = "1"  # no progress bars, and a still of the labelling widget: the same in every run
    changed, failed, total = 0, 0, 0.0
    for path in args.notebooks:
        start = time.perf_counter()
        try:
            text = run(path, args.timeout)
        except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
            failed += 1
            print(f"{path}: FAILED, left as it was\n{error}", flush=True)
            continue
        seconds = time.perf_counter() - start
        total += seconds
        same = text == path.read_text(encoding="utf-8")
        changed += not same
        if not same and not args.check:
            path.write_text(text, encoding="utf-8")
        print(f"{path}: {seconds:.1f} s, {len(text) / 1e3:.0f} kB, {'same' if same else 'changed'}", flush=True)
    print(f"{len(args.notebooks)} pages, {total:.1f} s, {changed} changed, {failed} failed")
    return 1 if failed or (args.check and changed) else 0


if __name__ == "__main__":
    sys.exit(main())
