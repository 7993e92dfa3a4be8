"""What explain says is what a real compile does, for public model shapes at the layouts this project is about."""

from __future__ import annotations

import json
import time

import models
import pytest
import torch
from ranks import RankPool
from test_cli import refused, tpfuse

from tpfuse.inspect import explain as explaining
from tpfuse.inspect import words
from tpfuse.inspect.explain import Request, explain
from tpfuse.parallel import ParallelConfig
from tpfuse.parallel.model import exchange_rows, parallelize

pytestmark = pytest.mark.long  # not on every save

# Shapes of the public configs; what is not given here is transformers' default for the type, which is the public value.
PUBLIC = {
    "deepseek_v3": {},  # DeepSeek-V3: 61 layers of 7168, 3 of them dense
    "glm4_moe": {},  # GLM-4.5-Air: 46 layers of 4096, the first dense
    "qwen3_moe": {  # Qwen3-235B-A22B: every layer has experts
        "num_hidden_layers": 94, "hidden_size": 4096, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128,
        "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 1536, "intermediate_size": 12288,
    },
    "llama": {  # Llama-3.1-405B
        "num_hidden_layers": 126, "hidden_size": 16384, "num_attention_heads": 128, "num_key_value_heads": 8,
        "intermediate_size": 53248,
    },
}  # fmt: skip
LOW, HIGH, ALL = (0, 1, 2, 3), (4, 5, 6, 7), tuple(range(8))


def folder_of(name: str, where, **changes):
    """A folder with nothing but the config of a public model."""
    from transformers import AutoConfig

    AutoConfig.for_model(name, **{**PUBLIC[name], **changes}).save_pretrained(where)
    return str(where)


def decisions(reports):
    return [(s.layer, s.role, s.group, s.fused, s.reason, s.pattern) for report in reports for s in report.sites]


def counts(found):
    """How often each (role, group, fused or the reason) occurs."""
    counted = {}
    for site in (site for report in found.reports for site in report.sites):
        key = (site.role, site.group, site.reason or "fused")
        counted[key] = counted.get(key, 0) + 1
    return counted


def embedding(group, decision):
    """The vocabulary is cut over the ranks of one attention."""
    return ("embedding", group, decision)


# -- the tiny version of each architecture, on real ranks -----------------------------------------------------------


def compiled_on_gloo(rank, world_size, name, sizes, layers):
    """One decode step of the tiny model on this rank: what the pass decided."""
    import tpfuse as package

    model = parallelize(models.unsharded(name, **layers), ParallelConfig(*sizes))
    torch.compiler.reset()
    package.clear_reports()
    largest = exchange_rows(model, explaining.SEQUENCES)
    tokens = torch.zeros(explaining.SEQUENCES, 1, dtype=torch.long)
    with torch.no_grad():
        torch.compile(model, backend="tpfuse", options={"tpfuse.inner": "aot_eager"})(
            input_ids=tokens, use_cache=False, largest_block=largest
        )
    return decisions(package.reports())


@pytest.fixture(scope="module")
def pool():
    with RankPool(4) as pool:
        yield pool


TINY_LAYERS = {
    "deepseek_v3": {"num_hidden_layers": 4, "first_k_dense_replace": 2},
    "glm4_moe": {"num_hidden_layers": 4, "first_k_dense_replace": 2},
    "qwen3_moe": {"num_hidden_layers": 2},
    "llama": {"num_hidden_layers": 2},
}
ONE_OF_EACH = {"num_hidden_layers": 2, "first_k_dense_replace": 1}  # a dense layer, then experts


