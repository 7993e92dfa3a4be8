"""A dump is complete, readable by people and tools, never in the way, and never overwritten."""

from __future__ import annotations

import ast
import json
import logging
import re
import stat
import threading
from dataclasses import fields
from pathlib import Path

import jsonschema
import pytest
import torch
from browser.sample import graphs, report, write_dump
from torch.fx import Graph, GraphModule
from tpfuse.passes.reasons import Reason
from tpfuse.passes.report import GraphReport, LayerAudit, ReportFormatError, Site

import tpfuse.inspect
from tpfuse.inspect import code, dump, nodes

SCHEMA = json.loads((Path(tpfuse.inspect.__file__).parent / "report.schema.json").read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dump(tmp_path_factory.mktemp("dump"), layers=3, world=2)


def test_a_dump_has_five_files_for_each_rank_and_graph(folder):
    assert sorted(p.name for p in folder.iterdir()) == ["rank-0", "rank-1"]
    for rank in folder.iterdir():
        assert [p.name for p in rank.iterdir()] == ["graph-0"]
        names = sorted(p.name for p in (rank / "graph-0").iterdir())
        assert names == ["after.py", "before.py", "graph.svg", "nodes.json", "report.json"]


def test_the_python_parses_and_shows_sites_sources_and_shapes(folder):
    for name in ("before.py", "after.py"):
        text = (folder / "rank-0" / "graph-0" / name).read_text()
        ast.parse(text)
        assert "# site 1: layer 0 attention, fused, ranks 0" in text
        assert "modeling_sample.py:281: hidden_states = residual + hidden_states" in text
        assert '"bf16[1, 8, 4096]"' in text
    assert "tpfuse.all_reduce_add_rms_norm" in text


def test_the_report_validates_against_the_schema_and_round_trips(folder):
    text = (folder / "rank-1" / "graph-0" / "report.json").read_text()
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(json.loads(text), SCHEMA)
    assert GraphReport.from_json(text) == report(layers=3, rank=1, world=2, attn_tp=1)


@pytest.mark.parametrize("change", [{"reason": "Because it is"}, {"fused": False}, {"extra": 1}, {"role": "router"}])
def test_the_schema_refuses_what_is_not_a_report(change):
    data = report().to_dict()
    data["sites"][0].update(change)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(json.loads(json.dumps(data)), SCHEMA)


def test_the_schema_names_every_field_and_admits_every_reason():
    site = SCHEMA["$defs"]["site"]
    assert set(SCHEMA["properties"]) == {f.name for f in fields(GraphReport)} | {"schema"}
    assert set(site["properties"]) == {f.name for f in fields(Site)}
    assert set(site["required"]) == set(site["properties"]) - {"admitted"}  # which reports of earlier versions lack
    assert set(SCHEMA["$defs"]["layer"]["properties"]) == {f.name for f in fields(LayerAudit)}
    assert all(re.fullmatch(site["properties"]["reason"]["pattern"], str(code)) for code in Reason)


def test_every_site_keeps_its_nodes_before_and_after(folder):
    found = nodes.from_json((folder / "rank-0" / "graph-0" / "nodes.json").read_text())
    made = report(layers=3, rank=0, world=2, attn_tp=1)
    assert len(found) == len(made.sites)
    for site, region in zip(made.sites, found, strict=True):
        assert [line.name for line in region.before][: len(site.nodes)] == site.nodes
        assert [line.name for line in region.after][:1] == ([site.replaced_by] if site.fused else site.nodes[:1])
        assert region.before[0].size == 8 * 4096 * 2
        assert region.before[0].source == site.source


def test_nodes_of_a_newer_schema_or_of_something_else_are_refused():
    with pytest.raises(ReportFormatError, match=r"schema 99.*upgrade"):
        nodes.from_json('{"schema": 99, "regions": []}')
    for text in ("[]", "{}", "no json"):
        with pytest.raises(ReportFormatError, match="not the nodes"):
            nodes.from_json(text)


def test_an_existing_dump_is_kept_and_the_new_one_takes_the_next_name(tmp_path):
    made = report(layers=1)
    for _ in range(3):
        dump.write(tmp_path, made, *graphs(made))
    assert sorted(p.name for p in (tmp_path / "rank-0").iterdir()) == ["graph-0", "graph-0.2", "graph-0.3"]


def test_writers_at_the_same_time_do_not_collide(tmp_path):
    made = report(layers=1)
    pair = graphs(made)
    threads = [threading.Thread(target=dump.write, args=(tmp_path, made, *pair)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    folders = list((tmp_path / "rank-0").iterdir())
    assert len(folders) == 8
    assert all(len(list(f.iterdir())) == 5 for f in folders)


def test_the_folder_is_readable_by_other_users(folder):
    assert stat.S_IMODE((folder / "rank-0" / "graph-0").stat().st_mode) == 0o755


def test_a_dump_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    made = report(layers=1)
    with caplog.at_level(logging.WARNING, logger="tpfuse"):
        dump.write(blocked, made, *graphs(made))
    assert "could not dump graph-0" in caplog.text
    assert blocked.read_text() == "not a folder"


def test_a_failure_in_the_middle_leaves_nothing(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(dump.os, "rename", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    made = report(layers=1)
    dump.write(tmp_path, made, *graphs(made))
    assert "disk full" in caplog.text
    assert list((tmp_path / "rank-0").iterdir()) == []


def test_arguments_without_a_literal_still_parse():
    class Opaque:
        def __repr__(self):
            return "<opaque at 0x0>"

    graph = Graph()
    x = graph.placeholder("x")
    a = graph.call_function(torch.ops.aten.add.Tensor, (x, float("inf")), {"alpha": 1})
    b = graph.call_function(
        torch.ops.aten._to_copy.default, (a,), {"dtype": torch.bfloat16, "device": torch.device("cpu")}
    )
    c = graph.call_function(torch.ops.aten.slice.Tensor, (b, 0, slice(0, None), (1,)))
    d = graph.create_node("get_attr", "layers.0.weight")
    graph.output((c, d))
    root = torch.nn.Module()
    root.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2)])
    gm = GraphModule(root, graph)
    c.args = (
        *c.args,
        [Opaque()],
        {"k": Opaque()},
    )  # as Dynamo's graphs hold device meshes; FX's own code would not parse
    text = code.python(gm)
    ast.parse(text)
    assert "getattr(self.layers, '0').weight" in text
    assert "dtype=torch.bfloat16, device=torch.device('cpu')" in text
