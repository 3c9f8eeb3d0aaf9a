"""A small GPT, its cache of keys and values, and a model that gives a number in place of a distribution."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhfkit.checkpoints import load_checkpoint, save_checkpoint
from rlhfkit.validation import require_mask


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT.

    Attributes:
        vocab_size: V, at least 2.
        n_positions: longest sequence of real tokens, at least 1.
        n_embd: C, width of the residual stream, divisible by ``n_head``.
        n_layer: number of blocks, at least 1.
        n_head: heads of attention, at least 1.
        dropout: probability in [0, 1), on the embeddings, the attention weights and both outputs of a block.
        pad_id: id of padding, in [0, V), or -1: no id is padding.

    Raises:
        ValueError: if a number is out of range.
    """

    vocab_size: int
    n_positions: int
    n_embd: int
    n_layer: int
    n_head: int
    dropout: float = 0.0
    pad_id: int = -1

    def __post_init__(self) -> None:
        sizes = {"vocab_size": 2, "n_positions": 1, "n_embd": 1, "n_layer": 1, "n_head": 1}
        for name, least in sizes.items():
            if not getattr(self, name) >= least:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least {least}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd: got {self.n_embd}, expected a multiple of n_head = {self.n_head}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout: got {self.dropout}, expected a probability in [0, 1)")
        if not -1 <= self.pad_id < self.vocab_size:
            raise ValueError(f"pad_id: got {self.pad_id}, expected -1 or an id in [0, {self.vocab_size - 1}]")


@dataclass
class KVCache:
    """Keys and values of the tokens a GPT has seen: made in full at the start, filled from the left, never copied.

    Attributes:
        keys, values: (n_layer, B, n_head, length, C / n_head).
        real: (B, length), bool, False where a token was padding.
        used: number of columns filled so far.
        gap: whether in some row a real token followed padding, so that attention needs a mask.
    """

    keys: Tensor
    values: Tensor
    real: Tensor
    used: int = 0
    gap: bool = False


