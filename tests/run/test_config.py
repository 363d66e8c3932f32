"""What a configuration may name, and what is said about a name that is not there."""

from __future__ import annotations

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from lit_ft.run.config import (
    also_chosen,
    low_rate,
    names_near,
    refuse_without_class,
)
from tests.support.running import CONF


@pytest.mark.parametrize("entry", [{"x": 1}, {}, None, 3])
@pytest.mark.parametrize("group", ["callbacks", "logger"])
def test_settings_of_what_nothing_brings_are_refused(group, entry):
    there = {"memory": {"_target_": "lit_ft.callbacks.MemoryMonitor"}}
    refuse_without_class({group: there})
    with pytest.raises(ValueError, match=rf"{group}\.mine has no class.*There are: memory\."):
        refuse_without_class({group: {**there, "mine": entry}})


@pytest.mark.parametrize(
    ("override", "suggested"),
    [
        ("trainer.max_step=3", "max_steps"),
        ("data.formatt=x", "format"),
        ("mdl=tiny", "model"),
        ("stratgy=ddp", "strategy"),
        ("experimnt=lora", "experiment"),
    ],
)
def test_a_mistyped_name_brings_the_name_that_is_there(override, suggested):
    said = names_near([override], config_dir=CONF)
    assert said.startswith(f"\n{override.partition('=')[0]}: there is no")
    assert suggested in said.partition("Did you mean ")[2].partition("?")[0]


@pytest.mark.parametrize(
    ("overrides", "choice"),
    [
        (["optim=adamw", "galore.rank=64"], "galore=online,"),
        (["adapter.r=8"], "adapter=lora,"),
    ],
)
def test_settings_of_what_is_not_chosen_name_the_choices_that_have_them(overrides, choice):
    said = names_near(overrides, config_dir=CONF)
    assert said.startswith(f"\n{overrides[-1].partition('=')[0]}: ")
    assert choice in said


@pytest.mark.parametrize(
    ("config", "remedy"),
    [
        ({"galore": {"rank": 64}, "callbacks": {}}, "galore=online"),
        ({"galore": {"rank": 64}, "callbacks": None}, "galore=online"),
        ({"adapter": {"r": 8}}, "adapter=lora"),
    ],
)
def test_settings_that_nothing_would_read_are_refused(config, remedy):
    with pytest.raises(ValueError, match=remedy):
        refuse_without_class(config)


def test_names_that_are_there_bring_nothing():
    overrides = [
        "strategy=ddp",
        "data/format=chat",
        "optim.lr=1",
        "model=tiny",
        "model.config.hidden_size=32",  # of the chosen model, not of the default one
        "data.val_path.x=1",  # a value, not a choice that was not made
        "+new.name=1",
        "~callbacks.samples",
        "hydra.verbose=true",
        "-m",
    ]
    assert names_near(overrides, config_dir=CONF) == ""


def test_a_choice_that_is_not_there_leaves_the_other_names_to_be_checked():
    said = names_near(["model=tinyy", "trainer.max_step=3"], config_dir=CONF)
    assert "max_steps" in said


@pytest.mark.parametrize(
    ("once", "now"),
    [
        ("auto_batch_size=true", "callbacks=auto_batch_size"),
        ("optim=galore_8bit", "optim=adamw_8bit galore=iteration"),
        ("optim=adamw,galore_adafactor", "optim=adafactor_fixed galore=iteration"),
        ("optim/projector=oja", "galore=online"),
        ("galore.projector.every=50", "galore.refresh.every=50"),
        ("+galore.projector.every=50", "galore.refresh.every=50"),
    ],
)
def test_a_name_of_an_earlier_version_is_answered_with_what_to_type(once, now):
    [said] = names_near([once], config_dir=CONF).strip().splitlines()
    assert said.endswith(f": type {now} instead")


def told(*overrides: str) -> str:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        run = compose("train", list(overrides), return_hydra_config=True).hydra
    return also_chosen(run.runtime.choices, run.overrides.task, config_dir=CONF)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ([], "update=layerwise (by strategy=single_gpu), galore=online (by optim=galore_subspace)"),
        (["optim=adamw", "update=layerwise"], None),  # named by the user
        (["optim=galore", "strategy=cpu"], "galore=iteration (by optim=galore)"),
        (["optim=galore", "galore=random", "strategy=cpu"], None),
        (["optim=adamw", "strategy=cpu", "callbacks=[default,early_stopping]"], None),
        # What is inherited is brought by whoever inherits it, and one choice may bring another.
        (["adapter=dora", "strategy=cpu"], "optim=adamw_lora (by adapter=dora)"),
        (["adapter=dora", "optim=adamw", "strategy=cpu"], None),
        (
            ["experiment=lora_laptop", "strategy=cpu"],
            "optim=adamw_lora (by adapter=lora), adapter=lora (by experiment=lora_laptop)",
        ),
        (["optim=muon", "strategy=cpu"], "optim/groups=muon_matrices (by optim=muon)"),
    ],
)
def test_what_a_choice_brings_is_told(overrides, line):
    assert told(*overrides) == (line or "")


def test_the_last_of_two_that_bring_a_choice_has_brought_it():
    # strategy=single_gpu would bring layerwise updates, galore=svd brings whole ones.
    assert told("optim=galore_svd") == "galore=svd (by optim=galore_svd)"


@pytest.mark.parametrize(
    ("overrides", "is_low"),
    [
        (["adapter=lora"], False),  # it brings a rate of its own
        (["adapter=lora", "optim=adamw"], True),
        (["adapter=qlora", "optim=adamw_8bit"], True),
        (["adapter=lora", "optim=adamw", "optim.lr=1e-4"], False),  # it is meant
        (["adapter=lora", "optim=adamw", "optim.lr=1e-3"], False),
        (["optim=adamw"], False),
        (["adapter=lora", "optim=adafactor"], False),  # without a rate
    ],
)
def test_an_adapter_at_the_rate_of_a_whole_model_is_told(overrides, is_low):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose("train", overrides, return_hydra_config=True)
    run = config.hydra
    note = low_rate(run.runtime.choices, run.overrides.task, config.optim.get("lr"))
    assert ("optim.lr=5e-4" in note) == is_low
