"""The source of a reduction is a line of the model: not of torch, nor of what wraps the model for tensor parallelism."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import graphs
import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as funcol
from torch import Tensor, nn
from torch.fx import Graph, Node
from tpfuse.passes import source

import tpfuse

H = 32
TORCH = str(Path(torch.__file__).parent)
SITE = TORCH.removesuffix("/torch")
HOOKS = (
    f'  File "{SITE}/transformers/integrations/tensor_parallel.py", line 141, in <lambda>\n    x = self._prepare(x)',
    f'  File "{TORCH}/distributed/_functional_collectives.py", line 179, in all_reduce\n    tensor = torch.ops(',
)


@pytest.fixture(autouse=True, scope="module")
def fake_group():
    graphs.start_fake_group(2)
    yield
    dist.destroy_process_group()


@torch.no_grad()
def sources(model: nn.Module, *inputs: Any) -> list[str]:
    torch._dynamo.reset()
    options = {"tpfuse.inner": "aot_eager", "tpfuse.policy": "all"}
    torch.compile(model, backend="tpfuse", dynamic=False, options=options)(*inputs)
    return [site.source for site in tpfuse.reports()[-1].sites]


def line_of(function: Callable[..., Any], text: str) -> str:
    """``file:line`` of the line of a function that holds a text."""
    lines, first = inspect.getsourcelines(function)
    (found,) = [first + i for i, line in enumerate(lines) if text in line]
    return f"{inspect.getsourcefile(inspect.unwrap(function))}:{found}"


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 2
        dist.all_reduce(y)
        return nn.functional.rms_norm(y, (H,))


class Functional(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(funcol.all_reduce(x * 2, "sum", dist.group.WORLD), (H,))


class Plain(nn.Module):
    """Knows nothing of ranks: DTensor's hooks reduce."""

    def __init__(self) -> None:
        super().__init__()
        self.o_proj = nn.Linear(H, H, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.o_proj(x)
        return nn.functional.rms_norm(x + y, (H,))


def test_dist_all_reduce_in_a_module():
    assert sources(InPlace(), torch.randn(2, H)) == [line_of(InPlace.forward, "dist.all_reduce")]


def test_a_functional_all_reduce_in_a_module():
    assert sources(Functional(), torch.randn(2, H)) == [line_of(Functional.forward, "funcol.all_reduce")]


def test_dtensor_names_the_call_of_the_sharded_module():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import RowwiseParallel, parallelize_module

    plan = {"o_proj": RowwiseParallel(input_layouts=Replicate())}
    model = parallelize_module(Plain().requires_grad_(False), init_device_mesh("cpu", (2,)), plan)
    assert sources(model, torch.randn(2, H)) == [line_of(Plain.forward, "self.o_proj(x)")]


@pytest.mark.long
def test_a_transformers_model_names_its_own_lines(tmp_path, monkeypatch):
    pytest.importorskip("transformers", reason="needs the extra tpfuse[hf]")
    import models
    from transformers.models.llama import modeling_llama as llama

    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    models.save("llama", str(tmp_path), num_hidden_layers=1)
    found = sources(models.sharded(str(tmp_path), 2), torch.arange(4)[None])
    lines = [
        line_of(llama.LlamaModel.forward, "self.embed_tokens("),
        line_of(llama.LlamaAttention.forward, "self.o_proj("),
        line_of(llama.LlamaMLP.forward, "self.down_proj("),
    ]
    assert [source.short(s) for s in found] == [source.short(line) for line in lines]
    assert source.short(lines[0]).startswith("modeling_llama.py:")


# -- traces by hand ------------------------------------------------------------------------------------------------------


def node(*frames: str, module: str | None = None) -> Node:
    made = Graph().placeholder("x")
    made.meta["stack_trace"] = "\n".join(frames)
    if module is not None:
        made.meta["nn_module_stack"] = {"1": ("L['self']", nn.Module), "2": (module, nn.Linear)}
    return made


def frame(file: str, line: int = 7) -> str:
    return f'  File "{file}", line {line}, in forward\n    y = self.o_proj(x)\n        ^^^^^^^^^^^^^^'


@pytest.mark.parametrize(
    ("file", "shown"),
    [
        ("/home/me/model.py", "/home/me/model.py"),
        ("/home/me/tpfuse/examples/model.py", "/home/me/tpfuse/examples/model.py"),
        ("/srv/torch/accelerate/model.py", "/srv/torch/accelerate/model.py"),
        (f"{SITE}/transformers/models/llama/modeling_llama.py", "transformers/models/llama/modeling_llama.py"),
        ("/x/tpfuse/.venv/lib/python3.12/site-packages/transformers/models/a/b.py", "transformers/models/a/b.py"),
        ("/x/dist-packages/vllm/model_executor/models/llama.py", "vllm/model_executor/models/llama.py"),
        ("/hf/modules/transformers_modules/a/modeling.py", "/hf/modules/transformers_modules/a/modeling.py"),
        ("/tmp/ipykernel_7/1234.py", "/tmp/ipykernel_7/1234.py"),
    ],
)  # fmt: skip
def test_the_innermost_frame_of_a_model(file, shown):
    found = source.of(node(frame("/home/me/outer.py", 3), frame(file), *HOOKS))
    assert (str(found), found.text) == (f"{shown}:7", "y = self.o_proj(x)")


@pytest.mark.parametrize(
    "file",
    [
        f"{TORCH}/nn/modules/linear.py",
        f"{Path(tpfuse.__file__).parent}/parallel/layers.py",
        f"{Path(source.__file__).parent.parent}/ops/anything.py",
        f"{SITE}/transformers/distributed/tensor_parallel.py",
        "/x/site-packages/accelerate/hooks.py",
        "/x/site-packages/deepspeed/comm/torch.py",
        "/x/site-packages/fairscale/nn/model_parallel/mappings.py",
        "/x/site-packages/vllm/distributed/communication_op.py",
        "/usr/lib/python3.12/contextlib.py",
        "<eval_with_key>.3",
    ],
)
def test_frames_of_libraries_are_passed_over(file):
    assert str(source.of(node(frame("/home/me/model.py", 3), frame(file), *HOOKS))) == "/home/me/model.py:3"


def test_the_module_where_only_frames_of_libraries_are_left():
    for module in ("L['self'].model.layers[3].mlp", "L['self']._modules['model'].layers.3.mlp", "model.layers.3.mlp"):
        found = source.of(node(*HOOKS, module=module))
        assert (str(found), found.text) == ("model.layers.3.mlp", "")
        assert source.short(str(found)) == "model.layers.3.mlp"
        assert source.without_layer(str(found)) == "model.layers.*.mlp"
    assert str(source.of(node(module="L['self'].layers[3].mlp"))) == "layers.3.mlp"


def test_a_library_in_a_checkout_of_its_own(monkeypatch):
    import types

    module = types.ModuleType("accelerate")
    module.__file__ = "/home/me/src/accelerate/__init__.py"
    monkeypatch.setitem(sys.modules, "accelerate", module)
    trace = node(frame("/home/me/model.py", 3), frame("/home/me/src/accelerate/hooks.py"))
    assert str(source.of(trace)) == "/home/me/model.py:3"


def test_without_a_module_the_innermost_frame_and_without_a_trace_nothing():
    assert str(source.of(node(*HOOKS))) == "torch/distributed/_functional_collectives.py:179"
    assert str(source.of(node())) == ""


def test_a_graph_without_traces_is_fused_and_has_no_source():
    def f(x: Tensor, residual: Tensor) -> Tensor:
        return nn.functional.rms_norm(residual + graphs.all_reduce(x), (H,))

    gm = graphs.trace(f, (torch.randn(2, H), torch.randn(2, H)))
    for n in gm.graph.nodes:
        n.meta.pop("stack_trace", None)
        n.meta.pop("nn_module_stack", None)
    (site,) = graphs.fused_copy(gm)[1].sites
    assert site.fused and site.source == ""
