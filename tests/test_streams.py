"""Calls of one plane on several streams: who waits for whom, and what is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from tpfuse.ops import cuda, paths, plane, prepare, schedule, settings, streams
from tpfuse.ops.flavour import LLAMA

MAIN, SIDE, OTHER = 0, 11, 12


class Made:
    """Calls of one plane: which waits each of them put before it, and which went by without a look."""

    def __init__(self) -> None:
        self.use = streams.Use()
        self.captures: dict[int, int] = {}  # streams that are being captured -> the number of the capture

    def call(self, stream: int) -> int | None:
        if stream == self.use.last:  # the only question that the hot path asks
            return None
        return streams.turn(self.use, stream, lambda s: self.captures.get(s, 0))


def test_calls_on_one_stream_ask_for_nothing() -> None:
    made = Made()
    assert made.call(MAIN) is None
    assert made.use.last == MAIN
    assert [made.call(MAIN) for _ in range(3)] == [None] * 3


def test_eager_calls_on_another_stream_wait_for_the_one_before() -> None:
    made = Made()
    assert [made.call(s) for s in (MAIN, SIDE, SIDE, MAIN, OTHER, MAIN)] == [None, MAIN, None, SIDE, MAIN, OTHER]


def test_a_capture_after_a_warm_up_on_another_stream_is_allowed_and_waits_for_nothing() -> None:
    made = Made()
    made.call(MAIN)
    made.captures = {SIDE: 1}
    assert [made.call(SIDE), made.call(SIDE)] == [None, None]  # a wait for MAIN, outside of the capture, would break it


def test_an_eager_call_after_a_capture_waits_for_the_eager_one_before_it() -> None:
    made = Made()
    made.call(MAIN)
    made.captures = {SIDE: 1}
    made.call(SIDE)
    made.captures = {}
    # The stream of the capture is used eagerly now: it is no stranger, but the last eager call was on another one.
    assert made.call(SIDE) == MAIN
    made.captures = {OTHER: 2}
    made.call(OTHER)
    made.captures = {}
    assert made.call(MAIN) == SIDE


def test_warm_up_and_captures_on_one_side_stream_as_inductors_trees_make_them() -> None:
    made = Made()
    made.call(MAIN)
    assert made.call(SIDE) == MAIN  # warm-up
    for number in (1, 2, 3):
        made.captures = {SIDE: number}
        assert made.call(SIDE) is None
        made.captures = {}
        assert made.call(SIDE) is None  # the warm-up of the next graph
    assert made.call(MAIN) == SIDE


def test_two_streams_inside_one_capture_are_refused() -> None:
    made = Made()
    made.call(MAIN)
    made.captures = {SIDE: 5, OTHER: 5}
    made.call(SIDE)
    with pytest.raises(streams.Unordered, match="two streams of one CUDA graph"):
        made.call(OTHER)


def test_captures_one_after_the_other_may_be_on_different_streams() -> None:
    made = Made()
    made.captures = {SIDE: 5}
    made.call(SIDE)
    made.captures = {SIDE: 6, OTHER: 6}  # a fork in which only OTHER makes calls
    assert made.call(OTHER) is None
    made.captures = {SIDE: 7}
    assert made.call(SIDE) is None


def test_captured_calls_that_went_by_unseen_are_waited_for() -> None:
    made = Made()
    made.call(SIDE)
    made.captures = {SIDE: 5, OTHER: 5}
    made.call(SIDE)  # the stream has not changed: nobody looked whether it is being captured
    assert made.call(OTHER) == SIDE
    with pytest.raises(streams.Unordered):
        made.call(SIDE)


def test_an_eager_call_while_the_stream_before_is_captured_is_refused() -> None:
    made = Made()
    made.call(SIDE)
    made.captures = {SIDE: 5}
    with pytest.raises(streams.Unordered, match="is being captured"):
        made.call(OTHER)


def _plane() -> plane.Plane:
    none = (torch.zeros(1, dtype=torch.int32),) * 4
    cpu = torch.device("cpu")
    return plane.Plane("tp", 0, 2, cpu, "", "sm_90", 1, 1 << 20, *none, seen=[0], handle=None, ranks=(4, 5))  # type: ignore[arg-type]


def test_the_refusal_names_the_group_and_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    own = _plane()
    monkeypatch.setattr(streams, "capture_of", lambda stream: 5)
    own.on_another_stream(SIDE)
    with pytest.raises(RuntimeError, match=r"group 'tp' \(ranks \[4, 5\]\).*stream_class.*TPFUSE_CONCURRENT_PLANES"):
        own.on_another_stream(OTHER)


def _without_a_gpu(monkeypatch: pytest.MonkeyPatch, launch: Callable[..., None]) -> None:
    """The CUDA implementation with everything that needs a GPU replaced; ``launch`` stands for a launch."""
    pytest.importorskip("triton")
    own = _plane()
    path = paths.GroupPath("fused", "", settings.Settings(), own)
    monkeypatch.setattr(paths, "path_of", lambda name, device: path)
    monkeypatch.setattr(prepare.compat, "resolve_group", lambda name: _plane)
    monkeypatch.setattr(paths, "is_current", lambda name, held: True)
    monkeypatch.setattr(cuda, "PREPARED", {})
    monkeypatch.setattr(prepare, "PREPARED", cuda.PREPARED)
    monkeypatch.setattr(prepare, "_load_kernels", lambda *_: None)
    monkeypatch.setattr(cuda, "schedule_of", lambda *_: schedule.Schedule(None, (SimpleNamespace(),)))  # type: ignore[arg-type]
    monkeypatch.setattr(cuda, "start", launch)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: MAIN, raising=False)
    monkeypatch.setattr(streams, "capture_of", lambda stream: 0)


def test_the_op_orders_its_calls_on_two_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[tuple[int, int]] = []
    launched: list[int] = []
    now = [MAIN]
    _without_a_gpu(monkeypatch, lambda launch, stream, *_: launched.append(stream))
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: now[0], raising=False)
    monkeypatch.setattr(streams, "wait_for", lambda stream, before, device: waits.append((before, stream)))
    x, weight = torch.ones(2, 64), torch.ones(64)
    for stream in (MAIN, MAIN, SIDE, SIDE, MAIN):
        now[0] = stream
        cuda.run(x, None, weight, None, 1e-6, 1.0, str(LLAMA), False, "tp")
    assert launched == [MAIN, MAIN, SIDE, SIDE, MAIN]
    assert waits == [(MAIN, SIDE), (SIDE, MAIN)]


def test_a_call_on_a_device_that_is_not_current_makes_it_current(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[int | None] = [1]
    launched_on: list[int | None] = []

    @contextlib.contextmanager
    def device(index: int | None) -> Iterator[None]:
        before, current[0] = current[0], index
        yield
        current[0] = before

    _without_a_gpu(monkeypatch, lambda *_: launched_on.append(current[0]))
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[0], raising=False)
    monkeypatch.setattr(torch.cuda, "device", device)
    x, weight = torch.ones(2, 64), torch.ones(64)  # on the device without a number, for that is what a CPU has
    for _ in range(2):
        cuda.run(x, None, weight, None, 1e-6, 1.0, str(LLAMA), False, "tp")
    assert launched_on == [None, None] and current == [1]
