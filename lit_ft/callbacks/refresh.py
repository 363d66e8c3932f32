"""When GaLore's subspaces move, and what they show of the gradients, in the logs."""

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
    """Say when the subspaces of the `GaLore` callback move, and log under `subspace/` what they do.

    `step_rms` is the root mean square of what a step adds to the weights that move in subspaces,
    decay left out, over the learning rate: the effective step, with α in it. AdamW's own is 1 at
    its first step and less where gradients disagree. And for each part of the model (`attention`,
    `mlp`, `embeddings`, `head`, `other`):

    - `<part>/captured_energy`: the share of the gradients' energy that lies in the subspaces,
      Σ ||G_s Pᵀ||² over Σ ||G_s||², G_s being the gradient of one sequence of the step that is
      logged. That step pays for it with products of tokens with tokens, the others nothing.
    - `<part>/overlap`: how much of the last subspace the new one keeps, the mean over the layers
      that have moved since the last log. Rules of small steps (`Oja`) stay near 1 by themselves.
    - `<part>/refresh_seconds`: what it took to move one layer's subspace, their mean.

    Layers that share a weight are one, in the part of the first. Without a logger nothing is
    measured. Being logged changes nothing but the round-off in the head's gradient, whose chunks
    end with each sequence on a logged step.

    Args:
        every: Optimizer steps between two moves of a layer's subspace; None for the projector's.
        stagger: Spread the layers over the interval, so that no step pays for all.
        adaptive: Let a layer whose subspace has stopped moving wait twice as long each time, see
            `lit_ft.subspace.Refresh`.
        threshold: The overlap from which on a subspace has stopped moving.
        longest: The longest wait, in multiples of the interval.
        every_n_steps: Optimizer steps between two logs; None follows `log_every_n_steps`.

    Raises:
        ValueError: A number that is out of its range.
        MisconfigurationException: When training begins, if there is no `GaLore` callback.
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
        """Tell the GaLore callback when its subspaces move."""
        self._galore = find_callback(trainer, GaLore)
        if self._galore is None:
            raise MisconfigurationException(
                "SubspaceRefresh says when the subspaces of GaLore move, and there is no GaLore: "
                "give both, GaLore(rank=...) and SubspaceRefresh(...)."
            )
        self._galore.reschedule(self.refresh)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from here."""
        self._every_n.start(trainer)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ask the step under way for what will be logged after it."""
        if trainer.loggers:
            self._updater.stats.await_snapshot(self._every_n.remaining(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log when it is time."""
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
    """Return the numbers of a snapshot by the names that they are logged under.

    Args:
        snapshot: By layer.
        layers: By name.
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
