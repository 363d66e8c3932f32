"""What a configuration may name, and what is said about a name that is not there."""

from __future__ import annotations

import pytest

from lit_ft.run.config import names_near, refuse_untrusted, refuse_without_class
from tests.support.running import CONF


@pytest.mark.parametrize(
    "target", ["os.system", "torch.load", "torchvision.x", "lit_ft_evil.run", "builtins.eval"]
)
def test_a_target_outside_the_trusted_packages_is_refused_wherever_it_stands(target):
    for config in (
        {"_target_": target},
        {"callbacks": {"mine": {"_target_": target}}},
        {"plugins": [{"x": 1}, {"deep": [{"_target_": target}]}]},
    ):
        with pytest.raises(ValueError, match=target):
            refuse_untrusted(config)


def test_the_refusal_says_where_it_stands_and_how_to_trust_it():
    config = {"trainer": {"plugins": [{"_target_": "mine.Plugin"}]}}
    with pytest.raises(
        ValueError, match=r"config\.trainer\.plugins\[0\].*trusted_packages=\[mine\]"
    ):
        refuse_untrusted(config)
    refuse_untrusted(config, also=["mine"])
    refuse_untrusted({"optim": {"_target_": "torch.optim.AdamW"}})


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
        (["optim=adamw", "galore.rank=64"], "optim=galore_subspace,"),
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
        ({"galore": {"rank": 64}, "callbacks": {}}, "optim=galore_subspace"),
        ({"galore": {"rank": 64}, "callbacks": None}, "optim=galore_subspace"),
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
