"""What importing the package costs, as a ratio to importing torch alone: fresh processes, interleaved.

python benchmarks/import_time.py [rounds]
"""

from __future__ import annotations

import statistics
import subprocess
import sys

TORCH = "import torch"
MODULES = "advantages exact kl logprobs masked policy_losses preference_losses sampling train_policy"
KIT = "import " + ", ".join(f"rlhfkit.{name}" for name in MODULES.split())


def seconds(statement: str) -> float:
    """Time of one import in a fresh process."""
    code = f"import time; t = time.perf_counter(); {statement}; print(time.perf_counter() - t)"
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Print medians, spread and their ratio."""
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 7
    pairs = [(seconds(TORCH), seconds(KIT)) for _ in range(rounds)]
    for name, times in zip(("torch alone", "rlhfkit"), zip(*pairs, strict=True), strict=True):
        print(f"{name:<12} median {statistics.median(times):.2f} s ({min(times):.2f} to {max(times):.2f})")
    print(f"ratio        median {statistics.median(kit / alone for alone, kit in pairs):.3f} (aim: at most 1.1)")


if __name__ == "__main__":
    main()
