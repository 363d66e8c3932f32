"""What a configuration's values must be, and what is said about one that is something else."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
from annotated_types import Ge, Interval
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf

from lit_ft.compat.ranges import Count, Positive
from lit_ft.run.settings import admit, settings_of
from lit_ft.run.types import allowed
from tests.support.running import CONF

TINY = ["model=tiny", "run_dir=here", "~local"]
PRETRAINED = ["model=pretrained", "model.name_or_path=a/b"]


def faults(*overrides: str) -> list[str]:
    """Return the lines of the error for these arguments; none if they are admitted."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        job = compose("train", [*TINY, *overrides])
    config: Any = OmegaConf.to_container(job, resolve=True)
    written: Any = OmegaConf.to_container(job, resolve=False)
    try:
        admit(config, written, overrides)
    except ValueError as error:
        return str(error).splitlines()
    return []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([*PRETRAINED, "model.trust_remote_code=no"], "must be true or false. 'no' is text."),
        ([*PRETRAINED, "model.trust_remote_code=off"], "must be true or false. 'off' is text."),
        (
            [*PRETRAINED, "model.trust_remote_code='false'"],
            "must be true or false. Write false without quotes.",
        ),
        (["validate_only=no"], "must be true or false. 'no' is text."),
        (["data.packing=-2"], "must be true or false."),
        (["data.batch_size=true"], "must be a whole number of at least 1."),
        (["data.batch_size=null"], "must be a whole number of at least 1."),
        (["data.val_batch_size=0"], "must be a whole number of at least 1 or null."),
        (["trainer.max_steps=2.5"], "must be a whole number of at least -1."),
        (["trainer.max_steps=2.0"], "must be a whole number of at least -1. Write 2."),
        (["optim.lr=true"], "must be a number of at least 0."),
        (["optim.lr='1e-4'"], "must be a number of at least 0. Write 1e-4 without quotes."),
        (["optim=adamw_8bit", "optim.lr=nan"], "must be a number of at least 0."),
        (["optim=sgd", "optim.momentum=inf"], "must be a number of at least 0 and below 1."),
        (
            ["+optim.betas=[0.9,1.0]"],
            "must be a list of 2, each a number of at least 0 and below 1.",
        ),
        (
            ["adapter=lora", "+adapter.lora_dropout=nan"],
            "must be a number of at least 0 and at most 1.",
        ),
        (["trainer.gradient_clip_val=-1"], "must be a number of at least 0 or null."),
        (["data.overlong=cutt"], "must be drop, cut, cut_left or split."),
        (["galore.scale=0"], "must be a number above 0 or match_adamw."),
        (["galore.refresh.threshold=2"], "must be a number of at least 0 and at most 1."),
        (["checkpoint.every_n_steps=0"], "must be a whole number of at least 1."),
        (["seed=-1"], "must be a whole number of at least 0 and below 4294967296."),
        (["trusted_packages=mine"], "must be a list, each text. Write [mine]."),
        (["eval.tasks=arc_easy"], "must be a list, each text. Write [arc_easy]."),
        (["eval.limit=0"], "must be a whole number of at least 1 or null."),
        (["groups.0.options.weight_decay=-1"], "must be a number of at least 0."),
        (["optim=galore_torch", "optim.rank=0"], "must be a whole number of at least 1."),
        (["schedule.schedule.min_lr_rate=2"], "must be a number of at least 0 and at most 1 or"),
        (["optim=adafactor", "+optim.clip_threshold=0"], "must be a number above 0."),
        (["model.tokenizer=3"], "must be text or null."),
    ],
)
def test_a_value_that_nothing_admits_is_answered_with_what_it_must_be(overrides, said):
    setting, _, value = overrides[-1].lstrip("+").partition("=")
    [line] = faults(*overrides)
    assert line.startswith(f"{setting}={value[:4].strip(chr(39))}")
    assert f": {said}" in line


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("+galore.bogus=1", "galore.bogus: there is no 'bogus' in galore."),
        ("+galore.refresh.evry=1", "there is no 'evry' in galore.refresh. Did you mean every"),
        ("+trainer.max_step=1", "there is no 'max_step' in trainer. Did you mean max_steps"),
        ("+optim.learning_rate=1", "there is no 'learning_rate' in optim."),
        ("+checkpoint.every=1", "Did you mean every_n_steps?"),
        ("+module.optimiser=1", "Did you mean optimizer"),
        ("+valdate_only=true", "Did you mean validate_only"),
        ("+update={}", "there is no 'update'."),  # nothing brings it, and nothing reads it
        ("+callbacks.progress.every=1", "Did you mean every_n_steps"),
    ],
)
def test_a_name_that_nothing_reads_is_answered_with_the_nearest(override, said):
    line, names = faults(override)
    assert said in line
    assert names.startswith("  Names: ")


