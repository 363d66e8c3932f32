"""A run resumes from the newest whole checkpoint, and names what is damaged."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hydra.errors import CompactHydraException

from tests.support.checkpoints import same
from tests.support.damaging import cut, flip
from tests.support.stopping import at, stopped

OPTIONS = ["optim=adamw", "checkpoint.every_n_steps=2"]


@pytest.fixture
def states(job, tmp_path):
    """A run that was stopped at its fifth step: `last.ckpt` has five steps, `last-1.ckpt` four."""
    stopped(job, "parts", *OPTIONS, *at("on_train_batch_start", 4))
    return tmp_path / "parts" / "checkpoints"


@pytest.mark.parametrize(
    "damage", [flip, *(pytest.param(one, marks=pytest.mark.slow) for one in (cut, Path.unlink))]
)
def test_a_damaged_last_state_is_named_and_the_one_before_it_taken(
    job, states, tmp_path, recwarn, damage
):
    job("whole", *OPTIONS)
    damage(states / "last.ckpt")
    resumed = job("parts", *OPTIONS, "resume=auto")
    assert resumed["steps"] == 9
    same(tmp_path / "whole", tmp_path / "parts")
    told = [str(one.message) for one in recwarn if "is damaged" in str(one.message)]
    assert len(told) == (damage is not Path.unlink)
    assert all("last.ckpt is damaged" in text and "from " in text for text in told)


def test_no_whole_state_and_a_named_one_that_is_damaged_end_the_run(job, states, tmp_path):
    shutil.copy(states / "last.ckpt", tmp_path / "good.ckpt")
    for path in states.glob("last*.ckpt"):
        flip(path)
    with pytest.raises(CompactHydraException, match="last.ckpt is dam.*last-1.ckpt is dam.*afresh"):
        job("parts", *OPTIONS, "resume=auto")
    with pytest.raises(CompactHydraException, match="last.ckpt is damaged: .*resume=auto takes"):
        job("other", *OPTIONS, f"resume={states / 'last.ckpt'}")
    assert job("other", *OPTIONS, f"resume={tmp_path / 'good.ckpt'}")["steps"] == 9
