"""The examples run as their first lines say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "ranks", "says"),
    [
        ("plain_module", 2, "equals the plain module's bit for bit"),
        pytest.param("dtensor_llama", 2, "4 fused", marks=pytest.mark.slow),
        pytest.param("op_alone", 3, "normed 0.500 .. 1.500", marks=pytest.mark.slow),
        pytest.param("inductor_pass", 2, "1 fused", marks=pytest.mark.slow),
    ],
)
def test_example(name, ranks, says, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [*command, str(EXAMPLES / f"{name}.py")], capture_output=True, text=True, timeout=800, env=env, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert says in done.stdout, done.stdout
