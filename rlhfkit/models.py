"""Policies: anything with ``logits(tokens)``, the distribution of the next token after every position.

The tabular policy has one row of logits for every prompt and prefix, so that it can represent *every* distribution
over responses, the optimal one included. The transformer behind the same call is in ``gpt``, and importable from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from rlhfkit.gpt import GPT, GPTConfig, KVCache, ScalarModel

__all__ = ["GPT", "GPTConfig", "KVCache", "Policy", "RowCache", "ScalarModel", "TabularPolicy", "TabularValue"]


class Policy(Protocol):
    """What the sampler and the loops need of a policy."""

    def logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits after every position: tokens (B, L) -> (B, L, V)."""
        ...

    def parameters(self) -> object:
        """What an optimiser takes."""
        ...


@dataclass
class RowCache:
    """What a tabular policy remembers of the tokens it has seen, as a GPT remembers keys and values.

    Attributes:
        prompts, rows: (B,), the prompt and the row of the table after the last token, counted within the prompt.
        used: number of tokens seen so far, the prompt included.
    """

    prompts: Tensor
    rows: Tensor
    used: int = 0


class TabularPolicy(nn.Module):
    """One row of logits for every prompt and every prefix of a response.

    The first token of a sequence is the number of the prompt; the response follows. The table has shape (P, M, V),
    with M = 1 + V + ... + V^(T-1) prefixes in order of length, then lexicographically.

    Args:
        vocab_size: V, at least 2.
        max_length: T, the longest response.
        num_prompts: P.
        table: initial logits, (P, M, V); zeros (the uniform policy) when not given. Copied.

    Raises:
        ValueError: if a size is too small, or ``table`` has another shape.
    """

    def __init__(self, vocab_size: int, max_length: int, num_prompts: int = 1, table: Tensor | None = None) -> None:
        super().__init__()
        if vocab_size < 2 or max_length < 1 or num_prompts < 1:
            got = (vocab_size, max_length, num_prompts)
            raise ValueError(f"vocab_size, max_length, num_prompts: got {got}, expected at least 2, 1, 1")
        self.vocab_size, self.max_length, self.num_prompts = vocab_size, max_length, num_prompts
        shape = (num_prompts, self.count_prefixes(vocab_size, max_length), vocab_size)
        if table is None:
            table = torch.zeros(shape, dtype=torch.float64)
        if table.shape != shape:
            raise ValueError(f"table: got shape {tuple(table.shape)}, expected {shape}")
        self.table = nn.Parameter(table.detach().clone())

    @staticmethod
    def count_prefixes(vocab_size: int, max_length: int) -> int:
        """Number of prefixes of fewer than T tokens: (V^T - 1) / (V - 1)."""
        return (vocab_size**max_length - 1) // (vocab_size - 1)

    def prefixes(self, tokens: Tensor) -> Tensor:
        """Row of the table that each position reads: (B, L) -> (B, L), L <= T + 1; -1 after a full response."""
        rows = self._rows_after(torch.zeros_like(tokens[:, 0]), tokens[:, 1:])
        rows[:, self.max_length :] = -1
        return rows

    def hidden(self, tokens: Tensor, cache: RowCache | None = None) -> Tensor:
        """All that a table needs to know of the tokens so far: the number of a row, counted through all prompts.

        Args:
            tokens: (B, L), integers, 1 <= L <= T + 1; ``tokens[:, 0]`` numbers the prompt. With a cache the L tokens
                after those it has seen; what follows the first ones is generated, and not checked.
            cache: of :meth:`new_cache`; it moves on by the tokens.

        Returns:
            (B, L), integers, M times the prompt plus :meth:`prefixes`; P M after a full response.

        Raises:
            ValueError: if the sequence is too long, the cache is of another batch, or a prompt or token that is checked
                is out of range.
        """
        self._require_readable(tokens, cache)
        if cache is None or not cache.used:
            prompts, rows = tokens[:, 0], self._rows_after(torch.zeros_like(tokens[:, 0]), tokens[:, 1:])
        else:
            prompts, rows = cache.prompts, self._rows_after(cache.rows, tokens)[:, 1:]
        if cache is not None:
            cache.prompts, cache.rows, cache.used = prompts.clone(), rows[:, -1], cache.used + tokens.shape[1]
        count = self.table.shape[1]
        return torch.where(rows < count, prompts.unsqueeze(1) * count + rows, self.num_prompts * count)

    def new_cache(self, batch: int, length: int) -> RowCache:
        """An empty cache for ``batch`` rows. It takes the same room for every ``length``, so any will do."""
        empty = torch.zeros(batch, dtype=torch.int64, device=self.table.device)
        return RowCache(empty, empty)

    def _rows_after(self, row: Tensor, tokens: Tensor) -> Tensor:
        """From the row of a prefix, (B,), to its row and those after each further token, (B, 1 + L)."""
        columns = [row]
        for token in tokens.unbind(1):  # row r of the table is followed by the rows V r + 1 to V r + V
            columns.append(self.vocab_size * columns[-1] + 1 + token)
        return torch.stack(columns, 1)

    def _require_readable(self, tokens: Tensor, cache: RowCache | None) -> None:
        used, limit = 0 if cache is None else cache.used, self.max_length + 1
        if tokens.ndim != 2 or not 1 <= tokens.shape[1] <= limit - used:
            got, expected = f"shape {tuple(tokens.shape)}", f"(B, L) with 1 <= L <= {limit}"
            if used:
                got, expected = f"{got} after {used} in the cache", f"(B, L) with L >= 1, and at most {limit} together"
            raise ValueError(f"tokens: got {got}, expected {expected}")
        if cache is not None and len(tokens) != len(cache.rows):
            raise ValueError(f"tokens: got {len(tokens)} rows, expected the {len(cache.rows)} of the cache")
        if used:
            return
        prompts, response = tokens[:, 0], tokens[:, 1:]
        for x, count, what in ((prompts, self.num_prompts, "prompts"), (response, self.vocab_size, "response tokens")):
            if x.numel():
                low, high = x.aminmax()
                if low < 0 or high >= count:
                    where = " (first column)" if x is prompts else ""
                    got = f"[{int(low)}, {int(high)}]"
                    raise ValueError(f"tokens: got {what} in {got}{where}, expected [0, {count - 1}]")

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits of the next token: (B, L) of :meth:`hidden` -> (B, L, V)."""
        return _rows(self.table, hidden)

    def logits(self, tokens: Tensor) -> Tensor:
        """Next-token logits after every position.

        Args:
            tokens: (B, L), integers, as :meth:`hidden` takes and checks them.

        Returns:
            (B, L, V); zeros after a response of T tokens, where nothing follows.
        """
        return self.unembed(self.hidden(tokens))

    def forward(self, tokens: Tensor) -> Tensor:
        """The same as :meth:`logits`, (B, L) -> (B, L, V)."""
        return self.logits(tokens)


class TabularValue(nn.Module):
    """One value for every prompt and every prefix of a response: the value function of a tabular policy.

    Args:
        policy: whose prompts and prefixes they are; its table is not read. The values start at 0, in its dtype.
    """

    trunk: TabularPolicy

    def __init__(self, policy: TabularPolicy) -> None:
        super().__init__()
        object.__setattr__(self, "trunk", policy)  # known, but no part: its parameters are not ours
        self.table = nn.Parameter(torch.zeros_like(policy.table[..., 0]))

    def from_hidden(self, hidden: Tensor) -> Tensor:
        """Value at every row of the table, (B, L) of :meth:`TabularPolicy.hidden` -> (B, L), reward units."""
        return _rows(self.table, hidden)

    def values(self, tokens: Tensor) -> Tensor:
        """Value after every position.

        Args:
            tokens: (B, L), integers, as :meth:`TabularPolicy.hidden` takes and checks them.

        Returns:
            (B, L), reward units; 0 after a response of T tokens, where nothing follows.
        """
        return self.from_hidden(self.trunk.hidden(tokens))


def _rows(table: Tensor, rows: Tensor) -> Tensor:
    """Rows of a table (P, M, ...) by their number, (B, L) -> (B, L, ...); zeros for the number P M."""
    listed = torch.cat([table.flatten(0, 1), torch.zeros_like(table[0, :1])])
    return listed.index_select(0, rows.flatten()).unflatten(0, rows.shape)
