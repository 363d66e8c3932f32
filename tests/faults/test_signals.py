"""Signals: in a project that knows nothing of lit_ft, in the job, and in a process of its own."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.utilities.exceptions import SIGTERMException

import train
from lit_ft.callbacks import LastCheckpoint, StopOnSignal
from lit_ft.callbacks.stop import SIGHUPException
from lit_ft.run.files import read_summary
from tests.support.commands import TINY, signal_at, start
from tests.support.running import run_job
from tests.support.stopping import Fault, at, stopped

pytestmark = pytest.mark.usefixtures("signals_as_usual")

STATUSES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def fit(tmp_path, *callbacks, verb="fit", saves=True):
    trainer = Trainer(
        accelerator="cpu",
        max_steps=6,
        accumulate_grad_batches=2,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        callbacks=[StopOnSignal(), *callbacks, *([LastCheckpoint(tmp_path)] if saves else [])],
        default_root_dir=tmp_path,
    )
    getattr(trainer, verb)(BoringModel())


def saved_step(tmp_path):
    return torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"]


@pytest.mark.parametrize(
    ("fault", "raised"),
    [
        ("interrupt", SystemExit),
        ("terminate", SIGTERMException),
        ("hang_up", SIGHUPException),
    ],
)
def test_the_step_under_way_is_finished_and_saved(tmp_path, fault, raised):
    with pytest.raises(raised):
        fit(tmp_path, Fault("on_train_batch_start", 2, fault))
    assert saved_step(tmp_path) == 3


def test_a_sighup_that_is_ignored_stays_ignored(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        fit(tmp_path, Fault("on_train_batch_start", 2, "hang_up"))
    finally:
        signal.signal(signal.SIGHUP, before)
    assert saved_step(tmp_path) == 6


@pytest.mark.parametrize("saves", [True, False])
def test_it_does_not_promise_a_save_that_nobody_makes(tmp_path, caplog, saves):
    caplog.set_level("INFO", "lightning.pytorch")
    with pytest.raises(SystemExit):
        fit(tmp_path, Fault("on_train_batch_start", 2, "interrupt"), saves=saves)
    told = (
        "finishing the step and saving." if saves else "saving nothing, which LastCheckpoint would"
    )
    assert told in caplog.text
    assert (tmp_path / "last.ckpt").exists() == saves


@pytest.fixture
def steps_at_warning(tmp_path):
    """What is saved whenever SIGUSR2 is handled as a scheduler's job does."""
    steps = []
    earlier = signal.signal(signal.SIGUSR2, lambda *_: steps.append(saved_step(tmp_path)))
    yield steps
    signal.signal(signal.SIGUSR2, earlier)


def test_a_schedulers_warning_is_handled_once_the_step_is_saved(tmp_path, steps_at_warning):
    with pytest.raises(SIGTERMException):
        fit(tmp_path, Fault("on_train_batch_start", 2, "warn"))
    assert steps_at_warning == [3]


def test_a_second_signal_stops_at_once(tmp_path):
    twice = [Fault("on_train_batch_start", 2, "interrupt") for _ in range(2)]
    with pytest.raises(SystemExit):
        fit(tmp_path, *twice)
    assert not (tmp_path / "last.ckpt").exists()


def test_a_signal_after_the_last_step_is_not_lost(tmp_path):
    # In a callback behind StopOnSignal: nothing will ask it again.
    with pytest.raises(SystemExit):
        fit(tmp_path, Fault("on_train_end", 6, "interrupt"))


def test_sigterm_in_the_last_batch_of_a_validation_outside_fit_is_not_lost(tmp_path):
    class Validating(Fault):
        def _when_due(self, *_, **__):
            self.fault()

    with pytest.raises(SIGTERMException):
        fit(tmp_path, Validating("on_validation_batch_start", 0, "terminate"), verb="validate")


def test_sigterm_saves_and_exits_with_143(job, tmp_path):
    stopped(job, "run", *at("on_train_batch_start", 1, fault="terminate"), status=143)
    assert read_summary(tmp_path / "run")["status"] == "interrupted"
    assert read_summary(tmp_path / "run")["checkpoint_path"]
    assert torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 2


