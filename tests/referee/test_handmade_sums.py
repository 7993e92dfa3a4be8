"""Sums over ranks without a reduction: the report names them, a warning too where there is nothing else, and nothing is changed.

Written anew: an all-gather and a sum adds in one order on all ranks, and an all-to-all and a sum is the first half of an
all-reduce in two steps, as libraries write them that compress what is sent.
"""

from __future__ import annotations

import warnings

import graphs
import pytest
import torch
import torch.distributed as dist
from graphs import ALL, fused_copy, trace, world
from torch import Tensor
from torch.nn import functional as F

import tpfuse
from tpfuse import unfused

H, RANKS = 8, 2
FUNCTIONAL = torch.ops._c10d_functional


@pytest.fixture(autouse=True, scope="module")
def group():
    graphs.start_fake_group(RANKS)
    yield
    dist.destroy_process_group()


def gather(x: Tensor) -> Tensor:
    return FUNCTIONAL.wait_tensor(FUNCTIONAL.all_gather_into_tensor(x, RANKS, world()))


def exchange(x: Tensor) -> Tensor:
    return FUNCTIONAL.wait_tensor(FUNCTIONAL.all_to_all_single(x, [2, 2], [2, 2], world()))


def norm(h: Tensor) -> Tensor:
    return F.rms_norm(h, (H,), eps=1e-5)


def listed(x: Tensor) -> list[Tensor]:
    pieces = [torch.empty_like(x) for _ in range(RANKS)]
    dist.all_gather(pieces, x)
    return pieces


PARTS = slice(None, 4), slice(4, None)
BY_HAND = {
    "view": lambda x: gather(x).view(RANKS, *x.shape).sum(0),
    "chunks": lambda x: torch.stack(gather(x).chunk(RANKS)).sum(0),
    "in fp32": lambda x: gather(x).view(RANKS, *x.shape).float().sum(0).to(x.dtype),
    "mean": lambda x: gather(x).view(RANKS, *x.shape).mean(0),
    "added": lambda x: torch.add(*gather(x).chunk(RANKS)),
    "slices": lambda x: torch.add(*(came[part] for came, part in zip([gather(x)] * 2, PARTS, strict=True))),
    "by index": lambda x: torch.add(*gather(x).view(RANKS, *x.shape).unbind()),
    "ranks behind the rows": lambda x: gather(x).view(RANKS, *x.shape).permute(1, 0, 2).contiguous().sum(1),
    "side by side": lambda x: torch.cat(gather(x).chunk(RANKS), 1).view(-1, RANKS, H).sum(1),
    "ranks in the middle": lambda x: torch.stack(gather(x).chunk(RANKS), 1).sum(1),
}


@pytest.mark.parametrize("by_hand", BY_HAND.values(), ids=BY_HAND)
def test_an_all_reduce_by_hand_is_named_with_what_to_write(by_hand):
    _, report = fused_copy(trace(lambda x, r: norm(r + by_hand(x)), [torch.randn(4, H), torch.randn(4, H)]), ALL)
    (note,) = report.notes
    assert report.sites == [] and note.startswith("made by hand: ")
    assert "from ranks [0, 1]" in note and "all_reduce(x) in its place" in note


def test_an_exchange_and_a_sum_are_a_reduce_scatter():
    _, report = fused_copy(
        trace(lambda x: norm(gather(exchange(x).view(RANKS, 2, H).sum(0))), [torch.randn(4, H)]), ALL
    )
    (note,) = report.notes
    assert "all_to_all_single" in note and "reduce_scatter_tensor(own_rows, x) in its place" in note


def test_what_is_sent_in_fp8_with_its_scales_is_named_too():
    """As ColossalAI's ``all_reduce_fp8`` (``colossalai/quantization/fp8.py``) does: scales travel beside the bytes."""

    def model(x: Tensor) -> Tensor:
        blocks = x.view(RANKS, 2 * H)
        scale = blocks.abs().amax(-1, keepdim=True) / 448
        sent = FUNCTIONAL.all_to_all_single(
            (blocks / scale).to(torch.float8_e4m3fn).view(torch.uint8), [1, 1], [1, 1], world()
        )
        scales = FUNCTIONAL.wait_tensor(FUNCTIONAL.all_to_all_single(scale, [1, 1], [1, 1], world()))
        came = FUNCTIONAL.wait_tensor(sent).view(torch.float8_e4m3fn).float()
        return norm(gather((came * scales).sum(0).view(2, H)))

    (note, *_) = fused_copy(trace(model, [torch.randn(4, H)]), ALL)[1].notes
    assert "all_to_all_single" in note and "reduce_scatter_tensor" in note


