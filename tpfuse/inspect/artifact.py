"""Put a report into torch's structured trace, where ``tlparse`` shows it beside torch's own artifacts."""

from __future__ import annotations

import logging

from tpfuse import compat
from tpfuse.passes.report import GraphReport

log = logging.getLogger(__name__)


def record(report: GraphReport) -> None:
    """Add the report to the trace that ``TORCH_TRACE=DIR`` turns on; without effect otherwise.

    Never raises: where torch has no structured trace, the report is still in ``tpfuse.reports()`` and in the dump.
    """
    try:
        compat.trace_artifact(f"tpfuse_{report.graph_id}", report.to_json)
    except Exception as error:  # private to torch: another signature must not fail a compile
        log.debug("tpfuse could not add %s to torch's trace: %s", report.graph_id, error)
