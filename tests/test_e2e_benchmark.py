"""``benchmarks/e2e.py`` rehearsed on gloo ranks: what it counts, compares and refuses. Its figures mean nothing there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.ranks

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "e2e.py"


def e2e(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=800,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.slow
def test_llama_fuses_every_reduction_and_chooses_the_tokens_of_the_baseline(tmp_path: Path) -> None:
    out = tmp_path / "e2e.json"
    done = e2e("--device", "cpu", "--tiny", "--worlds", 2, "--batch", 2, "--prefill", 8, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = json.loads(out.read_text())["lines"]
    assert [(x["phase"], x["rows"], x["contender"]) for x in lines] == [
        ("decode", 2, "gloo"),
        ("decode", 2, "tpfuse"),
        ("prefill", 8, "gloo"),
        ("prefill", 8, "tpfuse"),
    ]
    for x in lines:
        assert (x["ranks_equal"], x["equal_to_tpfuse"], x["problems"]) == (True, 1.0, [])
        assert x["step"] > 0 and x["back_to_back"] > 0
        assert (x["fused"], x["all_reduces"]) == ((6, 6) if x["contender"] == "tpfuse" else (None, None))
    assert done.stdout.count("tpfuse / fastest baseline (gloo)") == 4  # as it goes, and in the table


@pytest.mark.slow
def test_a_wrong_number_of_fused_reductions_is_an_error(tmp_path: Path) -> None:
    arguments = ("--device", "cpu", "--tiny", "--worlds", 2, "--batch", 1, "--contenders", "tpfuse")
    done = e2e(*arguments, TPFUSE_POLICY="off")
    assert done.returncode == 1, done.stdout + done.stderr
    assert "PROBLEM W=2 decode 1 rows, tpfuse: 0 all-reduces fused instead of 6" in done.stdout


@pytest.mark.slow
def test_deepseek_fuses_what_its_plan_says_and_less_without_rows(tmp_path: Path) -> None:
    out = tmp_path / "e2e.json"
    arguments = ("--model", "deepseek", "--tp", 4, "--dp", 2, "--k", 2, "--batch", 2, "--prefill", 8)
    contenders = "gloo,tpfuse rows off,tpfuse gathers off,tpfuse"
    done = e2e(*arguments, "--device", "cpu", "--tiny", "--contenders", contenders, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = json.loads(out.read_text())["lines"]
    fused = {
        "gloo": (None, None, None),
        "tpfuse rows off": (6, 8, 0),
        "tpfuse gathers off": (8, 8, 0),
        "tpfuse": (8, 8, 2),  # in front of the experts of both MoE layers
    }
    assert [(x["phase"], x["contender"]) for x in lines] == [
        (phase, contender) for phase in ("decode", "prefill") for contender in fused
    ]
    for x in lines:
        assert (x["ranks_equal"], x["equal_to_tpfuse"], x["problems"]) == (True, 1.0, [])
        assert (x["fused"], x["all_reduces"], x["gathered"]) == fused[x["contender"]]


@pytest.mark.slow
def test_on_a_shared_gpu_no_collective_of_the_group_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced on a fake group, whose all-reduce gives back its input: what was gathered is the own rows among zeros."""
    import graphs

    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import e2e_rows

    graphs.start_fake_group(2, 1)
    seen: list[str] = []
    c10d = torch.ops._c10d_functional

    class Seen(e2e_rows.SymmetricCollectives):
        def __call__(self, graph: torch.fx.Graph) -> None:
            super().__call__(graph)
            seen.extend(str(node.target) for node in graph.nodes)

    def f(x: torch.Tensor) -> torch.Tensor:
        gathered = c10d.wait_tensor(c10d.all_gather_into_tensor(x + 1, 2, graphs.world()))
        return graphs.all_reduce(gathered * 2) - 1

    x = torch.rand(3, 4)
    with torch.no_grad():
        got = torch.compile(f, backend="tpfuse", options={"post_grad_custom_post_pass": Seen()}, fullgraph=True)(x)
    assert torch.equal(got, torch.cat([torch.zeros(3, 4), x + 1]) * 2 - 1)
    assert [name for name in seen if "tpfuse_e2e" in name] == [
        "tpfuse_e2e.symm_gather.default",
        "tpfuse_e2e.symm_sum.default",
    ]
    assert not any("c10d" in name for name in seen)
    torch.distributed.destroy_process_group()


def test_what_cannot_run_is_one_clear_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    import e2e as script

    def refused(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            script.main()
        printed = capsys.readouterr()
        assert (ended.value.code, printed.out) == (2, "")
        return printed.err

    assert refused("--worlds", 2) == "e2e.py: no GPU is visible; --device cpu --tiny rehearses on a CPU\n"
    wrong = refused("--device", "cpu", "--tiny", "--model", "deepseek", "--tp", 4, "--dp", 2, "--k", 3)
    assert "moe_dense_tp_size=3 is not possible with attn_tp_size=2" in wrong
    assert "cannot be written" in refused("--device", "cpu", "--tiny", "--out", tmp_path)
