"""Parallel layouts: sizes -> groups -> layouts -> what each layer boundary must do; and models that do it."""

from .agreement import check_agreement
from .architecture import ARCHITECTURES, Architecture, Projection, architecture_of
from .config import GROUP_NAMES, ConfigError, ParallelConfig
from .cut import Cut
from .decision import AgreementError
from .groups import Groups, build_groups
from .layout import Boundary, Op, Plan, Reduction, Rows, Step, plan
from .model import Parallelized, exchange_rows, gather_logits, layout_of, parallelize
from .pairing import PairingError
from .shard import Shard
from .vocabulary import Vocabulary

__all__ = [
    "ARCHITECTURES",
    "GROUP_NAMES",
    "AgreementError",
    "Architecture",
    "Boundary",
    "ConfigError",
    "Cut",
    "Groups",
    "Op",
    "PairingError",
    "ParallelConfig",
    "Parallelized",
    "Plan",
    "Projection",
    "Reduction",
    "Rows",
    "Shard",
    "Step",
    "Vocabulary",
    "architecture_of",
    "build_groups",
    "check_agreement",
    "exchange_rows",
    "gather_logits",
    "layout_of",
    "parallelize",
    "plan",
]
