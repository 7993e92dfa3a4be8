"""Generate with a Hugging Face model that is sharded over several ranks and compiled with ``backend="tpfuse"``.

    python examples/hf_generate.py                                          # two CPU ranks, a tiny Llama with random weights
    torchrun --nproc-per-node 4 examples/hf_generate.py Qwen/Qwen3-8B "The capital of France is"

Under torchrun each rank takes one GPU where there is one. ``generate`` compiles its decode step; with a static cache that
goes through tpfuse. It prints the tokens and what was fused. Needs ``pip install tpfuse[hf]``.
"""

from __future__ import annotations

import os
import sys
import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import tpfuse
import tpfuse.hf
from tpfuse.parallel import ParallelConfig


def generate(path: str, prompt: str | None) -> None:
    """Load, compile and generate on this rank; the process group exists."""
    model = tpfuse.hf.from_pretrained(path, ParallelConfig(tp_size=dist.get_world_size()), dtype=torch.bfloat16)
    # A model without a GPU is small: compiling with Inductor would take longer than the example.
    options = None if model.device.type == "cuda" else {"tpfuse.inner": "aot_eager"}
    compiled = tpfuse.hf.compile(model, options=options)

    if prompt is None:
        tokenizer = None
        inputs = {"input_ids": torch.arange(1, 9)[None], "attention_mask": torch.ones(1, 8, dtype=torch.long)}
    else:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path)
        inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    tokens = compiled.generate(**inputs, max_new_tokens=16, do_sample=False, cache_implementation="static")

    if dist.get_rank() == 0:
        print(tokenizer.decode(tokens[0], skip_special_tokens=True) if tokenizer else f"tokens: {tokens[0].tolist()}")
        for report in tpfuse.reports():
            print(report.summary())


def save_tiny_llama(folder: str) -> None:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        pad_token_id=0,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)


def cpu_rank(rank: int, world_size: int, folder: str) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    generate(folder, prompt=None)
    dist.destroy_process_group()


def main() -> None:
    if len(sys.argv) == 3:
        if "RANK" not in os.environ:
            raise SystemExit(
                "start a model of your own with torchrun, e.g. torchrun --nproc-per-node 2 " + " ".join(sys.argv)
            )
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
        generate(sys.argv[1], sys.argv[2])
        dist.destroy_process_group()
        return
    if len(sys.argv) != 1:
        raise SystemExit("usage: hf_generate.py [MODEL PROMPT]")
    print("Two ranks with a tiny Llama; compiling takes some seconds each", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        save_tiny_llama(folder)
        mp.spawn(cpu_rank, args=(2, folder), nprocs=2)


if __name__ == "__main__":
    main()
