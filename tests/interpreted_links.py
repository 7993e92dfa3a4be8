"""The kernels of ``tpfuse.measure.link_kernels`` in Triton's interpreter, in processes of their own.

Nothing of tpfuse is imported at the top: the interpreter must be chosen before Triton is imported.
"""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from multiprocessing import shared_memory
from typing import Any

import torch
import warm
from interpreted_ranks import poll_politely, take_short_cuts

ROUNDS = 20


def _rank(rank: int, names: list[str], limit: int, together: Any, conn: Any) -> None:
    try:
        os.environ["TRITON_INTERPRET"] = "1"
        torch.set_num_threads(1)
        from triton.runtime import interpreter

        from tpfuse.measure.link_kernels import ping_pong_kernel

        take_short_cuts(interpreter)
        poll_politely(interpreter)
        held = [shared_memory.SharedMemory(name=name) for name in names]
        slots = [torch.frombuffer(memory.buf, dtype=torch.int32)[: ROUNDS * 4] for memory in held]
        peers = torch.tensor([t.data_ptr() for t in slots], dtype=torch.int64)
        record = torch.zeros(4, dtype=torch.int32)
        together.wait(800)
        ping_pong_kernel[(1,)](peers, record, rank, 1 - rank, ROUNDS, limit, False)
        conn.send((record.tolist(), slots[rank].view(ROUNDS, 4).tolist()))
        del slots
    except Exception:
        conn.send(traceback.format_exc())
    conn.close()


def _answers(target: Any, arguments: list[tuple[Any, ...]]) -> list[Any]:
    """Run ``target(*arguments, conn)`` in a process for each of the arguments; what each sent."""
    context = warm.context(interpret=True)
    workers = []
    for given in arguments:
        receive, send = context.Pipe(duplex=False)
        process = context.Process(target=target, args=(*given, send), daemon=True)
        process.start()
        send.close()
        workers.append((process, receive))
    deadline = time.monotonic() + 800
    answers = []
    for _, receive in workers:
        answers.append(receive.recv() if receive.poll(max(0.1, deadline - time.monotonic())) else "no answer")
    for process, _ in workers:
        process.join(2)
        if process.is_alive():
            process.kill()
    return answers


def play(ranks: tuple[int, ...], limit: int) -> list[Any]:
    """Ping-pong of these of two ranks: each one's record and slots, or the text of what it raised."""
    context = warm.context(interpret=True)
    memories = [shared_memory.SharedMemory(create=True, size=ROUNDS * 16) for _ in range(2)]
    try:
        for memory in memories:
            memory.buf[:] = bytes(memory.size)
        together = context.Barrier(len(ranks))
        names = [m.name for m in memories]
        return _answers(_rank, [(rank, names, limit, together) for rank in ranks])
    finally:
        for memory in memories:
            memory.close()
            memory.unlink()


def _bulk(conn: Any) -> None:
    try:
        os.environ["TRITON_INTERPRET"] = "1"
        from triton.runtime import interpreter

        from tpfuse.measure import links
        from tpfuse.measure.link_kernels import CHUNK_BYTES, bulk_push_kernel

        take_short_cuts(interpreter)
        world, chunks, before = 3, 5, 4096
        size = chunks * CHUNK_BYTES
        cpu = torch.device("cpu")
        memories = [torch.zeros((before + world * size) // 4, dtype=torch.int32) for _ in range(world)]
        peers = torch.tensor([t.data_ptr() for t in memories], dtype=torch.int64)
        for rank in range(world):
            source = links.pattern(rank, size, cpu)
            bulk_push_kernel[(2,)](source, peers, rank, chunks, before + rank * size, world, False)
        arrived = []
        for rank in range(world):
            regions = memories[rank][before // 4 :].view(world, -1)
            arrived += [links.arrived(regions[s], s, rank, world) for s in range(world) if s != rank]
        untouched = all(not bool(t[: before // 4].any()) for t in memories)
        words = sum(int((t != 0).sum()) for t in memories)
        conn.send((arrived, untouched, words, world * size // 4))
    except Exception:
        conn.send(traceback.format_exc())
    conn.close()


def bulk_push() -> Any:
    """Three ranks push one after another in one process: what arrived, whether memory before it is untouched, words
    written, words pushed; or the text of what was raised."""
    return _answers(_bulk, [()])[0]


class _Clock:
    """Stands for a CUDA event: the interpreter has run a kernel when its launch returns."""

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0.0

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, other: _Clock) -> float:
        return (other.at - self.at) * 1e3


def _measure(rank: int, world: int, names: list[str], folder: str, spoiled: bool, conn: Any) -> None:
    try:
        os.environ["TRITON_INTERPRET"] = "1"
        torch.set_num_threads(1)
        from types import SimpleNamespace

        import torch.distributed as dist
        from triton.runtime import interpreter

        from tpfuse.measure import bench, links

        take_short_cuts(interpreter)
        dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", world), rank=rank, world_size=world)
        held = [shared_memory.SharedMemory(name=name) for name in names]
        tensors = [torch.frombuffer(memory.buf, dtype=torch.int32) for memory in held]
        cpu = torch.device("cpu")

        def get_buffer(r: int, sizes: tuple[int, ...], dtype: torch.dtype, offset: int) -> torch.Tensor:
            return tensors[r][offset : offset + sizes[0]]

        def allocate(rank: int, world: int, rounds: int, size: int, device: torch.device) -> Any:
            peers = torch.tensor([t.data_ptr() for t in tensors], dtype=torch.int64)
            if spoiled:
                peers[(rank + 1) % world] += 16
            return links._Memory(tensors[rank], SimpleNamespace(get_buffer=get_buffer), peers, rounds * 16, size)

        links._device, links._allocate = lambda: cpu, allocate
        torch.cuda.Event, torch.cuda.synchronize = _Clock, lambda: None  # type: ignore[misc,assignment]
        torch.cuda.device_count = lambda: world
        torch.cuda.get_device_properties = lambda device: SimpleNamespace(  # type: ignore[assignment]
            multi_processor_count=1, name="GPU", major=9, minor=0
        )
        bench.time_call = lambda call: [float(call()[0].numel() > 0)] * 5  # type: ignore[assignment]
        found = links.measure_links(rank, world, rounds=ROUNDS, size=2 * 8192, repeats=2, limit=10**12)
        conn.send(found)
        dist.destroy_process_group()
    except Exception:
        conn.send(traceback.format_exc())
    conn.close()


def measure(world: int, spoiled: bool = False) -> list[Any]:
    """``links.measure_links`` over shared memory and gloo: each rank's answer, or the text of what it raised.

    Args:
        spoiled: addresses of the next rank are wrong by 16 bytes.
    """
    size = ROUNDS * 16 + world * 2 * 8192
    memories = [shared_memory.SharedMemory(create=True, size=size + 4096) for _ in range(world)]
    try:
        for memory in memories:
            memory.buf[:] = bytes(memory.size)
        with tempfile.TemporaryDirectory() as folder:
            names = [m.name for m in memories]
            return _answers(_measure, [(rank, world, names, folder, spoiled) for rank in range(world)])
    finally:
        for memory in memories:
            memory.close()
            memory.unlink()
