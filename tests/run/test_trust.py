"""What a configuration may run, and who may say that it is trusted."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from hydra.errors import CompactHydraException, HydraException
from hydra.utils import get_object

from lit_ft.before_libraries import prepare_own_command
from lit_ft.models import Packaged
from lit_ft.preview import main as preview
from lit_ft.run.arguments import composed, for_hydra
from lit_ft.run.launch import launch
from lit_ft.run.trust import KINDS, refuse_untrusted
from lit_ft.run.trust import trusted_packages as given_trust
from tests.support.commands import TINY, run
from tests.support.running import CONF, run_job

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
    "lit_ft.run.run_log.RunLog",
    "lit_ft.run.console._Lasting",
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


@pytest.mark.parametrize(
    ("config", "told", "argument"),
    [
        ({"eval": {"include_path": "mine"}}, "eval.include_path=", "eval.include_path=mine"),
        ({"eval": {"include_path": "a [b]"}}, "eval.include_path=", "eval.include_path=a [b]"),
        ({"eval": {"tasks": ["a", "b.yaml"]}}, "eval.tasks=", "eval.tasks=[a,b.yaml]"),
        ({"eval": {"tasks": ["a", "b.yml"]}}, "eval.tasks=", "++eval={tasks: ['b.yml']}"),
        ({"callbacks": {"x": {"include_path": "y"}}}, "callbacks.x.incl", "eval.include_path='y'"),
    ],
)
def test_files_of_tasks_which_can_run_code_are_named_on_the_command_line(
    config: dict, told: str, argument: str
) -> None:
    assert given_trust(config, ["-m", argument]) == []
    for other in (
        "eval.tasks=[a]",
        "eval.tasks=[a,other.yaml]",
        "eval.include_path=other",
        "eval.include_path=null",
        "run_dir=runs/include_path_mine",
        "run_dir=tasks/b.yaml",
        "data.path=b.yaml",
        "--config=eval.tasks=b.yaml",
        f"~{argument.lstrip('+')}",
        "eval.tasks=['${data.path}']",
        "eval.include_path=${data.path}",
        "eval@eval.include_path=mine",
    ):
        with pytest.raises(ValueError, match=f"A configuration file sets {told}.*Python code"):
            given_trust(config, [other])


def test_trust_is_given_to_what_the_command_line_names_and_nothing_else() -> None:
    config = {"trusted_packages": ["os", "tests"]}
    for argument in ("trusted_packages=[tests]", "~trusted_packages", "trusted_packages=evil"):
        with pytest.raises(ValueError, match="A configuration file sets trusted_packages"):
            given_trust(config, [argument])
    remote = {"model": {"trust_remote_code": True}, "data": {"trust_remote_code": True}}
    for argument in (
        "run_dir=trust_remote_code",
        "model.trust_remote_code=false",
        "model.trust_remote_code=true",
        "trust_remote_code=true",
    ):
        with pytest.raises(ValueError, match="trust_remote_code=true, and only the command line"):
            given_trust(remote, [argument])
    both = ["model.trust_remote_code=true", "+data.trust_remote_code=true"]
    assert given_trust(remote, both) == []
    model = {"model": {"trust_remote_code": True}, "module": {"model": {"trust_remote_code": True}}}
    assert given_trust(model, ["trust_remote_code=true"]) == []


@pytest.mark.parametrize(
    ("target", "values"),
    [("lit_ft.callbacks.LMEval", [["mine.yaml"]]), ("lit_ft.models.Pretrained", ["a/b", "x"])],
)
def test_arguments_of_own_classes_have_names_since_some_give_trust(
    target: str, values: list
) -> None:
    with pytest.raises(ValueError, match=r"config.callbacks.x._args_: .*Write the names"):
        refuse_untrusted({"callbacks": {"x": {"_target_": target, "_args_": values}}})


def test_names_of_tasks_give_no_trust() -> None:
    config = {"eval": {"tasks": ["arc_easy", "docstring_choice"], "include_path": None}}
    assert given_trust(config, []) == []


INTERPOLATED = "${oc.create:{_target_:tests.support.marker.Marker}}"


@pytest.mark.parametrize(
    "config",
    [
        {"model": INTERPOLATED},
        {"callbacks": [{"mine": "before ${oc.env:HOME}"}]},
        {"escaped": r"\${seed}"},
    ],
)
def test_what_hydra_would_fill_in_later_is_refused_wherever_it_stands(config: dict) -> None:
    name = next(iter(config))
    with pytest.raises(ValueError, match=rf"config\.{name}.*\$\{{.*Write the value itself"):
        refuse_untrusted(config)


def test_a_value_that_only_looks_like_an_interpolation_is_admitted() -> None:
    refuse_untrusted(
        {"x": "$5", "y": "{a}", "z": "$HOME/{b}", "chat_template": "a $ {{ b }}.jinja"}
    )


def test_an_escaped_interpolation_of_a_file_builds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MARKER", str(tmp_path / "marker"))
    for setting in (f"module.model='\\{INTERPOLATED}'", f"data.format='\\{INTERPOLATED}'"):
        with pytest.raises(CompactHydraException, match=r"Write the value itself"):
            run_job(tmp_path / "run", "model=tiny", setting)
    with pytest.raises(SystemExit, match=r"config\.data\.format.*Write the value itself"):
        preview([setting])
    assert not (tmp_path / "marker").exists()


HYDRA = {
    "callbacks": "callbacks: {mine: {_target_: tests.support.marker.Marker, path: MARKER}}",
    "launcher": "launcher: {_target_: tests.support.marker.Marker}",
    "sweeper": "sweeper: {_target_: tests.support.marker.Marker}",
    "job_logging": (
        "job_logging: {handlers: {mine: {'()': tests.support.marker.Marker, path: MARKER}}}"
    ),
    "job.env_set": "job: {env_set: {MARKER: 'MARKER'}}",
    "mode": "mode: MULTIRUN",
    "output_subdir": "output_subdir: MARKER",
    "sweeper.params": "sweeper: {params: {model.trust_remote_code: true}}",
    "overrides.task": "overrides: {task: ['trusted_packages=[tests]']}",
    "overrides.hydra": "overrides: {hydra: ['hydra.job.env_set.MARKER=1']}",
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
    "options",
    [
        ["--config-dir={folder}"],
        ["--config-dir", "{folder}"],
        ["-cd", "{folder}"],
        ["--config-d={folder}"],
    ],
)
def test_what_is_composed_from_another_folder_is_looked_at(
    experiments: Path, options: list[str]
) -> None:
    given = [one.format(folder=experiments) for one in options]
    for_hydra([*given, "experiment=harmless"])
    with pytest.raises(ValueError, match="A configuration file sets hydra.callbacks"):
        for_hydra([*given, "experiment=callbacks"])
    with pytest.raises(ValueError, match="A configuration file sets hydra.callbacks"):
        for_hydra([*given, "-m", "experiment=glob(c*)"])


def test_so_are_another_main_file_and_what_it_finds(experiments: Path) -> None:
    (experiments / "train.yaml").write_text("hydra: {callbacks: {mine: {_target_: x.Y}}}\n")
    (experiments / "mine.yaml").write_text("defaults: [train, _self_]\nseed: 1\n")
    (experiments / "local").mkdir()
    (experiments / "local" / "default.yaml").write_text(
        "# @package _global_\nhydra: {job: {env_copy: [HOME]}}\n"
    )
    given = [f"--config-path={experiments}", "--config-name=mine"]
    with pytest.raises(ValueError, match="A configuration file sets hydra.callbacks"):
        for_hydra(given)
    with pytest.raises(ValueError, match="A configuration file sets hydra.job.env_set"):
        for_hydra([f"--config-dir={experiments}"])
    with pytest.raises(ValueError, match="give the path of a folder"):
        for_hydra(["--config-path=pkg://tests"])


@pytest.mark.parametrize(
    "params",
    [
        "data.sources: '[{trust_remote_code: true}]'",
        "trusted_packages: '[tests]'",
        "+hydra.callbacks.mine._target_: x.Y",
        "hydra/launcher: submitit_local",
        "experiment: 'harmless,callbacks'",
        "+optim@hydra.callbacks.mine: adamw",
    ],
)
def test_a_sweep_of_a_file_changes_no_more_than_the_run(experiments: Path, params: str) -> None:
    """The arguments of its jobs are those of the command line to everything that reads them."""
    file = experiments / "hparams_search" / "mine.yaml"
    file.parent.mkdir()
    file.write_text(f"# @package _global_\nhydra: {{sweeper: {{params: {{{params}}}}}}}\n")
    given = [f"hydra.searchpath=[file://{experiments}]", "hparams_search=mine"]
    with pytest.raises(ValueError, match=r"sets hydra\."):
        for_hydra(given)
    file.write_text("# @package _global_\nhydra: {sweeper: {params: {optim.lr: '1e-4,1e-3'}}}\n")
    for_hydra([*given, "-m"])
    file.write_text("# @package _global_\nhydra: {sweeper: {params: {optim: 'adamw,sgd'}}}\n")
    for_hydra([*given, "optim=adafactor", "-m"])  # the command line wins


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("seed: [1,\n  }", "is no YAML"),
        ("seed: !!python/object/apply:os.system ['true']", "is no YAML"),
        ("defaults: [/experiment/mine]", "names itself"),
    ],
)
def test_a_file_that_cannot_be_read_is_told_in_a_line(
    tmp_path: Path, text: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "train.yaml").write_text("seed: 1\nmodel: {x: 1}\n")
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    with pytest.raises(ValueError, match=told):
        composed(["+experiment=mine"], config_dir=tmp_path)
    given = [f"--config-dir={tmp_path}", "experiment=mine", "model=tiny", "model.config.seed=1"]
    monkeypatch.setattr("sys.argv", ["train.py", *given])
    with pytest.raises(SystemExit, match=told) as stop:
        launch(lambda: None)
    assert "there is no 'config'" not in str(stop.value)


def test_to_look_for_a_package_imports_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's run may bring a module, and the folder of the runs may be on the path."""
    (tmp_path / "brought").mkdir()
    marker = tmp_path / "marker"
    (tmp_path / "brought" / "module.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    monkeypatch.syspath_prepend(tmp_path)
    source = Packaged("brought.module.inside", "x.gguf", install="", name="x")
    for load in (source.check, source.load_tokenizer, source.build_empty):
        with pytest.raises(ValueError, match="without a dot"):
            load()
    assert not marker.exists()


@pytest.mark.parametrize("module", ["-m", "train.py"])
def test_python_m_does_not_look_into_the_current_folder(
    module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = str(CONF.parent)
    for first in (str(tmp_path), own):
        monkeypatch.setattr("sys.path", [first, "/usr/lib"])
        monkeypatch.setattr("sys.argv", [module, "x"])
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
        prepare_own_command()
        assert os.environ.get("OMP_WAIT_POLICY") == ("PASSIVE" if module == "-m" else None)
        stays = module != "-m" or first == own
        assert sys.path == ([first, "/usr/lib"] if stays else ["/usr/lib"])


def test_what_cannot_be_composed_is_not_passed_on() -> None:
    with pytest.raises(HydraException, match="no such argument"):
        for_hydra(["no such argument"])
    with pytest.raises(HydraException, match="Could not find 'experiment/nowhere'"):
        for_hydra(["experiment=nowhere"])


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["hparams_search=learning_rate"],
        ["-m", "optim.lr=1e-4,2e-4", "hydra.sweeper.max_batch_size=1"],
        ["experiment=lora_laptop,full_8bit", "-m"],
        ["hydra/launcher=slurm", "hydra.launcher.partition=gpu"],
        ["hparams_search=learning_rate", "+hydra.sweeper.params.seed='1,2'"],
        ["-m", "optim=glob(adamw*)"],
        ["-m", "optim=glob(no such name*)"],
        ["hydra.mode=MULTIRUN", "seed=1,2"],
        ["--cfg", "job", "seed=1"],
        ["--shell-completion", "install=bash"],
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
    options = [] if name == "mode" else ["-m"]  # with -m, the file would ask for what is asked for
    status, output = run(search, f"experiment={name}", *TINY, *options, cwd=experiments)
    assert status == 1
    assert f"A configuration file sets hydra.{name}" in output
    assert not (experiments.parent / "marker").exists()
