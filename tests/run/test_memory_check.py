"""The memory plan that `python train.py` makes of itself while it loads."""

from __future__ import annotations

import logging
import re
import shlex
import signal
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import psutil
import pytest
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from lit_ft.callbacks import StartTable
from lit_ft.compat.refusal import Refusal
from lit_ft.measure.memory_plan import MemoryPlan
from lit_ft.models import FromConfig
from lit_ft.run import memory_check
from lit_ft.run.arguments import composed
from lit_ft.run.background_plan import BackgroundPlan, wants_plan
from lit_ft.run.memory_check import MemoryCheck
from lit_ft.run.plan_verdict import Outside
from lit_ft.run.rough_memory import rough_memory
from lit_ft.storage.json_file import read_json
from tests.support.commands import run
from tests.support.running import SHORT, run_job

SMALL = ["model=tiny", "logger=none", "~callbacks.samples", "strategy=cpu", "data.max_length=160"]
JOB = ["model=tiny", "logger=none", *SHORT]
MIB = 1 << 20
# The plan takes 100 MiB. 60 MiB of them do not depend on the rows.
PLAN = {
    "peak_bytes": 100 * MIB,
    "peak_phase": "forward",
    "peak_stack": ["aten.mul.Tensor in the last block", "MLP.forward, modeling.py:7"],
    "by_category": {"weights": 20 * MIB, "optimizer": 30 * MIB, "activations": 50 * MIB},
    "by_phase": {
        "load": {"weights": 20 * MIB, "activations": 0},
        "forward": {"weights": 20 * MIB, "optimizer": 30 * MIB, "activations": 50 * MIB},
        "step": {
            "weights": 20 * MIB,
            "optimizer": 30 * MIB,
            "activations": 0,
            "temporaries": 10 * MIB,
        },
    },
    "held_bytes": {"weights": 20 * MIB, "optimizer": 30 * MIB},
    "blocks": 2,
    "simulated_blocks": (2,),
    "seconds": 1.0,
}


class Answered:
    """A planning process that has answered."""

    is_under_way = True

    def __init__(self, **answer):
        self.given = answer

    def ask(self, config, *, device_type):
        self.asked = config

    def give_way(self):
        pass

    def answer(self, *, timeout=0.0):
        self.is_under_way = False
        return self.given

    def close(self):
        self.is_under_way = False


class Fields:
    is_open = False

    def update(self, **fields):
        vars(self).update(fields)


def with_memory(monkeypatch, nbytes):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=nbytes))


def begun(monkeypatch, *, memory, arguments=(), answer=None):
    """Return the check of a run that waits for its plan, on a machine with so much memory."""
    with_memory(monkeypatch, memory)
    rough = memory_check.RoughMemory(weights=0, without_rows=1 << 60, at_most=1 << 60)
    monkeypatch.setattr(memory_check, "rough_memory", lambda _: rough)
    check = MemoryCheck(Answered(**(answer or {"plan": PLAN})), Fields(), [*SMALL, *arguments])
    config = composed([*SMALL, *arguments])
    config["trainer"]["precision"] = "32-true"
    check.begin(config)
    return check


def trainer_with(longest, *, streaming=False):
    data = SimpleNamespace(streaming=streaming, longest_example=lambda: longest)
    return SimpleNamespace(datamodule=data, callbacks=[StartTable()])


@pytest.mark.process
def test_a_run_records_and_shows_its_plan_beside_what_it_took(tmp_path, monkeypatch, capsys):
    rough = rough_memory
    monkeypatch.setattr(memory_check, "_PATIENCE", 600)
    monkeypatch.setattr(
        memory_check, "rough_memory", lambda config: replace(rough(config), at_most=1 << 60)
    )
    summary = run_job(tmp_path / "run", *JOB, "optim=adamw", "plan.check=true")
    planned = summary["planned_peak_bytes"]
    assert planned["value"] == sum(planned["by_category"].values()) > 4 * 3_000_000
    assert 0 < planned["outside_low"] < planned["outside_high"]
    shown = " ".join(capsys.readouterr().out.split())
    assert re.search(r"memory .* to .* are planned, .* this machine has", shown)
    assert re.search(r"peak memory .*\(process_rss\), planned .* to .* GiB", shown)
    written = read_json(tmp_path / "run" / "plan.json")
    assert written["by_category"] == planned["by_category"]
    assert written["card"]["name"] == "this machine"


@pytest.mark.process
def test_a_run_that_cannot_fit_is_refused_before_its_weights_load(tmp_path, monkeypatch):
    def load(*_, **__):
        raise AssertionError("it loads the weights")

    with_memory(monkeypatch, MIB)
    with monkeypatch.context() as patched:
        patched.setattr(FromConfig, "load_model", load)
        with pytest.raises(CompactHydraException, match="has 1 MiB. The weights alone take"):
            run_job(tmp_path / "run", *JOB, "plan.check=true")
    assert not planning_processes()
    summary = run_job(tmp_path / "run", *JOB, "plan.check=false")
    assert (summary["status"], summary["planned_peak_bytes"]) == ("completed", None)


