"""The example of the op in the layer code of an engine."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from ranks import run_ranks

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import engine_layer


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_op_gives_the_bits_of_the_layer_it_replaces(world_size):
    assert run_ranks(engine_layer.compare, world_size) == [True] * world_size
