"""GaLore in a project that knows nothing of lit_ft: one line in the Trainer.

    python examples/other_project.py

The module is its author's own: its layers, its loss, its optimizer, its data. `GaLore` freezes the
matrices, lets them move in subspaces, and folds every step into them.
"""

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lit_ft.callbacks import GaLore
from lit_ft.subspace.projectors import Projector

RANK = 4


class Regression(L.LightningModule):
    """Somebody's network."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 8))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the mean squared error."""
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the author's optimizer, on all parameters."""
        return torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.0)


def train(projector: Projector | None = None, max_epochs: int = 5) -> tuple[Regression, Tensor]:
    """Train, and return the module and how far its first matrix moved [64, 32]."""
    torch.manual_seed(0)
    x = torch.randn(512, 32)
    data = DataLoader(TensorDataset(x, x[:, :8].sin() + x[:, 8:16]), batch_size=32, shuffle=True)
    module = Regression()
    before = module.net[0].weight.detach().clone()
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        callbacks=[GaLore(rank=RANK, projector=projector)],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, data)
    print(f"loss {trainer.callback_metrics['loss']:.4f} after {trainer.global_step} steps")
    return module, module.net[0].weight.detach() - before


if __name__ == "__main__":
    _, update = train()
    print(
        f"one basis has rank {RANK}; a moving one gives the update rank "
        f"{torch.linalg.matrix_rank(update, rtol=1e-3)}"
    )
