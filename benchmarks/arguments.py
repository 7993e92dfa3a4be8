"""Arguments that the benchmark scripts share."""

from __future__ import annotations

import argparse

from tpfuse.measure import bench


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def add_shapes(parser: argparse.ArgumentParser, default: bench.Survey) -> None:
    """``--worlds``, ``--hidden`` and ``--rows``, with a plan's as defaults."""
    parser.add_argument("--worlds", type=numbers, default=default.worlds)
    parser.add_argument("--hidden", type=numbers, default=default.hiddens)
    parser.add_argument("--rows", type=numbers, default=default.rows)
