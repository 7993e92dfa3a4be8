"""One canary for each private torch API that tpfuse touches: when a release moves one, its test names it.

All private names live in ``tpfuse/compat.py``; the last tests keep it so.
"""

from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from graphs import start_fake_group
from torch.fx import symbolic_trace

from tpfuse import compat

PACKAGE = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def group():
    start_fake_group(4)
    yield
    dist.destroy_process_group()


def captured(f: Any, *args: Any, look: Any, **kw: Any) -> Any:
    """What ``look`` returns for the graph that Dynamo hands to a backend, while the compile is under way."""
    seen: list[Any] = []

    def backend(gm: Any, inputs: Any) -> Any:
        seen.append(look(gm))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(f, backend=backend, **kw)(*args)
    return seen[0]


def test_resolve_group():
    world = dist.group.WORLD
    assert compat.resolve_group(world.group_name) is world
    assert compat.resolve_group(world) is world
    with pytest.raises(Exception, match="no-such-group"):
        compat.resolve_group("no-such-group")


def test_known_groups():
    pair = dist.new_group([0, 1])
    known = compat.known_groups()
    assert known[0] == (dist.group.WORLD.group_name, (0, 1, 2, 3))
    assert (pair.group_name, (0, 1)) in known


def test_rank():
    assert compat.rank() == 0


def test_statically_true():
    assert compat.statically_true(True)
    assert not compat.statically_true(False)
    seen: list[Any] = []

    def backend(gm: Any, inputs: Any) -> Any:
        size = next(x for x in inputs if isinstance(x, torch.SymInt))
        seen.append((compat.statically_true(size + 1 > size), compat.statically_true(size == 7)))
        return gm.forward

    torch._dynamo.reset()
    f = torch.compile(lambda x: x + x.shape[0], backend=backend, dynamic=True)
    f(torch.ones(7))
    f(torch.ones(9))
    assert seen == [(True, False)], "asking must not add a guard"


def test_size_hint():
    assert compat.size_hint(3) == 3


def test_is_erased():
    graph = symbolic_trace(lambda x: x + 1).graph
    node = next(n for n in graph.nodes if n.op == "call_function")
    assert not compat.is_erased(node)
    node.replace_all_uses_with(next(iter(graph.nodes)))
    graph.erase_node(node)
    assert compat.is_erased(node)


def test_without_fake_mode():
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    with FakeTensorMode():
        assert isinstance(torch.ones(1), FakeTensor)
        with compat.without_fake_mode():
            assert not isinstance(torch.ones(1), FakeTensor)


def test_custom_graph_pass():
    base = compat.custom_graph_pass()
    assert {"__call__", "uuid"} <= set(base.__abstractmethods__)


def test_custom_passes():
    assert compat.custom_passes(None) == ()
    assert compat.custom_passes("one") == ("one",)
    assert compat.custom_passes(["one", "two"]) == ("one", "two")


def test_wants_inference_flag():
    assert not compat.wants_inference_flag(lambda graph: None)
    module = inspect.getmodule(compat.custom_graph_pass())
    aware = getattr(module, "CustomInferenceAwareGraphPass", None)
    if aware is None:
        pytest.skip(f"torch {torch.__version__} has no inference-aware passes")
    made = type("Aware", (aware,), {"__call__": lambda *a: None, "uuid": lambda self: "a"})()
    assert compat.wants_inference_flag(made)


def test_inductor_config():
    assert compat.inductor_config("post_grad_custom_pre_pass") is None
    assert compat.inductor_config("use_post_grad_passes") is True
    assert compat.inductor_config("no_such_setting", "default") == "default"


def test_inductor_settings():
    known = compat.inductor_settings()
    assert {"post_grad_custom_pre_pass", "use_post_grad_passes", "max_autotune", "triton.cudagraphs"} <= set(known)


def test_inductor_mode_options():
    assert compat.inductor_mode_options(None) == {}
    assert compat.inductor_mode_options("reduce-overhead") == {"triton.cudagraphs": True}


