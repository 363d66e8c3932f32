"""The learning rate's log, for optimizers that have none as well."""

from __future__ import annotations

import csv

import pytest
import torch
import transformers
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger

from lit_ft.callbacks import LearningRateMonitor


class Plain(BoringModel):
    def __init__(self, build) -> None:
        super().__init__()
        self.build = build

    def configure_optimizers(self):
        return self.build(self.layer)


def adafactor(layer):
    return transformers.Adafactor(layer.parameters())


def two_groups(layer):
    groups = [
        {"name": "matrices", "params": [layer.weight], "lr": 0.5},
        {"name": "vectors", "params": [layer.bias], "lr": None},
    ]

    class Own(torch.optim.SGD):
        def step(self, closure=None):
            return closure()

    return Own(groups)


def fit(build, logger):
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[LearningRateMonitor()],
        max_steps=2,
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=logger,
        log_every_n_steps=1,
    )
    trainer.fit(Plain(build))
    return trainer


def test_a_group_without_a_learning_rate_is_left_out(tmp_path):
    logger = CSVLogger(tmp_path)
    fit(two_groups, logger)
    with open(logger.experiment.metrics_file_path) as file:
        rows = list(csv.DictReader(file))
    assert {row["lr-Own/matrices"] for row in rows} == {"0.5"}
    assert not [name for name in rows[0] if "vectors" in name]


@pytest.mark.parametrize("with_logger", [True, False])
def test_adafactor_with_its_own_steps_trains(tmp_path, with_logger):
    trainer = fit(adafactor, CSVLogger(tmp_path) if with_logger else False)
    assert trainer.global_step == 2
