"""Report the validations of a run to an Optuna trial, and end the run if the trial is pruned."""

from __future__ import annotations

import math
import sys
from typing import TYPE_CHECKING

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

if TYPE_CHECKING:
    import optuna


class PruneTrial(Callback):
    """Reports each validation during `fit` to a trial, and ends the run if its pruner says so.

    The validations of a trial are its steps 1, 2, 3, ...: trials whose validations come after the
    same number of rows are compared on equal data, as a pruner expects. Optuna's own callback for
    Lightning counts epochs instead, and a fine-tuning often has only one. The first rank alone
    asks the trial, and all ranks stop together.

    Args:
        trial: The trial of a study that has a pruner.
        monitor: The metric to report, as the module logs it.

    Raises:
        optuna.TrialPruned: After a validation, if the trial is pruned. A metric that is NaN or
            infinite is not reported: what becomes of such a trial is for the caller to say.

    Example:
        >>> import lightning as L, optuna
        >>> study = optuna.create_study(pruner=optuna.pruners.SuccessiveHalvingPruner(1))
        >>> trainer = L.Trainer(
        ...     callbacks=[PruneTrial(study.ask())], logger=False, accelerator="cpu"
        ... )
    """

    def __init__(self, trial: optuna.Trial, *, monitor: str = "val_loss") -> None:
        self.trial = trial
        self.monitor = monitor
        self._validations = 0

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the metric; the last validation of a run is too late to end it."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        self._validations += 1
        is_pruned = trainer.is_global_zero and self._is_pruned(trainer)
        if trainer.strategy.broadcast(is_pruned) and not _is_over(trainer):
            from optuna import TrialPruned

            raise TrialPruned(
                f"{self.monitor} was worse than that of other trials after as many rows, "
                f"at step {trainer.global_step}"
            )

    def _is_pruned(self, trainer: Trainer) -> bool:
        value = float(trainer.callback_metrics[self.monitor])
        if not math.isfinite(value):
            return False
        self.trial.report(value, self._validations)
        return self.trial.should_prune()


def is_pruned(error: BaseException | None) -> bool:
    """Return whether an error is that of a pruned trial; it never imports Optuna."""
    optuna = sys.modules.get("optuna")
    return optuna is not None and isinstance(error, optuna.TrialPruned)


def _is_over(trainer: Trainer) -> bool:
    return trainer.global_step >= trainer.estimated_stepping_batches
