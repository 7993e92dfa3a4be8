"""The memory primitives of the kernels: 16-byte loads and stores, push to a peer, poll for peers.

Every access moves four 32-bit words a lane (16 bytes, the widest a thread has). A lane is a thread of its own: a program
has as many threads as its tensors have lanes, so no thread ever repeats an access. 128 lanes make one *group* of a row.
The words travel as data and flag in one:

- A slot of a plane is all zeros while it is empty. A word that *is* zero is replaced on push by a word of equal value
  whose bits are not zero (-0.0 in its low half; -0.0 as a whole for fp32). Every sum ends with + 0.0, so the sign of a
  pushed zero never reaches the result.
- ``push`` writes words with relaxed, system-scope stores: memory order does not matter, because each word carries its
  own flag and no word vouches for another.
- ``poll`` reads the slots of all ranks at once, with relaxed, system-scope loads, and those that have a zero word again,
  until none has. All loads of one attempt are in flight together: one L2 round trip however many ranks there are.
- The lane that polled a slot is the lane that restores its zeros (``clear``). Same lane, same address: program order.

Order across calls comes from the kernel boundary, see :mod:`tpfuse.ops.plane`.

``push`` and ``poll`` have two bodies, chosen by the ``PTX`` switch: inline PTX for NVIDIA GPUs, and plain Triton for
every other target and for the interpreter. Plain loads and stores have the same two bodies only because Triton does
not join four 4-byte accesses into one of 16.

When a poll gives up
--------------------
A poll that waits longer than ``limit`` nanoseconds gives up. Word 0 of the record in device memory elects one writer of the
whole plane by compare-and-swap; it alone writes (1, missing rank, row, phase) there and to pinned host memory, word 0 last.
So the record keeps the first cause until the plane is reset. All other polls of slots that still wait look at the record
whenever they look at the clock, and give up as well: a program with many rows does not wait for the limit again and again.
(A poll of sibling programs does not: they always announce something, and all threads of a program must see the same.)
The portable body has no clock and counts a poll as one microsecond.

From then on this rank gives nothing but NaN and pushes nothing (its *plane has failed*):

- The poll that gave up returns words that are NaN in every dtype. They stay NaN through sums and norms, so the normed row is
  NaN; ``epilogue.spoil`` then overwrites whatever the lanes and programs of that row have stored of ``residual_out``.
- In two-shot an owner does not push a sum that it does not have.
- Every later launch finds the record, fills both outputs with NaN (``epilogue.poison``), and pushes and polls nothing.

Nothing is pushed, rather than NaN, because of peers that are late. That a phase is empty when it is written again rests on "no
call ends unless every rank has started it" (:mod:`tpfuse.ops.plane`). A NaN in place of a missing sum would let a peer C end
call n although B has not started it; C would go on, and in call n + 1 overwrite what B, still in call n - 1, has yet to read
in the same phase: plausible numbers on B. With nothing pushed, each rank that has not failed still ends a call only on words
that were pushed for that very call. So say that rank A gave up in call n, waiting for B, which comes one or two calls late:

- What B finds of A in calls up to n is what A pushed in those calls, before it gave up, into phases that B had emptied: B's
  results of those calls are right, or B misses words and fails.
- For call n + 1 A pushed nothing, and no row of any rank can be summed without A's part. B and all others give up in it at the
  latest, and what they were not told by their own polls they cannot have been told by anybody else: owners push only full sums.
- What late ranks push into A's plane is never read: A polls nothing before ``tpfuse.ops.reset`` has zeroed all planes, after
  the kernels of all ranks have ended.
"""

# Triton's language, not Python: tuples grow while they are traced, and have no unpacking.
# mypy: ignore-errors
# ruff: noqa: RUF005, SIM102
from __future__ import annotations

import triton
import triton.language as tl

CHECK_CLOCK_EVERY = 256  # polls between two looks at the clock and the record; a poll takes at least 0.3 us
NAN_WORD = 0x7FFF7FFF  # NaN as fp32 and as two values of bf16 or fp16
_NAN: tl.constexpr = tl.constexpr(NAN_WORD)


