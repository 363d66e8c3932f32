"""Set when GaLore's subspaces move, and log how much of the gradients they capture."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_ft.callbacks._support.every_n_steps import EveryNSteps
from lit_ft.callbacks._support.trainer import find_callback
from lit_ft.callbacks.galore import GaLore
from lit_ft.compat.ranges import Count, Share
from lit_ft.subspace import Refresh, SubspaceLayer, SubspaceUpdater, layer_group
from lit_ft.subspace.stats import Snapshot


class SubspaceRefresh(Callback):
    """Set when the subspaces of the `GaLore` callback move, and log metrics under `subspace/`.

    `step_rms` is the effective step size: the root mean square of what a step adds to the weights
    in subspaces, divided by the learning rate. It includes the scale α but not weight decay. For
    AdamW on whole weights it would be 1 at the first step, and later less, because gradients
    disagree. Three more metrics exist for each part of the model (`attention`, `mlp`, `embeddings`,
    `head`, `other`):

    - `<part>/captured_energy`: the share of the gradients' energy that lies in the subspaces. It is
      Σ ||G_s Pᵀ||² divided by Σ ||G_s||², where G_s is the gradient of one sequence of the logged
      step. It costs products of [tokens, tokens] matrices, on logged steps only.
    - `<part>/overlap`: the share of a layer's last subspace that its new one keeps, averaged over
      the layers that have moved since the last log. It always stays near 1 for rules that move in
      small steps, such as `Oja`.
    - `<part>/refresh_seconds`: the mean time in seconds to move one layer's subspace.

    Layers that share a weight count as one layer, in the part to which the first of them belongs.
    Without a logger, nothing is measured. Logging does not change training, except for the
    round-off in the head's gradient: on a logged step, the head's chunks do not cross sequences.

    Args:
        every: The number of optimizer steps between two moves of a layer's subspace; None uses the
            projector's own interval.
        stagger: Whether to spread the layers' moves over the interval, so that no single step pays
            for all of them.
        adaptive: Whether to double a layer's wait each time its subspace turns out to have stopped
            moving (see `lit_ft.subspace.Refresh`).
        threshold: The smallest overlap of a layer's last two subspaces, above 0 and at most 1, at
            which `adaptive` takes the subspace to have stopped moving.
        longest: The longest wait with `adaptive`, as a multiple of the usual interval.
        every_n_steps: The number of optimizer steps between two logs; None uses the Trainer's
            `log_every_n_steps`.

    Raises:
        ValueError: If `every`, `threshold` or `longest` is out of its range.
        MisconfigurationException: If `every_n_steps` is below 1, or, when training begins, if there
            is no `GaLore` callback.

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
        every: Count | None = None,
        *,
        stagger: bool = True,
        adaptive: bool = False,
        threshold: Share = Refresh.threshold,
        longest: Count = Refresh.longest,
        every_n_steps: Count | None = None,
    ) -> None:
        self.refresh = Refresh(every, stagger, adaptive, threshold, longest)
        self._every_n = EveryNSteps(every_n_steps)
        self._galore: GaLore | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Pass the settings on to the `GaLore` callback."""
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
        """Announce when the next log is due, so that the step before it takes measurements."""
        if trainer.loggers:
            self._updater.stats.await_snapshot(self._every_n.remaining(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log if `every_n_steps` steps have passed since the last log."""
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
    """Return the metrics of a snapshot, keyed by the names under which they are logged.

    Args:
        snapshot: The measurements since the last log.
        layers: The layers, keyed by name, as `inject` returns them.
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
