"""``tpfuse.engines.layers``: the call of a layer that is written by hand, with norm modules of several engines."""

from __future__ import annotations

from typing import Any

import graphs
import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from torch import Tensor, nn
from tpfuse.ops import GEMMA, LLAMA, SGLANG, VLLM

from tpfuse.engines import layers
from tpfuse.engines.layers import fused_allreduce_rms_norm, rounding_of

H = 64


class Norm(nn.Module):
    """What the norms of engines have in common."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(H, generator=torch.Generator().manual_seed(1)) + 0.5)
        self.variance_epsilon = 1e-5
        self.bfloat16().requires_grad_(False)

    def scaled(self, f: Tensor) -> Tensor:
        return f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


class Vllm(Norm):
    """``vllm/ir/ops/layernorm.py``."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        dtype, f = x.dtype, x.float()
        if residual is not None:
            f = f + residual.float()
            residual = f.to(dtype)
        out = (self.scaled(f).to(self.weight.dtype) * self.weight.data).to(dtype)
        return out if residual is None else (out, residual)


class Gemma(Norm):
    """``GemmaRMSNorm.forward_native`` of SGLang."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        dtype = x.dtype
        if residual is not None:
            x = x + residual
            residual = x
        out = (self.scaled(x.float()) * (1.0 + self.weight.float())).to(dtype)
        return out if residual is None else (out, residual)


class Sglang(Norm):
    """``RMSNorm.forward_native`` of SGLang, which decides what it takes at run time."""

    def forward(self, *given: Any) -> Any:
        x, residual = (*given, None)[:2]
        dtype, f = x.dtype, x.to(torch.float32)
        if residual is not None:
            f = f + residual.to(torch.float32)
            residual = f.to(dtype)
        out = (self.scaled(f) * self.weight).to(dtype)
        return out if residual is None else (out, residual)


class NanoVllm(Norm):
    """``nanovllm/layers/layernorm.py``: compiled, and in place."""

    @torch.compile
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        dtype = x.dtype
        x = x.float().add_(residual.float())
        residual = x.to(dtype)
        x.mul_(torch.rsqrt(x.pow(2).mean(dim=-1, keepdim=True) + self.variance_epsilon))
        return x.to(dtype).mul_(self.weight), residual


class Llama(Norm):
    """transformers' norm takes one tensor."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.weight * self.scaled(hidden_states.float()).to(hidden_states.dtype)


NORMS = {Vllm: VLLM, Gemma: GEMMA, Sglang: SGLANG, NanoVllm: VLLM, Llama: LLAMA}


@pytest.fixture(autouse=True)
def fake_group(request):
    """Two ranks of which a sum is the partial sum itself."""
    if request.node.get_closest_marker("ranks"):
        yield
        return
    graphs.start_fake_group(2)
    layers._known.clear()
    yield
    dist.destroy_process_group()


