"""Where the time of an engine's steps goes, seen from inside its workers: host, GPU, and how far apart the ranks are.

An engine calls these functions in each worker (vLLM: ``llm.collective_rpc(watch)``; it sends functions to workers only with
``VLLM_ALLOW_INSECURE_SERIALIZATION=1``). They need a worker that has ``execute_model``.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

_steps: list[tuple[int, float, float, Any, Any]] = []
_profilers: list[Any] = []
_meeting: list[Any] = []


@dataclass(frozen=True)
class Step:
    """One step of one worker, milliseconds.

    Attributes:
        rows: tokens of the step; 0 where the engine only tells its workers what has ended.
        began: when the host began, on a clock that all processes of a machine share.
        host: until the host had launched everything.
        gpu: from the first kernel to the last one, or None without a GPU.
    """

    rows: int
    began: float
    host: float
    gpu: float | None


def watch(worker: Any) -> None:
    """From here on, time every step of a worker. Costs two events a step."""
    original = worker.execute_model
    if hasattr(original, "tpfuse_watched"):
        return

    def timed(*args: Any, **kwargs: Any) -> Any:
        scheduled = args[0] if args else kwargs.get("scheduler_output")
        rows = int(getattr(scheduled, "total_num_scheduled_tokens", 0))
        if _meeting:
            dist.barrier(_meeting[0])
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if torch.cuda.is_available() else [None] * 2
        began = time.perf_counter()
        if events[0] is not None:
            events[0].record()
        try:
            return original(*args, **kwargs)
        finally:
            if events[1] is not None:
                events[1].record()
            _steps.append((rows, began, time.perf_counter(), *events))

    timed.tpfuse_watched = True  # type: ignore[attr-defined]
    worker.execute_model = timed


def meet(worker: Any) -> None:
    """From here on, the ranks wait for each other before every watched step: what is slower without it is their distance."""
    if not _meeting and dist.is_initialized():
        _meeting.append(dist.new_group(backend="gloo"))  # not on the GPU: nothing is launched for it


def take(worker: Any) -> list[dict[str, Any]]:
    """The steps since :func:`watch` or the last call of this, each as the fields of a :class:`Step`."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    found = []
    for rows, began, ended, first, last in _steps:
        gpu = None if first is None else first.elapsed_time(last)
        found.append(asdict(Step(rows, began * 1e3, (ended - began) * 1e3, gpu)))
    _steps.clear()
    return found


def start_profile(worker: Any) -> None:
    """Start torch's profiler in a worker. Where it does not start, :func:`stop_profile` says why: the engine must go on."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    try:
        profiler = torch.profiler.profile(activities=activities)
        profiler.start()
    except Exception as error:
        _profilers.append(f"no profiler: {type(error).__name__}: {str(error)[:100]}")
    else:
        _profilers.append(profiler)


def stop_profile(worker: Any, lines: int = 14) -> list[str]:
    """Stop it, and say in about ``2 * lines`` lines what took the GPU's and the host's time."""
    profiler = _profilers.pop()
    if isinstance(profiler, str):
        return [profiler]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    profiler.stop()
    return [*_gpu(profiler.events(), lines), *_host(profiler.key_averages(), lines)]


def _gpu(events: Sequence[Any], lines: int) -> list[str]:
    spans = [
        (e.time_range.start, e.time_range.end, e.name)
        for e in events
        if e.device_type == torch.autograd.DeviceType.CUDA and e.time_range.end > e.time_range.start
    ]
    if not spans:
        return ["no kernels were seen"]
    busy, reached, gaps = 0.0, spans[0][0], []
    totals: dict[str, list[float]] = {}
    for start, end, name in sorted(spans):
        totals.setdefault(name, []).append(end - start)
        if start > reached:
            gaps.append(start - reached)
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    span = reached - min(s[0] for s in spans)
    longest = ", ".join(f"{gap / 1e3:.2f}" for gap in sorted(gaps, reverse=True)[:5])
    found = [
        f"GPU: {len(spans)} kernels and copies in {span / 1e3:.2f} ms, busy {busy / 1e3:.2f} ms; idle {sum(gaps) / 1e3:.2f} ms "
        f"in {len(gaps)} gaps, the longest {longest} ms"
    ]
    for name, times in sorted(totals.items(), key=lambda item: -sum(item[1]))[:lines]:
        shown = (
            f"{sum(times) / 1e3:8.3f} ms {len(times):5d} x {statistics.median(times):8.1f} us, most {max(times):8.1f}"
        )
        found.append(f"  {shown}  {name[:70]}")
    return found


def _host(averages: Any, lines: int) -> list[str]:
    rows = sorted(averages, key=lambda row: -row.self_cpu_time_total)[:lines]
    found = [
        f"host: {sum(r.self_cpu_time_total for r in averages) / 1e3:.2f} ms of the profiled threads, profiler included"
    ]
    return found + [
        f"  {row.self_cpu_time_total / 1e3:8.3f} ms {row.count:5d} x {row.cpu_time_total / row.count:8.1f} us  {row.key[:70]}"
        for row in rows
    ]


def told(ranks: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    """For each number of rows a line for each rank, medians over its steps, and how far apart the ranks began them."""
    found = []
    for rows in sorted({step["rows"] for steps in ranks for step in steps if step["rows"]}):
        alike = [[step for step in steps if step["rows"] == rows] for steps in ranks]
        for rank, steps in enumerate(alike):
            host = statistics.median(step["host"] for step in steps) if steps else 0.0
            gpus = [step["gpu"] for step in steps if step["gpu"] is not None]
            gpu = f"{statistics.median(gpus):.3f}" if gpus else "no"
            found.append(f"rank {rank}: {len(steps)} steps of {rows} rows, host {host:.3f} ms, GPU {gpu} ms")
        if len({len(steps) for steps in alike}) == 1 and len(alike) > 1:
            skews = [max(b) - min(b) for b in ([s["began"] for s in step] for step in zip(*alike, strict=True))]
            found.append(f"ranks began such a step {statistics.median(skews):.3f} ms apart, at most {max(skews):.3f}")
    return found
