"""Recognise an RMSNorm by what it computes, not by how it is spelled.

From a value ``s`` onward, the arithmetic nodes are read into a short program (:class:`Step`), the program is interpreted
over sympy symbols, and it is a norm exactly when some step equals ``s * g / sqrt(mean(s**2) + eps)`` with ``g`` one of 1,
w, 1 + w. Where it casts becomes a :class:`~tpfuse.ops.Flavour`; that the flavour repeats the model's bits is then *proved*
by running both on random numbers. A model's layers all look alike, so each program is analysed once.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch.fx import Node

from tpfuse import compat

from ..ops import reference
from ..ops.flavour import Flavour
from . import values
from .reasons import Reason, Refusal

MAX_STEPS = 40  # the longest spelling in transformers 5.24 takes 14; more means that this is not one norm


@dataclass(frozen=True)
class NormForm:
    """An RMSNorm found in the graph.

    Attributes:
        out: the node that holds the normalised value.
        weight: the node to pass as weight, or None.
        eps: added to the mean of squares.
        flavour: its rounding order.
        exact: whether the flavour repeats the model's bits (False only with relaxed numerics).
        steps: nodes between ``s`` and ``out``, both not counted, in graph order.
        proof: what it takes to run the model's own steps again (``tpfuse.verify``).
    """

    out: Node
    weight: Node | None
    eps: float
    flavour: Flavour
    exact: bool
    steps: tuple[Node, ...]
    proof: Proof


@dataclass(frozen=True)
class Proof:
    """A norm's program, detached from the graph: enough to repeat the model's own operations on other numbers."""

    steps: tuple[Step, ...]
    leaves: tuple[Leaf, ...]
    out: int
    weight: int | None
    at_base: bool

    def run(self, s: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        """The model's operations on rows ``s`` of shape ``(rows, H)``; ``weight`` is what the fused op is given."""
        operands = []
        for index, leaf in enumerate(self.leaves):
            if index != self.weight or weight is None:
                operands.append(torch.zeros((), dtype=leaf.dtype))
            else:
                operands.append(_operand_value(leaf, weight) if self.at_base else weight)
        return _replay(self.steps, self.out, s, operands)


# -- reading nodes into a program ---------------------------------------------------------------------------------


def _kinds() -> dict[Any, str]:
    table = {
        "cast": values.CASTS,
        "same": values.IDENTITIES | values.RESHAPES,
        "pow": values.overloads("pow.Tensor_Scalar"),
        "square": values.overloads("square.default"),
        "mul": values.overloads("mul.Tensor", "mul.Scalar"),
        "div": values.overloads("div.Tensor", "div.Scalar"),
        "add": values.overloads("add.Tensor", "add.Scalar"),
        "sub": values.overloads("sub.Tensor", "sub.Scalar"),
        "rsqrt": values.overloads("rsqrt.default"),
        "sqrt": values.overloads("sqrt.default"),
        "reciprocal": values.overloads("reciprocal.default"),
        "mean": values.overloads("mean.dim"),
        "sum": values.overloads("sum.dim_IntList"),
        "norm2": values.overloads("linalg_vector_norm.default"),
        "variance": values.overloads("var_mean.correction", "var.correction"),
        "layer_norm": values.overloads("native_layer_norm.default"),
        "fused": values.overloads("_fused_rms_norm.default", "rms_norm.default"),
        "part": values.overloads("slice.Tensor", "narrow.default"),
        "item": frozenset({operator.getitem}),
    }
    return {op: kind for kind, ops in table.items() for op in ops}


KINDS = _kinds()
REDUCTIONS = ("mean", "sum", "norm2", "variance", "layer_norm", "fused")


@dataclass(frozen=True)
class Ref:
    """An operand: ``s`` itself, an earlier step, or a leaf from outside."""

    kind: str  # "s" | "step" | "leaf"
    index: int = 0


@dataclass(frozen=True)
class Leaf:
    """An operand that does not depend on ``s``.

    Attributes:
        shape: ``vector`` (one value per column) or ``scalar``.
        base: dtype of the node at the start of ``chain``.
        chain: what happens to it on the way: ``cast``/dtype pairs and ``("plus_one", None)``.
        dtype: of the operand.
    """

    shape: str
    base: torch.dtype | None
    chain: tuple[tuple[str, Any], ...]
    dtype: torch.dtype | None


@dataclass(frozen=True)
class Step:
    """One arithmetic node. ``last_dim`` tells whether a reduction is over the last dimension alone; ``kept`` whether a
    reshape or slice keeps the width; ``leaks`` whether a node outside the program reads the value."""

    kind: str
    target: Any
    args: tuple[Any, ...]
    dtype: torch.dtype | None
    last_dim: bool = True
    kept: bool = True
    leaks: bool = False