@pytest.mark.ranks
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("llama", (4, 2, 1, 2)),
        ("llama", (4, 1, 1, None)),
        ("qwen3_moe", (4, 2, 1, 2)),
        ("glm4_moe", (4, 2, 1, 2)),
        ("deepseek_v3", (4, 2, 1, 2)),
        ("deepseek_v3", (4, 2, 1, 4)),
        ("deepseek_v3", (4, 2, 1, 1)),
        ("deepseek_v3", (4, 1, 1, None)),
        ("deepseek_v3", (4, 4, 1, 1)),
    ],
)
def test_it_decides_as_a_real_compile_on_gloo_ranks_does(pool, tmp_path, name, sizes):
    models.config(name, **TINY_LAYERS[name]).save_pretrained(tmp_path)
    real = pool.run(compiled_on_gloo, name, sizes, TINY_LAYERS[name])
    for rank in (0, 3):
        found = explain(Request(str(tmp_path), ParallelConfig(*sizes), rank, dtype=torch.float32))
        assert decisions(found.reports) == real[rank]


@pytest.mark.parametrize(
    "sizes",
    [
        (4, 2, 1, 2),
        *(pytest.param(s, marks=pytest.mark.slow) for s in ((4, 2, 1, 1), (4, 2, 1, 4), (4, 1, 1, None), (4, 4, 1, 1))),
    ],
    ids=str,
)
def test_the_graph_has_the_reductions_of_the_plan(tmp_path, sizes):
    models.config("deepseek_v3", **ONE_OF_EACH).save_pretrained(tmp_path)
    assert explain(Request(str(tmp_path), ParallelConfig(*sizes), 3, dtype=torch.float32)).notes == []


@pytest.mark.parametrize(
    ("sizes", "rank", "gathers"),
    [
        ((8, 2, 1, 4), 5, 1),  # in front of the experts
        *(
            pytest.param(*layout, marks=pytest.mark.slow)
            for layout in (
                ((8, 2, 1, 4), 0, 1),
                ((8, 2, 1, 1), 3, 1),
                ((8, 2, 1, 8), 6, 2),  # in front of the dense MLP, which spans all ranks, too
                ((8, 4, 1, 2), 0, 1),
                ((8, 4, 1, 2), 7, 1),
                ((8, 8, 1, 1), 2, 0),  # attention of one rank sums nothing
            )
        ),
    ],
    ids=str,
)
def test_the_rows_of_all_replicas_come_out_of_the_op(tmp_path, sizes, rank, gathers):
    models.config("deepseek_v3", **{**ONE_OF_EACH, "num_attention_heads": 8, "num_key_value_heads": 8}).save_pretrained(
        tmp_path
    )
    found = explain(Request(str(tmp_path), ParallelConfig(*sizes), rank, rows=(1, 4096), dtype=torch.float32))
    sites = [site for report in found.reports for site in report.sites if site.over]
    assert [(site.role, site.over) for site in sites] == [("attention", ALL)] * gathers
    assert all(site.fused and site.pattern == "all_reduce+add+rms_norm+all_gather" for site in sites)
    assert found.notes == []
    if gathers:
        block = ParallelConfig(*sizes).group_of("attn_tp", rank)
        assert found.steps[0].algorithms[f"{words.ranks(block)} of 0-7"] == "gathered_blocks"
        assert {row.fuses for row in found.plan if "gather_blocks" in row.steps} == {"yes"}


# -- public shapes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "rank", "expected"),
    [
        ((8, 2, 1, 4), 5, {embedding(HIGH, "fused"): 1, ("attention", HIGH, "fused"): 1, ("mlp", HIGH, "fused"): 1}),
        ((8, 2, 1, 8), 5, {embedding(HIGH, "fused"): 1, ("attention", HIGH, "fused"): 1, ("mlp", ALL, "fused"): 1}),
        *(
            pytest.param(*layout, marks=pytest.mark.slow)
            for layout in (
                ((8, 2, 1, 1), 5, {embedding(HIGH, "fused"): 1, ("attention", HIGH, "fused"): 1}),
                ((8, 1, 1, 8), 5, {embedding(ALL, "fused"): 1, ("attention", ALL, "fused"): 1, ("mlp", ALL, "fused"): 1}),
                (
                    (8, 4, 1, 2), 5,
                    {embedding((4, 5), "fused"): 1, ("attention", (4, 5), "fused"): 1, ("mlp", (4, 5), "fused"): 1},
                ),
                ((8, 8, 1, 1), 5, {}),
            )
        ),
    ],
)  # fmt: skip
def test_a_dense_model_of_public_shape_at_every_layout(tmp_path, sizes, rank, expected):
    found = explain(Request(folder_of("llama", tmp_path, num_hidden_layers=1), ParallelConfig(*sizes), rank))
    assert found.hidden == 16384
    assert counts(found) == expected
    assert found.notes == []


