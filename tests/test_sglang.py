"""The hook inside SGLang: alone, and on SGLang's real Python files over gloo ranks (``make test-sglang`` fetches them)."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import sys
import types
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import sglang_world as files
import torch
from ranks import RankPool
from tpfuse.ops import GEMMA, SGLANG, VLLM, reference

from tpfuse.engines import sglang as hook
from tpfuse.parallel import ConfigError, ParallelConfig

# Without SGLang.


@pytest.mark.parametrize(
    ("tp", "dp", "cp", "dense", "expected"),
    [
        (4, 2, 1, 2, True),
        (8, 2, 1, 4, True),
        (8, 4, 1, 2, True),
        (4, 2, 1, None, False),
        (4, 2, 1, 1, False),
        (4, 2, 1, 4, False),
        (4, 1, 1, 4, False),  # one group for all: SGLang's own None
        (4, 4, 1, 1, False),
        (8, 2, 1, 2, False),
        (8, 2, 2, 2, False),  # context parallelism is left alone
        (6, 4, 1, 1, False),
    ],
)
def test_the_layout_is_admitted_by_the_rank_lists(tp, dp, cp, dense, expected):
    assert hook.shares(tp, dp, cp, dense) is expected
    if expected:
        config = ParallelConfig(tp_size=tp, attn_dp_size=dp, moe_dense_tp_size=dense)
        assert config.dense_shares_attention
        assert config.groups("dense_tp") == config.groups("attn_tp") != config.groups("tp")


@pytest.mark.parametrize(
    ("prefix", "dense"),
    [
        ("model.layers.0.mlp.gate_up_proj", True),
        ("layers.11.mlp.down_proj", True),
        ("language_model.model.layers.3.mlp.down_proj", True),
        ("model.layers.3.mlp.shared_experts.down_proj", False),
        ("model.layers.3.mlp.experts.0.down_proj", False),
        ("model.layers.0.self_attn.o_proj", False),
        ("visual.blocks.0.mlp.fc1", False),
        ("", False),
    ],
)
def test_a_dense_mlp_is_told_by_its_name(prefix, dense):
    assert bool(hook.DENSE_MLP.search(prefix)) is dense


def test_the_plugin_is_an_entry_point_of_sglang():
    (found,) = (e for e in importlib.metadata.entry_points(group="sglang.srt.plugins") if e.name == "tpfuse")
    assert found.value == "tpfuse.engines.sglang:register"
    assert found.load() is hook.register


def test_it_does_nothing_unless_switched_on(monkeypatch):
    monkeypatch.delenv("TPFUSE_SGLANG", raising=False)
    monkeypatch.setattr(hook, "_version", lambda: pytest.fail("it asked for SGLang"))
    hook.register()
    assert hook.active() == []


@pytest.mark.parametrize("version", ["0.5.16", "0.5.18", "0.5.22", "0.5.24", "1.0"])
def test_another_version_is_told_with_those_that_work(version, monkeypatch):
    monkeypatch.setenv("TPFUSE_SGLANG", "1")
    monkeypatch.setattr(importlib.metadata, "version", lambda name: version)
    with pytest.warns(RuntimeWarning, match=rf"SGLang {version} is not supported; supported are 0.5.17, 0.5.23"):
        hook.register()
    assert hook._state.installed == []


def test_a_value_that_cannot_be_read_leaves_sglang_alone(monkeypatch):
    monkeypatch.setenv("TPFUSE_SGLANG", "perhaps")
    with pytest.warns(RuntimeWarning, match="TPFUSE_SGLANG='perhaps' is not valid"):
        hook.register()


class Registry:
    """What this project uses of SGLang's registry."""

    _hooks: dict[str, list[Any]] = {}  # noqa: RUF012
    _patched: set[str] = set()  # noqa: RUF012

    @classmethod
    def register(cls, target: str, around: Any, kind: Any) -> None:
        cls._hooks.setdefault(target, []).append((kind, around, None))

    @classmethod
    def apply_hooks(cls) -> None:
        import functools
        import pkgutil

        for target, hooks in cls._hooks.items():
            if target in cls._patched:
                continue
            path, _, name = target.rpartition(".")
            owner = pkgutil.resolve_name(path)
            wrapped = getattr(owner, name)
            for _, around, _ in hooks:

                def wrapper(*args: Any, inner: Any = wrapped, around: Any = around) -> Any:
                    return around(inner, *args)

                wrapped = functools.wraps(wrapped)(wrapper)
            setattr(owner, name, wrapped)
            cls._patched.add(target)


