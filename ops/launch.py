"""From a call to a launch: how many programs, how many groups of a row each, and a cheap way to start a kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from .kernels.constants import Constants

GROUPS_A_PROGRAM = (1, 2, 4)  # fewer is faster while all programs of a row fit at once; see docs/measuring.md


@dataclass(frozen=True)
class Geometry:
    """``programs`` programs of four warps; a row is shared by ``split`` of them, ``groups`` groups each."""

    programs: int
    groups: int
    split: int


def geometry(rows: int, groups: int, fits: Callable[[int], int]) -> Geometry:
    """Split rows over programs while every program gets at most one part of one row, else one program a row.

    Programs that share a row wait for one another, so they must all be resident.

    Args:
        groups: groups of a row.
        fits: how many programs are resident when each holds this many groups.
    """
    for held in GROUPS_A_PROGRAM:
        split = -(-groups // held)
        if held < groups and rows * split <= fits(held):
            return Geometry(rows * split, held, split)
    return Geometry(min(rows, fits(groups)), groups, 1)


def forced_geometry(rows: int, groups: int, held: int, most: int) -> Geometry | None:
    """The geometry of a launch whose programs hold ``held`` groups of a row, for experiments; None where it cannot be.

    Args:
        groups: groups of a row.
        most: how many programs are resident.
    """
    held = min(held, groups)
    split = -(-groups // held)
    if split == 1:
        return Geometry(min(rows, most), held, 1)
    return Geometry(rows * split, held, split) if rows * split <= most else None


class Kernel:
    """A compiled kernel and the shortest way to launch it.

    Triton's own launch binds and specialises every argument on each call. Every argument here has one specialisation
    for good (pointers are 16-byte aligned, integers are not specialised), so after the first launch the compiled kernel
    is started directly.
    """

    def __init__(self, function: Any, num_warps: int, constexprs: tuple[Any, ...], **options: Any) -> None:
        self.function = function
        self.num_warps = num_warps
        self.constexprs = constexprs
        self.options = options
        self._compiled: Any = None
        self._run: Callable[..., None] | None = None

    def compile(self, *args: Any) -> None:
        """Compile and load without launching, so that no rank compiles while another one already waits for it.

        Triton gets dtypes in place of tensors: all that it needs, and nothing that it could keep alive (compiling may happen
        while the caching allocator is in a CUDA graph's pool, which nothing may outlast).
        """
        types = [a.dtype if isinstance(a, Tensor) else a for a in args]
        self._compiled = self.function.warmup(
            *types, *self.constexprs, grid=(1,), num_warps=self.num_warps, enable_fp_fusion=False, **self.options
        )
        if hasattr(self._compiled, "_init_handles"):
            self._compiled._init_handles()
            self._run = self._compiled.run

    @property
    def ready(self) -> bool:
        return self._compiled is not None

    @property
    def registers(self) -> int:
        return int(self._compiled.n_regs)

    def __call__(self, programs: int, stream: int, *args: Any) -> None:
        compiled = self._compiled
        assert self._run is not None
        self._run(
            programs,
            1,
            1,
            stream,
            compiled.function,
            compiled.packed_metadata,
            None,
            None,
            None,
            *args,
            *self.constexprs,
        )


def launch_plain(function: Any, programs: int, args: tuple[Any, ...], constexprs: tuple[Any, ...]) -> None:
    """Launch through Triton itself: the interpreter, and targets whose compiled kernels have another interface."""
    function[(programs,)](*args, *constexprs)


def protocol_constants(
    constants: Constants, world: int, shape: Geometry, *, wait: bool = True, ptx: bool = True, pdl: str = "off"
) -> tuple[Any, ...]:
    """The compile-time arguments of ``one_shot_kernel`` and ``two_shot_kernel``, in their order."""
    return (constants, world, shape.groups, shape.split, wait, ptx, pdl)


# Registers that each kernel may use, by algorithm and groups a program; enforced when compiling (.maxnreg), and checked
# ahead of time for spills in tests/test_kernel_aot.py. They decide how many programs are resident on one SM.
REGISTERS: dict[str, dict[int, int]] = {
    "one_shot": {1: 72, 2: 96, 4: 112, 8: 168, 16: 255},
    "two_shot": {1: 64, 2: 80, 4: 96, 8: 160, 16: 255},
}
REGISTERS_OF_AN_SM = 65536
THREADS = 128
MAX_PROGRAMS = 1024  # phase words in a plane


def register_bound(algorithm: str, groups: int) -> int:
    """The bound for the smallest listed number of groups that is not below ``groups``."""
    bounds = REGISTERS[algorithm]
    return bounds[min(g for g in bounds if g >= groups)]


def resident_programs(algorithm: str, groups: int) -> int:
    """Programs that the registers of one multiprocessor leave room for."""
    return min(16, REGISTERS_OF_AN_SM // (register_bound(algorithm, groups) * THREADS))


SPARE = 8  # one in eight multiprocessors of a GPU is left to kernels that do not wait


def most_programs(
    algorithm: str, groups: int, multiprocessors: int, sharers: int, concurrent: int, packed: bool = False
) -> int:
    """How many programs of one kernel of this rank may be in flight, so that whatever they wait for can run.

    With a GPU to itself a rank waits only for kernels on other GPUs. It takes at most half of its own: more programs do
    not help, and other kernels find room.

    With several kernels that wait for each other on one GPU, be it because ranks share it or because a rank uses several
    planes at once, a kernel that waits may keep out an ordinary one (a matrix product, a reduction) that another rank
    has to finish first. Room in terms of registers is not enough: measured on an H200, where filled multiprocessors stopped
    the random test of ``tests/gpu`` and free ones did not; probably because a multiprocessor that holds any block cannot
    change how its memory is split into cache and shared memory. So all waiting
    programs together get fewer than all multiprocessors, however they are spread, and some stay free for everything else.

    Args:
        sharers: ranks on this GPU.
        concurrent: planes of one rank in use at the same time.
        packed: fill a shared GPU to the last register, for ranks that run nothing but these kernels (benchmarks).
    """
    resident = resident_programs(algorithm, groups)
    kernels = sharers * concurrent
    if kernels == 1:
        most = multiprocessors * max(1, resident // 2)
    elif packed:
        most = multiprocessors * resident // kernels
    else:
        most = (multiprocessors - multiprocessors // SPARE) // kernels
    return max(1, min(MAX_PROGRAMS, most))