@dataclass
class _Program:
    """Steps with the nodes they came from. Only the first three fields enter the memo."""

    steps: list[Step] = field(default_factory=list)
    leaves: list[Leaf] = field(default_factory=list)
    nodes: list[Node] = field(default_factory=list)
    leaf_nodes: list[tuple[Node, Node]] = field(default_factory=list)  # (operand, base of its chain)


def _read(source: values.Aliases, order: dict[Node, int], hidden: int) -> _Program:
    """The arithmetic that hangs on ``s``, in graph order, up to the first operation that no norm contains."""
    known: dict[Node, Ref] = {name: Ref("s") for name in source.names}
    leaves: dict[Node, Ref] = {}
    program = _Program()
    queue = {user for name in source.names for user in name.users if user not in known}
    rejected: set[Node] = set()
    while queue and len(program.nodes) < MAX_STEPS:
        node = min(queue, key=order.__getitem__)
        queue.discard(node)
        step = _step(node, known, leaves, program, hidden)
        if step is None:
            rejected.add(node)
            continue
        known[node] = Ref("step", len(program.steps))
        program.steps.append(step)
        program.nodes.append(node)
        queue.update(user for user in node.users if user not in known and user not in rejected)
    inside = set(program.nodes)
    for index, node in enumerate(program.nodes):
        leaks = any(user not in inside and not values.is_dead(user) for user in node.users)
        if leaks:
            step = program.steps[index]
            program.steps[index] = Step(
                step.kind, step.target, step.args, step.dtype, step.last_dim, step.kept, leaks=True
            )
    return program


def _step(node: Node, known: dict[Node, Ref], leaves: dict[Node, Ref], program: _Program, hidden: int) -> Step | None:
    kind = KINDS.get(node.target) if node.op == "call_function" else None
    if kind is None:
        return None
    if kind == "item" and not (node.args[0] in known and isinstance(node.args[1], int)):
        return None
    pending: list[tuple[Node, Leaf, Node]] = []
    args: list[Any] = []
    read = node.args[:1] if kind in ("same", "part", "cast", "mean", "sum", "norm2") else node.args
    for arg in read:
        if not isinstance(arg, Node):
            args.append(tuple(arg) if isinstance(arg, list) else arg)
            continue
        ref = known.get(arg) or leaves.get(arg)
        if ref is None:
            leaf, base = _leaf(arg, hidden)
            if leaf is None:
                return None
            pending.append((arg, leaf, base))
            ref = Ref("leaf", len(program.leaves) + len(pending) - 1)
        args.append(ref)
    if any(isinstance(a, torch.SymInt | torch.SymFloat) for a in args):
        return None
    if kind in ("add", "sub") and node.kwargs.get("alpha", 1) != 1:
        return None
    for arg, leaf, base in pending:
        leaves[arg] = Ref("leaf", len(program.leaves))
        program.leaves.append(leaf)
        program.leaf_nodes.append((arg, base))
    last_dim, kept = True, True
    tensor = values.value(node)
    first = node.args[0] if node.args and isinstance(node.args[0], Node) else None
    if kind in ("mean", "sum", "norm2"):
        last_dim = _over_last_dim(node, kind)
    elif kind in ("same", "part") and first is not None:
        kept = _keeps_width(node, first, known)
    return Step(kind, node.target, tuple(args), None if tensor is None else tensor.dtype, last_dim, kept)


def _over_last_dim(node: Node, kind: str) -> bool:
    tensor = values.value(node.args[0])
    position = 2 if kind == "norm2" else 1
    dims = node.args[position] if len(node.args) > position else node.kwargs.get("dim")
    if kind == "norm2" and (node.args[1] if len(node.args) > 1 else 2) != 2:
        return False
    if tensor is None or not isinstance(dims, list | tuple) or len(dims) != 1 or not isinstance(dims[0], int):
        return False
    return dims[0] % tensor.dim() == tensor.dim() - 1


def _keeps_width(node: Node, first: Node, known: dict[Node, Ref]) -> bool:
    """Whether a reshape or slice leaves the last dimension as it is (or only adds or drops a 1, for a statistic)."""
    new, old = values.value(node), values.value(first)
    if new is None or old is None:
        return False
    if node.target in values.overloads("slice.Tensor", "narrow.default"):
        return all(compat.statically_true(m == n) for m, n in zip(new.shape, old.shape, strict=True))
    new_width = new.shape[-1] if new.dim() else 1
    old_width = old.shape[-1] if old.dim() else 1
    if compat.statically_true(new_width == old_width):
        return True
    # mean(..., keepdim=False).unsqueeze(-1): a statistic gains the dimension it lost.
    return node.target in values.overloads("unsqueeze.default", "squeeze.dim") and (
        compat.statically_true(new_width == 1) or compat.statically_true(old_width == 1)
    )


