"""Checkpoints: what goes in comes out, a damaged file is refused, and a failed save leaves the old file alone."""

import errno
import os
import pickle
import tempfile
from pathlib import Path

import safetensors.torch
import torch

from planting import edited, normal, raises, replaced
from rlhfkit import checkpoints
from rlhfkit.checkpoints import load_checkpoint, save_checkpoint


def folder():
    return Path(tempfile.mkdtemp())


def example():
    tensors = {
        "b": normal(3, 4).float().t(),  # not contiguous
        "a": torch.arange(5),
        "half": normal(2, 2).bfloat16(),
        "flags": torch.tensor([True, False]),
        "scalar": torch.tensor(2.5),
        "none": torch.zeros(0, 3),
        "leaf": torch.ones(2, requires_grad=True),
    }
    return tensors, {"kind": "example", "sizes": [1, 2], "info": {"text": "ünïcode", "x": 0.1, "nothing": None}}


def test_tensors_and_config_come_back(save_checkpoint=save_checkpoint, load_checkpoint=load_checkpoint):
    tensors, config = example()
    path = folder() / "new" / "model.safetensors"
    save_checkpoint(path, tensors, config)
    save_checkpoint(str(path), tensors, config)  # again, over the old one
    found, found_config = load_checkpoint(str(path))
    assert found_config == config and found.keys() == tensors.keys()
    for name, x in tensors.items():
        assert found[name].dtype == x.dtype and found[name].equal(x.detach()), name
        assert not found[name].requires_grad
    assert [p.name for p in path.parent.iterdir()] == ["model.safetensors"]
    assert safetensors.torch.load_file(path)["b"].equal(tensors["b"])  # other programs read it too


def test_tensors_that_share_memory_are_saved_one_by_one(save_checkpoint=save_checkpoint):
    path, x = folder() / "model", torch.arange(6.0)
    save_checkpoint(path, {"all": x, "half": x[:3], "same": x}, {})
    assert load_checkpoint(path)[0]["half"].tolist() == [0.0, 1.0, 2.0]


def test_load_puts_the_tensors_on_the_device(load_checkpoint=load_checkpoint):
    path = folder() / "model"
    save_checkpoint(path, {"x": torch.ones(2)}, {})
    assert load_checkpoint(path, "meta")[0]["x"].device.type == "meta"
    assert load_checkpoint(path)[0]["x"].device.type == "cpu"


def test_a_truncated_file_is_refused_at_every_length(load_checkpoint=load_checkpoint):
    path = folder() / "model"
    save_checkpoint(path, *example())
    data = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 4, len(data) - 1):
        path.write_bytes(data[:length])
        raises(ValueError, lambda: load_checkpoint(path), "path", str(path), str(length))
    path.write_bytes(data + b"x")
    raises(ValueError, lambda: load_checkpoint(path), "path")


def test_a_changed_file_is_refused_wherever_it_was_changed(load_checkpoint=load_checkpoint):
    """One bit in the numbers, in a name, in a shape or in the config."""
    path = folder() / "model"
    save_checkpoint(path, {"aaaa": torch.arange(6.0).view(2, 3), "bbbb": torch.ones(3, 2)}, {"lr": 0.25})
    data = path.read_bytes()
    swaps = {
        "numbers": data[:-3] + bytes([data[-3] ^ 1]) + data[-2:],
        "name": data.replace(b"aaaa", b"aaab"),
        "names": data.replace(b"aaaa", b"xxxx").replace(b"bbbb", b"aaaa").replace(b"xxxx", b"bbbb"),
        "shape": data.replace(b"[2,3]", b"[3,2]"),
        "dtype": data.replace(b"F32", b"I32"),
        "config": data.replace(b"0.25", b"0.35"),
    }
    for what, changed in swaps.items():
        assert changed != data, what
        path.write_bytes(changed)
        raises(ValueError, lambda: load_checkpoint(path), "path")


