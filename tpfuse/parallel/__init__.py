"""Parallel layouts: sizes -> groups -> layouts -> what each layer boundary must do."""

from .config import GROUP_NAMES, ConfigError, ParallelConfig
from .groups import Groups, build_groups
from .layout import Boundary, Op, Plan, Reduction, Rows, Step, plan

__all__ = [
    "GROUP_NAMES",
    "Boundary",
    "ConfigError",
    "Groups",
    "Op",
    "ParallelConfig",
    "Plan",
    "Reduction",
    "Rows",
    "Step",
    "build_groups",
    "plan",
]
