"""One step of decoding, as a call or as one CUDA graph; and the prefill before it.

Everything a step needs is on the device: token, position, mask, cache lengths. So a step can be captured whole, forward and
choice of the token together, and a token costs the host one launch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tpfuse import compat, unfused
from tpfuse.hf_buffers import Buffers
from tpfuse.hf_tokens import Choice, draws_like_multinomial

# Steps that run before one is captured: the first compiles, the second shows that nothing is left to load or to allocate.
WARM = 2
# Devices without a kernel of the op: there a compiled prefill is not worth the wait for a second graph.
EAGER_PREFILL = ("cpu",)
Call = Callable[..., Any]


class Forward:
    """A model's forward for decode steps and for prefills, compiled or not.

    The two are compiled apart: a decode step has one shape for good, a prefill has any length. On a CPU a prefill runs eagerly,
    as in transformers' own ``generate``, unless ``dynamic=True`` asks for any length.
    """

    def __init__(self, model: Any, settings: dict[str, Any] | None) -> None:
        """``settings`` for ``torch.compile``, or None for no compile."""
        self.settings = settings

        def decode(**inputs: Any) -> Any:
            return model(**inputs)

        def prefill(**inputs: Any) -> Any:
            return model(**inputs)

        self.decode: Call = decode
        self.prefill: Call = prefill
        self.any_length = False
        if settings is None:
            return
        dynamic = settings.get("dynamic")
        # A replica that alone passed the limit would run eagerly and leave the others waiting in their op.
        roomy = compat.with_room_for_recompiles
        self.decode = roomy(torch.compile(decode, **{**settings, "dynamic": bool(dynamic)}))
        # With dynamic=False a compile for each length would cost more than it gives.
        if dynamic or (dynamic is None and model.device.type not in EAGER_PREFILL):
            self.prefill = roomy(torch.compile(prefill, **settings))
            self.any_length = True


GRAPH_MODES = {"reduce-overhead": None, "max-autotune": "max-autotune-no-cudagraphs"}


def plain_mode(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings of ``torch.compile`` without CUDA graphs of Inductor's: a step is one graph as a whole."""
    options = dict(settings.get("options") or {})
    options.pop("triton.cudagraphs", None)
    if "tpfuse.mode" in options:
        options["tpfuse.mode"] = _plain(options["tpfuse.mode"])
    return {**settings, "mode": _plain(settings.get("mode")), "options": options or None}


def _plain(mode: str | None) -> str | None:
    return mode if mode is None else GRAPH_MODES.get(mode, mode)


def logits_of(outputs: Any) -> Tensor:
    """The last token's logits (batch, vocabulary) in fp32, a copy, as transformers takes them."""
    return outputs.logits[:, -1].to(copy=True, dtype=torch.float32)  # type: ignore[no-any-return]


def run_prefill(model: Any, forward: Forward, buffers: Buffers, ids: Tensor, inputs: dict[str, Any]) -> Tensor:
    """Fill the cache from prompts (batch, length); the logits after them.

    Args:
        inputs: what ``generate`` prepared for the model besides the cache.
    """
    prepared = model.prepare_inputs_for_generation(
        ids, is_first_iteration=True, **{buffers.name: buffers.cache}, **inputs
    )
    if ids.shape[1] == 1:  # a length of 1 is the shape of a decode step; symbolic lengths begin at 2
        return logits_of(forward.decode(**prepared, return_dict=True))
    if forward.any_length:
        _mark_lengths(prepared, ids.shape[1])
    return logits_of(forward.prefill(**prepared, return_dict=True))


def _mark_lengths(prepared: dict[str, Any], length: int) -> None:
    """Tell Dynamo which sizes are the prompt's length, so that another one needs no new graph."""
    for key, dim in (("input_ids", 1), ("position_ids", -1), ("attention_mask", -2)):
        value = prepared.get(key)
        for tensor in value.values() if isinstance(value, dict) else (value,):
            if isinstance(tensor, Tensor) and tensor.dim() >= 2 and tensor.shape[dim] == length:
                compat.may_vary(tensor, dim % tensor.dim())


