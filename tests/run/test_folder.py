"""A folder belongs to one run at a time, and a trained run in it keeps its files."""

from __future__ import annotations

import json
import logging
from contextlib import suppress
from pathlib import Path

import pytest

from lit_ft.compat.refusal import Refusal
from lit_ft.run.files import SETTINGS_HEADER, has_trained
from lit_ft.run.folder import RunFolder
from tests.support.run_files import files

RECORD = {"overrides.yaml": "- optim=adamw\n"}
OTHER = {"overrides.yaml": "- optim=sgd\n"}
EVENTS = "tensorboard/events.out.tfevents."


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """Make the folder of a run that has trained ten steps."""
    run = tmp_path / "run"
    with RunFolder(run, RECORD) as folder:
        folder.begin(None)
        logging.getLogger().error("of the first start")
        write(folder.summary, json.dumps({"steps": 10}))
    for name in (
        "checkpoints/last.ckpt",
        "export/config.json",
        "memory.html",
        "plan.html",
        "plan.json",
        EVENTS + "1",
    ):
        write(run / name, name)
    return run


def test_a_new_folder_is_open_at_once(trained: Path) -> None:
    assert set(files(trained)) == {
        ".hydra/overrides.yaml",
        "checkpoints/last.ckpt",
        "export/config.json",
        "memory.html",
        "plan.html",
        "plan.json",
        "summary.json",
        EVENTS + "1",
        "train.log",
    }
    assert "of the first start" in (trained / "train.log").read_text()


def test_a_second_run_is_refused_and_changes_no_byte(trained: Path) -> None:
    before = files(trained)
    with (
        pytest.raises(Refusal, match="has trained"),
        RunFolder(trained, OTHER) as folder,
    ):
        folder.begin(None)
    assert files(trained) == before


@pytest.mark.parametrize("how", ["resume", "overwrite", "validate"])
def test_a_start_that_fails_before_its_first_step_changes_no_byte(trained: Path, how: str) -> None:
    before = files(trained)
    last = trained / "checkpoints" / "last.ckpt" if how == "resume" else None
    with pytest.raises(OSError), RunFolder(trained, OTHER) as folder:
        folder.begin(last, trains=how != "validate", overwrite=how == "overwrite")
        logging.getLogger().error("of the second start")
        write(folder.summary, "{}")
        write(trained / f"{EVENTS}2", "of the logger")
        write(trained / "csv" / "version_1" / "metrics.csv", "of another logger")
        raise OSError("the model does not load")
    assert files(trained) == before


def test_a_resumed_run_adds_its_record_at_its_first_step(trained: Path) -> None:
    before = files(trained)
    for number in (2, 3):
        with RunFolder(trained, OTHER) as folder:
            folder.begin(trained / "checkpoints" / "last.ckpt")
            logging.getLogger().error("before step %d", number)
            write(folder.summary, "{}")
            folder.open()
            assert folder.summary == trained / "summary.json"
            logging.getLogger().error("after step %d", number)
    after = files(trained)
    log = after.pop("train.log").decode()
    assert log.startswith(before.pop("train.log").decode())
    said = ["before step 2", "after step 2", "before step 3", "after step 3"]
    assert [line.rpartition(" - ")[2] for line in log.splitlines()[1:]] == said
    added = {f".hydra/{number}/overrides.yaml" for number in (2, 3)}
    assert (before.pop("summary.json"), after.pop("summary.json")) == (b'{"steps": 10}', b"{}")
    assert after == before | dict.fromkeys(added, OTHER["overrides.yaml"].encode())


def test_a_run_that_replaces_another_leaves_nothing_of_it(trained: Path) -> None:
    with RunFolder(trained, RECORD) as folder:
        folder.begin(trained / "checkpoints" / "last.ckpt")
        folder.open()
    write(trained / "my notes.txt", "mine")
    with RunFolder(trained, OTHER) as folder:
        folder.begin(None, overwrite=True)
        write(trained / f"{EVENTS}9", "new")
        assert "checkpoints/last.ckpt" in files(trained)
        folder.open()
    after = files(trained)
    assert set(after) == {
        ".hydra/overrides.yaml",
        "my notes.txt",
        EVENTS + "9",
        "train.log",
    }
    assert after[".hydra/overrides.yaml"] == OTHER["overrides.yaml"].encode()


