"""What a program means: sympy decides whether some step is ``s * g / sqrt(mean(s**2) + eps)``, or a LayerNorm, or what else."""

from __future__ import annotations

from typing import Any

import sympy
import torch

from .expression import Leaf, Ref, Step
from .operators import REDUCTIONS
from .reasons import Reason, Refusal

S = sympy.Symbol("s", real=True)
Q = sympy.Symbol("mean_s2", positive=True)
M = sympy.Symbol("mean_s", real=True)
V = sympy.Symbol("var_s", positive=True)  # biased
D = sympy.Symbol("s_less_mean", real=True)


def _number(constant: float | int) -> sympy.Rational:
    return sympy.Rational(constant)


class Meaning:
    """A program interpreted over sympy symbols.

    Attributes:
        exprs: one expression a step; None where a step is not expressible.
        notes: near misses seen on the way, by reason.
    """

    def __init__(self, steps: tuple[Step, ...], leaves: tuple[Leaf, ...], hidden: int) -> None:
        self.steps, self.leaves, self.hidden = steps, leaves, hidden
        self.notes: dict[Reason, str] = {}
        self.opaque = 0
        self.moved = False  # whether a step adds columns to what then is no norm of s any more
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
            return self._variance(step, a) if step.kind == "variance" else self._layer_norm(step, a)
        if step.kind == "item":
            if isinstance(a, sympy.Tuple):
                return a[step.args[1]]
            return a if step.args[1] == 0 else None
        if a is None or isinstance(a, sympy.Tuple):
            return None
        if not step.layout and step.kind not in ("same", "part", "mean", "sum", "norm2"):
            self.notes.setdefault(Reason.UNKNOWN_NORM, f"{step.target} joins a statistic of each row with columns")
            return None
        if step.kind in {"same", "part"}:
            if step.kept and step.layout not in ("", "part"):
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
            if not step.layout:
                # A sum of plain values over another dimension (that over experts, say) is no norm of any kind.
                if not step.last_dim and (step.kind == "norm2" or sympy.expand(a).has(S**2)):
                    self.notes[Reason.MEAN_DIM] = f"{step.target} does not reduce just the last dimension"
                elif step.last_dim and any(str(x).startswith("part") for x in a.free_symbols):
                    self._mean(a)  # for its notes
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
        if step.kind in ("add", "sub") and (self._moved(a, b) or self._moved(b, a)):
            self.moved = True
            return None
        return {"mul": a * b, "div": a / b, "add": a + b, "sub": a - b}[step.kind]

    def _moved(self, a: Any, b: Any) -> bool:
        """Whether no norm of ``s`` is left of ``a`` once ``b``, a value a column, is added: only behind a LayerNorm is one added.

        A residual stream of one row adds as many vectors as the model has sublayers, and sympy would multiply all of them out.
        """
        if not a.has(S) or not self._column(b):
            return False
        return not a.has(M, V) or any(self._column(term) for term in sympy.Add.make_args(a))

    def _column(self, expr: Any) -> bool:
        return not expr.has(S, Q, M, V) and any(str(x).startswith("w") for x in expr.free_symbols)

    def _fused(self, step: Step, a: Any) -> Any:
        shape, weight, eps = ([*list(step.args[1:]), None, None])[:3]
        if tuple(shape) != (self.hidden,):
            self._over_other_sizes(step, shape)
            return None
        if a != S:
            return None
        gain = self._operand(weight) if weight is not None else 1
        return S * gain / sympy.sqrt(Q + _number(fused_eps(eps, step.dtype)))

    def _variance(self, step: Step, a: Any) -> Any:
        """(variance, mean) of values that are proportional to ``s``; the variance alone for an operator that gives no mean."""
        factor = None if a is None or isinstance(a, sympy.Tuple) else sympy.cancel(a / S)
        if factor is None or not step.layout or factor.has(S) or not self._plain(factor):
            return None
        if step.args[1] != 0:
            self.notes[Reason.LAYER_NORM] = (
                f"{step.target} with correction={step.args[1]} divides by H - {step.args[1]}"
            )
            return None
        variance = factor**2 * V
        return sympy.Tuple(variance, factor * M) if step.dtype is None else variance

    def _over_other_sizes(self, step: Step, shape: Any) -> None:
        reason = Reason.PARTIAL_WIDTH if len(shape) == 1 else Reason.MEAN_DIM
        self.notes[reason] = f"{step.target} normalizes over {tuple(shape)}, the width is {self.hidden}"

    def _layer_norm(self, step: Step, a: Any) -> Any:
        shape, weight, bias, eps = step.args[1:5]
        if tuple(shape) != (self.hidden,):
            del self.notes[Reason.LAYER_NORM]  # this says more
            self._over_other_sizes(step, shape)
            return None
        if a != S or isinstance(eps, Ref):
            return None
        gain = 1 if weight is None else self._operand(weight)
        return (S - M) * gain / sympy.sqrt(V + _number(eps)) + (0 if bias is None else self._operand(bias))

    def _plain(self, expr: Any) -> bool:
        return not any(str(x).startswith(("part", "w")) for x in expr.free_symbols)

    def _mean(self, inner: Any) -> Any:
        inner = sympy.expand(inner)
        if not inner.has(S) and not any(str(x).startswith(("part", "w")) for x in inner.free_symbols):
            return inner
        factor = sympy.cancel(inner / S**2)
        if not factor.has(S) and not any(str(x).startswith(("part", "w")) for x in factor.free_symbols):
            return factor * Q
        if inner.has(M):
            factor = sympy.cancel(inner / (S - M) ** 2)
            if not factor.has(S) and self._plain(factor):
                return factor * V
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
                self._note_symbolic_eps()
                continue
            if eps_free or not eps.is_real or eps < 0:
                continue
            sample = {S: 2, Q: 3, **dict.fromkeys(self.weights.values(), 5)}
            if expr.subs(sample) > 0:  # the square forgets the sign
                return g, eps
        return None

    def affine(self, expr: Any) -> tuple[Any, Any, Any] | None:
        """(g, eps, b) when ``expr`` equals ``(s - mean(s)) * g / sqrt(var(s) + eps) + b``, else None."""
        if expr is None or isinstance(expr, sympy.Tuple) or not expr.has(S) or not expr.has(V):
            return None
        vectors = [self.weights[i] for i, leaf in enumerate(self.leaves) if leaf.shape == "vector"]
        expr = expr.subs(S, M + D)
        b = expr.subs(D, 0)  # what is left where every value is the mean
        if b not in (0, *vectors):
            return None
        squared = (expr - b) ** 2
        if squared == 0:
            return None
        for g in (sympy.Integer(1), *(x for w in vectors if expr.has(w) for x in (w, 1 + w))):
            eps = D**2 * g**2 / squared - V
            eps = sympy.cancel(eps) if eps.free_symbols else eps
            if eps.free_symbols and all(str(x).startswith("c") for x in eps.free_symbols):
                self._note_symbolic_eps()
                continue
            if eps.free_symbols or not eps.is_real or eps < 0:
                continue
            sample = {D: 2, M: 1, V: 4, **dict.fromkeys(self.weights.values(), 5)}
            if (expr - b).subs(sample) > 0:  # the square forgets the sign
                return g, eps, b
        return None

    def _note_symbolic_eps(self) -> None:
        """``(c * s) / sqrt(mean((c * s)**2) + eps)`` is the norm of ``s`` with ``eps / c**2``: unknown is then the scale."""
        for step in self.steps:
            refs = [a for a in step.args if isinstance(a, Ref)]
            scalar = any(r.kind == "leaf" and self.leaves[r.index].shape == "scalar" for r in refs)
            if step.kind in ("mul", "div") and scalar and any(self._is_s(r) for r in refs):
                self.notes[Reason.SCALE_NOT_CONSTANT] = "the sum is multiplied by a scalar tensor before the norm"
                return
        self.notes[Reason.EPS_NOT_CONSTANT] = "eps is a tensor or a symbolic number of the graph"

    def _is_s(self, ref: Ref) -> bool:
        return ref.kind == "s" or (ref.kind == "step" and self.exprs[ref.index] == S)

    def miss(self) -> Refusal | None:
        """Why no step is a norm, most telling reason first; None when nothing here even looks like one."""
        seen = tuple(dict.fromkeys(s.kind for s in self.steps if s.kind not in ("same", "item")))
        priority = (
            Reason.LAYER_NORM,
            Reason.MEAN_DIM,
            Reason.PARTIAL_WIDTH,
            Reason.WEIGHT_INSIDE_MEAN,
            Reason.SCALE_NOT_CONSTANT,
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
                        f"the value is divided by {_shown(power.base)}, expected sqrt(mean + eps)",
                        seen,
                    )
        if any(s.kind in REDUCTIONS and (s.layout or s.kind == "norm2") for s in self.steps):
            if Reason.UNKNOWN_NORM in self.notes:
                return Refusal(Reason.UNKNOWN_NORM, self.notes[Reason.UNKNOWN_NORM], seen)
            last = next((e for e in reversed(self.exprs) if e is not None), None)
            if last is None and self.moved:
                return None
            return Refusal(
                Reason.UNKNOWN_NORM, f"matched up to {seen[-1] if seen else 'nothing'}: {_shown(last)}", seen
            )
        return None


def _shown(expr: Any) -> Any:
    """An expression for people: numbers such as an eps as decimals, which sympy holds as fractions."""
    if expr is None:
        return None
    fractions = [n for n in expr.atoms(sympy.Rational) if n.q > 1000]
    return expr.subs({n: sympy.Float(n, 6) for n in fractions})


def fused_eps(eps: float | None, out: torch.dtype | None) -> float:
    """The eps that ``rms_norm`` uses for None: that of its accumulation dtype."""
    if eps is not None:
        return eps
    return torch.finfo(torch.float64 if out == torch.float64 else torch.float32).eps
