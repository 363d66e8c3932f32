"""Links in a folder that a library is about to write to."""

from __future__ import annotations

from pathlib import Path

_WRITTEN = (".json", ".jinja", ".md", ".model", ".safetensors", ".txt")


def remove_links(folder: Path) -> None:
    """Remove the links in a folder that have the names of files of a model.

    Libraries write through a link to the file that it names. A folder may be a copy of anyone's,
    with links to files of the user.
    """
    for path in folder.glob("*"):
        if path.is_symlink() and path.suffix in _WRITTEN:
            path.unlink()