def test_a_run_that_only_validates_adds_nothing_but_its_record(trained: Path) -> None:
    before = files(trained)
    with RunFolder(trained, OTHER) as folder:
        folder.begin(None, trains=False)
        write(folder.summary, '{"val_loss": 1}')
        write(trained / f"{EVENTS}2", "of the validation")
    added = {name: content for name, content in files(trained).items() if name not in before}
    assert set(added) == {
        ".hydra/2/overrides.yaml",
        ".hydra/2/summary.json",
        ".hydra/2/train.log",
    }
    assert files(trained) == before | added


def test_what_a_run_left_that_saved_nothing_is_replaced(tmp_path: Path) -> None:
    write(tmp_path / "summary.json", json.dumps({"steps": 0}))
    write(tmp_path / f"{EVENTS}1", "of the run that was killed")
    write(tmp_path / "my.jsonl", "mine")
    assert not has_trained(tmp_path)
    with RunFolder(tmp_path, RECORD) as folder:
        folder.begin(None)
        assert folder.is_open
    assert set(files(tmp_path)) == {".hydra/overrides.yaml", "my.jsonl", "train.log"}


def test_what_is_the_users_own_is_never_removed(trained: Path) -> None:
    own = ("csv/mine.csv", "export/notes.md", "checkpoints/mine.pt", ".mine.tmp/a", "tensorboard/x")
    for name in own:
        write(trained / name, "mine")
    for resume in (None, trained / "checkpoints" / "last.ckpt"):
        with RunFolder(trained, OTHER) as folder:
            folder.begin(resume, overwrite=True)
            folder.open()
        write(trained / "checkpoints" / "last.ckpt", "of this run")
    write(trained / "summary.json", json.dumps({"steps": 0}))
    (trained / "checkpoints" / "last.ckpt").unlink()
    with RunFolder(trained, OTHER) as folder:
        folder.begin(None)
        assert folder.is_open
    assert set(own) <= set(files(trained))


def test_a_validation_is_replaced_by_the_next_one_and_outlives_a_refused_start(
    tmp_path: Path,
) -> None:
    for loss in (1, 2):
        with RunFolder(tmp_path, RECORD) as folder:
            folder.begin(None, trains=False)
            write(folder.summary, json.dumps({"status": "completed", "steps": 0, "val_loss": loss}))
    before = files(tmp_path)
    assert json.loads(before["summary.json"])["val_loss"] == 2
    with pytest.raises(OSError), RunFolder(tmp_path, OTHER):
        raise OSError("a wrong setting")
    assert files(tmp_path) == before


def test_a_run_that_failed_before_it_saved_can_start_again(tmp_path: Path) -> None:
    """As a restart loop does, with `resume=auto` and no checkpoint yet."""
    write(tmp_path / "summary.json", json.dumps({"status": "failed", "steps": 50}))
    with RunFolder(tmp_path, OTHER) as folder:
        folder.begin(None)
        assert folder.is_open


def test_checkpoints_may_be_a_link_to_another_disk(trained: Path) -> None:
    (trained / "checkpoints").rename(trained.parent / "scratch")
    (trained / "checkpoints").symlink_to(trained.parent / "scratch")
    with RunFolder(trained, OTHER) as folder:
        folder.begin(trained / "checkpoints" / "last.ckpt")
        assert folder.goes_on
    with RunFolder(trained, OTHER) as folder:
        folder.begin(None, overwrite=True)
        folder.open()
    assert (trained / "checkpoints").is_symlink()
    assert not has_trained(trained)


def test_an_error_on_entering_releases_the_lock(tmp_path: Path) -> None:
    with pytest.raises(OSError), RunFolder(tmp_path, {"x" * 300: ""}):
        pass
    with RunFolder(tmp_path, OTHER):
        pass


