"""Keep bfloat16 weights learning: step them in float32, round the result stochastically.

Between 1 and 2 neighbouring bfloat16 numbers are 2^-7 apart, so that a norm weight at 1 ignores
every update below 2^-8: rounding to nearest takes it back to 1 each time. Rounding up with the
probability of the remainder keeps the expectation (Gupta et al., arXiv:1502.02551; for language
models Zamirai et al., arXiv:2010.06192), and needs no float32 copy of the weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_ft.optim.narrow import narrowed
from lit_ft.rounding import keyed_generator, round_stochastically

AnyOptimizer = TypeVar("AnyOptimizer", bound=Optimizer)


def stochastically_rounded(optimizer: AnyOptimizer, *, seed: int) -> AnyOptimizer:
    """Give `optimizer`'s bfloat16 parameters float32 steps and stochastic rounding.

    The optimizer stays the same object, with its groups, state and hooks; its class becomes a
    subclass of what it was. Each bfloat16 parameter is stepped by itself on a float32 copy, so its
    state is float32 (8 bytes a weight for AdamW) and the transient copies are those of the largest
    parameter. Other parameters take the ordinary step.

    The random bits depend on the seed, the parameter's position in the optimizer and the number of
    times that it was rounded. The latter is saved with its state, so a resumed run repeats the
    uninterrupted one bit for bit, and layerwise updates equal whole steps.

    Args:
        optimizer: Any optimizer that can be `narrowed` and whose step needs no closure. Wrap it
            before a learning-rate scheduler sees it: schedulers hold on to the step they find.
        seed: The same on every rank, so that replicas stay equal.

    Returns:
        `optimizer` itself; unchanged if it has no bfloat16 parameter.

    Raises:
        ValueError: A parameter is float16, or a scheduler already holds the optimizer's step.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    _refuse_float16(parameters)
    if not any(p.dtype is torch.bfloat16 for p in parameters):
        return optimizer
    if "step" in vars(optimizer):
        raise ValueError(
            f"A scheduler already holds this {type(optimizer).__name__}'s step: "
            "call stochastically_rounded before building the scheduler."
        )
    optimizer_class = type(optimizer)
    rounding_class: Any = type(
        optimizer_class.__name__,  # the name that monitors and profilers show
        (_StochasticallyRounded, optimizer_class),
        {"_unrounded_step": without_hooks(optimizer_class.step)},
    )
    optimizer.__class__ = rounding_class
    vars(optimizer).update(
        _rounding_seed=seed, _rounding_index={p: index for index, p in enumerate(parameters)}
    )
    return optimizer


class _StochasticallyRounded(Optimizer):
    """What `stochastically_rounded` puts in front of an optimizer's own class."""

    _unrounded_step: Callable[[], Any]
    _rounding_seed: int
    _rounding_index: dict[Tensor, int]

    @Optimizer.profile_hook_step
    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        rounded: list[Tensor] = []
        others: list[Tensor] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    half = parameter.dtype is torch.bfloat16
                    (rounded if half else others).append(parameter)
        if others:
            with narrowed(self, *others):
                self._unrounded_step()
        for parameter in rounded:
            self._step_rounded(parameter)
        return loss

    step.hooked = True  # type: ignore[attr-defined]  # torch's mark: it must not hook the step twice

    def _step_rounded(self, parameter: Tensor) -> None:
        # The parameter itself keeps its dtype throughout: changing it through .data would drop its
        # gradient accumulator, and with it the hooks through which DDP reduces gradients.
        master = torch.nn.Parameter(parameter.detach().float())
        assert parameter.grad is not None
        master.grad = parameter.grad.float()
        with narrowed(self, parameter), _standing_in(self, {parameter: master}):
            self._unrounded_step()
        state = self.state[parameter]
        times = state.get("times_rounded", 0)
        generator = keyed_generator(
            parameter.device, self._rounding_seed, self._rounding_index[parameter], times
        )
        parameter.copy_(round_stochastically(master, generator=generator))
        state["times_rounded"] = times + 1

    def load_state_dict(self, state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        # Optimizer.load_state_dict casts float state to its parameter's dtype and device. An empty
        # float32 stand-in for each bfloat16 parameter keeps float32 moments float32.
        stand_ins: dict[Tensor, Tensor] = {
            parameter: torch.nn.Parameter(
                torch.empty(0, dtype=torch.float32, device=parameter.device)
            )
            for parameter in self._rounding_index
            if parameter.dtype is torch.bfloat16
        }
        with _standing_in(self, stand_ins):
            super().load_state_dict(state_dict, *args, **kwargs)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            _refuse_float16(self.param_groups[-1]["params"])
        except ValueError:
            self.param_groups.pop()
            raise
        for parameter in self.param_groups[-1]["params"]:
            self._rounding_index[parameter] = len(self._rounding_index)


def _refuse_float16(parameters: list[Tensor]) -> None:
    if any(parameter.dtype is torch.float16 for parameter in parameters):
        raise ValueError(
            "float16 weights cannot be rounded stochastically: below 6e-5 they lose precision and "
            "below 6e-8 they vanish, gradients too, and a loss scaler needs float32 weights. "
            "Use precision=bf16-true or 16-mixed."
        )


def without_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return the optimizer step under torch's hook wrapper: hooks run once a step, around ours."""
    plain: Callable[..., Any] = inspect.unwrap(
        step, stop=lambda function: not hasattr(function, "hooked")
    )
    return plain


@contextmanager
def _standing_in(optimizer: Optimizer, stand_ins: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Let each value of `stand_ins` take its key's place in the groups and in the state."""
    _replace(optimizer, stand_ins)
    try:
        yield
    finally:
        _replace(optimizer, {stand_in: parameter for parameter, stand_in in stand_ins.items()})


def _replace(optimizer: Optimizer, replacements: Mapping[Tensor, Tensor]) -> None:
    for group in optimizer.param_groups:
        group["params"] = [replacements.get(p, p) for p in group["params"]]
    for old, new in replacements.items():
        if old in optimizer.state:
            optimizer.state[new] = optimizer.state.pop(old)
