"""tpfuse.hf.from_pretrained: each rank reads its slices, and has bit for bit what it has when a whole model is cut."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from models import unsharded

transformers = pytest.importorskip("transformers", reason="needs the extra tpfuse[hf]")

from tpfuse import compat, hf  # noqa: E402
from tpfuse.load import loading_of  # noqa: E402
from tpfuse.parallel import ParallelConfig, parallelize  # noqa: E402

LAYERS = {"num_hidden_layers": 3, "initializer_range": 0.2}
TIED = {"gemma2": {"tie_word_embeddings": True}, "gemma3_text": {"tie_word_embeddings": True}}
NAMES = ("llama", "qwen3", "qwen3_moe", "mixtral", "deepseek_v3", "glm4_moe", "gemma2", "gemma3_text")
LAYOUTS = (
    ParallelConfig(4, 2, 1, 2),
    ParallelConfig(4, 2, 1, 1),
    ParallelConfig(4, 4),
    ParallelConfig(4, ep_size=2, moe_dense_tp_size=1),
    ParallelConfig(4, 2, 1, 2, ep_size=4),
)


@pytest.fixture
def as_rank():
    """Be one rank of a group without peers."""

    def start(rank, world_size):
        if dist.is_initialized():
            dist.destroy_process_group()
        compat.start_fake_group(world_size, rank)

    yield start
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """name -> folder with a bf16 checkpoint in several files."""
    folders = {}

    def saved(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            model = unsharded(name, torch.bfloat16, **LAYERS, **TIED.get(name, {}))
            model.save_pretrained(folders[name], max_shard_size="60KB")
        return folders[name]

    return saved


def tensors(model):
    """Every parameter and every buffer, those that no checkpoint holds included."""
    named = dict(model.named_parameters(remove_duplicate=False))
    return {**named, **dict(model.named_buffers(remove_duplicate=False))}


def assert_equal(model, expected):
    got, wanted = tensors(model), tensors(expected)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype, name
        assert got[name].device == value.device, name
        assert torch.equal(got[name], value), name
        assert got[name].untyped_storage().nbytes() == value.numel() * value.element_size(), name
    assert {n for n, m in model.named_modules() if not m.training} == {n for n, _ in expected.named_modules()}
    sizes = [(m.in_features, m.out_features) for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert sizes == [(m.in_features, m.out_features) for m in expected.modules() if isinstance(m, torch.nn.Linear)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_every_rank_has_what_cutting_the_whole_model_gives(name, layout, checkpoints, as_rank):
    folder = checkpoints(name)
    assert len(list(folder.glob("*.safetensors"))) > 1
    for rank in range(layout.world_size):
        as_rank(rank, layout.world_size)
        whole = transformers.AutoModelForCausalLM.from_pretrained(folder)
        model = hf.from_pretrained(folder, layout, progress=False)
        assert loading_of(model).whole_because == ""
        assert_equal(model, parallelize(whole, layout))
        tied = name in TIED
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_what_is_read_is_the_share(checkpoints, as_rank):
    layout = ParallelConfig(4, ep_size=4, moe_dense_tp_size=1)
    as_rank(1, 4)
    model = hf.from_pretrained(checkpoints("qwen3_moe"), layout, progress=False)
    loading = loading_of(model)
    share = sum(p.nbytes for p in model.parameters())
    assert loading.read == share
    assert loading.total > 2.5 * share
    assert loading.seconds > 0
