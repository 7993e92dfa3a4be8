"""Norms that are kernels of a library: the report names the kernel and says why nothing follows, and the results are the model's.

Written anew after what stands in the graph of a Llama whose norms Liger-Kernel has replaced (``src/liger_kernel/ops/rms_norm.py``
of github.com/linkedin/Liger-Kernel: an ``autograd.Function`` around a Triton kernel) and of one whose norms are layers of the
Hugging Face ``kernels`` package, which call an operator such as ``rms_norm_fn`` or ``add_rms``.
"""

from __future__ import annotations

import graphs
import pytest
import torch
import torch.distributed as dist
from graphs import ALL, all_reduce
from torch._higher_order_ops import triton_kernel_wrap as wrap
from torch.fx import Node
from tpfuse.passes import fuse

H = 8


@pytest.fixture(autouse=True, scope="module")
def group():
    graphs.start_fake_group(2)
    yield
    dist.destroy_process_group()


def _rms_norm_forward_kernel() -> None:
    """Stands in for a kernel: a graph holds its number only."""


def _swiglu_kernel() -> None:
    """One that is no norm by its name."""


def launched(kernel: object) -> Node:
    """The reader of the residual sum in a graph as AOTAutograd makes it of a launch of this kernel."""
    gm = graphs.trace(lambda x, r: torch.relu(r + all_reduce(x)), [torch.randn(3, H), torch.randn(3, H)])
    (relu,) = (n for n in gm.graph.nodes if n.target is torch.ops.aten.relu.default)
    (h,) = relu.args
    with gm.graph.inserting_before(relu):
        given = {"kernel_idx": wrap.kernel_side_table.add_kernel(kernel), "constant_args_idx": 0, "grid": [(3, 1, 1)]}
        rest = {"tma_descriptor_metadata": {}, "kwargs": {"Y": relu.args[0], "X": h}, "tensors_to_clone": ["Y"]}
        node = gm.graph.call_function(wrap.triton_kernel_wrapper_functional, kwargs={**given, **rest})
    relu.replace_all_uses_with(node)
    gm.graph.erase_node(relu)
    return node


@pytest.mark.parametrize(
    "kernel, reason, said",
    [
        (
            _rms_norm_forward_kernel,
            "unknown-norm",
            "the Triton kernel _rms_norm_forward_kernel, an operator",
        ),
        (_swiglu_kernel, "no-norm", "triton_kernel_wrapper_functional"),
    ],
)
def test_a_triton_kernel_is_a_norm_by_its_name(kernel, reason, said):
    (site,) = fuse(launched(kernel).graph, ALL).sites
    assert site.reason == reason and said in site.detail, site.detail


@pytest.mark.parametrize("name, reason", [("add_rms", "unknown-norm"), ("add_act", "no-norm")])
def test_an_operator_is_a_norm_by_its_name(name, reason):
    def compute(x: torch.Tensor, r: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.rms_norm(x + r, (H,))

    op = torch.library.custom_op(f"hub_layers::{name}", compute, mutates_args=())
    op.register_fake(lambda x, r: torch.empty_like(x))
    try:
        gm = graphs.trace(lambda x, r: op(all_reduce(x), r), [torch.randn(3, H), torch.randn(3, H)])
        (site,) = fuse(gm, ALL).sites
    finally:
        op._lib._destroy()
    assert site.reason == reason and f"hub_layers.{name}" in site.detail
