"""Lowered sites: on a CPU Inductor gets the model's own nodes, and the report still counts them."""

from __future__ import annotations

from typing import Any

import layers
import pytest
import torch
import torch.distributed as dist
from ranks import RankPool
from tpfuse.passes.report import LOWERED

pytestmark = pytest.mark.ranks

FUSED = 2  # one layer
H = 64
ENV = {"TORCHINDUCTOR_COMPILE_THREADS": "1"}


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    return {**ENV, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path_factory.mktemp("inductor"))}


@pytest.fixture(scope="module")
def pool(env):
    with RankPool(2, env=env) as pool:
        yield pool


@pytest.fixture(scope="module")
def alone(env):
    with RankPool(2, env=env, alone=True) as pool:
        yield pool


# -- the code ---------------------------------------------------------------------------------------------------------


def codes(
    rank: int,
    world_size: int,
    dtype: torch.dtype,
    ways: dict[str, tuple[str, dict[str, Any]]],
    lengths: tuple[int, ...],
) -> dict[str, Any]:
    """What Inductor generates for the decoder in each way, without the number of the graph; outputs, report and its text."""
    from torch._inductor.utils import run_and_get_code

    import tpfuse

    found: dict[str, Any] = {}
    for name, (backend, options) in ways.items():
        torch._dynamo.reset()
        tpfuse.clear_reports()
        model = layers.Decoder(1, dtype=dtype)
        compiled = torch.compile(model, backend=backend, options={**options, "fx_graph_cache": False})

        def run(compiled: Any = compiled) -> list[torch.Tensor]:
            outputs = []
            for length in lengths:
                tokens = layers.tokens(2, length)
                if len(lengths) > 1:
                    torch._dynamo.mark_dynamic(tokens, 1)
                outputs.append(compiled(tokens))
            return outputs

        with torch.no_grad(), torch._functorch.config.patch(enable_autograd_cache=False):
            outputs, texts = run_and_get_code(run)
        reports = tpfuse.reports()
        found[name] = {
            "code": ["\n".join(line for line in text.splitlines() if "AOT ID" not in line) for text in texts],
            "outputs": outputs,
            "sites": [(s.fused, s.lowered, s.replaced_by) for r in reports for s in r.sites],
            "says": str(reports[0]) if reports else "",
        }
    return found


ALONE, OURS, OFF = ("inductor", {}), ("tpfuse", {}), ("tpfuse", {"tpfuse.lower": False})


def is_inductors_own(found: dict[str, Any]) -> None:
    """The code of our way is that of Inductor alone, and the report counts its sites and says how they run."""
    ours, alone = found["ours"], found["alone"]
    assert ours["code"] == alone["code"]
    assert len(ours["code"]) == 1  # dynamic rows: one graph for all
    assert "tpfuse" not in ours["code"][0] and ours["code"][0].count("torch.ops._c10d_functional.all_reduce") == FUSED
    assert ours["sites"] == [(True, True, None)] * FUSED
    assert f"{FUSED} all-reduces, {FUSED} fused, 0 kept" in ours["says"]
    assert f"{FUSED} of {FUSED} fused run as: {LOWERED}" in ours["says"] and "saves" not in ours["says"]
    for a, b in zip(ours["outputs"], alone["outputs"], strict=True):
        assert torch.equal(a, b)


def test_in_fp32_the_code_is_inductors_own_and_the_option_keeps_the_op(alone):
    """So it cannot be slower: all of Inductor's fusion, and its collectives and waits where Inductor puts them."""
    (found,) = alone.run(codes, torch.float32, {"alone": ALONE, "ours": OURS, "off": OFF}, (5,))
    is_inductors_own(found)
    off = found["off"]
    assert [(fused, low) for fused, low, _ in off["sites"]] == [(True, False)] * FUSED
    assert all(name for *_, name in off["sites"])
    assert off["code"][0].count("tpfuse.all_reduce_add_rms_norm.default(") == FUSED
    assert LOWERED not in off["says"] and f"saves an estimated {FUSED} launches" in off["says"]
    # What follows each all-reduce is one kernel, where the op runs a dozen operators.
    kernels = {name: way["code"][0].count("= async_compile.cpp") for name, way in found.items()}
    assert kernels["ours"] == kernels["off"] + FUSED, kernels


