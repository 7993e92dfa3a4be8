"""Ranks of the Triton interpreter: the kernels of ``tpfuse.ops`` run by real processes over shared memory.

One process a rank, or, for rows that several programs share, one process for every (rank, program): the interpreter runs
the programs of a grid one after another, so programs that wait for each other must be processes. Planes, state and
outputs live in POSIX shared memory; the stores and volatile loads of the interpreter are real across processes.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import itertools
import os
import random
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from multiprocessing import shared_memory
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import warm

STATIC_SCALE = torch.tensor(0.037)
WATCHDOG_NS = 200_000_000  # 200,000 polls of the portable body: minutes


@dataclass(frozen=True)
class Call:
    """One call of the op as every rank makes it. ``seed`` decides the data, so that each rank can build all ranks' rows."""

    rows: int
    hidden: int
    algorithm: str = "one_shot"
    dtype: torch.dtype = torch.bfloat16
    flavour: str = "llama"
    weight_dtype: torch.dtype | None = None  # None: the dtype of x
    residual: bool = True
    bias: str = "none"  # "partial": each rank's part of a second sum
    scale: float = 1.0
    scale_tensor: bool = False  # the scale is given as a tensor
    scale_rows: bool = False  # and has one value for each row
    scale_first: bool = False
    wide_residual: bool = False  # fp32 beside 16-bit sums
    wide_sum: bool = False  # every rank's part is fp32, and its sum is rounded to ``dtype``
    post_norm: bool = False
    special: str = "none"  # "zeros", "negative_zeros", "nonfinite", "denormals", "order" (sums depend on their order)
    seed: int = 0
    programs: int = 2  # grid cap
    lanes: int = 128  # of a program
    steps: int | None = None  # of a program over its part of a row; None: the whole row
    eps: float = 1e-6
    pool: int = 0  # rows that the seed makes; the call takes ``rows`` of them from ``start`` on. 0: just the call's own
    start: int = 0
    in_place: bool = False  # normed is written over x, and residual_out over the residual; for whole rows
    blocks: int = 1  # of ``rows`` rows, each for as many ranks; see tpfuse.ops.kernels.received_rows
    kept: tuple[int, ...] = ()  # rows that each rank keeps of its block; (): all
    gathers: bool = (
        False  # the normed rows of all blocks: see tpfuse.ops.kernels.gathered_rows (a block a rank), gathered_blocks
    )
    quantizer: str = (
        ""  # a name of tpfuse.ops.quantizer.NAMED: the normed rows are quantized, as 'quantized' and 'scales'
    )
    keep_normed: bool = True
    layer_norm: bool = False  # the flavour is one of tpfuse.ops.layer_norm_flavour.NAMED
    mean: float = 0.0  # added to every contribution
    addend: bool = False
    partial_addend: bool = False  # the addend is each rank's part of a second sum
    addend_bias: bool = False
    residual_first: bool = False

    @property
    def two_sums(self) -> bool:
        return self.bias == "partial" or self.partial_addend

    def way(self, world: int) -> str:
        """Which kernel it takes, but for what its norm is."""
        if self.gathers:
            return "gathered rows" if self.blocks == world else "gathered blocks"
        return self.algorithm if self.blocks == 1 else f"received {self.algorithm}"

    @property
    def scale_value(self) -> torch.Tensor | float:
        """The scale as the op gets it."""
        if not self.scale_tensor and not self.scale_rows:
            return self.scale
        by_row = torch.linspace(-1.5, 1.5, self.rows)[:, None] if self.scale_rows else torch.ones(())
        return (by_row * self.scale).to(self.dtype)


@dataclass
class Outcome:
    """What one rank saw: a digest of each call's outputs, what differed from the reference, what was left in the plane."""

    rank: int
    digests: list[str] = field(default_factory=list)
    mistakes: list[str] = field(default_factory=list)
    leftover: int = 0
    record: tuple[int, ...] = (0, 0, 0, 0)
    records: list[tuple[int, ...]] = field(default_factory=list)  # after each call
    rows: list[str] = field(default_factory=list)  # for each call a letter a row, see row_letters
    row_digests: list[list[str]] = field(default_factory=list)  # for each call a digest a row, of both outputs
    normed_digests: list[list[str]] = field(default_factory=list)  # of normed alone
    error: str = ""


@dataclass(frozen=True)
class Inputs:
    xs: list[torch.Tensor]
    residual: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    shift: torch.Tensor | None = None
    addend: torch.Tensor | None = None
    seconds: list[torch.Tensor] = field(default_factory=list)  # what each rank contributes to a second sum
    addend_bias: torch.Tensor | None = None


