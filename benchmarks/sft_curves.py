"""Supervised fine-tuning on the reviews, several seeds: the gap to the grammar against updates, for chapter 1.

    python benchmarks/sft_curves.py                # does every seed come close enough? writes nothing
    python benchmarks/sft_curves.py --write        # the same, and writes the data file, about 6 minutes
    python benchmarks/sft_curves.py --seeds 2 --threads 2

Model, data and recipe are those of ``book/make_models.py``; only the seed of the initial weights and of the order of
the batches changes. The gap is the mean NLL per token, end token included, minus the grammar's own on the same held-out
reviews. It is measured on 1,000 of them along the way, on all 4,000 at the end; besides for all tokens, for those whose
probability takes some memory. Fails if the median of the seeds exceeds 0.02 nats or the worst 0.04.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import shipped
import torch
from torch import Tensor

from rlhfkit.grammar import ReviewGrammar
from rlhfkit.reviews import review_grammar
from rlhfkit.train_preference import response_nll, train_sft

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "book"))
from make_models import HELD_OUT, LOOP, SFT, SIZES, draw_reviews, new_model  # noqa: E402

STEPS = (25, 50, 75, 100, 150, *range(200, SFT["steps"] + 1, 100))
ON_THE_WAY = 1_000  # held-out reviews
MEDIAN, WORST = 0.02, 0.04
OUT = shipped.DATA / "ch01_sft_curves.json"


def kinds(grammar: ReviewGrammar, prompts: Tensor, reviews: Tensor) -> dict[str, Tensor]:
    """Which response tokens are of which kind, by what stands before them, (N, T) each; a token can be of two kinds."""
    names = {"not": [], "but, and": [], "closing": []}  # type: ignore[var-annotated]
    for state, begun in [*grammar.states, (None, "")]:  # the last one is the dead state
        phase = state.phase if state else ""
        names["not"].append(phase == "opinion" and state.negated)
        names["but, and"].append(phase == "opinion" and state.link != "")
        names["closing"].append(phase == "link" and begun.startswith("."))
    before = grammar.walk(torch.cat([prompts, reviews], 1))[:, prompts.shape[1] - 1 : -1]
    real = reviews != grammar.pad_id
    return {"all": real} | {name: torch.tensor(of_state)[before] & real for name, of_state in names.items()}


def run(seed: int) -> dict[str, Any]:
    """One training run, measured along the way."""
    grammar = review_grammar()
    prompts, reviews = draw_reviews(SFT)
    held_out = draw_reviews(HELD_OUT)
    exact, _ = response_nll(grammar, *held_out)
    masks = kinds(grammar, *held_out)
    model = new_model(seed)
    gaps: dict[str, list[float]] = {name: [] for name in masks}
    measured = 0.0

    def gap_by_kind(count: int) -> dict[str, float]:
        nll, _ = response_nll(model, held_out[0][:count], held_out[1][:count])
        excess = nll.double() - exact[:count]
        return {name: float(excess[mask[:count]].mean()) for name, mask in masks.items()}

    def on_step(step: int, metrics: dict[str, float]) -> None:
        nonlocal measured
        if step + 1 in STEPS:
            start = time.process_time()
            for name, gap in gap_by_kind(ON_THE_WAY).items():
                gaps[name].append(round(gap, 4))
            measured += time.process_time() - start

    wall, cpu = time.perf_counter(), time.process_time()
    train_sft(model, prompts, reviews, seed=seed, **{name: SFT[name] for name in LOOP}, on_step=on_step)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu - measured
    final = {name: round(gap, 4) for name, gap in gap_by_kind(HELD_OUT["reviews"]).items()}
    return {"seed": seed, "final": final, "gaps": gaps, "cpu_s": round(cpu, 1), "wall_s": round(wall, 1)}


def main() -> None:
    """Train every seed, print what it reaches, and with ``--write`` keep the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--date", default=datetime.date.today().isoformat())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    runs = []
    for seed in range(arguments.seeds):
        runs.append(run(seed))
        print({name: runs[-1][name] for name in ("seed", "final", "cpu_s", "wall_s")}, flush=True)
    finals = [r["final"]["all"] for r in runs]
    median, worst = statistics.median(finals), max(finals)
    print(f"gap to the grammar, nats per token: median {median:.4f}, worst {worst:.4f}")
    if arguments.write:
        grammar = review_grammar()
        held_out = draw_reviews(HELD_OUT)
        command = f"python benchmarks/sft_curves.py --write --seeds {arguments.seeds}"
        out = shipped.provenance(command, arguments.date) | {
            "seconds": "cpu_s: processor time of the training alone; wall_s: by the clock, measuring included",
            "threads": arguments.threads,
            "recipe": SFT,
            "sizes": SIZES,
            "held_out": HELD_OUT | {"on_the_way": ON_THE_WAY},
            "tokens": {name: int(mask.sum()) for name, mask in kinds(grammar, *held_out).items()},
            "steps": STEPS,
            "runs": runs,
        }
        shipped.write(OUT, out)
    sys.exit(median > MEDIAN or worst > WORST)


if __name__ == "__main__":
    main()
