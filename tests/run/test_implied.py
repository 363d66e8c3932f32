"""Settings that follow from others."""

from __future__ import annotations

import pytest

from lit_ft.run.arguments import CONF, composed
from lit_ft.run.implied import with_implied

ONE_EPOCH = ["trainer.max_epochs=1", "trainer.max_steps=-1"]


@pytest.mark.parametrize(
    ("typed", "implied"),
    [
        (["optim.lr=1e-4"], []),
        (["trainer.max_epochs=20"], ["trainer.max_steps=-1"]),
        (["trainer.max_epochs=null"], []),
        (["trainer.max_epochs=20", "trainer.max_steps=7"], []),
        (["data.path=my.jsonl"], ONE_EPOCH),
        (["+data.sources=[{path: my.jsonl}]"], ONE_EPOCH),
        (["data.path=my.jsonl", "trainer.max_steps=7"], []),
        (["data.path=my.jsonl", "trainer.max_epochs=2"], ["trainer.max_steps=-1"]),
        (["data.path=my.jsonl", "+trainer.max_time=00:01:00:00"], []),
        (["data.path=my.jsonl", "experiment=lora_laptop"], []),
        (["data.path=my.jsonl", "debug=overfit"], []),
        (["data.path=my.jsonl", "data.streaming=true"], []),
        (["data=packed"], []),
    ],
)
def test_a_run_is_as_long_as_people_expect(typed, implied):
    assert with_implied(["-m", *typed], config_dir=CONF) == ["-m", *implied, *typed]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("callbacks=early_stopping", "callbacks=[default,early_stopping]"),
        ("callbacks=none", "callbacks=none"),
        ("callbacks=default", "callbacks=default"),
        ("callbacks=[early_stopping]", "callbacks=[early_stopping]"),
        ("callbacks=no_such", "callbacks=no_such"),
    ],
)
def test_a_choice_of_callbacks_is_added_to_the_default_ones(typed, meant):
    assert with_implied([typed], config_dir=CONF) == [meant]


def test_what_is_implied_is_composed():
    config = composed(["callbacks=early_stopping", "data.path=my.jsonl"])
    assert {"early_stopping", "export", "last_checkpoint"} <= config["callbacks"].keys()
    assert (config["trainer"]["max_epochs"], config["trainer"]["max_steps"]) == (1, -1)
