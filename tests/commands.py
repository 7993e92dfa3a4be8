"""``python ARGUMENTS`` as a user runs it, in a process that has imported torch already: two seconds less for each command.

    done = run_python("-m", "tpfuse.cli", "doctor", env={"TPFUSE_PDL": "bogus"})   # done.returncode, .stdout, .stderr
    both = [Command("-c", code, env={"RANK": str(rank)}) for rank in range(2)]     # at the same time
    found = [command.wait() for command in both]

Nothing of tpfuse is imported before. What looks at how torch or an extra is imported needs ``subprocess``.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import warm


def context() -> Any:
    """Of warm processes; of fresh ones where torch has CUDA, which the server of the warm ones may have touched."""
    return warm.context(tpfuse=False) if torch.version.cuda is None else multiprocessing.get_context("spawn")


class Command:
    """A started command. ``env`` is added to the environment of this process."""

    def __init__(self, *arguments: object, env: Mapping[str, str] | None = None) -> None:
        self.arguments = [str(part) for part in arguments]
        self._folder = tempfile.TemporaryDirectory(prefix="command-")
        self._files = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        with warm.environment(env or {}):
            self._process = context().Process(target=_run, args=(self.arguments, self._files))
            self._process.start()

    def wait(self, timeout: float = 800) -> subprocess.CompletedProcess[str]:
        """What it printed and its exit code, as of :func:`subprocess.run`.

        Raises:
            subprocess.TimeoutExpired: it had not ended in time, and is killed.
        """
        self._process.join(timeout)
        late = self._process.exitcode is None
        if late:
            self._process.kill()
            self._process.join()
        printed = [file.read_text() if file.exists() else "" for file in self._files]
        self._folder.cleanup()
        if late:
            raise subprocess.TimeoutExpired(self.arguments, timeout, *printed)
        return subprocess.CompletedProcess(self.arguments, self._process.exitcode, *printed)


def run_python(
    *arguments: object, env: Mapping[str, str] | None = None, timeout: float = 800
) -> subprocess.CompletedProcess[str]:
    """Start a command and wait for it."""
    return Command(*arguments, env=env).wait(timeout)


def _run(arguments: list[str], files: list[Path]) -> None:
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # noqa: SIM115  (until it ends)
    first, *rest = arguments
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path.insert(0, os.path.dirname(first))
        runpy.run_path(first, run_name="__main__")
