"""Start gloo ranks as processes for tests.

``run_ranks`` starts fresh processes for one function. ``RankPool`` keeps them, so that a module of tests pays for the
first compile once. Processes start with torch and transformers imported (see ``warm``):

    from ranks import RankPool, run_ranks

    def add(rank, world_size, x):            # module level: the child imports it by name
        ...

    run_ranks(add, 2, 1.0)                   # [result of rank 0, result of rank 1]

    @pytest.fixture(scope="module")
    def pool():
        with RankPool(4) as pool:
            yield pool                       # pool.run(add, 1.0)
"""

from __future__ import annotations

import datetime
import os
import pickle
import queue
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import warm

# How long the other ranks may still take once one has failed: long enough for them to fail with a message of their own.
GRACE_SECONDS = 3.0
# Against hangs: shorter than the timeout of a test, so that the ranks are named, and long enough for a busy machine.
TIMEOUT = 800.0


class RankFailure(Exception):
    """Cause of an exception that a rank raised; its text is the rank's own traceback."""


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = TIMEOUT,
    env: Mapping[str, str] | None = None,
) -> list[Any]:
    """Run ``fn(rank, world_size, *args)`` in ``world_size`` fresh processes; return their results in rank order.

    Args:
        fn: a function at the top of a module.
        world_size: number of processes; the default group is gloo over a file store, so no port is needed.
        args: picklable.
        timeout: seconds for all ranks together, start-up included.
        env: set in the children before they import tpfuse or a module of tests.
    Raises:
        TimeoutError: names the ranks that had not finished; all are killed.
        Exception: what a rank raised, caused by a :class:`RankFailure` with the rank's traceback.
    """
    with RankPool(world_size, env=env) as pool:
        return pool.run(fn, *args, timeout=timeout)


class RankPool:
    """Ranks that live for many functions. A failure or a hang ends them; the next ``run`` starts new ones.

    Args:
        world_size: number of processes.
        env: set in the children before they import tpfuse or a module of tests.
        alone: only rank 0 runs, in a fake group of ``world_size`` ranks whose reductions give back their input. For what
            depends on the graph alone: it costs a compile on one rank, not on all.
    """

    def __init__(self, world_size: int, env: Mapping[str, str] | None = None, alone: bool = False):
        self.world_size = 1 if alone else world_size
        self.group_size = world_size
        self.alone = alone
        self.env = dict(env or {})
        self._context = warm.context()
        self._processes: list[Any] = []
        self._tasks: list[Any] = []
        self._results: Any = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> RankPool:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
        """Run ``fn(rank, world_size, *args)`` on every rank. See :func:`run_ranks`."""
        if not self._processes:
            self._start()
        for task in self._tasks:
            task.put((fn, args))
        return self._collect(timeout)

    def close(self) -> None:
        """End all ranks: politely, then by force."""
        for task in self._tasks:
            task.put(None)
        deadline = time.monotonic() + 5
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
        self._kill()

    def _start(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="ranks-")
        store = os.path.join(self._folder.name, "store")
        self._results = self._context.Queue()
        self._tasks = [self._context.SimpleQueue() for _ in range(self.world_size)]
        self._processes = [
            self._context.Process(
                target=_serve,
                args=(rank, self.group_size, None if self.alone else store, self._tasks[rank], self._results),
                daemon=True,
            )
            for rank in range(self.world_size)
        ]
        with warm.environment(self.env):
            for process in self._processes:
                process.start()

    def _collect(self, timeout: float) -> list[Any]:
        results: dict[int, Any] = {}
        failures: dict[int, tuple[BaseException | None, str]] = {}
        deadline = time.monotonic() + timeout
        while len(results) + len(failures) < self.world_size and time.monotonic() < deadline:
            try:
                rank, failed, payload = self._results.get(timeout=0.2)
            except queue.Empty:
                waiting = [r for r in range(self.world_size) if r not in results and r not in failures]
                for rank in waiting:
                    code = self._processes[rank].exitcode
                    if code is not None:
                        failures[rank] = (None, f"the process ended with exit code {code}")
                if failures:
                    deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                continue
            if not failed:
                results[rank] = pickle.loads(payload)
                continue
            failures[rank] = payload
            deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if failures:
            self._kill()
            rank = min(failures)
            error, text = failures[rank]
            others = f" (ranks {sorted(failures)} failed)" if len(failures) > 1 else ""
            cause = RankFailure(f"rank {rank} of {self.world_size}{others}:\n{text}")
            raise (error or RuntimeError(f"rank {rank} of {self.world_size} failed: {text}")) from cause
        if len(results) < self.world_size:
            unfinished = [r for r in range(self.world_size) if r not in results]
            self._kill()
            raise TimeoutError(f"ranks {unfinished} of {self.world_size} had not finished after {timeout:g} s")
        return [results[rank] for rank in range(self.world_size)]

    def _kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
            process.join()
        self._processes, self._tasks, self._results = [], [], None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


def _join(rank: int, world_size: int, store: str | None) -> None:
    import torch.distributed as dist

    if store is None:
        from tpfuse import compat

        compat.start_fake_group(world_size, rank)
        return
    dist.init_process_group(
        "gloo",
        store=dist.FileStore(store, world_size),
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=300),
    )


def _serve(rank: int, world_size: int, store: str | None, tasks: Any, results: Any) -> None:
    """A rank's main loop: join the default group, then run functions until told to stop."""
    import torch

    torch.set_num_threads(1)
    try:
        _join(rank, world_size, store)
    except Exception as error:
        results.put((rank, True, (_picklable(error), traceback.format_exc())))
        return
    while (task := tasks.get()) is not None:
        fn, args = task
        try:
            # Pickled here, so that a result which cannot be pickled is this rank's error and not a silent loss.
            results.put((rank, False, pickle.dumps(fn(rank, world_size, *args))))
        except BaseException as error:
            results.put((rank, True, (_picklable(error), traceback.format_exc())))
    results.close()
    results.join_thread()
    # Tearing down gloo waits for peers that may be gone already.
    os._exit(0)


def _picklable(error: BaseException) -> BaseException | None:
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:
        return None