def test_compile_fx():
    ran: list[int] = []

    class Pass(compat.custom_graph_pass()):  # type: ignore[misc]
        def __call__(self, graph: Any) -> None:
            ran.append(len(graph.nodes))

        def uuid(self) -> None:
            return None

    def backend(gm: Any, inputs: Any) -> Any:
        return compat.compile_fx(gm, inputs, {"post_grad_custom_pre_pass": Pass()})

    torch._dynamo.reset()
    x = torch.ones(4, 4)
    with torch.no_grad():
        assert torch.equal(torch.compile(lambda x: x @ x, backend=backend)(x), x @ x)
    assert len(ran) == 1, "Inductor must run the pass of one compile"
    assert compat.inductor_config("post_grad_custom_pre_pass") is None


def test_without_compile_caches():
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    before = functorch.enable_autograd_cache, inductor.fx_graph_cache
    with compat.without_compile_caches():
        assert (functorch.enable_autograd_cache, inductor.fx_graph_cache) == (False, False)
    assert (functorch.enable_autograd_cache, inductor.fx_graph_cache) == before


def test_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    assert compat.cache_folder() == str(tmp_path)


def test_aot_autograd():
    seen: list[str] = []

    def inference(gm: Any, _: Any) -> Any:
        seen.extend(str(n.target) for n in gm.graph.nodes if n.op == "call_function")
        return compat.boxed(gm.forward)

    compiler = compat.aot_autograd(fw_compiler=inference, inference_compiler=inference)
    torch._dynamo.reset()

    def f(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        dist.all_reduce(y)
        return y

    with torch.no_grad():
        torch.compile(f, backend=compiler)(torch.ones(2))
    assert "_c10d_functional.all_reduce.default" in seen
    assert "_c10d_functional.wait_tensor.default" in seen


def test_boxed():
    function = compat.boxed(lambda x: x)
    assert function._boxed_call
    assert function([3]) == 3


def test_dynamo_backend_names():
    assert {"inductor", "tpfuse"} <= set(compat.dynamo_backend_names())


def test_decomposition_overrides():
    op = torch.ops.aten.silu.default
    assert op in compat.decomposition_overrides([op])


class Scaled(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.factor = 0.5

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def test_guarded_float():
    def look(gm: Any) -> list[float]:
        symbols = [n.meta["example_value"] for n in gm.graph.nodes if n.op == "call_method" and n.target == "item"]
        return [compat.guarded_float(s) for s in symbols if isinstance(s, torch.SymFloat)]

    found = captured(Scaled(), torch.ones(3), look=look, dynamic=True)
    assert found in ([0.5], []), "an empty list: this torch keeps a module's floats constant"


def test_source_name():
    def look(gm: Any) -> list[str]:
        sources = [getattr(n.meta.get("grapharg"), "source", None) for n in gm.graph.nodes if n.op == "placeholder"]
        return [compat.source_name(source) for source in sources if source is not None]

    assert "L['x']" in captured(Scaled(), torch.ones(3), look=look, dynamic=True)


def test_in_compiled_module():
    class Asks(torch.nn.Module):
        def forward(self, x):
            torch._dynamo.graph_break()
            return x + inside()

    @torch.compiler.disable
    def inside():
        return float(compat.in_compiled_module())

    assert not compat.in_compiled_module()
    assert torch.compile(Asks(), backend="eager")(torch.zeros(1)).item() == 1.0


# -- the list is complete --------------------------------------------------------------------------------------------


def test_every_name_has_a_canary():
    names = [name for name, f in inspect.getmembers(compat, inspect.isfunction) if f.__module__ == compat.__name__]
    missing = [name for name in names if f"test_{name}" not in globals()]
    assert not missing, f"compat.py has no canary for {missing}"


PRIVATE = re.compile(r"^(torch(\.\w+)*\._\w+|functorch)")
# Public for custom operators and passes although the name begins with an underscore.
ALLOWED = {"torch._ops.OpOverload", "torch._ops"}


def private_imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and PRIVATE.match(node.module):
            found.add(f"{path.name}: from {node.module}")
        elif isinstance(node, ast.Import):
            found |= {f"{path.name}: import {a.name}" for a in node.names if PRIVATE.match(a.name)}
    return found


def test_the_backend_and_the_pass_import_nothing_private():
    files = [*(PACKAGE / "passes").glob("*.py"), *(PACKAGE / "tpfuse").glob("*.py")]
    found = set().union(*(private_imports(path) for path in files if path.name != "compat.py"))
    assert not found, "private torch APIs belong in tpfuse/compat.py"
