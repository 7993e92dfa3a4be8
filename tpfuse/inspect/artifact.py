"""Put a report into torch's structured trace, where ``tlparse`` shows it beside torch's own artifacts."""

from __future__ import annotations

import logging

from tpfuse.passes.report import GraphReport

log = logging.getLogger(__name__)


def record(report: GraphReport) -> None:
    """Add the report to the trace that ``TORCH_TRACE=DIR`` turns on; free of cost and without effect otherwise.

    Never raises: where torch has no structured trace, the report is still in ``tpfuse.reports()`` and in the dump.
    """
    try:
        from torch._logging import trace_structured

        trace_structured(
            "artifact",
            metadata_fn=lambda: {"name": f"tpfuse_{report.graph_id}", "encoding": "json"},
            payload_fn=report.to_json,
        )
    except Exception as error:  # private to torch: another signature must not fail a compile
        log.debug("tpfuse could not add %s to torch's trace: %s", report.graph_id, error)
