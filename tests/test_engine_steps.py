"""Where the time of an engine's steps goes: what is counted, and what is said about it."""

from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from ranks import run_ranks

from tpfuse.measure import engine_steps


class Worker:
    def execute_model(self, scheduler_output: Any) -> int:
        time.sleep(0.002 * scheduler_output.total_num_scheduled_tokens)
        return scheduler_output.total_num_scheduled_tokens


def step(worker: Worker, rows: int) -> int:
    return worker.execute_model(SimpleNamespace(total_num_scheduled_tokens=rows))


def test_each_step_is_timed_once_and_taken_once() -> None:
    worker = Worker()
    engine_steps.watch(worker)
    engine_steps.watch(worker)  # again: not timed twice
    assert [step(worker, rows) for rows in (5, 0)] == [5, 0]
    steps = engine_steps.take(worker)
    assert [s["rows"] for s in steps] == [5, 0]
    assert steps[0]["host"] >= 10 and steps[1]["began"] > steps[0]["began"]
    assert engine_steps.take(worker) == []


def test_a_step_that_fails_is_timed_and_fails() -> None:
    worker = Worker()
    worker.execute_model = lambda scheduled: 1 / 0  # type: ignore[method-assign]
    engine_steps.watch(worker)
    try:
        step(worker, 3)
    except ZeroDivisionError:
        pass
    else:
        raise AssertionError("the error was lost")
    assert [s["rows"] for s in engine_steps.take(worker)] == [3]


def test_told_keeps_numbers_of_rows_and_ranks_apart() -> None:
    def made(rows: int, began: float, host: float, gpu: float | None) -> dict[str, Any]:
        return {"rows": rows, "began": began, "host": host, "gpu": gpu}

    first = [made(512, 10.0, 4.0, 8.0), made(0, 20.0, 0.1, 0.0), made(512, 30.0, 6.0, 10.0), made(1, 40.0, 1.0, 3.0)]
    second = [made(512, 12.0, 5.0, 7.0), made(0, 20.0, 0.1, 0.0), made(512, 31.0, 5.0, 9.0), made(1, 40.5, 1.0, None)]
    assert engine_steps.told([first, second]) == [
        "rank 0: 1 steps of 1 rows, host 1.000 ms, GPU 3.000 ms",
        "rank 1: 1 steps of 1 rows, host 1.000 ms, GPU no ms",
        "ranks began such a step 0.500 ms apart, at most 0.500",
        "rank 0: 2 steps of 512 rows, host 5.000 ms, GPU 9.000 ms",
        "rank 1: 2 steps of 512 rows, host 5.000 ms, GPU 8.000 ms",
        "ranks began such a step 1.500 ms apart, at most 2.000",
    ]


def test_the_profile_of_a_worker_names_what_it_ran() -> None:
    engine_steps.start_profile(None)
    torch.ones(64, 64) @ torch.ones(64, 64)
    lines = engine_steps.stop_profile(None)
    if not torch.cuda.is_available():
        assert lines[0] == "no kernels were seen"
    assert any("aten::mm" in line for line in lines)


def test_a_profiler_that_does_not_start_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**kwargs: Any) -> None:
        raise RuntimeError("no CUPTI here")

    monkeypatch.setattr(torch.profiler, "profile", broken)
    engine_steps.start_profile(None)
    assert engine_steps.stop_profile(None) == ["no profiler: RuntimeError: no CUPTI here"]


def test_gpu_time_is_the_union_of_overlapping_kernels() -> None:
    def kernel(start: float, end: float, name: str) -> SimpleNamespace:
        return SimpleNamespace(
            time_range=SimpleNamespace(start=start, end=end), name=name, device_type=torch.autograd.DeviceType.CUDA
        )

    lines = engine_steps._gpu([kernel(0, 1000, "a"), kernel(500, 2000, "b"), kernel(5000, 6000, "a")], 5)
    assert lines[0] == "GPU: 3 kernels and copies in 6.00 ms, busy 3.00 ms; idle 3.00 ms in 1 gaps, the longest 3.00 ms"
    assert "2.000 ms     2 x" in lines[1] and lines[1].endswith("a")


LATE = 0.6  # seconds that one rank comes late


def _apart(rank: int, world_size: int, met: bool) -> list[dict[str, Any]]:
    worker = Worker()
    engine_steps.watch(worker)
    if met:
        engine_steps.meet(worker)
    torch.distributed.barrier()
    time.sleep(LATE * rank)
    step(worker, 1)
    return engine_steps.take(worker)


@pytest.mark.ranks
@pytest.mark.parametrize("met", [False, True])
def test_ranks_that_meet_begin_a_step_together(met: bool) -> None:
    first, second = (steps[0]["began"] for steps in run_ranks(_apart, 2, met))
    apart = (second - first) / 1e3
    assert apart < LATE / 2 if met else apart > LATE / 2
