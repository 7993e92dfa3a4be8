"""What callers of the ops give by mistake: operands on other devices, no group, names, lists of ranks."""

from __future__ import annotations

import graphs
import pytest
import torch
import torch.distributed as dist
from tpfuse.ops import layer_norm_flavour, quantizer

import tpfuse
from tpfuse import ops

H = 128
X, RESIDUAL, WEIGHT = torch.randn(4, H), torch.randn(4, H), torch.randn(H)


@pytest.fixture(autouse=True, scope="module")
def fake_group():
    graphs.start_fake_group(2)
    yield
    dist.destroy_process_group()


def fused(**change):
    return ops.all_reduce_add_rms_norm(**{"x": X, "residual": RESIDUAL, "weight": WEIGHT, **change})


@pytest.mark.parametrize("operand", ["residual", "weight", "bias"])
@pytest.mark.parametrize(
    "op", [ops.all_reduce_add_rms_norm, ops.reduce_rows_add_rms_norm, ops.all_reduce_add_layer_norm]
)
def test_an_operand_on_another_device_is_refused(op, operand):
    """The other device holds no memory here, so that no GPU is needed; of a CPU tensor a kernel would read a wrong address."""
    given = {"residual": RESIDUAL, "weight": WEIGHT, "bias": torch.zeros(H)}
    given["residual"] = RESIDUAL[:2] if op is ops.reduce_rows_add_rms_norm else RESIDUAL
    given[operand] = given[operand].to("meta")
    more = {"norm_bias": WEIGHT} if op is ops.all_reduce_add_layer_norm else {}
    said = rf"{op.__name__}: x is on cpu, but an operand, .* is on meta; move it to the device of x: .to\('cpu'\)"
    with pytest.raises(ValueError, match=said):
        op(X, **given, **more)


@pytest.mark.parametrize("operand", ["norm_bias", "addend"])
def test_so_is_one_that_only_a_layer_norm_has(operand):
    given = {"norm_bias": WEIGHT, "addend": RESIDUAL}
    given[operand] = given[operand].to("meta")
    with pytest.raises(ValueError, match="all_reduce_add_layer_norm: x is on cpu, but an operand, .* is on meta"):
        ops.all_reduce_add_layer_norm(X, RESIDUAL, WEIGHT, **given)


def test_the_one_cpu_has_two_names():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, residual, weight = torch.ones(4, H, device="cpu:0"), torch.ones(4, H), torch.ones(H)
        assert x.device != residual.device, "nothing to tell apart"
        for op, kept in ((ops.all_reduce_add_rms_norm, residual), (ops.reduce_rows_add_rms_norm, residual[:2])):
            assert op(x, kept, weight)[0].shape == kept.shape


@pytest.mark.parametrize("group", [0, [0, 1]])
@pytest.mark.parametrize("call", [lambda group: fused(group=group), ops.raise_if_failed, ops.reset, ops.forget])
def test_what_is_no_group_is_told_with_what_is_one(call, group):
    with pytest.raises(TypeError, match=r"group is .*; give a process group, its name, or None"):
        call(group)


def test_a_device_mesh_is_told_which_call_gives_its_group():
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh("cpu", (2,))
    with pytest.raises(TypeError, match=r"of a DeviceMesh that is mesh.get_group\(\)"):
        fused(group=mesh)
    fused(group=mesh.get_group())


def test_arithmetic_may_be_named():
    for name in ("gemma", "GEMMA"):
        assert all(torch.equal(a, b) for a, b in zip(fused(flavour=name), fused(flavour=ops.GEMMA), strict=True))
    assert ops.LayerNormFlavour.parse("olmo") is layer_norm_flavour.OLMO
    for name, found in quantizer.NAMED.items():
        assert ops.Quantizer.parse(name) is found
    by_name = ops.all_reduce_add_rms_norm_quant(X, RESIDUAL, WEIGHT, quantizer="vllm-token")
    given = ops.all_reduce_add_rms_norm_quant(X, RESIDUAL, WEIGHT, quantizer=quantizer.VLLM_TOKEN)
    assert all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in zip(by_name, given, strict=True))


@pytest.mark.parametrize(
    ("call", "names"),
    [
        (lambda: fused(flavour="lama"), "'lama' is none of llama, gemma,"),
        (lambda: ops.LayerNormFlavour.parse("lama"), "'lama' is none of layer_norm, cohere,"),
        (lambda: ops.Quantizer.parse("vllm"), "'vllm' is none of torchao-static,"),
    ],
)
def test_a_name_that_does_not_exist_is_told_with_those_that_do(call, names):
    with pytest.raises(ValueError, match=names):
        call()


def test_one_output_is_not_two():
    with pytest.raises(ValueError, match=r"out has 1 tensors; expected \(normed, residual_out\)"):
        fused(out=(X,))


def test_an_algorithm_that_does_not_exist():
    with pytest.raises(ValueError, match="override is 'ring'; valid are auto, one_shot, two_shot, library"):
        ops.select("sm_90", 2, torch.bfloat16, 4096, 1, override="ring")


@pytest.mark.parametrize("given", [torch.nn.Linear(2, 2), "llama", None])
def test_fuse_takes_graphs(given):
    with pytest.raises(TypeError, match="fuse takes an fx.GraphModule or fx.Graph.*torch.export"):
        tpfuse.fuse(given)