def _leaf(node: Node, hidden: int) -> tuple[Leaf | None, Node]:
    tensor = values.value(node)
    if tensor is None:  # a symbolic number, e.g. an eps that is a graph input
        return Leaf("scalar", None, (), None), node
    if tensor.dim() == 0 or (tensor.dim() == 1 and hidden != 1 and compat.statically_true(tensor.shape[0] == 1)):
        return Leaf("scalar", tensor.dtype, (), tensor.dtype), node
    if not values.is_vector(node, hidden):
        return None, node
    chain: list[tuple[str, Any]] = []
    base = node
    while base.op == "call_function":
        kind = KINDS.get(base.target)
        previous = next((a for a in base.args if isinstance(a, Node)), None)
        if previous is None or not values.is_vector(previous, hidden):
            break
        if kind == "cast":
            chain.append(("cast", values.dtype(base)))
        elif kind == "add" and any(isinstance(a, int | float) and a == 1 for a in base.args):
            chain.append(("plus_one", None))
        elif kind != "same":
            break
        base = previous
    while base.op == "call_function" and KINDS.get(base.target) == "same":
        base = base.args[0]  # type: ignore[assignment]
    base_tensor = values.value(base)
    if base_tensor is None or base_tensor.dim() != 1:
        return Leaf("vector", tensor.dtype, (), tensor.dtype), node
    return Leaf("vector", base_tensor.dtype, tuple(reversed(chain)), tensor.dtype), base


# -- what the program means -----------------------------------------------------------------------------------------

S = sympy.Symbol("s", real=True)
Q = sympy.Symbol("mean_s2", positive=True)
M = sympy.Symbol("mean_s", real=True)


@dataclass(frozen=True)
class _Match:
    """A program that is a norm, by positions in the program."""

    out: int
    weight: int | None  # leaf
    at_base: bool  # pass the base of the leaf's chain, not the operand
    eps: float
    flavour: Flavour
    exact: bool


def _number(constant: float | int) -> sympy.Rational:
    return sympy.Rational(constant)


