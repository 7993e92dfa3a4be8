"""TensorRT as inner compiler: our rewrite first, then Torch-TensorRT, with the fused op left in Torch between engines.

``options={"tpfuse.inner": "tensorrt"}``; every other option is a setting of Torch-TensorRT. The extra ``tpfuse[tensorrt]``
installs it; nothing of it is imported before it is asked for.
"""

from __future__ import annotations

import importlib
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch.fx import GraphModule, Node

from tpfuse import compat
from tpfuse.inner.run_pass import run_pass
from tpfuse.options import OptionError, Options, prefix_hint

ENGINE = "_run_on_acc"  # Torch-TensorRT names the submodules so that become engines

# Torch-TensorRT decomposes rsqrt to 1 / sqrt although it has a converter for rsqrt. The pass runs after decomposition, and
# that spelling rounds otherwise than the model's own: kept whole, the fused op has the bits of the other inner compilers.
KEPT_WHOLE = (torch.ops.aten.rsqrt,)

COLLECTIVE = "tensorrt.fused_nccl_"  # how the collectives that Torch-TensorRT has fused with their wait begin


@dataclass(frozen=True)
class Partition:
    """What Torch-TensorRT made of one graph.

    Attributes:
        engines: names of the submodules that are engines, in graph order.
        in_torch: operators that run in Torch, with how often.
        boundaries: how often the graph changes from an engine to Torch or back.
    """

    engines: tuple[str, ...]
    in_torch: dict[str, int]
    boundaries: int

    def describe(self) -> str:
        """One line for a report."""
        ops = ", ".join(f"{name} x{n}" for name, n in sorted(self.in_torch.items())) or "nothing"
        return f"tensorrt: {len(self.engines)} engines, {self.boundaries} boundaries; in Torch: {ops}"


