"""A file of settings means what the same arguments would, and says where it is wrong."""

from __future__ import annotations

import os
import random
import re
import shutil
import textwrap
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from lit_ft.run.arguments import composed, for_hydra
from lit_ft.run.command_line import understood
from lit_ft.run.files import SETTINGS_HEADER
from lit_ft.run.hydra_trust import composer, compositions
from lit_ft.run.own_arguments import with_own_arguments
from lit_ft.run.save_config import save_config
from tests.support.running import CONF


def arguments(*typed: str) -> list[str]:
    return understood(typed, config_dir=CONF).arguments


def file(folder: Path, text: str, name: str = "my.yaml") -> str:
    (folder / name).write_text(text, encoding="utf-8")
    return f"--config={folder / name}"


def whole(*typed: str) -> str:
    """Return the configuration of a command, as text."""
    config = composer([], config_dir=CONF)(arguments(*typed))
    return OmegaConf.to_yaml(OmegaConf.masked_copy(config, [n for n in config if n != "hydra"]))


def save(path: Path, *typed: str) -> str:
    compose = composer([], config_dir=CONF)
    save_config(path, [compose(arguments(*typed))], compose, conf=CONF)
    return path.read_text(encoding="utf-8")


CHOICES = [
    [
        "optim=adamw",
        "optim=adamw_8bit",
        "optim=muon",
        "optim=galore_svd",
        "optim=sgd & galore=online",
    ],
    ["adapter=lora", "adapter=qlora", "adapter=none"],
    ["strategy=cpu", "strategy=fsdp", "strategy=single_gpu", "update=whole"],
    ["data=mix", "data=packed", "data/format=chat", "data/format=text & data.format.text=body"],
    ["experiment=full_8bit", "experiment=lora_laptop", "debug=few_batches", "debug=profile"],
    ["callbacks=[default,early_stopping]", "callbacks=none", "~callbacks.samples"],
    ["num_train_epochs=3", "trainer.max_steps=-1 & trainer.max_epochs=2", "max_steps=9"],
    ["logger=none", "logger=[csv,tensorboard]", "schedule=linear", "~local", "model=tiny"],
]
VALUES = [
    "seed=7",
    "optim.lr=1e-5",
    "+optim.betas=[0.9,0.95]",
    "+trainer.profiler={_target_: x.Y, note: 'a: b'}",
    "data.path='a, (1)=é.jsonl'",
    "+data.source_options.split='train[:10%]'",
    "data.chat_template='1e-4'",
    "callbacks.memory=null",
    "groups=[{name: all, options: {weight_decay: 0.1}}]",
    "trainer.gradient_clip_val=null",
    "run_dir='runs/${seed}'",
    "resume=auto",
    "+checkpoint.note='it is # \\ one'",
    "data.max_length=${data.batch_size}",
    "+loss={a: 1}",
]


def random_command(seed: int) -> list[str]:
    choose = random.Random(seed)
    groups = [choose.choice(group) for group in CHOICES if choose.random() < 0.4]
    command = [*groups, *choose.sample(VALUES, 5)]
    # Several settings have `&` between them.
    return [one for several in command for one in several.split(" & ")]


@pytest.mark.parametrize("seed", range(20))
def test_what_is_saved_composes_to_the_same_bytes(seed: int, tmp_path: Path) -> None:
    command = random_command(seed)
    saved = tmp_path / "my.yaml"
    if "callbacks=none" in command:
        command = [one for one in command if not one.startswith(("callbacks.", "~callbacks"))]
    save(saved, *command)
    assert whole(f"--config={saved}") == whole(*command), command


def test_what_this_machine_sets_is_saved_too(tmp_path: Path) -> None:
    conf = tmp_path / "conf"
    shutil.copytree(CONF, conf, ignore=shutil.ignore_patterns("default.yaml~", "local"))
    local = conf / "local" / "default.yaml"
    local.parent.mkdir()
    local.write_text(
        "# @package _global_\ndefaults: [override /logger: csv]\nseed: 5\noptim: {lr: 1.0}\n"
    )
    compose = composer([], config_dir=conf)
    saved = tmp_path / "my.yaml"
    save_config(saved, [compose(["optim.lr=1e-4"])], compose, conf=conf)
    assert {"logger: csv", "seed: 5", "optim.lr: 0.0001"} <= lines(saved)


