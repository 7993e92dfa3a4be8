"""What ``hf.py`` measures with: the contenders' models, rounds, figures as they come."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from e2e_measure import Say
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

import tpfuse
import tpfuse.hf
from tpfuse.measure import tables
from tpfuse.parallel import ParallelConfig

# By name: transformers' type of model, and its sizes; the vocabulary last.
HEADS_32_8 = {"num_attention_heads": 32, "num_key_value_heads": 8}
MODELS: dict[str, tuple[str, dict[str, int], int]] = {
    "llama-3-8b": ("llama", {"hidden_size": 4096, "intermediate_size": 14336, **HEADS_32_8}, 128256),
    "qwen3-8b": ("qwen3", {"hidden_size": 4096, "intermediate_size": 12288, **HEADS_32_8, "head_dim": 128}, 151936),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {
            **{"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "head_dim": 128},
            **{"num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8},
        },
        151936,
    ),
}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
TINY_MORE = {"head_dim": 16, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}


@dataclass(frozen=True)
class Plan:
    """What to measure."""

    device: str
    layers: int
    tiny: bool
    batches: tuple[int, ...]
    contenders: tuple[str, ...]
    prompt: int
    tokens: int
    rounds: int
    budget: float
    out: str | None
    inner: str = "inductor"
    model: str = "llama-3-8b"
    gpt_fast: str | None = None  # a checkout


@dataclass
class Line:
    """One contender at one batch size. Times in milliseconds; ``note`` says why there are none."""

    batch: int
    contender: str
    token: float | None = None
    low: float | None = None
    high: float | None = None
    gpu_busy: float | None = None
    prefill: float | None = None
    compile_seconds: float | None = None
    fused: int = 0
    all_reduces: int = 0
    equal_to_eager: float | None = None
    ranks_equal: bool | None = None
    rounds: int = 0
    note: str = ""
    problems: list[str] = field(default_factory=list)


Generate = Callable[[Tensor, int], Tensor]


def sizes_of(plan: Plan) -> tuple[str, dict[str, int], int]:
    """(type of model, sizes, vocabulary)"""
    kind, sizes, vocabulary = MODELS[plan.model]
    if plan.tiny:
        sizes, vocabulary = {name: {**TINY, **TINY_MORE}[name] for name in sizes}, 128
    return kind, sizes, vocabulary


def length_of(plan: Plan) -> int:
    return plan.prompt + plan.tokens + 8


def config_of(plan: Plan) -> Any:
    from transformers import AutoConfig

    kind, sizes, vocabulary = sizes_of(plan)
    # Large enough weights that tokens differ from one another, or any fault would look equal.
    more: dict[str, Any] = {
        "initializer_range": 0.2 if plan.tiny else 0.02,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
    }
    length = max(2048, length_of(plan))
    return AutoConfig.for_model(
        kind, **sizes, **more, num_hidden_layers=plan.layers, vocab_size=vocabulary, max_position_embeddings=length
    )


def whole_model(plan: Plan, device: torch.device) -> Any:
    """The model with random weights, the same on all ranks, made on the device."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    with device:
        dtype = torch.float32 if plan.device == "cpu" else torch.bfloat16
        return AutoModelForCausalLM.from_config(config_of(plan), dtype=dtype).eval().requires_grad_(False)