@pytest.fixture
def engine(monkeypatch) -> Iterator[types.ModuleType]:
    """An engine with one function, and the registry."""
    if "sglang" in sys.modules:
        pytest.skip("SGLang itself is imported")
    names = ("sglang", "sglang.srt", "sglang.srt.plugins", "sglang.srt.plugins.hook_registry")
    for name in names:
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules[name].__path__ = []  # type: ignore[attr-defined]
    registry = sys.modules[names[-1]]
    monkeypatch.setattr(Registry, "_hooks", {})
    monkeypatch.setattr(Registry, "_patched", set())
    registry.HookRegistry = Registry  # type: ignore[attr-defined]
    registry.HookType = SimpleNamespace(AROUND="around")  # type: ignore[attr-defined]
    module = types.ModuleType("engine_of_a_test")
    exec("def step(rows): return rows + 1\ndef other(rows): return rows", module.__dict__)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(hook, "_state", hook._State())
    yield module


def doubled(original: Any, rows: int) -> int:
    return 2 * original(rows)


def test_undo_restores_the_function_and_the_registry(engine):
    original = engine.step
    importer = types.ModuleType("importer_of_a_test")
    sys.modules[importer.__name__] = importer
    try:
        hook._install([hook.Hook("engine_of_a_test.step", doubled, ("rows",))])
        assert hook._applied() == "SGLang did not apply engine_of_a_test.step"
        Registry.apply_hooks()
        importer.step = engine.step  # type: ignore[attr-defined]
        assert engine.step(1) == 4 and hook._applied() == ""
        hook.undo()
        assert engine.step is original is importer.step  # type: ignore[attr-defined]
        assert not Registry._hooks and not Registry._patched and hook._applied() == "no hooks"
        hook.undo()
        hook._install([hook.Hook("engine_of_a_test.step", doubled, ("rows",))])
        Registry.apply_hooks()
        assert engine.step(1) == 4  # and may be put in again
        hook.undo()
    finally:
        del sys.modules[importer.__name__]


def test_undo_keeps_the_hooks_of_another_plugin(engine):
    def plus_ten(original: Any, rows: int) -> int:
        return original(rows) + 10

    Registry.register("engine_of_a_test.step", plus_ten, "around")
    hook._install([hook.Hook("engine_of_a_test.step", doubled, ("rows",))])
    Registry.apply_hooks()
    assert engine.step(1) == 24
    hook.undo()
    assert engine.step(1) == 12


def test_undo_leaves_alone_what_somebody_wrapped_by_hand_since(engine):
    hook._install([hook.Hook("engine_of_a_test.step", doubled, ("rows",))])
    Registry.apply_hooks()
    ours = engine.step
    engine.step = lambda rows: ours(rows) + 100
    hook.undo()
    assert engine.step(1) == 104


@pytest.mark.parametrize(
    ("target", "parameters", "said"),
    [
        ("engine_of_a_test.gone", ("rows",), "does not exist"),
        ("engine_of_a_test.step", ("hidden_states",), r"takes \(rows\), not \(hidden_states, ...\)"),
    ],
)
def test_one_function_that_differs_keeps_all_hooks_out(engine, target, parameters, said):
    good = hook.Hook("engine_of_a_test.other", doubled, ("rows",))
    with pytest.raises(RuntimeError, match=said):
        hook._install([good, hook.Hook(target, doubled, parameters)])
    assert not Registry._hooks and not hook._state.installed


