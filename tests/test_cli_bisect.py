"""Bisection finds a planted wrong rewrite in few runs and tells when no rewrite is to blame."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
from test_cli import refused, tpfuse, tpfuse_anew

from tpfuse.inspect import bisect

CHECK = Path(__file__).parent / "browser" / "wrong_rewrite.py"


@pytest.mark.parametrize("count", [1, 2, 3, 31, 60, 64, 1000])
def test_the_search_is_right_and_short_for_every_culprit(count):
    for culprit in range(count + 1):
        runs = 0

        def passes(fuel, culprit=culprit):
            nonlocal runs
            runs += 1
            return fuel < culprit

        assert bisect.first_failing(passes, count) == culprit
        assert runs <= math.ceil(math.log2(count + 1))


@pytest.mark.slow
@pytest.mark.parametrize("planted", [37])
def test_a_planted_wrong_rewrite_among_60_is_found_in_at_most_7_runs(planted):
    result = tpfuse_anew("bisect", "--", sys.executable, CHECK, planted, timeout=800)
    assert result.returncode == 0, result.stderr
    runs = [line for line in result.stderr.splitlines() if line.startswith("run ")]
    assert len(runs) <= 7
    assert f"Rewrite {planted} of 60 is the first that breaks the command ({len(runs)} runs" in result.stdout
    layer, role = divmod(planted - 1, 2)
    assert f"layer {layer} {('attention', 'mlp')[role]}" in result.stdout
    assert "wrong_rewrite.py:26" in result.stdout
    assert f"TPFUSE_FUEL={planted - 1}" in result.stdout


def test_a_command_that_succeeds_has_nothing_to_find():
    result = tpfuse("bisect", "--", sys.executable, "-c", "pass")
    assert result.returncode == 1
    assert "nothing to find" in result.stdout


def test_a_command_that_compiles_nothing():
    result = tpfuse("bisect", "--quiet", "--", sys.executable, "-c", "raise SystemExit(5)")
    assert result.returncode == 2
    assert "compiled nothing with tpfuse" in result.stderr.splitlines()[-1]


def test_a_command_that_does_not_exist():
    refused(tpfuse("bisect", "--", "no-such-program"), "cannot run 'no-such-program'")


def test_no_command():
    refused(tpfuse("bisect"), "tpfuse bisect -- python check.py")
