"""The TensorRT inner compiler. Every test here is a mock: TensorRT itself is nowhere installed that these tests run.

Two kinds. The first replaces Torch-TensorRT by a partitioner of a few lines, and runs everywhere. The second runs
Torch-TensorRT's own lowering passes, partitioner and dry run with a stand-in for the module ``tensorrt``; it needs the
package on the path: ``python tests/matrix/with_tensorrt.py`` fetches it and runs these tests.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import layers
import pytest
import torch
from graphs import start_fake_group
from ranks import RankPool

pytestmark = pytest.mark.ranks

OP = "tpfuse.all_reduce_add_rms_norm.default"
N_LAYERS = 2


@pytest.fixture(scope="module")
def pool():
    with RankPool(2) as pool:
        yield pool


@pytest.fixture(scope="module")
def alone():
    """One rank, whose sums are its own."""
    with RankPool(2, alone=True) as pool:
        yield pool


# -- without the package --------------------------------------------------------------------------------------------


@pytest.fixture
def fake_group():
    start_fake_group(2)
    yield
    torch.distributed.destroy_process_group()


def compile_here(**options: Any) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(layers.Decoder(1), backend="tpfuse", options={"tpfuse.inner": "tensorrt", **options})
    with torch.no_grad():
        compiled(layers.tokens())


@pytest.mark.parametrize("missing", ["torch_tensorrt"])
def test_without_the_extra_the_error_names_it(fake_group, monkeypatch, missing):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(Exception, match=re.escape("pip install 'tpfuse[tensorrt]'")):
        compile_here()


def test_a_package_that_does_not_load_says_why(fake_group, monkeypatch, tmp_path):
    (tmp_path / "torch_tensorrt.py").write_text("raise Exception('Could not find libnvinfer.so.11')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "torch_tensorrt", raising=False)
    with pytest.raises(Exception, match=r"installed but does not load: Could not find libnvinfer\.so\.11"):
        compile_here()


# -- mock of the package --------------------------------------------------------------------------------------------


@dataclass
class MockSettings:
    dryrun: bool = False
    min_block_size: int = 5
    use_distributed_mode_trace: bool = False
    enable_experimental_decompositions: bool = False
    torch_executed_ops: set[Any] = field(default_factory=set)


def mock_compile_module(graph: Any, inputs: Any, settings: Any, engine_cache: Any) -> Any:
    """Engines are the runs of ATen nodes; what communicates stays outside."""
    from torch.fx.passes.split_module import split_module

    run, kinds = 0, {}
    previous = None
    for node in graph.graph.nodes:
        if node.op != "call_function":
            continue
        aten = str(node.target).startswith(("aten.", "<built-in function getitem>"))
        if "getitem" in str(node.target):
            kinds[node] = kinds[node.args[0]]
            continue
        if aten is not previous:
            run, previous = run + 1, aten
        kinds[node] = f"_run_on_acc_{run}" if aten else f"_run_on_gpu_{run}"
    return split_module(graph, None, lambda node: kinds[node], partition_affix=None)


def mock_torch_tensorrt() -> SimpleNamespace:
    return SimpleNamespace(
        CompilationSettings=MockSettings,
        compile_module=mock_compile_module,
        get_decompositions=lambda experimental: {},
        parse_dynamo_kwargs=lambda kw: (MockSettings(**kw["options"]), None),
        post_lowering=lambda graph, settings: graph,
        prepare_inputs=lambda tensors, disable_memory_format_check: tensors,
    )


def use_the_stand_in() -> None:
    sys.path.insert(0, str(Path(__file__).parent / "matrix"))
    import tensorrt_stand_in

    tensorrt_stand_in.install()
    tensorrt_stand_in.without_a_gpu()
    import torch_tensorrt  # noqa: F401

    tensorrt_stand_in.keep_on_the_cpu()


def run(rank: int, world_size: int, options: dict[str, Any], mocked: bool) -> dict[str, Any]:
    """Compile the decoder with TensorRT and with aot_eager; return counts, the report's note and both outputs."""
    import tpfuse
    from tpfuse.inner import tensorrt

    real = tensorrt.load
    if mocked:
        tensorrt.load = mock_torch_tensorrt
    else:
        use_the_stand_in()
    found = {}
    model = layers.Decoder(N_LAYERS, dtype=torch.float32)
    try:
        for inner in ("aot_eager", "tensorrt"):
            torch._dynamo.reset()
            tpfuse.clear_reports()
            given = {"tpfuse.inner": inner, **(options if inner == "tensorrt" else {})}
            with torch.no_grad():
                output = torch.compile(model, backend="tpfuse", options=given)(layers.tokens())
            (report,) = tpfuse.reports()
            found[inner] = {
                "fused": len(report.fused),
                "found": len(report.sites),
                "notes": report.notes,
                "output": output,
            }
    finally:
        tensorrt.load = real
    return found


