"""Memory in the logs, on a module that knows nothing of lit_ft."""

from __future__ import annotations

import csv
import mmap

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger

from lit_ft.callbacks import MemoryMonitor
from lit_ft.measure import peak_bytes

GIB = 2**30


def touch(num_bytes):
    """Hold fresh pages for a moment: malloc could hand out resident ones from an earlier test."""
    with mmap.mmap(-1, num_bytes) as pages:
        for offset in range(0, num_bytes, mmap.PAGESIZE):
            pages[offset] = 1


class Plain(BoringModel):
    def training_step(self, batch, batch_idx):
        touch(128 * 2**20)
        return super().training_step(batch, batch_idx)


def fit(tmp_path, monitor, **options):
    logger = CSVLogger(tmp_path)
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[monitor],
        limit_val_batches=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=logger,
        **{"max_steps": 4, "log_every_n_steps": 2, **options},
    )
    trainer.fit(Plain())
    with open(logger.experiment.metrics_file_path) as file:
        rows = [row for row in csv.DictReader(file) if row["memory/peak"]]
    return trainer, rows


def test_readings_come_at_the_trainers_interval(tmp_path):
    trainer, rows = fit(tmp_path, MemoryMonitor())
    assert [row["step"] for row in rows] == ["1", "3"]
    peak = peak_bytes().value / GIB
    assert float(rows[-1]["memory/peak"]) == pytest.approx(peak, rel=0.05)
    assert float(rows[-1]["memory/allocated"]) < float(rows[-1]["memory/peak"]) - 0.1
    assert trainer.progress_bar_metrics["peak GiB"] == pytest.approx(peak, rel=0.05)


def test_its_own_interval_counts_optimizer_steps(tmp_path):
    _, rows = fit(tmp_path, MemoryMonitor(every_n_steps=1), accumulate_grad_batches=3)
    assert [row["step"] for row in rows] == ["0", "1", "2", "3"]


def test_the_peak_is_that_of_training(tmp_path):
    touch(512 * 2**20)  # before training
    _, rows = fit(tmp_path, MemoryMonitor())
    assert float(rows[0]["memory/peak"]) < float(rows[0]["memory/allocated"]) + 0.3