def test_the_layers_of_a_model_share_a_note():
    def model(x: Tensor, r: Tensor) -> Tensor:
        for _ in range(3):
            r = norm(r + gather(x).view(RANKS, 4, H).sum(0))
        return r

    (note,) = fused_copy(trace(model, [torch.randn(4, H), torch.randn(4, H)]), ALL)[1].notes
    assert ", 3 times. " in note


def test_a_number_of_rows_known_at_run_time_hides_no_sum():
    """Where the ranks' parts begin is then computed."""
    torch._dynamo.reset()
    tpfuse.clear_reports()
    model = torch.compile(
        lambda x: norm(torch.add(*listed(x))), backend="tpfuse", options={"tpfuse.inner": "aot_eager"}, dynamic=True
    )
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", tpfuse.FusionWarning)
        model(torch.randn(4, H))
    assert [note.partition(":")[0] for r in tpfuse.reports() for note in r.notes] == ["made by hand"]


OTHERWISE = {
    "rows are gathered and pooled": lambda x: gather(x).mean(0),
    "columns are gathered": lambda x: torch.cat(gather(x).chunk(RANKS), -1).view(4, RANKS, H).sum(-1),
    "a weighted sum of experts": lambda x: (exchange(x).view(2, 2, H) * x.view(2, 2, H)).sum(0),
    "two gathers are added": lambda x: gather(x) + gather(x * 2),
    "tokens of experts are exchanged, picked and added": lambda x: (
        exchange(x)[torch.tensor([0, 1, 2, 3])].view(2, 2, H).sum(1)
    ),
    "the experts of a token are added": lambda x: exchange(x).view(2, 2, H).sum(1),
    "counts are added": lambda x: gather(x.long()).view(RANKS, 4, H).sum(0),
    "scalars are added": lambda x: gather(x.sum().view(1)).mean(0),
    "neighbors among the rows are pooled": lambda x: gather(x).view(4, RANKS, H).mean(1),
    "a sequence is pooled": lambda x: gather(x.view(2, RANKS, H)).mean(1),
    "halves of the columns are added": lambda x: torch.add(*gather(x).chunk(RANKS, -1)),
    "every other row is added": lambda x: gather(x)[0::2] + gather(x)[1::2],
    "rows of one rank are added": lambda x: torch.add(*gather(x)[:4].chunk(2)),
    "the experts of a token stand first": lambda x: exchange(x).view(2, RANKS, H).transpose(0, 1).contiguous().sum(0),
    "ranks send different numbers of rows": lambda x: (
        FUNCTIONAL.wait_tensor(FUNCTIONAL.all_to_all_single(x, [1, 3], [2, 2], world())).view(RANKS, 2, H).sum(0)
    ),
    "the gathered rows are doubled": lambda x: gather(x) + gather(x),
}


@pytest.mark.parametrize("program", OTHERWISE.values(), ids=OTHERWISE)
def test_what_is_no_sum_over_ranks_is_not_named(program):
    assert fused_copy(trace(program, [torch.randn(4, H)]), ALL)[1].notes == []


def test_a_compile_warns_where_there_is_no_reduction():
    torch._dynamo.reset()
    tpfuse.clear_reports()
    unfused.forget()
    x, r = torch.randn(4, H), torch.randn(4, H)

    def model(x: Tensor, r: Tensor) -> Tensor:
        return norm(r + torch.stack(listed(x)).sum(0))

    with warnings.catch_warnings(record=True) as caught, torch.no_grad():
        warnings.simplefilter("always")
        torch.compile(model, backend="tpfuse", options={"tpfuse.inner": "aot_eager"})(x, r)
    (text,) = [str(w.message) for w in caught if issubclass(w.category, tpfuse.FusionWarning)]
    assert (
        "has no reduction but one made by hand" in text
        and "test_handmade_sums.py:" in text
        and "torch.distributed.all_reduce(x)" in text
    )