@pytest.mark.slow
@pytest.mark.parametrize("name", list(PUBLIC))
def test_a_whole_model_of_public_shape_with_the_shared_group(tmp_path, name):
    """Every reduction of every layer: over [4..7], and over all ranks behind the experts, whose rows return to [4..7]."""
    folder = folder_of(name, tmp_path)
    started, cpu = time.perf_counter(), time.process_time()
    found = explain(Request(folder, ParallelConfig(8, 2, 1, 4), rank=5))
    wall, cpu = time.perf_counter() - started, time.process_time() - cpu
    print(f"{name}: {found.layers} layers in {wall:.0f} s, {cpu:.0f} s of CPU")
    # A minute for 80 layers, in CPU time, so that a busy machine does not fail it: nearly all of it is one thread.
    assert cpu < 60 * max(80, found.layers) / 80
    dense = {"llama": 126, "deepseek_v3": 3, "glm4_moe": 1, "qwen3_moe": 0}[name]
    experts = found.layers - dense
    assert any(row.into == "moe" for row in found.plan) == (experts > 0)
    mlp = {("mlp", HIGH, "fused"): dense, ("mlp", ALL, "fused"): experts}
    expected = {embedding(HIGH, "fused"): 1, ("attention", HIGH, "fused"): found.layers, **mlp}
    assert counts(found) == {key: count for key, count in expected.items() if count}
    assert found.notes == []


def test_progress_counts_every_layer(tmp_path):
    folder = folder_of("llama", tmp_path, num_hidden_layers=2)
    seen = []
    explain(Request(folder, ParallelConfig(2)), tick=lambda stage, done, of: seen.append((stage, done, of)))
    assert [done for _, done, of in seen if of == 2] == [0, 1, 2]
    assert [stage for stage, *_ in seen][:4] == ["reading the config", "building the model", "sharding", "tracing"]


# -- the command ----------------------------------------------------------------------------------------------------


