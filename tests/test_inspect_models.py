"""Dump, report and page of sixteen transformers architectures, compiled on two gloo ranks."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path

import jsonschema
import models
import pytest
import torch
from ranks import RankPool
from test_inspect_dump import SCHEMA
from tpfuse.passes.report import GraphReport

from tpfuse.inspect import load, page

pytest.importorskip("transformers", reason="needs the extra tpfuse[hf]")

WORLD = 2


def compiled_with_dump(rank, world_size, checkpoint, dump):
    """One forward pass; returns the reports of this rank as JSON."""
    import tpfuse

    model = models.sharded(checkpoint, world_size)
    torch.compiler.reset()
    tpfuse.clear_reports()
    options = {"tpfuse.inner": "aot_eager", "tpfuse.dump": dump}
    with torch.no_grad():
        torch.compile(model, backend="tpfuse", dynamic=False, options=options)(torch.arange(10).view(2, 5) + 3)
    return [report.to_json() for report in tpfuse.reports()]


@pytest.fixture(scope="module")
def pool():
    with RankPool(WORLD) as pool:
        yield pool


def all_reduces(path: Path) -> list[str]:
    """Names that are assigned an all-reduce in a dumped graph, by reading it as Python."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Call):
            called = ast.unparse(node.value.func)
            if called.startswith("torch.ops._c10d_functional.all_reduce"):
                found.append(ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node.targets[0]))
    return found


def data_of(html: str) -> dict:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    return json.loads(text)


@pytest.mark.slow  # of a small graph the quick run has it in test_inspect_dump.py
@pytest.mark.ranks
@pytest.mark.parametrize("name", models.MODELS)
def test_the_dump_holds_every_all_reduce_once_and_the_page_shows_it(name, pool, tmp_path):
    models.save(name, str(tmp_path / "checkpoint"))
    folder = tmp_path / "dump"
    reports = pool.run(compiled_with_dump, str(tmp_path / "checkpoint"), str(folder))

    dump = load.read(folder)
    assert sorted({graph.report.rank for graph in dump.graphs}) == list(range(WORLD))
    for rank in range(WORLD):
        graphs = dump.of_rank(rank)
        assert len(graphs) == len(reports[rank])
        for graph, kept in zip(graphs, reports[rank], strict=True):
            text = (graph.folder / "report.json").read_text()
            jsonschema.validate(json.loads(text), SCHEMA)
            assert GraphReport.from_json(text) == GraphReport.from_json(kept) == graph.report
            sites = graph.report.sites
            before, after = all_reduces(graph.folder / "before.py"), all_reduces(graph.folder / "after.py")
            assert sorted(site.nodes[0] for site in sites) == sorted(before)
            assert sorted(site.nodes[0] for site in sites if not site.fused) == sorted(after)
            for site, region in zip(sites, graph.regions, strict=True):
                assert region.before[0].name == site.nodes[0]
                assert region.after[0].name == (site.replaced_by if site.fused else site.nodes[0])
                assert site.source

    shown = data_of(page.page(dump))
    assert sum(len(graph["variants"][0]["sites"]) for graph in shown["graphs"]) == len(
        [site for graph in dump.of_rank(0) for site in graph.report.sites]
    )
    for graph in shown["graphs"]:
        assert graph["differences"] == []
        for variant in graph["variants"]:
            assert all(site["before"] and site["after"] and site["source"] for site in variant["sites"])
            # A sum that the op of another one makes has no norm of its own, and says so.
            assert all(site["flavour"] or site["detail"] for site in variant["sites"])
            whole = [site for site in variant["sites"] if site["fused"] and "one op with" not in site["detail"]]
            assert whole and all(site["flavour"] for site in whole)
