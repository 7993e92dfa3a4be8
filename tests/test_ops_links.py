"""Links between GPUs: the floor's arithmetic, and the measuring kernels interpreted and compiled ahead of time."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from interpreted_links import ROUNDS, bulk_push, measure, play
from tpfuse.ops.select import TABLE, Entry

from tpfuse.measure import links
from tpfuse.measure.links import Links, beside_floor, crossing, describe, floor, kind_of
from tpfuse.measure.tables import Result

# 400 GB/s each way, L = 1.25 us, t0 = 1 us.
NVLINK = Links(4, "GPU", "sm_90", False, 1.0, 1.25, (1.2, 1.25, 1.3), 400e3, 300e3)


def test_the_floors_are_those_of_the_model() -> None:
    size = 400_000  # 1 us over the link
    assert floor(NVLINK, "one_shot", 4, size) == pytest.approx(1 + 1.25 + 3)
    assert floor(NVLINK, "two_shot", 4, size) == pytest.approx(1 + 2.5 + 1.5)
    assert floor(NVLINK, "one_shot", 2, size) == pytest.approx(1 + 1.25 + 1)
    assert floor(NVLINK, "two_shot", 2, size) == pytest.approx(1 + 2.5 + 1)
    assert floor(replace(NVLINK, copied=800e3), "one_shot", 4, size) == pytest.approx(1 + 1.25 + 1.5)


@pytest.mark.parametrize("world", range(3, 9))
def test_the_floors_cross_where_crossing_says(world: int) -> None:
    at = crossing(NVLINK, world)
    assert floor(NVLINK, "one_shot", world, round(at)) == pytest.approx(floor(NVLINK, "two_shot", world, round(at)))
    assert floor(NVLINK, "one_shot", world, round(at / 2)) < floor(NVLINK, "two_shot", world, round(at / 2))
    assert floor(NVLINK, "one_shot", world, round(at * 2)) > floor(NVLINK, "two_shot", world, round(at * 2))


def test_two_ranks_never_gain_from_two_shot() -> None:
    assert crossing(NVLINK, 2) == float("inf")
    assert floor(NVLINK, "one_shot", 2, 1 << 30) < floor(NVLINK, "two_shot", 2, 1 << 30)


def test_wrong_arguments_say_what_is_known() -> None:
    with pytest.raises(ValueError, match="known are one_shot and two_shot"):
        floor(NVLINK, "library", 4, 1)
    with pytest.raises(ValueError, match="at least 2 ranks"):
        floor(NVLINK, "one_shot", 1, 1)


def test_each_contender_has_the_floor_of_its_algorithm() -> None:
    table = (Entry("sm_90", 4, 16384, 65536, 1 << 20, "here"), *TABLE)
    chosen = [kind_of("tpfuse", NVLINK, 4096, rows, table) for rows in (1, 2, 3, 8, 9)]
    assert chosen == ["one_shot", "one_shot", "two_shot", "two_shot", "library"]
    assert kind_of("two-shot", NVLINK, 4096, 1, table) == "two_shot"
    assert kind_of("nccl", NVLINK, 4096, 1, table) == "library"
    assert kind_of("floor", NVLINK, 4096, 1, table) is None
    assert kind_of("flashinfer", NVLINK, 4096, 1, table) is None


def test_the_table_has_measured_over_floor_for_ranks_with_a_gpu_each() -> None:
    result = Result("one-shot", 4, 8, 4096, 5.0, 4.9, 5.1, 0.0, True)
    least = floor(NVLINK, "one_shot", 4, 8 * 4096 * 2)
    last = beside_floor([result, replace(result, contender="flashinfer")], [NVLINK]).splitlines()[-1]
    assert last.split() == ["4", "4096", "8", "one-shot", "one_shot", "5.00", f"{least:.2f}", f"{5.0 / least:.2f}"]
    assert "share a GPU" in beside_floor([result], [replace(NVLINK, shared=True)])
    assert "share a GPU" in beside_floor([replace(result, world=2)], [NVLINK])
    assert "L 1.25 us" in describe(NVLINK) and "pushed 400 GB/s" in describe(NVLINK)
    assert "not links" in describe(replace(NVLINK, shared=True))


def test_what_arrived_is_told_from_what_did_not() -> None:
    size, world = 4 * 8192, 3
    region = links.pattern(1, size, torch.device("cpu"))
    for rank in (0, 2):
        assert links.arrived(region, 1, rank, world)
    # The chunks of sender 1 go to rank 2, 0, 2, 0.
    region.view(4, -1)[3, 77] += 1
    assert links.arrived(region, 1, 2, world)
    assert not links.arrived(region, 1, 0, world)
    assert not links.arrived(links.pattern(0, size, torch.device("cpu")), 1, 2, world)


# -- interpreted ----------------------------------------------------------------------------------------------------


@pytest.mark.ranks
def test_two_ranks_play_every_round() -> None:
    answers = play((0, 1), 10**12)
    for answer in answers:
        assert not isinstance(answer, str), answer
        record, slots = answer
        assert record == [0, 0, 0, 0]
        assert slots == [[i + 1] * 4 for i in range(ROUNDS)]


@pytest.mark.ranks
@pytest.mark.parametrize("rank", (0, 1))
def test_a_rank_without_a_partner_gives_up_once_and_ends(rank: int) -> None:
    (answer,) = play((rank,), 50_000)  # the portable poll counts a microsecond a poll
    assert not isinstance(answer, str), answer
    record, slots = answer
    assert record == [1, 0, 0, 0]
    assert slots == [[0] * 4] * ROUNDS


@pytest.mark.ranks
def test_a_bulk_push_puts_every_chunk_into_its_place_and_nothing_elsewhere() -> None:
    answer = bulk_push()
    assert not isinstance(answer, str), answer
    arrived, untouched, words, pushed = answer
    assert arrived == [True] * 6
    assert untouched
    assert words == pushed  # no word of a pattern is zero here


@pytest.mark.ranks
def test_every_rank_learns_the_same_constants() -> None:
    answers = measure(3)
    assert all(isinstance(a, Links) for a in answers), answers
    first = answers[0]
    assert answers == [first] * 3
    assert (first.world, first.device, first.architecture, first.shared) == (3, "GPU", "sm_90", False)
    assert len(first.latencies) == 2 and min(first.latencies) > 0
    assert first.pushed > 0 and first.copied > 0 and first.empty == 1.0


@pytest.mark.ranks
def test_bytes_that_arrive_elsewhere_are_an_error_that_names_the_sender() -> None:
    for answer in measure(2, spoiled=True):
        assert "bytes did not arrive; by rank, the senders they are missing from: [[1], [0]]" in answer


# -- ahead of time --------------------------------------------------------------------------------------------------


def _compile(function: Any, kinds: tuple[str, ...], constexprs: dict[str, Any], num_warps: int) -> str:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = function.arg_names
    signature = dict(zip(names, (*kinds, *("constexpr",) * len(constexprs)), strict=True))
    attributes = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds) if kind.startswith("*")}
    source = ASTSource(function, signature, constexprs, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    assert compiled.asm["cubin"]
    return compiled.asm["ptx"]


def test_the_kernels_compile_for_sm_90_with_accesses_of_16_bytes() -> None:
    from tpfuse.measure.link_kernels import bulk_push_kernel, empty_kernel, ping_pong_kernel

    ptx = _compile(ping_pong_kernel, ("*i64", "*i32", "i32", "i32", "i32", "i64"), {"PTX": True}, 1)
    loads = len(re.findall(r"ld\.relaxed\.sys\.global\.v4\.u32", ptx))
    polls = loads // 2  # each loads its slot once before its loop and again inside
    assert loads in (2, 4)  # LLVM makes one loop for each of the two roles
    # Beside each poll two pushes and the election of the one that records a failure.
    assert len(re.findall(r"st\.relaxed\.sys\.global\.v4\.u32", ptx)) == 2 * polls
    assert ptx.count("atom.relaxed.sys.global.cas") == polls
    ptx = _compile(bulk_push_kernel, ("*i32", "*i64", "i32", "i32", "i64"), {"W": 4, "PTX": True}, 4)
    assert len(re.findall(r"st\.relaxed\.sys\.global\.v4\.u32", ptx)) == 4
    assert len(re.findall(r"ld\.global\.v4\.u32", ptx)) == 4
    assert _compile(empty_kernel, ("*i32",), {}, 4)
