"""Random programs in eager and compiled: equal bits or refused, never an exception of the pass."""

from __future__ import annotations

import os
from collections import Counter

import graphs
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from programs import Program, function, inputs, programs

import tpfuse

pytestmark = pytest.mark.long  # not on every save

SEED = int(os.environ.get("TPFUSE_TEST_SEED", "0")) or int.from_bytes(os.urandom(3), "big")
# No shrinking: a program prints as short data, and each further try is a compile.
COMMON = {
    "deadline": None,
    "suppress_health_check": list(HealthCheck),
    "phases": [Phase.explicit, Phase.generate],
    "database": None,
    "derandomize": False,
}
seen: Counter[str] = Counter()


@pytest.fixture(autouse=True, scope="module")
def fake_group():
    graphs.start_fake_group(2)
    print(f"TPFUSE_TEST_SEED={SEED}")
    yield
    dist.destroy_process_group()
    print(f"programs: {dict(seen)}")


def outcome(f, program: Program, again: int, dynamic: bool = False):
    """(outputs, inputs afterwards), or the exception that eager raises."""
    given_inputs = [t.clone() for t in inputs(program, again)]
    for t in given_inputs[:2] if dynamic else ():
        for dim in range(t.dim() - 1):
            torch._dynamo.maybe_mark_dynamic(t, dim)
    with torch.no_grad():
        return f(*given_inputs), given_inputs


def check(program: Program, dynamic: bool, verify: bool, as_written: bool) -> None:
    note(f"TPFUSE_TEST_SEED={SEED}")
    f = function(program, traced=as_written)
    try:
        expected = [outcome(f, program, again) for again in (0, 1)]
    except (RuntimeError, IndexError, TypeError):
        seen["eager raises"] += 1
        return
    if as_written:
        compiled = graphs.trace_as_written(f, [t.clone() for t in inputs(program)])
        report = tpfuse.fuse(compiled, tpfuse.passes.PassOptions(policy="all", verify=verify))
    else:
        torch._dynamo.reset()
        tpfuse.clear_reports()
        options = {"tpfuse.inner": "aot_eager", "tpfuse.policy": "all", "tpfuse.verify": verify}
        compiled = torch.compile(f, backend="tpfuse", options=options)
        outcome(compiled, program, 0, dynamic)
        report = tpfuse.reports()[-1]
    for again, (outputs, after) in enumerate(expected):
        got, got_after = outcome(compiled, program, again, dynamic and not as_written)
        assert graphs.equal(outputs, got), report.sites
        assert graphs.equal(after, got_after), report.sites
    assert "internal" not in {site.reason for site in report.sites}, report.sites
    assert len(report.sites) == len(program.blocks)
    seen.update(str(site.reason) for site in report.sites)


ways = {"program": programs(), "dynamic": st.sampled_from([False, False, False, True]), "verify": st.booleans()}


def run(examples: int, as_written: bool) -> None:
    @settings(max_examples=examples, **COMMON)
    @given(**ways)
    def one(program, dynamic, verify):
        check(program, dynamic, verify, as_written)

    from hypothesis import seed

    seed(SEED)(one)()


def test_compiled_programs_give_the_bits_of_eager():
    run(15, as_written=False)


def test_graphs_with_their_writes_left_in_give_the_bits_of_eager():
    run(25, as_written=True)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_thousand_compiled_programs_give_the_bits_of_eager():
    run(2000, as_written=False)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_thousand_graphs_with_their_writes_left_in_give_the_bits_of_eager():
    run(2000, as_written=True)
