"""CUDA graphs of calls on every rank: what a replay gives is what eager calls give."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from interpreted_ranks import same_bits
from tpfuse.ops import raise_if_failed

T = TypeVar("T")


def captured(step: Callable[[], T]) -> tuple[torch.cuda.CUDAGraph, T]:
    """A CUDA graph of ``step``, which runs once before, and what its replays write into."""
    step()
    torch.cuda.synchronize()
    dist.barrier()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    return graph, out


def replays_equal_eager(step: Callable[[], list[torch.Tensor]], renew: Callable[[], Any]) -> list[str]:
    """Capture ``step``, then twenty times ``renew`` its inputs in place and compare a replay with a call; complaints."""
    graph, out = captured(step)
    complaints = []
    for n in range(20):
        renew()
        graph.replay()
        found = [t.clone() for t in out]
        for number, (a, b) in enumerate(zip(found, step(), strict=True)):
            if not same_bits(a, b):
                complaints.append(f"replay {n}: result {number} differs from an eager call")
    torch.cuda.synchronize()
    raise_if_failed()
    return complaints[:10]
