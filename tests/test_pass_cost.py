"""The pass stays cheap: CPU time per site, and linear growth. The wall-clock table is ``benchmarks/pass_cost.py``."""

from __future__ import annotations

import copy
import sys
import time
from pathlib import Path

import graphs
import pytest
import torch
from tpfuse.passes import PassOptions, fuse

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import pass_cost

pytestmark = pytest.mark.long  # not on every save


def cpu_seconds(layers: int) -> tuple[float, int]:
    """Least CPU time of three runs on a warm memo, and the number of fused sites."""
    gm = pass_cost.capture(layers)
    fuse(copy.deepcopy(gm), PassOptions())
    times = []
    for _ in range(3):
        fresh = copy.deepcopy(gm)
        start = time.process_time()
        report = fuse(fresh, PassOptions())
        times.append(time.process_time() - start)
    return min(times), len(report.fused)


def test_the_pass_is_cheap_and_linear():
    graphs.start_fake_group(pass_cost.WORLD)
    try:
        small, fused_small = cpu_seconds(2)
        large, fused_large = cpu_seconds(8)
    finally:
        torch.distributed.destroy_process_group()
    assert (fused_small, fused_large) == (4, 16)
    assert large / fused_large < 6e-3, f"{large / fused_large * 1e3:.1f} ms of CPU time a site"
    assert large < 4 * 2 * small, f"4 times the layers took {large / small:.1f} times the CPU time"


def test_a_residual_stream_of_one_row_is_read_as_fast_as_one_of_several():
    """There each sublayer adds what may be a vector, and a decoder without norms before its sublayers has nothing in between."""

    def decoder(e, xs, ws):
        h = graphs.all_reduce(e)
        for x, w in zip(xs, ws, strict=False):
            h = h + norm(graphs.all_reduce(torch.sigmoid(h) * x), w)
        return norm(h, ws[-1])

    def norm(y, w):
        return w * (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6))

    graphs.start_fake_group(2)
    try:
        found = []
        for rows in (2, 1):
            xs = [torch.randn(1, rows, 8) for _ in range(4)]
            gm = graphs.trace(decoder, (torch.randn(1, rows, 8), xs, [torch.rand(8) for _ in range(5)]))
            start = time.process_time()
            report = fuse(gm, PassOptions(policy="all"))
            found.append([(site.fused, site.reason, site.pattern) for site in report.sites])
            assert time.process_time() - start < 20
    finally:
        torch.distributed.destroy_process_group()
    embedding = (False, "extra-reader", "all_reduce")
    assert found == [[embedding, *[(True, None, "all_reduce+rms_norm+add")] * 4]] * 2
