"""One iteration of PPO, and one step of leave-one-out REINFORCE: 64 responses of 64 tokens and the update, against TRL.

    python benchmarks/online_step.py                                              # ours alone
    python benchmarks/online_step.py --part ppo --peer /path/to/trl-1.12/python   # the last TRL with PPO
    python benchmarks/online_step.py --part rloo --peer /path/to/trl-1.16/python

4 layers x 256, vocabulary 512, random weights on both sides, fp32, one thread, prompts of 16 tokens, temperature 1.
PPO: 4 epochs of one minibatch, KL penalty 0.05, no end token; TRL trains a value model of its own, ours puts a value
head on the policy's trunk ("shared") or does as TRL does ("separate"). Leave-one-out: 8 prompts x 8 responses that may
end, KL penalty 0.05, a reference model. The reward is the share of even tokens on both sides. The peer lives in an
environment of its own (`pip install torch==2.13.0`, then `pip install trl==1.12.0 transformers==5.23.0`, or 1.16.0 for
RLOO); iterations alternate between the two processes, and only the ratio of neighbours counts. An iteration of the peer
is timed from the end of one step to the end of the next, its data loading included.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from generation import Peer, compare, timed
from reward_step import HEADS, LAYERS, POSITIONS, VOCAB, WIDTH, tokenizer

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
PROMPT, NEW, BATCH, GROUP, BETA = 16, 64, 64, 8, 0.05


def kit(part: str, value_model: str = "shared") -> Callable[[], object]:
    """Our iteration."""
    import copy

    import torch

    from rlhfkit.advantages import leave_one_out_baseline
    from rlhfkit.models import GPT, GPTConfig, ScalarModel
    from rlhfkit.ppo import PPOConfig
    from rlhfkit.train_policy import train_ppo, train_reinforce

    torch.set_num_threads(1)
    torch.manual_seed(0)
    pad_id = -1 if part == "ppo" else 0  # without an end token nothing is padded
    config = GPTConfig(VOCAB, POSITIONS, WIDTH, LAYERS, HEADS, pad_id=pad_id)
    policy = GPT(config)
    reference = copy.deepcopy(policy)
    value = ScalarModel(policy if value_model == "shared" else GPT(config), head_std=0.0)
    generator = torch.Generator().manual_seed(0)
    count = BATCH if part == "ppo" else BATCH // GROUP

    def score(rollout: Any) -> torch.Tensor:
        even = (rollout.tokens % 2 == 0) & rollout.response_mask
        return even.sum(1) / rollout.response_mask.sum(1)

    task = SimpleNamespace(
        beta=BETA,
        max_length=NEW,
        eos_id=None if part == "ppo" else 1,
        draw_prompts=lambda generator: torch.randint(3, VOCAB, (count, PROMPT), generator=generator),
        score=score,
        reference=lambda: reference,
    )
    settings = PPOConfig(lr=1e-5, num_ppo_epochs=4, num_mini_batches=1)
    if part == "ppo":
        return lambda: train_ppo(policy, value, task, steps=1, config=settings, generator=generator)
    loop = {"steps": 1, "group_size": GROUP, "lr": 1e-5, "baseline": leave_one_out_baseline}
    return lambda: train_reinforce(policy, task, generator=generator, **loop)


def settings_of(folder: str, **more: Any) -> dict[str, Any]:
    """What both trainers of the peer are told."""
    return {
        "output_dir": folder, "use_cpu": True, "bf16": False, "fp16": False, "gradient_checkpointing": False,
        "report_to": "none", "logging_steps": 10_000, "save_strategy": "no", "disable_tqdm": True, "seed": 0,
        "dataloader_pin_memory": False, "optim": "adamw_torch", "learning_rate": 1e-5,
        "lr_scheduler_type": "constant", "per_device_train_batch_size": BATCH, "temperature": 1.0, **more,
    }  # fmt: skip


def gate() -> Any:
    """A callback that holds the trainer between two iterations until a line comes, and prints the seconds after."""
    from transformers import TrainerCallback

    class Gate(TrainerCallback):  # type: ignore[misc]
        start = None

        def wait(self, *_: object, **__: object) -> None:
            if self.start is not None:
                print("seconds", time.perf_counter() - self.start, flush=True)
            if not sys.stdin.readline():
                os._exit(0)
            self.start = time.perf_counter()

        on_train_begin = on_step_end = wait

    return Gate()


def gpt2(cls: Any, **more: Any) -> Any:
    """A model of the peer with random weights."""
    from transformers import GPT2Config

    return cls(GPT2Config(
        n_layer=LAYERS, n_embd=WIDTH, n_head=HEADS, vocab_size=VOCAB, n_positions=POSITIONS, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=1, pad_token_id=0, **more,
    ))  # fmt: skip


def serve_ppo(iterations: int = 60) -> None:
    """TRL's PPO with a separate value model of the same shape, and a reward that costs next to nothing."""
    import torch
    from datasets import Dataset
    from transformers import GPT2ForSequenceClassification, GPT2LMHeadModel
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    torch.set_num_threads(1)
    torch.manual_seed(0)

    class Even(torch.nn.Module):
        base_model_prefix = "backbone"

        def __init__(self) -> None:
            super().__init__()
            self.score, self.unused = torch.nn.Identity(), torch.nn.Parameter(torch.zeros(1))

        def backbone(self, input_ids: Any, attention_mask: Any = None, **_: object) -> Any:
            even = ((input_ids % 2) == 0).float() * attention_mask
            share = even.cumsum(1) / attention_mask.cumsum(1).clamp(min=1)
            return SimpleNamespace(hidden_states=[share.unsqueeze(-1)])

    words = random.Random(0)
    rows = [{"input_ids": [words.randrange(3, VOCAB) for _ in range(PROMPT)]} for _ in range(BATCH * iterations)]
    data = Dataset.from_list(rows)
    policy, reference = gpt2(GPT2LMHeadModel), gpt2(GPT2LMHeadModel)
    reference.load_state_dict(policy.state_dict())
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(**settings_of(
            folder, gradient_accumulation_steps=1, num_mini_batches=1, num_ppo_epochs=4, kl_coef=BETA, gamma=1.0,
            lam=0.95, vf_coef=0.1, total_episodes=BATCH * iterations, response_length=NEW, stop_token=None,
            local_rollout_forward_batch_size=BATCH, num_sample_generations=0,
        ))  # fmt: skip
        PPOTrainer(
            args=args, processing_class=tokenizer(), model=policy, ref_model=reference, reward_model=Even(),
            value_model=gpt2(GPT2ForSequenceClassification, num_labels=1), train_dataset=data,
            eval_dataset=data.select(range(2)), callbacks=[gate()],
        ).train()  # fmt: skip


