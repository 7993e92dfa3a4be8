"""Switches the plugin on for an engine whose ``--compilation-config`` names this module.

    --compilation-config '{"inductor_passes": {"post_grad_custom_post_pass": "tpfuse.engines.vllm_config.vllm_pass"}}'

vLLM imports all but the last part of that name and looks the last part up in what ``__import__`` returns, which is the
outermost package. Hence the attribute of ``tpfuse`` below.
"""

from __future__ import annotations

import tpfuse

from . import vllm

vllm.switch_on()
vllm_pass = vllm.make_pass()
tpfuse.vllm_pass = vllm_pass  # type: ignore[attr-defined]
