"""What a user, the machine or the terminal can cause: a line that names it, and no traceback."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hydra.errors import CompactHydraException

import train
from lit_ft.compat.refusal import message_on_command_line
from lit_ft.data.cache import cached
from lit_ft.models import export_model
from lit_ft.run.arguments import CONF, composed
from lit_ft.run.config import null_choices
from lit_ft.run.files import read_summary
from tests.support.commands import TINY, run
from tests.support.datamodules import table
from tests.support.running import run_job
from tests.support.tiny_module import module_of

LINES = "\n\nSet the environment variable HYDRA_FULL_ERROR=1 for a complete stack trace."


def told(output: str) -> str:
    """Return what a command has said of its error, which is not a traceback."""
    assert "Traceback" not in output
    return output.removesuffix(LINES + "\n").rpartition("\n\n")[2]


@contextmanager
def file_size(largest: int) -> Iterator[None]:
    """Let no file grow beyond a number of bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").touch()
    return tmp_path / "file"


@pytest.mark.parametrize("setting", ["run_dir={}", "run_dir={}/run", "run_dir=/proc/run"])
def test_a_run_dir_that_cannot_be_made_is_named(a_file, setting):
    path = setting.format(a_file)
    # A slow machine shows the stage that the error ends.
    status, output = run(path, *TINY, "ui=off")
    assert status == 1
    assert told(output).startswith(f"run_dir cannot be used: {path.removeprefix('run_dir=')}: ")
    assert len(output.splitlines()) == 1


def test_a_log_that_cannot_be_opened_is_named(tmp_path):
    (tmp_path / "train.log").mkdir()
    status, output = run(f"run_dir={tmp_path}", *TINY)
    assert status == 1
    assert f"{tmp_path}/train.log: Is a directory." in told(output)


def test_a_cache_that_cannot_be_written_is_named_and_the_log_has_the_traceback(
    a_file, tmp_path, monkeypatch
):
    monkeypatch.setenv("LIT_FT_CACHE", str(a_file / "cache"))
    status, output = run(f"run_dir={tmp_path / 'run'}", *TINY, "trainer.max_steps=1")
    assert status == 1
    assert f"cache folder {a_file}/cache cannot be written to: Not a directory" in told(output)
    assert "LIT_FT_CACHE=FOLDER" in told(output)
    log = (tmp_path / "run" / "train.log").read_text()
    assert "Traceback" in log and "NotADirectoryError" in log


def test_a_full_disk_under_the_cache_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_FT_CACHE", str(tmp_path / "cache"))
    with file_size(10), pytest.raises(OSError, match=r"cannot be written to: .*LIT_FT_CACHE=FOLD"):
        cached("key", table(1))
    assert list((tmp_path / "cache" / "data").iterdir()) == []


def test_a_full_disk_under_an_export_is_named(tmp_path):
    module = module_of()
    module.configure_model()
    with file_size(1000), pytest.raises(OSError) as error:
        export_model(module.model, None, tmp_path / "export")
    assert message_on_command_line(error.value) == (
        f"{tmp_path}/export: File too large. Free some space, or choose another path."
    )


def test_data_of_an_unreadable_place_is_not_called_the_caches_fault(tmp_path, monkeypatch):
    monkeypatch.setenv("LIT_FT_CACHE", str(tmp_path / "cache"))

    def build(_):
        return (tmp_path / "rows.jsonl").open()

    with pytest.raises(FileNotFoundError, match=r"rows\.jsonl"):
        cached("key", build)


def test_a_missing_value_is_named_and_recorded(tmp_path):
    status, output = run(f"run_dir={tmp_path}", "model=pretrained")
    assert status == 1
    assert told(output) == (
        "ValueError: model.name_or_path is missing: add model.name_or_path=VALUE."
    )
    summary = read_summary(tmp_path)
    assert (summary["status"], summary["error"]["type"]) == ("failed", "ValueError")
    assert summary["ended"].startswith("ValueError before the first step: model.name_or_path is")


@pytest.mark.parametrize("setting", ["seed", "optim.lr", "trainer.accelerator", "data.path"])
def test_an_interpolation_of_nothing_is_named_and_recorded(setting, tmp_path):
    with pytest.raises(CompactHydraException, match=f"{setting}: .*'nope' not found. Between"):
        run_job(tmp_path, f"{setting}=${{nope}}")
    assert setting in read_summary(tmp_path)["error"]["message"]


def test_each_group_says_what_to_choose_in_place_of_null():
    groups = [path.relative_to(CONF).as_posix() for path in CONF.rglob("*") if path.is_dir()]
    groups = [group for group in groups if list((CONF / group).glob("*.yaml"))]
    assert {"optim", "optim/groups", "data/format", "experiment"} <= set(groups)
    for group in groups:
        with pytest.raises(ValueError, match=f"^{group}=null is no choice: (type|leave|choose)"):
            composed([f"{group}=null"])
    assert null_choices(["resume=null", "data.path=null", "optim=sgd"], config_dir=CONF) == ""
    status, output = run("optim=adamw,null", "-m")
    assert (status, output.partition(":")[0]) == (1, "optim=null is no choice")


def save(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


@pytest.mark.parametrize("setting", ["validate_only=false", "validate_only=true"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"a": torch.ones(3)}, "bad.ckpt holds the model alone.*pytorch-lightning_version"),
        (
            {"state_dict": {}, "callbacks": {}},
            "bad.ckpt holds the model alone.*save_optimizer=true",
        ),
        (torch.ones(3), "bad.ckpt is no checkpoint: it holds a Tensor"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused_by_name(
    tmp_path, content, message, setting, monkeypatch
):
    monkeypatch.setattr("lit_ft.models.FromConfig.load_model", None)  # it is not called
    bad = save(tmp_path / "bad.ckpt", content)
    with pytest.raises(CompactHydraException, match=message):
        run_job(tmp_path / "run", *TINY, f"resume={bad}", setting)


def files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


SHELL = {
    "no encoding": 'PYTHONIOENCODING=ascii LC_ALL=C "$@"',
    "closed": '"$@" >&-',
    "both closed": '"$@" >&- 2>&-',
    "broken pipe": 'set -o pipefail; "$@" 2>&1 | head -1',
    "full disk": '"$@" >/dev/full 2>&1',
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("terminal", "unbuffered"),
    [*((terminal, "") for terminal in SHELL), ("broken pipe", "1"), ("full disk", "1")],
)
def test_no_terminal_fails_a_run(terminal, unbuffered, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
    samples = [one for one in TINY if one != "~callbacks.samples"]
    job = [*samples, "trainer.max_steps=1", "+callbacks.samples.max_new_tokens=4"]
    command = [sys.executable, train.__file__, f"run_dir={tmp_path / 'run'}", *job]
    shell = ["bash", "-c", SHELL[terminal], "bash", *command]
    assert subprocess.run(shell, timeout=300).returncode == 0
    assert read_summary(tmp_path / "run")["status"] == "completed"
    assert {"checkpoints/last.ckpt", "export/config.json"} <= files(tmp_path / "run")
