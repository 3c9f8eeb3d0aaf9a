"""Checkpoints: tensors and a JSON config in one safetensors file, written whole or not at all, never unpickled.

The metadata of the file holds the config and a SHA-256 digest of config and tensors, which every load verifies.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from rlhfkit.atomic import write_atomically


def _digest(tensors: dict[str, Tensor], config: str) -> str:
    sha = hashlib.sha256(config.encode())
    for name in sorted(tensors):
        x = tensors[name]
        sha.update(json.dumps([name, str(x.dtype), list(x.shape)]).encode())
        sha.update(x.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def save_checkpoint(path: str | os.PathLike[str], tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Write tensors and config to one file, atomically: an interrupted or failed save leaves the old file untouched.

    Args:
        path: of the file; its folder is made where it does not exist.
        tensors: by name, of any shape, dtype and device.
        config: what JSON can hold; tuples come back as lists.

    Raises:
        ValueError: if a value of ``tensors`` is not a tensor, or ``config`` is not a dict that JSON can hold.
        OSError: if the disk is full or the folder cannot be written.
    """
    for name, x in tensors.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"tensors: got {type(x).__name__} under {name!r}, expected a torch.Tensor")
    try:
        text = json.dumps(config, sort_keys=True)
    except (TypeError, ValueError) as error:
        raise ValueError(f"config: {error}; expected a dict that JSON can hold") from error
    if not isinstance(config, dict):
        raise ValueError(f"config: got {type(config).__name__}, expected a dict that JSON can hold")
    copies = {name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    data = safetensors.torch.save(copies, {"config": text, "sha256": _digest(copies, text)})
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, data)


def load_checkpoint(
    path: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_checkpoint` wrote. No code in the file can run: it holds numbers and JSON only.

    Args:
        path: of the file.
        device: where the tensors go.

    Returns:
        The tensors by name, and the config.

    Raises:
        ValueError: if the file is truncated, was changed after it was written, or is not a checkpoint.
        OSError: if there is no such file.
    """
    data = Path(path).read_bytes()
    try:
        tensors = safetensors.torch.load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        text, digest = header["__metadata__"]["config"], header["__metadata__"]["sha256"]
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(
            f"path: {path} is truncated or not a checkpoint of this package ({len(data)} bytes): {error}"
        ) from error
    if _digest(tensors, text) != digest:
        raise ValueError(f"path: {path} was changed after it was written; expected the SHA-256 digest {digest}")
    return {name: x.to(device) for name, x in tensors.items()}, json.loads(text)
