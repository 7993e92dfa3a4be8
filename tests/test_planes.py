"""Groups come and go, ranks fail at any step, threads meet: planes are voted on by all ranks or by none."""

from __future__ import annotations

import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tpfuse.ops import dispatch, plane
from tpfuse.ops.select import TABLE

H = 16
VERDICT = plane.Verdict(None, "sm_90", 1)


def call(group):
    import tpfuse

    x = torch.full((2, H), float(dist.get_rank() + 1))
    return tpfuse.ops.all_reduce_add_rms_norm(x, torch.zeros(2, H), torch.ones(H), group=group)[1][0, 0].item()


def ranks_of(group):
    return str(dist.get_process_group_ranks(group))


def many_lives(rank, world_size, store):
    """Five default groups one after the other; the second group of each has the same name and other ranks."""
    seen = []
    for life in range(5):
        if life:
            dist.barrier()  # a rank outside the group must not take the store away from those inside
            dist.destroy_process_group()
            dist.init_process_group("gloo", store=dist.FileStore(f"{store}{life}", 3), rank=rank, world_size=3)
        members = [[0, 1], [0, 2], [1, 2]][life % 3]
        group = dist.new_group(members)
        if rank not in members:
            seen.append(None)
            continue
        with pytest.MonkeyPatch.context() as patch:
            # The vote without a GPU: what matters is that each group gets its own.
            patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
            patch.setattr(
                plane,
                "_vote",
                lambda name, g, *_: plane.GroupPath("library", str(dist.get_process_group_ranks(g)), None),
            )
            patch.setattr(warnings, "warn", lambda *_, **__: None)
            path = plane.path_of(group.group_name, torch.device("cuda", 0))
        seen.append((group.group_name, path.cause, call(group)))
    return seen


@pytest.mark.ranks
def test_a_group_that_takes_the_name_of_a_destroyed_one_is_voted_on_anew(tmp_path):
    answers = run_ranks(many_lives, 3, str(tmp_path / "store"), timeout=120)
    for rank, seen in enumerate(answers):
        for life, found in enumerate(seen):
            members = [[0, 1], [0, 2], [1, 2]][life % 3]
            if rank in members:
                assert found[1:] == (str(members), float(sum(m + 1 for m in members)))
    names = [found[0] for seen in answers for found in seen if found]
    assert len(set(names)) < 5, "the names did not repeat, so nothing was tested"


def failing_at(rank, world_size, step):
    """Rank 1 fails at one step of building; says what both ranks came to, and whether rank 0 was left in the rendezvous."""
    met = []

    def allocate(*_):
        if (rank, step) == (1, "allocate"):
            raise MemoryError("no memory")
        return torch.zeros(1)

    def connect(*_):
        dist.barrier()  # the rendezvous: nobody leaves before all have come
        met.append(True)
        if (rank, step) == (1, "connect"):
            raise RuntimeError("no peer access")
        return SimpleNamespace()

    settings = plane.Settings(table=TABLE)
    group = dist.group.WORLD
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plane.Settings, "from_environment", classmethod(lambda cls: settings))
        patch.setattr(plane, "_ballot", lambda *_: None)
        patch.setattr(plane, "judge", lambda _: VERDICT)
        patch.setattr(plane, "_allocate", allocate)
        patch.setattr(plane, "_connect", connect)
        path = plane._vote(group.group_name, group, torch.device("cpu"), "")
    return path.kind, path.cause, bool(met)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("step", "kind", "cause", "met"),
    [
        ("allocate", "library", "rank 1: MemoryError: no memory", False),
        ("connect", "library", "rank 1: RuntimeError: no peer access", True),
        ("none", "fused", "", True),
    ],
)
def test_a_rank_that_fails_at_any_step_of_building_takes_all_to_the_library_and_none_waits(step, kind, cause, met):
    assert run_ranks(failing_at, 2, step, timeout=60) == [(kind, cause, met)] * 2


def test_two_threads_vote_once(monkeypatch):
    votes = []
    started = threading.Barrier(2)

    def vote(*_):
        votes.append(threading.get_ident())
        threading.Event().wait(0.2)
        return plane.GroupPath("fused", "", None)

    class Group:
        pass

    group = Group()
    monkeypatch.setattr(plane, "_paths", {})
    monkeypatch.setattr(plane, "_vote", vote)
    monkeypatch.setattr(plane.compat, "resolve_group", lambda _: group)
    monkeypatch.setattr(plane.compat, "is_registered", lambda _: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    found = []

    def ask():
        started.wait()
        found.append(plane.path_of("g", torch.device("cuda", 0)))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(votes) == 1
    assert len(found) == 2 and found[0] is found[1]


def test_what_was_prepared_for_a_destroyed_group_is_forgotten(monkeypatch):
    import weakref

    class Group:
        pass

    gone = weakref.ref(Group())  # collected at once
    assert not plane.is_current(gone)
    assert plane.is_current(None)
    monkeypatch.setattr(dispatch, "_prepared", {("g", 1): 1, ("h", 1): 2})
    monkeypatch.setattr(plane, "_paths", {("g", 0, ""): (None, gone), ("h", 0, ""): (None, None)})
    dispatch.forget("g")
    assert list(dispatch._prepared) == [("h", 1)] and list(plane._paths) == [("h", 0, "")]
