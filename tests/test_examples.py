"""The examples run as their first lines say."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import run_ranks

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


PLAIN = ("plain_module", 2, "equals the plain module's bit for bit")


def printed(rank, world_size, path):
    """What an example prints on a rank that has joined its group already."""
    import torch.distributed as dist

    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr(dist, "init_process_group", lambda backend: None)
        patch.setattr(dist, "destroy_process_group", lambda: None)
        runpy.run_path(path)["main"]()
    return out.getvalue()


@pytest.mark.ranks
def test_the_plain_module_on_ranks_that_have_imported_torch():
    name, ranks, says = PLAIN
    first, *others = run_ranks(printed, ranks, str(EXAMPLES / f"{name}.py"))
    assert says in first and others == [""] * (ranks - 1)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "ranks", "says"),
    [
        PLAIN,
        ("dtensor_llama", 2, "4 fused"),
        ("op_alone", 3, "normed 0.500 .. 1.500"),
        ("inductor_pass", 2, "1 fused"),
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
