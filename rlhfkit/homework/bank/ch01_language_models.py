"""Chapter 1, language models as policies: seven questions, with the wrong answers that their checks must reject."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, tensor

from rlhfkit.homework.comparisons import (
    as_tensor,
    copies,
    describe,
    expect_close,
    expect_shape,
    gradient,
    gradient_or_none,
    in_two_steps,
    lines,
    normal,
    numbers,
    outcome,
    require,
    source,
)
from rlhfkit.homework.core import Question

# -- the dictionary --------------------------------------------------------------------------------------

ld = Question(
    id="lm_dictionary",
    title="a language model in the words of reinforcement learning",
    chapter=1,
    kind="find the false statements",
    theory=True,
    variable="false_statements",
    reference={2, 5, 6, 8},
    reference_source="false_statements = {2, 5, 6, 8}",
    accept=lines(9, "statement", "{1, 9}"),
    hints=(
        "Four of the nine are false. For 1 to 4 and 9, write down what the model sees just before it chooses token 3.",
        "What is added up along the residual stream? How many layers of weights does each model have? Which of two "
        "version numbers belongs to a piece of hardware, and which to software?",
        "State: the prompt and the tokens so far. Residual stream: a sum over layers. Hidden layer: weights, then a "
        "nonlinearity, then weights again. Compute capability: the chip's architecture.",
    ),
    explanation="2 is false: the state is the prompt and the tokens so far, so it grows with every token. 5 is false: "
    "the residual stream adds up the layers' contributions, position by position; batches do not meet. 6 is false: one "
    "linear map and a sigmoid are logistic regression, and a multi-layer perceptron has a hidden layer between two "
    "maps. 8 is false: the compute capability numbers the architecture of the chip (12.1 is sm_121), and any toolkit "
    "that knows that architecture will do. The others hold: appending a token is deterministic, and teacher forcing "
    "conditions on the given response.",
    probes=lambda answer: answer,
)


@ld.case(
    "at least two statements are named, and none of them is true",
    1,
    "for 1 to 4 and 9, write down a prompt of two tokens and a response of three",
)
def _(found: Any) -> None:
    for number in sorted(found - {2, 5, 6, 8}):
        require(False, f"statement {number} is true")
    require(len(found) > 1, "one false statement alone is not all")


@ld.case("all false statements are found, and only those", 2, "judge each statement on its own")
def _(found: Any) -> None:
    missing = len({2, 5, 6, 8} - found)
    require(not missing, f"{missing} of 4 false statements not found")
    extra = len(found - {2, 5, 6, 8})
    require(not extra, f"{extra} true {'statement' if extra == 1 else 'statements'} among them")


ld.plant(
    (
        "state-is-the-prompt",
        "statement 2 is false: the state is the prompt and the tokens so far",
        {5, 6, 8},
        "W-LM-1",
    ),
    (
        "sigmoid-is-a-hidden-layer",
        "statement 6 is false: one linear map and a sigmoid are logistic regression, without a hidden layer",
        {2, 5, 8},
        "W-LM-2",
    ),
    (
        "residual-over-batches",
        "statement 5 is false: the residual stream adds up layers, not batches",
        {2, 6, 8},
        "W-LM-7",
    ),
    (
        "capability-is-the-toolkit",
        "statement 8 is false: the compute capability is the chip's architecture, not a version of the toolkit",
        {2, 5, 6},
        "W-LM-9",
    ),
    (
        "state-exchanged",
        "statements 1 and 2 exclude each other, and 1 is the true one",
        {1, 5, 6, 8},
        "W-LM-1",
    ),
    ("policy-is-not-the-model", "statement 3 is true: the model is the policy", {2, 3, 5, 6, 8}, "common"),
    (
        "random-transition",
        "statement 4 is true: the choice of the token is random, what follows from it is not",
        {2, 4, 5, 6, 8},
        "common",
    ),
    (
        "softmax-layer-is-deep",
        "statement 7 is true: with the features fixed, only one linear map is left",
        {2, 5, 6, 7, 8},
        "W-LM-2",
    ),
    (
        "own-tokens-in-imitation",
        "statement 9 is true: the given response is fed in, whatever the model would have written",
        {2, 5, 6, 8, 9},
        "W-LM-5",
    ),
)
ld.right("a list", [8, 6, 5, 2])
ld.right("numpy integers", np.array([2, 5, 6, 8]))


# -- the gradient of a softmax layer ---------------------------------------------------------------------


def unembedding_gradient(weight, hidden, token):  # type: ignore[no-untyped-def]
    """Gradient of log softmax(weight @ hidden)[token] in weight. (V, C), (C,), int -> (V, C)."""
    error = -(weight @ hidden).softmax(0)
    error[token] += 1
    return torch.outer(error, hidden)


_BIG = (tensor([[3.0, 1.0], [2.0, 0.0], [-1.0, 1.0]]), tensor([300.0, 0.0]))  # logits (900, 600, -300)
_BIG_GRADIENTS = {1: tensor([[-300.0, 0.0], [300.0, 0.0], [0.0, 0.0]]), 2: tensor([[-300.0, 0], [0, 0], [300.0, 0]])}


def _unembed_probe(f: Any) -> list[Any]:
    kept = normal(4, 3, seed=1)
    return [
        f(kept, normal(3, seed=2), 2),
        float(kept.requires_grad),
        f(normal(3, 3, seed=3), tensor([0.2, -1.0, 0.4]), 0),
    ]


def _unembed_unusual(f: Any) -> list[str]:
    words = [outcome(want, f, *_BIG, token) for token, want in _BIG_GRADIENTS.items()]
    apart = tensor([[-200.0], [200.0]])  # logits (0, -200) up to a shift, without overflow
    return [*words, outcome(apart, f, tensor([[0.0], [-1.0]]), tensor([200.0]), 1)]


ug = Question(
    id="unembed_grad",
    title="the gradient of log pi(y) in the unembedding matrix",
    chapter=1,
    kind="symbolic",
    theory=True,
    variable="unembedding_gradient",
    reference=unembedding_gradient,
    reference_source=source(unembedding_gradient),
    hints=(
        "Chain rule: first the gradient of log softmax(logits)[y] in the logits, then logits = W h.",
        "The gradient in the logits is 1_y - p, p = softmax(W h). Entry (v, c) of W enters logit v with factor h_c.",
        "The outer product (1_y - p) h^T: row v is (1[v = y] - p_v) h.",
    ),
    explanation="log pi(y) = s_y - log sum exp s with s = W h. Its gradient in s is 1_y - p, and d s_v / d W_vc = h_c, "
    "so the gradient in W is (1_y - p) h^T. It is ascended. p - 1_y belongs to the loss -log pi(y), which is descended: "
    "going up along it lowers log pi(y).",
    probes=in_two_steps(_unembed_probe, _unembed_unusual, unembedding_gradient),
)


@ug.case("a small step up along it raises log pi(y)", 1, "you go up, so log pi(y) must go up")
def _(f: Any) -> None:
    for seed in (1, 2):
        weight, hidden = normal(5, 3, seed=seed), tensor([0.5, -1.0, 2.0])
        step = as_tensor(f(weight.clone(), hidden.clone(), 3), "gradient")
        expect_shape(step, (5, 3), "gradient")
        before = (weight @ hidden).double().log_softmax(0)[3].item()
        after = ((weight + 0.01 * step) @ hidden.double()).log_softmax(0)[3].item()
        require(after > before + 1e-6, f"log pi(y) went from {before:.5f} to {after:.5f} after a step of 0.01 along it")


@ug.case("its rows sum to 0: the same shift of all logits changes nothing", 1, "softmax(s + c) = softmax(s)")
def _(f: Any) -> None:
    weight = normal(4, 3, seed=4)
    got = as_tensor(f(weight, normal(3, seed=5), 1), "gradient")
    expect_shape(got, (4, 3), "gradient")
    require(not weight.requires_grad, "your function switched on requires_grad of a tensor that it was given")
    require(got.abs().max() > 1e-3, "the gradient is 0 everywhere")
    expect_close(got.sum(0), torch.zeros(3), "sum of the rows")


@ug.case("equals autograd, for every token", 2, "what is the gradient in the logits, and how does W enter them?")
def _(f: Any) -> None:
    for token in range(4):
        weight, hidden = normal(4, 3, seed=6).requires_grad_(), normal(3, seed=7)
        (want,) = torch.autograd.grad((weight @ hidden).log_softmax(0)[token], weight)
        expect_close(f(weight.detach().clone(), hidden.clone(), token), want, f"gradient for token {token}")
    for token, want in _BIG_GRADIENTS.items():
        got = f(*copies(_BIG), token)
        expect_close(got, want, f"gradient for token {token} at logits (900, 600, -300)")


def _error(weight: Tensor, hidden: Tensor, token: int) -> Tensor:
    return torch.eye(len(weight))[token] - (weight @ hidden).softmax(0)


def _by_log_of_softmax(weight: Tensor, hidden: Tensor, token: int) -> Tensor:
    w = weight.detach().clone().requires_grad_()
    return torch.autograd.grad((w @ hidden).softmax(0)[token].log(), w)[0]


def _own_slopes(weight: Tensor, hidden: Tensor, token: int) -> Tensor:
    p, one = (weight @ hidden).softmax(0), torch.eye(len(weight))[token]
    return torch.outer(one * (1 - p) - (1 - one) * p * (1 - p), hidden)


ug.plant(
    (
        "descent",
        "p - 1_y is the gradient of the loss: going up along it lowers log pi(y)",
        lambda w, h, y: -torch.outer(_error(w, h, y), h),
        "W-LM-3",
    ),
    (
        "one-hot",
        "the normaliser is missing: -p h^T pushes the other tokens down",
        lambda w, h, y: torch.outer(torch.eye(len(w))[y], h),
        "common",
    ),
    (
        "gradient-of-pi",
        "this is the gradient of pi(y), not of log pi(y)",
        lambda w, h, y: (w @ h).softmax(0)[y] * torch.outer(_error(w, h, y), h),
        "common",
    ),
    (
        "only-the-row-of-y",
        "the rows of the other tokens have a gradient too: they are in the normaliser",
        lambda w, h, y: torch.outer(torch.eye(len(w))[y] * _error(w, h, y), h),
        "common",
    ),
    (
        "uniform",
        "you subtracted 1/V; the model's own probabilities belong there",
        lambda w, h, y: torch.outer(torch.eye(len(w))[y] - 1 / len(w), h),
        "common",
    ),
    (
        "hidden-forgotten",
        "this is the gradient in the logits, repeated: the hidden state is missing",
        lambda w, h, y: _error(w, h, y)[:, None].expand_as(w),
        "common",
    ),
    (
        "times-the-matrix",
        "d logits / d W is the hidden state; you multiplied by W as if the gradient in h were wanted",
        lambda w, h, y: _error(w, h, y)[:, None] * w,
        "common",
    ),
    (
        "transposed",
        "the two factors are exchanged: the gradient has the shape of W, tokens in the rows",
        lambda w, h, y: torch.outer(h, _error(w, h, y)),
        "common",
    ),
    (
        "sigmoid-per-token",
        "each logit went through its own sigmoid, as in logistic regression: here the tokens share one softmax",
        lambda w, h, y: torch.outer(torch.eye(len(w))[y] - (w @ h).sigmoid(), h),
        "W-LM-2",
    ),
    (
        "softmax-by-hand",
        "exp(logits) overflows at large logits: use softmax",
        lambda w, h, y: torch.outer(torch.eye(len(w))[y] - (w @ h).exp() / (w @ h).exp().sum(), h),
        "common",
    ),
    (
        "input-changed",
        "requires_grad_() changes the tensor that was given: take a detached copy first",
        lambda w, h, y: torch.autograd.grad((w.requires_grad_() @ h).log_softmax(0)[y], w)[0],
        "common",
    ),
    (
        "own-slope-off-the-diagonal",
        "the rows of the other tokens are -p_v h: the normaliser gives p_v, not p_v (1 - p_v)",
        _own_slopes,
        "common",
    ),
    (
        "log-of-softmax",
        "the gradient of log(softmax) is nan where a probability underflows: use log_softmax, or 1_y - p",
        lambda w, h, y: _by_log_of_softmax(w, h, y),
        "common",
    ),
    (
        "log-of-softmax-in-float64",
        "float64 only moves the underflow of log(softmax) further out: use log_softmax, or 1_y - p",
        lambda w, h, y: _by_log_of_softmax(w.double(), h.double(), y),
        "common",
    ),
)


def _unembed_by_autograd(weight: Tensor, hidden: Tensor, token: int) -> Tensor:
    w = weight.detach().double().requires_grad_()
    return torch.autograd.grad((w @ hidden.double()).log_softmax(0)[token], w)[0]


def _unembed_by_numpy(weight: Tensor, hidden: Tensor, token: int) -> Any:
    s = weight.numpy() @ hidden.numpy()
    p = np.exp(s - s.max()) / np.exp(s - s.max()).sum()
    return [[((v == token) - p[v]) * h for h in hidden.tolist()] for v in range(len(p))]


ug.right("autograd, float64", _unembed_by_autograd)
ug.right("numpy and loops", _unembed_by_numpy)


# -- the log-probability of a response -------------------------------------------------------------------


def sequence_logprob(logits, tokens, response_mask):  # type: ignore[no-untyped-def]
    """Sum over the response of log pi(token | tokens before it). (B, L, V), (B, L), (B, L) -> (B,)."""
    logprobs = logits[:, :-1].log_softmax(-1)
    taken = logprobs.gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return torch.where(response_mask[:, 1:], taken, torch.zeros_like(taken)).sum(1)


_MASK = tensor(
    [
        [False, False, True, True, True, True],
        [False, False, False, True, True, False],
        [False, False, True] + [False] * 3,
    ]
)
_TOKENS = tensor([[2, 3, 1, 0, 2, 1], [0, 2, 3, 2, 1, 0], [3, 2, 1, 0, 0, 0]])


def _sequence_probe(f: Any) -> list[Any]:
    out: list[Any] = []
    for seed, tokens, mask in [(1, _TOKENS, _MASK), (2, _TOKENS[:2, 1:], _MASK[:2, 1:])]:
        logits = normal(*tokens.shape, 4, seed=seed).requires_grad_()
        value = f(logits, tokens.clone(), mask.clone())
        out += [value, gradient_or_none(value, logits)]
    return out


def _sequence_unusual(f: Any) -> list[Any]:
    unlikely = outcome(tensor([-900.0]), f, *_UNLIKELY) == "not finite"  # a clamp is known by the next one
    return [outcome(_LONG_ANSWER, f, *_LONG), float(unlikely), outcome(tensor([-3000 - math.log(2)]), f, *_FAR)]


_LONG = (torch.zeros(1, 121, 2000), torch.full((1, 121), 7), tensor([[False] + [True] * 120]))
_LONG_ANSWER = tensor([-120 * math.log(2000)])
_UNLIKELY = (tensor([[[0.0, -900.0]] * 3]), tensor([[0, 1, 0]]), tensor([[False, True, True]]))
_FAR = (tensor([[[-2000.0, -5000.0], [4000.0, 4000.0], [0.0, 0.0]]]), *_UNLIKELY[1:])

sl = Question(
    id="sequence_logprob",
    title="the log-probability of a response",
    chapter=1,
    kind="function",
    theory=False,
    variable="sequence_logprob",
    reference=sequence_logprob,
    reference_source=source(sequence_logprob),
    hints=(
        "Which position's logits predict tokens[:, 3]? And which entry of the mask belongs to that prediction?",
        "Logits at position t predict token t + 1: drop the last logits, the first token and the first mask entry. The "
        "probability of a response is a product over its tokens.",
        "log pi(y | x) = sum over t with response_mask[:, t] of log softmax(logits[:, t - 1])[tokens[:, t]].",
    ),
    explanation="The logits at position t are the distribution of token t + 1, so logits[:, :-1] meet tokens[:, 1:] and "
    "response_mask[:, 1:]. The chain rule of probability multiplies the conditional probabilities, so the logarithms "
    "are summed, not averaged. The prompt is given, so its tokens do not count; the end-of-sequence token was chosen by "
    "the policy, so it does; padding was chosen by nobody.",
    probes=in_two_steps(_sequence_probe, _sequence_unusual, sequence_logprob),
)


def _branching(prefix: tuple[int, ...], size: int) -> Tensor:
    """Logits of the next token after a prefix: another distribution for each prefix."""
    return normal(size, seed=100 + sum((token + 1) * 7**i for i, token in enumerate(prefix)))


def _all_responses(prompt: tuple[int, ...], length: int, size: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, tokens and mask of every response of at most ``length`` tokens; 1 ends one, 0 pads on the right."""
    rows, masks = [], []
    for y in itertools.product(range(1, size + 1), repeat=length):
        end = y.index(1) + 1 if 1 in y else length
        if all(token == 1 for token in y[end:]):
            rows.append((*prompt, *y[:end], *[0] * (length - end)))
            masks.append([len(prompt) <= t < len(prompt) + end for t in range(len(prompt) + length)])
    logits = torch.stack([torch.stack([_branching(row[: t + 1], size) for t in range(len(row))]) for row in rows])
    never = torch.full((*logits.shape[:2], 1), -30.0)  # the policy never chooses padding
    return torch.cat([never, logits], -1), tensor(rows), tensor(masks)


