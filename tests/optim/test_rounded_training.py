"""bfloat16 weights under a Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.optim import AdamW, Optimizer
from torch.utils.data import DataLoader
from transformers import get_constant_schedule_with_warmup

from lit_ft.optim import (
    WarmupSchedule,
    stochastically_rounded,
)
from tests.support.seeded import seeded


class TinyModule(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(
            torch.nn.Linear(8, 16), torch.nn.RMSNorm(16), torch.nn.Linear(16, 1)
        )

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.net(batch).float().square().mean()

    def configure_optimizers(self) -> Any:
        optimizer = AdamW(self.named_parameters(), lr=1e-3, fused=True)
        stochastically_rounded(optimizer, seed=3)
        schedule = WarmupSchedule(get_constant_schedule_with_warmup, 4)(optimizer, 8)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def fit(folder: Path, steps: int, resume: Path | None = None) -> tuple[TinyModule, Optimizer, Path]:
    module = TinyModule()
    checkpoint = ModelCheckpoint(folder, save_last=True, every_n_train_steps=steps)
    trainer = Trainer(
        accelerator="cpu",
        precision="bf16-true",
        max_steps=steps,
        gradient_clip_val=1.0,
        callbacks=[checkpoint],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = torch.randn(4, 8, generator=seeded(0)).bfloat16().repeat(8, 1)
    trainer.fit(module, DataLoader(data, batch_size=4), ckpt_path=resume, weights_only=True)
    return module, trainer.optimizers[0], Path(checkpoint.last_model_path)


@pytest.mark.filterwarnings("ignore")
def test_lightning_trains_and_resumes_to_the_bit(tmp_path: Path) -> None:
    whole, optimizer, _ = fit(tmp_path / "whole", 8)
    _, _, checkpoint = fit(tmp_path / "first", 5)
    resumed, optimizer_again, _ = fit(tmp_path / "second", 8, checkpoint)
    torch.testing.assert_close(resumed.state_dict(), whole.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(
        optimizer_again.state_dict()["state"], optimizer.state_dict()["state"], rtol=0, atol=0
    )
    assert {p.dtype for p in whole.parameters()} == {torch.bfloat16}
    norm = whole.net[1].weight
    assert (norm != 1).any()
    assert optimizer.state[norm]["times_rounded"] == 8
    assert optimizer.state[norm]["exp_avg"].dtype is torch.float32
    assert optimizer.param_groups[0]["lr"] == 1e-3
