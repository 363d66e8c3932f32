"""GaLore as a callback: in foreign projects, with accumulation, clipping, schedules, resume."""

import copy
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.tuner import Tuner
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.optim import SGD, AdamW
from torch.utils.data import DataLoader
from transformers import get_cosine_schedule_with_warmup

from examples.other_project import RANK, train
from lit_ft.callbacks import GaLore
from lit_ft.optim import WarmupSchedule
from lit_ft.subspace.projectors import SVD, Oja, Online, SubspaceIteration
from tests.support.stopping import StopAt
from tests.support.tiny_module import batch_of, loader, module_of, trainer_of

FIXED = SubspaceIteration(every=10**6)


def test_a_foreign_project_trains_and_its_update_has_the_rank(monkeypatch):
    from lit_ft.subspace import basis_tracker as bases

    monkeypatch.setattr(bases, "_START_ROUNDS", 0)
    module, update = train(FIXED)
    values = torch.linalg.svdvals(update)
    assert values[RANK - 1] > 1e-3 * values[0]
    assert values[RANK] < 1e-5 * values[0]
    assert type(module).__name__ == "Regression"


def test_a_moving_basis_gives_an_update_of_higher_rank():
    _, update = train(Oja(every=1))
    assert torch.linalg.matrix_rank(update, rtol=1e-3) > RANK


def fit(tmp_path, data, *, projector, steps=6, ckpt=None, rank=4, stop=None, **options):
    module = module_of(
        optimizer=partial(AdamW, lr=1e-2),
        schedule=WarmupSchedule(partial(get_cosine_schedule_with_warmup), warmup=1),
    )
    trainer = trainer_of(
        tmp_path,
        max_steps=steps,
        accumulate_grad_batches=2,
        gradient_clip_val=0.5,
        callbacks=[GaLore(rank=rank, projector=projector), *([stop] if stop else [])],
        **options,
    )
    trainer.fit(module, loader(*data), ckpt_path=ckpt)
    return module, trainer


@pytest.mark.parametrize("projector", [Oja(every=1), Online(), SubspaceIteration(every=2)])
def test_stopped_and_resumed_equals_uninterrupted(tmp_path, projector):
    data = [batch_of([12, 5, 7])] * 12
    straight, _ = fit(tmp_path, data, projector=projector)
    stopped, trainer = fit(tmp_path, data, projector=projector, stop=StopAt(3))
    assert trainer.global_step == 3
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    resumed, _ = fit(tmp_path, data, projector=projector, ckpt=tmp_path / "three.ckpt")
    for (name, ours), reference in zip(
        resumed.model.named_parameters(), straight.model.parameters(), strict=True
    ):
        assert torch.equal(ours, reference), name


@pytest.mark.parametrize(
    ("changed", "named"),
    [({"rank": 2}, "rank=4"), ({"projector": Online()}, "projector=Oja")],
)
def test_a_checkpoint_of_another_rank_or_projector_is_refused(tmp_path, changed, named):
    data = [batch_of([12])] * 4
    _, trainer = fit(tmp_path, data, projector=Oja(every=1), steps=2)
    trainer.save_checkpoint(tmp_path / "four.ckpt")
    with pytest.raises(Exception, match=named):
        fit(tmp_path, data, ckpt=tmp_path / "four.ckpt", **{"projector": Oja(every=1), **changed})


def test_bf16_true_keeps_deltas_in_float32_and_moves_the_weights(tmp_path):
    module = module_of(optimizer=partial(AdamW, lr=1e-3))
    callback = GaLore(rank=4)
    trainer = trainer_of(tmp_path, precision="bf16-true", callbacks=[callback])
    trainer.fit(module, loader(*[batch_of([12, 5])] * 2))
    untrained = module_of()
    untrained.configure_model()
    start = dict(untrained.model.named_parameters())
    for name, layer in callback.updater.layers.items():
        assert layer.weight.dtype == torch.bfloat16
        assert (layer.basis.dtype, layer.delta.dtype) == (torch.bfloat16, torch.float32)
        assert not torch.equal(layer.weight, start[f"{name}.weight"].bfloat16()), name
    assert module.model.model.norm.weight.dtype == torch.bfloat16


def test_two_optimizers_are_refused(tmp_path):
    class Two(LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 4)
            self.automatic_optimization = False

        def training_step(self, batch, batch_idx):
            return None

        def configure_optimizers(self):
            return [SGD(self.parameters(), lr=0.1), SGD(self.parameters(), lr=0.1)]

    trainer = trainer_of(tmp_path, callbacks=[GaLore(rank=2)])
    with pytest.raises(MisconfigurationException, match="one optimizer"):
        trainer.fit(Two(), DataLoader(torch.zeros(2, 4)))


