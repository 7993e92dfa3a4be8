"""The way of a gathering call to its kernel on a GPU, played without one: what is launched with which arguments, and that it is
right. One process plays rank 0 of two; what rank 1 would have pushed, of its sums and of its norms, lies in the plane already.
"""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from interpreted_ranks import (
    Call,
    constants_of,
    expected_of_all,
    inputs,
    of_rank,
    patch_once,
    round_in_one_step,
    same_bits,
)
from interpreted_ranks import squares_in_kernel_order as in_kernel_order
from test_quant_kernel import answer
from torch import Tensor

pytestmark = pytest.mark.ranks


LAYER_NORM = {"layer_norm": True, "flavour": "layer_norm", "eps": 1e-5, "addend": True}


def behind_x(call: Call, mine: Any, group_name: str) -> tuple[tuple[Any, ...], Any, Any, Any]:
    """The arguments behind x up to the group, their kind, the flavour of a kernel, and the add and norm behind a library."""
    from tpfuse.ops.flavour import LLAMA
    from tpfuse.ops.kernels import add_norm
    from tpfuse.ops.layer_norm_flavour import LAYER_NORM as FLAVOUR
    from tpfuse.ops.layer_norm_operands import LayerNormOperands
    from tpfuse.ops.operands import Operands

    first = mine.residual, mine.weight
    if call.layer_norm:
        operands = *first, mine.shift, mine.bias, mine.addend, call.eps, 1.0, str(FLAVOUR), group_name
        return operands, LayerNormOperands, FLAVOUR, add_norm.add_norm_layer_norm_kernel
    return (*first, mine.bias, call.eps, 1.0, str(LLAMA), False, group_name), Operands, LLAMA, add_norm.add_norm_kernel


