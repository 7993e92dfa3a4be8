"""Two partial sums that meet in one norm, on a CPU: bits of two all-reduces and the model's steps, messages, a compiled graph."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import graphs
import pytest
import torch
from ranks import RankPool
from tpfuse.ops import COHERE, GEMMA, LAYER_NORM, LLAMA, OLMO2, SGLANG, VLLM, invariant, settings
from tpfuse.ops.layer_norm_reference import layer_norm
from tpfuse.ops.reference import rms_norm

H = 72
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(scope="module")
def pool():
    with RankPool(3) as pool:
        yield pool


def summed(x: torch.Tensor) -> torch.Tensor:
    """The group's own all-reduce, as a model makes it."""
    total = x.clone()
    if total.numel():
        torch.distributed.all_reduce(total)
    return total


def operands(rank: int, rows: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Two partial sums of this rank; residual, weight, and three vectors that all ranks share."""
    own, same = (torch.Generator().manual_seed(s) for s in (seed + 100 * rank + 1, seed))
    a, b = (torch.randn(*rows, H, generator=own).to(dtype) for _ in range(2))
    r = torch.randn(*rows, H, generator=same).to(dtype)
    return a, b, r, *(torch.randn(H, generator=same).to(dtype) for _ in range(4))


def rms_calls(rank: int, world: int) -> list[Any]:
    """Calls whose bits are not those of two all-reduces and the steps of a model."""
    from tpfuse.ops import all_reduce_add_rms_norm as op

    wrong = []
    for dtype, rows in product(FLOATS, ((0,), (1,), (2, 9), (300,))):
        a, b, r, w, *_ = operands(rank, rows, dtype)
        sa, sb = summed(a), summed(b)
        by = torch.tensor(0.22, dtype=dtype)
        gate = torch.sigmoid(r[..., :1] + rank)  # each rank's own
        kinds: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {
            "plain": (r + (sa + sb), {}),
            "scaled": (r + (sa + sb) * 0.22, {"scale": 0.22}),
            "scale first": (r + (sa * by + sb), {"scale": by, "scale_first": True}),
            "residual first": ((r + sa) + sb, {"residual_first": True}),
            "gated": (r + (sa * gate + sb), {"scale": gate, "scale_first": True}),
            "gated, flat": (r + (sa * gate + sb), {"scale": gate.view(-1, 1), "scale_first": True}),
        }
        for name, (h, more) in kinds.items():
            for flavour in (LLAMA, GEMMA):
                got = op(a, r, w, bias=b, partial_bias=True, flavour=flavour, **more)
                if not (torch.equal(got[1], h) and torch.equal(got[0], rms_norm(h, w, 1e-6, flavour))):
                    wrong.append((name, str(dtype), rows))
            out = torch.full_like(a, float("nan")), r.clone()
            op(a, out[1], w, bias=b, partial_bias=True, out=out, **more)
            if not torch.equal(out[1], h):
                wrong.append((name, "into the residual", str(dtype), rows))
        n = rms_norm(sa + sb, w, 1e-6, OLMO2)
        got = op(a, r, w, bias=b, partial_bias=True, flavour=OLMO2, post_norm=True)
        alone = op(a, None, w, bias=b, partial_bias=True)
        if not (torch.equal(got[0], n) and torch.equal(got[1], r + n) and torch.equal(alone[1], sa + sb)):
            wrong.append(("post-norm or no residual", str(dtype), rows))
        if dtype in (torch.bfloat16, torch.float16):
            got = op(a, r.float(), w.float(), bias=b, partial_bias=True, flavour=SGLANG)
            if not torch.equal(got[1], r.float() + (sa + sb).float()):
                wrong.append(("fp32 residual", str(dtype), rows))
    x, other = torch.full((H,), float(rank)), torch.full((H,), 2.0 * rank)  # no leading dimensions
    if not torch.equal(op(x, None, torch.ones(H), bias=other, partial_bias=True)[1], torch.full((H,), 9.0)):
        wrong.append("one dimension")
    return wrong


@pytest.mark.ranks
def test_rms_norm_has_the_bits_of_two_all_reduces(pool):
    assert pool.run(rms_calls) == [[]] * 3


def layer_norm_calls(rank: int, world: int) -> list[Any]:
    from tpfuse.ops import all_reduce_add_layer_norm as op

    wrong = []
    for dtype, rows, flavour in product(FLOATS[:3], ((0,), (1,), (2, 9)), (LAYER_NORM, COHERE)):
        a, b, r, w, v, va, vb = operands(rank, rows, dtype)
        sa, sb, shift = summed(a), summed(b), None if flavour == COHERE else v
        kinds: dict[str, tuple[torch.Tensor, dict[str, Any]]] = {
            "phi": (r + ((sa + va) + (sb + vb)), {"bias": va, "addend_bias": vb}),
            "gptj": (r + (sa + (sb + vb)), {"addend_bias": vb}),
            "falcon": (r + (sa + sb), {}),
            "scaled": (r + (sa + sb) * 0.5, {"scale": 0.5}),
            "cohere": ((r + sa) + sb, {"residual_first": True}),
            "cohere with biases": (
                (r + (sa + va)) + (sb + vb),
                {"bias": va, "addend_bias": vb, "residual_first": True},
            ),
        }
        for name, (h, more) in kinds.items():
            got = op(a, r, w, shift, addend=b, partial_addend=True, flavour=flavour, **more)
            want = layer_norm(h, w, shift, 1e-5, flavour)
            if not (torch.equal(got[1], h) and torch.equal(got[0], want)):
                wrong.append((name, str(dtype), rows, str(flavour)))
    return wrong


@pytest.mark.ranks
def test_layer_norm_has_the_bits_of_two_all_reduces(pool):
    assert pool.run(layer_norm_calls) == [[]] * 3


def invariant_calls(rank: int, world: int) -> list[str]:
    """In batch-invariant mode: both sums in rank order, and a row alone as among others."""
    from tpfuse.ops import all_reduce_add_layer_norm, all_reduce_add_rms_norm, forget

    settings.asked["on"] = True
    wrong = []
    try:
        for dtype in (torch.float32, torch.bfloat16):
            a, b, r, w, v, va, vb = operands(rank, (40,), dtype, seed=3)
            everybody = [operands(other, (40,), dtype, seed=3) for other in range(world)]
            sums = []
            for which in (0, 1):
                total = torch.zeros(40, H)
                for given in everybody:
                    total += given[which].float()
                sums.append(total.to(dtype))
            first = {"partial_bias": True, "residual_first": True}
            whole = all_reduce_add_rms_norm(a, r, w, bias=b, **first)
            gate, scaled = torch.sigmoid(r[:, :1]), {"partial_bias": True, "scale_first": True}
            gated = all_reduce_add_rms_norm(a, r, w, bias=b, scale=gate, **scaled)
            if not torch.equal(gated[1], r + (sums[0] * gate + sums[1])):
                wrong.append(f"{dtype}: not the gated sum in rank order")
            if not torch.equal(whole[1], (r + sums[0]) + sums[1]):
                wrong.append(f"{dtype}: not the sums in rank order")
            affine = {"bias": va, "addend_bias": vb, "partial_addend": True}
            centered = all_reduce_add_layer_norm(a, r, w, v, addend=b, **affine)
            if not torch.equal(centered[1], r + ((sums[0] + va) + (sums[1] + vb))):
                wrong.append(f"{dtype}: LayerNorm: not the sums in rank order")
            for row in (0, 17, 39):
                one = slice(row, row + 1)
                alone = all_reduce_add_rms_norm(a[one], r[one], w, bias=b[one], **first)
                also = all_reduce_add_layer_norm(a[one], r[one], w, v, addend=b[one], **affine)
                by_gate = all_reduce_add_rms_norm(a[one], r[one], w, bias=b[one], scale=gate[one], **scaled)
                for got, want in ((alone, whole), (also, centered), (by_gate, gated)):
                    if not all(torch.equal(g[0], t[row]) for g, t in zip(got, want, strict=True)):
                        wrong.append(f"{dtype}: row {row}")
    finally:
        settings.asked.clear()
        forget(torch.distributed.group.WORLD)
    return wrong


@pytest.mark.ranks
def test_in_batch_invariant_mode_both_sums_are_taken_in_rank_order():
    with RankPool(3) as pool:
        assert pool.run(invariant_calls) == [[]] * 3
    assert invariant.batch_invariant() is False


def compiled(rank: int, world: int) -> list[bool]:
    """Both ops in compiled graphs with any number of rows: one graph, the bits of an eager call; and torch's own checks."""
    from tpfuse.ops import all_reduce_add_layer_norm, all_reduce_add_rms_norm

    found = []
    *_, w, v, va, vb = operands(rank, (1,), torch.float32)

    def model(a, b, r):
        n, h = all_reduce_add_rms_norm(a, r, w, bias=b, partial_bias=True, residual_first=True)
        gate = torch.sigmoid(n.flatten(0, 1)[:, :1])
        n, h = all_reduce_add_rms_norm(a, h, w, bias=n, partial_bias=True, scale=gate, scale_first=True)
        more = {"addend": b * 2, "partial_addend": True, "bias": va, "addend_bias": vb}
        return all_reduce_add_layer_norm(n, h, w, v, **more)

    run = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for rows in (2, 5):
            a, b, r, *_ = operands(rank, (rows, 3), torch.float32)
            found += [torch.equal(x, y) for x, y in zip(run(a, b, r), model(a, b, r), strict=True)]
    group = torch.distributed.group.WORLD.group_name
    rms = (a, r, w, b, 1e-6, 1.0, str(LLAMA), False, group, None, False, True, True)
    layer = (a, r, w, v, va, b, 1e-5, 1.0, str(LAYER_NORM), group, True, vb, True)
    for op, args in (
        (torch.ops.tpfuse.all_reduce_add_rms_norm.default, rms),
        (torch.ops.tpfuse.all_reduce_add_layer_norm.default, layer),
    ):
        checks = torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
        found += [v == "SUCCESS" for v in checks.values()]
    return found


@pytest.mark.ranks
def test_both_ops_compile_in_one_graph_for_any_number_of_rows(pool):
    assert pool.run(compiled) == [[True] * 8] * 3


@pytest.fixture
def fake_group():
    graphs.start_fake_group(2)
    yield
    torch.distributed.destroy_process_group()


REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "rms no bias": ("partial_bias=True without bias", {"partial_bias": True}),
    "rms vector": (
        rf"bias is torch.float32 \({H},\) with partial_bias=True; expected the dtype and shape of x, torch.float32 \(4, {H}\)",
        {"bias": torch.ones(H), "partial_bias": True},
    ),
    "rms dtype": ("bias is torch.float64", {"bias": torch.ones(4, H).double(), "partial_bias": True}),
    "rms order alone": ("residual_first=True is an order of two sums; it needs partial_bias=True", {"residual_first": True}),
    "rms scaled": (
        "residual_first=True with a scale",
        {"bias": torch.ones(4, H), "partial_bias": True, "residual_first": True, "scale": 2.0},
    ),
    "rms scale tensor": (
        "residual_first=True with a scale",
        {"bias": torch.ones(4, H), "partial_bias": True, "residual_first": True, "scale": torch.tensor(2.0)},
    ),
    "rms gate of other rows": (
        r"scale_tensor is torch.float32 \(3, 1\) beside 4 rows; expected one value without dimensions, torch.float32 \(\), or "
        r"one for each row, torch.float32 \(..., 1\) with 4 values",
        {"scale": torch.ones(3, 1)},
    ),
    "rms gate of columns": (r"scale_tensor is torch.float32 \(4, 72\) beside 4 rows", {"scale": torch.ones(4, H)}),
    "rms gate dtype": (r"scale_tensor is torch.float64 \(4, 1\)", {"scale": torch.ones(4, 1).double()}),
    "rms no residual": (
        "residual_first=True with no residual",
        {"residual": None, "bias": torch.ones(4, H), "partial_bias": True, "residual_first": True},
    ),
    "rms post-norm": (
        "before the norm; got post_norm=True",
        {"bias": torch.ones(4, H), "partial_bias": True, "residual_first": True, "post_norm": True},
    ),
    "rms unrounded": (
        "a flavour that reads 'unrounded'; expected False and 'rounded'",
        {"bias": torch.ones(4, H), "partial_bias": True, "residual_first": True, "flavour": VLLM},
    ),
    "rms gradient": (
        "bias requires grad",
        {"bias": torch.ones(4, H, requires_grad=True), "partial_bias": True},
    ),
    "layer no addend": ("partial_addend=True without addend", {"partial_addend": True}),
    "layer shape": (r"addend is torch.float32 \(2, 72\)", {"addend": torch.ones(2, H), "partial_addend": True}),
    "layer bias alone": (
        "addend_bias is added to a sum over the ranks; it needs partial_addend=True",
        {"addend": torch.ones(4, H), "addend_bias": torch.ones(H)},
    ),
    "layer bias": (
        r"addend_bias is torch.float32 \(73,\); expected torch.float32 of shape \(72,\)",
        {"addend": torch.ones(4, H), "partial_addend": True, "addend_bias": torch.ones(H + 1)},
    ),
    "layer order alone": ("it needs partial_addend=True", {"addend": torch.ones(4, H), "residual_first": True}),
    "layer scaled": (
        "residual_first=True with a scale",
        {"addend": torch.ones(4, H), "partial_addend": True, "residual_first": True, "scale": 0.5},
    ),
    "layer gradient": (
        "addend_bias requires grad",
        {"addend": torch.ones(4, H), "partial_addend": True, "addend_bias": torch.ones(H, requires_grad=True)},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_named_before_anybody_communicates(name, fake_group):
    from tpfuse.ops import all_reduce_add_layer_norm, all_reduce_add_rms_norm

    message, more = REFUSED[name]
    x, w = torch.ones(4, H), torch.ones(H)
    given = {"x": x, "residual": x.clone(), "weight": w, **more}
    with pytest.raises((ValueError, RuntimeError), match=message) as caught:
        if name.startswith("rms"):
            all_reduce_add_rms_norm(**given)
        else:
            all_reduce_add_layer_norm(**given, norm_bias=w)
    assert ("all_reduce_add_rms_norm" in str(caught.value)) == name.startswith("rms")


def test_a_call_without_rows_is_checked_as_well(fake_group):
    from tpfuse.ops import all_reduce_add_layer_norm, all_reduce_add_rms_norm

    x, w, other = torch.ones(0, H), torch.ones(H), torch.ones(0, H).double()
    with pytest.raises(ValueError, match="bias is torch.float64"):
        all_reduce_add_rms_norm(x, x, w, bias=other, partial_bias=True)
    with pytest.raises(ValueError, match="addend is torch.float64"):
        all_reduce_add_layer_norm(x, x, w, w, addend=other, partial_addend=True)


def test_the_table_of_the_benchmark_has_ratios_without_copies(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    import two_sums

    us = {"one_op": 6.0, "nccl_then_op": 13.0, "nccl": 26.0, "merged": 6.0, "one_sum": 5.0, "copy": 1.0}
    line = {"norm": "rms_norm", "hidden": 4096, "rows": 1, "us": us}
    text = two_sums.table([line, {**line, "rows": 8, "us": {**us, "one_op": 24.0}}])
    assert text.splitlines()[1].split() == ["rms_norm", "4096", "1", "6.00", "13.00", "26.00", "6.00", "5.00", "1.00"]
    assert "rms_norm: one_op over nccl_then_op, without copies: 1.000, worst 2.000" in text
    assert "rms_norm: one_op over nccl, without copies: 0.500, worst 1.000" in text


def test_calls_of_older_graphs_are_what_they_were(fake_group):
    group = torch.distributed.group.WORLD.group_name
    x, w = torch.ones(4, H), torch.ones(H)
    h = torch.ops.tpfuse.all_reduce_add_rms_norm(x, x, w, x, 1e-6, 1.0, str(LLAMA), False, group)[1]
    assert torch.equal(h, torch.full((4, H), 3.0))
    schema = torch.ops.tpfuse.all_reduce_add_rms_norm.default._schema
    assert [(a.name, a.default_value) for a in schema.arguments[11:]] == [
        ("partial_bias", False),
        ("residual_first", False),
    ]
    assert [a.name for a in torch.ops.tpfuse.all_reduce_add_layer_norm.default._schema.arguments[10:]] == [
        "partial_addend",
        "addend_bias",
        "residual_first",
    ]
