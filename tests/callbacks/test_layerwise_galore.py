"""Layerwise updates of GaLore's layers: the same training, with one layer's step at a time."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.optim import AdamW

from lit_ft.callbacks import GaLore, LayerwiseUpdate, SubspaceRefresh
from lit_ft.callbacks.layerwise import _by_block
from lit_ft.measure.storage_bytes import storage_bytes
from lit_ft.subspace import inject, subspace_layers
from lit_ft.subspace.projectors import SVD, Oja, Random, SubspaceIteration
from tests.support.tiny_module import batch_of, loader, module_of, trainer_of

BATCHES = [batch_of([12, 5, 7], seed=seed) for seed in range(8)]


class Watch(Callback):
    """Notes the bytes of deltas when forward and the fit end, and of gradients after backward."""

    def __init__(self):
        self.deltas, self.gradients = [], []

    def layers(self, module):
        return subspace_layers(module.model).values()

    def on_before_backward(self, trainer, pl_module, loss):
        self.deltas.append(storage_bytes(x.delta for x in self.layers(pl_module)))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = [x.delta.grad for x in self.layers(pl_module) if x.delta.grad is not None]
        self.gradients.append(storage_bytes(gradients))

    def teardown(self, trainer, pl_module, stage):
        self.deltas_after = storage_bytes(x.delta for x in self.layers(pl_module))


def trained(folder, projector, *callbacks, batches=BATCHES, ckpt_path=None, **options):
    """Return what a fit of six steps leaves behind."""
    module = module_of(optimizer=partial(AdamW, lr=1e-2))
    refresh = SubspaceRefresh(every_n_steps=2)
    logger = CSVLogger(folder, name="", version=0)
    trainer = trainer_of(
        folder,
        callbacks=[GaLore(4, projector), refresh, *callbacks],
        logger=logger,
        **{"max_steps": 6, **options},
    )
    trainer.fit(module, loader(*batches), ckpt_path=ckpt_path)
    logged = {k: v for k, v in trainer.logged_metrics.items() if "seconds" not in k}
    trainer.save_checkpoint(folder / "end.ckpt")
    return {
        "weights": module.state_dict(),
        "optimizer": trainer.optimizers[0].state_dict()["state"],
        "logged": {k: v for k, v in logged.items() if v == v},
    }


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_clip_val": 0.01},
        {"gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value"},
        {"accumulate_grad_batches": 2, "max_steps": 4},
    ],
    ids=str,
)
@pytest.mark.parametrize("projector", [Oja(every=2), SubspaceIteration(every=3), SVD(), Random()])
def test_layers_that_are_stepped_by_themselves_train_the_same(tmp_path, options, projector):
    if isinstance(projector, SVD) and options.get("gradient_clip_val") == 0.01:
        pytest.skip("a second backward pass and whole gradients do not go together")
    whole = trained(tmp_path / "whole", projector, **options)
    by_itself = trained(
        tmp_path / "layerwise", projector, LayerwiseUpdate(min_grad_bytes=0), **options
    )
    torch.testing.assert_close(by_itself, whole, rtol=0, atol=0)


def test_deltas_have_memory_for_a_layers_own_step_alone(tmp_path):
    watch = Watch()
    trained(tmp_path, Oja(every=2), LayerwiseUpdate(min_grad_bytes=0), watch)
    assert max(watch.deltas) <= 4 * 15  # a number for each layer
    assert watch.deltas_after <= 4 * 15
    assert watch.gradients == [0] * 6
    watch = Watch()
    trained(tmp_path, Oja(every=2), watch)
    assert max(watch.deltas) <= 4 * 15 and watch.gradients == [4 * 2304] * 6


def test_a_run_goes_on_from_a_checkpoint_of_released_deltas(tmp_path):
    class Saves(Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 4:
                trainer.save_checkpoint(tmp_path / "four.ckpt")

    train = partial(
        trained,
        tmp_path,
        Oja(every=2),
        LayerwiseUpdate(min_grad_bytes=0),
        batches=[BATCHES[0]] * 8,  # a loader of this kind starts again from its first batch
    )
    whole = train()
    train(Saves(), max_steps=4)
    resumed = train(ckpt_path=tmp_path / "four.ckpt")
    for part in ("weights", "optimizer"):
        torch.testing.assert_close(resumed[part], whole[part], rtol=0, atol=0)


def test_a_gradient_that_is_not_finite_ends_the_fit_and_names_its_layer(tmp_path):
    class Breaks(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            if trainer.global_step == 3:
                [layer, *_] = subspace_layers(pl_module.model).values()
                layer.delta.register_hook(lambda gradient: gradient * float("nan"))

    with pytest.raises(FloatingPointError, match=r"delta"):
        trained(tmp_path, Oja(every=2), LayerwiseUpdate(min_grad_bytes=0), Breaks())


@pytest.mark.parametrize(
    "names, blocks",
    [
        (["model.layers.0.mlp.up", "model.layers.0.q", "model.layers.10.q"], [[0, 1], [2]]),
        (["lm_head", "transformer.h.3.attn.c_attn"], [[1]]),
        (["layers.1.experts.0.w1", "layers.1.experts.0.w2", "layers.1.q"], [[0, 1], [2]]),
    ],
)
def test_layers_are_grouped_by_the_innermost_block(names, blocks):
    net = nn.Sequential(*(nn.Linear(4, 4) for _ in names))
    layers = dict(zip(names, inject(net, rank=1).values(), strict=True))
    deltas = [layer.delta for layer in layers.values()]
    found = _by_block(layers, deltas)
    numbers = {delta: number for number, delta in enumerate(deltas)}
    assert [[numbers[p] for p in group] for group in found] == blocks


def test_a_layer_that_blocks_share_is_in_one_group():
    [layer] = inject(nn.Sequential(nn.Linear(4, 4)), rank=1).values()
    layers = {"layers.0.q": layer, "layers.1.q": layer}
    assert len(_by_block(layers, [layer.delta])) == 1
