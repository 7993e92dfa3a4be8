"""``benchmarks/hf.py`` rehearsed on gloo ranks: what it counts, compares and refuses. Its figures mean nothing there."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from commands import run_python

pytestmark = pytest.mark.ranks

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "hf.py"


def benchmark(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_python(SCRIPT, *arguments)


@pytest.mark.slow
def test_tokens_are_compared_and_all_sums_fused_and_the_rest_left_out_when_time_is_up(tmp_path: Path) -> None:
    names = "eager,tpfuse.hf.compile,tpfuse.hf.parallelize"
    small = ("--device", "cpu", "--tiny", "--layers", 1, "--rounds", 2, "--tokens", 4)
    done = benchmark(*small, "--batch", "1,2", "--contenders", names, "--budget", 1, "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    late = json.loads((tmp_path / "hf.json").read_text())["lines"]
    assert [(x["batch"], x["contender"]) for x in late] == [(b, name) for b in (1, 2) for name in names.split(",")]
    assert all("the budget of 1 s is spent" in x["note"] for x in late[1:])

    done = benchmark(*small, "--batch", 2, "--contenders", names, "--out", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = json.loads((tmp_path / "hf.json").read_text())["lines"]
    assert [(x["fused"], x["all_reduces"]) for x in lines] == [(0, 0), (3, 3), (2, 2)]
    for x in lines:
        assert (x["equal_to_eager"], x["ranks_equal"], x["problems"], x["rounds"]) == (1.0, True, [], 2)
        assert x["token"] > 0
        assert x["contender"] in done.stdout


def test_a_wrong_name_is_one_clear_line() -> None:
    wrong = benchmark("--contenders", "eagre")
    assert wrong.returncode == 2
    assert "no contender is called eagre; they are eager, inductor reduce-overhead" in wrong.stderr
