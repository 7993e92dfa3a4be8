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
QUICK = "granitemoe"


def forward(rank, world_size, folder, numerics="exact"):
    """(found, fused, reasons, rules, whether outputs are equal) of a forward pass."""
    import tpfuse

    model = models.sharded(folder, world_size, torch.bfloat16)
    tokens = torch.arange(10).view(2, 5) + 3
    torch._dynamo.reset()
    tpfuse.clear_reports()
    options = {"tpfuse.inner": "aot_eager", "tpfuse.verify": True, "tpfuse.numerics": numerics}
    with torch.no_grad():
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


@pytest.mark.ranks
def test_golden_counts_and_equal_outputs_on_one_rank(tmp_path):
    with RankPool(WORLD, alone=True) as alone:
        golden(QUICK, alone, tmp_path)


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


@pytest.mark.ranks
@pytest.mark.parametrize(
    "name", ["gemma", *(pytest.param(n, marks=pytest.mark.slow) for n in ("gemma4_text", "vaultgemma", "minicpm3"))]
)
def test_relaxed_scales_an_embedding_before_its_reduction(name, pool, tmp_path):
    """To the same bits: of an embedding that is cut by tokens one rank gives the row, the others zeros."""
    if not models.known(name):
        pytest.skip(f"this transformers has no {name}")
    models.save(name, str(tmp_path), torch.bfloat16)
    for result in pool.run(forward, str(tmp_path), "relaxed"):
        assert result == (7, 7, {}, {"shared-layer"}, True)


@pytest.mark.slow
@pytest.mark.ranks
def test_experts_that_are_added_in_fp32(pool, tmp_path):
    """``(routed.float() + shared.float()).to(dtype)``: rounded at once, it is the sum in the model's dtype."""
    if not models.known("hy_v3"):
        pytest.skip("this transformers has no hy_v3")
    models.save("hy_v3", str(tmp_path), torch.bfloat16, enable_moe_fp32_combine=True)
    for result in pool.run(forward, str(tmp_path)):
        assert result == (9, 7, {"sum-of-reductions": 2}, {"shared-layer"}, True)