def test_a_backup_is_a_result(tmp_path: Path) -> None:
    """It is all that a run has that was killed while it replaced its only checkpoint."""
    (tmp_path / "checkpoints" / ".last.ckpt.old").mkdir(parents=True)
    assert has_trained(tmp_path)


def test_a_folder_without_a_run_is_left_as_it_is(tmp_path: Path) -> None:
    write(tmp_path / f"{EVENTS}1", "mine")
    with RunFolder(tmp_path, RECORD) as folder:
        folder.begin(None)
    assert f"{EVENTS}1" in files(tmp_path)


def test_a_checkpoint_of_another_folder_is_not_put_into_this_one(trained: Path) -> None:
    write(trained.parent / "other" / "last.ckpt", "")
    with pytest.raises(Refusal, match="has trained"), RunFolder(trained, OTHER) as folder:
        folder.begin(trained.parent / "other" / "last.ckpt")


def test_left_overs_of_killed_runs_are_removed_and_a_lone_backup_stays(trained: Path) -> None:
    folder = trained / "checkpoints"
    write(folder / ".last.ckpt.tmp", "torn")
    write(folder / ".last.ckpt.old", "of a replacement that was finished")
    write(folder / ".best.ckpt.old" / "part", "of one that was not")
    write(trained / ".hydra" / "starting" / "train.log", "of a start that was killed")
    with RunFolder(trained, OTHER) as opened:
        opened.begin(folder / "last.ckpt")
        opened.open()
    assert {path.name for path in folder.iterdir()} == {"last.ckpt", ".best.ckpt.old"}
    assert "killed" not in (trained / "train.log").read_text()


def test_two_runs_cannot_be_in_a_folder_at_once(tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path, RECORD),
        pytest.raises(Refusal, match=r"A run is writing to .*: process \d+ on "),
        RunFolder(tmp_path, OTHER),
    ):
        pass
    with RunFolder(tmp_path, OTHER):
        pass


SETTINGS = f"{SETTINGS_HEADER}\n\noptim: adamw\n"
CHANGED = f"{SETTINGS_HEADER}\n\noptim: sgd\n"


def test_the_settings_of_the_run_are_in_its_folder_from_the_start(tmp_path: Path) -> None:
    with RunFolder(tmp_path, RECORD, settings=SETTINGS) as folder:
        assert (tmp_path / "config.yaml").read_text() == SETTINGS
        folder.begin(None)


@pytest.mark.parametrize("how", ["resume", "overwrite", "validate", "fail"])
def test_settings_change_with_the_run_that_the_folder_holds(trained: Path, how: str) -> None:
    (trained / "config.yaml").write_text(SETTINGS)
    last = trained / "checkpoints" / "last.ckpt" if how == "resume" else None
    with suppress(OSError), RunFolder(trained, OTHER, settings=CHANGED) as folder:
        folder.begin(last, trains=how != "validate", overwrite=how in ("overwrite", "fail"))
        assert (trained / "config.yaml").read_text() == SETTINGS
        if how == "fail":
            raise OSError
        if how != "validate":
            folder.open()
    changes = how in ("resume", "overwrite")
    assert (trained / "config.yaml").read_text() == (CHANGED if changes else SETTINGS)


def test_a_file_of_the_same_name_that_is_the_users_own_stays(trained: Path) -> None:
    (trained / "config.yaml").write_text("mine: 1\n")
    with RunFolder(trained, OTHER, settings=CHANGED) as folder:
        folder.begin(None, overwrite=True)
        folder.open()
    assert (trained / "config.yaml").read_text() == "mine: 1\n"


def test_settings_go_with_the_run_that_they_were_of(trained: Path) -> None:
    (trained / "config.yaml").write_text(SETTINGS)
    with RunFolder(trained, OTHER) as folder:
        folder.begin(None, overwrite=True)
        folder.open()
    assert not (trained / "config.yaml").exists()
