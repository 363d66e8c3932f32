"""What becomes of a setting that differs from the checkpoint's run: a table over plain values."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from lit_ft.run.changes import Outcome, changes, differences
from tests.support.running import CONF

MINE = ["run_dir=here", "data.path=mine.jsonl", "strategy=cpu", "optim=adamw", "~local"]


@cache
def composed(*overrides: str) -> DictConfig:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*MINE, *overrides])


def config(*overrides: str) -> dict[str, Any]:
    plain: Any = OmegaConf.to_container(composed(*overrides), resolve=True)
    return plain


def found(first: list[str], then: list[str]) -> dict[str, Outcome]:
    return {change.setting: change.outcome for change in changes(config(*first), config(*then))}


VALUES = {
    Outcome.OBEYED: [
        "optim.lr=1",
        "optim.weight_decay=1",
        "+optim.betas=[0.8,0.9]",
        "schedule.warmup=3",
        "trainer.max_steps=80",
        "trainer.gradient_clip_val=2",
        "trainer.precision=bf16-mixed",
        "data.bad_rows=skip",
        "model.attn_implementation=eager",
    ],
    Outcome.STEP: [
        "trainer.accumulate_grad_batches=2",
        "trainer.devices=2",
        "data.batch_size=2",
    ],
    Outcome.ROWS: [
        "data.max_length=64",
        "data.packing=true",
        "data.group_by_length=false",
        "data.train_on=last",
        "data.overlong=cut",
        "data.max_train_examples=9",
    ],
    Outcome.ELSEWHERE: ["data.path=others.jsonl", "+data.source_options.split=train"],
    Outcome.REFUSED: ["+optim.amsgrad=true", "seed=1"],
    Outcome.UNLISTED: [
        "run_dir=elsewhere",
        "resume=auto",
        "logger=csv",
        "trainer.log_every_n_steps=1",
        "trainer.val_check_interval=7",
        "checkpoint.every_n_steps=3",
        "data.num_workers=2",
        "update=layerwise",
        "optim.fused=false",
    ],
}


def test_each_value_is_found_once_with_its_outcome():
    """Although the module, the data and the callbacks repeat the optimizer and the seed."""
    overrides = [override for listed in VALUES.values() for override in listed]
    expected = {
        override.partition("=")[0].lstrip("+"): outcome
        for outcome, listed in VALUES.items()
        for override in listed
        if outcome is not Outcome.UNLISTED
    }
    assert found(["trainer.precision=32-true"], overrides) == expected


@pytest.mark.parametrize(
    ("override", "setting", "outcome"),
    [
        ("optim=sgd", "optim", Outcome.REFUSED),
        ("schedule=constant", "schedule.schedule", Outcome.OBEYED),
        ("data/format=alpaca", "data.format", Outcome.ROWS),
        ("data.seed=1", "data.seed", Outcome.REFUSED),
        ("adapter=lora", "adapter", Outcome.REFUSED),
        ("galore=online", "galore", Outcome.REFUSED),
        ("trainer.precision=bf16-true", "trainer.precision", Outcome.REFUSED),
        ("model=tiny", "model", Outcome.REFUSED),
    ],
)
def test_each_choice_is_found_once_with_its_outcome(override, setting, outcome):
    settings = found(["trainer.precision=32-true"], ["trainer.precision=32-true", override])
    assert settings.pop(setting) is outcome
    assert not {name for name in settings if not name.startswith("optim")}  # adapters bring a rate


@pytest.mark.parametrize(
    ("first", "then", "settings"),
    [
        (["galore=online"], ["galore=online", "galore.rank=4"], {"galore.rank": Outcome.REFUSED}),
        (["galore=online"], ["galore=iteration"], {"galore.projector": Outcome.REFUSED}),
        (
            ["galore=online"],
            ["galore=online", "galore.targets=[mlp]", "galore.refresh.every=7"],
            {"galore.targets": Outcome.REFUSED, "galore.refresh.every": Outcome.OBEYED},
        ),
        (["adapter=lora"], ["adapter=lora", "adapter.r=8"], {"adapter.r": Outcome.REFUSED}),
        (
            ["adapter=lora"],
            ["adapter=lora", "+adapter.lora_dropout=0.1"],
            {"adapter.lora_dropout": Outcome.OBEYED},
        ),
        (["optim=adamw_8bit"], ["optim=adamw_8bit_paged"], {}),
        (
            ["callbacks=[default,early_stopping]"],
            ["callbacks=[default,early_stopping]", "callbacks.early_stopping.patience=9"],
            {"callbacks.early_stopping.patience": Outcome.REFUSED},
        ),
    ],
)
def test_parts_of_a_choice(first, then, settings):
    assert found(first, then) == settings


def test_an_argument_that_is_left_out_has_its_default():
    """An older run's configuration lacks the settings that have been added since."""
    older = config()
    del older["data"]["learn_empty_think"], older["schedule"]["schedule"]["min_lr_rate"]
    assert [str(change) for change in changes(older, config())] == [
        "schedule.schedule.min_lr_rate (was null, now 0.1)"
    ]


def test_a_part_of_another_class_is_named_by_it():
    [change] = changes(config(), config("schedule=linear", "+schedule.schedule.min_lr_rate=0.1"))
    assert str(change) == (
        "schedule.schedule (was get_cosine_with_min_lr_schedule_with_warmup, "
        "now get_linear_schedule_with_warmup)"
    )


def test_nothing_is_imported_unless_defaults_are_asked_for():
    untrusted = {"_target_": "antigravity.fly", "a": 1}
    other = {"_target_": "antigravity.fly", "b": 2}
    assert list(differences(untrusted, other)) == [("a", 1, None), ("b", None, 2)]
