"""When GaLore's subspaces move, and what is logged of them."""

import csv
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import instantiate
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from examples.other_project import Regression
from lit_ft.callbacks import GaLore, SubspaceRefresh
from lit_ft.subspace import Refresh
from lit_ft.subspace.projectors import SVD, Random, SubspaceIteration
from tests.support.running import CONF
from tests.support.stopping import StopAt
from tests.support.tiny_module import batch_of, loader, module_of, trainer_of


def fit(folder, callbacks, *, module=None, data=None, ckpt=None, **options):
    """Train `Regression`, 8 rows a micro-batch, and return what was logged beside the loss."""
    torch.manual_seed(0)
    module = module or Regression()
    x = torch.randn(96, 32)
    rows = TensorDataset(x, x[:, :8].sin())
    trainer = trainer_of(
        folder,
        callbacks=callbacks,
        **{"max_steps": 6, "log_every_n_steps": 2, "logger": CSVLogger(folder), **options},
    )
    trainer.fit(module, data or DataLoader(rows, batch_size=8), ckpt_path=ckpt)
    return trainer, module, logged(trainer)


def logged(trainer):
    """What the callback logged, by step."""
    file = trainer.logger and Path(trainer.logger.experiment.metrics_file_path)
    if not file or not file.is_file():
        return {}
    seen = {}
    for row in csv.DictReader(file.open()):
        found = {k: float(v) for k, v in row.items() if v and k.startswith("subspace/")}
        if found:
            seen[int(row["step"])] = found
    return seen


class Moves(Callback):
    """Records at which steps which bases move."""

    def __init__(self, galore):
        self.galore, self.steps, self.asked = galore, [], []

    def _bases(self):
        return {n: la.basis.detach().clone() for n, la in self.galore.updater.layers.items()}

    def on_train_batch_start(self, *_):
        self.before = self._bases()

    def on_before_backward(self, *_):
        layers = self.galore.updater.layers.values()
        self.asked.append({layer.energy.requires_grad for layer in layers} == {True})

    def on_train_batch_end(self, trainer, *_):
        self.steps += [
            (trainer.global_step - 1, name)
            for name, basis in self._bases().items()
            if not torch.equal(basis, self.before[name])
        ]


@pytest.mark.parametrize("first", ["galore", "refresh"])
@pytest.mark.parametrize("module", [Regression, module_of])
def test_it_sets_the_schedule_on_either_side_of_galore(tmp_path, first, module):
    galore = GaLore(rank=4, projector=Random(every=1))
    pair = [galore, SubspaceRefresh(every=4, stagger=False)]
    moves = Moves(galore)
    data = None if module is Regression else loader(*[batch_of([12, 5])] * 9)
    callbacks = [*(pair if first == "galore" else reversed(pair)), moves]
    fit(tmp_path, callbacks, module=module(), data=data, max_steps=9)
    assert sorted({step for step, _ in moves.steps}) == [3, 7]
    assert {name for _, name in moves.steps} == galore.updater.layers.keys()


@pytest.mark.parametrize("optim", sorted(path.stem for path in CONF.glob("optim/galore*.yaml")))
def test_every_configuration_of_galore_brings_it_with_one_override_a_setting(optim):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        plain = compose("train", [f"optim={optim}"])
        assert ("subspace_refresh" in plain.callbacks) == ("galore" in plain.callbacks)
        if "galore" not in plain.callbacks:
            return  # the original package
        settings = {"every": 7, "adaptive": True, "threshold": 0.6}
        changes = [f"galore.refresh.{name}={value}" for name, value in settings.items()]
        changed = compose("train", [f"optim={optim}", *changes])
    own = Refresh(stagger=optim != "galore_svd")  # as its paper has it
    assert instantiate(plain.callbacks.subspace_refresh).refresh == own
    assert instantiate(changed.callbacks.subspace_refresh).refresh == replace(own, **settings)


def test_alone_it_names_what_is_missing(tmp_path):
    with pytest.raises(MisconfigurationException, match=r"GaLore\(rank=\.\.\.\)"):
        fit(tmp_path, [SubspaceRefresh()])


