"""What a kernel is compiled for, as two compile-time objects: the call (dtypes, H, flavour) and how it is carried out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from .. import reference
from ..flavour import Flavour
from .quant_facts import Quant
from .state import GROUP_LANES, MAX_GROUPS

try:
    import triton.language as tl
except ImportError:  # a torch for CPUs, or for macOS: the op's exact path needs no kernel
    _TL = {}
else:
    _TL = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
FP32_MARK = -(2**31)  # the bits of -0.0
_TORCH = {ours: theirs for theirs, ours in _TL.items()}


def torch_dtype(dtype: tl.dtype) -> torch.dtype:
    """The torch dtype of a Triton dtype of :class:`Constants`."""
    return _TORCH[dtype]


@dataclass(frozen=True)
class Constants:
    """Compile-time facts of one kernel. ``dtype`` is that of the rounded sum, and of ``x`` without ``wide_sum``.

    See :class:`tpfuse.ops.Flavour` for the rest."""

    hidden: int
    dtype: tl.dtype
    weight_dtype: tl.dtype
    gain_dtype: tl.dtype
    product_dtype: tl.dtype
    out_dtype: tl.dtype
    residual_dtype: tl.dtype
    bias: str  # "none", "row" ((H,)), "full" ((rows, H)) or "partial": rows that are this rank's part of a second sum
    scaled: bool
    has_residual: bool
    has_weight: bool
    one_plus: bool
    post_norm: bool
    root: str
    round_normed: bool
    unrounded: bool  # the residual is added in fp32, and the norm reads that before it is rounded
    item_bytes: int
    values: int  # values a lane: 16 bytes of the rounded sum
    row_bytes: int
    zero_mark: int  # what a zero word becomes on push: a zero with a sign
    quant: Quant | None = None  # the normed rows are quantized
    centered: bool = False  # the mean is subtracted: LayerNorm
    shift_dtype: tl.dtype | None = None  # of the bias behind its weight, where there is one
    has_addend: bool = False  # another tensor of rows is added behind the bias
    partial_addend: bool = False  # which is this rank's part of a second sum
    addend_bias: bool = False  # to which a vector is added
    residual_first: bool = False  # the second sum is added to the sum of the residual and the first
    scale_loaded: bool = False  # the scale is a pointer to one value of the dtype of x, not a number
    scale_by_row: bool = False  # to one value for each row
    scale_first: bool = False  # it is multiplied in before the bias is added
    wide_residual: bool = False  # the residual is fp32 beside a 16-bit sum, and stays so; ``unrounded`` then
    wide_sum: bool = False  # x is fp32 beside all else in ``dtype``, to which its sum is rounded

    @property
    def groups(self) -> int:
        """Groups of ``128 * values`` elements in a row."""
        return -(-self.hidden // (GROUP_LANES * self.values))

    @property
    def normed_item_bytes(self) -> int:
        """Of a value of the normed output."""
        return torch_dtype(self.out_dtype).itemsize

    @property
    def normed_row_bytes(self) -> int:
        return self.hidden * self.normed_item_bytes

    @property
    def residual_in(self) -> tl.dtype:
        """The dtype in which the residual is read."""
        return _TL[torch.float32] if self.wide_residual else self.dtype

    @property
    def quantized(self) -> bool:
        """Whether the kernel quantizes the normed rows."""
        return self.quant is not None

    @property
    def keeps_normed(self) -> bool:
        """Whether the normed rows themselves are stored."""
        return self.quant is None or self.quant.keep_normed

    @property
    def scale_a_row(self) -> bool:
        """Whether a row is quantized with one scale of its own, which programs that share it have to agree on."""
        return self.quant is not None and self.quant.granularity == "token"

    @property
    def second(self) -> bool:
        """Whether the kernel reduces two partial sums of each row."""
        return self.bias == "partial" or self.partial_addend

    @property
    def sums(self) -> int:
        """Rows of words of ``row_bytes`` that travel of each row: those of each partial sum, or of each half of the words of a
        wide one: a lane's first four fp32 values, and its other four."""
        return 2 if self.second or self.wide_sum else 1

    @property
    def sums_known(self) -> Constants:
        """The same where all sums are rounded rows in memory, and what is added to the second has been added."""
        bias = "full" if self.bias == "partial" else self.bias
        return replace(self, bias=bias, partial_addend=False, addend_bias=False, wide_sum=False)

    @property
    def x_in(self) -> tl.dtype:
        """The dtype of ``x``."""
        return _TL[torch.float32] if self.wide_sum else self.dtype

    @property
    def pushed_mark(self) -> int:
        """What a zero word of ``x`` becomes on push; ``zero_mark`` is for one of the sum."""
        return FP32_MARK if self.wide_sum else self.zero_mark

    @property
    def kind(self) -> str:
        """Which of the kernels of an algorithm: they differ in their arguments."""
        if self.partial_addend:
            return "layer_norm_of_two"
        return "quant" if self.quantized else "layer_norm" if self.centered else "rms_norm"

    @property
    def has_shift(self) -> bool:
        """Whether a vector is added behind the weight."""
        return self.shift_dtype is not None

    @property
    def shifted_dtype(self) -> tl.dtype:
        """The dtype of weight times norm plus shift, before the cast behind them."""
        return self.product_dtype if self.shift_dtype in (None, self.product_dtype) else _TL[torch.float32]

    @property
    def plain_gain(self) -> bool:
        """The weight times the rounded norm, all of it in the dtype of ``x``: Llama's order."""
        dtypes = {self.weight_dtype, self.gain_dtype, self.product_dtype, self.out_dtype}
        return self.has_weight and self.round_normed and not self.one_plus and dtypes == {self.dtype}


