"""What is added takes the files that the docs name, and no edit of any other."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from lit_ft.compat.optimizers import Traits, traits_of
from tests.support.commands import TINY
from tests.support.running import run_job

OPTIMIZER = '''
import torch


class SignDescent(torch.optim.Optimizer):
    """Somebody else's optimizer."""

    def __init__(self, params, lr=1e-3, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    mean = self.state[p].setdefault("momentum_buffer", torch.zeros_like(p))
                    mean.lerp_(p.grad, 1 - group["beta"])
                    p.add_(mean.sign(), alpha=-group["lr"])
        return loss
'''

PROJECTOR = '''
from dataclasses import dataclass
from typing import ClassVar

from lit_ft.subspace.projectors import BasisInput, Projector


@dataclass(frozen=True)
class Rolling(Projector):
    """Moves a basis along by one coordinate: a rule that nothing in lit_ft knows."""

    basis_input: ClassVar[BasisInput] = BasisInput.NOTHING
    every: int = 1
    rotates_moments: bool = True

    def move(self, basis, basis_input, **_):
        return basis.roll(1, dims=1)
'''


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with conf/ and modules of one's own next to those of the project."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path / "conf"
    sys.modules.pop("theirs", None)


def run(tmp_path: Path, *overrides: str) -> dict:
    return run_job(
        tmp_path / "run",
        f"hydra.searchpath=[file://{tmp_path / 'conf'}]",
        "trusted_packages=[theirs]",
        *TINY,
        "trainer.max_steps=3",
        *overrides,
    )


def add(conf: Path, name: str, text: str, module: str) -> None:
    (conf / name).parent.mkdir(parents=True)
    (conf / name).write_text(text)
    (conf.parent / "theirs.py").write_text(module)


@pytest.mark.parametrize("galore", ["none", "online"])
def test_an_optimizer_of_another_package_takes_a_yaml_alone(galore, conf, tmp_path):
    yaml = "_target_: theirs.SignDescent\n_partial_: true\nlr: 1e-3\n"
    add(conf, "optim/theirs.yaml", yaml, OPTIMIZER)
    # The default strategy brings layerwise updates, which know nothing of it either.
    summary = run(tmp_path, "optim=theirs", f"galore={galore}", "strategy=single_gpu")
    assert (summary["status"], summary["steps"]) == ("completed", 3)
    assert summary["val_loss"] < summary["initial_val_loss"]
    from theirs import SignDescent

    assert traits_of(SignDescent) == Traits()  # no row of the table is about it


def test_a_projector_takes_a_file_and_a_yaml(conf, tmp_path):
    yaml = (
        "# @package _global_\ndefaults:\n  - online\n"
        "galore:\n  projector:\n    _target_: theirs.Rolling\n"
    )
    add(conf, "galore/rolling.yaml", yaml, PROJECTOR)
    summary = run(tmp_path, "optim=adamw", "galore=rolling", "galore.rank=8")
    assert (summary["status"], summary["steps"]) == ("completed", 3)
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["callbacks"]["GaLore"]["made_with"]["projector"].startswith("Rolling(")
