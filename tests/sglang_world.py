"""SGLang's real Python files on gloo ranks: what needs CUDA or a server is a stand-in, what this project hooks is SGLang's own.

The files are those of its wheels, unpacked by ``make test-sglang`` into ``.cache/sglang/<version>``; what they import and this
environment lacks is replaced by empty modules. Attention is a sum of q, k and v: the layers around it are SGLang's own.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import json
import os
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent / ".cache" / "sglang"
VERSIONS = ("0.5.17", "0.5.23")
# Packages that SGLang tries and does without: they stay missing.
OPTIONAL = {
    "aiter", "cuda", "deep_ep", "fastsafetensors", "flash_attn", "flashinfer", "petit_kernel", "pplx_kernels", "pynvml",
    "torch_memory_saver", "torchcodec", "triton_kernels", "vllm", "xielu",
}  # fmt: skip
# float32 apart from the norms: sums over ranks come in the same order with and without the hook, so that bits can be compared.
LAYERS, HIDDEN, VOCABULARY = 3, 64, 128


def missing(version: str) -> str:
    """Why the tests of a version cannot run, or nothing."""
    if not (ROOT / version / "sglang" / "srt").is_dir() or not (ROOT / "deps" / "msgspec").is_dir():
        return f"SGLang {version} is not in .cache/sglang; `make test-sglang` fetches it"
    return ""


class _Meta(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return cls

    def __getitem__(cls, key: Any) -> Any:
        return cls

    def __or__(cls, other: Any) -> Any:
        return cls

    __ror__ = __or__

    def __iter__(cls) -> Any:
        return iter(())

    def __get_pydantic_core_schema__(cls, *args: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.any_schema()


class _Anything(metaclass=_Meta):
    """A class, a function and a decorator, whatever is imported from a module that is not there."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else _Anything()


class _Module(types.ModuleType):
    __path__: list[str] = []  # noqa: RUF012  (a package's path, as the import system reads it)
    __version__ = "0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (_Anything,), {})


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The last finder: a stand-in for a package that one of SGLang's own files imports and that nobody has."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.made: set[str] = set()

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        top = name.partition(".")[0]
        asked = name == top and top not in OPTIONAL | {"sglang", "torch"} and self._importer().startswith(self.root)
        if top not in self.made and (not asked or top in sys.stdlib_module_names):
            return None
        self.made.add(top)
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    @staticmethod
    def _importer() -> str:
        frame = sys._getframe(2)
        while frame is not None:
            file = frame.f_code.co_filename
            if "importlib" not in file and file != __file__:
                return file
            frame = frame.f_back  # type: ignore[assignment]
        return ""

    def create_module(self, spec: Any) -> Any:
        return _Module(spec.name)

    def exec_module(self, module: Any) -> None:
        pass