class _Meaning:
    """Interprets a program over sympy symbols, one expression a step (None: not expressible)."""

    def __init__(self, steps: tuple[Step, ...], leaves: tuple[Leaf, ...], hidden: int) -> None:
        self.steps, self.leaves, self.hidden = steps, leaves, hidden
        self.notes: dict[Reason, str] = {}
        self.opaque = 0
        self.weights = {
            i: sympy.Symbol(f"w{i}" if leaf.shape == "vector" else f"c{i}", real=True) for i, leaf in enumerate(leaves)
        }
        self.exprs: list[Any] = []
        for step in steps:
            self.exprs.append(self._evaluate(step))

    def _fresh(self, name: str) -> sympy.Symbol:
        self.opaque += 1
        return sympy.Symbol(f"{name}{self.opaque}", real=True)

    def _operand(self, arg: Any) -> Any:
        if isinstance(arg, Ref):
            if arg.kind == "s":
                return S
            if arg.kind == "step":
                return self.exprs[arg.index]
            leaf = self.leaves[arg.index]
            plus = sum(1 for name, _ in leaf.chain if name == "plus_one")
            return self.weights[arg.index] + plus
        if isinstance(arg, bool) or not isinstance(arg, int | float):
            return None
        return _number(arg)

    def _evaluate(self, step: Step) -> Any:
        args = [self._operand(a) for a in step.args]
        a = args[0] if args else None
        b = args[1] if len(args) > 1 else None
        if step.kind in ("variance", "layer_norm"):
            self.notes[Reason.LAYER_NORM] = f"{step.target} subtracts the mean"
            return None
        if step.kind == "item":
            return a if step.args[1] == 0 else None
        if a is None:
            return None
        if step.kind in {"same", "part"}:
            if step.kept:
                return a
            if a.has(S):
                return self._fresh("part")
            return None
        if step.kind == "cast":
            return a
        if step.kind == "square":
            return a**2
        if step.kind == "rsqrt":
            return 1 / sympy.sqrt(a)
        if step.kind == "sqrt":
            return sympy.sqrt(a)
        if step.kind == "reciprocal":
            return 1 / a
        if step.kind == "fused":
            return self._fused(step, a)
        if step.kind in ("mean", "sum", "norm2"):
            if not step.last_dim:
                self.notes[Reason.MEAN_DIM] = f"{step.target} does not reduce just the last dimension"
                return None
            inner = a**2 if step.kind == "norm2" else a
            mean = self._mean(inner)
            if step.kind == "mean":
                return mean
            return sympy.sqrt(self.hidden * mean) if step.kind == "norm2" else self.hidden * mean
        if b is None:
            return None
        if step.kind == "pow":
            return a**b
        return {"mul": a * b, "div": a / b, "add": a + b, "sub": a - b}[step.kind]

    def _fused(self, step: Step, a: Any) -> Any:
        shape, weight, eps = ([*list(step.args[1:]), None, None])[:3]
        if tuple(shape) != (self.hidden,):
            self.notes[Reason.PARTIAL_WIDTH] = (
                f"{step.target} normalises over {tuple(shape)}, the width is {self.hidden}"
            )
            return None
        if a != S:
            return None
        gain = self._operand(weight) if weight is not None else 1
        return S * gain / sympy.sqrt(Q + _number(fused_eps(eps, step.dtype)))

    def _mean(self, inner: Any) -> Any:
        inner = sympy.expand(inner)
        if not inner.has(S) and not any(str(x).startswith(("part", "w")) for x in inner.free_symbols):
            return inner
        factor = sympy.cancel(inner / S**2)
        if not factor.has(S) and not any(str(x).startswith(("part", "w")) for x in factor.free_symbols):
            return factor * Q
        factor = sympy.cancel(inner / S)
        if not factor.has(S) and not any(str(x).startswith(("part", "w")) for x in factor.free_symbols):
            self.notes.setdefault(Reason.LAYER_NORM, "the mean of the values themselves is taken")
            return factor * M
        names = [str(x) for x in inner.free_symbols]
        if any(n.startswith("part") for n in names):
            self.notes[Reason.PARTIAL_WIDTH] = "the mean covers a slice or a regrouping of the last dimension"
        elif any(n.startswith("w") for n in names):
            self.notes[Reason.WEIGHT_INSIDE_MEAN] = f"the mean is of {inner}, expected s**2"
        return self._fresh("mean")

    def gain(self, expr: Any) -> tuple[Any, Any] | None:
        """(g, eps) when ``expr`` equals ``s * g / sqrt(mean(s**2) + eps)``, else None."""
        if expr is None or not expr.has(S) or not expr.has(Q):
            return None
        squared = sympy.cancel(expr**2)
        options: list[Any] = [sympy.Integer(1)]
        for index, leaf in enumerate(self.leaves):
            if leaf.shape == "vector" and expr.has(self.weights[index]):
                options += [self.weights[index], 1 + self.weights[index]]
        for g in options:
            eps = sympy.cancel(S**2 * g**2 / squared - Q)
            eps_free = eps.free_symbols
            if eps_free and all(str(x).startswith("c") for x in eps_free):
                self.notes[Reason.EPS_NOT_CONSTANT] = self._symbolic_eps()
                continue
            if eps_free or not eps.is_real or eps < 0:
                continue
            sample = {S: 2, Q: 3, **dict.fromkeys(self.weights.values(), 5)}
            if expr.subs(sample) > 0:  # the square forgets the sign
                return g, eps
        return None

    def _symbolic_eps(self) -> str:
        for step in self.steps:
            refs = [a for a in step.args if isinstance(a, Ref)]
            scalar = any(r.kind == "leaf" and self.leaves[r.index].shape == "scalar" for r in refs)
            if step.kind in ("mul", "div") and scalar and any(r.kind == "s" for r in refs):
                return (
                    "the sum is multiplied by a scalar tensor before the norm; only a Python number can be part of it"
                )
        return "eps is a tensor or a symbolic number of the graph"

    def miss(self) -> Refusal | None:
        """Why no step is a norm, most telling reason first; None when nothing here even looks like one."""
        seen = tuple(dict.fromkeys(s.kind for s in self.steps if s.kind not in ("same", "item")))
        priority = (
            Reason.LAYER_NORM,
            Reason.MEAN_DIM,
            Reason.PARTIAL_WIDTH,
            Reason.WEIGHT_INSIDE_MEAN,
            Reason.EPS_NOT_CONSTANT,
        )
        for reason in priority:
            if reason in self.notes:
                return Refusal(reason, self.notes[reason], seen)
        root = sympy.sqrt(Q)
        for expr in self.exprs:
            if expr is None:
                continue
            for power in expr.atoms(sympy.Pow):
                if power.exp.is_negative and power.base.is_Add and root in power.base.args:
                    return Refusal(
                        Reason.EPS_OUTSIDE_ROOT,
                        f"the value is divided by {power.base}, expected sqrt(mean + eps)",
                        seen,
                    )
        if any(s.kind in REDUCTIONS for s in self.steps):
            last = next((e for e in reversed(self.exprs) if e is not None), None)
            return Refusal(Reason.UNKNOWN_NORM, f"matched up to {seen[-1] if seen else 'nothing'}: {last}", seen)
        return None


