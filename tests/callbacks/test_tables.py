"""The table at the start and the box at the end, as plain text."""

from __future__ import annotations

import bitsandbytes as bnb
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from rich.console import Console
from torch import nn

from lit_ft.callbacks import StartTable, final_panel
from lit_ft.callbacks.tables import model_table, optimizer_table
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


def fit(tmp_path, module: LightningModule, *, max_steps: int = 1, **options):
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[StartTable()],
        max_steps=max_steps,
        limit_val_batches=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        default_root_dir=tmp_path,
        **options,
    )
    trainer.fit(module, datamodule=Data())


def test_the_table_is_printed_once_before_training(tmp_path, capfd):
    for sanity in (0, 1):
        fit(tmp_path, TwoGroups(), num_sanity_val_steps=sanity)
        out = capfd.readouterr().out
        assert out.count("AdamW") == 1
        assert out.count("matrices") == 1
        assert "64 examples" in out
        assert "1 steps of 2 rows" in out
        assert (", 0.0156 times all rows" in out) == (not sanity)  # it comes before the loader
        assert "val [small]" in out  # brackets are text, not markup


def test_a_run_of_epochs_is_said_to_be_one(tmp_path, capfd):
    fit(tmp_path, TwoGroups(), max_steps=-1, max_epochs=2)
    assert "2 times all rows" in capfd.readouterr().out


def test_groups_are_shown_one_by_one():
    module = TwoGroups()
    table = optimizer_table(module.configure_optimizers())
    assert cells_of(table, "matrices")[1:5] == ["1", "64", "0.0002", "0.1"]
    assert cells_of(table, "vectors")[1:5] == ["1", "2", "0.0002", "0"]


def test_the_models_table_counts_what_trains_and_what_it_weighs():
    model = nn.Sequential(nn.Linear(1024, 1024), nn.Linear(1024, 1024)).requires_grad_(False)
    model[1].bias.requires_grad_(True)
    table = model_table(model.to(torch.bfloat16))
    assert cells_of(table, "parameters") == ["parameters", "2,099,200"]
    assert cells_of(table, "trainable") == ["trainable", "1,024", "(0.05%)"]
    assert cells_of(table, "weights") == ["weights", "0.004", "GiB"]
    assert cells_of(table, "dtype") == ["dtype", "bfloat16"]


def test_packed_weights_count_as_what_they_stand_for():
    layer = bnb.nn.Linear4bit(128, 64, bias=False).to("cpu")
    assert cells_of(model_table(layer), "parameters") == ["parameters", "8,192"]


def test_a_model_in_subspaces_trains_whole():
    model = nn.Sequential(nn.Linear(64, 32))
    before = [" ".join(cells_of(model_table(model), row)) for row in ("parameters", "weights")]
    inject(model, rank=4)
    table = model_table(model)
    assert [" ".join(cells_of(table, row)) for row in ("parameters", "weights")] == before
    assert cells_of(table, "trainable") == ["trainable", "2,080", "(100.00%)"]
    assert cells_of(table, "through")[:2] == ["through", "128"]


SUMMARY = {
    "status": "completed",
    "steps": 1200,
    "initial_val_loss": 3.291,
    "val_loss": 2.7,
    "val_perplexity": 14.88,
    "train_loss": 2.5,
    "tokens_per_second": 1234.5,
    "step_seconds": {"median": 0.25, "p95": 0.3, "max": 1.0},
    "peak_bytes": {"value": 3 * 2**30, "source": "process_rss"},
    "optimizer_state_bytes": 2**30,
    "checkpoint_path": "runs/r1/checkpoints/last.ckpt",
    "export_path": "runs/r1/model",
    "error": None,
}


def test_the_box_shows_what_came_of_the_run():
    text = text_of(final_panel(SUMMARY))
    for shown in (
        "completed",
        "3.2910 → 2.7000",
        "14.88",
        "1,234",
        "3.000 GiB (process_rss)",
        "runs/r1/checkpoints/last.ckpt",
        "runs/r1/model",
    ):
        assert shown in text
    assert "error" not in text


def test_the_box_shows_the_first_prompt_before_and_after():
    samples = [
        {"step": 0, "prompt": "p", "text": "[bold]before"},
        {"step": 0, "prompt": "q", "text": "other"},
        {"step": 9, "prompt": "p", "text": "after"},
        {"step": 9, "prompt": "q", "text": "other"},
    ]
    text = text_of(final_panel({**SUMMARY, "samples": samples}))
    assert "[bold]before" in text
    assert "after" in text
    assert "other" not in text


def test_the_box_of_a_failed_run_has_nulls():
    error = {"type": "ValueError", "message": "line 57"}
    nulls = dict.fromkeys(SUMMARY)
    text = text_of(final_panel({**nulls, "status": "failed", "error": error}))
    assert "failed" in text
    assert "ValueError: line 57" in text
    assert "None" not in text
    assert text_of(final_panel({}))
