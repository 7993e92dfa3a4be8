"""Reason codes: why an all-reduce was not fused, and what its owner can do about it.

One enum for the whole product. A code is stable: reports, docs and other people's scripts rely on it. Each has a remedy
here and an entry in ``docs/troubleshooting.md``; a test fails when either is missing.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Reason(str, Enum):
    """A stable code for a refusal; its value is what reports print."""

    # What the reduction is
    REDUCE_OP = "reduce-op"
    UNKNOWN_GROUP = "unknown-group"
    GROUP_SIZE = "group-size"
    DTYPE = "dtype"
    TRAINING = "training"
    # Who reads the sum
    NO_NORM = "no-norm"
    RETURNED = "returned"
    EXTRA_READER = "extra-reader"
    ROWS_MOVE = "rows-move"
    ROWS_SUMMED = "rows-summed"
    SPLIT_ALL_REDUCE = "split-all-reduce"
    SUM_OF_REDUCTIONS = "sum-of-reductions"
    ADD_CHAIN = "add-chain"
    RESIDUAL_SHAPE = "residual-shape"
    RESIDUAL_DERIVED = "residual-derived"
    MUTATION = "mutation"
    ORDER = "collective-order"
    LAYOUT = "layout"
    SCALE_NOT_CONSTANT = "scale-not-constant"
    DROPOUT = "dropout"
    STREAMS = "residual-streams"
    NORM_STATISTICS = "norm-statistics"
    # What the norm is
    UNKNOWN_NORM = "unknown-norm"
    LAYER_NORM = "layer-norm"
    EPS_OUTSIDE_ROOT = "eps-outside-root"
    MEAN_DIM = "mean-dim"
    PARTIAL_WIDTH = "partial-width"
    WEIGHT_INSIDE_MEAN = "weight-inside-mean"
    WEIGHT_SHAPE = "weight-shape"
    EPS_NOT_CONSTANT = "eps-not-constant"
    UNKNOWN_FLAVOUR = "unknown-flavour"
    DYNAMIC_WIDTH = "dynamic-width"
    # What the user asked for
    GROUP_MISMATCH = "group-mismatch"
    POLICY = "policy"
    FUEL = "fuel"
    # What went wrong here
    RANKS_DISAGREE = "ranks-disagree"
    INTERNAL = "internal"

    def __str__(self) -> str:
        return self.value


REMEDIES: dict[Reason, str] = {
    Reason.REDUCE_OP: "Only a sum can be fused. Use all_reduce(op=SUM); for a mean, multiply by 1 / world size afterwards.",
    Reason.UNKNOWN_GROUP: "The group's name could not be resolved to ranks in this process. Compile after the group is "
    "created and before it is destroyed, on a rank that is a member.",
    Reason.GROUP_SIZE: "The group has one rank, so there is nothing to reduce. Use a larger tensor-parallel size or "
    "remove the collective.",
    Reason.DTYPE: "Sum, residual and norm must share one dtype out of fp32, bf16, fp16, fp64. Cast what is added to the "
    "dtype of the sum, or keep both in it.",
    Reason.TRAINING: "tpfuse rewrites inference graphs only. Compile under torch.no_grad() or torch.inference_mode().",
    Reason.NO_NORM: "No norm reads this sum. If the norm lies in another graph, compile the whole model instead of "
    "single layers, and remove the graph break.",
    Reason.RETURNED: "The sum itself is an output of the graph, so it has to exist. Return the residual sum instead.",
    Reason.EXTRA_READER: "Another operation reads the sum before the residual is added. Let it read the residual sum, or "
    "compute it from the normed value.",
    Reason.ROWS_MOVE: "Rows are selected, gathered, re-ordered or flattened between the all-reduce and the norm. Move the "
    "selection after the norm, and reduce in the shape that the norm reads.",
    Reason.ROWS_SUMMED: "Rows of the sum are added to each other before any norm, such as those of several experts. Add "
    "them up in front of the all-reduce: that is one reduction of fewer bytes, which rounds once instead of for each row.",
    Reason.SPLIT_ALL_REDUCE: "The rows of a reduce-scatter are gathered again before any norm reads them. Call all_reduce "
    "in place of the two (of a DTensor: redistribute from Partial() to Replicate() at once), or norm the own rows before the "
    "gather.",
    Reason.SUM_OF_REDUCTIONS: "Two reductions meet in one norm, and one op cannot make both. Add the partial sums first "
    "and reduce once, where their groups are equal; numerics='relaxed' does that.",
    Reason.ADD_CHAIN: "Several tensors are added between the sum and the norm. Add them to each other first, so that one addend "
    "and one residual are left.",
    Reason.RESIDUAL_SHAPE: "The residual is broadcast. Expand it to the shape of the sum outside the layer.",
    Reason.RESIDUAL_DERIVED: "The residual is computed from the same sum, so it cannot be an input of the fused op.",
    Reason.MUTATION: "The residual or the sum is written in place between the all-reduce and the norm. Use out-of-place "
    "operations there.",
    Reason.ORDER: "Moving the all-reduce to its norm would carry it past another collective of the same group. Issue the "
    "collectives in the order in which their results are used.",
    Reason.LAYOUT: "The value that the norm reads or gives lies in memory in another order than row by row. Call .contiguous() "
    "on the input of the all-reduce.",
    Reason.SCALE_NOT_CONSTANT: "The sum is multiplied by a tensor of another dtype, or of several values. Cast a scalar to the "
    "sum's dtype and take it without dimensions (scale[0]), multiply by a Python number, or use numerics='relaxed' for a scalar. "
    "Fold a weight of one value a column into the one in front of the all-reduce.",
    Reason.DROPOUT: "Dropout stands between the sum and the norm. Call model.eval() before compiling for inference.",
    Reason.STREAMS: "The residual consists of several streams (hyper-connections), and the fused op adds one residual. "
    "Nothing to do: the mixing of the streams between the sum and the norm is not built.",
    Reason.NORM_STATISTICS: "The sum is part of a norm over columns of several ranks, a few numbers a row. No norm of rows "
    "follows it, so there is nothing to fuse. Nothing to do.",
    Reason.UNKNOWN_NORM: "What reads the sum is neither an RMSNorm, s * g(w) / sqrt(mean(s**2) + eps) with g in {1, w, 1 + w}, "
    "nor a LayerNorm.",
    Reason.LAYER_NORM: "The norm subtracts the mean, and is no LayerNorm that the fused op computes: the mean and the biased "
    "variance of a whole row, a rounded residual, and statistics that nothing else reads. Use torch.nn.LayerNorm.",
    Reason.EPS_OUTSIDE_ROOT: "eps is added outside the square root. Add it to the mean of squares.",
    Reason.MEAN_DIM: "The mean is not over the last dimension. Normalize over the hidden dimension, kept last.",
    Reason.PARTIAL_WIDTH: "The mean covers only part of the hidden dimension (partial or grouped RMSNorm).",
    Reason.WEIGHT_INSIDE_MEAN: "The weight is multiplied in before the mean. Apply it to the normalized value.",
    Reason.WEIGHT_SHAPE: "The weight is not a vector of the hidden size.",
    Reason.EPS_NOT_CONSTANT: "eps is computed in the graph or is a graph input. Make it a Python float of the module.",
    Reason.UNKNOWN_FLAVOUR: "It is a norm that the fused op computes, but it casts or rounds in an order that the op does not "
    "repeat. Use numerics='relaxed' to accept a different rounding, or a standard spelling.",
    Reason.DYNAMIC_WIDTH: "The hidden size is symbolic. Mark only the row dimensions as dynamic.",
    Reason.GROUP_MISMATCH: "Attention and MLP reduce over different ranks, so the group is not shared. Set "
    "moe_dense_tp_size equal to attn_tp_size, or use policy='all'.",
    Reason.POLICY: "Legal, but not selected by the policy. Use policy='all' to fuse every legal site.",
    Reason.RANKS_DISAGREE: "Its ranks decided differently, and ranks that run different ops would wait for each other. Compile "
    "with the same options and versions on all ranks; code that is written for one rank (rows of its own, a padding of its own) "
    "shows each rank another graph.",
    Reason.INTERNAL: "The pass itself failed here and left this all-reduce as it was. Please report the detail; "
    "tpfuse.verify=True raises the exception with its traceback.",
    Reason.FUEL: "The limit of tpfuse.fuel was reached. Raise or unset it.",
}


@dataclass(frozen=True)
class Refusal:
    """A reason with what was seen in this place.

    Attributes:
        reason: the stable code.
        detail: one sentence about this site: what was found and what was expected.
        matched: the steps that did match before this one failed, nearest miss first to last.
    """

    reason: Reason
    detail: str
    matched: tuple[str, ...] = ()

    @property
    def remedy(self) -> str:
        return REMEDIES[self.reason]