def fused_eps(eps: float | None, out: torch.dtype | None) -> float:
    """The eps that ``rms_norm`` uses for None: that of its accumulation dtype."""
    if eps is not None:
        return eps
    return torch.finfo(torch.float64 if out == torch.float64 else torch.float32).eps


# -- where the program rounds ---------------------------------------------------------------------------------------


def _ancestors(steps: tuple[Step, ...], out: int) -> set[int]:
    seen, stack = set(), [out]
    while stack:
        index = stack.pop()
        if index in seen:
            continue
        seen.add(index)
        stack.extend(a.index for a in steps[index].args if isinstance(a, Ref) and a.kind == "step")
    return seen


def _closed(steps: tuple[Step, ...], out: int, inside: set[int]) -> bool:
    """Whether nothing but a cast or square of ``s`` is read from outside the norm (those are cheap to keep)."""
    for index, step in enumerate(steps):
        if index in inside:
            if index != out and step.leaks and not _early(steps, index):
                return False
            continue
        for arg in step.args:
            read = isinstance(arg, Ref) and arg.kind == "step" and arg.index in inside and arg.index != out
            if read and not _early(steps, arg.index):
                return False
    return True


def _early(steps: tuple[Step, ...], index: int) -> bool:
    return not any(steps[i].kind in REDUCTIONS for i in _ancestors(steps, index))


def _derive(
    steps: tuple[Step, ...],
    leaves: tuple[Leaf, ...],
    meaning: _Meaning,
    gains: dict[int, Any],
    out: int,
    s_dtype: torch.dtype,
    at_base: bool,
) -> tuple[Flavour, int | None] | None:
    """The flavour that the structure suggests, and the weight's leaf. The caller proves it."""
    inside = _ancestors(steps, out)

    def name(dtype: torch.dtype | None) -> str:
        return "float32" if dtype == torch.float32 else "input"

    def operand_dtype(arg: Any) -> torch.dtype | None:
        if not isinstance(arg, Ref):
            return None
        return s_dtype if arg.kind == "s" else steps[arg.index].dtype if arg.kind == "step" else leaves[arg.index].dtype

    chain = [steps[i] for i in sorted(inside)]
    out_dtype = steps[out].dtype
    fused = next((s for s in chain if s.kind == "fused"), None)
    reduction = next((s for s in chain if s.kind in ("mean", "sum")), None)
    if reduction is None and fused is None:
        return None
    weight: int | None = None
    gain, gain_dtype, normed = "none", "own", None
    if fused is not None:
        compute, mean, root = "float32" if s_dtype != torch.float64 else "input", "mean", "rsqrt"
        normed = compute
        weight = next((a.index for a in fused.args if isinstance(a, Ref) and a.kind == "leaf"), None)
        gain = "none" if weight is None else "weight"
    else:
        assert reduction is not None
        compute = name(operand_dtype(reduction.args[0]))
        mean = reduction.kind
        kinds = {s.kind for s in chain}
        if "rsqrt" in kinds:
            root = "rsqrt"
        elif "sqrt" in kinds:
            root = "mul_recip_sqrt" if _reciprocal(chain) else "div_sqrt"
        else:
            root = "pow"
    for step in chain:
        if step.kind not in ("mul",):
            continue
        refs = [a for a in step.args if isinstance(a, Ref)]
        leaf = next((r for r in refs if r.kind == "leaf" and leaves[r.index].shape == "vector"), None)
        other = next((r for r in refs if r is not leaf), None)
        if leaf is None or other is None:
            continue
        weight, gain, normed = leaf.index, "weight", name(operand_dtype(other))
    if weight is not None and at_base:
        for what, to in leaves[weight].chain:
            if what == "plus_one":
                gain = "one_plus_weight"
            elif what == "cast" and gain == "weight":
                gain_dtype = name(to)
    if normed is None:  # no gain: rounded once, at the end
        normed = name(out_dtype)
    if s_dtype == torch.float32:
        normed = "input"
    weight_dtype = None if weight is None else leaves[weight].base if at_base else leaves[weight].dtype
    promoted = Flavour(compute, mean, root, normed, gain, gain_dtype, "promoted")
    out_name = "promoted"
    if reference.output_dtype(s_dtype, weight_dtype, promoted) != out_dtype:
        out_name = "input" if out_dtype == s_dtype else "float32"
    return Flavour(compute, mean, root, normed, gain, gain_dtype, out_name), weight


