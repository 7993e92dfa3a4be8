"""The doctor works anywhere, tells ranks apart, and its exit code can be used in scripts."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import pytest
from commands import Command
from test_cli import refused, tpfuse, tpfuse_process

from tpfuse.inspect import doctor
from tpfuse.inspect.doctor import FAIL, NOTE, OK, WARN, Check


def checks(result):
    return {check["name"]: check for check in json.loads(result.stdout)}


@pytest.mark.long
def test_without_a_gpu_or_a_group_it_says_which_path_the_op_takes():
    result = tpfuse_process("doctor", "--json")
    found = checks(result)
    assert result.returncode == 0, result.stdout
    assert found["torch"]["status"] == found["entry point"]["status"] == OK
    assert found["process group"] == {
        "name": "process group", "status": NOTE, "found": "none: not started by torchrun", "fix": "",
    }  # fmt: skip
    assert found["path"]["status"] in (OK, NOTE)


def test_the_table_has_the_fix_below_what_is_wrong():
    shown = doctor.text([Check("torch", OK, "2.13.0"), Check("triton", WARN, "not installed", "pip install triton")])
    assert [line.split() for line in shown.splitlines() if line.strip()] == [
        ["ok", "torch", "2.13.0"], ["warn", "triton", "not", "installed"], ["pip", "install", "triton"],
    ]  # fmt: skip


def test_a_wrong_option_in_the_environment_is_found(monkeypatch):
    monkeypatch.setenv("TPFUSE_POLICY", "everything")
    result = tpfuse("doctor", "--json")
    assert result.returncode == 1
    assert checks(result)["environment"]["status"] == FAIL
    assert "shared, strict, all, off" in checks(result)["environment"]["fix"]


@pytest.mark.long
def test_incomplete_variables_of_torchrun():
    refused(tpfuse_process("doctor", env={"WORLD_SIZE": "2", "RANK": "0"}), "MASTER_ADDR", "start with torchrun")


@pytest.mark.long
def test_a_rank_that_never_comes(tmp_path):
    env = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    refused(tpfuse_process("doctor", "--timeout", 2, env=env), "tpfuse doctor: the ranks did not meet at 127.0.0.1")


def test_a_check_that_breaks_is_a_finding():
    def broken():
        raise RuntimeError("driver gone")

    assert doctor._looked(broken) == [Check("broken", FAIL, "RuntimeError: driver gone")]


def torchrun(*command):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--no-python"]
    return subprocess.run([*launcher, sys.executable, *command], capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.ranks
def test_equal_ranks_under_torchrun_agree():
    equal = torchrun("-m", "tpfuse.cli", "doctor", "--json")
    assert equal.returncode == 0, equal.stderr
    assert checks(equal)["process group"]["found"] == "2 ranks, gloo"
    assert checks(equal)["ranks agree"]["status"] == OK


def compared(result):
    assert result.returncode != 0
    assert checks(result)["process group"]["found"] == "2 ranks, gloo"
    assert checks(result)["TPFUSE_POLICY differs"]["found"] == "unset on rank 0; all on rank 1"


@pytest.mark.slow
@pytest.mark.ranks
def test_ranks_under_torchrun_are_compared():
    script = "import os, sys; os.environ['RANK'] == '1' and os.environ.update(TPFUSE_POLICY='all'); "
    script += "sys.argv[1:] = ['doctor', '--json']; from tpfuse.cli import main; main()"
    compared(torchrun("-c", script))


@pytest.mark.ranks
def test_ranks_with_the_variables_of_torchrun_are_compared():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    of_ranks = [{**env, "RANK": "0"}, {**env, "RANK": "1", "TPFUSE_POLICY": "all"}]
    first, second = [Command("-m", "tpfuse.cli", "doctor", "--json", env=of_rank) for of_rank in of_ranks]
    compared(first.wait())
    second.wait()


def test_gpus_that_cannot_reach_each_other_are_named(monkeypatch):
    cuda = doctor.torch.cuda
    for name, value in {
        "is_available": True, "device_count": 3, "get_device_name": "GPU", "get_device_capability": (9, 0),
    }.items():  # fmt: skip
        monkeypatch.setattr(cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(cuda, "can_device_access_peer", lambda a, b: 2 not in (a, b))
    monkeypatch.setattr(doctor, "_nccl", lambda: "2.28.0")
    found = {check.name: check for check in doctor.gpus()}
    assert found["GPU"].found.startswith("3 x GPU, capability 9.0")
    assert found["peer access"].status == WARN
    assert found["peer access"].found == "missing between GPUs 0-2, 1-2"
    assert "library path" in found["peer access"].fix
