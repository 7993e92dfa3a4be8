"""The library path: the group's own all-reduce, then add and norm in one kernel.

For large sizes, several hosts, GPUs without peer access, and every call that the kernels do not take. The all-reduce is
NCCL's (or gloo's), so it sums in its own order: equal on all ranks, but not bit for bit the kernels' sum.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from tpfuse import compat

from . import reference
from .arguments import Operands
from .kernel import Kernel
from .kernels.variant import GROUP_LANES, Constants, Variant


def all_reduce(x: Tensor, group_name: str) -> Tensor:
    """Sum of ``x`` over the group, by its own backend."""
    reduced = torch.ops._c10d_functional.all_reduce(x, "sum", group_name)
    return torch.ops._c10d_functional.wait_tensor(reduced)


@lru_cache(maxsize=512)
def _kernel(constants: Constants) -> Kernel:
    from .kernels.add_norm import add_norm_kernel

    alone = Variant(world=1, lanes=GROUP_LANES, steps=constants.groups, split=1)
    return Kernel(add_norm_kernel, GROUP_LANES, (constants, alone))


def add_norm(
    reduced: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    normed: Tensor,
    residual_out: Tensor,
    eps: float,
    scale: float,
    constants: Constants,
) -> None:
    """Bias, scale, residual add and norm of reduced rows in one kernel. Tensors are contiguous and 16-byte aligned."""
    kernel = _kernel(constants)
    rows = reduced.numel() // constants.hidden
    args = (
        reduced,
        reduced if residual is None else residual,
        reduced if weight is None else weight,
        reduced if bias is None else bias,
        normed,
        residual_out,
        rows,
        eps,
        scale,
    )
    if not kernel.ready:
        kernel.compile(*args)
    stream = compat.current_stream_handle(reduced.device.index)
    kernel(min(rows, 1 << 16), stream, *args)


def exact(given: Operands) -> tuple[Tensor, Tensor]:
    """The group's all-reduce and the exact reference: on a CPU, and for calls that no kernel takes."""
    reduced = all_reduce(given.x.contiguous(), given.group_name)
    normed, residual_out = reference.add_rms_norm(reduced, *given.after_the_sum)
    return normed.contiguous(), residual_out.contiguous()
