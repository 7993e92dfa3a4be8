"""A graph as readable Python: one statement a node, shapes as annotations, the model's source lines as comments.

``GraphModule.print_readable`` is close, but some of its output does not parse (script objects, devices, infinities),
and a dump that cannot be parsed cannot be compared by tools.
"""

from __future__ import annotations

import ast
import keyword
import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from tpfuse.passes import source as model_source

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "b8",
    torch.uint8: "u8",
    torch.int8: "i8",
}


def graph_of(graph: GraphModule | Graph) -> Graph:
    """The graph itself; the module around it is only needed for nested graphs."""
    return graph.graph if isinstance(graph, GraphModule) else graph


def python(graph: GraphModule | Graph, marks: Mapping[str, str] | None = None) -> str:
    """The graph as Python that parses.

    Args:
        graph: what to print; nested graphs become functions of their own.
        marks: a comment for some nodes, by node name: which reduction starts here and what happened to it.
    """
    parts = [_function(graph_of(graph), "forward", marks or {})]
    owner = graph if isinstance(graph, GraphModule) else graph.owning_module
    for name, child in () if owner is None else owner.named_children():
        if isinstance(child, GraphModule):
            parts.append(_function(child.graph, _identifier(name), {}))
    return "import operator\nfrom math import inf, nan\n\nimport torch\n\n\n" + "\n\n".join(parts)


def statement(node: Node) -> str:
    """One node as one line of Python, e.g. ``add: "bf16[8, 4096]" = torch.ops.aten.add.Tensor(a, b)``."""
    if node.op == "output":
        return f"return {_expression(node.args[0])}"
    note = annotation(node)
    target = f'{_identifier(node.name)}: "{note}"' if note else _identifier(node.name)
    return f"{target} = {_call(node)}"


def annotation(node: Node) -> str:
    """dtype and shape in short form, e.g. ``bf16[8, 4096]``; a tuple of them for several outputs; else empty."""
    return _annotation(node.meta.get("val"))


def _function(graph: Graph, name: str, marks: Mapping[str, str]) -> str:
    arguments, lines, last = ["self"], [], None
    for node in graph.nodes:
        if node.op == "placeholder":
            note = annotation(node)
            arguments.append(f'{_identifier(node.name)}: "{note}"' if note else _identifier(node.name))
            continue
        if node.name in marks:
            lines += ["", f"    # {_comment(marks[node.name])}"]
        source = model_source.of(node)
        if str(source) and source != last:
            lines.append(f"    # {source}: {_comment(source.text)}" if source.text else f"    # {source}")
            last = source
        lines.append(f"    {statement(node)}")
    signature = "".join(f"    {argument},\n" for argument in arguments)
    return f"def {name}(\n{signature}):\n" + "\n".join(lines or ["    pass"]) + "\n"


def _call(node: Node) -> str:
    arguments = [_expression(a) for a in node.args]
    arguments += [f"{name}={_expression(value)}" for name, value in node.kwargs.items()]
    if node.op == "get_attr":
        return _attribute("self", str(node.target))
    if node.op == "call_method":
        return f"{arguments[0]}.{node.target}({', '.join(arguments[1:])})"
    if node.op == "call_module":
        return f"{_attribute('self', str(node.target))}({', '.join(arguments)})"
    return f"{_target(node.target)}({', '.join(arguments)})"


def _target(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return f"torch.ops.{target}"
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"torch.ops.higher_order.{_identifier(target.name())}"
    module, name = getattr(target, "__module__", "") or "", getattr(target, "__qualname__", "") or ""
    dotted = f"{module.lstrip('_')}.{name}" if module in ("_operator", "operator") else f"{module}.{name}"
    return dotted if _parses(dotted) else repr(repr(target))


def _attribute(owner: str, path: str) -> str:
    for part in path.split("."):
        plain = part.isidentifier() and not keyword.iskeyword(part)
        owner = f"{owner}.{part}" if plain else f"getattr({owner}, {part!r})"
    return owner


def _expression(value: Any) -> str:
    """Python for one argument; what has no literal becomes a string, so that the file always parses."""
    if isinstance(value, Node):
        return _identifier(value.name)
    if isinstance(value, tuple):
        return f"({', '.join(map(_expression, value))}{',' if len(value) == 1 else ''})"
    if isinstance(value, list):
        return f"[{', '.join(map(_expression, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k!r}: {_expression(v)}" for k, v in value.items()) + "}"
    if isinstance(value, slice):
        return f"slice({_expression(value.start)}, {_expression(value.stop)}, {_expression(value.step)})"
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, str):
        return repr(value)
    plain = isinstance(value, torch.dtype | torch.layout | torch.memory_format | torch.SymInt)
    text = str(value) if plain else repr(value)
    return text if _parses(text) else repr(text)


def _annotation(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        dtype = _DTYPES.get(value.dtype, str(value.dtype).removeprefix("torch."))
        return f"{dtype}[{', '.join(str(size) for size in value.shape)}]"
    if isinstance(value, tuple | list) and value:
        return ", ".join(filter(None, (_annotation(item) for item in value)))
    if isinstance(value, torch.SymInt | torch.SymFloat):
        return f"{type(value).__name__}({value})"
    return ""


def _identifier(name: str) -> str:
    name = re.sub(r"\W", "_", name)
    return f"_{name}" if not name.isidentifier() or keyword.iskeyword(name) else name


def _comment(text: str) -> str:
    return " ".join(text.split())


def _parses(text: str) -> bool:
    try:
        ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    return True
