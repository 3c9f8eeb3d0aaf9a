"""What the loops over a fixed data set share: the order of the batches, the learning rate, and stopping and resuming.

Order and learning rate are pure functions of seed and step, so that a run that was killed and resumed takes exactly the
steps it would have taken.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from rlhfkit.checkpoints import load_checkpoint, save_checkpoint

POOL = 16  # batches whose rows are sorted by length together
BETAS = (0.9, 0.95)
OnStep = Callable[[int, dict[str, float]], None]


def bf16_autocast(device: torch.device, bf16: bool) -> contextlib.AbstractContextManager[None]:
    """Matrix products in bfloat16 if asked for; losses and log-probabilities stay in float32."""
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


def decayed(named: Iterable[tuple[str, Tensor]], weight_decay: float) -> list[dict[str, Any]]:
    """Groups for AdamW: decay on matrices, none on vectors."""
    parameters = [p for _, p in named]
    matrices, vectors = [p for p in parameters if p.ndim >= 2], [p for p in parameters if p.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def join_right_padded(prompts: Tensor, responses: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """Whole sequences with all padding at the end, and which tokens belong to the response.

    Args:
        prompts: (B, L0), integers, padded on the left.
        responses: (B, T), integers, padded on the right.
        pad_id: id of padding.

    Returns:
        tokens and response_mask, (B, L), L the longest sequence; the mask is True on the end token and not on padding.

    Raises:
        ValueError: if the numbers of rows differ.
    """
    if prompts.ndim != 2 or responses.ndim != 2 or len(prompts) != len(responses):
        got = f"{tuple(prompts.shape)}, {tuple(responses.shape)}"
        raise ValueError(f"prompts, responses: got shapes {got}, expected (B, L0), (B, T)")
    tokens = torch.cat([prompts, responses], 1)
    real = tokens != pad_id
    in_response = torch.arange(tokens.shape[1], device=tokens.device) >= prompts.shape[1]
    order = (~real).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(real.sum(1).max())]
    return tokens.gather(1, order), (real & in_response).gather(1, order)


def device_of(policy: Any) -> torch.device:
    """Where the parameters of a policy live; the CPU for one without parameters, such as the grammar."""
    parameters = policy.parameters() if hasattr(policy, "parameters") else []
    return next((p.device for p in parameters), torch.device("cpu"))


def pad_to_one_width(parts: list[Tensor], pad_id: int) -> Tensor:
    """One tensor of all rows, (B, T) each, padded on the right to the width of the widest."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1]), value=pad_id) for part in parts])


