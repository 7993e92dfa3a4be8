"""The examples run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

EXAMPLES = Path(__file__).parent.parent / "examples"


def output_of(name):
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        capture_output=True,
        text=True,
        timeout=800,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_shared_dense_tp_prints_plan_groups_report_and_equality():
    text = output_of("shared_dense_tp.py")
    assert "all_reduce(attn_tp [0,1]) → add → norm" in text
    assert "dense_tp [[0, 1], [2, 3]]" in text
    assert "9 all-reduces, 9 fused (2 gathered), 0 kept" in text
    for rank, pair in enumerate(("[0, 1]", "[0, 1]", "[2, 3]", "[2, 3]")):
        over = ", ".join(sorted((pair, "[0, 1, 2, 3]"), key=lambda text: text.strip("[]").split(", ")))
        assert f"rank {rank}: 9 of 9 all-reduces fused, over {over}; logits equal" in text


def test_hf_generate_prints_tokens_and_what_fused():
    text = output_of("hf_generate.py")
    assert "tokens: [1, 2, 3, 4, 5, 6, 7, 8, " in text
    assert "9 all-reduces, 9 fused, 0 kept" in text
