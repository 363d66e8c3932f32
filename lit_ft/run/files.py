"""The files that runs write to their folders, by which a run is found and removed.

Whatever else is in such a folder is the user's own.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from lit_ft.run.record import FOLDER as RECORD
from lit_ft.storage.atomic import remove, remove_left_over, temporary_path
from lit_ft.storage.json_file import read_json
from lit_ft.storage.own_card import CARD, is_own_card

SUMMARY = "summary.json"
LOCK = ".lock"
"""The file that the run in a folder holds while it is going on."""

SETTINGS = "config.yaml"
"""The run's own settings, as `--config` reads them."""

SETTINGS_HEADER = "# Settings of lit_ft: python train.py --config FILE"
"""The first line of a file of settings that lit_ft has written."""

PLAN, PLAN_PICTURE = "plan.json", "plan.html"
"""The memory plan of the run, in figures and as a picture."""

MEMORY_PICTURE = "memory.html"
"""The picture of the memory that the first steps took; see `lit_ft.callbacks.MemoryMonitor`."""

_LOGS = (
    "tensorboard/events.out.tfevents*",
    "tensorboard/hparams.yaml",
    "csv/version_*/metrics.csv",
    "csv/version_*/hparams.yaml",
)
_TRACES = (
    SUMMARY,
    PLAN,
    PLAN_PICTURE,
    MEMORY_PICTURE,
    f"{RECORD}/*.yaml",
    f"{RECORD}/[0-9]*/*",
    *_LOGS,
)
_RESULTS = (
    "checkpoints/last*.ckpt",
    "checkpoints/best.ckpt",
    "checkpoints/best.json",
    *(
        f"{folder}/{name}"
        for folder in ("export", "export/adapter")
        for name in ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "Modelfile")
    ),
)


def read_summary(run_dir: str | Path) -> dict[str, Any] | None:
    """Return the summary of the run in `run_dir`; None if it has none.

    Raises:
        ValueError: If it is damaged, or no summary of a run.
    """
    path = Path(run_dir) / SUMMARY
    try:
        return _checked(read_json(path), path) if path.is_file() else None
    except ValueError as error:
        remedy = f"`python train.py run_dir={run_dir} resume=auto` writes it again"
        raise ValueError(f"{error}. {remedy}.") from error


def _checked(summary: dict[str, Any], path: Path) -> dict[str, Any]:
    for name, kind in (("status", str), ("config", dict)):
        if not isinstance(summary.get(name), kind):
            raise ValueError(f"{path} is damaged: it has no {name}")
    return summary


def logs_of_run(folder: Path) -> set[Path]:
    """Return what the loggers of runs have written to a folder."""
    return _found(folder, _LOGS)


def is_settings_file(path: Path) -> bool:
    """Whether a file is one of settings that lit_ft has written, not the user's own."""
    try:
        with path.open("rb") as file:
            return file.read(len(SETTINGS_HEADER)) == SETTINGS_HEADER.encode()
    except OSError:
        return False


def traces_of_run(folder: Path, log_name: str) -> set[Path]:
    """Return what runs have written to a folder apart from weights; empty without a summary.

    Args:
        folder: The folder of the run. Its subfolders may be links.
        log_name: The name of the log in it.
    """
    if not (folder / SUMMARY).exists():
        return set()
    settings = {folder / SETTINGS} if is_settings_file(folder / SETTINGS) else set()
    return _found(folder, (*_TRACES, log_name)) | settings


def results_of_run(folder: Path) -> set[Path]:
    """Return the checkpoints and the files of the exported model in a folder."""
    cards = {folder / "export" / CARD, folder / "export" / "adapter" / CARD}
    return _found(folder, _RESULTS) | {card for card in cards if is_own_card(card)}


def _found(folder: Path, patterns: Iterable[str]) -> set[Path]:
    return {file for pattern in patterns for file in folder.glob(pattern)}


def remove_files(files: Iterable[Path]) -> None:
    """Remove files and folders, and the folders that held nothing else."""
    for file in sorted(files):
        remove(file)
        with suppress(OSError):  # it holds something else, or is a link
            file.parent.rmdir()


def remove_left_overs_of_run(folder: Path) -> None:
    """Remove what killed runs have left of files that they were about to write."""
    for name in (SUMMARY, PLAN, PLAN_PICTURE, MEMORY_PICTURE, SETTINGS, RECORD):
        remove(temporary_path(folder / name))
    for file in folder.glob(f".{SUMMARY}.rank*"):
        remove(file)
    for place in (folder / "checkpoints", folder / "export"):
        remove_left_over(place)


def has_checkpoint(folder: Path) -> bool:
    """Whether a folder holds a checkpoint of a run."""
    # A run that was killed while it replaced a folder has left only the backup.
    return any(
        any((folder / "checkpoints").glob(name))
        for name in ("*.ckpt", ".last*.ckpt.old", ".best*.old")
    )


def has_trained(folder: Path) -> bool:
    """Whether a folder holds what a training run has brought: weights, or a summary of its end."""
    if has_checkpoint(folder) or any((folder / "export").glob("*.safetensors")):
        return True
    summary = _summary(folder)
    return summary.get("status") == "completed" and bool(summary.get("steps"))


def has_results(folder: Path) -> bool:
    """Whether a folder holds the result of any run, of one that only validated too."""
    return has_trained(folder) or _summary(folder).get("status") == "completed"


def _summary(folder: Path) -> dict[str, object]:
    try:
        return read_json(folder / SUMMARY)
    except (FileNotFoundError, ValueError):  # a damaged one alone says nothing
        return {}
