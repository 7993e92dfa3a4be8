"""One canary for each name of vLLM that ``tpfuse/engines/vllm_compat.py`` touches. Run by ``make test-vllm`` with each vLLM."""

from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace
from typing import Any


def test_pass_base() -> None:
    from torch._inductor.custom_graph_pass import CustomGraphPass
    from vllm.compilation import backends

    from tpfuse.engines import vllm_compat

    assert issubclass(vllm_compat.pass_base(), CustomGraphPass)
    assert vllm_compat.pass_base().__module__.startswith("vllm.")
    source = inspect.getsource(backends.VllmBackend.configure_post_pass)
    assert "InductorPass" in source and "pass_manager.add" in source


def test_all_reduce() -> None:
    from tpfuse.engines import vllm_compat

    assert str(vllm_compat.all_reduce().default._schema) == "vllm::all_reduce(Tensor tensor, str group_name) -> Tensor"


def test_the_norms_have_the_arguments_that_are_read() -> None:
    import torch
    import vllm.ir.ops  # noqa: F401

    want = {"rms_norm": ["x", "weight", "epsilon"], "fused_add_rms_norm": ["x", "x_residual", "weight", "epsilon"]}
    for name, arguments in want.items():
        schema = getattr(torch.ops.vllm_ir, name).default._schema
        assert [a.name for a in schema.arguments] == [*arguments, "variance_size"], schema
        weight = next(a for a in schema.arguments if a.name == "weight")
        assert "Optional" in str(weight.type), "a norm without a weight is legal"


def test_the_provider_of_a_norm_follows_the_priorities_in_force() -> None:
    import torch
    import vllm.ir.ops
    import vllm.kernels  # noqa: F401
    from vllm.compilation.passes.ir import lowering_pass
    from vllm.ir.op import IrOp

    from tpfuse.engines import vllm_compat

    assert "ir_op.dispatch(*fake_args)" in inspect.getsource(lowering_pass), (
        "vLLM lowers a norm to what dispatch returns"
    )
    graph = torch.fx.Graph()
    x, residual, weight = (graph.placeholder(name) for name in ("x", "residual", "weight"))
    for node, shape in ((x, (2, 8)), (residual, (2, 8)), (weight, (8,))):
        node.meta["val"] = torch.empty(shape, dtype=torch.bfloat16)
    op = IrOp.registry["fused_add_rms_norm"]
    node = graph.call_function(op.torch_op, (x, residual, weight, 1e-6))
    assert str(node.target) == "vllm_ir.fused_add_rms_norm.default"
    with op.set_priority(["native"]):
        assert vllm_compat.norm_provider(node) == "native"
    assert "vllm_c" in op.impls


def test_group_names_and_ranks() -> None:
    from vllm.distributed import parallel_state

    from tpfuse.engines import vllm_compat

    group = SimpleNamespace(ranks=(4, 5))
    parallel_state._groups["tp:9"] = lambda: group
    try:
        assert vllm_compat.group_ranks("tp:9") == (4, 5)
        assert vllm_compat.group_names() == ["tp:9"]
    finally:
        del parallel_state._groups["tp:9"]


def test_pass_key_and_platform() -> None:
    from vllm.platforms import current_platform

    from tpfuse.engines import vllm_compat

    assert vllm_compat.pass_key() == current_platform.pass_key == "post_grad_custom_post_pass"
    assert vllm_compat.platform_can_fuse()


def test_cache_root_and_version() -> None:
    from tpfuse.engines import vllm_compat

    assert vllm_compat.cache_root().name and vllm_compat.version()[0].isdigit()


def test_what_is_wrapped_exists_and_is_called_by_name() -> None:
    from vllm.compilation import backends, decorators
    from vllm.config import VllmConfig

    assert "__post_init__" in vars(VllmConfig)
    assert list(inspect.signature(backends.VllmBackend.__call__).parameters) == ["self", "graph", "example_inputs"]
    compile_piece = inspect.signature(backends.CompilerManager.compile).parameters
    assert {"graph", "compile_range", "graph_index"} <= set(compile_piece)
    assert list(inspect.signature(decorators._try_load_aot_compiled_fn).parameters)[:2] == [
        "model",
        "aot_compilation_path",
    ]
    source = inspect.getsource(decorators)
    assert "= _try_load_aot_compiled_fn(self, aot_compilation_path)" in source
    assert "self._aot_compilation_path = aot_compilation_path" in source, "it is saved to the path that was looked for"


def test_artifact_key() -> None:
    from vllm.compilation.backends import CompilerManager

    from tpfuse.engines import vllm_compat

    source = inspect.getsource(CompilerManager)
    assert source.count("self.loaded_artifacts[cache_key] = compiled_graph") == 2

    manager: Any = SimpleNamespace(loaded_artifacts={"key": test_artifact_key})
    assert vllm_compat.artifact_key(manager, test_artifact_key) == "key"
    assert vllm_compat.artifact_key(manager, None) is None


def test_place_and_config() -> None:
    from vllm.config import CompilationConfig, ParallelConfig
    from vllm.config.compilation import PassConfig

    from tpfuse.engines import vllm_compat

    assert vllm_compat.place(SimpleNamespace(parallel_config=ParallelConfig())) == (0, 1)
    assert hasattr(ParallelConfig(), "data_parallel_index")
    assert PassConfig().fuse_allreduce_rms in (None, False, True)
    made = CompilationConfig(inductor_passes={"post_grad_custom_post_pass": "tpfuse.engines.vllm_config.vllm_pass"})
    from tpfuse.engines.vllm import is_pass

    assert is_pass(made.inductor_compile_config["post_grad_custom_post_pass"])


def test_the_hash_of_a_config_asks_the_pass() -> None:
    from vllm.config.utils import normalize_value

    from tpfuse.engines.vllm import make_pass

    made = make_pass()
    assert normalize_value(made) == made.uuid()


def main() -> int:
    failed = 0
    for name, test in [(n, t) for n, t in globals().items() if n.startswith("test_")]:
        try:
            test()
        except Exception as error:
            failed += 1
            print(f"{name}: {type(error).__name__}: {error}")
    print(f"{failed} canaries failed" if failed else "canaries: all right")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
