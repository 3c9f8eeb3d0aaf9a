"""One optimiser step of DPO: 32 pairs of 80 tokens, both sides, AdamW, against TRL's DPOTrainer.

    python benchmarks/dpo_step.py                                                # ours alone
    python benchmarks/dpo_step.py --peer /path/to/other/bin/python               # and the ratios to TRL
    python benchmarks/dpo_step.py --peer ... --part defaults --clock cpu         # one of them, on a busy machine

4 layers x 256, vocabulary 512, random weights on both sides, fp32, one thread, no dropout, gradients clipped to norm 1
(TRL's default), 16 prompt tokens, 63 more and the end token. Parts: "each" runs the reference in each step on both
sides; "known" asks it before training on both sides, whose cost is not in the steps; "defaults" takes both as they
come, ours with the reference known and TRL's with the reference in each step.

Ours is `train_dpo` as it is, from the end of one step's callback to the beginning of the next, with the choice of the
batch and the metrics. The peer's step is timed from its begin to its end, without its data loading and logging. It
lives in an environment of its own (`pip install torch==2.13.0`, then `pip install trl==1.16.0 transformers==5.23.0
accelerate==1.15.0 datasets==5.2.0`); steps alternate between the two processes, and only the ratio of neighbours
counts. With `--clock cpu` both count the seconds of their processor in place of those on the wall: the same for one
thread on a quiet machine, and steadier on a busy one.
"""

from __future__ import annotations

import argparse
import copy
import os
import random
import sys
import tempfile
import time

from generation import Peer, describe
from reward_step import HEADS, LAYERS, LENGTH, PAIRS, POSITIONS, PROMPT, VOCAB, WIDTH, tokenizer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
BATCHES = 8  # of different pairs
# when the reference is asked: ours, the peer's
PARTS = {"each": ("each", "each"), "known": ("known", "known"), "defaults": ("known", "each")}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def alternate(part: str, clock: str, peer: Peer | None, rounds: int, warmup: int = 2) -> None:
    """Train for some steps with the peer taking one of its own after each of ours; print medians and paired ratio."""
    import torch

    from rlhfkit.models import GPT, GPTConfig
    from rlhfkit.train_preference import train_dpo

    torch.set_num_threads(1)
    torch.manual_seed(0)
    policy = GPT(GPTConfig(VOCAB, POSITIONS, WIDTH, LAYERS, HEADS, pad_id=0))
    words = [torch.randint(3, VOCAB, (BATCHES * PAIRS, n)) for n in (PROMPT, *2 * [LENGTH - PROMPT - 1])]
    end = torch.ones_like(words[0][:, :1])
    pairs, start = [], 0.0

    def on_step(step: int, metrics: dict[str, float]) -> None:
        nonlocal start
        seconds = CLOCKS[clock]() - start, peer() if peer else float("nan")
        if step >= warmup:
            pairs.append(seconds)
        start = CLOCKS[clock]()

    train_dpo(
        policy, copy.deepcopy(policy), words[0], *(torch.cat([side, end], 1) for side in words[1:]), beta=0.1, lr=1e-5,
        warmup=0, steps=warmup + rounds, batch_size=PAIRS, precompute=PARTS[part][0] == "known", on_step=on_step,
    )  # fmt: skip
    print(f"DPO step, {part}: ours {describe([a for a, _ in pairs], ' s')}", flush=True)
    if peer:
        print(f"DPO step, {part}: peer {describe([b for _, b in pairs], ' s')}")
        print(f"DPO step, {part}: peer / ours {describe([b / a for a, b in pairs])}", flush=True)


def serve_trl(reference: str, clock: str, steps: int = 200) -> None:
    """The peer's side: TRL's training loop, held before every step until a line comes, its seconds printed after."""
    import torch
    from datasets import Dataset
    from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(
        n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, vocab_size=VOCAB, n_positions=POSITIONS, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    ))  # fmt: skip

    class Gate(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: object, **__: object) -> None:
            if not sys.stdin.readline():
                os._exit(0)
            self.start = CLOCKS[clock]()

        def on_step_end(self, *_: object, **__: object) -> None:
            print("seconds", CLOCKS[clock]() - self.start, flush=True)

    words = random.Random(0)

    def text(n: int) -> str:
        return " ".join(f"w{words.randrange(3, VOCAB)}" for _ in range(n))

    rest = LENGTH - PROMPT - 1  # TRL adds <eos>
    rows = [
        {"prompt": text(PROMPT), "chosen": " " + text(rest), "rejected": " " + text(rest)}
        for _ in range(PAIRS * BATCHES)
    ]
    with tempfile.TemporaryDirectory() as folder:
        settings = DPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False, report_to="none",
            logging_steps=10_000, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, seed=0,
            optim="adamw_torch", learning_rate=1e-5, lr_scheduler_type="constant", max_length=POSITIONS, beta=0.1,
            per_device_train_batch_size=PAIRS, max_steps=steps, precompute_ref_log_probs=reference == "known",
        )  # fmt: skip
        trainer = DPOTrainer(
            model=model,
            ref_model=None if reference == "known" else copy.deepcopy(model),
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer(),
            callbacks=[Gate()],
        )
        shape = tuple(next(iter(trainer.get_train_dataloader()))["input_ids"].shape)
        assert shape == (2 * PAIRS, LENGTH), shape
        trainer.train()


def main() -> None:
    """Time both, or ours alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="a Python in whose environment TRL is installed")
    parser.add_argument("--part", choices=tuple(PARTS), action="append")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--serve", choices=("each", "known"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve_trl(arguments.serve, arguments.clock)
        return
    for part in arguments.part or (PARTS if arguments.peer else ("each", "known")):
        serve = ("--serve", PARTS[part][1], "--clock", arguments.clock)
        peer = Peer(arguments.peer, __file__, *serve) if arguments.peer else None
        alternate(part, arguments.clock, peer, arguments.rounds)
        if peer:
            peer.close()


if __name__ == "__main__":
    main()
