"""Files written whole: what stands under the name after a full disk or an interrupt, and when it is on the disk."""

import errno
import os
import threading
from pathlib import Path
from unittest import mock

from planting import edited, raises
from rlhfkit import atomic as module
from rlhfkit.atomic import sync_folder, write_atomically
from test_journal import file, largest_file


def names(path):
    return sorted(p.name for p in path.parent.iterdir())


def failing(error):
    return mock.Mock(side_effect=error)


def test_a_file_is_written_whole(write_atomically=write_atomically):
    with file(b"old") as path:
        write_atomically(path, b"new\r\n\x00")
        assert path.read_bytes() == b"new\r\n\x00"
        write_atomically(str(path.with_name("fresh")), b"")
        assert names(path) == ["fresh", "lines.jsonl"]


def test_who_has_the_old_file_open_never_sees_a_mixture(write_atomically=write_atomically):
    with file(b"old content") as path, open(path, "rb") as reader:
        write_atomically(path, b"new")
        assert reader.read() == b"old content"


def test_on_a_full_disk_the_old_file_stays_alone(write_atomically=write_atomically):
    with file(b"old") as path:
        with largest_file(5):
            raises(OSError, lambda: write_atomically(path, b"longer than that"))
        assert path.read_bytes() == b"old"
        assert names(path) == ["lines.jsonl"]


def test_whichever_step_fails_or_is_interrupted_the_old_file_stays_alone(write_atomically=write_atomically):
    for step in ("fsync", "replace"):
        for error in (OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt("No space left")):
            with file(b"old") as path:
                with mock.patch.object(module.os, step, failing(error)):
                    raises(BaseException, lambda p=path: write_atomically(p, b"new"), "No space left")
                assert path.read_bytes() == b"old"
                assert names(path) == ["lines.jsonl"]


def test_the_content_is_on_disk_before_the_name_points_to_it_and_then_the_name(write_atomically=write_atomically):
    replace, events = os.replace, []

    def seen(fd):
        events.append("folder" if os.fstat(fd).st_ino == path.parent.stat().st_ino else os.fstat(fd).st_size)

    with file(b"old") as path:
        with (
            mock.patch.object(module.os, "fsync", seen),
            mock.patch.object(module.os, "replace", lambda *a: (events.append("replace"), replace(*a))),
        ):
            write_atomically(path, b"12345")
        assert events == [5, "replace", "folder"]


def test_what_a_kill_may_leave_is_a_hidden_file_in_the_same_folder(write_atomically=write_atomically):
    """Another folder may be on another disk, from where nothing can be moved in one step."""
    with file(b"old") as path:
        for name, begins in (("lines.jsonl", ".lines.jsonl."), (".hidden.json", ".hidden.json.")):
            moved = []
            with mock.patch.object(
                module.os, "replace", lambda old, _, to=moved: (to.append(Path(old)), os.unlink(old))
            ):
                write_atomically(path.with_name(name), b"new")
            (source,) = moved
            assert source.parent == path.parent and source.name.startswith(begins) and source.suffix == ".tmp"


def test_two_writers_at_the_same_moment_do_not_meet(write_atomically=write_atomically):
    """Two threads have written and not yet renamed when the other one comes: the last to rename wins."""
    replace, meeting, failed = os.replace, threading.Barrier(2, timeout=10), []

    def together(*names):
        meeting.wait()
        replace(*names)

    def write(content):
        try:
            write_atomically(path, content)
        except (OSError, threading.BrokenBarrierError) as error:
            meeting.abort()
            failed.append(error)

    with file(b"old") as path:
        with mock.patch.object(module.os, "replace", together):
            threads = [threading.Thread(target=write, args=(content,)) for content in (b"one", b"two and more")]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert not failed
        assert path.read_bytes() in (b"one", b"two and more")
        assert names(path) == ["lines.jsonl"]


def test_the_file_may_be_read_by_whom_any_new_file_may(write_atomically=write_atomically):
    with file() as path:
        path.with_name("other").write_bytes(b"")
        write_atomically(path, b"new")
        assert path.stat().st_mode == path.with_name("other").stat().st_mode


def test_what_cannot_be_cleared_up_does_not_hide_the_error(write_atomically=write_atomically):
    with file(b"old") as path:
        with mock.patch.object(module.os, "fsync", failing(OSError(errno.EIO, "Input/output error"))):
            with mock.patch.object(Path, "unlink", failing(PermissionError("not allowed"))):
                raises(OSError, lambda: write_atomically(path, b"new"), "Input/output error")