@sl.case(
    "the worked example; finite for long and for unlikely responses", 1, "sum of log_softmax, one position earlier"
)
def _(f: Any) -> None:
    table = tensor([[[0.5, 0.3, 0.2], [0.1, 0.8, 0.1], [0.2, 0.2, 0.6]]]).log()
    got = f(table, tensor([[2, 0, 1]]), tensor([[False, True, True]]))
    expect_close(got, tensor([math.log(0.5 * 0.8)]), "log-probability of the response (0, 1) to the prompt (2)")
    expect_close(f(*copies(_LONG)), _LONG_ANSWER, "a response of 120 tokens, each with probability 1/2000")
    expect_close(f(*copies(_UNLIKELY)), tensor([-900.0]), "logits (0, -900), response (1, 0)")
    want = tensor([-3000 - math.log(2)])
    expect_close(f(*copies(_FAR)), want, "logits (-2000, -5000), then (4000, 4000), response (1, 0)")


@sl.case("the probabilities of all responses sum to 1", 2, "a product of conditional probabilities; the end counts too")
def _(f: Any) -> None:
    for prompt, length in (((2,), 1), ((2, 3), 3), ((0, 3, 2), 2)):
        logits, tokens, mask = _all_responses(prompt, length)
        got = as_tensor(f(logits, tokens, mask), "log-probabilities")
        expect_shape(got, (len(tokens),), "log-probabilities")
        expect_close(got.exp().sum(), 1.0, f"sum over all {len(tokens)} responses to the prompt {prompt}", rtol=1e-3)


