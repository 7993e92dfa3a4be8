"""``aot_eager`` and ``eager`` as inner compilers: the rewritten ATen graph runs as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from tpfuse import compat
from tpfuse.options import OptionError, Options, prefix_hint

from .run_pass import run_pass, run_pass_inside


def compile(
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
        run_pass(graph, parsed, training=False)
        run_pass_inside(graph, parsed)
        return run(graph)

    def forward(graph: GraphModule, _: Any) -> Callable[..., Any]:
        run_pass(graph, parsed, training=True)
        return run(graph)

    def backward(graph: GraphModule, _: Any) -> Callable[..., Any]:
        return run(graph)

    compiler = compat.aot_autograd(fw_compiler=forward, bw_compiler=backward, inference_compiler=inference)
    return compiler(gm, inputs)
