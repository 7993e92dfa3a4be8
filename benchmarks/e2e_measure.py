"""What ``e2e.py`` measures with: contenders, the baselines' all-reduces, the time of a step, lines and tables."""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from e2e_rows import GATHERS_OFF, QUANT_OFF, ROWS_OFF, WITHOUT, SymmetricCollectives
from torch import Tensor, nn

import tpfuse
from tpfuse.measure import other_libraries, tables
from tpfuse.measure.ranks import gpu_count

TPFUSE = "tpfuse"
OURS = (TPFUSE, *WITHOUT)
WARM, CHECKS, STEPS, CHAIN, CHAINS = 4, 4, 24, 20, 6
CAPTURES = 3  # CUDA graphs of one compiled step; a divisor of CHAINS


@dataclass(frozen=True)
class Plan:
    """What to measure. ``shapes`` are (phase, rows) with phase ``decode`` or ``prefill``."""

    shapes: tuple[tuple[str, int], ...]
    device: str
    inner: str
    sizes: Any
    contenders: tuple[str, ...] | None = None
    out: str | None = None
    parallel: tuple[int, int, int] = (0, 1, 0)  # tp, dp, k of the DeepSeek model
    symmetric: bool = (
        False  # what tpfuse leaves of the DeepSeek model's collectives is symmetric memory's, see e2e_rows.py
    )
    # A CUDA graph of the whole step, as engines make one, in place of torch.compile's: its replay costs no Python. For weights
    # that are tensor subclasses, whose parts torch takes out again in every call.
    captured: bool = False
    attention: str = "torch"  # "flash": not cuDNN's, whose bits differ from call to call
    steps: tuple[int, int, int, int, int] = (WARM, CHECKS, STEPS, CHAIN, CHAINS)


@dataclass
class Line:
    """One contender at one shape. Times in microseconds; ``note`` says why there are none."""

    model: str
    world: int
    phase: str
    rows: int
    contender: str
    step: float | None = None
    low: float | None = None
    high: float | None = None
    back_to_back: float | None = None
    compile_seconds: float | None = None
    fused: int | None = None
    quantized: int | None = None  # fused sites whose norm is quantized in the op
    gathered: int | None = None  # fused sites whose normed rows are gathered in the op
    all_reduces: int | None = None
    ranks_equal: bool | None = None
    equal_to_tpfuse: float | None = None  # fraction of the tokens
    graphs_skipped: int = 0  # graphs that Inductor did not turn into CUDA graphs
    varies: list[str] = field(default_factory=list)  # what chose other tokens on the same inputs
    problems: list[str] = field(default_factory=list)
    note: str = ""


@dataclass
class Case:
    """A model at one shape, ready to be compiled.

    Attributes:
        module: what is compiled; ``reduction`` on it names the contender whose all-reduces it makes.
        call: (compiled, tokens) -> the tokens chosen, shaped so that they may be the next step's input.
        start: called before a contender runs, to bring caches back to their first state.
        tokens: number -> input tokens, equal on the ranks that hold the same rows.
        expected: fused reductions.
        same_rows: ranks that must choose the same tokens as this one, itself included.
        group_names: groups whose kernels tpfuse runs, to ask whether a poll gave up.
        expected_rows_off: fused reductions of ``tpfuse rows off``.
        expected_quantized: of the fused ones, whose norm the op quantizes.
        expected_gathered: of the fused ones, whose normed rows the op gathers; none with rows or gathers off.
    """

    module: nn.Module
    call: Callable[[Any, Tensor], Tensor]
    start: Callable[[], None]
    tokens: Callable[[int], Tensor]
    expected: int
    same_rows: tuple[int, ...]
    group_names: tuple[str, ...]
    expected_rows_off: int = 0
    expected_quantized: int = 0
    expected_gathered: int = 0

    def expected_of(self, contender: str) -> int:
        return self.expected_rows_off if contender == ROWS_OFF else self.expected


