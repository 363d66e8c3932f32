"""When the last state and the best weights are saved, and what they hold."""

from __future__ import annotations

import os

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel, RandomDataset
from torch.utils.data import DataLoader

from lit_ft.callbacks import AtomicCheckpointIO, BestCheckpoint, LastCheckpoint


class Plain(BoringModel):
    """Validates to the losses given, one after another."""

    def __init__(self, losses=(1.0,)) -> None:
        super().__init__()
        self.losses = iter(losses)

    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx)["loss"]

    def on_validation_epoch_end(self):
        self.log("val_loss", next(self.losses))

    def validation_step(self, batch, batch_idx):
        pass


def trainer_for(tmp_path, callbacks, **options):
    settings = {
        "accelerator": "cpu",
        "max_steps": 7,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "default_root_dir": tmp_path,
        "plugins": [AtomicCheckpointIO()],
    }
    return Trainer(callbacks=callbacks, **{**settings, **options})


def fit(tmp_path, callbacks, module: LightningModule | None = None, ckpt_path=None, **options):
    module = module or Plain()
    trainer = trainer_for(tmp_path, callbacks, **options)
    loader = DataLoader(RandomDataset(32, 64), shuffle=False)
    trainer.fit(module, loader, loader, ckpt_path=ckpt_path)
    return trainer


def load(path):
    return torch.load(path, weights_only=True)


class Records(LastCheckpoint):
    def _save_checkpoint(self, trainer, filepath):
        super()._save_checkpoint(trainer, filepath)
        self.saved.append(trainer.global_step)

    saved: list


def records(tmp_path, every_n_steps):
    callback = Records(tmp_path, every_n_steps)
    callback.saved = []
    return callback


def test_the_last_state_is_saved_every_n_steps_and_at_the_end(tmp_path):
    callback = records(tmp_path, 3)
    trainer = fit(tmp_path, [callback])
    assert callback.saved == [3, 6, 7]
    assert sorted(os.listdir(tmp_path)) == ["last-1.ckpt", "last.ckpt"]
    state = load(tmp_path / "last.ckpt")
    assert state["global_step"] == 7
    assert load(tmp_path / "last-1.ckpt")["global_step"] == 6
    assert len(state["optimizer_states"]) == 1
    weight = trainer.lightning_module.layer.weight
    assert torch.equal(state["state_dict"]["layer.weight"], weight)