@functools.lru_cache(maxsize=2)
def _epoch(lengths: tuple[int, ...], batch_size: int, seed: int, epoch: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    keep = len(lengths) // batch_size * batch_size or len(lengths)  # cut before sorting: not always the longest
    order = torch.randperm(len(lengths), generator=generator)[:keep]
    sizes = torch.tensor(lengths)
    pools = [pool[sizes[pool].argsort(stable=True)] for pool in order.split(POOL * batch_size)]
    batches = [batch for pool in pools for batch in pool.split(batch_size)]
    return tuple(batches[i] for i in torch.randperm(len(batches), generator=generator))


def batch_of_step(lengths: tuple[int, ...], batch_size: int, seed: int, step: int) -> Tensor:
    """Rows of a step's batch: a new random order every epoch, rows of similar length together.

    Every epoch shuffles the rows, leaves out those that do not fill a batch, sorts pools of 16 batches by length, cuts
    them, and shuffles the batches. Little computation is then spent on padding.

    Args:
        lengths: tokens of every row, N numbers.
        batch_size: B; with fewer than B rows a batch has them all.
        seed, step: what the batch depends on, besides.

    Returns:
        (B,), integers.
    """
    per_epoch = max(1, len(_epoch(lengths, batch_size, seed, 0)))
    return _epoch(lengths, batch_size, seed, step // per_epoch)[step % per_epoch]


def cosine_lr(step: int, steps: int, peak: float, warmup: int) -> float:
    """Learning rate of a step: linear from 0 to ``peak`` over ``warmup`` steps, then a half cosine down to 0."""
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def require_finite(quantity: str, x: Tensor, step: int) -> None:
    """Stop a loop at the first number that is not finite, in a tensor of any shape.

    Raises:
        FloatingPointError: naming the step and the quantity.
    """
    if not torch.isfinite(x).all():
        bad = x[~torch.isfinite(x)].flatten()[0].item()
        raise FloatingPointError(f"step {step}: {quantity} contains {bad}; training stopped before the update")


def update(
    model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], loss: Tensor, lr: float, step: int, max_norm: float
) -> Tensor:
    """One step down the gradient of a loss, with the gradient clipped.

    Args:
        model: what is trained.
        optimizers: of its parameters.
        loss: a scalar.
        lr: learning rate of this step.
        step: its number, for the message.
        max_norm: a longer gradient is shortened to this norm.

    Returns:
        The norm before clipping, a scalar.

    Raises:
        FloatingPointError: if the loss or the norm of the gradient is not finite; the model is then unchanged.
    """
    require_finite("loss", loss.detach(), step)
    model.zero_grad()
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    require_finite("gradient norm", norm, step)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        optimizer.step()
    return norm


class Run:
    """A training run that can be killed at any moment and resumed with the same final weights.

    Its file holds weights, optimiser state, metrics so far, the states of torch's own random numbers (dropout), and
    the recipe. It is written atomically, so there is always a whole one.

    Args:
        model: trained in place; resuming overwrites its weights.
        optimizers: of the model's parameters, one or more.
        recipe: what JSON can hold; a file of another recipe is refused.
        checkpoint: path of the file; None: nothing is written.
        save_every: steps between two writes.
        generator: of the run's samples, whose state goes into the file too; None: the run draws none.

    Raises:
        ValueError: if the file is damaged, or was made with another recipe or another model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizers: list[torch.optim.Optimizer],
        recipe: dict[str, Any],
        checkpoint: str | os.PathLike[str] | None,
        save_every: int,
        generator: torch.Generator | None = None,
    ) -> None:
        if save_every < 1:
            raise ValueError(f"save_every: got {save_every}, expected at least 1")
        self.model, self.optimizers, self.recipe = model, optimizers, json.loads(json.dumps(recipe))
        self.checkpoint, self.save_every, self.generator = checkpoint, save_every, generator
        self.history: list[dict[str, float]] = []
        if checkpoint is not None and Path(checkpoint).exists():
            self._resume(Path(checkpoint))

    def steps(self, total: int, describe: str) -> Iterator[int]:
        """The steps still to do, with a progress bar in notebooks and terminals; saves on the way and at the end."""
        quiet = True if os.environ.get("CI") or os.environ.get("RLHFKIT_STILL") else None  # None: unless nobody looks
        with tqdm(total=total, initial=len(self.history), desc=describe, disable=quiet, leave=False) as bar:
            while len(self.history) < total:
                step = len(self.history)
                yield step
                if len(self.history) != step + 1:
                    raise RuntimeError(f"step {step}: expected one call of log() per step")
                bar.update()
                name, x = next(iter(self.history[-1].items()))
                bar.set_postfix_str(f"{name} {x:.3f}", refresh=False)
                if self.checkpoint is not None and ((step + 1) % self.save_every == 0 or step + 1 == total):
                    self.save()

    def log(self, metrics: dict[str, Tensor | float]) -> None:
        """Metrics of the step that was just taken; the first one stands beside the progress bar."""
        self.history.append({n: x.item() if isinstance(x, Tensor) else x for n, x in metrics.items()})

    def save(self) -> None:
        """Write the state to the file now."""
        assert self.checkpoint is not None
        tensors = {f"model/{name}": x for name, x in self.model.state_dict().items()}
        for which, optimizer in enumerate(self.optimizers):
            for number, slots in optimizer.state_dict()["state"].items():
                tensors |= {f"optimizer/{which}/{number}/{name}": torch.as_tensor(x) for name, x in slots.items()}
        tensors["random/cpu"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random/cuda"] = torch.cuda.get_rng_state()
        if self.generator is not None:
            tensors["random/generator"] = self.generator.get_state()
        description = {"kind": "Run", "recipe": self.recipe, "history": self.history}
        save_checkpoint(self.checkpoint, tensors, description)

    def _resume(self, path: Path) -> None:
        tensors, description = load_checkpoint(path)
        if description.get("kind") != "Run":
            raise ValueError(f"checkpoint: {path} holds a {description.get('kind')}, expected an unfinished run")
        if description["recipe"] != self.recipe:
            there = description["recipe"]
            names = sorted(n for n in there.keys() | self.recipe.keys() if there.get(n) != self.recipe.get(n))
            differs = "; ".join(f"{n} {there.get(n)} there, {self.recipe.get(n)} here" for n in names)
            raise ValueError(f"checkpoint: {path} was made with another recipe: {differs}; delete it to start again")
        weights = {name.removeprefix("model/"): x for name, x in tensors.items() if name.startswith("model/")}
        shapes = {name: tuple(x.shape) for name, x in self.model.state_dict().items()}
        found = {name: tuple(x.shape) for name, x in weights.items()}
        if found != shapes:
            name = min(n for n in found.keys() | shapes.keys() if found.get(n) != shapes.get(n))
            got = f"{name} is {found.get(name, 'missing')} there and {shapes.get(name, 'missing')} here"
            raise ValueError(f"checkpoint: {path} does not fit the model: {got}")
        self.model.load_state_dict(weights)
        states: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.optimizers]
        for name, x in tensors.items():
            if name.startswith("optimizer/"):
                _, which, number, slot = name.split("/")
                states[int(which)].setdefault(int(number), {})[slot] = x
        for optimizer, state in zip(self.optimizers, states, strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for place, slots in state.items():  # fused steps walk through memory: state laid out like its parameter
                like = parameters[place]
                for slot, x in slots.items():
                    if x.shape == like.shape:
                        slots[slot] = torch.empty_like(like, dtype=x.dtype).copy_(x)
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        torch.set_rng_state(tensors["random/cpu"])
        if torch.cuda.is_available() and "random/cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random/cuda"])
        if self.generator is not None:
            self.generator.set_state(tensors["random/generator"])
        self.history = description["history"]
