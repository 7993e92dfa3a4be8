"""Fused sites that are lowered: the model's own nodes stay, and Inductor compiles what follows the all-reduce.

On a CPU the op never has a kernel of its own: it is the group's all-reduce and eager operators behind it, and a call that
Inductor cannot look into. The model's own nodes are the same all-reduce and an epilogue that Inductor fuses with whatever is
around it. So where nothing is lost by it, the nodes stay, and the compiled code is what Inductor makes of the model alone.

Every fact that decides is in the graph or in the options, which are equal on all ranks; never one that a rank alone has.
"""

from __future__ import annotations

from tpfuse.ops.reference import NARROW

from . import values
from .candidate import Candidate
from .options import PassOptions


def is_lowered(candidate: Candidate, options: PassOptions) -> bool:
    """Whether a fused site runs as the model's own nodes.

    Args:
        candidate: judged legal.
        options: ``lower`` says that Inductor compiles the graph and that no mode of the op would change its bits.
    """
    tensors = [values.value(node) for node in (candidate.collective.value, *candidate.operands)]
    if not options.lower or any(tensor is None or tensor.device.type != "cpu" for tensor in tensors):
        # On a GPU the ranks vote on a path when they first run, and a compile cache may serve some of them: no compile can know.
        return False
    one_for_two = candidate.merged is not None and not candidate.merged.exact
    if one_for_two or candidate.quantization is not None:
        return False  # two reductions again; several quantizations again, whose bf16 steps nothing would round
    # Between operators that it fuses, Inductor keeps bf16 and fp16 values in fp32, and rounds other elements than the model does.
    return options.numerics == "relaxed" or all(tensor.dtype not in NARROW for tensor in tensors if tensor is not None)
