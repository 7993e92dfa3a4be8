"""``benchmarks/machine.py``: what it would run. Running it takes GPUs."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from commands import run_python

HERE = Path(__file__).resolve().parent
SCRIPT = HERE.parent / "benchmarks" / "machine.py"


@pytest.fixture(autouse=True)
def scripts_of_the_benchmarks_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(HERE.parent / "benchmarks"))


def _steps(worlds: tuple[int, ...], gpus: int, out: Path = Path("results")) -> dict[str, tuple[str, ...]]:
    import machine

    return {step.name: step.command for step in machine.steps(worlds, out, gpus)}


def test_ranks_with_a_gpu_each_are_compared_with_nccl_and_the_links_ranks_that_share_one_are_not() -> None:
    own, shared = _steps((4,), 4), _steps((4,), 1)
    assert "--links" in own["kernels-W4"] and "nccl" in own["kernels-W4"][own["kernels-W4"].index("--contenders") + 1]
    assert "--links" not in shared["kernels-W4"]
    assert "--prefill" in own["llama-W4"] and "--prefill" not in shared["llama-W4"]
    assert "deepseek-W4" in own and "deepseek-W4" not in shared


@pytest.mark.parametrize(
    ("world", "layout"), ((2, "--tp 2 --dp 1 --k 2"), (4, "--tp 4 --dp 2 --k 2"), (8, "--tp 8 --dp 2 --k 4"))
)
def test_the_dense_mlp_shares_the_group_of_attention(world: int, layout: str) -> None:
    assert layout in " ".join(_steps((world,), 8)[f"deepseek-W{world}"])


@pytest.mark.long
def test_a_step_that_does_not_exist_is_named_with_those_that_do() -> None:
    done = run_python(SCRIPT, "--list", "--only", "kernels,nothing")
    assert done.returncode == 2
    assert "no step is called nothing" in done.stderr and "kernels-W2" in done.stderr


def test_a_step_that_fails_or_takes_too_long_leaves_the_others_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import machine

    child = [sys.executable, "-c", "import time; time.sleep(30)"]
    starting = f"import subprocess, time; print(subprocess.Popen({child}).pid, flush=True); time.sleep(30)"
    ends = [
        machine.run(machine.Step(name, (sys.executable, "-c", code), 2), tmp_path)
        for name, code in (
            ("fine", "print(1)"),
            ("bad", "raise SystemExit(3)"),
            ("slow", starting),
        )
    ]
    assert ends == [True, False, False]
    said = capsys.readouterr().out
    assert "exit code 3" in said and "not finished in 2 s" in said
    assert (tmp_path / "fine.log").read_text() == "1\n"
    left = Path(f"/proc/{int((tmp_path / 'slow.log').read_text())}/stat")

    def runs() -> bool:
        try:
            return left.read_text().rpartition(")")[2].split()[0] not in "ZX"
        except OSError:  # no such process any more
            return False

    # SIGKILL is delivered at once, but takes effect when the process is next scheduled.
    deadline = time.monotonic() + 5
    while runs() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not runs(), "what the step started runs on"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU: the commands would run")
def test_every_command_is_one_that_its_script_takes(tmp_path: Path) -> None:
    commands = {**_steps((2, 8), 2, tmp_path), **_steps((2,), 0, tmp_path)}
    for name, command in commands.items():
        if name != "check":
            done = subprocess.run(command, capture_output=True, text=True, timeout=800, check=False)
            assert done.returncode == 2 and "no GPU is visible" in done.stderr, (name, done.stdout, done.stderr)
