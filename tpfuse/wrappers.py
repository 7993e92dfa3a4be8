"""What tensor subclasses among a graph's inputs cost, said in its report.

AOTAutograd unwraps every DTensor parameter on every call of a compiled graph, in Python. A prefill hides that behind the GPU's
work; a decode step of a few milliseconds does not.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from tpfuse.passes import GraphReport

# Microseconds of host time for each DTensor input and call: an empty graph of 64 parameters on a CPU (torch 2.13), and a
# Llama of transformers on an H100's host, specs and redistributions included (1.0 ms for 57 parameters, torch 2.11).
LOW, HIGH = 2, 17


def dtensors(inputs: Sequence[Any]) -> int:
    """How many of a graph's inputs are DTensors."""
    module = sys.modules.get("torch.distributed.tensor")
    return 0 if module is None else sum(isinstance(x, module.DTensor) for x in inputs)  # without it nobody has made one


def look(reports: Sequence[GraphReport], inputs: Sequence[Any]) -> None:
    """Add a note to the reports of a graph whose inputs hold DTensors.

    Args:
        reports: of one Dynamo graph.
        inputs: that graph's example inputs, parameters included.
    """
    count = dtensors(inputs)
    if not count:
        return
    low, high = count * LOW / 1000, count * HIGH / 1000
    for report in reports:
        report.notes.append(
            f"{count} inputs are DTensors, which are unwrapped on every call: about {low:.1f} to {high:.1f} ms of host time a "
            f"call ({LOW} to {HIGH} us each). In a model of transformers "
            "tpfuse.hf.compile(model) puts plain local parameters in their place"
        )
