"""GaLore in the life of a module: fits before and after, other callbacks, other schedules."""

import math
from functools import partial

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging, LambdaCallback
from lightning.pytorch.tuner import Tuner
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import CyclicLR, OneCycleLR

from lit_ft.callbacks import GaLore, SubspaceRefresh
from lit_ft.subspace import SubspaceUpdater, inject, subspace_layers
from lit_ft.subspace.projectors import Oja, Online, SubspaceIteration
from tests.support.subspace_run import NEVER, Run, batches
from tests.support.tiny_model import tiny_model
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
    with pytest.raises(MisconfigurationException, match="find the rate without GaLore"):
        Tuner(trainer).lr_find(module, loader(*SAME_BATCH), attr_name="rate")


def test_averages_of_weights_come_after_galore(tmp_path):
    with pytest.raises(MisconfigurationException, match="list GaLore before EMAWeightAveraging"):
        fit(tmp_path, adamw_module(), EMAWeightAveraging(), GaLore(rank=4))
    module = adamw_module()
    fit(tmp_path, module, GaLore(rank=4), EMAWeightAveraging(decay=0.5), max_steps=4)
    assert all(weight.isfinite().all() for weight in matrices(module).values())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"targets": ["mlp"]}, "other targets, such as"),
        ({"side": "left"}, "injected with side=right, GaLore has side=left"),
        ({"rank": 2}, "injected with rank 4, GaLore has rank=2"),
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
    with pytest.raises(ValueError, match=r"SubspaceIteration, that is optim=galore"):
        fit(tmp_path, adamw_module(), GaLore(4, projector), SubspaceRefresh(adaptive=True))


def test_steps_without_a_loss_leave_the_bases_their_start(caplog):
    data = batches(5)
    straight, late = Run(NEVER), Run(NEVER)
    for _ in range(3):
        late.optimizer.step()
    for run in (straight, late):
        run.train(data)
    for name, layer in straight.steps.layers.items():
        assert torch.equal(layer.basis, late.steps.layers[name].basis)
    assert "did not come through" not in caplog.text  # no layer is to blame


def test_a_layer_that_early_steps_do_not_reach_has_its_rounds_later():
    """As an expert that no token was sent to."""
    torch.manual_seed(0)
    both = torch.nn.ModuleDict({"always": torch.nn.Linear(8, 8), "later": torch.nn.Linear(8, 8)})
    layers = inject(both, rank=2)
    steps = SubspaceUpdater(layers, NEVER)
    optimizer = AdamW([p for p in both.parameters() if p.requires_grad])
    steps.attach(optimizer)
    start = layers["later"].basis.detach().clone()
    for step in range(8):
        x = torch.randn(5, 8)
        out = both["always"](x) + (both["later"](x) if step >= 4 else 0)
        out.square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(layers["later"].basis, start) == (step < 4)


def test_unfreezing_the_model_changes_no_rule():
    data = batches(4)
    straight, unfrozen = Run(Oja(every=1)).train(data), Run(Oja(every=1))
    unfrozen.model.requires_grad_(True)  # as BackboneFinetuning and `unfreeze` do
    unfrozen.train(data)
    for name, weight in unfrozen.weights.items():
        torch.testing.assert_close(weight, straight.weights[name], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("schedule", "peak"),
    [
        (partial(OneCycleLR, max_lr=0.1, total_steps=8), 0.1),  # starts from a 25th of it
        (partial(CyclicLR, base_lr=0.0, max_lr=0.1, step_size_up=4), None),  # of which it is silent
    ],
)
def test_a_rule_is_told_a_share_of_the_highest_rate(monkeypatch, schedule, peak):
    told = []

    def move(self, basis, basis_input, *, decay, **_):
        told.append(decay)
        return basis

    run = Run(NEVER, optimizer=partial(SGD, momentum=0.9))
    monkeypatch.setattr(SubspaceIteration, "move", move)
    rates, seen = schedule(run.optimizer), []
    for batch in batches(3):  # the rounds of the start
        seen += [run.optimizer.param_groups[0]["lr"]] * len(run.steps.layers)
        run.train([batch])
        rates.step()
    assert told == [rate / peak if peak else float(rate > 0) for rate in seen]


def test_what_a_rule_remembers_follows_its_basis():
    """A checkpoint is loaded before Lightning moves the module, here to another precision."""
    data = batches(7)
    first = Run(Online(), model=tiny_model("llama").eval()).train(data[:5])  # past the start
    second = Run(Online(), model=tiny_model("llama").eval())
    second.model.load_state_dict(first.model.state_dict())
    second.steps.load_state_dict(first.steps.state_dict())
    assert all(first.steps.state_dict()["memory"].values())
    second.model.double()
    second.train(data[5:])
    memory = second.steps.state_dict()["memory"]
    assert all(state["exp_avg"].dtype is torch.float64 for state in memory.values())


def test_a_model_made_narrower_takes_its_small_tensors_along():
    model = tiny_model("llama").double().eval()
    layers = inject(model, rank=4)
    model.float()
    assert {layer.basis.dtype for layer in layers.values()} == {torch.float32}
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad])
    SubspaceUpdater(layers, SubspaceIteration(every=1)).attach(optimizer)
    model(batches(1)[0][0]).logits.sum().backward()
    optimizer.step()
    model.bfloat16()
    assert {layer.basis.dtype for layer in layers.values()} == {torch.float32}


def test_a_second_optimizer_is_not_followed_beside_the_first():
    run = Run(NEVER)
    with pytest.raises(ValueError, match=r"call stop\(\)"):
        run.steps.attach(run.optimizer)
    run.steps.stop()
    run.handle.remove()
    run.steps.attach(run.optimizer)


def test_embeddings_that_were_resized_after_the_injection_are_refused():
    model = tiny_model("llama")
    layers = inject(model, rank=4)
    model.resize_token_embeddings(310)
    steps = SubspaceUpdater(layers, NEVER)
    with pytest.raises(ValueError, match=r"embed_tokens is \[310, .*before GaLore"):
        steps.attach(AdamW(model.parameters()))


def test_callbacks_see_a_frozen_weight_during_training_alone(tmp_path):
    seen = []

    def look(trainer, module, *_):
        seen.append({layer.weight.requires_grad for layer in subspace_layers(module).values()})

    fit(tmp_path, adamw_module(), GaLore(rank=4), LambdaCallback(on_train_batch_end=look))
    assert seen == [{False}] * 2
