"""Log-probabilities of tokens and responses, and entropy, against 80-digit arithmetic and full enumeration."""

import itertools
import math

import mpmath
import pytest
import torch

from planting import DTYPES, close, edited, exact_logprobs, f64, gradients, ignores_padding, leaf, masks, normal, raises
from rlhfkit.logprobs import (
    entropy,
    log_softmax,
    next_token_logprobs,
    sequence_logprobs,
    token_logprobs,
    token_logprobs_and_entropy,
)
from rlhfkit.masked import masked_sum

pytestmark = pytest.mark.usefixtures("device")

INF = float("inf")
# one row per position; every number is exact in single precision
EXTREME = [
    [0.0, 1.0, -2.0, 0.5],
    [1e4, 9999.0, 9999.5, 9998.0],
    [1e4, -1e4, 0.0, 1.0],
    [-1e4, -1e4, -1e4, -10002.0],
    [-INF, 3.0, 2.0, -INF],
    [-INF, -INF, 7.0, -INF],
    [80.0, 0.0, -80.0, 20.0],
]


def test_log_softmax_agrees_with_torch_on_axes_of_every_length(log_softmax=log_softmax):
    """The short ones go another way; the sums may be rounded in another order."""
    for dtype, vocab_size in itertools.product(DTYPES, (1, 2, 3, 5, 6, 7, 8, 9, 12, 40)):
        for shape in ((), (1,), (33,), (2, 3), (0, 3)):
            logits = 5 * normal(*shape, vocab_size, dtype=dtype)
            logits[..., 1:] = torch.where(logits[..., 1:] < -5, -INF, logits[..., 1:])  # some tokens are forbidden
            precise = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 16 * torch.finfo(dtype).eps}
            close(log_softmax(logits), logits.log_softmax(-1), **precise)
            (slope,) = gradients(log_softmax, logits)
            (expected,) = gradients(lambda x: x.log_softmax(-1), logits)
            close(slope, expected, **precise)


def test_log_softmax_agrees_with_80_digits_on_extreme_logits(log_softmax=log_softmax):
    for dtype in DTYPES:
        got = log_softmax(torch.tensor(EXTREME, dtype=dtype))
        expected = [[float(x) for x in exact_logprobs(row)] for row in torch.tensor(EXTREME, dtype=dtype)]
        close(got, got.new_tensor(expected), rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    assert log_softmax(f64([0.0, float("nan")])).isnan().all()


def test_token_logprobs_gathers_each_position_from_its_own_logits(token_logprobs=token_logprobs):
    probabilities = f64([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]], [[0.3, 0.3, 0.4], [0.6, 0.3, 0.1]]])
    tokens = torch.tensor([[0, 2], [1, 1]])
    close(token_logprobs(probabilities.log() + 5, tokens), f64([[0.5, 0.7], [0.3, 0.3]]).log())


