"""Build a transformers model without weights: from a folder with a config, or from the name of a model type."""

from __future__ import annotations

import difflib
import json
import os
from pathlib import Path
from typing import Any

import torch


class ModelError(ValueError):
    """No such folder, config or model type. The message is one line."""


def config_of(model: str) -> Any:
    """The transformers config of a folder with a ``config.json``, or the default one of a model type.

    Raises:
        ModelError: naming what was given, what is valid and what to do.
    """
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{model} has no config.json; give a folder that a transformers model was saved to")
        try:
            # Without False transformers asks on the terminal whether to run code that a folder brings, and waits.
            return AutoConfig.from_pretrained(model, local_files_only=True, trust_remote_code=False)
        except (ValueError, KeyError, OSError, json.JSONDecodeError) as error:
            if "trust_remote_code" in str(error):
                raise ModelError(
                    f"{model} brings code of its own for its model type, which is not run here; give the config of a model type "
                    "that transformers itself has"
                ) from error
            raise ModelError(f"{path / 'config.json'} cannot be read: {error}") from error
    if os.sep in model or model.startswith("."):
        on_hub = model.count("/") == 1 and model[0] not in "./~" and not model.endswith("/")
        hub = ". The Hub is not asked: put the model's config.json into a folder, and give that" if on_hub else ""
        raise ModelError(
            f"{model} does not exist; give a folder with a config.json, or a model type such as llama{hub}"
        )
    if model not in CONFIG_MAPPING:
        close = difflib.get_close_matches(model, list(CONFIG_MAPPING.keys()), n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "examples are llama, qwen3_moe, deepseek_v3"
        raise ModelError(f"{model!r} is neither a folder nor a model type of transformers; {hint}")
    return AutoConfig.for_model(model)


def build(config: Any, dtype: torch.dtype) -> torch.nn.Module:
    """A causal language model with weights that take no memory.

    Raises:
        ModelError: transformers has no causal language model for this config.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    except ValueError as error:
        raise ModelError(f"transformers has no causal language model for model_type={config.model_type!r}") from error