def test_left_alone_it_changes_nothing_that_is_trained(tmp_path):
    _, without, _ = fit(tmp_path, [GaLore(rank=4)])
    _, beside, seen = fit(tmp_path, [GaLore(rank=4), SubspaceRefresh()])
    assert seen
    for ours, theirs in zip(beside.parameters(), without.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class Explicit(Callback):
    """Forms every row's gradient, and measures how far the weights move."""

    def __init__(self, galore):
        self.galore, self.batches, self.shares, self.rms = galore, [], [], []

    def on_train_batch_start(self, trainer, module, batch, *_):
        self.batches.append(batch)

    def on_before_optimizer_step(self, trainer, module, optimizer):
        captured = total = 0.0
        layers = self.galore.updater.layers
        for row in zip(*map(torch.cat, zip(*self.batches, strict=True)), strict=True):
            inner, outer = module.net[0], module.net[2]
            weights = [la.weight.detach().requires_grad_() for la in (inner, outer)]
            x, y = (part[None] for part in row)
            hidden = torch.nn.functional.gelu(x @ weights[0].T + inner.bias)
            loss = torch.nn.functional.mse_loss(hidden @ weights[1].T + outer.bias, y)
            for layer, gradient in zip(
                layers.values(), torch.autograd.grad(loss, weights), strict=True
            ):
                captured += (gradient @ layer.basis.T).square().sum().item()
                total += gradient.square().sum().item()
        self.shares.append(captured / total)
        self.batches = []
        self.before = [la.weight.clone() for la in layers.values()]

    def on_train_batch_end(self, trainer, module, *_):
        if not self.batches:  # a step was taken
            layers = self.galore.updater.layers.values()
            moved = [(la.weight - b).ravel() for la, b in zip(layers, self.before, strict=True)]
            lr = trainer.optimizers[0].param_groups[0]["lr"]
            self.rms.append(torch.cat(moved).square().mean().sqrt().item() / lr)


def test_what_is_logged_is_what_happened(tmp_path):
    galore = GaLore(rank=4, projector=SubspaceIteration(every=3))
    explicit, moves = Explicit(galore), Moves(galore)
    _, _, seen = fit(
        tmp_path,
        [explicit, moves, SubspaceRefresh(), galore],
        accumulate_grad_batches=2,
        gradient_clip_val=0.01,
    )
    assert list(seen) == [1, 3, 5]
    assert moves.asked == [False, False, True, True] * 3
    for step, metrics in seen.items():
        assert metrics["subspace/other/captured_energy"] == pytest.approx(
            explicit.shares[step], rel=1e-4
        )
        assert metrics["subspace/step_rms"] == pytest.approx(explicit.rms[step], rel=1e-3)
        moved = [name for at, name in moves.steps if at in (step - 1, step)]
        assert ("subspace/other/overlap" in metrics) == bool(moved)
        assert ("subspace/other/refresh_seconds" in metrics) == bool(moved)
        assert 0 < metrics.get("subspace/other/overlap", 0.5) < 1
        assert 0 < metrics.get("subspace/other/refresh_seconds", 0.5) < 1


def test_every_part_of_a_language_model_is_logged(tmp_path):
    callbacks = [GaLore(rank=4), SubspaceRefresh(every_n_steps=3)]
    module = module_of(optimizer=partial(AdamW, lr=1e-3))
    data = loader(*[batch_of([12, 5, 7])] * 6)
    _, _, seen = fit(tmp_path, callbacks, module=module, data=data)
    assert list(seen) == [2, 5]
    parts = ["attention", "embeddings", "mlp"]  # the head is tied to the embedding
    for metrics in seen.values():
        assert sorted(metrics) == sorted(
            [
                "subspace/step_rms",
                *(
                    f"subspace/{part}/{metric}"
                    for part in parts
                    for metric in ("captured_energy", "overlap", "refresh_seconds")
                ),
            ]
        )
        assert all(0 < metrics[f"subspace/{part}/captured_energy"] < 1 for part in parts)


@pytest.mark.parametrize("options", [{"logger": False}, {"log_every_n_steps": 0}])
def test_nothing_is_measured_where_nothing_is_logged(tmp_path, options, monkeypatch):
    from lit_ft.subspace import basis_tracker as bases

    measured = []
    monkeypatch.setattr(bases, "overlap", lambda *_: measured.append(1))
    galore = GaLore(rank=4)
    moves = Moves(galore)
    _, _, seen = fit(tmp_path, [galore, SubspaceRefresh(), moves], **options)
    assert not seen and not measured
    assert not any(moves.asked)


def test_after_training_nothing_is_asked_for(tmp_path):
    galore = GaLore(rank=4)
    fit(tmp_path, [galore, SubspaceRefresh()], max_steps=3)
    for layer in galore.updater.layers.values():
        assert not layer.energy.requires_grad
        assert layer.energy.grad is None


@pytest.mark.parametrize("projector", [SubspaceIteration(every=1), SVD(every=1)])
def test_an_adaptive_run_stopped_and_resumed_equals_uninterrupted(tmp_path, projector):
    def run(stop=None, **options):
        callbacks = [
            SubspaceRefresh(every=2, adaptive=True, threshold=0.3, longest=4),
            GaLore(rank=4, projector=projector),
            *([StopAt(stop)] if stop else []),
        ]
        module = module_of(optimizer=partial(AdamW, lr=1e-2))
        data = loader(*[batch_of([12, 5, 7], seed=1)] * 14)
        trainer, module, _ = fit(tmp_path, callbacks, module=module, data=data, **options)
        return trainer, module, callbacks[1].updater.tracker.schedule

    _, straight, turns = run(max_steps=14)
    assert max(turns.interval.values()) > 2
    trainer, _, _ = run(stop=7, max_steps=14)
    assert trainer.global_step == 7
    trainer.save_checkpoint(tmp_path / "seven.ckpt")
    _, resumed, resumed_turns = run(max_steps=14, ckpt=tmp_path / "seven.ckpt")
    assert resumed_turns.state_dict() == turns.state_dict()
    for ours, theirs in zip(resumed.parameters(), straight.parameters(), strict=True):
        assert torch.equal(ours, theirs)