def test_token_logprobs_agree_with_80_digits_on_extreme_logits(token_logprobs=token_logprobs):
    for dtype in DTYPES:
        logits = torch.tensor(EXTREME, dtype=dtype).unsqueeze(0)
        for token in range(4):
            expected = [float(exact_logprobs(row)[token]) for row in logits[0]]
            got = token_logprobs(logits, torch.full((1, len(EXTREME)), token))
            close(got, logits.new_tensor([expected]), rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_token_logprobs_have_the_gradient_onehot_minus_softmax(token_logprobs=token_logprobs):
    for dtype in DTYPES:
        logits = leaf(torch.tensor(EXTREME, dtype=dtype).unsqueeze(0))
        tokens = torch.tensor([[0, 1, 2, 3, 1, 2, 0]])
        (slope,) = torch.autograd.grad(token_logprobs(logits, tokens).sum(), logits)
        p = [[float(mpmath.exp(v)) for v in exact_logprobs(row)] for row in logits.detach()[0]]
        close(slope, torch.nn.functional.one_hot(tokens, 4).to(dtype) - logits.new_tensor([p]))


def test_token_logprobs_pass_nan_and_forbidden_tokens_through(token_logprobs=token_logprobs):
    logits = f64([[[0.0, float("nan")], [0.0, -INF]]])
    got = token_logprobs(logits, torch.tensor([[0, 1]]))
    assert got[0, 0].isnan() and got[0, 1] == -INF


def test_token_logprobs_refuse_a_padding_id_outside_the_vocabulary(token_logprobs=token_logprobs):
    for token in (-100, -1, 3):
        raises(
            ValueError, lambda t=token: token_logprobs(normal(1, 2, 3), torch.tensor([[0, t]])), "tokens", str(token)
        )


def test_next_token_logprobs_of_a_markov_chain_are_its_transition_probabilities(
    next_token_logprobs=next_token_logprobs,
):
    """And over all continuations of a first token they sum to 1."""
    chain = f64([[0.1, 0.9, 0.0], [0.3, 0.3, 0.4], [0.2, 0.5, 0.3]])
    tokens = torch.tensor([[0, *rest] for rest in itertools.product(range(3), repeat=3)])
    got = next_token_logprobs(chain.log()[tokens], tokens)
    assert got.shape == (27, 3)
    for row, sequence in zip(got.tolist(), tokens.tolist(), strict=True):
        for value, (before, after) in zip(row, itertools.pairwise(sequence), strict=True):
            assert math.isclose(math.exp(value), chain[before, after].item(), rel_tol=1e-12, abs_tol=1e-300)
    close(got.sum(1).exp().sum(), f64(1.0))


def test_next_token_logprobs_need_two_tokens(next_token_logprobs=next_token_logprobs):
    raises(ValueError, lambda: next_token_logprobs(normal(1, 1, 3), torch.tensor([[0]])), "tokens", "(1, 1)")


def test_next_token_logprobs_do_not_look_at_the_last_logits(next_token_logprobs=next_token_logprobs):
    logits, tokens = normal(2, 3, 4), torch.tensor([[0, 1, 2], [3, 2, 1]])
    changed = torch.cat([logits[:, :-1], torch.full((2, 1, 4), float("nan"), dtype=logits.dtype)], 1)
    close(next_token_logprobs(changed, tokens), next_token_logprobs(logits, tokens))


def test_sequence_logprobs_sum_a_response_and_nothing_else(sequence_logprobs=sequence_logprobs):
    for dtype in DTYPES:
        logprobs = -torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]], dtype=dtype)
        mask = torch.tensor([[True, True, False], [True, False, True]])
        close(sequence_logprobs(logprobs, mask), logprobs.new_tensor([-3.0, -40.0]))
        close(sequence_logprobs(logprobs, torch.zeros_like(mask)), logprobs.new_zeros(2))


def test_sequence_logprobs_ignore_padding(sequence_logprobs=sequence_logprobs):
    ignores_padding(lambda x: sequence_logprobs(x, masks()), masks(), normal(5, 5))


def test_sequence_logprobs_keep_an_impossible_token(sequence_logprobs=sequence_logprobs):
    assert sequence_logprobs(f64([[-1.0, -INF]]), torch.tensor([[True, True]])).item() == -INF


def exact_entropy(row):
    return -sum((mpmath.exp(v) * v for v in exact_logprobs(row) if v != -mpmath.inf), mpmath.mpf(0))


def test_entropy_of_known_distributions(entropy=entropy):
    for dtype in DTYPES:
        logits = torch.tensor([[[0.0] * 4, [0.0, 0.0, -INF, -INF], [0.0, -INF, -INF, -INF]]], dtype=dtype)
        close(entropy(logits), logits.new_tensor([[math.log(4), math.log(2), 0.0]]))
    close(entropy(f64([0.5, 0.25, 0.25]).log()), f64(1.5 * math.log(2)))  # nats, not bits
    assert math.isclose(entropy(torch.zeros(7, dtype=torch.float64)).item(), math.log(7), rel_tol=1e-14)  # no epsilon


