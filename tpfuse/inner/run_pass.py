"""The pass with everything around it: fuel, dump, the reports of the process. Every inner compiler runs it through here."""

from __future__ import annotations

from typing import Any

from torch.fx import Graph, GraphModule

from tpfuse import store, unfused, whole_heads
from tpfuse.inspect import artifact, dump
from tpfuse.options import Options
from tpfuse.passes import GraphReport, collectives, fuse


def run_pass(
    graph: GraphModule | Graph,
    parsed: Options,
    training: bool,
    log_to: list[GraphReport] | None = None,
    lower: bool = False,
) -> GraphReport:
    """The pass with everything around it: fuel, dump, store.

    Args:
        graph: functional ATen; rewritten in place.
        parsed, training: of the compile.
        log_to: gets the report as well.
        lower: Inductor compiles the graph and may get sites as the model wrote them.
    """
    before = _copy_graph(_graph_of(graph)) if parsed.dump else None
    scatters, gathers = unfused.count_row_collectives(_graph_of(graph))
    report = fuse(graph, parsed.for_pass(store.fuel_left(parsed.fuel), lower), training=training, inner=parsed.inner)
    report.reduce_scatters, report.all_gathers = scatters, gathers
    whole_heads.look(report, _graph_of(graph))
    artifact.record(report)
    if before is not None and parsed.dump is not None:
        dump.write(parsed.dump, report, before, _graph_of(graph))
    if log_to is not None:
        log_to.append(report)
    store.add(report)
    return report


def run_pass_inside(graph: GraphModule, parsed: Options) -> None:
    """:func:`run_pass` for each graph that a graph holds and calls (``nested_compile_region``, ``torch.cond``) and that reduces.

    Inductor runs passes over such graphs itself; where no Inductor is, nobody else does.
    """
    for _, module in collectives.graphs_inside(graph):
        run_pass(module, parsed, training=False)


def _graph_of(graph: GraphModule | Graph) -> Graph:
    return graph.graph if isinstance(graph, GraphModule) else graph


def _copy_graph(graph: Graph) -> Graph:
    new = Graph()
    mapping: dict[Any, Any] = {}
    output = new.graph_copy(graph, mapping)
    new.output(output)
    for old, copied in mapping.items():
        copied.meta = dict(old.meta)
    return new
