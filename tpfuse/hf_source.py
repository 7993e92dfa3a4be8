"""Where a model is read from: a folder, the Hub, or the Hub's cache. The ranks find out together, before any of them loads.

Without a network the Hub's client tries again for half a minute and more, file by file, on each rank. And a rank that alone
finds nothing would fail alone, while the others wait for it in the first collective.
"""

from __future__ import annotations

import itertools
import json
import os
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from tpfuse import compat
from tpfuse.hf_arguments import check_folder
from tpfuse.parallel import entries
from tpfuse.parallel.decision import ranks_in_words

FILES = ("config.json", "adapter_config.json")
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")  # all that is needed where the config is given
SECONDS = 10.0  # for the Hub's one answer, or more where HF_HUB_ETAG_TIMEOUT gives its client more
SECONDS_FOR_ALL = 600.0  # for ranks that are late to the call
_numbers: tuple[Any, Iterator[int]] | None = None  # the default group's store, and of the calls over it


@dataclass(frozen=True)
class Found:
    """What one rank sees.

    Attributes:
        folder: the path is there.
        cached: the Hub's cache holds the name.
        away: why rank 0 cannot ask the Hub; empty where it can, and on other ranks.
    """

    folder: bool
    cached: bool = False
    away: str = ""


def agree_on_source(path: Any, kwargs: dict[str, Any], several: bool) -> dict[str, Any]:
    """Arguments for ``from_pretrained`` with which no rank asks a Hub that rank 0 cannot reach.

    Args:
        path: folder or Hub name.
        kwargs: for the class's ``from_pretrained``; not changed.
        several: whether all ranks of the default group make this call. Then each waits for what the others see.
    Returns:
        ``kwargs``, with ``local_files_only=True`` where the Hub cannot be reached and every rank has the name in its cache.
    Raises:
        FileNotFoundError: no rank sees the folder, or some do not; on all ranks.
        ConnectionError: the Hub cannot be reached, and a rank has not cached the name; on all ranks.
        TimeoutError: a rank did not make the call.
    """
    name = os.fspath(path) if isinstance(path, os.PathLike) else path
    if not isinstance(name, str):
        return kwargs
    several = several and dist.is_initialized() and dist.get_backend() != "fake"
    mine = _look(name, kwargs, asks=not several or dist.get_rank() == 0)
    found = _of_all_ranks(mine) if several else [mine]
    without = [rank for rank, one in enumerate(found) if not one.folder]
    if not without:
        return kwargs
    if len(without) < len(found):
        raise FileNotFoundError(
            f"{name} is a folder on some ranks and not there on {ranks_in_words(without)}; give a path that every rank sees, "
            "on each host"
        )
    check_folder(path)
    if not found[0].away:
        return kwargs
    missing = [rank for rank, one in enumerate(found) if not one.cached]
    if not missing:
        return {**kwargs, "local_files_only": True}
    where = f" of {ranks_in_words(missing)}" if len(found) > 1 else ""
    raise ConnectionError(
        f"{name} is no folder here, and not in the Hub's cache{where}, and {found[0].away}. Give a folder with config.json and "
        "weights, or download the model where there is a network: hf download " + name
    )


def _of_all_ranks(mine: Found) -> list[Found]:
    """What each rank of the default group sees. Through its store: NCCL would need the rank's GPU, which may not be set yet."""
    global _numbers  # noqa: PLW0603 - one default group a process
    store = compat.default_store()
    if _numbers is None or _numbers[0]() is not store:
        _numbers = weakref.ref(store), itertools.count()
    prefix, ranks = f"tpfuse/source/{next(_numbers[1])}", range(dist.get_world_size())
    store.set(f"{prefix}/{dist.get_rank()}", json.dumps(asdict(mine)))
    found, missing = entries.read(store, prefix, ranks, SECONDS_FOR_ALL)
    if missing:
        raise TimeoutError(
            f"{ranks_in_words(missing)} did not call from_pretrained within {SECONDS_FOR_ALL:.0f} s; all ranks of the default "
            "group load a model together"
        )
    return [Found(**found[rank]) for rank in ranks]


def _look(name: str, kwargs: dict[str, Any], asks: bool) -> Found:
    """What this rank sees; one that ``asks`` also tries the Hub."""
    if Path(name).exists():
        return Found(True)
    return Found(False, _cached(name, kwargs), _away(kwargs) if asks else "")


def _cached(name: str, kwargs: dict[str, Any]) -> bool:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    folder = f"{kwargs['subfolder']}/" if kwargs.get("subfolder") else ""
    files = [*FILES, *(WEIGHTS if kwargs.get("config") is not None else ())]
    files += [kwargs["gguf_file"]] if kwargs.get("gguf_file") else []
    place = {"cache_dir": kwargs.get("cache_dir") or _cache(), "revision": kwargs.get("revision")}
    try:
        return any(isinstance(try_to_load_from_cache(name, folder + file, **place), str) for file in files)
    except HFValidationError:
        return False  # no name for a repository, which transformers says best


def _cache() -> str:
    from huggingface_hub import constants

    return str(constants.HF_HUB_CACHE)


def _away(kwargs: dict[str, Any]) -> str:
    """Why the Hub cannot be asked; empty where it answers, whatever it answers."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if kwargs.get("local_files_only"):
        return "local_files_only=True keeps from asking the Hub"
    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE keeps from asking the Hub"
    try:
        get_session().head(constants.ENDPOINT, timeout=max(SECONDS, constants.HF_HUB_ETAG_TIMEOUT))
    except Exception as error:  # of the HTTP library below, which the Hub's client has changed between versions
        said = (str(error) or type(error).__name__).splitlines()[0]
        return f"the Hub cannot be reached ({constants.ENDPOINT}: {said})"
    return ""
