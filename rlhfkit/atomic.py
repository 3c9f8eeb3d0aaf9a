"""Files written whole or not at all: a kill, a full disk or a power cut never leaves half of one under its name."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a whole file so that a kill at any moment leaves either the old content or the new, never a mixture.

    The content goes to the disk (``fsync``) under a hidden name ending in ``.tmp``, beside the file and different in
    every call, and then takes the file's name. A kill leaves at most such a file behind.

    Args:
        path: of the file; its folder must exist.
        content: what it shall hold.

    Raises:
        OSError: if it cannot be written; the old content stays and no temporary file does. Only when the folder
            cannot be handed to a failing disk, the last step, is the new content already in place.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name.removeprefix('.')}.{os.urandom(4).hex()}.tmp")
    file = open(temporary, "xb")
    try:
        with file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # an interrupt from the keyboard too
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink()
        raise
    sync_folder(path.parent)


def sync_folder(folder: str | os.PathLike[str]) -> None:
    """Make a new file last: its name is an entry of its folder, which has to reach the disk as well.

    Nothing happens where a folder cannot be opened, as on Windows, or not be synced, as on some network drives.

    Args:
        folder: that holds the file.

    Raises:
        OSError: if the disk fails, or there is no such folder.
    """
    try:
        opened = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return
    try:
        os.fsync(opened)
    except OSError as error:
        if error.errno not in (errno.EBADF, errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(opened)
