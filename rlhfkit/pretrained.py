"""GPT-2 checkpoints in the format of Hugging Face, through the optional package transformers."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from rlhfkit.models import GPT, GPTConfig

_PARTS = {  # theirs: ours; the first four are stored (in, out) there and (out, in) here
    "attn.c_attn": "qkv",
    "attn.c_proj": "attention_out",
    "mlp.c_fc": "up",
    "mlp.c_proj": "down",
    "ln_1": "norm_1",
    "ln_2": "norm_2",
}


def _require_gpt2(config: Any) -> None:
    """Raise unless the model has the architecture of our GPT, so that no number is quietly different."""
    expected: dict[str, tuple[Any, ...]] = {
        "model_type": ("gpt2",),
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "layer_norm_epsilon": (1e-5,),
        "n_inner": (None, 4 * getattr(config, "n_embd", 0)),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "tie_word_embeddings": (True,),
    }
    for name, allowed in expected.items():
        if getattr(config, name, None) not in allowed:
            raise ValueError(f"folder_or_name: {name} is {getattr(config, name, None)!r}, expected one of {allowed}")


def load_gpt2(folder_or_name: str | os.PathLike[str], pad_id: int = -1) -> GPT:
    """A GPT-2 model saved by transformers, as a :class:`~rlhfkit.gpt.GPT` in float32 on the CPU.

    Args:
        folder_or_name: a folder written by ``save_pretrained``, or a name on the hub, which needs a network.
        pad_id: id that is padding from now on, or -1: GPT-2 has none of its own.

    Returns:
        The model, with dropout 0 whatever its config says: fine-tuning on rewards does without.

    Raises:
        ImportError: if transformers is not installed.
        ValueError: if the checkpoint is not a GPT-2, or ``pad_id`` is not in its vocabulary.
        OSError: if there is no such name, or the folder holds no weights.
    """
    try:
        from transformers import AutoConfig, GPT2LMHeadModel
    except ImportError as error:
        raise ImportError("load_gpt2 needs transformers; install it with: pip install 'rlhfkit[scale]'") from error
    config = AutoConfig.from_pretrained(folder_or_name)
    _require_gpt2(config)
    theirs = GPT2LMHeadModel.from_pretrained(folder_or_name, dtype=torch.float32).transformer.state_dict()
    with torch.device("cpu"):
        model = GPT(
            GPTConfig(config.vocab_size, config.n_positions, config.n_embd, config.n_layer, config.n_head, 0.0, pad_id)
        )
    ours: dict[str, Tensor] = {
        "token_embedding.weight": theirs["wte.weight"],
        "position_embedding.weight": theirs["wpe.weight"],
        "norm.weight": theirs["ln_f.weight"],
        "norm.bias": theirs["ln_f.bias"],
    }
    for layer in range(config.n_layer):
        for their_name, name in _PARTS.items():
            weight = theirs[f"h.{layer}.{their_name}.weight"]
            ours[f"blocks.{layer}.{name}.weight"] = weight.t() if weight.ndim == 2 else weight
            ours[f"blocks.{layer}.{name}.bias"] = theirs[f"h.{layer}.{their_name}.bias"]
    model.load_state_dict(ours)
    return model
