"""LayerwiseUpdate leaves the module and the process as it found them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lit_ft.callbacks import LayerwiseUpdate
from lit_ft.compat import clips_as_lightning_does

CONFIG = torch._functorch.config


class Net(L.LightningModule):
    """Somebody's module, with a loss of any kind."""

    def __init__(self, loss: Callable[[Tensor], Tensor] = lambda y: y.square().mean()) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        self.of_outputs = loss

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return self.of_outputs(self.net(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(
    module: L.LightningModule,
    *callbacks: Callback,
    clip: float | None = 0.1,
    layerwise: bool = True,
) -> None:
    torch.manual_seed(0)
    first = [LayerwiseUpdate(min_grad_bytes=0)] if layerwise else []
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=2,
        gradient_clip_val=clip,
        callbacks=[*first, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    trainer.fit(module, DataLoader(torch.randn(8, 4), batch_size=4))


class Watch(Callback):
    """Sees the process-wide switch while training runs, and may stop it."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.seen: list[bool] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(CONFIG.donated_buffer)
        if self.error is not None:
            raise self.error


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("error", [None, KeyError("stop")])
def test_the_switch_of_torch_compile_is_put_back(before: bool, error: Exception | None) -> None:
    watch = Watch(error)
    with CONFIG.patch(donated_buffer=before):
        try:
            fit(Net(), watch)
        except KeyError:
            assert error is not None
        assert CONFIG.donated_buffer is before
    assert torch.compiler.config.cache_key_tag == ""
    assert watch.seen and not any(watch.seen)  # two backward passes need it off


def test_an_optimizer_that_is_refused_late_leaves_the_switch_alone() -> None:
    module = Net()
    module.configure_optimizers = lambda: torch.optim.LBFGS(module.parameters())  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="LBFGS"):
        fit(module)
    assert CONFIG.donated_buffer


def test_without_a_second_backward_pass_the_switch_is_not_touched() -> None:
    watch = Watch()
    fit(Net(), watch, clip=None)
    assert watch.seen == [True, True]


@pytest.mark.slow  # torch.compile starts a C++ compiler
def test_a_graph_that_was_compiled_before_stands_the_second_backward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # No submodule is compiled: that a step compiles anything shows when it does.
    def loss(outputs: Tensor) -> Tensor:
        return (outputs @ outputs.T).tanh().sin().exp().matmul(outputs).square().mean()

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    compiled = Net(torch.compile(loss))
    start = copy.deepcopy(compiled.state_dict())
    fit(compiled, layerwise=False)  # whose backward pass overwrites what it has saved
    compiled.load_state_dict(start)
    fit(compiled)
    eager = Net(loss)
    eager.load_state_dict(start)
    fit(eager)
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict())


@clips_as_lightning_does
def clips(optimizer: Any, value: float | None = None, algorithm: str | None = None) -> None:
    """What a user has put in place of the module's hook."""


def test_the_users_own_hook_stands_again_after_a_fit() -> None:
    module = Net()
    module.configure_gradient_clipping = clips  # type: ignore[method-assign]
    fit(module)
    assert vars(module)["configure_gradient_clipping"] is clips
    assert "backward" not in vars(module)


@pytest.mark.parametrize("name", ["backward", "configure_gradient_clipping"])
def test_what_somebody_puts_in_its_place_meanwhile_stays(name: str) -> None:
    class Wraps(Callback):
        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            usual = getattr(pl_module, name)
            self.own = lambda *args, **kwargs: usual(*args, **kwargs)
            setattr(pl_module, name, self.own)

    module, wraps = Net(), Wraps()
    fit(module, wraps)
    assert vars(module)[name] is wraps.own
