"""callbacks=auto_batch_size: the largest micro-batch that fits, with the training unchanged."""

from __future__ import annotations

import re

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from lit_ft.callbacks import batch_size
from lit_ft.measure import MemoryReading
from tests.support.commands import TINY
from tests.support.running import run_job
from tests.support.stopping import at

JOB = [
    *TINY,
    "optim=sgd",
    "data.batch_size=1",
    "trainer.accumulate_grad_batches=6",
    "trainer.max_steps=3",
    "trainer.val_check_interval=12",
]
AUTO = "callbacks=[default,auto_batch_size]"
MIB = 2**20


@pytest.fixture
def memory(monkeypatch):
    """Let a row need 10 MiB, with a set amount free; return the sizes that are probed."""
    probed = []

    def peak_of(trainer, module, size, length, device):
        probed.append(size)
        return (100 + 10 * size) * MIB

    def available(mebibytes):
        monkeypatch.setattr(batch_size, "_peak_of", peak_of)
        before = MemoryReading(100 * MIB, "process_rss")
        monkeypatch.setattr(batch_size, "current_bytes", lambda device: before)
        # The optimizer's state to come (SGD's momentum) is set aside.
        monkeypatch.setattr(batch_size, "estimate_state_bytes", lambda optimizer: [5 * MIB, None])
        monkeypatch.setattr(batch_size, "_free_bytes", lambda device: (mebibytes + 5) * MIB / 0.9)
        return probed

    return available


def weights(run_dir):
    return torch.load(run_dir / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("plain")
    summary = run_job(run_dir, *JOB)
    return weights(run_dir), summary


@pytest.mark.parametrize(
    ("mebibytes", "found", "tried"),
    [(11, 1, [1]), (29, 2, [1, 2]), (31, 3, [1, 2, 3]), (61, 6, [1, 2, 3, 6])],
)
def test_the_largest_divisor_that_fits_trains_the_same_weights(
    memory, plain, tmp_path, caplog, mebibytes, found, tried
):
    probed = memory(mebibytes)
    summary = run_job(tmp_path, *JOB, AUTO)
    said = caplog.text
    assert f"batch_size={found} accumulate_grad_batches={6 // found} (" in said
    assert probed == tried  # what cannot fit is not tried
    expected, run = plain
    assert (summary["steps"], summary["tokens"]) == (run["steps"], run["tokens"])
    torch.testing.assert_close(weights(tmp_path), expected, rtol=0, atol=1e-5)


def test_a_resumed_run_may_find_another_size(memory, plain, tmp_path):
    memory(31)
    with pytest.raises(SystemExit):
        run_job(tmp_path, *JOB, AUTO, *at("on_train_batch_start", 0))
    memory(61)
    run_job(tmp_path, *JOB, AUTO, "resume=auto")
    torch.testing.assert_close(weights(tmp_path), plain[0], rtol=0, atol=1e-5)


def test_not_even_one_row_is_an_error_that_names_remedies(memory, tmp_path):
    memory(9)
    with pytest.raises(Exception, match=r"Not even one row of 160 tokens fits.*adapter=lora"):
        run_job(tmp_path, *JOB, AUTO)


def test_running_out_of_memory_ends_the_search(memory, monkeypatch, tmp_path, caplog):
    memory(1000)
    fitting = batch_size._peak_of

    def peak_of(trainer, module, size, *rest):
        if size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return fitting(trainer, module, size, *rest)

    monkeypatch.setattr(batch_size, "_peak_of", peak_of)
    run_job(tmp_path, *JOB, AUTO)
    assert " batch_size=2 " in caplog.text


def test_a_real_measurement_leaves_no_trace_in_the_training(plain, tmp_path, caplog):
    run_job(tmp_path, *JOB, AUTO)
    said = re.search(r" batch_size=(\d) .*=(\d) \((\S+) GiB", caplog.text)
    assert int(said[1]) * int(said[2]) == 6
    torch.testing.assert_close(weights(tmp_path), plain[0], rtol=0, atol=1e-5)


def test_a_run_of_epochs_takes_the_same_steps(memory, tmp_path):
    memory(31)
    job = [*JOB, "trainer.max_steps=-1", "trainer.max_epochs=1", "+trainer.limit_train_batches=12"]
    before = run_job(tmp_path / "plain", *job)
    found = run_job(tmp_path / "found", *job, AUTO)
    # 12 batches are 12 rows in the one, 36 in the other, which makes 2 and 6 steps of 6 rows.
    assert before["steps"] == 2 and found["steps"] == 6
    assert found["tokens"] > 2 * before["tokens"]


def test_validation_keeps_its_interval_in_optimizer_steps(memory, tmp_path):
    memory(61)
    job = [*JOB, "trainer.max_steps=5", AUTO, "trainer.val_check_interval=12"]
    run_job(tmp_path, *job, "logger=csv")
    rows = (tmp_path / "csv" / "version_0" / "metrics.csv").read_text().splitlines()
    names = rows[0].split(",")
    steps = [
        int(row.split(",")[names.index("step")])
        for row in rows[1:]
        if row.split(",")[names.index("val_loss")]
    ]
    assert steps[1:3] == [2, 4]


def test_several_devices_are_refused(tmp_path):
    trainer = Trainer(accelerator="cpu", devices=2, logger=False)
    with pytest.raises(MisconfigurationException, match=r"Trainer\(devices=1\)"):
        batch_size.AutoBatchSize().setup(trainer, BoringModel(), "fit")
