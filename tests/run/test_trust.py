"""What a configuration may run, and who may say that it is trusted."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.utils import get_object

from lit_ft.run.arguments import for_hydra
from lit_ft.run.trust import KINDS, refuse_untrusted
from lit_ft.run.trust import trusted_packages as given_trust
from tests.support.commands import TINY, run
from tests.support.running import CONF

HOSTILE = [
    "os.system",
    "builtins.eval",
    "torch.load",
    "torch.hub.load",
    "torch.utils.cpp_extension.load_inline",
    "lit_ft.run.summary.os.replace",
    "lit_ft.data.cache.shutil.rmtree",
    "lit_ft.run.summary.Path",
    "lit_ft.run.export_run.export_run",
    "transformers.AutoTokenizer.from_pretrained",
    "transformers.AutoModelForCausalLM.from_pretrained",
    "transformers.Trainer",
    "transformers.pipeline",
    "lightning.pytorch.LightningModule.load_from_checkpoint",
    "lightning.pytorch.cli.LightningCLI",
    "lightning.pytorch.core.module.torch.load",
    "peft.PeftModel.from_pretrained",
    "bitsandbytes.optim.adamw.torch.load",
    "torch.optim.missing",
    "lit_ft_evil.run",
]


@pytest.mark.parametrize("target", HOSTILE)
def test_what_is_no_class_of_a_known_kind_is_refused_wherever_it_stands(target: str) -> None:
    for config in (
        {"_target_": target},
        {"callbacks": {"mine": {"_target_": target}}},
        {"plugins": [{"x": 1}, {"deep": [{"_target_": target}]}]},
    ):
        with pytest.raises(ValueError, match=target.replace(".", r"\.")):
            refuse_untrusted(config)


@pytest.mark.parametrize(
    "target",
    [
        "lit_ft.CausalLMModule",
        "torch.optim.Adafactor",
        "torch.optim.lr_scheduler.OneCycleLR",
        "bitsandbytes.optim.AdamW8bit",
        "torchao.optim.AdamW8bit",
        "galore_torch.GaLoreAdamW",
        "lightning.pytorch.callbacks.StochasticWeightAveraging",
        "lightning.pytorch.strategies.DDPStrategy",
        "lightning.pytorch.loggers.MLFlowLogger",
        "transformers.get_wsd_schedule",
        "transformers.BitsAndBytesConfig",
        "peft.VeraConfig",
    ],
)
def test_classes_that_people_name_are_admitted(target: str) -> None:
    refuse_untrusted({"x": {"_target_": target}})


@pytest.mark.parametrize("name", KINDS)
def test_each_kind_stands_where_it_is_defined(name: str) -> None:
    kind = get_object(name)
    assert name == f"{kind.__module__}.{kind.__qualname__}"


def test_the_refusal_says_where_it_stands_and_how_to_trust_it() -> None:
    config = {"trainer": {"plugins": [{"_target_": "tests.support.stopping.Fault"}]}}
    with pytest.raises(
        ValueError, match=r"config\.trainer\.plugins\[0\].*trusted_packages=\[tests\]"
    ):
        refuse_untrusted(config)
    refuse_untrusted(config, also=["tests"])


def test_trust_in_a_package_is_trust_in_what_it_defines_alone() -> None:
    with pytest.raises(ValueError, match="os.replace"):
        refuse_untrusted({"_target_": "tests.support.stopping.os.replace"}, also=["tests"])


def test_only_the_command_line_trusts() -> None:
    config = {"trusted_packages": ["tests"], "model": {"trust_remote_code": False}}
    assert given_trust(config, ["trusted_packages=[tests]"]) == ["tests"]
    with pytest.raises(ValueError, match="A configuration file sets trusted_packages"):
        given_trust(config, ["model=tiny"])
    remote = {"data": {"sources": [{"trust_remote_code": True}]}}
    with pytest.raises(ValueError, match=r"config.data.sources\[0\].trust_remote_code=true"):
        given_trust(remote, ["data=mix"])
    assert given_trust(remote, ["data.sources=[{trust_remote_code: true}]"]) == []


HYDRA = {
    "callbacks": "callbacks: {mine: {_target_: tests.support.marker.Marker, path: MARKER}}",
    "launcher": "launcher: {_target_: tests.support.marker.Marker}",
    "sweeper": "sweeper: {_target_: tests.support.marker.Marker}",
    "job_logging": (
        "job_logging: {handlers: {mine: {'()': tests.support.marker.Marker, path: MARKER}}}"
    ),
    "job.env_set": "job: {env_set: {MARKER: 'MARKER'}}",
}


@pytest.fixture
def experiments(tmp_path: Path) -> Path:
    folder = tmp_path / "conf"
    (folder / "experiment").mkdir(parents=True)
    for name, line in HYDRA.items():
        text = f"# @package _global_\nhydra:\n  {line}\n".replace(
            "MARKER", str(tmp_path / "marker")
        )
        (folder / "experiment" / f"{name}.yaml").write_text(text)
    (folder / "experiment" / "harmless.yaml").write_text("# @package _global_\nseed: 3\n")
    return folder


@pytest.mark.parametrize("name", HYDRA)
@pytest.mark.parametrize("sweep", ["", "harmless,"])
def test_a_file_changes_nothing_that_hydra_runs(experiments: Path, name: str, sweep: str) -> None:
    arguments = [f"hydra.searchpath=[file://{experiments}]", f"experiment={sweep}{name}"]
    with pytest.raises(ValueError, match=f"A configuration file sets hydra.{name}"):
        for_hydra(arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["hparams_search=learning_rate"],
        ["-m", "optim.lr=1e-4,2e-4", "hydra.sweeper.max_batch_size=1"],
        ["experiment=lora_laptop,full_8bit", "-m"],
        ["hydra/launcher=slurm", "hydra.launcher.partition=gpu"],
        ["no such argument"],
    ],
)
def test_what_the_project_brings_and_the_command_line_sets_is_taken(arguments: list[str]) -> None:
    for_hydra(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", HYDRA)
def test_no_code_of_a_file_runs_in_the_program(
    experiments: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = f"hydra.searchpath=[file://{experiments}]"
    monkeypatch.setenv("MARKER", str(experiments.parent / "marker"))
    monkeypatch.setenv("PYTHONPATH", str(CONF.parent))
    status, output = run(search, f"experiment={name}", *TINY, "-m", cwd=experiments)
    assert status == 1
    assert f"A configuration file sets hydra.{name}" in output
    assert not (experiments.parent / "marker").exists()
