"""Permissions of files that libraries write."""

from __future__ import annotations

import os
from pathlib import Path


def open_to_others(folder: Path) -> None:
    """Give a folder's weights the permissions that new files of this process have.

    safetensors lets nobody but their owner read the files that it writes, so that a server that
    runs as another user could not load the model.

    Args:
        folder: The folder of the weights. Links in it are left alone, because they may lead to
            files of the user.
    """
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    for file in folder.glob("*.safetensors"):
        if not file.is_symlink():
            file.chmod(0o666 & ~mask)