def _reciprocal(chain: list[Step]) -> bool:
    return any(
        s.kind == "reciprocal" or (s.kind == "div" and s.args and not isinstance(s.args[0], Ref) and s.args[0] == 1)
        for s in chain
    )


# -- the proof, by structure ------------------------------------------------------------------------------------------
#
# Two programs whose trees are equal run the same operations on the same dtypes in the same order, up to rewrites that
# change no bit: operands of + and * swapped, h * h for h ** 2, 1 / x for reciprocal(x), type promotion spelled as a cast.


def _commutes(kind: str, a: Any, b: Any) -> tuple[Any, ...]:
    return (kind, *sorted((a, b), key=repr))


def _cast(tree: Any, have: torch.dtype | None, want: torch.dtype | None) -> Any:
    return tree if have == want or have is None or want is None else ("cast", want, tree)


def _tree(steps: tuple[Step, ...], leaves: tuple[Leaf, ...], out: int, s_dtype: torch.dtype) -> Any:
    """The program up to ``out`` as nested tuples, or None when it holds a step that no flavour has."""
    trees: dict[int, Any] = {}

    def operand(arg: Any) -> tuple[Any, torch.dtype | None]:
        if not isinstance(arg, Ref):
            return arg, None
        if arg.kind == "s":
            return "s", s_dtype
        if arg.kind == "step":
            return trees[arg.index], steps[arg.index].dtype
        leaf = leaves[arg.index]
        if leaf.shape != "vector":
            return None, None
        tree, have = ("w", arg.index), leaf.base
        for what, to in leaf.chain:
            if what == "cast":
                tree, have = _cast(tree, have, to), to
            else:
                tree = _commutes("add", tree, 1.0)
        return tree, leaf.dtype

    for index in sorted(_ancestors(steps, out)):
        step = steps[index]
        pairs = [operand(a) for a in step.args]
        (a, have), b = pairs[0], pairs[1] if len(pairs) > 1 else (None, None)
        if a is None:
            return None
        if step.kind in ("same", "part"):
            tree = a if step.kept else None
        elif step.kind == "cast":
            tree = _cast(a, have, step.dtype)
        elif step.kind == "square" or (step.kind == "pow" and b[0] == 2):
            tree = ("mul", a, a)
        elif step.kind == "pow":
            tree = ("pow", a, float(b[0]))
        elif step.kind in ("mean", "sum"):
            tree = (step.kind, a) if have == step.dtype else None
        elif step.kind in ("rsqrt", "sqrt", "reciprocal"):
            tree = (step.kind, a)
        elif step.kind in ("mul", "add", "div") and b[0] is not None:
            left = _cast(a, have, step.dtype) if have is not None else float(a)
            right = _cast(b[0], b[1], step.dtype) if b[1] is not None else float(b[0])
            if step.kind == "div":
                tree = ("reciprocal", right) if left == 1.0 else ("div", left, right)
            elif step.kind == "mul" and 1.0 in (left, right):
                tree = right if left == 1.0 else left
            else:
                tree = _commutes(step.kind, left, right)
        else:
            tree = None
        if tree is None:
            return None
        trees[index] = tree
    return trees[out]


def _flavour_tree(
    flavour: Flavour,
    eps: float,
    hidden: int,
    s_dtype: torch.dtype,
    weight: int | None,
    chain: list[tuple[str, Any]],
    base: Any,
) -> Any:
    """What ``reference.rms_norm`` does, as the same kind of tree."""
    compute = torch.float32 if flavour.compute == "float32" else s_dtype
    c = _cast("s", s_dtype, compute)
    mean = ("mean", ("mul", c, c)) if flavour.mean == "mean" else ("div", ("sum", ("mul", c, c)), float(hidden))
    v = _commutes("add", mean, eps)
    roots = {
        "rsqrt": lambda: _commutes("mul", c, ("rsqrt", v)),
        "div_sqrt": lambda: ("div", c, ("sqrt", v)),
        "mul_recip_sqrt": lambda: _commutes("mul", c, ("reciprocal", ("sqrt", v))),
        "pow": lambda: _commutes("mul", c, ("pow", v, -0.5)),
    }
    tree, have = roots[flavour.root](), compute
    want = torch.float32 if flavour.normed == "float32" else s_dtype
    tree, have = _cast(tree, have, want), want
    if flavour.gain != "none":
        gain: Any = ("w", weight)
        dtype = base
        for what, to in chain:  # only for a weight that is passed as the operand itself
            if what == "cast":
                gain, dtype = _cast(gain, dtype, to), to
            else:
                gain = _commutes("add", gain, 1.0)
        wanted = {"own": dtype, "float32": torch.float32, "input": s_dtype}[flavour.gain_dtype]
        gain, dtype = _cast(gain, dtype, wanted), wanted
        if flavour.gain == "one_plus_weight":
            gain = _commutes("add", gain, 1.0)
        result = torch.promote_types(have, dtype)
        tree, have = _commutes("mul", _cast(tree, have, result), _cast(gain, dtype, result)), result
    final = {"input": s_dtype, "float32": torch.float32, "promoted": have}[flavour.out]
    return _cast(tree, have, final)


