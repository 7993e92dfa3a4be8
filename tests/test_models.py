"""Sixteen transformers architectures on two gloo ranks under transformers' own tensor parallelism.

A golden table of what is found, fused and refused, and outputs equal to the unfused compile, for prefill and decode.
"""

from __future__ import annotations

from collections import Counter

import models
import pytest
import torch
from ranks import RankPool

pytest.importorskip("transformers", reason="needs the extra tpfuse[hf]")

WORLD = 2
# architecture: (found, fused, reasons of the rest) for a forward pass of three layers with policy "shared"
GOLDEN: dict[str, tuple[int, int, dict[str, int]]] = {
    "llama": (7, 7, {}),
    "mistral": (7, 7, {}),
    "qwen2": (7, 7, {}),
    "qwen3": (7, 7, {}),
    "qwen3_moe": (7, 7, {}),
    "mixtral": (7, 7, {}),
    "gemma2": (7, 6, {"scale-not-constant": 1}),  # the embedding is scaled by a tensor before its norm
    "gemma3_text": (7, 6, {"scale-not-constant": 1}),
    "glm4": (7, 7, {}),
    "glm4_moe": (8, 7, {"sum-of-reductions": 1}),  # routed + shared experts: one reduction each
    "olmo2": (7, 6, {"extra-reader": 1}),  # no norm before the first attention: it reads the embedding itself
    "granite": (7, 7, {}),
    "phi3": (7, 7, {}),
    "deepseek_v3": (6, 0, {"policy": 4, "sum-of-reductions": 2}),  # transformers does not shard its attention
    "gpt_oss": (1, 0, {"policy": 1}),  # nor most of this one
    "cohere2": (7, 0, {"layer-norm": 7}),
}


def forward(rank, world_size, folder, dtype_name, inner):
    """Prefill and one decode step, unfused and fused; returns counts, reasons and whether outputs are equal."""
    import tpfuse

    model = models.sharded(folder, world_size, getattr(torch, dtype_name))
    tokens = torch.arange(10).view(2, 5) + 3

    def steps(compiled):
        from transformers import DynamicCache

        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            prefill = compiled(tokens, past_key_values=cache, use_cache=True).logits
            decode = compiled(tokens[:, :1], past_key_values=cache, use_cache=True).logits
        return prefill, decode

    torch._dynamo.reset()
    unfused = steps(torch.compile(model, backend="aot_eager" if inner == "aot_eager" else "inductor", dynamic=False))
    torch._dynamo.reset()
    tpfuse.clear_reports()
    options = {"tpfuse.inner": inner, "tpfuse.verify": True}
    fused = steps(torch.compile(model, backend="tpfuse", dynamic=False, options=options))
    graphs = [
        (len(r.sites), len(r.fused), dict(Counter(s.reason for s in r.kept)), all(s.source for s in r.sites))
        for r in tpfuse.reports()
        if r.sites
    ]
    layers = [[(a.attention, a.mlp, a.shared) for a in r.layers] for r in tpfuse.reports() if r.sites]
    equal = [torch.equal(a, b) for a, b in zip(unfused, fused, strict=True)]
    close = [torch.allclose(a, b, rtol=1e-3, atol=1e-3) for a, b in zip(unfused, fused, strict=True)]
    return graphs, layers, equal, close


@pytest.fixture(scope="module")
def pool():
    with RankPool(WORLD, env={"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}) as pool:
        yield pool


@pytest.mark.ranks
@pytest.mark.parametrize("name", list(models.MODELS))
def test_golden_counts_and_equal_outputs(name, pool, tmp_path):
    models.save(name, str(tmp_path), torch.bfloat16)
    results = pool.run(forward, str(tmp_path), "bfloat16", "aot_eager", timeout=200)
    found, fused, reasons = GOLDEN[name]
    for graphs, layers, equal, _ in results:
        assert len(graphs) == 2, f"expected a prefill and a decode graph, got {graphs}"
        for n_found, n_fused, why, sources in graphs:
            assert (n_found, n_fused, why) == (found, fused, reasons)
            assert sources, "a site without a source line"
        assert equal == [True, True], "fused outputs differ from the unfused compile"
        if fused > 1:
            assert all(shared for audit in layers for *_, shared in audit)
    assert results[0][0] == results[1][0] and results[0][1] == results[1][1], "ranks disagree"


@pytest.mark.ranks
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_the_same_under_inductor(name, pool, tmp_path):
    models.save(name, str(tmp_path), torch.float32)
    found, fused, reasons = GOLDEN[name]
    for graphs, _, _, close in pool.run(forward, str(tmp_path), "float32", "inductor", timeout=280):
        assert [(f, n, why) for f, n, why, _ in graphs] == [(found, fused, reasons)] * 2
        assert close == [True, True]