def rows(seed: int = 3, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple((torch.randn(5, H, generator=g) * 2).to(dtype) for _ in range(2))  # type: ignore[return-value]


def unfused(norm: nn.Module, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    with torch.compiler.set_stance("force_eager"):
        if isinstance(norm, Llama | nn.RMSNorm):
            return norm(residual + x), residual + x
        return norm(x.clone(), residual.clone())


class Quantizing(Llama):
    """Rows for an fp8 GEMM instead of the norm."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        normed = super().forward(hidden_states).float()
        scale = normed.abs().amax(-1, keepdim=True).clamp(min=1e-12) / 448.0
        return (normed / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn)


def test_a_norm_that_quantizes_is_refused_by_name():
    with pytest.raises(ValueError, match="Quantizing"):
        rounding_of(Quantizing(), H, torch.bfloat16, group=dist.group.WORLD)


@pytest.mark.parametrize("kind", NORMS, ids=lambda kind: kind.__name__)
def test_a_norm_of_an_engine_gets_its_own_rounding_and_bits(kind):
    norm, (x, residual) = kind(), rows()
    group = dist.group.WORLD
    found = rounding_of(norm, H, torch.bfloat16, group=group)
    assert (found.flavour, found.eps, found.weight) == (str(NORMS[kind]), 1e-5, "weight")
    with torch.no_grad():
        got = fused_allreduce_rms_norm(x, residual, norm, group=group)
        assert graphs.equal(got, unfused(norm, x, residual))
        assert got[0].data_ptr() != x.data_ptr()
        want = unfused(norm, x, residual)
        got = fused_allreduce_rms_norm(x, residual, norm, group=group, in_place=True)
        assert got[0] is x and got[1] is residual and graphs.equal(got, want)


def test_rounding_matters():
    (x, residual), norms = rows(), [kind() for kind in (Vllm, Sglang, Llama)]
    with torch.no_grad():
        normed = [fused_allreduce_rms_norm(x, residual, norm, group=dist.group.WORLD)[0] for norm in norms]
    assert not torch.equal(normed[0], normed[1]) and not torch.equal(normed[0], normed[2])


def test_the_first_norm_of_a_model_has_no_residual():
    x, _ = rows()
    for norm in (Vllm(), Gemma(), Llama(), nn.RMSNorm(H).bfloat16()):
        with torch.no_grad():
            got = fused_allreduce_rms_norm(x, None, norm, group=dist.group.WORLD)
            assert graphs.equal(got, (norm(x), x))
    with pytest.raises(ValueError, match="in_place=True writes the residual sum over residual, which is None"):
        fused_allreduce_rms_norm(x, None, Vllm(), group=dist.group.WORLD, in_place=True)


def test_a_norm_is_traced_once_for_its_rows_and_its_weight_is_read_each_time(monkeypatch):
    norm, (x, residual) = Vllm(), rows()
    asked = []
    monkeypatch.setattr(layers, "rounding_of", lambda *a, **k: asked.append(a) or rounding_of(*a, **k))
    with torch.no_grad():
        fused_allreduce_rms_norm(x, residual, norm, group=dist.group.WORLD)
        norm.weight.mul_(2.0)
        fused_allreduce_rms_norm(x[:2], residual[:2], norm, group=dist.group.WORLD)
        norm.weight = nn.Parameter(torch.rand(H).bfloat16(), requires_grad=False)
        got = fused_allreduce_rms_norm(x, residual, norm, group=dist.group.WORLD)
        assert graphs.equal(got, norm(x, residual)) and len(asked) == 1
        wide = [t.float() for t in (x, residual)]
        norm.float()
        assert graphs.equal(fused_allreduce_rms_norm(*wide, norm, group=dist.group.WORLD), norm(*wide))
    assert len(asked) == 2


def test_a_group_of_one_rank_calls_the_norm():
    alone = dist.new_group([0])
    for kind in (Vllm, Llama):
        norm, (x, residual) = kind(), rows()
        with torch.no_grad():
            want = unfused(norm, x, residual)
            assert graphs.equal(fused_allreduce_rms_norm(x, residual, norm, group=alone), want)
            got = fused_allreduce_rms_norm(x, residual, norm, group=alone, in_place=True)
            assert got[0] is x and got[1] is residual and graphs.equal(got, want)


class Gated(Norm):
    """``RMSNormGated`` of Mamba 2: what it takes beside the rows is no residual."""

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Tensor:
        f = x.float() if gate is None else x.float() * nn.functional.silu(gate.float())
        return self.weight * self.scaled(f).to(x.dtype)


@pytest.mark.parametrize("ranks", [[0], [0, 1]], ids=str)
def test_a_second_argument_that_is_no_residual_is_refused(ranks):
    group, (x, residual) = dist.new_group(ranks), rows()
    with torch.no_grad(), pytest.raises(ValueError, match="its second argument is no residual"):
        fused_allreduce_rms_norm(x.view(-1, H)[:2], residual.view(-1, H)[:2], Gated(), group=group)


def test_a_norm_that_was_cast_since_the_last_call_gets_another_rounding():
    norm, (x, residual) = Vllm(), rows()
    with torch.no_grad():
        for cast in (norm.bfloat16, norm.float, norm.bfloat16):
            cast()
            got = fused_allreduce_rms_norm(x, residual, norm, group=dist.group.WORLD)
            assert graphs.equal(got, unfused(norm, x, residual))


def test_under_a_compile_the_rounding_is_given():
    torch._dynamo.reset()
    norm, (x, residual) = Vllm(), rows()

    def layer(x: Tensor, residual: Tensor, flavour: Any = None) -> tuple[Tensor, Tensor]:
        return fused_allreduce_rms_norm(x * 2, residual, norm, group=dist.group.WORLD, flavour=flavour)

    with torch.no_grad():
        compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
        with pytest.raises(Exception, match="inside torch.compile the rounding order of the norm has to be given"):
            compiled(x, residual)
        flavour = rounding_of(norm, H, torch.bfloat16, group=dist.group.WORLD).flavour
        assert graphs.equal(compiled(x, residual, flavour), unfused(norm, x * 2, residual))


class Kernel(Norm):
    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        raise RuntimeError("not on this device")


class Doubled(Vllm):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        out, residual = super().forward(x, residual)
        return out * 2, residual


class Scaled(Norm):
    """A scalar parameter in front of the norm, which the op would take as a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.75, dtype=torch.bfloat16), requires_grad=False)

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        residual = residual + x * self.scale
        return self.weight * self.scaled(residual.float()).to(x.dtype), residual


