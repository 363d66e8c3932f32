"""TensorBoard shows what a run was, and compares it with others."""

from __future__ import annotations

import csv

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


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """Return the folder of a run of five steps of two micro-batches that went on to eight."""
    folder = tmp_path_factory.mktemp("run")
    table = {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": folder, "name": "csv"}
    often = ["trainer.val_check_interval=4", "trainer.log_every_n_steps=1"]
    run = [*RUN, *often, "trainer.accumulate_grad_batches=2"]
    run += [f"+logger.csv.{name}={value}" for name, value in table.items()]
    results = [run_job(folder, *run, "trainer.max_steps=5")["val_loss"]]
    results.append(run_job(folder, *run, "trainer.max_steps=8", "resume=auto")["val_loss"])
    return folder, results


def test_each_validation_is_at_its_step_once_and_those_of_the_ends_are_the_results(resumed):
    folder, results = resumed
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    found = [(one.step, one.value) for one in events.Scalars("val_loss")]
    assert [step for step, _ in found] == [0, 2, 4, 5, 6, 8]  # the first run ends at 5
    assert [value for step, value in found if step in (5, 8)] == pytest.approx(results)
    for metric in ("lr-AdamW/decay", "train_loss"):
        assert [one.step for one in events.Scalars(metric)] == list(range(8)), metric


def test_a_csv_file_has_the_same_steps(resumed):
    folder, results = resumed
    found = []
    for part in sorted((folder / "csv").glob("version_*/metrics.csv")):
        with part.open() as file:
            rows = [row for row in csv.DictReader(file) if row["val_loss"]]
        found += [(int(row["step"]), float(row["val_loss"])) for row in rows]
    assert [step for step, _ in found] == [0, 2, 4, 5, 6, 8]
    assert [value for step, value in found if step in (5, 8)] == pytest.approx(results)


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
