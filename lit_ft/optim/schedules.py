"""Learning-rate schedules: a warm-up in front of any of transformers' schedule functions."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_ft.compat import remedies
from lit_ft.compat.optimizers import traits_of
from lit_ft.compat.ranges import NonNegative
from lit_ft.compat.refusal import Refusal

LENGTH_UNKNOWN = 10**9  # steps; a stand-in until `rebuilt` knows the length
OBEYED = ("lr", "weight_decay", "betas", "eps", "momentum")


@dataclass(frozen=True)
class WarmupSchedule:
    """Builds a scheduler for a run of a known length.

    With w warm-up steps, warm-up step k (counted from 0) runs at (k + 1) / (w + 1) of the learning
    rate. Step w runs at the full rate, and later steps follow transformers' function. Used by
    itself, such a function runs step 0 at a rate of zero, which wastes a batch.

    Attributes:
        schedule: A transformers schedule function with its options bound, such as
            `partial(get_cosine_with_min_lr_schedule_with_warmup, min_lr_rate=0.1)`. It takes the
            optimizer, num_warmup_steps and perhaps num_training_steps, and returns a LambdaLR.
        warmup: The length of the warm-up: a fraction of the run if below 1, otherwise a number of
            optimizer steps.

    Raises:
        ValueError: If `warmup` is negative, or if it is above 1 and not a whole number.
    """

    schedule: Callable[..., LambdaLR]
    warmup: NonNegative

    def __post_init__(self) -> None:
        if not (0 <= self.warmup < 1 or (self.warmup >= 1 and float(self.warmup).is_integer())):
            raise ValueError(
                f"warmup={self.warmup}: give a fraction of the run in [0, 1) "
                "or a whole number of steps."
            )

    @property
    def name(self) -> str:
        """The kind of schedule, from the name of its function, such as "cosine"."""
        function = getattr(self.schedule, "func", self.schedule)
        return str(function.__name__).removeprefix("get_").partition("_")[0]

    def num_warmup_steps(self, num_training_steps: int) -> int:
        """Return how many of `num_training_steps` optimizer steps are below the full rate."""
        if self.warmup < 1:
            return min(math.ceil(self.warmup * num_training_steps), num_training_steps - 1)
        return int(self.warmup)

    def __call__(self, optimizer: Optimizer, num_training_steps: float) -> LambdaLR:
        """Return a scheduler for `optimizer`; call its `step()` after each optimizer step.

        Args:
            optimizer: The optimizer. The learning rates of its groups are the peaks.
            num_training_steps: The number of optimizer steps in the whole run, including those
                before a resume. Lightning gives it as `trainer.estimated_stepping_batches`.

        Raises:
            ValueError: If the number of steps is unknown, or if the warm-up does not end within it.
        """
        if not (math.isfinite(num_training_steps) and num_training_steps >= 1):
            raise Refusal(
                f"A schedule needs the run's length, which is {num_training_steps} steps here",
                remedies.MAX_STEPS,
            )
        length = int(num_training_steps)
        warmup = self.num_warmup_steps(length)
        if warmup >= length:
            raise Refusal(
                f"A warm-up of {warmup} steps does not end within {length} steps",
                remedies.SHORTER_WARMUP,
            )
        # These functions give step 0 a rate of zero: ask for one step more, and start after it.
        lengths = {"num_warmup_steps": warmup + 1, "num_training_steps": length + 1}
        accepted = inspect.signature(self.schedule).parameters
        curve = self.schedule(
            optimizer, **{name: steps for name, steps in lengths.items() if name in accepted}
        )
        return _OfThisLength(optimizer, curve.lr_lambdas, last_epoch=0)


class _OfThisLength(LambdaLR):
    """A LambdaLR that resumes at the rate of its own curve, not at the saved rate.

    The saved rate belongs to the length of the saved run. The restored optimizer holds it, so the
    first resumed step would use it (and it is zero after the end of a linear schedule).
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._last_lr = [
            base_lr * rate(self.last_epoch)
            for base_lr, rate in zip(self.base_lrs, self.lr_lambdas, strict=True)
        ]
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr


def obey_options(optimizer: Optimizer, options: Sequence[Mapping[str, Any]]) -> list[str]:
    """Set the options of an optimizer's groups to those of this run, after a checkpoint was loaded.

    Args:
        optimizer: The optimizer, whose groups hold the options of the checkpoint's run.
        options: The options of this run for each group, keyed by name. `lr` is the peak rate of the
            schedule.

    Returns:
        The changes, each as a phrase such as "lr 0.0002 (was 0.0001)".
    """
    changed: dict[str, None] = {}
    for group, wanted in zip(optimizer.param_groups, options, strict=True):
        for name, value in wanted.items():
            saved = "initial_lr" if name == "lr" and "initial_lr" in group else name
            was = group.get(saved, value)
            if _plain(was) == value:
                continue
            changed[f"{name} {value} (was {_plain(was)})"] = None
            if saved == "initial_lr":
                group["lr"] *= value / was if was else 0.0
            if isinstance(was, Tensor):
                was.fill_(value)
            else:
                group[saved] = value
    return list(changed)


def options_of(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the options of a new optimizer's groups that `obey_options` sets, as plain values."""
    own_rate = traits_of(type(optimizer)).own_rate  # then `lr` only reports the last step
    return [
        {
            name: _plain(group[name])  # a schedule writes into a rate that is a tensor
            for name in OBEYED
            if name in group and not (own_rate and name == "lr")
        }
        for group in optimizer.param_groups
    ]


def rebuilt(
    schedule: Callable[[Optimizer, float], Any],
    optimizer: Optimizer,
    num_training_steps: float,
    restored: Any,
) -> Any:
    """Return a scheduler for a run whose length has become known, at the place of a restored one.

    Args:
        schedule: Builds the scheduler from the optimizer and the number of steps.
        optimizer: The optimizer; the `initial_lr` of its groups are the peaks.
        num_training_steps: The number of optimizer steps in the whole run.
        restored: The scheduler that was built with a stand-in for the length, with the state of the
            checkpoint.
    """
    state, rates = restored.state_dict(), [group["lr"] for group in optimizer.param_groups]
    scheduler = schedule(optimizer, num_training_steps)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate  # building a scheduler sets the rates of step 0
    state["base_lrs"] = [group["initial_lr"] for group in optimizer.param_groups]
    scheduler.load_state_dict(state)
    return scheduler


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):  # a compiled optimizer's rate
        return value.item()
    return tuple(value) if isinstance(value, list) else value
