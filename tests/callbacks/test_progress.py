"""What a file shows of a run, line by line, on modules that know nothing of lit_ft."""

from __future__ import annotations

import io
import itertools
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel, RandomIterableDataset
from torch.utils.data import DataLoader

from lit_ft.callbacks import LineProgress, ProgressBar, TerminalProgress


class Plain(BoringModel):
    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)["loss"]
        values = {"peak GiB": 3.14, "train_loss": 2.4134, "tok/s": 1234.0}
        self.log_dict(values, prog_bar=True)
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", 1.5, prog_bar=True)


class WithoutLearningRate(Plain):
    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=1e-3)
        optimizer.step = lambda closure: closure()
        optimizer.param_groups[0]["lr"] = None
        return optimizer


def fit(tmp_path, bar, module=None, **options):
    settings = {
        "accelerator": "cpu",
        "max_steps": 6,
        "limit_val_batches": 0,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "logger": False,
        "default_root_dir": tmp_path,
    }
    trainer = Trainer(callbacks=[bar], **{**settings, **options})
    trainer.fit(module or Plain())
    return trainer


def test_the_class_suits_stdout(monkeypatch):
    assert type(ProgressBar()) is LineProgress
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdout", terminal)
    bar = ProgressBar(every_n_steps=5)
    assert type(bar) is TerminalProgress


def test_one_line_every_n_steps_and_at_the_end(tmp_path, capfd):
    fit(tmp_path, LineProgress(every_n_steps=4))
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split(" · ")[0] for line in lines] == ["step 4/6", "step 6/6"]
    parts = lines[0].split(" · ")
    assert parts[1:5] == ["loss 2.413", "1,234 tok/s", "3.1 GiB", "lr 1.0e-01"]
    assert parts[5].startswith("eta ")


def test_an_optimizer_without_a_learning_rate_shows_none(tmp_path, capfd):
    fit(tmp_path, LineProgress(every_n_steps=1), WithoutLearningRate(), max_steps=2)
    out = capfd.readouterr().out
    assert "step 2/2" in out
    assert "lr " not in out


def test_accumulated_batches_print_once(tmp_path, capfd):
    fit(tmp_path, LineProgress(every_n_steps=1), accumulate_grad_batches=3, max_steps=3)
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split(" · ")[0] for line in lines] == ["step 1/3", "step 2/3", "step 3/3"]


def test_a_slow_run_prints_before_its_n_steps_are_over(tmp_path, capfd):
    fit(tmp_path, LineProgress(every_n_steps=100, every_n_seconds=0.0), max_steps=3)
    assert "step 2/3" in capfd.readouterr().out


def test_a_long_validation_moves_and_ends_in_its_result(tmp_path, capfd):
    options = {"limit_val_batches": 3, "val_check_interval": 6, "num_sanity_val_steps": 0}
    fit(tmp_path, LineProgress(every_n_seconds=0.0), **options)
    out = capfd.readouterr().out.splitlines()
    moves = [line for line in out if line.startswith("validation")]
    assert moves == [
        "validation 1/3",
        "validation 2/3",
        "validation 3/3",
        "validation at step 6 · val_loss 1.5",
    ]


def test_validation_alone_prints_too(tmp_path, capfd):
    trainer = Trainer(
        accelerator="cpu", callbacks=[LineProgress()], logger=False, default_root_dir=tmp_path
    )
    trainer.validate(Plain(), verbose=False)
    assert "val_loss 1.5" in capfd.readouterr().out


def test_a_disabled_bar_is_silent(tmp_path, capfd):
    bar = LineProgress(every_n_steps=1)
    bar.disable()
    fit(tmp_path, bar)
    assert "step" not in capfd.readouterr().out


