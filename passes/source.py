"""Where in the model a node comes from: the one place that reads stack traces.

A trace leads from the compiled function inwards. The innermost frames are those of torch, and of whatever wraps the model
for tensor parallelism; a reader wants the line of the model that they were called from.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass

from torch.fx import Node

# Packages whose frames are not the model's, each with the folder inside it that holds models nonetheless.
LIBRARIES = {
    "torch": None,
    "functorch": None,
    "tpfuse": None,
    "tpfuse.ops": None,
    "tpfuse.passes": None,
    "transformers": "models/",
    "accelerate": None,
    "deepspeed": None,
    "fairscale": None,
    "vllm": "model_executor/models/",
}
INSTALLED = re.compile(
    r".*/(?:site|dist)-packages/(?:" + "|".join(f"({name})/" for name in LIBRARIES if "." not in name) + ")"
)
GENERATED = re.compile(r"^<(?:eval_with_key|frozen |string>)|/contextlib\.py$|/functools\.py$|/typing_extensions\.py$")
FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
LAYER = re.compile(r"(?<=\.)\d+(?=\.|$)")


@dataclass(frozen=True)
class Source:
    """What a node was made by.

    Attributes:
        file: of the line, below site-packages where it lies there; empty where only the module is known.
        line: its number, or 0.
        text: the line itself, or empty when the trace does not hold it.
        module: the path of the module whose forward made the node, e.g. ``model.layers.3.mlp``; known without a file only.
    """

    file: str = ""
    line: int = 0
    text: str = ""
    module: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.file else self.module


def of(node: Node) -> Source:
    """The innermost line that belongs to the model, else the module, else the innermost line; ``str()`` may be empty."""
    frames = list(_frames(node.meta.get("stack_trace") or ""))
    folders = _folders()
    mine = next((frame for frame in reversed(frames) if not _in_library(frame.file, folders)), None)
    if mine is None and (module := module_path(node).removeprefix("L.").strip(".")):
        return Source(module=module)
    found = mine or (frames[-1] if frames else Source())
    return Source(re.split(r"(?:site|dist)-packages/", found.file)[-1], found.line, found.text)


def is_library(file: str) -> bool:
    """Whether a file is of a library that wraps models, and not the model's own."""
    return _in_library(file, _folders())


def short(source: str) -> str:
    """``modeling_llama.py:312`` of a ``file:line``; a module's path stays as it is."""
    return source.rsplit("/", 1)[-1]


def without_layer(source: str) -> str:
    """The same for every layer of a model: ``model.layers.*.mlp`` of a module's path; a ``file:line`` stays as it is."""
    return source if ":" in source else LAYER.sub("*", source)


def module_path(node: Node) -> str:
    """The module stack of a node as one dotted path, e.g. ``.model.layers.3.mlp``; empty where the graph has none."""
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    last = list(stack.values())[-1]
    path = last[0] if isinstance(last, tuple) else str(last)
    path = re.sub(r"_modules\['([^']+)'\]|\['([^']+)'\]", r".\1\2", str(path))
    path = re.sub(r"\[(\d+)\]", r".\1", re.sub(r"\.\.+", ".", path))
    # Dynamo names the compiled module L['self'], or L['args'][0] when its forward is wrapped.
    return re.sub(r"^L\.(?:self|args\.\d+)(?=\.|$)", "", path)


def _frames(trace: str) -> Iterator[Source]:
    lines = trace.splitlines()
    for number, line in enumerate(lines):
        frame = FRAME.search(line)
        if frame is not None:
            after = lines[number + 1].strip() if number + 1 < len(lines) else ""
            yield Source(frame["file"], int(frame["line"]), "" if FRAME.search(after) else after)


def _folders() -> list[tuple[str, str | None]]:
    """The folders of the libraries that this process has loaded, wherever they lie: a checkout of torch, say."""
    found = []
    for name, models in LIBRARIES.items():
        file = getattr(sys.modules.get(name), "__file__", None)
        if file:
            found.append((file.rsplit("/", 1)[0] + "/", models))
    return found


def _in_library(file: str, folders: list[tuple[str, str | None]]) -> bool:
    """Never by a name anywhere in the path: a checkout may lie in a folder named ``tpfuse`` or ``torch``."""
    if GENERATED.search(file):
        return True
    for folder, models in folders:
        if file.startswith(folder):
            return models is None or not file.startswith(models, len(folder))
    installed = INSTALLED.match(file)  # a trace of another process, as an exported program holds
    if installed is None:
        return False
    models = LIBRARIES[installed[installed.lastindex or 0]]
    return models is None or not file.startswith(models, installed.end())