def compile(
    gm: GraphModule,
    inputs: Sequence[Any],
    parsed: Options,
    mode: str | None = None,
    training: bool = False,
) -> Callable[..., Any]:
    """Compile one Dynamo graph with Torch-TensorRT.

    Args:
        gm, inputs: as a backend gets them.
        parsed: our options; ``parsed.inner_options`` are settings of Torch-TensorRT.
        mode, training: not used: Torch-TensorRT has no modes, and AOTAutograd says which graphs train.
    Raises:
        ImportError: torch-tensorrt is not installed or does not load.
        OptionError: a setting that Torch-TensorRT does not have.
    """
    trt = load()
    settings, engine_cache = _settings(trt, parsed.inner_options)

    def inference(graph: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        report = run_pass(graph, parsed, training=False)
        if any(isinstance(x, torch.SymInt) for x in example_inputs):
            report.notes.append("tensorrt: dynamic shapes; the whole graph runs in Torch, compile with dynamic=False")
            return compat.boxed(graph.forward)
        compiled, kept = _engines(trt, graph, example_inputs, settings, engine_cache)
        if kept:
            names = ", ".join(sorted(map(str, kept)))
            report.notes.append(f"tensorrt: {names} stay in Torch, where their groups are only a part of the ranks")
        report.notes.append(partition_of(compiled).describe())
        return compat.boxed(compiled.forward)

    def forward(graph: GraphModule, _: Any) -> Callable[..., Any]:
        run_pass(graph, parsed, training=True)
        return compat.boxed(graph.forward)

    def backward(graph: GraphModule, _: Any) -> Callable[..., Any]:
        return compat.boxed(graph.forward)

    compiler = compat.aot_autograd(
        fw_compiler=forward,
        bw_compiler=backward,
        inference_compiler=inference,
        decompositions=_decompositions(trt, settings),
    )
    return compiler(gm, inputs)


def load() -> Any:
    """The parts of Torch-TensorRT that are used here. Raises ``ImportError`` saying what to install."""
    try:
        importlib.import_module("torch_tensorrt")
    except ModuleNotFoundError as error:
        missing = error.name or "torch_tensorrt"
        raise ImportError(
            f"tpfuse.inner='tensorrt' needs torch-tensorrt and TensorRT; the module {missing!r} is not installed. "
            "Run: pip install 'tpfuse[tensorrt]'"
        ) from error
    except Exception as error:  # Torch-TensorRT raises a bare Exception when TensorRT's libraries do not load
        raise ImportError(
            f"tpfuse.inner='tensorrt': torch-tensorrt is installed but does not load: {error}. It must fit torch "
            f"{torch.__version__}, and TensorRT's libraries must be found; reinstall with: pip install 'tpfuse[tensorrt]'"
        ) from error

    def attribute(module: str, name: str) -> Any:
        return getattr(importlib.import_module(f"torch_tensorrt.{module}"), name)

    return SimpleNamespace(
        CompilationSettings=attribute("dynamo", "CompilationSettings"),
        compile_module=attribute("dynamo._compiler", "compile_module"),
        get_decompositions=attribute("dynamo.lowering", "get_decompositions"),
        parse_dynamo_kwargs=attribute("dynamo.utils", "parse_dynamo_kwargs"),
        post_lowering=attribute("dynamo.lowering", "post_lowering"),
        prepare_inputs=attribute("dynamo.utils", "prepare_inputs"),
    )


def _settings(trt: Any, given: dict[str, Any]) -> tuple[Any, Any]:
    """Torch-TensorRT's settings and engine cache. It ignores names that it does not know; here they are errors."""
    known = {f.name for f in fields(trt.CompilationSettings)}
    unknown = sorted(set(given) - known)
    if unknown:
        raise OptionError(
            f"{', '.join(map(repr, unknown))}: neither a tpfuse option (those start with 'tpfuse.') nor a setting of "
            f"Torch-TensorRT; its settings are {', '.join(sorted(known))}{prefix_hint(unknown)}"
        )
    settings, engine_cache = trt.parse_dynamo_kwargs({"options": {"use_distributed_mode_trace": True, **given}})
    return settings, engine_cache


def _decompositions(trt: Any, settings: Any) -> dict[Any, Callable[..., Any]]:
    """Torch-TensorRT's decompositions without those that would hide a norm or that AOTAutograd does itself."""
    table = dict(trt.get_decompositions(getattr(settings, "enable_experimental_decompositions", False)))
    for op in list(table):
        packet = getattr(op, "overloadpacket", op)
        # Its own distributed path drops detach as well: the decomposed form returns an alias of its input.
        if packet in KEPT_WHOLE or packet is torch.ops.aten.detach:
            del table[op]
    return table


def _engines(
    trt: Any, graph: GraphModule, inputs: Sequence[Any], settings: Any, engine_cache: Any
) -> tuple[GraphModule, set[Any]]:
    """Torch-TensorRT's lowering passes, partitioning and engines, and the collectives that were kept out of engines.

    A failure to build is raised, not swallowed.
    """
    lowered = trt.post_lowering(graph, settings)
    kept = over_a_part(lowered)
    if kept:
        settings = replace(settings, torch_executed_ops={*settings.torch_executed_ops, *kept})
    tensors = [x for x in inputs if isinstance(x, torch.Tensor)]
    prepared = trt.prepare_inputs(tensors, disable_memory_format_check=True)
    return trt.compile_module(lowered, prepared, settings=settings, engine_cache=engine_cache), kept


def over_a_part(graph: GraphModule) -> set[Any]:
    """The collective operators of a lowered graph that some node calls over a group other than all ranks.

    They must not become part of an engine. Torch-TensorRT's converters for collectives take all ranks of
    ``torch.distributed`` as the group (``dynamo/conversion/impl/nccl_ops.py``) and drop the name that the node carries, so
    an engine would add up the wrong ranks without a word. Torch runs the same operators over the group that they name.
    """
    everyone = list(range(dist.get_world_size())) if dist.is_initialized() else []
    found = set()
    for node in graph.graph.nodes:
        if node.op == "call_function" and str(node.target).startswith(COLLECTIVE):
            group = compat.resolve_group(node.args[-1])  # the last argument of each of them
            if dist.get_process_group_ranks(group) != everyone:
                found.add(node.target)
    return found


def partition_of(compiled: GraphModule) -> Partition:
    """Read engines and Torch parts off what Torch-TensorRT returned, in a dry run as well."""
    engines: list[str] = []
    in_torch: Counter[str] = Counter()
    kinds: list[bool] = []  # in graph order: whether it is an engine
    for node in compiled.graph.nodes:
        if node.op == "call_module" and ENGINE in str(node.target):
            engines.append(str(node.target))
            kinds.append(True)
            continue
        names = _torch_ops(compiled, node)
        in_torch.update(names)
        if names:
            kinds.append(False)
    boundaries = sum(a != b for a, b in itertools.pairwise(kinds))
    return Partition(tuple(engines), dict(in_torch), boundaries)


def _torch_ops(compiled: GraphModule, node: Node) -> list[str]:
    """The operators that one node of the partitioned graph runs in Torch; picking an output of another node is none."""
    if node.op == "call_module":
        inner = compiled.get_submodule(str(node.target))
        nodes = list(inner.graph.nodes) if isinstance(inner, GraphModule) else []
        return [name for n in nodes if n.op == "call_function" for name in _op_name(n)]
    return _op_name(node) if node.op == "call_function" else []


def _op_name(node: Node) -> list[str]:
    target = node.target
    return [str(target)] if isinstance(target, torch._ops.OpOverload) else []
