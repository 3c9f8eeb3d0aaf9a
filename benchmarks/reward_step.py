"""One optimiser step of a reward model: 32 pairs of 80 tokens, both sides, AdamW, against TRL's RewardTrainer.

    python benchmarks/reward_step.py                                   # ours alone
    python benchmarks/reward_step.py --peer /path/to/other/bin/python  # and the ratio to TRL

4 layers x 256, vocabulary 512, random weights on both sides, fp32, one thread, no dropout, gradients clipped to norm 1
(TRL's default). The peer lives in an environment of its own (`pip install torch==2.13.0`, then
`pip install trl==1.16.0 transformers==5.23.0 accelerate==1.15.0 datasets==5.2.0`); steps alternate between the two
processes, and only the ratio of neighbours counts. The peer's step is timed from its begin to its end, without its data
loading and logging; ours from the batch of ids to the updated weights.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from generation import Peer, compare, timed

LAYERS, WIDTH, HEADS, VOCAB, POSITIONS = 4, 256, 4, 512, 128
PAIRS, PROMPT, LENGTH = 32, 16, 80


def kit() -> Callable[[], object]:
    """Our step: chosen and rejected in one batch, the Bradley-Terry loss, clipping, fused AdamW."""
    import torch

    from rlhfkit.models import GPT, GPTConfig, ScalarModel
    from rlhfkit.preference_losses import bradley_terry_loss

    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = ScalarModel(GPT(GPTConfig(VOCAB, POSITIONS, WIDTH, LAYERS, HEADS, pad_id=0)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        tokens = torch.randint(3, VOCAB, (2 * PAIRS, LENGTH))
        chosen, rejected = model.scores(tokens).chunk(2)
        loss = bradley_terry_loss(chosen, rejected).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def tokenizer() -> Any:
    """One word, one token: '<pad>' 0, '<eos>' 1, '<unk>' 2, 'w3' 3, ..."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {"<pad>": 0, "<eos>": 1, "<unk>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    fast = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=fast,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def serve_trl(steps: int = 200) -> None:
    """The peer's side: TRL's training loop, held before every step until a line comes, its seconds printed after."""
    import torch
    from datasets import Dataset
    from transformers import GPT2Config, GPT2ForSequenceClassification, TrainerCallback
    from trl import RewardConfig, RewardTrainer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = GPT2Config(
        n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, vocab_size=VOCAB, n_positions=POSITIONS, num_labels=1,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip

    class Gate(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *_: object, **__: object) -> None:
            if not sys.stdin.readline():
                sys.exit()
            self.start = time.perf_counter()

        def on_step_end(self, *_: object, **__: object) -> None:
            print("seconds", time.perf_counter() - self.start, flush=True)

    words = random.Random(0)

    def text(n: int) -> str:
        return " ".join(f"w{words.randrange(3, VOCAB)}" for _ in range(n))

    rest = LENGTH - PROMPT - 1  # TRL adds <eos>
    rows = [
        {"prompt": text(PROMPT), "chosen": " " + text(rest), "rejected": " " + text(rest)} for _ in range(PAIRS * 8)
    ]
    with tempfile.TemporaryDirectory() as folder:
        settings = RewardConfig(
            output_dir=folder, use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False, report_to="none",
            logging_steps=10_000, save_strategy="no", disable_tqdm=True, dataloader_pin_memory=False, seed=0,
            optim="adamw_torch", learning_rate=1e-5, lr_scheduler_type="constant", max_length=POSITIONS,
            per_device_train_batch_size=PAIRS, max_steps=steps,
        )  # fmt: skip
        trainer = RewardTrainer(
            model=GPT2ForSequenceClassification(config),
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
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve_trl()
        return
    peer = Peer(arguments.peer, __file__, "--serve") if arguments.peer else None
    compare(f"reward-model step, {PAIRS} pairs x {LENGTH}", timed(kit()), peer, arguments.rounds, warmup=2)
    if peer:
        peer.close()


if __name__ == "__main__":
    main()
