"""The models on which vLLM tests its own fusion pass: four reductions in each, of which it has to find four. Written anew after
``tests/compile/passes/distributed/test_fusion_all_reduce.py`` of github.com/vllm-project/vllm.

vLLM's operators are stand-ins (``vllm_operators.py``), its quantization for FP4 an operator that the pass knows nothing of. On a
fake group a sum over ranks is the partial sum itself, so the rewritten graph can be compared bit for bit without other ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import graphs
import pytest
import torch
import torch.distributed as dist
import vllm_operators
from torch import Tensor
from vllm_operators import EPS, GROUP

import tpfuse
from tpfuse.engines import vllm, vllm_compat

HIDDEN, TOKENS, NORMS = 64, 64, 4
FP8_MAX = 448.0


@pytest.fixture(autouse=True)
def vllm_without_vllm(monkeypatch):
    graphs.start_fake_group(2)
    vllm_operators.define_operators()
    monkeypatch.setattr(vllm_compat, "all_reduce", lambda: torch.ops.vllm.all_reduce)
    monkeypatch.setattr(vllm_compat, "norm_provider", vllm_operators.provider_of)
    monkeypatch.setattr(vllm, "_recorder", vllm._Recorder())
    monkeypatch.setattr(vllm, "_watch", lambda: None)
    yield
    tpfuse.passes.collectives.unregister_collective(torch.ops.vllm.all_reduce)
    dist.destroy_process_group()


@torch.library.custom_op("tpfuse_referee::fp4_quant", mutates_args=())
def fp4_quant(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    scales = x.float().abs().amax(-1, keepdim=True) / 6.0 * scale
    return (x.float() / scales).round().clamp(-6, 6).to(torch.int8), scales


@fp4_quant.register_fake
def _(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape, dtype=torch.int8), x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)


def plain(y: Tensor, w: Tensor) -> Tensor:
    return y @ w


def fp8(y: Tensor, w: Tensor) -> Tensor:
    """vLLM's static quantization where it has no kernel for it: the norm is read by arithmetic."""
    quantized = (y.float() * (1.0 / 0.5)).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
    return (quantized.to(y.dtype) @ w) * 0.5


def fp4(y: Tensor, w: Tensor) -> Tensor:
    quantized, scales = torch.ops.tpfuse_referee.fp4_quant(y, torch.ones(1))
    return ((quantized.float() * scales) @ w.float()).to(y.dtype)


def own(w: Tensor) -> Tensor:
    return w


def gemma(w: Tensor) -> Tensor:
    return w.float() + 1.0


def model(linear: Callable[..., Tensor], gain: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """Four norms, each behind a reduction; the first one has no residual."""

    def forward(x: Tensor, norms: list[Tensor], weights: list[Tensor]) -> Tensor:
        x = resid = torch.ops.vllm.all_reduce(torch.relu(x), GROUP)
        y = torch.ops.vllm_ir.rms_norm(x, gain(norms[0]), EPS)
        for norm, weight in zip(norms[1:], weights, strict=True):
            x = torch.ops.vllm.all_reduce(linear(y, weight), GROUP)
            y, resid = torch.ops.vllm_ir.fused_add_rms_norm(x, resid, gain(norm), EPS)
        return y

    return lambda x, *tensors: forward(x, list(tensors[:NORMS]), list(tensors[NORMS:]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("provider", ["native", "vllm_c"])
@pytest.mark.parametrize(
    ("linear", "gain"), [(plain, own), (plain, gemma), (fp8, own), (fp4, own)], ids=lambda f: f.__name__
)
def test_four_of_four_with_the_same_bits(linear, gain, provider, dtype, monkeypatch):
    if gain is gemma and provider == "vllm_c":
        pytest.skip(
            "vLLM's CUDA kernel takes no fp32 weight beside 16-bit rows: vLLM lowers that norm to its arithmetic"
        )
    monkeypatch.setitem(vllm_operators.provider, "now", provider)
    g = torch.Generator().manual_seed(4)
    tensors: list[Any] = [torch.randn(TOKENS, HIDDEN, generator=g)]
    tensors += [torch.rand(HIDDEN, generator=g) + 0.5 for _ in range(NORMS)]
    tensors += [torch.rand(HIDDEN, HIDDEN, generator=g) for _ in range(NORMS - 1)]
    tensors = [t.to(dtype) for t in tensors]
    gm = graphs.trace(model(linear, gain), tensors)
    with torch.no_grad():
        want = graphs.run(gm, *tensors)
    assert graphs.all_reduces_left(gm) == NORMS
    made = vllm.make_pass({"tpfuse.verify": True}, ranks=vllm_operators.world)
    made(gm.graph)
    gm.recompile()
    (report,) = made.reports
    assert [(s.reason, s.detail) for s in report.kept] == []
    assert [s.pattern for s in report.fused] == ["all_reduce+rms_norm"] + 3 * ["all_reduce+add+rms_norm"]
    assert ["before it is rounded" in s.detail for s in report.fused] == [False] + 3 * [provider == "native"]
    assert graphs.all_reduces_left(gm) == 0 and not any("vllm_ir" in str(n.target) for n in gm.graph.nodes)
    with torch.no_grad():
        assert graphs.equal(graphs.run(gm, *tensors), want)
