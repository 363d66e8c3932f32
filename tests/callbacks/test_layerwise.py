"""Layerwise updates in a trainer: foreign projects, clipping, loss scalers, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import AdamW

from examples.other_project import Regression
from lit_ft.callbacks import GaLore, LayerwiseUpdate
from lit_ft.distributed import FSDP2Strategy
from lit_ft.subspace.projectors import SVD
from tests.support.tiny_module import batch_of, float16, loader, module_of, trainer_of


class Other(Regression):
    """Somebody's module with somebody's scheduler."""

    def configure_optimizers(self):
        groups = [
            {"params": self.net[0].parameters()},
            {"params": self.net[2].parameters(), "lr": 0.1},
        ]
        optimizer = AdamW(groups, lr=1e-2)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1)]


@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.01}])
def test_a_foreign_project_trains_the_same_weights(options: dict, tmp_path: Path) -> None:
    nets = []
    batches = [[torch.randn(8, 32), torch.randn(8, 8)] for _ in range(5)]
    for callbacks in ([], [LayerwiseUpdate(min_grad_bytes=0)]):
        torch.manual_seed(0)
        module = Other()
        trainer = trainer_of(tmp_path, max_steps=10, callbacks=callbacks, **options)
        trainer.fit(module, loader(*batches))
        assert trainer.global_step == 10
        assert "backward" not in vars(module)
        nets.append(module.net.state_dict())
    torch.testing.assert_close(*nets, rtol=0, atol=0)


def test_the_logged_norm_is_the_true_one(tmp_path: Path) -> None:
    norms = []
    for callbacks in ([], [LayerwiseUpdate(min_grad_bytes=0)]):
        module = module_of(optimizer=partial(AdamW, lr=1e-2))
        trainer = trainer_of(tmp_path, gradient_clip_val=0.1, callbacks=callbacks)
        trainer.fit(module, loader(batch_of([12, 5]), batch_of([7, 9])))
        norms.append(trainer.callback_metrics["grad_norm"])
    assert norms[0] == norms[1] > 0.1


@pytest.mark.parametrize("clip", [None, 0.1])
def test_the_price_of_clipping_is_named_with_its_remedies(clip, tmp_path: Path, caplog) -> None:
    trainer = trainer_of(tmp_path, gradient_clip_val=clip, callbacks=[LayerwiseUpdate(0)])
    with caplog.at_level("INFO"):
        trainer.fit(module_of(optimizer=partial(AdamW, lr=1e-2)), loader(batch_of([12, 5])))
    [told] = [text for text in caplog.messages if text.startswith("Layerwise updates")]
    for part in ("second backward", "updates after backward", "no clipping"):
        assert (part in told) == (clip is not None)


class OneGroup(Regression):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_galore_by_svd_beside_it(tmp_path: Path) -> None:
    nets = []
    batches = [[torch.randn(8, 32), torch.randn(8, 8)] for _ in range(5)]
    for callbacks in ([], [LayerwiseUpdate(min_grad_bytes=0)]):
        torch.manual_seed(0)
        module = OneGroup()
        galore = GaLore(rank=2, projector=SVD(every=2), targets=[r"net\.0"])
        trainer_of(tmp_path, max_steps=5, callbacks=[*callbacks, galore]).fit(
            module, loader(*batches)
        )
        nets.append(module.net.state_dict())
    torch.testing.assert_close(*nets, rtol=0, atol=0)
    clipped = [GaLore(rank=2, projector=SVD(), targets=[r"net\.0"]), LayerwiseUpdate(0)]
    trainer = trainer_of(tmp_path, gradient_clip_val=1.0, callbacks=clipped)
    with pytest.raises(MisconfigurationException, match="SVD.*Leave LayerwiseUpdate out"):
        trainer.fit(OneGroup(), loader(*batches))


class Diverges(OneGroup):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * (torch.nan if batch_idx == 1 else 1.0)


def test_a_loss_that_is_not_finite_reaches_no_weight(tmp_path: Path) -> None:
    module = Diverges()
    trainer = trainer_of(tmp_path, callbacks=[LayerwiseUpdate(min_grad_bytes=0)])
    batch = [torch.randn(8, 32), torch.randn(8, 8)]
    with pytest.raises(FloatingPointError, match="loss is not finite at step 2"):
        trainer.fit(module, loader(batch, batch))
    assert all(p.isfinite().all() for p in module.parameters())


def test_under_a_loss_scaler_updates_are_ordinary_and_said_so(tmp_path: Path, caplog) -> None:
    callback = LayerwiseUpdate(min_grad_bytes=0)
    batch = [torch.randn(8, 32), torch.randn(8, 8)]
    module = OneGroup()
    before = module.net[0].weight.detach().clone()
    with caplog.at_level("INFO"):
        trainer_of(tmp_path, plugins=[float16(2.0**16)], callbacks=[callback]).fit(
            module, loader(batch, batch)
        )
    assert "loss scaler" in caplog.text
    assert not torch.equal(module.net[0].weight, before)


def test_one_callback_serves_two_fits(tmp_path: Path) -> None:
    callback = LayerwiseUpdate(min_grad_bytes=0)
    batch = [torch.randn(8, 32), torch.randn(8, 8)]
    nets = []
    for callbacks in ([], [callback], [callback]):
        torch.manual_seed(0)
        module = OneGroup()
        trainer_of(tmp_path, gradient_clip_val=0.1, callbacks=callbacks).fit(
            module, loader(batch, batch)
        )
        nets.append(module.net.state_dict())
    torch.testing.assert_close(nets[1], nets[0], rtol=0, atol=0)
    torch.testing.assert_close(nets[2], nets[0], rtol=0, atol=0)


class Manual(Regression):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False


class ClipsItself(Regression):
    def configure_gradient_clipping(self, *args, **kwargs):
        nn.utils.clip_grad_norm_(self.parameters(), 1e-3)


class BackpropagatesItself(Regression):
    def backward(self, loss, *args, **kwargs):
        (3 * loss).backward()


@pytest.mark.parametrize(
    ("module", "options", "named"),
    [
        (Manual, {}, "automatic optimization"),
        (
            Regression,
            {"strategy": "ddp"},
            "buckets keep.*FSDP2Strategy.*leave LayerwiseUpdate",
        ),
        (
            Regression,
            {"strategy": FSDP2Strategy(), "gradient_clip_val": 1.0},
            "gradient_clip_val=None",
        ),
        (ClipsItself, {}, "ClipsItself clips in its own way"),
        (BackpropagatesItself, {"gradient_clip_val": 1.0}, "BackpropagatesItself back-propagates"),
        (
            partial(module_of, optimizer=partial(torch.optim.LBFGS)),
            {},
            "LBFGS.*Leave LayerwiseUpdate",
        ),
    ],
)
def test_what_cannot_be_right_is_refused_before_training(
    module: Callable[[], LightningModule], options: dict, named: str, tmp_path: Path
) -> None:
    trainer = trainer_of(tmp_path, callbacks=[LayerwiseUpdate()], **options)
    callback, pl_module = trainer.callbacks[0], module()
    assert isinstance(callback, Callback)
    with pytest.raises(MisconfigurationException, match=named):
        callback.setup(trainer, pl_module, "fit")
