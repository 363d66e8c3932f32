"""Set when GaLore's subspaces move, and log how much of the gradients they capture."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_ft.callbacks._support.every_n_steps import EveryNSteps
from lit_ft.callbacks._support.trainer import find_callback
from lit_ft.callbacks.galore import GaLore
from lit_ft.subspace import Refresh, SubspaceLayer, SubspaceUpdater, layer_group
from lit_ft.subspace.stats import Snapshot


class SubspaceRefresh(Callback):
    """Set when the subspaces of the `GaLore` callback move, and log metrics under `subspace/`.

    `step_rms` is the effective step: the root mean square of a step's change to the weights that
    move in subspaces, with α and without weight decay, over the learning rate. For AdamW on whole
    weights it is 1 at the first step, and less where gradients disagree. Three more metrics exist
    for each part of the model (`attention`, `mlp`, `embeddings`, `head`, `other`):

    - `<part>/captured_energy`: the share of the gradients' energy that lies in the subspaces,
      Σ ||G_s Pᵀ||² over Σ ||G_s||², where G_s is the gradient of one sequence of the logged step.
      Only a logged step pays for it, with products of tokens with tokens.
    - `<part>/overlap`: the share of the last subspace that the new one keeps, the mean over the
      layers that have moved since the last log. Rules with small steps (`Oja`) always stay near 1.
    - `<part>/refresh_seconds`: the mean time in seconds to move one layer's subspace.

    Layers that share a weight count as one, in the part of the first. Without a logger nothing is
    measured. Logging changes only the round-off in the head's gradient, whose chunks end with each
    sequence on a logged step.

    Args:
        every: The optimizer steps between two moves of a layer's subspace; None for the projector's
            interval.
        stagger: Whether the layers' moves are spread over the interval, so that no single step pays
            for all of them.
        adaptive: Whether a layer whose subspace has stopped moving waits twice as long each time
            (see `lit_ft.subspace.Refresh`).
        threshold: The overlap of a layer's last two subspaces from which on its subspace has
            stopped moving.
        longest: The longest wait between two moves, in multiples of the interval.
        every_n_steps: The number of optimizer steps between two logs; None follows the Trainer's
            `log_every_n_steps`.

    Raises:
        ValueError: If a number is out of its range.
        MisconfigurationException: When training begins, if there is no `GaLore` callback.

    Example:
        >>> import lightning as L
        >>> trainer = L.Trainer(
        ...     callbacks=[GaLore(rank=64), SubspaceRefresh(every=100, every_n_steps=50)],
        ...     logger=False,
        ...     accelerator="cpu",
        ... )
    """

    def __init__(
        self,
        every: int | None = None,
        *,
        stagger: bool = True,
        adaptive: bool = False,
        threshold: float = Refresh.threshold,
        longest: int = Refresh.longest,
        every_n_steps: int | None = None,
    ) -> None:
        self.refresh = Refresh(every, stagger, adaptive, threshold, longest)
        self._every_n = EveryNSteps(every_n_steps)
        self._galore: GaLore | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the settings to the GaLore callback."""
        self._galore = find_callback(trainer, GaLore)
        if self._galore is None:
            raise MisconfigurationException(
                "SubspaceRefresh sets when the subspaces of GaLore move, and there is no GaLore. "
                "Give both: GaLore(rank=...) and SubspaceRefresh(...)."
            )
        self._galore.reschedule(self.refresh)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start counting steps."""
        self._every_n.start(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Let the current step measure what will be logged after it."""
        if trainer.loggers:
            self._updater.stats.await_snapshot(self._every_n.remaining(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log if the interval is over."""
        if not self._every_n.due(trainer) or not trainer.loggers:
            return
        updater = self._updater
        metrics = metrics_of(updater.stats.snapshot(updater.all_reduce), updater.layers)
        for logger in trainer.loggers:
            # Lightning numbers logged steps from 0.
            logger.log_metrics(metrics, step=trainer.global_step - 1)

    @property
    def _updater(self) -> SubspaceUpdater:
        assert self._galore is not None and self._galore.updater is not None
        return self._galore.updater


def metrics_of(snapshot: Snapshot, layers: dict[str, SubspaceLayer]) -> dict[str, float]:
    """Return the metrics of a snapshot by the names that they are logged under.

    Args:
        snapshot: The numbers that were measured for each layer.
        layers: The layers by name, as `inject` returns them.
    """
    groups: dict[str, list[str]] = {}
    for name, layer in layers.items():
        groups.setdefault(layer_group(name, layer), []).append(name)
    metrics = {} if snapshot.step_rms is None else {"subspace/step_rms": snapshot.step_rms}
    for group, names in groups.items():
        energies = [snapshot.energies[name] for name in names if name in snapshot.energies]
        if total := sum(total for _, total in energies):
            captured = sum(captured for captured, _ in energies)
            metrics[f"subspace/{group}/captured_energy"] = captured / total
        for metric, values in (
            ("overlap", snapshot.overlaps),
            ("refresh_seconds", snapshot.seconds),
        ):
            if known := [values[name] for name in names if name in values]:
                metrics[f"subspace/{group}/{metric}"] = fmean(known)
    return metrics