def test_never_saved_between_accumulated_batches(tmp_path):
    callback = records(tmp_path, 2)
    options = {"accumulate_grad_batches": 4}
    fit(tmp_path, [callback], max_steps=2, **options)
    assert callback.saved == [2]
    done = load(tmp_path / "last.ckpt")["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert done["current"]["processed"] == 8
    # Resuming: the first of four batches finds global_step = 2, a multiple of 2, and no new step.
    again = records(tmp_path, 2)
    fit(tmp_path, [again], max_steps=4, ckpt_path=tmp_path / "last.ckpt", **options)
    assert again.saved == [4]


def test_a_run_that_stops_early_saves_where_it_stopped(tmp_path):
    class Stops(Plain):
        def on_train_batch_end(self, *_):
            if self.global_step >= 5:
                self.trainer.should_stop = True

    callback = records(tmp_path, 100)
    fit(tmp_path, [callback], Stops())
    assert callback.saved == [5]


def test_a_longer_run_goes_on_inside_the_epoch(tmp_path):
    whole = fit(tmp_path / "whole", [LastCheckpoint(tmp_path / "whole")], seeded(), max_steps=9)
    fit(tmp_path / "parts", [LastCheckpoint(tmp_path / "parts")], seeded(), max_steps=5)
    path = tmp_path / "parts" / "last.ckpt"
    after = fit(tmp_path / "x", [LastCheckpoint(tmp_path / "x")], seeded(), path, max_steps=9)
    assert after.global_step == 9
    assert after.current_epoch == whole.current_epoch
    progress = load(tmp_path / "x" / "last.ckpt")["loops"]["fit_loop"]["epoch_loop.batch_progress"]
    assert progress["current"]["processed"] == 9


def seeded() -> Plain:
    torch.manual_seed(0)
    return Plain()


def test_the_best_weights_are_kept_alone(tmp_path):
    losses = [3.0, 1.0, 2.0]
    best = BestCheckpoint(tmp_path)
    options = {"limit_val_batches": 1, "val_check_interval": 2, "max_steps": 6}
    fit(tmp_path, [best], Plain(losses), **options)
    state = load(tmp_path / "best.ckpt")
    assert state["global_step"] == 4
    assert "optimizer_states" not in state
    assert sorted(os.listdir(tmp_path)) == ["best.ckpt", "best.json"]
    assert best.best_model_score == 1.0


def test_a_validation_that_is_not_finite_is_never_the_best(tmp_path):
    losses = [float("nan"), 2.0, float("nan"), float("-inf")]
    options = {"limit_val_batches": 1, "val_check_interval": 1, "max_steps": 4}
    fit(tmp_path, [BestCheckpoint(tmp_path)], Plain(losses), **options)
    assert load(tmp_path / "best.ckpt")["global_step"] == 2


@pytest.mark.parametrize("mode, worse, better", [("min", 2.0, 0.5), ("max", 0.5, 2.0)])
def test_a_resumed_run_goes_on_from_a_best_that_came_after_its_state(tmp_path, mode, worse, better):
    """As a validation behind `fit` does: the last state was saved before it."""

    def run(max_steps, loss, **options):
        callbacks = [LastCheckpoint(tmp_path), BestCheckpoint(tmp_path, mode=mode)]
        module = Plain([loss])
        trainer = fit(tmp_path, callbacks, module, max_steps=max_steps, **options)
        trainer.limit_val_batches = 1
        trainer.validate(module, DataLoader(RandomDataset(32, 1)), verbose=False)
        callbacks[1].keep_if_best(trainer)
        return load(tmp_path / "best.ckpt")["global_step"]

    last = tmp_path / "last.ckpt"
    assert run(2, 1.0) == 2
    assert run(4, worse, ckpt_path=last) == 2
    assert run(6, float("nan"), ckpt_path=last) == 2
    assert run(8, better, ckpt_path=last) == 8
    assert run(1, worse) == 1  # a new run in the same folder


def test_the_best_weights_are_a_second_name_of_the_last_state_that_holds_them(tmp_path):
    """As `lit_ft.run.job` does: the validation after `fit` finds that the last weights are best."""
    best, module, loader = BestCheckpoint(tmp_path), Plain(), validation_rows()
    trainer = trainer_for(tmp_path, [LastCheckpoint(tmp_path), best], limit_val_batches=1)
    trainer.fit(module, loader)
    trainer.validate(module, loader, verbose=False)
    best.keep_if_best(trainer)
    before = (tmp_path / "best.ckpt").read_bytes()
    assert (tmp_path / "best.ckpt").samefile(tmp_path / "last.ckpt")
    assert load(tmp_path / "best.ckpt")["global_step"] == 7
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=True)  # the next state
    assert (tmp_path / "best.ckpt").read_bytes() == before != (tmp_path / "last.ckpt").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["best.ckpt", "best.json", "last.ckpt"]


def test_the_best_weights_are_written_where_the_last_state_holds_others(tmp_path):
    best, module, loader = BestCheckpoint(tmp_path), Plain(), validation_rows()
    trainer = trainer_for(tmp_path, [LastCheckpoint(tmp_path), best], limit_val_batches=1)
    trainer.fit(module, loader)
    with torch.no_grad():
        module.layer.weight.mul_(2)  # as a callback that averages the weights at the end
    trainer.validate(module, loader, verbose=False)
    best.keep_if_best(trainer)
    saved = load(tmp_path / "best.ckpt")
    assert torch.equal(saved["state_dict"]["layer.weight"], module.layer.weight)
    assert "optimizer_states" not in saved


def validation_rows() -> DataLoader:
    return DataLoader(RandomDataset(32, 64), shuffle=False)