@triton.jit
def load16(address, active, PTX: tl.constexpr):
    """Four words a lane from ``address`` (int64, 16-byte aligned); zeros where ``active`` is 0."""
    if PTX:
        a, b, c, d = tl.inline_asm_elementwise(
            """
            {
            .reg .pred %p;
            setp.ne.u32 %p, $5, 0;
            mov.u32 $0, 0; mov.u32 $1, 0; mov.u32 $2, 0; mov.u32 $3, 0;
            @%p ld.global.v4.u32 {$0, $1, $2, $3}, [$4];
            }
            """,
            "=&r,=&r,=&r,=&r,l,r",
            [address, active],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=False,  # keeps its place before the poll, so that the wait hides its latency
            pack=1,
        )
        words = (a, b, c, d)
    else:
        pointer = address.to(tl.pointer_type(tl.int32))
        words = ()
        for i in tl.static_range(4):
            words = words + (tl.load(pointer + i, mask=active != 0, other=0),)
    return words


@triton.constexpr_function
def store_asm(instruction):
    """Four words to an address, where the last operand is not 0."""
    return f"""
            {{
            .reg .pred %p;
            setp.ne.u32 %p, $6, 0;
            @%p {instruction} [$1], {{$2, $3, $4, $5}};
            mov.u32 $0, 0;
            }}
            """


