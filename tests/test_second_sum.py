"""Two sums that meet in one norm, as of parallel attention and MLP: in which orders of the additions they become one op."""

from __future__ import annotations

import graphs
import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from tpfuse.passes import PassOptions

H = 16
LAYER_NORM = torch.ops.tpfuse.all_reduce_add_layer_norm.default
EXACT = PassOptions(policy="all", verify=True)
RELAXED = PassOptions(policy="all", numerics="relaxed", verify=True)

ORDERS = {
    "(a + b) + r: phi, gptj": lambda a, b, r: a + b + r,
    "r + (b + a): gpt_neox, falcon": lambda a, b, r: r + (b + a),
    "(r + a) + b: cohere": lambda a, b, r: (r + a) + b,
    "(b + r) + a": lambda a, b, r: (b + r) + a,
    "b + (a + r), viewed": lambda a, b, r: b + (a.view(1, 3, H) + r.view(1, 3, H)).view(3, H),
    "a + b: embeddings": lambda a, b, r: a + b,
}
NORMS = {"rms_norm": graphs.OP, "layer_norm": LAYER_NORM}
VECTORS = {"no vector": "", "a vector behind each": "ab", "behind the first": "a", "behind the second": "b"}


@pytest.fixture(autouse=True, scope="module")
def group():
    graphs.start_fake_group(4, 1)
    yield dist.new_group([0, 1]).group_name
    dist.destroy_process_group()


def norm(kind, h, w):
    if kind == "layer_norm":
        return torch.nn.functional.layer_norm(h, (H,), w)
    return w * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6))


def block(order, kind, vectors, all_reduce=graphs.all_reduce):
    """A parallel block: what attention and MLP give, with the vectors of their linear layers, meets the residual in a norm."""

    def f(a, b, r, w, va, vb):
        first, second = all_reduce(a), all_reduce(b)
        first = first + va if "a" in vectors else first
        second = second + vb if "b" in vectors else second
        h = ORDERS[order](first, second, r)
        return norm(kind, h, w), h

    return f


def inputs(dtype=torch.bfloat16, seed=0):
    g = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(3, H, generator=g) for _ in range(3)]
    shared = torch.Generator().manual_seed(99)
    return [t.to(dtype) for t in (*tensors, *(torch.randn(H, generator=shared) for _ in range(3)))]


def fused(f, args, options=RELAXED):
    gm = graphs.trace(f, args)
    new, report = graphs.fused_copy(gm, options)
    new.graph.lint()
    return gm, new, report


