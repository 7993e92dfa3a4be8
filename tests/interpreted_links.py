"""The kernels of ``tpfuse.ops.link_kernels`` in Triton's interpreter, in processes of their own.

Nothing of tpfuse is imported at the top: the interpreter must be chosen before Triton is imported.
"""

from __future__ import annotations

import os
import time
import traceback
from multiprocessing import get_context, shared_memory
from typing import Any

import torch

ROUNDS = 20


def _rank(rank: int, names: list[str], limit: int, together: Any, conn: Any) -> None:
    try:
        os.environ["TRITON_INTERPRET"] = "1"
        torch.set_num_threads(1)
        from tpfuse.ops.link_kernels import ping_pong_kernel
        from triton.runtime import interpreter

        load = interpreter.interpreter_builder.create_masked_load

        def polite_load(ptrs: Any, mask: Any, other: Any, policy: Any, volatile: bool) -> Any:
            loaded = load(ptrs, mask, other, policy, volatile)
            if volatile and not loaded.data.all():
                os.sched_yield()
            return loaded

        interpreter.interpreter_builder.create_masked_load = polite_load
        held = [shared_memory.SharedMemory(name=name) for name in names]
        slots = [torch.frombuffer(memory.buf, dtype=torch.int32)[: ROUNDS * 4] for memory in held]
        peers = torch.tensor([t.data_ptr() for t in slots], dtype=torch.int64)
        record = torch.zeros(4, dtype=torch.int32)
        together.wait(120)
        ping_pong_kernel[(1,)](peers, record, rank, 1 - rank, ROUNDS, limit, False)
        conn.send((record.tolist(), slots[rank].view(ROUNDS, 4).tolist()))
        del slots
    except Exception:
        conn.send(traceback.format_exc())
    conn.close()


def play(ranks: tuple[int, ...], limit: int) -> list[Any]:
    """Ping-pong of these of two ranks: each one's record and slots, or the text of what it raised."""
    context = get_context("spawn")
    memories = [shared_memory.SharedMemory(create=True, size=ROUNDS * 16) for _ in range(2)]
    try:
        for memory in memories:
            memory.buf[:] = bytes(memory.size)
        together = context.Barrier(len(ranks))
        workers = []
        for rank in ranks:
            receive, send = context.Pipe(duplex=False)
            process = context.Process(
                target=_rank, args=(rank, [m.name for m in memories], limit, together, send), daemon=True
            )
            process.start()
            send.close()
            workers.append((process, receive))
        deadline = time.monotonic() + 200
        answers = []
        for process, receive in workers:
            answers.append(receive.recv() if receive.poll(max(0.1, deadline - time.monotonic())) else "no answer")
            process.join(1)
            if process.is_alive():
                process.kill()
        return answers
    finally:
        for memory in memories:
            memory.close()
            memory.unlink()


def _bulk(conn: Any) -> None:
    try:
        os.environ["TRITON_INTERPRET"] = "1"
        from tpfuse.ops import links
        from tpfuse.ops.link_kernels import CHUNK_BYTES, bulk_push_kernel

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
    context = get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_bulk, args=(send,), daemon=True)
    process.start()
    send.close()
    answer = receive.recv() if receive.poll(200) else "no answer"
    process.join(5)
    return answer
