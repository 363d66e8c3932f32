"""Throughput by a clock that only the test moves, on modules that know nothing of lit_ft."""

from __future__ import annotations

import csv

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from lit_ft.callbacks import ThroughputMonitor, throughput
from lit_ft.measure.flops import training_flops

DATA, STEP, VALIDATION, SAMPLES, SAVING = 0.5, 1.0, 1e3, 1e4, 1e5

TOKENS = 6  # of a batch


class Clock:
    """Stands in for the module `time`; seconds pass when somebody says so."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(throughput, "time", clock)
    return clock


class Plain(LightningModule):
    """Any project's module: each thing that it does takes its time on the test's clock."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.embedding = nn.Embedding(10, 4)
        self.head = nn.Linear(4, 10)

    def training_step(self, batch, batch_idx):
        self.clock.now += STEP
        return self.head(self.embedding(batch["input_ids"])).sum()

    def validation_step(self, batch, batch_idx):
        self.clock.now += VALIDATION

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)

    def on_save_checkpoint(self, checkpoint):
        self.clock.now += SAVING

    def loader(self, **sizes):
        def fetch(rows):
            self.clock.now += DATA
            ids = torch.zeros(2, 4, dtype=torch.long)
            return {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])}

        return DataLoader(range(8), batch_size=1, collate_fn=fetch)


