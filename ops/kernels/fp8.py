"""From fp32 values to fp8 bytes: rounding to nearest even, and what becomes of values that are too large."""

# Triton's language, not Python: tuples grow while they are traced, and have no unpacking.
# mypy: ignore-errors
# ruff: noqa: RUF005
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fp8_code(value, E5M2: tl.constexpr, OVERFLOW: tl.constexpr):
    """The fp8 byte of an fp32 value, as the low byte of an int32 whose other bytes are zero.

    Written out: GPUs before sm_89 have no such conversion, and the interpreter's rounds toward zero. Small values are rounded by
    adding a number whose last place is the smallest fp8 value.

    Args:
        OVERFLOW: the code, without sign, of what rounds to more than the largest value.
    """
    bits = value.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    absolute = magnitude.to(tl.float32, bitcast=True)
    if E5M2:
        normal = ((magnitude + 0xFFFFF + ((magnitude >> 21) & 1)) >> 21) - (112 << 2)
        small = (absolute + 128.0).to(tl.int32, bitcast=True) - 0x43000000
        code = tl.where(magnitude < 0x38800000, small, normal)
        code = tl.where(code > 0x7B, OVERFLOW, code)
    else:
        normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - (120 << 3)
        small = (absolute + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        code = tl.where(magnitude < 0x3C800000, small, normal)
        code = tl.where(code > 0x7E, OVERFLOW, code)
    code = tl.where(magnitude > 0x7F800000, 0x7F, code)  # NaN
    return code | ((bits >> 24) & 0x80)


@triton.constexpr_function
def cvt_asm(e5m2):
    kind = "e5m2x2" if e5m2 else "e4m3x2"
    return f"""
            {{
            .reg .b16 %a, %b;
            cvt.rn.satfinite.{kind}.f32 %a, $2, $1;
            cvt.rn.satfinite.{kind}.f32 %b, $4, $3;
            mov.b32 $0, {{%a, %b}};
            }}
            """


@triton.jit
def pack_fp8(values, Q: tl.constexpr):
    """Words of four fp8 bytes each, in memory order, of four or eight fp32 values."""
    words = ()
    for i in tl.static_range(len(values) // 4):
        if Q.cvt:
            word = tl.inline_asm_elementwise(
                cvt_asm(Q.e5m2),
                "=r,f,f,f,f",
                [values[4 * i], values[4 * i + 1], values[4 * i + 2], values[4 * i + 3]],
                dtype=tl.int32,
                is_pure=True,
                pack=1,
            )
        else:
            word = fp8_code(values[4 * i], Q.e5m2, Q.overflow)
            for j in tl.static_range(1, 4):
                word = word | (fp8_code(values[4 * i + j], Q.e5m2, Q.overflow) << (8 * j))
        words = words + (word,)
    return words


@triton.jit
def store_fp8(address, words, active, PTX: tl.constexpr):
    """Store one or two words a lane to int64 addresses where ``active`` is not 0."""
    if PTX and len(words) == 2:
        tl.inline_asm_elementwise(
            """
            {
            .reg .pred %p;
            setp.ne.u32 %p, $4, 0;
            @%p st.global.v2.u32 [$1], {$2, $3};
            mov.u32 $0, 0;
            }
            """,
            "=r,l,r,r,r",
            [address, words[0], words[1], active],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        pointer = address.to(tl.pointer_type(tl.int32))
        for i in tl.static_range(len(words)):
            tl.store(pointer + i, words[i], mask=active != 0)
