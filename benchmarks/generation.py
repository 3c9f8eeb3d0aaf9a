"""Generation with the KV cache: against transformers' `generate`, against itself without the cache, and by length.

    python benchmarks/generation.py                                       # ours alone
    python benchmarks/generation.py --peer /path/to/other/bin/python      # and the ratio to transformers
    python benchmarks/generation.py --peer ... --part peer --shape small  # one part of it: peer, length or cache

Random GPT-2 weights of the same shape on both sides, fp32, one thread, 16 prompt tokens and 64 new ones, sampled at
temperature 1 without truncation and without an end-of-sequence token. The peer lives in an environment of its own
(`pip install torch==2.13.0`, then `pip install transformers==5.23.0`), in a process that waits while ours is timed:
the two alternate, and only the ratio of neighbours counts. The quoted ratio is the median over rounds, peer / ours.
The part by length runs in fp32 and under bfloat16 autocast, which halves the memory of keys and values.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

os.environ.setdefault("HF_HUB_OFFLINE", "1")
SHAPES = {"small": (4, 256, 4, 512, 128), "m50": (12, 576, 9, 4096, 256)}  # layers, width, heads, vocabulary, positions
BATCH = {"small": 64, "m50": 8}
PROMPT, NEW = 16, 64
LENGTHS = (64, 128, 256, 512)


class Peer:
    """Another interpreter that runs this kind of file with ``--serve`` and times one run whenever it is asked to."""

    def __init__(self, python: str, *arguments: str) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen(
            [python, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )

    def __call__(self) -> float:
        """Seconds of one run."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        for line in self.process.stdout:  # anything else it prints is not for us
            if line.startswith("seconds "):
                return float(line.split()[1])
        raise RuntimeError(f"the peer stopped with exit status {self.process.wait()}")

    def close(self) -> None:
        """End the process."""
        self.process.communicate()


def serve(run: Callable[[], float]) -> None:
    """The peer's side: one run per line of standard input, its seconds to standard output."""
    for _ in sys.stdin:
        print("seconds", run(), flush=True)


def timed(run: Callable[[], object]) -> Callable[[], float]:
    """The same call, returning its seconds."""

    def seconds() -> float:
        start = time.perf_counter()
        run()
        return time.perf_counter() - start

    return seconds


def describe(values: list[float], unit: str = "") -> str:
    """Median and spread."""
    return f"{statistics.median(values):.3f}{unit} ({min(values):.3f} to {max(values):.3f}, n = {len(values)})"


def compare(name: str, ours: Callable[[], float], peer: Callable[[], float] | None, rounds: int, warmup: int) -> None:
    """Alternate the two, and print the medians and the paired ratio."""
    pairs = []
    for i in range(warmup + rounds):
        a = ours() if i % 2 else None  # who goes first alternates too
        b = peer() if peer else float("nan")
        a = ours() if a is None else a
        if i >= warmup:
            pairs.append((a, b))
    print(f"{name}: ours {describe([a for a, _ in pairs], ' s')}", flush=True)
    if peer:
        print(f"{name}: peer {describe([b for _, b in pairs], ' s')}")
        print(f"{name}: peer / ours {describe([b / a for a, b in pairs])}", flush=True)


def kit(
    shape: str, positions: int | None = None, use_cache: bool = True, half: bool = False
) -> Callable[[int], object]:
    """Our generation, as a function of the number of new tokens; ``half``: under bfloat16 autocast."""
    import torch

    from rlhfkit.models import GPT, GPTConfig
    from rlhfkit.sampling import sample

    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers, width, heads, vocab, limit = SHAPES[shape]
    model = GPT(GPTConfig(vocab, positions or limit, width, layers, heads)).eval()
    prompts, generator = torch.randint(2, vocab, (BATCH[shape], PROMPT)), torch.Generator().manual_seed(0)

    def run(new: int) -> object:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return sample(model, prompts, new, generator=generator, use_cache=use_cache)

    return run


