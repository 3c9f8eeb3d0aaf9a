"""What the scripts that write data for the chapters share: where a file came from, its numbers, how it is written."""

from __future__ import annotations

import json
import math
import platform
from pathlib import Path
from typing import Any

import torch

from rlhfkit.atomic import write_atomically

DATA = Path(__file__).resolve().parents[1] / "chapters" / "data"


def provenance(command: str, date: str) -> dict[str, Any]:
    """What every data file says about itself."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    return {
        "command": command,
        "date": date,
        "versions": versions,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def rounded(x: Any, digits: int = 5) -> Any:
    """Numbers with so many significant digits, at any depth of dicts and lists."""
    if isinstance(x, dict):
        return {name: rounded(value, digits) for name, value in x.items()}
    if isinstance(x, list):
        return [rounded(value, digits) for value in x]
    return float(f"{x:.{digits}g}") if isinstance(x, float) and math.isfinite(x) else x


def read(path: Path) -> dict[str, Any]:
    """What the file holds, or nothing if there is none."""
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, content: dict[str, Any]) -> None:
    """Write a data file, one line for every run, which begins with its seed."""
    text = json.dumps(content, separators=(",", ":")).replace('{"seed"', '\n{"seed"') + "\n"
    write_atomically(path, text.encode())
    print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB", flush=True)
