"""The log of a run, which may move to another file while the run goes on."""

from __future__ import annotations

import logging
from pathlib import Path

from lit_ft.run.redaction import RedactingFormatter

FORMAT = "[%(asctime)s][%(name)s][%(levelname)s] - %(message)s"  # Hydra's


class RunLog:
    """Writes the messages of all loggers to a file.

    Args:
        file: The file, to which messages are added.
    """

    def __init__(self, file: Path) -> None:
        self._handler = _handler(file)
        logging.getLogger().addHandler(self._handler)

    def move_to(self, file: Path) -> None:
        """Add the messages so far to another file, and go on there."""
        self.close()
        old = Path(self._handler.baseFilename)
        _without_link(file)
        with file.open("a", encoding="utf-8") as stream:
            stream.write(old.read_text(encoding="utf-8"))
        old.unlink()
        self._handler = _handler(file)
        logging.getLogger().addHandler(self._handler)

    def close(self) -> None:
        """Write nothing more."""
        logging.getLogger().removeHandler(self._handler)
        self._handler.close()


def _without_link(file: Path) -> None:
    """Remove a link, so that no file outside the run's folder is written to."""
    if file.is_symlink():
        file.unlink()


def _handler(file: Path) -> logging.FileHandler:
    _without_link(file)
    handler = logging.FileHandler(file, encoding="utf-8")
    handler.setFormatter(RedactingFormatter(FORMAT))
    return handler