@pytest.mark.slow
def test_the_same_with_dynamic_rows(alone):
    (found,) = alone.run(codes, torch.float32, {"alone": ALONE, "ours": OURS}, (5, 7, 9))
    is_inductors_own(found)


# -- the bits ---------------------------------------------------------------------------------------------------------


def norms(rank: int, world_size: int, dtype: torch.dtype, names: list[str], ways: dict[str, Any]) -> dict[str, Any]:
    """A sum, a residual add and a norm of each flavour in one graph: what each way gives for three rows and for none."""
    import graphs
    from tpfuse.ops.flavour import NAMED
    from tpfuse.ops.reference import rms_norm

    import tpfuse

    def layer(x: torch.Tensor, r: torch.Tensor, w: torch.Tensor) -> list[torch.Tensor]:
        outputs: list[torch.Tensor] = []
        for name in names:
            if outputs:
                x = x + 2.0**-60 * outputs[-2]  # the same x, but the sums stand one after another
            y = graphs.all_reduce(x)
            if NAMED[name].reads == "unrounded":
                h = r.float() + y.float()
                outputs += [rms_norm(h, w, 1e-5, NAMED[name], y.dtype), h.to(y.dtype)]
            else:
                h = r + y
                outputs += [rms_norm(h, w, 1e-5, NAMED[name]), h]
        return outputs

    shared, mine = torch.Generator().manual_seed(1), torch.Generator().manual_seed(100 + rank)
    w = torch.randn(H, generator=shared).to(dtype)
    inputs = [
        ((torch.randn(n, H, generator=mine) * 2).to(dtype), (torch.randn(n, H, generator=shared) * 2).to(dtype), w)
        for n in (30, 0)
    ]
    found: dict[str, Any] = {"eager": [layer(*i) for i in inputs]}
    for name, (backend, options) in ways.items():
        torch._dynamo.reset()
        tpfuse.clear_reports()
        policy = {"tpfuse.policy": "all"} if backend == "tpfuse" else {}
        compiled = torch.compile(layer, backend=backend, options={**policy, **options}, dynamic=False)
        with torch.no_grad():
            found[name] = [compiled(*i) for i in inputs]
        found[f"{name} sites"] = [(s.fused, s.lowered) for r in tpfuse.reports() for s in r.sites]
    return found


def pairs(found: dict[str, Any], a: str, b: str) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """(norms, residual sums) of two ways, beside each other; dtypes and shapes are compared here."""
    both = [pair for one, two in zip(found[a], found[b], strict=True) for pair in zip(one, two, strict=True)]
    assert all(x.dtype == y.dtype and x.shape == y.shape for x, y in both)
    return [both[0::2], both[1::2]]


def test_in_fp32_the_bits_are_those_of_inductor_alone_and_the_residual_sum_is_the_ops(alone):
    names = ["llama", "gemma4"]
    results = alone.run(norms, torch.float32, names, {"alone": ALONE, "ours": OURS})
    for found in results:
        assert found["ours sites"] == [(True, True)] * 2 * len(names)
        assert all(torch.equal(a, b) for kind in pairs(found, "ours", "alone") for a, b in kind)
        normed, sums = pairs(found, "ours", "eager")
        assert all(torch.equal(a, b) for a, b in sums)
        for a, b in normed:
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # the squares are added in another order


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
def test_in_low_precision_the_op_stays_and_has_the_models_bits(alone, dtype):
    """Inductor alone keeps these steps in fp32, which changes a quarter of the elements."""
    names = ["llama", "vllm"]
    results = alone.run(norms, dtype, names, {"ours": OURS, "relaxed": ("tpfuse", {"tpfuse.numerics": "relaxed"})})
    for found in results:
        assert found["ours sites"] == [(True, False)] * len(names) * 2
        assert found["relaxed sites"] == [(True, True)] * len(names) * 2
        assert all(torch.equal(a, b) for kind in pairs(found, "ours", "eager") for a, b in kind)
        normed, _ = pairs(found, "relaxed", "eager")
        assert any(a.numel() and not torch.equal(a, b) for a, b in normed), (
            "Inductor rounds by itself now: the op can go"
        )