def lines(path: Path) -> set[str]:
    return {line.partition(" #")[0].strip() for line in path.read_text().splitlines()}


def test_each_line_has_the_comment_of_conf(tmp_path: Path) -> None:
    text = save(tmp_path / "my.yaml", "adapter=lora", "adapter.r=8", "~callbacks.samples")
    *_, choices, values = text.split("\n\n")
    assert re.search(r"^adapter: lora +# none \(full fine-tuning\), lora, qlora", choices, re.M)
    assert re.search(r"^# optim: adamw_lora ", choices, re.M)  # brought
    assert re.search(r"^adapter\.r: 8 +# rank of the two thin matrices$", values, re.M)
    assert re.search(r"^~callbacks\.samples:$", values, re.M)
    assert text.startswith(SETTINGS_HEADER)


def test_a_file_of_ones_own_is_not_replaced_and_a_saved_one_is(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("seed: 1  # why\n")
    with pytest.raises(ValueError, match="has not written it"):
        save(own, "seed=2")
    assert own.read_text() == "seed: 1  # why\n"
    save(tmp_path / "saved.yaml", "seed=2")
    assert "seed: 3" in save(tmp_path / "saved.yaml", "seed=3")


def test_a_sweep_is_not_saved(tmp_path: Path) -> None:
    sweep = compositions(["seed=1,2", "-m"], config_dir=CONF)
    with pytest.raises(ValueError, match="a sweep"):
        save_config(tmp_path / "x", sweep, composer([], config_dir=CONF), conf=CONF)


def test_flat_and_nested_names_keep_their_types(tmp_path: Path) -> None:
    text = """
        model: tiny
        model.config: {hidden_size: 32}
        data.path: "2024"
        data.format: chat
        callbacks:
          samples.prompts: ["1", no, 'a, b', null, 1e-3, {x: [1]}]
        data.source_options: {name: "1e-4", split: train}
        +optim.betas: [0.9, 0.95]
        optim: {+eps: 1e-6}
        ~callbacks.memory:
        resume: null
        run_dir: runs/${seed}
    """
    config = composed([file(tmp_path, textwrap.dedent(text))])
    assert config["model"]["config"]["hidden_size"] == 32
    assert config["data"]["path"] == "2024"
    assert config["data"]["format"]["_target_"].endswith("Chat")
    assert config["data"]["source_options"] == {"name": "1e-4", "split": "train"}
    prompts = ["1", False, "a, b", None, 0.001, {"x": [1]}]
    assert config["callbacks"]["samples"]["prompts"] == prompts
    assert (config["optim"]["betas"], config["optim"]["eps"]) == ([0.9, 0.95], 1e-6)
    assert "memory" not in config["callbacks"]
    assert config["run_dir"] == "runs/0"


def test_a_display_that_is_off_needs_no_quotes(tmp_path: Path) -> None:
    assert composed([file(tmp_path, "ui: off")])["ui"] == "off"


@pytest.mark.parametrize("typed", [[], ["callbacks=early_stopping"]])
def test_callbacks_of_a_file_are_added_to_the_default_ones(
    typed: list[str], tmp_path: Path
) -> None:
    choice = "" if typed else "callbacks: early_stopping\n"
    values = "callbacks: {export: {push_to_hub: a/b}, early_stopping: {patience: 9}}"
    if not typed:
        values = "callbacks.export.push_to_hub: a/b\ncallbacks.early_stopping.patience: 9"
    config = composed([file(tmp_path, f"{choice}{values}"), *typed])
    assert config["callbacks"]["export"]["push_to_hub"] == "a/b"
    assert config["callbacks"]["early_stopping"]["patience"] == 9


def test_the_command_line_wins_and_a_later_file_over_an_earlier(tmp_path: Path) -> None:
    first = file(tmp_path, "optim: sgd\noptim.lr: 1.0\nlogger: csv\nseed: 1\n", "1.yaml")
    second = file(tmp_path, "logger: none\nseed: 2\n", "2.yaml")
    given = arguments(first, second, "optim=adamw", "seed=3")
    assert given == ["optim.lr=1.0", "logger=none", "optim=adamw", "seed=3"]


def test_a_file_goes_with_a_sweep_and_options_stay_behind(tmp_path: Path) -> None:
    given = arguments("-m", file(tmp_path, "seed: 1\nlogger: csv\n"), "optim=sgd,adamw")
    assert given == ["logger=csv", "seed=1", "optim=sgd,adamw", "-m"]
    assert len(compositions(given, config_dir=CONF)) == 3


FAULTS = {
    "": ": the file holds no settings.",
    "# only a comment": ": the file holds no settings.",
    "- seed": ": the file is no mapping",
    "seed: 1\nseed: 2": ":2: seed stands in line 1 already.",
    "optim:\n  lr: 1\n  lr: 1": ":3: lr stands in line 2 already.",
    "optim.lr: 1\nlearning_rate: 2": ":2: optim.lr=2 contradicts optim.lr=1",
    "seed: 1\n 2: [": ":2: ",
    "1: x": ":1: a name must be a text.",
    "a b: 1": ":1: a b: this is no name of a setting.",
    "\noptim: adamww": ":2: optim=adamww: this is no choice. Did you mean adamw",
    "callbacks: [default, early]": ":1: callbacks=[default,early]: this is no choice.",
    "optim: adamw,sgd": ":1: optim: 'adamw,sgd' is no name of a choice.",
    "callbacks: [default, ../x]": ":1: callbacks: '../x' is no name of a choice.",
    "logger: 3": ":1: logger=3: this is no choice.",
    "adapter: null": ":1: adapter=null is no choice: type adapter=none.",
    "trainer:\n  max_step: 3": ":2: trainer.max_step: there is no 'max_step' in trainer. Did you",
    "lerning_rate: 3": ":1: lerning_rate: there is no 'lerning_rate'. Did you mean learning_rate?",
    "mine.x: 1": ":1: mine.x: there is no 'mine'.",
    "optim: adafactor\nlearning_rate: 1": ":2: optim.lr: there is no 'lr' in optim.",
    "adapter.r: 8": ":1: adapter.r: no current choice has it. Choose one of adapter=dora",
    "num_train_epochs: 3\nnum_epochs: 2": ":2: trainer.max_epochs=2 contradicts",
    "seed: ${": ": ",
    "hydra.mode: MULTIRUN": ":1: hydra.mode: only the command line",
    "hydra: {run: {dir: /}}": ":1: hydra.run.dir: only the command line",
    "hydra/launcher: slurm": ":1: hydra/launcher: only the command line",
    "+hydra.job.env_set.X: 1": ":1: +hydra.job.env_set.X: only the command line",
    "hparams_search: learning_rate": ":1: hparams_search: only the command line",
    "trusted_packages: [evil]": ":1: trusted_packages: only the command line may give trust",
    "model.trust_remote_code: true": ":1: model.trust_remote_code: only the command line may",
    "eval: {include_path: mine}": ":1: eval.include_path: only the command line may give trust",
    "eval.tasks: [mine.yaml]": ":1: eval.tasks: only the command line may give trust",
    "model: {trust_remote_code: true}": ":1: model.trust_remote_code: only the command line may",
    "trust_remote_code: true": ":1: trust_remote_code: only the command line may give trust",
    "data.sources: [{trust_remote_code: true}]": ":1: data.sources: only the command line may",
    "logger@hydra.job_logging: x": ":1: logger@hydra.job_logging: this is no name",
}


@pytest.mark.parametrize("text", FAULTS)
def test_a_fault_names_the_file_and_the_line(text: str, tmp_path: Path) -> None:
    given = file(tmp_path, text)
    with pytest.raises(ValueError) as error:
        arguments(given)
    said = {line.removeprefix(str(tmp_path / "my.yaml")) for line in str(error.value).splitlines()}
    assert any(line.startswith(FAULTS[text]) for line in said), said


def test_a_file_of_another_trainer_is_read_whole(tmp_path: Path) -> None:
    text = """
        base_model: ORG/NAME
        load_in_8bit: false
        adapter: lora
        lora_r: 8
        lora_target_modules: [gate_proj, down_proj]
        wandb_project:
        num_epochs: 1.0
        optimizer: adamw_8bit
        lr_scheduler: constant_with_warmup
        bf16: auto
        flash_attention: true
    """
    assert arguments(file(tmp_path, textwrap.dedent(text))) == [
        "model=pretrained",
        "adapter=lora",
        "optim=adamw_8bit",
        "schedule=constant",
        "model.name_or_path='ORG/NAME'",
        "adapter.r=8",
        "adapter.target_modules=['gate_proj', 'down_proj']",
        "trainer.max_epochs=1",
        "model.attn_implementation=flash_attention_2",
    ]


@pytest.mark.parametrize("name", ["missing.yaml", "."])
def test_a_file_that_cannot_be_read_is_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path / name))}: \S.*\.$"):
        arguments(f"--config={tmp_path / name}")