def test_entropy_agrees_with_80_digits_on_extreme_logits(entropy=entropy):
    for dtype in DTYPES:
        logits = torch.tensor([EXTREME], dtype=dtype)
        close(entropy(logits), logits.new_tensor([[float(exact_entropy(row)) for row in logits[0]]]))


def test_entropy_has_the_gradient_minus_p_times_logp_plus_entropy(entropy=entropy):
    for dtype in DTYPES:
        logits = leaf(torch.tensor([EXTREME], dtype=dtype))
        (slope,) = torch.autograd.grad(entropy(logits).sum(), logits)
        expected = []
        for row in logits.detach()[0]:
            h = exact_entropy(row)
            expected.append([0.0 if v == -mpmath.inf else float(-mpmath.exp(v) * (v + h)) for v in exact_logprobs(row)])
        close(slope, logits.new_tensor([expected]))


def test_entropy_is_that_of_the_vocabulary_without_its_forbidden_tokens(entropy=entropy):
    logits = normal(2, 3, 5)
    forbidden = torch.cat([logits, torch.full((2, 3, 2), -INF, dtype=logits.dtype)], -1)
    close(entropy(forbidden), entropy(logits))
    close(gradients(entropy, forbidden)[0][..., :5], gradients(entropy, logits)[0])


def test_entropy_does_not_hide_nan(entropy=entropy):
    assert entropy(f64([0.0, float("nan")])).isnan()


def test_both_from_one_softmax_are_those_of_each_alone(token_logprobs_and_entropy=token_logprobs_and_entropy):
    """Numbers, and gradients: of both together, and of the first alone if the entropy needs none."""
    logits, tokens = normal(3, 4, 5).requires_grad_(), torch.arange(12).view(3, 4) % 5
    weights = normal(3, 4, seed=1), normal(3, 4, seed=2)
    apart = token_logprobs(logits, tokens), entropy(logits)
    for wanted in (True, False):
        found = token_logprobs_and_entropy(logits, tokens, entropy_gradient=wanted)
        for a, b in zip(found, apart, strict=True):
            close(a, b, atol=0, rtol=0)
        assert found[1].requires_grad == wanted
        loss = sum((w * x).sum() for w, x in zip(weights, found, strict=True))
        expected = sum((w * x).sum() for w, x in zip(weights, apart if wanted else apart[:1], strict=False))
        close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, expected)))


def _plain_entropy(logits):
    p = logits.softmax(-1)
    return -(p * p.log()).sum(-1)


