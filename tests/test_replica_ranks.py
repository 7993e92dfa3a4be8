"""The gather of attention replicas on four gloo ranks: bits of the unfused layer, also where ranks decide differently."""

from __future__ import annotations

import pytest
import torch
from ranks import RankPool

pytestmark = pytest.mark.ranks
H = 16


@pytest.fixture(scope="module")
def pool():
    with RankPool(4) as pool:
        yield pool


def layer_of(groups, odd=False):
    """Attention's sum to the experts' sum; where ``odd``, something reads the norm of the own rows as well.

    ``vector``, if any, is added to attention's sum.
    """
    c10d = torch.ops._c10d_functional

    def total(x, name):
        return c10d.wait_tensor(c10d.all_reduce(x, "sum", name))

    def layer(x, r, w, e, largest, vector=None):
        y = total(x, groups["attn_tp"])
        h = r + (y if vector is None else y + vector)
        y = w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))
        rows = y.reshape(-1, H)
        filled = torch.nn.functional.pad(rows, (0, 0, 0, largest - rows.shape[0])).contiguous()
        everyone = c10d.wait_tensor(c10d.all_gather_into_tensor(filled, 2, groups["attn_dp"]))
        out = total(torch.nn.functional.silu(everyone @ e), groups["tp"])
        return out, h + y.sigmoid() if odd else h

    return layer


def names():
    from tpfuse.parallel import ParallelConfig, build_groups

    groups = build_groups(ParallelConfig(4, 2, 1, 2))
    return {name: groups.name_of(name) for name in ("attn_tp", "attn_dp", "tp")}


def given(rank, rows, dtype, columns=3):
    mine = rows[rank // 2]
    x = torch.randn(mine, columns, H, generator=torch.Generator().manual_seed(rank)).to(dtype)
    shared = torch.Generator().manual_seed(10 + rank // 2)
    r = torch.randn(mine, columns, H, generator=shared).to(dtype)
    e = torch.randn(H, H, generator=torch.Generator().manual_seed(20 + rank)).to(dtype)
    return x, r, torch.rand(H, generator=torch.Generator().manual_seed(3)).to(dtype), e, columns * max(rows)


@torch.no_grad()
def compiled(rank, world_size, dtype, odd=None):
    """For each choice of rows whether the fused layer gives the bits of the layer itself; patterns; reasons. Else the error."""
    import tpfuse

    torch._dynamo.reset()
    tpfuse.clear_reports()
    layer = layer_of(names(), odd == rank)
    step = torch.compile(layer, backend="tpfuse", options={"tpfuse.inner": "aot_eager"}, fullgraph=True)
    same = []
    try:
        # One replica alone compiles again for the second, the third and the last choice.
        for rows in ((2, 2), (1, 2), (2, 1), (3, 4), (0, 2), (2, 0)):
            call = given(rank, rows, dtype)
            got = step(*call)
            same.append(all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, layer(*call), strict=True)))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    sites = [site for report in tpfuse.reports() for site in report.sites if len(site.group) == 2]
    return same, {site.pattern for site in sites}, {site.reason for site in sites}


@pytest.mark.parametrize(
    "dtype",
    [torch.bfloat16, *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.float32, torch.float16))],
    ids=str,
)
def test_one_op_gives_the_bits_of_the_layer(pool, dtype):
    for same, patterns, reasons in pool.run(compiled, dtype):
        assert same == [True] * 6
        assert patterns == {"all_reduce+add+rms_norm+all_gather"}
        assert reasons == {None}


@torch.no_grad()
def by_inductor(rank, world_size, dtype):
    """For each choice of rows how far the outputs are from those of the layer itself; the patterns; how many run lowered."""
    import tpfuse

    torch._dynamo.reset()
    tpfuse.clear_reports()
    layer = layer_of(names())
    step = torch.compile(layer, backend="tpfuse", fullgraph=True)
    worst = 0.0
    for rows in ((1, 2), (3, 4), (0, 2)):
        call = given(rank, rows, dtype)
        for got, wanted in zip(step(*call), layer(*call), strict=True):
            worst = max([worst, *(got.double() - wanted.double()).abs().flatten().tolist()])
    sites = [site for report in tpfuse.reports() for site in report.sites if site.over]
    return worst, {site.pattern for site in sites}, [site.lowered for site in sites]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_inductor_compiles_it_too(pool, dtype):
    """In fp32 on a CPU the graph keeps the model's own collectives, that of a replica without rows as well."""
    for worst, patterns, lowered in pool.run(by_inductor, dtype):
        assert worst < (1e-5 if dtype == torch.float32 else 0.2)
        assert patterns == {"all_reduce+add+rms_norm+all_gather"}
        assert len(lowered) >= 2 and set(lowered) == {dtype == torch.float32}


@pytest.mark.parametrize("odd", [3, pytest.param(0, marks=pytest.mark.slow)])
def test_where_one_rank_leaves_its_gather_outside_all_replicas_do(odd):
    """It alone reads the norm of its own rows elsewhere. The sum that it fuses without its gather, its neighbor does not.

    In processes of its own: where ranks have disagreed, those that compile the same lines again keep to that, and a rank with
    other lines gets an error.
    """
    with RankPool(4) as pool:
        for same, _, reasons in pool.run(compiled, torch.float16, odd, timeout=240):
            assert same == [True] * 6
            assert reasons == {"ranks-disagree"}


@torch.no_grad()
def with_a_vector_of_two_dimensions(rank, world_size):
    """The first replica has one row, which has the shape of the vector. (the layer's bits?, the pattern), or the error."""
    import tpfuse

    torch._dynamo.reset()
    tpfuse.clear_reports()
    layer = layer_of(names())
    call = *given(rank, (1, 3), torch.float32, columns=1), torch.full((1, 1, H), 0.5)
    try:
        got = torch.compile(layer, backend="tpfuse", options={"tpfuse.inner": "aot_eager"})(*call)
    except Exception as error:
        return f"{type(error).__name__}: {error}", ""
    same = all(torch.equal(a, b) for a, b in zip(got, torch.compile(layer, backend="aot_eager")(*call), strict=True))
    return same, next(site.pattern for report in tpfuse.reports() for site in report.sites if site.over)


def test_a_vector_that_has_the_shape_of_the_rows_of_one_replica_is_no_disagreement(pool):
    """There it is another addend. The ops of both replicas wait for the same."""
    first, *_, last = pool.run(with_a_vector_of_two_dimensions)
    assert first == (True, "all_reduce+add+add+rms_norm+all_gather")
    assert last == (True, "all_reduce+bias+add+rms_norm+all_gather")
