"""The kernels that quantize, interpreted, a process a rank: fp8 bytes and scales bit for bit, equal on all ranks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from interpreted_ranks import Call, Outcome, run
from tpfuse.ops.quantizer import NAMED

pytestmark = pytest.mark.ranks
slow = pytest.mark.slow
BOTH = ("one_shot", "two_shot")


def agree(outcomes: list[Outcome], ranks: int) -> None:
    """Every rank finished, equals the reference, equals the others bit for bit, and left its plane empty."""
    assert len(outcomes) == ranks
    for outcome in outcomes:
        assert not outcome.error, outcome.error
        assert not outcome.mistakes, outcome.mistakes[:5]
        assert outcome.leftover == 0 and outcome.record == (0, 0, 0, 0)
        assert outcome.digests == outcomes[0].digests


def both(calls: list[Call], world: int) -> None:
    """The calls with both algorithms: the same bits."""
    outcomes = run(world, [replace(call, algorithm=algorithm) for call in calls for algorithm in BOTH])
    agree(outcomes, world)
    assert outcomes[0].digests[::2] == outcomes[0].digests[1::2], "one-shot and two-shot give different bits"


FEW = ("compressed-tensors-token", "deepgemm-ue8m0", "vllm-static")


@pytest.mark.parametrize(
    ("world", "names"), ((2, FEW), *(pytest.param(w, sorted(NAMED), marks=slow) for w in (2, 3, 4))), ids=str
)
def test_every_quantizer(world: int, names: tuple[str, ...]) -> None:
    both([Call(3, 264, quantizer=name, seed=n) for n, name in enumerate(names)], world)


@slow
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32))
def test_every_quantizer_of_other_dtypes(dtype: torch.dtype) -> None:
    both([Call(3, 264, dtype=dtype, quantizer=name, seed=n) for n, name in enumerate(sorted(NAMED))], 2)


def test_special_rows_flavours_and_results_that_are_not_kept() -> None:
    names = ("torchao-rowwise", "deepgemm-ue8m0", "vllm-static")
    kinds = [{"special": special} for special in ("zeros", "nonfinite", "denormals")]
    kinds += [{"flavour": "olmo2", "post_norm": True}, {"flavour": "gemma", "weight_dtype": torch.float32}]
    kinds += [{"flavour": "vllm", "bias": "row", "scale": 0.5}, {"keep_normed": False, "rows": 5}]
    calls = [
        Call(**{"rows": 2, "hidden": 136, "quantizer": names[n % 3], "seed": n, **kind}) for n, kind in enumerate(kinds)
    ]
    both(calls, 2)


def test_several_steps_and_several_groups_a_step() -> None:
    names = ("vllm-token", "vllm-group128")
    both([Call(1, 2880, quantizer=name, lanes=lanes, seed=lanes) for name in names for lanes in (128, 256)], 2)


@pytest.mark.parametrize("algorithm", ("one_shot", pytest.param("two_shot", marks=slow)))
def test_a_row_split_over_programs_has_the_bits_of_a_whole_row(algorithm: str) -> None:
    """Programs of one row tell each other their largest values. Each is a process: 2 ranks x 3 programs."""
    names = ("torchao-rowwise", "deepgemm-ue8m0")
    split = [Call(1, 2880, algorithm, steps=1, programs=3, quantizer=name, seed=n) for n, name in enumerate(names)]
    pieces = run(2, split, split=True)
    for outcome in pieces:
        assert not outcome.error, outcome.error
        assert not outcome.mistakes, outcome.mistakes
        assert outcome.digests == pieces[0].digests and outcome.leftover == 0
    whole = run(2, [replace(call, steps=None, programs=1) for call in split])
    agree(whole, 2)
    assert pieces[0].digests == whole[0].digests


@pytest.mark.parametrize("name", ("vllm-token", pytest.param("vllm-group128", marks=slow)))
def test_after_a_poll_gave_up_quantized_rows_are_nan_like_all_others(name: str) -> None:
    calls = [Call(2, 136, quantizer=name, seed=n, keep_normed=True) for n in range(3)]
    survivors = run(2, calls, dies=(1, 1), watchdog=300_000)
    assert len(survivors) == 1 and not survivors[0].error, survivors
    assert survivors[0].rows == ["rr", "nn", "nn"] and not survivors[0].mistakes
