"""Copies of reports on disk for warm compile caches.

When Inductor's caches supply a graph, the pass does not run; the report of the compile that filled the cache is then read
back from a file beside those caches. A key covers all that the report depends on. A bundle of those caches
(``torch.compiler.save_cache_artifacts``) carries the file too.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tpfuse import compat
from tpfuse.passes.report import GraphReport, ReportFormatError
from tpfuse.store import log


def key(parts: Sequence[Any]) -> str:
    """A digest of everything a report depends on."""
    return hashlib.sha256(json.dumps([str(p) for p in parts]).encode()).hexdigest()[:32]


def _name(digest: str) -> str:
    return f"tpfuse/{digest}.json"


def _file(digest: str) -> Path:
    return Path(compat.cache_folder()) / _name(digest)


def _bundle(digest: str, data: Any) -> None:
    """Put a kept file into the next bundle, as torch does with what it compiles or finds; a failure costs that bundle's hit."""
    try:
        compat.bundle_file(_name(digest), data)
    except Exception as error:
        log.debug("report not bundled with torch's cache artifacts: %s: %s", type(error).__name__, error)


def save(digest: str, found: Sequence[GraphReport], bundled: bool = True) -> bool:
    """Write reports for later processes; a failure costs only a cache hit and is logged at DEBUG.

    ``bundled`` where they are final: what a bundle was given once, it keeps.
    """
    target = _file(digest)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{digest}")
        data = [r.to_dict() for r in found]
        with os.fdopen(handle, "w") as file:
            json.dump(data, file)
        os.replace(name, target)  # atomic, so that ranks which share the folder never read half a file
        if bundled:
            _bundle(digest, data)
        return True
    except OSError as error:
        log.debug("report not kept for warm caches: %s", error)
        return False


def load(digest: str) -> list[GraphReport] | None:
    """The reports that :func:`save` wrote, or None when there are none that can be read."""
    try:
        data = json.loads(_file(digest).read_text())
        found = [replace(GraphReport.from_dict(item), from_cache=True) for item in data]
    except (OSError, ValueError, ReportFormatError, TypeError):
        return None
    _bundle(digest, data)
    return found
