"""Partial sums in fp32 beside a 16-bit residual, on a CPU: bits of the all-reduce, its cast and the model's steps; messages."""

from __future__ import annotations

from itertools import product
from typing import Any

import graphs
import pytest
import torch
from ranks import RankPool
from tpfuse.ops import GEMMA, LAYER_NORM, LLAMA, OLMO2, VLLM, invariant, settings
from tpfuse.ops.layer_norm_reference import layer_norm
from tpfuse.ops.reference import rms_norm

H = 72
NARROW = (torch.bfloat16, torch.float16)


@pytest.fixture(scope="module")
def pool():
    with RankPool(3) as pool:
        yield pool


@pytest.fixture(scope="module")
def fake_group():
    graphs.start_fake_group(2)
    yield
    torch.distributed.destroy_process_group()


def operands(rank: int, rows: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """This rank's fp32 partial sum; residual, weight and a vector that all ranks share."""
    own, same = (torch.Generator().manual_seed(s) for s in (100 * rank + 1, 7))
    x = torch.randn(*rows, H, generator=own)
    r, w, v = (torch.randn(*size, H, generator=same).to(dtype) for size in (rows, (), ()))
    return x, r, w, v


def differing(rank: int, world: int) -> list[Any]:
    """Calls whose bits are not those of the group's all-reduce, the cast and the steps of a model."""
    from tpfuse.ops import all_reduce_add_layer_norm, all_reduce_add_rms_norm

    wrong = []
    for dtype, rows in product(NARROW, ((0,), (1,), (2, 9))):
        x, r, w, v = operands(rank, rows, dtype)
        total = x.clone()
        if total.numel():
            torch.distributed.all_reduce(total)
        s = total.to(dtype)
        by = torch.tensor(0.22, dtype=dtype)
        for name, h, more in (
            ("plain", r + s, {}),
            ("bias and scale", r + (s + v) * 0.22, {"bias": v, "scale": 0.22}),
            ("scale first", r + (s * by + r), {"bias": r, "scale": by, "scale_first": True}),
        ):
            for flavour in (LLAMA, GEMMA):
                got = all_reduce_add_rms_norm(x, r, w, flavour=flavour, **more)
                if not graphs.equal(got, (rms_norm(h, w, 1e-6, flavour), h)):
                    wrong.append((name, str(dtype), rows))
        out = torch.full_like(r, float("nan")), r.clone()
        all_reduce_add_rms_norm(x, out[1], w, out=out)
        f = r.float() + s.float()
        n = rms_norm(s, w, 1e-6, OLMO2)
        for name, got, want in (
            ("out", out, (rms_norm(r + s, w, 1e-6, LLAMA), r + s)),
            (
                "unrounded",
                all_reduce_add_rms_norm(x, r, w, flavour=VLLM),
                (rms_norm(f, w, 1e-6, LLAMA, dtype), f.to(dtype)),
            ),
            ("post-norm", all_reduce_add_rms_norm(x, r, w, flavour=OLMO2, post_norm=True), (n, r + n)),
            (
                "layer norm",
                all_reduce_add_layer_norm(x, r, w, v, bias=v, addend=r),
                (layer_norm(r + ((s + v) + r), w, v, 1e-5, LAYER_NORM), r + ((s + v) + r)),
            ),
        ):
            if not graphs.equal(got, want):
                wrong.append((name, str(dtype), rows))
    return wrong


@pytest.mark.ranks
def test_the_ops_have_the_bits_of_the_all_reduce_the_cast_and_the_steps(pool):
    assert pool.run(differing) == [[]] * 3


def in_rank_order(rank: int, world: int) -> list[bool]:
    """In batch-invariant mode: the sum in rank order, rounded once, zeros positive; each row as if it were alone."""
    from tpfuse.ops import all_reduce_add_rms_norm, forget

    settings.asked["on"] = True
    try:
        found = []
        for dtype in NARROW:
            x, r, w, _ = operands(rank, (9,), dtype)
            x[:, :8] = -1e-9 * (rank == 0)  # rounds to a zero of fp16
            parts = [operands(n, (9,), dtype)[0] for n in range(world)]
            total = torch.zeros_like(x)
            for part in parts:
                total = total + part
            total[:, :8] = -1e-9
            s = invariant.sum_in_rank_order(x, torch.distributed.group.WORLD.group_name, dtype)
            want = total.to(dtype) + 0.0
            found.append(torch.equal(s, want) and torch.equal(s.signbit(), want.signbit()))
            whole = all_reduce_add_rms_norm(x, r, w)
            rows = [all_reduce_add_rms_norm(x[n : n + 1], r[n : n + 1], w) for n in range(9)]
            found.append(graphs.equal(whole, tuple(torch.cat(part) for part in zip(*rows, strict=True))))
            found.append(torch.equal(whole[1], r + want))
        return found
    finally:
        settings.asked.clear()
        forget(torch.distributed.group.WORLD)


@pytest.mark.ranks
def test_in_batch_invariant_mode_the_sum_is_taken_in_rank_order_and_rounded_once():
    with RankPool(3) as pool:
        assert pool.run(in_rank_order) == [[True] * 6] * 3


def compiled(rank: int, world: int) -> list[bool]:
    """Both ops in a compiled graph with any number of rows: the bits and strides of an eager call."""
    from tpfuse.ops import all_reduce_add_layer_norm, all_reduce_add_rms_norm

    w = torch.ones(H, dtype=torch.bfloat16)

    def model(x, residual):
        first = all_reduce_add_rms_norm(x, residual, w)
        return *first, *all_reduce_add_layer_norm(x, first[1], w, w)

    run = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    found = []
    with torch.no_grad():
        for rows in (2, 5):
            x, r, *_ = operands(rank, (rows, 3), torch.bfloat16)
            for a, c in zip(run(x, r), model(x, r), strict=True):
                found.append(torch.equal(a, c) and a.dtype == c.dtype and a.stride() == c.stride())
    group = torch.distributed.group.WORLD.group_name
    calls = (
        (torch.ops.tpfuse.all_reduce_add_rms_norm.default, (x, r, w, None, 1e-6, 1.0, str(LLAMA), False, group)),
        (
            torch.ops.tpfuse.all_reduce_add_layer_norm.default,
            (x, r, w, w, None, None, 1e-5, 1.0, str(LAYER_NORM), group),
        ),
    )
    for op, args in calls:
        checks = torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
        found += [v == "SUCCESS" for v in checks.values()]
    return found


@pytest.mark.ranks
def test_both_ops_compile_for_any_number_of_rows(pool):
    assert pool.run(compiled) == [[True] * 12] * 3


def test_what_does_not_fit_is_named(fake_group):
    from tpfuse.ops import (
        all_reduce_add_layer_norm,
        all_reduce_add_rms_norm,
        all_reduce_add_rms_norm_quant,
        reduce_rows_add_rms_norm,
    )
    from tpfuse.ops.quantizer import VLLM_TOKEN

    x, r, w, v = operands(0, (4,), torch.bfloat16)
    scale = torch.tensor(0.5)
    calls = {
        r"residual is torch.bfloat16 .*expected the dtype and shape of x, torch.float64": (
            lambda: all_reduce_add_rms_norm(x.double(), r, w)
        ),
        r"residual is torch.bfloat16 .* or bf16 or fp16 beside torch.float32": (
            lambda: all_reduce_add_rms_norm(x.half(), r, w)
        ),
        r"bias is torch.float32 \(72,\); expected torch.bfloat16": lambda: all_reduce_add_rms_norm(
            x, r, w, bias=v.float()
        ),
        r"scale_tensor is torch.float32 \(\) on cpu; expected one value without dimensions, torch.bfloat16": (
            lambda: all_reduce_add_rms_norm(x, r, w, scale=scale)
        ),
        r"partial_bias=True with x in torch.float32 and a residual in torch.bfloat16; a sum that": (
            lambda: all_reduce_add_rms_norm(x, r, w, bias=r, partial_bias=True)
        ),
        r"all_reduce_add_layer_norm: partial_addend=True with x in torch.float32": (
            lambda: all_reduce_add_layer_norm(x, r, w, v, addend=r, partial_addend=True)
        ),
        r"addend is torch.float32 \(4, 72\); expected torch.bfloat16 of shape": (
            lambda: all_reduce_add_layer_norm(x, r, w, v, addend=x)
        ),
        r"reduce_rows_add_rms_norm: residual is torch.bfloat16 .*expected the dtype of x": (
            lambda: reduce_rows_add_rms_norm(x, r[:2], w)
        ),
        r"all_reduce_add_rms_norm_quant: residual is torch.bfloat16": (
            lambda: all_reduce_add_rms_norm_quant(x, r, w, quantizer=VLLM_TOKEN)
        ),
        "normed shares memory with x": (  # of x itself only a result of the dtype of x may take the place
            lambda: all_reduce_add_rms_norm(
                x, r, w, out=(x.view(-1).view(torch.bfloat16)[: r.numel()].view(r.shape), r.clone())
            )
        ),
    }
    for message, call in calls.items():
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            call()
