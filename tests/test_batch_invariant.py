"""Batch-invariant mode: the kernels for every size, rank-order sums where there are none, a refusal where neither is possible."""

from __future__ import annotations

import hashlib
import os
from typing import Any

import pytest
import torch
from ranks import run_ranks
from tpfuse.ops import all_reduce_add_rms_norm, invariant, paths, select, settings, vote
from tpfuse.ops.flavour import ALL_IN_INPUT_DTYPE, GEMMA, LLAMA
from tpfuse.ops.select import MIB, TABLE, entry, phase_bytes, two_shot_rows

from tpfuse.options import OptionError, parse

WORLD = 3


@pytest.fixture(autouse=True)
def _fresh_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "asked", {})
    monkeypatch.setattr(invariant, "_used", {})
    monkeypatch.delenv(settings.BATCH_INVARIANT, raising=False)


def _order_sensitive(rank: int, rows: int, hidden: int, dtype: torch.dtype) -> torch.Tensor:
    """2**24, 1 and -2**24 over the ranks, in an order that each element has of its own."""
    orders = torch.rand(rows, hidden, WORLD, generator=torch.Generator().manual_seed(7)).argsort(-1)
    return torch.tensor([2.0**24, 1.0, -(2.0**24)])[orders[..., rank]].to(dtype)


