"""Run several ranks on one GPU, or one rank on each of several.

With fewer GPUs than ranks the processes share GPU 0 through NVIDIA MPS, so that their kernels run at the same time, and
the group is gloo: NCCL refuses two ranks on one GPU. With a GPU for every rank the group is NCCL. Kernels, planes and
selection are the same in both. Figures from a shared GPU compare kernels with each other; they are not NVLink latencies.

    from tpfuse.measure.ranks import run_ranks

    def step(rank, world):          # at the top of a module: the child imports it by name
        ...

    if __name__ == "__main__":
        print(run_ranks(step, 4))
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import shutil
import subprocess
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

MPS = "nvidia-cuda-mps-control"


def gpu_count() -> int:
    """GPUs of this machine, asked without creating a CUDA context (a context here would outlive the ranks)."""
    import torch

    return torch.cuda.device_count()


def why_not(world: int) -> str | None:
    """None if ``world`` ranks can run here, else what is missing."""
    gpus = gpu_count()
    if gpus == 0:
        return "no CUDA device"
    if gpus < world and shutil.which(MPS) is None:
        return f"{world} ranks on {gpus} GPU(s) need NVIDIA MPS, and {MPS} is not on the PATH"
    return None


@contextlib.contextmanager
def mps(folder: Path) -> Iterator[dict[str, str]]:
    """An MPS daemon with its pipes and logs in ``folder``; yields the environment of its clients."""
    variables = {"CUDA_MPS_PIPE_DIRECTORY": str(folder / "pipe"), "CUDA_MPS_LOG_DIRECTORY": str(folder / "log")}
    for path in variables.values():
        Path(path).mkdir(parents=True, exist_ok=True)
    env = {**os.environ, **variables}
    subprocess.run([MPS, "-d"], env=env, check=True, timeout=60)
    try:
        yield variables
    finally:
        with contextlib.suppress(Exception):
            subprocess.run([MPS], input=b"quit\n", env=env, timeout=60, check=False)


def _serve(
    fn: Callable[..., Any],
    rank: int,
    world: int,
    args: tuple[Any, ...],
    store: str,
    env: dict[str, str],
    shared: bool,
    timeout: float,
    conn: Any,
) -> None:
    os.environ.update(env)
    # A rank that hangs says where before it is killed.
    faulthandler.dump_traceback_later(max(1.0, timeout - 5), exit=False)
    # transformers' own tensor parallelism asks for what torchrun sets.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    try:
        import torch
        import torch.distributed as dist

        torch.cuda.set_device(0 if shared else rank)
        dist.init_process_group(
            "gloo" if shared else "cuda:nccl,cpu:gloo", init_method=f"file://{store}", rank=rank, world_size=world
        )
        answer = (True, fn(rank, world, *args))
    except BaseException as error:
        answer = (False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    with contextlib.suppress(Exception):
        conn.send(pickle.dumps(answer))
        conn.close()
    # Symmetric memory is torn down rank by rank and a peer may still use it: leave without destructors.
    os._exit(0)


class RankFailed(RuntimeError):
    """Ranks raised, died or did not finish; the message has what each of them said."""


def run_ranks(
    fn: Callable[..., Any],
    world: int,
    *args: Any,
    timeout: float = 300.0,
    env: Mapping[str, str] | None = None,
    may_die: tuple[int, ...] = (),
) -> list[Any]:
    """Run ``fn(rank, world, *args)`` on every rank and return the results in rank order.

    Args:
        fn: a function at the top of a module.
        timeout: seconds for all ranks together.
        env: set in the ranks before they import torch.
        may_die: ranks whose death is part of the test; their result is None.
    Raises:
        RankFailed: the rank and its traceback, or the ranks that had not finished in time; all are killed.
    """
    missing = why_not(world)
    if missing:
        raise RankFailed(f"cannot run {world} ranks here: {missing}")
    shared = gpu_count() < world
    context = multiprocessing.get_context("spawn")
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tpfuse-ranks-")))
        variables = {"OMP_NUM_THREADS": "1"}
        if shared:
            variables |= {
                "TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1",
                # Loading a kernel waits for the device, also for a peer's kernel that waits for this rank.
                "CUDA_MODULE_LOADING": os.environ.get("CUDA_MODULE_LOADING", "EAGER"),
                "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0],
            }
            variables |= stack.enter_context(mps(folder))
        variables |= env or {}
        workers = []
        with _environment(variables):
            for rank in range(world):
                receive, send = context.Pipe(duplex=False)
                process = context.Process(
                    target=_serve,
                    args=(fn, rank, world, args, str(folder / "store"), variables, shared, timeout, send),
                    daemon=False,
                )
                process.start()
                send.close()
                workers.append((process, receive))
        try:
            return _collect(workers, timeout, may_die)
        finally:
            for process, _ in workers:
                process.join(1)
                if process.is_alive():
                    process.kill()
                    process.join(5)


def _collect(workers: list[Any], timeout: float, may_die: tuple[int, ...]) -> list[Any]:
    results: dict[int, Any] = {}
    deadline = time.monotonic() + timeout
    failures: dict[int, str] = {}
    while len(results) < len(workers) and time.monotonic() < deadline:
        for rank, (process, receive) in enumerate(workers):
            if rank in results:
                continue
            try:
                if not receive.poll(0.02):
                    continue
                fine, value = pickle.loads(receive.recv())
            except (EOFError, OSError):
                process.join(1)
                fine, value = rank in may_die, None if rank in may_die else f"died with exit code {process.exitcode}"
            results[rank] = value
            if not fine:
                failures[rank] = str(value)
                deadline = min(deadline, time.monotonic() + 10)  # the others may have a message of their own
    if failures:
        # A rank that lost its peers says so too: the cause is mostly the message that does not speak of a connection.
        order = sorted(failures, key=lambda r: ("onnection" in failures[r], r))
        raise RankFailed("\n".join(f"rank {r} of {len(workers)}: {failures[r]}" for r in order))
    late = [rank for rank in range(len(workers)) if rank not in results]
    if late:
        raise RankFailed(f"ranks {late} of {len(workers)} had not finished after {timeout:.0f} s")
    return [results[rank] for rank in range(len(workers))]


@contextlib.contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
