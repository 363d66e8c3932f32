"""The recommendation of `python -m lit_ft.plan`: what it looks at, its order, and its commands."""

from __future__ import annotations

import io
import json
import shlex
from dataclasses import replace
from types import SimpleNamespace

import pytest
from rich.console import Console

from lit_ft.measure.cards import Card
from lit_ft.plan import main
from lit_ft.run import recommend
from lit_ft.run.arguments import composed
from lit_ft.run.plan import planned
from lit_ft.run.recommend import (
    METHODS,
    Advice,
    Recipe,
    best_of,
    command_of,
    measured_losses,
    recipes,
)
from lit_ft.run.recommend_text import shown_advice

SMALL = ["model=tiny", "model.config.vocab_size=1024", "data.max_length=32"]


@pytest.fixture(scope="module")
def recipe():
    return Recipe(("optim=adamw",), 2.64, 1.0, planned(composed([*SMALL, "plan.gpu=24GB"])))


def test_every_method_composes_and_has_a_measured_loss():
    losses = measured_losses()
    for method in METHODS:
        composed([*SMALL, *method.settings])
        assert method.measured_as == "qlora" or 2 < losses[method.measured_as] < 3


def test_the_best_learn_best_and_of_equals_the_fastest_come_first(recipe):
    slow, worse = replace(recipe, seconds=1.3), replace(recipe, val_loss=2.7, seconds=0.5)
    noise = replace(recipe, val_loss=recipe.val_loss + 0.001, seconds=0.9)
    unmeasured = replace(recipe, val_loss=None)
    given = [unmeasured, worse, slow, recipe, noise]
    assert best_of(given) == [noise, recipe, slow, worse, unmeasured]


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


def test_sharded_weights_are_planned_in_bfloat16_before_a_card_is_too_small(monkeypatch):
    [method] = [one for one in METHODS if one.settings == ("optim=adamw", "strategy=fsdp")]
    monkeypatch.setattr(recommend, "METHODS", (method,))
    asked = []

    def run(arguments, card, devices):
        asked.append(arguments[-1])
        held = {"weights": 1 << 30 if "trainer.precision=bf16-true" in arguments else 2 << 30}
        plan = SimpleNamespace(held_bytes=held)
        fits = "data.batch_size=1" in arguments
        return SimpleNamespace(plan=plan, verdict="fits" if fits else "does not fit")

    def found(memory, **card):
        asked.clear()
        given = recipes(SMALL, Card("", memory, **card), 2, SimpleNamespace(run=run))
        return [one.settings[2:] for one in given if isinstance(one, Recipe)]

    rows = ("data.batch_size=1", "trainer.accumulate_grad_batches=4")
    least = ("module.activation_checkpointing=true", "trainer.precision=bf16-true", *rows)
    assert found(3 << 29) == [least]
    assert len(asked) == 3  # in float32 the weights alone are too large: no smaller batch is tried
    assert found(1 << 29) == []
    assert found(3 << 29, has_bfloat16=False) == []
    assert "trainer.precision=bf16-true" not in asked
    assert found(3 << 30, has_bfloat16=False) == [(least[0], *rows)]


def test_several_cards_have_one_plan_and_each_its_best(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(recommend, "METHODS", METHODS[:2])
    plans = []

    def counted(config):
        plans.append(config["optim"]["_target_"])
        return planned(config)

    monkeypatch.setattr(recommend, "planned", counted)
    file = tmp_path / "cards.json"
    wide = ["model.config.vocab_size=64000", "model.config.hidden_size=1024", "data.batch_size=1"]
    main([*SMALL, *wide, "recommend=true", "plan.gpu=1GB,24GB,8", "--json", str(file)])
    shown = capsys.readouterr().out
    assert "Nothing fits on 1 GiB." in shown
    assert plans == 2 * ["torch.optim.AdamW"] + 2 * ["bitsandbytes.optim.AdamW8bit"]
    smallest, *others = json.loads(file.read_text())["cards"]
    assert smallest["recipes"] == []
    for one, size in zip(others, (24, 8), strict=True):
        best = one["recipes"][0]
        assert one["card"]["memory_bytes"] == size << 30
        assert best["peak_bytes"] + best["outside_bytes"]["high"] <= size << 30
        assert f"{size} GiB  python train.py {shlex.join(best['arguments'])}" in shown


def test_it_says_so_if_nothing_fits(monkeypatch, capsys):
    monkeypatch.setattr(recommend, "METHODS", METHODS[:1])
    wide = ["model.config.hidden_size=2048", "model.config.intermediate_size=16384"]
    main([*SMALL, *wide, "model.config.vocab_size=64000", "recommend=true", "plan.gpu=1GB"])
    assert "Nothing fits" in capsys.readouterr().out


def test_a_plan_is_shown_and_written(tmp_path, capsys):
    file, run_dir = tmp_path / "mine.json", tmp_path / "run"
    shown = [*SMALL, "plan.gpu=4090", "--no-savings", f"run_dir={run_dir}"]
    main([*shown, "--json", str(file)])
    assert "RTX 4090" in capsys.readouterr().out
    plan = json.loads(file.read_text())
    assert plan == json.loads((run_dir / "plan.json").read_text())
    picture = (run_dir / "plan.html").read_text()
    assert "fits: RTX 4090 has 23.50 GiB" in picture and picture.count("<rect") > 6
    assert plan["verdict"] == "fits"
    assert plan["by_category"] == plan["by_phase"][plan["peak_phase"]]
    assert plan["peak_bytes"] == sum(plan["by_category"].values())
    assert plan["outside_bytes"]["low"] < plan["outside_bytes"]["high"]


def test_a_plan_writes_nothing_if_no_folder_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main([*SMALL, "plan.gpu=4090", "--no-savings"])
    assert not list(tmp_path.iterdir())


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
        (["optim=adamw_8bit_paged"], "plan with optim=adamw_8bit"),
        (
            ["strategy=tensor_parallel", "optim=adamw", "trainer.devices=2"],
            "plan with strategy=fsdp",
        ),
        (["strategy=single_gpu_offload", "plan.gpu=24GB"], "no plan for offloading yet"),
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


def test_a_terminal_of_80_columns_breaks_no_setting(recipe):
    settings = ("optim=galore_subspace_8bit", "module.activation_checkpointing=true")
    run = replace(recipe.run, plan=SimpleNamespace(peak_bytes=17 << 30))
    wide = replace(recipe, settings=settings, run=run)
    console = Console(width=80, record=True, file=io.StringIO())
    one = Advice(SMALL, run.card, 1, [wide])
    for given in ([one], [replace(one, devices=8), one]):
        for part in shown_advice(given):
            console.print(part)
        table = console.export_text().partition("The loss")[0]
        assert all(table.count(setting) == len(given) for setting in settings)
