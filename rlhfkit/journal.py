"""A file of JSON lines to which lines are only ever added, safe against a kill, a second writer and a full disk."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable
from pathlib import Path

from rlhfkit.atomic import sync_folder


class Journal:
    """An append-only file of lines, each a JSON object, open in one process at a time.

    A line is handed to the disk (``fsync``) before :meth:`append` returns. What a kill left of an unfinished line is
    moved to the file with ``.torn`` added to its name when the journal is next opened. The file with ``.lock`` added
    keeps other writers out and names the process that holds it; the system unlocks it when that process dies.

    Attributes:
        path: of the file.
    """

    def __init__(self, path: str | os.PathLike[str], accept: Callable[[bytes], object]) -> None:
        """Open or create the file, have every line accepted, then mend an unfinished last one.

        Args:
            path: of the file; its folder must exist.
            accept: called with each finished line in turn; raises ValueError for one that is none of its own. Nothing
                is mended before all are accepted, so that the file of somebody else is left as it is.

        Raises:
            BlockingIOError: if a journal is open on the file, in this process or another; names file and process.
            ValueError: if a line is not accepted; names file and line.
        """
        self.path = Path(path)
        self._file = -1
        self._lock = _lock(self.path)
        try:
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            sync_folder(self.path.parent)
            *lines, tail = self.path.read_bytes().split(b"\n")
            for number, line in enumerate(lines, 1):
                try:
                    if line.strip():
                        accept(line)
                except ValueError as error:
                    raise ValueError(f"{self.path}, line {number}: {error}") from error
            if tail:
                self._mend(tail, accept)
        except BaseException:
            self.close()
            raise

    def _mend(self, tail: bytes, accept: Callable[[bytes], object]) -> None:
        """Finish a last line that lacks its end only; move an incomplete one aside, if it can be one of ours."""
        try:
            complete = json.loads(tail) is not None
        except ValueError:  # an object cut short is never JSON
            complete = False
        if complete or not b'{"'.startswith(tail[:2]):
            try:
                accept(tail)
            except ValueError as error:
                raise ValueError(f"{self.path}, last line: {error}") from error
            os.write(self._file, b"\n")
        else:
            with open(f"{self.path}.torn", "ab") as aside:
                aside.write(tail + b"\n")
                aside.flush()
                os.fsync(aside.fileno())
            os.ftruncate(self._file, os.fstat(self._file).st_size - len(tail))
        os.fsync(self._file)

    @property
    def closed(self) -> bool:
        """Whether it takes no more lines."""
        return self._file < 0

    def append(self, line: bytes) -> None:
        """Add a line; when this returns, it is on disk.

        Args:
            line: without its end, which is added.

        Raises:
            ValueError: if the journal is closed.
            OSError: if it cannot be written, e.g. on a full disk: no part of it stays, and all earlier lines do.
        """
        if self.closed:
            raise ValueError(f"{self.path} is closed, expected an open file: open it again")
        end = os.fstat(self._file).st_size
        data = line + b"\n"
        try:
            while data:
                data = data[os.write(self._file, data) :]
            os.fsync(self._file)
        except BaseException:  # an interrupt from the keyboard too must not leave a line that the caller does not know
            try:
                os.ftruncate(self._file, end)
            except OSError:
                self.close()  # the next opening mends the line
            raise

    def close(self) -> None:
        """Release file and lock. Closing twice does no harm."""
        if self._file >= 0:
            os.close(self._file)
        if self._lock >= 0:
            fcntl.flock(self._lock, fcntl.LOCK_UN)  # also for the copies of the descriptor in forked processes
            os.close(self._lock)
        self._file = self._lock = -1


def _lock(path: Path) -> int:
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = os.read(lock, 20).decode() or "unknown"
        os.close(lock)
        who = "this process" if holder == str(os.getpid()) else f"process {holder}, perhaps another notebook"
        raise BlockingIOError(
            error.errno, f"file is open in {who}; close it there, or shut down its kernel", str(path)
        ) from error
    with contextlib.suppress(OSError):  # on a full disk the holder stays unknown, the lock holds all the same
        os.ftruncate(lock, 0)
        os.write(lock, str(os.getpid()).encode())
    return lock
