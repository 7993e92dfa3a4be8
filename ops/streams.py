"""Calls of one plane on several streams: what orders them.

A plane's phases alternate from call to call, so its kernels must run one after another. On one stream they do. When the
stream changes between eager calls, the new one waits for the old one. Kernels on two streams of one CUDA graph could be
ordered too, but whoever captures them there wants them to overlap: that is an error, and a stream class the remedy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch

_ACTIVE = 1  # CU_STREAM_CAPTURE_STATUS_ACTIVE


@dataclass
class Use:
    """Where the calls of a plane went. Streams are the driver's handles, captures its numbers.

    Attributes:
        last: the stream that needs nothing done: that of the last call when it was eager, else None. The only field that a
            call looks at while its stream stays the same.
        eager: the stream of the last eager call.
        capture, captured: the last capture that a call was seen in, and its stream there.
    """

    last: int | None = None
    eager: int | None = None
    capture: int = 0
    captured: int | None = None


class Unordered(RuntimeError):
    """A plane is used on two streams that nothing orders."""


def turn(use: Use, stream: int, capture_of: Callable[[int], int]) -> int | None:
    """Take note of a call on another stream than ``use.last``; the stream to wait for, or None. Pure but for ``use``.

    A captured call runs when its graph is replayed, on a stream that nobody knows yet: whoever replays orders it with the
    calls around it, as with any other kernel. So it neither waits for eager calls nor do they wait for it.

    Args:
        stream: of this call.
        capture_of: stream -> the number of the capture that it is in, 0 outside of one.
    Raises:
        Unordered: the kernels of this call and of an earlier one could overlap, and no wait can be inserted.
    """
    capture, before = capture_of(stream), use.eager
    if capture:
        if use.capture == capture and use.captured != stream:
            raise Unordered("captured on two streams of one CUDA graph")
        # A capture that began on the stream of the last eager call may hold calls that went by unseen, there being no change.
        unseen = before is not None and before != stream and use.capture != capture and capture_of(before) == capture
        use.last, use.capture, use.captured = None, capture, stream
        return before if unseen else None
    if before is not None and before != stream and capture_of(before):
        raise Unordered("made on one stream while the stream of the call before is being captured")
    use.last = use.eager = stream
    return None if before == stream else before


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def capture_of(stream: int) -> int:
    """The number of the CUDA-graph capture that a stream is in; 0 outside of one.

    Why the driver: torch tells whether the current stream is being captured, but not in which capture.
    """
    if stream == 0:  # the default stream cannot be captured
        return 0
    status, number = ctypes.c_int(), ctypes.c_uint64()
    error = _driver().cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(number), None, None, None
    )
    if error:
        raise RuntimeError(f"tpfuse: cuStreamGetCaptureInfo_v2 failed with error {error}")
    return number.value + 1 if status.value == _ACTIVE else 0


def wait_for(stream: int, before: int, device: torch.device) -> None:
    """Make everything that comes on ``stream`` wait for what is on ``before`` now."""

    def named(handle: int) -> torch.cuda.Stream:
        return torch.cuda.ExternalStream(handle, device) if handle else torch.cuda.default_stream(device)

    named(stream).wait_event(named(before).record_event())