class Slow(Callback):
    """Long work in every hook around a step, as sample generation does."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def _work(self, *_):
        self.clock.now += SAMPLES

    on_train_batch_start = on_train_batch_end = on_validation_end = on_train_epoch_end = _work
    on_validation_start = on_train_epoch_start = on_train_start = on_train_end = _work


def fit(clock, tmp_path, callbacks, **options):
    module = Plain(clock)
    settings = {
        "accelerator": "cpu",
        "max_steps": 12,
        "val_check_interval": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "default_root_dir": tmp_path,
        "log_every_n_steps": 4,
    }
    trainer = Trainer(callbacks=callbacks, **{**settings, **options})
    trainer.fit(module, module.loader(), module.loader())
    return trainer


def rows_of(logger: CSVLogger) -> list[dict[str, str]]:
    logger.finalize("success")
    with open(logger.experiment.metrics_file_path) as file:
        return list(csv.DictReader(file))


def test_training_alone_is_timed_with_its_wait_for_data(clock, tmp_path):
    monitor = ThroughputMonitor()
    saves = ModelCheckpoint(tmp_path, every_n_train_steps=3)
    fit(clock, tmp_path, [Slow(clock), monitor, Slow(clock), saves])
    # Two epochs of 8 batches; the wait for data after a validation, a save, an epoch included.
    assert monitor.step_seconds == {"median": 1.5, "p95": 1.5, "max": 1.5}
    assert monitor.training_seconds == pytest.approx(12 * (DATA + STEP))
    assert monitor.tokens_per_second == pytest.approx(TOKENS / (DATA + STEP))
    assert monitor.tokens == 12 * TOKENS


def test_an_optimizer_step_is_all_its_batches(clock, tmp_path):
    monitor = ThroughputMonitor(skip_steps=1)
    fit(clock, tmp_path, [monitor], max_steps=4, accumulate_grad_batches=4)
    assert monitor.step_seconds["median"] == 4 * (DATA + STEP)
    assert monitor.training_seconds == 4 * 4 * (DATA + STEP)
    assert monitor.tokens == 4 * 4 * TOKENS
    assert monitor.tokens_per_second == pytest.approx(TOKENS / (DATA + STEP))


def test_a_run_of_skipped_steps_alone_has_no_rate(clock, tmp_path):
    monitor = ThroughputMonitor()
    fit(clock, tmp_path, [monitor], max_steps=2)
    assert monitor.tokens_per_second is None
    assert monitor.step_seconds == {"median": None, "p95": None, "max": None}
    assert monitor.tokens == 2 * TOKENS


def test_a_failed_run_keeps_what_it_did(clock, tmp_path):
    class Fails(Callback):
        def on_train_batch_start(self, trainer, *_):
            self.trainer = trainer
            if trainer.global_step == 5:
                raise ValueError("a bad batch")

    monitor = ThroughputMonitor()
    fails = Fails()
    with pytest.raises(ValueError, match="a bad batch"):
        fit(clock, tmp_path, [monitor, fails], enable_checkpointing=False)
    assert fails.trainer.callbacks == [monitor, fails]
    assert monitor.tokens == 5 * TOKENS
    assert monitor.tokens_per_second == pytest.approx(TOKENS / (DATA + STEP))


def test_rates_are_logged_and_shown(clock, tmp_path):
    logger = CSVLogger(tmp_path)
    trainer = fit(clock, tmp_path, [ThroughputMonitor()], logger=logger)
    rate = TOKENS / (DATA + STEP)
    assert trainer.progress_bar_metrics["tok/s"] == pytest.approx(rate)
    logged = rows_of(logger)
    assert [row["step"] for row in logged] == ["3", "7", "11"]
    for row in logged:
        assert float(row["throughput/tokens_per_second"]) == pytest.approx(rate)
        assert float(row["throughput/samples_per_second"]) == pytest.approx(2 / (DATA + STEP))
        assert float(row["throughput/step_seconds"]) == pytest.approx(DATA + STEP)
        assert "throughput/mfu" not in row  # the CPU's peak is not known


def test_utilisation_counts_real_tokens_against_the_devices_peak(clock, tmp_path, monkeypatch):
    peak = 1000
    monkeypatch.setattr(throughput, "peak_flops", lambda device, dtype: peak)
    logger = CSVLogger(tmp_path)
    trainer = fit(clock, tmp_path, [ThroughputMonitor()], logger=logger)
    flops = training_flops(trainer.lightning_module)
    expected = flops.of(num_tokens=TOKENS, sum_squared_lengths=0) / (DATA + STEP) / peak
    assert float(rows_of(logger)[-1]["throughput/mfu"]) == pytest.approx(expected)


def test_the_callback_list_is_as_it_was_after_fit(clock, tmp_path):
    monitor, other = ThroughputMonitor(), Slow(clock)
    trainer = fit(clock, tmp_path, [other, monitor], enable_checkpointing=False)
    assert trainer.callbacks == [monitor, other]
    trainer.fit_loop.epoch_loop.max_steps = 14
    trainer.fit(trainer.lightning_module, trainer.lightning_module.loader())
    assert trainer.callbacks == [monitor, other]
    assert monitor.tokens == 2 * TOKENS  # of the second fit


def test_other_projects_count_with_their_own_function(clock, tmp_path):
    monitor = ThroughputMonitor(num_tokens=lambda batch: 100)
    fit(clock, tmp_path, [monitor])
    assert monitor.tokens == 1200


@pytest.mark.process
def test_tokens_of_all_ranks_are_summed(clock, tmp_path):
    logger = CSVLogger(tmp_path)
    options = {"strategy": "ddp_fork", "devices": 2, "max_steps": 4, "limit_val_batches": 0}
    fit(clock, tmp_path, [ThroughputMonitor()], logger=logger, **options)
    (path,) = tmp_path.rglob("metrics.csv")  # written in another process
    with path.open() as file:
        row = next(csv.DictReader(file))
    assert float(row["throughput/tokens_per_second"]) == pytest.approx(2 * TOKENS / (DATA + STEP))


def test_tokens_are_known_between_logs_too(clock):
    class Notes(Callback):
        def on_train_batch_end(self, *_):
            known.append((monitor.tokens_so_far, monitor.tokens, monitor.logged_at))

    known = []
    monitor, module = ThroughputMonitor(every_n_steps=3, skip_steps=1), Plain(clock)
    options = {"accelerator": "cpu", "max_steps": 4, "logger": False, "enable_checkpointing": False}
    trainer = Trainer(callbacks=[Notes(), monitor], enable_progress_bar=False, **options)
    trainer.fit(module, module.loader())
    assert known == [(6, 0, None), (12, 0, None), (18, 18, 3), (24, 18, 3)]
