"""The kernels of LayerNorm compiled ahead of time for sm_90, without a GPU: registers within the bounds, two small spills."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from test_kernel_aot import TYPES, _resources
from tpfuse.ops.geometry import Part, register_bound
from tpfuse.ops.kernels.add_norm import add_norm_layer_norm_kernel
from tpfuse.ops.kernels.one_shot import one_shot_layer_norm_kernel
from tpfuse.ops.kernels.two_shot import two_shot_layer_norm_kernel
from tpfuse.ops.kernels.variant import GROUP_LANES, Constants, Variant, centered, constants, torch_dtype
from tpfuse.ops.layer_norm_flavour import NAMED
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

KERNELS = {"one_shot": one_shot_layer_norm_kernel, "two_shot": two_shot_layer_norm_kernel}
# Bytes a thread: one-shot of two ranks, 16 programs a row, and two steps a program.
SPILLS = {("one_shot", 2, 16384, Part(128, 1)): 8, ("one_shot", 2, 8192, Part(512, 2)): 8}


def made(
    hidden: int, flavour: str = "layer_norm", dtype: torch.dtype = torch.bfloat16, addend: bool = True
) -> Constants:
    given = NAMED[flavour]
    weight = None if given.gain == "none" else dtype
    bias = "row" if addend else "none"
    c = constants(dtype, weight, hidden, given.scaling, bias=bias, scaled=False, has_residual=True, post_norm=False)
    return centered(c, None if given.shift == "none" else dtype, dtype, addend)


def compiled(function: Any, c: Constants, variant: Variant, numbers: tuple[str, ...], **options: Any) -> str:
    x, weight, shift = (TYPES[torch_dtype(d)] for d in (c.dtype, c.weight_dtype, c.shift_dtype or c.dtype))
    kinds = (
        x,
        x,
        weight,
        x,
        TYPES[torch_dtype(c.out_dtype)],
        x,
        shift,
        x,
        *((x,) if c.partial_addend else ()),
        *numbers,
    )
    names = function.arg_names
    source = ASTSource(
        function,
        dict(zip(names, (*kinds, "constexpr", "constexpr"), strict=True)),
        dict(zip(names[len(kinds) :], (c, variant), strict=True)),
        {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(kinds) if kind.startswith("*")},
    )
    options = {"num_warps": variant.lanes // 32, "enable_fp_fusion": False, **options}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]


def check(algorithm: str, c: Constants, world: int, part: Part, folder: Path) -> None:
    split = -(-c.groups // part.groups)
    bound = register_bound(algorithm, world, part)
    variant = Variant(world, part.lanes, part.steps, split, pdl="early")
    numbers = ("*i64", "*i32", "i32", "i32", "i32", "i64", "fp32", "fp32")
    ptx = compiled(KERNELS[algorithm], c, variant, numbers, maxnreg=bound, launch_pdl=True)
    registers, spilled = _resources(ptx, folder)
    allowed = SPILLS.get((algorithm, world, c.hidden, part), 0) + 8 * triton.__version__.startswith("3.6.")
    assert spilled <= allowed, f"{algorithm} W={world} {part}: {spilled} bytes spilled"
    assert registers <= bound


@pytest.mark.parametrize("algorithm", sorted(KERNELS))
@pytest.mark.parametrize("world", [2, 8])
def test_the_kernels_of_few_rows_do_not_spill(algorithm: str, world: int, tmp_path: Path) -> None:
    check(algorithm, made(4096), world, Part(512, 1), tmp_path)
    check(algorithm, made(8192), world, Part(128, 1), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", sorted(KERNELS))
@pytest.mark.parametrize("world", [2, 4, 8])
def test_no_other_variant_spills(algorithm: str, world: int, tmp_path: Path) -> None:
    # As the geometry has it: 1024 threads are too many for the words of eight ranks.
    widest = Part(512 if world > 4 else 1024, 1)
    for hidden, parts in (
        (4096, (Part(128, 1),)),
        (8192, (Part(512, 1), widest, Part(512, 2))),
        (16384, (Part(128, 1), Part(512, 1), Part(512, 4))),
    ):
        for part in parts:
            check(algorithm, made(hidden), world, part, tmp_path)
    for flavour in ("cohere", "nemotron", "olmo"):
        check(algorithm, made(6144, flavour, addend=False), world, widest, tmp_path)
    if world <= 4:  # one-shot over eight spills 16 bytes
        check(algorithm, made(4096, dtype=torch.float32), world, Part(128, 1), tmp_path)


@pytest.mark.parametrize("hidden", [2880, pytest.param(16384, marks=pytest.mark.slow)])
def test_the_kernel_behind_a_librarys_sum_does_not_spill(hidden: int, tmp_path: Path) -> None:
    c = made(hidden)
    variant = Variant(world=1, lanes=GROUP_LANES, steps=c.groups, split=1)
    ptx = compiled(add_norm_layer_norm_kernel, c, variant, ("i32", "fp32", "fp32"))
    assert _resources(ptx, tmp_path)[1] == 0
