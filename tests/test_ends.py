"""A sum that leaves its graph before its norm: report and a warning say what ends the graph, and where the model goes on."""

from __future__ import annotations

import json
import warnings
import weakref

import graphs
import layers
import pytest
import torch
import torch.distributed as dist
from told import heard, start_fresh
from torch import nn
from torch.utils.checkpoint import checkpoint

import tpfuse
from tpfuse import ends

AOT = {"tpfuse.inner": "aot_eager"}
LEAVES = "the residual sum leaves the graph before any norm reads it: "


@pytest.fixture(autouse=True)
def fresh():
    start_fresh(4)
    yield
    dist.destroy_process_group()


def compiled(model, **options):
    return torch.compile(model, backend="tpfuse", options={**AOT, **options})


def decoder(layer=layers.Layer, whole=layers.Decoder, **kw):
    """A decoder whose layers, and which itself, may be of other classes."""
    model = layers.Decoder(3, **kw)
    model.__class__ = whole
    for each in model.layers:
        each.__class__ = layer
    return model


@torch.no_grad()
def ran(model):
    """([(reason, detail) of each kept site], the texts of our warnings). The result must be eager's."""
    plain = layers.Decoder(3)
    with heard() as texts:
        got = model(layers.tokens())
    assert graphs.equal(got, plain(layers.tokens()))
    kept = [(site.reason, site.detail) for report in tpfuse.reports() for site in report.kept]
    return kept, texts


def line_of(function, text):
    """``file:line`` of the first line of a function that holds a text."""
    code = function.__code__
    with open(code.co_filename, encoding="utf-8") as file:
        lines = file.readlines()[code.co_firstlineno - 1 :]
    return f"{code.co_filename}:{code.co_firstlineno + next(n for n, line in enumerate(lines) if text in line)}"


class Prints(layers.Layer):
    def forward(self, x):
        y = super().forward(x)
        print("a layer has ended")
        return y


class Branches(layers.Layer):
    def forward(self, x):
        y = super().forward(x)
        return y * 0 if y.sum() > 1e9 else y


@pytest.mark.parametrize(
    ("layer", "line", "why"),
    [(Prints, "print(", ""), (Branches, "return y * 0", "a branch on values of a tensor")],
    ids=["print", "branch"],
)
def test_a_break_behind_a_layer_is_named_with_its_line(layer, line, why):
    ((reason, detail),), (text,) = ran(compiled(decoder(layer)))
    assert reason == "no-norm"
    assert detail.startswith(f"{LEAVES}a graph break ends the graph at {line_of(layer.forward, line)} ({why}")
    assert detail in text and "compile the whole model" in text


def test_layers_that_are_compiled_one_by_one_are_told_and_the_model_is_named():
    model = decoder()
    for layer in model.layers:
        layer.compile(backend="tpfuse", options=AOT)
    ((reason, detail),), (text,) = ran(model)
    assert reason == "no-norm"
    returns, goes_on = line_of(layers.Layer.forward, "return h"), line_of(layers.Decoder.forward, "x = layer(x)")
    assert detail == (
        f"{LEAVES}Layer.forward is compiled by itself, and returns it ({returns}) to Decoder.forward, which goes on at {goes_on}"
    )
    assert (
        text.startswith(f"tpfuse: 1 of the 2 reductions of {tpfuse.reports()[0].graph_id} not fused") and detail in text
    )


def test_a_hook_that_breaks_the_loop_over_the_layers():
    """Dynamo cannot go on within the loop: it leaves the decoder to eager and compiles each layer."""
    model = decoder()
    seen: list[float] = []
    for layer in model.layers:
        layer.register_forward_hook(lambda _, __, out: seen.append(out.float().mean().item()))
    ((_, detail),), (text,) = ran(compiled(model))
    assert detail.startswith(f"{LEAVES}the graph ends where Layer.forward returns (")
    assert f"Dynamo did not trace its caller, Decoder.forward, which goes on at {layers.__file__}:" in detail
    assert "TORCH_LOGS=graph_breaks" in detail and detail in text


def test_the_rest_of_a_layer_behind_a_break_names_the_decoder_and_not_itself():
    kept, _ = ran(compiled(decoder(break_inside=True)))
    (_, first), (_, rest) = kept
    assert "a graph break ends the graph at " in first
    assert "where Layer.forward returns" in rest and "Decoder.forward, which goes on at" in rest


def test_fully_sharded_layers_name_the_hooks():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = layers.Decoder(3, group=mesh["tp"].get_group())
    for each in (*model.layers, model):
        fully_shard(each, mesh=mesh["dp"])
    with torch.no_grad(), pytest.warns(tpfuse.FusionWarning, match="the hooks of FSDP around FSDPLayer.forward"):
        compiled(model)(layers.tokens())
    (site,) = tpfuse.reports()[0].kept
    assert site.reason == "no-norm" and "its caller, FSDPDecoder.forward, which goes on at" in site.detail


class Region(layers.Layer):
    @torch.compiler.nested_compile_region
    def forward(self, x):
        return super().forward(x)


@torch.no_grad()
@pytest.mark.parametrize("inner", ["aot_eager", "inductor"])
def test_a_region_that_ends_with_its_layer_is_named_as_one(inner):
    with pytest.warns(tpfuse.FusionWarning) as told:
        compiled(decoder(Region, dtype=torch.float32), **{"tpfuse.inner": inner})(layers.tokens())
    ((reason, detail),) = [(site.reason, site.detail) for report in tpfuse.reports() for site in report.kept]
    assert reason == "no-norm"
    assert "this graph is a region inside of another one (nested_compile_region, torch.cond)" in detail
    assert any(detail in str(warning.message) for warning in told)