def test_a_folder_that_is_missing_is_named(write_atomically=write_atomically):
    with file() as path:
        raises(FileNotFoundError, lambda: write_atomically(path.parent / "none" / "x", b""), "none", "No such file")


def test_the_folder_is_handed_to_the_disk_and_let_go(sync_folder=sync_folder):
    synced = []
    with file() as path:
        with mock.patch.object(module.os, "fsync", lambda fd: synced.append((fd, os.fstat(fd).st_ino))):
            sync_folder(path.parent)
            sync_folder(str(path.parent))
        assert [inode for _, inode in synced] == [path.parent.stat().st_ino] * 2
        for fd, _ in synced:
            raises(OSError, lambda fd=fd: os.fstat(fd))


def test_a_folder_that_the_system_cannot_open_or_sync_is_left_alone(sync_folder=sync_folder):
    """Windows refuses to open one; some network drives know no syncing."""
    refusals = [("open", errno.EACCES), *(("fsync", number) for number in (errno.EBADF, errno.EINVAL, errno.ENOTSUP))]
    with file() as path:
        for step, number in refusals:
            with mock.patch.object(module.os, step, failing(OSError(number, "refused"))):
                try:
                    sync_folder(path.parent)
                except OSError as error:
                    raise AssertionError(f"{step}: {error}") from error


def test_a_failing_disk_and_a_missing_folder_are_told(sync_folder=sync_folder):
    with file() as path:
        for number in (errno.EIO, errno.ENOSPC):
            with mock.patch.object(module.os, "fsync", failing(OSError(number, "disk"))):
                raises(OSError, lambda: sync_folder(path.parent), "disk")
        raises(FileNotFoundError, lambda: sync_folder(path.parent / "none"), "none")


def _write(*changes):
    return edited(write_atomically, *changes)


def _sync(*changes):
    return edited(sync_folder, *changes)


PLANTED = {
    "write_atomically": {
        "in place": _write(("os.replace(temporary, path)", "path.write_bytes(content)")),
        "not synced": _write(("os.fsync(file.fileno())", "pass")),
        "synced before it is written": _write(("file.flush()", "pass")),
        "synced after the rename": _write(
            ("            os.fsync(file.fileno())\n", ""),
            (
                "        os.replace(temporary, path)\n",
                "        os.replace(temporary, path); os.fsync(os.open(path, 0))\n",
            ),
        ),
        "folder not synced": _write(("sync_folder(path.parent)", "pass")),
        "folder synced too early": _write(
            ("    sync_folder(path.parent)", ""),
            ("        os.replace(temporary", "        sync_folder(path.parent); os.replace(temporary"),
        ),
        "temporary file stays": _write(("temporary.unlink()", "pass")),
        "temporary file stays after an interrupt": _write(("except BaseException:", "except OSError:")),
        "failure is not told": _write(("        raise\n", "        return\n")),
        "clearing up hides the error": _write(("with contextlib.suppress(OSError):", "if True:")),
        "temporary file elsewhere": _write(("path.with_name(f", "Path('/tmp').joinpath(f")),
        "temporary file in sight": _write((".{path.name.removeprefix('.')}", "{path.name}")),
        "dots before the name": _write((".removeprefix('.')", "")),
        "one name for all threads": _write(("os.urandom(4).hex()", "os.getpid()"), ('"xb"', '"wb"')),
        "for the owner only": _write(('"xb")', '"xb", opener=lambda p, flags: os.open(p, flags, 0o600))')),
        "text": _write(("content)", "content.replace(b'\\r\\n', b'\\n'))")),
    },
    "sync_folder": {
        "nothing synced": _sync(("os.fsync(opened)", "pass")),
        "the folder above": _sync(("os.open(folder,", "os.open(Path(folder).parent,")),
        "stays open": _sync(("os.close(opened)", "pass")),
        "has to be opened": _sync(("        return", "        raise")),
        "has to be synced": _sync(("if error.errno not in (errno.EBADF, errno.EINVAL, errno.ENOTSUP):", "if True:")),
        "a failing disk is not told": _sync(("            raise", "            pass")),
        "a missing folder is not told": _sync(("except PermissionError:", "except OSError:")),
    },
}
EXEMPT: set[str] = set()
