"""Keep bfloat16 weights learning: step them in float32, and round the result stochastically.

Between 1 and 2, neighbouring bfloat16 numbers are 2^-7 apart. A norm weight at 1 therefore ignores
every update below 2^-8, because rounding to nearest takes it back to 1 each time. Stochastic
rounding rounds up with a probability equal to the remainder. It keeps the expected value (Gupta et
al., arXiv:1502.02551; for language models Zamirai et al., arXiv:2010.06192), and needs no float32
copy of the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from lit_ft.compat import remedies
from lit_ft.compat.refusal import Refusal
from lit_ft.optim.row_chunked import AnyOptimizer, RowChunked, at, take_class
from lit_ft.tensors.sharding import first_element, local
from lit_ft.tensors.stochastic_rounding import keyed_generator, round_stochastically

_FLOAT16 = (
    "float16 weights cannot be rounded stochastically: below 6e-5 they lose precision and below "
    "6e-8 they vanish, gradients too, and a loss scaler needs float32 weights"
)


def stochastically_rounded(optimizer: AnyOptimizer, *, seed: int) -> AnyOptimizer:
    """Give `optimizer`'s bfloat16 parameters float32 steps and stochastic rounding.

    The optimizer stays the same object, with its groups, state and hooks. Its class is replaced by
    a subclass. Each bfloat16 parameter is stepped by itself on a float32 copy, so its state is
    float32 (8 bytes per weight for AdamW). The copy holds a few rows at a time, or the whole
    parameter if the optimizer needs all of it, as Muon does. Other parameters take the ordinary
    step.

    The random bits depend on the seed, on the parameter's position in the optimizer, and on the
    number of times that it has been rounded. This number is saved with the state. So a resumed run
    repeats the uninterrupted one bit for bit, and layerwise updates equal whole steps.

    Args:
        optimizer: The optimizer to change. It must work with `narrowed`, and need no closure.
            Change it before building a learning-rate scheduler, because a scheduler keeps the
            `step` method that it finds.
        seed: The seed of the random bits, the same on every rank so that replicas stay equal.

    Returns:
        `optimizer` itself. It is unchanged if it has no bfloat16 parameter.

    Raises:
        ValueError: If a parameter is float16, or if a scheduler already holds the optimizer's step.
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if _has_float16(parameters):
        raise Refusal(_FLOAT16, remedies.BF16_TRUE, remedies.FP16_MIXED)
    if any(p.dtype is torch.bfloat16 for p in parameters):
        index = {p: index for index, p in enumerate(parameters)}
        take_class(optimizer, _StochasticallyRounded, _rounding_seed=seed, _rounding_index=index)
    return optimizer


class _StochasticallyRounded(RowChunked):
    """Steps bfloat16 parameters one by one, on a float32 copy of a few rows at a time."""

    _rounding_seed: int
    _rounding_index: dict[Tensor, int]
    _rounding_stay = 0  # how many times the state has started from zero; see `begin_stay`

    def _is_apart(self, parameter: Tensor) -> bool:
        return parameter.dtype is torch.bfloat16

    def _stand_in(self, parameter: Tensor, rows: slice | None) -> Tensor:
        # The parameter itself keeps its dtype throughout: changing it through .data would drop its
        # gradient accumulator, and with it the hooks through which DDP reduces gradients.
        assert parameter.grad is not None
        stand_in = torch.nn.Parameter(at(parameter.detach(), rows).float())
        stand_in.grad = at(parameter.grad, rows).float()
        return stand_in

    def _take_back(self, parameter: Tensor, rows: slice | None, stand_in: Tensor) -> None:
        # A sharded parameter comes in one piece, and each rank rounds the part that it holds.
        first_row, *columns = (rows.start,) if rows else first_element(parameter)
        first = (first_row, *columns) if any(columns) else (first_row,)
        times = self.state[parameter].get("times_rounded", 0)
        index = self._rounding_index[parameter]
        stay = (-self._rounding_stay,) if self._rounding_stay else ()  # none of the others is < 0
        key = (self._rounding_seed, *stay, index, times, *first)
        generator = keyed_generator(parameter.device, *key)
        rounded = round_stochastically(local(stand_in), generator=generator)
        local(at(parameter, rows)).copy_(rounded)

    def _step_apart(self, parameter: Tensor) -> None:
        super()._step_apart(parameter)
        state = self.state[parameter]
        state["times_rounded"] = state.get("times_rounded", 0) + 1

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
        if _has_float16(self.param_groups[-1]["params"]):
            self.param_groups.pop()
            raise Refusal(_FLOAT16, remedies.BF16_TRUE, remedies.FP16_MIXED)
        for parameter in self.param_groups[-1]["params"]:
            self._rounding_index[parameter] = len(self._rounding_index)


def begin_stay(optimizer: Optimizer, stay: int) -> None:
    """Let random bits differ from those of earlier stays, in which the state counted from zero too.

    Args:
        optimizer: The optimizer, which need not round stochastically.
        stay: The number of the stay, which replaces that of an earlier call.
    """
    if isinstance(optimizer, _StochasticallyRounded):
        optimizer._rounding_stay = stay


def _has_float16(parameters: list[Tensor]) -> bool:
    return any(parameter.dtype is torch.float16 for parameter in parameters)


@contextmanager
def _standing_in(optimizer: Optimizer, stand_ins: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """In the block, put each value of `stand_ins` in its key's place in the groups and state."""
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
