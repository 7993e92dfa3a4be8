"""The decode step of ``generate`` as a CUDA graph: on one GPU, and over ranks with a GPU each."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))
import hf_ranks

from tpfuse.measure.ranks import gpu_count, run_ranks

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


@pytest.mark.parametrize("world", (1, 2))
@pytest.mark.timeout(400)
def test_generation_is_transformers_own_from_a_graph_of_the_whole_step(world: int) -> None:
    if gpu_count() < world:
        pytest.skip(f"needs {world} GPU(s): gloo's sums, which ranks on one GPU make, cannot be captured")
    answers = run_ranks(hf_ranks.generation, world, timeout=380)
    said = [f"rank {rank}: {line}" for rank, lines in enumerate(answers) for line in lines]
    assert not said, "\n".join(said[:20])
