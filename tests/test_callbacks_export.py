"""Export at the end of fit, from a module that knows nothing of lit_ft."""

from __future__ import annotations

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from lit_ft.callbacks import ExportHF


class Plain(LightningModule):
    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        config = LlamaConfig(
            vocab_size=16,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
        )
        self.model = LlamaForCausalLM(config)
        self.fails = fails

    def training_step(self, batch, batch_idx):
        if self.fails:
            raise ValueError("a bad batch")
        return self.model(input_ids=batch, labels=batch, use_cache=False).loss

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-2)

    def train_dataloader(self):
        return DataLoader(torch.arange(16).view(2, 8))


def fit(tmp_path, callback, module):
    Trainer(
        accelerator="cpu",
        callbacks=[callback],
        max_steps=2,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
        default_root_dir=tmp_path,
    ).fit(module)
    return module


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_the_folder_holds_the_trained_model(tmp_path, dtype):
    callback = ExportHF(str(tmp_path / "model"), dtype=dtype)
    module = fit(tmp_path, callback, Plain())
    assert callback.export_path == tmp_path / "model"
    loaded = AutoModelForCausalLM.from_pretrained(callback.export_path)
    expected = torch.float32 if dtype is None else torch.bfloat16
    assert loaded.dtype == expected
    for ours, theirs in zip(loaded.parameters(), module.model.parameters(), strict=True):
        assert torch.equal(ours.to(expected), theirs.to(expected))


def test_a_failed_run_exports_nothing(tmp_path):
    callback = ExportHF(tmp_path / "model")
    with pytest.raises(ValueError, match="a bad batch"):
        fit(tmp_path, callback, Plain(fails=True))
    assert callback.export_path is None
    assert not (tmp_path / "model").exists()


def test_a_model_that_cannot_be_written_is_refused_before_training(tmp_path):
    module = BoringModel()
    before = module.layer.weight.clone()
    with pytest.raises(
        MisconfigurationException, match=r"BoringModel\.model has no save_pretrained"
    ):
        fit(tmp_path, ExportHF(tmp_path / "model"), module)
    assert torch.equal(module.layer.weight, before)
