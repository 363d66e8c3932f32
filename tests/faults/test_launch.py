"""What Hydra reports, in the program's own process and in those of its jobs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import hydra
import pytest

from lit_ft.run import launch
from tests.support.running import CONF

PROGRAM = """
import os
import hydra
from lit_ft.run.launch import launch, reported_by_hydra

@hydra.main(version_base="1.3", config_path={conf!r}, config_name="train")
def main(cfg):
    with reported_by_hydra():
        found = {{name for name in os.environ if name.endswith(("BY_HYDRA", "FULL_ERROR"))}}
        print("in the job:", found)
        if cfg.seed == 1:
            raise RuntimeError("the job failed")

if __name__ == "__main__":
    launch(main)
"""


def run(folder: Path, *arguments: str) -> str:
    file = folder / "program.py"
    file.write_text(PROGRAM.format(conf=str(CONF)))
    done = subprocess.run(
        [sys.executable, str(file), f"run_dir={folder}/run", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(CONF.parent)},
        timeout=120,
    )
    return done.stdout


def test_a_sweep_goes_on_as_before_after_a_job_that_failed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "1").touch()
    output = run(tmp_path, "seed=1,2", "-m")
    assert output.count("in the job: set()") == 1
    assert "Traceback" not in output
    assert output.splitlines()[-1] == (
        f"run_dir cannot be used: {tmp_path}/run/1: File exists. It is a file: choose another path."
    )


def test_a_job_in_another_process_has_neither_variable(tmp_path: Path) -> None:
    run(tmp_path, "hydra/launcher=submitit_local", "seed=0", "-m")
    [log] = (tmp_path / "run" / ".submitit").rglob("*_log.out")
    assert "in the job: set()" in log.read_text()


def test_a_failed_job_is_reported_as_hydra_does(tmp_path: Path) -> None:
    output = run(tmp_path, "seed=1")
    assert "Error executing job with overrides" in output
    assert "RuntimeError: the job failed" in output
    assert "Set the environment variable HYDRA_FULL_ERROR=1" in output


@pytest.mark.parametrize(
    ("filename", "named"),
    [
        ("{run}", True),
        ("{run}/train.log", True),
        ("{run}/..", True),
        (str(CONF / "optim" / "adamw.yaml"), False),
        ("{run}-2/file", False),
    ],
)
def test_run_dir_is_named_where_it_is_at_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filename: str, named: bool
) -> None:
    place = os.path.normpath(filename.format(run=tmp_path / "run"))

    def main() -> None:
        raise PermissionError(13, "Permission denied", place)

    monkeypatch.setattr(launch, "outlive_terminal", lambda: None)
    monkeypatch.setattr(launch, "redact_output", lambda: None)
    monkeypatch.setattr(sys, "argv", ["train.py", f"run_dir={tmp_path / 'run'}"])
    with pytest.raises(SystemExit) as stopped:
        launch.launch(main)
    said = f"{place}: Permission denied. Give yourself the right to it, or choose another path."
    assert stopped.value.code == ("run_dir cannot be used: " if named else "") + said


def launched(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> list[list[str]]:
    """Return what Hydra's program is given, once for each time that it is started."""
    given: list[list[str]] = []
    monkeypatch.setattr(launch, "outlive_terminal", lambda: None)
    monkeypatch.setattr(launch, "redact_output", lambda: None)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    launch.launch(lambda: given.append(sys.argv[1:]))
    return given


def test_settings_are_saved_without_a_run_and_a_file_of_them_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "my settings.yaml"
    saving = [f"--save-config={file}", "--learning_rate", "1e-3", "optim=adamw", "seed=1"]
    assert launched(monkeypatch, *saving) == []
    printed = capsys.readouterr()
    assert f"python train.py --config '{file}'" in printed.out
    assert "learning_rate=1e-3 is optim.lr=1e-3" in printed.err
    expected = [["optim=adamw", "optim.lr=0.001", "seed=2"]]
    assert launched(monkeypatch, "--config", str(file), "seed=2") == expected


def test_a_range_is_for_a_search(tmp_path: Path) -> None:
    said = run(tmp_path, "optim.lr=interval(1e-5,1e-3)", "-m")
    assert "python -m lit_ft.search" in said and "Traceback" not in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["lerning_rate=1"], "Did you mean learning_rate?"),
        (["optim=adamm"], "optim=adamm: there is no such choice. Did you mean adamw or adamw_"),
        (["optim=galore_8bit"], "type optim=adamw_8bit galore=iteration instead"),
        (["trainer.max_step=1"], "adds what is not listed: +trainer.max_step=1"),
        (["--config", "nowhere.yaml"], "nowhere.yaml: No such file or directory."),
        (["--nowhere"], "--nowhere: there is no 'nowhere'."),
    ],
)
def test_an_unknown_name_is_answered_without_hydras_advice(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def main() -> None:
        hydra.compose("train", sys.argv[1:])

    monkeypatch.setattr(launch, "outlive_terminal", lambda: None)
    monkeypatch.setattr(launch, "redact_output", lambda: None)
    monkeypatch.setattr(sys, "argv", ["train.py", *arguments])
    with pytest.raises(SystemExit) as stopped:
        launch.launch(main)
    assert said in str(stopped.value.code)
    assert "append" not in str(stopped.value.code)
    assert "search path" not in str(stopped.value.code)
    assert "is not in struct" not in str(stopped.value.code)
