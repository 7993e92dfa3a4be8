"""A progress bar on stderr for work that takes seconds; silent where stderr is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def bar() -> Iterator[Callable[[str, int, int], None]]:
    """A function (stage, done, of) that moves the bar. It disappears at the end."""
    console = Console(file=sys.stderr)
    columns = (TextColumn("{task.description:18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as shown:
        task = shown.add_task("starting", total=1)

        def tick(stage: str, done: int, of: int) -> None:
            shown.update(task, description=stage, completed=done, total=of)

        yield tick
