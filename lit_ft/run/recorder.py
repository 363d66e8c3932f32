"""Record the measurements of a run in its summary."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_ft.callbacks import ExportHF, Forgetting, LastCheckpoint, LMEval, ThroughputMonitor
from lit_ft.callbacks._support.trainer import find_callback, source_name
from lit_ft.measure import optimizer_state_bytes, peak_bytes, reset_peak
from lit_ft.measure.model_size import model_size
from lit_ft.run.ending import BestSteps, why_fit_ended
from lit_ft.run.history import History
from lit_ft.run.summary import RunSummary

_OF_TRAINING = (
    "tokens",
    "tokens_per_second",
    "step_seconds",
    "train_loss",
    "forgetting",
    "scores",
    "peak_bytes",
)


class OpensFolder(Callback):
    """Makes a run the one of its folder, as soon as it has trained a step or ended without one.

    Args:
        summary: The summary of the run.
    """

    def __init__(self, summary: RunSummary) -> None:
        self.summary = summary
        self._first_step = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the step from which the run goes on."""
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Open the folder after the first step."""
        if trainer.global_step > self._first_step:
            self.summary.open()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the folder if there was no step to take."""
        self.summary.open()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the folder if Lightning has skipped the training, for which no step was left."""
        self.summary.open()


class Recorder(Callback):
    """Records the measurements of a run in its summary, even if the run fails.

    It saves in a checkpoint what a resumed run cannot measure: the validation loss at the start of
    the run, the losses so far, and the steps of the best scores of early stopping. It also saves
    what `lit_ft.run.resume.compare_with_checkpoint` compares: the configuration with secrets
    redacted, the name of the optimizer, the rows of a step, and whether the checkpoint lies inside
    an epoch or at the end of the run.

    Args:
        summary: The summary to fill in.
        optimizer: The name of the optimizer; see `lit_ft.run.failures.optimizer_name`.
        rows_per_step: The number of rows in an optimizer step, over all ranks and micro-batches;
            None for a stream, which can go on with any.

    Attributes:
        validated_at: The optimizer step of the last validation during training; None before it.
    """

    def __init__(self, summary: RunSummary, optimizer: str, rows_per_step: int | None) -> None:
        self.summary = summary
        self.optimizer = optimizer
        self.rows_per_step = rows_per_step
        self.ready = False
        self.validated_at: int | None = None
        self.best_steps = BestSteps()
        self.history = History()
        self._noted_at: int | None = None
        self._trainer: Trainer | None = None  # once it trains
        self._first_step: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return what to save in a checkpoint, as plain values."""
        trainer = self._trainer
        return {
            "initial_val_loss": self.summary.fields["initial_val_loss"],
            "config": self.summary.fields["config"],
            "optimizer": self.optimizer,
            "best_steps": dict(self.best_steps.of),
            "history": self.history.state_dict(**_so_far(trainer)),
            "rows_per_step": self.rows_per_step,
            "inside_epoch": trainer is not None and not trainer.is_last_batch,
            "finished": trainer is not None
            and trainer.global_step >= trainer.estimated_stepping_batches,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the validation loss at the start of the run, and the losses since then."""
        self.summary.update(initial_val_loss=state_dict["initial_val_loss"])
        self.best_steps.of = dict(state_dict.get("best_steps", {}))
        if "history" in state_dict:
            self.history.load_state_dict(state_dict["history"])

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the size of the model, once."""
        self._loaded(pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the size of the model, and start measuring the peak memory."""
        self._trainer, self._first_step = trainer, trainer.global_step
        self._loaded(pl_module)
        # As MemoryMonitor does. Otherwise the peak would be that of a sweep's largest run so far.
        reset_peak(trainer.strategy.root_device)
        self.best_steps.start(trainer)
        if trainer.ckpt_path is not None and self.summary.earlier is not None:
            earlier = self.summary.earlier.get("history", {})
            self.history.add_earlier(earlier, until=trainer.global_step)
            self.summary.update(history=self.history.curves)
        self.summary.write()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the training loss when the speed is logged, since the device has then finished."""
        throughput = find_callback(trainer, ThroughputMonitor)
        if throughput is not None and throughput.logged_at == trainer.global_step:
            self._note_train_loss(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the loss and the step of a validation, and the step of a new best score."""
        if not trainer.sanity_checking:
            self._note(trainer, "val")
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking:
            self.validated_at = trainer.global_step
        self.best_steps.note(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the step of a new best score, if early stopping looks at the end of epochs."""
        self.best_steps.note(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the measurements of training."""
        self._note_train_loss(trainer)
        self._record(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record why the training ended, what it unlearnt, and the export's folder."""
        ended = why_fit_ended(trainer, self.best_steps)
        self.summary.update(ended=ended)
        if trainer.global_step == 0:
            rank_zero_warn(f"The model is as it was: {ended}.")
        if trainer.ckpt_path is not None and self._first_step in (None, trainer.global_step):
            self._record_without_a_step(trainer)
        forgetting = find_callback(trainer, Forgetting)
        if forgetting is not None and forgetting.increase is not None:
            self.summary.update(
                forgetting={
                    "before": forgetting.before,
                    "after": forgetting.after,
                    "value": forgetting.increase,
                }
            )
        export = find_callback(trainer, ExportHF)
        if export is not None and export.export_path is not None:
            self.summary.update(export_path=str(export.export_path))
        self.summary.write()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Record the scores, which come last."""
        lm_eval = find_callback(trainer, LMEval)
        if stage == "fit" and lm_eval is not None and lm_eval.scores:
            self.summary.update(scores=lm_eval.scores)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Record the measurements of a failed run."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._record(trainer)

    def _note_train_loss(self, trainer: Trainer) -> None:
        """Note the training loss, once a step: a step may have several batches."""
        if trainer.global_step not in (self._noted_at, self._first_step):
            self._noted_at = trainer.global_step
            self._note(trainer, "train")

    def _note(self, trainer: Trainer, curve: str) -> None:
        loss = trainer.callback_metrics.get(f"{curve}_loss")
        if loss is not None:
            point = {"step": trainer.global_step, **_so_far(trainer)}
            self.history.note(curve, float(loss), **point)
            self.summary.update(history=self.history.curves)

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

    def _data(self, trainer: Trainer) -> dict[str, Any]:
        """Return the counts of the rows of each split; of a stream, of those that it has read."""
        datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
        names = ("examples", "tokens", "targets")
        counts = {
            split: {name: getattr(report, name) for name in names}
            for split, report in getattr(datamodule, "reports", {}).items()
            if report.examples
        }
        if "val" in counts and datamodule.val_examples is not None:
            counts["val"]["used"] = len(datamodule.val_examples)
        return {
            "train": counts.get("train"),
            "val": counts.get("val"),
            "rows_per_step": self.rows_per_step,
        }

    def _record_without_a_step(self, trainer: Trainer) -> None:
        """Record that all steps had been taken; the earlier run's measurements are kept."""
        self._record(trainer)
        rank_zero_info(
            f"The checkpoint has all {trainer.global_step} steps, so none is left to take: raise "
            "trainer.max_steps (or trainer.max_epochs) to go on."
        )
        earlier = self.summary.earlier
        if earlier is not None and earlier["steps"] == trainer.global_step:
            self.summary.update(**{name: earlier.get(name) for name in _OF_TRAINING})
            self.summary.fields["seconds"]["train"] = earlier["seconds"]["train"]

    def _record(self, trainer: Trainer) -> None:
        fields: dict[str, Any] = {"steps": trainer.global_step, "data": self._data(trainer)}
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


def _so_far(trainer: Trainer | None) -> dict[str, Any]:
    """Return the tokens and the seconds of training in this start; None where nothing counts."""
    if trainer is None:
        return {"tokens": 0, "seconds": 0.0}
    throughput = find_callback(trainer, ThroughputMonitor)
    if throughput is None:
        return {"tokens": None, "seconds": None}
    return {"tokens": throughput.tokens_so_far, "seconds": throughput.training_seconds}
