"""What a rank holds in host memory at most while it loads: its share of the model and about one tensor."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from ranks import run_ranks

pytest.importorskip("transformers", reason="needs the extra tpfuse[hf]")

MIB = 2**20
# What loading costs beside tensors: the modules of the empty model, names, threads, and what the allocator keeps.
SLACK = 48 * MIB


def write(folder: Path, layers: int, hidden: int, files: int) -> int:
    """A Llama checkpoint of bf16 whose values say where they are from, one file at a time; returns its bytes."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        vocab_size=8 * hidden,
        dtype="bfloat16",
    )
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    names = list(shapes)
    places = {}
    for number in range(files):
        file = f"model-{number + 1:05}-of-{files:05}.safetensors"
        mine = names[number::files]
        save_file({name: values(shapes[name]) for name in mine}, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(mine, file))
    total = sum(shape.numel() * 2 for shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def values(shape: torch.Size) -> torch.Tensor:
    """Row and column of each place, as far as bf16 tells them apart."""
    rows = torch.arange(shape[0], dtype=torch.float32).remainder(97).to(torch.bfloat16)
    if len(shape) == 1:
        return rows
    return rows[:, None] + torch.arange(shape[1], dtype=torch.float32).remainder(31).div(32).to(torch.bfloat16)


def in_memory(field: str) -> int:
    """A line of this process's status, in bytes: VmRSS now, VmHWM at most since the last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def peak_of_loading(_rank, _world_size, folder, layout, rank):
    """(grown by at most, size of the model, of its largest tensor, and what was read, in bytes; seconds; values are right)"""
    import torch.distributed as dist

    from tpfuse import compat, hf
    from tpfuse.load import loading_of

    dist.destroy_process_group()
    compat.start_fake_group(layout.world_size, rank)
    before = in_memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew
    model = hf.from_pretrained(folder, layout, progress=False)
    grown = in_memory("VmHWM") - before
    parameters = dict(model.named_parameters())
    largest = max(value.nbytes for value in parameters.values())
    own = layout.group_of("dense_tp", rank).index(rank)
    down = parameters["model.layers.0.mlp.down_proj.weight"]
    wanted = values(torch.Size((down.shape[0], layout.dense_tp_size * down.shape[1])))
    right = torch.equal(down, wanted[:, own * down.shape[1] : (own + 1) * down.shape[1]])
    return (
        grown,
        sum(v.nbytes for v in parameters.values()),
        largest,
        loading_of(model).read,
        loading_of(model).seconds,
        right,
    )


def check(tmp_path, layers, hidden, files, size):
    from tpfuse.parallel import ParallelConfig

    total = write(tmp_path, layers, hidden, files)
    assert size <= total < 1.25 * size
    layout = ParallelConfig(4, 2, 1, 2)
    grown, share, largest, read, seconds, right = run_ranks(peak_of_loading, 1, str(tmp_path), layout, 2)[0]
    print(
        f"{total / MIB:.0f} MiB: share {share / MIB:.0f}, peak {grown / MIB:.0f}, tensor {largest / MIB:.0f}; {seconds:.1f} s"
    )
    assert right
    assert read == share < 0.51 * total
    assert share <= grown < share + largest + SLACK


@pytest.mark.ranks
def test_a_rank_holds_its_share_and_one_tensor(tmp_path):
    check(tmp_path, layers=8, hidden=1024, files=4, size=256 * MIB)


@pytest.mark.ranks
@pytest.mark.slow
def test_a_rank_holds_its_share_and_one_tensor_of_4_gib(tmp_path):
    check(tmp_path, layers=34, hidden=2048, files=4, size=4096 * MIB)
