"""From logits to log-probabilities of tokens, of whole responses, and to entropy. All in nats.

The shift by one of next-token prediction (the logits at position t predict token t + 1) is done in
:func:`next_token_logprobs` and nowhere else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlhfkit.masked import masked_sum
from rlhfkit.validation import require_float, require_ndim

FEW = 8  # tokens: as many numbers in double precision as one instruction of a processor can take


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities of all tokens: log softmax(s)_v = s_v - log sum_u exp s_u.

    The same as ``logits.log_softmax(-1)``. On a last axis of a few tokens torch works on one position at a time; with
    the tokens first it works on many at once, and takes a third of the time.

    Args:
        logits: (B, T, V), or any shape with the vocabulary last; -inf for forbidden tokens.

    Returns:
        The same shape, nats; not always contiguous.

    Raises:
        ValueError: if ``logits`` is not floating point or has no axis.
    """
    require_float(logits=logits)
    if logits.ndim == 0:
        raise ValueError("logits: got a scalar, expected the vocabulary as last axis")
    if logits.shape[-1] > FEW:
        return logits.log_softmax(-1)
    return logits.movedim(-1, 0).contiguous().log_softmax(0).movedim(0, -1)


def _require_tokens(logits: Tensor, tokens: Tensor) -> None:
    require_ndim("logits", logits, "(B, T, V)")
    require_float(logits=logits)
    if tokens.shape != logits.shape[:2]:
        raise ValueError(f"tokens: got shape {tuple(tokens.shape)}, expected {tuple(logits.shape[:2])} as in logits")
    if tokens.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise ValueError(f"tokens: got dtype {tokens.dtype}, expected integers")
    vocab_size = logits.shape[-1]
    if not tokens.numel():
        return
    low, high = tokens.aminmax()
    if low < 0 or high >= vocab_size:
        got = f"[{int(low)}, {int(high)}]"
        raise ValueError(f"tokens: got values in {got}, expected [0, {vocab_size - 1}] (pad with a valid id)")


def _pick(logprobs: Tensor, tokens: Tensor) -> Tensor:
    """Of the log-probabilities of all tokens, (B, T, V), those of some, (B, T)."""
    return logprobs.gather(-1, tokens.long().unsqueeze(-1)).squeeze(-1)


def token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of each token under the logits at its own position: log softmax(logits)[token].

    Args:
        logits: (B, T, V); ``logits[:, t]`` is the distribution that ``tokens[:, t]`` was drawn from (aligned).
        tokens: (B, T), integers in [0, V).

    Returns:
        (B, T), nats.

    Raises:
        ValueError: if the shapes do not fit, ``tokens`` are not integers, or a token lies outside [0, V).
    """
    _require_tokens(logits, tokens)
    # log_softmax, not logits - logsumexp: the latter loses all digits below 1e-3 at logits of 1e4 in float32
    return _pick(log_softmax(logits), tokens)


def next_token_logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    """Log-probability of every token but the first, each given the tokens before it.

    log pi(tokens[:, t + 1] | tokens[:, :t + 1]) = log softmax(logits[:, t])[tokens[:, t + 1]].

    Args:
        logits: (B, L, V), a model's output on ``tokens``; ``logits[:, t]`` predicts ``tokens[:, t + 1]``.
        tokens: (B, L), prompt and response.

    Returns:
        (B, L - 1), nats; entry t belongs to ``tokens[:, t + 1]``.

    Raises:
        ValueError: as :func:`token_logprobs`, or if there are fewer than two tokens.
    """
    require_ndim("tokens", tokens, "(B, L)")
    require_ndim("logits", logits, "(B, L, V)")
    if tokens.shape != logits.shape[:2] or tokens.shape[1] < 2:
        raise ValueError(f"tokens: got shape {tuple(tokens.shape)}, expected {tuple(logits.shape[:2])} with L >= 2")
    return token_logprobs(logits[:, :-1], tokens[:, 1:])


def sequence_logprobs(logprobs: Tensor, mask: Tensor) -> Tensor:
    """Log-probability of each response: the sum over its tokens, log pi(y | x) = sum_t log pi(y_t | x, y_<t).

    Args:
        logprobs: (B, T), nats.
        mask: (B, T), bool, True on the response's tokens; the end-of-sequence token counts, padding does not.

    Returns:
        (B,), nats. A row without any True gives 0 (the empty product is 1).

    Raises:
        ValueError: if shapes or dtypes are wrong.
    """
    require_ndim("logprobs", logprobs, "(B, T)")
    require_float(logprobs=logprobs)
    return masked_sum(logprobs, mask, dim=1)


def entropy(logits: Tensor) -> Tensor:
    """Entropy of each position's distribution: -sum_v p_v log p_v, p = softmax(logits), with 0 log 0 = 0.

    Args:
        logits: (B, T, V), or any shape with the vocabulary last; finite, or -inf for forbidden tokens.

    Returns:
        The shape without the last axis, nats, in [0, log V]. Value and gradient are finite for logits of
        plus or minus 1e4 and for logits of -inf.

    Raises:
        ValueError: if ``logits`` is not floating point or has no axis.
    """
    return _entropy(log_softmax(logits))


def _entropy(logprobs: Tensor) -> Tensor:
    finite = logprobs.clamp(min=-1e4)  # p is 0 there in any precision, and 0 log 0 is to be 0, with a gradient of 0
    return -(logprobs.exp() * finite).sum(-1)


def token_logprobs_and_entropy(
    logits: Tensor, tokens: Tensor, *, entropy_gradient: bool = True
) -> tuple[Tensor, Tensor]:
    """:func:`token_logprobs` and :func:`entropy` from one softmax, which is most of the work of both.

    Args:
        logits: (B, T, V), aligned with ``tokens``.
        tokens: (B, T), integers in [0, V).
        entropy_gradient: whether the entropy has a gradient; without a bonus for it, none is needed.

    Returns:
        Log-probabilities of the tokens and entropies of their distributions, (B, T) each, nats.

    Raises:
        ValueError: as :func:`token_logprobs`.
    """
    _require_tokens(logits, tokens)
    logprobs = log_softmax(logits)
    return _pick(logprobs, tokens), _entropy(logprobs if entropy_gradient else logprobs.detach())