def test_a_class_that_takes_any_name_and_ignores_it_is_held_to_its_own():
    line, _ = faults("adapter=qlora", "+model.quantization_config.load_in_4bti=true")
    assert "Did you mean load_in_4bit" in line


def test_tasks_that_nothing_scores_are_named():
    [line] = faults("eval.tasks=[arc_easy]", "callbacks=none")
    assert line.startswith("eval.tasks=[arc_easy]: this run has no callback that scores them.")
    assert faults("eval.tasks=[arc_easy]") == []


def test_all_faults_are_told_at_once():
    lines = faults("optim.lr=-1", "schedule.warmup=true", "seed=0.5", "data.batch_size=0")
    names = [line.partition("=")[0] for line in lines]
    assert sorted(names) == ["data.batch_size", "optim.lr", "schedule.warmup", "seed"]


def test_a_setting_of_ones_own_that_another_reads_has_that_ones_type():
    assert faults("+mine.rate=1e-3", "optim.lr=${mine.rate}") == []
    [line] = faults("+mine.rate=fast", "optim.lr=${mine.rate}")
    assert line == "mine.rate=fast: must be a number of at least 0."
    assert faults("+mine.rate=1e-3", "+mine.other=1", "optim.lr=${mine.rate}") == []


def test_an_argument_that_has_no_default_is_missed():
    assert faults("~model.model_type") == ["model.model_type is missing: it must be text."]


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim.lr=1"],  # a whole number is a number
        ["trainer.precision=32", "trainer.devices=auto", "+trainer.limit_val_batches=3"],
        ["+optim.betas=[0.9,0.95]", "optim.fused=null"],
        ["data.train_on=[assistant,tool]", "+data.sources=[{path: x, weight: 2}]"],
        ["~callbacks.subspace_refresh"],
        ["callbacks=none", "logger=none"],
        ["optim=adamw", "trainer.val_check_interval=0.5", "+trainer.max_time='00:00:10:00'"],
        ["logger=wandb", "+logger.wandb.anything=1"],  # which passes on what it does not know
    ],
)
def test_what_a_constructor_admits_is_admitted(overrides):
    assert faults(*overrides) == []


@pytest.mark.parametrize(
    ("annotation", "default", "admitted", "refused"),
    [
        (bool, ..., [True], [1, "true", None]),
        (int, ..., [3, -3], [True, 3.0, "3", float("nan")]),
        (float, ..., [3, 0.5], [True, "3", float("nan"), float("-inf")]),
        (float, None, [3, None], [True]),  # a default may be what the annotation leaves out
        (str, ..., ["x"], [1, True, None, ["x"]]),
        (Path, ..., ["x"], [1]),
        (Count | None, ..., [1, None], [0, True, 1.5]),
        (Literal["a", 1], ..., ["a", 1], ["b", True, 1.0]),
        (tuple[float, float], ..., [[1, 2.5]], [[1], [1, True], 1]),
        (list[Positive], ..., [[], [1]], [[0], 1]),
        (dict[str, int], ..., [{"a": 1}], [{"a": True}, []]),
        (..., 0.1, [1, 2.5], [True, "x", None]),
        (..., 1, [1, 2.5], [True, "x"]),
        (..., False, [True], [0, "no"]),
        (..., (0.9, 0.999), [[0, 1]], [[0], [0, "x"]]),
        (..., None, [1, "x", None, [True]], []),
        (type, ..., [{"_target_": "x"}], [{"x": 1}, "x"]),
    ],
)
def test_a_type_is_strict(annotation, default, admitted, refused):
    given = {"default": default} if default is not ... else {}
    kind = allowed(annotation if annotation is not ... else Any, **given)
    assert [value for value in admitted if not kind.admits(value)] == []
    assert [value for value in refused if kind.admits(value)] == []


def test_a_range_of_another_library_is_of_its_numbers():
    kind = allowed(float | str | None, limit=Ge(0))
    assert kind.admits("x") and kind.admits(0) and not kind.admits(-1)
    betas = allowed(Any, default=(0.9, 0.99), limit=Interval(ge=0, lt=1))
    assert betas.admits([0, 0.5]) and not betas.admits([0, 1])


def test_the_check_of_data_alone_leaves_the_rest():
    config = {"data": {"_target_": "lit_ft.InstructionDataModule", "batch_size": 0}, "trainer": 3}
    [*settings] = settings_of(config, config, parts=("data",))
    assert [s.name for s in settings if s.fault and s.name.startswith("data")] == [
        "data.batch_size"
    ]
