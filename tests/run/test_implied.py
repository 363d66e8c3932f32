"""Settings that follow from others."""

from __future__ import annotations

import pytest

from lit_ft.run.arguments import CONF, composed
from lit_ft.run.hydra_trust import compositions
from lit_ft.run.implied import with_implied

ONE_EPOCH = ["trainer.max_epochs=1", "trainer.max_steps=-1"]


@pytest.mark.parametrize(
    ("typed", "implied"),
    [
        (["optim.lr=1e-4"], []),
        (["trainer.max_epochs=20"], ["trainer.max_steps=-1"]),
        (["trainer.max_epochs=null"], []),
        (["trainer.max_epochs=-1"], []),  # Lightning's word for no limit
        (["data.path=my.jsonl", "trainer.max_steps=-1"], ONE_EPOCH[:1]),
        (["trainer.max_epochs=20", "trainer.max_steps=7"], []),
        (["data.path=my.jsonl"], ONE_EPOCH),
        (["+data.sources=[{path: my.jsonl}]"], ONE_EPOCH),
        (["data.path=my.jsonl", "trainer.max_steps=7"], []),
        (["data.path=my.jsonl", "trainer.max_epochs=2"], ["trainer.max_steps=-1"]),
        (["data.path=my.jsonl", "+trainer.max_time=00:01:00:00"], []),
        (["data.path=my.jsonl", "experiment=lora_laptop"], ONE_EPOCH),
        (["data.path=my.jsonl", "experiment=long_rows"], []),
        (["data.path=my.jsonl", "experiment=long_rows,lora_laptop"], []),
        (["data.path=my.jsonl", "experiment=elsewhere"], []),
        (["experiment=lora_laptop"], []),
        (["data.path=my.jsonl", "debug=overfit"], []),
        (["data.path=my.jsonl", "data.streaming=true"], []),
        (["data=packed"], []),
    ],
)
def test_a_run_is_as_long_as_people_expect(typed, implied):
    assert with_implied(["-m", *typed], config_dir=CONF) == ["-m", *implied, *typed]


@pytest.mark.parametrize(
    ("typed", "implied"),
    [
        (["update=blocks"], ["optim=adamw"]),
        (["update=[blocks,layerwise]"], ["optim=adamw"]),
        (["update=blocks", "optim=adamw_8bit"], []),
        (["update=blocks", "galore=none"], []),
        (["update=blocks", "adapter=lora"], []),  # which is refused
        (["update=layerwise"], []),
        (["update=blocks", "experiment=null"], ["optim=adamw"]),
        (["update=blocks", "experiment=full_8bit"], []),
        (["update=blocks,[blocks,layerwise]"], ["optim=adamw"]),  # a sweep that has no other
        (["update=whole,layerwise"], []),
        (["update=whole,blocks", "optim=adamw"], []),
        (["update=whole,blocks", "galore=none"], []),
    ],
)
def test_block_updates_bring_an_optimizer_that_goes_with_them(typed, implied):
    assert with_implied(typed, config_dir=CONF) == [*implied, *typed]


@pytest.mark.parametrize(
    "update", ["whole,blocks", "[blocks,layerwise],whole", "choice(layerwise,blocks)"]
)
def test_a_sweep_with_and_without_blocks_must_name_its_optimizer(update):
    """Each job would otherwise train with another optimizer than it does alone."""
    with pytest.raises(ValueError, match=r"Add optim=adamw, .*python -m lit_ft.compare") as said:
        with_implied(["-m", f"update={update}"], config_dir=CONF)
    assert str(said.value).startswith(f"update={update}: ")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("callbacks=early_stopping", "callbacks=[default,early_stopping]"),
        ("callbacks=none", "callbacks=none"),
        ("callbacks=default", "callbacks=default"),
        ("callbacks=[early_stopping]", "callbacks=[early_stopping]"),
        ("callbacks=no_such", "callbacks=no_such"),
        (
            "callbacks=none,early_stopping,auto_batch_size",
            "callbacks=none,[default,early_stopping],[default,auto_batch_size]",
        ),
        ("callbacks=early_stopping,no_such", "callbacks=early_stopping,no_such"),
    ],
)
def test_a_choice_of_callbacks_is_added_to_the_default_ones(typed, meant):
    assert with_implied([typed], config_dir=CONF) == [meant]


@pytest.mark.parametrize(
    ("said", "implied"),
    [
        ("optim: {lr: 1e-4}", ONE_EPOCH),
        ("trainer: {max_steps: 300}", []),
        ("trainer: {max_epochs: 3}", ["trainer.max_steps=-1"]),
        ("trainer: {max_epochs: 3, max_steps: 300}", []),
        ("trainer: {max_time: '00:01:00:00'}", []),
        ("no: [yaml", []),  # Hydra says so
    ],
)
@pytest.mark.parametrize("typed", [[], ["experiment=mine"]])
def test_a_length_in_a_file_is_kept(tmp_path, said, implied, typed):
    file = tmp_path / ("experiment/mine.yaml" if typed else "local/default.yaml")
    file.parent.mkdir()
    file.write_text(f"# @package _global_\n{said}\n")
    (tmp_path / "train.yaml").write_text("defaults: []\n")
    typed = ["data.path=my.jsonl", *typed]
    assert with_implied(typed, config_dir=tmp_path) == [*implied, *typed]


def test_epochs_of_an_experiment_alone_are_its_length(tmp_path):
    (tmp_path / "experiment").mkdir()
    file = tmp_path / "experiment" / "mine.yaml"
    file.write_text("# @package _global_\ntrainer:\n  max_epochs: 3\n")
    implied = with_implied(["experiment=mine"], config_dir=tmp_path)
    assert implied == ["trainer.max_steps=-1", "experiment=mine"]


def test_a_sweep_over_callbacks_can_be_composed():
    [typed] = with_implied(["callbacks=early_stopping,auto_batch_size"], config_dir=CONF)
    _, *jobs = compositions(["-m", typed], config_dir=CONF)
    assert [len({"early_stopping", "auto_batch_size"} & job.callbacks.keys()) for job in jobs] == [
        1,
        1,
    ]
    assert all("export" in job.callbacks for job in jobs)


def test_what_is_implied_is_composed():
    config = composed(["callbacks=early_stopping", "data.path=my.jsonl"])
    assert {"early_stopping", "export", "last_checkpoint"} <= config["callbacks"].keys()
    assert (config["trainer"]["max_epochs"], config["trainer"]["max_steps"]) == (1, -1)