def by_transformers(plan: Plan, state: dict[str, Tensor], device: torch.device) -> Any:
    """The same weights under transformers' own tensor parallelism."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    config = config_of(plan)
    model = AutoModelForCausalLM._model_mapping[type(config)].from_pretrained(
        None,
        config=config,
        state_dict={},
        dtype=next(iter(state.values())).dtype,
        distributed_config=DistributedConfig(tp_size=dist.get_world_size(), tp_plan="auto"),
    )
    model = model.to(device).eval().requires_grad_(False)
    for name, value in model.state_dict().items():
        whole = state[name]
        if isinstance(value, DTensor):
            whole = distribute_tensor(whole, value.device_mesh, value.placements, src_data_rank=None)
        value.copy_(whole)
    return model


def contender(name: str, plan: Plan, device: torch.device) -> Generate:
    """(prompt (batch, length), new tokens) -> sequences, the way a contender makes them. Collective."""
    if name in GPT_FAST:
        return hand_written(name, plan)
    from transformers import CompileConfig

    whole = whole_model(plan, device)
    if name == "tpfuse.hf.parallelize":
        model: Any = tpfuse.hf.parallelize(whole, ParallelConfig(dist.get_world_size())).to(device)
    else:
        model = by_transformers(plan, whole.state_dict(), device)
        del whole
    model.generation_config.eos_token_id = None
    more: dict[str, Any] = {}
    backend, mode = {
        "eager": (None, None),
        "inductor": ("inductor", None),
        "inductor reduce-overhead": ("inductor", "reduce-overhead"),
        "tpfuse on DTensors": ("tpfuse", "reduce-overhead"),
        "inductor in tpfuse's loop": ("inductor", "reduce-overhead"),
    }.get(name, ("tpfuse", "reduce-overhead"))
    generate = model.generate
    options: dict[str, Any] | None = None
    if plan.inner != "inductor":  # a rehearsal
        mode, backend = None, plan.inner if backend == "inductor" else backend
        options = {"tpfuse.inner": plan.inner} if backend == "tpfuse" else None
    if name.startswith("tpfuse.hf"):
        generate = tpfuse.hf.compile(model, mode=mode, options=options).generate
    elif backend is None:
        more["disable_compile"] = True
    else:
        more["compile_config"] = CompileConfig(backend=backend, mode=mode, options=options)
        more["compile_config"]._compile_all_devices = True
    if name == "inductor in tpfuse's loop":
        tpfuse.hf.localize(model)

        def generate(ids: Tensor, **kwargs: Any) -> Any:
            return tpfuse.hf.generate(model, ids, **kwargs)

    def run(prompt: Tensor, new: int) -> Tensor:
        cache = {} if name == "eager" else {"cache_implementation": "static"}
        out = generate(prompt, max_new_tokens=new, do_sample=False, pad_token_id=0, **cache, **more)
        return out  # type: ignore[no-any-return]

    return run


def hand_written(name: str, plan: Plan) -> Generate:
    import hf_gpt_fast

    if plan.gpt_fast is None:
        raise ValueError("gpt-fast needs --gpt-fast, the folder of a checkout")
    _, sizes, vocabulary = sizes_of(plan)
    compile_it = plan.inner == "inductor"
    backend = GPT_FAST[name]
    return hf_gpt_fast.generate_of(plan.gpt_fast, sizes, plan.layers, vocabulary, length_of(plan), backend, compile_it)


GPT_FAST = {"gpt-fast with tpfuse": "tpfuse", "gpt-fast with inductor": "inductor"}
CONTENDERS = (
    "eager",
    "inductor reduce-overhead",
    "tpfuse.hf.compile",
    "tpfuse.hf.parallelize",
    "tpfuse on DTensors",
    "inductor in tpfuse's loop",
    "inductor",
)


def timed(device: torch.device, run: Callable[[], Tensor]) -> tuple[float, Tensor]:
    """(milliseconds of the slowest rank, result); ranks start together. Collective."""
    synchronize(device)
    dist.barrier()
    begin = time.perf_counter()
    out = run()
    synchronize(device)
    spent = torch.tensor([(time.perf_counter() - begin) * 1e3])
    dist.all_reduce(spent, op=dist.ReduceOp.MAX)  # on the CPU: gloo, also where NCCL serves the GPUs
    return spent.item(), out


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def everyone(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


class Bench:
    """The figures of one run, on every rank."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self.plan, self.rank, self.begin = plan, rank, time.monotonic()
        self.device = (
            torch.device("cuda", torch.cuda.current_device()) if plan.device == "cuda" else torch.device("cpu")
        )
        self.say = Say(rank, "hf")
        self.lines: list[Line] = []

    def spent(self) -> bool:
        """Whether rank 0's clock has passed the budget: one answer for all ranks."""
        return bool(everyone(time.monotonic() - self.begin > self.plan.budget)[0])

    def save(self) -> None:
        if self.plan.out is None or self.rank != 0:
            return
        path = Path(self.plan.out) / "hf.json"
        facts = {**tables.facts(), "world": dist.get_world_size()}
        partial = path.with_suffix(".part")
        partial.write_text(
            json.dumps(
                {"facts": facts, "plan": asdict(self.plan), "lines": [asdict(line) for line in self.lines]}, indent=1
            )
            + "\n"
        )
        partial.replace(path)

    def batch(self, batch: int) -> None:
        """Every contender at one batch size."""
        plan = self.plan
        torch.manual_seed(1)
        prompt = torch.randint(3, 120, (batch, plan.prompt), device=self.device)
        runs: list[tuple[Line, Generate]] = []
        for name in plan.contenders:
            line = Line(batch, name)
            self.lines.append(line)
            if self.spent():
                line.note = f"not begun: the budget of {plan.budget:.0f} s is spent"
                continue
            run = self.attempt(line, lambda line=line: self.prepared(line, prompt))  # type: ignore[misc]
            # A figure at once, should the run be cut short before the rounds.
            found = self.attempt(line, lambda run=run: self.round(run, prompt)) if run is not None else None  # type: ignore[misc]
            if found is not None:
                line.token, line.prefill = (found[0] - found[1]) / (plan.tokens - 1), found[1]
                runs.append((line, run))
                self.say(
                    f"batch {batch}, {name}: ready in {line.compile_seconds:.0f} s, {line.token:.2f} ms a token at first"
                )
                self.save()
        taken: dict[str, list[tuple[float, float]]] = {line.contender: [] for line, _ in runs}
        tokens: dict[str, Tensor] = {}
        for number in range(plan.rounds):
            # A contender that fails in one round is out of the others: its ranks may no longer be in step.
            for line, run in [(line, run) for line, run in runs if not line.note]:
                found = self.attempt(line, lambda run=run: self.round(run, prompt))  # type: ignore[misc]
                if found is not None:
                    many, one, tokens[line.contender] = found
                    taken[line.contender].append((many, one))
            if number >= 2 and self.spent():
                break
        for line, run in runs:
            if not line.note:
                self.fill(line, taken[line.contender], tokens, run, prompt)
                self.say(describe(line))
                self.save()
        self.save()

    def attempt(self, line: Line, what: Callable[[], Any]) -> Any:
        """What a contender gives, or None on all ranks where one of them failed; the others keep their figures."""
        found, error = None, ""
        try:
            found = what()
        except Exception as raised:
            error = f"{type(raised).__name__}: {str(raised)[:400]}"
        failed = next((f"rank {rank}: {said}" for rank, said in enumerate(everyone(error)) if said), "")
        if failed:
            line.note = failed
            line.problems.append("failed")
            self.say(f"batch {line.batch}, {line.contender}: {failed}")
            return None
        return found

    def prepared(self, line: Line, prompt: Tensor) -> Generate:
        begin = time.monotonic()
        tpfuse.clear_reports()
        run = contender(line.contender, self.plan, self.device)
        for _ in range(2):  # a graph of Inductor's is recorded at the second call
            run(prompt, self.plan.tokens)
            run(prompt, 1)
        synchronize(self.device)
        line.compile_seconds = time.monotonic() - begin
        reports = max(tpfuse.reports(), key=lambda report: len(report.sites), default=None)
        if reports is not None:
            line.fused, line.all_reduces = len(reports.fused), len(reports.sites)
        return run

    def round(self, run: Generate, prompt: Tensor) -> tuple[float, float, Tensor]:
        many, tokens = timed(self.device, lambda: run(prompt, self.plan.tokens))
        one, _ = timed(self.device, lambda: run(prompt, 1))
        return many, one, tokens.cpu()

    def fill(self, line: Line, taken: list[Any], tokens: dict[str, Tensor], run: Generate, prompt: Tensor) -> None:
        each = sorted((many - one) / (self.plan.tokens - 1) for many, one in taken)
        line.token, line.low, line.high = statistics.median(each), each[0], each[-1]
        line.prefill, line.rounds = statistics.median(one for _, one in taken), len(taken)
        mine = tokens[line.contender]
        line.ranks_equal = all(torch.equal(mine, other) for other in everyone(mine))
        if not line.ranks_equal:
            line.problems.append("ranks chose different tokens")
        if "eager" in tokens and line.contender not in GPT_FAST:  # other weights, other tokens
            line.equal_to_eager = (mine == tokens["eager"])[:, self.plan.prompt :].float().mean().item()
            if self.plan.device == "cpu" and line.equal_to_eager != 1.0:
                line.problems.append("in fp32, other tokens than eager's")
        if self.device.type == "cuda":
            line.gpu_busy = self.busy(line, run, prompt)

    def busy(self, line: Line, run: Generate, prompt: Tensor) -> float | None:
        """Milliseconds a token that rank 0's GPU is in kernels; None on the other ranks, and where there is no profiler."""
        totals: list[float] = []
        for new in (self.plan.tokens, 1):
            profiler = None
            if self.rank == 0:
                # Whatever happens to the profiler, this rank takes part in the run: the others wait for it.
                try:
                    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
                    profiler.start()
                except Exception as error:
                    profiler, line.note = None, f"no profiler: {str(error)[:100]}"
            run(prompt, new)
            synchronize(self.device)
            if profiler is not None:
                profiler.stop()
                totals.append(sum(event.self_device_time_total for event in profiler.key_averages()))
        return (totals[0] - totals[1]) / 1e3 / (self.plan.tokens - 1) if len(totals) == 2 else None