def serve_rloo(iterations: int = 200) -> None:
    """TRL's RLOO with a reward function in Python."""
    import torch
    from datasets import Dataset
    from transformers import GPT2LMHeadModel
    from trl import RLOOConfig, RLOOTrainer

    torch.set_num_threads(1)
    torch.manual_seed(0)
    words = random.Random(0)
    text = [" ".join(f"w{words.randrange(3, VOCAB)}" for _ in range(PROMPT)) for _ in range(GROUP * iterations)]

    def reward(completion_ids: list[list[int]], **_: object) -> list[float]:
        return [sum(t % 2 == 0 for t in ids) / max(len(ids), 1) for ids in completion_ids]

    with tempfile.TemporaryDirectory() as model, tempfile.TemporaryDirectory() as folder:
        gpt2(GPT2LMHeadModel).save_pretrained(model)  # the reference is loaded from there
        tokenizer().save_pretrained(model)
        args = RLOOConfig(**settings_of(
            folder, num_generations=GROUP, max_completion_length=NEW, num_iterations=1, beta=BETA, max_steps=iterations,
        ))  # fmt: skip
        RLOOTrainer(
            model=model, reward_funcs=reward, args=args, train_dataset=Dataset.from_list([{"prompt": x} for x in text]),
            processing_class=tokenizer(), callbacks=[gate()],
        ).train()  # fmt: skip


def main() -> None:
    """Time both, or ours alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="a Python in whose environment TRL is installed")
    parser.add_argument("--part", choices=("ppo", "rloo"), action="append")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", choices=("ppo", "rloo"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        (serve_ppo if arguments.serve == "ppo" else serve_rloo)()
        return
    for part in arguments.part or ("ppo", "rloo"):
        peer = Peer(arguments.peer, __file__, "--serve", part) if arguments.peer else None
        name = {"ppo": "PPO iteration, value head shared", "rloo": "leave-one-out step"}[part]
        compare(name, timed(kit(part)), peer, arguments.rounds, warmup=1)
        if part == "ppo":
            separate = timed(kit("ppo", "separate"))
            compare("PPO iteration, value model separate", separate, peer, max(3, arguments.rounds // 2), warmup=0)
        if peer:
            peer.close()


if __name__ == "__main__":
    main()