def test_a_plan_is_written_once_the_folder_is_that_of_this_run(tmp_path, monkeypatch):
    check = begun(monkeypatch, memory=1024 * MIB)
    check.summary.run_dir = tmp_path
    check.on_train_start(trainer_with(160), None)
    assert not list(tmp_path.iterdir())
    check.summary.is_open = True
    check.on_train_batch_end(trainer_with(160), None, None, None, 0)
    written = read_json(tmp_path / "plan.json")
    assert (written["peak_bytes"], written["verdict"]) == (100 * MIB, "tight")
    (tmp_path / "plan.json").unlink()
    check.on_train_batch_end(trainer_with(160), None, None, None, 1)
    assert not (tmp_path / "plan.json").exists()


@pytest.mark.slow
def test_a_model_that_is_not_there_is_refused_for_its_size_first(tmp_path):
    # Its weights take 263 GiB.
    status, said = run(f"run_dir={tmp_path}", "model=llama_3_1_70b", "strategy=cpu")
    assert status == 1
    assert "cannot fit" in said and "plan.check=false" in said
    [command] = re.findall(r"`python -m lit_ft.plan (.*?)`", said)
    assert composed(shlex.split(command))["model"]["name_or_path"].endswith("70B-Instruct")


def test_what_does_not_depend_on_rows_is_refused_at_once(monkeypatch):
    outside = 0.4 * 1024 * MIB
    with pytest.raises(Refusal, match="100 MiB of tensors .* largest part is activations, 50 MiB"):
        begun(monkeypatch, memory=int(outside + 57 * MIB))  # 60 MiB are 4% more
    begun(monkeypatch, memory=int(outside + 58 * MIB))


@pytest.mark.parametrize(
    ("mib", "arguments", "longest", "streaming", "is_refused"),
    [
        (90, [], 160, False, True),
        (97, [], 160, False, False),  # within the error of plans
        (90, [], 159, False, False),
        (90, ["data.packing=true"], 9, False, True),
        (90, [], 160, True, False),
    ],
)
def test_rows_are_refused_if_some_are_as_long_as_planned(
    mib, arguments, longest, streaming, is_refused, monkeypatch
):
    memory = int(0.4 * 1024 * MIB) + mib * MIB
    check = begun(monkeypatch, memory=memory, arguments=arguments)
    trainer = trainer_with(longest, streaming=streaming)
    with pytest.raises(Refusal, match="cannot fit") if is_refused else nullcontext():
        check.setup(trainer, None, "validate")
    check.on_train_start(trainer, None)
    check.setup(trainer, None, "validate")  # the last validation loses nothing


def test_a_run_that_cannot_be_planned_goes_on_and_its_log_says_why(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "lit_ft")
    check = begun(monkeypatch, memory=MIB, answer={"why_not": "ValueError: no plan"})
    check.setup(trainer_with(160), None, "validate")
    check.on_train_start(trainer_with(160), None)
    assert "no memory plan of this run: ValueError: no plan" in caplog.text
    assert not hasattr(check.summary, "planned_peak_bytes")

    caplog.clear()
    begun(monkeypatch, memory=MIB, arguments=["callbacks=auto_batch_size"])
    assert "batch size is not known" in caplog.text


@pytest.mark.process
def test_a_process_that_breaks_is_no_plan_and_nothing_is_left():
    with BackgroundPlan() as planning:
        [process] = planning_processes()
        process.kill()
        planning.ask({}, device_type="cpu")
        assert "ended with status -9" in planning.answer(timeout=60)["why_not"]
    with BackgroundPlan() as planning:
        planning.ask({"data": {"_target_": "theirs"}}, device_type="cpu")
        assert "data._target_=theirs" in planning.answer(timeout=120)["why_not"]
    with BackgroundPlan():
        pass
    assert not planning_processes()


def planning_processes() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [one for one in children if "lit_ft.run.plan_process" in one.cmdline()]


PARENT = """
import signal, psutil
from lit_ft.run.background_plan import BackgroundPlan, wants_plan
planning = BackgroundPlan()
print(psutil.Process().children()[0].pid, flush=True)
signal.pause()
"""


@pytest.mark.process
def test_it_ends_with_its_parent():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    process = psutil.Process(int(parent.stdout.readline()))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    process.wait(60)  # raises if it goes on


@pytest.mark.parametrize(
    ("settings", "mode", "rank", "wanted"),
    [
        ({}, RunMode.RUN, "0", True),
        ({"plan": {"check": False}}, RunMode.RUN, "0", False),
        ({"plan": {"check": "${nothing}"}}, RunMode.RUN, "0", False),
        ({"validate_only": True}, RunMode.RUN, "0", False),
        ({}, RunMode.MULTIRUN, "0", False),
        ({}, RunMode.RUN, "1", False),
    ],
)
def test_the_first_rank_of_one_training_is_planned(settings, mode, rank, wanted, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    config = {"plan": {"check": True}, "validate_only": False, **settings}
    assert wants_plan(OmegaConf.create(config), mode) is wanted


def test_a_process_on_the_cpu_keeps_what_activations_have_taken():
    plan = MemoryPlan(**PLAN)
    in_step = replace(plan, peak_phase="step", by_category=plan.by_phase["step"])
    for one in (plan, in_step):  # they are freed before the step, and malloc keeps them
        outside = Outside.of(one, device_type="cpu", ranks=1)
        assert outside.high == (1 << 30) + 50 * MIB