library = torch.library.Library("tpfuse_e2e", "DEF")
library.define("symm_one_shot(Tensor x, str group_name) -> Tensor")
library.define("symm_two_shot(Tensor x, str group_name) -> Tensor")


def _flat(x: Tensor) -> Tensor:
    """``x`` as torch's kernels take it: flat, contiguous, 16-byte aligned."""
    x = x.contiguous().view(-1)
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _symm_one_shot(x: Tensor, group_name: str) -> Tensor:
    buffer = other_libraries.symmetric_buffer(group_name, x.numel())
    return torch.ops.symm_mem.one_shot_all_reduce_copy(buffer, _flat(x), "sum", group_name).view(x.shape)


def _symm_two_shot(x: Tensor, group_name: str) -> Tensor:
    buffer = other_libraries.symmetric_buffer(group_name, x.numel())
    buffer.copy_(x.reshape(-1))
    out = torch.empty_like(buffer)
    torch.ops.symm_mem.two_shot_all_reduce_out(buffer, "sum", group_name, out)
    return out.view(x.shape)


def _fake(x: Tensor, group_name: str) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


library.impl("symm_one_shot", _symm_one_shot, "CUDA")
library.impl("symm_two_shot", _symm_two_shot, "CUDA")
for _name in ("symm_one_shot", "symm_two_shot"):
    torch.library.register_fake(f"tpfuse_e2e::{_name}", _fake, lib=library)


def all_reduce(x: Tensor, contender: str, group_name: str) -> Tensor:
    """The sum of ``x`` over the group, the way a contender makes it."""
    if contender == "symm one-shot":
        return torch.ops.tpfuse_e2e.symm_one_shot(x, group_name)
    if contender == "symm two-shot":
        return torch.ops.tpfuse_e2e.symm_two_shot(x, group_name)
    reduced = torch.ops._c10d_functional.all_reduce(x, "sum", group_name)
    return torch.ops._c10d_functional.wait_tensor(reduced)


class Say:
    """Progress on rank 0's standard output, so that a run that is cut short still tells something."""

    def __init__(self, rank: int, about: str) -> None:
        self.rank, self.about, self.start = rank, about, time.monotonic()

    def __call__(self, text: str) -> None:
        if self.rank == 0:
            print(f"[{time.monotonic() - self.start:6.1f} s] {self.about}: {text}", flush=True)


class Recorder:
    """Lines of this rank; rank 0 rewrites the JSON file after every one. Lines of earlier world sizes stay in it."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self.path = Path(plan.out) if plan.out and rank == 0 else None
        self.lines: list[Line] = []
        self.before: list[dict[str, Any]] = []
        self.facts = {**tables.facts(), "inner": plan.inner, "device": plan.device, "steps": plan.steps}
        if self.path is not None and self.path.exists():
            self.before = json.loads(self.path.read_text())["lines"]

    def add(self, line: Line) -> None:
        self.lines.append(line)
        self.save()

    def save(self) -> None:
        if self.path is not None:
            lines = [*self.before, *(asdict(one) for one in self.lines)]
            partial = self.path.with_suffix(".part")
            partial.write_text(json.dumps({"facts": self.facts, "lines": lines}, indent=1) + "\n")
            partial.replace(self.path)


def inductor_settings() -> None:
    """Settings of Inductor in every process that measures."""
    # A pool of compiler processes forked from a client of MPS has hung.
    torch._inductor.config.compile_threads = 1  # type: ignore[attr-defined]
    # Inductor's own kernels are the same for all contenders and on all ranks. Left to itself it times variants of them, and what
    # it takes differs from compile to compile by more than what is measured here.
    torch._inductor.config.deterministic = True  # type: ignore[attr-defined]
    torch._inductor.config.autotune_local_cache = False  # type: ignore[attr-defined]


def prepare(plan: Plan) -> torch.device:
    """Settings of a rank's process, and its device."""
    inductor_settings()
    torch.backends.cuda.enable_cudnn_sdp(plan.attention == "torch")
    if plan.device == "cpu":
        torch.set_num_threads(1)
        return torch.device("cpu")
    device = torch.device("cuda", torch.cuda.current_device())
    if gpu_count() >= dist.get_world_size():
        dist.all_reduce(torch.zeros(1, device=device))  # NCCL's communicator exists before anything is captured
    return device


