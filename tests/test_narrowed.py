"""Sums that are taken in fp32 and rounded to 16 bits before the residual is added: DeepSeek's experts, GPT-NeoX, Megatron."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import graphs
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from tpfuse.passes import PassOptions

H = 64
EPS = 1e-5
VERIFIED = PassOptions(policy="all", verify=True)
LAYER_NORM = torch.ops.tpfuse.all_reduce_add_layer_norm.default


@pytest.fixture(autouse=True, scope="module")
def fake_group():
    graphs.start_fake_group(2)
    yield
    dist.destroy_process_group()


def operands(dtype: torch.dtype = torch.bfloat16, rows: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    """An fp32 partial sum whose values 16 bits do not hold, a residual and a weight."""
    g = torch.Generator().manual_seed(5)
    x, residual, weight = (torch.randn(*shape, generator=g) * 3 for shape in ((rows, H), (rows, H), (H,)))
    return x, residual.to(dtype), weight.to(dtype)


def norm(h: Tensor, weight: Tensor) -> Tensor:
    f = h.float()
    return weight * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)).to(h.dtype)


def plain(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    h = residual + x.to(residual.dtype)
    return norm(h, weight), h


def as_a_view(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """DeepSeek V3.2: experts see rows without their batch dimension."""
    return plain(x.view(2, -1, H).type_as(residual), residual.view(2, -1, H), weight)


def unrounded(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The norm of DeepSeek V3.2's own inference code."""
    f = x.to(residual.dtype).float() + residual.float()
    return (weight * (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS))).to(residual.dtype), f.to(residual.dtype)


