"""The table at the end of a sweep."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from omegaconf import OmegaConf
from rich.console import Console

from lit_ft.run.sweep_table import SweepTable, ends_with_sweep_table, sweep_table


def leave_run(folder: Path, arguments: list[str], **summary) -> None:
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "overrides.yaml").write_text(yaml.dump(arguments))
    (folder / "summary.json").write_text(json.dumps({"config": {}, **summary}))


def test_each_run_is_a_row_with_what_it_alone_has(tmp_path):
    done = {"status": "completed", "val_loss": 2.5, "steps": 1200, "seconds": {"total": 61.2}}
    leave_run(tmp_path / "10", ["model=tiny", "seed=2", "optim.betas=[0.9,0.99]"], **done)
    leave_run(tmp_path / "9", ["model=tiny", "seed=1"], status="failed", val_loss=None)
    (tmp_path / "11").mkdir()
    (tmp_path / "12").mkdir()
    (tmp_path / "12" / "summary.json").write_text("{")
    (tmp_path / "checkpoints").mkdir()
    table = sweep_table(tmp_path)
    console = Console(width=200)
    with console.capture() as capture:
        console.print(table)
    _, _, *rows = [line.split() for line in capture.get().splitlines()]
    assert [row[0] for row in rows] == ["9", "10", "11", "12"]
    assert rows[0][1:] == ["model=tiny", "seed=1", "failed"]
    assert rows[1][1:4] == ["model=tiny", "seed=2", "optim.betas=[0.9,0.99]"]
    assert rows[1][4:] == ["completed", "2.5000", "1,200", "1:01"]
    assert rows[2][1:] == ["did", "not", "start"]
    assert "damaged" in rows[3]


def test_a_sweep_with_a_failed_run_has_its_table_too(tmp_path, capsys):
    leave_run(tmp_path / "0", ["seed=1"], status="failed")
    with pytest.raises(ZeroDivisionError), ends_with_sweep_table():
        config = OmegaConf.create({"hydra": {"sweep": {"dir": str(tmp_path)}}})
        SweepTable().on_multirun_start(config=config)
        raise ZeroDivisionError
    assert "failed" in capsys.readouterr().out


def test_a_folder_without_runs_has_no_table(tmp_path):
    assert sweep_table(tmp_path) is None