def engines(note: str) -> int:
    match = re.search(r"(\d+) engines", note)
    assert match, note
    return int(match.group(1))


def test_mock_the_op_stays_in_torch_between_engines(pool):
    for found in pool.run(run, {}, True):
        ours = found["tensorrt"]
        assert (ours["fused"], ours["found"]) == (2 * N_LAYERS, 2 * N_LAYERS)
        # Each fused op ends an engine; the last one's output is the model's.
        assert engines(ours["notes"][-1]) == 2 * N_LAYERS
        assert f"{OP} x{2 * N_LAYERS}" in ours["notes"][-1]
        assert f"{4 * N_LAYERS - 1} boundaries" in ours["notes"][-1]
        assert torch.equal(ours["output"], found["aot_eager"]["output"])


def mock_fusion_of_collectives(graph: Any, settings: Any) -> Any:
    """What Torch-TensorRT's lowering does to a reduction that is left: one operator that carries the group's name."""
    for node in list(graph.graph.nodes):
        if node.target is torch.ops._c10d_functional.all_reduce.default:
            (wait,) = node.users
            with graph.graph.inserting_after(wait):
                fused = graph.graph.call_function(torch.ops.tensorrt.fused_nccl_all_reduce.default, tuple(node.args))
            wait.replace_all_uses_with(fused)
            graph.graph.erase_node(wait)
            graph.graph.erase_node(node)
    graph.recompile()
    return graph


@pytest.mark.parametrize("part", [True, False])
def test_mock_a_reduction_over_a_part_of_the_ranks_is_kept_out_of_engines(monkeypatch, part):
    """Torch-TensorRT's converters would reduce it over all ranks, whatever group it names."""
    import tpfuse
    from tpfuse.inner import tensorrt

    library = torch.library.Library("tensorrt", "FRAGMENT")
    library.define("fused_nccl_all_reduce(Tensor x, str reduce_op, str group_name) -> Tensor")
    library.impl("fused_nccl_all_reduce", lambda x, reduce_op, group_name: x.clone(), "CompositeExplicitAutograd")
    asked: list[set[str]] = []

    def compile_module(graph: Any, inputs: Any, settings: Any, engine_cache: Any) -> Any:
        asked.append({str(op) for op in settings.torch_executed_ops})
        return mock_compile_module(graph, inputs, settings, engine_cache)

    mock = mock_torch_tensorrt()
    mock.compile_module, mock.post_lowering = compile_module, mock_fusion_of_collectives
    monkeypatch.setattr(tensorrt, "load", lambda: mock)
    start_fake_group(4)
    try:
        group = torch.distributed.new_group([0, 1]) if part else torch.distributed.group.WORLD
        torch._dynamo.reset()
        tpfuse.clear_reports()
        options = {"tpfuse.inner": "tensorrt", "tpfuse.fuel": 1, "torch_executed_ops": {"aten.add.Tensor"}}
        compiled = torch.compile(layers.Decoder(1, group, torch.float32), backend="tpfuse", options=options)
        with torch.no_grad():
            compiled(layers.tokens())
        (report,) = tpfuse.reports()
    finally:
        torch.distributed.destroy_process_group()
        library._destroy()
    kept = {"tensorrt.fused_nccl_all_reduce.default"} if part else set()
    assert asked == [{"aten.add.Tensor"} | kept], "the user's own list stays"
    assert any("stay in Torch" in note for note in report.notes) is part
    assert (len(report.fused), len(report.sites)) == (1, 2)


