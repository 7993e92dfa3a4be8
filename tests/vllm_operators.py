"""vLLM's operators by name and schema, for tests without vLLM: its all-reduce, its CUDA kernels, the norms of its IR."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

GROUP = "tp:0"
EPS = 1e-5
_libraries: list[Any] = []
provider = {"now": "native"}  # what vLLM lowers the norms of its IR to


def provider_of(node: Any) -> str:
    assert str(node.target).startswith("vllm_ir.")
    return provider["now"]


def define_operators() -> None:
    """vLLM's operators by name and schema (0.32). Those of its IR compute what the provider in force computes."""
    if _libraries:
        return
    space, ir, kernels = (torch.library.Library(n, "DEF") for n in ("vllm", "vllm_ir", "_C"))
    _libraries.extend((space, ir, kernels))
    space.define("all_reduce(Tensor tensor, str group_name) -> Tensor")
    kernels.define("rms_norm(Tensor! result, Tensor input, Tensor? weight, float epsilon) -> ()")
    kernels.define("fused_add_rms_norm(Tensor! input, Tensor! residual, Tensor? weight, float epsilon) -> ()")
    ir.define("rms_norm(Tensor x, Tensor? weight, float epsilon, int? variance_size=None) -> Tensor")
    ir.define(
        "fused_add_rms_norm(Tensor x, Tensor x_residual, Tensor? weight, float epsilon, int? variance_size=None)"
        " -> (Tensor, Tensor)"
    )

    def all_reduce(tensor: Tensor, group_name: str) -> Tensor:
        assert group_name == GROUP
        out = tensor.clone()
        dist.all_reduce(out)
        return out

    def norm(x: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None) -> Tensor:
        h = x.float()
        part = h if variance_size is None else h[..., :variance_size]
        h = h * torch.rsqrt(part.pow(2).mean(-1, keepdim=True) + epsilon)
        return (h if weight is None else h.to(weight.dtype) * weight).to(x.dtype)

    def add_norm(
        x: Tensor, residual: Tensor, weight: Tensor | None, epsilon: float, variance_size: int | None = None
    ) -> tuple[Tensor, Tensor]:
        summed = x + residual
        if provider["now"] == "vllm_c":
            return norm(summed, weight, epsilon, variance_size), summed
        h = x.float() + residual.float()
        part = h if variance_size is None else h[..., :variance_size]
        h = h * torch.rsqrt(part.pow(2).mean(-1, keepdim=True) + epsilon)
        return (h if weight is None else h.to(weight.dtype) * weight).to(x.dtype), summed

    def norm_into(result: Tensor, input: Tensor, weight: Tensor | None, epsilon: float) -> None:
        result.copy_(norm(input, weight, epsilon))

    def add_norm_in_place(input: Tensor, residual: Tensor, weight: Tensor | None, epsilon: float) -> None:
        summed = input + residual
        normed = norm(summed, weight, epsilon)
        input.copy_(normed)
        residual.copy_(summed)

    space.impl("all_reduce", all_reduce, "CPU")
    space.impl("all_reduce", lambda tensor, group_name: torch.empty_like(tensor), "Meta")
    ir.impl("rms_norm", norm, "CompositeExplicitAutograd")
    ir.impl("fused_add_rms_norm", add_norm, "CompositeExplicitAutograd")
    kernels.impl("rms_norm", norm_into, "CPU")
    kernels.impl("rms_norm", lambda *a: None, "Meta")
    kernels.impl("fused_add_rms_norm", add_norm_in_place, "CPU")
    kernels.impl("fused_add_rms_norm", lambda *a: None, "Meta")


def world(name: str) -> tuple[int, ...]:
    """The ranks of every group name: found by name in another process, as pickle needs it."""
    return tuple(range(dist.get_world_size()))