def play(calls: list[tuple[str, tuple[int, int], dict[str, Any]]], conn: Any) -> None:
    """For each (way, rows that the ranks keep, norm) what is wrong."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch_once(interpreter)
    round_in_one_step(interpreter)
    conn.send([_wrong(*call) for call in calls])


def _wrong(way: str, kept: tuple[int, int], norm: dict[str, Any]) -> list[str]:
    from tpfuse.ops import gather_rows, library, rows_cuda
    from tpfuse.ops.kernel import launch_plain
    from tpfuse.ops.kernels import add_norm, gathered_rows, received_rows
    from tpfuse.ops.kernels.state import STATE_WORDS
    from tpfuse.ops.kernels.variant import Variant
    from tpfuse.ops.prepare import Prepared
    from tpfuse.ops.rows_call import Rows
    from tpfuse.ops.schedule import Launch, Schedule
    from tpfuse.ops.select import Selection

    add_norm.range = lambda first, *rest: (first * 0 + n for n in range(first, *rest))  # type: ignore[attr-defined]
    rows, hidden, world = 3, 72, 2
    call = Call(rows, hidden, blocks=world, gathers=True, kept=kept, seed=rows, bias="full", **norm)
    everything = inputs(call, world)
    mine = of_rank(call, everything, 0, world)
    with in_kernel_order(call):
        wanted = expected_of_all(call, everything, 0, world, spelled_out=True)
    kernels = {
        name: getattr(module, f"{name}_layer_norm_kernel" if norm else f"{name}_kernel")
        for name, module in (("gathered_rows", gathered_rows), ("received_rows", received_rows))
    }
    launched = []

    class Interpreted:
        """A kernel that is launched in the interpreter, on the CPU."""

        ready = True

        def __init__(self, function: Any, constexprs: tuple[Any, ...]) -> None:
            self.function, self.constexprs = function, constexprs

        def __call__(self, programs: int, stream: int, *args: Any) -> None:
            launched.append(self.function.__name__)
            launch_plain(self.function, min(programs, 2), args, self.constexprs)

    c = constants_of(call, mine)
    words = hidden * 2 // 4
    plane, record = torch.zeros(2, 4 * rows * words, dtype=torch.int32), torch.zeros(4, dtype=torch.int32)
    peers = torch.tensor([plane.data_ptr(), torch.zeros_like(plane).data_ptr(), record.data_ptr()])
    sums, norms = (t.contiguous().view(torch.int32).view(-1, words) for t in (everything.xs[1], wanted[0]))
    for phase, part in ((0, slice(0, 2)), (1, slice(2, rows))):  # a launch each, in the two phases in turn
        count = part.stop - part.start
        scatter, gather = plane[phase, : 4 * count * words].view(2, count, 2, words)
        scatter[:, 1] = torch.where(sums[:rows][part] == 0, 0x8000, sums[:rows][part])
        if way == "kernel":
            gather[:, 1] = torch.where(norms[rows:][part] == 0, -1, norms[rows:][part])
    keep = torch.zeros_like(plane)  # rank 1's plane
    peers[1] = keep.data_ptr()
    p = SimpleNamespace(
        seen=[0], streams=SimpleNamespace(last=0), peers=peers, state=torch.zeros(STATE_WORDS, dtype=torch.int32),
        rank=0, phase_bytes=plane.numel() * 2,
    )  # fmt: skip

    def launches(function: Any, gathers: bool) -> Schedule:
        kernel = Interpreted(function, (c, Variant(world, 128, 1, 1, ptx=False, blocks=2, gathers=gathers)))
        return Schedule(Selection("", 2), (Launch(kernel, 2, 0, 2), Launch(kernel, 1, 2, 1)))  # type: ignore[arg-type]

    def schedule_of(*_: Any) -> Schedule:
        return launches(kernels["gathered_rows"], True) if way == "kernel" else Schedule(Selection("library", rows), ())

    fake = SimpleNamespace(current_device=lambda: None, current_stream_handle=lambda index: 0)
    gather_rows.compat = rows_cuda.compat = library.compat = fake  # type: ignore[assignment]
    settings = SimpleNamespace(batch_invariant=False)
    path = SimpleNamespace(plane=None if way == "library" else p, settings=settings)
    after_x, kind, flavour, behind_a_library = behind_x(call, mine, "0")
    prepared = Prepared(path, flavour, c, None, call.dtype, call.dtype, 10**12)  # type: ignore[arg-type]
    asked = Rows(everything.xs[0], after_x, world, "reduce_scatter", 0, (kept[0], hidden), "op", kind)
    given = kind(asked.like(kept[0]), *after_x)._replace(flavour=flavour)
    gather_rows._asked = lambda *_: asked  # type: ignore[assignment]
    gather_rows.prepared_of = lambda *_: (prepared, given)  # type: ignore[assignment]
    gather_rows.gather_schedule = SimpleNamespace(of_prepared=schedule_of)  # type: ignore[assignment]
    gather_rows.rows_schedule = SimpleNamespace(of_prepared=lambda *_: launches(kernels["received_rows"], False))  # type: ignore[assignment]
    total = (everything.xs[0].float() + everything.xs[1].float()).to(call.dtype) + 0.0
    Rows.summed = lambda self, block, kept, invariant: total[:kept].clone()  # type: ignore[method-assign]
    library._kernel = lambda c: Interpreted(  # type: ignore[assignment]
        behind_a_library, (c, Variant(world=1, lanes=128, steps=c.groups, split=1, ptx=False))
    )
    gather_rows._gathered = lambda asked, own, block: torch.cat([own, wanted[0][rows:]])  # type: ignore[assignment]
    got = gather_rows._cuda(asked.x, *after_x, "")
    wrong = [n for n, g, w in zip(("normed", "residual"), got, wanted, strict=True) if not same_bits(g, w)]
    if way == "library":
        wanted_launches = [behind_a_library.__name__] * bool(kept[0])
        return wrong + ([] if launched == wanted_launches else [f"launched {launched}"])
    pushed = keep[:, :].count_nonzero() // words  # of each launch row: a sum for rank 1's block, and a norm
    wrong += [] if pushed == (2 if way == "kernel" else 1) * rows else [f"pushed {pushed} rows"]
    wrong += ["words left in the plane"] if bool(plane.any()) else []
    name = kernels["gathered_rows" if way == "kernel" else "received_rows"].__name__
    return wrong + ([] if launched == [name] * 2 else [f"launched {launched}"])


def test_each_way_of_a_call_gives_the_reference_and_launches_what_it_should() -> None:
    calls = [(way, kept, {}) for way in ("kernel", "scatter", "library") for kept in ((3, 3), (1, 2), (0, 3))]
    calls += [(way, (1, 2), LAYER_NORM) for way in ("kernel", "scatter", "library")]
    found = answer(play, calls)
    assert found == [[]] * len(calls), [(call, wrong) for call, wrong in zip(calls, found, strict=True) if wrong]


def play_blocks(calls: list[tuple[str, tuple[int, ...], dict[str, Any]]], conn: Any) -> None:
    """As :func:`play`, rank 2 of four: place 0 of the second of two blocks."""
    os.environ["TRITON_INTERPRET"] = "1"
    from triton.runtime import interpreter

    patch_once(interpreter)
    round_in_one_step(interpreter)
    conn.send([_wrong_blocks(*call) for call in calls])


def _wrong_blocks(way: str, kept: tuple[int, ...], norm: dict[str, Any]) -> list[str]:
    from tpfuse.ops import gather_blocks, library, rows_cuda
    from tpfuse.ops.kernel import launch_plain
    from tpfuse.ops.kernels import add_norm, gathered_blocks
    from tpfuse.ops.kernels.state import STATE_WORDS
    from tpfuse.ops.kernels.variant import Variant
    from tpfuse.ops.prepare import Prepared
    from tpfuse.ops.rows_call import Rows
    from tpfuse.ops.schedule import Launch, Schedule
    from tpfuse.ops.select import Selection

    add_norm.range = lambda first, *rest: (first * 0 + n for n in range(first, *rest))  # type: ignore[attr-defined]
    rows, hidden, world, rank = 3, 72, 4, 2
    call = Call(rows, hidden, blocks=2, gathers=True, kept=kept, seed=rows, **norm)
    everything = inputs(call, world)
    mine = of_rank(call, everything, rank, world)
    with in_kernel_order(call):
        wanted = expected_of_all(call, everything, rank, world, spelled_out=True)
    function = getattr(gathered_blocks, "gathered_blocks_layer_norm_kernel" if norm else "gathered_blocks_kernel")
    launched = []

    class Interpreted:
        ready = True

        def __init__(self, function: Any, constexprs: tuple[Any, ...]) -> None:
            self.function, self.constexprs = function, constexprs

        def __call__(self, programs: int, stream: int, *args: Any) -> None:
            launched.append(self.function.__name__)
            launch_plain(self.function, min(programs, 2), args, self.constexprs)

    c = constants_of(call, mine)
    words = hidden * 2 // 4
    planes, record = [torch.zeros(2, 4 * rows * words, dtype=torch.int32) for _ in range(world)], torch.zeros(4)
    peers = torch.tensor([p.data_ptr() for p in planes] + [record.data_ptr()])
    sums = torch.zeros(rows, hidden, dtype=call.dtype)  # of rank 3, zeros behind the rows that there are
    sums[: kept[3]] = mine.xs[3]
    sums, norms = (t.contiguous().view(torch.int32).view(-1, words) for t in (sums, wanted[0]))
    for phase, part in ((0, slice(0, 2)), (1, slice(2, rows))):  # a launch each, in the two phases in turn
        count = part.stop - part.start
        scatter, gather = planes[rank][phase, : 4 * count * words].view(2, count, 2, words)
        scatter[:, 1] = torch.where(sums[part] == 0, 0x8000, sums[part])
        gather[:, 0] = torch.where(norms[:rows][part] == 0, -1, norms[:rows][part])
    p = SimpleNamespace(
        seen=[0], streams=SimpleNamespace(last=0), peers=peers, state=torch.zeros(STATE_WORDS, dtype=torch.int32),
        rank=rank, phase_bytes=planes[0].numel() * 2,
    )  # fmt: skip

    def schedule_of(*_: Any) -> Schedule:
        variant = Variant(world, 128, 1, 1, ptx=False, blocks=2, gathers=True)
        kernel = Interpreted(function, (c, variant))
        return Schedule(Selection("gathered_blocks", 2), (Launch(kernel, 2, 0, 2), Launch(kernel, 1, 2, 1)))  # type: ignore[arg-type]

    fake = SimpleNamespace(current_device=lambda: None, current_stream_handle=lambda index: 0)
    gather_blocks.compat = rows_cuda.compat = library.compat = fake  # type: ignore[assignment]
    path = SimpleNamespace(plane=p if way == "kernel" else None, settings=SimpleNamespace(batch_invariant=False))
    after_x, kind, flavour, behind_a_library = behind_x(call, mine, "0")
    prepared = Prepared(path, flavour, c, None, call.dtype, call.dtype, 10**12)  # type: ignore[arg-type]
    asked = Rows(mine.xs[rank], after_x, 2, "all_reduce", 1, (kept[rank], hidden), "op", kind)
    given = kind(asked.x, *after_x)._replace(flavour=flavour)
    gather_blocks._asked = lambda *_: (asked, "block", "across", rows)  # type: ignore[assignment]
    gather_blocks.prepared_of = lambda *_: (prepared, given)  # type: ignore[assignment]
    gather_blocks.of_prepared = schedule_of  # type: ignore[assignment]
    total = (mine.xs[2].float() + mine.xs[3].float()).to(call.dtype) + 0.0
    library.all_reduce = lambda x, group: total.clone()  # type: ignore[assignment]
    library._kernel = lambda c: Interpreted(  # type: ignore[assignment]
        behind_a_library, (c, Variant(world=1, lanes=128, steps=c.groups, split=1, ptx=False))
    )
    filled = torch.zeros(rows, hidden, dtype=call.dtype)
    gather_blocks.gathered = (
        lambda own, *_: torch.cat(  # type: ignore[assignment]
            [wanted[0][:rows], torch.cat([own, filled[len(own) :]])]
        )
    )
    gather_blocks.paths.may_be_asked = lambda *_: way == "block"  # type: ignore[assignment]

    def of_the_block(*args: Any) -> tuple[Tensor, Tensor]:
        launched.append(args[-1])
        return wanted[0][rows : rows + kept[rank]], wanted[1]

    gather_blocks.run = of_the_block if kind is gather_blocks.Operands else None  # type: ignore[assignment]
    gather_blocks.layer_norm_cuda = SimpleNamespace(run=None if gather_blocks.run else of_the_block)  # type: ignore[assignment]
    got = gather_blocks._cuda(asked.x, *after_x, "block", "across", rows)
    wrong = [n for n, g, w in zip(("normed", "residual"), got, wanted, strict=True) if not same_bits(g, w)]
    if way == "library":  # inside of CUDA-graph capture, say
        wanted_launches = [behind_a_library.__name__] * bool(kept[rank])
        return wrong + ([] if launched == wanted_launches else [f"launched {launched}"])
    if way == "block":
        return wrong + ([] if launched == ["block"] else [f"launched {launched}"])
    # To the other rank of the block a part of each row; to both of the other block the norms of rows 0 and 2, which place 0 owns.
    pushed = [int(plane.count_nonzero()) // words for plane in planes]
    # The second launch has row 2 alone, which is its row 0.
    wrong += [] if pushed == [2, 2, 0, rows] else [f"pushed {pushed}"]
    return wrong + ([] if launched == [function.__name__] * 2 else [f"launched {launched}"])


def test_each_way_of_a_call_of_replicas_gives_the_reference_and_launches_what_it_should() -> None:
    calls = [
        (way, kept, norm)
        for norm, choices in (
            ({}, ((3, 3, 3, 3), (1, 1, 2, 2), (3, 3, 0, 0))),
            (LAYER_NORM, ((1, 1, 2, 2), (3, 3, 0, 0))),
        )
        for way in ("kernel", "block", "library")
        for kept in choices
    ]
    found = answer(play_blocks, calls)
    assert found == [[]] * len(calls), [(call, wrong) for call, wrong in zip(calls, found, strict=True) if wrong]
