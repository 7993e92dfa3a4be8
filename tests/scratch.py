"""The folder of one test run, and what became of those of runs that were killed.

A run holds a lock in its folder as long as it lives, and so do the processes that it forked. The kernel lets go of it whatever
way they end, and knows it in other containers that share the folder, where process numbers say nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import tempfile
import time
from pathlib import Path

PREFIX = "tpfuse-tests-"
LOCK = "in-use"
YOUNG = 86400.0  # seconds: a folder without a lock may be one that is just being made, or of an older version of these tests
_held = []


def claim(parent: str | None = None) -> str:
    """A new folder that belongs to this process."""
    folder = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    handle = (folder / LOCK).open("w")
    fcntl.flock(handle, fcntl.LOCK_EX)
    _held.append(handle)
    return str(folder)


def remove_stale(parent: str | None = None) -> None:
    """Remove the folders of runs that have ended without doing so. Leaves alone what it may not touch."""
    for folder in Path(parent or tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            if folder.is_dir() and not folder.is_symlink() and not _in_use(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _in_use(folder: Path) -> bool:
    lock = folder / LOCK
    if not lock.exists():
        return time.time() - folder.stat().st_mtime < YOUNG
    with lock.open() as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