def test_signals_have_their_usual_effect_after_the_run(job):
    before = [signal.getsignal(number) for number in STATUSES]
    stopped(job, "run", *at("on_train_batch_start", 0))
    assert [signal.getsignal(number) for number in STATUSES] == before


def test_ctrl_c_after_the_last_step_ends_the_run(job, tmp_path):
    stopped(job, "run", "trainer.max_steps=1", *at("on_fit_end", 1))
    assert read_summary(tmp_path / "run")["status"] == "interrupted"


@pytest.mark.parametrize(("number", "status"), STATUSES.items())
def test_a_signal_saves_a_checkpoint_that_resume_auto_goes_on_from(number, status, tmp_path):
    job = [*TINY, "schedule=constant", "trainer.log_every_n_steps=1"]
    process = start(f"run_dir={tmp_path}", *job, "trainer.max_steps=5000")
    exit_status, output = signal_at(process, "step 3/", number)
    assert exit_status == status, output
    assert "Traceback" not in output
    stopped = read_summary(tmp_path)
    assert (stopped["status"], stopped["error"]) == ("interrupted", None)
    names = {signal.SIGINT: "Ctrl-C", signal.SIGTERM: "SIGTERM", signal.SIGHUP: "SIGHUP"}
    assert stopped["ended"] == f"{names[number]} at step {stopped['steps']}"
    last = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == stopped["steps"] >= 3
    steps = stopped["steps"] + 1
    resumed = run_job(tmp_path, *job, "resume=auto", f"trainer.max_steps={steps}")
    assert (resumed["status"], resumed["steps"]) == ("completed", steps)
    assert resumed["initial_val_loss"] == stopped["initial_val_loss"]


WAITS = """
import runpy, sys, time
from pathlib import Path
import lit_ft.data.cache, {module}

def waits(*_, **__):
    print('waiting', flush=True)
    time.sleep(60)

{module}.{name} = waits
cache = Path(sys.argv[1]) / 'cache'
lit_ft.data.cache.cache_folder = lambda: cache
sys.argv[1] = 'run_dir=' + sys.argv[1] + '/run'
runpy.run_path({train!r}, run_name='__main__')
"""


@pytest.mark.parametrize(
    ("number", "module", "name"),
    [
        (signal.SIGTERM, "lit_ft.data.encoding", "Encoder.__call__"),
        (signal.SIGHUP, "lit_ft.data.encoding", "Encoder.__call__"),
        (signal.SIGTERM, "lit_ft.models.gguf", "_dequantise"),
        (signal.SIGINT, "lit_ft.models.sources", "FromConfig.load_model"),
    ],
)
def test_a_signal_before_training_ends_the_run_at_once_and_leaves_no_part(
    number, module, name, tmp_path, monkeypatch
):
    if name == "_dequantise":  # otherwise the model that is there already is taken
        monkeypatch.setenv("LIT_FT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "q", "completion": "a"}\n' * 40)
    script = WAITS.format(module=module, name=name, train=train.__file__)
    process = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path, *TINY, f"data.path={tmp_path / 'rows.jsonl'}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    exit_status, output = signal_at(process, "waiting", number)
    assert exit_status == STATUSES[number], output
    assert "Traceback" not in output
    summary = read_summary(tmp_path / "run")
    assert (summary["status"], summary["error"]) == ("interrupted", None)
    assert summary["ended"].endswith("before the first step")
    cache = tmp_path / "cache"
    assert cache.is_dir() or name == "FromConfig.load_model"
    entries = [*cache.glob("*"), *cache.glob("models/*")]
    assert not [entry.name for entry in entries if entry.name.startswith((".", "building-"))]


def test_a_killed_run_leaves_interrupted_behind(tmp_path):
    script = (
        "import sys, time\nfrom lit_ft.run.summary import RunSummary\n"
        "with RunSummary(sys.argv[1], {}):\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert read_summary(tmp_path)["status"] == "interrupted"
