"""The kernels of two partial sums compiled ahead of time for sm_90: registers within the bounds, few and small spills."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
from test_kernel_aot import KERNELS, _check, _compile, _constants, _resources
from test_layer_norm_aot import compiled, made
from tpfuse.ops.geometry import Part, Room, geometry, register_bound
from tpfuse.ops.kernels.one_shot import one_shot_layer_norm_of_two_kernel
from tpfuse.ops.kernels.two_shot import two_shot_layer_norm_of_two_kernel
from tpfuse.ops.kernels.variant import Constants, Variant
from triton.backends.compiler import GPUTarget

LAYER_NORMS = {"one_shot": one_shot_layer_norm_of_two_kernel, "two_shot": two_shot_layer_norm_of_two_kernel}
NUMBERS = ("*i64", "*i32", "i32", "i32", "i32", "i64", "fp32", "fp32")
# Bytes a thread, by algorithm, ranks, H and part: a value or two more than fit the registers.
SPILLS = {
    ("one_shot", 4, 16384, Part(512, 4)): 8,
    ("one_shot", 8, 8192, Part(512, 2)): 8,
    ("one_shot", 8, 16384, Part(512, 4)): 16,
}
LAYER_NORM_SPILLS = {
    ("one_shot", 2, 8192, Part(128, 1)): 20,
    ("one_shot", 2, 16384, Part(128, 1)): 8,
    ("one_shot", 4, 8192, Part(512, 2)): 20,
    ("one_shot", 4, 16384, Part(512, 4)): 24,
    ("one_shot", 8, 8192, Part(512, 2)): 8,
    ("one_shot", 8, 16384, Part(512, 4)): 16,
    **{("two_shot", world, *of): 8 for world in (2, 4) for of in ((4096, Part(512, 1)), (8192, Part(1024, 1)))},
}


def of_two(hidden: int, first: bool = False, dtype: torch.dtype = torch.bfloat16) -> Constants:
    return replace(_constants(hidden, dtype=dtype), bias="partial", residual_first=first)


def gated(hidden: int) -> Constants:
    """Qwen3-Next's: the first sum has a factor for each row."""
    return replace(of_two(hidden), scaled=True, scale_loaded=True, scale_by_row=True, scale_first=True)


def layer_norm_of_two(hidden: int, flavour: str = "layer_norm") -> Constants:
    """Phi's, with a vector behind each sum, or Cohere's, with its order."""
    cohere = flavour == "cohere"
    c = replace(made(hidden, flavour), partial_addend=True, addend_bias=not cohere, residual_first=cohere)
    return replace(c, bias="none") if cohere else c


def check(algorithm: str, c: Constants, world: int, part: Part, folder: Path) -> None:
    """As ``_check`` of the kernels of one sum, with the spills of the table."""
    bound = register_bound(algorithm, world, part)
    where = (algorithm, world, c.hidden, part)
    if c.centered:
        variant = Variant(world, part.lanes, part.steps, -(-c.groups // part.groups), pdl="early")
        ptx = compiled(LAYER_NORMS[algorithm], c, variant, NUMBERS, maxnreg=bound, launch_pdl=True)
        allowed = LAYER_NORM_SPILLS.get(where, 0)
    else:
        ptx = _compile(algorithm, c, world, part, GPUTarget("cuda", 90, 32), "early").asm["ptx"]
        allowed = SPILLS.get(where, 0)
    registers, spilled = _resources(ptx, folder)
    assert spilled <= allowed + 16 * triton.__version__.startswith("3.6."), f"{where}: {spilled} bytes spilled"
    assert registers <= bound


@pytest.mark.parametrize("algorithm", sorted(KERNELS))
@pytest.mark.parametrize("world", [2, 8])
def test_the_kernels_of_few_rows_do_not_spill(algorithm: str, world: int, tmp_path: Path) -> None:
    _check(algorithm, of_two(4096), world, Part(512, 1), 90, tmp_path)
    _check(algorithm, gated(2048), world, Part(128, 1), 90, tmp_path)
    check(algorithm, layer_norm_of_two(8192), world, Part(128, 1), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", sorted(KERNELS))
@pytest.mark.parametrize("world", [2, 4, 8])
def test_no_other_variant_spills_more_than_the_table_says(algorithm: str, world: int, tmp_path: Path) -> None:
    room = Room(algorithm, world, 132)
    for hidden in (4096, 8192, 16384):
        chosen = {geometry(room, rows, hidden // 1024).part for rows in (1, 16, 64, 128, 4096)}
        for part in sorted(chosen, key=str):
            for c in (
                of_two(hidden),
                of_two(hidden, True),
                *map(layer_norm_of_two, (hidden,) * 2, ("layer_norm", "cohere")),
            ):
                check(algorithm, c, world, part, tmp_path)
    check(algorithm, of_two(4096, dtype=torch.float16), world, Part(512, 1), tmp_path)


@pytest.mark.parametrize("algorithm", sorted(KERNELS))
def test_both_sums_are_on_their_way_before_the_first_poll(algorithm: str) -> None:
    """The own words of both are loaded before the phase, and pushed before anything is waited for."""
    target = GPUTarget("cuda", 90, 32)
    one, two = (_compile(algorithm, c, 2, Part(512, 1), target).asm["ptx"] for c in (_constants(4096), of_two(4096)))

    def before_the_first_poll(ptx: str, what: str) -> int:
        return ptx[: ptx.index("SPIN")].count(what)

    pushed = before_the_first_poll(one, "st.relaxed.sys.global.v4")
    assert pushed > 0 and before_the_first_poll(two, "st.relaxed.sys.global.v4") == 2 * pushed
    loads = [ptx[: ptx.index("st.relaxed.sys")].count("ld.global.v4") for ptx in (one, two)]
    assert loads == [1, 2]
    # Between two ranks one-shot waits for both sums in one poll; two-shot has two polls for each.
    assert (one.count("SPIN:"), two.count("SPIN:")) == ((1, 1) if algorithm == "one_shot" else (2, 4))
