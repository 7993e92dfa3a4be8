"""``tpfuse::all_reduce_add_layer_norm`` on a CPU: bits of the unfused steps, shapes, messages, a compiled graph."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import RankPool
from tpfuse.ops import settings
from tpfuse.ops.flavour import Flavour
from tpfuse.ops.layer_norm_flavour import COHERE, LAYER_NORM, NAMED, NEMOTRON, OLMO, LayerNormFlavour

H = 72


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as pool:
        yield pool


@pytest.mark.parametrize("flavour", [*NAMED.values(), replace(COHERE, moments="var_mean", root="pow", shift="bias")])
def test_a_flavour_travels_as_text_and_tells_itself_in_words(flavour):
    assert LayerNormFlavour.parse(str(flavour)) == flavour
    assert flavour.describe().startswith("LayerNorm")
    assert isinstance(flavour.scaling, Flavour)


def test_a_field_that_is_wrong_is_named():
    with pytest.raises(ValueError, match="moments='welford' is not valid; valid values are native, var_mean, squares"):
        LayerNormFlavour(moments="welford")
    with pytest.raises(ValueError, match="native' is one operator with root='rsqrt'"):
        replace(LAYER_NORM, root="pow")
    with pytest.raises(
        ValueError, match="so out='float32' would be one more cast; use out='input' and cast the result"
    ):
        LayerNormFlavour(out="float32")
    with pytest.raises(ValueError, match="has 2 fields; expected 8: moments/"):
        LayerNormFlavour.parse("native/input")


def steps(name, h, w, b):
    """A norm as its model writes it."""
    if name == "olmo":
        return torch.nn.functional.layer_norm(h.float(), (h.shape[-1],), eps=1e-5).to(h.dtype)
    if name == "cohere":
        f = h.float()
        mean = f.mean(-1, keepdim=True)
        variance = (f - mean).pow(2).mean(-1, keepdim=True)
        return (w.float() * ((f - mean) * torch.rsqrt(variance + 1e-5))).to(h.dtype)
    return torch.nn.functional.layer_norm(h, (h.shape[-1],), w + 1 if name == "nemotron" else w, b, 1e-5)


def unfused_and_fused(rank, world):
    """Calls whose results are not those of the group's all-reduce and the model's own steps."""
    from tpfuse.ops import all_reduce_add_layer_norm

    c10d, group = torch.ops._c10d_functional, torch.distributed.group.WORLD.group_name
    wrong = []
    for name, flavour in NAMED.items():
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for rows in (0, 1, 17):
                own, same = (torch.Generator().manual_seed(s) for s in (rows + 100 * rank, rows))
                x = torch.randn(rows, 2, H, generator=own).to(dtype)
                r, a = ((torch.randn(rows, 2, H, generator=same) + 4).to(dtype) for _ in range(2))
                w, b, v = (torch.randn(H, generator=same).to(dtype) for _ in range(3))
                affine = (None if flavour.gain == "none" else w, None if flavour.shift == "none" else b)
                summed = c10d.wait_tensor(c10d.all_reduce(x, "sum", group)) if rows else x
                for more in ({}, {"bias": v, "addend": a, "scale": 0.22}):
                    got = all_reduce_add_layer_norm(x, r, *affine, flavour=flavour, **more)
                    h = r + (((summed + v) + a) * 0.22 if more else summed)
                    if not (torch.equal(got[1], h) and torch.equal(got[0], steps(name, h, *affine))):
                        wrong.append((name, str(dtype), rows, sorted(more)))
    return wrong


@pytest.mark.ranks
def test_the_op_has_the_bits_of_the_unfused_steps(pool):
    assert pool.run(unfused_and_fused) == [[], []]


def row_by_row(rank, world):
    """In batch-invariant mode: rows that have other bits alone than among others."""
    from tpfuse.ops import all_reduce_add_layer_norm

    settings.asked["on"] = True
    try:
        x, r, a = (torch.randn(9, H, generator=torch.Generator().manual_seed(rank * n)) for n in (1, 0, 0))
        w = torch.ones(H)
        whole = all_reduce_add_layer_norm(x, r, w, w, addend=a)
        parts = [all_reduce_add_layer_norm(x[n : n + 1], r[n : n + 1], w, w, addend=a[n : n + 1]) for n in range(9)]
        return [n for n, p in enumerate(parts) if not all(torch.equal(p[k][0], whole[k][n]) for k in (0, 1))]
    finally:
        settings.asked.clear()
        from tpfuse.ops import forget

        forget(torch.distributed.group.WORLD)


@pytest.mark.ranks
def test_a_row_has_the_same_bits_alone_in_batch_invariant_mode():
    with RankPool(2) as pool:
        assert pool.run(row_by_row) == [[], []]


def compiled(rank, world):
    """The op in a compiled graph with any number of rows: one graph, the bits and strides of an eager call."""
    from tpfuse.ops import all_reduce_add_layer_norm

    w, b = torch.ones(H), torch.full((H,), 0.5)

    def model(x, residual):
        return all_reduce_add_layer_norm(x, residual, w, b)

    run = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    found = []
    with torch.no_grad():
        for rows in (2, 5):
            x = torch.randn(rows, 3, H, generator=torch.Generator().manual_seed(rank))
            for a, c in zip(run(x, x), model(x, x), strict=True):
                found.append(torch.equal(a, c) and a.stride() == c.stride())
    op, group = torch.ops.tpfuse.all_reduce_add_layer_norm.default, torch.distributed.group.WORLD.group_name
    args = (x, x.clone(), w, b, w, x.clone(), 1e-5, 0.5, str(LAYER_NORM), group)
    found += [
        v == "SUCCESS" for v in torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor")).values()
    ]
    return found


@pytest.mark.ranks
def test_it_compiles_in_one_graph_for_any_number_of_rows(pool):
    assert pool.run(compiled) == [[True] * 6] * 2


def refusals(rank, world):
    from tpfuse.ops import all_reduce_add_layer_norm as op

    x, w = torch.ones(4, H), torch.ones(H)
    narrow, needs = x.bfloat16(), torch.ones(4, H, requires_grad=True)
    calls = {
        "no shift": lambda: op(x, x, w, None),
        "shift": lambda: op(x, x, w, w, flavour=COHERE),
        "weight": lambda: op(x, x, None, w),
        "width": lambda: op(x, x, w, torch.ones(H + 1)),
        "residual": lambda: op(x, x[:2], w, w),
        "addend": lambda: op(x, x, w, w, addend=x[:2]),
        "mixed": lambda: op(narrow, narrow, w, w.bfloat16()),
        "text": lambda: op(x, x, w, w, flavour="native"),
        "gradient": lambda: op(x, x, w, w, addend=needs),
    }
    messages = {}
    for name, call in calls.items():
        try:
            call()
        except (ValueError, RuntimeError) as error:
            messages[name] = str(error)
    return messages


@pytest.mark.ranks
def test_what_does_not_fit_is_named_before_anybody_communicates(pool):
    for messages in pool.run(refusals):
        assert all("all_reduce_add_rms_norm" not in text for text in messages.values())
        assert "norm_bias is None, but the flavour's shift is 'bias'" in messages["no shift"]
        assert f"norm_bias is torch.float32 ({H},), but the flavour's shift is 'none'" in messages["shift"]
        assert "weight is None" in messages["weight"]
        assert f"expected a vector of shape ({H},)" in messages["width"]
        assert "residual is torch.float32 (2, 72); expected the dtype and shape of x" in messages["residual"]
        assert "addend is torch.float32 (2, 72); expected torch.float32 of shape (4, 72)" in messages["addend"]
        assert "expected one dtype of" in messages["mixed"]
        assert "has 1 fields" in messages["text"]
        assert "addend requires grad" in messages["gradient"]


def test_the_schema_tells_of_dtypes():
    with torch._subclasses.FakeTensorMode():
        x = torch.empty(7, 64, dtype=torch.bfloat16)
        wide = torch.empty(64)
        promoted = LayerNormFlavour("squares", "float32", "rsqrt", "input", "weight", "own", "bias", "promoted")
        for flavour, affine, dtype in (
            (LAYER_NORM, (wide, wide), torch.bfloat16),
            (OLMO, (None, None), torch.bfloat16),
            (replace(OLMO, out="promoted"), (None, None), torch.float32),
            (NEMOTRON, (x[0], x[0]), torch.bfloat16),
            (promoted, (x[0], wide), torch.float32),
            (promoted, (x[0], x[0]), torch.bfloat16),
        ):
            normed, residual = torch.ops.tpfuse.all_reduce_add_layer_norm(
                x, None, *affine, None, None, 1e-5, 1.0, str(flavour), "0"
            )
            assert (normed.dtype, normed.shape, residual.dtype) == (dtype, x.shape, torch.bfloat16)


def test_the_table_of_the_benchmark_has_ratios_and_errors(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    import layer_norm

    us = {"tpfuse": 6.0, "nccl": 12.0, "rms_norm": 5.0}
    line = {"hidden": 4608, "rows": 1, "us": us, "error": {"tpfuse": 2e-3, "nccl": 3e-3}}
    text = layer_norm.table([line, {**line, "rows": 8, "us": {**us, "nccl": 8.0}}])
    assert text.splitlines()[1].split() == [
        "4608",
        "1",
        "6.00",
        "12.00",
        "5.00",
        "0.50",
        "1.20",
        "2.00e-03",
        "3.00e-03",
    ]
    assert "tpfuse over nccl: 0.612, worst 0.750" in text
