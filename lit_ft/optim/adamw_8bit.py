"""AdamW with 8-bit moments, for parameters that are whole or sharded by rows."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from lit_ft.tensors.quantized_state import as_float, zeros_8bit
from lit_ft.tensors.row_blocks import row_blocks, rows_of
from lit_ft.tensors.sharding import local


class RowwiseAdamW8bit(Optimizer):
    """torchao's AdamW8bit, with results that are the same bit for bit on any number of ranks.

    A moment takes one byte per element, and one float32 scale per block (Dettmers et al.,
    arXiv:2110.02861). In torchao's class, each rank cuts its shard into blocks of 256 elements that
    may cross rows, so the blocks change with the number of ranks. A rank whose shard does not
    divide into whole blocks keeps its moments in float32. In this class, no block crosses the end
    of a row, and the state is plain tensors, which any checkpoint can hold. The update itself is
    torchao's, in float32.

    Args:
        params: The parameters to step, as tensors, named tensors or groups.
        lr: The learning rate.
        betas: The decay rates of the first and second moments.
        eps: The number added to the square root of the second moment.
        weight_decay: The decoupled weight decay, which is multiplied by the learning rate.
        compiled: Whether to compile the update with torch.compile; None compiles if there is a GPU.
            Compiling takes seconds for each shape, and replaces about fifty kernels with a few. It
            needs Triton, or a C++ compiler for parameters on the CPU.

    Raises:
        ValueError: If an option is out of range, or, while stepping, if a parameter is sharded by
            its columns.
        ModuleNotFoundError: If torchao is not installed.
    """

    def __init__(
        self,
        params: ParamsT,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        compiled: bool | None = None,
    ) -> None:
        for name, value, limit in (
            ("lr", lr, float("inf")),
            ("betas[0]", betas[0], 1.0),
            ("betas[1]", betas[1], 1.0),
            ("eps", eps, float("inf")),
            ("weight_decay", weight_decay, float("inf")),
        ):
            if not 0 <= value < limit:
                raise ValueError(f"{name}={value}: give a number in [0, {limit}).")
        compiled = torch.cuda.is_available() if compiled is None else compiled
        self._update = _update(compiled)
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient; large parameters a few rows at a time."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_one(parameter, group)
        return loss

    def _step_one(self, parameter: Tensor, group: dict[str, Any]) -> None:
        assert parameter.grad is not None
        state = self.state[parameter]
        if "step" not in state:
            state["step"] = torch.tensor(0.0)
            state.update(zeros_8bit("exp_avg", parameter))
            state.update(zeros_8bit("exp_avg_sq", parameter))
        state["step"] += 1
        weight, gradient = local(parameter), local(parameter.grad)
        held = {key: local(v) if isinstance(v, Tensor) else v for key, v in state.items()}
        for rows in row_blocks(weight):
            part = rows_of(held, tuple(weight.shape), rows) if weight.ndim else held
            self._update(
                weight[rows] if weight.ndim else weight,
                gradient[rows] if weight.ndim else gradient,
                state["step"],
                as_float("exp_avg", part),
                as_float("exp_avg_sq", part),
                None,  # no amsgrad
                torch.tensor(group["lr"]),  # as a number, each new rate would need a new graph
                *group["betas"],
                group["weight_decay"],
                group["eps"],
                True,  # AdamW's decay
                False,  # bfloat16 weights: see lit_ft.optim.rounded
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        # torch's method would cast the state, including its codes, to the parameter's dtype.
        super().load_state_dict({**state_dict, "state": {}})
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        held = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, parameter in zip(saved, held, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                moves = isinstance(value, Tensor) and key != "step"
                self.state[parameter][key] = value.to(parameter.device) if moves else value


@cache
def _update(compiled: bool) -> Callable[..., None]:
    try:
        from torchao.optim.adam import single_param_adam
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "The 8-bit AdamW takes its update from torchao, which is not installed: pip install "
            "torchao."
        ) from error
    update: Callable[..., None] = single_param_adam
    if compiled:
        # One graph for each shape, because dynamic sizes are ten times slower.
        options: dict[str, Any] = {"dynamic": False, "recompile_limit": 2**16}
        update = torch.compile(update, fullgraph=True, **options)
    return update
