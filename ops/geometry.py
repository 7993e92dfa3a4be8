"""From the rows of a launch to its geometry: how many programs, and what part of a row each holds."""

from __future__ import annotations

from dataclasses import dataclass

from .kernels.state import GROUP_LANES, MAX_PROGRAMS

SPARE, SPARE_SHARED = 32, 2  # one in so many multiprocessors of a GPU is left to kernels that do not wait


@dataclass(frozen=True)
class Part:
    """What one program holds of a row: ``steps`` steps of ``lanes`` lanes (threads), 16 bytes each."""

    lanes: int  # 128 times a power of two, at most 1024
    steps: int

    @property
    def groups(self) -> int:
        return self.steps * self.lanes // GROUP_LANES

    def __str__(self) -> str:
        return f"{self.lanes}x{self.steps}"


@dataclass(frozen=True)
class Geometry:
    """``programs`` programs that hold a part of a row each; ``split`` of them make a row."""

    programs: int
    part: Part
    split: int


@dataclass(frozen=True)
class Room:
    """What the programs of one rank's launch find on its GPU.

    Attributes:
        algorithm, world: of the kernel; they decide the registers of a thread.
        multiprocessors: of the GPU.
        sharers: ranks on this GPU.
        concurrent: planes of one rank in use at the same time.
        packed: fill a shared GPU to the last register, for ranks that run nothing but these kernels (benchmarks).
    """

    algorithm: str
    world: int
    multiprocessors: int
    sharers: int = 1
    concurrent: int = 1
    packed: bool = False

    @property
    def waiting_kernels(self) -> int:
        """Kernels on this GPU that may wait at the same time, for one another among others."""
        return self.sharers * self.concurrent

    def fits(self, part: Part) -> int:
        """How many programs of one kernel of this rank may be in flight, so that whatever they wait for can run.

        With a GPU to itself a rank waits only for kernels on other GPUs; it fills its own but for a few multiprocessors.

        With several kernels that wait for each other on one GPU, be it because ranks share it or because a rank uses several
        planes at once, a kernel that waits may keep out an ordinary one (a matrix product, a reduction) that another rank
        has to finish first. Room in terms of registers is not enough: measured on an H200, where filled multiprocessors stopped
        the random test of ``tests/gpu`` and free ones did not; probably because a multiprocessor that holds any block cannot
        change how its memory is split into cache and shared memory. So all waiting programs together get fewer than all
        multiprocessors, however they are spread, and some stay free for everything else.

        A few are not enough: on an H100 that four ranks share, with one in eight free, a step of a model with experts stopped at
        32 rows; with half of them free it ran. Probably because matrix products on sm_90 launch clusters of thread blocks, up
        to eight, which start where one of the GPU's processing clusters, eight at most, has room for all of them: 7 * 8 + 1 free
        multiprocessors are sure to give that room, and half of 114 or of 132 are that many.
        """
        resident = resident_programs(self.algorithm, self.world, part)
        all_of_them = self.multiprocessors
        if self.waiting_kernels == 1:
            most = (all_of_them - all_of_them // SPARE) * resident
        elif self.packed:
            most = all_of_them * resident // self.waiting_kernels
        else:
            most = (all_of_them - all_of_them // SPARE_SHARED) // self.waiting_kernels
        return max(1, min(MAX_PROGRAMS, most))


def parts(room: Room, rows: int, groups: int) -> tuple[Part, ...]:
    """Parts that may share rows out, best first: the measurements behind the order are in docs/measuring.md.

    Many programs of 128 threads have the lowest latency for a few wide rows: each has little to push, and the multiprocessors
    share the work. The price is one more exchange of words for the sum of squares. With more rows on the GPU, or narrower
    ones, one program a row is faster, and the more threads it has, the more loads and stores are in flight.
    """
    wide = groups > 4
    if room.waiting_kernels > 1:
        few = room.multiprocessors if wide else room.multiprocessors // 4
    else:
        few = room.multiprocessors // 2 if wide else 0
    found = [Part(GROUP_LANES, 1)] if rows * groups * room.waiting_kernels <= few else []
    if not wide:
        return (*found, Part(GROUP_LANES << (groups - 1).bit_length(), 1))
    loop = Part(512, -(-groups // 4))
    if groups > 8:
        return (*found, Part(512, 1), loop)
    if room.algorithm == "two_shot":
        return (*found, Part(512, 1), Part(1024, 1))
    if room.world > 4:  # 1024 threads would have too few registers for the words of so many ranks
        return (*found, Part(512, 1), loop)
    return (*found, Part(1024, 1), Part(512, 1), loop)


def geometry(room: Room, rows: int, groups: int) -> Geometry:
    """The first of the :func:`parts` that gives every program at most one part of one row, else the last, one program a row.

    Programs that share a row wait for one another, so they must all be resident.

    Args:
        groups: groups of a row.
    """
    wanted = parts(room, rows, groups)
    for part in wanted:
        split = -(-groups // part.groups)
        if rows * split <= room.fits(part):
            return Geometry(rows * split, part, split)
    return Geometry(room.fits(wanted[-1]), wanted[-1], 1)


def forced_geometry(rows: int, groups: int, part: Part, most: int) -> Geometry | None:
    """The geometry of a launch whose programs hold ``part``, for experiments; None where it cannot be.

    Args:
        groups: groups of a row.
        most: how many programs are resident.
    """
    split = -(-groups // part.groups)
    if split == 1:
        return Geometry(min(rows, most), part, 1)
    return Geometry(rows * split, part, split) if rows * split <= most else None


# Registers that a thread of each kernel may use, by steps a program; enforced when compiling (.maxnreg), and checked ahead
# of time for spills in tests/test_kernel_aot.py. They decide how many programs are resident on one SM. One-shot holds the words
# of all ranks at once.
REGISTERS: dict[str, dict[int, int]] = {
    "one_shot of two": {1: 64, 2: 64, 4: 104, 8: 184, 16: 255},
    "one_shot of few": {1: 64, 2: 64, 4: 104, 8: 184, 16: 255},  # three and four
    "one_shot of many": {1: 64, 2: 80, 4: 128, 8: 200, 16: 255},
    "two_shot": {1: 64, 2: 80, 4: 120, 8: 184, 16: 255},
    "received_rows of many": {1: 96, 2: 112, 4: 136, 8: 200, 16: 255},  # as one-shot, and the words of several blocks
    "gathered_rows of many": {1: 96, 2: 120, 4: 136, 8: 200, 16: 255},
    "gathered_blocks of many": {1: 96, 2: 120, 4: 136, 8: 200, 16: 255},
    "received_two_shot": {1: 96, 2: 112, 4: 136, 8: 200, 16: 255},
}
REGISTERS_OF_AN_SM = 65536
THREADS_OF_AN_SM = 2048
THREADS_A_WARP = 32


def register_bound(algorithm: str, world: int, part: Part) -> int:
    """The bound for the smallest listed number of steps that is not below the part's, or what so many threads leave."""
    ranks = "two" if world == 2 else "few" if world <= 4 else "many"
    own = next((key for key in (algorithm, f"{algorithm} of {ranks}") if key in REGISTERS), f"one_shot of {ranks}")
    bounds = REGISTERS[own]
    return min(bounds[min(steps for steps in bounds if steps >= part.steps)], REGISTERS_OF_AN_SM // part.lanes)


def resident_programs(algorithm: str, world: int, part: Part) -> int:
    """Programs that the registers and threads of one multiprocessor leave room for."""
    threads = part.lanes
    return min(
        16, REGISTERS_OF_AN_SM // (register_bound(algorithm, world, part) * threads), THREADS_OF_AN_SM // threads
    )
