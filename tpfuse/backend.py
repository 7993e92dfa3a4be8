"""The ``torch.compile`` backend: options in, inner compiler out.

``torch.compile(model, backend="tpfuse")`` finds :func:`tpfuse` through the entry point group ``torch_dynamo_backends``. The
pass is mounted where each inner compiler has a functional ATen graph in hand; one rewriter serves them all.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch.fx import Graph, GraphModule

import tpfuse as package
from tpfuse import compat, store, unfused
from tpfuse.inspect import artifact, dump
from tpfuse.options import OptionError, Options, parse, prefix_hint
from tpfuse.parallel.agreement import agree_on
from tpfuse.passes import GraphReport, collectives, fuse, next_graph_id

log = logging.getLogger("tpfuse")

PRE_PASS = "post_grad_custom_pre_pass"
POST_GRAD = "use_post_grad_passes"


def tpfuse(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **unknown: Any,
) -> Callable[..., Any]:
    """Compile one Dynamo graph.

    Args:
        gm: the captured graph.
        example_inputs: its fake inputs.
        mode: as in ``torch.compile``; with the Inductor inner it sets the same options as there.
        options: ``tpfuse.*`` keys for tpfuse, all others for the inner compiler. ``torch.compile`` takes no mode beside
            options, hence the key ``tpfuse.mode``.
    Returns:
        A callable with the signature of ``gm``.
    Raises:
        OptionError: an unknown option or value.
        ImportError: the inner compiler needs an extra that is not installed.
    """
    parsed = parse(options)
    if unknown:
        raise OptionError(f"tpfuse takes mode= and options=; it was given {', '.join(sorted(unknown))}")
    _set_batch_invariant(parsed)
    specialise_floats(gm)
    training = torch.is_grad_enabled() and any(
        isinstance(x, torch.Tensor) and x.requires_grad for x in (*example_inputs, *gm.parameters())
    )
    before = {id(report) for report in store.reports()}
    try:
        compiled = _MOUNTS[parsed.inner](gm, example_inputs, parsed, mode or parsed.mode, training)
    except TypeError as error:
        if UNHASHABLE not in str(error):
            raise
        return _as_captured(gm, training)
    new = [report for report in store.reports() if id(report) not in before]
    # Here, and not at the first call: nothing of the graph has run yet, and a call stays as cheap as it is.
    agree_on(new, f"tpfuse {package.__version__}, {parsed.decisive()}")
    unfused.look(new, parsed.policy, parsed.fuel)
    return compiled


# DTensor looks specs up by hash, and the hash of one with a symbolic size raises. Under torch 2.13 the backward pass of a
# redistribution does so while it is traced, with any backend: a tensor-parallel model with gradients then dies at its second
# shape, between prefill and cached decode.
UNHASHABLE = "unhashable type: non-nested SymInt"


def _as_captured(gm: GraphModule, training: bool) -> Callable[..., Any]:
    """The graph as Dynamo captured it, run operator by operator: slow and right, where torch cannot trace it further."""
    what = "a training graph of DTensors" if training else "this graph of DTensors"
    remedy = "Compile under torch.inference_mode()" + (", or with dynamic=False" if training else " with dynamic=False")
    unfused.tell(
        "unhashable",
        f"torch cannot compile {what} with symbolic sizes ({UNHASHABLE}); it runs operator by operator, and nothing of it was "
        f"fused. {remedy}",
    )
    return gm.forward


ARGUMENT = re.compile(r"^L\['[^']+'\]$")


def specialise_floats(gm: GraphModule) -> None:
    """Guard the floats of modules (an eps, a multiplier) to their values and make them constants of the graph.

    With ``dynamic=True`` Dynamo turns them into graph inputs; a norm whose eps is unknown cannot be proved, and every match
    would be lost. The guard keeps this right when a value changes: Dynamo then compiles again. Floats that are arguments
    of the compiled function stay symbolic, for those are meant to change.
    """
    for node in list(gm.graph.nodes):
        symbol = node.meta.get("example_value")
        if node.op != "call_method" or node.target != "item" or not isinstance(symbol, torch.SymFloat):
            continue
        held = node.args[0]
        source = getattr(held.meta.get("grapharg"), "source", None)
        if source is None or ARGUMENT.match(compat.source_name(source)):
            continue
        node.replace_all_uses_with(compat.guarded_float(symbol))
        gm.graph.erase_node(node)
    gm.recompile()


def _set_batch_invariant(parsed: Options) -> None:
    """The mode belongs to the op and the process: whatever it is that calls the op, its bits must not change on the way."""
    if parsed.batch_invariant is not None:
        from tpfuse.ops import set_batch_invariant

        set_batch_invariant(parsed.batch_invariant)


# -- mounts ---------------------------------------------------------------------------------------------------------


def _run_pass(
    graph: GraphModule | Graph, parsed: Options, training: bool, log_to: list[GraphReport] | None = None
) -> GraphReport:
    """The pass with everything around it: fuel, dump, store."""
    before = _copy_graph(_graph_of(graph)) if parsed.dump else None
    scatters, gathers = unfused.count_row_collectives(_graph_of(graph))
    report = fuse(graph, parsed.for_pass(store.fuel_left(parsed.fuel)), training=training, inner=parsed.inner)
    report.reduce_scatters, report.all_gathers = scatters, gathers
    artifact.record(report)
    if before is not None and parsed.dump is not None:
        dump.write(parsed.dump, report, before, _graph_of(graph))
    if log_to is not None:
        log_to.append(report)
    store.add(report)
    return report


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


def _aot(
    gm: GraphModule, inputs: Sequence[Any], parsed: Options, mode: str | None, training: bool
) -> Callable[..., Any]:
    """``aot_eager`` and ``eager``: the rewritten ATen graph runs as it is."""
    if parsed.inner_options:
        raise OptionError(
            f"inner {parsed.inner!r} takes no options of its own; given {', '.join(sorted(parsed.inner_options))}"
            f"{prefix_hint(parsed.inner_options)}"
        )

    def run(graph: GraphModule) -> Callable[..., Any]:
        if parsed.inner == "eager":
            # Node by node, so that an exception names the node it came from.
            return compat.boxed(torch.fx.Interpreter(graph).run)
        return compat.boxed(graph.forward)

    def inference(graph: GraphModule, _: Any) -> Callable[..., Any]:
        _run_pass(graph, parsed, training=False)
        return run(graph)

    def forward(graph: GraphModule, _: Any) -> Callable[..., Any]:
        _run_pass(graph, parsed, training=True)
        return run(graph)

    def backward(graph: GraphModule, _: Any) -> Callable[..., Any]:
        return run(graph)

    compiler = compat.aot_autograd(fw_compiler=forward, bw_compiler=backward, inference_compiler=inference)
    return compiler(gm, inputs)


@lru_cache(maxsize=1)
def sources_digest() -> str:
    """A digest of tpfuse's own sources: a changed pass must not reuse what another version compiled."""
    digest = hashlib.sha256(package.__version__.encode())
    from tpfuse import ops, passes

    files = sorted(Path(__file__).parent.glob("*.py"))
    for part in (passes, ops):
        files += sorted(Path(str(part.__file__)).parent.rglob("*.py"))
    for path in files:
        digest.update(path.name.encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


def group_shapes() -> list[tuple[int, int]]:
    """(size, index of the first group with the same ranks) of this process's groups in creation order.

    Enough to tell layouts apart that would be judged differently, without anything that differs between ranks: group names
    and rank numbers do.
    """
    groups = compat.known_groups()
    first: dict[tuple[int, ...], int] = {}
    return [(len(ranks), first.setdefault(ranks, index)) for index, (_, ranks) in enumerate(groups)]


def registered_spellings() -> list[str]:
    """The all-reduces that users registered: with another set the pass finds other sites."""
    found = collectives.registered()
    names = [(str(s.op), s.input, s.group, s.reduce_op, getattr(s.ranks, "__qualname__", s.ranks)) for s in found]
    return sorted(str(name) for name in names)


class _InductorPass(compat.custom_graph_pass()):  # type: ignore[misc]
    """Runs the user's own pre-passes, then ours, on Inductor's post-grad graph."""

    def __init__(self, parsed: Options, training: bool, previous: Any) -> None:
        super().__init__()
        self.parsed, self.training = parsed, training
        self.previous = compat.custom_passes(previous)
        self.reports: list[GraphReport] = []
        self.identity = self._identity()

    def __call__(self, graph: Graph) -> None:
        for run in self.previous:
            run(graph, not self.training) if compat.wants_inference_flag(run) else run(graph)
        _run_pass(graph, self.parsed, self.training, self.reports)

    def uuid(self) -> Any:
        return self.identity

    def _identity(self) -> Any:
        """Equal for equal work on every rank: sources, options, versions, group shapes; nothing rank-specific."""
        theirs = [uuid() if (uuid := getattr(run, "uuid", None)) is not None else None for run in self.previous]
        if None in theirs:
            return None  # one of their passes has no identity: Inductor then does not cache, as without us
        p = self.parsed
        left = store.fuel_left(p.fuel)
        parts = (sources_digest(), torch.__version__, p.policy, p.numerics, p.verify, left, self.training, theirs)
        return store.key([*parts, *registered_spellings(), *group_shapes()])


def graph_pass(options: dict[str, Any] | None = None) -> Any:
    """The pass as an Inductor ``CustomGraphPass``, for engines that have a hook of their own for graph passes.

    Args:
        options: as for ``torch.compile``; ``tpfuse.inner`` is ignored, for the engine compiles.
    Returns:
        An object to call with a post-grad graph; its ``uuid()`` keeps compile caches usable, ``reports`` is what it did.
    """
    parsed = parse(options)
    _set_batch_invariant(parsed)
    return _InductorPass(parsed, training=False, previous=None)


def _inductor(
    gm: GraphModule, inputs: Sequence[Any], parsed: Options, mode: str | None, training: bool
) -> Callable[..., Any]:
    """Mounted as Inductor's ``post_grad_custom_pre_pass``, which runs before Inductor lowers the all-reduce itself."""
    patches = dict(compat.inductor_mode_options(mode))
    patches.update({key.replace("-", "_"): value for key, value in parsed.inner_options.items()})
    known = compat.inductor_settings()
    for name in patches:
        if name not in known:
            raise OptionError(
                f"{name!r} is neither a tpfuse option (those start with 'tpfuse.') nor a setting of torch._inductor.config"
                f"{prefix_hint([name])}"
            )
    if not patches.get(POST_GRAD, compat.inductor_config(POST_GRAD, True)):
        raise OptionError(
            f"{POST_GRAD} is off{f' in mode {mode!r}' if mode else ''}, so Inductor would never run tpfuse's pass; "
            "use another mode, or options={'tpfuse.inner': 'aot_eager'}"
        )
    previous = patches.get(PRE_PASS, compat.inductor_config(PRE_PASS))
    mounted = _InductorPass(parsed, training, previous)
    patches[PRE_PASS] = mounted
    digest = _report_key(gm, inputs, mounted.identity, patches)
    compiled = compat.compile_fx(gm, inputs, patches)
    if mounted.reports:
        store.save(digest, mounted.reports)
        return compiled
    kept = store.load(digest)
    if kept is not None:
        for report in kept:
            store.add(replace(report, graph_id=next_graph_id(), rank=compat.rank()))
        return compiled
    # A cache supplied the graph, but the report of the compile that filled it is gone: compile once more without caches.
    log.info("compile cache hit without a kept report; compiling again to make one")
    with compat.without_compile_caches():
        compiled = compat.compile_fx(gm, inputs, patches)
    store.save(digest, mounted.reports)
    return compiled


def _report_key(gm: GraphModule, inputs: Sequence[Any], identity: Any, patches: dict[str, Any]) -> str:
    """What a report depends on: the graph, its inputs, our identity, and this rank's view of the groups.

    The rank itself is left out: ranks of one group that share a cache folder then share the report too.
    """
    shapes = [
        (tuple(str(n) for n in x.shape), str(x.dtype), str(x.device)) if isinstance(x, torch.Tensor) else str(type(x))
        for x in inputs
    ]
    settings = sorted((k, str(v)) for k, v in patches.items() if k != PRE_PASS)
    return store.key([gm.code, shapes, identity, settings, compat.known_groups()])


def _tensorrt(
    gm: GraphModule, inputs: Sequence[Any], parsed: Options, mode: str | None, training: bool
) -> Callable[..., Any]:
    from tpfuse import tensorrt  # lazily: torch-tensorrt is an extra

    return tensorrt.compile(gm, inputs, parsed, _run_pass)


_MOUNTS: dict[str, Callable[..., Callable[..., Any]]] = {
    "inductor": _inductor,
    "aot_eager": _aot,
    "eager": _aot,
    "tensorrt": _tensorrt,
}
