"""What a model must say about its layers so that they can be sharded: names of submodules, and how their widths split."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .config import ConfigError


@dataclass(frozen=True)
class Projection:
    """A linear layer of attention or MLP.

    Attributes:
        name: attribute of the attention or MLP module. A projection that is absent or None is skipped.
        units: what its split width consists of: ``heads`` or ``kv_heads`` (whole heads stay on one rank) or ``columns``.
        parts: of a column projection that packs several behind each other, the units of each: ``("columns", "columns")`` for gate
            and up. Then ``units`` does not count.
    """

    name: str
    units: str = "columns"
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """Names inside a sequential decoder: ``norm -> attention -> residual add -> norm -> MLP -> residual add``.

    A decoder may norm the output of attention and MLP as well, before it is added (Gemma 2 and 3), or only that (OLMo 2 and 3).
    Column projections are split by output, row projections by input and leave partial sums. The defaults fit Llama.

    Attributes:
        layers: path from the model to its list of decoder layers; the module before the last dot runs them.
        attention: attribute of a layer; ``mlp`` likewise.
        attention_norm: attribute of a layer: the norm that attention reads; empty where attention reads the residual itself.
            ``mlp_norm`` likewise.
        attention_post_norm: attribute of a layer: the norm of attention's output; empty where there is none. ``mlp_post_norm``
            likewise.
        attention_columns: column projections of attention.
        attention_rows: row projections of attention.
        qk_norms: pairs of a column projection of attention and the norm of its whole output, all heads together: both attributes
            of attention. Norms of single heads (Qwen3) need no mention: a rank has whole heads.
        mlp_columns: column projections of a dense MLP and of shared experts.
        mlp_rows: row projections of a dense MLP and of shared experts.
        experts: attribute of an MoE block that holds the routed experts, called with (rows, expert ids, weights). A layer
            whose MLP has it is an MoE layer.
        experts_columns: parameters of shape (experts, 2 * width, hidden): two halves packed along the second dimension.
        experts_rows: parameters of shape (experts, hidden, width).
        shared_experts: attribute of an MoE block that is an MLP for all rows, or an empty string.
        residual_scale: attribute of a layer: the number by which it multiplies the output of attention and MLP, or what their
            norms make of it, before the add; empty where there is none.
        embedding: path from the model to its token embedding; ``head`` likewise to the linear layer that makes logits. Empty
            where there is none.
    """

    layers: str = "model.layers"
    attention: str = "self_attn"
    attention_norm: str = "input_layernorm"
    attention_columns: tuple[Projection, ...] = (
        Projection("q_proj", "heads"),
        Projection("k_proj", "kv_heads"),
        Projection("v_proj", "kv_heads"),
    )
    attention_rows: tuple[Projection, ...] = (Projection("o_proj", "heads"),)
    mlp: str = "mlp"
    mlp_norm: str = "post_attention_layernorm"
    mlp_columns: tuple[Projection, ...] = (Projection("gate_proj"), Projection("up_proj"))
    mlp_rows: tuple[Projection, ...] = (Projection("down_proj"),)
    experts: str = "experts"
    experts_columns: tuple[str, ...] = ("gate_up_proj",)
    experts_rows: tuple[str, ...] = ("down_proj",)
    shared_experts: str = "shared_experts"
    attention_post_norm: str = ""
    mlp_post_norm: str = ""
    qk_norms: tuple[tuple[str, str], ...] = ()
    residual_scale: str = ""
    embedding: str = "model.embed_tokens"
    head: str = "lm_head"


LLAMA = Architecture()
DEEPSEEK_V3 = Architecture(
    # The latent projections (q_a_proj, kv_a_proj_with_mqa) serve all heads and stay whole on every rank.
    attention_columns=(
        Projection("q_proj", "heads"),
        Projection("q_b_proj", "heads"),
        Projection("kv_b_proj", "heads"),
    ),
)
GEMMA = Architecture(
    attention_post_norm="post_attention_layernorm",
    mlp_norm="pre_feedforward_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)
FULL_WIDTH = (("q_proj", "q_norm"), ("k_proj", "k_norm"))
LLAMA_QK = Architecture(qk_norms=FULL_WIDTH)
OLMO2 = Architecture(
    attention_norm="",
    attention_post_norm="post_attention_layernorm",
    mlp_norm="",
    mlp_post_norm="post_feedforward_layernorm",
    qk_norms=FULL_WIDTH,
)

GATE_UP = (Projection("gate_up_proj", parts=("columns", "columns")),)
EXAONE4 = replace(OLMO2, qk_norms=())  # its norms of q and k are of single heads
GRANITE = Architecture(residual_scale="residual_multiplier")
GLM = Architecture(mlp_columns=GATE_UP)
GLM4 = replace(GLM, attention_post_norm="post_self_attn_layernorm", mlp_post_norm="post_mlp_layernorm")
PHI3 = replace(GLM, attention_columns=(Projection("qkv_proj", parts=("heads", "kv_heads", "kv_heads")),))
APERTUS = Architecture(attention_norm="attention_layernorm", mlp_norm="feedforward_layernorm")
QWEN2_MOE = Architecture(shared_experts="shared_expert")
STARCODER2 = Architecture(mlp_columns=(Projection("c_fc"),), mlp_rows=(Projection("c_proj"),))
VAULTGEMMA = Architecture(mlp_norm="pre_feedforward_layernorm")

# transformers' config.model_type -> names.
ARCHITECTURES: dict[str, Architecture] = {
    "apertus": APERTUS,
    "arcee": LLAMA,
    "cwm": LLAMA,
    "deepseek_v2": DEEPSEEK_V3,
    "deepseek_v3": DEEPSEEK_V3,
    "dots1": LLAMA,
    "ernie4_5": LLAMA,
    "ernie4_5_moe": LLAMA,
    "exaone4": EXAONE4,
    "flex_olmo": OLMO2,
    "gemma": LLAMA,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "glm": GLM,
    "glm4": GLM4,
    "glm4_moe": LLAMA,
    "granite": GRANITE,
    "helium": LLAMA,
    "hunyuan_v1_dense": LLAMA,
    "hy_v3": LLAMA,
    "jais2": LLAMA,
    "llama": LLAMA,
    "minimax_m2": LLAMA_QK,
    "ministral": LLAMA,
    "ministral3": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "nemotron": LLAMA,
    "olmo": LLAMA,
    "olmo2": OLMO2,
    "olmo3": OLMO2,
    "olmoe": LLAMA_QK,
    "phi3": PHI3,
    "qwen2": LLAMA,
    "qwen2_moe": QWEN2_MOE,
    "qwen3": LLAMA,
    "qwen3_moe": LLAMA,
    "seed_oss": LLAMA,
    "smollm3": LLAMA,
    "starcoder2": STARCODER2,
    "vaultgemma": VAULTGEMMA,
}

PARALLEL_BLOCK = "attention and MLP read one norm and are added to one residual; here one follows the other"
MIXED_LAYERS = "some of its layers have no attention of heads (linear attention or a state space)"
STREAMS = "its residual consists of several streams"
# Why there are no names for other architectures that people ask for.
UNFIT: dict[str, str] = {
    "cohere": PARALLEL_BLOCK,
    "cohere2": PARALLEL_BLOCK,
    "cohere2_moe": PARALLEL_BLOCK,
    "deepseek_v4": STREAMS,
    "gemma3n_text": STREAMS,
    "gemma4_text": "a layer multiplies its output by a scalar and may add an input of its own, behind the last add",
    "gpt_neox": PARALLEL_BLOCK,
    "gpt_oss": "its experts have biases, gate and up are interleaved in one weight, and each head has a sink of its own",
    "granitemoe": "its experts are no parameters of shape (experts, 2 * width, hidden) and (experts, hidden, width)",
    "granitemoehybrid": MIXED_LAYERS,
    "hy_v4": STREAMS,
    "jamba": MIXED_LAYERS,
    "kimi_linear": MIXED_LAYERS,
    "laguna": "its attention is gated by head, and the gate's projection has other names",
    "minicpm3": "it scales the output of attention and MLP by a number that is no attribute of a layer",
    "nemotron_h": MIXED_LAYERS,
    "olmo_hybrid": MIXED_LAYERS,
    "phi": PARALLEL_BLOCK,
    "qwen3_next": MIXED_LAYERS,
}


def architecture_of(model: Any) -> Architecture:
    """The names for a transformers model, by ``model.config.model_type``.

    Raises:
        ConfigError: the type is not in the table; the message says what does not fit, or what to pass instead.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type in UNFIT:
        raise ConfigError(
            f"{type(model).__name__} (model_type={model_type!r}) cannot be parallelized: {UNFIT[model_type]}. transformers' own "
            "tensor parallelism may shard it (distributed_config=), and tpfuse compiles it then"
        )
    if model_type not in ARCHITECTURES:
        raise ConfigError(
            f"no architecture is known for {type(model).__name__} (model_type={model_type!r}); known are "
            f"{', '.join(sorted(ARCHITECTURES))}. For another sequential decoder pass "
            "architecture=tpfuse.parallel.Architecture(...) with the names of its layers, attention and MLP projections "
            "and norms"
        )
    return ARCHITECTURES[model_type]
