"""The ``torch.compile`` backend: options in, inner compiler out.

``torch.compile(model, backend="tpfuse")`` finds :func:`tpfuse` through the entry point group ``torch_dynamo_backends``. The
pass is mounted where each inner compiler (:mod:`tpfuse.inner`) has a functional ATen graph in hand; one rewriter serves all.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule

import tpfuse as package
from tpfuse import breaks, compat, ends, no_graph, rollback, store, unfused, wrappers
from tpfuse.inner import compiler
from tpfuse.inner.inductor import graph_pass, set_batch_invariant
from tpfuse.inspect import dump
from tpfuse.options import OptionError, Options, parse
from tpfuse.parallel import comparison
from tpfuse.passes import GraphReport

__all__ = ["graph_pass", "tpfuse"]

log = logging.getLogger("tpfuse")
no_graph.watch()  # this file is loaded when torch.compile looks the backend up


@store.forgotten_on_failure()  # of the comparison too: what failed there will not run, so no report may say that it fused
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
        AgreementError: another rank did not compile the graph in time. Ranks that decide differently about it are no error: what
            they disagree about is left as it was.
    """
    parsed = parse(options)
    if unknown:
        raise OptionError(f"tpfuse takes mode= and options=; it was given {', '.join(sorted(unknown))}")
    set_batch_invariant(parsed)
    specialise_floats(gm)
    training = torch.is_grad_enabled() and any(
        isinstance(x, torch.Tensor) and x.requires_grad for x in (*example_inputs, *gm.parameters())
    )
    inputs = list(example_inputs)
    spare = _spare(gm) if comparison.has_peers() else gm

    def run(graph: GraphModule, chosen: Options) -> tuple[Callable[..., Any], list[GraphReport]]:
        before = {id(report) for report in store.reports()}
        made = compiler(chosen.inner)(graph, list(inputs), chosen, mode or chosen.mode, training)
        return made, [report for report in store.reports() if id(report) not in before]

    try:
        compiled, new = run(gm, parsed)
    except TypeError as error:
        if UNHASHABLE not in str(error):
            raise
        return _as_captured(gm, training)
    # Here, and not at the first call: nothing of the graph has run yet, and a call stays as cheap as it is.
    refused = comparison.compare(new, f"tpfuse {package.__version__}, {parsed.decisive()}", ends.origin_of(gm))
    if refused:

        def again(said: dict[tuple[int, ...], str]) -> tuple[Callable[..., Any], list[GraphReport]]:
            compat.forget_traced_regions()
            return run(spare, replace(parsed, refused=said))

        compiled, new = rollback.roll_back(compiled, new, refused, again)
    ends.look(new, gm, parsed.policy, parsed.fuel)
    unfused.look(new, parsed.policy, parsed.fuel)
    breaks.look(new, gm, parsed.policy)
    wrappers.look(new, example_inputs)
    for report in new:
        dump.correct(report)
    return compiled


def _spare(gm: GraphModule) -> GraphModule:
    """A copy of the graph in case that it must be compiled again: a compiler may edit the one that it is given.

    What cannot be copied serves itself. Compilers that edit it leave a graph that computes the same.
    """
    try:
        return compat.copy_of(gm)
    except Exception as error:
        log.debug("a graph could not be copied: %s: %s", type(error).__name__, error)
        return gm


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
