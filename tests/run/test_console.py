"""How a run ends as a command, and which asides of the libraries are kept from the terminal."""

from __future__ import annotations

import logging
import sys
import warnings

import lightning
import pytest
import torch
from hydra.errors import CompactHydraException, InstantiationException
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

import lit_ft
from lit_ft.run.console import quieten_libraries
from lit_ft.run.exits import command_line_exits
from tests.support.commands import TINY, run
from tests.support.running import CONF


@pytest.fixture
def quiet():
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    before = list(logger.filters)
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        quieten_libraries()
        yield shown
    logger.filters[:] = before


def leave(error):
    with command_line_exits():
        raise error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("data.x is wrong"),
        FileNotFoundError("data.x is wrong"),
        FloatingPointError("data.x is wrong"),
        torch.OutOfMemoryError("data.x is wrong"),
    ],
)
def test_a_users_mistake_is_its_message_with_the_cause_kept(error):
    with pytest.raises(CompactHydraException, match="data.x is wrong") as raised:
        leave(error)
    assert raised.value.__cause__ is error


def test_what_hydra_wraps_is_unwrapped():
    inner = ValueError("batch_size must be at least 1")
    try:
        try:
            raise inner
        except ValueError as error:
            raise InstantiationException("Error in call to target X") from error
    except InstantiationException as wrapped:
        with pytest.raises(CompactHydraException) as raised:
            leave(wrapped)
    assert str(raised.value).strip() == "ValueError: batch_size must be at least 1"


@pytest.mark.parametrize("error", [RuntimeError("bug"), AssertionError("bug"), TypeError("bug")])
def test_a_bug_keeps_its_traceback(error):
    with pytest.raises(type(error), match="bug"):
        leave(error)


def interrupted_by_lightning():
    try:
        raise KeyboardInterrupt
    except KeyboardInterrupt:
        sys.exit(1)


def test_signals_give_the_statuses_that_a_shell_expects():
    for error, status in ((SIGTERMException(), 143), (KeyboardInterrupt(), 130)):
        with pytest.raises(SystemExit) as stop:
            leave(error)
        assert stop.value.code == status
    with pytest.raises(SystemExit) as stop, command_line_exits():
        interrupted_by_lightning()
    assert stop.value.code == 130
    with pytest.raises(SystemExit) as stop:
        leave(SystemExit(3))
    assert stop.value.code == 3


def test_our_warnings_show_no_code_and_others_do(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # restored at the end
    quieten_libraries()
    quieten_libraries()
    own, other = str(CONF.parent / "train.py"), lightning.__file__
    shown = warnings.formatwarning
    assert shown("Saves nothing.", UserWarning, own, 3) == "Warning: Saves nothing.\n"
    assert shown("Low.", UserWarning, lit_ft.__file__, 3) == "Warning: Low.\n"
    assert shown("Low.", UserWarning, other, 3) != "Warning: Low.\n"
    assert "train.py:3" in shown("Old.", DeprecationWarning, own, 3)


def test_known_asides_are_silent_and_others_are_not(quiet, caplog):
    caplog.set_level(logging.INFO)
    warnings.warn("Checkpoint directory /x exists and is not empty.", stacklevel=1)
    warnings.warn("The 'train_dataloader' does not have many workers", stacklevel=1)
    warnings.warn("Your weights are on fire", stacklevel=1)
    rank_zero_info("TPU available: False, using: 0 TPU cores")
    rank_zero_info("Restoring states from the checkpoint")
    assert [str(w.message) for w in quiet] == ["Your weights are on fire"]
    assert [record.getMessage() for record in caplog.records] == [
        "Restoring states from the checkpoint"
    ]


def test_a_run_in_a_pipe_prints_lines_and_no_control_codes(tmp_path):
    status, said = run(f"run_dir={tmp_path}", *TINY, "adapter=pissa", "trainer.max_steps=2")
    assert status == 0
    assert "\r" not in said and "\x1b" not in said
    assert "Warning" not in said and "deprecated" not in said
    assert "recipe" in said and "step 2/2 · loss" in said
    assert "GPU available" not in said and "kernels" not in said
