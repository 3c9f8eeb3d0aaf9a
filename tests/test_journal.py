"""The append-only file: what is on disk after every append, a kill in the middle of one, a full disk, two writers."""

import contextlib
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

from planting import edited, raises
from rlhfkit import journal as module
from rlhfkit.journal import Journal

A, B, C = b'{"a": 1}', b'{"b": "\\u00e9"}', b'{"c": [2, 3]}'


@contextlib.contextmanager
def file(content=None):
    """A path in a folder of its own, holding the content if there is any."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lines.jsonl"
        if content is not None:
            path.write_bytes(content)
        yield path


@contextlib.contextmanager
def largest_file(size):
    """No file of this process may grow beyond so many bytes, as on a full disk: what still fits is written."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def ours(line):
    """Accepts A, B and C."""
    if line not in (A, B, C):
        raise ValueError(f"got {line!r}")


def content(Journal, path):
    """The lines that a journal finds in a file."""
    found = []
    try:
        Journal(path, found.append).close()
    except BlockingIOError as error:
        raise AssertionError("still locked") from error
    return found


def test_lines_are_kept_in_order_and_read_again(Journal=Journal):
    with file() as path:
        for line in (A, B, C):
            journal = Journal(path, ours)
            journal.append(line)
            journal.close()
        assert path.read_bytes() == A + b"\n" + B + b"\n" + C + b"\n"
        assert content(Journal, path) == [A, B, C]


def test_a_line_is_handed_to_the_disk_before_append_returns(Journal=Journal):
    with file() as path:
        journal = Journal(path, ours)
        synced = []
        with mock.patch.object(module.os, "fsync", lambda fd: synced.append(path.read_bytes())):
            journal.append(A)
        journal.close()
        assert synced[-1:] == [A + b"\n"]


def test_a_new_file_is_entered_in_its_folder_for_good(Journal=Journal):
    with file() as path:
        synced = []
        with mock.patch.object(module.os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino)):
            Journal(path, ours).close()
        assert path.parent.stat().st_ino in synced


def test_a_line_cut_anywhere_is_moved_aside_and_the_next_does_not_stick_to_it(Journal=Journal):
    for cut in range(1, len(B)):
        with file(A + b"\n" + B[:cut]) as path:
            found = []
            with contextlib.closing(Journal(path, found.append)) as journal:
                journal.append(C)
            assert (path.read_bytes(), [x for x in found if x == A]) == (A + b"\n" + C + b"\n", [A])
            assert Path(f"{path}.torn").read_bytes() == B[:cut] + b"\n"


def test_a_line_that_lacks_only_its_end_is_finished(Journal=Journal):
    with file(A + b"\n" + B) as path:
        found = []
        journal = Journal(path, found.append)
        journal.append(C)
        journal.close()
        assert found == [A, B] and content(Journal, path) == [A, B, C]
        assert not Path(f"{path}.torn").exists()


def test_the_file_of_somebody_else_is_left_as_it_is(Journal=Journal):
    for foreign in (b'{"x": 1}\n{"y', b'[{"a": 1}', b'{"prompt": "p"}', b"caf\xe9", b"\x00\x00\x00", b'\xef\xbb\xbf{"'):
        with file(foreign) as path:
            raises(ValueError, lambda p=path: Journal(p, ours), str(path), "line")
            assert path.read_bytes() == foreign
            assert not Path(f"{path}.torn").exists()


def test_a_line_that_is_not_accepted_is_named_and_the_file_stays_free(Journal=Journal):
    with file(A + b"\n\n" + b'{"z"}\n' + B + b"\n") as path:
        raises(ValueError, lambda: Journal(path, ours), str(path), "line 3", "z")
        path.write_bytes(A + b"\r\n\r\n" + B + b"\n")  # blank lines are none
        assert [line.strip() for line in content(Journal, path)] == [A, B]


def test_a_second_journal_on_the_file_is_refused_until_the_first_closes(Journal=Journal):
    with file() as path:
        first = Journal(path, ours)
        raises(BlockingIOError, lambda: Journal(path, ours), str(path), "this process")
        first.append(A)
        first.close()
        assert content(Journal, path) == [A]


def test_another_process_is_named_and_its_death_frees_the_file(Journal=Journal):
    program = "import sys, rlhfkit.journal as j; x = j.Journal(sys.argv[1], len); print('open', flush=True); input()"
    with file() as path:
        command = [sys.executable, "-c", program, str(path)]
        other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            assert other.stdout.readline() == b"open\n"
            raises(BlockingIOError, lambda: Journal(path, ours), str(path), f"process {other.pid}")
        finally:
            other.kill()
            other.communicate()
        assert content(Journal, path) == []