@sl.case("prompt and padding count for nothing", 1, "change the logits there: what may not change?")
def _(f: Any) -> None:
    logits = normal(3, 6, 4, seed=4)
    other, predicts = logits.clone(), torch.cat([_MASK[:, 1:], tensor([[False]] * 3)], 1)
    other[~predicts] = normal(3, 6, 4, seed=5)[~predicts]
    first, second = (as_tensor(f(x, _TOKENS, _MASK), "log-probabilities") for x in (logits, other))
    expect_shape(first, (3,), "log-probabilities")
    for row, value in enumerate(first.tolist()):
        require(value < 0, f"row {row}: got {value:.4g}, expected a number below 0")
    expect_close(second, first, "with other logits at every position that predicts no response token")


@sl.case("the gradient in the logits is 1_y - p where a response token is predicted", 2, "0 everywhere else")
def _(f: Any) -> None:
    logits = normal(3, 6, 4, seed=6).requires_grad_()
    value = f(logits, _TOKENS, _MASK)
    got = gradient(value, logits, "gradient in the logits")
    want = torch.zeros(3, 6, 4)
    for b, t in _MASK.nonzero().tolist():
        want[b, t - 1] = -logits[b, t - 1].detach().softmax(0)
        want[b, t - 1, _TOKENS[b, t]] += 1
    for b, t in itertools.product(range(3), range(6)):
        expect_close(got[b, t], want[b, t], f"gradient in logits[{b}, {t}]")


def _sequence(
    *, shift: int = 1, mask_shift: int = 1, norm: bool = True, mean: bool = False, part: str = "response"
) -> Callable[..., Tensor]:
    def f(logits: Tensor, tokens: Tensor, response_mask: Tensor) -> Tensor:
        mask = response_mask.clone()
        if part == "all":
            mask[:, :] = True
        if part in ("prompt", "padding"):
            seen = mask.cumsum(1)
            mask |= (seen == 0) if part == "prompt" else seen > 0
        if part == "no-eos":
            mask &= mask.flip(1).cumsum(1).flip(1) > 1
        if part == "last":
            mask &= mask.flip(1).cumsum(1).flip(1) == 1
        table = logits.log_softmax(-1) if norm else logits
        n = tokens.shape[1]
        aligned = table if shift == 0 else table[:, : n - 1]
        taken = aligned.gather(-1, (tokens if shift == 0 else tokens[:, 1:])[..., None]).squeeze(-1)
        mask = mask if shift == 0 else (mask[:, 1:] if mask_shift else mask[:, :-1])
        total = (taken * mask).sum(1)
        return total / mask.sum(1).clamp(min=1) if mean else total

    return f


def _sequence_detached(logits: Tensor, tokens: Tensor, response_mask: Tensor) -> Tensor:
    return sequence_logprob(logits.detach(), tokens, response_mask)  # type: ignore[no-any-return]


def _sequence_batch(logits: Tensor, tokens: Tensor, response_mask: Tensor) -> Tensor:
    return sequence_logprob(logits, tokens, response_mask).sum().expand(len(tokens))  # type: ignore[no-any-return]


def _sequence_product(logits: Tensor, tokens: Tensor, response_mask: Tensor) -> Tensor:
    return sequence_logprob(logits, tokens, response_mask).exp()  # type: ignore[no-any-return]


def _minus_one_maximum(logits: Tensor) -> Tensor:
    x = logits - logits.max().detach()
    return x - x.exp().sum(-1, keepdim=True).log()


def _probabilities_taken(logits: Tensor, tokens: Tensor, response_mask: Tensor, dim: int = -1) -> Tensor:
    taken = logits[:, :-1].softmax(dim).gather(-1, tokens[:, 1:, None]).squeeze(-1)
    return torch.where(response_mask[:, 1:], taken, torch.ones_like(taken))


for _name, _says, _options, _source in [
    (
        "shift-missed",
        "the shift is missing: the logits at position t predict token t + 1, not token t",
        {"shift": 0},
        "W-LM-6",
    ),
    (
        "mask-not-shifted",
        "tokens and logits are shifted, the mask is not: it starts one token late and ends one late",
        {"mask_shift": 0},
        "W-LM-6",
    ),
    (
        "mean",
        "a mean over the tokens: the log of a product is a sum, so log pi(y | x) is the sum",
        {"mean": True},
        "W-LM-6",
    ),
    ("one-token", "the probability of one token is not that of the response", {"part": "last"}, "W-LM-6"),
    ("prompt-counted", "the prompt's tokens are counted too: they are given, not chosen", {"part": "prompt"}, "W-LM-6"),
    ("padding-counted", "padding after the response is counted", {"part": "padding"}, "common"),
    ("everything-counted", "the mask is ignored: prompt and padding are counted", {"part": "all"}, "common"),
    ("end-dropped", "the last token of the response is missing: ending is a choice too", {"part": "no-eos"}, "common"),
    ("no-softmax", "these are logits, not log-probabilities: the normaliser is missing", {"norm": False}, "common"),
]:
    sl.wrong(_name, _says, _sequence(**_options), _source)  # type: ignore[arg-type]
sl.plant(
    ("detached", "the value is right, but no gradient reaches the logits", _sequence_detached, "common"),
    ("batch-total", "every row got the sum over the whole batch", _sequence_batch, "common"),
    ("probability", "this is the probability; its logarithm is asked for", _sequence_product, "common"),
    (
        "log-of-the-product",
        "the product of many probabilities underflows: add their logarithms, from log_softmax",
        lambda x, y, m: _probabilities_taken(x, y, m).prod(1).log(),
        "common",
    ),
    (
        "log-of-softmax",
        "log(softmax) is -inf where a probability underflows: use log_softmax",
        lambda x, y, m: _probabilities_taken(x, y, m).log().sum(1),
        "common",
    ),
    (
        "probabilities-added",
        "you added probabilities; their logarithms are added",
        lambda x, y, m: (_probabilities_taken(x, y, m) * m[:, 1:]).sum(1),
        "W-LM-6",
    ),
    (
        "softmax-over-positions",
        "the softmax runs over the positions; it belongs to the vocabulary, the last dimension",
        lambda x, y, m: _probabilities_taken(x, y, m, dim=1).log().sum(1),
        "common",
    ),
    (
        "one-maximum-for-all",
        "you subtracted one maximum from all logits: a position far below it gives log(0); use log_softmax",
        lambda x, y, m: _sequence(norm=False)(_minus_one_maximum(x), y, m),
        "common",
    ),
    (
        "clipped",
        "a clamp, or a small number inside the log, cuts off log-probabilities: they may be any number below 0",
        lambda x, y, m: _sequence(norm=False)(x.log_softmax(-1).clamp(min=-1000), y, m),
        "common",
    ),
    ("loss", "the sign is reversed: this is the loss, -log pi(y | x)", lambda *x: -sequence_logprob(*x), "common"),
    (
        "one-number",
        "one number for the whole batch: one per row is asked for",
        lambda *x: sequence_logprob(*x).sum(),
        "common",
    ),
)


