"""The kernels of fp32 partial sums beside a 16-bit residual compiled ahead of time for sm_90: registers, spills, loads."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
from test_kernel_aot import KERNELS, _compile, _constants, _resources
from tpfuse.ops.geometry import Part, Room, geometry, register_bound
from tpfuse.ops.kernels.variant import Constants
from triton.backends.compiler import GPUTarget

# Bytes a thread, by algorithm, ranks, H and part: a value or two more than fit the registers.
SPILLS = {
    ("one_shot", 4, 16384, Part(512, 4)): 8,
    ("one_shot", 8, 8192, Part(512, 2)): 16,
    ("one_shot", 8, 16384, Part(512, 4)): 16,
    ("two_shot", 8, 4096, Part(512, 1)): 16,
    ("two_shot", 8, 8192, Part(1024, 1)): 28,
}


def wide(hidden: int, dtype: torch.dtype = torch.bfloat16) -> Constants:
    return replace(_constants(hidden, dtype=dtype), wide_sum=True)


def check(algorithm: str, c: Constants, world: int, part: Part, folder: Path) -> None:
    where, bound = (algorithm, world, c.hidden, part), register_bound(algorithm, world, part)
    ptx = _compile(algorithm, c, world, part, GPUTarget("cuda", 90, 32), "early").asm["ptx"]
    registers, spilled = _resources(ptx, folder)
    allowed = SPILLS.get(where, 0) + 16 * triton.__version__.startswith("3.6.")
    assert spilled <= allowed, f"{where}: {spilled} bytes spilled"
    assert registers <= bound


@pytest.mark.parametrize("algorithm", sorted(KERNELS))
@pytest.mark.parametrize("world", [2, 8])
def test_the_kernels_of_few_rows_do_not_spill(algorithm: str, world: int, tmp_path: Path) -> None:
    check(algorithm, wide(8192), world, Part(128, 1), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", sorted(KERNELS))
@pytest.mark.parametrize("world", [2, 4, 8])
def test_no_other_variant_spills_more_than_the_table_says(algorithm: str, world: int, tmp_path: Path) -> None:
    room = Room(algorithm, world, 132)
    for hidden in (4096, 8192, 16384):
        chosen = {geometry(room, rows, hidden // 1024).part for rows in (1, 16, 64, 128, 4096)}
        for part in sorted(chosen, key=str):
            check(algorithm, wide(hidden), world, part, tmp_path)
    check(algorithm, wide(8192, torch.float16), world, Part(128, 1), tmp_path)


@pytest.mark.parametrize("algorithm", sorted(KERNELS))
def test_all_words_are_on_their_way_before_the_first_poll(algorithm: str) -> None:
    """Both halves are loaded before the phase and pushed before anything is waited for; what two-shot sends back is narrow."""
    target = GPUTarget("cuda", 90, 32)
    one, two = (_compile(algorithm, c, 2, Part(512, 1), target).asm["ptx"] for c in (_constants(4096), wide(4096)))

    def before_the_first_poll(ptx: str, what: str) -> int:
        return ptx[: ptx.index("SPIN")].count(what)

    pushed = before_the_first_poll(one, "st.relaxed.sys.global.v4")
    assert pushed > 0 and before_the_first_poll(two, "st.relaxed.sys.global.v4") == 2 * pushed
    loads = [ptx[: ptx.index("st.relaxed.sys")].count("ld.global.v4") for ptx in (one, two)]
    assert loads == [1, 2]
    # One-shot between two ranks waits for all words in one poll; two-shot for each half, and for the one sum.
    assert (one.count("SPIN:"), two.count("SPIN:")) == ((1, 1) if algorithm == "one_shot" else (2, 3))
    # What clears the slots of a sum behind the last poll: those of both halves, or of the one sum that two-shot sends back.
    behind = [ptx[ptx.rindex("SPIN") :].count("st.relaxed.sys.global.v4") for ptx in (one, two)]
    assert behind == ([2, 4] if algorithm == "one_shot" else [1, 1])