class TwoLayers(LightningModule):
    """Freezes its first layer behind GaLore's injection, as its setup comes after callbacks'."""

    def __init__(self, *, freezes, filters):
        super().__init__()
        self.backbone, self.head = nn.Linear(8, 8), nn.Linear(8, 8)
        self.freezes, self.filters = freezes, filters

    def setup(self, stage):
        if self.freezes:
            self.backbone.requires_grad_(False)

    def training_step(self, batch, batch_idx):
        return (self.head(self.backbone(batch).tanh()) - batch).square().mean()

    def configure_optimizers(self):
        return AdamW(p for p in self.parameters() if p.requires_grad or not self.filters)


@pytest.mark.parametrize("filters", [True, False])
@pytest.mark.parametrize("projector", [Oja(every=1), SVD(every=1)])
def test_a_layer_frozen_behind_the_injection_stays_as_it_is(tmp_path, filters, projector, caplog):
    module = TwoLayers(freezes=True, filters=filters)
    before = copy.deepcopy(module.state_dict())
    for _ in range(2):
        trainer = trainer_of(tmp_path, max_steps=3, callbacks=[GaLore(rank=2, projector=projector)])
        trainer.fit(module, DataLoader(torch.randn(12, 8), batch_size=4))
        assert torch.equal(module.backbone.weight, before["backbone.weight"])
        assert not torch.equal(module.head.weight, before["head.weight"])
        assert not any(p.requires_grad for p in module.backbone.parameters())
        assert module.head.weight.requires_grad
    assert "did not come through" not in caplog.text


def test_a_backbone_that_is_unfrozen_later_moves_from_then_on(tmp_path):
    class Weights(Callback):
        seen = []

        def on_train_epoch_end(self, trainer, module):
            self.seen.append(module.backbone.weight.detach().clone())

    module, weights = TwoLayers(freezes=False, filters=True), Weights()
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=2, backbone_initial_lr=1e-3)
    trainer = trainer_of(
        tmp_path,
        max_steps=-1,
        max_epochs=4,
        callbacks=[GaLore(rank=2), finetuning, weights],
    )
    start = module.backbone.weight.detach().clone()
    trainer.fit(module, DataLoader(torch.randn(12, 8), batch_size=4))
    moved = [not torch.equal(weight, start) for weight in weights.seen]
    assert moved == [False, False, True, True]
    assert torch.linalg.matrix_rank(weights.seen[2] - start, rtol=1e-3) < 8


def test_after_training_nothing_is_left_behind(tmp_path):
    module = module_of()
    callback = GaLore(rank=4)
    trainer = trainer_of(tmp_path, callbacks=[callback])
    trainer.fit(module, loader(*[batch_of([12])] * 2))
    for layer in callback.updater.layers.values():
        assert not layer.delta.any()
        assert layer.basis.grad is None and layer.weight.grad is None
        assert not layer.basis.requires_grad
    assert "configure_model" not in vars(module)
    step = callback.updater.step
    trainer.optimizers[0].step()  # no one follows it any more
    assert callback.updater.step == step
    twin = copy.deepcopy(module.model)
    ids = torch.arange(3, 9)[None]
    assert torch.equal(twin(ids).logits, module.model(ids).logits)


def test_another_module_is_injected_anew(tmp_path):
    callback = GaLore(rank=4)
    for _ in range(2):
        module = module_of(optimizer=partial(AdamW, lr=1e-2))
        trainer_of(tmp_path, callbacks=[callback]).fit(module, loader(*[batch_of([12])] * 2))
        layers = [part for part in module.modules() if hasattr(part, "delta")]
        assert layers and set(callback.updater.layers.values()) <= set(layers)
        assert callback.updater.step == 2


def test_lightnings_learning_rate_finder_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, callbacks=[GaLore(rank=4)])
    with pytest.raises(MisconfigurationException, match="Find the rate without GaLore"):
        Tuner(trainer).lr_find(module_of(), loader(batch_of([12])), attr_name="rate")


def test_a_strategy_that_shares_weights_in_its_own_way_is_refused(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer._accelerator_connector.strategy = FSDPStrategy()
    with pytest.raises(MisconfigurationException, match="FSDP2, not under FSDPStrategy"):
        GaLore(rank=4).setup(trainer, module_of(), "fit")