class BreaksInFrontOfTheAdd(layers.Layer):
    def forward(self, x):
        y = self.self_attn(self.input_layernorm(x))
        torch._dynamo.graph_break()
        h = x + y
        return h + self.mlp(self.post_attention_layernorm(h))


def test_a_sum_that_a_break_makes_an_output_is_not_said_to_be_returned_by_the_model():
    """The remedy of `returned`, to return the residual sum instead, would help nobody."""
    (first, *_), _ = ran(compiled(decoder(BreaksInFrontOfTheAdd)))
    assert first[0] == "no-norm" and "the sum is an output of the graph: a graph break ends the graph at" in first[1]


class Checkpoints(layers.Layer):
    def forward(self, x):
        return checkpoint(super().forward, x, use_reentrant=False)


def test_what_dynamo_traces_through_is_no_break():
    model = decoder(Checkpoints)
    for layer in model.layers:
        layer.register_forward_hook(lambda *_: None)
    assert ran(compiled(model)) == ([], [])


class Backbone(layers.Decoder):
    """Without a norm behind its last layer."""

    def forward(self, tokens):
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return x


class Head(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        return self.model(tokens) * 2


@torch.no_grad()
@pytest.mark.parametrize("within", [False, True])
def test_one_sum_that_a_whole_model_returns_is_no_warning(within):
    model = compiled(decoder(whole=Backbone))
    with warnings.catch_warnings():
        warnings.simplefilter("error", tpfuse.FusionWarning)
        (Head(model) if within else model)(layers.tokens())
    (report,) = tpfuse.reports()
    assert len(report.fused) == 5
    (site,) = report.kept
    returns = line_of(Backbone.forward, "return x")
    wanted = f"Backbone.forward is compiled by itself, and returns it ({returns}) to Head.forward" if within else (
        f"the compiled function Backbone.forward returns it ({returns})"
    )  # fmt: skip
    assert site.detail.startswith(LEAVES + wanted)


class Proxy:
    """What looks up its class somewhere else, and fails."""

    @property
    def __class__(self):
        raise ZeroDivisionError

    def call(self, step):
        return step(layers.tokens())


@torch.no_grad()
def test_a_strange_object_on_the_call_stack_is_left_alone():
    Proxy().call(compiled(decoder(whole=Backbone)))
    (site,) = tpfuse.reports()[0].kept
    assert site.reason == "no-norm" and "the compiled function Backbone.forward returns it" in site.detail


@torch.no_grad()
def test_a_failure_while_the_end_is_looked_for_costs_a_word_and_no_compile(monkeypatch):
    monkeypatch.setattr(ends.compat, "is_entry_of_compiled", lambda _: 1 // 0)
    compiled(decoder(whole=Backbone))(layers.tokens())
    (site,) = tpfuse.reports()[0].kept
    assert site.reason == "no-norm" and site.detail.startswith(f"{LEAVES}the model returns it, or the graph ends there")


class Calls(nn.Module):
    """Its own variables while the model within it is compiled: what ``locals()`` gave, and whether a tensor is freed."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, tokens):
        given = locals()
        large = torch.ones(8)
        freed = weakref.ref(large)
        self.model(tokens)
        del large
        return sorted(given), freed() is None


@torch.no_grad()
def test_the_variables_of_the_callers_stay_as_they_are():
    assert Calls(compiled(decoder(whole=Backbone)))(layers.tokens()) == (["self", "tokens"], True)
    (site,) = tpfuse.reports()[0].kept
    assert "to Calls.forward, which goes on at" in site.detail


@torch.no_grad()
def test_a_function_that_returns_the_sum_itself_keeps_its_reason():
    with pytest.warns(tpfuse.FusionWarning, match="returned 1"):
        compiled(lambda x: graphs.all_reduce(x * 2))(torch.ones(2, 3, 8))
    (site,) = tpfuse.reports()[0].kept
    assert site.reason == "returned" and "the compiled function <lambda> returns it" in site.detail


@pytest.mark.parametrize("options", [{"tpfuse.policy": "off"}, {"tpfuse.fuel": 1}], ids=str)
def test_who_asked_for_less_is_not_warned(options):
    _, told = ran(compiled(decoder(Prints), **options))
    assert told == []


def test_the_dump_says_what_the_report_says(tmp_path):
    ran(compiled(decoder(Prints), **{"tpfuse.dump": str(tmp_path)}))
    for report in tpfuse.reports():
        (file,) = tmp_path.glob(f"*/{report.graph_id}/report.json")
        assert json.loads(file.read_text()) == json.loads(report.to_json())


@torch.no_grad()
def test_a_warm_cache_gives_the_same_words(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    details = []
    for _ in range(2):
        torch._dynamo.reset()
        tpfuse.clear_reports()
        torch.compile(decoder(Prints, dtype=torch.float32), backend="tpfuse")(layers.tokens())
        details.append(next((r.from_cache, [site.detail for site in r.kept]) for r in tpfuse.reports()))
    (cold, first), (warm, second) = details
    assert (cold, warm) == (False, True)
    assert first == second and "a graph break ends the graph at" in first[0]


def test_hooks_of_accelerate_are_named_with_their_line():
    hooks = pytest.importorskip("accelerate.hooks")
    model = decoder()
    for layer in model.layers:
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(io_same_device=True))
    ((_, detail),), (text,) = ran(compiled(model))
    assert "accelerate/hooks.py:" in detail and detail in text
