"""Milliseconds a token of vLLM's offline engine: without fusion, with vLLM's own fusion, with tpfuse.

    python benchmarks/vllm.py                                     the shape of Llama-3.1-8B over two GPUs
    python benchmarks/vllm.py --layers 8 --out vllm.json          fewer layers, results as JSON
    python benchmarks/vllm.py --where                             also where the time of prefill and decode steps goes
    python benchmarks/vllm.py --dry-run                           a tiny model on a CPU: shows that it runs, measures nothing

Needs: vLLM with tpfuse in its environment, and as many GPUs as ranks. Weights are random and nothing is downloaded. vLLM's own
fusion needs FlashInfer's communication kernels, which are built at first use (``nvcc``); where NVLink multicast is off, set
``VLLM_FLASHINFER_ALLREDUCE_BACKEND=trtllm`` and ``VLLM_ALLREDUCE_USE_SYMM_MEM=0``. A contender that does not start is said
and left out.

Each contender is a process of its own, so that no state is shared; they take turns for ``--rounds`` rounds, and the median of
the rounds is shown. Decode is the time of ``--tokens`` tokens less that of one token, over the tokens between, so prefill and
the host's start are not in it. Prefill is the time to one token for ``--prompt`` tokens.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# A script's folder comes first on the path, and there this file is called vllm.
sys.path[:] = [p for p in sys.path if Path(p or ".").resolve() != Path(__file__).resolve().parent]

CONTENDERS = {
    "none": ({}, {"pass_config": {"fuse_allreduce_rms": False}}),
    "vllm": ({}, {"pass_config": {"fuse_allreduce_rms": True}}),
    "tpfuse": ({"TPFUSE_VLLM": "1"}, {}),
    # To tell what a difference comes from; not run unless named.
    "tpfuse-library": ({"TPFUSE_VLLM": "1", "TPFUSE_ALGORITHM": "library"}, {}),
    "tpfuse-plain-launch": ({"TPFUSE_VLLM": "1", "TPFUSE_PDL": "off"}, {}),
}
USUAL = ("none", "vllm", "tpfuse")
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "vocab_size": 256}  # fmt: skip
LLAMA_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
            "head_dim": 128, "vocab_size": 128256}  # fmt: skip


def model(folder: Path, shape: dict[str, int], layers: int) -> str:
    """A folder with the config of a Llama of this shape."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "max_position_embeddings": 8192,
        "dtype": "bfloat16",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
        **shape,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """One contender, in this process."""
    began = time.perf_counter()
    import torch
    import vllm
    from vllm import LLM, SamplingParams

    llm = LLM(
        task["model"],
        skip_tokenizer_init=True,
        load_format="dummy",
        tensor_parallel_size=task["ranks"],
        max_model_len=task["prompt"] + task["tokens"] + 16,
        max_num_seqs=max(task["batches"]),
        dtype="bfloat16",
        seed=0,
        enable_prefix_caching=False,
        compilation_config=task["compilation"],
        **task["engine"],
    )

    def seconds(batch: int, prompt: int, tokens: int) -> float:
        prompts = [{"prompt_token_ids": [(7 * i + b) % 200 + 3 for i in range(prompt)]} for b in range(batch)]
        sampling = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True, detokenize=False)
        began = time.perf_counter()
        llm.generate(prompts, sampling, use_tqdm=False)
        return time.perf_counter() - began

    found: dict[str, Any] = {"vllm": vllm.__version__, "torch": torch.__version__, "decode": {}}
    print(f"the engine is ready after {time.perf_counter() - began:.0f} s", flush=True)
    for batch in task["batches"]:
        for tokens in (1, task["tokens"]):
            seconds(batch, 16, tokens)  # warm up, each number of rows
        times = []
        for _ in range(task["repeats"]):
            one, many = seconds(batch, 16, 1), seconds(batch, 16, task["tokens"])
            times.append((many - one) / (task["tokens"] - 1) * 1e3)
        found["decode"][str(batch)] = statistics.median(times)
        print(f"batch {batch}: {found['decode'][str(batch)]:.3f} ms a token", flush=True)
    # The first prefills of a length are shown apart: what they have to load comes once.
    found["prefill_first"] = [seconds(1, task["prompt"], 1) * 1e3 for _ in range(3)]
    found["prefill_all"] = [seconds(1, task["prompt"], 1) * 1e3 for _ in range(task["repeats"])]
    found["prefill"] = statistics.median(found["prefill_all"])
    print(f"prefill: {found['prefill']:.3f} ms, the first ones {found['prefill_first']}", flush=True)
    if task["where"]:
        try:
            found["where"] = where(llm, seconds, task)
        except Exception as error:  # what was measured before must not be lost
            found["where"] = [f"not told: {type(error).__name__}: {error}"]
            print(found["where"][0], flush=True)
    if os.environ.get("TPFUSE_VLLM"):
        from tpfuse.engines.vllm import report

        found["report"] = str(report())
    return found