def test_a_dense_mlp_skips_a_batch_without_rows():
    seen = []
    guarded = hook._unless_empty(lambda x, y=None: seen.append(x) or x + 1)
    assert guarded(torch.zeros(0, 4)).shape == (0, 4) and not seen
    assert guarded(torch.zeros(2, 4), y=1).sum() == 8 and len(seen) == 1


# On SGLang's own files.

FILES = pytest.mark.parametrize(
    "version",
    [
        pytest.param(v, marks=[pytest.mark.skipif(bool(files.missing(v)), reason=files.missing(v) or "there")])
        for v in files.VERSIONS
    ],
)
MODELS = ("Glm4MoeForCausalLM", "Qwen3ForCausalLM")
ENVIRONMENT = {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONWARNINGS": "ignore", "TPFUSE_SGLANG": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def pools() -> Iterator[Any]:
    """Four ranks for one version at a time: a process imports SGLang once."""
    held: dict[str, RankPool] = {}

    def of(version: str) -> RankPool:
        if version not in held:
            for other in list(held):
                held.pop(other).close()
            held[version] = RankPool(4, env=ENVIRONMENT)
            held[version].run(mount, version, timeout=600)
        return held[version]

    yield of
    for pool in held.values():
        pool.close()


def mount(rank: int, world: int, version: str) -> None:
    files.mount(version)


def plug_in(version: str) -> None:
    """As SGLang does at the start of a scheduler: find the plugins by their entry points, then apply what they registered."""
    files.mount(version)
    importlib.import_module(hook.SCHEDULER)
    from sglang.srt import plugins

    plugins._plugins_loaded = False
    os.environ["SGLANG_PLUGINS"] = "tpfuse"
    plugins.load_plugins()


def start(model: Any) -> None:
    hook.calls.clear()
    hook.prepare(model, files.HIDDEN, torch.bfloat16, torch.device("cpu"))


def leaves_sums(version: str, architecture: str) -> bool:
    """Whether the model leaves the sum of an MLP to the next layer: Qwen3 of 0.5.17 does not."""
    return not (version == "0.5.17" and architecture.startswith("Qwen3"))


def tokens_of(rank: int, rows: int) -> torch.Tensor:
    return (torch.arange(rows) * 7 + 3) % files.VOCABULARY


def one_group(rank: int, world: int, version: str, architecture: str) -> dict[str, Any]:
    """tp 4 without attention DP: SGLang alone, with the hook, and after undo."""
    setup = files.World(version, architecture, rank, 4)
    try:
        tokens = tokens_of(rank, 6)
        plain = setup.model()
        found: dict[str, Any] = {"alone": setup.run(plain, tokens)}
        targets = [h.target for h in hook._hooks(version)]
        if hook.SCHEDULER not in sys.modules:
            assert [t.rpartition(".")[2] for t in targets] == ["check_server_args"]
        importlib.import_module(hook.SCHEDULER)
        before = {h.target: _standing(h.target) for h in hook._hooks(version)}
        assert len(before) > 8
        plug_in(version)
        assert hook._applied() == ""
        model = setup.model()
        found["not ready"] = setup.run(model, tokens)
        start(model)
        found["active"] = hook.active()
        found["hooked"] = setup.run(model, tokens)
        found["calls"] = dict(hook.calls)
        hook.undo()
        found["undone"] = setup.run(model, tokens)
        found["restored"] = all(_standing(t) is raw for t, raw in before.items())
        return found
    finally:
        hook.undo()
        setup.close()


def _standing(target: str) -> Any:
    import pkgutil

    path, _, name = target.rpartition(".")
    return vars(pkgutil.resolve_name(path))[name]


@FILES
@pytest.mark.parametrize("architecture", MODELS)
@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(900)
def test_one_attention_group(version, architecture, pools):
    for found in pools(version).run(one_group, version, architecture, timeout=600):
        assert torch.equal(found["alone"], found["not ready"])
        assert torch.equal(found["alone"], found["undone"]) and found["restored"]
        assert torch.equal(found["hooked"], found["alone"])
        assert len(found["active"]) == 1
        after_mlp = {"after mlp": files.LAYERS - 1} if leaves_sums(version, architecture) else {}
        assert found["calls"] == {"after attention": files.LAYERS, **after_mlp}


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    """Within what one rounding of bf16 before each of the norms may change: groups of another size add in another order.

    Each element of a norm's input moves by at most half a step of bf16, 2**-9 of it, so its output by about 2**-9 of itself, and
    by one step more where that crosses a rounding. Three layers of two norms, each followed by matrices of norm about 1:
    6 * 2**-8 relative to the size of a row.
    """
    scale = b.float().pow(2).mean(-1, keepdim=True).sqrt()
    assert ((a.float() - b.float()).abs() / scale).pow(2).mean().sqrt() < 6 * 2**-8


def shared(rank: int, world: int, version: str, architecture: str, rows: tuple[int, int]) -> dict[str, Any]:
    """tp 4, attention DP 2, attention TP 2, the dense MLP over the attention TP group; replicas with rows of their own."""
    plug_in(version)
    setup = files.World(version, architecture, rank, 4, 2, 2)
    try:
        model = setup.model()
        start(model)
        mine = tokens_of(rank, rows[rank // 2]) + rank // 2
        found = {"active": hook.active(), "hooked": setup.run(model, mine)}
        found["calls"] = dict(hook.calls)
        mlp = model.model.layers[0].mlp
        found["weight"] = tuple(mlp.down_proj.weight.shape)
        found["cut"] = mlp.down_proj.weight.clone()
        hook.undo()
        found["undone"] = setup.run(model, mine)
        return found
    finally:
        hook.undo()
        setup.close()


def whole(rank: int, world: int, version: str, architecture: str, rows: tuple[int, int]) -> list[torch.Tensor]:
    """The same tokens without attention DP and without the hook."""
    setup = files.World(version, architecture, rank, 4)
    try:
        model = setup.model()
        return [setup.run(model, tokens_of(rank, count) + i) if count else None for i, count in enumerate(rows)]
    finally:
        setup.close()


@FILES
@pytest.mark.parametrize(
    ("architecture", "rows"), [(MODELS[0], (5, 3)), (MODELS[0], (4, 0)), (MODELS[1], (5, 3))], ids=str
)
@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(900)
def test_the_dense_mlp_shares_the_attention_group_under_attention_dp(version, architecture, rows, pools):
    expected = pools(version).run(whole, version, architecture, rows, timeout=600)
    found = pools(version).run(shared, version, architecture, rows, timeout=600)
    assert torch.equal(found[0]["cut"], found[2]["cut"]) and not torch.equal(found[0]["cut"], found[1]["cut"])
    for rank, one in enumerate(found):
        assert one["weight"] == (files.HIDDEN, 128 // 2)
        assert torch.equal(one["hooked"], one["undone"])
        count = rows[rank // 2]
        assert one["hooked"].shape == (count, files.HIDDEN)
        if count == 0:
            assert one["calls"] == {}
            continue
        after_mlp = {"after mlp": files.LAYERS - 1} if leaves_sums(version, architecture) else {}
        assert one["calls"] == {"after attention": files.LAYERS, **after_mlp}
        close(one["undone"], expected[rank][rank // 2])


def one_cannot(rank: int, world: int, version: str) -> dict[str, Any]:
    plug_in(version)
    setup = files.World(version, MODELS[0], rank, 4)
    try:
        model = setup.model()
        applied = hook._applied
        if rank == 2:
            hook._applied = lambda: "this rank cannot"
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            start(model)
        hook._applied = applied
        setup.run(model, tokens_of(rank, 4))
        return {"active": hook.active(), "calls": dict(hook.calls), "heard": [str(w.message) for w in heard]}
    finally:
        hook.undo()
        setup.close()


@FILES
@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(900)
def test_a_rank_that_cannot_keeps_all_ranks_on_sglangs_own_path(version, pools):
    found = pools(version).run(one_cannot, version, timeout=600)
    assert all(one["active"] == [] and one["calls"] == {} for one in found)
    assert "rank 2: this rank cannot" in " ".join(found[0]["heard"])


def not_cut(rank: int, world: int, version: str) -> str:
    """A model whose dense MLP has another name."""
    plug_in(version)
    setup = files.World(version, MODELS[0], rank, 4, 2, 2)
    pattern = hook.DENSE_MLP
    try:
        hook.DENSE_MLP = re.compile("nothing")
        model = setup.model()
        start(model)
        return "started"
    except RuntimeError as error:
        return str(error)
    finally:
        hook.DENSE_MLP = pattern
        hook.undo()
        setup.close()


@FILES
@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(900)
def test_a_dense_mlp_that_is_cut_otherwise_is_an_error_on_all_ranks(version, pools):
    for said in pools(version).run(not_cut, version, timeout=600):
        assert "moe_dense_tp_size=2 is not possible" in said and "no MLP of the name mlp" in said


TABLE = [
    # tp, dp, dense -> SGLang alone, SGLang with the hook, ParallelConfig
    (4, 1, None, True, True, True),
    (4, 1, 1, True, True, True),
    (4, 1, 4, True, True, True),
    (4, 1, 2, False, False, False),
    (4, 2, None, True, True, True),
    (4, 2, 1, True, True, True),
    (4, 2, 4, True, True, True),
    (4, 2, 2, False, True, True),  # the dense MLP shares the attention TP group: SGLang has no such case
    (8, 2, 4, False, True, True),
    (8, 4, 2, False, True, True),
    (8, 2, 2, False, False, False),
    (8, 8, 1, True, True, True),
    (8, 4, 4, False, False, False),
]


def accepted(rank: int, world: int, version: str) -> list[list[bool]]:
    """What SGLang's own server arguments accept: first alone, then with the hook."""
    import tempfile

    files.mount(version)
    found: list[list[bool]] = []
    with tempfile.TemporaryDirectory() as folder:
        files.write_config(folder, MODELS[0])
        for hooked in (False, True):
            if hooked:
                plug_in(version)
            found.append([_accepts(folder, tp, dp, dense) for tp, dp, dense, *_ in TABLE])
    hook.undo()
    return found


def _accepts(folder: str, tp: int, dp: int, dense: int | None) -> bool:
    try:
        given = files.arguments(folder, tp, dp, dense)
        given.check_server_args()
    except AssertionError as error:
        assert "moe_dense_tp_size only supports None, 1, or tp_size" in str(error)
        return False
    assert given.moe_dense_tp_size == dense  # nothing is left hidden
    return True


@FILES
@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(900)
def test_the_server_arguments_beside_parallel_config(version, pools):
    alone, hooked = pools(version).run(accepted, version, timeout=600)[0]
    ours = []
    for tp, dp, dense, *_ in TABLE:
        try:
            ours.append(bool(ParallelConfig(tp_size=tp, attn_dp_size=dp, moe_dense_tp_size=dense)))
        except ConfigError:
            ours.append(False)
    found = [(*row[:3], *said) for row, said in zip(TABLE, zip(alone, hooked, ours, strict=True), strict=True)]
    assert found == TABLE


def norms(rank: int, world: int, version: str) -> dict[str, tuple[bool, bool]]:
    """For each norm of SGLang that the op stands in for: are residuals equal, are normed rows equal."""
    setup = files.World(version, MODELS[0], rank, 4)
    try:
        from sglang.srt.layers.layernorm import GemmaRMSNorm, RMSNorm

        dice = torch.Generator().manual_seed(3)
        x, residual = (torch.randn(64, 256, generator=dice).bfloat16() for _ in range(2))
        found = {}
        for name, norm in {
            "once": RMSNorm(256),
            "once, fp32 weight": RMSNorm(256, weight_dtype=torch.float32),
            "before the weight": RMSNorm(256, cast_x_before_out_mul=True),
            "gemma": GemmaRMSNorm(256),
        }.items():
            flavour = hook.rounding(norm, torch.bfloat16)
            with torch.no_grad():
                norm.weight.copy_(torch.rand(256, generator=dice) + 0.5)
                if name != "once, fp32 weight":
                    norm.bfloat16()
                theirs = norm.forward_native(x.clone(), residual.clone())
                ours = reference.add_rms_norm(
                    x, residual, norm.weight, None, norm.variance_epsilon, 1.0, flavour, False
                )
            found[name] = (torch.equal(theirs[1], ours[1]), torch.equal(theirs[0], ours[0]))
        refused = [
            RMSNorm(256, has_weight=False),
            RMSNorm(256, fp32_residual=True),
            RMSNorm(256, var_hidden_size=128),
            RMSNorm(256, override_orig_dtype=torch.float32),
            torch.nn.LayerNorm(256),
        ]
        assert [hook.rounding(norm, torch.bfloat16) for norm in refused] == [None] * len(refused)
        assert hook.rounding(RMSNorm(256), torch.bfloat16) == SGLANG
        assert hook.rounding(RMSNorm(256, cast_x_before_out_mul=True), torch.bfloat16) == VLLM
        assert hook.rounding(GemmaRMSNorm(256), torch.bfloat16) == GEMMA
        return found
    finally:
        setup.close()


@FILES
@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(900)
def test_the_rounding_order_of_sglangs_norms(version, pools):
    found = pools(version).run(norms, version, timeout=600)[0]
    # SGLang's RMSNorm normalizes the sum before it is rounded, Gemma's after.
    assert len(found) == 4 and set(found.values()) == {(True, True)}


def scattered(rank: int, world: int, version: str) -> dict[str, Any]:
    """The step of the shared layout with a residual that lies scattered: two rows over two ranks."""
    plug_in(version)
    setup = files.World(version, MODELS[0], rank, 4, 2, 2)
    try:
        from sglang.srt.layers.communicator import CommunicateWithAllReduceAndLayerNormFn as Step
        from sglang.srt.layers.layernorm import RMSNorm
        from sglang.srt.runtime_context import get_parallel

        norm = RMSNorm(files.HIDDEN).bfloat16().requires_grad_(False)
        whole = torch.randn(2, files.HIDDEN, generator=torch.Generator().manual_seed(rank // 2)).bfloat16()
        partial = torch.randn(2, files.HIDDEN, generator=torch.Generator().manual_seed(9 + rank)).bfloat16()
        mine = whole[rank % 2 :][:1]

        def step(residual: torch.Tensor) -> Any:
            with torch.no_grad():
                return Step._tp_attn_all_reduce_and_layernorm(partial.clone(), residual.clone(), None, norm, None)

        hooked, expected = step(mine), step(whole)
        hook.undo()
        alone = step(mine)
        return {
            "hooked": torch.equal(hooked[1], expected[1]),
            "alone": torch.equal(alone[1], expected[1]),
            "group": list(get_parallel().attn_tp_group.ranks),
        }
    finally:
        hook.undo()
        setup.close()


@pytest.mark.skipif(bool(files.missing("0.5.17")), reason=files.missing("0.5.17") or "there")
@pytest.mark.slow
@pytest.mark.ranks
@pytest.mark.timeout(900)
def test_a_scattered_residual_is_gathered_where_sglang_would_add_other_rows(pools):
    for rank, found in enumerate(pools("0.5.17").run(scattered, "0.5.17", timeout=600)):
        assert found == {"hooked": True, "alone": False, "group": [0, 1] if rank < 2 else [2, 3]}
