"""The command line: what it prints, its exit codes, and one clear line for each mistake."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from browser.sample import report, write_dump
from commands import run_python
from typer.testing import CliRunner

from tpfuse.inspect import dump
from tpfuse.inspect.commands import app

pytestmark = pytest.mark.long  # not on every save


@dataclass(frozen=True)
class Result:
    returncode: int
    stdout: str
    stderr: str


def tpfuse(*arguments) -> Result:
    """Run a command in this process."""
    result = CliRunner().invoke(app, [str(part) for part in arguments], prog_name="tpfuse", env={"COLUMNS": "120"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return Result(result.exit_code, result.stdout, result.stderr)


def tpfuse_process(*arguments, env=None) -> Result:
    """Run the command line in a process of its own, which has torch already."""
    done = run_python("-m", "tpfuse.cli", *arguments, env={"COLUMNS": "120", **(env or {})})
    return Result(done.returncode, done.stdout, done.stderr)


def tpfuse_anew(*arguments, env=None, timeout=800) -> Result:
    """Run the command line in a process that has imported nothing."""
    command = [sys.executable, "-m", "tpfuse.cli", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "120", **(env or {})}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, check=False)
    return Result(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_dump(tmp_path_factory.mktemp("dump"), layers=3, world=2)


def refused(result, *parts):
    """One line on stderr with these parts, nothing on stdout, exit code 2."""
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 2, result
    assert result.stdout == ""
    assert len(lines) == 1, result.stderr
    for part in parts:
        assert part in lines[0]


def test_view_writes_a_page_into_the_folder_and_prints_its_path(folder):
    result = tpfuse_process("view", folder)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(folder / "index.html")
    html = (folder / "index.html").read_text()
    assert "http://" not in html
    assert "https://" not in html
    assert html.count("modeling_sample.py:281") >= 3


def test_view_can_write_elsewhere_and_print_tables(folder, tmp_path):
    target = tmp_path / "page.html"
    assert tpfuse("view", folder, "-o", target).returncode == 0
    assert target.stat().st_size > 10_000
    shown = tpfuse("view", folder, "--table").stdout
    assert shown.count("all-reduces") == 2
    assert "kept: mean-dim" in shown


def test_a_missing_folder(tmp_path):
    refused(tpfuse("view", tmp_path / "absent"), "tpfuse view:", "absent does not exist", "TPFUSE_DUMP")


def test_a_folder_that_is_no_dump(tmp_path):
    refused(tpfuse("view", tmp_path), "is not a tpfuse dump", "TPFUSE_DUMP")


def test_a_file_instead_of_a_folder(folder):
    refused(tpfuse("view", folder / "rank-0" / "graph-0" / "report.json"), "is a file")


def test_one_graph_of_a_dump(folder):
    refused(tpfuse("view", folder / "rank-0" / "graph-0"), "give the folder above rank-*")


def test_a_report_of_a_newer_schema(tmp_path):
    graph = tmp_path / "rank-0" / "graph-0"
    graph.mkdir(parents=True)
    (graph / dump.REPORT).write_text(json.dumps({**report().to_dict(), "schema": 99}))
    refused(tpfuse("view", tmp_path), "report.json", "schema 99", "upgrade tpfuse")


def test_a_report_that_is_broken(tmp_path):
    graph = tmp_path / "rank-0" / "graph-0"
    graph.mkdir(parents=True)
    (graph / dump.REPORT).write_text("{")
    refused(tpfuse("view", tmp_path), "not a tpfuse report")


def test_a_page_that_cannot_be_written(folder, tmp_path):
    refused(tpfuse("view", folder, "-o", tmp_path / "absent" / "page.html"), "cannot be written")


def test_the_version():
    import tpfuse as package

    assert tpfuse("--version").stdout.strip() == f"tpfuse {package.__version__}"


def test_without_the_extra_it_names_it(tmp_path):
    (tmp_path / "typer.py").write_text("raise ImportError('No module named typer')")
    refused(tpfuse_anew("view", tmp_path, env={"PYTHONPATH": str(tmp_path)}), "pip install 'tpfuse[inspect]'")


def test_without_jinja2_the_page_names_the_extra(folder, tmp_path):
    (tmp_path / "jinja2.py").write_text("raise ImportError('No module named jinja2')")
    refused(
        tpfuse_anew("view", folder, env={"PYTHONPATH": str(tmp_path)}),
        "tpfuse view:",
        "pip install 'tpfuse[inspect]'",
    )


def test_without_transformers_explain_names_that_extra(tmp_path):
    (tmp_path / "transformers.py").write_text(
        "raise ImportError(\"No module named 'transformers'\", name='transformers')"
    )
    result = tpfuse_anew("explain", "llama", "--tp-size", 2, env={"PYTHONPATH": str(tmp_path)})
    refused(result, "tpfuse explain: No module named 'transformers'; pip install 'tpfuse[hf]'")


@pytest.mark.parametrize(("option", "value"), [("--worlds", "two"), ("--hidden", "0"), ("--rows", "1;2")])
def test_bench_names_the_option_that_is_wrong(option, value):
    refused(tpfuse("bench", option, value), f"tpfuse bench: {option} is '{value}'")


def test_bench_asks_for_the_folder_before_it_measures():
    refused(tpfuse("bench", "--json", "absent/x.json"), "--json is absent/x.json, but there is no folder absent")


def test_python_m_tpfuse_is_the_command_line():
    assert run_python("-m", "tpfuse", "--version").stdout == tpfuse("--version").stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_bench_without_a_gpu():
    refused(tpfuse("bench"), "tpfuse bench: no GPU is visible")


@pytest.mark.parametrize("command", ["view", "explain", "doctor", "bisect", "bench"])
def test_every_command_has_help(command):
    result = tpfuse(command, "--help")
    assert result.returncode == 0
    assert "Usage: tpfuse" in result.stdout
