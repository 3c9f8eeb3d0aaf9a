"""Starts processes that label as fast as they can, to be killed. Run by test_labelling_kills.py.

One line of standard input starts one process: the path of the label file, "fast" or "slow", and the name of a planted
bug or "none". What the process has finished it says on standard output, one line each, at once.
"""

import os
import sys
import time
from itertools import count
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from planting import edited, replaced
from rlhfkit import journal, label_store
from rlhfkit.journal import Journal
from rlhfkit.label_store import Comparison, LabelStore

LATE = (  # a line is written with the next one
    ("        data = line", "        data = self._late"),
    ("        self._lock = _lock(self.path)", "        self._lock, self._late = _lock(self.path), b' '"),
    ("            os.fsync(self._file)\n        except", "            self._late = line\n        except"),
)
BUGS = {
    "none": {"Journal": Journal},
    "said before it is written": {"Journal": edited(Journal, *LATE)},
    "the torn line stays": {"Journal": edited(Journal, ("if tail:", "if False:"))},
    "remembered only": {"LabelStore": edited(LabelStore, ("self._journal.append(line)", "pass"))},
    "the file begun anew": {"Journal": edited(Journal, ("os.O_RDWR |", "os.O_RDWR | os.O_TRUNC |"))},
}


def write_in_pieces(fd: int, data: bytes) -> int:
    """As a slow disk would: some bytes, after a while."""
    time.sleep(0.0004)
    return write(fd, bytes(data[:9]))


def label(path: str, say: int) -> None:
    """Label, and now and then undo, until killed."""
    store = label_store.LabelStore(path)
    write(say, b"opened %d\n" % len(store))
    for i in count(len(store.labels)):
        comparison = Comparison("prompt", f"a{i}", f"b{i}")
        if store.find(comparison) is not None:
            continue
        done = store.record(comparison, ("first", "second", "skip")[i % 3])
        write(say, b"record %s\n" % done.id.encode())
        if i % 7 == 3:
            write(say, b"undo %s\n" % store.undo().id.encode())


write = os.write
for line in sys.stdin:
    path, speed, bug = line.rstrip("\n").split("\t")
    child = os.fork()
    if not child:
        write(1, b"started %d\n" % os.getpid())
        try:
            with replaced(label_store, **BUGS[bug]):
                if speed == "slow":
                    journal.os.write = write_in_pieces
                label(path, 1)
        except BaseException as error:
            write(1, f"error {error}\n".replace("\n", " ").encode()[:400] + b"\n")
        os._exit(1)
    os.waitpid(child, 0)
    write(1, b"ended\n")
