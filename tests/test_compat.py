"""One canary for each private torch API that tpfuse touches: when a release moves one, its test names it.

All private names live in ``tpfuse/compat/``; the last tests keep it so.
"""

from __future__ import annotations

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from commands import run_python
from graphs import start_fake_group
from torch.fx import symbolic_trace

from tpfuse import compat

pytestmark = pytest.mark.long  # not on every save

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


def test_default_store():
    dist.destroy_process_group()
    try:
        given = dist.HashStore()
        dist.init_process_group("fake", rank=0, world_size=4, store=given)  # torch's own fake store keeps nothing
        store = compat.default_store()
        store.set("tpfuse/canary", "hello")
        store.wait(["tpfuse/canary"], timedelta(seconds=1))
        assert store.get("tpfuse/canary") == b"hello"
        assert given.num_keys() > 0, "it must be the store that the group was made over"
    finally:
        start_fake_group(4)


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


def test_inductor_modes():
    assert {"default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"} <= set(compat.inductor_modes())


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


def test_graph_break_of():
    def breaks(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2

    seen: list[Any] = []

    def backend(gm: Any, inputs: Any) -> Any:
        seen.append(compat.graph_break_of(gm))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(breaks, backend=backend)(torch.ones(2))
    first, last = seen
    assert first.reason and first.user_stack[-1].filename == __file__ and first.user_stack[-1].line
    assert last is None, "the function returns there"


def test_graph_end_of():
    def returns(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    cause = captured(returns, torch.ones(2), look=compat.graph_end_of)
    assert cause.graph_break is False
    assert cause.user_stack[0].name == "returns" and cause.user_stack[0].filename == __file__
    assert compat.graph_end_of(symbolic_trace(returns)) is None, "a graph that Dynamo did not make"


def test_is_entry_of_compiled():
    def on_the_stack(_: Any) -> list[bool]:
        frame, found = sys._getframe(), []
        while frame.f_back is not None:
            frame = frame.f_back
            found.append(compat.is_entry_of_compiled(frame.f_code))
        return found

    assert sum(captured(lambda x: x + 1, torch.ones(2), look=on_the_stack)) == 1
    assert not any(on_the_stack(None))


def named(gm: Any, inputs: Any) -> Any:
    """A backend."""
    return gm.forward


def loop(x: torch.Tensor) -> torch.Tensor:
    """What Dynamo leaves to eager: it cannot go on behind a break within a loop."""
    for _ in range(2):
        torch._dynamo.graph_break()
        x = x + 1
    return x


def noticed(look: Any, run: Any) -> None:
    """Call ``look`` at the end of each compile of ``run``."""
    from torch._dynamo.callback import callback_handler

    torch._dynamo.reset()  # takes away all hooks
    try:
        compat.at_compile_end(look)
        run()
    finally:
        callback_handler.clear()


def test_at_compile_end():
    seen: list[bool] = []

    def look() -> None:
        seen.append(True)

    def run() -> None:
        compat.at_compile_end(look)  # the same once more: it is called once
        torch.compile(lambda x: x + 1, backend=named)(torch.ones(2))

    noticed(look, run)
    assert seen == [True]


def test_given_up():
    seen: list[Any] = []

    def inside(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    def look() -> None:
        seen.append(compat.given_up())

    noticed(look, lambda: torch.compile(loop, backend=named)(torch.ones(2)))
    (left,) = seen
    assert (left.backend, left.name, left.transformed) == ("named", "loop", False)
    assert left.place.startswith(f"{__file__}:") and "graph_break" in left.reason

    seen.clear()
    noticed(look, lambda: torch.vmap(torch.compile(inside, backend=named))(torch.ones(2)))
    (left,) = seen
    assert (left.name, left.transformed) == ("inside", True)
    assert left.place == f"{__file__}:{inside.__code__.co_firstlineno}"

    def raises() -> None:
        with pytest.raises(Exception, match="graph_break"):
            torch.compile(loop, backend=named, fullgraph=True)(torch.ones(2))

    seen.clear()
    noticed(look, raises)
    noticed(look, lambda: torch.compile(lambda x: x + 1, backend=named)(torch.ones(2)))
    assert seen == [None, None]
    assert compat.given_up() is None

    def fallback() -> None:
        try:
            torch.compile(loop, backend=named, fullgraph=True)(torch.ones(3))
        except torch._dynamo.exc.Unsupported:
            torch.compile(inside, backend=named)(torch.ones(2))

    seen.clear()
    noticed(look, fallback)
    assert seen == [None, None], "what the caller handles is not what this compile ended with"


def test_trace_time_call():
    seen: list[str] = []

    def look(context: Any) -> None:
        seen.append(type(context).__name__)

    at_trace_time = compat.trace_time_call()
    calls: list[int] = []

    def backend(gm: Any, inputs: Any) -> Any:
        calls.append(sum(n.op == "call_function" for n in gm.graph.nodes))
        return gm.forward

    def f(x: torch.Tensor) -> torch.Tensor:
        at_trace_time(look)
        return x + 1

    torch._dynamo.reset()
    compiled = torch.compile(f, backend=backend, fullgraph=True)
    compiled(torch.ones(2))
    compiled(torch.ones(2))
    assert seen == ["ComptimeContext"], "once, while tracing, and not when the compiled code runs"
    assert calls == [1], "the call must leave nothing in the graph"


TRACED = """
from tpfuse import compat
compat.trace_artifact("tpfuse-canary", lambda: '{"said": "hello"}')
"""


def test_trace_artifact(tmp_path):
    subprocess.run([sys.executable, "-c", TRACED], env={**os.environ, "TORCH_TRACE": str(tmp_path)}, check=True)
    (log,) = tmp_path.glob("*.log")
    assert '"artifact": {"name": "tpfuse-canary", "encoding": "json"}' in log.read_text()
    assert '{"said": "hello"}' in log.read_text()


OFF = """
from tpfuse import compat
made = []
for i in range(3):
    compat.trace_artifact("tpfuse-canary", lambda: made.append(i) or "{}")
print(len(made))
"""


def test_trace_artifact_is_not_made_when_the_trace_is_off():
    """In a process of its own: pytest listens to torch's loggers, which turns the trace on."""
    done = run_python("-c", OFF)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= 1, "the first record of a process takes torch's own handler off"


def test_start_fake_group():
    dist.destroy_process_group()
    try:
        compat.start_fake_group(8, rank=3)
        assert (dist.get_rank(), dist.get_world_size()) == (3, 8)
        x = torch.ones(2)
        dist.all_reduce(x)
        assert x.tolist() == [1, 1], "nobody answers, and nobody is waited for"
    finally:
        start_fake_group(4)


def test_symmetric_memory_error(monkeypatch):
    assert compat.symmetric_memory_error() is None
    monkeypatch.setitem(sys.modules, "torch.distributed._symmetric_memory", None)
    assert "torch.distributed._symmetric_memory" in str(compat.symmetric_memory_error())


# -- the list is complete --------------------------------------------------------------------------------------------


def test_every_name_has_a_canary():
    parts = [module for _, module in inspect.getmembers(compat, inspect.ismodule)]
    found = [(n, f.__module__ == p.__name__) for p in parts for n, f in inspect.getmembers(p, inspect.isfunction)]
    names = [name for name, own in found if own and not name.startswith("_")]
    assert sorted(names) == sorted(compat.__all__), "compat offers what its modules define"
    missing = [name for name in names if f"test_{name}" not in globals()]
    assert not missing, f"tpfuse/compat/ has no canary for {missing}"


PRIVATE = re.compile(r"^(torch(\.\w+)*\._\w+|functorch)")
# Public although a name begins with an underscore: classes of operators, the namespace of a collective, documented checks.
ALLOWED = re.compile(r"^torch\.(_ops\b|ops\b|__version__|_check\b)")


def dotted(node: ast.AST) -> str:
    """``a.b.c`` of an attribute chain; empty for one that starts with anything but a name."""
    if isinstance(node, ast.Name):
        return node.id
    owner = dotted(node.value) if isinstance(node, ast.Attribute) else ""
    return f"{owner}.{node.attr}" if owner and isinstance(node, ast.Attribute) else ""


def private_names(source: str) -> set[str]:
    """Private torch names that a module imports, reads as an attribute of ``torch``, or names in a string."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{a.name}" for a in node.names)}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.Attribute):
            found.add(dotted(node))
        elif (
            isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(r"\w+(\.\w+)+", node.value)
        ):
            found.add(node.value)  # importlib.import_module("torch._private")
    return {name for name in found if PRIVATE.match(name) and not ALLOWED.match(name)}


def test_the_search_for_private_names_finds_them():
    source = """
import torch, functorch
from torch._inductor import config
from torch import _dynamo
import_module("torch.distributed._symmetric_memory")
torch._functorch.config.patch()
torch.ops._c10d_functional.all_reduce; torch._ops.OpOverload; torch.compile
"""
    assert private_names(source) >= {
        "functorch", "torch._inductor", "torch._dynamo", "torch.distributed._symmetric_memory", "torch._functorch.config",
    }  # fmt: skip
    assert not any("_ops" in name or "_c10d" in name or "compile" in name for name in private_names(source))


def test_private_names_are_taken_from_compat():
    files = [path for part in ("passes", "ops", "tpfuse") for path in (PACKAGE / part).rglob("*.py")]
    assert len(files) > 40
    found = {str(f.relative_to(PACKAGE)): private_names(f.read_text()) for f in files if f.parent.name != "compat"}
    assert not {name: names for name, names in found.items() if names}, "private torch APIs belong in tpfuse/compat/"


# -- graphs, storages and groups -----------------------------------------------------------------------------------


def fake(*sizes: int) -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.empty(sizes)


def test_storage_of():
    base = fake(4, 4)
    assert compat.storage_of(base) == compat.storage_of(base.view(16)) == compat.storage_of(base[1:])
    assert compat.storage_of(base) != compat.storage_of(base.clone())


def test_is_mutation():
    def f(x):
        return x.add_(1) + x.view(-1)[0]

    graph = graphs_of(f, torch.ones(2))
    found = {str(n.target): compat.is_mutation(n) for n in graph.nodes if n.op == "call_function"}
    assert found.pop("aten.add_.Tensor") is True
    assert not any(found.values())


def graphs_of(f: Any, *args: Any) -> Any:
    from torch.fx.experimental.proxy_tensor import make_fx

    return make_fx(f, tracing_mode="fake")(*args).graph


def test_fake_mode_of():
    tensor = fake(2)
    assert compat.fake_mode_of([tensor]) is tensor.fake_mode
    assert compat.is_fake(compat.fake_mode_of([]).from_tensor(torch.ones(1)))


def test_is_fake():
    assert compat.is_fake(fake(2)) and not compat.is_fake(torch.ones(2))


def test_example_size():
    def sizes(gm: Any) -> list[Any]:
        node = next(n for n in gm.graph.nodes if isinstance(n.meta.get("example_value"), torch.Tensor))
        return [compat.example_size(n) for n in node.meta["example_value"].shape]

    assert captured(lambda x: x + 1, torch.ones(5, 3), look=sizes, dynamic=True) == [5, 3]
    assert compat.example_size(7) == 7


def test_known_at_run_time_only():
    def sizes(gm: Any) -> list[bool]:
        values = [n.meta.get("example_value") for n in gm.graph.nodes]
        return [compat.known_at_run_time_only(n) for v in values if isinstance(v, torch.Tensor) for n in v.shape]

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert True in captured(lambda x: x.nonzero() + 1, torch.ones(5), look=sizes)
    assert True not in captured(lambda x: x + 1, torch.ones(5, 3), look=sizes, dynamic=True)
    assert not compat.known_at_run_time_only(3)


def test_group_reference():
    import gc

    group = dist.new_group([0, 1])
    reference = compat.group_reference(group)
    assert reference() is group
    dist.destroy_process_group(group)
    del group
    gc.collect()
    assert reference() is None, "it must not keep a destroyed group alive"
    own = dist.ProcessGroup(0, 1)
    reference = compat.group_reference(own)
    number = id(own)
    del own
    gc.collect()
    assert id(reference()) == number, "torch holds no object of this group, so it must be held"


def test_is_group():
    group = dist.new_group([0, 1])
    name, reference = group.group_name, compat.group_reference(group)
    assert compat.is_group(name, reference)
    assert not compat.is_group(name, lambda: dist.group.WORLD)
    dist.destroy_process_group(group)
    assert not compat.is_group(name, reference)


def test_forget_symmetric_memory():
    import torch.distributed._symmetric_memory as symm_mem

    symm_mem._group_name_to_store["gone"] = object()
    compat.forget_symmetric_memory("gone")
    assert "gone" not in symm_mem._group_name_to_store


def test_group_store():
    # That ranks find each other through it: tests/test_batch_invariant.py.
    assert isinstance(compat.group_store(dist.group.WORLD), dist.Store)


def test_symmetric_memory():
    module = compat.symmetric_memory()
    for name in ("empty", "rendezvous", "get_backend", "set_backend"):
        assert callable(getattr(module, name)), name


# A torch for CPUs has neither of these two functions: what can be checked there is that torch itself still calls them.
def test_current_device():
    assert "torch._C._cuda_getDevice()" in inspect.getsource(torch.cuda.current_device)


def test_current_stream_handle():
    from torch._dynamo import device_interface

    assert "from torch._C import _cuda_getCurrentRawStream" in inspect.getsource(device_interface)


def test_bundle_file(tmp_path, monkeypatch):
    """What one folder's bundle carries is a file in another, in a process that knows nothing but torch."""
    from torch.compiler._cache import CacheArtifactManager

    data = [{"a": 1, "b": None}]
    with CacheArtifactManager.with_fresh_cache():
        compat.bundle_file("folder/name.json", data)
        saved, info = torch.compiler.save_cache_artifacts()
    assert info.artifacts["autotune"] == ["folder/name.json"]
    (tmp_path / "bundle").write_bytes(saved)
    load = "import torch; torch.compiler.load_cache_artifacts(open('bundle', 'rb').read())"
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "caches")}
    subprocess.run([sys.executable, "-c", load], cwd=tmp_path, env=environment, check=True, timeout=120)
    assert json.loads((tmp_path / "caches" / "folder" / "name.json").read_text()) == data


def test_compile_in_this_process():
    before = torch._inductor.config.compile_threads
    try:
        compat.compile_in_this_process()
        assert torch._inductor.config.compile_threads == 1
    finally:
        torch._inductor.config.compile_threads = before


def test_auto_functionalized():
    assert isinstance(compat.auto_functionalized(), torch._ops.HigherOrderOperator)
    assert compat.auto_functionalized().name() == "auto_functionalized"


def test_auto_functionalized_v2():
    assert compat.auto_functionalized_v2().name() == "auto_functionalized_v2"


def test_triton_kernel_of():
    from torch._higher_order_ops import triton_kernel_wrap as wrap

    def _rms_norm_kernel():
        pass

    class Autotuner:  # has no name of its own
        fn = staticmethod(_rms_norm_kernel)

    graph = torch.fx.Graph()
    for kernel in (_rms_norm_kernel, Autotuner()):
        number = wrap.kernel_side_table.add_kernel(kernel)
        node = graph.call_function(wrap.triton_kernel_wrapper_functional, kwargs={"kernel_idx": number})
        assert compat.triton_kernel_of(node) == "_rms_norm_kernel"
    unknown = graph.call_function(wrap.triton_kernel_wrapper_functional, kwargs={"kernel_idx": 10**6})
    assert compat.triton_kernel_of(unknown) is None
    assert compat.triton_kernel_of(graph.call_function(torch.add)) is None


def test_may_vary():
    tensor = torch.zeros(3, 4)
    compat.may_vary(tensor, 1)
    frames = torch._dynamo.testing.CompileCounter()
    torch._dynamo.reset()
    function = torch.compile(lambda x: x + 1, backend=frames)
    function(tensor)
    function(torch.zeros(3, 5))
    assert frames.frame_count == 1


def test_room_for_recompiles():
    before = torch._dynamo.config.recompile_limit
    with compat.room_for_recompiles():
        assert torch._dynamo.config.recompile_limit >= 64
    assert torch._dynamo.config.recompile_limit == before
    with torch._dynamo.config.patch(recompile_limit=100), compat.room_for_recompiles():
        assert torch._dynamo.config.recompile_limit == 100, "a larger limit of the user's stays"
    with pytest.raises(ZeroDivisionError), compat.room_for_recompiles():
        1 / 0  # noqa: B018
    assert torch._dynamo.config.recompile_limit == before


@pytest.mark.parametrize("first_out", ["who raised it", "who found it raised"])
def test_threads_do_not_take_the_room_from_each_other(monkeypatch, first_out):
    """One setting for all threads, as torch 2.11 has it."""
    config = SimpleNamespace(recompile_limit=8)
    monkeypatch.setattr(torch._dynamo, "config", config)
    entered, leave, left = (threading.Event() for _ in range(3))
    seen: list[int] = []

    def other():
        with compat.room_for_recompiles(), compat.room_for_recompiles():
            entered.set()
            assert leave.wait(30)
            seen.append(config.recompile_limit)
        left.set()

    thread = threading.Thread(target=other)
    with compat.room_for_recompiles():
        thread.start()
        assert entered.wait(30)
        if first_out == "who found it raised":
            leave.set()
            assert left.wait(30)
        assert config.recompile_limit == compat.dynamo.ROOM
    leave.set()
    thread.join(30)
    assert seen == [compat.dynamo.ROOM]
    assert config.recompile_limit == 8


def test_a_thread_with_a_larger_limit_of_its_own_keeps_it():
    """Where each has its own, as in torch 2.13; in torch 2.11 the limit is the other thread's too."""
    before, entered, leave = torch._dynamo.config.recompile_limit, threading.Event(), threading.Event()
    seen: list[int] = []

    def other():
        torch._dynamo.config.recompile_limit = 100
        with compat.room_for_recompiles():
            entered.set()
            assert leave.wait(30)
        seen.append(torch._dynamo.config.recompile_limit)

    thread = threading.Thread(target=other)
    try:
        with compat.room_for_recompiles():
            thread.start()
            assert entered.wait(30)
        per_thread = compat.dynamo._limit_is_per_thread()
        assert torch._dynamo.config.recompile_limit == (before if per_thread else 100)
        leave.set()
        thread.join(30)
        assert seen == ([100] if per_thread else [before])
    finally:
        leave.set()
        torch._dynamo.config.recompile_limit = before


def test_with_room_for_recompiles():
    def limit():
        return torch._dynamo.config.recompile_limit

    assert compat.with_room_for_recompiles(limit)() >= 64
    assert compat.with_room_for_recompiles(limit).__name__ == "limit"


def test_copy_of():
    """A copy compiles as the graph itself does, whatever became of that; parameters are not copied."""

    def same_after_an_edit(gm, inputs):
        copied = compat.copy_of(gm)
        gm.graph = torch.fx.Graph()
        compiled.append(copied)
        return compat.aot_autograd(fw_compiler=lambda graph, _: compat.boxed(graph.forward))(copied, inputs)

    compiled: list[Any] = []
    weight = torch.nn.Parameter(torch.rand(3))

    def f(x, flag):
        return torch.cond(flag, lambda y: y * weight, lambda y: y + weight, (x,))

    torch._dynamo.reset()
    x, flag = torch.rand(3), torch.tensor(True)
    with torch.no_grad():
        assert torch.equal(torch.compile(f, backend=same_after_an_edit)(x, flag), x * weight)
    (copied,) = compiled
    assert len([child for child in copied.children() if isinstance(child, torch.fx.GraphModule)]) == 2


def test_forget_traced_regions():
    """A region is traced once in a compile, and anew in a second one of the same frame."""
    traced: list[Any] = []
    region = torch.compiler.nested_compile_region(lambda x: x.sin())

    def twice(gm, inputs):
        def keep(graph, _):
            traced.extend(child for child in graph.children() if isinstance(child, torch.fx.GraphModule))
            return compat.boxed(graph.forward)

        compat.aot_autograd(fw_compiler=keep)(compat.copy_of(gm), inputs)
        compat.forget_traced_regions()
        return compat.aot_autograd(fw_compiler=keep)(gm, inputs)

    compat.forget_traced_regions()  # outside of a compile there is nothing to forget
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(lambda x: region(region(x)), backend=twice)(torch.ones(2))
    first, second = traced
    assert first is not second


# Of a generator for CPUs torch keeps no offset; that the two functions exist is what can be checked without a GPU.
def test_generator_offset():
    assert callable(torch.Generator.get_offset)


def test_set_generator_offset():
    assert callable(torch.Generator.set_offset)


def test_tracing_through_compiled():
    from torch.fx.experimental.proxy_tensor import make_fx

    wrapped = torch.compile(lambda x: x.sin() + 1)
    with pytest.raises(RuntimeError, match="symbolically trace a dynamo-optimized function"):
        make_fx(wrapped)(torch.zeros(2))
    with compat.tracing_through_compiled():
        graph = make_fx(wrapped)(torch.zeros(2)).graph
    assert [str(n.target) for n in graph.nodes if n.op == "call_function"] == ["aten.sin.default", "aten.add.Tensor"]


def test_traced_apart():
    found = []

    def backend(gm, _):
        found.append(compat.traced_apart(lambda x: x.clone().add_(1), torch.zeros(5, 3)))
        return gm

    torch._dynamo.reset()
    torch.compile(lambda x: x * 2, backend=backend, dynamic=True)(torch.ones(5, 3))
    (graph,) = found
    targets = [n.target for n in graph.nodes if n.op == "call_function"]
    assert torch.ops.aten.add.Tensor in targets and torch.ops.aten.add_.Tensor not in targets
    assert all(isinstance(size, int) for n in graph.nodes if n.op != "output" for size in n.meta["val"].shape)


def test_follows_from_guards() -> None:
    """A size that is bounded first, and then found to equal that of another input."""
    answers: list[tuple[bool, bool]] = []

    def keep(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        tensors = [n.meta["example_value"] for n in gm.graph.find_nodes(op="placeholder")]
        _, most, same = (t.shape[0] for t in tensors if isinstance(t, torch.Tensor))
        answers.append((compat.follows_from_guards(4 * same <= 4 * most), compat.follows_from_guards(most <= same)))
        return gm.forward

    @torch.compile(backend=keep, fullgraph=True)
    def f(x: torch.Tensor, y: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        if x.shape[0] > y.shape[0]:
            raise ValueError("too many rows")
        return (x + z).sum() + y.sum()

    tensors = [torch.ones(n, 2) for n in (3, 7, 3)]
    for t in tensors:
        torch._dynamo.mark_dynamic(t, 0)
    f(*tensors)
    assert answers == [(True, False)]
    assert compat.follows_from_guards(True) and not compat.follows_from_guards(False)


def test_guarded() -> None:
    answers, guards = [], []

    def look(gm, inputs):
        sizes = [size for size in inputs if isinstance(size, torch.SymInt)]
        few, many = sorted(sizes, key=lambda size: size.node.hint)
        answers.extend(
            [compat.guarded(many <= few), compat.guarded(few <= many), compat.follows_from_guards(few <= many)]
        )
        guards.append(len(inputs))
        return gm.forward

    run = torch.compile(lambda x, y: (x.sum() + y.sum()) * x.shape[0] * y.shape[0], backend=look, dynamic=True)
    run(torch.ones(3), torch.ones(5))
    assert answers == [False, True, True]
    run(torch.ones(4), torch.ones(6))
    assert len(guards) == 1
    run(torch.ones(6), torch.ones(4))  # the guard: another graph
    assert len(guards) == 2
    assert compat.guarded(True) and not compat.guarded(False)


def test_number_of() -> None:
    answers = []

    def look(gm, inputs):
        size = next(size for size in inputs if isinstance(size, torch.SymInt))
        answers.extend([compat.number_of(size), compat.number_of(3 + size - size), compat.number_of(4)])
        return gm.forward

    torch.compile(lambda x: x.sum() * x.shape[0], backend=look, dynamic=True)(torch.ones(5))
    assert answers == [None, 3, 4]
