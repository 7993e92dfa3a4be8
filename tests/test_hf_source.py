"""A Hub name without a network: one clear error at once, the same on every rank; what is cached on all of them loads."""

import os
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch.distributed as dist
from models import save
from ranks import RankPool

from tpfuse import hf
from tpfuse.hf_source import agree_on_source
from tpfuse.parallel import ConfigError, ParallelConfig

NOWHERE = "http://127.0.0.1:9"  # a port that nobody listens on: refused at once
NAME = "nobody/no-such-model"


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as pool:
        yield pool


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", NOWHERE)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def cache(folder: Path, name: str = NAME) -> Path:
    """The Hub's cache in ``folder`` with a snapshot of ``name``; returns the snapshot's folder."""
    repository = folder / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")
    return snapshot


def test_one_process_is_told_at_once(no_network):
    start = time.perf_counter()
    with pytest.raises(ConnectionError, match=f"{NAME} is no folder here, .*the Hub cannot be reached .*127.0.0.1:9"):
        hf.from_pretrained(NAME, ParallelConfig(1))
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize(
    ("given", "why"),
    [({"local_files_only": True}, "local_files_only=True"), ({}, "HF_HUB_OFFLINE")],
    ids=["asked", "set"],
)
def test_who_wants_no_network_is_told_so(no_network, monkeypatch, given, why):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", not given)
    with pytest.raises(ConnectionError, match=f"not in the Hub's cache, and {why}"):
        agree_on_source(NAME, given, several=False)


def test_a_cached_name_is_read_from_the_cache_alone(no_network):
    cache(no_network)
    assert agree_on_source(NAME, {"dtype": "auto"}, several=False) == {"dtype": "auto", "local_files_only": True}


def test_cached_weights_are_enough_for_who_gives_the_config(no_network):
    snapshot = cache(no_network)
    (snapshot / "config.json").rename(snapshot / "model.safetensors")
    given = {"config": object()}
    assert agree_on_source(NAME, given, several=False) == {**given, "local_files_only": True}
    with pytest.raises(ConnectionError):
        agree_on_source(NAME, {}, several=False)


def test_a_hub_that_answers_is_left_to_transformers(no_network, monkeypatch):
    import huggingface_hub.utils

    class Session:
        def head(self, url, timeout):
            assert url == NOWHERE
            return "404"

    monkeypatch.setattr(huggingface_hub.utils, "get_session", Session)
    assert agree_on_source(NAME, {"dtype": "auto"}, several=False) == {"dtype": "auto"}


def test_who_gives_the_hub_more_time_gets_it(no_network, monkeypatch):
    import huggingface_hub.utils
    from huggingface_hub import constants

    waited = []
    session = SimpleNamespace(head=lambda url, timeout: waited.append(timeout))
    monkeypatch.setattr(huggingface_hub.utils, "get_session", lambda: session)
    for given in (1, 60):
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", given)
        agree_on_source(NAME, {}, several=False)
    assert waited == [10, 60]


def test_a_folder_asks_nobody(no_network, tmp_path):
    assert agree_on_source(tmp_path, {}, several=False) == {}


def refused(rank, world_size, name, hub):
    """What is raised, and after how many seconds; ``hub`` is the cache of all ranks, or a folder of one for each."""
    from huggingface_hub import constants

    constants.ENDPOINT, constants.HF_HUB_OFFLINE, constants.HF_HUB_CACHE = NOWHERE, False, hub
    start = time.perf_counter()
    try:
        hf.from_pretrained(name, ParallelConfig(world_size))
    except OSError as error:
        return type(error).__name__, str(error), time.perf_counter() - start


def refused_with_one_cache(rank, world_size, parent):
    hub = Path(parent) / str(rank)
    if rank == 0:
        cache(hub)
    return refused(rank, world_size, NAME, str(hub))


def refused_with_one_folder(rank, world_size, parent):
    here = Path(parent) / str(rank)
    here.mkdir()
    os.chdir(here)
    if rank == 0:
        save("llama", "one/model", num_hidden_layers=1)
    dist.barrier()
    return refused(rank, world_size, "one/model", parent)


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("name", "kind", "said"),
    [
        (NAME, "ConnectionError", "not in the Hub's cache of ranks 0, 1, and the Hub cannot be reached"),
        ("/absent/model", "FileNotFoundError", "/absent/model does not exist"),
    ],
)
def test_all_ranks_say_the_same_at_once(pool, tmp_path, name, kind, said):
    first, second = pool.run(refused, name, str(tmp_path))
    assert first[:2] == second[:2]
    assert first[0] == kind
    assert said in first[1]
    assert max(first[2], second[2]) < 15


@pytest.mark.ranks
def test_a_rank_without_the_cached_files_stops_all(pool, tmp_path):
    first, second = pool.run(refused_with_one_cache, str(tmp_path))
    assert first[:2] == second[:2]
    assert "cache of rank 1, and the Hub cannot be reached" in first[1]


@pytest.mark.ranks
def test_a_folder_that_one_rank_alone_sees_stops_all(pool, tmp_path):
    first, second = pool.run(refused_with_one_folder, str(tmp_path))
    assert first[:2] == second[:2]
    assert first[0] == "FileNotFoundError"
    assert "not there on rank 1" in first[1]


def asked_alone(rank, world_size, folder):
    """What rank 0 is told where it alone asks, and what all are told then without a collective, which NCCL wants a GPU for."""
    from tpfuse import hf_source

    said = []
    if rank == 0:
        hf_source.SECONDS_FOR_ALL = 0.5
        try:
            hf.from_pretrained(folder, ParallelConfig(4))  # for more ranks than there are: an error without the others
        except ConfigError as error:
            said.append(str(error))
        try:
            agree_on_source(folder, {}, several=True)
        except TimeoutError as error:
            said.append(str(error))
        hf_source.SECONDS_FOR_ALL = 60.0
    dist.barrier()
    if rank == 1:
        agree_on_source(folder, {}, several=True)  # the call that rank 0 gave up
    with patch.object(dist, "all_gather_object", side_effect=RuntimeError("Duplicate GPU detected")):
        return said, agree_on_source(folder, {}, several=True)


@pytest.mark.ranks
def test_a_rank_that_asks_alone_is_told_and_does_not_hang(pool, tmp_path):
    save("llama", str(tmp_path), num_hidden_layers=1)
    (said, found), second = pool.run(asked_alone, str(tmp_path), timeout=60)
    assert "spans all 2 ranks" in said[0]
    assert "rank 1 did not call from_pretrained" in said[1]
    assert (found, second) == ({}, ([], {}))
