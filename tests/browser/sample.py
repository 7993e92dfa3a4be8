"""A model's graph, report and dump made by hand: many layers, ranks and reasons without a compile."""

from __future__ import annotations

import operator
from dataclasses import replace
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from tpfuse.ops import LLAMA
from tpfuse.passes.reasons import Reason
from tpfuse.passes.report import GraphReport, LayerAudit, Site

from tpfuse.inspect import dump

HIDDEN = 4096
MODEL = "/srv/models/modeling_sample.py"
aten = torch.ops.aten
STEPS = ("all_reduce", "add", "square", "mean", "root", "scale", "weight")


def kept(site: Site, reason: Reason, detail: str, matched: int = 0) -> Site:
    """The site as it would be reported had it been refused."""
    pattern = "all_reduce+add" if matched > 1 else "all_reduce"
    return replace(
        site, fused=False, reason=str(reason), detail=detail, pattern=pattern, replaced_by=None, flavour=None, eps=None,
        matched=STEPS[:matched],
    )  # fmt: skip


def report(layers: int = 4, rank: int = 0, world: int = 8, attn_tp: int = 4, rows: int | str = 8) -> GraphReport:
    """A report with every kind of verdict: an embedding, fused layers, a refused norm, an expert sum over all ranks."""
    start = rank // attn_tp * attn_tp
    group = tuple(range(start, start + attn_tp))
    sites = [_site(0, "embedding", None, group, rows)]
    for layer in range(layers):
        for role in ("attention", "mlp"):
            sites.append(_site(len(sites), role, layer, group, rows))
    if layers > 1:
        mean = "the mean is over dim 1, expected the last"
        sites[3] = kept(sites[3], Reason.MEAN_DIM, mean, matched=3)
        sites[4] = replace(
            kept(sites[4], Reason.GROUP_MISMATCH, f"attention is over {list(group)}, MLP over all {world} ranks", 2),
            group=tuple(range(world)), shared=False,
        )  # fmt: skip
    sites[-1] = kept(sites[-1], Reason.NO_NORM, "the sum leaves the graph before any norm reads it", matched=2)
    audits = [LayerAudit(n, group, group, True) for n in range(layers)]
    if layers > 1:
        audits[1] = LayerAudit(1, group, tuple(range(world)), False, "the MLP reduces over more ranks than attention")
    return GraphReport(
        "graph-0", rank, world, sites, audits, inner="inductor", seconds=0.21,
        notes=["use_kernels=True hides 2 norms inside Hub kernels"] if layers > 1 else [],
    )  # fmt: skip


def _site(number: int, role: str, layer: int | None, group: tuple[int, ...], rows: int | str) -> Site:
    names = ["all_reduce", "wait", "add", "to", "square", "mean", "plus_eps", "rsqrt", "mul", "round", "out"]
    line = {"attention": 281, "mlp": 176, "embedding": 390}[role]
    return Site(
        True, None, "three steps became one node", "all_reduce+add+rms_norm", role, layer, group,
        True, f"{MODEL}:{line}", [f"{n}_{number}" for n in names], (1, rows, HIDDEN), "bfloat16", 1e-6, str(LLAMA), (),
        f"fused_{number}",
    )  # fmt: skip


def graphs(made: GraphReport) -> tuple[GraphModule, GraphModule]:
    """(before, after): graphs whose nodes have the names that the report's sites list."""
    rows = next((s.shape[1] for s in made.sites if isinstance(s.shape[1], int)), 8)
    mode = FakeTensorMode()
    with mode:
        x = torch.empty(1, rows, HIDDEN, dtype=torch.bfloat16)
        weight, scalar = torch.empty(HIDDEN, dtype=torch.bfloat16), torch.empty(1, rows, 1)
    return _graph(made, x, weight, scalar, False), _graph(made, x, weight, scalar, True)


def _graph(
    made: GraphReport, x: torch.Tensor, weight: torch.Tensor, scalar: torch.Tensor, rewritten: bool
) -> GraphModule:
    graph = Graph()
    residual = _placeholder(graph, "hidden_states", x)
    matrix = _placeholder(graph, "norm_weight", weight)
    value = residual
    for site in made.sites:
        group = "tp-" + "-".join(map(str, site.group))
        if rewritten and site.fused:
            op = torch.ops.tpfuse.all_reduce_add_rms_norm.default
            arguments = (value, residual, matrix, None, site.eps, 1.0, site.flavour, False, group)
            fused = _call(graph, site, site.replaced_by or "", op, arguments, (x, x))
            value = _call(graph, site, f"normed_{site.replaced_by}", operator.getitem, (fused, 0), x)
            residual = _call(graph, site, f"residual_{site.replaced_by}", operator.getitem, (fused, 1), x)
        else:
            value, residual = _unfused(graph, site, value, residual, matrix, x, scalar, group)
    graph.output((value, residual))
    return GraphModule(torch.nn.Module(), graph)


def _unfused(
    graph: Graph,
    site: Site,
    value: Node,
    residual: Node,
    weight: Node,
    x: torch.Tensor,
    scalar: torch.Tensor,
    group: str,
) -> tuple[Node, Node]:
    names = iter(site.nodes)
    functional = torch.ops._c10d_functional
    wide = x.float()

    def step(op: object, *arguments: object, like: torch.Tensor = x) -> Node:
        return _call(graph, site, next(names), op, arguments, like)

    started = step(functional.all_reduce.default, value, "sum", group)
    reduced = step(functional.wait_tensor.default, started)
    total = step(aten.add.Tensor, residual, reduced)
    h = step(aten._to_copy.default, total, like=wide)
    h2 = step(aten.pow.Tensor_Scalar, h, 2, like=wide)
    mean = step(aten.mean.dim, h2, [-1], True, like=scalar)
    safe = step(aten.add.Tensor, mean, 1e-6, like=scalar)
    root = step(aten.rsqrt.default, safe, like=scalar)
    normed = step(aten.mul.Tensor, h, root, like=wide)
    rounded = step(aten._to_copy.default, normed)
    return step(aten.mul.Tensor, weight, rounded), total


def _placeholder(graph: Graph, name: str, value: torch.Tensor) -> Node:
    node = graph.placeholder(name)
    node.meta["val"] = value
    return node


def _call(graph: Graph, site: Site, name: str, op: object, arguments: tuple, value: object) -> Node:
    node = graph.create_node("call_function", op, arguments, {}, name)  # type: ignore[arg-type]
    node.meta["val"] = value
    file, line = site.source.rsplit(":", 1)
    node.meta["stack_trace"] = (
        f'  File "{file}", line {line}, in forward\n    hidden_states = residual + hidden_states\n'
    )
    return node


def write_dump(folder: Path, layers: int = 4, world: int = 8, differ: bool = False) -> Path:
    """A dump of one graph on every rank. ``differ`` makes the last rank keep a site that its peers fuse."""
    for rank in range(world):
        made = report(layers, rank, world, attn_tp=max(1, world // 2))
        if differ and rank == world - 1:
            made.sites[1] = kept(made.sites[1], Reason.EXTRA_READER, "a debug print reads the sum on this rank", 1)
        dump.write(folder, made, *graphs(made))
    return folder
