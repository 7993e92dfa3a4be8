"""``benchmarks/quant.py`` as far as it runs without a GPU: the steps that Inductor gets, the errors, the table."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from commands import run_python
from interpreted_ranks import same_bits
from tpfuse.ops.quant_reference import quantize
from tpfuse.ops.quantizer import NAMED

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import quant  # noqa: E402

SCALE = torch.tensor(4.0 / 448.0)


def of(name: str, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    quantized, scales = quantize(x, NAMED[name], SCALE if name == "vllm-static" else None)
    return quantized, scales if scales.numel() else SCALE


@pytest.mark.parametrize("name", quant.QUANTIZERS)
def test_inductor_gets_the_steps_that_the_op_stands_for(name):
    x = torch.randn(8, 512, generator=torch.Generator().manual_seed(1)).bfloat16()
    got, want = quant.steps_of(name)(x, SCALE), of(name, x)
    if want[1].dtype == torch.int32:
        want = want[0], quant.unpacked(want[1], x.shape[-1])
    assert all(same_bits(g, w) for g, w in zip(got, want, strict=True))
    # Of 448 steps up to the largest value, three bits of a value are kept.
    assert 0.01 < quant.error(want, x.double()) < 0.05


def test_the_table_has_every_contender_and_the_mean_of_what_the_cap_is_for():
    def line(rows, **us):
        return {"quantizer": "vllm-token", "hidden": 4096, "rows": rows, "us": us, "error": dict.fromkeys(us, 0.02)}

    first = [line(rows, **{"one kernel": 3.0, "inductor": 4.0}) for rows in (1, 64)]
    lines = quant.joined(first, [line(rows, **{"ours behind": 5.0}) for rows in (1, 64)])
    text = quant.table(lines)
    assert "1 to 32 rows: 0.750, worst 0.750" in text and "all rows: 0.750" in text
    assert text.splitlines()[0].split()[3:] == ["inductor", "one", "kernel", "ours", "behind", "ratio", "(us)"]
    assert "2.000e-02" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="says so where there is no GPU")
@pytest.mark.long
def test_without_a_gpu_it_says_what_is_missing():
    done = run_python(ROOT / "benchmarks" / "quant.py", timeout=120)
    assert done.returncode == 2 and "no CUDA device" in done.stderr
