"""FlashInfer's numerical contract, ``tests/comm/test_mnnvl_cutedsl_numerical_contract.py``, written anew for these kernels.

Over the ranks each element is 2**24, 1 and -2**24 in an order of its own. Added in another order than that of the ranks, or in
less than fp32, the sum is another one. What is checked: the sum before the norm equals the rank-ordered fp32 sum bit for bit, in
both algorithms, on every rank. (FlashInfer adds the residual in fp32 before it rounds; here the sum is rounded
first, as models do.)
"""

from __future__ import annotations

import pytest
import torch
from interpreted_ranks import Call, expected, inputs, run

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("world", [3, pytest.param(4, marks=pytest.mark.slow)])
def test_flashinfers_order_sensitive_input_gives_the_rank_ordered_sum(world):
    calls = [Call(5, 64, algorithm, special="order", seed=3) for algorithm in ("one_shot", "two_shot")]
    given = inputs(calls[0], world)
    backwards = sum(x.float() for x in reversed(given.xs)).to(given.xs[0].dtype)
    forwards = sum((x.float() for x in given.xs), torch.zeros(())).to(given.xs[0].dtype)
    assert not torch.equal(backwards, forwards), "the input does not depend on the order"
    assert torch.equal(expected(calls[0], given)[1], given.residual + (forwards + 0.0))
    outcomes = run(world, calls)
    for outcome in outcomes:
        assert not outcome.error, outcome.error
        assert not outcome.mistakes, outcome.mistakes  # compared with `expected`, the residual output bit for bit
        assert outcome.digests[0] == outcome.digests[1] == outcomes[0].digests[0]
