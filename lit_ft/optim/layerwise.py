"""Step large parameters while backward runs, and free each gradient as soon as it is used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lit_ft.optim.narrow import narrowed
from lit_ft.optim.rounding import without_hooks

# Optimizers whose step is not the sum of its parameters' steps.
_NOT_BY_PARAMETER = {
    "LBFGS": "LBFGS looks at all gradients at once",
    "ScheduleFree": "schedule-free optimizers count their steps in the groups",
    "Prodigy": "Prodigy sums over all parameters",
    "DAdapt": "D-Adaptation sums over all parameters",
}


class LayerwiseStep:
    """Makes `optimizer.step(closure)` step `parameters` inside the closure's backward pass.

    There is one optimizer, the real one: as soon as a parameter's gradient is complete, the
    optimizer, narrowed to that parameter, steps it, and the gradient is freed. What is left waits
    for the rest of `optimizer.step`, as do its hooks, and so everything that counts steps. The
    result equals the ordinary step bit for bit. LOMO (arXiv:2306.09782) does this for SGD.

    A window of several backward passes keeps its gradients until the last of them, and takes the
    ordinary step.

    With `max_norm`, call `backward(loss)` in place of `loss.backward()`: the norm over all
    parameters must be known before the first one moves, so backward runs twice over the same graph,
    first for the norm alone.

    Args:
        optimizer: Any that steps a parameter on its gradient and state alone.
        parameters: Those to step in backward: the large ones. Others of the optimizer wait.
        max_norm: Clip the gradient of all the optimizer's parameters to this norm; None: do not.
        max_value: Clip each element of a gradient to ±max_value; None: do not.

    Raises:
        ValueError: The optimizer needs more than one parameter at a time.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        parameters: Iterable[Tensor],
        *,
        max_norm: float | None = None,
        max_value: float | None = None,
    ) -> None:
        refuse_not_by_parameter(type(optimizer))
        self.optimizer = optimizer
        self.max_norm = max_norm
        self.max_value = max_value
        self.grad_norm: Tensor | None = None
        self._large = [p for p in parameters if p.requires_grad]
        self._step_without_hooks = without_hooks(type(optimizer).step)
        self._steps_now = False
        self._norms: dict[Tensor, Tensor] | None = None
        self._handles: list[RemovableHandle] = [
            optimizer.register_step_pre_hook(self._begin),
            optimizer.register_step_post_hook(self._end),
            *(p.register_post_accumulate_grad_hook(self._use) for p in self._large),  # type: ignore[no-untyped-call]
        ]

    @property
    def clips(self) -> bool:
        """Whether the backward pass that runs, or ran last, clips by norm itself."""
        return self._steps_now and self.max_norm is not None

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Back-propagate `loss`; with `max_norm` twice, see above.

        The first pass leaves `grad_norm`, the norm before clipping; after the second the gradients
        that wait are clipped with the others.
        """
        if not self.clips:
            loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]
            return
        self._norms = {}
        held = self._held()
        try:
            # To the parameters alone: other leaves (GaLore's sketches) must not count twice.
            norm_alone = {"retain_graph": True, "inputs": held}
            loss.backward(*args, **{**kwargs, **norm_alone})  # type: ignore[no-untyped-call]
            small = [p for p in held if p.grad is not None]
            self._norms.update({p: get_total_norm(_gradients([p])) for p in small})
            norms = [self._norms[p] for p in held if p in self._norms]
        finally:
            self._norms = None
        for parameter in small:
            parameter.grad = None
        self.grad_norm = get_total_norm(norms)
        loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]
        clip_grads_with_norm_(held, self.max_norm or 0.0, self.grad_norm)

    def remove(self) -> None:
        """Leave the optimizer and its parameters as they were."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _held(self) -> list[Tensor]:
        return [p for group in self.optimizer.param_groups for p in group["params"]]

    def _begin(self, optimizer: Optimizer, *_: Any) -> None:
        # The last backward pass of a window runs in the step's closure. A gradient that is there
        # before it comes from earlier passes: then the gradients are all in memory anyway.
        self._steps_now = all(p.grad is None for p in self._large)
        self.grad_norm = None

    def _end(self, optimizer: Optimizer, *_: Any) -> None:
        self._steps_now = False
        # The others are left to whoever follows the step: GaLore still looks at them.
        for parameter in self._large:
            parameter.grad = None

    def _use(self, parameter: Tensor) -> None:
        if self._norms is not None:
            self._norms[parameter] = get_total_norm(_gradients([parameter]))
        elif not self._steps_now:
            return
        else:
            self._clip(parameter)
            with narrowed(self.optimizer, parameter):
                self._step_without_hooks(self.optimizer)
        parameter.grad = None

    def _clip(self, parameter: Tensor) -> None:
        if self.grad_norm is not None and self.max_norm is not None:
            clip_grads_with_norm_(parameter, self.max_norm, self.grad_norm)
        if self.max_value is not None:
            torch.nn.utils.clip_grad_value_(parameter, self.max_value)


def large_parameters(optimizer: Optimizer, min_grad_bytes: int) -> list[Tensor]:
    """Return the optimizer's trainable parameters whose gradient takes that many bytes or more."""
    held = (p for group in optimizer.param_groups for p in group["params"])
    return [p for p in held if p.requires_grad and p.numel() * p.itemsize >= min_grad_bytes]


def refuse_not_by_parameter(kind: type) -> None:
    """Raise ValueError for a class of optimizers that cannot step one parameter at a time."""
    for base in kind.__mro__:
        for name, reason in _NOT_BY_PARAMETER.items():
            if base.__name__.startswith(name):
                raise ValueError(f"Layerwise updates do not fit: {reason}. Use update=whole.")


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in parameters if p.grad is not None]