def _sequence_by_loop(logits: Tensor, tokens: Tensor, response_mask: Tensor) -> Tensor:
    rows = []
    for b in range(len(tokens)):
        total = logits.new_zeros(())
        for t in range(1, tokens.shape[1]):
            if response_mask[b, t]:
                total = total + logits[b, t - 1, tokens[b, t]] - logits[b, t - 1].logsumexp(0)
        rows.append(total)
    return torch.stack(rows)


def _sequence_by_cross_entropy(logits: Tensor, tokens: Tensor, response_mask: Tensor) -> Tensor:
    labels = tokens.masked_fill(~response_mask, -100)[:, 1:]
    each = torch.nn.functional.cross_entropy(logits[:, :-1].double().transpose(1, 2), labels, reduction="none")
    return -each.sum(1)


sl.right("a loop over tokens", _sequence_by_loop)
sl.right("cross_entropy with labels of -100, float64", _sequence_by_cross_entropy)


# -- entropy against temperature -------------------------------------------------------------------------


def entropy_at(logits, temperature):  # type: ignore[no-untyped-def]
    """Entropy in nats of softmax(logits / temperature). (V,), float -> number."""
    logprobs = (logits / temperature).log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum()


_L = [2.0, 1.0, 0.0, -1.0]
_TIED, _COLD = [40.0, 40.0, 0.0], [0.0, -1e-4, -5e-4]
_COLD_ENTROPY = torch.distributions.Categorical(logits=tensor([0.0, -1.0, -5.0]).double()).entropy()


def _entropy_probe(f: Any) -> list[Any]:
    return [
        f(tensor(_L), 0.5),
        f(normal(5, seed=1), 1.0),
        f(normal(5, seed=1), 3.0),
        f(tensor([40.0, 0.0]), 0.01),
        f(tensor([0.0, -2.0]), 0.01),
    ]


def _entropy_unusual(f: Any) -> list[str]:
    return [
        outcome(math.log(2), f, tensor(_TIED), 0.01),
        outcome(_COLD_ENTROPY, f, tensor(_COLD), 1e-4),
        outcome(math.log(2000), f, normal(2000, seed=4), 1e4),
    ]


se = Question(
    id="sampling_entropy",
    title="the entropy of sampling at a temperature",
    chapter=1,
    kind="symbolic",
    theory=True,
    variable="entropy_at",
    reference=entropy_at,
    reference_source=source(entropy_at),
    hints=(
        "What distribution are tokens drawn from at temperature T? Write it down before its entropy.",
        "p = softmax(logits / T). T = 1 leaves the model as it is; small T tends to the most likely token, large T to "
        "the uniform distribution.",
        "-sum_v p_v log p_v with p = softmax(logits / T), the natural logarithm, p both times.",
    ),
    explanation="Sampling at temperature T draws from softmax(logits / T). For logits (2, 1, 0, -1) the entropy is "
    "0.455 at T = 0.5, 0.948 at T = 1 and 1.245 at T = 2, and it tends to log 4 = 1.386 as T grows. T = 1 is the model "
    "itself: how random that is depends on the model. log_softmax keeps large logits / T finite.",
    probes=in_two_steps(_entropy_probe, _entropy_unusual, entropy_at),
)


@se.case("temperature 1 is the model itself", 1, "softmax(logits / 1)")
def _(f: Any) -> None:
    for logits in (tensor(_L), 2 * normal(5, seed=2)):
        want = torch.distributions.Categorical(logits=logits.double()).entropy()
        expect_close(f(logits.clone(), 1.0), want, "entropy at temperature 1", rtol=2e-3, atol=6e-4)


@se.case("between greedy and uniform: equals enumeration at 0.5 and 2", 2, "which distribution is sampled from?")
def _(f: Any) -> None:
    for logits, t in itertools.product((tensor(_L), normal(6, seed=3)), (0.5, 2.0)):
        weights = [math.exp(x / t) for x in logits.tolist()]
        p = [w / sum(weights) for w in weights]
        want = -sum(x * math.log(x) for x in p)
        expect_close(f(logits.clone(), t), want, f"entropy at temperature {t:g}", rtol=2e-3, atol=6e-4)


@se.case("the limits: 0 at low temperature, log V at high, finite on the way", 1, "use log_softmax")
def _(f: Any) -> None:
    expect_close(f(tensor([40.0, 10.0, 0.0]), 0.01), 0.0, "entropy at temperature 0.01, logits (40, 10, 0)")
    expect_close(f(tensor(_TIED), 0.01), math.log(2), "entropy at temperature 0.01, logits (40, 40, 0)", atol=6e-4)
    got = f(tensor(_COLD), 1e-4)
    expect_close(got, _COLD_ENTROPY, "entropy at temperature 0.0001, logits (0, -0.0001, -0.0005)", atol=6e-4)
    expect_close(f(tensor(_L), 1e4), math.log(4), "entropy at temperature 10000", rtol=2e-3)
    expect_close(f(normal(2000, seed=4), 1e4), math.log(2000), "entropy of 2000 tokens at temperature 10000", rtol=2e-3)


