"""Sixteen transformers architectures on two gloo ranks under transformers' own tensor parallelism.

A golden table of what is found, fused and refused, and outputs equal to those in eager mode. Decode is compiled for one of each
kind of layer on one rank of a fake group, whose sums are its own. For all of them, and with prefill on two ranks, where slow
tests run; the quick run has a Llama on two ranks in ``test_hf_generate_ranks.py``.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import models
import pytest
import torch
from ranks import RankPool

pytest.importorskip("transformers", reason="needs the extra tpfuse[hf]")

WORLD = 2
# architecture: found, fused, and the reasons of the rest, for a forward pass of three layers with policy "shared"
GOLDEN: dict[str, tuple[int, int, dict[str, int]]] = json.loads(
    (Path(__file__).parent / "matrix" / "golden.json").read_text()
)["default policy"]
# names on the page that are not transformers' own
PAGE_NAMES = {
    "gemma3": "gemma3_text",
    "gemma3n": "gemma3n_text",
    "gemma4": "gemma4_text",
    "llama4": "llama4_text",
    "qwen3.5_moe": "qwen3_5_moe_text",
    "ernie_4.5_moe": "ernie4_5_moe",
    "hy3": "hy_v3",
    "gpt_j": "gptj",
    "hy4": "hy_v4",
    "qwen4_exp": "qwen4_exp_text",
}
# Their layers are those of llama, deepseek_v3 or gemma2, as far as sums and norms go; a scale and a LayerNorm behind a sum
# have tests of their own, and the counts of all models are part of what CI runs (matrix/golden.py).
ALIKE = (
    *("mistral", "qwen2", "qwen3", "phi3", "qwen3_moe", "mixtral", "gemma3_text"),
    *("glm4", "glm4_moe", "olmo2", "granite", "cohere2"),
    *("llama", "gpt_oss"),  # a Llama is in test_hf_generate_ranks.py, attention alone cut is deepseek_v3's case as well
)


def forward(rank, world_size, folder, dtype_name, inner, prefill_too):
    """One decode step, and prefill if so asked, eager and fused; returns counts, reasons and whether outputs are equal."""
    import tpfuse

    model = models.sharded(folder, world_size, getattr(torch, dtype_name))
    tokens = torch.arange(10).view(2, 5) + 3

    def steps(prefill, decode):
        from transformers import DynamicCache

        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            first = prefill(tokens, past_key_values=cache, use_cache=True).logits
            return first, decode(tokens[:, :1], past_key_values=cache, use_cache=True).logits

    unfused = steps(model, model)
    torch._dynamo.reset()
    tpfuse.clear_reports()
    options = {"tpfuse.inner": inner, "tpfuse.verify": True}
    compiled = torch.compile(model, backend="tpfuse", dynamic=False, options=options)
    fused = steps(compiled if prefill_too else model, compiled)
    graphs = [
        (len(r.sites), len(r.fused), dict(Counter(s.reason for s in r.kept)), all(s.source for s in r.sites))
        for r in tpfuse.reports()
        if r.sites
    ]
    layers = [[(a.attention, a.mlp, a.shared) for a in r.layers] for r in tpfuse.reports() if r.sites]
    rules = [{s.admitted for s in r.fused} for r in tpfuse.reports() if r.sites]
    equal = [torch.equal(a, b) for a, b in zip(unfused, fused, strict=True)]
    close = [torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(unfused, fused, strict=True)]
    return graphs, (layers, rules), equal, close


@pytest.fixture(scope="module")
def pool():
    with RankPool(WORLD) as pool:
        yield pool


@pytest.fixture(scope="module")
def alone():
    with RankPool(WORLD, alone=True) as pool:
        yield pool


@pytest.mark.ranks
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in ALIKE else name for name in models.MODELS],
)
def test_golden_counts_and_equal_outputs_on_one_rank(name, alone, tmp_path):
    golden(name, False, alone, tmp_path)


@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.parametrize("name", models.MODELS)
def test_golden_counts_and_equal_outputs(name, pool, tmp_path):
    golden(name, True, pool, tmp_path)


def golden(name, prefill_too, pool, tmp_path):
    models.save(name, str(tmp_path), torch.bfloat16)
    results = pool.run(forward, str(tmp_path), "bfloat16", "aot_eager", prefill_too)
    found, fused, reasons = GOLDEN[name]
    for graphs, (layers, rules), equal, _ in results:
        assert len(graphs) == 1 + prefill_too, f"expected a graph for each step, got {graphs}"
        for n_found, n_fused, why, sources in graphs:
            assert (n_found, n_fused, why) == (found, fused, reasons)
            assert sources, "a site without a source line"
        assert equal == [True, True], "fused outputs differ from those of the model in eager mode"
        if fused:
            proved = all(shared for audit in layers for *_, shared in audit) and all(layers)
            assert set().union(*rules) == {"shared-layer" if proved else "not-refuted"}
            assert proved == (name not in ("deepseek_v3", "gpt_oss")), "transformers cuts one of attention and MLP"
    assert all(r[:2] == results[0][:2] for r in results), "ranks disagree"


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "prefill_too"),
    [
        pytest.param(*case, marks=pytest.mark.slow)
        for case in (("llama", False), ("llama", True), ("gemma2", True), ("starcoder2", True))
    ],
)
def test_the_same_under_inductor(name, prefill_too, pool, tmp_path):
    models.save(name, str(tmp_path), torch.float32)
    found, fused, reasons = GOLDEN[name]
    for graphs, _, _, close in pool.run(forward, str(tmp_path), "float32", "inductor", prefill_too):
        assert [(f, n, why) for f, n, why, _ in graphs] == [(found, fused, reasons)] * (1 + prefill_too)
        assert close == [True, True]


def test_the_table_of_the_page_is_the_golden_one():
    page = (Path(__file__).parent.parent / "docs" / "models.md").read_text()
    after = page.partition("## Hugging Face models\n")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in after.splitlines() if line.startswith("| ")
    ]
    shown = {}
    for names, found, fused, rest in rows[1:]:
        for name in names.split(", "):
            key = name.lower().replace("-", "_")
            key = PAGE_NAMES.get(key, key)
            shown[key] = (int(found), int(fused))
            reasons = set(re.findall(r"`([a-z-]+)`", rest))
            assert reasons <= set(GOLDEN[key][2]) and bool(reasons) == bool(GOLDEN[key][2]), name
    assert shown == {name: (found, fused) for name, (found, fused, _) in GOLDEN.items()}