def memory(plan: Plan) -> str:
    return (
        f", {torch.cuda.memory_allocated() / 2**30:.1f} GiB on this GPU by this rank" if plan.device == "cuda" else ""
    )


def contenders_for(plan: Plan, phase: str, world: int) -> tuple[str, ...]:
    """Names in the order of measurement. Pure: the same on every rank."""
    if plan.device == "cpu":
        named = tuple(c for c in WITHOUT if c in (plan.contenders or ()))
        chosen: tuple[str, ...] = ("gloo", *named, "tpfuse")
    else:
        shared = gpu_count() < world
        # Torch's kernels wait in up to 24 blocks a rank and have no watchdog: on a shared GPU some multiprocessors must stay
        # free for the kernels that they wait for.
        processors = torch.cuda.get_device_properties(0).multi_processor_count
        symmetric = not plan.parallel[0] and not (shared and 24 * world >= processors)
        chosen = (
            *(("symm one-shot",) if symmetric else ()),
            *(("symm two-shot",) if symmetric and phase == "prefill" else ()),
            *(() if shared else ("nccl",)),
            *((ROWS_OFF,) if plan.parallel[0] and (shared or ROWS_OFF in (plan.contenders or ())) else ()),
            *((GATHERS_OFF,) if plan.parallel[0] and GATHERS_OFF in (plan.contenders or ()) else ()),
            *((QUANT_OFF,) if getattr(plan.sizes, "float8", False) else ()),
            "tpfuse",
        )
    return tuple(c for c in chosen if plan.contenders is None or c in plan.contenders)