class Warms(Plain):
    """Has another learning rate at each step: 0.1, 0.2, ..."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step + 1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_the_learning_rate_is_the_one_that_the_step_used(tmp_path, capfd):
    fit(tmp_path, LineProgress(every_n_steps=1), Warms(), max_steps=3)
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("step")]
    assert [re.search("lr ([^ ]+)", line)[1] for line in lines] == ["1.0e-01", "2.0e-01", "3.0e-01"]


class Records(TerminalProgress):
    """Keeps what the line shows instead of showing it."""

    def __init__(self):
        super().__init__()
        self._line = self
        self.shown = []

    def progress(self, facts):
        self.shown.append(list(facts))


def test_the_line_counts_the_steps_of_the_whole_run(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr("time.monotonic", itertools.count().__next__)  # each look is a second later
    bar = Records()
    # 64 batches an epoch, 100 to train on.
    fit(tmp_path, bar, max_steps=50, accumulate_grad_batches=2)
    steps = [facts[0] for facts in bar.shown if facts]
    assert steps[0] == "step 0/50"
    assert list(dict.fromkeys(steps)) == [f"step {step}/50" for step in range(51)]
    assert bar.shown[-1] == []
    assert capfd.readouterr().out.splitlines()[-1].startswith("step 50/50 · loss 2.413")


def test_validations_are_history_and_the_line_returns_to_the_training(tmp_path, capfd):
    bar = Records()
    options = {"limit_val_batches": 3, "val_check_interval": 2, "num_sanity_val_steps": 0}
    fit(tmp_path, bar, **options)
    kinds = ["".join(facts[:1]).partition(" ")[0] for facts in bar.shown]
    assert "step" in kinds[kinds.index("validation") :]
    said = [line for line in capfd.readouterr().out.splitlines() if line.startswith("validation")]
    assert said == [f"validation at step {step} · val_loss 1.5" for step in (2, 4, 6)]


def test_an_error_removes_the_line(tmp_path):
    class Fails(Plain):
        def on_train_batch_end(self, *_):
            raise ZeroDivisionError

    bar = Records()
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, bar, Fails())
    assert bar.shown[0] and not bar.shown[-1]


def test_steps_below_one_are_refused():
    with pytest.raises(MisconfigurationException, match="every_n_steps=0"):
        LineProgress(every_n_steps=0)


class Streams(Plain):
    def train_dataloader(self):
        return DataLoader(RandomIterableDataset(32, 4))


@pytest.mark.parametrize(
    ("module", "options", "shown"),
    [
        (Plain, {"max_steps": 500, "max_epochs": 1}, "step 20/64"),  # the epoch ends first
        (Plain, {"max_steps": 20, "max_epochs": 9}, "step 20/20"),
        (Streams, {"max_steps": -1, "max_epochs": 5}, "step 20"),  # of a length that nobody knows
        (Streams, {"max_steps": 20, "max_epochs": 9}, "step 20/20"),
    ],
)
def test_the_total_is_where_the_run_ends(tmp_path, capfd, module, options, shown):
    fit(tmp_path, LineProgress(every_n_steps=20), module(), **options)
    lines = [line for line in capfd.readouterr().out.splitlines() if line.startswith("step 20")]
    assert [line.split(" · ")[0] for line in lines] == [shown]


def test_a_file_that_holds_ascii_alone_does_not_stop_the_run(tmp_path, monkeypatch):
    file = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", file)
    fit(tmp_path, LineProgress(every_n_steps=6))
    file.flush()
    assert b"step 6/6 | loss 2.413" in file.buffer.getvalue()


def test_an_endless_run_has_no_total(tmp_path, capfd):
    class Stops(Plain):
        def on_train_batch_end(self, *_):
            if self.global_step >= 3:
                self.trainer.should_stop = True

    fit(tmp_path, LineProgress(every_n_steps=2), Stops(), max_steps=-1, max_epochs=-1)
    line = next(line for line in capfd.readouterr().out.splitlines() if line.startswith("step"))
    assert line.startswith("step 2 · ")
    assert "eta" not in line


class Takes(Plain):
    """Each micro-batch takes 15 s on `clock`, and the first one 100 s more."""

    def __init__(self, clock) -> None:
        super().__init__()
        self.clock = clock

    def training_step(self, batch, batch_idx):
        self.clock.now += 15.0 if batch_idx else 115.0
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("kind", [LineProgress, TerminalProgress])
@pytest.mark.parametrize("steps, told", [(8, ["2:00 for the 4 steps"]), (5, [])])
def test_a_long_run_says_once_how_long_it_takes(tmp_path, capfd, monkeypatch, kind, steps, told):
    clock = SimpleNamespace(now=0.0)
    clock.monotonic = lambda: clock.now
    monkeypatch.setattr("lit_ft.callbacks.progress.time", clock)
    fit(tmp_path, kind(), Takes(clock), max_steps=steps, accumulate_grad_batches=2)
    said = capfd.readouterr().out
    assert re.findall(r"about (\S+ for the \d+ steps)", said) == told
