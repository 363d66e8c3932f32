"""GaLore in the life of a module: fits before and after it, and other callbacks."""

import math
from functools import partial

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, LambdaCallback
from lightning.pytorch.tuner import Tuner
from torch.optim import AdamW

from lit_ft.callbacks import GaLore, SubspaceRefresh
from lit_ft.subspace import subspace_layers
from lit_ft.subspace.projectors import Oja, Online
from tests.support.subspace_run import NEVER
from tests.support.tiny_module import batch_of, loader, module_of, trainer_of

SAME_BATCH = [batch_of([12, 5, 7], seed=1)] * 6


def fit(tmp_path, module, *callbacks, **options):
    trainer = trainer_of(tmp_path, callbacks=list(callbacks), **options)
    trainer.fit(module, loader(*SAME_BATCH))
    return trainer


def adamw_module():
    return module_of(optimizer=partial(AdamW, lr=1e-2))


def matrices(module):
    return {n: layer.weight.clone() for n, layer in subspace_layers(module.model).items()}


def test_a_fit_without_galore_trains_what_galore_has_trained_before(tmp_path):
    module = adamw_module()
    fit(tmp_path, module, GaLore(rank=4))
    before = matrices(module)
    fit(tmp_path, module)
    for name, layer in subspace_layers(module.model).items():
        assert not torch.equal(layer.weight, before[name]), name
        assert not layer.delta.any()


@pytest.mark.parametrize("same", [True, False])
def test_galore_goes_on_after_a_fit_without_it(tmp_path, same):
    module, galore = adamw_module(), GaLore(rank=4, projector=NEVER)
    again = galore if same else GaLore(rank=4, projector=NEVER)
    for callbacks in ([galore], [], [again]):
        before = matrices(module) if module.model is not None else {}
        fit(tmp_path, module, *callbacks)
    for name, layer in subspace_layers(module.model).items():
        update = (layer.weight - before[name]).detach()
        scale = 1 if layer.rows_are_tokens else math.sqrt(layer.basis.shape[1] / layer.rank)
        bounds = 2 * 1e-2 * scale * math.sqrt(update.numel())
        assert 0 < update.norm() < 1.01 * bounds  # two steps of AdamW, no leap
        assert layer.weight.requires_grad and not layer.delta.requires_grad


def test_a_rate_finder_is_refused_also_after_a_validation(tmp_path):
    module = adamw_module()
    trainer = trainer_of(tmp_path, callbacks=[GaLore(rank=4)])
    trainer.validate(module, loader(*SAME_BATCH), verbose=False)
    with pytest.raises(MisconfigurationException, match="Find the rate without GaLore"):
        Tuner(trainer).lr_find(module, loader(*SAME_BATCH), attr_name="rate")


def test_averages_of_weights_come_after_galore(tmp_path):
    with pytest.raises(MisconfigurationException, match="List GaLore before EMAWeightAveraging"):
        fit(tmp_path, adamw_module(), EMAWeightAveraging(), GaLore(rank=4))
    module = adamw_module()
    fit(tmp_path, module, GaLore(rank=4), EMAWeightAveraging(decay=0.5), max_steps=4)
    assert all(weight.isfinite().all() for weight in matrices(module).values())


@pytest.mark.parametrize("same", [True, False])
def test_averages_are_taken_of_a_module_that_was_fitted_without_them(tmp_path, same):
    module, galore = adamw_module(), GaLore(rank=4)
    fit(tmp_path, module, galore)
    callbacks = [galore if same else GaLore(rank=4), EMAWeightAveraging(decay=0.5)]
    trainer = trainer_of(
        tmp_path, callbacks=callbacks, max_steps=4, limit_val_batches=1, num_sanity_val_steps=1
    )
    before = matrices(module)
    trainer.fit(module, loader(*SAME_BATCH), loader(*SAME_BATCH))
    assert not any(torch.equal(w, before[name]) for name, w in matrices(module).items())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"targets": ["mlp"]}, "other targets, such as"),
        ({"side": "left"}, "injected with side=right, GaLore has side=left"),
        ({"rank": 2}, "injected with rank=4, GaLore has rank=2"),
    ],
)
def test_an_injected_module_and_galore_must_agree(tmp_path, options, named):
    module = adamw_module()
    fit(tmp_path, module, GaLore(rank=4))
    with pytest.raises(MisconfigurationException, match=named):
        fit(tmp_path, module, GaLore(**{"rank": 4, **options}))


def test_a_checkpoint_goes_on_with_another_interval_but_not_with_another_rule(tmp_path):
    trainer = fit(tmp_path, adamw_module(), GaLore(rank=4, projector=Oja(every=1)))
    trainer.save_checkpoint(tmp_path / "two.ckpt")

    def go_on(projector):
        module, galore = adamw_module(), GaLore(rank=4, projector=projector)
        trainer = trainer_of(tmp_path, callbacks=[galore], max_steps=4)
        trainer.fit(module, loader(*SAME_BATCH), ckpt_path=tmp_path / "two.ckpt")
        return galore.updater.step

    assert go_on(Oja(every=2)) == 4
    with pytest.raises(MisconfigurationException, match=r"projector=Oja\(step_size=0.1, rot"):
        go_on(Oja(step_size=0.2))


@pytest.mark.parametrize("projector", [Oja(), Online()])
def test_layers_that_would_rest_by_their_rule_have_no_adaptive_turns(tmp_path, projector):
    with pytest.raises(ValueError, match=r"Use SubspaceIteration\(\)"):
        fit(tmp_path, adamw_module(), GaLore(4, projector), SubspaceRefresh(adaptive=True))


def test_callbacks_see_a_frozen_weight_during_training_alone(tmp_path):
    seen = []

    def look(trainer, module, *_):
        seen.append({layer.weight.requires_grad for layer in subspace_layers(module).values()})

    fit(tmp_path, adamw_module(), GaLore(rank=4), LambdaCallback(on_train_batch_end=look))
    assert seen == [{False}] * 2
