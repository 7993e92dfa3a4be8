"""gpt-fast beside transformers in ``hf.py``: what a hand-written decode loop of the same model takes on the same machine.

Needs a checkout of github.com/meta-pytorch/gpt-fast at c9f683e, the last one whose attention is one call of torch's
``scaled_dot_product_attention``; its ``model.py`` and ``tp.py`` are used as they are.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def generate_of(
    folder: str, sizes: dict[str, int], layers: int, vocabulary: int, length: int, backend: str, compile_it: bool
) -> Callable[[Tensor, int], Tensor]:
    """(prompt (1, length), new tokens) -> sequences, greedy, with gpt-fast's own model, tensor parallelism and compile mode.

    Args:
        folder: the checkout.
        sizes: of the model, by transformers' names.
        length: the longest sequence.
        backend: of ``torch.compile``.
        compile_it: False: eager, for a rehearsal.
    Raises:
        ValueError: of the call, for more than one sequence: gpt-fast's hook for attention keeps the first one only.
    """
    # Its quantize.py imports a tokenizer, which needs packages that random weights do not.
    os.environ.update(LOCAL_RANK=str(dist.get_rank()), LOCAL_WORLD_SIZE=str(dist.get_world_size()))
    sys.modules.setdefault("tokenizer", types.SimpleNamespace(get_tokenizer=None))  # type: ignore[arg-type]
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import model as gpt_fast  # type: ignore[import-not-found]
    import tp  # type: ignore[import-not-found]

    arguments = gpt_fast.ModelArgs(
        block_size=length,
        vocab_size=vocabulary,
        n_layer=layers,
        n_head=sizes["num_attention_heads"],
        n_local_heads=sizes["num_key_value_heads"],
        dim=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        rope_base=5e5,
    )
    device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    torch.manual_seed(0)
    with device:
        net = gpt_fast.Transformer(arguments).to(torch.bfloat16).eval().requires_grad_(False)
    for parameter in net.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0.0, 0.02)
    tp.apply_tp(net)
    with device:
        net.setup_caches(1, length)

    def step(token: Tensor, position: Tensor) -> Tensor:
        return net(token, position)[:, -1].argmax(-1, keepdim=True).int()

    compiled: Any = torch.compile(step, backend=backend, mode="reduce-overhead", fullgraph=True) if compile_it else step

    @torch.no_grad()
    def run(prompt: Tensor, new: int) -> Tensor:
        if prompt.shape[0] != 1:
            raise ValueError(f"gpt-fast's hook for attention takes one sequence, and the batch has {prompt.shape[0]}")
        position = torch.arange(prompt.shape[1], device=device)
        tokens = [prompt.int(), step(prompt, position)]
        position = position[-1:] + 1
        # As its generate.py does: Inductor generates the attention of one token itself.
        with sdpa_kernel([SDPBackend.MATH]):
            for _ in range(new - 1):
                tokens.append(compiled(tokens[-1], position).clone())
                position += 1
        return torch.cat(tokens, dim=1)

    return run
