"""Residual sums that are taken in fp32: rounded at once, read by the norm before they are rounded, or never rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import graphs
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from tpfuse.ops import (
    LLAMA,
    SGLANG,
    VLLM,
    Flavour,
    all_reduce_add_rms_norm,
    all_reduce_add_rms_norm_quant,
    reduce_rows_add_rms_norm,
    reference,
)
from tpfuse.ops.quantizer import VLLM_TOKEN
from tpfuse.passes import PassOptions

H = 64
EPS = 1e-5
VERIFIED = PassOptions(policy="all", verify=True)


@pytest.fixture(autouse=True, scope="module")
def fake_group():
    graphs.start_fake_group(2)
    yield
    dist.destroy_process_group()


def operands(dtype: torch.dtype = torch.bfloat16, rows: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    return tuple((torch.randn(*shape, generator=g) * 3).to(dtype) for shape in ((rows, H), (rows, H), (H,)))  # type: ignore[return-value]


def normed(f: Tensor) -> Tensor:
    return f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)


def vllm_native(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``vllm/ir/ops/layernorm.py``: round, then multiply by the weight."""
    f = x.float() + residual.float()
    return (normed(f).to(weight.dtype) * weight).to(x.dtype), f.to(x.dtype)


def sglang_native(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """``forward_native`` of SGLang's ``RMSNorm``: multiply by the weight, then round."""
    f = x.float() + residual.float()
    return (normed(f) * weight).to(x.dtype), f.to(x.dtype)


def in_place(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    f = x.float().add_(residual.float())
    residual = f.to(x.dtype)
    return f.mul_(torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype).mul_(weight), residual


def residual_first(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    f = residual.float() + x
    return weight * normed(f).to(x.dtype), f.to(x.dtype)


def promoted(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    f = residual + x.float()
    return normed(f).to(x.dtype) * weight, f.to(x.dtype)


def no_residual_left(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (normed(x.float() + residual.float()).to(x.dtype) * weight,)


def reshaped(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    f = x.view(2, -1, H).float() + residual.view(2, -1, H).float()
    return normed(f).to(x.dtype) * weight, f.view(-1, H).to(x.dtype)


def rounded_twice(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    f = x.float() + residual.float()
    return normed(f).to(x.dtype) * weight, f.to(x.dtype), f.view(2, -1, H).to(x.dtype)


def scaled(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return vllm_native(x * 0.22, residual, weight)


SPELLINGS = (
    vllm_native, sglang_native, in_place, residual_first, promoted, no_residual_left, reshaped, rounded_twice, scaled,
)  # fmt: skip


def autocast(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """A residual that is never rounded: under autocast, and where Inductor drops the roundings between layers."""
    h = residual.cos().float() * 1.1 + x
    return weight.float() * normed(h), h


def fp32_residual(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    f = x.float() + residual.cos().float().mul(1.1)
    return normed(f).to(x.dtype) * weight, f, f.to(x.dtype)


def returned(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    f = x.float() + residual.float()
    return normed(f).to(x.dtype) * weight, f.to(x.dtype), f


def squares_read(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    f = x.float() + residual.float()
    squares = f.pow(2)
    out = f * torch.rsqrt(squares.mean(-1, keepdim=True) + EPS)
    return out.to(x.dtype) * weight, f.to(x.dtype), squares.sum()


def of_a_biased_and_scaled_sum(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return autocast((x + weight) * 0.22, residual, weight)


STAY_FP32 = (autocast, fp32_residual, returned, squares_read, of_a_biased_and_scaled_sum)


def fuse(f: Callable[..., Any], *args: Tensor) -> tuple[Any, Any, Any]:
    """(what the layer gives, what the rewritten graph gives, its site); the sum is ``args[0]``."""

    def layer(x: Tensor, *more: Tensor) -> Any:
        return f(graphs.all_reduce(x * 1.5), *more)

    unfused = graphs.trace(layer, args)
    fused, report = graphs.fused_copy(unfused, VERIFIED)
    with torch.no_grad():
        return graphs.run(unfused, *args), graphs.run(fused, *args), (report.sites[0], fused)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("spelling", SPELLINGS, ids=lambda f: f.__name__)
def test_a_norm_of_the_unrounded_sum_is_fused_with_its_bits(spelling, dtype):
    args = operands(dtype)
    want, got, (site, gm) = fuse(spelling, *args)
    assert site.fused, site.detail
    assert graphs.count(gm) == 1 and graphs.all_reduces_left(gm) == 0
    assert graphs.equal(want, got)
    with torch.no_grad():
        assert graphs.equal(got, spelling(args[0] * 1.5, *args[1:]))
    assert ("before it is rounded" in site.detail) == (dtype != torch.float32)
    assert Flavour.parse(site.flavour).reads == ("rounded" if dtype == torch.float32 else "unrounded")


def test_rounding_first_would_give_other_bits():
    x, residual, weight = operands()
    for native, flavour in ((vllm_native, VLLM), (sglang_native, SGLANG)):
        want = native(x, residual, weight)
        assert graphs.equal(want, reference.add_rms_norm(x, residual, weight, None, EPS, 1.0, flavour, False))
        other = Flavour.parse(str(flavour).removesuffix("/unrounded"))
        rounded = reference.add_rms_norm(x, residual, weight, None, EPS, 1.0, other, False)
        assert torch.equal(want[1], rounded[1]) and not torch.equal(want[0], rounded[0])


def test_an_fp32_weight_and_gemmas_one_plus_weight():
    def gemma(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return sglang_native(x, residual, weight.float() + 1.0)

    x, residual, weight = operands()
    for f, w in ((sglang_native, weight.float()), (vllm_native, weight.float()), (gemma, weight)):
        want, got, (site, _) = fuse(f, x, residual, w)
        assert site.fused and site.flavour.endswith("/unrounded"), site.detail
        assert graphs.equal(want, got)


def test_a_chain_of_layers_fuses_and_residuals_go_from_op_to_op():
    def layers(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(3):
            x, residual = vllm_native(graphs.all_reduce(torch.relu(x)), residual, weight)
        return x, residual

    args = operands()
    unfused = graphs.trace(layers, args)
    fused, report = graphs.fused_copy(unfused, VERIFIED)
    assert [s.fused for s in report.sites] == [True] * 3, [s.detail for s in report.kept]
    assert graphs.all_reduces_left(fused) == 0
    with torch.no_grad():
        assert graphs.equal(graphs.run(fused, *args), layers(*args))


def test_a_rounded_sum_that_nobody_reads_any_more_goes_with_the_rest():
    """What a mount that removes no dead code hands to the pass."""

    def layer(x: Tensor, residual: Tensor, weight: Tensor) -> Tensor:
        f = graphs.all_reduce(x).float() + residual.float()
        f.to(x.dtype)
        return normed(f).to(x.dtype) * weight

    args = operands()
    gm = graphs.trace_as_written(layer, args)
    cast = next(n for n in gm.graph.nodes if not n.users and n.op == "call_function")
    assert cast.meta["val"].dtype == torch.bfloat16
    fused, report = graphs.fused_copy(gm, VERIFIED)
    assert report.sites[0].fused and graphs.all_reduces_left(fused) == 0
    with torch.no_grad():
        assert graphs.equal(graphs.run(fused, *args), layer(*args))


# -- rounded at once: an add of the sum's own dtype ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_an_add_in_fp32_that_is_rounded_at_once_is_an_add(dtype):
    def add(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        h = (residual.float() + x.float()).to(dtype)
        return normed(h.float()).to(dtype) * weight, h

    want, got, (site, gm) = fuse(add, *operands(dtype))
    assert site.fused and site.flavour == str(LLAMA), site.detail
    assert graphs.equal(want, got) and graphs.all_reduces_left(gm) == 0


def test_experts_that_are_combined_in_fp32():
    """``enable_moe_fp32_combine`` of transformers' HYV3: two sums over ranks are added in fp32 and rounded."""

    def combine(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        routed, shared = graphs.all_reduce(x), graphs.all_reduce(x * 2)
        h = residual + (routed.float() + shared.float()).to(x.dtype)
        return normed(h.float()).to(x.dtype) * weight, h

    args = operands()
    unfused = graphs.trace(combine, args)
    fused, report = graphs.fused_copy(unfused, VERIFIED)
    assert [s.fused for s in report.sites] == [True, True] and graphs.all_reduces_left(fused) == 0
    with torch.no_grad():
        assert graphs.equal(graphs.run(fused, *args), combine(*args))


# -- never rounded: the residual is fp32 -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spelling", STAY_FP32, ids=lambda f: f.__name__)
def test_an_fp32_residual_beside_a_narrow_sum_stays_fp32(spelling, dtype):
    want, got, (site, gm) = fuse(spelling, *operands(dtype))
    assert site.fused, site.detail
    assert graphs.count(gm) == 1 and graphs.all_reduces_left(gm) == 0 and graphs.equal(want, got)
    (fused,) = [n for n in gm.graph.nodes if n.target is torch.ops.tpfuse.all_reduce_add_rms_norm.default]
    assert [t.dtype for t in (fused.args[1].meta["val"], fused.meta["val"][1])] == [torch.float32] * 2


# -- what the op cannot give -----------------------------------------------------------------------------------------------------


def an_adapter_in_fp32(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """LoRA that is not merged: peft keeps it in fp32, and rounds once."""
    h = residual + (x + residual.float().sin() * 1.7).to(x.dtype)
    return normed(h.float()).to(x.dtype) * weight, h


def test_an_adapter_in_fp32_that_joins_the_partial_sum():
    """The remedy of that refusal: rounded before the reduction, the addend needs nothing of the op."""
    x, residual, weight = operands()

    def layer(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        summed = graphs.all_reduce((x + residual.float().sin() * 1.7).to(x.dtype))
        h = residual + summed
        return normed(h.float()).to(x.dtype) * weight, h

    unfused = graphs.trace(layer, (x, residual, weight))
    fused, report = graphs.fused_copy(unfused, VERIFIED)
    assert [s.fused for s in report.sites] == [True]
    assert graphs.equal(graphs.run(fused, x, residual, weight), layer(x, residual, weight))


def fp64_residual(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    h = residual.double() * 1.1 + x
    return normed(h), h


def two_addends(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    f = x.float() + residual.float() + residual.cos().float()
    return normed(f).to(x.dtype) * weight, f.to(x.dtype)


def returned_of_a_mixed_add(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    f = x.float() + residual
    return normed(f).to(x.dtype) * weight, f.to(x.dtype), f


def a_bias(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    f = x.float() + weight.float()
    return normed(f).to(x.dtype) * weight, f.to(x.dtype)


def rounded_and_not(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """The statistic of the rounded sum, the value of the unrounded one: no flavour."""
    f = x.float() + residual.float()
    h = f.to(x.dtype)
    return (f * torch.rsqrt(h.float().pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype) * weight, h


@pytest.mark.parametrize(
    ("spelling", "reason", "says"),
    [
        (an_adapter_in_fp32, "dtype", "only where it is cast to torch.bfloat16, by"),
        (an_adapter_in_fp32, "dtype", "Add it to the partial sum before the reduction"),
        (fp64_residual, "dtype", "is torch.float64"),
        (returned_of_a_mixed_add, "extra-reader", "needs the residual sum before it is rounded"),
        (two_addends, "dtype", "adds to the sum in fp32, and is read by"),
        (a_bias, "unknown-flavour", "adds a vector to the sum in fp32, unrounded"),
        (rounded_and_not, "unknown-flavour", "whose casts the fused op does not repeat"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_the_op_does_not_give_is_refused(spelling, reason, says):
    want, got, (site, gm) = fuse(spelling, *operands())
    assert (site.fused, site.reason) == (False, reason), site.detail
    assert says in site.detail
    assert graphs.count(gm) == 0 and graphs.equal(want, got)


# -- the op ----------------------------------------------------------------------------------------------------------------------


def test_the_text_of_a_flavour_names_the_field_only_where_it_differs():
    assert str(LLAMA) == "float32/mean/rsqrt/input/weight/own/promoted"
    assert str(VLLM) == f"{LLAMA}/unrounded"
    assert [Flavour.parse(str(f)) for f in (LLAMA, VLLM, SGLANG)] == [LLAMA, VLLM, SGLANG]
    with pytest.raises(ValueError, match="reads='never' is not valid; valid values are rounded, unrounded"):
        Flavour.parse(f"{LLAMA}/never")
    with pytest.raises(ValueError, match="the unrounded sum is fp32, so the norm computes in fp32"):
        Flavour(compute="input", reads="unrounded")


def test_the_op_takes_it_and_refuses_it_after_the_norm():
    x, residual, weight = operands()
    with torch.no_grad():
        assert graphs.equal(
            all_reduce_add_rms_norm(x, residual, weight, eps=EPS, flavour=VLLM), vllm_native(x, residual, weight)
        )
        # Without a residual nothing is added: the two flavours are one.
        alone = [all_reduce_add_rms_norm(x, None, weight, eps=EPS, flavour=flavour) for flavour in (VLLM, LLAMA)]
        assert graphs.equal(*alone)
        wide = residual.float() * 1.1
        got = all_reduce_add_rms_norm(x, wide, weight, eps=EPS, flavour=VLLM)
        assert graphs.equal(got, (vllm_native(x, wide, weight)[0], x.float() + wide))
        for other, flavour in ((wide, LLAMA), (residual.double(), VLLM), (residual.half(), VLLM)):
            with pytest.raises(
                ValueError, match="or torch.float32 beside bf16 or fp16 with a flavour that has reads='unrounded'"
            ):
                all_reduce_add_rms_norm(x, other, weight, flavour=flavour)
        with pytest.raises(
            ValueError, match=r"reduce_rows_add_rms_norm: residual is torch.float32 .* expected the dtype of x"
        ):
            reduce_rows_add_rms_norm(x, wide[:3], weight, flavour=VLLM)
        with pytest.raises(ValueError, match=r"all_reduce_add_rms_norm_quant: residual is torch.float32"):
            all_reduce_add_rms_norm_quant(x, wide, weight, flavour=VLLM, quantizer=VLLM_TOKEN)
        with pytest.raises(ValueError, match="post_norm=True adds the residual after the norm"):
            all_reduce_add_rms_norm(x, residual, weight, flavour=VLLM, post_norm=True)