def test_the_command_prints_groups_plan_sites_and_steps(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # no line is broken, whatever the terminal
    folder = folder_of("deepseek_v3", tmp_path / "model", num_hidden_layers=4)
    html, data = tmp_path / "page.html", tmp_path / "found.json"
    sizes = ("--tp-size", 8, "--attn-dp-size", 2, "--moe-dense-tp-size", 4, "--rank", 5, "--rows", "1,64,4096")
    result = tpfuse("explain", folder, *sizes, "--html", html, "--json", data)
    assert result.returncode == 0, result.stderr
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    for line in (
        "Groups of rank 5; dense MLP and attention: shared",
        "attn_tp 4-7 4",
        "0-2 dense replica all_reduce(attn_tp [4-7]), add, norm yes",
        "1 one_shot over 4-7, gathered_blocks over 4-7 of 0-7, one_shot over 0-7 10 280.0 KiB",
        "4096 library over 4-7, library+all_gather over 4-7 of 0-7, library over 0-7 0 0 B",
    ):
        assert line in lines
    # The number of the graph is the process's own count.
    assert any(line.endswith(": 9 all-reduces, 9 fused (1 gathered), 0 kept, rank 5 of 8") for line in lines)
    found = json.loads(data.read_text())
    assert found["schema"] == 1
    assert found["dense_shares_attention"] is True
    assert [step["rows"] for step in found["steps"]] == [1, 64, 4096]
    assert len(found["graphs"][0]["sites"]) == 9
    page = html.read_text()
    assert "Groups of rank 5" in page
    assert "rows/2" in page


def test_json_can_go_to_stdout(tmp_path):
    folder = folder_of("llama", tmp_path, num_hidden_layers=1)
    result = tpfuse("explain", folder, "--tp-size", 2, "--json", "-")
    assert json.loads(result.stdout)["model_type"] == "llama"


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["lama", "--tp-size", 2], ["'lama' is neither a folder nor a model type", "did you mean llama"]),
        (["./absent", "--tp-size", 2], ["./absent does not exist", "config.json"]),
        (["vit", "--tp-size", 2], ["no causal language model", "model_type='vit'"]),
        (["lfm2", "--tp-size", 2], ["no architecture is known", "llama"]),
        (["llama", "--tp-size", 8, "--attn-dp-size", 2, "--moe-dense-tp-size", 2], ["moe_dense_tp_size=2", "attn_tp_size=4"]),
        (["llama", "--tp-size", 3], ["heads", "do not split over the 3 ranks"]),
        (["llama", "--tp-size", 2, "--rank", 2], ["rank 2 does not exist"]),
        (["llama", "--tp-size", 2, "--rows", "0"], ["--rows is '0'"]),
        (["llama", "--tp-size", 2, "--policy", "some"], ["policy", "shared, strict, all, off"]),
        (["llama", "--tp-size", 2, "--arch", "sm90"], ["'sm90'", "sm_80 or newer", "sm_90-pcie"]),
        (["llama", "--tp-size", 2, "--arch", "sm_70"], ["'sm_70'", "no older ones"]),
        (["llama", "--tp-size", 2, "--arch", "sm_90-pci"], ["'sm_90-pci'", "sm_90-pcie"]),
        (["llama", "--tp-size", 2, "--json", "absent/x.json"], ["--json is absent/x.json", "no folder absent"]),
        (["meta-llama/Llama-3.1-8B", "--tp-size", 2], ["does not exist", "The Hub is not asked", "config.json"]),
    ],
)  # fmt: skip
def test_what_a_user_can_get_wrong_is_one_line(arguments, parts):
    refused(tpfuse("explain", *arguments), "tpfuse explain:", *parts)


def test_links_are_part_of_the_architecture(tmp_path):
    folder = folder_of("llama", tmp_path, num_hidden_layers=1)
    result = tpfuse("explain", folder, "--tp-size", 2, "--arch", "sm_90-pcie", "--rows", "4096")
    assert result.returncode == 0 and "Per step on sm_90-pcie" in result.stdout
    assert "4096 library over 0,1" in " ".join(result.stdout.split())


def test_one_rank_is_named_as_the_size(tmp_path):
    result = tpfuse("explain", folder_of("llama", tmp_path, num_hidden_layers=1), "--tp-size", 1)
    assert "tp_size=1; rank 0" in " ".join(result.stdout.split())
    assert "no all-reduce: there is one rank" in result.stdout


def test_a_folder_without_a_config(tmp_path):
    refused(tpfuse("explain", tmp_path, "--tp-size", 2), "has no config.json")


def test_a_config_with_code_of_its_own_is_refused_without_a_question(tmp_path):
    config = {"model_type": "somebodys_own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "configuration_own.py").write_text("raise SystemExit('this code was run')")
    result = tpfuse("explain", tmp_path, "--tp-size", 2)
    refused(result, "brings code of its own")
    assert "[y/N]" not in result.stdout + result.stderr


def test_a_config_that_is_broken(tmp_path):
    (tmp_path / "config.json").write_text("{")
    refused(tpfuse("explain", tmp_path, "--tp-size", 2), "config.json cannot be read")