def inputs(call: Call, world: int) -> Inputs:
    """The tensors of a call, the same on every rank: ``xs[r]`` is what rank r contributes."""
    if call.pool:
        whole = inputs(replace(call, rows=call.pool, pool=0), world)
        part = slice(call.start, call.start + call.rows)
        full = whole.bias is not None and whole.bias.dim() > 1
        return Inputs(
            [x[part].clone() for x in whole.xs],
            None if whole.residual is None else whole.residual[part].clone(),
            whole.weight,
            whole.bias[part].clone() if full else whole.bias,  # type: ignore[index]
            seconds=[x[part].clone() for x in whole.seconds],
        )
    g = torch.Generator().manual_seed(call.seed)
    shape = (call.rows * call.blocks, call.hidden)

    def make(*size: int, dtype: torch.dtype = call.dtype) -> torch.Tensor:
        t = torch.randn(*size, generator=g)
        if call.special == "zeros":
            t = torch.where(torch.rand(*size, generator=g) < 0.7, torch.zeros(()), t)
            t[..., : call.hidden // 2] = 0.0
        elif call.special == "negative_zeros":
            t = torch.where(torch.rand(*size, generator=g) < 0.8, torch.full((), -0.0), t)
        elif call.special == "nonfinite":
            bad = torch.tensor([float("nan"), float("inf"), float("-inf")])
            t.view(-1)[:: max(1, t.numel() // 7)] = bad[torch.randint(3, (1,), generator=g)]
        elif call.special == "denormals":
            t = t * 1e-39 if call.dtype != torch.float16 else t * 1e-7
        return t.to(dtype)

    of_x = torch.float32 if call.wide_sum else call.dtype
    xs = [make(*shape, dtype=of_x) for _ in range(world)]
    if call.mean:
        xs = [(x.float() + call.mean).to(of_x) for x in xs]
    if call.special == "order":
        # Each element is 2**24, 1, -2**24 (and 1, 3, ...) over the ranks, in an order of its own: other orders, other sums.
        terms = torch.tensor([2.0**24, 1.0, -(2.0**24), 1.0, 3.0, 5.0, 7.0, 9.0][:world])
        orders = torch.rand(*shape, world, generator=g).argsort(dim=-1)
        xs = [terms[orders[..., r]].to(of_x) for r in range(world)]
    weight = None
    if call.flavour not in ("weightless", "olmo"):
        weight = torch.randn(call.hidden, generator=g).to(call.weight_dtype or call.dtype)
    bias = {"none": None, "row": (call.hidden,), "full": shape, "partial": None}[call.bias]
    shift = None
    if call.layer_norm and call.flavour in ("layer_norm", "nemotron"):
        shift = torch.randn(call.hidden, generator=g).to(call.weight_dtype or call.dtype)
    residual = make(*shape) if call.residual else None
    if residual is not None and call.wide_residual:
        residual = residual.float() * 1.001  # no values of the narrow dtype
    given = Inputs(
        xs, residual, weight, None if bias is None else make(*bias), shift, make(*shape) if call.addend else None
    )
    if not call.two_sums:
        return given
    seconds = [make(*shape) for _ in range(world)]
    if call.special == "order":
        seconds = [xs[(r + 1) % world] * 3 for r in range(world)]
    return replace(given, seconds=seconds, addend_bias=make(call.hidden) if call.addend_bias else None)


def of_rank(call: Call, given: Inputs, rank: int, world: int) -> Inputs:
    """What a rank keeps of the rows: all of them, or the first ones of its block."""
    if call.blocks == 1:
        return given
    start = rank * call.blocks // world * call.rows
    mine = slice(start, start + (call.kept[rank] if call.kept else call.rows))
    full = given.bias is not None and given.bias.dim() > 1
    return Inputs(
        [x[mine] for x in given.xs],
        None if given.residual is None else given.residual[mine].clone(),
        given.weight,
        given.bias[mine].clone() if full else given.bias,  # type: ignore[index]
        given.shift,
        None if given.addend is None else given.addend[mine].clone(),
    )


def layer_norm_flavour(call: Call) -> Any:
    from tpfuse.ops.layer_norm_flavour import NAMED

    return NAMED[call.flavour]


def constants_of(call: Call, given: Inputs) -> Any:
    """What the kernels of a call that does not quantize are compiled for."""
    from tpfuse.ops import layer_norm_reference
    from tpfuse.ops.flavour import NAMED
    from tpfuse.ops.kernels.variant import centered, constants

    weight, shift = (None if t is None else t.dtype for t in (given.weight, given.shift))
    flavour = layer_norm_flavour(call).scaling if call.layer_norm else NAMED[call.flavour]
    c = constants(
        call.dtype,
        weight,
        call.hidden,
        flavour,
        bias=call.bias,
        scaled=call.scale != 1.0 or call.scale_rows,
        has_residual=call.residual,
        post_norm=call.post_norm,
        scale_loaded=call.scale_tensor or call.scale_rows,
        scale_by_row=call.scale_rows,
        scale_first=call.scale_first,
        wide_residual=call.wide_residual,
        residual_first=call.residual_first,
        wide_sum=call.wide_sum,
    )
    if not call.layer_norm:
        return c
    out = layer_norm_reference.output_dtype(call.dtype, weight, shift, layer_norm_flavour(call))
    return centered(c, shift, out, call.addend or call.partial_addend, call.partial_addend, call.addend_bias)


def expected(call: Call, given: Inputs, spelled_out: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The contract: fp32 sum in rank order from +0.0, rounded once, zeros positive; then the exact reference.

    ``spelled_out``: a LayerNorm as the kernels take it: the mean, then the mean of squared differences.
    """
    from tpfuse.ops import layer_norm_reference, reference
    from tpfuse.ops.flavour import NAMED

    def in_rank_order(xs: list[torch.Tensor]) -> torch.Tensor:
        total = torch.zeros(xs[0].shape)
        for x in xs:
            total = total + x.float()
        return total.to(call.dtype) + 0.0

    reduced = in_rank_order(given.xs)
    if call.two_sums:
        second = in_rank_order(given.seconds)
        given = replace(given, addend=second) if call.layer_norm else replace(given, bias=second)
    if call.layer_norm:
        flavour = layer_norm_flavour(call)
        if spelled_out:
            flavour = replace(flavour, moments="squares", compute="float32")
        affine = given.residual, given.weight, given.shift, given.bias, given.addend
        last = call.eps, call.scale, flavour, given.addend_bias, call.residual_first
        return layer_norm_reference.add_layer_norm(reduced, *affine, *last)
    return reference.add_rms_norm(
        *(reduced, given.residual, given.weight, given.bias, call.eps, call.scale, NAMED[call.flavour], call.post_norm),
        scale_tensor=call.scale_value if isinstance(call.scale_value, torch.Tensor) else None,
        scale_first=call.scale_first,
        residual_first=call.residual_first,
    )


@contextlib.contextmanager
def squares_in_kernel_order(call: Call) -> Iterator[None]:
    """Inside, the reference takes the mean of squares in the order that docs/op.md promises, not in torch's.

    Pairs within a lane of 16 bytes, one tree in fp32 over the 128 lanes of a group (numpy's, which is the interpreter's), the
    groups in fp64, rounded once.
    """
    values = 16 // call.dtype.itemsize
    turns = itertools.count()

    def total(squares: torch.Tensor) -> torch.Tensor:
        rows, hidden = squares.shape
        padded = torch.nn.functional.pad(squares, (0, -hidden % (128 * values)))
        for _ in range(values.bit_length() - 1):
            padded = padded[..., 0::2] + padded[..., 1::2]
        groups = padded.reshape(rows, padded.shape[-1] // 128, 128).numpy().sum(axis=2)
        return torch.from_numpy(groups.astype("float64").sum(axis=1))[:, None]

    def mean(squares: torch.Tensor, dim: int, keepdim: bool) -> torch.Tensor:
        assert (dim, keepdim) == (-1, True)
        if call.layer_norm and next(turns) % 2 == 0:  # first of the values, then of the squares
            return (total(squares) * (1 / squares.shape[-1])).float()
        return total(squares).float() / squares.shape[-1]

    def add(squares: torch.Tensor, dim: int, keepdim: bool) -> torch.Tensor:
        assert (dim, keepdim) == (-1, True)
        return total(squares).float()

    with patch.object(torch.Tensor, "mean", mean), patch.object(torch.Tensor, "sum", add):
        yield


def digest(*tensors: torch.Tensor) -> str:
    h = hashlib.sha256()
    for t in tensors:
        h.update(t.clone(memory_format=torch.contiguous_format).view(torch.uint8).numpy().tobytes())
    return h.hexdigest()[:16]


def ulps_apart(a: torch.Tensor, b: torch.Tensor) -> int:
    """Largest distance in units in the last place; NaN equals NaN."""
    kind = {4: torch.int32, 2: torch.int16}[a.element_size()]
    same = (a == b) | (a.isnan() & b.isnan())
    if bool((a.isnan() != b.isnan()).any()):
        return 1 << 30
    ia, ib = a.contiguous().view(kind).long(), b.contiguous().view(kind).long()
    top = 1 << (8 * a.element_size() - 1)
    ia = torch.where(ia < 0, -(ia + top), ia)
    ib = torch.where(ib < 0, -(ib + top), ib)
    return int(torch.where(same, torch.zeros((), dtype=torch.long), (ia - ib).abs()).max()) if a.numel() else 0


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors have one shape and the same bits; NaN is NaN."""
    if a.dtype == torch.int32 or a.shape != b.shape:
        return torch.equal(a, b)
    a, b = a.float().contiguous(), b.float().contiguous()
    return bool(((a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())).all())


def expected_of_all(
    call: Call, everything: Inputs, rank: int, world: int, spelled_out: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """What a rank gets of a call: with a gather the normed rows of all ranks, zeros where a block has fewer."""
    if not call.gathers:
        return expected(call, of_rank(call, everything, rank, world), spelled_out)
    size, found = world // call.blocks, []
    for first in range(0, world, size):
        given = of_rank(call, everything, first, world)
        # With several ranks a block, only these have parts of the sums of its rows.
        given = given if size == 1 else replace(given, xs=given.xs[first : first + size])
        found.append(expected(call, given, spelled_out))
    filled = [torch.nn.functional.pad(normed, (0, 0, 0, call.rows - len(normed))) for normed, _ in found]
    return torch.cat(filled), found[rank // size][1]


def row_letters(got: tuple[torch.Tensor, ...], want: tuple[torch.Tensor, ...]) -> str:
    """For each row ``r`` (both outputs right), ``n`` (both all NaN) or ``w`` (anything else: wrong)."""
    letters = []
    if len(got[0]) != len(got[1]):  # a gather: the normed rows, then those of the residual
        return "|".join(row_letters((g, g), (w, w)) for g, w in zip(got, want, strict=True))
    for row in range(got[0].shape[0]):
        pairs = [(g[row], w[row]) for g, w in zip(got, want, strict=True)]
        if all(bool(g.isnan().all()) for g, _ in pairs):
            letters.append("n")
        else:
            letters.append("w" if any(ulps_apart(g, w) for g, w in pairs) else "r")
    return "".join(letters)


def _attach(name: str) -> tuple[shared_memory.SharedMemory, torch.Tensor]:
    memory = shared_memory.SharedMemory(name=name)
    return memory, torch.frombuffer(memory.buf, dtype=torch.int32)


def poll_politely(interpreter: Any) -> None:
    """A poll that finds an empty word lets the process that is to fill it have the core."""
    load = interpreter.interpreter_builder.create_masked_load

    def polite_load(*arguments: Any) -> Any:
        loaded = load(*arguments)
        if arguments[-1] and not loaded.data.all():  # volatile; what stands before it depends on Triton's version
            time.sleep(0.0003)
        return loaded

    interpreter.interpreter_builder.create_masked_load = polite_load


def patch_once(interpreter: Any) -> None:
    """Patch Triton's language once a launch, and not again for every function that a kernel calls: a quarter of the time."""
    import triton.language as tl

    patch = interpreter._patch_lang
    in_force: dict[frozenset[str], Any] = {}

    class Scope:
        def restore(self) -> None:
            while in_force:
                in_force.popitem()[1].restore()

    def once(fn: Any) -> Scope:
        # Functions of Triton's own library see its core, kernels see the language.
        sees = frozenset(v.__name__ for v in fn.__globals__.values() if v is tl or v is tl.core)
        if sees not in in_force:
            in_force[sees] = patch(fn)
        return Scope()

    interpreter._patch_lang = once


def make_types_once(interpreter: Any) -> None:
    """Types of blocks, and what a tensor says of its shape, are made anew for every operation: half of the time.

    And no integer operation is done a second time in 64 bits to see whether it overflows: a GPU does not do so either.
    """
    import triton.language as tl

    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
    types: dict[Any, dict[str, Any]] = {}
    shapes: dict[int, tuple[Any, dict[str, Any]]] = {}
    plain_type, plain_tensor, plain_unwrap = tl.block_type.__init__, tl.tensor.__init__, tl.core._unwrap_if_constexpr
    plain = (int, bool, float, tl.tensor, tl.dtype, tl.block_type, type(None))

    def type_once(self: Any, element_ty: Any, shape: Any) -> None:
        pointer = (getattr(element_ty, "address_space", None), getattr(element_ty, "const", None))
        key = (element_ty.name, *pointer, *[getattr(size, "value", size) for size in shape])
        if key not in types:
            plain_type(self, element_ty, shape)
            types[key] = dict(vars(self))
        vars(self).update(types[key])

    def tensor_once(self: Any, handle: Any, type: Any) -> None:
        shape = type.shape if type.is_block() else None
        if id(shape) not in shapes:
            plain_tensor(self, handle, type)
            shapes[id(shape)] = (shape, {name: vars(self)[name] for name in ("shape", "numel")})
        vars(self).update(shapes[id(shape)][1], handle=handle, type=type, dtype=type.scalar)

    def unwrap(value: Any) -> Any:
        return value if type(value) in plain else plain_unwrap(value)

    tl.block_type.__init__, tl.tensor.__init__, tl.core._unwrap_if_constexpr = type_once, tensor_once, unwrap


def match_operands_once(interpreter: Any) -> None:
    """How an operation makes two operands alike depends on their types, and on the value where one is a number: half of the time.

    Remembered is what changes no tensor: a tensor that stays as it is, and what a number becomes.
    """
    import triton.language as tl

    semantic = type(interpreter.interpreter_semantic)
    plain = semantic.binary_op_type_checking_impl
    known: dict[Any, list[Any]] = {}

    def kind(operand: Any) -> Any:
        if isinstance(operand, tl.tensor):
            return operand.type.name
        # 1, 1.0 and True are equal, and so are the two zeros.
        return type(operand), operand.hex() if isinstance(operand, float) else operand

    def once(self: Any, *operands: Any, **flags: Any) -> Any:
        key = (*map(kind, operands), *flags.items())
        if key in known:
            return [new if new is not None else given for new, given in zip(known[key], operands, strict=False)]
        found = plain(self, *operands, **flags)
        pairs = list(zip(operands, found, strict=False))
        if all(new is given or not isinstance(given, tl.tensor) for given, new in pairs):
            known[key] = [None if new is given else new for given, new in pairs]
        return found

    semantic.binary_op_type_checking_impl = once


def take_short_cuts(interpreter: Any) -> None:
    """What changes no operation."""
    patch_once(interpreter)
    make_types_once(interpreter)
    match_operands_once(interpreter)


def round_in_one_step(interpreter: Any) -> None:
    """Round by numpy what :func:`tpfuse.ops.kernels.packing.half_bits` rounds in ten interpreted operations: half of the time.

    ``test_kernel_protocol.py`` holds the two against each other.
    """
    import triton.language as tl
    from tpfuse.ops.kernels import packing

    def half_bits(value: Any, DTYPE: Any) -> Any:
        values = value.handle.data
        if getattr(DTYPE, "value", DTYPE) == tl.bfloat16:
            bits = values.view(np.uint32)
            bits = np.where(np.isnan(values), np.uint32(0x7FFF0000), bits + np.uint32(0x7FFF) + ((bits >> 16) & 1))
            half = bits >> 16
        else:
            with np.errstate(over="ignore"):
                half = values.astype(np.float16).view(np.uint16)
        return tl.tensor(
            interpreter.TensorHandle(half.astype(np.int32), tl.int32), value.type.with_element_ty(tl.int32)
        )

    packing.half_bits = half_bits
    of_type = interpreter._get_np_dtype  # it makes a table of all types each time
    of_scalar = functools.lru_cache(of_type)
    interpreter._get_np_dtype = lambda t: (of_type if t.scalar.is_ptr() else of_scalar)(t.scalar)


def fp8_in_one_step(interpreter: Any) -> None:
    """Round by torch what :func:`tpfuse.ops.kernels.fp8.fp8_code` rounds in twenty interpreted operations.

    ``test_quant_kernel.py`` holds the two against each other.
    """
    import triton.language as tl
    from tpfuse.ops.kernels import fp8

    def fp8_code(value: Any, E5M2: Any, OVERFLOW: Any) -> Any:
        wide = torch.from_numpy(np.ascontiguousarray(value.handle.data))
        e5m2, overflow = (getattr(v, "value", v) for v in (E5M2, OVERFLOW))
        if overflow < 0x7C:
            top = 57344.0 if e5m2 else 448.0
            wide = wide.clamp(-top, top)
        code = wide.to(torch.float8_e5m2 if e5m2 else torch.float8_e4m3fn).view(torch.uint8).numpy()
        return tl.tensor(
            interpreter.TensorHandle(code.astype(np.int32), tl.int32), value.type.with_element_ty(tl.int32)
        )

    fp8.fp8_code = fp8_code


def rounded_both_ways(bits: Any, conn: Any) -> None:
    """Send what :func:`half_bits` of the kernels and the short cut above make of fp32 values, for bf16 and fp16."""
    import triton.language as tl
    from tpfuse.ops.kernels import packing
    from triton.runtime import interpreter

    values = bits.view(np.float32)
    given = tl.tensor(interpreter.TensorHandle(values, tl.float32), tl.block_type(tl.float32, list(values.shape)))
    found = []
    in_steps = packing.half_bits
    round_in_one_step(interpreter)
    for dtype in (tl.bfloat16, tl.float16):
        found.append([f(given, tl.constexpr(dtype)).handle.data for f in (in_steps, packing.half_bits)])
    conn.send(found)
    conn.close()


def _worker(
    rank: int,
    program: int | None,
    world: int,
    names: dict[str, list[str]],
    calls: list[Call],
    delay: float,
    dies_at: int,
    waits: dict[int, tuple[int, int]],
    reset_before: int,
    watchdog: int,
    impatient_from: int,
    together: Any,
    conn: Any,
) -> None:
    outcome = Outcome(rank)
    try:
        os.environ["TRITON_INTERPRET"] = "1"
        torch.set_num_threads(1)
        import triton.language as tl
        from tpfuse.ops.kernel import launch_plain
        from tpfuse.ops.kernels.gathered_blocks import gathered_blocks_kernel, gathered_blocks_layer_norm_kernel
        from tpfuse.ops.kernels.gathered_rows import gathered_rows_kernel, gathered_rows_layer_norm_kernel
        from tpfuse.ops.kernels.one_shot import (
            one_shot_kernel,
            one_shot_layer_norm_kernel,
            one_shot_layer_norm_of_two_kernel,
            one_shot_quant_kernel,
        )
        from tpfuse.ops.kernels.quant_constants import quantized
        from tpfuse.ops.kernels.received_rows import received_rows_kernel, received_rows_layer_norm_kernel
        from tpfuse.ops.kernels.received_two_shot import (
            received_two_shot_kernel,
            received_two_shot_layer_norm_kernel,
        )
        from tpfuse.ops.kernels.state import MAX_PROGRAMS, PARTIALS, RECORD
        from tpfuse.ops.kernels.two_shot import (
            two_shot_kernel,
            two_shot_layer_norm_kernel,
            two_shot_layer_norm_of_two_kernel,
            two_shot_quant_kernel,
        )
        from tpfuse.ops.kernels.variant import GROUP_LANES, Variant
        from tpfuse.ops.quant_reference import quantize, scales_like
        from tpfuse.ops.quantizer import NAMED as QUANTIZERS
        from triton.runtime import interpreter

        poll_politely(interpreter)
        take_short_cuts(interpreter)
        round_in_one_step(interpreter)
        fp8_in_one_step(interpreter)
        if program is not None:
            # This process is one program of the grid; its siblings are the others.
            builder = interpreter.interpreter_builder
            set_grid_dim = builder.set_grid_dim
            builder.set_grid_idx = lambda x, y, z: setattr(builder, "grid_idx", (program, 0, 0))
            grid: list[int] = []

            def only_mine(nx: int, ny: int, nz: int) -> None:
                set_grid_dim(grid[-1], 1, 1)

            builder.set_grid_dim = only_mine
        held = [_attach(n) for n in names["plane"]]
        keep_state, state = _attach(names["state"][rank])
        keep_outs, outs = _attach(names["out"][rank])
        done = [_attach(n) for n in names["done"]]
        host = state[-4:]
        peers = torch.tensor([t.data_ptr() for _, t in held] + [host.data_ptr()], dtype=torch.int64)
        plane = held[rank][1]
        phase_bytes = plane.numel() * 4 // 2
        rng = random.Random(rank * 1000 + (program or 0))
        together.wait(800)  # importing takes longer than a short watchdog allows
        for number, call in enumerate(calls):
            if number == dies_at:
                done[rank][1][program or 0] = len(calls)  # nobody has to wait for it
                os._exit(0)
            if number in waits:
                other, calls_made = waits[number]
                while int(done[other][1][0]) < calls_made:
                    time.sleep(0.005)
            if number == reset_before:
                together.wait(800)
                plane.zero_()
                state.zero_()
                together.wait(800)
            everything = inputs(call, world)
            given = of_rank(call, everything, rank, world)
            kept = given.xs[0].shape[0]
            if delay:
                time.sleep(rng.random() * delay)
            c = constants_of(call, given)
            quantizer = QUANTIZERS[call.quantizer] if call.quantizer else None
            if quantizer is not None:
                c = quantized(c, quantizer, call.keep_normed, False)
            row_lanes = c.groups * GROUP_LANES
            steps = call.steps or -(-row_lanes // call.lanes)
            split = -(-row_lanes // (steps * call.lanes))
            programs = min(call.rows * split, call.programs) if program is None else call.programs
            variant = Variant(world, call.lanes, steps, split, ptx=False, blocks=call.blocks, gathers=call.gathers)
            lengths = (call.blocks * call.rows if call.gathers else kept, kept)
            to_torch = {tl.bfloat16: torch.bfloat16, tl.float16: torch.float16, tl.float32: torch.float32}
            dtypes = [to_torch[d] for d in (c.out_dtype, c.residual_dtype)]
            sizes = [m * call.hidden * d.itemsize // 4 for m, d in zip(lengths, dtypes, strict=True)]
            # A new offset every other call keeps a sibling that is one call ahead out of what this one still reads.
            start = (number % 2) * (outs.numel() // 2)
            views = []
            for m, d, n in zip(lengths, dtypes, sizes, strict=True):
                views.append(outs[start : start + n].view(d).view(m, call.hidden))
                start += n
            extra = []
            if quantizer is not None:
                shape, strides, of_scales = scales_like((kept, call.hidden), quantizer)
                n = kept * call.hidden // 4
                extra = [outs[start : start + n].view(quantizer.torch_dtype).view(kept, call.hidden)]
                extra += [torch.as_strided(outs[start + n :].view(of_scales), shape, strides)]
                extra[1].zero_()
            if call.rows:
                x = (given if call.gathers and call.blocks < world else everything).xs[rank].contiguous()
                none = x
                residual = given.residual
                if call.in_place:
                    assert residual is not None and program is None
                    x, residual = views[0].copy_(x), views[1].copy_(residual)
                bias, addend = given.bias, given.addend
                if call.two_sums:
                    bias, addend = (bias, given.seconds[rank]) if call.layer_norm else (given.seconds[rank], addend)
                args = (
                    x,
                    residual if residual is not None else none,
                    given.weight if given.weight is not None else none,
                    bias if bias is not None else none,
                    views[0],
                    views[1],
                    *extra,
                    *((STATIC_SCALE, extra[1].stride(-1)) if extra else ()),
                    *([none if t is None else t for t in (given.shift, addend)] if call.layer_norm else ()),
                    *([none if given.addend_bias is None else given.addend_bias] if call.partial_addend else ()),
                    peers,
                    state,
                    rank,
                    call.rows,
                    *((kept, call.rows) if call.blocks > 1 else ()),
                    phase_bytes,
                    watchdog if impatient_from <= number else WATCHDOG_NS,
                    call.eps,
                    call.scale_value,
                )
                function = {
                    ("one_shot", "rms_norm"): one_shot_kernel,
                    ("two_shot", "rms_norm"): two_shot_kernel,
                    ("one_shot", "quant"): one_shot_quant_kernel,
                    ("two_shot", "quant"): two_shot_quant_kernel,
                    ("one_shot", "layer_norm"): one_shot_layer_norm_kernel,
                    ("two_shot", "layer_norm"): two_shot_layer_norm_kernel,
                    ("one_shot", "layer_norm_of_two"): one_shot_layer_norm_of_two_kernel,
                    ("two_shot", "layer_norm_of_two"): two_shot_layer_norm_of_two_kernel,
                    ("received one_shot", "rms_norm"): received_rows_kernel,
                    ("received two_shot", "rms_norm"): received_two_shot_kernel,
                    ("received one_shot", "layer_norm"): received_rows_layer_norm_kernel,
                    ("received two_shot", "layer_norm"): received_two_shot_layer_norm_kernel,
                    ("gathered rows", "rms_norm"): gathered_rows_kernel,
                    ("gathered blocks", "rms_norm"): gathered_blocks_kernel,
                    ("gathered rows", "layer_norm"): gathered_rows_layer_norm_kernel,
                    ("gathered blocks", "layer_norm"): gathered_blocks_layer_norm_kernel,
                }[call.way(world), c.kind]
                if program is not None:
                    grid.append(programs)
                    launch_plain(function, 1, args, (c, variant))
                    _wait_for_siblings(names, number, programs, program, rank)
                else:
                    launch_plain(function, programs, args, (c, variant))
                    done[rank][1][0] = number + 1
            outcome.record = tuple(host.tolist())
            outcome.records.append(outcome.record)
            normed, residual_out = views[0].clone(), views[1].clone()
            extra = [e.clone() for e in extra]
            with squares_in_kernel_order(call):
                want = expected_of_all(call, everything, rank, world, spelled_out=True)
            if quantizer is not None:
                asked = quantize(want[0], quantizer, STATIC_SCALE if quantizer.granularity == "tensor" else None)
                if not call.keep_normed:
                    normed = want[0]
                if not outcome.record[0]:
                    outcome.mistakes += [
                        f"call {number} {call}: {name} differ from the reference"
                        for name, got, exact in zip(("values", "scales"), extra, asked, strict=True)
                        if not same_bits(got, exact)
                    ]
                if call.keep_normed and outcome.record[0]:  # rows of a failed plane are NaN in fp8 as well
                    normed = torch.where(extra[0].float().isnan(), normed, torch.zeros_like(normed))
            outcome.digests.append(digest(normed, residual_out, *extra))
            outcome.rows.append(row_letters((normed, residual_out), want))
            outcome.normed_digests.append([digest(n) for n in normed])
            by_row = zip(normed) if call.gathers else zip(normed, residual_out, strict=True)
            outcome.row_digests.append([digest(*tensors) for tensors in by_row])
            if outcome.record[0]:
                continue  # a plane that has failed; the other lists are about calls that went well
            for name, got, exact in zip(("normed", "residual"), (normed, residual_out), want, strict=True):
                if not same_bits(got, exact):  # the sign of a zero as well
                    outcome.mistakes.append(
                        f"call {number} {call}: {name} differs from the reference in the kernels' order"
                    )
            want = expected_of_all(call, everything, rank, world)
            if call.layer_norm:
                # What is added behind the weight may cancel: no bound in units of the last place of each element.
                step = torch.finfo(call.dtype).eps * (4 if call.dtype == torch.float32 else 1) * (1 + abs(call.mean))
                if not torch.allclose(normed.float(), want[0].float(), rtol=step, atol=step * 4, equal_nan=True):
                    outcome.mistakes.append(f"call {number} {call}: not close to the reference")
                continue
            apart = (ulps_apart(normed, want[0]), ulps_apart(residual_out, want[1]))
            # In torch's order of squares the root may differ in its last places.
            allowed = (
                (4, 4 if call.post_norm else 0) if call.dtype == torch.float32 else (1, 1 if call.post_norm else 0)
            )
            if apart[0] > allowed[0] or apart[1] > allowed[1]:
                outcome.mistakes.append(f"call {number} {call}: {apart} ulps from the reference, allowed {allowed}")
        partials = state[PARTIALS : PARTIALS + 2 * MAX_PROGRAMS * 16]  # and the largest values behind them
        outcome.leftover = int((plane != 0).sum()) + int((partials != 0).sum()) + int(state[RECORD] != 0)
        del keep_state, keep_outs, done
    except Exception:
        outcome.error = traceback.format_exc()
    conn.send(outcome)
    conn.close()


def _wait_for_siblings(names: dict[str, list[str]], number: int, programs: int, program: int, rank: int) -> None:
    """The kernel boundary between the programs of one rank: all have ended before any starts the next call."""
    memory, done = _attach(names["done"][rank])
    done[program] = number + 1
    while int(done[:programs].min()) < number + 1:
        time.sleep(0.0005)
    del done
    memory.close()


def run(
    world: int,
    calls: list[Call],
    *,
    delay: float = 0.0,
    split: bool = False,
    dies: tuple[int, ...] = (-1, -1),
    waits: dict[tuple[int, int], tuple[int, int]] | None = None,
    reset_before: int = -1,
    watchdog: int = WATCHDOG_NS,
    timeout: float = 800.0,
) -> list[Outcome]:
    """Make ``calls`` on ``world`` interpreted ranks and return what each saw.

    Args:
        delay: each rank sleeps up to this many seconds before each call.
        split: one process for every (rank, program); every call must have the same ``programs`` and fill the grid.
        dies: (rank, call): that rank exits before that call; (rank, call, program): one program of it, with ``split``.
        waits: (rank, call) -> (other, n): before that call the rank waits until the other rank has made n calls.
        reset_before: before this call all ranks meet and zero their planes, as ``tpfuse.ops.reset`` does.
        watchdog: nanoseconds; the portable poll counts a microsecond a poll. Before the first call that ``dies`` or ``waits``
            names, nothing gives up, however busy the machine is.
    """
    context = warm.context(interpret=True)
    biggest = max(c.rows * c.hidden * 4 * (world if c.gathers else 1) for c in calls)
    row = max(c.hidden * 4 for c in calls)
    sums = 1 + any(c.two_sums or c.wide_sum for c in calls)
    plane_bytes = 2 * sums * (world * max(biggest, 4) + 2 * world * row)
    from tpfuse.ops.kernels.state import STATE_WORDS

    sizes = {"plane": plane_bytes, "state": STATE_WORDS * 4 + 64, "out": 2 * 4 * max(biggest, 4) + 8192, "done": 4096}
    memories = {
        kind: [shared_memory.SharedMemory(create=True, size=size) for _ in range(world)] for kind, size in sizes.items()
    }
    try:
        for group in memories.values():
            for memory in group:
                memory.buf[:] = bytes(memory.size)
        names = {kind: [m.name for m in group] for kind, group in memories.items()}
        workers = []
        together = context.Barrier(world * (calls[0].programs if split else 1))
        programs = range(calls[0].programs) if split else [None]
        for rank in range(world):
            for program in programs:
                receive, send = context.Pipe(duplex=False)
                dies_at = dies[1] if rank == dies[0] and (len(dies) == 2 or program == dies[2]) else -1
                rank_waits = {call: until for (who, call), until in (waits or {}).items() if who == rank}
                process = context.Process(
                    target=_worker,
                    args=(
                        rank,
                        program,
                        world,
                        names,
                        calls,
                        delay,
                        dies_at,
                        rank_waits,
                        reset_before,
                        watchdog,
                        min(
                            [until for until in (dies[1], *(call for _, call in waits or {})) if until >= 0], default=0
                        ),
                        together,
                        send,
                    ),
                    daemon=True,
                )
                process.start()
                send.close()
                workers.append((process, receive))
        outcomes = []
        deadline = time.monotonic() + timeout
        for process, receive in workers:
            try:
                if receive.poll(max(0.1, deadline - time.monotonic())):
                    outcomes.append(receive.recv())
                else:
                    outcomes.append(Outcome(-1, error=f"no answer within {timeout} s"))
            except EOFError:
                pass  # the rank that was told to die
            finally:
                process.join(1)
                if process.is_alive():
                    process.kill()
        return outcomes
    finally:
        for group in memories.values():
            for memory in group:
                memory.close()
                memory.unlink()
