"""The kernels of rows with destinations with a LayerNorm, compiled ahead of time for sm_90: registers and spills; the calls that
they are compiled for, prepared without a GPU."""

from __future__ import annotations

import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
from test_kernel_aot import _resources
from test_layer_norm_aot import compiled, made
from tpfuse.ops import paths, prepare, rows_cuda, schedule
from tpfuse.ops.geometry import Part, Room, geometry, register_bound
from tpfuse.ops.kernels.variant import Variant
from tpfuse.ops.layer_norm_flavour import LAYER_NORM
from tpfuse.ops.layer_norm_operands import LayerNormOperands
from tpfuse.ops.rows_call import Rows

BF16, FP32 = torch.bfloat16, torch.float32
# algorithm, ranks, blocks
QUICK = [("received_rows", 2, 2), ("received_two_shot", 8, 2), ("gathered_rows", 8, 8), ("gathered_blocks", 8, 2)]
OTHERS = [
    *(("received_rows", world, blocks) for world, blocks in ((4, 2), (4, 4), (8, 2), (8, 8))),
    *(("gathered_rows", world, world) for world in (2, 4)),
    *(("gathered_blocks", world, 2 * world // 4) for world in (4, 8)),
    ("received_two_shot", 4, 2),
]
# Of rows that two steps do not fill, bytes a thread without and with both a bias and an addend.
SPILLS = {
    ("received_rows", 2, 2): (0, 8),
    ("received_rows", 4, 2): (8, 16),
    ("received_rows", 4, 4): (0, 16),
    ("gathered_rows", 4, 4): (32, 40),
    ("gathered_blocks", 4, 2): (4, 8),
}


def check(case: tuple[str, int, int], hidden: int, part: Part, addend: bool, folder: Path) -> None:
    algorithm, world, blocks = case
    c, bound = made(hidden, addend=addend), register_bound(algorithm, world, part)
    gathers = algorithm.startswith("gathered")
    variant = Variant(
        world, part.lanes, part.steps, -(-c.groups // part.groups), pdl="early", blocks=blocks, gathers=gathers
    )
    numbers = ("*i64", "*i32", "i32", "i32", "i32", "i32", "i32", "i64", "fp32", "fp32")
    function = schedule.kernel_of(algorithm, c, variant).function
    ptx = compiled(function, c, variant, numbers, maxnreg=bound, launch_pdl=True)
    registers, spilled = _resources(ptx, folder)
    allowed = SPILLS.get(case, (0, 0))[addend] if (hidden, part) == (7168, Part(512, 2)) else 0
    if triton.__version__.startswith("3.6."):  # its assembler spills more
        allowed += 40 if case == ("gathered_blocks", 4, 2) else 8
    assert spilled <= allowed, f"{case} {hidden} {part}: {spilled} bytes spilled"
    assert registers <= bound


@pytest.mark.long
@pytest.mark.parametrize("case", QUICK, ids=str)
def test_the_kernels_of_few_rows_do_not_spill(case: tuple[str, int, int], tmp_path: Path) -> None:
    check(case, 4096, Part(512, 1), True, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("addend", [False, True])
@pytest.mark.parametrize("case", [*QUICK, *OTHERS], ids=str)
def test_what_other_variants_spill(case: tuple[str, int, int], addend: bool, tmp_path: Path) -> None:
    room = Room(case[0], case[1], 132)
    for hidden in (4096, 7168):
        parts = {geometry(room, rows, hidden // 1024).part for rows in (1, 64, 4096)}
        for part in sorted(parts, key=str):
            check(case, hidden, part, addend, tmp_path)


def test_calls_of_one_kind_are_prepared_once_with_the_constants_of_their_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    def group() -> None: ...

    path = SimpleNamespace(plane=None, settings=SimpleNamespace(batch_invariant=False, watchdog_seconds=1.0))
    monkeypatch.setattr(paths, "path_of", lambda *_: path)
    monkeypatch.setattr(paths, "is_current", lambda *_: True)
    monkeypatch.setattr(paths, "current_stream_class", lambda: "")
    monkeypatch.setattr(prepare.compat, "resolve_group", lambda name: group)
    monkeypatch.setattr(prepare.compat, "group_reference", weakref.ref)
    monkeypatch.setattr(prepare, "PREPARED", {})
    monkeypatch.setattr(rows_cuda, "PREPARED", prepare.PREPARED)

    def constants_of(rows: int, name: str = "op", **changes: Any) -> Any:
        h, v = torch.ones(rows, 72, dtype=BF16), torch.ones(72, dtype=BF16)
        fields = {"residual": h, "weight": v, "norm_bias": v, "bias": v, "addend": None, "eps": 1e-5, "scale": 1.0}
        fields.update(flavour=str(LAYER_NORM), group_name="a group", **changes)
        after_x = tuple(fields[f] for f in LayerNormOperands._fields[1:10])
        asked = Rows(
            torch.ones(2 * rows, 72, dtype=BF16), after_x, 2, "reduce_scatter", 0, (rows, 72), name, LayerNormOperands
        )
        prepared, given = rows_cuda.prepared_of(asked, asked.like(rows), lambda *_: None)
        assert isinstance(given, LayerNormOperands) and given.flavour == LAYER_NORM
        assert (prepared.normed_dtype, prepared.residual_dtype) == (BF16, BF16)
        return prepared.constants

    c = constants_of(3)
    assert (c.kind, c.bias, c.has_shift, c.has_addend, c.scaled, c.sums) == ("layer_norm", "row", True, False, False, 1)
    assert constants_of(5) is c  # another number of rows
    vector = torch.ones(72, dtype=FP32)
    others = [
        constants_of(3, name="another op"),
        constants_of(3, addend=torch.ones(3, 72, dtype=BF16)),
        constants_of(3, bias=torch.ones(3, 72, dtype=BF16)),
        constants_of(3, scale=0.5),
        constants_of(3, residual=None),
        constants_of(3, weight=vector, norm_bias=vector),
    ]
    assert len(prepare.PREPARED) == 1 + len(others)
    assert [o.kind for o in others] == ["layer_norm"] * 6
    assert (others[1].has_addend, others[2].bias, others[3].scaled) == (True, "full", True)
    assert not others[4].has_residual and others[5].shift_dtype != c.shift_dtype
