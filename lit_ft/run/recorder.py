"""Record the measurements of a run in its summary."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from lit_ft.callbacks import ExportHF, LastCheckpoint, ThroughputMonitor
from lit_ft.callbacks._support.trainer import find_callback, source_name
from lit_ft.measure import optimizer_state_bytes, peak_bytes, reset_peak
from lit_ft.measure.model_size import model_size
from lit_ft.run.ending import BestSteps, why_fit_ended
from lit_ft.run.failures import not_this_run
from lit_ft.run.summary import RunSummary


class Recorder(Callback):
    """Records the measurements of a run in its summary, even if the run fails.

    It saves four values in a checkpoint: the validation loss at the start of the run, which a
    resumed run cannot measure; the name of the optimizer, because no other optimizer can load its
    state; the names of the data sources; and the steps of the best scores of early stopping.

    Args:
        summary: The summary to fill in.
        optimizer: The name of the optimizer; see `lit_ft.run.failures.optimizer_name`.
        data: The names of the data sources.
    """

    def __init__(self, summary: RunSummary, optimizer: str, data: list[str]) -> None:
        self.summary = summary
        self.optimizer = optimizer
        self.data = data
        self.ready = False
        self.best_steps = BestSteps()

    def state_dict(self) -> dict[str, Any]:
        """Return the four values to save in a checkpoint."""
        return {
            "initial_val_loss": self.summary.fields["initial_val_loss"],
            "optimizer": self.optimizer,
            "data": self.data,
            "best_steps": dict(self.best_steps.of),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint of another optimizer, and warn if it was trained on other data."""
        made_with = state_dict.get("optimizer", self.optimizer)
        if made_with != self.optimizer:
            raise not_this_run(f"The checkpoint is one of {made_with}, not {self.optimizer}")
        data = state_dict.get("data", self.data)
        if data != self.data:
            rank_zero_warn(
                f"The checkpoint was trained on {', '.join(data)}, and goes on with "
                f"{', '.join(self.data)}: repeat its run's data.path if this is not intended."
            )
        self.summary.update(initial_val_loss=state_dict["initial_val_loss"])
        self.best_steps.of = dict(state_dict.get("best_steps", {}))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the size of the model, once."""
        self._loaded(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the size of the model, and start measuring the peak memory."""
        self._loaded(pl_module)
        # As MemoryMonitor does. Otherwise the peak would be that of a sweep's largest run so far.
        reset_peak(trainer.strategy.root_device)
        self.best_steps.start(trainer)
        self.summary.write()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the step of a new best score."""
        self.best_steps.note(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the step of a new best score, if early stopping looks at the end of epochs."""
        self.best_steps.note(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the measurements of training."""
        self._record(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record why the training ended, and the folder of the exported model."""
        self.summary.update(ended=why_fit_ended(trainer, self.best_steps))
        if not self.summary.fields["steps"]:
            self._record(trainer)  # a finished run was resumed, with no step left
        export = find_callback(trainer, ExportHF)
        if export is not None and export.export_path is not None:
            self.summary.update(export_path=str(export.export_path))

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Record the measurements of a failed run."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._record(trainer)

    def _loaded(self, module: LightningModule) -> None:
        if self.ready:
            return
        self.ready = True
        self.summary.loaded()
        size = model_size(module)
        self.summary.update(
            model={
                "name": source_name(module) or type(module).__name__,
                "parameters": size.parameters,
                "trainable_parameters": size.trainable_parameters,
                "weight_bytes": size.weight_bytes,
            }
        )

    def _record(self, trainer: Trainer) -> None:
        fields: dict[str, Any] = {"steps": trainer.global_step}
        peak = peak_bytes(trainer.strategy.root_device)
        fields["peak_bytes"] = {"value": peak.value, "source": peak.source}
        fields["optimizer_state_bytes"] = sum(map(optimizer_state_bytes, trainer.optimizers))
        train_loss = trainer.callback_metrics.get("train_loss")
        fields["train_loss"] = None if train_loss is None else float(train_loss)
        throughput = find_callback(trainer, ThroughputMonitor)
        if throughput is not None:
            fields["tokens"] = throughput.tokens
            fields["tokens_per_second"] = throughput.tokens_per_second
            fields["step_seconds"] = throughput.step_seconds
            self.summary.fields["seconds"]["train"] = throughput.training_seconds
        checkpoint = find_callback(trainer, LastCheckpoint)
        if checkpoint is not None:
            fields["checkpoint_path"] = checkpoint.last_model_path or None
        self.summary.update(**fields)