class Step:
    """A decode step of one call of ``generate``.

    Args:
        buffers: where it reads and writes.
        choice: how the token is chosen.
        inputs: keyword arguments of the model that stay the same, e.g. ``use_cache``.
        positions: whether the model takes positions.
        padded: whether some prompt has padding.
        graph: capture a CUDA graph.
    """

    def __init__(
        self,
        model: Any,
        forward: Forward,
        buffers: Buffers,
        choice: Choice,
        inputs: dict[str, Any],
        positions: bool,
        padded: bool,
        graph: bool,
    ) -> None:
        self.model, self.forward, self.buffers, self.choice = model, forward, buffers, choice
        self.inputs, self.positions, self.padded, self.graph = inputs, positions, padded, graph
        # Scores and logits for whoever asked for them; overwritten by the next step.
        self.logits: Tensor | None = None
        self.scores: Tensor | None = None

    def first(self, logits: Tensor, length: int) -> None:
        """Choose the first token, after a prefill of ``length`` tokens."""
        self._choose(logits, length)

    def __call__(self, length: int) -> None:
        """Run the model on the last token and choose the next; ``length`` tokens are there already."""
        if not self.graph:
            self._forward()
            self._choose(self.logits, length)  # type: ignore[arg-type]
            return
        # A choice that reads the tokens so far, or waits for the device, stays outside.
        drawable = not self.choice.sample or draws_like_multinomial(self.buffers.tokens.device)
        whole = self.choice.signature is not None and drawable
        captured = self._captured(whole)
        if captured is None:
            self._forward()
            self._choose(self.logits, length)  # type: ignore[arg-type]
            return
        graph, self.logits, self.scores = captured
        graph.replay()
        if not whole:
            self._choose(self.logits, length)

    def _forward(self) -> None:
        b = self.buffers
        inputs = {**self.inputs, b.name: b.cache, "attention_mask": b.mask if self.padded else None}
        if self.positions:
            inputs["position_ids"] = b.positions
        prepared = self.model.prepare_inputs_for_generation(b.tokens, **inputs)
        self.logits = logits_of(self.forward.decode(**prepared, return_dict=True))
        b.positions.add_(1)

    def _choose(self, logits: Tensor, length: int) -> None:
        b = self.buffers
        self.logits = logits
        ids = b.ids[:, :length] if self.choice.signature is None else None
        self.scores = self.choice.scores(ids, logits)
        tokens = self.choice.tokens(self.scores, b.unfinished, b.invalid)
        b.append(tokens, self.choice.ended(tokens))

    def _captured(self, whole: bool) -> tuple[Any, Tensor, Any] | None:
        """The graph of this kind of step; None while it must run as calls."""
        key = (self.forward, self.padded, self.choice.signature if whole else None)
        if key not in self.buffers.graphs:
            self.buffers.warm[key] += 1
            if self.buffers.warm[key] <= WARM:
                return None
            self.buffers.graphs[key] = self._capture(whole)
        captured: tuple[Any, Tensor, Any] | None = self.buffers.graphs[key]
        return captured

    def _capture(self, whole: bool) -> tuple[Any, Tensor, Any] | None:
        """Record a step; recording runs nothing. None, once and for all, where a step cannot be recorded."""
        graph = torch.cuda.CUDAGraph()
        pool = next((held[0].pool() for held in self.buffers.graphs.values() if held is not None), None)
        try:
            # Only this thread's calls count: NCCL's watchdog asks for events in another.
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                self._forward()
                if whole:
                    self._choose(self.logits, 0)  # type: ignore[arg-type]
        except Exception as error:
            torch.cuda.synchronize()
            unfused.tell(
                "generate-graph",
                f"a decode step of {type(self.model).__name__} cannot be a CUDA graph, so each token costs many launches; it "
                f"runs as calls, with the same result ({type(error).__name__}: {str(error)[:300]})",
            )
            return None
        return graph, self.logits, self.scores  # type: ignore[return-value]