def _h(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum()


def _powers(logits: Tensor, t: float) -> Tensor:
    q = (logits.log_softmax(0) / t).exp()
    return _h(q)


def _drawn_but_model(logits: Tensor, t: float) -> Tensor:
    return -((logits / t).softmax(0) * logits.log_softmax(0)).sum()


def _h_without_nan(weights: Tensor) -> Tensor:
    p = weights / weights.sum()
    return -(p * p.log()).nansum()


def _h_of_likely(p: Tensor) -> Tensor:
    return _h(p[p > 1e-3])


def _overflowing(logits: Tensor, t: float) -> Tensor:
    e = (logits / t).exp()
    return _h(e / e.sum())


se.plant(
    (
        "uniform-at-1",
        "temperature 1 is the model's own distribution, not the uniform one",
        lambda x, t: math.log(len(x)) * min(t, 1.0),
        "W-LM-8",
    ),
    (
        "log-of-temperature",
        "you scaled the logits so that temperature 1 is uniform; softmax(logits / 1) is the model",
        lambda x, t: _h((x * max(1 / t - 1, 0.0)).softmax(0)),
        "W-LM-8",
    ),
    (
        "multiplied",
        "the logits are divided by the temperature, not multiplied",
        lambda x, t: _h((x * t).softmax(0)),
        "common",
    ),
    ("ignored", "the temperature plays no part", lambda x, t: _h(x.softmax(0)), "common"),
    ("scaled-entropy", "you scaled the entropy; the logits are scaled", lambda x, t: t * _h(x.softmax(0)), "common"),
    (
        "entropy-divided",
        "you divided the entropy; the logits are divided",
        lambda x, t: _h(x.softmax(0)) / t,
        "common",
    ),
    (
        "softmax-divided",
        "softmax(logits)/T does not sum to 1: divide the logits, before the softmax",
        lambda x, t: _h(x.softmax(0) / t),
        "common",
    ),
    (
        "probabilities-divided",
        "you divided probabilities by the temperature; the logits are divided",
        lambda x, t: _h((x.softmax(0) / t).softmax(0)),
        "common",
    ),
    ("not-normalised", "p^(1/T) does not sum to 1 before you divide by its sum", _powers, "common"),
    (
        "logs-of-the-model",
        "drawn at temperature T, but the logarithm is the model's: that is a cross-entropy",
        _drawn_but_model,
        "common",
    ),
    ("bits", "this is in bits: use the natural logarithm", lambda x, t: entropy_at(x, t) / math.log(2), "common"),
    ("sign", "the minus is missing: an entropy is not negative", lambda x, t: -entropy_at(x, t), "common"),
    (
        "zero-times-log-zero",
        "0 * log 0 gives nan in floating point once a probability underflows: use log_softmax",
        lambda x, t: -((x / t).softmax(0) * (x / t).softmax(0).log()).sum(),
        "common",
    ),
    (
        "overflow",
        "exp(logits / T) overflows at low temperature: use log_softmax",
        _overflowing,
        "common",
    ),
    (
        "overflow-hidden",
        "nansum leaves out the tokens whose exp(logits / T) overflows, the most likely ones: use log_softmax",
        lambda x, t: _h_without_nan((x / t).exp()),
        "common",
    ),
    (
        "temperature-kept-up",
        "you kept the temperature above a least value: every positive temperature is allowed",
        lambda x, t: entropy_at(x, max(t, 0.001)),
        "common",
    ),
    (
        "greedy-when-cold",
        "a low temperature is not greedy decoding: tokens with nearly equal logits stay nearly equally likely",
        lambda x, t: 0.0 if t < 0.05 else entropy_at(x, t),
        "common",
    ),
    (
        "tail-dropped",
        "you left out the unlikely tokens: many of them together make up much of the entropy",
        lambda x, t: _h_of_likely((x / t).softmax(0)),
        "common",
    ),
)
se.right("torch.distributions", lambda x, t: torch.distributions.Categorical(logits=x.double() / t).entropy())
se.right(
    "log-sum-exp minus the mean logit, a float",
    lambda x, t: float((x / t).logsumexp(0) - ((x / t).softmax(0) * x / t).sum()),
)


# -- what maximum likelihood minimises -------------------------------------------------------------------


def excess_nll(teacher, logits):  # type: ignore[no-untyped-def]
    """Expected negative log-likelihood of teacher's responses, above the least possible. (N,), (N,) -> scalar."""
    return (torch.special.xlogy(teacher, teacher) - teacher * logits.log_softmax(0)).sum()


def _excess_probe(f: Any) -> list[Any]:
    out: list[Any] = []
    for teacher, seed in [(tensor([0.7, 0.2, 0.1]), 1), (normal(4, seed=2).softmax(0), 3)]:
        logits = normal(len(teacher), seed=seed).requires_grad_()
        value = f(teacher, logits)
        out += [value, gradient_or_none(value, logits)]
    certain = as_tensor(f(tensor([1.0, 0.0]), tensor([0.3, -0.4])), "probe")
    return [*out, certain.isnan().double()]  # a guard such as 1e-8 changes no diagnosis


_NEVER = (tensor([0.0, 1.0, 0.0]), tensor([0.5, 0.3, 0.2]).log())
_NEXT_TO_NEVER = (tensor([0.0, 1.0, 0.0]), tensor([0.0, -80.0, 0.0]))  # pi(y) is 1e-35, no underflow


def _excess_unusual(f: Any) -> list[str]:
    return [outcome(-math.log(0.3), f, *_NEVER), outcome(80 + math.log(2), f, *_NEXT_TO_NEVER)]


mk = Question(
    id="mle_kl",
    title="which divergence maximum likelihood minimises",
    chapter=1,
    kind="symbolic",
    theory=True,
    variable="excess_nll",
    reference=excess_nll,
    reference_source=source(excess_nll),
    hints=(
        "Towards which policy does the expected negative log-likelihood fall, and what is its least value?",
        "The least value is the teacher's entropy, the limit as pi tends to teacher. Subtract it: a known divergence is left. "
        "Under which of the two distributions is its expectation?",
        "KL(teacher, pi) = sum_y teacher(y) (log teacher(y) - log pi(y)), with 0 log 0 = 0.",
    ),
    explanation="-E_teacher[log pi] = H(teacher) + KL(teacher, pi), and the entropy does not contain the policy. So "
    "imitation minimises KL(teacher, pi), which punishes a policy that gives little probability to what the teacher "
    "does. Its gradient in the logits is pi - teacher, minus E_teacher[grad log pi]. KL(pi, teacher) is another number "
    "with another gradient: that is the direction of the penalty in reinforcement learning.",
    probes=in_two_steps(_excess_probe, _excess_unusual, excess_nll),
)


@mk.case("expected negative log-likelihood minus the least possible", 1, "the least value is the teacher's entropy")
def _(f: Any) -> None:
    expect_close(
        f(tensor([0.7, 0.2, 0.1]), tensor([0.5, 0.3, 0.2]).log()),
        0.7 * math.log(1.4) + 0.2 * math.log(2 / 3) + 0.1 * math.log(0.5),
        "teacher (.7, .2, .1), pi (.5, .3, .2)",
    )
    for seed in (1, 2):
        teacher, logits = normal(4, seed=seed).softmax(0), normal(4, seed=seed + 5)
        nll = -(teacher * logits.log_softmax(0)).sum()
        least = torch.distributions.Categorical(teacher).entropy()
        expect_close(f(teacher, logits), nll - least, "teacher and policy on four responses", atol=3e-5)


@mk.case("0 where the policy equals the teacher, and only there", 1, "no policy is better than the teacher")
def _(f: Any) -> None:
    teacher = normal(4, seed=3).softmax(0)
    expect_close(f(teacher, teacher.log() + 3.0), 0.0, "at pi = teacher")
    for seed in (4, 5, 6):
        value = as_tensor(f(teacher, normal(4, seed=seed)), "value").item()
        require(value > 1e-4, f"at another policy: got {value:.4g}, which is not above 0")


@mk.case("its gradient in the logits is pi - teacher", 1, "the gradient of the expected loss, unchanged")
def _(f: Any) -> None:
    teacher, logits = normal(5, seed=7).softmax(0), normal(5, seed=8).requires_grad_()
    got = gradient(f(teacher, logits), logits, "gradient in the logits")
    expect_close(got, logits.detach().softmax(0) - teacher, "gradient in the logits")


@mk.case("finite where the teacher never gives a response", 1, "0 log 0 = 0; log pi(y) may be any number below 0")
def _(f: Any) -> None:
    got = f(*copies(_NEVER))
    expect_close(got, -math.log(0.3), "a teacher that always gives the second response")
    got = f(*copies(_NEXT_TO_NEVER))
    expect_close(got, 80 + math.log(2), "the same teacher, logits (0, -80, 0)")


def _reverse(q: Tensor, x: Tensor) -> Tensor:
    p = x.log_softmax(0)
    return (p.exp() * (p - q.log())).sum()


def _middle(q: Tensor, x: Tensor) -> Tensor:
    p = x.softmax(0)
    m = (p + q) / 2
    return (torch.special.xlogy(q, q / m) + torch.special.xlogy(p, p / m)).sum() / 2


def _forward_kl(q: Tensor, x: Tensor) -> Tensor:
    return excess_nll(q, x)  # type: ignore[no-any-return]


mk.plant(
    (
        "reverse",
        "this is KL(pi, teacher), with the expectation under the policy: the other direction",
        _reverse,
        "W-LM-4",
    ),
    (
        "symmetric",
        "this is the mean of both directions of KL; the teacher alone writes the responses",
        lambda q, x: (_forward_kl(q, x) + _reverse(q, x)) / 2,
        "W-LM-4",
    ),
    (
        "no-floor",
        "this is the loss itself; its least value, the teacher's entropy, is not 0",
        lambda q, x: -(q * x.log_softmax(0)).sum(),
        "common",
    ),
    (
        "entropy-added",
        "you added the teacher's entropy to the loss; the least value is subtracted",
        lambda q, x: -(q * x.log_softmax(0)).sum() - torch.special.xlogy(q, q).sum(),
        "common",
    ),
    (
        "kl-div-of-probabilities",
        "kl_div was given probabilities; its first argument is log-probabilities",
        lambda q, x: torch.nn.functional.kl_div(x.softmax(0), q, reduction="sum"),
        "common",
    ),
    (
        "own-entropy-subtracted",
        "you subtracted the policy's entropy; the least value is the teacher's",
        lambda q, x: -(q * x.log_softmax(0)).sum() + (x.softmax(0) * x.log_softmax(0)).sum(),
        "common",
    ),
    (
        "sign",
        "the sign is reversed: a loss above its least value is positive",
        lambda q, x: -_forward_kl(q, x),
        "common",
    ),
    (
        "mean-over-responses",
        "you took a mean over the listed responses on top of the teacher's probabilities",
        lambda q, x: _forward_kl(q, x) / len(q),
        "common",
    ),
    (
        "unweighted",
        "the teacher's probabilities are missing: every response has the same weight",
        lambda q, x: (q.log() - x.log_softmax(0)).mean(),
        "common",
    ),
    ("jensen-shannon", "this compares both with their average: another divergence", _middle, "common"),
    (
        "squared",
        "squared differences of probabilities are another loss (Brier), with another gradient",
        lambda q, x: (q - x.softmax(0)).square().sum(),
        "common",
    ),
    (
        "zero-times-log-zero",
        "0 * log 0 gives nan in floating point: take the limit 0 there",
        lambda q, x: (q * (q.log() - x.log_softmax(0))).sum(),
        "common",
    ),
    (
        "detached",
        "the value is right, but no gradient reaches the logits",
        lambda q, x: _forward_kl(q, x.detach()),
        "common",
    ),
    (
        "teachers-responses-only",
        "the softmax ran over the teacher's responses only: the policy gives the others probability too",
        lambda q, x: _forward_kl(q[q > 0], x[q > 0]),
        "common",
    ),
    (
        "log-pi-capped",
        "you capped log pi, with a clamp or a small number inside the log: an unlikely response costs more than that",
        lambda q, x: (torch.special.xlogy(q, q) - q * (x.softmax(0) + 1e-12).log()).sum(),
        "common",
    ),
)
mk.right("kl_div", lambda q, x: torch.nn.functional.kl_div(x.log_softmax(0), q, reduction="sum"))


def _excess_by_loop(teacher: Tensor, logits: Tensor) -> Any:
    logprobs = logits.double().log_softmax(0)
    return sum(q * (q.log() - logprobs[y]) for y, q in enumerate(teacher.double()) if q > 0)


def _excess_by_distributions(teacher: Tensor, logits: Tensor) -> Tensor:
    pi = torch.distributions.Categorical(logits=logits)
    return torch.distributions.kl_divergence(torch.distributions.Categorical(teacher), pi)


mk.right("a loop, float64", _excess_by_loop)
mk.right("torch.distributions", _excess_by_distributions)
mk.right("log of softmax", lambda q, x: (torch.special.xlogy(q, q) - q * x.softmax(0).log()).sum())


# -- one formula, four ways to learn ---------------------------------------------------------------------

_PI, _TEACHER, _REWARD = tensor([0.5, 0.3, 0.2]), tensor([0.2, 0.2, 0.6]), tensor([1.0, 2.0, 4.0])


def _weighted(sampler: Tensor, weights: Tensor) -> list[float]:
    """E_sampler[w(y) grad log pi(y)] in the logits, by enumeration."""
    rows = torch.eye(3).double() - _PI
    return [round(x, 4) for x in ((sampler * weights).double() @ rows).tolist()]


_SFT, _PG, _OWN = [-0.3, -0.1, 0.4], [-0.45, 0.03, 0.42], [0.0, 0.0, 0.0]
_WEIGHTED_TEACHER = [-1.3, -0.5, 1.8]
_ROWS = [_SFT, _PG, _OWN, _WEIGHTED_TEACHER]


def _table(answer: Any) -> Tensor:
    """Four rows of three numbers; text is named as what it is."""
    rows = answer if isinstance(answer, (list, tuple)) else []
    for i, row in enumerate(rows, 1):
        for entry in row if isinstance(row, (list, tuple)) else [row]:
            require(not isinstance(entry, str), f"row {i}: {describe(entry)} stands where a number is expected")
    return numbers(4, 3)(answer)


ir = Question(
    id="imitation_or_rl",
    title="imitation and reinforcement, one formula",
    chapter=1,
    kind="numbers",
    theory=True,
    variable="updates",
    reference=_ROWS,
    reference_source="updates = [[-0.3, -0.1, 0.4], [-0.45, 0.03, 0.42], [0.0, 0.0, 0.0], [-1.3, -0.5, 1.8]]",
    accept=_table,
    hints=(
        "All four are sum_y s(y) w(y) (1_y - pi). Who writes the responses, s, and with which weight, w?",
        "The score function is always the policy's: its gradient stays grad log pi. Only s and w change from row to row.",
        "Entry i is s(i) w(i) - pi(i) m, where m = sum_y s(y) w(y).",
    ),
    explanation="Entry i is s(i) w(i) - pi(i) sum s w. Row 1, the teacher with weight 1: teacher - pi. Row 2, the policy "
    "with weight r: pi (r - 1.9). Row 3, the policy with weight 1: E[grad log pi] = 0, so fine-tuning on unselected "
    "responses of its own teaches the policy nothing on average. Row 4, the teacher with weight r: neither of the two. "
    "So imitation and reinforcement differ in two places, who writes and with what weight.",
    probes=lambda x: x,
)


@ir.case("row 1: the teacher writes, weight 1 (imitation)", 1, "where is this gradient 0?")
def _(table: Any) -> None:
    require(bool((table[0] - table[1]).abs().max() > 1e-3), "rows 1 and 2 are the same: two samplers, two weights")
    expect_close(table[0], _weighted(_TEACHER, torch.ones(3)), "row 1", atol=6e-3, tell_expected=False)


@ir.case("row 2: the policy writes, weight r (policy gradient)", 1, "sum_y pi(y) r(y) (1_y - pi)")
def _(table: Any) -> None:
    expect_close(table[1], _weighted(_PI, _REWARD), "row 2", atol=6e-3, tell_expected=False)


@ir.case("row 3: the policy writes, weight 1", 1, "what is E[grad log pi]?")
def _(table: Any) -> None:
    require(bool(table[0].abs().max() > 1e-3), "row 1 is 0 as well, so row 3 shows nothing")
    expect_close(table[2], _weighted(_PI, torch.ones(3)), "row 3", atol=6e-3, tell_expected=False)


@ir.case("row 4: the teacher writes, weight r", 1, "neither of the first two: work it out")
def _(table: Any) -> None:
    expect_close(table[3], _weighted(_TEACHER, _REWARD), "row 4", atol=6e-3, tell_expected=False)


_LOG_RATIO = (_PI / _TEACHER).log()
_DOWN_THE_REVERSE = [round(x, 4) for x in (-_PI * (_LOG_RATIO - _PI @ _LOG_RATIO)).tolist()]


def _with(row: int, values: list[float]) -> list[list[float]]:
    return [values if i == row else kept for i, kept in enumerate(_ROWS)]


ir.plant(
    (
        "same-joint",
        "rows 1 and 4 are drawn from the policy: imitation sees the teacher's responses",
        [_OWN, _PG, _OWN, _PG],
        "W-LM-5",
    ),
    (
        "teacher-everywhere",
        "rows 2 and 3 are drawn from the teacher: reinforcement sees the policy's own responses",
        [_SFT, _WEIGHTED_TEACHER, _SFT, _WEIGHTED_TEACHER],
        "W-LM-5",
    ),
    (
        "weights-decide-alone",
        "row 4 is not the policy gradient: the weight is the reward, but the teacher writes",
        _with(3, _PG),
        "W-LM-5",
    ),
    (
        "own-samples-teach",
        "row 3 is 0: E[grad log pi] = 0, so a policy's own unselected responses teach nothing on average",
        _with(2, _SFT),
        "common",
    ),
    (
        "sign-of-imitation",
        "row 1 is p - 1_y on average, the gradient of the loss",
        _with(0, [0.3, 0.1, -0.4]),
        "W-LM-3",
    ),
    (
        "all-signs",
        "all signs are reversed: these are gradients of losses",
        [[-x if x else 0.0 for x in row] for row in _ROWS],
        "W-LM-3",
    ),
    (
        "reverse-kl",
        "row 1 is minus the gradient of KL(pi, teacher): imitation goes down KL(teacher, pi)",
        _with(0, _DOWN_THE_REVERSE),
        "W-LM-4",
    ),
    (
        "no-normaliser",
        "the normaliser of the softmax is missing: s w is not s w - pi sum s w",
        [[0.2, 0.2, 0.6], [0.5, 0.6, 0.8], [0.5, 0.3, 0.2], [0.2, 0.4, 2.4]],
        "common",
    ),
    (
        "no-normaliser-with-rewards",
        "rows 2 and 4 lack the normaliser of the softmax: subtract pi sum s w there too",
        [_SFT, [0.5, 0.6, 0.8], _OWN, [0.2, 0.4, 2.4]],
        "common",
    ),
    ("rows-2-and-4", "rows 2 and 4 are exchanged", [_SFT, _WEIGHTED_TEACHER, _OWN, _PG], "common"),
    ("rows-1-and-2", "rows 1 and 2 are exchanged", [_PG, _SFT, _OWN, _WEIGHTED_TEACHER], "common"),
    ("rows-1-and-3", "rows 1 and 3 are exchanged", [_OWN, _PG, _SFT, _WEIGHTED_TEACHER], "common"),
    (
        "teachers-score-function",
        "rows 1 and 4 use the teacher's score function 1_y - teacher; the policy is what is trained",
        [_OWN, _PG, _OWN, [-0.4, -0.2, 0.6]],
        "common",
    ),
    (
        "centred-twice",
        "row 4 is centred with the policy's mean reward 1.9 but without -pi: the two do not mix",
        _with(3, [-0.18, 0.02, 1.26]),
        "common",
    ),
)
ir.right("a tensor, rounded", tensor([[-0.3, -0.1, 0.4], [-0.45, 0.03, 0.42], [0, 0, 0], [-1.3, -0.5, 1.8]]))
ir.right("numpy", np.array([np.subtract([0.2, 0.2, 0.6], [0.5, 0.3, 0.2]), *_ROWS[1:]]))


# -- the distribution that is really sampled -------------------------------------------------------------


def truncate_logits(logits, temperature=1.0, top_k=None, top_p=None):  # type: ignore[no-untyped-def]
    """Logits of the distribution to draw from: temperature, then top-k, then top-p; the rest is -inf. (B, V)."""
    logits = logits / temperature
    if top_k is not None:
        edge = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < edge, -torch.inf)
    if top_p is not None and top_p < 1:
        kept, tokens = logits.sort(descending=True)
        before = kept.softmax(-1).cumsum(-1) - kept.softmax(-1)
        kept = kept.masked_fill(before >= top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter(-1, tokens, kept)
    return logits


def _drawn(result: Any, shape: tuple[int, ...]) -> Tensor:
    """The distribution that a learner's logits stand for."""
    logits = as_tensor(result, "logits")
    expect_shape(logits, shape, "logits")
    return logits.softmax(-1)


def _expect_cut(result: Any, want: Tensor, what: str) -> None:
    """The distribution is ``want``, and exactly what has probability 0 there has the logit -inf."""
    expect_close(_drawn(result, tuple(want.shape)), want, what)
    logits = as_tensor(result, "logits")
    finite = logits[(want == 0) & (logits != -torch.inf)]
    require(
        not len(finite), f"{what}: a token that was removed has the logit {finite.sum() / len(finite):.4g}, not -inf"
    )


def _cut_probe(f: Any) -> list[Any]:
    x, sharp = torch.stack([normal(6, seed=1), normal(6, seed=2).flip(0)]), tensor([[0.4, 0.3, 0.2, 0.1]]).log()
    calls: list[tuple[Tensor, dict[str, Any]]] = [
        (x, {"temperature": 0.5}),
        (x, {"top_k": 3}),
        (x, {"top_p": 0.6}),
        (x, {"temperature": 2.0, "top_p": 0.55}),
        (x, {"temperature": 1.7, "top_k": 4, "top_p": 0.7}),
        (x, {"top_p": 0.05}),
        (sharp, {"temperature": 0.5, "top_p": 0.5}),
        (sharp, {"top_k": 2, "top_p": 0.55}),
        (_LOW, {"top_k": 2}),
        (x, {"top_k": 1, "top_p": 0.9}),
        (_HIGH, {"temperature": 0.5, "top_p": 0.9}),
    ]
    out: list[Any] = []
    for logits, options in calls:
        result = as_tensor(f(logits.clone(), **options), "logits")
        out += [_drawn(result, tuple(logits.shape)), (result == -torch.inf).double()]
    for options in ({"top_p": 1.0}, {}):
        out.append(float((as_tensor(f(_STEEP.clone(), **options), "logits") == -torch.inf).any()))
    try:
        return [*out, _drawn(f(x.clone(), top_k=9), (2, 6))]
    except Exception:
        return [*out, "raised"]


_LOW, _STEEP = tensor([[-150.0, -151.0, -152.0]]), tensor([[0.0, -5.0, -20.0, -120.0]])
_HIGH = tensor([[1999.75, 0.0, 2000.0, 1999.0]])


tp = Question(
    id="top_p",
    title="the distribution that is really sampled from",
    chapter=1,
    kind="function",
    theory=False,
    variable="truncate_logits",
    reference=truncate_logits,
    reference_source=source(truncate_logits),
    hints=(
        "Do the three steps one after the other, each on the distribution that the step before has left.",
        "Top-p goes down the list, most likely first. A token stays if the tokens before it hold less than top_p.",
        "Divide by the temperature; all but the min(top_k, V) largest become -inf; then, if top_p is below 1, with probs = "
        "softmax of that, a token becomes -inf if the sum of all larger probabilities is at least top_p.",
    ),
    explanation="Each step works on what the step before has left: temperature scales the logits, top-k keeps the k "
    "largest, and top-p keeps the shortest list, most likely first, that holds at least top_p of what is left, the "
    "token that crosses the line included, so that at least one stays. A logit of -inf is a probability of 0, and the "
    "softmax renormalises; no finite number is low enough for that whatever the logits. At top_p 1 nothing is to be "
    "removed, but a cumulative sum rounded to 1 would remove the tail, hence the guard. The result differs from the model's distribution: log-probabilities for an update must say "
    "which of the two they mean.",
    probes=_cut_probe,
)


@tp.case("temperature divides the logits", 1, "without truncation it is softmax(logits / temperature)")
def _(f: Any) -> None:
    for t in (0.5, 1.0, 3.0):
        logits = normal(3, 5, seed=3)
        got = _drawn(f(logits, temperature=t), (3, 5))
        expect_close(got, (logits / t).softmax(-1), f"probabilities at temperature {t:g}")


@tp.case("top-k keeps the k most likely, the rest gets the logit -inf", 1, "-inf is the logit of probability 0")
def _(f: Any) -> None:
    logits = tensor([[0.3, 0.1, 0.2, 0.4], [0.1, 0.6, 0.05, 0.25]]).log()
    want = tensor([[3 / 7, 0.0, 0.0, 4 / 7], [0.0, 12 / 17, 0.0, 5 / 17]])
    _expect_cut(f(logits.clone(), top_k=2), want, "from (.3, .1, .2, .4) and (.1, .6, .05, .25), top_k 2")
    want = tensor([[0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]])
    _expect_cut(f(logits.clone(), top_k=1), want, "the same, top_k 1 (greedy)")
    _expect_cut(f(logits.clone(), top_k=9), logits.exp(), "the same, top_k 9, which is more than there are tokens")
    want = torch.cat([_LOW[:, :2].softmax(-1), tensor([[0.0]])], 1)
    _expect_cut(f(_LOW.clone(), top_k=2), want, "from the logits (-150, -151, -152), top_k 2")


@tp.case("top-p keeps the shortest list that holds top_p; 1 keeps all", 2, "the token that crosses the line stays")
def _(f: Any) -> None:
    rows = tensor([[0.3, 0.05, 0.15, 0.5], [0.08, 0.7, 0.12, 0.1]])
    for top_p, kept in (
        (0.6, [[0, 3], [1]]),
        (0.9, [[0, 2, 3], [1, 2, 3]]),
        (0.2, [[3], [1]]),
        (0.97, [[0, 1, 2, 3]] * 2),
    ):
        want = torch.zeros(2, 4)
        for b, tokens in enumerate(kept):
            want[b, tokens] = rows[b, tokens] / rows[b, tokens].sum()
        _expect_cut(
            f(rows.log(), top_p=top_p), want, f"from (.3, .05, .15, .5) and (.08, .7, .12, .1), top_p {top_p:g}"
        )
    result = as_tensor(f(_STEEP.clone(), top_p=1.0), "logits")
    expect_shape(result, (1, 4), "logits")
    removed = int((result == -torch.inf).sum())
    require(not removed, f"from the logits (0, -5, -20, -120), top_p 1: {removed} of 4 tokens removed, expected none")


@tp.case("in this order: temperature, top-k, top-p", 2, "top-p looks at what the steps before have left")
def _(f: Any) -> None:
    logits, first = tensor([[0.4, 0.3, 0.2, 0.1]]).log(), tensor([[1.0, 0.0, 0.0, 0.0]])
    expect_close(
        _drawn(f(logits.clone(), top_k=2, top_p=0.55), (1, 4)), first, "from (.4, .3, .2, .1), top_k 2, top_p .55"
    )
    expect_close(
        _drawn(f(logits.clone(), temperature=0.5, top_p=0.5), (1, 4)), first, "the same, temperature .5, top_p .5"
    )
    want = tensor([[16 / 29, 9 / 29, 4 / 29, 0.0]])
    result = f(logits.clone(), temperature=0.5, top_k=3, top_p=0.9)
    expect_close(_drawn(result, (1, 4)), want, "the same, temperature .5, top_k 3, top_p .9")
    want = tensor([[-0.5, -torch.inf, 0.0, -torch.inf]]).softmax(-1)
    result = f(_HIGH.clone(), temperature=0.5, top_p=0.9)
    _expect_cut(result, want, "from the logits (1999.75, 0, 2000, 1999), temperature .5, top_p .9")


def _cut(
    *,
    divide: bool | None = True,
    order: str = "kp",
    late: bool = False,
    crossing: str = "in",
    ascending: bool = False,
    unsorted: bool = False,
    scatter: bool = True,
    gather: bool = False,
    clamp: bool = True,
    guard: bool = True,
    removed: float = -torch.inf,
    least: bool = False,
    first_row: bool = False,
    by_hand: bool = False,
) -> Callable[..., Tensor]:
    def nucleus(logits: Tensor, top_p: float) -> Tensor:
        kept, tokens = logits.sort(descending=not ascending)
        if unsorted:
            kept, tokens = logits, torch.arange(logits.shape[-1]).expand_as(logits)
        probs = kept.exp() / kept.exp().sum(-1, keepdim=True) if by_hand else kept.softmax(-1)
        drop = probs.cumsum(-1) > top_p if crossing in ("out", "all-out") else probs.cumsum(-1) - probs >= top_p
        if crossing == "out":
            drop[:, 0] &= (~drop).any(-1)  # something must stay
        if crossing == "next":
            drop = torch.cat([drop[:, :1], drop[:, :-1]], 1)
        kept = kept.masked_fill(drop, removed)
        if gather:
            return kept.gather(-1, tokens)
        return torch.empty_like(logits).scatter(-1, tokens, kept) if scatter else kept

    def largest(logits: Tensor, top_k: int) -> Tensor:
        size = min(top_k, logits.shape[-1]) if clamp else top_k
        edge = logits.topk(size, largest=not least).values[:, -1:]
        return logits.masked_fill(logits > edge if least else logits < edge, removed)

    def f(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Tensor:
        x = logits if late or divide is None else logits / temperature if divide else logits * temperature
        for step in order:
            before = x
            if step == "k" and top_k is not None:
                x = largest(x, top_k)
            if step == "p" and top_p is not None and (top_p < 1 or not guard):
                x = nucleus(x, top_p)
            if first_row:
                x = torch.where(x[:1] == -torch.inf, -torch.inf, before)
        return x / temperature if late else x

    return f


def _cut_threshold(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    x: Tensor = truncate_logits(logits, temperature, top_k)
    if top_p is not None:
        x = x.masked_fill(x.softmax(-1) < (1 - top_p) * x.softmax(-1).amax(-1, True), -torch.inf)
    return x


def _cut_min_p(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    x: Tensor = truncate_logits(logits, temperature, top_k)
    if top_p is not None and top_p < 1:
        x = x.masked_fill(x.softmax(-1) < top_p * x.softmax(-1).amax(-1, True), -torch.inf)
    return x


def _cut_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    return truncate_logits(logits, temperature, top_k, top_p).softmax(-1)  # type: ignore[no-any-return]


def _cut_k_lost(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    return truncate_logits(logits, temperature, None if top_p else top_k, top_p)  # type: ignore[no-any-return]


for _name, _says, _answer in [
    ("multiplied", "the logits are divided by the temperature, not multiplied", _cut(divide=False)),
    ("temperature-last", "the temperature comes first: it changes what top-p keeps", _cut(late=True)),
    ("top-p-first", "top-p came before top-k: it must look at what top-k has left", _cut(order="pk")),
    (
        "crossing-dropped",
        "the token that crosses the line is dropped: the list holds less than top_p",
        _cut(crossing="out"),
    ),
    ("one-too-many", "one token too many is kept after the line is crossed", _cut(crossing="next")),
    ("least-likely", "the list starts at the least likely token", _cut(ascending=True)),
    ("not-sorted", "the cumulative sum runs in the order of the vocabulary; sort first", _cut(unsorted=True)),
    ("left-sorted", "the logits come back sorted, no longer in the order of the vocabulary", _cut(scatter=False)),
    ("logit-zero", "a logit of 0 is not a probability of 0: what is removed gets -inf", _cut(removed=0.0)),
    ("smallest-k", "the k least likely tokens were kept", _cut(least=True)),
    ("first-row-for-all", "the tokens kept for the first row are kept for all rows", _cut(first_row=True)),
    (
        "threshold",
        "what is less likely than 1 - top_p of the largest probability was removed: another rule",
        _cut_threshold,
    ),
    ("min-p", "a threshold of top_p times the largest probability is another rule (min-p)", _cut_min_p),
    ("temperature-ignored", "the temperature plays no part", _cut(divide=None)),
    (
        "none-left",
        "a most likely token that holds more than top_p is dropped too, and none is left: one always stays",
        _cut(crossing="all-out"),
    ),
    (
        "gathered",
        "the order of the vocabulary comes back with scatter (or gather by the inverse order), not with gather",
        _cut(gather=True),
    ),
    (
        "minus-100",
        "-100 is no probability of 0: logits that stay may be lower; what is removed gets -inf",
        _cut(removed=-100.0),
    ),
    ("minus-1e9", "a large negative number is not -inf: what is removed gets -inf", _cut(removed=-1e9)),
    (
        "k-above-V",
        "top_k may be more than there are tokens: then all of them stay",
        _cut(clamp=False),
    ),
    (
        "rounded-to-1",
        "at top_p 1 the cumulative sum is rounded to 1 before its end, which removes tokens: all stay",
        _cut(guard=False),
    ),
    ("probabilities", "these are probabilities: the result must be logits, softmax comes later", _cut_probabilities),
    ("top-k-lost", "top_k is ignored as soon as top_p is given: both apply, top-k first", _cut_k_lost),
    (
        "softmax-by-hand",
        "exp(logits) overflows, for instance after division by a low temperature: use softmax",
        _cut(by_hand=True),
    ),
    (
        "log-of-probabilities",
        "log(softmax) turns a token that stays into -inf once its probability underflows: keep its logit",
        lambda *args, **options: _cut_probabilities(*args, **options).log(),
    ),
]:
    tp.wrong(_name, _says, _answer)


def _cut_by_hand(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> list[list[float]]:
    table = []
    for row in logits.tolist():
        weights = {v: math.exp((x - max(row)) / temperature) for v, x in enumerate(row)}
        ranked = sorted(weights, key=lambda v: -weights[v])[: top_k or len(weights)]
        total, held, kept = sum(weights[v] for v in ranked), 0.0, set()
        for v in ranked:
            if top_p in (None, 1) or held < top_p * total:
                kept.add(v)
                held += weights[v]
        table.append([x / temperature if v in kept else -math.inf for v, x in enumerate(row)])
    return table


def _cut_as_warper(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    x = logits.double() / temperature
    if top_k is not None:
        x = x.masked_fill(x < x.topk(min(top_k, x.shape[-1])).values.amin(-1, True), -torch.inf)
    if top_p is not None:
        ordered, tokens = x.sort()
        drop = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
        drop[:, -1] = False
        x = x.masked_fill(torch.zeros_like(drop).scatter(-1, tokens, drop), -torch.inf)
    return x


def _cut_by_ranks(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    x, out = logits / temperature, torch.full_like(logits, -torch.inf)
    for b, row in enumerate(x):
        tokens = row.argsort(descending=True)[:top_k]
        if top_p is not None and top_p < 1:
            weights = (row[tokens] - row[tokens[0]]).exp()
            tokens = tokens[: int((weights.cumsum(0) < top_p * weights.sum()).sum()) + 1]
        out[b, tokens] = row[tokens]
    return out


tp.right("python lists", _cut_by_hand)
tp.right("from the least likely up, float64", _cut_as_warper)
tp.right("ranks and a shifted softmax", _cut_by_ranks)
tp.right(
    "log-probabilities",
    lambda x, temperature=1.0, top_k=None, top_p=None: truncate_logits(x, temperature, top_k, top_p).log_softmax(-1),
)

CHAPTER: Sequence[Question] = (ld, ug, sl, se, mk, ir, tp)
