"""CUDA graphs of several contenders, replayed in turn so that drift of the machine meets all alike."""

from __future__ import annotations

import statistics
from typing import Any

CALLS, WARM = 20, 2  # calls of a graph; rounds that do not count


def microseconds(calls: dict[str, Any], rounds: int) -> dict[str, float]:
    """Microseconds a call of each contender: the median of the rounds, of the slowest rank. Collective.

    Args:
        calls: name -> a function without arguments that makes one call on the current device.
    """
    import torch
    import torch.distributed as dist

    graphs = {}
    for name, call in calls.items():
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        dist.barrier()
        graphs[name] = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graphs[name], capture_error_mode="thread_local"):
            for _ in range(CALLS):
                call()
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(rounds + WARM):
        for name, graph in graphs.items():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            dist.barrier()
            graph.replay()  # ranks leave the barrier apart; this replay brings them together
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times[name].append(begin.elapsed_time(end) * 1e3 / CALLS)
    mine = {name: statistics.median(t[WARM:]) for name, t in times.items()}
    of_all: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_all, mine)
    return {name: max(other[name] for other in of_all) for name in mine}
