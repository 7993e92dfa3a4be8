"""The runner of the version matrix: what it fails for, and what it only says. Nothing is installed here."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

FILE = Path(__file__).parent / "matrix" / "run.py"
OLDEST, NEWEST = "2.11.0", "2.15.0"


@pytest.fixture
def matrix(monkeypatch, tmp_path):
    """The runner with every torch installed, every count golden and every suite green, until a test says otherwise."""
    spec = importlib.util.spec_from_file_location("matrix_run", FILE)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "matrix_run", module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "environment", lambda torch, folder, cpu_wheels: folder / f"torch-{torch}")
    monkeypatch.setattr(module, "overlay", lambda python, transformers, folder: "")
    module.real_counts = module.counts
    monkeypatch.setattr(module, "counts", golden)
    monkeypatch.setattr(
        module, "suite", lambda python, path, ends: ("7 passed, 1 skipped, 2 deselected in 1.0s", False)
    )
    monkeypatch.setattr(sys, "argv", ["run.py", "--ends", "--folder", str(tmp_path)])
    return module


def golden(python: Path, path: str, models: list[str]) -> dict[str, Any]:
    known = json.loads((FILE.parent / "golden.json").read_text())
    older = known["torch 2.11"] if OLDEST in str(python) else {}
    return {**known["every pair"], **older}


def test_the_files_that_another_version_can_break_exist(matrix):
    missing = [name for name in matrix.TOUCHES if not (matrix.ROOT / f"tests/test_{name}.py").is_file()]
    assert missing == []
    assert len(set(matrix.TOUCHES)) == len(matrix.TOUCHES)


def test_both_ends_are_run(matrix, capsys):
    assert matrix.main() == 0
    said = capsys.readouterr()
    rows = [line for line in said.out.splitlines() if line.startswith("| 2.")]
    assert [row.split(" | ")[0] for row in rows] == [f"| {OLDEST}", f"| {NEWEST}"]
    assert all(row.endswith("| 7 passed, 1 skipped |") for row in rows)
    assert said.err == ""


def test_processes_share_the_models_and_their_counts_are_in_order(matrix, monkeypatch):
    known = list(golden(Path(OLDEST), "", []))

    def run(python: Path, path: str, script: str, option: str, share: str, *models: str) -> Any:
        assert (script, option) == ("tests/matrix/golden.py", "--share")
        first, step = map(int, share.split("/"))
        mine = {name: [len(name), first] for name in (list(models) or known)[first::step]}
        line = json.dumps({"torch": "2", "counts": mine})
        return SimpleNamespace(stdout=f"noise\n{line}\n" if failing != first else "", stderr="no such model")

    failing = None
    monkeypatch.setattr(matrix, "run", run)
    monkeypatch.setattr(matrix.os, "cpu_count", lambda: 3)
    found = matrix.real_counts(Path("python"), "", [])
    assert list(found.items()) == [(name, [len(name), n % 3]) for n, name in enumerate(known)]
    assert list(matrix.real_counts(Path("python"), "", ["one"])) == ["one"]
    failing = 2
    with pytest.raises(matrix.Broken, match="no such model"):
        matrix.real_counts(Path("python"), "", [])


def refuse(*versions: str) -> Any:
    def environment(torch: str, folder: Path, cpu_wheels: str) -> Path:
        if torch in versions:
            raise sys.modules["matrix_run"].NotInstalled("ERROR: No matching distribution found")
        return folder / f"torch-{torch}"

    return environment


def test_an_end_that_pip_cannot_provide_is_said_and_the_other_one_is_tested(matrix, monkeypatch, capsys):
    monkeypatch.setattr(matrix, "environment", refuse(NEWEST))
    assert matrix.main() == 0
    said = capsys.readouterr()
    assert f"NOT TESTED: torch {NEWEST}, transformers" in said.err
    assert "No matching distribution found" in said.err
    assert "7 passed" in said.out


def test_a_loss_on_the_end_that_did_install_still_fails(matrix, monkeypatch, capsys):
    monkeypatch.setattr(matrix, "environment", refuse(OLDEST))
    monkeypatch.setattr(matrix, "counts", lambda *a: {**golden(*a), "llama": [7, 6]})
    assert matrix.main() == 1
    assert "LOST OR CHANGED llama: [7, 6], golden [7, 7]" in capsys.readouterr().out


def test_no_end_at_all_fails(matrix, monkeypatch, capsys):
    monkeypatch.setattr(matrix, "environment", refuse(OLDEST, NEWEST))
    assert matrix.main() == 1
    assert "no pair could be installed" in capsys.readouterr().err


def test_a_failing_suite_fails(matrix, monkeypatch):
    monkeypatch.setattr(
        matrix, "suite", lambda python, path, ends: ("1 failed, 6 passed in 1.0s", OLDEST in str(python))
    )
    assert matrix.main() == 1


def test_a_torch_that_gives_no_counts_fails_and_the_next_one_is_still_run(matrix, monkeypatch, capsys):
    def counts(python: Path, path: str, models: list[str]) -> dict[str, Any]:
        if OLDEST in str(python):
            raise matrix.Broken("libcudart.so.13: cannot open shared object file")
        return golden(python, path, models)

    monkeypatch.setattr(matrix, "counts", counts)
    assert matrix.main() == 1
    said = capsys.readouterr().out
    assert "LOST OR CHANGED libcudart.so.13" in said
    assert f"| {NEWEST} |" in said


def test_environments_go_when_they_are_not_kept(matrix, monkeypatch, tmp_path):
    for torch in (OLDEST, NEWEST):
        (tmp_path / f"torch-{torch}" / "lib").mkdir(parents=True)
    assert matrix.main() == 0
    assert (tmp_path / f"torch-{OLDEST}").is_dir()
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--discard"])
    assert matrix.main() == 0
    assert not list(tmp_path.glob("torch-*"))


def test_the_next_environment_is_installed_while_one_is_tested(matrix, monkeypatch, capsys):
    installed = threading.Event()

    def environment(torch: str, folder: Path, cpu_wheels: str) -> Path:
        if torch == NEWEST:
            installed.set()
        return folder / f"torch-{torch}"

    monkeypatch.setattr(matrix, "environment", environment)
    monkeypatch.setattr(matrix, "suite", lambda python, path, ends: ("7 passed in 1.0s", not installed.wait(10)))
    assert matrix.main() == 0


def test_a_version_that_is_not_listed_is_an_error(matrix, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--torch", "1.13"])
    with pytest.raises(SystemExit):
        matrix.main()
    assert "torch is one of 2.11.0" in capsys.readouterr().err
