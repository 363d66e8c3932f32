"""What is told of the model that a training starts from: its names and its license."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, metadata_load
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # has no __all__
from yaml import YAMLError

from lit_ft.storage.hub import offline_if_unreachable

_SUMMARY = "summary.json"  # what every run leaves in its folder
_SWEEP = "multirun.yaml"  # what a sweep leaves in the folder of its runs' folders


@dataclass(frozen=True)
class Base:
    """The model that a training starts from.

    Args:
        name: The name to show.
        place: What `from_pretrained` takes to load it; None for random weights.
        hub_id: Its name on the Hugging Face Hub; None if it is not known to be there.
        license: The identifier of its license, such as "apache-2.0"; None if it is not known.
    """

    name: str
    place: str | None = None
    hub_id: str | None = None
    license: str | None = None


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a run."""
    return (folder / _SUMMARY).is_file()


def name_of_folder(folder: str | Path) -> str:
    """Return the name of the model in a folder: that of its run, or else the folder's own.

    The model that the run in `runs/r1` has exported to `runs/r1/export` is `r1`. The first run of
    a sweep in `runs/rates` is `rates-0`, as its folder `runs/rates/0` says too little alone.
    """
    folder = Path(folder).expanduser().resolve()
    exported = folder.parent if folder.name == "adapter" else folder
    run = exported.parent if exported.name == "export" else exported
    if not is_run(run):
        return folder.name
    return f"{run.parent.name}-{run.name}" if (run.parent / _SWEEP).is_file() else run.name


def place_of_folder(folder: str | Path) -> str:
    """Return a path by which code finds a folder, without what only this machine has.

    It is the path from the current folder, if the folder lies in it. Otherwise it is the folder's
    name after `./`, which nothing takes for a name on the Hub.
    """
    folder = Path(folder).expanduser().resolve()
    if folder.is_relative_to(Path.cwd()):
        return folder.relative_to(Path.cwd()).as_posix()
    return f"./{folder.name}"


def base_of(source: Any) -> Base:
    """Return what is known of the model that a source loads, without loading it.

    Args:
        source: The source of the model, such as `Pretrained`. Its attributes `hub_id`
            and `license` are used if it has them.
    """
    name = str(getattr(source, "name", "") or type(source).__name__)
    hub_id, license = getattr(source, "hub_id", None), getattr(source, "license", None)
    place = getattr(source, "name_or_path", hub_id)
    if not place:
        return Base(f"random weights ({name})")
    known = base_at(place, revision=getattr(source, "revision", None), license=license)
    return replace(known, name=name, hub_id=hub_id or known.hub_id)


def base_at(place: str, *, revision: str | None = None, license: str | None = None) -> Base:
    """Return what is known of a model of the Hub or of a folder.

    Args:
        place: The name on the Hub or the folder; empty for random weights.
        revision: The branch, tag or commit on the Hub; None for the default branch.
        license: The license; None reads it from the model card.
    """
    if not place:
        return Base("random weights")
    folder = Path(place).expanduser()
    if folder.is_dir():
        license = license or _license(folder / "README.md")
        return Base(name_of_folder(folder), place_of_folder(folder), license=license)
    try:
        validate_repo_id(place)
    except HFValidationError:  # such as the path of a folder that is gone
        return Base(folder.name, place_of_folder(folder), license=license)
    return Base(place, place, place, license or _license_on_hub(place, revision))


def _license_on_hub(hub_id: str, revision: str | None) -> str | None:
    # A hub fails in many ways, and none may cost the export.
    with suppress(Exception), offline_if_unreachable():
        return _license(Path(hf_hub_download(hub_id, "README.md", revision=revision)))
    return None


def _license(card: Path) -> str | None:
    """Return the license that a model card names by an identifier of the Hub."""
    try:
        license = (metadata_load(card) or {}).get("license") if card.is_file() else None
    except (OSError, ValueError, AttributeError, YAMLError):  # the card is anyone's
        return None
    return license if isinstance(license, str) and license != "other" else None
