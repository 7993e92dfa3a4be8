"""Folders of killed test runs go when the next run starts; those of running ones stay."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import scratch

HOLD = """
import sys, time
sys.path.insert(0, sys.argv[1])
import scratch
print(scratch.claim(sys.argv[2]), flush=True)
time.sleep(600)
"""


def test_the_folder_of_a_killed_run_goes_and_that_of_a_running_one_stays(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(Path(scratch.__file__).parent), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
    ) as run:
        assert run.stdout is not None
        folder = Path(run.stdout.readline().strip())
        (folder / "kernel.py").write_text("")
        scratch.remove_stale(str(tmp_path))
        assert folder.is_dir(), "its run is alive"
        run.kill()
    scratch.remove_stale(str(tmp_path))
    assert not folder.exists()


def test_this_run_s_own_folder_stays(tmp_path):
    mine = Path(scratch.claim(str(tmp_path)))
    scratch.remove_stale(str(tmp_path))
    assert mine.is_dir()


def test_a_folder_without_a_lock_goes_when_it_is_old(tmp_path):
    young, old = (tmp_path / f"{scratch.PREFIX}{name}" for name in ("young", "old"))
    other = tmp_path / "somebody-else"
    for folder in (young, old, other):
        folder.mkdir()
    before = time.time() - 2 * scratch.YOUNG
    for folder in (old, other):
        os.utime(folder, (before, before))
    scratch.remove_stale(str(tmp_path))
    assert sorted(tmp_path.iterdir()) == [other, young]


def test_the_caches_of_this_run_are_in_such_a_folder():
    assert Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]).name.startswith(scratch.PREFIX)
    assert (Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / scratch.LOCK).exists()
