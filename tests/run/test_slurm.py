"""hydra/launcher=slurm asks for what the trainer will use, and a task of a job runs one rank."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import submitit
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.types import HydraContext
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only

from lit_ft.distributed import FSDP2Strategy
from lit_ft.run.job import refuse_to_start_processes
from tests.support.commands import SWEPT, run
from tests.support.running import CONF
from tests.support.tiny_module import trainer_of


@pytest.fixture
def sbatch(tmp_path, monkeypatch):
    """Where the script of a submitted job can be read: Slurm's commands, without Slurm."""
    script = tmp_path / "script"
    for name in ("sbatch", "srun", "scontrol", "squeue", "sacct"):
        command = tmp_path / "bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f'#!/bin/sh\ncp "$1" {script}; echo "Submitted batch job 1"\n')
        command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(submitit.Job, "results", lambda _: [None])
    return script


def submit(tmp_path, *overrides):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(
            "train",
            ["hydra/launcher=slurm", f"run_dir={tmp_path / 'run'}", *overrides],
            return_hydra_config=True,
        )
        HydraConfig.instance().set_config(config)
        context = HydraContext(GlobalHydra.instance().config_loader(), None)
        launcher = Plugins.instance().instantiate_launcher(
            hydra_context=context, task_function=print, config=config
        )
        launcher.launch([["seed=1"]], 0)


@pytest.mark.process  # sbatch
def test_the_job_asks_for_the_trainers_nodes_and_devices(tmp_path, sbatch):
    many = ["strategy=hsdp", "trainer.num_nodes=4", "trainer.devices=8"]
    submit(tmp_path, *many, "hydra.launcher.partition=gpu", "hydra.launcher.timeout_min=90")
    lines = sbatch.read_text().splitlines()
    asked = dict(
        line.removeprefix("#SBATCH --").partition("=")[::2]
        for line in lines
        if line.startswith("#SBATCH")
    )
    assert (asked["nodes"], asked["ntasks-per-node"], asked["gpus-per-node"]) == ("4", "8", "8")
    assert (asked["partition"], asked["time"]) == ("gpu", "90")
    assert asked["signal"] == "USR2@300"  # to every task: the handler that saves
    assert any(line.startswith("srun") and "submitit" in line for line in lines)


@pytest.mark.process
def test_without_slurm_a_line_says_so(tmp_path, monkeypatch):
    python = Path(sys.executable).parent
    monkeypatch.setenv("PATH", str(python))
    status, output = run(*SWEPT, "-m", "hydra/launcher=slurm", f"run_dir={tmp_path / 'run'}")
    assert status == 1 and "Traceback" not in output, output
    assert "srun" in output


def test_devices_have_to_be_told(tmp_path, sbatch):
    with pytest.raises(Exception, match="'auto'.*Integer"):
        submit(tmp_path, "strategy=fsdp")
    assert not sbatch.exists()


def test_a_task_of_a_job_starts_no_processes(tmp_path, monkeypatch):
    options = {"strategy": FSDP2Strategy(), "devices": 2, "num_nodes": 2}
    with pytest.raises(MisconfigurationException, match="A sweep"):
        refuse_to_start_processes(trainer_of(tmp_path, **options))
    task = {"NTASKS": 4, "NTASKS_PER_NODE": 2, "JOB_NAME": "train", "JOB_ID": 1}
    for name, value in {**task, "PROCID": 3, "LOCALID": 1, "NODEID": 1}.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    monkeypatch.setattr(rank_zero_only, "rank", 0)  # a trainer of another rank would leave its own
    trainer = trainer_of(tmp_path, **{**options, "strategy": FSDP2Strategy()})
    refuse_to_start_processes(trainer)
    assert (trainer.world_size, trainer.strategy.cluster_environment.global_rank()) == (4, 3)


@pytest.mark.slow
def test_submitit_runs_the_job_where_its_logs_are(tmp_path):
    """The task composes the configuration again, later: it may not name another folder."""
    job = [*SWEPT, "trainer.max_steps=2", "strategy=cpu"]
    status, output = run("-m", "hydra/launcher=submitit_local", *job, cwd=tmp_path)
    assert status == 0, output
    [run_dir] = (tmp_path / "runs").iterdir()
    assert (run_dir / ".submitit").is_dir()
    summary = json.loads((run_dir / "0" / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("completed", 2)
