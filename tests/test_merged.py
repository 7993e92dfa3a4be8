"""Two sums over the same ranks that are added become one reduction, with relaxed numerics only.

On a fake group a sum over ranks is the partial sum itself, so graphs can be run and compared.
"""

from __future__ import annotations

import graphs
import pytest
import torch
import torch.distributed as dist
from tpfuse.passes import PassOptions

H = 16
EXACT = PassOptions(policy="all", verify=True)
RELAXED = PassOptions(policy="all", numerics="relaxed", verify=True)
ROWS = torch.ops.tpfuse.reduce_rows_add_rms_norm.default
c10d = torch.ops._c10d_functional


@pytest.fixture(autouse=True, scope="module")
def group():
    graphs.start_fake_group(4, 1)
    yield dist.new_group([0, 1]).group_name
    dist.destroy_process_group()


def norm(h, w):
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))


def random(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def inputs(dtype=torch.bfloat16):
    return *(random(3, H, seed=n, dtype=dtype) for n in range(3)), random(H, seed=3, dtype=dtype)


def routed_and_shared(a, b, r, w):
    h = r + (graphs.all_reduce(a) + graphs.all_reduce(b))
    return norm(h, w), h


def fused(f, args, options=RELAXED, target=graphs.OP):
    gm = graphs.trace(f, args)
    new, report = graphs.fused_copy(gm, options)
    new.graph.lint()
    assert graphs.equal(
        graphs.run(new, *args), graphs.run(gm, *args)
    )  # a fake group sums nothing: the bits must be equal
    return new, report


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_two_sums_become_one_reduction_and_the_report_says_what_it_saves(dtype):
    new, report = fused(routed_and_shared, inputs(dtype))
    first, second = report.sites
    assert (first.fused, second.fused, graphs.count(new), graphs.all_reduces_left(new)) == (True, True, 1, 0)
    assert first.pattern == second.pattern == "all_reduce+all_reduce+add+rms_norm"
    assert first.replaced_by == second.replaced_by is not None
    assert f"saves one all_reduce of {H * dtype.itemsize} bytes a row" in first.detail
    assert "relaxed" in first.detail and second.nodes[0] in first.detail


def test_exact_numerics_reduce_both_in_one_op():
    new, report = fused(routed_and_shared, inputs(), EXACT)
    first, second = report.sites
    assert (first.fused, second.fused, graphs.count(new), graphs.all_reduces_left(new)) == (True, True, 1, 0)
    assert first.replaced_by == second.replaced_by is not None
    assert first.detail == f"one op with {second.nodes[0]}, which reduces both, each rounded as by itself"
    assert second.detail.endswith(f"one op with {first.nodes[0]}")
    assert "relaxed" not in first.detail + second.detail


def test_shapes_that_differ_by_views_and_a_scale_behind_the_sums():
    def f(a, b, r, w):
        total = graphs.all_reduce(a).view(1, 3, H) + graphs.all_reduce(b.view(1, 1, 3, H)).view(1, 3, H)
        h = r.view(1, 3, H) + 0.5 * total
        return norm(h, w), h

    assert all(s.fused for s in fused(f, inputs())[1].sites)


def test_two_reduce_scatters():
    def scatter(x):
        return c10d.wait_tensor(c10d.reduce_scatter_tensor(x, "sum", 4, graphs.world()))

    def f(a, b, r, w):
        h = r + (scatter(a) + scatter(b))
        return norm(h, w), h

    args = random(8, H), random(8, H, seed=1), random(2, H, seed=2), random(H, seed=3)
    gm = graphs.trace(f, args)
    new, report = graphs.fused_copy(gm, RELAXED)  # verified against the model's own nodes
    assert [s.pattern for s in report.sites] == ["reduce_scatter+reduce_scatter+add+rms_norm"] * 2
    assert graphs.count(new, ROWS) == 1
    assert not any("reduce_scatter_tensor" in str(n.target) for n in new.graph.nodes)


def test_a_factor_that_every_rank_has():
    """A gate over the sum of an earlier reduction."""

    def f(a, b, r, w):
        gate = torch.sigmoid(graphs.all_reduce(r).mean(-1, keepdim=True))
        h = r + (graphs.all_reduce(a) * gate + graphs.all_reduce(b))
        return norm(h, w), h

    new, report = fused(f, inputs())
    assert [s.fused for s in report.sites] == [False, True, True]
    assert (graphs.count(new), graphs.all_reduces_left(new)) == (1, 1)


@pytest.mark.parametrize("what", ["input", "half of the ranks", "number"])
def test_a_factor_that_may_differ_between_ranks_stays_behind_its_own_sum(group, what):
    def f(a, b, r, w):
        gate = {
            "input": lambda: r[:, :1],
            "half of the ranks": lambda: graphs.all_reduce(r, group=group).mean(-1, keepdim=True),
            "number": lambda: graphs.all_reduce(r).mean(-1, keepdim=True) * dist.get_rank(),
        }[what]()
        h = r + (graphs.all_reduce(a) * gate + graphs.all_reduce(b))
        return norm(h, w), h

    _, report = fused(f, inputs())
    shared, routed = [s for s in report.sites if len(s.group) == 4][-2:]
    assert (shared.fused, routed.fused) == (True, True)
    assert shared.pattern == routed.pattern == "all_reduce+all_reduce*row+add+rms_norm"
    assert "which reduces both, each rounded as by itself" in shared.detail and "relaxed" not in routed.detail


def test_another_group_and_another_reader_are_refused(group):
    def groups(a, b, r, w):
        h = r + (graphs.all_reduce(a, group=group) + graphs.all_reduce(b))
        return norm(h, w), h

    def reader(a, b, r, w):
        first = graphs.all_reduce(a)
        h = r + (first + graphs.all_reduce(b))
        return norm(h, w), first.amax()

    for f, why in ((groups, "over [0, 1], all_reduce"), (reader, "amax reads")):
        first, second = fused(f, inputs())[1].sites
        assert (first.fused, second.fused) == (False, True)
        assert why in first.detail, first.detail


def test_fuel_and_policy_keep_both():
    for options in (
        PassOptions(policy="all", numerics="relaxed", fuel=0),
        PassOptions(policy="off", numerics="relaxed"),
    ):
        new, report = fused(routed_and_shared, inputs(), options)
        assert not any(s.fused for s in report.sites) and graphs.all_reduces_left(new) == 2


@pytest.mark.parametrize("numerics", ["exact", "relaxed"])
def test_fuel_counts_both_sites_of_a_merge(numerics):
    """As reports count them: `tpfuse bisect` numbers rewrites by fused sites."""

    def two_merges(a, b, r, w):
        h = r + (graphs.all_reduce(a) + graphs.all_reduce(b))
        n = norm(h, w)
        h = h + (graphs.all_reduce(n * 2) + graphs.all_reduce(n * 3))
        return norm(h, w), h

    gm = graphs.trace(two_merges, inputs())
    made = {fuel: graphs.fused_copy(gm, PassOptions("all", numerics, fuel=fuel))[1].fused for fuel in range(5)}
    assert {fuel: len(sites) for fuel, sites in made.items()} == {0: 0, 1: 0, 2: 2, 3: 2, 4: 4}
    assert {site.admitted for site in made[4]} == {"policy-all"}


def test_an_exception_costs_the_merge_alone(monkeypatch):
    from tpfuse.passes import merged

    def fails(candidate):
        raise ArithmeticError(f"no merge today of {candidate.pattern}")

    monkeypatch.setattr(merged, "build", fails)
    gm = graphs.trace(routed_and_shared, inputs())
    with pytest.warns(RuntimeWarning, match="no merge today"):
        new, report = graphs.fused_copy(gm, PassOptions("all", "relaxed"))
    other, mine = report.sites
    assert (mine.fused, other.fused, other.reason) == (True, False, "sum-of-reductions")
    assert "they stay two reductions: ArithmeticError: no merge today" in other.detail
    assert (graphs.count(new), graphs.all_reduces_left(new)) == (1, 1)
    with pytest.raises(ArithmeticError):
        graphs.fused_copy(gm, RELAXED)


@pytest.mark.parametrize("options", [EXACT, RELAXED], ids=["exact", "relaxed"])
@pytest.mark.parametrize("which", ["first", "second"])
def test_a_sum_that_alone_is_scaled(which, options):
    """Laguna. The number stays behind its own sum, whichever of the two the graph has first."""

    def laguna(a, b, r, w):
        first = graphs.all_reduce(b)
        second = graphs.all_reduce(a)
        h = r + (first * 2.5 + second if which == "first" else second * 2.5 + first)
        return norm(h, w), h

    new, report = fused(laguna, inputs(), options)
    assert [s.fused for s in report.sites] == [True, True]
    assert (graphs.count(new), graphs.all_reduces_left(new)) == (1, 0)
    # One reduction can make both only where the number is known to be the one of the sum that comes with it.
    assert ("relaxed" in report.sites[0].detail) == (which == "first" and options is RELAXED)


@pytest.mark.parametrize("spelling", ["first", "second", "in a batch", "behind the norm"])
def test_a_sum_with_a_gate_of_one_value_a_row(spelling):
    """Shared experts of Qwen3-Next: ``sigmoid(gate(x)) * shared + routed``; experts see rows without their batch dimension."""

    def qwen(a, b, r, w):
        first, second = graphs.all_reduce(a), graphs.all_reduce(b)
        gate = torch.sigmoid(r.sum(-1, keepdim=True))
        both = second + gate * first if spelling == "second" else gate * first + second
        if spelling == "in a batch":
            both, r = both.view(1, 3, H), r.view(1, 3, H)
        if spelling == "behind the norm":
            return (r + norm(both, w),)
        h = r + both
        return norm(h, w), h

    new, report = fused(qwen, inputs(), EXACT)
    assert [s.fused for s in report.sites] == [True, True], [s.detail for s in report.sites]
    end = "rms_norm+add" if spelling == "behind the norm" else "add+rms_norm"
    assert {s.pattern for s in report.sites} == {f"all_reduce+all_reduce*row+{end}"}
    assert (graphs.count(new), graphs.all_reduces_left(new)) == (1, 0)


def test_a_gate_beside_any_number_of_rows():
    def qwen(a, b, r, w):
        rows = r.view(-1, H)
        shared = graphs.all_reduce(a.view(-1, H)) * torch.sigmoid(rows.sum(-1, keepdim=True))
        h = r + (graphs.all_reduce(b.view(-1, H)) + shared).view(r.shape)
        return norm(h, w), h

    args = *(random(2, 3, H, seed=n) for n in range(3)), random(H, seed=3)
    new, report = graphs.fused_copy(graphs.trace(qwen, args, (0, 1)), EXACT)
    assert [s.fused for s in report.sites] == [True, True], [s.detail for s in report.sites]
    assert graphs.all_reduces_left(new) == 0


def test_two_sums_that_one_op_cannot_make_say_why():
    def gated(a, b, r, w):
        h = r + (graphs.all_reduce(a) * r[:1, :1] + graphs.all_reduce(b))
        return norm(h, w), h

    def quantized(a, b, r, w):
        h = r + (graphs.all_reduce(a) + graphs.all_reduce(b))
        n = norm(h, w)
        scale = n.abs().amax(-1, keepdim=True).float() / 448.0
        return (n.float() / scale).clamp(-448.0, 448.0).to(torch.float8_e4m3fn).float(), scale, h

    def scaled_and_more(a, b, r, w):
        h = r + (graphs.all_reduce(a) * 2.5 + graphs.all_reduce(b)) * 0.5
        return norm(h, w), h

    for f, why in (
        (gated, "one value for several rows"),
        (quantized, "makes one sum"),
        (scaled_and_more, "multiplied by 2.5, and more"),
    ):
        new, report = fused(f, inputs(), EXACT)
        first, second = report.sites
        assert (first.fused, first.reason, second.fused) == (False, "sum-of-reductions", True)
        assert "they stay two reductions: " in first.detail and why in first.detail, first.detail
        assert graphs.all_reduces_left(new) == 1


def test_two_reduce_scatters_stay_two_with_exact_numerics():
    def scatter(x):
        return c10d.wait_tensor(c10d.reduce_scatter_tensor(x, "sum", 4, graphs.world()))

    def f(a, b, r, w):
        h = r + (scatter(a) + scatter(b))
        return norm(h, w), h

    args = random(8, H), random(8, H, seed=1), random(2, H, seed=2), random(H, seed=3)
    _, report = graphs.fused_copy(graphs.trace(f, args), EXACT)
    first, second = report.sites
    assert (first.fused, second.fused) == (False, True)
    assert "the op for rows that a rank keeps makes one sum" in first.detail


def test_a_scalar_of_the_rows_that_a_rank_keeps_is_not_multiplied_in_before_the_sum():
    def scaled(x, r, w):
        mine = c10d.wait_tensor(c10d.reduce_scatter_tensor(x, "sum", 4, graphs.world()))
        h = r + mine * torch.sigmoid(r.mean())
        return norm(h, w), h

    args = (random(8, H), random(2, H, seed=2), random(H, seed=3))
    _, report = graphs.fused_copy(graphs.trace(scaled, args), RELAXED)
    assert [(site.fused, site.reason) for site in report.sites] == [(False, "scale-not-constant")]


def test_a_number_of_the_rank_is_no_proof_and_stands_in_the_pattern():
    def gated(a, b, r, w):
        z = graphs.all_reduce(r).mean(-1, keepdim=True)
        h = r + (graphs.all_reduce(a) * torch.add(z, z, alpha=dist.get_rank() + 1) + graphs.all_reduce(b))
        return norm(h, w), h

    def scaled(a, b, r, w):
        h = r + (graphs.all_reduce(a) * (1 + dist.get_rank()) + graphs.all_reduce(b))
        return norm(h, w), h

    _, report = graphs.fused_copy(graphs.trace(gated, inputs()), RELAXED)
    assert not any("relaxed" in site.detail for site in report.sites)
    _, report = graphs.fused_copy(graphs.trace(scaled, inputs()), RELAXED)
    assert [site.pattern for site in report.sites] == ["all_reduce+all_reduce*2.0+add+rms_norm"] * 2  # ranks compare it