def transformers_generate(shape: str) -> Callable[[], float]:
    """The peer's generation of the same size; runs where transformers is installed."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(1)
    torch.manual_seed(0)
    layers, width, heads, vocab, limit = SHAPES[shape]
    config = GPT2Config(n_layer=layers, n_embd=width, n_head=heads, vocab_size=vocab, n_positions=limit)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = None, 1, 0
    model = GPT2LMHeadModel(config).eval()
    ids = torch.randint(2, vocab, (BATCH[shape], PROMPT))

    def run() -> None:
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                max_new_tokens=NEW,
                eos_token_id=None,
                pad_token_id=0,
            )
        assert out.shape == (BATCH[shape], PROMPT + NEW), out.shape

    return timed(run)


def by_length(rounds: int, half: bool) -> float:
    """Seconds of T new tokens, batch 64, and the cost of one step fitted as a + b * length; returns a."""
    import torch

    name = "bf16" if half else "fp32"
    run = kit("small", positions=PROMPT + max(LENGTHS), half=half)
    run(16)
    times: dict[int, list[float]] = {new: [] for new in LENGTHS}
    for _ in range(rounds):
        for new in LENGTHS:
            times[new].append(timed(lambda n=new: run(n))())
    medians = torch.tensor([statistics.median(times[new]) for new in LENGTHS], dtype=torch.float64)
    # step t reads PROMPT + t keys, so T steps cost a T + b (PROMPT T + T (T - 1) / 2); relative errors are minimised
    design = torch.tensor([[n, PROMPT * n + n * (n - 1) / 2] for n in LENGTHS], dtype=torch.float64)
    a, b = torch.linalg.lstsq(design / medians[:, None], torch.ones(len(LENGTHS), 1, dtype=torch.float64)).solution
    for i, new in enumerate(LENGTHS):
        fitted = (design[i] @ torch.cat([a, b])).item()
        print(f"{name}, {new} tokens: {describe(times[new], ' s')}, fitted {fitted:.3f} s")
    print(f"{name}: step = {1e3 * a.item():.2f} ms + {1e6 * b.item():.1f} us * length")
    ratios = [two / one for one, two in zip(times[64], times[128], strict=True)]
    print(f"{name}: 128 tokens / 64 tokens {describe(ratios)} (aim: at most 2.2)", flush=True)
    return a.item()


def reading_the_cache(fixed: float) -> None:
    """The rate at which fp32 keys and values can be added up, and what 128 tokens would cost over 64 at that rate.

    ``fixed``: seconds of a step that do not depend on the length.
    """
    import numpy as np
    import torch

    layers, width, heads, _, _ = SHAPES["small"]
    lengths, reads = (16, 48, 80, 112, 144, 288), []
    for length in lengths:  # filled part of a cache with room for a prompt more
        whole = torch.randn(2 * layers, BATCH["small"], heads, length + PROMPT, width // heads)
        cut = whole[:, :, :, :length]
        run = timed(lambda x=cut: [part.sum() for part in x])
        run()
        seconds, size = statistics.median(run() for _ in range(15)), cut.numel() * cut.element_size()
        rate, per_position = size / seconds / 1e9, 1e6 * seconds / length
        print(f"reading {length} positions, {size / 1e6:.0f} MB: {rate:.1f} GB/s, {per_position:.1f} us a position")
        reads.append(seconds)
    one, two = (fixed * new + np.interp(np.arange(PROMPT, PROMPT + new), lengths, reads).sum() for new in (64, 128))
    print(f"fp32: 128 tokens / 64 tokens if attention cost no more than that: {two / one:.2f}", flush=True)


def without_cache(rounds: int) -> None:
    """The same with and without the cache."""
    cached, uncached = kit("small"), kit("small", use_cache=False)
    compare("no cache as peer", timed(lambda: cached(NEW)), timed(lambda: uncached(NEW)), rounds, warmup=1)


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="a Python in whose environment transformers is installed")
    parser.add_argument("--part", choices=("peer", "length", "cache"), action="append")
    parser.add_argument("--shape", choices=tuple(SHAPES), action="append")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--serve", choices=tuple(SHAPES), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(transformers_generate(arguments.serve))
        return
    parts = arguments.part or ("peer", "length", "cache")
    for shape in (arguments.shape or tuple(SHAPES)) if "peer" in parts else ():
        peer = Peer(arguments.peer, __file__, "--serve", shape) if arguments.peer else None
        run = kit(shape)
        name = f"{shape}, batch {BATCH[shape]}, {PROMPT} + {NEW}"
        compare(name, timed(lambda run=run: run(NEW)), peer, arguments.rounds, warmup=2)
        if peer:
            peer.close()
    if "length" in parts:
        fixed = by_length(arguments.rounds, half=False)
        by_length(arguments.rounds, half=True)
        reading_the_cache(fixed)
    if "cache" in parts:
        without_cache(min(arguments.rounds, 2))


if __name__ == "__main__":
    main()
