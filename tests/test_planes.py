"""Groups come and go, ranks fail at any step, threads meet: planes are voted on by all ranks or by none."""

from __future__ import annotations

import datetime
import os
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tpfuse.ops import cuda, paths, prepare, schedule, settings, vote
from tpfuse.ops.select import TABLE

H = 16
VERDICT = vote.Verdict(None, "sm_90", 1)


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
                paths,
                "_vote",
                lambda name, g, *_: paths.GroupPath("library", str(dist.get_process_group_ranks(g)), None),
            )
            patch.setattr(warnings, "warn", lambda *_, **__: None)
            path = paths.path_of(group.group_name, torch.device("cpu"))
        seen.append((group.group_name, path.cause, call(group)))
    return seen


@pytest.mark.ranks
def test_a_group_that_takes_the_name_of_a_destroyed_one_is_voted_on_anew(tmp_path):
    answers = run_ranks(many_lives, 3, str(tmp_path / "store"))
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

    found = settings.Settings(table=TABLE)
    group = dist.group.WORLD
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings.Settings, "from_environment", classmethod(lambda cls: found))
        patch.setattr(paths, "ballot_of", lambda *_: None)
        patch.setattr(paths, "judge", lambda _: VERDICT)
        patch.setattr(paths, "allocate", allocate)
        patch.setattr(paths, "connect", connect)
        path = paths._vote(group.group_name, group, torch.device("cpu"), "")
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
    assert run_ranks(failing_at, 2, step) == [(kind, cause, met)] * 2


def test_two_threads_vote_once(monkeypatch):
    votes = []
    started = threading.Barrier(2)

    def vote(*_):
        votes.append(threading.get_ident())
        threading.Event().wait(0.2)
        return paths.GroupPath("fused", "", None)

    class Group:
        pass

    group = Group()
    monkeypatch.setattr(paths, "_paths", {})
    monkeypatch.setattr(paths, "_vote", vote)
    monkeypatch.setattr(paths.compat, "resolve_group", lambda _: group)
    monkeypatch.setattr(paths.compat, "is_group", lambda *_: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    found = []

    def ask():
        started.wait()
        found.append(paths.path_of("g", torch.device("cpu")))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert len(votes) == 1
    assert len(found) == 2 and found[0] is found[1]


def test_what_was_prepared_for_destroyed_groups_is_forgotten_and_nothing_else(monkeypatch):
    assert paths.is_current("g", None)
    there = {"g": object(), "h": object()}
    monkeypatch.setattr(paths.compat, "is_group", lambda name, held: there.get(name) is held())
    forgotten = []
    monkeypatch.setattr(paths.compat, "forget_symmetric_memory", forgotten.append)
    library = paths.GroupPath("library", "", None)
    old, new, gone = (lambda: None), (lambda: there["g"]), (lambda: "destroyed")
    # The group has a plane of its own again for one class, and one of the group before it for the other.
    known = {("g", 0, ""): (library, new), ("g", 0, "side"): (library, old), ("x", 0, ""): (library, gone)}
    monkeypatch.setattr(paths, "_paths", known)
    monkeypatch.setattr(prepare, "PREPARED", {("g", 1): SimpleNamespace(held=old), ("g", 2): SimpleNamespace(held=new)})
    paths.forget_the_gone()
    prepare.forget_the_gone()
    assert list(known) == [("g", 0, "")] and list(prepare.PREPARED) == [("g", 2)]
    assert forgotten == ["g", "x"]
    prepare.forget("g")
    assert not known and not prepare.PREPARED


def a_path_asked_for_before_the_call(rank, world_size, store):
    """Rank 0 has made calls in a group that is gone; in the next one of that name the path is asked for before the first call."""
    from tpfuse.ops.flavour import LLAMA

    votes = []

    def vote(name, group, *_):
        votes.append(ranks_of(group))
        dist.barrier(group)
        return paths.GroupPath("library", ranks_of(group), settings.Settings(table=TABLE))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "_vote", vote)
        patch.setattr(warnings, "warn", lambda *_, **__: None)
        # The CUDA implementation without a GPU.
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(torch._C, "_cuda_getDevice", lambda: None, raising=False)
        patch.setattr(cuda.library, "add_norm", lambda x, r, w, b, normed, out, *_: out.copy_(x))
        sums = []
        for life, members in enumerate(([0, 1], [0, 2])):
            dist.barrier()
            dist.destroy_process_group()
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(f"{store}{life}", 3),
                rank=rank,
                world_size=3,
                timeout=datetime.timedelta(seconds=200),
            )
            group = dist.new_group(members)
            if rank not in members:
                continue
            name = group.group_name
            paths.path_of(name, torch.device("cpu"))
            for rows in (2, 3):
                x, w = torch.full((rows, H), float(rank + 1)), torch.ones(H)
                sums.append(cuda.run(x, None, w, None, 1e-6, 1.0, str(LLAMA), False, name)[1][0, 0].item())
    return votes, sums, [prepared.path.cause for prepared in prepare.PREPARED.values()]


