"""The DeepSeek-V3-like model of ``e2e.py``: attention DP, and the dense MLP on the ranks of its attention.

Random weights. By default the widths of DeepSeek-V3 with fewer layers and experts: three dense and three MoE layers of 32
experts, 13 GiB before it is cut, on every rank. With ``--widths moonlight`` those of Moonlight-16B-A3B, a small model of the
same architecture, with all of its 64 experts and 8 of its 27 layers, 8 GiB. ``tpfuse.hf.parallelize`` shards it under
(tp, dp, k). With a GPU for every rank the baseline is NCCL. Up to four ranks may share one GPU, whose baseline is tpfuse
without rows with destinations (``e2e_rows.py``).

A decode step has one token for each of the given number of sequences, in every replica, on a static cache that an eager
prefill has begun; a prefill is one sequence without a cache.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from e2e_measure import Case, Line, Plan, Recorder, Say, measure_shape, memory, prepare
from e2e_rows import SymmetricEagerly
from torch import Tensor, nn

import tpfuse
import tpfuse.hf
from tpfuse.measure import other_libraries
from tpfuse.measure.ranks import gpu_count, why_not
from tpfuse.parallel import ParallelConfig, layout_of
from tpfuse.parallel.layout import Boundary, Op

MOST_ON_A_GPU = 4  # torch's kernels wait in up to 24 blocks a rank, which must all fit at once
PROMPT = 16  # tokens in the cache when a contender starts


@dataclass(frozen=True)
class Sizes:
    """Fields of transformers' ``DeepseekV3Config``, and the dtype."""

    name: str = "deepseek"
    layers: int = 6
    dense_layers: int = 3
    hidden: int = 7168
    inner: int = 18432
    expert_inner: int = 2048
    experts: int = 32
    experts_a_token: int = 8
    expert_groups: int = 8
    groups_a_token: int = 4
    shared_experts: int = 1
    heads: int = 128
    query_rank: int | None = 1536
    key_value_rank: int = 512
    nope: int = 128
    rope: int = 64
    value: int = 128
    vocabulary: int = 8192
    spread: float = 0.02
    dtype: torch.dtype = torch.bfloat16


# https://huggingface.co/moonshotai/Moonlight-16B-A3B, config.json
MOONLIGHT = Sizes(
    name="moonlight",
    layers=8,
    dense_layers=1,
    hidden=2048,
    inner=11264,
    expert_inner=1408,
    experts=64,
    experts_a_token=6,
    expert_groups=1,
    groups_a_token=1,
    shared_experts=2,
    heads=16,
    query_rank=None,
)
WIDTHS = {"deepseek-v3": Sizes(), "moonlight": MOONLIGHT}
TINY = Sizes(
    layers=4,
    dense_layers=2,
    hidden=64,
    inner=128,
    expert_inner=32,
    experts=4,
    experts_a_token=2,
    expert_groups=1,
    groups_a_token=1,
    heads=4,
    query_rank=32,
    key_value_rank=32,
    nope=16,
    rope=8,
    value=16,
    vocabulary=128,
    spread=0.2,
    dtype=torch.float32,
)


def run_of(args: argparse.Namespace, plan: Plan) -> tuple[int, Callable[..., list[Line]], Plan]:
    """World size, function of a rank and plan for the arguments of ``e2e.py``.

    Raises:
        ValueError: sizes that do not fit together, fewer GPUs than ranks, or no transformers; one sentence.
    """
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--model deepseek needs transformers ({error}); pip install 'tpfuse[hf]'") from error
    if args.captured:
        raise ValueError(
            "--captured is for the Llamas; a step of --model deepseek changes its cache and positions outside"
        )
    config = ParallelConfig(args.tp, args.dp, 1, args.k)
    shared = args.device == "cuda" and gpu_count() < args.tp
    if shared:
        missing = why_not(args.tp) or (
            None if args.tp <= MOST_ON_A_GPU else f"at most {MOST_ON_A_GPU} ranks share a GPU"
        )
        if missing:
            raise ValueError(f"--model deepseek with tp={args.tp} on {gpu_count()} GPU(s): {missing}")
    sizes = WIDTHS[args.widths]
    if args.tiny:
        sizes = replace(TINY, name=sizes.name, query_rank=sizes.query_rank and TINY.query_rank)
    given = {"layers": args.layers, "dense_layers": args.dense_layers, "experts": args.experts, "hidden": args.hidden}
    sizes = replace(sizes, **{name: value for name, value in given.items() if value is not None})
    if not 0 < sizes.dense_layers <= sizes.layers:
        raise ValueError(f"{sizes.dense_layers} dense layers of {sizes.layers}: give at least one and at most all")
    plan = replace(plan, sizes=sizes, parallel=(args.tp, args.dp, args.k), symmetric=shared or args.symmetric)
    return config.world_size, deepseek, plan


def whole_model(sizes: Sizes, device: torch.device, context: int) -> nn.Module:
    """The model with all of its weights, the same on every rank."""
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    config = DeepseekV3Config(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.inner,
        moe_intermediate_size=sizes.expert_inner,
        num_hidden_layers=sizes.layers,
        first_k_dense_replace=sizes.dense_layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.heads,
        n_routed_experts=sizes.experts,
        num_experts_per_tok=sizes.experts_a_token,
        n_group=sizes.expert_groups,
        topk_group=sizes.groups_a_token,
        n_shared_experts=sizes.shared_experts,
        q_lora_rank=sizes.query_rank,
        kv_lora_rank=sizes.key_value_rank,
        qk_nope_head_dim=sizes.nope,
        qk_rope_head_dim=sizes.rope,
        v_head_dim=sizes.value,
        initializer_range=sizes.spread,
        max_position_embeddings=context,
    )
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=sizes.dtype).eval().requires_grad_(False)


