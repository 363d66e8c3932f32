"""What `python train.py` does when nothing is chosen, and what each choice makes of that."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import ClassVar

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import MissingConfigException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy
from omegaconf import OmegaConf

from lit_ft.callbacks import LayerwiseUpdate
from tests.support.running import CONF, run_job


class Probe(Callback):
    """Keeps what the run trains with."""

    shapes: ClassVar[dict[str, tuple[int, ...]]] = {}
    trainer: ClassVar[list[Trainer]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        [optimizer] = trainer.optimizers
        names = {p: name for name, p in pl_module.named_parameters()}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.shapes.clear()
        self.shapes.update({names[p]: tuple(p.shape) for p in parameters})
        self.trainer[:] = [trainer]


def composed(*overrides: str, conf: Path = CONF):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf), version_base="1.3"):
        return compose("train", list(overrides))


def test_the_default_job_trains_small_parameters_layer_by_layer_on_one_device(tmp_path):
    run_job(
        tmp_path,
        "model=tiny",
        "galore.rank=16",  # the default's 128 is more than this model's width
        "trainer.max_steps=1",
        "data.max_length=96",
        "data.max_val_examples=2",
        "logger=none",
        "~callbacks.samples",
        "+callbacks.probe._target_=tests.contracts.test_defaults.Probe",
        "trusted_packages=[tests]",
    )
    matrices = {name: shape for name, shape in Probe.shapes.items() if len(shape) > 1}
    assert len(matrices) == 15  # seven of each of two layers, and the tied embedding
    assert all(name.endswith(".delta") and shape[1] == 16 for name, shape in matrices.items())
    assert all("norm" in name for name in Probe.shapes.keys() - matrices.keys())
    [trainer] = Probe.trainer
    assert isinstance(trainer.strategy, SingleDeviceStrategy)
    assert any(isinstance(callback, LayerwiseUpdate) for callback in trainer.callbacks)


def test_its_subspaces_are_of_rank_128():
    assert composed().galore.rank == 128


@pytest.mark.parametrize("strategy", ["auto", "cpu", "ddp"])
def test_other_strategies_keep_gradients(strategy):
    assert "layerwise" not in composed(f"strategy={strategy}").callbacks
    assert "layerwise" in composed(f"strategy={strategy}", "update=layerwise").callbacks


def test_update_whole_keeps_gradients_on_the_default_strategy():
    assert "layerwise" not in composed("update=whole").callbacks


@pytest.mark.parametrize(
    "adapter", sorted(p.stem for p in CONF.glob("adapter/*.yaml") if p.stem != "none")
)
def test_an_adapter_brings_its_optimizer_in_the_place_of_galore(adapter):
    config = composed(f"adapter={adapter}")
    assert config.optim.lr == 5e-4
    assert config.galore is None
    assert not {"galore", "subspace_refresh"} & config.callbacks.keys()


@pytest.mark.parametrize(
    ("preset", "stands_for"),
    [
        ("galore_subspace", ["optim=adamw", "galore=online"]),
        ("galore_subspace_8bit", ["optim=adamw_8bit", "galore=online"]),
        ("galore", ["optim=adamw", "galore=iteration"]),
        (
            "galore_svd",
            [
                "optim=adamw",
                "galore=svd",
                "optim.lr=4e-4",
                "galore.scale=0.25",
                "galore.refresh.stagger=false",
            ],
        ),
    ],
)
def test_a_preset_is_what_it_stands_for(preset, stands_for):
    run_dir = "run_dir=here"
    assert composed(f"optim={preset}", run_dir) == composed(*stands_for, run_dir)


def test_an_optimizer_by_itself_has_no_galore():
    assert composed("optim=adamw").galore is None
    assert composed("experiment=full_8bit").galore is None


@pytest.mark.parametrize(
    ("galore", "projector"),
    [
        ("online", "Oja"),
        ("iteration", "SubspaceIteration"),
        ("svd", "SVD"),
        ("random", "Random"),
        ("paper", "Online"),
    ],
)
def test_the_command_line_chooses_galore_over_a_preset(galore, projector):
    for optim in ("galore_subspace", "galore", "adamw_8bit", "muon"):
        config = composed(f"optim={optim}", f"galore={galore}")
        assert config.galore.projector._target_.endswith(f".{projector}")
        assert config.callbacks.galore.projector == config.galore.projector
        assert "every" not in config.galore.projector  # galore.refresh.every is the one knob
    assert composed("optim=galore_subspace", "galore=none").galore is None


@pytest.mark.parametrize("choice", ["optim=galore_svd", "galore=svd", "galore=paper"])
def test_a_basis_from_whole_gradients_keeps_gradients_unless_asked_otherwise(choice):
    assert "layerwise" not in composed(choice).callbacks
    assert "layerwise" in composed(choice, "update=layerwise").callbacks


def test_sharded_weights_leave_galore_its_choice():
    config = composed("strategy=fsdp", "optim=galore")
    assert config.galore.projector._target_.endswith(".SubspaceIteration")
    assert "layerwise" not in config.callbacks


@pytest.fixture
def own_conf(tmp_path) -> Path:
    """A copy of conf/ without this machine's own settings."""
    ignored = shutil.ignore_patterns("default.yaml")
    shutil.copytree(CONF, tmp_path / "conf", ignore=lambda f, n: _local_only(ignored, f, n))
    return tmp_path / "conf"


def _local_only(ignored, folder, names):
    return ignored(folder, names) if Path(folder).name == "local" else ()


def test_a_machine_may_have_settings_of_its_own(own_conf):
    plain = composed("run_dir=here", conf=own_conf)
    assert plain == composed("run_dir=here", "~local")
    (own_conf / "local/default.yaml").write_text(
        "# @package _global_\n"
        "defaults:\n  - override /logger: csv\n"
        "trainer:\n  max_steps: 7\n  log_every_n_steps: 2\n"
    )
    own = composed("run_dir=here", conf=own_conf)
    assert (own.trainer.max_steps, own.trainer.log_every_n_steps) == (7, 2)
    assert set(own.logger) == {"csv"}
    experiment = composed("experiment=long_rows", "trainer.log_every_n_steps=3", conf=own_conf)
    assert (experiment.trainer.max_steps, experiment.trainer.log_every_n_steps) == (20, 3)
    assert composed("run_dir=here", "~local", conf=own_conf) == plain


@pytest.mark.parametrize("choice", ["experiment=lora_laptp", "hparams_search=rates"])
def test_a_choice_that_is_not_there_is_no_default_job(choice):
    with pytest.raises(MissingConfigException, match=choice.partition("=")[2]):
        composed(choice)


def test_what_a_choice_needs_has_no_value_from_the_default():
    assert composed("data=file").data.path is None  # refused before anything is loaded
    assert OmegaConf.missing_keys(composed("model=gguf")) >= {"model.gguf_file"}
