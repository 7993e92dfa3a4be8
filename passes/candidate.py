"""What the walk finds: a :class:`Candidate` names every operand of the fused op."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.fx import Node

from . import values
from .collectives import Collective
from .norms import NormForm
from .quantization import Quantization
from .reasons import Refusal
from .replicas import Replicas
from .rows import RowBlock


@dataclass(frozen=True)
class Term:
    """One step between the sum and the norm.

    Attributes:
        kind: ``bias`` (a vector is added), ``full`` (a tensor with the rows of the sum is added), ``scale`` (by a number or a
            scalar tensor) or ``factor`` (the sum itself is multiplied by a scalar tensor, which is done before the reduction:
            relaxed).
        node: the node that does it.
        operand: what is added, or the scalar tensor; None for a scale by a number.
        factor: of a scale by a number.
        path: alias nodes between the value before and this step; their reshapes are repeated on the partial sum.
        casts: nodes that widen the operand to fp32; they go where nothing else reads them.
    """

    kind: str
    node: Node
    operand: Node | None = None
    factor: float = 1.0
    path: tuple[Node, ...] = ()
    casts: tuple[Node, ...] = ()


@dataclass(frozen=True)
class Merged:
    """Another sum that the fused op makes together with its own; see :mod:`.merged`.

    Attributes:
        collective: the other reduction.
        nodes: what leads from it to ``operand``.
        factor: what one of ``nodes`` multiplies it by: one value a row, or a number; None where nothing does.
        bias: the vector that one of ``nodes`` adds to it, or None.
        order: of the additions: ``together``, the two sums first, then the residual; ``other_first``,
            ``(residual + other) + own``; ``own_first``, ``(residual + own) + other``.
        operand: what one of the candidate's terms adds.
        exact: both sums are made and rounded each for itself. Else the partial sums are added and reduced once (relaxed).
    """

    collective: Collective
    nodes: tuple[Node, ...]
    factor: Node | float | None
    bias: Node | None
    order: str
    operand: Node
    exact: bool = False


@dataclass(frozen=True)
class Gather:
    """All-gathers of one norm, which the fused op does; see :mod:`.gathers`.

    Attributes:
        starts: the nodes that start them.
        results: the nodes that hold all rows (their waits).
        nodes: both, and the names of the norm that they read.
        replicas: whose rows are gathered, where it is not done over the ranks of the sum.
    """

    starts: tuple[Node, ...]
    results: tuple[Node, ...]
    nodes: tuple[Node, ...]
    replicas: Replicas | None = None


@dataclass(frozen=True)
class Candidate:
    """A region that may be rewritten, with every operand of the fused op.

    Attributes:
        collective: the all-reduce.
        terms: in order, at most one bias (or full addend) and one scale, then one residual.
        bias: vector or full addend, or None.
        addend: in front of a LayerNorm, a full addend behind a vector, or None.
        scale: the number; 1.0 when there is none.
        residual: or None.
        h: the value that is normalized, under all its names (the sum itself when there are no terms).
        norm: what was found.
        post_add: the add after the norm when the residual is added there, else None.
        post_path: alias nodes between the norm and that add.
        rounded: where ``h`` is a residual sum that was not rounded, the nodes that round it; none if nothing reads it rounded.
            None where ``h`` itself is the rounded value.
        block: the rows of the sum that this rank keeps, where it does not keep all.
        factor: a scalar tensor by which each rank multiplies what it gives to the sum, or None.
        merged: the other sum that the op makes too.
        quantization: of the norm, where the fused op does that too.
        gather: of the norm, where the fused op does that too; then nothing reads the norm of the own rows.
        note: about a quantization or a gather of the norm that it does not do.
        scale_tensor: in the dtype of the sum, a scalar tensor or one value for each row by which each rank multiplies the reduced
            sum, in the place of ``scale``, or None.
        scale_first: the scale comes before the bias.
        narrowed: of an fp32 sum that is rounded to 16 bits before anything else is done with it, what leads to its rounded
            value; see :mod:`.narrowed`.
    """

    collective: Collective
    terms: tuple[Term, ...]
    bias: Node | None
    scale: float
    residual: Node | None
    h: values.Aliases
    norm: NormForm
    post_add: Node | None = None
    post_path: tuple[Node, ...] = ()
    rounded: tuple[Node, ...] | None = None
    block: RowBlock | None = None
    factor: Node | None = None
    merged: Merged | None = None
    quantization: Quantization | None = None
    gather: Gather | None = None
    note: str = ""
    addend: Node | None = None
    scale_tensor: Node | None = None
    scale_first: bool = False
    narrowed: tuple[Node, ...] = ()

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype in which the sum is added to and normed."""
        return values.dtype(self.narrowed[-1] if self.narrowed else self.collective.value)

    @property
    def outputs(self) -> tuple[Node, ...]:
        """What the two results of the fused op stand for: the norm, then every node that holds the residual sum."""
        if self.post_add is not None:
            return (self.norm.out, self.post_add)
        return (self.norm.out, *((self.h.root,) if self.rounded is None else self.rounded))

    @property
    def over(self) -> tuple[int, ...]:
        """Global ranks of the fused op where they are more than those of the sum: its gather is over replicas."""
        return self.gather.replicas.ranks if self.gather is not None and self.gather.replicas is not None else ()

    @property
    def kept(self) -> Node:
        """The node that holds the rows of the sum that this rank keeps."""
        return self.block.nodes[-1] if self.block is not None and self.block.nodes else self.collective.value

    @property
    def pattern(self) -> str:
        parts = [Start(self.collective, self.block, self.narrowed).name]
        if self.merged is not None:
            # A number may come from the rank: in the pattern, which ranks compare.
            factor = f"*{self.merged.factor!r}" if isinstance(self.merged.factor, float) else ""
            if isinstance(self.merged.factor, Node) and self.merged.exact:
                factor = "*row"
            parts.append(self.merged.collective.kind + factor)
        before = []
        if self.merged is not None and self.merged.bias is not None:
            before.append("bias")
        if self.bias is not None:
            before.append("add" if any(t.kind == "full" and t.operand is self.bias for t in self.terms) else "bias")
        if self.addend is not None:
            before.append("add")
        if self.scale != 1.0 or self.scale_tensor is not None or self.factor is not None:
            before.append("scale")
        parts += reversed(before) if self.scale_first else before
        if self.residual is not None and self.post_add is None:
            parts.append("add")
        parts.append(self.norm.kind)
        if self.post_add is not None:
            parts.append("add")
        if self.quantization is not None:
            parts.append("quantize")
        if self.gather is not None:
            parts.append("all_gather")
        return "+".join(parts)

    @property
    def operands(self) -> tuple[Node, ...]:
        """What the fused op reads besides the partial sum."""
        other = self.merged
        theirs = () if other is None else (other.collective.x, other.factor, other.bias)
        static_scale = None if self.quantization is None else self.quantization.static_scale
        scales = self.scale_tensor, self.factor, static_scale
        operands = (
            self.bias,
            self.addend,
            *theirs,
            self.residual,
            self.norm.weight,
            self.norm.shift,
            *scales,
        )
        return tuple(n for n in operands if isinstance(n, Node))

    @property
    def exact(self) -> bool:
        """Whether the fused op gives the model's bits; False only with relaxed numerics."""
        quantized = self.quantization is None or self.quantization.exact
        return self.norm.exact and self.factor is None and (self.merged is None or self.merged.exact) and quantized

    @property
    def reshapes(self) -> tuple[Node, ...]:
        """The reshapes between the residual sum's shape and the shape in which the model reads the normalized value."""
        region = [*self.norm.steps, self.norm.out]
        first = next((a for n in region for a in n.all_input_nodes if a in self.h), self.h.root)
        hidden = values.width(self.h.root)
        inner = [n for n in self.norm.steps if n.target in values.RESHAPES and values.width(n) == hidden]
        return tuple(n for n in (*self.h.path(first), *inner) if n.target in values.RESHAPES)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The nodes that the fused op replaces, the all-reduce first."""
        region = [self.collective.node, *self.collective.waits, *(self.block.nodes if self.block else ())]
        if self.merged is not None:
            other = self.merged.collective
            region += [other.node, *other.waits, *self.merged.nodes]
        region += self.narrowed
        region += [node for term in self.terms for node in (*term.path, *term.casts, term.node)]
        region += [*(self.rounded or ()), *self.norm.steps, self.norm.out]
        if self.post_add is not None:
            region += [*self.post_path, self.post_add]
        if self.quantization is not None:
            region += self.quantization.nodes
        if self.gather is not None:
            region += self.gather.nodes
        return tuple(dict.fromkeys(region))


@dataclass(frozen=True)
class Found:
    """One all-reduce with what the walk made of it."""

    collective: Collective
    outcome: Candidate | Refusal
    pattern: str
    admitted: str | None = None  # the rule that lets the policy rewrite it, see passes.judge
    over: tuple[int, ...] = ()  # of a refused op: its ranks where they are more than those of the sum


@dataclass(frozen=True)
class Start:
    """Where a walk begins: a sum, the rows of it that this rank keeps, and what rounds it first."""

    collective: Collective
    block: RowBlock | None
    narrowed: tuple[Node, ...] = ()

    @property
    def name(self) -> str:
        """How a pattern begins: ``all_reduce``, ``reduce_scatter``, ``all_reduce+rows/2`` with one of two blocks kept, or
        ``all_reduce+cast`` where the sum is rounded first."""
        parts = [self.collective.kind]
        if self.block is not None and self.block.nodes:
            parts.append(f"rows/{self.block.blocks}")
        return "+".join([*parts, *(["cast"] if self.narrowed else [])])

    def pattern(self, terms: list[Term], end: str | None) -> str:
        names = {"bias": "bias", "full": "add", "scale": "scale", "factor": "scale"}
        return "+".join([self.name, *(names[t.kind] for t in terms), *([end] if end else [])])