def _same_order(
    steps: tuple[Step, ...], leaves: tuple[Leaf, ...], match: _Match, s_dtype: torch.dtype, hidden: int
) -> bool:
    """Whether the flavour runs the model's operations in the model's order."""
    if any(steps[i].kind == "fused" for i in _ancestors(steps, match.out)):
        return True  # one ATen operator: its order is its own business, and the numbers decide
    leaf = None if match.weight is None else leaves[match.weight]
    chain = [] if leaf is None or match.at_base else list(leaf.chain)
    base = None if leaf is None else leaf.base
    model = _tree(steps, leaves, match.out, s_dtype)
    return model is not None and model == _flavour_tree(
        match.flavour, match.eps, hidden, s_dtype, match.weight, chain, base
    )


# -- the proof, by numbers ------------------------------------------------------------------------------------------------------


def _replay(steps: tuple[Step, ...], out: int, s: torch.Tensor, leaves: list[torch.Tensor]) -> torch.Tensor:
    """The model's own operations, one by one, on real numbers. Reshapes are identities: rows are rows."""
    inside = _ancestors(steps, out)
    results: dict[int, Any] = {}

    def operand(arg: Any) -> Any:
        if isinstance(arg, Ref):
            return s if arg.kind == "s" else results[arg.index] if arg.kind == "step" else leaves[arg.index]
        return list(arg) if isinstance(arg, tuple) else arg

    for index in sorted(inside):
        step = steps[index]
        args = [operand(a) for a in step.args]
        if step.kind in ("same", "part"):
            results[index] = args[0]
        elif step.kind == "cast":
            results[index] = args[0].to(step.dtype)
        elif step.kind in ("mean", "sum"):
            results[index] = getattr(args[0], step.kind)(-1, keepdim=True, dtype=step.dtype)
        elif step.kind == "norm2":
            results[index] = torch.linalg.vector_norm(args[0], 2, -1, keepdim=True)
        elif step.kind == "item":
            results[index] = args[0][args[1]] if isinstance(args[0], tuple | list) else args[0]
        elif step.kind == "fused":
            shape, weight, eps = ([*args[1:], None, None])[:3]
            results[index] = (torch.nn.functional.rms_norm(args[0], shape, weight, eps), None)
            if step.target in values.overloads("rms_norm.default"):
                results[index] = results[index][0]
        else:
            results[index] = step.target(*args)
    return results[out]


def _samples(s_dtype: torch.dtype, leaves: tuple[Leaf, ...], hidden: int) -> list[tuple[torch.Tensor, list[Any]]]:
    """Random rows of several magnitudes with the weights that a model may have (near 1, near 0, negative)."""
    samples = []
    for seed in (11, 12):
        generator = torch.Generator().manual_seed(seed)
        s = torch.randn(4, hidden, generator=generator, dtype=torch.float64)
        s *= torch.tensor([1.0, 30.0, 0.02, 300.0], dtype=torch.float64)[:, None]
        tensors = []
        for leaf in leaves:
            if leaf.base is None or not leaf.base.is_floating_point:
                tensors.append(torch.tensor(1e-6))
                continue
            shape = (hidden,) if leaf.shape == "vector" else ()
            tensors.append(torch.randn(shape, generator=generator, dtype=torch.float64).to(leaf.base))
        samples.append((s.to(s_dtype), tensors))
    return samples


def _operand_value(leaf: Leaf, base: torch.Tensor) -> torch.Tensor:
    for what, to in leaf.chain:
        base = base.to(to) if what == "cast" else base + 1.0
    return base


@dataclass(frozen=True)
class _Comparison:
    equal: bool
    close: bool


