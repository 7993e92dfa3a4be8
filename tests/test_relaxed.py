"""Relaxed numerics: the page's table is what benchmarks/relaxed.py prints; no rewrite is less accurate than the model."""

from __future__ import annotations

import re
from pathlib import Path

import graphs
import pytest
import torch
import torch.distributed as dist
from tpfuse.passes import PassOptions

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_of_the_page_is_what_the_command_measures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import relaxed

    measured = relaxed.lines(4096, 256, torch.bfloat16)
    after = (ROOT / "docs" / "matching.md").read_text().partition("## Relaxed numerics\n")[2].partition("\n## ")[0]
    shown = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in re.findall(r"^\| .*\|$", after, re.MULTILINE)
    ]
    assert [name for name, *_ in shown[1:]] == [line.name for line in measured]
    for (_, model, other, changed), line in zip(shown[1:], measured, strict=True):
        assert float(model) == pytest.approx(line.model, rel=0.01)
        assert float(other) == pytest.approx(line.relaxed, rel=0.01)
        assert float(changed.rstrip("%")) / 100 == pytest.approx(line.changed, abs=0.005)
        assert line.relaxed <= 1.01 * line.model, line


def test_nothing_else_is_relaxed():
    """Another rewrite that changes rounding belongs into the table."""
    uses = [
        f"{path.name}: {line.strip()}"
        for path in sorted((ROOT / "passes").glob("*.py"))
        for line in path.read_text().splitlines()
        if re.search(r"\bif relaxed\b", line)
    ]
    assert uses == [
        "layer_norms.py: if relaxed and close is not None:",  # the table's first line, of the other norm
        "norms.py: if relaxed and close is not None:",
        "region.py: if relaxed and not terms and block is None and not rounded:",
    ]


def test_verify_compares_values_where_bits_may_differ():
    graphs.start_fake_group(2)
    try:

        def f(x, r, w):
            h = r + graphs.all_reduce(x)
            mean = h.pow(2).float().mean(-1, keepdim=True)
            return w * (h.float() * torch.rsqrt(mean + 1e-6)).to(h.dtype)

        args = torch.randn(4, 64).bfloat16(), torch.randn(4, 64).bfloat16(), torch.rand(64).bfloat16()
        _, report = graphs.fused_copy(graphs.trace(f, args), PassOptions("all", "relaxed", verify=True))
        assert len(report.fused) == 1 and "relaxed" in report.sites[0].detail
    finally:
        dist.destroy_process_group()
