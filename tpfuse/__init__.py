"""tpfuse: fuse ``all_reduce -> residual add -> RMSNorm`` in tensor-parallel models.

torch.compile(model, backend="tpfuse")     # no import needed: found through an entry point
tpfuse.reports()                            # what was fused, and why the rest was not
"""

from pathlib import Path as _Path

# In a source checkout the packages tpfuse.passes and tpfuse.ops are the root folders passes/ and ops/ beside this one;
# an installed tpfuse has them inside. This makes `import tpfuse.ops` work from the repository root without installing.
_root = _Path(__file__).resolve().parent.parent
if not (_root / "tpfuse" / "passes").is_dir() and (_root / "passes" / "__init__.py").is_file():
    __path__.append(str(_root))

__version__ = "0.1.0"

from tpfuse import ops  # noqa: E402  (registers torch.ops.tpfuse)
from tpfuse.no_graph import reports  # noqa: E402
from tpfuse.options import OptionError  # noqa: E402
from tpfuse.passes import (  # noqa: E402
    GraphReport,
    LayerAudit,
    Reason,
    Site,
    VerificationError,
    fuse,
    register_collective,
    register_quantizer,
)
from tpfuse.store import FusionMismatch, clear_reports, expect  # noqa: E402
from tpfuse.unfused import FusionWarning  # noqa: E402

ops.settings.warn_about_mistakes()

__all__ = [
    "FusionMismatch",
    "FusionWarning",
    "GraphReport",
    "LayerAudit",
    "OptionError",
    "Reason",
    "Site",
    "VerificationError",
    "clear_reports",
    "expect",
    "fuse",
    "ops",
    "register_collective",
    "register_quantizer",
    "reports",
]