def refused(rank: int, world_size: int, options: dict[str, Any]) -> str:
    try:
        run(rank, world_size, options, True)
    except Exception as error:
        return str(error)
    return "nothing was raised"


def test_an_unknown_setting_is_an_error(alone):
    message = alone.run(refused, {"min_blok_size": 3})[0]
    assert "'min_blok_size'" in message
    assert "min_block_size" in message


def run_dynamic(rank: int, world_size: int) -> list[Any]:
    import tpfuse
    from tpfuse.inner import tensorrt

    real, tensorrt.load = tensorrt.load, mock_torch_tensorrt
    torch._dynamo.reset()
    tpfuse.clear_reports()
    model = layers.Decoder(1, dtype=torch.float32)
    try:
        compiled = torch.compile(model, backend="tpfuse", options={"tpfuse.inner": "tensorrt"}, dynamic=True)
        with torch.no_grad():
            equal = [torch.equal(model(layers.tokens(2, n)), compiled(layers.tokens(2, n))) for n in (5, 7)]
    finally:
        tensorrt.load = real
    return [equal, [(len(r.fused), r.notes[-1]) for r in tpfuse.reports()]]


def test_dynamic_shapes_run_in_torch_and_say_so(alone):
    equal, reports = alone.run(run_dynamic)[0]
    assert equal == [True, True]
    ((fused, note),) = reports
    assert fused == 2
    assert "dynamic shapes" in note


# -- the package itself, with a stand-in for tensorrt ----------------------------------------------------------------

with_package = pytest.mark.skipif(
    importlib.util.find_spec("torch_tensorrt") is None,
    reason="torch-tensorrt is not on the path; run: python tests/matrix/with_tensorrt.py",
)


@with_package
def test_the_real_partitioner_with_a_stand_in_for_tensorrt(pool):
    for found in pool.run(run, {"dryrun": True, "min_block_size": 1}, False):
        ours, theirs = found["tensorrt"], found["aot_eager"]
        assert (ours["fused"], ours["found"]) == (theirs["fused"], theirs["found"]) == (2 * N_LAYERS, 2 * N_LAYERS)
        note = ours["notes"][-1]
        assert f"{OP} x{2 * N_LAYERS}" in note
        assert "fused_nccl_all_reduce" not in note, "Torch-TensorRT's own fusion took a reduction first"
        # A fused op ends an engine, and so does the CPU's attention, for which there is no converter.
        assert engines(note) == 2 * N_LAYERS + N_LAYERS
        assert torch.allclose(ours["output"], theirs["output"], rtol=1e-5, atol=1e-5)


@with_package
def test_reductions_that_stay_go_to_torch_tensorrts_own_fusion(pool):
    for found in pool.run(run, {"dryrun": True, "min_block_size": 1, "tpfuse.fuel": 2}, False):
        ours = found["tensorrt"]
        assert (ours["fused"], ours["found"]) == (2, 2 * N_LAYERS)
        assert torch.allclose(ours["output"], found["aot_eager"]["output"], rtol=1e-5, atol=1e-5)


def run_over_one_rank_each(rank: int, world_size: int) -> tuple[list[str], bool]:
    import tpfuse

    use_the_stand_in()
    groups = [torch.distributed.new_group([r]) for r in range(world_size)]
    model = layers.Decoder(1, groups[rank], torch.float32)
    torch._dynamo.reset()
    tpfuse.clear_reports()
    options = {"tpfuse.inner": "tensorrt", "tpfuse.policy": "off", "dryrun": True, "min_block_size": 1}
    with torch.no_grad():
        output = torch.compile(model, backend="tpfuse", options=options)(layers.tokens())
        same = torch.allclose(output, model(layers.tokens()), rtol=1e-5, atol=1e-5)
    (report,) = tpfuse.reports()
    return report.notes, same


@with_package
def test_a_group_that_torch_tensorrts_lowering_names_is_read_from_its_operator(pool):
    for notes, same in pool.run(run_over_one_rank_each):
        assert "tensorrt: tensorrt.fused_nccl_all_reduce.default stay in Torch" in " ".join(notes)
        assert "tensorrt.fused_nccl_all_reduce.default x2" in notes[-1]
        assert same