def mount(version: str) -> None:
    """Make SGLang of this version importable in this process. Once for a process."""
    root = str(ROOT / version)
    if root in sys.path:
        return
    from transformers.models.auto import configuration_auto

    mapping = type(configuration_auto.CONFIG_MAPPING)
    register = mapping.register
    # Its own configurations may have come into transformers meanwhile.
    mapping.register = lambda self, key, value, exist_ok=False: register(self, key, value, exist_ok=True)
    sys.path[:0] = [root, str(ROOT / "deps")]
    sys.meta_path.append(_Finder(root))
    assert importlib.metadata.version("sglang") == version
    from sglang.srt.layers.radix_attention import RadixAttention

    def attend(self: Any, q: Any, k: Any, v: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        heads = q.shape[-1] // k.shape[-1]
        return q + k.repeat(1, heads) + v.repeat(1, heads)

    RadixAttention.forward = attend
    from sglang.srt.distributed.parallel_state import GroupCoordinator

    # SGLang calls this through an operator that it registers for GPUs alone.
    GroupCoordinator.all_gather_into_tensor = lambda self, output, given: self._all_gather_into_tensor(output, given)


CONFIGS: dict[str, dict[str, Any]] = {
    "Qwen3ForCausalLM": {"model_type": "qwen3"},
    "Glm4MoeForCausalLM": {
        "model_type": "glm4_moe", "first_k_dense_replace": LAYERS, "n_routed_experts": 4, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "partial_rotary_factor": 0.5,
        "use_qk_norm": False, "routed_scaling_factor": 1.0, "norm_topk_prob": True,
    },
}  # fmt: skip


def write_config(folder: str, architecture: str) -> None:
    config = {
        "architectures": [architecture], "hidden_size": HIDDEN, "intermediate_size": 128, "num_attention_heads": 4,
        "num_key_value_heads": 4, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6, "torch_dtype": "bfloat16", "hidden_act": "silu", "rope_theta": 10000.0, "head_dim": 16,
        "attention_bias": False, "tie_word_embeddings": False, **CONFIGS[architecture],
    }  # fmt: skip
    (Path(folder) / "config.json").write_text(json.dumps(config))


def arguments(folder: str, tp: int, dp: int = 1, dense: int | None = None, **more: Any) -> Any:
    """SGLang's own server arguments, resolved."""
    from sglang.srt.server_args import ServerArgs

    given = ServerArgs(
        model_path=folder,
        device="cpu",
        skip_tokenizer_init=True,
        tp_size=tp,
        dp_size=dp,
        enable_dp_attention=dp > 1,
        moe_dense_tp_size=dense,
        **more,
    )
    if hasattr(given, "resolve_once"):
        given.resolve_once()
    return given


class World:
    """SGLang's groups and published arguments on the ranks of a pool, until :meth:`close`."""

    def __init__(
        self, version: str, architecture: str, rank: int, tp: int, dp: int = 1, dense: int | None = None
    ) -> None:
        mount(version)
        from sglang.srt import runtime_context
        from sglang.srt.configs.model_config import ModelConfig
        from sglang.srt.distributed import parallel_state
        from sglang.srt.layers import dp_attention

        self.version, self.architecture, self.rank = version, architecture, rank
        self.folder = tempfile.TemporaryDirectory()
        write_config(self.folder.name, architecture)
        self.arguments = arguments(self.folder.name, tp, dp, dense)
        self.arguments.check_server_args()
        if version == "0.5.17":
            runtime_context.publish(self.arguments, role="scheduler")
        else:
            ranks = runtime_context.SpawnRanks(world_rank=rank)
            runtime_context.publish(self.arguments, role="scheduler", ranks=ranks)
        os.environ.setdefault("LOCAL_SIZE", str(tp))
        parallel_state.init_distributed_environment(world_size=tp, rank=rank, local_rank=rank, backend="gloo")
        self.model_config = ModelConfig.from_server_args(self.arguments)
        if version == "0.5.17":
            parallel_state.initialize_model_parallel(
                tensor_model_parallel_size=tp, attention_data_parallel_size=dp, backend="gloo"
            )
            dp_attention.initialize_dp_attention(self.arguments, self.model_config)
        else:
            parallel_state.initialize_model_parallel(backend="gloo")
            dp_attention.initialize_dp_attention(self.arguments)

    def model(self) -> torch.nn.Module:
        """SGLang's model, its weights the same shards of the same seeded checkpoint at every size."""
        from sglang.srt.models import glm4_moe, qwen3

        cls = getattr(qwen3 if self.architecture.startswith("Qwen3") else glm4_moe, self.architecture)
        torch.set_default_dtype(torch.bfloat16)
        try:
            model = cls(self.model_config.hf_config)
        finally:
            torch.set_default_dtype(torch.float32)
        model.load_weights(checkpoint(self.architecture))
        return model.eval().requires_grad_(False)

    def run(self, model: Any, tokens: torch.Tensor) -> torch.Tensor:
        """The hidden states after the final norm."""
        from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

        rows = tokens.numel()
        nothing = torch.zeros(0, dtype=torch.int64)
        batch = ForwardBatch(
            forward_mode=ForwardMode.DECODE,
            batch_size=rows,
            input_ids=tokens,
            req_pool_indices=nothing,
            seq_lens=nothing,
            out_cache_loc=nothing,
            seq_lens_sum=rows,
        )
        batch.global_dp_buffer_len = max(rows, 1)
        with torch.no_grad():
            return model.model(tokens, torch.arange(rows), batch)

    def close(self) -> None:
        from sglang.srt.distributed import parallel_state

        parallel_state.destroy_model_parallel()
        self.folder.cleanup()


def checkpoint(architecture: str) -> list[tuple[str, torch.Tensor]]:
    """Names and whole tensors, as a checkpoint of Hugging Face has them."""
    dice = torch.Generator().manual_seed(5)

    def of(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=dice) / shape[-1] ** 0.5).bfloat16()

    def gain() -> torch.Tensor:
        return (torch.rand(HIDDEN, generator=dice) + 0.5).bfloat16()

    found = [("model.embed_tokens.weight", of(VOCABULARY, HIDDEN)), ("lm_head.weight", of(VOCABULARY, HIDDEN))]
    for i in range(LAYERS):
        layer = f"model.layers.{i}"
        found += [(f"{layer}.self_attn.{name}_proj.weight", of(HIDDEN, HIDDEN)) for name in "qkvo"]
        found += [(f"{layer}.mlp.{name}_proj.weight", of(128, HIDDEN)) for name in ("gate", "up")]
        found += [(f"{layer}.mlp.down_proj.weight", of(HIDDEN, 128))]
        found += [(f"{layer}.{name}.weight", gain()) for name in ("input_layernorm", "post_attention_layernorm")]
        if architecture.startswith("Qwen3"):
            found += [(f"{layer}.self_attn.{name}_norm.weight", gain()[:16].clone()) for name in "qk"]
    return [*found, ("model.norm.weight", gain())]


def barrier() -> None:
    dist.barrier()
