"""The pass: collectives -> norms -> sites -> sharing -> rewrite -> report. Graph in, rewritten graph and report out."""

from .collectives import register_collective, unregister_collective
from .fusion import VerificationError, fuse, next_graph_id
from .options import PassOptions
from .quantizers import register_quantizer, unregister_quantizer
from .reasons import REMEDIES, Reason, Refusal
from .report import GraphReport, LayerAudit, ReportFormatError, Site

__all__ = [
    "REMEDIES",
    "GraphReport",
    "LayerAudit",
    "PassOptions",
    "Reason",
    "Refusal",
    "ReportFormatError",
    "Site",
    "VerificationError",
    "fuse",
    "next_graph_id",
    "register_collective",
    "register_quantizer",
    "unregister_collective",
    "unregister_quantizer",
]