PLANTED = {
    "log_softmax": {
        "the axis stays in front": edited(log_softmax, (".log_softmax(0).movedim(0, -1)", ".log_softmax(0)")),
        "normalised over positions": edited(log_softmax, (".log_softmax(0)", ".log_softmax(-1)")),
        "long axes normalised over positions": edited(
            log_softmax, ("return logits.log_softmax(-1)", "return logits.log_softmax(0)")
        ),
        "short axes without gradient": edited(log_softmax, ("logits.movedim(-1", "logits.detach().movedim(-1")),
        "logarithm of softmax": edited(log_softmax, (".log_softmax(0)", ".softmax(0).log()")),
        "reshaped, not transposed": edited(
            log_softmax, ("logits.movedim(-1, 0).contiguous()", "logits.reshape(logits.shape[-1:] + logits.shape[:-1])")
        ),
    },
    "token_logprobs": {
        "logits minus logsumexp": lambda logits, tokens: (logits - logits.logsumexp(-1, keepdim=True)).gather(
            -1, tokens[..., None]
        )[..., 0],
        "log of softmax": lambda logits, tokens: logits.softmax(-1).log().gather(-1, tokens[..., None])[..., 0],
        "exp without subtracting the largest": lambda logits, tokens: (
            logits - logits.exp().sum(-1, keepdim=True).log()
        ).gather(-1, tokens[..., None])[..., 0],
        "shifted by one": lambda logits, tokens: (
            logits.log_softmax(-1).roll(1, 1).gather(-1, tokens[..., None])[..., 0]
        ),
        "normalised over positions": lambda logits, tokens: logits.log_softmax(1).gather(-1, tokens[..., None])[..., 0],
        "not normalised": lambda logits, tokens: logits.gather(-1, tokens[..., None])[..., 0],
        "probability instead of its logarithm": lambda logits, tokens: token_logprobs(logits, tokens).exp(),
        "clamps bad tokens": lambda logits, tokens: token_logprobs(logits, tokens.clamp(0, logits.shape[-1] - 1)),
        "hides nan": lambda logits, tokens: token_logprobs(logits.nan_to_num(nan=0.0, neginf=-INF), tokens),
        "clamps log-probabilities": lambda logits, tokens: token_logprobs(logits, tokens).clamp(min=-100),
    },
    "token_logprobs_and_entropy": {
        "entropy always without gradient": lambda logits, tokens, entropy_gradient: token_logprobs_and_entropy(
            logits, tokens, entropy_gradient=False
        ),
        "entropy always with gradient": lambda logits, tokens, entropy_gradient: token_logprobs_and_entropy(
            logits, tokens
        ),
        "the other way round": lambda *a, **k: token_logprobs_and_entropy(*a, **k)[::-1],
        "nothing has a gradient": edited(
            token_logprobs_and_entropy, ("log_softmax(logits)", "log_softmax(logits.detach()) + 0 * logits")
        ),
        "entropy of the logits": edited(token_logprobs_and_entropy, ("_entropy(logprobs if", "_entropy(logits if")),
    },
    "next_token_logprobs": {
        "no shift": lambda logits, tokens: token_logprobs(logits, tokens)[:, 1:],
        "shifted the wrong way": lambda logits, tokens: token_logprobs(logits[:, 1:], tokens[:, :-1]),
        "keeps the first token": lambda logits, tokens: token_logprobs(logits, tokens),
        "shifted by two": lambda logits, tokens: token_logprobs(logits.roll(2, 1)[:, 1:], tokens[:, 1:]),
        "one token gives nothing": lambda logits, tokens: token_logprobs(logits[:, :-1], tokens[:, 1:]),
    },
    "sequence_logprobs": {
        "forgets the mask": lambda logprobs, mask: logprobs.sum(1),
        "multiplies by the mask": lambda logprobs, mask: (logprobs * mask).sum(1),
        "mean over tokens": lambda logprobs, mask: masked_sum(logprobs, mask, 1) / mask.sum(1).clamp(min=1),
        "sums over the batch": lambda logprobs, mask: masked_sum(logprobs, mask, 0),
        "leaves out the last token": lambda logprobs, mask: masked_sum(logprobs, mask & mask.roll(-1, 1), 1),
        "product of probabilities": lambda logprobs, mask: masked_sum(logprobs, mask, 1).exp(),
        "inverted mask": lambda logprobs, mask: masked_sum(logprobs, ~mask, 1),
    },
    "entropy": {
        "0 log 0 is nan": _plain_entropy,
        "0 times -inf in log space": lambda logits: -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1),
        "epsilon inside the logarithm": lambda logits: (
            -(logits.softmax(-1) * (logits.softmax(-1) + 1e-8).log()).sum(-1)
        ),
        "wrong sign": lambda logits: -entropy(logits),
        "bits": lambda logits: entropy(logits) / math.log(2),
        "mean over the vocabulary": lambda logits: entropy(logits) / logits.shape[-1],
        "right value, nan in the gradient": lambda logits: -(logits.softmax(-1) * logits.log_softmax(-1)).nansum(-1),
        "detached probabilities": lambda logits: (
            -(logits.softmax(-1).detach() * logits.log_softmax(-1).masked_fill(logits == -INF, 0.0)).sum(-1)
        ),
    },
}
EXEMPT = set()
