"""Reports reach torch's structured trace when it is on."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from browser.sample import report

from tpfuse.inspect import artifact

pytestmark = pytest.mark.long  # not on every save

PROGRAM = """
import sys; sys.path.insert(0, sys.argv[1])
from browser.sample import report
from tpfuse.inspect import artifact
artifact.record(report())
"""


def test_a_report_is_an_artifact_of_the_trace(tmp_path):
    command = [sys.executable, "-c", PROGRAM, str(Path(__file__).parent)]
    subprocess.run(command, env={**os.environ, "TORCH_TRACE": str(tmp_path)}, check=True)
    (log,) = tmp_path.glob("*.log")
    assert '"artifact": {"name": "tpfuse_graph-0", "encoding": "json"}' in log.read_text()
    _, _, after = log.read_text().partition('"tpfuse_graph-0"')
    payload = itertools.takewhile(lambda line: line.startswith("\t"), after.splitlines()[1:])
    assert json.loads("".join(line.strip() for line in payload))["graph_id"] == "graph-0"


def test_it_never_fails(monkeypatch):
    import torch._logging

    monkeypatch.delattr(torch._logging, "trace_structured")
    artifact.record(report())