def where(llm: Any, seconds: Callable[[int, int, int], float], task: dict[str, Any]) -> list[str]:
    """Lines that say where the time of a prefill and of decode steps goes, as the workers see it."""
    from tpfuse.measure import engine_steps

    def prefill() -> float:
        return seconds(1, task["prompt"], 1) * 1e3

    llm.collective_rpc(engine_steps.watch)
    times = [prefill() for _ in range(task["repeats"])]
    lines = [f"prefill with its steps timed: {statistics.median(times):.2f} ms through generate"]
    lines += engine_steps.told(llm.collective_rpc(engine_steps.take))
    for batch in task["batches"]:
        seconds(batch, 16, task["tokens"])
        lines.append(f"decode steps of batch {batch}:")
        lines += engine_steps.told(llm.collective_rpc(engine_steps.take))
    llm.collective_rpc(engine_steps.meet)
    times = [prefill() for _ in range(task["repeats"])]
    lines.append(f"prefill, ranks met before each step: {statistics.median(times):.2f} ms through generate")
    lines += engine_steps.told(llm.collective_rpc(engine_steps.take))
    llm.collective_rpc(engine_steps.start_profile)
    prefill()
    lines += llm.collective_rpc(engine_steps.stop_profile)[0]
    print("\n".join(lines), flush=True)
    return lines


def run(name: str, task: dict[str, Any], folder: Path) -> dict[str, Any] | None:
    """One contender in a process of its own; None, with the end of its log, when it does not start."""
    variables, compilation = CONTENDERS[name]
    task = {**task, "compilation": {**task["compilation"], **compilation}}
    env = {k: v for k, v in os.environ.items() if k != "TPFUSE_VLLM"} | variables
    if task["where"]:
        env["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # or vLLM sends no function to its workers
    log = folder / f"{name}.log"
    with log.open("w") as out:
        command = [sys.executable, __file__, "--child", json.dumps(task)]
        # A session of its own, so that the workers can be ended with it: they hold the GPUs of the next contender.
        child = subprocess.Popen(command, env=env, stdout=out, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            child.wait(task["timeout"])
        except subprocess.TimeoutExpired:
            print(f"{name}: no end after {task['timeout']} s", file=sys.stderr)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    results = [line for line in log.read_text().splitlines() if line.startswith("RESULT ")]
    if not results:
        print(f"{name} gave no result; the log ends with\n{log.read_text()[-1500:]}", file=sys.stderr)
        return None
    return json.loads(results[-1].removeprefix("RESULT "))


def table(rounds: dict[str, list[dict[str, Any]]], batches: list[int], prompt: int) -> str:
    """Markdown: a row for each contender, the median over rounds."""
    head = ["contender", *(f"batch {b}, ms a token" for b in batches), f"prefill of {prompt}, ms"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, results in rounds.items():
        if results:
            cells = [statistics.median(r["decode"][str(b)] for r in results) for b in batches]
            cells.append(statistics.median(r["prefill"] for r in results))
            lines.append(f"| {name} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--tokens", type=int, default=129)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--contenders", default=",".join(USUAL), help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument("--timeout", type=float, default=900, help="seconds for one start of a contender")
    parser.add_argument("--where", action="store_true", help="also say where the time of a prefill goes")
    parser.add_argument("--logs", type=Path, help="keep the contenders' logs in this folder")
    parser.add_argument("--engine", type=json.loads, default={}, help="more arguments of vllm.LLM, as JSON")
    parser.add_argument("--compilation", type=json.loads, default={}, help="compilation_config of all, as JSON")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(f"RESULT {json.dumps(measure(json.loads(given.child)))}", flush=True)
        return 0
    if given.dry_run:
        given.layers, given.batches, given.tokens, given.prompt, given.repeats, given.rounds = 2, "1,2", 3, 16, 1, 1
        if given.contenders == ",".join(USUAL):
            given.contenders = "none,tpfuse"  # vLLM's own fusion needs a GPU
        print("dry run on a tiny model: the figures say nothing")
    batches = [int(b) for b in given.batches.split(",")]
    names = given.contenders.split(",")
    if unknown := [name for name in names if name not in CONTENDERS]:
        parser.error(f"no contender {', '.join(unknown)}; there are {', '.join(CONTENDERS)}")
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.logs or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        task = {
            "model": model(folder, TINY if given.dry_run else LLAMA_8B, given.layers),
            "ranks": given.ranks,
            "batches": batches,
            "tokens": given.tokens,
            "prompt": given.prompt,
            "repeats": given.repeats,
            "timeout": given.timeout,
            "where": given.where,
            "engine": given.engine,
            "compilation": given.compilation,
        }
        for _ in range(given.rounds):
            for name in names:
                found = run(name, task, folder)
                if found is not None:
                    rounds[name].append(found)
    shown = next((results[0] for results in rounds.values() if results), None)
    if shown is None:
        return 1
    print(
        f"vLLM {shown['vllm']}, torch {shown['torch']}, TP {given.ranks}, {given.layers} layers, {time.strftime('%Y-%m-%d')}"
    )
    print(table(rounds, batches, given.prompt))
    for results in rounds.values():
        if results and "report" in results[0]:
            print(results[0]["report"])
    if given.out is not None:
        given.out.write_text(json.dumps(rounds, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
