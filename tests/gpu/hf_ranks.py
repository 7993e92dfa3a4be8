"""What ``test_hf_gpu.py`` runs on every rank. Each function returns a list of complaints: empty means all was well."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from models import unsharded

from tpfuse import hf, hf_generate
from tpfuse.parallel import ParallelConfig

PROMPT = torch.tensor([[0, 0, 5, 6, 7], [3, 4, 5, 6, 7]])
MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "padded": {"attention_mask": MASK},
    "sample": {"do_sample": True, "temperature": 0.8, "top_k": 30},
    "reads the tokens": {"repetition_penalty": 1.3},
}


def _prompt(kwargs: dict[str, Any]) -> dict[str, Any]:
    ids = PROMPT if "attention_mask" in kwargs else PROMPT.clamp(min=3)
    return {"input_ids": ids.cuda(), **{k: v.cuda() if isinstance(v, Tensor) else v for k, v in kwargs.items()}}


def _tokens(model: Any, kwargs: dict[str, Any], **more: Any) -> list[list[int]]:
    torch.manual_seed(3)
    settings = {"max_new_tokens": 24, "pad_token_id": 0, "eos_token_id": None, "do_sample": False, **kwargs, **more}
    return model.generate(**_prompt(settings), cache_implementation="static").tolist()  # type: ignore[no-any-return]


def generation(rank: int, world: int) -> list[str]:
    """Tokens, random numbers, graphs and host synchronizations of the loop on GPUs, in fp32."""
    complaints: list[str] = []
    model = unsharded("llama", num_hidden_layers=2, initializer_range=0.2)
    if world > 1:
        hf.parallelize(model, ParallelConfig(world))
    model.cuda()
    expected = {name: _tokens(model, way, disable_compile=True) for name, way in WAYS.items()}
    ends = {"eos_token_id": expected["sample"][0][9]}
    ended = _tokens(model, {**WAYS["sample"], **ends}, disable_compile=True)
    drawn = torch.rand(1, device="cuda").item()
    hf.compile(model, mode="reduce-overhead")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            for name, way in WAYS.items():
                if (got := _tokens(model, way)) != expected[name]:
                    complaints.append(f"{name}: {got} instead of {expected[name]}")
        for _ in range(2):
            if (got := _tokens(model, {**WAYS["sample"], **ends})) != ended:
                complaints.append(f"ended: {got} instead of {ended}")
            if torch.rand(1, device="cuda").item() != drawn:
                complaints.append("another number of random numbers was drawn than by transformers")
    complaints += [f"warned: {one.message}" for one in told if "CUDA graph" in str(one.message)]
    (buffers,) = getattr(model, hf_generate.DECODER).pool.kept.values()
    # One for each way, and one for sequences that end; without padding it depends on transformers whether there is a mask.
    if not len(WAYS) <= len(buffers.graphs) <= len(WAYS) + 1 or None in buffers.graphs.values():
        complaints.append(f"{len(buffers.graphs)} graphs: {list(buffers.graphs.values())}")
    graphs = dict(buffers.graphs)
    _tokens(model, {}, max_new_tokens=40)
    if buffers.graphs != graphs:
        complaints.append("a call of another length captured anew")
    counts = [_synchronizations(model, new) for new in (8, 30)]
    if counts[0] != counts[1]:
        complaints.append(f"{counts[0]} host synchronizations for 8 tokens, {counts[1]} for 30")
    return complaints


def _synchronizations(model: Any, new: int) -> int:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            model.generate(
                **_prompt({}), max_new_tokens=new, pad_token_id=0, eos_token_id=None, cache_implementation="static"
            )
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(one.message) for one in told)
