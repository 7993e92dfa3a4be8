"""Whether transformers' own tensor parallelism shards a model under given sizes, or tpfuse has to."""

from __future__ import annotations

from typing import Any

from tpfuse.load.shares import has_adapter
from tpfuse.parallel import ARCHITECTURES, ParallelConfig


def one_group(config: ParallelConfig) -> bool:
    """Whether attention, dense MLP and experts all reduce over the same ranks, which is what transformers' own TP does."""
    names = ("attn_tp", "dense_tp", "moe_tp")
    return config.pp_size == 1 and all(config.groups(name) == config.groups("tp") for name in names)


def transformers_shards(
    transformers: Any, path: Any, config: ParallelConfig, qk_norm: str | None, kwargs: dict[str, Any]
) -> bool:
    """Whether transformers' own tensor parallelism loads the model."""
    if not one_group(config) or qk_norm is not None or has_adapter(path, kwargs):
        return False
    return _plan_shards_attention(transformers, path, kwargs)


def _plan_shards_attention(transformers: Any, path: Any, kwargs: dict[str, Any]) -> bool:
    """Whether transformers' plan for this model cuts attention. Where it does not, nothing would be shared.

    Where it cuts the projections but gathers q, k and v, for a norm over all heads, each rank attends with all heads and caches
    them. Of the architectures that tpfuse knows it cuts the heads.
    """
    model_config = kwargs.get("config")
    if model_config is None:
        known = ("cache_dir", "revision", "token", "trust_remote_code", "local_files_only", "subfolder", "gguf_file")
        model_config = transformers.AutoConfig.from_pretrained(path, **{k: kwargs[k] for k in known if k in kwargs})
    text_config = model_config.get_text_config()
    plan = getattr(text_config, "base_model_tp_plan", None) or {}
    styles = [style for name, style in plan.items() if "attn" in name]
    if text_config.model_type in ARCHITECTURES and any(style.endswith("gather_output") for style in styles):
        return False
    return any(style.startswith("rowwise") for style in styles)