@pytest.mark.ranks
def test_ranks_that_knew_the_group_before_and_ranks_that_did_not_vote_equally_often(tmp_path):
    first, second, third = run_ranks(a_path_asked_for_before_the_call, 3, str(tmp_path / "store"))
    assert first == (["[0, 1]", "[0, 2]"], [3.0, 3.0, 4.0, 4.0], ["[0, 2]"])
    assert second == (["[0, 1]"], [3.0, 3.0], ["[0, 1]"])
    assert third == (["[0, 2]"], [4.0, 4.0], ["[0, 2]"])


def batch_invariant_lives(rank, world_size, store):
    """Groups of one name and other ranks, in batch-invariant mode: each agrees on the mode anew, with the ranks that it has."""
    import tpfuse

    seen = []
    for life, members in enumerate(([0, 1], [0, 2], [1, 2])):
        dist.barrier()
        dist.destroy_process_group()
        tpfuse.ops.set_batch_invariant(life < 2)  # no group is left that could mind
        dist.init_process_group("gloo", store=dist.FileStore(f"{store}{life}", 3), rank=rank, world_size=3)
        group = dist.new_group(members)
        seen.append(call(group) if rank in members else None)
    return seen


@pytest.mark.ranks
def test_batch_invariant_groups_that_take_an_old_name_agree_anew(tmp_path):
    env = {"TPFUSE_WATCHDOG_SECONDS": "15"}
    answers = run_ranks(batch_invariant_lives, 3, str(tmp_path / "store"), timeout=800, env=env)
    assert answers == [[3.0, 4.0, None], [3.0, None, 5.0], [None, 4.0, 5.0]]


def test_a_group_that_is_gone_is_named_with_what_to_do(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with pytest.raises(
        RuntimeError, match=r"no process group 'gone': it was destroyed, or never made\..*compile again"
    ):
        paths.path_of("gone", torch.device("cpu"))


def failing_before_the_vote(rank, world_size, where):
    """Rank 1 cannot even fill in its ballot: what both ranks came to."""
    if rank == 1 and where == "settings":
        os.environ["TPFUSE_ALGORITHM"] = "fastest"
    if where == "settings everywhere":
        os.environ["TPFUSE_ALGORITHM"] = "fastest"

    def ballot(world, device, settings, klass):
        if rank == 1 and where == "driver":
            raise OSError("driver gone")
        return vote.Ballot(None, "host", f"gpu-{rank}", "sm_90", vote.versions(), settings.fingerprint(), klass)

    group = dist.group.WORLD
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "ballot_of", ballot)
        try:
            path = paths._vote(group.group_name, group, torch.device("cpu"), "")
        except (RuntimeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"
    return f"{path.kind}: {path.cause}"


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("driver", "library: rank 1: OSError: driver gone"),
        ("settings", "rank 1: not valid: TPFUSE_ALGORITHM='fastest'"),
        ("settings everywhere", "ValueError: TPFUSE_ALGORITHM='fastest' is not valid"),
    ],
)
def test_a_rank_that_fails_before_the_vote_still_votes(where, said):
    for answer in run_ranks(failing_before_the_vote, 2, where):
        assert said in answer


def test_ranks_that_vote_on_different_stream_classes_are_told():
    ballots = [vote.Ballot(None, "h", f"gpu-{i}", "sm_90", "v", "s", stream_class=name) for i, name in enumerate("ab")]
    with pytest.raises(RuntimeError, match=r"different stream classes \(rank 0: a; rank 1: b\)"):
        vote.judge(ballots)


def test_two_threads_that_want_one_kernel_get_one(monkeypatch):
    pytest.importorskip("triton")
    from tpfuse.ops.flavour import LLAMA
    from tpfuse.ops.kernels.variant import Variant, constants

    made = threading.Barrier(2)

    class Kernel:
        def __init__(self, *_, **__):
            made.wait(200)  # both threads have found none

    monkeypatch.setattr(schedule, "_kernels", {})
    monkeypatch.setattr(schedule, "Kernel", Kernel)
    bf16 = torch.bfloat16
    c = constants(bf16, bf16, 4096, LLAMA, bias="none", scaled=False, has_residual=True, post_norm=False)
    found = []
    variant = Variant(2, 128, 1, 1)
    threads = [
        threading.Thread(target=lambda: found.append(schedule.kernel_of("one_shot", c, variant))) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(200)
    assert len(found) == 2 and found[0] is found[1]