class Step(nn.Module):
    """tokens (sequences, length), positions (1, length) -> the likeliest next tokens, of the same shape as tokens."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        # transformers renamed the argument in 5.2x.
        names = inspect.signature(type(model).forward).parameters
        self.keyword = "cache" if "cache" in names else "past_key_values"

    def forward(self, tokens: Tensor, positions: Tensor, cache: Any, largest: int) -> Tensor:
        given = {} if cache is None else {self.keyword: cache}
        output = self.model(tokens, position_ids=positions, use_cache=cache is not None, largest_block=largest, **given)
        return output.logits.argmax(-1)


class Decode:
    """One decode step at a time on a static cache of ``context`` tokens; ``start`` begins a new one."""

    def __init__(
        self, step: Step, sequences: int, context: int, tokens: Callable[[int], Tensor], symmetric: bool
    ) -> None:
        self.step, self.sequences, self.context, self.tokens = step, sequences, context, tokens
        self.symmetric = symmetric
        self.cache: Any = None
        self.positions = torch.zeros(0)

    @torch.no_grad()
    def start(self) -> None:
        from transformers import StaticCache

        prompt = torch.cat([self.tokens(2000 + n) for n in range(PROMPT)], dim=1)
        positions = torch.arange(PROMPT, device=prompt.device).unsqueeze(0)
        self.cache = StaticCache(config=self.step.model.config, max_cache_len=self.context)
        with SymmetricEagerly() if self.symmetric else contextlib.nullcontext():
            self.step(prompt, positions, self.cache, prompt.numel())
        self.positions = positions[:, -1:] + 1

    def __call__(self, compiled: Any, tokens: Tensor) -> Tensor:
        chosen = compiled(tokens, self.positions, self.cache, self.sequences)
        self.positions = self.positions + 1
        return chosen


def _selects_rows(boundary: Boundary) -> bool:
    return any(step.op in (Op.SLICE_ROWS, Op.REDUCE_SCATTER) for step in boundary.steps)


def deepseek(rank: int, world: int, plan: Plan) -> list[Line]:
    """On every rank: all shapes of the plan on one instance of the model."""
    device = prepare(plan)
    sizes: Sizes = plan.sizes
    config = ParallelConfig(plan.parallel[0], plan.parallel[1], 1, plan.parallel[2])
    say = Say(rank, f"{sizes.name} {plan.parallel}")
    warm, checks, steps, chain, chains = plan.steps
    context = -(-(PROMPT + warm + checks + steps + chain * chains) // 64) * 64
    longest = max([context, *(rows for phase, rows in plan.shapes if phase == "prefill")])
    model = tpfuse.hf.parallelize(whole_model(sizes, device, longest), config, vocabulary=False)  # layers are measured
    if plan.device == "cuda":
        torch.cuda.empty_cache()
    parallelized = layout_of(model)
    groups, reductions = parallelized.groups, parallelized.plan.reductions()
    fusing = sorted({r.group for r in reductions if r.fuses})
    expected = sum(r.fuses for r in reductions)
    with_rows = sum(b.fuses in ("yes", "first part") and _selects_rows(b) for b in parallelized.plan.boundaries)
    # The op has one gather: with fuses "first part" it would have to be two.
    gathered = sum(
        b.fuses == "yes" and any(s.op is Op.GATHER_BLOCKS for s in b.after_norm) for b in parallelized.plan.boundaries
    )
    if plan.device == "cuda":
        # Planes are built here and not by the first compiled step, whose allocations belong to the CUDA graphs' pool.
        for group in fusing:
            path = tpfuse.ops.describe_path(groups.name_of(group))
            say(f"{group}: tpfuse takes the {path.kind} path {path.cause}")
    if plan.symmetric and plan.device == "cuda":
        for group in ("tp", "attn_tp", "attn_dp"):  # before anything is captured, and for the largest shape
            # A decode step begins with an eager prompt of every sequence.
            rows_of = [rows * (PROMPT if phase == "decode" else 1) for phase, rows in plan.shapes]
            most = config.attn_dp_size * max(rows_of)
            if len(groups.ranks_of(group)) > 1:
                other_libraries.reserve(groups.name_of(group), most * sizes.hidden, sizes.dtype, device)
    say(f"weights made and cut{memory(plan)}; {expected} of {len(reductions)} reductions of the plan fuse")
    recorder = Recorder(plan, rank)
    step = Step(model)
    block, same = rank // config.attn_tp_size, groups.ranks_of("attn_tp")
    names = tuple(groups.name_of(group) for group in fusing)

    def random_tokens(number: int, shape: tuple[int, int]) -> Tensor:
        seeded = torch.Generator().manual_seed(1_000_000 * block + number)
        return torch.randint(sizes.vocabulary, shape, generator=seeded).to(device)

    for phase, rows in plan.shapes:
        shape = (rows, 1) if phase == "decode" else (1, rows)

        def tokens(number: int, shape: tuple[int, int] = shape) -> Tensor:
            return random_tokens(number, shape)

        call: Callable[[Any, Tensor], Tensor]
        start: Callable[[], None]
        if phase == "decode":
            call = decode = Decode(step, rows, context, tokens, plan.symmetric)
            start = decode.start
        else:
            positions = torch.arange(rows, device=device).unsqueeze(0)

            def prefill(compiled: Any, given: Tensor, positions: Tensor = positions, rows: int = rows) -> Tensor:
                return compiled(given, positions, None, rows)

            call, start = prefill, lambda: None
        rows_off = expected - with_rows
        case = Case(step, call, start, tokens, expected, same, names, rows_off, expected_gathered=gathered)
        measure_shape(sizes.name, phase, rows, case, plan, say, recorder)
    return recorder.lines