def _rows_that_differ(rank: int, world_size: int) -> list[str]:
    """Rows whose bits among others are not those that they have alone, named."""
    torch.set_num_threads(2)
    found = []
    for dtype, flavour, hidden in (
        (torch.float32, LLAMA, 72),
        (torch.bfloat16, ALL_IN_INPUT_DTYPE, 64),
        (torch.bfloat16, GEMMA, 1000),
        (torch.float64, LLAMA, 10),
    ):
        pool = 300 if dtype == torch.float32 else 100
        g = torch.Generator().manual_seed(1)
        x = _order_sensitive(rank, pool, hidden, dtype)
        residual, bias = (torch.randn(pool, hidden, generator=g).to(dtype) for _ in range(2))
        weight = torch.randn(hidden, generator=g).to(dtype)

        def call(start: int, rows: int, given: tuple[Any, ...] = (x, residual, weight, bias, flavour)) -> list[str]:
            x, residual, weight, bias, flavour = given
            part = slice(start, start + rows)
            outs = all_reduce_add_rms_norm(x[part], residual[part], weight, bias=bias[part], flavour=flavour)
            return [
                hashlib.sha256(b"".join(o[row].view(torch.uint8).numpy().tobytes() for o in outs)).hexdigest()
                for row in range(rows)
            ]

        alone = [call(row, 1)[0] for row in range(pool)]
        for start, rows in ((0, 2), (1, 7), (0, 64), (0, pool), (37, pool * 2 // 3 - 4)):
            bits = call(start, rows)
            found += [f"{dtype} {hidden} {rows}: row {start + n}" for n in range(rows) if bits[n] != alone[start + n]]
        whole = all_reduce_add_rms_norm(x, None, weight, flavour=flavour)[1]
        total = sum(
            _order_sensitive(r, pool, hidden, dtype).to(torch.promote_types(dtype, torch.float32)) for r in range(WORLD)
        )
        if not torch.equal(whole, total.to(dtype)):  # type: ignore[union-attr]
            found.append(f"{dtype} {hidden}: not the sum in rank order")
    assert all_reduce_add_rms_norm(x[:0], None, weight)[0].shape == (0, hidden)
    return found


@pytest.mark.ranks
def test_on_gloo_a_row_has_the_same_bits_alone_and_among_up_to_three_hundred() -> None:
    for rank, found in enumerate(run_ranks(_rows_that_differ, WORLD, env={settings.BATCH_INVARIANT: "true"})):
        assert not found, f"rank {rank}: {len(found)} rows, such as {found[:5]}"


def _one_rank_in_the_mode(rank: int, world_size: int) -> str:
    os.environ[settings.BATCH_INVARIANT] = "true" if rank == 0 else "false"
    if rank == 1:
        return ""  # its all-reduce would never end beside an all-gather
    try:
        all_reduce_add_rms_norm(torch.ones(2, 8), None, torch.ones(8))
    except RuntimeError as error:
        return str(error)
    return "no error"


@pytest.mark.ranks
def test_ranks_in_different_modes_end_in_an_error_that_names_them() -> None:
    said = run_ranks(_one_rank_in_the_mode, 2, env={"TPFUSE_WATCHDOG_SECONDS": "1"})[0]
    assert "is in batch-invariant mode, and ranks [1] have not said within 1 s" in said


@pytest.mark.parametrize("shared", ("", "-shared"))
@pytest.mark.parametrize("world", range(2, 9))
def test_no_size_goes_to_the_library(world: int, shared: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for hidden in (64, 2880, 8192):
            for rows in (1, 1 << 10, 1 << 14, 1 << 17, 1 << 20):
                usual = select("sm_90" + shared, world, dtype, hidden, rows)
                chosen = select("sm_90" + shared, world, dtype, hidden, rows, batch_invariant=True)
                if usual.algorithm != "library":
                    assert chosen == usual
                    continue
                thresholds = entry("sm_90" + shared, world)
                row_bytes = hidden * dtype.itemsize
                assert chosen.algorithm == ("one_shot" if world == 2 else "two_shot")
                assert 1 <= chosen.rows_per_launch * row_bytes <= thresholds.launch_bytes
                if world > 2:
                    assert chosen.rows_per_launch <= two_shot_rows(phase_bytes(thresholds), world, row_bytes)
    assert any(e.two_shot_bytes == 16 * MIB for e in TABLE)  # the hole that this closes


def test_the_mode_is_part_of_what_ranks_compare(monkeypatch: pytest.MonkeyPatch) -> None:
    off = settings.Settings.from_environment()
    monkeypatch.setenv(settings.BATCH_INVARIANT, "true")
    on = settings.Settings.from_environment()
    assert (off.batch_invariant, on.batch_invariant) == (False, True)
    ballots = [vote.Ballot(None, "host", str(n), "sm_90", "v", s.fingerprint()) for n, s in enumerate((off, on))]
    with pytest.raises(RuntimeError, match=r"different settings .*batch_invariant=False.*batch_invariant=True"):
        vote.judge(ballots)
    monkeypatch.setenv("TPFUSE_ALGORITHM", "library")
    with pytest.raises(ValueError, match="TPFUSE_ALGORITHM='library' is not valid with batch_invariant"):
        settings.Settings.from_environment()
    monkeypatch.setenv(settings.BATCH_INVARIANT, "maybe")
    with pytest.raises(
        ValueError, match="TPFUSE_BATCH_INVARIANT='maybe' is not valid; valid values are true and false"
    ):
        settings.batch_invariant()


def test_a_call_that_no_kernel_takes_is_refused_in_a_group_with_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from tpfuse.ops import prepare

    path = paths.GroupPath("library", "pretended", settings.Settings(batch_invariant=True))
    monkeypatch.setattr(paths, "path_of", lambda name, device: path)
    monkeypatch.setattr(prepare.compat, "resolve_group", lambda name: _fresh_mode)  # anything that can be held weakly
    monkeypatch.setattr(prepare, "PREPARED", {})
    arguments = (None, None, 1.0, str(LLAMA), False, "tp")
    x, weight = torch.ones(2, 12), torch.ones(12)
    with pytest.raises(
        RuntimeError, match=r"batch_invariant is on.*H = 12 is not a multiple of 8.*switch batch_invariant"
    ):
        prepare.prepare(("refused",), x, None, weight, *arguments[1:])
    assert prepare.prepare(("taken",), torch.ones(2, 16), None, torch.ones(16), *arguments[1:]).constants is not None


def test_the_mode_cannot_change_under_a_group_that_has_made_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    invariant.set_batch_invariant(True)
    group = object()
    monkeypatch.setattr(invariant.compat, "resolve_group", lambda name: group)
    monkeypatch.setattr(invariant.compat, "is_group", lambda name, reference: reference() is group)
    invariant.remember("tp")
    invariant.set_batch_invariant(True)
    with pytest.raises(RuntimeError, match=r"cannot be switched off: groups \['tp'\] have made calls with it on"):
        invariant.set_batch_invariant(False)
    assert settings.batch_invariant()
    invariant.forget("tp")
    invariant.set_batch_invariant(False)
    assert not settings.batch_invariant()


def test_the_option_switches_the_mode_and_wins_over_its_environment_twin(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse(None).batch_invariant is None
    assert parse({"tpfuse.batch_invariant": "true"}).batch_invariant is True
    assert parse(None, {"TPFUSE_BATCH_INVARIANT": "1"}).batch_invariant is True
    with pytest.raises(OptionError, match=r"tpfuse\.batch_invariant='some' .*true and false"):
        parse({"tpfuse.batch_invariant": "some"})
    monkeypatch.setenv(settings.BATCH_INVARIANT, "true")
    options = {"tpfuse.inner": "aot_eager", "tpfuse.batch_invariant": False}
    assert torch.compile(torch.sin, backend="tpfuse", options=options)(torch.zeros(2)).tolist() == [0.0, 0.0]
    assert not settings.batch_invariant()
    torch._dynamo.reset()
