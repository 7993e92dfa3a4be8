"""What ``make demo`` and the setup print: their own lines; what pip and the libraries print is in a log that a failure names."""

from __future__ import annotations

import importlib.util
import queue
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOISE = "import os, sys; os.write(2, b'from C++\\n'); print('from Python'); sys.exit({})"


def loaded(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"tested_{Path(path).stem}", ROOT / path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def demo():
    return loaded("examples/demo.py")


@pytest.fixture(scope="module")
def setup():
    return loaded("tools/setup.py")


def collect(demo, messages, log, exitcode=None):
    """What the demo makes of its processes' messages; returns the lines it printed."""
    console = pytest.importorskip("rich.console").Console(file=open(log.with_suffix(".out"), "w+"), width=80)  # noqa: SIM115
    results = queue.Queue()
    for message in messages:
        results.put(message)
    with console.file as file:
        demo.collect([SimpleNamespace(exitcode=exitcode)], results, log, console, 0.0)
        file.seek(0)
        return file.read()


def test_all_that_a_rank_prints_goes_to_the_log(demo, tmp_path):
    log = tmp_path / "demo.log"
    log.write_text("before\n")
    code = f"import runpy; runpy.run_path({demo.__file__!r})['print_to']({str(log)!r}); {NOISE.format(0)}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=True)
    assert done.stdout + done.stderr == ""
    assert sorted(log.read_text().splitlines()) == ["before", "from C++", "from Python"]


def test_progress_is_shown_and_the_result_returned(demo, tmp_path):
    shown = collect(demo, [("progress", 0, "Compiling"), ("done", 0, {})], tmp_path / "demo.log")
    assert "Compiling" in shown


def test_a_rank_that_fails_is_named_with_its_error_and_the_log(demo, tmp_path):
    log = tmp_path / "demo.log"
    log.write_text("".join(f"noise {n}\n" for n in range(100)))
    with pytest.raises(SystemExit) as error:
        collect(demo, [("failed", 0, "Traceback\nValueError: no such shape")], log)
    text = str(error.value)
    assert "demo: rank 0 failed" in text and "ValueError: no such shape" in text and str(log) in text
    assert len(text.splitlines()) < 20
    assert log.read_text().endswith("no such shape")


def test_a_rank_that_dies_is_named_with_its_exit_code_and_the_log(demo, tmp_path):
    log = tmp_path / "demo.log"
    log.write_text("terminate called\n")
    with pytest.raises(SystemExit, match="exit code -11") as error:
        collect(demo, [], log, exitcode=-11)
    assert "terminate called" in str(error.value) and str(log) in str(error.value)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("It is Paris. It lies on the Seine. The E", "It is Paris. It lies on the Seine."),
        ("It is Paris.\n", "It is Paris."),
        ("Paris! Is it? The", "Paris! Is it?"),
        ("the 3.5 of them", "the 3.5 of them"),
    ],
)
def test_the_answer_ends_with_a_sentence(demo, text, shown):
    assert demo.sentences(text) == shown


def test_a_command_of_the_setup_prints_to_the_log_only(setup, tmp_path, capfd):
    log = tmp_path / "setup.log"
    assert setup.run([sys.executable, "-c", NOISE.format(0)], log) == 0
    assert setup.run([sys.executable, "-c", NOISE.format(1)], log, check=False) == 1
    printed = log.read_text().splitlines()
    assert printed.count("from C++") == printed.count("from Python") == 2
    assert capfd.readouterr() == ("", "")


def test_a_command_of_the_setup_that_fails_shows_the_end_of_the_log(setup, tmp_path):
    log = tmp_path / "setup.log"
    log.write_text("".join(f"line {n}\n" for n in range(100)))
    with pytest.raises(SystemExit) as error:
        setup.run([sys.executable, "-c", NOISE.format(3)], log)
    text = str(error.value)
    assert "exit code 3" in text and "from Python" in text and text.endswith(f"The whole log: {log}")
    assert len(text.splitlines()) == setup.SHOWN + 2
