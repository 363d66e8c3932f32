"""GaLore under what engines put around a step: grad scalers, compilation, bad numbers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch._dynamo.utils import counters
from torch.optim import AdamW
from torch.utils.data import DataLoader

from lit_ft.callbacks import GaLore, SubspaceRefresh
from lit_ft.subspace import Refresh
from lit_ft.subspace.projectors import SVD, Oja, Online, SubspaceIteration
from tests.support.tiny_module import batch_of, float16, module_of, trainer_of

GOOD, INF = torch.ones(()), torch.tensor(torch.inf)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(16, 24), nn.Linear(24, 8)

    def forward(self, x):
        return self.last(nn.functional.gelu(self.first(x)))


class Regression(LightningModule):
    """A network whose batch says what its loss is multiplied with."""

    def __init__(self, **options):
        super().__init__()
        torch.manual_seed(0)
        self.net = Net()
        self.options = {"lr": 1e-2, "weight_decay": 0.1, **options}

    def training_step(self, batch, batch_idx):
        x, factor = batch
        return (self.net(x) - x[..., :8]).square().mean() * factor

    def configure_optimizers(self):
        return AdamW(self.parameters(), **self.options)


class States(Callback):
    """Keeps everything that a step may change, as it is after each batch."""

    def __init__(self, galore):
        self.galore = galore
        self.seen = []

    def on_train_batch_end(self, trainer, module, *_):
        steps = torch.tensor(self.galore.updater.step)
        tensors = [*module.state_dict().values(), *moments(module), steps]
        self.seen.append([tensor.clone() for tensor in tensors])


def moments(module):
    states = module.trainer.optimizers[0].state.values()
    return [value for state in states for value in state.values()]


def batches(*factors, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(6, 5, 16, generator=generator), factor) for factor in factors]


def causal(lr=1e-2):
    return module_of(optimizer=partial(AdamW, lr=lr))


def train(
    folder,
    data,
    *,
    kind=Regression,
    scale=None,
    projector=None,
    refresh=None,
    accumulate_grad_batches=1,
    precision=None,
    log_every=None,
    **options,
):
    """Train on `data`; return the module and what each batch left."""
    galore = GaLore(rank=4, projector=projector or Oja(every=1))
    galore.reschedule(refresh or Refresh())
    states = States(galore)
    module = kind(**options)
    plugins = []
    if scale is not None:
        plugins = [float16(scale)]
    trainer = trainer_of(
        folder,
        plugins=plugins,
        precision=precision,
        max_steps=-1,
        max_epochs=1,
        accumulate_grad_batches=accumulate_grad_batches,
        callbacks=[
            galore,
            states,
            *([SubspaceRefresh(every_n_steps=log_every)] if log_every else []),
        ],
    )
    trainer.fit(module, DataLoader(data, batch_size=None))
    return module, states.seen


@pytest.mark.parametrize("projector", [Oja(every=1), Online(), SubspaceIteration(every=2)])
@pytest.mark.parametrize("kind", [Regression, causal])
def test_the_scale_of_the_loss_does_not_matter(tmp_path, kind, projector):
    data = batches(*[GOOD] * 5)
    if kind is causal:
        data = [batch_of([12, 5, 7], seed=seed) for seed in range(5)]
    options = {"kind": kind, "projector": projector}
    first, second = (
        dict(train(tmp_path, data, scale=scale, **options)[0].named_parameters())
        for scale in (2.0**9, 2.0**12)  # below, float16 loses small gradients
    )
    for name, weight in first.items():
        torch.testing.assert_close(second[name], weight, rtol=0, atol=2e-3, msg=name)


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_a_grad_scaler_skips_leaves_no_trace(tmp_path, fused):
    first, second, third = batches(*[GOOD] * 3)
    bad = [(x, INF) for x, _ in batches(GOOD, seed=9)]
    _, straight = train(tmp_path, [first, second, third], scale=2.0**10, fused=fused)
    _, skipping = train(tmp_path, [first, second, *bad, third], scale=2.0**10, fused=fused)
    for before, after in zip(skipping[1], skipping[2], strict=True):
        assert torch.equal(before, after)
    for ours, other in zip(skipping[3], straight[2], strict=True):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("projector", [SVD(), Online(starts_from_svd=True)])
def test_a_grad_scaler_and_bases_from_whole_gradients_are_refused(tmp_path, projector):
    with pytest.raises(MisconfigurationException, match=r"Use SubspaceIteration\(\) or Oja\(\)"):
        train(tmp_path, batches(GOOD), scale=2.0**10, projector=projector)


class ByHand(Regression):
    """Steps by itself: Lightning has autocast on while it does."""

    def __init__(self, **options):
        super().__init__(**options)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "projector",
    [
        Oja(every=1),
        Online(),
        SubspaceIteration(every=1),
        SVD(every=1, rotates_moments=True),
    ],
)
def test_a_step_by_hand_under_autocast_is_an_automatic_one(tmp_path, projector):
    data = batches(*[GOOD] * 4)
    options = {"projector": projector, "precision": "bf16-mixed"}
    automatic, by_hand = (
        train(tmp_path, data, kind=kind, **options)[0].state_dict() for kind in (Regression, ByHand)
    )
    for name, value in automatic.items():
        torch.testing.assert_close(by_hand[name], value, rtol=0, atol=0, msg=name)


class Skips(ByHand):
    """Backpropagates what comes first, and takes no step on it."""

    def training_step(self, batch, batch_idx):
        if batch_idx == 0:
            self.manual_backward(Regression.training_step(self, batch, batch_idx))
            self.optimizers().zero_grad()
        else:
            super().training_step(batch, batch_idx)


class Rests(Skips):
    """Does not look at what comes first."""

    def training_step(self, batch, batch_idx):
        if batch_idx:
            super().training_step(batch, batch_idx)


@pytest.mark.parametrize(
    "projector", [Oja(every=1), SubspaceIteration(every=1), SVD(every=1, rotates_moments=True)]
)
@pytest.mark.parametrize("factor", [torch.tensor(1e3), INF])
def test_a_batch_that_is_given_up_by_hand_leaves_no_trace(tmp_path, projector, factor):
    data = batches(factor, GOOD, GOOD)
    skipped, unseen = (
        train(tmp_path, data, kind=kind, projector=projector)[0].state_dict()
        for kind in (Skips, Rests)
    )
    for name, value in unseen.items():
        assert torch.equal(skipped[name], value), name


class RootOfZero(Regression):
    """Its loss is finite, the gradient of its first layer is not, where the batch says so."""

    def training_step(self, batch, batch_idx):
        x, factor = batch
        loss = super().training_step((x, GOOD), batch_idx)
        hidden = self.net.first(x)
        return loss if factor == 1 else loss + (hidden - hidden.detach()).abs().sum().sqrt()


@pytest.mark.parametrize("projector", [Oja(every=1), SVD(every=1, rotates_moments=True)])
def test_a_bad_gradient_is_named_before_it_reaches_anything(tmp_path, projector):
    data = batches(GOOD, GOOD, INF)
    module = RootOfZero()
    with pytest.raises(FloatingPointError, match=r"gradient of net\.first is not finite at step 3"):
        train(tmp_path, data, kind=lambda: module, projector=projector)
    _, states = train(tmp_path, data[:2], kind=RootOfZero, projector=projector)
    left = [*module.state_dict().values(), *moments(module)]
    for ours, other in zip(left, states[-1][:-1], strict=True):
        assert torch.equal(ours, other)


class Compiled(Regression):
    def __init__(self, way):
        super().__init__()
        if way == "in place":
            self.net.compile(backend="aot_eager")
        else:
            self.net = torch.compile(self.net, backend="aot_eager")


@pytest.mark.parametrize("way", ["in place", "wrapped"])
@pytest.mark.parametrize("log_every", [None, 3])
@pytest.mark.parametrize("projector", [Oja(every=1), SubspaceIteration(every=4)])
def test_compiled_models_train_alike_in_few_graphs(tmp_path, projector, log_every, way):
    data = batches(*[GOOD] * 20)
    options = {"projector": projector, "accumulate_grad_batches": 2}
    plain, _ = train(tmp_path, data, refresh=Refresh(stagger=False), **options)
    counters.clear()
    torch.compiler.reset()
    kind = partial(Compiled, way)
    compiled, _ = train(tmp_path, data, kind=kind, log_every=log_every, **options)
    # With sketches and without, and both with energies too where steps are logged.
    assert 1 <= counters["stats"]["unique_graphs"] <= (4 if log_every else 2)
    for ours, other in zip(
        compiled.state_dict().values(), plain.state_dict().values(), strict=True
    ):
        torch.testing.assert_close(ours, other, rtol=0, atol=1e-6)
