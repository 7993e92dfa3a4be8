"""Tiny random models of the transformers architectures that the tests run, and how to shard them with transformers' own TP."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass(frozen=True)
class TinyModel:
    """A tiny configuration of one architecture.

    Attributes:
        name: transformers' model type.
        extra: configuration values beyond :data:`COMMON`.
    """

    name: str
    extra: dict[str, Any] = field(default_factory=dict)


COMMON: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
DEEPSEEK = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
LATENT = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
}

MODELS: dict[str, TinyModel] = {
    m.name: m
    for m in (
        TinyModel("llama"),
        TinyModel("mistral"),
        TinyModel("qwen2"),
        TinyModel("qwen3", {"head_dim": 16}),
        TinyModel("qwen3_moe", {**MOE, "head_dim": 16, "decoder_sparse_step": 1, "mlp_only_layers": []}),
        TinyModel("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        TinyModel("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32}),
        TinyModel("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32}),
        TinyModel("glm4", {"head_dim": 16}),
        TinyModel("glm4_moe", {**DEEPSEEK, "head_dim": 16, "first_k_dense_replace": 2}),
        TinyModel("olmo2"),
        TinyModel("granite", {"residual_multiplier": 0.22, "attention_multiplier": 0.25}),
        TinyModel("phi3"),
        TinyModel("deepseek_v3", {**DEEPSEEK, **LATENT}),
        TinyModel("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 32}),
        TinyModel("cohere2", {"head_dim": 16, "sliding_window": 32, "tie_word_embeddings": True}),
    )
}

GRANITE_MOE = {"num_local_experts": 4, "num_experts_per_tok": 2, "residual_multiplier": 0.22}
GEMMA_HEADS = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 32}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "full_attention"],
}
SHARED_EXPERT = {"shared_expert_intermediate_size": 32}

# Each shows a pattern that none of the models above has.
PATTERNS: dict[str, TinyModel] = {
    m.name: m
    for m in (
        # transformers' plan shards the experts only
        TinyModel("granitemoe", GRANITE_MOE),
        TinyModel("granitemoeshared", {**GRANITE_MOE, "shared_intermediate_size": 32}),
        TinyModel("afmoe", {**MOE, "head_dim": 16, "num_dense_layers": 1, "sliding_window": 32}),
        TinyModel(
            "jamba", {"num_experts": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}
        ),
        TinyModel(
            "nemotron_h",
            {
                "layers_block_type": ["mamba", "moe", "attention"],
                "head_dim": 16,
                "n_routed_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 32,
                "moe_shared_expert_intermediate_size": 32,
                "mamba_num_heads": 4,
                "mamba_head_dim": 16,
                "n_groups": 2,
                "use_mamba_kernels": False,
            },
        ),
        TinyModel(
            "kimi_linear",
            {
                **DEEPSEEK,
                "kv_lora_rank": 32,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 8,
                "v_head_dim": 16,
                "num_key_value_heads": 4,
                "num_experts": 4,
            },
        ),
        # the experts' sum is flat and viewed before the residual is added
        TinyModel("qwen2_moe", {**MOE, **SHARED_EXPERT}),
        TinyModel("qwen3_next", {**MOE, **SHARED_EXPERT, **LINEAR, "head_dim": 16}),
        TinyModel("qwen3_5_moe_text", {**MOE, **SHARED_EXPERT, **LINEAR, "head_dim": 16}),
        TinyModel("llama4_text", {"num_local_experts": 4, "intermediate_size_mlp": 64, "head_dim": 16}),
        TinyModel(
            "ernie4_5_moe",
            {
                "moe_num_experts": 4,
                "moe_k": 2,
                "moe_intermediate_size": 32,
                "moe_num_shared_experts": 1,
                "moe_layer_start_index": 1,
            },
        ),
        TinyModel("lara_mini"),
        TinyModel("flex_olmo", {"num_experts": 4, "num_experts_per_tok": 2}),
        # the embedding is multiplied by a tensor
        TinyModel("gemma", {"head_dim": 16}),
        TinyModel(
            "gemma3n_text",
            {
                "head_dim": 16,
                "sliding_window": 32,
                "num_kv_shared_layers": 0,
                "hidden_size_per_layer_input": 16,
                "vocab_size_per_layer_input": 128,
                "laurel_rank": 8,
                "altup_num_inputs": 2,
                "activation_sparsity_pattern": [0.0, 0.0, 0.0],
            },
        ),
        TinyModel(
            "gemma4_text",
            {
                "head_dim": 16,
                "global_head_dim": 16,
                "sliding_window": 32,
                "hidden_size_per_layer_input": 0,
                "num_kv_shared_layers": 0,
            },
        ),
        TinyModel("vaultgemma", GEMMA_HEADS),
        TinyModel(
            "minicpm3",
            {
                "q_lora_rank": 32,
                "kv_lora_rank": 32,
                "qk_nope_head_dim": 16,
                "qk_rope_head_dim": 8,
                "v_head_dim": 16,
                "num_key_value_heads": 4,
            },
        ),
        # others
        TinyModel("laguna", {**MOE, "head_dim": 16, "shared_expert_intermediate_size": 32}),
        TinyModel("hy_v3", {**MOE, "head_dim": 16}),
        TinyModel("deepseek_v4"),
        TinyModel("hy_v4", {**MOE, "head_dim": 16}),
        TinyModel("qwen4_exp_text", {**MOE, "head_dim": 16}),
        TinyModel("olmo3"),
        TinyModel("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
        TinyModel("minimax_m2", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16}),
        TinyModel(
            "granitemoehybrid", {**GRANITE_MOE, "shared_intermediate_size": 32, "layer_types": ["attention"] * 3}
        ),
        # LayerNorm, also over the sum of attention and MLP; cohere2 is above
        TinyModel("starcoder2", {"sliding_window": 32}),
        TinyModel("nemotron"),
        TinyModel("phi"),
        TinyModel("gpt_neox"),
        TinyModel("gptj", {"rotary_dim": 8, "n_inner": 128}),
        TinyModel("cohere"),
        TinyModel("olmo"),
        TinyModel("jais2", {"head_dim": 16}),
        TinyModel("cohere2_moe", {**MOE, "head_dim": 16, "sliding_window": 32, "tie_word_embeddings": True}),
    )
}

# Of these transformers cuts the experts only, or the MLP only.
HALF_CUT = (
    "granitemoe",
    "granitemoeshared",
    "granitemoehybrid",
    "afmoe",
    "jamba",
    "nemotron_h",
    "kimi_linear",
    "deepseek_v4",
)


def known(name: str) -> bool:
    """Whether the installed transformers has the architecture."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return name in CONFIG_MAPPING


def config(name: str, **changes: Any) -> Any:
    """The transformers configuration of a tiny model."""
    from transformers import AutoConfig

    tiny = (MODELS | PATTERNS)[name]
    return AutoConfig.for_model(name, **{**COMMON, **tiny.extra, **changes})


def unsharded(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """A tiny model with random weights, norm weights included (ones would hide a wrong weight)."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config(name, **changes), dtype=dtype).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, value in model.named_parameters():
            if value.dim() == 1 and "norm" in key:
                value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    return model


def save(name: str, folder: str, dtype: torch.dtype = torch.float32, **changes: Any) -> None:
    """Write a tiny model's checkpoint, for every rank to load its shards from."""
    unsharded(name, dtype, **changes).save_pretrained(folder)


def sharded(folder: str, world_size: int, dtype: torch.dtype = torch.float32) -> Any:
    """Load a checkpoint under transformers' own tensor parallelism on this rank."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, distributed_config=DistributedConfig(tp_size=world_size, tp_plan="auto")
    ).eval()


def cache_argument() -> str:
    """What models call their cache: it depends on the release of transformers."""
    from transformers import LlamaForCausalLM

    return "cache" if "cache" in LlamaForCausalLM.forward.__annotations__ else "past_key_values"