class Block(nn.Module):
    """One pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)); (B, L, C) -> (B, L, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width, self.n_head, self.dropout = config.n_embd, config.n_head, config.dropout
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.attention_out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None, layer: int) -> Tensor:
        """``mask`` (B, 1, L, S) is True where a position may look; None: at itself and everything before it."""
        drop = self.dropout if self.training else 0.0
        q, k, v = self.qkv(self.norm_1(x)).unflatten(-1, (3, self.n_head, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            end = cache.used + x.shape[1]
            cache.keys[layer, :, :, cache.used : end], cache.values[layer, :, :, cache.used : end] = k, v
            k, v = cache.keys[layer, :, :, :end], cache.values[layer, :, :, :end]
        causal = mask is None and x.shape[1] > 1
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop, is_causal=causal)
        x = x + F.dropout(self.attention_out(mixed.transpose(1, 2).flatten(2)), drop, self.training)
        mlp = self.down(F.gelu(self.up(self.norm_2(x)), approximate="tanh"))
        return x + F.dropout(mlp, drop, self.training)


class GPT(nn.Module):
    """GPT-2: learned positions, pre-norm blocks, tanh-GELU, the output matrix tied to the token embedding.

    Padding is wherever ``tokens == config.pad_id``, before, after or between the real tokens: real positions neither
    see it nor count it. The position of a token is the number of real tokens before it. The initial weights are drawn
    from torch's global generator: N(0, 0.02^2), the two projections into the residual stream N(0, 0.02^2 / (2
    n_layer)), biases 0.

    Args:
        config: the sizes; also an attribute, as are ``vocab_size`` and ``pad_id``.

    Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config, self.vocab_size, self.pad_id = config, config.vocab_size, config.pad_id
        self.token_embedding = nn.Embedding(config.vocab_size, config.n_embd)
        self.position_embedding = nn.Embedding(config.n_positions, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.norm = nn.LayerNorm(config.n_embd)
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.ndim == 2:
                into_stream = name.endswith(("attention_out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * config.n_layer) if into_stream else 0.02)
        _store_by_columns(self)

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """The residual stream after the last layer norm.

        Args:
            tokens: (B, L), integers, L >= 1; with a cache the L tokens after those it has seen.
            cache: of :meth:`new_cache`; the tokens are added to it.

        Returns:
            (B, L, C); what stands at padding is finite and means nothing.

        Raises:
            ValueError: if an id is out of range, a row has more than ``n_positions`` real tokens, or the cache is full.
        """
        positions, mask = self._places(tokens, cache)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        x = F.dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.blocks):
            x = block(x, mask, cache, layer)
        if cache is not None:
            cache.used += tokens.shape[1]
        return self.norm(x)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Logits of the next token: (B, L, C) -> (B, L, V), by the transposed token embedding."""
        return F.linear(hidden, self.token_embedding.weight)

    def logits(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Next-token logits after every position, (B, L) -> (B, L, V); arguments and errors of :meth:`hidden`."""
        return self.unembed(self.hidden(tokens, cache))

    def forward(self, tokens: Tensor) -> Tensor:
        """The same as :meth:`logits`, (B, L) -> (B, L, V)."""
        return self.logits(tokens)

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for ``batch`` rows of up to ``length`` tokens, padding included."""
        weight, c = self.token_embedding.weight, self.config
        autocast = torch.is_autocast_enabled(weight.device.type)
        dtype = torch.get_autocast_dtype(weight.device.type) if autocast else weight.dtype
        keys = weight.new_empty((c.n_layer, batch, c.n_head, length, c.n_embd // c.n_head), dtype=dtype)
        return KVCache(keys, torch.empty_like(keys), weight.new_zeros((batch, length), dtype=torch.bool))

    def _require_readable(self, tokens: Tensor, cache: KVCache | None) -> None:
        if tokens.ndim != 2 or tokens.shape[1] < 1:
            raise ValueError(f"tokens: got shape {tuple(tokens.shape)}, expected (B, L) with L >= 1")
        start = 0 if cache is None else cache.used
        if cache is not None and (len(cache.real) != len(tokens) or start + tokens.shape[1] > cache.real.shape[1]):
            got = f"{tuple(tokens.shape)} after {start} in the cache"
            raise ValueError(f"tokens: got shape {got}, expected the cache's (B, length) = {tuple(cache.real.shape)}")
        # what a cache has begun is generated, one token at a time: looking at each would stop a GPU at every step
        if not start and tokens.numel() and (tokens.min() < 0 or tokens.max() >= self.vocab_size):
            got = f"[{int(tokens.min())}, {int(tokens.max())}]"
            raise ValueError(f"tokens: got ids in {got}, expected [0, {self.vocab_size - 1}]")

    def _places(self, tokens: Tensor, cache: KVCache | None) -> tuple[Tensor, Tensor | None]:
        """Position of every token, and the attention mask; None where plain causal attention is right."""
        self._require_readable(tokens, cache)
        start, real, gap = 0, tokens != self.pad_id, False
        if cache is not None:
            start, end, gap = cache.used, cache.used + tokens.shape[1], cache.gap
            cache.real[:, start:end] = real
            real = cache.real[:, :end]
        limit = self.config.n_positions
        if real.shape[1] > limit and (longest := int(real.sum(1).max())) > limit:
            raise ValueError(f"tokens: got {longest} real tokens in a row, expected at most n_positions = {limit}")
        gap = gap or (self.pad_id >= 0 and bool((real[:, 1:] & ~real[:, :-1]).any()))
        if cache is not None:
            cache.gap = gap
        columns = torch.arange(real.shape[1], device=tokens.device)
        positions = ((real.cumsum(1) - real.long())[:, start:] if gap else columns[start:]).clamp(max=limit - 1)
        if not gap and (start == 0 or tokens.shape[1] == 1):
            return positions, None
        rows = columns[start:].unsqueeze(1)
        # padding may look at itself too, so that no row is empty; nothing real looks at padding
        return positions, (real[:, None, None] & (columns <= rows)) | (columns == rows)

    def save(self, path: str | os.PathLike[str], info: dict[str, Any] | None = None) -> None:
        """Write weights, config and ``info`` (recipe, seed, loss: what JSON can hold) with ``save_checkpoint``."""
        _save(path, self, self.config, info)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> GPT:
        """Read what :meth:`save` wrote.

        Args:
            path: of the file.
            device: where the weights go.

        Returns:
            The model, in the dtype it was saved in; no random number is drawn.

        Raises:
            ValueError: if the file is damaged, holds another kind of model, or its tensors do not fit its config.
        """
        return _load(path, device, cls, cls)


class ScalarModel(nn.Module):
    """A number after every position: w . h + b, with h the trunk's hidden state. A reward or a value.

    Args:
        trunk: used as it is, not copied: share it with a policy, or give it a copy.
        head_std: w starts N(0, head_std^2), from torch's global generator, and b at 0. None: 1 / sqrt(C + 1), for
            rewards, whose variance then starts near 1; 0: a value of 0 everywhere.

    Raises:
        ValueError: if ``head_std`` is negative.

    Source of the default: Stiennon et al. 2020, arXiv:2009.01325, appendix (their released code).
    """

    def __init__(self, trunk: GPT, head_std: float | None = None) -> None:
        super().__init__()
        std = 1 / math.sqrt(trunk.config.n_embd + 1) if head_std is None else head_std
        if not std >= 0:
            raise ValueError(f"head_std: got {head_std}, expected None or a number >= 0")
        weight = trunk.token_embedding.weight
        self.trunk, self.head = trunk, nn.Linear(trunk.config.n_embd, 1, device=weight.device, dtype=weight.dtype)
        nn.init.normal_(self.head.weight, std=std)
        nn.init.zeros_(self.head.bias)

    def from_hidden(self, hidden: Tensor) -> Tensor:
        """The scalar of every hidden state: (B, L, C) -> (B, L), where the trunk has run already."""
        return self.head(hidden).squeeze(-1)

    def values(self, tokens: Tensor) -> Tensor:
        """The scalar after every position, (B, L) -> (B, L), reward units; at padding it means nothing."""
        return self.from_hidden(self.trunk.hidden(tokens))

    def scores(self, tokens: Tensor, mask: Tensor | None = None) -> Tensor:
        """The scalar at the last real token of every row.

        Args:
            tokens: (B, L), integers.
            mask: (B, L), bool; its last True is the place. None: the last token that is not ``pad_id``.

        Returns:
            (B,), reward units.

        Raises:
            ValueError: if a row has no such token, or ``mask`` has another shape or dtype.
        """
        if mask is None:
            mask = tokens != self.trunk.pad_id
        require_mask("mask", mask, tokens.shape)
        if not mask.any(1).all():
            row = int((~mask.any(1)).nonzero()[0])
            raise ValueError(f"tokens, mask: row {row} is all padding, expected at least one real token")
        last = (mask * torch.arange(mask.shape[1], device=mask.device)).argmax(1)
        hidden = self.trunk.hidden(tokens)
        return self.from_hidden(hidden[torch.arange(len(last), device=last.device), last])

    def forward(self, tokens: Tensor) -> Tensor:
        """The same as :meth:`values`, (B, L) -> (B, L)."""
        return self.values(tokens)

    def save(self, path: str | os.PathLike[str], info: dict[str, Any] | None = None) -> None:
        """Write trunk, head, config and ``info`` with ``save_checkpoint``."""
        _save(path, self, self.trunk.config, info)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> ScalarModel:
        """Read what :meth:`save` wrote; errors as :meth:`GPT.load`."""
        return _load(path, device, cls, lambda config: cls(GPT(config)))


def _store_by_columns(model: nn.Module) -> None:
    """Same weights, other order in memory: products of few rows, one per response, then take 10 to 20 % less time."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data = module.weight.data.t().contiguous().t()


def _save(path: str | os.PathLike[str], model: nn.Module, config: GPTConfig, info: dict[str, Any] | None) -> None:
    description = {"kind": type(model).__name__, "config": asdict(config), "info": info or {}}
    save_checkpoint(path, model.state_dict(), description)


def _load(
    path: str | os.PathLike[str],
    device: torch.device | str,
    cls: type[nn.Module],
    build: Callable[[GPTConfig], nn.Module],
) -> Any:
    tensors, description = load_checkpoint(path, device)
    if description.get("kind") != cls.__name__:
        raise ValueError(f"path: {path} holds a {description.get('kind')}, expected a {cls.__name__}")
    sizes = description.get("config", {})
    expected_names = {field.name for field in fields(GPTConfig)}
    if set(sizes) != expected_names:
        raise ValueError(f"path: config of {path} has {sorted(sizes)}, expected {sorted(expected_names)}")
    with torch.device("meta"):  # shapes without numbers: nothing is drawn, nothing is allocated
        model = build(GPTConfig(**sizes))
    wanted = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    found = {name: tuple(x.shape) for name, x in tensors.items()}
    for name in sorted(wanted.keys() | found.keys()):
        if wanted.get(name) != found.get(name):
            got, expected = found.get(name, "nothing"), wanted.get(name, "nothing")
            raise ValueError(f"path: {path} has {got} under {name}, expected {expected}")
    model.load_state_dict(tensors, assign=True)
    _store_by_columns(model)
    return model