def _prove(
    steps: tuple[Step, ...],
    leaves: tuple[Leaf, ...],
    out: int,
    s_dtype: torch.dtype,
    hidden: int,
    flavour: Flavour,
    weight: int | None,
    at_base: bool,
    eps: float,
) -> _Comparison:
    """Run the model's steps and the flavour's on the same random rows and compare bits (and, for relaxed, values)."""
    equal = close = True
    with compat.without_fake_mode(), torch.no_grad():
        for s, bases in _samples(s_dtype, leaves, hidden):
            operands = [_operand_value(leaf, base) for leaf, base in zip(leaves, bases, strict=True)]
            w = None if weight is None else bases[weight] if at_base else operands[weight]
            model = _replay(steps, out, s, operands)
            ours = reference.rms_norm(s, w, eps, flavour)
            if model.dtype != ours.dtype:
                return _Comparison(False, False)
            equal = equal and torch.equal(model, ours)
            tolerance = 4 * torch.finfo(s_dtype).eps
            close = close and torch.allclose(model.double(), ours.double(), rtol=tolerance, atol=tolerance)
    return _Comparison(equal, close)


# -- together -------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=512)
def _analyse(
    steps: tuple[Step, ...], leaves: tuple[Leaf, ...], s_dtype: torch.dtype, hidden: int, relaxed: bool
) -> _Match | Refusal | None:
    """What a program is. Pure, so that a model's layers, which all look alike, share one answer."""
    meaning = _Meaning(steps, leaves, hidden)
    gains: dict[int, Any] = {}
    for index, expr in enumerate(meaning.exprs):
        found = meaning.gain(expr)
        if found is not None and steps[index].dtype is not None:
            gains[index] = found
    gains = {i: g for i, g in gains.items() if not (steps[i].kind == "fused" and _is_tuple(steps[i]))}
    if not gains:
        return meaning.miss()
    # One norm at a time: where several norms read s, the first one is fused and the others read its residual sum.
    first = min(gains)
    candidates = [i for i in sorted(gains, reverse=True) if steps[i].kind != "same" and first in _ancestors(steps, i)]
    closed = [i for i in candidates if _closed(steps, i, _ancestors(steps, i))]
    failed: Flavour | None = None
    close: _Match | None = None
    for out in closed or candidates[-1:]:
        g, eps = gains[out]
        for at_base in (True, False):
            derived = _derive(steps, leaves, meaning, gains, out, s_dtype, at_base)
            if derived is None or (g == 1) != (derived[1] is None):
                continue
            flavour, weight = derived
            proof = _prove(steps, leaves, out, s_dtype, hidden, flavour, weight, at_base, float(eps))
            match = _Match(out, weight, at_base, float(eps), flavour, exact=False)
            if proof.equal and _same_order(steps, leaves, match, s_dtype, hidden):
                return replace(match, exact=True)
            failed = failed or flavour
            if proof.close and close is None:
                close = match
    if relaxed and close is not None:
        return close
    seen = tuple(dict.fromkeys(s.kind for s in steps if s.kind not in ("same", "item")))
    nearest = f"; the nearest flavour, {failed}, gives other bits" if failed else ""
    return Refusal(
        Reason.UNKNOWN_FLAVOUR, f"an RMSNorm in {s_dtype} whose casts the fused op does not repeat{nearest}", seen
    )


def _is_tuple(step: Step) -> bool:
    return step.target in values.overloads("_fused_rms_norm.default")


def match(source: values.Aliases, order: dict[Node, int], relaxed: bool = False) -> NormForm | Refusal | None:
    """The RMSNorm that reads ``source``, a refusal naming what is nearly one, or None when no norm reads it.

    Args:
        source: the value ``s`` under all its names.
        order: node positions.
        relaxed: accept a flavour that changes rounding.
    """
    hidden = values.width(source.root)
    dtype = values.dtype(source.root)
    if dtype is None or hidden is None:
        return None
    if not isinstance(hidden, int):
        return Refusal(Reason.DYNAMIC_WIDTH, f"the last dimension is {hidden}")
    program = _read(source, order, hidden)
    if not any(step.kind in REDUCTIONS for step in program.steps):
        return None
    found = _analyse(tuple(program.steps), tuple(program.leaves), dtype, hidden, relaxed)
    if not isinstance(found, _Match):
        return found
    inside = _ancestors(tuple(program.steps), found.out)
    weight = None if found.weight is None else program.leaf_nodes[found.weight][1 if found.at_base else 0]
    if weight is not None:
        tensor = values.value(weight)
        if tensor is None or tensor.dim() != 1:
            return Refusal(Reason.WEIGHT_SHAPE, f"the weight is {None if tensor is None else tuple(tensor.shape)}")
    steps = tuple(program.nodes[i] for i in sorted(inside) if i != found.out)
    proof = Proof(tuple(program.steps), tuple(program.leaves), found.out, found.weight, found.at_base)
    return NormForm(program.nodes[found.out], weight, found.eps, found.flavour, found.exact, steps, proof)


def forget() -> None:
    """Empty the memo (for tests and benchmarks)."""
    _analyse.cache_clear()