@triton.jit
def store_words_of_lanes(address, words, active, INSTRUCTION: tl.constexpr, PTX: tl.constexpr):
    """Store four words a lane where ``active`` is not 0, by a PTX instruction or, in the portable body, a plain store."""
    if PTX:
        tl.inline_asm_elementwise(
            store_asm(INSTRUCTION),
            "=r,l,r,r,r,r,r",
            [address, words[0], words[1], words[2], words[3], active],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        pointer = address.to(tl.pointer_type(tl.int32))
        for i in tl.static_range(4):
            tl.store(pointer + i, words[i], mask=active != 0)


@triton.jit
def store16(address, words, active, PTX: tl.constexpr):
    """Store four words a lane where ``active`` is not 0. Weak: for memory that only this rank reads, later."""
    store_words_of_lanes(address, words, active, "st.global.v4.u32", PTX)


@triton.jit
def marked(words, EMPTY_LOW: tl.constexpr):
    """``words`` with every zero word replaced by ``EMPTY_LOW``: the bits of a zero with a sign."""
    out = ()
    for i in tl.static_range(4):
        out = out + (tl.where(words[i] == 0, EMPTY_LOW, words[i]),)
    return out


@triton.jit
def push(address, words, active, PTX: tl.constexpr):
    """Store four marked words a lane into a slot of a plane. Relaxed, system scope."""
    store_words_of_lanes(address, words, active, "st.relaxed.sys.global.v4.u32", PTX)


@triton.jit
def clear(address, active, PTX: tl.constexpr):
    """Restore the zeros of a slot that this lane has polled."""
    zero = tl.zeros(active.shape, tl.int32)
    push(address, (zero, zero, zero, zero), active, PTX)


@triton.constexpr_function
def poll_asm(slots, stride, words, wait, heed, record_at, host_at, sums):
    """PTX that reads ``slots`` slots of 4 words, ``stride`` bytes apart, until their first ``words`` words are not zero.

    Operands after the outputs: base, own address, own slot (or -1), active, row, phase, device record, host record,
    limit. The own slot is read from the own address instead and may hold zeros: nobody pushes to itself. A slot that is
    full is not read again: where ranks share a GPU, their polls share its L2 with the pushes that they wait for.
    With two sums the second half of the slots is that of the second, and one more operand is the own address of it.
    The last output is 0 where the poll gave up. Slot 0 is then NaN, which is enough: every result depends on it.
    """
    n = 4 * slots
    full = f"${n}"
    ranks = slots // sums
    owns = [f"${n + 2}", f"${n + 10}"]  # of each sum
    base, _, rank, active, row, phase, device_record, host_record, limit = (f"${n + 1 + i}" for i in range(9))

    def quad(s):
        return "{" + ", ".join(f"${4 * s + i}" for i in range(4)) + "}"

    def load(s, when):
        return f"@{when} ld.relaxed.sys.global.v4.u32 {quad(s)}, [{base}+{s * stride}];"

    def missing(s):
        """%pz: slot s has a zero word and is not the own one. Kept nowhere: a thread has seven predicates."""
        first, *rest = [f"${4 * s + i}" for i in range(4) if 4 * s + i < words]
        least = [f"mov.u32 %m, {first};"] + [f"min.u32 %m, %m, {word};" for word in rest]
        return [*least, f"setp.ne.s32 %pz, {rank}, {s % ranks};", "setp.eq.and.u32 %pz, %m, 0, %pz;"]

    lines = ["{", ".reg .pred %pin, %pz;", ".reg .u32 %m, %full, %i, %q, %one;", ".reg .u64 %t0, %t1;"]
    lines += [*(f"mov.u32 ${i}, 0;" for i in range(n)), f"mov.u32 {full}, 1;"]
    lines += [f"setp.eq.u32 %pin, {active}, 0;", "@%pin bra DONE;", "mov.u32 %i, 0;", "mov.u64 %t0, 0;"]
    for s in range(slots):
        own = f"@%pz ld.global.v4.u32 {quad(s)}, [{owns[s // ranks]}];"
        lines += [f"setp.eq.s32 %pz, {rank}, {s % ranks};", own, load(s, "!%pz")]
    if wait:
        lines += ["SPIN:", "mov.u32 %full, 1;"]
        for s in range(slots):
            lines += [*missing(s), "@%pz mov.u32 %full, 0;", load(s, "%pz")]
        lines += ["setp.ne.u32 %pz, %full, 0;", "@%pz bra DONE;"]
        lines += ["add.u32 %i, %i, 1;", f"and.b32 %q, %i, {CHECK_CLOCK_EVERY - 1};", "setp.ne.u32 %pz, %q, 0;"]
        lines += ["@%pz bra SPIN;", "mov.u64 %t1, %globaltimer;", "setp.eq.u64 %pz, %t0, 0;", "@%pz mov.u64 %t0, %t1;"]
        lines += ["sub.u64 %t1, %t1, %t0;"]
        if heed:
            lines += [f"ld.relaxed.sys.global.u32 %q, [{device_record}+{record_at}];", "setp.eq.u32 %pz, %q, 0;"]
            lines += [f"setp.lt.and.u64 %pz, %t1, {limit}, %pz;", "@%pz bra SPIN;"]
        else:
            lines += [f"setp.lt.u64 %pz, %t1, {limit};", "@%pz bra SPIN;"]
        lines += ["mov.u32 %q, 0;"]
        for s in reversed(range(slots)):
            lines += [*missing(s), f"@%pz mov.u32 %q, {s % ranks};"]
        lines += ["mov.u32 %one, 1;", f"atom.relaxed.sys.global.cas.b32 %i, [{device_record}+{record_at}], 0, %one;"]
        lines += ["setp.ne.u32 %pz, %i, 0;", "@%pz bra LATER;"]
        if host_at >= 0:
            lines += [f"ld.global.u64 %t0, [{host_record}+{host_at}];"]
            host_record = "%t0"
        # Word by word: four registers in a row are hard to find while the words of all ranks are held.
        for record, at in ((device_record, record_at), (host_record, 0)):
            for word, value in enumerate(("%q", row, phase), 1):
                lines += [f"st.relaxed.sys.global.u32 [{record}+{at + 4 * word}], {value};"]
        lines += [f"st.release.sys.global.u32 [{host_record}], %one;"]
        lines += ["LATER:", *(f"mov.u32 ${i}, {NAN_WORD};" for i in range(4)), f"mov.u32 {full}, 0;"]
    lines += ["DONE:", "}"]
    return "\n".join(lines)


@triton.constexpr_function
def poll_constraints(slots, sums):
    return ",".join(["=&r"] * (4 * slots + 1) + ["l", "l", "r", "r", "r", "r", "l", "l", "l"] + ["l"] * (sums - 1))


@triton.jit
def _record(device_record, host_record, missing, row, phase):
    """The portable body of the election and of what its winner writes."""
    device = device_record.to(tl.pointer_type(tl.int32))
    if tl.atomic_cas(device, 0, 1, sem="relaxed", scope="sys") == 0:
        host = host_record.to(tl.pointer_type(tl.int32))
        for record in tl.static_range(2):
            address = device if record == 0 else host
            tl.store(address + 1, missing)
            tl.store(address + 2, row)
            tl.store(address + 3, phase)
        tl.atomic_xchg(host, 1, sem="release", scope="sys")


@triton.jit
def poll(
    base,
    own,
    rank,
    active,
    row,
    phase,
    watch,
    SLOTS: tl.constexpr,
    STRIDE: tl.constexpr,
    WORDS: tl.constexpr,
    WAIT: tl.constexpr,
    PTX: tl.constexpr,
    HEED: tl.constexpr = True,
    RECORD_AT: tl.constexpr = 0,
    HOST_AT: tl.constexpr = -1,
    own_second=0,
    SUMS: tl.constexpr = 1,
):
    """Wait until ``SLOTS`` slots of four words, ``STRIDE`` bytes apart from ``base``, are full.

    Returns their words, and behind them 1, or 0 where the poll gave up; the words of slot 0 are NaN there.

    Args:
        base: int64 address of slot 0, a tensor over lanes or a scalar.
        own: int64 address that stands in for slot ``rank``; it may hold zeros.
        rank: the slot that nobody pushes to, or -1.
        active: lanes with 0 get zeros and do not wait.
        row, phase: for the record of a failure.
        watch: int64 addresses for the records on the device and on the host, and nanoseconds before giving up.
        WORDS: how many of the 4 * SLOTS words are ever pushed.
        WAIT: False reads once and never spins: the floor that benchmarks compare with.
        HEED: give up as soon as the record says that another poll has.
        RECORD_AT: bytes from ``watch[0]`` to the record on the device.
        HOST_AT: bytes from ``watch[1]`` to where the address of the host's record is to be found; -1: ``watch[1]`` is that
            address. With both, what a thread keeps through the poll are arguments of the kernel, which take no register.
        own_second: with two SUMS, whose slots of the second follow those of the first: as ``own``, for the second.
    """
    device_record, host_record, limit = watch[0], watch[1], watch[2]
    if PTX:
        if SUMS == 1:
            operands = [base, own, rank, active, row, phase, device_record, host_record, limit]
        else:
            operands = [base, own, rank, active, row, phase, device_record, host_record, limit, own_second]
        words = tl.inline_asm_elementwise(
            poll_asm(SLOTS, STRIDE, WORDS, WAIT, HEED, RECORD_AT, HOST_AT, SUMS),
            poll_constraints(SLOTS, SUMS),
            operands,
            dtype=(tl.int32,) * (4 * SLOTS + 1),
            is_pure=False,
            pack=1,
        )
    else:
        device_record += RECORD_AT
        pending = 1
        polls = 0
        full = tl.full((), 1, tl.int32)
        while pending != 0:
            pending = 0
            missing = 0
            for i in tl.static_range(WORDS):
                waits = (active != 0) & (rank != i // 4 % (SLOTS // SUMS))
                pointer = (base + (i // 4) * STRIDE).to(tl.pointer_type(tl.int32)) + i % 4
                zero = ((tl.load(pointer, volatile=True) == 0) & waits).to(tl.int32)
                empty = tl.sum(tl.zeros((1,), tl.int32) + zero, axis=0)  # the sum takes no scalar
                missing = tl.where(empty != 0, i // 4 % (SLOTS // SUMS), missing)
                pending += empty
            if not WAIT:
                pending = 0
            polls += 1
            over = polls > limit // 1000
            if HEED:
                if polls % 64 == 0:
                    over = over | (tl.load(device_record.to(tl.pointer_type(tl.int32)), volatile=True) != 0)
            if (pending != 0) & over:
                if HOST_AT >= 0:
                    _record(
                        device_record,
                        tl.load((host_record + HOST_AT).to(tl.pointer_type(tl.int64))),
                        missing,
                        row,
                        phase,
                    )
                else:
                    _record(device_record, host_record, missing, row, phase)
                full = tl.full((), 0, tl.int32)
                pending = 0
        words = ()
        for i in tl.static_range(4 * SLOTS):
            mine = own if i // 4 < SLOTS // SUMS else own_second
            address = tl.where(rank == i // 4 % (SLOTS // SUMS), mine, base + (i // 4) * STRIDE)
            pointer = address.to(tl.pointer_type(tl.int32)) + i % 4
            word = tl.load(pointer, mask=active != 0, other=0, volatile=True)
            words = words + (tl.where(full != 0, word, _NAN) if i < 4 else word,)
        words = words + (full,)
    return words