class Swapped(Vllm):
    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        return super().forward(x, residual)[::-1]


@pytest.mark.parametrize(
    ("norm", "says"),
    [
        (Kernel, "Kernel for rows of 64 torch.bfloat16 cannot be traced: RuntimeError: not on this device"),
        (
            lambda: nn.LayerNorm(H).bfloat16(),
            "LayerNorm for rows of 64 torch.bfloat16 is not what the op computes: it is a LayerNorm",
        ),
        (Doubled, "does more than reduce, add and normalize"),
        (Swapped, "does more than reduce, add and normalize"),
        (Scaled, "does more than reduce, add and normalize"),
    ],
)
def test_a_norm_that_is_not_the_ops_is_refused(norm, says):
    x, residual = rows()
    with torch.no_grad(), pytest.raises(ValueError, match=says) as caught:
        fused_allreduce_rms_norm(x, residual, norm(), group=dist.group.WORLD)
    assert "If it is a kernel whose rounding you know, pass flavour=" in str(caught.value)


@pytest.mark.parametrize("given", [None, VLLM], ids=["traced", "given"])
def test_a_residual_of_another_dtype_is_refused(given):
    """The op would give back fp32, the norm gives back bf16."""
    norm, (x, residual) = Vllm(), rows()
    with torch.no_grad():
        assert norm(x, residual.float())[1].dtype == torch.bfloat16
        with pytest.raises(ValueError, match=r"residual is torch.float32, hidden_states torch.bfloat16; expected one"):
            fused_allreduce_rms_norm(x, residual.float(), norm, group=dist.group.WORLD, flavour=given)


def test_a_kernel_whose_rounding_is_given_is_taken_at_its_word():
    norm, (x, residual) = Kernel(), rows()
    with torch.no_grad():
        got = fused_allreduce_rms_norm(x, residual, norm, group=dist.group.WORLD, flavour=SGLANG)
        assert graphs.equal(got, unfused(Sglang(), x, residual))
    del norm.variance_epsilon
    with pytest.raises(ValueError, match="Kernel has none of the attributes variance_epsilon, eps, epsilon"):
        fused_allreduce_rms_norm(x, residual, norm, group=dist.group.WORLD, flavour=SGLANG)


def on_ranks(rank: int, world: int) -> list[bool]:
    equal = []
    for kind in (Vllm, Gemma, Sglang, Llama):
        norm, (_, residual), (x, _) = kind(), rows(), rows(10 + rank)
        summed = x.clone()
        dist.all_reduce(summed)
        with torch.no_grad():
            want = unfused(norm, summed, residual)
            got = fused_allreduce_rms_norm(x, residual, norm, group=dist.group.WORLD, in_place=True)
        equal.append(graphs.equal(got, want))
    return equal


@pytest.mark.ranks
def test_real_sums_have_the_bits_of_the_unfused_layer():
    with RankPool(2) as pool:
        assert pool.run(on_ranks) == [[True] * 4] * 2
