"""What the ranks of a group leave for each other in a store while they compare a graph: entries, and notes of what needs none.

No collective: nobody waits longer than it says for a rank that does not come.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

AT_ONCE = 0.01  # for what should be there already


def read(store: Any, prefix: str, group: Sequence[int], limit: float) -> tuple[dict[int, dict[str, Any]], list[int]]:
    """(what each rank left under ``prefix`` within ``limit`` seconds, the ranks that left nothing)"""
    deadline = time.monotonic() + limit
    found: dict[int, dict[str, Any]] = {}
    missing: list[int] = []
    for rank in group:
        try:
            left = max(AT_ONCE, deadline - time.monotonic())
            store.wait([f"{prefix}/{rank}"], timedelta(seconds=left))
        except Exception:  # a store raises RuntimeError or DistStoreError by version and kind
            missing.append(rank)
            continue
        found[rank] = json.loads(store.get(f"{prefix}/{rank}"))
    return found, missing


def digest(parts: Sequence[Any]) -> str:
    """A short text that is equal on ranks whose ``parts`` are."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def note(store: Any, place: str, rank: int, effect: str) -> None:
    """Leave word that a rank has compiled a graph and kept to what was agreed on before, so that it leaves no entry.

    Args:
        place: which compile of which graph, see :mod:`.comparison`.
    """
    store.set(f"{place}/{rank}", effect)


def noted_otherwise(store: Any, place: str, ranks: Iterable[int], effect: str) -> list[int]:
    """Those of the ranks that have left a note of another effect. Does not wait."""
    names = {rank: f"{place}/{rank}" for rank in ranks}
    return [rank for rank, name in names.items() if store.check([name]) and store.get(name).decode() != effect]
