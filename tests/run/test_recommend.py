"""The recommendation of `python -m lit_ft.plan`: what it looks at, its order, and its commands."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace

import pytest

from lit_ft.plan import main
from lit_ft.run import recommend
from lit_ft.run.arguments import composed
from lit_ft.run.plan import planned
from lit_ft.run.recommend import METHODS, Recipe, best_of, command_of, measured_losses

SMALL = ["model=tiny", "model.config.vocab_size=1024", "data.max_length=32"]


@pytest.fixture(scope="module")
def recipe():
    return Recipe(("optim=adamw",), 2.64, 1.0, planned(composed([*SMALL, "plan.gpu=24GB"])))


def test_every_method_composes_and_has_a_measured_loss():
    losses = measured_losses()
    for method in METHODS:
        composed([*SMALL, *method.settings])
        assert 2 < losses[method.measured_as] < 3


def test_the_best_learn_best_and_of_equals_the_fastest_come_first(recipe):
    slow, worse = replace(recipe, seconds=1.3), replace(recipe, val_loss=2.7, seconds=0.5)
    noise = replace(recipe, val_loss=recipe.val_loss + 0.001, seconds=0.9)
    assert best_of([worse, slow, recipe, noise]) == [noise, recipe, slow, worse]


def test_a_command_keeps_the_users_data_and_batch_but_not_the_method(recipe):
    arguments = [*SMALL, "optim=sgd", "optim.lr=3", "galore.rank=4", "plan.gpu=2x24GB", "seed=7"]
    command = command_of(recipe, arguments, 2)
    assert command == [*SMALL, "seed=7", "optim=adamw", "trainer.devices=2"]
    composed(command)
    rows = replace(recipe, settings=("optim=adamw", "data.batch_size=1"))
    assert command_of(rows, ["data.batch_size=4", "seed=7"], 1) == ["seed=7", *rows.settings]


def test_it_shows_commands_that_compose(monkeypatch, capsys):
    monkeypatch.setattr(recommend, "METHODS", METHODS[:1])
    main([*SMALL, "recommend=true", "plan.gpu=24GB", "optim=sgd"])
    shown = capsys.readouterr().out
    [command] = [line for line in shown.splitlines() if "python train.py" in line]
    settings = shlex.split(command)[3:]
    assert settings == [*SMALL, *METHODS[0].settings]
    composed(settings)


def test_it_says_so_if_nothing_fits(monkeypatch, capsys):
    monkeypatch.setattr(recommend, "METHODS", METHODS[:1])
    wide = ["model.config.hidden_size=2048", "model.config.intermediate_size=16384"]
    main([*SMALL, *wide, "model.config.vocab_size=64000", "recommend=true", "plan.gpu=1GB"])
    assert "Nothing fits" in capsys.readouterr().out


def test_a_plan_is_shown_and_written(tmp_path, capsys):
    file = tmp_path / "plan.json"
    main([*SMALL, "plan.gpu=4090", "--no-savings", "--json", str(file)])
    assert "RTX 4090" in capsys.readouterr().out
    plan = json.loads(file.read_text())
    assert plan["verdict"] == "fits"
    assert plan["peak_bytes"] == sum(plan["by_category"].values())
    assert plan["outside_bytes"]["low"] < plan["outside_bytes"]["high"]


def test_savings_are_true(capsys):
    main([*SMALL, "plan.gpu=24GB", "data.max_length=256", "optim=adamw"])
    shown = capsys.readouterr().out
    assert "less with module.activation_checkpointing=true" in shown


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan.gpu=409"], "plan.gpu=409: no such card. Did you mean RTX 4090?"),
        (["plan.gpu=24GB", "strategy=cpu"], "strategy=cpu uses none"),
        (["strategy=ddp"], "trainer.devices=2"),
        (["adapter=qlora", "model=smollm2"], "no plan for quantised weights"),
        (["optim=adamw_8bit_paged"], "plan with optim=adamw_8bit"),
        (
            ["strategy=tensor_parallel", "optim=adamw", "trainer.devices=2"],
            "plan with strategy=fsdp",
        ),
        (["optim.lr=fast"], "optim.lr=fast: must be"),
        (["recommend=true"], "name a card, such as plan.gpu=24GB"),
        (["model=pretrained", "model.name_or_path=/no/such/folder"], "no such folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_planned_is_said(arguments, said):
    # Only a model of one's own has sizes that can be set.
    own = SMALL if not any(one.startswith("model=") for one in arguments) else []
    with pytest.raises(SystemExit) as stop:
        main([*own, *arguments])
    assert said in str(stop.value)