def measure(rank: int, world: int, plan: Plan) -> list[dict[str, Any]]:
    """All batch sizes on one rank. Collective."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch._dynamo.config.recompile_limit = 64  # several models and shapes share the graphs of their functions
    if plan.device == "cpu":
        torch.set_num_threads(1)
    bench = Bench(plan, rank)
    for batch in plan.batches:
        torch._dynamo.reset()  # or the second batch size would be a symbol in every graph
        bench.batch(batch)
        if plan.device == "cuda":
            torch.cuda.empty_cache()
    bench.save()
    return [asdict(line) for line in bench.lines]


def describe(line: Line) -> str:
    """One line of text about a contender."""
    if line.token is None or line.low is None:
        return f"batch {line.batch}, {line.contender}: no figure ({line.note})"
    busy = "" if line.gpu_busy is None else f", GPU busy {line.gpu_busy:.2f}"
    equal = "" if line.equal_to_eager is None else f", tokens equal to eager's {line.equal_to_eager:.0%}"
    return (
        f"batch {line.batch}, {line.contender}: {line.token:.2f} ms a token ({line.low:.2f} to {line.high:.2f}, "
        f"{line.rounds} rounds){busy}, prefill {line.prefill:.1f}, {line.fused} of {line.all_reduces} fused{equal}"
    )
