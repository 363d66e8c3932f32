"""The table at the start, as plain text."""

from __future__ import annotations

from types import SimpleNamespace

import bitsandbytes as bnb
import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel, RandomIterableDataset
from lightning.pytorch.utilities import rank_zero_only
from peft import LoraConfig, get_peft_model
from rich.console import Console
from torch import nn
from torch.utils.data import DataLoader

from lit_ft.callbacks import (
    BestCheckpoint,
    ExportHF,
    GaLore,
    LastCheckpoint,
    LayerwiseUpdate,
    StartTable,
    SubspaceRefresh,
)
from lit_ft.callbacks.start_table import described_model, optimizer_table
from lit_ft.subspace import inject


def text_of(renderable) -> str:
    console = Console(width=120, no_color=True)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


def cells_of(renderable, word: str) -> list[str]:
    """Cells of the line that begins with `word`."""
    lines = [line.replace("│", " ").replace("┃", " ") for line in text_of(renderable).splitlines()]
    return next(line.split() for line in lines if line.split()[:1] == [word])


class TwoGroups(BoringModel):
    def configure_optimizers(self):
        groups = [
            {"name": "matrices", "params": [self.layer.weight], "weight_decay": 0.1},
            {"name": "vectors", "params": [self.layer.bias], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=2e-4)


class Data(LightningDataModule):
    batch_size = 2
    reports = {"train": "64 examples", "val [small]": "7 examples"}

    def train_dataloader(self):
        return BoringModel().train_dataloader()

    def val_dataloader(self):
        return BoringModel().val_dataloader()


def fit(
    tmp_path,
    module: LightningModule,
    data: Data | None = None,
    *,
    max_steps: int = 1,
    callbacks=(),
    **options,
):
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[StartTable(), *callbacks],
        max_steps=max_steps,
        limit_val_batches=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        default_root_dir=tmp_path,
        **{"enable_checkpointing": bool(callbacks), **options},
    )
    trainer.fit(module, datamodule=data or Data())


def test_the_table_is_printed_once_before_training(tmp_path, capfd):
    for sanity in (0, 1):
        fit(tmp_path, TwoGroups(), num_sanity_val_steps=sanity)
        out = capfd.readouterr().out
        assert out.count("AdamW") == 1
        assert out.count("matrices") == 1
        assert "64 examples" in out
        assert "1 step × 2 rows = 2 rows" in out
        assert (", 1.56% of all" in out) == (not sanity)  # it comes before the loader
        assert "val [small]" in out  # brackets are text, not markup


def test_a_run_of_epochs_shows_its_steps(tmp_path, capfd):
    fit(tmp_path, TwoGroups(), max_steps=-1, max_epochs=2, accumulate_grad_batches=4)
    said = " ".join(capfd.readouterr().out.split())
    assert "32 steps × 4 micro-batches × 2 rows = 256 rows, 2 times all" in said
    fit(tmp_path, TwoGroups(), max_steps=-1, max_epochs=1)
    assert "128 rows, each row once" in " ".join(capfd.readouterr().out.split())


