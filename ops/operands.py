"""The op's arguments as one record, parsed and checked."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import NAME, check, check_order, check_partial, check_scale, refuse_gradients
from .flavour import Flavour
from .reference import add_rms_norm, output_dtype, residual_dtype, sum_dtype


class Operands(NamedTuple):
    """The arguments of one call in the schema's order, the flavour parsed."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float
    scale: float
    flavour: Flavour
    post_norm: bool
    group_name: str
    scale_tensor: Tensor | None = None
    scale_first: bool = False
    partial_bias: bool = False
    residual_first: bool = False

    @classmethod
    def of(cls, *args: Any, same: Callable[[Any, Any], bool] = operator.eq, **kwargs: Any) -> Operands:
        """From what the dispatcher gives, the flavour as text; checked.

        Args:
            same: as for :func:`check`.
        Raises:
            ValueError: a shape, dtype or flavour does not fit.
            RuntimeError: autograd would have to record the op.
        """
        given = cls(*args, **kwargs)
        given = given._replace(flavour=Flavour.parse(str(given.flavour)))
        refuse_gradients(given.x, given.residual, given.weight, given.bias, given.scale_tensor)
        check(given.x, given.residual, given.weight, given.bias, given.flavour, given.post_norm, same)
        check_scale(given.x, given.scale, given.scale_tensor, given.dtype, same)
        if given.partial_bias or given.residual_first:
            given.check_two_sums(same)
        return given

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to which the sum over ranks is rounded, in which everything behind it is given."""
        return sum_dtype(self.x, self.residual)

    def check_two_sums(self, same: Callable[[Any, Any], bool] = operator.eq) -> None:
        """Raise ``ValueError`` unless a bias that is a partial sum, and an order of additions, are such as the op takes."""
        check_partial(NAME, "bias", "partial_bias", self.x, self.bias, self.partial_bias, self.dtype, same)
        if self.residual_first:
            scaled = self.scale != 1.0 or self.scale_tensor is not None or self.scale_first
            check_order(NAME, "partial_bias", self.partial_bias, self.residual, scaled)
            if self.post_norm or self.flavour.reads == "unrounded":
                raise ValueError(
                    f"{NAME}: residual_first=True adds both sums to the residual, each sum rounded, before the norm; got "
                    f"post_norm={self.post_norm} and a flavour that reads {self.flavour.reads!r}; expected False and 'rounded'"
                )

    def reduced(self, summed: Callable[[Tensor, str, torch.dtype], Tensor]) -> tuple[Tensor, Operands]:
        """The sum of ``x``, and the operands with the sum of a bias that is a partial one.

        Args:
            summed: (partial sum, name of the group, dtype) -> the sum over its ranks, rounded to the dtype.
        """
        total = summed(self.x.contiguous(), self.group_name, self.dtype)
        if not self.partial_bias or self.bias is None:
            return total, self
        return total, self._replace(
            bias=summed(self.bias.contiguous(), self.group_name, self.dtype), partial_bias=False
        )

    @property
    def after_the_sum(self) -> tuple[Any, ...]:
        """What :func:`tpfuse.ops.reference.add_rms_norm` takes besides the sum."""
        more = self.scale_tensor, self.scale_first, self.residual_first
        return self.residual, self.weight, self.bias, self.eps, self.scale, self.flavour, self.post_norm, *more

    @property
    def reference(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """What the op does behind the sum: takes the sum and :attr:`after_the_sum`."""
        return add_rms_norm

    @property
    def result_dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of normed and residual_out."""
        weight, residual = (None if t is None else t.dtype for t in (self.weight, self.residual))
        normed = output_dtype(self.dtype, weight, self.flavour)
        return normed, residual_dtype(self.dtype, normed, self.post_norm, residual)
