"""Step parameters one by one, large ones a few rows at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_ft.compat.optimizers import traits_of
from lit_ft.optim.narrowed import narrowed
from lit_ft.tensors.row_blocks import put_rows, row_blocks, rows_of
from lit_ft.tensors.sharding import is_sharded

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)


def row_chunked(optimizer: AnyOptimizer) -> AnyOptimizer:
    """Make bitsandbytes' 8-bit optimizers step a few rows at a time on the CPU.

    Their step on the CPU holds about five float32 copies of a parameter at once. For the largest
    parameter, this is more than its gradient and state. Stepping a few rows at a time gives the
    same result bit for bit. All other optimizers are returned unchanged: fused steps need no
    copies, and neither do bitsandbytes' steps on a GPU.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    in_copies = traits_of(type(optimizer)).copies_on_cpu and _steps_rows(optimizer)
    large = any(p.device.type == "cpu" and len(row_blocks(p)) > 1 for p in parameters)
    if in_copies and large and not isinstance(optimizer, RowChunked):
        take_class(optimizer, RowChunked)
    return optimizer


class RowChunked(Optimizer):
    """A mixin that `take_class` adds to an optimizer's class, to step some parameters one by one.

    Such a parameter is stepped one block of rows at a time, each through a stand-in: a view of the
    rows in this class, a float32 copy of them in subclasses. The state stays that of the whole
    parameter.
    """

    _own_step: Callable[[], Any]

    @Optimizer.profile_hook_step
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the parameters that need no stand-in together, then the others one by one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        apart: list[Tensor] = []
        others: list[Tensor] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    (apart if self._is_apart(parameter) else others).append(parameter)
        if others:
            with narrowed(self, *others):
                self._own_step()
        for parameter in apart:
            self._step_apart(parameter)
        return loss

    step.hooked = True  # type: ignore[attr-defined]  # tells torch not to hook the step again

    def _is_apart(self, parameter: Tensor) -> bool:
        return parameter.device.type == "cpu" and len(row_blocks(parameter)) > 1

    def _stand_in(self, parameter: Tensor, rows: slice | None) -> Tensor:
        assert parameter.grad is not None
        stand_in = torch.nn.Parameter(at(parameter.detach(), rows))
        stand_in.grad = at(parameter.grad, rows)
        return stand_in

    def _take_back(self, parameter: Tensor, rows: slice | None, stand_in: Tensor) -> None:
        """Copy the values of a stepped stand-in into the parameter's rows."""

    def _step_apart(self, parameter: Tensor) -> None:
        # An estimate steps it whole, since meta takes no memory.
        pieces = row_blocks(parameter)
        whole = len(pieces) == 1 or is_sharded(parameter) or parameter.is_meta
        with nullcontext(False) if whole else _rows_apart(self, parameter) as by_row:
            self._step_pieces(parameter, pieces if by_row else [slice(None)])

    def _step_pieces(self, parameter: Tensor, pieces: list[slice]) -> None:
        if len(pieces) == 1:
            stand_in = self._stand_in(parameter, None)
            self._step_stand_in(parameter, stand_in, self.state[parameter])
            self._take_back(parameter, None, stand_in)
            return
        shape = tuple(parameter.shape)
        before = dict(self.state[parameter])
        for rows in pieces:
            stand_in = self._stand_in(parameter, rows)
            # Counters that are tensors are incremented in place, so each piece gets its own.
            part = {
                key: value.clone() if isinstance(value, Tensor) and value.ndim == 0 else value
                for key, value in rows_of(before, shape, rows).items()
            }
            self._step_stand_in(parameter, stand_in, part)
            self._take_back(parameter, rows, stand_in)
            put_rows(self.state[parameter], part, shape, rows)

    def _step_stand_in(self, parameter: Tensor, stand_in: Tensor, state: dict[str, Any]) -> None:
        with narrowed(self, parameter):
            for group in self.param_groups:  # `narrowed` puts them back
                group["params"] = [stand_in] * len(group["params"])
            self.state[stand_in] = state
            try:
                self._own_step()
            finally:
                del self.state[stand_in]


def at(tensor: Tensor, rows: slice | None) -> Tensor:
    """Return a view of some rows of `tensor`. None returns the whole tensor, even if a scalar."""
    return tensor if rows is None else tensor[rows]


def take_class(optimizer: Optimizer, mixin: type[RowChunked], **attributes: Any) -> None:
    """Change the class of `optimizer` in place, to a subclass of `mixin` and its present class.

    Args:
        optimizer: The optimizer whose class to change.
        mixin: The class that comes first in the order of method resolution.
        **attributes: The attributes to set on `optimizer`.

    Raises:
        ValueError: If a scheduler already holds the optimizer's step.
    """
    if "step" in vars(optimizer):
        raise ValueError(
            f"A scheduler already holds this {type(optimizer).__name__}'s step: "
            "prepare the optimizer before building the scheduler."
        )
    own = type(optimizer)
    optimizer.__class__ = type(
        own.__name__,  # the name that monitors and profilers show
        (mixin, own),
        {"_own_step": without_hooks(own.step), "wrapped_class": own},
    )
    vars(optimizer).update(attributes)


def without_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return `step` without torch's wrapper for hooks, so that hooks run once per whole step."""
    plain: Callable[..., Any] = inspect.unwrap(
        step, stop=lambda function: not hasattr(function, "hooked")
    )
    return plain


@runtime_checkable
class StepsRows(Protocol):
    """An optimizer that needs to know something of all rows before it steps some of them."""

    def rows_apart(self, parameter: Tensor, group: dict[str, Any]) -> AbstractContextManager[bool]:
        """Prepare to step a few rows at a time, and yield whether they can be stepped apart."""


def _rows_apart(optimizer: Optimizer, parameter: Tensor) -> AbstractContextManager[bool]:
    """Prepare the optimizer to step some rows of a parameter; it yields whether it can."""
    if not isinstance(optimizer, StepsRows):
        return nullcontext(_steps_rows(optimizer))
    groups = optimizer.param_groups
    group = next(one for one in groups if any(p is parameter for p in one["params"]))
    return optimizer.rows_apart(parameter, group)


def _steps_rows(optimizer: Optimizer) -> bool:
    """Whether some rows of a parameter can be stepped without the others."""
    # Paged state must stay where bitsandbytes has put it.
    return traits_of(type(optimizer)).rowwise and not getattr(optimizer, "is_paged", False)