class Captured:
    """A function of tokens as a CUDA graph, which writes every result over the one before."""

    def __init__(self, call: Callable[[Tensor], Tensor], tokens: Tensor) -> None:
        self.tokens, self.graph = tokens.clone(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.chosen = call(self.tokens)

    def __call__(self, tokens: Tensor) -> Tensor:
        self.tokens.copy_(tokens)
        self.graph.replay()
        return self.chosen


def compiled_for(contender: str, module: nn.Module, inner: str, symmetric: bool = False, captured: bool = False) -> Any:
    mode = "reduce-overhead" if inner == "inductor" and not captured else None
    if contender in OURS:
        options: dict[str, Any] = {"tpfuse.inner": inner, "tpfuse.mode": mode}
        if symmetric:
            options["post_grad_custom_post_pass"] = SymmetricCollectives()
        return torch.compile(module, backend="tpfuse", options=options, dynamic=False, fullgraph=True)
    return torch.compile(module, backend=inner, mode=mode, dynamic=False, fullgraph=True)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


@contextlib.contextmanager
def stopwatch(device: str, into: list[float]) -> Iterator[None]:
    """Appends microseconds: by CUDA events on a GPU, else by the clock."""
    if device == "cpu":
        begin = time.perf_counter()
        yield
        into.append((time.perf_counter() - begin) * 1e6)
        return
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    yield
    stop.record()
    torch.cuda.synchronize()
    into.append(start.elapsed_time(stop) * 1e3)


def measure_shape(model: str, phase: str, rows: int, case: Case, plan: Plan, say: Say, recorder: Recorder) -> None:
    """Every contender at one shape. Collective."""
    world = dist.get_world_size()
    empty = Line(model, world, phase, rows, "")
    found: dict[str, Line] = {}
    made: list[Contender] = []
    names = contenders_for(plan, phase, world)
    # Where buffers lie in memory moves a step by a few percent: those that stay are made twice, the second time in reverse, and
    # captured several times each.
    for name in (*names, *(reversed(names) if plan.captured and plan.device == "cuda" else ())):
        line = replace(empty, contender=name, varies=[], problems=[])
        error, contender = "", Contender(line, case, plan)
        try:
            with WITHOUT.get(name, contextlib.nullcontext)():
                contender.compile(say)
            if not contender.captured:  # what is compiled next may take its place
                contender.take_turn(1)
        except Exception as raised:  # the other contenders keep their figures
            error = f"{type(raised).__name__}: {str(raised)[:600]}"
        errors: list[Any] = [None] * world
        dist.all_gather_object(errors, error)
        failed = next((f"rank {r}: {said}" for r, said in enumerate(errors) if said), "")
        if failed:
            found[name] = replace(empty, contender=name, note=failed, problems=["failed"])
            made = [one for one in made if one.line.contender != name]
        elif name not in found or not found[name].note:
            made.append(contender)
            found.setdefault(name, line)
    # In turn, from the first to the last and back: a GPU's clock moves by more than what contenders differ by.
    turns = plan.steps[-1]
    for number in range(turns):
        for contender in made[:: -1 if number % 2 else 1]:
            if contender.captured:
                contender.take_turn(turns)
    measured = {name: [one for one in made if one.line.contender == name] for name in found}
    for first, *others in (of_one for of_one in measured.values() if of_one):
        for other in others:
            first.join(other)
        first.finish()
    ours = next((of_one[0].checked for name, of_one in measured.items() if name == TPFUSE and of_one), None)
    for first, *_ in (of_one for of_one in measured.values() if of_one):
        if ours is not None:
            first.line.equal_to_tpfuse = (first.checked == ours).float().mean().item()
    for line in found.values():
        recorder.add(line)
        say(describe(line))
    say(summary(list(found.values())))


class Contender:
    """One contender at one shape: compiled, checked, then timed once or in turns with others. Every method is collective."""

    def __init__(self, line: Line, case: Case, plan: Plan) -> None:
        self.line, self.case, self.plan = line, case, plan
        self.captured = plan.captured and plan.device == "cuda"
        self.taken: list[float] = []
        self.together: list[float] = []

    def _once(self, tokens: Tensor) -> Tensor:
        if self.plan.device == "cuda" and not self.captured:
            torch.compiler.cudagraph_mark_step_begin()
        return self.call(tokens).clone()  # the next replay writes over what this one returned

    @torch.no_grad()
    def compile(self, say: Say) -> None:
        """Compile, capture, count, and choose the tokens on the inputs that every contender gets."""
        case, plan, line = self.case, self.plan, self.line
        warm, checks, *_ = plan.steps
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        tpfuse.clear_reports()
        case.module.reduction = line.contender  # type: ignore[assignment]
        case.start()
        step = compiled_for(line.contender, case.module, plan.inner, plan.symmetric, self.captured)
        self.call: Callable[[Tensor], Tensor] = lambda tokens: case.call(step, tokens)
        begin = time.monotonic()
        for number in range(warm):
            synchronize(plan.device)
            dist.barrier()
            self._once(case.tokens(number))
            if number == 0:
                synchronize(plan.device)
                line.compile_seconds = time.monotonic() - begin
                about = f"{line.phase} {line.rows}, {line.contender}"
                say(f"{about}: compiled and run once in {line.compile_seconds:.0f} s")
        if self.captured:
            synchronize(plan.device)
            dist.barrier()
            self.captures = [Captured(self.call, case.tokens(0)) for _ in range(CAPTURES)]
            self.call = self.captures[0]
        if line.contender in OURS:
            self._count()
        skips = torch._dynamo.utils.counters["inductor"]["cudagraph_skips"]
        line.graphs_skipped = int(skips)
        if skips and plan.device == "cuda" and not self.captured:
            line.problems.append(f"Inductor ran {skips} graph(s) without CUDA graphs")
        self.checked = self._chosen(checks)
        if self.captured:
            self._compare_captures(checks)
        self.tokens = case.tokens(0)

    def _chosen(self, checks: int) -> Tensor:
        """The tokens chosen on the inputs that every contender gets."""
        return torch.stack([self._once(self.case.tokens(1000 + number)) for number in range(checks)]).cpu()

    def _compare_captures(self, checks: int) -> None:
        """Once more with each graph of the compiled step: does one differ with itself, or with another?

        The same graph on the same inputs has to repeat itself, but for cuDNN's attention. What is compiled once more may have
        another kernel of Inductor's, with another order of sums: it still times two block sizes of some norms.
        """
        for number, capture in enumerate(self.captures):
            self.call = capture
            strict = number == 0 and self.plan.attention == "flash"
            self._note_others(
                self._chosen(checks),
                f"graph {number + 1} of {len(self.captures)}" if number else "replayed",
                self.line.problems if strict else self.line.varies,
            )
        self.call = self.captures[0]

    def _note_others(self, chosen: Tensor, when: str, into: list[str]) -> None:
        other = int((chosen != self.checked).sum())
        if other:
            into.append(f"{when} it chose {other} of {chosen.numel()} tokens otherwise")

    def _count(self) -> None:
        line = self.line
        expected, reports = self.case.expected_of(line.contender), tpfuse.reports()
        line.fused, line.all_reduces = sum(len(r.fused) for r in reports), sum(len(r.sites) for r in reports)
        line.quantized = sum(site.quantizer is not None for r in reports for site in r.fused)
        quantized = 0 if line.contender == QUANT_OFF else self.case.expected_quantized
        if line.quantized != quantized:
            notes = sorted({site.note for r in reports for site in r.fused})
            line.problems.append(f"{line.quantized} norms quantized in the op instead of {quantized}; {notes[:3]}")
        line.gathered = sum(site.pattern.endswith("all_gather") for r in reports for site in r.fused)
        gathered = 0 if line.contender in (ROWS_OFF, GATHERS_OFF) else self.case.expected_gathered
        if line.gathered != gathered:
            notes = sorted({site.note for r in reports for site in r.fused})
            line.problems.append(f"{line.gathered} gathers in the op instead of {gathered}; {notes[:3]}")
        if line.fused != expected:
            kept = {f"{site.reason}: {site.detail}" for r in reports for site in r.kept}
            line.problems.append(f"{line.fused} all-reduces fused instead of {expected}; {sorted(kept)[:3]}")

    @torch.no_grad()
    def take_turn(self, of: int) -> None:
        """One of so many turns: its share of the single steps and of the chains."""
        _, _, steps, chain, chains = self.plan.steps
        device = self.plan.device
        self.case.start()
        if self.captured:
            self.captures = [*self.captures[1:], self.captures[0]]
            self.call = self.captures[0]
        self.tokens = self._once(self.tokens)  # not timed: another contender ran before
        for _ in range(-(-steps // of)):
            synchronize(device)
            dist.barrier()
            with stopwatch(device, self.taken):
                self.tokens = self._once(self.tokens)
        for _ in range(-(-chains // of)):
            synchronize(device)
            dist.barrier()
            with stopwatch(device, self.together):
                for _ in range(chain):
                    self.tokens = self._once(self.tokens)

    def join(self, other: Contender) -> None:
        """Take over the figures of the same contender that was made once more."""
        self.taken += other.taken
        self.together += other.together
        self.line.problems += other.line.problems
        self.line.varies += other.line.varies
        self._note_others(other.checked, "made once more", self.line.varies)

    def finish(self) -> None:
        """Fill in the line's figures from what all ranks measured."""
        line, plan, case = self.line, self.plan, self.case
        chain = plan.steps[3]
        if plan.device == "cuda" and line.contender in OURS:
            for name in case.group_names:
                tpfuse.ops.raise_if_failed(name)
        digest = hashlib.sha256(self.checked.numpy().tobytes() + self.tokens.cpu().numpy().tobytes()).hexdigest()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (self.taken, self.together, digest, case.same_rows))
        fastest = sorted(min(at) for at in zip(*(t for t, _, _, _ in everyone), strict=True))
        line.step = statistics.median(fastest)
        line.low, line.high = fastest[len(fastest) // 10], fastest[-1 - len(fastest) // 10]
        line.back_to_back = (
            statistics.median(min(at) for at in zip(*(t for _, t, _, _ in everyone), strict=True)) / chain
        )
        line.ranks_equal = all(everyone[r][2] == everyone[same[0]][2] for _, _, _, same in everyone for r in same)
        if not line.ranks_equal:
            line.problems.append("ranks chose different tokens")


def describe(line: Line) -> str:
    """One line of text about a contender."""
    where = f"{line.phase} {line.rows} rows, {line.contender}"
    if line.step is None:
        return f"{where}: no figure ({line.note})"
    fused = "" if line.fused is None else f", {line.fused} of {line.all_reduces} all-reduces fused"
    varies = f", {'; '.join(line.varies)}" if line.varies else ""
    problems = f" PROBLEM: {'; '.join(line.problems)}" if line.problems else ""
    return (
        f"{where}: step {line.step:.0f} us ({line.low:.0f} to {line.high:.0f}), back to back {line.back_to_back:.0f} us"
        f"{fused}, tokens equal on all ranks: {line.ranks_equal}{varies}{problems}"
    )


def ratios(lines: list[Line]) -> dict[str, tuple[float, float]]:
    """tpfuse over each baseline, of lines of one shape: (single steps, back to back)."""
    ours = next((x for x in lines if x.contender == "tpfuse" and x.step and x.back_to_back), None)
    if ours is None:
        return {}
    return {
        x.contender: (ours.step / x.step, ours.back_to_back / x.back_to_back)  # type: ignore[operator]
        for x in lines
        if x.contender != "tpfuse" and x.step and x.back_to_back
    }


def summary(lines: list[Line]) -> str:
    """The ratios of one shape, the one against the fastest baseline first."""
    found = ratios(lines)
    if not found:
        return "no ratio: tpfuse or every baseline is missing"
    equal = {x.contender: x.equal_to_tpfuse for x in lines}
    fastest = max(found, key=lambda name: found[name][1])
    parts = [
        f"{name} {step:.3f} / {chained:.3f} (tokens equal {equal[name] or 0.0:.0%})"
        for name, (step, chained) in found.items()
    ]
    return (
        f"tpfuse / fastest baseline ({fastest}): {found[fastest][0]:.3f} single steps, {found[fastest][1]:.3f} back to back; "
        f"against each: {', '.join(parts)}"
    )


def table(lines: list[Line]) -> str:
    """All lines, then the ratios of every shape."""
    out = [
        f"{'W':>2} {'phase':>8} {'rows':>5} {'contender':>14} {'step us':>10} {'back to back':>13} {'fused':>9}  equal"
    ]
    for x in lines:
        fused = "" if x.fused is None else f"{x.fused}/{x.all_reduces}"
        times = f"{x.step:10.0f} {x.back_to_back:13.0f}" if x.step is not None else f"{'-':>10} {'-':>13}"
        equal = "" if x.ranks_equal is None else f"ranks {x.ranks_equal}, tpfuse {x.equal_to_tpfuse or 0.0:.0%}"
        out.append(
            f"{x.world:2d} {x.phase:>8} {x.rows:5d} {x.contender:>14} {times} {fused:>9}  {equal} {x.note[:200]}"
        )
    for key in dict.fromkeys((x.world, x.phase, x.rows) for x in lines):
        mine = [x for x in lines if (x.world, x.phase, x.rows) == key]
        out.append(f"W={key[0]} {key[1]} {key[2]} rows: {summary(mine)}")
    return "\n".join(out)
