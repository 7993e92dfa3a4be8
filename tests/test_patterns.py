"""Patterns of transformers architectures beyond those of test_models.py: counts, refusals, rules and bits.

One forward pass of three layers under transformers' own tensor parallelism, fused and in eager mode. On two gloo ranks, for all
models, where slow tests run; else for one of them, on one rank of a fake group, whose sums are its own.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import models
import pytest
import torch
from ranks import RankPool

pytest.importorskip("transformers", reason="needs the extra tpfuse[hf]")

WORLD = 2
GOLDEN = json.loads((Path(__file__).parent / "matrix" / "golden.json").read_text())["default policy"]
# A LayerNorm over the sum of attention and MLP; the experts alone are cut, of which the quick run has the other half, attention
# alone, in test_models.py.
QUICK = ("phi", pytest.param("granitemoe", marks=pytest.mark.slow))


def forward(rank, world_size, folder, dtype=torch.bfloat16, autocast=False):
    """(found, fused, reasons, rules, whether outputs are equal) of a forward pass."""
    import tpfuse

    model = models.sharded(folder, world_size, dtype)
    tokens = torch.arange(10).view(2, 5) + 3
    torch._dynamo.reset()
    tpfuse.clear_reports()
    options = {"tpfuse.inner": "aot_eager", "tpfuse.verify": True}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        want = model(tokens, use_cache=False).logits
        got = torch.compile(model, backend="tpfuse", dynamic=False, options=options)(tokens, use_cache=False).logits
    sites = [site for report in tpfuse.reports() for site in report.sites]
    kept = Counter(site.reason for site in sites if not site.fused)
    rules = {site.admitted for site in sites if site.fused}
    return len(sites), sum(site.fused for site in sites), dict(kept), rules, torch.equal(want, got)


@pytest.fixture(scope="module")
def pool():
    with RankPool(WORLD) as pool:
        yield pool


@pytest.fixture(scope="module")
def alone():
    with RankPool(WORLD, alone=True) as alone:
        yield alone


@pytest.mark.ranks
@pytest.mark.parametrize("name", QUICK)
def test_golden_counts_and_equal_outputs_on_one_rank(name, alone, tmp_path):
    golden(name, alone, tmp_path)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("name", models.PATTERNS)
def test_golden_counts_and_equal_outputs(name, pool, tmp_path):
    golden(name, pool, tmp_path)


def golden(name, pool, tmp_path):
    if not models.known(name):
        pytest.skip(f"this transformers has no {name}")
    models.save(name, str(tmp_path), torch.bfloat16)
    found, fused, reasons = GOLDEN[name]
    proved = name not in models.HALF_CUT
    for result in pool.run(forward, str(tmp_path)):
        assert result[:3] == (found, fused, reasons)
        assert result[3] <= {"shared-layer" if proved else "not-refuted"}
        assert result[4], "fused outputs differ from those of the model in eager mode"


@pytest.mark.slow
@pytest.mark.ranks
def test_experts_that_are_added_in_fp32(pool, tmp_path):
    """``(routed.float() + shared.float()).to(dtype)``: rounded at once, it is the sum in the model's dtype."""
    if not models.known("hy_v3"):
        pytest.skip("this transformers has no hy_v3")
    models.save("hy_v3", str(tmp_path), torch.bfloat16, enable_moe_fp32_combine=True)
    for result in pool.run(forward, str(tmp_path)):
        assert result == (9, 9, {}, {"shared-layer"}, True)


@pytest.mark.slow
@pytest.mark.ranks
def test_a_model_under_autocast(pool, tmp_path):
    """Sums in bf16, an fp32 residual that is never rounded, fp32 norms."""
    models.save("llama", str(tmp_path), torch.float32)
    for result in pool.run(forward, str(tmp_path), torch.float32, True):
        assert result == (7, 7, {}, {"shared-layer"}, True)
