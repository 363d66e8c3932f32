"""GaLore on two DDP ranks does what it does on one: law 3."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from torch import distributed as dist
from torch import nn
from torch.optim import AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

from examples.other_project import Regression
from lit_ft.callbacks import GaLore
from lit_ft.subspace.projectors import SVD, Oja, SubspaceIteration
from tests.support.ranks import WORLD
from tests.support.tiny_module import batch_of, module_of, rows, trainer_of

pytestmark = pytest.mark.slow

STEPS, ROWS = 6, 8
PROJECTORS = {
    "oja": Oja(every=1),
    "staggered": SubspaceIteration(every=2),
    "svd": SVD(every=2, rotates_moments=True),
}


class Routed(LightningModule):
    """Rows go through one of two layers, so that a rank may leave a layer out."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(32, 16), nn.Linear(32, 16)])

    def training_step(self, batch, batch_idx):
        x, y = batch
        ways = ((x[:, 0] > 0, self.layers[0]), (x[:, 0] <= 0, self.layers[1]))
        terms = [
            (layer(x[way])[:, : y.shape[1]] - y[way]).square() for way, layer in ways if any(way)
        ]
        return torch.cat(terms).mean()

    def configure_optimizers(self):
        return AdamW(self.parameters(), lr=3e-3)


def regression_batches():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, ROWS, 32, generator=generator, dtype=torch.float64)
    x[..., 0].abs_()  # then half of the rows negative: first those of both ranks, then of one
    x[::2, ::2, 0].neg_()
    x[1::2, ROWS // 2 :, 0].neg_()
    return list(zip(x, x[..., :8].sin() + x[..., 8:16], strict=True))


def causal_batches():
    return [batch_of([12, 3, 9, 4, 12, 2, 5, 7], seed=seed) for seed in range(STEPS)]


MODULES = {
    "plain": (Regression, regression_batches),
    "routed": (Routed, regression_batches),
    # Its loss is the mean over the targets of both ranks' rows, of which one has more.
    "causal": (partial(module_of, optimizer=partial(AdamW, lr=1e-3)), causal_batches),
}


class Broadcasts(Callback):
    """Notes the elements of every broadcast while training."""

    def __init__(self):
        self.sent = sent = []

        class Noting(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                if func is torch.ops.c10d.broadcast_.default:
                    sent.append(sum(tensor.numel() for tensor in args[0]))
                return func(*args, **(kwargs or {}))

        self.mode = Noting()

    def on_train_start(self, *_):
        self.mode.__enter__()

    def on_train_end(self, *_):
        self.mode.__exit__(None, None, None)


def part(batch, rank, world):
    begin, end = rank * ROWS // world, (rank + 1) * ROWS // world
    if isinstance(batch, dict):
        return rows(batch, begin, end)
    return [tensor[begin:end] for tensor in batch]


def fit(module_name, projector, folder, strategy="auto"):
    """Train on this rank's rows; return the module's tensors and what was broadcast."""
    rank, world = (dist.get_rank(), WORLD) if dist.is_initialized() else (0, 1)
    torch.manual_seed(rank)  # DDP takes the weights of rank 0; the bases are the callback's affair
    build, batches = MODULES[module_name]
    module, broadcasts = build(), Broadcasts()
    trainer = trainer_of(
        folder,
        strategy=strategy,
        devices=world,
        precision="64-true",
        max_steps=STEPS,
        gradient_clip_val=0.5,
        callbacks=[GaLore(rank=4, projector=PROJECTORS[projector]), broadcasts],
        use_distributed_sampler=False,
    )
    data = [part(batch, rank, world) for batch in batches()]
    trainer.fit(module, DataLoader(data, batch_size=None))
    return {n: t.detach().clone() for n, t in module.state_dict().items()}, broadcasts.sent


@pytest.mark.parametrize("projector", PROJECTORS)
@pytest.mark.parametrize("module_name", MODULES)
def test_two_ranks_train_what_one_does(on_both, tmp_path, module_name, projector):
    strategy = "ddp_find_unused_parameters_true" if module_name == "routed" else "ddp"
    one, _ = fit(module_name, projector, tmp_path)
    (first, sent), (second, _) = on_both(fit, module_name, projector, tmp_path, strategy=strategy)
    for name, value in one.items():
        assert torch.equal(first[name], second[name]), name
        spanned, expected = first[name], value
        if name.endswith("basis"):  # the signs of singular vectors are LAPACK's to choose
            spanned, expected = spanned.T @ spanned, value.T @ value
        torch.testing.assert_close(spanned, expected, rtol=0, atol=1e-10, msg=name)
    smallest = min(value.numel() for name, value in one.items() if "basis" in name)
    assert sum(sent) < smallest  # else the bases are sent before each forward pass