def bias_and_scale(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return plain((x.to(residual.dtype) + weight) * 0.22, residual, weight)


def an_addend(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return plain(x.to(residual.dtype) + residual.sin(), residual, weight)


def behind_the_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return (residual + norm(x.to(residual.dtype), weight),)


def layer_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """GPT-NeoX with ``fp32_allreduce``."""
    h = residual + (x.to(residual.dtype) + weight)
    return torch.nn.functional.layer_norm(h, (H,), weight, weight, EPS), h


def fuse(f: Callable[..., Any], *args: Tensor) -> tuple[Any, Any, Any]:
    """(what the layer gives, what the rewritten graph gives, its site); the sum is ``args[0]``."""

    def layer(x: Tensor, *more: Tensor) -> Any:
        return f(graphs.all_reduce(x * 1.5), *more)

    unfused = graphs.trace(layer, args)
    fused, report = graphs.fused_copy(unfused, VERIFIED)
    with torch.no_grad():
        return graphs.run(unfused, *args), graphs.run(fused, *args), (report.sites[0], fused)


FUSED = {
    plain: "all_reduce+cast+add+rms_norm",
    as_a_view: "all_reduce+cast+add+rms_norm",
    unrounded: "all_reduce+cast+add+rms_norm",
    bias_and_scale: "all_reduce+cast+bias+scale+add+rms_norm",
    an_addend: "all_reduce+cast+add+add+rms_norm",
    behind_the_norm: "all_reduce+cast+rms_norm+add",
    layer_norm: "all_reduce+cast+bias+add+layer_norm",
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("spelling", FUSED, ids=lambda f: f.__name__)
def test_an_fp32_sum_that_is_rounded_first_is_fused_with_its_bits(spelling, dtype):
    args = operands(dtype)
    want, got, (site, gm) = fuse(spelling, *args)
    assert site.fused, site.detail
    assert (site.pattern, site.dtype) == (FUSED[spelling], "float32")
    assert f"the fp32 sum is rounded once, to {dtype}, before anything is added" in site.detail
    assert graphs.count(gm, LAYER_NORM if spelling is layer_norm else graphs.OP) == 1
    assert graphs.all_reduces_left(gm) == 0
    assert graphs.equal(want, got)
    with torch.no_grad():
        assert graphs.equal(got, spelling(args[0] * 1.5, *args[1:]))


def test_the_partial_sums_stay_fp32():
    _, _, (_, gm) = fuse(plain, *operands())
    (fused,) = [n for n in gm.graph.nodes if n.target is graphs.OP]
    assert [t.meta["val"].dtype for t in fused.args[:2]] == [torch.float32, torch.bfloat16]
    assert [t.dtype for t in fused.meta["val"]] == [torch.bfloat16] * 2


def test_two_layers_with_an_fp32_sum_each():
    def layers(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        for _ in range(2):
            normed, residual = plain(graphs.all_reduce(x), residual, weight)
            x = normed.float() * 1.7
        return x, residual

    args = operands()
    unfused = graphs.trace(layers, args)
    fused, report = graphs.fused_copy(unfused, VERIFIED)
    assert [s.fused for s in report.sites] == [True] * 2, [s.detail for s in report.kept]
    with torch.no_grad():
        assert graphs.equal(graphs.run(fused, *args), layers(*args))


def test_a_narrow_sum_beside_it_stays_a_sum_of_its_own():
    """Routed experts in fp32, shared ones in 16 bits: the op makes the nearer one, and adds the other."""

    def experts(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        shared = graphs.all_reduce(residual.cos())
        routed = graphs.all_reduce(x).to(residual.dtype)
        return plain(routed + shared, residual, weight)

    for swapped in (False, True):

        def layer(x: Tensor, residual: Tensor, weight: Tensor, swapped: bool = swapped) -> tuple[Tensor, Tensor]:
            if not swapped:
                return experts(x, residual, weight)
            routed = graphs.all_reduce(x).to(residual.dtype)
            return plain(routed + graphs.all_reduce(residual.cos()), residual, weight)

        args = operands()
        unfused = graphs.trace(layer, args)
        fused, report = graphs.fused_copy(unfused, VERIFIED)
        assert [s.fused for s in report.sites] == [False, True], [s.detail for s in report.sites]
        assert report.sites[0].reason == "sum-of-reductions"
        assert graphs.all_reduces_left(fused) == 1
        with torch.no_grad():
            assert graphs.equal(graphs.run(fused, *args), layer(*args))


def two_sums(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    own, other = (graphs.all_reduce(t).to(residual.dtype) for t in (x.sin(), x.cos()))
    return plain(own + other, residual, weight)


def one_by_one(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    own, other = (graphs.all_reduce(t).to(residual.dtype) for t in (x.sin(), x.cos()))
    return plain(other, residual + own, weight)


@pytest.mark.parametrize("layer", [two_sums, one_by_one], ids=lambda f: f.__name__)
def test_of_two_fp32_sums_one_is_made_and_the_other_says_what_the_op_lacks(layer):
    args = operands()
    fused, report = graphs.fused_copy(graphs.trace(layer, args), VERIFIED)
    kept, made = report.sites
    assert made.fused, made.detail
    assert (kept.fused, kept.reason) == (False, "sum-of-reductions")
    assert "the op makes a sum alone that is taken in fp32 and rounded before anything is added" in kept.detail
    with torch.no_grad():
        assert graphs.equal(graphs.run(fused, *args), layer(*args))


def test_any_number_of_rows():
    x, residual, weight = operands(rows=6)

    def layer(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return plain(graphs.all_reduce(x), residual, weight)

    args = (x.view(2, 3, H), residual.view(2, 3, H), weight)
    unfused = graphs.trace(layer, args, dynamic=(0, 1))
    _, report = graphs.fused_copy(unfused)
    assert report.sites[0].fused, report.sites[0].detail


# -- what stays ------------------------------------------------------------------------------------------------------------------


def no_residual(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    h = x.to(residual.dtype)
    return norm(h, weight), h


def fp32_residual(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    f = x.to(residual.dtype).float() + residual.cos().float() * 1.1
    return (f * torch.rsqrt(f.pow(2).mean(-1, keepdim=True) + EPS)).to(residual.dtype) * weight, f


def read_in_fp32_too(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    return *plain(x, residual, weight), x.sum()


def rounded_late(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return plain(x + residual.sin().float() * 1.1, residual, weight)


def rounded_to_both(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Through fp16 to bf16: two roundings, which one cast does not give."""
    return plain(x.half(), residual, weight)


@pytest.mark.parametrize(
    ("spelling", "reason", "says"),
    [
        (no_residual, "dtype", "rounds to the dtype of a residual, and none is added"),
        (fp32_residual, "dtype", "is torch.float32, and the fused op rounds to the dtype of its residual"),
        (read_in_fp32_too, "dtype", "is cast from torch.float32 to torch.bfloat16"),
        (rounded_late, "dtype", "the fused op rounds an fp32 sum before anything is added to it"),
        (rounded_to_both, "dtype", "is cast from torch.float16 to torch.bfloat16"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_the_op_does_not_give_is_refused(spelling, reason, says):
    want, got, (site, gm) = fuse(spelling, *operands())
    assert (site.fused, site.reason) == (False, reason), site.detail
    assert says in site.detail
    assert graphs.count(gm) == 0 and graphs.equal(want, got)


def test_rows_that_a_rank_keeps_are_refused_with_the_reason():
    def layer(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        started = torch.ops._c10d_functional.reduce_scatter_tensor(x * 1.5, "sum", 2, graphs.world())
        return plain(torch.ops._c10d_functional.wait_tensor(started), residual[:3], weight)

    args = operands()
    _, report = graphs.fused_copy(graphs.trace(layer, args), VERIFIED)
    (site,) = report.sites
    assert (site.fused, site.reason) == (False, "dtype"), site.detail
    assert "the op for rows that a rank keeps takes no sum that is wider than its residual" in site.detail
