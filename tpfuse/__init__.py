"""tpfuse: fuse ``all_reduce -> residual add -> RMSNorm`` in tensor-parallel models. See https://pypi.org/project/tpfuse/."""
from pathlib import Path as _Path

# In a source checkout the packages tpfuse.passes and tpfuse.ops are the root folders passes/ and ops/ beside this one;
# an installed tpfuse has them inside. This makes `import tpfuse.ops` work from the repository root without installing.
_root = _Path(__file__).resolve().parent.parent
if not (_root / "tpfuse" / "passes").is_dir() and (_root / "passes" / "__init__.py").is_file():
    __path__.append(str(_root))
__version__ = "0.1.0"