def test_closing_frees_the_file_though_a_copy_of_the_descriptor_lives_on(Journal=Journal):
    with file() as path:
        journal = Journal(path, ours)
        copy = os.dup(journal._lock)  # as a forked process, such as a data loader's, has one
        try:
            journal.close()
            journal.close()
            assert content(Journal, path) == []
        finally:
            os.close(copy)


def test_a_closed_journal_takes_no_line(Journal=Journal):
    with file() as path:
        journal = Journal(path, ours)
        assert not journal.closed
        journal.close()
        assert journal.closed
        raises(ValueError, lambda: journal.append(A), str(path), "closed")


def test_on_a_full_disk_nothing_of_the_line_stays_and_it_can_be_added_later(Journal=Journal):
    with file() as path:
        journal = Journal(path, ours)
        journal.append(A)
        before = path.read_bytes()
        for room in range(len(B) + 1):
            with largest_file(len(before) + room):
                raises(OSError, lambda: journal.append(B))
            assert path.read_bytes() == before, room
        journal.append(B)
        journal.close()
        assert path.read_bytes() == before + B + b"\n"


def test_where_not_even_that_can_be_undone_the_next_opening_mends_the_line(Journal=Journal):
    with file() as path:
        journal = Journal(path, ours)
        journal.append(A)
        with largest_file(len(A) + 4), mock.patch.object(module.os, "ftruncate", mock.Mock(side_effect=OSError)):
            raises(OSError, lambda: journal.append(B))
        assert journal.closed
        assert content(Journal, path)[0] == A
        assert path.read_bytes() == A + b"\n"


def test_an_interrupt_leaves_no_line_that_the_caller_does_not_know(Journal=Journal):
    with file() as path:
        journal = Journal(path, ours)
        with mock.patch.object(module.os, "fsync", mock.Mock(side_effect=KeyboardInterrupt)):
            with contextlib.suppress(KeyboardInterrupt):
                journal.append(A)
        assert path.read_bytes() == b""
        journal.append(B)
        journal.close()
        assert path.read_bytes() == B + b"\n"


def test_a_system_that_writes_a_byte_at_a_time_still_gets_the_line(Journal=Journal):
    write = os.write
    with file() as path:
        journal = Journal(path, ours)
        with mock.patch.object(module.os, "write", lambda fd, data: write(fd, data[:1])):
            journal.append(B)
        journal.close()
        assert path.read_bytes() == B + b"\n"


def _journal(*changes):
    return edited(Journal, *changes)


PLANTED = {
    "Journal": {
        "not synced": _journal(
            ("            os.fsync(self._file)\n        except", "            pass\n        except")
        ),
        "folder not synced": _journal(("sync_folder(self.path.parent)", "pass")),
        "an unfinished line not mended": _journal(("if tail:", "if False:")),
        "an unfinished line thrown away": _journal(('aside.write(tail + b"\\n")', "pass")),
        "a complete line thrown away too": _journal(("complete = json.loads(tail) is not None", "complete = False")),
        "mended without looking whose it is": _journal(("""if complete or not b'{"'.startswith(tail[:2]):""", "if 0:")),
        "line numbers from 0": _journal(("enumerate(lines, 1)", "enumerate(lines)")),
        "blank lines not skipped": _journal(("if line.strip():", "if True:")),
        "stays locked after an error": _journal(
            (
                "        except BaseException:\n            self.close()",
                "        except BaseException:\n            pass",
            )
        ),
        "no lock": _journal(("self._lock = _lock(self.path)", "self._lock = os.open(os.devnull, os.O_RDWR)")),
        "copies keep the lock": _journal(("fcntl.flock(self._lock, fcntl.LOCK_UN)", "pass")),
        "half a line stays": _journal(("os.ftruncate(self._file, end)", "pass")),
        "only errors are undone": _journal(("except BaseException:  # an", "except OSError:  # an")),
        "stays open with half a line": _journal(
            ("except OSError:\n                self.close()", "except OSError:\n                pass")
        ),
        "what one write took": _journal(("while data:", "if data:")),
        "overwrites": _journal((" | os.O_APPEND", "")),
        "closed and yet not": _journal(("return self._file < 0", "return False")),
    },
}
EXEMPT: set[str] = set()
