"""The loop over tokens, as ``generate`` of transformers runs it for greedy search and sampling."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tpfuse import hf_compat
from tpfuse.hf_buffers import Buffers, Pool
from tpfuse.hf_step import Forward, Step, run_prefill
from tpfuse.hf_stop import Watch
from tpfuse.hf_tokens import Choice

# Steps between a step and the host's look at it. On a CPU there is nothing to wait for.
LAG = {"cuda": 1}


@dataclass
class Call:
    """One call of ``generate``, as transformers prepared it."""

    input_ids: Tensor
    processors: Any
    criteria: Any
    config: Any
    inputs: dict[str, Any]
    streamer: Any


def run(model: Any, pool: Pool, forward: Forward, call: Call, graph: bool) -> Any:
    """Prefill, then one step after another until everything has ended.

    Returns:
        The sequences (batch, length), or transformers' output object where ``return_dict_in_generate`` is set.
    """
    ids = call.input_ids.to(model.device)
    batch, length = ids.shape
    # What the criteria say on the host, on the device, and by code of the user's own.
    limit, eos, others = sort_criteria(call.criteria)
    name = hf_compat.cache_name(call.inputs)
    assert name is not None
    capacity = max(limit - 1, length, getattr(call.config, "max_cache_len", None) or 0)
    buffers = pool.take(model, name, batch, capacity)
    inputs = {k: v for k, v in call.inputs.items() if k not in (name, "attention_mask", "position_ids")}
    mask, positions = call.inputs.get("attention_mask"), call.inputs.get("position_ids")
    buffers.start(ids, mask)
    # As transformers has it: whoever ends sequences by a token pads them, criteria of the user's own included.
    pads = any(hasattr(criterion, "eos_token_id") for criterion in call.criteria)
    pad = hf_compat.pad_token(call.config) if pads else None
    choice = buffers.fix(Choice(call.processors, bool(call.config.do_sample), eos, pad))
    step = Step(model, forward, buffers, choice, inputs, positions is not None, mask is not None, graph)
    keep = Kept(call.config)
    # The cache that is returned must not hold a step too many, and a criterion of the user's own looks at every step.
    lag = 0 if keep.wanted or others else LAG.get(model.device.type, 0)
    watch = Watch(buffers, eos is not None, call.streamer, lag)

    first = {**inputs, "attention_mask": mask, "position_ids": positions}
    step.first(run_prefill(model, forward, buffers, ids, {k: v for k, v in first.items() if v is not None}), length)
    if positions is not None:
        buffers.positions.copy_(positions[:, -1:].expand(batch, 1) + 1)
    length += 1
    ended = False
    with hf_compat.for_decode(model):
        while True:
            keep.add(step)
            if others:
                done = others(buffers.ids[:, :length], keep.scores)
                buffers.unfinished.mul_(~done)
            ended = watch.step(choice.sample) or (bool(others) and bool(buffers.unfinished.max() == 0))
            if ended or length >= limit:
                break
            step(length)
            length += 1
    length -= watch.finish(ended)
    if call.streamer is not None:
        call.streamer.end()
    sequences = buffers.ids[:, :length].to(call.input_ids.device, copy=True)
    return keep.output(sequences, pool, buffers) if keep.wanted else sequences


def sort_criteria(criteria: Any) -> tuple[int, Tensor | None, Any]:
    """Stopping criteria -> (longest length, the tokens that end a sequence or None, all others in a list of their kind)."""
    from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

    limits, eos, others = [], [], type(criteria)()
    for criterion in criteria:
        if type(criterion) is MaxLengthCriteria:
            limits.append(criterion.max_length)
        elif type(criterion) is EosTokenCriteria:
            eos.append(criterion.eos_token_id.reshape(-1))
        else:
            others.append(criterion)
    return min(limits), torch.cat(eos) if eos else None, others


class Kept:
    """Scores and logits of every step, for a call that wants them back."""

    def __init__(self, config: Any) -> None:
        self.wanted = bool(config.return_dict_in_generate)
        self.scores: tuple[Tensor, ...] | None = () if self.wanted and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if self.wanted and config.output_logits else None

    def add(self, step: Step) -> None:
        if self.scores is not None and step.scores is not None:
            self.scores += (step.scores.clone(),)
        if self.logits is not None and step.logits is not None:
            self.logits += (step.logits.clone(),)

    def output(self, sequences: Tensor, pool: Pool, buffers: Buffers) -> Any:
        from transformers.generation import GenerateDecoderOnlyOutput

        pool.drop(buffers)  # the cache is the caller's now
        values: dict[str, Any] = {"sequences": sequences, "scores": self.scores, "logits": self.logits}
        return GenerateDecoderOnlyOutput(**values, **{buffers.name: buffers.cache})
