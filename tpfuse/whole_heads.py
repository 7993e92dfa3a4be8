"""A note in the report of a graph whose attention gathers the heads of all ranks, as transformers' plans for some models do.

The reductions fuse as in other models. But every rank attends with all heads and caches all keys and values.
"""

from __future__ import annotations

import re

import torch
from torch.fx import Graph

from tpfuse.passes import GraphReport
from tpfuse.passes.source import module_path

HEADS = re.compile(r"att(?:n|ention)\w*\.(?:q|k|v|qkv)_proj$")


def look(report: GraphReport, graph: Graph) -> None:
    """Add the note where all-gathers stand behind the projections of q, k or v, once for a graph."""
    places = [
        module_path(node)
        for node in graph.nodes
        if isinstance(node.target, torch._ops.OpOverload) and "all_gather_into_tensor" in node.target.name()
    ]
    found = [place for place in places if HEADS.search(place)]
    if found:
        report.notes.append(
            f"{len(found)} all-gathers bring the heads of all ranks together behind projections of attention, the first behind "
            f"{found[0]}: every rank attends with all heads and caches them. Where tpfuse knows the architecture, "
            "tpfuse.hf.from_pretrained(path, ParallelConfig(...)), or tpfuse.hf.parallelize of a model with whole weights, "
            "leaves each rank its own"
        )
