"""Models with fp8 linear layers on gloo ranks: the quantization of every norm is part of the fused op, and no bit differs.

The layers' arithmetic is that of the libraries in ``quantizations.py``; torchao's own layers run where torchao is installed.
"""

from __future__ import annotations

import json
from pathlib import Path

import models
import pytest
import quantizations
import torch
from ranks import RankPool
from torch import nn
from tpfuse.ops.quantizer import NAMED

pytest.importorskip("transformers", reason="needs the extra tpfuse[hf]")

# name: reductions found, fused, and fused with the quantization behind their norm
GOLDEN = json.loads((Path(__file__).parent / "matrix" / "golden.json").read_text())["quantized"]
E4M3 = torch.float8_e4m3fn
CASES = {
    "llama, torchao per row": ("llama", "torchao_rowwise", {}),
    "qwen3, static": ("qwen3", "vllm_static", {}),
    "deepseek_v3, 1x128 blocks": ("deepseek_v3", "vllm_group128", {"hidden_size": 256, "moe_intermediate_size": 128}),
}


class Fp8Linear(nn.Linear):
    """Quantizes its input in the arithmetic ``spelling``, and multiplies by fp8 weights with a scale for each of its rows."""

    def prepare(self, spelling: str, static: torch.Tensor) -> None:
        self.spelling = spelling
        weight = self.weight.detach().float()
        scale = weight.abs().amax(-1, keepdim=True) / 448.0
        self.register_buffer("fp8", (weight / scale).to(E4M3))
        self.register_buffer("scale", scale.t().contiguous())
        self.static = static

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        quantized, scales = getattr(quantizations, self.spelling)(rows, self.static)
        if self.spelling == "vllm_group128":  # no block-wise product on a CPU
            wide = (quantized.float().unflatten(-1, (-1, 128)) * scales.unsqueeze(-1)).flatten(-2)
            return (wide @ self.fp8.float().t() * self.scale).to(x.dtype).reshape(*x.shape[:-1], -1)
        if scales.numel() == 0:
            scales = self.static.expand(len(rows), 1).contiguous()
        out = torch._scaled_mm(quantized, self.fp8.t(), scale_a=scales, scale_b=self.scale, out_dtype=x.dtype)
        return out.reshape(*x.shape[:-1], -1)


def quantize(model, spelling):
    """fp8 in place of the linear layers of the decoder that have more than a few columns; not the output head."""
    static = torch.tensor(0.03)  # layers that read one norm have one scale
    for name, module in model.named_modules():
        if type(module) is not nn.Linear or "lm_head" in name or min(module.weight.shape) % 16:
            continue
        if spelling == "vllm_group128" and module.weight.shape[1] % 128:
            continue
        if spelling == "torchao":
            from torchao.quantization.granularity import PerRow
            from torchao.quantization.quantize_.common import KernelPreference
            from torchao.quantization.quantize_.workflows.float8 import float8_tensor

            given = {"granularity": PerRow(), "kernel_preference": KernelPreference.TORCH}
            given["mm_config"] = float8_tensor.Float8MMConfig()
            rows = float8_tensor.QuantizeTensorToFloat8Kwargs(**given)
            weight = float8_tensor.Float8Tensor.from_hp(module.weight.detach(), **given, act_quant_kwargs=rows)
            module.weight = nn.Parameter(weight, requires_grad=False)
        else:
            module.__class__ = Fp8Linear
            module.prepare(spelling, static)


@torch.no_grad()
def forward(rank, world_size, folder, spelling):
    """Counts of the fused model, notes of its sites, kinds of its quantizations, and whether its logits are the eager ones."""
    import tpfuse
    from tpfuse import hf
    from tpfuse.parallel import ParallelConfig

    model = hf.from_pretrained(folder, ParallelConfig(world_size), dtype=torch.bfloat16)
    quantize(model, spelling)
    tokens = torch.arange(10).view(2, 5) + 3
    eager = model(tokens, use_cache=False).logits
    torch._dynamo.reset()
    tpfuse.clear_reports()
    options = {"tpfuse.inner": "aot_eager", "tpfuse.verify": True}
    fused = torch.compile(model, backend="tpfuse", dynamic=False, options=options)(tokens, use_cache=False).logits
    (report,) = (r for r in tpfuse.reports() if r.sites)
    quantizers = {s.quantizer for s in report.fused if s.quantizer is not None}
    counts = [len(report.sites), len(report.fused), sum(s.quantizer is not None for s in report.fused)]
    return counts, [s.note for s in report.fused if s.note], quantizers, torch.equal(eager, fused), report.summary()


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def alone():
    """One rank, whose sums are its own."""
    with RankPool(2, alone=True) as pool:
        yield pool


def golden(name, model, spelling, changes, pool, folder, arithmetic=None):
    models.save(model, str(folder), torch.bfloat16, **changes)
    for counts, notes, quantizers, equal, summary in pool.run(forward, str(folder), spelling):
        assert counts == GOLDEN[name], (counts, notes)
        assert notes == []
        assert quantizers == {str(NAMED[(arithmetic or spelling).replace("_", "-")])}
        assert equal, "fused logits differ from those of the model in eager mode"
        assert f"fused ({counts[2]} quantized)" in summary


@pytest.mark.ranks
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name.startswith("llama") else pytest.mark.slow) for name in CASES]
)
def test_golden_counts_and_equal_logits(name, alone, tmp_path):
    golden(name, *CASES[name], alone, tmp_path)


@pytest.mark.slow
@pytest.mark.ranks
def test_real_sums(pool, tmp_path):
    name = next(iter(CASES))
    golden(name, *CASES[name], pool, tmp_path)


@pytest.mark.ranks
def test_torchaos_own_layers(pool, tmp_path):
    pytest.importorskip("torchao", reason="torchao is not installed")
    golden("llama, torchao per row", "llama", "torchao", {}, pool, tmp_path, "torchao_rowwise")