def test_what_is_no_checkpoint_is_refused_and_nothing_in_it_runs(load_checkpoint=load_checkpoint):
    path = folder() / "model"

    class Harmful:
        def __reduce__(self):
            return os.system, (f"touch {path}.harm",)

    for data in (pickle.dumps(Harmful()), b"not a checkpoint at all", b"\x08\0\0\0\0\0\0\0[1,2,33]"):
        path.write_bytes(data)
        raises(ValueError, lambda: load_checkpoint(path), "path", "checkpoint")
    torch.save({"x": torch.ones(2)}, path)
    raises(ValueError, lambda: load_checkpoint(path), "path", "checkpoint")
    safetensors.torch.save_file({"x": torch.ones(2)}, path)  # nobody's digest
    raises(ValueError, lambda: load_checkpoint(path), "path", "checkpoint")
    assert not Path(f"{path}.harm").exists()


def test_a_save_that_fails_leaves_the_old_file_and_no_other(save_checkpoint=save_checkpoint):
    path = folder() / "model"
    checkpoints.save_checkpoint(path, {"x": torch.ones(2)}, {"step": 1})
    before = path.read_bytes()
    full = OSError(errno.ENOSPC, "No space left on device")
    for name in ("fsync", "replace"):
        with replaced(os, **{name: _raiser(full)}):
            raises(OSError, lambda: save_checkpoint(path, {"x": torch.zeros(2)}, {"step": 2}), "No space")
        assert path.read_bytes() == before
        assert [p.name for p in path.parent.iterdir()] == ["model"]


def _raiser(error):
    def fail(*_):
        raise error

    return fail


def test_the_data_are_on_the_disk_before_the_file_gets_its_name(save_checkpoint=save_checkpoint):
    path, calls = folder() / "model", []
    fsync, replace = os.fsync, os.replace

    def note_fsync(number):
        calls.append(("fsync", path.exists(), os.fstat(number).st_size))
        fsync(number)

    def note_replace(source, target):
        calls.append(("replace", Path(source).parent == path.parent, os.stat(source).st_size))
        replace(source, target)

    with replaced(os, fsync=note_fsync, replace=note_replace):
        save_checkpoint(path, {"x": torch.ones(100)}, {})
    size = path.stat().st_size
    assert calls[:2] == [("fsync", False, size), ("replace", True, size)]


def test_save_refuses_what_it_cannot_write(save_checkpoint=save_checkpoint):
    path = folder() / "model"
    raises(ValueError, lambda: save_checkpoint(path, {"x": [1.0]}, {}), "tensors", "list", "'x'")
    raises(ValueError, lambda: save_checkpoint(path, {}, {"x": torch.ones(1)}), "config", "JSON")
    raises(ValueError, lambda: save_checkpoint(path, {}, [1]), "config", "list", "dict")
    assert not path.exists()
    raises(OSError, lambda: load_checkpoint(path), "model")


PLANTED = {
    "save_checkpoint": {
        "in place": edited(save_checkpoint, ("write_atomically(path, data)", "path.write_bytes(data)")),
        "named before it is on the disk": edited(
            save_checkpoint,
            (
                "write_atomically(path, data)",
                "Path(f'{path}.tmp').write_bytes(data), os.replace(f'{path}.tmp', path)",
            ),
        ),
        "config forgotten": lambda path, tensors, config: save_checkpoint(path, tensors, {}),
        "everything in float32": lambda path, tensors, config: save_checkpoint(
            path, {k: x.float() if isinstance(x, torch.Tensor) else x for k, x in tensors.items()}, config
        ),
        "config not checked": edited(save_checkpoint, ("if not isinstance(config, dict):", "if False:")),
    },
    "load_checkpoint": {
        "digest not verified": edited(load_checkpoint, ("if _digest(tensors, text) != digest:", "if False:")),
        "device ignored": edited(load_checkpoint, ("x.to(device)", "x")),
        "falls back to unpickling": edited(
            load_checkpoint,
            (
                "    except (SafetensorError, KeyError, ValueError) as error:\n",
                "    except (SafetensorError, KeyError, ValueError) as error:\n"
                "        try:\n"
                "            return torch.load(path, weights_only=False), {}\n"
                "        except Exception:\n"
                "            pass\n",
            ),
        ),
        "a truncated file gives nothing": edited(
            load_checkpoint,
            (
                "    data = Path(path).read_bytes()\n",
                "    data = Path(path).read_bytes()\n    if len(data) < 9: return {}, {}\n",
            ),
        ),
    },
}
EXEMPT = set()
