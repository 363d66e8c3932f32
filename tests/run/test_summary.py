"""summary.json: written from the first second of a run, whole at every moment."""

import json
import sys
import time

import pytest
import torch

from lit_ft.run.summary import RunSummary, read_summary, status_of
from tests.support.running import KEYS


def test_a_run_that_ends_well_is_completed_with_every_key(tmp_path):
    with RunSummary(tmp_path, {"seed": 3}) as summary:
        summary.update(val_loss=float("nan"))
    written = json.loads((tmp_path / "summary.json").read_text())
    assert list(written) == KEYS
    assert (written["status"], written["seed"], written["val_loss"]) == ("completed", 3, None)
    assert written["versions"]["torch"] == torch.__version__
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (ValueError("no"), "failed"),
        (torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out_of_memory"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_an_error_is_recorded_and_raised(tmp_path, error, status):
    with pytest.raises(type(error)), RunSummary(tmp_path, {}):
        raise error
    written = read_summary(tmp_path)
    assert written["status"] == status
    if status != "interrupted":
        assert written["error"]["message"] == str(error)


def test_lightnings_exit_after_ctrl_c_is_an_interruption():
    try:
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)
    except SystemExit as stop:
        assert status_of(stop) == "interrupted"
    assert status_of(SystemExit(1)) == "failed"


def test_secrets_are_redacted_and_token_counts_are_not(tmp_path):
    config = {
        "hub": {"token": "hf_abc", "api_key": "k"},
        "data": {"max_new_tokens": 5, "tokenizer": "t", "sources": [{"password": "p"}]},
        "wandb_api_key": None,
    }
    with RunSummary(tmp_path, config):
        time.sleep(0)
    text = (tmp_path / "summary.json").read_text()
    assert "hf_abc" not in text and '"p"' not in text
    written = json.loads(text)["config"]
    assert written["data"]["max_new_tokens"] == 5
    assert written["data"]["tokenizer"] == "t"
    assert written["wandb_api_key"] is None