# -- the mode that sums in another way ----------------------------------------------------------------------------------


def modes(rank: int, world_size: int) -> dict[str, Any]:
    """Compiled in the usual mode and run; then the mode is asked for. And compiled where it is on."""
    from tpfuse.ops import invariant

    import tpfuse

    def run(compiled: Any) -> torch.Tensor:
        with torch.no_grad():
            return compiled(layers.tokens())

    torch._dynamo.reset()
    tpfuse.clear_reports()
    model = layers.Decoder(1, dtype=torch.float32)
    compiled = torch.compile(model, backend="tpfuse")
    name = dist.group.WORLD.group_name  # type: ignore[union-attr]
    invariant.forget(name)
    first = run(compiled)
    found: dict[str, Any] = {"lowered": [s.lowered for r in tpfuse.reports() for s in r.sites]}
    for key, switch in (
        ("by call", lambda: tpfuse.ops.set_batch_invariant(True)),
        ("by variable", lambda: run(compiled)),
    ):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError) as error:
            if key == "by variable":
                patch.setenv("TPFUSE_BATCH_INVARIANT", "1")
            switch()
        found[key] = str(error.value)
    assert torch.equal(run(compiled), first)
    invariant.forget(name)  # a group that makes calls again is remembered again
    run(compiled)
    with pytest.raises(RuntimeError, match="have made calls with it off"):
        tpfuse.ops.set_batch_invariant(True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TPFUSE_BATCH_INVARIANT", "1")
        invariant.forget(name)
        torch._dynamo.reset()
        tpfuse.clear_reports()
        found["error"] = (run(torch.compile(model, backend="tpfuse")) - model(layers.tokens())).abs().max().item()
        found["with the mode"] = [(s.fused, s.lowered) for r in tpfuse.reports() for s in r.sites]
        invariant.forget(name)
    return found


def test_in_batch_invariant_mode_the_op_stays_and_switching_it_on_later_is_an_error(pool):
    for found in pool.run(modes):
        assert found["lowered"] == [True, True]
        assert "have made calls with it off" in found["by call"]
        assert "switched on after this graph was compiled" in found["by variable"]
        assert "torch._dynamo.reset()" in found["by variable"]
        assert found["with the mode"] == [(True, False)] * 2 and found["error"] < 1e-5


# -- caches and ranks ---------------------------------------------------------------------------------------------------


def one_rank_switched_it_off(rank: int, world_size: int) -> Any:
    import tpfuse

    torch._dynamo.reset()
    tpfuse.clear_reports()
    options = {"tpfuse.lower": rank == 0}
    with torch.no_grad(), pytest.warns(tpfuse.FusionWarning) as told:
        model = torch.compile(layers.Decoder(1, dtype=torch.float32), backend="tpfuse", options=options)
        logits = model(layers.tokens())
    reasons = {site.reason for report in tpfuse.reports() for site in report.sites}
    return logits.tolist(), reasons, [str(warning.message) for warning in told]


@pytest.mark.slow
def test_ranks_that_lower_differently_leave_the_graph_as_it_was(env):
    """They would not wait for each other, but a residual stream with two roundings of one sum is no longer one stream."""
    with RankPool(2, env=env) as pool:
        first, second = pool.run(one_rank_switched_it_off)
    assert first == second
    _, reasons, (said,) = first
    assert reasons == {"ranks-disagree"}
    assert "lowered over [0, 1]" in said and "lower=False" in said and "lower=True" in said


def identities(rank: int, world_size: int) -> list[str]:
    from tpfuse.inner.inductor import InductorPass
    from tpfuse.options import Options

    return [InductorPass(Options(), False, None, lower).uuid() for lower in (True, False)]


def test_the_compile_cache_knows_whether_sites_are_lowered(alone):
    (found,) = alone.run(identities)
    assert len(set(found)) == 2
