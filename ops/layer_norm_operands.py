"""The arguments of ``tpfuse::all_reduce_add_layer_norm``: one record of them, checked in one place for every backend."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .arguments import check, check_devices, check_order, check_partial, refuse_gradients
from .layer_norm_flavour import LayerNormFlavour
from .layer_norm_reference import add_layer_norm, output_dtype
from .reference import DTYPES, sum_dtype

NAME = "all_reduce_add_layer_norm"


class LayerNormOperands(NamedTuple):
    """The arguments of one call in the schema's order, the flavour parsed."""

    x: Tensor
    residual: Tensor | None
    weight: Tensor | None
    norm_bias: Tensor | None
    bias: Tensor | None
    addend: Tensor | None
    eps: float
    scale: float
    flavour: LayerNormFlavour
    group_name: str
    partial_addend: bool = False
    addend_bias: Tensor | None = None
    residual_first: bool = False

    @classmethod
    def of(cls, *args: Any, same: Callable[[Any, Any], bool] = operator.eq, **kwargs: Any) -> LayerNormOperands:
        """From what the dispatcher gives, the flavour as text; checked.

        Args:
            same: compares two shapes; another one than ``==`` where sizes may be symbols.
        Raises:
            ValueError: a shape, dtype or flavour does not fit.
            RuntimeError: autograd would have to record the op.
        """
        given = cls(*args, **kwargs)
        given = given._replace(flavour=LayerNormFlavour.parse(str(given.flavour)))
        given.check(same)
        return given

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to which the sum over ranks is rounded, in which everything behind it is given."""
        return sum_dtype(self.x, self.residual)

    def check(self, same: Callable[[Any, Any], bool] = operator.eq) -> None:
        """Raise as :meth:`of` does."""
        refuse_gradients(self.x, self.residual, self.weight, self.bias, name=NAME)
        behind = (("norm_bias", self.norm_bias), ("addend", self.addend), ("addend_bias", self.addend_bias))
        for name, tensor in behind:
            if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
                raise RuntimeError(
                    f"{NAME} is for inference only and has no gradient, but {name} requires grad; call it under "
                    "torch.no_grad() or torch.inference_mode(), or detach its operands"
                )
        added = self.addend
        if added is not None and (added.dtype != self.dtype or not same(tuple(added.shape), tuple(self.x.shape))):
            raise ValueError(f"{NAME}: addend is {_text(added)}; expected {self.dtype} of shape {tuple(self.x.shape)}")
        check(self.x, self.residual, self.weight, self.bias, self.flavour.scaling, False, same, NAME)
        check_devices(NAME, self.x, self.norm_bias, self.addend, self.addend_bias)
        self._check_two_sums(same)
        shift = self.norm_bias
        if (shift is None) != (self.flavour.shift == "none"):
            raise ValueError(
                f"{NAME}: norm_bias is {_text(shift)}, but the flavour's shift is {self.flavour.shift!r}; pass a norm_bias of "
                "shape (H,) exactly when the shift is 'bias'"
            )
        if shift is not None and (shift.dtype not in DTYPES or not same(tuple(shift.shape), (self.x.shape[-1],))):
            raise ValueError(f"{NAME}: norm_bias is {_text(shift)}; expected a vector of shape ({self.x.shape[-1]},)")
        if self.flavour.moments == "native":
            self._check_native()

    def _check_two_sums(self, same: Callable[[Any, Any], bool]) -> None:
        check_partial(NAME, "addend", "partial_addend", self.x, self.addend, self.partial_addend, self.dtype, same)
        if self.residual_first:
            check_order(NAME, "partial_addend", self.partial_addend, self.residual, self.scale != 1.0)
        vector, hidden = self.addend_bias, self.x.shape[-1]
        if vector is None:
            return
        if not self.partial_addend:
            raise ValueError(f"{NAME}: addend_bias is added to a sum over the ranks; it needs partial_addend=True")
        if vector.dtype != self.x.dtype or not same(tuple(vector.shape), (hidden,)):
            raise ValueError(f"{NAME}: addend_bias is {_text(vector)}; expected {self.x.dtype} of shape ({hidden},)")

    def reduced(self, summed: Callable[[Tensor, str, torch.dtype], Tensor]) -> tuple[Tensor, LayerNormOperands]:
        """The sum of ``x``, and the operands with the sum of an addend that is a partial one.

        Args:
            summed: (partial sum, name of the group, dtype) -> the sum over its ranks, rounded to the dtype.
        """
        total = summed(self.x.contiguous(), self.group_name, self.dtype)
        if not self.partial_addend or self.addend is None:
            return total, self
        return total, self._replace(
            addend=summed(self.addend.contiguous(), self.group_name, self.dtype), partial_addend=False
        )

    def _check_native(self) -> None:
        """What torch's operator asks of weight and bias: one dtype, that of its operand or, of a 16-bit one, fp32."""
        operand = torch.float32 if self.flavour.compute == "float32" else self.dtype
        gain = {"own": None, "float32": torch.float32, "input": self.dtype}[self.flavour.gain_dtype]
        dtypes = [] if self.weight is None else [gain or self.weight.dtype]
        dtypes += [] if self.norm_bias is None else [self.norm_bias.dtype]
        valid = {operand, torch.float32} if operand.itemsize == 2 else {operand}
        if len(set(dtypes)) > 1 or not set(dtypes) <= valid:
            raise ValueError(
                f"{NAME}: aten.native_layer_norm of {operand} would get weight and norm_bias of {dtypes}; expected one dtype of "
                f"{sorted(map(str, valid))} for both"
            )

    @property
    def after_the_sum(self) -> tuple[Any, ...]:
        """What :func:`tpfuse.ops.layer_norm_reference.add_layer_norm` takes besides the sum."""
        operands = self.residual, self.weight, self.norm_bias, self.bias, self.addend
        return *operands, self.eps, self.scale, self.flavour, self.addend_bias, self.residual_first

    @property
    def reference(self) -> Callable[..., tuple[Tensor, Tensor]]:
        """What the op does behind the sum: takes the sum and :attr:`after_the_sum`."""
        return add_layer_norm

    @property
    def result_dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Of normed and residual_out."""
        weight, shift = (None if t is None else t.dtype for t in (self.weight, self.norm_bias))
        return output_dtype(self.dtype, weight, shift, self.flavour), self.dtype


def _text(tensor: Tensor | None) -> str:
    return "None" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
