"""Sampling responses with an explicit generator, and the log-probabilities of given ones."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from rlhfkit.logprobs import log_softmax, next_token_logprobs, sequence_logprobs
from rlhfkit.models import GPTConfig, KVCache, Policy, RowCache, TabularPolicy
from rlhfkit.tasks import ExactTask, Rollout
from rlhfkit.validation import require_in

TINY = torch.finfo(torch.float32).tiny


def truncate_logits(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Logits of the distribution to draw from: divided by the temperature, then top-k, then top-p; the rest is -inf.

    Top-k keeps the k largest (exactly k, also among equals). Top-p keeps the smallest set of the most probable tokens
    whose probability is at least p, always one or more. Softmax of the result is the truncated, renormalised
    distribution.

    Args:
        logits: (B, V), or any shape with the vocabulary last.
        temperature: positive; below 1 sharper, above 1 flatter.
        top_k: at least 1, or None: all; 1 is greedy. More than V is the same as V.
        top_p: in (0, 1], or None: all.

    Returns:
        The same shape.

    Raises:
        ValueError: if a number is out of range.

    Source: Holtzman et al. 2020, arXiv:1904.09751, section 3.1 (top-p), 3.2 (top-k).
    """
    require_in("temperature", temperature, 0, open_low=True)
    logits = logits / temperature
    if top_k is not None:
        require_in("top_k", top_k, 1)
        kept, tokens = logits.topk(min(top_k, logits.shape[-1]))
        logits = torch.full_like(logits, -torch.inf).scatter(-1, tokens, kept)
    require_in("top_p", 1 if top_p is None else top_p, 0, 1, open_low=True)
    if top_p is not None and top_p < 1:
        kept, tokens = logits.sort(descending=True, stable=True)
        probabilities = kept.softmax(-1)
        before = probabilities.cumsum(-1) - probabilities  # what more probable tokens hold together
        kept = kept.masked_fill(before >= top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter(-1, tokens, kept)
    return logits


def _require_prompts(policy: Any, prompts: Tensor, max_length: int) -> None:
    if prompts.ndim != 2 or prompts.shape[1] < 1 or max_length < 1:
        raise ValueError(f"prompts, max_length: got {tuple(prompts.shape)}, {max_length}, expected (B, L0) and >= 1")
    limit = getattr(policy, "max_length", max_length)  # of a tabular policy: beyond it there is no row to read
    if max_length > limit:
        raise ValueError(f"max_length: got {max_length}, expected at most the policy's {limit}")
    if not isinstance(getattr(policy, "config", None), GPTConfig) or not len(prompts):
        return
    real = prompts != policy.pad_id
    if not real[:, -1].all():
        row = int((~real[:, -1]).nonzero()[0])
        got = "is empty (all padding)" if not real[row].any() else "ends in padding"
        raise ValueError(f"prompts: row {row} {got}, expected at least one token, with the padding on the left")
    longest, limit = int(real.sum(1).max()), policy.config.n_positions
    if longest + max_length > limit:
        got = f"{longest} prompt tokens and max_length {max_length}"
        raise ValueError(f"prompts, max_length: got {got}, expected at most n_positions = {limit} together")


def _logits_from(policy: Any, tokens: Tensor, start: int, cache: KVCache | RowCache | None = None) -> Tensor:
    """Logits after position ``start`` and all later ones, in float32 or better; the earlier ones cost nothing."""
    if hasattr(policy, "unembed"):
        hidden = policy.hidden(tokens) if cache is None else policy.hidden(tokens, cache)
        logits = policy.unembed(hidden[:, start:])
    else:
        logits = policy.logits(tokens)[:, start:]
    return _at_least_float32(logits)


def _log_table(policy: Any, reads: int) -> Tensor | None:
    """Log-probabilities at all rows of a tabular policy, (P M + 1, V), if there are fewer of them than reads.

    A large batch reads a row many times: to normalise the table before is then less work than all that was read after.
    Every row must be a distribution: one of -inf alone has a gradient of nan, even if nobody reads it. A subclass may
    read its table otherwise, and is asked position by position.
    """
    if type(policy) is not TabularPolicy or reads <= (last := policy.table[..., 0].numel()):
        return None
    logits = policy.unembed(torch.arange(last + 1, device=policy.table.device).unsqueeze(0))[0]
    return log_softmax(_at_least_float32(logits)).contiguous()  # row by row in memory, as it is read


def _at_least_float32(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def draw(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One number per row, each with its probability: the draws of ``torch.multinomial`` in half of its time.

    A race of clocks: if clock v rings after an exponential time of rate p_v, the first one to ring is v with
    probability p_v / sum_u p_u, the least of such times being exponential with the summed rate. Torch draws so, too, a
    random number at a time; on the CPU all at once is faster.

    Args:
        probabilities: (B, V), at least 0, rows sum to 1.
        generator: source of randomness, on the device of ``probabilities``.

    Returns:
        (B, 1), integers.

    Raises:
        RuntimeError: if a probability is not finite.
    """
    probabilities = probabilities.contiguous()  # multinomial deals out its random numbers in the order of memory
    if probabilities.device.type != "cpu" or not torch.isfinite(probabilities.sum()):
        return torch.multinomial(probabilities, 1, generator=generator)
    shape, device = probabilities.shape, probabilities.device
    waits = -torch.log1p(-torch.rand(shape, generator=generator, dtype=torch.float64, device=device))
    return (probabilities / waits.to(probabilities.dtype).clamp(min=TINY)).argmax(1, keepdim=True)


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: Tensor,
    max_length: int,
    *,
    generator: torch.Generator,
    eos_id: int | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    use_cache: bool = True,
) -> Rollout:
    """Draw one response to every prompt, token by token: y_t ~ pi(. | x, y_<t).

    Args:
        policy: has ``logits(tokens)``. Put a model with dropout into ``eval()`` first.
        prompts: (B, L0), integers; prompts of different lengths are padded on the left with the policy's ``pad_id``.
            Repeat a prompt to get several responses to it.
        max_length: T, the longest response, at least 1.
        generator: source of randomness, on the device of ``prompts``.
        eos_id: a response ends at its first ``eos_id``, which counts; the rest of the row is filled with the policy's
            ``pad_id`` if it has one, else with ``eos_id``.
        temperature: of the distribution drawn from, positive; here and below as in :func:`truncate_logits`.
        top_k: keep the k most probable tokens; 1 is greedy.
        top_p: keep the most probable tokens that hold p together.
        use_cache: let the policy remember earlier tokens where it can (keys and values, or the row of a table); the
            result is the same.

    Returns:
        A rollout of B responses with T columns; no gradient flows into it.

    Raises:
        ValueError: if ``prompts`` is not (B, L0), a prompt is empty or padded on the right, ``max_length`` is less than
            1, the whole is longer than the policy allows, or a setting is out of range.
    """
    _require_prompts(policy, prompts, max_length)
    (batch, start), pad_id = prompts.shape, getattr(policy, "pad_id", -1)
    fill = pad_id if pad_id >= 0 or eos_id is None else eos_id
    sequences = torch.cat([prompts, prompts.new_full((batch, max_length), fill)], 1)
    mask = torch.zeros_like(sequences[:, start:], dtype=torch.bool)
    alive = torch.ones_like(mask[:, 0])
    cache = policy.new_cache(batch, start + max_length) if use_cache and hasattr(policy, "new_cache") else None
    as_it_is = temperature == 1 and top_k is None and top_p is None
    log_table = _log_table(policy, batch * max_length) if as_it_is else None
    columns = []
    for t in range(start, start + max_length):
        unread = sequences[:, cache.used if cache else 0 : t]
        if log_table is not None:
            logprobs = drawn = log_table.index_select(0, cast(TabularPolicy, policy).hidden(unread, cache)[:, -1])
        else:
            logits = _logits_from(policy, unread, -1, cache)[:, 0]
            logprobs = log_softmax(logits)
            drawn = logprobs if as_it_is else log_softmax(truncate_logits(logits, temperature, top_k, top_p))
        tokens = draw(drawn.exp(), generator)
        both = torch.cat([logprobs.gather(1, tokens), drawn.gather(1, tokens)], 1)
        columns.append(torch.where(alive.unsqueeze(1), both, torch.zeros_like(both)))
        mask[:, t - start] = alive
        sequences[:, t] = torch.where(alive, tokens[:, 0], sequences[:, t])
        if eos_id is not None:
            alive = alive & (tokens[:, 0] != eos_id)
            if not alive.any():
                break
    recorded = F.pad(torch.stack(columns, 2), (0, max_length - len(columns)))  # (B, 2, T)
    return Rollout(prompts, sequences[:, start:].contiguous(), mask, *(x.contiguous() for x in recorded.unbind(1)))


def response_logprobs(policy: Policy, prompts: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of every token of given responses, each given the prompt and the tokens before it.

    Args:
        policy: has ``logits(tokens)``.
        prompts: (B, L0), integers, padded on the left.
        tokens: responses, (B, T), integers, padded on the right.
        temperature: logits are divided by it, positive; 1 is the policy itself.

    Returns:
        (B, T), nats, with gradient, in float32 or better; padding gets a number too, so mask it.

    Raises:
        ValueError: if the shapes do not fit, or ``temperature`` is not positive.
    """
    if prompts.ndim != 2 or tokens.ndim != 2 or len(prompts) != len(tokens) or not prompts.shape[1]:
        got = f"{tuple(prompts.shape)}, {tuple(tokens.shape)}"
        raise ValueError(f"prompts, tokens: got shapes {got}, expected (B, L0), (B, T), L0 at least 1")
    require_in("temperature", temperature, 0, open_low=True)
    sequences, last = torch.cat([prompts, tokens], dim=1), prompts.shape[1] - 1  # the response is predicted from here
    log_table = _log_table(policy, tokens.numel()) if temperature == 1 else None
    if log_table is not None:
        chosen = log_table.shape[1] * cast(TabularPolicy, policy).hidden(sequences)[:, last:-1] + tokens
        return log_table.flatten().index_select(0, chosen.flatten()).view(tokens.shape)
    logits = _logits_from(policy, sequences, last)
    return next_token_logprobs(logits if temperature == 1 else logits / temperature, sequences[:, last:])


def logits_and_values(policy: Any, value: Any, prompts: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """What policy and value function say where each token of given responses was chosen, before it was.

    Args:
        policy: has ``logits(tokens)``.
        value: has ``values(tokens)``; when its trunk is the policy, the trunk runs once.
        prompts: (B, L0), integers, padded on the left.
        tokens: responses, (B, T), integers, padded on the right.

    Returns:
        logits (B, T, V) and values (B, T), reward units, with gradient, in float32 or better; what stands at padding
        means nothing.
    """
    sequences, last = torch.cat([prompts, tokens], dim=1), prompts.shape[1] - 1
    if hasattr(value, "trunk") and value.trunk is policy:
        hidden = policy.hidden(sequences)[:, last:-1]
        logits, values = policy.unembed(hidden), value.from_hidden(hidden)
    else:
        logits, values = policy.logits(sequences)[:, last:-1], value.values(sequences)[:, last:-1]
    return _at_least_float32(logits), _at_least_float32(values)


def response_values(value: Any, prompts: Tensor, tokens: Tensor) -> Tensor:
    """The values of :func:`logits_and_values` alone: nothing is computed over the vocabulary.

    Args:
        value: has ``values(tokens)``.
        prompts: (B, L0), integers, padded on the left.
        tokens: responses, (B, T), integers, padded on the right.

    Returns:
        (B, T), reward units, with gradient, in float32 or better; what stands at padding means nothing.
    """
    return _at_least_float32(value.values(torch.cat([prompts, tokens], dim=1))[:, prompts.shape[1] - 1 : -1])


def all_logprobs(policy: Policy, task: ExactTask) -> Tensor:
    """Log-probability of every response to every prompt of an exact task: what the oracle works on.

    Args:
        policy: has ``logits(tokens)``.
        task: P prompts, N responses.

    Returns:
        (P, N), nats, with gradient; exp of a row sums to 1.
    """
    num_prompts, count = task.scores.shape
    prompts = task.prompts.repeat_interleave(count, dim=0)
    tokens, mask = task.tokens.repeat(num_prompts, 1), task.response_mask.repeat(num_prompts, 1)
    return sequence_logprobs(response_logprobs(policy, prompts, tokens), mask).view(num_prompts, count)
