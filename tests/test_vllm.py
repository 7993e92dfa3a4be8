"""The vLLM shim, with stand-ins for vLLM's operators: no vLLM is installed where these tests run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import layers
import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from torch import Tensor, nn
from torch.nn import functional as F

pytestmark = pytest.mark.ranks

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

GROUP = "tp:0"
EPS = 1e-5
_libraries: list[Any] = []


def define_operators() -> None:
    """vLLM's operators by name and schema, computed as its kernels do."""
    if _libraries:
        return
    space, ir, kernels = (torch.library.Library(n, "DEF") for n in ("vllm", "vllm_ir", "_C"))
    _libraries.extend((space, ir, kernels))
    space.define("all_reduce(Tensor tensor, str group_name) -> Tensor")
    kernels.define("rms_norm(Tensor! result, Tensor input, Tensor weight, float epsilon) -> ()")
    kernels.define("fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor weight, float epsilon) -> ()")
    ir.define("rms_norm(Tensor x, Tensor weight, float epsilon) -> Tensor")
    ir.define("fused_add_rms_norm(Tensor x, Tensor x_residual, Tensor weight, float epsilon) -> (Tensor, Tensor)")

    def all_reduce(tensor: Tensor, group_name: str) -> Tensor:
        assert group_name == GROUP
        out = tensor.clone()
        dist.all_reduce(out)
        return out

    def norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        h = x.float()
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + epsilon)).to(x.dtype) * weight

    def add_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
        summed = x + residual
        return norm(summed, weight, epsilon), summed

    def norm_into(result: Tensor, input: Tensor, weight: Tensor, epsilon: float) -> None:
        result.copy_(norm(input, weight, epsilon))

    def add_norm_in_place(input: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> None:
        normed, summed = add_norm(input, residual, weight, epsilon)
        input.copy_(normed)
        residual.copy_(summed)

    space.impl("all_reduce", all_reduce, "CPU")
    space.impl("all_reduce", lambda tensor, group_name: torch.empty_like(tensor), "Meta")
    ir.impl("rms_norm", norm, "CompositeExplicitAutograd")
    ir.impl("fused_add_rms_norm", add_norm, "CompositeExplicitAutograd")
    kernels.impl("rms_norm", norm_into, "CPU")
    kernels.impl("rms_norm", lambda *a: None, "Meta")
    kernels.impl("fused_add_rms_norm", add_norm_in_place, "CPU")
    kernels.impl("fused_add_rms_norm", lambda *a: None, "Meta")


class Model(nn.Module):
    """vLLM's layer structure: the residual is passed along beside the hidden states, each norm takes both."""

    def __init__(self, n_layers: int, ir: bool, rank: int) -> None:
        super().__init__()
        same, own = torch.Generator().manual_seed(2), torch.Generator().manual_seed(10 + rank)
        self.ir = ir
        self.norms = nn.ParameterList(torch.rand(layers.HIDDEN, generator=same) + 0.5 for _ in range(2 * n_layers + 1))
        # Each rank's own slice of the row-parallel weights.
        self.rows = nn.ParameterList(
            torch.randn(layers.HIDDEN, layers.HIDDEN, generator=own) / 8 for _ in range(2 * n_layers)
        )
        self.to(torch.bfloat16).requires_grad_(False)

    def norm(self, x: Tensor, residual: Tensor | None, weight: Tensor) -> tuple[Tensor, Tensor]:
        if residual is None:
            if self.ir:
                return torch.ops.vllm_ir.rms_norm(x, weight, EPS), x
            out = torch.empty_like(x)
            torch.ops._C.rms_norm(out, x, weight, EPS)
            return out, x
        if self.ir:
            return torch.ops.vllm_ir.fused_add_rms_norm(x, residual, weight, EPS)
        torch.ops._C.fused_add_rms_norm(x, residual, weight, EPS)
        return x, residual

    def forward(self, embedded: Tensor) -> tuple[Tensor, Tensor]:
        # The vocabulary is sharded: the embedding is a reduction too, and the first norm reads it.
        hidden, residual = torch.ops.vllm.all_reduce(embedded, GROUP), None
        for weight, row in zip(self.norms, self.rows, strict=False):
            hidden, residual = self.norm(hidden, residual, weight)
            hidden = torch.ops.vllm.all_reduce(F.linear(F.silu(hidden), row), GROUP)
        return self.norm(hidden, residual, self.norms[len(self.rows)])


def compile_as_vllm_does(rank: int, world_size: int, ir: bool, options: dict[str, Any] | None = None) -> dict[str, Any]:
    define_operators()
    from torch._inductor import config
    from vllm_pass import VllmPass

    import tpfuse

    torch._dynamo.reset()
    tpfuse.clear_reports()  # fuel counts from here
    model = Model(2, ir, rank)
    x = torch.randn(3, layers.HIDDEN, generator=torch.Generator().manual_seed(rank)).bfloat16()
    ours = VllmPass(ranks=lambda name: range(world_size), options=options)
    # vLLM compiles with the first version of auto_functionalized, and mounts its passes as the post-grad post-pass.
    with torch.no_grad(), config.patch(enable_auto_functionalized_v2=False, post_grad_custom_post_pass=ours):
        want = model(x.clone())
        got = torch.compile(model, backend="inductor", options={"emulate_precision_casts": True})(x.clone())
    (report,) = ours.reports
    return {
        "patterns": [s.pattern for s in report.fused],
        "found": len(report.sites),
        "groups": {s.group for s in report.sites},
        "reasons": [s.reason for s in report.kept],
        "error": max((a.float() - b.float()).abs().max().item() for a, b in zip(want, got, strict=True)),
        "outputs": got,
    }


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    env = {
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("inductor")),
        "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
        "TORCHINDUCTOR_COMPILE_THREADS": "1",
    }
    with RankPool(2, env=env) as pool:
        yield pool


@pytest.mark.parametrize("ir", [False, True], ids=["auto_functionalized", "vllm_ir"])
def test_every_reduction_of_vllms_graph_is_fused(pool, ir):
    results = pool.run(compile_as_vllm_does, ir)
    for result in results:
        assert result["patterns"] == ["all_reduce+rms_norm"] + 4 * ["all_reduce+add+rms_norm"], result["reasons"]
        assert result["found"] == 5
        assert result["groups"] == {(0, 1)}
        assert result["error"] < 0.05
    assert all(torch.equal(a, b) for a, b in zip(results[0]["outputs"], results[1]["outputs"], strict=True))


def test_what_is_not_fused_says_why_and_stays_right(pool):
    for result in pool.run(compile_as_vllm_does, False, {"tpfuse.fuel": 2}):
        assert len(result["patterns"]) == 2
        assert result["reasons"] == ["fuel"] * 3
        assert result["error"] < 0.05
