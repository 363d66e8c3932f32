"""The two checkpoints that a run keeps: the last full state, and the best weights."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_ft.callbacks._support.every_n_steps import EveryNSteps
from lit_ft.callbacks._support.finite import keep_finite
from lit_ft.callbacks._support.trainer import find_callback, total_steps
from lit_ft.compat.ranges import Count
from lit_ft.storage.atomic import keep_earlier
from lit_ft.storage.checkpoint_io import AtomicCheckpointIO
from lit_ft.storage.json_file import read_json, write_json
from lit_ft.terminal import stage


class LastCheckpoint(ModelCheckpoint):
    """Save the full state to `last.ckpt` for resuming, every few steps and at the end.

    The state is saved when an optimizer step is complete, never between accumulated batches. The
    last step is saved like any other, before Lightning closes the epoch, whether it was planned or
    another callback stops the training. A longer run therefore continues inside the epoch. Weights
    that are not finite are never saved: the earlier file stays.

    Args:
        dirpath: The folder in which `last.ckpt` is written.
        every_n_steps: The number of optimizer steps between two saves.
        keep: The number of states to keep, at least 1. The one before `last.ckpt` is
            `last-1.ckpt`, the one before that `last-2.ckpt`.
        save_optimizer: Whether to save the optimizer state too. Without it, no run can go on from
            the files: they hold the weights alone, for a new training or for use.

    Raises:
        FloatingPointError: Instead of saving, if a weight is not finite.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> import torch
        >>> from tempfile import TemporaryDirectory
        >>> with TemporaryDirectory() as folder:
        ...     trainer = L.Trainer(
        ...         callbacks=[LastCheckpoint(folder, every_n_steps=2)],
        ...         max_steps=3,
        ...         logger=False,
        ...         accelerator="cpu",
        ...         enable_progress_bar=False,
        ...         enable_model_summary=False,
        ...     )
        ...     trainer.fit(BoringModel())
        ...     torch.load(f"{folder}/last.ckpt")["global_step"]
        3
    """

    def __init__(
        self,
        dirpath: str | Path,
        every_n_steps: Count = 100,
        keep: Count = 2,
        save_optimizer: bool = True,
    ) -> None:
        if keep < 1:
            raise ValueError(f"keep must be at least 1, not {keep}")
        super().__init__(
            dirpath=dirpath,
            filename="last",
            every_n_train_steps=every_n_steps,
            save_weights_only=not save_optimizer,
            enable_version_counter=False,
        )
        self.every_n_steps = every_n_steps
        self.keep = keep
        self._every_n = EveryNSteps(every_n_steps)

    @property
    def state_key(self) -> str:
        """The callback's key in a checkpoint, without the interval, which may change later."""
        return type(self).__name__

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting steps, and the batches of a resumed stream's next epoch."""
        super().on_train_start(trainer, pl_module)
        _begin_epoch_of_stream(trainer)
        self._every_n.start(trainer)
        self._global_step = trainer.global_step
        self._last_global_step_saved = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save after every `every_n_steps` steps, and after the last step."""
        due = self._every_n.due(trainer)
        if due or trainer.global_step == trainer.estimated_stepping_batches:
            self._save_once(trainer)
        if trainer.global_step > self._global_step:
            self._save_if_stopped(trainer)
        self._global_step = trainer.global_step

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing: only optimizer steps decide when to save."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if the result of the validation ends the training, as `EarlyStopping` decides."""
        self._save_if_stopped(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if training ended early."""
        self._save_once(trainer)

    def _save_if_stopped(self, trainer: Trainer) -> None:
        """Save while the epoch is open; from a later state, its other rows would be left out."""
        if trainer.should_stop and trainer.fit_loop.epoch_loop.done:
            self._save_once(trainer)

    def _save_once(self, trainer: Trainer) -> None:
        if not self._should_skip_saving_checkpoint(trainer):
            keep_finite(trainer, trainer.lightning_module, "saved")
            path = self.format_checkpoint_name({})
            # Set before saving, because the path is part of the saved state.
            self.best_model_path = self.last_model_path = path
            if trainer.is_global_zero:
                keep_earlier(Path(path), self.keep)
            with stage("saving a checkpoint"):
                self._save_checkpoint(trainer, path)


def _begin_epoch_of_stream(trainer: Trainer) -> None:
    """Let the epoch after a saved one begin at batch 0, also in a loader without a length.

    Lightning 2.6 compares the saved batch with the number of batches, which is infinite there. It
    goes on counting from the last epoch, so that windows of accumulation begin in their middle.
    """
    loop = trainer.fit_loop.epoch_loop
    progress = loop.batch_progress
    endless = trainer.num_training_batches == float("inf")
    if endless and loop.restarted_on_train_batch_end and progress.is_last_batch:
        progress.reset_on_run()
        progress.current.completed = -1  # Lightning will count the saved batch as completed


class BestCheckpoint(ModelCheckpoint):
    """Save the weights of the best validation to `best.ckpt`, and its result to `best.json`.

    A result that is not finite is never the best. A run that resumes in the same folder keeps the
    best result in that folder, even if it was reached after the checkpoint that the run resumes
    from.

    If the last weights of a training are the best, and a `LastCheckpoint` of the same trainer has
    saved them, `best.ckpt` becomes a second name of that file, and nothing is written. It then also
    holds the optimizer state. This needs the trainer to have `AtomicCheckpointIO`, and a file
    system with hard links.

    Args:
        dirpath: The folder in which `best.ckpt` and `best.json` are written.
        monitor: The name of the logged metric that is the result of a validation.
        mode: Whether the smallest ("min") or the largest ("max") value is the best.

    Raises:
        FloatingPointError: Instead of saving, if a weight is not finite.

    Example:
        >>> import lightning as L
        >>> best = BestCheckpoint("checkpoints", monitor="val_accuracy", mode="max")
        >>> trainer = L.Trainer(callbacks=[best], logger=False, accelerator="cpu")
    """

    def __init__(
        self,
        dirpath: str | Path,
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="best",
            monitor=monitor,
            mode=mode,
            save_weights_only=True,
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        """Return whether `current` is finite and better than the best so far."""
        finite = current is not None and bool(current.isfinite())
        # All ranks must decide alike, or the next collective would hang.
        if not trainer.strategy.reduce_boolean_decision(finite):
            return False
        return super().check_monitor_top_k(trainer, current)

    def keep_if_best(self, trainer: Trainer) -> None:
        """Save the weights if the last `trainer.validate` gave the best result.

        Call it after a validation outside `fit`, after which Lightning itself saves nothing.
        """
        candidates = self._monitor_candidates(trainer)
        if self.monitor in candidates:
            self._save_monitor_checkpoint(trainer, candidates)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue with the best result so far, read from `best.json` if the folder is the same."""
        found = self._found()
        best: dict[str, Any] = {}
        try:
            best = read_json(found) if found.is_file() else {}
        except ValueError as error:
            rank_zero_warn(f"{error}. The best result is that of the checkpoint.")
        if state_dict.get("dirpath") == self.dirpath and self.monitor in best:
            score = torch.tensor(best[self.monitor])
            path = str(found.with_name("best.ckpt"))
            state_dict = {**state_dict, "best_model_score": score, "kth_value": score}
            state_dict |= {"best_model_path": path, "kth_best_model_path": path}
            state_dict["best_k_models"] = {path: score}
        super().load_state_dict(state_dict)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        keep_finite(trainer, trainer.lightning_module, "saved")
        with stage("saving the best weights"), _linked_to_last(trainer):
            super()._save_checkpoint(trainer, filepath)
        if trainer.is_global_zero and self.best_model_score is not None:
            best = {str(self.monitor): self.best_model_score.item(), "step": trainer.global_step}
            write_json(self._found(), best)

    def _found(self) -> Path:
        return Path(str(self.dirpath)) / "best.json"


def _linked_to_last(trainer: Trainer) -> AbstractContextManager[None]:
    """Save in the block without writing what the last state of the training already holds.

    Before that, nothing is shared: the next state would replace `last.ckpt`, and the optimizer
    state of an earlier step would stay on the disk with the best weights.
    """
    ends = trainer.should_stop or trainer.global_step >= total_steps(trainer)
    io, last = trainer.strategy.checkpoint_io, find_callback(trainer, LastCheckpoint)
    if trainer.state.fn == TrainerFn.FITTING and not ends:
        return nullcontext()
    if last is None or not last.last_model_path or not isinstance(io, AtomicCheckpointIO):
        return nullcontext()
    return io.may_link_to(Path(last.last_model_path))