@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("order", ORDERS)
def test_relaxed_reduces_the_two_sums_once(order, kind, vectors):
    args = inputs(torch.float32)
    gm, new, report = fused(block(order, kind, VECTORS[vectors]), args)
    first, second = report.sites
    assert (graphs.count(new, NORMS[kind]), graphs.all_reduces_left(new)) == (1, 0)
    assert first.pattern == second.pattern and first.pattern.startswith("all_reduce+all_reduce")
    assert first.replaced_by == second.replaced_by is not None
    assert "saves one all_reduce" in first.detail + second.detail
    for model, ours in zip(graphs.run(gm, *args), graphs.run(new, *args), strict=True):
        assert torch.allclose(model, ours, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("vectors", VECTORS)
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("order", ORDERS)
def test_exact_makes_both_in_one_op_with_the_bits_of_the_model(order, kind, vectors):
    """The op for RMSNorm takes no vector beside two sums."""
    one = kind == "layer_norm" or not VECTORS[vectors]
    for dtype in (torch.bfloat16, torch.float32):
        args = inputs(dtype)
        gm, new, report = fused(block(order, kind, VECTORS[vectors]), args, EXACT)
        assert graphs.equal(graphs.run(gm, *args), graphs.run(new, *args))
        assert [s.fused for s in report.sites] == [True, True] or not one
        assert (graphs.all_reduces_left(new) == 0) == one
        assert graphs.count(new, NORMS[kind]) <= 1
        if not one:
            assert {s.reason for s in report.kept} <= {"sum-of-reductions", "add-chain"}


def on_ranks(rank, world_size, numerics, dtype):
    """Every block on real ranks: [order, norm, vectors, fused sites, distance of model and of fused from fp64, equal bits]."""
    import torch.distributed._functional_collectives as funcol

    import tpfuse

    results = []
    for order, kind, vectors in CASES[numerics]:
        args = inputs(dtype, seed=rank)
        everywhere = [inputs(dtype, seed=n) for n in range(world_size)]
        args[2] = everywhere[0][2]  # the residual is the same on all ranks

        def all_reduce(x):
            return funcol.all_reduce(x, "sum", dist.group.WORLD)

        f = block(order, kind, vectors, all_reduce)
        torch._dynamo.reset()
        tpfuse.clear_reports()
        options = {"tpfuse.inner": "aot_eager", "tpfuse.policy": "all", "tpfuse.numerics": numerics}
        with torch.no_grad():
            model = f(*args)
            ours = torch.compile(f, backend="tpfuse", options=options)(*args)
        wide = [t.double() for t in args]
        wide[0], wide[1] = (torch.stack([e[n].double() for e in everywhere]).sum(0) for n in (0, 1))
        want = block(order, kind, vectors, lambda x: x)(*wide)

        def error(got, want=want):
            return max((g.double() - x).abs().max().item() for g, x in zip(got, want, strict=True))

        sites = [s.fused or s.detail for r in tpfuse.reports() for s in r.sites]
        results.append((sites, error(model), error(ours), all(map(torch.equal, model, ours))))
    return results


CASES = {
    "exact": [
        *((order, "layer_norm", "ab") for order in list(ORDERS)[::2]),
        ("(r + a) + b: cohere", "rms_norm", ""),
        ("a + b: embeddings", "rms_norm", ""),
    ],
    "relaxed": [
        ("(a + b) + r: phi, gptj", "layer_norm", "ab"),
        ("(r + a) + b: cohere", "layer_norm", ""),
        ("(b + r) + a", "rms_norm", "b"),
    ],
}


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as pool:
        yield pool


@pytest.mark.ranks
@pytest.mark.parametrize("numerics", ["exact", "relaxed"])
def test_two_ranks(pool, numerics):
    """Exact numerics give the model's bits; relaxed ones are as close to fp64 as the model is."""
    results = pool.run(on_ranks, numerics, torch.bfloat16)
    assert results[0] != [] and [r[0] for r in results[0]] == [r[0] for r in results[1]], "ranks disagree"
    for mine in results:
        for case, (sites, model, ours, equal) in zip(CASES[numerics], mine, strict=True):
            assert sites == [True, True], case
            assert equal if numerics == "exact" else ours <= 2 * model, (case, model, ours)


def refused(f, args=None, options=RELAXED):
    _, new, report = fused(f, args or inputs(), options)
    return new, report.sites


def test_on_a_cpu_inductor_gets_the_nodes_of_both_sums():
    """Lowered: nothing is lost where the op would make two all-reduces anyway. One for two is never lowered."""
    f, args = block("(r + a) + b: cohere", "layer_norm", "ab"), inputs(torch.float32)
    for numerics, lowered in (("exact", True), ("relaxed", False)):
        _, new, report = fused(f, args, PassOptions(policy="all", numerics=numerics, lower=True))
        assert [(s.fused, s.lowered) for s in report.sites] == [(True, lowered)] * 2
        assert graphs.all_reduces_left(new) == (2 if lowered else 0)


def test_the_residual_with_the_first_sum_is_read_elsewhere():
    def f(a, b, r, w, *_):
        middle = r + graphs.all_reduce(a)
        h = middle + graphs.all_reduce(b)
        return norm("layer_norm", h, w), middle.amax()

    new, (first, second) = refused(f)
    assert (first.fused, second.fused, graphs.all_reduces_left(new)) == (False, True, 1)
    assert first.reason == "no-norm" and "amax" in first.detail


def test_a_sum_that_is_added_twice_stays():
    def f(a, b, r, w, *_):
        first = graphs.all_reduce(a)
        h = (graphs.all_reduce(b) + first) + first
        return norm("layer_norm", h, w), h

    new, (first, second) = refused(f)
    assert (first.fused, second.fused, graphs.all_reduces_left(new)) == (False, True, 1)


def test_sequential_layers_are_not_parallel_blocks():
    def f(a, b, r, w, *_):
        h = r + graphs.all_reduce(a)
        n = norm("rms_norm", h, w)
        h = h + graphs.all_reduce(n * b)
        return norm("rms_norm", h, w), h

    new, sites = refused(f)
    assert [s.pattern for s in sites] == ["all_reduce+add+rms_norm"] * 2
    assert graphs.count(new) == 2


def test_a_scaled_sum_behind_the_residual_and_the_first_sum_stays():
    def f(a, b, r, w, *_):
        h = (r + graphs.all_reduce(a)) + 0.5 * graphs.all_reduce(b)
        return norm("rms_norm", h, w), h

    new, (first, second) = refused(f)
    assert (first.fused, second.fused, graphs.all_reduces_left(new)) == (False, True, 1)


def test_another_group_and_a_collective_between(group):
    def groups(a, b, r, w, *_):
        h = (r + graphs.all_reduce(a, group=group)) + graphs.all_reduce(b)
        return norm("layer_norm", h, w), h

    new, sites = refused(groups)
    assert graphs.count(new, LAYER_NORM) == 1 and not any("+all_reduce" in s.pattern for s in sites)

    def between(a, b, r, w, *_):
        first = graphs.all_reduce(a)
        statistics = graphs.all_reduce(b * 2)
        h = (r + first) + graphs.all_reduce(b)
        return norm("layer_norm", h, w), statistics

    new, (first, _, second) = refused(between)
    assert (first.fused, second.fused) == (False, True)
    assert "communicates on the same ranks" in first.detail and "stay two reductions" in first.detail


@pytest.mark.parametrize("options", [EXACT, RELAXED], ids=["exact", "relaxed"])
@pytest.mark.parametrize("flat", ["first", "second"])
def test_one_of_the_two_is_reduced_without_its_batch_dimension(flat, options):
    """Experts see rows, attention sees batches."""

    def f(a, b, r, w):
        first = graphs.all_reduce(a.view(6, H)).view(2, 3, H) if flat == "first" else graphs.all_reduce(a)
        second = graphs.all_reduce(b.view(6, H)).view(2, 3, H) if flat == "second" else graphs.all_reduce(b)
        h = (r + first) + second
        return norm("layer_norm", h, w), h

    g = torch.Generator().manual_seed(5)
    args = [torch.randn(2, 3, H, generator=g).bfloat16() for _ in range(3)] + [torch.rand(H, generator=g).bfloat16()]
    gm, new, report = fused(f, args, options)
    assert [s.fused for s in report.sites] == [True, True]
    for model, ours in zip(graphs.run(gm, *args), graphs.run(new, *args), strict=True):
        assert model.shape == ours.shape
        assert torch.equal(model, ours) if options is EXACT else torch.allclose(model, ours, rtol=0.02, atol=0.02)


def test_the_rows_are_a_symbol():
    def f(a, b, r, w, va, vb):
        h = (r + (graphs.all_reduce(a) + va)) + (graphs.all_reduce(b) + vb)
        return torch.nn.functional.layer_norm(h, (H,), w), h

    args = inputs(torch.float32)
    args = [t.view(1, 3, H).contiguous() for t in args[:3]] + args[3:]
    gm = graphs.trace(f, args, dynamic=(1,))
    for options in (EXACT, RELAXED):
        new, report = graphs.fused_copy(gm, options)
        assert [s.fused for s in report.sites] == [True, True]
        fused_op = next(n for n in new.graph.nodes if n.target is LAYER_NORM)
        assert any(isinstance(size, torch.SymInt) for size in fused_op.meta["val"][0].shape)