@dataclass(frozen=True)
class Variant:
    """Compile-time facts about how a kernel does its work; none of them changes a result.

    A program has one thread a lane and goes over its part of a row in steps of ``lanes`` lanes; ``split`` programs hold a row.
    """

    world: int
    lanes: int  # 128 times a power of two
    steps: int
    split: int
    wait: bool = True  # False: never spins, the floor that benchmarks compare with
    ptx: bool = True  # False: the portable bodies
    pdl: str = "off"  # programmatic dependent launch: "off", "end" or "early"
    stamps: bool = False  # True: leaves the times of its stages behind the state, for benchmarks/stages.py
    blocks: int = 1  # of rows, each for as many ranks of the group; see received_rows.py
    gathers: bool = False  # the normed rows are pushed to the other ranks; see gather.py

    @property
    def groups_a_step(self) -> int:
        return self.lanes // GROUP_LANES

    @property
    def groups(self) -> int:
        """Groups of a row that one program holds, those beyond the row's end included."""
        return self.steps * self.groups_a_step

    @property
    def affine_ahead(self) -> bool:
        """Whether weight and shift of a LayerNorm are loaded before the poll: of the widest rows they take too many registers."""
        return self.steps <= 2 and self.split * self.groups <= MAX_GROUPS // 2

    @property
    def addends_ahead(self) -> bool:
        """The same for the bias and the addend in front of a LayerNorm."""
        return self.steps == 1 and self.world <= 4

    @property
    def of_a_block(self) -> Variant:
        """The same for the ranks of one block alone."""
        return replace(self, world=self.world // self.blocks, blocks=1)

    @property
    def blocks_at_once(self) -> int:
        """Blocks whose words of a row a thread holds at once: no more than its registers can take, and a divisor of all."""
        return next(n for n in range(self.blocks, 0, -1) if self.blocks % n == 0 and (n == 1 or n * self.steps <= 4))


def supports(
    dtype: torch.dtype, weight_dtype: torch.dtype | None, hidden: int, flavour: Flavour, aligned: bool = True
) -> str | None:
    """None if the kernels can compute this call exactly, else why not. Pure: equal on every rank."""
    if not _TL:
        return "Triton is not installed"
    if dtype not in _TL:
        return f"no kernel for {dtype}"
    if hidden % 8 or hidden == 0:
        return f"H = {hidden} is not a multiple of 8"
    widest = MAX_GROUPS * GROUP_LANES * (16 // dtype.itemsize)
    if hidden > widest:
        return f"H = {hidden} is above {widest} for {dtype}"
    if weight_dtype is not None and weight_dtype not in (dtype, torch.float32):
        return f"a {weight_dtype} weight with {dtype} activations"
    if flavour.compute == "input" and dtype != torch.float32:
        return "the flavour computes in the input dtype, which rounds inside the mean"
    return None


def constants(
    dtype: torch.dtype,
    weight_dtype: torch.dtype | None,
    hidden: int,
    flavour: Flavour,
    *,
    bias: str,
    scaled: bool,
    has_residual: bool,
    post_norm: bool,
    scale_loaded: bool = False,
    scale_by_row: bool = False,
    scale_first: bool = False,
    wide_residual: bool = False,
    residual_first: bool = False,
    wide_sum: bool = False,
) -> Constants:
    """Constants of a supported call (:func:`supports` returned None)."""
    normed = torch.float32 if flavour.normed == "float32" else dtype
    own = weight_dtype or dtype
    gain = {"own": own, "float32": torch.float32, "input": dtype}[flavour.gain_dtype]
    product = torch.promote_types(normed, gain) if weight_dtype is not None else normed
    out = {"input": dtype, "float32": torch.float32, "promoted": product}[flavour.out]
    residual = reference.residual_dtype(dtype, out, post_norm, torch.float32 if wide_residual else None)
    return Constants(
        hidden=hidden,
        dtype=_TL[dtype],
        weight_dtype=_TL[own],
        gain_dtype=_TL[gain],
        product_dtype=_TL[product],
        out_dtype=_TL[out],
        residual_dtype=_TL[residual],
        bias=bias,
        scaled=scaled,
        has_residual=has_residual,
        has_weight=weight_dtype is not None,
        one_plus=flavour.gain == "one_plus_weight",
        post_norm=post_norm,
        root=flavour.root,
        round_normed=normed != torch.float32,
        unrounded=flavour.reads == "unrounded" and has_residual and not post_norm and dtype != torch.float32,
        item_bytes=dtype.itemsize,
        values=16 // dtype.itemsize,
        row_bytes=hidden * dtype.itemsize,
        zero_mark=FP32_MARK if dtype == torch.float32 else 0x8000,
        scale_loaded=scale_loaded,
        scale_by_row=scale_by_row,
        scale_first=scale_first and bias != "none",
        wide_residual=wide_residual,
        residual_first=residual_first,
        wide_sum=wide_sum,
    )


def centered(
    c: Constants,
    shift_dtype: torch.dtype | None,
    out_dtype: torch.dtype,
    addend: bool = False,
    partial: bool = False,
    addend_bias: bool = False,
) -> Constants:
    """The constants of a LayerNorm from those of the RMSNorm that casts and rounds alike.

    Args:
        shift_dtype: of the vector that is added behind the weight, None without one: the dtype of ``x``, or fp32.
        out_dtype: of the normed output.
        addend: whether another tensor of rows is added behind the bias.
        partial: whether that is this rank's part of a second sum.
        addend_bias: whether a vector is added to the second sum.
    """
    shift = None if shift_dtype is None else _TL[shift_dtype]
    return replace(
        c,
        centered=True,
        shift_dtype=shift,
        out_dtype=_TL[out_dtype],
        has_addend=addend,
        partial_addend=partial,
        addend_bias=addend_bias,
    )
