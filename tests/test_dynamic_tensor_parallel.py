"""A tensor-parallel Llama whose shapes change between calls: prefill, then cached decode, as README's first snippet has it."""

from __future__ import annotations

import warnings

import pytest
import torch
from models import save, sharded
from ranks import RankPool

pytestmark = pytest.mark.ranks


def steps(model, call):
    """Logits of a prefill of six tokens and of two cached steps."""
    out = call(torch.arange(1, 7)[None])
    found = [out.logits[:, -1]]
    for _ in range(2):
        out = call(found[-1].argmax(-1, keepdim=True), past_key_values=out.past_key_values)
        found.append(out.logits[:, -1])
    return torch.stack(found).detach()


def prefill_and_decode(rank, world_size, folder, gradients):
    import tpfuse
    from tpfuse import unfused

    torch._dynamo.reset()
    tpfuse.clear_reports()
    unfused.forget()
    model = sharded(folder, world_size)
    compiled = torch.compile(model, backend="tpfuse", options={"tpfuse.inner": "aot_eager"})
    with warnings.catch_warnings(record=True) as caught, torch.inference_mode(not gradients):
        warnings.simplefilter("always")
        got, wanted = steps(model, compiled), steps(model, model)
    told = [str(w.message) for w in caught if issubclass(w.category, tpfuse.FusionWarning)]
    return torch.equal(got, wanted), [len(r.fused) for r in tpfuse.reports()], told


@pytest.fixture(scope="module")
def pool():
    # What shapes do to a graph: one rank of two, whose sums are its own.
    with RankPool(2, alone=True) as pool:
        yield pool


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("llama"))
    save("llama", path, num_hidden_layers=1)
    return path


def test_prefill_and_cached_decode_fuse_in_inference_mode(pool, folder):
    for equal, fused, told in pool.run(prefill_and_decode, folder, False):
        assert equal
        assert len(fused) >= 2 and set(fused) == {3}
        assert told == []


@pytest.mark.slow  # that a graph with gradients is told of, the quick run has in test_unfused.py
def test_with_gradients_the_steps_run_and_the_remedy_is_told(pool, folder):
    """torch 2.13 raises ``unhashable type: non-nested SymInt`` here, with ``backend="aot_eager"`` too."""
    for equal, fused, told in pool.run(prefill_and_decode, folder, True):
        assert equal
        assert set(fused) <= {0}
        assert any("torch.inference_mode()" in text for text in told)
        assert len(told) == len(set(told)) <= 2
