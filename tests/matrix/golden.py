"""Print what the pass finds and fuses in each tiny transformers model, as JSON, for the torch and transformers at hand.

    python tests/matrix/golden.py [--share I/N] [MODEL ...]

With a share, it counts every N-th model from number I on, so that N processes count them all.

Counts are (all-reduces found, fused with policy all), traced for rank 0 of 2 on a fake process group; no rank is started.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ.update(WORLD_SIZE="2", RANK="0", LOCAL_RANK="0", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")


def count(name: str) -> list[int] | str:
    """[found, fused] of one model, or why there is no count."""
    import models
    import torch

    import tpfuse

    try:
        with tempfile.TemporaryDirectory() as folder:
            models.save(name, folder, torch.bfloat16)
            model = models.sharded(folder, 2, torch.bfloat16)
            torch._dynamo.reset()
            tpfuse.clear_reports()
            options = {"tpfuse.inner": "aot_eager", "tpfuse.policy": "all", "tpfuse.verify": True}
            compiled = torch.compile(model, backend="tpfuse", options=options)
            with torch.no_grad():
                compiled(torch.full((1, 5), 3), use_cache=False)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:120]}"
    sites = [s for r in tpfuse.reports() for s in r.sites]
    return [len(sites), sum(s.fused for s in sites)]


def main() -> None:
    import models
    import torch
    import transformers
    from torch.testing._internal.distributed.fake_pg import FakeStore

    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--share", default="0/1")
    parser.add_argument("models", nargs="*")
    given = parser.parse_args()
    first, step = map(int, given.share.split("/"))
    transformers.logging.set_verbosity_error()
    torch.distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    counts = {name: count(name) for name in (given.models or list(models.MODELS))[first::step]}
    print(json.dumps({"torch": torch.__version__, "transformers": transformers.__version__, "counts": counts}))


if __name__ == "__main__":
    main()
