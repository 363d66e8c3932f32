"""Stop, or skip the step, before a gradient that is not finite reaches the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lit_ft.callbacks._support.finite import gathered, on_any_rank
from lit_ft.callbacks._support.trainer import callbacks_of, loss_scaler
from lit_ft.callbacks.galore import GaLore
from lit_ft.compat.not_finite import NotFinite, of_gradients, of_loss, of_validation
from lit_ft.compat.refusal import Remedy
from lit_ft.distributed.plan import Misconfiguration, check_run
from lit_ft.tensors.finite import not_finite, seem_finite


class StopOnNonFinite(Callback):
    """Look at losses and gradients before each step, and let nothing through that is not finite.

    The error names the step, the layers, and the rows of the step if batches name them (see
    `TokenBatch.origins`), else the numbers of the batches. If some micro-batches of a step have a
    loss that is not finite, only their rows are named. All ranks stop together. A validation whose
    result is not finite ends the fit too.

    A skipped step leaves weights, optimizer and subspaces as they were. It counts as a step: the
    schedule and the trainer's step go on. Under float16's loss scaler, which itself skips steps
    whose gradient overflows, a gradient is faulty only if it overflows with a scale below 1.

    List it before `GaLore`, which computes with the gradients of a step. `LayerwiseUpdate` looks at
    the gradients that it steps itself; this callback adds the rows to its error.

    Args:
        action: Whether to stop the fit at the first step that is not finite ("stop"), or to skip
            such steps ("skip").
        limit: The number of such steps in a row at which the fit stops even if it skips them.
        monitor: The name of the logged metric that is the result of a validation.

    Attributes:
        skipped: The number of skipped steps.

    Raises:
        FloatingPointError: If a loss, a gradient or the result of a validation is not finite.
        Misconfiguration: If steps are to be skipped under layerwise updates, or if `GaLore` is
            listed first.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(
        ...     callbacks=[StopOnNonFinite("skip", limit=3)], logger=False, accelerator="cpu"
        ... )
    """

    def __init__(
        self,
        action: Literal["stop", "skip"] = "stop",
        limit: int = 10,
        monitor: str = "val_loss",
    ) -> None:
        if action not in ("stop", "skip"):
            raise ValueError(f"action must be 'stop' or 'skip', not {action!r}")
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < 1:
            raise ValueError(f"limit must be a whole number of steps, at least 1, not {limit!r}")
        self.action = action
        self.limit = limit
        self.monitor = monitor
        self.skipped = 0
        self._in_a_row = 0
        self._step = -1  # the trainer's step to which the following belong
        self._rows: list[Sequence[str]] = []  # of each micro-batch
        self._losses: list[Tensor] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to skip steps where they cannot be skipped."""
        if stage != "fit":
            return
        own = self.plan_facts(trainer, pl_module)
        check_run(trainer, pl_module, parts=["layerwise"], **own)
        callbacks = callbacks_of(trainer)
        ahead = callbacks[: callbacks.index(self)]
        if self.action == "skip" and any(isinstance(one, GaLore) for one in ahead):
            raise Misconfiguration(
                "GaLore computes with a step's gradients before StopOnNonFinite can skip the step",
                Remedy("list StopOnNonFinite before GaLore"),
            )

    def plan_facts(self, trainer: Trainer, module: LightningModule) -> dict[str, Any]:
        """Return whether steps may be skipped."""
        return {"skips_steps": self.action == "skip"}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Note the rows of the batch."""
        if self._step != trainer.global_step:
            self._step = trainer.global_step
            self._rows.clear()
            self._losses.clear()
        rows = batch.get("origins") if isinstance(batch, Mapping) else None
        self._rows.append(rows or [f"batch {batch_idx} of epoch {trainer.current_epoch}"])

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Note the loss, without waiting for the device."""
        self._losses.append(loss.detach())

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Stop, or leave the step out, if a loss or a gradient of this step is not finite."""
        error = self._error(trainer, pl_module, optimizer)
        if error is None:
            self._in_a_row = 0
            return
        if self.action == "stop":
            raise error
        self._in_a_row += 1
        if self._in_a_row >= self.limit:
            error.why += f", for {self._in_a_row} steps in a row"
            raise error
        self.skipped += 1
        error.add_rows(self._rows_of_all_ranks())
        rank_zero_warn(f"Skipped a step. {error.why}.")
        for parameter in pl_module.parameters():  # GaLore may hold gradients of frozen weights
            parameter.grad = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop if the result of the validation is not finite."""
        result = trainer.callback_metrics.get(self.monitor)
        bad = [] if result is None or trainer.sanity_checking else [result]
        if on_any_rank(trainer, ["" for value in bad if not value.isfinite()]):
            raise of_validation(self.monitor, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how many steps were skipped."""
        if self.skipped:
            rank_zero_info(f"Skipped {self.skipped} of {trainer.global_step} steps.")

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Add the rows of the step to the error, whichever part of the run has raised it."""
        if isinstance(exception, NotFinite) and trainer.training:
            exception.add_rows(self._rows_of_all_ranks())

    def state_dict(self) -> dict[str, Any]:
        """Return the counts of skipped steps."""
        return {"skipped": self.skipped, "in_a_row": self._in_a_row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue counting."""
        self.skipped = state_dict["skipped"]
        self._in_a_row = state_dict["in_a_row"]

    def _error(
        self, trainer: Trainer, module: LightningModule, optimizer: Optimizer
    ) -> NotFinite | None:
        """Return the error for what is not finite on any rank; None if all is."""
        held = {p for group in optimizer.param_groups for p in group["params"]}
        scaler = loss_scaler(trainer)
        if scaler is not None and scaler.get_scale() >= 1:
            held.clear()  # an overflow is no fault yet
        gradients = [p.grad for p in held if p.grad is not None]
        fine = seem_finite([*gradients, *self._losses])
        if trainer.strategy.reduce_boolean_decision(fine, all=True):
            return None
        named = {n: p.grad for n, p in module.named_parameters() if p in held}
        bad = on_any_rank(trainer, not_finite({n: g for n, g in named.items() if g is not None}))
        if bad:
            return of_gradients(bad, trainer.global_step)
        losses = {str(index): loss for index, loss in enumerate(self._losses)}
        if on_any_rank(trainer, not_finite(losses)):
            return of_loss(trainer.global_step)
        return None  # only the norm has overflowed

    def _rows_of_all_ranks(self) -> list[str]:
        """Return the rows of the micro-batches whose loss is not finite, or of all of them."""
        # An error before backward comes before the loss is noted here.
        losses = zip(self._rows, self._losses, strict=False)
        bad = [row for rows, loss in losses if not loss.isfinite() for row in rows]
        seen = gathered((bad, list(chain.from_iterable(self._rows))))
        return [row for bad, _ in seen for row in bad] or [row for _, all in seen for row in all]