class Large(BoringModel):
    """A layer of 4 MB, in front of the others."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 2)
        self.first = nn.Parameter(torch.zeros(1024, 1024))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", 1.0)


@pytest.mark.parametrize(
    "options, steps, told",
    [
        ({}, 5, "checkpoints 28 MiB"),  # two states of 3 x 4 MB, and the best weights
        ({"keep": 3}, 5, "checkpoints 40 MiB"),
        ({"keep": 1}, 5, "checkpoints 28 MiB"),  # the next one is written before the last is gone
        ({}, 2, "checkpoints 16 MiB"),  # saved once
        ({"save_optimizer": False}, 5, "checkpoints 12 MiB"),
    ],
)
def test_what_the_run_takes_on_disk_is_shown_and_a_full_disk_is_named(
    tmp_path, capfd, monkeypatch, recwarn, options, steps, told
):
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=20 << 20))
    last = LastCheckpoint(tmp_path / "new" / "checkpoints", every_n_steps=2, **options)
    callbacks = [last, BestCheckpoint(tmp_path / "new" / "checkpoints")]
    fit(tmp_path, Large(), max_steps=steps, callbacks=callbacks)
    said = " ".join(capfd.readouterr().out.split())
    assert told in said and "20 MiB are free" in said
    assert ("no optimizer state is saved" in said) == (options.get("save_optimizer") is False)
    warned = [str(one.message) for one in recwarn if "Free some space" in str(one.message)]
    assert bool(warned) == (told not in ("checkpoints 16 MiB", "checkpoints 12 MiB"))
    files = [file.stat() for file in (tmp_path / "new").rglob("*.ckpt")]
    taken = sum({file.st_ino: file.st_size for file in files}.values()) >> 20
    assert taken <= int(told.split()[1])


class Adapted(BoringModel):
    """An adapter of 8 KB on a layer of 4 MB."""

    def __init__(self) -> None:
        super().__init__()
        layers = nn.Sequential(nn.Linear(1024, 1024, bias=False))
        self.model = get_peft_model(layers, LoraConfig(r=1, target_modules=["0"]))


@pytest.mark.parametrize("merge, told", [(True, "export 4 MiB"), (False, "export 8 KiB")])
def test_an_adapter_that_is_not_merged_takes_little_disk(tmp_path, capfd, merge, told):
    export = ExportHF(tmp_path / "export", merge=merge)
    export.on_fit_end = lambda *_: None
    fit(tmp_path, Adapted(), callbacks=[export], enable_checkpointing=False)
    assert told in " ".join(capfd.readouterr().out.split())


def test_ranks_that_print_nothing_load_the_data_with_the_one_that_prints(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(StartTable, "on_sanity_check_end", lambda *_: asked.append("done"))
    monkeypatch.setattr(Trainer, "estimated_stepping_batches", property(lambda _: asked.append(1)))
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    fit(tmp_path, TwoGroups(), num_sanity_val_steps=1, max_steps=-1, max_epochs=1)
    assert asked == [1, "done"]


def test_data_of_unknown_length_has_no_number_of_steps(tmp_path, capfd):
    class Streams(Data):
        def train_dataloader(self):
            return DataLoader(RandomIterableDataset(32, 4))

    fit(tmp_path, TwoGroups(), Streams(), max_steps=-1, max_epochs=1)
    assert "this run 2 rows = 2 rows a step" in " ".join(capfd.readouterr().out.split())


def test_the_method_is_shown_with_what_the_run_says_of_itself(tmp_path, capfd):
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[
            StartTable({"recipe": "mine [x]"}),
            GaLore(rank=1),
            SubspaceRefresh(every=7),
            LayerwiseUpdate(),
        ],
        max_steps=1,
        barebones=True,
    )
    trainer.fit(BoringModel())
    lines = [" ".join(line.split()) for line in capfd.readouterr().out.splitlines()]
    assert lines[0] == "recipe mine [x]"
    assert "model BoringModel, 66 parameters, all trained, float32, 264 B" in lines
    assert "device CPU, 32-true" in lines
    assert "update layerwise, in the backward pass" in lines
    told = "GaLore rank 1, 64 weights of 1 layer through 2 parameters (3.1%), "
    assert told + "Oja(step_size=0.1, every=7" in " ".join(lines)


def test_groups_are_shown_one_by_one():
    module = TwoGroups()
    table = optimizer_table(module.configure_optimizers())
    assert cells_of(table, "matrices")[1:5] == ["1", "64", "0.0002", "0.1"]
    assert cells_of(table, "vectors")[1:5] == ["1", "2", "0.0002", "0"]


def test_the_model_is_described_by_what_trains_and_what_it_weighs():
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024)).requires_grad_(False)
    model[1].bias.requires_grad_(True)
    assert described_model(model.to(torch.bfloat16)) == (
        "Sequential, 2,099,200 parameters, 1,024 trained (0.05%), bfloat16, 4 MiB"
    )


def test_packed_weights_count_as_what_they_stand_for():
    layer = bnb.nn.Linear4bit(128, 64, bias=False).to("cpu")
    assert "8,192 parameters" in described_model(layer)


def test_a_model_in_subspaces_trains_whole():
    model = nn.Sequential(nn.Linear(64, 32))
    before = described_model(model)
    inject(model, rank=4)
    assert described_model(model) == before
    assert "2,080 parameters, all trained" in before
