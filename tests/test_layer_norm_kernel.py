"""LayerNorm in the kernels, interpreted: bit for bit the arithmetic that docs/op.md promises, on rows with a large mean too."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
from interpreted_ranks import (
    Call,
    constants_of,
    expected,
    inputs,
    run,
    squares_in_kernel_order,
    take_short_cuts,
    ulps_apart,
)
from test_quant_kernel import answer
from tpfuse.ops.layer_norm_flavour import LAYER_NORM
from tpfuse.ops.layer_norm_reference import layer_norm

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def layer(rows: int, hidden: int, **more: Any) -> Call:
    return Call(rows, hidden, **{"layer_norm": True, "flavour": "layer_norm", "eps": 1e-5, **more})


CALLS = [
    layer(3, 72, seed=1),
    layer(2, 72, dtype=FP32, flavour="cohere", seed=2),
    layer(2, 72, dtype=FP16, flavour="nemotron", seed=3),
    layer(2, 72, flavour="olmo", seed=4),
    layer(1, 1032, mean=20.0, seed=5),
    layer(1, 520, dtype=FP32, mean=1000.0, seed=6),
    layer(1, 72, weight_dtype=FP32, seed=7),
    layer(2, 72, bias="row", scale=0.22, residual=False, seed=8),
    layer(2, 72, bias="row", addend=True, seed=13),
    layer(2, 72, bias="full", special="zeros", seed=9),
    layer(2, 72, special="nonfinite", seed=10),
    layer(0, 72, seed=11),
    Call(2, 72, seed=12),  # an RMSNorm on the same plane
]


@pytest.mark.ranks
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("algorithm", ["one_shot", "two_shot"])
def test_it_has_the_bits_of_its_arithmetic(algorithm: str, world: int) -> None:
    outcomes = run(world, [replace(call, algorithm=algorithm) for call in CALLS], delay=0.01)
    for outcome in outcomes:
        assert not outcome.error, outcome.error
        assert outcome.mistakes == []
        assert outcome.leftover == 0
    assert all(o.digests == outcomes[0].digests for o in outcomes)


@pytest.mark.ranks
@pytest.mark.parametrize("algorithm", ["one_shot", pytest.param("two_shot", marks=pytest.mark.slow)])
def test_programs_that_share_a_row_agree_on_mean_and_variance(algorithm: str) -> None:
    calls = [
        layer(1, 1032, algorithm=algorithm, steps=1, programs=2, mean=mean, seed=seed)
        for seed, mean in enumerate((0.0, 50.0))
    ]
    calls.append(layer(1, 520, algorithm=algorithm, dtype=FP32, steps=1, programs=2, mean=1000.0, seed=5))
    calls.insert(1, Call(1, 1032, algorithm=algorithm, steps=1, programs=2, seed=7))  # an RMSNorm in between
    split = run(2, calls, split=True)
    for outcome in split:
        assert not outcome.error, outcome.error
        assert outcome.mistakes == []
        assert outcome.leftover == 0
    assert len({tuple(o.row_digests[n][0] for n in range(len(calls))) for o in split}) == 1


def work(calls: list[Call], send: Any) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    from tpfuse.ops.kernel import launch_plain
    from tpfuse.ops.kernels import add_norm
    from tpfuse.ops.kernels.variant import GROUP_LANES, Variant, torch_dtype
    from triton.runtime import interpreter

    take_short_cuts(interpreter)
    # The interpreter's rows are Python's numbers; the compiler's are values of the language.
    add_norm.range = lambda first, *rest: (first * 0 + n for n in range(first, *rest))  # type: ignore[attr-defined]
    found = []
    for call in calls:
        given = inputs(call, 2)
        c = constants_of(call, given)
        reduced = (given.xs[0].float() + given.xs[1].float()).to(call.dtype) + 0.0
        # Poisoned, so that an element that nobody stores shows.
        outputs = [
            torch.full(reduced.shape, float("nan"), dtype=torch_dtype(d)) for d in (c.out_dtype, c.residual_dtype)
        ]
        operands = [reduced if t is None else t for t in (given.residual, given.weight, given.bias)]
        variant = Variant(world=1, lanes=GROUP_LANES, steps=c.groups, split=1, ptx=False)
        behind = [reduced if t is None else t for t in (given.shift, given.addend)]
        arguments = (reduced, *operands, *outputs, *behind, call.rows, call.eps, call.scale)
        launch_plain(add_norm.add_norm_layer_norm_kernel, 2, arguments, (c, variant))
        with squares_in_kernel_order(call):
            want = expected(call, given, spelled_out=True)
        found.append([ulps_apart(a, b) for a, b in zip(outputs, want, strict=True)])
    send.send(found)


@pytest.mark.ranks
def test_behind_the_library_all_reduce_it_has_the_same_bits() -> None:
    calls = [
        layer(3, hidden, dtype=dtype, flavour=flavour, mean=mean, seed=hidden)
        for hidden, dtype, mean in ((72, BF16, 8.0), (2056, BF16, 0.0), (72, FP16, 0.0), (520, FP32, 300.0))
        for flavour in ("layer_norm", "cohere", "nemotron", "olmo")
    ]
    calls.append(layer(1, 2056, bias="row", addend=True, seed=3))  # several steps: loaded behind the poll
    assert answer(work, calls) == [[0, 0]] * len(calls)


@pytest.mark.parametrize("mean", [0.0, 30.0, 1000.0])
@pytest.mark.parametrize("hidden", [768, 2880, 4096, 8192])
def test_the_arithmetic_of_the_kernels_is_no_less_accurate_than_torchs(hidden: int, mean: float) -> None:
    """Against fp64, in fp32, where no rounding of the results hides the error of mean and variance."""
    call = layer(64, hidden, dtype=FP32)
    generator = torch.Generator().manual_seed(hidden)
    h = torch.randn(call.rows, hidden, generator=generator) + mean
    exact = torch.nn.functional.layer_norm(h.double(), (hidden,), eps=call.eps)
    plain = replace(LAYER_NORM, gain="none", shift="none")
    torchs = layer_norm(h, None, None, call.eps, plain)
    with squares_in_kernel_order(call):
        ours = layer_norm(h, None, None, call.eps, replace(plain, moments="squares"))
    error, theirs = ((t.double() - exact).square().mean().sqrt().item() for t in (ours, torchs))
    assert error <= max(theirs, 2**-24), (error, theirs)  # half a unit in the last place of 1