def test_a_secret_in_a_file_becomes_a_reference_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "LIT_FT_SECRET_LOGGER__TENSORBOARD__API_KEY"
    monkeypatch.setenv(name, "")  # removed afterwards
    given = arguments(file(tmp_path, "+logger.tensorboard.api_key: PlantedSecret1\n"))
    hidden = for_hydra(given)
    assert os.environ[name] == "PlantedSecret1"
    assert hidden == [f"+logger.tensorboard.api_key=${{oc.env:{name}}}"]
    compose = composer([], config_dir=CONF)
    saved = tmp_path / "saved.yaml"
    save_config(saved, [compose(hidden)], compose, conf=CONF)
    assert f"${{oc.env:{name}}}" in saved.read_text()
    monkeypatch.delenv(name)
    with pytest.raises(ValueError, match="Give the secret again"):
        for_hydra(arguments(f"--config={saved}"))


def test_trust_is_not_saved(tmp_path: Path) -> None:
    text = save(tmp_path / "my.yaml", "trusted_packages=[mine]", "seed=2")
    assert "seed: 2" in text
    assert "#   trusted_packages: only the command line may give trust" in text
    assert arguments(f"--config={tmp_path / 'my.yaml'}") == ["seed=2"]


def test_resume_auto_repeats_what_the_file_held(tmp_path: Path) -> None:
    given = arguments(file(tmp_path, "optim: sgd\ndata.path: a b.jsonl\nlogger: csv\n"))
    record = tmp_path / "run" / ".hydra" / "overrides.yaml"
    record.parent.mkdir(parents=True)
    record.write_text(OmegaConf.to_yaml(given))
    again = [f"run_dir={tmp_path / 'run'}", "resume=auto"]
    assert with_own_arguments(again) == ([*given, *again], given)
    more = arguments(file(tmp_path, "logger: none"), *again)
    assert with_own_arguments(more)[1] == ["optim=sgd", "data.path='a b.jsonl'"]


def test_the_command_line_changes_what_a_file_adds(tmp_path: Path) -> None:
    adds = file(tmp_path, "+optim.betas: [0.8, 0.9]\n+optim.eps: 0.1")
    for typed in ("optim.eps=0.2", "+optim.eps=0.2"):
        assert composed([adds, typed])["optim"]["eps"] == 0.2
    assert "betas" not in composed([adds, "~optim.betas"])["optim"]


def test_a_file_that_is_nested_too_deeply_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"my\.yaml: the file is nested too deeply\.$"):
        arguments(file(tmp_path, "x: " + "[" * 5000))
