"""GPT-2 checkpoints of Hugging Face: same logits, same greedy continuations, and nothing else is let in."""

import contextlib
import sys
import tempfile
from unittest import mock

import pytest
import torch

from planting import edited, normal, raises, replaced
from rlhfkit import pretrained
from rlhfkit.models import GPT
from rlhfkit.pretrained import load_gpt2
from rlhfkit.sampling import response_logprobs, sample, truncate_logits

transformers = pytest.importorskip("transformers", reason="load_gpt2 reads checkpoints through transformers")
transformers.utils.logging.disable_progress_bar()
SIZES = {"vocab_size": 90, "n_positions": 40, "n_embd": 24, "n_layer": 3, "n_head": 4}
SIZES |= {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}


def checkpoint(**changes):
    """A random model far from its start, biases and norms included, saved to a new folder; the model and the folder."""
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**SIZES | changes)).eval()
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(0.3 * normal(*parameter.shape, seed=i).to(parameter.device))
            if parameter.ndim == 1:
                parameter += 0.5
    folder = tempfile.mkdtemp()
    model.save_pretrained(folder)
    return model, folder


def test_logits_are_those_of_transformers(load_gpt2=load_gpt2):
    theirs, folder = checkpoint()
    ours = load_gpt2(folder)
    assert isinstance(ours, GPT) and ours.config.n_layer == 3 and ours.pad_id == -1 and ours.config.dropout == 0
    tokens = torch.randint(0, 90, (5, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.abs().max() > 1
        torch.testing.assert_close(ours.logits(tokens), expected, atol=1e-4, rtol=0)


def test_greedy_continuations_are_those_of_transformers(load_gpt2=load_gpt2):
    theirs, folder = checkpoint()
    ours = load_gpt2(folder)
    prompts = torch.randint(2, 90, (6, 7), generator=torch.Generator().manual_seed(1))
    out = theirs.generate(prompts, attention_mask=torch.ones_like(prompts), do_sample=False, max_new_tokens=20)
    out = torch.nn.functional.pad(out[:, 7:], (0, 27 - out.shape[1]))
    rollout = sample(ours, prompts, 20, generator=torch.Generator(), eos_id=1, top_k=1)
    # after the end theirs has the id of its padding, ours its own, so only the response counts
    assert torch.where(rollout.response_mask, out, 0).equal(torch.where(rollout.response_mask, rollout.tokens, 0))


def test_left_padded_prompts_continue_as_in_transformers(load_gpt2=load_gpt2):
    """Log-probabilities of given responses, with padding masked there and derived from the ids here."""
    theirs, folder = checkpoint()
    ours = load_gpt2(folder, pad_id=0)
    prompts = torch.randint(2, 90, (3, 6), generator=torch.Generator().manual_seed(1))
    prompts[0, :4] = prompts[1, :1] = 0
    tokens = torch.randint(2, 90, (3, 5), generator=torch.Generator().manual_seed(2))
    sequences = torch.cat([prompts, tokens], 1)
    mask = (sequences != 0).long()
    with torch.no_grad():
        logits = theirs(sequences, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits
        expected = logits[:, 5:-1].log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
        torch.testing.assert_close(response_logprobs(ours, prompts, tokens), expected, atol=1e-4, rtol=0)


def test_sampling_settings_keep_the_tokens_transformers_keeps():
    """Temperature, top-k and top-p in its order."""
    logits = 3 * normal(200, 30).float()
    for temperature, top_k, top_p in ((0.7, 5, 0.9), (1.5, 10, 0.5), (1.0, 30, 0.95), (2.0, 3, 0.3)):
        expected = transformers.TemperatureLogitsWarper(temperature)(None, logits)
        for warp in (transformers.TopKLogitsWarper(top_k), transformers.TopPLogitsWarper(top_p)):
            expected = warp(None, expected)
        torch.testing.assert_close(truncate_logits(logits, temperature, top_k, top_p), expected)


WRONG = {
    "activation_function": "relu",
    "layer_norm_epsilon": 1e-6,
    "n_inner": 48,
    "scale_attn_by_inverse_layer_idx": True,
    "scale_attn_weights": False,
    "tie_word_embeddings": False,
}


def test_another_architecture_is_refused(load_gpt2=load_gpt2):
    for name, value in WRONG.items():
        _, folder = checkpoint(**{name: value})
        raises(ValueError, lambda f=folder: load_gpt2(f), name, repr(value))
    folder = tempfile.mkdtemp()
    transformers.BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2).save_pretrained(folder)
    raises(ValueError, lambda: load_gpt2(folder), "model_type", "bert")
    _, folder = checkpoint()
    raises(ValueError, lambda: load_gpt2(folder, pad_id=90), "pad_id", "90", "89")


def test_without_transformers_the_error_says_what_to_install(load_gpt2=load_gpt2):
    with mock.patch.dict(sys.modules, {"transformers": None}):
        raises(ImportError, lambda: load_gpt2("anything"), "transformers", "pip install", "scale")


def _with_parts(**parts):
    @contextlib.contextmanager
    def changed():
        with replaced(pretrained, _PARTS=pretrained._PARTS | parts):
            yield

    def load(*arguments, **settings):
        with changed():
            return load_gpt2(*arguments, **settings)

    return load


PLANTED = {
    "load_gpt2": {
        "norms swapped": _with_parts(ln_1="norm_2", ln_2="norm_1"),
        "square matrix not transposed": edited(
            load_gpt2,
            (
                "weight.t() if weight.ndim == 2 else weight",
                'weight.t() if weight.ndim == 2 and their_name != "attn.c_proj" else weight',
            ),
        ),
        "positions forgotten": edited(load_gpt2, ('theirs["wpe.weight"]', '0 * theirs["wpe.weight"]')),
        "last norm forgotten": edited(load_gpt2, ('theirs["ln_f.weight"]', 'torch.ones_like(theirs["ln_f.weight"])')),
        "biases forgotten": edited(
            load_gpt2, ('theirs[f"h.{layer}.{their_name}.bias"]', '0 * theirs[f"h.{layer}.{their_name}.bias"]')
        ),
        "the first layer everywhere": edited(
            load_gpt2, ('theirs[f"h.{layer}.{their_name}.weight"]', 'theirs[f"h.0.{their_name}.weight"]')
        ),
        "architecture not checked": edited(load_gpt2, ("    _require_gpt2(config)\n", "")),
        "id 0 is padding": edited(load_gpt2, ("pad_id: int = -1", "pad_id: int = 0")),
        "padding ignored": edited(load_gpt2, ("0.0, pad_id)", "0.0, -1)")),
    },
}
EXEMPT = set()
