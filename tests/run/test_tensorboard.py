"""TensorBoard shows what a run was, and compares it with others."""

from __future__ import annotations

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from tests.support.commands import TINY
from tests.support.running import run_job

RUN = [*(one for one in TINY if not one.startswith("logger")), "logger=tensorboard"]


@pytest.fixture
def left(tmp_path):
    """Return what a run of two steps has left for TensorBoard, and its validation loss."""
    options = ["adapter=lora", "adapter.r=4", "optim.lr=0.002", "trainer.max_steps=2"]
    summary = run_job(tmp_path, *RUN, *options)
    return EventAccumulator(str(tmp_path / "tensorboard")).Reload(), summary


def test_a_run_is_a_row_of_the_table_and_has_a_card(left):
    events, summary = left
    found = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    row = HParamsPluginData.FromString(found).session_start_info.hparams
    assert row["optim"].string_value == "adamw_lora"
    assert (row["lr"].number_value, row["rank"].number_value) == (0.002, 4)
    assert events.Scalars("result/val_loss")[-1].value == pytest.approx(summary["val_loss"])
    [card] = events.Tensors("run/text_summary")
    assert b"| recipe | `adamw_lora, lora, single_gpu` |" in card.tensor_proto.string_val[0]


def test_a_rank_is_that_of_the_method():
    from lit_ft.run.tensorboard import hparams

    config = {"optim": {"lr": 1e-4}, "galore": {"rank": 64}, "adapter": None, "seed": 3}
    assert hparams({"optim": "galore_subspace", "adapter": "none"}, config) == {
        "optim": "galore_subspace",
        "adapter": "none",
        "lr": 1e-4,
        "rank": 64,
        "seed": 3,
    }
